//! `nacre-e2e`: end-to-end cases against a private containerd, for nacre and,
//! where both must agree, for runc, which proves the suite itself.
//!
//! The parent starts the daemons and reports; each case runs in a process of its
//! own, so that its time limit holds whatever it does. What a case leaves behind
//! fails it. With the soak's counts only nacre's cases repeat more. Programs are found by the environment: `NACRE_BIN`,
//! `NACRE_CONTAINERD_1_7`, `NACRE_CONTAINERD_2_1`, `NACRE_RUNC`, `NACRE_BUSYBOX`,
//! `NACRE_KERNEL`, `NACRE_INITRD`, `NACRE_IMAGE_6_12` (a folder with the two of that Linux), `NACRE_OUT`.

mod cases;
mod context;
mod ctr;
mod daemon;
mod disk;
mod held;
mod image;
mod initrd;
mod leaks;
mod lots;
mod net;
mod poll;
mod processes;
mod report;
mod root;
mod shell;
mod shim;
mod sink;
mod suite;
mod tasks;
mod terminal;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::context::{Context, Count, Runtime, Version};

/// End-to-end cases of nacre.
#[derive(Debug, Parser)]
#[command(name = "nacre-e2e", version)]
struct Cli {
    #[command(subcommand)]
    hidden: Option<Hidden>,
    #[command(flatten)]
    options: Options,
}

/// What the suite calls itself with.
#[derive(Debug, Subcommand)]
enum Hidden {
    /// Run one case in this process; the context comes in the environment
    #[command(hide = true, name = "run-case")]
    RunCase { name: String },
    /// Run a program where /dev has no kvm
    #[command(hide = true, name = "without-kvm")]
    WithoutKvm {
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<std::ffi::OsString>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// List the cases and do nothing
    #[arg(long)]
    list: bool,
    /// Only cases whose name contains one of these; may be given again
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// No case whose name contains one of these; may be given again
    #[arg(long, value_name = "TEXT")]
    exclude: Vec<String>,
    /// Not this case: a whole line as --list prints it; may be given again
    #[arg(long, value_name = "CASE")]
    skip: Vec<String>,
    /// How often the cases repeat that repeat something
    #[arg(long, value_enum, default_value_t = Count::Small)]
    count: Count,
    /// Which containerd; may be given again
    #[arg(long, value_enum, default_values_t = [Version::V2_1])]
    containerd: Vec<Version>,
    /// Whose shim; may be given again
    #[arg(long, value_enum, default_values_t = [Runtime::Nacre])]
    runtime: Vec<Runtime>,
    /// Append one JSON object a case to this file [default: $NACRE_OUT/results.jsonl, if NACRE_OUT is set]
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
    /// Folder for logs [default: $NACRE_OUT, or a folder in the temporary one]
    #[arg(long, value_name = "DIR")]
    logs: Option<std::path::PathBuf>,
    /// Multiply every time limit
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    patience: f64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.hidden {
        Some(Hidden::RunCase { name }) => run_case(&name),
        Some(Hidden::WithoutKvm { command }) => Err(shim::exec_without_kvm(&command)),
        None if cli.options.list => list(&cli.options),
        None => suite::run(&cli.options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_case(name: &str) -> Result<bool> {
    let context = Context::from_environment()?;
    let Some(case) = cases::all().find(|case| case.name == name) else {
        bail!("there is no case {name}");
    };
    (case.run)(&context)?;
    Ok(true)
}

/// Prints what a run with these options would run, a line each, as its report names it.
fn list(options: &Options) -> Result<bool> {
    for (case, place) in suite::plan(options) {
        println!("{}", report::title(case.name, place));
    }
    Ok(true)
}
