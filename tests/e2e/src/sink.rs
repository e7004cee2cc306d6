//! What takes a shim's events where no containerd does: the service `Events` on
//! a socket, as containerd serves it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{self, Server, TtrpcContext};
use containerd_shim_protos::{Events, create_events};

/// What was told, in order: `create ID`, `exit ID STATUS`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    /// All so far.
    pub fn all(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// How many began with this.
    pub fn count(&self, beginning: &str) -> usize {
        let all = self.all();
        all.iter()
            .filter(|told| told.starts_with(beginning))
            .count()
    }
}

impl Events for Told {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        let topic = envelope.topic.trim_start_matches("/tasks/");
        let told = match TaskExit::parse_from_bytes(&envelope.event.value) {
            Ok(exit) if topic == "exit" => format!("exit {} {}", exit.id, exit.exit_status),
            _ => topic.to_owned(),
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(told);
        Ok(Empty::new())
    }
}

/// Serves until it is dropped.
pub(crate) struct Sink {
    server: Server,
    pub told: Told,
    /// The socket's path, for `TTRPC_ADDRESS`.
    pub address: String,
}

impl Sink {
    pub fn serve(socket: &Path) -> Result<Self> {
        let told = Told::default();
        let _ = std::fs::remove_file(socket);
        let address = socket.display().to_string();
        let service: Arc<dyn Events + Send + Sync> = Arc::new(told.clone());
        let mut server = Server::new()
            .bind(&format!("unix://{address}"))
            .with_context(|| format!("listening on {address}"))?
            .register_service(create_events(service));
        server.start().context("serving events")?;
        Ok(Sink {
            server,
            told,
            address,
        })
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        std::mem::take(&mut self.server).shutdown();
    }
}
