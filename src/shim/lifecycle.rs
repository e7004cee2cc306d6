//! The two lives in a shim, the sandbox's and each container's, and that of a
//! process in a container. Each is an enum with one function that makes every
//! transition; what has no transition is an error that names both.

use std::fmt;

/// A transition that may not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is {state}: cannot {event}")]
pub struct Refused {
    /// Whose life it is.
    pub what: &'static str,
    /// The state it is in.
    pub state: &'static str,
    /// What was tried.
    pub event: &'static str,
}

macro_rules! named {
    ($type:ty { $($variant:ident => $name:literal),+ $(,)? }) => {
        impl $type {
            /// All of them, for tables.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name in messages.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

/// The life of the VM and what serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sandbox {
    /// The guest boots; containers may be asked for already.
    Booting,
    /// The agent is ready.
    Running,
    /// The VM ends or has ended by itself or by a failure; nothing new begins.
    Stopping,
    /// The shim ends. Final.
    ShuttingDown,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SandboxEvent {
    /// The agent said that it is ready.
    Ready,
    /// The VM ended, or its boot failed.
    End,
    /// The shim was told to end.
    Shutdown,
}

named!(Sandbox {
    Booting => "booting", Running => "running", Stopping => "stopping", ShuttingDown => "shutting down",
});
named!(SandboxEvent { Ready => "become ready", End => "end", Shutdown => "shut down" });

impl Sandbox {
    /// The state after `event`.
    ///
    /// # Errors
    /// The event may not happen in this state.
    pub fn after(self, event: SandboxEvent) -> Result<Self, Refused> {
        use SandboxEvent as E;
        match (self, event) {
            (Self::Booting, E::Ready) => Ok(Self::Running),
            (Self::Booting | Self::Running | Self::Stopping, E::End) => Ok(Self::Stopping),
            (_, E::Shutdown) | (Self::ShuttingDown, E::End) => Ok(Self::ShuttingDown),
            (Self::Running | Self::Stopping | Self::ShuttingDown, E::Ready) => Err(Refused {
                what: "The sandbox",
                state: self.name(),
                event: event.name(),
            }),
        }
    }

    /// Whether containers may be created.
    pub fn takes_containers(self) -> bool {
        matches!(self, Self::Booting | Self::Running)
    }
}

/// The life of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Container {
    /// Its id is taken, nothing is made.
    Idle,
    /// Disk, guest container and stdio are being made.
    Creating,
    /// It is there; whether a program runs in it is the init process's state.
    Running,
    /// Its processes are frozen.
    Paused,
    /// It is being freed.
    Deleting,
    /// Nothing of it is left.
    Gone,
    /// The shim ends, and frees it. Final.
    ShuttingDown,
}

/// What happens to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContainerEvent {
    /// Create was called.
    Create,
    /// All of it is made.
    Created,
    /// Its processes are frozen.
    Pause,
    /// Its processes are thawed.
    Resume,
    /// Making it failed; what was made is freed.
    Fail,
    /// Delete was called.
    Delete,
    /// All of it is freed.
    Deleted,
    /// Freeing it failed; it may be tried again.
    Keep,
    /// The shim was told to end.
    Shutdown,
}

named!(Container {
    Idle => "idle", Creating => "being created", Running => "running", Paused => "paused",
    Deleting => "being deleted", Gone => "gone", ShuttingDown => "shutting down",
});
named!(ContainerEvent {
    Create => "create", Created => "finish creating", Pause => "pause", Resume => "resume",
    Fail => "fail creating", Delete => "delete",
    Deleted => "finish deleting", Keep => "fail deleting", Shutdown => "shut down",
});

impl Container {
    /// The state after `event`.
    ///
    /// # Errors
    /// The event may not happen in this state.
    pub fn after(self, event: ContainerEvent) -> Result<Self, Refused> {
        use ContainerEvent as E;
        match (self, event) {
            (Self::Idle, E::Create) => Ok(Self::Creating),
            (Self::Creating, E::Created)
            | (Self::Deleting, E::Keep)
            | (Self::Paused, E::Resume) => Ok(Self::Running),
            (Self::Running, E::Pause) => Ok(Self::Paused),
            (Self::Creating, E::Fail) => Ok(Self::Idle),
            // A frozen container can be killed, and then deleted.
            (Self::Running | Self::Paused, E::Delete) => Ok(Self::Deleting),
            (Self::Deleting, E::Deleted) => Ok(Self::Gone),
            (Self::Gone, E::Shutdown) => Ok(Self::Gone),
            (_, E::Shutdown) => Ok(Self::ShuttingDown),
            // What was under way when the shim was told to end comes to its end, and changes nothing more.
            (
                Self::ShuttingDown,
                E::Created | E::Fail | E::Pause | E::Resume | E::Deleted | E::Keep,
            ) => Ok(Self::ShuttingDown),
            _ => Err(Refused {
                what: "The container",
                state: self.name(),
                event: event.name(),
            }),
        }
    }
}

/// The life of a process: a container's init, or an exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// The agent was asked to add it to its container: an exec only.
    Adding,
    /// Made, its program does not run yet.
    Created,
    /// The agent was asked to run its program.
    Starting,
    /// Its program runs.
    Running,
    /// It has ended; its output may still be on its way.
    Draining,
    /// It has ended, and its exit is known to all.
    Stopped,
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProcessEvent {
    /// The agent has added it.
    Added,
    /// Start was called.
    Start,
    /// The agent runs its program.
    Started,
    /// Its program could not be run: it will never be started.
    Fail,
    /// The agent said that it ended, or its VM did.
    Exit,
    /// Its output has been delivered or given up.
    Drained,
}

named!(Process {
    Adding => "being added", Created => "created", Starting => "starting", Running => "running", Draining => "stopping",
    Stopped => "stopped",
});
named!(ProcessEvent {
    Added => "finish adding", Start => "start", Started => "finish starting", Fail => "fail starting", Exit => "exit",
    Drained => "finish draining",
});

impl Process {
    /// The state after `event`.
    ///
    /// # Errors
    /// The event may not happen in this state. Exit in Starting is one of
    /// them: who starts the process takes the exit up when the start is known, so that the events keep their order.
    pub fn after(self, event: ProcessEvent) -> Result<Self, Refused> {
        use ProcessEvent as E;
        match (self, event) {
            (Self::Adding, E::Added) => Ok(Self::Created),
            (Self::Created, E::Start) => Ok(Self::Starting),
            (Self::Starting, E::Started) => Ok(Self::Running),
            (Self::Starting, E::Fail) | (Self::Created | Self::Running, E::Exit) => {
                Ok(Self::Draining)
            }
            (Self::Draining, E::Drained) => Ok(Self::Stopped),
            _ => Err(Refused {
                what: "The process",
                state: self.name(),
                event: event.name(),
            }),
        }
    }

    /// Whether it may still be signalled.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Created | Self::Starting | Self::Running)
    }

    /// Whether it was asked to run, so that there is an exit of it to tell.
    pub fn is_begun(self) -> bool {
        !matches!(self, Self::Adding | Self::Created)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pair of state and event must be in `allowed` or be refused.
    fn check<S, E>(
        states: &[S],
        events: &[E],
        after: impl Fn(S, E) -> Result<S, Refused>,
        allowed: &[(S, E, S)],
    ) where
        S: Copy + PartialEq + fmt::Debug,
        E: Copy + PartialEq + fmt::Debug,
    {
        for &state in states {
            for &event in events {
                let expected = allowed
                    .iter()
                    .find(|(from, by, _)| *from == state && *by == event)
                    .map(|(_, _, to)| *to);
                assert_eq!(after(state, event).ok(), expected, "{state:?} on {event:?}");
            }
        }
    }

    #[test]
    fn sandbox_table() {
        use Sandbox::*;
        use SandboxEvent::*;
        check(
            Sandbox::ALL,
            SandboxEvent::ALL,
            Sandbox::after,
            &[
                (Booting, Ready, Running),
                (Booting, End, Stopping),
                (Booting, Shutdown, ShuttingDown),
                (Running, End, Stopping),
                (Running, Shutdown, ShuttingDown),
                (Stopping, End, Stopping),
                (Stopping, Shutdown, ShuttingDown),
                (ShuttingDown, End, ShuttingDown),
                (ShuttingDown, Shutdown, ShuttingDown),
            ],
        );
        let takes: Vec<_> = Sandbox::ALL
            .iter()
            .filter(|state| state.takes_containers())
            .collect();
        assert_eq!(takes, [&Booting, &Running]);
    }

    #[test]
    fn container_table() {
        use Container::*;
        use ContainerEvent::*;
        check(
            Container::ALL,
            ContainerEvent::ALL,
            Container::after,
            &[
                (Idle, Create, Creating),
                (Idle, Shutdown, ShuttingDown),
                (Creating, Created, Running),
                (Creating, Fail, Idle),
                (Creating, Shutdown, ShuttingDown),
                (Running, Pause, Paused),
                (Running, Delete, Deleting),
                (Running, Shutdown, ShuttingDown),
                (Paused, Resume, Running),
                (Paused, Delete, Deleting),
                (Paused, Shutdown, ShuttingDown),
                (Deleting, Deleted, Gone),
                (Deleting, Keep, Running),
                (Deleting, Shutdown, ShuttingDown),
                (Gone, Shutdown, Gone),
                (ShuttingDown, Created, ShuttingDown),
                (ShuttingDown, Fail, ShuttingDown),
                (ShuttingDown, Pause, ShuttingDown),
                (ShuttingDown, Resume, ShuttingDown),
                (ShuttingDown, Deleted, ShuttingDown),
                (ShuttingDown, Keep, ShuttingDown),
                (ShuttingDown, Shutdown, ShuttingDown),
            ],
        );
    }

    #[test]
    fn process_table() {
        use Process::*;
        use ProcessEvent::*;
        check(
            Process::ALL,
            ProcessEvent::ALL,
            Process::after,
            &[
                (Adding, Added, Created),
                (Created, Start, Starting),
                (Created, Exit, Draining),
                (Starting, Started, Running),
                (Starting, Fail, Draining),
                (Running, Exit, Draining),
                (Draining, Drained, Stopped),
            ],
        );
        let live: Vec<_> = Process::ALL
            .iter()
            .filter(|state| state.is_live())
            .collect();
        assert_eq!(live, [&Created, &Starting, &Running]);
        let begun: Vec<_> = Process::ALL
            .iter()
            .filter(|state| state.is_begun())
            .collect();
        assert_eq!(begun, [&Starting, &Running, &Draining, &Stopped]);
    }

    #[test]
    fn a_refusal_names_state_and_event() {
        let error = Container::Gone.after(ContainerEvent::Delete).unwrap_err();
        assert_eq!(error.to_string(), "The container is gone: cannot delete");
    }
}
