//! Bind mounts of the host: what both sides see of them, and what the guest cannot do to them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest, Sha256};

use crate::context::Context;
use crate::ctr::{Ctr, expect_words};
use crate::disk::Disk;
use crate::poll;
use crate::processes;
use crate::suite::{Case, Subject};

const fn agreed(name: &'static str, seconds: (u64, u64), run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Agreed,
        seconds,
        run,
    }
}

const fn nacre(name: &'static str, seconds: (u64, u64), run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Nacre,
        seconds,
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    agreed(
        "a volume is written from both sides",
        (120, 120),
        both_sides,
    ),
    agreed(
        "a read-only volume cannot be written by root, even after remounting",
        (120, 120),
        read_only,
    ),
    agreed(
        "secrets, configuration and scratch volumes as Kubernetes mounts them",
        (120, 120),
        kubernetes,
    ),
    agreed(
        "a container with users of its own has its root, its volumes and its execs",
        (120, 120),
        own_users,
    ),
    agreed("many small files in a volume", (180, 1800), small_files),
    agreed(
        "a large file in a volume keeps its checksum",
        (180, 1800),
        large_file,
    ),
    agreed(
        "a deleted file is readable while it is open",
        (90, 90),
        deleted,
    ),
    nacre(
        "opening many files leaves the shim no more descriptors",
        (180, 1800),
        descriptors,
    ),
    nacre("what cannot be shared is named", (120, 120), refused),
];

/// A folder of the host, and the option of `ctr run` that mounts it.
struct Volume {
    path: PathBuf,
    option: String,
}

impl Volume {
    fn new(context: &Context, name: &str, destination: &str, options: &str) -> Result<Self> {
        let path = context.path(name);
        fs::create_dir_all(&path)?;
        Ok(Volume::of(&path, destination, options))
    }

    fn of(path: &Path, destination: &str, options: &str) -> Self {
        Volume {
            option: format!(
                "type=bind,src={},dst={destination},options={options}",
                path.display()
            ),
            path: path.to_owned(),
        }
    }
}

/// Lists a container's volumes as flags of `ctr run`.
fn flags(volumes: &[&Volume]) -> Vec<String> {
    volumes
        .iter()
        .flat_map(|volume| ["--mount".to_owned(), volume.option.clone()])
        .collect()
}

/// A container that goes on, and scripts in it.
struct Running<'a> {
    ctr: Ctr<'a>,
    id: String,
    execs: std::cell::Cell<u32>,
}

impl<'a> Running<'a> {
    fn start(context: &'a Context, name: &str, volumes: &[&Volume], more: &[&str]) -> Result<Self> {
        let ctr = Ctr::new(context)?;
        let id = context.id(name);
        let flags = flags(volumes);
        let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        flags.extend(more);
        ctr.detached(&id, &flags, &["sleep", "100000"])?;
        Ok(Running {
            ctr,
            id,
            execs: std::cell::Cell::new(0),
        })
    }

    /// What a script says, which must succeed.
    fn script(&self, script: &str) -> Result<String> {
        let number = self.execs.replace(self.execs.get() + 1);
        let exec = format!("e{number}");
        let output = self.ctr.exec(&self.id, &exec, &[], &["sh", "-c", script])?;
        output
            .expect_code(0)
            .with_context(|| format!("in the container: {script}"))?;
        Ok(output.out())
    }

    fn end(self) -> Result<()> {
        self.ctr
            .call(&["tasks", "kill", "-s", "SIGKILL", &self.id])?
            .expect_code(0)?;
        self.ctr
            .wait_for_status(&self.id, "STOPPED", Duration::from_secs(30))?;
        self.ctr.remove(&self.id)
    }
}

fn expect(what: &str, found: &str, wanted: &str) -> Result<()> {
    ensure!(found == wanted, "{what}: {found:?} instead of {wanted:?}");
    Ok(())
}

fn both_sides(context: &Context) -> Result<()> {
    let folder = Volume::new(context, "both", "/data", "rbind:rw")?;
    fs::write(folder.path.join("host"), "from the host")?;
    let single = context.path("single");
    fs::write(&single, "one file")?;
    let file = Volume::of(&single, "/etc/single", "rbind:rw");
    let running = Running::start(context, "both", &[&folder, &file], &[])?;

    expect(
        "a file of the host",
        &running.script("cat /data/host /etc/single")?,
        "from the hostone file",
    )?;
    // What the guest does is there at once, with owner and mode.
    running.script(
        "echo -n guest > /data/g; chown 1234:4321 /data/g; chmod 640 /data/g; mkdir /data/d; \
         ln -s ../host /data/d/link; ln /data/g /data/d/hard; echo -n more >> /etc/single",
    )?;
    let made = fs::metadata(folder.path.join("g"))?;
    expect(
        "its owner",
        &format!("{}:{}", made.uid(), made.gid()),
        "1234:4321",
    )?;
    expect("its mode", &format!("{:o}", made.mode() & 0o7777), "640")?;
    expect("its links", &made.nlink().to_string(), "2")?;
    expect(
        "its content",
        &fs::read_to_string(folder.path.join("g"))?,
        "guest",
    )?;
    expect(
        "a link",
        &fs::read_link(folder.path.join("d/link"))?
            .display()
            .to_string(),
        "../host",
    )?;
    expect(
        "the single file",
        &fs::read_to_string(&single)?,
        "one filemore",
    )?;

    // What the host does is seen within the time for names and attributes.
    fs::write(folder.path.join("host"), "changed, and longer than before")?;
    poll::until("the changed file", context.seconds(20), || {
        let seen = running.script("cat /data/host")?;
        Ok((seen == "changed, and longer than before").then_some(()))
    })?;
    fs::rename(folder.path.join("g"), folder.path.join("renamed"))?;
    fs::write(folder.path.join("later"), "later")?;
    fs::remove_file(folder.path.join("d/link"))?;
    poll::until(
        "the host's changes in the guest",
        context.seconds(20),
        || {
            let seen = running.script("ls /data /data/d; cat /data/later 2>/dev/null; true")?;
            let right = seen.contains("renamed")
                && seen.contains("later\n")
                && !seen.contains("link")
                && !seen.lines().any(|line| line == "g");
            Ok(right.then_some(()))
        },
    )?;
    // Appending from both sides loses nothing: a file that is opened to append ends where the host has its end.
    for turn in 0..5 {
        running.script(&format!("echo guest {turn} >> /data/log"))?;
        let mut log = fs::OpenOptions::new()
            .append(true)
            .open(folder.path.join("log"))?;
        writeln!(log, "host {turn}")?;
    }
    let wanted: String = (0..5)
        .map(|turn| format!("guest {turn}\nhost {turn}\n"))
        .collect();
    expect(
        "the log on the host",
        &fs::read_to_string(folder.path.join("log"))?,
        &wanted,
    )?;
    poll::until("the whole log", context.seconds(20), || {
        Ok((running.script("cat /data/log")? == wanted).then_some(()))
    })?;
    running.end()
}

fn read_only(context: &Context) -> Result<()> {
    let folder = Volume::new(context, "kept", "/data", "rbind:ro")?;
    fs::create_dir(folder.path.join("d"))?;
    fs::write(folder.path.join("f"), "kept")?;
    fs::set_permissions(folder.path.join("f"), fs::Permissions::from_mode(0o666))?;
    let before = fs::metadata(folder.path.join("f"))?;
    let running = Running::start(context, "kept", &[&folder], &["--cap-add", "CAP_SYS_ADMIN"])?;
    expect("the file", &running.script("cat /data/f")?, "kept")?;
    // runc's root is the host's, and gets what it takes by remounting; a guest's is not.
    if context.runtime == crate::context::Runtime::Nacre {
        running.script("mount -o remount,rw,bind /data; mount -o remount,rw /data; true")?;
    }
    let tries = [
        "echo x > /data/f",
        "echo x >> /data/f",
        "echo x > /data/new",
        "rm /data/f",
        "mv /data/f /data/g",
        "ln /data/f /data/h",
        "ln -s x /data/s",
        "mkdir /data/m",
        "rmdir /data/d",
        "chmod 600 /data/f",
        "chown 1 /data/f",
        "touch /data/f",
        "truncate -s 0 /data/f",
        "mknod /data/p p",
    ];
    let script: String = tries
        .iter()
        .map(|one| format!("if sh -c '{one}' 2>/dev/null; then echo '{one}'; fi\n"))
        .collect();
    let succeeded = running.script(&script)?;
    expect("what succeeded", &succeeded, "")?;
    running.end()?;
    let after = fs::metadata(folder.path.join("f"))?;
    ensure!(
        (after.ctime(), after.ctime_nsec()) == (before.ctime(), before.ctime_nsec()),
        "the file was touched"
    );
    expect(
        "the file",
        &fs::read_to_string(folder.path.join("f"))?,
        "kept",
    )?;
    let names: Vec<_> = fs::read_dir(&folder.path)?.flatten().collect();
    ensure!(names.len() == 2, "the folder has {names:?}");
    Ok(())
}

/// Directories whose content is replaced by exchanging a link, scratch space, and memory.
fn kubernetes(context: &Context) -> Result<()> {
    let config = Volume::new(context, "config", "/etc/config", "rbind:ro")?;
    let version = |number: u32| -> Result<()> {
        let name = format!("..version-{number}");
        fs::create_dir(config.path.join(&name))?;
        fs::write(
            config.path.join(&name).join("key"),
            format!("value {number}\n"),
        )?;
        symlink(&name, config.path.join("..data_tmp"))?;
        Ok(fs::rename(
            config.path.join("..data_tmp"),
            config.path.join("..data"),
        )?)
    };
    version(1)?;
    symlink("..data/key", config.path.join("key"))?;
    let scratch = Volume::new(context, "scratch", "/scratch", "rbind:rw")?;
    fs::set_permissions(&scratch.path, fs::Permissions::from_mode(0o1777))?;
    let hosts = context.path("hosts");
    fs::write(&hosts, "127.0.0.1 localhost pod\n")?;
    let hosts = Volume::of(&hosts, "/etc/hosts", "rbind:rprivate:rw");
    let running = Running::start(
        context,
        "pod",
        &[&config, &scratch, &hosts],
        &[
            "--mount",
            "type=tmpfs,src=tmpfs,dst=/memory,options=nosuid:nodev:mode=700:size=4m",
        ],
    )?;
    expect(
        "the key",
        &running.script("cat /etc/config/key")?,
        "value 1\n",
    )?;
    expect_words(&running.script("cat /etc/hosts")?, &["localhost pod"])?;
    version(2)?;
    poll::until("the new version of the key", context.seconds(20), || {
        let seen = running.script("cat /etc/config/key")?;
        Ok((seen == "value 2\n").then_some(()))
    })?;
    running.script("cd /scratch && umask 0 && echo a > a && mkdir b && mv a b/c && cat b/c")?;
    expect(
        "the scratch file",
        &fs::read_to_string(scratch.path.join("b/c"))?,
        "a\n",
    )?;
    let sizes = running.script("df -k /memory /dev/shm | awk 'NR > 1 {print $2}'")?;
    expect("the sizes of what is in memory", &sizes, "4096\n65536\n")?;
    let full = running
        .script("dd if=/dev/zero of=/memory/x bs=1M count=8 2>/dev/null; stat -c %s /memory/x")?;
    expect("a file that fills it", &full, "4194304\n")?;
    running.end()
}

/// A container whose users are others outside of it.
fn own_users(context: &Context) -> Result<()> {
    const FIRST: u32 = 100_000;
    let map = format!("0:{FIRST}:65536");
    let folder = Volume::new(context, "mapped", "/data", "rbind:rw")?;
    chown(&folder.path, Some(FIRST), Some(FIRST))?;
    fs::write(folder.path.join("outside"), "of no user inside")?;
    let running = Running::start(
        context,
        "mapped",
        &[&folder],
        &["--uidmap", &map, "--gidmap", &map, "--cwd", "/made/for/it"],
    )?;
    let seen = running.script(
        "awk '{print $1, $2, $3}' /proc/self/uid_map /proc/self/gid_map; id -u; \
         touch /made/for/it/f && stat -c %u:%g /made/for/it; \
         stat -c %u:%g / /bin/busybox /data /data/outside; \
         echo inside > /data/f; echo more > /file; chown 7:8 /data/f /file; stat -c %u:%g /data/f /file; \
         chown 70000 /data/f 2>/dev/null || echo refused; (echo x > /data/outside) 2>/dev/null || echo kept; \
         caps() { grep ^Cap $1; }; [ \"$(caps /proc/1/status)\" = \"$(caps /proc/self/status)\" ] && echo as init; \
         [ $(readlink /proc/1/ns/user) = $(readlink /proc/self/ns/user) ] && echo one namespace; echo out > /dev/stdout",
    )?;
    expect(
        "what the container sees",
        &seen,
        "0 100000 65536\n0 100000 65536\n0\n0:0\n0:0\n0:0\n0:0\n65534:65534\n7:8\n7:8\nrefused\nkept\nas init\none namespace\nout\n",
    )?;
    // Where its own root may not go, it does not begin.
    let hidden = folder.path.join("hidden");
    fs::create_dir_all(hidden.join("inner"))?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o700))?;
    let flags = ["--cwd", "/data/hidden/inner"];
    let output = running.ctr.exec(&running.id, "astray", &flags, &["pwd"])?;
    ensure!(output.code != 0, "an exec began in {:?}", output.out());
    let output = running.ctr.exec(
        &running.id,
        "other",
        &["--user", "1000:1000"],
        &[
            "sh",
            "-c",
            "id -u; id -g; grep CapEff /proc/self/status; echo $HOME; echo out > /dev/stdout; echo err > /dev/stderr",
        ],
    )?;
    output.expect_code(0)?;
    expect(
        "what another user sees",
        &output.out(),
        "1000\n1000\nCapEff:\t0000000000000000\n/\nout\n",
    )?;
    expect("what it says beside", &output.err(), "err\n")?;
    let made = fs::metadata(folder.path.join("f"))?;
    expect(
        "the file's owner on the host",
        &format!("{}:{}", made.uid(), made.gid()),
        &format!("{}:{}", FIRST + 7, FIRST + 8),
    )?;
    expect(
        "what is of no user inside",
        &fs::read_to_string(folder.path.join("outside"))?,
        "of no user inside",
    )?;
    running.end()
}

fn small_files(context: &Context) -> Result<()> {
    let count = context.times(300, 10_000);
    let folder = Volume::new(context, "small", "/data", "rbind:rw")?;
    let running = Running::start(context, "small", &[&folder], &[])?;
    let made = running.script(&format!(
        "mkdir /data/t; i=0; while [ $i -lt {count} ]; do d=/data/t/$((i / 100)); \
         [ $((i % 100)) = 0 ] && mkdir $d; echo file $i > $d/f$i; i=$((i + 1)); done; find /data/t -type f | wc -l"
    ))?;
    expect("the files made", made.trim(), &count.to_string())?;
    let mut found = 0;
    for number in 0..count {
        let path = folder.path.join(format!("t/{}/f{number}", number / 100));
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        expect("a file", &text, &format!("file {number}\n"))?;
        found += 1;
    }
    let sums =
        running.script("find /data/t -type f | sort | xargs cat | sha256sum | cut -d' ' -f1")?;
    let removed = running.script("rm -r /data/t && ls /data | wc -l")?;
    expect("what is left", removed.trim(), "0")?;
    ensure!(
        fs::read_dir(&folder.path)?.next().is_none(),
        "the host still has some"
    );
    eprintln!("  {found} files, checksum {}", sums.trim());
    running.end()
}

fn large_file(context: &Context) -> Result<()> {
    let mebibytes = context.times(16, 1024);
    // With room for what ext4 has for itself.
    let disk = Disk::mount(context, "large", 2 * mebibytes + mebibytes / 4 + 64)?;
    let folder = Volume::of(&disk.folder, "/data", "rbind:rw");
    let mut hash = Sha256::new();
    let mut block = vec![0_u8; 1 << 20];
    let file = fs::File::create(folder.path.join("from-host"))?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for number in 0..mebibytes {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        hash.update(&block);
        file.write_all_at(&block, u64::from(number) << 20)?;
    }
    drop(file);
    let wanted = hex(&hash.finalize());
    let running = Running::start(context, "large", &[&folder], &[])?;
    let seen = running.script(
        "sha256sum /data/from-host | cut -d' ' -f1; dd if=/data/from-host of=/data/from-guest bs=1M 2>/said || { cat /said >&2; exit 1; }; \
         sync; sha256sum < /data/from-guest | cut -d' ' -f1",
    )?;
    expect(
        "the checksums in the guest",
        &seen,
        &format!("{wanted}\n{wanted}\n"),
    )?;
    running.end()?;
    let mut hash = Sha256::new();
    let mut copy = fs::File::open(folder.path.join("from-guest"))?;
    loop {
        let read = copy.read(&mut block)?;
        if read == 0 {
            break;
        }
        hash.update(&block[..read]);
    }
    expect(
        "the copy's checksum on the host",
        &hex(&hash.finalize()),
        &wanted,
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn deleted(context: &Context) -> Result<()> {
    let folder = Volume::new(context, "deleted", "/data", "rbind:rw")?;
    let running = Running::start(context, "deleted", &[&folder], &[])?;
    // By the guest, then by the host.
    let seen = running.script(
        "echo held > /data/f; exec 3< /data/f 4>> /data/f; rm /data/f; ls /data | wc -l; echo more >&4; cat <&3",
    )?;
    expect("a file that the guest removed", &seen, "0\nheld\nmore\n")?;
    fs::write(folder.path.join("g"), "of the host\n")?;
    let script = "exec 3< /data/g; touch /data/opened; while [ -e /data/opened ]; do sleep 0.1; done; cat <&3";
    let removal = {
        let path = folder.path.clone();
        let limit = context.seconds(30);
        std::thread::spawn(move || -> Result<()> {
            let flag = path.join("opened");
            poll::until("the guest's open", limit, || {
                Ok(flag.exists().then_some(()))
            })?;
            fs::remove_file(path.join("g"))?;
            Ok(fs::remove_file(flag)?)
        })
    };
    let seen = running.script(script)?;
    match removal.join() {
        Ok(removed) => removed?,
        Err(_) => anyhow::bail!("the removing thread panicked"),
    }
    expect("a file that the host removed", &seen, "of the host\n")?;
    running.end()
}

fn descriptors(context: &Context) -> Result<()> {
    let count = context.times(400, 10_000);
    let folder = Volume::new(context, "opens", "/data", "rbind:rw")?;
    let running = Running::start(context, "opens", &[&folder], &[])?;
    let shims = processes::shims(context.runtime.shim(), &running.id);
    let [shim] = &shims[..] else {
        anyhow::bail!("there are {} shims", shims.len());
    };
    let open = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", shim.pid))?.count()) };
    let opens = format!(
        "i=0; while [ $i -lt {count} ]; do echo $i > /data/f; read x < /data/f; i=$((i + 1)); done; cat /data/f"
    );
    running.script(&opens)?;
    let before = open()?;
    let last = running.script(&opens)?;
    expect(
        "the last of the file",
        last.trim(),
        &(count - 1).to_string(),
    )?;
    let after = open()?;
    eprintln!(
        "  {before} descriptors before {count} opens for writing and reading each, {after} after"
    );
    ensure!(after <= before + 2, "{before} descriptors became {after}");
    running.end()
}

fn refused(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let missing = context.path("not-there");
    for (name, source, words) in [
        (
            "missing",
            missing.as_path(),
            &["not-there", "No such file"][..],
        ),
        (
            "device",
            Path::new("/dev/null"),
            &["/dev/null", "device of the host"],
        ),
    ] {
        let volume = Volume::of(source, "/x", "rbind:ro");
        let flags = flags(&[&volume]);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let output = ctr.run(&context.id(name), &flags, &["true"])?;
        ensure!(
            output.code != 0,
            "the container ran with {}",
            source.display()
        );
        expect_words(&output.err(), words)?;
    }
    Ok(())
}
