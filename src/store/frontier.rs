//! The frontier of a store, and the writes that are valid next. Every store checks its writes with it, so that all keep
//! the same promise: each id up to the highest noted one is exactly one of open, recorded and pruned, and revisions and
//! leaves are dense.

use std::collections::BTreeSet;

use bytes::Bytes;

use crate::{
    ledger::{Entry, Hash, Node},
    model::{CycleId, Revision},
    ports::{AuditEntry, Log, OldRecord, Record, Removal, Write},
};

/// The frontier of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Frontier {
    /// The highest noted id.
    pub(super) last_cycle_id: CycleId,
    /// The highest revision.
    pub(super) last_revision: Revision,
    /// The noted cycles that are not recorded yet.
    pub(super) open: BTreeSet<CycleId>,
    /// The log of the history.
    pub(super) log: Log,
}

/// What a write appends to the log: a leaf for each of its records, in their order, then for each of its audit events,
/// in their order, then for the entry of a new log, and then for that of its removal.
#[derive(Clone, Debug)]
pub(super) struct Appended {
    /// The first of these leaves.
    pub(super) first_leaf: u64,
    /// The number of the first of `nodes`.
    pub(super) first_node: u64,
    /// The nodes that become complete.
    pub(super) nodes: Vec<Hash>,
    /// The log after the write.
    pub(super) log: Log,
}

impl Appended {
    /// What `write` appends to `log`.
    pub(super) fn to(log: &Log, write: &Write) -> Self {
        let Log { mut frontier, first_kept } = log.clone();
        let (first_leaf, first_node) = (frontier.size(), Node::complete_with(frontier.size()));
        let records = write.records.iter().map(|record| Entry::Cycle(&record.bytes));
        let events = write.audit.iter().map(|event| Entry::Audit(&event.bytes));
        let control = write.began.iter().chain(&write.removal.entry).map(|entry| Entry::Control(entry));
        let nodes = records.chain(events).chain(control).flat_map(|entry| frontier.append(entry.leaf())).collect();
        let log = Log { frontier, first_kept: first_kept.max(write.removal.first_kept) };
        Self { first_leaf, first_node, nodes, log }
    }

    /// The records of `write` with their leaves.
    pub(super) fn records<'a>(&self, write: &'a Write) -> impl Iterator<Item = (u64, &'a Record)> {
        (self.first_leaf..).zip(&write.records)
    }

    /// The audit events of `write` with their leaves.
    pub(super) fn events<'a>(&self, write: &'a Write) -> impl Iterator<Item = (u64, &'a AuditEntry)> {
        (self.first_leaf + write.records.len() as u64..).zip(&write.audit)
    }

    /// The control entries of `write` with their leaves.
    pub(super) fn control<'a>(&self, write: &'a Write) -> impl Iterator<Item = (u64, &'a Bytes)> {
        let before = write.records.len() + write.audit.len();
        (self.first_leaf + before as u64..).zip(write.began.iter().chain(&write.removal.entry))
    }
}

impl Frontier {
    /// Checks that `write` is valid next.
    ///
    /// # Errors
    /// It violates a rule of [`Write`], which the message names.
    pub(super) fn check(&self, write: &Write) -> Result<(), String> {
        if write.last_cycle_id < self.last_cycle_id {
            return Err(format!(
                "cycle {} can't be the last one: cycle {} is",
                write.last_cycle_id, self.last_cycle_id
            ));
        }
        let is_new = |cycle_id: CycleId| cycle_id > self.last_cycle_id && cycle_id <= write.last_cycle_id;
        let mut touched = BTreeSet::new();
        let mut revision = self.last_revision;
        for record in &write.records {
            revision = revision.next();
            if record.revision != revision {
                return Err(format!("revision {} is given, but revision {revision} is the next one", record.revision));
            }
        }
        let mut removed = Revision::default();
        for OldRecord { revision, .. } in &write.removal.records {
            if *revision <= removed || *revision >= self.last_revision {
                return Err(format!("revision {revision} can't be removed: it is not in order, or is the newest one"));
            }
            removed = *revision;
        }
        let size = self.log.frontier.size();
        let Removal { events, first_kept, .. } = &write.removal;
        let is_sorted = events.is_sorted_by(|one, next| one.leaf < next.leaf);
        if !is_sorted || events.last().is_some_and(|event| event.leaf >= size) {
            return Err("the removed events are not in order, or are beyond the end of the log".into());
        }
        let first_kept = *first_kept;
        if first_kept > size || (first_kept < self.log.first_kept && !write.removal.is_empty()) {
            return Err(format!("leaf {first_kept} can't be the first that is kept"));
        }
        let cycles = write.records.iter().map(|record| record.cycle_id);
        for cycle_id in cycles.chain(write.open.iter().map(|open| open.cycle_id)) {
            if !is_new(cycle_id) && !self.open.contains(&cycle_id) {
                return Err(format!("cycle {cycle_id} is neither open nor noted with this write"));
            }
            if !touched.insert(cycle_id) {
                return Err(format!("cycle {cycle_id} is twice in one write"));
            }
        }
        let noted = touched.iter().filter(|cycle_id| is_new(**cycle_id)).count() as u64;
        if noted != write.last_cycle_id.0 - self.last_cycle_id.0 {
            return Err(format!(
                "of the cycles after {} up to {}, which are noted with this write, only {noted} are open or recorded \
                 in it",
                self.last_cycle_id, write.last_cycle_id
            ));
        }
        Ok(())
    }

    /// Advances by `write`, which was checked, and by what it appends to the log.
    pub(super) fn advance(&mut self, write: &Write, appended: Appended) {
        self.log = appended.log;
        self.last_cycle_id = write.last_cycle_id;
        self.open.extend(write.open.iter().map(|open| open.cycle_id));
        for record in &write.records {
            self.open.remove(&record.cycle_id);
            self.last_revision = record.revision;
        }
    }
}
