//! The seals of a store: one of the end of its log and of how far the history goes, in the table `meta`, and one in
//! each row of the tables that later cycles depend on. A program that changes a row, or appends to the log, can't make
//! the seal that belongs to it.

use std::cell::Cell;

use super::{
    counts::Counts,
    row::{Row, Value, Wrong},
};
use crate::ledger::{Frontier, Hash, SealKeys, Sealed, SealedBy};

/// A table whose rows are sealed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) name: &'static str,
    /// What one row is.
    pub(super) row: &'static str,
    /// The sealed columns; the first one is the primary key.
    pub(super) columns: &'static [&'static str],
}

pub(super) const SUBSYSTEMS: Table = Table {
    name: "subsystems",
    row: "subsystem",
    columns: &["name", "spec", "lease_ms", "suspended", "owner", "former_names"],
};
pub(super) const LOOPS: Table = Table { name: "loops", row: "loop", columns: &["name", "spec", "state"] };
pub(super) const OUTPUTS: Table = Table { name: "outputs", row: "output", columns: &["name", "cycle_id", "payload"] };
pub(super) const OPEN_CYCLES: Table = Table {
    name: "open_cycles",
    row: "open cycle",
    columns: &[
        "cycle_id",
        "trigger",
        "loop",
        "scheduled_at",
        "started_at",
        "request_id",
        "triggered_by",
        "trace_id",
        "request",
        "audit",
    ],
};
/// All of them.
pub(super) const TABLES: [&Table; 4] = [&SUBSYSTEMS, &LOOPS, &OUTPUTS, &OPEN_CYCLES];

/// The columns of the table `meta` that are sealed with the end of the log, before those of [`Counts`]: the epoch, and
/// how far the history goes. A process that takes over raises the epoch with its first commit, which has its own
/// seal. Not what says which file and which start of the machine it was, which change without a process that has the
/// key.
pub(super) const META: [&str; 10] = [
    "epoch",
    "last_cycle_id",
    "last_revision",
    "pruned_to",
    "commits",
    "is_closed",
    "log_first_kept",
    "log_removed",
    "log_counted_at",
    "unlogged_to",
];

/// The sealed columns of the table `meta`.
pub(super) fn meta_columns() -> impl Iterator<Item = &'static str> {
    META.into_iter().chain(Counts::COLUMNS)
}

/// Seals one store.
pub(super) struct Sealer {
    keys: SealKeys,
    /// Sealed with each row, so that a row of another store with the same key does not pass.
    store_id: [u8; 16],
    /// The bytes that were sealed last: a commit seals many rows, and needs memory once.
    sealed: Cell<Sealed>,
}

/// What the seal of a row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seal {
    Valid(SealedBy),
    /// It has none.
    Missing,
    /// It does not belong to the row.
    Wrong,
}

/// The rows that are sealed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Renewal {
    /// Those that another key has sealed.
    OtherKey,
    /// Those without a seal as well: an earlier version wrote the store.
    Missing,
    /// Those with a wrong seal as well.
    Everything,
}

impl Sealer {
    pub(super) fn new(keys: SealKeys, store_id: [u8; 16]) -> Self {
        Self { keys, store_id, sealed: Cell::default() }
    }

    /// The seal of the end of this log, and of these values of [`meta_columns`].
    pub(super) fn end<'a>(&self, log: &Frontier, values: impl IntoIterator<Item = Value<'a>>) -> [u8; Hash::LEN] {
        self.with(|sealed| self.add_end(sealed, log, values), |sealed| self.keys.seal(sealed))
    }

    /// Whether the seal of this row of `meta` is that of its columns and of the end of this log.
    pub(super) fn check_end(&self, meta: &dyn Row, log: &Frontier) -> Result<Seal, Wrong> {
        let values = values(meta, meta_columns())?;
        self.check(meta, |sealed| self.add_end(sealed, log, values))
    }

    /// The seal of a row with these values of the sealed columns of the table.
    pub(super) fn row<'a>(&self, table: &Table, values: impl IntoIterator<Item = Value<'a>>) -> [u8; Hash::LEN] {
        self.with(|sealed| self.add_row(sealed, table.name, values), |sealed| self.keys.seal(sealed))
    }

    /// Whether the seal of a row, which has all columns of the table, belongs to it.
    pub(super) fn check_row(&self, row: &dyn Row, table: &Table) -> Result<Seal, Wrong> {
        let values = values(row, table.columns.iter().copied())?;
        self.check(row, |sealed| self.add_row(sealed, table.name, values))
    }

    /// The seal of a row that is to be sealed anew; `None` if it is not.
    pub(super) fn renewed(
        &self,
        row: &dyn Row,
        table: &Table,
        renewal: Renewal,
    ) -> Result<Option<[u8; Hash::LEN]>, Wrong> {
        let is_renewed = match self.check_row(row, table)? {
            Seal::Valid(SealedBy::FirstKey) => false,
            Seal::Valid(SealedBy::OtherKey) => true,
            Seal::Missing => renewal >= Renewal::Missing,
            // Otherwise it belongs to a row that can't be read, and stays wrong.
            Seal::Wrong => renewal == Renewal::Everything,
        };
        if !is_renewed {
            return Ok(None);
        }
        Ok(Some(self.row(table, values(row, table.columns.iter().copied())?)))
    }

    fn check(&self, row: &dyn Row, add: impl FnOnce(&mut Sealed)) -> Result<Seal, Wrong> {
        let seal = match row.value("seal")? {
            Value::Blob(seal) => seal,
            Value::Null => return Ok(Seal::Missing),
            _ => return Ok(Seal::Wrong),
        };
        let by = self.with(add, |sealed| self.keys.check(sealed, seal));
        Ok(by.map_or(Seal::Wrong, Seal::Valid))
    }

    /// Uses the bytes that are added.
    fn with<T>(&self, add: impl FnOnce(&mut Sealed), use_them: impl FnOnce(&Sealed) -> T) -> T {
        let mut sealed = self.sealed.take();
        sealed.clear();
        add(&mut sealed);
        let used = use_them(&sealed);
        self.sealed.set(sealed);
        used
    }

    /// Adds the end of a log, and the values of [`meta_columns`].
    fn add_end<'a>(&self, sealed: &mut Sealed, log: &Frontier, values: impl IntoIterator<Item = Value<'a>>) {
        self.keys.add_end(sealed, log);
        self.add_row(sealed, "meta", values);
    }

    /// Adds a row: the store, the table, and each value with its type.
    fn add_row<'a>(&self, sealed: &mut Sealed, table: &str, values: impl IntoIterator<Item = Value<'a>>) {
        sealed.add(&self.store_id);
        sealed.add(table.as_bytes());
        values.into_iter().for_each(|value| add_value(sealed, value));
    }
}

/// Adds a value of a row, with its type.
fn add_value(sealed: &mut Sealed, value: Value<'_>) {
    let mut add = |kind: &str, value: &[u8]| {
        sealed.add(kind.as_bytes());
        sealed.add(value);
    };
    match value {
        Value::Null => add("null", &[]),
        Value::Integer(number) => add("integer", &number.to_be_bytes()),
        Value::Real(number) => add("real", &number.to_be_bytes()),
        Value::Text(text) => add("text", text),
        Value::Blob(bytes) => add("blob", bytes),
    }
}

/// The values of these columns.
fn values(row: &dyn Row, columns: impl Iterator<Item = &'static str>) -> Result<Vec<Value<'_>>, Wrong> {
    columns.map(|column| row.value(column)).collect()
}
