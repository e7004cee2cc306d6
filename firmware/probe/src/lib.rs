//! What `nacre-probe` measures of the network, and what goes over its streams, for who measures from the other end in its own
//! process: `nacre-bench net`; and what it says as a guest's first process, for `nacre-bench boot`. What it measures of files is in the
//! program.

pub mod lots;
pub mod net;

/// The line that `nacre-probe hello` prints: the guest has come as far as its first process.
pub const HELLO: &str = "nacre-probe: hello";
