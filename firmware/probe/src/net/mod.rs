//! The network, measured from within: a server, and those who send to it, receive from it, or ask it, over TCP, UDP or AF_VSOCK. All
//! that is carried is checked at the other end.
//!
//! `wire` is what goes over a stream, `address` how one is had, `serve` and `ask` its two ends.

mod address;
mod ask;
mod serve;
#[cfg(test)]
mod tests;
pub mod wire;

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};

pub use address::Address;
pub use ask::{Answered, Carried, ask, ask_by_datagrams, carry};
pub use serve::{Server, answer};
use wire::Direction;

/// The subcommands of `nacre-probe net`.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Listen on a port by TCP and UDP until killed; print {"port": N} when it does
    Serve {
        /// The port; 0 for any that is free
        #[arg(long, value_name = "PORT")]
        port: u16,
        /// The address; `::` for all of both families
        #[arg(long, value_name = "ADDRESS", default_value_t = Ipv6Addr::UNSPECIFIED.into())]
        address: IpAddr,
    },
    /// Send to a server, which counts and checks
    Send(Streams),
    /// Receive from a server
    Receive(Streams),
    /// Ask a server, which answers each request by the same, one after another
    Ask {
        /// The server: ADDRESS:PORT, or vsock:CID:PORT
        #[arg(long, value_name = "WHERE")]
        to: Address,
        /// Requests
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        count: u32,
        /// Bytes of each, and of its answer
        #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=wire::LARGEST as i64))]
        size: u32,
        /// By UDP: each is sent again after a second without an answer, ten times at most
        #[arg(long)]
        udp: bool,
    },
}

/// What streams carry.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Streams {
    /// The server: ADDRESS:PORT, or vsock:CID:PORT
    #[arg(long, value_name = "WHERE")]
    to: Address,
    /// Bytes of each stream
    #[arg(long, value_name = "BYTES")]
    bytes: u64,
    /// Streams at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    streams: u32,
    /// Bytes of one write
    #[arg(long, value_name = "BYTES", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=wire::LARGEST as i64))]
    block: u32,
}

impl Streams {
    fn carry(&self, direction: Direction) -> Result<String> {
        let carried = carry(&self.to, direction, self.streams, self.bytes, self.block)?;
        Ok(serde_json::to_string(&carried)?)
    }
}

impl Command {
    /// Does it; one line of JSON. [`Command::Serve`] prints its own and goes on.
    ///
    /// # Errors
    /// What the system says, or what was carried is not what came.
    pub fn run(&self) -> Result<String> {
        match self {
            Self::Serve { port, address } => {
                let server = Server::listen(*address, *port)?;
                println!("{}", serde_json::json!({ "port": server.port }));
                server.run()
            }
            Self::Send(streams) => streams.carry(Direction::Send),
            Self::Receive(streams) => streams.carry(Direction::Receive),
            Self::Ask {
                to,
                count,
                size,
                udp: false,
            } => Ok(serde_json::to_string(&ask(to, *count, *size)?)?),
            Self::Ask {
                to: Address::Ip(to),
                count,
                size,
                udp: true,
            } if *size <= ask::DATAGRAM => {
                let answered = ask_by_datagrams(*to, *count, *size)?;
                Ok(serde_json::to_string(&answered)?)
            }
            Self::Ask { to, size, .. } => bail!(
                "--udp is for an address and up to {} bytes, not for {to} and {size}",
                ask::DATAGRAM
            ),
        }
    }
}
