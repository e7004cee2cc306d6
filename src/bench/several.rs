//! What scenarios of several containers at once have in common: a table for each number of them.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use super::guest::GuestKernel;
use super::peers::{Peer, Surroundings};
use super::report::Report;
use super::run::Run;
use super::{Setting, as_root, each_once};
use crate::config::Config;

/// Measures until all rounds are done, something fails or a signal comes; what there is then is shown and written.
pub(super) fn run(
    scenario: &str,
    counts: &[u16],
    settings: Value,
    setting: &Setting,
    rounds: impl FnOnce(&Surroundings, &[Peer], &mut Run<'_>) -> Result<()>,
) -> Result<()> {
    each_once(counts)?;
    as_root()?;
    let peers = setting.peers()?;
    let busybox = setting.busybox()?;
    let patience = Duration::from_secs(setting.patience);
    let around = Surroundings::new(setting.rootfs.as_deref(), &busybox, patience)?;
    let mut run = Run::new(scenario, settings, setting);
    run.document.tables = tables(scenario, counts, &peers);
    let config = Config::load()?;
    run.document.guest_kernel = Some(GuestKernel::of(&config.kernel, Some(&config.initrd)));
    run.peers(&peers);
    let outcome = rounds(&around, &peers, &mut run);
    run.end(outcome)
}

pub(super) fn title(scenario: &str, count: u16) -> String {
    format!("{scenario}, {count} at once")
}

pub(super) fn tables(scenario: &str, counts: &[u16], peers: &[Peer]) -> Vec<Report> {
    let names = || peers.iter().map(|peer| peer.name);
    let table = |count: &u16| Report::new(title(scenario, *count), names());
    counts.iter().map(table).collect()
}
