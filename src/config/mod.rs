//! The configuration file: TOML at `/etc/nacre/config.toml`, or where
//! `NACRE_CONFIG` points. It is optional and so is every key; an unknown key or
//! a bad value is an error that names file, line, key and what would be right.
//! What each key means is said on its field alone: `docs/nacre.toml`, which
//! `vmctl config` prints, is made from there.

mod hotplug;
mod reference;
pub(crate) mod value;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use documented::DocumentedFields;
use serde::{Deserialize, Serialize};
use toml::de::{DeTable, DeValue};

use crate::sandbox::Timeouts;
use crate::sandbox::annotations::Annotation;

pub use hotplug::{CpuRules, Hotplug, MemoryRules, MemoryWay};
pub use reference::reference;
pub use value::{ByteSize, parse_duration};

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

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Guest kernel: an ELF vmlinux with a PVH note, or a bzImage. An absolute path.
    #[serde(deserialize_with = "value::file")]
    pub kernel: PathBuf,
    /// initramfs with the agent and the kernel's modules. An absolute path.
    #[serde(deserialize_with = "value::file")]
    pub initrd: PathBuf,
    /// Words added to the guest's kernel command line: one line of at most 1024 bytes.
    #[serde(deserialize_with = "value::cmdline")]
    pub cmdline: String,
    /// The words before those, one line of at most 1024 bytes. The default has the guest boot fast: without the kernel's
    /// self-tests of its ciphers, and without steps that only tracing and the kernel's jitter random number generator
    /// need (docs/boot.md); to have one of them, give the line without it.
    #[serde(deserialize_with = "value::cmdline")]
    pub base_cmdline: String,
    /// Directory below which each VM has one of its own, `vms/KEY`, with its control socket, cleanup record and disk
    /// images. An absolute path of at most 56 bytes, so that the sockets below it have room.
    #[serde(deserialize_with = "value::state_dir")]
    pub state_dir: PathBuf,
    /// Path of a cgroup below which each VM has one of its own, in place of what `cgroupsPath` in the OCI specification
    /// says; empty: none. An absolute path below the root of the cgroup file systems.
    #[serde(deserialize_with = "value::file_or_none")]
    pub cgroup_parent: PathBuf,
    /// Whether a VM that cannot be put into its cgroup is refused. If not, it runs where its shim was started, with a
    /// warning.
    pub cgroup_required: bool,
    /// From the VM's start to the agent's hello. This and the other time limits are numbers with ms, s or m, above 0
    /// and at most a year.
    #[serde(with = "value::duration")]
    pub boot_timeout: Duration,
    /// Each call to the agent.
    #[serde(with = "value::duration")]
    pub agent_timeout: Duration,
    /// The call that mounts a container's root and makes its first process.
    #[serde(with = "value::duration")]
    pub create_timeout: Duration,
    /// Until the guest has dialled a stdio stream.
    #[serde(with = "value::duration")]
    pub stdio_timeout: Duration,
    /// Until the guest has taken, or given back, one vCPU or one step of memory.
    #[serde(with = "value::duration")]
    pub resize_timeout: Duration,
    /// A shim that nobody has called since its start ends itself.
    #[serde(with = "value::duration")]
    pub idle_timeout: Duration,
    /// A reader of output that takes nothing after its process's exit is given up.
    #[serde(with = "value::duration")]
    pub reader_timeout: Duration,
    /// Annotations of a container's OCI specification that may override the configuration: any of io.nacre.vcpus,
    /// io.nacre.memory, io.nacre.kernel, io.nacre.initrd, io.nacre.cmdline,
    /// io.nacre.boot_timeout and io.nacre.create_timeout. The default lets sizes be chosen. Whoever may write
    /// specifications can have the kernel, initrd and kernel words of their choice where those are added.
    #[serde(deserialize_with = "value::annotations")]
    pub allowed_annotations: Vec<Annotation>,
    /// Sizes of VMs.
    pub size: Size,
    /// VMs that grow and shrink with their load. The rules are in docs/hotplug.md.
    pub hotplug: Hotplug,
    /// Directories and files of the host in the guest: roots and bind mounts, by virtio-fs.
    pub share: Share,
    /// The network of VMs by CNI plugins. Networks that others set up – CRI, nerdctl, `ctr run --cni` – need nothing
    /// here.
    pub network: Network,
}

/// Sizes of VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields, expecting = "a table, [size]")]
pub struct Size {
    /// vCPUs without a CPU limit, 1 to 254, but never more than the host has CPUs.
    #[serde(deserialize_with = "value::vcpus")]
    pub default_vcpus: u8,
    /// Memory without a memory limit, 96M to 1023G.
    #[serde(deserialize_with = "value::memory")]
    pub default_memory: ByteSize,
    /// Most vCPUs that a VM without a CPU limit grows to, 0 to 254, but never more than the host has CPUs; 0: as many
    /// as the host has, up to 32. With a limit, that is the most.
    #[serde(deserialize_with = "value::most_vcpus")]
    pub max_vcpus: u8,
    /// Most memory that a VM without a memory limit grows to, 96M to 1023G; 0: half of what the host has. With a limit,
    /// that and guest_memory is the most.
    #[serde(deserialize_with = "value::most_memory")]
    pub max_memory: ByteSize,
    /// The least memory with a limit, however small that is, 96M to 1023G.
    #[serde(deserialize_with = "value::memory")]
    pub minimum_memory: ByteSize,
    /// What the guest itself needs: added to a memory limit. Up to 1023G.
    #[serde(deserialize_with = "value::guest_memory")]
    pub guest_memory: ByteSize,
    /// What the shim itself needs: added to the VM's memory in the maximum of its cgroup on the host. Up to 1023G.
    #[serde(deserialize_with = "value::guest_memory")]
    pub host_memory: ByteSize,
}

/// Directories and files of the host in the guest: roots and bind mounts, by virtio-fs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields, expecting = "a table, [share]")]
pub struct Share {
    /// Threads that serve a VM's requests for files, 1 to 64. They wait for the host's disks, not for its CPUs.
    #[serde(deserialize_with = "value::workers")]
    pub workers: u8,
    /// How long the guest may rely on what it knows of names, sizes and other attributes in a bind mount, which the
    /// host may change; 0: it always asks, at each read too. A root with a
    /// writable layer of its own is the guest's alone.
    #[serde(with = "value::pause")]
    pub cache: Duration,
}

/// The network of VMs by CNI plugins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields, expecting = "a table, [network]")]
pub struct Network {
    /// Directory with CNI network lists, such as /etc/cni/net.d; empty: none. A container with a network namespace of
    /// its own, which nobody has filled by its Start, gets the network of the first list in it by file name, also where it
    /// is empty on purpose. Not those of CRI. Otherwise it has loopback only. An absolute path.
    #[serde(deserialize_with = "value::file_or_none")]
    pub cni_conf_dir: PathBuf,
    /// Directories in which CNI plugins are looked for, in this order. Absolute paths.
    #[serde(deserialize_with = "value::directories")]
    pub cni_bin_dirs: Vec<PathBuf>,
    /// How long one CNI plugin may take.
    #[serde(with = "value::duration")]
    pub cni_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/share/nacre/vmlinux".into(),
            initrd: "/usr/share/nacre/initrd".into(),
            cmdline: String::new(),
            base_cmdline: nacre_vmm::config::default_cmdline(),
            state_dir: "/run/nacre".into(),
            cgroup_parent: PathBuf::new(),
            cgroup_required: true,
            boot_timeout: Duration::from_secs(60),
            agent_timeout: Duration::from_secs(10),
            create_timeout: Duration::from_secs(30),
            stdio_timeout: Duration::from_secs(10),
            resize_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(30),
            reader_timeout: Duration::from_secs(30),
            allowed_annotations: Annotation::SIZES.to_vec(),
            size: Size::default(),
            hotplug: Hotplug::default(),
            share: Share::default(),
            network: Network::default(),
        }
    }
}

impl Default for Size {
    fn default() -> Self {
        Self {
            default_vcpus: 1,
            default_memory: ByteSize::from_mib(512),
            max_vcpus: 0,
            max_memory: ByteSize(0),
            minimum_memory: ByteSize::from_mib(256),
            guest_memory: ByteSize::from_mib(128),
            host_memory: ByteSize::from_mib(128),
        }
    }
}

impl Default for Share {
    fn default() -> Self {
        Self {
            workers: 4,
            cache: Duration::from_secs(1),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            cni_conf_dir: PathBuf::new(),
            cni_bin_dirs: ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
                .map(PathBuf::from)
                .to_vec(),
            cni_timeout: Duration::from_secs(30),
        }
    }
}

impl Network {
    /// Where networks are looked for by their names.
    pub fn directory(&self) -> &Path {
        match self.cni_conf_dir.as_os_str().is_empty() {
            true => Path::new("/etc/cni/net.d"),
            false => &self.cni_conf_dir,
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
            let span = error.span().unwrap_or(0..0);
            let start = span.start.min(text.len());
            let line = 1 + text.as_bytes()[..start]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count();
            let said = error.message().replace("unknown field", "unknown key");
            let message = match key_at(text, &span) {
                Some(key) => format!("`{key}`: {said}"),
                None => said,
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
            resize: self.resize_timeout,
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

/// The key that an error at `span` is about, with its table: `size.default_vcpus`.
fn key_at(text: &str, span: &Range<usize>) -> Option<String> {
    // A tree is made even of a text that is not quite TOML.
    let (tree, _) = DeTable::parse_recoverable(text);
    key_in(tree.get_ref(), span).or_else(|| {
        let line = text.get(..span.start)?.rfind('\n').map_or(0, |end| end + 1);
        let (key, _) = text[line..].lines().next()?.split_once('=')?;
        let key = key.trim();
        (!key.is_empty() && !key.starts_with('#')).then(|| key.to_owned())
    })
}

fn key_in(table: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let holds = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref();
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(inner) = key_in(inner, span)
        {
            return Some(format!("{name}.{inner}"));
        }
        (holds(key.span()) || holds(value.span())).then(|| name.to_string())
    })
}

#[cfg(test)]
mod tests;
