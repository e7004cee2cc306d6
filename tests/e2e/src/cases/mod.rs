//! The cases, by what they are about.

mod attach;
mod bench;
mod bootstrap;
mod calls;
mod clock;
mod containers;
mod dying;
mod exec;
mod group;
mod hooks;
mod host_cgroup;
mod hotplug;
mod hotplug_devices;
mod hotplug_hostile;
mod hotplug_limits;
mod inspect;
mod lifecycle;
mod mute;
mod network;
mod pause;
mod races;
mod refusals;
mod resize;
mod restart;
mod rootfs;
mod stats;
mod tty;
mod vmctl;
mod volumes;

use crate::suite::Case;

/// Every case, in the order in which they run.
pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        vmctl::CASES,
        hotplug::CASES,
        hotplug_limits::CASES,
        hotplug_devices::CASES,
        hotplug_hostile::CASES,
        bootstrap::CASES,
        calls::CASES,
        races::CASES,
        dying::CASES,
        containers::CASES,
        lifecycle::CASES,
        restart::CASES,
        mute::CASES,
        refusals::CASES,
        exec::CASES,
        tty::CASES,
        attach::CASES,
        pause::CASES,
        stats::CASES,
        group::CASES,
        resize::CASES,
        rootfs::CASES,
        volumes::CASES,
        inspect::CASES,
        clock::CASES,
        network::CASES,
        bench::CASES,
        host_cgroup::CASES,
        hooks::CASES,
    ]
    .into_iter()
    .flatten()
}
