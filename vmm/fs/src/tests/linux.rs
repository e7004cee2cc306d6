//! Linux itself as the guest: its FUSE client sends the same requests over
//! `/dev/fuse` as over virtio-fs. What programs do on such a mount is compared with what they do beside
//! it. Needs root and `/dev/fuse`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustix::fs::{
    CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom as Seeking, XattrFlags,
};
use rustix::io::Errno;

use super::snapshot;
use crate::testing::{Guest, opath};
use crate::{Access, Caching, FileServer, Limits};

/// Serves the kernel until it unmounts.
fn serve(server: &FileServer, device: &File) {
    let mut guest = Guest::unmounted(server);
    let mut request = vec![0; (1 << 20) + 8192];
    loop {
        match rustix::io::read(device, &mut request[..]) {
            Ok(len) => {
                let answer = guest.raw(&request[..len], (1 << 20) + 4096);
                if !answer.is_empty() {
                    // A request may have been given up meanwhile.
                    let _ = rustix::io::write(device, &answer);
                }
            }
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
            Err(_) => return,
        }
    }
}

/// Ends the mount if the thread that serves it panics, so that no one waits for it for ever.
struct End(std::path::PathBuf);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let flags = rustix::mount::UnmountFlags::FORCE | rustix::mount::UnmountFlags::DETACH;
            let _ = rustix::mount::unmount(&self.0, flags);
        }
    }
}

/// Runs `work` on a folder by itself, and on one that is served over a mount.
fn compare(
    caching: Caching,
    limits: Limits,
    work: impl Fn(&Path) -> String + Send + 'static,
) -> FileServer {
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread gets other mounts; its descriptors stay shared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        let private = rustix::mount::MountPropagationFlags::PRIVATE
            | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        let (twin, served, place) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        let server = FileServer::new(limits).unwrap();
        server
            .export_cached("x", opath(served.path()), Access::ReadWrite, caching)
            .unwrap();
        let device = Arc::new(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/fuse")
                .expect("/dev/fuse, which this test needs"),
        );
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("nacre", place.path(), "fuse", flags, options.as_c_str())
            .expect("mounted");
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (server, device) = (server.clone(), Arc::clone(&device));
                let end = End(place.path().to_owned());
                std::thread::spawn(move || {
                    let _end = end;
                    serve(&server, &device);
                })
            })
            .collect();
        let through = place.path().join("x");
        let (ours, theirs) = (work(&through), work(twin.path()));
        assert_eq!(
            snapshot(&through, false),
            snapshot(served.path(), false),
            "the mount and what is behind it"
        );
        assert_eq!(snapshot(served.path(), false), snapshot(twin.path(), false));
        assert_eq!(ours, theirs);
        rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty())
            .expect("no longer used");
        for thread in threads {
            thread.join().expect("no panic");
        }
        server
    });
    thread.join().expect("the thread's assertions hold")
}

/// Runs a script in `folder`; what it says.
fn shell(folder: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(folder)
        .output()
        .expect("a shell");
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

const SCRIPT: &str = r#"
umask 022
mkdir -p a/b/c
for i in $(seq 100); do echo $i > a/f$i; done
ls a | wc -l; cat a/f* | md5sum
tar cf - -C /usr/include linux | tar xf - -C a/b
find a | wc -l
cp -a a copy; diff -r a copy && echo the same
cp -r a/b/linux/can flat; rm -rf copy; ls
ln -s a/f1 link; cat link; readlink link; ln a/f1 hard; stat -c '%h %s %F' hard a/f1 link
mv a/f2 a/b/c/moved; mv a/b/c renamed; cat renamed/moved
echo more >> a/f3; echo less > a/f4; cat a/f3 a/f4; truncate -s 3 a/f5; od -c a/f5
chmod 4755 a/f6; chown 1000:1001 a/f7; stat -c '%a %u %g' a/f6 a/f7
mkdir sticky group; chmod 1777 sticky; chmod 2775 group; chgrp 4242 group
as() { setpriv --reuid $1 --regid $1 --clear-groups sh -c "$2" 2>&1; }
as 1000 'umask 027; echo mine > sticky/mine; mkdir sticky/dir; stat -c "%a %u %g" sticky/mine sticky/dir'
as 1001 'cat sticky/mine; rm -f sticky/mine; mv sticky/mine sticky/yours; echo x > a/f8'
setpriv --reuid 1000 --regid 1000 --groups 4242 sh -c 'echo x > group/f; mkdir group/d; stat -c "%a %u %g" group/f group/d'
as 1000 'echo change >> a/f7; stat -c %a a/f7'
chmod 6777 a/f9; as 1000 'echo x >> a/f9'; stat -c %a a/f9
chmod 6777 a/f10; echo x >> a/f10; stat -c %a a/f10
cp /bin/echo program; ./program it runs; rmdir sticky; mknod pipe p
(echo through > pipe &) ; cat pipe
touch -d '2001-02-03 04:05:06.789' a/f11; stat -c %y a/f11; touch -h -d 2002-03-04 link; stat -c %y link
dd if=/dev/zero of=big bs=1M count=20 2>/dev/null; sync big; du -k big; cmp -n 20971520 big /dev/zero
: > empty; cat empty; rm a/f1; cat hard; find . -newer a/f11 -name 'f1?' | sort
"#;

/// The same at several places at once.
fn side_by_side(folder: &Path) -> String {
    let names = ["a", "b", "c", "d"];
    for name in names {
        fs::create_dir(folder.join(name)).unwrap();
    }
    std::thread::scope(|scope| {
        let threads = names.map(|name| scope.spawn(move || calls(&folder.join(name))));
        threads.map(|thread| thread.join().unwrap()).concat()
    })
}

fn work(folder: &Path) -> String {
    shell(folder, SCRIPT) + &calls(folder)
}

/// What a script cannot do.
fn calls(folder: &Path) -> String {
    let mut said = String::new();
    let mut say = |what: &str, value: &dyn std::fmt::Debug| {
        said += &format!("{what}: {value:?}\n");
    };
    let path = |name: &str| folder.join(name);
    // A file that is deleted while it is open, and one that never had a name.
    let mut file = File::create_new(path("gone")).unwrap();
    fs::remove_file(path("gone")).unwrap();
    file.write_all(b"still here").unwrap();
    let mut file = File::options()
        .read(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mut text = String::new();
    if let Ok(file) = &mut file {
        file.read_to_string(&mut text).unwrap();
    }
    say("deleted", &text);
    let nameless = rustix::fs::open(folder, OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR).unwrap();
    rustix::io::write(&nameless, b"named later").unwrap();
    let from = format!("/proc/self/fd/{}", nameless.as_raw_fd());
    let linked = rustix::fs::linkat(
        CWD,
        from,
        CWD,
        path("named"),
        rustix::fs::AtFlags::SYMLINK_FOLLOW,
    );
    say("linked", &linked);
    // Shared memory.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path("map"))
        .unwrap();
    file.set_len(20_000).unwrap();
    // SAFETY: a new mapping of a file of that length, which no one cuts, is written within its bounds and unmapped.
    unsafe {
        let length = 20_000;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let map = libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(map, libc::MAP_FAILED);
        map.cast::<u8>().add(10_000).write_bytes(b'm', 5000);
        libc::msync(map, length, libc::MS_SYNC);
        libc::munmap(map, length);
    }
    let mut read = vec![0; 20_000];
    file.read_exact_at(&mut read, 0).unwrap();
    say("mapped", &read.iter().filter(|byte| **byte == b'm').count());
    // Holes.
    let file = File::create_new(path("holes")).unwrap();
    file.write_all_at(&[1; 65_536], 0).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    say("punch", &rustix::fs::fallocate(&file, punch, 8192, 8192));
    say(
        "keep",
        &rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 4096),
    );
    say(
        "zero",
        &rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4096),
    );
    say("hole", &rustix::fs::seek(&file, Seeking::Hole(0)));
    say("data", &rustix::fs::seek(&file, Seeking::Data(8192)));
    say("none", &rustix::fs::seek(&file, Seeking::Data(1 << 30)));
    // Copies.
    let copy = File::create_new(path("copied")).unwrap();
    let (mut from, mut to) = (100, 200);
    let source = File::open(path("holes")).unwrap();
    say(
        "copy",
        &rustix::fs::copy_file_range(&source, Some(&mut from), &copy, Some(&mut to), 30_000),
    );
    // Attributes.
    for (key, value) in [
        ("user.a", "1"),
        ("trusted.b", "22"),
        ("security.c", "333"),
        ("nothing.d", "4"),
    ] {
        let set = rustix::fs::setxattr(path("copied"), key, value.as_bytes(), XattrFlags::CREATE);
        say(key, &set);
        say(
            key,
            &rustix::fs::setxattr(path("copied"), key, b"5", XattrFlags::CREATE),
        );
        let mut buffer = [0; 10];
        say(
            key,
            &rustix::fs::getxattr(path("copied"), key, &mut buffer[..]),
        );
    }
    let mut list = [0; 200];
    say(
        "list",
        &rustix::fs::listxattr(path("copied"), &mut list[..]),
    );
    say("remove", &rustix::fs::removexattr(path("copied"), "user.a"));
    say("remove", &rustix::fs::removexattr(path("copied"), "user.a"));
    // A default ACL: rwx for the owner, user 1000, the group and the mask, r-x for others. It stands in for the umask.
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 7_u16, u32::MAX),
        (2, 7, 1000),
        (4, 7, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 5, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    fs::create_dir(path("acl")).unwrap();
    let key = "system.posix_acl_default";
    say(
        "acl",
        &rustix::fs::setxattr(path("acl"), key, &acl, XattrFlags::empty()),
    );
    say(
        "acl",
        &shell(&path("acl"), "umask 077; echo > f; mkdir d; stat -c %a f d"),
    );
    say(
        "acl",
        &shell(
            &path("acl"),
            "chmod 700 f; stat -c %a f; setpriv --reuid 1000 --clear-groups cat f; chmod 770 f; setpriv --reuid 1000 --clear-groups cat f",
        ),
    );
    let mut buffer = [0; 100];
    let acl = rustix::fs::getxattr(path("acl/f"), "system.posix_acl_access", &mut buffer[..]);
    say("acl", &acl);
    say("acl", &buffer);
    // Names.
    symlink("/nowhere", path("dangling")).unwrap();
    say(
        "link attribute",
        &rustix::fs::lsetxattr(path("dangling"), "trusted.x", b"1", XattrFlags::empty()),
    );
    for (one, two, flags) in [
        ("holes", "copied", RenameFlags::NOREPLACE),
        ("holes", "copied", RenameFlags::EXCHANGE),
        ("holes", "dangling", RenameFlags::EXCHANGE),
        ("holes", "holes", RenameFlags::empty()),
    ] {
        say(
            "rename",
            &rustix::fs::renameat_with(CWD, path(one), CWD, path(two), flags),
        );
    }
    say("length", &fs::write(path(&"n".repeat(255)), "x").is_ok());
    say(
        "too long",
        &fs::write(path(&"n".repeat(256)), "x").map_err(|e| e.raw_os_error()),
    );
    // Locks.
    let (one, two) = (
        File::open(path("copied")).unwrap(),
        File::open(path("copied")).unwrap(),
    );
    say(
        "lock",
        &rustix::fs::flock(&one, FlockOperation::LockExclusive),
    );
    say(
        "lock",
        &rustix::fs::flock(&two, FlockOperation::NonBlockingLockExclusive),
    );
    say(
        "lock",
        &rustix::fs::fcntl_lock(
            OpenOptions::new().write(true).open(path("map")).unwrap(),
            FlockOperation::NonBlockingLockExclusive,
        ),
    );
    // Two that append.
    let open = || {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path("log"))
            .unwrap()
    };
    let (mut one, mut two) = (open(), open());
    for i in 0..50 {
        writeln!(one, "one {i}").unwrap();
        writeln!(two, "two {i}").unwrap();
    }
    say(
        "log",
        &fs::read_to_string(path("log")).unwrap().lines().count(),
    );
    say("seek", &one.seek(SeekFrom::End(0)).unwrap());
    // Direct access.
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path("log"));
    say("direct", &direct.is_ok());
    // A directory that is read while it is emptied.
    fs::create_dir(path("many")).unwrap();
    for i in 0..1000 {
        File::create_new(path("many").join(format!("file-{i}"))).unwrap();
    }
    let mut seen = 0;
    for entry in fs::read_dir(path("many")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
        seen += 1;
    }
    say("emptied", &(seen, fs::remove_dir(path("many")).is_ok()));
    let metadata = fs::metadata(path("log")).unwrap();
    say("birth", &metadata.created().is_ok());
    say("mode", &(metadata.mode(), metadata.len()));
    fs::set_permissions(path("log"), fs::Permissions::from_mode(0o111)).unwrap();
    let log = File::open(path("log")).unwrap();
    say("sync", &(log.sync_all().is_ok(), log.sync_data().is_ok()));
    say("sync all", &rustix::fs::syncfs(log.as_fd()));
    say("folder", &File::open(folder).unwrap().sync_all().is_ok());
    said
}

#[test]
fn programs_on_a_mount_do_as_they_do_elsewhere() {
    let server = compare(Caching::default(), Limits::for_descriptors(8192), work);
    let counters = server.counters();
    assert!(
        counters.requests > 1000 && counters.malformed == 0,
        "{counters:?}"
    );
    // Unmounted by force of habit, this kind of mount leaves its nodes behind; a guest's does not.
    assert_eq!(counters.handles, 0, "{counters:?}");
    assert!(server.withdraw("x"));
    let counters = server.counters();
    assert_eq!((counters.inodes, counters.node_descriptors), (0, 0));
}

#[test]
fn programs_on_a_mount_do_not_notice_that_descriptors_are_few() {
    let limits = Limits {
        kept: 16,
        ..Limits::for_descriptors(8192)
    };
    let server = compare(Caching::Always, limits, |folder| {
        let side_by_side = side_by_side(folder);
        fs::create_dir(folder.join("e")).unwrap();
        side_by_side + &work(&folder.join("e"))
    });
    let counters = server.counters();
    assert!(counters.node_descriptors <= 16 + 8, "{counters:?}");
}
