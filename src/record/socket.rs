//! Sockets that a dead process has left, told from those of the living.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// Removes a Unix socket that nobody listens on. One that somebody does is another's who has its name by now, and stays, as does
/// a file of another kind. True if there was something.
pub(super) fn free(path: &Path) -> io::Result<bool> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() || listened(path)? {
        return Ok(false);
    }
    std::fs::remove_file(path)?;
    Ok(true)
}

/// Whether somebody listens on a Unix socket. Does not wait.
///
/// # Errors
/// It is not there, or this process may not connect to it.
pub(crate) fn listened(path: &Path) -> io::Result<bool> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Through the folder, since the whole path may be too long for an address.
    let folder = File::open(parent)?;
    let address = Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join(name);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(client.as_raw_fd(), &UnixAddr::new(&address)?) {
        // EAGAIN: somebody, with more to do than there is room for.
        Ok(()) | Err(nix::Error::EAGAIN) => Ok(true),
        Err(nix::Error::ECONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_goes_when_nobody_listens_and_other_files_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let absent = free(&path).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        assert!(listened(&path).unwrap());
        assert!(!free(&path).unwrap() && path.exists());
        drop(listener);
        assert!(!listened(&path).unwrap());
        assert!(free(&path).unwrap() && !path.exists());
        std::fs::write(&path, "x").unwrap();
        assert!(!free(&path).unwrap() && path.exists());
    }

    #[test]
    fn a_socket_below_a_long_path_is_told_too() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("x".repeat(200));
        std::fs::create_dir(&folder).unwrap();
        let short = root.path().join("s");
        let listener = UnixListener::bind(&short).unwrap();
        std::fs::rename(&short, folder.join("s")).unwrap();
        assert!(listened(&folder.join("s")).unwrap());
        drop(listener);
        assert!(free(&folder.join("s")).unwrap());
    }
}
