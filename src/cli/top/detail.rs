//! The details of one subsystem or cycle, line by line.

use super::super::{
    cycles::{self, STATE, severity, why},
    output::{clean, count, escape_json, milliseconds, subsystem_state},
    subsystems::{STATUS, facts},
};
use super::{model::Live, pieces::cut};
use crate::{model::Payload, proto::orchestrator::v1 as pb};

/// Most columns of a line of the output; `subsystems show` prints longer lines.
pub(super) const MAX_COLUMNS: usize = 1_000;
/// Most lines of the output.
const MAX_LINES: usize = 10_000;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Heading of a section.
    Heading(&'static str),
    /// A name and a value.
    Fact(String, String),
    /// A name and a state, and more about it.
    State(String, String, String),
    /// Text including leading spaces.
    Text(String),
}

/// The lines about a subsystem, without control characters.
pub(super) fn entries(status: &pb::SubsystemStatus) -> Vec<Entry> {
    let mut entries = facts_of(facts(status), STATUS);
    if let Some(last) = &status.last {
        if !last.issues.is_empty() {
            entries.push(Entry::Heading("ISSUES"));
        }
        for issue in &last.issues {
            let what = format!("{} {}", severity(issue), clean(&issue.code));
            entries.push(Entry::Fact(what, clean(&issue.message)));
        }
        if !last.metrics.is_empty() {
            entries.push(Entry::Heading("METRICS"));
        }
        let mut metrics: Vec<_> = last.metrics.iter().collect();
        metrics.sort_by_key(|(name, _)| *name);
        entries.extend(metrics.into_iter().map(|(name, value)| Entry::Fact(clean(name), value.to_string())));
    }
    if status.output_cycle_id != 0 {
        entries.push(Entry::Heading("LATEST OUTPUT"));
        match Payload::check(status.output.clone()) {
            Ok(payload) => {
                let json = format!("{:#}", serde_json::Value::from(payload.to_json()));
                let mut lines = json.lines();
                let shown = lines.by_ref().take(MAX_LINES);
                entries.extend(shown.map(|line| Entry::Text(cut(&escape_json(line), MAX_COLUMNS))));
                let more = lines.count();
                if more > 0 {
                    entries.push(Entry::Text(format!("… and {}", count(more as u64, "more line"))));
                }
            }
            Err(malformed) => entries.push(Entry::Text(format!("({malformed})"))),
        }
    }
    entries
}

/// The lines about a recorded cycle, without control characters.
pub(super) fn cycle(cycle: &pb::CycleTelemetry) -> Vec<Entry> {
    let mut entries = facts_of(cycles::facts(cycle), STATE);
    entries.push(Entry::Heading("SUBSYSTEMS"));
    for part in &cycle.subsystems {
        let duration = part.started_at.map(|_| milliseconds(part.duration_ms)).unwrap_or_default();
        let more = clean(format!("{duration:>8}  {}", why(part)).trim_end());
        entries.push(Entry::State(clean(&part.name), subsystem_state(part.state()).to_owned(), more));
    }
    let issues: Vec<_> =
        cycle.subsystems.iter().flat_map(|part| part.issues.iter().map(move |it| (part, it))).collect();
    if !issues.is_empty() {
        entries.push(Entry::Heading("ISSUES"));
    }
    entries.extend(issues.into_iter().map(|(part, issue)| {
        let what = format!("{} {}", severity(issue), clean(&issue.code));
        Entry::Fact(clean(&part.name), format!("{what}: {}", clean(&issue.message)))
    }));
    entries
}

/// The lines about a running cycle.
pub(super) fn running(live: &Live) -> Vec<Entry> {
    let ended = format!("{} of {}", live.counts().ended(), live.stands.len());
    let mut entries = vec![
        Entry::Fact("cycle".into(), live.cycle_id.to_string()),
        Entry::State(STATE.into(), "RUNNING".into(), String::new()),
        Entry::Fact("trigger".into(), live.trigger.clone()),
        Entry::Fact("ended".into(), ended),
        Entry::Heading("SUBSYSTEMS"),
    ];
    let part = |name: &str, state| Entry::State(clean(name), subsystem_state(state).to_owned(), String::new());
    entries.extend(live.stands.iter().map(|stand| part(&stand.name, stand.state)));
    entries
}

/// Names and values, without those that are empty; the value of `state` is a state.
fn facts_of(facts: Vec<(&'static str, String)>, state: &str) -> Vec<Entry> {
    let facts = facts.into_iter().filter(|(_, is)| !is.is_empty());
    let entry = |(what, is): (&str, String)| match what {
        what if what == state => Entry::State(what.into(), is, String::new()),
        what => Entry::Fact(what.into(), clean(&is)),
    };
    facts.map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::model::tests::registered, *};
    use crate::proto::subsystem::v1 as pbs;

    #[test]
    fn the_details_are_complete_and_command_no_terminal() {
        const ESCAPE: &str = "\x1b[31mred\u{202e}\n";
        let output = serde_json::json!({ "n": 1.5, ESCAPE: [ESCAPE], "many": vec![0; 20_000] });
        let last = pb::SubsystemTelemetry {
            issues: vec![pbs::Issue { severity: 0, code: "SLOW".into(), message: ESCAPE.into() }],
            metrics: [("b".into(), 2.0), ("a\x1b".into(), 0.5)].into(),
            ..pb::SubsystemTelemetry::default()
        };
        let status = pb::SubsystemStatus {
            last: Some(last),
            output_cycle_id: 3,
            output: Payload::from_json(output.as_object().unwrap()).unwrap().as_bytes().clone(),
            ..registered("a")
        };
        let entries = entries(&status);
        let at = |entry| entries.iter().position(|it| *it == entry).unwrap_or_else(|| panic!("no {entry:?}"));
        let fact = |what: &str, is: &str| Entry::Fact(what.into(), is.into());
        let order = [
            at(fact("subsystem", "a")),
            at(Entry::State(STATUS.into(), "READY".into(), String::new())),
            at(Entry::Heading("ISSUES")),
            at(fact("WARNING SLOW", "[31mred ")),
            at(Entry::Heading("METRICS")),
            at(fact("a", "0.5")),
            at(fact("b", "2")),
            at(Entry::Heading("LATEST OUTPUT")),
            at(Entry::Text("  \"\\u001b[31mred\\u202e\\n\": [".into())),
        ];
        assert!(order.is_sorted(), "{order:?}");
        assert!(matches!(entries.last(), Some(Entry::Text(more)) if more.starts_with("… and 1")));
        assert!(!format!("{entries:?}").contains(['\x1b', '\u{202e}']));
    }
}
