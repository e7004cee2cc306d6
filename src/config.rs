//! The configuration file: TOML at `/etc/nacre/config.toml`, or where
//! `NACRE_CONFIG` points. It is optional and so is every key; an unknown key or
//! a bad value is an error that names file, line, key and what would be right.
//! `NACRE_KERNEL` and `NACRE_INITRD` override the file's paths.
//!
//! ```toml
//! kernel = "/usr/share/nacre/vmlinux"   # guest kernel
//! initrd = "/usr/share/nacre/initrd"    # agent and modules
//! cmdline = ""                          # words added to the guest's kernel command line
//! state_dir = "/run/nacre"              # one directory a VM below it
//! boot_timeout = "60s"                  # VM's start to the agent's hello
//! agent_timeout = "10s"                 # each call to the agent
//! create_timeout = "30s"                # Create, which mounts the root
//! stdio_timeout = "10s"                 # until the guest has dialled a stdio stream
//! idle_timeout = "30s"                  # a shim that nobody has called ends itself
//! reader_timeout = "30s"                # a reader of output that takes nothing after the exit is given up
//!
//! [size]
//! default_vcpus = 1                     # without a cpu limit
//! default_memory = "512M"               # without a memory limit
//! minimum_memory = "256M"               # never less with a limit
//! guest_memory = "128M"                 # what the guest itself needs, added to a limit
//!
//! [rootfs]
//! headroom = "1G"                       # room for writing in a root made of a directory (sparse)
//! copy_timeout = "10m"                  # for copying the directory into it
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::sandbox::Timeouts;

/// Where the configuration is unless `NACRE_CONFIG` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/nacre/config.toml";

/// The configuration is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("Cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file says something that is not understood.
    #[error("The configuration {}, line {line}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// 1-based.
        line: usize,
        /// What is wrong and what is allowed.
        message: String,
    },
}

/// The whole configuration; see the module for what each key means.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Guest kernel: ELF `vmlinux` or bzImage.
    pub kernel: PathBuf,
    /// initrd with the agent.
    pub initrd: PathBuf,
    /// Words added to the guest's kernel command line.
    pub cmdline: String,
    /// Directory below which each VM has its own.
    pub state_dir: PathBuf,
    /// VM's start to the agent's hello.
    #[serde(deserialize_with = "duration")]
    pub boot_timeout: Duration,
    /// Each call to the agent.
    #[serde(deserialize_with = "duration")]
    pub agent_timeout: Duration,
    /// Create, which mounts the root.
    #[serde(deserialize_with = "duration")]
    pub create_timeout: Duration,
    /// Until the guest has dialled a stdio stream.
    #[serde(deserialize_with = "duration")]
    pub stdio_timeout: Duration,
    /// A shim that nobody has called ends itself.
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    /// A reader of output that takes nothing after the process's exit is given up.
    #[serde(deserialize_with = "duration")]
    pub reader_timeout: Duration,
    /// Sizes of VMs.
    pub size: Size,
    /// Roots made of directories.
    pub rootfs: Rootfs,
}

/// Sizes of VMs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Size {
    /// vCPUs without a cpu limit, 1–254.
    #[serde(deserialize_with = "vcpus")]
    pub default_vcpus: u8,
    /// Memory without a memory limit.
    pub default_memory: ByteSize,
    /// The least memory with a limit.
    pub minimum_memory: ByteSize,
    /// What the guest itself needs, added to a limit.
    pub guest_memory: ByteSize,
}

/// Roots made of directories.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rootfs {
    /// Room for writing beyond the directory's content; the image is sparse.
    pub headroom: ByteSize,
    /// For copying the directory into its image.
    #[serde(deserialize_with = "duration")]
    pub copy_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/share/nacre/vmlinux".into(),
            initrd: "/usr/share/nacre/initrd".into(),
            cmdline: String::new(),
            state_dir: "/run/nacre".into(),
            boot_timeout: Duration::from_secs(60),
            agent_timeout: Duration::from_secs(10),
            create_timeout: Duration::from_secs(30),
            stdio_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            reader_timeout: Duration::from_secs(30),
            size: Size::default(),
            rootfs: Rootfs::default(),
        }
    }
}

impl Default for Size {
    fn default() -> Self {
        Self {
            default_vcpus: 1,
            default_memory: ByteSize::from_mib(512),
            minimum_memory: ByteSize::from_mib(256),
            guest_memory: ByteSize::from_mib(128),
        }
    }
}

impl Default for Rootfs {
    fn default() -> Self {
        Self {
            headroom: ByteSize::from_mib(1024),
            copy_timeout: Duration::from_secs(600),
        }
    }
}

impl Config {
    /// Reads the file that `NACRE_CONFIG` names (it must exist), else [`DEFAULT_PATH`] (it need not),
    /// and applies `NACRE_KERNEL` and `NACRE_INITRD`.
    pub fn load() -> Result<Self, Error> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let mut config = match set("NACRE_CONFIG") {
            Some(path) => Self::read(&path)?,
            None => match Self::read(Path::new(DEFAULT_PATH)) {
                Err(Error::Read { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound =>
                {
                    Self::default()
                }
                read => read?,
            },
        };
        if let Some(kernel) = set("NACRE_KERNEL") {
            config.kernel = kernel;
        }
        if let Some(initrd) = set("NACRE_INITRD") {
            config.initrd = initrd;
        }
        Ok(config)
    }

    /// Reads one file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start).min(text.len());
            let line = 1 + text.as_bytes()[..start]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count();
            let key = text
                .lines()
                .nth(line - 1)
                .and_then(|line| line.split_once('='))
                .map(|(key, _)| key.trim())
                .filter(|key| !key.is_empty() && !error.message().contains(&format!("`{key}`")));
            let message = match key {
                Some(key) => format!("`{key}`: {}", error.message()),
                None => error.message().to_owned(),
            };
            Error::Parse {
                path: path.to_owned(),
                line,
                message,
            }
        })
    }

    /// The deadlines of a sandbox.
    pub fn timeouts(&self) -> Timeouts {
        Timeouts {
            boot: self.boot_timeout,
            agent: self.agent_timeout,
            create: self.create_timeout,
            stdio: self.stdio_timeout,
        }
    }

    /// The directory that holds one directory for each VM.
    pub fn vms_dir(&self) -> PathBuf {
        self.state_dir.join("vms")
    }

    /// The state directory of one VM: `<namespace>-<id>` with each `-` of the namespace doubled, so that no two
    /// pairs of names share one; or a hash of it where the control socket's path would not fit in 107 bytes or
    /// the names cannot be in a path.
    pub fn vm_dir(&self, namespace: &str, id: &str) -> PathBuf {
        let vms = self.vms_dir();
        let plain = format!("{}-{id}", namespace.replace('-', "--"));
        let length = vms.as_os_str().len() + 1 + plain.len() + 1 + crate::control::SOCKET.len();
        // An id that begins with a dash could be taken for the namespace's end.
        let safe = !plain.contains('/')
            && !plain.contains('\0')
            && !plain.starts_with('.')
            && !id.starts_with('-');
        if safe && length <= 107 {
            return vms.join(plain);
        }
        let exact = format!("{} {plain}", namespace.len());
        vms.join(format!("x{:016x}{:016x}", fnv(0, &exact), fnv(1, &exact)))
    }
}

/// FNV-1a, seeded; names a directory, so it only has to be stable and spread.
fn fnv(seed: u64, text: &str) -> u64 {
    text.bytes().fold(
        0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3),
    )
}

/// A size in bytes, written as a number with an optional K, M, G or T (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// A size of so many MiB.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// In MiB, rounded up.
    pub const fn mib(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl std::str::FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is not a size: write a number with K, M, G or T, such as 512M");
        let trimmed = text.trim();
        let digits = trimmed
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let unit = unit.trim().to_ascii_uppercase();
        let unit = unit
            .strip_suffix("IB")
            .or(unit.strip_suffix('B'))
            .unwrap_or(&unit);
        let shift = match unit {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_duration(&text).map_err(serde::de::Error::custom)
}

/// A duration as a number with `ms`, `s` or `m`, more than zero.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!("{text:?} is not a duration: write a number above 0 with ms, s or m, such as 10s")
    };
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let millis = match unit.trim() {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    // A year is for ever; more would overflow clocks.
    match millis {
        Some(millis @ 1..=31_536_000_000) => Ok(Duration::from_millis(millis)),
        _ => Err(wrong()),
    }
}

fn vcpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    let count = i64::deserialize(deserializer)?;
    match u8::try_from(count) {
        Ok(count @ 1..=254) => Ok(count),
        _ => Err(serde::de::Error::custom(format!(
            "{count} vCPUs are not possible: 1 to 254 are"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("/c.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn empty_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn every_documented_key_is_read_and_the_shown_values_are_the_defaults() {
        for (text, prefix) in [
            (include_str!("config.rs"), "//!"),
            (include_str!("../docs/configuration.md"), ""),
        ] {
            let toml: String = text
                .lines()
                .map(|line| line.strip_prefix(prefix).unwrap_or(line).trim_start())
                .skip_while(|line| *line != "```toml")
                .skip(1)
                .take_while(|line| *line != "```")
                .map(|line| line.to_owned() + "\n")
                .collect();
            assert!(toml.contains("state_dir"), "{toml}");
            assert_eq!(parse(&toml).unwrap(), Config::default());
        }
    }

    #[test]
    fn an_unknown_key_names_file_line_key_and_the_allowed_ones() {
        let error = parse("kernel = \"/k\"\n[size]\nmemroy = \"1G\"\n").unwrap_err();
        assert!(error.contains("/c.toml, line 3"), "{error}");
        assert!(
            error.contains("`memroy`") && error.contains("default_memory"),
            "{error}"
        );
    }

    #[test]
    fn bad_values_name_key_and_what_is_right() {
        for (text, line, key, right) in [
            ("agent_timeout = \"10\"", 1, "agent_timeout", "10s"),
            ("\nboot_timeout = \"0s\"", 2, "boot_timeout", "above 0"),
            ("create_timeout = 5", 1, "create_timeout", "string"),
            (
                "[size]\ndefault_vcpus = 255",
                2,
                "default_vcpus",
                "1 to 254",
            ),
            (
                "[size]\ndefault_memory = \"1X\"",
                2,
                "default_memory",
                "512M",
            ),
            ("kernel = 3", 1, "kernel", "string"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(&format!("line {line}")), "{error}");
            assert!(error.contains(key) && error.contains(right), "{error}");
        }
    }

    #[test]
    fn sizes_read_and_print() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("1g", 1 << 30),
            ("7", 7),
            ("2 GiB", 2 << 30),
            ("4KB", 4096),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
        }
        for text in ["", "M", "-1M", "1.5G", "99999999999T"] {
            text.parse::<ByteSize>().unwrap_err();
        }
        assert_eq!(ByteSize::from_mib(512).to_string(), "512M");
        assert_eq!(ByteSize(3).to_string(), "3");
    }

    #[test]
    fn vm_directories_fit_a_socket_path_whatever_the_names() {
        let config = Config::default();
        assert_eq!(
            config.vm_dir("default", "a"),
            Path::new("/run/nacre/vms/default-a")
        );
        for id in ["x".repeat(200), "../../etc".to_owned(), "a/b".to_owned()] {
            let directory = config.vm_dir("ns", &id);
            assert_eq!(directory.parent(), Some(Path::new("/run/nacre/vms")));
            assert!(directory.join(crate::control::SOCKET).as_os_str().len() <= 107);
            assert_ne!(directory, config.vm_dir("ns", "other/"));
        }
    }

    #[test]
    fn no_two_vms_share_a_directory() {
        let config = Config::default();
        let mut seen = std::collections::HashSet::new();
        for (namespace, id) in [
            ("a", "b-c"),
            ("a-b", "c"),
            ("a", "-b-c"),
            ("a-", "b-c"),
            ("a--b", "c"),
            ("a-b", "-c"),
            ("a-b/", "c"),
            ("a", "b/-c"),
        ] {
            assert!(
                seen.insert(config.vm_dir(namespace, id)),
                "{namespace} {id}"
            );
        }
    }
}
