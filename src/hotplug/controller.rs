//! The task that makes a VM follow its load: it takes the readings, asks the
//! policies, and resizes the VM through its [`Actuator`], one change at a time.
//!
//! All changes of a running VM go through it, those that Update and `vmctl
//! resize` want too, so that no two ever meet. It sleeps while no reading could
//! change anything. Nothing that the guest does makes it spin: each change
//! waits for a reading, a stall or a command, and what fails is left alone for
//! a while.

mod failures;
mod work;

use std::future::Future;

use tokio::sync::{mpsc, oneshot, watch};

use super::{Actuator, Bounds, Failure, Room};
use crate::config::Hotplug;
use work::Work;

/// Commands that may wait.
const COMMANDS: usize = 16;

/// Containers stall for want of memory. Bytes as the guest had them when it was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pressure {
    /// MemTotal.
    pub total_bytes: u64,
    /// MemAvailable.
    pub available_bytes: u64,
}

/// What one resource shall be from now on; what is None stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish<T> {
    /// The controller shrinks it no further. Not below the boot size, which is where it is at first.
    pub floor: Option<T>,
    /// The controller grows it no further. Not below the boot size.
    pub ceiling: Option<T>,
    /// The size to have now, within floor and ceiling. None: the present one, or the nearest to it within a
    /// floor or ceiling that moves.
    pub size: Option<T>,
}

impl<T> Default for Wish<T> {
    fn default() -> Self {
        Self {
            floor: None,
            ceiling: None,
            size: None,
        }
    }
}

/// New bounds and sizes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// In vCPUs.
    pub vcpus: Wish<u8>,
    /// In MiB.
    pub memory_mib: Wish<u64>,
}

/// How big a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// A change was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetError {
    /// A size out of the bounds. Nothing has changed.
    #[error("Cannot resize the VM to {asked}: it may have from {floor} to {ceiling}")]
    OutOfBounds {
        /// What was asked for, with its unit.
        asked: String,
        /// The least.
        floor: u64,
        /// The most.
        ceiling: u64,
    },
    /// The VM did not get or give what was asked for. The new bounds are in force, and the other resource has been
    /// resized if it was asked for.
    #[error("Cannot resize the VM to {asked}: {source}")]
    Failed {
        /// What was asked for, with its unit.
        asked: String,
        /// Why.
        #[source]
        source: Failure,
    },
    /// The controller has stopped.
    #[error("Cannot resize the VM: it is being stopped")]
    Stopped,
}

enum Command {
    Set(Change, oneshot::Sender<Result<Sizes, SetError>>),
    Pause(bool, oneshot::Sender<()>),
}

/// The handle of a VM's controller. Shared by all that resize the VM; the task ends with [`stop`](Self::stop) or when
/// the handle is dropped.
#[derive(Debug)]
pub struct Controller {
    commands: mpsc::Sender<Command>,
    pressure: mpsc::Sender<Pressure>,
    stop: watch::Sender<bool>,
    sizes: watch::Receiver<Sizes>,
}

impl Controller {
    /// Starts the task for a VM that has booted, in the present tokio runtime. The sizes are those of its boot.
    pub fn start<A: Actuator>(rules: &Hotplug, room: Room, actuator: A) -> Self {
        let (controller, task) = Self::new(rules, room, actuator);
        tokio::spawn(task);
        controller
    }

    fn new<A: Actuator>(
        rules: &Hotplug,
        room: Room,
        actuator: A,
    ) -> (Self, impl Future<Output = ()> + use<A>) {
        let (commands, commanded) = mpsc::channel(COMMANDS);
        // One is as good as many: each says that containers stall now.
        let (pressure, pressed) = mpsc::channel(1);
        let (stop, mut stopping) = watch::channel(false);
        let (shown, sizes) = watch::channel(Sizes {
            vcpus: room.vcpus.boot(),
            memory_mib: room.memory_mib.boot(),
        });
        let mut work = Work::new(rules, room, actuator, commanded, pressed, shown);
        let task = async move {
            tokio::select! {
                biased;
                // An error: nobody is left who could stop it.
                _ = stopping.wait_for(|stop| *stop) => {}
                () = work.run() => {}
            }
            tracing::debug!("the controllers of CPUs and memory have stopped");
        };
        let controller = Self {
            commands,
            pressure,
            stop,
            sizes,
        };
        (controller, task)
    }

    /// Containers stall. Never waits: while the VM is being resized, further ones are dropped, since the guest says it
    /// again if that was not enough.
    pub fn pressure(&self, pressure: Pressure) {
        // Full: one waits already. Closed: the VM ends.
        let _ = self.pressure.try_send(pressure);
    }

    /// Sets bounds and sizes, and answers when the VM has them, with the sizes that it really has: a guest may give back
    /// less than it was asked for. Waits for a change in flight. Goes on even if the caller does not wait for it.
    ///
    /// # Errors
    /// A size out of the bounds; the VM could not be resized; the controller has stopped.
    pub async fn set(&self, change: Change) -> Result<Sizes, SetError> {
        let (answer, answered) = oneshot::channel();
        let command = Command::Set(change, answer);
        self.commands
            .send(command)
            .await
            .map_err(|_| SetError::Stopped)?;
        answered.await.map_err(|_| SetError::Stopped)?
    }

    /// Takes no readings and no decisions of its own until [`resume`](Self::resume), and lets containers run free. Answers
    /// when no change is in flight. What is [`set`](Self::set) is still done.
    pub async fn pause(&self) {
        self.paused(true).await;
    }

    /// Ends a pause. Readings begin anew.
    pub async fn resume(&self) {
        self.paused(false).await;
    }

    async fn paused(&self, pause: bool) {
        let (answer, answered) = oneshot::channel();
        if self
            .commands
            .send(Command::Pause(pause, answer))
            .await
            .is_ok()
        {
            // An error: the controller has stopped, which is a pause as well.
            let _ = answered.await;
        }
    }

    /// Stops for good, and answers when no change is in flight: one that is, is given up at its next await.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        // The task's end of it is dropped with all else that it has.
        self.commands.closed().await;
    }

    /// The sizes that the VM is believed to have.
    pub fn sizes(&self) -> Sizes {
        *self.sizes.borrow()
    }
}

/// The bounds after a wish, and the size to have now, if any is to be made.
fn plan<T: Copy + Ord + Into<u64>>(
    wish: &Wish<T>,
    bounds: Bounds<T>,
    current: T,
    unit: &str,
) -> Result<(Bounds<T>, Option<T>), SetError> {
    let bounds = bounds.moved(wish.floor, wish.ceiling);
    match wish.size {
        Some(size) if !bounds.hold(size) => Err(SetError::OutOfBounds {
            asked: format!("{} {unit}", size.into()),
            floor: bounds.floor().into(),
            ceiling: bounds.ceiling().into(),
        }),
        Some(size) => Ok((bounds, Some(size))),
        None => {
            let moved = wish.floor.is_some() || wish.ceiling.is_some();
            let nearest = bounds.clamp(current);
            Ok((bounds, (moved && nearest != current).then_some(nearest)))
        }
    }
}

#[cfg(test)]
mod tests;
