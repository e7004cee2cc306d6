//! The guest's network. On the host, each interface of a network namespace has
//! a TAP interface beside it that the guest's device uses; the guest is told what to configure, and does it.
//!
//! [`mirror`] does it: what the interface would receive goes to the TAP interface by a redirect of tc, and what the guest
//! sends goes out of the interface. The namespace's own kernel hears neither; what it sends itself, the guest gets the
//! answer to. Addresses, routes and whatever else is there stay as the CNI plugins made them, so that their DEL finds what their ADD left. [`describe`] has the types of
//! what the guest configures. [`watch`] tells of links that go up and down. [`cni`] runs the plugins that make the interfaces. All
//! that is the feature `host`.
//!
//! [`apply()`] is the guest's half, the feature `guest`: it configures what is described. What both halves need of netlink
//! is written once.
//!
//! **What is undone, and when.** [`Mirror`] undoes itself when it is dropped. [`Made`] says what there is to
//! undo, is written down before anything is made, and does the same for another process after this one was killed.
//!
//! **What is someone else's.** Queueing disciplines for what leaves an interface stay and hold for the guest too, so a limit of
//! bandwidth there is kept. A clsact or ingress discipline without filters on what comes in is used and left. One with
//! such filters is refused: ours would take the frames from them or they from ours.
//!
//! **What is not here.** Rules and other tables than main; DNS, which is files.
//!
//! **Why no rtnetlink.** That crate is futures over tokio around the same messages. A namespace is entered by a thread,
//! the thread asks and waits, and it is gone: a blocking socket of netlink-sys is all that it needs.

#[cfg(feature = "guest")]
mod apply;
#[cfg(feature = "host")]
pub mod cni;
pub mod describe;
#[cfg(feature = "guest")]
mod error;
#[cfg(feature = "host")]
mod filter;
#[cfg(feature = "guest")]
mod link;
#[cfg(feature = "host")]
mod made;
#[cfg(feature = "guest")]
mod messages;
#[cfg(feature = "host")]
mod mirror;
#[cfg(feature = "guest")]
mod netlink;
#[cfg(feature = "host")]
mod netns;
#[cfg(feature = "guest")]
mod requests;
#[cfg(feature = "host")]
mod survey;
#[cfg(all(test, feature = "host"))]
mod tests;
#[cfg(feature = "host")]
mod watch;

#[cfg(feature = "guest")]
pub use self::{
    apply::{apply, move_to},
    error::Error,
};
#[cfg(feature = "host")]
pub use self::{
    made::{Made, MadePort},
    mirror::{Mirror, Port, mirror, try_out},
    netns::{Netns, NetnsId},
    watch::{LinkChange, LinkState, Watch, watch},
};
