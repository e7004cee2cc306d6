//! `delete`: frees what a daemon left that ended in whatever way, and answers
//! for its container. A daemon that still lives is waited for, then killed, by a
//! descriptor that cannot mean another process.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::flags::{DAEMON_ACTION, Flags};
use super::{ADDRESS_FILE, PID_FILE, address};
use crate::config::Config;
use crate::control;
use crate::record::{self, Holder};
use crate::shim::events::timestamp;

/// Exit status of a task whose shim is gone: 128 + SIGKILL.
const KILLED: u32 = 137;
/// How long a daemon may take to say what it serves. containerd gives `delete` five seconds for all of this.
const SAYS: Duration = Duration::from_millis(500);
/// How long one that ends by itself is waited for.
const ENDS_BY_ITSELF: Duration = Duration::from_millis(1600);
/// How long a killed one is waited for, until it has given up its record and is gone: the kernel frees the guest's memory
/// first, which takes its time on a busy host.
const ENDS_KILLED: Duration = Duration::from_millis(2000);
/// How long one that has freed all, and was killed for staying, is waited for.
const ENDS_AT_LAST: Duration = Duration::from_millis(1000);

/// Why not everything is free.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// What is recorded cannot be freed.
    #[error("{0}")]
    Record(String),
}

/// Runs `delete`; answers with the bytes for stdout.
///
/// # Errors
/// What could not be freed.
pub fn delete(flags: &Flags, bundle: &Path) -> Result<Vec<u8>, Error> {
    let config = Config::load().map_err(|error| Error::Config(crate::sandbox::chain(&error)))?;
    // Without a bundle the container can only have had a sandbox of its own.
    let sandbox = super::load_spec(bundle).map_or_else(
        |_| flags.id.clone(),
        |spec| super::sandbox_id(&spec, &flags.id),
    );
    let directory = config.vm_dir(&flags.namespace, &sandbox);
    let ours = sandbox == flags.id;
    let pid = bundle_pid(bundle);
    let daemon = pid.and_then(|pid| Daemon::find(pid, &flags.namespace));

    if serves_others(&directory, &flags.id) {
        // A container of a pod has gone; the rest of it lives on.
        return Ok(answer(pid));
    }
    let freed = free(&directory, daemon.as_ref(), ours, &flags.namespace);
    if let Some(path) = socket(bundle) {
        address::release(&path, None);
    }
    Ok(answer(freed?.or(pid)))
}

/// The answer for a container whose daemon had `pid`.
fn answer(pid: Option<i32>) -> Vec<u8> {
    let mut response = DeleteResponse::new();
    response.pid = pid
        .and_then(|pid| u32::try_from(pid).ok())
        .unwrap_or_default();
    response.exit_status = KILLED;
    response.exited_at = timestamp(SystemTime::now());
    // Writing to a Vec fails only for messages over 2 GiB.
    response.write_to_bytes().unwrap_or_default()
}

/// Whether a living daemon says that its VM holds containers besides `id`.
fn serves_others(directory: &Path, id: &str) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    else {
        return false;
    };
    let ask = async {
        let client = control::Client::connect(directory).await.ok()?;
        client.inspect().await.ok()
    };
    let said = runtime.block_on(async { tokio::time::timeout(SAYS, ask).await });
    matches!(said, Ok(Some(seen)) if seen.containers.iter().any(|other| other != id))
}

/// Frees the sandbox's record when nobody holds it. Answers with the last holder's pid.
fn free(
    directory: &Path,
    daemon: Option<&Daemon>,
    ours: bool,
    namespace: &str,
) -> Result<Option<i32>, Error> {
    let failed = |error: record::Error| Error::Record(crate::sandbox::chain(&error));
    let mut last = record::wait_unlocked(directory, ENDS_BY_ITSELF);
    let until = Instant::now() + ENDS_KILLED;
    if matches!(last, Err(record::Error::Held { .. })) {
        if !ours {
            // The sandbox is another container's, and so is its end.
            return Ok(None);
        }
        if let Holder::Living(pid) = record::holder(directory).map_err(failed)?
            && let Some(found) = Daemon::find(pid, namespace)
            // Still the holder, now that the descriptor is open: the pid means it and nobody else.
            && matches!(record::holder(directory), Ok(Holder::Living(now)) if now == pid)
        {
            found.kill();
        }
        last = record::wait_unlocked(directory, ENDS_KILLED);
    }
    let last = last.map_err(failed)?;
    if let Some(daemon) = daemon.filter(|_| ours) {
        // It gives its record up before it is quite gone. What then holds it up is at most events that nobody takes.
        if !daemon.wait(until.saturating_duration_since(Instant::now())) {
            daemon.kill();
            if !daemon.wait(ENDS_AT_LAST) {
                tracing::warn!("a daemon that was killed is not gone yet");
            }
        }
    }
    record::cleanup(directory).map_err(failed)?;
    Ok(last)
}

fn bundle_pid(bundle: &Path) -> Option<i32> {
    std::fs::read_to_string(bundle.join(PID_FILE))
        .ok()?
        .trim()
        .parse()
        .ok()
}

fn socket(bundle: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
    text.trim().strip_prefix("unix://").map(PathBuf::from)
}

/// A living daemon, by a descriptor.
struct Daemon(OwnedFd);

impl Daemon {
    /// Opens `pid` if it is a daemon of ours in this namespace.
    fn find(pid: i32, namespace: &str) -> Option<Self> {
        let descriptor = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // Read after the descriptor was opened: if it is the daemon, so is the descriptor.
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        is_daemon(&line, namespace).then_some(Self(descriptor))
    }

    fn kill(&self) {
        // ESRCH: it is gone, which is what is wanted.
        let _ = pidfd_send_signal(&self.0, Signal::KILL);
    }

    /// Waits for its end; whether that came.
    fn wait(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: limit.subsec_nanos().into(),
        };
        matches!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1..))
    }
}

/// Whether a command line is that of a daemon. A pod's carries the id of the container that it was
/// started for, so that the id says nothing here.
fn is_daemon(line: &[u8], namespace: &str) -> bool {
    let words: Vec<&[u8]> = line
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .collect();
    let follows = |name: &[u8], value: &[u8]| {
        words
            .windows(2)
            .any(|pair| pair[0] == name && pair[1] == value)
    };
    // The action, and when its start began.
    let acts = |word: &&[u8]| *word == DAEMON_ACTION.as_bytes();
    words.iter().rev().take(2).any(acts) && follows(b"-namespace", namespace.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_daemons_command_line_is_one() {
        let line = b"containerd-shim-nacre-v1\0-namespace\0ns\0-id\0c1\0-address\0/a\0daemon\0";
        assert!(is_daemon(line, "ns"));
        assert!(is_daemon(&[&line[..], b"123456789\0"].concat(), "ns"));
        assert!(!is_daemon(line, "other"));
        assert!(!is_daemon(b"vi\0-namespace\0ns\0notes\0", "ns"));
        assert!(!is_daemon(b"", "ns"));
    }

    #[test]
    fn all_waits_together_leave_time_to_free_within_five_seconds() {
        let waits = [SAYS, ENDS_BY_ITSELF, ENDS_KILLED, address::RELEASE_PATIENCE];
        let total: Duration = waits.iter().sum();
        assert!(total <= Duration::from_millis(4500), "{total:?}");
    }

    #[test]
    fn the_bundle_tells_pid_and_socket_if_it_can() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(
            (bundle_pid(bundle.path()), socket(bundle.path())),
            (None, None)
        );
        std::fs::write(bundle.path().join(PID_FILE), "42\n").unwrap();
        std::fs::write(bundle.path().join(ADDRESS_FILE), "unix:///run/s/x").unwrap();
        assert_eq!(bundle_pid(bundle.path()), Some(42));
        assert_eq!(socket(bundle.path()), Some("/run/s/x".into()));
    }

    #[test]
    fn our_own_test_process_is_not_taken_for_a_daemon() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(Daemon::find(pid, "ns").is_none());
    }
}
