//! Nothing stays of a VM: descriptors, threads and mappings of the process before and after. A
//! program of its own, since tests of one program run side by side.

mod flat;

use flat::{Code, Output, config, wait};
use nacre_vmm::{DiskConfig, ExitReason, Vm};

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).expect(directory).count()
}

/// Descriptors and threads of the process.
fn held() -> (usize, usize) {
    (entries("/proc/self/fd"), entries("/proc/self/task"))
}

/// KiB of mappings that are a guest's memory: no others here are both without reservation (nr) and
/// kept out of core dumps (dd). And mappings of vCPUs' shared pages.
fn mapped() -> (u64, usize) {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let (mut size, mut memory, mut vcpus) = (0, 0, 0);
    for line in smaps.lines() {
        if line.contains("kvm-vcpu") {
            vcpus += 1;
        } else if let Some(rest) = line.strip_prefix("Size:") {
            let number = rest.trim().strip_suffix(" kB").expect("kB");
            size = number.parse().expect("a number");
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |wanted| flags.split_whitespace().any(|flag| flag == wanted);
            if has("dd") && has("nr") {
                memory += size;
            }
        }
    }
    (memory, vcpus)
}

#[test]
fn fifty_vms_leave_nothing() {
    // Read-only disks share the file's lock.
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().set_len(1 << 20).expect("length");
    let disk = DiskConfig::file(file.path(), true, "");
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
    let kernel = Code::new().print("x").spin().kernel();
    let output = Output::default();
    let vm = Vm::start(config(&kernel, &output)).expect("starts");
    output.wait_for(b"x");
    assert_eq!(mapped(), (128 * 1024, 1), "what is looked for is seen");
    drop(vm);
    // What the process takes once is taken by these.
    (0..4).for_each(cycle);
    let before = held();
    (4..54).for_each(cycle);
    assert_eq!(before, held(), "descriptors, threads");
    assert_eq!(mapped(), (0, 0), "guest memory, vCPUs");
}
