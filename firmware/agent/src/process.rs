//! The life of one process of a container, init or not: a state machine, and
//! the record that carries it. An exit is reported exactly once, and never
//! before Start has its answer.

use std::fmt;
use std::sync::OnceLock;

use tokio::sync::watch;

use crate::reaper::Exit;
use crate::stdio::Terminal;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Known by its id only: an exec that was added. The kernel has nothing of it.
    Added,
    /// Made, but the user's program has not begun.
    Created,
    /// Start is being done.
    Starting,
    /// It ended while Start was being done; the exit is not reported yet.
    EndedEarly(Exit),
    /// It runs.
    Running,
    /// It has ended, and the exit is reported.
    Exited(Exit),
}

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Start was called.
    Start,
    /// Start has its answer, good or bad.
    Answered,
    /// The kernel has reaped it.
    Ended(Exit),
}

/// An input that the state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is {state}, and {input:?} is not possible then")]
pub struct Refused {
    /// The state it stays in.
    pub state: State,
    /// What was asked.
    pub input: Input,
}

impl State {
    /// The state after `input`, and the exit to report now, if any.
    ///
    /// # Errors
    /// With both, if the one does not fit the other.
    pub fn after(self, input: Input) -> Result<(State, Option<Exit>), Refused> {
        match (self, input) {
            (State::Added | State::Created, Input::Start) => Ok((State::Starting, None)),
            (State::Starting, Input::Answered) => Ok((State::Running, None)),
            (State::Starting, Input::Ended(exit)) => Ok((State::EndedEarly(exit), None)),
            (State::EndedEarly(exit), Input::Answered) => Ok((State::Exited(exit), Some(exit))),
            (State::Created | State::Running, Input::Ended(exit)) => {
                Ok((State::Exited(exit), Some(exit)))
            }
            (state, input) => Err(Refused { state, input }),
        }
    }

    /// Whether the kernel has the process, or is about to.
    pub fn lives(self) -> bool {
        matches!(self, State::Created | State::Starting | State::Running)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Added => f.write_str("added, but not started"),
            State::Created => f.write_str("created"),
            State::Starting | State::EndedEarly(_) => f.write_str("starting"),
            State::Running => f.write_str("running"),
            State::Exited(exit) => write!(f, "stopped with status {}", exit.status),
        }
    }
}

/// A process and its state; the container owns it.
pub struct Process {
    made: OnceLock<Made>,
    state: watch::Sender<State>,
}

struct Made {
    pid: i32,
    terminal: Option<Terminal>,
}

impl Process {
    /// A process that has just been made.
    pub fn new(pid: i32, terminal: Option<Terminal>) -> Process {
        Process {
            made: OnceLock::from(Made { pid, terminal }),
            state: watch::Sender::new(State::Created),
        }
    }

    /// An exec that is to be made when it is started.
    pub fn added() -> Process {
        Process {
            made: OnceLock::new(),
            state: watch::Sender::new(State::Added),
        }
    }

    /// Gives an added one what was made for it, once.
    pub fn is_made(&self, pid: i32, terminal: Option<Terminal>) {
        let _ = self.made.set(Made { pid, terminal });
    }

    /// Its pid in the guest's first pid namespace, once it is made. Valid for signals while the state says
    /// that it lives.
    pub fn pid(&self) -> Option<i32> {
        self.made.get().map(|made| made.pid)
    }

    /// Its terminal, once it is made, if it has one.
    pub fn terminal(&self) -> Option<&Terminal> {
        self.made.get().and_then(|made| made.terminal.as_ref())
    }

    /// Where it is now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Makes the transition, and answers with the exit to report now.
    ///
    /// # Errors
    /// As [`State::after`]; the state stays.
    pub fn apply(&self, input: Input) -> Result<Option<Exit>, Refused> {
        let mut outcome = Ok(None);
        self.state
            .send_if_modified(|state| match state.after(input) {
                Ok((next, report)) => {
                    *state = next;
                    outcome = Ok(report);
                    true
                }
                Err(refused) => {
                    outcome = Err(refused);
                    false
                }
            });
        outcome
    }

    /// To wait for a later state by.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit {
        status: 42,
        at_ns: 9,
    };

    #[test]
    fn every_pair_of_state_and_input() {
        use Input::{Answered, Ended, Start};
        use State::{Added, Created, EndedEarly, Exited, Running, Starting};
        let early = EndedEarly(EXIT);
        let table = [
            (Added, Start, Some((Starting, None))),
            (Added, Answered, None),
            (Added, Ended(EXIT), None),
            (Created, Start, Some((Starting, None))),
            (Created, Answered, None),
            (Created, Ended(EXIT), Some((Exited(EXIT), Some(EXIT)))),
            (Starting, Start, None),
            (Starting, Answered, Some((Running, None))),
            (Starting, Ended(EXIT), Some((early, None))),
            (early, Start, None),
            (early, Answered, Some((Exited(EXIT), Some(EXIT)))),
            (early, Ended(EXIT), None),
            (Running, Start, None),
            (Running, Answered, None),
            (Running, Ended(EXIT), Some((Exited(EXIT), Some(EXIT)))),
            (Exited(EXIT), Start, None),
            (Exited(EXIT), Answered, None),
            (Exited(EXIT), Ended(EXIT), None),
        ];
        for (state, input, expected) in table {
            match (state.after(input), expected) {
                (Ok(got), Some(expected)) => assert_eq!(got, expected, "{state:?} {input:?}"),
                (Err(refused), None) => assert_eq!((refused.state, refused.input), (state, input)),
                (got, expected) => panic!("{state:?} {input:?}: {got:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn an_added_exec_has_no_pid_until_it_is_made() {
        let process = Process::added();
        assert!(process.pid().is_none() && !process.state().lives());
        process.apply(Input::Start).unwrap();
        process.is_made(7, None);
        assert_eq!(process.pid(), Some(7));
        assert!(process.state().lives() && process.terminal().is_none());
    }

    #[test]
    fn a_refused_input_leaves_the_state() {
        let process = Process::new(1, None);
        process.apply(Input::Start).unwrap();
        let refused = process.apply(Input::Start).unwrap_err();
        assert_eq!(process.state(), State::Starting);
        assert!(refused.to_string().contains("starting"), "{refused}");
    }
}
