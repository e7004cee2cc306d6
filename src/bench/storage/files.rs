//! What is measured on, in a folder of the host: the files, which `nacre-probe` makes, beside the probe itself, so that the folder
//! is also a container's root; and disks with the same in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Sizes;
use crate::bench::probed::PROBE;

const MIB: u64 = 1 << 20;
/// What containers have mounted over it.
const FOLDERS: [&str; 5] = ["dev", "proc", "share", "sys", "tmp"];

/// The folder; it is removed when this is dropped.
pub(super) struct Files {
    folder: tempfile::TempDir,
    sizes: Sizes,
}

impl Files {
    /// Makes them below `within`.
    pub fn make(within: &Path, probe: &Path, sizes: Sizes) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("nacre-bench-storage-")
            .tempdir_in(within)
            .with_context(|| format!("making a folder in {}", within.display()))?;
        let this = Self { folder, sizes };
        let root = this.root();
        for name in FOLDERS {
            let path = root.join(name);
            fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        }
        fs::copy(probe, root.join(PROBE))
            .with_context(|| format!("copying {}: --probe names another", probe.display()))?;
        let mut make = Command::new(probe);
        make.arg("make").arg(&root);
        make.args(["--mib", &sizes.mib.to_string()]);
        make.args(["--files", &sizes.files.to_string()]);
        run(&mut make)?;
        Ok(this)
    }

    /// The folder of the files, and a container's root.
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("files")
    }

    /// A path beside the folder, for what else is needed.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new disk: ext4 with all of the folder, and room to unpack the archive.
    pub fn disk(&self, name: &str) -> Result<PathBuf> {
        let disk = self.beside(name);
        let archive = fs::metadata(self.root().join("tree.tar"))?.len();
        let mut make = Command::new("mke2fs");
        // Nothing is left for the kernel to write later, while something is measured.
        make.args(["-q", "-F", "-t", "ext4", "-m", "0"]);
        make.args(["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]);
        make.args(["-N", &(self.sizes.files * 5 / 2 + 1024).to_string()]);
        make.arg("-d").arg(self.root());
        make.arg(&disk);
        make.arg(format!("{}m", disk_mib(self.sizes, archive)));
        run(&mut make).context("making a disk; mke2fs is in the package e2fsprogs")?;
        Ok(disk)
    }
}

/// MiB of a disk: each file of the tree twice, in blocks; inodes, a journal, and some room.
fn disk_mib(sizes: Sizes, archive: u64) -> u64 {
    let used = sizes.mib + archive.div_ceil(MIB) + (sizes.files * 2 * 4096).div_ceil(MIB);
    used + sizes.files * 5 / 2 / 4096 + used / 8 + 64
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("running {program}"))?;
    ensure!(
        output.status.success(),
        "{program}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_room_for_the_tree_twice() {
        let sizes = Sizes {
            mib: 64,
            files: 10_000,
        };
        assert!(disk_mib(sizes, 30 * MIB) > 64 + 30 + 2 * 40);
        let small = Sizes { mib: 1, files: 1 };
        assert!((64..80).contains(&disk_mib(small, 4096)));
    }

    #[test]
    fn what_a_program_says_is_in_the_error() {
        let error = run(Command::new("sh").args(["-c", "echo no such luck >&2; exit 3"]));
        assert!(error.unwrap_err().to_string().contains("no such luck"));
        let error = run(&mut Command::new("/nowhere/mke2fs")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/mke2fs"));
    }
}
