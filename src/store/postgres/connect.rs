//! Connections to the server that takes writes.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    convert::Infallible,
    future::{pending, poll_fn},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    select,
    sync::{Notify, OnceCell, watch},
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_postgres::{
    AsyncMessage, Client, Config, Error, Row, RowStream, SimpleQueryMessage, Statement, Transaction,
    config::Host,
    error::{DbError, Severity, SqlState},
    types::{ToSql, Type},
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use super::{
    error::{explain, is_ambiguous},
    figures::Figures,
    leader::epoch_of_leader,
    parameter::Parameter,
    rows::Required,
    schema::Migrations,
    tls,
    url::{CONNECT, PostgresUrl},
};
use crate::{clock::Clock, file, model::Epoch, ports::StoreError};

/// The name of sessions that only read, or whose locks no candidate may end: what an operator does takes its time.
pub(super) const APPLICATION: &str = "orchestrator";

/// The name of the sessions that write in the term of this epoch.
pub(super) fn application_of(epoch: Epoch) -> String {
    format!("{APPLICATION}/{epoch}")
}

/// Longest time for an answer on which nothing depends. A commit that has had none for this time is looked after.
pub(super) const ANSWER: Duration = Duration::from_secs(2);

/// Most statements that stay prepared in a session: commits have few forms, and reads fewer.
const PREPARED: usize = 64;

/// The timeline of a server that takes writes: the first part of the name of its present WAL file.
const TIMELINE: &str = "SELECT ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int";

/// Connects to the servers of one URL.
pub(super) struct Connector {
    url: PostgresUrl,
    migrations: Migrations,
    figures: Arc<Figures>,
    tls: MakeRustlsConnect,
    /// The latest primary. All statements that wait for an answer of an earlier one learn of it.
    latest: watch::Sender<Latest>,
    /// Set once all hosts were asked for their timelines: an earlier primary may be the first of them when a process
    /// starts.
    has_asked: OnceCell<()>,
    /// The record that a server must have: see [`Store::require`](crate::ports::Store::require).
    required: Mutex<Required>,
    /// A server lacks what must be there, so all hosts are to be asked at once.
    doubts: Notify,
    /// The newest timeline for which it was logged that there is such a server.
    told: AtomicI32,
}

/// The latest primary that was reached.
#[derive(Clone, Copy, Default)]
struct Latest {
    /// The highest timeline that a server had; 0 before one is known. A server with a lower one is an earlier primary:
    /// it lacks what was acknowledged since, so nothing is read there or written.
    timeline: i32,
    /// The number of the first host of the URL with this timeline.
    host: usize,
}

/// A connection. Once it is dropped, the server rolls back what it has begun.
pub(super) struct Connection {
    client: Client,
    /// By their texts. `None` behind a pooler, which executes each transaction in any session.
    prepared: Option<Mutex<BTreeMap<String, Statement>>>,
    figures: Arc<Figures>,
    server: Server,
    /// What the server has warned of since this was last taken.
    warning: Arc<Mutex<Option<String>>>,
    /// Moves the bytes. Returns the error by which it has ended, if any.
    task: AbortOnDropHandle<Option<Error>>,
}

/// The server of a connection.
#[derive(Clone)]
pub(super) struct Server {
    /// Its host and port, for people.
    pub(super) name: Arc<str>,
    /// Number of its history, which is higher on a standby that was promoted. `None` if it does not tell it.
    pub(super) timeline: Option<i32>,
}

/// A connection that a thread uses.
pub(super) struct Used {
    server: Server,
    end: AbortHandle,
}

impl AsRef<Connection> for Connection {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Connection {
    /// True if its server takes writes. (tokio-postgres could ask that when it connects, and would drop the reason for
    /// which the server, or a pooler, ends the connection.)
    async fn takes_writes(&self) -> Result<bool, Error> {
        let rows = self.client.simple_query("SHOW transaction_read_only").await?;
        Ok(rows.iter().any(|row| matches!(row, SimpleQueryMessage::Row(row) if row.get(0) == Some("off"))))
    }

    /// For statements in one transaction, without parameters: those with parameters would be prepared by name, which a
    /// pooler does not allow.
    pub(super) async fn transaction(&mut self) -> Result<Transaction<'_>, Error> {
        self.client.transaction().await
    }

    /// Its server, with the timeline that this had when the connection was made.
    pub(super) fn server(&self) -> &Server {
        &self.server
    }

    /// By which it can be ended from elsewhere, while a thread uses it.
    pub(super) fn used(&self) -> Used {
        Used { server: self.server.clone(), end: self.task.abort_handle() }
    }

    /// Ends it, while its server does not answer. Statements that wait for an answer over it then fail.
    pub(super) fn give_up(&self) {
        self.task.abort();
    }

    /// True once it has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Executes statements without parameters.
    pub(super) async fn batch_execute(&self, statements: &str) -> Result<(), Error> {
        self.client.batch_execute(statements).await
    }

    /// The rows of a statement: in one round trip, once it was prepared, and behind a pooler.
    pub(super) async fn query(&self, text: &str, parameters: &[&dyn Parameter]) -> Result<Vec<Row>, Error> {
        let values = parameters.iter().map(|parameter| *parameter as &(dyn ToSql + Sync));
        let kinds = parameters.iter().map(|parameter| parameter.kind());
        let Some(prepared) = &self.prepared else {
            return self.client.query_typed(text, &values.zip(kinds).collect::<Vec<_>>()).await;
        };
        let known = locked(prepared).get(text).cloned();
        let statement = if let Some(statement) = known {
            statement
        } else {
            let statement = self.client.prepare_typed(text, &kinds.collect::<Vec<_>>()).await?;
            let mut prepared = locked(prepared);
            if prepared.len() >= PREPARED {
                prepared.clear();
            }
            prepared.insert(text.to_owned(), statement.clone());
            statement
        };
        let queried = self.client.query(&statement, &values.collect::<Vec<_>>()).await;
        // The tables were changed since it was prepared.
        if queried.as_ref().is_err_and(|error| error.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED)) {
            locked(prepared).remove(text);
        }
        queried
    }

    /// Begins a transaction that reads as of one moment, and that may write if `writes` is true. The server ends each
    /// statement of it that takes longer than `limit`.
    pub(super) async fn begin(&self, writes: bool, limit: Option<Duration>) -> Result<(), Error> {
        let access = if writes { "READ WRITE" } else { "READ ONLY" };
        let limit = limit.map(|limit| format!("; SET LOCAL statement_timeout = {}", limit.as_millis()));
        let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ {access}{}", limit.unwrap_or_default());
        let sent = Instant::now();
        self.client.batch_execute(&begin).await?;
        self.figures.went_and_came(sent.elapsed());
        Ok(())
    }

    /// The rows of a query, one by one.
    pub(super) async fn stream(&self, text: &str) -> Result<RowStream, Error> {
        self.client.query_typed_raw(text, Vec::<(bool, Type)>::new()).await
    }

    /// What the server has warned of since this was last asked: statements that have returned are among that.
    pub(super) fn take_warning(&self) -> Option<String> {
        self.warning.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn locked(prepared: &Mutex<BTreeMap<String, Statement>>) -> MutexGuard<'_, BTreeMap<String, Statement>> {
    prepared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connector {
    /// Reads the certificates of authorities, on a blocking thread. Those of servers must be valid by this clock.
    ///
    /// # Errors
    /// A file can't be used.
    pub(super) async fn new(url: PostgresUrl, clock: Clock) -> Result<Self, StoreError> {
        let store = url.to_string();
        let (verification, own) = (url.verification().clone(), url.own_certificate().cloned());
        let made = tokio::task::spawn_blocking(move || tls::config(&verification, own.as_ref(), clock)).await;
        let made = made.unwrap_or_else(|error| Err(error.to_string()));
        let tls = made.map_err(|problem| StoreError::Unavailable { store, problem })?;
        let migrations = Migrations::of_this_version();
        let (figures, latest, has_asked, required, doubts, told) = Default::default();
        let tls = MakeRustlsConnect::new(tls);
        Ok(Self { url, migrations, figures, tls, latest, has_asked, required, doubts, told })
    }

    /// The same, for software with these migrations.
    #[cfg(test)]
    pub(super) fn with_migrations(self, migrations: Migrations) -> Self {
        Self { migrations, ..self }
    }

    /// The migrations of this software.
    pub(super) fn migrations(&self) -> &Migrations {
        &self.migrations
    }

    /// What is counted of its connections.
    pub(super) fn figures(&self) -> &Figures {
        &self.figures
    }

    /// The URL.
    pub(super) fn url(&self) -> &PostgresUrl {
        &self.url
    }

    /// Connects to the first of the hosts that takes writes and is no earlier primary. That of the latest primary is
    /// tried first: those before it may not even refuse a connection. Their names are resolved each time, since a
    /// failover may change where they lead. The server shows the session under the name `application`.
    ///
    /// # Errors
    /// No host is one; the message has the reason of each.
    pub(super) async fn connect(&self, application: &str) -> Result<Connection, StoreError> {
        let password = self.password().await?;
        if self.has_several_hosts() {
            self.has_asked.get_or_init(|| async { drop(self.connect_to_all().await) }).await;
        }
        let latest = self.latest.borrow().host;
        let mut hosts: Vec<_> = self.of_hosts(application, password.as_deref()).enumerate().collect();
        hosts.sort_by_key(|(number, _)| *number != latest);
        let mut problems = Vec::new();
        for (number, (name, config)) in hosts {
            match self.connect_to(number, name, &config).await {
                Ok(connection) => return Ok(connection),
                Err(StoreError::Unavailable { problem, .. }) => problems.push(problem),
                // What the server refuses, so would another one.
                Err(error) => return Err(error),
            }
        }
        Err(self.unavailable(format!("can't connect to {}", problems.join("; and to "))))
    }

    fn has_several_hosts(&self) -> bool {
        self.url.of_hosts().nth(1).is_some()
    }

    /// Asks all hosts for their timelines, again and again: a standby can be promoted while the primary before it goes
    /// on, and a process that is connected to that one has all its answers. Returns if there is only one host.
    pub(super) async fn keep_asking(&self) {
        /// A connection to each host.
        const EVERY: Duration = Duration::from_secs(10);
        while self.has_several_hosts() {
            select! {
                biased;
                () = self.doubts.notified() => {}
                () = sleep(EVERY) => {}
            }
            drop(self.connect_to_all().await);
            // However many reads have doubts.
            sleep(ANSWER).await;
        }
    }

    /// From now on, a server must have this record.
    pub(super) fn require(&self, required: Required) {
        *self.required.lock().unwrap_or_else(PoisonError::into_inner) = required;
    }

    /// The record that a server must have.
    pub(super) fn required(&self) -> Required {
        *self.required.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all hosts asked soon: a server lacks what must be there, so it may be an earlier primary.
    pub(super) fn doubt(&self) {
        self.doubts.notify_one();
    }

    /// Connects to all hosts that take writes and are no earlier primaries: while an earlier one goes on, there can be
    /// two that do.
    async fn connect_to_all(&self) -> Vec<Connection> {
        let Ok(password) = self.password().await else { return Vec::new() };
        let hosts = self.of_hosts(APPLICATION, password.as_deref()).enumerate();
        let connected =
            hosts.map(|(number, (name, config))| async move { self.connect_to(number, name, &config).await });
        let connected = join_all(connected).await;
        connected.into_iter().flatten().filter(|connection| self.outdated(&connection.server).is_none()).collect()
    }

    /// The name of each host, for people, and the settings of a connection to it.
    fn of_hosts(&self, application: &str, password: Option<&[u8]>) -> impl Iterator<Item = (Arc<str>, Config)> {
        self.url.of_hosts().map(move |(host, mut config)| {
            config.application_name(application);
            if let Some(password) = password {
                config.password(password);
            }
            (shown(host, &config).into(), config)
        })
    }

    /// True if a connection that is kept can be used again.
    pub(super) fn has_use_for(&self, connection: &Connection) -> bool {
        !connection.is_closed() && self.outdated(&connection.server).is_none()
    }

    /// The problem of this server, if a later timeline is known.
    pub(super) fn outdated(&self, Server { name, timeline }: &Server) -> Option<String> {
        let newest = self.latest.borrow().timeline;
        let timeline = timeline.filter(|timeline| *timeline < newest)?;
        Some(format!(
            "{name} has timeline {timeline}, and a standby with timeline {newest} was promoted in its place: rebuild \
             it as a standby of that one. After the restore of an older backup, stop all replicas, run `orchestrator \
             store accept`, and start them"
        ))
    }

    /// Waits until it is certain that a statement has no future at this server, which does not answer it: a standby was
    /// promoted in its place, or another replica has claimed a later term than that of the statement, if it has one.
    /// Returns what was found. Asks all hosts over new connections each time; that a standby was promoted, it also
    /// learns from any other connection.
    pub(super) async fn has_passed(&self, server: &Server, epoch: Option<Epoch>) -> String {
        let Server { name, timeline } = server;
        let mut latest = self.latest.subscribe();
        select! {
            biased;
            // The sender is in `self`.
            _ = latest.wait_for(|latest| timeline.is_some_and(|timeline| timeline < latest.timeline)) => {
                format!("a standby was promoted in place of {name}, which has not answered")
            }
            by = self.is_superseded(epoch) => format!("{name} does not answer, and epoch {by} has taken over"),
        }
    }

    /// Asks all hosts again and again, and waits until a replica has claimed a later term than that of this epoch, if
    /// there is one. Returns that epoch.
    async fn is_superseded(&self, epoch: Option<Epoch>) -> Epoch {
        let leader = format!("SELECT epoch FROM {}.leader WHERE id = 0", self.url.schema());
        let mut looks = interval_at(Instant::now() + ANSWER, ANSWER);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let connections = self.connect_to_all().await;
            let Some(epoch) = epoch else { continue };
            for connection in connections {
                let claimed = timeout(ANSWER, connection.query(&leader, &[])).await;
                let claimed = claimed.ok().and_then(Result::ok);
                let claimed = claimed.and_then(|rows| epoch_of_leader(self, rows.first()?, "epoch").ok());
                if let Some(claimed) = claimed.filter(|claimed| *claimed > epoch) {
                    return claimed;
                }
            }
        }
    }

    /// Ends a connection once nothing can come of what it is used for: see [`Connector::has_passed`]. What waits for an
    /// answer over it then fails.
    pub(super) async fn end_once_passed(&self, Used { server, end }: Used, epoch: Option<Epoch>) -> Infallible {
        let found = self.has_passed(&server, epoch).await;
        tracing::warn!(store = %self.url, "a connection is given up: {found}");
        end.abort();
        pending().await
    }

    /// Checks that a new connection has a session of its own, which keeps what is prepared in it. A pooler that gives
    /// each transaction any session gives another one than that in which the statement was prepared, while a second
    /// connection has that. The check passes if nothing is certain.
    ///
    /// # Errors
    /// It has none.
    pub(super) async fn check_session(&self, connection: &Connection) -> Result<(), StoreError> {
        const ANY: &str = "SELECT 1";
        if connection.prepared.is_none() {
            return Ok(());
        }
        let store = self.url.to_string();
        connection.query(ANY, &[]).await.map_err(|error| explain(&store, &error))?;
        let Ok(other) = self.connect(APPLICATION).await else { return Ok(()) };
        if other.batch_execute("BEGIN").await.is_err() {
            return Ok(());
        }
        // A pooler that has only one session keeps it waiting.
        let again = timeout(ANSWER, connection.query(ANY, &[])).await;
        let _ = timeout(ANSWER, other.batch_execute("ROLLBACK")).await;
        match again {
            Ok(Err(error)) if error.as_db_error().is_some() => Err(explain(&store, &error)),
            _ => Ok(()),
        }
    }

    fn unavailable(&self, problem: String) -> StoreError {
        StoreError::Unavailable { store: self.url.to_string(), problem }
    }

    /// Connects to the host with this number and name.
    ///
    /// # Errors
    /// It does not answer in time, does not take writes, or is an earlier primary. The problem names it.
    async fn connect_to(&self, host: usize, name: Arc<str>, config: &Config) -> Result<Connection, StoreError> {
        let connected = timeout(CONNECT, self.session(name.clone(), config)).await;
        let connection = match connected {
            Ok(Ok(connection)) => connection,
            Ok(Err(StoreError::Unavailable { problem, .. })) => {
                return Err(self.unavailable(format!("{name}: {problem}")));
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let pooled = if self.url.is_pooled() { "; a pooler may have no session for it" } else { "" };
                return Err(self.unavailable(format!("{name}: no answer within {CONNECT:?}{pooled}")));
            }
        };
        let reached = Latest { timeline: connection.server.timeline.unwrap_or_default(), host };
        self.latest.send_if_modified(|latest| {
            let is_later = (reached.timeline, Reverse(host)) > (latest.timeline, Reverse(latest.host));
            if is_later {
                *latest = reached;
            }
            is_later
        });
        let Some(problem) = self.outdated(&connection.server) else { return Ok(connection) };
        let newest = self.latest.borrow().timeline;
        if self.told.swap(newest, Ordering::Relaxed) != newest {
            tracing::warn!(store = %self.url, "an earlier primary takes writes, and is not used: {problem}");
        }
        Err(self.unavailable(problem))
    }

    /// A session on the host with this name.
    async fn session(&self, name: Arc<str>, config: &Config) -> Result<Connection, StoreError> {
        let explained = |error: &Error| explain(&self.url.to_string(), error);
        let (client, mut connection) = config.connect(self.tls.clone()).await.map_err(|error| explained(&error))?;
        let warning = Arc::new(Mutex::new(None));
        let (warned, store) = (warning.clone(), self.url.to_string());
        let task = tokio::spawn(async move {
            // Before the answer to the statement that it is about.
            while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
                match message {
                    Ok(AsyncMessage::Notice(notice)) => {
                        if let Some(problem) = warning_of(&notice) {
                            *warned.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
                        }
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!(store, %error, "a connection has ended");
                        return Some(error);
                    }
                }
            }
            None
        });
        let (prepared, figures) = ((!self.url.is_pooled()).then(Mutex::default), self.figures.clone());
        let task = AbortOnDropHandle::new(task);
        let server = Server { name, timeline: None };
        let mut connection = Connection { client, prepared, figures, server, warning, task };
        match connection.takes_writes().await {
            Ok(true) => {}
            Ok(false) => {
                return Err(self.unavailable("it takes no writes, as a standby; name all servers in store.url".into()));
            }
            // A pooler lets clients in before it has a session for them, and says in its last message why it has none.
            Err(closed) if closed.is_closed() => {
                let last = (&mut connection.task).await.ok().flatten();
                return Err(explained(&last.unwrap_or(closed)));
            }
            Err(error) => return Err(explained(&error)),
        }
        connection.server.timeline = match connection.query(TIMELINE, &[]).await {
            Ok(rows) => rows.first().and_then(|row| row.try_get(0).ok()),
            Err(error) if is_ambiguous(&error) => return Err(explained(&error)),
            Err(_) => None,
        };
        Ok(connection)
    }

    /// The password in its file, if the URL names one. Read each time, so that it can be changed.
    async fn password(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(path) = self.url.password_file().cloned() else { return Ok(None) };
        let (store, shown) = (self.url.to_string(), path.display().to_string());
        let read = tokio::task::spawn_blocking(move || file::read_secret(&path)).await;
        let read = read.map_err(|error| error.to_string());
        let read = read.and_then(|read| read.map_err(|error| format!("password_file {shown} {error}")));
        let password = read.map_err(|problem| StoreError::Unavailable { store, problem })?;
        Ok(Some(password.trim_ascii_end().to_vec()))
    }
}

/// What a notice warns of; `None` if it only informs.
fn warning_of(notice: &DbError) -> Option<String> {
    let is_warning = matches!(notice.parsed_severity(), Some(Severity::Warning)) || notice.severity() == "WARNING";
    is_warning.then(|| notice.message().to_owned())
}

/// The host and its port, for people.
fn shown(host: &Host, config: &Config) -> String {
    match host {
        Host::Tcp(name) => config.get_ports().first().map_or_else(|| name.clone(), |port| format!("{name}:{port}")),
        #[cfg(unix)]
        Host::Unix(path) => path.display().to_string(),
    }
}
