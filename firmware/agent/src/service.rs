//! The host's calls, as ttrpc brings them, turned into deeds of the modules
//! below. Each runs in a task of its own, so that a caller that gives up
//! leaves nothing half done.

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use nacre_protocol::agent::{
    BindDiskRequest, BindDiskResponse, ClockRequest, ClockResponse, ConfigureNetworkRequest,
    CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest, DeleteExecRequest,
    Empty, ExecRequest, OfflineCpuRequest, OfflineCpuResponse, OfflineMemoryRequest,
    OfflineMemoryResponse, OnlineCpuRequest, OnlineCpuResponse, OnlineMemoryRequest,
    OnlineMemoryResponse, PauseRequest, PidsRequest, PidsResponse, Process, ReleaseNetworkRequest,
    ResizePtyRequest, ResourcesRequest, ResourcesResponse, ResumeRequest, ShutdownRequest,
    SignalRequest, StartRequest, StartResponse, StatsRequest, StatsResponse, UnbindDiskRequest,
    UpdateRequest, WatchMemoryRequest,
};
use nacre_protocol::agent_ttrpc::Agent;
use tokio::sync::watch;
use tracing::{debug, info, warn};
use ttrpc::asynchronous::TtrpcContext;

use crate::container::{Containers, blocking};
use crate::devices::{self, Tree};
use crate::error::Error;
use crate::hotplug::Hotplug;
use crate::hotplug::pressure::MemoryWatch;
use crate::init;
use crate::modules::{self, Group};
use crate::net;
use crate::shares;

/// The longest grace that a shutdown gives to processes.
const GRACE_LIMIT: Duration = Duration::from_secs(60);

/// What serves the host's calls.
#[derive(Clone)]
pub struct Service {
    containers: Containers,
    hotplug: Hotplug,
    memory_watch: MemoryWatch,
    modules: watch::Receiver<Group>,
    down: watch::Sender<bool>,
}

impl Service {
    /// `modules` is the last group of modules that is loaded; `down` is set true when everything is
    /// unmounted and the machine may be switched off.
    pub fn new(
        containers: Containers,
        hotplug: Hotplug,
        memory_watch: MemoryWatch,
        modules: watch::Receiver<Group>,
        down: watch::Sender<bool>,
    ) -> Service {
        Service {
            containers,
            hotplug,
            memory_watch,
            modules,
            down,
        }
    }

    /// Waits for the modules of a group, and of those before it.
    async fn modules_loaded(&self, group: Group) {
        if group == Group::Late {
            modules::hurry();
        }
        let mut modules = self.modules.clone();
        // An error means that the loader is gone: then there is nothing to wait for.
        let _ = modules.wait_for(|loaded| *loaded >= group).await;
    }
}

/// Runs a call to its end, even if the caller gives up, and logs how it went.
async fn run<T: Send + 'static>(
    call: &'static str,
    of: String,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    let answer = tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(Error::Internal(format!("{call} {of}: {error}"))));
    match &answer {
        Ok(_) => debug!("{call} {of}"),
        Err(error) => info!("{call} {of}: {:?}: {error}", error.code()),
    }
    answer.map_err(ttrpc::Error::from)
}

/// An id or the like for the log, as far as it is sane.
fn shown(id: &str) -> String {
    id.escape_debug().take(80).collect()
}

#[async_trait]
impl Agent for Service {
    async fn bind_disk(
        &self,
        _: &TtrpcContext,
        request: BindDiskRequest,
    ) -> ttrpc::Result<BindDiskResponse> {
        let this = self.clone();
        let device = run("BindDisk", request.window.to_string(), async move {
            this.modules_loaded(Group::Late).await;
            devices::bind_disk(request.window, request.partitions).await
        })
        .await?;
        Ok(BindDiskResponse {
            device: device.to_string_lossy().into_owned(),
            ..Default::default()
        })
    }

    async fn unbind_disk(
        &self,
        _: &TtrpcContext,
        request: UnbindDiskRequest,
    ) -> ttrpc::Result<Empty> {
        run("UnbindDisk", request.window.to_string(), async move {
            blocking(move || devices::unbind(&Tree::of_guest(), request.window)).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = format!("{:?}", request.windows);
        run("ConfigureNetwork", of, async move {
            this.modules_loaded(Group::Late).await;
            let id = &request.container_id;
            let init = this.containers.find(id)?.process("")?;
            let pid = init
                .pid()
                .filter(|_| init.state().lives())
                .ok_or_else(|| Error::FailedPrecondition(format!("container {id} has ended")))?;
            net::configure(pid, request.windows, request.network_json).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn release_network(
        &self,
        _: &TtrpcContext,
        request: ReleaseNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let of = format!("{:?}", request.windows);
        run("ReleaseNetwork", of, net::release(request.windows)).await?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let this = self.clone();
        let of = shown(&request.container_id);
        let pid = run("CreateContainer", of, async move {
            this.modules_loaded(Group::Mount).await;
            this.containers.create(request).await
        })
        .await?;
        Ok(CreateContainerResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let this = self.clone();
        let of = shown(&request.container_id);
        let pid = run("Start", of, async move {
            let (id, exec_id) = (&request.container_id, &request.exec_id);
            this.containers.start(id, exec_id).await
        })
        .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let (id, exec_id) = (shown(&request.container_id), shown(&request.exec_id));
        let of = format!("{exec_id} of {id}");
        run(
            "Exec",
            of,
            async move { this.containers.exec(request).await },
        )
        .await?;
        Ok(Empty::new())
    }

    async fn delete_exec(
        &self,
        _: &TtrpcContext,
        request: DeleteExecRequest,
    ) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let (id, exec_id) = (shown(&request.container_id), shown(&request.exec_id));
        let of = format!("{exec_id} of {id}");
        run("DeleteExec", of, async move {
            let (id, exec_id) = (&request.container_id, &request.exec_id);
            this.containers.delete_exec(id, exec_id)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = shown(&request.container_id);
        run("Pause", of, async move {
            this.containers.pause(&request.container_id).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = shown(&request.container_id);
        run("Resume", of, async move {
            this.containers.resume(&request.container_id).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = shown(&request.container_id);
        run("Update", of, async move {
            let (id, resources) = (request.container_id, request.resources_json);
            this.containers.update(&id, resources).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let this = self.clone();
        let of = shown(&request.container_id);
        run("Stats", of, async move {
            this.containers.stats(&request.container_id)
        })
        .await
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = format!("{} to {}", request.signal, shown(&request.container_id));
        run("Signal", of, async move {
            let (id, exec_id) = (&request.container_id, &request.exec_id);
            this.containers
                .signal(id, exec_id, request.signal, request.all)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let this = self.clone();
        let of = shown(&request.container_id);
        let pids = run("Pids", of, async move {
            this.containers.pids(&request.container_id)
        })
        .await?;
        let processes = pids
            .into_iter()
            .map(|(pid, exec_id)| Process {
                pid,
                exec_id,
                ..Default::default()
            })
            .collect();
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = shown(&request.container_id);
        run("ResizePty", of, async move {
            let (id, exec_id) = (&request.container_id, &request.exec_id);
            this.containers
                .resize(id, exec_id, request.columns, request.rows)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = shown(&request.container_id);
        run("DeleteContainer", of, async move {
            this.containers.delete(&request.container_id).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn online_cpu(
        &self,
        _: &TtrpcContext,
        request: OnlineCpuRequest,
    ) -> ttrpc::Result<OnlineCpuResponse> {
        let this = self.clone();
        let of = format!("_UID {}", request.uid);
        run("OnlineCpu", of, async move {
            this.hotplug.online_cpu(&request).await
        })
        .await
    }

    async fn offline_cpu(
        &self,
        _: &TtrpcContext,
        request: OfflineCpuRequest,
    ) -> ttrpc::Result<OfflineCpuResponse> {
        let this = self.clone();
        let of = format!("_UID {}", request.uid);
        run("OfflineCpu", of, async move {
            this.hotplug.offline_cpu(&request).await
        })
        .await
    }

    async fn online_memory(
        &self,
        _: &TtrpcContext,
        request: OnlineMemoryRequest,
    ) -> ttrpc::Result<OnlineMemoryResponse> {
        let this = self.clone();
        let of = format!("{:#x} at {:#x}", request.bytes, request.base);
        run("OnlineMemory", of, async move {
            this.hotplug.online_memory(&request).await
        })
        .await
    }

    async fn offline_memory(
        &self,
        _: &TtrpcContext,
        request: OfflineMemoryRequest,
    ) -> ttrpc::Result<OfflineMemoryResponse> {
        let this = self.clone();
        let of = format!("{:#x} at {:#x}", request.bytes, request.base);
        run("OfflineMemory", of, async move {
            this.hotplug.offline_memory(&request).await
        })
        .await
    }

    async fn resources(
        &self,
        _: &TtrpcContext,
        _: ResourcesRequest,
    ) -> ttrpc::Result<ResourcesResponse> {
        let this = self.clone();
        run("Resources", "the guest".into(), async move {
            this.modules_loaded(Group::Late).await;
            Ok(this.hotplug.resources())
        })
        .await
    }

    async fn watch_memory(
        &self,
        _: &TtrpcContext,
        request: WatchMemoryRequest,
    ) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let of = format!("from {} bytes on", request.high_bytes);
        run("WatchMemory", of, async move {
            this.memory_watch.set(request.high_bytes).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn clock(&self, _: &TtrpcContext, request: ClockRequest) -> ttrpc::Result<ClockResponse> {
        // Short enough to be done here: what waits would be counted as the clock's.
        let by = request.adjust_ns;
        init::adjust_clock(by, request.at_once).map_err(|error| {
            let error = Error::Internal(format!("moving the clock by {by} ns: {error}"));
            ttrpc::Error::from(error)
        })?;
        Ok(ClockResponse {
            realtime_ns: init::realtime_ns(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let this = self.clone();
        let grace = Duration::from_millis(request.grace_ms.into()).min(GRACE_LIMIT);
        run(
            "Shutdown",
            format!("in {} ms", grace.as_millis()),
            async move {
                this.containers.close(grace).await;
                nix::unistd::sync();
                // After it all that was written is with the host.
                if let Err(error) = blocking(shares::unmount).await {
                    warn!("{error}");
                }
                this.down.send_replace(true);
                Ok(())
            },
        )
        .await?;
        Ok(Empty::new())
    }
}
