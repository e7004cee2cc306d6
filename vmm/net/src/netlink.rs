//! A blocking rtnetlink socket: one request, its answers. The kernel has
//! answered when the request's system call returns, so nothing here waits for long.

use std::fmt::Display;
use std::io;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket as Raw, SocketAddr};

use crate::Error;

/// Dumps that others' changes disturb are made again this often.
const ATTEMPTS: usize = 10;

/// Bytes of a struct nlmsghdr.
const HEADER: usize = 16;

/// A socket in the namespace of the thread that opened it, for good.
pub(crate) struct Socket {
    raw: Raw,
    sequence: u32,
}

/// All that there is of one kind.
pub(crate) struct Dump {
    pub messages: Vec<RouteNetlinkMessage>,
    /// Why one could not be read, if one could not.
    pub unreadable: Option<String>,
}

impl Socket {
    pub fn open() -> Result<Self, Error> {
        let open = || {
            let mut raw = Raw::new(NETLINK_ROUTE)?;
            raw.bind_auto()?;
            raw.connect(&SocketAddr::new(0, 0))?;
            // What a refusal says beside its number; an old kernel says no more.
            let _ = raw.set_ext_ack(true);
            Ok(Self { raw, sequence: 0 })
        };
        open().map_err(failed("open", "a socket"))
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.raw.send(&bytes, 0).map(drop)
    }

    /// Has something done.
    pub fn change(
        &mut self,
        (doing, what): (&'static str, &dyn Display),
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), Error> {
        let change = || {
            self.send(message, NLM_F_ACK | flags)?;
            loop {
                let (bytes, _) = self.raw.recv_from_full()?;
                for answer in answers(&bytes) {
                    let (header, payload) = answer?;
                    if header.sequence_number != self.sequence {
                        continue;
                    }
                    if let Answer::End(result) = payload {
                        return result;
                    }
                }
            }
        };
        change().map_err(failed(doing, what))
    }

    /// Asks for all of a kind.
    pub fn dump(&mut self, what: &str, message: &RouteNetlinkMessage) -> Result<Dump, Error> {
        for _ in 0..ATTEMPTS {
            let dump = self.dump_once(message).map_err(failed("list", &what))?;
            if let Some(dump) = dump {
                return Ok(dump);
            }
        }
        let source = io::Error::other("they change all the time");
        Err(failed("list", &what)(source))
    }

    /// As [`Socket::dump`], where all of it must be understood.
    pub fn list(
        &mut self,
        what: &str,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let dump = self.dump(what, message)?;
        match dump.unreadable {
            None => Ok(dump.messages),
            Some(why) => Err(failed("list", &what)(io::Error::other(why))),
        }
    }

    /// None if it was disturbed.
    fn dump_once(&mut self, message: &RouteNetlinkMessage) -> io::Result<Option<Dump>> {
        self.send(message.clone(), NLM_F_DUMP)?;
        let mut dump = Dump {
            messages: Vec::new(),
            unreadable: None,
        };
        let mut disturbed = false;
        loop {
            let (bytes, _) = self.raw.recv_from_full()?;
            for answer in answers(&bytes) {
                let (header, payload) = answer?;
                if header.sequence_number != self.sequence {
                    continue;
                }
                disturbed |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    Answer::End(result) => {
                        result?;
                        return Ok((!disturbed).then_some(dump));
                    }
                    Answer::Message(message) => dump.messages.push(message),
                    Answer::Unreadable(why) => dump.unreadable = Some(why),
                }
            }
        }
    }
}

/// One message of the kernel.
pub(crate) enum Answer {
    Message(RouteNetlinkMessage),
    /// One of a kind, or with attributes, that are not known.
    Unreadable(String),
    /// The last one: all is well, or what is not.
    End(io::Result<()>),
}

/// The messages in one datagram.
pub(crate) fn answers(
    mut bytes: &[u8],
) -> impl Iterator<Item = io::Result<(NetlinkHeader, Answer)>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        if !(HEADER..=bytes.len()).contains(&length) {
            bytes = &[];
            return Some(Err(io::Error::other("the kernel's answer is cut off")));
        }
        let (one, rest) = bytes.split_at(length);
        bytes = rest
            .get(length.next_multiple_of(4) - length..)
            .unwrap_or(&[]);
        let answer = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(one) {
            Ok(message) => {
                let answer = match message.payload {
                    NetlinkPayload::InnerMessage(message) => Answer::Message(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        Answer::End(Err(refusal(&error, message.header.flags)))
                    }
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        Answer::End(Err(io::Error::from_raw_os_error(-done.code)))
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => Answer::End(Ok(())),
                    other => {
                        Answer::Unreadable(format!("a message of type {}", other.message_type()))
                    }
                };
                (message.header, answer)
            }
            Err(error) => {
                let mut header = NetlinkHeader::default();
                header.flags = u16::from_ne_bytes([one[6], one[7]]);
                header.sequence_number = u32::from_ne_bytes([one[8], one[9], one[10], one[11]]);
                (header, Answer::Unreadable(error.to_string()))
            }
        };
        Some(Ok(answer))
    })
}

/// A refusal for which the kernel has words.
#[derive(Debug, thiserror::Error)]
#[error("{number}: {words}")]
struct Refusal {
    /// The error number's error.
    number: io::Error,
    words: String,
}

fn refusal(error: &ErrorMessage, flags: u16) -> io::Error {
    let number = error.to_io();
    match words(&error.header, flags) {
        None => number,
        Some(words) => io::Error::new(number.kind(), Refusal { number, words }),
    }
}

/// The kernel's words in what follows the error number: the request's header or all of it, then attributes
/// (include/uapi/linux/netlink.h, struct nlmsgerr).
fn words(after: &[u8], flags: u16) -> Option<String> {
    const NLM_F_CAPPED: u16 = 0x100;
    const NLM_F_ACK_TLVS: u16 = 0x200;
    const NLMSGERR_ATTR_MSG: u16 = 1;
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let request = if flags & NLM_F_CAPPED == 0 {
        u32::from_ne_bytes(*after.first_chunk()?) as usize
    } else {
        HEADER
    };
    let attributes = after.get(request.next_multiple_of(4)..)?;
    let message = NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)?;
    let words = message.value().strip_suffix(&[0])?;
    Some(String::from_utf8_lossy(words).into_owned())
}

/// Whether it is the kernel that says so.
pub(crate) fn says(error: &Error, errno: i32) -> bool {
    let Error::Netlink { source, .. } = error else {
        return false;
    };
    let inner = source.get_ref().and_then(|inner| inner.downcast_ref());
    let number = inner.map_or(source, |refusal: &Refusal| &refusal.number);
    number.raw_os_error() == Some(errno)
}

pub(crate) fn failed(doing: &'static str, what: impl Display) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Netlink {
        doing,
        what: what.to_string(),
        source,
    }
}
