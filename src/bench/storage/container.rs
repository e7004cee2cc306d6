//! A container that the probe is run in: of nacre, whose root is a disk and which has the folder as a bind mount; or of runc, whose
//! root is the folder.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::files::{Files, PROBE};
use super::work::Answer;
use crate::bench::listeners::both_ways;
use crate::bench::peers::{Container, Fifos, Peer, Surroundings};

/// Where nacre's container has the folder.
pub(super) const SHARE: &str = "/share";

/// A container that runs.
pub(super) struct Probed<'s> {
    container: Container<'s>,
    asked: u64,
}

impl<'s> Probed<'s> {
    /// nacre's, over the disk.
    pub fn over_disk(
        around: &'s Surroundings,
        peer: &Peer,
        files: &Files,
        disk: &Path,
    ) -> Result<Self> {
        let root = files.root();
        Self::start(
            around,
            peer,
            &[(&root, SHARE)],
            ("ext4", disk, &["loop", "rw"]),
        )
    }

    /// runc's, over the folder.
    pub fn over_folder(around: &'s Surroundings, peer: &Peer, files: &Files) -> Result<Self> {
        Self::start(around, peer, &[], ("bind", &files.root(), &["rbind", "rw"]))
    }

    fn start(
        around: &'s Surroundings,
        peer: &Peer,
        binds: &[(&Path, &str)],
        root: (&str, &Path, &[&str]),
    ) -> Result<Self> {
        let probe = format!("/{PROBE}");
        let mut container = Container::bundle_with(around, peer, &[&probe, "idle"], binds)?;
        let answer = container.start_shim()?;
        container.connect(&answer)?;
        container.create_over(&Fifos::default(), root)?;
        container.start("")?;
        Ok(Self {
            container,
            asked: 0,
        })
    }

    /// Has the probe do something.
    pub fn ask(&mut self, words: &[String]) -> Result<Answer> {
        self.asked += 1;
        let id = format!("probe{}", self.asked);
        let stdout = self.container.fifo(&format!("{id}-out"))?;
        let stderr = self.container.fifo(&format!("{id}-err"))?;
        // Both are less than what a FIFO holds, so that nobody need read while it runs.
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
        Answer::parse(&line)
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
