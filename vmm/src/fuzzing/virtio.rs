//! A hostile driver: any access to a window's registers, any bytes in guest
//! memory, and shortcuts past what only delays it (the order of
//! initialization, the place of rings), for each device behind the transport.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use event_manager::{EventOps, Events, MutEventSubscriber};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use crate::config::{DiskConfig, DiskIo};
use crate::event_loop::{EventLoop, EventLoopHandle};
use crate::memory::GuestMemory;
use crate::memory::stand_in::StandIn;
use crate::virtio::balloon::{Balloon, BalloonHost, PAGE_BYTES};
use crate::virtio::block::Block;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mem::{BLOCK_BYTES, Mem, MemConfig, MemHost, SLOT_UNIT};
use crate::virtio::mmio::{State, WINDOW_SIZE, Window};
use crate::virtio::net::{FRAME_BYTES, Net, NetConfig, NetHost, Tap};
use crate::virtio::registers::RegisterPage;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{GUEST_CID, Vsock, VsockHost, VsockListener, VsockStream};

/// Two regions that touch, a gap, and a third.
const REGIONS: [(u64, u64); 3] = [(0, 0x4_0000), (0x4_0000, 0x4_0000), (0x10_0000, 0x4_0000)];
/// Where the memory device plugs.
const PLUGGABLE: MemConfig = MemConfig {
    base: 1 << 32,
    region_bytes: 12 * SLOT_UNIT,
    slot_bytes: SLOT_UNIT,
};
/// Descriptors, available and used ring of queue `n` are this far apart, from [`RINGS`].
const RINGS: u64 = 0x1000;
const RING_STRIDE: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1800;
const QUEUE_SIZE: u16 = 16;
/// Accesses of one input.
const STEPS: usize = 512;

// Registers (virtio 1.3 section 4.2.2).
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_AVAIL: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;

/// The loop that serves all inputs' devices, and what panicked on it.
struct Loop {
    handle: EventLoopHandle,
    failures: Arc<Mutex<Vec<String>>>,
    _thread: EventLoop,
}

fn event_loop() -> &'static Loop {
    static LOOP: OnceLock<Loop> = OnceLock::new();
    LOOP.get_or_init(|| {
        let failures = Arc::<Mutex<Vec<String>>>::default();
        let heard = Arc::clone(&failures);
        let (thread, handle) = EventLoop::start("fuzz-loop", move |message| {
            heard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(message);
        })
        .expect("an event loop");
        Loop {
            handle,
            failures,
            _thread: thread,
        }
    })
}

/// Runs nothing: when it has been added and removed, the loop has seen all kicks before it.
struct Barrier;

impl MutEventSubscriber for Barrier {
    fn init(&mut self, _: &mut EventOps<'_>) {}
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
}

struct Driver {
    memory: GuestMemoryMmap,
    window: Window,
    queues: u16,
    available: Vec<u16>,
    host: Host,
}

/// The host's end of a device.
enum Host {
    Silent,
    Socket(Socket),
    Mem { host: MemHost, check: Check },
    Balloon(BalloonHost),
    Net { host: NetHost, wire: UnixDatagram },
}

/// Panics if the memory device's state does not agree with itself.
type Check = Box<dyn Fn()>;

struct Socket {
    host: VsockHost,
    listener: Option<VsockListener>,
    streams: Vec<VsockStream>,
}

/// A device of its kind with its host.
type Made = (Box<dyn VirtioDevice>, Host);

/// One of the devices that bring bytes from or to somewhere, by the first byte.
pub(super) fn run(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    drive(data, |_| {
        let events = event_loop().handle.clone();
        match kind % 4 {
            0 => (Box::new(Rng::new(events)), Host::Silent),
            1 => {
                let (device, host) = Vsock::new(GUEST_CID, events).expect("an eventfd");
                let socket = Socket {
                    listener: host.listen(1024).ok(),
                    host,
                    streams: Vec::new(),
                };
                (Box::new(device), Host::Socket(socket))
            }
            access => (Box::new(disk(access == 2, kind / 4, events)), Host::Silent),
        }
    });
}

/// The memory device, which is to have at least a part of its region plugged.
pub(super) fn mem(data: &[u8]) {
    drive(data, |memory| {
        let events = event_loop().handle.clone();
        let memory = Arc::clone(memory);
        let (device, host) = Mem::new(PLUGGABLE, memory, events).expect("a configuration");
        host.set_requested(PLUGGABLE.region_bytes / 2)
            .expect("whole blocks");
        let check = Box::new(device.checker());
        (Box::new(device), Host::Mem { host, check })
    });
}

/// The balloon.
pub(super) fn balloon(data: &[u8]) {
    drive(data, |memory| {
        let events = event_loop().handle.clone();
        let made = Balloon::new(Arc::clone(memory), events);
        let (device, host) = made.expect("an eventfd");
        (Box::new(device), Host::Balloon(host))
    });
}

/// A network device on a socket.
pub(super) fn net(data: &[u8]) {
    drive(data, |_| {
        let events = event_loop().handle.clone();
        let (wire, end) = UnixDatagram::pair().expect("sockets");
        for end in [&wire, &end] {
            end.set_nonblocking(true).expect("set");
        }
        let config = NetConfig {
            name: "fuzz".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: Some(1500),
            link: true,
        };
        let made = Net::new(config, Tap::of_frames(end.into()), events);
        let (device, host) = made.expect("a configuration");
        (Box::new(device), Host::Net { host, wire })
    });
}

/// Drives the device that `make` makes by all of the input.
fn drive(data: &[u8], make: impl FnOnce(&Arc<GuestMemory>) -> Made) {
    let mut input = Unstructured::new(data);
    let (guest, _kvm) = StandIn::memory(&REGIONS);
    let boot = guest.size();
    let mut window =
        Window::new(guest.ram(), RegisterPage::alone().expect("a page")).expect("an eventfd");
    let (device, host) = make(&guest);
    let queues = device.queue_sizes().len() as u16;
    window.plug(device).expect("a spare window");
    let mut driver = Driver {
        memory: (*guest.ram().memory()).clone(),
        window,
        queues,
        available: vec![0; usize::from(queues)],
        host,
    };
    for _ in 0..STEPS {
        if input.is_empty() || driver.step(&mut input).is_err() {
            break;
        }
        driver.host.check(&guest, boot);
    }
    let Driver {
        mut window, host, ..
    } = driver;
    drop(window.unplug());
    assert_eq!(window.state(), None);
    host.check(&guest, boot);
    if let Host::Socket(Socket {
        host,
        listener,
        streams,
    }) = host
    {
        drop((listener, streams));
        assert_eq!(host.connections(), 0, "connections outlive the device");
    }
    let failures = &event_loop().failures;
    let failures = std::mem::take(&mut *failures.lock().unwrap_or_else(PoisonError::into_inner));
    assert!(failures.is_empty(), "a device failed: {failures:?}");
}

impl Host {
    /// What holds at all times.
    fn check(&self, guest: &GuestMemory, boot: u64) {
        match self {
            Self::Silent | Self::Socket(_) | Self::Net { .. } => {}
            Self::Mem { host, check } => {
                check();
                assert_eq!(host.status().failures, 0, "the host can do all of this");
            }
            Self::Balloon(host) => {
                let stats = host.stats();
                assert_eq!(guest.size(), boot, "a balloon removes no memory");
                assert!(stats.actual_bytes <= boot && stats.target_bytes <= boot);
            }
        }
    }
}

/// A device over an image of 64 KiB, or over two halves of it as parts, that is gone with it;
/// `choice` says which, and the way of its I/O.
fn disk(writable: bool, choice: u8, events: EventLoopHandle) -> Block {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = |part| {
        let name = format!("nacre-fuzz-{}-{count}-{part}.img", std::process::id());
        std::env::temp_dir().join(name)
    };
    let paths: Vec<PathBuf> = (0..1 + choice % 2).map(path).collect();
    for path in &paths {
        let made = std::fs::File::create(path)
            .and_then(|file| file.set_len((64 << 10) / paths.len() as u64));
        made.expect("an image");
    }
    let mut config = match &paths[..] {
        [path] => DiskConfig::file(path, !writable, "fuzz"),
        paths => DiskConfig::parts(paths, !writable, "fuzz"),
    };
    if choice & 2 != 0 {
        config.io = DiskIo::Threads;
    }
    let device = Block::new(&config, events);
    for path in &paths {
        std::fs::remove_file(path).expect("the image's name is ours");
    }
    device.expect("a block device")
}

impl Driver {
    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.arbitrary::<u8>()? % 16 {
            0 => {
                let mut data = [0; 8];
                let len = usize::from(input.arbitrary::<u8>()? % 9);
                let offset = u64::from(input.arbitrary::<u16>()?) % (WINDOW_SIZE + 16);
                self.window.read(offset, &mut data[..len]);
            }
            1 => {
                let len = usize::from(input.arbitrary::<u8>()? % 9);
                let offset = u64::from(input.arbitrary::<u16>()?) % (WINDOW_SIZE + 16);
                let data = input.bytes(len)?;
                self.window.write(offset, data);
            }
            2 => {
                let register = u64::from(input.arbitrary::<u8>()?) & !3;
                self.register(register, input.arbitrary()?);
            }
            3 => {
                let address = place(input)?;
                let len = usize::from(input.arbitrary::<u8>()?);
                let bytes = input.bytes(len.min(input.len()))?;
                let _ = self.memory.write_slice(bytes, GuestAddress(address));
            }
            4 | 5 => self.bring_up(input)?,
            6..=8 => {
                let queue = self.queue(input)?;
                let index = u64::from(input.arbitrary::<u8>()? % QUEUE_SIZE as u8);
                let address = place(input)?;
                let len = match input.arbitrary::<u8>()? {
                    wide @ 0..32 => u32::from(wide) << 27,
                    _ => u32::from(input.arbitrary::<u16>()?),
                };
                let flags = u16::from(input.arbitrary::<u8>()? % 9);
                let next = u16::from(input.arbitrary::<u8>()?) % (QUEUE_SIZE + 1);
                let at = ring(queue) + index * 16;
                self.put(at, address);
                self.put(at + 8, len);
                self.put(at + 12, flags);
                self.put(at + 14, next);
            }
            9 | 10 => {
                let queue = self.queue(input)?;
                let head = u16::from(input.arbitrary::<u8>()?) % (QUEUE_SIZE + 1);
                let next = &mut self.available[usize::from(queue)];
                let slot = ring(queue) + AVAILABLE + 4 + u64::from(*next % QUEUE_SIZE) * 2;
                *next = next.wrapping_add(1);
                let next = *next;
                self.put(slot, head);
                self.put(ring(queue) + AVAILABLE + 2, next);
            }
            11 => {
                let queue = self.queue(input)?;
                let index = input.arbitrary::<u16>()?;
                self.available[usize::from(queue)] = index;
                self.put(ring(queue) + AVAILABLE + 2, index);
            }
            12 | 13 => {
                let queue = self.queue(input)?;
                self.register(QUEUE_NOTIFY, queue.into());
                settle();
            }
            14 => self.request(input)?,
            _ => self.host(input)?,
        }
        Ok(())
    }

    fn queue(&self, input: &mut Unstructured<'_>) -> Result<u16> {
        Ok(u16::from(input.arbitrary::<u8>()?) % self.queues)
    }

    fn register(&mut self, register: u64, value: u32) {
        self.window.write(register, &value.to_le_bytes());
        if let Some(State::Running) = self.window.state() {
            let mut status = [0; 4];
            self.window.read(STATUS, &mut status);
            assert_ne!(
                u32::from_le_bytes(status) & 4,
                0,
                "running without DRIVER_OK"
            );
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory
            .write_obj(value, GuestAddress(address))
            .expect("rings are in guest memory");
    }

    /// The driver's part of the initialization, with the features of the input's choice.
    fn bring_up(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let features: u8 = input.arbitrary()?;
        for status in [0, 1, 3] {
            self.register(STATUS, status);
        }
        self.register(DRIVER_FEATURES_SEL, 1);
        self.register(DRIVER_FEATURES, 1);
        self.register(DRIVER_FEATURES_SEL, 0);
        // EVENT_IDX and INDIRECT_DESC; then FLUSH, DISCARD and WRITE_ZEROES, or what the device has.
        let own = u32::from(features >> 2);
        let own = match self.host {
            Host::Silent | Host::Socket(_) => (own & 1) << 9 | (own >> 1 & 3) << 13,
            Host::Mem { .. } => (own & 1) << 1,
            Host::Balloon(_) => own & 7 | (own & 8) << 2,
            // Checksums and segments made by the guest, and mergeable buffers.
            Host::Net { .. } => (own & 1) << 1 | (own & 2) << 6 | (own & 4) << 13,
        };
        let bits = u32::from(features & 3) << 28 | own;
        self.register(DRIVER_FEATURES, bits);
        self.register(STATUS, 11);
        for queue in 0..self.queues {
            self.register(QUEUE_SEL, queue.into());
            self.register(QUEUE_NUM, QUEUE_SIZE.into());
            for (register, address) in [
                (QUEUE_DESC, ring(queue)),
                (QUEUE_AVAIL, ring(queue) + AVAILABLE),
                (QUEUE_USED, ring(queue) + USED),
            ] {
                self.register(register, address as u32);
            }
            self.register(QUEUE_READY, 1);
            self.available[usize::from(queue)] = 0;
            self.put(ring(queue) + AVAILABLE, 0_u32);
            self.put(ring(queue) + USED, 0_u32);
        }
        self.register(STATUS, 15);
        Ok(())
    }

    /// A chain as a well-meaning driver makes it: a header, a buffer either way, a status; offered and kicked.
    fn request(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let queue = self.queue(input)?;
        let header_len = u32::from(input.arbitrary::<u8>()? % 64);
        let header = input.bytes((header_len as usize).min(input.len()))?;
        let address = 0x3_ffe0_u64;
        let _ = self.memory.write_slice(header, GuestAddress(address));
        let room = u32::from(input.arbitrary::<u16>()?);
        let device_writes = input.arbitrary::<bool>()?;
        let write = u16::from(device_writes) * 2;
        let parts = [
            (address, header_len, 1_u16),
            (0x1_0000, room, 1 | write),
            (0x10_0000, 1, 2),
        ];
        for (index, (address, len, flags)) in parts.into_iter().enumerate() {
            let at = ring(queue) + index as u64 * 16;
            self.put(at, address);
            self.put(at + 8, len);
            self.put(at + 12, flags);
            self.put(at + 14, index as u16 + 1);
        }
        let next = &mut self.available[usize::from(queue)];
        let slot = ring(queue) + AVAILABLE + 4 + u64::from(*next % QUEUE_SIZE) * 2;
        *next = next.wrapping_add(1);
        let next = *next;
        self.put(slot, 0_u16);
        self.put(ring(queue) + AVAILABLE + 2, next);
        self.register(QUEUE_NOTIFY, queue.into());
        settle();
        self.wait(queue, next);
        Ok(())
    }

    /// Gives a device that serves on its own thread a moment to come to the end of a queue, which
    /// it need not do.
    fn wait(&self, queue: u16, available: u16) {
        let used = GuestAddress(ring(queue) + USED + 2);
        for _ in 0..20 {
            if !matches!(self.host, Host::Silent)
                || self.memory.read_obj::<u16>(used).ok() == Some(available)
            {
                break;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match &mut self.host {
            Host::Silent => return Ok(()),
            Host::Socket(socket) => socket.step(input)?,
            Host::Mem { host, .. } => {
                let _ = host.set_requested(u64::from(input.arbitrary::<u16>()?) * BLOCK_BYTES);
            }
            Host::Balloon(host) => match input.arbitrary::<u16>()? {
                pages @ 0..0x200 => {
                    let _ = host.set_target(u64::from(pages) * PAGE_BYTES);
                }
                _ => host.refresh(),
            },
            Host::Net { host, wire } => match input.arbitrary::<u16>()? {
                len @ 0..0x8000 => {
                    let header = input.bytes(input.len().min(12))?;
                    let mut frame = header.to_vec();
                    frame.resize(usize::from(len), 0x5a);
                    let _ = wire.send(&frame);
                }
                0x8000..0xf000 => {
                    let mut frame = vec![0; FRAME_BYTES + 1];
                    while let Ok(len) = wire.recv(&mut frame) {
                        assert!(len <= FRAME_BYTES, "a frame of {len} bytes");
                    }
                }
                other => host.set_link(other & 1 == 0),
            },
        }
        settle();
        Ok(())
    }
}

impl Socket {
    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut cx = Context::from_waker(Waker::noop());
        match input.arbitrary::<u8>()? % 4 {
            0 => {
                if self.streams.len() < 4
                    && let Some(listener) = &mut self.listener
                    && let Poll::Ready(Ok(stream)) = listener.poll_accept(&mut cx)
                {
                    self.streams.push(stream);
                }
            }
            1 => {
                let mut memory = [0; 4096];
                if let Some(stream) = self.streams.last_mut() {
                    let mut buf = ReadBuf::new(&mut memory);
                    let _ = std::pin::Pin::new(stream).poll_read(&mut cx, &mut buf);
                }
            }
            2 => {
                let len = usize::from(input.arbitrary::<u16>()?);
                if let Some(stream) = self.streams.last_mut() {
                    let _ = std::pin::Pin::new(stream).poll_write(&mut cx, &vec![1; len]);
                }
            }
            _ => drop(self.streams.pop()),
        }
        Ok(())
    }
}

/// Mostly within memory or at its borders.
fn place(input: &mut Unstructured<'_>) -> Result<u64> {
    let base = match input.arbitrary::<u8>()? % 8 {
        0 => return input.arbitrary(),
        1 => 0x4_0000 - 8,
        2 => 0x8_0000 - 8,
        3 => 0x10_0000,
        4 => RINGS,
        5 => PLUGGABLE.base,
        _ => 0x1_0000,
    };
    Ok(base + u64::from(input.arbitrary::<u16>()?))
}

fn ring(queue: u16) -> u64 {
    RINGS + u64::from(queue) * RING_STRIDE
}

fn settle() {
    let events = &event_loop().handle;
    let barrier = events.add(Arc::new(Mutex::new(Barrier)));
    let barrier = barrier.expect("the loop runs");
    events.remove(barrier).expect("it is there");
}

/// What [`Driver::request`] reads: a header, and how much room there is for the device.
fn request_bytes(queue: u8, header: &[u8], room: u16, device_writes: bool) -> Vec<u8> {
    let mut bytes = vec![14, queue, header.len() as u8];
    bytes.extend(header);
    bytes.extend(room.to_le_bytes());
    bytes.push(device_writes.into());
    bytes
}

pub(super) fn mem_seeds() -> Vec<Vec<u8>> {
    // struct virtio_mem_req.
    let request = |kind: u8, block: u64, count: u16| {
        let mut header = [0; 24];
        header[0] = kind;
        header[8..16].copy_from_slice(&(PLUGGABLE.base + block * BLOCK_BYTES).to_le_bytes());
        header[16..18].copy_from_slice(&count.to_le_bytes());
        request_bytes(0, &header, 16, true)
    };
    let per_slot = (SLOT_UNIT / BLOCK_BYTES) as u16;
    // Bring-up with and without UNPLUGGED_INACCESSIBLE.
    let up = || vec![4, 7];
    vec![
        [up(), request(0, 0, 3), request(3, 0, 4), request(1, 1, 1)].concat(),
        [
            vec![4, 0],
            request(0, 60, 8),
            request(3, 60, 8),
            request(2, 0, 0),
            request(0, 1, 1),
        ]
        .concat(),
        // More slots than a turn works on, the host's requests, and a reset in between.
        [
            vec![15, 0, 3],
            up(),
            request(0, 0, 10 * per_slot),
            up(),
            request(1, 0, 10 * per_slot),
            vec![15, 1, 0],
            request(2, 0, 0),
        ]
        .concat(),
        // More than is requested, past the end, misaligned, of no known kind.
        [
            up(),
            request(0, 0, 7 * per_slot),
            request(0, 12 * u64::from(per_slot) - 1, 2),
            request(9, 0, 1),
        ]
        .concat(),
    ]
}

pub(super) fn balloon_seeds() -> Vec<Vec<u8>> {
    // All of the device's features, so that the statistics are queue 2 and reports queue 3.
    let up = || vec![4, 0b11_1111];
    let pages = |pages: &[u32]| pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    let inflate: Vec<u8> = pages(&[0x13, 0x12, 0x11, 0x11, 0x80, u32::MAX]);
    let mut stats = vec![4, 0, 7, 0, 0, 0, 0, 0, 0, 0];
    stats.extend([6, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    vec![
        [
            up(),
            request_bytes(0, &inflate, 0, false),
            request_bytes(1, &inflate, 0, false),
        ]
        .concat(),
        [
            up(),
            vec![15, 1, 0],
            request_bytes(2, &stats, 0, false),
            vec![15, 0xff, 0xff],
            request_bytes(2, &stats, 0, false),
            vec![15, 0xff, 0xff],
        ]
        .concat(),
        [
            up(),
            request_bytes(3, &[], 0x2000, true),
            request_bytes(3, &[], 0x1800, true),
            request_bytes(3, &[1], 0x1000, false),
        ]
        .concat(),
        // Without the features: two queues do.
        [vec![4, 3], request_bytes(0, &inflate, 0, false)].concat(),
    ]
}

pub(super) fn net_seeds() -> Vec<Vec<u8>> {
    let frame: Vec<u8> = [vec![0; 12], vec![0xff; 48]].concat();
    let up = |features: u8| vec![4, features];
    let host = |what: u16| [vec![15], what.to_le_bytes().to_vec(), vec![0; 12]].concat();
    let mut seeds = Vec::new();
    for features in [0b1_1111, 0, 0b11] {
        seeds.push(
            [
                up(features),
                request_bytes(0, &[], 0x800, true),
                host(200),
                host(1500),
                request_bytes(0, &[], 0x200, true),
                request_bytes(0, &[], 0x800, true),
                request_bytes(1, &frame, 0x100, false),
                request_bytes(1, &frame, 0xffff, false),
                host(0xf000),
                host(0x8000),
                host(0xf001),
            ]
            .concat(),
        );
    }
    seeds
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    // struct virtio_blk_req: read, write, flush and id of sector 0; kinds are (access, parts, threads).
    let request = request_bytes;
    for (kind, op, writes) in [
        (2, 0, true),
        (2, 1, false),
        (2, 4, false),
        (3, 8, true),
        (3, 1, false),
        (10, 0, true),
        (10, 1, false),
    ] {
        let mut header = [0; 16];
        header[0] = op;
        seeds.push([vec![kind, 4, 4], request(0, &header, 512, writes)].concat());
    }
    // With all features of a disk that can be written, or that cannot.
    let up = |kind: u8| vec![kind, 4, if kind % 4 == 2 { 31 } else { 7 }];
    // Discard and write-zeroes of one segment after the header: the second sector, all of the disk, past its end, with a
    // flag; on a file and on parts, whose second begins at 2 MiB, by io_uring and by threads.
    for kind in [2, 3, 6, 7, 10, 14] {
        for (op, sector, count, flags) in [
            (11, 1, 1, 0),
            (13, 0, 128, 1),
            (13, 4096, 64, 0),
            (11, 127, 2, 0),
            (13, 1, 1, 2),
        ] {
            let mut header = [0; 32];
            header[0] = op;
            header[16..24].copy_from_slice(&u64::to_le_bytes(sector));
            header[24] = count;
            header[28] = flags;
            seeds.push([up(kind), request(0, &header, 0, true)].concat());
        }
    }
    // Reads of the parts' table and of what is around the parts.
    for kind in [6, 7, 14, 15] {
        let reads = [0_u64, 33, 2047, 2048, 2111, 4096, 4159, 6143].map(|sector| {
            let mut header = [0; 16];
            header[8..].copy_from_slice(&sector.to_le_bytes());
            request(0, &header, 1024, true)
        });
        seeds.push([up(kind), reads.concat()].concat());
    }
    seeds.push([vec![0, 4, 3], request(0, &[], 64, true)].concat());
    // A connection to port 1024, and bytes on it.
    let mut header = [0; 44];
    header[0] = 3;
    header[8] = 2;
    header[16] = 9;
    header[21] = 4;
    header[28] = 1;
    header[30] = 1;
    header[37] = 64;
    let mut data = header;
    data[25] = 1;
    data[30] = 5;
    let talk = [
        vec![1, 4, 3],
        request(1, &header, 0, false),
        vec![15, 0],
        request(0, &[], 4096, true),
        request(1, &data, 256, false),
        vec![15, 1, 15, 2, 200, 0],
        request(0, &[], 4096, true),
        vec![15, 3],
    ];
    seeds.push(talk.concat());
    seeds
}
