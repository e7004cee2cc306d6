//! Running other programs, and telling the user what is going on.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Prints one line of progress.
pub fn step(text: impl AsRef<str>) {
    eprintln!("==> {}", text.as_ref());
}

/// Runs a program with its output on ours; an error names the command.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", show(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", show(command));
    }
    Ok(())
}

/// Runs a program and returns its standard output; an error carries its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", show(command)))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}\n{}",
            show(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command as one would type it.
pub fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy);
    words.collect::<Vec<_>>().join(" ")
}

/// Cargo, as xtask itself was started by, in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::paths::workspace());
    command
}

/// Cargo building static programs for a guest: an explicit target, so that the flags do not reach the host's build.
pub fn cargo_static() -> Command {
    let mut command = cargo();
    let mut flags = "-C target-feature=+crt-static".to_owned();
    // As a bitmap, relocations are all but none of what a boot unpacks of the agent; else they are a fifteenth of it.
    if output(Command::new("getconf").arg("GNU_LIBC_VERSION")).is_ok_and(|text| packs(&text)) {
        flags.push_str(" -C link-arg=-Wl,-z,pack-relative-relocs");
    }
    command.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", flags);
    command
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

/// Whether a static program of this C library ("glibc 2.36") applies packed relocations to itself: from 2.36 on.
fn packs(version: &str) -> bool {
    let numbers = version.trim().strip_prefix("glibc ");
    let numbers = numbers.and_then(|numbers| numbers.split_once('.'));
    numbers.is_some_and(|(major, minor)| match (major.parse(), minor.parse()) {
        (Ok(major), Ok(minor)) => (major, minor) >= (2u32, 36u32),
        _ => false,
    })
}

/// An exclusive lock on a file, held until dropped.
pub struct Lock(#[expect(dead_code, reason = "held for its drop")] File);

impl Lock {
    /// Waits for the lock, and says so if that takes time.
    pub fn take(path: &Path, what: &str) -> Result<Lock> {
        if let Some(lock) = Lock::try_take(path)? {
            return Ok(lock);
        }
        step(format!("waiting for another run that holds {what}"));
        let file = Lock::open(path)?;
        // SAFETY: the descriptor is open; flock takes no pointer.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("locking {}", path.display()));
        }
        Ok(Lock(file))
    }

    /// The lock, unless another holds it.
    pub fn try_take(path: &Path) -> Result<Option<Lock>> {
        let file = Lock::open(path)?;
        // SAFETY: the descriptor is open; flock takes no pointer.
        let held = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0;
        Ok((!held).then_some(Lock(file)))
    }

    fn open(path: &Path) -> Result<File> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .with_context(|| format!("opening {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relocations_are_packed_where_the_c_library_takes_them() {
        for (version, expected) in [
            ("glibc 2.36\n", true),
            ("glibc 2.41", true),
            ("glibc 3.0", true),
            ("glibc 2.35", false),
            ("musl 1.2", false),
            ("", false),
        ] {
            assert_eq!(packs(version), expected, "{version}");
        }
    }
}
