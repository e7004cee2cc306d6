//! The nested testbed: boots an emulated AMD machine with SVM and runs one command in it.
//!
//! QEMU and the outer kernel come from unpacked packages. The outer guest has two read-only disks, tools and payload, under a
//! tmpfs root, and talks over one virtio-serial port (crate `nacre-testbed`). Its console goes to a log file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use nacre_testbed::{Frame, Job, PORT_NAME};

use crate::apt::{self, Release};
use crate::kvm::{self, Place};
use crate::run::{self, Lock, step};
use crate::stage::Stage;
use crate::{daemons, paths};

/// Modules of the outer kernel, named as in the kernel; what they depend on is loaded before them.
const MODULES: [&str; 17] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "ext4",
    "overlay",
    "irqbypass",
    "kvm",
    "kvm_amd",
    "loop",
    "erofs",
    "squashfs",
    "fuse",
    "tun",
    "veth",
    "bridge",
    "virtio_net",
];
/// Until the first frame, in which the outer guest boots.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// Longest silence of a guest that beats every second; a host that is busy otherwise stretches the emulation.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// One command in the testbed.
pub struct Request {
    /// The command.
    pub argv: Vec<String>,
    /// Environment beside the usual one.
    pub env: Vec<(String, String)>,
    /// Files and folders to bring along: from where, to where.
    pub copies: Vec<(PathBuf, PathBuf)>,
    /// Memory of the outer guest in MiB.
    pub memory: u32,
    /// Its CPUs.
    pub cpus: u32,
    /// Longest run of the command.
    pub time_limit: Option<Duration>,
    /// Run in the testbed even where the machine's own KVM would do.
    pub force_nested: bool,
    /// Folder on this machine that receives what the command writes to `$NACRE_OUT`.
    pub out: PathBuf,
}

impl Request {
    /// A command with the usual size and surroundings.
    pub fn new(argv: Vec<String>) -> Request {
        let out = paths::cache("testbed/out");
        Request {
            argv,
            env: Vec::new(),
            copies: Vec::new(),
            memory: 4096,
            cpus: 2,
            time_limit: None,
            force_nested: false,
            out,
        }
    }
}

/// What came of a command.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code, or 128 + the signal.
    pub code: i32,
    /// Why the testbed had to be booted a second time, if it had.
    pub retried: Option<String>,
}

/// Where the lines of a command go.
pub trait Sink {
    /// Bytes of its standard output.
    fn stdout(&mut self, data: &[u8]);
    /// Bytes of its standard error.
    fn stderr(&mut self, data: &[u8]);
    /// The testbed froze and begins anew: what was said so far will be said again.
    fn restart(&mut self, _why: &str) {}
}

/// Passes everything on to this process's own output.
pub struct Terminal;

impl Sink for Terminal {
    fn stdout(&mut self, data: &[u8]) {
        let _ = io::stdout()
            .write_all(data)
            .and_then(|()| io::stdout().flush());
    }

    fn stderr(&mut self, data: &[u8]) {
        let _ = io::stderr().write_all(data);
    }
}

/// Runs a command where guests can run: in the testbed, or directly on a machine whose KVM runs stock kernels.
pub fn execute(request: &Request, sink: &mut dyn Sink) -> Result<Outcome> {
    let (place, why) = kvm::place(request.force_nested);
    step(format!(
        "{why}: running {}",
        if place == Place::Host {
            "directly on it"
        } else {
            "in the nested testbed"
        }
    ));
    let _lock = Lock::take(&paths::cache("testbed/lock"), "the testbed")?;
    if request.out.exists() {
        fs::remove_dir_all(&request.out)?;
    }
    fs::create_dir_all(&request.out)?;
    match place {
        Place::Host => on_host(request, sink),
        Place::Testbed => nested(request, sink),
    }
}

fn on_host(request: &Request, sink: &mut dyn Sink) -> Result<Outcome> {
    let path = std::env::var("PATH").unwrap_or_default();
    let debug = paths::target().join("debug");
    let mut command = Command::new(&request.argv[0]);
    command
        .args(&request.argv[1..])
        .env("PATH", format!("{}:{path}", debug.display()));
    command
        .env("NACRE_OUT", &request.out)
        .env("NACRE_BIN", &debug);
    command
        .env("NACRE_KERNEL", paths::image("vmlinux"))
        .env("NACRE_INITRD", paths::image("initrd"));
    for (name, value) in daemons::environment_on_host()? {
        command.env(name, value);
    }
    let mut child = command
        .envs(request.env.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let pump = |mut stream: Box<dyn Read + Send>, wrap: fn(Vec<u8>) -> Frame| {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0u8; 65536];
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                let _ = sender.send(wrap(buffer[..read].to_vec()));
            }
        });
    };
    pump(
        Box::new(child.stdout.take().context("no stdout")?),
        Frame::Stdout,
    );
    pump(
        Box::new(child.stderr.take().context("no stderr")?),
        Frame::Stderr,
    );
    drop(sender);
    let started = Instant::now();
    let mut ended = None;
    loop {
        match receiver.recv_timeout(Duration::from_millis(50)) {
            Ok(Frame::Stdout(data)) => sink.stdout(&data),
            Ok(Frame::Stderr(data)) => sink.stderr(&data),
            Ok(_) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            // What is left is held open by something the command left behind.
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) if ended.is_some() => break,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
        ended = child.try_wait()?;
        if request
            .time_limit
            .is_some_and(|limit| started.elapsed() > limit)
        {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{} ran into its time limit", request.argv[0]);
        }
    }
    let status = child.wait()?;
    use std::os::unix::process::ExitStatusExt;
    Ok(Outcome {
        code: status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        retried: None,
    })
}

/// All that a boot of the outer guest needs, as files.
struct Machine {
    qemu: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    tools: PathBuf,
    payload: PathBuf,
}

fn nested(request: &Request, sink: &mut dyn Sink) -> Result<Outcome> {
    let machine = prepare(request)?;
    match boot(&machine, request, sink) {
        Ok(code) => Ok(Outcome {
            code,
            retried: None,
        }),
        Err(Failure::Fatal(error)) => Err(error),
        Err(Failure::Froze(why)) => {
            step(format!(
                "{why}; booting the testbed once more (this is the emulator's fault, and is reported as a retry)"
            ));
            sink.restart(&why);
            match boot(&machine, request, sink) {
                Ok(code) => Ok(Outcome {
                    code,
                    retried: Some(why),
                }),
                Err(Failure::Fatal(error)) => Err(error),
                Err(Failure::Froze(again)) => Err(anyhow!(
                    "the testbed failed twice: first {why}, then {again}"
                )),
            }
        }
    }
}

fn prepare(request: &Request) -> Result<Machine> {
    apt::ensure_installed(&[("e2fsprogs", "mke2fs"), ("libc-bin", "ldd"), ("gcc", "gcc")])?;
    let qemu = apt::closure(Release::BookwormBackports, &["qemu-system-x86"])?;
    let kernel_deb = apt::kernel(Release::Bookworm, "linux-image-cloud-amd64")?;
    let kernel_root = kernel_deb.unpacked()?;
    let release = single_entry(&kernel_root.join("lib/modules"))?;
    let release_name = release
        .file_name()
        .context("no kernel release")?
        .to_string_lossy()
        .into_owned();
    let kernel = kernel_root
        .join("boot")
        .join(format!("vmlinuz-{release_name}"));
    let initramfs = initramfs(&release)?;
    let tools = tools(&kernel_root)?.ext4("tools")?;
    let payload = payload(request)?.ext4("payload")?;
    Ok(Machine {
        qemu,
        kernel,
        initramfs,
        tools,
        payload,
    })
}

fn single_entry(folder: &Path) -> Result<PathBuf> {
    let entry = fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .next();
    Ok(entry
        .with_context(|| format!("{} is empty", folder.display()))??
        .path())
}

/// The outer guest's own init, built static; built again only when its source is newer.
fn init_program() -> Result<PathBuf> {
    let program = paths::target().join("x86_64-unknown-linux-gnu/agent/testbed-init");
    let source = paths::workspace().join("tests/testbed");
    let newest = ["Cargo.toml", "src/lib.rs", "src/main.rs"]
        .iter()
        .map(|file| modified(&source.join(file)))
        .max()
        .flatten();
    if modified(&program) < newest {
        step("building the testbed's init");
        run::run(run::cargo_static().args([
            "build",
            "-q",
            "-p",
            "nacre-testbed",
            "--bin",
            "testbed-init",
            "--profile",
            "agent",
            "--target",
            "x86_64-unknown-linux-gnu",
        ]))?;
        // Cargo leaves an unchanged program alone; its date is what is compared here.
        File::options()
            .append(true)
            .open(&program)?
            .set_modified(SystemTime::now())?;
    }
    Ok(program)
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .ok()
}

/// `/init` and the modules in load order.
fn initramfs(modules: &Path) -> Result<PathBuf> {
    let mut by_name = std::collections::HashMap::new();
    index_modules(&modules.join("kernel"), &mut by_name)?;
    let mut order: Vec<PathBuf> = Vec::new();
    for name in MODULES {
        add_module(name, &by_name, &mut order)?;
    }
    let init = init_program()?;
    let file = paths::cache("testbed").join("initramfs");
    let newest = [
        modified(&init),
        modified(&std::env::current_exe()?),
        modified(modules),
    ]
    .into_iter()
    .max()
    .flatten();
    if modified(&file) > newest {
        return Ok(file);
    }
    let mut names = String::new();
    let mut files: Vec<(String, u32, Vec<u8>)> = vec![
        ("init".into(), 0o100_755, fs::read(&init)?),
        ("modules".into(), 0o040_755, Vec::new()),
    ];
    for path in &order {
        let name = path
            .file_name()
            .context("module without a name")?
            .to_string_lossy()
            .into_owned();
        names.push_str(&name);
        names.push('\n');
        files.push((format!("modules/{name}"), 0o100_644, fs::read(path)?));
    }
    files.push(("modules/order".into(), 0o100_644, names.into_bytes()));
    let partial = file.with_extension("partial");
    let mut output = io::BufWriter::new(File::create(&partial)?);
    for (number, (name, mode, data)) in files.into_iter().enumerate() {
        let header = cpio::NewcBuilder::new(&name)
            .mode(mode)
            .ino(number as u32 + 1)
            .nlink(1);
        let mut writer = header.write(&mut output, u32::try_from(data.len())?);
        writer.write_all(&data)?;
        writer.finish()?;
    }
    cpio::newc::trailer(&mut output)?;
    output.flush()?;
    fs::rename(&partial, &file)?;
    Ok(file)
}

fn index_modules(
    folder: &Path,
    found: &mut std::collections::HashMap<String, PathBuf>,
) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            index_modules(&path, found)?;
        } else if let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".ko"))
        {
            found.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

/// Appends a module after those it depends on. One that the kernel has built in has no file, and needs none.
fn add_module(
    name: &str,
    by_name: &std::collections::HashMap<String, PathBuf>,
    order: &mut Vec<PathBuf>,
) -> Result<()> {
    let Some(path) = by_name.get(&name.replace('-', "_")) else {
        return Ok(());
    };
    if order.contains(path) {
        return Ok(());
    }
    for dependency in module_dependencies(&fs::read(path)?) {
        add_module(&dependency, by_name, order)?;
    }
    order.push(path.clone());
    Ok(())
}

/// The `depends=` entry of a module's `.modinfo`: NUL-terminated text.
fn module_dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The disk that changes rarely: a small userland, file system tools, the daemons, the outer kernel's modules.
fn tools(kernel: &Path) -> Result<Stage> {
    let mut stage = Stage::default();
    for (folder, mode) in [
        ("/proc", 0o555),
        ("/sys", 0o555),
        ("/dev", 0o755),
        ("/run", 0o755),
        ("/tmp", 0o1777),
        ("/var/lib", 0o755),
        ("/var/log", 0o755),
        ("/out", 0o755),
        ("/root", 0o700),
        ("/etc", 0o755),
        ("/mnt", 0o755),
        ("/opt", 0o755),
        ("/usr/share/nacre", 0o755),
        ("/home", 0o755),
    ] {
        stage.dir(folder, mode);
    }
    stage.link("/var/run", "/run");
    stage.bytes("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n");
    stage.bytes(
        "/etc/group",
        0o644,
        "root:x:0:\ntty:x:5:\nkvm:x:104:\nnogroup:x:65534:\n",
    );
    stage.bytes("/etc/hosts", 0o644, "127.0.0.1 localhost\n");
    stage.bytes("/etc/hostname", 0o644, "testbed\n");
    stage.bytes(
        "/etc/os-release",
        0o644,
        "ID=testbed\nNAME=\"nacre testbed\"\n",
    );

    let busybox = daemons::busybox()?;
    stage.file(&busybox, "/usr/bin/busybox")?;
    for applet in run::output(Command::new(&busybox).arg("--list"))?
        .lines()
        .filter(|applet| !["", "busybox"].contains(applet))
    {
        stage.link(Path::new("/usr/bin").join(applet), "busybox");
    }
    let erofs = apt::unpacked(Release::Bookworm, "erofs-utils")?;
    for (program, target) in [
        ("mke2fs", "mke2fs"),
        ("mke2fs", "mkfs.ext4"),
        ("e2fsck", "e2fsck"),
        ("debugfs", "debugfs"),
        ("resize2fs", "resize2fs"),
    ] {
        let source = ["/usr/sbin", "/sbin"]
            .iter()
            .map(|folder| Path::new(folder).join(program))
            .find(|path| path.exists());
        stage.program(
            &source.with_context(|| format!("this machine has no {program}"))?,
            Path::new("/usr/sbin").join(target),
            &[],
        )?;
    }
    stage.file(Path::new("/etc/mke2fs.conf"), "/etc/mke2fs.conf")?;
    let erofs_libraries =
        [apt::unpacked(Release::Bookworm, "liblz4-1")?.join("usr/lib/x86_64-linux-gnu")];
    stage.program(
        &erofs.join("usr/bin/mkfs.erofs"),
        "/usr/bin/mkfs.erofs",
        &erofs_libraries,
    )?;
    daemons::stage(&mut stage)?;
    let _ = kernel;
    Ok(stage)
}

/// The disk that changes with every build: our programs, the guest image, and what the caller brings along.
fn payload(request: &Request) -> Result<Stage> {
    let mut stage = Stage::default();
    for program in ["vmctl", "containerd-shim-nacre-v1", "nacre-e2e"] {
        let source = paths::debug(program);
        if source.exists() {
            stage.program(&source, Path::new("/usr/local/bin").join(program), &[])?;
        }
    }
    for file in ["vmlinux", "initrd"] {
        let source = paths::image(file);
        if source.exists() {
            stage.file(&source, Path::new("/usr/share/nacre").join(file))?;
        }
    }
    for (source, target) in &request.copies {
        stage.tree(source, target)?;
    }
    Ok(stage)
}

/// Why a boot gave no exit code.
enum Failure {
    /// The outer guest went silent or died: the emulator's doing, worth one retry.
    Froze(String),
    /// Anything that a second boot would not change.
    Fatal(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Fatal(error.into())
    }
}

/// The emulator, killed and reaped when dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(machine: &Machine, request: &Request, sink: &mut dyn Sink) -> Result<i32, Failure> {
    let logs = paths::cache("testbed");
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    let console = logs.join("console.log");
    let mut command = qemu_command(machine, request, &console, theirs.as_raw_fd());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(logs.join("qemu.log"))?);
    let inherited = theirs.as_raw_fd();
    let parent = std::process::id() as i32;
    // SAFETY: only async-signal-safe calls on plain integers. The emulator gets its end of the channel and dies with us.
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(inherited, libc::F_SETFD, 0) < 0
                || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0
            {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() != parent {
                return Err(io::Error::other("the parent is gone"));
            }
            Ok(())
        });
    }
    let started = Instant::now();
    let mut qemu = Qemu(command.spawn().context("starting the unpacked QEMU")?);
    drop(theirs);

    let mut channel = ours;
    let job = Job {
        argv: request.argv.clone(),
        env: guest_environment(request),
        cwd: "/root".into(),
        time: now(),
    };
    Frame::Job(serde_json::to_vec(&job)?).write_to(&mut channel)?;
    let mut silence = BOOT_LIMIT;
    loop {
        let limit = request
            .time_limit
            .map(|limit| (limit + BOOT_LIMIT).saturating_sub(started.elapsed()));
        if limit == Some(Duration::ZERO) {
            return Err(Failure::Fatal(anyhow!(
                "the command ran into its time limit of {} s",
                request.time_limit.unwrap_or_default().as_secs()
            )));
        }
        channel.set_read_timeout(Some(limit.map_or(silence, |limit| limit.min(silence))))?;
        match Frame::read_from(&mut channel) {
            Ok(Some(Frame::Hello(text))) => {
                step(format!(
                    "testbed: {text} ({:.1} s on this machine)",
                    started.elapsed().as_secs_f64()
                ));
                silence = SILENCE_LIMIT;
            }
            Ok(Some(Frame::Stdout(data))) => sink.stdout(&data),
            Ok(Some(Frame::Stderr(data))) => sink.stderr(&data),
            Ok(Some(Frame::File { path, offset, data })) => {
                store(&request.out, &path, offset, &data)?
            }
            Ok(Some(Frame::Exit(code))) => return Ok(code),
            Ok(Some(Frame::Heartbeat | Frame::Job(_))) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                if limit.is_some_and(|limit| limit <= silence) {
                    continue;
                }
                return Err(Failure::Froze(format!(
                    "the outer guest said nothing for {} s{}",
                    silence.as_secs(),
                    tail(&console)
                )));
            }
            Ok(None) | Err(_) => {
                let status = qemu.0.wait()?;
                let said = fs::read_to_string(logs.join("qemu.log")).unwrap_or_default();
                let said = said
                    .lines()
                    .filter(|line| !line.contains("TCG doesn't support"))
                    .collect::<Vec<_>>()
                    .join("\n");
                return Err(Failure::Froze(format!(
                    "the outer guest ended without a result (QEMU: {status}) {said}{}",
                    tail(&console)
                )));
            }
        }
    }
}

fn qemu_command(machine: &Machine, request: &Request, console: &Path, channel: i32) -> Command {
    let root = &machine.qemu;
    let library = |below: &str| root.join(below).display().to_string();
    // By its own loader and libraries, so that the machine's release does not matter.
    let mut command = Command::new(root.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(
        [
            library("usr/lib/x86_64-linux-gnu"),
            library("lib/x86_64-linux-gnu"),
        ]
        .join(":"),
    );
    command.arg(root.join("usr/bin/qemu-system-x86_64")).env(
        "QEMU_MODULE_DIR",
        root.join("usr/lib/x86_64-linux-gnu/qemu"),
    );
    command
        .arg("-L")
        .arg(root.join("usr/share/qemu"))
        .arg("-L")
        .arg(root.join("usr/share/seabios"));
    command.args([
        "-M",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "EPYC,+svm,+npt",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command
        .arg("-smp")
        .arg(request.cpus.to_string())
        .arg("-m")
        .arg(request.memory.to_string());
    command
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initramfs);
    command.args([
        "-append",
        "console=ttyS0 panic=-1 quiet mitigations=off nokaslr",
    ]);
    command
        .arg("-serial")
        .arg(format!("file:{}", console.display()));
    for (id, image) in [("tools", &machine.tools), ("payload", &machine.payload)] {
        command.arg("-drive").arg(format!(
            "if=none,id={id},format=raw,readonly=on,file={}",
            image.display()
        ));
        command
            .arg("-device")
            .arg(format!("virtio-blk-pci,drive={id}"));
    }
    command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    command
        .arg("-chardev")
        .arg(format!("socket,id=channel,fd={channel}"));
    command
        .arg("-device")
        .arg(format!("virtserialport,chardev=channel,name={PORT_NAME}"));
    command
}

fn guest_environment(request: &Request) -> Vec<(String, String)> {
    let fixed = [
        (
            "PATH",
            "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
        ),
        ("HOME", "/root"),
        ("TERM", "dumb"),
        ("TMPDIR", "/tmp"),
        ("NACRE_TESTBED", "nested"),
        ("NACRE_OUT", nacre_testbed::OUT_DIR),
        ("NACRE_BIN", "/usr/local/bin"),
    ];
    let mut all: Vec<(String, String)> = fixed
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    all.extend(daemons::environment_in_guest());
    all.extend(request.env.iter().cloned());
    all
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| time.as_secs() as i64)
}

/// Writes a piece of a file that came out of the guest; a path that would leave the folder is refused.
fn store(folder: &Path, path: &str, offset: u64, data: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let inside = Path::new(path)
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    if !inside || path.is_empty() {
        bail!("the outer guest named a file outside of its folder: {path}");
    }
    let file = folder.join(path);
    fs::create_dir_all(file.parent().unwrap_or(folder))?;
    let file = File::options()
        .create(true)
        .write(true)
        .truncate(offset == 0)
        .open(&file)
        .with_context(|| format!("writing {}", file.display()))?;
    Ok(file.write_all_at(data, offset)?)
}

/// The last lines of the console, for an error.
fn tail(console: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    match lines.len() {
        0 => format!(" (console empty, {})", console.display()),
        count => format!(
            "; its console ended with:\n{}",
            lines[count.saturating_sub(15)..].join("\n")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_dependencies_are_read_from_modinfo() {
        assert_eq!(
            module_dependencies(b"xx\0license=GPL\0depends=kvm,ccp\0name=y\0"),
            ["kvm", "ccp"]
        );
        assert!(module_dependencies(b"\0depends=\0name=y\0").is_empty());
        assert!(module_dependencies(b"nothing").is_empty());
    }

    #[test]
    fn files_from_the_guest_stay_in_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        store(folder.path(), "a/b", 0, b"123").unwrap();
        store(folder.path(), "a/b", 3, b"45").unwrap();
        assert_eq!(fs::read(folder.path().join("a/b")).unwrap(), b"12345");
        for path in ["../x", "/etc/x", "a/../../x", ""] {
            assert!(store(folder.path(), path, 0, b"").is_err(), "{path}");
        }
    }
}
