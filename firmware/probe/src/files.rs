//! What is measured on, the same each time: a file whose blocks know their numbers, and a tree of small files with its archive.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nacre_probe::lots::Lots;

use crate::measure::{Outcome, ns};

/// Bytes of a block, which begins with its number.
pub const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
/// Files in a folder of the tree.
const IN_FOLDER: u64 = 100;
/// Files of the tree have from 100 bytes to just below this.
const LARGEST: u64 = 4096;

/// Makes `file`, `tree` and `tree.tar` in a folder.
///
/// # Errors
/// What the file system says.
pub fn make(folder: &Path, mib: u64, files: u64) -> Result<Outcome> {
    let began = Instant::now();
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let bytes = file(&folder.join("file"), mib)?;
    let archived = tree(folder, files)?;
    Ok(Outcome {
        ns: ns(began),
        count: files,
        bytes: bytes + archived,
        ..Outcome::default()
    })
}

fn file(path: &Path, mib: u64) -> Result<u64> {
    let mut file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    let mut lots = Lots(1);
    let mut number = 0u64;
    let mut piece = vec![0; MIB];
    for _ in 0..mib {
        lots.fill(&mut piece);
        for block in piece.chunks_mut(BLOCK) {
            block[..8].copy_from_slice(&number.to_le_bytes());
            number += 1;
        }
        file.write_all(&piece)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(mib * MIB as u64)
}

fn tree(folder: &Path, files: u64) -> Result<u64> {
    let archive = folder.join("tree.tar");
    let writer = File::create(&archive).with_context(|| format!("making {}", archive.display()))?;
    let mut tar = tar::Builder::new(BufWriter::with_capacity(MIB, writer));
    let mut lots = Lots(2);
    let mut content = vec![0; LARGEST as usize];
    for number in 0..files {
        let name = format!("d{:03}", number / IN_FOLDER);
        let below = folder.join("tree").join(&name);
        if number % IN_FOLDER == 0 {
            fs::create_dir_all(&below).with_context(|| format!("making {}", below.display()))?;
            let mut header = header(tar::EntryType::Directory, 0o755, 0);
            tar.append_data(&mut header, format!("{name}/"), std::io::empty())?;
        }
        let length = (100 + lots.draw() % (LARGEST - 100)) as usize;
        let content = &mut content[..length];
        lots.fill(content);
        let file = format!("f{:02}", number % IN_FOLDER);
        let path = below.join(&file);
        fs::write(&path, &*content).with_context(|| format!("writing {}", path.display()))?;
        let mut header = header(tar::EntryType::Regular, 0o644, length as u64);
        tar.append_data(&mut header, format!("{name}/{file}"), &*content)?;
    }
    fs::create_dir_all(folder.join("tree"))?;
    tar.into_inner()
        .and_then(|mut writer| writer.flush())
        .with_context(|| format!("writing {}", archive.display()))?;
    Ok(fs::metadata(&archive)?.len())
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(1_700_000_000);
    header
}

/// Whether blocks from `first` on are those that were made there.
///
/// # Errors
/// They are not, or are no whole blocks.
pub fn check(bytes: &[u8], first: u64) -> Result<()> {
    ensure!(
        bytes.len().is_multiple_of(BLOCK),
        "a read ended within block {}",
        first + (bytes.len() / BLOCK) as u64
    );
    for (number, block) in (first..).zip(bytes.chunks(BLOCK)) {
        ensure!(
            block[..8] == number.to_le_bytes(),
            "what was read for block {number} is something else"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_know_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert_eq!(file(&path, 2).unwrap(), 2 << 20);
        let bytes = fs::read(&path).unwrap();
        check(&bytes, 0).unwrap();
        check(&bytes[7 * BLOCK..9 * BLOCK], 7).unwrap();
        assert!(check(&bytes[7 * BLOCK..9 * BLOCK], 8).is_err());
        assert!(check(&bytes[..100], 0).is_err());
    }
}
