//! The OCI spec as the guest gets it. What has no meaning in a guest is taken
//! out with a warning; what would silently mean something else is refused by
//! name: host devices, foreign namespaces. Bind mounts of the host become bind
//! mounts of what the host is to share.

use std::path::{Path, PathBuf};

use nacre_fs::{Owners, Range};
use nacre_protocol::SHARES;
use oci_spec::runtime::{
    Hooks, Linux, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType, LinuxResources, Mount,
    Process, Spec,
};

/// The spec asks for what a guest cannot have (yet).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A bind mount of nothing.
    #[error("The bind mount at {destination} has no source")]
    NoSource {
        /// In the container.
        destination: String,
    },
    /// A bind mount with owners mapped to nothing.
    #[error(
        "The bind mount of {origin} at {destination} is to have its owners mapped (idmap), but users and groups have not both a map: give it uidMappings and gidMappings, or the container a user namespace"
    )]
    Unmapped {
        /// On the host.
        origin: String,
        /// In the container.
        destination: String,
    },
    /// A mount of a file system that the guest does not offer.
    #[error("The mount at {destination} has the type {fstype}, which the guest does not offer")]
    FsType {
        /// In the container.
        destination: String,
        /// Its type.
        fstype: String,
    },
    /// A namespace of the host.
    #[error("The {kind} namespace {path} is the host's and cannot be joined from a guest")]
    Namespace {
        /// Its kind.
        kind: String,
        /// Its path.
        path: String,
    },
    /// A host device.
    #[error("The device {path} is the host's and cannot be passed to a guest")]
    Device {
        /// Its path.
        path: String,
    },
    /// There is nothing to run.
    #[error("The spec has no process")]
    NoProcess,
    /// The adapted spec cannot be written as JSON.
    #[error("Cannot write the guest's spec as JSON")]
    Json(#[from] serde_json::Error),
}

/// A spec for the guest.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// `config.json` for the agent.
    pub json: Vec<u8>,
    /// Whether the init has a terminal.
    pub terminal: bool,
    /// What the host is to share with the guest for it.
    pub binds: Vec<Bind>,
    /// What was left out and why, for the log.
    pub warnings: Vec<String>,
}

/// The first container of a VM, whose namespaces others may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct First {
    /// The pid that the host's programs were told for it.
    pub host_pid: u32,
    /// Its init in the guest.
    pub guest_pid: u32,
}

impl First {
    /// Where the guest has the namespace that is at `path` on the host, if it is one that can be shared.
    fn namespace(self, kind: LinuxNamespaceType, path: &Path) -> Option<PathBuf> {
        let name = match kind {
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::Pid => "pid",
            LinuxNamespaceType::User => "user",
            _ => return None,
        };
        let told = path == namespace_of(self.host_pid, name);
        (told && self.guest_pid > 0).then(|| namespace_of(self.guest_pid, name))
    }

    /// Its network namespace, for a container that shares its users: they have no say in the one that the others share.
    fn network_for(self, linux: &Linux) -> Option<PathBuf> {
        let mut namespaces = linux.namespaces().iter().flatten();
        let users = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::User)?;
        self.namespace(LinuxNamespaceType::User, users.path().as_ref()?)?;
        Some(namespace_of(self.guest_pid, "net"))
    }
}

fn namespace_of(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/{name}"))
}

/// A directory or file of the host that a container mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// The name under which the guest expects it.
    pub name: String,
    /// On the host; relative to the bundle if not absolute.
    pub source: PathBuf,
    /// In the container, for messages.
    pub destination: PathBuf,
    /// Whether the container must not change it.
    pub read_only: bool,
    /// Whether what is mounted below it comes along.
    pub recursive: bool,
    /// The owners that the container is to see, if not those that the files have.
    pub owners: Option<MappedOwners>,
}

/// Owners of a bind mount's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedOwners {
    /// By their ranges.
    pub owners: Owners,
    /// Whether those of what is mounted below are meant, too.
    pub all: bool,
}

/// An exec's process for the guest.
#[derive(Debug, Clone)]
pub struct GuestProcess {
    /// OCI's `Process` for the agent.
    pub json: Vec<u8>,
    /// Columns and rows of its terminal, if they are given.
    pub size: Option<(u32, u32)>,
}

/// Limits for the guest.
#[derive(Debug, Clone)]
pub struct GuestResources {
    /// OCI's `LinuxResources` for the agent.
    pub json: Vec<u8>,
    /// What was left out and why, for the log.
    pub warnings: Vec<String>,
}

/// File systems that a container may mount in the guest, since they hold nothing of the host.
const GUEST_FILE_SYSTEMS: [&str; 13] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "devtmpfs",
    "mqueue",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
];

/// How mounts propagate, as the guest's runtime names it.
const PROPAGATION: [&str; 4] = ["shared", "private", "slave", "unbindable"];

/// Character devices (major, minor) that mean the same in every kernel.
const COMMON_DEVICES: [(i64, i64); 9] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (5, 0),    // tty
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
];

/// Adapts a spec for the container `id` in the guest: network namespace path and `cgroupsPath` are
/// replaced by the guest's own (`/nacre/ID`); what names things of the host (CPU sets, memory nodes, network
/// classes) is taken out and security labels are dropped (the guest's kernel has none), each with a warning; the OOM
/// score and the seccomp profile are kept. What is to be shared for its bind mounts gets names that begin with
/// `prefix`, which no other container of the guest has.
pub fn for_guest(spec: &Spec, id: &str, prefix: &str) -> Result<GuestSpec, Error> {
    for_guest_beside(spec, id, prefix, None)
}

/// As [`for_guest`], in a VM that has a container already: the namespaces of the host's process that was told for that – as CRI names those of
/// its pods – are those of the container.
pub fn for_guest_beside(
    spec: &Spec,
    id: &str,
    prefix: &str,
    first: Option<First>,
) -> Result<GuestSpec, Error> {
    let mut spec = spec.clone();
    let mut warnings = Vec::new();
    let mut binds = Vec::new();
    let own = spec.linux().as_ref().map(own_users).unwrap_or_default();
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        if let Some(bind) = adapt_mount(mount, format!("{prefix}.{index}"), &own)? {
            binds.push(bind);
        }
    }
    // The others run on the host.
    if let Some(hooks) = spec.hooks() {
        let mut kept = Hooks::default();
        kept.set_create_container(hooks.create_container().clone());
        kept.set_start_container(hooks.start_container().clone());
        spec.set_hooks((kept != Hooks::default()).then_some(kept));
    }
    let process = spec.process_mut().as_mut().ok_or(Error::NoProcess)?;
    let terminal = process.terminal().unwrap_or(false);
    if process
        .apparmor_profile()
        .as_deref()
        .is_some_and(|profile| !profile.is_empty())
    {
        warnings.push("the AppArmor profile is not applied in the guest".to_owned());
    }
    process.set_apparmor_profile(None);
    if process
        .selinux_label()
        .as_deref()
        .is_some_and(|label| !label.is_empty())
    {
        warnings.push("the SELinux label is not applied in the guest".to_owned());
    }
    process.set_selinux_label(None);
    if process.exec_cpu_affinity().is_some() {
        warnings.push("the CPU affinity of execs names host CPUs and is not applied".to_owned());
        process.set_exec_cpu_affinity(None);
    }
    let mut linux = spec.linux().clone().unwrap_or_default();
    adapt_linux(&mut linux, id, first, &mut warnings)?;
    spec.set_linux(Some(linux));
    Ok(GuestSpec {
        json: serde_json::to_vec(&spec)?,
        terminal,
        binds,
        warnings,
    })
}

/// Adapts the process of an exec, OCI's `Process` as JSON, as [`for_guest`] does an init's: labels of the host's
/// security modules are taken out.
pub fn process_for_guest(json: &[u8]) -> Result<GuestProcess, serde_json::Error> {
    let mut process: Process = serde_json::from_slice(json)?;
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    process.set_exec_cpu_affinity(None);
    Ok(GuestProcess {
        json: serde_json::to_vec(&process)?,
        size: console_size(&process),
    })
}

/// Columns and rows that a process's terminal has at its start.
pub fn console_size(process: &Process) -> Option<(u32, u32)> {
    let size = process.console_size()?;
    let number = |value| u32::try_from(value).ok();
    Some((number(size.width())?, number(size.height())?)).filter(|size| *size != (0, 0))
}

/// Adapts new limits as [`for_guest`] does those of a spec.
pub fn resources_for_guest(
    resources: &LinuxResources,
) -> Result<GuestResources, serde_json::Error> {
    let mut resources = resources.clone();
    let mut warnings = Vec::new();
    adapt_resources(&mut resources, &mut warnings);
    Ok(GuestResources {
        json: serde_json::to_vec(&resources)?,
        warnings,
    })
}

/// What the host is to share for a mount, which then is of that; None for one of the guest's own.
fn adapt_mount(mount: &mut Mount, name: String, own: &Owners) -> Result<Option<Bind>, Error> {
    let destination = mount.destination().clone();
    let fstype = mount.typ().as_deref().unwrap_or("none");
    let options = mount.options().clone().unwrap_or_default();
    let has = |all: &[&str]| options.iter().any(|option| all.contains(&option.as_str()));
    if fstype != "bind" && !has(&["bind", "rbind"]) {
        if !GUEST_FILE_SYSTEMS.contains(&fstype) {
            return Err(Error::FsType {
                destination: destination.display().to_string(),
                fstype: fstype.to_owned(),
            });
        }
        return Ok(None);
    }
    let origin = mount
        .source()
        .clone()
        .filter(|source| !source.as_os_str().is_empty());
    let source = origin.ok_or_else(|| Error::NoSource {
        destination: destination.display().to_string(),
    })?;
    let mut owners = Owners {
        users: ranges(mount.uid_mappings()),
        groups: ranges(mount.gid_mappings()),
    };
    let maps = !owners.users.is_empty() || !owners.groups.is_empty();
    let owners = if maps || has(&["idmap", "ridmap"]) {
        if !maps {
            owners = own.clone();
        }
        if owners.users.is_empty() || owners.groups.is_empty() {
            return Err(Error::Unmapped {
                origin: source.display().to_string(),
                destination: destination.display().to_string(),
            });
        }
        // The host does it; to the guest the owners are what they are.
        mount.set_uid_mappings(None);
        mount.set_gid_mappings(None);
        let mut rest = options.clone();
        rest.retain(|option| !matches!(option.as_str(), "idmap" | "ridmap"));
        mount.set_options(Some(rest));
        let all = has(&["ridmap"]);
        Some(MappedOwners { owners, all })
    } else {
        None
    };
    let mut states = options.iter().rev().map(String::as_str);
    let state = states.find(|option| matches!(*option, "ro" | "rw"));
    // The guest sees one file system, whatever is mounted below on the host.
    mount.set_source(Some(Path::new(SHARES).join(&name)));
    mount.set_typ(Some("bind".to_owned()));
    Ok(Some(Bind {
        name,
        source,
        destination,
        read_only: state == Some("ro") || has(&["rro"]),
        recursive: has(&["rbind"]),
        owners,
    }))
}

/// The users that a container has of its own.
fn own_users(linux: &Linux) -> Owners {
    let mut namespaces = linux.namespaces().iter().flatten();
    if !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        return Owners::default();
    }
    Owners {
        users: ranges(linux.uid_mappings()),
        groups: ranges(linux.gid_mappings()),
    }
}

fn ranges(maps: &Option<Vec<LinuxIdMapping>>) -> Vec<Range> {
    let range = |map: &LinuxIdMapping| Range {
        stored: map.container_id(),
        shown: map.host_id(),
        count: map.size(),
    };
    maps.iter().flatten().map(range).collect()
}

fn adapt_linux(
    linux: &mut Linux,
    id: &str,
    first: Option<First>,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    linux.set_cgroups_path(Some(format!("/nacre/{id}").into()));
    // The guest's runtime knows these by the names of their recursive kin, and makes them recursive.
    let propagation = linux.rootfs_propagation().as_deref();
    let plain = propagation.map(|name| {
        name.strip_prefix('r')
            .filter(|rest| PROPAGATION.contains(rest))
            .unwrap_or(name)
            .to_owned()
    });
    linux.set_rootfs_propagation(plain);
    let network = first.and_then(|first| first.network_for(linux));
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        if namespace.typ() == LinuxNamespaceType::Network {
            // The host's netns is the VM's; the container has the guest's.
            namespace.set_path(network.clone());
            continue;
        }
        let Some(path) = namespace.path().clone() else {
            continue;
        };
        if path.as_os_str().is_empty() {
            // A new namespace.
            namespace.set_path(None);
        } else if let Some(shared) = first.and_then(|first| first.namespace(namespace.typ(), &path))
        {
            namespace.set_path(Some(shared));
        } else {
            let kind = namespace.typ().to_string();
            return Err(Error::Namespace {
                kind,
                path: path.display().to_string(),
            });
        }
    }
    for device in linux.devices().iter().flatten() {
        let character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        if !character || !COMMON_DEVICES.contains(&(device.major(), device.minor())) {
            return Err(Error::Device {
                path: device.path().display().to_string(),
            });
        }
    }
    if linux
        .mount_label()
        .as_deref()
        .is_some_and(|label| !label.is_empty())
    {
        warnings.push("the SELinux mount label is not applied in the guest".to_owned());
    }
    linux.set_mount_label(None);
    if linux.intel_rdt().is_some() {
        warnings.push("the Intel RDT class is not applied to the guest".to_owned());
        linux.set_intel_rdt(None);
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        warnings.push("the host's network devices are not moved into the guest".to_owned());
    }
    linux.set_net_devices(None);
    if linux.memory_policy().is_some() {
        warnings.push(
            "the memory policy (memoryPolicy) names host memory nodes and is not applied"
                .to_owned(),
        );
        linux.set_memory_policy(None);
    }
    if let Some(resources) = linux.resources_mut() {
        adapt_resources(resources, warnings);
    }
    Ok(())
}

fn adapt_resources(resources: &mut LinuxResources, warnings: &mut Vec<String>) {
    if let Some(cpu) = resources.cpu_mut() {
        // Numbers of host CPUs and nodes.
        let named = |set: &Option<String>| set.clone().filter(|set| !set.trim().is_empty());
        if let Some(set) = named(cpu.cpus()) {
            warnings.push(format!(
                "the CPU set (cpus) {set:?} names host CPUs: it is for the VM's cgroup on the host and not applied in the guest; their number is the VM's vCPUs if there is no quota"
            ));
        }
        if let Some(set) = named(cpu.mems()) {
            warnings.push(format!(
                "the memory nodes (mems) {set:?} are the host's: they are for the VM's cgroup there and not applied in the guest"
            ));
        }
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    if resources.block_io().is_some() {
        warnings
            .push("block I/O limits name host devices and are not applied in the guest".to_owned());
        resources.set_block_io(None);
    }
    if resources.rdma().is_some() {
        warnings.push("RDMA limits are not applied in the guest".to_owned());
        resources.set_rdma(None);
    }
    if let Some(network) = resources.network() {
        // Of cgroup v1, and of host interfaces.
        if network.class_id().is_some() {
            warnings.push("the network class (network.classID) is not applied".to_owned());
        }
        if network
            .priorities()
            .as_ref()
            .is_some_and(|all| !all.is_empty())
        {
            warnings.push(
                "the network priorities (network.priorities) name host interfaces and are not applied"
                    .to_owned(),
            );
        }
        resources.set_network(None);
    }
}

#[cfg(test)]
mod tests;
