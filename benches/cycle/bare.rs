//! What SQLite needs without ledger and audit: the same records, as durable and as atomic, with the numbers of the
//! table `meta`, the checks of the epoch and of the files, and the note beside the database. It has no log, no hashes,
//! no seals and no events. What a cycle costs more with the store of the service is the cost of these.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;
use orchestrator_core::{
    ledger::{Hash, Node, Part},
    model::{CycleId, Name, RequestKey, Revision},
    ports::{
        Contents, Durability, EventFilter, EventPage, Excess, Filter, Found, Log, Page, PageLimits, ResumeError,
        Retention, Seals, Stage, Store, StoreError, StoreSize, Write,
    },
};
use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

/// As many jobs as the store of the service takes.
const QUEUE: usize = 8;
/// Pages in the log at which it is checkpointed, as in the store of the service.
const CHECKPOINT_PAGES: u32 = 1024;

const SCHEMA: &str = "
    CREATE TABLE meta (
        id INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, last_cycle_id INTEGER NOT NULL, last_revision INTEGER NOT NULL,
        commits INTEGER NOT NULL, is_closed INTEGER NOT NULL, succeeded INTEGER NOT NULL
    );
    INSERT INTO meta VALUES (0, 0, 0, 0, 0, 1, 0);
    CREATE TABLE cycles (
        revision INTEGER PRIMARY KEY, cycle_id INTEGER NOT NULL UNIQUE, epoch INTEGER NOT NULL, state INTEGER NOT NULL,
        trigger INTEGER NOT NULL, loop TEXT, request_id TEXT, triggered_by TEXT, finished_at INTEGER NOT NULL,
        record BLOB NOT NULL
    );
    CREATE INDEX cycles_by_request ON cycles (request_id, triggered_by) WHERE request_id IS NOT NULL;
    CREATE TABLE open_cycles (
        cycle_id INTEGER PRIMARY KEY, trigger INTEGER NOT NULL, loop TEXT, scheduled_at INTEGER NOT NULL,
        started_at INTEGER, request_id TEXT, triggered_by TEXT, trace_id BLOB, request BLOB
    );
    CREATE TABLE outputs (name TEXT PRIMARY KEY, cycle_id INTEGER NOT NULL, payload BLOB NOT NULL);
";

type Job = (Arc<Write>, oneshot::Sender<Result<(), StoreError>>);

/// A store of the records of succeeded cycles.
pub(crate) struct Bare {
    jobs: mpsc::Sender<Job>,
    /// An empty store, which answers everything else.
    rest: Arc<dyn Store>,
}

impl Bare {
    pub(crate) fn create(path: &Path, rest: Arc<dyn Store>) -> crate::Result<Self> {
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        connection.pragma_update(None, "secure_delete", "FAST")?;
        connection.execute_batch(SCHEMA)?;
        let note = File::create(path.with_extension("last"))?;
        let path = path.to_owned();
        let mut writer = Writer { connection, path, note, commits: 0, succeeded: 0, synchronous: None };
        let (jobs, mut incoming) = mpsc::channel::<Job>(QUEUE);
        thread::Builder::new().name("bare".into()).spawn(move || {
            while let Some((write, reply)) = incoming.blocking_recv() {
                let written = writer.commit(&write).map_err(|error| StoreError::Defect { problem: error.to_string() });
                let _ = reply.send(written);
                let _ = writer.checkpoint();
            }
        })?;
        Ok(Self { jobs, rest })
    }
}

struct Writer {
    connection: Connection,
    /// Checked to be in its place, with its log, before each commit.
    path: PathBuf,
    note: File,
    commits: u64,
    succeeded: u64,
    synchronous: Option<Durability>,
}

impl Writer {
    fn commit(&mut self, write: &Write) -> crate::Result<()> {
        if self.synchronous != Some(write.durability) {
            let level = if write.durability == Durability::Durable { "FULL" } else { "NORMAL" };
            self.connection.pragma_update(None, "synchronous", level)?;
            self.synchronous = Some(write.durability);
        }
        for file in [&self.path, &self.path.with_extension("db-wal")] {
            fs::metadata(file)?;
        }
        self.commits += 1;
        self.succeeded += write.records.len() as u64;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let revision = write.records.last().map(|record| record.revision.0);
        let written = transaction
            .prepare_cached(
                "UPDATE meta SET epoch = ?1, last_cycle_id = ?2, last_revision = coalesce(?3, last_revision),
                 commits = ?4, is_closed = ?5, succeeded = ?6 WHERE epoch <= ?1",
            )?
            .execute((
                integer(write.epoch.0),
                integer(write.last_cycle_id.0),
                revision.map(integer),
                integer(self.commits),
                write.close,
                integer(self.succeeded),
            ))?;
        if written == 0 {
            return Err("a later epoch has taken over".into());
        }
        for open in &write.open {
            let (started_at, request) = match &open.stage {
                Stage::Begun(at) => (Some(nanoseconds(*at)), None),
                Stage::Waiting(request) => (None, request.as_deref()),
                Stage::Unknown | Stage::Unsealed => (None, None),
            };
            transaction
                .prepare_cached("INSERT OR REPLACE INTO open_cycles VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?
                .execute((
                    integer(open.cycle_id.0),
                    1,
                    open.trigger.loop_name().map(Name::as_str),
                    nanoseconds(open.scheduled_at),
                    started_at,
                    &open.request_id,
                    open.triggered_by.as_ref().map(ToString::to_string),
                    open.trace_id.map(|trace_id| trace_id.0.to_be_bytes()),
                    request,
                ))?;
        }
        for record in &write.records {
            transaction
                .prepare_cached("INSERT INTO cycles VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)")?
                .execute((
                    integer(record.revision.0),
                    integer(record.cycle_id.0),
                    integer(record.epoch.0),
                    1,
                    1,
                    record.trigger.loop_name().map(Name::as_str),
                    &record.request_id,
                    record.triggered_by.as_ref().map(ToString::to_string),
                    nanoseconds(record.finished_at),
                    &record.bytes[..],
                ))?;
            transaction
                .prepare_cached("DELETE FROM open_cycles WHERE cycle_id = ?1")?
                .execute([integer(record.cycle_id.0)])?;
        }
        for (name, output) in &write.outputs {
            transaction.prepare_cached("INSERT OR REPLACE INTO outputs VALUES (?1, ?2, ?3)")?.execute((
                name.as_str(),
                integer(output.cycle_id.0),
                &output.payload.as_bytes()[..],
            ))?;
        }
        transaction.commit()?;
        if write.durability == Durability::Durable {
            let note =
                format!("{:020} {:020} {:020}\n", self.commits, write.last_cycle_id.0, revision.unwrap_or_default());
            self.note.write_all_at(note.as_bytes(), 0)?;
        }
        Ok(())
    }

    fn checkpoint(&self) -> rusqlite::Result<()> {
        let mut looked = self.connection.prepare_cached("PRAGMA wal_checkpoint(NOOP)")?;
        let (pages, copied): (u32, u32) = looked.query_row([], |row| Ok((row.get(1)?, row.get(2)?)))?;
        if pages.saturating_sub(copied) >= CHECKPOINT_PAGES {
            self.connection.prepare_cached("PRAGMA wal_checkpoint(PASSIVE)")?.query_row([], |_| Ok(()))?;
        }
        Ok(())
    }
}

fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

impl Store for Bare {
    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let ended = |_| StoreError::Defect { problem: "its writer has ended".into() };
            let (reply, written) = oneshot::channel();
            self.jobs.send((write, reply)).await.map_err(|_| StoreError::Defect { problem: "it has ended".into() })?;
            written.await.map_err(ended)?
        })
    }

    fn take_over(&self, seals: Seals) -> BoxFuture<'_, Result<Contents, StoreError>> {
        self.rest.take_over(seals)
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        self.rest.trouble()
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        self.rest.cycle(cycle_id)
    }

    fn cycle_of_request(&self, request: RequestKey) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        self.rest.cycle_of_request(request)
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        page: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        self.rest.cycles_before(before, filter, page)
    }

    fn cycles_after(&self, revision: Revision, page: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>> {
        self.rest.cycles_after(revision, page)
    }

    fn events_before(
        &self,
        before: u64,
        filter: EventFilter,
        limit: usize,
    ) -> BoxFuture<'_, Result<EventPage, StoreError>> {
        self.rest.events_before(before, filter, limit)
    }

    fn excess(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Excess, StoreError>> {
        self.rest.excess(retention, now, limit)
    }

    fn log(&self) -> Log {
        self.rest.log()
    }

    fn leaf(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<u64>, StoreError>> {
        self.rest.leaf(cycle_id)
    }

    fn nodes(&self, nodes: Vec<Node>) -> BoxFuture<'_, Result<Option<Vec<Hash>>, StoreError>> {
        self.rest.nodes(nodes)
    }

    fn parts(&self, leaves: Range<u64>, limits: PageLimits) -> BoxFuture<'_, Result<Option<Vec<Part>>, StoreError>> {
        self.rest.parts(leaves, limits)
    }

    fn publish_checkpoint(&self, checkpoint: String) -> BoxFuture<'_, Result<(), StoreError>> {
        self.rest.publish_checkpoint(checkpoint)
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        self.rest.size()
    }
}
