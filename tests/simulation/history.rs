//! What clients, watchers and subsystems have seen in one simulation, and the promises that this has to keep.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

use bytes::Bytes;
use orchestrator_core::{
    proto::orchestrator::v1::{self as pb, CycleState, CycleTelemetry, SubsystemState},
    store::SimulatedDatabase,
};
use prost::Message;
use prost_types::Timestamp;
use tokio::time::Instant;

use crate::fleet::{Call, Log};

/// The deadline of cycles without their own, in milliseconds.
pub(crate) const DEADLINE: i32 = 6_000;
/// A cycle ends at its deadline, and at most this later.
const GRACE: f64 = 250.0;

/// The dependencies of the declared subsystems: the second waits for the first.
pub(crate) const EDGES: [(&str, &str); 3] = [("a", "b"), ("a", "c"), ("c", "e")];

/// The state of a registration: its version, or `None` if it is not registered.
pub(crate) type Standing = Option<u64>;

pub(crate) struct History {
    began: Instant,
    /// The database of the service.
    database: SimulatedDatabase,
    /// Broken promises.
    pub(crate) violations: Vec<String>,
    /// All that was seen: when, in milliseconds, by which actor, and what.
    trace: Vec<(u128, String, String)>,
    /// The cycles whose ids clients have received, with their records, as far as they have.
    acknowledged: BTreeMap<u64, Option<Bytes>>,
    /// The cycle of each request.
    requests: BTreeMap<String, u64>,
    /// Acknowledged cycles without a waiting caller.
    promised: BTreeSet<u64>,
    /// The highest revision that a client has received.
    highest_revision: u64,
    /// The records that clients have read, by their revisions.
    read: BTreeMap<u64, Bytes>,
    /// The deadlines of cycles, where they are known, in milliseconds.
    deadlines: BTreeMap<u64, i32>,
    /// The records that each watcher has seen, in their order.
    watched: BTreeMap<&'static str, Vec<Bytes>>,
    /// The possible states of each registration.
    pub(crate) registered: BTreeMap<String, Vec<Standing>>,
    /// True once a loss of power could have undone a begin.
    pub(crate) begins_may_be_lost: bool,
    /// True if the wall clock was set.
    pub(crate) clock_was_set: bool,
}

impl History {
    pub(crate) fn new(database: SimulatedDatabase) -> Self {
        Self {
            began: Instant::now(),
            database,
            violations: Vec::new(),
            trace: Vec::new(),
            acknowledged: BTreeMap::new(),
            requests: BTreeMap::new(),
            promised: BTreeSet::new(),
            highest_revision: 0,
            read: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            watched: BTreeMap::new(),
            registered: BTreeMap::new(),
            begins_may_be_lost: false,
            clock_was_set: false,
        }
    }

    /// Adds a line to the trace.
    pub(crate) fn note(&mut self, actor: impl Display, event: impl Display) {
        self.trace.push((self.began.elapsed().as_millis(), actor.to_string(), event.to_string()));
    }

    /// All that was seen, by time. At one time, different actors have no order.
    pub(crate) fn trace(&mut self) -> Vec<String> {
        let mut trace = std::mem::take(&mut self.trace);
        trace.sort_by(|(at, actor, _), (other_at, other, _)| (at, actor).cmp(&(other_at, other)));
        trace.into_iter().map(|(at, actor, event)| format!("{at:>7} ms  {actor}: {event}")).collect()
    }

    pub(crate) fn violated(&mut self, promise: impl Display) {
        self.note("VIOLATED", &promise);
        self.violations.push(promise.to_string());
    }

    /// A client has received the id of a cycle, and its record unless this is empty.
    pub(crate) fn acknowledge(&mut self, client: &str, request: &pb::RunCycleRequest, cycle_id: u64, record: &Bytes) {
        let pb::RunCycleRequest { request_id, deadline, r#async, .. } = request;
        self.note(client, format_args!("cycle {cycle_id} for {request_id:?}, {} bytes", record.len()));
        if cycle_id == 0 {
            return self.violated("a cycle was acknowledged without its id");
        }
        if let Some(deadline) = deadline {
            let seconds = i32::try_from(deadline.seconds).unwrap();
            self.deadlines.insert(cycle_id, seconds * 1000 + deadline.nanos / 1_000_000);
        }
        if *r#async && record.is_empty() {
            self.promised.insert(cycle_id);
        }
        let known = self.acknowledged.entry(cycle_id).or_default();
        let differs = known.as_ref().is_some_and(|known| !record.is_empty() && known != record);
        if !record.is_empty() {
            *known = Some(record.clone());
            let revision = decode(record).revision;
            self.highest_revision = self.highest_revision.max(revision);
            self.receive(client, revision);
        }
        if differs {
            self.violated(format_args!("cycle {cycle_id} was acknowledged with two records"));
        }
        if !request_id.is_empty() {
            let first = *self.requests.entry(request_id.clone()).or_insert(cycle_id);
            if first != cycle_id {
                self.violated(format_args!("request {request_id:?} has started cycles {first} and {cycle_id}"));
            }
        }
    }

    /// A client has received this revision.
    fn receive(&mut self, client: &str, revision: u64) {
        if revision > self.database.surviving().0 {
            self.violated(format_args!("{client} receives revision {revision}, which can yet be lost"));
        }
    }

    /// A client has learned that there is a cycle of this id.
    pub(crate) fn hear(&mut self, client: &str, cycle_id: u64) {
        self.note(client, format_args!("is told of cycle {cycle_id}"));
        self.acknowledged.entry(cycle_id).or_default();
    }

    /// The highest revision that a client has received.
    pub(crate) fn highest_revision(&self) -> u64 {
        self.highest_revision
    }

    /// The highest id of a cycle that a client has received.
    pub(crate) fn highest_cycle(&self) -> u64 {
        self.acknowledged.last_key_value().map_or(0, |(cycle_id, _)| *cycle_id)
    }

    /// A client has read a record.
    pub(crate) fn read(&mut self, client: &str, record: &Bytes) {
        let CycleTelemetry { cycle_id, revision, .. } = decode(record);
        self.receive(client, revision);
        if let Some(other) = self.read.insert(revision, record.clone())
            && other != record
        {
            self.violated(format_args!("{client} reads another record of revision {revision}, of cycle {cycle_id}"));
        }
    }

    /// The revision of the last record that a watcher has seen.
    pub(crate) fn position(&self, watcher: &str) -> u64 {
        self.watched.get(watcher).map_or(0, |seen| seen.len() as u64)
    }

    pub(crate) fn watch(&mut self, watcher: &'static str, revision: u64, record: Bytes) {
        let next = self.position(watcher) + 1;
        let cycle_id = decode(&record).cycle_id;
        self.receive(watcher, revision);
        self.note(watcher, format_args!("sees revision {revision}, cycle {cycle_id}"));
        if revision != next {
            self.violated(format_args!("{watcher} sees revision {revision} in place of {next}"));
        }
        self.watched.entry(watcher).or_default().push(record);
    }

    /// A change of a registration that may be made from now on.
    pub(crate) fn may_register(&mut self, name: &str, standing: Standing) {
        self.registered.entry(name.to_owned()).or_insert_with(|| vec![None]).push(standing);
    }

    /// This change was acknowledged.
    pub(crate) fn registered(&mut self, name: &str, standing: Standing) {
        self.note(name, format_args!("is registered as {standing:?}"));
        self.registered.insert(name.to_owned(), vec![standing]);
    }

    /// Checks all promises, with the records of the history as they are at last, in the order of their revisions.
    pub(crate) fn check(&mut self, records: &[Bytes], log: &Log) {
        let cycles: Vec<_> = records.iter().map(decode).collect();
        let mut problems = Vec::new();
        let mut broken = |problem: String| problems.push(problem);
        check_numbers(&cycles, &mut broken);
        let by_id: BTreeMap<u64, (&CycleTelemetry, &Bytes)> =
            cycles.iter().zip(records).map(|(cycle, record)| (cycle.cycle_id, (cycle, record))).collect();
        for (cycle_id, record) in &self.acknowledged {
            match (by_id.get(cycle_id), record) {
                (None, _) => broken(format!("cycle {cycle_id} was acknowledged, and is lost")),
                (Some((_, kept)), Some(record)) if *kept != record => {
                    broken(format!("the record of cycle {cycle_id} was acknowledged, and is another one now"));
                }
                _ => {}
            }
        }
        for (revision, record) in &self.read {
            let index = usize::try_from(*revision - 1).unwrap();
            if records.get(index) != Some(record) {
                broken(format!("the record of revision {revision} was read, and is lost"));
            }
        }
        for (request, cycle_id) in &self.requests {
            let found = by_id.get(cycle_id).filter(|(cycle, _)| cycle.request_id == *request);
            if found.is_none() && !self.begins_may_be_lost {
                broken(format!("cycle {cycle_id} was acknowledged for request {request:?}, and is of another one"));
            }
        }
        let mut requests = BTreeMap::new();
        for cycle in cycles.iter().filter(|cycle| !cycle.request_id.is_empty()) {
            if let Some(other) = requests.insert(&cycle.request_id, cycle.cycle_id) {
                broken(format!("request {:?} has cycles {other} and {}", cycle.request_id, cycle.cycle_id));
            }
        }
        for cycle_id in self.promised.iter().filter(|_| !self.begins_may_be_lost) {
            let record = by_id.get(cycle_id).map(|(cycle, _)| *cycle);
            if record.is_some_and(|it| it.state() == CycleState::Interrupted && it.started_at.is_none()) {
                broken(format!("cycle {cycle_id} waited without a caller, and was interrupted before it began"));
            }
        }
        for (watcher, seen) in &self.watched {
            if seen != records {
                let differs = seen.iter().zip(records).position(|(one, other)| one != other);
                broken(format!(
                    "{watcher} has seen {} of {} records, differing at {differs:?}",
                    seen.len(),
                    records.len()
                ));
            }
        }
        for cycle in &cycles {
            let deadline = self.deadlines.get(&cycle.cycle_id).copied().unwrap_or(DEADLINE);
            if cycle.state() != CycleState::Interrupted && cycle.duration_ms > f64::from(deadline) + GRACE {
                broken(format!(
                    "cycle {} took {} ms, with a deadline of {deadline}",
                    cycle.cycle_id, cycle.duration_ms
                ));
            }
        }
        if !self.clock_was_set {
            check_order(&cycles, &mut broken);
        }
        check_calls(&log.calls, &by_id, &mut broken);
        for problem in problems {
            self.violated(problem);
        }
    }
}

/// Ids and revisions have no gaps, and epochs grow.
fn check_numbers(cycles: &[CycleTelemetry], broken: &mut impl FnMut(String)) {
    let (mut ids, mut last) = (BTreeSet::new(), 0);
    for (cycle, revision) in cycles.iter().zip(1..) {
        if cycle.revision != revision {
            broken(format!("revision {} is in the place of {revision}", cycle.revision));
        }
        if !ids.insert(cycle.cycle_id) {
            broken(format!("cycle {} is recorded twice", cycle.cycle_id));
        }
        if cycle.epoch < last {
            broken(format!("revision {revision} is of epoch {}, after one of {last}", cycle.epoch));
        }
        last = cycle.epoch;
    }
    let missing: Vec<_> = (1..=ids.last().copied().unwrap_or_default()).filter(|id| !ids.contains(id)).collect();
    if !missing.is_empty() {
        broken(format!("cycles {missing:?} are neither recorded nor open"));
    }
}

/// Of cycles of one epoch with a subsystem in common, the one with the lower id ends before the other one begins. In a
/// cycle, a subsystem ends before those begin that wait for it.
fn check_order(cycles: &[CycleTelemetry], broken: &mut impl FnMut(String)) {
    let mut last: BTreeMap<(u64, &str), &CycleTelemetry> = BTreeMap::new();
    let mut began: Vec<_> = cycles.iter().filter(|it| it.started_at.is_some() && !it.subsystems.is_empty()).collect();
    began.sort_by_key(|cycle| cycle.cycle_id);
    for cycle in began {
        for part in &cycle.subsystems {
            if let Some(earlier) = last.insert((cycle.epoch, &part.name), cycle)
                && later(earlier.finished_at.as_ref(), cycle.started_at.as_ref())
            {
                let (one, other, name) = (earlier.cycle_id, cycle.cycle_id, &part.name);
                broken(format!("cycle {other} began before cycle {one} had ended, and both have {name}"));
            }
        }
        let part = |name| cycle.subsystems.iter().find(|part| part.name == name);
        for (before, after) in EDGES {
            if let (Some(one), Some(other)) = (part(before), part(after))
                && later(one.finished_at.as_ref(), other.started_at.as_ref())
            {
                broken(format!("in cycle {}, {after} began before {before} had ended", cycle.cycle_id));
            }
        }
    }
}

fn later(one: Option<&Timestamp>, other: Option<&Timestamp>) -> bool {
    let number = |time: &Timestamp| (time.seconds, time.nanos);
    one.zip(other).is_some_and(|(one, other)| number(one) > number(other))
}

/// Each call belongs to a recorded cycle of its epoch, or to one that was interrupted then; none is made twice; and
/// dependents are called after the answers that they wait for.
fn check_calls(calls: &[Call], by_id: &BTreeMap<u64, (&CycleTelemetry, &Bytes)>, broken: &mut impl FnMut(String)) {
    let (mut made, mut epochs) = (BTreeSet::new(), BTreeMap::new());
    for call in calls {
        let Call { subsystem, cycle_id, epoch, attempt, .. } = call;
        if !made.insert((cycle_id, epoch, subsystem, attempt)) {
            broken(format!("a call was made twice: {call:?}"));
        }
        let first = *epochs.entry(*cycle_id).or_insert(*epoch);
        if first != *epoch {
            broken(format!("cycle {cycle_id} has run in the epochs {first} and {epoch}"));
        }
        match by_id.get(cycle_id) {
            None => broken(format!("a subsystem was told of cycle {cycle_id}, which is lost: {call:?}")),
            Some((cycle, _)) => {
                let is_of_it = match cycle.state() {
                    CycleState::Interrupted => cycle.epoch > *epoch,
                    _ => cycle.epoch == *epoch,
                };
                if !is_of_it {
                    broken(format!("cycle {cycle_id} is recorded by epoch {}, and was called by {epoch}", cycle.epoch));
                }
            }
        }
    }
    check_overlaps(calls, by_id, broken);
    let call_of = |cycle_id, name: &str, attempt| {
        calls.iter().find(|it| it.cycle_id == cycle_id && it.subsystem == name && it.attempt == attempt)
    };
    for (cycle_id, (cycle, _)) in by_id {
        for (before, after) in EDGES {
            let succeeded = cycle.subsystems.iter().find(|part| part.name == before);
            let succeeded = succeeded.filter(|part| part.state() == SubsystemState::Succeeded);
            let answered = succeeded.and_then(|part| call_of(*cycle_id, before, part.attempts)?.answered);
            if let (Some(answered), Some(call)) = (answered, call_of(*cycle_id, after, 1))
                && call.began < answered
            {
                broken(format!("in cycle {cycle_id}, {after} was called before {before} had answered"));
            }
        }
    }
}

/// While an epoch waits for the answer of a subsystem, it calls this for no other cycle.
fn check_overlaps(calls: &[Call], by_id: &BTreeMap<u64, (&CycleTelemetry, &Bytes)>, broken: &mut impl FnMut(String)) {
    for call in calls {
        // A call without success may have been given up before it was answered.
        let succeeded = by_id.get(&call.cycle_id).is_some_and(|(cycle, _)| {
            let mut parts = cycle.subsystems.iter();
            let part = parts.find(|part| part.name == call.subsystem && part.attempts == call.attempt);
            part.is_some_and(|part| part.state() == SubsystemState::Succeeded)
        });
        let Some(answered) = call.answered.filter(|_| succeeded) else { continue };
        let meanwhile = calls.iter().find(|other| {
            (&other.subsystem, other.epoch) == (&call.subsystem, call.epoch)
                && other.cycle_id != call.cycle_id
                && (call.began..answered).contains(&other.began)
        });
        if let Some(other) = meanwhile {
            broken(format!("{} was in cycles {} and {} at once", call.subsystem, call.cycle_id, other.cycle_id));
        }
    }
}

pub(crate) fn decode(record: &Bytes) -> CycleTelemetry {
    CycleTelemetry::decode(record.clone()).unwrap()
}
