//! What is a namespace, and where work in it runs.

use std::fs::File;
use std::process::Command;

use super::bench::*;
use crate::{Error, Netns, mirror};

#[test]
fn what_is_no_namespace_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("cni-1");
    File::create(&plain).unwrap();
    let fifo = folder.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    for (path, words) in [
        (
            plain.as_path(),
            "a plain file (is the namespace's mount on it gone?)",
        ),
        (folder.path(), "a directory"),
        (fifo.as_path(), "a FIFO"),
        ("/dev/null".as_ref(), "a device"),
        ("/proc/self/ns/mnt".as_ref(), "a mount namespace"),
        ("/proc/self/ns/user".as_ref(), "a user namespace"),
    ] {
        let error = Netns::open(path).unwrap_err();
        assert!(matches!(error, Error::NoNamespace { .. }), "{error:?}");
        let said = error.to_string();
        let start = format!(
            "{} is no network namespace but {words}: give",
            path.display()
        );
        assert!(said.starts_with(&start), "{said}");
    }
    let error = Netns::open(folder.path().join("none")).unwrap_err();
    assert!(
        matches!(error, Error::Namespace { doing: "open", .. }),
        "{error:?}"
    );
    let error = Netns::from_fd(File::open(&plain).unwrap().into()).unwrap_err();
    assert!(
        error.to_string().contains("cni-1 is no network namespace"),
        "{error}"
    );
}

#[test]
fn it_is_the_same_by_path_by_descriptor_and_by_process() {
    let by_path = Netns::open("/proc/self/ns/net").unwrap();
    let by_process = Netns::of_process(std::process::id()).unwrap();
    let file = File::open("/proc/thread-self/ns/net").unwrap();
    let by_descriptor = Netns::from_fd(file.into()).unwrap();
    assert_eq!(by_path.id(), by_process.id());
    assert_eq!(by_path.id(), by_descriptor.id());
    assert_ne!(Netns::create().unwrap().id(), by_path.id());
}

#[test]
fn work_runs_in_it_and_the_caller_stays_where_it_is() {
    let own = Netns::open("/proc/thread-self/ns/net").unwrap().id();
    let netns = Netns::create().unwrap();
    let inside = netns
        .enter(|| Netns::open("/proc/thread-self/ns/net"))
        .unwrap();
    assert_eq!(inside.id(), netns.id());
    let error = netns
        .enter(|| -> Result<(), Error> { panic!("number {}", 7) })
        .unwrap_err();
    assert!(error.to_string().ends_with("panicked: number 7"), "{error}");
    assert_eq!(Netns::open("/proc/thread-self/ns/net").unwrap().id(), own);
}

#[test]
fn an_empty_one_has_loopback_only_and_nothing_is_noted() {
    let netns = Netns::create().unwrap();
    for up in [false, true] {
        set_up(&netns, "lo", up);
        let before = dump(&netns);
        let mut mirror = mirror(&netns, &mut |_| panic!("nothing to note")).unwrap();
        assert_eq!(*mirror.network(), crate::describe::Network::default());
        assert!(mirror.take_ports().is_empty());
        mirror.remove().unwrap();
        assert_eq!(dump(&netns), before);
    }
}

#[test]
fn the_hosts_own_is_refused() {
    for path in ["/proc/self/ns/net", "/proc/1/ns/net"] {
        // In a container, init's may be hidden.
        let Ok(host) = Netns::open(path) else {
            assert_ne!(path, "/proc/self/ns/net");
            continue;
        };
        // So that nothing would be made.
        let mut note = |_: &crate::Made| Err(std::io::Error::other("a test"));
        let error = mirror(&host, &mut note).unwrap_err();
        assert!(matches!(error, Error::Hosts { .. }), "{error:?}");
        let said = error.to_string();
        assert!(
            said.contains(path) && said.contains("the host's own"),
            "{said}"
        );
    }
}

#[test]
fn what_a_mirror_needs_can_be_tried_without_one() {
    crate::try_out().unwrap();
}
