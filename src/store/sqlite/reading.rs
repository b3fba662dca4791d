//! Reads the history, over a few connections of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rusqlite::{Connection, OptionalExtension};
use tokio::sync::Semaphore;

use super::{
    error::{explain, unavailable},
    log,
    place::log_of,
    rows::{COLUMNS, HAS_REVISION, Reading, event, found, integer, number, read},
};
use crate::{
    ledger::Entry,
    model::{CycleId, RequestKey, Revision},
    ports::{
        EventCheck, EventFilter, EventPage, Filter, Found, LoggedEvent, Page, PageLimits, ResumeError, SCAN_LIMIT,
        StoreError, StoreSize, Unreadable, UnreadableEvent,
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

pub(super) fn cycle(connection: &Connection, how: Reading, cycle_id: CycleId) -> ReadResult<Option<Found>> {
    let mut query = connection.prepare_cached(&format!("SELECT {COLUMNS} FROM cycles WHERE cycle_id = ?1"))?;
    Ok(query.query_row([integer(cycle_id.0)], |row| Ok(read(connection, row, how))).optional()?)
}

pub(super) fn cycle_of_request(
    connection: &Connection,
    how: Reading,
    request: &RequestKey,
) -> ReadResult<Option<Found>> {
    // Few callers have the same id, so the index of ids is enough.
    let mut query = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM cycles WHERE request_id = ?1 AND triggered_by IS ?2 ORDER BY revision DESC LIMIT 1"
    ))?;
    let key = (&request.request_id, request.triggered_by.as_ref().map(ToString::to_string));
    Ok(query.query_row(key, |row| Ok(read(connection, row, how))).optional()?)
}

pub(super) fn cycles_before(
    connection: &mut Connection,
    how: Reading,
    before: Revision,
    filter: &Filter,
    limits: PageLimits,
) -> ReadResult<Page> {
    // One transaction, so that records that are pruned meanwhile don't look missing.
    let transaction = connection.transaction()?;
    let (pruned_to, newest) = range(&transaction)?;
    // The records of a request are found by the index of its ids: the revisions between them are not missing.
    let (of_request, complete_above) = match filter.request_id {
        Some(_) => ("request_id = ?2 AND", before),
        None => ("", pruned_to),
    };
    let mut query = transaction.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM cycles WHERE {of_request} {HAS_REVISION} AND revision < ?1 ORDER BY revision DESC"
    ))?;
    let mut rows = match &filter.request_id {
        Some(request_id) => query.query((integer(before.0), request_id))?,
        None => query.query([integer(before.0)])?,
    };
    let mut page = Page::default();
    let (mut bytes, mut next) = (0, before.min(newest.next()));
    loop {
        let row = rows.next()?;
        let at = row.map(|row| number(row, "revision").map(Revision)).transpose()?;
        // Above the pruned revisions, every revision exists.
        while next > at.unwrap_or_default().max(complete_above).next() {
            if page.scanned == SCAN_LIMIT || page.records.len() == limits.records {
                return Ok(Page { next: Some(next), ..page });
            }
            next = Revision(next.0 - 1);
            page.records.push(Err(missing(next)));
            page.scanned += 1;
        }
        let (Some(row), Some(at)) = (row, at) else { return Ok(page) };
        // The record itself is last in a row, and is read only if needed.
        let wanted = found(row).map_or(true, |found| filter.wants(&found));
        if page.scanned == SCAN_LIMIT || (wanted && page.records.len() == limits.records) {
            return Ok(Page { next: Some(at.next()), ..page });
        }
        if wanted {
            let found = read(&transaction, row, how);
            let length = length(&found);
            if !page.records.is_empty() && bytes + length > limits.bytes {
                return Ok(Page { next: Some(at.next()), ..page });
            }
            bytes += length;
            page.records.push(found);
        }
        page.scanned += 1;
        next = at;
    }
}

pub(super) fn cycles_after(
    connection: &mut Connection,
    how: Reading,
    revision: Revision,
    limits: PageLimits,
) -> Result<Vec<Found>, ReadError<ResumeError>> {
    // One transaction, so that nothing is pruned between the check and the reading.
    let transaction = connection.transaction()?;
    let (pruned_to, newest) = range(&transaction)?;
    if revision < pruned_to || revision > newest {
        return Err(ReadError::Refused(ResumeError::NotRetained { oldest: pruned_to.next(), newest }));
    }
    let mut query =
        transaction.prepare_cached(&format!("SELECT {COLUMNS} FROM cycles WHERE revision > ?1 ORDER BY revision"))?;
    let mut rows = query.query([integer(revision.0)])?;
    let mut records: Vec<Found> = Vec::new();
    let (mut bytes, mut next) = (0, revision.next());
    loop {
        let row = rows.next()?;
        let at = match row.map(|row| row.get::<_, i64>("revision")) {
            Some(Ok(at)) => Revision(at.unsigned_abs()),
            // Damaged; the gap is handled below.
            Some(Err(_)) => continue,
            None => newest.next(),
        };
        // Above the pruned revisions, every revision exists.
        while next < at && records.len() < limits.records {
            records.push(Err(missing(next)));
            next = next.next();
        }
        let Some(row) = row.filter(|_| records.len() < limits.records) else { break };
        let found = read(&transaction, row, how);
        bytes += length(&found);
        if !records.is_empty() && bytes > limits.bytes {
            break;
        }
        records.push(found);
        next = at.next();
    }
    Ok(records)
}

pub(super) fn events_before(
    connection: &mut Connection,
    check: EventCheck,
    before: u64,
    filter: &EventFilter,
    limit: usize,
) -> ReadResult<EventPage> {
    // One transaction, so that the hashes of events that are removed meanwhile are there.
    let transaction = connection.transaction()?;
    let mut query = transaction.prepare_cached("SELECT * FROM audit WHERE leaf < ?1 ORDER BY leaf DESC")?;
    let mut rows = query.query([integer(before)])?;
    let (mut page, mut scanned) = (EventPage::default(), 0);
    while let Some(row) = rows.next()? {
        let leaf = number(row, "leaf")?;
        let found = event(row).map_err(|error| error.to_string());
        let is_wanted = found.as_ref().map_or(true, |entry| filter.wants(entry));
        if scanned == SCAN_LIMIT || (is_wanted && page.events.len() == limit) {
            return Ok(EventPage { next: Some(leaf + 1), ..page });
        }
        if is_wanted {
            let checked = found.and_then(|entry| {
                log::check(&transaction, leaf, Entry::Audit(&entry.bytes))?;
                check(&entry)?;
                Ok(LoggedEvent { leaf, entry })
            });
            page.events.push(checked.map_err(|problem| UnreadableEvent { leaf, problem }));
        }
        scanned += 1;
    }
    Ok(page)
}

pub(super) fn size(connection: &Connection, path: &Path) -> ReadResult<StoreSize> {
    let records = "SELECT succeeded + degraded + failed + cancelled + interrupted FROM meta";
    let records = connection.prepare_cached(records)?.query_row([], |row| number(row, 0))?;
    let files = [path.to_path_buf(), log_of(path)];
    let bytes = files.iter().map(|file| fs::metadata(file).map_or(0, |file| file.len())).sum();
    Ok(StoreSize { records, bytes })
}

/// The highest revision that was ever pruned, and the newest one.
fn range(connection: &Connection) -> rusqlite::Result<(Revision, Revision)> {
    connection
        .prepare_cached("SELECT pruned_to, last_revision FROM meta")?
        .query_row([], |row| Ok((Revision(number(row, 0)?), Revision(number(row, 1)?))))
}
/// The error for a missing revision that was given and not pruned.
fn missing(revision: Revision) -> Unreadable {
    Unreadable { cycle_id: CycleId::default(), revision, problem: "no row has this revision".into() }
}
fn length(found: &Found) -> usize {
    found.as_ref().map_or(0, |record| record.bytes.len())
}
