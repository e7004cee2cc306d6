//! The registers as a guest sees them, well-behaved or not, over slots without KVM.

use std::collections::BTreeMap;
use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::SMALLEST_UNIT;
use super::registers::{CPUS, FETCH, LENGTH, MEMORY, OST_EVENT, OST_STATUS, SLOT_BYTES};
use super::*;
use crate::bus::BusDevice;
use crate::memory::slots::{SlotAllocator, SlotId};

/// Slot numbers, and the base and length in each.
type Table = (SlotAllocator, BTreeMap<SlotId, (u64, u64)>);

/// Memory that is only written down. What is at `no_add` cannot be made, and what is at `no_remove` not be taken away.
struct Regions {
    table: Mutex<Table>,
    no_add: Option<u64>,
    no_remove: Option<u64>,
}

impl Regions {
    fn bases(&self) -> Vec<u64> {
        let table = self.table.lock().expect("lock");
        table.1.values().map(|(base, _)| *base).collect()
    }
}

impl super::memory::Regions for Regions {
    fn add(&self, base: u64, size: u64) -> Result<SlotId, crate::memory::Error> {
        let why = "stubborn".to_owned();
        if self.no_add == Some(base) {
            return Err(crate::memory::Error::Map { base, size, why });
        }
        let mut table = self.table.lock().expect("lock");
        let slot = table.0.allocate().expect("slots");
        table.1.insert(slot, (base, size));
        Ok(slot)
    }

    fn remove(&self, slot: SlotId) -> Result<(), crate::memory::Error> {
        let mut table = self.table.lock().expect("lock");
        let (base, _) = table.1[&slot];
        if self.no_remove == Some(base) {
            return Err(crate::memory::Error::Empty(slot));
        }
        table.1.remove(&slot);
        table.0.free(slot);
        Ok(())
    }
}

struct Bench {
    plugs: Plugs,
    regions: Arc<Regions>,
    line: EventFd,
    guest: Arc<Registers>,
}

const BASE: u64 = 4 << 30;
const UNIT: u64 = SMALLEST_UNIT;

/// Four vCPUs of which one is there, and four units of memory.
fn bench_with(no_add: Option<u64>, no_remove: Option<u64>) -> Bench {
    let regions = Arc::new(Regions {
        table: Mutex::new((SlotAllocator::new(64), BTreeMap::new())),
        no_add,
        no_remove,
    });
    let line = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let area = Area {
        base: BASE,
        unit: UNIT,
        units: 4,
    };
    let plugs = Plugs::new(
        4,
        area,
        Arc::clone(&regions) as Arc<dyn super::memory::Regions>,
        EventLine::new(line.try_clone().expect("a clone")),
        &Changes::default(),
    );
    plugs.cpus().occupy(0, Arc::default());
    let guest = plugs.registers();
    Bench {
        plugs,
        regions,
        line,
        guest,
    }
}

fn bench() -> Bench {
    bench_with(None, None)
}

impl Bench {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.guest.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.guest.write(offset, &value.to_le_bytes());
    }

    fn eject(&self, kind: u64, index: u64) {
        self.write(kind + index * SLOT_BYTES, 1);
    }

    fn report(&self, kind: u64, index: u64, event: u32, status: u32) {
        self.write(kind + index * SLOT_BYTES + OST_EVENT, event);
        self.write(kind + index * SLOT_BYTES + OST_STATUS, status);
    }

    /// Whether the line was raised since the last look.
    fn raised(&self) -> bool {
        self.line.read().is_ok()
    }

    fn plug_vcpu(&self) -> Result<u8, Error> {
        let index = self.plugs.cpus().vacancy()?;
        self.plugs.plug_vcpu(index, Arc::default())?;
        Ok(index)
    }

    fn cpu(&self, index: u8) -> State {
        self.plugs.cpus().view(index).expect("a slot").state
    }
}

const CPU_CHECK: u32 = 1 << 24 | 1;
const CPU_EJECT: u32 = 1 << 24 | 3;
const MEMORY_CHECK: u32 = 2 << 24 | 1;
const MEMORY_EJECT: u32 = 2 << 24 | 3;

#[test]
fn a_vcpu_comes_and_goes_and_its_slot_is_used_again() {
    let bench = bench();
    assert_eq!(bench.read(FETCH), 0);
    for _ in 0..3 {
        assert!(!bench.raised());
        assert_eq!(bench.read(CPUS + SLOT_BYTES), 0);
        assert_eq!(bench.plug_vcpu().expect("room"), 1);
        assert!(bench.raised());
        assert_eq!(bench.read(CPUS + SLOT_BYTES), 0xf);
        assert_eq!(bench.read(FETCH), CPU_CHECK | 1 << 8);
        assert_eq!(bench.read(FETCH), 0, "once is enough");
        bench.report(CPUS, 1, 1, 0);
        bench.plugs.ask_vcpu(1).expect("there");
        assert!(bench.raised());
        assert_eq!(bench.read(FETCH), CPU_EJECT | 1 << 8);
        assert_eq!(bench.cpu(1), State::Leaving);
        bench.eject(CPUS, 1);
        assert_eq!(bench.cpu(1), State::Empty);
        assert_eq!(bench.guest.unasked(), 0);
    }
}

#[test]
fn memory_comes_whole_and_goes_unit_by_unit() {
    let bench = bench();
    let units = bench.plugs.plug_memory(3 * UNIT).expect("room");
    let bases: Vec<u64> = units.iter().map(|unit| unit.base).collect();
    assert_eq!(bases, [BASE, BASE + UNIT, BASE + 2 * UNIT]);
    assert_eq!(bench.regions.bases(), bases);
    for index in 0..3 {
        assert_eq!(bench.read(FETCH), MEMORY_CHECK | index << 8);
        assert_eq!(bench.read(MEMORY + u64::from(index) * SLOT_BYTES), 0xf);
    }
    assert_eq!(bench.read(MEMORY + 3 * SLOT_BYTES), 0);
    bench.plugs.ask_memory(1).expect("there");
    assert_eq!(bench.read(FETCH), MEMORY_EJECT | 1 << 8);
    bench.eject(MEMORY, 1);
    assert_eq!(bench.regions.bases(), [BASE, BASE + 2 * UNIT]);
    // The hole is filled first.
    let units = bench.plugs.plug_memory(2 * UNIT).expect("room");
    let bases: Vec<u64> = units.iter().map(|unit| unit.base).collect();
    assert_eq!(bases, [BASE + UNIT, BASE + 3 * UNIT]);
}

#[test]
fn what_cannot_be_plugged_is_refused_with_the_figures_and_nothing_has_changed() {
    let bench = bench();
    for (bytes, words) in [
        (0, "in units of 128 MiB"),
        (
            UNIT / 2,
            "64 MiB of memory: it is plugged as ACPI memory in units of 128 MiB",
        ),
        (
            5 * UNIT,
            "cannot plug 640 MiB: 4 of 4 ACPI memory units of 128 MiB are free",
        ),
    ] {
        let error = bench.plugs.plug_memory(bytes).expect_err("refused");
        assert!(error.to_string().contains(words), "{error}");
    }
    for _ in 1..4 {
        bench.plug_vcpu().expect("room");
    }
    let error = bench.plug_vcpu().expect_err("full").to_string();
    assert!(error.contains("all 4 that this VM may have"), "{error}");
    assert!(bench.regions.bases().is_empty());
}

#[test]
fn memory_that_the_host_cannot_make_takes_back_what_came_before_it() {
    let bench = bench_with(Some(BASE + 2 * UNIT), None);
    let error = bench.plugs.plug_memory(3 * UNIT).expect_err("no third");
    assert!(error.to_string().contains("stubborn"), "{error}");
    assert!(bench.regions.bases().is_empty());
    assert_eq!(bench.read(FETCH), 0);
    assert!(!bench.raised());
    bench.plugs.plug_memory(2 * UNIT).expect("two are possible");
}

#[test]
fn ejected_memory_that_cannot_be_taken_away_stays_in_its_slot() {
    let bench = bench_with(None, Some(BASE));
    bench.plugs.plug_memory(UNIT).expect("room");
    assert_eq!(bench.read(FETCH), MEMORY_CHECK);
    bench.plugs.ask_memory(0).expect("there");
    assert_eq!(bench.read(FETCH), MEMORY_EJECT);
    bench.eject(MEMORY, 0);
    assert_eq!(
        bench.plugs.memory().view(0).expect("a slot").slot.state,
        State::Leaving
    );
    assert_eq!(bench.regions.bases(), [BASE]);
}

#[test]
fn the_boot_vcpu_stays_whatever_is_written() {
    let bench = bench();
    assert!(matches!(bench.plugs.ask_vcpu(0), Err(Error::BootCpu)));
    bench.eject(CPUS, 0);
    assert_eq!(bench.cpu(0), State::Present);
    assert_eq!(bench.guest.unasked(), 1);
}

#[test]
fn ejects_that_nobody_asked_for_are_counted_and_take_what_the_guest_knew_of() {
    let bench = bench();
    bench.plug_vcpu().expect("room");
    bench.plugs.plug_memory(UNIT).expect("room");
    for (kind, slots) in [(CPUS, [0, 1, 2, 255]), (MEMORY, [0, 1, 3, 255])] {
        for slot in slots {
            bench.eject(kind, slot);
        }
    }
    assert_eq!(bench.guest.unasked(), 8);
    assert_eq!(bench.cpu(1), State::Announced);
    assert_eq!(bench.regions.bases(), [BASE]);
    // Of what its kernel knows it has let go by then.
    while bench.read(FETCH) != 0 {}
    bench.eject(CPUS, 1);
    bench.eject(MEMORY, 0);
    assert_eq!(bench.guest.unasked(), 10);
    assert_eq!(bench.cpu(1), State::Empty);
    assert!(bench.regions.bases().is_empty());
    // Both are plugged again.
    assert_eq!(bench.plug_vcpu().expect("room"), 1);
    bench.plugs.plug_memory(UNIT).expect("room");
    assert_eq!(bench.regions.bases(), [BASE]);
}

#[test]
fn what_is_ejected_counts_as_under_way_until_the_guest_reports_the_end() {
    let bench = bench();
    bench.plug_vcpu().expect("room");
    bench.plugs.plug_memory(UNIT).expect("room");
    while bench.read(FETCH) != 0 {}
    bench.plugs.ask_vcpu(1).expect("there");
    bench.plugs.ask_memory(0).expect("there");
    while bench.read(FETCH) != 0 {}
    assert_eq!(bench.plugs.ejecting_since(), None);
    bench.eject(CPUS, 1);
    bench.eject(MEMORY, 0);
    // A slot that is known to be empty, a report of something else, and one that it goes on.
    bench.eject(MEMORY, 1);
    bench.report(CPUS, 1, 1, 0);
    bench.report(CPUS, 1, 3, 0x84);
    let both = bench.plugs.ejecting_since().expect("both");
    bench.report(MEMORY, 0, 3, 0);
    let one = bench.plugs.ejecting_since().expect("the vCPU");
    assert!(one < both);
    bench.report(CPUS, 1, 0x103, 0);
    assert_eq!(bench.plugs.ejecting_since(), None);
    // So it is where something else is plugged in its place.
    bench.plug_vcpu().expect("room");
    while bench.read(FETCH) != 0 {}
    bench.eject(CPUS, 1);
    assert!(bench.plugs.ejecting_since().is_some());
    bench.plug_vcpu().expect("room");
    assert_eq!(bench.plugs.ejecting_since(), None);
}

#[test]
fn a_request_that_is_repeated_is_not_lost_by_the_answer_to_the_first() {
    let bench = bench();
    bench.plug_vcpu().expect("room");
    while bench.read(FETCH) != 0 {}
    bench.plugs.ask_vcpu(1).expect("there");
    assert_eq!(bench.read(FETCH), CPU_EJECT | 1 << 8);
    // The host has waited for long enough, and asks again; the guest is told twice, refuses once, and then does it.
    bench.plugs.ask_vcpu(1).expect("still there");
    assert_eq!(bench.read(FETCH), CPU_EJECT | 1 << 8);
    bench.report(CPUS, 1, 3, 0x82);
    assert_eq!(bench.cpu(1), State::Present);
    bench.eject(CPUS, 1);
    assert_eq!(bench.cpu(1), State::Empty);
    // So it is where the second request comes to the guest after its answer to the first.
    bench.plug_vcpu().expect("room");
    while bench.read(FETCH) != 0 {}
    bench.plugs.ask_vcpu(1).expect("there");
    assert_eq!(bench.read(FETCH), CPU_EJECT | 1 << 8);
    bench.plugs.ask_vcpu(1).expect("still there");
    bench.report(CPUS, 1, 3, 0x82);
    assert_eq!(bench.cpu(1), State::Asked);
    assert_eq!(bench.read(FETCH), CPU_EJECT | 1 << 8);
    bench.eject(CPUS, 1);
    assert_eq!(bench.cpu(1), State::Empty);
}

#[test]
fn a_refused_eject_leaves_the_slot_present_with_its_cause() {
    let bench = bench();
    bench.plug_vcpu().expect("room");
    assert_eq!(bench.read(FETCH), CPU_CHECK | 1 << 8);
    bench.plugs.ask_vcpu(1).expect("there");
    // Before it has fetched the request its words count for nothing but words.
    bench.report(CPUS, 1, 3, 0x82);
    assert_eq!(bench.cpu(1), State::Asked);
    assert_eq!(bench.read(FETCH), CPU_EJECT | 1 << 8);
    bench.report(CPUS, 1, 0x103, 0x84);
    assert_eq!(bench.cpu(1), State::Leaving, "it goes on");
    bench.report(CPUS, 1, 3, 0x82);
    let view = bench.plugs.cpus().view(1).expect("a slot");
    assert_eq!(view.state, State::Present);
    let report = view.ost.expect("a report");
    assert!(report.refuses_eject() && report.to_string().contains("busy"));
    bench.plugs.ask_vcpu(1).expect("again");
    assert_eq!(
        bench.plugs.cpus().view(1).expect("a slot").ost,
        None,
        "the old word is forgotten"
    );
}

#[test]
fn what_the_guest_has_not_noticed_can_be_taken_back() {
    let bench = bench();
    bench.plug_vcpu().expect("room");
    bench.plugs.plug_memory(UNIT).expect("room");
    bench.plugs.cpus().withdraw(1).expect("not noticed");
    bench.plugs.memory().withdraw(0).expect("not noticed");
    assert_eq!(bench.read(FETCH), 0);
    assert!(bench.regions.bases().is_empty());
    bench.plug_vcpu().expect("room");
    assert_eq!(bench.read(FETCH), CPU_CHECK | 1 << 8);
    let error = bench.plugs.cpus().withdraw(1).expect_err("noticed");
    assert!(
        error
            .to_string()
            .contains("cannot withdraw vCPU 1: it is present"),
        "{error}"
    );
    bench.plugs.ask_vcpu(1).expect("there");
    bench.plugs.cpus().withdraw(1).expect("not noticed");
    assert_eq!(bench.cpu(1), State::Present);
    assert_eq!(bench.read(FETCH), 0);
}

#[test]
fn an_eject_that_the_guest_gets_to_late_still_counts() {
    let bench = bench();
    bench.plug_vcpu().expect("room");
    bench.read(FETCH);
    bench.plugs.ask_vcpu(1).expect("there");
    bench.read(FETCH);
    // Asked again, since the first time took too long.
    bench.plugs.ask_vcpu(1).expect("again");
    bench.eject(CPUS, 1);
    assert_eq!(bench.cpu(1), State::Empty);
    assert_eq!(bench.read(FETCH), 0);
}

#[test]
fn accesses_of_odd_sizes_and_places_read_all_ones_and_change_nothing() {
    let bench = bench();
    bench.plug_vcpu().expect("room");
    for size in [1, 2, 3, 8] {
        for offset in [FETCH, CPUS, CPUS + SLOT_BYTES, MEMORY] {
            let mut data = vec![0; size];
            bench.guest.read(offset, &mut data);
            assert_eq!(data, vec![0xff; size], "{size} bytes at {offset:#x}");
            bench.guest.write(offset, &vec![1; size]);
        }
    }
    for offset in [
        1,
        2,
        4,
        0xffc,
        CPUS + 1,
        CPUS + 4,
        CPUS + 12,
        MEMORY + 2,
        LENGTH - 4,
        LENGTH,
        u64::MAX,
    ] {
        assert_eq!(bench.read(offset), u32::MAX, "{offset:#x}");
        bench.write(offset, 1);
    }
    // Slots that there are not are empty; only 1 ejects.
    assert_eq!(
        (
            bench.read(CPUS + 254 * SLOT_BYTES),
            bench.read(MEMORY + 254 * SLOT_BYTES)
        ),
        (0, 0)
    );
    bench.plugs.ask_vcpu(1).expect_err("not noticed yet");
    assert_eq!(bench.read(FETCH), CPU_CHECK | 1 << 8);
    bench.plugs.ask_vcpu(1).expect("noticed");
    for value in [0, 2, 3, u32::MAX] {
        bench.write(CPUS + SLOT_BYTES, value);
    }
    assert_eq!(bench.cpu(1), State::Asked);
}

#[tokio::test]
async fn changes_are_told_to_who_subscribed_before() {
    let changes = Changes::default();
    let mut told = changes.subscribe();
    changes.tell();
    changes.tell();
    told.changed().await.expect("alive");
    assert!(!told.has_changed().expect("alive"), "two are told as one");
}

proptest::proptest! {
    /// Whatever a guest does with its registers, the host's view stays whole: memory is there exactly while its slot is
    /// occupied, and the boot vCPU never leaves.
    #[test]
    fn no_order_of_accesses_and_calls_breaks_the_slots(
        steps in proptest::collection::vec((0u8..9, 0u64..5, proptest::num::u32::ANY), 0..200)
    ) {
        let bench = bench();
        for (what, index, value) in steps {
            let slot = index as u8;
            match what {
                0 => drop(bench.plug_vcpu()),
                1 => drop(bench.plugs.plug_memory(u64::from(value % 3) * UNIT)),
                2 => drop(bench.plugs.ask_vcpu(slot)),
                3 => drop(bench.plugs.ask_memory(slot)),
                4 => drop(bench.plugs.cpus().withdraw(slot)),
                5 => drop(bench.plugs.memory().withdraw(slot)),
                6 => drop(bench.read(FETCH)),
                7 => bench.eject(if value % 2 == 0 { CPUS } else { MEMORY }, index),
                _ => bench.report(if value % 2 == 0 { CPUS } else { MEMORY }, index, value % 5, value >> 8),
            }
            let units: Vec<u64> = bench.plugs.memory().views().iter().map(|unit| unit.base).collect();
            let mut bases = bench.regions.bases();
            bases.sort_unstable();
            proptest::prop_assert_eq!(units, bases);
            proptest::prop_assert_eq!(bench.cpu(0), State::Present);
        }
    }
}
