//! A machine in memory whose guest is the caller: for the tests and the fuzz
//! targets of all that stands on a sandbox.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use nacre_protocol::agent::ReadyRequest;
use nacre_protocol::agent_ttrpc::{Agent as AgentService, HostClient, create_agent};
use nacre_protocol::{PORT_CALLS, PORT_EVENTS, PORT_LOG, PROTOCOL_VERSION};
use nacre_vmm::hotplug::ged::EventLine;
use nacre_vmm::hotplug::memory::{Area, Regions, UnitView};
use nacre_vmm::hotplug::{Changes, Plugs, SlotView};
use nacre_vmm::memory::slots::{SlotAllocator, SlotId};
use nacre_vmm::virtio::mem::{BLOCK_BYTES, MemStatus};
use nacre_vmm::virtio::net::{NetConfig, Tap};
use nacre_vmm::{DiskConfig, ExitReason};
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server};

use super::bring_up::Ports;
use super::console::Tail;
use super::machine::{GuestStream, Machine, Nic, Plug, PortListener};
use super::phases::MachinePhases;
use super::{Error, MemoryWay, Parts, Sandbox, Timeouts};
use crate::control::Traffic;

/// A machine whose guest is the caller.
pub(crate) struct Fake {
    end: watch::Sender<Option<ExitReason>>,
    ports: Arc<Mutex<HashMap<u32, mpsc::Sender<GuestStream>>>>,
    /// Ports that the guest listens on.
    listens: Mutex<HashMap<u32, mpsc::Sender<DuplexStream>>>,
    plugged: AtomicUsize,
    pub(crate) unplugged: Mutex<Vec<u8>>,
    /// What links of network devices were set to.
    pub(crate) links: Arc<Mutex<Vec<(String, bool)>>>,
    /// vCPUs and units of memory; the guest's side is [`Plugs::registers`].
    pub(crate) plugs: Plugs,
    regions: Arc<NoMemory>,
    changes: Changes,
    /// The virtio-mem device, if there is one; the guest's driver is the caller.
    pub(crate) mem: watch::Sender<MemStatus>,
    has_mem: bool,
}

/// A network device whose traffic is how often its link was set.
struct FakeNic {
    name: String,
    links: Arc<Mutex<Vec<(String, bool)>>>,
}

impl Nic for FakeNic {
    fn set_link(&self, up: bool) {
        self.links.lock().unwrap().push((self.name.clone(), up));
    }

    fn traffic(&self) -> Traffic {
        let links = self.links.lock().unwrap();
        let mut traffic = Traffic::default();
        for (_, up) in links.iter().filter(|(name, _)| *name == self.name) {
            traffic.link_up = *up;
            traffic.received += 1;
        }
        traffic
    }
}

/// Memory that is not there; the regions that there would be.
struct NoMemory(Mutex<(SlotAllocator, usize)>);

impl Regions for NoMemory {
    fn add(&self, base: u64, _size: u64) -> Result<SlotId, nacre_vmm::memory::Error> {
        let mut regions = self.0.lock().unwrap();
        let slot = regions.0.allocate();
        let slot = slot.map_err(|source| nacre_vmm::memory::Error::Exhausted { base, source })?;
        regions.1 += 1;
        Ok(slot)
    }

    fn remove(&self, slot: SlotId) -> Result<(), nacre_vmm::memory::Error> {
        let mut regions = self.0.lock().unwrap();
        regions.0.free(slot);
        regions.1 -= 1;
        Ok(())
    }
}

/// Where units of the fake's memory are.
pub(crate) const AREA: Area = Area {
    base: 4 << 30,
    unit: 128 << 20,
    units: 4,
};
/// Most vCPUs of the fake.
pub(crate) const MAX_VCPUS: u8 = 4;
/// Region of the fake's virtio-mem device, in bytes.
pub(crate) const REGION: u64 = 1 << 30;

impl Fake {
    pub(crate) fn new() -> Arc<Self> {
        Self::with_mem(false)
    }

    /// One with a virtio-mem device, or without.
    pub(crate) fn with_mem(has_mem: bool) -> Arc<Self> {
        Self::with(has_mem, AREA)
    }

    /// One with a virtio-mem device, or without, and with units of ACPI memory.
    pub(crate) fn with(has_mem: bool, area: Area) -> Arc<Self> {
        let (end, _) = watch::channel(None);
        let changes = Changes::default();
        let line = EventLine::unheard().unwrap();
        let regions = Arc::new(NoMemory(Mutex::new((SlotAllocator::new(64), 0))));
        let plugs = Plugs::new(MAX_VCPUS, area, regions.clone(), line, &changes);
        plugs.cpus().occupy(0, Arc::default());
        Arc::new(Self {
            plugs,
            regions,
            changes,
            mem: watch::Sender::new(MemStatus {
                region: REGION,
                driver: true,
                ..MemStatus::default()
            }),
            has_mem,
            end,
            ports: Arc::default(),
            listens: Mutex::default(),
            plugged: AtomicUsize::new(0),
            unplugged: Mutex::default(),
            links: Arc::default(),
        })
    }

    /// From here on the guest's kernel does as it is told: notices what is plugged, ejects what it is asked for, and its driver
    /// plugs what is requested.
    #[cfg(test)]
    pub(crate) fn obey(self: &Arc<Self>) {
        use nacre_vmm::bus::BusDevice;
        use nacre_vmm::hotplug::registers::{CPUS, FETCH, KIND_CPU, MEMORY, SLOT_BYTES};

        const EJECT: u32 = 3;
        let fake = Arc::clone(self);
        let (mut changes, mut requests) = (self.changes.subscribe(), self.mem.subscribe());
        tokio::spawn(async move {
            let guest = fake.plugs.registers();
            loop {
                let mut word = [0; 4];
                guest.read(FETCH, &mut word);
                let word = u32::from_le_bytes(word);
                if word != 0 {
                    let slots = if word >> 24 == KIND_CPU { CPUS } else { MEMORY };
                    if word & 0xff == EJECT {
                        let slot = u64::from(word >> 8 & 0xff) * SLOT_BYTES;
                        guest.write(slots + slot, &1u32.to_le_bytes());
                    }
                    continue;
                }
                fake.mem.send_if_modified(|status| {
                    let differs = status.plugged != status.requested;
                    status.plugged = status.requested;
                    differs
                });
                tokio::select! {
                    _ = changes.changed() => {}
                    _ = requests.changed() => {}
                    _ = fake.ended() => return,
                }
            }
        });
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Devices that were plugged and not unplugged since.
    #[cfg(test)]
    pub(crate) fn disks(&self) -> usize {
        self.plugged.load(Ordering::Relaxed) - self.unplugged.lock().unwrap().len()
    }

    /// Regions of memory that the host has for what is plugged.
    pub(crate) fn regions(&self) -> usize {
        self.regions.0.lock().unwrap().1
    }

    pub(crate) fn end(&self, reason: ExitReason) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert(reason);
            first
        });
    }

    /// The guest dials a port; refused if nobody listens.
    pub(crate) fn dial(&self, port: u32) -> io::Result<DuplexStream> {
        let (guest, host) = tokio::io::duplex(1 << 16);
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let listener = self
            .ports
            .lock()
            .unwrap()
            .get(&port)
            .cloned()
            .ok_or_else(refused)?;
        listener
            .try_send(GuestStream::new(host))
            .map_err(|_| refused())?;
        Ok(guest)
    }

    /// The guest listens on a port.
    #[cfg(test)]
    pub(crate) fn guest_listens(&self, port: u32) -> mpsc::Receiver<DuplexStream> {
        let (sender, receiver) = mpsc::channel(4);
        self.listens.lock().unwrap().insert(port, sender);
        receiver
    }

    pub(crate) fn listener(&self, port: u32) -> Box<dyn PortListener> {
        let (sender, receiver) = mpsc::channel(4);
        self.ports.lock().unwrap().insert(port, sender);
        Box::new(FakeListener(receiver))
    }
}

impl Fake {
    /// Nothing is left of a VM that has ended.
    fn alive(&self, doing: &str) -> Result<(), Error> {
        match &*self.end.borrow() {
            None => Ok(()),
            Some(reason) => Err(Error::Machine {
                doing: doing.to_owned(),
                cause: format!("the VM has ended: {reason}"),
            }),
        }
    }
}

struct FakeListener(mpsc::Receiver<GuestStream>);

#[async_trait]
impl PortListener for FakeListener {
    async fn accept(&mut self) -> io::Result<GuestStream> {
        self.0
            .recv()
            .await
            .ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionReset))
    }
}

impl Plug for Fake {
    fn plug_vcpu(&self) -> Result<u8, Error> {
        self.alive("plug a vCPU")?;
        let failed = |error| Error::machine("plug a vCPU", &error);
        let index = self.plugs.cpus().vacancy().map_err(failed)?;
        self.plugs
            .plug_vcpu(index, Arc::default())
            .map_err(failed)?;
        Ok(index)
    }

    fn ask_vcpu(&self, index: u8) -> Result<(), Error> {
        self.alive("unplug a vCPU")?;
        self.plugs
            .ask_vcpu(index)
            .map_err(|error| Error::machine("unplug a vCPU", &error))
    }

    fn withdraw_vcpu(&self, index: u8) -> Result<(), Error> {
        self.alive("take a vCPU back")?;
        self.plugs
            .cpus()
            .withdraw(index)
            .map_err(|error| Error::machine("take a vCPU back", &error))
    }

    fn vcpu_slots(&self) -> Vec<SlotView> {
        match self.alive("") {
            Ok(()) => self.plugs.cpus().views(),
            Err(_) => Vec::new(),
        }
    }

    fn plug_memory(&self, bytes: u64) -> Result<Vec<UnitView>, Error> {
        self.alive("plug memory")?;
        self.plugs
            .plug_memory(bytes)
            .map_err(|error| Error::machine("plug memory", &error))
    }

    fn ask_memory(&self, unit: u8) -> Result<(), Error> {
        self.alive("unplug memory")?;
        self.plugs
            .ask_memory(unit)
            .map_err(|error| Error::machine("unplug memory", &error))
    }

    fn withdraw_memory(&self, unit: u8) -> Result<(), Error> {
        self.alive("take memory back")?;
        self.plugs
            .memory()
            .withdraw(unit)
            .map_err(|error| Error::machine("take memory back", &error))
    }

    fn memory_units(&self) -> Vec<UnitView> {
        match self.alive("") {
            Ok(()) => self.plugs.memory().views(),
            Err(_) => Vec::new(),
        }
    }

    fn memory_area(&self) -> Area {
        match self.alive("") {
            Ok(()) => self.plugs.memory().area(),
            Err(_) => Area {
                base: 0,
                unit: 0,
                units: 0,
            },
        }
    }

    fn ejecting_since(&self) -> Option<Instant> {
        self.plugs.ejecting_since()
    }

    fn plug_changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn request_memory(&self, bytes: u64) -> Result<(), Error> {
        self.alive("request memory")?;
        assert!(bytes.is_multiple_of(BLOCK_BYTES) && bytes <= REGION);
        self.mem.send_modify(|status| status.requested = bytes);
        Ok(())
    }

    fn requested_memory(&self) -> Option<watch::Receiver<MemStatus>> {
        let there = self.has_mem && self.alive("").is_ok();
        there.then(|| self.mem.subscribe())
    }

    fn unasked_ejects(&self) -> u64 {
        self.plugs.registers().unasked()
    }

    fn given_back(&self) -> u64 {
        0
    }
}

#[async_trait]
impl Machine for Fake {
    async fn ended(&self) -> ExitReason {
        let mut end = self.end.subscribe();
        let ended = end.wait_for(Option::is_some).await.unwrap();
        ended.clone().unwrap()
    }

    fn exit_reason(&self) -> Option<ExitReason> {
        self.end.borrow().clone()
    }

    fn stop(&self) {
        self.end(ExitReason::Stopped);
    }

    fn listen(&self, port: u32) -> Result<Box<dyn PortListener>, Error> {
        let taken = |sender: &mpsc::Sender<_>| !sender.is_closed();
        if self.ports.lock().unwrap().get(&port).is_some_and(taken) {
            return Err(Error::Machine {
                doing: format!("listen on vsock port {port}"),
                cause: "it has a listener".to_owned(),
            });
        }
        Ok(self.listener(port))
    }

    async fn connect(&self, port: u32) -> Result<(GuestStream, u32), Error> {
        let listener = self.listens.lock().unwrap().get(&port).cloned();
        let refused = || Error::Machine {
            doing: format!("connect to vsock port {port} of the guest"),
            cause: "nobody listens".to_owned(),
        };
        let (guest, host) = tokio::io::duplex(1 << 16);
        let listener = listener.ok_or_else(refused)?;
        listener.send(guest).await.map_err(|_| refused())?;
        Ok((GuestStream::new(host), 40_000))
    }

    fn plug_disk(&self, _disk: DiskConfig) -> Result<u8, Error> {
        self.plugged.fetch_add(1, Ordering::Relaxed);
        Ok(2)
    }

    fn plug_net(&self, config: NetConfig, _tap: Tap) -> Result<(u8, Arc<dyn Nic>), Error> {
        let window = 3 + self.plugged.fetch_add(1, Ordering::Relaxed);
        let nic = FakeNic {
            name: config.name,
            links: self.links.clone(),
        };
        Ok((u8::try_from(window).unwrap(), Arc::new(nic)))
    }

    fn unplug(&self, window: u8) -> Result<(), Error> {
        self.unplugged.lock().unwrap().push(window);
        Ok(())
    }

    fn phases(&self) -> MachinePhases {
        MachinePhases {
            start_ns: 1,
            ..MachinePhases::default()
        }
    }

    fn exits(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

pub(crate) const TIMEOUTS: Timeouts = Timeouts {
    boot: Duration::from_secs(60),
    agent: Duration::from_secs(10),
    create: Duration::from_secs(30),
    stdio: Duration::from_secs(5),
    resize: Duration::from_secs(20),
};

/// A sandbox over a machine whose guest is the caller.
pub(crate) fn boot() -> (Sandbox, Arc<Fake>, Tail) {
    boot_over(Fake::new(), MemoryWay::Auto)
}

/// A sandbox over this machine.
pub(crate) fn boot_over(fake: Arc<Fake>, memory_way: MemoryWay) -> (Sandbox, Arc<Fake>, Tail) {
    let tail = Tail::default();
    let parts = Parts {
        id: "s".to_owned(),
        namespace: "test".to_owned(),
        hostname: "guest".to_owned(),
        kernel: "/k".into(),
        initrd: None,
        vcpus: 1,
        max_vcpus: MAX_VCPUS,
        memory_mib: 256,
        memory_way,
        agent: true,
        disks: Vec::new(),
        files: super::file_server(&crate::config::Share::default()).expect("a file server"),
        timeouts: TIMEOUTS,
        // Agents of tests answer what the test is about.
        clock: false,
        main_ns: None,
    };
    let ports = Ports {
        calls: fake.listener(PORT_CALLS),
        events: fake.listener(PORT_EVENTS),
        log: fake.listener(PORT_LOG),
    };
    let sandbox = Sandbox::over(parts, fake.clone(), Some(ports), tail.clone(), None);
    (sandbox, fake, tail)
}

/// What a good agent says first.
pub(crate) fn hello() -> ReadyRequest {
    let mut hello = ReadyRequest::new();
    hello.protocol_version = PROTOCOL_VERSION;
    hello.build_id = "theirs".to_owned();
    hello.kernel_release = "6.1".to_owned();
    hello
}

/// For the guest's calls to its host.
pub(crate) fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(100))
}

/// The guest's side of the two connections.
pub(crate) struct Guest {
    /// Calls of the guest to its host.
    pub(crate) host: HostClient,
    _server: Server,
}

/// Dials, serves the agent, and says hello.
pub(crate) async fn agent(fake: &Fake, service: impl AgentService + Send + 'static) -> Guest {
    let calls = fake.dial(PORT_CALLS).unwrap();
    let one = futures::stream::once(async move { Ok::<_, io::Error>(calls) });
    let mut server = Server::new()
        .add_listener(Listener::new(one))
        .register_service(create_agent(Arc::new(service)));
    server.start().await.unwrap();
    let events = fake.dial(PORT_EVENTS).unwrap();
    let host = HostClient::new(Client::new(Socket::new(events)));
    let answer = host.ready(context(), &hello()).await.unwrap();
    assert_eq!(answer.hostname, "guest");
    assert!(answer.realtime_ns > 0);
    Guest {
        host,
        _server: server,
    }
}

/// Makes a sandbox pass on the events of a container that nobody created in it.
pub(crate) fn know(sandbox: &Sandbox, id: &str) {
    sandbox.containers().insert(id.to_owned());
}
