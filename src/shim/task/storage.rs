//! What a container's files are made of: its root and its bind mounts, as what the host shares with the guest and as
//! disks of the VM. All of it is this process's own and goes with it, so none of it is in the record.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;

use super::{Error, Shim};
use crate::sandbox::shares::Shares;
use crate::sandbox::spec::Bind;
use crate::sandbox::{
    Access, Caching, DiskConfig, GuestMount, Sandbox, chain, monotonic_ns, storage,
};
use crate::shim::rootfs::{Form, guest, host};

/// The root in a bundle.
const ROOT: &str = "rootfs";

/// What a container holds of the host while it is there.
#[derive(Debug, Default)]
pub(super) struct Storage {
    /// Dropping it takes them away from the guest.
    shares: Shares,
    /// virtio-mmio windows of its disks.
    windows: Vec<u8>,
}

/// What is to be shared and plugged, found out without the guest.
#[derive(Debug)]
pub(super) struct Prepared {
    shares: Shares,
    root: Root,
}

#[derive(Debug)]
enum Root {
    /// The first of the shares.
    Shared,
    Disks(guest::Plan),
}

/// What to prepare.
pub(super) struct Wanted {
    pub bundle: PathBuf,
    /// Relative to the bundle, or absolute.
    pub root: PathBuf,
    pub mounts: Vec<Mount>,
    pub binds: Vec<Bind>,
    pub prefix: String,
}

impl Shim {
    /// Mounts and shares what a container needs, and makes the disks that are to be made. Blocks as long as the host's
    /// file systems do. What was done until an error is undone.
    pub(super) fn prepare_storage(
        &self,
        sandbox: &Sandbox,
        wanted: &Wanted,
    ) -> Result<Prepared, Error> {
        let begun = monotonic_ns();
        let failed = |error: &dyn std::error::Error| Error::Failed(chain(error));
        let form = Form::of(&wanted.mounts).map_err(|error| Error::Invalid(error.to_string()))?;
        let mut shares = Shares::default();
        let root = match form {
            Form::Host => {
                // `join` keeps an absolute root.
                let path = wanted.bundle.join(&wanted.root);
                // What is shared is a clone of the mount; the mount itself has served when it is there.
                let mounted =
                    host::Root::mount(&path, &wanted.mounts).map_err(|error| failed(&error))?;
                let share = sandbox
                    .share(
                        &format!("{}.root", wanted.prefix),
                        mounted.path(),
                        Access::ReadWrite,
                        self.caching(&wanted.mounts),
                        true,
                    )
                    .map_err(|error| failed(&error))?;
                shares.push(share);
                Root::Shared
            }
            Form::Guest(plan) => {
                for disk in &plan.disks {
                    let Some(mkfs) = &disk.mkfs else { continue };
                    storage::make_file_system(
                        &disk.path,
                        &mkfs.kind,
                        mkfs.size,
                        mkfs.uuid.as_deref(),
                    )
                    .map_err(|error| failed(&error))?;
                }
                Root::Disks(plan)
            }
        };
        for bind in &wanted.binds {
            let source = wanted.bundle.join(&bind.source);
            judge(&source, &bind.destination)?;
            let caching = Caching::For(self.config.share.cache);
            let share = sandbox
                .share_bind(bind, &wanted.bundle, caching)
                .map_err(|error| failed(&error))?;
            shares.push(share);
        }
        let took_us = monotonic_ns().saturating_sub(begun) / 1000;
        tracing::debug!(binds = wanted.binds.len(), took_us, "shared with the guest");
        Ok(Prepared { shares, root })
    }
}

/// Refuses a source that would be useless in a guest.
fn judge(source: &Path, destination: &Path) -> Result<(), Error> {
    let kind = std::fs::metadata(source).map_err(|error| {
        Error::Failed(format!(
            "Cannot share {} with the guest for {}: {error}",
            source.display(),
            destination.display()
        ))
    })?;
    let kind = kind.file_type();
    if kind.is_block_device() || kind.is_char_device() {
        return Err(Error::Invalid(format!(
            "The bind mount of {} at {} is of a device of the host, which a guest cannot have",
            source.display(),
            destination.display()
        )));
    }
    if kind.is_socket() || kind.is_fifo() {
        return Err(Error::Invalid(format!(
            "The bind mount of {} at {} is of a socket or a pipe, whose host's end nobody in a guest could reach",
            source.display(),
            destination.display()
        )));
    }
    Ok(())
}

impl Shim {
    /// How long the guest may rely on what it knows of a root: for ever if it is one that only its container writes.
    fn caching(&self, mounts: &[Mount]) -> Caching {
        let own = mounts.iter().any(|mount| {
            let mut options = mount.options.iter();
            mount.type_.ends_with("overlay")
                && options.any(|option| option.starts_with("upperdir="))
        });
        match own {
            true => Caching::Always,
            false => Caching::For(self.config.share.cache),
        }
    }
}

impl Prepared {
    /// Takes back what is shared already.
    pub(super) async fn withdraw(self) {
        self.shares.withdraw().await;
    }

    /// Plugs the disks, and answers with the mounts for the guest. What is held is in `storage` from when it is: a
    /// failure leaves it there, to be freed.
    pub(super) async fn plug(
        self,
        sandbox: &Sandbox,
        storage: &mut Storage,
    ) -> Result<Vec<GuestMount>, Error> {
        storage.shares = self.shares;
        let plan = match self.root {
            Root::Shared => {
                let root = storage.shares.first();
                return Ok(root.map(|share| share.mount(ROOT)).into_iter().collect());
            }
            Root::Disks(plan) => plan,
        };
        let mut layers = None;
        if !plan.layers.is_empty() {
            let (disk, partitions) = match plan.layers.as_slice() {
                [layer] => (DiskConfig::file(layer, true, "layer"), 0),
                all => {
                    let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
                    (DiskConfig::parts(all, true, "layers"), count)
                }
            };
            layers = Some(attach(sandbox, storage, disk, partitions).await?);
        }
        let mut disks = Vec::new();
        for (index, disk) in plan.disks.iter().enumerate() {
            let disk = DiskConfig::file(&disk.path, disk.read_only, format!("disk{index}"));
            disks.push(attach(sandbox, storage, disk, 0).await?);
        }
        Ok(plan.mounts(layers.as_deref(), &disks))
    }
}

async fn attach(
    sandbox: &Sandbox,
    storage: &mut Storage,
    disk: DiskConfig,
    partitions: u32,
) -> Result<String, Error> {
    let attached = sandbox
        .attach_disk(disk, partitions)
        .await
        .map_err(|error| Error::Failed(error.to_string()))?;
    storage.windows.push(attached.window);
    Ok(attached.device)
}

impl Storage {
    /// Takes back what is shared.
    pub(super) async fn withdraw(self) {
        self.shares.withdraw().await;
    }

    /// Takes the disks back from a guest that has unmounted them. Failures are logged.
    pub(super) async fn detach(&mut self, sandbox: &Sandbox, id: &str) {
        for window in std::mem::take(&mut self.windows).into_iter().rev() {
            if let Err(error) = sandbox.detach_disk(window).await {
                tracing::warn!(container = id, %error, "the guest did not let go of a disk");
            }
        }
    }
}
