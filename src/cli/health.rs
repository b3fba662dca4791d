//! `orchestrator health`: asks whether the service serves, as health checks of containers do.

use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use super::{Exit, Failure, output::print, remote::Remote};

/// Ask whether the service serves, as health checks of containers do
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Prints SERVING, or NOT_SERVING while the service shuts down. It asks the health service (grpc.health.v1), for which no \
right is needed.

Exit codes:
  0    it serves
  1    it does not: it shuts down, or is a replica that is not ready
  2    wrong usage
  4    it can't be reached, or did not answer within --timeout

Examples:
  orchestrator health
  orchestrator health --address unix:/run/orchestrator/orchestrator.sock
  orchestrator health --timeout 2s")]
pub(super) struct HealthCommand {
    #[command(flatten)]
    remote: Remote<Nothing>,
}

/// There is one format of the output.
#[derive(Clone, Copy, Debug, clap::Args)]
struct Nothing {}

impl HealthCommand {
    /// Asks, and prints the answer.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let (_, mut health) = self.remote.connect_for_long().await?;
        let answer = self.remote.quickly(health.check(HealthCheckRequest::default())).await?.into_inner();
        print(&format!("{}\n", answer.status().as_str_name()))?;
        Ok(if answer.status() == ServingStatus::Serving { Exit::Done } else { Exit::Refused })
    }
}
