//! Boot phases: when the VM, the guest's kernel and its agent came how far.

use serde::{Deserialize, Serialize};

/// What the VMM stamps, host CLOCK_MONOTONIC in nanoseconds.
#[derive(Debug, Clone, Default)]
pub(crate) struct MachinePhases {
    pub start_ns: u64,
    pub kvm_ns: Option<u64>,
    pub loaded_ns: Option<u64>,
    pub first_run_ns: Option<u64>,
    pub first_exit_ns: Option<u64>,
    pub marks: Vec<(u8, u64)>,
}

/// Phases of a boot, host CLOCK_MONOTONIC in nanoseconds; absent if not reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootPhases {
    /// The process that became the VMM was started (kernel's start time of the process, in ticks of 10 ms).
    pub process_ns: Option<u64>,
    /// `main` of that process began.
    pub main_ns: Option<u64>,
    /// The VMM was asked for the VM.
    pub start_ns: u64,
    /// KVM's VM exists.
    pub kvm_ns: Option<u64>,
    /// Kernel and initrd are in guest memory.
    pub loaded_ns: Option<u64>,
    /// The first KVM_RUN.
    pub first_run_ns: Option<u64>,
    /// The guest's first access to a device of the VMM: the first sign of its kernel.
    #[serde(default)]
    pub first_exit_ns: Option<u64>,
    /// The guest's init began.
    pub init_ns: Option<u64>,
    /// The agent's connection for calls was accepted.
    pub connected_ns: Option<u64>,
    /// The agent said that it is ready.
    pub ready_ns: Option<u64>,
    /// Guest CLOCK_BOOTTIME in microseconds when init began, by the agent's word.
    pub guest_init_us: Option<u64>,
    /// Guest CLOCK_BOOTTIME in microseconds when the boot modules were loaded, by the agent's word.
    pub guest_modules_us: Option<u64>,
    /// Guest CLOCK_BOOTTIME in microseconds when the agent said that it is ready.
    pub guest_ready_us: Option<u64>,
}

impl BootPhases {
    /// Host phases that were reached, by name, in nanoseconds of CLOCK_MONOTONIC and in order of time.
    pub fn reached(&self) -> Vec<(&'static str, u64)> {
        let mut phases: Vec<(&'static str, u64)> = [
            ("process start", self.process_ns),
            ("main", self.main_ns),
            (
                "VM asked for",
                (self.start_ns != 0).then_some(self.start_ns),
            ),
            ("KVM VM made", self.kvm_ns),
            ("kernel loaded", self.loaded_ns),
            ("first vCPU run", self.first_run_ns),
            ("guest kernel", self.first_exit_ns),
            ("guest init", self.init_ns),
            ("agent connected", self.connected_ns),
            ("agent ready", self.ready_ns),
        ]
        .into_iter()
        .filter_map(|(name, ns)| Some((name, ns?)))
        .collect();
        phases.sort_by_key(|(_, ns)| *ns);
        phases
    }
}

/// CLOCK_MONOTONIC now, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
        .unwrap_or(0)
}

/// When this process was started, by the kernel's word (`/proc/self/stat`, in ticks of 10 ms), in
/// nanoseconds of CLOCK_MONOTONIC. None where it cannot be known (the machine was suspended since its boot).
pub fn process_start_ns() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let ticks = start_ticks(&stat)?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()?? as u64;
    let since_boot = ticks.checked_mul(1_000_000_000)? / per_second;
    let boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).ok()?;
    let boot_ns = boot.tv_sec() as u64 * 1_000_000_000 + boot.tv_nsec() as u64;
    // The field counts from boot with suspended time; the two clocks differ by just that.
    let suspended = boot_ns.saturating_sub(monotonic_ns());
    since_boot.checked_sub(suspended)
}

fn start_ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything; fields are counted after the last ')'. starttime is field 22.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_ticks_skips_a_name_with_parentheses() {
        let stat = "42 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20";
        assert_eq!(start_ticks(stat), Some(777));
        assert_eq!(start_ticks("nonsense"), None);
    }

    #[test]
    fn reached_leaves_out_what_is_missing_and_sorts() {
        let phases = BootPhases {
            start_ns: 5,
            kvm_ns: Some(9),
            main_ns: Some(2),
            ..Default::default()
        };
        assert_eq!(
            phases.reached(),
            vec![("main", 2), ("VM asked for", 5), ("KVM VM made", 9)]
        );
    }
}
