//! What a hostile guest can say to a file server.

use std::fs;
use std::mem::size_of;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::snapshot;
use crate::abi::{
    self, CreateIn, EntryOut, GetxattrIn, InHeader, InitIn, LinkIn, MkdirIn, MknodIn, OpenIn,
    OutHeader, ReadIn, Rename2In, RenameIn, SetattrIn, SetxattrIn, WriteIn, fattr, init, opcode,
};
use crate::testing::{ANSWER, END, GAP, Guest, ISLAND, REQUEST, SEAM, opath, server};
use crate::{Access, Caching};

/// A folder with an export in it, and beside it what no guest may touch.
struct Place {
    folder: tempfile::TempDir,
    canary: std::collections::BTreeMap<String, String>,
}

impl Place {
    fn new() -> (Self, Guest, u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir_all(path.join("outside/deep")).unwrap();
        fs::create_dir_all(path.join("export/d")).unwrap();
        fs::write(path.join("outside/secret"), "secret").unwrap();
        fs::write(path.join("export/f"), "text").unwrap();
        symlink(path.join("outside/secret"), path.join("export/absolute")).unwrap();
        symlink("../outside", path.join("export/relative")).unwrap();
        symlink("/etc/shadow", path.join("export/far")).unwrap();
        let canary = snapshot(&path.join("outside"), true);
        let mut guest = Guest::of(&path.join("export"), Access::ReadWrite, Caching::default());
        let root = guest.walk("x").unwrap();
        (Self { folder, canary }, guest, root)
    }

    fn export(&self) -> PathBuf {
        self.folder.path().join("export")
    }

    fn check(&self) {
        assert_eq!(
            snapshot(&self.folder.path().join("outside"), true),
            self.canary
        );
    }
}

#[test]
fn names_that_are_no_components_are_refused_everywhere() {
    let (place, mut guest, root) = Place::new();
    let f = guest.lookup(root, "f").unwrap().nodeid;
    let before = snapshot(&place.export(), true);
    let bad: [&[u8]; 9] = [
        b"\0",
        b".\0",
        b"..\0",
        b"/\0",
        b"/etc/passwd\0",
        b"../outside/secret\0",
        b"d/../../outside\0",
        b"d/\0",
        b"unterminated",
    ];
    for name in bad {
        let fronts: [(u32, Vec<u8>); 9] = [
            (opcode::LOOKUP, Vec::new()),
            (opcode::UNLINK, Vec::new()),
            (opcode::RMDIR, Vec::new()),
            (
                opcode::MKDIR,
                MkdirIn {
                    mode: 0o700,
                    umask: 0,
                }
                .as_bytes()
                .to_vec(),
            ),
            (
                opcode::MKNOD,
                MknodIn {
                    mode: libc::S_IFREG,
                    ..Default::default()
                }
                .as_bytes()
                .to_vec(),
            ),
            (
                opcode::CREATE,
                CreateIn {
                    flags: 2,
                    ..Default::default()
                }
                .as_bytes()
                .to_vec(),
            ),
            (opcode::LINK, LinkIn { oldnodeid: f }.as_bytes().to_vec()),
            (opcode::SYMLINK, Vec::new()),
            (
                opcode::RENAME,
                RenameIn { newdir: root }.as_bytes().to_vec(),
            ),
        ];
        for (opcode, front) in fronts {
            // As the first name, and as the second where there are two.
            let mut bodies = vec![[&front[..], name, b"z\0"].concat()];
            if opcode == opcode::RENAME {
                bodies.push([&front[..], b"f\0", name].concat());
            }
            if name == b"unterminated" {
                bodies = vec![[&front[..], name].concat()];
            }
            for body in bodies {
                let answer = guest.ask(opcode, root, &body);
                assert_eq!(answer, Err(libc::EINVAL), "{opcode} {name:?}");
            }
        }
    }
    let long = [&[b'n'; 256][..], b"\0"].concat();
    assert_eq!(
        guest.ask(opcode::LOOKUP, root, &long),
        Err(libc::ENAMETOOLONG)
    );
    let huge = vec![b'n'; 1 << 20];
    assert_eq!(
        guest.ask(opcode::LOOKUP, root, &huge),
        Err(libc::ENAMETOOLONG)
    );
    assert_eq!(snapshot(&place.export(), true), before);
    place.check();
}

#[test]
fn symbolic_links_are_text() {
    let (place, mut guest, root) = Place::new();
    for name in ["absolute", "relative", "far"] {
        let link = guest.lookup(root, name).expect("seen").nodeid;
        let text = guest.ask(opcode::READLINK, link, &[]).expect("read");
        assert_eq!(
            text,
            fs::read_link(place.export().join(name))
                .unwrap()
                .as_os_str()
                .as_encoded_bytes()
        );
        assert_eq!(guest.open(link, libc::O_RDWR), Err(libc::ELOOP));
        let opendir = guest.ask(opcode::OPENDIR, link, OpenIn::default().as_bytes());
        assert_eq!(opendir, Err(libc::ENOTDIR));
        assert_eq!(guest.lookup(link, "secret").err(), Some(libc::ENOTDIR));
        assert_eq!(
            guest.create(link, "new", libc::O_RDWR, 0o600).err(),
            Some(libc::ENOTDIR)
        );
        // A create through it, and everything that changes a node.
        let made = guest.create(root, name, libc::O_RDWR | libc::O_TRUNC, 0o600);
        assert_eq!(made.err(), Some(libc::ELOOP));
        for valid in [
            fattr::MODE,
            fattr::SIZE,
            fattr::UID,
            fattr::MTIME_NOW | fattr::ATIME,
        ] {
            let request = SetattrIn {
                valid,
                mode: 0o777,
                uid: 5,
                ..Default::default()
            };
            let _ = guest.ask(opcode::SETATTR, link, request.as_bytes());
        }
        let request = SetxattrIn {
            size: 1,
            ..Default::default()
        };
        for key in ["user.a", "trusted.a", "security.a"] {
            let body = [request.as_bytes(), key.as_bytes(), b"\0x"].concat();
            let _ = guest.ask(opcode::SETXATTR, link, &body);
        }
        place.check();
    }
    let secret = place.folder.path().join("outside/secret");
    let mut list = [0; 100];
    let len = rustix::fs::listxattr(&secret, &mut list[..]).unwrap();
    assert!(!list[..len].windows(2).any(|part| part == b".a"));
    // A long one, and one too long.
    let text = "t".repeat(4095);
    guest
        .ask(opcode::SYMLINK, root, format!("long\0{text}\0").as_bytes())
        .expect("made");
    let long = guest.lookup(root, "long").unwrap().nodeid;
    assert_eq!(
        guest.ask(opcode::READLINK, long, &[]),
        Ok(text.clone().into_bytes())
    );
    let answer = guest.ask(
        opcode::SYMLINK,
        root,
        format!("longer\0{text}t\0").as_bytes(),
    );
    assert_eq!(answer, Err(libc::ENAMETOOLONG));
}

#[test]
fn hard_links_do_not_leave_the_export() {
    let (place, mut guest, _) = Place::new();
    let other = tempfile::tempdir_in(place.folder.path()).unwrap();
    guest
        .server
        .export("y", opath(other.path()), Access::ReadWrite)
        .unwrap();
    guest
        .server
        .export(
            "sealed",
            opath(&place.folder.path().join("outside")),
            Access::ReadOnly,
        )
        .unwrap();
    let y = guest.walk("y").unwrap();
    for from in ["x/f", "sealed/secret"] {
        let from = guest.walk(from).unwrap();
        let request = LinkIn { oldnodeid: from };
        let linked = guest.call::<_, EntryOut>(opcode::LINK, y, &request, b"l\0");
        assert!(
            matches!(linked, Err(libc::EXDEV | libc::EROFS)),
            "{linked:?}"
        );
    }
    let root = guest.walk("x").unwrap();
    for parent in [root, abi::ROOT_ID] {
        let request = RenameIn { newdir: y };
        let body = [request.as_bytes(), b"f\0f\0"].concat();
        let moved = guest.ask(opcode::RENAME, parent, &body);
        assert!(matches!(moved, Err(libc::EXDEV | libc::EROFS)), "{moved:?}");
    }
    let request = LinkIn {
        oldnodeid: abi::ROOT_ID,
    };
    assert_eq!(
        guest
            .call::<_, EntryOut>(opcode::LINK, y, &request, b"l\0")
            .err(),
        Some(libc::EROFS)
    );
    assert!(snapshot(other.path(), false).is_empty());
    place.check();
}

#[test]
fn devices_are_neither_made_nor_opened_and_fifos_block_no_one() {
    let (place, mut guest, root) = Place::new();
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        for rdev in [0, 0x103] {
            let request = MknodIn {
                mode: kind | 0o666,
                rdev,
                ..Default::default()
            };
            let made = guest.call::<_, EntryOut>(opcode::MKNOD, root, &request, b"device\0");
            assert_eq!(made.err(), Some(libc::EPERM));
        }
    }
    for kind in [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFMT] {
        let request = MknodIn {
            mode: kind | 0o666,
            ..Default::default()
        };
        let made = guest.call::<_, EntryOut>(opcode::MKNOD, root, &request, b"device\0");
        assert_eq!(made.err(), Some(libc::EINVAL));
    }
    // A rename that leaves a whiteout behind leaves a device.
    fs::write(place.export().join("moved"), "").unwrap();
    let names = b"moved\0elsewhere\0";
    for flags in [
        libc::RENAME_WHITEOUT,
        libc::RENAME_WHITEOUT | libc::RENAME_NOREPLACE,
        1 << 31,
    ] {
        let request = Rename2In {
            newdir: root,
            flags,
            padding: 0,
        };
        let body = [request.as_bytes(), names].concat();
        let renamed = guest.ask(opcode::RENAME2, root, &body);
        assert_eq!(renamed, Err(libc::EINVAL), "{flags:#x}");
    }
    assert!(place.export().join("moved").is_file());
    // What the host has there is seen, and not opened: not by a create either.
    let kind = rustix::fs::FileType::CharacterDevice;
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.export().join("null"),
        kind,
        0o666.into(),
        null,
    )
    .unwrap();
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.export().join("fifo"),
        kind,
        0o666.into(),
        0,
    )
    .unwrap();
    for name in ["null", "fifo"] {
        let node = guest.lookup(root, name).expect("seen");
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            assert_eq!(guest.open(node.nodeid, flags), Err(libc::ENXIO));
            assert_eq!(
                guest.create(root, name, flags, 0o600).err(),
                Some(libc::ENXIO)
            );
        }
        let request = SetattrIn {
            valid: fattr::SIZE,
            ..Default::default()
        };
        assert_eq!(
            guest.ask(opcode::SETATTR, node.nodeid, request.as_bytes()),
            Err(libc::EINVAL)
        );
        let list = GetxattrIn {
            size: 4096,
            padding: 0,
        };
        let _ = guest.ask(opcode::LISTXATTR, node.nodeid, list.as_bytes());
    }
    let null = guest.lookup(root, "null").unwrap();
    assert_eq!(null.attr.rdev, 0x103);
}

#[test]
fn sizes_of_attributes_are_bounded() {
    let (_place, mut guest, root) = Place::new();
    let f = guest.lookup(root, "f").unwrap().nodeid;
    for (size, error) in [
        (u32::MAX, libc::E2BIG),
        (65_537, libc::E2BIG),
        (5, libc::EINVAL),
    ] {
        let request = SetxattrIn {
            size,
            ..Default::default()
        };
        let body = [request.as_bytes(), b"user.a\0four"].concat();
        assert_eq!(guest.ask(opcode::SETXATTR, f, &body), Err(error), "{size}");
    }
    let request = SetxattrIn {
        size: 4,
        ..Default::default()
    };
    let body = [request.as_bytes(), b"user.a\0four"].concat();
    guest.ask(opcode::SETXATTR, f, &body).expect("set");
    for size in [u32::MAX, 1 << 31] {
        let request = GetxattrIn { size, padding: 0 };
        let body = [request.as_bytes(), b"user.a\0"].concat();
        assert_eq!(guest.ask(opcode::GETXATTR, f, &body), Ok(b"four".to_vec()));
        // Longer than the room.
        assert_eq!(
            guest.ask_with_room(opcode::GETXATTR, f, &body, 19),
            Err(libc::ERANGE)
        );
        guest
            .ask(opcode::LISTXATTR, f, request.as_bytes())
            .expect("bounded");
        assert_eq!(
            guest.ask_with_room(opcode::LISTXATTR, f, request.as_bytes(), 16),
            Err(libc::ERANGE)
        );
    }
    for name in [&b"\0"[..], &[b'n'; 300], &b"user.unterminated"[..]] {
        let body = [GetxattrIn::default().as_bytes(), name].concat();
        guest.ask(opcode::GETXATTR, f, &body).expect_err("no name");
    }
}

#[test]
fn numbers_that_were_not_given_are_refused() {
    let (_place, mut guest, root) = Place::new();
    let f = guest.lookup(root, "f").unwrap().nodeid;
    let d = guest.lookup(root, "d").unwrap().nodeid;
    let fh = guest.open(f, libc::O_RDWR).unwrap();
    for node in [0, f + 1000, u64::MAX] {
        assert_eq!(guest.lookup(node, "f").err(), Some(libc::ESTALE));
        assert_eq!(guest.open(node, libc::O_RDWR), Err(libc::ESTALE));
        assert_eq!(guest.mode(node), Err(libc::ESTALE));
        assert_eq!(
            guest.read(node, fh, 0, 1),
            Err(libc::EBADF),
            "another node's handle"
        );
    }
    for fh in [0, fh + 1, u64::MAX] {
        assert_eq!(guest.read(f, fh, 0, 1), Err(libc::EBADF));
        assert_eq!(guest.write(f, fh, 0, b"x"), Err(libc::EBADF));
        assert_eq!(guest.release(opcode::RELEASE, f, fh), Err(libc::EBADF));
    }
    // A file's handle is no directory's.
    let request = ReadIn {
        fh,
        size: 4096,
        ..Default::default()
    };
    assert_eq!(
        guest.ask(opcode::READDIR, f, request.as_bytes()),
        Err(libc::ENOTDIR)
    );
    let opened: abi::OpenOut = guest
        .call(opcode::OPENDIR, d, &OpenIn::default(), &[])
        .unwrap();
    assert_eq!(guest.read(d, opened.fh, 0, 10), Err(libc::EISDIR));
    assert!(guest.write(d, opened.fh, 0, b"x").is_err());
    let request = ReadIn {
        fh: opened.fh,
        offset: u64::MAX,
        size: 4096,
        ..Default::default()
    };
    assert_eq!(
        guest.ask(opcode::READDIR, d, request.as_bytes()),
        Err(libc::EINVAL)
    );
    for offset in [u64::MAX, i64::MAX as u64] {
        assert_eq!(guest.read(f, fh, offset, 10), Err(libc::EINVAL));
        assert!(guest.write(f, fh, offset, b"x").is_err());
    }
    let request = SetattrIn {
        valid: fattr::UID,
        uid: u32::MAX,
        ..Default::default()
    };
    assert_eq!(
        guest.ask(opcode::SETATTR, f, request.as_bytes()),
        Err(libc::EINVAL)
    );
    // Two of the host's numbers above are no nanoseconds, but "now" and "leave it".
    for nanoseconds in [
        u32::MAX,
        1_000_000_000,
        libc::UTIME_NOW as u32,
        libc::UTIME_OMIT as u32,
    ] {
        let request = SetattrIn {
            valid: fattr::MTIME,
            mtimensec: nanoseconds,
            ..Default::default()
        };
        assert_eq!(
            guest.ask(opcode::SETATTR, f, request.as_bytes()),
            Err(libc::EINVAL),
            "{nanoseconds:#x}"
        );
    }
    guest.user = (u32::MAX, u32::MAX);
    assert_eq!(
        guest.create(root, "no one's", libc::O_RDWR, 0o600).err(),
        Some(libc::EPERM)
    );
    guest.user = (0, 0);
    guest
        .create(root, "root's", libc::O_RDWR, 0o600)
        .expect("the thread is itself again");
    for opcode in [
        0,
        7,
        19,
        25,
        31,
        32,
        33,
        34,
        36,
        37,
        39,
        40,
        41,
        48,
        49,
        53,
        4096,
        u32::MAX,
    ] {
        let answer = guest.ask(opcode, f, &[0; 64]);
        assert_eq!(answer, Err(libc::ENOSYS), "{opcode}");
    }
}

#[test]
fn requests_that_are_none_are_not_served() {
    let (_place, mut guest, root) = Place::new();
    let f = guest.lookup(root, "f").unwrap().nodeid;
    // Shorter than a header.
    for len in [0, 1, 39] {
        assert!(guest.raw(&vec![0xff; len], 4096).is_empty(), "{len}");
    }
    // A length that is not the chain's.
    for said in [0, 39, 57, u32::MAX] {
        let header = InHeader {
            len: said,
            ..guest.header(opcode::GETATTR, f, 16)
        };
        let answer = guest.raw(&[header.as_bytes(), &[0; 16]].concat(), 4096);
        let out = OutHeader::read_from_bytes(&answer).expect("only a header");
        assert_eq!(
            (out.error, out.unique),
            (-libc::EINVAL, header.unique),
            "{said}"
        );
    }
    // Bodies cut at every length.
    let whole = SetattrIn {
        valid: fattr::MODE,
        mode: 0o600,
        ..Default::default()
    };
    for len in 0..size_of::<SetattrIn>() {
        assert_eq!(
            guest.ask(opcode::SETATTR, f, &whole.as_bytes()[..len]),
            Err(libc::EINVAL)
        );
    }
    // No room for an answer: nothing is done. Too little: nothing either.
    let body = [MkdirIn::default().as_bytes(), b"made\0"].concat();
    let header = guest.header(opcode::MKDIR, root, body.len());
    assert!(
        guest
            .raw(&[header.as_bytes(), &body].concat(), 15)
            .is_empty()
    );
    assert_eq!(
        guest.ask_with_room(opcode::MKDIR, root, &body, 16 + 127),
        Err(libc::EIO)
    );
    assert_eq!(guest.lookup(root, "made").err(), Some(libc::ENOENT));
    assert_eq!(
        guest.ask_with_room(opcode::LOOKUP, root, b"f\0", 100),
        Err(libc::EIO)
    );
    assert_eq!(
        guest.server.counters().inodes,
        2,
        "a lookup that could not be told is none"
    );
    // More to write than there is.
    let fh = guest.open(f, libc::O_RDWR).unwrap();
    for size in [5, 1 << 20, (1 << 20) + 1, u32::MAX] {
        let request = WriteIn {
            fh,
            size,
            ..Default::default()
        };
        let body = [request.as_bytes(), b"four"].concat();
        assert_eq!(
            guest.ask(opcode::WRITE, f, &body),
            Err(libc::EINVAL),
            "{size}"
        );
    }
    // More to read than there is room.
    let request = ReadIn {
        fh,
        size: u32::MAX,
        ..Default::default()
    };
    assert_eq!(
        guest.ask_with_room(opcode::READ, f, request.as_bytes(), 18),
        Ok(b"te".to_vec())
    );
}

#[test]
fn buffers_that_are_not_in_memory_are_refused() {
    let (place, mut guest, root) = Place::new();
    let f = guest.lookup(root, "f").unwrap().nodeid;
    let fh = guest.open(f, libc::O_RDWR).unwrap();
    let request = ReadIn {
        fh,
        size: 4,
        ..Default::default()
    };
    let header = guest.header(opcode::READ, f, 40);
    let bytes = [header.as_bytes(), request.as_bytes()].concat();
    guest
        .memory
        .write_slice(&bytes, GuestAddress(REQUEST))
        .unwrap();
    for (address, len) in [
        (GAP, 4096),
        (GAP - 4, 4096),
        (END - 1, 2),
        (u64::MAX - 3, 4096),
        (ISLAND - 1, 16),
    ] {
        assert_eq!(
            guest.chain(&[
                (REQUEST, 80, false),
                (ANSWER, 16, true),
                (address, len, true)
            ]),
            0
        );
        assert_eq!(
            guest.chain(&[(address, len, false), (ANSWER, 4096, true)]),
            0
        );
    }
    assert_eq!(
        guest.chain(&[(ANSWER, 4096, true), (REQUEST, 80, false)]),
        0,
        "in the wrong order"
    );
    assert_eq!(guest.chain(&[(REQUEST, 80, false)]), 0, "no room");
    // Over the seam of two regions, and at the last bytes of memory.
    assert_eq!(
        guest.chain(&[(REQUEST, 80, false), (SEAM - 18, 36, true)]),
        20
    );
    assert_eq!(
        guest.chain(&[(REQUEST, 80, false), (END - 20, 20, true)]),
        20
    );
    let mut read = [0; 4];
    guest
        .memory
        .read_slice(&mut read, GuestAddress(END - 4))
        .unwrap();
    assert_eq!(&read, b"text");
    place.check();
}

#[test]
fn a_guest_that_is_too_old_or_too_new_is_told_so() {
    let server = server();
    let mut guest = Guest::unmounted(&server);
    assert_eq!(
        guest.ask(opcode::STATFS, 1, &[]),
        Err(libc::EIO),
        "before INIT"
    );
    let needed = (init::DONT_MASK | init::ATOMIC_O_TRUNC | init::BIG_WRITES) as u32;
    for (major, minor, flags) in [(6, 40, needed), (7, 30, needed), (7, 38, 0), (0, 0, needed)] {
        let request = InitIn {
            major,
            minor,
            flags,
            ..Default::default()
        };
        let answer = guest.ask(opcode::INIT, 0, request.as_bytes());
        assert_eq!(answer, Err(libc::EPROTO), "{major}.{minor} {flags:#x}");
    }
    let request = InitIn {
        major: 8,
        ..Default::default()
    };
    let out: abi::InitOut = guest.call(opcode::INIT, 0, &request, &[]).unwrap();
    assert_eq!(out.major, 7);
    assert_eq!(
        guest.ask(opcode::STATFS, 1, &[]),
        Err(libc::EIO),
        "not agreed yet"
    );
    // The short form of old kernels.
    let request = InitIn {
        major: 7,
        minor: 31,
        flags: needed,
        ..Default::default()
    };
    let answer = guest
        .ask(opcode::INIT, 0, &request.as_bytes()[..16])
        .expect("agreed");
    let out = abi::InitOut::read_from_bytes(&answer).unwrap();
    assert_eq!((out.max_write, out.flags), (1 << 20, needed));
    assert_eq!(guest.ask(opcode::INIT, 0, &[7, 0, 0]), Err(libc::EINVAL));
    let out = guest.init();
    assert_eq!((out.major, out.max_pages), (7, 256));
}
