//! Disks that are made on the host before the guest has them: a file, with an
//! empty ext2, ext3 or ext4 file system in it.

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long a tool may take: it writes little, into a sparse file.
const LIMIT: Duration = Duration::from_secs(60);
/// Directories in which the tools of e2fsprogs are looked for besides PATH, which a daemon's may leave out.
const SBIN: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];
/// How long a killed tool is waited for. One that waits for a dead disk or file server is beyond SIGKILL.
const ENDS_KILLED: Duration = Duration::from_secs(1);
/// Most that is kept of what a tool says.
const WORDS: u64 = 64 << 10;

/// A file system cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// e2fsprogs is not installed.
    #[error("Cannot make a file system in {}: {tool} is not there; install the package e2fsprogs", path.display())]
    NoTool {
        /// The program.
        tool: String,
        /// The file.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("Cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tool failed.
    #[error("Cannot make a file system in {}: {tool}: {message}", path.display())]
    Tool {
        /// The program.
        tool: String,
        /// The file.
        path: PathBuf,
        /// What it said, or its status.
        message: String,
    },
    /// The tool took longer than it may.
    #[error("Cannot make a file system in {}: {tool} was not done within {LIMIT:?}", path.display())]
    TooSlow {
        /// The program.
        tool: String,
        /// The file.
        path: PathBuf,
    },
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

/// Where a tool of e2fsprogs is, if it is installed.
pub fn find_tool(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|directory| directory.join(tool))
        .find(|candidate| candidate.is_file())
}

/// Makes the sparse file `path` (mode 0600) of `size` bytes with an empty file system of `kind` (`ext2`, `ext3` or
/// `ext4`), unless there is a regular file, which is taken for one that was made before. It appears under its name when
/// it is whole; on failure nothing is left. Blocks.
///
/// # Errors
/// The file operation or the tool that failed.
pub fn make_file_system(
    path: &Path,
    kind: &str,
    size: u64,
    uuid: Option<&str>,
) -> Result<(), Error> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => return Ok(()),
        Ok(_) => {
            let source = io::Error::other("it is there and no regular file");
            return Err(io_error("make a disk in", path)(source));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error("look at", path)(error)),
    }
    let tool = format!("mkfs.{kind}");
    let Some(mkfs) = find_tool(&tool) else {
        let path = path.to_owned();
        return Err(Error::NoTool { tool, path });
    };
    // Another Create of the same file has one of its own.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".nacre-new-{}-{number}", std::process::id()));
    let unfinished = PathBuf::from(unfinished);
    let made = (|| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&unfinished)
            .map_err(io_error("make the disk", &unfinished))?;
        file.set_len(size)
            .map_err(io_error("size the disk", &unfinished))?;
        drop(file);
        let mut command = that_dies_with_us(&mkfs);
        command.args([
            "-q",
            "-F",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        ]);
        if let Some(uuid) = uuid {
            command.args(["-U", uuid]);
        }
        command.arg(&unfinished).stdin(Stdio::null());
        match run(command, Instant::now() + LIMIT) {
            Ok(Some(())) => {}
            Ok(None) => {
                let path = path.to_owned();
                return Err(Error::TooSlow { tool, path });
            }
            Err(message) => {
                let path = path.to_owned();
                return Err(Error::Tool {
                    tool,
                    path,
                    message,
                });
            }
        }
        match std::fs::hard_link(&unfinished, path) {
            // The first to be done is the one that counts.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            named => named.map_err(io_error("name the disk", path)),
        }
    })();
    let _ = std::fs::remove_file(&unfinished);
    made
}

/// A command of a tool that is killed when we end, however that comes: on a slow disk it goes on for long. By setpriv, since a fork of ours in place of the library's spawn would
/// write-protect the guest's memory; without one that can do it the tool ends by itself.
fn that_dies_with_us(tool: &Path) -> Command {
    static SETPRIV: OnceLock<Option<PathBuf>> = OnceLock::new();
    let setpriv = SETPRIV.get_or_init(|| find_tool("setpriv").filter(|path| knows_pdeathsig(path)));
    match setpriv {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(tool);
            command
        }
        None => Command::new(tool),
    }
}

/// util-linux's setpriv does, busybox's does not.
fn knows_pdeathsig(setpriv: &Path) -> bool {
    Command::new(setpriv)
        .args(["--pdeathsig", "KILL", "--"])
        .arg(setpriv)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs a tool to its end; None if that did not come in time. The error is what it said.
fn run(mut command: Command, until: Instant) -> Result<Option<()>, String> {
    let mut child = command
        .env("LC_ALL", "C")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("it does not start: {error}"))?;
    let (sender, words) = mpsc::channel();
    if let Some(mut stderr) = child.stderr.take() {
        std::thread::spawn(move || {
            let mut said = Vec::new();
            let _ = stderr.by_ref().take(WORDS).read_to_end(&mut said);
            // Nobody hears it once the tool is given up.
            let _ = sender.send(said);
            let _ = io::copy(&mut stderr, &mut io::sink());
        });
    }
    let Some(status) = wait_until(&mut child, until).map_err(|error| error.to_string())? else {
        let _ = child.kill();
        if !matches!(
            wait_until(&mut child, Instant::now() + ENDS_KILLED),
            Ok(Some(_))
        ) {
            std::thread::spawn(move || child.wait());
        }
        return Ok(None);
    };
    let said = words.recv_timeout(ENDS_KILLED).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    // The first line is the tool's version.
    let said = said
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with("mke2fs "));
    let said = said.take(20).collect::<Vec<_>>().join("; ");
    if status.success() {
        return Ok(Some(()));
    }
    Err(if said.is_empty() {
        status.to_string()
    } else {
        said
    })
}

/// The end of a child, unless it does not come in time.
fn wait_until(child: &mut Child, until: Instant) -> io::Result<Option<ExitStatus>> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        match rustix::event::poll(&mut fds, Some(&limit)) {
            Ok(0) => return Ok(None),
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_made_once_and_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rw.img");
        let uuid = "0123abcd-0000-4000-8000-000000000001";
        make_file_system(&path, "ext4", 16 << 20, Some(uuid)).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 16 << 20);
        assert_eq!(bytes[0x438..0x43a], [0x53, 0xef], "the superblock's magic");
        assert_eq!(bytes[0x468..0x46c], [0x01, 0x23, 0xab, 0xcd], "the UUID");
        assert_ne!(
            bytes[0x45c] & 4,
            0,
            "it has a journal, to replay after a crash"
        );
        std::fs::write(&path, b"kept").unwrap();
        make_file_system(&path, "ext4", 16 << 20, None).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_made_is_named_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rw.img");
        let error = make_file_system(&path, "ext4", 1000, None).unwrap_err();
        assert!(
            matches!(&error, Error::Tool { message, .. } if !message.is_empty()),
            "{error}"
        );
        let error = make_file_system(&path, "nothing", 16 << 20, None).unwrap_err();
        assert!(error.to_string().contains("mkfs.nothing"), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let error = make_file_system(directory.path(), "ext4", 16 << 20, None).unwrap_err();
        assert!(error.to_string().contains("make a disk"), "{error}");
    }

    #[test]
    fn a_tool_that_hangs_is_given_up_and_its_words_are_kept_otherwise() {
        let mut hangs = Command::new("sleep");
        hangs.arg("60").stdin(Stdio::null());
        let until = Instant::now() + Duration::from_millis(100);
        assert_eq!(run(hangs, until), Ok(None));
        let mut fails = Command::new("sh");
        fails
            .args(["-c", "echo no room >&2; exit 3"])
            .stdin(Stdio::null());
        let until = Instant::now() + Duration::from_secs(20);
        assert_eq!(run(fails, until), Err("no room".to_owned()));
    }
}
