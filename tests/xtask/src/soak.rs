//! `cargo xtask soak`: the end-to-end suite, nacre's cases with their big counts, and some with their small ones on the lean kernel. Verdicts are kept after every case, so that a run that was stopped goes on where
//! it was; what came of it all is in `target/nacre/soak/RESULT.md`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::run::{self, step};
use crate::suite::{self, Report, Suite, Verdict};
use crate::{apt, image, kvm, paths, testbed};

/// Options of `cargo xtask soak`.
#[derive(Args)]
pub struct SoakArgs {
    /// Forget the verdicts of an earlier run, instead of going on with it
    #[arg(long)]
    fresh: bool,
    /// Only cases whose name contains this; may be given again
    #[arg(long, value_name = "SUBSTRING")]
    only: Vec<String>,
    /// No case whose name contains this; may be given again. A later run takes them up
    #[arg(long, value_name = "SUBSTRING")]
    except: Vec<String>,
    /// CPUs of the emulated machine, where one is used. With one it loses no registers, as it does now and then with more; but a
    /// host with one CPU gives VMs without limits no more, so that cases of such fail
    #[arg(long, value_name = "N", default_value_t = testbed::CPUS)]
    cpus: u32,
    /// Longest time of this run, in hours; a later one goes on
    #[arg(long, value_name = "HOURS", default_value_t = 12)]
    hours: u64,
}

/// Cases that run on the lean kernel too: a part of each thing that a guest's kernel does.
const ON_LEAN: [&str; 15] = [
    "vmctl boot without an initrd shows the panic",
    "vmctl run prints what the program prints",
    "resize: vCPUs come and go many times and leave nothing",
    "resize: memory by virtio-mem comes and goes, and",
    "resize: memory by ACPI comes and goes, and",
    "resize: memory that the guest frees",
    "network: guest and host reach each other",
    "layers of erofs and a scratch disk that is made",
    "the guest's clock is the host's",
    "echo's text comes back",
    "new limits hold in the guest",
    "a container that runs out of memory is killed and told of",
    "a volume is written from both sides",
    "a guest that panics becomes an exit",
    "a terminal is one to the container",
];
/// What their names have before them in the result.
const LEAN: &str = "lean kernel: ";

/// What is kept between runs.
#[derive(Default, Serialize, Deserialize)]
struct State {
    /// Digest of the programs and the image that the verdicts are about.
    identity: String,
    cases: BTreeMap<String, Verdict>,
    retries: Vec<String>,
}

impl State {
    fn load(file: &Path) -> Option<State> {
        serde_json::from_str(&fs::read_to_string(file).ok()?).ok()
    }

    fn save(&self, file: &Path) -> Result<()> {
        let partial = file.with_extension("partial");
        fs::write(&partial, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("writing {}", partial.display()))?;
        Ok(fs::rename(&partial, file)?)
    }
}

/// Runs the soak; the result is the exit code.
pub fn run(args: &SoakArgs) -> Result<i32> {
    apt::ensure_installed(&[
        ("gcc", "cc"),
        ("libc6-dev", "/usr/include/stdio.h"),
        ("e2fsprogs", "mke2fs"),
    ])?;
    suite::build()?;
    step("making the lean kernel and its initrd");
    image::lean_of_the_suite()?;
    let folder = paths::cache("soak");
    fs::create_dir_all(folder.join("logs"))?;
    let file = folder.join("state.json");
    let identity = suite::identity()?;
    let mut state = match State::load(&file) {
        Some(state) if !args.fresh && state.identity == identity => {
            step(format!(
                "going on with a soak that has {} verdicts",
                state.cases.len()
            ));
            state
        }
        Some(state) if !args.fresh && !state.cases.is_empty() => {
            step("what is tested has changed since the last soak: starting anew");
            State {
                identity,
                ..State::default()
            }
        }
        _ => State {
            identity,
            ..State::default()
        },
    };
    state.save(&file)?;
    let suite = Suite {
        full: true,
        only: on_stock(args),
        except: args.except.clone(),
        time_limit: Duration::from_secs(args.hours.saturating_mul(3600)),
        out: folder.join("logs"),
        cpus: args.cpus,
        image: None,
    };
    let started = Instant::now();
    let mut report = match suite.only.is_empty() && !args.only.is_empty() {
        true => Report::default(),
        false => suite.run(state.cases.clone(), |name, verdict| {
            state.cases.insert(name.to_owned(), verdict.clone());
            state.save(&file)
        })?,
    };
    let suite = Suite {
        full: false,
        only: on_lean(args),
        except: Vec::new(),
        time_limit: suite.time_limit.saturating_sub(started.elapsed()),
        out: folder.join("logs-lean"),
        image: Some(paths::lean_image("")),
        ..suite
    };
    if !suite.only.is_empty() {
        fs::create_dir_all(&suite.out)
            .with_context(|| format!("making {}", suite.out.display()))?;
        let known = state.cases.iter();
        let known = known
            .filter_map(|(name, verdict)| Some((name.strip_prefix(LEAN)?.into(), verdict.clone())));
        let of_lean = suite.run(known.collect(), |name, verdict| {
            state.cases.insert(format!("{LEAN}{name}"), verdict.clone());
            state.save(&file)
        })?;
        for case in &suite.only {
            if !of_lean.cases.keys().any(|name| name.contains(case)) {
                bail!("the suite has no case any more that is called {case:?}: change ON_LEAN");
            }
        }
        let named = of_lean.cases.into_iter();
        report
            .cases
            .extend(named.map(|(name, verdict)| (format!("{LEAN}{name}"), verdict)));
        report.retries.extend(of_lean.retries);
    }
    state.retries.extend(report.retries.iter().cloned());
    state.save(&file)?;
    let text = result(&report, &state);
    let result_file = folder.join("RESULT.md");
    fs::write(&result_file, &text).with_context(|| format!("writing {}", result_file.display()))?;
    step(format!("written to {}", result_file.display()));
    let (passed, failed) = suite::count(&report.cases);
    println!("{passed} passed, {failed} failed");
    Ok(i32::from(failed > 0))
}

/// What of `--only` is about the usual kernels; nothing if all of it is about the lean one.
fn on_stock(args: &SoakArgs) -> Vec<String> {
    let parts = args.only.iter();
    let parts = parts.filter(|part| !part.starts_with(LEAN) && !LEAN.starts_with(part.as_str()));
    parts.cloned().collect()
}

/// The cases of the lean kernel that `--only` and `--except` leave.
fn on_lean(args: &SoakArgs) -> Vec<String> {
    let left = |case: &str| {
        let name = format!("{LEAN}{case}");
        let has = |part: &String| name.contains(part.as_str());
        (args.only.is_empty() || args.only.iter().any(has)) && !args.except.iter().any(has)
    };
    let cases = ON_LEAN.into_iter().filter(|case| left(case));
    cases.map(str::to_owned).collect()
}

fn result(report: &Report, state: &State) -> String {
    let line = |command: &mut Command| {
        run::output(command).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
    };
    let mut text = String::from("# Soak\n\n");
    let commit = line(
        Command::new("git")
            .args(["describe", "--always", "--dirty"])
            .current_dir(paths::workspace()),
    );
    let _ = writeln!(
        text,
        "- Date: {}",
        line(Command::new("date").args(["-u", "+%F %T UTC"]))
    );
    let _ = writeln!(
        text,
        "- Commit: {commit}; digest of programs and image: {}",
        &state.identity[..16]
    );
    let _ = writeln!(
        text,
        "- Machine: Linux {}; {}",
        line(Command::new("uname").arg("-r")),
        kvm::place(false).1
    );
    let _ = writeln!(
        text,
        "- Boots of the testbed that had to be repeated: {}",
        state.retries.len()
    );
    for retry in &state.retries {
        let _ = writeln!(text, "  - {retry}");
    }
    text.push_str("\n| case | result | seconds | |\n| --- | --- | --- | --- |\n");
    for (name, verdict) in &report.cases {
        let outcome = if verdict.passed { "ok" } else { "**failed**" };
        let _ = writeln!(
            text,
            "| {name} | {outcome} | {:.1} | {} |",
            verdict.seconds,
            verdict.reason.replace('|', "\\|")
        );
    }
    let (passed, failed) = suite::count(&report.cases);
    let _ = writeln!(text, "\n{passed} passed, {failed} failed");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_of_the_lean_kernel_are_chosen_by_their_names_in_the_result() {
        let chosen = |only: &[&str], except: &[&str]| {
            let owned = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect();
            let args = SoakArgs {
                fresh: false,
                only: owned(only),
                except: owned(except),
                cpus: 1,
                hours: 1,
            };
            (on_stock(&args).len(), on_lean(&args).len())
        };
        assert_eq!(chosen(&[], &[]), (0, ON_LEAN.len()));
        assert_eq!(chosen(&["lean kernel: resize: "], &[]), (0, 4));
        assert_eq!(chosen(&["resize: "], &["lean kernel"]), (1, 0));
        assert_eq!(
            chosen(&["lean kernel"], &["resize: "]),
            (0, ON_LEAN.len() - 4)
        );
        assert_eq!(chosen(&["no such case"], &[]), (1, 0));
    }

    #[test]
    fn the_state_survives_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("state.json");
        assert!(State::load(&file).is_none());
        let verdict = Verdict {
            passed: false,
            seconds: 1.5,
            reason: "a|b".into(),
        };
        let state = State {
            identity: "0123456789abcdef".into(),
            cases: [("x".to_owned(), verdict.clone())].into(),
            retries: vec!["y".into()],
        };
        state.save(&file).unwrap();
        let loaded = State::load(&file).unwrap();
        assert_eq!(
            (
                loaded.identity.as_str(),
                loaded.cases.get("x"),
                loaded.retries.len()
            ),
            ("0123456789abcdef", Some(&verdict), 1)
        );
        let report = Report {
            cases: loaded.cases,
            retries: Vec::new(),
            took: Vec::new(),
        };
        let text = result(&report, &state);
        assert!(
            text.contains("| x | **failed** | 1.5 | a\\|b |")
                && text.ends_with("\n0 passed, 1 failed\n"),
            "{text}"
        );
    }
}
