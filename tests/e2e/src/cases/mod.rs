//! The cases, by what they are about.

mod attach;
mod bootstrap;
mod containers;
mod exec;
mod group;
mod lifecycle;
mod mute;
mod pause;
mod refusals;
mod stats;
mod tty;
mod vmctl;

use crate::suite::Case;

/// Every case, in the order in which they run.
pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        vmctl::CASES,
        bootstrap::CASES,
        containers::CASES,
        lifecycle::CASES,
        mute::CASES,
        refusals::CASES,
        exec::CASES,
        tty::CASES,
        attach::CASES,
        pause::CASES,
        stats::CASES,
        group::CASES,
    ]
    .into_iter()
    .flatten()
}
