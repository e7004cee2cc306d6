//! What a process holds of the machine, as /proc shows it.

use std::fs;

use anyhow::{Context, Result};

/// A process at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(super) struct Held {
    /// Resident memory, KiB (`smaps_rollup`).
    pub rss_kib: u64,
    /// Of that, what is not a guest's memory, KiB: mappings that are not excluded from core dumps.
    pub own_kib: u64,
    /// Open file descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

impl Held {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// It is gone, or another user's.
    pub fn of(pid: i32) -> Result<Self> {
        let read = |name: &str| {
            let file = format!("/proc/{pid}/{name}");
            fs::read_to_string(&file).with_context(|| format!("reading {file}"))
        };
        let count = |name: &str| -> Result<u64> {
            let folder = format!("/proc/{pid}/{name}");
            let entries = fs::read_dir(&folder).with_context(|| format!("reading {folder}"))?;
            Ok(entries.count() as u64)
        };
        let rollup = read("smaps_rollup")?;
        let rss_kib = rollup
            .lines()
            .find_map(rss)
            .context("smaps_rollup has no Rss")?;
        Ok(Self {
            rss_kib,
            own_kib: own(&read("smaps")?),
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }
}

/// `Rss:  123 kB`.
fn rss(line: &str) -> Option<u64> {
    let kib = line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")?;
    kib.trim().parse().ok()
}

/// Resident KiB of all mappings of an smaps but those that the VMM has marked as the guest's (flag `dd`).
fn own(smaps: &str) -> u64 {
    let mut total = 0;
    let mut current = 0;
    for line in smaps.lines() {
        if let Some(kib) = rss(line) {
            current = kib;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            if !flags.split_whitespace().any(|flag| flag == "dd") {
                total += current;
            }
            current = 0;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_memory_is_told_from_the_shims_own() {
        let smaps = "\
55d0-55d1 r-xp 0 fe:00 1 /bin/x
Size: 8 kB
Rss:                   8 kB
VmFlags: rd ex mr mw me
7f00-7f10 rw-p 0 00:00 0
Rss:               40960 kB
VmFlags: rd wr mr mw me ac nr dd sd
7fff-7fff rw-p 0 00:00 0 [stack]
Rss:                  16 kB
VmFlags: rd wr mr mw me gd ac
";
        assert_eq!(own(smaps), 24);
    }

    #[test]
    fn this_process_holds_something() {
        let held = Held::of(std::process::id() as i32).unwrap();
        assert!(held.own_kib > 0 && held.rss_kib > 0);
        assert!(held.descriptors > 0 && held.threads > 0);
    }
}
