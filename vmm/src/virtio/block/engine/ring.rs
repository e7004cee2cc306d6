//! Operations by io_uring: reads, writes past the page cache and syncs by the ring; what it does
//! not do well (writes into the page cache) or not on every kernel and file (discards, zeroes) by
//! threads.
//!
//! The kernel is done with an operation when its completion was taken from the ring. `in_kernel`
//! counts what it has and has not completed, so that dropping the ring can wait for exactly that.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::{Action, Completion, Engine, Operation, Pool, THREADS};
use crate::virtio::block::disk::Disk;

/// Operations handed to the kernel by one call, at most: it does some of them at once, and a reset
/// is not to wait for many.
const BATCH: usize = 16;
/// Marks the completions of cancellations, which are of no operation.
const CANCELLATION: u64 = u64::MAX;
/// How long the kernel may be out of memory for our operations while none of them is under way.
const PATIENCE: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(1);

/// An io_uring, with the disk's files registered.
pub(in crate::virtio::block) struct Ring {
    ring: IoUring,
    /// Indices of the registered files: one for each image, and one for its way past the cache.
    files: Vec<(u32, u32)>,
    /// Operations that are in the ring or its queues, by token.
    busy: Vec<bool>,
    in_kernel: usize,
    threads: Pool,
    /// Operations that the threads have.
    helped: usize,
}

impl Ring {
    /// A ring for `depth` operations at a time.
    ///
    /// # Errors
    ///
    /// If the kernel has no io_uring, lacks what is needed of it, or does not allow it.
    pub fn new(disk: &Arc<Disk>, depth: u16) -> io::Result<Self> {
        let mut descriptors = Vec::new();
        let files = disk
            .images()
            .iter()
            .map(|image| {
                let (host, direct) = image.descriptors();
                let first = descriptors.len() as u32;
                descriptors.push(host);
                descriptors.extend(direct);
                (first, descriptors.len() as u32 - 1)
            })
            .collect();
        Self::over(&descriptors, files, Pool::new(disk, THREADS)?, depth)
    }

    pub(super) fn over(
        descriptors: &[RawFd],
        files: Vec<(u32, u32)>,
        threads: Pool,
        depth: u16,
    ) -> io::Result<Self> {
        let entries = u32::from(depth).next_power_of_two();
        // Completions need not interrupt the thread, which comes by. Linux has that from 5.19 on.
        let ring = match IoUring::builder()
            .dontfork()
            .setup_coop_taskrun()
            .build(entries)
        {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().dontfork().build(entries)?
            }
            result => result?,
        };
        if !ring.params().is_feature_nodrop() {
            return Err(io::Error::other("this io_uring drops completions"));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::Error::other("this io_uring lacks operations"));
        }
        ring.submitter().register_files(descriptors)?;
        Ok(Self {
            ring,
            files,
            busy: vec![false; depth.into()],
            in_kernel: 0,
            threads,
            helped: 0,
        })
    }

    /// What the kernel is to be told of an operation; `None` if the ring does not do it.
    fn entry(&self, operation: &Operation) -> Option<squeue::Entry> {
        let (host, direct) = self.files[operation.image];
        let file = types::Fixed(if operation.direct { direct } else { host });
        match operation.action {
            Action::Read { offset, vectors } => {
                let entry = opcode::Readv::new(file, vectors.first, vectors.count as u32);
                Some(entry.offset(offset).build())
            }
            // Most file systems may wait at a write into the page cache, so the kernel would leave
            // it to a worker of its own, one at a time for a file. That was measured to be slower.
            Action::Write { .. } if !operation.direct => None,
            Action::Write { offset, vectors } => {
                let entry = opcode::Writev::new(file, vectors.first, vectors.count as u32);
                Some(entry.offset(offset).build())
            }
            Action::Sync => {
                let entry = opcode::Fsync::new(types::Fixed(host));
                Some(entry.flags(types::FsyncFlags::DATASYNC).build())
            }
            Action::Discard { .. } | Action::Zero { .. } => None,
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: an operation's memory stays until its completion was given out or `self` was
        // dropped (`Engine::start`), which waits for it; a cancellation has none.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }
            .map_err(|_| io::Error::other("the ring's submission queue stays full"))
    }

    fn reap(&mut self, mut each: impl FnMut(Completion)) {
        for entry in self.ring.completion() {
            self.in_kernel -= 1;
            if entry.user_data() == CANCELLATION {
                continue;
            }
            let token = entry.user_data() as usize;
            self.busy[token] = false;
            let result = entry.result();
            each(Completion {
                token,
                result: u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)),
            });
        }
    }
}

impl Engine for Ring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let mut descriptors = self.threads.descriptors();
        descriptors.push(self.ring.as_raw_fd());
        descriptors
    }

    unsafe fn start(&mut self, token: usize, operation: Operation) -> io::Result<()> {
        let Some(entry) = self.entry(&operation) else {
            // SAFETY: the caller's promise is the one that is asked for; the threads are dropped
            // with `self`.
            unsafe { self.threads.start(token, operation) }?;
            self.helped += 1;
            return Ok(());
        };
        self.push(&entry.user_data(token as u64))?;
        self.busy[token] = true;
        if self.ring.submission().len() >= BATCH {
            self.submit()?;
        }
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut tries = 0;
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(count) => self.in_kernel += count,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Those under way will make room and wake the caller, who then comes again.
                    Some(libc::EAGAIN | libc::EBUSY) if self.in_kernel > 0 => return Ok(()),
                    Some(libc::EAGAIN | libc::EBUSY) if tries < PATIENCE => {
                        tries += 1;
                        thread::sleep(PAUSE);
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Without a system call, unless the threads have operations.
    fn completions(&mut self, completions: &mut Vec<Completion>) {
        if self.helped > 0 {
            self.threads.completions(completions);
            self.helped -= completions.len();
        }
        self.reap(|completion| completions.push(completion));
    }
}

impl Drop for Ring {
    /// Cancels what the kernel has and waits for it. A transfer of a file that has begun cannot be
    /// cancelled, but is short.
    fn drop(&mut self) {
        self.reap(drop);
        for token in 0..self.busy.len() {
            if self.busy[token] && self.in_kernel > 0 {
                let entry = opcode::AsyncCancel::new(token as u64).build();
                // One that is not cancelled is waited for.
                let _ = self.push(&entry.user_data(CANCELLATION));
            }
        }
        // Entries that the kernel has not taken it never sees once the ring is gone.
        while self.in_kernel > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(count) => self.in_kernel += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Whatever it is: what is under way ends by itself.
                Err(_) => thread::sleep(PAUSE),
            }
            self.reap(drop);
        }
    }
}
