//! Where a server is, and a stream to it: TCP, or AF_VSOCK.

use std::fmt;
use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(20);
/// How long a stream may stand still, seconds.
const STILL: i64 = 60;

/// Where a server listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// TCP or UDP.
    Ip(SocketAddr),
    /// AF_VSOCK; the host's CID is 2.
    Vsock {
        /// The machine.
        cid: u32,
        /// The port.
        port: u32,
    },
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let vsock = text.strip_prefix("vsock:").map(|rest| {
            let (cid, port) = rest.split_once(':')?;
            Some(Self::Vsock {
                cid: cid.parse().ok()?,
                port: port.parse().ok()?,
            })
        });
        let address = vsock.unwrap_or_else(|| text.parse().ok().map(Self::Ip));
        address.ok_or_else(|| {
            "it is ADDRESS:PORT, an IPv6 address in brackets, or vsock:CID:PORT".to_owned()
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

impl Address {
    /// A stream to it, where each read and write ends with an error after a minute in which nothing moved.
    ///
    /// # Errors
    /// What the system says, with the address.
    pub fn connect(&self) -> Result<File> {
        let stream = match self {
            Self::Ip(address) => tcp(address),
            Self::Vsock { cid, port } => vsock(*cid, *port),
        };
        let stream = stream.with_context(|| format!("connecting to {self}"))?;
        still(&stream)?;
        Ok(File::from(stream))
    }
}

fn tcp(address: &SocketAddr) -> Result<OwnedFd> {
    let stream = TcpStream::connect_timeout(address, CONNECT)?;
    stream.set_nodelay(true)?;
    Ok(stream.into())
}

fn vsock(cid: u32, port: u32) -> Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    connect(fd.as_raw_fd(), &VsockAddr::new(cid, port))?;
    Ok(fd)
}

fn still(stream: &impl AsFd) -> Result<()> {
    let limit = TimeVal::seconds(STILL);
    setsockopt(stream, sockopt::ReceiveTimeout, &limit)?;
    setsockopt(stream, sockopt::SendTimeout, &limit)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        for text in ["127.0.0.1:80", "[fd00::1]:7", "vsock:2:9000"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "127.0.0.1",
            "fd00::1",
            "vsock:2",
            "vsock:2:x",
            "host:80",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
