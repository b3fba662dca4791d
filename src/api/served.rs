//! The `dreamnet.subsystem.v1.Subsystem` service: this orchestrator as a subsystem of others, its parents. A cycle of a
//! parent is one cycle here, over what the configuration serves under the name that the parent calls.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    future::ready,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut},
    encoding::{DecodeContext, WireType},
};
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use tonic::{Code, Request, Status, metadata::MetadataMap};

use super::{
    Answer, Api,
    caller::Caller,
    error::{plain, retryable, status},
    gate::Entered,
    handlers::Handlers,
    request,
    rpc::Asks,
};
use crate::{
    model::{
        CallPath, CycleId, CycleRequest, CycleState, Epoch, Name, ParentCycle, PathError, Payload, Served, excerpt,
        is_orchestrator_id,
        text::{count, shortened},
    },
    orchestrator::Status as OrchestratorStatus,
    ports::Record,
    proto::{
        orchestrator::v1 as pb,
        subsystem::v1::{self as pbs, subsystem_server::Subsystem},
        timeout,
    },
};

/// The time before the deadline of a call at which its cycle ends, so that its record is written and answered in time.
const TO_ANSWER: Duration = Duration::from_millis(100);
/// Longest deadline of a cycle, as in the contract.
const MAX_DEADLINE: Duration = Duration::from_hours(24);
/// Most subsystems in an answer: those that took longest.
const MAX_DURATIONS: usize = 256;
/// Bytes of a subsystem in a record, and of an input, at least.
const PART: usize = 64;

// ---------------------------------------------------------------------------------------------------------------
// The names

/// The names under which this orchestrator is served, each with its parent.
#[derive(Default)]
pub(super) struct ServedNames(Mutex<BTreeMap<Name, ServedName>>);

struct ServedName {
    served: Arc<Served>,
    /// The parent whose term began last: `None` until it initializes.
    parent: Option<Parent>,
}

/// A term of a parent.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Parent {
    orchestrator_id: Arc<str>,
    epoch: Epoch,
}

impl ServedNames {
    fn names(&self) -> MutexGuard<'_, BTreeMap<Name, ServedName>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves these names from now on. A name that stays keeps its parent.
    pub(super) fn set(&self, served: Vec<Served>) {
        let mut names = self.names();
        let with_parent = |served: Served| {
            let parent = names.get(&served.name).and_then(|name| name.parent.clone());
            (served.name.clone(), ServedName { served: Arc::new(served), parent })
        };
        *names = served.into_iter().map(with_parent).collect();
    }

    fn find(&self, name: &str) -> Option<Arc<Served>> {
        self.names().get(name).map(|name| name.served.clone())
    }

    /// The parent whose term this is.
    ///
    /// # Errors
    /// A later term has begun: ABORTED. Or this one is not known: FAILED_PRECONDITION, so that the parent initializes.
    fn parent(&self, name: &Name, epoch: Epoch) -> Result<Parent, Status> {
        match self.names().get(name).and_then(|name| name.parent.as_ref()) {
            Some(parent) if parent.epoch > epoch => Err(parent.supersedes(epoch)),
            Some(parent) if parent.epoch == epoch => Ok(parent.clone()),
            _ => Err(plain(Code::FailedPrecondition, "not initialized in this epoch: call Initialize first")),
        }
    }

    /// Begins the term of a parent. Returns true if it is a new one.
    ///
    /// # Errors
    /// A later term has begun: ABORTED.
    fn begin(&self, name: &Name, parent: Parent) -> Result<bool, Status> {
        let mut names = self.names();
        let Some(ServedName { parent: known, .. }) = names.get_mut(name) else { return Ok(false) };
        match known {
            Some(later) if later.epoch > parent.epoch => Err(later.supersedes(parent.epoch)),
            Some(same) if *same == parent => Ok(false),
            // Calls don't say which parent makes them, so two of one epoch could not be told apart.
            Some(other) if other.epoch == parent.epoch => Err(other.supersedes(parent.epoch)),
            _ => {
                *known = Some(parent);
                Ok(true)
            }
        }
    }
}

impl Parent {
    /// The status of a call in an earlier epoch.
    fn supersedes(&self, earlier: Epoch) -> Status {
        let Self { orchestrator_id, epoch } = self;
        let message = format!(
            "epoch {earlier} has ended: {orchestrator_id} has called in epoch {epoch}; give each parent a name of its \
             own ([[serves]] in the configuration)"
        );
        plain(Code::Aborted, &message)
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The calls

/// A call of a parent: its message, and what belongs to it. It is encoded as the message.
#[derive(Clone, Debug, Default)]
pub(super) struct OfParent<Q> {
    message: Q,
    /// What the configuration serves under the name in the message; `None` if it has no such name.
    pub(super) served: Option<Arc<Served>>,
    /// The orchestrators through which it has come, if it says so.
    path: Option<Result<CallPath, PathError>>,
    /// Its deadline.
    due: Option<Instant>,
}

pub(super) type Initialize = OfParent<pbs::InitializeRequest>;
pub(super) type RunCycle = OfParent<pbs::RunCycleRequest>;
pub(super) type GetStatus = OfParent<pbs::GetStatusRequest>;

impl<Q: Message> Message for OfParent<Q> {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        self.message.encode_raw(buffer);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        self.message.merge_field(tag, wire, buffer, context)
    }

    fn encoded_len(&self) -> usize {
        self.message.encoded_len()
    }

    fn clear(&mut self) {
        self.message.clear();
    }
}

impl<Q> OfParent<Q> {
    /// The entry of the configuration for the name that is called.
    ///
    /// # Errors
    /// Nothing: NOT_FOUND.
    fn served(&self, name: &str) -> Result<Arc<Served>, Status> {
        let name = excerpt(name, Name::MAX_LEN);
        self.served.clone().ok_or_else(|| {
            let message = format!(
                "this orchestrator does not serve a subsystem {name:?}; check its endpoint in the registration, and \
                 [[serves]] in the configuration here"
            );
            plain(Code::NotFound, &message)
        })
    }

    /// The path of the calls that this orchestrator makes because of a call by this parent.
    ///
    /// # Errors
    /// It would be a ring, or too long: INVALID_ARGUMENT.
    fn path(&self, parent: &str, own: &Arc<str>) -> Result<CallPath, Status> {
        let so_far = self.path.clone().unwrap_or_else(|| Ok(CallPath::from(parent)));
        let path = so_far.and_then(|so_far| so_far.through(own));
        path.map_err(|error| plain(Code::InvalidArgument, &error.to_string()))
    }
}

impl Api {
    /// Serves these names from now on.
    pub fn serve_as(&self, served: Vec<Served>) {
        self.handlers.served.set(served);
    }

    /// Has a call of a parent answered.
    async fn answer_parent<Q, A, F>(
        &self,
        request: Request<Q>,
        name: fn(&Q) -> &str,
        handle: impl FnOnce(Entered<OfParent<Q>>) -> F,
    ) -> Answer<A>
    where
        OfParent<Q>: Asks,
        F: Future<Output = Result<A, Status>>,
    {
        let (metadata, extensions, message) = request.into_parts();
        if self.handlers.served.names().is_empty() {
            let message = "this orchestrator is not served as a subsystem; see [[serves]] in its configuration";
            return Err(plain(Code::Unimplemented, message));
        }
        let arrived = extensions.get::<Caller>().map_or_else(Instant::now, |caller| caller.arrived);
        let call = OfParent {
            served: self.handlers.served.find(name(&message)),
            path: path(&metadata),
            due: timeout::read(metadata.as_ref()).map(|timeout| arrived + timeout),
            message,
        };
        let request = Request::from_parts(metadata, extensions, call);
        self.gate.answer(request, handle).await.map_err(retryable)
    }
}

/// The value of `orchestrator-path`.
fn path(metadata: &MetadataMap) -> Option<Result<CallPath, PathError>> {
    let mut values = metadata.get_all("orchestrator-path").iter();
    let value = values.next()?.to_str().map_err(|_| PathError::Malformed);
    Some(if values.next().is_some() { Err(PathError::Malformed) } else { value.and_then(CallPath::parse) })
}

#[tonic::async_trait]
impl Subsystem for Api {
    async fn initialize(&self, request: Request<pbs::InitializeRequest>) -> Answer<pbs::InitializeResponse> {
        self.answer_parent(request, |message| &message.subsystem, |call| ready(self.handlers.initialize(call))).await
    }

    async fn run_cycle(&self, request: Request<pbs::RunCycleRequest>) -> Answer<pbs::RunCycleResponse> {
        self.answer_parent(request, |message| &message.subsystem, |call| self.handlers.run_for_parent(call)).await
    }

    async fn get_status(&self, request: Request<pbs::GetStatusRequest>) -> Answer<pbs::GetStatusResponse> {
        self.answer_parent(request, |message| &message.subsystem, |call| ready(status_for_parent(call))).await
    }
}

impl Handlers {
    fn initialize(&self, mut call: Entered<Initialize>) -> Result<pbs::InitializeResponse, Status> {
        let request = call.take_request();
        let pbs::InitializeRequest { subsystem, orchestrator_id, epoch, .. } = &request.message;
        let served = request.served(subsystem)?;
        if !is_orchestrator_id(orchestrator_id) {
            let message = "orchestrator_id is not 1 to 128 letters, digits and signs, without spaces";
            return Err(plain(Code::InvalidArgument, message));
        }
        request.path(orchestrator_id, call.orchestrator().id())?;
        let parent = Parent { orchestrator_id: orchestrator_id.as_str().into(), epoch: Epoch(*epoch) };
        if self.served.begin(&served.name, parent.clone())? {
            let Parent { orchestrator_id, epoch } = parent;
            tracing::info!(subsystem = %served.name, parent = %orchestrator_id, %epoch, "a parent has initialized");
            call.orchestrator().end_earlier(&served.name, epoch);
        }
        Ok(pbs::InitializeResponse {})
    }

    async fn run_for_parent(&self, mut call: Entered<RunCycle>) -> Result<pbs::RunCycleResponse, Status> {
        let (trace, triggered_by) = (call.caller.trace.clone(), call.authority.identity().cloned());
        let (request, by) = call.take_change();
        let served = request.served(&request.message.subsystem)?;
        let epoch = Epoch(request.message.epoch);
        let Parent { orchestrator_id, .. } = self.served.parent(&served.name, epoch)?;
        let path = request.path(&orchestrator_id, call.orchestrator().id())?;
        let deadline = request.due.map(time_for_cycle).transpose()?;
        let (now, message) = (self.clock.now(), request.message);
        let (subsystem, cycle_id) = (served.name.clone(), CycleId(message.cycle_id));
        let parent = ParentCycle { orchestrator_id, subsystem, epoch, cycle_id };
        let size = message.encoded_len();
        let read = move || request::of_parent(message, parent, &served, now);
        let read = self.offload(size / PART, read).await?;
        let request = read.map_err(|problem| plain(Code::InvalidArgument, &format!("the request {problem}")))?;
        let request =
            CycleRequest { triggered_by, deadline, trace, path: Some(path), cause: Some(Arc::new(by)), ..request };
        let ticket = call.orchestrator().run_for_parent(request).await.map_err(status)?;
        // The rest of the request belongs to the cycle.
        call.forget_request();
        let id = call.orchestrator().id().clone();
        let record = ticket.recorded().await.map_err(status)?;
        self.offload(record.bytes.len() / PART, move || answer(&id, &record)).await?
    }
}

fn status_for_parent(mut call: Entered<GetStatus>) -> Result<pbs::GetStatusResponse, Status> {
    let request = call.take_request();
    request.served(&request.message.subsystem)?;
    let OrchestratorStatus {
        orchestrator_id,
        epoch,
        total_cycles,
        last,
        running,
        queued,
        subsystem_count,
        missing_count,
        ..
    } = call.orchestrator().status();
    let last = last.map(|record| json!({ "cycle_id": record.cycle_id.0, "state": record.state.name() }));
    let status = json!({
        "orchestrator_id": &*orchestrator_id,
        "version": env!("CARGO_PKG_VERSION"),
        "epoch": epoch.0,
        "subsystems": subsystem_count,
        "missing_subsystems": missing_count,
        "total_cycles": total_cycles,
        "running_cycles": running.len(),
        "waiting_cycles": queued,
        "last_cycle": last,
    });
    Ok(pbs::GetStatusResponse { status: payload(&status)? })
}

/// The time of a cycle that is to be answered before `due`.
///
/// # Errors
/// No time is left: DEADLINE_EXCEEDED.
fn time_for_cycle(due: Instant) -> Result<Duration, Status> {
    let left = due.saturating_duration_since(Instant::now());
    let left = left.checked_sub(TO_ANSWER).filter(|left| !left.is_zero());
    left.map(|left| left.min(MAX_DEADLINE)).ok_or_else(|| {
        let message = format!(
            "no time is left for a cycle: {TO_ANSWER:?} of the timeout are kept for the answer; give the registration \
             a longer timeout"
        );
        plain(Code::DeadlineExceeded, &message)
    })
}

// ---------------------------------------------------------------------------------------------------------------
// The answer

/// The answer of the orchestrator with this id to a parent whose cycle started this one: a summary.
///
/// # Errors
/// It has not succeeded, not even in part: INTERNAL. Or its record can't be read.
fn answer(id: &str, record: &Record) -> Result<pbs::RunCycleResponse, Status> {
    let telemetry = pb::CycleTelemetry::decode(record.bytes.clone());
    let telemetry = telemetry.map_err(|error| plain(Code::Internal, &format!("the record can't be read: {error}")))?;
    let (cycle_id, state) = (record.cycle_id, record.state.name());
    let summary = format!("cycle {cycle_id} of {id} was {state}: {}", telemetry.error);
    let degraded = match record.state {
        CycleState::Succeeded => None,
        CycleState::Degraded => Some(summary),
        CycleState::Failed | CycleState::Cancelled | CycleState::Interrupted => {
            return Err(plain(Code::Internal, &summary));
        }
    };
    let issues = issue(degraded, reported(id, cycle_id, &telemetry)).into_iter().collect();
    let counted = |states: &[pb::SubsystemState]| {
        telemetry.subsystems.iter().filter(|part| states.contains(&part.state())).count()
    };
    let mut called: Vec<_> = telemetry.subsystems.iter().filter(|part| part.started_at.is_some()).collect();
    called.sort_by_key(|part| Reverse(part.duration_ms.to_bits()));
    let durations: Map<_, _> =
        called.iter().take(MAX_DURATIONS).map(|part| (part.name.clone(), part.duration_ms.into())).collect();
    let succeeded = counted(&[pb::SubsystemState::Succeeded]);
    let output = json!({
        "cycle_id": cycle_id.0,
        "state": state,
        "duration_ms": telemetry.duration_ms,
        "subsystems": telemetry.subsystems.len(),
        "succeeded": succeeded,
        "failed": counted(&[
            pb::SubsystemState::Failed,
            pb::SubsystemState::TimedOut,
            pb::SubsystemState::CircuitOpen,
        ]),
        "skipped": counted(&[pb::SubsystemState::Skipped]),
        "durations_ms": durations,
    });
    Ok(pbs::RunCycleResponse { output: payload(&output)?, metrics: BTreeMap::new(), issues })
}

/// The codes of issues that an orchestrator reports to its parent.
const DEGRADED: &str = "CYCLE_DEGRADED";
const REPORTED: &str = "ERRORS_REPORTED";

/// The only issue of an answer, since a registration may allow no further one: what failed in the cycle, and the errors
/// that its subsystems have reported.
fn issue(degraded: Option<String>, reported: Option<String>) -> Option<pbs::Issue> {
    const MAX_MESSAGE: usize = 4 << 10;
    let code = if degraded.is_some() { DEGRADED } else { REPORTED };
    let message = match (degraded, reported) {
        (Some(degraded), Some(reported)) => format!("{}; {reported}", shortened(degraded, MAX_MESSAGE / 4)),
        (degraded, reported) => degraded.or(reported)?,
    };
    let message = shortened(message, MAX_MESSAGE).into_owned();
    Some(pbs::Issue { severity: pbs::Severity::Error.into(), code: code.into(), message })
}

/// The issues of severity ERROR that subsystems had in a cycle of this orchestrator: so a failure is seen above, by way
/// of any number of orchestrators. `None` if no subsystem had such an issue.
fn reported(id: &str, cycle_id: CycleId, telemetry: &pb::CycleTelemetry) -> Option<String> {
    /// The errors that are named, together in about 2 KiB.
    const NAMED: usize = 16;
    const ROOM: usize = 2 << 10;
    let issues = telemetry.subsystems.iter().flat_map(|part| part.issues.iter().map(move |issue| (&part.name, issue)));
    let mut errors: Vec<_> = issues.filter(|(_, issue)| issue.severity() == pbs::Severity::Error).collect();
    // Those of orchestrators first: each may stand for many.
    errors.sort_by_key(|(_, issue)| ![DEGRADED, REPORTED].contains(&issue.code.as_str()));
    let (number, named) = (errors.len(), errors.len().min(NAMED));
    let of_each = ROOM.checked_div(named)?;
    let short = |(name, issue): &(&String, &pbs::Issue)| {
        shortened(format!("{name} {}: {}", issue.code, issue.message), of_each).into_owned()
    };
    let mut named: Vec<_> = errors.iter().take(NAMED).map(short).collect();
    if number > named.len() {
        named.push(format!("and {} more", number - named.len()));
    }
    let number = count(number as u64, "error");
    Some(format!("in cycle {cycle_id} of {id}, subsystems reported {number}: {}", named.join("; ")))
}

/// An object as the contract has it.
fn payload(object: &Value) -> Result<bytes::Bytes, Status> {
    let nothing = Map::new();
    let payload = Payload::from_json(object.as_object().unwrap_or(&nothing));
    payload.map(|payload| payload.as_bytes().clone()).map_err(|malformed| plain(Code::Internal, &malformed.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Revision;

    fn record(state: CycleState, telemetry: &pb::CycleTelemetry) -> Record {
        Record {
            cycle_id: CycleId(3),
            revision: Revision(3),
            epoch: Epoch(1),
            state,
            trigger: crate::model::Trigger::Manual,
            request_id: None,
            triggered_by: None,
            finished_at: jiff::Timestamp::UNIX_EPOCH,
            bytes: telemetry.encode_to_vec().into(),
        }
    }

    #[test]
    fn the_answer_about_a_large_cycle_has_the_longest_durations_and_fits_into_the_limits_of_an_output() {
        let part = |i: u32| pb::SubsystemTelemetry {
            name: format!("s{i:0>62}"),
            state: pb::SubsystemState::Succeeded.into(),
            started_at: Some(prost_types::Timestamp::default()),
            duration_ms: f64::from(i),
            ..pb::SubsystemTelemetry::default()
        };
        let subsystems = (0..20_000).map(part).collect();
        let telemetry = pb::CycleTelemetry { subsystems, error: "e".repeat(5_000), ..Default::default() };
        let answer = answer("eu", &record(CycleState::Degraded, &telemetry)).unwrap();
        assert!(answer.output.len() < 64 << 10, "{} bytes", answer.output.len());
        let output = Payload::check(answer.output).unwrap().to_json();
        let durations = output["durations_ms"].as_object().unwrap();
        assert_eq!((durations.len(), &output["succeeded"]), (MAX_DURATIONS, &json!(20_000)));
        assert!(durations.values().all(|duration| duration.as_f64() >= Some(19_744.0)));
        assert_eq!(answer.issues[0].message.len(), 4 << 10);
    }

    #[test]
    fn errors_of_subsystems_are_one_issue_that_names_those_of_orchestrators_whatever_others_say() {
        let part = |name: &str, code: &str, severity: pbs::Severity| pb::SubsystemTelemetry {
            name: name.into(),
            issues: vec![pbs::Issue { severity: severity.into(), code: code.into(), message: "m".repeat(4_000) }],
            ..pb::SubsystemTelemetry::default()
        };
        let mut subsystems: Vec<_> = (0..40).map(|i| part(&format!("s{i}"), "X", pbs::Severity::Error)).collect();
        subsystems.push(part("w", "X", pbs::Severity::Warning));
        subsystems.push(part("city", DEGRADED, pbs::Severity::Error));
        let telemetry = pb::CycleTelemetry { subsystems, error: "e".repeat(5_000), ..Default::default() };
        for (state, code) in [(CycleState::Succeeded, REPORTED), (CycleState::Degraded, DEGRADED)] {
            let answer = answer("eu", &record(state, &telemetry)).unwrap();
            let [issue] = &answer.issues[..] else { panic!("{answer:?}") };
            assert_eq!(issue.code, code);
            assert!(issue.message.contains("subsystems reported 41 errors: city CYCLE_DEGRADED: mmm"), "{issue:?}");
            assert!(issue.message.contains("; s14 X: mmm") && issue.message.ends_with("; and 25 more"), "{issue:?}");
        }
    }

    #[test]
    fn a_cycle_that_has_not_succeeded_is_a_failure_with_a_short_message() {
        let telemetry = pb::CycleTelemetry { error: "e".repeat(5_000), ..Default::default() };
        for state in [CycleState::Failed, CycleState::Cancelled, CycleState::Interrupted] {
            let status = answer("eu", &record(state, &telemetry)).unwrap_err();
            assert_eq!(status.code(), Code::Internal);
            assert!(status.message().starts_with(&format!("cycle 3 of eu was {}: eee", state.name())));
            assert!(status.message().len() < 1 << 10);
        }
    }
}
