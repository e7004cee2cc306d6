//! A container that says something at once: from its shim's start to its first byte.

use std::fs::File;
use std::io::Read;

use anyhow::{Context, Result, ensure};

use super::listeners::both_ways;
use super::peers::{Container, Fifos, Peer, Surroundings};
use crate::sandbox::monotonic_ns;

/// What it says.
const SAID: &[u8] = b"up\n";
/// It says so, and then stays.
const STAYS: [&str; 3] = ["/bin/sh", "-c", "echo up; exec sleep 100000"];

/// A bundle and FIFOs; nothing runs yet.
pub(super) struct Prepared<'s> {
    container: Container<'s>,
    stdio: Fifos,
    stdout: File,
    _stderr: File,
}

/// When it came how far, by CLOCK_MONOTONIC in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stamps {
    /// Right before the shim's program was started.
    pub began: u64,
    /// Start had been answered.
    pub started: u64,
    /// The first byte had been read.
    pub first: u64,
}

impl<'s> Prepared<'s> {
    /// Makes what has to be there before.
    pub fn new(around: &'s Surroundings, peer: &Peer) -> Result<Self> {
        let container = Container::bundle(around, peer, &STAYS)?;
        let stdout = container.fifo("stdout")?;
        let stderr = container.fifo("stderr")?;
        Ok(Self {
            container,
            stdout: both_ways(&stdout)?,
            _stderr: both_ways(&stderr)?,
            stdio: Fifos {
                stdin: None,
                stdout: Some(stdout),
                stderr: Some(stderr),
            },
        })
    }

    /// Starts it, until it has said what it says.
    pub fn start(mut self) -> Result<(Container<'s>, Stamps)> {
        let began = monotonic_ns();
        let answer = self.container.start_shim()?;
        self.container.connect(&answer)?;
        self.container.create(&self.stdio)?;
        self.container.start("")?;
        let started = monotonic_ns();
        let mut said = [0; SAID.len()];
        self.stdout
            .read_exact(&mut said[..1])
            .context("its first byte")?;
        let first = monotonic_ns();
        self.stdout
            .read_exact(&mut said[1..])
            .context("its first line")?;
        ensure!(said == SAID, "it said {said:?} instead of {SAID:?}");
        let stamps = Stamps {
            began,
            started,
            first,
        };
        Ok((self.container, stamps))
    }
}
