//! Exports: what they show, and what becomes of them.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::StatVfsMountFlags;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use zerocopy::IntoBytes;

use super::{descriptors, snapshot};
use crate::abi::{self, EntryOut, MkdirIn, opcode};
use crate::nodes::open_child;
use crate::testing::{Guest, opath, server};
use crate::{Access, Caching, Error, open_export};

#[test]
fn names_of_exports_are_single_components() {
    let folder = tempfile::tempdir().unwrap();
    let server = server();
    for name in ["", ".", "..", "a/b", "/", "a\0b", &"n".repeat(256)] {
        let refused = server.export(name, opath(folder.path()), Access::ReadOnly);
        assert!(matches!(refused, Err(Error::Name { .. })), "{name:?}");
    }
    let fifo = folder.path().join("fifo");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, 0o600.into(), 0).unwrap();
    for path in [Path::new("/dev/null"), &fifo] {
        let refused = server.export("x", opath(path), Access::ReadOnly);
        assert!(matches!(refused, Err(Error::Kind { .. })), "{path:?}");
    }
    server
        .export("x", opath(folder.path()), Access::ReadOnly)
        .expect("the first of its name");
    let taken = server.export("x", opath(folder.path()), Access::ReadOnly);
    assert!(matches!(taken, Err(Error::Taken { .. })), "{taken:?}");
}

#[test]
fn an_exports_mount_has_neither_set_id_programs_nor_devices() {
    let folder = tempfile::tempdir().unwrap();
    for (access, recursive) in [
        (Access::ReadOnly, false),
        (Access::ReadOnly, true),
        (Access::ReadWrite, false),
        (Access::ReadWrite, true),
    ] {
        let root = open_export(folder.path(), access, recursive).unwrap();
        let flags = rustix::fs::fstatvfs(&root).unwrap().f_flag;
        let always = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
        assert!(flags.contains(always), "{flags:?}");
        assert_eq!(
            flags.contains(StatVfsMountFlags::RDONLY),
            access == Access::ReadOnly,
            "{flags:?}"
        );
    }
}

/// Names are judged before, so that this is the second line.
#[test]
fn what_is_opened_below_a_directory_is_in_it_whatever_the_name() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("inner")).unwrap();
    std::os::unix::fs::symlink("/", folder.path().join("inner/link")).unwrap();
    let inner = opath(&folder.path().join("inner"));
    for (name, refusal) in [
        (c"..", Some(Errno::XDEV)),
        (c"../inner", Some(Errno::XDEV)),
        (c"/etc", Some(Errno::XDEV)),
        (c"link/etc", Some(Errno::LOOP)),
        (c"link", None),
        (c".", None),
    ] {
        let opened = open_child(inner.as_fd(), name);
        assert_eq!(opened.err(), refusal, "{name:?}");
    }
}

#[test]
fn a_single_file_is_exported_without_its_neighbours() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("resolv.conf");
    fs::write(&path, "nameserver").unwrap();
    let server = server();
    server
        .export("file", opath(&path), Access::ReadWrite)
        .unwrap();
    let mut guest = Guest::new(&server);
    let file = guest.walk("file").expect("there");
    let fh = guest.open(file, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(file, fh, 0, 100), Ok(b"nameserver".to_vec()));
    guest.write(file, fh, 0, b"NAME").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"NAMEserver");
    assert_eq!(guest.lookup(file, "x").err(), Some(libc::ENOTDIR));
    let opendir = guest.ask(opcode::OPENDIR, file, abi::OpenIn::default().as_bytes());
    assert_eq!(opendir, Err(libc::ENOTDIR));
}

#[test]
fn what_is_withdrawn_is_gone_and_closed() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    let server = server();
    let mut guest = Guest::new(&server);
    let before = descriptors(folder.path());
    for round in 0..3 {
        server
            .export("x", opath(folder.path()), Access::ReadWrite)
            .unwrap();
        let f = guest.walk("x/f").expect("there");
        let root = guest.walk("x").unwrap();
        let fh = guest.open(f, libc::O_RDWR).unwrap();
        assert!(server.withdraw("x"));
        assert!(!server.withdraw("x"));
        assert_eq!(descriptors(folder.path()), before, "round {round}");
        assert_eq!(guest.walk("x").err(), Some(libc::ENOENT));
        assert_eq!(guest.lookup(root, "f").err(), Some(libc::ESTALE));
        assert_eq!(guest.read(f, fh, 0, 10), Err(libc::EBADF));
        assert_eq!(guest.open(f, libc::O_RDONLY), Err(libc::ESTALE));
        // The guest's late forgets concern no one.
        guest.forget(f, 1);
        let counters = server.counters();
        assert_eq!(
            (counters.inodes, counters.handles, counters.exports),
            (0, 0, 0)
        );
    }
}

/// A file system of that kind that is mounted nowhere.
fn detached(
    kind: &str,
    options: &[(&str, &str)],
) -> Result<std::os::fd::OwnedFd, rustix::io::Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, *value)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
}

#[test]
fn a_detached_overlay_is_a_root_file_system() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    for name in ["lower", "upper", "work"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    fs::write(folder.path().join("lower/f"), "lower").unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let overlay = detached(
        "overlay",
        &[
            ("lowerdir", &path("lower")),
            ("upperdir", &path("upper")),
            ("workdir", &path("work")),
        ],
    )
    .expect("this kernel has overlayfs");
    let server = server();
    server
        .export_cached("x", overlay, Access::ReadWrite, Caching::Always)
        .unwrap();
    let mut guest = Guest::new(&server);
    let root = guest.walk("x").unwrap();
    let f = guest.walk("x/f").unwrap();
    let reader = guest.open(f, libc::O_RDONLY).unwrap();
    let writer = guest.open(f, libc::O_WRONLY).unwrap();
    guest.write(f, writer, 0, b"UPPER").unwrap();
    assert_eq!(
        guest.read(f, reader, 0, 10),
        Ok(b"UPPER".to_vec()),
        "copied up"
    );
    assert_eq!(fs::read(folder.path().join("lower/f")).unwrap(), b"lower");
    guest.ask(opcode::UNLINK, root, b"f\0").unwrap();
    let whiteout = fs::symlink_metadata(folder.path().join("upper/f")).unwrap();
    assert!(std::os::unix::fs::FileTypeExt::is_char_device(
        &whiteout.file_type()
    ));
    // In the layer itself the whiteout is seen, but neither opened nor made.
    server
        .export(
            "layer",
            opath(&folder.path().join("upper")),
            Access::ReadWrite,
        )
        .unwrap();
    let layer = guest.walk("layer").unwrap();
    let f = guest.lookup(layer, "f").expect("seen");
    assert_eq!(f.attr.mode & libc::S_IFMT, libc::S_IFCHR);
    assert_eq!(guest.open(f.nodeid, libc::O_RDONLY), Err(libc::ENXIO));
    for name in [
        b"trusted.overlay.opaque\0".as_slice(),
        b"trusted.overlay.origin\0",
    ] {
        let request = abi::SetxattrIn {
            size: 1,
            ..Default::default()
        };
        let body = [request.as_bytes(), name, b"y"].concat();
        assert_eq!(guest.ask(opcode::SETXATTR, layer, &body), Err(libc::EPERM));
        assert_eq!(
            guest.ask(opcode::REMOVEXATTR, layer, name),
            Err(libc::EPERM)
        );
    }
}

#[test]
fn mounts_below_an_export_are_crossed_and_told_apart() {
    // A thread with mounts of its own.
    let thread = std::thread::spawn(|| {
        // SAFETY: only this thread gets other mounts; its descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        let private = rustix::mount::MountPropagationFlags::PRIVATE
            | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut inner = folder.path().to_owned();
        for name in ["one", "two"] {
            let place = folder.path().join(name);
            fs::create_dir(&place).unwrap();
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("tmpfs", &place, "tmpfs", flags, None).unwrap();
            fs::write(place.join("f"), name).unwrap();
            inner = place;
        }
        let server = server();
        let export = |name: &str, access, recursive| {
            let root = open_export(folder.path(), access, recursive).expect("cloned");
            server.export(name, root, access).unwrap();
        };
        export("deep", Access::ReadWrite, true);
        export("sealed", Access::ReadOnly, true);
        export("flat", Access::ReadWrite, false);
        let mut guest = Guest::new(&server);
        let deep = guest.walk("deep").unwrap();
        let one = guest.lookup(deep, "one").unwrap();
        let two = guest.lookup(deep, "two").unwrap();
        let (f1, f2) = (
            guest.lookup(one.nodeid, "f").unwrap(),
            guest.lookup(two.nodeid, "f").unwrap(),
        );
        assert_ne!(one.attr.ino, two.attr.ino);
        assert_ne!(
            f1.attr.ino, f2.attr.ino,
            "the same number in two file systems"
        );
        assert_ne!(f1.nodeid, f2.nodeid);
        let fh = guest.open(f2.nodeid, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(f2.nodeid, fh, 0, 10), Ok(b"two".to_vec()));
        // What is mounted is in the clone, so that a hard link or a rename cannot leave it.
        let request = abi::LinkIn {
            oldnodeid: f1.nodeid,
        };
        let link = guest.call::<_, EntryOut>(opcode::LINK, two.nodeid, &request, b"g\0");
        assert_eq!(link.err(), Some(libc::EXDEV));
        assert_eq!(guest.walk("flat/two/f").err(), Some(libc::ENOENT));
        // The mount itself refuses, whatever the server would let through.
        let sealed = open_export(&inner, Access::ReadOnly, true).unwrap();
        let made = rustix::fs::mkdirat(&sealed, "d", 0o700.into());
        assert_eq!(made, Err(rustix::io::Errno::ROFS));
        let refused = open_export(&folder.path().join("nothing"), Access::ReadOnly, true);
        let refused = refused.expect_err("nothing is there").to_string();
        assert!(refused.contains("nothing"), "{refused}");
    });
    thread.join().expect("the thread's assertions hold");
}

#[test]
fn nothing_of_a_read_only_export_changes() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    fs::write(folder.path().join("d/f"), "text").unwrap();
    fs::write(folder.path().join("g"), "text").unwrap();
    std::os::unix::fs::symlink("g", folder.path().join("s")).unwrap();
    // The mount is writable: only the server stands before it.
    let mut guest = Guest::of(folder.path(), Access::ReadOnly, Caching::Always);
    let before = snapshot(folder.path(), true);
    let root = guest.walk("x").unwrap();
    let d = guest.walk("x/d").unwrap();
    let f = guest.walk("x/d/f").unwrap();
    let s = guest.walk("x/s").unwrap();
    let fh = guest.open(f, libc::O_RDONLY).expect("for reading");
    assert_eq!(guest.read(f, fh, 0, 9), Ok(b"text".to_vec()));
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDONLY | libc::O_TRUNC,
        libc::O_RDWR | libc::O_APPEND,
    ] {
        assert_eq!(guest.open(f, flags), Err(libc::EROFS), "{flags:#x}");
        assert_eq!(
            guest.create(root, "new", flags, 0o600).err(),
            Some(libc::EROFS)
        );
        assert_eq!(guest.create(d, "f", flags, 0o600).err(), Some(libc::EROFS));
    }
    // Bodies that would do if they were let; the first eight bytes are a handle or a node.
    for opcode in 0..60 {
        for node in [abi::ROOT_ID, root, d, f, s] {
            for front in [fh, d, root, u64::from(abi::fattr::MODE | abi::fattr::SIZE)] {
                let changing = matches!(
                    opcode,
                    opcode::SETATTR
                        | opcode::SYMLINK
                        | opcode::MKNOD
                        | opcode::MKDIR
                        | opcode::UNLINK
                        | opcode::RMDIR
                        | opcode::RENAME
                        | opcode::RENAME2
                        | opcode::LINK
                        | opcode::SETXATTR
                        | opcode::REMOVEXATTR
                        | opcode::CREATE
                        | opcode::TMPFILE
                        | opcode::FALLOCATE
                        | opcode::COPY_FILE_RANGE
                        | opcode::WRITE
                );
                if matches!(
                    opcode,
                    opcode::INIT
                        | opcode::DESTROY
                        | opcode::FORGET
                        | opcode::BATCH_FORGET
                        | opcode::RELEASE
                        | opcode::RELEASEDIR
                ) {
                    continue;
                }
                for filler in [0_u8, 1] {
                    let mut body = front.to_le_bytes().to_vec();
                    body.extend([filler; 80]);
                    body.extend(b"f\0g\0");
                    let answer = guest.ask(opcode, node, &body);
                    assert!(!changing || answer.is_err(), "{opcode} {node} {answer:?}");
                }
            }
        }
    }
    let named = |front: &[u8]| [front, b"f\0new\0"].concat();
    for (opcode, body) in [
        (opcode::MKDIR, named(MkdirIn::default().as_bytes())),
        (opcode::MKNOD, named(abi::MknodIn::default().as_bytes())),
        (opcode::SYMLINK, named(&[])),
        (opcode::UNLINK, b"f\0".to_vec()),
        (opcode::RMDIR, b"f\0".to_vec()),
        (opcode::RENAME, named(&d.to_le_bytes())),
        (opcode::LINK, named(&f.to_le_bytes())),
        (opcode::TMPFILE, named(abi::CreateIn::default().as_bytes())),
        (
            opcode::SETATTR,
            abi::SetattrIn::default().as_bytes().to_vec(),
        ),
        (opcode::REMOVEXATTR, b"user.a\0".to_vec()),
    ] {
        assert_eq!(guest.ask(opcode, d, &body), Err(libc::EROFS), "{opcode}");
    }
    assert_eq!(guest.write(f, fh, 0, b"x"), Err(libc::EROFS));
    let request = abi::FallocateIn {
        fh,
        length: 100,
        ..Default::default()
    };
    assert_eq!(
        guest.ask(opcode::FALLOCATE, f, request.as_bytes()),
        Err(libc::EROFS)
    );
    assert_eq!(snapshot(folder.path(), true), before);
}
