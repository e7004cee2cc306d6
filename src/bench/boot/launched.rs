//! One process of a VMM, from its start until its guest's first process has said so on the console; then it is killed, so that all that it
//! cost was the boot's.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nacre_probe::HELLO;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::counted::{Counting, Missing, Number};
use crate::bench::console::{Killed, LOOK};
use crate::bench::report::Unit;

/// Bytes of a console's end that are shown of a boot that failed.
const SHOWN: usize = 400;
/// How long an end may come after that of the console.
const SOON: Duration = Duration::from_secs(5);

/// What a boot took.
#[derive(Debug)]
pub(super) struct Boot {
    /// From right before the process was started until the line was read.
    pub ms: f64,
    /// What else it took, of the process and its children.
    pub counted: Vec<Number>,
    /// What could not be counted.
    pub missing: Vec<Missing>,
}

/// Starts it and waits for the line; what it complains of goes into `folder`.
pub(super) fn boot(command: &mut Command, folder: &Path, patience: Duration) -> Result<Boot> {
    let program = command.get_program().to_os_string();
    let words = folder.join("stderr");
    let stderr = File::create(&words).with_context(|| format!("writing {}", words.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr);
    let (counting, missing) = Counting::begin()?;
    let began = Instant::now();
    let child = command
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let mut child = Killed(child);
    let console = child.0.stdout.take().context("it has no stdout")?;
    let mut said = Vec::new();
    let came = hello(console, &mut said, began + patience);
    let ended = Instant::now();
    let resident = peak_kib(&child.0);
    let status = match &came {
        Ok(false) => ended_soon(&mut child.0)?,
        _ => None,
    };
    drop(child);
    let mut counted = counting.end()?;
    if let (Ok(true), Ok(kib)) = (&came, resident) {
        counted.push(("resident at most", Unit::Kib, kib as f64));
        return Ok(Boot {
            ms: (ended - began).as_secs_f64() * 1e3,
            counted,
            missing,
        });
    }
    let complained = std::fs::read(&words).unwrap_or_default();
    let told = format!(
        "its console ends with {:?}, its errors with {:?}",
        end(&said),
        end(&complained)
    );
    match (came, status) {
        (Err(error), _) => Err(error).context(told),
        (Ok(_), Some(status)) => bail!("It ended ({status}) before its guest's init; {told}"),
        (Ok(_), None) => bail!("It closed its console or ended too soon to be looked at; {told}"),
    }
}

/// Its status, if it ends soon after its console did.
fn ended_soon(child: &mut Child) -> Result<Option<ExitStatus>> {
    let began = Instant::now();
    loop {
        let status = child.try_wait().context("waiting for its end")?;
        if status.is_some() || began.elapsed() > SOON {
            return Ok(status);
        }
        std::thread::sleep(LOOK);
    }
}

/// Reads a console until the line: true, or until its end: false.
fn hello(mut console: ChildStdout, said: &mut Vec<u8>, deadline: Instant) -> Result<bool> {
    let mut bytes = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut files = [PollFd::new(console.as_fd(), PollFlags::POLLIN)];
        match poll(&mut files, timeout) {
            Ok(0) if left.is_zero() => bail!("Its guest's init did not come in time"),
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error).context("waiting for its console"),
        }
        let length = console
            .read(&mut bytes)
            .context("reading from its console")?;
        if length == 0 {
            return Ok(false);
        }
        // The line may be in two parts.
        let from = said.len().saturating_sub(HELLO.len());
        said.extend(&bytes[..length]);
        let fresh = &said[from..];
        if fresh
            .windows(HELLO.len())
            .any(|part| part == HELLO.as_bytes())
        {
            return Ok(true);
        }
    }
}

/// The most that a process has had resident, KiB.
fn peak_kib(child: &Child) -> Result<u64> {
    let file = format!("/proc/{}/status", child.id());
    let status = std::fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    peak_of(&status).with_context(|| format!("{file} has no VmHWM"))
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

fn end(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(SHOWN);
    String::from_utf8_lossy(&bytes[from..]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> (Result<Boot>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        let patience = Duration::from_millis(if text.contains("exec") { 300 } else { 20_000 });
        let boot = boot(&mut command, folder.path(), patience);
        (boot, folder)
    }

    #[test]
    fn a_boot_is_over_when_the_guests_init_says_so() {
        let (boot, _folder) =
            script("echo '[ 0.1] Linux'; printf 'nacre-probe: '; sleep 0.05; echo hello; sleep 5");
        let boot = boot.unwrap();
        assert!((50.0..10_000.0).contains(&boot.ms), "{boot:?}");
        let resident = boot.counted.iter().find(|(_, unit, _)| *unit == Unit::Kib);
        assert!(resident.unwrap().2 > 0.0);
    }

    #[test]
    fn one_that_does_not_come_so_far_is_told_with_its_last_words() {
        let (boot, _folder) = script("echo no kernel; echo bad option >&2; false");
        let error = format!("{:#}", boot.unwrap_err());
        for words in ["before its guest's init", "no kernel", "bad option"] {
            assert!(error.contains(words), "{words} in {error}");
        }
        let (boot, _folder) = script("echo booting; exec sleep 5");
        let error = format!("{:#}", boot.unwrap_err());
        assert!(
            error.contains("in time") && error.contains("booting"),
            "{error}"
        );
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("/nowhere/vmm");
        let error = boot(&mut command, folder.path(), Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("/nowhere/vmm"));
    }

    #[test]
    fn the_peak_is_that_of_the_status() {
        assert_eq!(peak_of("Name:\tx\nVmHWM:\t    5120 kB\n"), Some(5120));
        assert_eq!(peak_of("Name:\tx\n"), None);
    }
}
