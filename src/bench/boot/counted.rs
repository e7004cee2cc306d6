//! What a process and its children cost beside time: CPU time and page faults, which every kernel counts, and by perf events
//! instructions, system calls and exits of its vCPUs, where there are such events.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::TimeVal;
use perf_event::events::{Hardware, Tracepoint};
use perf_event::{Builder, Counter};

use crate::bench::report::Unit;

/// Where the kernel has its tracepoints.
const TRACING: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
/// Tracepoints, and what they count.
const TRACED: [(&str, &str); 3] = [
    ("system calls", "raw_syscalls/sys_enter"),
    ("exits, all", "kvm/kvm_exit"),
    ("exits to the VMM", "kvm/kvm_userspace_exit"),
];
/// What a counter of the machine counts.
pub(super) const INSTRUCTIONS: &str = "instructions";

/// A number of one boot.
pub(super) type Number = (&'static str, Unit, f64);

/// Counts what one child does, from its exec to its end, with all of its own children and threads. Before it is started, nothing else
/// may be, and no other child may end before it does.
pub(super) struct Counting {
    before: Usage,
    events: Vec<(&'static str, Counter)>,
}

/// Why an event is not counted.
pub(super) type Missing = (&'static str, std::io::Error);

impl Counting {
    /// Of the child that this thread starts next.
    pub fn begin() -> Result<(Self, Vec<Missing>)> {
        let (mut events, mut missing) = (Vec::new(), Vec::new());
        let traced = TRACED.map(|(name, point)| (name, tracepoint(point)));
        let counters = std::iter::once((INSTRUCTIONS, of_the_child(Hardware::INSTRUCTIONS)))
            .chain(traced.map(|(name, point)| (name, point.and_then(of_the_child))));
        for (name, counter) in counters {
            match counter {
                Ok(counter) => events.push((name, counter)),
                Err(error) => missing.push((name, error)),
            }
        }
        let this = Self {
            before: children()?,
            events,
        };
        Ok((this, missing))
    }

    /// What it was, once the child has ended and was waited for.
    pub fn end(self) -> Result<Vec<Number>> {
        let after = children()?;
        let time = |of: fn(&Usage) -> TimeVal| ms(of(&after)) - ms(of(&self.before));
        let count = |of: fn(&Usage) -> i64| (of(&after) - of(&self.before)) as f64;
        let (user, system) = (time(Usage::user_time), time(Usage::system_time));
        let mut numbers = vec![
            ("CPU time", Unit::Ms, user + system),
            ("CPU time, user and guest", Unit::Ms, user),
            ("CPU time, kernel", Unit::Ms, system),
            (
                "page faults, minor",
                Unit::Count,
                count(Usage::minor_page_faults),
            ),
            (
                "page faults, major",
                Unit::Count,
                count(Usage::major_page_faults),
            ),
        ];
        for (name, mut counter) in self.events {
            let value = counter.read().with_context(|| format!("counting {name}"))?;
            numbers.push((name, Unit::Count, value as f64));
        }
        Ok(numbers)
    }
}

/// A counter that a child of this thread begins with at its exec; this thread itself never does, having none.
fn of_the_child(event: impl perf_event::events::Event) -> std::io::Result<Counter> {
    Builder::new(event)
        .observe_self()
        .inherit(true)
        .enabled(false)
        .enable_on_exec(true)
        .include_kernel()
        .build()
}

fn tracepoint(name: &str) -> std::io::Result<Tracepoint> {
    let mut last = std::io::ErrorKind::NotFound.into();
    for folder in TRACING {
        let file = Path::new(folder).join("events").join(name).join("id");
        match std::fs::read_to_string(file) {
            Ok(id) => {
                let id = id.trim().parse().map_err(std::io::Error::other)?;
                return Ok(Tracepoint::with_id(id));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn children() -> Result<Usage> {
    getrusage(UsageWho::RUSAGE_CHILDREN).context("asking for the usage of children")
}

fn ms(time: TimeVal) -> f64 {
    let micros = time.tv_sec() * 1_000_000 + time.tv_usec();
    Duration::from_micros(u64::try_from(micros).unwrap_or_default()).as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_a_child_does_is_counted() {
        let (counting, missing) = Counting::begin().unwrap();
        let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done";
        let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        assert!(child.wait().unwrap().success());
        let numbers = counting.end().unwrap();
        let of = |wanted: &str| {
            let found = numbers.iter().find(|(name, ..)| *name == wanted);
            found.map(|(.., value)| *value)
        };
        // Other tests have children too, which can only add.
        assert!(of("CPU time").unwrap() > 0.0, "{numbers:?}");
        assert!(of("page faults, minor").unwrap() > 10.0, "{numbers:?}");
        // Each event is counted, or it is known why not.
        for name in std::iter::once(INSTRUCTIONS).chain(TRACED.map(|(name, _)| name)) {
            let absent = missing.iter().any(|(missing, _)| *missing == name);
            assert_eq!(of(name).is_none(), absent, "{name} in {numbers:?}");
        }
        if let Some(calls) = of("system calls") {
            assert!(calls > 10.0, "{numbers:?}");
        }
    }

    #[test]
    fn a_tracepoint_that_is_not_there_is_an_error() {
        assert!(tracepoint("nacre/nothing").is_err());
    }
}
