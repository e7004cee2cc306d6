//! The network of a VM: that of a network namespace, which others have filled
//! or which is filled here by CNI plugins. It comes up once, at the first Start that
//! finds one, and everything that outlives a process is in the record before it is made.
//!
//! What is found in the namespace then is mirrored: a TAP interface beside each interface, and a device in the guest
//! with the same address. What CNI made stays as it is.

mod kept;
mod names;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nacre_net::cni::{AddResult, Attachment, Conflist, PortMapping, Stop};
use nacre_net::{LinkState, Mirror, Netns, Watch};

use oci_spec::runtime::Spec;

use crate::config;
use crate::origin;
use crate::record::{self, Record, Resource};
use crate::sandbox::{self, Nics, Sandbox, chain};

pub(crate) use kept::free;
pub use names::{NameFiles, Names};

/// The interface that CNI plugins make.
const INTERFACE: &str = "eth0";

/// Why a VM has no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace.
    #[error(transparent)]
    Host(#[from] nacre_net::Error),
    /// The plugins.
    #[error(transparent)]
    Cni(#[from] nacre_net::cni::Error),
    /// The guest.
    #[error(transparent)]
    Guest(#[from] sandbox::Error),
    /// What was to be made could not be written down, or a file of names not be written.
    #[error("Cannot {doing} {}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The record.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// A thread was lost.
    #[error("Setting up the network broke off: {0}")]
    BrokeOff(String),
}

/// A network by CNI plugins.
#[derive(Debug, Clone)]
pub struct Cni {
    /// Which.
    pub list: List,
    /// Where plugins are looked for.
    pub plugin_directories: Vec<PathBuf>,
    /// How long each may take.
    pub timeout: Duration,
    /// By which the plugins know the VM.
    pub container_id: String,
    /// Where plugins, which are other processes, find the namespace.
    pub netns: PathBuf,
    /// Ports of the host that lead to the guest.
    pub ports: Vec<PortMapping>,
}

/// Where a CNI network list comes from. It is read when the network comes up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum List {
    /// A file.
    File(PathBuf),
    /// The first of a directory.
    First(PathBuf),
    /// The one of this name in a directory.
    Named(PathBuf, String),
}

impl List {
    /// What a user names: a file by a path, anything else by its name in the directory.
    pub fn of(text: &str, directory: &Path) -> Self {
        match text.contains('/') || Path::new(text).is_file() {
            true => Self::File(text.into()),
            false => Self::Named(directory.to_owned(), text.to_owned()),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// It is not there, or cannot be.
    pub fn load(&self) -> Result<Conflist, nacre_net::cni::Error> {
        match self {
            Self::File(path) => Conflist::load(path),
            Self::First(directory) => Conflist::first(directory),
            Self::Named(directory, name) => Conflist::named(directory, name),
        }
    }
}

impl Cni {
    /// By the first list of the configured directory, if one is configured.
    pub fn of(config: &config::Network, container_id: String, netns: PathBuf) -> Option<Self> {
        let directory = &config.cni_conf_dir;
        if directory.as_os_str().is_empty() {
            return None;
        }
        let list = List::First(directory.clone());
        Some(Self::new(list, config, container_id, netns))
    }

    /// By a list, with the rest from the configuration.
    pub fn new(list: List, config: &config::Network, container_id: String, netns: PathBuf) -> Self {
        Self {
            list,
            plugin_directories: config.cni_bin_dirs.clone(),
            timeout: config.cni_timeout,
            container_id,
            netns,
            ports: Vec::new(),
        }
    }
}

/// By what CNI plugins know a VM, and no other: letters, digits, `.` and `-` as they are, other bytes as `_` and two hexadecimal
/// digits, and `__` between the two.
pub fn cni_id(namespace: &str, id: &str) -> String {
    let mut known = "nacre-".to_owned();
    for (text, end) in [(namespace, "__"), (id, "")] {
        for byte in text.bytes() {
            match byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-') {
                true => known.push(char::from(byte)),
                false => known.push_str(&format!("_{byte:02x}")),
            }
        }
        known.push_str(end);
    }
    known
}

/// The network of one VM.
#[derive(Debug)]
pub struct Network {
    record: Arc<Record>,
    netns: Netns,
    /// Used where the namespace is empty.
    cni: Option<Cni>,
    names: Option<Names>,
    /// Ends an ADD that is under way.
    stop: Option<Stop>,
    up: tokio::sync::Mutex<Option<Up>>,
}

/// One that is up.
#[derive(Debug)]
struct Up {
    /// As long as it is there, links are told of.
    watch: Option<Watch>,
    nics: Nics,
    /// Last made last.
    kept: Vec<Resource>,
}

impl Network {
    /// Of a namespace, which is looked at when the network comes up.
    pub fn of(record: Arc<Record>, netns: Netns) -> Self {
        Self {
            record,
            netns,
            cni: None,
            names: None,
            stop: None,
            up: tokio::sync::Mutex::default(),
        }
    }

    /// Has plugins fill the namespace if nobody has, and keeps the names that come of it.
    #[must_use]
    pub fn filled_by(mut self, cni: Cni, names: Option<Names>) -> Self {
        self.cni = Some(cni);
        // Without one an end waits for what is under way.
        self.stop = Stop::new().ok();
        self.names = names;
        self
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Adds the files of names to a spec, if there are any and it has none of its own.
    pub fn mount_names(&self, spec: &mut Spec) {
        if let Some(names) = &self.names {
            names.mount(NameFiles::missing_in(spec), spec);
        }
    }

    /// Gives the guest the network that the namespace has now, where this container of it is. The second time nothing is done. After an error the namespace is as it
    /// was found. Goes on if its caller gives up, so that [`Self::take_down`] finds all or nothing.
    ///
    /// # Errors
    /// What the plugins, the system, or the guest refused.
    pub async fn bring_up(self: &Arc<Self>, sandbox: &Sandbox, id: &str) -> Result<(), Error> {
        let (this, sandbox, id) = (Arc::clone(self), sandbox.clone(), id.to_owned());
        match tokio::spawn(async move { this.up(&sandbox, &id).await }).await {
            Ok(result) => result,
            Err(error) => Err(Error::BrokeOff(error.to_string())),
        }
    }

    async fn up(self: Arc<Self>, sandbox: &Sandbox, id: &str) -> Result<(), Error> {
        let mut up = self.up.lock().await;
        let this = Arc::clone(&self);
        if let Some(up) = &*up {
            let kept = up.kept.clone();
            // Nobody waits for it: what it finds is said to the log.
            tokio::task::spawn_blocking(move || check(&kept));
            return Ok(());
        }
        let (mut mirror, kept) = blocking(move || this.make()).await?;
        let attached = sandbox.attach_network(&mut mirror, id).await;
        let nics = match attached {
            Ok(nics) => nics,
            Err(error) => {
                let record = Arc::clone(&self.record);
                // Its end undoes it; what is recorded is undone by that.
                blocking(move || {
                    drop(mirror);
                    undo(&record, &kept);
                    Ok(())
                })
                .await?;
                return Err(error.into());
            }
        };
        if nics.is_empty() {
            // Whoever fills the namespace may come before the next container.
            return Ok(());
        }
        let tell = nics.link_setter();
        let watch = mirror.watch(move |change| {
            tell(&change.interface, change.state == LinkState::Up);
        });
        let watch = watch
            .inspect_err(|error| tracing::warn!(error = chain(error), "links are not watched"))
            .ok();
        // Undone by the record from here on.
        mirror.leave();
        *up = Some(Up { watch, nics, kept });
        Ok(())
    }

    /// What the host has to make. Blocks.
    fn make(&self) -> Result<(Mirror, Vec<Resource>), Error> {
        let mut kept = Vec::new();
        let found = self.mirror(&mut kept)?;
        let Some(cni) = &self.cni else {
            return Ok((found, kept));
        };
        if !found.network().interfaces.is_empty() {
            tracing::debug!("the network namespace has been filled; no CNI plugin is run");
            self.write_names(None);
            return Ok((found, kept));
        }
        drop(found);
        let result = self.add(cni, &mut kept)?;
        self.write_names(Some(&result));
        match self.mirror(&mut kept) {
            Ok(mirror) => Ok((mirror, kept)),
            Err(error) => {
                undo(&self.record, &kept);
                Err(error)
            }
        }
    }

    fn mirror(&self, kept: &mut Vec<Resource>) -> Result<Mirror, Error> {
        let mut noted = None;
        let host = origin::network()?;
        let mirror = nacre_net::mirror_from(&self.netns, &host, &mut |made| {
            let resource = Resource::Mirror(self.record.directory().join("mirror.json"));
            kept::note(&self.record, &resource, made)?;
            noted = Some(resource);
            Ok(())
        });
        match mirror {
            Ok(mirror) => {
                kept.extend(noted);
                Ok(mirror)
            }
            Err(error) => {
                // All is as it was; the note of it is too much.
                undo(&self.record, noted.as_slice());
                Err(error.into())
            }
        }
    }

    fn add(&self, cni: &Cni, kept: &mut Vec<Resource>) -> Result<AddResult, Error> {
        let mut attachment = Attachment::new(
            cni.list.load()?,
            cni.plugin_directories.clone(),
            cni.container_id.clone(),
            INTERFACE,
            cni.netns.clone(),
        );
        attachment.port_mappings.clone_from(&cni.ports);
        attachment.timeout = cni.timeout;
        if let Some(stop) = &self.stop {
            attachment.stop_by(stop.clone());
        }
        let resource = Resource::Cni(self.record.directory().join("cni.json"));
        let added = kept::add(&mut attachment, &mut |attachment| {
            kept::note(&self.record, &resource, attachment)
        });
        kept.push(resource.clone());
        match added {
            Ok(result) => Ok(result),
            Err(error) => {
                // It has been undone; where that failed it is tried again.
                undo(&self.record, kept);
                kept.clear();
                Err(error.into())
            }
        }
    }

    /// Names are a help: what cannot be written is logged.
    fn write_names(&self, result: Option<&AddResult>) {
        if let Some(names) = &self.names
            && let Err(error) = names.write(result)
        {
            tracing::warn!(error = chain(&error), "the container's names are not right");
        }
    }

    /// Takes the network from a guest that goes on, and leaves the host as it was found. Without a guest it does not come up again, and
    /// what is under way is stopped.
    pub async fn take_down(&self, sandbox: Option<&Sandbox>) -> Result<(), Error> {
        if let (None, Some(stop)) = (sandbox, &self.stop) {
            stop.stop();
        }
        let mut up = self.up.lock().await;
        let Some(Up { watch, nics, kept }) = up.take() else {
            return Ok(());
        };
        if let Some(sandbox) = sandbox {
            sandbox.detach_network(nics).await;
        }
        let record = Arc::clone(&self.record);
        blocking(move || {
            drop(watch);
            undo(&record, &kept);
            Ok(())
        })
        .await
    }
}

/// Whether the plugins find what they have made. What is not there is for people to know: the guest has what it has.
fn check(kept: &[Resource]) {
    for resource in kept {
        if let Err(error) = kept::check(resource) {
            tracing::warn!(error, "the network is not as CNI made it");
        }
    }
}

/// Last made first. What fails stays in the record, where it is tried again.
fn undo(record: &Record, kept: &[Resource]) {
    for resource in kept.iter().rev() {
        if let Err(error) = record.free(resource) {
            tracing::warn!(
                error = chain(&error),
                "part of the network stays, and is recorded"
            );
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::BrokeOff(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_know_a_vm_by_a_name_that_cni_allows() {
        for (namespace, id, known) in [
            ("default", "web-1", "nacre-default__web-1"),
            ("k8s.io", "a_b", "nacre-k8s.io__a_5fb"),
            ("a-b", "c", "nacre-a-b__c"),
            ("a", "b-c", "nacre-a__b-c"),
            ("a/b", "ä", "nacre-a_2fb___c3_a4"),
        ] {
            assert_eq!(cni_id(namespace, id), known);
        }
    }

    #[test]
    fn a_list_is_a_path_or_a_name() {
        let directory = Path::new("/etc/cni/net.d");
        assert_eq!(
            List::of("./a.conflist", directory),
            List::File("./a.conflist".into())
        );
        assert_eq!(
            List::of("demo", directory),
            List::Named(directory.to_owned(), "demo".to_owned())
        );
    }
}
