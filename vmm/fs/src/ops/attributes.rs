//! Attributes of nodes, and of the file systems that they are on.

use std::mem::size_of;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    chmodat, chownat, fstatvfs, ftruncate, syncfs, utimensat,
};
use rustix::io::Errno;

use crate::abi::{self, AttrOut, ROOT_ID, fattr};
use crate::limits::Caching;
use crate::message::{Args, Out};
use crate::nodes::Found;
use crate::stat::{Stat, stat};
use crate::worker::{Worker, path};

const NANOSECONDS: u32 = 1_000_000_000;

impl Worker {
    pub(crate) fn getattr(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::GetattrIn = args.get()?;
        if node == ROOT_ID {
            return out.put(&AttrOut {
                attr: self.root_attr(),
                ..Default::default()
            });
        }
        let fh = (request.getattr_flags & abi::GETATTR_FH != 0).then_some(request.fh);
        let (now, caching) = self.now(node, fh)?;
        out.put(&self.attr_out(&now, caching))
    }

    pub(crate) fn statx(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::StatxIn = args.get()?;
        if node == ROOT_ID {
            let attr = self.root_attr();
            return out.put(&abi::StatxOut {
                stat: abi::Statx {
                    mask: rustix::fs::StatxFlags::BASIC_STATS.bits(),
                    blksize: attr.blksize,
                    nlink: attr.nlink,
                    mode: attr.mode as u16,
                    ino: attr.ino,
                    ..Default::default()
                },
                ..Default::default()
            });
        }
        let fh = (request.getattr_flags & abi::GETATTR_FH != 0).then_some(request.fh);
        let (now, caching) = self.now(node, fh)?;
        let (attr_valid, attr_valid_nsec) = now.validity(caching);
        out.put(&abi::StatxOut {
            attr_valid,
            attr_valid_nsec,
            stat: now.statx(self.attr(&now).ino),
            ..Default::default()
        })
    }

    /// Attributes of a node, by its handle if there is one.
    fn now(&self, node: u64, fh: Option<u64>) -> Result<(Stat, Caching), Errno> {
        if let Some(handle) = fh.and_then(|fh| self.core.handles.get(fh, node).ok()) {
            return Ok((stat(&handle.file)?, handle.node.export.caching));
        }
        let found = self.core.nodes.find(node)?;
        Ok((stat(&found)?, found.node.export.caching))
    }

    fn attr_out(&self, now: &Stat, caching: Caching) -> AttrOut {
        let (attr_valid, attr_valid_nsec) = now.validity(caching);
        AttrOut {
            attr_valid,
            attr_valid_nsec,
            dummy: 0,
            attr: self.attr(now),
        }
    }

    /// The virtual directory of the exports.
    fn root_attr(&self) -> abi::Attr {
        let born = self.core.born;
        abi::Attr {
            ino: ROOT_ID,
            mode: libc::S_IFDIR | 0o555,
            nlink: 2,
            blksize: 4096,
            atime: born.as_secs(),
            mtime: born.as_secs(),
            ctime: born.as_secs(),
            ..Default::default()
        }
    }

    pub(crate) fn setattr(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::SetattrIn = args.get()?;
        let found = self.changeable(node)?;
        out.wants(size_of::<AttrOut>())?;
        let times = times(&request)?;
        let has = |bits| request.valid & bits != 0;
        // The owner first: changing it takes away bits of the mode.
        if has(fattr::UID | fattr::GID) {
            let id = |bit, id: u32| match (has(bit), id) {
                (false, _) => Ok(None),
                (true, u32::MAX) => Err(Errno::INVAL),
                (true, id) => Ok(Some(id)),
            };
            let owner = id(fattr::UID, request.uid)?.map(Uid::from_raw);
            let group = id(fattr::GID, request.gid)?.map(Gid::from_raw);
            chownat(&found, c"", owner, group, AtFlags::EMPTY_PATH)?;
        }
        if has(fattr::MODE) {
            self.chmod(&found, request.mode)?;
        }
        if has(fattr::SIZE) {
            self.truncate(&found, &request)?;
        }
        if let Some(times) = times {
            utimensat(&found, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let now = stat(&found)?;
        out.put(&self.attr_out(&now, found.node.export.caching))
    }

    fn chmod(&mut self, found: &Found, mode: u32) -> Result<(), Errno> {
        if found.node.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        self.credentials.changing(false, || Ok(()))?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        chmodat(CWD, path(found), mode, AtFlags::empty())
    }

    fn truncate(&mut self, found: &Found, request: &abi::SetattrIn) -> Result<(), Errno> {
        match found.node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        let kill = request.valid & fattr::KILL_SUIDGID != 0;
        if request.valid & fattr::FH != 0
            && let Ok(handle) = self.core.handles.get(request.fh, found.node.id)
        {
            let done = self
                .credentials
                .changing(kill, || ftruncate(&handle.file, request.size));
            // A handle for reading is no reason to fail: by its name the file may be truncated.
            if !matches!(done, Err(Errno::INVAL | Errno::BADF)) {
                return done;
            }
        }
        let file = self.reopen(found, OFlags::WRONLY)?;
        self.credentials
            .changing(kill, || ftruncate(&file, request.size))
    }

    pub(crate) fn statfs(&mut self, node: u64, out: &mut Out<'_>) -> Result<(), Errno> {
        if node == ROOT_ID {
            return out.put(&abi::StatfsOut {
                bsize: 4096,
                frsize: 4096,
                namelen: 255,
                ..Default::default()
            });
        }
        let found = self.core.nodes.find(node)?;
        let now = fstatvfs(&found)?;
        out.put(&abi::StatfsOut {
            blocks: now.f_blocks,
            bfree: now.f_bfree,
            bavail: now.f_bavail,
            files: now.f_files,
            ffree: now.f_ffree,
            bsize: u32::try_from(now.f_bsize).unwrap_or(4096),
            namelen: u32::try_from(now.f_namemax).unwrap_or(255).min(255),
            frsize: u32::try_from(now.f_frsize).unwrap_or(4096),
            ..Default::default()
        })
    }

    /// Writes back the file systems of what the guest may write.
    pub(crate) fn syncfs(&mut self, node: u64) -> Result<(), Errno> {
        let all = self.core.exports_after(0);
        let of = match node {
            ROOT_ID => None,
            node => Some(self.core.nodes.find(node)?.node.export.id),
        };
        for export in all {
            if export.read_only() || of.is_some_and(|of| of != export.id) {
                continue;
            }
            let file = self.reopen(&export.root, OFlags::RDONLY)?;
            syncfs(file)?;
        }
        Ok(())
    }
}

/// The times to be set, if any.
fn times(request: &abi::SetattrIn) -> Result<Option<Timestamps>, Errno> {
    let time = |set, now, seconds: u64, nanoseconds: u32| {
        let tv_nsec = if request.valid & now != 0 {
            UTIME_NOW
        } else if request.valid & set == 0 {
            UTIME_OMIT
        } else if nanoseconds < NANOSECONDS {
            nanoseconds.into()
        } else {
            return Err(Errno::INVAL);
        };
        Ok(Timespec {
            tv_sec: seconds.cast_signed(),
            tv_nsec,
        })
    };
    let times = Timestamps {
        last_access: time(
            fattr::ATIME,
            fattr::ATIME_NOW,
            request.atime,
            request.atimensec,
        )?,
        last_modification: time(
            fattr::MTIME,
            fattr::MTIME_NOW,
            request.mtime,
            request.mtimensec,
        )?,
    };
    let any = fattr::ATIME | fattr::MTIME | fattr::ATIME_NOW | fattr::MTIME_NOW;
    Ok((request.valid & any != 0).then_some(times))
}
