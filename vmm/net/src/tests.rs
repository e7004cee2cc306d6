//! Namespaces of the tests' own, as root: pairs of veth, frames through them, and what is left behind.

mod applying;
mod bench;
mod description;
mod frames;
mod guest;
mod namespaces;
mod removal;
mod watching;
