//! Which modules go into the initrd, and in what order they load.
//!
//! A wanted module is in the modules folder, built into the kernel, or missing;
//! what it depends on comes before it. Soft dependencies may be given as aliases
//! (`crypto-crc32c`), and one that nothing provides is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::manifest::Group;
use crate::modinfo::{self, ModuleFileError, ModuleInfo, module_name, normal_name};

/// A module that is wanted by default.
struct Wanted {
    name: &'static str,
    group: Group,
    necessary: bool,
}

const fn necessary(name: &'static str, group: Group) -> Wanted {
    Wanted {
        name,
        group,
        necessary: true,
    }
}

const fn optional(name: &'static str, group: Group) -> Wanted {
    Wanted {
        name,
        group,
        necessary: false,
    }
}

/// In load order. The transport comes first: what fails after it can be told.
const WANTED: [Wanted; 13] = [
    necessary("virtio_mmio", Group::Boot),
    necessary("vmw_vsock_virtio_transport", Group::Boot),
    optional("pvpanic_mmio", Group::Boot),
    // The host's files, and a root that is written over them.
    necessary("virtiofs", Group::Mount),
    necessary("overlay", Group::Mount),
    // Random numbers where the CPU has none.
    optional("virtio_rng", Group::Mount),
    necessary("virtio_blk", Group::Late),
    // Without it containers run, without a network.
    optional("virtio_net", Group::Late),
    // What the guest is resized with; without them it says what it lacks when it runs.
    optional("virtio_mem", Group::Late),
    optional("virtio_balloon", Group::Late),
    // What ext4 computes its checksums with, where it is faster than the built-in one.
    optional("crc32c_intel", Group::Late),
    necessary("ext4", Group::Late),
    optional("erofs", Group::Late),
];

/// Why the modules folder does not give what is needed.
#[derive(Debug, Error)]
pub enum ModulesError {
    /// The folder could not be read.
    #[error("reading the modules folder {}", path.display())]
    Read {
        /// The folder or file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A module's file is not usable.
    #[error(transparent)]
    File(#[from] ModuleFileError),
    /// A necessary module is not there.
    #[error(
        "the kernel has no module {name} in {}, and modules.builtin does not list it as built in{}",
        folder.display(),
        wanted_by(needed_by)
    )]
    Missing {
        /// The module.
        name: String,
        /// The modules folder.
        folder: PathBuf,
        /// The module that depends on it, if it was not wanted for itself.
        needed_by: Option<String>,
    },
    /// Modules depend on each other in a ring.
    #[error("the module {name} depends on itself")]
    Ring {
        /// One module of the ring.
        name: String,
    },
}

fn wanted_by(module: &Option<String>) -> String {
    module
        .as_ref()
        .map(|name| format!("; {name} depends on it"))
        .unwrap_or_default()
}

/// A module that goes into the initrd.
#[derive(Debug)]
pub(crate) struct PlannedModule {
    pub name: String,
    pub group: Group,
    pub info: ModuleInfo,
    pub content: Vec<u8>,
}

impl PlannedModule {
    /// Its file's name in the initrd.
    pub fn file_name(&self) -> String {
        format!("{}.ko", self.name)
    }
}

/// What goes into the initrd, in load order, and what does not.
#[derive(Debug)]
pub(crate) struct Plan {
    pub modules: Vec<PlannedModule>,
    pub built_in: Vec<String>,
    pub missing: Vec<String>,
}

/// What becomes of the signatures at the modules' ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signatures {
    /// They stay, for a kernel that loads no module without.
    Kept,
    /// They go: to check one costs the guest's boot more than most modules do.
    Removed,
}

/// The modules for the initrd: the usual ones and `extra`, each with what it depends on.
pub(crate) fn plan(
    folder: &Path,
    extra: &[String],
    signatures: Signatures,
) -> Result<Plan, ModulesError> {
    let mut planner = Planner {
        signatures,
        tree: ModuleTree::read(folder)?,
        plan: Plan {
            modules: Vec::new(),
            built_in: Vec::new(),
            missing: Vec::new(),
        },
        places: BTreeMap::new(),
    };
    let extra: BTreeSet<String> = extra.iter().map(|name| normal_name(name)).collect();
    let usual = WANTED
        .iter()
        .map(|wanted| (wanted.name, wanted.group, wanted.necessary));
    // What a container does with them is not known here, so each finds them.
    let extra = extra.iter().map(|name| (name.as_str(), Group::Mount, true));
    for (name, group, necessary) in usual.chain(extra) {
        if planner.tree.built_in.contains(name) {
            planner.plan.built_in.push(name.to_owned());
        } else if planner.tree.files.contains_key(name) {
            planner.add(name, group, None)?;
        } else if necessary {
            return Err(planner.missing(name, None));
        } else {
            planner.plan.missing.push(name.to_owned());
        }
    }
    planner.plan.built_in.sort();
    planner.plan.missing.sort();
    Ok(planner.plan)
}

/// Whether a module is being placed (its dependencies first) or has its place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Coming,
    There,
}

struct Planner {
    signatures: Signatures,
    tree: ModuleTree,
    plan: Plan,
    places: BTreeMap<String, Place>,
}

impl Planner {
    fn missing(&self, name: &str, needed_by: Option<&str>) -> ModulesError {
        ModulesError::Missing {
            name: name.to_owned(),
            folder: self.tree.folder.clone(),
            needed_by: needed_by.map(str::to_owned),
        }
    }

    /// Puts the module and what it depends on at the plan's end, once.
    fn add(
        &mut self,
        name: &str,
        group: Group,
        needed_by: Option<&str>,
    ) -> Result<(), ModulesError> {
        match self.places.get(name) {
            Some(Place::There) => return Ok(()),
            Some(Place::Coming) => {
                return Err(ModulesError::Ring {
                    name: name.to_owned(),
                });
            }
            None => {}
        }
        if self.tree.built_in.contains(name) {
            return Ok(());
        }
        let Some(path) = self.tree.files.get(name).cloned() else {
            return Err(self.missing(name, needed_by));
        };
        let mut content = modinfo::read_module(&path)?;
        let info = modinfo::parse(&path, &content)?;
        if self.signatures == Signatures::Removed {
            content.truncate(modinfo::without_signature(&content).len());
        }
        self.places.insert(name.to_owned(), Place::Coming);
        for soft in &info.soft_pre {
            self.add_soft(soft, group)?;
        }
        for hard in &info.depends {
            self.add(hard, group, Some(name))?;
        }
        self.places.insert(name.to_owned(), Place::There);
        let soft_post = info.soft_post.clone();
        self.plan.modules.push(PlannedModule {
            name: name.to_owned(),
            group,
            info,
            content,
        });
        for soft in &soft_post {
            self.add_soft(soft, group)?;
        }
        Ok(())
    }

    /// A soft dependency is a module's name or an alias, and may be missing; a
    /// ring of them is no fault.
    fn add_soft(&mut self, name: &str, group: Group) -> Result<(), ModulesError> {
        let providers = if self.tree.built_in.contains(name) {
            Vec::new()
        } else if self.tree.files.contains_key(name) {
            vec![name.to_owned()]
        } else {
            self.tree.providers(name)?
        };
        for provider in providers {
            if !self.places.contains_key(&provider) {
                self.add(&provider, group, None)?;
            }
        }
        Ok(())
    }
}

/// A folder `lib/modules/RELEASE`.
struct ModuleTree {
    folder: PathBuf,
    /// Modules by name.
    files: BTreeMap<String, PathBuf>,
    /// Names of what is built in, and their aliases.
    built_in: BTreeSet<String>,
    /// The modules of each alias; read when first asked for, since it reads every module.
    aliases: Option<BTreeMap<String, BTreeSet<String>>>,
}

impl ModuleTree {
    fn read(folder: &Path) -> Result<Self, ModulesError> {
        let mut files = BTreeMap::new();
        collect(folder, &mut files)?;
        let mut built_in = BTreeSet::new();
        for line in optional_file(&folder.join("modules.builtin"))?.lines() {
            let file = line.rsplit('/').next().unwrap_or_default();
            built_in.extend(module_name(file));
        }
        // NAME.KEY=VALUE, each ended by a NUL.
        for entry in optional_file(&folder.join("modules.builtin.modinfo"))?.split('\0') {
            if let Some((_, alias)) = entry.split_once(".alias=") {
                built_in.insert(normal_name(alias));
            }
        }
        Ok(ModuleTree {
            folder: folder.to_owned(),
            files,
            built_in,
            aliases: None,
        })
    }

    /// The modules with this alias, sorted.
    fn providers(&mut self, alias: &str) -> Result<Vec<String>, ModulesError> {
        if self.aliases.is_none() {
            let mut aliases: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for (name, path) in &self.files {
                let info = modinfo::parse(path, &modinfo::read_module(path)?)?;
                for alias in info.aliases {
                    aliases.entry(alias).or_default().insert(name.clone());
                }
            }
            self.aliases = Some(aliases);
        }
        let providers = self.aliases.as_ref().and_then(|aliases| aliases.get(alias));
        Ok(providers.into_iter().flatten().cloned().collect())
    }
}

/// Finds modules below a folder. Symlinks (`build`, `source`) are not followed.
fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ModulesError> {
    let read = |source| ModulesError::Read {
        path: folder.to_owned(),
        source,
    };
    for entry in fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        let kind = entry.file_type().map_err(read)?;
        if kind.is_dir() {
            collect(&entry.path(), files)?;
        } else if kind.is_file()
            && let Some(name) = entry.file_name().to_str().and_then(module_name)
        {
            // The first by path, should two folders have the same module.
            let path = entry.path();
            let kept = files.entry(name).or_insert_with(|| path.clone());
            if path < *kept {
                *kept = path;
            }
        }
    }
    Ok(())
}

/// The file's text; empty if there is no such file.
fn optional_file(path: &Path) -> Result<String, ModulesError> {
    match fs::read(path) {
        Ok(content) => Ok(String::from_utf8_lossy(&content).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(ModulesError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modinfo::tests::made_up_module;

    struct Tree(tempfile::TempDir);

    impl Tree {
        /// The necessary modules; all but virtio_mmio and the transport are built in.
        fn new() -> Self {
            let tree = Tree(tempfile::tempdir().expect("a folder"));
            tree.file(
                "modules.builtin",
                b"kernel/a/virtio_blk.ko\nkernel/b/ext4.ko\nkernel/c/overlay.ko\nkernel/d/virtiofs.ko\n",
            );
            tree.module("virtio_mmio", &[("depends", "virtio,virtio_ring")]);
            tree.module("virtio", &[("depends", "")]);
            tree.module("virtio_ring", &[("depends", "virtio")]);
            tree.module("vmw_vsock_virtio_transport", &[("depends", "vsock,virtio")]);
            tree.module("vsock", &[]);
            tree
        }

        fn file(&self, name: &str, content: &[u8]) {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, content).expect("a file");
        }

        fn module(&self, name: &str, entries: &[(&str, &str)]) {
            self.file(&format!("kernel/{name}.ko"), &made_up_module(entries));
        }

        fn remove(&self, name: &str) {
            fs::remove_file(self.0.path().join(format!("kernel/{name}.ko"))).expect("a file");
        }

        fn plan(&self, extra: &[&str]) -> Result<Plan, ModulesError> {
            let extra: Vec<String> = extra.iter().map(|&name| name.to_owned()).collect();
            plan(self.0.path(), &extra, Signatures::Removed)
        }

        fn order(&self, extra: &[&str]) -> Vec<String> {
            let plan = self.plan(extra).expect("a plan");
            plan.modules.into_iter().map(|module| module.name).collect()
        }
    }

    #[test]
    fn what_a_module_depends_on_comes_before_it_and_once() {
        let tree = Tree::new();
        assert_eq!(
            tree.order(&[]),
            [
                "virtio",
                "virtio_ring",
                "virtio_mmio",
                "vsock",
                "vmw_vsock_virtio_transport"
            ]
        );
        let plan = tree.plan(&[]).expect("a plan");
        assert_eq!(plan.built_in, ["ext4", "overlay", "virtio_blk", "virtiofs"]);
        assert_eq!(
            plan.missing,
            [
                "crc32c_intel",
                "erofs",
                "pvpanic_mmio",
                "virtio_balloon",
                "virtio_mem",
                "virtio_net",
                "virtio_rng"
            ]
        );
        assert!(
            plan.modules
                .iter()
                .all(|module| module.group == Group::Boot)
        );
    }

    /// As the kernels of distributions have it.
    #[test]
    fn the_driver_of_network_devices_comes_late_with_what_it_depends_on() {
        let tree = Tree::new();
        tree.module(
            "virtio_net",
            &[("depends", "net_failover,virtio,virtio_ring")],
        );
        tree.module("net_failover", &[("depends", "failover")]);
        tree.module("failover", &[]);
        let plan = tree.plan(&[]).expect("a plan");
        let late = plan
            .modules
            .iter()
            .filter(|module| module.group == Group::Late);
        let late: Vec<_> = late.map(|module| module.name.as_str()).collect();
        assert_eq!(late, ["failover", "net_failover", "virtio_net"]);
        assert!(!plan.missing.contains(&"virtio_net".to_owned()));
    }

    /// As ours is built: the folder lists what is built in, and has nothing else.
    #[test]
    fn what_was_asked_for_is_there_before_the_first_container() {
        let tree = Tree::new();
        tree.module("tun", &[]);
        let plan = tree.plan(&["tun"]).expect("a plan");
        let group = |name| plan.modules.iter().find(|module| module.name == name);
        assert_eq!(group("tun").map(|module| module.group), Some(Group::Mount));
    }

    #[test]
    fn a_kernel_without_modules_has_an_initrd_without_them() {
        let tree = Tree(tempfile::tempdir().expect("a folder"));
        let all = WANTED.map(|wanted| format!("kernel/x/{}.ko\n", wanted.name));
        tree.file("modules.builtin", all.concat().as_bytes());
        tree.file(
            "modules.builtin.modinfo",
            b"virtio_blk.license=GPL\0virtio_blk.alias=virtio:d00000002v*\0",
        );
        let plan = tree.plan(&[]).expect("a plan");
        assert!(plan.modules.is_empty() && plan.missing.is_empty());
        assert_eq!(plan.built_in.len(), WANTED.len());
    }

    #[test]
    fn a_necessary_module_that_is_missing_is_named() {
        let tree = Tree::new();
        tree.remove("vsock");
        let error = tree.plan(&[]).expect_err("no vsock").to_string();
        assert!(error.contains("no module vsock"), "{error}");
        assert!(
            error.contains("vmw_vsock_virtio_transport depends on it"),
            "{error}"
        );
        let error = Tree::new()
            .plan(&["no-such"])
            .expect_err("no such module")
            .to_string();
        assert!(error.contains("no module no_such"), "{error}");
    }

    #[test]
    fn extra_modules_are_found_with_hyphens_too() {
        let tree = Tree::new();
        tree.module("virtio-rng", &[]);
        tree.module("libcrc32c", &[]);
        tree.module("xfs", &[("depends", "libcrc32c")]);
        let order = tree.order(&["xfs", "virtio-rng"]);
        assert_eq!(order[5..], ["virtio_rng", "libcrc32c", "xfs"]);
    }

    #[test]
    fn soft_dependencies_are_resolved_by_alias_and_may_be_missing() {
        let tree = Tree::new();
        tree.module(
            "erofs",
            &[("softdep", "pre: crypto-crc32c nothing-has-this post: after")],
        );
        tree.module("crc-a", &[("alias", "crypto-crc32c")]);
        tree.module(
            "crc-b",
            &[("alias", "crypto-crc32c"), ("softdep", "pre: erofs")],
        );
        tree.module("after", &[]);
        assert_eq!(tree.order(&[])[5..], ["crc_a", "crc_b", "erofs", "after"]);
        // Built in under that alias: nothing to load.
        tree.file(
            "modules.builtin.modinfo",
            b"crc.license=GPL\0crc.alias=crypto-crc32c\0",
        );
        assert_eq!(tree.order(&[])[5..], ["erofs", "after"]);
    }

    #[test]
    fn a_ring_of_dependencies_is_an_error() {
        let tree = Tree::new();
        tree.module("vsock", &[("depends", "vmw_vsock_virtio_transport")]);
        let error = tree.plan(&[]).expect_err("a ring");
        assert!(matches!(error, ModulesError::Ring { .. }), "{error:?}");
    }
}
