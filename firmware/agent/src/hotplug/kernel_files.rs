//! The files of /sys and /proc that plugging is done through: where they are,
//! and how a refusal of one reads.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::error::Error;

/// Where the kernel's files are: `/sys` and `/proc`, or what stands in for them in a test.
#[derive(Clone, Debug)]
pub struct KernelFiles {
    /// `/sys`
    pub sys: PathBuf,
    /// `/proc`
    pub proc: PathBuf,
}

impl KernelFiles {
    /// The machine's own.
    pub fn of_the_machine() -> KernelFiles {
        KernelFiles {
            sys: "/sys".into(),
            proc: "/proc".into(),
        }
    }

    /// A file below `/proc`, as text; empty if it cannot be read.
    pub fn proc_text(&self, file: &str) -> String {
        fs::read_to_string(self.proc.join(file)).unwrap_or_default()
    }

    /// `MemTotal`, `MemAvailable` or the like of `/proc/meminfo`, in bytes; 0 if it is not there.
    pub fn meminfo(&self, key: &str) -> u64 {
        self.proc_text("meminfo")
            .lines()
            .find_map(|line| line.split_once(':').filter(|(name, _)| *name == key))
            .and_then(|(_, value)| value.split_whitespace().next()?.parse::<u64>().ok())
            .map_or(0, |kib| kib.saturating_mul(1024))
    }
}

/// A one-line file without its newline; nothing if it cannot be read.
pub fn line(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Writes to a file of the kernel's; never makes one. Blocks as long as the kernel works on it.
///
/// # Errors
/// What the kernel said.
pub fn put(path: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

/// A refusal in words, the name of the error first, e.g. `EBUSY, Device or resource busy`.
pub fn words(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(errno) => format!("{errno:?}, {}", errno.desc()),
        None => error.to_string(),
    }
}

/// A list of numbers as the kernel writes it, e.g. `0-2,5`; what is no number or range is skipped. Numbers from 2^16 on
/// are no CPUs.
pub fn number_list(text: &str) -> Vec<u32> {
    let number = |text: &str| text.trim().parse::<u16>().ok().map(u32::from);
    text.split(',')
        .filter_map(|part| match part.split_once('-') {
            Some((first, last)) => Some(number(first)?..=number(last)?),
            None => number(part).map(|only| only..=only),
        })
        .flatten()
        .collect()
}

/// Runs what blocks in the kernel on a thread for that.
///
/// # Errors
/// Those of `work`; `Internal` if it panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        let table: [(&str, &[u32]); 6] = [
            ("0-2,5\n", &[0, 1, 2, 5]),
            ("3", &[3]),
            ("", &[]),
            ("x,1,2-y,4294967295,0-99999999", &[1]),
            ("5-3", &[]),
            ("0,2-3", &[0, 2, 3]),
        ];
        for (text, numbers) in table {
            assert_eq!(number_list(text), numbers, "{text:?}");
        }
    }

    #[test]
    fn a_refusal_has_its_name() {
        let busy = io::Error::from_raw_os_error(libc::EBUSY);
        assert_eq!(words(&busy), "EBUSY, Device or resource busy");
        assert_eq!(words(&io::Error::other("no")), "no");
    }

    #[test]
    fn a_file_is_written_and_never_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let missing = put(&path, "online").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(!path.exists());
        fs::write(&path, "").unwrap();
        put(&path, "online").unwrap();
        assert_eq!(line(&path).as_deref(), Some("online"));
    }

    #[test]
    fn meminfo_is_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let files = KernelFiles {
            sys: folder.path().into(),
            proc: folder.path().into(),
        };
        assert_eq!(files.meminfo("MemTotal"), 0);
        let text = "MemTotal:         502516 kB\nMemFree: 3 kB\nHugePages_Total:       0\n";
        fs::write(folder.path().join("meminfo"), text).unwrap();
        assert_eq!(files.meminfo("MemTotal"), 502_516 * 1024);
        assert_eq!(files.meminfo("MemFree"), 3072);
        assert_eq!(files.meminfo("Mem"), 0);
    }
}
