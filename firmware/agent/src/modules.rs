//! Loads the kernel modules that the image brought, in the order of its list:
//! lines of `boot FILE` (needed to reach the host), `mount FILE` (needed by the
//! first container) or `late FILE` (needed by the first disk or network device, and
//! before the VM's size changes).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;

use tokio::sync::watch;
use tracing::{debug, error, warn};

/// Where the image puts the modules and the list of them.
pub const DIRECTORY: &str = "/modules";

/// Niceness of the thread that loads what no container waits for, beside a container that starts on the same vCPU.
const LATE_NICENESS: libc::c_int = 10;

/// The thread that loads them, while it does, else 0.
static LOADER: AtomicI32 = AtomicI32::new(0);

/// Whether someone has come to wait for them.
static AWAITED: AtomicBool = AtomicBool::new(false);

/// When a module is needed. They load in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Before the host is dialled.
    Boot,
    /// Before the first container.
    Mount,
    /// Before the first disk or network device, and before the VM's size changes.
    Late,
}

/// Loads the groups after [`Group::Boot`] on a thread of their own; what is sent is the last that is loaded.
///
/// # Errors
/// There is no thread.
pub fn load_behind(loaded: watch::Sender<Group>) -> io::Result<()> {
    let load = move || {
        load(Path::new(DIRECTORY), Group::Mount);
        loaded.send_replace(Group::Mount);
        let thread = nix::unistd::gettid().as_raw();
        set_niceness(thread, LATE_NICENESS);
        LOADER.store(thread, Ordering::SeqCst);
        if AWAITED.load(Ordering::SeqCst) {
            set_niceness(thread, 0);
        }
        load(Path::new(DIRECTORY), Group::Late);
        LOADER.store(0, Ordering::SeqCst);
        debug!("the late modules are loaded");
        loaded.send_replace(Group::Late);
    };
    thread::Builder::new()
        .name("modules".into())
        .spawn(load)
        .map(drop)
}

/// Someone waits for [`Group::Late`]: it loads with a usual thread's share of a vCPU that containers keep busy.
pub fn hurry() {
    AWAITED.store(true, Ordering::SeqCst);
    match LOADER.load(Ordering::SeqCst) {
        0 => {}
        thread => set_niceness(thread, 0),
    }
}

/// If it stays as it was, someone waits a little longer.
fn set_niceness(thread: libc::pid_t, niceness: libc::c_int) {
    // SAFETY: plain integers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, thread as libc::id_t, niceness) };
}

/// Loads all modules of a group, in order. What fails is logged, and the rest goes on: the feature that
/// misses the module says so itself. Blocks for the time of the modules' own start-up.
pub fn load(directory: &Path, group: Group) {
    let list = directory.join("order");
    let order = match fs::read_to_string(&list) {
        Ok(order) => order,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return error!("reading {}: {error}", list.display()),
    };
    for (number, line) in order.lines().enumerate() {
        match parse(line) {
            Ok(Some((of, file))) if of == group => {
                if let Err(error) = insert(&directory.join(file)) {
                    error!("loading module {file}: {error}");
                }
            }
            Ok(_) => {}
            // Said once, by the first group.
            Err(reason) if group == Group::Boot => {
                warn!("line {} of {}: {reason}", number + 1, list.display());
            }
            Err(_) => {}
        }
    }
}

/// One line of the list; nothing for an empty line or a comment.
fn parse(line: &str) -> Result<Option<(Group, &str)>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let Some((group, file)) = line.split_once(char::is_whitespace) else {
        return Err(format!(
            "`{line}` is not `boot FILE`, `mount FILE` or `late FILE`"
        ));
    };
    let group = match group {
        "boot" => Group::Boot,
        "mount" => Group::Mount,
        "late" => Group::Late,
        other => return Err(format!("`{other}` is none of `boot`, `mount` and `late`")),
    };
    let file = file.trim();
    if file.contains('/') || file.contains(char::is_whitespace) {
        return Err(format!("`{file}` is not the name of a file"));
    }
    Ok(Some((group, file)))
}

fn insert(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: finit_module gets an open descriptor, an empty NUL-terminated string and no flags.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            c"".as_ptr(),
            0 as libc::c_int,
        )
    };
    match answer {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            there if there.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_wrong_ones_refused() {
        let table = [
            ("boot virtio.ko", Ok(Some((Group::Boot, "virtio.ko")))),
            ("mount overlay.ko", Ok(Some((Group::Mount, "overlay.ko")))),
            ("  late   ext4.ko ", Ok(Some((Group::Late, "ext4.ko")))),
            ("", Ok(None)),
            ("# late ext4.ko", Ok(None)),
        ];
        for (line, expected) in table {
            assert_eq!(parse(line), expected, "{line}");
        }
        for line in ["virtio.ko", "soon x.ko", "boot ../x.ko", "boot a.ko b.ko"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
