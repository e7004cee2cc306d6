//! What fails is logged once a kind, until it works again: a guest that refuses
//! for hours fills no log.

use crate::hotplug::{Failure, FailureKind};

/// What is done to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Read,
    Vcpus,
    Memory,
    Watch,
}

/// Failures that have been logged.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// At most one of each.
    told: Vec<(Doing, FailureKind)>,
}

impl Failures {
    /// It worked.
    pub(super) fn worked(&mut self, doing: Doing) {
        self.told.retain(|(told, _)| *told != doing);
    }

    /// It failed. Whether it is the first of its kind.
    pub(super) fn failed(&mut self, doing: Doing, what: &str, failure: &Failure) -> bool {
        let this = (doing, failure.kind);
        if self.told.contains(&this) {
            tracing::debug!("cannot {what}, again: {failure}");
            return false;
        }
        self.told.push(this);
        if failure.kind == FailureKind::Gone {
            tracing::debug!("cannot {what}: {failure}");
        } else {
            tracing::warn!("cannot {what} ({}): {failure}", failure.kind);
        }
        true
    }
}
