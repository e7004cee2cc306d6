//! `cargo xtask image`: the guest kernel and initrd. Builds the agent, fetches a kernel package if none is given, and leaves the rest to
//! the program `nacre-image`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::apt::{self, Release};
use crate::kernel;
use crate::paths;
use crate::run::{self, step};

/// The package whose dependency is the newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Options of `cargo xtask image`.
#[derive(Debug, Default, Args)]
pub struct ImageArgs {
    /// Use this Debian kernel package; it is unpacked, not installed
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vmlinuz", "modules", "release"])]
    deb: Option<PathBuf>,
    /// Use this kernel, a bzImage or an ELF file; with --modules
    #[arg(
        long,
        value_name = "FILE",
        requires = "modules",
        conflicts_with = "release"
    )]
    vmlinuz: Option<PathBuf>,
    /// The kernel's folder lib/modules/RELEASE; with --vmlinuz
    #[arg(long, value_name = "DIR", requires = "vmlinuz")]
    modules: Option<PathBuf>,
    /// The Debian release whose newest cloud kernel is downloaded, or the lean kernel, which is built
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    release: KernelRelease,
    /// One more module in the initrd, with what it depends on; may be given again
    #[arg(long = "module", value_name = "NAME")]
    extra: Vec<String>,
    /// Leave the signatures on the modules, which costs the guest's boot a check of each; by itself only where the configuration beside the kernel says that it loads no module without one
    #[arg(long)]
    keep_signatures: bool,
    /// Use this static program as the agent, instead of building it
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

impl ImageArgs {
    /// That of a release.
    pub fn of(release: KernelRelease) -> Self {
        Self {
            release,
            ..Self::default()
        }
    }
}

/// Kernels that are known to serve as a guest's.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum KernelRelease {
    /// Debian 12's, Linux 6.1
    #[default]
    Bookworm,
    /// Debian 13's, Linux 6.12
    Trixie,
    /// Linux 6.12 of Debian's source with the configuration in firmware/kernel, without modules; builds for ten minutes and more
    Lean,
}

/// Makes the image, or finds it made; prints where it is.
///
/// # Errors
/// When the agent does not build, no kernel is to be had, or the kernel lacks something that a guest needs.
pub fn run(args: &ImageArgs) -> Result<()> {
    make(args, paths::IMAGE)
}

/// Makes the images that the end-to-end suite boots, or finds them made: the usual one, and one of Linux 6.12; and builds the probe,
/// which its benchmark runs in containers.
///
/// # Errors
/// As [`run`].
pub fn of_the_suite() -> Result<()> {
    build_probe()?;
    run(&ImageArgs::default())?;
    let newer = ImageArgs {
        release: KernelRelease::Trixie,
        ..ImageArgs::default()
    };
    make(&newer, paths::NEWER_IMAGE)
}

/// Makes the image of the lean kernel that the soak boots, or finds it made.
///
/// # Errors
/// As [`run`].
pub fn lean_of_the_suite() -> Result<()> {
    make(&ImageArgs::of(KernelRelease::Lean), paths::LEAN_IMAGE)
}

fn make(args: &ImageArgs, out: &str) -> Result<()> {
    let agent = match &args.agent {
        Some(agent) => std::path::absolute(agent)?,
        None => build_agent()?,
    };
    let mut command = run::cargo();
    command
        .args([
            "run",
            "--quiet",
            "--package",
            "nacre-image",
            "--",
            "--agent",
        ])
        .arg(agent);
    command.arg("--out").arg(paths::cache(out));
    match (&args.deb, &args.vmlinuz, &args.modules) {
        (Some(deb), ..) => {
            command.arg("--deb").arg(std::path::absolute(deb)?);
        }
        (None, Some(kernel), Some(modules)) => {
            command.arg("--vmlinuz").arg(std::path::absolute(kernel)?);
            command.arg("--modules").arg(std::path::absolute(modules)?);
        }
        _ => match args.release {
            KernelRelease::Bookworm => of_package(&mut command, Release::Bookworm)?,
            KernelRelease::Trixie => of_package(&mut command, Release::Trixie)?,
            KernelRelease::Lean => {
                let kernel = kernel::lean()?;
                command.arg("--vmlinuz").arg(&kernel.vmlinux);
                command.arg("--modules").arg(&kernel.modules);
            }
        },
    }
    for module in &args.extra {
        command.arg("--module").arg(module);
    }
    if args.keep_signatures {
        command.arg("--keep-signatures");
    }
    run::run(&mut command)
}

fn of_package(command: &mut Command, release: Release) -> Result<()> {
    command
        .arg("--deb")
        .arg(apt::kernel(release, KERNEL)?.path());
    Ok(())
}

/// The usual image of a release with the driver of virtio over PCI, for QEMU; its initrd.
///
/// # Errors
/// As [`run`].
pub fn initrd_with_pci(release: KernelRelease) -> Result<PathBuf> {
    let args = ImageArgs {
        release,
        extra: vec!["virtio_pci".to_owned()],
        ..ImageArgs::default()
    };
    make(&args, paths::PCI_IMAGE)?;
    Ok(paths::cache(paths::PCI_IMAGE).join("current/initrd"))
}

/// Builds the agent as a static program.
fn build_agent() -> Result<PathBuf> {
    step("building the guest's agent");
    build_static("nacre-agent")
}

/// Builds what measures files from within a container or a guest, as a static program.
///
/// # Errors
/// It does not build.
pub fn build_probe() -> Result<PathBuf> {
    step("building the probe");
    build_static(paths::PROBE)
}

fn build_static(package: &str) -> Result<PathBuf> {
    let mut command = run::cargo_static();
    command.args(["build", "--quiet", "--package", package]);
    command.args(["--profile", "agent", "--target", paths::STATIC]);
    run::run(&mut command)?;
    let program = paths::static_program(package);
    if !program.exists() {
        bail!("cargo built {package}, but not as {}", program.display());
    }
    Ok(program)
}
