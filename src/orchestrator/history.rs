//! The history as this process shows it: up to the newest record whose commit is acknowledged, with limits on memory,
//! and with filters on decoded records.
//!
//! A record from the store is counted until the last reference to its bytes is dropped (`Held::around`), so that unread
//! responses are limited, wherever they wait.

use std::{
    borrow::Cow,
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, VecDeque},
    iter, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{self, AtomicUsize},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{OnceCell, watch as latest},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Declared, LiveCycle, Orchestrator, Position, Published, RecordHasNoRoom, Refusal, Settings, State, Update,
    WatchFilter, Watched, figures::Watchers, live::Live, offload::offload, registry::FormerNames,
};
#[cfg(feature = "simulation")]
use crate::fault::Fault;
use crate::{
    memory::{Full, Held, Memory},
    model::{AuditEvent, CycleId, Epoch, Name, RequestKey, Revision},
    ports::{
        EventFilter, EventPage, Filter, Found, LoggedEvent, Page, PageLimits, Record, ResumeError, SCAN_LIMIT, Store,
        StoreError, Unreadable,
    },
    record::{BriefParts, PartFilter},
};

/// Longest wait of a caller for memory: other reads end in milliseconds, unless their clients don't read.
const PATIENCE: Duration = Duration::from_secs(10);

/// The history as this process shows it to readers and watchers: the records up to the newest one whose commit is
/// acknowledged. A replica has one for all its terms, so watchers stay when replicas take over from each other: its own
/// writer adds the records while it leads, and the stream of the leader does while it follows. All clones are the same.
#[derive(Clone)]
pub struct History(Arc<Inner>);

struct Inner {
    store: Arc<dyn Store>,
    /// Memory for records that are read, or are in unread responses.
    memory: Memory,
    /// The part of it for filters of watchers, and records that they have read ahead.
    watching: Memory,
    /// The part of it for `Extent::recent`.
    _recent: Option<Held>,
    limits: Mutex<Limits>,
    /// The names of the subsystems in the configuration file, with their former names.
    declared: Mutex<Arc<BTreeMap<Name, Arc<[Name]>>>>,
    extent: Mutex<Extent>,
    /// The newest revision, for watchers.
    shown: latest::Sender<Revision>,
    /// The newest published checkpoint of the log.
    checkpoint: latest::Sender<Published>,
    live: Live,
    watchers: Watchers,
    /// Number of these with a filter by subsystem.
    by_subsystem: AtomicUsize,
    /// True while another replica may lead, and have added further records.
    unconfirmed: latest::Sender<bool>,
    /// False once this replica has not followed a leader for some time.
    fed: latest::Sender<bool>,
    /// Cancelled once the last record of this process is added.
    closed: CancellationToken,
}

/// The settings that limit reads.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    max_record_bytes: usize,
    pub(super) max_watchers: usize,
}

/// How far the history goes.
#[derive(Default)]
pub(super) struct Extent {
    /// The newest record that is shown. `None` until one is known to be acknowledged.
    pub(super) newest: Option<Position>,
    /// An acknowledged record that a later leader lacks, or has another one in place of.
    missing: Option<Position>,
    /// How often that was found.
    rewrites: u64,
    /// The highest revision that is known to be pruned.
    pub(super) pruned_to: Revision,
    /// Some of the latest records without a gap, oldest first, for watchers that are nearly up to date.
    pub(super) recent: VecDeque<Arc<Recent>>,
    recent_bytes: usize,
    /// The unreadable records that were logged.
    unreadable: BTreeSet<(CycleId, Revision)>,
    names: Arc<Names>,
}

/// The names that subsystems have had: the records of cycles name a subsystem as it was named then.
#[derive(Default)]
struct Names {
    /// The present names by former ones.
    present: Arc<BTreeMap<Name, Name>>,
    former: BTreeMap<Name, Vec<Name>>,
}

impl Names {
    fn of(present: Arc<BTreeMap<Name, Name>>) -> Self {
        let mut former: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (earlier, name) in &*present {
            former.entry(name.clone()).or_default().push(earlier.clone());
        }
        Self { present, former }
    }

    /// These names, with all present and former names of the subsystems that have or had one of them.
    fn all_of(&self, names: &BTreeSet<Name>) -> BTreeSet<Name> {
        let all_names = |name| {
            let present = self.present.get(name).unwrap_or(name);
            iter::once(present).chain(self.former.get(present).into_iter().flatten())
        };
        names.iter().chain(names.iter().flat_map(all_names)).cloned().collect()
    }
}

/// A record that is cached for all watchers. It is decoded once for all of them.
pub(super) struct Recent {
    pub(super) record: Arc<Record>,
    parts: OnceCell<BriefParts>,
}

impl Recent {
    pub(super) fn new(record: Arc<Record>) -> Arc<Self> {
        Arc::new(Self { record, parts: OnceCell::new() })
    }

    /// True if one of these subsystems took part.
    pub(super) async fn has(&self, wanted: &PartFilter) -> bool {
        if wanted.subsystems.is_empty() {
            return true;
        }
        let read = || {
            let record = self.record.bytes.clone();
            offload(parts_in(record.len()), move || BriefParts::of(&record))
        };
        wanted.passes(self.parts.get_or_init(read).await)
    }
}

/// Which of these records pass the filter. Unreadable records pass.
pub(super) async fn which_have(records: &[Found], wanted: &PartFilter) -> Vec<bool> {
    if wanted.subsystems.is_empty() {
        return vec![true; records.len()];
    }
    let bytes = |found: &Found| found.as_ref().map(|record| record.bytes.clone()).unwrap_or_default();
    let records: Vec<Bytes> = records.iter().map(bytes).collect();
    let wanted = wanted.clone();
    let size = parts_in(records.iter().map(Bytes::len).sum());
    offload(size, move || records.iter().map(|record| record.is_empty() || wanted.wants(record)).collect()).await
}

/// Approximate number of parts in this many bytes of records.
fn parts_in(bytes: usize) -> usize {
    const PART: usize = 128;
    bytes / PART
}

/// New records have come that are no longer cached.
pub(super) struct TooMany;

impl Orchestrator {
    /// The history.
    pub fn history(&self) -> &History {
        &self.0.history
    }

    /// The record of a cycle.
    ///
    /// # Errors
    /// It does not exist yet, or at all; it can't be read; or too much is being read.
    pub async fn cycle(&self, cycle_id: CycleId) -> Result<Arc<Record>, Refusal> {
        if self.0.state().live.contains_key(&cycle_id) {
            return Err(Refusal::CycleNotFinished(cycle_id));
        }
        let record = self.0.history.cycle(cycle_id).await?;
        record.ok_or_else(|| self.0.state().unknown(Refusal::CycleNotFound(cycle_id)))
    }

    /// A page of audit events below the leaf `before`, newest first, of at most `max_events`.
    ///
    /// # Errors
    /// The store can't be read, or the memory for reads is full.
    pub async fn events(
        &self,
        before: Option<u64>,
        filter: EventFilter,
        max_events: usize,
    ) -> Result<EventPage, Refusal> {
        let mut room = self.0.history.room(max_events * AuditEvent::MAX_BYTES).await?;
        let mut page = self
            .0
            .store
            .events_before(before.unwrap_or_else(|| self.0.store.log().frontier.size()), filter, max_events)
            .await?;
        for event in page.events.iter_mut().flatten() {
            let bytes = std::mem::take(&mut event.entry.bytes);
            event.entry.bytes = room.split(bytes.len()).around(bytes);
        }
        Ok(page)
    }

    /// The audit event of this leaf.
    ///
    /// # Errors
    /// There is none, it can't be read, or too much is being read.
    pub(super) async fn event(&self, leaf: u64) -> Result<LoggedEvent, Refusal> {
        let page = self.events(leaf.checked_add(1), EventFilter::default(), 1).await?;
        match page.events.into_iter().next() {
            Some(Ok(event)) if event.leaf == leaf => Ok(event),
            Some(Err(unreadable)) if unreadable.leaf == leaf => Err(Refusal::EventUnreadable(unreadable)),
            _ => Err(Refusal::EventNotFound(leaf)),
        }
    }
}

impl History {
    /// The history of this store. No record of it is known to be acknowledged yet.
    pub fn new(store: Arc<dyn Store>, memory: &Memory, settings: &Settings) -> Self {
        let watching = memory.part("filters and records of watchers", memory.max() / 4);
        Self(Arc::new(Inner {
            store,
            // With their known state, if requested.
            _recent: memory.try_hold(3 * Extent::RECENT_BYTES).ok(),
            memory: memory.clone(),
            live: Live::new(watching.clone()),
            watching,
            limits: Mutex::new(Limits::of(settings)),
            declared: Mutex::default(),
            extent: Mutex::default(),
            shown: latest::Sender::default(),
            checkpoint: latest::Sender::default(),
            watchers: Watchers::default(),
            by_subsystem: AtomicUsize::new(0),
            unconfirmed: latest::Sender::new(false),
            fed: latest::Sender::new(true),
            closed: CancellationToken::new(),
        }))
    }

    /// Applies the limits of other settings.
    pub fn apply(&self, settings: &Settings) {
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner) = Limits::of(settings);
    }

    /// Notes which names the configuration file declares.
    pub fn declare(&self, declared: &Declared) {
        *self.0.declared.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(declared.names());
    }

    /// Reads the former names of subsystems from the store. An orchestrator of this process knows them itself.
    ///
    /// # Errors
    /// The store can't be read.
    pub async fn read_names(&self) -> Result<(), Refusal> {
        let stored = self.0.store.former_names().await?;
        let declared = self.0.declared.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let asked = declared.iter().map(|(name, former)| (name, &**former));
        let asked = asked.chain(stored.iter().map(|(name, former)| (name, &**former)));
        let names = FormerNames::of(asked, |name| declared.contains_key(name));
        self.rename(&Arc::new(names.into_renamed()));
        Ok(())
    }

    /// The newest acknowledged record. `None` while no leader has told it yet.
    pub fn known(&self) -> Option<Position> {
        self.extent().newest
    }

    /// All records up to this position are acknowledged.
    pub fn raise(&self, to: Position) {
        self.extend(|extent| extent.raise(to));
        self.show();
    }

    /// Compares `newest`, up to which the leader of the term `by` has acknowledged its history, with the newest record
    /// that is known, before [`History::raise`]: the history of a later term has all acknowledged records of earlier
    /// ones. If it lacks one, that is logged, and what is shown is the history of the later term: see
    /// [`History::goes_on`].
    ///
    /// # Errors
    /// The store can't be read. Or the history of a later term is known, which lacks `newest`.
    pub async fn compare(&self, newest: Position, by: Epoch) -> Result<(), Refusal> {
        let Some(known) = self.known().filter(|known| *known != newest) else { return Ok(()) };
        // A process that has answered in one term may have passed on what is of its next one.
        let term = newest.epoch.max(Some(by));
        let (earlier, later) = match known.epoch.cmp(&term) {
            Ordering::Less => (known, newest),
            Ordering::Equal => return Ok(()),
            // A late answer.
            Ordering::Greater => (newest, known),
        };
        if self.goes_on(Some(earlier), later).await? {
            return Ok(());
        }
        tracing::error!(
            known = earlier.revision.0,
            leader = later.revision.0,
            "the leader lacks acknowledged records: an older copy of the database, or a standby that had not got them, \
             has replaced it. This replica does not lead any more"
        );
        if later == newest { Ok(()) } else { Err(Refusal::NotFollowing) }
    }

    /// Compares a record that was `known` to be acknowledged with the later `end` of the history of a leader, or of a
    /// store that was taken over. Returns false if it is missing there, or is another one: then what is shown ends
    /// where that history does, if it ended with that record, and [`History::missing`] has the record from then on.
    ///
    /// # Errors
    /// The store can't be read.
    pub async fn goes_on(&self, known: Option<Position>, end: Position) -> Result<bool, Refusal> {
        let Some(known) = known else { return Ok(true) };
        {
            let extent = self.extent();
            // A server that does not go as far says nothing about it. More may be known by now.
            if extent.newest == Some(known) {
                self.require(end);
            }
        }
        let is_there = known.revision <= end.revision
            && match self.check(known).await {
                Err(Refusal::HistoryRewritten { .. }) => false,
                checked => checked.map(|()| true)?,
            };
        if !is_there {
            let mut extent = self.extent();
            extent.missing.get_or_insert(known);
            if extent.newest != Some(known) {
                return Ok(false);
            }
            extent.rewrites += 1;
            extent.newest = Some(end);
            extent.forget_recent();
            drop(extent);
            // Also if its end is the same.
            self.0.shown.send_replace(end.revision);
        }
        Ok(is_there)
    }

    /// A record that was acknowledged, and that a later leader, or the store, was found to lack.
    pub fn missing(&self) -> Option<Position> {
        self.extent().missing
    }

    /// Checks that the record at this position is still of its epoch. Retention may have removed it meanwhile; then
    /// nothing shows it.
    pub(super) async fn check(&self, position: Position) -> Result<(), Refusal> {
        let Position { revision, epoch: Some(epoch) } = position else { return Ok(()) };
        let before = Revision(revision.0.saturating_sub(1));
        let limits = PageLimits { records: 1, bytes: 1 };
        let found = match self.0.store.cycles_after(before, limits).await {
            Ok(found) => found.into_iter().next().and_then(Result::ok),
            Err(ResumeError::NotRetained { .. }) => None,
            Err(ResumeError::Store(error)) => return Err(error.into()),
        };
        match found.filter(|found| found.revision == revision) {
            Some(found) if found.epoch != epoch => {
                Err(Refusal::HistoryRewritten { after: revision, epoch, now: found.epoch })
            }
            _ => Ok(()),
        }
    }

    /// The leader begins to tell of its history: what it has told of running cycles is forgotten.
    pub fn told_anew(&self) {
        self.0.live.forget();
    }

    /// The leader has recorded a cycle.
    pub fn told_record(&self, record: Arc<Record>) {
        self.0.live.told_end(record.cycle_id, record.revision);
        self.add(record);
        self.show();
    }

    /// A cycle runs at the leader.
    pub fn told_start(&self, cycle: LiveCycle) {
        self.0.live.told_start(cycle);
    }

    /// A cycle at the leader has made progress, of which this many updates were lost on the way.
    pub fn told_progress(&self, cycle_id: CycleId, lost: u64, updates: Vec<Update>) {
        self.0.live.told_progress(cycle_id, lost, updates);
    }

    /// The leader has published a checkpoint.
    pub fn told_checkpoint(&self, published: Published) {
        self.0.checkpoint.send_replace(published);
    }

    /// Number of watchers that want the progress of running cycles, and each change of it.
    pub fn progress_wanted(&self) -> latest::Receiver<usize> {
        self.0.live.wanted.subscribe()
    }

    /// True if watchers filter by subsystem, so that its names have to be known.
    pub fn needs_names(&self) -> bool {
        self.0.by_subsystem.load(atomic::Ordering::Relaxed) > 0
    }

    /// Sets whether this replica follows a leader, or leads. Watches end once it does not.
    pub fn set_fed(&self, is_fed: bool) {
        self.0.fed.send_if_modified(|fed| mem::replace(fed, is_fed) != is_fed);
    }

    /// Sets whether another replica may lead, and have added further records: the lease of this one has ended.
    pub fn set_unconfirmed(&self, is_unconfirmed: bool) {
        self.0.unconfirmed.send_if_modified(|unconfirmed| mem::replace(unconfirmed, is_unconfirmed) != is_unconfirmed);
    }

    pub(super) fn is_unconfirmed(&self) -> bool {
        *self.0.unconfirmed.borrow()
    }

    /// Whether another replica may lead, and have added further records, and each change of that.
    pub fn unconfirmed(&self) -> latest::Receiver<bool> {
        self.0.unconfirmed.subscribe()
    }

    /// Adds an acknowledged record, and with it all before it.
    pub fn add(&self, record: Arc<Record>) {
        self.extend(|extent| extent.add(record));
    }

    /// Notifies watchers of the records that were added.
    pub fn show(&self) {
        #[cfg(feature = "simulation")]
        if Fault::LostNotification.is_planted() && self.newest().revision.0.is_multiple_of(3) {
            return;
        }
        // Read under the lock: of two records that are shown at once, the earlier one must not be the last.
        self.0.shown.send_if_modified(|shown| {
            let newest = self.newest().revision;
            mem::replace(shown, newest) != newest
        });
    }

    /// There will be no further records: watchers end after the last one.
    pub fn close(&self) {
        self.0.closed.cancel();
    }

    /// The record of a cycle, if there is one.
    ///
    /// # Errors
    /// It can't be read, or too much is being read.
    pub async fn cycle(&self, cycle_id: CycleId) -> Result<Option<Arc<Record>>, Refusal> {
        Ok(self.read_one(self.0.store.cycle(cycle_id)).await?.map(Arc::new))
    }

    /// True if a page that ends at this revision may have left records for the next one that are not known here.
    pub fn lacks(&self, before: Revision) -> bool {
        self.known().is_none_or(|known| known.revision.next() < before)
    }

    /// A page of records before the revision `before`, newest first, of at most `max_records`.
    ///
    /// # Errors
    /// The store can't be read, the memory for reads is full, or another replica may have added records before
    /// `before`.
    pub async fn cycles(
        &self,
        before: Option<Revision>,
        filter: Filter,
        parts: PartFilter,
        max_records: usize,
    ) -> Result<Page, Refusal> {
        const MAX_BYTES: usize = 3 << 20;
        /// Most bytes of records that one page decodes: some tens of milliseconds.
        const MAX_LOOKED_INTO: usize = 32 << 20;
        let limits = PageLimits { records: max_records.max(64), bytes: MAX_BYTES };
        // Records that do not pass the filter are decoded as well.
        let mut room = self.room(2 * self.max_record().max(MAX_BYTES)).await?;
        let parts = self.with_all_names(&parts);
        if self.is_unconfirmed() && before.is_some_and(|before| self.lacks(before)) {
            // The page before may be of the replica that leads now.
            return Err(Refusal::NotFollowing);
        }
        let end = self.readable().next();
        let mut before = before.map_or(end, |before| before.min(end));
        let mut page = Page::default();
        let (mut bytes, mut looked_into) = (0, 0);
        loop {
            // A filter on decoded records examines more of them than pass.
            let found = self.0.store.cycles_before(before, filter.clone(), limits).await?;
            page.scanned += found.scanned;
            let wanted = which_have(&found.records, &parts).await;
            for (found, wanted) in found.records.into_iter().zip(wanted) {
                let (revision, length) = match &found {
                    Ok(record) => (record.revision, record.bytes.len()),
                    Err(unreadable) => {
                        self.extent().tell_unreadable(unreadable);
                        (unreadable.revision, 0)
                    }
                };
                looked_into += length;
                if wanted {
                    bytes += length;
                    if page.records.len() == max_records || (!page.records.is_empty() && bytes > MAX_BYTES) {
                        return Ok(Page { next: Some(revision.next()), ..page });
                    }
                    page.records.push(found.map(|record| with_room(record, &mut room)));
                }
            }
            let goes_on =
                page.records.len() < max_records && page.scanned < SCAN_LIMIT && looked_into < MAX_LOOKED_INTO;
            match found.next {
                Some(next) if goes_on => before = next,
                next => return Ok(Page { next, ..page }),
            }
        }
    }

    /// The bytes of a cached record, counted as an unread response.
    ///
    /// # Errors
    /// The memory for unread responses is full.
    pub async fn keep(&self, record: &Record) -> Result<Bytes, RecordHasNoRoom> {
        let room = self.room(record.bytes.len()).await;
        let room = room.map_err(|full| RecordHasNoRoom(record.cycle_id, full))?;
        Ok(room.around(record.bytes.clone()))
    }
}

/// For the parts of the orchestrator.
impl History {
    pub(super) fn extent(&self) -> MutexGuard<'_, Extent> {
        // A panic while this lock is held is a defect that must not cause a second one.
        self.0.extent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn limits(&self) -> Limits {
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn store(&self) -> &dyn Store {
        &*self.0.store
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.0.memory
    }

    pub(super) fn watching(&self) -> &Memory {
        &self.0.watching
    }

    pub(super) fn live(&self) -> &Live {
        &self.0.live
    }

    pub(super) fn watchers(&self) -> &Watchers {
        &self.0.watchers
    }

    pub(super) fn closed(&self) -> &CancellationToken {
        &self.0.closed
    }

    /// The newest published checkpoint of the log, which its publisher replaces.
    pub(super) fn checkpoint(&self) -> &latest::Sender<Published> {
        &self.0.checkpoint
    }

    /// The newest record.
    pub(super) fn newest(&self) -> Position {
        self.extent().newest.unwrap_or_default()
    }

    /// Extends what is shown. Reads fail from then on where the store does not go as far.
    fn extend(&self, extend: impl FnOnce(&mut Extent)) {
        let mut extent = self.extent();
        extend(&mut extent);
        // Under the lock: the last call counts.
        if let Some(newest) = extent.newest {
            self.require(newest);
        }
    }

    fn require(&self, Position { revision, epoch }: Position) {
        self.0.store.require(revision, epoch.unwrap_or_default());
    }

    /// Readers get the records up to this revision.
    fn readable(&self) -> Revision {
        #[cfg(feature = "simulation")]
        if Fault::UncappedReads.is_planted() {
            return Revision(u64::MAX - 1);
        }
        self.newest().revision
    }

    /// Counts a watcher with this filter.
    pub(super) fn enter(&self, filter: &WatchFilter, progress: bool) {
        self.0.by_subsystem.fetch_add(usize::from(filter.is_by_subsystem()), atomic::Ordering::Relaxed);
        if progress {
            self.0.live.wanted.send_modify(|wanted| *wanted += 1);
        }
    }

    /// The opposite of [`History::enter`].
    pub(super) fn leave(&self, filter: &WatchFilter, progress: bool) {
        self.0.by_subsystem.fetch_sub(usize::from(filter.is_by_subsystem()), atomic::Ordering::Relaxed);
        if progress {
            self.0.live.wanted.send_modify(|wanted| *wanted -= 1);
        }
    }

    /// Whether this replica follows a leader, or leads, and each change of that.
    pub(super) fn fed(&self) -> latest::Receiver<bool> {
        self.0.fed.subscribe()
    }

    /// How often records were found to be missing that had been acknowledged.
    pub(super) fn rewrites(&self) -> u64 {
        self.extent().rewrites
    }

    /// The newest revision, and each further one.
    pub(super) fn revisions(&self) -> latest::Receiver<Revision> {
        self.0.shown.subscribe()
    }

    /// A term of this process has begun, which goes on after this record.
    pub(super) fn begin(&self, newest: Position, pruned_to: Revision) {
        self.extent().raise(newest);
        self.pruned(pruned_to);
        self.0.live.forget();
        self.set_fed(true);
    }

    /// All records up to this revision are removed.
    pub(super) fn pruned(&self, to: Revision) {
        let mut extent = self.extent();
        extent.pruned_to = extent.pruned_to.max(to);
    }

    /// The highest revision that is known to be pruned.
    pub(super) fn pruned_to(&self) -> Revision {
        self.extent().pruned_to
    }

    /// The watchers.
    pub fn watched(&self) -> Watched {
        // Watchers at this revision or after it read from the cache.
        let at_hand = {
            let extent = self.extent();
            let before = |first: &Arc<Recent>| Revision(first.record.revision.0 - 1);
            extent.recent.front().map_or(extent.newest.unwrap_or_default().revision, before)
        };
        self.0.watchers.look(at_hand)
    }

    /// The present names of renamed subsystems are these, by former names.
    pub(super) fn rename(&self, present: &Arc<BTreeMap<Name, Name>>) {
        if !Arc::ptr_eq(&self.extent().names.present, present) {
            let names = Arc::new(Names::of(present.clone()));
            self.extent().names = names;
        }
    }

    /// Most bytes of one record in memory when it is read.
    pub(super) fn max_record(&self) -> usize {
        self.limits().max_record_bytes.min(self.0.memory.max())
    }

    pub(super) async fn room(&self, bytes: usize) -> Result<Held, Full> {
        room_of(&self.0.memory, bytes).await
    }

    /// The same filter, for all names of its subsystems: their earlier cycles are recorded under former ones.
    pub(super) fn with_all_names<'f>(&self, parts: &'f PartFilter) -> Cow<'f, PartFilter> {
        if parts.subsystems.is_empty() {
            return Cow::Borrowed(parts);
        }
        let names = self.extent().names.clone();
        if names.present.is_empty() {
            return Cow::Borrowed(parts);
        }
        Cow::Owned(PartFilter { subsystems: names.all_of(&parts.subsystems), states: parts.states.clone() })
    }

    /// Reads a record, once there is memory for it. A record whose commit is not acknowledged yet does not exist.
    pub(super) async fn read_one(
        &self,
        read: impl Future<Output = Result<Option<Found>, StoreError>>,
    ) -> Result<Option<Record>, Refusal> {
        let mut room = self.room(self.max_record()).await?;
        // A record that is acknowledged during the read may be another one than the record that is found.
        let readable = self.readable();
        match read.await?.transpose() {
            Ok(found) => {
                let found = found.filter(|record| record.revision <= readable);
                Ok(found.map(|record| with_room(record, &mut room)))
            }
            Err(unreadable) => {
                self.extent().tell_unreadable(&unreadable);
                Err(Refusal::Unreadable(unreadable))
            }
        }
    }
}

impl Limits {
    fn of(settings: &Settings) -> Self {
        Self { max_record_bytes: settings.max_record_bytes, max_watchers: settings.max_watchers }
    }
}

impl State {
    /// `ran_for` is `None` if this process did not run the cycle.
    pub(super) fn add_record(&mut self, record: Arc<Record>, ran_for: Option<Duration>) {
        self.counts.recorded(&record, ran_for);
        self.recorded += 1;
        self.last_revision = record.revision;
        self.last = Some(record.clone());
        self.history.add(record);
    }
}

impl Extent {
    /// Size of the cache of records: enough that only watchers that were disconnected read the store.
    const RECENT_RECORDS: usize = 256;
    const RECENT_BYTES: usize = 8 << 20;

    /// Most unreadable records that are logged one by one. Further ones are neither remembered nor logged.
    const MAX_UNREADABLE: usize = 10_000;

    /// Logs an unreadable record, once.
    pub(super) fn tell_unreadable(&mut self, unreadable: &Unreadable) {
        let Unreadable { cycle_id, revision, problem } = unreadable;
        let is_full = self.unreadable.len() == Self::MAX_UNREADABLE;
        if !is_full && self.unreadable.insert((*cycle_id, *revision)) {
            tracing::error!(
                cycle_id = cycle_id.0,
                revision = revision.0,
                problem,
                "the record of a cycle can't be read, and is skipped"
            );
        }
    }

    /// Number of unreadable records, each counted once.
    pub(super) fn unreadable_records(&self) -> u64 {
        self.unreadable.len() as u64
    }

    fn raise(&mut self, to: Position) {
        if self.newest.is_none_or(|newest| newest.revision < to.revision) {
            self.newest = Some(to);
        }
    }

    fn forget_recent(&mut self) {
        self.recent.clear();
        self.recent_bytes = 0;
    }

    fn add(&mut self, record: Arc<Record>) {
        self.raise(Position::after(&record));
        let cached_to = self.recent.back().map(|recent| recent.record.revision);
        if cached_to.is_some_and(|cached_to| record.revision <= cached_to) {
            return;
        }
        if cached_to.is_some_and(|cached_to| record.revision > cached_to.next()) {
            self.forget_recent();
        }
        self.recent_bytes += record.bytes.len();
        self.recent.push_back(Recent::new(record));
        while self.recent.len() > Self::RECENT_RECORDS
            || (self.recent_bytes > Self::RECENT_BYTES && self.recent.len() > 1)
        {
            if let Some(oldest) = self.recent.pop_front() {
                self.recent_bytes -= oldest.record.bytes.len();
            }
        }
    }

    /// The record of the cycle of a request, among those after this revision.
    pub(super) fn recorded_since(
        &self,
        revision: Revision,
        request: &RequestKey,
    ) -> Result<Option<Arc<Record>>, TooMany> {
        let oldest = self.recent.front().map(|recent| recent.record.revision);
        let newest = self.newest.unwrap_or_default().revision;
        if newest > revision && oldest.is_none_or(|oldest| oldest > revision.next()) {
            return Err(TooMany);
        }
        let mut since = self.recent.iter().rev().map(|recent| &recent.record).take_while(|it| it.revision > revision);
        Ok(since.find(|record| record.is_of(request)).cloned())
    }
}

/// This many bytes of this memory, or all of it, once they are free.
pub(super) async fn room_of(memory: &Memory, bytes: usize) -> Result<Held, Full> {
    let bytes = bytes.min(memory.max());
    let full = |_| Full { purpose: memory.purpose(), max: memory.max(), wanted: bytes };
    timeout(PATIENCE, memory.hold(bytes)).await.map_err(full)
}

/// The record, with its part of the memory. A larger record of an earlier configuration gets all of it.
pub(super) fn with_room(record: Record, room: &mut Held) -> Record {
    let bytes = room.split(record.bytes.len()).around(record.bytes);
    Record { bytes, ..record }
}
