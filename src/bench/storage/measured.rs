//! What was measured of files so far, whether all rounds are done or not: a table for each way, and JSON with every value.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use super::{Options, QEMU, Sizes, Way};
use crate::bench::peers::Peer;
use crate::bench::report::{Report, Unit};

/// What was measured: a table for each way.
pub(super) struct Measured {
    tables: Vec<(Way, Report)>,
    remarks: BTreeSet<String>,
    failures: Vec<String>,
}

impl Measured {
    /// Nothing yet.
    pub fn new(peers: &[Peer], options: &Options) -> Self {
        let qemu = options.qemu.is_some().then_some(QEMU);
        let table = |way: Way| {
            let names = peers.iter().map(|peer| peer.name).chain(qemu);
            (way, Report::new(way.name(), names))
        };
        Self {
            tables: Way::BOTH.map(table).to_vec(),
            remarks: BTreeSet::new(),
            failures: Vec::new(),
        }
    }

    /// Adds a value to the tables of these ways.
    pub fn add(
        &mut self,
        name: &'static str,
        ways: &[Way],
        row: &'static str,
        unit: Unit,
        value: f64,
    ) {
        for (way, report) in &mut self.tables {
            if ways.contains(way) {
                report.add(name, row, unit, value);
            }
        }
    }

    /// Adds a sentence for people, once.
    pub fn remark(&mut self, text: &str) {
        self.remarks.insert(text.to_owned());
    }

    /// Notes why something is left out from here on.
    pub fn failed(&mut self, why: String) {
        eprintln!("nacre-bench: {why}");
        self.failures.push(why);
    }

    /// For people.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        for (_, report) in &self.tables {
            text.push_str(&format!("{}\n\n", report.table()));
        }
        for note in self.remarks.iter().chain(&self.failures) {
            text.push_str(&format!("{note}\n"));
        }
        text
    }

    /// All values, and what they are of.
    pub fn json(
        &self,
        options: &Options,
        sizes: Sizes,
        peers: &[Peer],
        complete: bool,
    ) -> serde_json::Value {
        let show = |path: &Path| path.display().to_string();
        let programs = peers
            .iter()
            .map(|peer| (peer.name.to_owned(), json!(show(&peer.program))));
        let mut programs: serde_json::Map<_, _> = programs.collect();
        for (name, program) in [(QEMU, &options.qemu), ("virtiofsd", &options.virtiofsd)] {
            programs.extend(
                program
                    .as_deref()
                    .map(|path| (name.to_owned(), json!(show(path)))),
            );
        }
        json!({
            "scenario": "storage",
            "complete": complete,
            "settings": {
                "rounds": options.rounds,
                "warm_up": options.warm_up,
                "sizes": sizes,
                "reads": options.reads,
                "vcpus": options.vcpus,
                "memory_mib": options.memory.mib(),
            },
            "programs": programs,
            "remarks": self.remarks,
            "failures": self.failures,
            "tables": self.tables.iter().map(|(_, report)| report.json()).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::work::ALL;
    use super::super::{OURS, tests::options};
    use super::*;

    fn peer(name: &'static str) -> Peer {
        Peer {
            name,
            program: format!("/bin/{name}").into(),
            path: None,
            config: None,
        }
    }

    #[test]
    fn runc_stands_beside_both_ways_and_every_value_is_in_the_json() {
        let options = options("--qemu /q --virtiofsd /v").unwrap();
        let peers = [peer(OURS), peer("runc")];
        let mut measured = Measured::new(&peers, &options);
        let sizes = Sizes { mib: 1, files: 2 };
        let unit = Unit::Ms;
        for work in ALL {
            measured.add(OURS, &[Way::Blk], work.name(), unit, 4.0);
            measured.add(OURS, &[Way::Fs], work.name(), unit, 6.0);
            measured.add("runc", &Way::BOTH, work.name(), unit, 2.0);
            measured.add(QEMU, &[Way::Fs], work.name(), unit, 12.0);
        }
        measured.remark("nacre: a remark");
        measured.failed("qemu failed".to_owned());
        let text = measured.tables();
        for words in [
            "virtio-blk",
            "virtio-fs",
            "3.00",
            "0.50",
            "nacre: a remark",
            "qemu failed",
        ] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let value = measured.json(&options, sizes, &peers, true);
        assert_eq!(value["programs"][QEMU], "/q");
        assert_eq!(value["failures"], json!(["qemu failed"]));
        for (table, ours) in [(0, 4.0), (1, 6.0)] {
            let shims = &value["tables"][table]["shims"];
            assert_eq!(shims[0]["series"][6]["values"], json!([ours]));
            assert_eq!(shims[1]["series"][6]["name"], "untar");
            assert_eq!(shims[1]["series"][0]["median"], 2.0);
        }
    }
}
