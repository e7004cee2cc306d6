//! The outer guest's init: loads modules, mounts the root, runs one job, reports over the virtio-serial port.
//!
//! It runs as PID 1 from the initramfs and stays there: the root it builds is two read-only disks under a tmpfs overlay,
//! and the job is its only child of its own making. Whatever goes wrong is printed on the console before power-off.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant, SystemTime};

use nacre_testbed::{Frame, Job, OUT_DIR, PORT_NAME};

type Port = Arc<Mutex<File>>;

fn main() {
    if std::process::id() != 1 {
        eprintln!(
            "testbed-init is the init of the nested testbed's outer guest; it does nothing elsewhere"
        );
        std::process::exit(2);
    }
    if let Err(error) = run() {
        eprintln!("testbed-init: {error}");
    }
    // SAFETY: plain system calls without pointers; nothing is left to lose, every disk is read-only.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    loop {
        std::thread::park();
    }
}

fn run() -> io::Result<()> {
    mount("proc", "/proc", "proc", 0, "")?;
    mount("sysfs", "/sys", "sysfs", 0, "")?;
    mount("devtmpfs", "/dev", "devtmpfs", 0, "")?;
    load_modules()?;
    build_root()?;

    let path = wait_for("the virtio-serial port", find_port)?;
    let mut port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| with(&error, &path))?;
    let Some(Frame::Job(json)) = Frame::read_from(&mut port)? else {
        return Err(io::Error::other("the first frame is not a job"));
    };
    let job: Job = serde_json::from_slice(&json)?;
    set_clock(job.time);

    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime = uptime.split(' ').next().unwrap_or("?").to_owned();
    let port: Port = Arc::new(Mutex::new(port));
    send(
        &port,
        &Frame::Hello(format!("Linux {}, up after {uptime} s", release.trim())),
    )?;

    let stop = Arc::new(AtomicBool::new(false));
    let beats = {
        let (port, stop) = (Arc::clone(&port), Arc::clone(&stop));
        std::thread::spawn(move || beat(&port, &stop))
    };
    let code = run_job(&port, &job);
    stop.store(true, Ordering::SeqCst);
    beats.thread().unpark();
    let _ = beats.join();
    send(&port, &Frame::Exit(code))
}

/// Starts the job, pumps its output, and reaps everything until it ends.
fn run_job(port: &Port, job: &Job) -> i32 {
    let Some((program, arguments)) = job.argv.split_first() else {
        let _ = send(port, &Frame::Stderr(b"testbed: no command\n".to_vec()));
        return 127;
    };
    let path = job
        .env
        .iter()
        .find(|(key, _)| key == "PATH")
        .map_or("", |(_, value)| value.as_str());
    let program = look_up(program, path);
    let mut command = Command::new(&program);
    command
        .args(arguments)
        .env_clear()
        .envs(job.env.iter().cloned());
    command.current_dir(if job.cwd.is_empty() { "/" } else { &job.cwd });
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: setsid is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let text = format!("testbed: cannot start {}: {error}\n", program.display());
            let _ = send(port, &Frame::Stderr(text.into_bytes()));
            return 127;
        }
    };
    let (done, all_done) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        let (port, done) = (Arc::clone(port), done.clone());
        std::thread::spawn(move || pump(stdout, &port, Frame::Stdout, &done));
    }
    if let Some(stderr) = child.stderr.take() {
        let (port, done) = (Arc::clone(port), done.clone());
        std::thread::spawn(move || pump(stderr, &port, Frame::Stderr, &done));
    }
    let pid = child.id() as i32;
    let code = loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result; PID 1 reaps every child, this one and orphans alike.
        let reaped = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if reaped == pid {
            break if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                128 + libc::WTERMSIG(status)
            };
        }
        if reaped < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            break 255;
        }
    };
    // A daemon that the job left behind may hold its output open: what is in the pipes now still comes out.
    let deadline = Instant::now() + Duration::from_secs(2);
    for _ in 0..2 {
        let _ = all_done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
    code
}

/// Copies one stream of the job to the port until its end.
fn pump(mut stream: impl Read, port: &Port, frame: fn(Vec<u8>) -> Frame, done: &mpsc::Sender<()>) {
    let mut buffer = vec![0u8; 64 * 1024];
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 || send(port, &frame(buffer[..read].to_vec())).is_err() {
            break;
        }
    }
    let _ = done.send(());
}

/// What of a file has been copied out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sent {
    inode: u64,
    length: u64,
    modified: SystemTime,
}

impl Sent {
    fn all_of(metadata: &Metadata) -> io::Result<Self> {
        Ok(Self {
            inode: metadata.ino(),
            length: metadata.len(),
            modified: metadata.modified()?,
        })
    }

    /// Where to go on in what is there now. A file that grew is a log and goes on where it was; any other change starts it anew,
    /// and so does another file in its place, which a program leaves that replaces what it wrote before.
    fn goes_on(self, now: Self) -> u64 {
        if self.inode == now.inode && now.length > self.length {
            self.length
        } else {
            0
        }
    }
}

/// Says every second that the guest lives, and copies out what changed under [`OUT_DIR`].
fn beat(port: &Port, stop: &AtomicBool) {
    let mut sent: HashMap<PathBuf, Sent> = HashMap::new();
    loop {
        let last = stop.load(Ordering::SeqCst);
        let _ = send(port, &Frame::Heartbeat);
        copy_out(port, Path::new(OUT_DIR), &mut sent);
        if last {
            return;
        }
        std::thread::park_timeout(Duration::from_secs(1));
    }
}

fn copy_out(port: &Port, folder: &Path, sent: &mut HashMap<PathBuf, Sent>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            copy_out(port, &path, sent);
            continue;
        }
        let known = sent.get(&path).copied();
        let (Ok(now), true) = (Sent::all_of(&metadata), metadata.is_file()) else {
            continue;
        };
        if known == Some(now) {
            continue;
        }
        if let Ok(now) = copy_changes(port, &path, known) {
            sent.insert(path, now);
        }
    }
}

/// Copies what is new in the file that has the path now.
fn copy_changes(port: &Port, path: &Path, known: Option<Sent>) -> io::Result<Sent> {
    let file = File::open(path)?;
    let now = Sent::all_of(&file.metadata()?)?;
    let offset = known.map_or(0, |known| known.goes_on(now));
    let length = copy_file(port, &file, path, offset)?;
    Ok(Sent { length, ..now })
}

fn copy_file(port: &Port, file: &File, path: &Path, mut offset: u64) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let name = path
        .strip_prefix(OUT_DIR)
        .unwrap_or(path)
        .to_string_lossy()
        .into_owned();
    let mut buffer = vec![0u8; 128 * 1024];
    let mut first = true;
    loop {
        let read = file.read_at(&mut buffer, offset)?;
        if read == 0 && !(first && offset == 0) {
            return Ok(offset);
        }
        send(
            port,
            &Frame::File {
                path: name.clone(),
                offset,
                data: buffer[..read].to_vec(),
            },
        )?;
        offset += read as u64;
        first = false;
        if read == 0 {
            return Ok(offset);
        }
    }
}

fn send(port: &Port, frame: &Frame) -> io::Result<()> {
    let mut port = port
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    frame.write_to(&mut *port)
}

/// Puts the root together: tools disk and payload disk under a tmpfs, kernel file systems on top, then moves into it.
fn build_root() -> io::Result<()> {
    for (device, folder) in [("/dev/vda", "/disks/tools"), ("/dev/vdb", "/disks/payload")] {
        wait_for(device, || Path::new(device).exists().then_some(()))?;
        fs::create_dir_all(folder)?;
        mount(device, folder, "ext4", libc::MS_RDONLY, "")?;
    }
    fs::create_dir_all("/disks/scratch")?;
    mount("tmpfs", "/disks/scratch", "tmpfs", 0, "mode=755,size=90%")?;
    for folder in ["/disks/scratch/upper", "/disks/scratch/work", "/root"] {
        fs::create_dir_all(folder)?;
    }
    let layers = "lowerdir=/disks/payload:/disks/tools,upperdir=/disks/scratch/upper,workdir=/disks/scratch/work";
    mount("overlay", "/root", "overlay", 0, layers)?;
    for (source, folder, kind, flags, options) in [
        ("proc", "/proc", "proc", 0, ""),
        ("sysfs", "/sys", "sysfs", 0, ""),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""),
        ("devtmpfs", "/dev", "devtmpfs", 0, ""),
        (
            "devpts",
            "/dev/pts",
            "devpts",
            0,
            "gid=5,mode=620,ptmxmode=666",
        ),
        ("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"),
        ("mqueue", "/dev/mqueue", "mqueue", 0, ""),
        ("tmpfs", "/run", "tmpfs", 0, "mode=755"),
        ("tmpfs", "/tmp", "tmpfs", 0, "mode=1777,size=90%"),
        ("tmpfs", "/var/lib", "tmpfs", 0, "mode=755,size=90%"),
        ("tmpfs", OUT_DIR, "tmpfs", 0, "mode=755"),
    ] {
        let folder = format!("/root{folder}");
        fs::create_dir_all(&folder)?;
        mount(source, &folder, kind, flags, options)?;
    }
    for folder in ["run", "tmp", "var/lib"] {
        copy_in(
            &Path::new("/disks/payload").join(folder),
            &Path::new("/root").join(folder),
        )?;
    }
    std::env::set_current_dir("/root")?;
    mount(".", "/", "", libc::MS_MOVE, "")?;
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")?;
    // containerd wants shared propagation, as an ordinary init leaves it.
    mount("", "/", "", libc::MS_SHARED | libc::MS_REC, "")?;
    let _ = fs::write(
        "/sys/fs/cgroup/cgroup.subtree_control",
        "+cpuset +cpu +io +memory +pids",
    );
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(link));
    }
    let _ = fs::write("/proc/sys/kernel/hostname", "testbed");
    // The loopback interface; busybox is on the tools disk.
    let _ = Command::new("/usr/bin/busybox")
        .args(["ip", "link", "set", "lo", "up"])
        .status();
    Ok(())
}

/// Brings what the payload has under a folder that a tmpfs now covers.
fn copy_in(source: &Path, target: &Path) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(source) else {
        return Ok(());
    };
    for entry in entries {
        let entry = entry?;
        let (from, to) = (entry.path(), target.join(entry.file_name()));
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            fs::create_dir_all(&to)?;
            fs::set_permissions(&to, metadata.permissions())?;
            copy_in(&from, &to)?;
        } else if metadata.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&from)?, &to)?;
        } else {
            fs::copy(&from, &to)?;
        }
    }
    Ok(())
}

/// Loads what `/modules/order` lists, in that order. A module that fails is named on the console and passed over.
fn load_modules() -> io::Result<()> {
    for name in fs::read_to_string("/modules/order")?.lines() {
        let path = Path::new("/modules").join(name);
        let file = File::open(&path).map_err(|error| with(&error, &path))?;
        // SAFETY: the descriptor is open and the parameter string is a static C string.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result != 0 {
            eprintln!(
                "testbed-init: module {name}: {}",
                io::Error::last_os_error()
            );
        }
    }
    Ok(())
}

/// Finds the port by its name, since its number depends on the devices beside it.
fn find_port() -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = Path::new("/dev").join(entry.file_name());
        if name.trim() == PORT_NAME && device.exists() {
            return Some(device);
        }
    }
    None
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> io::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "{what} did not appear within 60 s"
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn look_up(program: &str, path: &str) -> PathBuf {
    if program.contains('/') {
        return PathBuf::from(program);
    }
    path.split(':')
        .map(|folder| Path::new(folder).join(program))
        .find(|file| file.is_file())
        .unwrap_or_else(|| program.into())
}

fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: libc::c_ulong,
    options: &str,
) -> io::Result<()> {
    let text = |value: &str| CString::new(value).map_err(io::Error::other);
    fs::create_dir_all(target)?;
    let (source_c, target_c, kind_c, options_c) =
        (text(source)?, text(target)?, text(kind)?, text(options)?);
    // SAFETY: all four pointers are to C strings that live until the call returns.
    let result = unsafe {
        libc::mount(
            source_c.as_ptr(),
            target_c.as_ptr(),
            kind_c.as_ptr(),
            flags,
            options_c.as_ptr().cast(),
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(
            error.kind(),
            format!("mounting {kind} {source} on {target}: {error}"),
        ));
    }
    Ok(())
}

fn set_clock(seconds: i64) {
    let time = libc::timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec for the length of the call. A refusal leaves the RTC's time, which also does.
    unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) };
}

fn with(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_goes_on_and_a_file_that_was_replaced_starts_anew() {
        let folder = std::env::temp_dir().join(format!("testbed-sent-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("a.json");
        let sent = || Sent::all_of(&fs::metadata(&file).unwrap()).unwrap();
        fs::write(&file, "one").unwrap();
        let before = sent();
        let mut log = OpenOptions::new().append(true).open(&file).unwrap();
        std::io::Write::write_all(&mut log, b" more").unwrap();
        assert_eq!(before.goes_on(sent()), 3);
        // Longer than before, but another one.
        let partial = folder.join("a.json.partial");
        fs::write(&partial, "something else").unwrap();
        fs::rename(&partial, &file).unwrap();
        assert_eq!(before.goes_on(sent()), 0);
        fs::write(&file, "x").unwrap();
        assert_eq!(before.goes_on(sent()), 0);
        fs::remove_dir_all(&folder).unwrap();
    }
}
