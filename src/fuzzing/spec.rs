//! The OCI specification that containerd hands over: whatever is in it, it is
//! refused by name or becomes one that has nothing of the host in it.

use arbitrary::{Result, Unstructured};
use oci_spec::runtime::{LinuxResources, Spec};
use serde_json::{Value, json};

use crate::config::Size;
use crate::sandbox::size::{self, Limits};
use crate::sandbox::spec;

/// Places in a specification.
const PLACES: [&str; 30] = [
    "/process/args",
    "/process/cwd",
    "/process/env",
    "/process/user",
    "/process/terminal",
    "/process/consoleSize",
    "/process/capabilities",
    "/process/rlimits",
    "/process/oomScoreAdj",
    "/process/apparmorProfile",
    "/process",
    "/root/path",
    "/root/readonly",
    "/hostname",
    "/mounts/0",
    "/mounts/0/type",
    "/mounts/0/source",
    "/mounts/0/options",
    "/mounts",
    "/hooks",
    "/annotations",
    "/linux/namespaces/0",
    "/linux/namespaces/0/path",
    "/linux/devices",
    "/linux/resources/cpu",
    "/linux/resources/memory",
    "/linux/resources",
    "/linux/sysctl",
    "/linux/cgroupsPath",
    "/linux/seccomp",
];

/// Texts that mean something somewhere.
const TEXTS: [&str; 20] = [
    "",
    "/",
    "..",
    "/proc/1/ns/net",
    "network",
    "pid",
    "cgroup",
    "bind",
    "rbind",
    "ro",
    "proc",
    "tmpfs",
    "/dev/sda",
    "c",
    "b",
    "0-3,5",
    "SCMP_ACT_ERRNO",
    "host",
    "a\u{0}b",
    "cpu",
];

/// Keys of objects.
const KEYS: [&str; 24] = [
    "type",
    "path",
    "source",
    "destination",
    "options",
    "major",
    "minor",
    "uid",
    "gid",
    "quota",
    "period",
    "cpus",
    "limit",
    "width",
    "height",
    "prestart",
    "createRuntime",
    "startContainer",
    "args",
    "cwd",
    "user",
    "cpu",
    "memory",
    "defaultAction",
];

fn base() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid"}],
            "resources": {"cpu": {"quota": 1000, "cpus": "0-1"}, "memory": {"limit": 1_000_000}},
        },
    })
}

fn value(input: &mut Unstructured<'_>, depth: usize) -> Result<Value> {
    let kind: u8 = input.arbitrary()?;
    Ok(match kind % 8 {
        0 => Value::Null,
        1 => json!(input.arbitrary::<bool>()?),
        2 => json!(input.arbitrary::<i8>()?),
        3 => json!(input.arbitrary::<i64>()?),
        4 | 5 => json!(TEXTS[usize::from(input.arbitrary::<u8>()?) % TEXTS.len()]),
        6 if depth > 0 => {
            let count = input.arbitrary::<u8>()? % 4;
            (0..count)
                .map(|_| value(input, depth - 1))
                .collect::<Result<Vec<_>>>()?
                .into()
        }
        7 if depth > 0 => {
            let count = input.arbitrary::<u8>()? % 5;
            let mut object = serde_json::Map::new();
            for _ in 0..count {
                let key = KEYS[usize::from(input.arbitrary::<u8>()?) % KEYS.len()];
                object.insert(key.to_owned(), value(input, depth - 1)?);
            }
            object.into()
        }
        _ => json!(u64::MAX),
    })
}

/// Sets what is at a JSON pointer, whose parents may be missing.
fn put(spec: &mut Value, place: &str, new: Value) {
    let Some((parent, key)) = place.rsplit_once('/') else {
        return;
    };
    match spec.pointer_mut(parent) {
        Some(Value::Object(object)) => drop(object.insert(key.to_owned(), new)),
        Some(Value::Array(array)) => {
            if let Some(slot) = key
                .parse()
                .ok()
                .and_then(|index: usize| array.get_mut(index))
            {
                *slot = new;
            }
        }
        _ => {}
    }
}

fn edited(input: &mut Unstructured<'_>) -> Value {
    let mut spec = base();
    while !input.is_empty() {
        let place = input.arbitrary::<u8>().unwrap_or(0);
        let Ok(new) = value(input, 3) else {
            break;
        };
        put(&mut spec, PLACES[usize::from(place) % PLACES.len()], new);
    }
    spec
}

/// First byte even: JSON follows; odd: changes to a good specification.
pub(super) fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let text = if first.is_multiple_of(2) {
        rest.to_vec()
    } else {
        edited(&mut Unstructured::new(rest))
            .to_string()
            .into_bytes()
    };
    if let Ok(process) = spec::process_for_guest(&text) {
        serde_json::from_slice::<Value>(&process.json).expect("JSON");
    }
    if let Ok(resources) = serde_json::from_slice::<LinuxResources>(&text) {
        let _ = spec::resources_for_guest(&resources);
        sized(&Limits::of_resources(&resources));
    }
    let Ok(spec) = serde_json::from_slice::<Spec>(&text) else {
        return;
    };
    sized(&Limits::of(&spec));
    let Ok(guest) = spec::for_guest(&spec, "c1", "1") else {
        return;
    };
    let again: Spec =
        serde_json::from_slice(&guest.json).expect("what the guest gets is a specification");
    assert!(again.process().is_some());
    for mount in again.mounts().iter().flatten() {
        let mut options = mount.options().iter().flatten();
        let binds = options.any(|option| option == "bind" || option == "rbind");
        if binds || mount.typ().as_deref() == Some("bind") {
            let source = mount.source().as_deref().expect("a source");
            let shares = std::path::Path::new(nacre_protocol::SHARES);
            assert_eq!(source.parent(), Some(shares), "something of the host's");
        }
    }
    if let Some(linux) = again.linux() {
        for namespace in linux.namespaces().iter().flatten() {
            assert_eq!(namespace.path(), &None, "a namespace of the host");
        }
        assert_eq!(
            linux.cgroups_path().as_deref(),
            Some(std::path::Path::new("/nacre/c1"))
        );
    }
    let same = spec::for_guest(&again, "c1", "1").expect("what the guest gets can be given");
    let parse = |json: &[u8]| serde_json::from_slice::<Value>(json).expect("JSON");
    assert_eq!(
        parse(&same.json),
        parse(&guest.json),
        "it changes when it is adapted again"
    );
}

fn sized(limits: &Limits) {
    let size = size::boot_size(limits, &Size::default(), 8);
    assert!((1..=8).contains(&size.vcpus), "{size:?}");
    assert!(size.memory_mib >= 1);
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let text = |value: Value| format!("\0{value}").into_bytes();
    let mut rich = base();
    rich["hooks"] = json!({"startContainer": [{"path": "/bin/hook"}]});
    rich["linux"]["devices"] = json!([{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]);
    rich["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO"});
    rich["process"]["capabilities"] = json!({"bounding": ["CAP_CHOWN"]});
    rich["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 5}]);
    vec![
        text(base()),
        text(rich.clone()),
        text(rich["process"].clone()),
        text(rich["linux"]["resources"].clone()),
        vec![1, 14, 7, 3, 0, 4, 7, 2, 4, 9, 3, 4, 1],
        vec![1, 19, 7, 1, 17, 6, 1, 7, 1, 1, 4, 12],
    ]
}
