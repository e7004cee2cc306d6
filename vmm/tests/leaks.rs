//! Nothing stays of a VM: descriptors, threads and mappings of the process before and after. A
//! program of its own, since tests of one program run side by side.

mod flat;

use flat::{Code, Output, config, wait};
use nacre_vmm::{DiskConfig, ExitReason, Vm};

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).expect(directory).count()
}

/// Threads by the kernel's count, descriptors, and KiB of address space.
fn held() -> (usize, usize, u64) {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let size = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.parse().ok())
        .expect("VmSize");
    (entries("/proc/self/fd"), entries("/proc/self/task"), size)
}

#[test]
fn fifty_vms_leave_nothing() {
    // Read-only disks share the file's lock.
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().set_len(1 << 20).expect("length");
    let disk = DiskConfig {
        path: file.path().to_owned(),
        read_only: true,
        id: String::new(),
    };
    let spins = Code::new().print("x").spin().kernel();
    let ends = Code::new().print("x").power_off().kernel();
    let cycle = |round: usize| {
        let stopped = round.is_multiple_of(2);
        let output = Output::default();
        let mut config = config(if stopped { &spins } else { &ends }, &output);
        config.vcpus = 1 + (round % 3) as u8;
        (config.vsock, config.rng, config.windows) = (true, true, 6);
        config.disks = vec![disk.clone()];
        let (reader, _writer) = std::io::pipe().expect("pipe");
        config.console.input = Some(std::os::fd::OwnedFd::from(reader).into());
        let vm = Vm::start(config).expect("starts");
        output.wait_for(b"x");
        if stopped {
            let window = vm.plug_disk(disk.clone()).expect("plugs");
            vm.unplug(window).expect("unplugs");
            vm.plug_disk(disk.clone()).expect("plugs");
        }
        let reason = match round % 4 {
            // Dropped while it runs.
            0 => return,
            2 => {
                vm.stop();
                wait(&vm)
            }
            _ => wait(&vm),
        };
        let expected = if stopped {
            ExitReason::Stopped
        } else {
            ExitReason::PowerOff
        };
        assert_eq!(reason, expected);
    };
    // What the process takes once, such as the allocator's arenas, is taken by these.
    (0..8).for_each(cycle);
    let before = held();
    (8..58).for_each(cycle);
    let after = held();
    assert_eq!(before.0, after.0, "descriptors");
    assert_eq!(before.1, after.1, "threads");
    assert!(
        after.2 < before.2 + 120 * 1024,
        "address space grew from {} to {} KiB: that of a VM's memory is left",
        before.2,
        after.2
    );
}
