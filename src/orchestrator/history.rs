//! Reads the history: with limits on memory, and with filters on decoded records.
//!
//! A record from the store is counted until the last reference to its bytes is dropped (`Held::around`), so that unread
//! responses are limited, wherever they wait.

use std::{borrow::Cow, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::OnceCell, time::timeout};

use super::{Orchestrator, RecordHasNoRoom, Refusal, Shared, State, offload::offload};
use crate::{
    memory::{Full, Held, Memory},
    model::{AuditEvent, CycleId, RequestKey, Revision},
    ports::{
        EventFilter, EventPage, Filter, Found, LoggedEvent, Page, PageLimits, Record, SCAN_LIMIT, StoreError,
        Unreadable,
    },
    record::{BriefParts, PartFilter},
};

/// Longest wait of a caller for memory: other reads end in milliseconds, unless their clients don't read.
const PATIENCE: Duration = Duration::from_secs(10);

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
    /// The bytes of a cached record, counted as an unread response.
    ///
    /// # Errors
    /// The memory for unread responses is full.
    pub async fn keep(&self, record: &Record) -> Result<Bytes, RecordHasNoRoom> {
        self.0.keep(record).await
    }

    /// The record of a cycle.
    ///
    /// # Errors
    /// It does not exist yet, or at all; it can't be read; or too much is being read.
    pub async fn cycle(&self, cycle_id: CycleId) -> Result<Arc<Record>, Refusal> {
        if self.0.state().live.contains_key(&cycle_id) {
            return Err(Refusal::CycleNotFinished(cycle_id));
        }
        let record = self.0.read_one(self.0.store.cycle(cycle_id)).await?;
        record.map(Arc::new).ok_or_else(|| self.0.state().unknown(Refusal::CycleNotFound(cycle_id)))
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
        let mut room = self.0.room(max_events * AuditEvent::MAX_BYTES).await?;
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

    /// A page of records before the revision `before`, newest first, of at most `max_records`.
    ///
    /// # Errors
    /// The store can't be read, or the memory for reads is full.
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
        let mut room = self.0.room(2 * self.0.max_record().max(MAX_BYTES)).await?;
        let parts = self.0.with_all_names(&parts);
        let mut before = before.unwrap_or_else(|| self.0.state().last_revision.next());
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
                        self.0.state().tell_unreadable(unreadable);
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
}

impl State {
    /// Size of the cache of records: enough that only watchers that were disconnected read the store.
    const RECENT_RECORDS: usize = 256;
    pub(super) const RECENT_BYTES: usize = 8 << 20;

    /// Most unreadable records that are logged one by one. Further ones are neither remembered nor logged.
    const MAX_UNREADABLE: usize = 10_000;

    /// Logs an unreadable record, once.
    pub(super) fn tell_unreadable(&mut self, unreadable: &Unreadable) {
        let Unreadable { cycle_id, revision, problem } = unreadable;
        let is_full = self.unreadable.len() == Self::MAX_UNREADABLE;
        if !is_full && self.unreadable.insert((*cycle_id, *revision)) {
            self.counts.unreadable_records += 1;
            tracing::error!(
                cycle_id = cycle_id.0,
                revision = revision.0,
                problem,
                "the record of a cycle can't be read, and is skipped"
            );
        }
    }

    /// `ran_for` is `None` if this process did not run the cycle.
    pub(super) fn add_record(&mut self, record: Arc<Record>, ran_for: Option<Duration>) {
        self.counts.recorded(&record, ran_for);
        self.recorded += 1;
        self.last_revision = record.revision;
        self.last = Some(record.clone());
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
        if self.last_revision > revision && oldest.is_none_or(|oldest| oldest > revision.next()) {
            return Err(TooMany);
        }
        let mut since = self.recent.iter().rev().map(|recent| &recent.record).take_while(|it| it.revision > revision);
        Ok(since.find(|record| record.is_of(request)).cloned())
    }
}

impl Shared {
    /// Most bytes of one record in memory when it is read.
    pub(super) fn max_record(&self) -> usize {
        self.settings().max_record_bytes.min(self.history.max())
    }

    pub(super) async fn room(&self, bytes: usize) -> Result<Held, Full> {
        room_of(&self.history, bytes).await
    }

    /// The same filter, for all names of its subsystems: their earlier cycles are recorded under former ones.
    pub(super) fn with_all_names<'f>(&self, parts: &'f PartFilter) -> Cow<'f, PartFilter> {
        if parts.subsystems.is_empty() {
            return Cow::Borrowed(parts);
        }
        let state = self.state();
        if state.registry.renamed().is_empty() {
            return Cow::Borrowed(parts);
        }
        let subsystems = state.registry.with_all_names(&parts.subsystems);
        Cow::Owned(PartFilter { subsystems, states: parts.states.clone() })
    }

    /// Reads a record, once there is memory for it. A record whose commit is not acknowledged yet does not exist.
    pub(super) async fn read_one(
        &self,
        read: impl Future<Output = Result<Option<Found>, StoreError>>,
    ) -> Result<Option<Record>, Refusal> {
        let mut room = self.room(self.max_record()).await?;
        match read.await?.transpose() {
            Ok(found) => {
                let found = found.filter(|record| record.revision <= self.state().last_revision);
                Ok(found.map(|record| with_room(record, &mut room)))
            }
            Err(unreadable) => {
                self.state().tell_unreadable(&unreadable);
                Err(Refusal::Unreadable(unreadable))
            }
        }
    }

    /// The bytes of a cached record, counted as an unread response.
    pub(super) async fn keep(&self, record: &Record) -> Result<Bytes, RecordHasNoRoom> {
        let room = self.room(record.bytes.len()).await;
        let room = room.map_err(|full| RecordHasNoRoom(record.cycle_id, full))?;
        Ok(room.around(record.bytes.clone()))
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
