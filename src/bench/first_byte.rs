//! A container that says something at once: from its shim's start to its first byte.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::mpsc;
use std::thread::Builder;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

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
    patience: Duration,
}

/// When it came how far, by CLOCK_MONOTONIC in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stamps {
    /// Right before the shim's program was started.
    pub began: u64,
    /// Start had been answered.
    pub started: u64,
    /// The first byte had been read, perhaps before.
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
            patience: around.patience(),
            stdout: both_ways(&stdout)?,
            _stderr: both_ways(&stderr)?,
            stdio: Fifos {
                stdin: None,
                stdout: Some(stdout),
                stderr: Some(stderr),
            },
        })
    }

    /// Starts it, until it has said what it says. Somebody listens all the while, as its first byte may come before Start's answer.
    pub fn start(mut self) -> Result<(Container<'s>, Stamps)> {
        let heard = listen(&self.stdout)?;
        let began = monotonic_ns();
        let started = self.begin();
        let first = match &started {
            Ok(_) => heard.recv_timeout(self.patience).ok(),
            Err(_) => None,
        };
        if first.is_none() {
            // The FIFO is open both ways: who listens is let go.
            let _ = self.stdout.write_all(&[0; SAID.len()]);
        }
        let started = started?;
        let Some(first) = first else {
            bail!("its first byte did not come within {:?}", self.patience);
        };
        let stamps = Stamps {
            began,
            started,
            first: first?,
        };
        Ok((self.container, stamps))
    }

    /// Until Start is answered; when that was.
    fn begin(&mut self) -> Result<u64> {
        let answer = self.container.start_shim()?;
        self.container.connect(&answer)?;
        self.container.create(&self.stdio)?;
        self.container.start("")?;
        Ok(monotonic_ns())
    }
}

/// Reads what it says in a thread, which tells when the first byte had come once all has.
fn listen(stdout: &File) -> Result<mpsc::Receiver<Result<u64>>> {
    let mut stdout = stdout.try_clone().context("listening to its stdout")?;
    let (tell, heard) = mpsc::channel();
    Builder::new()
        .name("first byte".to_owned())
        // Nobody may wait for it any more.
        .spawn(move || drop(tell.send(hear(&mut stdout))))
        .context("starting a thread that listens to its stdout")?;
    Ok(heard)
}

fn hear(stdout: &mut impl Read) -> Result<u64> {
    let mut said = [0; SAID.len()];
    stdout
        .read_exact(&mut said[..1])
        .context("reading its first byte")?;
    let first = monotonic_ns();
    stdout
        .read_exact(&mut said[1..])
        .context("reading its first line")?;
    ensure!(said == SAID, "it said {said:?} instead of {SAID:?}");
    Ok(first)
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn the_first_byte_has_its_time_whenever_it_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stdout");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut fifo = both_ways(&path).unwrap();
        let heard = listen(&fifo).unwrap();
        let before = monotonic_ns();
        fifo.write_all(&SAID[..1]).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let after = monotonic_ns();
        fifo.write_all(&SAID[1..]).unwrap();
        let first = heard.recv_timeout(Duration::from_secs(20)).unwrap();
        let first = first.unwrap();
        assert!(before <= first && first < after, "{before} {first} {after}");
        let heard = listen(&fifo).unwrap();
        fifo.write_all(&[0; SAID.len()]).unwrap();
        let other = heard.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(other.unwrap_err().to_string().contains("instead of"));
    }
}
