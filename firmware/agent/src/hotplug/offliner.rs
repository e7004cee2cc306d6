//! Takes memory blocks offline in a process of its own. The kernel tries to
//! move pages away for as long as the writer of `offline` lives: from Linux 6.6
//! on only a fatal signal ends it, so that a thread could not be called back.
//! The process is the agent itself under another name, and is killed when its
//! time is over; what the kernel had begun is then undone by the kernel.

use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::cgroup;
use crate::error::{Doing, Error};
use crate::hotplug::kernel_files::{line, put};
use crate::reaper::{Exit, Reaper};

/// First argument of the agent when it is to take memory offline.
pub const OFFLINE: &str = "offline-memory";
/// Exit code for a failure without the kernel's number for it.
const NO_NUMBER: i32 = 127;

/// How an attempt to take blocks offline ended. What is offline now, sysfs tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All blocks are offline.
    Done,
    /// The kernel refused one, with this errno; those after it were not tried.
    Refused(i32),
    /// The time was over, and the process that tried is gone.
    TimedOut,
}

/// Who takes blocks offline.
pub trait Offline: Sync {
    /// Takes the blocks of these numbers below `folder` offline, one after the other. Answers when nothing is going on
    /// any more, which may be later than `limit`.
    ///
    /// # Errors
    /// When it could not be tried.
    fn offline(
        &self,
        folder: PathBuf,
        numbers: Vec<u64>,
        limit: Duration,
    ) -> impl Future<Output = Result<Ended, Error>> + Send;
}

/// A process for each attempt.
#[derive(Clone)]
pub struct OwnProcess(Reaper);

impl OwnProcess {
    /// `reaper` is told of the processes' ends.
    pub fn new(reaper: Reaper) -> OwnProcess {
        OwnProcess(reaper)
    }
}

impl Offline for OwnProcess {
    async fn offline(
        &self,
        folder: PathBuf,
        numbers: Vec<u64>,
        limit: Duration,
    ) -> Result<Ended, Error> {
        let expectation = self.0.expect();
        let child = Command::new("/proc/self/exe")
            .arg(OFFLINE)
            .arg(folder)
            .args(numbers.iter().map(u64::to_string))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .doing(|| "starting the process that takes memory offline".into())?;
        let pid = child.id().cast_signed();
        let ended = expectation.claim(pid);
        drop(expectation);
        within(ended, limit, || {
            let _ = cgroup::send(pid, libc::SIGKILL);
        })
        .await
    }
}

/// Waits for a process's end, and kills it after `limit`.
async fn within(
    mut ended: oneshot::Receiver<Exit>,
    limit: Duration,
    kill: impl FnOnce(),
) -> Result<Ended, Error> {
    let exit = match tokio::time::timeout(limit, &mut ended).await {
        Ok(exit) => exit,
        Err(_) => {
            kill();
            ended.await
        }
    };
    match exit.map(|exit| exit.status) {
        Ok(0) => Ok(Ended::Done),
        // Also when someone else, as the kernel for want of memory, has killed it.
        Ok(status) if status == 128 + libc::SIGKILL.unsigned_abs() => Ok(Ended::TimedOut),
        Ok(status) => Ok(Ended::Refused(i32::try_from(status).unwrap_or(NO_NUMBER))),
        Err(_) => Err(Error::Internal(
            "the process that takes memory offline was lost".into(),
        )),
    }
}

/// The process's whole life, with the folder and the numbers of the blocks as arguments: 0 when all are offline, else
/// the errno of the first refusal.
pub fn run(arguments: &[OsString]) -> i32 {
    let Some((folder, numbers)) = arguments.split_first() else {
        return libc::EINVAL;
    };
    for number in numbers.iter().filter_map(|number| number.to_str()) {
        let state = Path::new(folder)
            .join(format!("memory{number}"))
            .join("state");
        if let Err(error) = put(&state, "offline") {
            // What is offline already is refused with EINVAL.
            if line(&state).as_deref() != Some("offline") {
                return errno(&error);
            }
        }
    }
    0
}

fn errno(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(number @ 1..NO_NUMBER) => number,
        _ => NO_NUMBER,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;

    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { status, at_ns: 0 }
    }

    #[tokio::test]
    async fn an_end_in_time_tells_how_it_went() {
        let table = [
            (0, Ended::Done),
            (16, Ended::Refused(libc::EBUSY)),
            (137, Ended::TimedOut),
        ];
        for (status, expected) in table {
            let (sender, ended) = oneshot::channel();
            sender.send(exit(status)).unwrap();
            let told = within(ended, Duration::from_secs(60), || panic!("killed")).await;
            assert_eq!(told.unwrap(), expected, "{status}");
        }
        let (sender, ended) = oneshot::channel();
        drop(sender);
        assert!(within(ended, Duration::from_secs(60), || ()).await.is_err());
    }

    #[tokio::test]
    async fn one_that_takes_too_long_is_killed_and_its_end_waited_for() {
        let (sender, ended) = oneshot::channel();
        let sender = Cell::new(Some(sender));
        let told = within(ended, Duration::from_millis(5), || {
            sender.take().unwrap().send(exit(137)).unwrap();
        });
        assert_eq!(told.await.unwrap(), Ended::TimedOut);
        // It was done before the signal came.
        let (sender, ended) = oneshot::channel();
        let sender = Cell::new(Some(sender));
        let told = within(ended, Duration::from_millis(5), || {
            sender.take().unwrap().send(exit(0)).unwrap();
        });
        assert_eq!(told.await.unwrap(), Ended::Done);
    }

    #[test]
    fn the_process_writes_one_after_the_other_and_stops_at_a_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let state = |number: u64| folder.path().join(format!("memory{number}/state"));
        for number in [4, 5, 7] {
            fs::create_dir_all(state(number).parent().unwrap()).unwrap();
            fs::write(state(number), "online").unwrap();
        }
        let arguments = |numbers: &[&str]| -> Vec<OsString> {
            let mut arguments = vec![folder.path().into()];
            arguments.extend(numbers.iter().map(OsString::from));
            arguments
        };
        assert_eq!(run(&arguments(&["4", "5"])), 0);
        assert_eq!(line(&state(5)).as_deref(), Some("offline"));
        assert_eq!(run(&arguments(&["4", "6", "7"])), libc::ENOENT);
        assert_eq!(line(&state(7)).as_deref(), Some("online"));
        assert_eq!(run(&[]), libc::EINVAL);
    }
}
