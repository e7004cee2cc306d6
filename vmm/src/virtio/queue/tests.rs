//! Rings and chains as a hostile driver writes them.

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{
    AVAILABLE, DATA, DESCRIPTORS, Driver, END, GAP, INDIRECT, ISLAND, NEXT, SEAM, USED, WRITE,
    memory,
};
use super::*;
use crate::virtio::device::INTERRUPT_USED_RING;

fn interrupt() -> Interrupt {
    Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"))
}

/// Resolves the first available chain.
fn first(driver: &Driver) -> Result<(u64, u64), ChainError> {
    let mut queue = driver.queue(false);
    let chain = queue
        .iter(&driver.memory)
        .expect("a sound ring")
        .next()
        .expect("a chain");
    Chain::resolve(&driver.memory, chain, driver.size)
        .map(|chain| (chain.readable.len(), chain.writable.len()))
}

#[test]
fn a_descriptor_loop_is_broken_and_returned_empty() {
    let mut driver = Driver::new(memory(), 4);
    for index in 0..4 {
        driver.descriptor(DESCRIPTORS, index, DATA, 1, NEXT, (index + 1) % 4);
    }
    driver.offer(2);
    assert_eq!(first(&driver), Err(ChainError::Broken));
    let mut queue = driver.queue(true);
    let mut called = 0;
    let served = serve(&mut queue, &driver.memory, &interrupt(), 8, |_| {
        called += 1;
        Some(1)
    });
    assert!(matches!(served, Ok(Served::All)));
    assert_eq!((called, driver.used()), (0, Some((2, 0))));
}

#[test]
fn a_chain_that_leads_out_of_the_table_is_broken() {
    let mut driver = Driver::new(memory(), 4);
    driver.descriptor(DESCRIPTORS, 0, DATA, 1, NEXT, 4);
    driver.offer(0);
    assert_eq!(first(&driver), Err(ChainError::Broken));
}

#[test]
fn a_chain_as_long_as_the_queue_is_fine_and_one_longer_is_not() {
    let table = DATA + 0x8000;
    for (count, expected) in [(8, Ok((8, 0))), (9, Err(ChainError::TooLong(8)))] {
        let mut driver = Driver::new(memory(), 8);
        for index in 0..count {
            let flags = if index + 1 < count { NEXT } else { 0 };
            driver.descriptor(table, index, DATA, 1, flags, index + 1);
        }
        driver.descriptor(DESCRIPTORS, 0, table, u32::from(count) * 16, INDIRECT, 0);
        driver.offer(0);
        assert_eq!(first(&driver), expected);
    }
}

#[test]
fn indirect_tables_that_cannot_be_are_broken() {
    let table = DATA + 0x8000;
    let one = |driver: &Driver| driver.descriptor(table, 0, DATA, 8, 0, 0);
    type Setup<'a> = (&'a str, u64, u32, &'a dyn Fn(&Driver));
    let cases: [Setup<'_>; 8] = [
        ("length 0", table, 0, &one),
        ("not a multiple of 16", table, 17, &one),
        ("one byte short", table, 15, &one),
        ("too long", table, u32::MAX - 15, &one),
        ("outside RAM", GAP, 16, &one),
        ("wraps at 2^64", u64::MAX - 15, 32, &one),
        ("nested", table, 16, &|driver| {
            driver.descriptor(table, 0, table, 16, INDIRECT, 0);
        }),
        ("leads out", table, 16, &|driver| {
            driver.descriptor(table, 0, DATA, 8, NEXT, 1);
        }),
    ];
    for (name, address, len, setup) in cases {
        let mut driver = Driver::new(memory(), 8);
        setup(&driver);
        driver.descriptor(DESCRIPTORS, 0, address, len, INDIRECT, 0);
        driver.offer(0);
        let result = first(&driver);
        if name == "too long" {
            // Only what its length says about the count may be wrong: it is 2^28 entries.
            assert!(result.is_err(), "{name}");
        } else {
            assert_eq!(result, Err(ChainError::Broken), "{name}");
        }
    }
    let mut driver = Driver::new(memory(), 8);
    one(&driver);
    driver.descriptor(DESCRIPTORS, 0, table, 16, INDIRECT, 0);
    driver.offer(0);
    assert_eq!(first(&driver), Ok((8, 0)), "a sound one");
}

#[test]
fn buffers_must_lie_in_guest_memory() {
    let ok = |len: u64| Ok((len, 0));
    for (address, len, expected) in [
        (DATA, 16, ok(16)),
        (SEAM - 8, 16, ok(16)),
        (GAP - 16, 16, ok(16)),
        (ISLAND, 1, ok(1)),
        (END - 1, 1, ok(1)),
        (GAP - 8, 16, Err(())),
        (GAP - 1, 2, Err(())),
        (GAP, 1, Err(())),
        (ISLAND - 1, 2, Err(())),
        (END, 1, Err(())),
        (END - 1, 2, Err(())),
        (0xd000_0000, 4, Err(())),
        (u64::MAX - 3, 8, Err(())),
        (u64::MAX, 1, Err(())),
        (GAP - 8, u32::MAX, Err(())),
    ] {
        let mut driver = Driver::new(memory(), 8);
        driver.chain(&[(address, len, false)]);
        let expected = expected.map_err(|()| ChainError::Address { address, len });
        assert_eq!(first(&driver), expected, "{len} at {address:#x}");
    }
}

#[test]
fn an_empty_buffer_counts_nothing_wherever_it_points() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 0, false), (DATA, 3, false), (DATA, 0, true)]);
    assert_eq!(first(&driver), Ok((3, 0)));
}

#[test]
fn more_than_four_gigabytes_in_a_chain_are_refused() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, u32::MAX, false), (DATA, 2, false)]);
    assert!(first(&driver).is_err());
    // Where all of it is in RAM only the sum is wrong.
    let part = 0x8_0000;
    let table = DATA + 0x8000;
    let count = 0x1_0000_0000 / u64::from(part) + 1;
    let mut driver = Driver::new(memory(), 16384);
    for index in 0..count as u16 {
        driver.descriptor(table, index, SEAM, part, NEXT, index + 1);
    }
    driver.descriptor(DESCRIPTORS, 0, table, count as u32 * 16, INDIRECT, 0);
    driver.offer(0);
    assert_eq!(first(&driver), Err(ChainError::Broken));
}

#[test]
fn readable_after_writable_is_refused() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 4, false), (DATA, 4, true), (DATA, 4, false)]);
    assert_eq!(first(&driver), Err(ChainError::Order));
}

#[test]
fn a_header_in_sixteen_descriptors_is_read_whole() {
    let mut driver = Driver::new(memory(), 32);
    let header: Vec<u8> = (1..=16).collect();
    let mut parts = Vec::new();
    for (i, byte) in header.iter().enumerate() {
        let address = DATA + i as u64 * 100;
        driver.fill(address, &[*byte]);
        parts.push((address, 1, false));
    }
    driver.chain(&parts);
    let mut queue = driver.queue(false);
    let served = serve(
        &mut queue,
        &driver.memory,
        &interrupt(),
        8,
        |mut chain: Chain<'_>| {
            let mut read = [0; 16];
            assert_eq!(chain.readable.read_exact(&mut read), Ok(()));
            assert_eq!(read[..], header);
            assert_eq!(chain.readable.read_exact(&mut [0]), Err(Short));
            Some(0)
        },
    );
    assert!(matches!(served, Ok(Served::All)));
}

#[test]
fn writing_fills_across_a_seam_and_stops_at_the_end() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(SEAM - 2, 4, true), (ISLAND, 2, true)]);
    let mut queue = driver.queue(false);
    serve(
        &mut queue,
        &driver.memory,
        &interrupt(),
        8,
        |mut chain: Chain<'_>| {
            let mut front = chain.writable.take(5);
            assert_eq!((front.len(), chain.writable.len()), (5, 1));
            assert_eq!(front.write(b"abcdefgh"), 5);
            assert_eq!(chain.writable.write(b"xyz"), 1);
            assert_eq!(chain.writable.write(b"xyz"), 0);
            Some(6)
        },
    )
    .expect("served");
    assert_eq!(driver.bytes(SEAM - 2, 4), b"abcd");
    assert_eq!(driver.bytes(ISLAND, 2), b"ex");
    assert_eq!(driver.used(), Some((0, 6)));
}

#[test]
fn an_available_index_that_jumps_is_a_broken_ring() {
    for index in [9, 0x8000, u16::MAX] {
        let driver = Driver::new(memory(), 8);
        driver.write(AVAILABLE + 2, index);
        let mut queue = driver.queue(true);
        let result = serve(&mut queue, &driver.memory, &interrupt(), 64, |_| Some(0));
        assert!(matches!(result, Err(RingError::Available(_))), "{index}");
    }
}

#[test]
fn an_available_index_that_goes_back_is_a_broken_ring() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 1, false)]);
    driver.chain(&[(DATA, 1, false)]);
    let mut queue = driver.queue(true);
    serve(&mut queue, &driver.memory, &interrupt(), 64, |_| Some(0)).expect("two chains");
    driver.write(AVAILABLE + 2, 1_u16);
    let result = serve(&mut queue, &driver.memory, &interrupt(), 64, |_| Some(0));
    assert!(matches!(result, Err(RingError::Available(_))));
}

#[test]
fn a_head_outside_the_table_is_a_broken_ring_and_tells_of_what_was_done() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 1, true)]);
    driver.offer(8);
    let mut queue = driver.queue(false);
    let line = interrupt();
    let result = serve(&mut queue, &driver.memory, &line, 64, |_| Some(1));
    assert!(matches!(result, Err(RingError::Used { head: 8, .. })));
    assert_eq!(driver.used(), Some((0, 1)));
    assert_eq!(line.status(), INTERRUPT_USED_RING);
}

#[test]
fn the_budget_bounds_a_turn_and_says_that_there_is_more() {
    let mut driver = Driver::new(memory(), 8);
    for _ in 0..5 {
        driver.chain(&[(DATA, 1, true)]);
    }
    let mut queue = driver.queue(true);
    let turn = |queue: &mut Queue| {
        serve(queue, &driver.memory, &interrupt(), 3, |_| Some(1)).expect("a sound ring")
    };
    assert_eq!(turn(&mut queue), Served::More);
    assert_eq!(turn(&mut queue), Served::All);
    // A storm of kicks without chains costs a look each.
    for _ in 0..1000 {
        assert_eq!(turn(&mut queue), Served::All);
    }
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), 5);
}

#[test]
fn a_chain_that_is_put_back_comes_again() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 1, true)]);
    let mut queue = driver.queue(true);
    let served = serve(&mut queue, &driver.memory, &interrupt(), 8, |_| None);
    assert!(matches!(served, Ok(Served::More)));
    assert_eq!(driver.used(), None);
    serve(&mut queue, &driver.memory, &interrupt(), 8, |_| Some(1)).expect("served");
    assert_eq!(driver.used(), Some((0, 1)));
}

#[test]
fn with_event_idx_the_driver_is_interrupted_when_it_asked_for_it() {
    for (after, expected) in [(0, true), (1, true), (2, false), (100, false)] {
        let mut driver = Driver::new(memory(), 8);
        driver.want_interrupt_after(after);
        driver.chain(&[(DATA, 1, true)]);
        driver.chain(&[(DATA, 1, true)]);
        let line = interrupt();
        let mut queue = driver.queue(true);
        serve(&mut queue, &driver.memory, &line, 8, |_| Some(1)).expect("served");
        assert_eq!(line.status() != 0, expected, "after {after}");
        // The driver is asked to kick for the very next chain.
        assert_eq!(driver.read::<u16>(USED + 4 + 8 * 8), 2);
    }
}

#[test]
fn without_used_chains_there_is_no_interrupt() {
    let driver = Driver::new(memory(), 8);
    let line = interrupt();
    let mut queue = driver.queue(false);
    serve(&mut queue, &driver.memory, &line, 8, |_| Some(1)).expect("nothing to do");
    assert_eq!(line.status(), 0);
}

/// A slot goes away while its ring or its buffers are queued.
#[test]
fn a_ring_or_buffer_in_a_removed_slot_is_refused() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(ISLAND, 1, true)]);
    let (rest, _island) = driver
        .memory
        .remove_region(GuestAddress(ISLAND), END - ISLAND)
        .expect("the island is there");
    let mut queue = driver.queue(false);
    serve(&mut queue, &rest, &interrupt(), 8, |_| Some(1)).expect("the ring is sound");
    assert_eq!(driver.used(), Some((0, 0)));

    driver.chain(&[(DATA, 1, true)]);
    let ringless =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(ISLAND), 0x1000)]).expect("guest memory");
    let result = serve(&mut queue, &ringless, &interrupt(), 8, |_| Some(1));
    assert!(matches!(result, Err(RingError::Available(_))));
}

/// The rings straddle the end of a slot that goes: parts of them can still be reached.
#[test]
fn an_available_ring_that_is_cut_in_two_does_not_spin() {
    let mut driver = Driver::new(memory(), 8);
    driver.chain(&[(DATA, 1, true)]);
    let cut = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), (AVAILABLE + 4) as usize),
        (GuestAddress(USED), 0x1000),
    ])
    .expect("guest memory");
    cut_copy(&driver, &cut);
    let mut queue = driver.queue(true);
    let result = serve(&mut queue, &cut, &interrupt(), 64, |_| Some(1));
    assert!(matches!(result, Err(RingError::Available(_))), "{result:?}");
}

fn cut_copy(driver: &Driver, to: &GuestMemoryMmap) {
    use vm_memory::Bytes;
    let bytes = driver.bytes(AVAILABLE, 4);
    to.write_slice(&bytes, GuestAddress(AVAILABLE))
        .expect("copied");
}

/// A descriptor whose fields are now and then sound.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => DATA..GAP,
        1 => GAP - 64..GAP + 64,
        1 => Just(DATA),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..600_u32, 2 => (0..8_u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(0), 4 => Just(NEXT), 2 => Just(WRITE), 2 => Just(NEXT | WRITE), 2 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![4 => 0..8_u16, 1 => any::<u16>()];
    (address, len, flags, next)
}

proptest! {
    /// Whatever is in the rings: no panic, no more work than the budget, and every chain that
    /// comes through lies in guest memory.
    #[test]
    fn nothing_in_a_ring_upsets_the_device(
        table in prop::collection::vec(descriptor(), 8),
        indirect in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(prop_oneof![6 => 0..8_u16, 1 => any::<u16>()], 0..9),
        index in prop::option::weighted(0.2, any::<u16>()),
        used_event in any::<u16>(),
        event_idx in any::<bool>(),
    ) {
        let mut driver = Driver::new(memory(), 8);
        for (i, &(address, len, flags, next)) in table.iter().enumerate() {
            driver.descriptor(DESCRIPTORS, i as u16, address, len, flags, next);
        }
        for (i, &(address, len, flags, next)) in indirect.iter().enumerate() {
            driver.descriptor(DATA, i as u16, address, len, flags, next);
        }
        for &head in &heads {
            driver.offer(head);
        }
        if let Some(index) = index {
            driver.write(AVAILABLE + 2, index);
        }
        driver.want_interrupt_after(used_event);
        let mut queue = driver.queue(event_idx);
        let mut called = 0;
        let _ = serve(&mut queue, &driver.memory, &interrupt(), 16, |mut chain| {
            called += 1;
            let mut bytes = vec![0; chain.readable.len().min(4096) as usize];
            chain.readable.read_exact(&mut bytes).expect("they are there");
            // Not into the rings: what comes of that is another run.
            Some(chain.writable.len() as u32)
        });
        prop_assert!(called <= heads.len().max(8));
    }
}
