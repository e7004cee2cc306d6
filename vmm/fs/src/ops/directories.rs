//! Directories: opening and reading them.

use std::mem::size_of;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::abi::{self, EntryOut, OpenOut, ROOT_ID};
use crate::directory::{Entry, budget, read};
use crate::message::{Args, Out};
use crate::worker::Worker;

/// Offsets of the virtual root up to its first export: `.` and `..` are 1 and 2.
const DOTS: u64 = 2;

impl Worker {
    pub(crate) fn opendir(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        let _request: abi::OpenIn = args.get()?;
        out.wants(size_of::<OpenOut>())?;
        if node == ROOT_ID {
            // It has no handle: reading it is by offset alone.
            return out.put(&OpenOut::default());
        }
        let found = self.core.nodes.find(node)?;
        if !found.node.is_directory() {
            return Err(Errno::NOTDIR);
        }
        self.core.handles.room()?;
        let mut flags = OFlags::RDONLY | OFlags::DIRECTORY;
        if found.node.export.read_only() {
            flags |= OFlags::NOATIME;
        }
        let file = match self.reopen(&found, flags) {
            Err(Errno::PERM) => self.reopen(&found, flags - OFlags::NOATIME),
            result => result,
        }?;
        let opened = self.opened(file, &found)?;
        out.put(&opened)
    }

    pub(crate) fn readdir(
        &mut self,
        node: u64,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
        plus: bool,
    ) -> Result<(), Errno> {
        let request: abi::ReadIn = args.get()?;
        let mut left = budget(&request, out);
        if node == ROOT_ID {
            return self.read_root(request.offset, &mut left, out, plus);
        }
        let handle = self.core.handles.get(request.fh, node)?;
        let found = self.core.nodes.find(node)?;
        let now = crate::stat::stat(&found)?;
        // An entry with a lookup is some five times as long as the host's.
        let part = if plus { left / 6 } else { left };
        read(&handle, request.offset, part, |entry| {
            let ino = self.core.numbers.number(now.dev, entry.ino);
            let entry = Entry { ino, ..*entry };
            let mut look_up = || {
                if entry.is_dots() {
                    return EntryOut::default();
                }
                // Without a node the guest just takes the name.
                self.look_up_child(&found, entry.name).unwrap_or_default()
            };
            entry.put(out, &mut left, plus.then_some(&mut look_up))
        })
    }

    fn read_root(
        &mut self,
        offset: u64,
        left: &mut u64,
        out: &mut Out<'_>,
        plus: bool,
    ) -> Result<(), Errno> {
        // Nodes are given by lookups only.
        let mut nothing = EntryOut::default;
        for (next, name) in [(1, c"."), (DOTS, c"..")] {
            let dots = Entry {
                ino: ROOT_ID,
                next,
                kind: libc::DT_DIR,
                name,
            };
            if offset < next && !dots.put(out, left, plus.then_some(&mut nothing))? {
                return Ok(());
            }
        }
        for export in self.core.exports_after(offset.saturating_sub(DOTS)) {
            let now = &export.stat;
            let kind = if now.is_directory() {
                libc::DT_DIR
            } else {
                libc::DT_REG
            };
            let entry = Entry {
                ino: self.core.numbers.number(now.dev, now.attr.ino),
                next: export.id + DOTS,
                kind,
                name: &export.name,
            };
            if !entry.put(out, left, plus.then_some(&mut nothing))? {
                return Ok(());
            }
        }
        Ok(())
    }
}
