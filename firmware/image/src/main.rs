//! `nacre-image`: makes a guest's kernel and initrd from a kernel package, or
//! from a kernel and its modules folder. Thin over the library.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Parser;
use nacre_image::{KernelSource, Request};

/// Makes vmlinux, initrd and manifest.json for nacre's guests.
#[derive(Debug, Parser)]
#[command(name = "nacre-image", version)]
struct Options {
    /// A Debian kernel package; it is unpacked, not installed.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vmlinuz", "modules"])]
    deb: Option<PathBuf>,
    /// A kernel, as bzImage or ELF file; with --modules.
    #[arg(long, value_name = "FILE", requires = "modules")]
    vmlinuz: Option<PathBuf>,
    /// The kernel's folder lib/modules/RELEASE; with --vmlinuz.
    #[arg(long, value_name = "DIR", requires = "vmlinuz")]
    modules: Option<PathBuf>,
    /// The agent's static binary, which becomes the guest's init.
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// One more module, with what it depends on; may be given again.
    #[arg(long = "module", value_name = "NAME")]
    extra: Vec<String>,
    /// Leave the signatures on the modules, which costs the guest's boot a check of each; by itself only where the
    /// configuration beside the kernel says that it loads no module without one.
    #[arg(long)]
    keep_signatures: bool,
    /// Where DIGEST/ and the symlink current are made.
    #[arg(long, value_name = "DIR", default_value = "target/nacre/image")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let source = match (options.deb, options.vmlinuz, options.modules) {
        (Some(deb), None, None) => KernelSource::Deb(deb),
        (None, Some(kernel), Some(modules)) => KernelSource::Files { kernel, modules },
        _ => bail!("give a kernel: --deb FILE, or --vmlinuz FILE with --modules DIR"),
    };
    let image = nacre_image::make(&Request {
        source,
        agent: options.agent,
        modules: options.extra,
        keep_signatures: options.keep_signatures,
        out: options.out,
    })?;
    let manifest = &image.manifest;
    println!("kernel   {}", manifest.kernel.release);
    for (name, size) in [
        ("vmlinux", manifest.kernel.vmlinux.size),
        ("initrd", manifest.initrd.size),
    ] {
        println!(
            "{name:<8} {} ({:.1} MiB)",
            image.dir.join(name).display(),
            size as f64 / 1048576.0
        );
    }
    let names: Vec<&str> = manifest
        .modules
        .iter()
        .map(|module| module.name.as_str())
        .collect();
    println!("modules  {}", names.join(" "));
    if !manifest.built_in.is_empty() {
        println!("built in {}", manifest.built_in.join(" "));
    }
    if !manifest.missing.is_empty() {
        println!("without  {}", manifest.missing.join(" "));
    }
    println!(
        "image    {}{}",
        image.dir.display(),
        if image.cached { " (cached)" } else { "" }
    );
    Ok(())
}
