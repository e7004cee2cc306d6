//! The OCI spec as the guest gets it. What has no meaning in a guest is taken
//! out with a warning; what would silently mean something else is refused by
//! name: host devices, foreign namespaces. Bind mounts of the host become bind
//! mounts of what the host is to share.

use std::path::{Path, PathBuf};

use nacre_protocol::SHARES;
use oci_spec::runtime::{
    Hooks, Linux, LinuxDeviceType, LinuxNamespaceType, LinuxResources, Mount, Process, Spec,
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
    /// A bind mount with owners mapped.
    #[error(
        "The bind mount of {origin} at {destination} is to have its owners mapped (idmap), which is not served"
    )]
    Mapped {
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
    let mut spec = spec.clone();
    let mut warnings = Vec::new();
    let mut binds = Vec::new();
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        if let Some(bind) = adapt_mount(mount, format!("{prefix}.{index}"))? {
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
    adapt_linux(&mut linux, id, &mut warnings)?;
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
fn adapt_mount(mount: &mut Mount, name: String) -> Result<Option<Bind>, Error> {
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
    let maps = [mount.uid_mappings(), mount.gid_mappings()];
    if has(&["idmap", "ridmap"]) || maps.into_iter().flatten().any(|map| !map.is_empty()) {
        return Err(Error::Mapped {
            origin: source.display().to_string(),
            destination: destination.display().to_string(),
        });
    }
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
    }))
}

fn adapt_linux(linux: &mut Linux, id: &str, warnings: &mut Vec<String>) -> Result<(), Error> {
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
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        let Some(path) = namespace.path().clone() else {
            continue;
        };
        if namespace.typ() == LinuxNamespaceType::Network || path.as_os_str().is_empty() {
            // The host's netns is the VM's; the container has the guest's. An empty path is a new namespace.
            namespace.set_path(None);
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
mod tests {
    use oci_spec::runtime::LinuxNamespaceBuilder;
    use serde_json::{Value, json};

    use super::*;

    fn spec(change: impl FnOnce(&mut Value)) -> Spec {
        let mut value = serde_json::to_value(Spec::default()).unwrap();
        value["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}]);
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn adapted(change: impl FnOnce(&mut Value)) -> (Value, Vec<String>) {
        let guest = for_guest(&spec(change), "c1", "1").unwrap();
        (serde_json::from_slice(&guest.json).unwrap(), guest.warnings)
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        for_guest(&spec(change), "c1", "1").unwrap_err().to_string()
    }

    #[test]
    fn the_usual_mounts_stay() {
        let (value, warnings) = adapted(|_| {});
        assert_eq!(
            value["mounts"].as_array().unwrap().len(),
            Spec::default().mounts().as_ref().unwrap().len()
        );
        assert_eq!(value["linux"]["cgroupsPath"], "/nacre/c1");
        assert_eq!(warnings, Vec::<String>::new());
    }

    #[test]
    fn bind_mounts_are_of_what_the_host_shares() {
        for (mount, read_only, recursive) in [
            (
                json!({"destination": "/data", "type": "bind", "source": "/srv/data"}),
                false,
                false,
            ),
            (
                json!({"destination": "/data", "type": "none", "source": "/srv/data", "options": ["rbind", "rw", "ro"]}),
                true,
                true,
            ),
            (
                json!({"destination": "/data", "source": "/srv/data", "options": ["bind", "ro", "rw"]}),
                false,
                false,
            ),
        ] {
            let guest = for_guest(
                &spec(|spec| {
                    spec["mounts"] = json!([{"destination": "/tmp", "type": "tmpfs"}, mount]);
                }),
                "c1",
                "7",
            )
            .unwrap();
            let expected = Bind {
                name: "7.1".to_owned(),
                source: "/srv/data".into(),
                destination: "/data".into(),
                read_only,
                recursive,
            };
            assert_eq!(guest.binds, [expected]);
            let value: Value = serde_json::from_slice(&guest.json).unwrap();
            assert_eq!(value["mounts"][1]["source"], "/run/nacre/share/7.1");
            assert_eq!(value["mounts"][1]["type"], "bind");
        }
    }

    #[test]
    fn mounts_that_the_guest_cannot_have_are_refused_by_name() {
        for (mount, words) in [
            (
                json!({"destination": "/o", "type": "overlay", "options": ["lowerdir=/x"]}),
                ["/o", "overlay"],
            ),
            (
                json!({"destination": "/d", "type": "bind"}),
                ["/d", "no source"],
            ),
            (
                json!({"destination": "/d", "type": "bind", "source": "/s", "options": ["rbind", "idmap"]}),
                ["/s", "idmap"],
            ),
            (
                json!({"destination": "/d", "type": "bind", "source": "/s",
                    "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}]}),
                ["/s", "idmap"],
            ),
        ] {
            let error = refused(|spec| spec["mounts"].as_array_mut().unwrap().push(mount));
            for word in words {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
    }

    #[test]
    fn propagation_of_the_root_is_named_as_the_guests_runtime_does() {
        for (given, expected) in [
            ("rslave", "slave"),
            ("rshared", "shared"),
            ("rprivate", "private"),
            ("slave", "slave"),
        ] {
            let (value, _) = adapted(|spec| spec["linux"]["rootfsPropagation"] = json!(given));
            assert_eq!(value["linux"]["rootfsPropagation"], expected);
        }
    }

    #[test]
    fn the_network_namespace_becomes_the_guests_and_others_are_refused() {
        let (value, _) = adapted(|spec| {
            spec["linux"]["namespaces"] =
                json!([{"type": "network", "path": "/run/netns/x"}, {"type": "ipc", "path": ""}]);
        });
        assert_eq!(
            value["linux"]["namespaces"],
            json!([{"type": "network"}, {"type": "ipc"}])
        );
        let error = refused(|spec| {
            spec["linux"]["namespaces"] = json!([{"type": "ipc", "path": "/proc/7/ns/ipc"}]);
        });
        assert!(error.contains("/proc/7/ns/ipc"), "{error}");
        LinuxNamespaceBuilder::default().build().unwrap();
    }

    #[test]
    fn a_namespace_with_an_empty_path_is_a_new_one() {
        let (value, _) = adapted(|spec| {
            spec["linux"]["namespaces"] = json!([{"type": "ipc", "path": ""}, {"type": "pid"}]);
        });
        assert_eq!(
            value["linux"]["namespaces"],
            json!([{"type": "ipc"}, {"type": "pid"}])
        );
    }

    #[test]
    fn security_labels_go_with_a_warning_and_seccomp_and_the_oom_score_stay() {
        let (value, warnings) = adapted(|spec| {
            spec["process"]["apparmorProfile"] = json!("docker-default");
            spec["process"]["selinuxLabel"] = json!("x:y");
            spec["process"]["oomScoreAdj"] = json!(-500);
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO"});
            spec["linux"]["resources"] =
                json!({"cpu": {"cpus": "4-5", "quota": 1000}, "devices": []});
        });
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert_eq!(value["process"]["oomScoreAdj"], -500);
        assert_eq!(value["process"].get("apparmorProfile"), None);
        assert_eq!(value["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(value["linux"]["resources"]["cpu"], json!({"quota": 1000}));
    }

    #[test]
    fn what_names_things_of_the_host_goes_with_one_warning_each() {
        let (value, warnings) = adapted(|spec| {
            spec["process"]["execCPUAffinity"] = json!({"initial": "0", "final": "1"});
            spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0"});
            spec["linux"]["resources"] = json!({
                "cpu": {"cpus": "2-3", "mems": "0-1"},
                "network": {"classID": 7, "priorities": [{"name": "eth0", "priority": 1}]},
            });
        });
        for word in [
            "affinity",
            "memoryPolicy",
            "\"2-3\"",
            "\"0-1\"",
            "network.classID",
            "network.priorities",
        ] {
            let about: Vec<_> = warnings.iter().filter(|w| w.contains(word)).collect();
            assert_eq!(about.len(), 1, "{word}: {warnings:?}");
        }
        assert_eq!(warnings.len(), 6, "{warnings:?}");
        assert_eq!(value["process"].get("execCPUAffinity"), None);
        assert_eq!(value["linux"].get("memoryPolicy"), None);
        assert_eq!(value["linux"]["resources"].get("network"), None);
        assert_eq!(value["linux"]["resources"]["cpu"], json!({}));
        // Docker's clients set them empty.
        let (_, warnings) = adapted(|spec| {
            spec["linux"]["resources"] = json!({"cpu": {"cpus": "", "mems": ""}, "network": {}});
        });
        assert_eq!(warnings, Vec::<String>::new());
    }

    #[test]
    fn the_guest_gets_its_own_two_kinds_of_hooks() {
        let hook = json!([{"path": "/bin/hook"}]);
        let (value, _) = adapted(|spec| {
            spec["hooks"] =
                json!({"createRuntime": hook, "createContainer": hook, "startContainer": hook});
        });
        assert_eq!(
            value["hooks"],
            json!({"createContainer": hook, "startContainer": hook})
        );
        let (value, _) = adapted(|spec| spec["hooks"] = json!({"poststop": hook}));
        assert_eq!(value.get("hooks"), None);
    }

    #[test]
    fn host_devices_are_refused_and_common_ones_stay() {
        let error = refused(|spec| {
            spec["linux"]["devices"] =
                json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
        });
        assert!(error.contains("/dev/sda"), "{error}");
        let (value, _) = adapted(|spec| {
            spec["linux"]["devices"] =
                json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]);
        });
        assert_eq!(value["linux"]["devices"][0]["path"], "/dev/null");
    }

    #[test]
    fn an_execs_process_keeps_what_means_something_in_the_guest() {
        let process = json!({
            "terminal": true, "consoleSize": {"height": 24, "width": 80}, "user": {"uid": 5, "gid": 6},
            "args": ["ls"], "cwd": "/", "apparmorProfile": "x", "selinuxLabel": "y",
        });
        let guest = process_for_guest(process.to_string().as_bytes()).unwrap();
        let value: Value = serde_json::from_slice(&guest.json).unwrap();
        assert_eq!(guest.size, Some((80, 24)));
        assert_eq!(value["user"]["uid"], 5);
        assert_eq!(value.get("apparmorProfile"), None);
        assert_eq!(value.get("selinuxLabel"), None);
        let plain = json!({"user": {"uid": 0, "gid": 0}, "args": ["ls"], "cwd": "/"}).to_string();
        assert_eq!(process_for_guest(plain.as_bytes()).unwrap().size, None);
        assert!(process_for_guest(b"nonsense").is_err());
    }

    #[test]
    fn new_limits_lose_the_hosts_cpu_numbers() {
        let resources: LinuxResources = serde_json::from_value(
            json!({"cpu": {"cpus": "4-5", "quota": 1000}, "pids": {"limit": 7}}),
        )
        .unwrap();
        let guest = resources_for_guest(&resources).unwrap();
        let value: Value = serde_json::from_slice(&guest.json).unwrap();
        assert_eq!(value["cpu"], json!({"quota": 1000}));
        assert_eq!(value["pids"]["limit"], 7);
        assert!(
            matches!(&guest.warnings[..], [warning] if warning.contains("\"4-5\"")),
            "{:?}",
            guest.warnings
        );
    }

    #[test]
    fn a_spec_without_a_process_is_refused() {
        let mut spec = spec(|_| {});
        spec.set_process(None);
        assert!(matches!(for_guest(&spec, "c", "1"), Err(Error::NoProcess)));
    }
}
