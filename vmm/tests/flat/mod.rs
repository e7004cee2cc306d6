//! Tiny guests made by hand: a few instructions of 32-bit protected mode in a minimal ELF file with
//! a PVH note, which every KVM runs, KVM-PVM included. No kernel is in them.
#![allow(dead_code)] // Each test program uses its own part of this.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nacre_vmm::config::Console;
use nacre_vmm::memory::layout::{PVPANIC_PORT, RESET_PORT, SERIAL_PORT, SLEEP_CONTROL_PORT};
use nacre_vmm::{ExitReason, Vm, VmConfig};
use tempfile::NamedTempFile;

/// Where the code is loaded and begins.
pub const CODE: u32 = 0x10_0000;
/// A page below 1 MiB that a SIPI can name.
pub const AP_PAGE: u32 = 0x8000;
/// A word of memory for the guest's own use.
pub const SCRATCH: u32 = 0x9000;

/// Instructions one after another.
#[derive(Clone, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// mov dx, port
    pub fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high])
    }

    /// mov al, value; out dx, al
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).bytes(&[0xb0, value, 0xee])
    }

    /// mov eax, value
    pub fn eax(self, value: u32) -> Self {
        self.bytes(&[0xb8]).bytes(&value.to_le_bytes())
    }

    /// mov eax, [address]
    pub fn load(self, address: u32) -> Self {
        self.bytes(&[0xa1]).bytes(&address.to_le_bytes())
    }

    /// mov [address], eax
    pub fn store(self, address: u32) -> Self {
        self.bytes(&[0xa3]).bytes(&address.to_le_bytes())
    }

    /// Prints a text.
    pub fn print(self, text: &str) -> Self {
        text.bytes()
            .fold(self, |code, byte| code.out8(SERIAL_PORT, byte))
    }

    /// Prints the four bytes of eax, lowest first.
    pub fn print_eax(self) -> Self {
        let mut code = self.port(SERIAL_PORT);
        for _ in 0..4 {
            // out dx, al; shr eax, 8
            code = code.bytes(&[0xee, 0xc1, 0xe8, 8]);
        }
        code
    }

    /// Repeats `body` (without jumps out of it) `count` times; ecx counts.
    pub fn repeat(self, count: u32, body: Code) -> Self {
        let back = body.0.len() as i32 + 3;
        self.bytes(&[0xb9])
            .bytes(&count.to_le_bytes())
            .bytes(&body.0)
            // dec ecx; jnz near
            .bytes(&[0x49, 0x0f, 0x85])
            .bytes(&(-(back + 4)).to_le_bytes())
    }

    /// Waits until the 32 bits at `address` are zero, or are not.
    pub fn wait_until_zero(self, address: u32, zero: bool) -> Self {
        // mov eax, [address]; test eax, eax; jnz/jz back
        let jump = if zero { 0x75 } else { 0x74 };
        self.load(address)
            .bytes(&[0x85, 0xc0, jump, (-9i8).cast_unsigned()])
    }

    pub fn power_off(self) -> Self {
        self.out8(SLEEP_CONTROL_PORT, 0x34).halt()
    }

    pub fn reset(self) -> Self {
        self.out8(RESET_PORT, 1).halt()
    }

    pub fn panic(self) -> Self {
        self.out8(PVPANIC_PORT, 1)
    }

    /// Interrupts off and nothing more, for ever.
    pub fn halt(self) -> Self {
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// jmp to itself
    pub fn spin(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// The ELF file with this code at [`CODE`].
    pub fn kernel(&self) -> NamedTempFile {
        kernel(&[(CODE, &self.0)])
    }
}

/// A minimal ELF file of segments (address, bytes) that begins at [`CODE`] by PVH.
pub fn kernel(segments: &[(u32, &[u8])]) -> NamedTempFile {
    let mut note = Vec::new();
    for value in [4u32, 4, 18] {
        note.extend_from_slice(&value.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&CODE.to_le_bytes());

    let count = segments.len() + 1;
    let mut headers = Vec::new();
    let mut data = Vec::new();
    let start = 64 + 56 * count as u64;
    let mut add = |kind: u32, address: u32, bytes: &[u8]| {
        headers.extend_from_slice(&kind.to_le_bytes());
        headers.extend_from_slice(&7u32.to_le_bytes());
        let address = u64::from(address);
        let size = bytes.len() as u64;
        for value in [start + data.len() as u64, address, address, size, size, 4] {
            headers.extend_from_slice(&u64::to_le_bytes(value));
        }
        data.extend_from_slice(bytes);
    };
    for (address, bytes) in segments {
        add(1, *address, bytes);
    }
    add(4, 0, &note);

    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    for value in [u64::from(CODE), 64, 0] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for value in [64u16, 56, count as u16, 64, 0, 0] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend(headers);
    file.extend(data);
    let mut out = NamedTempFile::new().expect("a temporary file");
    out.write_all(&file).expect("the kernel file");
    out
}

/// The console's output, kept up to 1 MiB.
#[derive(Clone, Default)]
pub struct Output(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Output {
    pub fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().expect("lock").clone()
    }

    /// Waits until the output ends with `text`.
    pub fn wait_for(&self, text: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut bytes = self.0.0.lock().expect("lock");
        while !bytes.ends_with(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{:?} never came, but {bytes:?}", text);
            bytes = self.0.1.wait_timeout(bytes, left).expect("lock").0;
        }
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = self.0.0.lock().expect("lock");
        if bytes.len() + data.len() > 1 << 20 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        bytes.extend_from_slice(data);
        self.0.1.notify_all();
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A VM of one vCPU with two spare windows and nothing else.
pub fn config(kernel: &NamedTempFile, output: &Output) -> VmConfig {
    VmConfig {
        name: "flat".to_owned(),
        kernel: kernel.path().to_owned(),
        initrd: None,
        cmdline: String::new(),
        memory_mib: 128,
        vcpus: 1,
        disks: Vec::new(),
        windows: 2,
        vsock: false,
        rng: false,
        devices: nacre_vmm::config::ReadyDevices::default(),
        plug: nacre_vmm::config::PlugConfig::default(),
        console: Console {
            output: Box::new(output.clone()),
            input: None,
        },
    }
}

/// Ends the VM with a failure of the test if it does not end by itself in time.
pub fn wait(vm: &Vm) -> ExitReason {
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    let watched = vm.clone();
    let watchdog = std::thread::spawn(move || {
        if waiting.recv_timeout(Duration::from_secs(60))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            watched.stop();
        }
    });
    let reason = vm.wait();
    drop(done);
    watchdog.join().expect("watchdog");
    reason
}

/// Runs the code to its end; how it ended and what it printed.
pub fn run(code: &Code) -> (ExitReason, Vec<u8>) {
    let output = Output::default();
    let kernel = code.kernel();
    let vm = Vm::start(config(&kernel, &output)).expect("the VM starts");
    (wait(&vm), output.bytes())
}
