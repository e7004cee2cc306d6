//! What was measured so far, whether all rounds are done or not: a table of the network and one of the vsock, and JSON with every value.

use serde_json::json;

use super::{OURS, Options, QEMU};
use crate::bench::peers::Peer;
use crate::bench::report::{Report, Unit};

/// Which table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    Network,
    Vsock,
}

/// What was measured.
pub(super) struct Measured {
    tables: Vec<(Table, Report)>,
    failures: Vec<String>,
}

impl Measured {
    /// Nothing yet, in the tables that are wanted.
    pub fn new(peers: &[Peer], options: &Options) -> Self {
        let mut tables = Vec::new();
        if !options.no_network {
            let qemu = options.qemu.is_some().then_some(QEMU);
            let names = peers.iter().map(|peer| peer.name).chain(qemu);
            tables.push((Table::Network, Report::new("virtio-net", names)));
        }
        if !options.no_vsock {
            tables.push((Table::Vsock, Report::new("vsock", [OURS])));
        }
        Self {
            tables,
            failures: Vec::new(),
        }
    }

    /// Adds values to a row.
    pub fn add(
        &mut self,
        table: Table,
        name: &'static str,
        row: &'static str,
        (unit, values): (Unit, Vec<f64>),
    ) {
        let report = self.tables.iter_mut().find(|(known, _)| *known == table);
        if let Some((_, report)) = report {
            for value in values {
                report.add(name, row, unit, value);
            }
        }
    }

    /// Notes why something is left out from here on.
    pub fn failed(&mut self, why: String) {
        eprintln!("nacre-bench: {why}");
        self.failures.push(why);
    }

    /// For people.
    pub fn text(&self) -> String {
        let tables = self.tables.iter().map(|(_, report)| report.table());
        let mut parts: Vec<String> = tables.collect();
        if !self.failures.is_empty() {
            parts.push(self.failures.join("\n"));
        }
        parts.join("\n\n")
    }

    /// All values, and what they are of.
    pub fn json(&self, options: &Options, peers: &[Peer], complete: bool) -> serde_json::Value {
        let mut programs = serde_json::Map::new();
        for peer in peers {
            programs.insert(
                peer.name.to_owned(),
                peer.program.display().to_string().into(),
            );
        }
        if let Some(qemu) = &options.qemu {
            programs.insert(QEMU.to_owned(), qemu.display().to_string().into());
        }
        json!({
            "scenario": "net",
            "complete": complete,
            "settings": {
                "rounds": options.rounds,
                "warm_up": options.warm_up,
                "sizes": options.sizes(),
                "vcpus": options.vcpus,
                "memory_mib": options.memory.mib(),
                "qemu_vhost": false,
            },
            "programs": programs,
            "failures": self.failures,
            "tables": self.tables.iter().map(|(_, report)| report.json()).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::options;
    use super::super::work::{NETWORK, VSOCK};
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
    fn every_value_is_in_its_table_and_in_the_json() {
        let options = options("--qemu /q").unwrap();
        let peers = [peer(OURS), peer("runc")];
        let mut measured = Measured::new(&peers, &options);
        for work in NETWORK {
            measured.add(Table::Network, OURS, work.name, (Unit::Us, vec![3.0, 3.0]));
            measured.add(Table::Network, "runc", work.name, (Unit::Us, vec![2.0]));
        }
        for work in VSOCK {
            measured.add(
                Table::Vsock,
                OURS,
                work.name,
                (Unit::MibPerSecond, vec![7.0]),
            );
        }
        measured.failed("qemu failed".to_owned());
        let text = measured.text();
        for words in ["virtio-net", "vsock", "nacre/runc", "1.50", "qemu failed"] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let value = measured.json(&options, &peers, false);
        assert_eq!(value["complete"], false);
        assert_eq!(value["programs"][QEMU], "/q");
        let tables = value["tables"].as_array().unwrap();
        assert_eq!(
            tables[0]["shims"][0]["series"][5]["values"],
            json!([3.0, 3.0])
        );
        assert_eq!(tables[1]["shims"][0]["series"][8]["name"], VSOCK[8].name);
    }

    #[test]
    fn a_table_that_is_not_wanted_is_not_there() {
        let options = options("--no-network").unwrap();
        let measured = Measured::new(&[peer(OURS)], &options);
        let value = measured.json(&options, &[], true);
        assert_eq!(value["tables"].as_array().unwrap().len(), 1);
        assert!(!measured.text().contains("virtio-net"));
    }
}
