//! Queues by features, the configuration, and what driver and host hear of each other.

use super::stats::entries;
use super::*;
use crate::virtio::device::{INTERRUPT_CONFIG, INTERRUPT_USED_RING, VirtioDevice};
use crate::virtio::queue::driver::USED;

#[test]
fn queues_are_taken_by_the_features_and_a_missing_one_is_named() {
    let rig = Rig::new(INFLATE);
    for (features, count, missing) in [
        (0, 1, Some("deflate")),
        (0, 2, None),
        (FEATURE_STATS, 2, Some("statistics")),
        (FEATURE_STATS, 3, None),
        (FEATURE_REPORTING, 2, Some("reporting")),
        (FEATURE_REPORTING, 3, None),
        (FEATURE_STATS | FEATURE_REPORTING, 3, Some("reporting")),
        (FEATURE_STATS | FEATURE_REPORTING, 4, None),
        (FEATURE_STATS | FEATURE_REPORTING, 5, None),
    ] {
        let queue = || ActiveQueue {
            queue: idle_queue(&rig.memory),
            kick: Arc::new(eventfd()),
        };
        let service = rig.device.service(Activation {
            ram: rig.memory.ram(),
            interrupt: rig.interrupt.clone(),
            queues: (0..count).map(|_| queue()).collect(),
            features,
        });
        let named = service.err().map(|error| error.to_string());
        match (missing, named) {
            (None, None) => {}
            (Some(name), Some(error)) if error.contains(name) => {}
            (_, named) => panic!("features {features}, {count} queues: {named:?}"),
        }
    }
    assert_eq!(rig.device.required_queues(), 2);
    assert!(rig.device.queue_sizes().iter().all(|size| *size >= 32));
}

#[test]
fn the_configuration_has_target_and_actual_and_zeros_beyond() {
    let mut rig = Rig::new(INFLATE);
    rig.host.set_target(MIB).expect("a target");
    rig.device.write_config(4, &200_u32.to_le_bytes());
    let read = |device: &Balloon, offset| {
        let mut bytes = [0xee; 4];
        device.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    for (offset, expected) in [(0, 256), (4, 200), (8, 0), (12, 0), (9, 0), (u64::MAX, 0)] {
        assert_eq!(read(&rig.device, offset), expected, "{offset}");
    }
    assert_eq!(rig.host.stats().actual_bytes, 200 * PAGE_BYTES);
    for (offset, data) in [
        (0, &[1, 1, 1, 1][..]),
        (4, &[1]),
        (4, &[1; 8]),
        (5, &[1; 4]),
        (8, &[1; 4]),
        (u64::MAX, &[1; 4]),
    ] {
        rig.device.write_config(offset, data);
        assert_eq!((read(&rig.device, 0), read(&rig.device, 4)), (256, 200));
    }
    rig.device.write_config(4, &u32::MAX.to_le_bytes());
    assert_eq!(rig.host.stats().actual_bytes, rig.memory.size());
    assert_eq!((rig.device.kind(), rig.device.device_id()), ("balloon", 5));
    assert_eq!(rig.device.features() & 0xff, 0b10_0111);
}

#[test]
fn a_target_that_cannot_be_is_refused_with_the_figure() {
    let rig = Rig::new(INFLATE);
    rig.host.set_target(3 * MIB).expect("all of it");
    for (bytes, text) in [
        (1, "multiple of 4096"),
        (3 * MIB + PAGE_BYTES, "has 3 MiB"),
        (1 << 50, "has 3 MiB"),
        (u64::MAX, "multiple of 4096"),
    ] {
        let error = rig.host.set_target(bytes).expect_err("refused");
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(rig.host.stats().target_bytes, 3 * MIB);
}

#[test]
fn the_device_serves_in_the_event_loop_between_activation_and_reset() {
    let mut rig = Rig::new(STATS);
    let soon = |what: &str, done: &mut dyn FnMut() -> bool| {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "no {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    for round in 0..2_u64 {
        let mut driver = Driver::new((*rig.memory.ram().memory()).clone(), 128);
        driver.write(USED, 0_u32);
        driver.write(AVAILABLE, 0_u32);
        // As Linux does, before DRIVER_OK; its kick is lost.
        driver.fill(DATA, &entries(&[(4, 50 + round)]));
        driver.chain(&[(DATA, 10, false)]);
        rig.device
            .activate(activation(
                &rig.memory,
                &driver,
                STATS,
                &rig.kick,
                &rig.interrupt,
            ))
            .expect("activated");
        let host = rig.host.clone();
        soon("statistics", &mut || host.stats().guest.is_some());
        assert!(host.stats().driver);
        rig.host.refresh();
        soon("used buffer", &mut || driver.used().is_some());
        rig.interrupt.acknowledge(INTERRUPT_USED_RING);
        let generation = rig.interrupt.generation();
        rig.host.set_target(PAGE_BYTES * (round + 1)).expect("set");
        assert_eq!(rig.interrupt.status(), INTERRUPT_CONFIG);
        assert_ne!(rig.interrupt.generation(), generation);
        // The guest reads it without asking.
        let mut shown = [0; 8];
        rig.interrupt.page().read(0x100, &mut shown);
        assert_eq!(shown[..4], (round as u32 + 1).to_le_bytes());
        rig.device.write_config(4, &7_u32.to_le_bytes());

        let watch = rig.host.watch();
        rig.device.reset();
        assert!(watch.has_changed().expect("it goes on"));
        let stats = rig.host.stats();
        assert_eq!((stats.driver, stats.guest), (false, None));
        assert_eq!(stats.actual_bytes, 0);
        assert_eq!(stats.target_bytes, PAGE_BYTES * (round + 1), "it stays");
        driver.chain(&[(DATA, 10, false)]);
        rig.kick.write(1).expect("a kick");
        rig.host.refresh();
        rig.interrupt.reset();
        rig.host.set_target(0).expect("set");
        rig.host.set_target(PAGE_BYTES * (round + 1)).expect("set");
        assert_eq!(rig.interrupt.status(), 0, "no driver is told");
        assert_eq!(driver.used(), None, "the device is stopped");
        let _ = rig.kick.read();
    }
}
