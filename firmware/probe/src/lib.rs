//! What `nacre-probe` measures of the network, and what goes over its streams, for who measures from the other end in its own
//! process: `nacre-bench net`. What it measures of files is in the program.

pub mod lots;
pub mod net;
