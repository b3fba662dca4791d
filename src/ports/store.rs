//! The port to a store: what it promises, what is written to it and read from it, and why it fails.

use std::{collections::BTreeMap, future, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;

use super::Leadership;
use crate::{
    ledger::{Control, Frontier, Hash, Node, Part, SealKeys},
    model::{
        CycleId, CycleState, Epoch, EventKind, Histogram, Identity, LoopSpec, LoopState, Name, Output, RequestKey,
        Revision, SubsystemSpec, TraceId, Trigger,
    },
};

/// The durable store. One process writes to it; each [`Write`] is atomic. An open store can be read. It takes writes
/// once [`Store::take_over`] has returned.
///
/// Each write also appends to the log of the history ([`ledger`](crate::ledger)): first its records, in their order,
/// then its audit events, in their order, then the entry of a new log, and then that of its [`Removal`]. Records that
/// were written before there was a log are not in it.
///
/// Each cycle id from 1 to the highest noted one ([`Write::last_cycle_id`]) is exactly one of open, recorded and
/// pruned. Records have dense revisions in the order of their commits, and any order of their ids.
pub trait Store: Send + Sync + 'static {
    /// Reads the state of the earlier process, and fixes the epoch that the next commit begins. Nothing is taken over
    /// before that commit, so a process that ends in between has changed nothing. A further call reads again, and fixes
    /// a later epoch: writes of the previous one are then refused.
    ///
    /// A store that outlives the process seals what later cycles depend on, and the end of the log, with the first of
    /// the keys of `seals`. Seals by the other keys are valid as well, and are renewed by the next commit.
    ///
    /// # Errors
    /// The state can't be read at all, no process could continue from it, or a seal does not belong to what it seals.
    /// [`StoreError::Fenced`] when another replica has claimed a later term.
    fn take_over(&self, seals: Seals) -> BoxFuture<'_, Result<Contents, StoreError>>;

    /// What the replicas agree by that share this store: `None` if it is open in one process at most. The store is
    /// taken over for the term that this replica has claimed last; without a claim, for a term of its own.
    fn leadership(&self) -> Option<Arc<dyn Leadership>> {
        None
    }

    /// The same store, only to look at: its [`Store::take_over`] reads what a process would take over, and it takes no
    /// writes. `None` if it is open in one process at most.
    fn look(&self) -> Option<Arc<dyn Store>> {
        None
    }

    /// Writes atomically, and returns once the outcome is known, however long that takes. With [`Durability::Durable`]
    /// the write then survives the loss of power, with [`Durability::Buffered`] the death of this process. If the
    /// future is dropped, the outcome is unknown.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when a later epoch has taken over: nothing of this one will be written any more. If that
    /// was found out after the answer to this commit was lost, the later epoch may have taken over `write` as well.
    /// [`StoreError::Defect`] when the write violates a rule of [`Write`], or the store was not taken over.
    /// Otherwise nothing of `write` was kept, in these and all other cases; the same write can be retried, unless the
    /// error [is final](StoreError::is_final).
    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Reports from now on that a commit is [late](StoreError::Late), while it is awaited, and `None` once it no longer
    /// is. A report says nothing of the outcome of the commit. Of several reports that come before one is taken, the
    /// last one is given.
    fn trouble(&self) -> BoxStream<'static, Option<StoreError>>;

    /// From now on, reads of the history fail as [behind](StoreError::Behind) where it has no record with
    /// this revision yet, or was last written by an earlier term than `epoch`. That record is acknowledged, but of the
    /// servers of one database, one that answers can be the primary before the present one. A later call replaces this
    /// one, also if its record is an earlier one, and so does a take-over, with the newest record that was taken over.
    fn require(&self, _revision: Revision, _epoch: Epoch) {}

    /// The record of a cycle, if it exists.
    ///
    /// # Errors
    /// The store can't be read.
    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>>;

    /// The record with the highest revision of the cycles of this request.
    ///
    /// # Errors
    /// The store can't be read.
    fn cycle_of_request(&self, request: RequestKey) -> BoxFuture<'_, Result<Option<Found>, StoreError>>;

    /// Records below the revision `before`, highest revision first, that pass `filter`. Ends at the limits of `page`,
    /// or after [`SCAN_LIMIT`] examined records. An unreadable record passes if the fields of the filter can't be read.
    /// Records that are written between two pages are above both, so paging neither skips nor repeats a record.
    ///
    /// # Errors
    /// The store can't be read.
    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        page: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>>;

    /// Records after `revision`, oldest first, without a gap, up to the limits of `page`. A record that can't be read,
    /// or is missing without having been pruned, is represented by an error in its place.
    ///
    /// # Errors
    /// Some of them have been pruned, `revision` was never given, or the store can't be read.
    fn cycles_after(&self, revision: Revision, page: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>>;

    /// The former names of the stored subsystems that have some, for processes that follow. Only of a store that
    /// replicas share.
    ///
    /// # Errors
    /// The store can't be read.
    fn former_names(&self) -> BoxFuture<'_, Result<Vec<FormerNames>, StoreError>> {
        Box::pin(future::ready(Ok(Vec::new())))
    }

    /// Audit events below the leaf `before`, newest first, that pass `filter`: at most `limit`, and after
    /// [`SCAN_LIMIT`] examined ones no further. An unreadable event passes. Events that are written between two pages
    /// are above both.
    ///
    /// # Errors
    /// The store can't be read.
    fn events_before(
        &self,
        before: u64,
        filter: EventFilter,
        limit: usize,
    ) -> BoxFuture<'_, Result<EventPage, StoreError>>;

    /// The records and audit events that exceed `retention`: at most `limit` together, the oldest ones, never the
    /// newest record. [`Write::removal`] removes them.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when a later epoch has taken over, [`StoreError::Defect`] when the store was not taken
    /// over, or it can't be read.
    fn excess(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Excess, StoreError>>;

    /// The log as of the last durable commit. Empty until the store was taken over.
    fn log(&self) -> Log;

    /// The leaf of the record of a cycle; `None` if there is no such record, or it is older than the log.
    ///
    /// # Errors
    /// The store can't be read.
    fn leaf(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<u64>, StoreError>>;

    /// The hashes of complete nodes of the log, in this order; `None` if one is not retained.
    ///
    /// # Errors
    /// The store can't be read.
    fn nodes(&self, nodes: Vec<Node>) -> BoxFuture<'_, Result<Option<Vec<Hash>>, StoreError>>;

    /// The log from the first of these leaves on, in parts, up to the limits of `page` and at most to the last of them.
    /// In place of entries that retention has removed, or whose bytes were changed, it has the largest complete
    /// subtrees of these leaves. `None` if the hash of one is not retained: they begin or end among removed entries.
    ///
    /// # Errors
    /// The store can't be read.
    fn parts(&self, leaves: Range<u64>, page: PageLimits) -> BoxFuture<'_, Result<Option<Vec<Part>>, StoreError>>;

    /// Publishes the newest checkpoint of the log: once this has returned, it survives the loss of power, and replaces
    /// the earlier one.
    ///
    /// # Errors
    /// It can't be written; the earlier one stays.
    fn publish_checkpoint(&self, checkpoint: String) -> BoxFuture<'_, Result<(), StoreError>>;

    /// The size of the store. Cheap, however long the history is.
    ///
    /// # Errors
    /// The store can't be read.
    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>>;

    /// Figures of a store on a server; `None` for one of this machine. Cheap.
    fn server(&self) -> BoxFuture<'_, Option<ServerFigures>> {
        Box::pin(future::ready(None))
    }
}

/// How the seals in a store are judged when it is taken over.
#[derive(Clone, Debug)]
pub enum Seals {
    /// Each has to be by one of these keys.
    Checked(SealKeys),
    /// None is read: the store is taken as it is, and the next commit seals everything with the first of these keys.
    Renewed(SealKeys),
}

/// The log of a store, as far as it is needed to append to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// Its right edge.
    pub frontier: Frontier,
    /// All entries below this leaf are gone, and of the nodes of their leaves only those of its own frontier are left.
    pub first_kept: u64,
}

/// The contents of a store when it was taken over.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// The epoch that the first commit begins.
    pub epoch: Epoch,
    /// The highest cycle id ever noted.
    pub last_cycle_id: CycleId,
    /// The highest revision ever given.
    pub last_revision: Revision,
    /// The highest revision ever pruned: all revisions above it exist.
    pub pruned_to: Revision,
    /// The record with the highest revision, if any.
    pub last_record: Option<Found>,
    /// All cycles that were noted and never recorded, by id. If nothing more can be read of a cycle, it has
    /// [`Trigger::Unknown`] and [`Stage::Unknown`] or [`Stage::Unsealed`], and is in `unreadable` as well.
    pub open: Vec<OpenCycle>,
    /// True if the earlier process did not close the store and the machine has restarted since, so that buffered
    /// writes, and with them an entry of `open`, may be lost.
    pub may_lack_open: bool,
    /// Acknowledged commits that are missing.
    pub lost: Option<Lost>,
    /// The stored subsystems.
    pub subsystems: Vec<StoredSubsystem>,
    /// The stored loops.
    pub loops: Vec<StoredLoop>,
    /// The latest outputs.
    pub outputs: Vec<StoredOutput>,
    /// False if there is something in it whose seals were not checked: an earlier version wrote it, which did not seal,
    /// or they are [renewed](Seals::Renewed). Nothing shows whether other programs have changed it.
    pub is_sealed: bool,
    /// The newest checkpoint of its log that was published, if it has one.
    pub checkpoint: Option<String>,
    /// The leaves that are missing in a log whose seals are [renewed](Seals::Renewed), for the entry of the new log.
    pub missing: Vec<Range<u64>>,
    /// Unreadable entries. They stay in the store; an open cycle stays until it is recorded.
    pub unreadable: Vec<UnreadableRow>,
}

/// The name of a subsystem, and its former names, newest first.
pub type FormerNames = (Name, Vec<Name>);

/// A record, or the error if it can't be read.
pub type Found = Result<Record, Unreadable>;

/// An unreadable record in the history.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record of cycle {cycle_id}, revision {revision}, can't be read: {problem}")]
pub struct Unreadable {
    /// The cycle; 0 if that can't be read either.
    pub cycle_id: CycleId,
    /// The revision; 0 if that can't be read either.
    pub revision: Revision,
    /// The problem.
    pub problem: String,
}

/// Another unreadable entry of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadableRow {
    /// Its kind: an open cycle, a subsystem, a loop or an output.
    pub what: &'static str,
    /// Its name or number, as stored.
    pub key: String,
    /// The problem.
    pub problem: String,
    /// True if it has the seal of a process with the key: then this software wrote it as it is, such as another version
    /// of it. False if another program may have written it.
    pub is_sealed: bool,
}

/// Acknowledged commits that are no longer in the store: its end was damaged, or an older copy replaced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The highest cycle id that was noted.
    pub last_cycle_id: CycleId,
    /// The highest revision that was given.
    pub last_revision: Revision,
    /// Number of missing commits, including those of records.
    pub commits: u64,
}

/// One atomic change.
#[derive(Clone, Debug, Default)]
pub struct Write {
    /// The epoch of the writer. The write is valid only if it is the latest.
    pub epoch: Epoch,
    /// The failure that the write must survive.
    pub durability: Durability,
    /// The highest id that was given to a cycle so far: this write notes it, and no process gives it again. Never lower
    /// than that of the previous write. Each id above the previous one is in `open` or in `records`.
    pub last_cycle_id: CycleId,
    /// Cycles that are open from now on, or have another stage: each is noted with this write or already open, and has
    /// no record in it. A cycle is open until its record is written.
    pub open: Vec<OpenCycle>,
    /// Cycles that are recorded now, in any order of their ids, each as the next revision. Each is open in the store,
    /// or is noted with this write.
    pub records: Vec<Record>,
    /// The events of the changes in this write, which are kept with them or not at all.
    pub audit: Vec<AuditEntry>,
    /// An encoded `ControlEntry` that says that a new log began, for the first write of a process.
    pub began: Option<Bytes>,
    /// Records that are removed now.
    pub removal: Removal,
    /// Outputs that replace the latest one of their subsystem.
    pub outputs: Vec<(Name, Output)>,
    /// The new names of renamed subsystems, by their former ones: the stored output, with the one of this write, is
    /// moved to the new name, and nothing stays stored under the former one. The new state is in `subsystems`.
    pub renamed: BTreeMap<Name, Name>,
    /// The new state of these subsystems; `None` removes a subsystem and its output.
    pub subsystems: BTreeMap<Name, Option<Arc<StoredSubsystem>>>,
    /// The new state of these loops; `None` removes a loop.
    pub loops: BTreeMap<Name, Option<StoredLoop>>,
    /// True for the last write of this process: every begun cycle is recorded, and nothing is lost if the machine
    /// restarts.
    pub close: bool,
}

/// A record that retention removes, as it was when it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OldRecord {
    /// Its revision.
    pub revision: Revision,
    /// Its leaf in the log; `None` if it is older than the log.
    pub leaf: Option<u64>,
    /// Its state.
    pub state: CycleState,
}

/// An audit event that retention removes, as it was when it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OldEvent {
    /// Its leaf in the log.
    pub leaf: u64,
    /// What it is about.
    pub kind: EventKind,
}

/// Records and audit events that a write removes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// The records, in the order of their revisions. None of them is the newest one. If another program has changed
    /// one since it was found, the write fails.
    pub records: Vec<OldRecord>,
    /// The events, in the order of their leaves, likewise.
    pub events: Vec<OldEvent>,
    /// All entries of the log below this leaf are gone then. Never lower than that of an earlier removal.
    pub first_kept: u64,
    /// An encoded `ControlEntry` that says so, if one of these has a leaf.
    pub entry: Option<Bytes>,
}

impl Removal {
    /// True if it removes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.events.is_empty()
    }
}

/// The failure that a write must survive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// The loss of power.
    #[default]
    Durable,
    /// The death of this process.
    Buffered,
}

/// A stored record of a cycle: the exact bytes that were first written, and their keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its id.
    pub cycle_id: CycleId,
    /// Its position in the history.
    pub revision: Revision,
    /// The epoch that wrote it.
    pub epoch: Epoch,
    /// How it ended.
    pub state: CycleState,
    /// What started it.
    pub trigger: Trigger,
    /// The id of the request.
    pub request_id: Option<String>,
    /// The caller that started it.
    pub triggered_by: Option<Identity>,
    /// When it ended.
    pub finished_at: Timestamp,
    /// The encoded telemetry.
    pub bytes: Bytes,
}

impl Record {
    /// True if this request started its cycle.
    #[must_use]
    pub fn is_of(&self, request: &RequestKey) -> bool {
        self.request_id.as_ref() == Some(&request.request_id) && self.triggered_by == request.triggered_by
    }
}

/// A stored audit event: its exact bytes, and the keys that find it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// What it is about.
    pub kind: EventKind,
    /// When it happened.
    pub time: Timestamp,
    /// The identity of the caller; empty for the service itself.
    pub caller: String,
    /// The RPC, or the action of the service.
    pub rpc: String,
    /// True if the call was denied, or would be if the policy was enforced.
    pub denied: bool,
    /// The encoded event.
    pub bytes: Bytes,
}

/// A cycle that was admitted and is not recorded yet. A further write of it replaces the earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenCycle {
    /// Its id.
    pub cycle_id: CycleId,
    /// What started it.
    pub trigger: Trigger,
    /// When it was due.
    pub scheduled_at: Timestamp,
    /// The id of the request.
    pub request_id: Option<String>,
    /// The caller that started it.
    pub triggered_by: Option<Identity>,
    /// Its trace.
    pub trace_id: Option<TraceId>,
    /// The cause of the audit event that is to be written with its record, encoded and opaque to the store.
    pub audit: Option<Bytes>,
    /// Its stage.
    pub stage: Stage,
}

/// The stage of an open cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits. Contains the request to run it after a restart, opaque to the store; `None` if it is not to be run
    /// then.
    Waiting(Option<Bytes>),
    /// It has begun, at this time.
    Begun(Timestamp),
    /// Its entry can't be read. Its other fields have no meaning.
    Unknown,
    /// The same, and the entry doesn't have the seal that belongs to it: another program may have written it. No record
    /// may be made of it.
    Unsealed,
}

/// The durable state of a subsystem.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredSubsystem {
    /// Its registration; `None` if the configuration file declares it.
    pub spec: Option<SubsystemSpec>,
    /// The length of its lease.
    pub lease: Option<Duration>,
    /// True while it is suspended.
    pub suspended: bool,
    /// Its owner.
    pub owner: Option<Identity>,
    /// Its former names, newest first. None if the configuration file declares it, which has them.
    pub former_names: Vec<Name>,
    /// Its name, the same as in `spec`.
    pub name: Name,
}

/// The durable state of a loop.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredLoop {
    /// Its settings; `None` if the configuration file declares it.
    pub spec: Option<LoopSpec>,
    /// Its state.
    pub state: LoopState,
    /// Its name, the same as in `spec`.
    pub name: Name,
}

/// The stored latest output of a subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredOutput {
    /// The subsystem.
    pub name: Name,
    /// The output.
    pub output: Output,
    /// When the cycle that made it ended; `None` if its record is not retained.
    pub finished_at: Option<Timestamp>,
}

/// Checks the bytes of a record: all clients can decode those that pass, and its other fields are those in its bytes.
pub type Check = fn(&Record) -> Result<(), String>;

/// Checks the bytes of an audit event in the same way.
pub type EventCheck = fn(&AuditEntry) -> Result<(), String>;

/// Decodes a `ControlEntry`, or returns the problem.
pub type ControlDecoder = fn(&[u8]) -> Result<Control, String>;

/// What records and audit events have to pass when they are read, and before retention removes them.
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    /// The check of records.
    pub record: Check,
    /// The check of audit events.
    pub event: EventCheck,
    /// The decoder of control entries.
    pub control: ControlDecoder,
}

/// A filter of records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only these states; empty means any.
    pub states: Vec<CycleState>,
    /// Only this kind of trigger.
    pub trigger: Option<TriggerKind>,
    /// Only cycles of this loop.
    pub loop_name: Option<Name>,
    /// Only cycles that were requested with this id, by any caller.
    pub request_id: Option<String>,
    /// Only cycles that finished at or after this time.
    pub finished_from: Option<Timestamp>,
    /// Only cycles that finished before this time.
    pub finished_before: Option<Timestamp>,
}

impl Filter {
    /// True if this record passes.
    #[must_use]
    pub fn wants(&self, record: &Record) -> bool {
        (self.states.is_empty() || self.states.contains(&record.state))
            && self.trigger.is_none_or(|kind| kind == TriggerKind::of(&record.trigger))
            && self.loop_name.as_ref().is_none_or(|name| Some(name) == record.trigger.loop_name())
            && self.request_id.as_ref().is_none_or(|id| Some(id) == record.request_id.as_ref())
            && self.finished_from.is_none_or(|from| record.finished_at >= from)
            && self.finished_before.is_none_or(|before| record.finished_at < before)
    }
}

/// A [`Trigger`] without its loop or its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the variants are those of `Trigger`")]
pub enum TriggerKind {
    Unknown,
    Manual,
    Loop,
    Parent,
}

impl TriggerKind {
    /// The kind of a trigger.
    #[must_use]
    pub fn of(trigger: &Trigger) -> Self {
        match trigger {
            Trigger::Unknown => Self::Unknown,
            Trigger::Manual => Self::Manual,
            Trigger::Loop(_) => Self::Loop,
            Trigger::Parent(_) => Self::Parent,
        }
    }
}

/// A filter of audit events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only events at or after this time.
    pub since: Option<Timestamp>,
    /// Only events of this caller.
    pub caller: Option<String>,
    /// Only events of this RPC, or of this action of the service.
    pub rpc: Option<String>,
    /// Only calls that were denied, or would be if the policy was enforced.
    pub denied: bool,
    /// Only events of this kind.
    pub kind: Option<EventKind>,
}

impl EventFilter {
    /// True if this event passes.
    #[must_use]
    pub fn wants(&self, event: &AuditEntry) -> bool {
        self.since.is_none_or(|since| event.time >= since)
            && self.caller.as_ref().is_none_or(|caller| event.caller == *caller)
            && self.rpc.as_ref().is_none_or(|rpc| event.rpc == *rpc)
            && (event.denied || !self.denied)
            && self.kind.is_none_or(|kind| event.kind == kind)
    }
}

/// An audit event and its leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedEvent {
    /// The leaf.
    pub leaf: u64,
    /// The event.
    pub entry: AuditEntry,
}

/// An audit event that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the audit event of leaf {leaf} can't be read: {problem}")]
pub struct UnreadableEvent {
    /// Its leaf.
    pub leaf: u64,
    /// The problem.
    pub problem: String,
}

/// An audit event, or the error if it can't be read.
pub type FoundEvent = Result<LoggedEvent, UnreadableEvent>;

/// Some audit events, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventPage {
    /// The events.
    pub events: Vec<FoundEvent>,
    /// The leaf below which the next page starts; `None` at the end.
    pub next: Option<u64>,
}

/// Limits of one read, which returns at least one record whatever its size, if there is any.
#[derive(Clone, Copy, Debug)]
pub struct PageLimits {
    /// Most records, or parts of the log. At least 1.
    pub records: usize,
    /// Most bytes of them, encoded.
    pub bytes: usize,
}

/// Most records that one page examines: a selective filter must not read the whole history at once.
pub const SCAN_LIMIT: usize = 10_000;

/// A part of the history, highest revision first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The records.
    pub records: Vec<Found>,
    /// The revision below which the next page starts; `None` at the end.
    pub next: Option<Revision>,
    /// Number of examined records.
    pub scanned: usize,
}

/// Limits of the history: a record is removed when it exceeds either limit of its rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The rule for states without their own rule.
    pub default: RetentionRule,
    /// Rules for single states.
    pub by_state: BTreeMap<CycleState, RetentionRule>,
    /// The rule for audit events.
    pub events: EventRule,
}

/// Limits of the audit: an event is removed when it exceeds either one. If both are `None`, all are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventRule {
    /// Most events of each kind; the newest ones are kept.
    pub max_events: Option<u64>,
    /// Largest age of events.
    pub max_age: Option<Duration>,
}

/// Limits of one rule. If both are `None`, everything is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionRule {
    /// Most records of this rule; those with the highest revisions are kept.
    pub max_cycles: Option<u64>,
    /// Largest age of records.
    pub max_age: Option<Duration>,
}

/// The records and audit events that exceed the limits of the history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excess {
    /// The records, in the order of their revisions.
    pub records: Vec<OldRecord>,
    /// The events, in the order of their leaves.
    pub events: Vec<OldEvent>,
    /// All entries of the log below this leaf are gone without these: retention has removed each of them.
    pub first_kept: u64,
    /// True if the search ended at its limit, before all of them were found. A further search goes on from there.
    pub is_partial: bool,
    /// The first entry among the oldest ones that is missing or not what was written. Such ones are in no list, and
    /// count as kept by every rule, since they may be its.
    pub damaged: Option<StoreError>,
}

impl Excess {
    /// The leaves of all of them, in no order.
    pub fn leaves(&self) -> impl Iterator<Item = u64> {
        self.records.iter().filter_map(|record| record.leaf).chain(self.events.iter().map(|event| event.leaf))
    }

    /// The leaf after the last one of them; 0 if none has a leaf.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.leaves().max().map_or(0, |last| last + 1)
    }

    /// Those of them that have no leaf, or one below this one.
    #[must_use]
    pub fn before(mut self, end: u64) -> Self {
        self.records.retain(|record| record.leaf.is_none_or(|leaf| leaf < end));
        self.events.retain(|event| event.leaf < end);
        Self { first_kept: self.first_kept.min(end), ..self }
    }
}

/// The size of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreSize {
    /// Number of retained records.
    pub records: u64,
    /// Size in bytes.
    pub bytes: u64,
}

/// Figures of a store on a server, since this process has opened it.
#[derive(Clone, Debug, Default)]
pub struct ServerFigures {
    /// Number of commits whose answer was lost, and which turned out to be kept.
    pub lost_and_kept: u64,
    /// Number of commits whose answer was lost, and which turned out not to be kept.
    pub lost_and_not_kept: u64,
    /// Times of statements that only begin a read: the way to the server and back.
    pub round_trips: Histogram,
    /// How the server is set up; `None` if it does not answer.
    pub state: Option<ServerState>,
}

/// How the server of a store is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerState {
    /// True if commits wait for standbys.
    pub is_synchronous: bool,
    /// Number of transactions since the oldest one whose view of the tables is still needed: the server keeps all rows
    /// that were removed or replaced since.
    pub oldest_xmin_age: u64,
}

/// Why a store did not write or read. Each message contains the remedy. `store` is its location, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A later epoch writes to this store.
    #[error("epoch {by} has taken over this store, so this process writes nothing more")]
    Fenced {
        /// The later epoch.
        by: Epoch,
    },
    /// Its contents are invalid.
    #[error("{store} is damaged: {problem}; restore it from a backup")]
    Corrupt {
        /// Which store.
        store: String,
        /// The invalid contents.
        problem: String,
    },
    /// A program without the key of its log has changed it, or the key is another one.
    #[error(
        "{store} was changed by another program, or was sealed with another key or ledger.origin: {problem}; put its \
         key back, restore it from a backup, or have it go on as it is by `orchestrator store accept {url}` (with \
         --key-file for each of ledger.key_files)"
    )]
    Tampered {
        /// Which store.
        store: String,
        /// Its URL.
        url: String,
        /// What was changed.
        problem: String,
    },
    /// It may not be served: it is a part of a copy, or was copied to another place.
    #[error("{store} can't be served: {problem}")]
    NotServed {
        /// Which store.
        store: String,
        /// The problem and its remedy.
        problem: String,
    },
    /// It refuses writes, although it is not damaged.
    #[error(
        "{store} refuses a required write: {problem}; restore it from a backup if another program has changed \
         it, or else report the defect"
    )]
    Unusable {
        /// Which store.
        store: String,
        /// The problem.
        problem: String,
    },
    /// A later version of this software has migrated it since this process opened it, and earlier ones can't use it any
    /// more.
    #[error(
        "{store} has schema version {found} now, but this version of the software supports up to {known}; use a newer \
         version"
    )]
    TooNew {
        /// Which store.
        store: String,
        /// Its version.
        found: i64,
        /// The latest supported version.
        known: i64,
    },
    /// There is no space left.
    #[error("no space left to write {store}: {problem}; free some space, and writing resumes by itself")]
    Full {
        /// Which store, or which of its files.
        store: String,
        /// The error of the system.
        problem: String,
    },
    /// This process is not allowed to write it.
    #[error("{store} can't be written: {problem}")]
    ReadOnly {
        /// Which store, or which of its files.
        store: String,
        /// The error of the system or of the server, and the remedy.
        problem: String,
    },
    /// It is temporarily unavailable.
    #[error("{store}: {problem}")]
    Unavailable {
        /// Which store.
        store: String,
        /// The problem and its remedy.
        problem: String,
    },
    /// A server of it lacks records that are known to be acknowledged: see [`Store::require`].
    #[error(
        "{store}: {server} lacks records that were acknowledged to this process: revision {known} is not there, or is \
         another one, and the newest is {newest}. It is an earlier primary, or an older copy has replaced the \
         database. Rebuild an earlier primary as a standby; if no other server has them, stop all replicas, run \
         `orchestrator store accept`, and start them"
    )]
    Behind {
        /// Which store.
        store: String,
        /// Which server of it.
        server: String,
        /// The revision of the record.
        known: Revision,
        /// The newest revision of the server.
        newest: Revision,
    },
    /// It shows an earlier term than one that was seen before.
    #[error(
        "the database has the leader of epoch {found}, and one of epoch {known} was seen: an earlier primary answers, \
         or an older copy has replaced the database. Rebuild an earlier primary as a standby; after the restore of an \
         older backup, stop all replicas, run `orchestrator store accept`, and start them"
    )]
    Outdated {
        /// The epoch of its last term.
        found: Epoch,
        /// The one that was seen.
        known: Epoch,
    },
    /// A commit has not returned yet, and is awaited. Reported only by [`Store::trouble`].
    #[error("a commit to {store} has not returned within {waited:?}, and is still awaited: {problem}")]
    Late {
        /// Which store.
        store: String,
        /// The time for which it was waited.
        waited: Duration,
        /// The probable cause, and what to do about it.
        problem: String,
    },
    /// This process, or the store itself, has violated a rule. It accepts no further writes.
    #[error("the store has failed because of a defect: {problem}; restart this process, and report the defect")]
    Defect {
        /// The violation.
        problem: String,
    },
}

impl StoreError {
    /// True if a retry is useless: this process can't write any more. A full disk, missing permissions, a lock, a
    /// hardware failure and moved files may be temporary.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Fenced { .. }
            | Self::Corrupt { .. }
            | Self::Tampered { .. }
            | Self::NotServed { .. }
            | Self::Unusable { .. }
            | Self::TooNew { .. }
            | Self::Defect { .. } => true,
            Self::Full { .. }
            | Self::ReadOnly { .. }
            | Self::Unavailable { .. }
            | Self::Behind { .. }
            | Self::Outdated { .. }
            | Self::Late { .. } => false,
        }
    }

    /// True if a commit is still awaited.
    #[must_use]
    pub fn is_late(&self) -> bool {
        matches!(self, Self::Late { .. })
    }
}

/// Why the records after a revision were not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// They are no longer retained, or do not exist yet.
    #[error("only revisions {oldest} to {newest} are retained")]
    NotRetained {
        /// The oldest revision above which none is missing.
        oldest: Revision,
        /// The newest revision.
        newest: Revision,
    },
    /// The store can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}
