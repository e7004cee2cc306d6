//! The cgroup file systems of a host, v2, v1 or both, and directories in them. What v1 and v2 call differently is told apart here.

use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Place, Quota, path};
use crate::record::{Record, Resource};

/// Controllers that can hold a VM.
const CONTROLLERS: [&str; 3] = ["cpu", "cpuset", "memory"];
/// How often a parent that others remove in the meantime is made again.
const MADE_AGAIN: u32 = 8;

/// One hierarchy, as it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    v2: bool,
    /// The mount point.
    root: PathBuf,
    /// Those of [`CONTROLLERS`] that it has.
    controllers: Vec<&'static str>,
    /// Where this process is, below the root.
    own: PathBuf,
}

/// All hierarchies of a host.
#[derive(Debug)]
pub struct Tree {
    hierarchies: Vec<Hierarchy>,
    /// Makes one directory; tests have the kernel's part in it.
    make: fn(&Path) -> io::Result<()>,
}

impl Tree {
    /// Those that are mounted in this process's view.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn of_host() -> Result<Self, Error> {
        let read = |file: &str| {
            let path = PathBuf::from(file);
            std::fs::read_to_string(&path).map_err(|source| Error::Io {
                doing: "read".to_owned(),
                path,
                source,
            })
        };
        Ok(Self {
            hierarchies: parse(
                &read("/proc/self/mountinfo")?,
                &read("/proc/self/cgroup")?,
                |root| std::fs::read_to_string(root.join("cgroup.controllers")),
            ),
            make: |path| std::fs::create_dir(path),
        })
    }

    #[cfg(test)]
    pub(super) fn fake(mountinfo: &str, own: &str, make: fn(&Path) -> io::Result<()>) -> Self {
        let controllers = |root: &Path| std::fs::read_to_string(root.join("cgroup.controllers"));
        Self {
            hierarchies: parse(mountinfo, own, controllers),
            make,
        }
    }

    /// Where this process is now, a directory in each hierarchy that can hold a VM.
    pub fn here(&self) -> Vec<PathBuf> {
        let here = |hierarchy: &Hierarchy| hierarchy.root.join(&hierarchy.own);
        self.hierarchies.iter().map(here).collect()
    }

    /// Makes the directories of a VM's cgroup, one in each hierarchy that has one of the wanted controllers; those
    /// that are marked must be there. All directories are in the record before they are made.
    pub(super) fn make(
        &self,
        place: &Place,
        wanted: &[(&'static str, bool)],
        record: &Record,
    ) -> Result<Vec<Directory>, Error> {
        for (controller, needed) in wanted {
            let mut all = self.hierarchies.iter();
            if *needed && !all.any(|found| found.controllers.contains(controller)) {
                return Err(Error::NoController { controller });
            }
        }
        let mut directories = Vec::new();
        for hierarchy in &self.hierarchies {
            let here: Vec<(&'static str, bool)> = wanted
                .iter()
                .filter(|(controller, _)| hierarchy.controllers.contains(controller))
                .copied()
                .collect();
            if here.is_empty() {
                continue;
            }
            let below = match place {
                Place::Below(parent, name) => path::plain(parent).join(name),
                Place::Spec(name) => path::relative(name, hierarchy.base())?,
            };
            directories.push(self.make_in(hierarchy, &below, &here, record)?);
        }
        Ok(directories)
    }

    fn make_in(
        &self,
        hierarchy: &Hierarchy,
        below: &Path,
        wanted: &[(&'static str, bool)],
        record: &Record,
    ) -> Result<Directory, Error> {
        let whole = hierarchy.root.join(below);
        let mut has = Vec::new();
        for turn in 0.. {
            has.clear();
            match self.make_all(hierarchy, below, wanted, record, &mut has) {
                // A parent that another VM's end has taken away.
                Err(Error::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && turn < MADE_AGAIN => {}
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        Ok(Directory {
            v2: hierarchy.v2,
            path: whole,
            has,
        })
    }

    fn make_all(
        &self,
        hierarchy: &Hierarchy,
        below: &Path,
        wanted: &[(&'static str, bool)],
        record: &Record,
        has: &mut Vec<&'static str>,
    ) -> Result<(), Error> {
        let mut path = hierarchy.root.clone();
        let names: Vec<_> = below.iter().collect();
        for (index, name) in names.iter().enumerate() {
            if hierarchy.v2 {
                *has = pass_on(&path, wanted)?;
            }
            path.push(name);
            let last = index + 1 == names.len();
            if path.is_dir() {
                if last {
                    check_empty(&path)?;
                    record.add(Resource::Cgroup(path.clone()))?;
                }
            } else {
                record.add(if last {
                    Resource::Cgroup(path.clone())
                } else {
                    Resource::CgroupParent(path.clone())
                })?;
                match (self.make)(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        check_empty(&path)?;
                    }
                    made => made.map_err(failed("make the cgroup", &path))?,
                }
            }
            if !hierarchy.v2 && wanted.iter().any(|(name, _)| *name == "cpuset") {
                inherit_cpuset(&path)?;
            }
        }
        if !hierarchy.v2 {
            *has = wanted.iter().map(|(controller, _)| *controller).collect();
        }
        Ok(())
    }
}

impl Hierarchy {
    /// What a relative path starts from: on v2 the parent of where we are, as a cgroup with processes passes on nothing.
    fn base(&self) -> &Path {
        if self.v2 {
            self.own.parent().unwrap_or(Path::new(""))
        } else {
            &self.own
        }
    }
}

/// Has a cgroup of v2 pass controllers on to those below it; answers with those that it does pass on.
fn pass_on(parent: &Path, wanted: &[(&'static str, bool)]) -> Result<Vec<&'static str>, Error> {
    let file = parent.join("cgroup.subtree_control");
    let passed = || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let has = |controller: &str| {
            text.split_whitespace()
                .any(|word| word.trim_start_matches('+') == controller)
        };
        let all = wanted.iter().map(|(controller, _)| *controller);
        all.filter(|controller| has(controller)).collect::<Vec<_>>()
    };
    let mut has = passed();
    for (controller, needed) in wanted {
        if has.contains(controller) {
            continue;
        }
        let asked = std::fs::OpenOptions::new()
            .append(true)
            .open(&file)
            .and_then(|mut file| {
                io::Write::write_all(&mut file, format!("+{controller} ").as_bytes())
            });
        match asked {
            Ok(()) => has.push(controller),
            Err(source) if *needed => {
                return Err(Error::NotDelegated {
                    controller,
                    path: parent.to_owned(),
                    source,
                });
            }
            Err(error) => {
                tracing::debug!(controller, %error, path = %parent.display(), "a controller is not passed on");
            }
        }
    }
    Ok(has)
}

/// A CPU set of v1 is empty at first, and takes no process before it has CPUs and nodes.
fn inherit_cpuset(directory: &Path) -> Result<(), Error> {
    let Some(parent) = directory.parent() else {
        return Ok(());
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = directory.join(file);
        let own = std::fs::read_to_string(&path).unwrap_or_default();
        if own.trim().is_empty() {
            let above = parent.join(file);
            let list = std::fs::read_to_string(&above).map_err(failed("read", &above))?;
            std::fs::write(&path, list.trim()).map_err(failed("write", &path))?;
        }
    }
    Ok(())
}

fn check_empty(directory: &Path) -> Result<(), Error> {
    let pids = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    match pids.lines().next() {
        None => Ok(()),
        Some(pid) => Err(Error::Taken {
            path: directory.to_owned(),
            pid: pid.to_owned(),
        }),
    }
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        doing: doing.to_owned(),
        path: path.to_owned(),
        source,
    }
}

/// One directory of a VM's cgroup.
#[derive(Debug)]
pub(super) struct Directory {
    v2: bool,
    path: PathBuf,
    has: Vec<&'static str>,
}

impl Directory {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_v2(&self) -> bool {
        self.v2
    }

    /// Whether it has a controller.
    pub(super) fn has(&self, controller: &str) -> bool {
        self.has.contains(&controller)
    }

    /// The name that a file has here.
    pub(super) fn either(&self, v2: &'static str, v1: &'static str) -> &'static str {
        if self.v2 { v2 } else { v1 }
    }

    pub(super) fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.path.join(file)).ok()
    }

    pub(super) fn write(&self, file: &str, text: &str) -> Result<(), Error> {
        let path = self.path.join(file);
        std::fs::write(&path, text).map_err(failed(&format!("write {text:?} to"), &path))
    }

    /// Writes a quota, or that there is none.
    pub(super) fn write_quota(&self, quota: Option<Quota>) -> Result<(), Error> {
        let file = self.either("cpu.max", "cpu.cfs_quota_us");
        // A kernel without quotas has none to take away.
        if quota.is_none() && !self.path.join(file).exists() {
            return Ok(());
        }
        if self.v2 {
            return self.write(
                "cpu.max",
                &match quota {
                    Some((quota, period)) => format!("{quota} {period}"),
                    None => format!("max {}", super::PERIOD),
                },
            );
        }
        // The quota counts by the period that is set. Between the two the old quota may not fit: first away with it.
        self.write("cpu.cfs_quota_us", "-1")?;
        if let Some((quota, period)) = quota {
            self.write("cpu.cfs_period_us", &period.to_string())?;
            self.write("cpu.cfs_quota_us", &quota.to_string())?;
        }
        Ok(())
    }
}

/// Reads the hierarchies from mountinfo, and where this process is from /proc/self/cgroup. A controller that several
/// have is the first's; one that is mounted twice counts once.
fn parse(
    mountinfo: &str,
    own: &str,
    v2_controllers: impl Fn(&Path) -> io::Result<String>,
) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let (left, right): (Vec<&str>, Vec<&str>) =
            (left.split(' ').collect(), right.split(' ').collect());
        let (Some(part), Some(point), Some(kind), Some(options)) =
            (left.get(3), left.get(4), right.first(), right.get(2))
        else {
            continue;
        };
        let root = PathBuf::from(point);
        let (v2, names) = match *kind {
            "cgroup2" => (true, v2_controllers(&root).unwrap_or_default()),
            "cgroup" => (false, options.replace(',', " ")),
            _ => continue,
        };
        let controllers: Vec<&'static str> = CONTROLLERS
            .into_iter()
            .filter(|controller| names.split_whitespace().any(|name| name == *controller))
            .filter(|controller| {
                !found
                    .iter()
                    .any(|other| other.controllers.contains(controller))
            })
            .collect();
        if controllers.is_empty() {
            continue;
        }
        let member = |line: &&str| {
            let list = line.split(':').nth(1).unwrap_or_default();
            if v2 {
                line.starts_with("0::")
            } else {
                list.split(',').any(|name| controllers.contains(&name))
            }
        };
        let place = own
            .lines()
            .find(member)
            .and_then(|line| line.splitn(3, ':').nth(2));
        let place = Path::new(place.unwrap_or("/"));
        // The mount may show a part only, which then is its root.
        let place = place.strip_prefix(part).unwrap_or(place);
        found.push(Hierarchy {
            v2,
            own: path::plain(place),
            root,
            controllers,
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2(_: &Path) -> io::Result<String> {
        Ok("cpuset cpu io memory pids".to_owned())
    }

    fn no_v2(_: &Path) -> io::Result<String> {
        Ok(String::new())
    }

    #[test]
    fn a_host_with_v2_has_one_hierarchy() {
        let mounts = "24 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n\
                      25 1 0:23 / /mnt rw - tmpfs tmpfs rw\n";
        let found = parse(mounts, "0::/system.slice/containerd.service\n", v2);
        assert_eq!(
            found,
            [Hierarchy {
                v2: true,
                root: "/sys/fs/cgroup".into(),
                controllers: vec!["cpu", "cpuset", "memory"],
                own: "system.slice/containerd.service".into(),
            }]
        );
        assert_eq!(found[0].base(), Path::new("system.slice"));
    }

    #[test]
    fn a_host_with_both_has_the_controllers_where_v1_has_them() {
        let mounts = "1 0 0:1 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      2 0 0:2 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      3 0 0:3 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
                      4 0 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      5 0 0:2 / /other/memory rw - cgroup cgroup rw,memory\n";
        let own = "4:memory:/a/b\n3:name=systemd:/x\n2:cpu,cpuacct:/\n0::/y\n";
        let found = parse(mounts, own, no_v2);
        let seen: Vec<_> = found
            .iter()
            .map(|one| (one.root.to_str().unwrap(), one.own.to_str().unwrap()))
            .collect();
        assert_eq!(
            seen,
            [
                ("/sys/fs/cgroup/cpu,cpuacct", ""),
                ("/sys/fs/cgroup/memory", "a/b")
            ]
        );
        assert_eq!(found[1].base(), Path::new("a/b"));
    }

    #[test]
    fn a_mount_of_a_part_has_that_part_as_its_root() {
        let mounts = "1 0 0:1 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let found = parse(mounts, "4:memory:/docker/x/inner\n", no_v2);
        assert_eq!(found[0].own, Path::new("inner"));
    }
}
