//! Makes answers: from internal types to messages of the contract.

use std::{collections::BTreeMap, time::Duration};

use prost::Message;
use tokio::time::Instant;

use super::{
    gate::Entered,
    handlers::MAX_ANSWER,
    judge::{Authority, Who},
};
use crate::{
    access::{Mode, Right, Role},
    cluster::Membership,
    engine::{BreakerState, PlannedSubsystem, Schedule},
    ledger::DigestKey,
    model::{
        self, CatchUp, CycleRequest, IntervalLoop, OverlapPolicy, Payload, Replica, Subsystem, SubsystemState,
        TickDisposition, TickRange,
    },
    orchestrator::{Event, LiveCycle, Origin, Position, Registered, RunningCycle, Status, Update, WaitingCycle},
    ports::{CallError, Snapshot, Unreadable},
    proto::{duration, orchestrator::v1 as pb, timestamp},
    record,
    schedule::{LoopEntry, LoopOrigin},
};

/// Most bytes of an entry of a list in addition to its own.
pub(super) const AROUND: usize = 8;

/// The commit that was built, or nothing: see `build.rs`.
const COMMIT: &str = env!("BUILD_COMMIT");

/// The status, without its loops and the last cycle. `insecure`: other machines may need no right.
pub(super) fn status(status: Status, insecure: bool, membership: &Membership) -> pb::OrchestratorStatus {
    let Status {
        last: _,
        total_cycles,
        running,
        queued,
        waiting,
        loops: _,
        loops_paused,
        read_only,
        epoch,
        started_at,
        uptime,
        orchestrator_id,
        subsystem_count,
        missing_count,
        missing,
        oldest_revision,
        newest_revision,
        store_error,
        watchers,
    } = status;
    let running_cycles: Vec<_> = running.into_iter().map(running_cycle).collect();
    pb::OrchestratorStatus {
        last_cycle: bytes::Bytes::new(),
        total_cycles,
        running_cycle: running_cycles.first().cloned(),
        running_cycles,
        queued_cycles: count(queued),
        waiting_cycles: waiting.into_iter().map(waiting_cycle).collect(),
        loops: Vec::new(),
        epoch: epoch.0,
        started_at: Some(timestamp(started_at)),
        uptime: duration(uptime),
        version: env!("CARGO_PKG_VERSION").into(),
        commit: COMMIT.into(),
        orchestrator_id: orchestrator_id.to_string(),
        subsystem_count: count(subsystem_count),
        missing_count: count(missing_count),
        missing: missing.iter().map(ToString::to_string).collect(),
        subsystems: Vec::new(),
        oldest_revision: oldest_revision.0,
        newest_revision: newest_revision.0,
        store_error: store_error.map(|error| error.to_string()).unwrap_or_default(),
        watchers: count(watchers),
        insecure,
        loops_paused,
        read_only,
        ..of_replica(membership)
    }
}

/// The status of the leader, as a follower of it answers.
pub(super) fn asked_at(membership: &Membership, status: pb::OrchestratorStatus) -> pb::OrchestratorStatus {
    let pb::OrchestratorStatus { replica, role, leader, lease_remaining, unable_to_lead, .. } = of_replica(membership);
    // The leader knows best that it leads.
    let leader = status.leader.or(leader);
    pb::OrchestratorStatus { replica, role, leader, lease_remaining, unable_to_lead, ..status }
}

/// The part of the status that says which replica answers, and which one leads.
fn of_replica(membership: &Membership) -> pb::OrchestratorStatus {
    let replica = |replica: &Replica| pb::Replica {
        name: replica.name.clone(),
        address: replica.address.as_ref().map(ToString::to_string).unwrap_or_default(),
    };
    let own = membership.replica();
    let (role, leader) = match membership.role() {
        model::Role::Leader { .. } => (pb::ReplicaRole::Leader, Some(replica(own))),
        model::Role::Follower { leader } => (pb::ReplicaRole::Follower, leader.map(|leader| replica(&leader.replica))),
    };
    pb::OrchestratorStatus {
        replica: Some(replica(own)),
        role: role.into(),
        leader,
        lease_remaining: membership.lease().and_then(|lease| duration(lease.remaining())),
        unable_to_lead: membership.unable().as_deref().unwrap_or_default().to_owned(),
        ..pb::OrchestratorStatus::default()
    }
}

fn running_cycle(running: RunningCycle) -> pb::RunningCycle {
    let RunningCycle { cycle, total, ended, running } = running;
    pb::RunningCycle {
        cycle_id: cycle.cycle_id.0,
        started_at: Some(timestamp(cycle.started_at)),
        trigger: record::trigger_of(cycle.trigger).into(),
        r#loop: cycle.loop_name.as_ref().map(ToString::to_string).unwrap_or_default(),
        total: count(total),
        ended: count(ended),
        running: count(running),
    }
}

fn waiting_cycle(waiting: WaitingCycle) -> pb::WaitingCycle {
    let WaitingCycle { cycle_id, request, waits_for } = waiting;
    let (other, shared) = waits_for.unwrap_or_default();
    pb::WaitingCycle {
        cycle_id: cycle_id.0,
        trigger: record::trigger(&request.trigger).into(),
        r#loop: request.trigger.loop_name().map(ToString::to_string).unwrap_or_default(),
        scheduled_at: Some(timestamp(request.scheduled_at)),
        waits_for_cycle_id: other.0,
        waits_for_subsystem: shared.map(|name| name.to_string()).unwrap_or_default(),
    }
}

/// The loops of a status: if they are larger than `room`, without fields that can be long.
pub(super) fn listed_loops(authority: &Authority, loops: &[LoopEntry], room: usize) -> Vec<pb::IntervalLoopStatus> {
    let mut whole = Vec::with_capacity(loops.len());
    let mut bytes = 0;
    for entry in loops {
        let status = loop_status(authority, entry);
        bytes += status.encoded_len() + AROUND;
        if bytes > room {
            return loops.iter().map(|entry| brief_loop_status(authority, entry)).collect();
        }
        whole.push(status);
    }
    whole
}

fn brief_loop_status(authority: &Authority, entry: &LoopEntry) -> pb::IntervalLoopStatus {
    let settings = IntervalLoop { subset: None, parameters: Payload::default(), ..(*entry.settings).clone() };
    let mut status = loop_status_of(authority, &settings, entry);
    status.not_run.clear();
    status
}

/// A plan as a message of the contract.
pub fn plan(schedule: Schedule) -> pb::Plan {
    plan_page(schedule, 0, usize::MAX, usize::MAX).0
}

/// A page of a plan: from this position on, with limits on subsystems and bytes. Also returns the position of the next
/// page, if there is one.
pub(super) fn plan_page(
    schedule: Schedule,
    from: usize,
    page_size: usize,
    max_bytes: usize,
) -> (pb::Plan, Option<usize>) {
    /// Most entries of the critical path: more than anyone reads, and with the longest names still far below the limit
    /// of an answer.
    const MAX_PATH: usize = 10_000;
    let Schedule { subsystems, levels, critical_path, duration } = schedule;
    let path = &critical_path[critical_path.len().saturating_sub(MAX_PATH)..];
    let all = subsystems.len();
    let mut plan = pb::Plan {
        subsystems: Vec::new(),
        levels,
        critical_path: if from == 0 { path.iter().map(ToString::to_string).collect() } else { Vec::new() },
        expected_duration_ms: milliseconds(duration),
        subsystem_count: count(all),
    };
    let mut bytes = plan.encoded_len() + AROUND;
    for planned in subsystems.into_iter().skip(from).take(page_size) {
        let planned = planned_subsystem(planned);
        bytes = bytes.saturating_add(planned.encoded_len() + AROUND);
        if bytes > max_bytes {
            break;
        }
        plan.subsystems.push(planned);
    }
    let next = from.saturating_add(plan.subsystems.len());
    (plan, (next < all).then_some(next))
}

fn planned_subsystem(planned: PlannedSubsystem) -> pb::PlannedSubsystem {
    let PlannedSubsystem { name, phase, level, waits_for, skip, breaker, duration } = planned;
    let (skip_reason, requirement) = skip.map_or((None, None), |(reason, requirement)| (Some(reason), requirement));
    pb::PlannedSubsystem {
        name: name.to_string(),
        phase,
        level,
        waits_for: waits_for.iter().map(ToString::to_string).collect(),
        skip_reason: record::reason_to_skip(skip_reason).into(),
        expected_duration_ms: milliseconds(duration),
        skip_requirement: requirement.map(|name| name.to_string()).unwrap_or_default(),
        breaker: breaker_state(breaker).into(),
    }
}

fn breaker_state(breaker: BreakerState) -> pb::BreakerState {
    match breaker {
        BreakerState::Closed => pb::BreakerState::Closed,
        BreakerState::Open(_) => pb::BreakerState::Open,
        BreakerState::HalfOpen => pb::BreakerState::HalfOpen,
    }
}

pub(super) fn subsystem_status<Q>(
    call: &Entered<Q>,
    registered: &Registered,
    include_output: bool,
    snapshot: Option<&Result<Snapshot, CallError>>,
) -> pb::SubsystemStatus {
    let Registered { member, origin, former_names } = registered;
    let redacted = !call.authority.sees_parameters_of(registered);
    let mut registration = registration(&member.subsystem);
    let etag = etag(call.orchestrator().digests(), &registration);
    if redacted {
        registration.parameters.clear();
    }
    let output = member.standing.latest();
    let last = member.standing.last();
    let (snapshot, snapshot_error) = match snapshot {
        Some(Ok(snapshot)) => (snapshot.status.as_bytes().clone(), String::new()),
        Some(Err(error)) => (bytes::Bytes::new(), error.to_string()),
        None => Default::default(),
    };
    pb::SubsystemStatus {
        registration: Some(registration),
        origin: match origin {
            Origin::Config => pb::Origin::Config,
            Origin::Rpc { .. } => pb::Origin::Rpc,
        }
        .into(),
        lease_expires_at: registered.lease().map(|lease| timestamp(call.orchestrator().lease_ends_at(&lease))),
        suspended: member.suspended,
        breaker: breaker_state(member.breaker(Instant::now())).into(),
        initialized: member.is_initialized(),
        last_cycle_id: last.as_ref().map_or(0, |last| last.cycle_id.0),
        last: last.map(|last| record::part(&last.report, Some(last.started_at))),
        output_cycle_id: output.as_ref().map_or(0, |output| output.cycle_id.0),
        output: output.filter(|_| include_output).map(|output| output.payload.as_bytes().clone()).unwrap_or_default(),
        snapshot,
        snapshot_error,
        owner: member.owner.as_ref().map(ToString::to_string).unwrap_or_default(),
        owner_revoked: call.orchestrator().is_revoked(registered),
        redacted,
        etag,
        former_names: former_names.iter().map(ToString::to_string).collect(),
    }
}

/// The version of a registration: half of a keyed digest, which is enough to recognize a change.
pub(super) fn etag(digests: &DigestKey, registration: &pb::Registration) -> String {
    let digest = digests.digest(&registration.encode_to_vec());
    let half = digest.first_chunk().map_or(0, |half| u128::from_be_bytes(*half));
    format!("{half:032x}")
}

/// A part in a list: details of a large one are left out, so that other parts fit.
pub(super) fn listed_part(part: pb::SubsystemTelemetry) -> pb::SubsystemTelemetry {
    const MAX: usize = 64 << 10;
    if part.encoded_len() <= MAX {
        return part;
    }
    pb::SubsystemTelemetry { output: bytes::Bytes::new(), issues: Vec::new(), metrics: BTreeMap::new(), ..part }
}

/// A registration as a message of the contract, with every default filled in.
pub fn registration(subsystem: &Subsystem) -> pb::Registration {
    let Subsystem {
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
        peer,
    } = subsystem;
    let names = |names: &[crate::model::Name]| names.iter().map(ToString::to_string).collect();
    let policy = breaker.unwrap_or_default();
    pb::Registration {
        name: name.to_string(),
        endpoint: endpoint.to_string(),
        phase: *phase,
        requires: names(requires),
        after: names(after),
        reads: names(reads),
        timeout: duration(*timeout),
        retry: Some(pb::RetryPolicy {
            max_attempts: retry.max_attempts,
            initial_backoff: duration(retry.initial_backoff),
            max_backoff: duration(retry.max_backoff),
            backoff_multiplier: retry.backoff_multiplier,
            retryable_status_codes: retry.retryable.iter().map(ToString::to_string).collect(),
        }),
        breaker: Some(pb::BreakerPolicy {
            failure_threshold: policy.failure_threshold,
            open_for: duration(policy.open_for),
            disabled: breaker.is_none(),
        }),
        critical: *critical,
        parameters: parameters.as_bytes().clone(),
        limits: Some(pb::Limits {
            max_message_bytes: limits.max_message_bytes,
            max_output_bytes: limits.max_output_bytes,
            max_metrics: limits.max_metrics,
            max_issues: limits.max_issues,
        }),
        record_output: *record_output,
        tls: peer.as_ref().map(|peer| pb::Tls { peer: peer.to_string() }),
    }
}

pub(super) fn loop_status(authority: &Authority, entry: &LoopEntry) -> pb::IntervalLoopStatus {
    loop_status_of(authority, &entry.settings, entry)
}

fn loop_status_of(authority: &Authority, settings: &IntervalLoop, entry: &LoopEntry) -> pb::IntervalLoopStatus {
    let LoopEntry { settings: _, origin, state, next, lag: _, last_finished_at: _, _held: _ } = entry;
    let ticks = state.ticks;
    let redacted = !authority.sees_parameters_of_loop(&settings.name);
    let mut settings = interval_loop(settings);
    if redacted {
        settings.parameters.clear();
    }
    pb::IntervalLoopStatus {
        r#loop: Some(settings),
        origin: match origin {
            LoopOrigin::Config => pb::Origin::Config,
            LoopOrigin::Rpc => pb::Origin::Rpc,
        }
        .into(),
        stopped: state.stopped,
        paused: state.is_paused(),
        next_due_at: next.map(|tick| timestamp(tick.due_at)),
        ticks: Some(pb::TickCounts {
            due: ticks.due(),
            ran: ticks.ran,
            skipped: ticks.skipped,
            missed: ticks.missed,
            coalesced: ticks.coalesced,
            dropped: ticks.dropped,
        }),
        not_run: state.not_run.iter().map(tick_range).collect(),
        last_cycle_id: state.last_cycle_id.0,
        redacted,
    }
}

fn tick_range(range: &TickRange) -> pb::TickRange {
    let disposition = match range.disposition {
        TickDisposition::Ran => pb::TickDisposition::Ran,
        TickDisposition::Skipped => pb::TickDisposition::Skipped,
        TickDisposition::Missed => pb::TickDisposition::Missed,
        TickDisposition::Coalesced => pb::TickDisposition::Coalesced,
        TickDisposition::Dropped => pb::TickDisposition::Dropped,
    };
    pb::TickRange {
        first_due_at: Some(timestamp(range.first)),
        last_due_at: Some(timestamp(range.last)),
        count: range.count,
        disposition: disposition.into(),
    }
}

/// The settings of a loop as a message of the contract.
pub fn interval_loop(settings: &IntervalLoop) -> pb::IntervalLoop {
    let IntervalLoop {
        name,
        interval,
        offset,
        jitter,
        overlap,
        catch_up,
        catch_up_window,
        subset,
        parameters,
        deadline,
        record_outputs,
    } = settings;
    let overlap = match overlap {
        OverlapPolicy::Skip => pb::OverlapPolicy::Skip,
        OverlapPolicy::BufferOne => pb::OverlapPolicy::BufferOne,
        OverlapPolicy::BufferAll => pb::OverlapPolicy::BufferAll,
        OverlapPolicy::CancelOther => pb::OverlapPolicy::CancelOther,
    };
    let catch_up = match catch_up {
        CatchUp::None => pb::CatchUp::None,
        CatchUp::One => pb::CatchUp::One,
    };
    pb::IntervalLoop {
        name: name.to_string(),
        interval: duration(*interval),
        offset: duration(*offset),
        jitter: duration(*jitter),
        overlap_policy: overlap.into(),
        catch_up: catch_up.into(),
        catch_up_window: duration(*catch_up_window),
        subsystems: subset.iter().flat_map(|names| names.iter().map(ToString::to_string)).collect(),
        parameters: parameters.as_bytes().clone(),
        deadline: deadline.and_then(duration),
        record_outputs: *record_outputs,
    }
}

pub(super) fn event(event: Event) -> pb::WatchCyclesResponse {
    use pb::cycle_event::Event as Is;
    let (Position { revision, epoch }, event) = match event {
        Event::Recorded(record) => (Position::after(&record), Is::Recorded(record.bytes.clone())),
        Event::Unreadable(it) => (Position { revision: it.revision, epoch: None }, Is::Unreadable(unreadable(it))),
        Event::Bookmark(position, checkpoint) => {
            (position, Is::Bookmark(pb::Bookmark { checkpoint: checkpoint.as_deref().unwrap_or_default().to_owned() }))
        }
        Event::Started(cycle, position) => (position, Is::Started(started(&cycle))),
        Event::Progress(event, position, lost) => {
            (position, Is::Progress(progress(&event.cycle, event.change.updates(), lost)))
        }
    };
    let epoch = epoch.unwrap_or_default().0;
    pb::WatchCyclesResponse { event: Some(pb::CycleEvent { revision: revision.0, event: Some(event), epoch }) }
}

/// An unreadable record as a message of the contract.
pub(super) fn unreadable(unreadable: Unreadable) -> pb::UnreadableCycle {
    let Unreadable { cycle_id, revision, problem } = unreadable;
    pb::UnreadableCycle { cycle_id: cycle_id.0, revision: revision.0, problem }
}

fn started(cycle: &LiveCycle) -> pb::CycleStarted {
    pb::CycleStarted {
        cycle_id: cycle.cycle_id.0,
        started_at: Some(timestamp(cycle.started_at)),
        trigger: record::trigger_of(cycle.trigger).into(),
        r#loop: cycle.loop_name.as_ref().map(ToString::to_string).unwrap_or_default(),
        scheduled_at: Some(timestamp(cycle.scheduled_at)),
        subsystems: cycle.names().take(CycleRequest::MAX_SUBSET).map(ToString::to_string).collect(),
    }
}

fn progress(cycle: &LiveCycle, updates: &[Update], lost: u64) -> pb::CycleProgress {
    let updates = updates.iter().map(|Update { name, state, elapsed, attempts }| pb::SubsystemProgress {
        name: name.to_string(),
        state: state.as_ref().map_or(pb::SubsystemState::Running, record::subsystem_state).into(),
        elapsed_ms: milliseconds(*elapsed),
        attempts: *attempts,
        error_code: state.as_ref().and_then(SubsystemState::code).map(|code| code.to_string()).unwrap_or_default(),
        error_message: state.as_ref().map(record::message).unwrap_or_default(),
    });
    pb::CycleProgress { cycle_id: cycle.cycle_id.0, updates: updates.collect(), dropped: lost }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The caller, with as many of its rights as fit.
pub(super) fn who(who: &Who) -> pb::WhoAmIResponse {
    let mode = match who.mode {
        Mode::Off => pb::AccessMode::Off,
        Mode::DryRun => pb::AccessMode::DryRun,
        Mode::Enforce => pb::AccessMode::Enforce,
    };
    let mut response = pb::WhoAmIResponse {
        identity: who.identity.to_string(),
        expires_at: who.expires_at.map(timestamp),
        mode: mode.into(),
        rights: Vec::new(),
        problem: who.problem.as_ref().map(ToString::to_string).unwrap_or_default(),
    };
    let mut bytes = response.encoded_len();
    for right in who.rights.iter().map(right) {
        bytes += right.encoded_len() + AROUND;
        if bytes > MAX_ANSWER {
            break;
        }
        response.rights.push(right);
    }
    response
}

fn right(right: &Right) -> pb::Right {
    let role = match right.role() {
        Role::Monitor => pb::Role::Monitor,
        Role::Viewer => pb::Role::Viewer,
        Role::Operator => pb::Role::Operator,
        Role::Registrar => pb::Role::Registrar,
        Role::Auditor => pb::Role::Auditor,
        Role::Admin => pb::Role::Admin,
    };
    let is_registrar = right.role() == Role::Registrar;
    let phases = right.phases().filter(|_| is_registrar);
    pb::Right {
        role: role.into(),
        subsystems: right.subsystems().collect(),
        loops: right.loops().collect(),
        reads: right.reads().collect(),
        endpoints: right.endpoints().collect(),
        lowest_phase: phases.as_ref().map(|phases| *phases.start()),
        highest_phase: phases.as_ref().map(|phases| *phases.end()),
        max_timeout: duration(right.max_timeout()).filter(|_| is_registrar),
    }
}
