//! The configuration, in both its senses, and what driver and host hear of each other.

use std::time::{Duration, Instant};

use super::*;
use crate::virtio::device::{INTERRUPT_CONFIG, INTERRUPT_USED_RING, VirtioDevice};

#[test]
fn the_configuration_has_the_region_and_zeros_beyond() {
    let mut rig = Rig::new(3 * BLOCK);
    rig.plug(BASE, 2);
    let mut bytes = [0xee; 64];
    rig.device.read_config(0, &mut bytes);
    let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let fields = [0, 8, 16, 24, 32, 40, 48, 56].map(field);
    let expected = [BLOCK, 0, BASE, REGION, SLOT, 2 * BLOCK, 3 * BLOCK, 0];
    assert_eq!(fields, expected);
    for (offset, expected) in [(54, 2), (56, 0), (57, 0), (u64::MAX, 0)] {
        let mut bytes = [0xee; 4];
        rig.device.read_config(offset, &mut bytes);
        assert_eq!(bytes[expected..], [0; 4][expected..], "{offset}");
    }
    rig.device.write_config(48, &[0xff; 8]);
    assert_eq!(rig.host.status().requested, 3 * BLOCK, "read-only");
    assert_eq!((rig.device.kind(), rig.device.device_id()), ("mem", 24));
    assert_eq!(rig.device.features() & 0xff, 2, "no ACPI_PXM");
}

#[test]
fn a_configuration_that_cannot_be_is_refused_with_what_can() {
    let refused = |base, region_bytes, slot_bytes| {
        let config = MemConfig {
            base,
            region_bytes,
            slot_bytes,
        };
        config.check().expect_err("refused").to_string()
    };
    for slot in [0, MIB, SLOT + BLOCK, SLOT - 1] {
        let text = refused(BASE, REGION, slot);
        assert!(text.contains("multiple of 128 MiB"), "{text}");
    }
    for region in [0, SLOT / 2, SLOT + BLOCK, MAXIMUM_REGION + SLOT, u64::MAX] {
        let text = refused(BASE, region, SLOT);
        assert!(text.contains("up to 1024 GiB"), "{text}");
    }
    for base in [
        BASE + BLOCK,
        1 << 46,
        (1 << 46) - REGION + SLOT,
        u64::MAX - SLOT + 1,
    ] {
        let text = refused(base, REGION, SLOT);
        assert!(text.contains(&format!("{base:#x}")), "{text}");
    }
    CONFIG.check().expect("this one can");
    let largest = MemConfig {
        base: (1 << 46) - MAXIMUM_REGION,
        region_bytes: MAXIMUM_REGION,
        slot_bytes: 16 * SLOT,
    };
    largest.check().expect("and the largest");
}

#[test]
fn a_request_that_cannot_be_is_refused_with_the_figure_and_changes_nothing() {
    let rig = Rig::new(BLOCK);
    let before = rig.host.status();
    for (bytes, text) in [
        (1, "multiple"),
        (BLOCK - 4096, "multiple"),
        (REGION + BLOCK, "2048 MiB"),
        (u64::MAX - BLOCK + 1, "2048 MiB"),
        (u64::MAX, "multiple"),
    ] {
        let error = rig.host.set_requested(bytes).expect_err("refused");
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(rig.host.status(), before);
}

#[test]
fn the_driver_is_told_of_each_request_and_the_host_of_each_change() {
    let (memory, _kvm) = boot_memory();
    let (_events, handle) = quiet_loop();
    let (mut device, host) = Mem::new(CONFIG, Arc::clone(&memory), handle).expect("a device");
    let mut watch = host.watch();
    host.set_requested(BLOCK).expect("requested");
    assert!(watch.has_changed().expect("there is a device"));
    assert!(!watch.borrow_and_update().driver);

    let mut driver = driver_of(&memory);
    let kick = Arc::new(eventfd());
    let interrupt = Interrupt::new(eventfd());
    device
        .activate(activation(&memory, driver.queue(false), &kick, &interrupt))
        .expect("activated");
    assert!(watch.borrow_and_update().driver);
    let generation = interrupt.generation();
    host.set_requested(2 * BLOCK).expect("requested");
    assert_eq!(interrupt.status(), INTERRUPT_CONFIG);
    assert_ne!(interrupt.generation(), generation);
    // The guest reads it without asking: plugged, requested.
    let shown = || {
        [40, 48].map(|offset| {
            let mut bytes = [0; 8];
            interrupt.page().read(0x100 + offset, &mut bytes);
            u64::from_le_bytes(bytes)
        })
    };
    assert_eq!(shown(), [0, 2 * BLOCK]);

    let seen = host.status();
    let deadline = || Instant::now() + Duration::from_secs(20);
    let waiter = std::thread::spawn({
        let host = host.clone();
        move || host.wait_change(&seen, deadline())
    });
    driver.write(REQUEST, u64::from(PLUG));
    driver.write(REQUEST + 8, BASE);
    driver.write(REQUEST + 16, 2_u64);
    driver.chain(&[(REQUEST, 24, false), (RESPONSE, 10, true)]);
    kick.write(1).expect("a kick");
    let changed = waiter.join().expect("no panic");
    assert_ne!(changed, seen);
    let mut status = changed;
    while status.plugged != 2 * BLOCK {
        let next = host.wait_change(&status, deadline());
        assert_ne!(next, status, "in time");
        status = next;
    }
    let expected = MemStatus {
        requested: 2 * BLOCK,
        plugged: 2 * BLOCK,
        usable: SLOT,
        region: REGION,
        slots: 1,
        driver: true,
        failures: 0,
    };
    assert_eq!(status, expected);
    let start = Instant::now();
    while interrupt.status() & INTERRUPT_USED_RING == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "no interrupt");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(driver.used(), Some((0, 10)));
    assert_eq!(shown(), [2 * BLOCK; 2]);

    device.reset();
    assert!(!host.status().driver);
    assert_eq!(host.status().plugged, 2 * BLOCK, "a reset unplugs nothing");
    driver.chain(&[(REQUEST, 24, false), (RESPONSE, 10, true)]);
    kick.write(1).expect("a kick");
    interrupt.reset();
    host.set_requested(0).expect("requested");
    assert_eq!(interrupt.status(), 0, "no driver is told");
    assert_eq!(driver.used(), None, "the device is stopped");
    let now = host.status();
    let start = Instant::now();
    let same = host.wait_change(&now, start + Duration::from_millis(20));
    assert_eq!(same, now);
    assert!(start.elapsed() >= Duration::from_millis(20));
    drop(device);
    assert_eq!(host.status(), now);
}
