//! The real machine: [`nacre_vmm::Vm`] behind the sandbox's trait.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use nacre_fs::FileServer;
use nacre_protocol::{PORT_CALLS, PORT_EVENTS, PORT_LOG, SHARE_TAG};
use nacre_vmm::config::{Console, DEFAULT_WINDOWS, ReadyDevices};
use nacre_vmm::hotplug::SlotView;
use nacre_vmm::hotplug::memory::{Area, UnitView};
use nacre_vmm::virtio::mem::MemStatus;
use nacre_vmm::virtio::net::{NetConfig, NetHost, Tap};
use nacre_vmm::virtio::vsock::{VsockHost, VsockListener};
use nacre_vmm::{DiskConfig, ExitReason, Vm, VmConfig};
use tokio::sync::watch;
use tokio::time::Instant;

use super::SandboxConfig;
use super::bring_up::Ports;
use super::console::{ConsoleWriter, Tail};
use super::error::Error;
use super::machine::{GuestStream, Machine, Nic, Plug, PortListener};
use super::phases::MachinePhases;
use super::size::host_memory_mib;
use crate::control::Traffic;

/// Starts the VM. With an agent, the well-known ports listen before the guest's first instruction.
pub(crate) fn start(
    config: SandboxConfig,
    files: &FileServer,
    tail: Tail,
) -> Result<(Arc<dyn Machine>, Option<Ports>), Error> {
    let doing = format!("start the VM {}", config.id);
    if let Some(cause) = too_big(config.memory_mib, host_memory_mib()) {
        return Err(Error::Machine { doing, cause });
    }
    let mut devices = ReadyDevices::default();
    if config.agent {
        let device = files
            .device(SHARE_TAG)
            .map_err(|error| Error::machine(doing.as_str(), &error))?;
        devices.0.push(device);
    }
    let windows = windows(first_disk_window(&config), config.disks.len());
    let output = ConsoleWriter::new(config.console.raw, tail, config.console.lines);
    let vm_config = VmConfig {
        name: config.id,
        kernel: config.kernel,
        initrd: config.initrd,
        cmdline: config.cmdline,
        memory_mib: config.memory_mib,
        vcpus: config.vcpus,
        disks: config.disks,
        windows,
        vsock: config.agent,
        rng: true,
        devices,
        plug: config.plug,
        console: Console {
            output: Box::new(output),
            input: config.console.input,
        },
    };
    let mut ports = None;
    let vm = Vm::start_with(vm_config, |host| ports = Some(listen_on_all(host)))
        .map_err(|error| Error::machine(doing.as_str(), &error))?;
    let ports = ports
        .transpose()
        .map_err(|error| Error::machine("listen for the guest's agent", &error))?;
    Ok((Arc::new(vm), ports))
}

fn listen_on_all(host: &VsockHost) -> Result<Ports, nacre_vmm::virtio::vsock::Error> {
    Ok(Ports {
        calls: Box::new(host.listen(PORT_CALLS)?),
        events: Box::new(host.listen(PORT_EVENTS)?),
        log: Box::new(host.listen(PORT_LOG)?),
    })
}

/// Guest memory is mapped without a reservation, so a host takes any size and kills later; what it can
/// never hold is refused here.
fn too_big(memory_mib: u64, host_mib: Option<u64>) -> Option<String> {
    let host_mib = host_mib.filter(|host_mib| memory_mib > *host_mib)?;
    Some(format!(
        "memory of {memory_mib} MiB: this host cannot map it, it has {host_mib} MiB of memory and swap together"
    ))
}

/// As many windows as the disks of the start need beside the usual spares.
fn windows(first: u8, disks: usize) -> u8 {
    u8::try_from(disks)
        .ok()
        .and_then(|disks| disks.checked_add(first))
        .unwrap_or(u8::MAX)
        .clamp(DEFAULT_WINDOWS, nacre_vmm::memory::layout::MAX_WINDOWS)
}

/// The window of the first disk of the start: vsock, rng, memory, balloon and the host's files come before.
pub(crate) fn first_disk_window(config: &SandboxConfig) -> u8 {
    u8::from(config.agent)
        + 1
        + u8::from(config.plug.virtio_mem_mib > 0)
        + u8::from(config.plug.balloon)
        + u8::from(config.agent)
}

impl Plug for Vm {
    fn plug_vcpu(&self) -> Result<u8, Error> {
        Vm::plug_vcpu(self).map_err(|error| Error::machine("plug a vCPU", &error))
    }

    fn ask_vcpu(&self, index: u8) -> Result<(), Error> {
        Vm::ask_vcpu(self, index)
            .map_err(|error| Error::machine(format!("unplug vCPU {index}"), &error))
    }

    fn withdraw_vcpu(&self, index: u8) -> Result<(), Error> {
        Vm::withdraw_vcpu(self, index)
            .map_err(|error| Error::machine(format!("take vCPU {index} back"), &error))
    }

    fn vcpu_slots(&self) -> Vec<SlotView> {
        Vm::vcpu_slots(self).unwrap_or_default()
    }

    fn plug_memory(&self, bytes: u64) -> Result<Vec<UnitView>, Error> {
        Vm::plug_memory(self, bytes)
            .map_err(|error| Error::machine(format!("plug {} MiB of memory", bytes >> 20), &error))
    }

    fn ask_memory(&self, unit: u8) -> Result<(), Error> {
        Vm::ask_memory(self, unit)
            .map_err(|error| Error::machine(format!("unplug memory unit {unit}"), &error))
    }

    fn withdraw_memory(&self, unit: u8) -> Result<(), Error> {
        Vm::withdraw_memory(self, unit)
            .map_err(|error| Error::machine(format!("take memory unit {unit} back"), &error))
    }

    fn memory_units(&self) -> Vec<UnitView> {
        Vm::memory_units(self).unwrap_or_default()
    }

    fn memory_area(&self) -> Area {
        Vm::memory_area(self).unwrap_or(Area {
            base: 0,
            unit: 0,
            units: 0,
        })
    }

    fn ejecting_since(&self) -> Option<Instant> {
        Vm::ejecting_since(self)
    }

    fn plug_changes(&self) -> watch::Receiver<u64> {
        Vm::plug_changes(self)
    }

    fn unasked_ejects(&self) -> u64 {
        Vm::unasked_ejects(self)
    }

    fn request_memory(&self, bytes: u64) -> Result<(), Error> {
        let doing = || format!("request {} MiB of the virtio-mem device", bytes >> 20);
        let mem = self.mem().ok_or_else(|| Error::Machine {
            doing: doing(),
            cause: "the VM has none".to_owned(),
        })?;
        mem.set_requested(bytes)
            .map_err(|error| Error::machine(doing(), &error))
    }

    fn given_back(&self) -> u64 {
        self.balloon().map_or(0, |balloon| {
            let stats = balloon.stats();
            stats.reported_bytes.saturating_add(stats.inflated_bytes)
        })
    }

    fn requested_memory(&self) -> Option<watch::Receiver<MemStatus>> {
        self.mem().map(|mem| mem.watch())
    }
}

impl Nic for NetHost {
    fn set_link(&self, up: bool) {
        NetHost::set_link(self, up);
    }

    fn traffic(&self) -> Traffic {
        let counters = self.counters();
        Traffic {
            link_up: self.link(),
            received: counters.received,
            received_bytes: counters.received_bytes,
            receive_dropped: counters.receive_dropped,
            sent: counters.sent,
            sent_bytes: counters.sent_bytes,
            send_dropped: counters.send_dropped,
        }
    }
}

#[async_trait]
impl Machine for Vm {
    async fn ended(&self) -> ExitReason {
        Vm::ended(self).await
    }

    fn exit_reason(&self) -> Option<ExitReason> {
        Vm::exit_reason(self)
    }

    fn stop(&self) {
        Vm::stop(self);
    }

    fn listen(&self, port: u32) -> Result<Box<dyn PortListener>, Error> {
        let doing = || format!("listen on vsock port {port}");
        let host = self.vsock().ok_or_else(|| Error::Machine {
            doing: doing(),
            cause: "the VM has no vsock device".to_owned(),
        })?;
        let listener = host
            .listen(port)
            .map_err(|error| Error::machine(doing(), &error))?;
        Ok(Box::new(listener))
    }

    async fn connect(&self, port: u32) -> Result<(GuestStream, u32), Error> {
        let doing = || format!("connect to vsock port {port} of the guest");
        let host = self.vsock().ok_or_else(|| Error::Machine {
            doing: doing(),
            cause: "the VM has no vsock device".to_owned(),
        })?;
        let stream = host
            .connect(port)
            .await
            .map_err(|error| Error::machine(doing(), &error))?;
        let from = stream.host_port();
        Ok((GuestStream::new(stream), from))
    }

    fn plug_disk(&self, disk: DiskConfig) -> Result<u8, Error> {
        let doing = format!("plug the disk {}", disk.source);
        Vm::plug_disk(self, disk).map_err(|error| Error::machine(doing, &error))
    }

    fn plug_net(&self, config: NetConfig, tap: Tap) -> Result<(u8, Arc<dyn Nic>), Error> {
        let doing = format!("plug the network device {}", config.name);
        let plugged = Vm::plug_net(self, config, tap);
        let (window, host) = plugged.map_err(|error| Error::machine(doing, &error))?;
        Ok((window, Arc::new(host)))
    }

    fn unplug(&self, window: u8) -> Result<(), Error> {
        Vm::unplug(self, window)
            .map_err(|error| Error::machine(format!("unplug window {window}"), &error))
    }

    fn phases(&self) -> MachinePhases {
        let phases = Vm::phases(self);
        MachinePhases {
            start_ns: phases.start_ns,
            kvm_ns: phases.kvm_ns,
            loaded_ns: phases.loaded_ns,
            first_run_ns: phases.first_run_ns,
            first_exit_ns: phases.first_exit_ns,
            marks: phases.marks,
        }
    }

    fn exits(&self) -> Vec<(String, u64)> {
        let counters = self.counters();
        counters
            .exits
            .into_iter()
            .map(|(name, count)| (name.to_owned(), count))
            .collect()
    }
}

#[async_trait]
impl PortListener for VsockListener {
    async fn accept(&mut self) -> io::Result<GuestStream> {
        Ok(GuestStream::new(VsockListener::accept(self).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hosts_is_refused_with_both_figures() {
        assert_eq!(too_big(512, Some(512)), None);
        assert_eq!(too_big(512, None), None);
        let cause = too_big(4096, Some(2048)).unwrap();
        assert!(
            cause.contains("4096 MiB") && cause.contains("2048 MiB"),
            "{cause}"
        );
    }

    #[test]
    fn windows_grow_with_the_disks_up_to_the_machines_limit() {
        assert_eq!(windows(2, 0), DEFAULT_WINDOWS);
        assert_eq!(windows(2, 10), 12);
        assert_eq!(windows(2, 1000), nacre_vmm::memory::layout::MAX_WINDOWS);
    }
}
