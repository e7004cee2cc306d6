//! A container's root as a disk: an ext4 image made from a mounted directory,
//! sparse, with room for writing, without a journal (it lives as long as its
//! VM). Owners, modes, links, device nodes and xattrs are kept.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use nacre_protocol::agent::GuestMount;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::config::Rootfs;

/// ext4 block size of the images.
const BLOCK: u64 = 4096;
/// Directories in which the tools of e2fsprogs are looked for besides PATH, which a daemon's may leave out.
const SBIN: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];
/// How long a killed tool is waited for. One that waits for a dead disk or file server is beyond SIGKILL.
const ENDS_KILLED: Duration = Duration::from_secs(1);
/// Most that is kept of what a tool says.
const WORDS: u64 = 64 << 10;

/// A root image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// e2fsprogs is not installed.
    #[error("Cannot make a root image: {tool} is not there; install the package e2fsprogs")]
    NoTool {
        /// The program.
        tool: &'static str,
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
    #[error("Cannot make the root image {} from {}: {tool}: {message}", image.display(), from.display())]
    Tool {
        /// The program.
        tool: &'static str,
        /// The image.
        image: PathBuf,
        /// The directory.
        from: PathBuf,
        /// What it said, or its status.
        message: String,
    },
    /// The tool took longer than it may.
    #[error(
        "Cannot make the root image {} from {}: {tool} was not done within {limit:?}; rootfs.copy_timeout in the configuration gives it longer", image.display(), from.display()
    )]
    TooSlow {
        /// The program.
        tool: &'static str,
        /// The image.
        image: PathBuf,
        /// The directory.
        from: PathBuf,
        /// What it was given.
        limit: Duration,
    },
    /// The directory does not fit in an ext4 file system.
    #[error("Cannot make a root image from {}: {bytes} bytes are too many", from.display())]
    TooBig {
        /// The directory.
        from: PathBuf,
        /// Its size.
        bytes: u64,
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

/// Makes the ext4 image `image` (mode 0600) of the directory `from`, with the configured headroom or as much
/// again as it holds, whichever is more, to write in. Takes as long as copying the directory does, up to the
/// configured limit; call it where blocking is allowed. On failure no file is left. The caller has recorded the
/// image (see [`crate::record`]) before. `sized` is told the image's size in bytes before anything is written.
pub fn rootfs_image(
    from: &Path,
    image: &Path,
    config: &Rootfs,
    sized: impl FnOnce(u64) -> io::Result<()>,
) -> Result<(), Error> {
    let mkfs = find_tool("mkfs.ext4").ok_or(Error::NoTool { tool: "mkfs.ext4" })?;
    let debugfs = find_tool("debugfs").ok_or(Error::NoTool { tool: "debugfs" })?;
    let root = std::fs::metadata(from).map_err(io_error("read the rootfs", from))?;
    if !root.is_dir() {
        let source = io::Error::from(io::ErrorKind::NotADirectory);
        return Err(io_error("read the rootfs", from)(source));
    }
    let usage = Usage::of(from)?;
    let until = Instant::now() + config.copy_timeout;
    let run = |command, tool, input: &str| {
        let failed = |message| Error::Tool {
            tool,
            image: image.to_owned(),
            from: from.to_owned(),
            message,
        };
        match run(command, tool, input, until) {
            Ok(Some(())) => Ok(()),
            Ok(None) => Err(Error::TooSlow {
                tool,
                image: image.to_owned(),
                from: from.to_owned(),
                limit: config.copy_timeout,
            }),
            Err(message) => Err(failed(message)),
        }
    };
    let size = usage.image_size(config.headroom.0).ok_or(Error::TooBig {
        from: from.to_owned(),
        bytes: usage.bytes,
    })?;
    sized(size).map_err(io_error("find room for the root image", image))?;
    let made = (|| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(image)
            .map_err(io_error("make the root image", image))?;
        file.set_len(size)
            .map_err(io_error("size the root image", image))?;
        drop(file);
        let mut command = that_dies_with_us(&mkfs);
        command
            .args(["-q", "-F", "-m", "0", "-b", &BLOCK.to_string()])
            .args(["-O", "^has_journal,^resize_inode"])
            .args(["-E", "lazy_itable_init=1,nodiscard"])
            .args(["-N", &usage.inodes().to_string()])
            .arg("-d")
            .arg(from)
            .arg(image)
            .stdin(Stdio::null());
        run(command, "mkfs.ext4", "")?;
        // mkfs.ext4 takes the directory's content, not its own owner and mode, and adds a lost+found.
        let script = format!(
            "set_inode_field <2> mode 0{:o}\nset_inode_field <2> uid {}\nset_inode_field <2> gid {}\n{}",
            root.mode(),
            root.uid(),
            root.gid(),
            if from.join("lost+found").exists() {
                ""
            } else {
                "rmdir lost+found\n"
            },
        );
        let mut command = that_dies_with_us(&debugfs);
        command
            .args(["-w", "-f", "-"])
            .arg(image)
            .stdin(Stdio::piped());
        run(command, "debugfs", &script)
    })();
    if made.is_err() {
        // Nothing half-made is left; the record still names it, in vain.
        let _ = std::fs::remove_file(image);
    }
    made
}

/// A command of a tool that is killed when we end, however that comes: copying a large root goes on for long, and
/// holds its mounts and its disk space. By setpriv, since a fork of ours in place of the library's spawn would
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
fn run(
    mut command: Command,
    tool: &'static str,
    input: &str,
    until: Instant,
) -> Result<Option<()>, String> {
    let mut child = command
        .env("LC_ALL", "C")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("it does not start: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ends early says why by itself. The script is smaller than a pipe.
        let _ = stdin.write_all(input.as_bytes());
    }
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
    let said = said
        .lines()
        .filter(|line| !line.trim().is_empty() && !is_banner(line));
    let said = said.take(20).collect::<Vec<_>>().join("; ");
    // debugfs exits 0 whatever became of its commands: what it says on stderr tells.
    if status.success() && (said.is_empty() || tool != "debugfs") {
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

/// The version line that the tools of e2fsprogs begin with, such as `debugfs 1.47.0 (5-Feb-2023)`.
fn is_banner(line: &str) -> bool {
    line.starts_with("mke2fs ") || line.starts_with("debugfs ")
}

/// What a tree takes in an ext4 file system.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Usage {
    bytes: u64,
    entries: u64,
}

impl Usage {
    fn of(from: &Path) -> Result<Self, Error> {
        let mut usage = Self::default();
        let mut linked = HashSet::new();
        let mut directories = vec![from.to_owned()];
        while let Some(directory) = directories.pop() {
            let entries = std::fs::read_dir(&directory)
                .map_err(io_error("read the rootfs directory", &directory))?;
            for entry in entries {
                let entry = entry.map_err(io_error("read the rootfs directory", &directory))?;
                let path = entry.path();
                let metadata = match std::fs::symlink_metadata(&path) {
                    Ok(metadata) => metadata,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(io_error("read the rootfs entry", &path)(error)),
                };
                if metadata.is_dir() {
                    directories.push(path);
                } else if metadata.nlink() > 1 && !linked.insert((metadata.dev(), metadata.ino())) {
                    continue;
                }
                usage.add(&metadata);
            }
        }
        Ok(usage)
    }

    fn add(&mut self, metadata: &std::fs::Metadata) {
        let kind = metadata.file_type();
        let content = if kind.is_file() {
            // Holes stay holes; compressed file systems say fewer blocks than the image will have.
            metadata.len()
        } else if kind.is_dir() {
            metadata.len().max(BLOCK)
        } else if kind.is_symlink() && metadata.len() >= 60 {
            BLOCK
        } else {
            0
        };
        // One block more for what does not fit in the inode: extents and xattrs.
        let blocks = content.div_ceil(BLOCK).saturating_add(1);
        self.bytes = self.bytes.saturating_add(blocks.saturating_mul(BLOCK));
        self.entries += 1;
    }

    /// Inodes: as many again, and enough for a small root to grow.
    fn inodes(&self) -> u64 {
        self.entries
            .saturating_mul(2)
            .saturating_add(65_536)
            .min(u64::from(u32::MAX) / 2)
    }

    /// Size of the image, a whole number of MiB; None if ext4 with these blocks cannot have it.
    fn image_size(&self, headroom: u64) -> Option<u64> {
        let content = self.bytes.checked_add(self.bytes.max(headroom))?;
        let tables = self.inodes().checked_mul(256)?;
        let size = content
            .checked_add(tables)?
            .checked_add(content / 64)?
            .checked_add(16 << 20)?;
        let size = size.div_ceil(1 << 20).checked_mul(1 << 20)?;
        // 2^32 blocks without 64bit addressing; plenty.
        (size <= BLOCK << 32).then_some(size)
    }
}

/// Makes a directory below which a rootfs is mounted, mode 0700.
pub fn mount_point(path: &Path) -> Result<(), Error> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("make the mount point", path))
}

/// The mount in the guest of a root image that was attached as `device`. It is writable even for a
/// read-only root: the guest's runtime makes mount points in it first, and then makes it read-only.
/// `noinit_itable`: the image's inode tables are zero because it is sparse, and writing the zeros would
/// fill it.
pub fn rootfs_mount(device: &str) -> GuestMount {
    let mut mount = GuestMount::new();
    mount.fstype = "ext4".to_owned();
    mount.source = device.to_owned();
    mount.target = "rootfs".to_owned();
    mount.options = ["rw", "noinit_itable"].map(str::to_owned).to_vec();
    mount
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_setpriv_that_refuses_its_options_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str, script: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, script).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let good = make("good", "#!/bin/sh\nexit 0\n");
        let busybox = make("busybox", "#!/bin/sh\nexit 1\n");
        assert!(knows_pdeathsig(&good));
        assert!(!knows_pdeathsig(&busybox));
        assert!(!knows_pdeathsig(&folder.path().join("absent")));
    }

    #[test]
    fn usage_counts_blocks_entries_and_hard_links_once() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("a"), vec![1; 5000]).unwrap();
        std::fs::hard_link(root.path().join("a"), root.path().join("b")).unwrap();
        symlink("a", root.path().join("c")).unwrap();
        std::fs::create_dir(root.path().join("d")).unwrap();
        let usage = Usage::of(root.path()).unwrap();
        assert_eq!(usage.entries, 3);
        assert!(
            usage.bytes >= 6 * BLOCK && usage.bytes <= 16 * BLOCK,
            "{usage:?}"
        );
    }

    #[test]
    fn the_image_leaves_the_headroom_and_at_least_doubles() {
        let small = Usage {
            bytes: 1 << 20,
            entries: 10,
        };
        assert!(small.image_size(1 << 30).unwrap() > (1 << 30) + (1 << 20));
        let big = Usage {
            bytes: 4 << 30,
            entries: 10,
        };
        assert!(big.image_size(1 << 30).unwrap() > 8 << 30);
        assert_eq!(
            Usage {
                bytes: u64::MAX,
                entries: 0
            }
            .image_size(0),
            None
        );
        assert_eq!(small.image_size(1).unwrap() % (1 << 20), 0);
    }

    #[test]
    fn a_rootfs_that_is_not_there_is_named_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let image = root.path().join("i.img");
        let config = Rootfs::default();
        let error =
            rootfs_image(&root.path().join("none"), &image, &config, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
        assert!(!image.exists());
    }

    #[test]
    fn a_tool_that_is_not_done_in_time_is_killed_and_what_it_made_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let image = root.path().join("i.img");
        let from = root.path().join("root");
        std::fs::create_dir(&from).unwrap();
        // Longer than no time at all it takes always.
        let config = Rootfs {
            copy_timeout: Duration::ZERO,
            ..Rootfs::default()
        };
        let error = rootfs_image(&from, &image, &config, |_| Ok(())).unwrap_err();
        assert!(matches!(error, Error::TooSlow { .. }), "{error}");
        assert!(error.to_string().contains("rootfs.copy_timeout"), "{error}");
        assert!(!image.exists());
        let mut sleeper = Command::new("sleep");
        sleeper.arg("600");
        let began = Instant::now();
        let until = began + Duration::from_millis(50);
        assert_eq!(run(sleeper, "sleep", "", until), Ok(None));
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn what_a_tool_says_at_its_end_is_told() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdin(Stdio::null());
            let until = Instant::now() + Duration::from_secs(60);
            run(command, "sh", "", until)
        };
        assert_eq!(shell("echo no >&2; exit 3"), Err("no".to_owned()));
        assert!(shell("exit 3").unwrap_err().contains('3'));
        // More than a pipe holds, of either kind, keeps no tool from its end.
        let flood = "head -c 200000 /dev/zero; head -c 200000 /dev/zero >&2";
        assert_eq!(shell(flood), Ok(Some(())));
    }

    #[test]
    fn an_image_keeps_content_and_the_roots_own_mode() {
        let root = tempfile::tempdir().unwrap();
        let from = root.path().join("root");
        std::fs::create_dir(&from).unwrap();
        std::fs::write(from.join("hello"), "there").unwrap();
        std::fs::set_permissions(&from, std::fs::Permissions::from_mode(0o711)).unwrap();
        let image = root.path().join("i.img");
        let config = Rootfs {
            headroom: crate::config::ByteSize::from_mib(64),
            ..Rootfs::default()
        };
        let mut told = 0;
        let sized = |size| {
            told = size;
            Ok(())
        };
        rootfs_image(&from, &image, &config, sized).unwrap();
        let metadata = std::fs::metadata(&image).unwrap();
        assert_eq!(told, metadata.len());
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(metadata.blocks() * 512 < metadata.len() / 4, "it is sparse");
        let ask = |request: &str| {
            let output = Command::new(find_tool("debugfs").unwrap())
                .args(["-R", request])
                .arg(&image)
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        assert_eq!(ask("cat /hello"), "there");
        assert!(ask("stat <2>").contains("0711"), "{}", ask("stat <2>"));
        assert!(!ask("ls /").contains("lost+found"));
    }
}
