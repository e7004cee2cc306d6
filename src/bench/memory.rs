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
            .find_map(|line| kib(line, RSS))
            .context("smaps_rollup has no Rss")?;
        Ok(Self {
            rss_kib,
            own_kib: parts(&read("smaps")?, RSS).own_kib,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }
}

const RSS: &str = "Rss:";

/// `Rss:  123 kB`.
fn kib(line: &str, field: &str) -> Option<u64> {
    let kib = line.strip_prefix(field)?.trim().strip_suffix(" kB")?;
    kib.trim().parse().ok()
}

/// KiB of all mappings of an smaps, of the field with this name: of those that the VMM has marked as the guest's (flag `dd`), and of all
/// others.
fn parts(smaps: &str, field: &str) -> Parts {
    let mut total = Parts::default();
    let mut current = 0;
    for line in smaps.lines() {
        if let Some(kib) = kib(line, field) {
            current = kib;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            match flags.split_whitespace().any(|flag| flag == "dd") {
                true => total.guest_kib += current,
                false => total.own_kib += current,
            }
            current = 0;
        }
    }
    total
}

/// Memory of a process, that of its guest apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Parts {
    /// Its own, KiB.
    pub own_kib: u64,
    /// Its guest's, KiB.
    pub guest_kib: u64,
}

/// What a process holds of memory, a page that several have divided among them (PSS).
///
/// # Errors
/// It is gone, or another user's.
pub(super) fn proportional(pid: i32) -> Result<Parts> {
    let file = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    Ok(parts(&smaps, "Pss:"))
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
Pss:                   3 kB
Pss_Dirty:             1 kB
VmFlags: rd ex mr mw me
7f00-7f10 rw-p 0 00:00 0
Rss:               40960 kB
Pss:               40000 kB
VmFlags: rd wr mr mw me ac nr dd sd
7fff-7fff rw-p 0 00:00 0 [stack]
Rss:                  16 kB
VmFlags: rd wr mr mw me gd ac
";
        let of = |own_kib, guest_kib| Parts { own_kib, guest_kib };
        assert_eq!(parts(smaps, RSS), of(24, 40960));
        assert_eq!(parts(smaps, "Pss:"), of(3, 40000));
    }

    #[test]
    fn this_process_holds_something() {
        let held = Held::of(std::process::id() as i32).unwrap();
        assert!(held.own_kib > 0 && held.rss_kib > 0);
        let parts = proportional(std::process::id() as i32).unwrap();
        assert!(0 < parts.own_kib && parts.own_kib <= held.rss_kib);
        assert!(held.descriptors > 0 && held.threads > 0);
    }
}
