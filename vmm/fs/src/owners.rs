//! Mounts that show files as others' than those that their file system has them down as (`MOUNT_ATTR_IDMAP`): what belongs to a
//! container's root belongs to root on the disk.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sched::{CloneCb, CloneFlags, clone};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::{Error, sys};

/// Stack of the process that holds a namespace, in bytes. It calls three functions of libc.
const STACK: usize = 64 << 10;

/// So many users, or groups, in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first as the file system has it.
    pub stored: u32,
    /// The first as the mount shows it.
    pub shown: u32,
    /// How many.
    pub count: u32,
}

/// Users and groups of a mount. Those that are in no range show as nobody's, and cannot be given away to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners {
    /// The users.
    pub users: Vec<Range>,
    /// The groups.
    pub groups: Vec<Range>,
}

impl Owners {
    /// Reads `STORED:SHOWN:COUNT`, several behind each other with commas, as containerd has them in `uidmap=` and `gidmap=`.
    pub fn ranges(text: &str) -> Option<Vec<Range>> {
        let range = |text: &str| {
            let mut numbers = text.split(':').map(|number| number.parse().ok());
            let range = Range {
                stored: numbers.next()??,
                shown: numbers.next()??,
                count: numbers.next()??,
            };
            (numbers.next().is_none() && range.count > 0).then_some(range)
        };
        text.split(',').map(range).collect()
    }

    /// What mounts are mapped by.
    ///
    /// # Errors
    /// [`Error::Users`] with what was being done.
    pub fn map(&self) -> Result<OwnerMap, Error> {
        let failed = |doing: &'static str| move |source| Error::Users { doing, source };
        let holder = Holder::start().map_err(failed("make a process in it"))?;
        let file = |name: &str| format!("/proc/{}/{name}", holder.0);
        for (name, doing, ranges) in [
            ("uid_map", "write its users' map", &self.users),
            ("gid_map", "write its groups' map", &self.groups),
        ] {
            if ranges.is_empty() {
                let none = io::Error::new(io::ErrorKind::InvalidInput, "no range is given");
                return Err(failed(doing)(none));
            }
            fs::write(file(name), Map(ranges).to_string()).map_err(failed(doing))?;
        }
        let namespace = File::open(file("ns/user")).map_err(failed("open it"))?;
        Ok(OwnerMap(namespace.into()))
    }
}

/// A user namespace with the maps of [`Owners`]. It lives as long as this and the mounts that are mapped by it.
#[derive(Debug)]
pub struct OwnerMap(OwnedFd);

impl OwnerMap {
    /// A detached clone of what `path` names, with these owners; with `recursive` the mounts below come along as they
    /// are. It is in no namespace until [`attach`] puts it there.
    ///
    /// # Errors
    /// [`Error::Clone`], and [`Error::Owners`] where the file system has no mapped mounts.
    pub fn mount(&self, path: &Path, recursive: bool) -> Result<OwnedFd, Error> {
        let fd = clone_tree(path, recursive)?;
        self.set(fd.as_fd(), path, false)?;
        Ok(fd)
    }

    /// Gives a detached mount, which is of `path`, these owners; with `all` those below it as well.
    pub(crate) fn set(&self, mount: BorrowedFd<'_>, path: &Path, all: bool) -> Result<(), Error> {
        sys::map_mount_owners(mount, self.0.as_fd(), all).map_err(|source| Error::Owners {
            path: path.to_owned(),
            source,
        })
    }
}

/// Puts a detached mount on `target`.
///
/// # Errors
/// As the kernel has them.
pub fn attach(mount: impl AsFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(mount, c"", CWD, target, flags)?)
}

pub(crate) fn clone_tree(path: &Path, recursive: bool) -> Result<OwnedFd, Error> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(CWD, path, flags).map_err(|source| Error::Clone {
        path: path.to_owned(),
        source,
    })
}

/// As the kernel reads a map: what is inside of the namespace is what is stored.
struct Map<'a>(&'a [Range]);

impl fmt::Display for Map<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for range in self.0 {
            writeln!(f, "{} {} {}", range.stored, range.shown, range.count)?;
        }
        Ok(())
    }
}

/// A process that does nothing in a user namespace of its own, until this is dropped: a namespace begins with a process, and
/// this one has too many threads.
struct Holder(Pid);

impl Holder {
    fn start() -> io::Result<Self> {
        let mut stack = vec![0; STACK];
        let parent = Pid::this().as_raw();
        let run: CloneCb<'_> = Box::new(move || {
            // SAFETY: functions of the kernel only: another thread may have held any lock when this process was made.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                while libc::getppid() == parent {
                    libc::pause();
                }
            }
            0
        });
        // No signal when it ends: nobody who waits for children of this process is to see it.
        // SAFETY: the new process has its own copy of all memory, the stack among it, and of it runs the function above only.
        let made = unsafe { clone(run, &mut stack, CloneFlags::CLONE_NEWUSER, None) };
        Ok(Self(made?))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.0, Signal::SIGKILL);
        while waitpid(self.0, Some(WaitPidFlag::__WALL)) == Err(nix::Error::EINTR) {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use super::*;

    #[test]
    fn ranges_are_read_as_containerd_writes_them() {
        let range = |stored, shown, count| Range {
            stored,
            shown,
            count,
        };
        for (text, ranges) in [
            ("0:100000:65536", Some(vec![range(0, 100_000, 65536)])),
            ("0:1:2,5:6:7", Some(vec![range(0, 1, 2), range(5, 6, 7)])),
            ("", None),
            ("0:1", None),
            ("0:1:2:3", None),
            ("0:1:0", None),
            ("0:-1:2", None),
            ("0:1:2,", None),
            ("0:1:4294967296", None),
        ] {
            assert_eq!(Owners::ranges(text), ranges, "{text}");
        }
    }

    #[test]
    fn a_namespace_has_the_maps_and_no_process_is_left() {
        let range = |stored, shown, count| Range {
            stored,
            shown,
            count,
        };
        let holder = Holder::start().unwrap();
        let pid = holder.0;
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        assert_ne!(fs::read_link(format!("/proc/{pid}/ns/user")).unwrap(), own);
        drop(holder);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        let owners = Owners {
            users: vec![range(0, 100_000, 10), range(10, 5, 1)],
            groups: vec![range(0, 7, 1)],
        };
        owners.map().unwrap();
        for wrong in [
            Owners::default(),
            Owners {
                users: vec![range(0, 1, 2), range(1, 9, 1)],
                ..owners
            },
        ] {
            let error = wrong.map().expect_err("no map, and one that overlaps");
            assert!(error.to_string().contains("map"), "{error}");
        }
    }

    /// A folder on a file system that has mapped mounts: for a tmpfs that takes Linux 6.3.
    pub(crate) fn place() -> tempfile::TempDir {
        let all = all().map().unwrap();
        let places = [std::env::temp_dir(), "/var/tmp".into(), "/dev/shm".into()];
        let mut folders = places.iter().filter_map(|place| {
            let folder = tempfile::tempdir_in(place).ok()?;
            all.mount(folder.path(), false).ok().map(|_| folder)
        });
        folders
            .next()
            .expect("none of the usual places has mapped mounts")
    }

    fn all() -> Owners {
        let range = Range {
            stored: 0,
            shown: 100_000,
            count: 65536,
        };
        Owners {
            users: vec![range],
            groups: vec![range],
        }
    }

    #[test]
    fn a_mapped_mount_shows_and_stores_the_owners_of_its_maps() {
        let folder = place();
        let path = folder.path().join("f");
        fs::write(&path, "").unwrap();
        chown(&path, Some(3), Some(4)).unwrap();
        let all = all().map().unwrap();
        let mount = all.mount(folder.path(), false).unwrap();
        let at = |name: &str| {
            use std::os::fd::AsRawFd;
            format!("/proc/self/fd/{}/{name}", mount.as_raw_fd())
        };
        let shown = fs::metadata(at("f")).unwrap();
        assert_eq!((shown.uid(), shown.gid()), (100_003, 100_004));
        chown(at("f"), Some(100_005), Some(100_006)).unwrap();
        let stored = fs::metadata(&path).unwrap();
        assert_eq!((stored.uid(), stored.gid()), (5, 6));
        let nobody = chown(at("f"), Some(7), None).unwrap_err();
        assert_eq!(nobody.raw_os_error(), Some(libc::EOVERFLOW));
        let refused = all.mount(Path::new("/proc"), false).unwrap_err();
        let words = refused.to_string();
        assert!(
            words.contains("/proc") && words.contains("mapped"),
            "{words}"
        );
    }
}
