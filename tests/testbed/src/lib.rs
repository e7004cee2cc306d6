//! What the outer guest's init and the program that boots it say to each other.
//!
//! One virtio-serial port carries frames both ways: a [`Job`] goes in, output, heartbeats, changed files and the exit
//! status come out. Nothing here touches the machine; both ends are in other files.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries the frames.
pub const PORT_NAME: &str = "nacre.channel";
/// Folder in the outer guest whose files are copied out while the job runs.
pub const OUT_DIR: &str = "/out";
/// Largest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 256 * 1024;

/// What the outer guest shall run; sent once, as the first frame.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments; the program is looked up in `PATH` of `env`.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working folder.
    pub cwd: String,
    /// The host's clock, in seconds since 1970, for the guest to take over.
    pub time: i64,
}

/// One message on the port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The job, as JSON (host to guest).
    Job(Vec<u8>),
    /// The guest is up; the text says what it is.
    Hello(String),
    /// Bytes of the job's standard output.
    Stdout(Vec<u8>),
    /// Bytes of the job's standard error.
    Stderr(Vec<u8>),
    /// The guest is alive; sent every second.
    Heartbeat,
    /// A piece of a file under [`OUT_DIR`]. Offset 0 begins the file anew.
    File {
        /// Path below [`OUT_DIR`], without a leading slash.
        path: String,
        /// Where in the file the bytes belong.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// The job ended: its exit code, or 128 + the signal that killed it.
    Exit(i32),
}

impl Frame {
    /// Writes the frame in one call of `write_all`.
    ///
    /// # Errors
    /// Those of the writer, and `InvalidInput` for a payload above [`MAX_PAYLOAD`].
    pub fn write_to(&self, writer: &mut impl Write) -> io::Result<()> {
        let (kind, payload): (u8, Vec<u8>) = match self {
            Frame::Job(json) => (1, json.clone()),
            Frame::Hello(text) => (2, text.clone().into_bytes()),
            Frame::Stdout(data) => (3, data.clone()),
            Frame::Stderr(data) => (4, data.clone()),
            Frame::Heartbeat => (5, Vec::new()),
            Frame::File { path, offset, data } => {
                let mut payload = Vec::with_capacity(path.len() + data.len() + 10);
                payload.extend((path.len() as u16).to_le_bytes());
                payload.extend(path.as_bytes());
                payload.extend(offset.to_le_bytes());
                payload.extend(data);
                (6, payload)
            }
            Frame::Exit(code) => (7, code.to_le_bytes().to_vec()),
        };
        if payload.len() > MAX_PAYLOAD {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "frame payload too large",
            ));
        }
        let mut bytes = Vec::with_capacity(payload.len() + 5);
        bytes.push(kind);
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(payload);
        writer.write_all(&bytes)
    }

    /// Reads the next frame; `None` at the end of the stream between two frames.
    ///
    /// # Errors
    /// Those of the reader, and `InvalidData` for anything that is no frame.
    pub fn read_from(reader: &mut impl Read) -> io::Result<Option<Frame>> {
        let mut kind = [0u8; 1];
        if reader.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut length = [0u8; 4];
        reader.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(invalid("frame payload too large"));
        }
        let mut payload = vec![0u8; length];
        reader.read_exact(&mut payload)?;
        Ok(Some(match kind[0] {
            1 => Frame::Job(payload),
            2 => Frame::Hello(String::from_utf8_lossy(&payload).into_owned()),
            3 => Frame::Stdout(payload),
            4 => Frame::Stderr(payload),
            5 => Frame::Heartbeat,
            6 => parse_file(&payload).ok_or_else(|| invalid("file frame cut short"))?,
            7 => Frame::Exit(i32::from_le_bytes(
                payload
                    .try_into()
                    .map_err(|_| invalid("exit frame of a wrong size"))?,
            )),
            _ => return Err(invalid("unknown kind of frame")),
        }))
    }
}

fn parse_file(payload: &[u8]) -> Option<Frame> {
    let (length, rest) = payload.split_first_chunk::<2>()?;
    let (path, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    let (offset, data) = rest.split_first_chunk::<8>()?;
    Some(Frame::File {
        path: String::from_utf8_lossy(path).into_owned(),
        offset: u64::from_le_bytes(*offset),
        data: data.to_vec(),
    })
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let frames = [
            Frame::Job(b"{}".to_vec()),
            Frame::Hello("6.1".into()),
            Frame::Stdout(vec![0, 1, 2]),
            Frame::Stderr(Vec::new()),
            Frame::Heartbeat,
            Frame::File {
                path: "a/b.log".into(),
                offset: 7,
                data: vec![9; 1000],
            },
            Frame::Exit(-3),
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            frame.write_to(&mut wire).unwrap();
        }
        let mut reader = wire.as_slice();
        for frame in &frames {
            assert_eq!(Frame::read_from(&mut reader).unwrap().as_ref(), Some(frame));
        }
        assert_eq!(Frame::read_from(&mut reader).unwrap(), None);
    }

    #[test]
    fn malformed_frames_are_errors() {
        for wire in [
            &[9u8, 0, 0, 0, 0][..],
            &[3, 255, 255, 255, 255],
            &[6, 1, 0, 0, 0, 5],
            &[7, 1, 0, 0, 0, 1],
            &[3, 2],
        ] {
            assert!(Frame::read_from(&mut &wire[..]).is_err(), "{wire:?}");
        }
    }

    #[test]
    fn oversized_payload_is_refused() {
        assert!(
            Frame::Stdout(vec![0; MAX_PAYLOAD + 1])
                .write_to(&mut Vec::new())
                .is_err()
        );
    }
}
