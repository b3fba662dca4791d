//! `orchestrator cycles`: the history.

use clap::Subcommand;

use super::{
    Exit, Failure, known,
    output::{
        age, clean, count, cycle_state, grouped, milliseconds, names, note, one_of, parse_positive, parse_time,
        payload, print, sections, skip_reason, subsystem_state, telemetry, time, trigger, word,
    },
    remote::Remote,
    table::{Cell, Facts, Page, Table, left, long, number, right, state, text},
    watch::{CYCLE_STATES, unreadable},
};
use crate::proto::{orchestrator::v1 as pb, subsystem::v1 as pbs};

/// Show the history of cycles, or remove the oldest part of it
#[derive(Debug, clap::Args)]
pub(super) struct Cycles {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(List),
    Show(Show),
    Prune(Prune),
}

/// Remove the oldest records for good, beyond what retention removes
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Records are removed in steps, oldest first, up to the first one that is within the limit; the newest one stays. Cycles \
go on meanwhile. The log of the history lists the removed entries, and the audit has the caller. It can be interrupted \
safely. It needs the role admin. `orchestrator backup` and `orchestrator export` keep what is removed.

The file of the database keeps its size, and new records use the free pages; `orchestrator store compact` makes it \
smaller.

Examples:
  orchestrator cycles prune --finished-before 2160h --dry-run
  orchestrator cycles prune --finished-before 2026-01-01T00:00:00Z
  orchestrator cycles prune --keep-newest 10000")]
struct Prune {
    /// Keep this number of the newest records
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u64>, required_unless_present = "finished_before",
          conflicts_with = "finished_before")]
    keep_newest: Option<u64>,
    /// Remove cycles that finished before this time: 2026-01-31T12:00:00Z, 2026-01-31, yesterday, or 2160h (ago)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    finished_before: Option<prost_types::Timestamp>,
    /// Remove nothing, and tell the number of records that would be removed
    #[arg(long)]
    dry_run: bool,
}

/// List recorded cycles, newest first
#[derive(Debug, clap::Args)]
#[command(
    visible_alias = "ls",
    after_help = "\
With --output json, one object: {\"cycles\":[...]} with a CycleTelemetry each, written page by page; with ndjson, a \
CycleTelemetry a line.

Examples:
  orchestrator cycles list
  orchestrator cycles list --state failed --state degraded --finished-from 24h
  orchestrator cycles list --subsystem prices --subsystem-state timed_out
  orchestrator cycles list --request-id nightly-2026-11-28
  orchestrator cycles list --finished-from yesterday --finished-before today
  orchestrator cycles list --all --output ndjson | jq -r .durationMs"
)]
struct List {
    /// Most cycles to list [default: 20]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u64>)]
    limit: Option<u64>,
    /// List all cycles that pass the filter
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Only cycles that ended in this state; may be repeated
    #[arg(
        long = "state",
        value_name = "STATE",
        value_delimiter = ',',
        value_parser = one_of(CYCLE_STATES, cycle_state)
    )]
    states: Vec<pb::CycleState>,
    /// Only cycles with this trigger
    #[arg(long, value_name = "TRIGGER", value_parser = one_of(TRIGGERS, trigger_word))]
    trigger: Option<pb::Trigger>,
    /// Only cycles of this loop
    #[arg(long = "loop", value_name = "NAME")]
    loop_name: Option<String>,
    /// Only cycles that were run with this --request-id
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Only cycles in which this subsystem took part
    #[arg(long, value_name = "NAME")]
    subsystem: Option<String>,
    /// Only cycles in which the part of --subsystem ended in this state; may be repeated
    #[arg(long = "subsystem-state", value_name = "STATE", value_delimiter = ',', requires = "subsystem",
          value_parser = one_of(ENDED, subsystem_state))]
    subsystem_states: Vec<pb::SubsystemState>,
    /// Only cycles that finished at or after this time: 2026-01-31T12:00:00Z, 2026-01-31, yesterday, or 2h (ago)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    finished_from: Option<prost_types::Timestamp>,
    /// Only cycles that finished before this time, in the same forms
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    finished_before: Option<prost_types::Timestamp>,
}

/// Show the record of one cycle
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  orchestrator cycles show 12
  orchestrator cycles show 12 --details
  orchestrator cycles show 12 --output json | jq '.telemetry.subsystems[].state'")]
struct Show {
    /// The id of the cycle
    #[arg(value_name = "CYCLE_ID", value_parser = parse_cycle_id)]
    cycle_id: u64,
    /// Also show the metrics and outputs of its subsystems
    #[arg(long)]
    details: bool,
}

const TRIGGERS: &[pb::Trigger] = &[pb::Trigger::Manual, pb::Trigger::Loop, pb::Trigger::Parent];

fn trigger_word(trigger: pb::Trigger) -> &'static str {
    word(trigger.as_str_name(), "TRIGGER_")
}

/// How a subsystem's part can end.
const ENDED: &[pb::SubsystemState] = &[
    pb::SubsystemState::Succeeded,
    pb::SubsystemState::Failed,
    pb::SubsystemState::TimedOut,
    pb::SubsystemState::Skipped,
    pb::SubsystemState::CircuitOpen,
    pb::SubsystemState::Cancelled,
];

impl Cycles {
    /// Runs the subcommand.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        match self.command {
            Command::List(list) => list.run(&self.remote).await,
            Command::Show(show) => show.run(&self.remote).await,
            Command::Prune(prune) => prune.run(&self.remote).await,
        }
    }
}

impl Prune {
    async fn run(self, remote: &Remote) -> Result<Exit, Failure> {
        let Self { keep_newest, finished_before, dry_run } = self;
        let request = pb::PruneCyclesRequest { keep_newest: keep_newest.unwrap_or(0), finished_before, dry_run };
        let (mut client, health) = remote.connect_for_long().await?;
        let answer = remote.patiently(&health, client.prune_cycles(request)).await?.into_inner();
        remote.format.show("PruneCyclesResponse", &answer, |answer| {
            let (verb, removed) = (if dry_run { "would remove" } else { "removed" }, count(answer.removed, "record"));
            format!("{verb} {removed}; the oldest revision is {}\n", answer.oldest_revision)
        })?;
        if !answer.kept.is_empty() {
            note(&clean(&answer.kept));
        }
        Ok(Exit::Done)
    }
}

impl List {
    async fn run(self, remote: &Remote) -> Result<Exit, Failure> {
        /// Records in one page: about 3 MB with 28 subsystems, where the service ends a page anyway.
        const PAGE: u64 = 1000;
        /// Cycles that are listed unless the user says how many.
        const LIMIT: u64 = 20;
        if let (Some(from), Some(before)) = (&self.finished_from, &self.finished_before)
            && (from.seconds, from.nanos) >= (before.seconds, before.nanos)
        {
            let (from, before) = (time(Some(from)), time(Some(before)));
            let message = format!("--finished-before is {before}, which is not after --finished-from, {from}");
            return Err(Failure::new(Exit::Usage, message));
        }
        let max = if self.all { u64::MAX } else { self.limit.unwrap_or(LIMIT) };
        let is_cut_unasked = !self.all && self.limit.is_none();
        let mut request = pb::ListCyclesRequest {
            page_size: 0,
            page_token: String::new(),
            states: self.states.into_iter().map(Into::into).collect(),
            trigger: self.trigger.map_or(0, Into::into),
            r#loop: self.loop_name.unwrap_or_default(),
            subsystem: self.subsystem.unwrap_or_default(),
            subsystem_states: self.subsystem_states.into_iter().map(Into::into).collect(),
            finished_from: self.finished_from,
            finished_before: self.finished_before,
            request_id: self.request_id.unwrap_or_default(),
        };
        let mut client = remote.connect().await?;
        let mut list = None;
        let mut table = table();
        let mut found = 0;
        let has_more;
        loop {
            request.page_size = u32::try_from(max.saturating_sub(found).min(PAGE)).unwrap_or(u32::MAX);
            let page = remote.quickly(client.list_cycles(request.clone())).await?.into_inner();
            found += (page.cycles.len() + page.unreadable.len()) as u64;
            for cycle in &page.unreadable {
                note(&unreadable(cycle));
            }
            let is_last = page.next_page_token.is_empty() || found >= max;
            if is_last && found == 0 {
                // A name without cycles may be a typing error.
                let named = |name: &String| if name.is_empty() { Vec::new() } else { vec![name.clone()] };
                known::check(remote, &mut client, &named(&request.subsystem), &named(&request.r#loop)).await?;
            }
            if found == 0 && !is_last {
                // The table is printed at the end.
            } else {
                if list.is_none() {
                    list = remote.format.list("cycles")?;
                }
                for cycle in &page.cycles {
                    match &mut list {
                        Some(list) => list.add("CycleTelemetry", cycle)?,
                        None => table.row(row(&telemetry(cycle)?)),
                    }
                }
            }
            if is_last {
                has_more = !page.next_page_token.is_empty();
                break;
            }
            request.page_token = page.next_page_token;
        }
        match list {
            Some(list) => list.end()?,
            None => print(&table.or("no cycles", remote.format.page()))?,
        }
        if is_cut_unasked && has_more {
            note(&format!("There are more than these {LIMIT}: use --limit or --all."));
        }
        Ok(Exit::Done)
    }
}

impl Show {
    async fn run(self, remote: &Remote) -> Result<Exit, Failure> {
        let mut client = remote.connect().await?;
        let request = pb::GetCycleRequest { cycle_id: self.cycle_id };
        let response = remote.quickly(client.get_cycle(request)).await?.into_inner();
        let record = telemetry(&response.telemetry)?;
        remote.format.show("GetCycleResponse", &response, |_| cycle(&record, self.details, remote.format.page()))?;
        Ok(Exit::Done)
    }
}

/// A table for [`row`]s.
fn table() -> Table {
    Table::new([
        left("CYCLE"),
        left("STATE"),
        left("TRIGGER").minor(),
        left("FINISHED"),
        right("DURATION"),
        right("SUCCEEDED").minor(),
        long("ERROR"),
    ])
}

/// The row of a cycle.
fn row(cycle: &pb::CycleTelemetry) -> [Cell; 7] {
    [
        // Without thousands separators, so that it can be copied.
        text(cycle.cycle_id.to_string()),
        state(cycle_state(cycle.state())),
        text(trigger(cycle.trigger(), &cycle.r#loop)),
        text(time(cycle.finished_at.as_ref())),
        text(took(cycle)),
        text(succeeded(cycle)),
        text(&cycle.error),
    ]
}

/// Stands for what nobody has recorded.
const UNKNOWN: &str = "unknown";

/// True if the process ended before it could record the parts of the cycle, and when it ended.
fn is_interrupted(cycle: &pb::CycleTelemetry) -> bool {
    cycle.state() == pb::CycleState::Interrupted
}

/// How long it took, if that is known.
pub(super) fn took(cycle: &pb::CycleTelemetry) -> String {
    if is_interrupted(cycle) { UNKNOWN.to_owned() } else { milliseconds(cycle.duration_ms) }
}

/// Number of its subsystems that succeeded, of all, if that is known.
pub(super) fn succeeded(cycle: &pb::CycleTelemetry) -> String {
    if is_interrupted(cycle) {
        return UNKNOWN.to_owned();
    }
    let succeeded = cycle.subsystems.iter().filter(|part| part.state() == pb::SubsystemState::Succeeded).count();
    format!("{}/{}", grouped(succeeded as u64), grouped(cycle.subsystems.len() as u64))
}

/// A recorded cycle, with all its subsystems.
pub(super) fn cycle(cycle: &pb::CycleTelemetry, details: bool, page: Page) -> String {
    let mut shown = Facts::new();
    for (what, is) in facts(cycle) {
        if what == STATE { shown.state(what, &is) } else { shown.fact(what, is) }
    }
    let detail = |table: fn(&[pb::SubsystemTelemetry]) -> Table| {
        if details { table(&cycle.subsystems).finish_unless_empty(page) } else { String::new() }
    };
    let [parts, issues] = [parts(cycle), issues(&cycle.subsystems)].map(|table| table.finish_unless_empty(page));
    sections([shown.finish(page), parts, issues, detail(metrics), detail(outputs)])
}

/// Name of the fact that is a state.
pub(super) const STATE: &str = "state";

/// The cycle as names and values, without its subsystems. A value is empty if it does not apply.
pub(super) fn facts(cycle: &pb::CycleTelemetry) -> Vec<(&'static str, String)> {
    let finished = cycle.finished_at.as_ref().map(|at| format!("{} ({})", time(Some(at)), age(Some(at))));
    let truncated = "it was larger than the service's cycle.max_record_bytes";
    vec![
        ("cycle", cycle.cycle_id.to_string()),
        (STATE, cycle_state(cycle.state()).to_owned()),
        ("error", cycle.error.clone()),
        ("trigger", trigger(cycle.trigger(), &cycle.r#loop)),
        ("parent", cycle.parent.as_ref().map(parent).unwrap_or_default()),
        ("triggered by", cycle.triggered_by.clone()),
        ("request id", cycle.request_id.clone()),
        ("trace", cycle.trace_id.clone()),
        ("started", time(cycle.started_at.as_ref())),
        ("finished", finished.unwrap_or_default()),
        ("duration", took(cycle)),
        ("succeeded", succeeded(cycle)),
        ("critical path", chain(&cycle.critical_path)),
        ("epoch, revision", format!("{}, {}", cycle.epoch, cycle.revision)),
        ("truncated", if cycle.truncated { truncated.to_owned() } else { String::new() }),
    ]
}

/// The cycle of a parent, in words.
fn parent(parent: &pb::ParentCycle) -> String {
    let pb::ParentCycle { orchestrator_id, subsystem, epoch, cycle_id } = parent;
    format!("cycle {cycle_id} of {}, epoch {epoch}, as its subsystem {}", clean(orchestrator_id), clean(subsystem))
}

fn parts(cycle: &pb::CycleTelemetry) -> Table {
    let mut table = Table::new([
        left("SUBSYSTEM"),
        left("STATE"),
        right("START").minor(),
        right("DURATION"),
        right("QUEUED").minor(),
        right("ATTEMPTS").minor(),
        long("REASON"),
    ]);
    for part in &cycle.subsystems {
        let called = part.started_at.is_some();
        let when_called = |shown: String| if called { text(shown) } else { text("-") };
        table.row([
            text(&part.name),
            state(subsystem_state(part.state())),
            when_called(format!("+{}", milliseconds(since(cycle, part)))),
            when_called(milliseconds(part.duration_ms)),
            when_called(milliseconds(part.queued_ms)),
            // It may have failed before its first attempt, in `Initialize`.
            if part.attempts > 0 { number(part.attempts) } else { text("-") },
            text(why(part)),
        ]);
    }
    table
}

/// Why a subsystem did not succeed; empty if it succeeded.
pub(super) fn why(part: &pb::SubsystemTelemetry) -> String {
    let reason = match (part.skip_reason(), part.error_message.as_str()) {
        // The message names the subsystem that caused it.
        (reason, "") => skip_reason(reason),
        (_, message) => message,
    };
    format!("{} {reason}", part.error_code).trim().to_owned()
}

/// Milliseconds from the cycle's start to the subsystem's.
#[allow(clippy::cast_precision_loss, reason = "far below what a float holds")]
fn since(cycle: &pb::CycleTelemetry, part: &pb::SubsystemTelemetry) -> f64 {
    let (Some(start), Some(part)) = (cycle.started_at, part.started_at) else { return 0.0 };
    (part.seconds - start.seconds) as f64 * 1e3 + f64::from(part.nanos - start.nanos) / 1e6
}

fn issues(parts: &[pb::SubsystemTelemetry]) -> Table {
    let mut table = Table::new([left("SUBSYSTEM"), left("SEVERITY"), left("ISSUE"), long("MESSAGE")]);
    for (part, issue) in parts.iter().flat_map(|part| part.issues.iter().map(move |issue| (part, issue))) {
        table.row([text(&part.name), text(severity(issue)), text(&issue.code), text(&issue.message)]);
    }
    table
}

/// The severity of an issue: WARNING if it is not set.
pub(super) fn severity(issue: &pbs::Issue) -> &'static str {
    let severity = match issue.severity() {
        pbs::Severity::Unspecified => pbs::Severity::Warning,
        severity => severity,
    };
    word(severity.as_str_name(), "SEVERITY_")
}

fn metrics(parts: &[pb::SubsystemTelemetry]) -> Table {
    let mut table = Table::new([left("SUBSYSTEM"), left("METRIC"), right("VALUE")]);
    for (part, (name, value)) in parts.iter().flat_map(|part| part.metrics.iter().map(move |metric| (part, metric))) {
        table.row([text(&part.name), text(name), text(value.to_string())]);
    }
    table
}

fn outputs(parts: &[pb::SubsystemTelemetry]) -> Table {
    let mut table = Table::new([left("SUBSYSTEM"), long("OUTPUT").whole()]);
    for part in parts.iter().filter(|part| !part.output.is_empty()) {
        table.row([text(&part.name), text(payload(&part.output))]);
    }
    table
}

/// A cycle in one line, for use in a larger text.
pub(super) fn in_short(cycle: &pb::CycleTelemetry) -> String {
    let (id, state) = (cycle.cycle_id, cycle_state(cycle.state()));
    let (when, trigger) = (age(cycle.finished_at.as_ref()), trigger(cycle.trigger(), &cycle.r#loop));
    let error = if cycle.error.is_empty() { String::new() } else { format!(": {}", clean(&cycle.error)) };
    if is_interrupted(cycle) {
        return format!("cycle {id} {state}, found {when}, {trigger}, its parts are not known{error}");
    }
    format!("cycle {id} {state} in {}, {when}, {trigger}, {} succeeded{error}", took(cycle), succeeded(cycle))
}

/// Names with arrows between them.
pub(super) fn chain(path: &[String]) -> String {
    /// Most names that are shown; the JSON contains all.
    const SHOWN: usize = 30;
    names(path, SHOWN).replace(", ", " > ")
}

/// Reads the id of a cycle.
///
/// # Errors
/// The text is invalid; the message says which form is valid.
pub(super) fn parse_cycle_id(text: &str) -> Result<u64, String> {
    let none =
        || "give the id of a cycle: see `orchestrator cycles list`, and `orchestrator status` for running cycles";
    text.parse().ok().filter(|id| *id > 0).ok_or_else(|| none().to_owned())
}

#[cfg(test)]
mod tests {
    use super::{super::table::tests::assert_screens, *};
    use pb::SubsystemState::{CircuitOpen, Failed, Skipped, Succeeded, TimedOut};

    fn at(seconds: i64) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds: 1_795_860_000 + seconds, nanos: 250_000_000 }
    }

    fn part(name: &str, state: pb::SubsystemState, ms: f64) -> pb::SubsystemTelemetry {
        let started_at = (!matches!(state, Skipped | CircuitOpen)).then(|| at(1));
        pb::SubsystemTelemetry {
            name: name.into(),
            state: state.into(),
            started_at,
            duration_ms: ms,
            attempts: u32::from(started_at.is_some()),
            ..pb::SubsystemTelemetry::default()
        }
    }

    fn failing(name: &str, state: pb::SubsystemState, code: &str, message: &str) -> pb::SubsystemTelemetry {
        let (error_code, error_message) = (code.to_owned(), message.to_owned());
        pb::SubsystemTelemetry { error_code, error_message, ..part(name, state, 10_000.0) }
    }

    fn recorded(cycle_id: u64, state: pb::CycleState, error: &str) -> pb::CycleTelemetry {
        pb::CycleTelemetry {
            cycle_id,
            state: state.into(),
            error: error.into(),
            trigger: pb::Trigger::Loop.into(),
            r#loop: "heartbeat".into(),
            started_at: Some(at(0)),
            finished_at: Some(at(i64::try_from(cycle_id).unwrap_or_default())),
            duration_ms: 1_234.5,
            epoch: 3,
            revision: cycle_id,
            subsystems: vec![part("prices", Succeeded, 12.3), part("news", Succeeded, 0.5)],
            ..pb::CycleTelemetry::default()
        }
    }

    const ERROR: &str = "2 of 6 failed: prices UNAVAILABLE: connection refused by http://prices.example.org:50051, \
                         sentiment DEADLINE_EXCEEDED: no answer within 10s; signals skipped: it requires prices, which \
                         did not succeed";

    #[test]
    fn a_list_fits_its_terminal() {
        let mut table = table();
        table.row(row(&recorded(12_345, pb::CycleState::Degraded, ERROR)));
        table.row(row(&recorded(12_344, pb::CycleState::Succeeded, "")));
        let interrupted = recorded(12_343, pb::CycleState::Interrupted, "the service was stopped while it ran");
        table.row(row(&pb::CycleTelemetry { subsystems: Vec::new(), ..interrupted }));
        assert_screens("cycles-list", |page| table.finish(page));
    }

    #[test]
    fn a_cycle_fits_its_terminal() {
        let issue = pbs::Issue {
            severity: pbs::Severity::Error.into(),
            code: "STALE_FEED".into(),
            message: "the feed of the exchange has not moved for 37 s, so that the last known prices are used".into(),
        };
        let subsystems = vec![
            failing("prices", Failed, "UNAVAILABLE", "connection refused by http://prices.example.org:50051/"),
            failing("sentiment-of-the-market", TimedOut, "DEADLINE_EXCEEDED", "no answer within 10s"),
            pb::SubsystemTelemetry {
                skip_reason: pb::SkipReason::RequirementFailed.into(),
                ..failing("signals", Skipped, "", "it requires prices, which did not succeed")
            },
            pb::SubsystemTelemetry { issues: vec![issue], attempts: 2, ..part("exchange", Succeeded, 431.0) },
            pb::SubsystemTelemetry { metrics: [("orders".into(), 17.5)].into(), ..part("orders", Succeeded, 2.0) },
            part("news", Succeeded, 0.5),
        ];
        let cycle_of_six = pb::CycleTelemetry {
            trigger: pb::Trigger::Manual.into(),
            triggered_by: "cert:spiffe://fleet.example.org/operators/ops".into(),
            request_id: "nightly-2026-11-28".into(),
            critical_path: ["exchange", "prices", "sentiment-of-the-market", "signals"].map(String::from).to_vec(),
            subsystems,
            // An age would change with the time of the test.
            finished_at: None,
            ..recorded(12_345, pb::CycleState::Degraded, ERROR)
        };
        assert_screens("cycles-show", |page| cycle(&cycle_of_six, true, page));
    }
}
