//! Where a vCPU's thread stands while its vCPU is out of the machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::exit::Ending;

/// Longest time that a vCPU's thread takes to come out of the guest when it is kicked, and to be ready to go there again.
const WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// The thread runs the guest.
    #[default]
    Open,
    /// The thread is to stop and stand here.
    Closing,
    /// It stands here.
    Parked,
    /// It is to get ready for the guest, and then to go on.
    Opening,
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
        if matches!(*state, State::Open | State::Opening) {
            *state = State::Closing;
            self.closed.store(true, Ordering::SeqCst);
        }
    }

    /// Opens it, once the thread stands before it, and waits until the thread is ready for the guest: what other vCPUs send this one
    /// after that reaches it. Whether it is: a thread that does not come is none to rely on.
    pub fn open(&self) -> bool {
        let deadline = Instant::now() + WITHIN;
        let Some(mut state) = self.wait_while(self.lock(), State::Closing, deadline) else {
            return false;
        };
        if *state == State::Parked {
            *state = State::Opening;
            self.changed.notify_all();
        }
        self.wait_while(state, State::Opening, deadline)
            .is_some_and(|state| *state == State::Open)
    }

    /// Waits as long as the gate is in `state`; `None` when the time is over.
    fn wait_while<'a>(
        &self,
        mut guard: MutexGuard<'a, State>,
        state: State,
        deadline: Instant,
    ) -> Option<MutexGuard<'a, State>> {
        while *guard == state {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            guard = self
                .changed
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Some(guard)
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

    /// The vCPU's thread stands here until the gate is to open, and gets `ready`; or until the VM ends. Whether it opened.
    ///
    /// # Errors
    ///
    /// What `ready` says; the gate stays closed.
    pub fn stand<E>(
        &self,
        ending: &Ending,
        ready: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut state = self.lock();
        if *state == State::Closing {
            *state = State::Parked;
            self.changed.notify_all();
        }
        while *state == State::Parked {
            if ending.is_ending() {
                return Ok(false);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        let outcome = ready();
        let mut state = self.lock();
        // It may be to close again by now.
        if *state == State::Opening {
            *state = match outcome {
                Ok(()) => State::Open,
                Err(_) => State::Parked,
            };
            self.closed.store(outcome.is_err(), Ordering::SeqCst);
        }
        self.changed.notify_all();
        outcome.map(|()| true)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::thread::JoinHandle;

    use super::*;
    use crate::exit::ExitReason;

    type Stood = JoinHandle<Result<bool, &'static str>>;

    fn stand(
        gate: &Arc<Gate>,
        ending: &Arc<Ending>,
        ready: impl FnOnce() -> Result<(), &'static str> + Send + 'static,
    ) -> Stood {
        let (gate, ending) = (Arc::clone(gate), Arc::clone(ending));
        std::thread::spawn(move || gate.stand(&ending, ready))
    }

    #[test]
    fn a_thread_stands_until_the_gate_opens_or_the_vm_ends() {
        let (gate, ending) = (Arc::new(Gate::default()), Arc::new(Ending::default()));
        assert!(!gate.is_closed());
        for end in [false, true] {
            gate.close();
            gate.close();
            assert!(gate.is_closed());
            let thread = stand(&gate, &ending, || Ok(()));
            if end {
                ending.report(ExitReason::Stopped);
                gate.wake();
            } else {
                // Waits for the thread by itself.
                assert!(gate.open());
                assert!(!gate.is_closed());
            }
            assert_eq!(thread.join().expect("no panic"), Ok(!end));
        }
    }

    #[test]
    fn a_gate_is_open_when_the_thread_is_ready_and_not_before() {
        let (gate, ending) = (Arc::new(Gate::default()), Arc::new(Ending::default()));
        let done = Arc::new(AtomicUsize::new(0));
        for round in 1..=100 {
            gate.close();
            let ready = Arc::clone(&done);
            let thread = stand(&gate, &ending, move || {
                std::thread::yield_now();
                ready.fetch_add(1, Ordering::SeqCst);
                Ok(())
            });
            assert!(gate.open());
            assert_eq!(done.load(Ordering::SeqCst), round);
            assert_eq!(thread.join().expect("no panic"), Ok(true));
        }
    }

    #[test]
    fn a_gate_stays_closed_where_the_thread_cannot_get_ready() {
        let (gate, ending) = (Arc::new(Gate::default()), Arc::new(Ending::default()));
        gate.close();
        let thread = stand(&gate, &ending, || Err("no"));
        assert!(!gate.open());
        assert!(gate.is_closed());
        assert_eq!(thread.join().expect("no panic"), Err("no"));
    }

    #[test]
    fn a_gate_that_closes_while_it_opens_is_closed() {
        let (gate, ending) = (Arc::new(Gate::default()), Arc::new(Ending::default()));
        gate.close();
        let again = Arc::clone(&gate);
        let thread = stand(&gate, &ending, move || {
            again.close();
            Ok(())
        });
        let opening = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || gate.open())
        };
        assert_eq!(thread.join().expect("no panic"), Ok(true));
        assert!(!opening.join().expect("no panic"));
        assert!(gate.is_closed());
    }

    #[test]
    fn a_gate_that_is_open_opens() {
        let gate = Gate::default();
        assert!(gate.open());
        assert!(!gate.is_closed());
    }
}
