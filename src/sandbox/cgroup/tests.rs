//! The cgroup over directories that look like a host's.

use std::fs;

use super::*;
use crate::record::{Owner, Resource};

/// What the kernel puts into a new directory, by what the parent is like.
fn kernel(path: &Path) -> io::Result<()> {
    fs::create_dir(path)?;
    for file in [
        "cgroup.procs",
        "cgroup.subtree_control",
        "cpu.max",
        "cpuset.cpus",
        "cpuset.mems",
    ] {
        fs::write(path.join(file), "")?;
    }
    Ok(())
}

struct Host {
    folder: tempfile::TempDir,
    tree: Tree,
    record: Record,
}

impl Host {
    fn new(mounts: &[(&str, &str, &str)], own: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut mountinfo = String::new();
        for (name, kind, options) in mounts {
            let root = folder.path().join(name);
            kernel(&root).unwrap();
            fs::write(root.join("cgroup.controllers"), "cpuset cpu memory pids").unwrap();
            fs::write(root.join("cpuset.cpus"), "0-3\n").unwrap();
            fs::write(root.join("cpuset.mems"), "0\n").unwrap();
            mountinfo += &format!(
                "1 0 0:1 / {} rw - {kind} {kind} rw,{options}\n",
                root.display()
            );
        }
        let tree = Tree::fake(&mountinfo, own, kernel);
        let record = Record::create(&folder.path().join("state"), Owner::default()).unwrap();
        Self {
            folder,
            tree,
            record,
        }
    }

    fn v2() -> Self {
        Self::new(&[("c2", "cgroup2", "nsdelegate")], "0::/init\n")
    }

    fn v1() -> Self {
        Self::new(
            &[
                ("cpu", "cgroup", "cpu,cpuacct"),
                ("cpuset", "cgroup", "cpuset"),
                ("memory", "cgroup", "memory"),
            ],
            "1:cpu,cpuacct:/\n2:cpuset:/\n3:memory:/\n",
        )
    }

    fn enter(&self, name: &str, resources: &str) -> Result<Arc<VmCgroup>, Error> {
        let cpu = Cpu::of_resources(&resources_of(resources));
        let place = Place::Spec(name.to_owned());
        VmCgroup::enter(&self.tree, &place, 640 << 20, ("c1", cpu), &self.record)
    }

    fn read(&self, file: &str) -> String {
        let path = self.folder.path().join(file);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn resources_of(text: &str) -> LinuxResources {
    serde_json::from_str(text).unwrap()
}

const CPU: &str =
    r#"{"cpu":{"quota":50000,"period":200000,"shares":1024,"cpus":"0-1","mems":"0"}}"#;

#[test]
fn v2_limits_are_written_and_the_process_is_in() {
    let host = Host::v2();
    let cgroup = host.enter("/ns/c1", CPU).unwrap();
    assert_eq!(cgroup.paths(), [host.path("c2/ns/c1")]);
    for (file, text) in [
        ("memory.max", "671088640"),
        ("cpu.max", "50000 200000"),
        ("cpu.weight", "39"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("cgroup.procs", &std::process::id().to_string()),
    ] {
        assert_eq!(host.read(&format!("c2/ns/c1/{file}")), text, "{file}");
    }
    for parent in ["c2", "c2/ns"] {
        let passed = host.read(&format!("{parent}/cgroup.subtree_control"));
        for controller in ["+memory", "+cpu", "+cpuset"] {
            assert!(passed.contains(controller), "{parent}: {passed}");
        }
    }
    assert_eq!(
        host.record.resources(),
        [
            Resource::CgroupParent(host.path("c2/ns")),
            Resource::Cgroup(host.path("c2/ns/c1"))
        ]
    );
}

#[test]
fn v1_limits_are_written_in_each_hierarchy() {
    let host = Host::v1();
    let cgroup = host.enter("system.slice:nacre:c1", CPU).unwrap();
    assert_eq!(cgroup.paths().len(), 3);
    let name = "system.slice/nacre-c1.scope";
    for (file, text) in [
        ("cpu/{}/cpu.cfs_quota_us", "50000"),
        ("cpu/{}/cpu.cfs_period_us", "200000"),
        ("cpu/{}/cpu.shares", "1024"),
        ("cpuset/{}/cpuset.cpus", "0-1"),
        ("cpuset/{}/cpuset.mems", "0"),
        ("memory/{}/memory.limit_in_bytes", "671088640"),
        ("memory/{}/cgroup.procs", &std::process::id().to_string()),
    ] {
        assert_eq!(host.read(&file.replace("{}", name)), text, "{file}");
    }
    // A process can only be in a set that is not empty, and so for all above it.
    assert_eq!(host.read("cpuset/system.slice/cpuset.cpus"), "0-3");
}

#[test]
fn without_cpu_limits_there_is_the_memory_maximum_and_no_quota() {
    let host = Host::v2();
    host.enter("c1", r#"{"memory":{"limit":1}}"#).unwrap();
    assert_eq!(host.read("c2/c1/memory.max"), "671088640");
    assert_eq!(host.read("c2/c1/cpu.max"), "max 100000");
    assert!(!host.path("c2/c1/cpu.weight").exists());
    assert_eq!(host.read("c2/c1/cpuset.cpus"), "");
}

#[test]
fn the_configured_parent_comes_before_the_spec() {
    let spec: Spec =
        serde_json::from_str(r#"{"ociVersion":"1.1.0","linux":{"cgroupsPath":"/from/spec"}}"#)
            .unwrap();
    let bare: Spec = serde_json::from_str(r#"{"ociVersion":"1.1.0"}"#).unwrap();
    let parent = Path::new("/machine");
    let below = Place::Below(parent.to_owned(), "ns-c1".to_owned());
    assert_eq!(Place::of(parent, "ns-c1", &spec).as_ref(), Some(&below));
    assert_eq!(
        Place::of(Path::new(""), "ns-c1", &spec),
        Some(Place::Spec("/from/spec".to_owned()))
    );
    assert_eq!(Place::of(Path::new(""), "ns-c1", &bare), None);
    let host = Host::v2();
    let cgroup = VmCgroup::enter(&host.tree, &below, 1, ("c1", Cpu::default()), &host.record);
    assert_eq!(cgroup.unwrap().paths(), [host.path("c2/machine/ns-c1")]);
}

#[test]
fn a_controller_that_is_not_there_or_not_passed_on_is_named() {
    let host = Host::new(&[("cpu", "cgroup", "cpu,cpuacct")], "");
    let error = host.enter("/c1", "{}").unwrap_err().to_string();
    assert!(error.contains("controller memory"), "{error}");

    let host = Host::v2();
    kernel(&host.path("c2/ns")).unwrap();
    // No process, root's either, writes to a directory.
    fs::remove_file(host.path("c2/ns/cgroup.subtree_control")).unwrap();
    fs::create_dir(host.path("c2/ns/cgroup.subtree_control")).unwrap();
    let error = host.enter("/ns/c1", "{}").unwrap_err().to_string();
    assert!(
        error.contains("c2/ns") && error.contains("memory"),
        "{error}"
    );
    assert!(!host.path("c2/ns/c1").exists());
    // What was there before is not ours to remove.
    assert_eq!(host.record.resources(), []);
}

#[test]
fn a_cgroup_with_processes_is_taken_and_not_recorded() {
    let host = Host::v2();
    kernel(&host.path("c2/busy")).unwrap();
    fs::write(host.path("c2/busy/cgroup.procs"), "77\n").unwrap();
    let error = host.enter("/busy", "{}").unwrap_err().to_string();
    assert!(
        error.contains("77") && error.contains("cgroupsPath"),
        "{error}"
    );
    assert_eq!(host.record.resources(), []);
    // One that is empty has been left by somebody.
    fs::write(host.path("c2/busy/cgroup.procs"), "").unwrap();
    host.enter("/busy", "{}").unwrap();
}

#[test]
fn quotas_add_up() {
    let host = Host::v2();
    let cgroup = host.enter("/g", CPU).unwrap();
    fs::write(host.path("c2/g/memory.current"), "1000").unwrap();
    let quota = |text: &str| Cpu::of_resources(&resources_of(text));
    let first = cgroup.join("c1", quota(CPU)).unwrap();
    assert_eq!(host.read("c2/g/cpu.max"), "50000 200000");
    let second = cgroup
        .join("c2", quota(r#"{"cpu":{"quota":10000}}"#))
        .unwrap();
    assert_eq!(host.read("c2/g/cpu.max"), "35000 100000");
    second
        .update(&resources_of(r#"{"cpu":{"quota":20000}}"#))
        .unwrap();
    assert_eq!(host.read("c2/g/cpu.max"), "45000 100000");
    let third = cgroup.join("c3", Cpu::default()).unwrap();
    assert_eq!(host.read("c2/g/cpu.max"), "max 100000");
    drop(third);
    drop(second);
    assert_eq!(host.read("c2/g/cpu.max"), "50000 200000");
    first
        .update(&resources_of(r#"{"cpu":{"quota":-1,"shares":2}}"#))
        .unwrap();
    assert_eq!(host.read("c2/g/cpu.max"), "max 100000");
    assert_eq!(host.read("c2/g/cpu.weight"), "1");
}

#[test]
fn the_maximum_follows_the_vms_size_and_never_falls_below_what_is_in_use() {
    let host = Host::v2();
    let cgroup = host.enter("/g", CPU).unwrap();
    fs::write(host.path("c2/g/memory.current"), "1000").unwrap();
    let mib = |mib: u64| (mib << 20).to_string();
    cgroup.resize(1024 << 20).unwrap();
    assert_eq!(host.read("c2/g/memory.max"), mib(1024));
    cgroup.resize(512 << 20).unwrap();
    assert_eq!(host.read("c2/g/memory.max"), mib(512));
    fs::write(host.path("c2/g/memory.current"), mib(400)).unwrap();
    cgroup.resize(256 << 20).unwrap();
    assert_eq!(host.read("c2/g/memory.max"), mib(512));
    fs::write(host.path("c2/g/memory.current"), mib(100)).unwrap();
    cgroup.resize(256 << 20).unwrap();
    assert_eq!(host.read("c2/g/memory.max"), mib(256));
}

#[test]
fn weights_follow_shares() {
    for (shares, expected) in [
        (0, 1),
        (2, 1),
        (1024, 39),
        (262_144, 10_000),
        (u64::MAX, 10_000),
    ] {
        assert_eq!(weight(shares), expected, "{shares}");
    }
}
