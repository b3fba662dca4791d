//! The thread that writes: it takes the database over, commits, and checkpoints SQLite's log.

#[cfg(test)]
use std::sync::Mutex;
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use rusqlite::Connection;
use tokio::sync::mpsc;

use super::{
    BUSY,
    commit::{synchronize, transact},
    contents::{Read, read_contents},
    error::{explain, unavailable},
    identity::Identity,
    note::{Mark, Note, lost},
    place::{FileId, file_id, log_of},
    rows::{Snapshot, epoch},
};
use crate::{
    clock::Clock,
    ports::{Checks, Contents, Durability, Excess, Retention, Seals, StoreError, Write},
    store::{
        excess::Searches,
        frontier::Appended,
        jobs::Job,
        not_taken_over,
        term::{SharedLog, Term},
    },
};

/// Pages of 4 KiB in the log and not yet in the database at which the log is checkpointed, between two writes.
const CHECKPOINT_PAGES: u32 = 1024;
/// A log that has grown beyond this, because of a reader or a large commit, is truncated after a checkpoint; a smaller
/// file is overwritten from its start, which is faster than growing it again.
const LARGE_LOG: u64 = 16 << 20;

pub(super) struct Writer {
    path: Arc<PathBuf>,
    checks: Checks,
    clock: Clock,
    /// The open files of the connection.
    files: Files,
    connection: Connection,
    /// The file of the database.
    here: Identity,
    database_id: [u8; 16],
    /// `None` until it is taken over.
    term: Option<Term>,
    /// For what retention removes.
    searches: Searches,
    /// The log as of the last durable commit.
    log: SharedLog,
    /// The note of how far the database was written; `None` once writing it has failed.
    note: Option<Note>,
    /// The note of this database when it was opened.
    noted: Option<Mark>,
    /// The durability that the connection is set to.
    synchronous: Durability,
    /// Set once it was reported that a reader blocks the checkpoint of a large log, until that is made.
    is_told: bool,
}

impl Writer {
    /// The writer over this connection to the database at `path`, with the note beside it and the mark that this had.
    ///
    /// # Errors
    /// Its files are not in their places.
    pub(super) fn new(
        (path, here): (Arc<PathBuf>, Identity),
        connection: Connection,
        log: SharedLog,
        (note, noted): (Note, Option<Mark>),
        checks: Checks,
        clock: Clock,
    ) -> io::Result<Self> {
        Ok(Self {
            files: files_of(&path)?,
            path,
            checks,
            clock,
            connection,
            here,
            database_id: [0; 16],
            term: None,
            searches: Searches::default(),
            log,
            note: Some(note),
            noted,
            synchronous: Durability::Durable,
            is_told: false,
        })
    }

    /// Does the jobs in their order, until no more can come.
    pub(super) fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.blocking_recv() {
            // The caller may have gone; the write is done anyway.
            match job {
                Job::TakeOver(seals, reply) => drop(reply.send(self.take_over(seals))),
                Job::Commit(write, reply) => drop(reply.send(self.commit(&write))),
                Job::Excess(retention, now, limit, reply) => drop(reply.send(self.excess(&retention, now, limit))),
            }
            self.checkpoint();
        }
    }

    fn take_over(&mut self, seals: Seals) -> Result<Contents, StoreError> {
        let earlier = self.term.take().map(|term| term.epoch.next());
        let read = read_contents(&mut self.connection, &self.path, self.checks, self.clock, seals)?;
        let Read { mut contents, mut term, mark } = read;
        contents.epoch = contents.epoch.max(earlier.unwrap_or_default());
        contents.lost = self.noted.and_then(|noted| lost(&mark, &noted));
        term.epoch = contents.epoch;
        self.log.begins_after(term.unlogged_to);
        self.log.set(&term.frontier.log);
        self.searches = Searches::default();
        self.database_id = mark.id;
        self.term = Some(term);
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
        let appended = Appended::to(&term.frontier.log, write);
        let next = transact(term, &mut self.connection, &self.here, write, &appended).map_err(explained)?;
        let next = next.map_err(|by| StoreError::Fenced { by })?;
        term.advance(write, appended, next);
        if write.durability == Durability::Durable {
            self.log.set(&term.frontier.log);
            let mark = Mark::of(term, self.database_id);
            self.note(&mark);
        }
        if begins {
            // Now the database file itself contains its identity, without its log.
            self.copy_log();
        }
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

    /// The records and events that exceed these limits.
    fn excess(&mut self, retention: &Retention, now: Timestamp, limit: usize) -> Result<Excess, StoreError> {
        let term = self.term.as_ref().ok_or_else(not_taken_over)?;
        let excess = (|| {
            let transaction = self.connection.transaction()?;
            let epoch = epoch(&transaction)?;
            if epoch != term.current {
                return Ok(Err(StoreError::Fenced { by: epoch }));
            }
            self.searches.excess(&mut Snapshot(&transaction), term, self.checks, retention, now, limit).map(Ok)
        })();
        let (excess, problem) = excess.unwrap_or_else(|error| Err(explain(&self.path, &error)))?;
        Ok(Excess { damaged: problem.map(|problem| kept(&self.path, &problem)), ..excess })
    }

    /// Checkpoints the log once it has grown, so that it can be overwritten. If a reader blocks that, every job retries
    /// it, which costs little while the reader stays.
    fn checkpoint(&mut self) {
        if self.is_told || self.wal_checkpoint("NOOP").is_ok_and(|pages| pages >= CHECKPOINT_PAGES) {
            self.copy_log();
        }
    }

    /// Checkpoints the log in this mode, and returns the number of its pages that are not in the database yet.
    fn wal_checkpoint(&self, mode: &str) -> rusqlite::Result<u32> {
        let mut checkpoint = self.connection.prepare_cached(&format!("PRAGMA wal_checkpoint({mode})"))?;
        checkpoint.query_row([], |row| {
            let (pages, copied): (u32, u32) = (row.get(1)?, row.get(2)?);
            Ok(pages.saturating_sub(copied))
        })
    }

    /// Checkpoints the log as far as readers allow, and truncates it if it is large.
    fn copy_log(&mut self) {
        let log = log_of(&self.path);
        let bytes = || fs::metadata(&log).map_or(0, |log| log.len());
        let (size, store) = (bytes(), self.path.display());
        let mode = if size > LARGE_LOG { "TRUNCATE" } else { "PASSIVE" };
        // Commits don't wait for readers.
        let left = self.connection.busy_timeout(Duration::ZERO).and_then(|()| self.wal_checkpoint(mode));
        let waits_again = self.connection.busy_timeout(BUSY);
        match left.and_then(|left| waits_again.map(|()| left)) {
            Ok(0) if self.is_told => {
                tracing::info!(%store, bytes = bytes(), "the log was checkpointed into the database");
                self.is_told = false;
            }
            Ok(1..) if size > LARGE_LOG && !self.is_told => {
                tracing::warn!(
                    %store,
                    bytes = size,
                    "the log can't be checkpointed into the database, and grows: another program reads the database, \
                     and has not ended its transaction"
                );
                self.is_told = true;
            }
            Ok(_) => {}
            // Nothing is lost: the log grows, and the next write retries.
            Err(error) => tracing::warn!(%store, %error, "can't checkpoint the log into the database"),
        }
    }
}

/// The error for what retention keeps, since an entry is missing or not what was written.
fn kept(path: &Path, what: &str) -> StoreError {
    let problem = format!("retention keeps more than its limits allow: {what}");
    StoreError::Corrupt { store: path.display().to_string(), problem }
}

/// The files at the paths of the database and its log.
type Files = [FileId; 2];

fn files_of(path: &Path) -> io::Result<Files> {
    Ok([file_id(path)?, file_id(&log_of(path))?])
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
