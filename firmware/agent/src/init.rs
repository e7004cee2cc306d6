//! What a first process owes the kernel: the root that containers can pivot
//! away from, the mounts, the console, the clock, and the end of the machine.
//! Nothing here knows of containers.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::time::{ClockId, clock_gettime, clock_settime};
use tracing::{debug, error, warn};

use nacre_protocol::PHASE_PORT;

use crate::error::{Doing, Error};

/// Where containers' cgroups live.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Where the agent keeps what it makes.
pub const STATE: &str = "/run/nacre";

/// Marks a boot phase for the VMM to stamp. Without the right to use ports it does nothing.
pub fn mark_phase(phase: u8) {
    // SAFETY: ioperm only asks the kernel for the right to one port; it touches no memory of ours.
    let granted = unsafe { libc::ioperm(u64::from(PHASE_PORT), 1, 1) } == 0;
    if granted {
        // SAFETY: the kernel has just granted this port; `out` touches no memory, and the port has no
        // effect on the machine other than being written down.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") PHASE_PORT, in("al") phase,
                options(nomem, nostack, preserves_flags));
        }
    }
}

/// Microseconds since the machine started, by `CLOCK_BOOTTIME`.
pub fn boottime_us() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |now| {
        let now = Duration::from(now);
        u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
    })
}

/// Nanoseconds since the epoch, by the guest's wall clock.
pub fn realtime_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_REALTIME).map_or(0, |now| {
        let now = Duration::from(now);
        u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// Makes the machine usable: root, mounts, console, cgroups, loopback.
///
/// # Errors
/// Only of what nothing works without; the rest is logged.
pub fn prepare() -> Result<(), Error> {
    move_root()?;
    for (kind, target, flags, data) in [
        ("proc", "/proc", NO_EXEC, None),
        ("sysfs", "/sys", NO_EXEC, None),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
        ("tmpfs", "/run", NO_SUID_NO_DEV, Some("mode=0755")),
        ("tmpfs", "/tmp", NO_SUID_NO_DEV, Some("mode=1777")),
    ] {
        mount(Some(kind), target, Some(kind), flags, data)
            .doing(|| format!("mounting {kind} on {target}"))?;
    }
    console();
    for (kind, target, flags, data) in [
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
            "newinstance,ptmxmode=0666,mode=0620,gid=5",
        ),
        ("tmpfs", "/dev/shm", NO_SUID_NO_DEV, "mode=1777"),
        (
            "cgroup2",
            CGROUP_ROOT,
            NO_EXEC,
            "nsdelegate,memory_recursiveprot",
        ),
    ] {
        let _ = fs::create_dir_all(target);
        let mounted = mount(Some(kind), target, Some(kind), flags, Some(data))
            .or_else(|_| mount(Some(kind), target, Some(kind), flags, None::<&str>));
        if let Err(error) = mounted {
            warn!("mounting {kind} on {target}: {error}");
        }
    }
    enable_controllers(Path::new(CGROUP_ROOT));
    fs::create_dir_all(STATE).doing(|| format!("making {STATE}"))?;
    // The containers' way to the agent's own file is then read-only, whatever they do with /proc/PID/exe.
    let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    if let Err(error) = mount(None::<&str>, "/", None::<&str>, sealed, None::<&str>) {
        warn!("making the root read-only: {error}");
    }
    raise_file_limit();
    if let Err(error) = loopback_up() {
        warn!("bringing up the loopback interface: {error}");
    }
    Ok(())
}

const NO_EXEC: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
const NO_SUID_NO_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Covers the initramfs with a bind mount of itself. `pivot_root` refuses to leave the kernel's first mount,
/// because that has no parent; from a mount on top of it, it works, and no file need be copied.
fn move_root() -> Result<(), Error> {
    for directory in ["/proc", "/sys", "/dev", "/run", "/tmp", "/.root"] {
        fs::create_dir_all(directory).doing(|| format!("making {directory}"))?;
    }
    let nothing = None::<&str>;
    mount(Some("/"), "/.root", nothing, MsFlags::MS_BIND, nothing)
        .doing(|| "binding the initramfs to /.root".into())?;
    std::env::set_current_dir("/.root").doing(|| "entering /.root".into())?;
    mount(Some("."), "/", nothing, MsFlags::MS_MOVE, nothing)
        .doing(|| "moving /.root over the root".into())?;
    nix::unistd::chroot(".").doing(|| "changing the root".into())?;
    std::env::set_current_dir("/").doing(|| "entering the new root".into())
}

/// Makes /dev/console, or at least /dev/null, the standard streams.
fn console() {
    for path in ["/dev/console", "/dev/null"] {
        let path = CString::new(path).expect("no NUL in it");
        // SAFETY: the path is a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_NOCTTY) };
        if fd < 0 {
            continue;
        }
        for standard in 0..3 {
            if fd != standard {
                // SAFETY: dup2 onto the standard numbers, which nothing in this process owns as a value.
                unsafe { libc::dup2(fd, standard) };
            }
        }
        if fd > 2 {
            // SAFETY: `fd` was opened above, is no standard stream, and is not used again.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        return;
    }
}

/// Hands every controller that this cgroup has down to its children; what cannot be is left out.
pub fn enable_controllers(cgroup: &Path) {
    let Ok(controllers) = fs::read_to_string(cgroup.join("cgroup.controllers")) else {
        return;
    };
    for controller in controllers.split_whitespace() {
        if let Err(error) = fs::write(
            cgroup.join("cgroup.subtree_control"),
            format!("+{controller}"),
        ) {
            debug!("enabling {controller} below {}: {error}", cgroup.display());
        }
    }
}

fn raise_file_limit() {
    let limit = libc::rlimit {
        rlim_cur: 65536,
        rlim_max: 1 << 20,
    };
    // SAFETY: setrlimit reads one rlimit, which lives here.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        warn!("raising the file limit: {}", io::Error::last_os_error());
    }
}

/// Brings up `lo` in the network namespace of the calling thread.
///
/// # Errors
/// What the kernel said to the socket or to the request.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: socket takes numbers only; the descriptor is owned right away.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: an all-zero ifreq is a valid one: names and numbers only.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Brings up `lo` in the network namespace of another process.
///
/// # Errors
/// What opening or entering the namespace, or bringing up `lo` in it, said.
pub fn loopback_up_in(pid: i32) -> io::Result<()> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))?;
    in_network(namespace, loopback_up)?
}

/// Does something in a network namespace, on a thread that ends in there: the others stay where they are.
///
/// # Errors
/// What entering the namespace said, or that the thread panicked.
pub fn in_network<T: Send + 'static>(
    namespace: fs::File,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    })
    .join()
    .unwrap_or_else(|_| Err(io::Error::other("the thread for it panicked")))
}

/// What is less than this is made up for slowly.
const STEP: Duration = Duration::from_millis(500);

/// Moves the wall clock by so many nanoseconds: at once if it is said, or much; else slowly.
///
/// # Errors
/// A time before the epoch, and what the kernel refused.
pub fn adjust_clock(by_ns: i64, at_once: bool) -> io::Result<()> {
    if by_ns == 0 {
        return Ok(());
    }
    if !at_once && Duration::from_nanos(by_ns.unsigned_abs()) < STEP {
        let delta = libc::timeval {
            tv_sec: 0,
            tv_usec: by_ns / 1000,
        };
        // SAFETY: the pointer is to a structure that lives over the call; the old one is not asked for.
        let result = unsafe { libc::adjtime(&raw const delta, std::ptr::null_mut()) };
        return match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
    }
    let now = i128::from(realtime_ns()) + i128::from(by_ns);
    let to = u64::try_from(now).map_err(|_| io::Error::other("it would be before the epoch"))?;
    clock_settime(ClockId::CLOCK_REALTIME, Duration::from_nanos(to).into())?;
    Ok(())
}

/// Sets the wall clock and the host name by the host's answer; zero and empty leave them.
pub fn set_clock_and_name(realtime_ns: u64, hostname: &str) {
    if realtime_ns > 0 {
        let time = Duration::from_nanos(realtime_ns).into();
        if let Err(error) = clock_settime(ClockId::CLOCK_REALTIME, time) {
            warn!("setting the clock: {error}");
        }
    }
    if !hostname.is_empty()
        && let Err(error) = nix::unistd::sethostname(hostname)
    {
        warn!("setting the host name: {error}");
    }
}

/// Ends the machine. Filesystems should be unmounted before; what is left is synced.
pub fn power_off() -> ! {
    nix::unistd::sync();
    let refused = reboot(RebootMode::RB_POWER_OFF);
    error!("powering off: {refused:?}");
    // An exit of the first process is a kernel panic, which the VMM sees.
    std::process::exit(1);
}
