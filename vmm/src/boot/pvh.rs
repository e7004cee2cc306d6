//! The PVH start of day structure (Xen's `hvm_start_info`, version 1): what a kernel finds by the
//! address in ebx – memory map, command line, initrd and RSDP.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Error;
use super::kernel::LoadedInitrd;
use crate::memory::layout::{
    CMDLINE, HIGH_RAM_START, LOW_RAM_END, MEMORY_MAP, MODULE_LIST, START_INFO, ram,
};

/// Writes the structure and all that it points to, the RSDP aside. Its address is [`START_INFO`].
///
/// # Errors
///
/// If guest memory ends before 1 MiB.
pub fn write_start_info(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    cmdline: &str,
    initrd: Option<LoadedInitrd>,
    rsdp: u64,
) -> Result<(), Error> {
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    memory
        .write_slice(&text, GuestAddress(CMDLINE))
        .map_err(|error| Error::Write {
            what: "kernel command line",
            address: CMDLINE,
            why: error.to_string(),
        })?;
    let map = memory_map(memory_size);
    let modules: Vec<hvm_modlist_entry> = initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..hvm_modlist_entry::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULE_LIST },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(|error| Error::Write {
        what: "PVH start information",
        address: START_INFO,
        why: error.to_string(),
    })
}

/// The memory map for RAM of this size: the space below 1 MiB where ACPI tables are is reserved.
fn memory_map(size: u64) -> Vec<hvm_memmap_table_entry> {
    let entry = |start: u64, end: u64, type_: u32| hvm_memmap_table_entry {
        addr: start,
        size: end - start,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, LOW_RAM_END, XEN_HVM_MEMMAP_TYPE_RAM),
        entry(LOW_RAM_END, HIGH_RAM_START, XEN_HVM_MEMMAP_TYPE_RESERVED),
    ];
    for (base, length) in ram(size) {
        let start = base.max(HIGH_RAM_START);
        map.push(entry(start, base + length, XEN_HVM_MEMMAP_TYPE_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{GIB, MIB};

    #[test]
    fn the_map_covers_ram_and_leaves_the_hole() {
        let small: Vec<_> = memory_map(256 * MIB)
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.type_))
            .collect();
        assert_eq!(
            small,
            [
                (0, LOW_RAM_END, 1),
                (LOW_RAM_END, MIB - LOW_RAM_END, 2),
                (MIB, 255 * MIB, 1)
            ]
        );
        let large = memory_map(5 * GIB);
        assert_eq!(large.len(), 4);
        assert_eq!((large[2].addr, large[2].size), (MIB, 3 * GIB - MIB));
        assert_eq!((large[3].addr, large[3].size), (4 * GIB, 2 * GIB));
    }

    #[test]
    fn the_start_information_leads_to_everything() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("memory");
        let initrd = LoadedInitrd {
            address: 0x18_0000,
            size: 99,
        };
        write_start_info(&memory, 2 * MIB, "quiet", Some(initrd), 0xe_0000).expect("fits");
        let read = |address: u64| {
            memory
                .read_obj::<u64>(GuestAddress(address))
                .expect("in memory")
        };
        assert_eq!(read(START_INFO) as u32, 0x336e_c578);
        assert_eq!(read(START_INFO + 12) as u32, 1);
        assert_eq!(read(START_INFO + 16), MODULE_LIST);
        assert_eq!(read(START_INFO + 24), CMDLINE);
        assert_eq!(read(START_INFO + 32), 0xe_0000);
        assert_eq!(read(START_INFO + 40), MEMORY_MAP);
        assert_eq!(read(MODULE_LIST), 0x18_0000);
        assert_eq!(read(MODULE_LIST + 8), 99);
        let mut text = [0; 6];
        memory
            .read_slice(&mut text, GuestAddress(CMDLINE))
            .expect("read");
        assert_eq!(&text, b"quiet\0");
        let tiny = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x7000)]).expect("memory");
        assert!(write_start_info(&tiny, 0x7000, "", None, 0).is_err());
    }
}
