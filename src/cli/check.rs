//! `orchestrator check`: validates a configuration, and shows its plan.

use std::{collections::HashSet, env, sync::Arc};

use super::{
    Exit, Failure, HOST,
    output::{Format, count, names, note, sections, short},
    plan::plan,
    table::{Facts, Page, Table, left, long, text},
};
use crate::{
    api,
    config::{Config, Overrides},
    engine::{Member, Plan, RevokedOwners},
    model::{IntervalLoop, Name, Subsystem},
    proto::orchestrator::v1 as pb,
    serve::check_tls,
};

/// Validate a configuration and show its plan, without running anything
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Reads the configuration as `orchestrator serve` would with the same flags and environment, and needs no service. All \
problems are reported together, each with its file and line. The files of TLS are read as well. Subsystems that were \
registered with a running service are not included: see `orchestrator plan`.

Exit codes:
  0    it is valid
  2    it is not; stderr tells all that is wrong

Examples:
  orchestrator check --config orchestrator.toml
  orchestrator check --config orchestrator.toml --set cycle.deadline=30s
  orchestrator check --output json | jq '.plan.levels'")]
pub(super) struct Check {
    #[command(flatten)]
    overrides: Overrides,
    #[command(flatten)]
    format: Format,
}

impl Check {
    /// Checks the configuration.
    pub(super) fn run(&self) -> Result<Exit, Failure> {
        let wrong = |error: String| Failure::new(Exit::Usage, error);
        let config = Config::load(&self.overrides, env::vars_os()).map_err(|error| wrong(error.to_string()))?;
        for problem in check_tls(&config, HOST.clock).map_err(wrong)? {
            note(&format!("{problem}: others will refuse it"));
        }
        let members = config.subsystems.iter().cloned();
        let members = members.map(|subsystem| Member::new(Arc::new(subsystem), false, Arc::default()));
        let expected = expected_elsewhere(&config);
        let order = Plan::compile(members).map_err(|ring| wrong(ring.to_string()))?.lacking(expected);
        let plan_of_all = Some(api::plan(order.schedule(None, &RevokedOwners::default())));
        let response = pb::PlanCycleResponse { plan: plan_of_all, next_page_token: String::new() };
        self.format.show("PlanCycleResponse", &response, |response| {
            let page = self.format.page();
            let plan = response.plan.as_ref().map(|it| plan(it, page)).unwrap_or_default();
            sections([self.summary(&config, page), loops(&config).finish_unless_empty(page), plan])
        })?;
        Ok(Exit::Done)
    }

    fn summary(&self, config: &Config, page: Page) -> String {
        let mut facts = Facts::new();
        let path = self.overrides.config.as_ref().map(|path| format!("{} is valid", path.display()));
        facts.fact("configuration", path.unwrap_or_else(|| "the defaults".to_owned()));
        facts.fact("listens on", config.server.listen.to_string());
        if let Some(tls) = config.server_tls() {
            facts.fact("TLS", format!("with {}", tls.certificate.path.display()));
        }
        facts.fact("store", config.store.url.to_string());
        let subsystems = count(config.subsystems.len() as u64, "subsystem");
        facts.fact("declares", format!("{subsystems}, {}", count(config.loops.len() as u64, "loop")));
        if !config.serves.is_empty() {
            let served: Vec<_> = config.serves.iter().map(|served| served.name.to_string()).collect();
            facts.fact("is served as", names(&served, NAMES));
        }
        // These names may be registered later, or be typing errors.
        let expected: Vec<_> = expected_elsewhere(config).iter().map(ToString::to_string).collect();
        if !expected.is_empty() {
            facts.fact("expects", format!("{}, not declared here", names(&expected, NAMES)));
        }
        let elsewhere = undeclared(config);
        if !elsewhere.is_empty() {
            facts.fact("not declared", names(&elsewhere, NAMES));
        }
        facts.finish(page)
    }
}

/// Expected names that are not declared, in order.
fn expected_elsewhere(config: &Config) -> Vec<Name> {
    let declared: HashSet<_> = config.subsystems.iter().map(|subsystem| &subsystem.name).collect();
    config.registry.expected.iter().filter(|name| !declared.contains(name)).cloned().collect()
}

/// Names that subsystems wait for or read but that are not declared, with those subsystems.
fn undeclared(config: &Config) -> Vec<String> {
    let declared: HashSet<_> = config.subsystems.iter().map(|subsystem| &subsystem.name).collect();
    let mut found = Vec::new();
    for Subsystem { name, requires, after, reads, .. } in &config.subsystems {
        for (relation, others) in [("requires", requires), ("is after", after), ("reads", reads)] {
            let missing = others.iter().filter(|other| !declared.contains(other));
            found.extend(missing.map(|other| format!("{other} ({name} {relation} it)")));
        }
    }
    found
}

/// Most names that are shown; more would hide the rest.
const NAMES: usize = 8;

fn loops(config: &Config) -> Table {
    let declared = |name: &Name| config.subsystems.iter().any(|subsystem| subsystem.name == *name);
    let mut table = Table::new([left("LOOP"), left("INTERVAL"), long("SUBSYSTEMS")]);
    for IntervalLoop { name, interval, subset, .. } in &config.loops {
        let subset = match subset {
            None => "all".to_owned(),
            Some(names) => {
                let said = names
                    .iter()
                    .map(|name| if declared(name) { name.to_string() } else { format!("{name} (not declared here)") });
                said.collect::<Vec<_>>().join(", ")
            }
        };
        table.row([text(name.as_str()), text(short(*interval)), text(subset)]);
    }
    table
}
