//! Where a vCPU's thread stands while its vCPU is out of the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::exit::Ending;

/// Longest time that a vCPU's thread takes to come out of the guest when it is kicked.
const PARKED_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// The thread runs the guest.
    #[default]
    Open,
    /// The thread is to stop and stand here.
    Closing,
    /// It stands here.
    Parked,
}

/// A gate that one vCPU's thread passes before each entry into the guest.
#[derive(Debug, Default)]
pub struct Gate {
    /// Not open, for a look without the lock.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes it; the thread is to be kicked out of the guest after that.
    pub fn close(&self) {
        let mut state = self.lock();
        if *state == State::Open {
            *state = State::Closing;
            self.closed.store(true, Ordering::SeqCst);
        }
    }

    /// Opens it, once the thread stands before it. Whether it does: a thread that does not come is none to rely on.
    pub fn open(&self) -> bool {
        let deadline = Instant::now() + PARKED_WITHIN;
        let mut state = self.lock();
        while *state == State::Closing {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *state = State::Open;
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
        true
    }

    /// Wakes a thread that stands here, to look whether the VM ends.
    pub fn wake(&self) {
        let _state = self.lock();
        self.changed.notify_all();
    }

    /// Whether the thread is to stand here. Cheap.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// The vCPU's thread stands here until the gate opens or the VM ends; whether it opened.
    pub fn stand(&self, ending: &Ending) -> bool {
        let mut state = self.lock();
        if *state == State::Closing {
            *state = State::Parked;
            self.changed.notify_all();
        }
        while *state == State::Parked {
            if ending.is_ending() {
                return false;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::exit::ExitReason;

    #[test]
    fn a_thread_stands_until_the_gate_opens_or_the_vm_ends() {
        let (gate, ending) = (Arc::new(Gate::default()), Arc::new(Ending::default()));
        assert!(!gate.is_closed());
        for end in [false, true] {
            gate.close();
            gate.close();
            assert!(gate.is_closed());
            let thread = {
                let (gate, ending) = (Arc::clone(&gate), Arc::clone(&ending));
                std::thread::spawn(move || gate.stand(&ending))
            };
            if end {
                ending.report(ExitReason::Stopped);
                gate.wake();
            } else {
                // Waits for the thread by itself.
                assert!(gate.open());
            }
            assert_eq!(thread.join().expect("no panic"), !end);
        }
    }

    #[test]
    fn a_gate_that_is_open_opens() {
        let gate = Gate::default();
        assert!(gate.open());
        assert!(gate.stand(&Ending::default()));
    }
}
