//! Files: opening, reading, writing, and what else is done by a handle.

use std::mem::size_of;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{
    FallocateFlags, FileType, Mode, OFlags, SeekFrom, fallocate, fdatasync, fsync, openat,
};
use rustix::io::Errno;

use crate::abi::{self, EntryOut, InHeader, OpenOut, ROOT_ID};
use crate::handles::Handle;
use crate::limits::Caching;
use crate::message::{Args, Out};
use crate::nodes::{Found, Node, open_child};
use crate::stat::{Stat, stat};
use crate::sys::{Direction, transfer};
use crate::worker::{MAX_TRANSFER, Worker};

/// Bytes copied by one request from file to file, at most: a thread is not to be busy for long.
const MAX_COPY: u64 = 64 << 20;

/// How the host opens a file for a guest that opens it with `flags`. Appending and direct access are no matter of the
/// host's descriptor: the first is said with each write, and the second would need aligned memory of the guest.
fn host_flags(flags: u32, read_only: bool) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(flags);
    let mut host = match flags & OFlags::RWMODE {
        OFlags::RDONLY => OFlags::RDONLY,
        OFlags::WRONLY => OFlags::WRONLY,
        OFlags::RDWR => OFlags::RDWR,
        _ => return Err(Errno::INVAL),
    };
    host |= flags & (OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC | OFlags::NOATIME);
    if read_only {
        if host.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            return Err(Errno::ROFS);
        }
        host |= OFlags::NOATIME;
    }
    Ok(host | OFlags::NOCTTY)
}

impl Worker {
    pub(crate) fn open(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::OpenIn = args.get()?;
        if node == ROOT_ID {
            return Err(Errno::ISDIR);
        }
        let found = self.core.nodes.find(node)?;
        out.wants(size_of::<OpenOut>())?;
        self.core.handles.room()?;
        let file = self.open_file(&found, request.flags, request.open_flags)?;
        let opened = self.opened(file, &found)?;
        out.put(&opened)
    }

    /// Opens the node's file for the guest, if it is a regular one.
    fn open_file(&mut self, found: &Found, flags: u32, open_flags: u32) -> Result<OwnedFd, Errno> {
        match found.node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            // The guest's kernel opens its own FIFOs, sockets and devices by itself.
            _ => return Err(Errno::NXIO),
        }
        let read_only = found.node.export.read_only();
        let flags = host_flags(flags, read_only)?;
        self.lower_for(open_flags, flags)?;
        match self.reopen(found, flags) {
            // Only the owner may leave the time of access alone.
            Err(Errno::PERM) if flags.contains(OFlags::NOATIME) => {
                self.reopen(found, flags - OFlags::NOATIME)
            }
            result => result,
        }
    }

    fn lower_for(&mut self, open_flags: u32, flags: OFlags) -> Result<(), Errno> {
        let kill = open_flags & abi::OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC);
        self.credentials.changing(kill, || Ok(()))
    }

    /// Gives the guest a handle.
    pub(crate) fn opened(&self, file: OwnedFd, found: &Found) -> Result<OpenOut, Errno> {
        let handle = Handle::new(file.into(), Arc::clone(&found.node));
        let fh = self.core.handles.insert(handle)?;
        Ok(OpenOut {
            fh,
            open_flags: open_flags(&found.node),
            padding: 0,
        })
    }

    pub(crate) fn create(
        &mut self,
        header: &InHeader,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::CreateIn = args.get()?;
        let name = args.name()?;
        let parent = self.changeable_directory(header.nodeid)?;
        out.wants(size_of::<EntryOut>() + size_of::<OpenOut>())?;
        self.core.handles.room()?;
        let flags = host_flags(request.flags, false)?;
        let create = (flags - OFlags::TRUNC)
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let made = self
            .credentials
            .creating((header.uid, header.gid), request.umask, || {
                openat(&parent, &name, create, mode)
            });
        let (file, fd) = match made {
            Ok(file) => {
                let fd = self.reopen(&file, OFlags::PATH)?;
                (Some(file), fd)
            }
            // Someone was faster, or the guest does not know yet that it is there.
            Err(Errno::EXIST) if request.flags & libc::O_EXCL as u32 == 0 => {
                (None, open_child(parent.as_fd(), &name)?)
            }
            Err(error) => return Err(error),
        };
        let now = stat(&fd)?;
        let node = &parent.node;
        let found = self
            .core
            .nodes
            .look_up(&node.export, fd, &now, node.id, &name)?;
        let result = match file {
            Some(file) => Ok((file, now)),
            None => self
                .open_file(&found, request.flags, request.open_flags)
                // Truncated, perhaps.
                .and_then(|file| Ok((file, stat(&found)?))),
        };
        self.answer_create(&found, result, out)
    }

    pub(crate) fn tmpfile(
        &mut self,
        header: &InHeader,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::CreateIn = args.get()?;
        let parent = self.changeable_directory(header.nodeid)?;
        out.wants(size_of::<EntryOut>() + size_of::<OpenOut>())?;
        self.core.handles.room()?;
        let exclusive = OFlags::from_bits_retain(request.flags) & OFlags::EXCL;
        let flags = (host_flags(request.flags, false)? - OFlags::TRUNC)
            | OFlags::TMPFILE
            | OFlags::CLOEXEC
            | exclusive;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let file = self
            .credentials
            .creating((header.uid, header.gid), request.umask, || {
                openat(&parent, c".", flags, mode)
            })?;
        let fd = self.reopen(&file, OFlags::PATH)?;
        let now = stat(&fd)?;
        let node = &parent.node;
        // It has no name to be found by; while it is open it keeps its descriptor.
        let found = self
            .core
            .nodes
            .look_up(&node.export, fd, &now, node.id, c"")?;
        self.answer_create(&found, Ok((file, now)), out)
    }

    /// Tells of a node and its handle; the lookup is taken back if there is no handle.
    fn answer_create(
        &mut self,
        found: &Found,
        file: Result<(OwnedFd, Stat), Errno>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let result = file.and_then(|(file, now)| Ok((self.opened(file, found)?, now)));
        match result {
            Ok((opened, now)) => {
                out.put(&self.entry(found, &now))?;
                out.put(&opened)
            }
            Err(error) => {
                self.core.nodes.forget(found.node.id, 1);
                Err(error)
            }
        }
    }

    pub(crate) fn read(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::ReadIn = args.get()?;
        let handle = self.core.handles.get(request.fh, node)?;
        let size = u64::from(request.size.min(MAX_TRANSFER)).min(out.room());
        let buffers = out.take(size);
        let done = transfer(&handle.file, Direction::Read, &buffers, request.offset)?;
        out.add(done);
        let tally = &self.core.tally;
        tally.read_bytes.fetch_add(done, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn write(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::WriteIn = args.get()?;
        let size = u64::from(request.size);
        if request.size > MAX_TRANSFER || size > args.len() {
            return Err(Errno::INVAL);
        }
        let handle = self.writable(request.fh, node)?;
        out.wants(size_of::<abi::WriteOut>())?;
        let append = request.flags & libc::O_APPEND as u32 != 0
            && request.write_flags & abi::WRITE_CACHE == 0;
        let direction = if append {
            Direction::Append
        } else {
            Direction::Write
        };
        let kill = request.write_flags & abi::WRITE_KILL_SUIDGID != 0;
        let buffers = args.take(size);
        let done = self.credentials.changing(kill, || {
            transfer(&handle.file, direction, &buffers, request.offset)
        })?;
        let tally = &self.core.tally;
        tally.written_bytes.fetch_add(done, Ordering::Relaxed);
        out.put(&abi::WriteOut {
            // No more than was asked for.
            size: done as u32,
            padding: 0,
        })
    }

    /// The handle, if its export may be changed.
    pub(crate) fn writable(&self, fh: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let handle = self.core.handles.get(fh, node)?;
        if handle.node.export.read_only() {
            return Err(Errno::ROFS);
        }
        Ok(handle)
    }

    pub(crate) fn release(&mut self, node: u64, args: &mut Args<'_>) -> Result<(), Errno> {
        let request: abi::ReleaseIn = args.get()?;
        if node == ROOT_ID {
            return Ok(());
        }
        self.core.handles.remove(request.fh, node)
    }

    pub(crate) fn fsync(&mut self, node: u64, args: &mut Args<'_>) -> Result<(), Errno> {
        let request: abi::FsyncIn = args.get()?;
        if node == ROOT_ID {
            return Ok(());
        }
        let handle = self.core.handles.get(request.fh, node)?;
        if handle.node.export.read_only() {
            return Ok(());
        }
        if request.fsync_flags & abi::FSYNC_DATA == 0 {
            fsync(&handle.file)
        } else {
            fdatasync(&handle.file)
        }
    }

    pub(crate) fn fallocate(&mut self, node: u64, args: &mut Args<'_>) -> Result<(), Errno> {
        let request: abi::FallocateIn = args.get()?;
        let handle = self.writable(request.fh, node)?;
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode = FallocateFlags::from_bits_retain(request.mode);
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        // Whether the caller may keep set-user-ID is not said here: then it goes.
        self.credentials.changing(true, || {
            fallocate(&handle.file, mode, request.offset, request.length)
        })
    }

    pub(crate) fn lseek(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::LseekIn = args.get()?;
        let handle = self.core.handles.get(request.fh, node)?;
        // Reads and writes say where; so the descriptor's own position is free for this. A directory's is not.
        if handle.stream.is_some() {
            return Err(Errno::INVAL);
        }
        let whence = match request.whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(request.offset),
            libc::SEEK_HOLE => SeekFrom::Hole(request.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = rustix::fs::seek(&handle.file, whence)?;
        out.put(&abi::LseekOut { offset })
    }

    pub(crate) fn copy_file_range(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::CopyFileRangeIn = args.get()?;
        let from = self.core.handles.get(request.fh_in, node)?;
        let to = self.writable(request.fh_out, request.nodeid_out)?;
        if request.flags != 0 {
            return Err(Errno::INVAL);
        }
        out.wants(size_of::<abi::WriteOut>())?;
        let (mut off_in, mut off_out) = (request.off_in, request.off_out);
        let len = request.len.min(MAX_COPY) as usize;
        let done = self.credentials.changing(true, || {
            rustix::fs::copy_file_range(
                &from.file,
                Some(&mut off_in),
                &to.file,
                Some(&mut off_out),
                len,
            )
        })?;
        out.put(&abi::WriteOut {
            size: done as u32,
            padding: 0,
        })
    }
}

/// What the guest may do with what it has cached of the node.
fn open_flags(node: &Node) -> u32 {
    match (node.export.caching, node.is_directory()) {
        (Caching::Always, false) => abi::FOPEN_KEEP_CACHE,
        (Caching::Always, true) => abi::FOPEN_KEEP_CACHE | abi::FOPEN_CACHE_DIR,
        (Caching::For(_), _) => 0,
    }
}
