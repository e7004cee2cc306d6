//! virtio-vsock whose host side (CID 2) is in this process.

/// The host's end: opens and accepts streams. Clones share it.
#[derive(Clone)]
pub struct VsockHost {}

/// A stream of the host's side. Half-close is kept apart from close.
pub struct VsockStream {}

/// Accepts the guest's connections to one port; dropping it closes the port.
pub struct VsockListener {}

// C3 implements:
// impl VsockHost { pub fn listen(&self, port: u32) -> Result<VsockListener, Error>; pub async fn connect(&self, port: u32) -> Result<VsockStream, Error> }
// impl VsockListener { pub async fn accept(&mut self) -> Result<VsockStream, Error>; pub fn port(&self) -> u32 }   // Err when the VM is gone
// impl AsyncRead + AsyncWrite for VsockStream (poll_shutdown = half-close of our sending side; Drop = close of both, RST if needed); into_split works by tokio::io::split
// pub struct Vsock: VirtioDevice; pub fn Vsock::new(guest_cid: u64, loop: EventLoopHandle) -> (Vsock, VsockHost)
