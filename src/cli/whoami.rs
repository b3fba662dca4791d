//! `orchestrator whoami`: shows the identity and the rights of the caller.

use super::{
    Exit, Failure,
    output::{duration, names, sections, time, word},
    remote::Remote,
    table::{Facts, Page, Table, left, long, text},
};
use crate::proto::orchestrator::v1 as pb;

/// Show your identity at the service, and your rights
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A pattern with * stands for all matching names. Grants add up; what no grant covers is refused while the mode is \
enforce.

Examples:
  orchestrator whoami
  orchestrator whoami --credentials ops.token
  orchestrator whoami --output json | jq -r .identity")]
pub(super) struct WhoAmI {
    #[command(flatten)]
    remote: Remote,
}

impl WhoAmI {
    /// Asks, and prints the answer.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let mut client = self.remote.connect_to_access().await?;
        let response = self.remote.quickly(client.who_am_i(pb::WhoAmIRequest {})).await?.into_inner();
        let format = self.remote.format;
        format.show("WhoAmIResponse", &response, |response| show(response, format.page()))?;
        Ok(Exit::Done)
    }
}

fn show(response: &pb::WhoAmIResponse, page: Page) -> String {
    let mut facts = Facts::new();
    facts.fact("identity", &response.identity);
    facts.fact("mode", word(response.mode().as_str_name(), "ACCESS_MODE_"));
    if let Some(at) = &response.expires_at {
        facts.fact("expires", time(Some(at)));
    }
    if !response.problem.is_empty() {
        facts.fact("problem", &response.problem);
    }
    let mut rights = Table::new([
        left("ROLE"),
        long("SUBSYSTEMS").whole(),
        long("LOOPS").whole(),
        long("READS").whole(),
        left("PHASES"),
        long("ENDPOINTS").whole(),
        left("MAX TIMEOUT"),
    ]);
    for right in &response.rights {
        let list = |patterns: &[String]| text(if patterns.is_empty() { "-".into() } else { names(patterns, 8) });
        let phases = match (right.lowest_phase, right.highest_phase) {
            (Some(lowest), Some(highest)) => format!("{lowest} to {highest}"),
            _ => "-".to_owned(),
        };
        let timeout = right.max_timeout.as_ref().map_or_else(|| "-".to_owned(), |it| duration(Some(it)));
        rights.row([
            text(word(right.role().as_str_name(), "ROLE_")),
            list(&right.subsystems),
            list(&right.loops),
            list(&right.reads),
            text(phases),
            list(&right.endpoints),
            text(timeout),
        ]);
    }
    sections([facts.finish(page), rights.finish_unless_empty(page)])
}
