//! Calls about a container as a whole while it runs: Pause, Resume, Update, Stats.

use std::sync::Arc;

use containerd_shim_protos::api::UpdateTaskRequest;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use oci_spec::runtime::LinuxResources;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::Code;

use super::{Error, Shim, exec, no_container};
use crate::sandbox::{self, StatsResponse, chain, size, spec};
use crate::shim::events::TaskEvent;
use crate::shim::lifecycle::{self, ContainerEvent};

/// Devices that are told of at most.
const DEVICES: usize = 128;

impl Shim {
    /// Freezes a container that runs.
    pub(super) async fn pause(self: Arc<Self>, id: &str) -> Result<(), Error> {
        exec::running(&mut self.lock(), id, "pause")?;
        let sandbox = self.sandbox().await?;
        sandbox.pause(id).await.map_err(refused)?;
        let mut state = self.lock();
        let container = state
            .containers
            .get_mut(id)
            .ok_or_else(|| no_container(id))?;
        container.life = container.life.after(ContainerEvent::Pause)?;
        let mut event = TaskPaused::new();
        event.container_id = id.to_owned();
        self.publisher.publish(&TaskEvent::Paused(event));
        drop(state);
        tracing::info!(container = id, "paused");
        Ok(())
    }

    /// Thaws a container that is frozen.
    pub(super) async fn resume(self: Arc<Self>, id: &str) -> Result<(), Error> {
        {
            let state = self.lock();
            let container = state.containers.get(id).ok_or_else(|| no_container(id))?;
            if container.life != lifecycle::Container::Paused {
                return Err(Error::Precondition(format!(
                    "Cannot resume: container {id:?} is {}",
                    container.life
                )));
            }
        }
        let sandbox = self.sandbox().await?;
        sandbox.resume(id).await.map_err(refused)?;
        let mut state = self.lock();
        let container = state
            .containers
            .get_mut(id)
            .ok_or_else(|| no_container(id))?;
        container.life = container.life.after(ContainerEvent::Resume)?;
        let mut event = TaskResumed::new();
        event.container_id = id.to_owned();
        self.publisher.publish(&TaskEvent::Resumed(event));
        drop(state);
        tracing::info!(container = id, "resumed");
        Ok(())
    }

    /// Applies new limits in the guest, and brings the VM to the size that they come to. What the VM can never have is refused.
    pub(super) async fn update(self: Arc<Self>, request: UpdateTaskRequest) -> Result<(), Error> {
        let id = request.id.as_str();
        {
            let mut state = self.lock();
            state.made(id, "")?;
        }
        let resources: LinuxResources =
            serde_json::from_slice(&request.resources.value).map_err(|error| {
                Error::Invalid(format!(
                    "Cannot read the resources for container {id:?}, of type {:?}: {error}",
                    request.resources.type_url
                ))
            })?;
        let sandbox = self.sandbox().await?;
        let mut limits = {
            let state = self.lock();
            let container = state.containers.get(id);
            container.and_then(|container| container.limits.clone())
        }
        .unwrap_or_default();
        limits.update(size::Limits::of_resources(&resources));
        let sum = self.sum(Some((id, &limits)));
        self.check_most(&sandbox, sum)?;
        let guest =
            spec::resources_for_guest(&resources).map_err(|error| Error::Invalid(chain(&error)))?;
        for warning in &guest.warnings {
            tracing::warn!(container = id, "{warning}");
        }
        // A VM that is to grow has grown before a container may use it.
        let grows = sum.vcpus.is_none_or(|vcpus| vcpus > sandbox.vcpus().into())
            || sum.memory_mib.is_none_or(|mib| mib > sandbox.memory_mib());
        if grows {
            let fit = self.fit(&sandbox, sum).await;
            fit.map_err(|cause| Error::Failed(format!("Cannot update container {id:?}: {cause}")))?;
        }
        let updated = sandbox.update(id, guest.json).await.map_err(refused);
        if let Err(error) = updated {
            // Back to what the limits are.
            self.fit_later();
            return Err(error);
        }
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.limits = Some(limits);
        }
        let share = {
            let state = self.lock();
            let container = state.containers.get(id);
            container.and_then(|container| container.share.clone())
        };
        if let Some(share) = share {
            share
                .update(&resources)
                .map_err(|error| Error::Failed(chain(&error)))?;
        }
        // One that is to shrink does so when its containers use no more than that. The limits are in force whether it
        // does or not.
        if let Err(cause) = self.fit(&sandbox, sum).await {
            tracing::warn!(
                container = id,
                cause,
                "the VM stays larger than its containers need"
            );
        }
        tracing::info!(container = id, "updated");
        Ok(())
    }

    /// What a container uses, as `io.containerd.cgroups.v2.Metrics`.
    pub(super) async fn stats(self: Arc<Self>, id: &str) -> Result<Any, Error> {
        {
            let mut state = self.lock();
            let init = state.made(id, "")?;
            if init.life == lifecycle::Process::Stopped {
                return Err(Error::NotFound(format!("Container {id:?} has ended")));
            }
        }
        let sandbox = self.sandbox().await?;
        let stats = sandbox.stats(id).await.map_err(refused)?;
        let mut any = Any::new();
        any.type_url = "io.containerd.cgroups.v2.Metrics".to_owned();
        // Writing to a Vec fails only for messages over 2 GiB.
        any.value = metrics(&stats).write_to_bytes().unwrap_or_default();
        Ok(any)
    }
}

/// The agent's error with the code that containerd should see.
fn refused(error: sandbox::Error) -> Error {
    match error.code() {
        Some(Code::NOT_FOUND) => Error::NotFound(error.to_string()),
        Some(Code::FAILED_PRECONDITION) => Error::Precondition(error.to_string()),
        Some(Code::INVALID_ARGUMENT) => Error::Invalid(error.to_string()),
        _ => Error::Failed(error.to_string()),
    }
}

fn metrics(stats: &StatsResponse) -> Metrics {
    let cpu = |name: &str| stats.cpu.get(name).copied().unwrap_or_default();
    let memory = |name: &str| stats.memory.get(name).copied().unwrap_or_default();
    let event = |name: &str| stats.memory_events.get(name).copied().unwrap_or_default();
    let mut metrics = Metrics::new();
    metrics.pids = MessageField::some(PidsStat {
        current: stats.pids_current,
        // containerd's own cgroup library says 0 for no limit.
        limit: if stats.pids_max == u64::MAX {
            0
        } else {
            stats.pids_max
        },
        ..PidsStat::default()
    });
    metrics.cpu = MessageField::some(CPUStat {
        usage_usec: cpu("usage_usec"),
        user_usec: cpu("user_usec"),
        system_usec: cpu("system_usec"),
        nr_periods: cpu("nr_periods"),
        nr_throttled: cpu("nr_throttled"),
        throttled_usec: cpu("throttled_usec"),
        nr_bursts: cpu("nr_bursts"),
        burst_usec: cpu("burst_usec"),
        ..CPUStat::default()
    });
    metrics.memory = MessageField::some(MemoryStat {
        anon: memory("anon"),
        file: memory("file"),
        kernel_stack: memory("kernel_stack"),
        slab: memory("slab"),
        sock: memory("sock"),
        shmem: memory("shmem"),
        file_mapped: memory("file_mapped"),
        file_dirty: memory("file_dirty"),
        file_writeback: memory("file_writeback"),
        anon_thp: memory("anon_thp"),
        inactive_anon: memory("inactive_anon"),
        active_anon: memory("active_anon"),
        inactive_file: memory("inactive_file"),
        active_file: memory("active_file"),
        unevictable: memory("unevictable"),
        slab_reclaimable: memory("slab_reclaimable"),
        slab_unreclaimable: memory("slab_unreclaimable"),
        pgfault: memory("pgfault"),
        pgmajfault: memory("pgmajfault"),
        workingset_refault: memory("workingset_refault_anon")
            .wrapping_add(memory("workingset_refault_file")),
        workingset_activate: memory("workingset_activate_anon")
            .wrapping_add(memory("workingset_activate_file")),
        workingset_nodereclaim: memory("workingset_nodereclaim"),
        pgrefill: memory("pgrefill"),
        pgscan: memory("pgscan"),
        pgsteal: memory("pgsteal"),
        pgactivate: memory("pgactivate"),
        pgdeactivate: memory("pgdeactivate"),
        pglazyfree: memory("pglazyfree"),
        pglazyfreed: memory("pglazyfreed"),
        thp_fault_alloc: memory("thp_fault_alloc"),
        thp_collapse_alloc: memory("thp_collapse_alloc"),
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        swap_usage: stats.swap_current,
        swap_limit: stats.swap_max,
        ..MemoryStat::default()
    });
    metrics.memory_events = MessageField::some(MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        oom_group_kill: event("oom_group_kill"),
        ..MemoryEvents::default()
    });
    let mut io = IOStat::new();
    io.usage = stats
        .io
        .iter()
        .take(DEVICES)
        .map(|device| IOEntry {
            major: device.major,
            minor: device.minor,
            rbytes: device.rbytes,
            wbytes: device.wbytes,
            rios: device.rios,
            wios: device.wios,
            ..IOEntry::default()
        })
        .collect();
    metrics.io = MessageField::some(io);
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_have_their_names_in_containerds_message() {
        let mut stats = StatsResponse::new();
        stats.cpu.insert("usage_usec".into(), 7);
        stats.memory.insert("anon".into(), 8);
        stats.memory_events.insert("oom_kill".into(), 9);
        (stats.memory_current, stats.memory_max) = (10, 11);
        (stats.pids_current, stats.pids_max) = (12, u64::MAX);
        stats.io.resize(500, Default::default());
        stats.io[0].rbytes = 13;
        let metrics = metrics(&stats);
        assert_eq!(metrics.cpu.usage_usec, 7);
        assert_eq!(
            (metrics.memory.anon, metrics.memory_events.oom_kill),
            (8, 9)
        );
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (10, 11));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (12, 0));
        assert_eq!(
            (metrics.io.usage[0].rbytes, metrics.io.usage.len()),
            (13, DEVICES)
        );
    }
}
