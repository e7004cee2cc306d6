//! 4 KiB at a time from random places of a file, several at once: by io_uring, or by threads where it is refused.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use nacre_probe::lots::Lots;

use crate::files::{BLOCK, check};
use crate::measure::{Outcome, drop_caches, ns};

/// Before the ring is asked again for what it refused to say.
const PAUSE: Duration = Duration::from_millis(1);

/// A block's memory, aligned as O_DIRECT wants it.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

/// Reads blocks of a file that `make` made.
///
/// # Errors
/// It cannot be read, or a block is not the one that was made.
pub fn read(path: &Path, depth: u16, reads: u32) -> Result<Outcome> {
    let (file, direct) = open(path)?;
    let blocks = file.metadata()?.len() / BLOCK as u64;
    ensure!(blocks > 0, "{} has no block", path.display());
    let mut lots = Lots(3);
    let wanted: Vec<u64> = (0..reads).map(|_| lots.draw() % blocks).collect();
    let dropped = drop_caches(&file)?;
    let ring = Ring::new(depth);
    let began = Instant::now();
    let engine = match ring {
        Ok(mut ring) => {
            ring.read(&file, &wanted)?;
            "io_uring"
        }
        Err(_) => {
            by_threads(&file, &wanted, depth)?;
            "threads"
        }
    };
    Ok(Outcome {
        ns: ns(began),
        count: reads.into(),
        bytes: u64::from(reads) * BLOCK as u64,
        dropped: Some(dropped),
        direct: Some(direct),
        engine: Some(engine),
    })
}

/// The file, and whether reads of it go past the page cache.
fn open(path: &Path) -> Result<(File, bool)> {
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path);
    match direct {
        Ok(file) => Ok((file, true)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Ok((crate::measure::open(path)?, false))
        }
        Err(error) => Err(error).with_context(|| format!("opening {}", path.display())),
    }
}

/// Reads under way in a ring, each with a block of memory. Dropping it waits for them.
struct Ring {
    ring: IoUring,
    memory: Vec<Block>,
    under_way: usize,
}

impl Ring {
    fn new(depth: u16) -> std::io::Result<Self> {
        Ok(Self {
            ring: IoUring::new(u32::from(depth).next_power_of_two())?,
            memory: vec![Block([0; BLOCK]); depth.into()],
            under_way: 0,
        })
    }

    fn read(&mut self, file: &File, wanted: &[u64]) -> Result<()> {
        let mut left = wanted.iter().copied();
        let mut under_way = vec![0; self.memory.len()];
        for (place, block) in left.by_ref().take(under_way.len()).enumerate() {
            self.start(file, place, block)?;
            under_way[place] = block;
        }
        while self.under_way > 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    return Err(error).context("waiting for reads");
                }
                _ => {}
            }
            for (place, result) in self.completed() {
                let block = under_way[place];
                ensure!(
                    result == BLOCK as i32,
                    "reading block {block} gave {result} instead of {BLOCK}"
                );
                check(&self.memory[place].0, block)?;
                if let Some(next) = left.next() {
                    self.start(file, place, next)?;
                    under_way[place] = next;
                }
            }
        }
        Ok(())
    }

    fn start(&mut self, file: &File, place: usize, block: u64) -> Result<()> {
        let memory = self.memory[place].0.as_mut_ptr();
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), memory, BLOCK as u32)
            .offset(block * BLOCK as u64)
            .build()
            .user_data(place as u64);
        // SAFETY: the memory is this value's own, of that length, and nobody looks at it until the read has completed; dropping
        // `self` waits for that. The file is open while `read` runs, which ends with no read under way, or drops `self` next.
        unsafe { self.ring.submission().push(&entry) }
            .ok()
            .context("the ring is full")?;
        self.under_way += 1;
        Ok(())
    }

    fn completed(&mut self) -> Vec<(usize, i32)> {
        let all = self.ring.completion();
        let all: Vec<_> = all
            .map(|entry| (entry.user_data() as usize, entry.result()))
            .collect();
        self.under_way -= all.len();
        all
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.under_way > 0 {
            if self.ring.submit_and_wait(1).is_err() {
                std::thread::sleep(PAUSE);
            }
            self.completed();
        }
    }
}

fn by_threads(file: &File, wanted: &[u64], depth: u16) -> Result<()> {
    let share = wanted.len().div_ceil(depth.into());
    std::thread::scope(|scope| {
        let threads: Vec<_> = wanted
            .chunks(share)
            .map(|wanted| {
                scope.spawn(move || {
                    let mut memory = Block([0; BLOCK]);
                    for block in wanted {
                        file.read_exact_at(&mut memory.0, block * BLOCK as u64)
                            .with_context(|| format!("reading block {block}"))?;
                        check(&memory.0, *block)?;
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(anyhow::anyhow!("a reader panicked")))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files;

    #[test]
    fn blocks_are_read_at_every_depth_and_by_threads() {
        let folder = tempfile::tempdir().unwrap();
        files::make(folder.path(), 1, 0).unwrap();
        let path = folder.path().join("file");
        for (depth, reads) in [(1, 10), (32, 100), (32, 5)] {
            let outcome = read(&path, depth, reads).unwrap();
            assert_eq!(outcome.count, u64::from(reads));
            let (file, _) = open(&path).unwrap();
            by_threads(&file, &[3, 1, 4, 1, 5], depth).unwrap();
        }
    }

    #[test]
    fn a_block_that_is_another_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![7; 8 * BLOCK]).unwrap();
        assert!(read(&path, 4, 16).is_err());
        let (file, _) = open(&path).unwrap();
        assert!(by_threads(&file, &[1], 1).is_err());
    }
}
