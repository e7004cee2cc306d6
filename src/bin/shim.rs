//! `containerd-shim-nacre-v1`: containerd's shim, which is its own virtual machine monitor.

use std::process::ExitCode;

fn main() -> ExitCode {
    nacre::shim::main()
}
