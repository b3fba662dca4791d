//! Reading the history: with room for what is read, and with filters that look into records.
//!
//! A record that is read from the store has its room for as long as anybody keeps its bytes (`Held::around`), so that what
//! clients ask for and don't take is bounded, wherever it waits.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::OnceCell, time::timeout};

use super::{Refusal, Shared, State, aside};
use crate::{
    memory::{Full, Held},
    model::Revision,
    ports::{Filter, Found, Page, PageLimits, Record, SCAN_LIMIT, StoreError},
    record::{Participants, Participation},
};

/// How long a caller waits for room: what others read is gone in milliseconds, unless they do not take it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A record that is at hand for all watchers. It is looked into once, whoever asks.
pub(super) struct Recent {
    pub(super) record: Arc<Record>,
    participants: OnceCell<Participants>,
}

impl Recent {
    pub(super) fn new(record: Arc<Record>) -> Arc<Self> {
        Arc::new(Self { record, participants: OnceCell::new() })
    }

    /// Whether one of those that are wanted took part.
    pub(super) async fn has(&self, wanted: &Participation) -> bool {
        if wanted.subsystems.is_empty() {
            return true;
        }
        let read = || {
            let record = self.record.bytes.clone();
            aside(parts_in(record.len()), move || Participants::of(&record))
        };
        wanted.is_among(self.participants.get_or_init(read).await)
    }
}

/// In which of these records one of those that are wanted took part. What can't be read is not withheld.
pub(super) async fn which_have(records: &[Found], wanted: &Participation) -> Vec<bool> {
    if wanted.subsystems.is_empty() {
        return vec![true; records.len()];
    }
    let bytes = |found: &Found| found.as_ref().map(|record| record.bytes.clone()).unwrap_or_default();
    let records: Vec<Bytes> = records.iter().map(bytes).collect();
    let wanted = wanted.clone();
    let size = parts_in(records.iter().map(Bytes::len).sum());
    aside(size, move || records.iter().map(|record| record.is_empty() || wanted.wants(record)).collect()).await
}

/// About how much is to be looked at in so many bytes of records: the parts of their cycles.
fn parts_in(bytes: usize) -> usize {
    const PART: usize = 128;
    bytes / PART
}

/// Records have come that are not at hand any more.
pub(super) struct TooMany;

impl State {
    /// The record of the cycle of a request, among those after this revision.
    pub(super) fn recorded_since(&self, revision: Revision, request_id: &str) -> Result<Option<Arc<Record>>, TooMany> {
        let oldest = self.recent.front().map(|recent| recent.record.revision);
        if self.last_revision > revision && oldest.is_none_or(|oldest| oldest > revision.next()) {
            return Err(TooMany);
        }
        let mut since = self.recent.iter().rev().map(|recent| &recent.record).take_while(|it| it.revision > revision);
        Ok(since.find(|record| record.request_id.as_deref() == Some(request_id)).cloned())
    }
}

impl Shared {
    /// The most bytes that one record takes when it is read.
    pub(super) fn max_record(&self) -> usize {
        self.settings().max_record_bytes.min(self.history.max())
    }

    async fn room(&self, bytes: usize) -> Result<Held, Full> {
        let bytes = bytes.min(self.history.max());
        let full = |_| Full { purpose: self.history.purpose(), max: self.history.max() };
        timeout(PATIENCE, self.history.hold(bytes)).await.map_err(full)
    }

    /// Reads a record, once there is room for it.
    pub(super) async fn read_one(
        &self,
        read: impl Future<Output = Result<Option<Record>, StoreError>>,
    ) -> Result<Option<Record>, Refusal> {
        let mut room = self.room(self.max_record()).await?;
        let found = self.tell_if_unreadable(read.await)?;
        Ok(found.map(|record| with_room(record, &mut room)))
    }

    /// The bytes of a record that is at hand, as an answer that may wait for its client.
    pub(super) async fn keep(&self, record: &Record) -> Result<Bytes, Refusal> {
        let room = self.room(record.bytes.len()).await;
        let room = room.map_err(|full| Refusal::RecordHasNoRoom(record.cycle_id, full))?;
        Ok(room.around(record.bytes.clone()))
    }

    /// A page of records before `before`, newest first, of at most `max_records`.
    pub(super) async fn page(
        &self,
        before: Option<Revision>,
        filter: Filter,
        participation: Participation,
        max_records: usize,
    ) -> Result<Page, Refusal> {
        const MAX_BYTES: usize = 3 << 20;
        /// Bytes of records that one page looks into: some tens of milliseconds.
        const MAX_LOOKED_INTO: usize = 32 << 20;
        let limits = PageLimits { records: max_records.max(64), bytes: MAX_BYTES };
        // Beside those that are on the page, others are looked into.
        let mut room = self.room(2 * self.max_record().max(MAX_BYTES)).await?;
        let mut before = before.unwrap_or(Revision(u64::MAX >> 1));
        let mut page = Page::default();
        let (mut bytes, mut looked_into) = (0, 0);
        loop {
            // A filter that looks into the records sees more of them than it lets through.
            let found = self.store.cycles_before(before, filter.clone(), limits).await?;
            page.scanned += found.scanned;
            let wanted = which_have(&found.records, &participation).await;
            for (found, wanted) in found.records.into_iter().zip(wanted) {
                let (revision, length) = match &found {
                    Ok(record) => (record.revision, record.bytes.len()),
                    Err(unreadable) => {
                        self.state().tell_unreadable(unreadable);
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

/// The record, with its part of the room. One that an earlier configuration let be larger has all of it.
pub(super) fn with_room(record: Record, room: &mut Held) -> Record {
    let bytes = room.split(record.bytes.len()).around(record.bytes);
    Record { bytes, ..record }
}
