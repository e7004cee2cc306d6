//! The durable record of a VM's state directory: what was made on its behalf
//! that outlives a process. Each thing is written down before it is made, so
//! that after a SIGKILL [`cleanup`] can free it all. Also the pid file whose
//! lock tells whether the process that holds the VM still lives.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nacre_net::Made;
use nacre_net::cni::Attachment;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use crate::hooks;
use crate::network;
use crate::sandbox::cgroup;

mod socket;

pub(crate) use socket::listened;

/// Name of the record in a VM's state directory.
pub const RECORD: &str = "record.json";
/// Name of the pid file in a VM's state directory.
pub const PID: &str = "pid";

/// The record cannot be kept or what it names cannot be freed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("Cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record is not one.
    #[error("The record {} does not parse", path.display())]
    Parse {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Another process holds the VM.
    #[error("Process {pid} holds the VM of {}", directory.display())]
    Held {
        /// The state directory.
        directory: PathBuf,
        /// Its holder, 0 if not known.
        pid: i32,
    },
    /// What the record names has been freed: nothing more is made.
    #[error("Cannot make {} for a VM that ends", path.display())]
    Closed {
        /// What was about to be made.
        path: PathBuf,
    },
    /// Some of what the record names could not be freed; it is still in the record.
    #[error("Cannot free all of {}: {}", directory.display(), failures.join("; "))]
    Cleanup {
        /// The state directory.
        directory: PathBuf,
        /// One text each.
        failures: Vec<String>,
    },
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

/// Something that outlives a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "path", rename_all = "kebab-case")]
pub enum Resource {
    /// A file, such as a scratch disk.
    File(PathBuf),
    /// A Unix socket; it stays if somebody listens on it, since it is another's then.
    Socket(PathBuf),
    /// A mount point; unmounted lazily as often as something is mounted there.
    Mount(PathBuf),
    /// A directory that is empty once the later resources are freed.
    Directory(PathBuf),
    /// The cgroup of a VM; what is still in it is moved out of it.
    Cgroup(PathBuf),
    /// A cgroup that was made for the VM's to be in; it stays as long as others use it.
    CgroupParent(PathBuf),
    /// The file of a container's poststop hooks, which are run before it is removed.
    Poststop(PathBuf),
    /// The file of what was made in a network namespace to mirror it.
    Mirror(PathBuf),
    /// The file of a network that CNI plugins have set up.
    Cni(PathBuf),
}

impl Resource {
    fn path(&self) -> &Path {
        match self {
            Self::File(path)
            | Self::Socket(path)
            | Self::Mount(path)
            | Self::Directory(path)
            | Self::Cgroup(path)
            | Self::CgroupParent(path)
            | Self::Poststop(path)
            | Self::Mirror(path)
            | Self::Cni(path) => path,
        }
    }

    /// Frees it; what is not there is free. True if there was something.
    fn free(&self) -> Result<bool, String> {
        let outcome = match self {
            Self::File(path) => std::fs::remove_file(path),
            Self::Socket(path) => match socket::free(path) {
                Ok(false) => return Ok(false),
                freed => freed.map(|_| ()),
            },
            Self::Directory(path) => std::fs::remove_dir(path),
            Self::Mount(path) => return unmount_all(path),
            Self::Cgroup(path) => {
                return cgroup::remove(path).map_err(|error| self.failure(&error));
            }
            Self::Poststop(path) => {
                return hooks::settle(path).map_err(|error| self.failure(&error));
            }
            Self::Mirror(path) => return network::free::<Made>(path),
            Self::Cni(path) => return network::free::<Attachment>(path),
            Self::CgroupParent(path) => {
                return cgroup::remove_if_empty(path).map_err(|error| self.failure(&error));
            }
        };
        match outcome {
            Ok(()) => Ok(true),
            Err(error) if absent(&error) => Ok(false),
            Err(error) => Err(self.failure(&error)),
        }
    }

    fn failure(&self, error: &io::Error) -> String {
        format!("{}: {error}", self.path().display())
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn unmount_all(path: &Path) -> Result<bool, String> {
    let mut any = false;
    // Mounts stack; a bound keeps a path that something mounts again and again from holding us.
    for _ in 0..64 {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => any = true,
            // EINVAL: nothing is mounted there.
            Err(nix::Error::EINVAL | nix::Error::ENOENT | nix::Error::ENOTDIR) => return Ok(any),
            Err(error) => return Err(format!("unmounting {}: {error}", path.display())),
        }
    }
    Err(format!(
        "unmounting {}: there is always another mount",
        path.display()
    ))
}

/// Whose state directory it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Sandbox id.
    pub id: String,
    /// containerd namespace, or `vmctl`.
    pub namespace: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Content {
    version: u32,
    owner: Owner,
    resources: Vec<Resource>,
    /// All is freed, and nothing is written any more.
    #[serde(skip)]
    closed: bool,
}

/// The record of one state directory. Its methods write through to the disk before they return, and
/// block for as long as that takes.
#[derive(Debug)]
pub struct Record {
    directory: PathBuf,
    content: Mutex<Content>,
}

impl Record {
    /// Makes the state directory (mode 0700, parents as needed) with an empty record. A directory that
    /// is there with its record keeps both.
    pub fn create(directory: &Path, owner: Owner) -> Result<Self, Error> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(io_error("make the state directory", directory))?;
        match Self::open(directory) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        let content = Content {
            version: 1,
            owner,
            resources: Vec::new(),
            closed: false,
        };
        write(directory, &content)?;
        Ok(Self {
            directory: directory.to_owned(),
            content: Mutex::new(content),
        })
    }

    /// Reads the record of a state directory.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(RECORD);
        let bytes = std::fs::read(&path).map_err(io_error("read the record", &path))?;
        let content: Content =
            serde_json::from_slice(&bytes).map_err(|source| Error::Parse { path, source })?;
        Ok(Self {
            directory: directory.to_owned(),
            content: Mutex::new(content),
        })
    }

    /// The state directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whose it is.
    pub fn owner(&self) -> Owner {
        self.lock().owner.clone()
    }

    /// What is recorded, in the order of its making.
    pub fn resources(&self) -> Vec<Resource> {
        self.lock().resources.clone()
    }

    /// Records something that is about to be made. It is on the disk when this returns.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`Record::clean_up`], or that it cannot be written.
    pub fn add(&self, resource: Resource) -> Result<(), Error> {
        let mut content = self.lock();
        if content.closed {
            return Err(Error::Closed {
                path: resource.path().to_owned(),
            });
        }
        if content.resources.contains(&resource) {
            return Ok(());
        }
        content.resources.push(resource);
        let written = write(&self.directory, &content);
        if written.is_err() {
            content.resources.pop();
        }
        written
    }

    /// Frees one recorded thing and forgets it. What is not there is free.
    pub fn free(&self, resource: &Resource) -> Result<(), Error> {
        let mut content = self.lock();
        resource.free().map_err(|failure| Error::Cleanup {
            directory: self.directory.clone(),
            failures: vec![failure],
        })?;
        content.resources.retain(|recorded| recorded != resource);
        if content.closed {
            return Ok(());
        }
        write(&self.directory, &content)
    }

    /// Frees everything and the directory, as [`cleanup`] does, while calls may still be under way in this process:
    /// they can add nothing from here on, and write nothing into the directory that goes.
    pub fn clean_up(&self) -> Result<Vec<String>, Error> {
        let mut content = self.lock();
        content.closed = true;
        cleanup(&self.directory)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Replaces the record so that a crash leaves the old one or the new one.
fn write(directory: &Path, content: &Content) -> Result<(), Error> {
    let temporary = directory.join("record.json.new");
    let path = directory.join(RECORD);
    let text = serde_json::to_vec_pretty(content).map_err(|source| Error::Parse {
        path: path.clone(),
        source,
    })?;
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        File::open(directory)?.sync_all()
    })();
    written.map_err(io_error("write the record", &path))
}

/// Frees everything that the record in `directory` names, last made first, then the directory itself.
/// Answers with what there was to free. Idempotent: a directory that is gone is clean. Every step runs
/// whatever failed before it.
///
/// The caller has made sure that no process holds the VM ([`wait_unlocked`]).
pub fn cleanup(directory: &Path) -> Result<Vec<String>, Error> {
    let mut freed = Vec::new();
    let mut failures = Vec::new();
    match Record::open(directory) {
        Ok(record) => {
            for resource in record.resources().iter().rev() {
                match resource.free() {
                    Ok(true) => freed.push(resource.path().display().to_string()),
                    Ok(false) => {}
                    Err(failure) => failures.push(failure),
                }
            }
        }
        Err(Error::Io { source, .. }) if absent(&source) => {}
        Err(error) => failures.push(crate::sandbox::chain(&error)),
    }
    // Nothing that is still mounted below the directory may be removed with it: that would delete
    // the content of a root that is not ours.
    match mounts_below(directory) {
        Ok(mounts) => {
            for mount in mounts.iter().rev() {
                match unmount_all(mount) {
                    Ok(_) => freed.push(mount.display().to_string()),
                    Err(failure) => failures.push(failure),
                }
            }
        }
        Err(error) => failures.push(format!("/proc/self/mountinfo: {error}")),
    }
    if failures.is_empty() {
        match remove_all(directory) {
            Ok(()) => freed.push(directory.display().to_string()),
            Err(error) if absent(&error) => {}
            Err(error) => failures.push(format!("{}: {error}", directory.display())),
        }
    }
    if failures.is_empty() {
        Ok(freed)
    } else {
        Err(Error::Cleanup {
            directory: directory.to_owned(),
            failures,
        })
    }
}

/// Removes a directory into which something that was begun may still put its file.
fn remove_all(directory: &Path) -> io::Result<()> {
    const TIMES: u32 = 10;
    for _ in 1..TIMES {
        match std::fs::remove_dir_all(directory) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            done => return done,
        }
    }
    std::fs::remove_dir_all(directory)
}

/// Mount points at or below a directory, in the order of mounting.
fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = match directory.canonicalize() {
        Ok(directory) => directory,
        Err(error) if absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mountinfo = std::fs::read("/proc/self/mountinfo")?;
    Ok(mount_points(&mountinfo)
        .into_iter()
        .filter(|point| point.starts_with(&directory))
        .collect())
}

fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let point = |line: &[u8]| line.split(|byte| *byte == b' ').nth(4).map(unescape);
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(point)
        .collect()
}

/// Undoes the octal escapes (`\040`) of mountinfo.
fn unescape(field: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        match octal {
            Some(byte) => {
                plain.push(byte);
                rest = &rest[4..];
            }
            None => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(plain))
}

/// The pid file of a state directory, locked as long as this value lives. The kernel lets the lock go
/// with the process, however that ends, so a locked file means a living holder and never a reused pid.
#[derive(Debug)]
pub struct PidFile {
    _lock: Flock<File>,
}

impl PidFile {
    /// Writes this process's pid and takes the lock.
    ///
    /// # Errors
    /// [`Error::Held`] if another process has it.
    pub fn hold(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(PID);
        let file = open_pid(&path, true).map_err(io_error("open the pid file", &path))?;
        let mut lock = lock_soon(file).map_err(|(mut file, error)| {
            if error == nix::Error::EWOULDBLOCK {
                Error::Held {
                    directory: directory.to_owned(),
                    pid: read_pid(&mut file).unwrap_or(0),
                }
            } else {
                Error::Io {
                    doing: "lock the pid file",
                    path: path.clone(),
                    source: error.into(),
                }
            }
        })?;
        lock.set_len(0)
            .and_then(|()| lock.write_all(std::process::id().to_string().as_bytes()))
            .and_then(|()| lock.sync_all())
            .map_err(io_error("write the pid file", &path))?;
        Ok(Self { _lock: lock })
    }
}

/// Takes the lock, within 200 ms: [`holder`] takes it for a moment to find out that it is free.
fn lock_soon(mut file: File) -> Result<Flock<File>, (File, nix::Error)> {
    for _ in 0..20 {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((back, nix::Error::EWOULDBLOCK)) => file = back,
            locked => return locked,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
}

fn open_pid(path: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn read_pid(file: &mut File) -> Option<i32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Who holds a state directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// A living process, with its pid (0 if it has not written it yet).
    Living(i32),
    /// It is gone; the pid that it had, if it wrote one. That pid may be someone else's now.
    Gone(Option<i32>),
}

/// Who holds a state directory, now.
pub fn holder(directory: &Path) -> Result<Holder, Error> {
    let path = directory.join(PID);
    let mut file = match open_pid(&path, false) {
        Ok(file) => file,
        Err(error) if absent(&error) => return Ok(Holder::Gone(None)),
        Err(error) => return Err(io_error("open the pid file", &path)(error)),
    };
    let pid = read_pid(&mut file);
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_unlocks_on_drop) => Ok(Holder::Gone(pid)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(Holder::Living(pid.unwrap_or(0))),
        Err((_, error)) => Err(io_error("lock the pid file", &path)(error.into())),
    }
}

/// Waits until no process holds the state directory; answers with the pid that the last one had.
///
/// # Errors
/// [`Error::Held`] after `limit`. Blocks; asks every 10 ms, since a lock of another process cannot be
/// waited for with a limit.
pub fn wait_unlocked(directory: &Path, limit: Duration) -> Result<Option<i32>, Error> {
    let end = Instant::now() + limit;
    loop {
        match holder(directory)? {
            Holder::Gone(pid) => return Ok(pid),
            Holder::Living(pid) if Instant::now() >= end => {
                return Err(Error::Held {
                    directory: directory.to_owned(),
                    pid,
                });
            }
            Holder::Living(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> (tempfile::TempDir, PathBuf, Record) {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("vms/ns-a");
        let owner = Owner {
            id: "a".to_owned(),
            namespace: "ns".to_owned(),
        };
        let record = Record::create(&directory, owner).unwrap();
        (root, directory, record)
    }

    #[test]
    fn what_is_added_is_on_the_disk_at_once() {
        let (_root, directory, record) = record();
        let image = Resource::File(directory.join("root.img"));
        record.add(image.clone()).unwrap();
        let again = Record::open(&directory).unwrap();
        assert_eq!(again.resources(), vec![image]);
        assert_eq!(again.owner().namespace, "ns");
    }

    #[test]
    fn what_is_under_way_when_all_is_freed_brings_nothing_back() {
        let (root, directory, record) = record();
        let (early, late) = (root.path().join("early"), root.path().join("late"));
        record.add(Resource::File(early.clone())).unwrap();
        record.clean_up().unwrap();
        let refused = record.add(Resource::File(late)).unwrap_err();
        assert!(matches!(refused, Error::Closed { .. }), "{refused}");
        // Made too late to be freed with the rest.
        std::fs::write(&early, "x").unwrap();
        record.free(&Resource::File(early.clone())).unwrap();
        assert!(!early.exists() && !directory.exists());
    }

    #[test]
    fn cleanup_frees_all_in_reverse_and_again_nothing() {
        let (root, directory, record) = record();
        let outside = root.path().join("outside");
        let file = outside.join("file");
        record.add(Resource::Directory(outside.clone())).unwrap();
        record.add(Resource::File(file.clone())).unwrap();
        record
            .add(Resource::File(root.path().join("never made")))
            .unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(&file, "x").unwrap();
        let freed = cleanup(&directory).unwrap();
        assert_eq!(freed.len(), 3, "{freed:?}");
        assert!(!outside.exists() && !directory.exists());
        assert_eq!(cleanup(&directory).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_failure_keeps_the_record_and_frees_the_rest() {
        let (root, directory, record) = record();
        let full = root.path().join("full");
        let file = root.path().join("file");
        std::fs::create_dir_all(full.join("inhabitant")).unwrap();
        std::fs::write(&file, "x").unwrap();
        record.add(Resource::File(file.clone())).unwrap();
        record.add(Resource::Directory(full.clone())).unwrap();
        let error = cleanup(&directory).unwrap_err().to_string();
        assert!(error.contains("full"), "{error}");
        assert!(!file.exists());
        assert!(directory.join(RECORD).exists());
        std::fs::remove_dir(full.join("inhabitant")).unwrap();
        cleanup(&directory).unwrap();
        assert!(!directory.exists());
    }

    #[test]
    fn a_truncated_record_is_an_error_and_nothing_is_removed() {
        let (_root, directory, _record) = record();
        std::fs::write(directory.join(RECORD), "{\"version\":").unwrap();
        cleanup(&directory).unwrap_err();
        assert!(directory.exists());
    }

    #[test]
    fn the_lock_tells_the_living_from_the_gone() {
        let (_root, directory, _record) = record();
        assert_eq!(holder(&directory).unwrap(), Holder::Gone(None));
        let ours = i32::try_from(std::process::id()).unwrap();
        let held = PidFile::hold(&directory).unwrap();
        assert_eq!(holder(&directory).unwrap(), Holder::Living(ours));
        assert!(matches!(PidFile::hold(&directory), Err(Error::Held { pid, .. }) if pid == ours));
        assert!(matches!(
            wait_unlocked(&directory, Duration::from_millis(1)),
            Err(Error::Held { .. })
        ));
        drop(held);
        assert_eq!(
            wait_unlocked(&directory, Duration::ZERO).unwrap(),
            Some(ours)
        );
    }

    #[test]
    fn mount_points_are_unescaped() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw - ext3 /dev/root rw\n\n";
        assert_eq!(mount_points(text), vec![PathBuf::from("/mnt 2")]);
    }
}
