//! What was measured so far, whether all rounds are done or not: tables, and JSON with every value.

use std::collections::BTreeMap;

use serde_json::json;

use super::Options;
use super::counted::{INSTRUCTIONS, Missing};
use super::launched::Boot;
use super::ours::Phased;
use super::vmms::Vmm;
use crate::bench::report::{Report, Unit};

/// Whose phases they are.
pub(super) const SHIM: &str = "shim";
pub(super) const VMCTL: &str = "vmctl";

/// What was measured.
pub(super) struct Measured {
    to_init: Option<Report>,
    counted: Option<Report>,
    phases: Option<Report>,
    remarks: Vec<String>,
    failures: Vec<String>,
    programs: BTreeMap<&'static str, String>,
    versions: BTreeMap<&'static str, String>,
}

impl Measured {
    /// Nothing yet.
    pub fn new(vmms: &[Vmm], options: &Options) -> Self {
        let names = || vmms.iter().map(|vmm| vmm.name());
        let of_init = |title| (!options.no_init).then(|| Report::new(title, names()));
        Self {
            to_init: of_init("boot: to init, next to others"),
            counted: of_init("boot: to init, counted"),
            phases: (!options.no_phases)
                .then(|| Report::new("boot: phases of ours", [SHIM, VMCTL])),
            remarks: Vec::new(),
            failures: Vec::new(),
            programs: BTreeMap::new(),
            versions: BTreeMap::new(),
        }
    }

    /// What a VMM's program is, and what it says of itself.
    pub fn program(&mut self, name: &'static str, program: String, version: Option<String>) {
        self.programs.insert(name, program);
        if let Some(version) = version {
            self.versions.insert(name, version);
        }
    }

    /// A boot to the guest's init.
    pub fn booted(&mut self, vmm: Vmm, boot: Boot) {
        for missing in &boot.missing {
            self.remark(&not_counted(missing));
        }
        if let Some(report) = &mut self.to_init {
            report.add(vmm.name(), "to init", Unit::Ms, boot.ms);
        }
        if let Some(report) = &mut self.counted {
            for (name, unit, value) in boot.counted {
                report.add(vmm.name(), name, unit, value);
            }
        }
    }

    /// A boot of ours by its phases.
    pub fn phased(&mut self, by: &'static str, boot: Phased) {
        if let Some(report) = &mut self.phases {
            for (name, ms) in boot.times {
                report.add(by, name, Unit::Ms, ms);
            }
            for (name, count) in boot.exits {
                report.add(by, name, Unit::Count, count);
            }
        }
    }

    /// Tells something once.
    pub fn remark(&mut self, text: &str) {
        if !self.remarks.iter().any(|known| known == text) {
            self.remarks.push(text.to_owned());
        }
    }

    /// Notes why something is left out from here on.
    pub fn failed(&mut self, why: String) {
        eprintln!("nacre-bench: {why}");
        self.failures.push(why);
    }

    fn tables(&self) -> impl Iterator<Item = &Report> {
        [&self.to_init, &self.counted, &self.phases]
            .into_iter()
            .flatten()
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut parts: Vec<String> = self.tables().map(Report::table).collect();
        for lines in [&self.remarks, &self.failures] {
            if !lines.is_empty() {
                parts.push(lines.join("\n"));
            }
        }
        parts.join("\n\n")
    }

    /// All values, and what they are of.
    pub fn json(&self, options: &Options, complete: bool) -> serde_json::Value {
        json!({
            "scenario": "boot",
            "complete": complete,
            "settings": {
                "rounds": options.rounds,
                "warm_up": options.warm_up,
                "vcpus": options.vcpus,
                "memory_mib": options.memory.mib(),
            },
            "programs": self.programs,
            "versions": self.versions,
            "remarks": self.remarks,
            "failures": self.failures,
            "tables": self.tables().map(Report::json).collect::<Vec<_>>(),
        })
    }
}

fn not_counted((name, error): &Missing) -> String {
    let why = if *name == INSTRUCTIONS {
        "the machine has no counter of them that may be used"
    } else {
        "the kernel has no such tracepoint, or no tracefs at /sys/kernel/tracing, or this user may not use it"
    };
    format!("{name}: not counted: {why} ({error})")
}

#[cfg(test)]
mod tests {
    use super::super::tests::options;
    use super::*;

    fn boot(ms: f64) -> Boot {
        Boot {
            ms,
            counted: vec![("CPU time", Unit::Ms, ms / 2.0)],
            missing: vec![(INSTRUCTIONS, std::io::Error::from_raw_os_error(2))],
        }
    }

    #[test]
    fn every_value_is_in_its_table_and_in_the_json() {
        let options = options("--qemu /q").unwrap();
        let mut measured = Measured::new(&[Vmm::Ours, Vmm::Qemu], &options);
        measured.program("qemu", "/q".to_owned(), Some("QEMU 10".to_owned()));
        for (vmm, ms) in [(Vmm::Ours, 30.0), (Vmm::Qemu, 40.0), (Vmm::Ours, 30.0)] {
            measured.booted(vmm, boot(ms));
        }
        for by in [SHIM, VMCTL] {
            let phased = Phased {
                times: vec![("T8 agent ready", 8.0)],
                exits: vec![("exits, halt", 2.0)],
            };
            measured.phased(by, phased);
        }
        measured.failed("qemu failed".to_owned());
        let text = measured.text();
        for words in [
            "boot: to init, next to others",
            "nacre/qemu",
            "0.75",
            "CPU time",
            "shim/vmctl",
            "T8 agent ready",
            "exits, halt",
            "qemu failed",
        ] {
            assert!(text.contains(words), "{words} in {text}");
        }
        // Once, not once for each boot.
        assert_eq!(text.matches("instructions: not counted").count(), 1);
        let value = measured.json(&options, false);
        assert_eq!(value["complete"], false);
        assert_eq!(value["versions"]["qemu"], "QEMU 10");
        let tables = value["tables"].as_array().unwrap();
        assert_eq!(tables.len(), 3);
        assert_eq!(
            tables[0]["shims"][0]["series"][0]["values"],
            json!([30.0, 30.0])
        );
    }

    #[test]
    fn a_table_that_is_not_wanted_is_not_there() {
        let measured = Measured::new(&[Vmm::Ours], &options("--no-phases").unwrap());
        assert!(!measured.text().contains("phases of ours"));
        let measured = Measured::new(&[Vmm::Ours], &options("--no-init").unwrap());
        assert!(!measured.text().contains("to init"));
    }
}
