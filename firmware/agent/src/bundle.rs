//! A container's directory in the guest: its specification, its root and what
//! else is mounted for it. Made and taken down as a whole.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use nacre_protocol::agent::{GuestDirectory, GuestMount};
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::fchownat;
use tracing::{debug, warn};

use crate::error::{Doing, Error};
use crate::init;
use crate::spec;

/// A container's directory and the mounts below it, in the order in which they were made.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    mounts: Mutex<Vec<PathBuf>>,
}

/// The longest id; it becomes the name of a directory.
const ID_BYTES: usize = 128;

/// Refuses ids that cannot be a directory's name or mean another directory.
///
/// # Errors
/// `InvalidArgument` with what is wrong; the id itself is quoted only as far as it is sane.
pub fn check_id(id: &str) -> Result<(), Error> {
    let wrong = if id.is_empty() {
        "is empty"
    } else if id.len() > ID_BYTES {
        "is longer than 128 bytes"
    } else if id.starts_with('.') || id.starts_with('-') {
        "begins with a dot or a dash"
    } else if !id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte))
    {
        "has other characters than A–Z, a–z, 0–9, `.`, `_`, `-`, `+`"
    } else {
        return Ok(());
    };
    let shown: String = id.escape_debug().take(40).collect();
    Err(Error::InvalidArgument(format!("the id `{shown}` {wrong}")))
}

impl Bundle {
    /// Makes the directory of a container.
    ///
    /// # Errors
    /// The directory that could not be made.
    pub fn create(id: &str) -> Result<Bundle, Error> {
        let path = Path::new(init::STATE).join("containers").join(id);
        fs::create_dir_all(&path).doing(|| format!("making {}", path.display()))?;
        Ok(Bundle {
            path,
            mounts: Mutex::default(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the host's mounts in their order, with the bundle as the working directory. Blocks as long as the
    /// filesystems do.
    ///
    /// # Errors
    /// `InvalidArgument` for a target or directory outside of the bundle; what the kernel said otherwise.
    pub fn mount_all(&self, wanted: &[GuestMount]) -> Result<(), Error> {
        // mount(2) finds relative paths in its options by the working directory, which all threads share unless one
        // leaves the others'. A hundred absolute ones would not fit in its one page of options.
        let work = || {
            unshare(CloneFlags::CLONE_FS).doing(|| "leaving the working directory".into())?;
            std::env::set_current_dir(&self.path)
                .doing(|| format!("entering {}", self.path.display()))?;
            wanted.iter().try_for_each(|mount| self.mount(mount))
        };
        std::thread::scope(|scope| scope.spawn(work).join())
            .unwrap_or_else(|_| Err(Error::Internal("the mounting thread failed".into())))
    }

    fn mount(&self, wanted: &GuestMount) -> Result<(), Error> {
        let target = self.inside(&wanted.target)?;
        for directory in &wanted.directories {
            self.make_directory(directory)?;
        }
        fs::create_dir_all(&target).doing(|| format!("making {}", target.display()))?;
        let (flags, data) = options(&wanted.options);
        mount(
            Some(wanted.source.as_str()),
            &target,
            Some(wanted.fstype.as_str()),
            flags,
            Some(data.as_str()),
        )
        .doing(|| {
            format!(
                "mounting {} ({}, options {:?}) on {}",
                wanted.source,
                wanted.fstype,
                wanted.options,
                target.display()
            )
        })?;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        let more = flags - bind;
        self.mounts
            .lock()
            .expect("bundle's mounts")
            .push(target.clone());
        if flags.contains(MsFlags::MS_BIND) && !more.is_empty() {
            // A bind mount takes its other flags only when it is there.
            let flags = more | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(None::<&str>, &target, None::<&str>, flags, None::<&str>)
                .doing(|| format!("setting {:?} of {}", wanted.options, target.display()))?;
        }
        Ok(())
    }

    /// Makes sure that there is a root, and writes the specification.
    ///
    /// # Errors
    /// The file or directory that could not be made.
    pub fn fill(&self, specification: &oci_spec::runtime::Spec) -> Result<(), Error> {
        for directory in [spec::ROOT, "state"] {
            let directory = self.path.join(directory);
            fs::create_dir_all(&directory).doing(|| format!("making {}", directory.display()))?;
        }
        write_json(&self.path.join("config.json"), specification)
    }

    /// Unmounts everything and removes the directory. What cannot be is said, and the rest goes on. Blocks
    /// as long as the filesystems do.
    ///
    /// # Errors
    /// All that went wrong, in one.
    pub fn remove(&self) -> Result<(), Error> {
        let mut wrong = Vec::new();
        let mounts = std::mem::take(&mut *self.mounts.lock().expect("bundle's mounts"));
        for target in mounts.iter().rev() {
            if let Err(error) = unmount(target) {
                wrong.push(error.to_string());
            }
        }
        // Never into something that is still mounted.
        if wrong.is_empty() {
            match fs::remove_dir_all(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    wrong.push(format!("removing {}: {error}", self.path.display()));
                }
                _ => {}
            }
        }
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(Error::Internal(wrong.join("; "))),
        }
    }

    /// Makes a directory below the bundle, and those that lead to it; one that is there stays as it is.
    fn make_directory(&self, wanted: &GuestDirectory) -> Result<(), Error> {
        let path = self.inside(&wanted.path)?;
        let doing = || format!("making the directory {}", path.display());
        let handle = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut at = open(&self.path, handle, Mode::empty()).doing(doing)?;
        let mut components = Path::new(&wanted.path).components().peekable();
        while let Some(component) = components.next() {
            let made = match mkdirat(&at, component.as_os_str(), Mode::S_IRWXU) {
                Ok(()) => true,
                Err(nix::Error::EEXIST) => false,
                Err(error) => return Err(error).doing(doing),
            };
            at = openat(&at, component.as_os_str(), handle, Mode::empty()).doing(doing)?;
            if !made {
                continue;
            }
            let (mode, uid, gid) = match components.peek() {
                None => (wanted.mode, wanted.uid, wanted.gid),
                Some(_) => (0o755, 0, 0),
            };
            fchownat(
                &at,
                "",
                Some(uid.into()),
                Some(gid.into()),
                AtFlags::AT_EMPTY_PATH,
            )
            .doing(doing)?;
            // After the owner, whose change takes bits away.
            let itself = format!("/proc/self/fd/{}", at.as_raw_fd());
            fs::set_permissions(itself, fs::Permissions::from_mode(mode & 0o7777)).doing(doing)?;
        }
        Ok(())
    }

    fn inside(&self, target: &str) -> Result<PathBuf, Error> {
        let relative = Path::new(target);
        let plain = relative
            .components()
            .all(|component| matches!(component, Component::Normal(_)));
        if target.is_empty() || !plain {
            return Err(Error::InvalidArgument(format!(
                "the mount target `{}` does not lie in the bundle",
                target.escape_debug().take(80).collect::<String>()
            )));
        }
        Ok(self.path.join(relative))
    }
}

/// Writes a file for the helper.
///
/// # Errors
/// The file that could not be written.
pub fn write_json(file: &Path, value: &impl serde::Serialize) -> Result<(), Error> {
    let json = serde_json::to_vec(value)
        .map_err(|error| Error::Internal(format!("writing {}: {error}", file.display())))?;
    fs::write(file, json).doing(|| format!("writing {}", file.display()))
}

/// Unmounts, so that what was written is on the disk when this returns. A mount that something still
/// uses is detached: it goes when that goes.
fn unmount(target: &Path) -> Result<(), Error> {
    match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(nix::Error::EBUSY) => {
            warn!("{} is in use; it is detached instead", target.display());
            nix::unistd::sync();
            umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                .doing(|| format!("detaching {}", target.display()))
        }
        Err(nix::Error::EINVAL | nix::Error::ENOENT) => {
            debug!("{} is not mounted", target.display());
            Ok(())
        }
        Err(error) => Err(error).doing(|| format!("unmounting {}", target.display())),
    }
}

/// Mount options as flags, and what only the filesystem understands as its data.
fn options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (flag, on) = match option.as_str() {
            "defaults" | "" => continue,
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
            _ => {
                data.push(option.as_str());
                continue;
            }
        };
        flags.set(flag, on);
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_no_directory_are_refused() {
        for id in ["c1", "A_b.c-d+e", "0", &"x".repeat(128)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        let long = "x".repeat(129);
        let huge = "../".repeat(350_000);
        for id in [
            "", ".", "..", "../x", "a/b", "/", "a\0b", ".hidden", "-rf", "a b", "ä", &long, &huge,
        ] {
            let refused = check_id(id).unwrap_err();
            assert!(matches!(refused, Error::InvalidArgument(_)));
            assert!(refused.to_string().len() < 300);
        }
    }

    #[test]
    fn targets_stay_in_the_bundle() {
        let bundle = Bundle {
            path: "/run/nacre/containers/c1".into(),
            mounts: Mutex::default(),
        };
        assert_eq!(
            bundle.inside("lower/0").unwrap(),
            Path::new("/run/nacre/containers/c1/lower/0")
        );
        for target in ["", "..", "a/../../b", "/etc", "./x/.."] {
            assert!(bundle.inside(target).is_err(), "{target}");
        }
    }

    #[test]
    fn directories_are_made_with_owner_and_mode_and_never_through_a_link() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), root.path().join("link")).unwrap();
        let bundle = Bundle {
            path: root.path().to_owned(),
            mounts: Mutex::default(),
        };
        let own = |path: &str, mode| GuestDirectory {
            path: path.into(),
            mode,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            ..Default::default()
        };
        bundle.make_directory(&own("a/b", 0o1770)).unwrap();
        let mode = |path: &str| {
            let metadata = fs::metadata(root.path().join(path)).unwrap();
            metadata.permissions().mode() & 0o7777
        };
        assert_eq!((mode("a"), mode("a/b")), (0o755, 0o1770));
        bundle.make_directory(&own("a/b", 0o700)).unwrap();
        assert_eq!(mode("a/b"), 0o1770, "one that is there stays as it is");
        for path in ["link/c", "a/../c", "/c", ""] {
            assert!(bundle.make_directory(&own(path, 0o700)).is_err(), "{path}");
        }
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }

    #[test]
    fn options_become_flags_and_data() {
        let given = [
            "ro",
            "noatime",
            "lowerdir=/a:/b",
            "rw",
            "defaults",
            "errors=panic",
        ];
        let (flags, data) = options(&given.map(String::from));
        assert_eq!(flags, MsFlags::MS_NOATIME, "the last of ro and rw holds");
        assert_eq!(data, "lowerdir=/a:/b,errors=panic");
    }
}
