//! CNI for a network namespace, as the CNI specification 1.1.0 has it: the configuration of a network, a [`Conflist`], and
//! what comes of it, an [`AddResult`].

mod conflist;
pub mod dns;
mod error;
mod result;

pub use self::{
    conflist::{Conflist, Version},
    error::{Answer, Error, Kind},
    result::{AddResult, Dns, Interface, Ip, Route},
};
