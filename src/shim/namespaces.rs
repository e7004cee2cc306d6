//! What the daemon leaves and joins before it has any thread: session, mount
//! namespace, and the network namespace of its container, so that
//! `/proc/PID/ns/net` of the shim is the one that others fill for it.

use std::fs::File;
use std::path::{Path, PathBuf};

use nacre_net::Netns;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::origin;

/// A step into the daemon's own surroundings that failed.
#[derive(Debug, thiserror::Error)]
#[error("Cannot {doing}: {source}")]
pub struct Error {
    doing: String,
    source: std::io::Error,
}

fn failed<E: Into<std::io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |source| Error {
        doing: doing.into(),
        source: source.into(),
    }
}

/// The network that a container's spec wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The host's.
    Host,
    /// A fresh one.
    Fresh,
    /// One that somebody has made.
    At(PathBuf),
}

impl Network {
    /// The same, with the host's by its path known as such.
    #[must_use]
    pub fn known(self) -> Self {
        let Self::At(path) = &self else {
            return self;
        };
        let hosts = origin::network().map(|host| host.id());
        match (Netns::open(path).map(|netns| netns.id()), hosts) {
            (Ok(found), Ok(hosts)) if found == hosts => Self::Host,
            _ => self,
        }
    }

    /// Reads it from a spec.
    pub fn of(spec: &Spec) -> Self {
        let namespaces = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
        match network.map(|namespace| namespace.path().as_deref()) {
            None => Self::Host,
            Some(None) => Self::Fresh,
            Some(Some(path)) if path == Path::new("") => Self::Fresh,
            Some(Some(path)) => Self::At(path.to_owned()),
        }
    }
}

/// Makes this process a session of its own with a private mount namespace and
/// the network. Must be called while it has one thread: namespaces belong to threads.
///
/// # Errors
/// Any step that the system refused.
pub fn enter(network: &Network) -> Result<(), Error> {
    // The child of a fork is no group leader, so this fails only if it has been done.
    let _ = nix::unistd::setsid();
    umask(Mode::from_bits_truncate(0o022));
    origin::leaving_namespaces().map_err(failed("open this process's namespaces"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("make a mount namespace"))?;
    // What the host mounts still comes in; what is mounted here does not go out, and goes with us.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
    .map_err(failed("detach the mount namespace from the host's"))?;
    match network {
        Network::Host => Ok(()),
        Network::Fresh => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(failed("make a network namespace"))
        }
        Network::At(path) => {
            let doing = || format!("enter the network namespace {}", path.display());
            let file = File::open(path).map_err(failed(doing()))?;
            setns(file, CloneFlags::CLONE_NEWNET).map_err(failed(doing()))
        }
    }
}

/// What the kernel's out-of-memory killer should think of a shim: what the spec says of its container, since the
/// guest's memory is the shim's; else a little worse than of our parent, as containerd's own shims do. None: as it is.
pub fn oom_score(spec: &Spec) -> Option<i32> {
    let asked = spec
        .process()
        .as_ref()
        .and_then(|process| process.oom_score_adj());
    asked.or_else(|| {
        let parent = nix::unistd::getppid();
        let text = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj")).ok()?;
        text.trim().parse::<i32>().ok().map(|score| score + 1)
    })
}

/// Gives `pid` a score for the out-of-memory killer, -1000 to 1000.
pub fn adjust_oom_score(pid: u32, score: i32) {
    // Lowering needs a capability, raising does not; not having either is no reason to fail.
    let _ = std::fs::write(
        format!("/proc/{pid}/oom_score_adj"),
        score.clamp(-1000, 1000).to_string(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(namespaces: &str) -> Network {
        let text = format!(r#"{{"ociVersion":"1.1.0","linux":{{"namespaces":[{namespaces}]}}}}"#);
        Network::of(&serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn the_spec_decides_about_the_network() {
        assert_eq!(network(r#"{"type":"pid"}"#), Network::Host);
        assert_eq!(
            network(r#"{"type":"pid"},{"type":"network"}"#),
            Network::Fresh
        );
        assert_eq!(
            network(r#"{"type":"network","path":"/run/netns/x"}"#),
            Network::At("/run/netns/x".into())
        );
        let bare: Spec = serde_json::from_str(r#"{"ociVersion":"1.1.0"}"#).unwrap();
        assert_eq!(Network::of(&bare), Network::Host);
    }
    #[test]
    fn the_containers_score_for_the_oom_killer_is_the_shims() {
        let spec = |process: &str| -> Spec {
            serde_json::from_str(&format!(r#"{{"ociVersion":"1.1.0"{process}}}"#)).unwrap()
        };
        let asked = r#","process":{"user":{"uid":0,"gid":0},"cwd":"/","oomScoreAdj":-997}"#;
        assert_eq!(oom_score(&spec(asked)), Some(-997));
        let parents =
            std::fs::read_to_string(format!("/proc/{}/oom_score_adj", nix::unistd::getppid()));
        let expected = parents
            .ok()
            .and_then(|text| text.trim().parse::<i32>().ok());
        assert_eq!(oom_score(&spec("")), expected.map(|score| score + 1));
    }
}
