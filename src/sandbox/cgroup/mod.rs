//! The VM's cgroup on the host: where its threads are held, since its guest is
//! not trusted to hold itself. v2, v1 and both at once. The memory maximum
//! follows the VM's size, the CPU quota the containers that share the VM.

mod hierarchy;
mod path;
mod remove;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use oci_spec::runtime::{LinuxResources, Spec};

pub use hierarchy::Tree;
pub use remove::{remove, remove_if_empty};

use crate::config::Config;
use crate::record::{self, Record};
use hierarchy::Directory;

/// Period of a quota that several containers share, microseconds; also the kernel's default.
const PERIOD: u64 = 100_000;

/// The VM cannot be held by a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is none.
    #[error("The cgroup {name:?} {cause}")]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        cause: &'static str,
    },
    /// The host does not offer a controller.
    #[error(
        "Cannot hold the VM: no cgroup file system that is mounted here has the controller {controller}"
    )]
    NoController {
        /// Its name.
        controller: &'static str,
    },
    /// A parent does not pass a controller on.
    #[error("Cannot hold the VM: the cgroup {} does not give the controller {controller} to those below it", path.display())]
    NotDelegated {
        /// Its name.
        controller: &'static str,
        /// The parent.
        path: PathBuf,
        /// What the kernel said when it was asked to.
        #[source]
        source: io::Error,
    },
    /// Somebody else is in it.
    #[error("The cgroup {} holds processes already, such as {pid}: give each container a `cgroupsPath` of its own", path.display())]
    Taken {
        /// The cgroup.
        path: PathBuf,
        /// One of them.
        pid: String,
    },
    /// A file operation failed.
    #[error("Cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: String,
        /// To what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be recorded.
    #[error(transparent)]
    Record(#[from] record::Error),
}

/// Where the VM's cgroup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// What a spec's `cgroupsPath` says: a path, or systemd's `slice:prefix:name`.
    Spec(String),
    /// A name below a parent, the path of a cgroup.
    Below(PathBuf, String),
}

impl Place {
    /// Where a VM belongs: below `parent` if that is set, else where the spec of its first container says, else
    /// nowhere but where its process is.
    pub fn of(parent: &Path, name: &str, spec: &Spec) -> Option<Self> {
        if !parent.as_os_str().is_empty() {
            return Some(Self::Below(parent.to_owned(), name.to_owned()));
        }
        let path = spec.linux().as_ref()?.cgroups_path().as_ref()?;
        let path = path.to_string_lossy();
        (!path.is_empty()).then(|| Self::Spec(path.into_owned()))
    }
}

/// What a configuration and the spec of its first container want of a VM's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Where it is; None: where the shim was started.
    pub place: Option<Place>,
    /// The most memory that the VM may take, bytes.
    pub memory: u64,
    /// Whether the VM is refused if it cannot be.
    pub required: bool,
}

impl Wish {
    /// That of a VM by the name of its state directory, with `memory_mib` of memory.
    pub fn of(config: &Config, name: &str, spec: &Spec, memory_mib: u64) -> Self {
        let memory = memory_mib.saturating_mul(1 << 20);
        Self {
            place: Place::of(&config.cgroup_parent, name, spec),
            memory: memory.saturating_add(config.size.host_memory.0),
            required: config.cgroup_required,
        }
    }
}

/// A share of CPU time: quota and period in microseconds.
type Quota = (u64, u64);

/// What a container asks of the host's CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    quota: Option<Quota>,
    shares: Option<u64>,
    cpus: Option<String>,
    mems: Option<String>,
}

impl Cpu {
    /// Reads it from a spec.
    pub fn of(spec: &Spec) -> Self {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        resources.map(Self::of_resources).unwrap_or_default()
    }

    /// Reads it from limits.
    pub fn of_resources(resources: &LinuxResources) -> Self {
        let Some(cpu) = resources.cpu() else {
            return Self::default();
        };
        let text = |text: &Option<String>| text.clone().filter(|text| !text.trim().is_empty());
        let period = cpu.period().filter(|period| *period > 0).unwrap_or(PERIOD);
        let quota = cpu.quota().and_then(|quota| u64::try_from(quota).ok());
        Self {
            quota: quota
                .filter(|quota| *quota > 0)
                .map(|quota| (quota, period)),
            shares: cpu.shares().filter(|shares| *shares > 0),
            cpus: text(cpu.cpus()),
            mems: text(cpu.mems()),
        }
    }

    /// Takes what is set in an update; a quota of 0 or less takes the quota away.
    fn update(&mut self, resources: &LinuxResources) {
        let new = Self::of_resources(resources);
        let quota = resources.cpu().as_ref().and_then(|cpu| cpu.quota());
        if quota.is_some() {
            self.quota = new.quota;
        }
        self.shares = new.shares.or(self.shares);
        self.cpus = new.cpus.or(self.cpus.take());
        self.mems = new.mems.or(self.mems.take());
    }
}

/// A container's part in what the VM may use.
#[derive(Debug, Clone, Default)]
struct Part {
    cpu: Cpu,
}

#[derive(Debug)]
struct Parts {
    by_container: BTreeMap<String, Part>,
    /// Guest memory and what the shim itself needs, bytes.
    vm: u64,
    /// The memory maximum that is written.
    memory: u64,
}

/// The cgroup that a VM is in: a directory in each hierarchy that has one of its controllers. It is removed by way of the record.
#[derive(Debug)]
pub struct VmCgroup {
    directories: Vec<Directory>,
    parts: Mutex<Parts>,
}

impl VmCgroup {
    /// Makes the cgroup with its limits and puts this process into it, with all the threads that it has and
    /// will have. Each directory is in the record before it is made. `memory` is the most that the VM may take in
    /// bytes; `first` the container that the sandbox is started for.
    ///
    /// # Errors
    /// Whatever keeps a limit from being set, or the process from being moved. What was made is in the record.
    pub fn enter(
        tree: &Tree,
        place: &Place,
        memory: u64,
        (first, cpu): (&str, Cpu),
        record: &Record,
    ) -> Result<Arc<Self>, Error> {
        let mut wanted = vec![("memory", true)];
        wanted.push(("cpu", cpu.quota.is_some() || cpu.shares.is_some()));
        if cpu.cpus.is_some() || cpu.mems.is_some() {
            wanted.push(("cpuset", true));
        }
        let directories = tree.make(place, &wanted, record)?;
        let part = Part { cpu };
        let cgroup = Self {
            directories,
            parts: Mutex::new(Parts {
                by_container: BTreeMap::from([(first.to_owned(), part.clone())]),
                vm: memory,
                memory,
            }),
        };
        cgroup.write_memory(memory)?;
        cgroup.write_cpu(&[part])?;
        for directory in &cgroup.directories {
            directory.write("cgroup.procs", &std::process::id().to_string())?;
        }
        Ok(Arc::new(cgroup))
    }

    /// Where it is, one path a hierarchy.
    pub fn paths(&self) -> Vec<PathBuf> {
        let path = |directory: &Directory| directory.path().to_owned();
        self.directories.iter().map(path).collect()
    }

    /// A container joins the VM: until the answer is dropped it has its part in the limits.
    pub fn join(self: &Arc<Self>, id: &str, cpu: Cpu) -> Result<Share, Error> {
        let share = Share {
            cgroup: self.clone(),
            id: id.to_owned(),
        };
        let part = Part { cpu };
        self.change(|parts| {
            parts.by_container.insert(id.to_owned(), part);
        })?;
        Ok(share)
    }

    /// The VM's memory is about to grow, or has shrunk, to this, what the shim itself needs included, in bytes.
    ///
    /// # Errors
    /// What the kernel says to the new maximum.
    pub fn resize(&self, memory: u64) -> Result<(), Error> {
        self.change(|parts| parts.vm = memory)
    }

    /// Changes the parts, and writes what they come to.
    fn change(&self, change: impl FnOnce(&mut Parts)) -> Result<(), Error> {
        // Held while files of the kernel's are written, which does not wait for anything.
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut parts);
        let memory = parts.vm;
        // A maximum below what is in use would kill the VM.
        if memory > parts.memory || (memory < parts.memory && self.used() < memory) {
            self.write_memory(memory)?;
            parts.memory = memory;
        }
        let all: Vec<Part> = parts.by_container.values().cloned().collect();
        self.write_cpu(&all)
    }

    fn with(&self, controller: &str) -> Option<&Directory> {
        self.directories
            .iter()
            .find(|directory| directory.has(controller))
    }

    /// Memory that is charged to it now; everything if that cannot be read.
    fn used(&self) -> u64 {
        self.with("memory")
            .and_then(|directory| {
                directory.read(directory.either("memory.current", "memory.usage_in_bytes"))
            })
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(u64::MAX)
    }

    fn write_memory(&self, bytes: u64) -> Result<(), Error> {
        let Some(directory) = self.with("memory") else {
            return Ok(());
        };
        let file = directory.either("memory.max", "memory.limit_in_bytes");
        directory.write(file, &bytes.to_string())
    }

    /// Writes the quota of all; weight and CPU set are those of a container that is alone.
    fn write_cpu(&self, parts: &[Part]) -> Result<(), Error> {
        if parts.is_empty() {
            return Ok(());
        }
        let alone = match parts {
            [part] => Some(&part.cpu),
            _ => None,
        };
        if let Some(directory) = self.with("cpu") {
            directory.write_quota(sum(parts.iter().map(|part| part.cpu.quota)))?;
            if let Some(shares) = alone.and_then(|cpu| cpu.shares) {
                if directory.is_v2() {
                    directory.write("cpu.weight", &weight(shares).to_string())?;
                } else {
                    directory.write("cpu.shares", &shares.to_string())?;
                }
            }
        }
        if let (Some(directory), Some(cpu)) = (self.with("cpuset"), alone) {
            for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
                if let Some(list) = list {
                    directory.write(file, list)?;
                }
            }
        }
        Ok(())
    }
}

/// A container's part in its VM's limits; dropping it takes the part back.
#[derive(Debug)]
pub struct Share {
    cgroup: Arc<VmCgroup>,
    id: String,
}

impl Share {
    /// Its limits have changed.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        self.change(|part| part.cpu.update(resources))
    }

    fn change(&self, change: impl FnOnce(&mut Part)) -> Result<(), Error> {
        self.cgroup.change(|parts| {
            if let Some(part) = parts.by_container.get_mut(&self.id) {
                change(part);
            }
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let gone = self.cgroup.change(|parts| {
            parts.by_container.remove(&self.id);
        });
        if let Err(error) = gone {
            tracing::warn!(
                container = self.id,
                error = super::chain(&error),
                "the VM's cgroup keeps the limits that it had with a container"
            );
        }
    }
}

/// The quota of several; None if one of them has none.
fn sum(quotas: impl Iterator<Item = Option<Quota>>) -> Option<Quota> {
    let quotas: Vec<Quota> = quotas.collect::<Option<_>>()?;
    match quotas[..] {
        [] => None,
        [quota] => Some(quota),
        _ => {
            let part = |(quota, period): &Quota| {
                let part = u128::from(*quota) * u128::from(PERIOD);
                u64::try_from(part.div_ceil(u128::from(*period))).unwrap_or(u64::MAX)
            };
            let all = quotas.iter().map(part).fold(0, u64::saturating_add);
            Some((all, PERIOD))
        }
    }
}

/// Shares of v1, 2 to 262144, as a weight of v2, 1 to 10000, in proportion.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests;
