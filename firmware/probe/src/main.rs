//! `nacre-probe`: measures files and the network from within a container or a guest, for `nacre-bench storage` and `net`. A static
//! program, so that one and the same runs everywhere. It prints one line of JSON, and an error where what it read is not what it
//! made, or what came is not what was sent.
//!
//! `files` is what is measured on, `measure` reads, walks and untars, `random` reads at random, `init` is a guest's first
//! process. What is measured of the network is in the library.

mod files;
mod init;
mod measure;
mod random;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use measure::Outcome;
use nacre_probe::{HELLO, net};

/// Measures files and the network from within: prints one line of JSON. `nacre-bench` runs it.
#[derive(Debug, Parser)]
#[command(name = "nacre-probe", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
enum Command {
    /// Make what is measured on in a folder: file, tree, tree.tar
    Make {
        /// The folder
        folder: PathBuf,
        /// MiB of the file
        #[arg(long, value_name = "N")]
        mib: u64,
        /// Files in the tree
        #[arg(long, value_name = "N")]
        files: u64,
    },
    /// Read a file from its beginning to its end, 1 MiB at a time; it was read once before
    Read {
        /// A file that `make` made
        file: PathBuf,
        /// Drop the caches before, and do not read it once
        #[arg(long)]
        cold: bool,
    },
    /// Read 4 KiB at a time at random places, past the cache (O_DIRECT) where the file system lets
    Random {
        /// A file that `make` made
        file: PathBuf,
        /// Reads under way at once
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
        depth: u16,
        /// Reads in all
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        reads: u32,
    },
    /// List a tree and look at each file of it
    Walk {
        /// The tree
        folder: PathBuf,
        /// Drop the caches before
        #[arg(long)]
        cold: bool,
    },
    /// Unpack an archive that was read once before, until its files are on the disk; they are removed afterwards
    Untar {
        /// The archive
        archive: PathBuf,
        /// Where to; must not be there
        folder: PathBuf,
    },
    /// Measure the network: a server, and what sends to it, receives from it, or asks it
    #[command(subcommand)]
    Net(net::Command),
    /// Do nothing until killed
    Idle,
    /// Be the first process of a guest that only says so on its console, and then waits for its end
    Hello,
    /// Be the first process of a guest: mount /disk and /share, or configure a network, and do what lines on the console say
    Init {
        /// The network that nacre-net describes, as JSON, in place of the disk and the share
        #[arg(long, value_name = "FILE")]
        network: Option<PathBuf>,
    },
}

impl Command {
    /// What came of it, as one line of JSON.
    fn run(&self) -> Result<String> {
        let outcome = match self {
            Self::Make { folder, mib, files } => files::make(folder, *mib, *files),
            Self::Read { file, cold } => measure::read(file, *cold),
            Self::Random { file, depth, reads } => random::read(file, *depth, *reads),
            Self::Walk { folder, cold } => measure::walk(folder, *cold),
            Self::Untar { archive, folder } => measure::untar(archive, folder),
            Self::Net(command) => return command.run(),
            Self::Idle => loop {
                nix::unistd::pause();
            },
            Self::Hello => {
                println!("{HELLO}");
                loop {
                    nix::unistd::pause();
                }
            }
            Self::Init { network } => Err(init::run(network.as_deref())),
        };
        Ok(serde_json::to_string::<Outcome>(&outcome?)?)
    }
}

fn main() -> ExitCode {
    match Cli::parse().command.run() {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("nacre-probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from("p random /f --depth 32 --reads 9".split(' ')).unwrap();
        let expected = Command::Random {
            file: "/f".into(),
            depth: 32,
            reads: 9,
        };
        assert_eq!(cli.command, expected);
        for words in [
            "p random /f --depth 0 --reads 9",
            "p random /f --depth 1 --reads 0",
            "p untar /f",
            "p net send --to 10.0.0.1 --bytes 1",
            "p net send --to 10.0.0.1:80 --bytes 1 --streams 0",
            "p net ask --to vsock:2:80 --count 1 --size 0",
            "p net serve",
            "p",
        ] {
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{words}");
        }
    }
}
