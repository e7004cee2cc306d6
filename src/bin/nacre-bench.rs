//! `nacre-bench`: see [`nacre::bench`].

use std::process::ExitCode;

fn main() -> ExitCode {
    nacre::bench::main(std::env::args_os())
}
