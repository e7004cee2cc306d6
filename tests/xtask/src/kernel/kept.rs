//! Kernels that were built: each in a folder of its own below `target/nacre/kernel`, with what it was made of. It takes neither the source nor
//! a compiler to find one again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::tree::Tree;
use crate::run::{self, step};

/// Version of what is kept; a change of it makes a new kernel.
const FORMAT: u32 = 2;
/// The file of a folder that says what its kernel is, and is made of.
const RECORD: &str = "made-of.json";

/// A kernel that is there.
#[derive(Debug)]
pub struct Kernel {
    /// The ELF file.
    pub vmlinux: PathBuf,
    /// The folder that is called by the kernel's release and lists what is built in; it has no modules.
    pub modules: PathBuf,
}

/// Everything that a kernel depends on, as far as it differs from one run to the next. What is not known, since it is
/// not installed or was never asked for, is absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeOf {
    format: u32,
    /// Source package and its version.
    source: Option<String>,
    /// What the compiler and the linker say of themselves.
    gcc: Option<String>,
    ld: Option<String>,
    /// Digest of the fragment.
    configuration: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    made_of: MadeOf,
    /// Digest of `vmlinux`.
    vmlinux: String,
}

impl MadeOf {
    /// What a kernel would be made of now, from this version of the source package and with this fragment.
    ///
    /// # Errors
    /// The fragment cannot be read.
    pub fn now(package: &str, version: Option<&str>, fragment: &Path) -> Result<MadeOf> {
        let says = |tool| {
            let text = run::output(Command::new(tool).arg("--version")).ok()?;
            text.lines().next().map(str::to_owned)
        };
        Ok(MadeOf {
            format: FORMAT,
            source: version.map(|version| format!("{package} {version}")),
            gcc: says("gcc"),
            ld: says("ld"),
            configuration: digest(fragment)
                .with_context(|| format!("reading {}", fragment.display()))?,
        })
    }

    /// Whether a kernel that was made of the other is what one that is made of this would be, as far as is known.
    fn allows(&self, other: &MadeOf) -> bool {
        let same =
            |ours: &Option<String>, theirs: &Option<String>| ours.is_none() || ours == theirs;
        self.format == other.format
            && self.configuration == other.configuration
            && same(&self.source, &other.source)
            && same(&self.gcc, &other.gcc)
            && same(&self.ld, &other.ld)
    }

    fn name(&self) -> Result<String> {
        if self.source.is_none() || self.gcc.is_none() || self.ld.is_none() {
            bail!("what the kernel is made of is not known: {self:?}");
        }
        let hash = Sha256::digest(serde_json::to_vec(self)?);
        Ok(format!("{hash:x}")[..32].to_owned())
    }
}

/// The kernel that was made last of what is asked for, if there is one that is whole. Those that are not are passed over.
///
/// # Errors
/// The folder cannot be read.
pub fn find(all: &Path, wanted: &MadeOf) -> Result<Option<Kernel>> {
    let mut found: Option<(SystemTime, Kernel)> = None;
    for folder in folders(all)? {
        let Ok(record) = record(&folder) else {
            continue;
        };
        if !wanted.allows(&record.made_of) {
            continue;
        }
        let made = fs::metadata(folder.join(RECORD))?.modified()?;
        if found.as_ref().is_some_and(|(newest, _)| *newest >= made) {
            continue;
        }
        match whole(&folder, &record) {
            Ok(kernel) => found = Some((made, kernel)),
            Err(error) => step(format!(
                "passing over a kernel that is not whole: {error:#}"
            )),
        }
    }
    Ok(found.map(|(_, kernel)| kernel))
}

/// Puts what was built where it is kept: all of it, or nothing. What is there by its name, and was not found whole, goes.
/// No other process may do so at the same time.
///
/// # Errors
/// What was built cannot be copied, or not everything that it is made of is known.
pub fn keep(all: &Path, made_of: MadeOf, tree: &Tree, release: &str) -> Result<Kernel> {
    fs::create_dir_all(all).with_context(|| format!("making {}", all.display()))?;
    let scratch = tempfile::tempdir_in(all)?;
    run::output(
        Command::new("strip")
            .args(["--strip-all", "--remove-section=.comment", "-o"])
            .arg(scratch.path().join("vmlinux"))
            .arg(tree.build.join("vmlinux")),
    )?;
    let modules = scratch.path().join("modules").join(release);
    fs::create_dir_all(&modules)?;
    let builtin = ["modules.builtin", "modules.builtin.modinfo"];
    let copies = builtin.map(|file| (tree.build.join(file), modules.join(file)));
    for (from, to) in copies
        .into_iter()
        .chain([(tree.config(), scratch.path().join("config"))])
    {
        fs::copy(&from, to).with_context(|| format!("keeping {}", from.display()))?;
    }
    put(all, made_of, scratch)
}

/// Completes a scratch folder by its record, and gives it its name once all of it is on the disk.
fn put(all: &Path, made_of: MadeOf, scratch: tempfile::TempDir) -> Result<Kernel> {
    let folder = all.join(made_of.name()?);
    let record = Record {
        made_of,
        vmlinux: digest(&scratch.path().join("vmlinux")).context("reading what was built")?,
    };
    let written = serde_json::to_string_pretty(&record)?;
    fs::write(scratch.path().join(RECORD), written + "\n")?;
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
    sync(scratch.path()).context("writing what was built to the disk")?;
    if folder.exists() {
        step(format!("removing {}, which is not whole", folder.display()));
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::rename(scratch.keep(), &folder)
        .and_then(|()| File::open(all)?.sync_all())
        .with_context(|| format!("putting the kernel to {}", folder.display()))?;
    whole(&folder, &record)
}

fn folders(all: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(all) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<_>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
    .with_context(|| format!("reading {}", all.display()))
}

fn record(folder: &Path) -> Result<Record> {
    let text = fs::read_to_string(folder.join(RECORD))?;
    Ok(serde_json::from_str(&text)?)
}

/// The kernel of a folder, to the last byte the one that was put there.
fn whole(folder: &Path, record: &Record) -> Result<Kernel> {
    let vmlinux = folder.join("vmlinux");
    let found = digest(&vmlinux).with_context(|| format!("reading {}", vmlinux.display()))?;
    if found != record.vmlinux {
        bail!("{} is not what was built", vmlinux.display());
    }
    let modules = folder.join("modules");
    let release = fs::read_dir(&modules)
        .and_then(|mut entries| entries.next().transpose())
        .with_context(|| format!("reading {}", modules.display()))?
        .with_context(|| format!("{} is empty", modules.display()))?;
    let builtin = release.path().join("modules.builtin");
    if !builtin.is_file() {
        bail!("there is no {}", builtin.display());
    }
    Ok(Kernel {
        vmlinux,
        modules: release.path(),
    })
}

fn digest(file: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(file)?, &mut hash)?;
    Ok(format!("{:x}", hash.finalize()))
}

/// Has a folder on the disk with all that is in it.
fn sync(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            sync(&entry?.path())?;
        }
    }
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(version: &str) -> MadeOf {
        MadeOf {
            format: FORMAT,
            source: Some(format!("linux-source {version}")),
            gcc: Some("gcc 14".to_owned()),
            ld: Some("ld 2".to_owned()),
            configuration: "c".to_owned(),
        }
    }

    fn made(all: &Path, made_of: MadeOf, vmlinux: &str) -> Result<Kernel> {
        let scratch = tempfile::tempdir_in(all).unwrap();
        let modules = scratch.path().join("modules/6.12.1-nacre");
        fs::create_dir_all(&modules).unwrap();
        fs::write(modules.join("modules.builtin"), "").unwrap();
        fs::write(scratch.path().join("vmlinux"), vmlinux).unwrap();
        put(all, made_of, scratch)
    }

    fn found(all: &Path, wanted: &MadeOf) -> Option<String> {
        let kernel = find(all, wanted).unwrap()?;
        assert!(kernel.modules.ends_with("modules/6.12.1-nacre"));
        Some(fs::read_to_string(kernel.vmlinux).unwrap())
    }

    #[test]
    fn a_kernel_is_found_by_what_is_known_of_what_it_is_made_of() {
        let all = tempfile::tempdir().unwrap();
        assert_eq!(found(&all.path().join("none"), &of("1")), None);
        made(all.path(), of("1"), "one").unwrap();
        assert_eq!(found(all.path(), &of("1")).as_deref(), Some("one"));
        assert_eq!(found(all.path(), &of("2")), None, "another source");
        let nothing_installed = MadeOf {
            source: None,
            gcc: None,
            ld: None,
            ..of("")
        };
        assert_eq!(
            found(all.path(), &nothing_installed).as_deref(),
            Some("one")
        );
        for other in [
            MadeOf {
                configuration: "d".to_owned(),
                ..nothing_installed.clone()
            },
            MadeOf {
                gcc: Some("gcc 15".to_owned()),
                ..nothing_installed.clone()
            },
            MadeOf {
                ld: Some("ld 3".to_owned()),
                ..nothing_installed.clone()
            },
            MadeOf {
                format: FORMAT + 1,
                ..nothing_installed.clone()
            },
        ] {
            assert_eq!(found(all.path(), &other), None, "{other:?}");
        }
        // The second is the later one; a clock that is coarse does not hide it.
        made(all.path(), of("2"), "two").unwrap();
        let first = all.path().join(of("1").name().unwrap()).join(RECORD);
        let hour_ago = SystemTime::now() - std::time::Duration::from_secs(3600);
        let file = File::options().write(true).open(first).unwrap();
        file.set_modified(hour_ago).unwrap();
        assert_eq!(
            found(all.path(), &nothing_installed).as_deref(),
            Some("two")
        );
        assert!(made(all.path(), nothing_installed, "x").is_err());
    }

    #[test]
    fn a_kernel_that_is_not_whole_is_not_found_and_makes_room() {
        for damage in ["vmlinux", "modules/6.12.1-nacre/modules.builtin", RECORD] {
            let all = tempfile::tempdir().unwrap();
            made(all.path(), of("1"), "one").unwrap();
            let folder = all.path().join(of("1").name().unwrap());
            fs::remove_file(folder.join(damage)).unwrap();
            assert_eq!(found(all.path(), &of("1")), None, "without {damage}");
            // As after a power cut.
            if damage == "vmlinux" {
                fs::write(folder.join(damage), "on").unwrap();
                assert_eq!(found(all.path(), &of("1")), None, "cut");
            }
            made(all.path(), of("1"), "one").unwrap();
            assert_eq!(found(all.path(), &of("1")).as_deref(), Some("one"));
            assert_eq!(fs::read_dir(all.path()).unwrap().count(), 1);
        }
    }
}
