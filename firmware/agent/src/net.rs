//! The guest's network: its devices are bound to their driver, moved to the
//! network namespace of containers, and configured there as the host describes.
//!
//! Containers share a namespace, as those of a pod do, beside the agent's own. One with a user namespace has a
//! network namespace of its own, since it may not join this one.

use std::fs::File;
use std::sync::{Mutex, PoisonError};

use nacre_net::describe::Network;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tracing::{info, warn};

use crate::container::blocking;
use crate::devices::{self, Tree};
use crate::error::{Doing, Error};
use crate::init;
use crate::uevents::Changes;

/// Where the network namespace is that containers share.
pub const SHARED: &str = "/run/nacre/netns";

/// Whether it is there.
static MADE: Mutex<bool> = Mutex::new(false);

/// Makes the namespace that containers share, with its loopback interface up, unless it is there. Blocks.
///
/// # Errors
/// What the kernel said.
pub fn share_once() -> Result<(), Error> {
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if *made {
        return Ok(());
    }
    let make = || -> Result<(), Error> {
        File::create(SHARED).doing(|| format!("making {SHARED}"))?;
        unshare(CloneFlags::CLONE_NEWNET).doing(|| "making a network namespace".into())?;
        init::loopback_up().doing(|| "bringing up the loopback interface".into())?;
        let (from, nothing) = (Some("/proc/thread-self/ns/net"), None::<&str>);
        mount(from, SHARED, nothing, MsFlags::MS_BIND, nothing)
            .doing(|| format!("naming a network namespace {SHARED}"))
    };
    // A thread of its own, that ends in there: the others stay where they are.
    std::thread::spawn(make).join().unwrap_or_else(|_| {
        Err(Error::Internal(
            "making a network namespace panicked".into(),
        ))
    })?;
    *made = true;
    Ok(())
}

/// Makes the network devices in these windows usable in the network namespace of a process, and configures there what the JSON
/// describes. After an error the devices are released.
///
/// # Errors
/// `InvalidArgument` if the description does not parse or does not fit the devices; `FailedPrecondition` if the kernel
/// has no driver of network devices, or no IPv6 for an IPv6 address; as [`devices::bind_network`]; `Internal` says what
/// else the kernel refused.
pub async fn configure(pid: i32, windows: Vec<u32>, json: Vec<u8>) -> Result<(), Error> {
    let path = format!("/proc/{pid}/ns/net");
    let netns = File::open(&path).doing(|| format!("opening {path}"))?;
    // Before the first is bound.
    let mut events = devices::listen()?;
    configure_in(Tree::of_guest(), netns, &mut events, windows, &json).await
}

/// Releases the network devices in these windows, all of them even if one is refused. One that is not bound is fine.
///
/// # Errors
/// As [`devices::unbind`].
pub async fn release(windows: Vec<u32>) -> Result<(), Error> {
    blocking(move || release_in(&Tree::of_guest(), &windows)).await
}

async fn configure_in(
    tree: Tree,
    netns: File,
    events: &mut impl Changes,
    windows: Vec<u32>,
    json: &[u8],
) -> Result<(), Error> {
    let network: Network = serde_json::from_slice(json).map_err(|error| {
        Error::InvalidArgument(format!("the network's description does not parse: {error}"))
    })?;
    let configured = bind_and_apply(&tree, netns, events, &windows, network).await;
    if configured.is_err()
        && let Err(error) = blocking(move || release_in(&tree, &windows)).await
    {
        warn!("releasing the network's devices again: {error}");
    }
    configured
}

async fn bind_and_apply(
    tree: &Tree,
    netns: File,
    events: &mut impl Changes,
    windows: &[u32],
    network: Network,
) -> Result<(), Error> {
    for window in windows {
        let name = devices::bind_network(tree, events, *window).await?;
        info!("the network device in window {window} has come as {name}");
    }
    blocking(move || {
        nacre_net::move_to(&network, &netns).map_err(refused)?;
        init::in_network(netns, move || nacre_net::apply(&network))
            .doing(|| "entering the container's network namespace".into())?
            .map_err(refused)
    })
    .await
}

fn release_in(tree: &Tree, windows: &[u32]) -> Result<(), Error> {
    let released = windows.iter().map(|window| devices::unbind(tree, *window));
    released.fold(Ok(()), Result::and)
}

/// An error with its causes in one line.
fn refused(error: nacre_net::Error) -> Error {
    let mut words = format!("configuring the network: {error}");
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    match error {
        nacre_net::Error::Configure { .. } => Error::InvalidArgument(words),
        nacre_net::Error::NoIpv6 { .. } => Error::FailedPrecondition(words),
        _ => Error::Internal(words),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::devices::tests::Made;
    use crate::uevents::tests::Script;

    /// One interface with a MAC address that no device has, so that nothing is changed where the tests run.
    const ELSEWHERE: &str = r#"{"interfaces":[{"name":"eth0","mac":[2,110,97,99,114,101],"mtu":1500,"carrier":true,
        "addresses":[]}],"routes":[],"neighbours":[]}"#;

    async fn tried(made: Made, mut events: Script, json: &str) -> (Error, Made) {
        let windows = vec![0, 7];
        let tree = Tree::clone(&made.tree);
        let here = File::open("/proc/self/ns/net").unwrap();
        let result = configure_in(tree, here, &mut events, windows, json.as_bytes()).await;
        (result.unwrap_err(), made)
    }

    #[tokio::test]
    async fn a_description_that_does_not_parse_binds_nothing() {
        for json in ["", "{}", "[]", r#"{"interfaces":7}"#] {
            let (error, made) = tried(Made::new(&["virtio_net"]), Script::empty(), json).await;
            assert!(matches!(error, Error::InvalidArgument(_)), "{error:?}");
            assert_eq!(made.written("bind"), None);
        }
    }

    #[tokio::test]
    async fn what_cannot_be_configured_is_released() {
        let made = Made::new(&["virtio_net"]);
        let events = Script(vec![
            Box::new(made.come("LNRO0005:00", "virtio0/net/eth0")),
            Box::new(made.come("LNRO0005:01", "virtio1/net/eth1")),
        ]);
        let (error, made) = tried(made, events, ELSEWHERE).await;
        assert!(matches!(error, Error::InvalidArgument(_)), "{error:?}");
        let said = error.to_string();
        assert!(
            said.starts_with("configuring the network: Cannot configure the interface \"eth0\": no interface has the MAC address 02:6e:61:63:72:65"),
            "{said}"
        );
        assert_eq!(made.written("bind").as_deref(), Some("LNRO0005:01"));
        assert_eq!(made.written("unbind").as_deref(), Some("LNRO0005:01"));
    }

    #[tokio::test(start_paused = true)]
    async fn where_one_does_not_come_those_before_it_are_released() {
        let made = Made::new(&["virtio_net"]);
        let events = Script::of(made.come("LNRO0005:00", "virtio0/net/eth0"));
        let (error, made) = tried(made, events, ELSEWHERE).await;
        assert!(error.to_string().contains("window 7"), "{error}");
        assert_eq!(made.written("unbind").as_deref(), Some("LNRO0005:00"));
    }

    #[test]
    fn all_are_released_whatever_the_first_says() {
        let made = Made::new(&[]);
        made.come("LNRO0005:01", "virtio1/net/eth1")();
        let error = release_in(&made.tree, &[99, 7]).unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{error:?}");
        assert_eq!(made.written("unbind").as_deref(), Some("LNRO0005:01"));
    }

    #[test]
    fn what_the_kernel_said_is_in_the_words() {
        let error = refused(nacre_net::Error::NoIpv6 {
            address: "fd00::2/64".into(),
            interface: "eth0".into(),
            source: io::Error::from_raw_os_error(libc::EOPNOTSUPP),
        });
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error:?}");
        let said = error.to_string();
        assert!(said.contains("fd00::2/64 to eth0: "), "{said}");
        assert!(said.contains("Operation not supported"), "{said}");
        let error = refused(nacre_net::Error::Netlink {
            doing: "add",
            what: "the route to 9.0.0.0/8".into(),
            source: io::Error::from_raw_os_error(libc::ENETUNREACH),
        });
        assert!(matches!(error, Error::Internal(_)), "{error:?}");
    }
}
