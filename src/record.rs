//! The only codec between a finished cycle and its bytes: the wire form of `CycleTelemetry`.
//!
//! A cycle is encoded once, here, and these bytes are committed, returned and streamed. Only the revision is added
//! later, by the commit. Requests of waiting cycles are stored in the wire form of `RunCycleRequest`.

mod audit;
mod parts;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;
use jiff::Timestamp;
use prost::Message;

use crate::{
    ledger::{Control, LogBegan, LogBeganReason, RecordsPruned},
    model::{
        CallPath, CycleId, CycleRequest, CycleState, Epoch, FinishedCycle, Freshness, Identity, Issue, Name, Output,
        ParentCycle, Payload, Revision, Severity, SkipReason, SpanContext, SubsystemReport, SubsystemState, Trigger,
        text::shortened,
    },
    ports::{Checks, Record, TriggerKind},
    proto::{duration, orchestrator::v1 as pb, read_duration, read_timestamp, subsystem::v1 as pbs, timestamp},
};

pub use self::{
    audit::{check_event, copies_events, copy_event, decode_cause, encode_cause, encode_event, read_event},
    parts::{parts, progress},
};

/// What the records and audit events of a store have to pass.
pub const CHECKS: Checks = Checks { record: check, event: check_event, control: decode_control };

/// Most bytes of an error message in a record.
const MAX_MESSAGE: usize = 1 << 10;
/// Most bytes of an error message in a record that would be too large.
const SHORT_MESSAGE: usize = 64;

/// The record of a cycle, complete except for its revision.
#[derive(Clone, Debug)]
pub struct Encoded(Record);

impl Encoded {
    /// Bytes of the field of the revision, with the largest value: a tag and a varint.
    const REVISION_BYTES: usize = 11;

    /// The record with this revision. The order of fields has no meaning in the wire form, so the revision comes last.
    pub fn at(&self, revision: Revision) -> Record {
        const TAG: u32 = 14;
        let mut bytes = Vec::with_capacity(self.size());
        bytes.extend_from_slice(&self.0.bytes);
        prost::encoding::uint64::encode(TAG, &revision.0, &mut bytes);
        Record { revision, bytes: bytes.into(), ..self.0.clone() }
    }

    /// Its size in bytes, with the largest revision.
    pub fn size(&self) -> usize {
        self.0.bytes.len() + Self::REVISION_BYTES
    }
}

/// Encodes a cycle in at most `max_bytes` bytes, as far as possible by leaving out outputs, then metrics and issues
/// that are not errors, and the ends of the messages of the others, then these issues, then the ends of error messages,
/// then whole error messages, then the critical path: 3 MiB are enough for 20,000 subsystems, whatever their results.
pub fn encode(cycle: &FinishedCycle, max_bytes: usize) -> Encoded {
    let mut telemetry = telemetry(cycle);
    let max_bytes = max_bytes.saturating_sub(Encoded::REVISION_BYTES);
    for shorten in [leave_out_outputs, leave_out_details, leave_out_issues, shorten_messages, leave_out_messages] {
        if telemetry.encoded_len() <= max_bytes {
            break;
        }
        telemetry.truncated = true;
        telemetry.subsystems.iter_mut().for_each(shorten);
    }
    if telemetry.encoded_len() > max_bytes {
        telemetry.critical_path.clear();
    }
    Encoded(Record {
        cycle_id: cycle.cycle_id,
        revision: Revision::default(),
        epoch: cycle.epoch,
        state: cycle.state,
        trigger: cycle.trigger.clone(),
        request_id: cycle.request_id.clone(),
        triggered_by: cycle.triggered_by.clone(),
        finished_at: cycle.finished_at,
        bytes: telemetry.encode_to_vec().into(),
    })
}

/// The stored request of a waiting cycle, to run it in another process.
#[derive(Clone, PartialEq, prost::Message)]
struct Waiting {
    #[prost(message, optional, tag = "1")]
    request: Option<pb::RunCycleRequest>,
    /// The span of its caller, in the form of W3C Trace Context.
    #[prost(string, optional, tag = "2")]
    traceparent: Option<String>,
    #[prost(string, optional, tag = "3")]
    tracestate: Option<String>,
    /// The path of its calls, and its inputs, if a parent started it.
    #[prost(string, optional, tag = "4")]
    path: Option<String>,
    #[prost(btree_map = "string, message", tag = "5")]
    inputs: BTreeMap<String, pbs::Input>,
}

/// Encodes the request of a waiting cycle, to run it in another process, without its due time, `request_id` and
/// caller, which are stored separately.
pub fn encode_request(request: &CycleRequest) -> Bytes {
    let message = pb::RunCycleRequest {
        subsystems: request.subset.iter().flat_map(|names| names.iter()).map(ToString::to_string).collect(),
        parameters: request.parameters.as_bytes().clone(),
        deadline: request.deadline.and_then(duration),
        record_outputs: request.record_outputs,
        ..pb::RunCycleRequest::default()
    };
    let trace = request.trace.as_ref();
    let waiting = Waiting {
        request: Some(message),
        traceparent: trace.map(ToString::to_string),
        tracestate: trace.and_then(|trace| trace.state.as_deref()).map(str::to_owned),
        path: request.path.as_ref().map(ToString::to_string),
        inputs: request.inputs.iter().map(|(name, output)| (name.to_string(), input(output))).collect(),
    };
    waiting.encode_to_vec().into()
}

/// Decodes the result of [`encode_request`]: a request without a caller, due in 1970.
///
/// # Errors
/// The problem.
pub fn decode_request(bytes: Bytes) -> Result<CycleRequest, String> {
    let Waiting { request, traceparent, tracestate, path, inputs } =
        Waiting::decode(bytes).map_err(|error| error.to_string())?;
    let message = request.ok_or("it has no request")?;
    let names: Result<Vec<_>, _> = message.subsystems.iter().map(|name| Name::parse(name)).collect();
    let names = names.map_err(|error| error.to_string())?;
    let parameters = Payload::check(message.parameters).map_err(|error| error.to_string())?;
    let deadline = message.deadline.map(|it| read_duration(it).ok_or("its deadline is not a duration")).transpose()?;
    let path = path.map(|path| CallPath::parse(&path)).transpose().map_err(|error| error.to_string())?;
    Ok(CycleRequest {
        subset: (!names.is_empty()).then(|| names.into()),
        parameters,
        deadline,
        record_outputs: message.record_outputs,
        trace: traceparent.and_then(|traceparent| SpanContext::parse(&traceparent, tracestate.as_deref())),
        path,
        inputs: Arc::new(read_inputs(inputs)?),
        ..CycleRequest::over_all(Trigger::Manual, Timestamp::UNIX_EPOCH)
    })
}

/// An input as the contract has it.
fn input((output, freshness): &(Output, Freshness)) -> pbs::Input {
    let freshness = match freshness {
        Freshness::Fresh => pbs::Freshness::Fresh,
        Freshness::Stale => pbs::Freshness::Stale,
    };
    pbs::Input { output: output.payload.as_bytes().clone(), freshness: freshness.into(), cycle_id: output.cycle_id.0 }
}

/// The inputs of a request, without absent ones.
///
/// # Errors
/// The problem, which reads well after "the request": a name or an output is malformed.
pub fn read_inputs(inputs: BTreeMap<String, pbs::Input>) -> Result<BTreeMap<Name, (Output, Freshness)>, String> {
    let mut read = BTreeMap::new();
    for (name, input) in inputs {
        let freshness = match input.freshness() {
            pbs::Freshness::Fresh => Freshness::Fresh,
            pbs::Freshness::Stale => Freshness::Stale,
            pbs::Freshness::Absent | pbs::Freshness::Unspecified => continue,
        };
        let of_name = Name::parse(&name).map_err(|error| format!("has an input that has no valid name: {error}"))?;
        let payload =
            Payload::check(input.output).map_err(|malformed| format!("has an input {name} that {malformed}"))?;
        read.insert(of_name, (Output { cycle_id: CycleId(input.cycle_id), payload }, freshness));
    }
    Ok(read)
}

/// Encodes the entry of the log that says which records were removed.
pub fn encode_pruned(pruned: &RecordsPruned) -> Bytes {
    let message = pb::RecordsPruned { leaves: encode_leaves(&pruned.leaves), first_kept: pruned.first_kept };
    let entry = Some(pb::control_entry::Entry::RecordsPruned(message));
    pb::ControlEntry { entry }.encode_to_vec().into()
}

/// Encodes the entry of the log that says that a new one began.
pub fn encode_began(began: &LogBegan) -> Bytes {
    let reason = match began.reason {
        LogBeganReason::KeyMissing => pb::LogBeganReason::KeyMissing,
        LogBeganReason::CheckpointMissing => pb::LogBeganReason::CheckpointMissing,
        LogBeganReason::Behind => pb::LogBeganReason::Behind,
        LogBeganReason::Accepted => pb::LogBeganReason::Accepted,
    };
    let message = pb::LogBegan {
        reason: reason.into(),
        previous: began.previous.clone(),
        missing: encode_leaves(&began.missing),
    };
    let entry = Some(pb::control_entry::Entry::LogBegan(message));
    pb::ControlEntry { entry }.encode_to_vec().into()
}

/// Decodes a control entry of the log: the result of [`encode_pruned`] or [`encode_began`].
///
/// # Errors
/// The problem.
pub fn decode_control(bytes: &[u8]) -> Result<Control, String> {
    let entry = pb::ControlEntry::decode(bytes).map_err(|error| error.to_string())?.entry;
    Ok(match entry {
        Some(pb::control_entry::Entry::RecordsPruned(pb::RecordsPruned { leaves, first_kept })) => {
            Control::Pruned(RecordsPruned { leaves: decode_leaves(&leaves), first_kept })
        }
        Some(pb::control_entry::Entry::LogBegan(began)) => Control::Began {
            counts_anew: matches!(began.reason(), pb::LogBeganReason::KeyMissing | pb::LogBeganReason::Accepted),
            missing: decode_leaves(&began.missing),
        },
        None => Control::Unknown,
    })
}

fn encode_leaves(leaves: &[Range<u64>]) -> Vec<pb::LeafRange> {
    leaves.iter().map(|leaves| pb::LeafRange { first: leaves.start, count: leaves.end - leaves.start }).collect()
}

fn decode_leaves(leaves: &[pb::LeafRange]) -> Vec<Range<u64>> {
    leaves.iter().map(|leaves| leaves.first..leaves.first.saturating_add(leaves.count)).collect()
}

/// The SHA-256 of the output of a subsystem, by a record that was checked; `None` if it had none in that cycle, or an
/// earlier version wrote the record.
pub fn output_sha256(record: &Record, subsystem: &Name) -> Option<[u8; 32]> {
    let telemetry = decode(record).ok()?;
    let part = telemetry.subsystems.iter().find(|part| part.name == subsystem.as_str())?;
    part.output_sha256[..].try_into().ok()
}

/// Checks that clients of the contract can decode a record, and that its other fields are those in its bytes.
///
/// # Errors
/// The problem.
pub fn check(record: &Record) -> Result<(), String> {
    let telemetry = decode(record)?;
    let name = record.trigger.loop_name().map(Name::as_str).unwrap_or_default();
    let columns = [
        ("epoch", telemetry.epoch == record.epoch.0),
        ("state", telemetry.state == i32::from(cycle_state(record.state))),
        ("trigger", telemetry.trigger == i32::from(trigger(&record.trigger))),
        ("loop", telemetry.r#loop == name),
        ("parent", telemetry.parent == record.trigger.parent().map(parent)),
        ("request_id", telemetry.request_id == record.request_id.as_deref().unwrap_or_default()),
        ("triggered_by", telemetry.triggered_by == identity(record.triggered_by.as_ref())),
        ("finished_at", telemetry.finished_at == Some(timestamp(record.finished_at))),
    ];
    match columns.iter().find(|(_, is_same)| !is_same) {
        Some((column, _)) => Err(format!("its column {column} is not that of its bytes")),
        None => Ok(()),
    }
}

/// The record with these bytes.
///
/// # Errors
/// The problem.
pub fn read(bytes: Bytes) -> Result<Record, String> {
    let telemetry = pb::CycleTelemetry::decode(bytes.clone()).map_err(|error| error.to_string())?;
    let state = CycleState::ALL.into_iter().find(|state| i32::from(cycle_state(*state)) == telemetry.state);
    let request_id = Some(telemetry.request_id.clone()).filter(|id| !id.is_empty());
    let trigger = match telemetry.trigger() {
        pb::Trigger::Unspecified => Trigger::Unknown,
        pb::Trigger::Manual => Trigger::Manual,
        pb::Trigger::Loop => Trigger::Loop(Name::parse(&telemetry.r#loop).map_err(|error| error.to_string())?),
        // Its key is the id of the request.
        pb::Trigger::Parent => {
            Trigger::Parent(request_id.as_deref().and_then(ParentCycle::parse).ok_or("it names no parent")?)
        }
    };
    let caller = Some(telemetry.triggered_by.as_str()).filter(|caller| !caller.is_empty());
    let record = Record {
        cycle_id: CycleId(telemetry.cycle_id),
        revision: Revision(telemetry.revision),
        epoch: Epoch(telemetry.epoch),
        state: state.ok_or("its state is not known")?,
        trigger,
        request_id,
        triggered_by: caller.map(Identity::parse).transpose().map_err(|error| error.to_string())?,
        finished_at: telemetry.finished_at.and_then(read_timestamp).ok_or("it has no end")?,
        bytes,
    };
    check(&record).map(|()| record)
}

/// Decodes a record as clients do.
fn decode(record: &Record) -> Result<pb::CycleTelemetry, String> {
    let telemetry = pb::CycleTelemetry::decode(record.bytes.clone()).map_err(|error| error.to_string())?;
    let (cycle_id, revision) = (telemetry.cycle_id, telemetry.revision);
    if (cycle_id, revision) != (record.cycle_id.0, record.revision.0) {
        return Err(format!("it contains cycle {cycle_id}, revision {revision}"));
    }
    for part in &telemetry.subsystems {
        Payload::check(part.output.clone()).map_err(|malformed| format!("the output of {}: {malformed}", part.name))?;
    }
    Ok(telemetry)
}

fn leave_out_outputs(part: &mut pb::SubsystemTelemetry) {
    part.output.clear();
}

fn leave_out_details(part: &mut pb::SubsystemTelemetry) {
    part.metrics.clear();
    part.issues.retain(|issue| issue.severity() == pbs::Severity::Error);
    for issue in &mut part.issues {
        issue.message = shortened(&*issue.message, SHORT_MESSAGE).into_owned();
    }
}

fn leave_out_issues(part: &mut pb::SubsystemTelemetry) {
    part.issues.clear();
}

fn shorten_messages(part: &mut pb::SubsystemTelemetry) {
    part.error_message = shortened(&*part.error_message, SHORT_MESSAGE).into_owned();
}

fn leave_out_messages(part: &mut pb::SubsystemTelemetry) {
    part.error_message.clear();
}

fn telemetry(cycle: &FinishedCycle) -> pb::CycleTelemetry {
    let FinishedCycle {
        cycle_id,
        epoch,
        trigger,
        scheduled_at,
        request_id,
        triggered_by,
        trace_id,
        started_at,
        finished_at,
        duration,
        state,
        error,
        critical_path,
        subsystems,
    } = cycle;
    pb::CycleTelemetry {
        cycle_id: cycle_id.0,
        started_at: started_at.map(timestamp),
        finished_at: Some(timestamp(*finished_at)),
        duration_ms: duration.as_secs_f64() * 1e3,
        error: error.clone(),
        state: cycle_state(*state).into(),
        trigger: self::trigger(trigger).into(),
        r#loop: trigger.loop_name().map(ToString::to_string).unwrap_or_default(),
        scheduled_at: scheduled_at.map(timestamp),
        epoch: epoch.0,
        critical_path: critical_path.iter().map(ToString::to_string).collect(),
        subsystems: subsystems.iter().map(|report| part(report, *started_at)).collect(),
        request_id: request_id.clone().unwrap_or_default(),
        revision: 0,
        truncated: false,
        trace_id: trace_id.map(|trace_id| trace_id.to_string()).unwrap_or_default(),
        triggered_by: identity(triggered_by.as_ref()),
        parent: trigger.parent().map(parent),
    }
}

/// The cycle of a parent as the contract has it.
fn parent(parent: &ParentCycle) -> pb::ParentCycle {
    let ParentCycle { orchestrator_id, subsystem, epoch, cycle_id } = parent;
    pb::ParentCycle {
        orchestrator_id: orchestrator_id.to_string(),
        subsystem: subsystem.to_string(),
        epoch: epoch.0,
        cycle_id: cycle_id.0,
    }
}

/// An identity as the contract has it; empty for none.
fn identity(identity: Option<&Identity>) -> String {
    identity.map(ToString::to_string).unwrap_or_default()
}

/// One subsystem's part in the cycle that started at `cycle_started_at`.
pub fn part(report: &SubsystemReport, cycle_started_at: Option<Timestamp>) -> pb::SubsystemTelemetry {
    let SubsystemReport {
        name,
        state,
        started,
        ended,
        queued,
        attempts,
        issues,
        metrics,
        output_sha256,
        recorded_output,
    } = report;
    let at = |offset| cycle_started_at.and_then(|start| start.checked_add(offset).ok()).map(timestamp);
    pb::SubsystemTelemetry {
        name: name.to_string(),
        state: subsystem_state(state).into(),
        started_at: started.and_then(at),
        finished_at: started.and_then(|_| at(*ended)),
        duration_ms: started.map_or(0.0, |started| ended.saturating_sub(started).as_secs_f64() * 1e3),
        queued_ms: queued.as_secs_f64() * 1e3,
        attempts: *attempts,
        error_code: state.code().map(|code| code.name().to_owned()).unwrap_or_default(),
        error_message: message(state),
        issues: issues.iter().map(issue).collect(),
        metrics: metrics.clone(),
        output: recorded_output.as_ref().map(|output| output.as_bytes().clone()).unwrap_or_default(),
        skip_reason: skip_reason(state).into(),
        output_sha256: output_sha256.map(|hash| hash.to_vec().into()).unwrap_or_default(),
    }
}

/// An error message, cut to its limit in a record.
pub fn message(state: &SubsystemState) -> String {
    shortened(state.message(), MAX_MESSAGE).into_owned()
}

fn issue(issue: &Issue) -> pbs::Issue {
    let severity = match issue.severity {
        Severity::Info => pbs::Severity::Info,
        Severity::Warning => pbs::Severity::Warning,
        Severity::Error => pbs::Severity::Error,
    };
    pbs::Issue { severity: severity.into(), code: issue.code.clone(), message: issue.message.clone() }
}

/// A state as the contract has it.
pub fn cycle_state(state: CycleState) -> pb::CycleState {
    match state {
        CycleState::Succeeded => pb::CycleState::Succeeded,
        CycleState::Degraded => pb::CycleState::Degraded,
        CycleState::Failed => pb::CycleState::Failed,
        CycleState::Cancelled => pb::CycleState::Cancelled,
        CycleState::Interrupted => pb::CycleState::Interrupted,
    }
}

/// A trigger as the contract has it.
pub fn trigger(trigger: &Trigger) -> pb::Trigger {
    trigger_of(TriggerKind::of(trigger))
}

/// A kind of trigger as the contract has it.
pub fn trigger_of(kind: TriggerKind) -> pb::Trigger {
    match kind {
        TriggerKind::Unknown => pb::Trigger::Unspecified,
        TriggerKind::Manual => pb::Trigger::Manual,
        TriggerKind::Loop => pb::Trigger::Loop,
        TriggerKind::Parent => pb::Trigger::Parent,
    }
}

/// A state as the contract has it.
pub fn subsystem_state(state: &SubsystemState) -> pb::SubsystemState {
    match state {
        SubsystemState::Succeeded => pb::SubsystemState::Succeeded,
        SubsystemState::Failed(..) => pb::SubsystemState::Failed,
        SubsystemState::TimedOut(_) => pb::SubsystemState::TimedOut,
        SubsystemState::Skipped(..) => pb::SubsystemState::Skipped,
        SubsystemState::CircuitOpen(_) => pb::SubsystemState::CircuitOpen,
        SubsystemState::Cancelled => pb::SubsystemState::Cancelled,
    }
}

fn skip_reason(state: &SubsystemState) -> pb::SkipReason {
    match state {
        SubsystemState::Skipped(reason, _) => reason_to_skip(Some(*reason)),
        _ => pb::SkipReason::Unspecified,
    }
}

/// A reason as the contract has it.
pub fn reason_to_skip(reason: Option<SkipReason>) -> pb::SkipReason {
    match reason {
        None => pb::SkipReason::Unspecified,
        Some(SkipReason::Suspended) => pb::SkipReason::Suspended,
        Some(SkipReason::RequirementFailed) => pb::SkipReason::RequirementFailed,
        Some(SkipReason::RequirementMissing) => pb::SkipReason::RequirementMissing,
        Some(SkipReason::RequirementLeftOut) => pb::SkipReason::RequirementLeftOut,
        Some(SkipReason::CycleDeadline) => pb::SkipReason::CycleDeadline,
        Some(SkipReason::NotRegistered) => pb::SkipReason::NotRegistered,
        Some(SkipReason::OwnerRevoked) => pb::SkipReason::OwnerRevoked,
    }
}

/// A filter of records by the parts of their cycles, which needs a look into their bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartFilter {
    /// Only cycles in which one of these took part; empty means any.
    pub subsystems: BTreeSet<Name>,
    /// Only cycles in which its part ended in one of these states, by their numbers in the contract; empty means any.
    pub states: BTreeSet<i32>,
}

impl PartFilter {
    /// True if this record passes.
    pub fn wants(&self, record: &Bytes) -> bool {
        if self.subsystems.is_empty() {
            return true;
        }
        self.passes(&BriefParts::of(record))
    }

    /// True if one of these parts passes.
    pub fn passes(&self, parts: &BriefParts) -> bool {
        let Some(parts) = &parts.0 else { return true };
        self.subsystems.is_empty()
            || self.subsystems.iter().any(|name| {
                let found = parts.binary_search_by(|part| part.name.as_str().cmp(name.as_str()));
                found.is_ok_and(|found| self.states.is_empty() || self.states.contains(&parts[found].state))
            })
    }
}

/// The parts of a cycle: which subsystems took part, by name, and how their parts ended.
#[derive(Debug)]
pub struct BriefParts(Option<Vec<BriefPart>>);

impl BriefParts {
    /// The parts of an encoded cycle. Records of this module can be decoded; an undecodable one passes every filter.
    pub fn of(record: &Bytes) -> Self {
        Self(BriefTelemetry::decode(record.clone()).ok().map(|BriefTelemetry { mut subsystems }| {
            subsystems.sort_unstable_by(|one, other| one.name.cmp(&other.name));
            subsystems
        }))
    }
}

/// The few fields of `CycleTelemetry` that say which subsystems took part; the others are skipped over. A test holds it
/// against the contract.
#[derive(Clone, PartialEq, prost::Message)]
struct BriefTelemetry {
    #[prost(message, repeated, tag = "12")]
    subsystems: Vec<BriefPart>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct BriefPart {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int32, tag = "2")]
    state: i32,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{Code, Epoch, TraceId};

    fn report(name: &str, state: SubsystemState) -> SubsystemReport {
        let output = serde_json::json!({ "text": "x".repeat(1000) });
        SubsystemReport {
            name: Name::parse(name).unwrap(),
            output_sha256: (state == SubsystemState::Succeeded).then_some([7; 32]),
            state,
            started: Some(Duration::from_millis(2)),
            ended: Duration::from_millis(5),
            queued: Duration::from_millis(1),
            attempts: 2,
            issues: vec![Issue { severity: Severity::Error, code: "C".into(), message: "m".repeat(1000) }],
            metrics: BTreeMap::from([("m".to_owned(), 0.5)]),
            recorded_output: Some(Payload::from_json(output.as_object().unwrap()).unwrap()),
        }
    }

    fn cycle() -> FinishedCycle {
        let started_at: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        FinishedCycle {
            cycle_id: CycleId(7),
            epoch: Epoch(3),
            trigger: Trigger::Loop(Name::parse("l").unwrap()),
            scheduled_at: Some(started_at),
            request_id: None,
            triggered_by: Some(Identity::Uid(7)),
            trace_id: Some(TraceId(10)),
            started_at: Some(started_at),
            finished_at: started_at + Duration::from_millis(6),
            duration: Duration::from_millis(6),
            state: CycleState::Degraded,
            error: "e".into(),
            critical_path: vec![],
            subsystems: vec![
                Arc::new(report("a", SubsystemState::Succeeded)),
                Arc::new(report("b", SubsystemState::Failed(Code::Internal, "aé".repeat(1000)))),
            ],
        }
    }

    fn decoded(max_bytes: usize) -> pb::CycleTelemetry {
        pb::CycleTelemetry::decode(encode(&cycle(), max_bytes).at(Revision(9)).bytes).unwrap()
    }

    #[test]
    fn a_record_has_its_times_and_durations() {
        let telemetry = decoded(usize::MAX);
        assert_eq!((telemetry.cycle_id, telemetry.revision, telemetry.epoch), (7, 9, 3));
        assert_eq!((telemetry.r#loop.as_str(), telemetry.triggered_by.as_str()), ("l", "uid:7"));
        assert_eq!(telemetry.trace_id, "0000000000000000000000000000000a");
        let a = &telemetry.subsystems[0];
        assert_eq!(a.started_at.unwrap().nanos, 2_000_000);
        for (found, expected) in [(telemetry.duration_ms, 6.0), (a.duration_ms, 3.0), (a.queued_ms, 1.0)] {
            assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
        }
        let b = &telemetry.subsystems[1];
        assert_eq!((b.error_code.as_str(), b.error_message.len()), ("INTERNAL", MAX_MESSAGE));
        assert!(b.error_message.ends_with("éa…"));
    }

    #[test]
    fn a_large_record_loses_outputs_then_details_then_ends_of_messages() {
        let whole = decoded(usize::MAX);
        assert!(!whole.truncated && !whole.subsystems[0].output.is_empty());
        let without_outputs = decoded(whole.encoded_len() - 1);
        assert!(without_outputs.truncated && without_outputs.subsystems[0].output.is_empty());
        assert_eq!(without_outputs.subsystems[0].issues.len(), 1);
        let without_details = decoded(without_outputs.encoded_len() - 1);
        assert_eq!(without_details.subsystems[0].issues.len(), 1);
        assert_eq!(without_details.subsystems[0].issues[0].message.len(), SHORT_MESSAGE);
        let without_issues = decoded(without_details.encoded_len() - 1);
        assert!(without_issues.subsystems[0].issues.is_empty());
        assert_eq!(without_issues.subsystems[1].error_message.len(), MAX_MESSAGE);
        let short = decoded(without_issues.encoded_len() - 1);
        assert_eq!(short.subsystems[1].error_message.len(), SHORT_MESSAGE);
    }

    #[test]
    fn a_record_that_fits_exactly_is_whole() {
        let mut cycle = cycle();
        cycle.critical_path = vec![Name::parse("a").unwrap()];
        let whole = encode(&cycle, usize::MAX);
        let size = whole.size();
        assert_eq!(size, whole.at(Revision(u64::MAX)).bytes.len());
        let of = |max_bytes| pb::CycleTelemetry::decode(encode(&cycle, max_bytes).at(Revision(1)).bytes).unwrap();
        assert!(!of(size).truncated && of(size - 1).truncated);
        // The smallest record that keeps the critical path.
        let keeps = (0..size).find(|max_bytes| !of(*max_bytes).critical_path.is_empty()).unwrap();
        assert_eq!(encode(&cycle, keeps).size(), keeps);
    }

    #[test]
    fn each_result_has_its_word_in_the_contract() {
        let skipped = |reason| part(&report("a", SubsystemState::Skipped(reason, String::new())), None).skip_reason();
        for (reason, word) in [
            (SkipReason::Suspended, pb::SkipReason::Suspended),
            (SkipReason::RequirementFailed, pb::SkipReason::RequirementFailed),
            (SkipReason::RequirementMissing, pb::SkipReason::RequirementMissing),
            (SkipReason::RequirementLeftOut, pb::SkipReason::RequirementLeftOut),
            (SkipReason::CycleDeadline, pb::SkipReason::CycleDeadline),
            (SkipReason::NotRegistered, pb::SkipReason::NotRegistered),
            (SkipReason::OwnerRevoked, pb::SkipReason::OwnerRevoked),
        ] {
            assert_eq!(skipped(reason), word);
        }
        let of_loop = Trigger::Loop(Name::parse("l").unwrap());
        let of_parent = Trigger::Parent(ParentCycle::parse("hub/eu/1/2").unwrap());
        let triggers = [Trigger::Unknown, Trigger::Manual, of_loop, of_parent].map(|it| trigger(&it));
        let words = [pb::Trigger::Unspecified, pb::Trigger::Manual, pb::Trigger::Loop, pb::Trigger::Parent];
        assert_eq!(triggers, words);
        for state in CycleState::ALL {
            assert_eq!(cycle_state(state).as_str_name(), format!("CYCLE_STATE_{}", state.name()));
        }
        let a = part(&report("a", SubsystemState::Succeeded), None);
        assert_eq!(a.skip_reason(), pb::SkipReason::Unspecified);
        let [issue] = &a.issues[..] else { panic!("{:?}", a.issues) };
        assert_eq!((issue.severity(), issue.code.as_str(), issue.message.len()), (pbs::Severity::Error, "C", 1000));
    }

    #[test]
    fn a_column_that_is_not_that_of_the_bytes_is_named() {
        let record = encode(&cycle(), usize::MAX).at(Revision(9));
        assert_eq!(check(&record), Ok(()));
        assert_eq!(read(record.bytes.clone()), Ok(record.clone()));
        let finished_at = record.finished_at + Duration::from_nanos(1);
        for (column, changed) in [
            ("epoch", Record { epoch: Epoch(4), ..record.clone() }),
            ("state", Record { state: CycleState::Succeeded, ..record.clone() }),
            ("trigger", Record { trigger: Trigger::Manual, ..record.clone() }),
            ("loop", Record { trigger: Trigger::Loop(Name::parse("m").unwrap()), ..record.clone() }),
            ("request_id", Record { request_id: Some("r".into()), ..record.clone() }),
            ("triggered_by", Record { triggered_by: None, ..record.clone() }),
            ("finished_at", Record { finished_at, ..record.clone() }),
        ] {
            assert_eq!(check(&changed), Err(format!("its column {column} is not that of its bytes")));
        }
        let of_parent = |text| Trigger::Parent(ParentCycle::parse(text).unwrap());
        let record = encode(&FinishedCycle { trigger: of_parent("hub/eu/1/2"), ..cycle() }, usize::MAX).at(Revision(9));
        assert_eq!(check(&record), Ok(()));
        let changed = Record { trigger: of_parent("hub/eu/1/3"), ..record };
        assert_eq!(check(&changed), Err("its column parent is not that of its bytes".into()));
    }

    #[test]
    fn a_control_entry_is_read_as_it_was() {
        let pruned = RecordsPruned { leaves: vec![3..7, 9..10], first_kept: 2 };
        assert_eq!(decode_control(&encode_pruned(&pruned)), Ok(Control::Pruned(pruned)));
        let began = LogBegan { reason: LogBeganReason::Accepted, previous: "p".into(), missing: vec![1..2, 5..9] };
        assert_eq!(
            decode_control(&encode_began(&began)),
            Ok(Control::Began { counts_anew: true, missing: began.missing })
        );
        assert_eq!(decode_control(b""), Ok(Control::Unknown));
        assert!(decode_control(b"\x0a").is_err());
    }

    #[test]
    fn a_record_that_is_not_the_one_of_its_key_is_refused() {
        let record = encode(&cycle(), usize::MAX).at(Revision(9));
        assert_eq!(check(&record), Ok(()));
        for other in [
            Record { cycle_id: CycleId(8), ..record.clone() },
            Record { revision: Revision(8), ..record.clone() },
            Record { bytes: record.bytes.slice(1..), ..record.clone() },
        ] {
            assert!(check(&other).is_err(), "{other:?}");
        }
        let mut telemetry = decoded(usize::MAX);
        telemetry.subsystems[0].output = Bytes::from_static(b"\x0a");
        let error = check(&Record { bytes: telemetry.encode_to_vec().into(), ..record }).unwrap_err();
        assert!(error.starts_with("the output of a: "), "{error}");
    }

    #[test]
    fn a_record_of_the_largest_fleet_fits_whatever_its_states() {
        const MAX_RECORD: usize = 3 << 20;
        let failed = SubsystemState::Failed(Code::ResourceExhausted, "m".repeat(MAX_MESSAGE));
        for (state, code) in [(failed, "RESOURCE_EXHAUSTED"), (SubsystemState::Succeeded, "")] {
            let mut cycle = cycle();
            let ended = |i: usize| Arc::new(report(&format!("s{i:0>62}"), state.clone()));
            cycle.subsystems = (0..20_000).map(ended).collect();
            cycle.critical_path = cycle.subsystems.iter().map(|report| report.name.clone()).collect();
            let bytes = encode(&cycle, MAX_RECORD).at(Revision(u64::MAX)).bytes;
            assert!(bytes.len() <= MAX_RECORD, "{} bytes", bytes.len());
            let record = pb::CycleTelemetry::decode(bytes).unwrap();
            assert!(record.truncated && record.subsystems.len() == 20_000);
            assert_eq!(record.subsystems[0].error_code, code);
        }
    }

    #[test]
    fn a_waiting_request_is_read_as_it_was_written() {
        let parameters = serde_json::json!({ "a": [1, { "b": null }] });
        let output = Output { cycle_id: CycleId(5), payload: Payload::default() };
        let given = |(name, freshness)| (Name::parse(name).unwrap(), (output.clone(), freshness));
        let request = CycleRequest {
            subset: Some(["a", "b"].iter().map(|name| Name::parse(name).unwrap()).collect()),
            parameters: Payload::from_json(parameters.as_object().unwrap()).unwrap(),
            deadline: Some(Duration::from_millis(1500)),
            record_outputs: true,
            trace: SpanContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some("x=1")),
            path: Some(CallPath::parse("hub eu").unwrap()),
            inputs: Arc::new([("x", Freshness::Fresh), ("y", Freshness::Stale)].map(given).into()),
            ..CycleRequest::over_all(Trigger::Manual, Timestamp::UNIX_EPOCH)
        };
        let read = decode_request(encode_request(&request)).unwrap();
        assert_eq!(format!("{read:?}"), format!("{request:?}"));
        let all = CycleRequest { subset: None, deadline: None, ..request };
        assert!(decode_request(encode_request(&all)).unwrap().subset.is_none());
        assert!(decode_request(Bytes::from_static(b"\x0a\x05\x0a\x03a b")).is_err());
    }

    #[test]
    fn participants_are_found_in_the_bytes() {
        let record = encode(&cycle(), usize::MAX).at(Revision(9));
        let wants = |names: &[&str], states: &[pb::SubsystemState]| {
            let subsystems = names.iter().map(|name| Name::parse(name).unwrap()).collect();
            PartFilter { subsystems, states: states.iter().map(|&state| state.into()).collect() }.wants(&record.bytes)
        };
        assert!(wants(&[], &[]));
        assert!(wants(&["x", "b"], &[]));
        assert!(!wants(&["x"], &[]));
        assert!(wants(&["b"], &[pb::SubsystemState::Failed]));
        assert!(!wants(&["a"], &[pb::SubsystemState::Failed]));
    }
}
