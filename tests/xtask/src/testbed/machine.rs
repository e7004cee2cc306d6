//! What a boot of the outer guest is made of: QEMU and kernel from packages, an initramfs, a tools disk and a payload disk.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use super::Request;
use crate::apt::{self, Release};
use crate::run::{self, step};
use crate::stage::Stage;
use crate::{daemons, paths};

/// The outer kernel's metapackage. Not the cloud flavour, which is the guests': a container can then tell the two by their release.
const KERNEL: &str = "linux-image-amd64";
/// Modules of the outer kernel, named as in the kernel; what they depend on is loaded before them.
const MODULES: [&str; 35] = [
    "crc32c_generic",
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
    // How a guest's interface is one with its namespace's.
    "sch_ingress",
    "cls_u32",
    "act_mirred",
    // What CNI's portmap does with iptables.
    "iptable_filter",
    "iptable_nat",
    "ip6table_filter",
    "ip6table_nat",
    "xt_nat",
    "xt_MASQUERADE",
    "xt_comment",
    "xt_mark",
    "xt_multiport",
    "xt_addrtype",
    "xt_conntrack",
    "xt_tcpudp",
    "xt_CHECKSUM",
    "dummy",
];
/// All that a boot of the outer guest needs, as files.
pub(super) struct Machine {
    pub(super) qemu: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) tools: PathBuf,
    pub(super) payload: PathBuf,
}

/// Puts together, or finds in the cache, what this request boots.
pub(super) fn prepare(request: &Request) -> Result<Machine> {
    apt::ensure_installed(&[
        ("e2fsprogs", "mke2fs"),
        ("libc-bin", "ldd"),
        ("util-linux", "setpriv"),
        ("gcc", "gcc"),
    ])?;
    let qemu = apt::closure(Release::TrixieBackports, &["qemu-system-x86"])?;
    let kernel_deb = apt::kernel(Release::Bookworm, KERNEL)?;
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
    let tools = tools()?.ext4("tools")?;
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
    let mut by_name = HashMap::new();
    index_modules(&modules.join("kernel"), &mut by_name)?;
    let mut order: Vec<PathBuf> = Vec::new();
    for name in MODULES {
        add_module(name, &by_name, &mut order)?;
    }
    let init = init_program()?;
    let release = modules
        .file_name()
        .context("no kernel release")?
        .to_string_lossy();
    let file = paths::testbed("").join(format!("initramfs-{release}"));
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

fn index_modules(folder: &Path, found: &mut HashMap<String, PathBuf>) -> Result<()> {
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
    by_name: &HashMap<String, PathBuf>,
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

/// The disk that changes rarely: a small userland, file system tools, the daemons.
fn tools() -> Result<Stage> {
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
    // In busybox's place: busybox's setpriv has no --pdeathsig, which the shim's tools are started with.
    stage.program(Path::new("/usr/bin/setpriv"), "/usr/bin/setpriv", &[])?;
    mkfs_erofs(&mut stage)?;
    iptables(&mut stage)?;
    daemons::stage(&mut stage)?;
    Ok(stage)
}

/// mkfs.erofs of a newer release, since containerd's erofs snapshotter has it read tar archives; by its own loader and with
/// its own libraries.
fn mkfs_erofs(stage: &mut Stage) -> Result<()> {
    let root = apt::closure(Release::Trixie, &["erofs-utils"])?;
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    for entry in
        std::fs::read_dir(&libraries).with_context(|| format!("reading {}", libraries.display()))?
    {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_owned();
        if name.to_string_lossy().contains(".so") {
            stage.file(&path, Path::new("/opt/erofs/lib").join(name))?;
        }
    }
    stage.file(&root.join("usr/bin/mkfs.erofs"), "/opt/erofs/mkfs.erofs")?;
    let script = "#!/bin/sh\nexec /opt/erofs/lib/ld-linux-x86-64.so.2 --library-path /opt/erofs/lib /opt/erofs/mkfs.erofs \"$@\"\n";
    stage.bytes("/usr/bin/mkfs.erofs", 0o755, script);
    Ok(())
}

/// iptables, which CNI's portmap runs: the older of its two kinds, whose kernel modules are few.
fn iptables(stage: &mut Stage) -> Result<()> {
    let root = apt::closure(Release::Bookworm, &["iptables"])?;
    stage.tree_alone(
        &root.join("usr/lib/x86_64-linux-gnu/xtables"),
        Path::new("/opt/iptables/xtables"),
    )?;
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    for folder in libraries.map(|folder| root.join(folder)) {
        for entry in
            std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
        {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_owned();
            if path.is_file() && name.to_string_lossy().contains(".so") {
                stage.file(&path, Path::new("/opt/iptables/lib").join(name))?;
            }
        }
    }
    stage.file(
        &root.join("usr/sbin/xtables-legacy-multi"),
        "/opt/iptables/xtables-legacy-multi",
    )?;
    for name in ["iptables", "ip6tables"] {
        let script = format!(
            "#!/bin/sh\nexport XTABLES_LIBDIR=/opt/iptables/xtables\nexec /opt/iptables/lib/ld-linux-x86-64.so.2 --library-path /opt/iptables/lib /opt/iptables/xtables-legacy-multi {name} \"$@\"\n"
        );
        stage.bytes(Path::new("/usr/sbin").join(name), 0o755, script);
    }
    Ok(())
}

/// The disk that changes with every build: our programs, the guest image, and what the caller brings along.
fn payload(request: &Request) -> Result<Stage> {
    let mut stage = Stage::default();
    for program in [
        "vmctl",
        "containerd-shim-nacre-v1",
        "nacre-bench",
        "nacre-e2e",
    ] {
        let source = request.programs.join(program);
        if source.exists() {
            stage.program(&source, Path::new("/usr/local/bin").join(program), &[])?;
        }
    }
    let probe = paths::static_program(paths::PROBE);
    if probe.exists() {
        stage.file(&probe, Path::new("/usr/local/bin").join(paths::PROBE))?;
    }
    for file in ["vmlinux", "initrd"] {
        for (source, folder) in [
            (paths::image(file), "/usr/share/nacre"),
            (paths::newer_image(file), "/usr/share/nacre/6.12"),
        ] {
            if source.exists() {
                stage.file(&source, Path::new(folder).join(file))?;
            }
        }
    }
    for (source, target) in &request.copies {
        stage.tree(source, target)?;
    }
    for (source, target) in &request.roots {
        stage.tree_alone(source, target)?;
    }
    Ok(stage)
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
}
