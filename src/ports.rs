//! What the inside needs of the outside: a [`Store`] that keeps the record, [`Subsystems`] that can be called, and
//! [`Spans`] that takes what is traced.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;

use crate::{
    memory::Held,
    model::{
        Answer, Code, CycleId, CycleState, Endpoint, Epoch, Input, LoopSpec, LoopState, Name, Output, Payload,
        Revision, Span, SpanContext, Subsystem, SubsystemSpec, TraceId, Trigger,
    },
};

// ---------------------------------------------------------------------------------------------------------------
// Subsystems

/// The fleet, as far as it can be called. Hides how calls travel.
///
/// A call tells the subsystem its `timeout`. Who awaits the call enforces it, by dropping the future, which cancels the
/// call.
pub trait Subsystems: Send + Sync + 'static {
    /// Makes a subsystem ready. One that needs no initialization answers UNIMPLEMENTED.
    fn initialize<'a>(&'a self, to: &'a Subsystem, call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>>;

    /// Runs a subsystem's part in a cycle.
    fn run_cycle<'a>(&'a self, to: &'a Subsystem, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>>;

    /// Asks for a snapshot of a subsystem's state.
    fn get_status<'a>(&'a self, of: &'a Subsystem, timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>>;

    /// These have left: whatever is kept for them can go.
    fn forget(&self, left: &[Left]);
}

/// A subsystem that is no longer at an endpoint: it was unregistered, or is elsewhere now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Where it was.
    pub endpoint: Endpoint,
    /// Its name.
    pub name: Name,
    /// No other subsystem is there.
    pub was_last: bool,
}

/// What `Initialize` carries.
#[derive(Clone, Debug)]
pub struct InitializeCall {
    /// The configured id of this orchestrator.
    pub orchestrator_id: Arc<str>,
    /// The term of this process.
    pub epoch: Epoch,
    /// How long the subsystem has, from now.
    pub timeout: Duration,
    /// What its spans join.
    pub trace: Option<SpanContext>,
}

/// What `RunCycle` carries.
#[derive(Clone, Debug)]
pub struct RunCall {
    /// The cycle.
    pub cycle_id: CycleId,
    /// The term of this process.
    pub epoch: Epoch,
    /// 1 for the first call in this cycle.
    pub attempt: u32,
    /// When the cycle was due.
    pub scheduled_at: Timestamp,
    /// The registration's, overlaid by the cycle's.
    pub parameters: Payload,
    /// One per name in `requires`, `after` and `reads`.
    pub inputs: Vec<Input>,
    /// How long the subsystem has, from now.
    pub timeout: Duration,
    /// What its spans join.
    pub trace: Option<SpanContext>,
}

/// What a subsystem answered, and the memory that it takes.
#[derive(Debug)]
pub struct Reply {
    /// The answer.
    pub answer: Answer,
    /// Kept as long as the answer is.
    pub held: Held,
}

/// A snapshot of a subsystem's state, and the memory that it takes.
#[derive(Debug)]
pub struct Snapshot {
    /// What it shows.
    pub status: Payload,
    /// Kept as long as the status is.
    pub held: Held,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct CallError {
    /// The gRPC status code; DEADLINE_EXCEEDED for every call that was late, whoever noticed.
    pub code: Code,
    /// What went wrong.
    pub message: String,
}

// ---------------------------------------------------------------------------------------------------------------
// Spans

/// Takes the spans of cycles.
pub trait Spans: Send + Sync + 'static {
    /// Whether the spans of a cycle whose caller has no say in it are to be collected. `None`: of no cycle at all.
    fn samples(&self) -> Option<bool>;

    /// Takes those of one cycle. Called from inside the line of cycles, so it must not wait.
    fn ended(&self, spans: Vec<Span>);
}

/// Nobody traces.
#[derive(Clone, Copy, Debug)]
pub struct Untraced;

impl Spans for Untraced {
    fn samples(&self) -> Option<bool> {
        None
    }

    fn ended(&self, _: Vec<Span>) {}
}

// ---------------------------------------------------------------------------------------------------------------
// Store

/// The durable record. One process writes to it; everything that it is told in one [`Write`] holds or fails as a
/// whole. A store that is open can be read. It takes writes once [`Store::take_over`] has returned.
///
/// Each cycle id from 1 to the highest one that was ever noted ([`Write::last_cycle_id`]) is exactly one of open,
/// recorded and pruned. Records have dense revisions in the order of their commits, and come in any order of their ids.
pub trait Store: Send + Sync + 'static {
    /// Reads what an earlier process left, and fixes the epoch that the first commit from now on begins. Nothing is taken
    /// over before that commit, so a process that gives up in between has changed nothing. Called again, it reads anew, and
    /// fixes a later epoch: writes of the one before are then refused.
    ///
    /// # Errors
    /// What was left can't be read as a whole, or no process could go on from it.
    fn take_over(&self) -> BoxFuture<'_, Result<Contents, StoreError>>;

    /// Writes atomically, and returns once it is known what has become of the write, however long that takes. With
    /// [`Durability::Durable`] it then survives the loss of power, with [`Durability::Buffered`] the death of this process. A
    /// caller that does not wait for the end does not learn whether the write was kept.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when a later epoch has taken over: nothing of this one will be written any more.
    /// [`StoreError::Defect`] when the write breaks a rule that [`Write`] states, or nothing was taken over.
    /// In these and all other cases nothing of `write` was kept; the same write may be tried again, unless the error
    /// [is final](StoreError::is_final).
    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Reports from now on that a commit is [late](StoreError::Late), while it is awaited, and `None` once it no longer is.
    /// A report says nothing of the outcome of the commit. Of several reports that come before one is taken, the last one is
    /// given.
    fn trouble(&self) -> BoxStream<'static, Option<StoreError>>;

    /// The record of a cycle, if there is one.
    ///
    /// # Errors
    /// The store can't be read.
    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>>;

    /// The record of a cycle that this request started: of the one with the highest revision.
    ///
    /// # Errors
    /// The store can't be read.
    fn cycle_of_request(&self, request_id: String) -> BoxFuture<'_, Result<Option<Found>, StoreError>>;

    /// Records below the revision `before`, highest revision first, that pass `filter`. Ends at the limits of `page`, or
    /// when it has looked at [`SCAN_LIMIT`] records. One that can't be read passes where what the filter looks at can't be
    /// read. Records that are written between two pages are above both: a walk neither skips nor repeats one.
    ///
    /// # Errors
    /// The store can't be read.
    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        page: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>>;

    /// Records after `revision`, oldest first, without a gap, up to the limits of `page`. One that can't be read, or is
    /// not there though nobody has pruned it, stands in its place as such.
    ///
    /// # Errors
    /// Some of them have been pruned, `revision` was never given, or the store can't be read.
    fn cycles_after(&self, revision: Revision, page: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>>;

    /// Removes at most `limit` records that `retention` no longer wants, lowest revision first, never the one with the
    /// highest revision. Returns how many it removed, and the highest revision that was ever removed.
    ///
    /// # Errors
    /// As [`Store::commit`].
    fn prune(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Pruned, StoreError>>;

    /// How much there is now. Cheap, however long the history is.
    ///
    /// # Errors
    /// The store can't be read.
    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>>;
}

/// What a store held when it was taken over.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// The epoch that the first commit begins.
    pub epoch: Epoch,
    /// The highest cycle id ever noted.
    pub last_cycle_id: CycleId,
    /// The highest revision ever given.
    pub last_revision: Revision,
    /// The highest revision ever pruned: those above are all there.
    pub pruned_to: Revision,
    /// The record with the highest revision, if there is one.
    pub last_record: Option<Found>,
    /// All cycles that were noted and never recorded, by id. One of which nothing more can be read has
    /// [`Trigger::Unknown`] and [`Stage::Unknown`], and stands in `unreadable` as well.
    pub open: Vec<OpenCycle>,
    /// The process before this one did not close the store, and the machine has restarted since, so that buffered
    /// writes, and with them an entry of `open`, may be lost.
    pub may_lack_open: bool,
    /// What was acknowledged, and is missing.
    pub lost: Option<Lost>,
    /// What is known of subsystems.
    pub subsystems: Vec<StoredSubsystem>,
    /// What is known of loops.
    pub loops: Vec<StoredLoop>,
    /// The latest outputs.
    pub outputs: Vec<StoredOutput>,
    /// What can't be read of all that. It stays in the store; an open cycle until it is recorded.
    pub unreadable: Vec<UnreadableRow>,
}

/// A record as it was found.
pub type Found = Result<Record, Unreadable>;

/// A record that is in the history and can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the record of cycle {cycle_id}, revision {revision}, can't be read: {problem}")]
pub struct Unreadable {
    /// The cycle; 0 where that can't be read either.
    pub cycle_id: CycleId,
    /// The revision; 0 where that can't be read either.
    pub revision: Revision,
    /// What is wrong with it.
    pub problem: String,
}

/// Something else that is in the store and can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadableRow {
    /// What it is: an open cycle, a subsystem, a loop or an output.
    pub what: &'static str,
    /// Its name or its number, as it is there.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
}

/// What was acknowledged and is not in the store any more: its end was damaged, or an older copy was put in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The highest cycle id that was noted.
    pub last_cycle_id: CycleId,
    /// The highest revision that was given.
    pub last_revision: Revision,
    /// Commits that are missing, those of records among them.
    pub commits: u64,
}

/// One atomic change.
#[derive(Clone, Debug, Default)]
pub struct Write {
    /// The epoch of the writer. The write holds only if it is the latest.
    pub epoch: Epoch,
    /// What the write must survive.
    pub durability: Durability,
    /// The highest id that was given to any cycle by now: with this write it is noted, and no process gives it again.
    /// Never lower than that of the write before. Each id above that one is in `open` or in `records`.
    pub last_cycle_id: CycleId,
    /// Cycles that are open from now on, or stand differently from now on: each is noted with this write or open
    /// already, and has no record in it. A cycle is open until its record is written.
    pub open: Vec<OpenCycle>,
    /// Cycles that are recorded now, in any order of their ids, each as the next revision. Each is open in the store,
    /// or is noted with this write.
    pub records: Vec<Record>,
    /// Outputs that replace the latest one of their subsystem.
    pub outputs: Vec<(Name, Output)>,
    /// What is now known of these subsystems; `None` means nothing any more, which also removes the output.
    pub subsystems: BTreeMap<Name, Option<Arc<StoredSubsystem>>>,
    /// What is now known of these loops; `None` means nothing any more.
    pub loops: BTreeMap<Name, Option<StoredLoop>>,
    /// This is the last write of this process: nothing has begun that is not recorded, and nothing is lost if the machine restarts.
    pub close: bool,
}

/// What a write must survive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// The loss of power.
    #[default]
    Durable,
    /// The death of this process.
    Buffered,
}

/// A cycle's record as it is kept: the exact bytes that were first written, and what finds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number.
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
    /// When it ended.
    pub finished_at: Timestamp,
    /// The encoded telemetry.
    pub bytes: Bytes,
}

/// A cycle that was admitted and is not recorded yet. Written again, it replaces what was written of it before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenCycle {
    /// Its number.
    pub cycle_id: CycleId,
    /// What started it.
    pub trigger: Trigger,
    /// When it was due.
    pub scheduled_at: Timestamp,
    /// The id of the request.
    pub request_id: Option<String>,
    /// The trace that it belongs to.
    pub trace_id: Option<TraceId>,
    /// How far it has come.
    pub stage: Stage,
}

/// How far an open cycle has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits. What is needed to run it after a restart, which the store does not look into; `None` where it is not to
    /// be run then.
    Waiting(Option<Bytes>),
    /// It has begun, at this time.
    Begun(Timestamp),
    /// Nothing is stored of it that can be read. Its other fields say nothing.
    Unknown,
}

/// What is durably known of a subsystem.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredSubsystem {
    /// Its registration; `None` when the configuration file has that.
    pub spec: Option<SubsystemSpec>,
    /// The length of its lease.
    pub lease: Option<Duration>,
    /// It is taken out of cycles.
    pub suspended: bool,
    /// Its name, which is also that in `spec`.
    pub name: Name,
}

/// What is durably known of a loop.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredLoop {
    /// Its settings; `None` when the configuration file has them.
    pub spec: Option<LoopSpec>,
    /// Where it stands.
    pub state: LoopState,
    /// Its name, which is also that in `spec`.
    pub name: Name,
}

/// The latest output of a subsystem, as it was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredOutput {
    /// The subsystem.
    pub name: Name,
    /// The output.
    pub output: Output,
    /// When the cycle that made it ended; `None` when its record is not retained.
    pub finished_at: Option<Timestamp>,
}

/// Which records are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// That ended so; empty means any.
    pub states: Vec<CycleState>,
    /// That this kind of trigger started.
    pub trigger: Option<TriggerKind>,
    /// That this loop started.
    pub loop_name: Option<Name>,
    /// That finished at or after this.
    pub finished_from: Option<Timestamp>,
    /// That finished before this.
    pub finished_before: Option<Timestamp>,
}

impl Filter {
    /// Whether it wants this record.
    #[must_use]
    pub fn wants(&self, record: &Record) -> bool {
        (self.states.is_empty() || self.states.contains(&record.state))
            && self.trigger.is_none_or(|kind| kind == TriggerKind::of(&record.trigger))
            && self.loop_name.as_ref().is_none_or(|name| Some(name) == record.trigger.loop_name())
            && self.finished_from.is_none_or(|from| record.finished_at >= from)
            && self.finished_before.is_none_or(|before| record.finished_at < before)
    }
}

/// A [`Trigger`] without its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the variants are those of `Trigger`")]
pub enum TriggerKind {
    Unknown,
    Manual,
    Loop,
}

impl TriggerKind {
    /// The kind of a trigger.
    #[must_use]
    pub fn of(trigger: &Trigger) -> Self {
        match trigger {
            Trigger::Unknown => Self::Unknown,
            Trigger::Manual => Self::Manual,
            Trigger::Loop(_) => Self::Loop,
        }
    }
}

/// How much one read returns at most; but one record whatever its size, if there is any.
#[derive(Clone, Copy, Debug)]
pub struct PageLimits {
    /// Records. At least 1.
    pub records: usize,
    /// Bytes of encoded telemetry.
    pub bytes: usize,
}

/// So many records one page looks at: a filter that hardly any record passes must not read the whole history at once.
pub const SCAN_LIMIT: usize = 10_000;

/// A part of the history, highest revision first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The records.
    pub records: Vec<Found>,
    /// Go on below this revision; `None` when there is nothing more.
    pub next: Option<Revision>,
    /// How many records were looked at for it.
    pub scanned: usize,
}

/// What is kept: a record goes when either bound of its rule has passed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// For states that have no rule of their own.
    pub default: RetentionRule,
    /// Rules for single states.
    pub by_state: BTreeMap<CycleState, RetentionRule>,
}

/// How much is kept. Both `None`: everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionRule {
    /// So many of the records to which this rule applies: those with the highest revisions.
    pub max_cycles: Option<u64>,
    /// Records that finished less than this ago.
    pub max_age: Option<Duration>,
}

/// What pruning did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pruned {
    /// Records removed now. Fewer than asked for means that there are no more to remove.
    pub removed: usize,
    /// The highest revision ever removed.
    pub pruned_to: Revision,
}

/// How much a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreSize {
    /// Records that are retained.
    pub records: u64,
    /// Bytes that everything takes where it is kept.
    pub bytes: u64,
}

/// Why a store did not write or read. Each says what to do about it. `store` is where the store is, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A later epoch writes to this store.
    #[error("epoch {by} has taken over this store; this process can no longer write and must stop")]
    Fenced {
        /// The later epoch.
        by: Epoch,
    },
    /// What it holds makes no sense.
    #[error("{store} is damaged: {problem}; restore it from a backup")]
    Corrupt {
        /// Which store.
        store: String,
        /// What makes no sense.
        problem: String,
    },
    /// It takes nothing, though it is sound.
    #[error(
        "{store} does not take what has to be written: {problem}; restore it from a backup if another program has changed \
         it, or else report the defect"
    )]
    Unusable {
        /// Which store.
        store: String,
        /// Why it does not take it.
        problem: String,
    },
    /// There is no room.
    #[error("no room left to write {store}: {problem}; free some, and writing goes on by itself")]
    Full {
        /// Which store, or which of its files.
        store: String,
        /// What the system says.
        problem: String,
    },
    /// This process is not allowed to write it.
    #[error("{store} can't be written: {problem}; make it writable for this process")]
    ReadOnly {
        /// Which store, or which of its files.
        store: String,
        /// What the system says.
        problem: String,
    },
    /// It can't be reached or used now, which may pass.
    #[error("{store}: {problem}")]
    Unavailable {
        /// Which store.
        store: String,
        /// What is the matter, and what to do about it.
        problem: String,
    },
    /// A commit has not returned yet, and is waited for. Only [`Store::trouble`] says so.
    #[error("a commit to {store} has not returned within {waited:?}, and is waited for: {problem}")]
    Late {
        /// Which store.
        store: String,
        /// The time for which it was waited.
        waited: Duration,
        /// The probable cause, and what to do about it.
        problem: String,
    },
    /// This process, or the store itself, breaks a rule. Nothing will be written any more.
    #[error("the store has failed by a defect: {problem}; restart this process, and report the defect")]
    Defect {
        /// Which rule.
        problem: String,
    },
}

impl StoreError {
    /// Whether trying again is of no use to whoever could not commit for this: this process will write nothing any more.
    /// A full disk, missing permissions, a lock, a failure of the hardware and files that are not in their places may pass.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Fenced { .. } | Self::Corrupt { .. } | Self::Unusable { .. } | Self::Defect { .. } => true,
            Self::Full { .. } | Self::ReadOnly { .. } | Self::Unavailable { .. } | Self::Late { .. } => false,
        }
    }

    /// Whether a commit is still awaited.
    #[must_use]
    pub fn is_late(&self) -> bool {
        matches!(self, Self::Late { .. })
    }
}

/// Why the records after a revision were not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// They are gone, or not there yet.
    #[error("revisions {oldest} to {newest} are what there is")]
    NotRetained {
        /// The oldest revision from which on none is missing.
        oldest: Revision,
        /// The newest revision.
        newest: Revision,
    },
    /// The store can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}
