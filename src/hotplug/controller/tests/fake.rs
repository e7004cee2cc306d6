//! A VM that does what it is told, late or never, and keeps a diary.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::hotplug::{Actuator, Failure, FailureKind, Readings};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Read,
    Vcpus(u8),
    Memory(u64),
    Watch(u64),
}

/// What the guest does when it is asked next.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whim {
    Fail(FailureKind),
    /// It has this size afterwards, whatever it was asked for.
    Answer(u64),
    Panic,
}

#[derive(Debug)]
pub(super) struct State {
    pub vcpus: u8,
    pub memory_mib: u64,
    /// Of each CPU's time, from 0 to 1.
    pub load: f64,
    /// MiB.
    pub used: f64,
    /// Of every resize.
    pub latency: Duration,
    /// Of the next resizes, in turn.
    pub whims: VecDeque<Whim>,
    /// Of all resizes without a whim of their own.
    pub always: Option<Whim>,
    pub reading_fails: Option<FailureKind>,
    pub watch_fails: Option<FailureKind>,
    start: Instant,
    last: Instant,
    busy_us: f64,
    total_us: f64,
    watched: u64,
    calls: Vec<(Duration, Call)>,
    in_flight: usize,
    most_in_flight: usize,
}

impl State {
    /// Lets the counters run up to now.
    fn run(&mut self) {
        let passed = self.last.elapsed().as_secs_f64() * 1e6 * f64::from(self.vcpus);
        self.last = Instant::now();
        self.total_us += passed;
        self.busy_us += passed * self.load;
    }
}

#[derive(Debug, Clone)]
pub(super) struct Vm(Arc<Mutex<State>>);

impl Default for Vm {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            vcpus: 1,
            memory_mib: 512,
            load: 0.0,
            used: 60.0,
            latency: Duration::ZERO,
            whims: VecDeque::new(),
            always: None,
            reading_fails: None,
            watch_fails: None,
            start: Instant::now(),
            last: Instant::now(),
            busy_us: 0.0,
            total_us: 1000.0,
            watched: 0,
            calls: Vec::new(),
            in_flight: 0,
            most_in_flight: 0,
        })))
    }
}

/// Counts a call while it is in flight, also if it is given up.
struct Flight(Vm);

impl Flight {
    fn new(vm: &Vm, call: Call) -> Self {
        vm.change(|state| {
            state.calls.push((state.start.elapsed(), call));
            state.in_flight += 1;
            state.most_in_flight = state.most_in_flight.max(state.in_flight);
        });
        Self(vm.clone())
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.0.change(|state| state.in_flight -= 1);
    }
}

fn failure(kind: FailureKind) -> Failure {
    Failure {
        kind,
        message: "the guest does not want to".to_owned(),
    }
}

impl Vm {
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.lock().unwrap_or_else(|error| error.into_inner());
        state.run();
        change(&mut state)
    }

    pub(super) fn boot(&self, vcpus: u8, memory_mib: u64) {
        self.change(|state| (state.vcpus, state.memory_mib) = (vcpus, memory_mib));
    }

    pub(super) fn sizes(&self) -> (u8, u64) {
        self.change(|state| (state.vcpus, state.memory_mib))
    }

    pub(super) fn watched(&self) -> u64 {
        self.change(|state| state.watched)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.change(|state| state.in_flight)
    }

    pub(super) fn most_in_flight(&self) -> usize {
        self.change(|state| state.most_in_flight)
    }

    /// All calls, with the seconds since the start.
    pub(super) fn calls(&self) -> Vec<(u64, Call)> {
        self.change(|state| {
            let calls = state.calls.iter();
            calls.map(|(at, call)| (at.as_secs(), *call)).collect()
        })
    }

    /// Those that resize.
    pub(super) fn resizes(&self) -> Vec<(u64, Call)> {
        let mut calls = self.calls();
        calls.retain(|(_, call)| matches!(call, Call::Vcpus(_) | Call::Memory(_)));
        calls
    }

    pub(super) fn count(&self, call: &Call) -> usize {
        self.calls().iter().filter(|(_, made)| made == call).count()
    }

    async fn whim(&self) -> Result<Option<u64>, Failure> {
        let (latency, whim) =
            self.change(|state| (state.latency, state.whims.pop_front().or(state.always)));
        if !latency.is_zero() {
            sleep(latency).await;
        }
        match whim {
            Some(Whim::Fail(kind)) => Err(failure(kind)),
            Some(Whim::Answer(size)) => Ok(Some(size)),
            Some(Whim::Panic) => panic!("the actuator has a bug"),
            None => Ok(None),
        }
    }
}

impl Actuator for Vm {
    async fn read(&self) -> Result<Readings, Failure> {
        let _flight = Flight::new(self, Call::Read);
        self.change(|state| {
            if let Some(kind) = state.reading_fails {
                return Err(failure(kind));
            }
            let total = state.memory_mib << 20;
            let used = (state.used * f64::from(1 << 20)) as u64;
            Ok(Readings {
                vcpus_online: state.vcpus,
                cpu_busy_us: state.busy_us as u64,
                cpu_total_us: state.total_us as u64,
                throttled_us: 0,
                memory_mib: state.memory_mib,
                memory_total_bytes: total,
                memory_available_bytes: total.saturating_sub(used),
            })
        })
    }

    async fn resize_vcpus(&self, to: u8) -> Result<u8, Failure> {
        let _flight = Flight::new(self, Call::Vcpus(to));
        let size = self.whim().await?.unwrap_or(to.into());
        let size = u8::try_from(size).unwrap();
        self.change(|state| state.vcpus = size);
        Ok(size)
    }

    async fn resize_memory(&self, to_mib: u64) -> Result<u64, Failure> {
        let _flight = Flight::new(self, Call::Memory(to_mib));
        let size = self.whim().await?.unwrap_or(to_mib);
        self.change(|state| state.memory_mib = size);
        Ok(size)
    }

    async fn watch_memory(&self, high_bytes: u64) -> Result<(), Failure> {
        let _flight = Flight::new(self, Call::Watch(high_bytes));
        self.change(|state| match state.watch_fails {
            Some(kind) => Err(failure(kind)),
            None => {
                state.watched = high_bytes;
                Ok(())
            }
        })
    }
}
