//! What is made on the host for a network, in files of the state directory that
//! the record names: by them any process can undo it.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nacre_net::Made;
use nacre_net::cni::{self, AddResult, Attachment};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::origin;
use crate::record::{Record, Resource};
use crate::sandbox::chain;

/// How long DEL may take, its plugins together, whatever is configured: containerd waits five seconds for all that is to be freed.
const LONGEST_DEL: Duration = Duration::from_secs(4);

/// What a file says that was made.
pub(crate) trait Kept: Serialize + DeserializeOwned {
    /// Undoes it. Again is well.
    fn undo(&self) -> Result<(), String>;
}

impl Kept for Made {
    fn undo(&self) -> Result<(), String> {
        self.remove_at_path().map_err(|error| chain(&error))
    }
}

/// Held while ADD runs: another thread of this process that undoes it waits for that.
static ADDING: Mutex<()> = Mutex::new(());

/// Runs ADD.
pub(super) fn add(
    attachment: &mut Attachment,
    note: &mut dyn FnMut(&Attachment) -> io::Result<()>,
) -> Result<AddResult, cni::Error> {
    let _adding = ADDING.lock().unwrap_or_else(PoisonError::into_inner);
    run_on_the_host(attachment);
    attachment.add(note)
}

impl Kept for Attachment {
    fn undo(&self) -> Result<(), String> {
        let _adding = ADDING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut attachment = self.clone();
        let plugins = u32::try_from(attachment.network.types().count()).unwrap_or(u32::MAX);
        attachment.timeout = attachment.timeout.min(LONGEST_DEL / plugins.max(1));
        run_on_the_host(&mut attachment);
        attachment.del().map_err(|error| chain(&error))
    }
}

/// Has plugins run where this process came from: what they find there is the host's end of what they make.
fn run_on_the_host(attachment: &mut Attachment) {
    // SAFETY: it makes system calls only.
    unsafe { attachment.before_exec(origin::go_back) };
}

/// Has the record name the file, then replaces the file. Both are on the disk when this returns.
pub(super) fn note(record: &Record, resource: &Resource, what: &impl Kept) -> io::Result<()> {
    record.add(resource.clone()).map_err(io::Error::other)?;
    let (Resource::Mirror(path) | Resource::Cni(path)) = resource else {
        return Err(io::Error::other("it is no file of a network"));
    };
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(what)?)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(directory)?.sync_all()
}

/// Has the plugins of a network check what they have made.
pub(super) fn check(resource: &Resource) -> Result<(), String> {
    let Resource::Cni(path) = resource else {
        return Ok(());
    };
    let mut attachment: Attachment = std::fs::read(path)
        .map_err(|error| error.to_string())
        .and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    run_on_the_host(&mut attachment);
    attachment.check().map_err(|error| chain(&error))
}

/// Undoes what a file says, and removes it; false if there is none.
pub(crate) fn free<K: Kept>(path: &Path) -> Result<bool, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = match std::fs::read(path) {
        // Its writer has ended before anything was made.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        text => text.map_err(|error| failed(&error))?,
    };
    let kept: K = serde_json::from_slice(&text).map_err(|error| failed(&error))?;
    kept.undo().map_err(|error| failed(&error))?;
    std::fs::remove_file(path).map_err(|error| failed(&error))?;
    Ok(true)
}
