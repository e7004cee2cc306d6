//! `nacre-probe`: measures files from within a container or a guest, for `nacre-bench storage`. A static program, so that one
//! and the same runs everywhere. It prints one line of JSON, and an error where what it read is not what it made.
//!
//! `files` is what is measured on, `measure` reads, walks and untars, `random` reads at random, `init` is a guest's first
//! process.

mod files;
mod init;
mod measure;
mod random;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use measure::Outcome;

/// Measures files from within: prints one line of JSON. `nacre-bench storage` runs it.
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
    /// Do nothing until killed
    Idle,
    /// Be the first process of a guest: mount /disk and /share, and do what lines on the console say
    Init,
}

impl Command {
    fn run(&self) -> Result<Outcome> {
        match self {
            Self::Make { folder, mib, files } => files::make(folder, *mib, *files),
            Self::Read { file, cold } => measure::read(file, *cold),
            Self::Random { file, depth, reads } => random::read(file, *depth, *reads),
            Self::Walk { folder, cold } => measure::walk(folder, *cold),
            Self::Untar { archive, folder } => measure::untar(archive, folder),
            Self::Idle => loop {
                nix::unistd::pause();
            },
            Self::Init => Err(init::run()),
        }
    }
}

fn main() -> ExitCode {
    let outcome = Cli::parse().command.run();
    match outcome.and_then(|outcome| Ok(serde_json::to_string(&outcome)?)) {
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
            "p",
        ] {
            assert!(Cli::try_parse_from(words.split(' ')).is_err(), "{words}");
        }
    }
}
