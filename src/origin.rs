//! Where this process came from, before it took its place with a VM: mount and
//! network namespace, and cgroups. Programs that it runs for the host – loggers
//! and hooks – run there. A process that never left has nowhere to go back to.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use nacre_net::Netns;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;

/// Mount and network namespace.
static NAMESPACES: OnceLock<[(File, CloneFlags); 2]> = OnceLock::new();
/// `cgroup.procs`, one a hierarchy.
static CGROUPS: OnceLock<Vec<CString>> = OnceLock::new();

/// Takes note of the namespaces that this process is about to leave. The first time counts.
///
/// # Errors
/// /proc does not show them.
pub fn leaving_namespaces() -> io::Result<()> {
    let mounts = File::open("/proc/self/ns/mnt")?;
    let network = File::open("/proc/self/ns/net")?;
    let namespaces = [
        (network, CloneFlags::CLONE_NEWNET),
        (mounts, CloneFlags::CLONE_NEWNS),
    ];
    let _ = NAMESPACES.set(namespaces);
    Ok(())
}

/// The network namespace that this process came from; its own, if it never left.
///
/// # Errors
/// As [`Netns::open`].
pub fn network() -> Result<Netns, nacre_net::Error> {
    let came_from = NAMESPACES.get().into_iter().flatten();
    let mut network = came_from.filter(|(_, kind)| *kind == CloneFlags::CLONE_NEWNET);
    match network.next().and_then(|(file, _)| file.try_clone().ok()) {
        Some(file) => Netns::from_fd(file.into()),
        None => Netns::open("/proc/self/ns/net"),
    }
}

/// Takes note of the cgroups, one a hierarchy, that this process is about to leave. The first time counts.
pub fn leaving_cgroups(directories: &[PathBuf]) {
    let procs = |directory: &PathBuf| {
        let path = directory.join("cgroup.procs");
        // From /proc, which has no NUL in it.
        CString::new(path.as_os_str().as_bytes()).ok()
    };
    let _ = CGROUPS.set(directories.iter().filter_map(procs).collect());
}

/// Puts a child back, between its fork and the program that it executes: makes system calls only. Its working directory
/// is the root then. A cgroup that does not take it leaves it in the VM's, which it is moved out of at the VM's end.
///
/// # Errors
/// A namespace that cannot be entered.
pub fn go_back() -> io::Result<()> {
    // While the VM's mount namespace still shows the cgroups as they were found.
    for procs in CGROUPS.get().into_iter().flatten() {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        if let Ok(file) = open(procs.as_c_str(), flags, Mode::empty()) {
            let _ = nix::unistd::write(&file, b"0");
        }
    }
    for (namespace, kind) in NAMESPACES.get().into_iter().flatten() {
        setns(namespace, *kind)?;
    }
    Ok(())
}
