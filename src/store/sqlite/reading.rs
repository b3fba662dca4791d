//! Reads the history, over a few connections of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rusqlite::{Connection, OptionalExtension, Params, Rows};
use tokio::sync::Semaphore;

use super::{
    error::{explain, unavailable},
    place::log_of,
    rows::{COLUMNS, HAS_REVISION, Snapshot, number},
};
use crate::{
    model::{CycleId, RequestKey, Revision},
    ports::{Found, StoreError, StoreSize},
    store::{
        entries::{Reading, Rows as _, StoredEntry, Table},
        pages::{Each, History, record_of},
        row::integer,
    },
};

/// Number of reading connections: pages of the history are short, and two keep two cores busy.
const READERS: usize = 2;

/// The connections that read.
pub(super) struct Readers {
    path: Arc<PathBuf>,
    connect: Connect,
    idle: Arc<Mutex<Vec<Connection>>>,
    permits: Arc<Semaphore>,
}

/// Opens a connection to the database at this path.
pub(super) type Connect = fn(&Path) -> rusqlite::Result<Connection>;

impl Readers {
    pub(super) fn of(path: &Arc<PathBuf>, connect: Connect) -> rusqlite::Result<Self> {
        let connections = (0..READERS).map(|_| connect(path)).collect::<Result<_, _>>()?;
        let (idle, permits) = (Arc::new(Mutex::new(connections)), Arc::new(Semaphore::new(READERS)));
        Ok(Self { path: path.clone(), connect, idle, permits })
    }

    /// Reads on a blocking thread.
    pub(super) async fn read<T, E>(
        &self,
        read: impl FnOnce(&mut Connection) -> Result<T, ReadError<E>> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let path = self.path.clone();
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.map_err(|error| unavailable(&path, error.to_string()))?;
        let (idle, connect) = (self.idle.clone(), self.connect);
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let pooled = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut connection = match pooled {
                Some(connection) => connection,
                None => connect(&path).map_err(|error| explain(&path, &error))?,
            };
            let result = read(&mut connection);
            idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            result.map_err(|error| match error {
                ReadError::Sqlite(error) => explain(&path, &error).into(),
                ReadError::Refused(error) => error,
            })
        });
        task.await.unwrap_or_else(|error| Err(unavailable(&self.path, error.to_string()).into()))
    }
}

/// Why a read has failed.
pub(super) enum ReadError<E> {
    Sqlite(rusqlite::Error),
    /// The request can't be answered.
    Refused(E),
}
impl<E> From<rusqlite::Error> for ReadError<E> {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// The result of a read that can't be refused.
type ReadResult<T> = Result<T, ReadError<StoreError>>;

pub(super) fn cycle(connection: &mut Connection, how: Reading, cycle_id: CycleId) -> ReadResult<Option<Found>> {
    let by_id = format!("SELECT {COLUMNS} FROM cycles WHERE cycle_id = ?1");
    one(connection, how, &by_id, [integer(cycle_id.0)])
}

pub(super) fn cycle_of_request(
    connection: &mut Connection,
    how: Reading,
    request: &RequestKey,
) -> ReadResult<Option<Found>> {
    // Few callers have the same id, so the index of ids is enough.
    let newest = format!(
        "SELECT {COLUMNS} FROM cycles WHERE request_id = ?1 AND triggered_by IS ?2 ORDER BY revision DESC LIMIT 1"
    );
    let key = (&request.request_id, request.triggered_by.as_ref().map(ToString::to_string));
    one(connection, how, &newest, key)
}

/// The record that this query finds.
fn one(connection: &mut Connection, how: Reading, query: &str, key: impl Params) -> ReadResult<Option<Found>> {
    // One transaction, so that a record that is pruned meanwhile has its hash.
    let transaction = connection.transaction()?;
    let mut query = transaction.prepare_cached(query)?;
    let row = query.query_row(key, |row| Ok(StoredEntry::of(Table::Records, row)?)).optional()?;
    Ok(row.map(|row| record_of(&mut Snapshot(&transaction), how, &row)).transpose()?)
}

/// Reads in one transaction, so that entries that are pruned meanwhile don't look missing.
pub(super) fn at_once<T, E>(
    connection: &mut Connection,
    read: impl FnOnce(&mut Snapshot<'_>) -> rusqlite::Result<T>,
) -> Result<T, ReadError<E>> {
    let transaction = connection.transaction()?;
    Ok(read(&mut Snapshot(&transaction))?)
}

impl History for Snapshot<'_> {
    fn range(&mut self) -> rusqlite::Result<(Revision, Revision)> {
        self.0
            .prepare_cached("SELECT pruned_to, last_revision FROM meta")?
            .query_row([], |row| Ok((Revision(number(row, 0)?), Revision(number(row, 1)?))))
    }

    fn records_below(&mut self, before: u64, request_id: Option<&str>, each: Each<'_>) -> rusqlite::Result<()> {
        let of_request = if request_id.is_some() { "request_id = ?2 AND" } else { "" };
        let mut query = self.0.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM cycles WHERE {of_request} {HAS_REVISION} AND revision < ?1 ORDER BY revision DESC"
        ))?;
        let before = integer(before);
        let rows = match request_id {
            Some(request_id) => query.query((before, request_id)),
            None => query.query([before]),
        };
        each_row(rows?, each)
    }

    fn events_below(&mut self, before: u64, each: Each<'_>) -> rusqlite::Result<()> {
        let mut query = self.0.prepare_cached("SELECT * FROM audit WHERE leaf < ?1 ORDER BY leaf DESC")?;
        each_row(query.query([integer(before)])?, each)
    }

    fn rows_at(&mut self, table: Table, places: &[u64]) -> rusqlite::Result<Vec<StoredEntry>> {
        // Each is found at once.
        let Some(place) = places.first() else { return Ok(Vec::new()) };
        self.rows(table, *place, 1)
    }
}

/// Goes through rows.
fn each_row(mut rows: Rows<'_>, each: Each<'_>) -> rusqlite::Result<()> {
    while let Some(row) = rows.next()? {
        if each(row)?.is_break() {
            break;
        }
    }
    Ok(())
}

pub(super) fn size(connection: &Connection, path: &Path) -> ReadResult<StoreSize> {
    let records = "SELECT succeeded + degraded + failed + cancelled + interrupted FROM meta";
    let records = connection.prepare_cached(records)?.query_row([], |row| number(row, 0))?;
    let files = [path.to_path_buf(), log_of(path)];
    let bytes = files.iter().map(|file| fs::metadata(file).map_or(0, |file| file.len())).sum();
    Ok(StoreSize { records, bytes })
}
