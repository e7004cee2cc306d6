//! Who listens to a shim while it is measured: one that takes its events, as
//! containerd would, and one that takes its log.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::shim_async::{Events, create_events};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::Server;

/// containerd's side of the events: takes and counts them.
pub(super) struct Heard {
    socket: PathBuf,
    count: Arc<AtomicU64>,
    runtime: Option<tokio::runtime::Runtime>,
}

struct Counter(Arc<AtomicU64>);

#[async_trait]
impl Events for Counter {
    async fn forward(&self, _: &TtrpcContext, _: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Empty::new())
    }
}

impl Heard {
    /// Listens there.
    pub fn listen(socket: &Path) -> Result<Self> {
        let count = Arc::<AtomicU64>::default();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let counter = Counter(count.clone());
        runtime.block_on(async {
            let mut server = Server::new()
                .bind(&format!("unix://{}", socket.display()))
                .context("listening for events")?
                .register_service(create_events(Arc::new(counter)));
            server.start().await.context("serving events")?;
            // Serves as long as the runtime lives.
            std::mem::forget(server);
            anyhow::Ok(())
        })?;
        Ok(Self {
            socket: socket.to_owned(),
            count,
            runtime: Some(runtime),
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Events that have come in so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Reads a FIFO so that its writer never waits, and throws away what comes. Ends when it is dropped.
pub(super) struct Drain {
    fifo: PathBuf,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drain {
    /// Makes the FIFO, and reads it from here on.
    pub fn start(fifo: PathBuf) -> Result<Self> {
        mkfifo(&fifo, Mode::S_IRWXU).with_context(|| format!("making {}", fifo.display()))?;
        let mut reader = both_ways(&fifo)?;
        let ended = Arc::<AtomicBool>::default();
        let over = ended.clone();
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while !over.load(Ordering::SeqCst) && reader.read(&mut bytes).is_ok() {}
        });
        Ok(Self {
            fifo,
            ended,
            thread: Some(thread),
        })
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let wake = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(&self.fifo);
        // A FIFO that is full has woken it already, and it may read no more of it.
        let woken = wake.and_then(|mut fifo| match fifo.write(b"\n") {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(fifo),
        });
        if let (Ok(_open), Some(thread)) = (woken, self.thread.take()) {
            // It ends at its next read.
            let _ = thread.join();
        }
    }
}

/// Opens a FIFO for both, so that neither the open nor a read depends on who else has it open.
pub(super) fn both_ways(fifo: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(fifo)
        .with_context(|| format!("opening {}", fifo.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_takes_more_than_a_pipe_holds_and_ends() {
        let folder = tempfile::tempdir().unwrap();
        let drain = Drain::start(folder.path().join("log")).unwrap();
        let mut writer = both_ways(&drain.fifo).unwrap();
        writer.write_all(&vec![b'x'; 1 << 20]).unwrap();
        drop(drain);
    }
}
