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
//! * Changes by other programs are detected: see `seal`.
//! * No writes to deleted files: a database file that was removed or replaced can still be written by processes that
//!   have it open, and all of that is lost when they end; so every commit checks that the files are still in their
//!   places.
//!
//! One thread writes (`writer`). A few other connections read (`reading`), which in WAL mode neither wait for it nor
//! block it.

mod backup;
mod commit;
mod contents;
mod copying;
mod error;
mod identity;
mod log;
mod note;
mod opening;
mod place;
mod reading;
mod rows;
mod schema;
mod seal;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;
use rusqlite::Connection;

pub use self::place::DatabaseFileError;
pub(super) use self::{
    backup::{copy, put},
    copying::Copying,
    opening::{accept, compact},
    verify::verify,
};
use self::{
    error::{explain, unavailable, unwritable},
    note::{Mark, Note, is_of_this_database, refuse_older_copy},
    opening::{Allowed, Opened, connect, immutable, look},
    place::LockedDatabase,
    reading::{ReadError, Readers},
    writer::Writer,
};
use super::{
    OpenError,
    entries::Reading,
    jobs::Jobs,
    keys::checkpoint_of,
    pages::{cycles_after, cycles_before, events_before},
    term::SharedLog,
    trouble::Trouble,
};
use crate::{
    clock::Clock,
    file,
    ledger::{Hash, Node, Part},
    model::{CycleId, RequestKey, Revision},
    ports::{
        Checks, Contents, EventFilter, EventPage, Excess, Filter, Found, Log, Page, PageLimits, ResumeError, Retention,
        Seals, Store, StoreError, StoreSize, Write,
    },
};

/// Longest wait of a statement for a program that has locked the database, such as a backup.
const BUSY: Duration = Duration::from_secs(5);

/// A SQLite database.
pub(super) struct SqliteStore {
    path: Arc<PathBuf>,
    checks: Checks,
    clock: Clock,
    /// `None` while it is dropped, and if the database is only looked at.
    jobs: Option<Jobs>,
    writer: Option<thread::JoinHandle<()>>,
    readers: Readers,
    log: SharedLog,
    trouble: Trouble,
    /// Released last, after all connections are closed.
    _place: LockedDatabase,
}

impl SqliteStore {
    pub(super) async fn open(path: PathBuf, checks: Checks, clock: Clock) -> Result<Self, OpenError> {
        let store = path.display().to_string();
        let opened = tokio::task::spawn_blocking(move || Self::open_blocking(&path, checks, clock)).await;
        opened.unwrap_or_else(|error| Err(StoreError::Unavailable { store, problem: error.to_string() }.into()))
    }

    fn open_blocking(path: &Path, checks: Checks, clock: Clock) -> Result<Self, OpenError> {
        let Opened { place, connection, here, .. } = Opened::at(path, Allowed::None)?;
        let mark = Mark::read(&connection).map_err(|error| explain(&place.path, &error))?;
        let (note, noted) = Note::open(&place.path)?;
        let noted = noted.filter(|noted| is_of_this_database(&place.path, &mark, noted));
        refuse_older_copy(&place.path, &mark, noted.as_ref())?;
        let path = Arc::new(place.path.clone());
        let readers = Readers::of(&path, connect).map_err(|error| explain(&path, &error))?;
        let (jobs, incoming) = Jobs::new();
        let log = SharedLog::default();
        let writer = Writer::new((path.clone(), here), connection, log.clone(), (note, noted), checks, clock);
        let writer = writer.map_err(|error| unwritable(&path, &error))?;
        let writer = thread::Builder::new().name("store".into()).spawn(move || writer.run(incoming));
        let writer = writer.map_err(|error| unavailable(&path, error.to_string()))?;
        let trouble = trouble(&path);
        Ok(Self { path, checks, clock, jobs: Some(jobs), writer: Some(writer), readers, log, trouble, _place: place })
    }

    /// Opens a database to look at it: nothing is written, no file is made beside it, and [`Store::take_over`] only
    /// reads, with the epoch of the last process that wrote.
    pub(super) async fn look(path: PathBuf, checks: Checks, clock: Clock) -> Result<Self, OpenError> {
        let store = path.display().to_string();
        let opened = tokio::task::spawn_blocking(move || {
            let place = look(&path)?;
            let path = Arc::new(place.path.clone());
            let readers = Readers::of(&path, immutable).map_err(|error| explain(&path, &error))?;
            let (log, trouble) = (SharedLog::default(), trouble(&path));
            Ok(Self { path, checks, clock, jobs: None, writer: None, readers, log, trouble, _place: place })
        });
        opened.await.unwrap_or_else(|error| Err(StoreError::Unavailable { store, problem: error.to_string() }.into()))
    }

    /// Reads the state that a process would take over.
    async fn read_contents(&self, seals: Seals) -> Result<Contents, StoreError> {
        let (path, checks, clock, log) = (self.path.clone(), self.checks, self.clock, self.log.clone());
        let read = move |connection: &mut Connection| {
            let read = contents::read_contents(connection, &path, checks, clock, seals).map_err(ReadError::Refused)?;
            log.begins_after(read.term.unlogged_to);
            log.set(&read.term.frontier.log);
            Ok(Contents { epoch: read.term.current, ..read.contents })
        };
        self.readers.read(read).await
    }

    /// How records are read now.
    fn reading(&self) -> Reading {
        Reading { check: self.checks.record, unlogged_to: self.log.unlogged_to() }
    }

    fn jobs(&self) -> Result<&Jobs, StoreError> {
        self.jobs.as_ref().ok_or_else(|| StoreError::Defect { problem: "it is only looked at".into() })
    }
}

/// The reports about commits to the database at this path.
fn trouble(path: &Path) -> Trouble {
    Trouble::new(path.display().to_string(), "see whether its disk answers")
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        // The thread ends when all senders are dropped; joining it ensures that the lock is free afterwards.
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Store for SqliteStore {
    fn take_over(&self, seals: Seals) -> BoxFuture<'_, Result<Contents, StoreError>> {
        match &self.jobs {
            Some(jobs) => Box::pin(jobs.take_over(seals)),
            None => Box::pin(self.read_contents(seals)),
        }
    }

    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.trouble.watch(async move { self.jobs()?.commit(write).await }))
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        self.trouble.reports()
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let how = self.reading();
        Box::pin(self.readers.read(move |connection| reading::cycle(connection, how, cycle_id)))
    }

    fn cycle_of_request(&self, request: RequestKey) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let how = self.reading();
        Box::pin(self.readers.read(move |connection| reading::cycle_of_request(connection, how, &request)))
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        limits: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        let how = self.reading();
        Box::pin(self.readers.read(move |connection| {
            reading::at_once(connection, |history| cycles_before(history, how, before, &filter, limits))
        }))
    }

    fn cycles_after(&self, revision: Revision, limits: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>> {
        let how = self.reading();
        Box::pin(self.readers.read(move |connection| {
            let read = reading::at_once(connection, |history| cycles_after(history, how, revision, limits))?;
            read.map_err(ReadError::Refused)
        }))
    }

    fn events_before(
        &self,
        before: u64,
        filter: EventFilter,
        limit: usize,
    ) -> BoxFuture<'_, Result<EventPage, StoreError>> {
        let check = self.checks.event;
        Box::pin(self.readers.read(move |connection| {
            reading::at_once(connection, |history| events_before(history, check, before, &filter, limit))
        }))
    }

    fn excess(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Excess, StoreError>> {
        Box::pin(async move { self.jobs()?.excess(retention, now, limit).await })
    }

    fn log(&self) -> Log {
        self.log.get()
    }

    fn leaf(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<u64>, StoreError>> {
        Box::pin(self.readers.read(move |connection| Ok(log::leaf(connection, cycle_id)?)))
    }

    fn nodes(&self, nodes: Vec<Node>) -> BoxFuture<'_, Result<Option<Vec<Hash>>, StoreError>> {
        Box::pin(self.readers.read(move |connection| Ok(log::hashes(connection, &nodes)?)))
    }

    fn parts(&self, leaves: Range<u64>, limits: PageLimits) -> BoxFuture<'_, Result<Option<Vec<Part>>, StoreError>> {
        Box::pin(self.readers.read(move |connection| Ok(log::parts(connection, leaves, limits)?)))
    }

    fn publish_checkpoint(&self, checkpoint: String) -> BoxFuture<'_, Result<(), StoreError>> {
        let path = checkpoint_of(&self.path);
        Box::pin(async move {
            let store = path.display().to_string();
            let written = tokio::task::spawn_blocking(move || file::replace(&path, &checkpoint)).await;
            let written = written.unwrap_or_else(|error| Err(io::Error::other(error)));
            written.map_err(|error| StoreError::Unavailable { store, problem: error.to_string() })
        })
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        let path = self.path.clone();
        Box::pin(self.readers.read(move |connection| reading::size(connection, &path)))
    }
}
