//! What the host shares with the guest: directories and files, each an entry of
//! the root of the VM's virtio-fs device for as long as something holds it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use nacre_fs::{Access, Caching, FileServer, open_export, open_mapped_export};
use nacre_protocol::SHARES;
use nacre_protocol::agent::GuestMount;

use super::Sandbox;
use super::error::Error;
use super::spec::Bind;
use crate::control::Device;

/// Something that is shared; dropping it takes it away from the guest.
#[derive(Debug)]
pub struct Share {
    server: FileServer,
    name: String,
    /// The sandbox's list, with this in it.
    devices: Arc<Mutex<Vec<Device>>>,
    device: Device,
}

impl Share {
    /// Where the guest has it, once its agent has mounted the device.
    pub fn path(&self) -> String {
        format!("{SHARES}/{}", self.name)
    }

    /// A bind mount of it in the guest, on `target` in the container's bundle.
    pub fn mount(&self, target: &str) -> GuestMount {
        let mut mount = GuestMount::new();
        mount.fstype = "none".to_owned();
        mount.source = self.path();
        mount.target = target.to_owned();
        mount.options = vec!["bind".to_owned()];
        mount
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.server.withdraw(&self.name);
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = devices.iter().position(|device| *device == self.device) {
            devices.remove(place);
        }
    }
}

/// Several of them. Taking one away waits, up to a second, for requests that a slow file system of the host holds up: where they
/// are dropped on a thread that serves other things, another one does it.
#[derive(Debug, Default)]
pub struct Shares(Vec<Share>);

impl Shares {
    /// One more.
    pub fn push(&mut self, share: Share) {
        self.0.push(share);
    }

    /// The one that was first.
    pub fn first(&self) -> Option<&Share> {
        self.0.first()
    }

    /// Takes them away from the guest.
    pub async fn withdraw(mut self) {
        let shares = std::mem::take(&mut self.0);
        if !shares.is_empty() {
            let _ = tokio::task::spawn_blocking(move || drop(shares)).await;
        }
    }
}

impl Drop for Shares {
    fn drop(&mut self) {
        if self.0.is_empty() {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let shares = std::mem::take(&mut self.0);
            runtime.spawn_blocking(move || drop(shares));
        }
    }
}

fn failed(path: &Path) -> impl Fn(nacre_fs::Error) -> Error {
    move |error| Error::Share {
        path: path.to_owned(),
        cause: super::chain(&error),
    }
}

impl Sandbox {
    /// Shares what `path` names, as it is now: later mounts over it are not seen. With `recursive`, what is mounted
    /// below comes along. Blocks as long as the host's file systems do.
    ///
    /// # Errors
    /// [`Error::Share`] with the path and why.
    pub fn share(
        &self,
        name: &str,
        path: &Path,
        access: Access,
        caching: Caching,
        recursive: bool,
    ) -> Result<Share, Error> {
        let root = open_export(path, access, recursive).map_err(failed(path))?;
        self.share_opened(name, path, root, access, caching)
    }

    fn share_opened(
        &self,
        name: &str,
        path: &Path,
        root: OwnedFd,
        access: Access,
        caching: Caching,
    ) -> Result<Share, Error> {
        let server = self.0.files.clone();
        server
            .export_cached(name, root, access, caching)
            .map_err(failed(path))?;
        let state = match access {
            Access::ReadOnly => "read-only",
            Access::ReadWrite => "read-write",
        };
        let device = Device {
            window: None,
            kind: "share".to_owned(),
            detail: format!("{} as {name}, {state}", path.display()),
            traffic: None,
        };
        let devices = self.0.devices.clone();
        devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(device.clone());
        Ok(Share {
            server,
            name: name.to_owned(),
            devices,
            device,
        })
    }

    /// Shares what a container's specification binds; a relative source is below `base`. Blocks as
    /// [`share`](Self::share) does.
    ///
    /// # Errors
    /// As there.
    pub fn share_bind(&self, bind: &Bind, base: &Path, caching: Caching) -> Result<Share, Error> {
        let access = match bind.read_only {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let source = base.join(&bind.source);
        let Some(mapped) = &bind.owners else {
            return self.share(&bind.name, &source, access, caching, bind.recursive);
        };
        let (owners, all) = (&mapped.owners, mapped.all);
        let root = open_mapped_export(&source, access, bind.recursive, owners, all)
            .map_err(failed(&source))?;
        self.share_opened(&bind.name, &source, root, access, caching)
    }

    /// A beginning for names of shares that no other container of this VM has.
    pub fn share_prefix(&self) -> String {
        let number = self.0.next_share.fetch_add(1, Ordering::Relaxed);
        number.to_string()
    }

    /// What is shared now, by name.
    pub fn shared(&self) -> Vec<String> {
        self.0.files.exports()
    }
}
