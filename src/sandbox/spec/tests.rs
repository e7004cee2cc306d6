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
fn the_first_containers_namespaces_can_be_shared() {
    let first = Some(First {
        host_pid: 4711,
        guest_pid: 33,
    });
    let with = |kind: &str, path: &str| {
        let spec = spec(|spec| {
            spec["linux"]["namespaces"] = json!([{"type": kind, "path": path}]);
        });
        for_guest_beside(&spec, "c2", "1", first)
    };
    for kind in ["ipc", "uts", "pid", "user"] {
        let guest = with(kind, &format!("/proc/4711/ns/{kind}")).unwrap();
        let value: Value = serde_json::from_slice(&guest.json).unwrap();
        assert_eq!(
            value["linux"]["namespaces"],
            json!([{"type": kind, "path": format!("/proc/33/ns/{kind}")}])
        );
    }
    for (kind, path) in [
        ("ipc", "/proc/4712/ns/ipc"),
        ("ipc", "/proc/4711/ns/uts"),
        ("mount", "/proc/4711/ns/mnt"),
        ("user", "/proc/1/ns/user"),
    ] {
        let error = with(kind, path).unwrap_err().to_string();
        assert!(error.contains(path), "{error}");
    }
    // Who shares the first one's users has its network as well; others have the guest's.
    let users = json!({"type": "user", "path": "/proc/4711/ns/user"});
    for (users, network) in [
        (users, json!("/proc/33/ns/net")),
        (json!({"type": "user"}), Value::Null),
        (json!({"type": "ipc"}), Value::Null),
    ] {
        for mut of in [
            json!({"type": "network"}),
            json!({"type": "network", "path": "/run/netns/x"}),
        ] {
            let spec = spec(|spec| spec["linux"]["namespaces"] = json!([of, users]));
            let guest = for_guest_beside(&spec, "c2", "1", first).unwrap();
            let value: Value = serde_json::from_slice(&guest.json).unwrap();
            of = value["linux"]["namespaces"][0].clone();
            assert_eq!(of["path"], network, "{users}");
        }
    }
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
            owners: None,
        };
        assert_eq!(guest.binds, [expected]);
        let value: Value = serde_json::from_slice(&guest.json).unwrap();
        assert_eq!(value["mounts"][1]["source"], "/run/nacre/share/7.1");
        assert_eq!(value["mounts"][1]["type"], "bind");
    }
}

#[test]
fn owners_are_mapped_by_the_mounts_maps_or_the_containers() {
    let map = |first: u32| json!([{"containerID": 0, "hostID": first, "size": 9}]);
    for (more, users, all) in [
        (
            json!({"uidMappings": map(5), "gidMappings": map(6)}),
            5,
            false,
        ),
        (
            json!({"uidMappings": map(5), "gidMappings": map(6), "options": ["rbind", "ro", "ridmap"]}),
            5,
            true,
        ),
        (json!({"options": ["rbind", "idmap"]}), 7, false),
    ] {
        let mut mount = json!({"destination": "/d", "type": "bind", "source": "/s"});
        for (key, value) in more.as_object().unwrap() {
            mount[key] = value.clone();
        }
        let guest = for_guest(
            &spec(|spec| {
                spec["mounts"] = json!([mount]);
                let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.push(json!({"type": "user"}));
                spec["linux"]["uidMappings"] = map(7);
                spec["linux"]["gidMappings"] = map(8);
            }),
            "c1",
            "7",
        )
        .unwrap();
        let range = |shown| {
            let (stored, count) = (0, 9);
            vec![Range {
                stored,
                shown,
                count,
            }]
        };
        let owners = Owners {
            users: range(users),
            groups: range(users + 1),
        };
        let expected = Some(MappedOwners { owners, all });
        assert_eq!(guest.binds[0].owners, expected);
        let value: Value = serde_json::from_slice(&guest.json).unwrap();
        let left = value["mounts"][0].to_string();
        assert!(
            !left.contains("idmap") && !left.contains("Mappings"),
            "{left}"
        );
        assert_eq!(
            value["linux"]["uidMappings"],
            map(7),
            "the container's own stay"
        );
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
        spec["linux"]["resources"] = json!({"cpu": {"cpus": "4-5", "quota": 1000}, "devices": []});
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
