//! The controller's task. All of it is in one place and owned by it: no lock,
//! and nothing runs beside an actuation.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::failures::{Doing, Failures};
use super::{Change, Command, Pressure, SetError, Sizes, plan};
use crate::config::Hotplug;
use crate::hotplug::{
    Actuator, CpuPolicy, CpuReading, Decision, Failure, FailureKind, MemoryPolicy, MemoryReading,
    Readings, Room,
};

/// Longest time between two readings that fail.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// What can happen.
enum Event {
    Command(Command),
    Pressure(Pressure),
    Due,
    /// Nobody is left to command.
    Abandoned,
}

pub(super) struct Work<A> {
    actuator: A,
    commands: mpsc::Receiver<Command>,
    pressure: mpsc::Receiver<Pressure>,
    shown: watch::Sender<Sizes>,
    cpu: CpuPolicy,
    memory: MemoryPolicy,
    /// Policies' times are since here.
    start: Instant,
    /// When the next reading of each is due; None: never.
    cpu_due: Option<Duration>,
    memory_due: Option<Duration>,
    paused: bool,
    /// The VM has ended.
    gone: bool,
    /// What the guest watches for; 0: nothing.
    watched: u64,
    /// MemTotal, as last known; 0: not yet.
    total_bytes: u64,
    /// What waits to be told of stalls is of a size that is no more.
    stale: bool,
    /// Readings in a row that failed.
    unread: u32,
    failures: Failures,
}

impl<A: Actuator> Work<A> {
    pub(super) fn new(
        rules: &Hotplug,
        room: Room,
        actuator: A,
        commands: mpsc::Receiver<Command>,
        pressure: mpsc::Receiver<Pressure>,
        shown: watch::Sender<Sizes>,
    ) -> Self {
        let (mut cpu, mut memory) = (rules.cpu.clone(), rules.memory.clone());
        if !rules.enabled {
            cpu.interval = Duration::ZERO;
            memory.interval = Duration::ZERO;
        }
        let (vcpus, mib) = (room.vcpus.boot(), room.memory_mib.boot());
        Self {
            actuator,
            commands,
            pressure,
            shown,
            cpu: CpuPolicy::new(cpu, room.vcpus, vcpus),
            memory: MemoryPolicy::new(memory, room.memory_mib, mib),
            start: Instant::now(),
            cpu_due: None,
            memory_due: None,
            paused: false,
            gone: false,
            watched: 0,
            total_bytes: 0,
            stale: false,
            unread: 0,
            failures: Failures::default(),
        }
    }

    pub(super) async fn run(&mut self) {
        loop {
            self.plan_readings();
            match self.next().await {
                Event::Command(Command::Set(change, answer)) => {
                    let result = self.set(&change).await;
                    // The caller may have gone.
                    let _ = answer.send(result);
                }
                Event::Command(Command::Pause(pause, answer)) => {
                    self.pause(pause).await;
                    let _ = answer.send(());
                }
                Event::Pressure(pressure) => self.relieve(pressure).await,
                Event::Due => self.read().await,
                Event::Abandoned => return,
            }
        }
    }

    /// The branches are tried in no fixed order, so that a guest that stalls all the time keeps nobody waiting.
    async fn next(&mut self) -> Event {
        let due = [self.cpu_due, self.memory_due].into_iter().flatten().min();
        let due = due.map(|due| self.start + due);
        tokio::select! {
            command = self.commands.recv() => command.map_or(Event::Abandoned, Event::Command),
            Some(pressure) = self.pressure.recv() => Event::Pressure(pressure),
            () = at(due) => Event::Due,
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Readings that were none begin now; those that could change nothing any more end.
    fn plan_readings(&mut self) {
        let on = !self.paused && !self.gone;
        let now = self.now();
        let cpu = self.cpu.interval().filter(|_| on);
        self.cpu_due = cpu.map(|_| self.cpu_due.unwrap_or(now));
        let memory = self.memory.interval().filter(|_| on);
        self.memory_due = memory.map(|_| self.memory_due.unwrap_or(now));
        self.shown.send_replace(self.sizes());
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vcpus: self.cpu.current(),
            memory_mib: self.memory.current(),
        }
    }

    /// One reading, for all that are due. Their times are when they were due, so that neither a late wake-up nor the time
    /// that the guest takes to answer shifts a cooldown past the next reading.
    async fn read(&mut self) {
        let now = self.now();
        let readings = match self.actuator.read().await {
            Ok(readings) => readings,
            Err(failure) => {
                self.failed(Doing::Read, "read what the VM uses", &failure);
                self.unread = self.unread.saturating_add(1);
                self.schedule(now);
                return;
            }
        };
        self.failures.worked(Doing::Read);
        self.unread = 0;
        let (cpu_due, memory_due) = (self.cpu_due, self.memory_due);
        self.schedule(now);
        // Memory first: who lacks it stands still.
        if let Some(due) = memory_due.filter(|due| *due <= now) {
            self.follow_memory(due, &readings).await;
        }
        if let Some(due) = cpu_due.filter(|due| *due <= now) {
            self.follow_cpu(due, &readings).await;
        }
    }

    /// The next time of each reading that is due: a whole number of intervals after it, and later while readings fail.
    fn schedule(&mut self, now: Duration) {
        let next = |due: &mut Option<Duration>, interval: Option<Duration>| {
            let (Some(at), Some(interval)) = (due.filter(|at| *at <= now), interval) else {
                return;
            };
            let longest = LONGEST_RETRY.max(interval);
            let wait = interval.saturating_mul(1 << self.unread.min(16));
            *due = Some(after(at, wait.min(longest), now));
        };
        next(&mut self.cpu_due, self.cpu.interval());
        next(&mut self.memory_due, self.memory.interval());
    }

    async fn follow_memory(&mut self, now: Duration, readings: &Readings) {
        let reading = MemoryReading {
            size_mib: readings.memory_mib,
            total_bytes: readings.memory_total_bytes,
            available_bytes: readings.memory_available_bytes,
        };
        self.total_bytes = readings.memory_total_bytes;
        match self.memory.step(now, &reading) {
            Decision::Hold(reason) => tracing::trace!(%reason, "memory stays"),
            Decision::Up(to) | Decision::Down(to) => {
                // A failure is logged, and the policy knows.
                let _ = self.resize_memory(to, "used").await;
            }
        }
        self.watch().await;
    }

    async fn follow_cpu(&mut self, now: Duration, readings: &Readings) {
        let reading = CpuReading {
            online: readings.vcpus_online,
            busy_us: readings.cpu_busy_us,
            total_us: readings.cpu_total_us,
            throttled_us: readings.throttled_us,
        };
        match self.cpu.step(now, &reading) {
            Decision::Hold(reason) => tracing::trace!(%reason, "vCPUs stay"),
            Decision::Up(to) | Decision::Down(to) => {
                let _ = self.resize_vcpus(to, "load").await;
            }
        }
    }

    /// Containers stall.
    async fn relieve(&mut self, pressure: Pressure) {
        if self.paused || self.gone {
            return;
        }
        let now = self.now();
        let decision = self
            .memory
            .pressure(now, pressure.total_bytes, pressure.available_bytes);
        match decision {
            Decision::Hold(reason) => tracing::trace!(%reason, "containers stall, memory stays"),
            Decision::Up(to) | Decision::Down(to) => {
                self.total_bytes = pressure.total_bytes;
                let _ = self.resize_memory(to, "stall").await;
                self.watch().await;
            }
        }
    }

    async fn resize_memory(&mut self, to: u64, why: &'static str) -> Result<u64, Failure> {
        let (before, begun) = (self.memory.current(), self.now());
        self.stale = true;
        let result = self.actuator.resize_memory(to).await;
        let now = self.now();
        match &result {
            Ok(actual) => {
                self.memory.settled(now, *actual);
                // The guest's own figure comes with the next reading.
                let (more, less) = (
                    actual.saturating_sub(before),
                    before.saturating_sub(*actual),
                );
                self.total_bytes = self
                    .total_bytes
                    .saturating_add(more.saturating_mul(1 << 20))
                    .saturating_sub(less.saturating_mul(1 << 20));
                self.resized(
                    Doing::Memory,
                    "memory_mib",
                    [before, to, *actual],
                    now - begun,
                    why,
                );
            }
            Err(failure) => {
                self.memory.failed(now);
                let what = format!("resize the memory from {before} to {to} MiB");
                self.failed(Doing::Memory, &what, failure);
            }
        }
        result
    }

    async fn resize_vcpus(&mut self, to: u8, why: &'static str) -> Result<u8, Failure> {
        let (before, begun) = (self.cpu.current(), self.now());
        let result = self.actuator.resize_vcpus(to).await;
        let now = self.now();
        match &result {
            Ok(actual) => {
                self.cpu.settled(now, *actual);
                let sizes = [before.into(), to.into(), (*actual).into()];
                self.resized(Doing::Vcpus, "vcpus", sizes, now - begun, why);
            }
            Err(failure) => {
                self.cpu.failed(now);
                let what = format!("change the vCPUs from {before} to {to}");
                self.failed(Doing::Vcpus, &what, failure);
            }
        }
        result
    }

    fn resized(
        &mut self,
        doing: Doing,
        what: &'static str,
        [before, to, actual]: [u64; 3],
        took: Duration,
        why: &'static str,
    ) {
        if actual == before && to != before {
            let failure = Failure {
                kind: FailureKind::Refused,
                message: format!("the VM still has {actual}"),
            };
            self.failed(
                doing,
                &format!("change {what} from {before} to {to}"),
                &failure,
            );
            return;
        }
        self.failures.worked(doing);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(before, to, actual, took_ms, why, "{what} resized");
    }

    fn failed(&mut self, doing: Doing, what: &str, failure: &Failure) {
        self.failures.failed(doing, what, failure);
        self.gone |= failure.kind == FailureKind::Gone;
    }

    /// Has the guest watch for what fits the present size, if it does not yet. After a change, stalls that were told
    /// before it are forgotten: a guest that still stalls says it again.
    async fn watch(&mut self) {
        let high = if self.paused {
            0
        } else {
            self.memory.high_bytes(self.now(), self.total_bytes)
        };
        if high != self.watched && !self.gone {
            match self.actuator.watch_memory(high).await {
                Ok(()) => {
                    self.watched = high;
                    self.failures.worked(Doing::Watch);
                }
                // It is tried again after the next reading or change.
                Err(failure) => self.failed(
                    Doing::Watch,
                    &format!("have the guest watch for {high} bytes"),
                    &failure,
                ),
            }
        }
        if std::mem::take(&mut self.stale) {
            while self.pressure.try_recv().is_ok() {}
        }
    }

    async fn pause(&mut self, pause: bool) {
        self.paused = pause;
        self.watch().await;
    }

    async fn set(&mut self, change: &Change) -> Result<Sizes, SetError> {
        let (vcpus, memory) = (&change.vcpus, &change.memory_mib);
        let (cpu_bounds, vcpus) = plan(vcpus, self.cpu.bounds(), self.cpu.current(), "vCPUs")?;
        let (memory_bounds, mib) = plan(
            memory,
            self.memory.bounds(),
            self.memory.current(),
            "MiB of memory",
        )?;
        self.cpu.set_bounds(cpu_bounds);
        self.memory.set_bounds(memory_bounds);
        let mut result = Ok(());
        if let Some(to) = mib {
            match self.resize_memory(to, "asked for").await {
                Ok(actual) => self.memory.set(self.now(), actual),
                Err(source) => {
                    result = Err(SetError::Failed {
                        asked: format!("{to} MiB of memory"),
                        source,
                    });
                }
            }
        }
        if let Some(to) = vcpus {
            match self.resize_vcpus(to, "asked for").await {
                Ok(actual) => self.cpu.set(self.now(), actual),
                Err(source) => {
                    result = result.and(Err(SetError::Failed {
                        asked: format!("{to} vCPUs"),
                        source,
                    }));
                }
            }
        }
        // Also when bounds alone have moved.
        self.watch().await;
        result.map(|()| self.sizes())
    }
}

/// At `due`, or never.
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// The first time after `now` that is a whole number of intervals after `at`.
fn after(at: Duration, interval: Duration, now: Duration) -> Duration {
    let interval = interval.max(Duration::from_millis(1));
    let passed = now.saturating_sub(at).as_nanos() / interval.as_nanos();
    let whole = u32::try_from(passed).unwrap_or(u32::MAX).saturating_add(1);
    at.saturating_add(interval.saturating_mul(whole))
}
