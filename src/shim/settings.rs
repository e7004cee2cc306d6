//! What the shim itself takes from the configuration; the rest goes to its
//! sandbox.

use std::time::Duration;

use super::stdio;
use crate::config::Config;

/// How long the shim waits for others.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For readers of output, and for the guest's streams.
    pub stdio: stdio::Limits,
    /// For a first call.
    pub idle: Duration,
}

impl Patience {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        Self {
            stdio: stdio::Limits {
                stuck_reader: config.reader_timeout,
                ..stdio::Limits::default()
            },
            idle: config.idle_timeout,
        }
    }
}
