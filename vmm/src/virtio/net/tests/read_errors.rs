//! Reads of the interface that fail: some cost a frame, others end it.

use super::super::service::{FAILURES, PAUSE};
use super::*;

/// What the device got, and what it dropped on the way to the guest.
fn came(device: &Device) -> (u64, u64) {
    let counters = device.host.counters();
    (counters.received, counters.receive_dropped)
}

#[test]
fn a_frame_that_cannot_be_read_is_dropped_and_the_next_comes() {
    for code in [libc::EINVAL, libc::EFAULT, libc::ENOMEM, libc::ENOBUFS] {
        let mut device = Device::active();
        device.driver.chain(&[(DATA, 600, true)]);
        device.errors.lock().unwrap().push_back(code);
        device.wire.send(&frame(100, 7)).unwrap();
        until("the frame", || device.driver.used() == Some((0, 112)));
        assert_eq!(
            device.driver.bytes(DATA + 12, 100),
            frame(100, 7)[12..],
            "{code}"
        );
        until("the count", || came(&device) == (1, 1));
        assert!(device.host.link());
    }
}

#[test]
fn an_interface_that_gives_errors_only_is_read_now_and_then() {
    let mut device = Device::named("errs");
    device.driver.chain(&[(DATA, 600, true)]);
    let codes = std::iter::repeat_n(libc::ENOMEM, 1_000_000);
    device.errors.lock().unwrap().extend(codes);
    let since = Instant::now();
    device.wire.send(&frame(100, 7)).unwrap();
    until("a second turn", || came(&device).1 > FAILURES);
    std::thread::sleep(3 * PAUSE);
    let (_, dropped) = came(&device);
    let turns = since.elapsed().as_millis() / PAUSE.as_millis() + 1;
    assert!(u128::from(dropped) <= turns * u128::from(FAILURES));
    assert!(device.host.link());
    // Sending does not wait for that.
    device.driver.fill(DATA + 0x1000, &frame(30, 1));
    send(&device.driver, 0, &[(DATA + 0x1000, 42, false)]);
    device.kicks[1].write(1).unwrap();
    device.drain(1);
    device.errors.lock().unwrap().clear();
    until("the frame", || device.driver.used() == Some((0, 112)));
}

#[test]
fn frames_of_before_are_read_away_beyond_one_that_cannot_be_read() {
    let mut device = Device::active();
    device.net.reset();
    device.errors.lock().unwrap().push_back(libc::EINVAL);
    for _ in 0..3 {
        device.wire.send(&frame(50, 1)).unwrap();
    }
    device.driver = Driver::new(memory(), SIZE);
    device.activate();
    device.driver.chain(&[(DATA, 600, true)]);
    device.wire.send(&frame(100, 2)).unwrap();
    until("the frame", || device.driver.used() == Some((0, 112)));
    assert_eq!(came(&device).1, 4);
}

#[test]
fn an_interface_that_has_ended_keeps_the_link_down() {
    for code in [libc::EBADFD, libc::ENODEV, libc::EIO] {
        let mut device = Device::active();
        device.driver.chain(&[(DATA, 600, true)]);
        device.errors.lock().unwrap().push_back(code);
        device.wire.send(&frame(100, 7)).unwrap();
        until("the link is down", || !device.host.link());
        let generation = device.interrupt.generation();
        device.host.set_link(true);
        assert!(!device.host.link(), "{code}");
        let mut status = [0xff; 2];
        device.net.read_config(6, &mut status);
        assert_eq!(status, [0, 0]);
        assert_eq!(device.interrupt.generation(), generation, "no change");
        // Nor is it there for another driver.
        device.net.reset();
        device.activate();
        device.host.set_link(true);
        assert!(!device.host.link());
        assert_eq!(came(&device).0, 0);
    }
}

#[test]
fn what_the_guest_sends_goes_on_when_receiving_has_ended() {
    let mut device = Device::named("half");
    let offered = device.send_until_full();
    device.errors.lock().unwrap().push_back(libc::EBADFD);
    device.wire.send(&frame(100, 7)).unwrap();
    until("the link is down", || !device.host.link());
    device.drain(offered);
    until("the last one's return", || sent(&device.driver) == offered);
    rests("net-half");
}
