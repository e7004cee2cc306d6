//! The results: a line for people, an object for programs.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::context::{Runtime, Version};

/// A case and where it runs, as one line; [`Report`] and `--list` say it alike.
pub(crate) fn title(name: &str, place: Option<(Version, Runtime)>) -> String {
    match place {
        Some((version, runtime)) => {
            format!("{name} [containerd {}, {}]", version.text(), runtime.text())
        }
        None => name.to_owned(),
    }
}

/// Counts, and writes each case's result as soon as it is there.
pub(crate) struct Report {
    json: Option<File>,
    passed: u32,
    failed: Vec<String>,
}

impl Report {
    pub fn new(json: Option<&Path>) -> Result<Self> {
        let json = json
            .map(|path| {
                File::options()
                    .create(true)
                    .append(true)
                    .open(path)
                    .with_context(|| format!("opening {}", path.display()))
            })
            .transpose()?;
        Ok(Report {
            json,
            passed: 0,
            failed: Vec::new(),
        })
    }

    /// Says that a case begins, so that whoever reads along knows which one hung.
    pub fn start(&self, name: &str, containerd: Option<Version>, runtime: Runtime) {
        println!(
            "start {}",
            title(name, containerd.map(|version| (version, runtime)))
        );
    }

    pub fn result(
        &mut self,
        name: &str,
        containerd: Option<Version>,
        runtime: Runtime,
        took: Duration,
        failure: Option<&str>,
        log: &Path,
    ) -> Result<()> {
        let title = title(name, containerd.map(|version| (version, runtime)));
        match failure {
            None => {
                self.passed += 1;
                println!("ok {title} ({:.1} s)", took.as_secs_f64());
            }
            Some(why) => {
                self.failed.push(title.clone());
                println!("FAILED {title} ({:.1} s): {why}", took.as_secs_f64());
                for line in last_lines(log) {
                    println!("    | {line}");
                }
            }
        }
        if let Some(file) = &mut self.json {
            let line = json!({
                "name": name,
                "containerd": containerd.map(Version::text),
                "runtime": runtime.text(),
                "result": if failure.is_none() { "ok" } else { "failed" },
                "seconds": (took.as_secs_f64() * 1000.0).round() / 1000.0,
                "why": failure,
                "log": log.file_name().map(|name| name.to_string_lossy().into_owned()),
            });
            writeln!(file, "{line}").context("writing the results")?;
        }
        Ok(())
    }

    /// The closing lines; true if every case passed.
    pub fn finish(self) -> bool {
        for name in &self.failed {
            println!("failed: {name}");
        }
        println!("{} passed, {} failed", self.passed, self.failed.len());
        self.failed.is_empty() && self.passed > 0
    }
}

/// The end of a failed case's log.
fn last_lines(log: &Path) -> Vec<String> {
    const LINES: usize = 40;
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(LINES)..];
    shown
        .iter()
        .map(|line| line.chars().take(500).collect())
        .collect()
}
