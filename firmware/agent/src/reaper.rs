//! Reaps every child of the first process. Those that someone claimed have
//! their exit told; the others, orphans of containers mostly, vanish silently.
//! A process that ends before it could be claimed is remembered as long as
//! someone expects one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::warn;

use crate::init;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0–255; death by signal is 128 + its number.
    pub status: u32,
    /// Guest wall clock, nanoseconds since the epoch.
    pub at_ns: u64,
}

/// The one who waits for all children. Clones share the table.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    claims: HashMap<i32, oneshot::Sender<Exit>>,
    expecting: usize,
    unclaimed: HashMap<i32, Exit>,
}

/// While one of these lives, exits of unknown processes are remembered.
pub struct Expectation(Reaper);

impl Reaper {
    /// Starts to reap; needs a runtime.
    ///
    /// # Errors
    /// When SIGCHLD cannot be listened to.
    pub fn start() -> std::io::Result<Reaper> {
        let reaper = Reaper::default();
        let mut children = signal(SignalKind::child())?;
        let table = reaper.clone();
        tokio::spawn(async move {
            loop {
                table.collect();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// To be called before a process is made, and kept until it is claimed.
    pub fn expect(&self) -> Expectation {
        self.0.lock().expect("reaper's table").expecting += 1;
        Expectation(self.clone())
    }

    fn collect(&self) {
        loop {
            let (pid, status) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code as u32 & 0xff),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as u32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => return warn!("waiting for children: {error}"),
            };
            self.ended(
                pid.as_raw(),
                Exit {
                    status,
                    at_ns: init::realtime_ns(),
                },
            );
        }
    }

    fn ended(&self, pid: i32, exit: Exit) {
        let mut table = self.0.lock().expect("reaper's table");
        if let Some(claim) = table.claims.remove(&pid) {
            let _ = claim.send(exit);
        } else if table.expecting > 0 {
            table.unclaimed.insert(pid, exit);
        }
    }
}

impl Expectation {
    /// Completes with the exit of `pid`, a child that was made since the expectation began.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.0.0.lock().expect("reaper's table");
        match table.unclaimed.remove(&pid) {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                table.claims.insert(pid, sender);
            }
        }
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.0.0.lock().expect("reaper's table");
        table.expecting -= 1;
        if table.expecting == 0 {
            table.unclaimed.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit {
        status: 3,
        at_ns: 1,
    };

    #[test]
    fn an_exit_before_the_claim_is_not_lost() {
        let reaper = Reaper::default();
        let expectation = reaper.expect();
        reaper.ended(7, EXIT);
        assert_eq!(expectation.claim(7).try_recv(), Ok(EXIT));
    }

    #[test]
    fn an_exit_after_the_claim_is_told() {
        let reaper = Reaper::default();
        let mut claim = reaper.expect().claim(7);
        assert!(claim.try_recv().is_err());
        reaper.ended(7, EXIT);
        assert_eq!(claim.try_recv(), Ok(EXIT));
    }

    #[test]
    fn orphans_are_forgotten() {
        let reaper = Reaper::default();
        reaper.ended(7, EXIT);
        let first = reaper.expect();
        reaper.ended(8, EXIT);
        let second = reaper.expect();
        drop(first);
        assert!(second.claim(7).try_recv().is_err(), "nobody expected it");
        drop(second);
        let table = reaper.0.lock().unwrap();
        assert!(table.unclaimed.is_empty());
    }
}
