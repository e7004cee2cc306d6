//! Where a kernel comes from: a package that is unpacked beside, or two paths.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nacre_vmm::boot::payload::{self, PayloadError};
use thiserror::Error;

use crate::vmlinux;

/// A kernel with its modules.
#[derive(Debug, Clone)]
pub enum KernelSource {
    /// A Debian kernel package (`linux-image-*.deb`).
    Deb(PathBuf),
    /// A kernel (bzImage or ELF) and its folder `lib/modules/RELEASE`.
    Files {
        /// The bzImage or the ELF `vmlinux`.
        kernel: PathBuf,
        /// The folder; its name is the kernel's release.
        modules: PathBuf,
    },
}

/// Why a kernel's source is not usable.
#[derive(Debug, Error)]
pub enum SourceError {
    /// A file or folder could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// `dpkg-deb` is not there.
    #[error("running dpkg-deb, which unpacks the kernel package (it is in the package dpkg)")]
    NoDpkgDeb(#[source] std::io::Error),
    /// `dpkg-deb` refused the package.
    #[error("dpkg-deb could not unpack {}: {output}", path.display())]
    Unpack {
        /// The package.
        path: PathBuf,
        /// What it printed.
        output: String,
    },
    /// The package has not exactly one kernel or modules folder.
    #[error("the package {} has {found} {what}; a kernel package has one", path.display())]
    NotOne {
        /// The package.
        path: PathBuf,
        /// How many were found.
        found: usize,
        /// Of what.
        what: &'static str,
    },
    /// The kernel's payload could not be unpacked.
    #[error("unpacking the kernel {}", path.display())]
    Payload {
        /// The kernel.
        path: PathBuf,
        /// Why.
        #[source]
        source: PayloadError,
    },
    /// The kernel and the modules folder are of different releases.
    #[error("the kernel {} is {kernel}, and its modules folder is of {modules}", path.display())]
    ReleaseDiffers {
        /// The kernel.
        path: PathBuf,
        /// Its release.
        kernel: String,
        /// The folder's name.
        modules: String,
    },
    /// The modules folder has no name to take the release from.
    #[error("the modules folder {} is not named by a kernel release (as in lib/modules/6.1.0)", .0.display())]
    NoRelease(PathBuf),
}

/// A file that the image depends on.
pub(crate) struct Input {
    /// A name that is the same wherever the source lies.
    pub name: String,
    pub path: PathBuf,
}

/// A kernel, unpacked.
pub(crate) struct Kernel {
    pub release: String,
    pub version: String,
    pub vmlinux: Vec<u8>,
    pub modules: PathBuf,
    /// Whether it loads no module without a signature, by the configuration beside it.
    pub insists_on_signatures: bool,
    /// Keeps what was unpacked.
    _unpacked: Option<tempfile::TempDir>,
}

/// Options with which a kernel loads no module without a signature: by itself, or because it is locked down from its start.
const INSISTING: [&str; 3] = [
    "CONFIG_MODULE_SIG_FORCE=y",
    "CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY=y",
    "CONFIG_LOCK_DOWN_KERNEL_FORCE_CONFIDENTIALITY=y",
];

/// The kernel's configuration, where distributions have it: beside the kernel, by its release, or with its modules.
fn config_of(kernel: &Path, modules: &Path, release: &str) -> Option<PathBuf> {
    // What is named is a link in some distributions.
    let kernel = fs::canonicalize(kernel).unwrap_or_else(|_| kernel.to_owned());
    let beside = kernel.with_file_name(format!("config-{release}"));
    [beside, modules.join("config")]
        .into_iter()
        .find(|path| path.is_file())
}

/// Every file that the source consists of, in a fixed order.
pub(crate) fn inputs(source: &KernelSource) -> Result<Vec<Input>, SourceError> {
    match source {
        KernelSource::Deb(deb) => Ok(vec![Input {
            name: "deb".into(),
            path: deb.clone(),
        }]),
        KernelSource::Files { kernel, modules } => {
            let mut inputs = Vec::new();
            let release = release_of(modules)?;
            collect(modules, &release, &mut inputs)?;
            inputs.sort_by(|one, other| one.name.cmp(&other.name));
            if let Some(path) = config_of(kernel, modules, &release) {
                inputs.push(Input {
                    name: "config".into(),
                    path,
                });
            }
            inputs.insert(
                0,
                Input {
                    name: "kernel".into(),
                    path: kernel.clone(),
                },
            );
            Ok(inputs)
        }
    }
}

/// Modules and what is listed beside them; no symlink is followed.
fn collect(folder: &Path, name: &str, inputs: &mut Vec<Input>) -> Result<(), SourceError> {
    let read = |source| SourceError::Read {
        path: folder.to_owned(),
        source,
    };
    for entry in fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        let kind = entry.file_type().map_err(read)?;
        let name = format!("{name}/{}", entry.file_name().to_string_lossy());
        if kind.is_dir() {
            collect(&entry.path(), &name, inputs)?;
        } else if kind.is_file() {
            inputs.push(Input {
                name,
                path: entry.path(),
            });
        }
    }
    Ok(())
}

/// Unpacks the kernel to its ELF file and finds its modules.
pub(crate) fn open(source: &KernelSource) -> Result<Kernel, SourceError> {
    match source {
        KernelSource::Files { kernel, modules } => open_files(kernel, modules.clone(), None),
        KernelSource::Deb(deb) => {
            let folder = tempfile::Builder::new()
                .prefix("nacre-kernel-")
                .tempdir()
                .map_err(|source| SourceError::Read {
                    path: std::env::temp_dir(),
                    source,
                })?;
            let output = Command::new("dpkg-deb")
                .arg("-x")
                .arg(deb)
                .arg(folder.path())
                .output()
                .map_err(SourceError::NoDpkgDeb)?;
            if !output.status.success() {
                let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return Err(SourceError::Unpack {
                    path: deb.clone(),
                    output,
                });
            }
            let kernel = only_one(deb, "kernels", &[folder.path().join("boot")], |name| {
                name.starts_with("vmlinuz-")
            })?;
            // Newer packages have it below usr.
            let parents = ["lib/modules", "usr/lib/modules"].map(|path| folder.path().join(path));
            let modules = only_one(deb, "modules folders", &parents, |_| true)?;
            open_files(&kernel, modules, Some(folder))
        }
    }
}

fn only_one(
    deb: &Path,
    what: &'static str,
    folders: &[PathBuf],
    matches: impl Fn(&str) -> bool,
) -> Result<PathBuf, SourceError> {
    let mut found = Vec::new();
    for folder in folders {
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        for entry in entries {
            let entry = entry.map_err(|source| SourceError::Read {
                path: folder.clone(),
                source,
            })?;
            if matches(&entry.file_name().to_string_lossy()) {
                found.push(entry.path());
            }
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([one]) => Ok(one),
        Err(found) => Err(SourceError::NotOne {
            path: deb.to_owned(),
            found: found.len(),
            what,
        }),
    }
}

fn open_files(
    path: &Path,
    modules: PathBuf,
    unpacked: Option<tempfile::TempDir>,
) -> Result<Kernel, SourceError> {
    let file = fs::read(path).map_err(|source| SourceError::Read {
        path: path.to_owned(),
        source,
    })?;
    let release = release_of(&modules)?;
    let version = payload::bzimage_version(&file).unwrap_or_default();
    if let Some(kernel) = version.split_whitespace().next()
        && kernel != release
    {
        return Err(SourceError::ReleaseDiffers {
            path: path.to_owned(),
            kernel: kernel.to_owned(),
            modules: release,
        });
    }
    let insists_on_signatures = match config_of(path, &modules, &release) {
        Some(config) => {
            let text = fs::read(&config).map_err(|source| SourceError::Read {
                path: config,
                source,
            })?;
            let text = String::from_utf8_lossy(&text);
            text.lines().any(|line| INSISTING.contains(&line))
        }
        None => false,
    };
    let mut vmlinux = if file.starts_with(b"\x7fELF") {
        file
    } else {
        payload::unpack_bzimage(&file).map_err(|source| SourceError::Payload {
            path: path.to_owned(),
            source,
        })?
    };
    vmlinux::trim(&mut vmlinux);
    Ok(Kernel {
        release,
        version,
        vmlinux,
        modules,
        insists_on_signatures,
        _unpacked: unpacked,
    })
}

fn release_of(modules: &Path) -> Result<String, SourceError> {
    let path = fs::canonicalize(modules).map_err(|source| SourceError::Read {
        path: modules.to_owned(),
        source,
    })?;
    path.file_name()
        .and_then(|name| name.to_str())
        .filter(|name| name.starts_with(|first: char| first.is_ascii_digit()))
        .map(str::to_owned)
        .ok_or_else(|| SourceError::NoRelease(modules.to_owned()))
}
