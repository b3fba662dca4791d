//! The composition root: builds everything from a configuration, owns the tasks, and shuts down in order.

mod log;
mod manager;
mod operator;
mod replicas;
mod terms;
mod tls;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use tokio::{
    join, select,
    time::{sleep, timeout},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};
use tonic_health::{ServingStatus, server::HealthReporter};

pub use self::{log::LogBreak, operator::Operator, tls::check_tls};
use self::{
    operator::{Wish, aborted},
    replicas::Replicas,
    terms::{Parts, Terms},
    tls::Certificates,
};
use crate::{
    access::{Mode, Policy},
    api::{self, Api},
    cluster::Membership,
    config::{self, Config, ConfigError, OutOfReach, Reload},
    dial::Dialer,
    file::Changes,
    host::Host,
    ledger::Hash,
    listen::{self, Connections, Entrance, Limits, Peer},
    memory::{self, Memory, Shares},
    model::{Begin, CommonSettings, Replica, Revision, is_orchestrator_id},
    orchestrator::{Declared, History, Refusal, Settings, Stopped, Sums, TakenOver},
    ports::{Leadership, OtherOrchestrator, Retention, Spans, Store, StoreError, Untraced},
    record,
    store::{self, KeyFileError, OpenError, StoreUrl},
    tasks::{Task, TaskEnded, Tasks},
    telemetry::{
        metrics::Metrics,
        otlp::{self, Exporter},
    },
    transport::{Sockets, Transport},
    web::{self, Web},
};

/// The name under which `grpc.health.v1` knows the service; the empty name stands for the whole process.
const SERVICE: &str = "dreamnet.orchestrator.v1.Orchestrator";

/// The name under which the health service says whether this replica leads.
const LEADER: &str = "dreamnet.orchestrator.v1.Orchestrator/leader";

/// The service that shows callers their identity.
const ACCESS: &str = "dreamnet.orchestrator.v1.Access";
const LEDGER: &str = "dreamnet.orchestrator.v1.Ledger";
/// The service for parents. Reflection describes it if the configuration serves a name at the start.
const SUBSYSTEM: &str = "dreamnet.subsystem.v1.Subsystem";

const GRPC_SERVER: Task = Task { name: "the gRPC server", purpose: "answers callers" };
const ADMIN_SERVER: Task = Task { name: "the admin server", purpose: "serves the dashboard and the metrics" };
const SOCKET_SERVER: Task = Task { name: "the gRPC server of the socket", purpose: "answers callers on this machine" };
const CERTIFICATES: Task = Task { name: "the watch of TLS files", purpose: "uses renewed certificates" };
const EXPORTER: Task = Task { name: "the exporter of spans", purpose: "sends traces of cycles to the collector" };

/// Longest time for the last records after `server.drain_grace`: long enough to write them, short enough for a
/// supervisor that waits for the process to end.
const LAST_WRITE: Duration = Duration::from_secs(10);
/// Time for open answers.
const LAST_ANSWERS: Duration = Duration::from_secs(5);
/// Longest time that a shutdown takes after `server.drain_grace`. A supervisor has to wait for both.
pub const AFTER_GRACE: Duration = LAST_WRITE.saturating_add(LAST_ANSWERS);

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address can't be listened on.
    #[error("can't listen on {0}: {1}; is another process using it? Give another address with --listen")]
    Listen(SocketAddr, io::Error),
    /// The path of the socket can't be listened on.
    #[error("can't listen on server.listen_unix {path}: {error}", path = .0.display(), error = .1)]
    ListenUnix(PathBuf, io::Error),
    /// The address of the dashboard can't be listened on.
    #[error("can't listen on {0} for the dashboard: {1}; give another address with --admin-listen, or off")]
    AdminListen(SocketAddr, io::Error),
    /// The files of TLS can't be used.
    #[error("{0}")]
    Tls(String),
    /// The file of tokens, or that of the keys of JWTs, can't be used.
    #[error(transparent)]
    Credentials(#[from] ConfigError),
    /// The store can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is no key to sign checkpoints with.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The store is not what was signed last.
    #[error(
        "{url}: {found}. Find out what has happened; {}then have it go on as it is, with a new log, by `orchestrator \
         store accept {url}` (with --key-file for each of ledger.key_files)",
        with_others(url, found)
    )]
    NotContinued {
        /// The store.
        url: StoreUrl,
        /// What was found.
        found: LogBreak,
    },
    /// The store lacks records that this replica knows to be acknowledged.
    #[error(
        "{url} lacks records that a leader has acknowledged to this replica: revision {missing} is not there, or is \
         another one, and the newest is {newest}. An earlier primary answers, or an older copy of the database has \
         replaced it, or a standby that had not got all commits. If another server has them, rebuild this one as a \
         standby of that. If none has, stop all replicas, have the store go on as it is by `orchestrator store accept \
         {url}` (with --key-file for each of ledger.key_files), and start them"
    )]
    HistoryLost {
        /// The store.
        url: StoreUrl,
        /// The revision of a missing record.
        missing: Revision,
        /// The newest revision of the store.
        newest: Revision,
    },
    /// What an earlier process left in the store can't be taken over.
    #[error(transparent)]
    TakeOver(#[from] StoreError),
    /// The store is that of another orchestrator.
    #[error(transparent)]
    OtherOrchestrator(#[from] OtherOrchestrator),
    /// The declared and stored subsystems can't be run together.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The reflection service can't be built.
    #[error("can't describe the contract: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Spans can't be exported.
    #[error("can't export spans to tracing.otlp_endpoint: {0}")]
    Otlp(#[from] otlp::ExporterError),
}

/// How the service ended. The number is the exit code of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Everything was finished and written.
    Drained = 0,
    /// The last state could not be written, or a defect ended the service.
    Failed = 1,
    /// Another process has taken over the store.
    Fenced = 3,
    /// A second signal cut the shutdown short. A cycle that was running is recorded as interrupted at the next start.
    Aborted = 130,
}

/// Why the service ends.
enum End {
    /// A signal.
    Asked,
    /// The orchestrator has ended.
    Orchestrator(Result<(), Stopped>),
    /// Another task has ended because of a defect.
    Task(TaskEnded),
}

/// A running service.
pub struct Service {
    address: SocketAddr,
    admin_address: Option<SocketAddr>,
    api: Api,
    certificates: Arc<Certificates>,
    dialer: Arc<Dialer>,
    /// `None` if there can be none.
    replicas: Option<Replicas>,
    history: History,
    terms: Terms,
    health: HealthReporter,
    /// Keeps the health service up to date with the role of the replica.
    health_of_role: AbortOnDropHandle<()>,
    servers: Tasks,
    stop_server: CancellationToken,
    _cut_off: DropGuard,
    exporter: Option<Arc<Exporter>>,
    exporting: Tasks,
    stop_exporting: CancellationToken,
    drain_grace: Duration,
    memory: Memory,
}

/// What to do first if other replicas may have what this process lacks.
fn with_others(url: &StoreUrl, found: &LogBreak) -> &'static str {
    match (url, found) {
        (StoreUrl::Postgres(_), LogBreak::KeyMissing) => {
            "if other replicas use the store, copy their key to ledger.key_files of this one; only if the key is lost, "
        }
        _ => "",
    }
}

impl Service {
    /// Opens the store, recovers its state, and serves, with a beginning of this kind.
    ///
    /// # Errors
    /// Each names the problem and the remedy. Nothing was changed, except that a database of an older version was
    /// migrated, and that a new log has its key and its first checkpoint, without entries.
    pub async fn start(
        config: &Config,
        begin: Begin,
        host: Host,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, StartError> {
        let (url, clock) = (&config.store.url, host.clock);
        let store = async {
            match begin {
                Begin::ReadOnly => store::look(url, record::CHECKS, clock).await,
                Begin::Again | Begin::Paused => store::open(url, record::CHECKS, clock).await,
            }
        };
        Self::start_over(config, begin, host, transport, store).await
    }

    /// As [`Service::start`], over another store than that of the configuration, which is opened once all addresses are
    /// taken.
    ///
    /// # Errors
    /// As [`Service::start`].
    pub async fn start_over(
        config: &Config,
        begin: Begin,
        host: Host,
        transport: Arc<dyn Transport>,
        store: impl Future<Output = Result<Arc<dyn Store>, OpenError>>,
    ) -> Result<Self, StartError> {
        let (certificates, changes) = Certificates::load(config, host.clock).await.map_err(StartError::Tls)?;
        // The address comes early: a second process that was started by mistake fails here, before it opens the store.
        let address = config.server.listen;
        let listening = transport.listen(address).await;
        let (listener, address) = listening.map_err(|error| StartError::Listen(address, error))?;
        let socket = match &config.server.listen_unix {
            Some(path) => {
                let listening = transport.listen_at_path(path, config.server.unix_mode).await;
                Some((listening.map_err(|error| StartError::ListenUnix(path.clone(), error))?, path))
            }
            None => None,
        };
        let admin = match config.admin.listen {
            Some(address) => {
                Some(transport.listen(address).await.map_err(|error| StartError::AdminListen(address, error))?)
            }
            None => None,
        };
        let policy = policy(config).await?;
        let memory = shares(config);
        warn_of_limits(config, &memory.whole);
        let (mut servers, stop_server, cut_off) =
            (Tasks::default(), CancellationToken::new(), CancellationToken::new());
        let refuses_strangers = config.access.mode == Mode::Enforce;
        // Before the store is opened, which may take long: probes get an answer.
        let admin_address = admin.as_ref().map(|(_, address)| *address);
        let admin = admin.map(|(listener, address)| {
            let is_loopback = address.ip().to_canonical().is_loopback();
            let beyond_loopback = config.server.insecure_listen_beyond_loopback || !is_loopback;
            let entrance = certificates.admin(listener);
            let web = Web::at(address, beyond_loopback, entrance.secure.is_some());
            let connections = Connections::of(web::MAX_CONNECTIONS, refuses_strangers);
            let serve = web.clone().serve(entrance, connections.clone(), stop_server.clone(), cut_off.clone());
            servers.start_infallible(ADMIN_SERVER, serve);
            (web, connections)
        });
        let replies = memory.replies.clone();
        let (connect_timeout, tls) = (config.dial.connect_timeout, certificates.dial());
        let dialer = Arc::new(Dialer::with(transport.clone(), connect_timeout, replies, tls, config.reach()));
        dialer.revoke(config.access.revoked.clone());
        let sums = Sums::new(host.clock, settings(config).audit_reads);
        let source = Box::pin(Source::of(store.await?, config, begin, &host, &sums)).await?;
        let (mut exporting, stop_exporting) = (Tasks::default(), CancellationToken::new());
        let (mut exporter, mut spans): (_, Arc<dyn Spans>) = (None, Arc::new(Untraced));
        if let Some(endpoint) = &config.tracing.otlp_endpoint {
            let (made, sender) =
                otlp::exporter(endpoint, config.tracing.sample_ratio, host.random.clone(), &config.orchestrator_id)?;
            let made = Arc::new(made);
            exporting.start_infallible(EXPORTER, sender.run(stop_exporting.clone()));
            (exporter, spans) = (Some(made.clone()), made);
        }
        let for_parents = if config.serves.is_empty() { &[][..] } else { &[SUBSYSTEM] };
        let reflection = listen::reflection(&[&[SERVICE, ACCESS, LEDGER], for_parents].concat())?;
        let is_insecure = config.is_insecure();
        let membership = source.membership(config);
        membership.set_settings(in_common(config));
        let (by, requests) = ((host.clock, sums.clone()), memory.requests.clone());
        let history = History::new(source.store(), &memory.history, &settings(config));
        history.declare(&declared(config));
        let api = Api::new(membership.clone(), policy, by, history.clone(), requests, config.reach(), is_insecure);
        let (dial, answers) = (certificates.dial(), memory.answers.clone());
        let shown = (history.clone(), sums.clone());
        let replicas =
            membership.has_peers().then(|| Replicas::new(config, &membership, shown, transport, dial, answers));
        let forwarder = replicas.as_ref().map(Replicas::forwarder);
        let api = api.forwarding(forwarder.clone());
        api.serve_as(config.serves.clone());
        let started_at = host.started.time();
        // The last step that may fail. It begins the new epoch: until then nothing is taken over.
        let parts =
            Parts { memory: memory.clone(), host, dialer: dialer.clone(), spans, sums, history: history.clone() };
        let terms = match source {
            Source::Alone(taken_over) => Box::pin(Terms::alone(config, parts, *taken_over, api.clone())).await?,
            Source::Shared(store, leadership) => {
                Box::pin(Terms::shared(config, begin, parts, (store, leadership), api.clone())).await?
            }
        };

        let (health, health_service) = tonic_health::server::health_reporter();
        let health_of_role = tokio::spawn(keep_health(health.clone(), api.clone()));
        if is_insecure {
            tracing::warn!(
                "other machines may be able to use this service without any right: access.mode is not \"enforce\", and \
                 server.insecure_listen_beyond_loopback is set"
            );
        }
        let of_reflection = api.clone();
        let reflection = reflection.behind(move |request| {
            let peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
            of_reflection.begin_reflection(peer, request.headers())
        });
        let services = api::services(api.clone(), config.server.max_request_bytes, reflection);
        let services = services.and(health_service);
        let server = listen::Server::new(services, limits(&config.server, &memory));
        let max_connections = config.server.max_connections.unwrap_or(places_in(&memory));
        let connections = Connections::of(max_connections, refuses_strangers);
        let entrance = certificates.server(listener);
        let serve =
            |entrance| server.clone().serve(entrance, connections.clone(), stop_server.clone(), cut_off.clone());
        servers.start_infallible(GRPC_SERVER, serve(entrance));
        if let Some((listener, path)) = socket {
            servers.start_infallible(SOCKET_SERVER, serve(Entrance::plain(listener)));
            tracing::info!(path = %path.display(), "listening");
        }
        if !certificates.is_empty() {
            let callers = api.clone();
            let judge_again = move || callers.judge_again();
            servers.start_infallible(
                CERTIFICATES,
                certificates.clone().keep_current(changes, judge_again, stop_server.clone()),
            );
        }
        tracing::info!(%address, "listening");
        if let Some((web, admin)) = admin {
            let in_front = vec![("grpc", connections), ("admin", admin)];
            let (calls, exporter) = (api.calls(), exporter.clone());
            let forwarded = forwarder.map(|forwarder| forwarder.counts());
            let of_files = certificates.clone();
            let expiries = Box::new(move || of_files.expiries());
            let (dialed, memory_of_all) = (dialer.counts(), memory.clone());
            let metrics = Metrics::default().and_of(calls, exporter, in_front, dialed, expiries, memory_of_all);
            let metrics = metrics.and_of_replica(membership, started_at, history.clone(), forwarded);
            web.open(api.clone(), metrics.into(), &memory);
        }
        if let Some(address) = admin_address {
            tracing::info!(%address, "dashboard");
        }
        Ok(Self {
            address,
            admin_address,
            api,
            certificates,
            dialer,
            replicas,
            history,
            terms,
            health,
            health_of_role: AbortOnDropHandle::new(health_of_role),
            servers,
            stop_server,
            _cut_off: cut_off.drop_guard(),
            exporter,
            exporting,
            stop_exporting,
            drain_grace: config.server.drain_grace,
            memory: memory.whole,
        })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of the dashboard, if it is enabled.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// The URL of the dashboard, if it is enabled.
    pub fn dashboard(&self) -> Option<String> {
        let scheme = if self.certificates.has_admin() { "https" } else { "http" };
        self.admin_address.map(|address| format!("{scheme}://{address}/"))
    }

    /// Reads the files of TLS again. Whether they can be used is in the log.
    fn reload_certificates(&self) {
        self.certificates.ask();
    }

    /// Applies the settings of another configuration that don't need a restart.
    ///
    /// # Errors
    /// Nothing was changed, except for access and revoked owners: the configuration has a circular dependency, or the
    /// store can't be written.
    pub async fn reload(&mut self, config: &Config, policy: Policy) -> Result<(), Refusal> {
        // First, so that a revocation does not wait for the store.
        self.api.apply(policy);
        self.dialer.revoke(config.access.revoked.clone());
        if let Some(replicas) = &self.replicas {
            replicas.apply(config);
        }
        self.terms.reload(config).await?;
        self.api.serve_as(config.serves.clone());
        self.drain_grace = config.server.drain_grace;
        warn_of_limits(config, &self.memory);
        if let Some(exporter) = &self.exporter {
            exporter.set_sample_ratio(config.tracing.sample_ratio);
        }
        Ok(())
    }

    /// Serves until `stop`, or until it ends by itself: another process has taken over the store, or a task of it has
    /// ended by a defect. Then it shuts down in order: nothing new is admitted, running cycles may finish within the
    /// grace, the last state is written, watchers are told, and the connections are closed. `signal` waits for a
    /// further signal to stop: the second one, a second or more after the first, aborts the shutdown.
    pub async fn run(mut self, stop: impl Future<Output = ()>, signal: impl AsyncFnMut()) -> Exit {
        let end = select! {
            biased;
            () = stop => End::Asked,
            end = self.end() => end,
        };
        self.shut_down(end, signal).await
    }

    /// Waits until it ends by itself.
    async fn end(&mut self) -> End {
        select! {
            biased;
            finished = self.terms.ended() => match finished {
                Err(Stopped::Other(ended)) => End::Task(ended),
                finished => End::Orchestrator(finished),
            },
            ended = self.servers.next_ended() => End::Task(ended),
            ended = self.exporting.next_ended() => End::Task(ended),
        }
    }

    async fn shut_down(self, end: End, signal: impl AsyncFnMut()) -> Exit {
        let missing = match end {
            End::Orchestrator(finished) => return self.ended(finished).await,
            End::Task(ended) => {
                ended.log("a task of the service has ended: stopping the rest");
                true
            }
            End::Asked => false,
        };
        select! {
            biased;
            exit = self.drain() => if missing && exit == Exit::Drained { Exit::Failed } else { exit },
            () = aborted(!missing, signal) => {
                tracing::warn!("aborted by a second signal");
                Exit::Aborted
            }
        }
    }

    async fn drain(mut self) -> Exit {
        tracing::info!(grace = ?self.drain_grace, "shutting down: running cycles may finish");
        self.health_of_role.abort();
        for service in ["", SERVICE, LEADER] {
            self.health.set_service_status(service, ServingStatus::NotServing).await;
        }
        if let Some(replicas) = &self.replicas {
            replicas.end();
            replicas.report_last().await;
            if self.terms.orchestrator().is_none() {
                self.history.close();
            }
        }
        self.terms.drain();
        let finished = if let Ok(finished) = timeout(self.drain_grace, self.terms.finished()).await {
            finished
        } else {
            tracing::warn!("the grace period has passed: cancelling running cycles");
            if let Some(orchestrator) = self.terms.orchestrator() {
                orchestrator.cancel_running();
            }
            let last = timeout(LAST_WRITE, self.terms.finished()).await;
            let why = self.terms.orchestrator().and_then(|orchestrator| orchestrator.store_error());
            last.unwrap_or_else(|_| Err(Stopped::Store(why.unwrap_or_else(not_in_time))))
        };
        self.ended(finished).await
    }

    /// Closes the connections after the orchestrator has ended.
    async fn ended(mut self, finished: Result<(), Stopped>) -> Exit {
        /// Time for the spans of the last cycles, which are sent at the same time as the open answers.
        const LAST_SPANS: Duration = Duration::from_secs(3);
        if let Some(replicas) = &self.replicas {
            replicas.end();
        }
        self.history.close();
        // Watches of the health service would keep the server running.
        self.health_of_role.abort();
        for service in ["", SERVICE, LEADER] {
            self.health.clear_service_status(service).await;
        }
        self.stop_server.cancel();
        // There are no further spans: the last record is written.
        self.stop_exporting.cancel();
        let (answered, exported) =
            join!(timeout(LAST_ANSWERS, self.servers.all_ended()), timeout(LAST_SPANS, self.exporting.all_ended()),);
        if answered.is_err() {
            tracing::warn!("not all answers were read in time: closing their connections");
        }
        if exported.is_err() {
            tracing::warn!("the collector did not accept the last spans in time: they are dropped");
        }
        match finished {
            Ok(()) => {
                tracing::info!("drained: everything was finished and recorded");
                Exit::Drained
            }
            Err(Stopped::Store(error @ StoreError::Fenced { .. })) => {
                tracing::error!(%error, "stopped");
                Exit::Fenced
            }
            Err(Stopped::Store(error)) if error.is_final() => {
                tracing::error!(%error, "stopped: the store accepts no more writes");
                Exit::Failed
            }
            Err(Stopped::Store(error)) => {
                tracing::error!(%error, "the last state was not written");
                Exit::Failed
            }
            Err(Stopped::Conductor(ended) | Stopped::Other(ended)) => {
                ended.log("a task of the service has ended: stopped");
                Exit::Failed
            }
        }
    }
}

/// What the store says of the terms of this process.
enum Source {
    /// It has one, and has taken the store over, or looks at it.
    Alone(Box<TakenOver>),
    /// It shares the store with other replicas.
    Shared(Arc<dyn Store>, Arc<dyn Leadership>),
}

impl Source {
    async fn of(
        store: Arc<dyn Store>,
        config: &Config,
        begin: Begin,
        host: &Host,
        sums: &Sums,
    ) -> Result<Self, StartError> {
        let taken_over = if begin == Begin::ReadOnly {
            log::look(config, store).await?
        } else {
            if let Some(leadership) = store.leadership() {
                return Ok(Self::Shared(store, leadership));
            }
            log::take_over(config, begin, host, store).await?
        };
        Ok(Self::Alone(Box::new(TakenOver { sums: Some(sums.clone()), ..taken_over })))
    }

    fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Alone(taken_over) => taken_over.store.clone(),
            Self::Shared(store, _) => store.clone(),
        }
    }

    /// This process, as one of several or as the only one.
    fn membership(&self, config: &Config) -> Membership {
        let replica = replica(config);
        match self {
            Self::Alone(taken_over) => {
                let epoch = Some(taken_over.contents.epoch).filter(|_| taken_over.begin != Begin::ReadOnly);
                Membership::alone(replica, epoch)
            }
            Self::Shared(..) => Membership::of(replica),
        }
    }
}

/// This replica: by its configured name, or by that of the host.
fn replica(config: &Config) -> Replica {
    let name = config.cluster.replica.clone().unwrap_or_else(|| {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        if is_orchestrator_id(&host) { host } else { "replica".into() }
    });
    Replica { name, address: config.cluster.advertise.clone() }
}

/// Tells clients of the health service whether this replica leads, and whether it can read its store and is of use.
async fn keep_health(health: HealthReporter, api: Api) {
    /// Nothing tells that a lease has ended, or why a replica is not ready.
    const LOOKS: Duration = Duration::from_secs(1);
    let membership = api.membership();
    let (mut roles, mut sight) = (membership.roles(), membership.sight());
    let mut told = None;
    let serving = |is_serving| if is_serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    loop {
        let has_role = roles.borrow_and_update().epoch().is_some();
        sight.mark_unchanged();
        let serves = has_role || !membership.has_peers() || api.check_ready().is_ok();
        let now = (membership.is_leading(), serves);
        // A watcher gets each status that is set.
        if told.replace(now) != Some(now) {
            health.set_service_status(LEADER, serving(now.0)).await;
            for service in ["", SERVICE] {
                health.set_service_status(service, serving(serves)).await;
            }
        }
        // The senders are in `membership`.
        select! {
            biased;
            _ = roles.changed() => {}
            _ = sight.changed() => {}
            () = sleep(LOOKS), if membership.has_peers() => {}
        }
    }
}

/// Serves, with a beginning of this kind, until the operator stops it: the first SIGTERM or SIGINT drains, the second
/// aborts. SIGHUP, or a change of the configuration file, reloads the configuration, and `applied` is called with the
/// one that applies from then on. `ready` is called once requests are answered. A service manager (systemd) is told
/// when the service is ready, reloads and stops.
///
/// # Errors
/// The service did not start.
pub async fn serve(
    mut operator: Operator,
    mut config: Config,
    begin: Begin,
    host: Host,
    applied: impl Fn(&Config),
    ready: impl FnOnce(&Service),
) -> Result<Exit, StartError> {
    if let Err(error) = raise_open_files() {
        tracing::warn!(%error, "the limit of open files is not changed");
    }
    if config.access.mode == Mode::Enforce
        && let Err(error) = keep_memory_private()
    {
        tracing::warn!(%error, "other processes of this user may read the memory of this process");
    }
    manager::starting().await;
    // Before the first read, so that no change is missed in between.
    let mut credentials = Changes::of(credential_files(&config)).await;
    let mut service = select! {
        biased;
        started = Service::start(&config, begin, host, Arc::new(Sockets::default())) => started?,
        // The disk of the store may be slow.
        () = operator.stop() => {
            tracing::info!("stopped before it was started");
            return Ok(Exit::Drained);
        }
    };
    ready(&service);

    let serving = format!("serving at {}", service.address());
    let mut status = serving.clone();
    let end = loop {
        manager::ready(status).await;
        let why = select! {
            biased;
            wish = operator.wish() => match wish {
                Wish::Stop => break End::Asked,
                Wish::Reload(why) => why,
            },
            () = credentials.next() => "the file of tokens, or of the keys of JWTs, has changed",
            end = service.end() => break end,
        };
        tracing::info!("reloading: {why}");
        manager::reloading(why).await;
        status = format!("{serving}; the last reload failed: see the log");
        // Even if the configuration is invalid: a revoked token or certificate is refused at once.
        service.reload_certificates();
        if let Ok(policy) = policy(&config).await {
            service.api.apply(policy);
        }
        let new = select! {
            biased;
            new = operator.configuration() => new,
            end = service.end() => break end,
        };
        let new = match new {
            Some(Ok(new)) => new,
            Some(Err(error)) => {
                for problem in error.to_string().lines() {
                    tracing::error!(%problem, "the configuration is invalid");
                }
                tracing::error!("not reloaded, the old configuration still applies");
                continue;
            }
            None => break End::Asked,
        };
        if config.declares_something() && !new.declares_something() {
            // A file that is being written is empty for a while, and deleted outputs can't be restored.
            tracing::error!(
                "not reloaded, the old configuration still applies: the new one declares no subsystems or loops; \
                 restart to apply it"
            );
            continue;
        }
        let Reload { config: new, needs_restart, changed } = config.reload(new);
        let policy = select! {
            biased;
            () = operator.stop() => break End::Asked,
            policy = policy(&new) => policy,
        };
        let policy = match policy {
            Ok(policy) => policy,
            Err(error) => {
                for problem in error.to_string().lines() {
                    tracing::error!(%problem, "the credentials of callers are invalid");
                }
                tracing::error!("not reloaded, the old configuration and the old credentials still apply");
                continue;
            }
        };
        let reloaded = select! {
            biased;
            // The store may be busy for long.
            () = operator.stop() => break End::Asked,
            reloaded = service.reload(&new, policy) => reloaded,
        };
        match reloaded {
            Ok(()) => {
                if credential_files(&config) != credential_files(&new) {
                    credentials = Changes::of(credential_files(&new)).await;
                }
                config = new;
                applied(&config);
                status.clone_from(&serving);
                tracing::info!(changed = listed(&changed), "reloaded");
                if !needs_restart.is_empty() {
                    tracing::warn!(keys = needs_restart.join(", "), "changed settings that need a restart");
                }
            }
            Err(refusal @ (Refusal::StoreUnavailable(..) | Refusal::ChangeIsLate(_))) => tracing::error!(
                %refusal,
                "not reloaded, the old configuration still applies, except for access and revocations: send SIGHUP \
                 again once the store can be written, since a reload is not repeated by itself"
            ),
            Err(refusal) => tracing::error!(%refusal, "not reloaded, the old configuration still applies"),
        }
    };
    manager::stopping(service.drain_grace.saturating_add(AFTER_GRACE)).await;
    Ok(service.shut_down(end, async || operator.stop().await).await)
}

/// The last write has not returned in time, and no reason is known.
fn not_in_time() -> StoreError {
    StoreError::Unavailable { store: "the store".into(), problem: "the last write has not returned in time".into() }
}

/// Raises the soft limit of open files to the hard limit: each connection and each endpoint needs one.
fn raise_open_files() -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// Keeps other processes of the same user from reading the memory of this one, which contains keys and tokens, and
/// writes none of it to disk in a crash.
fn keep_memory_private() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    #[cfg(target_os = "linux")]
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// The changes, in one line of the log.
fn listed(changed: &[String]) -> String {
    /// Most changes that are named; further ones are counted.
    const NAMED: usize = 20;
    let named = changed[..changed.len().min(NAMED)].join(", ");
    match changed.len().saturating_sub(NAMED) {
        0 if named.is_empty() => "nothing".into(),
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// The files by which credentials of callers are known, beside those of TLS.
fn credential_files(config: &Config) -> Vec<PathBuf> {
    [&config.access.tokens_file, &config.access.jwt.jwks_file].into_iter().flatten().cloned().collect()
}

/// The rights of callers, by the configuration, the file of tokens, and that of the keys of JWTs.
async fn policy(config: &Config) -> Result<Policy, ConfigError> {
    let config::AccessSettings { mode, tokens_file, jwt, revoked, grants } = config.access.clone();
    let read = tokio::task::spawn_blocking(move || {
        let tokens = tokens_file.map_or(Ok(Vec::new()), |path| config::read_tokens(&path))?;
        Ok((tokens, config::read_issuer(&jwt)?))
    });
    let (tokens, issuer) = read.await.unwrap_or_else(|defect| Err(ConfigError::unread(&defect)))?;
    let policy = Policy::new(mode, grants, tokens, revoked, geteuid().as_raw());
    Ok(policy.with_issuer(issuer).with_limits(config.limits).with_peers(config.cluster.peers.clone()))
}

/// The memory limit and its shares.
fn shares(config: &Config) -> Shares {
    const DEFAULT: usize = config::MemorySettings::DEFAULT_MAX_BYTES;
    /// The smallest configurable limit.
    const LEAST: usize = 64 << 20;
    let (max_bytes, source) = match (config.memory.max_bytes, memory::allowed()) {
        (Some(max_bytes), _) => (max_bytes, "memory.max_bytes"),
        (None, Some(allowed)) if allowed / 2 < DEFAULT => {
            ((allowed / 2).max(LEAST), "half of the memory of the machine or its memory group")
        }
        (None, _) => (DEFAULT, "default"),
    };
    tracing::info!(max_bytes, source, "memory limit");
    let shares = Shares::of(max_bytes);
    shares.requests.set_max(config.server.max_receiving_bytes.map(|bytes| bytes.min(max_bytes)));
    shares
}

/// Warns of limits that can't be reached with the memory in use. A default gives way without a warning.
fn warn_of_limits(config: &Config, memory: &Memory) {
    let default = Config::default();
    for OutOfReach { key, value, max, of } in config.out_of_reach(memory.max()) {
        if key != "server.max_request_bytes" || value != default.server.max_request_bytes {
            tracing::warn!(key, value, "a limit can't be reached: at most {max} bytes are accepted, {of}");
        }
    }
}

/// Default limit of connections and streams: with little memory, 4,096 idle ones would cost more than the memory for
/// their data.
fn places_in(memory: &Shares) -> usize {
    const MOST: usize = 4096;
    const FOR_EACH: usize = 256 << 10;
    (memory.whole.max() / FOR_EACH).clamp(1, MOST)
}

/// Limits of each client, and of all clients together.
fn limits(server: &config::ServerSettings, memory: &Shares) -> Limits {
    Limits {
        max_concurrent_streams: server.max_concurrent_streams,
        max_streams: server.max_streams.unwrap_or(places_in(memory)),
        // A request is in memory twice while it is read. A larger one would never have room.
        max_request_bytes: server.max_request_bytes.min(memory.requests.max() / 2),
        // Requests are small, so this limits memory without a loss of speed. The library treats a client as a flood
        // when small frames use up half of the second window, and each stream may send one.
        windows: (64 << 10, server.max_concurrent_streams.saturating_mul(512).clamp(128 << 10, 16 << 20)),
        requests: memory.requests.clone(),
        answers: memory.answers.clone(),
        large_streams: &["/dreamnet.orchestrator.v1.Orchestrator/WatchCycles"],
    }
}

/// The settings of the orchestrator itself.
pub fn settings(config: &Config) -> Settings {
    Settings {
        orchestrator_id: config.orchestrator_id.as_str().into(),
        cycle_deadline: config.cycle.deadline,
        max_concurrent_calls: config.cycle.max_concurrent_calls,
        max_queued: config.cycle.max_queued,
        max_record_bytes: config.cycle.max_record_bytes,
        max_outputs_bytes: config.cycle.max_outputs_bytes,
        max_subsystems: config.registry.max_subsystems,
        max_loops: config.registry.max_loops,
        max_watchers: config.server.max_watchers,
        retention: Retention { events: config.audit.retention, ..config.store.retention.clone() },
        audit_reads: config.audit.reads == config::AuditReads::Summary,
        revoked: config.access.revoked_owners().into(),
    }
}

/// What other replicas should have in common with this one.
fn in_common(config: &Config) -> CommonSettings {
    let digest = |text: String| {
        let Hash(bytes) = Hash::of_bytes(text.as_bytes());
        bytes.first_chunk().map_or(0, |first| u32::from_be_bytes(*first))
    };
    CommonSettings::of(env!("CARGO_PKG_VERSION"), config.in_common().map(|(key, text)| (key, digest(text))))
}

fn declared(config: &Config) -> Declared {
    Declared {
        subsystems: config.subsystems.clone(),
        former_names: config.former_names.clone(),
        loops: config.loops.clone(),
        expected: config.registry.expected.clone(),
    }
}
