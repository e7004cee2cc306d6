//! What the guest runs: a processor device for each vCPU that may be (ACPI 6.5 section 8.4), a memory device for each unit
//! (section 9.11), and the method that turns what [`super::registers`] holds into notifications.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, BufferData, Device, EISAName, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, MethodCall,
    Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Path, ResourceTemplate, Return, Scope,
    ShiftRight, Store, While, ZERO,
};

use super::memory::Area;
use super::registers::{
    CPUS, FETCH, KIND_CPU, KIND_MEMORY, MEMORY, OST_EVENT, OST_STATUS, SLOT_BYTES, STATUS,
};
use crate::memory::layout::HOTPLUG_BASE;

/// The method that the Generic Event Device's `_EVT` calls, in `\_SB`.
pub const EVENT_METHOD: &str = "HPEV";

const REGION: &str = "HPRG";
const FETCH_FIELD: &str = "HPFE";
const STATUS_FIELD: &str = "HPST";
const OST_EVENT_FIELD: &str = "HPOE";
const OST_STATUS_FIELD: &str = "HPOS";

/// AML of all slots, to be put behind the definitions of other devices.
pub fn slots(vcpus: u8, memory: Area) -> Vec<u8> {
    let mut bodies = vec![fetch_register(), event_method()];
    let mut cpu_cases = Vec::new();
    for index in 0..vcpus {
        bodies.push(cpu(index));
        cpu_cases.push(case("C", index));
    }
    let mut memory_cases = Vec::new();
    for index in 0..memory.units {
        bodies.push(unit(memory, index));
        memory_cases.push(case("M", index));
    }
    bodies.push(notify_method("HPNC", &cpu_cases));
    bodies.push(notify_method("HPNM", &memory_cases));
    let bodies: Vec<Raw> = bodies.into_iter().map(Raw).collect();
    encoded(&Scope::new(
        "_SB_".into(),
        bodies.iter().map(|body| body as &dyn Aml).collect(),
    ))
}

/// AML that has been written already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn encoded(object: &dyn Aml) -> Vec<u8> {
    let mut code = Vec::new();
    object.to_aml_bytes(&mut code);
    code
}

fn all(objects: &[&dyn Aml]) -> Vec<u8> {
    objects.iter().flat_map(|object| encoded(*object)).collect()
}

fn name(letter: &str, index: u8) -> String {
    format!("{letter}{index:03X}")
}

/// A field of 32 bits.
fn word(field: &str) -> FieldEntry {
    let mut name = [b'_'; 4];
    name.copy_from_slice(field.as_bytes());
    FieldEntry::Named(name, 32)
}

/// A region of the registers, with fields of 32 bits from its start.
fn region(name: &str, offset: u64, length: u64, fields: Vec<FieldEntry>) -> Vec<u8> {
    let (start, length) = (HOTPLUG_BASE + offset, length);
    all(&[
        &OpRegion::new(
            name.into(),
            OpRegionSpace::SystemMemory,
            &(start as u32),
            &(length as u32),
        ),
        &Field::new(
            name.into(),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            fields,
        ),
    ])
}

fn fetch_register() -> Vec<u8> {
    region(REGION, FETCH, 4, vec![word(FETCH_FIELD)])
}

/// The registers of one slot, and the methods that every slot has: `_STA`, `_EJ0`, `_OST`.
fn slot(base: u64, index: u8) -> Vec<u8> {
    const _: () = assert!(STATUS == 0 && OST_EVENT == 4 && OST_STATUS == 8);
    let fields = vec![
        word(STATUS_FIELD),
        word(OST_EVENT_FIELD),
        word(OST_STATUS_FIELD),
    ];
    let offset = base + u64::from(index) * SLOT_BYTES;
    let registers = Raw(region("HPSL", offset, SLOT_BYTES, fields));
    all(&[
        &registers,
        &Method::new(
            "_STA".into(),
            0,
            true,
            vec![&Return::new(&Path::new(STATUS_FIELD))],
        ),
        &Method::new(
            "_EJ0".into(),
            1,
            true,
            vec![&Store::new(&Path::new(STATUS_FIELD), &ONE)],
        ),
        &Method::new(
            "_OST".into(),
            3,
            true,
            vec![
                &Store::new(&Path::new(OST_EVENT_FIELD), &Arg(0)),
                &Store::new(&Path::new(OST_STATUS_FIELD), &Arg(1)),
            ],
        ),
    ])
}

/// A processor device. Its `_MAT` is what a MADT would say of it, enabled: Linux looks there when it is plugged.
fn cpu(index: u8) -> Vec<u8> {
    // Processor local APIC structure (section 5.2.12.2).
    let mat = vec![0, 8, index, index, 1, 0, 0, 0];
    encoded(&Device::new(
        Path::new(&name("C", index)),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &index),
            &Name::new("_MAT".into(), &BufferData::new(mat)),
            &Raw(slot(CPUS, index)),
        ],
    ))
}

/// A memory device; its address is fixed.
fn unit(area: Area, index: u8) -> Vec<u8> {
    let base = area.address(index);
    let range = AddressSpace::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        base,
        base + (area.unit - 1),
        None,
    );
    encoded(&Device::new(
        Path::new(&name("M", index)),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C80")),
            &Name::new("_UID".into(), &index),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&range])),
            &Raw(slot(MEMORY, index)),
        ],
    ))
}

/// Notifies the device of one slot if the method's argument is its number.
fn case(letter: &str, index: u8) -> Vec<u8> {
    encoded(&If::new(
        &Equal::new(&Arg(0), &index),
        vec![&Notify::new(&Path::new(&name(letter, index)), &Arg(1))],
    ))
}

fn notify_method(name: &str, cases: &[Vec<u8>]) -> Vec<u8> {
    let cases: Vec<Raw> = cases.iter().cloned().map(Raw).collect();
    encoded(&Method::new(
        name.into(),
        2,
        true,
        cases.iter().map(|case| case as &dyn Aml).collect(),
    ))
}

/// Fetches until nothing waits.
fn event_method() -> Vec<u8> {
    let (word, shifted, index, kind, code) = (Local(0), Local(1), Local(2), Local(3), Local(4));
    let register = Path::new(FETCH_FIELD);
    let fetch = Store::new(&word, &register);
    let shift = ShiftRight::new(&shifted, &word, &8u8);
    let take_index = And::new(&index, &shifted, &0xffu8);
    let take_kind = ShiftRight::new(&kind, &word, &24u8);
    let take_code = And::new(&code, &word, &0xffu8);
    let call = |name: &str| {
        Raw(encoded(&MethodCall::new(
            name.into(),
            vec![&Local(2), &Local(4)],
        )))
    };
    let (to_cpu, to_memory) = (call("HPNC"), call("HPNM"));
    let (cpu_kind, memory_kind) = (KIND_CPU as u8, KIND_MEMORY as u8);
    let is_cpu = Equal::new(&kind, &cpu_kind);
    let is_memory = Equal::new(&kind, &memory_kind);
    encoded(&Method::new(
        EVENT_METHOD.into(),
        0,
        true,
        vec![
            &fetch,
            &While::new(
                &NotEqual::new(&word, &ZERO),
                vec![
                    &shift,
                    &take_index,
                    &take_kind,
                    &take_code,
                    &If::new(&is_cpu, vec![&to_cpu]),
                    &If::new(&is_memory, vec![&to_memory]),
                    &fetch,
                ],
            ),
        ],
    ))
}
