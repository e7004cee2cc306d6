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

    /// Applies new limits in the guest. What the VM has not got is refused.
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
        check(
            &size::Limits::of_resources(&resources),
            sandbox.vcpus(),
            sandbox.memory_mib(),
            self.config.size.guest_memory.mib(),
        )?;
        let guest =
            spec::resources_for_guest(&resources).map_err(|error| Error::Invalid(chain(&error)))?;
        for warning in &guest.warnings {
            tracing::warn!(container = id, "{warning}");
        }
        sandbox.update(id, guest.json).await.map_err(refused)?;
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

/// Refuses limits that a VM of this size cannot give, whose guest itself needs `guest_mib` of its memory.
fn check(limits: &size::Limits, vcpus: u8, memory_mib: u64, guest_mib: u64) -> Result<(), Error> {
    if let Some(wanted) = limits.cpus().filter(|wanted| *wanted > u64::from(vcpus)) {
        return Err(Error::Invalid(format!(
            "The CPU limit asks for {wanted} CPUs and the VM has {vcpus}: it cannot be resized yet"
        )));
    }
    let wanted = limits.memory_bytes().map(|bytes| bytes.div_ceil(1 << 20));
    if let Some(wanted) = wanted.filter(|wanted| wanted + guest_mib > memory_mib) {
        return Err(Error::Invalid(format!(
            "The memory limit is {wanted} MiB, the guest itself needs {guest_mib}, and the VM has {memory_mib}: it cannot be resized yet"
        )));
    }
    Ok(())
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
    fn limits_beyond_the_vm_are_refused_with_both_figures() {
        let limits = |quota, cpuset: Option<&str>, memory| size::Limits {
            quota,
            period: Some(100_000),
            cpuset: cpuset.map(str::to_owned),
            memory,
        };
        for fits in [
            limits(None, None, None),
            limits(Some(200_000), None, Some(384 << 20)),
            limits(Some(-1), Some("4-5"), Some(-1)),
            limits(None, None, Some(i64::MAX)),
        ] {
            check(&fits, 2, 512, 128).unwrap();
        }
        for (limits, words) in [
            (limits(Some(200_001), None, None), ["3 CPUs", "has 2"]),
            (limits(None, Some("0-2"), None), ["3 CPUs", "has 2"]),
            (
                limits(None, None, Some((384 << 20) + 1)),
                ["385 MiB", "has 512"],
            ),
        ] {
            let error = check(&limits, 2, 512, 128).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)));
            for word in words {
                assert!(error.to_string().contains(word), "{error}");
            }
        }
    }

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
