//! `nacre-bench boot`: how long a guest takes to come, counted as well as timed. Two things: from a VMM's process to its guest's first
//! process, ours next to others with the same guest; and the phases of our own boots up to a container's first byte. Here are the rounds;
//! `vmms` is how each VMM is told what to boot, `launched` one of their boots, `counted` what it cost, `ours` our phases, `measured` what
//! came of it.

mod counted;
mod launched;
mod measured;
mod ours;
mod vmms;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use super::console::probe_alone;
use super::guest::{GuestKernel, digest_of};
use super::peers::{Peer, Surroundings};
use super::run::{Round, Rounds, turns};
use super::steady::elsewhere;
use super::{Setting, absolute, as_root, interrupt, probed};
use crate::config::{ByteSize, Config};
use measured::{Measured, SHIM, VMCTL};
use vmms::{Guest, Vmm};

/// The configuration of the VMs of `vmctl`, in the folder of what is booted.
const CONFIG: &str = "config.toml";

/// Options of `nacre-bench boot`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Rounds; in each, everything boots once
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: u64,
    /// vCPUs of the VMs that boot to init
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    vcpus: u8,
    /// Memory of the VMs that boot to init
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    memory: ByteSize,
    /// Guest kernel of all VMs, an ELF vmlinux with a PVH note [default: from the configuration]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initrd of the VMs of the phases, with the agent and that kernel's modules [default: from the configuration]
    #[arg(long, value_name = "FILE", conflicts_with = "no_phases")]
    initrd: Option<PathBuf>,
    /// vmctl [default: beside this program, else in PATH]
    #[arg(long, value_name = "PROGRAM")]
    vmctl: Option<PathBuf>,
    /// The static program that is the guest's init [default: NACRE_PROBE, else nacre-probe beside this program or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    probe: Option<PathBuf>,
    /// Also measure this QEMU for x86-64, its machine microvm
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
    /// What comes first of that QEMU's arguments, a word each time: a loader to be given as --qemu has its own options and QEMU's program here
    #[arg(
        long,
        value_name = "WORD",
        requires = "qemu",
        allow_hyphen_values = true
    )]
    qemu_argument: Vec<String>,
    /// Also measure this Firecracker
    #[arg(long, value_name = "PROGRAM")]
    firecracker: Option<PathBuf>,
    /// Also measure this Cloud Hypervisor
    #[arg(long, value_name = "PROGRAM")]
    cloud_hypervisor: Option<PathBuf>,
    /// Leave out the boots to init
    #[arg(long, conflicts_with_all = ["no_phases", "qemu", "firecracker", "cloud_hypervisor"])]
    no_init: bool,
    /// Leave out the phases of ours
    #[arg(long)]
    no_phases: bool,
}

impl Options {
    fn all_rounds(&self) -> Rounds {
        Rounds {
            warm_up: self.warm_up,
            count: self.rounds,
        }
    }

    fn settings(&self) -> Value {
        json!({
            "rounds": self.rounds,
            "warm_up": self.warm_up,
            "vcpus": self.vcpus,
            "memory_mib": self.memory.mib(),
        })
    }

    /// What comes before what a VMM is told.
    fn before(&self, vmm: Vmm) -> &[String] {
        match vmm {
            Vmm::Qemu => &self.qemu_argument,
            Vmm::Ours | Vmm::Firecracker | Vmm::CloudHypervisor => &[],
        }
    }

    /// The VMMs to compare, ours first, and the programs of the others.
    fn vmms(&self) -> impl Iterator<Item = (Vmm, Option<&Path>)> {
        let others = [
            (Vmm::Qemu, &self.qemu),
            (Vmm::Firecracker, &self.firecracker),
            (Vmm::CloudHypervisor, &self.cloud_hypervisor),
        ];
        let others = others
            .into_iter()
            .filter_map(|(vmm, program)| Some((vmm, Some(program.as_deref()?))));
        std::iter::once((Vmm::Ours, None)).chain(others)
    }
}

/// Measures until all rounds are done, ours fails or a signal comes; what there is then is shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    let bench = Bench::prepare(options, setting)?;
    let vmms: Vec<Vmm> = options.vmms().map(|(vmm, _)| vmm).collect();
    let mut measured = Measured::new(&vmms, options, setting);
    measured.run.document.guest_kernel = Some(GuestKernel::of(
        &bench.config.kernel,
        (!options.no_phases).then_some(bench.config.initrd.as_path()),
    ));
    let to_init = match options.no_init {
        true => Ok(()),
        false => bench.to_init(&mut measured),
    };
    let outcome = to_init.and_then(|()| match options.no_phases {
        true => Ok(()),
        false => bench.phases(&mut measured),
    });
    measured.run.end(outcome)
}

/// What everything is measured with.
struct Bench<'o> {
    options: &'o Options,
    setting: &'o Setting,
    config: Config,
    /// The configuration of the VMs of `vmctl`.
    kept: PathBuf,
    /// Kernel and initrd of the phases' VMs in place of the configured ones.
    environment: Vec<(&'static str, PathBuf)>,
    vmctl: PathBuf,
    patience: Duration,
    folder: tempfile::TempDir,
}

/// A VMM that is compared.
struct Side {
    vmm: Vmm,
    program: PathBuf,
    arguments: Vec<String>,
    /// It has failed, and is not ours to mend.
    left_out: bool,
}

impl<'o> Bench<'o> {
    fn prepare(options: &'o Options, setting: &'o Setting) -> Result<Self> {
        if !options.no_phases {
            as_root()?;
        }
        let folder = tempfile::Builder::new()
            .prefix("nacre-bench-boot-")
            .tempdir()
            .context("making a folder for what is booted")?;
        let mut config = Config::load()?;
        let mut environment = Vec::new();
        for (name, given, configured) in [
            ("NACRE_KERNEL", &options.kernel, &mut config.kernel),
            ("NACRE_INITRD", &options.initrd, &mut config.initrd),
        ] {
            if let Some(given) = given {
                size(given)?;
                *configured = std::path::absolute(given)?;
                environment.push((name, configured.clone()));
            }
        }
        let state = folder.path().join("state");
        let kept = elsewhere(folder.path().join(CONFIG), &state)?;
        Ok(Self {
            options,
            setting,
            config,
            environment,
            kept,
            vmctl: Setting::ours(options.vmctl.as_deref(), "vmctl", "--vmctl")?,
            patience: Duration::from_secs(setting.patience),
            folder,
        })
    }

    fn sides(&self, measured: &mut Measured<'_>) -> Result<Vec<Side>> {
        let initrd = self.folder.path().join("initrd");
        let probe = probed::program(self.options.probe.as_deref())?;
        probe_alone(&probe, &initrd)?;
        let digest = digest_of(&probe).map(|digest| format!("SHA-256 {digest}…"));
        measured.program("probe", &probe, digest);
        let guest = Guest {
            kernel: std::path::absolute(&self.config.kernel)?,
            initrd,
            vcpus: self.options.vcpus,
            memory_mib: self.options.memory.mib(),
        };
        measured.run.document.note(&format!(
            "the guest is {} MiB of kernel and {} KiB of initrd",
            size(&guest.kernel)? >> 20,
            size(&guest.initrd)? >> 10
        ));
        if guest.vcpus > 1 && self.options.qemu.is_some() {
            let why = "qemu: its guest finds one vCPU, as there is no ACPI in it";
            measured.run.document.note(why);
        }
        let side = |(vmm, program): (Vmm, Option<&Path>)| {
            let program = match program {
                Some(program) => absolute(program)?,
                None => self.vmctl.clone(),
            };
            let mut arguments = self.options.before(vmm).to_vec();
            measured.program(vmm.name(), &program, version(&program, &arguments));
            arguments.extend(vmm.arguments(&guest, self.folder.path())?);
            Ok(Side {
                vmm,
                arguments,
                program,
                left_out: false,
            })
        };
        self.options.vmms().map(side).collect()
    }

    fn to_init(&self, measured: &mut Measured<'_>) -> Result<()> {
        let mut sides = self.sides(measured)?;
        let rounds = self.options.all_rounds();
        for round in rounds.each() {
            measured.run.begin("to init", rounds, round)?;
            let folder = self.folder.path();
            once(round, &mut sides, folder, self.patience, measured)?;
            measured.run.done()?;
        }
        Ok(())
    }

    fn phases(&self, measured: &mut Measured<'_>) -> Result<()> {
        let shim = self.shim()?;
        measured.program(VMCTL, &self.vmctl, None);
        measured.program(SHIM, &shim.program, None);
        let busybox = self.setting.busybox()?;
        let rootfs = self.setting.rootfs.as_deref();
        let around = Surroundings::new(rootfs, &busybox, self.patience)?;
        let rounds = self.options.all_rounds();
        for round in rounds.each() {
            measured.run.begin("phases", rounds, round)?;
            for turn in turns(2, round.number) {
                interrupt::check()?;
                let by = [SHIM, VMCTL][turn];
                measured.run.now(by);
                let boot = match by {
                    SHIM => ours::by_shim(&around, &shim, &self.config),
                    _ => ours::by_vmctl(&self.vmctl, &self.kept, &self.environment),
                };
                let boot =
                    boot.with_context(|| format!("by {by}, in round {}", round.number + 1))?;
                if round.counts {
                    measured.phased(by, boot);
                }
            }
            measured.run.done()?;
        }
        Ok(())
    }

    fn shim(&self) -> Result<Peer> {
        let given = self.setting.shim.as_deref();
        let program = Setting::ours(given, "containerd-shim-nacre-v1", "--shim")?;
        Ok(self.shim_of(program))
    }

    fn shim_of(&self, program: PathBuf) -> Peer {
        Peer {
            name: "nacre",
            program,
            environment: self.environment.clone(),
            ..Peer::default()
        }
    }
}

/// Boots everything once, with the configuration in the folder.
fn once(
    round: Round,
    sides: &mut [Side],
    folder: &Path,
    patience: Duration,
    measured: &mut Measured<'_>,
) -> Result<()> {
    for turn in turns(sides.len(), round.number) {
        let side = &mut sides[turn];
        if side.left_out {
            continue;
        }
        interrupt::check()?;
        measured.run.now(side.vmm.name());
        let mut command = Command::new(&side.program);
        command
            .args(&side.arguments)
            .env("NACRE_CONFIG", folder.join(CONFIG))
            .current_dir(folder);
        let booted = launched::boot(&mut command, folder, patience)
            .with_context(|| format!("{} failed in round {}", side.vmm.name(), round.number + 1));
        match booted {
            Ok(boot) if round.counts => measured.booted(side.vmm, boot),
            Ok(_) => {}
            Err(error) if side.vmm != Vmm::Ours => {
                // The signal may have been the VMM's as well.
                interrupt::check_after_failure()?;
                measured.run.failed(&format!("{error:#}"));
                side.left_out = true;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn size(file: &Path) -> Result<u64> {
    let metadata =
        std::fs::metadata(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(metadata.len())
}

/// The first line that a program says of its version.
fn version(program: &Path, before: &[String]) -> Option<String> {
    let output = Command::new(program)
        .args(before)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn options(words: &str) -> Result<Options, clap::Error> {
        crate::bench::options(words)
    }

    #[test]
    fn options_have_their_defaults_and_their_bounds() {
        let all = options("").unwrap();
        assert_eq!((all.rounds, all.vcpus, all.memory.mib()), (10, 1, 256));
        assert_eq!(all.vmms().count(), 1);
        let some = options("--firecracker /f --qemu /q --cloud-hypervisor /c").unwrap();
        assert!(some.before(Vmm::Qemu).is_empty());
        let loaded = options("--qemu /ld --qemu-argument --library-path --qemu-argument /l");
        let loaded = loaded.unwrap();
        assert_eq!(loaded.before(Vmm::Qemu), ["--library-path", "/l"]);
        assert!(loaded.before(Vmm::Ours).is_empty());
        let vmms: Vec<Vmm> = some.vmms().map(|(vmm, _)| vmm).collect();
        assert_eq!(
            vmms,
            [Vmm::Ours, Vmm::Qemu, Vmm::Firecracker, Vmm::CloudHypervisor]
        );
        for words in [
            "--vcpus 0",
            "--vcpus 33",
            "--no-init --no-phases",
            "--no-init --qemu /q",
            "--memory x",
            "--no-phases --initrd /i",
            "--qemu-argument -L",
        ] {
            assert!(options(words).is_err(), "{words}");
        }
    }

    #[test]
    fn a_kernel_that_is_given_is_that_of_all_vms() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("vmlinux");
        std::fs::write(&kernel, "k").unwrap();
        let words = format!("--no-phases --vmctl /bin/sh --kernel {}", kernel.display());
        let (given, setting) = (options(&words).unwrap(), Setting::default());
        let bench = Bench::prepare(&given, &setting).unwrap();
        assert_eq!(bench.config.kernel, kernel);
        assert_eq!(bench.environment, [("NACRE_KERNEL", kernel.clone())]);
        assert_eq!(bench.shim_of("/s".into()).environment, bench.environment);
        let words = "--no-phases --vmctl /bin/sh --kernel /nowhere/vmlinux";
        let error = Bench::prepare(&options(words).unwrap(), &setting).map(|_| ());
        assert!(error.unwrap_err().to_string().contains("/nowhere/vmlinux"));
    }

    #[test]
    fn one_of_the_others_that_fails_is_left_out_and_ours_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let side = |vmm, script: &str| Side {
            vmm,
            program: "/bin/sh".into(),
            arguments: vec!["-c".to_owned(), script.to_owned()],
            left_out: false,
        };
        let good = "echo Linux; echo 'nacre-probe: hello'; exec sleep 5";
        let vmms = [Vmm::Ours, Vmm::Qemu];
        let setting = Setting::default();
        let mut measured = Measured::new(&vmms, &options("--qemu /q").unwrap(), &setting);
        let mut sides = [
            side(Vmm::Ours, good),
            side(Vmm::Qemu, "echo no such machine >&2; false"),
        ];
        let mut round = |number, sides: &mut [Side]| {
            let round = Round {
                number,
                counts: number > 0,
            };
            let patience = Duration::from_secs(20);
            once(round, sides, folder.path(), patience, &mut measured)
        };
        for number in 0..3 {
            round(number, &mut sides).unwrap();
        }
        assert!(sides[1].left_out && !sides[0].left_out);
        let error = round(3, &mut [side(Vmm::Ours, "exit 7")]).unwrap_err();
        assert!(error.to_string().contains("nacre failed in round 4"));
        // The round to warm up does not count.
        let document = &measured.run.document;
        assert_eq!(document.tables[0].values("nacre", "to init").len(), 2);
        let text = document.text();
        assert_eq!(text.matches("no such machine").count(), 1, "{text}");
    }

    #[test]
    fn a_program_says_its_version_or_nothing() {
        let line = version(Path::new(env!("CARGO")), &[]).unwrap();
        assert!(line.starts_with("cargo ") && !line.contains('\n'), "{line}");
        assert_eq!(version(Path::new("/nowhere/vmm"), &[]), None);
        // Of the usual programs even `false` says its version.
        let folder = tempfile::tempdir().unwrap();
        let silent = folder.path().join("silent");
        std::fs::write(&silent, "#!/bin/sh\n").unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&silent, executable).unwrap();
        assert_eq!(version(&silent, &[]), None);
        // By a loader, it is still the program's own.
        let words = ["-c", "echo VMM $0 1.0", "--library-path"].map(str::to_owned);
        let line = version(Path::new("/bin/sh"), &words);
        assert_eq!(line.as_deref(), Some("VMM --library-path 1.0"));
    }
}
