//! Requests and responses as they are in the guest's memory (virtio 1.3
//! section 5.15.6).

/// Bytes of `struct virtio_mem_req`.
pub(super) const REQUEST_BYTES: usize = 24;
/// Bytes of `struct virtio_mem_resp`.
pub(super) const RESPONSE_BYTES: usize = 10;

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Span),
    Unplug(Span),
    UnplugAll,
    State(Span),
    /// Of an unknown type, or shorter than a request is.
    Malformed,
}

/// Consecutive blocks, as the driver names them: nothing of it has been judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub address: u64,
    pub blocks: u16,
}

impl Request {
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Self {
        let [
            t0,
            t1,
            _,
            _,
            _,
            _,
            _,
            _,
            address @ ..,
            b0,
            b1,
            _,
            _,
            _,
            _,
            _,
            _,
        ] = bytes;
        let span = Span {
            address: u64::from_le_bytes(*address),
            blocks: u16::from_le_bytes([*b0, *b1]),
        };
        match u16::from_le_bytes([*t0, *t1]) {
            0 => Self::Plug(span),
            1 => Self::Unplug(span),
            2 => Self::UnplugAll,
            3 => Self::State(span),
            _ => Self::Malformed,
        }
    }
}

/// The device's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// Done.
    Ack,
    /// Done: the state of the blocks asked for.
    State(BlockState),
    /// Refused: more would be plugged than was requested of the driver. Linux reads the configuration again
    /// and tries at once, so nothing else gets this answer.
    Nack,
    /// The host cannot do it now. Linux tries again after a while.
    Busy,
    /// The driver is mistaken. Linux gives the device up.
    Error,
}

/// The state of a span of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

impl Response {
    pub fn bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::State(BlockState::Plugged) => (0, 0),
            Self::State(BlockState::Unplugged) => (0, 1),
            Self::State(BlockState::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_by_type_and_their_padding_is_not() {
        let span = Span {
            address: 0x1122_3344_5566_7788,
            blocks: 0x99aa,
        };
        for (kind, expected) in [
            (0, Request::Plug(span)),
            (1, Request::Unplug(span)),
            (2, Request::UnplugAll),
            (3, Request::State(span)),
            (4, Request::Malformed),
            (0x100, Request::Malformed),
            (u16::MAX, Request::Malformed),
        ] {
            let mut bytes = [0xee; REQUEST_BYTES];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&span.address.to_le_bytes());
            bytes[16..18].copy_from_slice(&span.blocks.to_le_bytes());
            assert_eq!(Request::parse(&bytes), expected, "{kind}");
        }
    }
}
