//! Notes how long the phases of each container's life take, for the control
//! socket and the log. What is kept is a few numbers a container, and those of
//! the last containers that were deleted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Container, Shim};
use crate::control::{Phase, Timings, ms};
use crate::sandbox::monotonic_ns;

/// How many deleted containers are remembered.
const REMEMBERED: usize = 16;

/// When the shim came up; CLOCK_MONOTONIC in nanoseconds, 0 before.
#[derive(Debug, Default)]
pub(super) struct Startup {
    begun_ns: AtomicU64,
    serving_ns: AtomicU64,
    first_call_ns: AtomicU64,
}

impl Startup {
    /// A call has come in.
    pub fn touch(&self) {
        // The first one counts.
        let _ = self.first_call_ns.compare_exchange(
            0,
            monotonic_ns(),
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }

    /// Whether any call has come in.
    pub fn called(&self) -> bool {
        self.first_call_ns.load(Ordering::Relaxed) != 0
    }

    /// shim-start and connect.
    fn phases(&self) -> (Option<Phase>, Option<Phase>) {
        let known = |at: &AtomicU64| Some(at.load(Ordering::Relaxed)).filter(|ns| *ns != 0);
        let between =
            |from: &AtomicU64, to: &AtomicU64| Some(Phase::between(known(from)?, known(to)?));
        (
            between(&self.begun_ns, &self.serving_ns),
            between(&self.serving_ns, &self.first_call_ns),
        )
    }
}

/// Timings of containers that are gone, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Past(VecDeque<Timings>);

impl Past {
    fn keep(&mut self, timings: Timings) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(timings);
    }
}

impl Container {
    /// Its timings with what its stdio knows.
    fn timings(&self) -> Timings {
        let mut timings = self.timings.clone();
        if timings.first_output.is_none() {
            timings.first_output = self.first_output();
        }
        timings
    }

    fn first_output(&self) -> Option<Phase> {
        let at = self.init.io.as_ref()?.first_output_ns()?;
        Some(Phase::between(self.timings.start?.begin_ns, at))
    }

    /// Takes over what its stdio knows, which is about to go.
    pub(super) fn keep_first_output(&mut self) {
        self.timings.first_output = self.timings().first_output;
    }
}

impl Shim {
    /// The socket is served from now on. `begun_ns`: when `start` began, CLOCK_MONOTONIC.
    pub fn serves(&self, begun_ns: Option<u64>) {
        let startup = &self.startup;
        startup
            .begun_ns
            .store(begun_ns.unwrap_or(0), Ordering::Relaxed);
        startup.serving_ns.store(monotonic_ns(), Ordering::Relaxed);
    }

    /// Notes something that has happened to a container, if it is still there.
    pub(super) fn note(&self, id: &str, what: impl FnOnce(&mut Timings)) {
        if let Some(container) = self.lock().containers.get_mut(id) {
            what(&mut container.timings);
        }
    }

    /// A container is made by a Create that began at `begun_ns`: the first of the shim has its start-up.
    pub(super) fn note_create(&self, id: &str, begun_ns: u64) {
        let create = Phase::between(begun_ns, monotonic_ns());
        let (shim_start, connect) = if id == self.identity.container {
            self.startup.phases()
        } else {
            (None, None)
        };
        self.note(id, |timings| {
            timings.shim_start = shim_start;
            timings.connect = connect;
            timings.create = Some(create);
        });
    }

    /// A program runs by a Start that began at `begun_ns`; of a container's first one all that is known is logged.
    pub(super) fn note_start(&self, id: &str, exec_id: &str, begun_ns: u64) {
        let start = Phase::between(begun_ns, monotonic_ns());
        // The boot is of interest where the container's own beginning is.
        let boot_ms = exec_id.is_empty().then(|| self.boot_ms()).flatten();
        let line = {
            let mut state = self.lock();
            let Some(container) = state.containers.get_mut(id) else {
                return;
            };
            if exec_id.is_empty() {
                container.timings.start = Some(start);
                container.timings().line()
            } else if let Some(exec) = container.execs.get(exec_id) {
                let took = exec.adding_ns + start.took_ns;
                container.timings.exec.add(took);
                format!("exec {:.3}", ms(took))
            } else {
                return;
            }
        };
        tracing::info!(
            container = id,
            exec = exec_id,
            took_ms = line,
            boot_ms,
            "started"
        );
    }

    /// How long the guest's boot took, from the VM's being asked for to the agent's hello.
    fn boot_ms(&self) -> Option<f64> {
        let phases = self.sandbox_now()?.phases();
        Some(ms(phases.ready_ns?.saturating_sub(phases.start_ns)))
    }

    /// A container is gone by a Delete that began at `begun_ns`.
    pub(super) fn note_delete(&self, mut timings: Timings, begun_ns: u64) {
        timings.delete.add(monotonic_ns().saturating_sub(begun_ns));
        timings.deleted = true;
        tracing::info!(
            container = timings.container,
            took_ms = timings.line(),
            "deleted"
        );
        self.lock().past.keep(timings);
    }

    /// All that is known: of the containers that are gone, then of those that are there.
    pub fn timings(&self) -> Vec<Timings> {
        let state = self.lock();
        let mut present: Vec<Timings> = state.containers.values().map(Container::timings).collect();
        present.sort_by(|a, b| a.container.cmp(&b.container));
        state.past.0.iter().cloned().chain(present).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_call_ends_the_wait_for_it() {
        let startup = Startup::default();
        assert_eq!(startup.phases(), (None, None));
        startup.begun_ns.store(5, Ordering::Relaxed);
        startup.serving_ns.store(9, Ordering::Relaxed);
        assert!(!startup.called());
        startup.touch();
        assert!(startup.called());
        let first = startup.phases();
        startup.touch();
        assert_eq!(startup.phases(), first);
        let (shim_start, connect) = first;
        assert_eq!(shim_start, Some(Phase::between(5, 9)));
        assert_eq!(connect.unwrap().begin_ns, 9);
    }

    #[test]
    fn what_is_gone_is_remembered_up_to_a_number() {
        let mut past = Past::default();
        for number in 0..REMEMBERED + 3 {
            past.keep(Timings::of(&number.to_string()));
        }
        assert_eq!(past.0.len(), REMEMBERED);
        assert_eq!(past.0[0].container, "3");
    }
}
