//! `cargo xtask fuzz`: runs the libFuzzer targets of `tests/fuzz` for a while each. Their bodies also run as unit tests over
//! pseudo-random input, so that nothing but this needs cargo-fuzz.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::run::{self, step};
use crate::{apt, paths};

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub struct FuzzArgs {
    /// Targets to run [default: all]
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each runs, in seconds
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
}

/// Longest input, in bytes: beyond it a guest only repeats itself.
const LONGEST: u32 = 8192;
/// Longest time for one input, in seconds.
const ONE_INPUT: u32 = 30;
/// Most memory of a target, and of one allocation in it, in MiB.
const MEMORY: (u32, u32) = (2048, 64);

/// Runs the targets; the result is the exit code.
pub fn run(args: &FuzzArgs) -> Result<i32> {
    apt::ensure_installed(&[
        ("gcc", "cc"),
        ("g++", "c++"),
        ("libc6-dev", "/usr/include/stdio.h"),
    ])?;
    let installed = run::output(run::cargo().args(["fuzz", "--version"])).is_ok();
    if !installed {
        step("installing cargo-fuzz");
        run::run(run::cargo().args(["install", "cargo-fuzz", "--locked"]))?;
    }
    let corpus = paths::cache("fuzz/corpus");
    let listed = run::output(
        run::cargo()
            .args(["fuzz", "list", "--fuzz-dir"])
            .arg(folder()),
    )?;
    let all: Vec<String> = listed.lines().map(str::to_owned).collect();
    let targets = match args.targets.as_slice() {
        [] => all,
        some => {
            if let Some(unknown) = some.iter().find(|target| !all.contains(target)) {
                bail!(
                    "There is no fuzz target {unknown}: there are {}",
                    all.join(", ")
                );
            }
            some.to_vec()
        }
    };
    step("building the targets");
    run::run(cargo_fuzz("build").arg("--fuzz-dir").arg(folder()))?;
    let mut failed = Vec::new();
    let mut done = Vec::new();
    for target in &targets {
        step(format!("{target} for {} s", args.seconds));
        let mut command = cargo_fuzz("run");
        let corpus = corpus.join(target);
        std::fs::create_dir_all(&corpus)?;
        command.env("NACRE_FUZZ_SEEDS", &corpus);
        command.arg("--fuzz-dir").arg(folder()).arg(target);
        command.arg(&corpus).arg("--");
        command.args([
            format!("-max_total_time={}", args.seconds),
            format!("-max_len={LONGEST}"),
            format!("-timeout={ONE_INPUT}"),
            format!("-rss_limit_mb={}", MEMORY.0),
            format!("-malloc_limit_mb={}", MEMORY.1),
            "-print_final_stats=1".to_owned(),
        ]);
        let output = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .with_context(|| format!("cannot start {}", run::show(&command)))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let number = |name: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(name));
            line.map_or("?", str::trim).to_owned()
        };
        if output.status.success() {
            done.push(format!(
                "{target}: {} runs in {} s, {} MiB at most",
                number("stat::number_of_executed_units:"),
                args.seconds,
                number("stat::peak_rss_mb:")
            ));
        } else {
            eprint!("{text}");
            failed.push(target.clone());
        }
    }
    for line in &done {
        println!("{line}");
    }
    for target in &failed {
        println!(
            "FAILED {target}: the input is in {}",
            folder().join("artifacts").join(target).display()
        );
    }
    println!("{} passed, {} failed", done.len(), failed.len());
    Ok(i32::from(!failed.is_empty()))
}

fn folder() -> PathBuf {
    paths::workspace().join("tests/fuzz")
}

/// cargo-fuzz as it works with a stable compiler: coverage is a plain code generation option, only sanitizers need a nightly one.
fn cargo_fuzz(what: &str) -> Command {
    let mut command = run::cargo();
    command.args(["fuzz", what, "--sanitizer", "none"]);
    command.env("CARGO_TARGET_DIR", paths::cache("fuzz/build"));
    command
}
