//! `vmctl list`: the VMs of this host, and what dead ones have left.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::config::Config;
use crate::control::{Client, Inspection};
use crate::record::{self, Holder, PidFile, Record};

/// A state directory without a pid file may be a VM that is just being made; it is left alone so long.
const YOUNG: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON: an array of objects with `state`, `directory` and, for a VM that answers, `vm`
    #[arg(long)]
    json: bool,
    /// Free what VMs have left whose process is gone: images, sockets, mounts, state
    #[arg(long)]
    prune: bool,
}

/// One state directory.
#[derive(Debug, Serialize)]
pub(super) struct Entry {
    pub directory: PathBuf,
    pub namespace: String,
    pub id: String,
    /// The VM's own state, `unreachable` (its process lives and does not answer), `stale` or `pruned`.
    pub state: String,
    pub pid: Option<i32>,
    /// What the VM says of itself.
    pub vm: Option<Inspection>,
    /// What was freed, or why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pruned: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

pub(super) async fn list(config: &Config, args: &Args) -> anyhow::Result<u8> {
    let mut entries = entries(config).await?;
    if args.prune {
        entries
            .iter_mut()
            .filter(|entry| entry.state == "stale")
            .for_each(prune);
    }
    let failed = entries
        .iter()
        .any(|entry| args.prune && entry.error.is_some());
    if args.json {
        super::say_json(&entries)?;
    } else {
        super::say(&table(&entries))?;
    }
    Ok(u8::from(failed))
}

/// All state directories, sorted.
pub(super) async fn entries(config: &Config) -> anyhow::Result<Vec<Entry>> {
    let vms = config.vms_dir();
    let mut directories = Vec::new();
    match std::fs::read_dir(&vms) {
        Ok(listing) => {
            for entry in listing {
                let path = entry
                    .with_context(|| format!("Cannot read {}", vms.display()))?
                    .path();
                if path.is_dir() {
                    directories.push(path);
                }
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("Cannot read {}", vms.display()));
        }
    }
    directories.sort();
    let mut entries = Vec::with_capacity(directories.len());
    for directory in directories {
        entries.extend(entry(directory).await);
    }
    Ok(entries)
}

/// The one that is named by its id, or by NAMESPACE/ID: its state directory, and what it says of itself.
pub(super) async fn one(config: &Config, name: &str) -> anyhow::Result<(PathBuf, Inspection)> {
    let mut found = entries(config).await?;
    found.retain(|entry| name == entry.id || name == format!("{}/{}", entry.namespace, entry.id));
    let mut found = found.into_iter();
    match (found.next(), found.next()) {
        (None, _) => bail!("There is no VM {name}: `vmctl list` shows those that are"),
        (Some(one), None) => match one.vm {
            Some(vm) => Ok((one.directory, vm)),
            None => {
                let why = one.error.unwrap_or_else(|| {
                    "its process is gone; `vmctl list --prune` frees it".to_owned()
                });
                bail!("The VM {name} is {}: {why}", one.state)
            }
        },
        (Some(one), Some(two)) => bail!(
            "{name} is ambiguous: {}/{} or {}/{}?",
            one.namespace,
            one.id,
            two.namespace,
            two.id
        ),
    }
}

async fn entry(directory: PathBuf) -> Option<Entry> {
    let owner = Record::open(&directory)
        .map(|record| record.owner())
        .unwrap_or_default();
    let (state, pid, vm, error) = match record::holder(&directory) {
        Ok(Holder::Living(pid)) => {
            let answer = match Client::connect(&directory).await {
                Ok(client) => client.inspect().await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(vm) => (vm.state.as_str().to_owned(), Some(pid), Some(vm), None),
                Err(error) => (
                    "unreachable".to_owned(),
                    Some(pid),
                    None,
                    Some(crate::sandbox::chain(&error)),
                ),
            }
        }
        Ok(Holder::Gone(None)) if is_young(&directory) => return None,
        Ok(Holder::Gone(pid)) => ("stale".to_owned(), pid, None, None),
        Err(error) => (
            "unreachable".to_owned(),
            None,
            None,
            Some(crate::sandbox::chain(&error)),
        ),
    };
    Some(Entry {
        directory,
        namespace: owner.namespace,
        id: owner.id,
        state,
        pid,
        vm,
        pruned: None,
        error,
    })
}

fn is_young(directory: &Path) -> bool {
    std::fs::metadata(directory)
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|modified| {
            SystemTime::now()
                .duration_since(modified)
                .unwrap_or_default()
                < YOUNG
        })
}

fn prune(entry: &mut Entry) {
    // Whoever comes to life in the meantime finds the lock taken, or we do.
    let outcome =
        PidFile::hold(&entry.directory).and_then(|_held| record::cleanup(&entry.directory));
    match outcome {
        Ok(freed) => {
            entry.state = "pruned".to_owned();
            entry.pruned = Some(freed);
        }
        Err(error) => entry.error = Some(crate::sandbox::chain(&error)),
    }
}

fn table(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "No VMs.\n".to_owned();
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "NAMESPACE",
        "ID",
        "PID",
        "STATE",
        "VCPUS",
        "MEMORY",
        "KERNEL",
        "CONTAINERS",
    ]);
    let mut notes = String::new();
    for entry in entries {
        let vm = entry.vm.as_ref();
        let or_dash = |text: Option<String>| {
            text.filter(|text| !text.is_empty())
                .unwrap_or_else(|| "-".to_owned())
        };
        table.add_row([
            or_dash(Some(entry.namespace.clone())),
            or_dash(Some(entry.id.clone())),
            or_dash(entry.pid.map(|pid| pid.to_string())),
            entry.state.clone(),
            or_dash(vm.map(|vm| vm.vcpus.to_string())),
            or_dash(vm.map(|vm| format!("{} MiB", vm.memory_mib))),
            or_dash(vm.map(|vm| vm.kernel_release.clone())),
            or_dash(vm.map(|vm| vm.containers.len().to_string())),
        ]);
        if let Some(error) = &entry.error {
            notes.push_str(&format!("{}: {error}\n", entry.directory.display()));
        }
        for freed in entry.pruned.iter().flatten() {
            notes.push_str(&format!("freed {freed}\n"));
        }
    }
    if entries.iter().any(|entry| entry.state == "stale") {
        notes.push_str("Stale: the process is gone; `vmctl list --prune` frees what it left.\n");
    }
    format!("{table}\n{notes}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Owner, Resource};

    fn config(root: &Path) -> Config {
        Config {
            state_dir: root.to_owned(),
            ..Config::default()
        }
    }

    #[tokio::test]
    async fn a_dead_vm_is_stale_and_pruned() {
        let root = tempfile::tempdir().unwrap();
        let config = config(root.path());
        let directory = config.vm_dir("ns", "dead");
        let owner = Owner {
            id: "dead".to_owned(),
            namespace: "ns".to_owned(),
        };
        let record = Record::create(&directory, owner).unwrap();
        let image = directory.join("root.img");
        record.add(Resource::File(image.clone())).unwrap();
        std::fs::write(&image, "x").unwrap();
        drop(PidFile::hold(&directory).unwrap());
        let mut found = entries(&config).await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].state.as_str(), found[0].id.as_str()),
            ("stale", "dead")
        );
        assert!(table(&found).contains("--prune"));
        prune(&mut found[0]);
        assert_eq!(found[0].state, "pruned", "{found:?}");
        assert!(!directory.exists());
        assert!(entries(&config).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_living_vm_without_a_socket_is_unreachable_and_not_pruned() {
        let root = tempfile::tempdir().unwrap();
        let config = config(root.path());
        let directory = config.vm_dir("ns", "busy");
        Record::create(&directory, Owner::default()).unwrap();
        let _held = PidFile::hold(&directory).unwrap();
        let found = entries(&config).await.unwrap();
        assert_eq!(found[0].state, "unreachable");
        assert!(directory.exists());
    }

    #[tokio::test]
    async fn no_state_directory_is_no_vms() {
        let root = tempfile::tempdir().unwrap();
        assert!(entries(&config(root.path())).await.unwrap().is_empty());
        assert_eq!(table(&[]), "No VMs.\n");
    }
}
