//! `start`: a socket that accepts, a daemon behind it, and the answer. Whatever
//! fails on the way, nothing is left.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::address::{self, Claim};
use super::flags::{DAEMON_ACTION, Flags};
use super::{ADDRESS_FILE, DAEMON_UP, PID_FILE, dialect};
use crate::config::Config;
use crate::record::{self, Holder};
use crate::sandbox::annotations::{self, Overrides};
use crate::sandbox::monotonic_ns;
use crate::shim::namespaces;

/// How long the lock on the socket directory is waited for, which others hold for moments only.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How long the daemon may take to come up.
const DAEMON_COMES_UP: Duration = Duration::from_secs(20);

/// Why there is no shim.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading stdin failed.
    #[error("Cannot read the bootstrap parameters from stdin: {0}")]
    Stdin(#[source] io::Error),
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// The bundle's spec cannot be read.
    #[error("{0}")]
    Spec(String),
    /// The spec asks for what it may not, or cannot.
    #[error(transparent)]
    Annotation(#[from] annotations::Error),
    /// There is no socket.
    #[error(transparent)]
    Address(#[from] address::Error),
    /// A file of the bundle cannot be written.
    #[error("Cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon cannot be spawned.
    #[error("Cannot spawn the shim's daemon: {0}")]
    Spawn(#[source] io::Error),
    /// The daemon said why it does not come up.
    #[error("The shim's daemon did not come up: {0}")]
    Daemon(String),
}

/// A socket that goes again unless the daemon has it.
struct Socket {
    path: Option<PathBuf>,
    inode: Option<u64>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            address::release(path, self.inode);
        }
    }
}

/// A daemon that is killed, and what it left freed, unless it came up.
struct Daemon {
    child: Option<Child>,
    state: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It is our child and not reaped, so its pid is still its own.
            let _ = child.kill();
            let _ = child.wait();
            // A holder is another daemon, with which this one was at odds.
            if matches!(record::holder(&self.state), Ok(Holder::Gone(_))) {
                // The error that is on its way is the better one.
                let _ = record::cleanup(&self.state);
            }
        }
    }
}

/// Runs `start`; answers with the bytes for stdout. `bundle` is the working directory.
///
/// # Errors
/// Anything that keeps the shim from coming up; nothing is left then.
pub fn start(flags: &Flags, bundle: &Path) -> Result<Vec<u8>, Error> {
    let begun_ns = monotonic_ns();
    let stdin = dialect::read_stdin(io::stdin().lock()).map_err(Error::Stdin)?;
    let max_version = std::env::var("MAX_SHIM_VERSION").ok();
    let request = dialect::recognise(&stdin, max_version.as_deref(), &flags.namespace, &flags.id);
    let config = Config::load().map_err(|error| Error::Config(crate::sandbox::chain(&error)))?;
    let spec = super::load_spec(bundle).map_err(Error::Spec)?;
    Overrides::of(&spec, &config.allowed_annotations)?;
    let sandbox = super::sandbox_id(&spec, &flags.id);

    let directory = request
        .socket_dir
        .clone()
        .or_else(|| {
            std::env::var_os("SHIM_SOCKET_DIR")
                .filter(|dir| !dir.is_empty())
                .map(PathBuf::from)
        })
        .unwrap_or_else(|| config.state_dir.join("s"));
    let path = address::socket_path(&directory, &flags.namespace, &flags.address, &sandbox)?;
    let url = format!("unix://{}", path.display());

    // Held for the claim alone: the shims of others have their sockets here too.
    let lock = address::lock_directory(&directory, LOCK_PATIENCE)?;
    let claim = address::claim(&path)?;
    drop(lock);
    if let Claim::Ours(listener) = claim {
        let inode = fs::symlink_metadata(&path).ok().map(|found| found.ino());
        let mut socket = Socket {
            path: Some(path),
            inode,
        };
        let (child, mut up) = spawn(flags, &request, bundle, OwnedFd::from(listener), begun_ns)
            .map_err(Error::Spawn)?;
        let pid = child.id();
        let mut daemon = Daemon {
            child: Some(child),
            state: config.vm_dir(&flags.namespace, &sandbox),
        };
        if let Some(score) = namespaces::oom_score(&spec) {
            namespaces::adjust_oom_score(pid, score);
        }
        await_up(&mut up).map_err(Error::Daemon)?;
        write(&bundle.join(PID_FILE), &pid.to_string())?;
        write(&bundle.join(ADDRESS_FILE), &url)?;
        daemon.child = None;
        socket.path = None;
    } else {
        write(&bundle.join(ADDRESS_FILE), &url)?;
    }
    Ok(dialect::reply(request.dialect, &url))
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}

/// Spawns the daemon: this program again, with the socket as its stdin and a pipe to us as its stdout.
fn spawn(
    flags: &Flags,
    request: &dialect::Request,
    bundle: &Path,
    listener: OwnedFd,
    begun_ns: u64,
) -> io::Result<(Child, PipeReader)> {
    let (up, theirs) = io::pipe()?;
    let program = std::env::current_exe()?;
    let mut command = Command::new(&program);
    if let Some(name) = std::env::args_os().next() {
        command.arg0(name);
    }
    command.args([
        "-namespace",
        &flags.namespace,
        "-id",
        &flags.id,
        "-address",
        &flags.address,
    ]);
    if flags.debug || request.debug {
        command.arg("-debug");
    }
    command.arg(DAEMON_ACTION).arg(begun_ns.to_string());
    if let Some(address) = &request.ttrpc_address
        && std::env::var_os("TTRPC_ADDRESS").is_none_or(|address| address.is_empty())
    {
        command.env("TTRPC_ADDRESS", address);
    }
    command
        .current_dir(bundle)
        .stdin(listener)
        .stdout(theirs)
        .stderr(Stdio::null());
    Ok((command.spawn()?, up))
}

/// Waits for the daemon's word.
fn await_up(up: &mut PipeReader) -> Result<(), String> {
    let end = Instant::now() + DAEMON_COMES_UP;
    let mut said = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(up), PollFlags::POLLIN)];
        match nix::poll::poll(
            &mut fds,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO),
        ) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.to_string()),
            Ok(0) => return Err(format!("it said nothing for {DAEMON_COMES_UP:?}")),
            Ok(_) => {}
        }
        match up.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => said.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.to_string()),
        }
        if said.first() == Some(&DAEMON_UP) {
            return Ok(());
        }
    }
    match String::from_utf8_lossy(&said).trim() {
        "" => Err("it ended without a word".to_owned()),
        words => Err(words.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn said(words: &[u8]) -> Result<(), String> {
        let (mut read, mut write) = io::pipe().unwrap();
        write.write_all(words).unwrap();
        drop(write);
        await_up(&mut read)
    }

    #[test]
    fn the_daemons_word_is_passed_on() {
        assert_eq!(said(&[DAEMON_UP]), Ok(()));
        assert_eq!(said(b"no lock\n"), Err("no lock".to_owned()));
        assert!(said(b"").unwrap_err().contains("without a word"));
    }
}
