//! Loop devices: block devices of files, for what the host mounts. Each goes by itself when it is not mounted any more.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Error;

/// Others may take a free device first.
const TRIES: usize = 64;

const LOOP_CTL_GET_FREE: u32 = 0x4c82;
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

nix::ioctl_none_bad!(get_free, LOOP_CTL_GET_FREE);
nix::ioctl_write_ptr_bad!(configure, LOOP_CONFIGURE, Config);

/// `struct loop_config`, with `struct loop_info64` in it.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    /// Device, inode, rdevice, offset, size limit.
    begin: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    names: [u8; 64 + 64 + 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// A block device of a file, or the file itself if it is one. It is there as long as this is open, or it is mounted.
#[derive(Debug)]
pub(super) struct Device {
    path: PathBuf,
    _open: Option<File>,
}

impl Device {
    /// Of the file at `path`.
    ///
    /// # Errors
    /// What the system refused, with the path.
    pub fn of(path: &Path, read_only: bool) -> Result<Self, Error> {
        let failed = |doing: &str| {
            let (doing, path) = (doing.to_owned(), path.to_owned());
            move |source| Error::System {
                doing,
                path,
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(failed("open the disk"))?;
        let kind = file
            .metadata()
            .map_err(failed("look at the disk"))?
            .file_type();
        if kind.is_block_device() {
            return Ok(Self {
                path: path.to_owned(),
                _open: None,
            });
        }
        if !kind.is_file() {
            let source = io::Error::other("it is neither a file nor a block device");
            return Err(failed("mount the disk")(source));
        }
        let flags = match read_only {
            true => LO_FLAGS_AUTOCLEAR | LO_FLAGS_READ_ONLY,
            false => LO_FLAGS_AUTOCLEAR,
        };
        attach(file.as_raw_fd(), flags, !read_only).map_err(failed("make a loop device of"))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn attach(file: RawFd, flags: u32, write: bool) -> io::Result<Device> {
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    let config = Config {
        fd: file.cast_unsigned(),
        block_size: 0,
        begin: [0; 5],
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags,
        names: [0; 160],
        init: [0; 2],
        reserved: [0; 8],
    };
    for _ in 0..TRIES {
        // SAFETY: the request takes no argument, and the descriptor is open.
        let number = unsafe { get_free(control.as_raw_fd()) }?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(write).open(&path)?;
        // SAFETY: `config` has the layout of `loop_config`, which the kernel only reads; both descriptors are open.
        match unsafe { configure(device.as_raw_fd(), &raw const config) } {
            Ok(_) => {
                return Ok(Device {
                    path,
                    _open: Some(device),
                });
            }
            Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other("others took each free device first"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_as_large_as_the_kernels() {
        assert_eq!(size_of::<Config>(), 304);
    }

    #[test]
    fn what_is_no_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        for (path, why) in [
            (missing.as_path(), "No such file"),
            (folder.path(), "neither"),
        ] {
            let error = Device::of(path, true).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
            assert!(error.contains(why), "{error}");
        }
    }
}
