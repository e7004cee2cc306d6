//! The guest's wall clock, which is to be the host's. It is set when the agent says hello, and put right when the way to the guest is
//! known; after that the guest's kernel counts on by kvm-clock, which knows nothing of what becomes of the host's clock. So it is set again when the host's is set or the host was
//! suspended, which the host's kernel tells, and looked at now and then, since the host's is kept in time by others.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nacre_protocol::agent::ClockRequest;
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::Serialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::agent::Agent;
use super::bring_up::BringUp;
use super::error::Error;
use super::machine::Machine;
use super::{Sandbox, chain};

/// How often the clocks are compared though nothing has happened: by then two good ones are some 30 ms apart.
const EVERY: Duration = Duration::from_secs(600);
/// Readings of which the quickest counts.
const READINGS: u32 = 4;
/// What the clocks may be apart, if the reading was as exact as that.
const TOLERANCE: Duration = Duration::from_millis(10);
/// The host's timer never goes off: in the year 2500.
const NEVER: i64 = 16_725_225_600;

/// How far the guest's wall clock is from the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ClockReading {
    /// Microseconds that the guest is ahead, as if its answer had been made in the middle of the round trip.
    pub offset_us: i64,
    /// Of asking, in microseconds: the offset is exact to half of it.
    pub round_trip_us: u64,
}

impl Sandbox {
    /// Compares the guest's wall clock with the host's, by the quickest of some readings; `None` if the agent is not ready or does
    /// not answer.
    pub async fn clock(&self) -> Option<ClockReading> {
        let agent = match &*self.0.state.borrow() {
            BringUp::Ready { agent, .. } => agent.clone(),
            _ => return None,
        };
        best(&agent, self.0.timeouts.agent).await.ok()
    }
}

fn nanoseconds(time: SystemTime) -> i64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// One reading; the guest's clock is moved as the request says before it.
async fn ask(
    agent: &Agent,
    deadline: Duration,
    request: ClockRequest,
) -> Result<ClockReading, Error> {
    let (began, host) = (Instant::now(), SystemTime::now());
    let answer = agent
        .call(
            "comparing clocks".to_owned(),
            deadline,
            |client, context| async move { client.clock(context, &request).await },
        )
        .await?;
    let round_trip = began.elapsed();
    let guest = i64::try_from(answer.realtime_ns).unwrap_or(i64::MAX);
    Ok(ClockReading {
        offset_us: guest.saturating_sub(nanoseconds(host + round_trip / 2)) / 1000,
        round_trip_us: u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX),
    })
}

async fn best(agent: &Agent, deadline: Duration) -> Result<ClockReading, Error> {
    let mut best = ask(agent, deadline, ClockRequest::new()).await?;
    for _ in 1..READINGS {
        let next = ask(agent, deadline, ClockRequest::new()).await?;
        if next.round_trip_us < best.round_trip_us {
            best = next;
        }
    }
    Ok(best)
}

/// Whether the clocks are as close as they can be told to be.
fn agree(reading: ClockReading) -> bool {
    let exact = u64::try_from(TOLERANCE.as_micros()).unwrap_or(u64::MAX);
    reading.offset_us.unsigned_abs() <= exact.max(reading.round_trip_us / 2)
}

/// Sets the guest's clock if it is off; at once where nothing runs there yet. A guest that does not do it is asked once.
async fn set(agent: &Agent, deadline: Duration, id: &str, at_once: bool) -> Result<(), Error> {
    let before = best(agent, deadline).await?;
    if agree(before) {
        return Ok(());
    }
    let mut request = ClockRequest::new();
    request.adjust_ns = before.offset_us.saturating_neg().saturating_mul(1000);
    request.at_once = at_once;
    let after = ask(agent, deadline, request).await?;
    tracing::info!(
        id,
        offset_us = before.offset_us,
        now_us = after.offset_us,
        "the guest's clock was set"
    );
    Ok(())
}

/// Tells when the host's wall clock was set, or the host has slept.
struct Changes(AsyncFd<std::os::fd::OwnedFd>);

impl Changes {
    fn watch() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        let never = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: NEVER,
                tv_nsec: 0,
            },
        };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&timer, flags, &never)?;
        // SAFETY: the timer is an owned descriptor, so it is open and the same one until it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) };
        Ok(Self(watched?))
    }

    /// The next change.
    async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut [0; 8]) {
                // It was set; or it is the year 2500.
                Err(Errno::CANCELED) | Ok(_) => return Ok(()),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Keeps the guest's clock until the VM has ended.
pub(super) async fn keep(agent: &Agent, machine: &Arc<dyn Machine>, deadline: Duration, id: &str) {
    let mut changes = Changes::watch()
        .inspect_err(|error| {
            tracing::warn!(id, %error, "cannot watch the host's clock; the guest's is compared now and then");
        })
        .ok();
    let mut at_once = true;
    loop {
        if let Err(error) = set(agent, deadline, id, at_once).await {
            tracing::debug!(id, error = chain(&error), "the guest's clock was not set");
        }
        at_once = false;
        let told = async {
            match &changes {
                Some(changes) => changes.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = machine.ended() => return,
            change = told => if let Err(error) = change {
                tracing::warn!(id, %error, "the host's clock is not watched any more");
                changes = None;
            },
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_agree_as_far_as_the_reading_is_exact() {
        for (offset_us, round_trip_us, agrees) in [
            (0, 0, true),
            (10_000, 100, true),
            (-10_001, 100, false),
            (-40_000, 80_000, true),
            (40_001, 80_000, false),
            (i64::MIN, 1, false),
            (i64::MAX, u64::MAX, true),
        ] {
            let reading = ClockReading {
                offset_us,
                round_trip_us,
            };
            assert_eq!(agree(reading), agrees, "{reading:?}");
        }
    }
}
