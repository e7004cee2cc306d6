//! The guest's wall clock, which is the host's whatever becomes of that.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::context::Context;
use crate::poll;
use crate::shell::{Kernel, Shell};
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[Case {
    name: "the guest's clock is the host's, also when that is set",
    subject: Subject::Alone,
    seconds: (150, 150),
    run: follows,
}];

/// What the clocks may be apart, beyond what the reading is exact to.
const APART_US: i64 = 50_000;

/// The machine's clock, which is put right again however the case ends.
struct HostClock {
    began: Instant,
    at: Duration,
}

impl HostClock {
    fn now() -> Result<Duration> {
        Ok(clock_gettime(ClockId::CLOCK_REALTIME)?.into())
    }

    fn take() -> Result<Self> {
        Ok(Self {
            began: Instant::now(),
            at: Self::now()?,
        })
    }

    /// Sets it so many seconds from what is right.
    fn set(&self, off: i64) -> Result<()> {
        let right = self.at + self.began.elapsed();
        let seconds = right.as_secs().checked_add_signed(off).context("a time")?;
        let to = Duration::new(seconds, right.subsec_nanos());
        clock_settime(ClockId::CLOCK_REALTIME, to.into()).context("setting the machine's clock")
    }
}

impl Drop for HostClock {
    fn drop(&mut self) {
        if let Err(error) = self.set(0) {
            eprintln!("  {error:#}");
        }
    }
}

/// The best of ten readings: how far the clocks are apart for certain, in microseconds.
fn apart(shell: &Shell<'_>) -> Result<i64> {
    let mut best = i64::MAX;
    for _ in 0..10 {
        let usage = shell.usage()?;
        let clock = &usage["clock"];
        let figure = |name: &str| {
            let value = clock[name].as_i64();
            value.with_context(|| format!("no {name} in {usage}"))
        };
        let (offset, round_trip) = (figure("offset_us")?, figure("round_trip_us")?);
        eprintln!("  the guest is {offset} µs ahead, asked within {round_trip} µs");
        best = best.min((offset.abs() - round_trip / 2).max(0));
    }
    Ok(best)
}

fn follows(context: &Context) -> Result<()> {
    let clock = HostClock::take()?;
    let mut shell = Shell::start(context, "clock", Kernel::Usual, &[])?;
    let first = apart(&shell)?;
    ensure!(first < APART_US, "after the boot they are {first} µs apart");
    for off in [3600, -7200, 0] {
        clock.set(off)?;
        poll::until("the guest's new time", context.seconds(15), || {
            let guest = shell.number("date +%s")?;
            let host = HostClock::now()?.as_secs();
            Ok((guest.abs_diff(host) <= 2).then_some(()))
        })?;
        let now = apart(&shell)?;
        ensure!(
            now < APART_US,
            "with the host's clock set by {off} s they are {now} µs apart"
        );
    }
    shell.end()
}
