//! Requests whose operations end when and as a test says: order, flushes, short transfers, errors,
//! and memory that is gone meanwhile.

use std::os::fd::RawFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::{io, mem};

use vm_memory::GuestAddressSpace;

use super::*;
use crate::memory::stand_in::StandIn;
use crate::virtio::block::engine::{Action, Completion, Operation};
use crate::virtio::queue::driver::{GAP, SEAM};

/// An engine that does nothing before it is told to.
#[derive(Clone, Default)]
struct Slow {
    started: Arc<Mutex<Vec<(usize, Operation)>>>,
    done: Arc<Mutex<Vec<Completion>>>,
}

impl Engine for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn descriptors(&self) -> Vec<RawFd> {
        Vec::new()
    }

    unsafe fn start(&mut self, token: usize, operation: Operation) -> io::Result<()> {
        lock(&self.started).push((token, operation));
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completions(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut lock(&self.done));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk of eight sectors behind a slow engine.
struct Bench {
    image: NamedTempFile,
    disk: Arc<Disk>,
    driver: Driver,
    slow: Slow,
    service: Service,
}

impl Bench {
    fn new(agreed: Agreed) -> Self {
        let driver = Driver::new(memory(), 16);
        let ram = GuestRam::new(driver.memory.clone());
        Self::over(driver, ram, agreed)
    }

    fn over(driver: Driver, ram: GuestRam, agreed: Agreed) -> Self {
        let image = image(8);
        let disk = disk(&config(&image, false));
        Self::of(image, disk, driver, ram, agreed)
    }

    fn of(
        image: NamedTempFile,
        disk: Arc<Disk>,
        driver: Driver,
        ram: GuestRam,
        agreed: Agreed,
    ) -> Self {
        let slow = Slow::default();
        let service = service(&disk, ram, &driver, agreed, Box::new(slow.clone()));
        Self {
            image,
            disk,
            driver,
            slow,
            service,
        }
    }

    /// Offers a request with its header and status at places of their own.
    fn offer(&mut self, index: u64, kind: u32, sector: u64, data: &[Part]) -> u32 {
        let (head, status) = (DATA + index * 32, STATUS + index);
        self.driver.fill(head, &header(kind, sector));
        self.driver.fill(status, &[NONE]);
        let mut parts = vec![(head, 16, false)];
        parts.extend(data);
        parts.push((status, 1, true));
        self.driver.chain(&parts).into()
    }

    fn turn(&mut self) {
        while self.service.turn().expect("a sound ring") {}
    }

    fn started(&self) -> Vec<(usize, Operation)> {
        lock(&self.slow.started).clone()
    }

    /// Ends the operation at `index` of those that were started, by really doing it or with this
    /// result.
    fn end(&mut self, index: usize, result: Option<io::Result<u64>>) {
        let (token, operation) = lock(&self.slow.started).remove(index);
        // SAFETY: the flight of the operation holds its memory.
        let perform = || unsafe { self.disk.perform(&operation, &AtomicBool::new(false)) };
        let result = result.unwrap_or_else(perform);
        lock(&self.slow.done).push(Completion { token, result });
        self.turn();
    }

    fn status(&self, index: u64) -> u8 {
        self.driver.read(STATUS + index)
    }
}

#[test]
fn chains_come_back_in_the_order_in_which_they_are_ready() {
    let mut bench = Bench::new(ALL);
    let heads: Vec<u32> = (0..3)
        .map(|index| bench.offer(index, IN, index, &[(BUFFER + index * 512, 512, true)]))
        .collect();
    bench.turn();
    assert_eq!((bench.started().len(), bench.driver.used()), (3, None));
    for (at, index) in [(2, 2), (0, 0), (0, 1)] {
        bench.end(at, None);
        assert_eq!(bench.driver.used(), Some((heads[index], 513)));
        assert_eq!(bench.driver.used(), None);
        assert_eq!(bench.status(index as u64), OK);
        let bytes = bench.driver.bytes(BUFFER + index as u64 * 512, 512);
        assert_eq!(bytes, [index as u8 + 1; 512]);
    }
}

#[test]
fn no_more_requests_are_taken_than_the_queue_has_entries() {
    let mut bench = Bench::new(ALL);
    let head = bench.offer(0, IN, 0, &[(BUFFER, 512, true)]);
    for _ in 1..16 {
        bench.driver.offer(head as u16);
    }
    bench.turn();
    assert_eq!(bench.started().len(), 16);
    bench.driver.offer(head as u16);
    bench.turn();
    assert_eq!(bench.started().len(), 16);
    bench.end(5, None);
    assert_eq!(bench.started().len(), 16, "one went, and one came");
    assert_eq!(bench.driver.used(), Some((head, 513)));
}

#[test]
fn a_flush_is_answered_after_its_sync_which_follows_the_writes_before_it() {
    let mut bench = Bench::new(ALL);
    bench.driver.fill(BUFFER, &[0xaa; 512]);
    let write = bench.offer(0, OUT, 1, &[(BUFFER, 512, false)]);
    bench.turn();
    bench.end(0, None);
    assert_eq!(bench.driver.used(), Some((write, 1)));
    let flush = bench.offer(1, FLUSH, 0, &[]);
    bench.turn();
    let started = bench.started();
    assert!(
        matches!(
            started[..],
            [(
                _,
                Operation {
                    action: Action::Sync,
                    ..
                }
            )]
        ),
        "{started:?}"
    );
    assert_eq!((bench.driver.used(), bench.status(1)), (None, NONE));
    bench.end(0, None);
    assert_eq!(bench.driver.used(), Some((flush, 1)));
    assert_eq!(bench.status(1), OK);
    bench.offer(2, FLUSH, 0, &[]);
    bench.turn();
    bench.end(0, Some(Err(io::Error::from_raw_os_error(libc::EIO))));
    assert_eq!(
        bench.status(2),
        IOERR,
        "what is not durable is not said to be"
    );
}

#[test]
fn a_flush_of_joined_files_syncs_each_of_them() {
    let images = [image(8), image(8), image(8)];
    let paths = images.iter().map(|image| image.path());
    let disk = disk(&DiskConfig::parts(paths, false, "layers"));
    let driver = Driver::new(memory(), 16);
    let ram = GuestRam::new(driver.memory.clone());
    let [first, ..] = images;
    let mut bench = Bench::of(first, disk, driver, ram, ALL);
    for failing in [None, Some(2)] {
        let flush = bench.offer(0, FLUSH, 0, &[]);
        bench.turn();
        for image in 0..3 {
            let started = bench.started();
            let [(_, operation)] = started[..] else {
                panic!("{started:?}");
            };
            assert!(matches!(operation.action, Action::Sync), "{operation:?}");
            assert_eq!((operation.image, bench.status(0)), (image, NONE));
            let error = || Err(io::Error::from_raw_os_error(libc::EIO));
            let result = (failing == Some(image)).then(error);
            bench.end(0, Some(result.unwrap_or(Ok(0))));
        }
        let expected = if failing.is_some() { IOERR } else { OK };
        assert_eq!(bench.driver.used(), Some((flush, 1)));
        assert_eq!(bench.status(0), expected);
    }
}

#[test]
fn without_flush_what_is_written_is_durable_when_it_is_answered() {
    let agreed = Agreed {
        flush: false,
        ..ALL
    };
    for (kind, data) in [(OUT, [0xaa; 512]), (DISCARD, [0; 512]), (ZEROES, [0; 512])] {
        let mut bench = Bench::new(agreed);
        bench.driver.fill(BUFFER, &data);
        if kind != OUT {
            bench.driver.fill(BUFFER, &segment(1, 1, 0));
        }
        let len = if kind == OUT { 512 } else { 16 };
        let head = bench.offer(0, kind, 1, &[(BUFFER, len, false)]);
        bench.turn();
        bench.end(0, None);
        assert_eq!((bench.driver.used(), bench.status(0)), (None, NONE));
        assert!(matches!(bench.started()[0].1.action, Action::Sync));
        assert_eq!(content(&bench.image)[512..1024], data);
        bench.end(0, None);
        assert_eq!(bench.driver.used(), Some((head, 1)), "kind {kind}");
    }
}

#[test]
fn short_transfers_go_on_where_they_ended() {
    let mut bench = Bench::new(ALL);
    bench.driver.fill(BUFFER, &[0xaa; 1024]);
    bench.offer(
        0,
        OUT,
        2,
        &[(BUFFER, 700, false), (BUFFER + 700, 324, false)],
    );
    bench.turn();
    for (moved, expected) in [(100, 1124), (650, 1774), (1, 1775)] {
        bench.end(0, Some(Ok(moved)));
        let Action::Write { offset, vectors } = bench.started()[0].1.action else {
            panic!("{:?}", bench.started());
        };
        assert_eq!(offset, expected);
        // SAFETY: the flight keeps the table while its operation is under way.
        let table = unsafe { std::slice::from_raw_parts(vectors.first, vectors.count) };
        let left: usize = table.iter().map(|vector| vector.iov_len).sum();
        assert_eq!(left as u64, 2048 - expected);
    }
    // More than there was to move is no reason to go astray.
    bench.end(0, Some(Ok(u64::MAX)));
    assert_eq!(bench.status(0), OK);
}

#[test]
fn a_failed_operation_is_tried_again_answered_or_unsupported() {
    let error = |code| Some(Err(io::Error::from_raw_os_error(code)));
    let mut bench = Bench::new(ALL);
    let head = bench.offer(0, IN, 0, &[(BUFFER, 1024, true)]);
    bench.turn();
    bench.end(0, error(libc::EINTR));
    assert_eq!(bench.started().len(), 1, "once more");
    bench.end(0, Some(Ok(512)));
    bench.end(0, error(libc::EIO));
    assert_eq!(bench.driver.used(), Some((head, 512)));
    assert_eq!(bench.status(0), IOERR);
    for (index, kind, code, expected) in [
        (1, OUT, libc::ENOSPC, IOERR),
        (2, DISCARD, libc::EOPNOTSUPP, UNSUPP),
        (3, DISCARD, libc::EIO, IOERR),
        (4, ZEROES, libc::EOPNOTSUPP, IOERR),
    ] {
        bench.driver.fill(BUFFER, &segment(0, 1, 0));
        let len = if kind == OUT { 512 } else { 16 };
        bench.offer(index, kind, 0, &[(BUFFER, len, false)]);
        bench.turn();
        bench.end(0, error(code));
        assert_eq!(bench.status(index), expected, "request {index}");
    }
    let short = bench.offer(5, OUT, 0, &[(BUFFER, 512, false)]);
    bench.turn();
    bench.end(0, Some(Ok(0)));
    assert_eq!(bench.status(5), IOERR, "no progress is not tried for ever");
    let last = mem::take(&mut *lock(&bench.slow.started));
    assert!(last.is_empty(), "{short}");
}

/// The slot of a buffer goes while a transfer into it is under way: its mapping stays until the
/// transfer has ended, and no longer.
#[test]
fn memory_of_a_removed_slot_stays_until_its_transfers_have_ended() {
    const PLUGGED: u64 = 1 << 32;
    let (guest, _kvm) = StandIn::memory(&[(0, SEAM), (SEAM, GAP - SEAM)]);
    guest.add_region(PLUGGED, 2 << 20).expect("added");
    let driver = Driver::new((*guest.ram().memory()).clone(), 16);
    let mut bench = Bench::over(driver, guest.ram(), ALL);
    let head = bench.offer(0, IN, 3, &[(PLUGGED, 512, true)]);
    bench.turn();
    let before = Arc::downgrade(&guest.ram().memory().into_inner());
    guest.remove_region_at(PLUGGED).expect("removed");
    bench.turn();
    assert!(before.upgrade().is_some(), "the transfer holds it");
    bench.end(0, None);
    assert_eq!(bench.driver.used(), Some((head, 513)));
    assert_eq!(bench.status(0), OK);
    assert_eq!(bench.driver.bytes(PLUGGED, 512), [4; 512], "an old view's");
    assert!(before.upgrade().is_none(), "nothing holds it any more");
    let head = bench.offer(1, IN, 3, &[(PLUGGED, 512, true)]);
    bench.turn();
    assert_eq!(bench.driver.used(), Some((head, 0)));
}
