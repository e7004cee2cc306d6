//! A guest of our own making: its kernel sees the slots through their
//! registers, its agent answers, and both do as the script of the case says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use nacre_protocol::agent::{
    MemoryBlock, OfflineCpuRequest, OfflineCpuResponse, OfflineMemoryRequest,
    OfflineMemoryResponse, OnlineCpuRequest, OnlineCpuResponse, OnlineMemoryRequest,
    OnlineMemoryResponse, ResourcesRequest, ResourcesResponse,
};
use nacre_protocol::agent_ttrpc::Agent as AgentService;
use nacre_vmm::ExitReason;
use nacre_vmm::bus::BusDevice;
use nacre_vmm::hotplug::registers::{
    CPUS, FETCH, KIND_CPU, MEMORY, OST_EVENT, OST_STATUS, SLOT_BYTES, STATUS,
};
use tokio::sync::watch;
use ttrpc::Code;
use ttrpc::asynchronous::TtrpcContext;

use super::super::Plugged;
use crate::sandbox::fake::{AREA, Fake};
use crate::sandbox::machine::Plug;

/// What the agent does with a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reply {
    Does,
    /// Does it after this time.
    After(Duration),
    Refuses(Code, &'static str),
    /// Never answers.
    Mute,
    /// The VM ends a second after the call came, which is not answered.
    Ends,
}

/// What the kernel does when it is asked to eject.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Eject {
    Does,
    After(Duration),
    /// Ejects it at once. Until it reports that, so much later, it misses what is plugged there.
    DoneAfter(Duration),
    /// Ejects it without a report.
    Silently,
    /// Reports this event and status.
    Says(u32, u32),
    Ignores,
    /// The VM ends a second later.
    Ends,
}

/// How a guest behaves.
pub(super) struct Script {
    /// Whether the kernel fetches what it is told of.
    pub notices: bool,
    /// The event and status that the kernel reports of what is plugged.
    pub reports: Option<(u32, u32)>,
    pub ejects: fn(Plugged) -> Eject,
    pub online: fn(Plugged) -> Reply,
    pub offline: fn(Plugged) -> Reply,
    pub resources: Reply,
    /// The last word on what the guest has.
    pub has: fn(&mut ResourcesResponse),
    /// The agent adds nonsense to its answers, so many blocks of memory included.
    pub absurd: Option<usize>,
}

impl Script {
    pub fn good() -> Self {
        Self {
            notices: true,
            reports: None,
            ejects: |_| Eject::Does,
            online: |_| Reply::Does,
            offline: |_| Reply::Does,
            resources: Reply::Does,
            has: |_| {},
            absurd: None,
        }
    }
}

/// The guest; clones are of the same.
#[derive(Clone)]
pub(super) struct Guest {
    fake: Arc<Fake>,
    script: Arc<Mutex<Script>>,
    /// What its kernel has been told of, and not ejected.
    seen: watch::Sender<BTreeSet<Plugged>>,
    /// What it has ejected, and is not done with.
    leaving: Arc<Mutex<BTreeSet<Plugged>>>,
    /// What is online.
    online: Arc<Mutex<BTreeSet<Plugged>>>,
    /// The agent's calls, in order.
    calls: Arc<Mutex<Vec<String>>>,
}

impl Guest {
    pub fn new(fake: &Arc<Fake>, script: Script) -> Self {
        let guest = Self {
            fake: fake.clone(),
            script: Arc::new(Mutex::new(script)),
            seen: watch::Sender::default(),
            leaving: Arc::default(),
            online: Arc::default(),
            calls: Arc::default(),
        };
        let kernel = guest.clone();
        tokio::spawn(async move {
            let mut changes = kernel.fake.plug_changes();
            loop {
                kernel.look();
                if changes.changed().await.is_err() {
                    return;
                }
            }
        });
        guest
    }

    /// From now on it behaves so.
    pub fn behave(&self, script: Script) {
        *self.script.lock().unwrap() = script;
        self.look();
    }

    pub fn online(&self) -> Vec<Plugged> {
        self.online.lock().unwrap().iter().copied().collect()
    }

    /// The agent's calls since this was last asked.
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn write(&self, of: Plugged, register: u64, value: u32) {
        let (base, index) = match of {
            Plugged::Vcpu(index) => (CPUS, index),
            Plugged::Unit(index) => (MEMORY, index),
        };
        let at = base + u64::from(index) * SLOT_BYTES + register;
        self.fake.plugs.registers().write(at, &value.to_le_bytes());
    }

    /// `_OST`.
    pub fn report(&self, of: Plugged, event: u32, status: u32) {
        self.write(of, OST_EVENT, event);
        self.write(of, OST_STATUS, status);
    }

    /// `_EJ0`, and `_OST` as Linux does it then.
    pub fn eject(&self, of: Plugged) {
        self.ejects(of);
        self.report(of, 3, 0);
    }

    /// `_EJ0`.
    fn ejects(&self, of: Plugged) {
        self.seen.send_if_modified(|seen| seen.remove(&of));
        self.online.lock().unwrap().remove(&of);
        self.write(of, STATUS, 1);
    }

    /// Something in the guest fetches what its kernel is told of, before the kernel does.
    pub fn steal(&self) -> u32 {
        let mut word = [0; 4];
        self.fake.plugs.registers().read(FETCH, &mut word);
        u32::from_le_bytes(word)
    }

    /// The guest takes it offline by itself.
    pub fn loses(&self, of: Plugged) {
        self.online.lock().unwrap().remove(&of);
    }

    /// What an interrupt has the kernel do.
    fn look(&self) {
        loop {
            let script = self.script.lock().unwrap();
            if !script.notices {
                return;
            }
            let (reports, ejects) = (script.reports, script.ejects);
            drop(script);
            let mut word = [0; 4];
            self.fake.plugs.registers().read(FETCH, &mut word);
            let word = u32::from_le_bytes(word);
            if word == 0 {
                return;
            }
            let index = u8::try_from(word >> 8 & 0xff).unwrap();
            let of = match word >> 24 {
                KIND_CPU => Plugged::Vcpu(index),
                _ => Plugged::Unit(index),
            };
            if word & 0xff == 1 {
                if self.leaving.lock().unwrap().contains(&of) {
                    continue;
                }
                self.seen.send_if_modified(|seen| seen.insert(of));
                if let Some((event, status)) = reports {
                    self.report(of, event, status);
                }
                continue;
            }
            let guest = self.clone();
            match ejects(of) {
                Eject::Does => guest.eject(of),
                Eject::Silently => guest.ejects(of),
                Eject::DoneAfter(time) => {
                    guest.leaving.lock().unwrap().insert(of);
                    guest.ejects(of);
                    tokio::spawn(async move {
                        tokio::time::sleep(time).await;
                        guest.leaving.lock().unwrap().remove(&of);
                        guest.report(of, 3, 0);
                    });
                }
                Eject::Says(event, status) => guest.report(of, event, status),
                Eject::Ignores => {}
                Eject::After(time) => drop(tokio::spawn(async move {
                    tokio::time::sleep(time).await;
                    guest.eject(of);
                })),
                Eject::Ends => drop(tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    guest.fake.end(ExitReason::Panic);
                })),
            }
        }
    }

    async fn reply(&self, call: String, reply: Reply) -> ttrpc::Result<()> {
        self.calls.lock().unwrap().push(call);
        match reply {
            Reply::Does => Ok(()),
            Reply::After(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
            Reply::Refuses(code, words) => Err(status(code, words)),
            Reply::Mute => std::future::pending().await,
            Reply::Ends => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                self.fake.end(ExitReason::Panic);
                std::future::pending().await
            }
        }
    }

    async fn bring_online(&self, of: Plugged, wait_ms: u32) -> ttrpc::Result<()> {
        let wait = Duration::from_millis(wait_ms.into());
        let mut seen = self.seen.subscribe();
        let came = seen.wait_for(|seen| seen.contains(&of));
        let came = tokio::time::timeout(wait, came).await.is_ok();
        let reply = (self.script.lock().unwrap().online)(of);
        if !came && matches!(reply, Reply::Does) {
            return Err(status(Code::NOT_FOUND, "the kernel showed no such thing"));
        }
        self.reply(format!("online {of:?}"), reply).await?;
        self.online.lock().unwrap().insert(of);
        Ok(())
    }

    /// All or none. The first that is not just done says how it goes.
    async fn take_offline(&self, all: Vec<Plugged>) -> ttrpc::Result<()> {
        let offline = self.script.lock().unwrap().offline;
        let mut replies = all.iter().map(|of| offline(*of));
        let reply = replies.find(|reply| !matches!(reply, Reply::Does));
        let names: Vec<_> = all.iter().map(|of| format!("{of:?}")).collect();
        let call = format!("offline {}", names.join(", "));
        self.reply(call, reply.unwrap_or(Reply::Does)).await?;
        let mut known = false;
        for of in all {
            self.online.lock().unwrap().remove(&of);
            known |= self.seen.borrow().contains(&of);
        }
        if known {
            Ok(())
        } else {
            Err(status(Code::NOT_FOUND, "there is no such thing"))
        }
    }

    fn absurd(&self) -> Option<usize> {
        self.script.lock().unwrap().absurd
    }
}

fn status(code: Code, words: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, words.to_owned()))
}

fn cpu(uid: u32) -> Plugged {
    Plugged::Vcpu(u8::try_from(uid).unwrap())
}

fn unit(base: u64, bytes: u64) -> Plugged {
    assert_eq!(bytes, AREA.unit);
    assert!((base - AREA.base).is_multiple_of(AREA.unit));
    Plugged::Unit(u8::try_from((base - AREA.base) / AREA.unit).unwrap())
}

#[async_trait]
impl AgentService for Guest {
    async fn online_cpu(
        &self,
        _context: &TtrpcContext,
        request: OnlineCpuRequest,
    ) -> ttrpc::Result<OnlineCpuResponse> {
        self.bring_online(cpu(request.uid), request.wait_ms).await?;
        let mut answer = OnlineCpuResponse::new();
        if self.absurd().is_some() {
            (answer.cpu, answer.vcpus_online) = (u32::MAX, u32::MAX);
            (answer.noticed_us, answer.online_us) = (u64::MAX, u64::MAX);
        }
        Ok(answer)
    }

    async fn offline_cpu(
        &self,
        _context: &TtrpcContext,
        request: OfflineCpuRequest,
    ) -> ttrpc::Result<OfflineCpuResponse> {
        self.take_offline(vec![cpu(request.uid)]).await?;
        let mut answer = OfflineCpuResponse::new();
        if self.absurd().is_some() {
            (answer.cpu, answer.vcpus_online) = (u32::MAX, 255);
            answer.offline_us = u64::MAX;
        }
        Ok(answer)
    }

    async fn online_memory(
        &self,
        _context: &TtrpcContext,
        request: OnlineMemoryRequest,
    ) -> ttrpc::Result<OnlineMemoryResponse> {
        let of = unit(request.base, request.bytes);
        self.bring_online(of, request.wait_ms).await?;
        let mut answer = OnlineMemoryResponse::new();
        if let Some(blocks) = self.absurd() {
            (answer.noticed_us, answer.online_us) = (u64::MAX, u64::MAX);
            answer.memory_total_bytes = u64::MAX;
            let mut block = MemoryBlock::new();
            block.number = u64::MAX;
            answer.blocks = vec![block; blocks];
        }
        Ok(answer)
    }

    async fn offline_memory(
        &self,
        _context: &TtrpcContext,
        request: OfflineMemoryRequest,
    ) -> ttrpc::Result<OfflineMemoryResponse> {
        assert!(request.deadline_ms > 0);
        let each = (0..request.bytes).step_by(AREA.unit as usize);
        let units = each.map(|at| unit(request.base + at, AREA.unit));
        self.take_offline(units.collect()).await?;
        let mut answer = OfflineMemoryResponse::new();
        if self.absurd().is_some() {
            (answer.offline_us, answer.memory_total_bytes) = (u64::MAX, u64::MAX);
        }
        Ok(answer)
    }

    async fn resources(
        &self,
        _context: &TtrpcContext,
        _request: ResourcesRequest,
    ) -> ttrpc::Result<ResourcesResponse> {
        let (reply, has) = {
            let script = self.script.lock().unwrap();
            (script.resources, script.has)
        };
        self.reply("resources".to_owned(), reply).await?;
        let mut answer = ResourcesResponse::new();
        answer.memory_total_bytes = (256 << 20) + self.fake.mem.borrow().plugged;
        answer.memory_available_bytes = 2 << 30;
        answer.memory_block_bytes = 128 << 20;
        let online = self.online().into_iter().filter_map(|of| match of {
            Plugged::Vcpu(index) => Some(u32::from(index)),
            Plugged::Unit(_) => None,
        });
        answer.online_uids = std::iter::once(0).chain(online).collect();
        has(&mut answer);
        Ok(answer)
    }
}
