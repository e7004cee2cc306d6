//! `cargo xtask`: nacre's demo, its tests, and the machinery under them.

mod apt;
mod bench;
mod daemons;
mod demo;
mod fuzz;
mod image;
mod kernel;
mod kvm;
mod oci;
mod paths;
mod run;
mod soak;
mod stage;
mod suite;
mod test;
mod testbed;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

/// Builds, tries and tests nacre. All it downloads and makes is under target/nacre.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a container in a microVM under a private containerd: installs what is missing, builds, makes the image, runs
    Demo {
        /// Use the emulated machine even where this machine's KVM would do
        #[arg(long)]
        nested: bool,
    },
    /// Run every test with small counts: format, lints, the lean kernel's configuration, unit tests, flat guests, end-to-end cases
    Test(test::TestArgs),
    /// Run the end-to-end cases with big counts; resumable, result in target/nacre/soak/RESULT.md
    Soak(soak::SoakArgs),
    /// Measure the shim next to runc's, and VMs next to those of others: lives of containers, boots, memory, streams, hotplug, files
    Bench(bench::BenchArgs),
    /// Fuzz what a hostile guest can send: libFuzzer on the targets of tests/fuzz
    Fuzz(fuzz::FuzzArgs),
    /// Make the guest kernel and initrd
    Image(image::ImageArgs),
    /// Build the lean guest kernel from Debian's source package, or check its configuration; `image --release lean` does so too
    Kernel(kernel::KernelArgs),
    /// Run a command where guests can run: in an emulated machine with SVM, or on this one if its KVM runs stock kernels
    Testbed(TestbedArgs),
}

#[derive(Args)]
struct TestbedArgs {
    /// Memory of the emulated machine, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    memory: u32,
    /// CPUs of the emulated machine; with more than one it loses registers now and then
    #[arg(long, value_name = "N", default_value_t = testbed::CPUS)]
    cpus: u32,
    /// Its time is a count of its instructions, which repeats whatever else this machine does; it has one CPU then
    #[arg(long, conflicts_with = "cpus")]
    counted: bool,
    /// Bring a file or folder along; programs bring their shared libraries. Without DST it keeps its path
    #[arg(long = "copy", value_name = "SRC[:DST]")]
    copies: Vec<String>,
    /// Set a variable in the command's environment
    #[arg(long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Longest run of the command, in seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Use the emulated machine even where this machine's KVM would do
    #[arg(long)]
    nested: bool,
    /// The command and its arguments; what it writes to $NACRE_OUT arrives in target/nacre/testbed/out
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo { nested } => demo::run(nested),
        Command::Test(args) => test::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Image(args) => image::run(&args).map(|()| 0),
        Command::Kernel(args) => kernel::run(&args),
        Command::Testbed(args) => run_testbed(args),
    };
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_testbed(args: TestbedArgs) -> Result<i32> {
    paths::use_free_testbed()?;
    let mut request = testbed::Request::new(args.command);
    request.memory = args.memory;
    request.cpus = args.cpus;
    request.counted = args.counted;
    request.time_limit = args.timeout.map(Duration::from_secs);
    request.force_nested = args.nested;
    for copy in &args.copies {
        let (source, target) = match copy.split_once(':') {
            Some((source, target)) => (PathBuf::from(source), PathBuf::from(target)),
            None => (PathBuf::from(copy), std::path::absolute(copy)?),
        };
        request.copies.push((source, target));
    }
    for pair in &args.env {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("--env {pair}: NAME=VALUE is wanted"))?;
        request.env.push((name.to_owned(), value.to_owned()));
    }
    let outcome = testbed::execute(&request, &mut testbed::Terminal)?;
    if let Some(why) = outcome.retried {
        run::step(format!("retried once: {why}"));
    }
    Ok(outcome.code)
}
