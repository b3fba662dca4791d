//! `orchestrator cancel`: cancels a cycle.

use super::{
    Exit, Failure,
    cycles::{cycle, parse_cycle_id},
    output::telemetry,
    remote::Remote,
};
use crate::proto::orchestrator::v1 as pb;

/// Cancel a running or waiting cycle
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What had finished in it stays recorded. Waits until the cycle is recorded: one that waits in line is recorded at once.

Exit codes:
  0    it is recorded as CANCELLED
  1    refused: there is no such cycle, or it had finished; or it finished at
       that very moment
  2    wrong usage
  4    the service can't be reached, or has not answered within --timeout

Examples:
  orchestrator cancel 12
  orchestrator status --output json \\
    | jq -r '.status.waitingCycles[]?.cycleId' \\
    | xargs -rn1 orchestrator cancel
  orchestrator status --output json \\
    | jq -r '.status.runningCycles[]?.cycleId' \\
    | xargs -rn1 orchestrator cancel")]
pub(super) struct Cancel {
    /// The id of the cycle: see `orchestrator status`
    #[arg(value_name = "CYCLE_ID", value_parser = parse_cycle_id)]
    cycle_id: u64,
    #[command(flatten)]
    remote: Remote,
}

impl Cancel {
    /// Cancels it.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let (mut client, health) = self.remote.connect_for_long().await?;
        let request = pb::CancelCycleRequest { cycle_id: self.cycle_id };
        let response = match self.remote.patiently(&health, client.cancel_cycle(request)).await {
            Ok(response) => response.into_inner(),
            Err(failure) if failure.exit == Exit::Unreachable => {
                let (id, flag) = (self.cycle_id, self.remote.flag());
                return Err(failure.and(&format!(
                    "Cycle {id} may still be cancelled. To see its result: orchestrator cycles show {id}{flag}"
                )));
            }
            Err(failure) => return Err(failure),
        };
        let record = telemetry(&response.telemetry)?;
        let format = self.remote.format;
        format.show("CancelCycleResponse", &response, |_| cycle(&record, false, format.page()))?;
        if record.state() == pb::CycleState::Cancelled {
            return Ok(Exit::Done);
        }
        let message = format!("cycle {} finished before it could be cancelled", self.cycle_id);
        Err(Failure::new(Exit::Refused, message))
    }
}
