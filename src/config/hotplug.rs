//! The tables `[hotplug]`, `[hotplug.cpu]` and `[hotplug.memory]`: when a VM
//! grows and shrinks by itself. What is made of them is in `crate::hotplug`.

use std::time::Duration;

use documented::DocumentedFields;
use serde::{Deserialize, Serialize};

use super::ByteSize;
use super::value;

/// VMs that grow and shrink with their load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields, expecting = "a table, [hotplug]")]
pub struct Hotplug {
    /// Whether VMs grow and shrink by themselves. If not, only Update and `vmctl resize` change their size.
    pub enabled: bool,
    /// vCPUs by load. The load is the time that the guest's online CPUs were busy since the last reading, in percent
    /// of the time that they were online.
    pub cpu: CpuRules,
    /// Memory by use. What is used is the guest's MemTotal without its MemAvailable, in percent of MemTotal.
    pub memory: MemoryRules,
}

/// When vCPUs come and go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields, expecting = "a table, [hotplug.cpu]")]
pub struct CpuRules {
    /// Between two readings, from 100ms to a year; 0: vCPUs do not come and go by themselves.
    #[serde(with = "value::interval")]
    pub interval: Duration,
    /// One vCPU more from this load on, in percent, 0 to 100; 0: whatever the load.
    #[serde(deserialize_with = "value::percent")]
    pub up_load: u8,
    /// Readings in a row that must say so, 0 to 255; 0 as 1.
    #[serde(deserialize_with = "value::readings")]
    pub up_readings: u8,
    /// A reading does not say so if containers were held back by their CPU limits for this share of the time, in
    /// percent, 0 to 100: they could not use a vCPU more. 0: however long they were.
    #[serde(deserialize_with = "value::percent")]
    pub up_throttled: u8,
    /// After any change of the count, before one vCPU more. Up to a year; 0: no wait.
    #[serde(with = "value::pause")]
    pub up_cooldown: Duration,
    /// One vCPU less if the load on one fewer would be at most this, in percent, 0 to 100, and less than up_load; 0:
    /// only if nothing runs at all.
    #[serde(deserialize_with = "value::percent")]
    pub down_load: u8,
    /// Readings in a row that must say so, 0 to 255; 0 as 1.
    #[serde(deserialize_with = "value::readings")]
    pub down_readings: u8,
    /// After any change of the count, before one vCPU less. Up to a year; 0: no wait.
    #[serde(with = "value::pause")]
    pub down_cooldown: Duration,
}

/// How memory comes and goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryWay {
    /// By virtio-mem if the guest has its driver, else by ACPI.
    #[default]
    Auto,
    /// By virtio-mem, in steps of 2 MiB.
    VirtioMem,
    /// By ACPI, in units that are fixed when the VM starts.
    Acpi,
}

/// When memory comes and goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, DocumentedFields)]
#[serde(default, deny_unknown_fields, expecting = "a table, [hotplug.memory]")]
pub struct MemoryRules {
    /// How memory comes and goes: virtio-mem, in steps of 2M; acpi, in units of 128M or more that are fixed when the VM starts; or
    /// auto, which is virtio-mem if the guest has its driver, else acpi.
    pub way: MemoryWay,
    /// Whether the guest gives back what it frees, within seconds (virtio-balloon with free page reporting). What it uses
    /// again then has to be taken from the host again.
    pub give_back: bool,
    /// Between two readings, from 100ms to a year; 0: memory does not come and go by itself, for a stall neither.
    #[serde(with = "value::interval")]
    pub interval: Duration,
    /// What comes or goes by a reading: a multiple of 2M, up to 1023G; 0: as interval 0. Guests without virtio-mem have
    /// steps of 128M.
    #[serde(deserialize_with = "value::step")]
    pub step: ByteSize,
    /// One step more from this use on, in percent, 0 to 100, if less than up_available is available; 0: whatever is
    /// used.
    #[serde(deserialize_with = "value::percent")]
    pub up_used: u8,
    /// One step more only with less than this available, up to 1023G; 0: never by a reading.
    #[serde(deserialize_with = "value::guest_memory")]
    pub up_available: ByteSize,
    /// Readings in a row that must say so, 0 to 255; 0 as 1.
    #[serde(deserialize_with = "value::readings")]
    pub up_readings: u8,
    /// After any change of the size, before one step more by a reading. Up to a year; 0: no wait.
    #[serde(with = "value::pause")]
    pub up_cooldown: Duration,
    /// One step less below this use, in percent, 0 to 100; 0: never.
    #[serde(deserialize_with = "value::percent")]
    pub down_used: u8,
    /// One step less only if this, and reserve, stay available without it, up to 1023G.
    #[serde(deserialize_with = "value::guest_memory")]
    pub down_available: ByteSize,
    /// Readings in a row that must say so, 0 to 255; 0 as 1.
    #[serde(deserialize_with = "value::readings")]
    pub down_readings: u8,
    /// After any change of the size, before one step less. Up to a year; 0: no wait.
    #[serde(with = "value::pause")]
    pub down_cooldown: Duration,
    /// Containers that together come this near to the guest's memory are slowed down until there is more, while there
    /// can be more. Up to 1023G, and in the guest at least a sixteenth and at most half of its memory.
    #[serde(deserialize_with = "value::guest_memory")]
    pub reserve: ByteSize,
    /// Most that comes at once when containers stall for want of memory, up to 1023G, but at least one step; 0:
    /// nothing, and they are not slowed down.
    #[serde(deserialize_with = "value::guest_memory")]
    pub burst: ByteSize,
}

impl Default for Hotplug {
    fn default() -> Self {
        Self {
            enabled: true,
            cpu: CpuRules::default(),
            memory: MemoryRules::default(),
        }
    }
}

impl Default for CpuRules {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(5),
            up_load: 80,
            up_readings: 2,
            up_throttled: 5,
            up_cooldown: Duration::from_secs(10),
            down_load: 50,
            down_readings: 6,
            down_cooldown: Duration::from_secs(30),
        }
    }
}

impl Default for MemoryRules {
    fn default() -> Self {
        Self {
            way: MemoryWay::Auto,
            give_back: true,
            interval: Duration::from_secs(10),
            step: ByteSize::from_mib(128),
            up_used: 85,
            up_available: ByteSize::from_mib(128),
            up_readings: 3,
            up_cooldown: Duration::from_secs(30),
            down_used: 60,
            down_available: ByteSize::from_mib(128),
            down_readings: 6,
            down_cooldown: Duration::from_secs(60),
            reserve: ByteSize::from_mib(192),
            burst: ByteSize::from_mib(1024),
        }
    }
}
