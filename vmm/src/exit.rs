//! How a VM ended: one typed reason, whoever noticed it first.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use serde::Serialize;

/// Why a VM is no longer running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered itself off through the ACPI sleep register.
    PowerOff,
    /// The guest asked for a reset through the ACPI reset register (or an equivalent).
    Reboot,
    /// The guest's kernel reported a panic through pvpanic.
    Panic,
    /// A vCPU shut down, which is what a triple fault does.
    TripleFault {
        /// Index of the vCPU.
        vcpu: u8,
    },
    /// KVM could not go on with a vCPU.
    KvmError {
        /// Index of the vCPU.
        vcpu: u8,
        /// What KVM said, with the instruction pointer where it is known.
        message: String,
    },
    /// Our own code failed: a vCPU or device thread ended by a panic or an error.
    Internal {
        /// What failed.
        message: String,
    },
    /// The host stopped it.
    Stopped,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reboot => write!(f, "the guest asked for a reboot"),
            Self::Panic => write!(f, "the guest's kernel panicked"),
            Self::TripleFault { vcpu } => write!(f, "vCPU {vcpu} took a triple fault"),
            Self::KvmError { vcpu, message } => write!(f, "KVM failed on vCPU {vcpu}: {message}"),
            Self::Internal { message } => write!(f, "the VMM failed: {message}"),
            Self::Stopped => write!(f, "stopped by the host"),
        }
    }
}

/// The way of a VM to its end, shared by all that may end it: running, then a reason, then down.
/// The first reason stays.
#[derive(Debug, Default)]
pub struct Ending {
    /// Set with the first reason, for vCPU threads that look at it after every exit.
    ending: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
enum Progress {
    #[default]
    Running,
    /// A reason is known; threads are on their way out.
    Ending(ExitReason),
    /// Every thread is joined and everything is given back.
    Down(ExitReason),
}

#[derive(Debug, Default)]
struct State {
    progress: Progress,
    /// Of the waits that are under way, by their number.
    wakers: HashMap<u64, Waker>,
    next: u64,
}

impl Ending {
    /// Says why the VM ends. Only the first reason counts; whether this was it is the answer.
    pub fn report(&self, reason: ExitReason) -> bool {
        let mut state = self.lock();
        if !matches!(state.progress, Progress::Running) {
            return false;
        }
        tracing::debug!(%reason, "the VM ends");
        state.progress = Progress::Ending(reason);
        self.ending.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        true
    }

    /// Whether a reason is known. Cheap.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<ExitReason> {
        match &self.lock().progress {
            Progress::Running => None,
            Progress::Ending(reason) | Progress::Down(reason) => Some(reason.clone()),
        }
    }

    /// Blocks until there is a reason.
    pub fn wait_reason(&self) -> ExitReason {
        let mut state = self.lock();
        loop {
            if let Progress::Ending(reason) | Progress::Down(reason) = &state.progress {
                return reason.clone();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that everything is given back.
    pub fn finish(&self) {
        let wakers = {
            let mut state = self.lock();
            let reason = match std::mem::take(&mut state.progress) {
                Progress::Running => ExitReason::Stopped,
                Progress::Ending(reason) | Progress::Down(reason) => reason,
            };
            self.ending.store(true, Ordering::SeqCst);
            state.progress = Progress::Down(reason);
            self.changed.notify_all();
            std::mem::take(&mut state.wakers)
        };
        wakers.into_values().for_each(Waker::wake);
    }

    /// Blocks until everything is given back.
    pub fn wait_down(&self) -> ExitReason {
        let mut state = self.lock();
        loop {
            if let Progress::Down(reason) = &state.progress {
                return reason.clone();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// [`Self::wait_down`] as a future. Dropped before its end it leaves nothing behind: whoever waits for a call waits for this
    /// too, and there is no end to calls.
    pub fn down(&self) -> Down<'_> {
        Down {
            ending: self,
            number: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Ending::down`].
#[derive(Debug)]
pub struct Down<'e> {
    ending: &'e Ending,
    /// Of its waker, once it has waited.
    number: Option<u64>,
}

impl Future for Down<'_> {
    type Output = ExitReason;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<ExitReason> {
        let mut state = self.ending.lock();
        if let Progress::Down(reason) = &state.progress {
            return Poll::Ready(reason.clone());
        }
        let number = self.number.unwrap_or(state.next);
        if self.number.is_none() {
            state.next += 1;
        }
        let former = state.wakers.insert(number, context.waker().clone());
        drop(state);
        // Not under the lock: a waker may be the last to hold a task.
        drop(former);
        self.number = Some(number);
        Poll::Pending
    }
}

impl Drop for Down<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let former = self.ending.lock().wakers.remove(&number);
            drop(former);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let ending = Ending::default();
        assert_eq!(ending.reason(), None);
        assert!(ending.report(ExitReason::Panic));
        assert!(!ending.report(ExitReason::Reboot));
        assert_eq!(ending.wait_reason(), ExitReason::Panic);
        let mut context = Context::from_waker(Waker::noop());
        let mut down = pin!(ending.down());
        assert_eq!(down.as_mut().poll(&mut context), Poll::Pending);
        ending.finish();
        assert_eq!(
            down.as_mut().poll(&mut context),
            Poll::Ready(ExitReason::Panic)
        );
        assert_eq!(ending.wait_down(), ExitReason::Panic);
        assert!(!ending.report(ExitReason::Stopped));
    }

    #[test]
    fn a_wait_that_was_cancelled_leaves_nothing_and_the_others_are_woken_once() {
        struct Counted(std::sync::atomic::AtomicUsize);
        impl std::task::Wake for Counted {
            fn wake(self: std::sync::Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let counted = std::sync::Arc::new(Counted(0.into()));
        let ending = Ending::default();
        for _ in 0..100 {
            // As of so many tasks.
            let waker = Waker::from(std::sync::Arc::clone(&counted));
            let mut down = pin!(ending.down());
            assert!(
                down.as_mut()
                    .poll(&mut Context::from_waker(&waker))
                    .is_pending()
            );
        }
        assert_eq!(std::sync::Arc::strong_count(&counted), 1, "wakers are kept");
        let waker = Waker::from(std::sync::Arc::clone(&counted));
        let mut down = pin!(ending.down());
        for _ in 0..2 {
            assert!(
                down.as_mut()
                    .poll(&mut Context::from_waker(&waker))
                    .is_pending()
            );
        }
        ending.finish();
        assert_eq!(counted.0.load(Ordering::SeqCst), 1);
    }
}
