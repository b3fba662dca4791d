//! The term of one process as the writer of a database: what its next commit builds on.

use std::{
    iter,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    counts::Counts,
    frontier::{Appended, Frontier},
    row::integer,
    seal::{META, Renewal, Sealer},
};
use crate::{
    ledger::Leaves,
    model::{Epoch, Revision},
    ports::{Log, Write},
};

/// The term of one epoch as the writer.
pub(super) struct Term {
    pub(super) epoch: Epoch,
    /// The epoch of the database while no other process has taken over: this one from its first commit on.
    pub(super) current: Epoch,
    /// Number of all commits so far.
    pub(super) commits: u64,
    /// The highest revision that was ever removed.
    pub(super) pruned_to: Revision,
    /// The highest revision of the records that are older than the log.
    pub(super) unlogged_to: Revision,
    pub(super) counts: Counts,
    pub(super) frontier: Frontier,
    /// The leaves that retention has removed: those below `log.first_kept` of the frontier, and others.
    pub(super) removed: Leaves,
    /// The leaves that were missing when the entries were counted anew, so that they are in no number of `counts`.
    pub(super) accepted: Leaves,
    /// Number of leaves in `removed`.
    pub(super) removed_count: u64,
    /// The leaf of the entry with which the entries were counted anew.
    pub(super) counted_at: Option<u64>,
    pub(super) sealer: Sealer,
    /// What the first commit of the term seals anew, if anything.
    pub(super) renewal: Option<Renewal>,
}

/// What a commit changes, beside what the write says.
pub(super) struct Next {
    /// The values of the columns [`META`].
    pub(super) meta: [i64; META.len()],
    pub(super) counts: Counts,
    /// The leaves of all entries that it removes, and all before the first one that is kept.
    pub(super) gone: Leaves,
    removed_count: u64,
    counted_at: Option<u64>,
}

impl Term {
    /// What the commit of this write changes. `removed` are the leaves of all entries that it removes.
    pub(super) fn next(&self, write: &Write, appended: &Appended, removed: &[u64]) -> Next {
        let mut counts = self.counts;
        write.removal.records.iter().for_each(|record| counts.remove_record(record.state));
        write.removal.events.iter().for_each(|event| counts.remove_event(event.kind));
        counts.add(write);
        let gone: Leaves =
            if removed.is_empty() { Leaves::default() } else { ranges(removed, &appended.log).collect() };
        let removed_count = self.removed_count + self.removed.count_missing(&gone);
        let counted_at = self.counted_at_by(write, appended);
        let last_revision = write.records.last().map_or(self.frontier.last_revision, |record| record.revision);
        let meta = [
            integer(self.epoch.0),
            integer(write.last_cycle_id.0),
            integer(last_revision.0),
            integer(self.pruned_to_by(write).0),
            integer(self.commits + 1),
            write.close.into(),
            integer(appended.log.first_kept),
            integer(removed_count),
            counted_at.map_or(-1, integer),
            integer(self.unlogged_to.0),
        ];
        Next { meta, counts, gone, removed_count, counted_at }
    }

    /// Advances by `write`, which was committed, and by what it has appended to the log and removed from it.
    pub(super) fn advance(&mut self, write: &Write, appended: Appended, next: Next) {
        let Next { counts, gone, removed_count, counted_at, .. } = next;
        (self.counts, self.removed_count, self.counted_at) = (counts, removed_count, counted_at);
        gone.ranges().for_each(|leaves| self.removed.add(leaves));
        self.current = self.epoch;
        self.commits += 1;
        self.pruned_to = self.pruned_to_by(write);
        self.frontier.advance(write, appended);
    }

    /// What the next commit seals anew, if anything.
    pub(super) fn renews(&self) -> Option<Renewal> {
        self.renewal.filter(|_| self.current != self.epoch)
    }

    /// The leaf of the entry with which the entries were counted anew, after this write.
    fn counted_at_by(&self, write: &Write, appended: &Appended) -> Option<u64> {
        let is_anew = self.renews() == Some(Renewal::Everything);
        let began = appended.control(write).next().filter(|_| is_anew && write.began.is_some());
        began.map_or(self.counted_at, |(leaf, _)| Some(leaf))
    }

    /// The highest revision that was ever removed, after this write.
    fn pruned_to_by(&self, write: &Write) -> Revision {
        write.removal.records.last().map(|record| record.revision).unwrap_or_default().max(self.pruned_to)
    }
}

/// These removed leaves, and all before the first one that this log keeps.
fn ranges(removed: &[u64], log: &Log) -> impl Iterator<Item = Range<u64>> {
    removed.iter().map(|leaf| *leaf..*leaf + 1).chain(iter::once(0..log.first_kept))
}

/// What readers know of the log.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedLog {
    /// As of the last durable commit.
    log: Arc<Mutex<Log>>,
    /// The highest revision of the records that are older than it.
    unlogged_to: Arc<AtomicU64>,
}

impl SharedLog {
    pub(super) fn get(&self) -> Log {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, log: &Log) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone_from(log);
    }

    pub(super) fn unlogged_to(&self) -> Revision {
        Revision(self.unlogged_to.load(Ordering::Relaxed))
    }

    pub(super) fn begins_after(&self, unlogged_to: Revision) {
        self.unlogged_to.store(unlogged_to.0, Ordering::Relaxed);
    }
}
