//! What the agent changes in a container's specification before the runtime
//! sees it. The host has adapted it to the guest already; here it gets the
//! paths that only the agent knows, and loses what this kernel cannot do.

use std::path::Path;

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxCapabilities, LinuxNamespaceType, LinuxResources, MountBuilder, Process, RootBuilder, Spec,
};

use crate::confinement::{self, Own};
use crate::error::Error;
use crate::net;
use crate::seccomp::{self, Filter};
use crate::users::Users;

/// The root, relative to the bundle.
pub const ROOT: &str = "rootfs";

/// A specification that the runtime takes, and what the agent must know of it.
pub struct Adapted {
    /// The specification.
    pub spec: Spec,
    /// Numeric user and group of the process, as they are outside of the container.
    pub owner: (u32, u32),
    /// Its limits, which the agent applies itself: the runtime's conversion leaves some of them out.
    pub resources: LinuxResources,
    /// Its seccomp profile.
    pub filter: Option<Filter>,
    /// The capabilities that the specification gives its init, which an exec has that names none.
    pub capabilities: Option<LinuxCapabilities>,
    /// The capabilities that its init is to have, if it was lent others.
    pub own: Option<Own>,
    /// The container's users, if it has a user namespace.
    pub users: Option<Users>,
    /// Whether the container gets a network namespace of its own, which begins with `lo` down.
    pub own_network: bool,
    /// Whether it joins the one at [`SHARED`](crate::net::SHARED).
    pub shared_network: bool,
}

/// Adapts a specification. `apparmor` says whether the kernel has it switched on.
///
/// # Errors
/// `InvalidArgument` if it does not parse, or if there is nothing to run in it.
pub fn adapt(json: &[u8], cgroup: &Path, terminal: bool, apparmor: bool) -> Result<Adapted, Error> {
    let invalid = |what: String| Error::InvalidArgument(format!("the specification {what}"));
    let mut spec: Spec = serde_json::from_slice(json)
        .map_err(|error| invalid(format!("does not parse: {error}")))?;

    let readonly = spec.root().as_ref().and_then(|root| root.readonly());
    let root = RootBuilder::default()
        .path(ROOT)
        .readonly(readonly.unwrap_or(false))
        .build()
        .map_err(|error| invalid(format!("has no usable root: {error}")))?;
    spec.set_root(Some(root));

    give_devices(&mut spec).map_err(|error| invalid(format!("has no usable mounts: {error}")))?;

    let Some(process) = spec.process_mut() else {
        return Err(invalid("has no process".into()));
    };
    let owner = adapt_process(process, terminal, apparmor)
        .map_err(|nothing| invalid(format!("has no process.{nothing}")))?;

    let Some(linux) = spec.linux_mut() else {
        return Err(invalid("has no linux section".into()));
    };
    linux.set_cgroups_path(Some(cgroup.to_owned()));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    let resources = linux.resources().clone().unwrap_or_default();
    linux.set_resources(None);
    // The runtime is built without C libraries, and applies no filter; the helper does.
    let filter = linux.seccomp().as_ref().map(seccomp::compile).transpose()?;
    linux.set_seccomp(None);
    let users = Users::of(linux);
    let owner = users.as_ref().map_or(owner, |users| users.outside(owner));
    let (mut own_network, mut shared_network) = (false, false);
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        if namespace.typ() != LinuxNamespaceType::Network || namespace.path().is_some() {
            continue;
        }
        // Users of another namespace have no say in the shared one, and may not join it.
        if users.is_some() {
            own_network = true;
        } else {
            shared_network = true;
            namespace.set_path(Some(net::SHARED.into()));
        }
    }

    let capabilities = spec
        .process()
        .as_ref()
        .and_then(|process| process.capabilities().clone());
    let own = match (&filter, spec.process_mut()) {
        (Some(_), Some(process)) => confinement::lend(process),
        _ => None,
    };

    // These run on the host, where the runtime namespace is; the other two kinds run here.
    if let Some(hooks) = spec.hooks_mut() {
        #[allow(deprecated)]
        hooks.set_prestart(None);
        hooks.set_create_runtime(None);
        hooks.set_poststart(None);
        hooks.set_poststop(None);
        if hooks.create_container().is_none() && hooks.start_container().is_none() {
            spec.set_hooks(None);
        }
    }
    Ok(Adapted {
        spec,
        owner,
        resources,
        filter,
        capabilities,
        own,
        users,
        own_network,
        shared_network,
    })
}

/// Sees to it that /dev is of the container's own: the runtime makes device nodes and links there, which a root that the
/// host shares cannot have, and one that was used before has already.
fn give_devices(spec: &mut Spec) -> Result<(), OciSpecError> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let devices = Path::new("/dev");
    if mounts.iter().any(|mount| mount.destination() == devices) {
        return Ok(());
    }
    let options = ["nosuid", "strictatime", "mode=755", "size=65536k"];
    let own = MountBuilder::default()
        .destination(devices)
        .typ("tmpfs")
        .source("tmpfs")
        .options(options.map(str::to_owned))
        .build()?;
    mounts.insert(0, own);
    spec.set_mounts(Some(mounts));
    Ok(())
}

/// Whether the kernel has AppArmor switched on.
pub fn kernel_has_apparmor() -> bool {
    Path::new("/sys/kernel/security/apparmor/profiles").exists()
}

/// Adapts the process of an exec; answers with it and its numeric user and group.
///
/// # Errors
/// `InvalidArgument` if it does not parse, or if there is nothing to run in it.
pub fn adapt_exec(
    json: &[u8],
    terminal: bool,
    apparmor: bool,
) -> Result<(Process, (u32, u32)), Error> {
    let invalid = |what: String| Error::InvalidArgument(format!("the process {what}"));
    let mut process: Process = serde_json::from_slice(json)
        .map_err(|error| invalid(format!("does not parse: {error}")))?;
    let owner = adapt_process(&mut process, terminal, apparmor)
        .map_err(|nothing| invalid(format!("has no {nothing}")))?;
    if process.cwd().as_os_str().is_empty() {
        process.set_cwd("/".into());
    }
    if !process.cwd().is_absolute() {
        let cwd = process.cwd().display();
        return Err(invalid(format!(
            "has the working directory {cwd}, which is not absolute"
        )));
    }
    Ok((process, owner))
}

/// What holds for every process; the error says what it lacks.
fn adapt_process(
    process: &mut Process,
    terminal: bool,
    apparmor: bool,
) -> Result<(u32, u32), &'static str> {
    let first = process.args().as_ref().and_then(|args| args.first());
    if first.is_none_or(String::is_empty) {
        return Err("args: there is nothing to run");
    }
    process.set_terminal(Some(terminal));
    if !terminal {
        process.set_console_size(None);
    }
    if !apparmor && process.apparmor_profile().is_some() {
        process.set_apparmor_profile(None);
    }
    process.set_selinux_label(None);
    Ok((process.user().uid(), process.user().gid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"{
        "ociVersion": "1.1.0",
        "root": {"path": "/var/lib/elsewhere", "readonly": true},
        "process": {
            "user": {"uid": 1000, "gid": 50}, "args": ["sh"], "cwd": "/",
            "terminal": true, "apparmorProfile": "cri-containerd.apparmor.d"
        },
        "hooks": {
            "createRuntime": [{"path": "/host/hook"}],
            "startContainer": [{"path": "/guest/hook"}]
        },
        "linux": {
            "cgroupsPath": "/default/c1",
            "resources": {"pids": {"limit": 7}},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "mount"}]
        }
    }"#;

    fn adapted(json: &str) -> Result<Adapted, Error> {
        adapt(json.as_bytes(), Path::new("/nacre/c1"), false, false)
    }

    #[test]
    fn the_agents_own_paths_replace_the_hosts() {
        let Adapted {
            spec,
            owner,
            own_network,
            shared_network,
            users,
            resources,
            filter,
            capabilities,
            own,
        } = adapted(SPEC).unwrap();
        let root = spec.root().as_ref().unwrap();
        assert_eq!(root.path(), Path::new("rootfs"));
        assert_eq!(root.readonly(), Some(true));
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(
            linux.cgroups_path().as_deref(),
            Some(Path::new("/nacre/c1"))
        );
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.terminal(), Some(false));
        assert!(process.apparmor_profile().is_none());
        assert_eq!(owner, (1000, 50));
        assert!(shared_network && !own_network && users.is_none());
        assert!(filter.is_none() && own.is_none() && capabilities.is_none());
        let network = linux.namespaces().as_ref().unwrap()[1].path().clone();
        assert_eq!(network.as_deref(), Some(Path::new("/run/nacre/netns")));
        assert_eq!(resources.pids().map(|pids| pids.limit()), Some(7));
        assert!(linux.resources().is_none(), "nobody applies them twice");
    }

    #[test]
    fn devices_are_the_containers_own_unless_they_are_mounted() {
        let mounts = |spec: Spec| spec.mounts().clone().unwrap_or_default();
        let given = mounts(adapted(SPEC).unwrap().spec);
        assert_eq!(given[0].destination(), Path::new("/dev"));
        assert_eq!(given[0].typ().as_deref(), Some("tmpfs"));
        let with = SPEC.replace(
            r#""hooks""#,
            r#""mounts": [{"destination": "/dev", "type": "devtmpfs"}], "hooks""#,
        );
        let kept = mounts(adapted(&with).unwrap().spec);
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].typ().as_deref(), Some("devtmpfs"));
    }

    #[test]
    fn only_the_guests_hooks_stay() {
        let spec = adapted(SPEC).unwrap().spec;
        let hooks = spec.hooks().as_ref().unwrap();
        assert!(hooks.create_runtime().is_none());
        assert_eq!(hooks.start_container().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn a_seccomp_profile_is_compiled_and_taken_out() {
        let profile = r#""seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}, "cgroupsPath""#;
        let json = SPEC.replace(r#""cgroupsPath""#, profile).replace(
            r#""cwd": "/""#,
            r#""cwd": "/", "capabilities": {"effective": ["CAP_KILL"]}"#,
        );
        let adapted = adapted(&json).unwrap();
        assert!(adapted.filter.is_some() && adapted.own.is_some());
        assert!(adapted.spec.linux().as_ref().unwrap().seccomp().is_none());
    }

    #[test]
    fn users_of_their_own_have_a_network_of_their_own() {
        let mapped = SPEC.replace(
            r#"{"type": "network"}"#,
            r#"{"type": "network"}, {"type": "user"}"#,
        );
        let adapted = adapted(&mapped).unwrap();
        assert!(adapted.own_network && adapted.users.is_some() && !adapted.shared_network);
        let linux = adapted.spec.linux().as_ref().unwrap();
        assert_eq!(linux.namespaces().as_ref().unwrap()[1].path(), &None);
    }

    #[test]
    fn a_network_with_a_path_is_not_our_own() {
        let joined = SPEC.replace(
            r#"{"type": "network"}"#,
            r#"{"type": "network", "path": "/proc/1/ns/net"}"#,
        );
        let adapted = adapted(&joined).unwrap();
        assert!(!adapted.own_network && !adapted.shared_network);
    }

    #[test]
    fn the_process_of_an_exec_is_adapted_alike() {
        let json = br#"{"user":{"uid":7,"gid":8},"args":["ls"],"cwd":"","terminal":true,
            "apparmorProfile":"x","consoleSize":{"height":1,"width":2}}"#;
        let (process, owner) = adapt_exec(json, false, false).unwrap();
        assert_eq!(owner, (7, 8));
        assert_eq!(process.cwd(), Path::new("/"));
        assert_eq!(process.terminal(), Some(false));
        assert!(process.apparmor_profile().is_none() && process.console_size().is_none());
        for (what, json) in [
            ("does not parse", "[]"),
            (
                "nothing to run",
                r#"{"args":[],"cwd":"/","user":{"uid":0,"gid":0}}"#,
            ),
            (
                "not absolute",
                r#"{"args":["a"],"cwd":"b","user":{"uid":0,"gid":0}}"#,
            ),
        ] {
            match adapt_exec(json.as_bytes(), false, false) {
                Err(Error::InvalidArgument(words)) => assert!(words.contains(what), "{words}"),
                other => panic!("{json}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_cannot_run_is_refused() {
        for (what, json) in [
            ("does not parse", "{".into()),
            ("nothing to run", SPEC.replace(r#"["sh"]"#, "[]")),
            ("nothing to run", SPEC.replace(r#"["sh"]"#, r#"[""]"#)),
            ("no process", r#"{"ociVersion":"1.0.0","linux":{}}"#.into()),
        ] {
            match adapted(&json) {
                Err(Error::InvalidArgument(words)) => assert!(words.contains(what), "{words}"),
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("{json} was taken"),
            }
        }
    }
}
