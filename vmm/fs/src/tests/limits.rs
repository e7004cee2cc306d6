//! What a guest may have at once, and what it gives back.

use std::fs;

use rustix::fs::{AtFlags, CWD};
use zerocopy::IntoBytes;

use super::descriptors;
use crate::abi::{ForgetOne, MkdirIn, Rename2In, opcode};
use crate::testing::{Guest, opath, server};
use crate::{Access, Caching, Error, FileServer, Limits};

const SMALL: Limits = Limits {
    inodes: 100,
    handles: 5,
    kept: 8,
    pinned: 64,
    workers: 1,
};

#[test]
fn limits_that_cannot_be_are_refused_by_name() {
    for (limits, name) in [
        (Limits { inodes: 0, ..SMALL }, "inodes"),
        (
            Limits {
                handles: 0,
                ..SMALL
            },
            "handles",
        ),
        (Limits { kept: 0, ..SMALL }, "kept"),
        (Limits { pinned: 7, ..SMALL }, "pinned"),
        (
            Limits {
                workers: 0,
                ..SMALL
            },
            "workers",
        ),
        (
            Limits {
                workers: 65,
                ..SMALL
            },
            "workers",
        ),
    ] {
        let error = FileServer::new(limits).expect_err("refused");
        assert!(
            matches!(error, Error::Limit { name: n, .. } if n == name),
            "{error}"
        );
    }
    Limits::default().check().expect("possible");
}

fn small(folder: &std::path::Path) -> Guest {
    let server = FileServer::new(SMALL).unwrap();
    server
        .export("x", opath(folder), Access::ReadWrite)
        .unwrap();
    Guest::new(&server)
}

#[test]
fn a_flood_of_handles_and_nodes_is_refused_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..200 {
        fs::write(folder.path().join(format!("f{i}")), "").unwrap();
    }
    let mut guest = small(folder.path());
    let root = guest.walk("x").unwrap();
    let f = guest.walk("x/f0").unwrap();
    let handles: Vec<_> = (0..5)
        .map(|_| guest.open(f, libc::O_RDONLY).unwrap())
        .collect();
    assert_eq!(guest.open(f, libc::O_RDONLY), Err(libc::ENFILE));
    assert_eq!(
        guest.create(root, "new", libc::O_RDWR, 0o600).err(),
        Some(libc::ENFILE)
    );
    assert!(
        !folder.path().join("new").exists(),
        "nothing is made before there is room"
    );
    for fh in handles {
        guest.release(opcode::RELEASE, f, fh).unwrap();
    }
    guest.open(f, libc::O_RDONLY).expect("room again");
    let mut nodes = Vec::new();
    let refused = loop {
        match guest.lookup(root, &format!("f{}", nodes.len() + 1)) {
            Ok(entry) => nodes.push(entry.nodeid),
            Err(error) => break error,
        }
    };
    assert_eq!((refused, nodes.len()), (libc::ENFILE, 98));
    assert!(guest.server.counters().node_descriptors <= 8 + 16);
    // Forgets beyond what was looked up, of what is not there, and by the batch.
    guest.forget(nodes[0], u64::MAX);
    guest.forget(nodes[0], 1);
    guest.forget(u64::MAX, 1);
    let batch: Vec<u8> = nodes[1..]
        .iter()
        .flat_map(|&nodeid| ForgetOne { nodeid, nlookup: 1 }.as_bytes().to_vec())
        .collect();
    guest.batch_forget(97, &batch);
    assert_eq!(guest.server.counters().inodes, 2);
    for count in [98, u32::MAX] {
        guest.batch_forget(count, &batch);
    }
    assert_eq!(guest.server.counters().malformed, 2);
    guest.lookup(root, "f1").expect("room again");
}

#[test]
fn lookups_are_counted_exactly() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "").unwrap();
    let mut guest = small(folder.path());
    let root = guest.walk("x").unwrap();
    let nodes: Vec<_> = (0..3)
        .map(|_| guest.lookup(root, "f").unwrap().nodeid)
        .collect();
    assert!(nodes.iter().all(|node| *node == nodes[0]));
    guest.forget(nodes[0], 2);
    guest.mode(nodes[0]).expect("one is left");
    guest.forget(nodes[0], 1);
    assert_eq!(guest.mode(nodes[0]), Err(libc::ESTALE));
    let again = guest.lookup(root, "f").unwrap().nodeid;
    assert_ne!(again, nodes[0], "numbers are not used again");
}

/// Looks up many files of `folder`, so that descriptors are closed, and works with the first ones again.
fn closed_and_found_again(folder: &std::path::Path, root: std::os::fd::OwnedFd, by_handle: bool) {
    for i in 0..90 {
        fs::write(folder.join(format!("f{i}")), format!("{i}")).unwrap();
    }
    let server = FileServer::new(SMALL).unwrap();
    server.export("x", root, Access::ReadWrite).unwrap();
    let mut guest = Guest::new(&server);
    let root = guest.walk("x").unwrap();
    let nodes: Vec<_> = (0..90)
        .map(|i| guest.lookup(root, &format!("f{i}")).expect("there").nodeid)
        .collect();
    assert!(server.counters().node_descriptors <= 8 + 2, "{server:?}");
    for (i, node) in nodes.iter().enumerate() {
        let fh = guest.open(*node, libc::O_RDONLY).expect("found again");
        assert_eq!(
            guest.read(*node, fh, 0, 10),
            Ok(format!("{i}").into_bytes())
        );
        guest.release(opcode::RELEASE, *node, fh).unwrap();
    }
    assert!(server.counters().node_descriptors <= 8 + 2, "{server:?}");
    // Renamed by the guest it is found, too.
    let request = Rename2In {
        newdir: root,
        ..Default::default()
    };
    let body = [request.as_bytes(), b"f0\0new\0"].concat();
    guest.ask(opcode::RENAME2, root, &body).unwrap();
    guest.mode(nodes[0]).expect("found by its new name");
    // Replaced by the host it is another file.
    for i in 1..90 {
        let (path, other) = (folder.join(format!("f{i}")), folder.join("other"));
        fs::write(&other, "other").unwrap();
        fs::rename(&other, &path).unwrap();
    }
    let stale = nodes[1..]
        .iter()
        .filter(|node| guest.mode(**node) == Err(libc::ESTALE))
        .count();
    assert!(stale >= 75, "{stale} of 89, {by_handle}");
    for (i, node) in (1..90).zip(&nodes[1..]) {
        let now = guest.lookup(root, &format!("f{i}")).unwrap().nodeid;
        assert_ne!(now, *node);
        guest.forget(now, 1);
    }
    // Where a host's file has come back under the number of one that is gone, it is another node.
    for node in &nodes {
        guest.forget(*node, 1);
    }
    assert_eq!(server.counters().inodes, 1);
}

#[test]
fn closed_descriptors_are_found_again_by_file_handle() {
    let folder = tempfile::tempdir().unwrap();
    closed_and_found_again(folder.path(), opath(folder.path()), true);
}

#[test]
fn closed_descriptors_are_found_again_by_name_where_there_are_no_handles() {
    use std::os::fd::AsFd;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    for name in ["lower", "upper", "work"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    let context = rustix::mount::fsopen("overlay", rustix::mount::FsOpenFlags::empty()).unwrap();
    for (key, name) in [
        ("lowerdir", "lower"),
        ("upperdir", "upper"),
        ("workdir", "work"),
    ] {
        let path = folder.path().join(name);
        rustix::mount::fsconfig_set_string(context.as_fd(), key, path.to_str().unwrap()).unwrap();
    }
    rustix::mount::fsconfig_create(context.as_fd()).unwrap();
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        rustix::mount::FsMountFlags::empty(),
        rustix::mount::MountAttrFlags::empty(),
    )
    .unwrap();
    let handle = crate::sys::FileHandle::of(mount.as_fd());
    assert!(
        handle.is_err(),
        "an overlay that gives handles tests nothing: {handle:?}"
    );
    // The host's side goes through the overlay, too.
    let through = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&mount));
    let through = std::path::PathBuf::from(through);
    let root = rustix::io::fcntl_dupfd_cloexec(&mount, 0).unwrap();
    closed_and_found_again(&through, root, false);
}

#[test]
fn a_guest_that_uses_all_its_nodes_all_the_time_has_no_more_descriptors_than_there_may_be() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..90 {
        fs::write(folder.path().join(format!("f{i}")), "").unwrap();
    }
    // More are kept than are looked at in one turn.
    let server = FileServer::new(Limits { kept: 40, ..SMALL }).unwrap();
    server
        .export("x", opath(folder.path()), Access::ReadWrite)
        .unwrap();
    let mut guest = Guest::new(&server);
    let root = guest.walk("x").unwrap();
    let (mut nodes, mut most) = (Vec::new(), 0);
    for i in 0..90 {
        nodes.push(guest.lookup(root, &format!("f{i}")).expect("room").nodeid);
        for node in &nodes {
            guest.mode(*node).expect("found");
        }
        let now = descriptors(folder.path());
        assert!(now <= SMALL.pinned + 1, "{now} at {i}");
        most = most.max(now);
    }
    assert!(most >= SMALL.pinned - 8, "{most}: the bound was not tried");
    for (i, node) in nodes.iter().enumerate() {
        let again = guest.lookup(root, &format!("f{i}")).expect("known");
        assert_eq!(again.nodeid, *node);
    }
    assert!(descriptors(folder.path()) <= SMALL.pinned + 1);
}

#[test]
fn directories_without_handles_add_up_to_a_bound() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = small(folder.path());
    let root = guest.walk("x").unwrap();
    for i in 0..99 {
        let body = [MkdirIn::default().as_bytes(), format!("d{i}\0").as_bytes()].concat();
        guest
            .ask(opcode::MKDIR, root, &body)
            .expect("within the limit of nodes");
    }
    assert!(guest.server.counters().node_descriptors <= 8 + 16);
}

#[test]
fn descriptors_stay_as_many_over_ten_thousand_rounds() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    let mut guest = Guest::of(folder.path(), Access::ReadWrite, Caching::default());
    let root = guest.walk("x").unwrap();
    let before = descriptors(folder.path());
    for _ in 0..10_000 {
        let f = guest.lookup(root, "f").unwrap().nodeid;
        let fh = guest.open(f, libc::O_RDWR).unwrap();
        guest.release(opcode::RELEASE, f, fh).unwrap();
        guest.forget(f, 1);
    }
    assert_eq!(descriptors(folder.path()), before);
    let counters = guest.server.counters();
    assert_eq!(
        (counters.inodes, counters.handles, counters.node_descriptors),
        (1, 0, 1)
    );
}

#[test]
fn the_end_of_a_session_closes_everything() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    let server = server();
    server
        .export("x", opath(folder.path()), Access::ReadWrite)
        .unwrap();
    let mut guest = Guest::new(&server);
    let before = descriptors(folder.path());
    for destroy in [true, false] {
        let f = guest.walk("x/f").unwrap();
        guest.open(f, libc::O_RDWR).unwrap();
        assert!(descriptors(folder.path()) > before);
        if destroy {
            guest.ask(opcode::DESTROY, 0, &[]).expect("answered");
            assert_eq!(guest.walk("x").err(), Some(libc::EIO), "not mounted");
        }
        guest.init();
        assert_eq!(descriptors(folder.path()), before);
        assert_eq!(guest.mode(f), Err(libc::ESTALE));
    }
    assert!(rustix::fs::statat(CWD, folder.path().join("f"), AtFlags::empty()).is_ok());
}
