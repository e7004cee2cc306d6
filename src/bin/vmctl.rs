//! `vmctl`: see [`nacre::vmctl`].

use std::process::ExitCode;

fn main() -> ExitCode {
    nacre::vmctl::main(std::env::args_os())
}
