//! QEMU (`q35`) with our kernel, whose guest's first process is `nacre-probe` and takes its orders from the console: our agent powers
//! off where no host answers on vsock. What devices it has is for the scenarios.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nacre_vmm::config::default_cmdline;

use super::interrupt;
use super::probed::PROBE;

/// What the probe's lines begin with, and its first one.
const MARK: &str = "nacre-probe: ";
const READY: &str = "ready";
/// Between two looks for what a process is to do.
pub(super) const LOOK: Duration = Duration::from_millis(10);
/// Between two looks for a signal.
const ASK: Duration = Duration::from_millis(200);
/// How long an end may take.
const END: Duration = Duration::from_secs(20);

/// The program, and what is booted.
pub(super) struct Booted<'p> {
    pub program: &'p Path,
    pub kernel: &'p Path,
    pub initrd: &'p Path,
    pub vcpus: u8,
    pub memory_mib: u64,
}

/// A QEMU whose guest waits for orders; killed when dropped.
pub(super) struct Guest {
    lines: Receiver<String>,
    keys: ChildStdin,
    patience: Duration,
    qemu: Killed,
}

/// A process that ends with this.
pub(super) struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Booted<'_> {
    /// Options for every QEMU, with this initrd, whose probe is given these words.
    pub fn arguments(&self, initrd: &Path, words: &str) -> Vec<PathBuf> {
        let mut arguments: Vec<PathBuf> = [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-machine",
            "q35,accel=kvm",
            "-m",
            &format!("{}M", self.memory_mib),
            "-smp",
            &self.vcpus.to_string(),
            "-cpu",
            "host",
            "-serial",
            "stdio",
            "-append",
            &format!("{} rdinit=/{PROBE} -- {words}", default_cmdline()),
        ]
        .map(PathBuf::from)
        .to_vec();
        arguments.extend(["-kernel".into(), self.kernel.to_owned()]);
        arguments.extend(["-initrd".into(), initrd.to_owned()]);
        arguments
    }

    /// Boots the guest and waits until its probe has what it was told to have.
    pub fn boot(&self, arguments: &[PathBuf], patience: Duration) -> Result<Guest> {
        let mut child = Command::new(self.program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let keys = child.stdin.take().context("QEMU has no stdin")?;
        let console = child.stdout.take().context("QEMU has no stdout")?;
        let mut guest = Guest {
            lines: lines(console),
            keys,
            patience,
            qemu: Killed(child),
        };
        let said = guest.said().context("Booting QEMU's guest")?;
        if said != READY {
            bail!("Booting QEMU's guest: {said}");
        }
        Ok(guest)
    }
}

/// The lines of a console, until its end or until nobody listens.
fn lines(console: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim().to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    lines
}

impl Guest {
    /// The probe's next line.
    fn said(&mut self) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        let mut last = String::new();
        loop {
            interrupt::check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(ASK)) {
                Ok(line) => match line.split_once(MARK) {
                    Some((_, said)) => return Ok(said.to_owned()),
                    None if line.is_empty() => {}
                    None => last = line,
                },
                Err(RecvTimeoutError::Timeout) if left > ASK => {}
                Err(RecvTimeoutError::Timeout) => bail!(
                    "QEMU's guest did not answer within {:?}; its console ends with {last:?}",
                    self.patience
                ),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.qemu.0.wait().context("waiting for QEMU")?;
                    bail!(
                        "QEMU has ended ({status}; 0 if its guest did); its console ends with {last:?}"
                    );
                }
            }
        }
    }

    /// Has the probe do something; its line.
    pub fn ask(&mut self, words: &[String]) -> Result<String> {
        writeln!(self.keys, "{}", words.join(" ")).context("writing to QEMU's console")?;
        self.said()
    }

    /// Has the guest unmount and power off.
    pub fn end(mut self) -> Result<()> {
        writeln!(self.keys, "end").context("writing to QEMU's console")?;
        let began = Instant::now();
        while self.qemu.0.try_wait()?.is_none() {
            if began.elapsed() > END {
                bail!("QEMU's guest does not power off");
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// A path in an option of QEMU, where a comma is written twice.
pub(super) fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The image's initrd with the probe and other files in it, by a second archive behind the first: names, modes and contents.
pub(super) fn with_probe(
    initrd: &Path,
    probe: &Path,
    others: &[(&str, &[u8])],
    to: &Path,
) -> Result<()> {
    let mut whole =
        std::fs::read(initrd).with_context(|| format!("reading {}", initrd.display()))?;
    whole.resize(whole.len().next_multiple_of(4), 0);
    add_archive(&mut whole, probe, others)?;
    write(to, &whole)
}

/// An initrd of the probe and nothing else.
pub(super) fn probe_alone(probe: &Path, to: &Path) -> Result<()> {
    let mut whole = Vec::new();
    add_archive(&mut whole, probe, &[])?;
    write(to, &whole)
}

fn add_archive(whole: &mut Vec<u8>, probe: &Path, others: &[(&str, &[u8])]) -> Result<()> {
    let program = std::fs::read(probe).with_context(|| format!("reading {}", probe.display()))?;
    let programs = [(PROBE, 0o100_755, program.as_slice())].into_iter();
    let others = others
        .iter()
        .map(|(name, content)| (*name, 0o100_644, *content));
    for (number, (name, mode, content)) in (1..).zip(programs.chain(others)) {
        let header = cpio::NewcBuilder::new(name).mode(mode).ino(number).nlink(1);
        let mut writer = header.write(&mut *whole, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
    }
    cpio::newc::trailer(&mut *whole)?;
    Ok(())
}

fn write(to: &Path, bytes: &[u8]) -> Result<()> {
    File::create(to)
        .and_then(|mut file| file.write_all(bytes))
        .with_context(|| format!("writing {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_and_others_are_in_an_archive_behind_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut first = Vec::new();
        let header = cpio::NewcBuilder::new("init").ino(1).nlink(1);
        header.write(&mut first, 0).finish().unwrap();
        cpio::newc::trailer(&mut first).unwrap();
        std::fs::write(at("initrd"), &first).unwrap();
        std::fs::write(at("probe"), b"\x7fELF").unwrap();
        let others: [(&str, &[u8]); 1] = [("network.json", b"{}")];
        with_probe(&at("initrd"), &at("probe"), &others, &at("out")).unwrap();
        let whole = std::fs::read(at("out")).unwrap();
        assert!(whole.starts_with(&first));
        let second = &whole[first.len().next_multiple_of(4)..];
        let reader = cpio::NewcReader::new(second).unwrap();
        assert_eq!(reader.entry().name(), PROBE);
        assert_eq!(reader.entry().mode(), 0o100_755);
        let reader = cpio::NewcReader::new(reader.finish().unwrap()).unwrap();
        assert_eq!(reader.entry().name(), "network.json");
    }

    #[test]
    fn the_probe_may_be_alone() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("probe"), b"\x7fELF").unwrap();
        probe_alone(&at("probe"), &at("out")).unwrap();
        let whole = std::fs::read(at("out")).unwrap();
        let reader = cpio::NewcReader::new(whole.as_slice()).unwrap();
        assert_eq!(reader.entry().name(), PROBE);
        let reader = cpio::NewcReader::new(reader.finish().unwrap()).unwrap();
        assert!(reader.entry().is_trailer());
    }

    #[test]
    fn lines_of_a_console_end_with_it() {
        let console = std::io::Cursor::new(b"[ 0.1] Linux\r\nnacre-probe: ready\r\nx");
        let all: Vec<String> = lines(console).iter().collect();
        assert_eq!(all, ["[ 0.1] Linux", "nacre-probe: ready", "x"]);
    }
}
