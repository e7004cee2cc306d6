//! What one thread does with a request: judges it, does it, answers it.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nacre_vmm::virtio::queue::Chain;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::abi::{self, InHeader, ROOT_ID, init, opcode};
use crate::credentials::Credentials;
use crate::message::{self, Args, Opened, Out};
use crate::nodes::Found;
use crate::server::Core;

/// Largest read and write, in bytes, and in pages of the guest.
pub(crate) const MAX_TRANSFER: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Requests that the guest's kernel has under way in the background, at most.
const MAX_BACKGROUND: u16 = 64;
/// Forgets of one request, at most; as many as fit into a page and more.
const MAX_FORGETS: u64 = 1 << 16;

/// What the server offers.
const FEATURES: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;
/// What the server cannot do without: umask and set-user-ID are wrong otherwise. Every Linux that has virtio-fs and is
/// kept up has them.
const NEEDED: u64 = init::DONT_MASK | init::ATOMIC_O_TRUNC | init::BIG_WRITES;

/// A thread's means to serve requests.
pub(crate) struct Worker {
    pub core: Arc<Core>,
    pub credentials: Credentials,
}

impl Worker {
    /// For the calling thread.
    pub fn new(core: Arc<Core>) -> Result<Self, Errno> {
        Ok(Self {
            core,
            credentials: Credentials::take()?,
        })
    }

    /// Serves the request in a chain; how many bytes of answer were written.
    pub fn serve(&mut self, chain: Chain<'_>) -> u32 {
        let core = Arc::clone(&self.core);
        let tally = &core.tally;
        let Opened { header, args, out } = match message::open(chain) {
            Ok(parts) => parts,
            Err(message::Malformed) => {
                tally.malformed.fetch_add(1, Ordering::Relaxed);
                return 0;
            }
        };
        tally.requests.fetch_add(1, Ordering::Relaxed);
        if let opcode::FORGET | opcode::BATCH_FORGET = header.opcode {
            // Never answered, not even when it is wrong.
            if args.and_then(|args| self.forget(&header, args)).is_err() {
                tally.malformed.fetch_add(1, Ordering::Relaxed);
            }
            return 0;
        }
        // Without room for an answer it is no use to do anything.
        let Some(mut out) = out else {
            tally.malformed.fetch_add(1, Ordering::Relaxed);
            return 0;
        };
        let result = args.and_then(|mut args| self.dispatch(&header, &mut args, &mut out));
        if let Err(error) = result {
            tally.errors.fetch_add(1, Ordering::Relaxed);
            tracing::trace!(opcode = header.opcode, nodeid = header.nodeid, %error, "refused");
        }
        out.finish(header.unique, result)
    }

    fn dispatch(
        &mut self,
        header: &InHeader,
        args: &mut Args<'_>,
        out: &mut Out<'_>,
    ) -> Result<(), Errno> {
        if header.opcode == opcode::INIT {
            return self.init(args, out);
        }
        if self.core.minor.load(Ordering::SeqCst) == 0 {
            return Err(Errno::IO);
        }
        let node = header.nodeid;
        let result = match header.opcode {
            opcode::LOOKUP => self.lookup(node, args, out),
            opcode::GETATTR => self.getattr(node, args, out),
            opcode::SETATTR => self.setattr(node, args, out),
            opcode::STATX => self.statx(node, args, out),
            opcode::READLINK => self.readlink(node, out),
            opcode::SYMLINK => self.symlink(header, args, out),
            opcode::MKNOD => self.mknod(header, args, out),
            opcode::MKDIR => self.mkdir(header, args, out),
            opcode::UNLINK => self.unlink(node, args, false),
            opcode::RMDIR => self.unlink(node, args, true),
            opcode::RENAME => self.rename(node, args, false),
            opcode::RENAME2 => self.rename(node, args, true),
            opcode::LINK => self.link(node, args, out),
            opcode::OPEN => self.open(node, args, out),
            opcode::CREATE => self.create(header, args, out),
            opcode::TMPFILE => self.tmpfile(header, args, out),
            opcode::READ => self.read(node, args, out),
            opcode::WRITE => self.write(node, args, out),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(node, args),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(node, args),
            opcode::FALLOCATE => self.fallocate(node, args),
            opcode::LSEEK => self.lseek(node, args, out),
            opcode::COPY_FILE_RANGE => self.copy_file_range(node, args, out),
            opcode::OPENDIR => self.opendir(node, args, out),
            opcode::READDIR => self.readdir(node, args, out, false),
            opcode::READDIRPLUS => self.readdir(node, args, out, true),
            opcode::STATFS => self.statfs(node, out),
            opcode::SYNCFS => self.syncfs(node),
            opcode::SETXATTR => self.setxattr(node, args),
            opcode::GETXATTR => self.getxattr(node, args, out),
            opcode::LISTXATTR => self.listxattr(node, args, out),
            opcode::REMOVEXATTR => self.removexattr(node, args),
            opcode::DESTROY => {
                self.core.end_session();
                Ok(())
            }
            // Locks are the guest's own business, and waiting for one would occupy a thread; a request under way
            // cannot be interrupted; FLUSH has nothing to do. Told once, the guest does not ask again.
            _ => return Err(Errno::NOSYS),
        };
        // From a file system of the host it would tell the guest that no file at all can do this.
        result.map_err(|error| match error {
            Errno::NOSYS => Errno::OPNOTSUPP,
            // This process's limit, not that of the guest's program.
            Errno::MFILE => Errno::NFILE,
            error => error,
        })
    }

    fn init(&mut self, args: &mut Args<'_>, out: &mut Out<'_>) -> Result<(), Errno> {
        // The structure has grown, and may grow on: what is missing is zero.
        let mut request = abi::InitIn {
            major: args.get()?,
            minor: args.get()?,
            ..Default::default()
        };
        if request.major > abi::MAJOR {
            // The guest is to begin again with this one.
            return out.put(&abi::InitOut {
                major: abi::MAJOR,
                minor: abi::MINOR,
                ..Default::default()
            });
        }
        request.max_readahead = args.get()?;
        request.flags = args.get()?;
        if u64::from(request.flags) & init::INIT_EXT != 0 {
            request.flags2 = args.get()?;
        }
        let offered = u64::from(request.flags) | u64::from(request.flags2) << 32;
        if request.major < abi::MAJOR
            || request.minor < abi::MINOR_OLDEST
            || offered & NEEDED != NEEDED
        {
            // The guest's mount says so, too; a guest may repeat it as often as it likes.
            tracing::debug!(
                major = request.major,
                minor = request.minor,
                flags = format_args!("{offered:#x}"),
                "the guest's kernel is too old for the file server"
            );
            return Err(Errno::PROTO);
        }
        out.wants(size_of::<abi::InitOut>())?;
        // A session that was not ended ends here.
        self.core.end_session();
        let agreed = FEATURES & offered;
        let minor = request.minor.min(abi::MINOR);
        out.put(&abi::InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR,
            max_readahead: request.max_readahead.min(MAX_TRANSFER),
            flags: agreed as u32,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: MAX_TRANSFER,
            time_gran: 1,
            max_pages: MAX_PAGES,
            map_alignment: 0,
            flags2: (agreed >> 32) as u32,
            unused: [0; 7],
        })?;
        self.core
            .setxattr_ext
            .store(agreed & init::SETXATTR_EXT != 0, Ordering::SeqCst);
        self.core.minor.store(minor, Ordering::SeqCst);
        tracing::debug!(
            minor,
            flags = format_args!("{agreed:#x}"),
            "a guest has mounted"
        );
        Ok(())
    }

    fn forget(&mut self, header: &InHeader, mut args: Args<'_>) -> Result<(), Errno> {
        let nodes = &self.core.nodes;
        if header.opcode == opcode::FORGET {
            let request: abi::ForgetIn = args.get()?;
            nodes.forget(header.nodeid, request.nlookup);
            return Ok(());
        }
        let request: abi::BatchForgetIn = args.get()?;
        let each = size_of::<abi::ForgetOne>() as u64;
        let count = u64::from(request.count);
        if count > MAX_FORGETS || count > args.len() / each {
            return Err(Errno::INVAL);
        }
        for _ in 0..count {
            let one: abi::ForgetOne = args.get()?;
            nodes.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }

    /// Opens the file behind an O_PATH descriptor. The caller has seen that it is a regular file or a directory.
    pub fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let name = fd.as_fd().as_raw_fd().to_string();
        openat(
            &self.core.descriptors,
            name,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// The node, if it is one that the guest may change: the virtual root and what is exported read-only are not.
    pub fn changeable(&self, node: u64) -> Result<Found, Errno> {
        if node == ROOT_ID {
            return Err(Errno::ROFS);
        }
        let found = self.core.nodes.find(node)?;
        if found.node.export.read_only() {
            return Err(Errno::ROFS);
        }
        Ok(found)
    }

    /// The directory, if it is one in which the guest may make and remove entries.
    pub fn changeable_directory(&self, node: u64) -> Result<Found, Errno> {
        let found = self.changeable(node)?;
        if !found.node.is_directory() {
            return Err(Errno::NOTDIR);
        }
        Ok(found)
    }
}

/// A path to the file behind any descriptor, a symbolic link itself included: for calls that take no descriptor, or not
/// one that is O_PATH.
pub(crate) fn path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
