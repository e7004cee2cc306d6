//! The `vmctl` program: boots a kernel, runs a container without containerd,
//! lists and inspects running VMs, and says whether a host can run guests.
//! The command line is here; each command has its file.

mod boot;
mod config;
mod disk;
mod doctor;
mod inspect;
mod list;
mod probe;
mod resize;
mod run;
mod session;
mod terminal;
mod top;
mod vsock;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::sandbox::monotonic_ns;

/// Exit code of a failure of vmctl itself, before or beside the guest.
const FAILED: u8 = 1;
/// Exit code of `vmctl run` when the container could not be run, as other container tools have it.
const RUN_FAILED: u8 = 125;

/// Boots virtual machines and runs containers in them, without containerd.
#[derive(Debug, Parser)]
#[command(
    name = "vmctl",
    version = crate::BUILD_ID,
    after_help = "Configuration: /etc/nacre/config.toml, or the file that NACRE_CONFIG names; `vmctl config` prints \
                  every key. NACRE_KERNEL and NACRE_INITRD override its guest kernel and initrd. NACRE_LOG sets what is logged to \
                  standard error (error, warn, info, debug, or filters such as nacre_vmm=debug)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the VMs of this host: those of vmctl and those of the containerd shim
    List(list::Args),
    /// Boot a kernel, with its console on the terminal
    Boot(boot::Args),
    /// Run a command in a container in a VM, from a root file system directory
    Run(run::Args),
    /// Show one VM: its size, boot phases, exits, devices, and the phases of its containers' lives
    Inspect(inspect::Args),
    /// Show what VMs cost on the host: memory, CPU time, exits
    Top(top::Args),
    /// Change a running VM's vCPUs and memory, and show how long each part took
    Resize(resize::Args),
    /// Say whether this host can run guests, and what to do where it cannot
    Doctor(doctor::Args),
    /// Print the reference of the configuration file, every key with its default; or check a file
    Config(config::Args),
}

/// Runs the program; the process ends with the returned code. `main_ns`: when `main` began.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let main_ns = monotonic_ns();
    let cli = Cli::parse_from(arguments);
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("NACRE_LOG").unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .with_target(true)
        .without_time()
        .init();
    let failure = if matches!(cli.command, Command::Run(_)) {
        RUN_FAILED
    } else {
        FAILED
    };
    match dispatch(cli.command, main_ns) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vmctl: {}", crate::sandbox::chain(error.as_ref()));
            ExitCode::from(failure)
        }
    }
}

fn dispatch(command: Command, main_ns: u64) -> anyhow::Result<u8> {
    // These two have to work where the configuration does not, and say so themselves.
    match &command {
        Command::Doctor(args) => return doctor::doctor(args),
        Command::Config(args) => return config::config(args),
        _ => {}
    }
    let config = Config::load()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("vmctl")
        .enable_all()
        .build()?;
    let code = runtime.block_on(async {
        match command {
            Command::List(args) => list::list(&config, &args).await,
            Command::Boot(args) => boot::boot(&config, &args, main_ns).await,
            Command::Run(args) => run::run(&config, &args, main_ns).await,
            Command::Inspect(args) => inspect::inspect(&config, &args).await,
            Command::Top(args) => top::top(&config, &args).await,
            Command::Resize(args) => resize::resize(&config, &args).await,
            Command::Doctor(_) | Command::Config(_) => Ok(0),
        }
    });
    // A thread may still be reading the terminal; it ends with the process.
    runtime.shutdown_background();
    code
}

/// Writes to standard output. That nobody reads it any more is no failure.
fn say(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("Cannot write standard output")
        }
        _ => Ok(()),
    }
}

/// [`say`] of a value as JSON.
fn say_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    say(&(text + "\n"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_after_two_dashes_keeps_its_options() {
        let cli = Cli::try_parse_from([
            "vmctl", "run", "--rootfs", "/r", "--", "ls", "-l", "--memory",
        ]);
        let Ok(Cli {
            command: Command::Run(args),
        }) = cli
        else {
            panic!("{cli:?}")
        };
        assert_eq!(args.command, ["ls", "-l", "--memory"]);
    }
}
