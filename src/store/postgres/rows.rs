//! Rows of PostgreSQL's tables, as of one moment.

use std::{collections::BTreeMap, fmt, future::Future, ops::ControlFlow, time::Duration};

use tokio::{runtime::Handle, time::timeout};
use tokio_postgres::{Error, types::Type};

use super::{
    connect::{ANSWER, Connection, Server},
    parameter::Parameter,
};
use crate::{
    ledger::{Hash, Node},
    model::{Epoch, Revision},
    ports::StoreError,
    store::{
        contents::{Read, Tables},
        entries::{MAX_CONTROL, MOST_BYTES, Rows, StoredEntry, Table},
        pages::{Each, History},
        row::{Row, Value, Wrong, integer, number},
        seal::{self, OPEN_CYCLES, OUTPUTS},
    },
};

/// The columns of a record, but the record itself.
const COLUMNS: &str = "revision, cycle_id, epoch, state, trigger, loop, request_id, triggered_by, finished_at, leaf";
/// The column of a text that can have U+0000, which no text of PostgreSQL has: its bytes are stored.
pub(super) const TEXT_AS_BYTES: &str = "request_id";
/// Most rows without their large values that are read at once: as many as the largest page of a list has.
const COLUMN_ROWS: i64 = 1000;
/// Number of nodes whose hashes are read with that of one, on either side: those beside and above it are needed next.
const NODES_AROUND: i64 = 64;
/// Most hashes that are kept, for the same reason.
const KEPT_HASHES: usize = 10_000;

/// Why a row is not read.
#[derive(Debug)]
pub(super) enum Failed {
    Statement(Error),
    /// The server has not answered within this time.
    Late(Duration),
    /// It is not what this software has written.
    Wrong(Wrong),
    /// The server lacks the required record.
    Behind(Lacking),
}

/// A record that the server of a snapshot must have: the revision, and the earliest term that it can be of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Required {
    pub(super) revision: Revision,
    pub(super) epoch: Epoch,
}

/// A server that lacks a required record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lacking {
    server: String,
    known: Revision,
    newest: Revision,
}

impl Required {
    /// Checks that a server with this newest record, whose last term is this one, has the required one.
    ///
    /// # Errors
    /// It lacks that.
    pub(super) fn check(self, server: &Server, newest: Revision, epoch: Epoch) -> Result<(), Lacking> {
        if newest >= self.revision && epoch >= self.epoch {
            return Ok(());
        }
        Err(Lacking { server: server.name.to_string(), known: self.revision, newest })
    }
}

impl Lacking {
    /// The error of this store.
    pub(super) fn of(self, store: String) -> StoreError {
        let Self { server, known, newest } = self;
        StoreError::Behind { store, server, known, newest }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Statement(error)
    }
}

impl From<Wrong> for Failed {
    fn from(wrong: Wrong) -> Self {
        Self::Wrong(wrong)
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Statement(error) => error.fmt(f),
            Self::Late(limit) => write!(f, "the server has not answered within {limit:?}"),
            Self::Wrong(wrong) => wrong.fmt(f),
            Self::Behind(Lacking { server, .. }) => write!(f, "{server} lacks acknowledged records"),
        }
    }
}

impl Row for tokio_postgres::Row {
    fn value(&self, column: &str) -> Result<Value<'_>, Wrong> {
        let found = self.columns().iter().enumerate().find(|(_, known)| known.name() == column);
        let (index, found) = found.ok_or_else(|| Wrong::new(column, "is not there"))?;
        let wrong = |error: Error| Wrong::new(column, format!("can't be read: {error}"));
        let integer = |number: Option<i64>| number.map_or(Value::Null, Value::Integer);
        match *found.type_() {
            Type::INT8 => self.try_get(index).map(integer).map_err(wrong),
            Type::INT4 => self.try_get(index).map(|it: Option<i32>| integer(it.map(Into::into))).map_err(wrong),
            Type::INT2 => self.try_get(index).map(|it: Option<i16>| integer(it.map(Into::into))).map_err(wrong),
            Type::BOOL => self.try_get(index).map(|it: Option<bool>| integer(it.map(Into::into))).map_err(wrong),
            Type::TEXT => {
                let text: Option<&str> = self.try_get(index).map_err(wrong)?;
                Ok(text.map_or(Value::Null, |text| Value::Text(text.as_bytes())))
            }
            Type::BYTEA => {
                let bytes: Option<&[u8]> = self.try_get(index).map_err(wrong)?;
                let value = if column == TEXT_AS_BYTES { Value::Text } else { Value::Blob };
                Ok(bytes.map_or(Value::Null, value))
            }
            ref other => Err(Wrong::new(column, format!("has the type {other}"))),
        }
    }
}

/// How a database is read as of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Each statement within this time. The server ends one that takes longer; if that does not answer, the connection
    /// is given up.
    Within(Duration),
    /// For as long as it takes.
    Patient,
    /// For as long as it takes, after writes that are under way, and before others. It may write.
    Locked,
}

/// A database within one transaction, on a blocking thread.
pub(super) struct Snapshot<'c> {
    connection: &'c Connection,
    runtime: Handle,
    schema: String,
    access: Access,
    /// By the numbers of their nodes; `None` for one that is not there.
    hashes: BTreeMap<u64, Option<Hash>>,
}

/// Reads as of one moment, on a blocking thread, with what the reading needs of the caller. Also returns the connection
/// for further use, and what was given: both are lost if the thread panics. If this is dropped, the reading goes on to
/// its end, and drops both then.
pub(super) async fn at_once<C, S, T, E>(
    connection: C,
    schema: &str,
    access: Access,
    mut given: S,
    read: impl FnOnce(&mut Snapshot<'_>, &mut S) -> Result<T, E> + Send + 'static,
) -> (Option<(C, S)>, Result<T, E>)
where
    C: AsRef<Connection> + Send + 'static,
    S: Send + 'static,
    T: Send + 'static,
    E: From<Failed> + Send + 'static,
{
    let (runtime, schema) = (Handle::current(), schema.to_owned());
    let task = tokio::task::spawn_blocking(move || {
        let read = (|| {
            let mut snapshot = Snapshot::begin(connection.as_ref(), runtime, schema, access)?;
            let read = read(&mut snapshot, &mut given);
            // Also if it has failed: the connection is used again.
            let ended = snapshot.end("ROLLBACK");
            let read = read?;
            ended?;
            Ok(read)
        })();
        ((connection, given), read)
    });
    match task.await {
        Ok((back, read)) => (Some(back), read),
        Err(error) => {
            let wrong = Wrong::new("reader", format!("has ended: {error}"));
            (None, Err(Failed::Wrong(wrong).into()))
        }
    }
}

impl<'c> Snapshot<'c> {
    /// Begins a transaction that reads as of one moment.
    pub(super) fn begin(
        connection: &'c Connection,
        runtime: Handle,
        schema: String,
        access: Access,
    ) -> Result<Self, Failed> {
        let snapshot = Self { connection, runtime, schema, access, hashes: BTreeMap::new() };
        let is_locked = access == Access::Locked;
        let limit = if let Access::Within(limit) = access { Some(limit) } else { None };
        let mut begun = snapshot.answer(connection.begin(is_locked, limit));
        if begun.is_ok() && is_locked {
            begun = snapshot.query("SELECT 1 FROM SCHEMA.meta WHERE id = 0 FOR UPDATE", &[]).map(drop);
        }
        if let Err(error) = begun {
            let _ = snapshot.end("ROLLBACK");
            return Err(error);
        }
        Ok(snapshot)
    }

    /// Ends the transaction: by `COMMIT`, or by `ROLLBACK`.
    pub(super) fn end(self, how: &str) -> Result<(), Failed> {
        self.answer(self.connection.batch_execute(how))
    }

    /// The rows of a query, in which `SCHEMA.` stands for the schema.
    pub(super) fn query(&self, query: &str, parameters: &[&dyn Parameter]) -> Result<Vec<tokio_postgres::Row>, Failed> {
        let query = query.replace("SCHEMA.", &format!("{}.", self.schema));
        self.answer(self.connection.query(&query, parameters))
    }

    /// Waits for the answer to a statement. The limit is kept here, since the reading goes on if nobody awaits it.
    fn answer<T>(&self, statement: impl Future<Output = Result<T, Error>>) -> Result<T, Failed> {
        let Access::Within(limit) = self.access else { return Ok(self.runtime.block_on(statement)?) };
        // The server is the first to end it, if it can.
        let limit = limit + ANSWER;
        let answered = self.runtime.block_on(async { timeout(limit, statement).await });
        let answered = answered.map_err(|_| {
            self.connection.give_up();
            Failed::Late(limit)
        });
        Ok(answered??)
    }

    /// Checks that the history is as long as it must be.
    pub(super) fn check(&self, required: Required) -> Result<(), Failed> {
        if required == Required::default() {
            return Ok(());
        }
        let row = self.one("SELECT last_revision, epoch FROM SCHEMA.meta", &[])?;
        let (revision, epoch) = (Revision(number(&row, "last_revision")?), Epoch(number(&row, "epoch")?));
        required.check(self.connection.server(), revision, epoch).map_err(Failed::Behind)
    }

    /// The only row of a query.
    pub(super) fn one(&self, query: &str, parameters: &[&dyn Parameter]) -> Result<tokio_postgres::Row, Failed> {
        self.query(query, parameters)?.pop().ok_or_else(|| Wrong::new("row", "is not there").into())
    }

    /// The entry that this query finds, if any.
    pub(super) fn record_where(
        &mut self,
        condition: &str,
        parameters: &[&dyn Parameter],
    ) -> Result<Option<StoredEntry>, Failed> {
        let query = format!("SELECT {} FROM SCHEMA.cycles WHERE {condition}", columns(Table::Records));
        Ok(self.query(&query, parameters)?.pop().map(|row| StoredEntry::of(Table::Records, &row)).transpose()?)
    }

    /// The rows of a query that gets the number of the next one, and how many to return.
    fn each(
        &mut self,
        before: u64,
        place: &str,
        each: Each<'_>,
        batch: impl Fn(&Self, i64) -> Result<Vec<tokio_postgres::Row>, Failed>,
    ) -> Result<(), Failed> {
        let mut before = integer(before);
        loop {
            let rows = batch(self, before)?;
            let Some(last) = rows.last() else { return Ok(()) };
            before = integer(number(last, place)?);
            for row in &rows {
                if each(row)? == ControlFlow::Break(()) {
                    return Ok(());
                }
            }
        }
    }
}

/// The table of these entries.
fn table_of(table: Table) -> &'static str {
    match table {
        Table::Records => "cycles",
        Table::Events => "audit",
        Table::Controls => "control",
    }
}

/// The columns of a table `t` whose rows are sealed. No query has all columns by `*`: a later version may add some
/// while this one goes on, and the statements of its sessions would have another result.
pub(super) fn sealed_columns(table: &seal::Table) -> String {
    let columns: Vec<_> = table.columns.iter().copied().chain(["seal"]).map(|column| format!("t.{column}")).collect();
    columns.join(", ")
}

/// The columns of entries.
fn columns(table: Table) -> String {
    match table {
        Table::Records => format!("{COLUMNS}, record"),
        Table::Events => "leaf, kind, time, caller, rpc, denied, event".into(),
        Table::Controls => {
            format!("leaf, CASE WHEN octet_length(entry) <= {MAX_CONTROL} THEN entry END AS entry")
        }
    }
}

impl Rows for Snapshot<'_> {
    type Error = Failed;

    fn rows(&mut self, table: Table, from: u64, limit: usize) -> Result<Vec<StoredEntry>, Failed> {
        let (place, bytes) = (table.place(), table.bytes());
        // The lengths of large values are known without reading these.
        let query = format!(
            "SELECT {} FROM SCHEMA.{} WHERE {place} IN (
                 SELECT {place} FROM (
                     SELECT {place},
                            sum(octet_length({bytes})) OVER (ORDER BY {place}) - octet_length({bytes}) AS before
                     FROM SCHEMA.{} WHERE {place} >= $1 ORDER BY {place} LIMIT $2
                 ) AS first WHERE before < $3
             ) ORDER BY {place}",
            columns(table),
            table_of(table),
            table_of(table)
        );
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let most = i64::try_from(MOST_BYTES).unwrap_or(i64::MAX);
        let rows = self.query(&query, &[&integer(from), &limit, &most])?;
        Ok(rows.iter().map(|row| StoredEntry::of(table, row)).collect::<Result<_, _>>()?)
    }

    fn hash(&mut self, node: Node) -> Result<Option<Hash>, Failed> {
        let wanted = node.number();
        if let Some(hash) = self.hashes.get(&wanted) {
            return Ok(*hash);
        }
        if self.hashes.len() > KEPT_HASHES {
            self.hashes.clear();
        }
        let around = [integer(wanted) - NODES_AROUND, integer(wanted) + NODES_AROUND];
        let query = "SELECT id, hash FROM SCHEMA.hashes WHERE id BETWEEN $1 AND $2";
        for row in self.query(query, &[&around[0], &around[1]])? {
            let hash: &[u8] = row.try_get("hash")?;
            // A value that is not a hash counts as a missing one.
            self.hashes.insert(number(&row, "id")?, hash.try_into().ok().map(Hash));
        }
        Ok(*self.hashes.entry(wanted).or_insert(None))
    }
}

impl Tables for Snapshot<'_> {
    fn store_id(&mut self) -> Result<[u8; 16], Failed> {
        let row = self.one("SELECT store_id FROM SCHEMA.meta", &[])?;
        let id: &[u8] = row.try_get(0)?;
        Ok(id.try_into().map_err(|_| Wrong::new("store_id", "has not 16 bytes"))?)
    }

    fn meta(&mut self, read: Read<'_>) -> Result<(), Failed> {
        let columns: Vec<_> = seal::meta_columns().chain(["log_size", "seal"]).collect();
        Ok(read(&self.one(&format!("SELECT {} FROM SCHEMA.meta", columns.join(", ")), &[])?)?)
    }

    fn sealed(&mut self, table: &seal::Table, read: Read<'_>) -> Result<(), Failed> {
        let (name, key, columns) = (table.name, table.columns[0], sealed_columns(table));
        let query = if *table == OPEN_CYCLES {
            format!(
                "SELECT {columns}, EXISTS (SELECT 1 FROM SCHEMA.cycles c WHERE c.cycle_id = t.cycle_id) AS is_recorded
                 FROM SCHEMA.{name} t ORDER BY {key}"
            )
        } else if *table == OUTPUTS {
            format!(
                "SELECT {columns}, c.finished_at FROM SCHEMA.{name} t
                 LEFT JOIN SCHEMA.cycles c ON c.cycle_id = t.cycle_id ORDER BY t.{key}"
            )
        } else {
            format!("SELECT {columns} FROM SCHEMA.{name} t ORDER BY {key}")
        };
        for row in self.query(&query, &[])? {
            read(&row)?;
        }
        Ok(())
    }

    fn end_of_hashes(&mut self) -> Result<u64, Failed> {
        Ok(number(&self.one("SELECT coalesce(max(id) + 1, 0) AS end FROM SCHEMA.hashes", &[])?, "end")?)
    }

    fn last_record(&mut self) -> Result<Option<StoredEntry>, Failed> {
        self.record_where("revision = (SELECT max(revision) FROM SCHEMA.cycles)", &[])
    }

    fn newest_cycle_id(&mut self) -> Result<Option<u64>, Failed> {
        let newest: Option<i64> = self.one("SELECT max(cycle_id) FROM SCHEMA.cycles", &[])?.try_get(0)?;
        Ok(newest.and_then(|newest| u64::try_from(newest).ok()))
    }

    fn last_leaf(&mut self, table: Table) -> Result<Option<u64>, Failed> {
        let query = format!("SELECT max(leaf) FROM SCHEMA.{}", table_of(table));
        let last: Option<i64> = self.one(&query, &[])?.try_get(0)?;
        Ok(last.and_then(|last| u64::try_from(last).ok()))
    }
}

impl History for Snapshot<'_> {
    fn range(&mut self) -> Result<(Revision, Revision), Failed> {
        let row = self.one("SELECT pruned_to, last_revision FROM SCHEMA.meta", &[])?;
        Ok((Revision(number(&row, "pruned_to")?), Revision(number(&row, "last_revision")?)))
    }

    fn records_below(&mut self, before: u64, request_id: Option<&str>, each: Each<'_>) -> Result<(), Failed> {
        let query = |of_request: &str| {
            format!(
                "SELECT {COLUMNS} FROM SCHEMA.cycles WHERE {of_request} revision < $1 ORDER BY revision DESC
                 LIMIT {COLUMN_ROWS}"
            )
        };
        self.each(before, "revision", each, |snapshot, before| match request_id {
            Some(request_id) => snapshot.query(&query("request_id = $2 AND"), &[&before, &request_id.as_bytes()]),
            None => snapshot.query(&query(""), &[&before]),
        })
    }

    fn events_below(&mut self, before: u64, each: Each<'_>) -> Result<(), Failed> {
        let query = format!(
            "SELECT leaf, kind, time, caller, rpc, denied FROM SCHEMA.audit WHERE leaf < $1 ORDER BY leaf DESC
             LIMIT {COLUMN_ROWS}"
        );
        self.each(before, "leaf", each, |snapshot, before| snapshot.query(&query, &[&before]))
    }

    fn rows_at(&mut self, table: Table, places: &[u64]) -> Result<Vec<StoredEntry>, Failed> {
        let (place, bytes) = (table.place(), table.bytes());
        let query = format!(
            "SELECT {} FROM SCHEMA.{} JOIN (
                 SELECT {place}, sum(octet_length({bytes})) OVER (ORDER BY at) - octet_length({bytes}) AS before, at
                 FROM SCHEMA.{} JOIN unnest($1::bigint[]) WITH ORDINALITY AS wanted ({place}, at) USING ({place})
             ) AS first USING ({place}) WHERE before < $2 ORDER BY at",
            columns(table),
            table_of(table),
            table_of(table)
        );
        let places: Vec<_> = places.iter().take(64).map(|place| integer(*place)).collect();
        let rows = self.query(&query, &[&places, &i64::try_from(MOST_BYTES).unwrap_or(i64::MAX)])?;
        Ok(rows.iter().map(|row| StoredEntry::of(table, row)).collect::<Result<_, _>>()?)
    }
}
