//! Removal of cgroups, by whoever cleans up: the shim itself, which is still in its own, or a program after its death.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

/// How long processes that die may take to leave.
const LEAVES: Duration = Duration::from_millis(50);
/// How often it is looked whether they have.
const LOOKS: u32 = 20;

/// Removes a VM's cgroup; what is still in it is moved to the outermost one above that takes it. True if there was one.
///
/// # Errors
/// Something stays in it for a second, or the kernel refuses.
pub fn remove(directory: &Path) -> io::Result<bool> {
    let mut turn = 0;
    loop {
        match std::fs::remove_dir(directory) {
            Ok(()) => return Ok(true),
            Err(error) if absent(&error) => return Ok(false),
            Err(error) if is_busy(&error) && turn < LOOKS => {}
            Err(error) => return Err(error),
        }
        move_out(directory);
        // What has been moved is gone at once; what dies takes its time.
        if turn > 0 {
            std::thread::sleep(LEAVES);
        }
        turn += 1;
    }
}

/// Removes a cgroup that was made on the way to a VM's, unless others use it by now. True if it went.
///
/// # Errors
/// The kernel refuses for another reason.
pub fn remove_if_empty(directory: &Path) -> io::Result<bool> {
    match std::fs::remove_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if absent(&error) || is_busy(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn is_busy(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    errno == Some(Errno::EBUSY as i32) || errno == Some(Errno::ENOTEMPTY as i32)
}

/// Moves all processes of a cgroup to the outermost above that takes them: the root does, unless it is a part of a tree that
/// passes on controllers. Not to the parent, which may have been made for this one and is removed next.
fn move_out(directory: &Path) {
    let mut above: Vec<PathBuf> = directory
        .ancestors()
        .skip(1)
        .map(|parent| parent.join("cgroup.procs"))
        // Up to the mount point.
        .take_while(|procs| procs.exists())
        .collect();
    above.reverse();
    let pids = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines() {
        // One that none takes keeps the cgroup, which the removal says.
        let _ = above.iter().any(|procs| std::fs::write(procs, pid).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_removed_and_what_is_used_stays_for_others() {
        let root = tempfile::tempdir().unwrap();
        let parent = root.path().join("parent");
        let cgroup = parent.join("vm");
        std::fs::create_dir_all(&cgroup).unwrap();
        assert!(!remove_if_empty(&parent).unwrap());
        assert!(remove(&cgroup).unwrap());
        assert!(!remove(&cgroup).unwrap());
        assert!(remove_if_empty(&parent).unwrap());
        assert!(!remove_if_empty(&parent).unwrap());
    }

    #[test]
    fn processes_go_to_the_outermost_that_takes_them() {
        let root = tempfile::tempdir().unwrap();
        let (outer, parent) = (root.path().join("o"), root.path().join("o/p"));
        let cgroup = parent.join("vm");
        std::fs::create_dir_all(&cgroup).unwrap();
        let procs = |directory: &Path| directory.join("cgroup.procs");
        // A directory in its place takes nothing.
        std::fs::create_dir(procs(root.path())).unwrap();
        for directory in [&outer, &parent] {
            std::fs::write(procs(directory), "").unwrap();
        }
        std::fs::write(procs(&cgroup), "42\n").unwrap();
        move_out(&cgroup);
        let read = |directory: &Path| std::fs::read_to_string(procs(directory)).unwrap();
        assert_eq!((read(&outer), read(&parent)), ("42".into(), String::new()));
    }
}
