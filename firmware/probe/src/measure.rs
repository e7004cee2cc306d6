//! A file read from end to end, a tree walked, an archive unpacked.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;

use crate::files::{BLOCK, check};

const MIB: usize = 1 << 20;
/// Page cache, dentries and inodes.
const DROP_ALL: &str = "3";

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Nanoseconds of the monotonic clock.
    pub ns: u64,
    /// Reads, or files.
    pub count: u64,
    /// Bytes that were read or written.
    pub bytes: u64,
    /// What was dropped of the caches before: `all`, or the `file`'s pages only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<&'static str>,
    /// Whether the reads went past the page cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// How reads were under way at once: `io_uring`, or `threads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<&'static str>,
}

/// Nanoseconds since then.
pub fn ns(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Opens a file, with its path in the error.
pub fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

/// Drops what this kernel has in its caches; only a file's pages where it may do no more.
pub fn drop_caches(file: &File) -> Result<&'static str> {
    nix::unistd::syncfs(file).context("syncing before caches are dropped")?;
    // Not those of a machine that unit tests run on.
    if !cfg!(test) && fs::write("/proc/sys/vm/drop_caches", DROP_ALL).is_ok() {
        return Ok("all");
    }
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .context("dropping a file's pages")?;
    Ok("file")
}

/// Reads a file, 1 MiB at a time.
///
/// # Errors
/// It cannot be read, or is not the file that was made.
pub fn read(path: &Path, cold: bool) -> Result<Outcome> {
    timed(path, cold, through)
}

/// Goes over it once, with no cache of it, or with one by going over it before.
fn timed(path: &Path, cold: bool, once: fn(&Path) -> Result<(u64, u64)>) -> Result<Outcome> {
    let mut dropped = None;
    if cold {
        dropped = Some(drop_caches(&open(path)?)?);
    } else {
        once(path)?;
    }
    let began = Instant::now();
    let (count, bytes) = once(path)?;
    Ok(Outcome {
        ns: ns(began),
        count,
        bytes,
        dropped,
        ..Outcome::default()
    })
}

fn through(path: &Path) -> Result<(u64, u64)> {
    let mut file = open(path)?;
    let mut piece = vec![0; MIB];
    let (mut reads, mut bytes) = (0, 0);
    loop {
        let length = file
            .read(&mut piece)
            .with_context(|| format!("reading {}", path.display()))?;
        if length == 0 {
            break;
        }
        check(&piece[..length], bytes / BLOCK as u64)
            .with_context(|| format!("in {}", path.display()))?;
        reads += 1;
        bytes += length as u64;
    }
    let size = file.metadata()?.len();
    ensure!(
        bytes == size,
        "{} has {size} bytes, and {bytes} were read",
        path.display()
    );
    Ok((reads, bytes))
}

/// Lists a tree, and looks at each file and folder.
///
/// # Errors
/// What the file system says.
pub fn walk(folder: &Path, cold: bool) -> Result<Outcome> {
    timed(folder, cold, below)
}

/// Files below a folder, and their bytes.
fn below(folder: &Path) -> Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0);
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?;
        for entry in entries {
            let path = entry
                .with_context(|| format!("listing {}", folder.display()))?
                .path();
            let found = fs::symlink_metadata(&path)
                .with_context(|| format!("looking at {}", path.display()))?;
            if found.is_dir() {
                folders.push(path);
            } else {
                files += 1;
                bytes += found.len();
            }
        }
    }
    Ok((files, bytes))
}

/// Unpacks an archive and waits until its files are on the disk.
///
/// # Errors
/// The folder is there, or what the file system says.
pub fn untar(archive: &Path, folder: &Path) -> Result<Outcome> {
    // So that it is in the cache.
    std::io::copy(&mut open(archive)?, &mut std::io::sink())
        .with_context(|| format!("reading {}", archive.display()))?;
    fs::create_dir(folder).with_context(|| format!("making {}", folder.display()))?;
    let began = Instant::now();
    let reader = BufReader::with_capacity(MIB, open(archive)?);
    let mut unpacked = tar::Archive::new(reader);
    let mut count = 0;
    for entry in unpacked.entries()? {
        let mut entry = entry.with_context(|| format!("reading {}", archive.display()))?;
        let is_file = entry.header().entry_type().is_file();
        // The archive is our own: `unpack_in` would look at each folder of each path again, which tar does not.
        let path = folder.join(entry.path()?);
        entry
            .unpack(&path)
            .with_context(|| format!("unpacking {}", path.display()))?;
        count += u64::from(is_file);
    }
    nix::unistd::syncfs(open(folder)?).with_context(|| format!("syncing {}", folder.display()))?;
    let ns = ns(began);
    let (files, bytes) = below(folder)?;
    ensure!(
        files == count,
        "{count} files were unpacked to {}, and {files} are there",
        folder.display()
    );
    fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
    Ok(Outcome {
        ns,
        count,
        bytes,
        ..Outcome::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files;

    #[test]
    fn what_was_made_is_read_walked_and_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        files::make(folder.path(), 1, 250).unwrap();
        let outcome = read(&at("file"), false).unwrap();
        assert_eq!((outcome.bytes, outcome.dropped), (1 << 20, None));
        assert_eq!(read(&at("file"), true).unwrap().dropped, Some("file"));
        let walked = walk(&at("tree"), false).unwrap();
        assert_eq!(walked.count, 250);
        let unpacked = untar(&at("tree.tar"), &at("out")).unwrap();
        assert_eq!((unpacked.count, unpacked.bytes), (250, walked.bytes));
        assert!(!at("out").exists());
    }

    #[test]
    fn a_file_that_was_changed_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        files::make(folder.path(), 1, 1).unwrap();
        let file = folder.path().join("file");
        let mut bytes = fs::read(&file).unwrap();
        bytes[3 * BLOCK] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let error = format!("{:#}", read(&file, false).unwrap_err());
        assert!(error.contains("block 3"), "{error}");
    }
}
