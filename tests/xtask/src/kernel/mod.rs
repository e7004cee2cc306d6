//! `cargo xtask kernel`: the lean guest kernel, built from Debian's source package with the configuration in `firmware/kernel`. What is
//! made is kept by what it is made of: package, configuration, compiler.

mod kept;
mod needed;
mod tree;
mod why;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::apt::{self, Deb, Release};
use crate::paths;
use crate::run::{Lock, step};
pub use kept::Kernel;
use kept::MadeOf;
use needed::{Config, Needed, Scope};
use tree::Tree;

/// The source package, and the release that it is of.
const SOURCE: (Release, &str) = (Release::Trixie, "linux-source-6.12");
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
    /// Take the source from this package, such as one of Debian's security archive: linux-source-6.12_VERSION_all.deb
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    source: Option<PathBuf>,
    /// Ask the mirror for the newest version of the source, whatever there is already
    #[arg(long, conflicts_with_all = ["config", "source"])]
    newest: bool,
    /// Compilers at a time; as many as there are CPUs, if it is not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    jobs: Option<u32>,
}

/// Does what is asked for; the result is the exit code.
///
/// # Errors
/// The source is not to be had, the configuration lacks something, or the kernel does not build.
pub fn run(args: &KernelArgs) -> Result<i32> {
    if let Some(file) = &args.config {
        return foreign(file);
    }
    if args.newest {
        let (release, package) = SOURCE;
        apt::forget(release, package)?;
        let source = source()?;
        step(format!(
            "the newest source is {} {}",
            source.package, source.version
        ));
    }
    let given = args.source.as_deref().map(Deb::of_file).transpose()?;
    if let Some(other) = given
        .as_ref()
        .filter(|deb| !deb.package.starts_with("linux-source-"))
    {
        bail!(
            "--source {}: the kernel's source is in a package linux-source-VERSION",
            other.path().display()
        );
    }
    let the_source = || given.clone().map_or_else(source, Ok);
    if args.config_only {
        let (tree, _) = resolve(&the_source()?)?;
        println!("{}", tree.config().display());
    } else if args.check {
        check_in(&the_source()?)?;
    } else {
        let jobs = args.jobs.map_or_else(cpus, |jobs| jobs as usize);
        print(&build(given, jobs)?)?;
    }
    Ok(0)
}

/// The kernel, made if it is not there.
///
/// # Errors
/// As [`run`].
pub fn lean() -> Result<Kernel> {
    build(None, cpus())
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Resolves the configuration and holds it against what is needed of it.
///
/// # Errors
/// Every option that is not as it is needed, with what it lacks.
pub fn check() -> Result<()> {
    check_in(&source()?)
}

fn check_in(source: &Deb) -> Result<()> {
    let (tree, needed) = resolve(source)?;
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
        format!(
            "the lean kernel, and the check of its configuration, are made from Debian's package {package} (150 MB), which \
             could not be downloaded; once it is in {}, no network is needed",
            paths::cache("debs").display()
        )
    })
}

/// Resolves the configuration, in the whole source if it is there, else in as much of it as that takes.
fn resolve(source: &Deb) -> Result<(Tree, Needed)> {
    install(&RESOLVING)?;
    // Not the lock of a build, which is held for ten minutes: nothing of a build's folder is touched.
    let _lock = Lock::take(
        &paths::cache("kernel-src/lock-configured"),
        "the folder where the kernel's configuration is resolved",
    )?;
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

/// The kernel, from where it is kept, which takes neither source nor compiler, or built.
fn build(given: Option<Deb>, jobs: usize) -> Result<Kernel> {
    let (release, package) = SOURCE;
    let (all, fragment) = (paths::cache("kernel"), ours("nacre.config"));
    let known = given.clone().or_else(|| apt::known(release, package));
    let version = known.as_ref().map(|source| source.version.as_str());
    if let Some(kernel) = kept::find(&all, &MadeOf::now(package, version, &fragment)?)? {
        return Ok(kernel);
    }
    let tools: Vec<(&str, &str)> = RESOLVING.into_iter().chain(BUILDING).collect();
    install(&tools)?;
    let source = given.map_or_else(source, Ok)?;
    let made_of = MadeOf::now(&source.package, Some(&source.version), &fragment)?;
    let _lock = Lock::take(&paths::cache("kernel-src/lock"), "the kernel's source")?;
    if let Some(kernel) = kept::find(&all, &made_of)? {
        return Ok(kernel);
    }
    let tree = Tree::whole(&source)?;
    resolve_in(&tree)?;
    let release = tree.build(jobs)?;
    kept::keep(&all, made_of, &tree, &release)
}

fn install(tools: &[(&str, &str)]) -> Result<()> {
    apt::ensure_installed(tools).context(
        "the kernel's configuration and the kernel are made with these packages, which could not be installed; once they are, no \
         network is needed",
    )
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
    println!("modules  {}", kernel.modules.display());
    println!(
        "config   {}",
        kernel.vmlinux.with_file_name("config").display()
    );
    Ok(())
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
}
