//! Boots a kernel with its serial console on stdout, and says how the VM ended.
//!
//! ```text
//! boot KERNEL [--initrd FILE] [--cmdline TEXT] [--memory MIB] [--vcpus N] [--disk FILE]… [--no-devices] [--timeout SECONDS]
//!      [--max-vcpus N] [--acpi-units N] [--plug SECONDS]
//! ```
//!
//! `--plug` plugs one vCPU and one unit of memory of 128 MiB after so long, and asks for them back after as long again; what the
//! guest makes of it is printed.
//!
//! The exit code is 0 for a power-off, 1 for any other end and 2 for a VM that could not be made.

use std::process::ExitCode;
use std::time::Duration;

use nacre_vmm::config::{Console, DEFAULT_WINDOWS, PlugConfig, ReadyDevices, default_cmdline};
use nacre_vmm::{DiskConfig, ExitReason, Vm, VmConfig};

fn main() -> ExitCode {
    let mut config = VmConfig {
        name: "boot".to_owned(),
        kernel: "vmlinux".into(),
        initrd: None,
        cmdline: default_cmdline(),
        memory_mib: 256,
        vcpus: 1,
        disks: Vec::new(),
        windows: DEFAULT_WINDOWS,
        vsock: true,
        rng: true,
        devices: ReadyDevices::default(),
        plug: PlugConfig::default(),
        console: Console {
            output: Box::new(std::io::stdout()),
            input: None,
        },
    };
    let (mut timeout, mut plug) = (None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_default();
        match argument.as_str() {
            "--initrd" => config.initrd = Some(value().into()),
            "--cmdline" => config.cmdline = value(),
            "--memory" => config.memory_mib = value().parse().unwrap_or(0),
            "--vcpus" => config.vcpus = value().parse().unwrap_or(0),
            "--windows" => config.windows = value().parse().unwrap_or(0),
            "--disk" => {
                let id = format!("disk{}", config.disks.len());
                config.disks.push(DiskConfig::file(value(), false, id));
            }
            "--no-devices" => (config.vsock, config.rng) = (false, false),
            "--timeout" => timeout = value().parse().ok().map(Duration::from_secs),
            "--max-vcpus" => config.plug.max_vcpus = value().parse().unwrap_or(0),
            "--acpi-units" => {
                config.plug.acpi_units = value().parse().unwrap_or(0);
                config.plug.acpi_unit_mib = 128;
            }
            "--plug" => plug = value().parse().ok().map(Duration::from_secs),
            kernel => config.kernel = kernel.into(),
        }
    }
    let vm = match Vm::start(config) {
        Ok(vm) => vm,
        Err(error) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = cause {
                eprintln!("boot: {error}");
                cause = error.source();
            }
            return ExitCode::from(2);
        }
    };
    if let Some(timeout) = timeout {
        let vm = vm.clone();
        std::thread::spawn(move || {
            std::thread::sleep(timeout);
            vm.stop();
        });
    }
    if let Some(after) = plug {
        let vm = vm.clone();
        std::thread::spawn(move || come_and_go(&vm, after));
    }
    let reason = vm.wait();
    let phases = vm.phases();
    let since = |ns: Option<u64>| ns.map_or(0, |ns| (ns - phases.start_ns) / 1000);
    eprintln!("\nboot: {reason}");
    eprintln!(
        "boot: microseconds to kvm {}, loaded {}, first run {}; marks {:?}",
        since(phases.kvm_ns),
        since(phases.loaded_ns),
        since(phases.first_run_ns),
        phases
            .marks
            .iter()
            .map(|(phase, ns)| (*phase, since(Some(*ns))))
            .collect::<Vec<_>>()
    );
    eprintln!("boot: {:?}", vm.counters());
    if reason == ExitReason::PowerOff {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    }
}

/// Plugs, waits, asks back.
fn come_and_go(vm: &Vm, after: Duration) {
    let say = |what: &str| {
        eprintln!(
            "boot: {what}: vCPUs {:?}, memory {:?}",
            vm.vcpu_slots(),
            vm.memory_units()
        );
    };
    std::thread::sleep(after);
    let vcpu = vm.plug_vcpu();
    let units = vm.plug_memory(128 << 20);
    eprintln!("boot: plugged vCPU {vcpu:?}, memory {units:?}");
    std::thread::sleep(after);
    say("after a while");
    if let Ok(vcpu) = vcpu {
        eprintln!("boot: asked for vCPU {vcpu}: {:?}", vm.ask_vcpu(vcpu));
    }
    for unit in units.into_iter().flatten() {
        let index = unit.slot.index;
        eprintln!("boot: asked for unit {index}: {:?}", vm.ask_memory(index));
    }
    std::thread::sleep(after);
    say("after a while more");
}
