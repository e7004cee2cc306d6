//! Virtio devices (virtio 1.3) and the transport that shows them to the guest.
//!
//! `device` is the face between the two; `mmio` the transport, and `registers` what a driver reads of it; `queue` what
//! devices share to read a hostile driver's rings. Each device has its folder.

pub mod balloon;
pub mod block;
pub mod device;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod vsock;
