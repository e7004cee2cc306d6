//! Kernel and initrd: from their files into guest memory.

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::{self, Elf, KernelLoader, KernelLoaderResult, PvhBootCapability, elf};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Error;
use super::payload;
use crate::memory::layout::{MIB, PAGE};

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Physical address of the PVH entry point.
    pub entry: u64,
    /// First byte behind the kernel, its bss included.
    pub end: u64,
}

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedInitrd {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Loads an ELF `vmlinux`, or the one in a bzImage. RAM that it may use ends at `ram_end`.
///
/// # Errors
///
/// If the file cannot be read, is something else, has no PVH entry point, or does not fit.
pub fn load_kernel(
    path: &Path,
    memory: &GuestMemoryMmap,
    ram_end: u64,
) -> Result<LoadedKernel, Error> {
    let read = |source| Error::Read {
        what: "kernel",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read)?;
    let mut magic = Vec::with_capacity(4);
    (&mut file).take(4).read_to_end(&mut magic).map_err(read)?;
    let loaded = if magic == b"\x7fELF" {
        Elf::load(memory, None, &mut file, None)
    } else {
        file.seek(SeekFrom::Start(0)).map_err(read)?;
        let mut image = Vec::new();
        (&mut file)
            .take(payload::MAX_VMLINUX as u64)
            .read_to_end(&mut image)
            .map_err(read)?;
        if !payload::is_bzimage(&image) {
            return Err(Error::Format(path.to_owned()));
        }
        let vmlinux = payload::unpack_bzimage(&image).map_err(|source| Error::Payload {
            path: path.to_owned(),
            source,
        })?;
        Elf::load(memory, None, &mut Cursor::new(vmlinux), None)
    };
    let failed = |why: String| Error::Load {
        path: path.to_owned(),
        why,
        memory_mib: ram_end / MIB,
    };
    let KernelLoaderResult {
        kernel_end,
        pvh_boot_cap,
        ..
    } = loaded.map_err(|error| {
        failed(match error {
            loader::Error::Elf(elf::Error::ReadKernelImage) => {
                "it is cut short, or larger than the guest's memory".to_owned()
            }
            other => other.to_string(),
        })
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = pvh_boot_cap else {
        return Err(Error::NoPvhEntry(path.to_owned()));
    };
    if kernel_end > ram_end {
        return Err(failed(format!("it needs memory up to {kernel_end:#x}")));
    }
    Ok(LoadedKernel {
        entry: entry.0,
        end: kernel_end,
    })
}

/// Loads an initrd as high below `ram_end` as it goes, behind the kernel.
///
/// # Errors
///
/// If the file cannot be read or does not fit.
pub fn load_initrd(
    path: &Path,
    memory: &GuestMemoryMmap,
    kernel_end: u64,
    ram_end: u64,
) -> Result<LoadedInitrd, Error> {
    let read = |source| Error::Read {
        what: "initrd",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Err(read(std::io::Error::other("it is not a regular file")));
    }
    let size = metadata.len();
    let address = initrd_address(size, kernel_end, ram_end).ok_or_else(|| Error::InitrdSpace {
        path: path.to_owned(),
        size,
        kernel_end,
        memory_mib: ram_end / MIB,
    })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
        .map_err(|error| Error::Write {
            what: "initrd",
            address,
            why: error.to_string(),
        })?;
    Ok(LoadedInitrd { address, size })
}

/// The highest page-aligned place for an initrd.
fn initrd_address(size: u64, kernel_end: u64, ram_end: u64) -> Option<u64> {
    let address = ram_end.checked_sub(size)? / PAGE * PAGE;
    (address >= kernel_end).then_some(address)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("memory")
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("file");
        file.write_all(bytes).expect("write");
        file
    }

    /// An ELF file with one loaded segment at 1 MiB, and the PVH note if wanted.
    fn elf(note: bool, memory_size: u64) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        out.extend_from_slice(&2u16.to_le_bytes());
        out.extend_from_slice(&62u16.to_le_bytes());
        out.extend_from_slice(&1u32.to_le_bytes());
        for value in [0x10_0000u64, 64, 0] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&0u32.to_le_bytes());
        for value in [64u16, 56, 2, 64, 0, 0] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        let code = 64 + 2 * 56;
        let header = |kind: u32, offset: u64, file_size: u64, memory_size: u64| {
            let mut out = Vec::new();
            out.extend_from_slice(&kind.to_le_bytes());
            out.extend_from_slice(&7u32.to_le_bytes());
            for value in [offset, 0x10_0000, 0x10_0000, file_size, memory_size, 4] {
                out.extend_from_slice(&value.to_le_bytes());
            }
            out
        };
        out.extend(header(1, code, 4, memory_size));
        out.extend(header(4, code + 4, if note { 20 } else { 0 }, 0));
        out.extend_from_slice(b"CODE");
        for value in [4u32, 4, 18] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(b"Xen\0");
        out.extend_from_slice(&0x10_0002u32.to_le_bytes());
        out
    }

    #[test]
    fn an_elf_with_the_note_is_loaded() {
        let memory = memory();
        let kernel = file(&elf(true, 0x2000));
        let loaded = load_kernel(kernel.path(), &memory, 4 << 20).expect("loads");
        assert_eq!(
            loaded,
            LoadedKernel {
                entry: 0x10_0002,
                end: 0x10_2000
            }
        );
        let mut code = [0; 4];
        memory
            .read_slice(&mut code, GuestAddress(0x10_0000))
            .expect("read");
        assert_eq!(&code, b"CODE");
    }

    #[test]
    fn kernels_that_cannot_boot_say_why() {
        let memory = memory();
        let refused =
            |bytes: &[u8]| load_kernel(file(bytes).path(), &memory, 4 << 20).expect_err("refused");
        assert!(matches!(refused(&elf(false, 4)), Error::NoPvhEntry(_)));
        assert!(matches!(refused(b"#!/bin/sh\n"), Error::Format(_)));
        assert!(matches!(refused(b""), Error::Format(_)));
        assert!(matches!(refused(b"\x7fELF"), Error::Load { .. }));
        let large = refused(&elf(true, 5 << 20));
        assert!(matches!(large, Error::Load { .. }));
        assert!(large.to_string().contains("4 MiB"), "{large}");
        let missing =
            load_kernel(Path::new("/nonexistent/vmlinux"), &memory, 4 << 20).expect_err("missing");
        assert!(missing.to_string().contains("/nonexistent/vmlinux"));
    }

    #[test]
    fn an_initrd_goes_as_high_as_it_can() {
        let memory = memory();
        let initrd = file(&[7; 5000]);
        let loaded = load_initrd(initrd.path(), &memory, 1 << 20, 4 << 20).expect("loads");
        assert_eq!(loaded.address, (4 << 20) - 2 * PAGE);
        let mut last = [0];
        memory
            .read_slice(&mut last, GuestAddress(loaded.address + 4999))
            .expect("read");
        assert_eq!(last, [7]);
        let error = load_initrd(initrd.path(), &memory, (4 << 20) - 4096, 4 << 20);
        assert!(matches!(error, Err(Error::InitrdSpace { .. })));
        assert_eq!(initrd_address(5, 0, 4), None);
        assert!(load_initrd(Path::new("/"), &memory, 0, 4 << 20).is_err());
    }
}
