//! `cargo xtask kernel`: the lean guest kernel, built from Debian's source package with the configuration in `firmware/kernel`. What is
//! made is kept by the digest of what it is made of: package, configuration, compiler.

mod needed;
mod tree;
mod why;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use sha2::{Digest, Sha256};

use crate::apt::{self, Deb, Release};
use crate::paths;
use crate::run::{self, Lock, step};
use needed::{Config, Needed, Scope};
use tree::Tree;

/// The source package, and the release that it is of.
const SOURCE: (Release, &str) = (Release::Trixie, "linux-source-6.12");
/// Version of what is made; a change of it makes a new kernel.
const FORMAT: u32 = 1;
/// What the configuration is resolved with, and a file that each brings.
const RESOLVING: [(&str, &str); 6] = [
    ("gcc", "gcc"),
    ("libc6-dev", "/usr/include/stdio.h"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("xz-utils", "xz"),
];
/// What the kernel is built with beside that.
const BUILDING: [(&str, &str); 4] = [
    ("bc", "bc"),
    ("binutils", "strip"),
    ("libelf-dev", "/usr/include/gelf.h"),
    ("perl-base", "perl"),
];

/// Options of `cargo xtask kernel`.
#[derive(Debug, Default, Args)]
pub struct KernelArgs {
    /// Resolve the configuration and hold it against firmware/kernel/needed; nothing is built
    #[arg(long)]
    check: bool,
    /// Resolve the configuration, and print where it is
    #[arg(long, conflicts_with = "check")]
    config_only: bool,
    /// Hold the configuration of another kernel (/boot/config-…) against what guests need
    #[arg(long, value_name = "FILE", conflicts_with_all = ["check", "config_only", "jobs"])]
    config: Option<PathBuf>,
    /// Compilers at a time; as many as there are CPUs, if it is not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    jobs: Option<u32>,
}

/// A kernel that is there.
#[derive(Debug)]
pub struct Kernel {
    /// The ELF file.
    pub vmlinux: PathBuf,
    /// The folder that is called by the kernel's release and lists what is built in; it has no modules.
    pub modules: PathBuf,
}

/// Does what is asked for; the result is the exit code.
///
/// # Errors
/// The source is not to be had, the configuration lacks something, or the kernel does not build.
pub fn run(args: &KernelArgs) -> Result<i32> {
    if let Some(file) = &args.config {
        return foreign(file);
    }
    if args.config_only {
        let (tree, _) = resolve(&source()?)?;
        println!("{}", tree.config().display());
    } else if args.check {
        check()?;
    } else {
        let jobs = match args.jobs {
            Some(jobs) => jobs as usize,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let kernel = build(jobs)?;
        print(&kernel)?;
    }
    Ok(0)
}

/// The kernel, made if it is not there.
///
/// # Errors
/// As [`run`].
pub fn lean() -> Result<Kernel> {
    build(std::thread::available_parallelism().map_or(1, usize::from))
}

/// Resolves the configuration and holds it against what is needed of it.
///
/// # Errors
/// Every option that is not as it is needed, with what it lacks.
pub fn check() -> Result<()> {
    let (tree, needed) = resolve(&source()?)?;
    step(format!(
        "the configuration has all {} options that guests need: {}",
        needed.len(),
        tree.config().display()
    ));
    Ok(())
}

/// Holds the configuration of any kernel against what guests need; the result is the exit code.
fn foreign(file: &Path) -> Result<i32> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let config = Config::parse(&text);
    if config.is_empty() {
        bail!(
            "{} is not the configuration of a kernel: no line of it is CONFIG_NAME=VALUE",
            file.display()
        );
    }
    let needed = Needed::read(&ours("needed"))?;
    let mut code = 0;
    for (scope, what) in [
        (Scope::Guest, "without it nacre's guests do not work"),
        (Scope::Containers, "containers that use it fail"),
    ] {
        for option in needed
            .of(scope)
            .filter(|option| !option.holds(&config, true))
        {
            println!("{}; {what}", option.complaint(&config));
            code |= i32::from(scope == Scope::Guest);
        }
    }
    if code == 0 {
        println!("{} can be the kernel of a guest", file.display());
    }
    Ok(code)
}

/// A file of `firmware/kernel`.
fn ours(file: &str) -> PathBuf {
    paths::workspace().join("firmware/kernel").join(file)
}

fn source() -> Result<Deb> {
    let (release, package) = SOURCE;
    apt::deb(release, package).with_context(|| {
        format!("the lean kernel is built from Debian's package {package}, which is not to be had")
    })
}

/// Resolves the configuration, in the whole source if it is there, else in as much of it as that takes.
fn resolve(source: &Deb) -> Result<(Tree, Needed)> {
    apt::ensure_installed(&RESOLVING)?;
    let _lock = lock()?;
    let tree = Tree::for_configuration(source)?;
    let needed = resolve_in(&tree)?;
    Ok((tree, needed))
}

fn resolve_in(tree: &Tree) -> Result<Needed> {
    step("resolving the kernel's configuration");
    let fragment = ours("nacre.config");
    tree.configure(&fragment)?;
    let config = tree.config();
    let text =
        fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?;
    let config = Config::parse(&text);
    let (needed, asked) = (Needed::read(&ours("needed"))?, Config::read(&fragment)?);
    let mut wrong = Vec::new();
    for option in needed.all().filter(|option| !option.holds(&config, false)) {
        let why = why::lacks(&tree.source, &option.name, &asked, &config)?;
        wrong.push(format!("{}; {why}", option.complaint(&config)));
    }
    // What was asked for and came out otherwise is a mistake too, needed or not.
    for (name, value) in asked.differing(&config) {
        if needed.all().any(|option| option.name == name) {
            continue;
        }
        let why = why::lacks(&tree.source, name, &asked, &config)?;
        wrong.push(format!(
            "{name}={value} of {} came out as {}; {why}",
            fragment.display(),
            config.show(name)
        ));
    }
    match wrong.len() {
        0 => Ok(needed),
        number => bail!(
            "{number} options of the kernel are not as they should be:\n  {}",
            wrong.join("\n  ")
        ),
    }
}

fn build(jobs: usize) -> Result<Kernel> {
    let tools: Vec<(&str, &str)> = RESOLVING.into_iter().chain(BUILDING).collect();
    apt::ensure_installed(&tools)?;
    let source = source()?;
    let digest = digest(&source)?;
    let folder = paths::cache("kernel").join(&digest);
    if let Some(kernel) = made_already(&folder)? {
        return Ok(kernel);
    }
    let _lock = lock()?;
    if let Some(kernel) = made_already(&folder)? {
        return Ok(kernel);
    }
    let tree = Tree::whole(&source)?;
    resolve_in(&tree)?;
    let release = tree.build(jobs)?;
    keep(&tree, &release, &folder)?;
    made_already(&folder)?.with_context(|| format!("no kernel in {}", folder.display()))
}

/// Everything that the kernel depends on, as far as it differs from one run to the next.
fn digest(source: &Deb) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("nacre kernel {FORMAT}\n"));
    hash.update(format!("{} {}\n", source.package, source.version));
    for tool in ["gcc", "ld"] {
        let version = run::output(Command::new(tool).arg("--version"))?;
        hash.update(version.lines().next().unwrap_or_default());
        hash.update("\n");
    }
    let fragment = ours("nacre.config");
    hash.update(fs::read(&fragment).with_context(|| format!("reading {}", fragment.display()))?);
    Ok(format!("{:x}", hash.finalize())[..32].to_owned())
}

/// Puts what was built where it is kept: all of it, or nothing.
fn keep(tree: &Tree, release: &str, folder: &Path) -> Result<()> {
    let parent = paths::cache("kernel");
    fs::create_dir_all(&parent).with_context(|| format!("making {}", parent.display()))?;
    let scratch = tempfile::tempdir_in(&parent)?;
    run::output(
        Command::new("strip")
            .args(["--strip-all", "--remove-section=.comment", "-o"])
            .arg(scratch.path().join("vmlinux"))
            .arg(tree.build.join("vmlinux")),
    )?;
    let modules = scratch.path().join("modules").join(release);
    fs::create_dir_all(&modules)?;
    for (from, to) in [
        (tree.config(), scratch.path().join("config")),
        (
            tree.build.join("modules.builtin"),
            modules.join("modules.builtin"),
        ),
        (
            tree.build.join("modules.builtin.modinfo"),
            modules.join("modules.builtin.modinfo"),
        ),
    ] {
        fs::copy(&from, to).with_context(|| format!("keeping {}", from.display()))?;
    }
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
    fs::rename(scratch.keep(), folder)
        .with_context(|| format!("putting the kernel to {}", folder.display()))
}

/// The kernel of a folder, which is whole if it is there at all.
fn made_already(folder: &Path) -> Result<Option<Kernel>> {
    let vmlinux = folder.join("vmlinux");
    if !vmlinux.exists() {
        return Ok(None);
    }
    let modules = folder.join("modules");
    let release = fs::read_dir(&modules)
        .and_then(|mut entries| entries.next().transpose())
        .with_context(|| format!("reading {}", modules.display()))?
        .with_context(|| format!("{} is empty; remove its parent", modules.display()))?;
    Ok(Some(Kernel {
        vmlinux,
        modules: release.path(),
    }))
}

fn print(kernel: &Kernel) -> Result<()> {
    let size = fs::metadata(&kernel.vmlinux)
        .with_context(|| format!("reading {}", kernel.vmlinux.display()))?
        .len();
    let release = kernel.modules.file_name().unwrap_or_default();
    println!("kernel   {}", release.display());
    println!(
        "vmlinux  {} ({:.1} MiB)",
        kernel.vmlinux.display(),
        size as f64 / 1048576.0
    );
    println!(
        "config   {}",
        kernel.vmlinux.with_file_name("config").display()
    );
    Ok(())
}

fn lock() -> Result<Lock> {
    Lock::take(&paths::cache("kernel-src/lock"), "the kernel's source")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is checked must be asked for, or a change of Debian's defaults would go by unseen.
    #[test]
    fn the_configuration_does_not_contradict_what_is_needed() {
        let needed = Needed::read(&ours("needed")).unwrap();
        let asked = Config::read(&ours("nacre.config")).unwrap();
        let wrong: Vec<String> = needed
            .all()
            .filter(|option| asked.get(&option.name).is_some() && !option.holds(&asked, false))
            .map(|option| option.complaint(&asked))
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(needed.len() > 100, "{}", needed.len());
    }

    #[test]
    fn a_kernel_is_found_by_its_vmlinux_and_called_by_its_release() {
        let folder = tempfile::tempdir().unwrap();
        assert!(made_already(folder.path()).unwrap().is_none());
        fs::write(folder.path().join("vmlinux"), "x").unwrap();
        assert!(made_already(folder.path()).is_err(), "no modules folder");
        fs::create_dir_all(folder.path().join("modules/6.12.1-nacre")).unwrap();
        let kernel = made_already(folder.path()).unwrap().unwrap();
        assert!(kernel.modules.ends_with("modules/6.12.1-nacre"));
    }
}
