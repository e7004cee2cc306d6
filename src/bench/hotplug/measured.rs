//! What was measured so far: a table for each plug and each unplug; and the
//! picture of all of them.

use std::path::Path;

use anyhow::{Error, Result};
use serde_json::{Value, json};

use super::parts::{PLUGGED, Parts, REPORTED, REQUESTED, TOTAL, UNPLUGGED};
use super::{Options, Setup, Way, What};
use crate::bench::Setting;
use crate::bench::guest::GuestKernel;
use crate::bench::plot::{self, Ground, Labels, Line, Panel};
use crate::bench::report::{Report, Unit};
use crate::bench::run::Run;
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

impl Direction {
    const BOTH: [Direction; 2] = [Self::Plug, Self::Unplug];

    /// The title of the table.
    fn of(self, what: What) -> String {
        format!("{} {}", self.verb(), what.name())
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Plug => "plug",
            Self::Unplug => "unplug",
        }
    }

    /// The rows that follow one another.
    fn phases(self, what: What) -> &'static [&'static str] {
        match (what, self) {
            (What::Memory(_, Way::VirtioMem), _) => &REQUESTED,
            (_, Self::Plug) => &PLUGGED,
            (_, Self::Unplug) => &UNPLUGGED,
        }
    }

    /// The row that ends where QEMU's interface can tell.
    fn end(self) -> &'static str {
        match self {
            Self::Plug => REPORTED,
            Self::Unplug => TOTAL,
        }
    }
}

/// All of it.
pub(super) struct Measured<'s> {
    pub run: Run<'s>,
    /// What is done to each VM.
    setups: Vec<Vec<What>>,
    /// What has failed, and whose.
    failures: Vec<(What, &'static str)>,
}

fn settings(options: &Options, config: &Config) -> Value {
    json!({
        "rounds": options.rounds,
        "warm_up": options.warm_up,
        "boot_vcpus": 1,
        "boot_memory_mib": options.memory.mib(),
        "vcpus": options.vcpus,
        "sizes_mib": options.sizes.iter().map(|size| size.mib()).collect::<Vec<_>>(),
        "ways": options.ways,
        "initrd": config.initrd,
    })
}

impl<'s> Measured<'s> {
    /// Nothing yet.
    pub fn new(options: &Options, config: &Config, setups: &[Setup], setting: &'s Setting) -> Self {
        let mut run = Run::new("hotplug", settings(options, config), setting);
        for setup in setups {
            run.expect(options.all_rounds());
            for what in setup.operations.iter().copied() {
                let peer = options.qemu.as_ref().filter(|_| what.has_peer());
                for direction in Direction::BOTH {
                    let sides = [OURS].into_iter().chain(peer.map(|_| PEER));
                    let mut table = Report::new(direction.of(what), sides);
                    table.phases(direction.phases(what));
                    run.table(table);
                }
            }
        }
        Self {
            run,
            setups: setups
                .iter()
                .map(|setup| setup.operations.clone())
                .collect(),
            failures: Vec::new(),
        }
    }

    /// Notes what the guests run.
    pub fn guest(&mut self, config: &Config, release: &str) {
        self.run.document.guest_kernel = Some(GuestKernel {
            release: Some(release.to_owned()),
            ..GuestKernel::of(&config.kernel, Some(&config.initrd))
        });
    }

    /// Notes which QEMU is beside ours.
    pub fn qemu(&mut self, program: &Path, version: &str) {
        let document = &mut self.run.document;
        let program = format!("{}, version {version}", program.display());
        document.programs.insert(PEER.to_owned(), program);
        document.note(&format!(
            "QEMU {version}, q35: plug until the guest's kernel reports success (_OST), as the row \"{REPORTED}\" of both; unplug until it is gone"
        ));
    }

    /// Adds what one plug or unplug of `side` took.
    pub fn add(&mut self, what: What, direction: Direction, side: &str, parts: &Parts) {
        let title = direction.of(what);
        for (name, ms) in parts {
            self.run.add(&title, side, name, Unit::Ms, *ms);
        }
    }

    /// Tells of a failure, and notes it.
    pub fn failed(&mut self, what: What, side: &'static str, why: &Error) {
        self.run
            .failed(&format!("{}: {side} failed: {why:#}", what.name()));
        self.failures.push((what, side));
    }

    /// How often an operation of one side has failed.
    pub fn failures(&self, what: What, side: &str) -> usize {
        let all = self.failures.iter();
        all.filter(|(known, whose)| *known == what && *whose == side)
            .count()
    }

    /// A panel for each way and direction, with a line for each size, ours whole; and beside QEMU's up to its last event, ours
    /// up to the same.
    pub fn plot(&self) -> Result<String> {
        let document = &self.run.document;
        let mut panels = Vec::new();
        for operations in self.setups.iter().filter(|setup| !setup.is_empty()) {
            for direction in Direction::BOTH {
                let mut lines = Vec::new();
                for (family, what) in operations.iter().enumerate() {
                    let title = direction.of(*what);
                    let table = document.tables.iter().find(|table| table.title == title);
                    lines.extend(
                        table
                            .into_iter()
                            .flat_map(|table| of(table, direction, family)),
                    );
                }
                let title = match operations[0] {
                    What::Vcpus(_) => format!("{} vCPUs", direction.verb()),
                    What::Memory(_, way) => format!("{} memory: {}", direction.verb(), way.name()),
                };
                panels.push(Panel { title, lines });
            }
        }
        let release = document
            .guest_kernel
            .as_ref()
            .and_then(|kernel| kernel.release.as_deref());
        let title = [
            format!(
                "Plug and unplug, guest Linux {}",
                release.unwrap_or_default()
            ),
            document.machine.to_string(),
        ];
        let labels = Labels {
            title: &title,
            unit: Unit::Ms.label(),
            ground: Ground::Paper,
        };
        plot::cdf(&labels, &panels)
    }
}

/// The lines of one operation.
fn of(table: &Report, direction: Direction, family: usize) -> Vec<Line> {
    let line = |label: String, values: &[f64], thin: bool| Line {
        label,
        family,
        values: values.to_vec(),
        thin,
    };
    let whole = table.values(OURS, TOTAL);
    let mut lines = vec![line(table.title.clone(), whole, false)];
    let end = direction.end();
    let (suffix, sides): (_, &[&str]) = match direction {
        Direction::Plug => (", reported", &[OURS, PEER]),
        // Ours ends there as a whole.
        Direction::Unplug => ("", &[PEER]),
    };
    if !table.values(PEER, end).is_empty() {
        for side in sides {
            let label = format!("{}: {side}{suffix}", table.title);
            lines.push(line(label, table.values(side, end), true));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(setting: &Setting) -> Measured<'_> {
        use clap::Parser;
        #[derive(Parser)]
        struct Whole {
            #[command(flatten)]
            options: Options,
        }
        let words = ["x", "--vcpus", "1", "--sizes", "1G", "--qemu", "/bin/qemu"];
        let options = Whole::parse_from(words).options;
        let setups = options.setups();
        Measured::new(&options, &Config::default(), &setups, setting)
    }

    const ONE: What = What::Vcpus(1);

    #[test]
    fn each_operation_has_its_tables_and_those_their_phases() {
        let setting = Setting::default();
        let mut measured = measured(&setting);
        let plug = vec![("host call", 1.0), (TOTAL, 40.0), (REPORTED, 30.0)];
        measured.add(ONE, Direction::Plug, OURS, &plug);
        measured.add(ONE, Direction::Plug, PEER, &vec![(REPORTED, 60.0)]);
        measured.add(ONE, Direction::Unplug, OURS, &vec![(TOTAL, 7.0)]);
        let text = measured.run.document.text();
        for words in ["| plug 1 vCPU", "| unplug 1 vCPU", "qemu p99", "0.50"] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let document = &measured.run.document;
        assert_eq!(document.settings["sizes_mib"], json!([1024]));
        assert_eq!(document.tables[0].values(PEER, REPORTED), [60.0]);
        let sides = |title: &str| {
            let table = document.tables.iter().find(|table| table.title == title);
            table.map(|table| (table.sides.len(), table.phases.clone()))
        };
        let phases = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        for (title, count, names) in [
            ("plug 1 vCPU", 2, &PLUGGED[..]),
            ("unplug 1 vCPU", 2, &UNPLUGGED),
            ("plug 1G virtio-mem", 1, &REQUESTED),
            ("unplug 1G virtio-mem", 1, &REQUESTED),
            ("plug 1G acpi", 2, &PLUGGED),
        ] {
            assert_eq!(sides(title), Some((count, phases(names))), "{title}");
        }
    }

    #[test]
    fn what_is_compared_is_drawn_beside_it() {
        let setting = Setting::default();
        let mut measured = measured(&setting);
        let plug = vec![(TOTAL, 40.0), (REPORTED, 30.0)];
        measured.add(ONE, Direction::Plug, OURS, &plug);
        measured.add(ONE, Direction::Plug, PEER, &vec![(REPORTED, 60.0)]);
        measured.add(ONE, Direction::Unplug, PEER, &vec![(TOTAL, 9.0)]);
        let svg = measured.plot().unwrap();
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
        let setting = Setting::default();
        let mut measured = measured(&setting);
        let memory = What::Memory(1024, Way::Acpi);
        measured.failed(memory, OURS, &anyhow::anyhow!("it stays"));
        assert_eq!(measured.failures(memory, OURS), 1);
        assert_eq!(measured.failures(memory, PEER), 0);
        assert_eq!(measured.failures(ONE, OURS), 0);
        let text = measured.run.document.text();
        assert!(text.contains("1G acpi: nacre failed: it stays"), "{text}");
    }
}
