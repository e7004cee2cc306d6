//! The serial console: a 16550 at COM1 whose output goes to a writer and whose input comes from a
//! file through the event loop.
//!
//! The writer is called from vCPU threads, byte by byte. It is the caller's to bound: what it
//! cannot take at once it drops, so that a guest whose flood nobody reads neither blocks nor grows.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Raises the port's interrupt line.
struct IrqTrigger(EventFd);

impl Trigger for IrqTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The count is full: the line is as raised as it can be.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
            result => result,
        }
    }
}

/// What the port tells: bytes that were lost, and that the guest has read all input.
struct PortEvents {
    lost: Arc<AtomicU64>,
    /// Set while the pump waits for room.
    starved: Arc<AtomicBool>,
    drained: EventFd,
}

impl SerialEvents for PortEvents {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {
        if self.starved.swap(false, Ordering::SeqCst) {
            let _ = self.drained.write(1);
        }
    }
}

type Port = Serial<IrqTrigger, PortEvents, Box<dyn Write + Send>>;

/// The port, as the bus has it.
pub struct SerialPort {
    port: Mutex<Port>,
    lost: Arc<AtomicU64>,
    starved: Arc<AtomicBool>,
    drained: EventFd,
}

impl SerialPort {
    /// Ports that it takes.
    pub const LENGTH: u64 = 8;

    /// A port that writes to `output` and interrupts by `irq`.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn new(irq: EventFd, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let drained = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let lost = Arc::new(AtomicU64::new(0));
        let starved = Arc::new(AtomicBool::new(false));
        let events = PortEvents {
            lost: Arc::clone(&lost),
            starved: Arc::clone(&starved),
            drained: drained.try_clone()?,
        };
        Ok(Self {
            port: Mutex::new(Serial::with_events(IrqTrigger(irq), events, output)),
            lost,
            starved,
            drained,
        })
    }

    /// Bytes that the writer did not take.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = port.read((offset as usize + index) as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.lock();
        for (index, byte) in data.iter().enumerate() {
            // A byte that the writer does not take is counted by the port's events.
            let _ = port.write((offset as usize + index) as u8, *byte);
        }
    }
}

/// Moves bytes from a file to the port as the guest reads them; runs in the event loop.
pub struct InputPump {
    serial: Arc<SerialPort>,
    file: File,
    watching: bool,
    ended: bool,
}

impl InputPump {
    /// A pump from `file`, which epoll can watch (a terminal, pipe or socket).
    pub fn new(serial: Arc<SerialPort>, file: File) -> Self {
        Self {
            serial,
            file,
            watching: false,
            ended: false,
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) {
        if self.watching || self.ended {
            return;
        }
        match ops.add(Events::new(&self.file, EventSet::IN)) {
            Ok(()) => self.watching = true,
            Err(error) => {
                self.ended = true;
                tracing::warn!(%error, "the console's input cannot be watched: nothing will be read from it");
            }
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps<'_>) {
        if self.watching {
            let _ = ops.remove(Events::empty(&self.file));
            self.watching = false;
        }
    }

    /// Moves what fits; true if there may be more to move.
    fn pump(&mut self) -> bool {
        // Announced before the room is looked at, so that a guest which reads in between is heard.
        self.serial.starved.store(true, Ordering::SeqCst);
        let mut port = self.serial.lock();
        let room = port.fifo_capacity();
        if room == 0 {
            return false;
        }
        self.serial.starved.store(false, Ordering::SeqCst);
        let mut bytes = [0; 64];
        let room = room.min(bytes.len());
        match self.file.read(&mut bytes[..room]) {
            Ok(0) => self.ended = true,
            Ok(count) => {
                if let Err(error) = port.enqueue_raw_bytes(&bytes[..count]) {
                    tracing::warn!(%error, "console input was lost");
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                tracing::warn!(%error, "reading the console's input failed");
                self.ended = true;
            }
        }
        !self.ended
    }
}

impl MutEventSubscriber for InputPump {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.serial.drained.as_raw_fd() {
            let _ = self.serial.drained.read();
            self.watch(ops);
        } else if !self.pump() {
            self.unwatch(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.serial.drained, EventSet::IN)) {
            tracing::warn!(%error, "the console's input cannot be paced");
        }
        self.watch(ops);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("lock").extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn irq() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).expect("eventfd")
    }

    #[test]
    fn output_reaches_the_writer() {
        let sink = Sink::default();
        let serial = SerialPort::new(irq(), Box::new(sink.clone())).expect("port");
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(*sink.0.lock().expect("lock"), b"hello");
        // A wide write is its bytes at rising offsets: the second is the interrupt enable register.
        serial.write(0, &[b'!', 0]);
        assert_eq!(*sink.0.lock().expect("lock"), b"hello!");
    }

    #[test]
    fn a_writer_that_takes_nothing_costs_a_count() {
        let serial = SerialPort::new(irq(), Box::new(Full)).expect("port");
        for _ in 0..10_000 {
            serial.write(0, b"x");
        }
        assert_eq!(serial.lost(), 10_000);
        let mut data = [0; 8];
        serial.read(0, &mut data);
    }

    #[test]
    fn input_waits_for_room() {
        let serial = Arc::new(SerialPort::new(irq(), Box::new(io::sink())).expect("port"));
        let (reader, mut writer) = io::pipe().expect("pipe");
        let mut pump = InputPump::new(Arc::clone(&serial), File::from(OwnedFd::from(reader)));
        writer.write_all(&[b'a'; 100]).expect("write");
        assert!(pump.pump());
        assert!(!pump.pump(), "64 bytes fill the FIFO");
        let mut data = [0];
        for _ in 0..64 {
            serial.read(0, &mut data);
            assert_eq!(data, *b"a");
        }
        assert_eq!(serial.drained.read().expect("drained was told"), 1);
        assert!(pump.pump());
        drop(writer);
        for _ in 0..36 {
            serial.read(0, &mut data);
            assert_eq!(data, *b"a");
        }
        assert!(!pump.pump(), "end of file");
    }
}
