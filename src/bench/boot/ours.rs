//! The phases of our own boots, T0 to T10: of `vmctl boot --timing`, which ends with the agent, and of a container by the shim. The VM's
//! are what the VMM stamped, by CLOCK_MONOTONIC; those of the caller are by the same clock here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::bench::first_byte::Prepared;
use crate::bench::peers::{NAMESPACE, Peer, Surroundings};
use crate::config::Config;
use crate::control::Client;
use crate::sandbox::{BootPhases, monotonic_ns};

/// Phases in their order; each is told as the time since the first.
pub(super) const PHASES: [&str; 11] = [
    "T0 process start",
    "T1 main",
    "T2 KVM's VM made",
    "T3 kernel in memory",
    "T4 first KVM_RUN",
    "T5 guest's kernel",
    "T6 guest's init",
    "T7 agent connected",
    "T8 agent ready",
    "T9 container started",
    "T10 first byte",
];

/// Exits of vCPUs by reason, and what they are called in a report.
pub(super) const EXITS: [(&str, &str); 8] = [
    ("port-read", "exits, port read"),
    ("port-write", "exits, port write"),
    ("mmio-read", "exits, device memory read"),
    ("mmio-write", "exits, device memory write"),
    ("halt", "exits, halt"),
    ("interrupted", "exits, interrupted"),
    ("again", "exits, awaiting start"),
    ("other", "exits, other"),
];

/// One boot of ours.
#[derive(Debug, PartialEq)]
pub(super) struct Phased {
    /// Milliseconds since T0, as far as it came.
    pub times: Vec<(&'static str, f64)>,
    /// Exits until then.
    pub exits: Vec<(&'static str, f64)>,
}

/// Of `vmctl boot --timing --json`.
#[derive(Debug, Deserialize)]
struct Told {
    phases: BootPhases,
    exits: BTreeMap<String, u64>,
}

/// By `vmctl boot --timing`: until the agent is ready.
pub(super) fn by_vmctl(
    vmctl: &Path,
    config: &Path,
    environment: &[(&'static str, PathBuf)],
) -> Result<Phased> {
    let began = monotonic_ns();
    let output = Command::new(vmctl)
        .args(["boot", "--timing", "--json"])
        .env("NACRE_CONFIG", config)
        .envs(environment.iter().cloned())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", vmctl.display()))?;
    ensure!(
        output.status.success(),
        "{} boot --timing: {}: {}",
        vmctl.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let told: Told = serde_json::from_slice(&output.stdout).context("reading vmctl's phases")?;
    phased(began, &told.phases, &told.exits, &[])
}

/// By the shim: until the first byte of a container. Its VM is looked at when that has come.
pub(super) fn by_shim(around: &Surroundings, peer: &Peer, config: &Config) -> Result<Phased> {
    let (container, stamps) = Prepared::new(around, peer)?.start()?;
    let directory = config.vm_dir(NAMESPACE, &container.id);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let seen = runtime.block_on(async { Client::connect(&directory).await?.inspect().await });
    let seen = seen.with_context(|| format!("inspecting the VM of {}", container.id))?;
    container.end()?;
    let ours = [(PHASES[9], stamps.started), (PHASES[10], stamps.first)];
    phased(stamps.began, &seen.phases, &seen.exits, &ours)
}

fn phased(
    began: u64,
    phases: &BootPhases,
    exits: &BTreeMap<String, u64>,
    more: &[(&'static str, u64)],
) -> Result<Phased> {
    let stamps = [
        Some(began),
        phases.main_ns,
        phases.kvm_ns,
        phases.loaded_ns,
        phases.first_run_ns,
        phases.first_exit_ns,
        phases.init_ns,
        phases.connected_ns,
        phases.ready_ns,
    ];
    let mut times = Vec::new();
    for (name, stamp) in PHASES.into_iter().zip(stamps) {
        let stamp = stamp.with_context(|| format!("{name} was not reached"))?;
        times.push((name, stamp));
    }
    times.extend(more);
    let since = |(name, stamp): (&'static str, u64)| -> Result<(&'static str, f64)> {
        let ns = stamp.checked_sub(began);
        let ns = ns.with_context(|| format!("{name} was before the process was started"))?;
        Ok((name, ns as f64 / 1e6))
    };
    let exits = EXITS.iter().filter_map(|(reason, name)| {
        let count = exits.get(*reason)?;
        Some((*name, *count as f64))
    });
    Ok(Phased {
        times: times.into_iter().map(since).collect::<Result<_>>()?,
        exits: exits.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached() -> BootPhases {
        BootPhases {
            main_ns: Some(2_000_000),
            start_ns: 2_500_000,
            kvm_ns: Some(3_000_000),
            loaded_ns: Some(4_000_000),
            first_run_ns: Some(5_000_000),
            first_exit_ns: Some(6_500_000),
            init_ns: Some(7_000_000),
            connected_ns: Some(8_000_000),
            ready_ns: Some(9_000_000),
            ..BootPhases::default()
        }
    }

    #[test]
    fn times_are_since_the_process_was_started() {
        let exits = BTreeMap::from([("port-write".to_owned(), 3), ("halt".to_owned(), 0)]);
        let more = [(PHASES[9], 10_000_000), (PHASES[10], 11_000_000)];
        let all = phased(1_000_000, &reached(), &exits, &more).unwrap();
        assert_eq!(all.times.len(), PHASES.len());
        assert!(
            all.times
                .iter()
                .map(|(name, _)| *name)
                .eq(PHASES.into_iter())
        );
        assert_eq!(all.times[0].1, 0.0);
        assert_eq!(all.times[5].1, 5.5);
        assert_eq!(all.times[10].1, 10.0);
        assert_eq!(
            all.exits,
            [("exits, port write", 3.0), ("exits, halt", 0.0)]
        );
    }

    #[test]
    fn a_phase_that_was_not_reached_or_cannot_be_is_named() {
        let without = BootPhases {
            first_exit_ns: None,
            ..reached()
        };
        let none = BTreeMap::new();
        let error = phased(1_000_000, &without, &none, &[]).unwrap_err();
        assert!(error.to_string().contains(PHASES[5]), "{error}");
        let error = phased(3_500_000, &reached(), &none, &[]).unwrap_err();
        assert!(error.to_string().contains(PHASES[1]), "{error}");
    }

    #[test]
    fn what_vmctl_prints_is_read() {
        let text = r#"{"id":"b","exit":null,"kernel_release":"6.1","agent_build":"0",
            "phases":{"process_ns":1,"main_ns":2,"start_ns":3,"kvm_ns":4,"loaded_ns":5,"first_run_ns":6,"first_exit_ns":7,
            "init_ns":8,"connected_ns":9,"ready_ns":10,"guest_init_us":1,"guest_modules_us":2,"guest_ready_us":3},
            "exits":{"port-read":4}}"#;
        let told: Told = serde_json::from_str(text).unwrap();
        let all = phased(1, &told.phases, &told.exits, &[]).unwrap();
        assert_eq!(all.exits, [("exits, port read", 4.0)]);
        assert_eq!(all.times.len(), 9);
    }
}
