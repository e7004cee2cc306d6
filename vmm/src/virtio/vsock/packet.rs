//! Packets of the socket device (virtio 1.3 section 5.10.6): the header's
//! codec, and packets as descriptor chains hold them, in both directions.
//!
//! The header is copied out of the guest's memory once, then judged. A packet
//! may lie over any descriptors, with borders anywhere, the header's inside included.

use crate::virtio::queue::Buffers;

/// Bytes of a header in front of every packet.
pub const HEADER_SIZE: usize = 44;
/// Largest payload of one packet, in either direction. Linux sends no more.
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// CID of the host's side.
pub const HOST_CID: u64 = 2;
/// Packet type: stream socket, the only one offered.
pub const TYPE_STREAM: u16 = 1;

/// Asks for a connection.
pub const OP_REQUEST: u16 = 1;
/// Grants one.
pub const OP_RESPONSE: u16 = 2;
/// Ends or refuses one at once.
pub const OP_RST: u16 = 3;
/// Announces that its sender will send or receive no more, as the flags say.
pub const OP_SHUTDOWN: u16 = 4;
/// Carries payload.
pub const OP_RW: u16 = 5;
/// Tells `buf_alloc` and `fwd_cnt`, as every packet does.
pub const OP_CREDIT_UPDATE: u16 = 6;
/// Asks for an OP_CREDIT_UPDATE.
pub const OP_CREDIT_REQUEST: u16 = 7;

/// OP_SHUTDOWN: the sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// OP_SHUTDOWN: the sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// OP_SHUTDOWN: neither.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`, in host byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Sender's CID.
    pub src_cid: u64,
    /// Receiver's CID.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Socket type, [`TYPE_STREAM`].
    pub kind: u16,
    /// Operation.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes that the sender can hold for this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

/// The `N` bytes at `at`; the offsets below are constants within the header.
fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

impl Header {
    /// Reads a header from its wire form; any bytes are a header.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Its wire form.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut out = [0; HEADER_SIZE];
        out[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        out[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        out[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        out[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        out[24..28].copy_from_slice(&self.len.to_le_bytes());
        out[28..30].copy_from_slice(&self.kind.to_le_bytes());
        out[30..32].copy_from_slice(&self.op.to_le_bytes());
        out[32..36].copy_from_slice(&self.flags.to_le_bytes());
        out[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        out[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        out
    }

    /// The RST that answers this packet.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: OP_RST,
            ..Self::default()
        }
    }
}

/// Where a packet's payload comes from: fills slices from front to back, each byte once.
pub trait Payload {
    /// Bytes that are there.
    fn len(&self) -> u64;
    /// Copies the next `dst.len()` bytes; asked for no more than [`Payload::len`] in total.
    fn fill(&mut self, dst: &mut [u8]);
}

impl Payload for &[u8] {
    fn len(&self) -> u64 {
        (**self).len() as u64
    }

    fn fill(&mut self, dst: &mut [u8]) {
        let count = dst.len().min((**self).len());
        let (now, later) = self.split_at(count);
        dst[..count].copy_from_slice(now);
        *self = later;
    }
}

/// A chain that holds no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the chain has {0} usable bytes, too few for a packet")]
pub struct TooShort(u64);

/// A packet from the guest: its header, copied, and its payload, still in guest memory.
#[derive(Debug)]
pub struct TxPacket<'m> {
    /// The header.
    pub header: Header,
    payload: Buffers<'m>,
}

impl<'m> TxPacket<'m> {
    /// Takes the packet that the readable part of a chain holds.
    ///
    /// # Errors
    /// [`TooShort`] when there is not even a header.
    pub fn new(mut readable: Buffers<'m>) -> Result<Self, TooShort> {
        let len = readable.len();
        let mut bytes = [0; HEADER_SIZE];
        readable.read_exact(&mut bytes).map_err(|_| TooShort(len))?;
        Ok(Self {
            header: Header::decode(&bytes),
            payload: readable,
        })
    }
}

impl Payload for TxPacket<'_> {
    fn len(&self) -> u64 {
        self.payload.len()
    }

    fn fill(&mut self, dst: &mut [u8]) {
        let filled = self.payload.read_exact(dst);
        debug_assert!(filled.is_ok(), "more than the payload was asked for");
    }
}

/// A buffer that the guest has posted for one packet.
#[derive(Debug)]
pub struct RxBuffer<'m> {
    writable: Buffers<'m>,
}

impl<'m> RxBuffer<'m> {
    /// Takes the writable part of a chain.
    ///
    /// # Errors
    /// [`TooShort`] when it cannot hold a header and one byte of payload.
    pub fn new(writable: Buffers<'m>) -> Result<Self, TooShort> {
        if writable.len() <= HEADER_SIZE as u64 {
            return Err(TooShort(writable.len()));
        }
        Ok(Self { writable })
    }

    /// Bytes of payload that fit, 1 to [`MAX_PAYLOAD`].
    pub fn room(&self) -> u32 {
        u32::try_from(self.writable.len() - HEADER_SIZE as u64)
            .unwrap_or(MAX_PAYLOAD)
            .min(MAX_PAYLOAD)
    }

    /// Writes a packet of at most [`RxBuffer::room`] bytes; gives the bytes used of the chain.
    pub fn write(mut self, header: &Header, payload: [&[u8]; 2]) -> u32 {
        let written = self.writable.write(&header.encode())
            + self.writable.write(payload[0])
            + self.writable.write(payload[1]);
        written as u32 // at most HEADER_SIZE + MAX_PAYLOAD
    }
}
