//! What a case leaves behind: the machine before it and after it, compared.
//!
//! On a machine of our own everything counts. On one that others use too, only
//! what can be ours: shims, vmctl, and what lies below our folders.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::context::{Daemon, Programs};
use crate::processes::{self, Process};

/// Folders in which nothing may be left.
const FOLDERS: [&str; 5] = [
    "/run/nacre",
    "/run/containerd",
    "/run/netns",
    "/run/runc",
    "/var/lib/nacre",
];

/// Folders that are made once and stay.
const KEPT: [&str; 7] = [
    "/run/nacre",
    "/run/nacre/s",
    "/run/nacre/vms",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/var/lib/nacre",
];

/// The machine at one moment.
#[derive(Debug)]
pub(crate) struct Snapshot {
    processes: BTreeMap<(i32, u64), Process>,
    /// Mount points with their file system, by mount id.
    mounts: BTreeMap<String, String>,
    files: BTreeMap<PathBuf, ()>,
    interfaces: Vec<String>,
    /// Files that the daemon holds open.
    daemon_fds: Vec<String>,
}

impl Snapshot {
    pub fn take(programs: &Programs, daemon: Option<&Daemon>) -> Self {
        let own = processes::ancestors();
        let ours = |process: &Process| {
            programs.alone
                || process.is("vmctl")
                || process.exe.to_string_lossy().contains("containerd-shim-")
                || process
                    .arguments
                    .iter()
                    .any(|word| word.contains("containerd-shim-"))
        };
        let processes = processes::all()
            .into_iter()
            .filter(|process| !own.contains(&process.pid) && ours(process))
            .map(|process| ((process.pid, process.started), process))
            .collect();
        let mut files = BTreeMap::new();
        for folder in FOLDERS {
            collect(Path::new(folder), &mut files);
        }
        if let Some(daemon) = daemon {
            collect(&daemon.state, &mut files);
            // The tasks' own folders and the snapshots; not the content, which a database describes.
            for below in [
                "io.containerd.runtime.v2.task",
                "io.containerd.snapshotter.v1.overlayfs/snapshots",
            ] {
                shallow(&daemon.root.join(below), 2, &mut files);
            }
        }
        if programs.alone {
            shallow(Path::new("/tmp"), 1, &mut files);
            shallow(Path::new("/var/tmp"), 1, &mut files);
            folders(Path::new("/sys/fs/cgroup"), &mut files);
        }
        Snapshot {
            processes,
            mounts: mounts(programs.alone),
            files,
            interfaces: names("/sys/class/net"),
            daemon_fds: daemon
                .map(|daemon| open_files(daemon.pid))
                .unwrap_or_default(),
        }
    }

    /// What is in `self` and was not in `before`, one line each.
    pub fn since(&self, before: &Snapshot) -> Vec<String> {
        let mut left = Vec::new();
        for (key, process) in &self.processes {
            if !before.processes.contains_key(key) {
                left.push(process.describe());
            }
        }
        for (id, mount) in &self.mounts {
            if !before.mounts.contains_key(id) {
                left.push(format!("mount {mount}"));
            }
        }
        for file in self.files.keys() {
            if !before.files.contains_key(file) {
                left.push(format!("file {}", file.display()));
            }
        }
        for interface in &self.interfaces {
            if !before.interfaces.contains(interface) {
                left.push(format!("network interface {interface}"));
            }
        }
        if self.daemon_fds.len() > before.daemon_fds.len() {
            let mut more = self.daemon_fds.clone();
            for file in &before.daemon_fds {
                if let Some(at) = more.iter().position(|other| other == file) {
                    more.remove(at);
                }
            }
            left.push(format!(
                "{} more open files in containerd (among {})",
                self.daemon_fds.len() - before.daemon_fds.len(),
                more.join(", ")
            ));
        }
        left
    }
}

/// What is left after things have had `limit` to end.
pub(crate) fn left_after(
    programs: &Programs,
    daemon: Option<&Daemon>,
    before: &Snapshot,
    limit: Duration,
) -> Vec<String> {
    let deadline = Instant::now() + limit;
    loop {
        let left = Snapshot::take(programs, daemon).since(before);
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Ends and removes what a failed case left, so that the next one begins with a clean machine.
pub(crate) fn sweep(programs: &Programs, daemon: Option<&Daemon>, before: &Snapshot) {
    let now = Snapshot::take(programs, daemon);
    for (key, process) in &now.processes {
        if !before.processes.contains_key(key) {
            processes::signal(process.pid, Signal::SIGKILL);
        }
    }
    // The deepest first.
    let mut mounts: Vec<&str> = now
        .mounts
        .iter()
        .filter(|(id, _)| !before.mounts.contains_key(*id))
        .filter_map(|(_, mount)| mount.split(' ').next())
        .collect();
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.len()));
    for mount in mounts {
        let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
    }
    let mut files: Vec<&PathBuf> = now
        .files
        .keys()
        .filter(|file| !before.files.contains_key(*file))
        .collect();
    files.reverse();
    for file in files {
        if fs::remove_file(file).is_err() {
            let _ = fs::remove_dir(file);
        }
    }
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Mount point, source and type, by mount id.
fn mounts(all: bool) -> BTreeMap<String, String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let left: Vec<&str> = left.split(' ').collect();
        let (Some(id), Some(point)) = (left.first(), left.get(4)) else {
            continue;
        };
        if all
            || ["nacre", "containerd"]
                .iter()
                .any(|word| point.contains(word))
        {
            found.insert((*id).to_owned(), format!("{point} {right}"));
        }
    }
    found
}

/// Everything below a folder.
fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, ()>) {
    shallow(folder, 64, files);
}

fn shallow(folder: &Path, depth: u32, files: &mut BTreeMap<PathBuf, ()>) {
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // A container's root has its own mounts; what matters is that it is there.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != "rootfs" {
            shallow(&entry.path(), depth - 1, files);
        }
        if !KEPT.iter().any(|kept| entry.path() == Path::new(kept)) {
            files.insert(entry.path(), ());
        }
    }
}

/// Only folders: the files of a cgroup come with it.
fn folders(folder: &Path, files: &mut BTreeMap<PathBuf, ()>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            folders(&entry.path(), files);
            files.insert(entry.path(), ());
        }
    }
}

/// What a process has open, without the numbers that differ from one opening to the next.
fn open_files(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let mut files: Vec<String> = entries
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| {
            target
                .to_string_lossy()
                .split(":[")
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    files.sort();
    files
}
