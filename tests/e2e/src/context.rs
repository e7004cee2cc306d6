//! What a case is given: where the programs are, which containerd and runtime it
//! is about, and how often to repeat.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The environment variable that carries a [`Context`] to a case's process.
pub(crate) const VARIABLE: &str = "NACRE_E2E_CONTEXT";

/// How often cases repeat what they repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Count {
    /// Often enough to notice
    Small,
    /// The counts that the project promises of nacre; runc's cases, which prove the suite, keep the small ones
    Soak,
}

/// A containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Version {
    /// containerd 1.7
    #[value(name = "1.7")]
    V1_7,
    /// containerd 2.1
    #[value(name = "2.1")]
    V2_1,
}

impl Version {
    pub fn text(self) -> &'static str {
        match self {
            Version::V1_7 => "1.7",
            Version::V2_1 => "2.1",
        }
    }

    /// The folder with containerd, ctr and the runc shim.
    pub fn folder(self) -> Result<PathBuf> {
        let variable = match self {
            Version::V1_7 => "NACRE_CONTAINERD_1_7",
            Version::V2_1 => "NACRE_CONTAINERD_2_1",
        };
        let folder = PathBuf::from(std::env::var_os(variable).with_context(|| {
            format!(
                "{variable} is not set: it names the folder with containerd {}",
                self.text()
            )
        })?);
        for program in ["containerd", "ctr"] {
            if !folder.join(program).is_file() {
                bail!("{variable}: there is no {program} in {}", folder.display());
            }
        }
        Ok(folder)
    }
}

/// Whose shim runs the containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Runtime {
    /// io.containerd.nacre.v1
    Nacre,
    /// io.containerd.runc.v2
    Runc,
}

impl Runtime {
    pub fn text(self) -> &'static str {
        match self {
            Runtime::Nacre => "nacre",
            Runtime::Runc => "runc",
        }
    }

    /// The name to give to `ctr --runtime`.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Nacre => "io.containerd.nacre.v1",
            Runtime::Runc => "io.containerd.runc.v2",
        }
    }

    /// The shim's file name.
    pub fn shim(self) -> &'static str {
        match self {
            Runtime::Nacre => "containerd-shim-nacre-v1",
            Runtime::Runc => "containerd-shim-runc-v2",
        }
    }
}

/// Where this suite's programs and files are, however they got there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Programs {
    /// Folder with the shim and vmctl.
    pub bin: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Folder with vmlinux and initrd of Linux 6.12.
    pub newer: PathBuf,
    pub busybox: PathBuf,
    /// The whole machine is ours: nothing else starts or ends while a case runs.
    pub alone: bool,
}

impl Programs {
    pub fn find() -> Result<Self> {
        let path = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
        let bin = match path("NACRE_BIN") {
            Some(bin) => bin,
            None => std::env::current_exe()?
                .parent()
                .context("no folder")?
                .to_owned(),
        };
        Ok(Programs {
            bin,
            kernel: path("NACRE_KERNEL").unwrap_or_else(|| "/usr/share/nacre/vmlinux".into()),
            initrd: path("NACRE_INITRD").unwrap_or_else(|| "/usr/share/nacre/initrd".into()),
            newer: path("NACRE_IMAGE_6_12").unwrap_or_else(|| "/usr/share/nacre/6.12".into()),
            busybox: path("NACRE_BUSYBOX")
                .or_else(|| in_path("busybox"))
                .context("there is no busybox in PATH, and NACRE_BUSYBOX names none")?,
            alone: std::env::var_os("NACRE_TESTBED").is_some(),
        })
    }

    pub fn shim(&self) -> PathBuf {
        self.bin.join(Runtime::Nacre.shim())
    }

    pub fn vmctl(&self) -> PathBuf {
        self.bin.join("vmctl")
    }
}

/// The file of a program in `PATH`.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// A containerd that runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Daemon {
    pub version: Version,
    pub pid: i32,
    pub ctr: PathBuf,
    pub address: PathBuf,
    pub root: PathBuf,
    pub state: PathBuf,
    /// A folder in the daemon's PATH, for shims that are made by cases.
    pub shims: PathBuf,
}

/// All that a case knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Context {
    pub programs: Programs,
    pub runtime: Runtime,
    pub count: Count,
    pub patience: f64,
    /// A folder of the case's own, removed after it.
    pub work: PathBuf,
    /// Something that no other case's container ids begin with.
    pub prefix: String,
    pub daemon: Option<Daemon>,
}

/// The containerd namespace of the suite's containers.
pub(crate) const NAMESPACE: &str = "nacre-e2e";
/// The image's name in containerd.
pub(crate) const IMAGE: &str = "example.test/nacre-e2e:1";

impl Context {
    pub fn from_environment() -> Result<Self> {
        let text = std::env::var(VARIABLE)
            .with_context(|| format!("{VARIABLE} is not set: the suite sets it"))?;
        serde_json::from_str(&text).with_context(|| format!("reading {VARIABLE}"))
    }

    pub fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("this case has no containerd")
    }

    /// A container id of this case.
    pub fn id(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// `soak` where the promised counts are asked for, else `small`.
    pub fn times(&self, small: u32, soak: u32) -> u32 {
        match self.count {
            Count::Small => small,
            Count::Soak => soak,
        }
    }

    /// A path in the case's folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.work.join(name)
    }

    /// A length of time, stretched by `--patience`.
    pub fn seconds(&self, seconds: u64) -> std::time::Duration {
        std::time::Duration::from_secs_f64(seconds as f64 * self.patience)
    }
}
