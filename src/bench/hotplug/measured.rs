//! What was measured so far, whether all rounds are done or not: tables, JSON
//! with every value, and the picture.

use std::path::PathBuf;

use anyhow::{Error, Result};
use serde_json::{Value, json};

use super::parts::{Parts, REPORTED, TOTAL};
use super::plot::{self, Line};
use super::{Options, Setup, What};
use crate::bench::report::{Report, Unit};
use crate::config::Config;

/// The two that are measured, as tables and files call them.
pub(super) const OURS: &str = "nacre";
pub(super) const PEER: &str = "qemu";

/// There, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Plug,
    Unplug,
}

/// One thing that came and went.
struct Operation {
    what: What,
    plug: Report,
    unplug: Report,
    /// Whose, and why.
    failures: Vec<(&'static str, String)>,
}

/// All of it.
pub(super) struct Measured {
    /// By VM.
    setups: Vec<Vec<Operation>>,
    settings: Value,
    kernel: PathBuf,
    initrd: PathBuf,
    qemu: Option<PathBuf>,
    /// The guest's `uname -r`.
    pub kernel_release: String,
    /// QEMU's version as it says it.
    pub qemu_version: Option<String>,
    /// Why there are fewer rounds than were asked for; empty: there are not.
    ended_by: Option<String>,
}

impl Measured {
    /// Nothing yet.
    pub fn new(options: &Options, config: &Config, setups: &[Setup]) -> Self {
        let operation = |what: &What| {
            let sides = match &options.qemu {
                Some(_) if what.has_peer() => vec![OURS, PEER],
                Some(_) | None => vec![OURS],
            };
            Operation {
                what: *what,
                plug: Report::new(format!("plug {}", what.name()), sides.clone()),
                unplug: Report::new(format!("unplug {}", what.name()), sides),
                failures: Vec::new(),
            }
        };
        let all = |setup: &Setup| setup.operations.iter().map(operation).collect();
        Self {
            setups: setups.iter().map(all).collect(),
            settings: json!({
                "rounds": options.rounds,
                "warm_up": options.warm_up,
                "boot_vcpus": 1,
                "boot_memory_mib": options.memory.mib(),
                "vcpus": options.vcpus,
                "sizes_mib": options.sizes.iter().map(|size| size.mib()).collect::<Vec<_>>(),
                "ways": options.ways,
            }),
            kernel: config.kernel.clone(),
            initrd: config.initrd.clone(),
            qemu: options.qemu.clone(),
            kernel_release: String::new(),
            qemu_version: None,
            ended_by: Some("not all rounds are done".to_owned()),
        }
    }

    fn operation(&mut self, setup: usize, place: usize) -> Option<&mut Operation> {
        self.setups.get_mut(setup)?.get_mut(place)
    }

    /// Adds what one plug or unplug of `side` took.
    pub fn add(
        &mut self,
        setup: usize,
        place: usize,
        direction: Direction,
        side: &'static str,
        parts: &Parts,
    ) {
        let Some(operation) = self.operation(setup, place) else {
            return;
        };
        let report = match direction {
            Direction::Plug => &mut operation.plug,
            Direction::Unplug => &mut operation.unplug,
        };
        for (name, ms) in parts {
            report.add(side, name, Unit::Ms, *ms);
        }
    }

    /// Adds a failure.
    pub fn failed(&mut self, setup: usize, place: usize, side: &'static str, why: String) {
        if let Some(operation) = self.operation(setup, place) {
            let note = format!("{side} failed: {why}");
            operation.plug.note(note.clone());
            eprintln!("\nnacre-bench: {}: {note}", operation.what.name());
            operation.failures.push((side, why));
        }
    }

    /// How often an operation of one side has failed.
    pub fn failures(&self, setup: usize, place: usize, side: &str) -> usize {
        let operation = self.setups.get(setup).and_then(|all| all.get(place));
        let failures = operation.map_or(&[][..], |operation| &operation.failures);
        failures.iter().filter(|(whose, _)| *whose == side).count()
    }

    /// Nothing more comes.
    pub fn end(&mut self, error: Option<&Error>) {
        self.ended_by = error.map(|error| format!("{error:#}"));
    }

    fn reports(&self) -> impl Iterator<Item = &Report> {
        let operations = self.setups.iter().flatten();
        operations.flat_map(|operation| [&operation.plug, &operation.unplug])
    }

    /// A table an operation.
    pub fn tables(&self) -> String {
        let mut text = format!(
            "Guest: Linux {}, from {}\n",
            self.kernel_release,
            self.kernel.display()
        );
        if let Some(version) = &self.qemu_version {
            text.push_str(&format!(
                "QEMU {version}, q35: plug until the guest's kernel reports success (_OST), as the row \"{REPORTED}\" of both; unplug until it is gone\n"
            ));
        }
        for report in self.reports() {
            text.push_str(&format!("\n{}\n", report.table()));
        }
        if let Some(why) = &self.ended_by {
            text.push_str(&format!("\nNot all of it: {why}\n"));
        }
        text
    }

    /// All values, and what they are of.
    pub fn json(&self) -> Value {
        let failures = self.setups.iter().flatten().flat_map(|operation| {
            let failure = |(side, why): &(&str, String)| {
                json!({ "operation": operation.what.name(), "of": side, "why": why })
            };
            operation.failures.iter().map(failure)
        });
        json!({
            "scenario": "hotplug",
            "complete": self.ended_by.is_none(),
            "ended_by": self.ended_by,
            "settings": self.settings,
            "kernel": self.kernel,
            "kernel_release": self.kernel_release,
            "initrd": self.initrd,
            "qemu": self.qemu.as_ref().map(|program| json!({
                "program": program,
                "version": self.qemu_version,
            })),
            "failures": failures.collect::<Vec<_>>(),
            "operations": self.reports().map(Report::json).collect::<Vec<_>>(),
        })
    }

    /// A line for each operation, ours whole; and beside QEMU's up to its last event, ours up to the same.
    pub fn plot(&self, machine: &str) -> Result<String> {
        let mut lines = Vec::new();
        let mut family = 0;
        for operations in &self.setups {
            for (verb, direction) in [("plug", Direction::Plug), ("unplug", Direction::Unplug)] {
                for operation in operations {
                    let name = format!("{verb} {}", operation.what.name());
                    let (report, end) = match direction {
                        Direction::Plug => (&operation.plug, REPORTED),
                        Direction::Unplug => (&operation.unplug, TOTAL),
                    };
                    lines.push(Line {
                        label: name.clone(),
                        family,
                        values: report.values(OURS, TOTAL).to_vec(),
                        thin: false,
                    });
                    let theirs = report.values(PEER, end);
                    if theirs.is_empty() {
                        continue;
                    }
                    let mut compared = vec![(PEER, theirs)];
                    if direction == Direction::Plug {
                        compared.insert(0, (OURS, report.values(OURS, end)));
                    }
                    for (side, values) in compared {
                        let until = if direction == Direction::Plug {
                            ", reported"
                        } else {
                            ""
                        };
                        lines.push(Line {
                            label: format!("{name}: {side}{until}"),
                            family: family + 1,
                            values: values.to_vec(),
                            thin: true,
                        });
                    }
                }
                family += 2;
            }
        }
        let title = format!(
            "Plug and unplug, guest Linux {}; host {machine}",
            self.kernel_release
        );
        plot::cdf(&title, &lines)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Way;
    use super::*;

    fn measured() -> Measured {
        use clap::Parser;
        #[derive(Parser)]
        struct Whole {
            #[command(flatten)]
            options: Options,
        }
        let words = ["x", "--vcpus", "1", "--sizes", "1G", "--qemu", "/bin/qemu"];
        let options = Whole::parse_from(words).options;
        let setups = options.setups();
        Measured::new(&options, &Config::default(), &setups)
    }

    #[test]
    fn an_interrupted_run_has_what_was_measured_and_says_why_it_ended() {
        let mut measured = measured();
        let value = measured.json();
        assert_eq!(value["complete"], false);
        let plug = vec![("host call", 1.0), (TOTAL, 40.0), (REPORTED, 30.0)];
        measured.add(0, 0, Direction::Plug, OURS, &plug);
        measured.add(0, 0, Direction::Plug, PEER, &vec![(REPORTED, 60.0)]);
        measured.add(0, 0, Direction::Unplug, OURS, &vec![(TOTAL, 7.0)]);
        measured.end(Some(&anyhow::anyhow!("interrupted")));
        let text = measured.tables();
        for words in [
            "plug 1 vCPU",
            "qemu p99",
            "0.50",
            "Not all of it: interrupted",
        ] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let value = measured.json();
        assert_eq!(value["ended_by"], "interrupted");
        assert_eq!(value["settings"]["sizes_mib"], json!([1024]));
        let series = &value["operations"][0]["shims"][1]["series"];
        assert_eq!(series[0]["values"], json!([60.0]));
        measured.end(None);
        assert_eq!(measured.json()["complete"], true);
    }

    #[test]
    fn what_is_compared_is_drawn_beside_it() {
        let mut measured = measured();
        let plug = vec![(TOTAL, 40.0), (REPORTED, 30.0)];
        measured.add(0, 0, Direction::Plug, OURS, &plug);
        measured.add(0, 0, Direction::Plug, PEER, &vec![(REPORTED, 60.0)]);
        measured.add(0, 0, Direction::Unplug, PEER, &vec![(TOTAL, 9.0)]);
        let svg = measured.plot("a machine").unwrap();
        for label in [
            "plug 1 vCPU: nacre, reported",
            "plug 1 vCPU: qemu, reported",
            "unplug 1 vCPU: qemu",
        ] {
            assert!(svg.contains(label), "{label}");
        }
        assert!(!svg.contains("unplug 1 vCPU: nacre"));
    }

    #[test]
    fn failures_are_counted_by_side_and_told() {
        let mut measured = measured();
        measured.failed(2, 0, OURS, "it stays".to_owned());
        assert_eq!(measured.failures(2, 0, OURS), 1);
        assert_eq!(measured.failures(2, 0, PEER), 0);
        assert_eq!(measured.failures(9, 9, OURS), 0);
        let value = measured.json();
        assert_eq!(
            value["failures"][0]["operation"],
            What::Memory(1024, Way::Acpi).name()
        );
        assert!(measured.tables().contains("nacre failed: it stays"));
    }
}
