//! Processes of the machine, as /proc shows them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub pid: i32,
    pub parent: i32,
    /// `Z` is a zombie.
    pub state: char,
    /// Ticks after boot; with the pid it names one process for ever.
    pub started: u64,
    pub exe: PathBuf,
    pub arguments: Vec<String>,
    pub cwd: PathBuf,
}

impl Process {
    fn read(pid: i32) -> Option<Process> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        // The name may have anything in it, parentheses too.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let arguments = fs::read(folder.join("cmdline")).ok()?;
        let arguments = arguments
            .split(|&byte| byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .filter(|word| !word.is_empty())
            .collect();
        Some(Process {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            state: fields.first()?.chars().next()?,
            started: fields.get(19)?.parse().ok()?,
            exe: fs::read_link(folder.join("exe")).unwrap_or_default(),
            arguments,
            cwd: fs::read_link(folder.join("cwd")).unwrap_or_default(),
        })
    }

    /// Whether the program is this one, by its file's name or by its first word.
    pub fn is(&self, program: &str) -> bool {
        let name = |path: &std::path::Path| {
            path.file_name().is_some_and(|name| {
                name.as_bytes()
                    .strip_suffix(b" (deleted)")
                    .unwrap_or(name.as_bytes())
                    == program.as_bytes()
            })
        };
        name(&self.exe)
            || self
                .arguments
                .first()
                .is_some_and(|first| name(first.as_ref()))
    }

    /// Whether it was started for this container: by its arguments or its folder.
    pub fn concerns(&self, id: &str) -> bool {
        self.arguments.iter().any(|word| word == id) || self.cwd.file_name() == Some(id.as_ref())
    }

    pub fn describe(&self) -> String {
        let zombie = if self.state == 'Z' { " (zombie)" } else { "" };
        format!("process {}{zombie}: {}", self.pid, self.arguments.join(" "))
    }
}

/// Every process but kernel threads.
pub(crate) fn all() -> Vec<Process> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return found;
    };
    for entry in entries.flatten() {
        if let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
            && let Some(process) = Process::read(pid)
            && !kernel_thread(&process)
        {
            found.push(process);
        }
    }
    found
}

fn kernel_thread(process: &Process) -> bool {
    process.pid == 2 || process.parent == 2
}

/// This process and those that it came from, up to init.
pub(crate) fn ancestors() -> Vec<i32> {
    let parents: BTreeMap<i32, i32> = all()
        .iter()
        .map(|process| (process.pid, process.parent))
        .collect();
    let mut line = vec![std::process::id() as i32];
    while let Some(&parent) = line.last().and_then(|pid| parents.get(pid)) {
        if parent == 0 {
            break;
        }
        line.push(parent);
    }
    line
}

/// The shims of a container.
pub(crate) fn shims(program: &str, id: &str) -> Vec<Process> {
    all()
        .into_iter()
        .filter(|process| process.state != 'Z' && process.is(program) && process.concerns(id))
        .collect()
}

/// Sends a signal; a process that is gone is no fault.
pub(crate) fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// What each thread of a process is doing: its name, state, CPU time in ticks, and where in the kernel it waits.
pub(crate) fn threads(pid: i32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    tasks
        .map(|task| {
            let stat = read(task.path().join("stat"));
            let fields: Vec<&str> = stat
                .rsplit_once(')')
                .map(|(_, rest)| rest.split_whitespace().collect())
                .unwrap_or_default();
            let field = |at: usize| fields.get(at).copied().unwrap_or("?");
            let stack = read(task.path().join("stack"));
            let places: Vec<&str> = stack
                .lines()
                .take(6)
                .filter_map(|line| line.split_whitespace().nth(1))
                .collect();
            format!(
                "{} {} user {} system {} in {}",
                read(task.path().join("comm")).trim(),
                field(0),
                field(11),
                field(12),
                places.join(" < ")
            )
        })
        .collect()
}
