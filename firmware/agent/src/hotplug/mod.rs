//! CPUs and memory that the host plugs and unplugs. A call waits for the
//! kernel to show the thing, changes it, looks whether it is so, and answers.
//! One change is made at a time, as the kernel would have it anyway; waiting
//! for a thing to appear is not a change.

mod cpus;
mod kernel_files;
mod memory;
pub mod offliner;
pub mod policy;
pub mod pressure;
mod resources;
mod zones;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nacre_protocol::agent::{
    MemoryBlock, OfflineCpuRequest, OfflineCpuResponse, OfflineMemoryRequest,
    OfflineMemoryResponse, OnlineCpuRequest, OnlineCpuResponse, OnlineMemoryRequest,
    OnlineMemoryResponse, ResourcesResponse,
};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::Instant;

use crate::cgroup;
use crate::error::{Doing, Error};
use crate::init;
use crate::reaper::Reaper;
use crate::uevents::DeviceEvents;

use cpus::{Cpus, first_stays};
use kernel_files::{KernelFiles, blocking};
use memory::Memory;
use offliner::OwnProcess;
use zones::Zone;

/// The longest wait for something to appear.
const WAIT_LIMIT: Duration = Duration::from_secs(120);
/// How long memory may take to go offline: where the host does not say, and at most.
const OFFLINE_LIMITS: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));
/// How long a change may wait for the one before it.
const TURN_LIMIT: Duration = Duration::from_secs(30);

/// Changes the guest's CPUs and memory. Clones share the turn.
#[derive(Clone)]
pub struct Hotplug {
    files: KernelFiles,
    cpus: Cpus,
    page_bytes: u64,
    offline: OwnProcess,
    turn: Arc<Mutex<()>>,
}

impl Hotplug {
    /// Of this machine; `reaper` is told of the ends of the processes that take memory offline.
    pub fn new(reaper: Reaper) -> Hotplug {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        let files = KernelFiles::of_the_machine();
        Hotplug {
            cpus: Cpus::new(files.clone()),
            files,
            page_bytes: page
                .ok()
                .flatten()
                .map_or(4096, |bytes| bytes.unsigned_abs()),
            offline: OwnProcess::new(reaper),
            turn: Arc::default(),
        }
    }

    async fn turn(&self, what: &str) -> Result<OwnedMutexGuard<()>, Error> {
        let turn = tokio::time::timeout(TURN_LIMIT, self.turn.clone().lock_owned()).await;
        turn.map_err(|_| {
            Error::FailedPrecondition(format!(
                "{what}: another change of CPUs or memory goes on for {} s already",
                TURN_LIMIT.as_secs()
            ))
        })
    }

    /// Waits for a CPU, and brings it online; what runs in containers may run on it then. Online already is fine.
    ///
    /// # Errors
    /// `NotFound` if it does not appear in time; `FailedPrecondition` if the kernel has no CPU hotplug; `Internal` with
    /// the kernel's error.
    pub async fn online_cpu(&self, request: &OnlineCpuRequest) -> Result<OnlineCpuResponse, Error> {
        let begun = Instant::now();
        let mut changes = listen()?;
        let cpus = &self.cpus;
        let wait = wait(request.wait_ms);
        let cpu = cpus.appeared(request.uid, wait, &mut changes).await?;
        let noticed_us = micros(begun);
        drop(changes);
        let _turn = self.turn("bringing a CPU online").await?;
        let of_thread = cpus.clone();
        blocking(move || {
            of_thread.bring_online(cpu)?;
            cgroup::settle_cpus(Path::new(init::CGROUP_ROOT));
            Ok(())
        })
        .await?;
        Ok(OnlineCpuResponse {
            cpu: cpu.number,
            noticed_us,
            online_us: micros(begun),
            vcpus_online: count(cpus),
            ..Default::default()
        })
    }

    /// Takes a CPU offline; what ran on it runs elsewhere then. Offline already is fine.
    ///
    /// # Errors
    /// `NotFound` if there is none, since it was ejected or never came; `FailedPrecondition` for the first, or if the
    /// kernel cannot do without it now; `Internal` with the kernel's error.
    pub async fn offline_cpu(
        &self,
        request: &OfflineCpuRequest,
    ) -> Result<OfflineCpuResponse, Error> {
        let begun = Instant::now();
        if request.uid == 0 {
            return Err(first_stays(0));
        }
        let cpus = &self.cpus;
        let _turn = self.turn("taking a CPU offline").await?;
        let cpu = cpus.find(request.uid).ok_or_else(|| {
            Error::NotFound(format!("CPU _UID {}: there is no such CPU", request.uid))
        })?;
        let of_thread = cpus.clone();
        blocking(move || {
            of_thread.take_offline(cpu)?;
            cgroup::settle_cpus(Path::new(init::CGROUP_ROOT));
            Ok(())
        })
        .await?;
        Ok(OfflineCpuResponse {
            cpu: cpu.number,
            offline_us: micros(begun),
            vcpus_online: count(cpus),
            ..Default::default()
        })
    }

    /// Waits for the blocks of a range, and brings all online that are not. If one does not come, those that this call
    /// brought go again.
    ///
    /// # Errors
    /// `InvalidArgument` for a range that is no blocks; `NotFound` if one does not appear in time; `FailedPrecondition`
    /// if the kernel has no memory hotplug; `Internal`, naming the block and the kernel's error.
    pub async fn online_memory(
        &self,
        request: &OnlineMemoryRequest,
    ) -> Result<OnlineMemoryResponse, Error> {
        let begun = Instant::now();
        let mut changes = listen()?;
        let memory = Memory::new(self.files.clone(), self.page_bytes);
        let blocks = memory.blocks(request.base, request.bytes)?;
        let wait = wait(request.wait_ms);
        memory.appeared(&blocks, wait, &mut changes).await?;
        let noticed_us = micros(begun);
        drop(changes);
        let _turn = self.turn("bringing memory online").await?;
        let blocks = memory.bring_online(&blocks, &self.offline).await?;
        let online_us = micros(begun);
        Ok(OnlineMemoryResponse {
            blocks: blocks
                .into_iter()
                .map(|block| MemoryBlock {
                    number: block.number,
                    movable: block.zone == Zone::Movable,
                    ..Default::default()
                })
                .collect(),
            noticed_us,
            online_us,
            memory_total_bytes: self.files.meminfo("MemTotal"),
            ..Default::default()
        })
    }

    /// Takes all blocks of a range offline, as [`Memory::take_offline`] does.
    ///
    /// # Errors
    /// As there, and `InvalidArgument` for a range that is no blocks.
    pub async fn offline_memory(
        &self,
        request: &OfflineMemoryRequest,
    ) -> Result<OfflineMemoryResponse, Error> {
        let begun = Instant::now();
        let memory = Memory::new(self.files.clone(), self.page_bytes);
        let blocks = memory.blocks(request.base, request.bytes)?;
        let (usual, longest) = OFFLINE_LIMITS;
        let limit = match request.deadline_ms {
            0 => usual,
            ms => Duration::from_millis(ms.into()).min(longest),
        };
        let _turn = self.turn("taking memory offline").await?;
        memory.take_offline(&blocks, limit, &self.offline).await?;
        Ok(OfflineMemoryResponse {
            offline_us: micros(begun),
            memory_total_bytes: self.files.meminfo("MemTotal"),
            ..Default::default()
        })
    }

    /// What the guest has, and how busy it is; to be asked when the late modules are loaded.
    pub fn resources(&self) -> ResourcesResponse {
        let cgroups = Path::new(init::CGROUP_ROOT);
        resources::read(&self.files, self.page_bytes, cgroups)
    }
}

fn listen() -> Result<DeviceEvents, Error> {
    DeviceEvents::listen().doing(|| "listening for device events".into())
}

fn wait(ms: u32) -> Duration {
    Duration::from_millis(ms.into()).min(WAIT_LIMIT)
}

fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn count(cpus: &Cpus) -> u32 {
    u32::try_from(cpus.online().len()).unwrap_or(u32::MAX)
}
