//! The store in a SQLite database: the default.
//!
//! How it keeps its promises:
//!
//! * Acknowledged writes are not lost: durable writes are one transaction in WAL mode with `synchronous=FULL`, which
//!   returns after the log is on the disk. Buffered writes use `NORMAL`, which passes the log to the operating system:
//!   the death of the process loses nothing, the loss of power may, and a database that was not closed before the
//!   machine restarted is taken over with [`Contents::may_lack_open`].
//! * One writer: locks on the file `<database>.lock` and on the database itself keep a second process out, whatever
//!   path it uses. If it still gets in, the epoch that every transaction checks stops the first process. The epoch
//!   begins with the first commit, so that a process that ends before takes nothing over.
//! * Atomic writes: a write that fails, for lack of space or permission, is rolled back as a whole, and leaves the
//!   database unchanged.
//! * Copies are recognized: see `identity`.
//! * Losses are detected: see `note`.
//! * No writes to deleted files: a database file that was removed or replaced can still be written by processes that
//!   have it open, and all of that is lost when they end; so every commit checks that the files are still in their
//!   places.
//!
//! One thread writes. A few other connections read, which in WAL mode neither wait for it nor block it.

mod identity;
mod note;
mod place;

use std::{
    fs, io,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use futures_util::{
    future::BoxFuture,
    stream::{self, BoxStream},
};
use jiff::Timestamp;
use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior, named_params,
    types::ValueRef,
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::{Instant, timeout},
};

pub use self::place::FileError;
use self::{
    identity::Identity,
    note::{Mark, Note},
    place::{FileId, Place, file_id, log_of, note_of},
};
use super::{Accepted, Check, OpenError, StoreUrl, frontier::Frontier, memory::to_prune, not_taken_over};
use crate::{
    clock::Clock,
    model::{CycleId, CycleState, Epoch, Name, Output, Payload, Revision, TraceId, Trigger},
    ports::{
        Contents, Durability, Filter, Found, Lost, OpenCycle, Page, PageLimits, Pruned, Record, ResumeError, Retention,
        SCAN_LIMIT, Stage, Store, StoreError, StoreSize, StoredLoop, StoredOutput, StoredSubsystem, TriggerKind,
        Unreadable, UnreadableRow, Write,
    },
};

/// The migrations, each starting with its own line.
const SCHEMA: &str = include_str!("schema.sql");
const MIGRATION: &str = "-- migration ";
/// "DrmO": the application id in the header of a database.
const APPLICATION_ID: i64 = 0x4472_6d4f;

/// Most writes in the queue of the thread: the orchestrator makes one at a time, and pruning another.
const QUEUE: usize = 8;
/// Number of reading connections: pages of the history are short, and two keep two cores busy.
const READERS: usize = 2;
/// Longest wait of a statement for a program that has locked the database, such as a backup.
const BUSY: Duration = Duration::from_secs(5);
/// A commit that takes longer is reported as late. It is awaited without a limit: a hanging disk may recover.
const LATE: Duration = Duration::from_secs(5);
/// Size of the log at which it is checkpointed into the database, between two writes.
const CHECKPOINT_BYTES: usize = 4 << 20;
/// A log that has grown beyond this, because of a reader or a large commit, is truncated after a checkpoint; a smaller
/// file is overwritten from its start, which is faster than growing it again.
const LARGE_LOG: u64 = 16 << 20;
/// Interval of retries of a checkpoint that a reader blocks.
const TRY_COPYING_EVERY: Duration = Duration::from_secs(1);
/// Most cycles missing at the end that are treated as lost, and recorded as such. A damaged log does not contain more:
/// then an older copy has replaced the database.
const MAX_LOST: u64 = 10_000;
/// Most bytes of a record that is read: the largest `cycle.max_record_bytes`.
const MAX_RECORD: usize = 64 << 20;

/// A SQLite database.
pub(super) struct Sqlite {
    path: Arc<PathBuf>,
    check: Check,
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<thread::JoinHandle<()>>,
    readers: Arc<Mutex<Vec<Connection>>>,
    reading: Arc<Semaphore>,
    trouble: watch::Sender<Option<StoreError>>,
    /// Released last, after all connections are closed.
    _place: Place,
}

enum Job {
    TakeOver(oneshot::Sender<Result<Contents, StoreError>>),
    Commit(Arc<Write>, oneshot::Sender<Result<(), StoreError>>),
    Prune(Retention, Timestamp, usize, oneshot::Sender<Result<Pruned, StoreError>>),
}

impl Sqlite {
    pub(super) async fn open(path: PathBuf, check: Check, clock: Clock) -> Result<Self, OpenError> {
        let store = path.display().to_string();
        let opened = tokio::task::spawn_blocking(move || Self::open_blocking(&path, check, clock)).await;
        opened.unwrap_or_else(|error| Err(StoreError::Unavailable { store, problem: error.to_string() }.into()))
    }

    fn open_blocking(path: &Path, check: Check, clock: Clock) -> Result<Self, OpenError> {
        let Opened { place, connection, here, .. } = Opened::at(path, false)?;
        let mark = read_mark(&connection).map_err(|error| explain(&place.path, &error))?;
        let (note, noted) = Note::open(&place.path)?;
        let noted = noted.filter(|noted| is_of_this_database(&place.path, &mark, noted));
        refuse_older_copy(&place.path, &mark, noted.as_ref())?;
        let readers = (0..READERS).map(|_| connect(&place.path)).collect::<Result<_, _>>();
        let readers = readers.map_err(|error| explain(&place.path, &error))?;
        let files = files_of(&place.path).map_err(|error| unwritable(&place.path, &error))?;

        let path = Arc::new(place.path.clone());
        let (jobs, incoming) = mpsc::channel(QUEUE);
        let writer = Writer {
            path: path.clone(),
            check,
            clock,
            files,
            connection,
            here,
            term: None,
            note: Some(note),
            noted,
            synchronous: Durability::Durable,
            unchecked_bytes: 0,
            held: None,
        };
        let writer = thread::Builder::new().name("store".into()).spawn(move || writer.run(incoming));
        let writer = writer.map_err(|error| unavailable(&path, error.to_string()))?;
        Ok(Self {
            path,
            check,
            jobs: Some(jobs),
            writer: Some(writer),
            readers: Arc::new(Mutex::new(readers)),
            reading: Arc::new(Semaphore::new(READERS)),
            trouble: watch::Sender::new(None),
            _place: place,
        })
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job) -> Result<T, StoreError> {
        let gone = || StoreError::Defect { problem: "its writer has ended".into() };
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        jobs.send(job(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn read<T, E>(
        &self,
        read: impl FnOnce(&mut Connection) -> Result<T, ReadError<E>> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let path = self.path.clone();
        let permit = self.reading.clone().acquire_owned().await;
        let permit = permit.map_err(|error| unavailable(&path, error.to_string()))?;
        let readers = self.readers.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let pooled = readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut connection = match pooled {
                Some(connection) => connection,
                None => connect(&path).map_err(|error| explain(&path, &error))?,
            };
            let result = read(&mut connection);
            readers.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            result.map_err(|error| match error {
                ReadError::Sqlite(error) => explain(&path, &error).into(),
                ReadError::Refused(error) => error,
            })
        });
        task.await.unwrap_or_else(|error| Err(unavailable(&self.path, error.to_string()).into()))
    }
}

enum ReadError<E> {
    Sqlite(rusqlite::Error),
    /// The request can't be answered.
    Refused(E),
}

impl<E> From<rusqlite::Error> for ReadError<E> {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        // The thread ends when all senders are dropped; joining it ensures that the lock is free afterwards.
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Store for Sqlite {
    fn take_over(&self) -> BoxFuture<'_, Result<Contents, StoreError>> {
        Box::pin(self.ask(Job::TakeOver))
    }

    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let mut commit = pin!(self.ask(|reply| Job::Commit(write, reply)));
            if let Ok(committed) = timeout(LATE, &mut commit).await {
                return committed;
            }
            let (store, problem) = (self.path.display().to_string(), "see whether its disk answers".into());
            self.trouble.send_replace(Some(StoreError::Late { store, waited: LATE, problem }));
            let committed = commit.await;
            self.trouble.send_replace(None);
            committed
        })
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        Box::pin(stream::unfold(self.trouble.subscribe(), |mut trouble| async {
            trouble.changed().await.ok()?;
            let now = trouble.borrow_and_update().clone();
            Some((now, trouble))
        }))
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let check = self.check;
        Box::pin(self.read(move |connection| {
            let mut query = connection.prepare_cached(&format!("SELECT {COLUMNS} FROM cycles WHERE cycle_id = ?1"))?;
            Ok(query.query_row([integer(cycle_id.0)], |row| Ok(read(row, check))).optional()?)
        }))
    }

    fn cycle_of_request(&self, request_id: String) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let check = self.check;
        Box::pin(self.read(move |connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM cycles WHERE request_id = ?1 ORDER BY revision DESC LIMIT 1"
            ))?;
            Ok(query.query_row([request_id], |row| Ok(read(row, check))).optional()?)
        }))
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        limits: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        let check = self.check;
        Box::pin(self.read(move |connection| {
            // One transaction, so that records that are pruned meanwhile don't look missing.
            let transaction = connection.transaction()?;
            let (pruned_to, newest) = range(&transaction)?;
            let mut query = transaction.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} AND revision < ?1 ORDER BY revision DESC"
            ))?;
            let mut rows = query.query([integer(before.0)])?;
            let mut page = Page::default();
            let (mut bytes, mut next) = (0, before.min(newest.next()));
            loop {
                let row = rows.next()?;
                let at = row.map(|row| number(row, "revision").map(Revision)).transpose()?;
                // Above the pruned revisions, every revision exists.
                while next > at.unwrap_or_default().max(pruned_to).next() {
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
                    let found = read(row, check);
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
        }))
    }

    fn cycles_after(&self, revision: Revision, limits: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>> {
        let check = self.check;
        Box::pin(self.read(move |connection| {
            // One transaction, so that nothing is pruned between the check and the reading.
            let transaction = connection.transaction()?;
            let (pruned_to, newest) = range(&transaction)?;
            if revision < pruned_to || revision > newest {
                return Err(ReadError::Refused(ResumeError::NotRetained { oldest: pruned_to.next(), newest }));
            }
            let mut query = transaction
                .prepare_cached(&format!("SELECT {COLUMNS} FROM cycles WHERE revision > ?1 ORDER BY revision"))?;
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
                let found = read(row, check);
                bytes += length(&found);
                if !records.is_empty() && bytes > limits.bytes {
                    break;
                }
                records.push(found);
                next = at.next();
            }
            Ok(records)
        }))
    }

    fn prune(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Pruned, StoreError>> {
        Box::pin(self.ask(move |reply| Job::Prune(retention, now, limit, reply)))
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        let path = self.path.clone();
        Box::pin(self.read(move |connection| {
            let records =
                connection.prepare_cached("SELECT sum(cycles) FROM counts")?.query_row([], |row| number(row, 0))?;
            let files = [path.to_path_buf(), log_of(&path)];
            let bytes = files.iter().map(|file| fs::metadata(file).map_or(0, |file| file.len())).sum();
            Ok(StoreSize { records, bytes })
        }))
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Opening

/// A database of this software with the current schema.
struct Opened {
    place: Place,
    connection: Connection,
    /// Its file.
    here: Identity,
    /// Its file when it was last used.
    noted: Option<Identity>,
}

impl Opened {
    fn at(path: &Path, even_a_copy: bool) -> Result<Self, OpenError> {
        let mut place = Place::take(path)?;
        let opened = Self::open(&place.path, even_a_copy);
        if let Err(OpenError::Files(FileError::NotADatabase { .. }) | OpenError::Foreign { .. }) = opened {
            place.leave();
        }
        let (connection, here, noted) = opened?;
        Ok(Self { place, connection, here, noted })
    }

    fn open(path: &Path, even_a_copy: bool) -> Result<(Connection, Identity, Option<Identity>), OpenError> {
        let explained = |error| explain(path, &error);
        // A foreign database, or a copy, is not changed.
        let connection = open_file(path).map_err(explained)?;
        let version = check_version(&connection, path)?;
        let here = Identity::at(path).map_err(|error| unwritable(path, &error))?;
        let noted = if version < Identity::SINCE { None } else { Identity::noted(&connection).map_err(explained)? };
        match here.check(noted.as_ref()) {
            Err(FileError::Copy { .. }) if even_a_copy => {}
            checked => checked?,
        }
        let mut connection = configure(connection).map_err(explained)?;
        migrate(&mut connection, version).map_err(explained)?;
        Ok((connection, here, noted))
    }
}

/// Accepts a database with its current file and contents.
pub(super) fn accept(path: &Path) -> Result<Accepted, OpenError> {
    if !path.exists() {
        return Err(FileError::Missing { database: path.display().to_string() }.into());
    }
    let Opened { place, mut connection, here, noted } = Opened::at(path, true)?;
    let mark = (|| {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        here.note(&transaction)?;
        let mark = read_mark(&transaction)?;
        transaction.commit()?;
        Ok(mark)
    })()
    .map_err(|error| explain(&place.path, &error))?;
    let (note, known) = Note::open(&place.path)?;
    note.write(&mark).map_err(|error| unwritable(&note_of(&place.path), &error))?;
    Ok(Accepted {
        path: place.path.clone(),
        earlier: noted.map(|noted| noted.path).filter(|earlier| *earlier != place.path),
        last_cycle_id: mark.last_cycle_id,
        noted_cycle_id: known
            .filter(|known| known.id == mark.id)
            .map_or(mark.last_cycle_id, |known| known.last_cycle_id),
    })
}

/// The extent of the database.
fn read_mark(connection: &Connection) -> rusqlite::Result<Mark> {
    connection.query_row("SELECT * FROM meta", [], mark)
}

fn mark(row: &Row<'_>) -> rusqlite::Result<Mark> {
    Ok(Mark {
        id: row.get("database_id")?,
        commits: number(row, "commits")?,
        last_cycle_id: CycleId(number(row, "last_cycle_id")?),
        last_revision: Revision(number(row, "last_revision")?),
    })
}

/// True if the note beside a database belongs to it.
fn is_of_this_database(path: &Path, mark: &Mark, noted: &Mark) -> bool {
    if noted.id != mark.id {
        let (store, last_cycle_id) = (path.display(), noted.last_cycle_id);
        if mark.commits == 0 {
            tracing::error!(
                %store,
                %last_cycle_id,
                "the database of this path, which ended with this cycle, is gone: a new one begins with cycle 1. If \
                 that is a mistake, stop this process and put the database back, or restore it from a backup"
            );
        } else {
            tracing::error!(
                %store,
                %last_cycle_id,
                "another database, which ended with this cycle, was at this path before; this one ends with cycle {}. \
                 If that is a mistake, stop this process and put the other one back, or restore it from a backup",
                mark.last_cycle_id
            );
        }
    }
    noted.id == mark.id
}

/// Checks that the database does not lack more noted commits than a damaged log can have contained.
fn refuse_older_copy(path: &Path, mark: &Mark, noted: Option<&Mark>) -> Result<(), OpenError> {
    let Some(noted) = noted else { return Ok(()) };
    if noted.last_cycle_id.0.saturating_sub(mark.last_cycle_id.0) <= MAX_LOST {
        return Ok(());
    }
    Err(OpenError::Behind {
        store: path.display().to_string(),
        url: StoreUrl::Sqlite(path.to_owned()),
        has: mark.last_cycle_id,
        noted: noted.last_cycle_id,
    })
}

/// Acknowledged commits that are not in the database, by the note beside it.
fn lost(mark: &Mark, noted: &Mark) -> Option<Lost> {
    let commits = noted.commits.saturating_sub(mark.commits);
    (commits > 0).then_some(Lost {
        last_cycle_id: noted.last_cycle_id.max(mark.last_cycle_id),
        last_revision: noted.last_revision.max(mark.last_revision),
        commits,
    })
}

/// The files at the paths of the database and its log.
type Files = [FileId; 2];

fn files_of(path: &Path) -> io::Result<Files> {
    Ok([file_id(path)?, file_id(&log_of(path))?])
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    configure(open_file(path)?)
}

fn open_file(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    Ok(connection)
}

fn configure(connection: Connection) -> rusqlite::Result<Connection> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // A checkpoint waits for the disk, so the writer decides when.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// The migrations, each without the line with its number.
fn migrations() -> impl Iterator<Item = &'static str> {
    SCHEMA.split(MIGRATION).skip(1).map(|migration| migration.split_once('\n').unwrap_or_default().1)
}

/// The schema version of a database, if this software can use it.
fn check_version(connection: &Connection, path: &Path) -> Result<i64, OpenError> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let tables = || connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0));
    let read = || Ok((pragma("user_version")?, pragma("application_id")?, tables()?));
    let (found, application_id, tables) = read().map_err(|error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => FileError::NotADatabase { path: path.display().to_string() }.into(),
        _ => OpenError::from(explain(path, &error)),
    })?;
    if application_id != APPLICATION_ID && (tables > 0 || found > 0) {
        return Err(OpenError::Foreign { store: path.display().to_string() });
    }
    let known = i64::try_from(migrations().count()).unwrap_or(i64::MAX);
    if found > known {
        return Err(OpenError::TooNew { store: path.display().to_string(), found, known });
    }
    Ok(found)
}

/// Applies the missing migrations to a database of this version.
fn migrate(connection: &mut Connection, found: i64) -> rusqlite::Result<()> {
    for (version, statements) in (1_i64..).zip(migrations()).filter(|(version, _)| *version > found) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(statements)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
    }
    Ok(())
}

/// The boot id of the machine from `/proc`; `None` if it does not exist.
fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// Reads all tables except the history, with the next epoch. Also returns the stored epoch.
fn read_contents(
    connection: &mut Connection,
    path: &Path,
    check: Check,
    clock: Clock,
) -> Result<(Epoch, Mark, Contents), StoreError> {
    let explained = |error| explain(path, &error);
    let transaction = connection.transaction().map_err(explained)?;
    let (before, mark, mut contents, numbers) = (|| {
        let boot_id = boot_id();
        let (before, mark, mut contents) = transaction.query_row("SELECT * FROM meta", [], |row| {
            let (was_closed, last_boot_id): (bool, Option<String>) = (row.get("is_closed")?, row.get("boot_id")?);
            let (before, mark) = (Epoch(number(row, "epoch")?), mark(row)?);
            let contents = Contents {
                epoch: before.next().max(Epoch::by_clock(clock.now())),
                last_cycle_id: mark.last_cycle_id,
                last_revision: mark.last_revision,
                pruned_to: Revision(number(row, "pruned_to")?),
                may_lack_open: !was_closed && (boot_id.is_none() || last_boot_id != boot_id),
                ..Contents::default()
            };
            Ok((before, mark, contents))
        })?;
        let numbers = Numbers::read(&transaction)?;
        contents.last_record = transaction
            .query_row(
                &format!("SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} ORDER BY revision DESC LIMIT 1"),
                [],
                |row| Ok(read(row, check)),
            )
            .optional()?;
        Ok((before, mark, contents, numbers))
    })()
    .map_err(explained)?;
    numbers.check().map_err(|problem| StoreError::Corrupt { store: path.display().to_string(), problem })?;
    let mut unreadable = Vec::new();
    let mut rows = Rows { transaction: &transaction, path, unreadable: &mut unreadable };
    let noted = 1..=integer(contents.last_cycle_id.0);
    let open = "SELECT *, EXISTS (SELECT 1 FROM cycles WHERE cycle_id = open_cycles.cycle_id) AS is_recorded
                FROM open_cycles ORDER BY cycle_id";
    rows.read_all("open cycle", open, |row| {
        let cycle_id: i64 = row.get("cycle_id")?;
        if !noted.contains(&cycle_id) {
            return Err(wrong(row, "cycle_id", NotOpen("its number was given to no cycle")));
        }
        if row.get("is_recorded")? {
            return Err(wrong(row, "cycle_id", NotOpen("it is recorded")));
        }
        let read = open_cycle(row);
        let unknown = |_| unknown_cycle(CycleId(cycle_id.unsigned_abs()));
        contents.open.push(read.as_ref().map_or_else(unknown, Clone::clone));
        read.map(drop)
    })?;
    contents.subsystems = rows.read_all("subsystem", "SELECT * FROM subsystems ORDER BY name", |row| {
        let lease_ms: Option<i64> = row.get("lease_ms")?;
        Ok(StoredSubsystem {
            name: name(row, "name")?,
            spec: json(row, "spec")?,
            lease: lease_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
            suspended: row.get("suspended")?,
        })
    })?;
    contents.loops = rows.read_all("loop", "SELECT * FROM loops ORDER BY name", |row| {
        let state = json(row, "state")?.unwrap_or_default();
        Ok(StoredLoop { name: name(row, "name")?, spec: json(row, "spec")?, state })
    })?;
    let outputs = "SELECT outputs.*, finished_at FROM outputs LEFT JOIN cycles USING (cycle_id) ORDER BY name";
    contents.outputs = rows.read_all("output", outputs, |row| {
        let bytes: Vec<u8> = row.get("payload")?;
        let payload = Payload::check(bytes.into()).map_err(|malformed| wrong(row, "payload", malformed))?;
        let finished_at: Option<i64> = row.get("finished_at")?;
        Ok(StoredOutput {
            name: name(row, "name")?,
            output: Output { cycle_id: CycleId(number(row, "cycle_id")?), payload },
            finished_at: finished_at.map(|_| time(row, "finished_at")).transpose()?,
        })
    })?;
    contents.unreadable = unreadable;
    Ok((before, mark, contents))
}

/// The extent of a database: by its table `meta`, from which every commit continues, and by the history.
struct Numbers {
    /// Each with its column.
    meta: [(&'static str, i64); 5],
    newest_cycle_id: Option<i64>,
    newest_revision: Option<i64>,
}

impl Numbers {
    const COLUMNS: [&str; 5] = ["epoch", "last_cycle_id", "last_revision", "pruned_to", "commits"];

    fn read(connection: &Connection) -> rusqlite::Result<Self> {
        // Each from the end of its index. A revision that is not a number belongs to an unreadable record.
        let newest = |column: &str| {
            let newest = format!(
                "SELECT {column} FROM cycles WHERE typeof({column}) = 'integer' ORDER BY {column} DESC LIMIT 1"
            );
            connection.query_row(&newest, [], |row| row.get(0)).optional()
        };
        connection.query_row("SELECT * FROM meta", [], |row| {
            let mut meta = Self::COLUMNS.map(|column| (column, 0));
            for (column, number) in &mut meta {
                *number = row.get(*column)?;
            }
            Ok(Self { meta, newest_cycle_id: newest("cycle_id")?, newest_revision: newest("revision")? })
        })
    }

    /// Refuses a state from which no process could continue: the next number already exists, or is out of range.
    fn check(&self) -> Result<(), String> {
        if let Some((column, number)) = self.meta.iter().find(|(_, number)| !(0..i64::MAX).contains(number)) {
            return Err(format!("{column} in its table meta is {number}, which leaves no next number"));
        }
        let meta = |wanted| self.meta.iter().find(|(column, _)| *column == wanted).map_or(0, |(_, number)| *number);
        let (last_cycle_id, last_revision) = (meta("last_cycle_id"), meta("last_revision"));
        for (column, last, newest, is) in [
            ("last_cycle_id", last_cycle_id, self.newest_cycle_id, "is the newest cycle in its history"),
            ("last_revision", last_revision, self.newest_revision, "is the newest revision in its history"),
            ("last_revision", last_revision, Some(meta("pruned_to")), "is a revision that was already removed"),
        ] {
            if let Some(newest) = newest.filter(|newest| *newest > last) {
                return Err(format!("{column} in its table meta is {last}, and {newest} {is}"));
            }
        }
        Ok(())
    }
}

/// Reads tables, and collects unreadable rows separately.
struct Rows<'a> {
    transaction: &'a Transaction<'a>,
    path: &'a Path,
    unreadable: &'a mut Vec<UnreadableRow>,
}

impl Rows<'_> {
    fn read_all<T>(
        &mut self,
        what: &'static str,
        query: &str,
        mut read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let mut all = Vec::new();
        let mut read_rows = || {
            let mut query = self.transaction.prepare(query)?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                match read(row) {
                    Ok(read) => all.push(read),
                    Err(error) => {
                        let key = row.get_ref(0).map_or_else(|_| String::new(), key);
                        self.unreadable.push(UnreadableRow { what, key, problem: error.to_string() });
                    }
                }
            }
            Ok(())
        };
        read_rows().map_err(|error| explain(self.path, &error))?;
        Ok(all)
    }
}

/// A primary key as text, if possible.
fn key(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        ValueRef::Null | ValueRef::Real(_) | ValueRef::Blob(_) => String::new(),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("it is not open: {0}")]
struct NotOpen(&'static str);

// ---------------------------------------------------------------------------------------------------------------
// Writing

struct Writer {
    path: Arc<PathBuf>,
    check: Check,
    clock: Clock,
    /// The open files of the connection.
    files: Files,
    connection: Connection,
    /// The file of the database.
    here: Identity,
    /// `None` until it is taken over.
    term: Option<Term>,
    /// The note of how far the database was written; `None` once writing it has failed.
    note: Option<Note>,
    /// The note of this database when it was opened.
    noted: Option<Mark>,
    /// The durability that the connection is set to.
    synchronous: Durability,
    /// Bytes in the log that are not yet in the database.
    unchecked_bytes: usize,
    /// Why the log was not checkpointed.
    held: Option<Held>,
}

/// The term of one epoch as the writer.
struct Term {
    epoch: Epoch,
    /// The epoch of the database while no other process has taken over: this one from its first commit on.
    current: Epoch,
    database_id: [u8; 16],
    /// Number of all commits so far.
    commits: u64,
    frontier: Frontier,
}

/// A reader blocks the checkpoint.
struct Held {
    tried_at: Instant,
    is_told: bool,
}

impl Writer {
    fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.blocking_recv() {
            // The caller may have gone; the write is done anyway.
            match job {
                Job::TakeOver(reply) => drop(reply.send(self.take_over())),
                Job::Commit(write, reply) => drop(reply.send(self.commit(&write))),
                Job::Prune(retention, now, limit, reply) => drop(reply.send(self.prune(&retention, now, limit))),
            }
            self.checkpoint();
        }
    }

    fn take_over(&mut self) -> Result<Contents, StoreError> {
        let earlier = self.term.take().map(|term| term.epoch.next());
        let (current, mark, mut contents) = read_contents(&mut self.connection, &self.path, self.check, self.clock)?;
        contents.epoch = contents.epoch.max(earlier.unwrap_or_default());
        contents.lost = self.noted.and_then(|noted| lost(&mark, &noted));
        let frontier = Frontier {
            last_cycle_id: contents.last_cycle_id,
            last_revision: contents.last_revision,
            open: contents.open.iter().map(|open| open.cycle_id).collect(),
        };
        let Mark { id: database_id, commits, .. } = mark;
        self.term = Some(Term { epoch: contents.epoch, current, database_id, commits, frontier });
        Ok(contents)
    }

    fn commit(&mut self, write: &Write) -> Result<(), StoreError> {
        #[cfg(test)]
        self.apply_page_limit();
        let term = self.term.as_mut().ok_or_else(not_taken_over)?;
        if write.epoch != term.epoch {
            return Err(StoreError::Fenced { by: term.epoch });
        }
        if files_of(&self.path).ok() != Some(self.files) {
            let problem = "it or its log was removed or replaced while it was in use; put the same files back, or stop \
                           this process and restore it from a backup";
            return Err(unavailable(&self.path, problem.into()));
        }
        term.frontier.check(write).map_err(|problem| StoreError::Defect { problem })?;
        let explained = |error| explain(&self.path, &error);
        if self.synchronous != write.durability {
            synchronize(&self.connection, write.durability).map_err(explained)?;
            self.synchronous = write.durability;
        }
        let begins = term.current != term.epoch;
        if let Some(by) = term.transact(&mut self.connection, &self.here, write).map_err(explained)? {
            return Err(StoreError::Fenced { by });
        }
        term.advance(write);
        if write.durability == Durability::Durable {
            let mark = term.mark();
            self.note(&mark);
        }
        if begins {
            // Now the database file itself contains its identity, without its log.
            self.copy_log();
        }
        self.unchecked_bytes += write.records.iter().map(|record| record.bytes.len()).sum::<usize>()
            + write.outputs.iter().map(|(_, output)| output.payload.len()).sum::<usize>()
            + 4096;
        Ok(())
    }

    /// Notes how far the database was written.
    fn note(&mut self, mark: &Mark) {
        if let Some(note) = &self.note
            && let Err(error) = note.write(mark)
        {
            // The database itself is still valid.
            tracing::warn!(store = %self.path.display(), %error, "can't note how far the database was written");
            self.note = None;
        }
    }

    fn prune(&mut self, retention: &Retention, now: Timestamp, limit: usize) -> Result<Pruned, StoreError> {
        let Term { current, frontier: Frontier { last_revision: keep, .. }, .. } =
            *self.term.as_ref().ok_or_else(not_taken_over)?;
        let pruned = (|| {
            let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let epoch = transaction.query_row("SELECT epoch FROM meta", [], |row| number(row, 0)).map(Epoch)?;
            if epoch != current {
                return Ok(Err(StoreError::Fenced { by: epoch }));
            }
            let mut gone = Vec::new();
            for (rule, states) in retention.rules() {
                let mut count = 0;
                let mut oldest = Vec::new();
                for state in states {
                    count += transaction
                        .prepare_cached("SELECT cycles FROM counts WHERE state = ?1")?
                        .query_row([state_number(state)], |row| number(row, 0))?;
                    let mut query = transaction.prepare_cached(&format!(
                        "SELECT revision, finished_at FROM cycles WHERE state = ?1 AND {HAS_REVISION} ORDER BY \
                         revision LIMIT ?2"
                    ))?;
                    // An unreadable time must not keep other records: the time of the previous record is used.
                    let mut at = Timestamp::MIN;
                    let rows = query.query_map([state_number(state), integer(limit as u64)], |row| {
                        at = time(row, "finished_at").unwrap_or(at);
                        Ok((Revision(number(row, 0)?), at))
                    })?;
                    oldest.extend(rows.collect::<rusqlite::Result<Vec<_>>>()?);
                }
                oldest.sort_unstable();
                gone.extend(to_prune(rule, count, oldest.into_iter(), now, keep));
            }
            gone.sort_unstable();
            gone.truncate(limit);
            for revision in &gone {
                let state: i64 = transaction
                    .prepare_cached("DELETE FROM cycles WHERE revision = ?1 RETURNING state")?
                    .query_row([integer(revision.0)], |row| row.get(0))?;
                transaction
                    .prepare_cached("UPDATE counts SET cycles = cycles - 1 WHERE state = ?1")?
                    .execute([state])?;
                transaction
                    .prepare_cached("UPDATE meta SET pruned_to = max(pruned_to, ?1)")?
                    .execute([integer(revision.0)])?;
            }
            let pruned_to = transaction.query_row("SELECT pruned_to FROM meta", [], |row| number(row, 0))?;
            if gone.is_empty() {
                // Nothing was changed, so nothing is written.
                transaction.rollback()?;
            } else {
                transaction.commit()?;
            }
            Ok(Ok(Pruned { removed: gone.len(), pruned_to: Revision(pruned_to) }))
        })()
        .unwrap_or_else(|error| Err(explain(&self.path, &error)));
        // Each changes a page or two.
        self.unchecked_bytes += pruned.as_ref().map_or(0, |pruned| pruned.removed * 4096);
        pruned
    }

    /// Checkpoints the log once it has grown, so that it can be overwritten.
    fn checkpoint(&mut self) {
        let again = self.held.as_ref().is_some_and(|held| held.tried_at.elapsed() >= TRY_COPYING_EVERY);
        if again || self.unchecked_bytes >= CHECKPOINT_BYTES {
            self.copy_log();
        }
    }

    /// Checkpoints the log as far as readers allow, and truncates it if it is large.
    fn copy_log(&mut self) {
        let log = log_of(&self.path);
        let bytes = || fs::metadata(&log).map_or(0, |log| log.len());
        let (size, store) = (bytes(), self.path.display());
        let copy = if size > LARGE_LOG { "PRAGMA wal_checkpoint(TRUNCATE)" } else { "PRAGMA wal_checkpoint(PASSIVE)" };
        // Commits don't wait for readers.
        let copied = self.connection.busy_timeout(Duration::ZERO).and_then(|()| {
            self.connection.query_row(copy, [], |row| {
                let (is_busy, frames, copied): (bool, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
                Ok(!is_busy && copied == frames)
            })
        });
        let copied = copied.and_then(|is_whole| self.connection.busy_timeout(BUSY).map(|()| is_whole));
        let was_told = self.held.as_ref().is_some_and(|held| held.is_told);
        match copied {
            Ok(true) => {
                if was_told {
                    tracing::info!(%store, bytes = bytes(), "the log was checkpointed into the database");
                }
                self.unchecked_bytes = 0;
                self.held = None;
            }
            Ok(false) => {
                if size > LARGE_LOG && !was_told {
                    tracing::warn!(
                        %store,
                        bytes = size,
                        "the log can't be checkpointed into the database, and grows: another program reads the \
                         database, and has not ended its transaction"
                    );
                }
                self.unchecked_bytes = 0;
                self.held = Some(Held { tried_at: Instant::now(), is_told: was_told || size > LARGE_LOG });
            }
            // Nothing is lost: the log grows, and the next write retries.
            Err(error) => tracing::warn!(%store, %error, "can't checkpoint the log into the database"),
        }
    }
}

impl Term {
    /// Writes in one transaction; `Some` is the epoch that has taken over, and then nothing was written.
    fn transact(&self, connection: &mut Connection, here: &Identity, write: &Write) -> rusqlite::Result<Option<Epoch>> {
        let last_revision = write.records.last().map_or(self.frontier.last_revision, |record| record.revision);
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let written = transaction
            .prepare_cached(
                "UPDATE meta SET last_cycle_id = :cycle_id, last_revision = :revision, is_closed = :is_closed,
                 commits = :commits, epoch = :epoch WHERE epoch = :current",
            )?
            .execute(named_params! {
                ":cycle_id": integer(write.last_cycle_id.0),
                ":revision": integer(last_revision.0),
                ":is_closed": write.close,
                ":commits": integer(self.commits + 1),
                ":epoch": integer(self.epoch.0),
                ":current": integer(self.current.0),
            })?;
        if written == 0 {
            let epoch = transaction.query_row("SELECT epoch FROM meta", [], |row| number(row, 0))?;
            return Ok(Some(Epoch(epoch)));
        }
        if self.current != self.epoch {
            transaction.execute("UPDATE meta SET boot_id = ?1", [boot_id()])?;
            here.note(&transaction)?;
        }
        put_cycles(&transaction, write)?;
        put_knowledge(&transaction, write)?;
        transaction.commit()?;
        Ok(None)
    }

    /// Advances by `write`.
    fn advance(&mut self, write: &Write) {
        self.current = self.epoch;
        self.commits += 1;
        self.frontier.advance(write);
    }

    fn mark(&self) -> Mark {
        let Frontier { last_cycle_id, last_revision, .. } = self.frontier;
        Mark { id: self.database_id, commits: self.commits, last_cycle_id, last_revision }
    }
}

/// Sets the durability of further commits.
fn synchronize(connection: &Connection, durability: Durability) -> rusqlite::Result<()> {
    let level = match durability {
        Durability::Durable => "FULL",
        Durability::Buffered => "NORMAL",
    };
    connection.pragma_update(None, "synchronous", level)
}

fn put_cycles(transaction: &Transaction<'_>, write: &Write) -> rusqlite::Result<()> {
    for open in &write.open {
        let (trigger, started_at, request) = match &open.stage {
            Stage::Waiting(request) => (trigger_number(&open.trigger), None, request.as_deref()),
            Stage::Begun(at) => (trigger_number(&open.trigger), Some(nanoseconds(*at)), None),
            Stage::Unknown => (trigger_number(&Trigger::Unknown), None, None),
        };
        transaction
            .prepare_cached(
                "INSERT OR REPLACE INTO open_cycles
                 (cycle_id, trigger, loop, scheduled_at, started_at, request_id, trace_id, request)
                 VALUES (:cycle_id, :trigger, :loop, :scheduled_at, :started_at, :request_id, :trace_id, :request)",
            )?
            .execute(named_params! {
                ":cycle_id": integer(open.cycle_id.0),
                ":trigger": trigger,
                ":loop": open.trigger.loop_name().map(Name::as_str),
                ":scheduled_at": nanoseconds(open.scheduled_at),
                ":started_at": started_at,
                ":request_id": open.request_id,
                ":trace_id": open.trace_id.map(|trace_id| trace_id.0.to_be_bytes()),
                ":request": request,
            })?;
    }
    for record in &write.records {
        transaction
            .prepare_cached(
                "INSERT INTO cycles (cycle_id, revision, epoch, state, trigger, loop, request_id, finished_at, record)
                 VALUES (:cycle_id, :revision, :epoch, :state, :trigger, :loop, :request_id, :finished_at, :record)",
            )?
            .execute(named_params! {
                ":cycle_id": integer(record.cycle_id.0),
                ":revision": integer(record.revision.0),
                ":epoch": integer(record.epoch.0),
                ":state": state_number(record.state),
                ":trigger": trigger_number(&record.trigger),
                ":loop": record.trigger.loop_name().map(Name::as_str),
                ":request_id": record.request_id,
                ":finished_at": nanoseconds(record.finished_at),
                ":record": &record.bytes[..],
            })?;
        transaction
            .prepare_cached("UPDATE counts SET cycles = cycles + 1 WHERE state = ?1")?
            .execute([state_number(record.state)])?;
        transaction
            .prepare_cached("DELETE FROM open_cycles WHERE cycle_id = ?1")?
            .execute([integer(record.cycle_id.0)])?;
    }
    Ok(())
}

fn put_knowledge(transaction: &Transaction<'_>, write: &Write) -> rusqlite::Result<()> {
    for (name, output) in &write.outputs {
        transaction
            .prepare_cached(
                "INSERT INTO outputs (name, cycle_id, payload) VALUES (?1, ?2, ?3)
                 ON CONFLICT (name) DO UPDATE SET cycle_id = excluded.cycle_id, payload = excluded.payload",
            )?
            .execute((name.as_str(), integer(output.cycle_id.0), &output.payload.as_bytes()[..]))?;
    }
    for (name, stored) in &write.subsystems {
        match stored {
            Some(stored) => {
                let lease_ms = stored.lease.map(|lease| i64::try_from(lease.as_millis()).unwrap_or(i64::MAX));
                let spec = stored.spec.as_ref().map(to_json).transpose()?;
                transaction.prepare_cached("INSERT OR REPLACE INTO subsystems VALUES (?1, ?2, ?3, ?4)")?.execute((
                    name.as_str(),
                    spec,
                    lease_ms,
                    stored.suspended,
                ))?;
            }
            None => {
                for forget in ["DELETE FROM subsystems WHERE name = ?1", "DELETE FROM outputs WHERE name = ?1"] {
                    transaction.prepare_cached(forget)?.execute([name.as_str()])?;
                }
            }
        }
    }
    for (name, stored) in &write.loops {
        match stored {
            Some(stored) => {
                let spec = stored.spec.as_ref().map(to_json).transpose()?;
                transaction.prepare_cached("INSERT OR REPLACE INTO loops VALUES (?1, ?2, ?3)")?.execute((
                    name.as_str(),
                    spec,
                    to_json(&stored.state)?,
                ))?;
            }
            None => {
                transaction.prepare_cached("DELETE FROM loops WHERE name = ?1")?.execute([name.as_str()])?;
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------------
// Rows

/// In this order, so that a row can be examined without reading the record, which is last and may be large.
const COLUMNS: &str = "cycle_id, revision, epoch, state, trigger, loop, request_id, finished_at, record";

/// Condition that a row has a place in the history. An unreadable revision has no place: reads by revision don't find
/// it.
const HAS_REVISION: &str = "revision > 0 AND typeof(revision) = 'integer'";

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

/// A row without its record.
fn found(row: &Row<'_>) -> rusqlite::Result<Record> {
    Ok(Record {
        cycle_id: CycleId(number(row, "cycle_id")?),
        revision: Revision(number(row, "revision")?),
        epoch: Epoch(number(row, "epoch")?),
        state: state(row)?,
        trigger: trigger(row)?,
        request_id: row.get("request_id")?,
        finished_at: time(row, "finished_at")?,
        bytes: bytes::Bytes::new(),
    })
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let bytes: Vec<u8> = row.get("record")?;
    Ok(Record { bytes: bytes.into(), ..found(row)? })
}

/// A row with its record, if both can be read.
fn read(row: &Row<'_>, check: Check) -> Found {
    let unreadable = |problem| Unreadable {
        cycle_id: CycleId(number(row, "cycle_id").unwrap_or_default()),
        revision: Revision(number(row, "revision").unwrap_or_default()),
        problem,
    };
    if let Ok(ValueRef::Blob(bytes)) = row.get_ref("record")
        && bytes.len() > MAX_RECORD
    {
        return Err(unreadable(format!("it is {} bytes long", bytes.len())));
    }
    let record = record(row).map_err(|error| unreadable(error.to_string()))?;
    check(&record).map_err(unreadable)?;
    Ok(record)
}

fn length(found: &Found) -> usize {
    found.as_ref().map_or(0, |record| record.bytes.len())
}

fn open_cycle(row: &Row<'_>) -> rusqlite::Result<OpenCycle> {
    let cycle_id = CycleId(number(row, "cycle_id")?);
    let trigger = trigger(row)?;
    if trigger == Trigger::Unknown {
        return Ok(unknown_cycle(cycle_id));
    }
    let (started_at, request): (Option<i64>, Option<Vec<u8>>) = (row.get("started_at")?, row.get("request")?);
    let trace_id: Option<[u8; 16]> = row.get("trace_id")?;
    Ok(OpenCycle {
        cycle_id,
        trigger,
        scheduled_at: time(row, "scheduled_at")?,
        request_id: row.get("request_id")?,
        trace_id: trace_id.map(|bytes| TraceId(u128::from_be_bytes(bytes))),
        stage: match started_at {
            Some(_) => Stage::Begun(time(row, "started_at")?),
            None => Stage::Waiting(request.map(Into::into)),
        },
    })
}

/// An open cycle of which only the id is known.
fn unknown_cycle(cycle_id: CycleId) -> OpenCycle {
    OpenCycle {
        cycle_id,
        trigger: Trigger::Unknown,
        scheduled_at: Timestamp::UNIX_EPOCH,
        request_id: None,
        trace_id: None,
        stage: Stage::Unknown,
    }
}

/// A value that no version of this software has written.
fn wrong(row: &Row<'_>, column: &str, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    let index = row.as_ref().column_index(column).unwrap_or(0);
    rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Null, Box::new(error))
}

fn number(row: &Row<'_>, column: impl rusqlite::RowIndex) -> rusqlite::Result<u64> {
    let number: i64 = row.get(column)?;
    Ok(number.unsigned_abs())
}

/// Ids and counts stay far below the 63 bits of SQLite's integers.
fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// In 64 bits, which reach to the year 2262.
fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

fn time(row: &Row<'_>, column: &str) -> rusqlite::Result<Timestamp> {
    let nanoseconds: i64 = row.get(column)?;
    Timestamp::from_nanosecond(nanoseconds.into()).map_err(|error| wrong(row, column, error))
}

fn name(row: &Row<'_>, column: &str) -> rusqlite::Result<Name> {
    let name: String = row.get(column)?;
    Name::parse(&name).map_err(|error| wrong(row, column, error))
}

fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<T>> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| serde_json::from_str(&text)).transpose().map_err(|error| wrong(row, column, error))
}

fn to_json<T: serde::Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// The numbers in the schema, which are those of the contract.
const STATES: [CycleState; 5] = CycleState::ALL;

fn state_number(state: CycleState) -> i64 {
    (1..).zip(STATES).find(|(_, known)| *known == state).map_or(0, |(number, _)| number)
}

fn state(row: &Row<'_>) -> rusqlite::Result<CycleState> {
    let number: i64 = row.get("state")?;
    let state = (1..).zip(STATES).find(|(known, _)| *known == number);
    state.map(|(_, state)| state).ok_or_else(|| wrong(row, "state", Unknown(number)))
}

fn trigger_number(trigger: &Trigger) -> i64 {
    match TriggerKind::of(trigger) {
        TriggerKind::Unknown => 0,
        TriggerKind::Manual => 1,
        TriggerKind::Loop => 2,
    }
}

fn trigger(row: &Row<'_>) -> rusqlite::Result<Trigger> {
    match row.get("trigger")? {
        0 => Ok(Trigger::Unknown),
        1 => Ok(Trigger::Manual),
        2 => Ok(Trigger::Loop(name(row, "loop")?)),
        number => Err(wrong(row, "trigger", Unknown(number))),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0} has no meaning")]
struct Unknown(i64);

// ---------------------------------------------------------------------------------------------------------------
// Errors

/// Maps an error of SQLite to an error of the store.
fn explain(path: &Path, error: &rusqlite::Error) -> StoreError {
    let (store, problem) = (path.display().to_string(), error.to_string());
    let Some(code) = error.sqlite_error_code() else {
        // A value that no version of this software has written, or a missing one.
        return StoreError::Corrupt { store, problem };
    };
    match code {
        ErrorCode::DiskFull => StoreError::Full { store, problem },
        ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied => {
            StoreError::ReadOnly { store, problem }
        }
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => StoreError::Corrupt { store, problem },
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => {
            let problem = format!("{problem}: another program has locked it; end that program's transaction");
            StoreError::Unavailable { store, problem }
        }
        // These are or may be temporary.
        ErrorCode::SystemIoFailure
        | ErrorCode::OutOfMemory
        | ErrorCode::OperationAborted
        | ErrorCode::OperationInterrupted
        | ErrorCode::FileLockingProtocolFailed => StoreError::Unavailable { store, problem },
        // Mainly a missing table or column, or a row that already exists.
        _ => StoreError::Unusable { store, problem },
    }
}

fn unavailable(path: &Path, problem: String) -> StoreError {
    StoreError::Unavailable { store: path.display().to_string(), problem }
}

fn unwritable(path: &Path, error: &io::Error) -> OpenError {
    let (store, problem) = (path.display().to_string(), error.to_string());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full { store, problem }.into(),
        io::ErrorKind::IsADirectory => FileError::NotRegular { path: store, found: "a directory" }.into(),
        _ => StoreError::ReadOnly { store, problem }.into(),
    }
}

/// For tests: limits the database to this number of pages.
#[cfg(test)]
static PAGE_LIMITS: Mutex<std::collections::BTreeMap<PathBuf, u32>> = Mutex::new(std::collections::BTreeMap::new());

#[cfg(test)]
pub(super) fn limit_pages(path: &Path, pages: u32) {
    PAGE_LIMITS.lock().unwrap().insert(path.to_owned(), pages);
}

#[cfg(test)]
impl Writer {
    fn apply_page_limit(&self) {
        if let Some(pages) = PAGE_LIMITS.lock().unwrap().get(&*self.path) {
            self.connection.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
        }
    }
}
