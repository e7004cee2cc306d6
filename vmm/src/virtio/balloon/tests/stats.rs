//! The statistics queue, where the device asks and the driver answers.

use super::*;
use crate::virtio::device::INTERRUPT_USED_RING;

pub(super) fn entries(entries: &[(u16, u64)]) -> Vec<u8> {
    let entry = |(tag, value): &(u16, u64)| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(value.to_le_bytes());
        bytes
    };
    entries.iter().flat_map(entry).collect()
}

#[test]
fn statistics_are_read_by_tag_in_any_order() {
    let all: Vec<(u16, u64)> = (0..12)
        .rev()
        .map(|tag| (tag, u64::from(tag) + 100))
        .collect();
    let whole = GuestStats {
        swap_in: Some(100),
        swap_out: Some(101),
        major_faults: Some(102),
        minor_faults: Some(103),
        free: Some(104),
        total: Some(105),
        available: Some(106),
        caches: Some(107),
        hugetlb_allocations: Some(108),
        hugetlb_failures: Some(109),
    };
    let free = GuestStats {
        free: Some(u64::MAX),
        ..GuestStats::default()
    };
    let mut late = vec![(99, 1); 64];
    late.push((4, 1));
    for (what, bytes, expected) in [
        ("all, and unknown ones", entries(&all), whole),
        ("none", vec![], GuestStats::default()),
        ("twice", entries(&[(4, 1), (4, u64::MAX)]), free),
        (
            "cut short",
            [entries(&[(4, u64::MAX)]), vec![5, 0, 1]].concat(),
            free,
        ),
        ("too many", entries(&late), GuestStats::default()),
    ] {
        let mut rig = Rig::new(STATS);
        rig.driver.fill(DATA, &bytes);
        rig.driver.chain(&[(DATA, bytes.len() as u32, false)]);
        rig.service.turn(STATS);
        let stats = rig.host.stats();
        assert_eq!((stats.guest, stats.samples), (Some(expected), 1), "{what}");
        assert_eq!(rig.driver.used(), None, "it is kept: {what}");
    }
}

#[test]
fn new_statistics_come_when_the_host_asks_and_not_before() {
    let mut rig = Rig::new(STATS);
    rig.service.turn(ASK);
    assert_eq!(rig.host.stats().samples, 0, "nothing is offered yet");
    for sample in 1..5 {
        rig.driver.fill(DATA, &entries(&[(4, sample)]));
        rig.driver.chain(&[(DATA, 10, false)]);
        for _ in 0..10 {
            rig.service.turn(STATS);
        }
        let stats = rig.host.stats();
        assert_eq!(stats.samples, sample);
        assert_eq!(stats.guest.and_then(|guest| guest.free), Some(sample));
        assert_eq!(rig.driver.used(), None);
        rig.service.turn(ASK);
        assert_eq!(rig.driver.used(), Some((sample as u32 - 1, 0)));
        assert_eq!(rig.interrupt.status(), INTERRUPT_USED_RING);
        rig.service.turn(ASK);
        assert_eq!(rig.driver.used(), None);
    }
    assert!(rig.kick.read().is_err(), "nothing spins");
}

#[test]
fn a_driver_that_offers_many_statistics_gets_one_back_for_each_question() {
    let mut rig = Rig::new(STATS);
    for sample in 0..20_u64 {
        let at = DATA + sample * 16;
        rig.driver.fill(at, &entries(&[(4, sample)]));
        rig.driver.chain(&[(at, 10, false)]);
    }
    for _ in 0..100 {
        rig.service.turn(STATS);
    }
    assert_eq!((rig.host.stats().samples, rig.driver.used()), (1, None));
    for sample in 1..20 {
        rig.service.turn(ASK);
        assert_eq!(rig.driver.used(), Some((sample as u32 - 1, 0)));
        let guest = rig.host.stats().guest;
        assert_eq!(guest.and_then(|guest| guest.free), Some(sample));
    }
    assert!(rig.kick.read().is_err(), "nothing spins");
}

#[test]
fn statistics_outside_memory_are_returned_and_the_next_are_read() {
    let mut rig = Rig::new(STATS);
    for _ in 0..BATCH + 1 {
        rig.driver.chain(&[(GAP, 10, false)]);
    }
    rig.driver.fill(DATA, &entries(&[(4, 7)]));
    rig.driver.chain(&[(DATA, 10, false)]);
    rig.service.turn(STATS);
    assert_eq!(rig.host.stats().samples, 0);
    assert_eq!(rig.kick.read().ok(), Some(1), "there is more");
    rig.service.turn(STATS);
    assert_eq!(rig.host.stats().samples, 1);
    assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), BATCH + 1);
}
