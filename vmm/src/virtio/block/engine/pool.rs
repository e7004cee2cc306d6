//! Operations by threads, each of which waits for one system call at a time. Threads are made as
//! they are needed, up to a limit, and stay until the engine is dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Completion, Engine, Operation};
use crate::virtio::block::disk::Disk;

/// The threads' owner.
pub(in crate::virtio::block) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    limit: usize,
}

struct Shared {
    disk: Arc<Disk>,
    work: Mutex<Work>,
    /// Something is to do, or the pool ends.
    wake: Condvar,
    /// Written when a completion is there.
    ready: EventFd,
    /// The pool ends.
    cancelled: AtomicBool,
}

#[derive(Default)]
struct Work {
    waiting: VecDeque<(usize, Operation)>,
    done: Vec<Completion>,
    idle: usize,
}

impl Pool {
    /// A pool of at most `limit` threads, and none to begin with.
    ///
    /// # Errors
    ///
    /// If there is no eventfd to be had.
    pub fn new(disk: &Arc<Disk>, limit: usize) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                disk: Arc::clone(disk),
                work: Mutex::default(),
                wake: Condvar::new(),
                ready: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                cancelled: AtomicBool::new(false),
            }),
            threads: Vec::new(),
            limit,
        })
    }
}

impl Engine for Pool {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.shared.ready.as_raw_fd()]
    }

    unsafe fn start(&mut self, token: usize, operation: Operation) -> io::Result<()> {
        let mut work = self.shared.work();
        work.waiting.push_back((token, operation));
        let short = work.waiting.len() > work.idle;
        drop(work);
        if short && self.threads.len() < self.limit {
            let shared = Arc::clone(&self.shared);
            let made = thread::Builder::new()
                .name("disk-io".to_owned())
                .spawn(move || shared.run());
            match made {
                Ok(thread) => self.threads.push(thread),
                // Those that there are will do.
                Err(error) if !self.threads.is_empty() => {
                    tracing::debug!(%error, "no further thread for a disk's I/O");
                }
                Err(error) => return Err(error),
            }
        }
        self.shared.wake.notify_one();
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) {
        let mut work = self.shared.work();
        // Under the lock it is readable just when there are some.
        if !work.done.is_empty() {
            let _ = self.shared.ready.read();
            completions.append(&mut work.done);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        self.shared.work().waiting.clear();
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // One that panicked touches nothing any more.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut work = self.work();
        // Set and looked at under the lock or before it is taken, so no wake-up is lost.
        while !self.cancelled.load(Ordering::SeqCst) {
            let Some((token, operation)) = work.waiting.pop_front() else {
                work.idle += 1;
                work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
                work.idle -= 1;
                continue;
            };
            drop(work);
            // SAFETY: whoever started the operation keeps its vectors and memory until the
            // completion below is taken or the pool, which waits for this thread, is dropped.
            let result = unsafe { self.disk.perform(&operation, &self.cancelled) };
            work = self.work();
            work.done.push(Completion { token, result });
            // A full counter is readable, too.
            let _ = self.ready.write(1);
        }
    }
}
