//! The end-to-end suite as seen from outside: runs `nacre-e2e` where guests run, follows its report line by line, and goes on where it
//! was when the outer guest freezes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::kvm::{self, Place};
use crate::run::{self, step};
use crate::testbed::{self, Failure, Request, Sink};
use crate::{image, paths};

/// How one case ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// It passed.
    pub passed: bool,
    /// How long it ran, in seconds of the place where it ran.
    pub seconds: f64,
    /// Why it failed; empty if it passed.
    pub reason: String,
}

/// A run of the suite.
pub struct Suite {
    /// The counts of a soak instead of the small ones.
    pub full: bool,
    /// Only cases whose name contains one of these.
    pub only: Vec<String>,
    /// None of the cases whose name contains one of these.
    pub except: Vec<String>,
    /// Longest time of the whole suite.
    pub time_limit: Duration,
    /// Where cases put their logs.
    pub out: PathBuf,
    /// CPUs of the testbed's machine.
    pub cpus: u32,
    /// The folder with vmlinux and initrd of another guest kernel than the usual one.
    pub image: Option<PathBuf>,
}

/// Where that folder is in the testbed.
const OTHER_IMAGE: &str = "/usr/share/nacre/other";

/// What came of a suite.
#[derive(Default)]
pub struct Report {
    /// The verdict of every case.
    pub cases: BTreeMap<String, Verdict>,
    /// Why the testbed had to be booted again, each time.
    pub retries: Vec<String>,
    /// How long the cases of each of the boots that ran beside each other took, boots included.
    pub took: Vec<Duration>,
}

/// Builds what the suite runs: programs, agent, image.
pub fn build() -> Result<()> {
    step("building the shim, vmctl, nacre-bench and the end-to-end suite");
    run::run(run::cargo().args([
        "build",
        "--package",
        "nacre",
        "--package",
        "nacre-e2e",
        "--bins",
    ]))?;
    step("making the guests' kernels and initrds");
    image::of_the_suite()
}

/// What the cases of the second boot have in their names; it makes both about as long.
const SECOND: [&str; 3] = ["[containerd 1.7", ", runc]", "resize: "];

impl Suite {
    /// Runs all cases that `known` has no verdict on. `save` is called after every case. In the nested testbed there are two
    /// boots at a time: the emulation of one leaves half of two cores idle.
    pub fn run(
        &self,
        mut known: BTreeMap<String, Verdict>,
        save: impl FnMut(&str, &Verdict) -> Result<()> + Send,
    ) -> Result<Report> {
        let wanted = self.list()?;
        known.retain(|name, _| wanted.contains(name));
        let nested = kvm::place(false).0 == Place::Testbed;
        let (second, first): (Vec<&str>, Vec<&str>) = wanted
            .iter()
            .map(String::as_str)
            .partition(|name| nested && SECOND.iter().any(|part| name.contains(part)));
        let shards: Vec<Shard<'_>> = [("", first), ("2", second)]
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(bed, names)| Shard {
                suite: self,
                bed,
                names,
                all: &wanted,
            })
            .collect();
        let memory = memory(shards.len());
        let save = Mutex::new(save);
        let save = |name: &str, verdict: &Verdict| {
            let mut save = save.lock().unwrap_or_else(PoisonError::into_inner);
            save(name, verdict)
        };
        let reports: Vec<Result<Report>> = std::thread::scope(|scope| {
            let running: Vec<_> = shards
                .iter()
                .map(|shard| scope.spawn(|| shard.run(&known, memory, save)))
                .collect();
            let end = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                let ended = thread.join();
                ended.unwrap_or_else(|_| Err(anyhow!("a part of the suite panicked")))
            };
            running.into_iter().map(end).collect()
        });
        let mut whole = Report::default();
        for report in reports {
            let report = report?;
            whole.cases.extend(report.cases);
            whole.retries.extend(report.retries);
            whole.took.extend(report.took);
        }
        if nested && !self.full {
            self.run_again(&wanted, memory, &mut whole)?;
        }
        Ok(whole)
    }

    /// A machine that is emulated fails once in thousands of boots by itself, so a few failed cases run once more, in a boot of
    /// their own. Which they were and why is in the report. The soak, whose counts are what finds rare faults of ours, does not
    /// do this.
    fn run_again(&self, all: &[String], memory: u32, whole: &mut Report) -> Result<()> {
        const FEW: usize = 3;
        let failed: Vec<(String, Verdict)> = whole
            .cases
            .iter()
            .filter(|(_, verdict)| !verdict.passed)
            .map(|(name, verdict)| (name.clone(), verdict.clone()))
            .collect();
        if failed.is_empty() || failed.len() > FEW {
            return Ok(());
        }
        step(format!("running {} failed cases once more", failed.len()));
        let shard = Shard {
            suite: self,
            bed: "again",
            names: failed.iter().map(|(name, _)| name.as_str()).collect(),
            all,
        };
        // On a thread of its own, which is what has a testbed of its own.
        let report = std::thread::scope(|scope| {
            let run = || shard.run(&BTreeMap::new(), memory, |_, _| Ok(()));
            let ended = scope.spawn(run).join();
            ended.unwrap_or_else(|_| Err(anyhow!("a part of the suite panicked")))
        })?;
        whole.retries.extend(report.retries);
        for (name, before) in &failed {
            let Some(verdict) = report.cases.get(name) else {
                continue;
            };
            if verdict.passed {
                whole.retries.push(format!(
                    "{name}: passed when it ran again, after: {}",
                    before.reason
                ));
                whole.cases.insert(name.clone(), verdict.clone());
            }
        }
        Ok(())
    }

    /// The names of all cases, each with its containerd and runtime, from the program itself.
    fn list(&self) -> Result<Vec<String>> {
        let mut command = Command::new(paths::debug("nacre-e2e"));
        let text = run::output(command.arg("--list").args(self.options()))?;
        let names: Vec<String> = text
            .lines()
            .map(|name| name.trim().to_owned())
            .filter(|name| !name.is_empty())
            .collect();
        if names.is_empty() {
            bail!(
                "the suite has no case{}",
                if self.only.is_empty() {
                    ""
                } else {
                    " of such a name"
                }
            );
        }
        Ok(names)
    }

    fn options(&self) -> Vec<String> {
        let count = if self.full { "soak" } else { "small" };
        let fixed = [
            "--count",
            count,
            "--containerd",
            "2.1",
            "--runtime",
            "nacre",
        ];
        let mut words: Vec<String> = fixed.map(str::to_owned).to_vec();
        // Another guest kernel is none to runc, and the same to every containerd.
        if self.image.is_none() {
            words.extend(["--containerd", "1.7", "--runtime", "runc"].map(str::to_owned));
        }
        words.extend(
            self.only
                .iter()
                .flat_map(|part| ["--filter".to_owned(), part.clone()]),
        );
        let except = self.except.iter();
        words.extend(except.flat_map(|part| ["--exclude".to_owned(), part.clone()]));
        words
    }
}

/// Has the suite take this image for the usual one, and in the testbed brings it along.
fn other_image(image: &Path, place: Place, request: &mut Request) -> Result<()> {
    for (variable, file) in [("NACRE_KERNEL", "vmlinux"), ("NACRE_INITRD", "initrd")] {
        let source = image.join(file);
        let source = std::fs::canonicalize(&source)
            .with_context(|| format!("looking for {}", source.display()))?;
        let seen = match place {
            Place::Host => source,
            Place::Testbed => {
                let target = Path::new(OTHER_IMAGE).join(file);
                request.copies.push((source, target.clone()));
                target
            }
        };
        let seen = seen.display().to_string();
        request.env.push((variable.to_owned(), seen));
    }
    Ok(())
}

/// Cases that run one after another in one boot.
struct Shard<'a> {
    suite: &'a Suite,
    /// Suffix of its testbed's name.
    bed: &'static str,
    names: Vec<&'a str>,
    /// Those of all shards.
    all: &'a [String],
}

impl Shard<'_> {
    fn run(
        &self,
        known: &BTreeMap<String, Verdict>,
        memory: u32,
        mut save: impl Fn(&str, &Verdict) -> Result<()>,
    ) -> Result<Report> {
        paths::use_testbed_beside(self.bed);
        let mut report = Report::default();
        for name in &self.names {
            if let Some(verdict) = known.get(*name) {
                report.cases.insert((*name).to_owned(), verdict.clone());
            }
        }
        let mut incidents: BTreeMap<String, u32> = BTreeMap::new();
        let started = std::time::Instant::now();
        while report.cases.len() < self.names.len() {
            let left = self.suite.time_limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                break;
            }
            let mut request = Request::new(self.command(&report.cases));
            request.memory = memory;
            request.cpus = self.suite.cpus;
            request.time_limit = Some(left);
            request.out = self.suite.out.join(self.bed);
            request.keep_out = true;
            if let Some(image) = &self.suite.image {
                other_image(image, kvm::place(false).0, &mut request)?;
            }
            let mut follower = Follower::new(&mut report.cases, &mut save);
            let result = testbed::attempt(&request, &mut follower);
            let (running, saved) = (follower.running.take(), follower.error.take());
            if let Some(error) = saved {
                return Err(error);
            }
            // A boot that fails before any case is counted under no name.
            let blamed = running.clone().unwrap_or_default();
            let incident = match result {
                Ok(0 | 1) if running.is_none() => break,
                Ok(code) => format!("the suite's program ended with code {code}"),
                Err(Failure::Froze(why)) => {
                    step(format!("{why}; going on in another boot"));
                    let during = if blamed.is_empty() {
                        "between cases"
                    } else {
                        &blamed
                    };
                    let cause = why.lines().next().unwrap_or_default();
                    report.retries.push(format!("{during}: {cause}"));
                    why
                }
                Err(Failure::Fatal(error)) if running.is_none() => return Err(error),
                Err(Failure::Fatal(error)) => format!("{error:#}"),
            };
            if report.cases.len() == self.names.len() {
                report
                    .retries
                    .push(format!("after the last case: {incident}"));
            }
            let count = incidents.entry(blamed.clone()).or_default();
            *count += 1;
            if *count < 2 {
                continue;
            }
            let Some(case) = running else {
                bail!("the suite does not get to its cases: {incident}");
            };
            let verdict = Verdict {
                passed: false,
                seconds: 0.0,
                reason: format!("twice: {incident}"),
            };
            say(&case, &verdict);
            save(&case, &verdict)?;
            report.cases.insert(case, verdict);
        }
        for name in &self.names {
            report
                .cases
                .entry((*name).to_owned())
                .or_insert_with_key(|name| {
                    let reason = "it never ran".to_owned();
                    let verdict = Verdict {
                        passed: false,
                        seconds: 0.0,
                        reason,
                    };
                    say(name, &verdict);
                    verdict
                });
        }
        report.took.push(started.elapsed());
        Ok(report)
    }

    /// The program with all that it is not to run.
    fn command(&self, done: &BTreeMap<String, Verdict>) -> Vec<String> {
        let mut words = vec!["nacre-e2e".to_owned()];
        words.extend(self.suite.options());
        let others = self.all.iter();
        let skipped =
            others.filter(|name| done.contains_key(*name) || !self.names.contains(&name.as_str()));
        words.extend(skipped.flat_map(|name| ["--skip".to_owned(), name.clone()]));
        words
    }
}

/// An outer guest's memory: several guests at once and all of the scratch files live in it. Half of what is free for all of
/// them, within bounds.
fn memory(boots: usize) -> u32 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    let boots = boots.max(1) as u64;
    available.map_or(4096, |kib| (kib / 2048 / boots).clamp(4096, 10240) as u32)
}

/// A line of the suite's report.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    Start(&'a str),
    End(&'a str, Verdict),
    Other,
}

fn parse(line: &str) -> Line<'_> {
    if let Some(name) = line.strip_prefix("start ") {
        return Line::Start(name);
    }
    let (passed, rest) = match (line.strip_prefix("ok "), line.strip_prefix("FAILED ")) {
        (Some(rest), _) => (true, rest),
        (_, Some(rest)) => (false, rest),
        _ => return Line::Other,
    };
    // The name ends where the time stands in parentheses; a name may have parentheses of its own.
    for (at, _) in rest.match_indices(" (") {
        if let Some((seconds, reason)) = rest[at + 2..].split_once(" s)")
            && let Ok(seconds) = seconds.parse()
        {
            let reason = reason.trim_start_matches(": ").to_owned();
            return Line::End(
                &rest[..at],
                Verdict {
                    passed,
                    seconds,
                    reason,
                },
            );
        }
    }
    Line::Other
}

/// `N passed, N failed`.
fn is_count(line: &str) -> bool {
    let number = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    line.split_once(" passed, ").is_some_and(|(passed, rest)| {
        number(passed) && rest.strip_suffix(" failed").is_some_and(number)
    })
}

fn say(name: &str, verdict: &Verdict) {
    let outcome = if verdict.passed { "ok" } else { "FAILED" };
    println!(
        "e2e {name} ... {outcome} ({:.1} s){}{}",
        verdict.seconds,
        if verdict.passed { "" } else { ": " },
        verdict.reason
    );
}

/// Reads the report as it comes, and keeps it.
struct Follower<'a, F> {
    cases: &'a mut BTreeMap<String, Verdict>,
    save: &'a mut F,
    running: Option<String>,
    partial: Vec<u8>,
    error: Option<anyhow::Error>,
}

impl<'a, F: FnMut(&str, &Verdict) -> Result<()>> Follower<'a, F> {
    fn new(cases: &'a mut BTreeMap<String, Verdict>, save: &'a mut F) -> Self {
        Follower {
            cases,
            save,
            running: None,
            partial: Vec::new(),
            error: None,
        }
    }

    fn line(&mut self, line: &str) {
        match parse(line) {
            Line::Start(name) => self.running = Some(name.to_owned()),
            Line::End(name, verdict) => {
                say(name, &verdict);
                if let Err(error) = (self.save)(name, &verdict) {
                    self.error = Some(error.context("keeping the verdict of a case"));
                }
                self.cases.insert(name.to_owned(), verdict);
                self.running = None;
            }
            // The program's own count is of this boot only.
            Line::Other if is_count(line) => {}
            Line::Other => println!("    {line}"),
        }
    }
}

impl<F: FnMut(&str, &Verdict) -> Result<()>> Sink for Follower<'_, F> {
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

/// Passed and failed cases.
pub fn count(cases: &BTreeMap<String, Verdict>) -> (usize, usize) {
    let passed = cases.values().filter(|verdict| verdict.passed).count();
    (passed, cases.len() - passed)
}

/// What a suite's verdicts are about: the contents of everything that it runs.
pub fn identity() -> Result<String> {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    let programs = [
        "nacre-e2e",
        "containerd-shim-nacre-v1",
        "vmctl",
        "nacre-bench",
    ]
    .map(paths::debug);
    let images = ["vmlinux", "initrd"].map(|file| {
        [
            paths::image(file),
            paths::newer_image(file),
            paths::lean_image(file),
        ]
    });
    let probe = paths::static_program(paths::PROBE);
    let files = programs.into_iter().chain(images.into_iter().flatten());
    for file in files.chain([probe]) {
        hash.update(std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?);
    }
    Ok(format!("{:x}", hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_lines_are_told_from_other_output() {
        assert_eq!(parse("start a b [x, y]"), Line::Start("a b [x, y]"));
        let passed = Verdict {
            passed: true,
            seconds: 1.5,
            reason: String::new(),
        };
        assert_eq!(
            parse("ok a (b) [x, y] (1.5 s)"),
            Line::End("a (b) [x, y]", passed)
        );
        let failed = Verdict {
            passed: false,
            seconds: 2.0,
            reason: "code 3 (1.0 s), not 0".into(),
        };
        assert_eq!(
            parse("FAILED a (2.0 s): code 3 (1.0 s), not 0"),
            Line::End("a", failed)
        );
        for other in [
            "",
            "ok",
            "ok a",
            "FAILED a (soon)",
            "3 passed, 0 failed",
            "starting containerd",
        ] {
            assert_eq!(parse(other), Line::Other, "{other}");
        }
    }

    #[test]
    fn another_kernel_is_tried_by_one_containerd_and_not_by_runc() {
        let options = |image| {
            let suite = Suite {
                full: false,
                only: vec!["some".to_owned()],
                except: Vec::new(),
                time_limit: Duration::ZERO,
                out: PathBuf::new(),
                cpus: 1,
                image,
            };
            suite.options().join(" ")
        };
        let usual = options(None);
        assert!(usual.contains("--containerd 1.7") && usual.contains("--runtime runc"));
        assert_eq!(
            options(Some("/image".into())),
            "--count small --containerd 2.1 --runtime nacre --filter some"
        );
    }

    #[test]
    fn another_image_is_named_where_the_suite_runs() {
        let folder = tempfile::tempdir().unwrap();
        let folder = std::fs::canonicalize(folder.path()).unwrap();
        let vmlinux = folder.join("vmlinux");
        std::fs::write(&vmlinux, "").unwrap();
        let mut request = Request::new(Vec::new());
        assert!(other_image(&folder, Place::Host, &mut request).is_err());
        std::fs::write(folder.join("initrd"), "").unwrap();

        let mut request = Request::new(Vec::new());
        other_image(&folder, Place::Testbed, &mut request).unwrap();
        let there = "/usr/share/nacre/other/vmlinux";
        assert_eq!(request.env[0], ("NACRE_KERNEL".into(), there.into()));
        assert_eq!(request.copies[0], (vmlinux.clone(), there.into()));
        assert_eq!(request.env[1].0, "NACRE_INITRD");

        let mut request = Request::new(Vec::new());
        other_image(&folder, Place::Host, &mut request).unwrap();
        assert_eq!(request.env[0].1, vmlinux.display().to_string());
        assert!(request.copies.is_empty());
    }

    #[test]
    fn a_report_cut_anywhere_reads_the_same() {
        let report = b"start a\nnoise\nok a (1.0 s)\nstart b\nFAILED b (2.0 s): why not\nstart c\n";
        for cut in 0..report.len() {
            let (mut cases, mut saved) = (BTreeMap::new(), 0);
            let mut save = |_: &str, _: &Verdict| {
                saved += 1;
                Ok(())
            };
            let mut follower = Follower::new(&mut cases, &mut save);
            follower.stdout(&report[..cut]);
            follower.stdout(&report[cut..]);
            assert_eq!(follower.running.as_deref(), Some("c"));
            assert_eq!((count(&cases), saved), ((1, 1), 2));
        }
    }
}
