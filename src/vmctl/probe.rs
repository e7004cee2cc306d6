//! Probe guests: a few instructions in an ELF with a PVH note, run by the VMM
//! itself. The plain one says a letter on the serial port and powers off; the
//! other does XSAVE and XRSTOR before, which every stock kernel does early and
//! which a KVM that emulates its guest's instructions does not know.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nacre_vmm::config::{Console, MINIMUM_MEMORY_MIB, PlugConfig};
use nacre_vmm::{ExitReason, Vm, VmConfig};

use crate::sandbox::chain;

/// Where the code is loaded and entered, in 32-bit mode without paging (PVH).
const ENTRY: u32 = 0x10_0000;
/// What the guest prints.
const SAID: &[u8] = b"N";
/// How long a guest of twenty instructions may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Prints, and powers off by the sleep control register (SLP_TYP 5, SLP_EN).
const PLAIN: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'N', // mov al, 'N'
    0xee, // out dx, al
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0xb0, 0x34, // mov al, 0x34
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// XSAVE and XRSTOR at 2 MiB if the CPU has them; goes on to what follows.
const EXTENDED_STATE: &[u8] = &[
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
    0x0f, 0xa2, // cpuid
    0xf7, 0xc1, 0x00, 0x00, 0x00, 0x04, // test ecx, XSAVE
    0x74, 0x2c, // jz to the end
    0x0f, 0x20, 0xe0, // mov eax, cr4
    0x0d, 0x00, 0x06, 0x04, 0x00, // or eax, OSXSAVE | OSFXSR | OSXMMEXCPT
    0x0f, 0x22, 0xe0, // mov cr4, eax
    0x0f, 0x20, 0xc0, // mov eax, cr0
    0x83, 0xe0, 0xf3, // and eax, not (EM | TS)
    0x0f, 0x22, 0xc0, // mov cr0, eax
    0x31, 0xc9, // xor ecx, ecx
    0x31, 0xd2, // xor edx, edx
    0xb8, 0x03, 0x00, 0x00, 0x00, // mov eax, x87 | SSE
    0x0f, 0x01, 0xd1, // xsetbv
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0x0f, 0xae, 0x27, // xsave [edi]
    0x0f, 0xae, 0x2f, // xrstor [edi]
    0x90, // nop
];

/// Runs the plain guest. Err: what happened instead of its letter and its power-off.
pub(super) fn plain() -> Result<Duration, String> {
    run(PLAIN)
}

/// Runs the guest that uses the extended state.
pub(super) fn extended_state() -> Result<Duration, String> {
    run(&[EXTENDED_STATE, PLAIN].concat())
}

fn run(code: &[u8]) -> Result<Duration, String> {
    let file =
        tempfile::NamedTempFile::new().map_err(|error| format!("no temporary file: {error}"))?;
    std::fs::write(file.path(), elf(code))
        .map_err(|error| format!("no temporary file: {error}"))?;
    let said = Said::default();
    let began = Instant::now();
    let vm = start(file.path(), said.clone()).map_err(|error| chain(&error))?;
    let reason = loop {
        match vm.exit_reason() {
            Some(reason) => break reason,
            None if began.elapsed() > LIMIT => {
                vm.stop();
                vm.wait();
                return Err(format!("it did not power off within {LIMIT:?}"));
            }
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    let took = began.elapsed();
    vm.wait();
    let said = said
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    match reason {
        ExitReason::PowerOff if said == SAID => Ok(took),
        ExitReason::PowerOff => Err(format!(
            "it powered off and said {said:02x?} on its serial port"
        )),
        reason => Err(reason.to_string()),
    }
}

fn start(kernel: &Path, said: Said) -> Result<Vm, nacre_vmm::handle::Error> {
    Vm::start(VmConfig {
        name: "probe".to_owned(),
        kernel: kernel.to_owned(),
        initrd: None,
        cmdline: String::new(),
        memory_mib: MINIMUM_MEMORY_MIB,
        vcpus: 1,
        disks: Vec::new(),
        windows: 1,
        vsock: false,
        rng: false,
        devices: nacre_vmm::config::ReadyDevices::default(),
        plug: PlugConfig::default(),
        console: Console {
            output: Box::new(said),
            input: None,
        },
    })
}

/// The first bytes that the guest prints.
#[derive(Debug, Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Write for Said {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = 64_usize.saturating_sub(said.len());
        said.extend(data.iter().take(room));
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An ELF64 executable with the code at [`ENTRY`] and a PVH note (XEN_ELFNOTE_PHYS32_ENTRY) that names it.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    const NOTE: u64 = HEADER + 2 * PROGRAM_HEADER;
    let mut note = Vec::new();
    for word in [4_u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(ENTRY).to_le_bytes());
    let code_at = NOTE + note.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend(2_u16.to_le_bytes()); // executable
    elf.extend(62_u16.to_le_bytes()); // x86-64
    elf.extend(1_u32.to_le_bytes());
    for word in [u64::from(ENTRY), HEADER, 0] {
        elf.extend(word.to_le_bytes()); // entry, program headers, no section headers
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, flags: u32, offset: u64, address: u64, size: u64, align: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(flags.to_le_bytes());
        for word in [offset, address, address, size, size, align] {
            elf.extend(word.to_le_bytes());
        }
    };
    segment(1, 7, code_at, u64::from(ENTRY), code.len() as u64, 1);
    segment(4, 4, NOTE, 0, note.len() as u64, 4);
    elf.extend(note);
    elf.extend(code);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jump_over_the_extended_state_lands_behind_it() {
        let jump = EXTENDED_STATE
            .iter()
            .position(|byte| *byte == 0x74)
            .unwrap();
        let target = jump + 2 + usize::from(EXTENDED_STATE[jump + 1]);
        assert_eq!(target, EXTENDED_STATE.len());
    }

    #[test]
    fn the_elf_has_its_code_and_note_where_the_headers_say() {
        let elf = elf(PLAIN);
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
        assert_eq!(word(24), u64::from(ENTRY));
        let (code, note) = (64, 64 + 56);
        let code_at = word(code + 8) as usize;
        assert_eq!(&elf[code_at..code_at + PLAIN.len()], PLAIN);
        let note_at = word(note + 8) as usize;
        assert_eq!(&elf[note_at + 12..note_at + 16], b"Xen\0");
        assert_eq!(elf.len(), code_at + PLAIN.len());
    }
}
