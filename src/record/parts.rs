//! Reads the parts of a recorded cycle, to remember them in another process.

use std::time::Duration;

use jiff::Timestamp;

use super::decode;
use crate::{
    model::{Code, Issue, Name, Payload, Severity, SkipReason, SubsystemReport, SubsystemState},
    ports::Record,
    proto::{orchestrator::v1 as pb, read_timestamp, subsystem::v1 as pbs},
};

/// The parts of a cycle, and when it started. `None` if it never started, or its start is not known: then it has no
/// parts.
///
/// # Errors
/// The problem: the record can't be read, or a later version wrote it.
pub fn parts(record: &Record) -> Result<Option<(Timestamp, Vec<SubsystemReport>)>, String> {
    let telemetry = decode(record)?;
    let Some(started_at) = telemetry.started_at.and_then(read_timestamp) else { return Ok(None) };
    let parts = telemetry.subsystems.into_iter().map(|part| report(part, started_at));
    Ok(Some((started_at, parts.collect::<Result<_, _>>()?)))
}

/// The report that [`part`](super::part) encodes.
fn report(part: pb::SubsystemTelemetry, cycle_started_at: Timestamp) -> Result<SubsystemReport, String> {
    let name = Name::parse(&part.name).map_err(|error| error.to_string())?;
    let state = state(&part).ok_or_else(|| format!("the part of {name} has a state that is not known"))?;
    // A time before the cycle's start is no time of its part.
    let since_start = |time: Option<_>| {
        let time = time.and_then(read_timestamp)?;
        Duration::try_from(time.duration_since(cycle_started_at)).ok()
    };
    let output = Some(part.output).filter(|output| !output.is_empty()).map(Payload::check).transpose();
    Ok(SubsystemReport {
        state,
        started: since_start(part.started_at),
        ended: since_start(part.finished_at).unwrap_or_default(),
        queued: Duration::try_from_secs_f64(part.queued_ms / 1e3).unwrap_or_default(),
        attempts: part.attempts,
        issues: part.issues.into_iter().map(issue).collect(),
        metrics: part.metrics,
        output_sha256: part.output_sha256[..].try_into().ok(),
        recorded_output: output.map_err(|malformed| format!("the output of {name}: {malformed}"))?,
        name,
    })
}

/// The state of a part in a running cycle; `None` while it is being called. What its progress does not say of it has no
/// meaning.
///
/// # Errors
/// This version does not know the state.
pub fn progress(progress: pb::SubsystemProgress) -> Result<Option<SubsystemState>, String> {
    if progress.state() == pb::SubsystemState::Running {
        return Ok(None);
    }
    let pb::SubsystemProgress { name, state: number, error_code, error_message, .. } = progress;
    // Why it was skipped is in the message.
    let skip_reason = pb::SkipReason::Suspended.into();
    let part = pb::SubsystemTelemetry { state: number, error_code, error_message, skip_reason, ..Default::default() };
    state(&part).map(Some).ok_or_else(|| format!("the part of {name} has a state that is not known"))
}

/// `None` if this version does not know it.
fn state(part: &pb::SubsystemTelemetry) -> Option<SubsystemState> {
    let message = part.error_message.clone();
    Some(match part.state() {
        pb::SubsystemState::Succeeded => SubsystemState::Succeeded,
        pb::SubsystemState::Failed => {
            SubsystemState::Failed(Code::from_name(&part.error_code).unwrap_or(Code::Unknown), message)
        }
        pb::SubsystemState::TimedOut => SubsystemState::TimedOut(message),
        pb::SubsystemState::Skipped => SubsystemState::Skipped(skip_reason(part.skip_reason())?, message),
        pb::SubsystemState::CircuitOpen => SubsystemState::CircuitOpen(message),
        pb::SubsystemState::Cancelled => SubsystemState::Cancelled,
        pb::SubsystemState::Unspecified | pb::SubsystemState::Waiting | pb::SubsystemState::Running => return None,
    })
}

fn skip_reason(reason: pb::SkipReason) -> Option<SkipReason> {
    Some(match reason {
        pb::SkipReason::Unspecified => return None,
        pb::SkipReason::Suspended => SkipReason::Suspended,
        pb::SkipReason::RequirementFailed => SkipReason::RequirementFailed,
        pb::SkipReason::RequirementMissing => SkipReason::RequirementMissing,
        pb::SkipReason::RequirementLeftOut => SkipReason::RequirementLeftOut,
        pb::SkipReason::CycleDeadline => SkipReason::CycleDeadline,
        pb::SkipReason::NotRegistered => SkipReason::NotRegistered,
        pb::SkipReason::OwnerRevoked => SkipReason::OwnerRevoked,
    })
}

fn issue(issue: pbs::Issue) -> Issue {
    let severity = match issue.severity() {
        pbs::Severity::Info => Severity::Info,
        // As the contract says of an issue without one.
        pbs::Severity::Unspecified | pbs::Severity::Warning => Severity::Warning,
        pbs::Severity::Error => Severity::Error,
    };
    Issue { severity, code: issue.code, message: issue.message }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::record::part;

    #[test]
    fn a_part_is_read_as_it_was_encoded() {
        let output = serde_json::json!({ "x": 1 });
        let started_at = "2026-01-01T00:00:00Z".parse().unwrap();
        let whole = |state| SubsystemReport {
            name: Name::parse("a").unwrap(),
            state,
            started: Some(Duration::from_nanos(211_456_789)),
            ended: Duration::from_nanos(998_877_665),
            queued: Duration::from_nanos(1_234_567),
            attempts: 2,
            issues: [Severity::Info, Severity::Warning, Severity::Error]
                .map(|severity| Issue { severity, code: "C".into(), message: "m".into() })
                .to_vec(),
            metrics: BTreeMap::from([("m".to_owned(), 0.5)]),
            output_sha256: Some([7; 32]),
            recorded_output: Some(Payload::from_json(output.as_object().unwrap()).unwrap()),
        };
        let message = || "why".to_owned();
        for state in [
            SubsystemState::Succeeded,
            SubsystemState::Failed(Code::Internal, message()),
            SubsystemState::TimedOut(message()),
            SubsystemState::CircuitOpen(message()),
        ] {
            let report = whole(state);
            assert_eq!(super::report(part(&report, Some(started_at)), started_at), Ok(report));
        }
        for reason in [
            SkipReason::Suspended,
            SkipReason::RequirementFailed,
            SkipReason::RequirementMissing,
            SkipReason::RequirementLeftOut,
            SkipReason::CycleDeadline,
            SkipReason::NotRegistered,
            SkipReason::OwnerRevoked,
        ] {
            let state = SubsystemState::Skipped(reason, message());
            let report = SubsystemReport::not_called(Name::parse("a").unwrap(), state);
            assert_eq!(super::report(part(&report, Some(started_at)), started_at), Ok(report));
        }
        let unknown = pb::SubsystemTelemetry { name: "a".into(), state: 99, ..Default::default() };
        assert!(super::report(unknown, started_at).unwrap_err().contains("the part of a has a state"));
    }
}
