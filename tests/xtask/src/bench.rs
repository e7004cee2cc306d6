//! `cargo xtask bench`: builds for speed and runs nacre-bench where guests run, next to runc in the same boot. What the figures mean is in
//! docs/benchmarks.md.

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

/// MiB of the emulated machine for hotplug: what is plugged is never touched, but for the guest's page structures.
const HOTPLUG_MIB: u32 = 6144;
/// Where QEMU is in the testbed, and what of its root is needed.
const QEMU: &str = "/opt/qemu";
const QEMU_PARTS: [&str; 5] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/share/qemu",
    "usr/share/seabios",
    "usr/bin/qemu-system-x86_64",
];

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure [default: all of it]
    #[arg(value_enum, value_name = "SCENARIO")]
    scenarios: Vec<Scenario>,
    /// How often each is done [default: as nacre-bench has it; less where the machine is emulated]
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// The Debian release whose newest cloud kernel is the guest's
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    release: KernelRelease,
    /// Measure hotplug of QEMU as well: Debian's, unpacked
    #[arg(long)]
    qemu: bool,
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
}

impl Scenario {
    const ALL: [Scenario; 5] = [
        Self::Lifecycle,
        Self::Exec,
        Self::Cat,
        Self::Execs,
        Self::Hotplug,
    ];

    /// Its name, and how often an emulated machine can be asked to do it.
    fn describe(self) -> (&'static str, u64) {
        match self {
            Self::Lifecycle => ("lifecycle", 5),
            Self::Exec => ("exec", 50),
            Self::Cat => ("cat", 3),
            Self::Execs => ("execs", 1000),
            Self::Hotplug => ("hotplug", 10),
        }
    }

    /// The command of nacre-bench, its files in `$NACRE_OUT`.
    fn command(self, count: Option<u64>, qemu: Option<&Path>, options: &str) -> String {
        let (name, _) = self.describe();
        let mut command = format!("nacre-bench {name} --json \"$NACRE_OUT/{name}.json\"");
        let count_option = match self {
            Self::Hotplug => "--rounds",
            Self::Lifecycle | Self::Exec | Self::Cat | Self::Execs => "--count",
        };
        if let Some(count) = count {
            command.push_str(&format!(" {count_option} {count}"));
        }
        if self == Self::Hotplug {
            command.push_str(" --plot \"$NACRE_OUT/hotplug.svg\"");
            if let Some(qemu) = qemu {
                command.push_str(&format!(" --qemu '{}'", qemu.display()));
            }
        }
        format!("{command}{options}\necho\n")
    }
}

/// Debian's QEMU as one program: a script that starts it by its own loader, with its own libraries and firmware. In the testbed it
/// is brought along.
fn bring_qemu(place: Place, request: &mut Request) -> Result<PathBuf> {
    let unpacked = apt::closure(Release::BookwormBackports, &["qemu-system-x86"])?;
    let script = paths::cache("bench-qemu");
    let root = match place {
        Place::Host => unpacked.as_path(),
        Place::Testbed => Path::new(QEMU),
    };
    fs::write(&script, qemu_script(root))
        .and_then(|()| fs::set_permissions(&script, Permissions::from_mode(0o755)))
        .with_context(|| format!("writing {}", script.display()))?;
    if place == Place::Host {
        return Ok(script);
    }
    for part in QEMU_PARTS {
        request.roots.push((unpacked.join(part), root.join(part)));
    }
    let program = root.join("run");
    request.copies.push((script, program.clone()));
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
    step("building the shim and nacre-bench for speed");
    run::run(run::cargo().args(["build", "--release", "--package", "nacre", "--bins"]))?;
    step("making the guest's kernel and initrd");
    image::run(&image::ImageArgs::of(args.release))?;

    let (place, _) = kvm::place(args.nested);
    let scenarios = match args.scenarios.as_slice() {
        [] => &Scenario::ALL[..],
        some => some,
    };
    let mut request = Request::new(Vec::new());
    let qemu = match args.qemu {
        true => Some(bring_qemu(place, &mut request)?),
        false => None,
    };
    let options = quoted(&args.options);
    let mut script = String::from("set -e\n");
    for scenario in scenarios {
        let (_, emulated) = scenario.describe();
        let count = args.count.or((place == Place::Testbed).then_some(emulated));
        script.push_str(&scenario.command(count, qemu.as_deref(), &options));
    }
    request.argv = vec!["sh".into(), "-c".into(), script];
    request.programs = paths::target().join("release");
    request.force_nested = args.nested;
    if scenarios.contains(&Scenario::Hotplug) {
        request.memory = HOTPLUG_MIB;
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
        let qemu = Some(Path::new("/opt/qemu/run"));
        let hotplug = Scenario::Hotplug.command(Some(3), qemu, &options);
        for words in [
            "--rounds 3",
            "hotplug.svg",
            "--qemu '/opt/qemu/run'",
            "'1G'",
        ] {
            assert!(hotplug.contains(words), "{words} in {hotplug}");
        }
        let exec = Scenario::Exec.command(None, qemu, "");
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
    }
}
