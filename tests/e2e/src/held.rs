//! What the process of a VM holds on the host: threads, open files, guest memory, vCPUs, and its own memory beside the guest's.
//!
//! KVM does not tell how many memory slots a VM has, in debugfs neither. Each slot has a mapping of the VMM's while it is there,
//! so these are what is counted, in KiB, since the kernel joins neighbours.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::poll;

/// What has to be the same again after something came and went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Threads by name.
    threads: BTreeMap<String, usize>,
    /// Those of them that bear the process's name: the runtime's, which come with calls and go some seconds later.
    runtime: usize,
    /// Open files by what they are.
    files: BTreeMap<String, usize>,
    /// KiB of mappings that are guest memory: alone without reservation (nr) and out of core dumps (dd).
    guest_kib: u64,
    /// Mappings of vCPUs' shared pages.
    vcpus: usize,
}

/// Resident memory of the process, KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Resident {
    /// Of guest memory.
    pub guest: u64,
    /// All else.
    pub own: u64,
}

impl Held {
    /// What it holds now.
    pub fn by(pid: u32) -> Result<Self> {
        let (held, _) = look(pid)?;
        Ok(held)
    }

    fn is_same(&self, before: &Self) -> bool {
        const CALLS: usize = 3;
        let count = |held: &Self| Self {
            runtime: 0,
            ..held.clone()
        };
        count(self) == count(before) && self.runtime <= before.runtime + CALLS
    }

    /// Waits until the process holds just this again; an error names the difference.
    pub fn again(&self, pid: u32, limit: Duration) -> Result<()> {
        let mut last = Held::default();
        let same = poll::until("the process holds what it held before", limit, || {
            last = Held::by(pid)?;
            Ok(last.is_same(self).then_some(()))
        });
        same.with_context(|| format!("before {self:?}, now {last:?}"))
    }
}

impl Resident {
    /// Of this process now.
    pub fn of(pid: u32) -> Result<Self> {
        let (_, resident) = look(pid)?;
        Ok(resident)
    }

    /// All of it, as the kernel sums it up in `smaps_rollup`.
    pub fn rollup(pid: u32) -> Result<u64> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        match text.lines().find_map(|line| kib(line, "Rss:")) {
            Some(kib) => Ok(kib),
            None => bail!("{path} has no Rss: {text:?}"),
        }
    }
}

fn kib(line: &str, name: &str) -> Option<u64> {
    line.strip_prefix(name)?
        .trim()
        .strip_suffix(" kB")?
        .parse()
        .ok()
}

fn look(pid: u32) -> Result<(Held, Resident)> {
    let mut held = Held::default();
    let own = fs::read_to_string(format!("/proc/{pid}/comm"))?;
    for name in names(&format!("/proc/{pid}/task"), |path| {
        fs::read_to_string(path.join("comm")).ok()
    })? {
        if name == own {
            held.runtime += 1;
        } else {
            *held.threads.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    for target in names(&format!("/proc/{pid}/fd"), |path| {
        let target = fs::read_link(path).ok()?;
        // Descriptors that are no more than places are of what the guest's kernel knows of shared files, which it forgets
        // as it likes.
        let info = path.to_string_lossy().replace("/fd/", "/fdinfo/");
        let info = fs::read_to_string(info).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = u32::from_str_radix(flags.trim(), 8).ok()?;
        let place = flags & libc::O_PATH.unsigned_abs() != 0;
        (!place).then(|| target.to_string_lossy().into_owned())
    })? {
        // The numbers of sockets and pipes differ from one to the next.
        let kind = target.split(":[").next().unwrap_or_default();
        *held.files.entry(kind.to_owned()).or_default() += 1;
    }
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let resident = mappings(&smaps, &mut held);
    Ok((held, resident))
}

fn names(folder: &str, read: impl Fn(&std::path::Path) -> Option<String>) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {folder}"))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| read(&entry.path()))
        .collect())
}

fn mappings(smaps: &str, held: &mut Held) -> Resident {
    let mut resident = Resident::default();
    let (mut size, mut rss) = (0, 0);
    for line in smaps.lines() {
        if line.contains("kvm-vcpu") {
            held.vcpus += 1;
        } else if let Some(kib) = kib(line, "Size:") {
            size = kib;
        } else if let Some(kib) = kib(line, "Rss:") {
            rss = kib;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |wanted| flags.split_whitespace().any(|flag| flag == wanted);
            if has("dd") && has("nr") {
                held.guest_kib += size;
                resident.guest += rss;
            } else {
                resident.own += rss;
            }
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let smaps = "\
7f0000000000-7f0020000000 rw-p 00000000 00:00 0
Size:             524288 kB
Rss:               65536 kB
VmFlags: rd wr mr mw me nr dd hg
7f0030000000-7f0030003000 rw-s 00000000 00:0e 1045 anon_inode:kvm-vcpu:0
Size:                 12 kB
Rss:                   4 kB
VmFlags: rd wr sh mr mw me ms dd
7f0040000000-7f0044000000 ---p 00000000 00:00 0
Size:              65536 kB
Rss:                   8 kB
VmFlags: mr mw me nr
";
        let mut held = Held::default();
        let resident = mappings(smaps, &mut held);
        assert_eq!((held.guest_kib, held.vcpus), (524_288, 1));
        assert_eq!((resident.guest, resident.own), (65_536, 12));
        assert_eq!(kib("Rss: 7 kB", "Rss:"), Some(7));
        assert_eq!(kib("Rss: many", "Rss:"), None);
    }

    #[test]
    fn a_process_holds_itself() {
        let pid = std::process::id();
        let held = Held::by(pid).unwrap();
        let threads = held.runtime + held.threads.values().sum::<usize>();
        assert!(threads > 0 && !held.files.is_empty());
        assert!(held.is_same(&held));
        let more = Held {
            guest_kib: held.guest_kib + 4,
            ..held.clone()
        };
        let calls = Held {
            runtime: held.runtime + 4,
            ..held.clone()
        };
        assert!(!more.is_same(&held) && !calls.is_same(&held));
        let resident = Resident::of(pid).unwrap();
        assert!(resident.own > 0 && Resident::rollup(pid).unwrap() > 0);
    }
}
