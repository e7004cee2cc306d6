//! How small and how big a VM may be: never below its boot size, up to the
//! limits of its containers, or up to what the configuration and the host let
//! a VM without limits have.

use nacre_vmm::config::{MAXIMUM_MEMORY_MIB, MAXIMUM_VCPUS};

use crate::config::Size;
use crate::sandbox::size::{self, BootSize, Limits};

/// Bounds of a count of vCPUs, or of memory in MiB: `boot <= floor <= ceiling`, always.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds<T> {
    boot: T,
    floor: T,
    ceiling: T,
}

impl<T: Copy + Ord> Bounds<T> {
    /// From the size at boot, which is the floor, up to `ceiling`, or no further than `boot` if that is less.
    pub fn new(boot: T, ceiling: T) -> Self {
        Self {
            boot,
            floor: boot,
            ceiling: ceiling.max(boot),
        }
    }

    /// The same with another floor or ceiling. Where they contradict each other, the ceiling wins over the floor, and
    /// the boot size over both, since what a VM has booted with cannot be taken from it.
    #[must_use]
    pub fn moved(self, floor: Option<T>, ceiling: Option<T>) -> Self {
        let ceiling = ceiling.unwrap_or(self.ceiling).max(self.boot);
        let floor = floor.unwrap_or(self.floor).clamp(self.boot, ceiling);
        Self {
            boot: self.boot,
            floor,
            ceiling,
        }
    }

    /// What the VM has booted with.
    pub fn boot(&self) -> T {
        self.boot
    }

    /// The least.
    pub fn floor(&self) -> T {
        self.floor
    }

    /// The most.
    pub fn ceiling(&self) -> T {
        self.ceiling
    }

    /// The nearest size within.
    pub fn clamp(&self, size: T) -> T {
        size.clamp(self.floor, self.ceiling)
    }

    /// Whether `size` is within.
    pub fn hold(&self, size: T) -> bool {
        (self.floor..=self.ceiling).contains(&size)
    }

    /// Whether nothing but `size` is within.
    pub fn pin(&self, size: T) -> bool {
        self.floor == size && self.ceiling == size
    }
}

/// Most vCPUs that a VM has without a limit and without configuration: a guest keeps about a quarter of a MiB for each that
/// may come.
const UNASKED: u8 = 32;

/// What the host has, for ceilings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that the shim may use.
    pub cpus: usize,
    /// Memory without swap, in MiB; 0: not known.
    pub memory_mib: u64,
}

impl Host {
    /// Of this host.
    pub fn read() -> Self {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            cpus: size::host_cpus(),
            memory_mib: size::meminfo_mib(&meminfo, "MemTotal").unwrap_or(0),
        }
    }
}

/// Bounds of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// In vCPUs.
    pub vcpus: Bounds<u8>,
    /// In MiB.
    pub memory_mib: Bounds<u64>,
}

impl Room {
    /// Of a VM that has booted with `boot`.
    pub fn of(boot: BootSize, limits: &Limits, config: &Size, host: Host) -> Self {
        let ceiling = Self::ceiling(limits, config, host);
        Self {
            vcpus: Bounds::new(boot.vcpus, ceiling.vcpus),
            memory_mib: Bounds::new(boot.memory_mib, ceiling.memory_mib),
        }
    }

    /// The biggest VM that limits allow, also when Update moves them. With a CPU limit that many vCPUs, else
    /// `size.max_vcpus`, and never more than the host has CPUs. With a memory limit that and what the guest needs, at
    /// least `size.minimum_memory`; else `size.max_memory`.
    pub fn ceiling(limits: &Limits, config: &Size, host: Host) -> BootSize {
        let of_host = u8::try_from(host.cpus).unwrap_or(u8::MAX);
        let most = of_host.clamp(1, MAXIMUM_VCPUS);
        let vcpus = match (limits.cpus(), config.max_vcpus) {
            (Some(cpus), _) => u8::try_from(cpus).unwrap_or(u8::MAX),
            (None, 0) => most.min(UNASKED),
            (None, max) => max,
        };
        let memory_mib = match (limits.memory_bytes(), config.max_memory.mib()) {
            (Some(bytes), _) => bytes
                .div_ceil(1 << 20)
                .saturating_add(config.guest_memory.mib())
                .max(config.minimum_memory.mib()),
            (None, 0) => host.memory_mib / 2,
            (None, max) => max,
        };
        BootSize {
            vcpus: vcpus.clamp(1, most),
            memory_mib: memory_mib.min(MAXIMUM_MEMORY_MIB),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ByteSize;

    #[test]
    fn bounds_keep_their_order_whatever_they_are_told() {
        let bounds = Bounds::new(2_u8, 8);
        let table = [
            // floor, ceiling → floor, ceiling
            (None, None, 2, 8),
            (Some(4), None, 4, 8),
            (Some(9), None, 8, 8),
            (Some(0), Some(0), 2, 2),
            (None, Some(1), 2, 2),
            (Some(5), Some(4), 4, 4),
            (None, Some(255), 2, 255),
        ];
        for (floor, ceiling, least, most) in table {
            let moved = bounds.moved(floor, ceiling);
            assert_eq!(
                (moved.boot(), moved.floor(), moved.ceiling()),
                (2, least, most),
                "{floor:?} {ceiling:?}"
            );
        }
        assert_eq!(Bounds::new(4_u8, 1), Bounds::new(4, 4));
        // A ceiling that comes down takes the floor with it, and does not bring it back.
        let back = bounds
            .moved(Some(6), None)
            .moved(None, Some(4))
            .moved(None, Some(8));
        assert_eq!((back.floor(), back.ceiling()), (4, 8));
    }

    #[test]
    fn ceilings_by_limits() {
        let host = Host {
            cpus: 8,
            memory_mib: 16_384,
        };
        let none = Limits::default();
        let quota = |cpus: i64| Limits {
            quota: Some(cpus * 100_000),
            ..Limits::default()
        };
        let memory = |bytes: i64| Limits {
            memory: Some(bytes),
            ..Limits::default()
        };
        let max = Size {
            max_vcpus: 3,
            max_memory: ByteSize::from_mib(2048),
            ..Size::default()
        };
        let usual = Size::default();
        let table = [
            (&none, &usual, 8, 8192),
            (&none, &max, 3, 2048),
            (&quota(2), &usual, 2, 8192),
            (&quota(4), &max, 4, 2048),
            (&quota(100), &usual, 8, 8192),
            (&memory(1 << 30), &usual, 8, 1152),
            (&memory(4 << 30), &max, 3, 4224),
            (&memory(1), &usual, 8, 256),
            (&memory((1 << 60) - 1), &usual, 8, MAXIMUM_MEMORY_MIB),
        ];
        for (limits, size, vcpus, memory_mib) in table {
            assert_eq!(
                Room::ceiling(limits, size, host),
                BootSize { vcpus, memory_mib },
                "{limits:?} {size:?}"
            );
        }
        let many = Size {
            max_vcpus: 254,
            ..Size::default()
        };
        assert_eq!(Room::ceiling(&none, &many, host).vcpus, 8);
    }

    #[test]
    fn a_vm_with_limits_has_no_room_until_they_are_moved() {
        let limits = Limits {
            quota: Some(200_000),
            memory: Some(512 << 20),
            ..Limits::default()
        };
        let host = Host {
            cpus: 8,
            memory_mib: 16_384,
        };
        let boot = size::boot_size(&limits, &Size::default(), host.cpus);
        let room = Room::of(boot, &limits, &Size::default(), host);
        assert!(room.vcpus.pin(2) && room.memory_mib.pin(640), "{room:?}");
        // A host that cannot be read leaves the VM as it has booted.
        let unknown = Host {
            cpus: 0,
            memory_mib: 0,
        };
        let boot = BootSize {
            vcpus: 1,
            memory_mib: 512,
        };
        let room = Room::of(boot, &Limits::default(), &Size::default(), unknown);
        assert!(room.vcpus.pin(1) && room.memory_mib.pin(512), "{room:?}");
    }
}
