//! Requests and the device as hostile drivers use them, by each way of I/O.

mod device;
mod flights;
mod joined;
mod requests;

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::{self, Engine};
use super::request::Agreed;
use super::service::{Parts, Service, Stop};
use super::*;
use crate::config::{DiskConfig, DiskIo};
use crate::virtio::device::{ActiveQueue, GuestRam, Interrupt};
use crate::virtio::queue::driver::{DATA, Driver, Part, USED, memory};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What a status byte holds before it is written.
const NONE: u8 = 0xee;

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// All that can be agreed on.
const ALL: Agreed = Agreed {
    flush: true,
    discard: true,
    write_zeroes: true,
};

/// Runs a test by io_uring, where the host has it (`engine` tests that it is found), and by
/// threads.
fn both(test: impl Fn(DiskIo)) {
    for io in [DiskIo::Auto, DiskIo::Threads] {
        test(io);
    }
}

/// An image whose sector n is full of the byte n + 1.
fn image(sectors: u8) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("an image");
    for sector in 0..sectors {
        file.write_all(&[sector + 1; 512]).expect("written");
    }
    file
}

fn config(image: &NamedTempFile, read_only: bool) -> DiskConfig {
    DiskConfig::file(image.path(), read_only, "root")
}

fn disk(config: &DiskConfig) -> Arc<Disk> {
    Arc::new(Disk::open(config).expect("a disk"))
}

fn content(image: &NamedTempFile) -> Vec<u8> {
    let mut file = image.reopen().expect("reopened");
    file.seek(SeekFrom::Start(0)).expect("sought");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).expect("read");
    bytes
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A segment of a discard or a write-zeroes.
fn segment(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&count.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

/// A disk's queue with what serves it, on the test's own thread.
fn service(
    disk: &Arc<Disk>,
    ram: GuestRam,
    driver: &Driver,
    agreed: Agreed,
    engine: Box<dyn Engine>,
) -> Service {
    let parts = Parts {
        disk: Arc::clone(disk),
        id: *b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        agreed,
        ram,
        interrupt: Interrupt::new(eventfd()),
        queue: ActiveQueue {
            queue: driver.queue(false),
            kick: Arc::new(eventfd()),
        },
        stop: Arc::new(Stop::new().expect("an eventfd")),
    };
    Service::new(parts, engine).expect("a service")
}

/// Serves until `count` chains were returned.
fn serve_until(service: &mut Service, driver: &Driver, count: u16) {
    let start = Instant::now();
    while driver.read::<u16>(USED + 2) < count {
        assert!(start.elapsed() < Duration::from_secs(20), "no answer");
        if !service.turn().expect("a sound ring") {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Serves one chain; gives the status byte and the used length.
fn answer(io: DiskIo, disk: &Arc<Disk>, driver: &mut Driver, parts: &[Part]) -> (u8, u32) {
    driver.fill(STATUS, &[NONE]);
    driver.chain(parts);
    let engine = engine::choose(io, disk, driver.size).expect("an engine");
    let ram = GuestRam::new(driver.memory.clone());
    let mut service = service(disk, ram, driver, ALL, engine);
    serve_until(&mut service, driver, 1);
    let (_, len) = driver.used().expect("answered");
    (driver.read(STATUS), len)
}

/// One request with its header in one descriptor and `data` between header and status.
fn request(
    io: DiskIo,
    disk: &Arc<Disk>,
    kind: u32,
    sector: u64,
    data: &[Part],
) -> (Driver, u8, u32) {
    let mut driver = Driver::new(memory(), 8);
    driver.fill(HEADER, &header(kind, sector));
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend_from_slice(data);
    parts.push((STATUS, 1, true));
    let (status, len) = answer(io, disk, &mut driver, &parts);
    (driver, status, len)
}
