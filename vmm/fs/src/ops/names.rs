//! Names: looking up, making, linking, moving and removing them.

use std::ffi::CStr;
use std::mem::size_of;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, Dev, FileType, Mode, RenameFlags, StatxFlags, linkat, mkdirat, mknodat,
    readlinkat_raw, renameat_with, statx, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::abi::{self, EntryOut, InHeader, ROOT_ID};
use crate::limits::Caching;
use crate::message::{Args, Out, component, split};
use crate::nodes::{Found, open_child};
use crate::stat::{Stat, stat};
use crate::worker::Worker;

/// Longest text of a symbolic link.
const LINK_MAX: usize = 4095;

impl Worker {
    pub(crate) fn lookup(
        &mut self,
        parent: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let name = args.name()?;
        out.wants(size_of::<EntryOut>())?;
        if parent == ROOT_ID {
            let export = self.core.export(name.to_bytes()).ok_or(Errno::NOENT)?;
            let fd = rustix::io::fcntl_dupfd_cloexec(&export.root, 0)?;
            let now = stat(&fd)?;
            let found = self.core.nodes.look_up(&export, fd, &now, ROOT_ID, &name)?;
            let mut entry = self.entry(&found, &now);
            // The host takes exports away without a word: the name is asked for each time.
            (entry.entry_valid, entry.entry_valid_nsec) = (0, 0);
            return out.put(&entry);
        }
        let parent = self.core.nodes.find(parent)?;
        match self.look_up_child(&parent, &name) {
            Ok(entry) => out.put(&entry),
            Err(Errno::NOENT) if parent.node.export.caching == Caching::Always => {
                // That there is nothing is to be kept, too.
                let (entry_valid, entry_valid_nsec) = Caching::Always.validity();
                out.put(&EntryOut {
                    entry_valid,
                    entry_valid_nsec,
                    ..Default::default()
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Counts a lookup of the entry `name`.
    pub(crate) fn look_up_child(&self, parent: &Found, name: &CStr) -> Result<EntryOut, Errno> {
        if !parent.node.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let fd = open_child(parent.as_fd(), name)?;
        let now = stat(&fd)?;
        let node = &parent.node;
        let found = self
            .core
            .nodes
            .look_up(&node.export, fd, &now, node.id, name)?;
        Ok(self.entry(&found, &now))
    }

    /// What the guest is told of a node that it has looked up.
    pub(crate) fn entry(&self, found: &Found, now: &Stat) -> EntryOut {
        let caching = found.node.export.caching;
        let (entry_valid, entry_valid_nsec) = caching.validity();
        let (attr_valid, attr_valid_nsec) = now.validity(caching);
        EntryOut {
            nodeid: found.node.id,
            generation: 0,
            entry_valid,
            attr_valid,
            entry_valid_nsec,
            attr_valid_nsec,
            attr: self.attr(now),
        }
    }

    /// The attributes with the guest's inode number.
    pub(crate) fn attr(&self, now: &Stat) -> abi::Attr {
        abi::Attr {
            ino: self.core.numbers.number(now.dev, now.attr.ino),
            ..now.attr
        }
    }

    pub(crate) fn mkdir(
        &mut self,
        header: &InHeader,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::MkdirIn = args.get()?;
        let name = args.name()?;
        let parent = self.changeable_directory(header.nodeid)?;
        out.wants(size_of::<EntryOut>())?;
        let mode = Mode::from_raw_mode(request.mode & 0o1777);
        self.credentials
            .creating((header.uid, header.gid), request.umask, || {
                mkdirat(&parent, &name, mode)
            })?;
        out.put(&self.look_up_child(&parent, &name)?)
    }

    pub(crate) fn mknod(
        &mut self,
        header: &InHeader,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::MknodIn = args.get()?;
        let name = args.name()?;
        let parent = self.changeable_directory(header.nodeid)?;
        out.wants(size_of::<EntryOut>())?;
        let kind = match request.mode & libc::S_IFMT {
            0 => FileType::RegularFile,
            mode => FileType::from_raw_mode(mode),
        };
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        }
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        self.credentials
            .creating((header.uid, header.gid), request.umask, || {
                mknodat(&parent, &name, kind, mode, Dev::default())
            })?;
        out.put(&self.look_up_child(&parent, &name)?)
    }

    pub(crate) fn symlink(
        &mut self,
        header: &InHeader,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let bytes = args.rest(256 + LINK_MAX + 1)?;
        let (name, rest) = split(&bytes)?;
        let name = component(name)?;
        let (text, _) = split(rest)?;
        let parent = self.changeable_directory(header.nodeid)?;
        out.wants(size_of::<EntryOut>())?;
        self.credentials.creating((header.uid, header.gid), 0, || {
            symlinkat(text, &parent, &name)
        })?;
        out.put(&self.look_up_child(&parent, &name)?)
    }

    pub(crate) fn readlink(&mut self, node: u64, out: &mut Out<'_>) -> Result<(), Errno> {
        if node == ROOT_ID {
            return Err(Errno::INVAL);
        }
        let found = self.core.nodes.find(node)?;
        if found.node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let mut text = [0; LINK_MAX + 1];
        let len = readlinkat_raw(&found, c"", &mut text[..])?;
        // The guest posts a page, which holds every text.
        let room = usize::try_from(out.room()).unwrap_or(usize::MAX);
        let len = len.min(room).min(LINK_MAX);
        out.bytes(&text[..len])
    }

    pub(crate) fn unlink(
        &mut self,
        parent: u64,
        args: &mut Args<'_>,
        directory: bool,
    ) -> Result<(), Errno> {
        let name = args.name()?;
        let parent = self.changeable_directory(parent)?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        unlinkat(&parent, &name, flags)
    }

    pub(crate) fn link(
        &mut self,
        parent: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let request: abi::LinkIn = args.get()?;
        let name = args.name()?;
        let parent = self.changeable_directory(parent)?;
        let old = self.changeable(request.oldnodeid)?;
        if !Arc::ptr_eq(&old.node.export, &parent.node.export) {
            return Err(Errno::XDEV);
        }
        if old.node.is_directory() {
            return Err(Errno::PERM);
        }
        out.wants(size_of::<EntryOut>())?;
        self.credentials.changing(false, || {
            linkat(&old, c"", &parent, &name, AtFlags::EMPTY_PATH)
        })?;
        out.put(&self.look_up_child(&parent, &name)?)
    }

    pub(crate) fn rename(
        &mut self,
        parent: u64,
        args: &mut Args<'_>,
        with_flags: bool,
    ) -> Result<(), Errno> {
        let (to, flags) = if with_flags {
            let request: abi::Rename2In = args.get()?;
            (request.newdir, RenameFlags::from_bits_retain(request.flags))
        } else {
            let request: abi::RenameIn = args.get()?;
            (request.newdir, RenameFlags::empty())
        };
        // A whiteout is a device node.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (old, new) = args.names()?;
        let from = self.changeable_directory(parent)?;
        let to = self.changeable_directory(to)?;
        if !Arc::ptr_eq(&from.node.export, &to.node.export) {
            return Err(Errno::XDEV);
        }
        renameat_with(&from, &old, &to, &new, flags)?;
        self.renamed(&to, &new);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.renamed(&from, &old);
        }
        Ok(())
    }

    /// Notes the new name of a node, if it is one.
    fn renamed(&self, parent: &Found, name: &CStr) {
        let wanted = StatxFlags::INO | StatxFlags::TYPE | StatxFlags::MNT_ID;
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        if let Ok(now) = statx(parent, name, flags, wanted) {
            let node = &parent.node;
            self.core
                .nodes
                .renamed(&node.export, &Stat::from(&now), node.id, name);
        }
    }
}
