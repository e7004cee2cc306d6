//! How big a VM is at its boot, from the limits in the OCI spec.

use oci_spec::runtime::{LinuxResources, Spec};

use super::{MemoryWay, PlugConfig};
use crate::config::Size;

/// vCPUs and memory at boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootSize {
    /// vCPUs, 1–254.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// The limits that decide about the size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU quota in microseconds a period; 0 or less: none.
    pub quota: Option<i64>,
    /// CPU period in microseconds; absent or 0: the kernel's 100 000.
    pub period: Option<u64>,
    /// CPU list, such as `0-2,5`.
    pub cpuset: Option<String>,
    /// Memory limit in bytes; 0 or less: none.
    pub memory: Option<i64>,
}

impl Limits {
    /// The limits of a spec.
    pub fn of(spec: &Spec) -> Self {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        resources.map(Self::of_resources).unwrap_or_default()
    }

    /// The limits of resources.
    pub fn of_resources(resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().as_ref();
        Self {
            quota: cpu.and_then(|cpu| cpu.quota()),
            period: cpu.and_then(|cpu| cpu.period()),
            cpuset: cpu.and_then(|cpu| cpu.cpus().clone()),
            memory: resources
                .memory()
                .as_ref()
                .and_then(|memory| memory.limit()),
        }
    }

    /// Whole CPUs that they allow: the quota over the period, rounded up, else the cpuset's count. None: no limit.
    pub fn cpus(&self) -> Option<u64> {
        let period = self.period.filter(|period| *period > 0).unwrap_or(100_000);
        let by_quota = self
            .quota
            .and_then(|quota| u64::try_from(quota).ok())
            .filter(|quota| *quota > 0)
            .map(|quota| quota.div_ceil(period));
        by_quota.or_else(|| self.cpuset.as_deref().and_then(cpus_in_list))
    }

    /// As [`Self::cpus`], before it is rounded up: in thousandths of a CPU.
    pub fn cpu_thousandths(&self) -> Option<u64> {
        let period = self.period.filter(|period| *period > 0).unwrap_or(100_000);
        let by_quota = self
            .quota
            .and_then(|quota| u64::try_from(quota).ok())
            .filter(|quota| *quota > 0)
            .map(|quota| {
                let thousandths = (u128::from(quota) * 1000).div_ceil(u128::from(period));
                u64::try_from(thousandths).unwrap_or(u64::MAX)
            });
        by_quota.or_else(|| Some(cpus_in_list(self.cpuset.as_deref()?)?.saturating_mul(1000)))
    }

    /// Takes over what an update sets; a quota or memory limit of 0 or less takes the limit away.
    pub fn update(&mut self, new: Self) {
        self.quota = new.quota.or(self.quota);
        self.period = new.period.or(self.period);
        self.cpuset = new.cpuset.or(self.cpuset.take());
        self.memory = new.memory.or(self.memory);
    }

    /// The memory limit in bytes. None: no limit.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.memory
            .and_then(|bytes| u64::try_from(bytes).ok())
            .filter(|bytes| (1..UNLIMITED).contains(bytes))
    }
}

/// The size that limits ask for on a host of `host_cpus`: vCPUs are the quota over the period, rounded
/// up, else the cpuset's count, else the default, and never more than the host has; memory is the
/// limit plus what the guest needs and at least the minimum, else the default.
pub fn boot_size(limits: &Limits, config: &Size, host_cpus: usize) -> BootSize {
    let wanted = limits.cpus().unwrap_or(u64::from(config.default_vcpus));
    let most = u64::try_from(host_cpus).unwrap_or(u64::MAX).clamp(1, 254);
    let vcpus = u8::try_from(wanted.clamp(1, most)).unwrap_or(254);
    let memory_mib = match limits.memory_bytes() {
        Some(bytes) => {
            (bytes.div_ceil(1 << 20) + config.guest_memory.mib()).max(config.minimum_memory.mib())
        }
        None => config.default_memory.mib(),
    };
    BootSize { vcpus, memory_mib }
}

/// From here on a limit is a way to say "none": cgroup v1 writes 2^63 rounded down to a page.
const UNLIMITED: u64 = 1 << 60;

/// CPUs named by a kernel CPU list; None if it is empty or none.
fn cpus_in_list(list: &str) -> Option<u64> {
    let mut count: u64 = 0;
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        count += u64::from(last.checked_sub(first)?) + 1;
    }
    (count > 0).then_some(count)
}

/// Units of ACPI memory of a VM whose memory comes by nothing else, and of one for whose guest it is the second choice. Each
/// costs the guest's boot a few reads.
const UNITS: (u64, u64) = (128, 16);
/// MiB of the smallest unit of ACPI memory.
const UNIT_MIB: u64 = 128;

/// What is to be announced to the guest at boot for a VM of this size to become as large as `most`; without a balloon, which
/// takes no part in that.
pub fn plug(boot: BootSize, most: BootSize, way: MemoryWay) -> PlugConfig {
    let more = most.memory_mib.saturating_sub(boot.memory_mib);
    let steps = more.div_ceil(UNIT_MIB);
    let limit = match way {
        MemoryWay::Acpi => UNITS.0,
        MemoryWay::Auto => UNITS.1,
        MemoryWay::VirtioMem => 0,
    };
    // The guest's memory blocks are powers of two.
    let per_unit = match limit {
        0 => 0,
        limit => steps.div_ceil(limit).next_power_of_two(),
    };
    PlugConfig {
        max_vcpus: most.vcpus.max(boot.vcpus),
        acpi_units: match per_unit {
            0 => 0,
            per_unit => u8::try_from(steps.div_ceil(per_unit)).unwrap_or(u8::MAX),
        },
        acpi_unit_mib: per_unit * UNIT_MIB,
        virtio_mem_mib: match way {
            MemoryWay::Acpi => 0,
            MemoryWay::Auto | MemoryWay::VirtioMem => steps * UNIT_MIB,
        },
        balloon: false,
    }
}

/// CPUs that this process may use.
pub fn host_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A value of `/proc/meminfo` in MiB, by its name.
pub fn meminfo_mib(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = rest.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / 1024)
}

/// What the host has of memory and swap together, in MiB: the most that a guest could ever fill.
/// None if the kernel does not say.
pub fn host_memory_mib() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    Some(meminfo_mib(&meminfo, "MemTotal")? + meminfo_mib(&meminfo, "SwapTotal").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_by_whole_names() {
        let meminfo = "MemTotal:       2097152 kB\nMemFree:   1024 kB\nSwapTotal:  0 kB\n";
        assert_eq!(meminfo_mib(meminfo, "MemTotal"), Some(2048));
        assert_eq!(meminfo_mib(meminfo, "Mem"), None);
        assert_eq!(meminfo_mib(meminfo, "SwapTotal"), Some(0));
        assert_eq!(meminfo_mib("MemTotal: lots", "MemTotal"), None);
    }

    #[test]
    fn what_may_be_plugged_is_in_units_that_suffice() {
        let size = |vcpus, memory_mib| BootSize { vcpus, memory_mib };
        // way, boot MiB, most MiB → units, MiB each, virtio-mem MiB
        let table = [
            (MemoryWay::Auto, 512, 512, 0, 128, 0),
            (MemoryWay::Auto, 512, 100, 0, 128, 0),
            (MemoryWay::Auto, 512, 513, 1, 128, 128),
            (MemoryWay::Auto, 512, 2560, 16, 128, 2048),
            (MemoryWay::Auto, 512, 2561, 9, 256, 2176),
            (MemoryWay::Auto, 512, 512 + 96 * 1024, 12, 8192, 96 * 1024),
            (MemoryWay::Acpi, 512, 4608, 32, 128, 0),
            (MemoryWay::Acpi, 512, 512 + 96 * 1024, 96, 1024, 0),
            (MemoryWay::VirtioMem, 512, 4608, 0, 0, 4096),
        ];
        for (way, boot, most, units, unit_mib, virtio_mem_mib) in table {
            let plug = plug(size(2, boot), size(1, most), way);
            assert_eq!(
                (
                    plug.max_vcpus,
                    plug.acpi_units,
                    plug.acpi_unit_mib,
                    plug.virtio_mem_mib
                ),
                (2, units, unit_mib, virtio_mem_mib),
                "{way:?} {boot} {most}"
            );
        }
    }

    #[test]
    fn sizes_by_limits() {
        let mib = |count: i64| Some(count << 20);
        let table = [
            // quota, period, cpuset, memory, host CPUs → vCPUs, MiB
            (None, None, None, None, 8, 1, 512),
            (Some(150_000), Some(100_000), None, None, 8, 2, 512),
            (Some(100_000), None, None, None, 8, 1, 512),
            (Some(50_000), Some(100_000), None, None, 8, 1, 512),
            (Some(1_600_000), Some(100_000), None, None, 8, 8, 512),
            (Some(-1), Some(100_000), Some("0-2"), None, 8, 3, 512),
            (Some(0), Some(0), Some("1,3-4"), None, 8, 3, 512),
            (Some(200_000), Some(100_000), Some("0"), None, 8, 2, 512),
            (None, None, Some("garbage"), None, 8, 1, 512),
            (None, None, Some("4-1"), None, 8, 1, 512),
            (None, None, None, mib(64), 8, 1, 256),
            (None, None, None, mib(1024), 8, 1, 1152),
            (None, None, None, Some((1 << 30) + 1), 8, 1, 1153),
            (None, None, None, Some(-1), 8, 1, 512),
            (None, None, None, Some(0x7fff_ffff_ffff_f000), 8, 1, 512),
            (Some(i64::MAX), Some(1), None, None, 1000, 254, 512),
            (None, None, None, None, 0, 1, 512),
        ];
        for (quota, period, cpuset, memory, host, vcpus, memory_mib) in table {
            let limits = Limits {
                quota,
                period,
                cpuset: cpuset.map(str::to_owned),
                memory,
            };
            let size = boot_size(&limits, &Size::default(), host);
            assert_eq!(
                size,
                BootSize { vcpus, memory_mib },
                "{limits:?} on {host} CPUs"
            );
        }
    }
}
