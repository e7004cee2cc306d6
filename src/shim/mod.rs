//! containerd's shim: bootstrap, the task service, stdio, events, and the
//! ordered end. One process serves one sandbox; see `sandbox` for what that is.

pub mod bootstrap;
pub mod cleanup;
mod daemon;
pub mod events;
pub mod lifecycle;
mod log;
mod namespaces;
mod rootfs;
pub(crate) mod settings;
pub mod stdio;
pub mod task;

use std::io::Write;
use std::process::ExitCode;

use bootstrap::Action;

/// The program `containerd-shim-nacre-v1`. On success stdout has the answer and stderr nothing, since containerd
/// reads both together; on failure stderr has one line and the exit code is 1.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(answer) => {
            let mut stdout = std::io::stdout().lock();
            match stdout.write_all(&answer).and_then(|()| stdout.flush()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("containerd-shim-nacre-v1: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<Vec<u8>, String> {
    let flags = bootstrap::parse(args).map_err(|error| error.to_string())?;
    let bundle = match &flags.bundle {
        Some(bundle) => bundle.clone(),
        None => {
            std::env::current_dir().map_err(|error| format!("Cannot find the bundle: {error}"))?
        }
    };
    match flags.action {
        Action::Version => Ok(bootstrap::version_text().into_bytes()),
        Action::Info => Ok(bootstrap::runtime_info()),
        Action::Start => bootstrap::start(&flags, &bundle).map_err(|error| error.to_string()),
        Action::Delete => bootstrap::delete(&flags, &bundle).map_err(|error| error.to_string()),
        Action::Daemon => daemon::run(&flags, &bundle).map(|()| Vec::new()),
    }
}
