//! What is made on the host for a network, in files of the state directory that
//! the record names: by them any process can undo it.

use std::io::{self, Write};
use std::path::Path;

use nacre_net::cni::Attachment;
use nacre_net::Made;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::origin;
use crate::record::{Record, Resource};
use crate::sandbox::chain;

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

impl Kept for Attachment {
    fn undo(&self) -> Result<(), String> {
        let mut attachment = self.clone();
        run_on_the_host(&mut attachment);
        attachment.del().map_err(|error| chain(&error))
    }
}

/// Has plugins run where this process came from: what they find there is the host's end of what they make.
pub(super) fn run_on_the_host(attachment: &mut Attachment) {
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
