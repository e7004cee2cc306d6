//! What the guest asks for is what system calls on the same tree would do.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, Mode, RenameFlags, XattrFlags};
use zerocopy::{FromBytes, IntoBytes};

use super::snapshot;
use crate::abi::{
    self, AttrOut, CopyFileRangeIn, EntryOut, FallocateIn, GetxattrIn, GetxattrOut, LinkIn,
    LseekIn, LseekOut, MkdirIn, MknodIn, OpenIn, OpenOut, ReadIn, Rename2In, SetattrIn, SetxattrIn,
    StatfsOut, StatxIn, StatxOut, WriteIn, WriteOut, fattr, opcode,
};
use crate::testing::{ANSWER, Guest, REQUEST};
use crate::{Access, Caching};

pub(super) fn guest(folder: &Path) -> (Guest, u64) {
    let mut guest = Guest::of(folder, Access::ReadWrite, Caching::default());
    let root = guest.walk("x").expect("the export");
    (guest, root)
}

fn name(text: &str) -> Vec<u8> {
    CString::new(text).expect("no zero").into_bytes_with_nul()
}

fn names(one: &str, two: &str) -> Vec<u8> {
    [name(one), name(two)].concat()
}

fn setattr(guest: &mut Guest, node: u64, request: SetattrIn) -> Result<(), i32> {
    let _: AttrOut = guest.call(opcode::SETATTR, node, &request, &[])?;
    Ok(())
}

fn setxattr(guest: &mut Guest, node: u64, key: &str, value: &[u8]) -> Result<(), i32> {
    let request = SetxattrIn {
        size: value.len() as u32,
        ..Default::default()
    };
    let body = [request.as_bytes(), &name(key), value].concat();
    guest.ask(opcode::SETXATTR, node, &body).map(|_| ())
}

fn rename(guest: &mut Guest, parent: u64, flags: u32, one: &str, two: &str) -> Result<(), i32> {
    let request = Rename2In {
        newdir: parent,
        flags,
        padding: 0,
    };
    let body = [request.as_bytes(), &names(one, two)].concat();
    guest.ask(opcode::RENAME2, parent, &body).map(|_| ())
}

/// One step: by the guest in its export, and directly in a twin of it.
type Step = (
    &'static str,
    fn(&mut Guest, u64) -> Result<(), i32>,
    fn(&Path) -> io::Result<()>,
);

const STEPS: &[Step] = &[
    (
        "mkdir",
        |guest, root| {
            let request = MkdirIn {
                mode: 0o750,
                umask: 0,
            };
            let _: EntryOut = guest.call(opcode::MKDIR, root, &request, &name("d"))?;
            Ok(())
        },
        |twin| {
            Ok(rustix::fs::mkdir(
                twin.join("d"),
                Mode::from_raw_mode(0o750),
            )?)
        },
    ),
    (
        "mkdir once more",
        |guest, root| {
            let request = MkdirIn::default();
            guest.call::<_, EntryOut>(opcode::MKDIR, root, &request, &name("d"))?;
            Ok(())
        },
        |twin| fs::create_dir(twin.join("d")),
    ),
    (
        "create and write",
        |guest, root| {
            let d = guest.lookup(root, "d")?.nodeid;
            let (entry, fh) = guest.create(d, "f", libc::O_RDWR, 0o640)?;
            assert_eq!(guest.write(entry.nodeid, fh, 3, b"hello")?, 5);
            guest.release(opcode::RELEASE, entry.nodeid, fh)
        },
        |twin| {
            let path = twin.join("d/f");
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o640)
                .open(path)?;
            std::os::unix::fs::FileExt::write_all_at(&file, b"hello", 3)
        },
    ),
    (
        "create what is there, exclusively",
        |guest, root| {
            let d = guest.lookup(root, "d")?.nodeid;
            guest.create(d, "f", libc::O_RDWR | libc::O_EXCL, 0o640)?;
            Ok(())
        },
        |twin| fs::File::create_new(twin.join("d/f")).map(|_| ()),
    ),
    (
        "append",
        |guest, root| {
            let d = guest.lookup(root, "d")?.nodeid;
            let f = guest.lookup(d, "f")?.nodeid;
            let fh = guest.open(f, libc::O_WRONLY | libc::O_APPEND)?;
            let request = WriteIn {
                fh,
                offset: 0,
                size: 3,
                flags: (libc::O_WRONLY | libc::O_APPEND) as u32,
                ..Default::default()
            };
            let _: WriteOut = guest.call(opcode::WRITE, f, &request, b"end")?;
            guest.release(opcode::RELEASE, f, fh)
        },
        |twin| {
            let mut file = OpenOptions::new().append(true).open(twin.join("d/f"))?;
            io::Write::write_all(&mut file, b"end")
        },
    ),
    (
        "symlink",
        |guest, root| {
            guest.ask(opcode::SYMLINK, root, &names("s", "/etc/passwd"))?;
            let s = guest.lookup(root, "s")?;
            assert_eq!(s.attr.mode & libc::S_IFMT, libc::S_IFLNK);
            assert_eq!(guest.ask(opcode::READLINK, s.nodeid, &[])?, b"/etc/passwd");
            Ok(())
        },
        |twin| symlink("/etc/passwd", twin.join("s")),
    ),
    (
        "owner of the symlink, not of what it names",
        |guest, root| {
            let s = guest.lookup(root, "s")?.nodeid;
            let request = SetattrIn {
                valid: fattr::UID | fattr::GID,
                uid: 1234,
                gid: 2345,
                ..Default::default()
            };
            setattr(guest, s, request)
        },
        |twin| std::os::unix::fs::lchown(twin.join("s"), Some(1234), Some(2345)),
    ),
    (
        "fifo, socket, file by mknod",
        |guest, root| {
            for (text, kind) in [
                ("fifo", libc::S_IFIFO),
                ("socket", libc::S_IFSOCK),
                ("plain", libc::S_IFREG),
            ] {
                let request = MknodIn {
                    mode: kind | 0o606,
                    ..Default::default()
                };
                let _: EntryOut = guest.call(opcode::MKNOD, root, &request, &name(text))?;
            }
            Ok(())
        },
        |twin| {
            for (text, kind) in [
                ("fifo", libc::S_IFIFO),
                ("socket", libc::S_IFSOCK),
                ("plain", libc::S_IFREG),
            ] {
                let kind = rustix::fs::FileType::from_raw_mode(kind);
                let mode = Mode::from_raw_mode(0o606);
                rustix::fs::mknodat(CWD, twin.join(text), kind, mode, 0)?;
            }
            Ok(())
        },
    ),
    (
        "hard link",
        |guest, root| {
            let plain = guest.lookup(root, "plain")?.nodeid;
            let request = LinkIn { oldnodeid: plain };
            let entry: EntryOut = guest.call(opcode::LINK, root, &request, &name("hard"))?;
            assert_eq!(entry.nodeid, plain);
            Ok(())
        },
        |twin| fs::hard_link(twin.join("plain"), twin.join("hard")),
    ),
    (
        "mode, size and times",
        |guest, root| {
            let plain = guest.lookup(root, "plain")?.nodeid;
            let request = SetattrIn {
                valid: fattr::MODE | fattr::SIZE | fattr::MTIME | fattr::ATIME_NOW,
                mode: 0o4711,
                size: 5000,
                mtime: 77,
                mtimensec: 88,
                ..Default::default()
            };
            setattr(guest, plain, request)
        },
        |twin| {
            let path = twin.join("plain");
            let file = OpenOptions::new().write(true).open(&path)?;
            file.set_len(5000)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o4711))
        },
    ),
    (
        "rename over",
        |guest, root| rename(guest, root, 0, "hard", "plain2"),
        |twin| fs::rename(twin.join("hard"), twin.join("plain2")),
    ),
    (
        "rename without replacing",
        |guest, root| rename(guest, root, 1, "plain2", "plain"),
        |twin| {
            let (one, two) = (twin.join("plain2"), twin.join("plain"));
            Ok(rustix::fs::renameat_with(
                CWD,
                one,
                CWD,
                two,
                RenameFlags::NOREPLACE,
            )?)
        },
    ),
    (
        "exchange",
        |guest, root| rename(guest, root, 2, "s", "d"),
        |twin| {
            let (one, two) = (twin.join("s"), twin.join("d"));
            Ok(rustix::fs::renameat_with(
                CWD,
                one,
                CWD,
                two,
                RenameFlags::EXCHANGE,
            )?)
        },
    ),
    (
        "extended attribute",
        |guest, root| {
            let plain = guest.lookup(root, "plain")?.nodeid;
            setxattr(guest, plain, "user.colour", b"blue")?;
            setxattr(guest, plain, "trusted.colour", b"red")
        },
        |twin| {
            let path = twin.join("plain");
            rustix::fs::setxattr(&path, "user.colour", b"blue", XattrFlags::empty())?;
            Ok(rustix::fs::setxattr(
                &path,
                "trusted.colour",
                b"red",
                XattrFlags::empty(),
            )?)
        },
    ),
    (
        "an attribute that cannot be",
        |guest, root| {
            let plain = guest.lookup(root, "plain")?.nodeid;
            setxattr(guest, plain, "colour", b"blue")
        },
        |twin| {
            let path = twin.join("plain");
            Ok(rustix::fs::setxattr(
                &path,
                "colour",
                b"blue",
                XattrFlags::empty(),
            )?)
        },
    ),
    (
        "holes",
        |guest, root| {
            let plain = guest.lookup(root, "plain")?.nodeid;
            let fh = guest.open(plain, libc::O_RDWR)?;
            guest.write(plain, fh, 0, &[7; 9000])?;
            let request = FallocateIn {
                fh,
                offset: 4096,
                length: 4096,
                mode: (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits(),
                padding: 0,
            };
            guest.ask(opcode::FALLOCATE, plain, request.as_bytes())?;
            guest.release(opcode::RELEASE, plain, fh)
        },
        |twin| {
            let file = OpenOptions::new().write(true).open(twin.join("plain"))?;
            std::os::unix::fs::FileExt::write_all_at(&file, &[7; 9000], 0)?;
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(&file, mode, 4096, 4096)?)
        },
    ),
    (
        "rmdir of what is not empty",
        |guest, root| guest.ask(opcode::RMDIR, root, &name("s")).map(|_| ()),
        |twin| fs::remove_dir(twin.join("s")),
    ),
    (
        "unlink of a directory",
        |guest, root| guest.ask(opcode::UNLINK, root, &name("s")).map(|_| ()),
        |twin| Ok(rustix::fs::unlink(twin.join("s"))?),
    ),
    (
        "unlink",
        |guest, root| guest.ask(opcode::UNLINK, root, &name("d")).map(|_| ()),
        |twin| fs::remove_file(twin.join("d")),
    ),
    (
        "a name too long",
        |guest, root| guest.lookup(root, &"n".repeat(256)).map(|_| ()),
        |twin| fs::metadata(twin.join("n".repeat(256))).map(|_| ()),
    ),
    (
        "what is not there",
        |guest, root| guest.lookup(root, "nothing").map(|_| ()),
        |twin| fs::metadata(twin.join("nothing")).map(|_| ()),
    ),
    (
        "below a file",
        |guest, root| {
            let plain = guest.lookup(root, "plain")?.nodeid;
            guest.lookup(plain, "x").map(|_| ())
        },
        |twin| fs::metadata(twin.join("plain/x")).map(|_| ()),
    ),
];

#[test]
fn operations_do_what_system_calls_do() {
    let (ours, twin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut guest, root) = guest(ours.path());
    for (what, by_guest, directly) in STEPS {
        let one = by_guest(&mut guest, root);
        let two = directly(twin.path()).map_err(|error| error.raw_os_error().unwrap_or(0));
        assert_eq!(one, two, "{what}");
        assert_eq!(
            snapshot(ours.path(), false),
            snapshot(twin.path(), false),
            "{what}"
        );
    }
}

#[test]
fn what_is_told_of_a_file_is_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, vec![1; 10_000]).unwrap();
    rustix::fs::setxattr(&path, "user.a", b"12345", XattrFlags::empty()).unwrap();
    let (mut guest, root) = guest(folder.path());
    let f = guest.lookup(root, "f").expect("there");
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(f.attr.size, metadata.len());
    assert_eq!((f.entry_valid, f.attr_valid), (1, 1));
    let out: StatxOut = guest
        .call(opcode::STATX, f.nodeid, &StatxIn::default(), &[])
        .expect("known");
    assert_eq!((out.stat.size, out.stat.ino), (metadata.len(), f.attr.ino));
    assert_eq!(u32::from(out.stat.mode), f.attr.mode);
    let out: StatfsOut = guest
        .call(opcode::STATFS, f.nodeid, &0_u64, &[])
        .expect("known");
    assert!(out.blocks > 0 && out.namelen == 255);
    // Extended attributes: first how long, then what.
    let ask = |size| {
        [
            GetxattrIn { size, padding: 0 }.as_bytes(),
            b"user.a\0".as_slice(),
        ]
        .concat()
    };
    let body = guest
        .ask(opcode::GETXATTR, f.nodeid, &ask(0))
        .expect("there");
    assert_eq!(GetxattrOut::read_from_bytes(&body).unwrap().size, 5);
    let value = guest.ask(opcode::GETXATTR, f.nodeid, &ask(5));
    assert_eq!(value, Ok(b"12345".to_vec()));
    let value = guest.ask(opcode::GETXATTR, f.nodeid, &ask(4));
    assert_eq!(value, Err(libc::ERANGE));
    let list = GetxattrIn {
        size: 100,
        padding: 0,
    };
    let list = guest
        .ask(opcode::LISTXATTR, f.nodeid, list.as_bytes())
        .expect("there");
    assert!(list.windows(7).any(|part| part == b"user.a\0"), "{list:?}");
    guest
        .ask(opcode::REMOVEXATTR, f.nodeid, b"user.a\0")
        .expect("removed");
    let value = guest.ask(opcode::GETXATTR, f.nodeid, &ask(5));
    assert_eq!(value, Err(libc::ENODATA));
}

#[test]
fn reads_and_writes_go_through_any_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..1_u32 << 20).map(|i| (i / 7) as u8).collect();
    fs::write(folder.path().join("f"), &data).unwrap();
    let (mut guest, root) = guest(folder.path());
    let f = guest.lookup(root, "f").expect("there").nodeid;
    let fh = guest.open(f, libc::O_RDWR).expect("opened");
    assert_eq!(guest.read(f, fh, 0, 1 << 20).expect("read"), data);
    assert_eq!(
        guest.read(f, fh, (1 << 20) - 5, 100).expect("read"),
        data[(1 << 20) - 5..]
    );
    assert_eq!(guest.read(f, fh, 1 << 20, 100), Ok(Vec::new()));
    // A write of 1 MiB, and one by page-sized descriptors with the header in pieces.
    let reversed: Vec<u8> = data.iter().rev().copied().collect();
    assert_eq!(guest.write(f, fh, 0, &reversed), Ok(1 << 20));
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), reversed);
    let request = ReadIn {
        fh,
        offset: 1,
        size: 10_000,
        ..Default::default()
    };
    let header = guest.header(opcode::READ, f, 40);
    let bytes = [header.as_bytes(), request.as_bytes()].concat();
    vm_memory::Bytes::write_slice(&guest.memory, &bytes, vm_memory::GuestAddress(REQUEST)).unwrap();
    let mut parts: Vec<_> = (0..80).map(|i| (REQUEST + i, 1, false)).collect();
    parts.extend([
        (ANSWER, 7, true),
        (ANSWER + 7, 0, true),
        (ANSWER + 7, 9, true),
    ]);
    parts.extend((0..3).map(|i| (ANSWER + 16 + i * 4096, 4096, true)));
    assert_eq!(guest.chain(&parts), 10_016);
    let mut read = vec![0; 10_000];
    vm_memory::Bytes::read_slice(
        &guest.memory,
        &mut read,
        vm_memory::GuestAddress(ANSWER + 16),
    )
    .unwrap();
    assert_eq!(read, reversed[1..10_001]);
    let counters = guest.server.counters();
    assert_eq!(counters.written_bytes, 1 << 20);
    assert_eq!(counters.read_bytes, (1 << 20) + 5 + 10_000);
}

#[test]
fn files_belong_to_who_makes_them() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    fs::create_dir(folder.path().join("team")).unwrap();
    std::os::unix::fs::chown(folder.path().join("team"), None, Some(4242)).unwrap();
    fs::set_permissions(
        folder.path().join("team"),
        fs::Permissions::from_mode(0o2770),
    )
    .unwrap();
    let (mut guest, root) = guest(folder.path());
    let team = guest.lookup(root, "team").unwrap().nodeid;
    guest.user = (1000, 1001);
    guest.umask = 0o027;
    // The guest's kernel has let it: neither directory is the user's.
    let (entry, _) = guest.create(root, "f", libc::O_RDWR, 0o4777).expect("made");
    let attr = entry.attr;
    assert_eq!(
        (attr.uid, attr.gid, attr.mode & 0o7777),
        (1000, 1001, 0o4750)
    );
    let (entry, _) = guest.create(team, "f", libc::O_RDWR, 0o2777).expect("made");
    let attr = entry.attr;
    assert_eq!(
        (attr.uid, attr.gid, attr.mode & 0o7777),
        (1000, 4242, 0o750),
        "the directory's group, and no set-group-ID for one who is not in it"
    );
    let request = MkdirIn {
        mode: 0o777,
        umask: 0o077,
    };
    let entry: EntryOut = guest
        .call(opcode::MKDIR, team, &request, &name("d"))
        .unwrap();
    assert_eq!((entry.attr.gid, entry.attr.mode & 0o7777), (4242, 0o2700));
    guest.user = (0, 0);
    guest.umask = 0;
    let (entry, _) = guest.create(root, "g", libc::O_RDWR, 0o666).expect("made");
    assert_eq!((entry.attr.uid, entry.attr.mode & 0o7777), (0, 0o666));
}

#[test]
fn set_user_id_goes_when_the_guest_says_so_and_stays_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, "text").unwrap();
    let (mut guest, root) = guest(folder.path());
    let f = guest.lookup(root, "f").unwrap().nodeid;
    let fh = guest.open(f, libc::O_RDWR).unwrap();
    // By a write, a truncation, and an open that truncates.
    let change = |guest: &mut Guest, how: usize, kill: bool| {
        let flag = |bits| if kill { bits } else { 0 };
        match how {
            0 => {
                let request = WriteIn {
                    fh,
                    size: 1,
                    write_flags: flag(abi::WRITE_KILL_SUIDGID),
                    ..Default::default()
                };
                let _: WriteOut = guest.call(opcode::WRITE, f, &request, b"x").unwrap();
            }
            1 => {
                let request = SetattrIn {
                    valid: fattr::SIZE | flag(fattr::KILL_SUIDGID),
                    ..Default::default()
                };
                setattr(guest, f, request).unwrap();
            }
            _ => {
                let request = OpenIn {
                    flags: (libc::O_RDWR | libc::O_TRUNC) as u32,
                    open_flags: flag(abi::OPEN_KILL_SUIDGID),
                };
                let _: OpenOut = guest.call(opcode::OPEN, f, &request, &[]).unwrap();
            }
        }
    };
    for how in 0..3 {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        change(&mut guest, how, false);
        assert_eq!(guest.mode(f).unwrap() & 0o7777, 0o6777, "{how}");
        change(&mut guest, how, true);
        assert_eq!(guest.mode(f).unwrap() & 0o7777, 0o777, "{how}");
    }
}

#[test]
fn a_truncation_by_a_handle_that_only_reads_is_one_by_the_node() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, "text").unwrap();
    let (mut guest, root) = guest(folder.path());
    let f = guest.lookup(root, "f").unwrap().nodeid;
    for (flags, size) in [(libc::O_RDWR, 3), (libc::O_WRONLY, 2), (libc::O_RDONLY, 1)] {
        let fh = guest.open(f, flags).unwrap();
        let request = SetattrIn {
            valid: fattr::SIZE | fattr::FH,
            fh,
            size,
            ..Default::default()
        };
        setattr(&mut guest, f, request).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), size, "{flags:#x}");
    }
}

#[test]
fn handles_outlive_names() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, root) = guest(folder.path());
    let (entry, fh) = guest.create(root, "f", libc::O_RDWR, 0o600).unwrap();
    let f = entry.nodeid;
    guest.write(f, fh, 0, b"still here").unwrap();
    guest.ask(opcode::UNLINK, root, b"f\0").unwrap();
    assert_eq!(
        guest.lookup(root, "f").map(|entry| entry.nodeid),
        Err(libc::ENOENT)
    );
    assert_eq!(guest.read(f, fh, 0, 100), Ok(b"still here".to_vec()));
    let out: AttrOut = guest
        .call(opcode::GETATTR, f, &abi::GetattrIn::default(), &[])
        .unwrap();
    assert_eq!((out.attr.nlink, out.attr.size), (0, 10));
    guest.release(opcode::RELEASE, f, fh).unwrap();
    assert_eq!(guest.read(f, fh, 0, 1), Err(libc::EBADF));
}

#[test]
fn a_temporary_file_has_no_name_until_it_is_linked() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, root) = guest(folder.path());
    guest.user = (7, 8);
    let request = abi::CreateIn {
        flags: (libc::O_RDWR | libc::O_TMPFILE) as u32,
        mode: 0o600,
        ..Default::default()
    };
    let body = [request.as_bytes(), b"\0"].concat();
    let answer = guest.ask(opcode::TMPFILE, root, &body).expect("made");
    let (entry, rest) = EntryOut::read_from_prefix(&answer).unwrap();
    let fh = OpenOut::read_from_bytes(rest).unwrap().fh;
    assert_eq!(
        (entry.attr.uid, entry.attr.gid, entry.attr.nlink),
        (7, 8, 0)
    );
    guest.write(entry.nodeid, fh, 0, b"x").unwrap();
    assert!(snapshot(folder.path(), false).is_empty());
    let request = LinkIn {
        oldnodeid: entry.nodeid,
    };
    let linked: EntryOut = guest.call(opcode::LINK, root, &request, b"t\0").unwrap();
    assert_eq!(linked.nodeid, entry.nodeid);
    assert_eq!(fs::read(folder.path().join("t")).unwrap(), b"x");
}

#[test]
fn holes_are_found_and_ranges_copied() {
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, root) = guest(folder.path());
    let (a, fh_in) = guest.create(root, "a", libc::O_RDWR, 0o600).unwrap();
    guest.write(a.nodeid, fh_in, 1 << 20, &[5; 8192]).unwrap();
    let mut seek = |offset, whence: i32| {
        let request = LseekIn {
            fh: fh_in,
            offset,
            whence: whence as u32,
            padding: 0,
        };
        guest
            .call::<_, LseekOut>(opcode::LSEEK, a.nodeid, &request, &[])
            .map(|out| out.offset)
    };
    assert_eq!(seek(0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(seek(1 << 20, libc::SEEK_HOLE), Ok((1 << 20) + 8192));
    assert_eq!(seek(1 << 21, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(libc::EINVAL));
    let (b, fh_out) = guest.create(root, "b", libc::O_RDWR, 0o600).unwrap();
    let request = CopyFileRangeIn {
        fh_in,
        off_in: 1 << 20,
        nodeid_out: b.nodeid,
        fh_out,
        off_out: 10,
        len: 8192,
        flags: 0,
    };
    let out: WriteOut = guest
        .call(opcode::COPY_FILE_RANGE, a.nodeid, &request, &[])
        .unwrap();
    assert_eq!(out.size, 8192);
    assert_eq!(fs::metadata(folder.path().join("b")).unwrap().len(), 8202);
    for (opcode, fh, node) in [(opcode::FSYNC, fh_out, b.nodeid), (opcode::SYNCFS, 0, root)] {
        let request = abi::FsyncIn {
            fh,
            ..Default::default()
        };
        guest
            .ask(opcode, node, request.as_bytes())
            .expect("written back");
    }
}

#[test]
fn names_are_kept_where_the_host_promises_not_to_change_them() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "").unwrap();
    let mut guest = Guest::of(folder.path(), Access::ReadWrite, Caching::Always);
    let root = guest.walk("x").unwrap();
    let nothing = guest
        .lookup(root, "nothing")
        .expect("a promise that there is nothing");
    assert!(nothing.nodeid == 0 && nothing.entry_valid > 3600);
    let f = guest.lookup(root, "f").unwrap();
    assert!(f.entry_valid > 3600 && f.attr_valid > 3600);
    let out: OpenOut = guest
        .call(opcode::OPEN, f.nodeid, &OpenIn::default(), &[])
        .unwrap();
    assert_eq!(out.open_flags, abi::FOPEN_KEEP_CACHE);
    let export = guest.lookup(abi::ROOT_ID, "x").unwrap();
    assert_eq!(export.entry_valid, 0, "exports come and go");
    assert_eq!(guest.lookup(abi::ROOT_ID, "y").err(), Some(libc::ENOENT));
}
