//! What a change of a registration has changed: each field, before and after.

use std::collections::{BTreeMap, BTreeSet};

use super::super::{
    output::{duration, names},
    table::{Facts, Page, has_unicode},
};
use crate::{model::Payload, proto::orchestrator::v1 as pb};

/// A line for each change between two states of a subsystem: `timeout  10s → 4s`.
pub(super) fn changes(previous: &pb::SubsystemStatus, now: &pb::SubsystemStatus, page: Page) -> String {
    let becomes = if has_unicode() { "→" } else { "->" };
    let (before, after) = (fields(previous), fields(now));
    let paths: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let mut facts = Facts::new();
    for path in paths {
        let [before, after] = [&before, &after].map(|fields| fields.get(path).map_or("", String::as_str));
        if before != after {
            let [before, after] = [before, after].map(|value| if value.is_empty() { "-" } else { value });
            facts.fact(path, format!("{before} {becomes} {after}"));
        }
    }
    if now.redacted {
        facts.fact("parameters", "left out: operators see them");
    }
    facts.finish(page)
}

/// The values of all fields by their paths, in the form that flags accept. A field without a value has an empty one.
fn fields(status: &pb::SubsystemStatus) -> BTreeMap<String, String> {
    let pb::Registration {
        name: _,
        endpoint,
        phase,
        requires,
        after,
        reads,
        timeout,
        retry,
        breaker,
        critical,
        parameters,
        limits,
        record_output,
        tls,
    } = status.registration.clone().unwrap_or_default();
    let pb::RetryPolicy { max_attempts, initial_backoff, max_backoff, backoff_multiplier, retryable_status_codes } =
        retry.unwrap_or_default();
    let pb::BreakerPolicy { failure_threshold, open_for, disabled } = breaker.unwrap_or_default();
    let pb::Limits { max_message_bytes, max_output_bytes, max_metrics, max_issues } = limits.unwrap_or_default();
    let is = |it: bool| if it { "yes" } else { "no" }.to_owned();
    let list = |of: &[String]| names(of, usize::MAX);
    let fields = [
        ("endpoint", endpoint),
        ("phase", phase.to_string()),
        ("requires", list(&requires)),
        ("after", list(&after)),
        ("reads", list(&reads)),
        ("timeout", duration(timeout.as_ref())),
        ("retry.max_attempts", max_attempts.to_string()),
        ("retry.initial_backoff", duration(initial_backoff.as_ref())),
        ("retry.max_backoff", duration(max_backoff.as_ref())),
        ("retry.backoff_multiplier", backoff_multiplier.to_string()),
        ("retry.retryable_status_codes", list(&retryable_status_codes)),
        ("breaker.failure_threshold", failure_threshold.to_string()),
        ("breaker.open_for", duration(open_for.as_ref())),
        ("breaker.disabled", is(disabled)),
        ("critical", is(critical)),
        ("limits.max_message_bytes", max_message_bytes.to_string()),
        ("limits.max_output_bytes", max_output_bytes.to_string()),
        ("limits.max_metrics", max_metrics.to_string()),
        ("limits.max_issues", max_issues.to_string()),
        ("record_output", is(record_output)),
        ("tls.peer", tls.map(|tls| tls.peer).unwrap_or_default()),
        // Not in the registration.
        ("owner", status.owner.clone()),
        ("lease", is(status.lease_expires_at.is_some())),
    ];
    // The service has checked them.
    let parameters = Payload::check(parameters).unwrap_or_default().to_json();
    let parameters = parameters.into_iter().map(|(key, value)| (format!("parameters.{key}"), value.to_string()));
    fields.into_iter().map(|(path, value)| (path.to_owned(), value)).chain(parameters).collect()
}
