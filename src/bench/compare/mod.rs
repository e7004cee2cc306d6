//! `nacre-bench compare`: two runs of one scenario beside each other. Here is
//! what differs around them; `judge` says what of their rows has changed, `chance`
//! whether that may be chance, `show` shows it.

mod chance;
mod judge;
mod show;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Args;

use super::Setting;
use super::document::{Document, Machine, replace};
use super::guest::GuestKernel;
use super::page::plain;
use super::run::tell;
use judge::{Judged, Terms, Verdict, judge};

/// Options of `nacre-bench compare`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// What --json has written before a change
    #[arg(value_name = "A.json")]
    a: PathBuf,
    /// The same after it
    #[arg(value_name = "B.json")]
    b: PathBuf,
    /// A change of the median below that is none, however certain; counts that are the same in all rounds of a run are compared exactly
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, value_parser = percent)]
    threshold: f64,
    /// Compare times and rates as ratios of the first side to the others, as for two machines
    #[arg(long)]
    ratios: bool,
    /// End with exit code 1 if something got worse, B is not complete, or A has what B has not
    #[arg(long)]
    fail: bool,
}

fn percent(text: &str) -> Result<f64, String> {
    let percent: f64 = text.parse().map_err(|_| "a number is wanted".to_owned())?;
    if (0.0..=1000.0).contains(&percent) {
        Ok(percent)
    } else {
        Err("0 to 1000 is possible".to_owned())
    }
}

/// Both runs, and what came of it.
struct Comparison {
    a: Document,
    b: Document,
    threshold: f64,
    /// Why ratios are compared, if they are.
    ratios: Option<&'static str>,
    differences: Vec<String>,
    judged: Judged,
}

/// Compares, shows and writes it.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<ExitCode> {
    ensure!(
        setting.html.is_none(),
        "A comparison has no page: --html is for what measures, and for nacre-bench page"
    );
    let (a, b) = (Document::load(&options.a)?, Document::load(&options.b)?);
    let comparison = Comparison::new(a, b, options)?;
    if let Some(file) = &setting.json {
        let value = comparison.json(&options.a, &options.b);
        replace(file, &serde_json::to_vec_pretty(&value)?)?;
    }
    let text = comparison.text(&options.a, &options.b);
    tell(&mut std::io::stdout(), &text)?;
    let failures = comparison.failures();
    if options.fail && !failures.is_empty() {
        eprintln!("nacre-bench: {}", failures.join("; "));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

impl Comparison {
    fn new(a: Document, b: Document, options: &Options) -> Result<Self> {
        ensure!(
            a.scenario == b.scenario,
            "{} is of {} and {} of {}: only runs of one scenario can be compared",
            options.a.display(),
            a.scenario,
            options.b.display(),
            b.scenario
        );
        let ratios = if !same_machine(&a.machine, &b.machine) {
            Some("The machines differ")
        } else {
            options.ratios.then_some("As asked")
        };
        let terms = Terms {
            threshold: options.threshold,
            ratios: ratios.is_some(),
        };
        let judged = judge(&a, &b, terms);
        ensure!(
            !judged.rows.is_empty(),
            "{} and {} have no row that can be compared: {}",
            options.a.display(),
            options.b.display(),
            match judged.left.all().as_slice() {
                [] => "nothing was measured".to_owned(),
                notes => notes.join("; "),
            }
        );
        Ok(Self {
            differences: differences(&a, &b),
            a,
            b,
            threshold: options.threshold,
            ratios,
            judged,
        })
    }

    /// What is not to be if B is to be as good as A.
    fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let (worse, lost) = (self.count(Verdict::Worse), self.judged.left.lost.len());
        if worse > 0 {
            failures.push(format!("rows that got worse: {worse}"));
        }
        if lost > 0 {
            failures.push(format!(
                "what A has and B has not, or not in the same unit: {lost}"
            ));
        }
        failures.extend(show::unfinished("B", &self.b));
        failures
    }

    fn count(&self, verdict: Verdict) -> usize {
        let rows = self.judged.rows.iter();
        rows.filter(|row| row.verdict == verdict).count()
    }
}

/// Whether times of both mean the same. Memory is a little less or more with another kernel.
fn same_machine(a: &Machine, b: &Machine) -> bool {
    let near = a.memory_mib.abs_diff(b.memory_mib) * 50 <= a.memory_mib.max(b.memory_mib);
    (&a.cpu, a.cpus, a.emulated) == (&b.cpu, b.cpus, b.emulated) && near
}

/// What is not the same around the two, beside the build.
fn differences(a: &Document, b: &Document) -> Vec<String> {
    let mut all = Vec::new();
    let mut differ = |what: &str, a: String, b: String| {
        if a != b {
            all.push(format!("{what}: {a} in A, {b} in B"));
        }
    };
    let word = |emulated: bool| if emulated { "emulated" } else { "not emulated" }.to_owned();
    let (one, other) = (&a.machine, &b.machine);
    differ("machine", word(one.emulated), word(other.emulated));
    differ("CPU", one.cpu.clone(), other.cpu.clone());
    differ("CPUs", one.cpus.to_string(), other.cpus.to_string());
    differ(
        "memory",
        format!("{} MiB", one.memory_mib),
        format!("{} MiB", other.memory_mib),
    );
    differ("host's kernel", one.kernel.clone(), other.kernel.clone());
    let (one, other) = guests(a.guest_kernel.as_ref(), b.guest_kernel.as_ref());
    differ("guest's kernel", one, other);
    let initrd = |document: &Document| {
        let kernel = document.guest_kernel.as_ref()?;
        kernel.initrd.as_ref()?.sha256.clone()
    };
    if let (Some(one), Some(other)) = (initrd(a), initrd(b)) {
        differ("SHA-256 of the guest's initrd", one, other);
    }
    let settings = |document: &Document| -> BTreeMap<String, String> {
        let settings = document.settings.iter();
        settings
            .map(|(name, value)| (format!("setting {name}"), plain(value)))
            .collect()
    };
    let programs = |document: &Document| -> BTreeMap<String, String> {
        let programs = document.programs.iter();
        programs
            .map(|(name, program)| (format!("program of {name}"), program.clone()))
            .collect()
    };
    for (a, b) in [(settings(a), settings(b)), (programs(a), programs(b))] {
        let names: BTreeSet<_> = a.keys().chain(b.keys()).collect();
        for name in names {
            let value = |of: &BTreeMap<String, String>| {
                of.get(name).map_or("none", String::as_str).to_owned()
            };
            differ(name, value(&a), value(&b));
        }
    }
    all
}

/// Both guests' kernels, by what both tell: releases, and digests where both have one.
fn guests(a: Option<&GuestKernel>, b: Option<&GuestKernel>) -> (String, String) {
    let digest = |kernel: Option<&GuestKernel>| kernel?.sha256.clone();
    let digests = digest(a).zip(digest(b)).unzip();
    let words = |kernel: Option<&GuestKernel>, digest: Option<String>| {
        let Some(kernel) = kernel else {
            return "unknown".to_owned();
        };
        let file = kernel.file.display().to_string();
        let release = kernel.release.clone().unwrap_or(file);
        digest.map_or(release.clone(), |digest| {
            format!("{release} (SHA-256 {digest}…)")
        })
    };
    (words(a, digests.0), words(b, digests.1))
}

#[cfg(test)]
mod tests;
