//! Parses requests: from messages of the contract to validated types. All malformed fields of a request are reported
//! together.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use tonic::codegen::http::HeaderMap;

use crate::{
    access::Reach,
    model::{
        BreakerSpec, CatchUp, CycleId, CycleRequest, CycleState, Epoch, EventKind, Identity, LimitsSpec, LoopChoice,
        LoopSpec, LoopStart, Name, OverlapPolicy, ParentCycle, Payload, RetrySpec, Revision, Served, SpanContext,
        Subsystem, SubsystemSpec, TlsSpec, Trigger, Violations,
    },
    orchestrator::{From as WatchFrom, Logged, Position, PruneLimit, WatchFilter},
    ports::{EventFilter, Filter, TriggerKind},
    proto::{bounds::MAX_REGISTRATIONS, orchestrator::v1 as pb, read_timestamp, subsystem::v1 as pbs},
    record::{self, PartFilter},
};

/// The caller's span. As W3C Trace Context requires, a malformed or repeated header is ignored, and the parts of
/// `tracestate` are joined.
pub(super) fn trace(headers: &HeaderMap) -> Option<SpanContext> {
    let all = |header| headers.get_all(header).iter().map(|value| value.to_str().ok()).collect::<Option<Vec<_>>>();
    let [parent] = all("traceparent")?[..] else { return None };
    SpanContext::parse(parent, all("tracestate").map(|parts| parts.join(",")).as_deref())
}

pub(super) fn cycle(
    request: pb::RunCycleRequest,
    triggered_by: Option<Identity>,
    trace: Option<SpanContext>,
    now: Timestamp,
) -> Result<CycleRequest, Violations> {
    let pb::RunCycleRequest {
        subsystems,
        parameters,
        request_id,
        overlap_policy,
        validate_only: _,
        r#async: _,
        deadline,
        record_outputs,
    } = request;
    let mut bad = Violations::default();
    let request_id = self::request_id(&mut bad, request_id);
    if request_id.as_deref().and_then(ParentCycle::parse).is_some() {
        bad.add("request_id", "has the form ORCHESTRATOR/SUBSYSTEM/EPOCH/CYCLE, which is that of parents; change it");
    }
    let overlap = overlap(&mut bad, "overlap_policy", overlap_policy);
    let deadline = deadline.and_then(|deadline| {
        let range = Duration::from_millis(1)..=Duration::from_hours(24);
        let deadline = duration(&mut bad, "deadline", Some(deadline))?;
        Some(bad.duration("deadline", Some(deadline), Duration::ZERO, range))
    });
    let request = CycleRequest {
        trigger: Trigger::Manual,
        scheduled_at: now,
        subset: subset(&mut bad, &subsystems),
        parameters: self::parameters(&mut bad, &parameters),
        request_id,
        triggered_by,
        overlap: overlap.unwrap_or(OverlapPolicy::BufferAll),
        deadline,
        record_outputs,
        trace,
        inputs: Arc::default(),
        path: None,
        cause: None,
    };
    bad.into_result(request)
}

/// The cycle that a parent's cycle asks for, of what is served under the name that it calls.
///
/// # Errors
/// The problem, which reads well after "the request".
pub(super) fn of_parent(
    request: pbs::RunCycleRequest,
    parent: ParentCycle,
    served: &Served,
    now: Timestamp,
) -> Result<CycleRequest, String> {
    /// Those of a registration and of a cycle together.
    const MAX_PARAMETERS: usize = 2 * Subsystem::MAX_PARAMETERS;
    let pbs::RunCycleRequest { scheduled_at, parameters, inputs, .. } = request;
    if parameters.len() > MAX_PARAMETERS {
        let bytes = parameters.len();
        return Err(format!("has parameters of {bytes} bytes; the limit is {MAX_PARAMETERS} bytes"));
    }
    let parameters =
        Payload::check(parameters).map_err(|malformed| format!("has parameters that are malformed: it {malformed}"))?;
    let mut bad = Violations::default();
    let scheduled_at = scheduled_at.map_or(Some(now), |time| timestamp(&mut bad, "scheduled_at", time));
    let scheduled_at = scheduled_at.ok_or("has a field scheduled_at that is out of range")?;
    Ok(CycleRequest {
        request_id: Some(parent.to_string()),
        subset: served.subset.clone(),
        parameters: served.parameters.overlaid(&parameters),
        inputs: Arc::new(record::read_inputs(inputs)?),
        ..CycleRequest::over_all(Trigger::Parent(parent), scheduled_at)
    })
}

/// The subset of a request; empty means all.
fn subset(bad: &mut Violations, subsystems: &[String]) -> Option<Arc<[Name]>> {
    let names = bad.names("subsystems", subsystems);
    (!names.is_empty()).then(|| names.into())
}

pub(super) fn name(field: &str, name: &str) -> Result<Name, Violations> {
    let mut bad = Violations::default();
    let name = bad.name(field, name);
    bad.into_result(name)
}

/// The limit of a request to remove records.
pub(super) fn prune_limit(request: &pb::PruneCyclesRequest, now: Timestamp) -> Result<PruneLimit, Violations> {
    let mut bad = Violations::default();
    let limit = match (request.keep_newest, request.finished_before) {
        (0, None) => {
            bad.add("keep_newest", "is missing; give this or `finished_before`");
            return Err(bad);
        }
        (number, None) => PruneLimit::KeepNewest(number),
        (0, before) => {
            let before = before.and_then(|time| timestamp(&mut bad, "finished_before", time)).unwrap_or(now);
            if before > now {
                bad.add("finished_before", format!("is {before}, which is in the future"));
            }
            PruneLimit::FinishedBefore(before)
        }
        (_, Some(_)) => {
            bad.add("finished_before", "is given in addition to `keep_newest`; give one of them");
            return Err(bad);
        }
    };
    bad.into_result(limit)
}

/// The loops that a request to pause or resume names.
pub(super) fn loop_choice(name: &str, all: bool) -> Result<LoopChoice, Violations> {
    let mut bad = Violations::default();
    let choice = match (name, all) {
        ("", true) => LoopChoice::All,
        ("", false) => {
            bad.add("name", "is missing; give the name of a loop, or set `all`");
            return Err(bad);
        }
        (name, false) => LoopChoice::Named(bad.name("name", name)),
        (_, true) => {
            bad.add("all", "is set in addition to `name`; set one of them");
            return Err(bad);
        }
    };
    bad.into_result(choice)
}

pub(super) fn cycle_id(cycle_id: u64) -> Result<CycleId, Violations> {
    let mut bad = Violations::default();
    if cycle_id == 0 {
        bad.add("cycle_id", "is missing; give the id of a cycle, 1 or more");
    }
    bad.into_result(CycleId(cycle_id))
}

/// The entry of the log to prove.
pub(super) fn logged(cycle_id: u64, event_leaf: Option<u64>) -> Result<Logged, Violations> {
    let Some(leaf) = event_leaf else { return self::cycle_id(cycle_id).map(Logged::Cycle) };
    let mut bad = Violations::default();
    if cycle_id != 0 {
        bad.add("event_leaf", "is given in addition to `cycle_id`; give one of them");
    }
    bad.into_result(Logged::Event(leaf))
}

/// The message in a required field.
pub(super) fn present<T>(field: &str, message: Option<T>) -> Result<T, Violations> {
    message.ok_or_else(|| {
        let mut bad = Violations::default();
        bad.add(field, "is missing");
        bad
    })
}

/// A registration that can be dialed within `reach`.
pub(super) fn registration(registration: pb::Registration, reach: &Reach) -> Result<Subsystem, Violations> {
    subsystem(registration, reach).map_err(|bad| bad.inside("registration"))
}

/// Several registrations that can be dialed within `reach`, and their lease.
pub(super) fn registrations(
    request: pb::RegisterSubsystemsRequest,
    reach: &Reach,
) -> Result<(Vec<Subsystem>, Option<Duration>), Violations> {
    let pb::RegisterSubsystemsRequest { registrations, lease } = request;
    let mut bad = Violations::default();
    if registrations.is_empty() {
        bad.add("registrations", format!("are missing; give 1 to {MAX_REGISTRATIONS}"));
    }
    let mut subsystems = Vec::with_capacity(registrations.len());
    let mut first = HashMap::new();
    for (i, registration) in registrations.into_iter().enumerate() {
        match subsystem(registration, reach) {
            Ok(subsystem) => {
                if let Some(first) = first.insert(subsystem.name.clone(), i) {
                    let problem = format!("is {} as in registrations[{first}]; give each name once", subsystem.name);
                    bad.add(format!("registrations[{i}].name"), problem);
                }
                subsystems.push(subsystem);
            }
            Err(problems) => bad.extend(problems.inside(&format!("registrations[{i}]"))),
        }
    }
    match self::lease(lease) {
        Ok(lease) => bad.into_result((subsystems, lease)),
        Err(problems) => {
            bad.extend(problems);
            Err(bad)
        }
    }
}

fn subsystem(registration: pb::Registration, reach: &Reach) -> Result<Subsystem, Violations> {
    let mut bad = Violations::default();
    let pb::Registration {
        name,
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
    } = registration;
    let pb::RetryPolicy { max_attempts, initial_backoff, max_backoff, backoff_multiplier, retryable_status_codes } =
        retry.unwrap_or_default();
    let pb::BreakerPolicy { failure_threshold, open_for, disabled } = breaker.unwrap_or_default();
    let pb::Limits { max_message_bytes, max_output_bytes, max_metrics, max_issues } = limits.unwrap_or_default();
    let spec = SubsystemSpec {
        name,
        endpoint,
        phase: Some(phase),
        requires,
        after,
        reads,
        timeout: duration(&mut bad, "timeout", timeout),
        retry: RetrySpec {
            max_attempts: unless_zero(max_attempts),
            initial_backoff: duration(&mut bad, "retry.initial_backoff", initial_backoff),
            max_backoff: duration(&mut bad, "retry.max_backoff", max_backoff),
            backoff_multiplier: (backoff_multiplier != 0.0).then_some(backoff_multiplier),
            retryable_status_codes,
        },
        breaker: BreakerSpec {
            failure_threshold: unless_zero(failure_threshold),
            open_for: duration(&mut bad, "breaker.open_for", open_for),
            disabled,
        },
        critical,
        parameters: self::parameters(&mut bad, &parameters).canonical(),
        limits: LimitsSpec {
            max_message_bytes: unless_zero(max_message_bytes),
            max_output_bytes: unless_zero(max_output_bytes),
            max_metrics: unless_zero(max_metrics),
            max_issues: unless_zero(max_issues),
        },
        record_output,
        tls: TlsSpec { peer: tls.map(|tls| tls.peer).filter(|peer| !peer.is_empty()) },
    };
    let subsystem = bad.into_result(()).and_then(|()| Subsystem::from_spec(&spec))?;
    let mut bad = Violations::default();
    if let Err(problem) = reach.check(&subsystem.endpoint) {
        bad.add("endpoint", problem);
    }
    bad.into_result(subsystem)
}

/// The lease of a registration.
pub(super) fn lease(lease: Option<prost_types::Duration>) -> Result<Option<Duration>, Violations> {
    let mut bad = Violations::default();
    let lease = duration(&mut bad, "lease", lease).map(|lease| {
        let range = Duration::from_secs(1)..=Duration::from_hours(24);
        bad.duration("lease", Some(lease), Duration::ZERO, range)
    });
    bad.into_result(lease)
}

pub(super) fn interval_loop(settings: Option<pb::IntervalLoop>) -> Result<LoopStart, Violations> {
    let settings = present("loop", settings)?;
    let mut bad = Violations::default();
    let pb::IntervalLoop {
        name,
        interval,
        offset,
        jitter,
        overlap_policy,
        catch_up,
        catch_up_window,
        subsystems,
        parameters,
        deadline,
        record_outputs,
    } = settings;
    let spec = LoopSpec {
        name,
        interval: duration(&mut bad, "interval", interval),
        offset: duration(&mut bad, "offset", offset),
        jitter: duration(&mut bad, "jitter", jitter),
        overlap_policy: overlap(&mut bad, "overlap_policy", overlap_policy),
        catch_up: match pb::CatchUp::try_from(catch_up) {
            Ok(pb::CatchUp::Unspecified) => None,
            Ok(pb::CatchUp::None) => Some(CatchUp::None),
            Ok(pb::CatchUp::One) => Some(CatchUp::One),
            Err(_) => {
                bad.add("catch_up", format!("is {catch_up}, which is not a CatchUp"));
                None
            }
        },
        catch_up_window: duration(&mut bad, "catch_up_window", catch_up_window),
        subsystems,
        parameters: self::parameters(&mut bad, &parameters).canonical(),
        deadline: duration(&mut bad, "deadline", deadline),
        record_outputs,
    };
    bad.into_result(()).and_then(|()| LoopStart::from_spec(&spec)).map_err(|bad| bad.inside("loop"))
}

pub(super) fn watch(request: pb::WatchCyclesRequest) -> Result<(WatchFrom, WatchFilter, bool), Violations> {
    let pb::WatchCyclesRequest { after_revision, from_oldest, progress, loops, states, subsystems, after_epoch } =
        request;
    let mut bad = Violations::default();
    if from_oldest && after_revision.is_some() {
        bad.add("from_oldest", "is set together with after_revision; give one of them");
    }
    if after_epoch != 0 && after_revision.is_none() {
        bad.add("after_epoch", "needs after_revision, to whose record it belongs");
    }
    let epoch = (after_epoch != 0).then_some(Epoch(after_epoch));
    let from = match after_revision {
        _ if from_oldest => WatchFrom::Oldest,
        Some(revision) => WatchFrom::After(Position { revision: Revision(revision), epoch }),
        None => WatchFrom::Now,
    };
    let filter = WatchFilter {
        loops: bad.names("loops", &loops).into_iter().collect(),
        states: cycle_states(&mut bad, &states),
        parts: PartFilter {
            subsystems: bad.names("subsystems", &subsystems).into_iter().collect(),
            states: BTreeSet::new(),
        },
    };
    bad.into_result((from, filter, progress))
}

/// The filter and size of a page of records.
pub(super) struct List {
    pub(super) before: Option<Revision>,
    pub(super) filter: Filter,
    pub(super) parts: PartFilter,
    pub(super) page_size: usize,
}

/// A page of audit events.
pub(super) struct Events {
    pub(super) before: Option<u64>,
    pub(super) filter: EventFilter,
    pub(super) page_size: usize,
}

/// The number before which a page begins, which is its token; `None` for the first page.
fn before(bad: &mut Violations, page_token: &str) -> Option<u64> {
    let before = place(page_token);
    if before.is_none() && !page_token.is_empty() {
        bad.add("page_token", "is not a token of this service; leave it empty to start over");
    }
    before
}

/// The number that is this token of a page, if it is one as this service writes it.
pub(super) fn place(page_token: &str) -> Option<u64> {
    page_token.parse().ok().filter(|number: &u64| *number > 0 && number.to_string() == page_token)
}

pub(super) fn events(request: pb::ListAuditEventsRequest) -> Result<Events, Violations> {
    /// Longer than any identity.
    const MAX_TEXT: usize = 300;
    let pb::ListAuditEventsRequest { page_size, page_token, since, caller, rpc, denied, kind } = request;
    let mut bad = Violations::default();
    let before = before(&mut bad, &page_token);
    for (field, text) in [("caller", &caller), ("rpc", &rpc)] {
        if text.len() > MAX_TEXT {
            bad.add(field, format!("is {} bytes long; the limit is {MAX_TEXT} bytes", text.len()));
        }
    }
    let filter = EventFilter {
        since: since.and_then(|time| timestamp(&mut bad, "since", time)),
        caller: Some(caller).filter(|caller| !caller.is_empty()),
        rpc: Some(rpc).filter(|rpc| !rpc.is_empty()),
        denied,
        kind: match pb::AuditKind::try_from(kind) {
            Ok(pb::AuditKind::Unspecified) => None,
            Ok(pb::AuditKind::Change) => Some(EventKind::Change),
            Ok(pb::AuditKind::Calls) => Some(EventKind::Calls),
            Ok(pb::AuditKind::Denials) => Some(EventKind::Denials),
            Err(_) => {
                bad.add("kind", format!("is {kind}, which is not an AuditKind"));
                None
            }
        },
    };
    let events = Events { before, filter, page_size: self::page_size(&mut bad, page_size, 100) };
    bad.into_result(events)
}

/// The id of a request; `None` if it has none. That of a parent may be longer than those of other callers.
fn request_id(bad: &mut Violations, request_id: String) -> Option<String> {
    if request_id.len() > CycleRequest::MAX_REQUEST_ID && ParentCycle::parse(&request_id).is_none() {
        let problem =
            format!("is {} bytes long; the limit is {} bytes", request_id.len(), CycleRequest::MAX_REQUEST_ID);
        bad.add("request_id", problem);
    }
    if request_id.contains('\0') {
        bad.add("request_id", "contains a NUL; remove it");
    }
    (!request_id.is_empty()).then_some(request_id)
}

pub(super) fn list(request: pb::ListCyclesRequest) -> Result<List, Violations> {
    let pb::ListCyclesRequest {
        page_size,
        page_token,
        states,
        trigger,
        r#loop,
        subsystem,
        subsystem_states,
        finished_from,
        finished_before,
        request_id,
    } = request;
    let mut bad = Violations::default();
    let before = before(&mut bad, &page_token).map(Revision);
    let trigger = match pb::Trigger::try_from(trigger) {
        Ok(pb::Trigger::Unspecified) => None,
        Ok(pb::Trigger::Manual) => Some(TriggerKind::Manual),
        Ok(pb::Trigger::Loop) => Some(TriggerKind::Loop),
        Ok(pb::Trigger::Parent) => Some(TriggerKind::Parent),
        Err(_) => {
            bad.add("trigger", format!("is {trigger}, which is not a Trigger"));
            None
        }
    };
    if subsystem.is_empty() && !subsystem_states.is_empty() {
        bad.add("subsystem_states", "needs `subsystem`, to which the states refer");
    }
    for (i, state) in subsystem_states.iter().enumerate() {
        if pb::SubsystemState::try_from(*state).is_err() {
            bad.add(format!("subsystem_states[{i}]"), format!("is {state}, which is not a SubsystemState"));
        }
    }
    let list = List {
        before,
        filter: Filter {
            states: cycle_states(&mut bad, &states),
            trigger,
            loop_name: (!r#loop.is_empty()).then(|| bad.name("loop", &r#loop)),
            request_id: self::request_id(&mut bad, request_id),
            finished_from: finished_from.and_then(|time| timestamp(&mut bad, "finished_from", time)),
            finished_before: finished_before.and_then(|time| timestamp(&mut bad, "finished_before", time)),
        },
        parts: PartFilter {
            subsystems: (!subsystem.is_empty()).then(|| bad.name("subsystem", &subsystem)).into_iter().collect(),
            states: subsystem_states.into_iter().collect(),
        },
        page_size: self::page_size(&mut bad, page_size, 50),
    };
    bad.into_result(list)
}

/// The part of a plan to show: its subset, its first position, and its size.
pub(super) struct PlanPage {
    pub(super) subset: Option<Arc<[Name]>>,
    pub(super) from: usize,
    pub(super) page_size: usize,
}

pub(super) fn plan(request: pb::PlanCycleRequest) -> Result<PlanPage, Violations> {
    const MAX: u32 = 1_000_000;
    let pb::PlanCycleRequest { subsystems, page_size, page_token } = request;
    let mut bad = Violations::default();
    let from = if page_token.is_empty() { Ok(0) } else { page_token.parse() };
    if from.is_err() {
        bad.add("page_token", "is not a token of this service; leave it empty to start over");
    }
    if page_size > MAX {
        bad.add("page_size", format!("is {page_size}; allowed is 1 to {MAX}"));
    }
    let page_size = if page_size == 0 { usize::MAX } else { page_size as usize };
    let page = PlanPage { subset: subset(&mut bad, &subsystems), from: from.unwrap_or_default(), page_size };
    bad.into_result(page)
}

/// A page of a list by name: the name before it, and its size.
pub(super) fn page(page_size: u32, page_token: &str, default: usize) -> Result<(Option<Name>, usize), Violations> {
    let mut bad = Violations::default();
    let after = (!page_token.is_empty()).then(|| bad.name("page_token", page_token));
    let page_size = self::page_size(&mut bad, page_size, default);
    bad.into_result((after, page_size))
}

fn page_size(bad: &mut Violations, page_size: u32, default: usize) -> usize {
    const MAX: u32 = 1000;
    match page_size {
        0 => default,
        1..=MAX => page_size as usize,
        _ => {
            bad.add("page_size", format!("is {page_size}; allowed is 1 to {MAX}"));
            default
        }
    }
}

/// Each state once, however often it is listed.
fn cycle_states(bad: &mut Violations, states: &[i32]) -> Vec<CycleState> {
    let mut found = BTreeSet::new();
    for (i, state) in states.iter().enumerate() {
        match pb::CycleState::try_from(*state) {
            Ok(pb::CycleState::Succeeded) => {
                found.insert(CycleState::Succeeded);
            }
            Ok(pb::CycleState::Degraded) => {
                found.insert(CycleState::Degraded);
            }
            Ok(pb::CycleState::Failed) => {
                found.insert(CycleState::Failed);
            }
            Ok(pb::CycleState::Cancelled) => {
                found.insert(CycleState::Cancelled);
            }
            Ok(pb::CycleState::Interrupted) => {
                found.insert(CycleState::Interrupted);
            }
            Ok(pb::CycleState::Unspecified) | Err(_) => {
                bad.add(format!("states[{i}]"), format!("is {state}; give the state of a finished cycle"));
            }
        }
    }
    found.into_iter().collect()
}

fn overlap(bad: &mut Violations, field: &str, policy: i32) -> Option<OverlapPolicy> {
    match pb::OverlapPolicy::try_from(policy) {
        Ok(pb::OverlapPolicy::Unspecified) => None,
        Ok(pb::OverlapPolicy::Skip) => Some(OverlapPolicy::Skip),
        Ok(pb::OverlapPolicy::BufferOne) => Some(OverlapPolicy::BufferOne),
        Ok(pb::OverlapPolicy::BufferAll) => Some(OverlapPolicy::BufferAll),
        Ok(pb::OverlapPolicy::CancelOther) => Some(OverlapPolicy::CancelOther),
        Err(_) => {
            bad.add(field, format!("is {policy}, which is not an OverlapPolicy"));
            None
        }
    }
}

pub(super) fn parameters(bad: &mut Violations, bytes: &Bytes) -> Payload {
    if bytes.len() > Subsystem::MAX_PARAMETERS {
        bad.add("parameters", format!("is {} bytes; the limit is {} bytes", bytes.len(), Subsystem::MAX_PARAMETERS));
        return Payload::default();
    }
    // Copied, since the bytes are a part of the whole request and would keep it in memory.
    Payload::check(Bytes::copy_from_slice(bytes)).unwrap_or_else(|malformed| {
        bad.add("parameters", malformed.to_string());
        Payload::default()
    })
}

fn unless_zero(value: u32) -> Option<u32> {
    (value != 0).then_some(value)
}

fn duration(bad: &mut Violations, field: &str, value: Option<prost_types::Duration>) -> Option<SignedDuration> {
    let prost_types::Duration { seconds, nanos } = value?;
    let same_sign = (seconds <= 0 && nanos <= 0) || (seconds >= 0 && nanos >= 0);
    if nanos.unsigned_abs() >= 1_000_000_000 || !same_sign {
        bad.add(field, format!("is {seconds} s and {nanos} ns, which is not a google.protobuf.Duration"));
        return None;
    }
    Some(SignedDuration::new(seconds, nanos))
}

fn timestamp(bad: &mut Violations, field: &str, value: prost_types::Timestamp) -> Option<Timestamp> {
    let time = read_timestamp(value);
    if time.is_none() {
        bad.add(field, "is out of range");
    }
    time
}
