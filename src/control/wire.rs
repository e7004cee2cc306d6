//! What is told, as messages and back.

use protobuf::MessageField;

use super::{Device, Inspection, Memory, Phase, Series, State, Timings, Traffic, Usage, proto};
use crate::sandbox::BootPhases;
use crate::sandbox::clock::ClockReading;

impl From<Inspection> for proto::InspectResponse {
    fn from(from: Inspection) -> Self {
        let mut phases = proto::Phases::new();
        phases.process_ns = from.phases.process_ns.unwrap_or(0);
        phases.main_ns = from.phases.main_ns.unwrap_or(0);
        phases.start_ns = from.phases.start_ns;
        phases.kvm_ns = from.phases.kvm_ns.unwrap_or(0);
        phases.loaded_ns = from.phases.loaded_ns.unwrap_or(0);
        phases.first_run_ns = from.phases.first_run_ns.unwrap_or(0);
        phases.first_exit_ns = from.phases.first_exit_ns.unwrap_or(0);
        phases.init_ns = from.phases.init_ns.unwrap_or(0);
        phases.connected_ns = from.phases.connected_ns.unwrap_or(0);
        phases.ready_ns = from.phases.ready_ns.unwrap_or(0);
        phases.guest_init_us = from.phases.guest_init_us.unwrap_or(0);
        phases.guest_modules_us = from.phases.guest_modules_us.unwrap_or(0);
        phases.guest_ready_us = from.phases.guest_ready_us.unwrap_or(0);
        let device = |from: Device| {
            let mut device = proto::Device::new();
            device.window_plus_one = from.window.map_or(0, |window| u32::from(window) + 1);
            device.kind = from.kind;
            device.detail = from.detail;
            device.traffic = from.traffic.map(traffic).into();
            device
        };
        let mut to = Self::new();
        to.id = from.id;
        to.namespace = from.namespace;
        to.pid = from.pid;
        to.state = from.state.as_str().to_owned();
        to.vcpus = from.vcpus;
        to.memory_mib = from.memory_mib;
        to.kernel = from.kernel;
        to.initrd = from.initrd;
        to.kernel_release = from.kernel_release;
        to.agent_build = from.agent_build;
        to.phases = Some(phases).into();
        to.exits = from.exits.into_iter().collect();
        to.containers = from.containers;
        to.devices = from.devices.into_iter().map(device).collect();
        to.timings = from.timings.into_iter().map(Into::into).collect();
        to.max_vcpus = from.max_vcpus;
        to.memory = memory(from.memory);
        to.unasked_ejects = from.unasked_ejects;
        to
    }
}

fn traffic(from: Traffic) -> proto::Traffic {
    let mut to = proto::Traffic::new();
    to.link_up = from.link_up;
    to.received = from.received;
    to.received_bytes = from.received_bytes;
    to.receive_dropped = from.receive_dropped;
    to.sent = from.sent;
    to.sent_bytes = from.sent_bytes;
    to.send_dropped = from.send_dropped;
    to
}

fn traffic_of(from: proto::Traffic) -> Traffic {
    Traffic {
        link_up: from.link_up,
        received: from.received,
        received_bytes: from.received_bytes,
        receive_dropped: from.receive_dropped,
        sent: from.sent,
        sent_bytes: from.sent_bytes,
        send_dropped: from.send_dropped,
    }
}

fn memory(from: Memory) -> MessageField<proto::Memory> {
    let mut to = proto::Memory::new();
    to.boot_mib = from.boot_mib;
    to.plugged_mib = from.plugged_mib;
    to.max_mib = from.max_mib;
    to.given_back_mib = from.given_back_mib;
    Some(to).into()
}

fn memory_of(from: MessageField<proto::Memory>) -> Memory {
    let from = from.unwrap_or_default();
    Memory {
        boot_mib: from.boot_mib,
        plugged_mib: from.plugged_mib,
        max_mib: from.max_mib,
        given_back_mib: from.given_back_mib,
    }
}

impl From<proto::InspectResponse> for Inspection {
    fn from(from: proto::InspectResponse) -> Self {
        let phases = from.phases.unwrap_or_default();
        let reached = |ns: u64| (ns != 0).then_some(ns);
        let device = |from: proto::Device| Device {
            window: from
                .window_plus_one
                .checked_sub(1)
                .and_then(|window| u8::try_from(window).ok()),
            kind: from.kind,
            detail: from.detail,
            traffic: from.traffic.into_option().map(traffic_of),
        };
        Self {
            id: from.id,
            namespace: from.namespace,
            pid: from.pid,
            state: State::named(&from.state),
            vcpus: from.vcpus,
            memory_mib: from.memory_mib,
            kernel: from.kernel,
            initrd: from.initrd,
            kernel_release: from.kernel_release,
            agent_build: from.agent_build,
            phases: BootPhases {
                process_ns: reached(phases.process_ns),
                main_ns: reached(phases.main_ns),
                start_ns: phases.start_ns,
                kvm_ns: reached(phases.kvm_ns),
                loaded_ns: reached(phases.loaded_ns),
                first_run_ns: reached(phases.first_run_ns),
                first_exit_ns: reached(phases.first_exit_ns),
                init_ns: reached(phases.init_ns),
                connected_ns: reached(phases.connected_ns),
                ready_ns: reached(phases.ready_ns),
                guest_init_us: reached(phases.guest_init_us),
                guest_modules_us: reached(phases.guest_modules_us),
                guest_ready_us: reached(phases.guest_ready_us),
            },
            exits: from.exits.into_iter().collect(),
            containers: from.containers,
            devices: from.devices.into_iter().map(device).collect(),
            timings: from.timings.into_iter().map(Into::into).collect(),
            max_vcpus: from.max_vcpus,
            memory: memory_of(from.memory),
            unasked_ejects: from.unasked_ejects,
        }
    }
}

fn phase(from: Option<Phase>) -> MessageField<proto::Phase> {
    from.map(|from| {
        let mut to = proto::Phase::new();
        to.begin_ns = from.begin_ns;
        to.took_ns = from.took_ns;
        to
    })
    .into()
}

fn phase_of(from: MessageField<proto::Phase>) -> Option<Phase> {
    let from = from.into_option()?;
    Some(Phase {
        begin_ns: from.begin_ns,
        took_ns: from.took_ns,
    })
}

fn series(from: Series) -> MessageField<proto::Series> {
    let mut to = proto::Series::new();
    to.count = from.count;
    to.last_ns = from.last_ns;
    to.min_ns = from.min_ns;
    to.max_ns = from.max_ns;
    Some(to).into()
}

fn series_of(from: MessageField<proto::Series>) -> Series {
    let from = from.unwrap_or_default();
    Series {
        count: from.count,
        last_ns: from.last_ns,
        min_ns: from.min_ns,
        max_ns: from.max_ns,
    }
}

impl From<Timings> for proto::Timings {
    fn from(from: Timings) -> Self {
        let mut to = Self::new();
        to.container = from.container;
        to.deleted = from.deleted;
        to.shim_start = phase(from.shim_start);
        to.connect = phase(from.connect);
        to.create = phase(from.create);
        to.start = phase(from.start);
        to.first_output = phase(from.first_output);
        to.exec = series(from.exec);
        to.kill = series(from.kill);
        to.delete = series(from.delete);
        to
    }
}

impl From<proto::Timings> for Timings {
    fn from(from: proto::Timings) -> Self {
        Self {
            container: from.container,
            deleted: from.deleted,
            shim_start: phase_of(from.shim_start),
            connect: phase_of(from.connect),
            create: phase_of(from.create),
            start: phase_of(from.start),
            first_output: phase_of(from.first_output),
            exec: series_of(from.exec),
            kill: series_of(from.kill),
            delete: series_of(from.delete),
        }
    }
}

impl From<Usage> for proto::UsageResponse {
    fn from(from: Usage) -> Self {
        let mut to = Self::new();
        to.id = from.id;
        to.namespace = from.namespace;
        to.pid = from.pid;
        to.vcpus = from.vcpus;
        to.memory_mib = from.memory_mib;
        to.rss_kib = from.rss_kib;
        to.pss_kib = from.pss_kib;
        to.vcpu_cpu_ms = from.vcpu_cpu_ms;
        to.other_cpu_ms = from.other_cpu_ms;
        to.exits = from.exits.into_iter().collect();
        to.uptime_ms = from.uptime_ms;
        to.containers = from.containers;
        to.memory = memory(from.memory);
        to.used_mib_plus_one = from.used_mib.map_or(0, |mib| mib.saturating_add(1));
        to.max_vcpus = from.max_vcpus;
        to.unasked_ejects = from.unasked_ejects;
        to.clock = from
            .clock
            .map(|clock| proto::Clock {
                offset_us: clock.offset_us,
                round_trip_us: clock.round_trip_us,
                ..Default::default()
            })
            .into();
        to
    }
}

impl From<proto::UsageResponse> for Usage {
    fn from(from: proto::UsageResponse) -> Self {
        Self {
            id: from.id,
            namespace: from.namespace,
            pid: from.pid,
            vcpus: from.vcpus,
            memory_mib: from.memory_mib,
            rss_kib: from.rss_kib,
            pss_kib: from.pss_kib,
            vcpu_cpu_ms: from.vcpu_cpu_ms,
            other_cpu_ms: from.other_cpu_ms,
            exits: from.exits.into_iter().collect(),
            uptime_ms: from.uptime_ms,
            containers: from.containers,
            memory: memory_of(from.memory),
            used_mib: from.used_mib_plus_one.checked_sub(1),
            max_vcpus: from.max_vcpus,
            unasked_ejects: from.unasked_ejects,
            clock: from.clock.into_option().map(|clock| ClockReading {
                offset_us: clock.offset_us,
                round_trip_us: clock.round_trip_us,
            }),
        }
    }
}
