//! Entropy for greedy and broken drivers.

use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::event_loop::EventLoop;
use crate::virtio::device::INTERRUPT_CONFIG;
use crate::virtio::queue::driver::{AVAILABLE, DATA, Driver, Part, SEAM, memory};

fn service(driver: &Driver) -> Service {
    Service {
        ram: GuestRam::new(driver.memory.clone()),
        interrupt: Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
        queue: driver.queue(false),
        kick: Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
        broken: false,
    }
}

#[test]
fn a_request_is_filled_and_only_it() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 1500, true), (SEAM - 500, 1000, true)]);
    service(&driver).turn();
    assert_eq!(driver.used(), Some((0, 2500)));
    let mut bytes = driver.bytes(DATA, 1500);
    bytes.extend(driver.bytes(SEAM - 500, 1000));
    let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
    // 20000 bits, standard deviation 71.
    assert!((9000..11000).contains(&ones), "{ones} ones of 20000");
    assert_eq!(driver.bytes(DATA + 1500, 64), [0; 64]);
    assert_eq!(driver.bytes(SEAM + 500, 64), [0; 64]);
}

#[test]
fn a_giant_chain_is_capped_and_the_used_length_says_so() {
    let mut driver = Driver::new(memory(), 8);
    let part: Part = (SEAM, 0x10_0000, true);
    driver.chain(&[part, part, part]);
    service(&driver).turn();
    assert_eq!(driver.used(), Some((0, REQUEST_BYTES as u32)));
    assert_eq!(driver.bytes(SEAM + REQUEST_BYTES, 64), [0; 64]);
}

#[test]
fn a_chain_without_room_gets_nothing() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 16, false)]);
    driver.chain(&[(DATA, 0, true)]);
    service(&driver).turn();
    assert_eq!(driver.used(), Some((0, 0)));
    assert_eq!(driver.used(), Some((1, 0)));
}

#[test]
fn one_turn_serves_a_few_and_kicks_itself_for_the_rest() {
    let mut driver = Driver::new(memory(), 8);
    for _ in 0..BATCH + 2 {
        driver.chain(&[(DATA, 16, true)]);
    }
    let mut service = service(&driver);
    service.turn();
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), BATCH);
    assert_eq!(service.kick.read().ok(), Some(1));
    service.turn();
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), 2);
    assert!(service.kick.read().is_err(), "no kick without work");
}

#[test]
fn a_broken_ring_is_left_alone() {
    let driver = Driver::new(memory(), 8);
    driver.write(AVAILABLE + 2, 100_u16);
    let mut service = service(&driver);
    service.turn();
    assert!(service.interrupt.needs_reset());
    assert_eq!(service.interrupt.status(), INTERRUPT_CONFIG);
    service.interrupt.reset();
    service.turn();
    assert!(!service.interrupt.needs_reset(), "not even looked at");
}

#[test]
fn the_device_serves_in_the_event_loop_between_activation_and_reset() {
    let (_events, handle) = EventLoop::start("test-loop", |_| {}).expect("an event loop");
    let mut rng = Rng::new(handle);
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    for _ in 0..2 {
        let mut driver = Driver::new(memory(), 8);
        rng.activate(Activation {
            ram: GuestRam::new(driver.memory.clone()),
            interrupt: interrupt.clone(),
            queues: vec![ActiveQueue {
                queue: driver.queue(false),
                kick: Arc::clone(&kick),
            }],
            features: rng.features(),
        })
        .expect("activated");
        driver.chain(&[(DATA, 16, true)]);
        kick.write(1).expect("a kick");
        let start = Instant::now();
        while interrupt.status() == 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "no interrupt");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(driver.used(), Some((0, 16)));
        rng.reset();
        driver.chain(&[(DATA, 16, true)]);
        kick.write(1).expect("a kick");
        assert_eq!(driver.used(), None, "the device is stopped");
        let _ = kick.read();
        interrupt.reset();
    }
}
