//! QEMU beside our VM: the folder by virtiofsd, and a disk by virtio-blk.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::files::Files;
use crate::bench::console::{Booted, Guest, Killed, LOOK, option, with_probe};
use crate::bench::probed::PROBE;

/// Where its guest has the disk, and the folder.
pub(super) const DISK: &str = "/disk";
pub(super) const SHARE: &str = "/share";

/// A QEMU whose guest waits for orders, with its virtiofsd; both are killed when dropped.
pub(super) struct Qemu {
    pub guest: Guest,
    _virtiofsd: Killed,
}

impl Qemu {
    /// Boots the guest and waits until it has mounted both.
    pub fn boot(
        what: &Booted<'_>,
        virtiofsd: &Path,
        files: &Files,
        disk: &Path,
        patience: Duration,
    ) -> Result<Self> {
        let initrd = files.beside("qemu-initrd");
        with_probe(what.initrd, &files.root().join(PROBE), &[], &initrd)?;
        let socket = files.beside("virtiofsd.sock");
        let virtiofsd = serve(virtiofsd, &files.root(), &socket, patience)?;
        let guest = what.boot(&arguments(what, &initrd, disk, &socket), patience)?;
        Ok(Self {
            guest,
            _virtiofsd: virtiofsd,
        })
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
    let mut arguments = what.arguments(initrd, "init");
    let devices = [
        "-machine",
        "memory-backend=ram",
        // virtiofsd maps it too.
        "-object",
        &format!(
            "memory-backend-memfd,id=ram,size={}M,share=on",
            what.memory_mib
        ),
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
    ];
    arguments.extend(devices.map(PathBuf::from));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_has_the_disk_and_the_share() {
        let path = Path::new;
        let what = Booted {
            program: path("/q"),
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
    fn a_virtiofsd_that_ends_at_once_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let second = Duration::from_secs(1);
        let error = serve(Path::new("/bin/false"), folder.path(), &socket, second).err();
        assert!(error.unwrap().to_string().contains("before it listened"));
    }
}
