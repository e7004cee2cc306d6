//! A network of the suite's own: a bridge that CNI's plugins make, with addresses that no other network here has, and the probe
//! that is sent through it.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nacre_net::Netns;
use nacre_net::cni::{Attachment, Conflist};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::context::Context;
use crate::ctr;
use crate::poll;

/// The bridge's name and the networks on it.
const BRIDGE: &str = "nacre-e2e0";
const V4: &str = "10.87.61";
const V6: &str = "fd87:61::";
/// What the probe is called within a container that has its folder as `/probe`.
pub(crate) const PROBE: &str = "/probe/nacre-probe";

/// A network list on the disk. Dropping it removes the bridge.
pub(crate) struct Network {
    /// The list's file, alone in its folder.
    pub list: PathBuf,
    leases: PathBuf,
    plugins: PathBuf,
}

/// What differs among the suite's networks.
pub(crate) struct Wanted {
    /// Bytes; none: the plugin's own.
    pub mtu: Option<u16>,
    /// Addresses for guests, from the second on; the first is the host's.
    pub addresses: u8,
}

impl Default for Wanted {
    fn default() -> Self {
        Self {
            mtu: None,
            addresses: 200,
        }
    }
}

impl Network {
    /// Writes its list; the bridge comes with the first that is attached.
    pub fn write(context: &Context, wanted: &Wanted) -> Result<Self> {
        let folder = context.path("net.d");
        std::fs::create_dir_all(&folder)?;
        let list = folder.join("10-e2e.conflist");
        let leases = context.path("leases");
        let plugins = std::env::var_os("NACRE_CNI_BIN")
            .context("NACRE_CNI_BIN is not set: it names the folder with CNI's plugins")?;
        let last = wanted.addresses + 1;
        let mut bridge = json!({
            "type": "bridge", "bridge": BRIDGE, "isGateway": true, "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": leases,
                "ranges": [
                    [{ "subnet": format!("{V4}.0/24"), "rangeStart": format!("{V4}.2"), "rangeEnd": format!("{V4}.{last}"),
                       "gateway": format!("{V4}.1") }],
                    [{ "subnet": format!("{V6}/64"), "rangeStart": format!("{V6}2"), "gateway": format!("{V6}1") }],
                ],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
            "dns": { "nameservers": [format!("{V4}.1")], "search": ["e2e.test"] },
        });
        if let Some(mtu) = wanted.mtu {
            bridge["mtu"] = json!(mtu);
        }
        let portmap =
            json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true });
        let text = json!({ "cniVersion": "1.0.0", "name": "e2e", "plugins": [bridge, portmap] });
        std::fs::write(&list, serde_json::to_vec_pretty(&text)?)?;
        Ok(Self {
            list,
            leases,
            plugins: plugins.into(),
        })
    }

    /// The folder of its list.
    pub fn folder(&self) -> &Path {
        self.list.parent().unwrap_or(Path::new("/"))
    }

    /// The host's address.
    pub fn host(&self, six: bool) -> IpAddr {
        let text = match six {
            true => format!("{V6}1"),
            false => format!("{V4}.1"),
        };
        text.parse().expect("an address")
    }

    /// A configuration of nacre with which a VM gets this network.
    pub fn config(&self) -> String {
        format!(
            "[network]\ncni_conf_dir = {:?}\ncni_bin_dirs = [{:?}]\n",
            self.folder(),
            self.plugins
        )
    }

    /// Addresses that are given out.
    pub fn leases(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.leases.join("e2e"));
        let names = entries.into_iter().flatten().flatten();
        let mut addresses: Vec<String> = names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.parse::<IpAddr>().is_ok() || name.contains(':'))
            .collect();
        addresses.sort();
        addresses
    }

    /// Fails if addresses, ports, or interfaces of containers are left.
    pub fn expect_nothing_left(&self, limit: Duration) -> Result<()> {
        let left = || {
            let mut left = self.leases();
            left.extend(ports_of_bridge());
            left.extend(published().into_iter().filter(|rule| rule.contains(V4)));
            left
        };
        let gone = poll::until("the end of all of it", limit, || {
            Ok(left().is_empty().then_some(()))
        });
        gone.with_context(|| format!("left are {:?}", left()))
    }

    /// Attaches a namespace as CRI does, by the plugins.
    pub fn attach(&self, container: &str, interface: &str, netns: &Path) -> Result<Attachment> {
        let list = Conflist::load(&self.list)?;
        let plugins = vec![self.plugins.clone()];
        let mut attachment = Attachment::new(list, plugins, container, interface, netns);
        attachment.add(&mut |_| Ok(()))?;
        Ok(attachment)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = ctr::run(Command::new("ip").args(["link", "del", BRIDGE]));
    }
}

/// Interfaces on the bridge.
pub(crate) fn ports_of_bridge() -> Vec<String> {
    let entries = std::fs::read_dir(format!("/sys/class/net/{BRIDGE}/brif"));
    let entries = entries.into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Rules of the host that lead ports elsewhere.
fn published() -> Vec<String> {
    let output = Command::new("iptables").args(["-t", "nat", "-S"]).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .map(str::to_owned)
        .collect()
}

/// A namespace with a name, as CRI makes one. Dropping it removes the name.
pub(crate) struct Named {
    pub path: PathBuf,
}

impl Named {
    pub fn make(name: &str) -> Result<Self> {
        let path = Path::new("/run/netns").join(name);
        std::fs::create_dir_all("/run/netns")?;
        std::fs::File::create(&path)?;
        let netns = Netns::create()?;
        let source = format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd());
        mount(
            Some(source.as_str()),
            &path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .context("naming a network namespace")?;
        Ok(Self { path })
    }

    /// Interfaces that are there, without loopback and what the kernel makes of itself.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let netns = Netns::open(&self.path)?;
        let mut names = netns.enter(|| Ok(interfaces_here()))?;
        names.retain(|name| !["lo", "sit0", "ip6tnl0", "tunl0"].contains(&name.as_str()));
        names.sort();
        Ok(names)
    }
}

/// Those of the calling thread's namespace.
fn interfaces_here() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The probe's program on the host.
pub(crate) fn probe() -> Command {
    Command::new("/usr/local/bin/nacre-probe")
}

/// The probe serving on the host. Dropping it ends it.
pub(crate) struct Served(Child);

impl Served {
    pub fn start(port: u16) -> Result<Self> {
        let mut child = probe()
            .args(["net", "serve", "--port", &port.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the probe")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
        ensure!(line.contains("port"), "the probe said {line:?}");
        Ok(Self(child))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The words of the probe that sends, receives or asks, to an address.
pub(crate) fn words(what: &str, to: IpAddr, port: u16, options: &str) -> String {
    let to = match to {
        IpAddr::V4(to) => format!("{to}:{port}"),
        IpAddr::V6(to) => format!("[{to}]:{port}"),
    };
    format!("net {what} --to {to} {options}")
}

/// Runs the probe on the host.
pub(crate) fn probe_here(words: &str) -> Result<Value> {
    let output = ctr::run(probe().args(words.split_whitespace()))?;
    output.expect_code(0)?;
    serde_json::from_slice(&output.stdout).context("the probe printed no JSON")
}
