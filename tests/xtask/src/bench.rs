//! `cargo xtask bench`: builds for speed and runs nacre-bench where guests run, next to runc in the same boot. What the figures mean is in
//! docs/benchmarks.md.

mod peers;

use std::fmt::Display;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::image::KernelRelease;
use crate::kvm::{self, Place};
use crate::run::{self, step};
use crate::testbed::{self, Request, Terminal};
use crate::{apt, image, paths};
use peers::{Parts, Peers, Qemu, brought};

/// MiB of the emulated machine for hotplug, where what is plugged is never touched, but for the guest's page structures; for
/// storage, whose files and disks are in its memory; and for net, whose VMs run at once.
const MORE_MIB: u32 = 6144;
/// Files in the tree of storage, MiB and requests of net, and seconds for one call, where a request of a guest takes some ten times as
/// long as elsewhere.
const EMULATED_FILES: u32 = 1000;
const EMULATED_MIB: u32 = 8;
const EMULATED_REQUESTS: u32 = 100;
const EMULATED_PATIENCE: u32 = 3600;
/// The same for a boot, where it takes some 10 s; one that takes so long has failed.
const EMULATED_BOOT: u32 = 300;
/// VMs at once of density and parallel there.
const EMULATED_VMS: &str = "1,2,4";
/// Where the kernel tells the numbers of its tracepoints. Not everywhere is it built in.
const TRACEFS: &str = "mount -t tracefs tracefs /sys/kernel/tracing || true\n";
/// A configuration whose deadlines leave time for several VMs that share an emulated CPU or two; the command follows on its last line.
const PATIENT: &str = "\
for key in boot agent create stdio; do echo \"${key}_timeout = \\\"10m\\\"\"; done > /tmp/patient.toml
NACRE_CONFIG=/tmp/patient.toml ";
/// A disk for the emulated machine, whose root is in its memory: so that files can be cold on it, and be read past its cache. By its
/// path, since busybox has a mke2fs of its own.
const DISK: &str = "\
truncate -s 4G /tmp/bench.img
/usr/sbin/mke2fs -q -F -t ext4 -m 0 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard /tmp/bench.img
mkdir -p /mnt/bench
mount -o loop /tmp/bench.img /mnt/bench
";

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure [default: all of it]
    #[arg(value_enum, value_name = "SCENARIO")]
    scenarios: Vec<Scenario>,
    /// How often each is done [default: as nacre-bench has it; less where the machine is emulated]
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// The Debian release whose newest cloud kernel is the guest's, or the lean kernel
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    release: KernelRelease,
    /// Measure boot, hotplug, storage and net of QEMU as well: Debian's, unpacked, and for storage its virtiofsd
    #[arg(long)]
    qemu: bool,
    /// Measure boot of this Firecracker as well
    #[arg(long, value_name = "PROGRAM")]
    firecracker: Option<PathBuf>,
    /// Measure boot of this Cloud Hypervisor as well
    #[arg(long, value_name = "PROGRAM")]
    cloud_hypervisor: Option<PathBuf>,
    /// In the emulated machine, with time that is a count of its instructions, whatever else this machine does; it has one CPU then
    #[arg(long, conflicts_with = "cpus")]
    counted: bool,
    /// CPUs of the emulated machine; with more than one it loses registers now and then
    #[arg(long, value_name = "N", default_value_t = testbed::CPUS)]
    cpus: u32,
    /// Use the debug build: to try a scenario, not for figures
    #[arg(long)]
    debug: bool,
    /// Use the emulated machine even where this machine's KVM would do
    #[arg(long)]
    nested: bool,
    /// Options of nacre-bench itself, the same for every scenario
    #[arg(last = true, value_name = "OPTION")]
    options: Vec<String>,
}

/// The subcommands of nacre-bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A container's life by its phases
    Lifecycle,
    /// An exec's cycle
    Exec,
    /// 20 MiB through cat and back
    Cat,
    /// 1000 execs, and what the shim holds before and after
    Execs,
    /// From a process to its guest's init, next to other VMMs, and to a container's first byte
    Boot,
    /// What idle containers hold
    Density,
    /// Several starts at once
    Parallel,
    /// vCPUs and memory of a VM come and go
    Hotplug,
    /// Files by virtio-blk and virtio-fs
    Storage,
    /// The network and the vsock
    Net,
    /// A stream of the vsock, in process and through vmctl's Unix socket
    Vsock,
}

impl Scenario {
    const ALL: [Scenario; 11] = [
        Self::Lifecycle,
        Self::Exec,
        Self::Cat,
        Self::Execs,
        Self::Boot,
        Self::Density,
        Self::Parallel,
        Self::Hotplug,
        Self::Storage,
        Self::Net,
        Self::Vsock,
    ];

    /// Its name, and how often an emulated machine can be asked to do it.
    fn describe(self) -> (&'static str, u64) {
        match self {
            Self::Lifecycle => ("lifecycle", 5),
            Self::Exec => ("exec", 50),
            Self::Cat => ("cat", 3),
            Self::Execs => ("execs", 1000),
            Self::Boot => ("boot", 5),
            Self::Density => ("density", 1),
            Self::Parallel => ("parallel", 3),
            Self::Hotplug => ("hotplug", 10),
            Self::Storage => ("storage", 3),
            Self::Net => ("net", 3),
            Self::Vsock => ("vsock", 3),
        }
    }

    /// The command of nacre-bench, its files in `$NACRE_OUT`.
    fn command(self, place: Place, count: Option<u64>, peers: &Peers<'_>, options: &str) -> String {
        let qemu = peers.qemu;
        let (name, _) = self.describe();
        let mut command = format!(
            "nacre-bench {name} --json \"$NACRE_OUT/{name}.json\" --html \"$NACRE_OUT/{name}.html\""
        );
        let mut add = |option: &str, value: &dyn Display| {
            command.push_str(&format!(" --{option} '{value}'"));
        };
        let count_option = match self {
            Self::Boot
            | Self::Density
            | Self::Parallel
            | Self::Hotplug
            | Self::Storage
            | Self::Net
            | Self::Vsock => "rounds",
            Self::Lifecycle | Self::Exec | Self::Cat | Self::Execs => "count",
        };
        if let Some(count) = count {
            add(count_option, &count);
        }
        let mut before = String::new();
        match self {
            Self::Boot => {
                if place == Place::Testbed {
                    before.push_str(TRACEFS);
                    add("patience", &EMULATED_BOOT);
                }
                if let Some(Qemu { direct, .. }) = qemu {
                    let modules = direct.modules.display();
                    before.push_str(&format!("QEMU_MODULE_DIR='{modules}' "));
                    add("qemu", &direct.loader.display());
                    for word in &direct.arguments {
                        add("qemu-argument", word);
                    }
                }
                for (option, program) in [
                    ("firecracker", peers.firecracker),
                    ("cloud-hypervisor", peers.cloud_hypervisor),
                ] {
                    if let Some(program) = program {
                        add(option, &program.display());
                    }
                }
            }
            Self::Density | Self::Parallel => {
                if place == Place::Testbed {
                    before.push_str(PATIENT);
                    add("vms", &EMULATED_VMS);
                    add("patience", &EMULATED_PATIENCE);
                }
            }
            Self::Hotplug => {
                if let Some(qemu) = qemu {
                    add("qemu", &qemu.program.display());
                }
                command.push_str(" --plot \"$NACRE_OUT/hotplug.svg\"");
            }
            Self::Storage => {
                if place == Place::Testbed {
                    before.push_str(DISK);
                    add("dir", &"/mnt/bench");
                    add("files", &EMULATED_FILES);
                    add("patience", &EMULATED_PATIENCE);
                }
                for (option, file) in qemu.and_then(Qemu::of_storage).into_iter().flatten() {
                    add(option, &file.display());
                }
            }
            Self::Vsock => {
                if place == Place::Testbed {
                    add("mib", &EMULATED_MIB);
                    add("patience", &EMULATED_PATIENCE);
                }
            }
            Self::Net => {
                if place == Place::Testbed {
                    add("mib", &EMULATED_MIB);
                    add("requests", &EMULATED_REQUESTS);
                    add("patience", &EMULATED_PATIENCE);
                }
                for (option, file) in qemu.and_then(Qemu::of_net).into_iter().flatten() {
                    add(option, &file.display());
                }
            }
            Self::Lifecycle | Self::Exec | Self::Cat | Self::Execs => {}
        }
        format!("{before}{command}{options}\necho\n")
    }
}

/// Words for a shell, each with a space before it.
fn quoted(words: &[String]) -> String {
    let word = |word: &String| format!(" '{}'", word.replace('\'', "'\\''"));
    words.iter().map(word).collect()
}

/// Runs the benchmarks; the result is the exit code.
pub fn run(args: &BenchArgs) -> Result<i32> {
    apt::ensure_installed(&[
        ("gcc", "cc"),
        ("libc6-dev", "/usr/include/stdio.h"),
        ("e2fsprogs", "mke2fs"),
    ])?;
    let (profile, folder) = match args.debug {
        true => ("dev", "debug"),
        false => ("release", "release"),
    };
    step(format!("building the shim and nacre-bench ({profile})"));
    let mut build = run::cargo();
    build.args([
        "build",
        "--profile",
        profile,
        "--package",
        "nacre",
        "--bins",
    ]);
    run::run(&mut build)?;
    step("making the guest's kernel and initrd");
    image::run(&image::ImageArgs::of(args.release))?;

    let nested = args.nested || args.counted;
    let (place, _) = kvm::place(nested);
    let scenarios = match args.scenarios.as_slice() {
        [] => &Scenario::ALL[..],
        some => some,
    };
    let mut request = Request::new(Vec::new());
    let storage = scenarios.contains(&Scenario::Storage);
    let net = scenarios.contains(&Scenario::Net);
    let in_memory = storage || net || scenarios.contains(&Scenario::Hotplug);
    let probed = [
        Scenario::Boot,
        Scenario::Storage,
        Scenario::Net,
        Scenario::Vsock,
    ];
    if probed.iter().any(|scenario| scenarios.contains(scenario)) {
        image::build_probe()?;
    }
    let parts = Parts {
        virtiofsd: storage,
        initrd: (storage || net).then_some(args.release),
    };
    let qemu = match args.qemu {
        true => Some(Qemu::bring(place, &parts, &mut request)?),
        false => None,
    };
    let given = args.firecracker.as_deref();
    let firecracker = brought(place, given, "firecracker", &mut request)?;
    let given = args.cloud_hypervisor.as_deref();
    let cloud_hypervisor = brought(place, given, "cloud-hypervisor", &mut request)?;
    let peers = Peers {
        qemu: qemu.as_ref(),
        firecracker: firecracker.as_deref(),
        cloud_hypervisor: cloud_hypervisor.as_deref(),
    };
    let options = quoted(&args.options);
    let mut script = String::from("set -e\n");
    for scenario in scenarios {
        let (_, emulated) = scenario.describe();
        let count = args.count.or((place == Place::Testbed).then_some(emulated));
        script.push_str(&scenario.command(place, count, &peers, &options));
    }
    request.argv = vec!["sh".into(), "-c".into(), script];
    request.programs = paths::target().join(folder);
    request.force_nested = nested;
    request.counted = args.counted;
    request.cpus = args.cpus;
    if in_memory {
        request.memory = MORE_MIB;
    }
    request.time_limit = Some(Duration::from_secs(4 * 3600));
    request.out = paths::cache("bench");
    fs::create_dir_all(&request.out)
        .with_context(|| format!("making {}", request.out.display()))?;
    let outcome = testbed::execute(&request, &mut Terminal)?;
    if let Some(why) = outcome.retried {
        step(format!("the testbed was booted twice: {why}"));
    }
    step(format!(
        "every value, and a page for each scenario, is in {}",
        request.out.display()
    ));
    Ok(outcome.code)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::peers::{Direct, QEMU_INITRD};
    use super::*;

    #[test]
    fn rounds_and_files_of_each_scenario_are_named_as_it_names_them() {
        let options = quoted(&["--sizes".into(), "1G".into(), "it's".into()]);
        assert_eq!(options, r" '--sizes' '1G' 'it'\''s'");
        let qemu = Qemu {
            program: "/opt/qemu/run".into(),
            direct: Direct::of(Path::new("/opt/qemu")),
            virtiofsd: Some("/opt/virtiofsd/run".into()),
            initrd: Some(QEMU_INITRD.into()),
        };
        let peers = Peers {
            qemu: Some(&qemu),
            firecracker: Some(Path::new("/opt/firecracker")),
            cloud_hypervisor: None,
        };
        let of =
            |scenario: Scenario, count| scenario.command(Place::Testbed, count, &peers, &options);
        for (command, words) in [
            (
                of(Scenario::Hotplug, Some(3)),
                &[
                    "--rounds '3'",
                    "hotplug.svg",
                    "--qemu '/opt/qemu/run'",
                    "'1G'",
                ][..],
            ),
            (
                of(Scenario::Storage, None),
                &[
                    "mount -o loop",
                    "--dir '/mnt/bench' --files '1000'",
                    "--virtiofsd '/opt/virtiofsd/run'",
                    "--qemu-initrd '/opt/qemu/initrd'",
                ],
            ),
            (
                of(Scenario::Net, Some(2)),
                &[
                    "--rounds '2'",
                    "--mib '8' --requests '100'",
                    "--qemu '/opt/qemu/run' --qemu-initrd '/opt/qemu/initrd'",
                ],
            ),
            (
                of(Scenario::Boot, Some(2)),
                &[
                    "tracefs",
                    "--rounds '2'",
                    // No shell that would be measured with it.
                    "\nQEMU_MODULE_DIR='/opt/qemu/usr/lib/x86_64-linux-gnu/qemu' nacre-bench boot ",
                    "--qemu '/opt/qemu/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2' --qemu-argument '--library-path' ",
                    "--qemu-argument '/opt/qemu/usr/bin/qemu-system-x86_64' --qemu-argument '-L' ",
                    "'/opt/qemu/usr/share/seabios' --firecracker '/opt/firecracker'",
                ],
            ),
            (
                of(Scenario::Density, None),
                &[
                    "\nNACRE_CONFIG=/tmp/patient.toml nacre-bench density ",
                    "--vms '1,2,4'",
                    "'1G'",
                ],
            ),
            (of(Scenario::Vsock, Some(1)), &["--mib '8'"]),
        ] {
            for words in words {
                assert!(command.contains(words), "{words} in {command}");
            }
        }
        let storage = Scenario::Storage.command(Place::Host, Some(2), &Peers::default(), "");
        assert_eq!(
            storage,
            "nacre-bench storage --json \"$NACRE_OUT/storage.json\" --html \"$NACRE_OUT/storage.html\" --rounds '2'\necho\n"
        );
        let exec = Scenario::Exec.command(Place::Host, None, &peers, "");
        assert_eq!(
            exec,
            "nacre-bench exec --json \"$NACRE_OUT/exec.json\" --html \"$NACRE_OUT/exec.html\"\necho\n"
        );
    }
}
