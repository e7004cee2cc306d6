//! The guest-physical address map and the interrupt lines, as constants and pure functions.
//!
//! ```text
//! 0            RAM; what boots the guest is below 1 MiB
//! 3 GiB        hole: windows at 0xD000_0000, IOAPIC, LAPIC, KVM's own pages
//! 4 GiB        RAM again, if there is more than 3 GiB
//! ```

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;
/// A page of guest memory.
pub const PAGE: u64 = 4096;

/// RAM from 0 ends here at the latest.
pub const HOLE_START: u64 = 3 * GIB;
/// RAM goes on here.
pub const HOLE_END: u64 = 4 * GIB;

/// `hvm_start_info` (PVH start of day structure).
pub const START_INFO: u64 = 0x6000;
/// The start information's list of modules (one: the initrd).
pub const MODULE_LIST: u64 = 0x6800;
/// The start information's memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Linux on x86 takes this many bytes, the terminating zero included (COMMAND_LINE_SIZE).
pub const CMDLINE_SIZE: usize = 2048;
/// Conventional memory ends here.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first.
pub const ACPI_START: u64 = 0xe_0000;
/// Where a processor begins after a reset, seen from real mode; ACPI tables end before it.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of what is reserved below 1 MiB; RAM for the guest's use goes on here.
pub const HIGH_RAM_START: u64 = MIB;

/// The first virtio-mmio window.
pub const WINDOW_BASE: u64 = 0xd000_0000;
/// Size and distance of the windows.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Windows at most: the 24 lines of the IOAPIC less those below [`WINDOW_GSI`].
pub const MAX_WINDOWS: u8 = 18;
/// Registers of what is plugged by ACPI.
pub const HOTPLUG_BASE: u64 = 0xd010_0000;
/// IOAPIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// LAPIC registers.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM takes on Intel hosts for a task state segment.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// A page that KVM takes on Intel hosts for an identity-mapped page table.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Interrupt line of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt line of the Generic Event Device.
pub const GED_GSI: u32 = 5;
/// Interrupt line of window 0.
pub const WINDOW_GSI: u32 = 6;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// pvpanic.
pub const PVPANIC_PORT: u16 = 0x505;
/// Sleep control register (ACPI 6.5 section 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset register (ACPI 6.5 section 4.8.3.6).
pub const RESET_PORT: u16 = 0x602;
/// Written to [`RESET_PORT`] to reset.
pub const RESET_VALUE: u8 = 1;
/// Phase port: the guest marks how far it is.
pub const PHASE_PORT: u16 = 0x680;
/// Command and status of the keyboard controller; only its reset command is known.
pub const I8042_PORT: u16 = 0x64;

/// Guest-physical address of a window.
pub const fn window_address(window: u8) -> u64 {
    WINDOW_BASE + window as u64 * WINDOW_SIZE
}

/// Interrupt line of a window.
pub const fn window_gsi(window: u8) -> u32 {
    WINDOW_GSI + window as u32
}

/// The pieces of RAM for a size in bytes, as (base, length), lowest first.
///
/// ```
/// # use nacre_vmm::memory::layout::{GIB, ram};
/// assert_eq!(ram(GIB), vec![(0, GIB)]);
/// assert_eq!(ram(4 * GIB), vec![(0, 3 * GIB), (4 * GIB, GIB)]);
/// ```
pub fn ram(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE_START {
        vec![(0, size)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)]
    }
}

/// Memory that is plugged begins and ends at multiples of this: the largest memory block of x86-64 Linux.
pub const PLUG_ALIGNMENT: u64 = 2 * GIB;

/// The first guest-physical address that memory may be plugged at, for RAM of a size in bytes at boot.
///
/// ```
/// # use nacre_vmm::memory::layout::{GIB, plug_start};
/// assert_eq!(plug_start(GIB), 4 * GIB);
/// assert_eq!(plug_start(4 * GIB), 6 * GIB);
/// ```
pub fn plug_start(boot: u64) -> u64 {
    let end = ram(boot).last().map_or(0, |&(base, length)| base + length);
    end.max(HOLE_END).next_multiple_of(PLUG_ALIGNMENT)
}

/// The first address behind the RAM below the hole.
pub fn low_ram_end(size: u64) -> u64 {
    size.min(HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram(HOLE_START), vec![(0, HOLE_START)]);
        assert_eq!(
            ram(HOLE_START + PAGE),
            vec![(0, HOLE_START), (HOLE_END, PAGE)]
        );
        for mib in [1, 3071, 3072, 3073, 100_000] {
            let pieces = ram(mib * MIB);
            assert_eq!(pieces.iter().map(|piece| piece.1).sum::<u64>(), mib * MIB);
        }
    }

    #[test]
    fn windows_are_in_the_hole_and_have_lines_of_the_ioapic() {
        let last = MAX_WINDOWS - 1;
        assert!(window_address(0) >= HOLE_START);
        assert!(window_address(last) + WINDOW_SIZE <= u64::from(IOAPIC));
        assert_eq!(window_gsi(last), 23);
    }
}
