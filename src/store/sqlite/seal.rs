//! The seals of a database: one of the end of its log and of how far the history goes, in the table `meta`, and one
//! in each row of the tables that later cycles depend on. A program that changes a row, or appends to the log, can't
//! make the seal that belongs to it.

use std::{cell::Cell, sync::LazyLock};

use rusqlite::{
    Row, ToSql, Transaction, params_from_iter,
    types::{ToSqlOutput, ValueRef},
};

use super::{commit::Renewal, counts::Counts, rows::integer};
use crate::ledger::{Frontier, Hash, SealKeys, Sealed, SealedBy};

/// A table whose rows are sealed.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// What one row is.
    pub(super) row: &'static str,
    /// The sealed columns; the first one is the primary key.
    columns: &'static [&'static str],
    /// Writes a row: its sealed columns, and then its seal. Each commit needs it, so it is not put together there.
    put: &'static str,
}

/// Makes a [`Table`] of its name, what one row is, and its sealed columns.
macro_rules! table {
    ($name:literal, $row:literal, [$($column:literal),+]) => {
        Table {
            name: $name,
            row: $row,
            columns: &[$($column),+],
            put: concat!(
                "INSERT OR REPLACE INTO ", $name, " (", $($column, ", ",)+ "seal) VALUES (",
                $(table!(@place_of $column),)+ "?)"
            ),
        }
    };
    (@place_of $column:literal) => { "?, " };
}

pub(super) const SUBSYSTEMS: Table =
    table!("subsystems", "subsystem", ["name", "spec", "lease_ms", "suspended", "owner", "former_names"]);
pub(super) const LOOPS: Table = table!("loops", "loop", ["name", "spec", "state"]);
pub(super) const OUTPUTS: Table = table!("outputs", "output", ["name", "cycle_id", "payload"]);
pub(super) const OPEN_CYCLES: Table = table!(
    "open_cycles",
    "open cycle",
    [
        "cycle_id",
        "trigger",
        "loop",
        "scheduled_at",
        "started_at",
        "request_id",
        "triggered_by",
        "trace_id",
        "request",
        "audit"
    ]
);
/// All of them.
pub(super) const TABLES: [&Table; 4] = [&SUBSYSTEMS, &LOOPS, &OUTPUTS, &OPEN_CYCLES];

/// The columns of the table `meta` that are sealed with the end of the log, before those of [`Counts`]: the epoch, and
/// how far the history goes. A process that takes over raises the epoch with its first commit, which has its own
/// seal. Not what says which file and which start of the machine it was, which change without a process that has the
/// key.
const META: [&str; 10] = [
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

/// Writes the row of the table `meta`, if its epoch is still the expected one: the sealed columns, the size of the log,
/// and the seal.
static PUT_META: LazyLock<String> = LazyLock::new(|| {
    let columns: Vec<_> = meta_columns().chain(["log_size", "seal"]).map(|column| format!("{column} = ?")).collect();
    format!("UPDATE meta SET {} WHERE epoch = ?", columns.join(", "))
});

/// The sealed columns of the table `meta`.
fn meta_columns() -> impl Iterator<Item = &'static str> {
    META.into_iter().chain(Counts::COLUMNS)
}

/// Seals one database.
pub(super) struct Sealer {
    keys: SealKeys,
    /// Sealed with each row, so that a row of another database with the same key does not pass.
    database_id: [u8; 16],
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

impl Sealer {
    pub(super) fn new(keys: SealKeys, database_id: [u8; 16]) -> Self {
        Self { keys, database_id, sealed: Cell::default() }
    }

    /// Writes the row of the table `meta`, with its seal: these values of the columns [`META`], these numbers, and the
    /// size of the log. False, and nothing is written, if the epoch is not `current` any more.
    pub(super) fn put_end(
        &self,
        transaction: &Transaction<'_>,
        log: &Frontier,
        values: [i64; META.len()],
        counts: Counts,
        current: i64,
    ) -> rusqlite::Result<bool> {
        let values = values.into_iter().chain(counts.columns());
        let seal = self.seal(|sealed| self.add_end(sealed, log, values.clone().map(ValueRef::Integer)));
        let seal = ToSqlOutput::Borrowed(ValueRef::Blob(&seal));
        let values = values.chain([integer(log.size())]).map(ToSqlOutput::from);
        let values = values.chain([seal, current.into()]);
        Ok(transaction.prepare_cached(&PUT_META)?.execute(params_from_iter(values))? > 0)
    }

    /// Seals the end of this log, and what the table `meta` contains.
    pub(super) fn seal_end(&self, transaction: &Transaction<'_>, log: &Frontier) -> rusqlite::Result<()> {
        let of_row = |row: &Row<'_>| {
            let values = values(row, meta_columns())?;
            Ok(self.seal(|sealed| self.add_end(sealed, log, values)))
        };
        let seal = transaction.query_row("SELECT * FROM meta", [], of_row)?;
        transaction.execute("UPDATE meta SET seal = ?1", [&seal[..]])?;
        Ok(())
    }

    /// Whether the seal of this row of `meta` is that of its columns and of the end of this log.
    pub(super) fn check_end(&self, meta: &Row<'_>, log: &Frontier) -> rusqlite::Result<Seal> {
        let values = values(meta, meta_columns())?;
        self.check(meta, |sealed| self.add_end(sealed, log, values))
    }

    /// Writes a row, with its seal, over the one with the same key. The values are those of the sealed columns.
    pub(super) fn put<const N: usize>(
        &self,
        transaction: &Transaction<'_>,
        table: &Table,
        values: [&dyn ToSql; N],
    ) -> rusqlite::Result<()> {
        let mut statement = transaction.prepare_cached(table.put)?;
        let mut sealed = self.sealed.take();
        sealed.clear();
        self.add_row(&mut sealed, table.name, []);
        for (index, value) in (1..).zip(values) {
            let value = value.to_sql()?;
            add_value(&mut sealed, value_of(&value)?);
            statement.raw_bind_parameter(index, value)?;
        }
        statement.raw_bind_parameter(N + 1, &self.keys.seal(&sealed)[..])?;
        self.sealed.set(sealed);
        statement.raw_execute()?;
        Ok(())
    }

    /// Whether the seal of a row, which has all columns of the table, belongs to it.
    pub(super) fn check_row(&self, row: &Row<'_>, table: &Table) -> rusqlite::Result<Seal> {
        let values = values(row, table.columns.iter().copied())?;
        self.check(row, |sealed| self.add_row(sealed, table.name, values))
    }

    fn check(&self, row: &Row<'_>, add: impl FnOnce(&mut Sealed)) -> rusqlite::Result<Seal> {
        let seal: Option<Vec<u8>> = row.get("seal")?;
        Ok(Seal::of(seal.as_deref(), |seal| self.with(add, |sealed| self.keys.check(sealed, seal))))
    }

    fn seal(&self, add: impl FnOnce(&mut Sealed)) -> [u8; Hash::LEN] {
        self.with(add, |sealed| self.keys.seal(sealed))
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

    /// Seals rows of a database anew.
    pub(super) fn renew(&self, transaction: &Transaction<'_>, renewal: Renewal) -> rusqlite::Result<()> {
        for table in TABLES {
            let mut query = transaction.prepare(&format!("SELECT *, rowid AS row FROM {}", table.name))?;
            let mut update = transaction.prepare(&format!("UPDATE {} SET seal = ?2 WHERE rowid = ?1", table.name))?;
            let mut rows = query.query([])?;
            let mut renewed = Vec::new();
            while let Some(row) = rows.next()? {
                let is_renewed = match self.check_row(row, table)? {
                    Seal::Valid(SealedBy::FirstKey) => false,
                    Seal::Valid(SealedBy::OtherKey) => true,
                    Seal::Missing => renewal >= Renewal::Missing,
                    // Otherwise it belongs to a row that can't be read, and stays wrong.
                    Seal::Wrong => renewal == Renewal::Everything,
                };
                if !is_renewed {
                    continue;
                }
                let values = values(row, table.columns.iter().copied())?;
                let seal = self.seal(|sealed| self.add_row(sealed, table.name, values));
                renewed.push((row.get::<_, i64>("row")?, seal));
            }
            for (row, seal) in renewed {
                update.execute((row, &seal[..]))?;
            }
        }
        Ok(())
    }

    /// Adds the end of a log, and the values of [`meta_columns`].
    fn add_end<'a>(&self, sealed: &mut Sealed, log: &Frontier, values: impl IntoIterator<Item = ValueRef<'a>>) {
        self.keys.add_end(sealed, log);
        self.add_row(sealed, "meta", values);
    }

    /// Adds a row: the database, the table, and each value with its type.
    fn add_row<'a>(&self, sealed: &mut Sealed, table: &str, values: impl IntoIterator<Item = ValueRef<'a>>) {
        sealed.add(&self.database_id);
        sealed.add(table.as_bytes());
        values.into_iter().for_each(|value| add_value(sealed, value));
    }
}

/// Adds a value of a row, with its type.
fn add_value(sealed: &mut Sealed, value: ValueRef<'_>) {
    let mut add = |kind: &str, value: &[u8]| {
        sealed.add(kind.as_bytes());
        sealed.add(value);
    };
    match value {
        ValueRef::Null => add("null", &[]),
        ValueRef::Integer(number) => add("integer", &number.to_be_bytes()),
        ValueRef::Real(number) => add("real", &number.to_be_bytes()),
        ValueRef::Text(text) => add("text", text),
        ValueRef::Blob(bytes) => add("blob", bytes),
    }
}

impl Seal {
    fn of(stored: Option<&[u8]>, check: impl FnOnce(&[u8]) -> Option<SealedBy>) -> Self {
        stored.map_or(Self::Missing, |seal| check(seal).map_or(Self::Wrong, Self::Valid))
    }
}

/// The values of these columns.
fn values<'r>(row: &'r Row<'_>, columns: impl Iterator<Item = &'static str>) -> rusqlite::Result<Vec<ValueRef<'r>>> {
    columns.map(|column| row.get_ref(column)).collect()
}

/// The value that is written.
///
/// # Errors
/// It is of a kind that takes no value: none of these is used.
fn value_of<'a>(value: &'a ToSqlOutput<'_>) -> rusqlite::Result<ValueRef<'a>> {
    match value {
        ToSqlOutput::Borrowed(value) => Ok(*value),
        ToSqlOutput::Owned(value) => Ok(value.into()),
        _ => Err(rusqlite::Error::ToSqlConversionFailure("it has no value".into())),
    }
}
