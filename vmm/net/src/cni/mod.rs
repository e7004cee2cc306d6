//! CNI plugins for a network namespace, as the CNI specification 1.1.0 has it: an [`Attachment`] runs the plugins of a
//! [`Conflist`] with ADD, CHECK and DEL. All of it blocks.
//!
//! **What survives.** An [`Attachment`] is what a durable record holds. It is handed out to be written down before the
//! first plugin runs, so that whoever finds it after a SIGKILL runs DEL with what ADD had.
//!
//! **How a plugin runs.** In `/`, in a process group of its own, with nothing of the caller's environment but PATH, its
//! configuration on stdin, and a deadline after which the group is killed. It is killed too if the thread that waits for it
//! ends. What it leaves running in the background on purpose is left. It has the namespaces of the calling thread, which
//! must be the host's: [`Attachment::before_exec`] is for a process that has left them.
//!
//! **What is not here.** GC, STATUS and VERSION. Which network a container is in, and who configures the guest.

mod attachment;
mod classify;
mod conflist;
pub mod dns;
mod error;
mod process;
mod request;
mod result;
#[cfg(test)]
mod tests;

pub use self::{
    attachment::{Attachment, TIMEOUT},
    conflist::{Conflist, Version},
    error::{Answer, Error, Kind},
    request::{PortMapping, Protocol},
    result::{AddResult, Dns, Interface, Ip, Route},
};
