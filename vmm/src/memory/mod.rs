//! Guest memory: where things are, KVM's slots, and the view that devices have of it.

pub mod discard;
pub mod guest;
pub mod layout;
pub mod slots;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod stand_in;

pub use discard::DiscardError;
pub use guest::{Error, GuestMemory};
