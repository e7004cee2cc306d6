//! `vmctl boot`: a kernel by itself, with its console on the terminal.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;

use super::disk::DiskArg;
use super::inspect::phases_text;
use super::resize::Most;
use super::session::{Session, Signals, check_name, default_name};
use super::terminal::{ConsoleOutput, RawMode, console_input};
use super::vsock::Vsock;
use super::{say, say_json};
use crate::config::{ByteSize, Config, parse_duration};
use crate::sandbox::{BootPhases, Error, ExitReason, Sandbox, SandboxConfig, cmdline};

/// Exit code of a guest whose agent does not become ready.
const NOT_READY: u8 = 9;
/// Exit codes, in `--help` too.
const CODES: &str = "\
Exit code:
  0  the guest powered off (with --timing: after the agent was ready)
  1  the VM could not be made or run
  2  the command line is wrong
  3  the guest rebooted
  4  the guest's kernel panicked
  5  triple fault
  6  KVM could not go on with a vCPU
  7  the VMM failed
  8  ended from the host: Ctrl-a x, a signal, or the control socket
  9  with --timing: the guest's agent did not become ready in time, or speaks another protocol

On a terminal, all keys go to the guest but the escape Ctrl-a: Ctrl-a x ends the VM, Ctrl-a Ctrl-a types one Ctrl-a.";

#[derive(Debug, clap::Args)]
#[command(after_help = CODES)]
pub(super) struct Args {
    /// Guest kernel: an ELF vmlinux with a PVH note, or a bzImage [default: from the configuration]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM file system [default: from the configuration; none with --no-agent]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The whole kernel command line, instead of the default one
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Words added to the kernel command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    append: Option<String>,
    /// Memory, such as 512M or 2G [default: from the configuration]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// vCPUs, 1 to 254 [default: from the configuration]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=254))]
    vcpus: Option<u8>,
    #[command(flatten)]
    most: Most,
    /// A raw disk image or block device; with :ro read-only. May be given several times
    #[arg(long = "disk", value_name = "PATH[:ro]")]
    disks: Vec<DiskArg>,
    /// The kernel does not run nacre's agent: no vsock device, no wait for the agent
    #[arg(long, conflicts_with = "vsock")]
    no_agent: bool,
    /// Wait for the agent, print the boot's phases from process start to agent ready, and power off
    #[arg(long, conflicts_with = "no_agent")]
    timing: bool,
    /// With --timing, leave the VM running after the phases are printed
    #[arg(long, requires = "timing")]
    keep: bool,
    /// Print the phases (with --timing) or how the VM ended as JSON on standard output; the guest's
    /// console then goes to standard error
    #[arg(long)]
    json: bool,
    /// How long the agent may take to be ready [default: from the configuration]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, conflicts_with = "no_agent")]
    timeout: Option<Duration>,
    #[command(flatten)]
    vsock: Vsock,
    /// Name of the VM in `vmctl list` [default: boot-PID]
    #[arg(long, value_parser = check_name)]
    name: Option<String>,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    id: String,
    /// Absent with --timing --keep, when the VM still runs.
    exit: Option<ExitReason>,
    kernel_release: Option<String>,
    agent_build: Option<String>,
    /// Host CLOCK_MONOTONIC in nanoseconds, absent where not reached.
    phases: BootPhases,
    /// Exits of the vCPUs to the VMM so far, by reason.
    exits: BTreeMap<String, u64>,
}

pub(super) async fn boot(config: &Config, args: &Args, main_ns: u64) -> anyhow::Result<u8> {
    let id = args.name.clone().unwrap_or_else(|| default_name("boot"));
    let mut session = Session::begin(config, &id)?;
    let vsock = args.vsock.bind(&session.record)?;
    let (quit, mut quitting) = mpsc::channel(1);
    let mut signals = Signals::new(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
    let mut sandbox_config = sandbox_config(config, args, &id, &session);
    sandbox_config.main_ns = Some(main_ns);
    args.most.apply(config, &mut sandbox_config)?;
    let ending = Arc::new(AtomicBool::new(false));
    // A measured boot has no console: its cost is not the boot's.
    let raw = if args.timing && !args.keep {
        None
    } else {
        let raw = RawMode::enter()?;
        sandbox_config.console.raw = Some(console_output(args.json, ending.clone())?);
        sandbox_config.console.input = Some(console_input(raw.is_some(), quit.clone())?);
        raw
    };
    let sandbox = Sandbox::boot(sandbox_config)?;
    let ended = async {
        session.serve(&sandbox).await?;
        let _sockets = vsock.serve(&sandbox)?;
        run(args, &id, &sandbox, &mut quitting, &mut signals, &ending).await
    }
    .await;
    // Whatever ended it, no console is waited for any more.
    ending.store(true, Ordering::Relaxed);
    let reason = sandbox.shutdown().await;
    drop(raw);
    if let Err(error) = ended {
        return not_ready(error);
    }
    if !args.timing || args.keep {
        if args.json {
            say_json(&report(id, Some(reason.clone()), &sandbox))?;
        } else if reason != ExitReason::PowerOff {
            eprintln!("vmctl: {reason}");
        }
    }
    Ok(exit_code(&reason))
}

/// Until the VM has ended or is to end. Err: the agent did not become ready.
async fn run(
    args: &Args,
    id: &str,
    sandbox: &Sandbox,
    quitting: &mut mpsc::Receiver<()>,
    signals: &mut Signals,
    ending: &AtomicBool,
) -> anyhow::Result<()> {
    let guest = async {
        if args.timing {
            sandbox.ready().await?;
            if args.json {
                say_json(&report(id.to_owned(), None, sandbox))?;
            } else {
                say(&phases_text(&sandbox.phases()))?;
            }
            if !args.keep {
                return Ok(());
            }
        } else if !args.no_agent
            && let Err(error @ (Error::BootTimeout { .. } | Error::Mismatch { .. })) =
                sandbox.ready().await
        {
            // The console may still be of use.
            eprintln!("vmctl: {error}\r");
        }
        sandbox.ended().await;
        Ok(())
    };
    tokio::select! {
        outcome = guest => outcome,
        Some(()) = quitting.recv() => {
            ending.store(true, Ordering::Relaxed);
            sandbox.stop();
            Ok(())
        }
        signal = signals.next() => {
            tracing::info!(signal, "ending the VM");
            ending.store(true, Ordering::Relaxed);
            // A second signal does not wait for the guest.
            tokio::select! {
                _ = sandbox.shutdown() => {}
                _ = signals.next() => sandbox.stop(),
            }
            Ok(())
        }
    }
}

fn sandbox_config(config: &Config, args: &Args, id: &str, session: &Session) -> SandboxConfig {
    let mut sandbox = SandboxConfig::new(
        config,
        super::session::NAMESPACE,
        id,
        session.directory().to_owned(),
    );
    if let Some(kernel) = &args.kernel {
        sandbox.kernel = kernel.clone();
    }
    if args.initrd.is_some() || args.no_agent {
        sandbox.initrd = args.initrd.clone();
    }
    sandbox.agent = !args.no_agent;
    let base = match &args.cmdline {
        Some(whole) => whole.clone(),
        // Someone watches the console, unless the boot is measured.
        None if !args.timing => without_word(&sandbox.cmdline, "quiet"),
        None => sandbox.cmdline.clone(),
    };
    sandbox.cmdline = cmdline(&base, args.append.as_deref().unwrap_or_default());
    if let Some(memory) = args.memory {
        sandbox.memory_mib = memory.mib();
    }
    if let Some(vcpus) = args.vcpus {
        sandbox.vcpus = vcpus;
    }
    if let Some(timeout) = args.timeout {
        sandbox.timeouts.boot = timeout;
    }
    sandbox.disks = args
        .disks
        .iter()
        .enumerate()
        .map(|(index, disk)| disk.config(index))
        .collect();
    sandbox
}

fn without_word(words: &str, word: &str) -> String {
    words
        .split_whitespace()
        .filter(|other| *other != word)
        .collect::<Vec<_>>()
        .join(" ")
}

fn console_output(json: bool, ending: Arc<AtomicBool>) -> std::io::Result<Box<dyn Write + Send>> {
    Ok(Box::new(if json {
        ConsoleOutput::new(std::io::stderr(), ending)?
    } else {
        ConsoleOutput::new(std::io::stdout(), ending)?
    }))
}

fn report(id: String, exit: Option<ExitReason>, sandbox: &Sandbox) -> Report {
    let inspection = sandbox.inspect();
    let told = |text: String| (!text.is_empty()).then_some(text);
    Report {
        id,
        exit,
        kernel_release: told(inspection.kernel_release),
        agent_build: told(inspection.agent_build),
        phases: inspection.phases,
        exits: inspection.exits,
    }
}

/// With --timing, a boot that failed: told, with the code of how the VM ended, or that it did not get ready.
fn not_ready(error: anyhow::Error) -> anyhow::Result<u8> {
    let code = match error.downcast_ref::<Error>() {
        Some(Error::Gone { reason, .. }) => exit_code(reason),
        Some(Error::BootTimeout { .. } | Error::Mismatch { .. }) => NOT_READY,
        _ => return Err(error),
    };
    eprintln!("vmctl: {error}");
    Ok(code)
}

fn exit_code(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::PowerOff => 0,
        ExitReason::Reboot => 3,
        ExitReason::Panic => 4,
        ExitReason::TripleFault { .. } => 5,
        ExitReason::KvmError { .. } => 6,
        ExitReason::Internal { .. } => 7,
        ExitReason::Stopped => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_end_has_its_own_code() {
        let reasons = [
            ExitReason::PowerOff,
            ExitReason::Reboot,
            ExitReason::Panic,
            ExitReason::TripleFault { vcpu: 0 },
            ExitReason::KvmError {
                vcpu: 0,
                message: String::new(),
            },
            ExitReason::Internal {
                message: String::new(),
            },
            ExitReason::Stopped,
        ];
        let codes: std::collections::BTreeSet<u8> = reasons.iter().map(exit_code).collect();
        assert_eq!(codes.len(), reasons.len());
        assert_eq!(exit_code(&ExitReason::PowerOff), 0);
        assert!(
            codes
                .iter()
                .all(|code| CODES.contains(&format!("  {code}  ")))
        );
    }

    #[test]
    fn a_measured_boot_that_fails_tells_how() {
        let gone = Error::Gone {
            reason: ExitReason::Panic,
            console: String::new(),
        };
        assert_eq!(not_ready(gone.into()).unwrap(), 4);
        let late = Error::BootTimeout {
            after: Duration::from_secs(1),
            console: String::new(),
        };
        assert_eq!(not_ready(late.into()).unwrap(), NOT_READY);
        not_ready(anyhow::anyhow!("else")).unwrap_err();
    }

    #[test]
    fn quiet_goes_from_a_watched_console() {
        assert_eq!(
            without_word("console=ttyS0 quiet quietly", "quiet"),
            "console=ttyS0 quietly"
        );
    }
}
