//! The details of one subsystem, line by line.

use super::super::{
    cycles::severity,
    output::{clean, count, escape_json},
    subsystems::{STATUS, facts},
};
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
    /// A name and a state.
    State(&'static str, String),
    /// Text including leading spaces.
    Text(String),
}

/// The lines about a subsystem, without control characters.
pub(super) fn entries(status: &pb::SubsystemStatus) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (what, is) in facts(status).into_iter().filter(|(_, is)| !is.is_empty()) {
        entries.push(if what == STATUS { Entry::State(what, is) } else { Entry::Fact(what.into(), clean(&is)) });
    }
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
                entries.extend(shown.map(|line| Entry::Text(escape_json(line).chars().take(MAX_COLUMNS).collect())));
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
            at(Entry::State(STATUS, "READY".into())),
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
