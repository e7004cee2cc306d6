//! What a VM costs on the host, as the process that holds it reads of itself:
//! its memory, and the CPU time of its vCPU threads and of all the rest.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::{Inspection, Memory};
use crate::sandbox::clock::ClockReading;
use crate::sandbox::monotonic_ns;

/// How the names of vCPU threads begin.
const VCPU_THREAD: &str = "vcpu";

/// What a VM costs. What the host's kernel does not tell is 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Sandbox id.
    pub id: String,
    /// containerd namespace, or `vmctl`.
    pub namespace: String,
    /// Host process that holds the VM.
    pub pid: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// Most vCPUs that there may be.
    pub max_vcpus: u32,
    /// Guest memory in MiB, all together: the most that it can use now.
    pub memory_mib: u64,
    /// Its parts.
    pub memory: Memory,
    /// What the guest's kernel says that it uses of it, in MiB; `None` if it did not say so at once.
    pub used_mib: Option<u64>,
    /// Host memory that the process has, KiB: guest memory that was touched, and the VMM's own.
    pub rss_kib: u64,
    /// The same, with what it shares with other processes divided by their number.
    pub pss_kib: u64,
    /// CPU time of the vCPU threads, guest's and KVM's, milliseconds in the kernel's ticks (10 ms).
    pub vcpu_cpu_ms: u64,
    /// CPU time of the process's other threads: devices, streams, calls.
    pub other_cpu_ms: u64,
    /// vCPU exits to the VMM by reason.
    pub exits: BTreeMap<String, u64>,
    /// Ejects of vCPUs and units of ACPI memory that nobody had asked the guest for.
    pub unasked_ejects: u64,
    /// Since the VM was asked for, milliseconds.
    pub uptime_ms: u64,
    /// How far the guest's wall clock is from the host's; `None` if it did not say so at once.
    pub clock: Option<ClockReading>,
    /// Containers.
    pub containers: Vec<String>,
}

impl Usage {
    /// Reads what this process, which holds the VM, costs. Looks at every page of it: to be called where waiting a few
    /// milliseconds is allowed.
    pub fn of_this_process(
        vm: Inspection,
        used_mib: Option<u64>,
        clock: Option<ClockReading>,
    ) -> Self {
        let readings = Readings::take(Path::new("/proc/self"));
        let uptime_ms = match vm.phases.start_ns {
            0 => 0,
            start_ns => monotonic_ns().saturating_sub(start_ns) / 1_000_000,
        };
        Self {
            id: vm.id,
            namespace: vm.namespace,
            pid: vm.pid,
            vcpus: vm.vcpus,
            max_vcpus: vm.max_vcpus,
            memory_mib: vm.memory_mib,
            memory: vm.memory,
            used_mib,
            rss_kib: readings.rss_kib,
            pss_kib: readings.pss_kib,
            vcpu_cpu_ms: readings.vcpu_cpu_ms,
            other_cpu_ms: readings.other_cpu_ms,
            exits: vm.exits,
            unasked_ejects: vm.unasked_ejects,
            uptime_ms,
            clock,
            containers: vm.containers,
        }
    }
}

/// What `/proc/PID` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Readings {
    rss_kib: u64,
    pss_kib: u64,
    vcpu_cpu_ms: u64,
    other_cpu_ms: u64,
}

impl Readings {
    fn take(process: &Path) -> Self {
        let read = |name: &str| std::fs::read_to_string(process.join(name)).unwrap_or_default();
        let memory = read("smaps_rollup");
        let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
            .ok()
            .flatten()
            .and_then(|ticks| u64::try_from(ticks).ok())
            .unwrap_or(100)
            .max(1);
        // Threads that have ended are in the whole only.
        let whole = cpu_ticks(&read("stat")).unwrap_or(0);
        let vcpus: u64 = std::fs::read_dir(process.join("task"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok())
            .filter(|stat| thread_name(stat).is_some_and(|name| name.starts_with(VCPU_THREAD)))
            .filter_map(|stat| cpu_ticks(&stat))
            .sum();
        let in_ms = |ticks: u64| ticks.saturating_mul(1000) / per_second;
        Self {
            rss_kib: kib(&memory, "Rss"),
            pss_kib: kib(&memory, "Pss"),
            vcpu_cpu_ms: in_ms(vcpus),
            other_cpu_ms: in_ms(whole.saturating_sub(vcpus)),
        }
    }
}

/// A figure of `smaps_rollup` by its name.
fn kib(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
        .unwrap_or(0)
}

/// The name in a `stat` file: what is between its first and last parenthesis.
fn thread_name(stat: &str) -> Option<&str> {
    let (_, rest) = stat.split_once('(')?;
    rest.rsplit_once(')').map(|(name, _)| name)
}

/// User and system time of a `stat` file, fields 14 and 15.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system) = (fields.next()?, fields.next()?);
    Some(user.parse::<u64>().ok()? + system.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(name: &str, user: u64, system: u64) -> String {
        format!("7 ({name}) S 1 2 3 4 5 6 7 8 9 10 {user} {system} 0 0 20 0\n")
    }

    #[test]
    fn vcpu_threads_are_told_from_the_others_by_their_names() {
        let process = tempfile::tempdir().unwrap();
        let root = process.path();
        std::fs::write(root.join("stat"), stat("shim) R (x", 100, 50)).unwrap();
        std::fs::write(
            root.join("smaps_rollup"),
            "5581-7ffc ---p 00000000 00:00 0  [rollup]\nRss:   2048 kB\nPss:   1024 kB\nPss_Dirty:  7 kB\n",
        )
        .unwrap();
        for (tid, name, user) in [(7, "shim", 1), (8, "vcpu0:c1", 60), (9, "vcpu1:c1", 20)] {
            let thread = root.join("task").join(tid.to_string());
            std::fs::create_dir_all(&thread).unwrap();
            std::fs::write(thread.join("stat"), stat(name, user, 5)).unwrap();
        }
        let readings = Readings::take(root);
        assert_eq!((readings.rss_kib, readings.pss_kib), (2048, 1024));
        // In the usual ticks: 150 in all, 90 of them the vCPUs'.
        assert_eq!((readings.vcpu_cpu_ms, readings.other_cpu_ms), (900, 600));
        assert_eq!(Readings::take(Path::new("/nowhere")), Readings::default());
    }

    #[test]
    fn this_process_costs_something() {
        let usage = Usage::of_this_process(Inspection::default(), None, None);
        assert!(usage.rss_kib > 0 && usage.pss_kib > 0, "{usage:?}");
        assert!(usage.pss_kib <= usage.rss_kib, "{usage:?}");
        assert_eq!((usage.vcpu_cpu_ms, usage.uptime_ms), (0, 0));
    }
}
