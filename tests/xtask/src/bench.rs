//! `cargo xtask bench`: builds for speed and runs nacre-bench where guests run, next to runc in the same boot. What the figures mean is in
//! docs/benchmarks.md.

use std::fmt::Display;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::apt::Release;
use crate::image::KernelRelease;
use crate::kvm::{self, Place};
use crate::run::{self, step};
use crate::testbed::{self, Request, Terminal};
use crate::{apt, image, paths};

/// MiB of the emulated machine for hotplug, where what is plugged is never touched, but for the guest's page structures; for
/// storage, whose files and disks are in its memory; and for net, whose VMs run at once.
const MORE_MIB: u32 = 6144;
/// Where QEMU is in the testbed, and what of its root is needed.
const QEMU: &str = "/opt/qemu";
const QEMU_PARTS: [&str; 5] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/share/qemu",
    "usr/share/seabios",
    "usr/bin/qemu-system-x86_64",
];

/// Where virtiofsd is in the testbed, and what of its root is needed.
const VIRTIOFSD: &str = "/opt/virtiofsd";
const VIRTIOFSD_PARTS: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "usr/libexec/virtiofsd"];
/// QEMU's initrd in the testbed.
const QEMU_INITRD: &str = "/opt/qemu/initrd";
/// Files in the tree of storage, MiB and requests of net, and seconds for one call, where a request of a guest takes some ten times as
/// long as elsewhere.
const EMULATED_FILES: u32 = 1000;
const EMULATED_MIB: u32 = 8;
const EMULATED_REQUESTS: u32 = 100;
const EMULATED_PATIENCE: u32 = 3600;
/// A disk for the emulated machine, whose root is in its memory: so that files can be cold on it, and be read past its cache. By its
/// path, since busybox has a mke2fs of its own.
const DISK: &str = "\
truncate -s 4G /tmp/bench.img
/usr/sbin/mke2fs -q -F -t ext4 -m 0 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard /tmp/bench.img
mkdir -p /mnt/bench
mount -o loop /tmp/bench.img /mnt/bench
";

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure [default: all of it]
    #[arg(value_enum, value_name = "SCENARIO")]
    scenarios: Vec<Scenario>,
    /// How often each is done [default: as nacre-bench has it; less where the machine is emulated]
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// The Debian release whose newest cloud kernel is the guest's, or the lean kernel
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    release: KernelRelease,
    /// Measure hotplug, storage and net of QEMU as well: Debian's, unpacked, and for storage its virtiofsd
    #[arg(long)]
    qemu: bool,
    /// Use the debug build: to try a scenario, not for figures
    #[arg(long)]
    debug: bool,
    /// Use the emulated machine even where this machine's KVM would do
    #[arg(long)]
    nested: bool,
    /// Options of nacre-bench itself, the same for every scenario
    #[arg(last = true, value_name = "OPTION")]
    options: Vec<String>,
}

/// The subcommands of nacre-bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A container's life by its phases
    Lifecycle,
    /// An exec's cycle
    Exec,
    /// 20 MiB through cat and back
    Cat,
    /// 1000 execs, and what the shim holds before and after
    Execs,
    /// vCPUs and memory of a VM come and go
    Hotplug,
    /// Files by virtio-blk and virtio-fs
    Storage,
    /// The network and the vsock
    Net,
}

impl Scenario {
    const ALL: [Scenario; 7] = [
        Self::Lifecycle,
        Self::Exec,
        Self::Cat,
        Self::Execs,
        Self::Hotplug,
        Self::Storage,
        Self::Net,
    ];

    /// Its name, and how often an emulated machine can be asked to do it.
    fn describe(self) -> (&'static str, u64) {
        match self {
            Self::Lifecycle => ("lifecycle", 5),
            Self::Exec => ("exec", 50),
            Self::Cat => ("cat", 3),
            Self::Execs => ("execs", 1000),
            Self::Hotplug => ("hotplug", 10),
            Self::Storage => ("storage", 3),
            Self::Net => ("net", 3),
        }
    }

    /// The command of nacre-bench, its files in `$NACRE_OUT`.
    fn command(
        self,
        place: Place,
        count: Option<u64>,
        qemu: Option<&Qemu>,
        options: &str,
    ) -> String {
        let (name, _) = self.describe();
        let mut command = format!("nacre-bench {name} --json \"$NACRE_OUT/{name}.json\"");
        let mut add = |option: &str, value: &dyn Display| {
            command.push_str(&format!(" --{option} '{value}'"));
        };
        let count_option = match self {
            Self::Hotplug | Self::Storage | Self::Net => "rounds",
            Self::Lifecycle | Self::Exec | Self::Cat | Self::Execs => "count",
        };
        if let Some(count) = count {
            add(count_option, &count);
        }
        let mut before = "";
        match self {
            Self::Hotplug => {
                if let Some(qemu) = qemu {
                    add("qemu", &qemu.program.display());
                }
                command.push_str(" --plot \"$NACRE_OUT/hotplug.svg\"");
            }
            Self::Storage => {
                if place == Place::Testbed {
                    before = DISK;
                    add("dir", &"/mnt/bench");
                    add("files", &EMULATED_FILES);
                    add("patience", &EMULATED_PATIENCE);
                }
                for (option, file) in qemu.and_then(Qemu::of_storage).into_iter().flatten() {
                    add(option, &file.display());
                }
            }
            Self::Net => {
                if place == Place::Testbed {
                    add("mib", &EMULATED_MIB);
                    add("requests", &EMULATED_REQUESTS);
                    add("patience", &EMULATED_PATIENCE);
                }
                for (option, file) in qemu.and_then(Qemu::of_net).into_iter().flatten() {
                    add(option, &file.display());
                }
            }
            Self::Lifecycle | Self::Exec | Self::Cat | Self::Execs => {}
        }
        format!("{before}{command}{options}\necho\n")
    }
}

/// QEMU's programs and files, where the benchmarks run.
struct Qemu {
    program: PathBuf,
    virtiofsd: Option<PathBuf>,
    initrd: Option<PathBuf>,
}

/// What of it is needed.
struct Parts {
    virtiofsd: bool,
    /// With this kernel.
    initrd: Option<KernelRelease>,
}

impl Qemu {
    /// Options of storage, and their values.
    fn of_storage(&self) -> Option<[(&'static str, &Path); 3]> {
        let [qemu, initrd] = self.of_net()?;
        Some([qemu, ("virtiofsd", self.virtiofsd.as_ref()?), initrd])
    }

    /// The same of net.
    fn of_net(&self) -> Option<[(&'static str, &Path); 2]> {
        let initrd = self.initrd.as_ref()?;
        Some([("qemu", &self.program), ("qemu-initrd", initrd)])
    }

    /// In the testbed all of it is brought along.
    fn bring(place: Place, parts: &Parts, request: &mut Request) -> Result<Self> {
        let program = bring_qemu(place, request)?;
        let virtiofsd = match parts.virtiofsd {
            true => Some(bring_virtiofsd(place, request)?),
            false => None,
        };
        let mut initrd = parts.initrd.map(image::initrd_with_pci).transpose()?;
        if place == Place::Testbed
            && let Some(made) = initrd.take()
        {
            request.copies.push((made, QEMU_INITRD.into()));
            initrd = Some(QEMU_INITRD.into());
        }
        Ok(Self {
            program,
            virtiofsd,
            initrd,
        })
    }
}

/// Debian's QEMU as one program: a script that starts it by its own loader, with its own libraries and firmware.
fn bring_qemu(place: Place, request: &mut Request) -> Result<PathBuf> {
    let unpacked = apt::closure(Release::BookwormBackports, &["qemu-system-x86"])?;
    bring(
        place,
        request,
        ("bench-qemu", &unpacked),
        (QEMU, &QEMU_PARTS),
        qemu_script,
    )
}

/// The same with virtiofsd, which QEMU no longer has with it.
fn bring_virtiofsd(place: Place, request: &mut Request) -> Result<PathBuf> {
    let unpacked = apt::closure(Release::Trixie, &["virtiofsd"])?;
    bring(
        place,
        request,
        ("bench-virtiofsd", &unpacked),
        (VIRTIOFSD, &VIRTIOFSD_PARTS),
        virtiofsd_script,
    )
}

/// A script that starts a program of an unpacked root, and in the testbed the parts of that root that it needs.
fn bring(
    place: Place,
    request: &mut Request,
    (name, unpacked): (&str, &Path),
    (root, parts): (&str, &[&str]),
    script: fn(&Path) -> String,
) -> Result<PathBuf> {
    let file = paths::cache(name);
    let root = match place {
        Place::Host => unpacked,
        Place::Testbed => Path::new(root),
    };
    fs::write(&file, script(root))
        .and_then(|()| fs::set_permissions(&file, Permissions::from_mode(0o755)))
        .with_context(|| format!("writing {}", file.display()))?;
    if place == Place::Host {
        return Ok(file);
    }
    for part in parts {
        request.roots.push((unpacked.join(part), root.join(part)));
    }
    let program = root.join("run");
    request.copies.push((file, program.clone()));
    Ok(program)
}

fn qemu_script(root: &Path) -> String {
    let root = root.display();
    format!(
        "#!/bin/sh
root='{root}'
export QEMU_MODULE_DIR=\"$root/usr/lib/x86_64-linux-gnu/qemu\"
exec \"$root/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2\" \\
  --library-path \"$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu\" \\
  \"$root/usr/bin/qemu-system-x86_64\" -L \"$root/usr/share/qemu\" -L \"$root/usr/share/seabios\" \"$@\"
"
    )
}

fn virtiofsd_script(root: &Path) -> String {
    let root = root.display();
    format!(
        "#!/bin/sh
libraries='{root}/usr/lib/x86_64-linux-gnu'
exec \"$libraries/ld-linux-x86-64.so.2\" --library-path \"$libraries\" '{root}/usr/libexec/virtiofsd' \"$@\"
"
    )
}

/// Words for a shell, each with a space before it.
fn quoted(words: &[String]) -> String {
    let word = |word: &String| format!(" '{}'", word.replace('\'', "'\\''"));
    words.iter().map(word).collect()
}

/// Runs the benchmarks; the result is the exit code.
pub fn run(args: &BenchArgs) -> Result<i32> {
    apt::ensure_installed(&[
        ("gcc", "cc"),
        ("libc6-dev", "/usr/include/stdio.h"),
        ("e2fsprogs", "mke2fs"),
    ])?;
    let (profile, folder) = match args.debug {
        true => ("dev", "debug"),
        false => ("release", "release"),
    };
    step(format!("building the shim and nacre-bench ({profile})"));
    let mut build = run::cargo();
    build.args([
        "build",
        "--profile",
        profile,
        "--package",
        "nacre",
        "--bins",
    ]);
    run::run(&mut build)?;
    step("making the guest's kernel and initrd");
    image::run(&image::ImageArgs::of(args.release))?;

    let (place, _) = kvm::place(args.nested);
    let scenarios = match args.scenarios.as_slice() {
        [] => &Scenario::ALL[..],
        some => some,
    };
    let mut request = Request::new(Vec::new());
    let storage = scenarios.contains(&Scenario::Storage);
    let probed = storage || scenarios.contains(&Scenario::Net);
    if probed {
        image::build_probe()?;
    }
    let parts = Parts {
        virtiofsd: storage,
        initrd: probed.then_some(args.release),
    };
    let qemu = match args.qemu {
        true => Some(Qemu::bring(place, &parts, &mut request)?),
        false => None,
    };
    let options = quoted(&args.options);
    let mut script = String::from("set -e\n");
    for scenario in scenarios {
        let (_, emulated) = scenario.describe();
        let count = args.count.or((place == Place::Testbed).then_some(emulated));
        script.push_str(&scenario.command(place, count, qemu.as_ref(), &options));
    }
    request.argv = vec!["sh".into(), "-c".into(), script];
    request.programs = paths::target().join(folder);
    request.force_nested = args.nested;
    if probed || scenarios.contains(&Scenario::Hotplug) {
        request.memory = MORE_MIB;
    }
    request.time_limit = Some(Duration::from_secs(4 * 3600));
    request.out = paths::cache("bench");
    fs::create_dir_all(&request.out)
        .with_context(|| format!("making {}", request.out.display()))?;
    let outcome = testbed::execute(&request, &mut Terminal)?;
    if let Some(why) = outcome.retried {
        step(format!("the testbed was booted twice: {why}"));
    }
    step(format!("every value is in {}", request.out.display()));
    Ok(outcome.code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_and_files_of_each_scenario_are_named_as_it_names_them() {
        let options = quoted(&["--sizes".into(), "1G".into(), "it's".into()]);
        assert_eq!(options, r" '--sizes' '1G' 'it'\''s'");
        let qemu = Qemu {
            program: "/opt/qemu/run".into(),
            virtiofsd: Some("/opt/virtiofsd/run".into()),
            initrd: Some(QEMU_INITRD.into()),
        };
        let of = |scenario: Scenario, count| {
            scenario.command(Place::Testbed, count, Some(&qemu), &options)
        };
        for (command, words) in [
            (
                of(Scenario::Hotplug, Some(3)),
                &[
                    "--rounds '3'",
                    "hotplug.svg",
                    "--qemu '/opt/qemu/run'",
                    "'1G'",
                ][..],
            ),
            (
                of(Scenario::Storage, None),
                &[
                    "mount -o loop",
                    "--dir '/mnt/bench' --files '1000'",
                    "--virtiofsd '/opt/virtiofsd/run'",
                    "--qemu-initrd '/opt/qemu/initrd'",
                ],
            ),
            (
                of(Scenario::Net, Some(2)),
                &[
                    "--rounds '2'",
                    "--mib '8' --requests '100'",
                    "--qemu '/opt/qemu/run' --qemu-initrd '/opt/qemu/initrd'",
                ],
            ),
        ] {
            for words in words {
                assert!(command.contains(words), "{words} in {command}");
            }
        }
        let storage = Scenario::Storage.command(Place::Host, Some(2), None, "");
        assert_eq!(
            storage,
            "nacre-bench storage --json \"$NACRE_OUT/storage.json\" --rounds '2'\necho\n"
        );
        let exec = Scenario::Exec.command(Place::Host, None, Some(&qemu), "");
        assert_eq!(
            exec,
            "nacre-bench exec --json \"$NACRE_OUT/exec.json\"\necho\n"
        );
    }

    #[test]
    fn qemu_is_started_by_its_own_loader() {
        let script = qemu_script(Path::new("/opt/qemu"));
        assert!(script.starts_with("#!/bin/sh\nroot='/opt/qemu'\n"));
        assert!(script.trim_end().ends_with("\"$@\""), "{script}");
        let script = virtiofsd_script(Path::new("/opt/virtiofsd"));
        assert!(script.contains("'/opt/virtiofsd/usr/libexec/virtiofsd' \"$@\""));
        assert!(script.trim_end().ends_with("\"$@\""), "{script}");
    }
}
