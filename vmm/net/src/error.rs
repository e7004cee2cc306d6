//! What goes wrong between a network namespace and its TAP interfaces, and in the guest.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a namespace could not be mirrored, looked at or left as it was, or why a guest does not get its network.
#[derive(Debug, Error)]
pub enum Error {
    /// A network namespace.
    #[error("Cannot {doing} the network namespace {what}")]
    Namespace {
        /// What was being done.
        doing: &'static str,
        /// Its path, or its numbers.
        what: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Something else was given as one.
    #[error(
        "{} is no network namespace but {is}: give the file of one, such as /proc/PID/ns/net or a bind mount of it",
        .path.display()
    )]
    NoNamespace {
        /// What was given.
        path: PathBuf,
        /// What it is.
        is: String,
    },
    /// The host's own namespace.
    #[error(
        "Cannot mirror the network namespace {what}: it is the host's own, which would lose its network to the guest; \
         give the container one of its own"
    )]
    Hosts {
        /// What was given.
        what: String,
    },
    /// Work in a namespace panicked.
    #[error("The work in the network namespace {what} panicked: {message}")]
    Panicked {
        /// The namespace.
        what: String,
        /// What the panic said.
        message: String,
    },
    /// A request to the kernel.
    #[error("Cannot {doing} {what} by netlink")]
    Netlink {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// What the kernel says, or that its answer could not be read.
        #[source]
        source: io::Error,
    },
    /// An interface that cannot be mirrored.
    #[error("Cannot mirror the interface {interface:?} into the guest: {why}")]
    Interface {
        /// Its name.
        interface: String,
        /// Why, and what would be right.
        why: String,
    },
    /// A route that cannot be told to a guest.
    #[error("Cannot mirror the route to {destination} into the guest: {why}")]
    Route {
        /// Its destination.
        destination: String,
        /// Why, and what would be right.
        why: String,
    },
    /// What a guest's network cannot be by its description.
    #[error("Cannot configure {what}: {why}")]
    Configure {
        /// An interface or a route.
        what: String,
        /// Why, and what would be right.
        why: String,
    },
    /// An IPv6 address for a kernel that has none.
    #[error(
        "Cannot add the address {address} to {interface}: the kernel has no IPv6, or it is disabled; boot one that has it \
         (CONFIG_IPV6, without ipv6.disable=1), or leave IPv6 addresses out of the network"
    )]
    NoIpv6 {
        /// The address and the bits of its network.
        address: String,
        /// The interface's name.
        interface: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A TAP interface.
    #[cfg(feature = "host")]
    #[error(transparent)]
    Tap(#[from] nacre_vmm::virtio::net::Error),
    /// What was to be made could not be written down, so nothing was made.
    #[error("Cannot write down what is to be made in the network namespace {what}")]
    Note {
        /// The namespace.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}
