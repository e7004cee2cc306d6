//! `nacre-bench`: that it measures; never what.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::context::Context;
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
    Case {
        name: "nacre-bench measures boots, density, starts at once and the vsock's ways, and compares what it has measured",
        subject: Subject::Alone,
        seconds: (300, 300),
        run: vms,
    },
];

/// A scenario, its arguments, and series that it must have.
type Scenario = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

const BOTH: [&str; 2] = ["nacre", "runc"];

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

/// Rows of what is measured of VMs: the scenario, its arguments, and of each table the sides and some of the rows.
type OfVms = (
    &'static str,
    &'static str,
    &'static [(&'static [&'static str], &'static [&'static str])],
);

const VMS: [OfVms; 4] = [
    (
        "boot",
        "--rounds 1 --warm-up 0",
        &[
            (&["nacre"], &["to init"]),
            (&["nacre"], &["CPU time", "page faults, minor"]),
            (
                &["shim", "vmctl"],
                &["T0 process start", "T4 first KVM_RUN", "T8 agent ready"],
            ),
        ],
    ),
    (
        "density",
        "--rounds 1 --vms 1",
        &[(&BOTH, &["host memory"])],
    ),
    (
        "parallel",
        "--rounds 1 --warm-up 0 --vms 2",
        &[(&BOTH, &["= all"])],
    ),
    (
        "vsock",
        "--rounds 1 --warm-up 0 --mib 1",
        &[(
            &["in-process", "unix-socket"],
            &["out, 64 KiB", "in, 64 KiB"],
        )],
    ),
];

fn measures(context: &Context) -> Result<()> {
    for (scenario, arguments, series) in SCENARIOS {
        let busybox = context.programs.busybox.display().to_string();
        let arguments = [arguments, &["--busybox", &busybox]].concat();
        let report = report(context, scenario, &arguments)?;
        let [table] = tables(&report)?;
        check(table, &BOTH, series)?;
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
    let tables: [&Value; 2] = tables(&report)?;
    for (table, way) in tables.into_iter().zip(["virtio-blk", "virtio-fs"]) {
        ensure!(table["title"] == way, "{} is there", table["title"]);
        check(table, &BOTH, &STORAGE)?;
    }
    let left = std::fs::read_dir(&folder)?.count();
    ensure!(left == 0, "{left} things are left in its folder");
    Ok(())
}

fn network(context: &Context) -> Result<()> {
    let before = interfaces()?;
    let few = "--rounds 1 --warm-up 0 --mib 1 --requests 1";
    let report = report(context, "net", &few.split(' ').collect::<Vec<_>>())?;
    let [network, vsock] = tables(&report)?;
    check(network, &BOTH, &NETWORK)?;
    check(vsock, &BOTH[..1], &VSOCK)?;
    let after = interfaces()?;
    ensure!(before == after, "{before:?} has become {after:?}");
    Ok(())
}

fn vms(context: &Context) -> Result<()> {
    for (scenario, arguments, expected) in VMS {
        let busybox = context.programs.busybox.display().to_string();
        let mut arguments: Vec<&str> = arguments.split(' ').collect();
        arguments.extend(["--busybox", &busybox]);
        let report = report(context, scenario, &arguments)?;
        let tables = report["tables"].as_array().context("no tables")?;
        ensure!(tables.len() == expected.len(), "{} tables", tables.len());
        for (table, (sides, rows)) in tables.iter().zip(expected) {
            check(table, sides, rows)?;
        }
    }
    compares(context)
}

/// That a run is the same as itself, that others cannot be compared with it, and that a page of all can be made.
fn compares(context: &Context) -> Result<()> {
    let bench = || Command::new(context.programs.bin.join("nacre-bench"));
    let [boot, vsock] = ["boot", "vsock"].map(|scenario| context.path(format!("{scenario}.json")));
    let said = ctr::run(bench().arg("compare").args([&boot, &boot]))?;
    said.expect_code(0)?;
    eprintln!("{}", said.out());
    let other = ctr::run(bench().arg("compare").args([&boot, &vsock]))?;
    other.expect_code(1)?;
    ensure!(other.err().contains("vsock"), "{}", other.err());
    let page = context.path("all.html");
    let made = bench()
        .arg("page")
        .args([&boot, &vsock])
        .arg("--html")
        .arg(&page)
        .status()?;
    ensure!(made.success(), "the page is not made: {made}");
    let text = std::fs::read_to_string(&page)?;
    for words in ["<svg", "T8 agent ready", "unix-socket"] {
        ensure!(text.contains(words), "{words} is not in the page");
    }
    Ok(())
}

/// All tables of what was measured whole.
fn tables<const COUNT: usize>(report: &Value) -> Result<[&Value; COUNT]> {
    let tables = report["tables"].as_array().context("no tables")?;
    let tables: Vec<&Value> = tables.iter().collect();
    let count = tables.len();
    <[&Value; COUNT]>::try_from(tables).map_err(|_| anyhow::anyhow!("there are {count} tables"))
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
    ensure!(report["complete"] == true, "it is not complete");
    Ok(report)
}

/// That these sides have a value of each row.
fn check(table: &Value, names: &[&str], rows: &[&str]) -> Result<()> {
    let title = &table["title"];
    let sides = table["sides"].as_array().context("no sides")?;
    let found: Vec<_> = sides.iter().map(|side| side["name"].as_str()).collect();
    let wanted: Vec<_> = names.iter().map(|name| Some(*name)).collect();
    ensure!(found == wanted, "{title} is of {found:?}");
    for side in sides {
        let all = side["series"].as_array().context("no series")?;
        for row in rows {
            let found = all.iter().find(|one| one["name"] == *row);
            let one = found.with_context(|| format!("{title} has no {row}"))?;
            let values = one["values"].as_array().context("no values")?;
            ensure!(values.len() == 1, "{title} has {} of {row}", values.len());
            ensure!(values.iter().all(Value::is_number), "{values:?}");
        }
    }
    Ok(())
}
