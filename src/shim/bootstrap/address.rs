//! The shim's socket: where it lies, and how two `start`s at once agree on it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use sha2::{Digest, Sha256};

/// Longest path that fits `sun_path` with its final NUL.
const PATH_LIMIT: usize = 107;
/// Fewest hexadecimal digits of a name: 80 bits.
const SHORTEST_NAME: usize = 20;
/// How long [`release`] waits for the directory's lock, which is held for moments only.
pub const RELEASE_PATIENCE: Duration = Duration::from_millis(400);
/// How often a lock that another holds is tried.
const RETRY: Duration = Duration::from_millis(5);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory's own name leaves no room.
    #[error(
        "The socket directory {} is {} bytes long; a socket path may have {PATH_LIMIT}, of which {SHORTEST_NAME} are needed for the name",
        directory.display(), directory.as_os_str().len()
    )]
    TooLong {
        /// The directory.
        directory: PathBuf,
    },
    /// The system refused.
    #[error("Cannot {doing} {}: {source}", path.display())]
    System {
        /// What was being done.
        doing: &'static str,
        /// To which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The path of the socket of a shim that serves `group` (a container or a pod)
/// for the containerd at `containerd` in `namespace`: a hash, so that its length does not depend on them.
///
/// # Errors
/// `directory` is too long for any name in it.
pub fn socket_path(
    directory: &Path,
    namespace: &str,
    containerd: &str,
    group: &str,
) -> Result<PathBuf, Error> {
    let mut hash = Sha256::new();
    for part in [namespace, containerd, group] {
        // Lengths, so that no two triples run together.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let name: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let room = PATH_LIMIT
        .saturating_sub(directory.as_os_str().len() + 1)
        .min(name.len());
    if room < SHORTEST_NAME {
        return Err(Error::TooLong {
            directory: directory.to_owned(),
        });
    }
    Ok(directory.join(&name[..room]))
}

/// What [`claim`] came to.
pub enum Claim {
    /// The socket is ours and accepts connections already.
    Ours(UnixListener),
    /// A running shim has it.
    Taken,
}

/// Makes the directory if it is missing and locks it, so that claims and
/// releases of sockets in it come one after another. Dropping the lock frees it.
///
/// # Errors
/// The directory cannot be made or opened, or not be locked within `patience`.
pub fn lock_directory(directory: &Path, patience: Duration) -> Result<Flock<File>, Error> {
    let error = |doing| {
        move |source: io::Error| Error::System {
            doing,
            path: directory.to_owned(),
            source,
        }
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(directory)
        .map_err(error("make the socket directory"))?;
    let mut file = File::open(directory).map_err(error("open the socket directory"))?;
    let until = Instant::now() + patience;
    loop {
        let held_by_another = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) => back,
            Err((_, errno)) => return Err(error("lock the socket directory")(errno.into())),
        };
        if Instant::now() >= until {
            let cause = format!("another shim has held the lock for {patience:?}");
            return Err(error("lock the socket directory")(io::Error::new(
                io::ErrorKind::TimedOut,
                cause,
            )));
        }
        file = held_by_another;
        std::thread::sleep(RETRY);
    }
}

/// Whether anybody listens on a socket, however busy. Does not wait.
fn is_served(path: &Path) -> bool {
    let dialled = || {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
    };
    // EAGAIN: connections that the listener has not accepted fill its queue.
    matches!(dialled(), Ok(()) | Err(Errno::EAGAIN))
}

/// Binds and listens, unless a running shim already does. A socket that nobody
/// listens on is replaced. The caller holds the directory's lock.
///
/// # Errors
/// The system refused to remove, bind or protect the socket.
pub fn claim(path: &Path) -> Result<Claim, Error> {
    let error = |doing| {
        move |source: io::Error| Error::System {
            doing,
            path: path.to_owned(),
            source,
        }
    };
    let listener = match UnixListener::bind(path) {
        Err(failure) if failure.kind() == io::ErrorKind::AddrInUse => {
            if is_served(path) {
                return Ok(Claim::Taken);
            }
            fs::remove_file(path).map_err(error("remove the dead socket"))?;
            UnixListener::bind(path)
        }
        other => other,
    }
    .map_err(error("listen on"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(error("protect"))?;
    Ok(Claim::Ours(listener))
}

/// Removes a socket that a daemon served, but not one that another shim has
/// bound at the same path since: `inode` is that of the one to remove, if it is known.
pub fn release(path: &Path, inode: Option<u64>) {
    let Some(directory) = path.parent() else {
        return;
    };
    let lock = lock_directory(directory, RELEASE_PATIENCE);
    let ours = match (fs::symlink_metadata(path), inode) {
        (Ok(found), Some(inode)) => found.ino() == inode,
        // Without an inode to compare with, only a socket that nobody answers on is ours to remove.
        (Ok(_), None) => !is_served(path),
        (Err(_), _) => false,
    };
    if ours {
        // Gone already is as good as removed.
        let _ = fs::remove_file(path);
    }
    drop(lock);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_fit_whatever_the_names_and_differ() {
        let directory = Path::new("/run/nacre/s");
        let long = "x".repeat(5000);
        let path = socket_path(directory, &long, &long, &long).unwrap();
        assert!(path.as_os_str().len() <= PATH_LIMIT);
        let mut seen = std::collections::HashSet::new();
        for (namespace, group) in [("a", "bc"), ("ab", "c"), ("a", "b"), ("", "abc")] {
            assert!(seen.insert(socket_path(directory, namespace, "/c", group).unwrap()));
        }
        assert_eq!(
            socket_path(directory, "a", "/c", "b").unwrap(),
            socket_path(directory, "a", "/c", "b").unwrap()
        );
    }

    #[test]
    fn long_directories_shorten_the_name_until_they_cannot() {
        let directory = PathBuf::from(format!("/{}", "d".repeat(80)));
        let path = socket_path(&directory, "n", "a", "g").unwrap();
        assert_eq!(path.as_os_str().len(), PATH_LIMIT);
        let directory = PathBuf::from(format!("/{}", "d".repeat(90)));
        let error = socket_path(&directory, "n", "a", "g")
            .unwrap_err()
            .to_string();
        assert!(error.contains("91 bytes"), "{error}");
    }

    #[test]
    fn a_live_socket_is_taken_a_dead_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let lock = lock_directory(directory.path(), Duration::ZERO).unwrap();
        let Claim::Ours(listener) = claim(&path).unwrap() else {
            panic!("fresh socket taken")
        };
        assert!(matches!(claim(&path).unwrap(), Claim::Taken));
        drop(listener);
        let Claim::Ours(_listener) = claim(&path).unwrap() else {
            panic!("dead socket taken")
        };
        drop(lock);
    }

    #[test]
    fn a_listener_that_accepts_nothing_keeps_nobody_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let flags = SockFlag::SOCK_CLOEXEC;
        let silent = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        nix::sys::socket::bind(silent.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&silent, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        // One connection fills a queue of none; a blocking one would wait here for ever.
        let _first = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert!(matches!(claim(&path).unwrap(), Claim::Taken));
        release(&path, None);
        assert!(path.exists());
        drop(silent);
        assert!(matches!(claim(&path).unwrap(), Claim::Ours(_)));
    }

    #[test]
    fn a_lock_that_another_keeps_is_an_error_in_time() {
        let directory = tempfile::tempdir().unwrap();
        let _held = lock_directory(directory.path(), Duration::ZERO).unwrap();
        let error = lock_directory(directory.path(), Duration::from_millis(20)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("lock") && text.contains("20ms"), "{text}");
    }

    #[test]
    fn release_leaves_a_successors_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = UnixListener::bind(&path).unwrap();
        let inode = fs::symlink_metadata(&path).unwrap().ino();
        release(&path, Some(inode + 1));
        assert!(path.exists());
        release(&path, None);
        assert!(path.exists(), "a socket that answers stays");
        release(&path, Some(inode));
        assert!(!path.exists());
        drop(first);
        let dead = UnixListener::bind(&path).unwrap();
        drop(dead);
        release(&path, None);
        assert!(!path.exists());
    }
}
