//! What the host shares: the root of its virtio-fs device, mounted once, with
//! an entry for each thing that it has shared with the guest.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nacre_protocol::agent::CreateContainerRequest;
use nacre_protocol::{SHARE_TAG, SHARES};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{Doing, Error};

/// Whether it is mounted.
static MOUNTED: Mutex<bool> = Mutex::new(false);

/// Whether a container needs something of it.
pub fn wanted(request: &CreateContainerRequest) -> bool {
    let root = |source: &str| Path::new(source).starts_with(SHARES);
    request.rootfs.iter().any(|mount| root(&mount.source)) || request.shares
}

/// Mounts it, unless it is. Blocks.
///
/// # Errors
/// What the kernel said: without such a device, or without the file system.
pub fn mount_once() -> Result<(), Error> {
    let mut mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    if *mounted {
        return Ok(());
    }
    fs::create_dir_all(SHARES).doing(|| format!("making {SHARES}"))?;
    // Device nodes of the host's files mean nothing here.
    let flags = MsFlags::MS_NODEV;
    mount(
        Some(SHARE_TAG),
        SHARES,
        Some("virtiofs"),
        flags,
        None::<&str>,
    )
    .doing(|| format!("mounting the host's virtio-fs device {SHARE_TAG} on {SHARES}"))?;
    *mounted = true;
    Ok(())
}

/// Unmounts it, so that all that was written is with the host. One that is in use is detached.
///
/// # Errors
/// What the kernel said.
pub fn unmount() -> Result<(), Error> {
    let mut mounted = MOUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !std::mem::take(&mut *mounted) {
        return Ok(());
    }
    umount2(SHARES, MntFlags::empty())
        .or_else(|_| umount2(SHARES, MntFlags::MNT_DETACH))
        .doing(|| format!("unmounting {SHARES}"))
}
