//! The ttrpc face: `containerd.task.v3.Task` and, with the same messages,
//! `containerd.task.v2.Task`. Calls that change something run in tasks of their
//! own, so that a client that goes away does not leave them half done.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::Service;

use super::{Error, Shim};
use crate::shim::events::timestamp;

/// Names under which the one service is served.
const SERVICES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];
/// Services that a shim may have and this one has not: each of their calls is answered with UNIMPLEMENTED, which clients take for
/// just that. Of a service that is not even named ttrpc says INVALID_ARGUMENT.
const ABSENT: [&str; 3] = [
    "containerd.runtime.sandbox.v1.Sandbox",
    "containerd.services.streaming.v1.Streaming",
    "containerd.services.transfer.v1.Transfer",
];

/// The services of a shim, by name.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let absent = ABSENT.iter().map(|name| {
        let service = Service {
            methods: HashMap::new(),
            streams: HashMap::new(),
        };
        ((*name).to_owned(), service)
    });
    let mut services: HashMap<String, Service> = absent.collect();
    for name in SERVICES {
        let tasks: Arc<dyn Task + Send + Sync> = Arc::new(Tasks(shim.clone()));
        // The generated map has the one service, under the name that it was generated from.
        services.extend(
            create_task(tasks)
                .into_values()
                .map(|service| (name.to_owned(), service)),
        );
    }
    services
}

/// How long the answer to Shutdown may wait for output on its way: what is left of five seconds on a busy machine. The
/// output itself may take longer.
const SHUTDOWN_ANSWERS: Duration = Duration::from_millis(4300);

struct Tasks(Arc<Shim>);

impl Tasks {
    async fn detached<T: Send + 'static, F>(
        &self,
        work: impl FnOnce(Arc<Shim>) -> F,
    ) -> ttrpc::Result<T>
    where
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        self.0.touch();
        match tokio::spawn(work(self.0.clone())).await {
            Ok(answer) => Ok(answer?),
            Err(error) => Err(Error::Failed(format!("The call broke off: {error}")).into()),
        }
    }
}

#[async_trait]
impl Task for Tasks {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let pid = self.detached(|shim| shim.create(request)).await?;
        let mut response = api::CreateTaskResponse::new();
        response.pid = pid;
        Ok(response)
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let pid = self
            .detached(|shim| async move { shim.start(&request.id, &request.exec_id).await })
            .await?;
        let mut response = api::StartResponse::new();
        response.pid = pid;
        Ok(response)
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        self.detached(|shim| async move { shim.delete(&request.id, &request.exec_id).await })
            .await
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        self.detached(|shim| async move {
            shim.kill(&request.id, &request.exec_id, request.signal, request.all)
                .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        self.0.touch();
        let exit = self.0.wait(&request.id, &request.exec_id).await?;
        let mut response = api::WaitResponse::new();
        response.exit_status = exit.status;
        response.exited_at = timestamp(exit.at);
        Ok(response)
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        self.0.touch();
        Ok(self.0.state(&request.id, &request.exec_id)?)
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let mut response = api::PidsResponse::new();
        response.processes = self
            .detached(|shim| async move { shim.pids(&request.id).await })
            .await?;
        Ok(response)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        _: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        self.0.touch();
        let mut response = api::ConnectResponse::new();
        response.shim_pid = std::process::id();
        response.task_pid = self.0.identity.pid;
        response.version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(response)
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        request: api::CloseIORequest,
    ) -> ttrpc::Result<Empty> {
        self.0.touch();
        if request.stdin {
            self.0.close_stdin(&request.id, &request.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.detached(|shim| async move {
            shim.resize_pty(&request.id, &request.exec_id, request.width, request.height)
                .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.touch();
        // containerd says it after each container's Delete; the rest of a pod goes on.
        if request.now || !self.0.serves_others(&request.id) {
            tracing::info!("told to shut down");
            self.0.shut_down();
            // Who waits for the answer finds all output at its readers.
            let _ = tokio::time::timeout(SHUTDOWN_ANSWERS, self.0.drained()).await;
        }
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.detached(|shim| async move { shim.pause(&request.id).await })
            .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        self.detached(|shim| async move { shim.resume(&request.id).await })
            .await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.touch();
        Err(Error::Unimplemented("Checkpoint").into())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.detached(|shim| shim.exec(request)).await?;
        Ok(Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.detached(|shim| shim.update(request)).await?;
        Ok(Empty::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let mut response = api::StatsResponse::new();
        let stats = self
            .detached(|shim| async move { shim.stats(&request.id).await })
            .await?;
        response.stats = MessageField::some(stats);
        Ok(response)
    }
}

impl Shim {
    /// Whether there are containers besides `id`. Without an id the whole shim is meant.
    pub(super) fn serves_others(&self, id: &str) -> bool {
        !id.is_empty() && self.lock().containers.keys().any(|other| other != id)
    }
}
