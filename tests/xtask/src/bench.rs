//! `cargo xtask bench`: builds for speed and runs nacre-bench where guests run, next to runc in the same boot. What the figures mean is in
//! docs/benchmarks.md.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::kvm::{self, Place};
use crate::run::{self, step};
use crate::testbed::{self, Request, Terminal};
use crate::{apt, image, paths};

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure [default: all of it]
    #[arg(value_enum, value_name = "SCENARIO")]
    scenarios: Vec<Scenario>,
    /// How often each is done [default: as nacre-bench has it; less where the machine is emulated]
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Use the emulated machine even where this machine's KVM would do
    #[arg(long)]
    nested: bool,
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
}

impl Scenario {
    const ALL: [Scenario; 4] = [Self::Lifecycle, Self::Exec, Self::Cat, Self::Execs];

    /// Its name, and how often an emulated machine can be asked to do it.
    fn describe(self) -> (&'static str, u64) {
        match self {
            Self::Lifecycle => ("lifecycle", 5),
            Self::Exec => ("exec", 50),
            Self::Cat => ("cat", 3),
            Self::Execs => ("execs", 1000),
        }
    }
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
    image::run(&image::ImageArgs::default())?;

    let (place, _) = kvm::place(args.nested);
    let scenarios = match args.scenarios.as_slice() {
        [] => &Scenario::ALL[..],
        some => some,
    };
    let mut script = String::from("set -e\n");
    for scenario in scenarios {
        let (name, emulated) = scenario.describe();
        let count = args.count.or((place == Place::Testbed).then_some(emulated));
        let count = count.map_or(String::new(), |count| format!("--count {count}"));
        script.push_str(&format!(
            "nacre-bench {name} {count} --json \"$NACRE_OUT/{name}.json\"\necho\n"
        ));
    }
    let mut request = Request::new(vec!["sh".into(), "-c".into(), script]);
    request.programs = paths::target().join("release");
    request.force_nested = args.nested;
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
