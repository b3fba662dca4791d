//! The store in memory, which ends with the process. For trials and tests: it runs inline, without threads, so that
//! tests can pause the clock.

#[cfg(feature = "simulation")]
mod simulated;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    future::ready,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use futures_util::{
    future::BoxFuture,
    stream::{self, BoxStream},
};
use jiff::Timestamp;

use super::{
    frontier::{Appended, Frontier},
    not_taken_over,
    pruning::{needless_hashes, rules},
};
use crate::{
    clock::Clock,
    ledger::{Content, Entry, Hash, Node, Part},
    model::{CycleId, Epoch, EventKind, Name, Output, RequestKey, Revision},
    ports::{
        AuditEntry, Contents, EventFilter, EventPage, Excess, Filter, Found, Log, LoggedEvent, OldEvent, OldRecord,
        OpenCycle, Page, PageLimits, Record, Removal, ResumeError, Retention, SCAN_LIMIT, Seals, Store, StoreError,
        StoreSize, StoredLoop, StoredOutput, StoredSubsystem, Write,
    },
};

#[cfg(feature = "simulation")]
pub use self::simulated::{Fate, Fates, SimulatedDatabase, Statement};

/// Keeps everything in memory.
pub(super) struct MemoryStore {
    clock: Clock,
    kept: Mutex<Kept>,
}

#[cfg_attr(feature = "simulation", derive(Clone))]
#[derive(Default)]
struct Kept {
    /// 0 until it is taken over.
    epoch: Epoch,
    records: BTreeMap<Revision, Record>,
    /// The position of the record of each cycle.
    revisions: HashMap<CycleId, Revision>,
    /// Bytes of all records.
    bytes: u64,
    frontier: Frontier,
    /// The complete nodes of the log, by their numbers.
    nodes: BTreeMap<u64, Hash>,
    /// The leaf of each record.
    leaves: BTreeMap<Revision, u64>,
    /// The leaves of all entries that are kept.
    entries: BTreeSet<u64>,
    /// The audit events, by their leaves.
    events: BTreeMap<u64, AuditEntry>,
    /// The entries about removals, by their leaves.
    control: BTreeMap<u64, Bytes>,
    pruned_to: Revision,
    open: BTreeMap<CycleId, OpenCycle>,
    subsystems: BTreeMap<Name, Arc<StoredSubsystem>>,
    loops: BTreeMap<Name, StoredLoop>,
    outputs: BTreeMap<Name, Output>,
}

impl MemoryStore {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn take_over(&mut self, now: Timestamp) -> Contents {
        self.epoch = self.next_epoch(now);
        self.contents(self.epoch)
    }

    fn next_epoch(&self, now: Timestamp) -> Epoch {
        self.epoch.next().max(Epoch::by_clock(now))
    }

    /// What a process finds that begins this epoch.
    fn contents(&self, epoch: Epoch) -> Contents {
        let finished_at = |cycle_id: &CycleId| Some(self.records.get(self.revisions.get(cycle_id)?)?.finished_at);
        let stored = |(name, output): (&Name, &Output)| StoredOutput {
            name: name.clone(),
            output: output.clone(),
            finished_at: finished_at(&output.cycle_id),
        };
        Contents {
            epoch,
            last_cycle_id: self.frontier.last_cycle_id,
            last_revision: self.frontier.last_revision,
            pruned_to: self.pruned_to,
            last_record: self.records.values().next_back().cloned().map(Ok),
            open: self.open.values().cloned().collect(),
            subsystems: self.subsystems.values().map(|stored| (**stored).clone()).collect(),
            loops: self.loops.values().cloned().collect(),
            outputs: self.outputs.iter().map(stored).collect(),
            is_sealed: true,
            ..Contents::default()
        }
    }

    fn commit(&mut self, write: &Write) -> Result<(), StoreError> {
        if self.epoch == Epoch::default() {
            return Err(not_taken_over());
        }
        if write.epoch != self.epoch {
            return Err(StoreError::Fenced { by: self.epoch });
        }
        self.frontier.check(write).map_err(|problem| StoreError::Defect { problem })?;
        self.keep(write);
        Ok(())
    }

    /// Keeps a write, which was checked.
    fn keep(&mut self, write: &Write) {
        let appended = Appended::to(&self.frontier.log, write);
        self.nodes.extend((appended.first_node..).zip(appended.nodes.iter().copied()));
        self.leaves.extend(appended.records(write).map(|(leaf, record)| (record.revision, leaf)));
        self.events.extend(appended.events(write).map(|(leaf, event)| (leaf, event.clone())));
        self.entries.extend(appended.first_leaf..appended.log.frontier.size());
        self.control.extend(appended.control(write).map(|(leaf, entry)| (leaf, entry.clone())));
        self.frontier.advance(write, appended);
        if !write.removal.is_empty() {
            self.remove(&write.removal);
        }
        self.open.extend(write.open.iter().map(|open| (open.cycle_id, open.clone())));
        for record in &write.records {
            self.open.remove(&record.cycle_id);
            self.bytes += record.bytes.len() as u64;
            self.revisions.insert(record.cycle_id, record.revision);
            self.records.insert(record.revision, record.clone());
        }
        self.outputs.extend(write.outputs.iter().cloned());
        for (former, name) in &write.renamed {
            if let Some(output) = self.outputs.remove(former) {
                self.outputs.insert(name.clone(), output);
            }
            self.subsystems.remove(former);
        }
        for (name, stored) in &write.subsystems {
            if stored.is_none() {
                self.outputs.remove(name);
            }
            put(&mut self.subsystems, name, stored.as_ref());
        }
        for (name, stored) in &write.loops {
            put(&mut self.loops, name, stored.as_ref());
        }
    }

    fn remove(&mut self, removal: &Removal) {
        // Control entries before the first kept one are gone, too.
        let mut removed: Vec<_> = self.entries.range(..removal.first_kept).copied().collect();
        for OldRecord { revision, .. } in &removal.records {
            removed.extend(self.leaves.remove(revision));
            self.pruned_to = self.pruned_to.max(*revision);
            if let Some(record) = self.records.remove(revision) {
                self.revisions.remove(&record.cycle_id);
                self.bytes -= record.bytes.len() as u64;
            }
        }
        for OldEvent { leaf, .. } in &removal.events {
            self.events.remove(leaf);
            removed.push(*leaf);
        }
        removed.sort_unstable();
        self.control = self.control.split_off(&removal.first_kept);
        for leaf in &removed {
            self.entries.remove(leaf);
        }
        let gone = |leaves| self.entries.range(leaves).next().is_none();
        for numbers in needless_hashes(&removed, self.frontier.log.frontier.size(), gone) {
            self.nodes.extract_if(numbers, |_, _| true).for_each(drop);
        }
    }

    fn parts(&self, leaves: Range<u64>, limits: PageLimits) -> Option<Vec<Part>> {
        let records = self.leaves.iter().filter(|(_, leaf)| leaves.contains(leaf)).take(limits.records);
        let records = records.filter_map(|(revision, leaf)| Some((*leaf, &self.records.get(revision)?.bytes)));
        let records: BTreeMap<_, _> = records.collect();
        let entry = |leaf: u64| {
            let record = records.get(&leaf).map(|bytes| Entry::Cycle(bytes));
            let event = || Some(Entry::Audit(&self.events.get(&leaf)?.bytes));
            let control = || Some(Entry::Control(self.control.get(&leaf)?));
            Some(record.or_else(event).or_else(control)?.to_bytes())
        };
        let (mut parts, mut bytes, mut next) = (Vec::new(), 0, leaves.start);
        while next < leaves.end && parts.len() < limits.records {
            let part = if let Some(entry) = entry(next) {
                bytes += entry.len();
                Part::entry(next, entry.into())
            } else {
                // The leaves on its left are in an earlier part.
                let is_next =
                    |beside: Range<u64>| Ok(beside.start > next && self.entries.range(beside).next().is_none());
                let Ok(subtree) = Node::largest_of::<Infallible>(next, leaves.end, is_next);
                Part { subtree, content: Content::Hash(*self.nodes.get(&subtree.number())?) }
            };
            if !parts.is_empty() && bytes > limits.bytes {
                break;
            }
            next = part.subtree.leaves().end;
            parts.push(part);
        }
        Some(parts)
    }

    fn excess(&self, retention: &Retention, now: Timestamp, limit: usize) -> Excess {
        let mut records = Vec::new();
        for (rule, states) in rules(retention) {
            let of_rule: Vec<_> = self.records.values().filter(|record| states.contains(&record.state)).collect();
            let limits = rule.limits(of_rule.len() as u64, now);
            let old = |record: &Record| {
                let Record { revision, state, finished_at, .. } = *record;
                (OldRecord { revision, leaf: self.leaves.get(&revision).copied(), state }, finished_at)
            };
            records.extend(limits.excess(of_rule.into_iter().map(old)));
        }
        records.retain(|record| record.revision < self.frontier.last_revision);
        records.sort_unstable();
        records.truncate(limit);
        let is_kept = |revision| records.binary_search_by_key(&revision, |record| record.revision).is_err();
        let first_kept = self.leaves.iter().find(|(revision, _)| is_kept(**revision)).map_or(0, |(_, leaf)| *leaf);
        let mut events = Vec::new();
        for kind in EventKind::ALL {
            let of_kind: Vec<_> = self.events.iter().filter(|(_, event)| event.kind == kind).collect();
            let oldest = of_kind.iter().map(|(leaf, event)| (OldEvent { leaf: **leaf, kind }, event.time));
            events.extend(retention.events.limits(of_kind.len() as u64, now).excess(oldest));
        }
        events.sort_unstable();
        events.truncate(limit - records.len());
        let is_kept = |leaf| events.binary_search_by_key(&leaf, |event| event.leaf).is_err();
        let first_event = self.events.keys().copied().find(|leaf| is_kept(*leaf)).unwrap_or(u64::MAX);
        Excess {
            first_kept: first_kept.min(first_event).max(self.frontier.log.first_kept),
            records,
            events,
            is_partial: false,
            damaged: None,
        }
    }
}

fn put<T: Clone>(known: &mut BTreeMap<Name, T>, name: &Name, now: Option<&T>) {
    match now {
        Some(now) => drop(known.insert(name.clone(), now.clone())),
        None => drop(known.remove(name)),
    }
}

impl Store for MemoryStore {
    fn take_over(&self, _: Seals) -> BoxFuture<'_, Result<Contents, StoreError>> {
        Box::pin(ready(Ok(self.kept().take_over(self.clock.now()))))
    }

    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(ready(self.kept().commit(&write)))
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        Box::pin(stream::pending())
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let kept = self.kept();
        let found = kept.revisions.get(&cycle_id).and_then(|revision| kept.records.get(revision)).cloned();
        Box::pin(ready(Ok(found.map(Ok))))
    }

    fn cycle_of_request(&self, request: RequestKey) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let kept = self.kept();
        let found = kept.records.values().rev().find(|record| record.is_of(&request));
        Box::pin(ready(Ok(found.cloned().map(Ok))))
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        limits: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        let kept = self.kept();
        let mut page = Page::default();
        let mut bytes = 0;
        for record in kept.records.range(..before).rev().map(|(_, record)| record) {
            let is_full = page.records.len() == limits.records
                || (!page.records.is_empty() && bytes + record.bytes.len() > limits.bytes);
            if page.scanned == SCAN_LIMIT || (is_full && filter.wants(record)) {
                page.next = Some(record.revision.next());
                break;
            }
            if filter.wants(record) {
                bytes += record.bytes.len();
                page.records.push(Ok(record.clone()));
            }
            page.scanned += 1;
        }
        Box::pin(ready(Ok(page)))
    }

    fn cycles_after(&self, revision: Revision, limits: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>> {
        let kept = self.kept();
        let newest = kept.frontier.last_revision;
        if revision < kept.pruned_to || revision > newest {
            let oldest = kept.pruned_to.next();
            return Box::pin(ready(Err(ResumeError::NotRetained { oldest, newest })));
        }
        let mut records: Vec<Found> = Vec::new();
        let mut bytes = 0;
        for record in kept.records.range(revision.next()..).map(|(_, record)| record) {
            bytes += record.bytes.len();
            if records.len() == limits.records || (!records.is_empty() && bytes > limits.bytes) {
                break;
            }
            records.push(Ok(record.clone()));
        }
        Box::pin(ready(Ok(records)))
    }

    fn events_before(
        &self,
        before: u64,
        filter: EventFilter,
        limit: usize,
    ) -> BoxFuture<'_, Result<EventPage, StoreError>> {
        let kept = self.kept();
        let mut page = EventPage::default();
        for (scanned, (leaf, entry)) in kept.events.range(..before).rev().enumerate() {
            let is_wanted = filter.wants(entry);
            if scanned == SCAN_LIMIT || (is_wanted && page.events.len() == limit) {
                page.next = Some(leaf + 1);
                break;
            }
            if is_wanted {
                page.events.push(Ok(LoggedEvent { leaf: *leaf, entry: entry.clone() }));
            }
        }
        Box::pin(ready(Ok(page)))
    }

    fn excess(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Excess, StoreError>> {
        let kept = self.kept();
        let is_taken_over = kept.epoch != Epoch::default();
        let excess = if is_taken_over { Ok(kept.excess(&retention, now, limit)) } else { Err(not_taken_over()) };
        Box::pin(ready(excess))
    }

    fn log(&self) -> Log {
        self.kept().frontier.log.clone()
    }

    fn leaf(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<u64>, StoreError>> {
        let kept = self.kept();
        let leaf = kept.revisions.get(&cycle_id).and_then(|revision| kept.leaves.get(revision)).copied();
        Box::pin(ready(Ok(leaf)))
    }

    fn nodes(&self, nodes: Vec<Node>) -> BoxFuture<'_, Result<Option<Vec<Hash>>, StoreError>> {
        let kept = self.kept();
        let hashes = nodes.into_iter().map(|node| kept.nodes.get(&node.number()).copied()).collect();
        Box::pin(ready(Ok(hashes)))
    }

    fn parts(&self, leaves: Range<u64>, limits: PageLimits) -> BoxFuture<'_, Result<Option<Vec<Part>>, StoreError>> {
        Box::pin(ready(Ok(self.kept().parts(leaves, limits))))
    }

    fn publish_checkpoint(&self, _: String) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(ready(Ok(())))
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        let kept = self.kept();
        let size = StoreSize { records: kept.records.len() as u64, bytes: kept.bytes };
        Box::pin(ready(Ok(size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ports::RetentionRule,
        store::suite::{at, filled, pruned, recorded, seals},
    };

    #[tokio::test]
    async fn its_size_is_that_of_the_records_that_are_left() {
        let store = MemoryStore::new(Clock::system());
        let epoch = store.take_over(seals()).await.unwrap().epoch;
        filled(&store, epoch, 30).await;
        assert_eq!(store.size().await.unwrap(), StoreSize { records: 30, bytes: 3000 });
        let rule = RetentionRule { max_cycles: Some(2), max_age: None };
        let two = Retention { default: rule, ..Retention::default() };
        pruned(&store, &recorded(1..=30, epoch), two, at(0), 100).await;
        assert_eq!(store.size().await.unwrap(), StoreSize { records: 2, bytes: 200 });
    }
}
