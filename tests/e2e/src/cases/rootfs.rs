//! Roots in every form in which a containerd hands them over: by its snapshotters, and as the newest ones do, which no
//! package has yet, by Create calls of our own.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::types::mount::Mount;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, mknod};
use serde_json::{Value, json};

use super::calls::One;
use crate::context::{Context, Runtime, Version};
use crate::ctr::{self, Ctr, expect_words};
use crate::disk::Disk;
use crate::image;
use crate::poll;
use crate::processes;
use crate::shim::{Bundle, Dialect};
use crate::suite::{Case, Subject};
use crate::tasks::{Stdio, Tasks};

const fn alone(name: &'static str, seconds: (u64, u64), run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Alone,
        seconds,
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "the same container runs under each snapshotter",
        subject: Subject::Agreed,
        seconds: (300, 300),
        run: snapshotters,
    },
    alone(
        "layers of erofs and a scratch disk that is made are a root",
        (120, 120),
        layers,
    ),
    alone(
        "layers of erofs below directories of the host are a root",
        (120, 120),
        host_above,
    ),
    alone(
        "many layers with whiteouts are one disk",
        (240, 600),
        whiteouts,
    ),
    alone(
        "a disk with ext4 is a root, and a view of it too",
        (120, 120),
        ext4,
    ),
    alone(
        "a scratch disk is sound after every end, and is recovered after a crash",
        (400, 1800),
        ends,
    ),
    alone(
        "one disk too many is refused with the number, and leaves nothing",
        (120, 120),
        too_many,
    ),
    alone(
        "roots and volumes of a container with users of its own show their owners mapped",
        (150, 150),
        mapped,
    ),
    alone("roots that are not served are named", (90, 90), refused),
];

/// Runs in a container of any root.
const PROBE: &str = "set -e; echo written > /file; cat /file; chown 7:8 /file; stat -c '%u:%g %a' /file; \
     mkdir /d; mv /file /d/moved; ls /d; rm -r /etc; ls -d /etc 2>&1 || true; sha256sum < /bin/busybox";

fn snapshotters(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let mut all = vec!["overlayfs", "native", "blockfile"];
    if ctr.daemon.version == Version::V2_1 {
        all.push("erofs");
    }
    let mut said: Option<String> = None;
    for snapshotter in all {
        let flags = ["--snapshotter", snapshotter];
        let output = ctr.script(&context.id(snapshotter), &flags, PROBE);
        let unpacked = if snapshotter == "overlayfs" {
            Ok(())
        } else {
            forget(&ctr, snapshotter)
        };
        let output = output?;
        output
            .expect_code(0)
            .with_context(|| snapshotter.to_owned())?;
        unpacked?;
        let out = output.out();
        expect_words(&out, &["written\n7:8 644\nmoved\n", "No such file"])?;
        match &said {
            Some(before) => ensure!(
                *before == out,
                "{snapshotter} says {out:?} and not {before:?}"
            ),
            None => said = Some(out),
        }
    }
    Ok(())
}

/// Removes what a snapshotter has unpacked: it keeps mounts of it.
fn forget(ctr: &Ctr<'_>, snapshotter: &str) -> Result<()> {
    for _ in 0..8 {
        let listed = ctr.call(&["snapshots", "--snapshotter", snapshotter, "list"])?;
        let listed = listed.out();
        let keys: Vec<&str> = listed
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        if keys.is_empty() {
            return Ok(());
        }
        for key in keys {
            // Those that others are made of go in a later turn.
            ctr.call(&["snapshots", "--snapshotter", snapshotter, "remove", key])?;
        }
    }
    bail!("{snapshotter} keeps snapshots")
}

fn mount(kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Mount {
    let mut mount = Mount::new();
    mount.type_ = kind.to_owned();
    mount.source = source.as_ref().display().to_string();
    mount.options = options.iter().map(|option| (*option).to_owned()).collect();
    mount
}

/// An EROFS image of a folder.
fn erofs(folder: &Path, image: &Path) -> Result<()> {
    let output = ctr::run(
        Command::new("mkfs.erofs")
            .arg("--quiet")
            .arg(image)
            .arg(folder),
    )?;
    output.expect_code(0)?;
    Ok(())
}

/// The image's files as an EROFS layer.
fn base(context: &Context) -> Result<PathBuf> {
    let (folder, layer) = (context.path("base"), context.path("base.erofs"));
    if !layer.exists() {
        image::unpack(&context.programs.busybox, &folder)?;
        erofs(&folder, &layer)?;
    }
    Ok(layer)
}

/// Layers from the lowest up, with a scratch disk over them that is made unless it is there.
fn overlay(layers: &[PathBuf], scratch: &Path) -> Vec<Mount> {
    let mut mounts: Vec<Mount> = layers
        .iter()
        .map(|layer| mount("erofs", layer, &["ro", "loop"]))
        .collect();
    let count = layers.len();
    mounts.push(mount(
        "mkfs/ext4",
        scratch,
        &[
            "X-containerd.mkfs.fs=ext4",
            "X-containerd.mkfs.size=32MiB",
            "rw",
            "loop",
        ],
    ));
    let upper = format!("{{{{ mount {count} }}}}/upper");
    let work = format!("{{{{ mount {count} }}}}/work");
    let lower = match count {
        1 => "lowerdir={{ mount 0 }}".to_owned(),
        _ => format!("lowerdir={{{{ overlay {} 0 }}}}", count - 1),
    };
    mounts.push(mount(
        "format/mkdir/overlay",
        "overlay",
        &[
            &format!("X-containerd.mkdir.path={upper}:0755"),
            &format!("X-containerd.mkdir.path={work}:0755"),
            &format!("workdir={work}"),
            &format!("upperdir={upper}"),
            &lower,
        ],
    ));
    mounts
}

/// A file for a container's output; what it has said.
fn output(context: &Context, name: &str) -> Result<(PathBuf, Stdio)> {
    let path = context.path(name);
    fs::write(&path, "")?;
    let stdio = Stdio {
        stdout: format!("file://{}", path.display()),
        ..Stdio::default()
    };
    Ok((path, stdio))
}

/// Runs a script in a container with this root to its end; what it said.
fn run(context: &Context, name: &str, script: &str, root: &[Mount]) -> Result<String> {
    let one = One::start(context, name, script)?;
    let (said, stdio) = output(context, &format!("{name}.out"))?;
    one.tasks
        .create_over(one.id(), &one.bundle.folder, &stdio, root)?;
    one.tasks.start(one.id(), "")?;
    let exit = one.tasks.wait(one.id(), "")?.exit_status;
    let text = fs::read_to_string(&said)?;
    ensure!(exit == 0, "exit status {exit}; it said {text:?}");
    one.tasks.delete(one.id(), "")?;
    one.shut_down()?;
    Ok(text)
}

fn sound(scratch: &Path) -> Result<()> {
    let output = ctr::run(Command::new("e2fsck").arg("-fn").arg(scratch))?;
    output
        .expect_code(0)
        .with_context(|| format!("{} is not sound", scratch.display()))?;
    Ok(())
}

/// A layer with a file of its own.
fn second(context: &Context) -> Result<PathBuf> {
    let changes = context.path("changes");
    fs::create_dir_all(changes.join("etc"))?;
    fs::write(changes.join("etc/second"), "of the second layer\n")?;
    let second = context.path("second.erofs");
    erofs(&changes, &second)?;
    Ok(second)
}

/// Files that loop devices of the host are of.
fn looped() -> Result<Vec<String>> {
    let mut files = Vec::new();
    for device in fs::read_dir("/sys/block")? {
        if let Ok(file) = fs::read_to_string(device?.path().join("loop/backing_file")) {
            files.push(file.trim_end().to_owned());
        }
    }
    Ok(files)
}

/// As containerd's erofs snapshotter hands it over when it has no size for a scratch disk.
fn host_above(context: &Context) -> Result<()> {
    let layers = [base(context)?, second(context)?];
    let (upper, work) = (context.path("upper"), context.path("work"));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let mut root: Vec<Mount> = layers
        .iter()
        .map(|layer| mount("erofs", layer, &["ro", "loop"]))
        .collect();
    root.push(mount(
        "format/overlay",
        "overlay",
        &[
            &format!("workdir={}", work.display()),
            &format!("upperdir={}", upper.display()),
            "lowerdir={{ overlay 1 0 }}",
        ],
    ));
    let said = run(
        context,
        "host-above",
        "cat /etc/second; echo kept > /kept; echo more >> /etc/second; rm /bin/vi; busybox | head -n 1 | cut -c1-7",
        &root,
    )?;
    ensure!(said == "of the second layer\nBusyBox\n", "{said:?}");
    let kept = fs::read_to_string(upper.join("kept"))?;
    ensure!(kept == "kept\n", "{kept:?} is in the host's directory");
    let again = run(
        context,
        "host-above-again",
        "cat /kept /etc/second; test ! -e /bin/vi",
        &root,
    )?;
    ensure!(again == "kept\nof the second layer\nmore\n", "{again:?}");
    let left = looped()?;
    let ours = context.path("");
    ensure!(
        !left.iter().any(|file| Path::new(file).starts_with(&ours)),
        "loop devices are left: {left:?}"
    );
    Ok(())
}

/// The first of the users of [`own_users`].
const FIRST: u32 = 100_000;

/// A container with users of its own, and a volume with their owners.
fn own_users<'a>(context: &'a Context, name: &str, script: &str, volume: &Path) -> Result<One<'a>> {
    let bundle = Bundle::script(context, name, script)?;
    let file = bundle.folder.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&file)?)?;
    let map = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map.clone();
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    namespaces
        .context("no namespaces")?
        .push(json!({"type": "user"}));
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    mounts.push(json!({
        "destination": "/data", "type": "bind", "source": volume, "options": ["rbind"],
        "uidMappings": map, "gidMappings": map,
    }));
    fs::write(&file, spec.to_string())?;
    One::of(context, bundle)
}

/// As containerd hands over roots and volumes of a pod with a user namespace: what is root's on the disk is the container's root's.
fn mapped(context: &Context) -> Result<()> {
    let disk = Disk::mount(context, "mapped", 64)?;
    let at = |name: &str| -> Result<PathBuf> {
        let path = disk.folder.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    };
    let (base, above, volume) = (at("base")?, at("above")?, at("volume")?);
    image::unpack(&context.programs.busybox, &base)?;
    fs::write(above.join("second"), "of the upper layer\n")?;
    fs::write(volume.join("f"), "kept\n")?;
    let (upper, work) = (at("upper")?, at("work")?);
    chown(&upper, Some(FIRST), Some(FIRST))?;
    let maps = ["uidmap=0:100000:65536", "gidmap=0:100000:65536"];
    let dirs = [
        format!("workdir={}", work.display()),
        format!("upperdir={}", upper.display()),
        format!("lowerdir={}:{}", above.display(), base.display()),
    ];
    let mut options: Vec<&str> = dirs.iter().map(String::as_str).collect();
    options.extend(maps);
    let overlay = mount("overlay", "overlay", &options);
    let bind = mount("bind", &base, &["rbind", "rw", maps[0], maps[1]]);
    let script = "stat -c %u:%g / /bin/busybox /data /data/f; cat /data/f; \
         echo more >> /bin/sh.new; chown 7:8 /bin/sh.new; echo x > /data/$HOSTNAME; chown 7:8 /data/$HOSTNAME; \
         stat -c %u:%g /bin/sh.new; test ! -e /second || { echo more >> /second; stat -c %u:%g /second; }";
    let owner = |path: PathBuf| -> Result<(u32, u32)> {
        let found = fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
        Ok((found.uid(), found.gid()))
    };
    for (name, root, second) in [("over", overlay, "0:0\n"), ("bound", bind, "")] {
        let script = format!("HOSTNAME={name}; {script}");
        let one = own_users(context, name, &script, &volume)?;
        let (said, stdio) = output(context, &format!("{name}.out"))?;
        one.tasks
            .create_over(one.id(), &one.bundle.folder, &stdio, &[root])?;
        one.tasks.start(one.id(), "")?;
        let exit = one.tasks.wait(one.id(), "")?.exit_status;
        let said = fs::read_to_string(&said)?;
        ensure!(exit == 0, "{name}: exit status {exit}; it said {said:?}");
        let expected = format!("0:0\n0:0\n0:0\n0:0\nkept\n7:8\n{second}");
        ensure!(said == expected, "{name}: {said:?} instead of {expected:?}");
        one.tasks.delete(one.id(), "")?;
        one.shut_down()?;
        let made = owner(volume.join(name))?;
        ensure!(made == (7, 8), "{name}: a file in the volume is {made:?}'s");
    }
    // An overlay's changes are its users', those of a bind mount the disk's.
    for (path, expected) in [
        (upper.join("bin/sh.new"), (FIRST + 7, FIRST + 8)),
        (upper.join("second"), (FIRST, FIRST)),
        (above.join("second"), (0, 0)),
        (base.join("bin/sh.new"), (7, 8)),
        (base.join("bin/busybox"), (0, 0)),
        (volume.join("f"), (0, 0)),
    ] {
        let found = owner(path.clone())?;
        ensure!(
            found == expected,
            "{} is {found:?}'s instead of {expected:?}'s",
            path.display()
        );
    }
    // A file system without mapped mounts is named, and nothing is left.
    let one = own_users(context, "unmapped", "true", Path::new("/proc"))?;
    let root = mount("bind", &base, &["rbind", "rw", maps[0], maps[1]]);
    let answer = one
        .tasks
        .create_over(one.id(), &one.bundle.folder, &Stdio::default(), &[root]);
    let refusal = match answer {
        Ok(_) => bail!("a mount of /proc was mapped"),
        Err(refusal) => refusal.message,
    };
    expect_words(&refusal, &["/proc", "mapped"])?;
    one.shut_down()
}

fn layers(context: &Context) -> Result<()> {
    let second = second(context)?;
    let scratch = context.path("scratch.img");
    let layers = [base(context)?, second];
    let root = overlay(&layers, &scratch);
    let first = run(
        context,
        "layers",
        "cat /etc/second; echo kept > /kept; echo more >> /etc/second; stat -c %a /",
        &root,
    )?;
    ensure!(first == "of the second layer\n755\n", "{first:?}");
    let size = fs::metadata(&scratch)?;
    ensure!(
        size.len() == 32 << 20,
        "the scratch disk has {} bytes",
        size.len()
    );
    ensure!(
        size.permissions().mode() & 0o777 == 0o600,
        "its mode is {:o}",
        size.mode()
    );
    sound(&scratch)?;
    // The same root again: its changes are there.
    let again = run(context, "layers-again", "cat /kept /etc/second", &root)?;
    ensure!(again == "kept\nof the second layer\nmore\n", "{again:?}");
    sound(&scratch)?;
    Ok(())
}

fn whiteouts(context: &Context) -> Result<()> {
    let count = context.times(24, 100);
    let mut layers = vec![base(context)?];
    let device = mknod_whiteout;
    for number in 1..count {
        // Each brings a file of its own, changes a common one, and takes the file before away.
        let folder = context.path(format!("layer-{number}"));
        fs::create_dir_all(folder.join("many"))?;
        fs::write(
            folder.join(format!("many/f{number}")),
            format!("{number}\n"),
        )?;
        fs::write(folder.join("many/last"), format!("{number}\n"))?;
        if number > 1 && number % 2 == 0 {
            device(&folder.join(format!("many/f{}", number - 1)))?;
        }
        let layer = context.path(format!("layer-{number}.erofs"));
        erofs(&folder, &layer)?;
        fs::remove_dir_all(&folder)?;
        layers.push(layer);
    }
    let scratch = context.path("scratch.img");
    let said = run(
        context,
        "many",
        "cat /many/last; ls /many | wc -l; ls /many/f1 2>&1; cat /many/f2; grep -c . /proc/partitions",
        &overlay(&layers, &scratch),
    )?;
    let last = count - 1;
    let taken = last / 2;
    // /proc/partitions: a heading, the two disks, and a partition for each layer.
    let wanted = format!(
        "{last}\n{}\nls: /many/f1: No such file or directory\n2\n{}\n",
        last - taken + 1,
        1 + 2 + count
    );
    ensure!(said == wanted, "{said:?} instead of {wanted:?}");
    sound(&scratch)
}

fn mknod_whiteout(path: &Path) -> Result<()> {
    mknod(path, SFlag::S_IFCHR, Mode::empty(), 0)
        .with_context(|| format!("making the whiteout {}", path.display()))
}

fn ext4(context: &Context) -> Result<()> {
    let folder = context.path("files");
    image::unpack(&context.programs.busybox, &folder)?;
    let disk = context.path("disk.img");
    fs::File::create(&disk)?.set_len(48 << 20)?;
    let made = ctr::run(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-F", "-d"])
            .arg(&folder)
            .arg(&disk),
    )?;
    made.expect_code(0)?;
    let root = [mount("ext4", &disk, &["loop", "rw"])];
    let said = run(context, "ext4", "echo kept > /kept; cat /kept", &root)?;
    ensure!(said == "kept\n", "{said:?}");
    sound(&disk)?;
    let before = fs::metadata(&disk)?;
    let view = [mount("ext4", &disk, &["loop", "ro"])];
    let said = run(
        context,
        "view",
        "cat /kept; echo x > /x 2>/dev/null || echo refused",
        &view,
    )?;
    ensure!(said == "kept\nrefused\n", "{said:?}");
    let after = fs::metadata(&disk)?;
    ensure!(
        (before.mtime(), before.mtime_nsec()) == (after.mtime(), after.mtime_nsec()),
        "a view was written"
    );
    Ok(())
}

/// Writes and syncs a counter for ever; the file has one at any time.
const BUSY: &str = "i=0; while :; do i=$((i + 1)); echo $i > /next; mv /next /count; dd if=/dev/zero of=/fill bs=64k count=4 2>/dev/null; \
     sync; echo $i; done";

fn ends(context: &Context) -> Result<()> {
    type End = fn(&Context, One<'_>) -> Result<()>;
    let ends: [(&str, End); 4] = [
        ("killed", |_, one| one.end()),
        ("shut-down", |_, one| one.shut_down()),
        ("terminated", |context, one| {
            for process in one.bundle.processes() {
                processes::signal(process.pid, Signal::SIGTERM);
            }
            one.bundle.wait_until_gone(context.seconds(20).as_secs())?;
            one.bundle.delete()?;
            Ok(())
        }),
        ("crashed", |_, one| {
            one.bundle.kill()?;
            one.bundle.delete()?;
            Ok(())
        }),
    ];
    let layers = [base(context)?];
    for round in 0..context.times(1, 10) {
        for (name, end) in ends {
            let name = format!("{name}-{round}");
            let scratch = context.path(format!("{name}.img"));
            let root = overlay(&layers, &scratch);
            let one = One::start(context, &name, BUSY)?;
            let (said, stdio) = output(context, &format!("{name}.out"))?;
            one.tasks
                .create_over(one.id(), &one.bundle.folder, &stdio, &root)?;
            one.tasks.start(one.id(), "")?;
            let counted = || -> Result<Option<u32>> {
                let text = fs::read_to_string(&said)?;
                let last = text.lines().next_back().map(str::parse).transpose()?;
                Ok(last.filter(|count| *count >= 3))
            };
            poll::until("three turns of the container", context.seconds(60), counted)?;
            end(context, one)?;
            let synced = counted()?.unwrap_or_default();
            if !name.starts_with("crashed") {
                sound(&scratch)?;
            }
            let found = run(context, &format!("{name}-after"), "cat /count", &root)?;
            let found: u32 = found.trim().parse().with_context(|| format!("{found:?}"))?;
            ensure!(
                found >= synced,
                "{name}: {found} is in the file, and {synced} was told after it was synced"
            );
            sound(&scratch)?;
            eprintln!("  {name}: told {synced}, found {found}");
            fs::remove_file(&scratch)?;
        }
    }
    Ok(())
}

fn too_many(context: &Context) -> Result<()> {
    let mut root = Vec::new();
    for number in 0..20 {
        root.push(mount(
            "mkfs/ext4",
            context.path(format!("disk-{number}.img")),
            &["X-containerd.mkfs.size=8M"],
        ));
    }
    let bundle = Bundle::script(context, "many-disks", "true")?;
    let address = bundle.started(Dialect::Params)?;
    let tasks = Tasks::dial(&address)?;
    let created = tasks.create_over(&bundle.id, &bundle.folder, &Stdio::default(), &root);
    let Err(refusal) = created else {
        bail!("a root of 20 disks was made");
    };
    eprintln!("  {refusal}");
    expect_words(&refusal.message, &["windows"])?;
    ensure!(
        refusal.message.chars().any(|c| c.is_ascii_digit()),
        "there is no number in it"
    );
    let _ = tasks.shutdown(&bundle.id);
    bundle.wait_until_gone(10)?;
    let found = run(context, "after", "echo well", &[])?;
    ensure!(found == "well\n", "{found:?}");
    Ok(())
}

fn refused(context: &Context) -> Result<()> {
    let layer = base(context)?;
    let roots = [
        (vec![mount("wild/erofs", &layer, &[])], &["wild/erofs"][..]),
        (
            vec![
                mount("erofs", &layer, &["ro"]),
                mount("format/overlay", "overlay", &["lowerdir={{ mount 7 }}"]),
            ],
            &["{{ mount 7 }}", "no mount 7"],
        ),
        (
            vec![mount("mkfs/ext4", context.path("x.img"), &[])],
            &["X-containerd.mkfs.size"],
        ),
        (
            vec![mount("erofs", context.path("missing.erofs"), &["ro"])],
            &["missing.erofs", "No such file"],
        ),
        (vec![mount("nosuchfs", "/dev/null", &[])], &["nosuchfs"]),
    ];
    for (number, (root, words)) in roots.iter().enumerate() {
        let bundle = Bundle::script(context, &format!("refused-{number}"), "true")?;
        let address = bundle.started(Dialect::Params)?;
        let tasks = Tasks::dial(&address)?;
        match tasks.create_over(&bundle.id, &bundle.folder, &Stdio::default(), root) {
            Ok(_) => bail!("{words:?} was taken"),
            Err(refusal) => {
                eprintln!("  {refusal}");
                expect_words(&refusal.message, words)?;
            }
        }
        let _ = tasks.shutdown(&bundle.id);
        bundle.wait_until_gone(Duration::from_secs(10).as_secs())?;
    }
    ensure!(context.runtime == Runtime::Nacre, "this is about nacre");
    Ok(())
}
