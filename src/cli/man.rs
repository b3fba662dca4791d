//! `orchestrator man`: manual pages.

use std::path::PathBuf;

use clap::CommandFactory;

use super::{Cli, Exit, Failure};

/// Write the manual pages of all commands
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Writes a file for each command, such as orchestrator-cycles-list.1, into an existing directory.

Examples:
  orchestrator man ~/.local/share/man/man1")]
pub(super) struct Man {
    /// The directory of the files
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Man {
    /// Writes them.
    pub(super) fn run(&self) -> Result<Exit, Failure> {
        clap_mangen::generate_to(Cli::command(), &self.dir).map_err(|error| {
            let dir = self.dir.display();
            Failure::new(Exit::Refused, format!("can't write the manual pages into {dir}: {error}"))
        })?;
        Ok(Exit::Done)
    }
}
