//! What was measured so far, whether all rounds are done or not: a table of boots to init, one of what they cost, and one of our phases.

use std::path::Path;

use super::Options;
use super::counted::{INSTRUCTIONS, Missing};
use super::launched::Boot;
use super::ours::{PHASES, Phased};
use super::vmms::Vmm;
use crate::bench::Setting;
use crate::bench::report::{Better, Report, Unit};
use crate::bench::run::Run;

/// Whose phases they are.
pub(super) const SHIM: &str = "shim";
pub(super) const VMCTL: &str = "vmctl";

/// The tables.
const TO_INIT: &str = "boot: to init, next to others";
const COUNTED: &str = "boot: to init, counted";
const OF_OURS: &str = "boot: phases of ours";

/// What was measured.
pub(super) struct Measured<'s> {
    pub run: Run<'s>,
}

impl<'s> Measured<'s> {
    /// Nothing yet.
    pub fn new(vmms: &[Vmm], options: &Options, setting: &'s Setting) -> Self {
        let mut run = Run::new("boot", options.settings(), setting);
        if !options.no_init {
            for title in [TO_INIT, COUNTED] {
                run.table(Report::new(title, vmms.iter().map(|vmm| vmm.name())));
            }
            run.expect(options.all_rounds());
        }
        if !options.no_phases {
            let mut table = Report::new(OF_OURS, [SHIM, VMCTL]);
            table.milestones(&PHASES);
            run.table(table);
            run.expect(options.all_rounds());
        }
        Self { run }
    }

    /// What a VMM's program is, and what it says of itself.
    pub fn program(&mut self, name: &str, program: &Path, version: Option<String>) {
        let version = version.map_or_else(String::new, |version| format!(", {version}"));
        let program = format!("{}{version}", program.display());
        self.run.document.programs.insert(name.to_owned(), program);
    }

    /// A boot to the guest's init.
    pub fn booted(&mut self, vmm: Vmm, boot: Boot) {
        for missing in &boot.missing {
            self.run.document.note(&not_counted(missing));
        }
        let name = vmm.name();
        self.run.add(TO_INIT, name, "to init", Unit::Ms, boot.ms);
        for (row, unit, value) in boot.counted {
            self.add(COUNTED, name, row, unit, value);
        }
    }

    /// A boot of ours by its phases.
    pub fn phased(&mut self, by: &str, boot: Phased) {
        for (row, ms) in boot.times {
            self.run.add(OF_OURS, by, row, Unit::Ms, ms);
        }
        for (row, count) in boot.exits {
            self.add(OF_OURS, by, row, Unit::Count, count);
        }
    }

    /// All that a boot costs is better if it is less, what is counted too.
    fn add(&mut self, title: &str, side: &str, row: &str, unit: Unit, value: f64) {
        if let Some(table) = self.run.document.table(title) {
            table.add(side, row, unit, value);
            table.better(side, row, Better::Less);
        }
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
            counted: vec![
                ("CPU time", Unit::Ms, ms / 2.0),
                ("system calls", Unit::Count, 7.0),
            ],
            missing: vec![(INSTRUCTIONS, std::io::Error::from_raw_os_error(2))],
        }
    }

    #[test]
    fn every_value_is_in_its_table() {
        let options = options("--qemu /q").unwrap();
        let setting = Setting::default();
        let mut measured = Measured::new(&[Vmm::Ours, Vmm::Qemu], &options, &setting);
        measured.program("qemu", Path::new("/q"), Some("QEMU 10".to_owned()));
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
        measured.run.failed("qemu failed");
        let text = measured.run.document.text();
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
        let document = &measured.run.document;
        assert_eq!(document.programs["qemu"], "/q, QEMU 10");
        assert_eq!(document.tables.len(), 3);
        let all = document.tables.iter().flat_map(|table| &table.sides);
        let mut rows = all.flat_map(|side| &side.series);
        assert!(rows.all(|row| row.better == Better::Less));
        let ours = Vmm::Ours.name();
        assert_eq!(document.tables[0].values(ours, "to init"), [30.0, 30.0]);
    }

    #[test]
    fn a_table_that_is_not_wanted_is_not_there() {
        for (words, count) in [("--no-phases", 2), ("--no-init", 1)] {
            let setting = Setting::default();
            let measured = Measured::new(&[Vmm::Ours], &options(words).unwrap(), &setting);
            assert_eq!(measured.run.document.tables.len(), count, "{words}");
        }
    }
}
