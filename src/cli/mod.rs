//! The command line: one file a command.

mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs a fleet of remote subsystems in cycles
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
}

impl Cli {
    /// Does what it says, and returns the exit code.
    pub async fn run(self) -> ExitCode {
        match self.command {
            Command::Serve(serve) => serve.run().await,
        }
    }
}
