//! Runs cases: which of them, each in its own process with a time limit and a
//! log, and looks for what they leave.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::context::{self, Context, Count, Programs, Runtime, Version};
use crate::daemon::{self, Running};
use crate::leaks::{self, Snapshot};
use crate::report::Report;
use crate::{Options, cases, image, report};

/// What a case is about, which decides with what it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// Containers by containerd, where nacre and runc must agree.
    Agreed,
    /// Containers by containerd that only nacre can run so.
    Nacre,
    /// nacre's programs without a containerd.
    Alone,
}

/// One end-to-end case. Its name says the case and the result.
#[derive(Debug)]
pub(crate) struct Case {
    pub name: &'static str,
    pub subject: Subject,
    /// Limit in seconds: for small counts, and for the soak's.
    pub seconds: (u64, u64),
    pub run: fn(&Context) -> Result<()>,
}

/// Time that a case's remains have to go away.
const SETTLE: Duration = Duration::from_secs(10);

/// Whether the options select this case.
pub(crate) fn selected(case: &Case, options: &Options) -> bool {
    let matches = |texts: &[String]| texts.iter().any(|text| case.name.contains(text.as_str()));
    (options.filter.is_empty() || matches(&options.filter)) && !matches(&options.exclude)
}

/// A case, and with which containerd and whose shim it runs, if with any.
type Planned = (&'static Case, Option<(Version, Runtime)>);

/// How often a case repeats what it repeats. The soak's counts are promises about nacre; runc is there to
/// prove the cases, which the small counts do.
fn count_for(asked: Count, runtime: Runtime) -> Count {
    match runtime {
        Runtime::Nacre => asked,
        Runtime::Runc => Count::Small,
    }
}

/// All that these options select, in the order in which it runs.
pub(crate) fn plan(options: &Options) -> Vec<Planned> {
    let cases = |subjects: &'static [Subject]| {
        cases::all().filter(move |case| subjects.contains(&case.subject) && selected(case, options))
    };
    let mut plan: Vec<Planned> = Vec::new();
    if options.runtime.contains(&Runtime::Nacre) {
        plan.extend(cases(&[Subject::Alone]).map(|case| (case, None)));
    }
    for &version in &options.containerd {
        for &runtime in &options.runtime {
            let subjects: &[Subject] = match runtime {
                Runtime::Nacre => &[Subject::Agreed, Subject::Nacre],
                Runtime::Runc => &[Subject::Agreed],
            };
            plan.extend(cases(subjects).map(|case| (case, Some((version, runtime)))));
        }
    }
    plan.retain(|(case, place)| !options.skip.contains(&report::title(case.name, *place)));
    plan
}

/// Runs the selected cases; true if all passed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let programs = Programs::find()?;
    let logs = match &options.logs {
        Some(logs) => {
            fs::create_dir_all(logs).with_context(|| format!("making {}", logs.display()))?;
            logs.clone()
        }
        None => daemon::default_logs()?,
    };
    let json = options.json.clone().or_else(|| {
        std::env::var_os("NACRE_OUT").map(|folder| PathBuf::from(folder).join("results.jsonl"))
    });
    let mut report = Report::new(json.as_deref())?;
    let scratch = tempfile::Builder::new().prefix("nacre-e2e-").tempdir()?;
    let archive = scratch.path().join("image.tar");
    image::write(&programs.busybox, &archive)?;

    let mut runner = Runner {
        options,
        programs: &programs,
        scratch: scratch.path(),
        logs: &logs,
    };
    let mut daemon: Option<(Version, Running)> = None;
    for (case, place) in plan(options) {
        let runtime = place.map_or(Runtime::Nacre, |(_, runtime)| runtime);
        if runtime == Runtime::Nacre {
            daemon::check_nacre(&programs)?;
        }
        let Some((version, _)) = place else {
            runner.run(case, runtime, None, &mut report)?;
            continue;
        };
        let usable =
            |(known, running): &mut (Version, Running)| *known == version && running.alive();
        if !daemon.as_mut().is_some_and(usable) {
            drop(daemon.take());
            daemon = Some((version, runner.start(version, &archive)?));
        }
        let running = daemon.as_mut().map(|(_, running)| running);
        runner.run(case, runtime, running, &mut report)?;
    }
    Ok(report.finish())
}

struct Runner<'a> {
    options: &'a Options,
    programs: &'a Programs,
    scratch: &'a Path,
    logs: &'a Path,
}

impl Runner<'_> {
    /// Starts a containerd and runs one container in it, so that what it makes once is there.
    fn start(&self, version: Version, archive: &Path) -> Result<Running> {
        println!("starting containerd {}", version.text());
        let daemon = Running::start(
            version,
            self.programs,
            archive,
            self.logs,
            "debug",
            self.options.patience,
        )?;
        daemon
            .ctr(&[
                "run",
                "--rm",
                "--runtime",
                Runtime::Runc.name(),
                context::IMAGE,
                "warm-up",
                "true",
            ])
            .context("a first container, with runc")?;
        Ok(daemon)
    }

    fn run(
        &mut self,
        case: &'static Case,
        runtime: Runtime,
        mut daemon: Option<&mut Running>,
        report: &mut Report,
    ) -> Result<()> {
        let known = daemon.as_ref().map(|running| running.daemon.clone());
        let version = known.as_ref().map(|daemon| daemon.version);
        let mut log_name = case
            .name
            .replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
        if let Some(version) = version {
            log_name = format!("{}-{}-{log_name}", version.text(), runtime.text());
        }
        let log = self.logs.join(format!("{log_name}.log"));
        let work = self.scratch.join("case");
        fs::create_dir_all(&work)?;
        let count = count_for(self.options.count, runtime);
        let context = Context {
            programs: self.programs.clone(),
            runtime,
            count,
            patience: self.options.patience,
            work: work.clone(),
            prefix: short_name(case.name),
            daemon: known.clone(),
        };
        let seconds = match count {
            Count::Small => case.seconds.0,
            Count::Soak => case.seconds.1,
        };
        let limit = Duration::from_secs_f64(seconds as f64 * self.options.patience);

        report.start(case.name, version, runtime);
        let heard = daemon
            .as_ref()
            .map(|running| (running.log.clone(), length(&running.log)));
        let before = Snapshot::take(self.programs, known.as_ref());
        let started = Instant::now();
        let mut failure = run_in_process(case, &context, limit, &log)?;
        let took = started.elapsed();
        if let Some(running) = &mut daemon {
            if !running.alive() {
                failure = Some(format!(
                    "containerd ended ({})",
                    failure.as_deref().unwrap_or("the case passed")
                ));
            }
            let known = running.known();
            if failure.is_none() && !known.is_empty() {
                failure = Some(format!("containerd still knows {}", known.join(", ")));
            }
            if failure.is_some() {
                running.sweep();
            }
        }
        let left = leaks::left_after(
            self.programs,
            known.as_ref(),
            &before,
            SETTLE.mul_f64(self.options.patience.max(1.0)),
        );
        if !left.is_empty() {
            leaks::sweep(self.programs, known.as_ref(), &before);
            let left = format!("left behind: {}", left.join("; "));
            failure = Some(match failure {
                None => left,
                Some(why) => format!("{why}; and {left}"),
            });
        }
        if let (Some(why), Some((file, from))) = (&mut failure, heard) {
            why.push_str(&said_of(&context.prefix, &file, from));
        }
        let _ = fs::remove_dir_all(&work);
        report.result(case.name, version, runtime, took, failure.as_deref(), &log)
    }
}

/// Container ids have at most 76 bytes, and begin with this.
fn short_name(name: &str) -> String {
    let mut short = String::new();
    for letter in name.chars() {
        if letter.is_ascii_alphanumeric() {
            short.push(letter);
        } else if !short.ends_with('-') {
            short.push('-');
        }
    }
    short.truncate(36);
    while short.ends_with('-') {
        short.pop();
    }
    short
}

/// Runs the case in a process of its own; says why it failed, if it did.
fn run_in_process(
    case: &Case,
    context: &Context,
    limit: Duration,
    log: &Path,
) -> Result<Option<String>> {
    let output = File::create(log).with_context(|| format!("making {}", log.display()))?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["run-case", case.name])
        .env(context::VARIABLE, serde_json::to_string(context)?)
        .env("NACRE_KERNEL", &context.programs.kernel)
        .env("NACRE_INITRD", &context.programs.initrd)
        .current_dir(&context.work)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .context("starting a case")?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // The case's own children go with it: `ctr` most of all.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    match status {
        Some(status) if status.success() => Ok(None),
        Some(status) => {
            let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
            let why = match text.rfind("error: ") {
                Some(at) => text[at + 7..].trim().to_owned(),
                None => format!("{status} {}", text.lines().next_back().unwrap_or_default()),
            };
            Ok(Some(shorten(&why)))
        }
        None => {
            let _ = child.wait();
            let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
            let last = text.lines().next_back().unwrap_or("nothing").to_owned();
            Ok(Some(format!(
                "ran into its limit of {:.0} s; its last line was: {}",
                limit.as_secs_f64(),
                shorten(&last)
            )))
        }
    }
}

fn length(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |metadata| metadata.len())
}

/// What containerd's log has of the case's containers since it had this length, in short: a report may be all that is kept of a run.
fn said_of(prefix: &str, log: &Path, from: u64) -> String {
    const LINES: usize = 8;
    let bytes = fs::read(log).unwrap_or_default();
    let new = bytes.get(from as usize..).unwrap_or_default();
    let text = String::from_utf8_lossy(new).into_owned();
    let said: Vec<&str> = text
        .lines()
        .filter(|line| line.contains(prefix) && !line.contains("level=debug"))
        .filter_map(|line| line.split_once(" level=").map(|(_, rest)| rest))
        .collect();
    let last = &said[said.len().saturating_sub(LINES)..];
    let parts = last.iter().map(|line| line.chars().take(300).collect());
    let parts: Vec<String> = parts.collect();
    if parts.is_empty() {
        return String::new();
    }
    format!("; containerd's log: {}", parts.join(" | "))
}

/// The whole is in the log.
fn shorten(text: &str) -> String {
    const LONGEST: usize = 1500;
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{} …", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_case_is_told_with_what_was_logged_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let before = "time=t level=error msg=old id=mine-1\n";
        let after = "time=t level=debug msg=small id=mine-1\ntime=t level=error msg=other id=other\n\
                     time=t level=warning msg=\"the VM has ended\" id=mine-1\n";
        fs::write(&log, format!("{before}{after}")).unwrap();
        assert_eq!(
            said_of("mine", &log, before.len() as u64),
            "; containerd's log: warning msg=\"the VM has ended\" id=mine-1"
        );
        assert_eq!(said_of("none", &log, 0), "");
        assert_eq!(said_of("mine", Path::new("/nowhere"), 7), "");
    }

    #[test]
    fn names_of_cases_are_told_apart_by_their_container_ids_and_logs() {
        let mut names = std::collections::BTreeSet::new();
        for case in cases::all() {
            assert!(names.insert(case.name), "twice: {}", case.name);
            let short = short_name(case.name);
            assert!(
                short.len() <= 36 && short.starts_with(|first: char| first.is_ascii_alphanumeric())
            );
            assert!(
                case.seconds.0 > 0 && case.seconds.1 >= case.seconds.0,
                "{}",
                case.name
            );
        }
    }

    #[test]
    fn every_case_that_the_documents_name_is_there() {
        const PAGE: &str = include_str!("../../../docs/conformance.md");
        let mut named = 0;
        for line in PAGE.lines() {
            let name = line.trim_start().strip_prefix("- `");
            let Some(name) = name.and_then(|name| name.strip_suffix('`')) else {
                continue;
            };
            assert!(
                cases::all().any(|case| case.name == name),
                "no case {name:?}"
            );
            named += 1;
        }
        assert!(named > 60, "only {named} cases are named");
    }

    #[test]
    fn only_nacre_is_soaked() {
        assert_eq!(count_for(Count::Soak, Runtime::Nacre), Count::Soak);
        assert_eq!(count_for(Count::Soak, Runtime::Runc), Count::Small);
        assert_eq!(count_for(Count::Small, Runtime::Nacre), Count::Small);
    }

    #[test]
    fn long_reasons_are_cut_at_a_character() {
        let text = "ü".repeat(2000);
        assert!(shorten(&text).chars().count() < 1510);
        assert_eq!(shorten("short"), "short");
    }
}
