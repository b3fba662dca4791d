//! The numbers of records and audit events, by which retention decides. They are sealed with the other numbers of the
//! table `meta`.

use std::array;

use super::{
    row::{Row, Wrong, integer, number},
    walk::Is,
};
use crate::{
    model::{CycleState, EventKind},
    ports::Write,
};

/// The numbers of records of each state, in the order of [`CycleState::ALL`], and then of audit events of each kind, in
/// the order of [`EventKind::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts([u64; Counts::COLUMNS.len()]);

impl Counts {
    /// Their columns in the table `meta`, in the same order.
    pub(super) const COLUMNS: [&str; 8] =
        ["succeeded", "degraded", "failed", "cancelled", "interrupted", "changes", "calls", "denials"];

    /// What the row of the table `meta` says.
    pub(super) fn of_row(meta: &dyn Row) -> Result<Self, Wrong> {
        let mut counts = Self::default();
        for (count, column) in counts.0.iter_mut().zip(Self::COLUMNS) {
            *count = number(meta, column)?;
        }
        Ok(counts)
    }

    /// These numbers of records and events.
    pub(super) fn of<E>(
        mut records: impl FnMut(CycleState) -> Result<u64, E>,
        mut events: impl FnMut(EventKind) -> Result<u64, E>,
    ) -> Result<Self, E> {
        let mut counts = Self::default();
        for state in CycleState::ALL {
            counts.0[of_state(state)] = records(state)?;
        }
        for kind in EventKind::ALL {
            counts.0[of_kind(kind)] = events(kind)?;
        }
        Ok(counts)
    }

    /// Counts what this write adds.
    pub(super) fn add(&mut self, write: &Write) {
        for record in &write.records {
            self.0[of_state(record.state)] += 1;
        }
        for event in &write.audit {
            self.0[of_kind(event.kind)] += 1;
        }
    }

    /// Counts an entry.
    pub(super) fn add_entry(&mut self, is: Is) {
        match is {
            Is::Record(state, _) => self.0[of_state(state)] += 1,
            Is::Event(kind, _) => self.0[of_kind(kind)] += 1,
            Is::Other => {}
        }
    }

    /// Counts a removed record.
    pub(super) fn remove_record(&mut self, state: CycleState) {
        self.0[of_state(state)] = self.0[of_state(state)].saturating_sub(1);
    }

    /// Counts a removed audit event.
    pub(super) fn remove_event(&mut self, kind: EventKind) {
        self.0[of_kind(kind)] = self.0[of_kind(kind)].saturating_sub(1);
    }

    pub(super) fn records_of(&self, state: CycleState) -> u64 {
        self.0[of_state(state)]
    }

    pub(super) fn events_of(&self, kind: EventKind) -> u64 {
        self.0[of_kind(kind)]
    }

    /// The values of the columns.
    pub(super) fn columns(self) -> [i64; Self::COLUMNS.len()] {
        array::from_fn(|index| integer(self.0[index]))
    }
}

fn of_state(state: CycleState) -> usize {
    CycleState::ALL.iter().position(|known| *known == state).unwrap_or_default()
}

fn of_kind(kind: EventKind) -> usize {
    CycleState::ALL.len() + EventKind::ALL.iter().position(|known| *known == kind).unwrap_or_default()
}
