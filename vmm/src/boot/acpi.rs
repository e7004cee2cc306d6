//! The machine described in ACPI tables (ACPI 6.5), hardware-reduced: RSDP, XSDT, FADT, MADT, DSDT.
//!
//! There is no PCI bus, timer chip, keyboard controller or real-time clock, and the tables say so,
//! which spares the guest looking for them.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, MethodCall, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::Error;
use crate::hotplug::aml::{EVENT_METHOD, slots};
use crate::hotplug::memory::Area;
use crate::memory::layout::{
    ACPI_START, GED_GSI, IOAPIC, LAPIC, PVPANIC_PORT, RESET_PORT, RESET_VALUE, RESET_VECTOR,
    SERIAL_GSI, SERIAL_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, WINDOW_SIZE, window_address,
    window_gsi,
};
use crate::platform::power::S5_SLEEP_TYPE;

const OEM_ID: [u8; 6] = *b"NACRE ";
const OEM_TABLE: [u8; 8] = *b"NACREVMM";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (section 5.2.9.3): no VGA, no MSI (there is no PCI), no CMOS clock; the bit for
/// a keyboard controller is not set either.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 3 | 1 << 5;

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// vCPUs that are there at boot.
    pub vcpus: u8,
    /// vCPUs that may come to be, those at boot included.
    pub max_vcpus: u8,
    /// virtio-mmio windows, spare ones included.
    pub windows: u8,
    /// Units of ACPI memory that may come to be.
    pub memory: Area,
}

impl Machine {
    /// Whether anything is plugged by notifications.
    fn has_slots(&self) -> bool {
        self.max_vcpus > self.vcpus || self.memory.units > 0
    }
}

/// The tables as one block to be written at [`ACPI_START`], where the RSDP is.
///
/// # Errors
///
/// [`Error::AcpiSize`] if they do not fit below 1 MiB.
pub fn tables(machine: &Machine) -> Result<Vec<u8>, Error> {
    let mut block = Block {
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = block.append(&dsdt(machine));
    let fadt = block.append(&fadt(dsdt));
    let madt = block.append(&madt(machine));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = block.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    let mut bytes = block.bytes;
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if bytes.len() as u64 > RESET_VECTOR - ACPI_START {
        return Err(Error::AcpiSize(bytes.len()));
    }
    Ok(bytes)
}

/// Tables one after another, each at a multiple of 16 bytes.
struct Block {
    bytes: Vec<u8>,
}

impl Block {
    /// Appends a table and says where in guest memory it is.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes);
        ACPI_START + start as u64
    }
}

/// A one-byte register in port space.
fn register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = register(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = register(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

fn madt(machine: &Machine) -> impl Aml {
    // Flags stay 0: PCAT_COMPAT would announce the PIC that KVM's irqchip brings along.
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC),
    );
    for index in 0..machine.max_vcpus.max(machine.vcpus) {
        let status = if index < machine.vcpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        madt.add_structure(ProcessorLocalApic::new(index, index, status));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

/// An edge-triggered, active-high line that is not shared.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(machine: &Machine) -> impl Aml + use<> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE, OEM_REVISION);
    let mut code = Vec::new();

    Name::new("_S5_".into(), &Package::new(vec![&S5_SLEEP_TYPE, &0u8])).to_aml_bytes(&mut code);

    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &edge(SERIAL_GSI),
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut code);

    Device::new(
        "_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1)]),
            ),
        ],
    )
    .to_aml_bytes(&mut code);

    let call = MethodCall::new(EVENT_METHOD.into(), vec![]);
    let events: Vec<&dyn Aml> = if machine.has_slots() {
        vec![&call]
    } else {
        vec![]
    };
    Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(GED_GSI)])),
            &Method::new("_EVT".into(), 1, true, events),
        ],
    )
    .to_aml_bytes(&mut code);

    let windows: Vec<Vec<u8>> = (0..machine.windows).map(window).collect();
    let bodies: Vec<Raw<'_>> = windows.iter().map(|bytes| Raw(bytes)).collect();
    Scope::new(
        "_SB_".into(),
        bodies.iter().map(|body| body as &dyn Aml).collect(),
    )
    .to_aml_bytes(&mut code);

    if machine.has_slots() {
        code.extend(slots(machine.max_vcpus.max(machine.vcpus), machine.memory));
    }
    dsdt.append_slice(&code);
    dsdt
}

/// AML that has been written already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.0);
    }
}

/// A virtio-mmio window as a device of its own.
fn window(index: u8) -> Vec<u8> {
    let mut code = Vec::new();
    Device::new(
        aml::Path::new(&format!("VM{index:02X}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window_address(index) as u32, WINDOW_SIZE as u32),
                    &edge(window_gsi(index)),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut code);
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hotplug::memory::MAX_UNITS;
    use crate::memory::layout::MAX_WINDOWS;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
    }

    /// The table at a guest-physical address, its checksum checked.
    fn table(block: &[u8], address: u64) -> &[u8] {
        let bytes = &block[(address - ACPI_START) as usize..];
        let bytes = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(bytes), 0, "{:?}", std::str::from_utf8(&bytes[..4]));
        bytes
    }

    #[test]
    fn the_tables_lead_to_each_other() {
        for (vcpus, max_vcpus, windows, units) in [
            (1, 1, 1, 0),
            (2, 8, 8, 4),
            (254, 254, MAX_WINDOWS, 0),
            (1, 254, MAX_WINDOWS, MAX_UNITS),
        ] {
            let block = tables(&Machine {
                vcpus,
                max_vcpus,
                windows,
                memory: Area {
                    base: 4 << 30,
                    unit: 128 << 20,
                    units,
                },
            })
            .expect("fits");
            assert_eq!(&block[..8], b"RSD PTR ");
            assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
            let xsdt = table(&block, u64_at(&block, 24));
            assert_eq!(&xsdt[..4], b"XSDT");
            let fadt = table(&block, u64_at(xsdt, 36));
            assert_eq!(&fadt[..4], b"FACP");
            let flags = u32_at(fadt, 112);
            assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
            assert_ne!(flags & 1 << 10, 0, "reset register");
            assert_eq!(u64_at(fadt, 116 + 4), u64::from(RESET_PORT));
            assert_eq!(fadt[128], RESET_VALUE);
            assert_eq!(u64_at(fadt, 244 + 4), u64::from(SLEEP_CONTROL_PORT));
            assert_eq!(u64_at(fadt, 256 + 4), u64::from(SLEEP_STATUS_PORT));
            let dsdt = table(&block, u64_at(fadt, 140));
            let count = dsdt.windows(8).filter(|name| name == b"LNRO0005").count();
            assert_eq!(count, usize::from(windows));
            for name in [&b"QEMU0001"[..], b"ACPI0013", b"_S5_"] {
                assert!(dsdt.windows(name.len()).any(|part| part == name));
            }
            let count = |id: &[u8]| dsdt.windows(id.len()).filter(|name| *name == id).count();
            let processors = if max_vcpus > vcpus || units > 0 {
                max_vcpus
            } else {
                0
            };
            assert_eq!(count(b"ACPI0007"), usize::from(processors));
            assert_eq!(
                count(b"HPSL"),
                2 * usize::from(processors) + 2 * usize::from(units)
            );
            let madt = table(&block, u64_at(xsdt, 44));
            assert_eq!(&madt[..4], b"APIC");
            assert_eq!(u32_at(madt, 40), 0, "no PCAT_COMPAT");
            let cpus: Vec<&[u8]> = madt[44..].chunks(8).take(usize::from(max_vcpus)).collect();
            for (index, cpu) in cpus.iter().enumerate() {
                assert_eq!(&cpu[..4], [0, 8, index as u8, index as u8]);
                let online = u32_at(cpu, 4);
                assert_eq!(online, if index < usize::from(vcpus) { 1 } else { 2 });
            }
        }
    }
}
