//! Guest memory: where things are, KVM's slots, and the view that devices have of it.

pub mod guest;
pub mod layout;
pub mod slots;

pub use guest::{Error, GuestMemory};
