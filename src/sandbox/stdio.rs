//! A port for one stdio stream: the first connection is taken, within a time
//! limit, and the port is closed with it.

use std::time::Duration;

use super::Sandbox;
use super::error::Error;
use super::machine::{GuestStream, PortListener};

/// Waits for the guest to dial one stdio stream.
pub struct StdioListener {
    port: u32,
    listener: Box<dyn PortListener>,
    limit: Duration,
    sandbox: Sandbox,
}

impl StdioListener {
    pub(crate) fn new(
        port: u32,
        listener: Box<dyn PortListener>,
        limit: Duration,
        sandbox: Sandbox,
    ) -> Self {
        Self {
            port,
            listener,
            limit,
            sandbox,
        }
    }

    /// The port's number, for [`Stdio`](super::Stdio).
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The guest's connection. Further ones to this port are refused.
    ///
    /// # Errors
    /// [`Error::Timeout`] if the guest has not dialled within the stdio deadline, counted from this
    /// call; [`Error::Gone`] if the VM ended.
    pub async fn accept(mut self) -> Result<GuestStream, Error> {
        let call = format!("dialling the stdio stream on port {}", self.port);
        tokio::select! {
            biased;
            accepted = self.listener.accept() => match accepted {
                Ok(stream) => Ok(stream),
                Err(error) => match self.sandbox.exit_reason() {
                    Some(reason) => Err(self.sandbox.gone(reason)),
                    None => Err(Error::Disconnected { call, cause: error.to_string() }),
                },
            },
            reason = self.sandbox.ended() => Err(self.sandbox.gone(reason)),
            () = tokio::time::sleep(self.limit) => Err(Error::Timeout { call, after: self.limit }),
        }
    }
}
