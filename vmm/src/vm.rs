//! Puts a VM together from its parts, changes it while it runs, and takes it apart again.
//!
//! Order of making: KVM and memory, kernel and tables, event loop and devices, vCPUs. Taking apart
//! is the reverse, and begins when the end is reported, whoever reported it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot;
use crate::boot::acpi;
use crate::boot::kernel::{load_initrd, load_kernel};
use crate::boot::pvh::write_start_info;
use crate::bus::{Bus, BusDevice, Overlap};
use crate::config::{ConfigError, DiskConfig, ReadyDevices, VmConfig};
use crate::event_loop::{self, EventLoop, EventLoopHandle};
use crate::exit::{Ending, ExitReason};
use crate::hotplug::ged::EventLine;
use crate::hotplug::memory::{Area, Regions};
use crate::hotplug::{self, Changes, Plugs, registers};
use crate::interrupt::{self, IrqLine};
use crate::kvm;
use crate::memory::layout::{
    ACPI_START, GED_GSI, HOTPLUG_BASE, I8042_PORT, MIB, PHASE_PORT, PLUG_ALIGNMENT, PVPANIC_PORT,
    RESET_VECTOR, SERIAL_GSI, SERIAL_PORT, SLEEP_CONTROL_PORT, START_INFO, WINDOW_SIZE,
    low_ram_end, plug_start, ram, window_address,
};
use crate::memory::{self, GuestMemory};
use crate::platform::monotonic_ns;
use crate::platform::phase::{PhaseMarks, PhasePort};
use crate::platform::power::{PowerRegisters, RESET_VECTOR_CODE, ResetLine};
use crate::platform::pvpanic::Pvpanic;
use crate::serial::{InputPump, SerialPort};
use crate::vcpu;
use crate::vcpu::set::{VcpuFactory, VcpuSet};
use crate::vcpu::state::Entry;
use crate::vcpu::thread::Surroundings;
use crate::virtio::balloon::{Balloon, BalloonHost};
use crate::virtio::block::Block;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mem::{Mem, MemConfig, MemHost, SLOT_UNIT};
use crate::virtio::mmio::{self, Window};
use crate::virtio::net::{Net, NetConfig, NetHost, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockHost};
use crate::windows::{ShownRegisters, WindowSlot, Wires, lay_wires};

/// The guest's vsock address.
pub const GUEST_CID: u64 = 3;

/// A VM could not be made or changed.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// This host's KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Kernel, initrd or tables.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// vCPUs.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// Interrupt lines or queue notifications.
    #[error(transparent)]
    Wire(#[from] interrupt::Error),
    /// Plugging vCPUs or memory.
    #[error(transparent)]
    Plugs(#[from] hotplug::Error),
    /// Memory that may be plugged would be out of reach.
    #[error(
        "memory that may be plugged would end at {} GiB, but this host's processor addresses {} GiB only: lower the largest memory", end >> 30, limit >> 30
    )]
    PlugRange {
        /// Its end in bytes.
        end: u64,
        /// The first address that there is not.
        limit: u64,
    },
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// The event loop.
    #[error(transparent)]
    EventLoop(#[from] event_loop::Error),
    /// The serial console.
    #[error("cannot make the serial console")]
    Serial(#[source] std::io::Error),
    /// The host is out of memory, or the process of mappings.
    #[error("cannot map the registers of virtio-mmio windows")]
    Registers(#[source] MmapRegionError),
    /// The process has no descriptor left.
    #[error("cannot make an eventfd")]
    EventFd(#[source] std::io::Error),
    /// A virtio device.
    #[error("cannot make the {kind} device")]
    Device {
        /// "block", "vsock", "rng", "memory", "balloon".
        kind: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device could not be put into its window.
    #[error("cannot plug into virtio-mmio window {window}")]
    Plug {
        /// The window.
        window: u8,
        /// The cause.
        #[source]
        source: mmio::Error,
    },
    /// All windows have a device.
    #[error("no free window: all {windows} virtio-mmio windows have a device")]
    NoWindow {
        /// Windows of this VM.
        windows: u8,
    },
    /// There is no such window.
    #[error("no virtio-mmio window {window}: there are {windows}")]
    UnknownWindow {
        /// The window asked for.
        window: u8,
        /// Windows of this VM.
        windows: u8,
    },
    /// The window has no device.
    #[error("virtio-mmio window {0} has no device")]
    EmptyWindow(u8),
    /// The device is not one that can be taken out.
    #[error(
        "the {kind} device in virtio-mmio window {window} cannot be unplugged, only disks and network devices can"
    )]
    NotUnpluggable {
        /// The window.
        window: u8,
        /// What is in it.
        kind: &'static str,
    },
    /// The VM has ended.
    #[error("the VM has ended: {0}")]
    Ended(ExitReason),
    /// A thread could not be started.
    #[error("cannot start the thread that supervises the VM")]
    Supervisor(#[source] std::io::Error),
}

struct WindowPlace {
    slot: Arc<WindowSlot>,
    wires: Option<Wires>,
}

/// Devices that are there from the start, disks aside.
struct First {
    vsock: bool,
    rng: bool,
    mem: Option<MemConfig>,
    balloon: bool,
}

/// Everything a running VM owns, threads included.
///
/// Fields are dropped in this order; [`Self::take_down`] has stopped what runs before.
pub struct Machine {
    vcpus: VcpuSet,
    windows: Vec<WindowPlace>,
    /// Where KVM counts acknowledgements that mean nothing; nobody reads it.
    swallowed: Arc<EventFd>,
    event_loop: EventLoop,
    events: EventLoopHandle,
    serial: Arc<SerialPort>,
    _serial_line: IrqLine,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    memory: Arc<GuestMemory>,
    plugs: Plugs,
    mem: Option<MemHost>,
    balloon: Option<BalloonHost>,
    boot_bytes: u64,
    _ged_line: IrqLine,
    _registers: ShownRegisters,
    vm: Arc<VmFd>,
    /// Makes more vCPUs.
    factory: VcpuFactory,
}

/// What of a VM can be looked at after its end as well.
#[derive(Default)]
pub struct Progress {
    /// How it ends.
    pub ending: Arc<Ending>,
    /// Tells of what is plugged and unplugged.
    pub plug_changes: Changes,
    /// Phases that the guest marked.
    pub marks: Arc<PhaseMarks>,
    /// CLOCK_MONOTONIC of the first KVM_RUN in nanoseconds, 0 before.
    pub first_run_ns: Arc<AtomicU64>,
    /// CLOCK_MONOTONIC of the guest's first access to a device in nanoseconds, 0 before.
    pub first_exit_ns: Arc<AtomicU64>,
    /// CLOCK_MONOTONIC of KVM's VM being there, 0 before.
    pub kvm_ns: AtomicU64,
    /// CLOCK_MONOTONIC of kernel and initrd being in guest memory, 0 before.
    pub loaded_ns: AtomicU64,
}

/// How busy a VM has been, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Exits of all vCPUs by reason.
    pub exits: BTreeMap<&'static str, u64>,
    /// Port accesses that found no device.
    pub unknown_ports: u64,
    /// Device memory accesses that found no device.
    pub unknown_mmio: u64,
    /// Bytes of the console that its writer refused.
    pub console_lost: u64,
}

impl Machine {
    /// Makes the VM, calls `before_run` with the vsock device's host side if it has one, and starts
    /// its vCPUs. On an error nothing is left of it.
    ///
    /// # Errors
    ///
    /// See [`enum@Error`].
    pub fn start(
        config: VmConfig,
        progress: &Progress,
        before_run: impl FnOnce(&VsockHost),
    ) -> Result<(Self, Option<VsockHost>), Error> {
        config.check()?;
        let kvm = kvm::open()?;
        let vm = Arc::new(kvm::create_vm(&kvm)?);
        progress.kvm_ns.store(monotonic_ns(), Ordering::Relaxed);

        let size = config.memory_mib * MIB;
        // The last slot is that of the registers.
        let slot_limit = u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX) - 1;
        let memory = Arc::new(GuestMemory::new(Arc::clone(&vm), slot_limit, &ram(size))?);
        let max_vcpus = config.plug.max_vcpus.max(config.vcpus);
        let area = Area {
            base: plug_start(size),
            unit: config.plug.acpi_unit_mib * MIB,
            units: config.plug.acpi_units,
        };
        let factory = VcpuFactory::new(kvm, Arc::clone(&vm), max_vcpus)?;
        let mem = mem_config(config.plug.virtio_mem_mib * MIB, area);
        let end = mem.map_or(area.address(area.units), |mem| mem.base + mem.region_bytes);
        let limit = factory.physical_addresses();
        if (area.units > 0 || mem.is_some()) && end > limit {
            return Err(Error::PlugRange { end, limit });
        }
        let entry = load(&config, &memory, size, area)?;
        progress.loaded_ns.store(monotonic_ns(), Ordering::Relaxed);

        let ending = Arc::clone(&progress.ending);
        let on_panic = {
            let ending = Arc::clone(&ending);
            move |message: String| {
                ending.report(ExitReason::Internal {
                    message: format!("a device: {message}"),
                });
            }
        };
        let (event_loop, events) = EventLoop::start(&format!("dev:{}", config.name), on_panic)?;

        let serial_line = IrqLine::new(Arc::clone(&vm), SERIAL_GSI)?;
        let serial = Arc::new(
            SerialPort::new(serial_line.trigger()?, config.console.output)
                .map_err(Error::Serial)?,
        );
        let ports = Arc::new(port_bus(progress, &serial)?);

        let mut mmio = Bus::new("MMIO");
        let registers = ShownRegisters::new(&vm, config.windows, slot_limit)?;
        let mut windows = Vec::with_capacity(usize::from(config.windows));
        for index in 0..config.windows {
            let page = registers.pages.page(index).ok_or(Error::UnknownWindow {
                window: index,
                windows: config.windows,
            })?;
            let window = Window::new(memory.ram(), page).map_err(|source| Error::Plug {
                window: index,
                source,
            })?;
            let slot = Arc::new(WindowSlot::new(window));
            let device: Arc<dyn BusDevice> = Arc::clone(&slot) as Arc<dyn BusDevice>;
            mmio.insert(window_address(index), WINDOW_SIZE, device)?;
            windows.push(WindowPlace { slot, wires: None });
        }
        let ged_line = IrqLine::new(Arc::clone(&vm), GED_GSI)?;
        let plugs = Plugs::new(
            max_vcpus,
            area,
            Arc::clone(&memory) as Arc<dyn Regions>,
            EventLine::new(ged_line.trigger()?),
            &progress.plug_changes,
        );
        mmio.insert(HOTPLUG_BASE, registers::LENGTH, plugs.registers())?;
        let mmio = Arc::new(mmio);

        let mut prepared = Vec::with_capacity(usize::from(config.vcpus));
        for index in 0..config.vcpus {
            let entry = if index == 0 {
                entry
            } else {
                Entry::WaitForSipi
            };
            prepared.push(factory.prepare(index, entry)?);
        }
        let vcpus = VcpuSet::new(Surroundings {
            name: config.name,
            ports: Arc::clone(&ports),
            mmio: Arc::clone(&mmio),
            memory: memory.ram(),
            ending: Arc::clone(&ending),
            first_run_ns: Arc::clone(&progress.first_run_ns),
            first_exit_ns: Arc::clone(&progress.first_exit_ns),
        })?;

        let mut machine = Self {
            vcpus,
            windows,
            swallowed: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)?),
            event_loop,
            events,
            serial,
            _serial_line: serial_line,
            ports,
            mmio,
            memory,
            plugs,
            mem: None,
            balloon: None,
            boot_bytes: size,
            _ged_line: ged_line,
            _registers: registers,
            vm,
            factory,
        };
        let first = First {
            vsock: config.vsock,
            rng: config.rng,
            mem,
            balloon: config.plug.balloon,
        };
        let result = machine.fill(&first, config.devices, &config.disks, config.console.input);
        let started = result.and_then(|host| {
            if let Some(host) = &host {
                before_run(host);
            }
            for (index, vcpu) in (0..).zip(prepared) {
                let control = machine.vcpus.start(vcpu)?;
                machine.plugs.cpus().occupy(index, control);
            }
            Ok(host)
        });
        match started {
            Ok(host) => Ok((machine, host)),
            Err(error) => {
                ending.report(ExitReason::Stopped);
                machine.take_down();
                Err(error)
            }
        }
    }

    /// Puts the first devices into windows: vsock, rng, memory, balloon, those of the caller, then disks; and the console's input to work.
    fn fill(
        &mut self,
        first: &First,
        ready: ReadyDevices,
        disks: &[DiskConfig],
        input: Option<std::fs::File>,
    ) -> Result<Option<VsockHost>, Error> {
        let host = if first.vsock {
            let (device, host) =
                Vsock::new(GUEST_CID, self.events.clone()).map_err(|source| Error::Device {
                    kind: "vsock",
                    source: Box::new(source),
                })?;
            self.plug(Box::new(device))?;
            Some(host)
        } else {
            None
        };
        if first.rng {
            self.plug(Box::new(Rng::new(self.events.clone())))?;
        }
        if let Some(config) = first.mem {
            let made = Mem::new(config, Arc::clone(&self.memory), self.events.clone());
            let (device, host) = made.map_err(|source| Error::Device {
                kind: "memory",
                source: Box::new(source),
            })?;
            self.plug(Box::new(device))?;
            self.mem = Some(host);
        }
        if first.balloon {
            let made = Balloon::new(Arc::clone(&self.memory), self.events.clone());
            let (device, host) = made.map_err(|source| Error::Device {
                kind: "balloon",
                source: Box::new(source),
            })?;
            self.plug(Box::new(device))?;
            self.balloon = Some(host);
        }
        for device in ready.0 {
            self.plug(device)?;
        }
        for disk in disks {
            self.plug_disk(disk)?;
        }
        if let Some(file) = input {
            let pump = InputPump::new(Arc::clone(&self.serial), file);
            self.events.add(Arc::new(Mutex::new(pump)))?;
        }
        Ok(host)
    }

    /// Opens a disk, and puts it into the first spare window; the window's index.
    ///
    /// # Errors
    ///
    /// If the disk cannot be opened or no window is free.
    pub fn plug_disk(&mut self, disk: &DiskConfig) -> Result<u8, Error> {
        let device = open_disk(disk, self.events())?;
        self.plug_block(device)
    }

    /// Puts a disk that is open into the first spare window; the window's index.
    ///
    /// # Errors
    ///
    /// If no window is free.
    pub(crate) fn plug_block(&mut self, device: Block) -> Result<u8, Error> {
        self.plug(Box::new(device))
    }

    /// Where devices' events are waited for.
    pub fn events(&self) -> EventLoopHandle {
        self.events.clone()
    }

    /// Puts a network device over a TAP interface into the first spare window; the window's index.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be or no window is free.
    pub fn plug_net(&mut self, config: NetConfig, tap: Tap) -> Result<(u8, NetHost), Error> {
        let made = Net::new(config, tap, self.events.clone());
        let (device, host) = made.map_err(|source| Error::Device {
            kind: "net",
            source: Box::new(source),
        })?;
        Ok((self.plug(Box::new(device))?, host))
    }

    fn plug(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8, Error> {
        let windows = self.windows.len() as u8;
        let free = self.windows.iter().position(|place| place.wires.is_none());
        let Some(index) = free else {
            return Err(Error::NoWindow { windows });
        };
        let place = &mut self.windows[index];
        let index = index as u8;
        let mut window = place.slot.lock();
        window.plug(device).map_err(|source| Error::Plug {
            window: index,
            source,
        })?;
        // The window stays locked until the wires are laid: a driver that begins early, by its first write, waits.
        match lay_wires(&self.vm, index, &window, &self.swallowed) {
            Ok(wires) => {
                tracing::debug!(window = index, device = window.kind(), "plugged");
                place.wires = Some(wires);
                Ok(index)
            }
            Err(error) => {
                window.unplug();
                Err(error.into())
            }
        }
    }

    /// Takes the disk or the network device out of a window.
    ///
    /// # Errors
    ///
    /// If there is no such window, it is spare, or what is in it is for good.
    pub fn unplug(&mut self, window: u8) -> Result<(), Error> {
        let windows = self.windows.len() as u8;
        let place = self
            .windows
            .get_mut(usize::from(window))
            .ok_or(Error::UnknownWindow { window, windows })?;
        match place.slot.lock().kind() {
            None => return Err(Error::EmptyWindow(window)),
            Some("block" | "net") => {}
            Some(kind) => return Err(Error::NotUnpluggable { window, kind }),
        }
        place.wires = None;
        drop(place.slot.lock().unplug());
        tracing::debug!(window, "unplugged");
        Ok(())
    }

    /// Makes a vCPU, or has a parked one run again, and announces it; its index.
    ///
    /// # Errors
    ///
    /// If all that there may be are there, or KVM or the host refuses.
    pub fn plug_vcpu(&mut self) -> Result<u8, Error> {
        let index = self.plugs.cpus().vacancy()?;
        let control = match self.vcpus.run_again(index) {
            Some(control) => control?,
            None => self
                .vcpus
                .start(self.factory.prepare(index, Entry::WaitForSipi)?)?,
        };
        self.plugs.plug_vcpu(index, control)?;
        tracing::debug!(vcpu = index, "plugged");
        Ok(index)
    }

    /// What comes and goes by ACPI.
    pub fn plugs(&self) -> &Plugs {
        &self.plugs
    }

    /// How busy it has been.
    pub fn counters(&self) -> Counters {
        Counters {
            exits: self.vcpus.exits(),
            unknown_ports: self.ports.unknown_reads() + self.ports.unknown_writes(),
            unknown_mmio: self.mmio.unknown_reads() + self.mmio.unknown_writes(),
            console_lost: self.serial.lost(),
        }
    }

    /// How many vCPUs are there.
    pub fn vcpus(&self) -> usize {
        self.plugs.cpus().views().len()
    }

    /// Guest memory in bytes: what was there at boot, and what is plugged.
    pub fn memory_bytes(&self) -> u64 {
        let units = self.plugs.memory().views();
        let units: u64 = units.iter().map(|unit| unit.bytes).sum();
        let mem = self.mem.as_ref().map_or(0, |mem| mem.status().plugged);
        self.boot_bytes + units + mem
    }

    /// The host's end of the balloon, if there is one.
    pub fn balloon(&self) -> Option<&BalloonHost> {
        self.balloon.as_ref()
    }

    /// The host's end of the virtio-mem device, if there is one.
    pub fn mem(&self) -> Option<&MemHost> {
        self.mem.as_ref()
    }

    /// Stops everything that runs and gives everything back; the last counters. The end has been
    /// reported before.
    pub fn take_down(mut self) -> Counters {
        self.vcpus.join();
        let counters = self.counters();
        for place in &mut self.windows {
            place.wires = None;
            drop(place.slot.lock().unplug());
        }
        self.event_loop.stop();
        counters
    }
}

/// Opens the files of a disk, and makes its device.
///
/// # Errors
///
/// If the configuration cannot be, or a file cannot be opened.
pub(crate) fn open_disk(disk: &DiskConfig, events: EventLoopHandle) -> Result<Block, Error> {
    disk.check()?;
    Block::new(disk, events).map_err(|source| Error::Device {
        kind: "block",
        source: Box::new(source),
    })
}

/// Where a virtio-mem device's region is: behind the units of ACPI memory. Its slots are as small as they may be while there are
/// not more than [`MEM_SLOTS`] of them.
fn mem_config(bytes: u64, area: Area) -> Option<MemConfig> {
    const MEM_SLOTS: u64 = 256;
    if bytes == 0 {
        return None;
    }
    let slot_bytes = bytes
        .div_ceil(MEM_SLOTS)
        .next_multiple_of(SLOT_UNIT)
        .next_power_of_two();
    let base = area
        .address(area.units)
        .next_multiple_of(PLUG_ALIGNMENT.max(slot_bytes));
    Some(MemConfig {
        base,
        region_bytes: bytes.next_multiple_of(slot_bytes),
        slot_bytes,
    })
}

/// Kernel, initrd, start information and tables into guest memory; where the guest begins.
fn load(config: &VmConfig, memory: &GuestMemory, size: u64, area: Area) -> Result<Entry, Error> {
    let ram = memory.ram();
    let view = ram.memory();
    let ram_end = low_ram_end(size);
    let kernel = load_kernel(&config.kernel, &view, ram_end)?;
    let initrd = config
        .initrd
        .as_deref()
        .map(|path| load_initrd(path, &view, kernel.end, ram_end))
        .transpose()?;
    let tables = acpi::tables(&acpi::Machine {
        vcpus: config.vcpus,
        max_vcpus: config.plug.max_vcpus.max(config.vcpus),
        windows: config.windows,
        memory: area,
    })?;
    view.write_slice(&tables, GuestAddress(ACPI_START))
        .map_err(|error| boot::Error::Write {
            what: "ACPI tables",
            address: ACPI_START,
            why: error.to_string(),
        })?;
    view.write_slice(&RESET_VECTOR_CODE, GuestAddress(RESET_VECTOR))
        .map_err(|error| boot::Error::Write {
            what: "reset vector",
            address: RESET_VECTOR,
            why: error.to_string(),
        })?;
    write_start_info(&view, size, &config.cmdline, initrd, ACPI_START)?;
    Ok(Entry::Pvh {
        entry: kernel.entry,
        start_info: START_INFO,
    })
}

/// The port bus with the machine's fixed devices.
fn port_bus(progress: &Progress, serial: &Arc<SerialPort>) -> Result<Bus, Overlap> {
    let ending = &progress.ending;
    let mut ports = Bus::new("port");
    let serial: Arc<dyn BusDevice> = Arc::clone(serial) as Arc<dyn BusDevice>;
    ports.insert(u64::from(SERIAL_PORT), SerialPort::LENGTH, serial)?;
    ports.insert(
        u64::from(PVPANIC_PORT),
        1,
        Arc::new(Pvpanic::new(Arc::clone(ending))),
    )?;
    ports.insert(
        u64::from(SLEEP_CONTROL_PORT),
        PowerRegisters::LENGTH,
        Arc::new(PowerRegisters::new(Arc::clone(ending))),
    )?;
    ports.insert(
        u64::from(I8042_PORT),
        1,
        Arc::new(ResetLine::new(Arc::clone(ending))),
    )?;
    ports.insert(
        u64::from(PHASE_PORT),
        1,
        Arc::new(PhasePort::new(Arc::clone(&progress.marks))),
    )?;
    Ok(ports)
}
