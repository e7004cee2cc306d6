//! What the guest has, how busy it is, and what it lacks for being resized.

use std::path::Path;

use nacre_protocol::agent::ResourcesResponse;

use crate::cgroup;
use crate::hotplug::cpus::Cpus;
use crate::hotplug::kernel_files::KernelFiles;
use crate::hotplug::memory::Memory;

/// Microseconds of a tick of `/proc/stat`, which has 100 of them in a second on this architecture.
const TICK_US: u64 = 10_000;

/// Reads everything anew. `cgroups` is the hierarchy's root. To be asked when the late modules are loaded: a driver
/// that is not there yet counts as lacking.
pub fn read(files: &KernelFiles, page_bytes: u64, cgroups: &Path) -> ResourcesResponse {
    let memory = Memory::new(files.clone(), page_bytes);
    let managed = memory.managed();
    let (cpu_busy_us, cpu_total_us) = cpu_times(&files.proc_text("stat"));
    ResourcesResponse {
        online_uids: Cpus::new(files.clone()).online_uids(),
        memory_total_bytes: files.meminfo("MemTotal"),
        memory_available_bytes: files.meminfo("MemAvailable"),
        memory_free_bytes: files.meminfo("MemFree"),
        memory_block_bytes: memory.block_bytes(),
        movable_bytes: managed.movable,
        kernel_bytes: managed.kernel,
        cpu_busy_us,
        cpu_total_us,
        throttled_us: cgroup::throttled_us(cgroups),
        lacks: lacks(&files.sys),
        virtio_mem: virtio_mem_bound(&files.sys),
        ..Default::default()
    }
}

/// Busy and all time of all CPUs together. Time that the host did not give (steal) is busy: there was something to run.
fn cpu_times(stat: &str) -> (u64, u64) {
    let Some(line) = stat.lines().find_map(|line| line.strip_prefix("cpu ")) else {
        return (0, 0);
    };
    // user nice system idle iowait irq softirq steal; what guests of the guest use is in the first two already.
    let ticks: Vec<u64> = line
        .split_whitespace()
        .take(8)
        .map(|word| word.parse().unwrap_or(0))
        .collect();
    let sum = |ticks: &[u64]| ticks.iter().copied().fold(0, u64::saturating_add);
    let total = sum(&ticks);
    let idle = sum(ticks.get(3..5.min(ticks.len())).unwrap_or_default());
    let us = |ticks: u64| ticks.saturating_mul(TICK_US);
    (us(total - idle), us(total))
}

/// Where the driver of virtio-mem is, once it is loaded.
const VIRTIO_MEM: &str = "bus/virtio/drivers/virtio_mem";

fn virtio_mem_bound(sys: &Path) -> bool {
    let entries = std::fs::read_dir(sys.join(VIRTIO_MEM));
    entries.into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().starts_with(b"virtio") && entry.path().join("driver").exists()
    })
}

/// What is missing for being resized, in words for a person.
fn lacks(sys: &Path) -> Vec<String> {
    [
        (
            "devices/system/memory/block_size_bytes",
            "memory hotplug in the kernel (CONFIG_MEMORY_HOTPLUG)",
        ),
        (
            "devices/system/cpu/hotplug",
            "CPU hotplug in the kernel (CONFIG_HOTPLUG_CPU)",
        ),
        (
            "firmware/acpi/hotplug/processor",
            "the ACPI processor driver (CONFIG_ACPI_PROCESSOR)",
        ),
        (
            "firmware/acpi/hotplug/memory",
            "the ACPI memory driver (CONFIG_ACPI_HOTPLUG_MEMORY)",
        ),
        (VIRTIO_MEM, "the virtio_mem driver (CONFIG_VIRTIO_MEM)"),
    ]
    .into_iter()
    .filter(|(path, _)| !sys.join(path).exists())
    .map(|(_, words)| words.to_owned())
    .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn busy_is_what_is_neither_idle_nor_waiting() {
        let stat = "cpu  10 2 3 100 40 1 1 5 7 7\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n";
        assert_eq!(cpu_times(stat), (220_000, 1_620_000));
        let table = ["", "cpu", "cpu \n", "cpu0 1 2\n", "cpu  x y z\n"];
        for stat in table {
            assert_eq!(cpu_times(stat), (0, 0), "{stat:?}");
        }
        assert_eq!(cpu_times("cpu  1 2 3 4\n"), (60_000, 100_000));
        let most = format!("cpu  {0} {0} {0} {0} {0}\n", u64::MAX);
        assert_eq!(cpu_times(&most).1, u64::MAX, "no overflow");
    }

    #[test]
    fn what_is_lacking_is_named_and_nothing_else() {
        let sys = tempfile::tempdir().unwrap();
        let make = |folder: &str| fs::create_dir_all(sys.path().join(folder)).unwrap();
        assert_eq!(lacks(sys.path()).len(), 5);
        for folder in [
            "devices/system/memory/block_size_bytes",
            "devices/system/cpu/hotplug",
            "firmware/acpi/hotplug/processor",
            "firmware/acpi/hotplug/memory",
        ] {
            make(folder);
        }
        assert_eq!(
            lacks(sys.path()),
            ["the virtio_mem driver (CONFIG_VIRTIO_MEM)"]
        );
        make(VIRTIO_MEM);
        assert!(lacks(sys.path()).is_empty());
        assert!(!virtio_mem_bound(sys.path()), "no device");
        make(&format!("{VIRTIO_MEM}/module/driver"));
        assert!(!virtio_mem_bound(sys.path()), "no device");
        make(&format!("{VIRTIO_MEM}/virtio4/driver"));
        assert!(virtio_mem_bound(sys.path()));
    }

    #[test]
    fn everything_is_read_from_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let files = KernelFiles {
            sys: folder.path().join("sys"),
            proc: folder.path().join("proc"),
        };
        let cgroups = folder.path().join("cgroup");
        let write = |path: std::path::PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let nothing = read(&files, 4096, &cgroups);
        assert_eq!((nothing.memory_block_bytes, nothing.throttled_us), (0, 0));
        assert!(nothing.online_uids.is_empty());
        write(
            files.proc.join("meminfo"),
            "MemTotal: 4 kB\nMemFree: 1 kB\nMemAvailable: 2 kB\n",
        );
        write(files.proc.join("stat"), "cpu  1 0 0 3 0 0 0 0 0 0\n");
        write(
            files.proc.join("zoneinfo"),
            "Node 0, zone Normal\n managed 1\nNode 0, zone Movable\n managed 2\n",
        );
        write(
            files.sys.join("devices/system/memory/block_size_bytes"),
            "8000000\n",
        );
        write(files.sys.join("devices/system/cpu/online"), "0-1\n");
        for (number, uid) in [(0, "0"), (1, "6")] {
            let node = format!("devices/system/cpu/cpu{number}/firmware_node/uid");
            write(files.sys.join(node), uid);
        }
        for (container, us) in [("a", 5), ("b", 7)] {
            let stat = format!("usage_usec 1\nnr_throttled 2\nthrottled_usec {us}\n");
            write(
                cgroups.join("nacre").join(container).join("cpu.stat"),
                &stat,
            );
        }
        let read = read(&files, 4096, &cgroups);
        assert_eq!(read.online_uids, [0, 6]);
        assert_eq!(
            (
                read.memory_total_bytes,
                read.memory_available_bytes,
                read.memory_free_bytes
            ),
            (4096, 2048, 1024)
        );
        assert_eq!(read.memory_block_bytes, 128 << 20);
        assert_eq!((read.movable_bytes, read.kernel_bytes), (8192, 4096));
        assert_eq!((read.cpu_busy_us, read.cpu_total_us), (10_000, 40_000));
        assert_eq!(read.throttled_us, 12);
    }
}
