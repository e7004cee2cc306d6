//! Disks with a file system of their own, in files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::posix_fallocate;

use crate::context::Context;
use crate::ctr;

/// Makes a file with an empty ext4 of so many MiB.
pub(crate) fn empty(path: &Path, mebibytes: u32) -> Result<()> {
    fs::File::create(path)
        .and_then(|file| file.set_len(u64::from(mebibytes) << 20))
        .with_context(|| format!("making {}", path.display()))?;
    format(path)
}

fn format(path: &Path) -> Result<()> {
    let made = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-E", "nodiscard"])
        .arg(path)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .status()
        .context("running mke2fs")?;
    ensure!(made.success(), "mke2fs of {}: {made}", path.display());
    Ok(())
}

/// A folder that is an ext4 of its own. What is written there a cgroup that needs memory can give back, which it cannot on a tmpfs.
pub(crate) struct Disk {
    /// Where it is mounted.
    pub folder: PathBuf,
    image: PathBuf,
}

impl Disk {
    /// Makes and mounts it.
    pub fn mount(context: &Context, name: &str, mebibytes: u32) -> Result<Self> {
        let disk = Disk {
            folder: context.path(name),
            image: context.path(format!("{name}.img")),
        };
        // All of it is there from the beginning: whoever first writes to a page of a tmpfs pays for it.
        let file = fs::File::create(&disk.image)?;
        posix_fallocate(&file, 0, i64::from(mebibytes) << 20)
            .with_context(|| format!("allocating {}", disk.image.display()))?;
        format(&disk.image)?;
        fs::create_dir_all(&disk.folder)?;
        let mut command = Command::new("mount");
        command.args(["-t", "ext4", "-o", "loop"]);
        command.arg(&disk.image).arg(&disk.folder);
        ctr::run(&mut command)?.expect_code(0)?;
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = ctr::run(Command::new("umount").arg(&self.folder));
        let _ = fs::remove_file(&self.image);
    }
}
