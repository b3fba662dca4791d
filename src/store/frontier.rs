//! The frontier of a store, and the writes that are valid next. Every store checks its writes with it, so that all keep
//! the same promise: each id up to the highest noted one is exactly one of open, recorded and pruned, and revisions are
//! dense.

use std::collections::BTreeSet;

use crate::{
    model::{CycleId, Revision},
    ports::Write,
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

    /// Advances by `write`, which was checked.
    pub(super) fn advance(&mut self, write: &Write) {
        self.last_cycle_id = write.last_cycle_id;
        self.open.extend(write.open.iter().map(|open| open.cycle_id));
        for record in &write.records {
            self.open.remove(&record.cycle_id);
            self.last_revision = record.revision;
        }
    }
}
