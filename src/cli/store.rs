//! `orchestrator store`: work on a store that no process has open.

use clap::Subcommand;

use super::{
    Exit, Failure,
    output::{clean, print},
};
use crate::store::{self, Accepted, StoreUrl};

/// Work on a store that no process has open
#[derive(Debug, clap::Args)]
pub(super) struct Store {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Accept(Accept),
}

/// Accept a store as it is, although it is a copy or lacks acknowledged cycles
#[derive(Debug, clap::Args)]
#[command(after_help = "\
`orchestrator serve` refuses a database that is a copy of another one, because a copy takes over the fleet: its epoch \
is higher, and subsystems then refuse calls of the original. It also refuses a database that lacks many acknowledged \
cycles. This command accepts the database once. First make sure that no process serves the original any more.

To look into a copy, serve nothing: read it with sqlite3.

Exit codes:
  0    it may be served
  1    the database does not exist, a process has it open, or it can't be used
  2    wrong usage

Examples:
  orchestrator store accept sqlite:/var/lib/orchestrator/orchestrator.db")]
struct Accept {
    /// The store, as in store.url
    #[arg(value_name = "URL", value_parser = StoreUrl::parse)]
    url: StoreUrl,
}

impl Store {
    /// Runs the subcommand.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Command::Accept(Accept { url }) = self.command;
        let accepted = store::accept(&url).map_err(|error| Failure::new(Exit::Refused, clean(&error.to_string())))?;
        print(&told(&accepted))?;
        Ok(Exit::Done)
    }
}

fn told(accepted: &Accepted) -> String {
    let Accepted { path, earlier, last_cycle_id, noted_cycle_id } = accepted;
    let mut lines = vec![format!("{} can be served now; its last cycle is {last_cycle_id}", path.display())];
    lines.extend(
        earlier.iter().map(|earlier| format!("it is a copy of {}, which must no longer be served", earlier.display())),
    );
    if noted_cycle_id > last_cycle_id {
        let first = last_cycle_id.next();
        lines.push(format!("cycles {first} to {noted_cycle_id} are lost; their ids are given again"));
    }
    // A path can contain any characters.
    lines.iter().map(|line| clean(line) + "\n").collect()
}
