//! The store that forgets: everything is gone when the process ends. For trying things out and for tests: it runs
//! inline, without threads, so that tests can pause the clock.

use std::{
    collections::{BTreeMap, HashMap},
    future::ready,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::BoxFuture;
use jiff::Timestamp;

use super::frontier::Frontier;
use crate::{
    clock::Clock,
    model::{CycleId, CycleState, Epoch, Revision},
    ports::{
        Contents, Filter, Found, Page, PageLimits, Pruned, Record, Retention, RetentionRule, SCAN_LIMIT, Store,
        StoreError, StoreSize, Write,
    },
};

/// Keeps the history in memory. The rest of what it is told only a restart would need, and it does not see one.
pub(super) struct Memory {
    epoch: Epoch,
    history: Mutex<History>,
}

#[derive(Default)]
struct History {
    records: BTreeMap<Revision, Record>,
    /// Where the record of each cycle is among them.
    revisions: HashMap<CycleId, Revision>,
    /// Of all records.
    bytes: u64,
    frontier: Frontier,
    pruned_to: Revision,
}

impl Memory {
    pub(super) fn new(clock: Clock) -> (Self, Contents) {
        let epoch = Epoch::by_clock(clock.now());
        (Self { epoch, history: Mutex::default() }, Contents { epoch, ..Contents::default() })
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Memory {
    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        let mut history = self.history();
        let checked = if write.epoch == self.epoch {
            history.frontier.check(&write).map_err(|defect| StoreError::Ended("memory:".into(), defect))
        } else {
            Err(StoreError::Fenced(self.epoch))
        };
        if checked.is_ok() {
            history.frontier.advance(&write);
            for record in &write.records {
                history.bytes += record.bytes.len() as u64;
                history.revisions.insert(record.cycle_id, record.revision);
                history.records.insert(record.revision, record.clone());
            }
        }
        Box::pin(ready(checked))
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Record>, StoreError>> {
        let history = self.history();
        let found = history.revisions.get(&cycle_id).and_then(|revision| history.records.get(revision)).cloned();
        Box::pin(ready(Ok(found)))
    }

    fn cycle_of_request(&self, request_id: String) -> BoxFuture<'_, Result<Option<Record>, StoreError>> {
        let history = self.history();
        let found = history.records.values().rev().find(|record| record.request_id.as_ref() == Some(&request_id));
        Box::pin(ready(Ok(found.cloned())))
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        limits: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        let history = self.history();
        let mut page = Page::default();
        let mut bytes = 0;
        for record in history.records.range(..before).rev().map(|(_, record)| record) {
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

    fn cycles_after(&self, revision: Revision, limits: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, StoreError>> {
        let history = self.history();
        let newest = history.frontier.last_revision;
        if revision < history.pruned_to || revision > newest {
            let oldest = history.pruned_to.next();
            return Box::pin(ready(Err(StoreError::NotRetained { oldest, newest })));
        }
        let mut records: Vec<Found> = Vec::new();
        let mut bytes = 0;
        for record in history.records.range(revision.next()..).map(|(_, record)| record) {
            bytes += record.bytes.len();
            if records.len() == limits.records || (!records.is_empty() && bytes > limits.bytes) {
                break;
            }
            records.push(Ok(record.clone()));
        }
        Box::pin(ready(Ok(records)))
    }

    fn prune(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Pruned, StoreError>> {
        let mut history = self.history();
        let mut oldest_first: Vec<_> = Vec::new();
        for (rule, states) in retention.rules() {
            let of_rule: Vec<_> = history.records.values().filter(|record| states.contains(&record.state)).collect();
            let keep = history.frontier.last_revision;
            oldest_first.extend(to_prune(
                rule,
                of_rule.len() as u64,
                of_rule.iter().map(|record| (record.revision, record.finished_at)),
                now,
                keep,
            ));
        }
        oldest_first.sort_unstable();
        oldest_first.truncate(limit);
        for revision in &oldest_first {
            if let Some(record) = history.records.remove(revision) {
                history.revisions.remove(&record.cycle_id);
                history.pruned_to = history.pruned_to.max(record.revision);
                history.bytes -= record.bytes.len() as u64;
            }
        }
        let pruned = Pruned { removed: oldest_first.len(), pruned_to: history.pruned_to };
        Box::pin(ready(Ok(pruned)))
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        let history = self.history();
        let size = StoreSize { records: history.records.len() as u64, bytes: history.bytes };
        Box::pin(ready(Ok(size)))
    }
}

/// Which records of one rule go, given how many there are; `oldest` has those with the lowest revisions, in their order.
pub(super) fn to_prune(
    rule: RetentionRule,
    count: u64,
    oldest: impl Iterator<Item = (Revision, Timestamp)>,
    now: Timestamp,
    keep: Revision,
) -> Vec<Revision> {
    let too_many = rule.max_cycles.map_or(0, |max| count.saturating_sub(max));
    let too_old = rule.max_age.and_then(|age| now.checked_sub(age).ok());
    (0_u64..)
        .zip(oldest)
        .take_while(|(i, (_, finished_at))| *i < too_many || too_old.is_some_and(|limit| *finished_at <= limit))
        .map(|(_, (revision, _))| revision)
        .filter(|revision| *revision != keep)
        .collect()
}

impl Retention {
    /// Each rule with the states that it is for.
    pub(super) fn rules(&self) -> Vec<(RetentionRule, Vec<CycleState>)> {
        let own = self.by_state.iter().map(|(state, rule)| (*rule, vec![*state]));
        let others = CycleState::ALL.into_iter().filter(|state| !self.by_state.contains_key(state)).collect();
        own.chain([(self.default, others)]).collect()
    }
}
