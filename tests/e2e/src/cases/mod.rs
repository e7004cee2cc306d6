//! The cases, by what they are about.

mod bootstrap;
mod containers;
mod lifecycle;
mod refusals;
mod vmctl;

use crate::suite::Case;

/// Every case, in the order in which they run.
pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        vmctl::CASES,
        bootstrap::CASES,
        containers::CASES,
        lifecycle::CASES,
        refusals::CASES,
    ]
    .into_iter()
    .flatten()
}
