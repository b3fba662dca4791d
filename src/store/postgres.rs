//! The store in a PostgreSQL database, on one server or on several of which one takes over from another.
//!
//! How it keeps its promises:
//!
//! * Acknowledged writes are not lost: a commit has returned with at least `synchronous_commit = on` and without a
//!   warning, so it is on the disk, and on those of the standbys that the server waits for. Buffered writes are as
//!   durable.
//! * One writer: each commit is one statement that writes only if no other process has written since the one before.
//! * The outcome of a commit whose answer was lost is found out: see `chain`.
//! * Changes by other programs are detected: see `seal`.
//!
//! One task writes (`writer`), over a connection of its own. A few other connections read (`rows`).

mod commit;
mod connect;
mod copying;
mod error;
mod figures;
mod leader;
mod parameter;
mod rows;
mod schema;
#[cfg(test)]
pub(super) mod tests;
mod tls;
mod url;
mod writer;

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use futures_util::{future::BoxFuture, stream::BoxStream};
use jiff::Timestamp;
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::task::AbortOnDropHandle;

pub(super) use self::copying::Copying;
use self::{
    commit::{DURABLE_BESIDE, Line},
    connect::{APPLICATION, Connection, Connector},
    error::{ends_connection, explain, is_worth_repeating},
    leader::{LastClaim, LeaderRow, epoch_of_leader},
    parameter::Parameter,
    rows::{Access, Failed, Required, Snapshot, at_once},
    writer::{Writer, failure, read},
};
pub use self::{schema::Migrated, url::PostgresUrl};
use super::{
    AcceptError, Accepted, EntryCodec, LogKeys, OpenError,
    entries::{Reading, Rows as _},
    jobs::Jobs,
    pages::{cycles_after, cycles_before, events_before, record_of},
    parts::parts,
    row::{flag, integer, json, leaf, name, number, optional_text},
    term::SharedLog,
    trouble::Trouble,
};
use crate::{
    clock::Clock,
    ledger::{Hash, Node, Part, SealKeys, Signer},
    model::{CycleId, Epoch, RequestKey, Revision},
    ports::{
        Checks, Contents, EventFilter, EventPage, Excess, Filter, FormerNames, Found, Leadership, Log, Page,
        PageLimits, ResumeError, Retention, Seals, ServerFigures, ServerState, Store, StoreError, StoreSize, Write,
    },
};

/// Number of reading connections: pages of the history are short, and the server does the work.
const READERS: usize = 4;
/// Longest time for one statement of a read, which takes milliseconds. Reads whose callers have gone count until they
/// end, so those that stopped would keep all others waiting.
const STATEMENT: Duration = Duration::from_secs(10);

/// A PostgreSQL database.
pub(super) struct PostgresStore {
    readers: Arc<Readers>,
    checks: Checks,
    clock: Clock,
    /// `None` if the database is only looked at.
    writing: Option<Writing>,
    log: SharedLog,
    trouble: Trouble,
}

/// How a process writes.
struct Writing {
    jobs: Jobs,
    leader: Arc<LeaderRow>,
    _writer: AbortOnDropHandle<()>,
    /// Notices that a standby was promoted.
    _asking: AbortOnDropHandle<()>,
}

impl PostgresStore {
    pub(super) async fn open(url: &PostgresUrl, checks: Checks, clock: Clock) -> Result<Self, OpenError> {
        Self::open_by(Connector::new(url.clone(), clock).await?, (checks, clock), false).await
    }

    /// Opens a database that is reached so, even if it was moved.
    async fn open_by(
        connector: Connector,
        (checks, clock): (Checks, Clock),
        even_moved: bool,
    ) -> Result<Self, OpenError> {
        let connector = Arc::new(connector);
        let url = connector.url();
        let mut connection = connector.connect(APPLICATION).await?;
        connector.check_session(&connection).await?;
        schema::migrate(&connector, &mut connection).await?;
        schema::check_additions(&connector, &connection).await?;
        report_asynchronous(&connector, &connection).await?;
        let (log, claim) = (SharedLog::default(), LastClaim::default());
        // A follower reads records without having taken the database over.
        let unlogged_to = format!("SELECT unlogged_to FROM {}.meta WHERE id = 0", url.schema());
        let found = connection.query(&unlogged_to, &[]).await.map_err(|error| explain(&url.to_string(), &error))?;
        if let Some(number) = found.first().and_then(|row| number(row, "unlogged_to").ok()) {
            log.begins_after(Revision(number));
        }
        let (jobs, incoming) = Jobs::new();
        let leader = Arc::new(LeaderRow::new(connector.clone(), claim.clone()));
        let writer = Writer::new(connector.clone(), claim, log.clone(), (checks, clock), even_moved);
        let writer = AbortOnDropHandle::new(tokio::spawn(writer.run(incoming)));
        let asks = connector.clone();
        let asking = AbortOnDropHandle::new(tokio::spawn(async move { asks.keep_asking().await }));
        let writing = Writing { jobs, leader, _writer: writer, _asking: asking };
        Ok(Self::new(connector, connection, (checks, clock), log, Some(writing)))
    }

    /// Opens a database to look at it: nothing is written, and [`Store::take_over`] only reads, with the epoch of the
    /// last process that wrote.
    pub(super) async fn look(url: &PostgresUrl, checks: Checks, clock: Clock) -> Result<Self, OpenError> {
        let connector = Arc::new(Connector::new(url.clone(), clock).await?);
        let connection = connector.connect(APPLICATION).await?;
        schema::check(&connector, &connection).await?;
        schema::check_additions(&connector, &connection).await?;
        Ok(Self::new(connector, connection, (checks, clock), SharedLog::default(), None))
    }

    fn new(
        connector: Arc<Connector>,
        connection: Connection,
        (checks, clock): (Checks, Clock),
        log: SharedLog,
        writing: Option<Writing>,
    ) -> Self {
        let idle = Mutex::new(vec![Arc::new(connection)]);
        let permits = Arc::new(Semaphore::new(READERS));
        let readers = Arc::new(Readers { connector, idle, permits });
        Self::over(readers, (checks, clock), log, writing)
    }

    fn over(readers: Arc<Readers>, (checks, clock): (Checks, Clock), log: SharedLog, writing: Option<Writing>) -> Self {
        let remedy = "see whether the server and the network work, and whether it waits for a standby that is away";
        let trouble = Trouble::new(readers.connector.url().to_string(), remedy);
        Self { readers, checks, clock, writing, log, trouble }
    }

    /// Executes a statement that no commit depends on. It begins with [`DURABLE_BESIDE`].
    async fn write_beside(
        &self,
        statement: &str,
        parameters: &[&dyn Parameter],
    ) -> Result<Vec<tokio_postgres::Row>, StoreError> {
        let store = self.readers.connector.url().to_string();
        let mut reader = self.readers.take(false).await?;
        reader.is_spent = true;
        let connection = reader.as_ref();
        let _ = connection.take_warning();
        let rows = select! {
            biased;
            rows = connection.query(statement, parameters) => rows.map_err(|error| explain(&store, &error))?,
            problem = self.readers.connector.has_passed(connection.server(), None) => {
                return Err(StoreError::Unavailable { store, problem });
            }
        };
        let warning = connection.take_warning();
        reader.is_spent = false;
        warning.map_or(Ok(rows), |problem| Err(StoreError::Unavailable { store, problem }))
    }

    /// How records are read now.
    fn reading(&self) -> Reading {
        Reading { check: self.checks.record, unlogged_to: self.log.unlogged_to() }
    }

    fn jobs(&self) -> Result<&Jobs, StoreError> {
        let jobs = self.writing.as_ref().map(|writing| &writing.jobs);
        jobs.ok_or_else(|| StoreError::Defect { problem: "it is only looked at".into() })
    }
}

/// The connections that read.
struct Readers {
    connector: Arc<Connector>,
    idle: Mutex<Vec<Arc<Connection>>>,
    permits: Arc<Semaphore>,
}

/// A connection for one read at a time, until this is dropped.
struct Reader {
    readers: Arc<Readers>,
    connection: Arc<Connection>,
    /// True if it must not be used again, by what is known now: a statement is under way, which goes on if it is not
    /// awaited; or its server lacks records.
    is_spent: bool,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<Connection> for Reader {
    fn as_ref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Reader {
    /// Keeps the connection for further use, unless it has ended or a transaction may be open.
    fn drop(&mut self) {
        if !self.connection.is_closed() && !self.is_spent && !thread::panicking() {
            self.readers.idle().push(self.connection.clone());
        }
    }
}

impl Readers {
    fn idle(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle connection, or a new one. With `anew`, not the one that was used last.
    async fn take(self: &Arc<Self>, anew: bool) -> Result<Reader, StoreError> {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.map_err(|error| StoreError::Defect { problem: error.to_string() })?;
        let idle = {
            let mut idle = self.idle();
            idle.retain(|connection| self.connector.has_use_for(connection));
            idle.pop()
        };
        let connection = match idle.filter(|_| !anew) {
            Some(connection) => connection,
            None => Arc::new(self.connector.connect(APPLICATION).await?),
        };
        Ok(Reader { readers: self.clone(), connection, is_spent: false, _permit: permit })
    }

    /// Reads as of one moment. A connection that has ended meanwhile, has statements for other tables, or leads to an
    /// earlier primary, is replaced once. One whose server lacks the required record is not used again. If this is
    /// dropped, the reading goes on to its end, and counts until then.
    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl Fn(&mut Snapshot<'_>) -> Result<T, Failed> + Clone + Send + 'static,
    ) -> Result<T, StoreError> {
        for is_last in [false, true] {
            let reader = self.take(is_last).await?;
            let schema = self.connector.url().schema();
            let read = read.clone();
            let required = self.connector.required();
            let (server, used) = (reader.as_ref().server().clone(), reader.as_ref().used());
            let read = move |snapshot: &mut Snapshot<'_>, (): &mut ()| {
                snapshot.check(required)?;
                read(snapshot)
            };
            let (used_up, result) = select! {
                biased;
                read = at_once(reader, schema, Access::Within(STATEMENT), (), read) => read,
                never = self.connector.end_once_passed(used, None) => match never {},
            };
            match result {
                Err(Failed::Statement(error)) if goes_elsewhere(&error) && !is_last => {}
                Err(behind @ Failed::Behind(_)) => {
                    if let Some((mut reader, ())) = used_up {
                        reader.is_spent = true;
                    }
                    self.connector.doubt();
                    return Err(failure(&self.connector, &behind));
                }
                // A standby was promoted meanwhile, and may have more by now.
                Ok(_) if let Some(problem) = self.connector.outdated(&server) => {
                    if is_last {
                        return Err(StoreError::Unavailable { store: self.connector.url().to_string(), problem });
                    }
                }
                result => return result.map_err(|failed| failure(&self.connector, &failed)),
            }
        }
        Err(StoreError::Defect { problem: "no connection was tried".into() })
    }
}

/// Logs that there are standbys for which commits don't wait.
async fn report_asynchronous(connector: &Connector, connection: &Connection) -> Result<(), StoreError> {
    let standbys = "SELECT 1 WHERE current_setting('synchronous_standby_names') = ''
                             AND EXISTS (SELECT 1 FROM pg_stat_replication)";
    let store = connector.url().to_string();
    let found = connection.query(standbys, &[]).await.map_err(|error| explain(&store, &error))?;
    if !found.is_empty() {
        tracing::warn!(
            store,
            "the server has standbys, and commits don't wait for them: a failover can lose acknowledged cycles. Name \
             them in synchronous_standby_names of the server"
        );
    }
    Ok(())
}

/// True if a read with this error may succeed at once over a new connection.
fn goes_elsewhere(error: &tokio_postgres::Error) -> bool {
    ends_connection(error) || is_worth_repeating(error)
}

/// Makes the tables of a store, or applies the migrations that they lack. Services of the version before go on with
/// them. Then gives the role `grant_to` the rights that a service needs.
///
/// # Errors
/// The user may not do it, the role does not exist, a later version of this software was there, the schema has tables
/// of other software, or no server of the URL takes writes.
pub async fn migrate(url: &PostgresUrl, grant_to: Option<&str>, clock: Clock) -> Result<Migrated, OpenError> {
    let connector = Connector::new(url.clone(), clock).await?;
    let mut connection = connector.connect(APPLICATION).await?;
    let migrated = schema::migrate(&connector, &mut connection).await?;
    if let Some(role) = grant_to {
        let granted = connection.batch_execute(&schema::grants(url.schema(), role)).await;
        granted.map_err(|error| error::not_granted(url.to_string(), role, &error))?;
    }
    Ok(migrated)
}

/// Accepts a store as it is: see [`accept`](super::accept).
pub(super) async fn accept(
    url: &PostgresUrl,
    LogKeys { keys, new }: LogKeys,
    origin: Option<String>,
    EntryCodec { checks, event, began }: EntryCodec,
    clock: Clock,
) -> Result<Accepted, AcceptError> {
    let connector = Connector::new(url.clone(), clock).await.map_err(OpenError::from)?;
    let store = PostgresStore::open_by(connector, (checks, clock), true).await?;
    let signer = Signer::of(origin, keys);
    let taken = store.take_over(Seals::Renewed(SealKeys::of(&signer))).await;
    let Contents { epoch, last_cycle_id, missing, checkpoint, .. } = taken.map_err(OpenError::from)?;
    new.save()?;
    let lacks = missing.iter().map(|leaves| leaves.end - leaves.start).sum();
    let began = Some(began(checkpoint.unwrap_or_default(), missing));
    let write = Write { epoch, last_cycle_id, audit: vec![event], began, ..Write::default() };
    store.commit(Arc::new(write)).await.map_err(OpenError::from)?;
    let log = store.log().frontier;
    store.publish_checkpoint(signer.sign(log.size(), log.root())).await.map_err(OpenError::from)?;
    let schema = url.schema();
    let served = format!("WITH {DURABLE_BESIDE} UPDATE {schema}.meta SET not_served = NULL FROM durable WHERE id = 0");
    store.write_beside(&served, &[]).await.map_err(OpenError::from)?;
    // Another program may have changed that row, which nothing seals, or an older copy has replaced it: replicas that
    // have seen a later term go on from this one.
    let led = format!(
        "WITH {DURABLE_BESIDE} UPDATE {schema}.leader SET epoch = $1, beat = 0, released = true FROM durable
         WHERE id = 0 AND NOT epoch BETWEEN $1 AND $2"
    );
    let latest = integer(Epoch::by_clock(Timestamp::MAX).0);
    store.write_beside(&led, &[&integer(epoch.0), &latest]).await.map_err(OpenError::from)?;
    let (store, noted_cycle_id) = (url.to_string(), last_cycle_id);
    Ok(Accepted { store, earlier: None, last_cycle_id, noted_cycle_id, missing: lacks })
}

/// Renames the orchestrator of a store: from now on, only replicas with this id claim to lead. One that leads goes on
/// until it is replaced. Returns the earlier id; `None` if no replica has led yet.
///
/// # Errors
/// The store does not exist, or can't be written.
pub async fn rename(url: &PostgresUrl, id: &str, checks: Checks, clock: Clock) -> Result<Option<String>, OpenError> {
    let store = PostgresStore::look(url, checks, clock).await?;
    let schema = url.schema();
    // The beat rises, so that a replica which has seen the earlier id does not claim the row meanwhile.
    let rename = format!(
        "WITH {DURABLE_BESIDE}, earlier AS (SELECT orchestrator_id FROM {schema}.leader WHERE id = 0 FOR UPDATE)
         UPDATE {schema}.leader SET orchestrator_id = $1, beat = beat + 1 FROM durable, earlier WHERE id = 0
         RETURNING earlier.orchestrator_id AS earlier"
    );
    let renamed = store.write_beside(&rename, &[&id.to_owned()]).await?;
    Ok(renamed.first().and_then(|row| optional_text(row, "earlier").ok().flatten()))
}

/// The statements by which [`migrate`] makes the tables of a new store in the schema of this URL.
#[must_use]
pub fn tables(url: &PostgresUrl, grant_to: Option<&str>) -> String {
    let schema = url.schema();
    let grants = grant_to.map(|role| schema::grants(schema, role)).unwrap_or_default();
    format!("BEGIN;\n{}{grants}COMMIT;\n", schema::statements(schema, 0))
}

impl Store for PostgresStore {
    fn leadership(&self) -> Option<Arc<dyn Leadership>> {
        let leader = self.writing.as_ref()?.leader.clone();
        Some(leader)
    }

    fn look(&self) -> Option<Arc<dyn Store>> {
        let log = SharedLog::default();
        Some(Arc::new(Self::over(self.readers.clone(), (self.checks, self.clock), log, None)))
    }

    fn take_over(&self, seals: Seals) -> BoxFuture<'_, Result<Contents, StoreError>> {
        Box::pin(async move {
            let Some(Writing { jobs, .. }) = &self.writing else {
                let (connector, how) = (&self.readers.connector, (self.checks, self.clock));
                let line = &mut Line::new(APPLICATION);
                let taken = read(connector, line, how, seals, (false, true), None).await?;
                self.log.begins_after(taken.term.unlogged_to);
                self.log.set(&taken.term.frontier.log);
                return Ok(Contents { epoch: taken.term.current, ..taken.contents });
            };
            let contents = jobs.take_over(seals).await?;
            self.require(contents.last_revision, Epoch::default());
            Ok(contents)
        })
    }

    fn commit(&self, write: Arc<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.trouble.watch(async move { self.jobs()?.commit(write).await }))
    }

    fn trouble(&self) -> BoxStream<'static, Option<StoreError>> {
        self.trouble.reports()
    }

    fn require(&self, revision: Revision, epoch: Epoch) {
        self.readers.connector.require(Required { revision, epoch });
    }

    fn cycle(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let how = self.reading();
        Box::pin(self.readers.read(move |snapshot| {
            let row = snapshot.record_where("cycle_id = $1", &[&integer(cycle_id.0)])?;
            row.map(|row| record_of(snapshot, how, &row)).transpose()
        }))
    }

    fn cycle_of_request(&self, request: RequestKey) -> BoxFuture<'_, Result<Option<Found>, StoreError>> {
        let how = self.reading();
        let (id, caller) = (request.request_id, request.triggered_by.map(|caller| caller.to_string()));
        Box::pin(self.readers.read(move |snapshot| {
            let condition = "request_id = $1 AND triggered_by IS NOT DISTINCT FROM $2 ORDER BY revision DESC LIMIT 1";
            let row = snapshot.record_where(condition, &[&id.as_bytes(), &caller])?;
            row.map(|row| record_of(snapshot, how, &row)).transpose()
        }))
    }

    fn cycles_before(
        &self,
        before: Revision,
        filter: Filter,
        limits: PageLimits,
    ) -> BoxFuture<'_, Result<Page, StoreError>> {
        let how = self.reading();
        Box::pin(self.readers.read(move |snapshot| cycles_before(snapshot, how, before, &filter, limits)))
    }

    fn cycles_after(&self, revision: Revision, limits: PageLimits) -> BoxFuture<'_, Result<Vec<Found>, ResumeError>> {
        let how = self.reading();
        Box::pin(async move { self.readers.read(move |snapshot| cycles_after(snapshot, how, revision, limits)).await? })
    }

    fn former_names(&self) -> BoxFuture<'_, Result<Vec<FormerNames>, StoreError>> {
        Box::pin(self.readers.read(|snapshot| {
            let rows = snapshot
                .query("SELECT name, former_names FROM SCHEMA.subsystems WHERE former_names IS NOT NULL", &[])?;
            // Unreadable rows were logged when the store was taken over.
            let names = |row| Some((name(row, "name").ok()?, json(row, "former_names").ok()??));
            Ok(rows.iter().filter_map(|row| names(row)).collect())
        }))
    }

    fn events_before(
        &self,
        before: u64,
        filter: EventFilter,
        limit: usize,
    ) -> BoxFuture<'_, Result<EventPage, StoreError>> {
        let check = self.checks.event;
        Box::pin(self.readers.read(move |snapshot| events_before(snapshot, check, before, &filter, limit)))
    }

    fn excess(&self, retention: Retention, now: Timestamp, limit: usize) -> BoxFuture<'_, Result<Excess, StoreError>> {
        Box::pin(async move { self.jobs()?.excess(retention, now, limit).await })
    }

    fn log(&self) -> Log {
        self.log.get()
    }

    fn leaf(&self, cycle_id: CycleId) -> BoxFuture<'_, Result<Option<u64>, StoreError>> {
        Box::pin(self.readers.read(move |snapshot| {
            let found =
                snapshot.query("SELECT leaf FROM SCHEMA.cycles WHERE cycle_id = $1", &[&integer(cycle_id.0)])?;
            Ok(found.first().map(|row| leaf(row)).transpose()?.flatten())
        }))
    }

    fn nodes(&self, nodes: Vec<Node>) -> BoxFuture<'_, Result<Option<Vec<Hash>>, StoreError>> {
        Box::pin(self.readers.read(move |snapshot| nodes.iter().map(|node| snapshot.hash(*node)).collect()))
    }

    fn parts(&self, leaves: Range<u64>, limits: PageLimits) -> BoxFuture<'_, Result<Option<Vec<Part>>, StoreError>> {
        Box::pin(self.readers.read(move |snapshot| {
            let row = snapshot.one("SELECT unlogged_to, last_revision FROM SCHEMA.meta", &[])?;
            let after = |column| Ok::<_, Failed>(Revision(number(&row, column)?).next());
            let logged = after("unlogged_to")?..after("last_revision")?;
            parts(snapshot, logged, leaves.clone(), limits)
        }))
    }

    fn publish_checkpoint(&self, checkpoint: String) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let schema = self.readers.connector.url().schema();
            // A later leader may have published a newer one, so the row of the leader stays until this is written.
            let put = format!(
                "WITH {DURABLE_BESIDE},
                 leads AS (SELECT 1 FROM {schema}.leader l, durable WHERE id = 0 AND epoch = coalesce($2, epoch)
                           FOR SHARE OF l),
                 put AS (INSERT INTO {schema}.checkpoint (id, note) SELECT 0, $1 FROM leads
                         ON CONFLICT (id) DO UPDATE SET note = EXCLUDED.note RETURNING 1)
                 SELECT epoch FROM {schema}.leader WHERE NOT EXISTS (SELECT 1 FROM put)"
            );
            let claim = self.writing.as_ref().and_then(|writing| writing.leader.claimed());
            // If this fails, it is published again with the next one.
            let other = self.write_beside(&put, &[&checkpoint, &claim.map(|epoch| integer(epoch.0))]).await?;
            let Some(row) = other.first() else { return Ok(()) };
            Err(StoreError::Fenced { by: epoch_of_leader(&self.readers.connector, row, "epoch")? })
        })
    }

    fn server(&self) -> BoxFuture<'_, Option<ServerFigures>> {
        Box::pin(async move {
            // Users see their own sessions, and others with the role pg_read_all_stats.
            let read = self.readers.read(|snapshot| {
                let state = "SELECT current_setting('synchronous_standby_names') <> '' AS is_synchronous,
                                    greatest(txid_snapshot_xmax(now) - txid_snapshot_xmin(now),
                                             (SELECT max(age(backend_xmin)) FROM pg_stat_activity),
                                             (SELECT max(age(transaction)) FROM pg_prepared_xacts),
                                             (SELECT max(greatest(age(xmin), age(catalog_xmin)))
                                              FROM pg_replication_slots))::bigint AS oldest_xmin_age
                             FROM txid_current_snapshot() AS now";
                let row = snapshot.one(state, &[])?;
                let is_synchronous = flag(&row, "is_synchronous")?;
                Ok(ServerState { is_synchronous, oldest_xmin_age: number(&row, "oldest_xmin_age")? })
            });
            let state = read.await.inspect_err(|error| tracing::debug!(%error, "the server tells nothing of itself"));
            Some(ServerFigures { state: state.ok(), ..self.readers.connector.figures().get() })
        })
    }

    fn size(&self) -> BoxFuture<'_, Result<StoreSize, StoreError>> {
        let schema = self.readers.connector.url().schema().to_owned();
        Box::pin(self.readers.read(move |snapshot| {
            let size = "SELECT succeeded + degraded + failed + cancelled + interrupted AS records,
                               (SELECT sum(pg_total_relation_size(c.oid))::bigint
                                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                                WHERE n.nspname = $1 AND c.relkind = 'r') AS bytes
                        FROM SCHEMA.meta";
            let row = snapshot.one(size, &[&schema])?;
            Ok(StoreSize { records: number(&row, "records")?, bytes: number(&row, "bytes")? })
        }))
    }
}
