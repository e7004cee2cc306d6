//! `vmctl config`: the reference of the configuration, and a judge of files.

use std::path::PathBuf;

use crate::config::{Config, reference};

const HELP: &str = "\
Exit code: 0; 1 if the file to check is wrong or cannot be read, with file, line, key and what is allowed on standard \
error.";

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Args {
    /// Check FILE instead: every key known, every value possible. Without FILE: the configuration in force
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    check: Option<Option<PathBuf>>,
}

pub(super) fn config(args: &Args) -> anyhow::Result<u8> {
    match &args.check {
        None => super::say(&reference())?,
        Some(Some(path)) => {
            Config::read(path)?;
            super::say(&format!("{} is right.\n", path.display()))?;
        }
        Some(None) => {
            Config::load()?;
            super::say("The configuration is right.\n")?;
        }
    }
    Ok(0)
}
