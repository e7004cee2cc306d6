//! Boots a kernel with its serial console on stdout, and says how the VM ended.
//!
//! ```text
//! boot KERNEL [--initrd FILE] [--cmdline TEXT] [--memory MIB] [--vcpus N] [--disk FILE]… [--no-devices] [--timeout SECONDS]
//! ```
//!
//! The exit code is 0 for a power-off, 1 for any other end and 2 for a VM that could not be made.

use std::process::ExitCode;
use std::time::Duration;

use nacre_vmm::config::{Console, DEFAULT_WINDOWS, default_cmdline};
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
        console: Console {
            output: Box::new(std::io::stdout()),
            input: None,
        },
    };
    let mut timeout = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_default();
        match argument.as_str() {
            "--initrd" => config.initrd = Some(value().into()),
            "--cmdline" => config.cmdline = value(),
            "--memory" => config.memory_mib = value().parse().unwrap_or(0),
            "--vcpus" => config.vcpus = value().parse().unwrap_or(0),
            "--windows" => config.windows = value().parse().unwrap_or(0),
            "--disk" => config.disks.push(DiskConfig {
                path: value().into(),
                read_only: false,
                id: format!("disk{}", config.disks.len()),
            }),
            "--no-devices" => (config.vsock, config.rng) = (false, false),
            "--timeout" => timeout = value().parse().ok().map(Duration::from_secs),
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
