//! Rows of SQLite's tables.

use rusqlite::{Connection, OptionalExtension, RowIndex, types::ValueRef};

use super::log;
use crate::{
    ledger::{Hash, Node},
    model::Epoch,
    store::{
        contents::{Read, Tables},
        entries::{MOST_BYTES, Rows, StoredEntry, Table},
        row::{Row, Value, Wrong, integer},
        seal::{self, OPEN_CYCLES, OUTPUTS},
    },
};

/// In this order, so that a row can be examined without reading the record, which is last and may be large.
pub(super) const COLUMNS: &str =
    "revision, cycle_id, epoch, state, trigger, loop, request_id, triggered_by, finished_at, leaf, record";

/// Condition that a row has a place in the history: the revision of an earlier version may have been unreadable. Reads
/// by revision don't find such a row.
pub(super) const HAS_REVISION: &str = "revision > 0";

/// The entry in the table `control`; `NULL` if it is larger than [`MAX_CONTROL`](crate::store::entries::MAX_CONTROL).
pub(super) const CONTROL_ENTRY: &str = "CASE WHEN length(entry) <= 1048576 THEN entry END";

/// A database within one transaction.
pub(super) struct Snapshot<'t>(pub(super) &'t Connection);

impl Row for rusqlite::Row<'_> {
    fn value(&self, column: &str) -> Result<Value<'_>, Wrong> {
        let value = self.get_ref(column).map_err(|error| Wrong::new(column, format!("is not there: {error}")))?;
        Ok(value_of(value))
    }
}

pub(super) fn value_of(value: ValueRef<'_>) -> Value<'_> {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Real(number) => Value::Real(number),
        ValueRef::Text(text) => Value::Text(text),
        ValueRef::Blob(bytes) => Value::Blob(bytes),
    }
}

/// A value that no version of this software has written.
impl From<Wrong> for rusqlite::Error {
    fn from(wrong: Wrong) -> Self {
        Self::ToSqlConversionFailure(Box::new(wrong))
    }
}

impl Rows for Snapshot<'_> {
    type Error = rusqlite::Error;

    fn rows(&mut self, table: Table, from: u64, limit: usize) -> rusqlite::Result<Vec<StoredEntry>> {
        let mut query = match table {
            Table::Records => self.0.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} AND revision >= ?1 ORDER BY revision"
            )),
            Table::Events => self.0.prepare_cached("SELECT * FROM audit WHERE leaf >= ?1 ORDER BY leaf"),
            Table::Controls => self.0.prepare_cached(&format!(
                "SELECT leaf, {CONTROL_ENTRY} AS entry FROM control WHERE leaf >= ?1 ORDER BY leaf"
            )),
        }?;
        let mut rows = query.query([integer(from)])?;
        let (mut found, mut bytes) = (Vec::new(), 0);
        while found.len() < limit
            && bytes < MOST_BYTES
            && let Some(row) = rows.next()?
        {
            let entry = StoredEntry::of(table, row)?;
            bytes += entry.bytes.len();
            found.push(entry);
        }
        Ok(found)
    }

    fn hash(&mut self, node: Node) -> rusqlite::Result<Option<Hash>> {
        log::hash(self.0, node.number())
    }
}

impl Tables for Snapshot<'_> {
    fn store_id(&mut self) -> rusqlite::Result<[u8; 16]> {
        self.0.query_row("SELECT database_id FROM meta", [], |row| row.get(0))
    }

    fn meta(&mut self, read: Read<'_>) -> rusqlite::Result<()> {
        self.0.query_row("SELECT * FROM meta", [], |row| Ok(read(row)?))
    }

    fn sealed(&mut self, table: &seal::Table, read: Read<'_>) -> rusqlite::Result<()> {
        let (name, key) = (table.name, table.columns[0]);
        let query = if *table == OPEN_CYCLES {
            "SELECT *, EXISTS (SELECT 1 FROM cycles WHERE cycle_id = open_cycles.cycle_id) AS is_recorded
             FROM open_cycles ORDER BY cycle_id"
                .to_owned()
        } else if *table == OUTPUTS {
            "SELECT outputs.*, finished_at FROM outputs LEFT JOIN cycles USING (cycle_id) ORDER BY name".to_owned()
        } else {
            format!("SELECT * FROM {name} ORDER BY {key}")
        };
        let mut query = self.0.prepare(&query)?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            read(row)?;
        }
        Ok(())
    }

    fn end_of_hashes(&mut self) -> rusqlite::Result<u64> {
        let end = self.0.query_row("SELECT max(id) + 1 FROM hashes", [], |row| row.get::<_, Option<i64>>(0))?;
        // A number that is negative is that of no log.
        Ok(end.map_or(0, |end| u64::try_from(end).unwrap_or(u64::MAX)))
    }

    fn last_record(&mut self) -> rusqlite::Result<Option<StoredEntry>> {
        let last = format!("SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} ORDER BY revision DESC LIMIT 1");
        self.0.query_row(&last, [], |row| Ok(StoredEntry::of(Table::Records, row)?)).optional()
    }

    fn newest_cycle_id(&mut self) -> rusqlite::Result<Option<u64>> {
        // From the end of its index.
        let newest = "SELECT cycle_id FROM cycles WHERE typeof(cycle_id) = 'integer' ORDER BY cycle_id DESC LIMIT 1";
        let newest: Option<i64> = self.0.query_row(newest, [], |row| row.get(0)).optional()?;
        Ok(newest.and_then(|newest| u64::try_from(newest).ok()))
    }

    fn last_leaf(&mut self, table: Table) -> rusqlite::Result<Option<u64>> {
        let query = match table {
            Table::Records => "SELECT max(leaf) FROM cycles",
            Table::Events => "SELECT max(leaf) FROM audit",
            Table::Controls => "SELECT max(leaf) FROM control",
        };
        let last: Option<i64> = self.0.query_row(query, [], |row| row.get(0))?;
        Ok(last.and_then(|last| u64::try_from(last).ok()))
    }
}

/// The epoch of a database.
pub(super) fn epoch(connection: &Connection) -> rusqlite::Result<Epoch> {
    connection.query_row("SELECT epoch FROM meta", [], |row| number(row, 0)).map(Epoch)
}

/// A number that is not negative, as all are that this software writes.
pub(super) fn number(row: &rusqlite::Row<'_>, column: impl RowIndex) -> rusqlite::Result<u64> {
    let number: i64 = row.get(column)?;
    let index = column.idx(row.as_ref())?;
    u64::try_from(number).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(index, number))
}

pub(super) fn to_json<T: serde::Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}
