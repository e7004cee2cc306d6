//! One container's cgroup (v2): made before its first process, asked for its
//! processes, killed, and removed. Changes are waited for, not polled: the
//! kernel marks an event file as having priority data.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{debug, warn};

use crate::device_rules;
use crate::error::{Doing, Error};
use crate::init;
use crate::resources::Change;

/// The cgroup, relative to the hierarchy's root, that holds all containers.
const PARENT: &str = "nacre";

/// A container's cgroup. Dropping it removes nothing.
#[derive(Clone, Debug)]
pub struct Cgroup {
    root: PathBuf,
    relative: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of a container, with every controller of the machine.
    ///
    /// # Errors
    /// The directory that could not be made.
    pub fn create(container_id: &str) -> Result<Cgroup, Error> {
        let cgroup = Cgroup {
            root: init::CGROUP_ROOT.into(),
            relative: Path::new(PARENT).join(container_id),
        };
        parent(&cgroup.root)?;
        let path = cgroup.path();
        fs::create_dir(&path).doing(|| format!("making cgroup {}", path.display()))?;
        Ok(cgroup)
    }

    /// Where it is in the hierarchy, as a specification's `cgroupsPath`.
    pub fn spec_path(&self) -> PathBuf {
        Path::new("/").join(&self.relative)
    }

    fn path(&self) -> PathBuf {
        self.root.join(&self.relative)
    }

    /// The pids in it and in the cgroups below it, in ascending order. Empty when it is gone.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for directory in subtree(&self.path()) {
            let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(listed.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Sends a signal to every process in it; false if there was none.
    pub fn signal(&self, signal: i32) -> bool {
        let pids = self.pids();
        if signal == libc::SIGKILL && fs::write(self.path().join("cgroup.kill"), "1").is_ok() {
            return !pids.is_empty();
        }
        let mut any = false;
        for pid in pids {
            any |= send(pid, signal).is_ok();
        }
        any
    }

    /// Waits until no process lives in it.
    ///
    /// # Errors
    /// After `limit`, with the pids that are left.
    pub async fn emptied(&self, limit: Duration) -> Result<(), Error> {
        let Ok(mut file) = EventFile::open(&self.path().join("cgroup.events")) else {
            return Ok(());
        };
        let wait = async {
            while file.value("populated").unwrap_or(0) != 0 {
                file.changed().await?;
            }
            io::Result::Ok(())
        };
        match tokio::time::timeout(limit, wait).await {
            Ok(waited) => waited.doing(|| format!("watching cgroup {}", self.path().display())),
            Err(_) => Err(Error::Internal(format!(
                "cgroup {} still has the processes {:?} after {} ms",
                self.path().display(),
                self.pids(),
                limit.as_millis()
            ))),
        }
    }

    /// Removes it and what was made below it. Gone already is fine.
    ///
    /// # Errors
    /// The directory that the kernel keeps.
    pub fn remove(&self) -> Result<(), Error> {
        let mut directories = subtree(&self.path());
        directories.reverse();
        for directory in directories {
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).doing(|| format!("removing cgroup {}", directory.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What a file of it holds; nothing if there is no such file.
    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path().join(file)).ok()
    }

    /// Makes all changes, or none: when one fails, those before it are taken back. Blocks as long as the kernel
    /// needs to make room under a lower limit.
    ///
    /// # Errors
    /// The file that is not there or does not take its value.
    pub fn change(&self, changes: &[Change]) -> Result<(), Error> {
        let path = |change: &Change| self.path().join(&change.file);
        let mut before = Vec::new();
        for change in changes {
            let old = fs::read_to_string(path(change))
                .doing(|| format!("setting {}: reading what it was", change.file))?;
            before.push(old);
        }
        for (number, change) in changes.iter().enumerate() {
            let Err(error) = fs::write(path(change), &change.value) else {
                continue;
            };
            for (made, old) in changes[..number].iter().zip(&before).rev() {
                if let Err(error) = fs::write(path(made), old.trim_end()) {
                    warn!("setting {} back to {}: {error}", made.file, old.trim_end());
                }
            }
            return Err(error).doing(|| format!("setting {} to `{}`", change.file, change.value));
        }
        Ok(())
    }

    /// Puts a program for device rules on it.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn guard(&self, program: &device_rules::Program) -> Result<(), Error> {
        let path = self.path();
        File::open(&path)
            .and_then(|directory| program.attach(directory.as_raw_fd()))
            .doing(|| format!("putting the device rules on cgroup {}", path.display()))
    }

    /// Freezes or thaws every process in it, and waits until they are. What cannot be frozen in time is thawed
    /// again.
    ///
    /// # Errors
    /// When the kernel has no freezer, or `limit` has passed.
    pub async fn freeze(&self, frozen: bool, limit: Duration) -> Result<(), Error> {
        let doing = || {
            let verb = if frozen { "freezing" } else { "thawing" };
            format!("{verb} cgroup {}", self.path().display())
        };
        let file = self.path().join("cgroup.freeze");
        let mut events = EventFile::open(&self.path().join("cgroup.events")).doing(doing)?;
        fs::write(&file, if frozen { "1" } else { "0" }).doing(doing)?;
        let wait = async {
            while events.value("frozen").unwrap_or(0) != u64::from(frozen) {
                events.changed().await?;
            }
            io::Result::Ok(())
        };
        match tokio::time::timeout(limit, wait).await {
            Ok(waited) => waited.doing(doing),
            Err(_) => {
                if frozen {
                    fs::write(&file, "0").doing(doing)?;
                }
                Err(Error::Internal(format!(
                    "{}: not all processes were in {} ms",
                    doing(),
                    limit.as_millis()
                )))
            }
        }
    }

    /// Whether it is frozen, or is being frozen.
    pub fn is_frozen(&self) -> bool {
        self.read("cgroup.freeze")
            .is_some_and(|text| text.trim() == "1")
    }

    /// A watch on the kills for want of memory; nothing if the kernel does not count them.
    pub fn memory_events(&self) -> Option<EventFile> {
        EventFile::open(&self.path().join("memory.events")).ok()
    }

    /// How many of its processes were killed for want of memory so far.
    pub fn memory_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path().join("memory.events")).unwrap_or_default();
        value(&text, "oom_kill").unwrap_or(0)
    }
}

/// The cgroup that holds all containers' cgroups, below the hierarchy's root; made if it is not there.
///
/// # Errors
/// When it could not be made.
pub fn parent(root: &Path) -> Result<PathBuf, Error> {
    let parent = root.join(PARENT);
    match fs::create_dir(&parent) {
        Ok(()) => init::enable_controllers(&parent),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).doing(|| format!("making cgroup {}", parent.display()));
        }
    }
    Ok(parent)
}

/// Microseconds that the containers below `root` were throttled by their CPU limits, together.
pub fn throttled_us(root: &Path) -> u64 {
    let containers = fs::read_dir(root.join(PARENT)).into_iter().flatten();
    containers
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("cpu.stat")).ok())
        .filter_map(|text| value(&text, "throttled_usec"))
        .fold(0, u64::saturating_add)
}

/// Returns when containers may run on the CPUs that are online now. The kernel moves a change of them into the cgroups
/// some time after it; a write to a `cpuset.cpus` waits for that, and an empty one changes nothing where no CPUs were
/// given, as in the parent of all containers. Without that controller or cgroup there is nothing to wait for.
pub fn settle_cpus(root: &Path) {
    let file = root.join(PARENT).join("cpuset.cpus");
    let opened = fs::OpenOptions::new().write(true).open(file);
    if let Err(error) = opened.and_then(|mut file| file.write_all(b"\n"))
        && error.kind() != io::ErrorKind::NotFound
    {
        debug!("waiting for the cgroups' CPUs: {error}");
    }
}

/// Sends a signal by number, the real-time ones too.
///
/// # Errors
/// What the kernel said.
pub fn send(pid: i32, signal: i32) -> io::Result<()> {
    if let Ok(signal) = Signal::try_from(signal) {
        return kill(Pid::from_raw(pid), signal).map_err(io::Error::from);
    }
    // SAFETY: kill takes two numbers and touches no memory.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A file of `key value` lines that the kernel marks when it changes.
pub struct EventFile(AsyncFd<File>);

impl EventFile {
    /// Opens it for watching; needs a runtime.
    ///
    /// # Errors
    /// What the kernel said, also when the file can never be waited for.
    pub fn open(path: &Path) -> io::Result<EventFile> {
        let file = File::open(path)?;
        // SAFETY: the file stays where it is, open, for as long as the registration; it is only borrowed from it.
        let watched = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
        Ok(EventFile(watched))
    }

    /// The value of a key now; reading arms the watch.
    pub fn value(&mut self, key: &str) -> Option<u64> {
        let mut text = [0; 1024];
        let count = self.0.get_ref().read_at(&mut text, 0).ok()?;
        value(std::str::from_utf8(&text[..count]).ok()?, key)
    }

    /// Waits for a change since the value was read.
    ///
    /// # Errors
    /// When the runtime cannot wait for it.
    pub async fn changed(&mut self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

fn value(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
}

/// A directory and all below it, parents first. A container can make cgroups as deep as it likes, so
/// there is no recursion here.
fn subtree(top: &Path) -> Vec<PathBuf> {
    let mut found = vec![top.to_owned()];
    let mut next = 0;
    while next < found.len() {
        if let Ok(entries) = fs::read_dir(&found[next]) {
            let below = entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            found.extend(below.map(|entry| entry.path()).collect::<Vec<_>>());
        }
        next += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> (tempfile::TempDir, Cgroup) {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = Cgroup {
            root: directory.path().into(),
            relative: "nacre/c1".into(),
        };
        fs::create_dir_all(cgroup.path().join("a/b")).unwrap();
        (directory, cgroup)
    }

    #[test]
    fn pids_come_from_the_whole_subtree() {
        let (_directory, cgroup) = tree();
        fs::write(cgroup.path().join("cgroup.procs"), "12\n3\n").unwrap();
        fs::write(cgroup.path().join("a/b/cgroup.procs"), "7\n3\n").unwrap();
        assert_eq!(cgroup.pids(), [3, 7, 12]);
        assert_eq!(cgroup.spec_path(), Path::new("/nacre/c1"));
    }

    #[test]
    fn removal_goes_from_the_leaves_up_and_twice_is_fine() {
        let (_directory, cgroup) = tree();
        cgroup.remove().unwrap();
        assert!(!cgroup.path().exists());
        cgroup.remove().unwrap();
        assert!(cgroup.pids().is_empty());
    }

    #[test]
    fn changes_are_made_together_or_not_at_all() {
        let (_directory, cgroup) = tree();
        let read = |file: &str| cgroup.read(file).unwrap();
        let change = |file: &str, value: &str| Change {
            file: file.into(),
            value: value.into(),
        };
        fs::write(cgroup.path().join("memory.max"), "max\n").unwrap();
        fs::write(cgroup.path().join("pids.max"), "7\n").unwrap();
        let both = [change("memory.max", "5"), change("pids.max", "9")];
        cgroup.change(&both).unwrap();
        assert_eq!(
            (read("memory.max"), read("pids.max")),
            ("5".into(), "9".into())
        );
        // A file that is not there is found out before anything is written.
        let error = cgroup
            .change(&[change("memory.max", "6"), change("no.such", "1")])
            .unwrap_err();
        assert!(error.to_string().contains("no.such"), "{error}");
        assert_eq!(read("memory.max"), "5");
        // One that does not take its value has those before it taken back.
        std::os::unix::fs::symlink("/proc/version", cgroup.path().join("deaf")).unwrap();
        let error = cgroup
            .change(&[change("memory.max", "6"), change("deaf", "1")])
            .unwrap_err();
        assert!(error.to_string().contains("deaf"), "{error}");
        assert_eq!(read("memory.max"), "5");
    }

    #[test]
    fn the_parent_is_made_once_and_its_cpus_are_left_to_all() {
        let root = tempfile::tempdir().unwrap();
        settle_cpus(root.path());
        let made = parent(root.path()).unwrap();
        assert_eq!(parent(root.path()).unwrap(), made);
        settle_cpus(root.path());
        assert!(!made.join("cpuset.cpus").exists(), "no such controller");
        fs::write(made.join("cpuset.cpus"), "").unwrap();
        settle_cpus(root.path());
        let cpus = fs::read_to_string(made.join("cpuset.cpus")).unwrap();
        assert_eq!(cpus.trim(), "");
        let error = parent(&root.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("making cgroup"), "{error}");
    }

    #[test]
    fn throttled_time_is_that_of_all_containers() {
        let (directory, cgroup) = tree();
        assert_eq!(throttled_us(directory.path()), 0);
        fs::write(cgroup.path().join("cpu.stat"), "throttled_usec 5\n").unwrap();
        let other = directory.path().join("nacre/c2");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("cpu.stat"), "usage_usec 9\nthrottled_usec 7\n").unwrap();
        assert_eq!(throttled_us(directory.path()), 12);
    }

    #[test]
    fn values_are_found_by_their_whole_key() {
        let text = "oom 4\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(value(text, "oom_kill"), Some(2));
        assert_eq!(value(text, "kill"), None);
    }
}
