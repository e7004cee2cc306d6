//! A network of its own: a bridge in a network namespace, made by CNI's plugins, with a server at it and a namespace for each side, joined
//! by a veth pair. Nothing of it is in the host's network, and all of it is gone with this process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nacre_net::Netns;
use nacre_net::cni::{Attachment, Conflist};
use nacre_probe::net::Server;
use serde_json::json;

/// The bridge's address, the first of its network.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 111, 0, 1);
const SUBNET: &str = "10.111.0.0/24";

/// The bridge's namespace, with the server.
pub(super) struct Bridge {
    netns: Netns,
    network: Conflist,
    plugins: Vec<PathBuf>,
    server: SocketAddr,
}

/// A namespace with an interface at the bridge.
pub(super) struct Joined {
    pub netns: Netns,
    /// As other processes find it, as long as this is there.
    pub path: PathBuf,
}

impl Bridge {
    /// Makes the namespace, and has the server listen. The bridge comes with the first that joins. Its files are below a folder.
    pub fn make(folder: &Path, plugins: Vec<PathBuf>) -> Result<Self> {
        let netns = Netns::create()?;
        let server =
            netns.enter(|| Ok(Server::listen(IpAddr::from(Ipv4Addr::UNSPECIFIED), 0)))??;
        let port = server.port;
        std::thread::Builder::new()
            .name("server".to_owned())
            .spawn(move || server.run())
            .context("starting the server")?;
        let list = folder.join("bench.conflist");
        std::fs::write(&list, conflist(&folder.join("addresses")))
            .with_context(|| format!("writing {}", list.display()))?;
        Ok(Self {
            netns,
            network: Conflist::load(&list)?,
            plugins,
            server: (GATEWAY, port).into(),
        })
    }

    /// Where the server is, for those who have joined.
    pub fn server(&self) -> SocketAddr {
        self.server
    }

    /// A new namespace with `eth0` at the bridge.
    pub fn join(&self, name: &str) -> Result<Joined> {
        let netns = Netns::create()?;
        let path = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            netns.as_fd().as_raw_fd()
        );
        let mut attachment = Attachment::new(
            self.network.clone(),
            self.plugins.clone(),
            format!("bench-{name}"),
            "eth0",
            &path,
        );
        // There the plugin makes the bridge.
        self.netns
            .enter(|| Ok(attachment.add(&mut |_| Ok(()))))?
            .with_context(|| {
                format!("making the network of {name}: --cni says where plugins are")
            })?;
        Ok(Joined {
            netns,
            path: path.into(),
        })
    }
}

fn conflist(addresses: &Path) -> String {
    json!({
        "cniVersion": "1.0.0",
        "name": "nacre-bench",
        "plugins": [{
            "type": "bridge",
            "bridge": "bench0",
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": addresses,
                "ranges": [[{ "subnet": SUBNET }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_one_and_its_gateway_is_where_the_server_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.conflist");
        std::fs::write(&file, conflist(Path::new("/a"))).unwrap();
        let list = Conflist::load(&file).unwrap();
        assert_eq!(list.types().collect::<Vec<_>>(), ["bridge"]);
        let network = SUBNET.trim_end_matches("0/24");
        assert_eq!(GATEWAY.to_string(), format!("{network}1"));
    }
}
