//! A guest's driver for tests: writes requests into guest memory and takes
//! the answers out, one at a time, on the thread that calls it.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use nacre_vmm::virtio::device::Interrupt;
use rustix::fs::{Mode, OFlags};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::{
    BatchForgetIn, CreateIn, EntryOut, ForgetIn, GetattrIn, InHeader, InitIn, InitOut, OpenIn,
    OpenOut, OutHeader, ROOT_ID, ReadIn, ReleaseIn, WriteIn, WriteOut, init, opcode,
};
use crate::device::{Ring, Stop};
use crate::worker::Worker;
use crate::{Access, Caching, FileServer};

/// Two regions that touch, a gap, and a third.
pub(crate) const SEAM: u64 = 0x40_0000;
pub(crate) const GAP: u64 = 0x80_0000;
pub(crate) const ISLAND: u64 = 0x100_0000;
pub(crate) const END: u64 = 0x120_0000;
/// Where requests and the room for answers begin.
pub(crate) const REQUEST: u64 = 0x2_0000;
pub(crate) const ANSWER: u64 = 0x50_0000;
/// Room for an answer that is always enough.
pub(crate) const ROOM: u32 = 0x11_0000;

/// One buffer of a chain: address, length, whether the device writes it.
pub(crate) type Part = (u64, u32, bool);

pub(crate) fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (GAP - SEAM) as usize),
        (GuestAddress(ISLAND), (END - ISLAND) as usize),
    ])
    .expect("guest memory")
}

/// The driver's side of one queue.
pub(crate) struct Lane {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub size: u16,
    next_available: u16,
    next_used: u16,
}

impl Lane {
    pub fn new(index: u64, size: u16) -> Self {
        let base = index * 0x8000;
        Self {
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x5000,
            size,
            next_available: 0,
            next_used: 0,
        }
    }

    pub fn queue(&self, memory: &GuestMemoryMmap) -> Queue {
        let mut queue = Queue::new(self.size).expect("a queue");
        queue.set_desc_table_address(Some(self.descriptors as u32), Some(0));
        queue.set_avail_ring_address(Some(self.available as u32), Some(0));
        queue.set_used_ring_address(Some(self.used as u32), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        assert!(queue.is_valid(memory));
        queue
    }

    /// Links `parts` from descriptor `head` on, and offers the chain.
    pub fn offer(&mut self, memory: &GuestMemoryMmap, head: u16, parts: &[Part]) {
        for (index, &(address, len, writable)) in (head..).zip(parts) {
            let at = GuestAddress(self.descriptors + u64::from(index) * 16);
            let more = usize::from(index - head) + 1 < parts.len();
            let flags = u16::from(more) | u16::from(writable) << 1;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(index + 1).to_le_bytes());
            memory.write_slice(&bytes, at).expect("in guest memory");
        }
        let slot = u64::from(self.next_available % self.size);
        let at = GuestAddress(self.available + 4 + slot * 2);
        memory.write_obj(head, at).expect("in guest memory");
        self.next_available = self.next_available.wrapping_add(1);
        let at = GuestAddress(self.available + 2);
        memory
            .write_obj(self.next_available, at)
            .expect("in guest memory");
    }

    /// Whether the device wants to be told of what was offered since `old` chains (EVENT_IDX).
    #[cfg(test)]
    pub fn wants_kick(&self, memory: &GuestMemoryMmap, old: u16) -> bool {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let at = GuestAddress(self.used + 4 + u64::from(self.size) * 8);
        let event: u16 = memory.read_obj(at).expect("in guest memory");
        let new = self.next_available;
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// How many chains were offered so far.
    #[cfg(test)]
    pub fn offered(&self) -> u16 {
        self.next_available
    }

    /// The next chain that was returned: its head and the bytes written.
    pub fn take_used(&mut self, memory: &GuestMemoryMmap) -> Option<(u32, u32)> {
        let index: u16 = memory
            .read_obj(GuestAddress(self.used + 2))
            .expect("in guest memory");
        if index == self.next_used {
            return None;
        }
        let at = self.used + 4 + u64::from(self.next_used % self.size) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        let read = |at| memory.read_obj(GuestAddress(at)).expect("in guest memory");
        Some((read(at), read(at + 4)))
    }
}

/// A guest of a server, on this thread.
pub(crate) struct Guest {
    pub server: FileServer,
    pub memory: GuestMemoryMmap,
    pub lane: Lane,
    ring: Ring,
    worker: Worker,
    unique: u64,
    /// Who asks.
    pub user: (u32, u32),
    pub umask: u32,
}

impl Guest {
    /// A guest that has not mounted yet.
    pub fn unmounted(server: &FileServer) -> Self {
        let memory = memory();
        let lane = Lane::new(0, 512);
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
        let ring = Ring::new(
            lane.queue(&memory),
            Arc::new(eventfd()),
            GuestMemoryAtomic::new(memory.clone()),
            Interrupt::new(eventfd()),
            Arc::new(Stop::new().expect("an eventfd")),
            1,
        );
        Self {
            server: server.clone(),
            memory,
            lane,
            ring,
            worker: Worker::new(Arc::clone(server.core())).expect("a worker"),
            unique: 100,
            user: (0, 0),
            umask: 0,
        }
    }

    pub fn new(server: &FileServer) -> Self {
        let mut guest = Self::unmounted(server);
        guest.init();
        guest
    }

    /// A server and its guest, that sees `folder` as "x".
    pub fn of(folder: &Path, access: Access, caching: Caching) -> Self {
        let server = server();
        server
            .export_cached("x", opath(folder), access, caching)
            .expect("exported");
        Self::new(&server)
    }

    /// Offers a chain as it is; bytes that the device says to have written.
    pub fn chain(&mut self, parts: &[Part]) -> u32 {
        self.lane.offer(&self.memory, 0, parts);
        assert!(self.ring.turn(&mut self.worker).expect("a sound ring"));
        let (head, len) = self.lane.take_used(&self.memory).expect("returned");
        assert_eq!(head, 0);
        len
    }

    /// Sends bytes as they are.
    pub fn raw(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.memory
            .write_slice(request, GuestAddress(REQUEST))
            .expect("it fits");
        let len = self.chain(&[(REQUEST, request.len() as u32, false), (ANSWER, room, true)]);
        assert!(len <= room);
        let mut answer = vec![0; len as usize];
        self.memory
            .read_slice(&mut answer, GuestAddress(ANSWER))
            .expect("it fits");
        answer
    }

    pub fn header(&mut self, opcode: u32, nodeid: u64, body: usize) -> InHeader {
        self.unique += 2;
        InHeader {
            len: 40 + body as u32,
            opcode,
            unique: self.unique,
            nodeid,
            uid: self.user.0,
            gid: self.user.1,
            ..Default::default()
        }
    }

    /// Sends a request and gives the answer's body, or its error.
    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.ask_with_room(opcode, node, body, ROOM)
    }

    pub fn ask_with_room(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        let header = self.header(opcode, node, body.len());
        let answer = self.raw(&[header.as_bytes(), body].concat(), room);
        let (out, body) = OutHeader::read_from_prefix(&answer).expect("a header");
        assert_eq!(out.unique, header.unique);
        assert_eq!(out.len as usize, answer.len());
        if out.error == 0 {
            Ok(body.to_vec())
        } else {
            assert!((-511..0).contains(&out.error) && body.is_empty());
            Err(-out.error)
        }
    }

    /// As [`ask`](Self::ask), with a structure in front of the names.
    pub fn call<T: IntoBytes + Immutable, R: FromBytes>(
        &mut self,
        opcode: u32,
        node: u64,
        request: &T,
        names: &[u8],
    ) -> Result<R, i32> {
        let body = self.ask(opcode, node, &[request.as_bytes(), names].concat())?;
        Ok(R::read_from_prefix(&body).expect("a whole answer").0)
    }

    pub fn init(&mut self) -> InitOut {
        let flags = init::DONT_MASK
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::SETXATTR_EXT
            | init::INIT_EXT
            | init::HANDLE_KILLPRIV_V2
            | init::DO_READDIRPLUS
            | init::MAX_PAGES
            | init::POSIX_ACL;
        let request = InitIn {
            major: 7,
            minor: 41,
            max_readahead: 1 << 20,
            flags: flags as u32,
            ..Default::default()
        };
        self.call(opcode::INIT, 0, &request, &[]).expect("agreed")
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let name = CString::new(name).expect("no zero");
        let body = self.ask(opcode::LOOKUP, parent, name.as_bytes_with_nul())?;
        Ok(EntryOut::read_from_bytes(&body).expect("an entry"))
    }

    /// Looks up all components of a path from the virtual root on.
    pub fn walk(&mut self, path: &str) -> Result<u64, i32> {
        let mut node = ROOT_ID;
        for name in path.split('/') {
            node = self.lookup(node, name)?.nodeid;
            if node == 0 {
                return Err(libc::ENOENT);
            }
        }
        Ok(node)
    }

    pub fn mode(&mut self, node: u64) -> Result<u32, i32> {
        let out: crate::abi::AttrOut =
            self.call(opcode::GETATTR, node, &GetattrIn::default(), &[])?;
        Ok(out.attr.mode)
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let request = OpenIn {
            flags: flags as u32,
            open_flags: 0,
        };
        let out: OpenOut = self.call(opcode::OPEN, node, &request, &[])?;
        Ok(out.fh)
    }

    pub fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(EntryOut, u64), i32> {
        let request = CreateIn {
            flags: flags as u32,
            mode: libc::S_IFREG | mode,
            umask: self.umask,
            open_flags: 0,
        };
        let name = CString::new(name).expect("no zero");
        let body = [request.as_bytes(), name.as_bytes_with_nul()].concat();
        let body = self.ask(opcode::CREATE, parent, &body)?;
        let (entry, rest) = EntryOut::read_from_prefix(&body).expect("an entry");
        let opened = OpenOut::read_from_bytes(rest).expect("a handle");
        Ok((entry, opened.fh))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let request = ReadIn {
            fh,
            offset,
            size,
            ..Default::default()
        };
        self.ask(opcode::READ, node, request.as_bytes())
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let request = WriteIn {
            fh,
            offset,
            size: data.len() as u32,
            ..Default::default()
        };
        let out: WriteOut = self.call(opcode::WRITE, node, &request, data)?;
        Ok(out.size)
    }

    pub fn release(&mut self, opcode: u32, node: u64, fh: u64) -> Result<(), i32> {
        let request = ReleaseIn {
            fh,
            ..Default::default()
        };
        self.ask(opcode, node, request.as_bytes()).map(|_| ())
    }

    pub fn forget(&mut self, node: u64, nlookup: u64) {
        let header = self.header(opcode::FORGET, node, 8);
        let request = [header.as_bytes(), ForgetIn { nlookup }.as_bytes()].concat();
        assert_eq!(self.raw(&request, 16), [0; 0], "a forget is not answered");
    }

    pub fn batch_forget(&mut self, count: u32, body: &[u8]) {
        let front = BatchForgetIn { count, dummy: 0 };
        let header = self.header(opcode::BATCH_FORGET, 0, 8 + body.len());
        let request = [header.as_bytes(), front.as_bytes(), body].concat();
        assert_eq!(self.raw(&request, 16), [0; 0], "a forget is not answered");
    }
}

/// A server with bounds that go with a test.
pub(crate) fn server() -> FileServer {
    FileServer::new(crate::Limits::for_descriptors(8192)).expect("a server")
}

pub(crate) fn opath(path: &Path) -> OwnedFd {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).expect("opened")
}
