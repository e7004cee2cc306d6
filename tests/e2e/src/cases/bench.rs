//! `nacre-bench`: that it measures; never what.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::context::{Context, Runtime};
use crate::ctr;
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "nacre-bench measures both shims and leaves nothing",
        subject: Subject::Alone,
        seconds: (180, 180),
        run: measures,
    },
    Case {
        name: "nacre-bench measures files by virtio-blk and virtio-fs and leaves nothing",
        subject: Subject::Alone,
        seconds: (180, 180),
        run: storage,
    },
    Case {
        name: "nacre-bench measures the network and the vsock and leaves nothing",
        subject: Subject::Alone,
        seconds: (240, 240),
        run: network,
    },
];

/// A scenario, its arguments, and series that it must have.
type Scenario = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

const BOTH: [Runtime; 2] = [Runtime::Nacre, Runtime::Runc];

const SCENARIOS: [Scenario; 2] = [
    (
        "lifecycle",
        &["--count", "1", "--warm-up", "0"],
        &[
            "shim-start",
            "connect",
            "create",
            "start",
            "first-output",
            "kill",
            "exit",
            "delete",
        ],
    ),
    (
        "cat",
        &["--count", "1", "--warm-up", "0", "--mib", "1"],
        &["round-trip", "rate"],
    ),
];

/// Rows of the tables of storage.
const STORAGE: [&str; 7] = [
    "read, cold",
    "read, warm",
    "random 4 KiB, depth 1",
    "random 4 KiB, depth 32",
    "walk, cold",
    "walk, warm",
    "untar",
];

const NETWORK: [&str; 6] = [
    "TCP out, 1 stream",
    "TCP in, 1 stream",
    "TCP out, 8 streams",
    "TCP in, 8 streams",
    "TCP request",
    "UDP request",
];

const VSOCK: [&str; 9] = [
    "out, 64 B",
    "in, 64 B",
    "request, 64 B",
    "out, 4 KiB",
    "in, 4 KiB",
    "request, 4 KiB",
    "out, 64 KiB",
    "in, 64 KiB",
    "request, 64 KiB",
];

fn measures(context: &Context) -> Result<()> {
    for (scenario, arguments, series) in SCENARIOS {
        let busybox = context.programs.busybox.display().to_string();
        let arguments = [arguments, &["--busybox", &busybox]].concat();
        let report = report(context, scenario, &arguments)?;
        let table = report["tables"].get(0).context("no tables")?;
        check(table, scenario, &BOTH, series)?;
    }
    Ok(())
}

fn storage(context: &Context) -> Result<()> {
    let folder = context.path("files");
    std::fs::create_dir_all(&folder)?;
    let place = folder.display().to_string();
    let few = "--rounds 1 --warm-up 0 --mib 1 --files 20 --reads 40 --dir";
    let mut arguments: Vec<&str> = few.split(' ').collect();
    arguments.push(&place);
    let report = report(context, "storage", &arguments)?;
    ensure!(report["complete"] == true, "it is not complete");
    let tables = report["tables"].as_array().context("no tables")?;
    ensure!(tables.len() == 2, "there are {} tables", tables.len());
    for (table, way) in tables.iter().zip(["virtio-blk", "virtio-fs"]) {
        ensure!(table["title"] == way, "{} is there", table["title"]);
        check(table, way, &BOTH, &STORAGE)?;
    }
    let left = std::fs::read_dir(&folder)?.count();
    ensure!(left == 0, "{left} things are left in its folder");
    Ok(())
}

fn network(context: &Context) -> Result<()> {
    let before = interfaces()?;
    let few = "--rounds 1 --warm-up 0 --mib 1 --requests 1";
    let report = report(context, "net", &few.split(' ').collect::<Vec<_>>())?;
    ensure!(report["complete"] == true, "it is not complete");
    let tables = report["tables"].as_array().context("no tables")?;
    let [network, vsock] = tables.as_slice() else {
        anyhow::bail!("there are {} tables", tables.len());
    };
    check(network, "virtio-net", &BOTH, &NETWORK)?;
    check(vsock, "vsock", &BOTH[..1], &VSOCK)?;
    let after = interfaces()?;
    ensure!(before == after, "{before:?} has become {after:?}");
    Ok(())
}

/// The host's network interfaces.
fn interfaces() -> Result<BTreeSet<OsString>> {
    let entries = std::fs::read_dir("/sys/class/net")?;
    Ok(entries
        .map(|entry| Ok(entry?.file_name()))
        .collect::<std::io::Result<_>>()?)
}

/// What nacre-bench writes of a scenario.
fn report(context: &Context, scenario: &str, arguments: &[&str]) -> Result<Value> {
    let file = context.path(format!("{scenario}.json"));
    let mut command = Command::new(context.programs.bin.join("nacre-bench"));
    command.arg(scenario).args(arguments);
    command.arg("--shim").arg(context.programs.shim());
    command.arg("--json").arg(&file);
    let output = ctr::run(&mut command)?;
    output.expect_code(0)?;
    eprintln!("{}", output.out());
    let text = std::fs::read(&file).with_context(|| file.display().to_string())?;
    let report: Value = serde_json::from_slice(&text)?;
    ensure!(report["scenario"] == scenario, "{}", report["scenario"]);
    Ok(report)
}

/// That these shims have a value of each series.
fn check(table: &Value, name: &str, runtimes: &[Runtime], series: &[&str]) -> Result<()> {
    let sides = table["sides"].as_array().context("no sides")?;
    for (side, runtime) in sides.iter().zip(runtimes) {
        ensure!(side["name"] == runtime.text(), "{} is first", side["name"]);
        let all = side["series"].as_array().context("no series")?;
        for row in series {
            let found = all.iter().find(|one| one["name"] == *row);
            let one = found.with_context(|| format!("{name} has no {row}"))?;
            let count = one["values"].as_array().map_or(0, Vec::len);
            ensure!(count == 1, "{name} has {count} values of {row}");
        }
    }
    ensure!(
        sides.len() == runtimes.len(),
        "{} sides were measured",
        sides.len()
    );
    Ok(())
}
