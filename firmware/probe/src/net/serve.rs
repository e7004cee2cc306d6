//! The one who listens: TCP and UDP on one port, any number of connections, a thread each.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::wire::{Content, Direction, HEADER, Header, Tally, take};

/// How often a port that is free for TCP is looked for, if any will do.
const TRIES: u32 = 16;
/// Before the next connection is awaited, after one could not be had.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest datagram.
const DATAGRAM: usize = 65_535;

/// A server that listens, and does not serve yet.
pub struct Server {
    tcp: TcpListener,
    udp: UdpSocket,
    /// Both ports.
    pub port: u16,
}

impl Server {
    /// Listens. Port 0 is any that is free; `::` is every address of both families, or of IPv4 where there is no other.
    ///
    /// # Errors
    /// What the system says, with the address.
    pub fn listen(address: IpAddr, port: u16) -> Result<Self> {
        let mut tries = if port == 0 { TRIES } else { 1 };
        loop {
            tries -= 1;
            match Self::bind(address, port) {
                Err(error) if tries == 0 => {
                    let at = SocketAddr::new(address, port);
                    return Err(error).with_context(|| format!("listening on {at}"));
                }
                Err(_) => {}
                Ok(server) => return Ok(server),
            }
        }
    }

    fn bind(address: IpAddr, port: u16) -> Result<Self> {
        let tcp = match TcpListener::bind((address, port)) {
            Err(error)
                if address == Ipv6Addr::UNSPECIFIED
                    && error.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
            {
                return Self::bind(Ipv4Addr::UNSPECIFIED.into(), port);
            }
            tcp => tcp.context("TCP")?,
        };
        let port = tcp.local_addr()?.port();
        let udp = UdpSocket::bind((address, port)).context("UDP")?;
        Ok(Self { tcp, udp, port })
    }

    /// Serves for ever. What fails of one connection is said on stderr.
    pub fn run(self) -> ! {
        let udp = self.udp;
        std::thread::spawn(move || echo(&udp));
        let content = Arc::new(Content::new());
        loop {
            match self.tcp.accept() {
                Ok((stream, who)) => {
                    let content = Arc::clone(&content);
                    std::thread::spawn(move || {
                        let served = stream
                            .set_nodelay(true)
                            .map_err(Into::into)
                            .and_then(|()| answer(&File::from(OwnedFd::from(stream)), &content));
                        if let Err(error) = served {
                            eprintln!("nacre-probe: serving {who}: {error:#}");
                        }
                    });
                }
                Err(error) => {
                    eprintln!("nacre-probe: accepting a connection: {error}");
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
}

/// Sends each datagram back.
fn echo(socket: &UdpSocket) {
    let mut datagram = vec![0; DATAGRAM];
    loop {
        let sent = socket
            .recv_from(&mut datagram)
            .and_then(|(length, from)| socket.send_to(&datagram[..length], from));
        if let Err(error) = sent
            && error.kind() != ErrorKind::ConnectionRefused
        {
            eprintln!("nacre-probe: answering a datagram: {error}");
            std::thread::sleep(PAUSE);
        }
    }
}

/// Does what one connection asks for, until it ends.
///
/// # Errors
/// What comes first is no header, or the connection breaks.
pub fn answer(stream: &File, content: &Content) -> Result<()> {
    let (mut reader, mut writer) = (stream, stream);
    let mut bytes = [0; HEADER];
    reader.read_exact(&mut bytes).context("reading a header")?;
    let header = Header::from_bytes(&bytes)?;
    match header.direction {
        Direction::Send => {
            let mut tally = Tally::default();
            take(reader, header.bytes, |bytes| {
                tally.add(bytes);
                Ok(())
            })?;
            writer.write_all(&tally.to_bytes())?;
        }
        Direction::Receive => {
            let mut tally = Tally::default();
            while tally.count() < header.bytes {
                let block = content.next(&header, tally.count());
                tally.add(block);
                writer.write_all(block)?;
            }
            writer.write_all(&tally.to_bytes())?;
        }
        Direction::Ask => loop {
            let mut request = vec![0; header.block as usize];
            match reader.read_exact(&mut request) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                read => read?,
            }
            writer.write_all(&request)?;
        },
    }
    Ok(())
}
