//! The vsock of a VM in this process, where the shim's end of a stream would be: the host's end is here, the guest's is the probe in a
//! container.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nacre_probe::net::Address;
use nacre_probe::net::wire::Content;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc::Receiver;

use super::host::answer;
use super::work::{Sizes, Work};
use crate::bench::peers::{Joined, process, specification};
use crate::bench::probed::PROBE;
use crate::config::Config;
use crate::sandbox::shares::Share;
use crate::sandbox::spec::{for_guest, process_for_guest};
use crate::sandbox::{
    Access, AgentEvent, Caching, GuestStream, Sandbox, SandboxConfig, Stdio, chain,
};

/// The host, for its guest.
const HOST: u32 = 2;
const CONTAINER: &str = "bench";

/// The VM with its container; stopped when dropped.
pub(in crate::bench) struct Vm {
    sandbox: Sandbox,
    events: Receiver<AgentEvent>,
    content: Content,
    asked: u64,
    patience: Duration,
    _root: Share,
    _directory: tempfile::TempDir,
}

/// Its size.
#[derive(Debug, Clone, Copy)]
pub(in crate::bench) struct Size {
    pub vcpus: u8,
    pub memory_mib: u64,
}

impl Vm {
    /// Boots it, and starts a container over a folder of the host with the probe in it.
    pub async fn boot(
        config: &Config,
        size: Size,
        root: &Path,
        patience: Duration,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("nacre-bench-")
            .tempdir()
            .context("making a folder for the VM")?;
        let path = directory.path().to_owned();
        let mut vm = SandboxConfig::new(config, "nacre-bench", "net", path);
        vm.vcpus = size.vcpus;
        vm.memory_mib = size.memory_mib;
        let sandbox = Sandbox::boot(vm)?;
        sandbox.ready().await.context("Booting the VM")?;
        let events = sandbox.events().context("the VM's events are taken")?;
        let root = container(&sandbox, root).await;
        let root = root.map_err(|error| anyhow!("{error:#}"))?;
        Ok(Self {
            sandbox,
            events,
            content: Content::new(),
            asked: 0,
            patience,
            _root: root,
            _directory: directory,
        })
    }

    /// Measures something; the probe's line.
    pub async fn ask(&mut self, work: Work, sizes: Sizes) -> Result<String> {
        let patience = self.patience;
        let measured = tokio::time::timeout(patience, self.measure(work, sizes));
        measured
            .await
            .with_context(|| format!("it took more than {patience:?}"))?
    }

    async fn measure(&mut self, work: Work, sizes: Sizes) -> Result<String> {
        self.asked += 1;
        let id = format!("probe{}", self.asked);
        let streams = self.sandbox.stdio_listener()?;
        let to = Address::Vsock {
            cid: HOST,
            port: streams.port(),
        };
        let (stdout, stderr) = self.exec(&id, &work.words(&to, sizes)).await?;
        self.sandbox.start(CONTAINER, &id).await?;
        let served = async {
            let stream = streams.accept().await?;
            answer(stream, &self.content).await
        };
        let ended = ended(&mut self.events, &id);
        let (served, said, complained, status) =
            tokio::join!(served, all(stdout), all(stderr), ended);
        self.sandbox.delete_exec(CONTAINER, &id).await?;
        let status = status?;
        ensure!(
            status == 0,
            "the probe ended with {status}: {}",
            complained?.trim()
        );
        served?;
        said
    }

    /// Adds an exec of the probe; its output and its complaints.
    async fn exec(&self, id: &str, words: &[String]) -> Result<(GuestStream, GuestStream)> {
        let stdout = self.sandbox.stdio_listener()?;
        let stderr = self.sandbox.stdio_listener()?;
        let mut stdio = Stdio::new();
        stdio.stdout_port = stdout.port();
        stdio.stderr_port = stderr.port();
        let probe = format!("/{PROBE}");
        let mut args = vec![probe.as_str()];
        args.extend(words.iter().map(String::as_str));
        let process = process_for_guest(&serde_json::to_vec(&process(&args))?)?;
        self.sandbox
            .exec(CONTAINER, id, process.json, stdio)
            .await?;
        Ok((stdout.accept().await?, stderr.accept().await?))
    }

    /// Ends it as it should end.
    pub async fn end(self) {
        self.sandbox.shutdown().await;
    }
}

/// Starts the container; its root, shared.
async fn container(sandbox: &Sandbox, root: &Path) -> Result<Share> {
    let share = {
        let (sandbox, root) = (sandbox.clone(), root.to_owned());
        let caching = Caching::For(Duration::from_secs(1));
        tokio::task::spawn_blocking(move || {
            sandbox.share("1.root", &root, Access::ReadWrite, caching, true)
        })
    };
    let share = share.await??;
    let probe = format!("/{PROBE}");
    let spec = specification(&[&probe, "idle"], &Joined::default(), "/nacre-bench");
    let spec = for_guest(&serde_json::from_value(spec)?, CONTAINER, "1")?;
    let mounts = vec![share.mount("rootfs")];
    sandbox
        .create_container(CONTAINER, spec.json, mounts, false, Stdio::new())
        .await
        .map_err(|error| anyhow!("{}", chain(&error)))?;
    sandbox.start(CONTAINER, "").await?;
    Ok(share)
}

/// All that a process says.
async fn all(mut stream: GuestStream) -> Result<String> {
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .await
        .context("reading what the probe says")?;
    Ok(text)
}

/// Waits for the end of an exec; its status.
async fn ended(events: &mut Receiver<AgentEvent>, id: &str) -> Result<u8> {
    loop {
        match events.recv().await.context("the VM has ended")? {
            AgentEvent::Exit {
                exec_id, status, ..
            } if exec_id == id => return Ok(status),
            _ => {}
        }
    }
}
