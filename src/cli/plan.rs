//! `orchestrator plan`: the plan of a cycle.

use std::collections::HashMap;

use super::{
    Exit, Failure,
    cycles::chain,
    known::{self, Unknown},
    output::{grouped, milliseconds, names, sections, skip_reason},
    remote::Remote,
    table::{Facts, Page, Table, left, long, number, right, text},
};
use crate::proto::orchestrator::v1 as pb;

/// Show the order of a cycle without running it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A subsystem starts as soon as all subsystems in lower phases, and those that it waits for by name, have ended. \
Expected durations are the means of recent ones in this process of the service.

Examples:
  orchestrator plan
  orchestrator plan --subsystem prices,news
  orchestrator plan --output json | jq -r '.plan.criticalPath[]'")]
pub(super) struct PlanCommand {
    /// Only this subsystem; may be repeated
    #[arg(long = "subsystem", value_name = "NAME", value_delimiter = ',')]
    subsystems: Vec<String>,
    #[command(flatten)]
    remote: Remote,
}

impl PlanCommand {
    /// Shows the plan.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let mut client = self.remote.connect().await?;
        let mut response = pb::PlanCycleResponse::default();
        loop {
            let page_token = std::mem::take(&mut response.next_page_token);
            let request = pb::PlanCycleRequest { subsystems: self.subsystems.clone(), page_size: 0, page_token };
            let page = self.remote.quickly(client.plan_cycle(request)).await?.into_inner();
            response.next_page_token = page.next_page_token;
            match (&mut response.plan, page.plan) {
                // Further pages continue the same plan.
                (Some(plan), Some(more)) => plan.subsystems.extend(more.subsystems),
                (first, more) => *first = first.take().or(more),
            }
            if response.next_page_token.is_empty() {
                break;
            }
        }
        // In a plan over all subsystems, expected ones may be missing.
        let mut planned =
            response.plan.iter().flat_map(|plan| &plan.subsystems).filter(|_| !self.subsystems.is_empty());
        if let Some(none) = planned.find(|it| it.skip_reason() == pb::SkipReason::NotRegistered) {
            let unknown = Failure::unknown(Unknown::Subsystem(none.name.clone()));
            return Err(known::explain(unknown, &self.remote, &mut client).await);
        }
        let page = self.remote.format.page();
        self.remote.format.show("PlanCycleResponse", &response, |response| {
            response.plan.as_ref().map(|it| plan(it, page)).unwrap_or_default()
        })?;
        Ok(Exit::Done)
    }
}

/// A plan: the subsystems by phase and level, and the critical path.
pub(super) fn plan(plan: &pb::Plan, page: Page) -> String {
    /// Most names in a cell; more would hide the rest of the table.
    const NAMES: usize = 6;
    let has_run = plan.expected_duration_ms > 0.0;
    let reasons: HashMap<_, _> = plan.subsystems.iter().map(|it| (it.name.as_str(), it.skip_reason())).collect();
    let skips = plan.subsystems.iter().any(|planned| !why_skipped(planned, &reasons).is_empty());
    let mut columns = vec![right("PHASE"), right("LEVEL"), left("SUBSYSTEM"), long("WAITS FOR")];
    columns.extend(has_run.then(|| left("EXPECTED")));
    columns.extend(skips.then(|| long("SKIPPED")));
    let mut table = Table::new(columns);
    for planned in &plan.subsystems {
        let mut row = vec![
            text(planned.phase.to_string()),
            number(planned.level),
            text(&planned.name),
            text(names(&planned.waits_for, NAMES)),
        ];
        row.extend(has_run.then(|| match planned.expected_duration_ms {
            0.0 => text("-"),
            expected => text(milliseconds(expected)),
        }));
        row.extend(skips.then(|| text(why_skipped(planned, &reasons))));
        table.row(row);
    }
    if plan.subsystems.is_empty() {
        return table.or("no subsystems", page);
    }
    let mut summary = Facts::new();
    summary.fact("subsystems", grouped(plan.subsystems.len() as u64));
    summary.fact("levels", grouped(plan.levels.into()));
    if has_run {
        summary.fact("expected", milliseconds(plan.expected_duration_ms));
        summary.fact("critical path", chain(&plan.critical_path));
    }
    sections([table.finish(page), summary.finish(page)])
}

/// Why it will not be called, where `reasons` has the whole plan; empty if it will be.
fn why_skipped(planned: &pb::PlannedSubsystem, reasons: &HashMap<&str, pb::SkipReason>) -> String {
    let what = match planned.skip_reason() {
        pb::SkipReason::Unspecified if planned.breaker() == pb::BreakerState::Open => return "circuit open".to_owned(),
        pb::SkipReason::RequirementMissing => "is not registered",
        pb::SkipReason::RequirementLeftOut => match reasons.get(planned.skip_requirement.as_str()) {
            None => "is not in this cycle",
            Some(pb::SkipReason::Suspended) => "is suspended",
            Some(_) => "will be skipped itself",
        },
        pb::SkipReason::RequirementFailed => "can't succeed",
        reason => return skip_reason(reason).to_owned(),
    };
    format!("requires {}, which {what}", planned.skip_requirement)
}
