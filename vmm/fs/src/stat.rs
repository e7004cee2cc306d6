//! A file's attributes as the host has them and as the guest sees them.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, StatxTimestamp, statx};
use rustix::io::Errno;

use crate::abi;
use crate::limits::Caching;

/// Bits of the guest's inode numbers that hold the host's.
const INO_BITS: u32 = 48;
/// File systems that have a number of their own in the bits above; the last bit marks numbers that are hashes.
const MAX_DEVICES: u64 = 1 << (63 - INO_BITS);

/// What is known about a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stat {
    /// The host's inode number is still in it.
    pub attr: abi::Attr,
    /// Device number, encoded as the kernel does for user space.
    pub dev: u64,
    pub mount: u64,
    /// Time of birth, if the file system knows it.
    pub birth: (i64, u32),
    raw: Raw,
}

/// What only the newer request tells.
#[derive(Debug, Clone, Copy)]
struct Raw {
    mask: u32,
    attributes: u64,
    attributes_mask: u64,
    atime: abi::StatxTime,
    btime: abi::StatxTime,
    ctime: abi::StatxTime,
    mtime: abi::StatxTime,
    rdev: (u32, u32),
}

/// Attributes of the file behind any descriptor.
pub(crate) fn stat(fd: impl AsFd) -> Result<Stat, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    let found = statx(
        fd,
        c"",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        wanted,
    )?;
    Ok(Stat::from(&found))
}

impl Stat {
    pub fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.attr.mode)
    }

    /// How long the guest may believe these attributes. A write may take set-user-ID and set-group-ID away
    /// without a word to the guest's kernel, which would go on to run the file with them; so it asks each time.
    pub fn validity(&self, caching: Caching) -> (u64, u32) {
        let special = self.attr.mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        if special && self.file_type() == FileType::RegularFile {
            return (0, 0);
        }
        caching.validity()
    }

    pub fn is_directory(&self) -> bool {
        self.file_type() == FileType::Directory
    }

    /// For the newer request, with the guest's inode number.
    pub fn statx(&self, ino: u64) -> abi::Statx {
        let (attr, raw) = (&self.attr, &self.raw);
        abi::Statx {
            mask: raw.mask & (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits(),
            blksize: attr.blksize,
            attributes: raw.attributes,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            mode: attr.mode as u16,
            ino,
            size: attr.size,
            blocks: attr.blocks,
            attributes_mask: raw.attributes_mask,
            atime: raw.atime,
            btime: raw.btime,
            ctime: raw.ctime,
            mtime: raw.mtime,
            rdev_major: raw.rdev.0,
            rdev_minor: raw.rdev.1,
            ..Default::default()
        }
    }
}

/// A device number in the 32 bits that the kernel itself uses between file systems and programs.
fn encode(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

impl From<&Statx> for Stat {
    fn from(found: &Statx) -> Self {
        let time = |time: &StatxTimestamp| abi::StatxTime {
            sec: time.tv_sec,
            nsec: time.tv_nsec,
            reserved: 0,
        };
        let birth = if found.stx_mask & StatxFlags::BTIME.bits() == 0 {
            (0, 0)
        } else {
            (found.stx_btime.tv_sec, found.stx_btime.tv_nsec)
        };
        Self {
            attr: abi::Attr {
                ino: found.stx_ino,
                size: found.stx_size,
                blocks: found.stx_blocks,
                atime: found.stx_atime.tv_sec.cast_unsigned(),
                mtime: found.stx_mtime.tv_sec.cast_unsigned(),
                ctime: found.stx_ctime.tv_sec.cast_unsigned(),
                atimensec: found.stx_atime.tv_nsec,
                mtimensec: found.stx_mtime.tv_nsec,
                ctimensec: found.stx_ctime.tv_nsec,
                mode: found.stx_mode.into(),
                nlink: found.stx_nlink,
                uid: found.stx_uid,
                gid: found.stx_gid,
                rdev: encode(found.stx_rdev_major, found.stx_rdev_minor),
                blksize: found.stx_blksize,
                flags: 0,
            },
            dev: u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor),
            mount: found.stx_mnt_id,
            birth,
            raw: Raw {
                mask: found.stx_mask,
                // Mount roots, DAX and what else belongs to the host's mounts is not the guest's.
                attributes: found.stx_attributes.bits() & ATTRIBUTES,
                attributes_mask: found.stx_attributes_mask.bits() & ATTRIBUTES,
                atime: time(&found.stx_atime),
                btime: time(&found.stx_btime),
                ctime: time(&found.stx_ctime),
                mtime: time(&found.stx_mtime),
                rdev: (found.stx_rdev_major, found.stx_rdev_minor),
            },
        }
    }
}

/// compressed, immutable, append, nodump, encrypted.
const ATTRIBUTES: u64 = 0x4 | 0x10 | 0x20 | 0x40 | 0x800;

/// Makes one space of inode numbers from those of several file systems: the guest sees all exports as one.
#[derive(Debug, Default)]
pub(crate) struct InodeNumbers {
    devices: Mutex<HashMap<u64, u64>>,
}

impl InodeNumbers {
    /// The guest's number for the host's. The same file has the same number as long as the server lives. Numbers that do not fit
    /// are hashed: two files of such a file system have the same one with a probability of 1 in 2^63.
    pub fn number(&self, dev: u64, ino: u64) -> u64 {
        if ino >> INO_BITS == 0 && ino > 1 {
            let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
            let next = devices.len() as u64;
            let tag = match devices.get(&dev) {
                Some(tag) => Some(*tag),
                None if next < MAX_DEVICES => {
                    devices.insert(dev, next);
                    Some(next)
                }
                None => None,
            };
            if let Some(tag) = tag {
                return tag << INO_BITS | ino;
            }
        }
        let mut hasher = std::hash::DefaultHasher::new();
        (dev, ino).hash(&mut hasher);
        1 << 63 | hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_different_file_systems_do_not_meet() {
        let numbers = InodeNumbers::default();
        let all = [
            numbers.number(1, 7),
            numbers.number(2, 7),
            numbers.number(1, 1),
            numbers.number(1, 1 << 60),
            numbers.number(2, 1 << 60),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(*one > 1 && !all[..i].contains(one), "{all:x?}");
        }
        assert_eq!(numbers.number(2, 7), all[1]);
        assert_eq!(numbers.number(1, 1 << 60), all[3]);
    }

    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        assert_eq!(encode(8, 1), 0x801);
        assert_eq!(encode(0x123, 0x4_5678), 0x4561_2378);
    }
}
