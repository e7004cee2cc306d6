//! The files by which programs in a container find names: resolv.conf, hosts and
//! hostname. They are in the state directory, shared read-only, and are written before the container's program runs.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use nacre_net::cni::{AddResult, dns};
use oci_spec::runtime::{MountBuilder, Spec};

use super::Error;

/// The host's own.
const HOSTS_RESOLV_CONF: &str = "/etc/resolv.conf";

/// Those that a container gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameFiles {
    resolv_conf: bool,
    hosts: bool,
    hostname: bool,
}

/// The files of one VM.
#[derive(Debug, Clone)]
pub struct Names {
    directory: PathBuf,
    hostname: String,
}

impl NameFiles {
    /// Those that a spec does not mount by itself.
    pub fn missing_in(spec: &Spec) -> Self {
        let mounts = spec.mounts().as_deref().unwrap_or_default();
        let lacks = |file: &str| {
            mounts.iter().all(|mount| {
                mount.destination() != Path::new(file) && mount.destination() != Path::new("/etc")
            })
        };
        Self {
            resolv_conf: lacks("/etc/resolv.conf"),
            hosts: lacks("/etc/hosts"),
            hostname: lacks("/etc/hostname"),
        }
    }
}

impl Names {
    /// Makes the files in a directory, empty but for the name of the host.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn make(directory: &Path, hostname: &str) -> Result<Self, Error> {
        let names = Self {
            directory: directory.to_owned(),
            hostname: hostname.to_owned(),
        };
        names.put("hostname", &format!("{hostname}\n"))?;
        names.put("hosts", &hosts(hostname, &[]))?;
        names.put("resolv.conf", "")?;
        Ok(names)
    }

    /// Adds their mounts to a spec.
    pub fn mount(&self, files: NameFiles, spec: &mut Spec) {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (wanted, name) in [
            (files.resolv_conf, "resolv.conf"),
            (files.hosts, "hosts"),
            (files.hostname, "hostname"),
        ] {
            let mount = MountBuilder::default()
                .destination(Path::new("/etc").join(name))
                .typ("bind")
                .source(self.directory.join(name))
                .options(["bind", "ro"].map(str::to_owned))
                .build();
            // All that a mount must have is given.
            if let (true, Ok(mount)) = (wanted, mount) {
                mounts.push(mount);
            }
        }
        spec.set_mounts(Some(mounts));
    }

    /// Says what came of the network: its addresses, and its name servers or else the host's.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(super) fn write(&self, result: Option<&AddResult>) -> Result<(), Error> {
        let addresses: Vec<_> = result
            .iter()
            .flat_map(|result| result.ips.iter().map(|ip| ip.address))
            .collect();
        self.put("hosts", &hosts(&self.hostname, &addresses))?;
        let told = result.and_then(|result| dns::resolv_conf(&result.dns));
        let text = told.unwrap_or_else(|| {
            let hosts = std::fs::read_to_string(HOSTS_RESOLV_CONF).unwrap_or_default();
            dns::host_resolv_conf(&hosts)
        });
        self.put("resolv.conf", &text)
    }

    /// In place: it is the file that is shared, whatever its name.
    fn put(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.directory.join(name);
        std::fs::write(&path, text).map_err(|source: io::Error| Error::File {
            doing: "write",
            path,
            source,
        })
    }
}

fn hosts(hostname: &str, addresses: &[std::net::IpAddr]) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for address in addresses {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{address}\t{hostname}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(mounted: &[&str]) -> Spec {
        let mounts: Vec<_> = mounted
            .iter()
            .map(|path| serde_json::json!({ "destination": path, "type": "tmpfs" }))
            .collect();
        let json = serde_json::json!({ "ociVersion": "1.1.0", "mounts": mounts });
        serde_json::from_value(json).unwrap()
    }

    fn destinations(spec: &Spec) -> Vec<String> {
        let mounts = spec.mounts().iter().flatten();
        mounts
            .map(|mount| mount.destination().display().to_string())
            .collect()
    }

    #[test]
    fn files_that_a_spec_mounts_by_itself_stay_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let names = Names::make(directory.path(), "box").unwrap();
        let mut all = spec(&[]);
        names.mount(NameFiles::missing_in(&all), &mut all);
        assert_eq!(
            destinations(&all),
            ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname"]
        );
        let mut some = spec(&["/etc/hosts", "/etc/resolv.conf"]);
        names.mount(NameFiles::missing_in(&some), &mut some);
        assert_eq!(
            destinations(&some),
            ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"]
        );
        let source = some.mounts().as_ref().unwrap()[2].source().clone().unwrap();
        assert_eq!(std::fs::read_to_string(source).unwrap(), "box\n");
    }

    #[test]
    fn addresses_have_the_name_of_the_host() {
        let text = hosts(
            "box",
            &["10.1.2.3".parse().unwrap(), "fd00::2".parse().unwrap()],
        );
        assert!(
            text.ends_with("\n10.1.2.3\tbox\nfd00::2\tbox\n") && text.starts_with("127.0.0.1"),
            "{text}"
        );
    }
}
