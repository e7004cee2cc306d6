//! `cargo xtask test`: format, lints, the lean kernel's configuration, unit and flat-guest tests, then the end-to-end suite. Every test is named; the last line counts
//! them all.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use crate::apt::{self, Release};
use crate::run::{self, step};
use crate::suite::{self, Suite};
use crate::testbed::{self, Request, Sink};
use crate::{image, kernel, paths};

/// Options of `cargo xtask test`.
#[derive(Args)]
pub struct TestArgs {
    /// Only the end-to-end cases whose name contains this, and nothing else; may be given again
    #[arg(long, value_name = "SUBSTRING")]
    only: Vec<String>,
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    /// What failed, for the end of the output.
    names: Vec<String>,
}

impl Tally {
    fn add(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.names.push(name.to_owned());
        }
    }

    fn check(&mut self, name: &str, command: &mut Command) {
        step(format!("{name}: {}", run::show(command)));
        let result = run::run(command.stdin(Stdio::null()));
        println!(
            "check {name} ... {}",
            if result.is_ok() { "ok" } else { "FAILED" }
        );
        self.add(name, result.is_ok());
    }

    /// The same of what is no other program; what it says is told.
    fn outcome(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                println!("check {name} ... ok");
                self.add(name, true);
            }
            Err(error) => {
                eprintln!("error: {error:#}");
                println!("check {name} ... FAILED");
                self.add(name, false);
            }
        }
    }
}

/// What was done, and how long each part took.
struct Parts {
    began: Instant,
    last: Instant,
    told: Vec<String>,
}

impl Parts {
    fn begin() -> Self {
        let now = Instant::now();
        let told = Vec::new();
        Self {
            began: now,
            last: now,
            told,
        }
    }

    /// What was done since the last is one part.
    fn end(&mut self, name: &str) {
        let now = Instant::now();
        self.told
            .push(format!("{name} {}", span(now.duration_since(self.last))));
        self.last = now;
    }

    fn words(&self) -> String {
        format!(
            "{} in all: {}",
            span(self.began.elapsed()),
            self.told.join(", ")
        )
    }
}

fn span(time: Duration) -> String {
    format!("{} min {} s", time.as_secs() / 60, time.as_secs() % 60)
}

/// Runs everything; the result is the exit code.
pub fn run(args: &TestArgs) -> Result<i32> {
    let mut parts = Parts::begin();
    apt::ensure_installed(&[
        ("gcc", "cc"),
        ("libc6-dev", "/usr/include/stdio.h"),
        ("e2fsprogs", "mke2fs"),
    ])?;
    let mut tally = Tally::default();
    let mut image = None;
    if args.only.is_empty() {
        // The agent is built by one core for minutes. What goes wrong is told when the suite comes to need it.
        image = Some(std::thread::spawn(image::of_the_suite));
        tally.check("format", run::cargo().args(["fmt", "--all", "--check"]));
        tally.check(
            "lints",
            run::cargo().args([
                "clippy",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ]),
        );
        parts.end("lints");
        tally.outcome("the lean kernel's configuration", kernel::check());
        parts.end("the lean kernel's configuration");
        unit_tests(&mut tally)?;
        parts.end("unit tests");
    }
    let suite = Suite {
        full: false,
        only: args.only.clone(),
        except: Vec::new(),
        time_limit: Duration::from_secs(60 * 60),
        out: fresh_folder(&paths::cache("test/logs"))?,
        cpus: testbed::CPUS,
        image: None,
    };
    let _ = image.map(std::thread::JoinHandle::join);
    let built = suite::build();
    parts.end("programs and images");
    match built.and_then(|()| suite.run(Default::default(), |_, _| Ok(()))) {
        Ok(report) => {
            for (name, verdict) in &report.cases {
                tally.add(&format!("e2e {name}: {}", verdict.reason), verdict.passed);
            }
            for retry in &report.retries {
                step(format!("retried: {retry}"));
            }
            let boots: Vec<String> = report.took.iter().map(|took| span(*took)).collect();
            parts.end(&format!(
                "end-to-end cases ({} beside each other)",
                boots.join(" and ")
            ));
            step(format!(
                "logs of the end-to-end cases: {}",
                suite.out.display()
            ));
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            tally.add(&format!("end-to-end suite: {error:#}"), false);
        }
    }
    step(parts.words());
    for name in &tally.names {
        println!("FAILED {name}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(i32::from(tally.failed > 0))
}

fn fresh_folder(folder: &Path) -> Result<PathBuf> {
    if folder.exists() {
        std::fs::remove_dir_all(folder)
            .with_context(|| format!("emptying {}", folder.display()))?;
    }
    std::fs::create_dir_all(folder)?;
    Ok(folder.to_owned())
}

/// Unit tests, documentation tests and tests with flat guests. Where the machine has no KVM at all, the last run in the testbed.
fn unit_tests(tally: &mut Tally) -> Result<()> {
    let kvm = Path::new("/dev/kvm").exists();
    let mut command = run::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    if !kvm {
        command.args(["--lib", "--bins"]);
    }

    harness("cargo test", command, tally)?;
    let plugins = apt::unpacked(Release::Bookworm, "containernetworking-plugins")?;
    let mut command = run::cargo();
    command.args(["test", "--package", "nacre-net", "--lib", "--", "--ignored"]);
    command.env("NACRE_CNI_PLUGINS", plugins.join("usr/lib/cni"));
    harness("cargo test with CNI plugins", command, tally)?;
    if !kvm {
        step("this machine has no /dev/kvm: the tests with flat guests run in the testbed");
        for program in flat_guest_programs()? {
            let name = program
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            let target = PathBuf::from("/usr/local/bin").join(&name);
            let mut request = Request::new(vec![target.display().to_string()]);
            request.copies.push((program, target));
            request.time_limit = Some(Duration::from_secs(600));
            let mut reader = TestReader::default();
            let outcome = testbed::execute(&request, &mut reader)?;
            reader.settle(&name, outcome.code == 0, tally);
        }
    }
    Ok(())
}

/// Runs tests of Rust's harness.
fn harness(name: &str, mut command: Command, tally: &mut Tally) -> Result<()> {
    step(format!("unit tests: {}", run::show(&command)));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let mut reader = TestReader::default();
    for line in BufReader::new(child.stdout.take().context("no output of cargo")?).split(b'\n') {
        reader.line(&String::from_utf8_lossy(&line?));
    }
    let status = child.wait()?;
    reader.settle(name, status.success(), tally);
    Ok(())
}

/// The VMM's test programs that need /dev/kvm, built.
fn flat_guest_programs() -> Result<Vec<PathBuf>> {
    let text = run::output(run::cargo().args([
        "test",
        "--package",
        "nacre-vmm",
        "--test",
        "*",
        "--no-run",
        "--message-format",
        "json",
    ]))?;
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    };
    Ok(text.lines().filter_map(executable).collect())
}

/// Follows the output of Rust's test harness.
#[derive(Default)]
struct TestReader {
    passed: usize,
    failed: usize,
    names: Vec<String>,
    partial: Vec<u8>,
}

impl TestReader {
    fn line(&mut self, line: &str) {
        println!("{line}");
        if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.names.push(name.to_owned());
        }
        if let Some((passed, failed)) = summary(line) {
            self.passed += passed;
            self.failed += failed;
        }
    }

    /// Takes the counts over. A run that failed without a failed test (it did not build, or a test program died) counts as one.
    fn settle(mut self, what: &str, success: bool, tally: &mut Tally) {
        if success != (self.failed == 0) || self.passed + self.failed == 0 {
            self.failed += 1;
            self.names.push(format!(
                "{what} as a whole: it did not build, died, or had no tests"
            ));
        }
        tally.passed += self.passed;
        tally.failed += self.failed;
        tally.names.extend(self.names);
    }
}

impl Sink for TestReader {
    fn stdout(&mut self, data: &[u8]) {
        self.partial.extend(data);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.line(String::from_utf8_lossy(&line).trim_end());
        }
    }

    fn stderr(&mut self, data: &[u8]) {
        testbed::Terminal.stderr(data);
    }
}

/// `test result: ok. 3 passed; 1 failed; …`.
fn summary(line: &str) -> Option<(usize, usize)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what: &str| {
        counts
            .split(';')
            .find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
    };
    Some((number("passed")?, number("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_the_harness_are_read() {
        assert_eq!(
            summary(
                "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s"
            ),
            Some((3, 0))
        );
        assert_eq!(
            summary("test result: FAILED. 2 passed; 4 failed; 0 ignored"),
            Some((2, 4))
        );
        assert_eq!(summary("test a ... ok"), None);
    }

    #[test]
    fn a_run_that_dies_without_a_failed_test_still_counts() {
        for (lines, success, expected) in [
            (&["test result: ok. 3 passed; 0 failed;"][..], true, (3, 0)),
            (&["test result: ok. 3 passed; 0 failed;"], false, (3, 1)),
            (&[], true, (0, 1)),
            (
                &[
                    "test a ... FAILED",
                    "test result: FAILED. 1 passed; 1 failed;",
                ],
                false,
                (1, 1),
            ),
        ] {
            let (mut reader, mut tally) = (TestReader::default(), Tally::default());
            lines.iter().for_each(|line| reader.line(line));
            reader.settle("x", success, &mut tally);
            assert_eq!((tally.passed, tally.failed), expected, "{lines:?}");
        }
    }
}
