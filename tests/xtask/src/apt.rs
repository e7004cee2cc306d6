//! Packages of any Debian release, downloaded and unpacked without touching the machine's own installation.
//!
//! A private apt configuration (sources, lists, cache and an empty package database) lives under `target/nacre/apt`. The
//! mirror and its keyring are read from the machine's own sources at run time. What a request resolved to is written down, so that a
//! second run asks nobody.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::paths;
use crate::run::{self, Lock, step};

/// A Debian release, as a set of suites on the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
    /// Debian 13 with its backports preferred.
    TrixieBackports,
    /// Debian 14.
    #[allow(dead_code, reason = "each release is used by some command only")]
    Forky,
}

impl Release {
    fn name(self) -> &'static str {
        match self {
            Release::Bookworm => "bookworm",
            Release::Trixie => "trixie",
            Release::TrixieBackports => "trixie-backports",
            Release::Forky => "forky",
        }
    }

    fn suites(self) -> &'static [&'static str] {
        match self {
            Release::Bookworm => &["bookworm", "bookworm-updates"],
            Release::Trixie => &["trixie", "trixie-updates"],
            Release::TrixieBackports => &["trixie", "trixie-updates", "trixie-backports"],
            Release::Forky => &["forky"],
        }
    }
}

/// A downloaded package.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Deb {
    /// Name of the package.
    pub package: String,
    /// Its version, with epoch and revision.
    pub version: String,
    /// File name in `target/nacre/debs`.
    file: String,
}

impl Deb {
    /// A package that someone else has downloaded.
    ///
    /// # Errors
    /// It is not there, or not called as packages are.
    pub fn of_file(path: &Path) -> Result<Deb> {
        let path = fs::canonicalize(path).with_context(|| format!("reading {}", path.display()))?;
        let name = path.file_name().and_then(|name| name.to_str());
        let (package, version) = name.and_then(parse_name).with_context(|| {
            format!(
                "{} is not called NAME_VERSION_ARCHITECTURE.deb, as Debian's packages are",
                path.display()
            )
        })?;
        Ok(Deb {
            package,
            version,
            file: path.to_string_lossy().into_owned(),
        })
    }

    /// The `.deb` file.
    pub fn path(&self) -> PathBuf {
        // One that is elsewhere has an absolute path, which stays what it is.
        paths::cache("debs").join(&self.file)
    }

    /// The folder with the package's files, unpacked on first use.
    pub fn unpacked(&self) -> Result<PathBuf> {
        let folder = paths::cache("debs").join(self.file.trim_end_matches(".deb"));
        let _lock = lock()?;
        if !folder.exists() {
            let scratch = tempfile::tempdir_in(paths::cache("debs"))?;
            unpack(&self.path(), scratch.path())?;
            fs::rename(scratch.keep(), &folder)?;
        }
        Ok(folder)
    }
}

/// One package, without its dependencies, as a file.
pub fn deb(release: Release, package: &str) -> Result<Deb> {
    let mut debs = fetch(release, &[package], false)?;
    debs.pop()
        .with_context(|| format!("apt resolved {package} of {} to nothing", release.name()))
}

/// What a package was resolved to last, whether the file is still there or not; nobody is asked.
pub fn known(release: Release, package: &str) -> Option<Deb> {
    let text = fs::read_to_string(resolved(release, &[package], false)).ok()?;
    serde_json::from_str::<Vec<Deb>>(&text).ok()?.pop()
}

/// The next request for this package reads the mirror's lists anew.
///
/// # Errors
/// What was written down cannot be removed.
pub fn forget(release: Release, package: &str) -> Result<()> {
    let _lock = lock()?;
    for file in [
        resolved(release, &[package], false),
        paths::cache("apt").join(release.name()).join("updated"),
    ] {
        match fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", file.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// One package, without its dependencies, unpacked.
pub fn unpacked(release: Release, package: &str) -> Result<PathBuf> {
    deb(release, package)?.unpacked()
}

/// Packages with all they depend on, unpacked into one folder that can serve as a root.
pub fn closure(release: Release, packages: &[&str]) -> Result<PathBuf> {
    let debs = fetch(release, packages, true)?;
    let mut hash = Sha256::new();
    debs.iter().for_each(|deb| hash.update(deb.file.as_bytes()));
    let root = paths::cache("roots").join(format!(
        "{}-{}",
        packages[0],
        &format!("{:x}", hash.finalize())[..16]
    ));
    let _lock = lock()?;
    if !root.exists() {
        step(format!(
            "unpacking {} packages for {}",
            debs.len(),
            packages.join(", ")
        ));
        fs::create_dir_all(paths::cache("roots"))?;
        let scratch = tempfile::tempdir_in(paths::cache("roots"))?;
        for deb in &debs {
            unpack(&deb.path(), scratch.path())?;
        }
        fs::rename(scratch.keep(), &root)?;
    }
    Ok(root)
}

/// The package that a release's kernel metapackage (`linux-image-cloud-amd64`) stands for now.
pub fn kernel(release: Release, metapackage: &str) -> Result<Deb> {
    let meta = deb(release, metapackage)?;
    let depends = run::output(
        Command::new("dpkg-deb")
            .arg("-f")
            .arg(meta.path())
            .arg("Depends"),
    )?;
    let package = depends
        .split([',', ' '])
        .find(|word| word.starts_with("linux-image-"));
    deb(
        release,
        package.with_context(|| format!("{metapackage} depends on no kernel: {depends}"))?,
    )
}

/// Installs system packages that are missing, and only these. Each is named with a file that it brings.
pub fn ensure_installed(wanted: &[(&str, &str)]) -> Result<()> {
    let present = |name: &str| {
        let folders = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        if name.starts_with('/') {
            Path::new(name).exists()
        } else {
            folders
                .iter()
                .any(|folder| Path::new(folder).join(name).exists())
        }
    };
    let missing: Vec<&str> = wanted
        .iter()
        .filter(|(_, file)| !present(file))
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(format!(
        "installing what this machine lacks: {}",
        missing.join(" ")
    ));
    let install = || {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(std::process::Stdio::null());
        run::run(
            command
                .args(["-q", "-y", "--no-install-recommends", "install"])
                .args(&missing),
        )
    };
    if install().is_err() {
        run::run(Command::new("apt-get").args(["-q", "update"]))?;
        install()?;
    }
    Ok(())
}

fn lock() -> Result<Lock> {
    Lock::take(&paths::cache("apt/lock"), "the package cache")
}

fn unpack(deb: &Path, folder: &Path) -> Result<()> {
    run::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(folder))?;
    // The tree's top has the mode that the umask left to the scratch folder.
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The record of what a request resolved to.
fn resolved(release: Release, packages: &[&str], with_dependencies: bool) -> PathBuf {
    let all = if with_dependencies { "+all" } else { "" };
    paths::cache("apt")
        .join(release.name())
        .join("resolved")
        .join(format!("{}{all}.json", packages.join("+")))
}

/// Resolves a request, from the record of an earlier one if its files are still there, and downloads what is missing.
fn fetch(release: Release, packages: &[&str], with_dependencies: bool) -> Result<Vec<Deb>> {
    let record = resolved(release, packages, with_dependencies);
    let _lock = lock()?;
    if let Ok(text) = fs::read_to_string(&record)
        && let Ok(debs) = serde_json::from_str::<Vec<Deb>>(&text)
        && debs.iter().all(|deb| deb.path().exists())
    {
        return Ok(debs);
    }
    let apt = Apt::open(release)?;
    let debs = match apt.resolve_and_download(packages, with_dependencies) {
        Ok(debs) => debs,
        Err(error) if apt.fresh => return Err(error),
        Err(_) => {
            // Lists of an older day may name files that the mirror no longer has.
            apt.update()?;
            apt.resolve_and_download(packages, with_dependencies)?
        }
    };
    fs::create_dir_all(record.parent().context("record without a folder")?)?;
    fs::write(&record, serde_json::to_string_pretty(&debs)?)?;
    Ok(debs)
}

/// The private apt of one release.
struct Apt {
    release: Release,
    config: PathBuf,
    /// The lists were downloaded by this process.
    fresh: bool,
}

impl Apt {
    fn open(release: Release) -> Result<Apt> {
        let root = paths::cache("apt").join(release.name());
        for folder in ["lists/partial", "cache/archives/partial", "none.d"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::create_dir_all(paths::cache("debs"))?;
        fs::write(root.join("status"), "")?;
        let mirror = machine_mirror()?;
        let options = match &mirror.signed_by {
            Some(keyring) => format!("[arch=amd64 target=Packages signed-by={keyring}]"),
            None => "[arch=amd64 target=Packages]".to_owned(),
        };
        let lines = release
            .suites()
            .iter()
            .map(|suite| format!("deb {options} {} {suite} main\n", mirror.uri));
        let sources: String = lines.collect();
        fs::write(root.join("sources.list"), sources)?;
        // Given by -c, so it is read last and wins over the machine's own options, which still set proxies and the like.
        let at = root.display();
        let config = root.join("apt.conf");
        fs::write(
            &config,
            format!(
                "Dir::Etc::sourcelist \"{at}/sources.list\";\nDir::Etc::sourceparts \"-\";\nDir::Etc::preferences \"{at}/none\";\n\
                 Dir::Etc::preferencesparts \"{at}/none.d\";\nDir::State \"{at}\";\nDir::State::lists \"{at}/lists\";\n\
                 Dir::State::status \"{at}/status\";\nDir::Cache \"{at}/cache\";\nDir::Cache::pkgcache \"pkgcache.bin\";\n\
                 Dir::Cache::srcpkgcache \"srcpkgcache.bin\";\nAPT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; }};\n\
                 APT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\nAcquire::Retries \"3\";\n\
                 #clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n#clear DPkg::Post-Invoke;\n"
            ),
        )?;
        let mut apt = Apt {
            release,
            config,
            fresh: false,
        };
        let stamp = root.join("updated");
        let written = fs::metadata(&stamp).and_then(|metadata| metadata.modified());
        let recent = written.is_ok_and(|time| {
            time.elapsed()
                .is_ok_and(|age| age.as_secs() < 7 * 24 * 3600)
        });
        if !recent {
            apt.update()?;
            apt.fresh = true;
        }
        Ok(apt)
    }

    fn update(&self) -> Result<()> {
        step(format!(
            "reading the package lists of Debian {}",
            self.release.name()
        ));
        run::run(
            self.command("apt-get")
                .args(["-q", "update"])
                .stdout(std::io::stderr()),
        )?;
        Ok(fs::write(self.config.with_file_name("updated"), "")?)
    }

    fn resolve_and_download(&self, packages: &[&str], with_dependencies: bool) -> Result<Vec<Deb>> {
        let wanted: Vec<String> = if with_dependencies {
            let plan = run::output(
                self.command("apt-get")
                    .args(["-s", "--no-install-recommends", "install"])
                    .args(packages),
            )?;
            plan.lines().filter_map(parse_planned).collect()
        } else {
            packages
                .iter()
                .map(|package| (*package).to_owned())
                .collect()
        };
        if wanted.is_empty() {
            bail!(
                "apt resolved {} of {} to nothing",
                packages.join(", "),
                self.release.name()
            );
        }
        let uris = run::output(
            self.command("apt-get")
                .args(["--print-uris", "download"])
                .args(&wanted),
        )?;
        let debs: Vec<Deb> = uris.lines().filter_map(parse_uri).collect();
        if debs.len() != wanted.len() {
            bail!(
                "apt named {} files for {} packages of {}",
                debs.len(),
                wanted.len(),
                self.release.name()
            );
        }
        let missing: Vec<&Deb> = debs.iter().filter(|deb| !deb.path().exists()).collect();
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(|deb| deb.package.as_str()).collect();
            step(format!(
                "downloading {} of Debian {}",
                shorten(&names),
                self.release.name()
            ));
            let scratch = tempfile::tempdir_in(paths::cache("debs"))?;
            let pinned = missing
                .iter()
                .map(|deb| format!("{}={}", deb.package, deb.version));
            let mut command = self.command("apt-get");
            command
                .current_dir(scratch.path())
                .args(["-q", "download"])
                .args(pinned)
                .stdout(std::io::stderr());
            run::run(&mut command)?;
            for deb in missing {
                fs::rename(scratch.path().join(&deb.file), deb.path())
                    .with_context(|| format!("apt did not download {}", deb.file))?;
            }
        }
        Ok(debs)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(&self.config)
            .env("LC_ALL", "C")
            .stdin(std::process::Stdio::null());
        if self.release == Release::TrixieBackports {
            command.args(["-t", "trixie-backports"]);
        }
        command
    }
}

fn shorten(names: &[&str]) -> String {
    match names.len() {
        0..=6 => names.join(" "),
        more => format!("{} and {} more", names[..5].join(" "), more - 5),
    }
}

/// A line of `apt-get -s install`: `Inst NAME (VERSION RELEASE [ARCH]) …`, as `NAME=VERSION`.
fn parse_planned(line: &str) -> Option<String> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
    Some(format!("{name}={}", rest.split_whitespace().next()?))
}

/// A line of `apt-get --print-uris download`: `'URI' NAME_VERSION_ARCH.deb SIZE HASH`.
fn parse_uri(line: &str) -> Option<Deb> {
    let file = line.strip_prefix('\'')?.split_whitespace().nth(1)?;
    let (package, version) = parse_name(file)?;
    Some(Deb {
        package,
        version,
        file: file.into(),
    })
}

/// Package and version of a file `NAME_VERSION_ARCH.deb`.
fn parse_name(file: &str) -> Option<(String, String)> {
    let mut parts = file.strip_suffix(".deb")?.split('_');
    let (package, version) = (parts.next()?, parts.next()?);
    parts
        .next()
        .map(|_| (package.to_owned(), version.replace("%3a", ":")))
}

/// Where the machine's own packages come from.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    signed_by: Option<String>,
}

fn machine_mirror() -> Result<Mirror> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let found = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => mirror_of_list(&text),
            Some("sources") => mirror_of_deb822(&text),
            _ => None,
        };
        if let Some(mirror) = found {
            return Ok(mirror);
        }
    }
    bail!(
        "no Debian mirror in /etc/apt/sources.list or /etc/apt/sources.list.d: this needs a Debian machine with a `deb` source of its release"
    )
}

/// Whether these are the suites and components of a Debian release itself, rather than its security archive or a third party.
fn is_debian<'a>(
    mut suites: impl Iterator<Item = &'a str>,
    mut components: impl Iterator<Item = &'a str>,
) -> bool {
    const KNOWN: [&str; 8] = [
        "bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable",
    ];
    suites.any(|suite| KNOWN.contains(&suite)) && components.any(|component| component == "main")
}

fn mirror_of_list(text: &str) -> Option<Mirror> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(bracketed) => bracketed.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        let signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(str::to_owned);
        is_debian(std::iter::once(suite), words).then(|| Mirror {
            uri: uri.to_owned(),
            signed_by,
        })
    })
}

fn mirror_of_deb822(text: &str) -> Option<Mirror> {
    text.split("\n\n").find_map(|stanza| {
        let lines = || stanza.lines().filter(|line| !line.starts_with('#'));
        let field = |name: &str| {
            lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name)
                    .then(|| value.trim().to_owned())
            })
        };
        let on = !field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        let (types, uris, suites, components) = (
            field("Types")?,
            field("URIs")?,
            field("Suites")?,
            field("Components")?,
        );
        let fits = on
            && types.split_whitespace().any(|kind| kind == "deb")
            && is_debian(suites.split_whitespace(), components.split_whitespace());
        let signed_by = field("Signed-By").filter(|value| value.starts_with('/'));
        fits.then(|| {
            Some(Mirror {
                uri: uris.split_whitespace().next()?.to_owned(),
                signed_by,
            })
        })?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deb822_security_archive_and_comments_are_passed_over() {
        let text = "Types: deb\nURIs: http://m.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\n# note: x\nURIs: http://m.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n";
        let expected = Mirror {
            uri: "http://m.example/debian".into(),
            signed_by: Some("/k.gpg".into()),
        };
        assert_eq!(mirror_of_deb822(text), Some(expected));
        assert_eq!(
            mirror_of_deb822(&text.replace("# note: x", "Enabled: no")),
            None
        );
    }

    #[test]
    fn one_line_sources_with_and_without_options() {
        let text = "# deb http://a.example/debian bookworm main\ndeb-src http://b.example/debian bookworm main\n\
                    deb http://c.example/x nodistro main\ndeb [arch=amd64 signed-by=/k.gpg] http://d.example/debian bookworm main contrib\n";
        let expected = Mirror {
            uri: "http://d.example/debian".into(),
            signed_by: Some("/k.gpg".into()),
        };
        assert_eq!(mirror_of_list(text), Some(expected));
        assert_eq!(
            mirror_of_list("deb http://e.example/debian trixie main")
                .map(|mirror| mirror.signed_by),
            Some(None)
        );
    }

    #[test]
    fn a_package_that_is_elsewhere_stays_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("linux-source-6.12_6.12.117-2_all.deb");
        assert!(Deb::of_file(&file).is_err(), "it is not there");
        fs::write(&file, "").unwrap();
        let deb = Deb::of_file(&file).unwrap();
        assert_eq!(deb.path(), file.canonicalize().unwrap());
        assert_eq!(
            (&*deb.package, &*deb.version),
            ("linux-source-6.12", "6.12.117-2")
        );
        for name in ["linux.tar.xz", "linux-source-6.12.deb", "linux_6.12.deb"] {
            let file = folder.path().join(name);
            fs::write(&file, "").unwrap();
            let error = Deb::of_file(&file).unwrap_err().to_string();
            assert!(error.contains("NAME_VERSION_ARCHITECTURE.deb"), "{error}");
        }
    }

    #[test]
    fn lines_of_apt_are_understood() {
        assert_eq!(
            parse_planned("Inst libc6 (2.36-9+deb12u10 Debian:12.10/stable [amd64])").as_deref(),
            Some("libc6=2.36-9+deb12u10")
        );
        assert_eq!(parse_planned("Conf libc6 (2.36)"), None);
        let deb =
            parse_uri("'http://m.example/q.deb' qemu_1%3a10.0+ds_amd64.deb 12 SHA256:0").unwrap();
        assert_eq!(
            (
                deb.package.as_str(),
                deb.version.as_str(),
                deb.file.as_str()
            ),
            ("qemu", "1:10.0+ds", "qemu_1%3a10.0+ds_amd64.deb")
        );
    }
}
