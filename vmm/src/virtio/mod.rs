//! Virtio devices (virtio 1.3) and the transport that shows them to the guest.

pub mod device;
pub mod vsock;
