//! The order in which a shim ends. Every phase runs, once, whatever failed
//! before it, each within its time; what failed is collected and told at the end.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::OnceCell;
use tokio::time::Instant;

/// The phases, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Controllers of CPUs and memory stop, so that nothing resizes a VM that ends.
    Hotplug,
    /// What processes have written reaches its readers.
    Stdio,
    /// The guest ends its processes, unmounts and powers off.
    Guest,
    /// Connections to the guest close.
    Connections,
    /// The VM stops, if it has not.
    Vm,
    /// Network of the sandbox.
    Network,
    /// Mounts, disks and state files.
    Mounts,
    /// Exits of what was still alive, and events that wait for containerd.
    Events,
}

impl Phase {
    /// All, in order.
    pub const ORDER: [Self; 8] = [
        Self::Hotplug,
        Self::Stdio,
        Self::Guest,
        Self::Connections,
        Self::Vm,
        Self::Network,
        Self::Mounts,
        Self::Events,
    ];

    /// Its share of the time, and what those before it have left of theirs is its too. Together they stay
    /// well under the five seconds in which Shutdown must end the process, since a machine may be busy and all of it is
    /// used where no containerd takes the events. Most of it is for output, which is lost
    /// with the guest, and which may have [`Self::overrun`] too; a guest that does not power off in its time loses
    /// nothing that would be kept.
    pub const fn share(self) -> Duration {
        Duration::from_millis(match self {
            Self::Stdio => 2600,
            Self::Guest => 500,
            Self::Connections | Self::Vm | Self::Mounts => 200,
            Self::Events => 300,
            Self::Hotplug => 150,
            Self::Network => 350,
        })
    }

    /// What it may take beyond its share, if it knows a reason: output that comes, but slowly since the machine is
    /// busy, would be cut by the clock alone. The phases after it have their shares all the same.
    pub const fn overrun(self) -> Duration {
        match self {
            Self::Stdio => Duration::from_secs(15),
            _ => Duration::ZERO,
        }
    }
}

/// One phase that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which.
    pub phase: Phase,
    /// Why.
    pub cause: String,
}

/// What a clean-up came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What failed, in order; empty if all went well.
    pub failures: Vec<Failure>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Failure { phase, cause }) in self.failures.iter().enumerate() {
            write!(
                f,
                "{}{phase:?}: {cause}",
                if index == 0 { "" } else { "; " }
            )?;
        }
        Ok(())
    }
}

/// Who does the work of the phases. Each is called at most once, in
/// [`Phase::ORDER`]; when one is called, all before it have returned, failed, panicked or run out of time.
#[async_trait]
pub trait Steps: Send + Sync {
    /// Does one phase.
    async fn run(&self, phase: Phase) -> Result<(), String>;
}

/// Runs a shim's phases once, however many ask for it.
#[derive(Debug, Default)]
pub struct Cleanup {
    report: OnceCell<Report>,
    /// Milliseconds.
    granted: AtomicU64,
}

impl Cleanup {
    /// A phase takes `more` of its overrun.
    pub fn grant(&self, more: Duration) {
        let more = u64::try_from(more.as_millis()).unwrap_or(u64::MAX);
        self.granted.fetch_add(more, Ordering::Relaxed);
    }

    /// How much of their overrun phases have taken so far: by so much later the end may be.
    pub fn granted(&self) -> Duration {
        Duration::from_millis(self.granted.load(Ordering::Relaxed))
    }

    /// Runs the phases, or waits for the run that is under way, and answers with what it came to.
    pub async fn run(&self, steps: Arc<dyn Steps>) -> &Report {
        self.report
            .get_or_init(|| async {
                let mut report = Report::default();
                let mut deadline = Instant::now();
                for phase in Phase::ORDER {
                    deadline += phase.share();
                    let steps = steps.clone();
                    // A task of its own, so that a panic ends the phase and not the clean-up.
                    let mut step = tokio::spawn(async move { steps.run(phase).await });
                    let limit = deadline + phase.overrun();
                    let ended = tokio::time::timeout_at(limit, &mut step).await;
                    deadline = deadline.max(Instant::now());
                    let cause = match ended {
                        Ok(Ok(Ok(()))) => continue,
                        Ok(Ok(Err(cause))) => cause,
                        Ok(Err(_)) => "panicked".to_owned(),
                        Err(_) => {
                            step.abort();
                            "not done in time".to_owned()
                        }
                    };
                    tracing::warn!(?phase, %cause, "a clean-up phase failed");
                    report.failures.push(Failure { phase, cause });
                }
                report
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Recorder {
        ran: Mutex<Vec<Phase>>,
        fail: fn(Phase) -> bool,
        hang: Option<Phase>,
        panic: Option<Phase>,
    }

    impl Recorder {
        fn new(fail: fn(Phase) -> bool) -> Self {
            Self {
                ran: Mutex::default(),
                fail,
                hang: None,
                panic: None,
            }
        }
    }

    #[async_trait]
    impl Steps for Recorder {
        async fn run(&self, phase: Phase) -> Result<(), String> {
            self.ran.lock().unwrap().push(phase);
            if self.hang == Some(phase) {
                std::future::pending::<()>().await;
            }
            assert!(self.panic != Some(phase), "as asked");
            if (self.fail)(phase) {
                Err(format!("no {phase:?}"))
            } else {
                Ok(())
            }
        }
    }

    #[tokio::test]
    async fn every_phase_runs_in_order_whatever_failed() {
        let steps = Arc::new(Recorder::new(|_| true));
        let cleanup = Cleanup::default();
        let report = cleanup.run(steps.clone()).await;
        assert_eq!(*steps.ran.lock().unwrap(), Phase::ORDER);
        assert_eq!(report.failures.len(), Phase::ORDER.len());
        assert!(report.to_string().contains("Guest: no Guest"));
    }

    #[tokio::test]
    async fn a_second_run_does_nothing_and_says_the_same() {
        let steps = Arc::new(Recorder::new(|phase| phase == Phase::Guest));
        let cleanup = Cleanup::default();
        let (first, second) = tokio::join!(cleanup.run(steps.clone()), cleanup.run(steps.clone()));
        assert_eq!(first, second);
        assert_eq!(first.failures.len(), 1);
        cleanup.run(steps.clone()).await;
        assert_eq!(steps.ran.lock().unwrap().len(), Phase::ORDER.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_phase_that_hangs_or_panics_stops_no_other() {
        let mut steps = Recorder::new(|_| false);
        steps.hang = Some(Phase::Stdio);
        steps.panic = Some(Phase::Vm);
        let steps = Arc::new(steps);
        let cleanup = Cleanup::default();
        let report = cleanup.run(steps.clone()).await;
        assert_eq!(*steps.ran.lock().unwrap(), Phase::ORDER);
        let phases: Vec<_> = report
            .failures
            .iter()
            .map(|failure| failure.phase)
            .collect();
        assert_eq!(phases, [Phase::Stdio, Phase::Vm]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_phase_may_use_what_earlier_ones_left() {
        struct Slow;
        #[async_trait]
        impl Steps for Slow {
            async fn run(&self, phase: Phase) -> Result<(), String> {
                if phase == Phase::Mounts {
                    tokio::time::sleep(Phase::Mounts.share() * 5).await;
                }
                Ok(())
            }
        }
        let cleanup = Cleanup::default();
        assert!(cleanup.run(Arc::new(Slow)).await.failures.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn output_beyond_its_share_takes_no_time_from_what_follows() {
        struct Late(Mutex<Vec<(Phase, Duration)>>, Instant);
        #[async_trait]
        impl Steps for Late {
            async fn run(&self, phase: Phase) -> Result<(), String> {
                let at = self.1.elapsed();
                self.0.lock().unwrap().push((phase, at));
                match phase {
                    Phase::Stdio => tokio::time::sleep(phase.share() * 2).await,
                    Phase::Guest => std::future::pending().await,
                    _ => {}
                }
                Ok(())
            }
        }
        let steps = Arc::new(Late(Mutex::default(), Instant::now()));
        let cleanup = Cleanup::default();
        let report = cleanup.run(steps.clone()).await;
        assert_eq!(report.failures.len(), 1, "{report}");
        let began = |wanted| {
            let at = steps.0.lock().unwrap();
            at.iter().find(|(phase, _)| *phase == wanted).unwrap().1
        };
        let guest = began(Phase::Connections) - began(Phase::Guest);
        let share = Phase::Guest.share();
        assert!((share..share * 2).contains(&guest), "{guest:?}");
    }

    #[test]
    fn all_phases_together_stay_well_under_five_seconds() {
        let total: Duration = Phase::ORDER.iter().map(|phase| phase.share()).sum();
        assert!(total <= Duration::from_millis(4500), "{total:?}");
    }
}
