//! `orchestrator store`: what is to be done with a store while no service has it open.

use clap::Subcommand;

use super::{
    Exit, Failure,
    output::{clean, print},
};
use crate::store::{self, Accepted, StoreUrl};

/// Work on a store that no service has open
#[derive(Debug, clap::Args)]
pub(super) struct Store {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Accept(Accept),
}

/// Let a store be served as what it is now, though it is a copy or lacks what was acknowledged
#[derive(Debug, clap::Args)]
#[command(after_help = "\
`orchestrator serve` refuses a database that is a copy of another one, because a copy takes the fleet over: its epoch is \
later, and subsystems then refuse calls of the original. It also refuses one that is far behind what was acknowledged in \
it. This command lets it go on, once. Before that, see that no process serves the original any more.

To look into a copy, serve nothing: read it with sqlite3.

Exit codes:
  0    it may be served
  1    there is no such database, a process has it open, or it can't be used; stderr tells which
  2    wrong usage

Examples:
  orchestrator store accept sqlite:/var/lib/orchestrator/orchestrator.db")]
struct Accept {
    /// The store, as store.url has it
    #[arg(value_name = "URL", value_parser = StoreUrl::parse)]
    url: StoreUrl,
}

impl Store {
    /// Does what is asked for.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Command::Accept(Accept { url }) = self.command;
        let accepted = store::accept(&url).map_err(|error| Failure::new(Exit::Refused, clean(&error.to_string())))?;
        print(&told(&accepted))?;
        Ok(Exit::Done)
    }
}

fn told(accepted: &Accepted) -> String {
    let Accepted { path, earlier, last_cycle_id, noted_cycle_id } = accepted;
    let mut lines = vec![format!("{} may be served; its last cycle is {last_cycle_id}", path.display())];
    lines.extend(
        earlier.iter().map(|earlier| format!("it was {}, which must not be served any more", earlier.display())),
    );
    if noted_cycle_id > last_cycle_id {
        let first = last_cycle_id.next();
        lines.push(format!("cycles {first} to {noted_cycle_id} are lost; their numbers are given again"));
    }
    // Paths are whatever a file system holds.
    lines.iter().map(|line| clean(line) + "\n").collect()
}
