//! What every VM of vmctl has around it: its state directory with record and
//! lock, its control socket, and the signals that end it. All of it is freed
//! whatever way the session ends.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Config;
use crate::control::{self, Served};
use crate::record::{self, Owner, PidFile, Record};
use crate::sandbox::Sandbox;
use crate::sandbox::clock::ClockReading;

/// The namespace of vmctl's VMs, beside those of containerd.
pub(super) const NAMESPACE: &str = "vmctl";

/// The state of one VM; dropping it frees all of it.
pub(super) struct Session {
    pub record: Arc<Record>,
    served: Option<Served>,
    _pid: PidFile,
}

impl Session {
    /// Makes the state directory of the VM `id` and holds it.
    pub(super) fn begin(config: &Config, id: &str) -> anyhow::Result<Self> {
        let directory = config.vm_dir(NAMESPACE, id);
        let owner = Owner {
            id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
        };
        let record = Record::create(&directory, owner)?;
        let pid = PidFile::hold(&directory).map_err(|error| match error {
            record::Error::Held { pid, .. } => {
                anyhow::anyhow!(
                    "A VM named {id} runs already, in process {pid}: choose another --name"
                )
            }
            error => error.into(),
        })?;
        // What a killed vmctl of this name has left.
        for resource in record.resources().iter().rev() {
            record.free(resource)?;
        }
        Ok(Self {
            record: Arc::new(record),
            served: None,
            _pid: pid,
        })
    }

    pub(super) fn directory(&self) -> &Path {
        self.record.directory()
    }

    /// Serves the control socket.
    pub(super) async fn serve(&mut self, sandbox: &Sandbox) -> anyhow::Result<()> {
        let path = self.directory().join(control::SOCKET);
        let served = control::serve(&path, Arc::new(ControlTarget(sandbox.downgrade()))).await?;
        self.served = Some(served);
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.served = None;
        if let Err(error) = record::cleanup(self.record.directory()) {
            eprintln!("vmctl: {error}; `vmctl list --prune` tries again");
        }
    }
}

/// The control socket must not keep the VM alive.
struct ControlTarget(crate::sandbox::WeakSandbox);

#[async_trait::async_trait]
impl control::Target for ControlTarget {
    fn inspect(&self) -> control::Inspection {
        self.0
            .upgrade()
            .map(|sandbox| sandbox.inspect())
            .unwrap_or_default()
    }

    async fn memory_used(&self) -> Option<u64> {
        self.0.upgrade()?.memory_used().await
    }

    async fn clock(&self) -> Option<ClockReading> {
        self.0.upgrade()?.clock().await
    }

    async fn resize(&self, wanted: control::Wanted) -> Result<control::Changed, String> {
        match self.0.upgrade() {
            Some(sandbox) => sandbox.resize(wanted).await,
            None => Err("The VM has ended".to_owned()),
        }
    }

    async fn stop(&self) -> crate::sandbox::ExitReason {
        match self.0.upgrade() {
            Some(sandbox) => sandbox.shutdown().await,
            None => crate::sandbox::ExitReason::Stopped,
        }
    }
}

/// A name for a VM that got none.
pub(super) fn default_name(prefix: &str) -> String {
    format!("{prefix}-{}", std::process::id())
}

/// Checks a name that the user gave.
pub(super) fn check_name(name: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(
            "a name is 1 to 64 letters, digits, '-', '_' and '.', and does not begin with '.'"
                .to_owned(),
        );
    }
    Ok(name.to_owned())
}

/// The signals that reach a container or end a VM.
pub(super) struct Signals {
    streams: Vec<(i32, Signal)>,
}

impl Signals {
    /// Takes over the signals of `kinds`.
    pub(super) fn new(kinds: &[i32]) -> anyhow::Result<Self> {
        let streams = kinds
            .iter()
            .map(|kind| {
                let stream = signal(SignalKind::from_raw(*kind))
                    .with_context(|| format!("Cannot take signal {kind}"))?;
                Ok((*kind, stream))
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { streams })
    }

    /// The next signal. Cancel-safe.
    pub(super) async fn next(&mut self) -> i32 {
        std::future::poll_fn(|cx| {
            for (kind, stream) in &mut self.streams {
                if let std::task::Poll::Ready(Some(())) = stream.poll_recv(cx) {
                    return std::task::Poll::Ready(*kind);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_as_directories() {
        for good in ["a", "web-1", "x_y.z"] {
            assert_eq!(check_name(good).unwrap(), good);
        }
        for bad in ["", ".", "..", "a/b", "ä", "a b", &"x".repeat(65)] {
            check_name(bad).unwrap_err();
        }
    }
}
