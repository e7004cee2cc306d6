//! A container that `nacre-probe` is run in, an exec for each thing that is measured; and where the probe is.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::listeners::both_ways;
use super::peers::{Container, Fifos, Joined, Peer, Surroundings};
use super::{absolute, in_path, variable};

/// The probe's file in the root of all that it runs in.
pub(super) const PROBE: &str = "nacre-probe";

/// A root of one mount: its type, source and options.
pub(super) type Root<'a> = (&'a str, &'a Path, &'a [&'a str]);

/// The static program that measures: a given one, or the one that is found.
pub(super) fn program(given: Option<&Path>) -> Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name(PROBE);
    let given = given
        .map(Path::to_owned)
        .or_else(|| variable("NACRE_PROBE"));
    let found = given.or_else(|| Some(beside).filter(|file| file.is_file()));
    let found = found.or_else(|| in_path(PROBE)).context(
        "There is no nacre-probe beside this program or in PATH: `cargo xtask bench` makes it, --probe names it",
    )?;
    absolute(&found)
}

/// A container that runs, with the probe in its root.
pub(super) struct Probed<'s> {
    container: Container<'s>,
    asked: u64,
}

impl<'s> Probed<'s> {
    /// Starts it.
    pub fn start(
        around: &'s Surroundings,
        peer: &Peer,
        joined: &Joined<'_>,
        root: Root<'_>,
    ) -> Result<Self> {
        let probe = format!("/{PROBE}");
        let mut container = Container::bundle_with(around, peer, &[&probe, "idle"], joined)?;
        let answer = container.start_shim()?;
        container.connect(&answer)?;
        container.create_over(&Fifos::default(), root)?;
        container.start("")?;
        Ok(Self {
            container,
            asked: 0,
        })
    }

    /// Has the probe do something; its line. What it says and complains of is less than what a FIFO holds.
    pub fn ask(&mut self, words: &[String]) -> Result<String> {
        self.asked += 1;
        let id = format!("probe{}", self.asked);
        let stdout = self.container.fifo(&format!("{id}-out"))?;
        let stderr = self.container.fifo(&format!("{id}-err"))?;
        // Nobody need read while it runs.
        let (said, complained) = (both_ways(&stdout)?, both_ways(&stderr)?);
        let stdio = Fifos {
            stdin: None,
            stdout: Some(stdout.clone()),
            stderr: Some(stderr.clone()),
        };
        let probe = format!("/{PROBE}");
        let mut args = vec![probe.as_str()];
        args.extend(words.iter().map(String::as_str));
        self.container.exec(&id, &args, &stdio)?;
        self.container.start(&id)?;
        let status = self.container.wait(&id)?;
        self.container.delete(&id)?;
        ensure!(
            status == 0,
            "the probe ended with {status}: {}",
            what_is_there(complained)?.trim()
        );
        let mut line = String::new();
        BufReader::new(said)
            .read_line(&mut line)
            .context("reading the probe's answer")?;
        for fifo in [&stdout, &stderr] {
            std::fs::remove_file(fifo)?;
        }
        Ok(line)
    }

    /// The ordinary end of one.
    pub fn end(self) -> Result<()> {
        self.container.end()
    }
}

/// What is in a FIFO, without waiting for more.
fn what_is_there(mut fifo: File) -> Result<String> {
    fcntl(&fifo, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut bytes = Vec::new();
    match fifo.read_to_end(&mut bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error)?,
        _ => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_a_fifo_holds_is_read_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut writer = both_ways(&path).unwrap();
        let reader = both_ways(&path).unwrap();
        writer.write_all(b"no space").unwrap();
        assert_eq!(what_is_there(reader).unwrap(), "no space");
    }
}
