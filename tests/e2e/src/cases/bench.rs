//! `nacre-bench`: that it measures; never what.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::context::{Context, Runtime};
use crate::ctr;
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[Case {
    name: "nacre-bench measures both shims and leaves nothing",
    subject: Subject::Alone,
    seconds: (180, 180),
    run: measures,
}];

/// A scenario, its arguments, and series that it must have.
type Scenario = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

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

fn measures(context: &Context) -> Result<()> {
    for (scenario, arguments, series) in SCENARIOS {
        let file = context.path(format!("{scenario}.json"));
        let mut command = Command::new(context.programs.bin.join("nacre-bench"));
        command.arg(scenario).args(arguments);
        command.arg("--shim").arg(context.programs.shim());
        command.arg("--busybox").arg(&context.programs.busybox);
        command.arg("--json").arg(&file);
        let output = ctr::run(&mut command)?;
        output.expect_code(0)?;
        eprintln!("{}", output.out());
        let text = std::fs::read(&file).with_context(|| file.display().to_string())?;
        let report: Value = serde_json::from_slice(&text)?;
        ensure!(report["scenario"] == scenario, "{}", report["scenario"]);
        let shims = report["shims"].as_array().context("no shims")?;
        for (shim, runtime) in shims.iter().zip([Runtime::Nacre, Runtime::Runc]) {
            ensure!(shim["shim"] == runtime.text(), "{} is first", shim["shim"]);
            let all = shim["series"].as_array().context("no series")?;
            for name in series {
                let found = all.iter().find(|one| one["name"] == *name);
                let one = found.with_context(|| format!("{scenario} has no {name}"))?;
                let count = one["values"].as_array().map_or(0, Vec::len);
                ensure!(count == 1, "{scenario} has {count} values of {name}");
                ensure!(one["median"].is_number() && one["p99"].is_number());
            }
        }
        ensure!(shims.len() == 2, "{} shims were measured", shims.len());
    }
    Ok(())
}
