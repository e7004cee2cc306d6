//! The VM as the sandbox sees it. The trait keeps everything above it free of
//! KVM, so that the sandbox's own tests run against a machine in memory; the
//! one real implementation is over [`nacre_vmm::Vm`].

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_trait::async_trait;
use nacre_vmm::hotplug::SlotView;
use nacre_vmm::hotplug::memory::{Area, UnitView};
use nacre_vmm::virtio::mem::MemStatus;
use nacre_vmm::virtio::net::{NetConfig, Tap};
use nacre_vmm::{DiskConfig, ExitReason};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::Error;
use super::phases::MachinePhases;
use crate::control::Traffic;

/// What comes and goes while a VM runs. Each call does the host's part and returns at once; what the guest makes of it is seen in
/// the slots.
pub(crate) trait Plug: Send + Sync {
    /// Makes and announces a vCPU; its index.
    fn plug_vcpu(&self) -> Result<u8, Error>;
    /// Has the guest asked to eject a vCPU.
    fn ask_vcpu(&self, index: u8) -> Result<(), Error>;
    /// Takes back a vCPU, or a request for it, that the guest has not noticed.
    fn withdraw_vcpu(&self, index: u8) -> Result<(), Error>;
    /// vCPUs that are there, by index.
    fn vcpu_slots(&self) -> Vec<SlotView>;
    /// Makes and announces ACPI memory; the units.
    fn plug_memory(&self, bytes: u64) -> Result<Vec<UnitView>, Error>;
    /// Has the guest asked to eject a unit.
    fn ask_memory(&self, unit: u8) -> Result<(), Error>;
    /// Takes back a unit, or a request for it, that the guest has not noticed.
    fn withdraw_memory(&self, unit: u8) -> Result<(), Error>;
    /// Units of ACPI memory that are there, by index.
    fn memory_units(&self) -> Vec<UnitView>;
    /// Where units may be; no units after the VM's end.
    fn memory_area(&self) -> Area;
    /// When the guest last ejected something without having reported since that it is done.
    fn ejecting_since(&self) -> Option<Instant>;
    /// Tells of each change of a slot.
    fn plug_changes(&self) -> watch::Receiver<u64>;
    /// Ejects by the guest that nobody had asked for.
    fn unasked_ejects(&self) -> u64;
    /// How much the virtio-mem driver is to plug, in bytes.
    fn request_memory(&self, bytes: u64) -> Result<(), Error>;
    /// Bytes that the guest has given back through the balloon since it began.
    fn given_back(&self) -> u64;
    /// Where the virtio-mem device is, with each change; `None` without such a device.
    fn requested_memory(&self) -> Option<watch::Receiver<MemStatus>>;
}

/// The host's hand on a network device. It may outlive the device.
pub(crate) trait Nic: Send + Sync {
    /// Tells the guest that the link is up, or down.
    fn set_link(&self, up: bool);
    /// The link, and what has gone through.
    fn traffic(&self) -> Traffic;
}

/// What the sandbox needs of a running VM.
#[async_trait]
pub(crate) trait Machine: Plug {
    /// Completes when the VM has ended and its threads are joined.
    async fn ended(&self) -> ExitReason;
    /// The reason, if it has ended.
    fn exit_reason(&self) -> Option<ExitReason>;
    /// Ends the VM from the host; returns at once, idempotent.
    fn stop(&self);
    /// Listens for the guest's connections to a vsock port of the host.
    fn listen(&self, port: u32) -> Result<Box<dyn PortListener>, Error>;
    /// Connects to a vsock port of the guest; the stream, and the host's port of it.
    async fn connect(&self, port: u32) -> Result<(GuestStream, u32), Error>;
    /// Puts a disk into a spare window and answers with the window.
    fn plug_disk(&self, disk: DiskConfig) -> Result<u8, Error>;
    /// Puts a network device over a TAP interface into a spare window; the window, and a hand on the device.
    fn plug_net(&self, config: NetConfig, tap: Tap) -> Result<(u8, Arc<dyn Nic>), Error>;
    /// Takes the device out of a window.
    fn unplug(&self, window: u8) -> Result<(), Error>;
    /// Boot phases reached so far.
    fn phases(&self) -> MachinePhases;
    /// Exits by reason, for inspection.
    fn exits(&self) -> Vec<(String, u64)>;
}

/// Accepts the guest's connections to one port; dropping it closes the port.
#[async_trait]
pub(crate) trait PortListener: Send {
    /// The next connection; an error when the VM is gone.
    async fn accept(&mut self) -> io::Result<GuestStream>;
}

trait Duplex: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite> Duplex for T {}

/// One connection from the guest. `poll_shutdown` half-closes our sending side;
/// dropping it closes both.
pub struct GuestStream(Pin<Box<dyn Duplex + Send + Sync>>);

impl GuestStream {
    /// Wraps a stream.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Sync + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl fmt::Debug for GuestStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestStream")
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_shutdown(cx)
    }
}
