//! QEMU (`q35`) with the same kernel, beside our VM: the folder by virtiofsd, and a disk by virtio-blk. Our agent powers off where no
//! host answers on vsock, so the guest's first process is the probe, which takes its orders from the console.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nacre_vmm::config::default_cmdline;

use super::files::{Files, PROBE};
use super::work::Answer;

/// Where its guest has the disk, and the folder.
pub(super) const DISK: &str = "/disk";
pub(super) const SHARE: &str = "/share";
/// What the probe's lines begin with, and its first one.
const MARK: &str = "nacre-probe: ";
const READY: &str = "ready";
/// Between two looks for virtiofsd's socket.
const LOOK: Duration = Duration::from_millis(10);
/// How long an end may take.
const END: Duration = Duration::from_secs(20);

/// The programs, and what is booted.
pub(super) struct Booted<'p> {
    pub program: &'p Path,
    pub virtiofsd: &'p Path,
    pub kernel: &'p Path,
    pub initrd: &'p Path,
    pub vcpus: u8,
    pub memory_mib: u64,
}

/// A QEMU whose guest waits for orders; killed when dropped.
pub(super) struct Qemu {
    lines: Receiver<String>,
    keys: ChildStdin,
    patience: Duration,
    qemu: Killed,
    _virtiofsd: Killed,
}

/// A process that ends with this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Qemu {
    /// Boots the guest and waits until it has mounted both.
    pub fn boot(what: &Booted<'_>, files: &Files, disk: &Path, patience: Duration) -> Result<Self> {
        let initrd = files.beside("qemu-initrd");
        with_probe(what.initrd, &files.root().join(PROBE), &initrd)?;
        let socket = files.beside("virtiofsd.sock");
        let virtiofsd = serve(what.virtiofsd, &files.root(), &socket, patience)?;
        let mut child = Command::new(what.program)
            .args(arguments(what, &initrd, disk, &socket))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", what.program.display()))?;
        let keys = child.stdin.take().context("QEMU has no stdin")?;
        let console = child.stdout.take().context("QEMU has no stdout")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut console = BufReader::new(console);
            let mut line = Vec::new();
            // Until QEMU ends, or nobody listens.
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
        let mut this = Self {
            lines,
            keys,
            patience,
            qemu: Killed(child),
            _virtiofsd: virtiofsd,
        };
        let said = this.said().context("Booting QEMU's guest")?;
        match said.as_str() {
            READY => Ok(this),
            _ => Err(Answer::parse(&said).err().unwrap_or_else(|| anyhow!(said)))
                .context("Booting QEMU's guest"),
        }
    }

    /// The probe's next line.
    fn said(&mut self) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        let mut last = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => match line.split_once(MARK) {
                    Some((_, said)) => return Ok(said.to_owned()),
                    None if line.is_empty() => {}
                    None => last = line,
                },
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

    /// Has the probe do something.
    pub fn ask(&mut self, words: &[String]) -> Result<Answer> {
        writeln!(self.keys, "{}", words.join(" ")).context("writing to QEMU's console")?;
        Answer::parse(&self.said()?)
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

/// Starts virtiofsd, until it listens.
fn serve(program: &Path, folder: &Path, socket: &Path, patience: Duration) -> Result<Killed> {
    let child = Command::new(program)
        .arg("--socket-path")
        .arg(socket)
        .arg("--shared-dir")
        .arg(folder)
        // As with us, what the guest knows of names and attributes holds for a second.
        .args(["--cache", "auto", "--sandbox", "chroot"])
        .args(["--log-level", "error"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let mut virtiofsd = Killed(child);
    let began = Instant::now();
    while !socket.exists() {
        if let Some(status) = virtiofsd.0.try_wait()? {
            bail!("virtiofsd ended with {status} before it listened; its words are above");
        }
        if began.elapsed() > patience {
            bail!("virtiofsd does not listen on {}", socket.display());
        }
        std::thread::sleep(LOOK);
    }
    Ok(virtiofsd)
}

fn arguments(what: &Booted<'_>, initrd: &Path, disk: &Path, socket: &Path) -> Vec<PathBuf> {
    let memory = what.memory_mib;
    let mut arguments: Vec<PathBuf> = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        "q35,accel=kvm,memory-backend=ram",
        // virtiofsd maps it too.
        "-object",
        &format!("memory-backend-memfd,id=ram,size={memory}M,share=on"),
        "-m",
        &format!("{memory}M"),
        "-smp",
        &what.vcpus.to_string(),
        "-cpu",
        "host",
        "-serial",
        "stdio",
        "-append",
        &format!("{} rdinit=/{PROBE} -- init", default_cmdline()),
        "-object",
        "iothread,id=io",
        "-drive",
        &format!(
            "file={},if=none,id=disk,format=raw,cache=writeback,aio=io_uring",
            option(disk)
        ),
        "-device",
        "virtio-blk-pci,drive=disk,iothread=io",
        "-chardev",
        &format!("socket,id=share,path={}", option(socket)),
        "-device",
        "vhost-user-fs-pci,chardev=share,queue-size=1024,tag=share",
    ]
    .map(PathBuf::from)
    .to_vec();
    arguments.extend(["-kernel".into(), what.kernel.to_owned()]);
    arguments.extend(["-initrd".into(), initrd.to_owned()]);
    arguments
}

/// A path in an option of QEMU, where a comma is written twice.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The image's initrd with the probe in it, by a second archive behind the first.
fn with_probe(initrd: &Path, probe: &Path, to: &Path) -> Result<()> {
    let mut whole =
        std::fs::read(initrd).with_context(|| format!("reading {}", initrd.display()))?;
    let program = std::fs::read(probe).with_context(|| format!("reading {}", probe.display()))?;
    whole.resize(whole.len().next_multiple_of(4), 0);
    let header = cpio::NewcBuilder::new(PROBE)
        .mode(0o100_755)
        .ino(1)
        .nlink(1);
    let mut writer = header.write(&mut whole, u32::try_from(program.len())?);
    writer.write_all(&program)?;
    writer.finish()?;
    cpio::newc::trailer(&mut whole)?;
    File::create(to)
        .and_then(|mut file| file.write_all(&whole))
        .with_context(|| format!("writing {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_has_the_disk_and_the_share() {
        let path = Path::new;
        let what = Booted {
            program: path("/q"),
            virtiofsd: path("/v"),
            kernel: path("/k"),
            initrd: path("/i"),
            vcpus: 2,
            memory_mib: 768,
        };
        let all = arguments(&what, path("/i2"), path("/a,b"), path("/s"));
        let words: Vec<_> = all.iter().map(|word| word.display().to_string()).collect();
        let line = words.join(" ");
        for part in [
            "file=/a,,b,",
            "path=/s ",
            "size=768M,share=on",
            "-smp 2",
            "rdinit=/nacre-probe -- init",
            "-initrd /i2",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }

    #[test]
    fn the_probe_is_in_an_archive_behind_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut first = Vec::new();
        let header = cpio::NewcBuilder::new("init").ino(1).nlink(1);
        header.write(&mut first, 0).finish().unwrap();
        cpio::newc::trailer(&mut first).unwrap();
        std::fs::write(at("initrd"), &first).unwrap();
        std::fs::write(at("probe"), b"\x7fELF").unwrap();
        with_probe(&at("initrd"), &at("probe"), &at("out")).unwrap();
        let whole = std::fs::read(at("out")).unwrap();
        assert!(whole.starts_with(&first));
        let second = &whole[first.len().next_multiple_of(4)..];
        let reader = cpio::NewcReader::new(second).unwrap();
        assert_eq!(reader.entry().name(), PROBE);
        assert_eq!(reader.entry().mode(), 0o100_755);
    }

    #[test]
    fn a_virtiofsd_that_ends_at_once_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let second = Duration::from_secs(1);
        let error = serve(Path::new("/bin/false"), folder.path(), &socket, second).err();
        assert!(error.unwrap().to_string().contains("before it listened"));
    }
}
