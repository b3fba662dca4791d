//! The composition root: builds everything from a configuration, owns the tasks, and shuts down in order.

use std::{
    collections::BTreeSet,
    fmt::Display,
    io,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::Watcher as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    join,
    net::TcpListener,
    select,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::util::MapRequestLayer;

use crate::{
    api::{self, Api},
    clock::Clock,
    config::{Config, ConfigError, Reload},
    dial::{Dialer, NoCertificate},
    listen::{self, Connections, Receiving},
    memory::Shares,
    orchestrator::{Declared, Orchestrator, Refusal, Settings, Tasks},
    ports::{Spans, StoreError, Untraced},
    store,
    telemetry::{
        metrics::Metrics,
        otlp::{self, Exporter},
    },
    web,
};

/// The name under which `grpc.health.v1` knows the service; the empty name stands for the whole process.
const SERVICE: &str = "dreamnet.orchestrator.v1.Orchestrator";

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address can't be listened on.
    #[error("can't listen on {0}: {1}; is another process using it?")]
    Listen(SocketAddr, io::Error),
    /// The address of the dashboard can't be listened on.
    #[error("can't listen on {0} for the dashboard: {1}; give another address with --admin-listen, or off")]
    AdminListen(SocketAddr, io::Error),
    /// The file of trusted certificates can't be read.
    #[error("can't read dial.ca_file {path}: {error}", path = .0.display(), error = .1)]
    CaFile(PathBuf, io::Error),
    /// The file of trusted certificates holds none.
    #[error("dial.ca_file {path} {error}", path = .0.display(), error = .1)]
    NoCertificate(PathBuf, NoCertificate),
    /// The store can't be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is declared and stored can't be run.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The reflection service can't be built.
    #[error("can't describe the contract: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Spans can't be exported.
    #[error("can't export spans to tracing.otlp_endpoint: {0}")]
    Otlp(#[from] otlp::ExporterError),
    /// Signals can't be received.
    #[error("can't listen for signals: {0}")]
    Signals(io::Error),
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

/// A running service.
pub struct Service {
    address: SocketAddr,
    admin_address: Option<SocketAddr>,
    orchestrator: Orchestrator,
    tasks: Tasks,
    health: HealthReporter,
    servers: JoinSet<()>,
    stop_server: CancellationToken,
    _cut_off: DropGuard,
    exporter: Option<Arc<Exporter>>,
    exporting: JoinSet<()>,
    stop_exporting: CancellationToken,
    drain_grace: Duration,
}

impl Service {
    /// Opens the store, takes up what is in it, and serves.
    ///
    /// # Errors
    /// Each names what was wrong and what to do. Nothing was changed; but what an older version of the software had
    /// written is brought up to date.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        // The address comes first: a second process by mistake fails here, before it touches the store.
        let address = config.server.listen;
        let listener = TcpListener::bind(address).await.map_err(|error| StartError::Listen(address, error))?;
        let address = listener.local_addr().map_err(|error| StartError::Listen(address, error))?;
        let admin = match config.admin.listen {
            Some(address) => {
                Some(listen_for_admin(address).await.map_err(|error| StartError::AdminListen(address, error))?)
            }
            None => None,
        };
        let memory = Shares::of(config.memory.max_bytes);
        let dialer = Dialer::new(config.dial.connect_timeout, memory.replies.clone());
        let dialer = Arc::new(match &config.dial.ca_file {
            Some(path) => {
                let ca = tokio::fs::read(path).await.map_err(|error| StartError::CaFile(path.clone(), error))?;
                dialer.and_trust(&ca).map_err(|error| StartError::NoCertificate(path.clone(), error))?
            }
            None => dialer,
        });
        let (store, contents) = store::open(&config.store.url).await?;
        tracing::info!(store = %config.store.url, epoch = %contents.epoch, cycles = %contents.last_cycle_id, "store opened");
        let (mut exporting, stop_exporting) = (JoinSet::new(), CancellationToken::new());
        let (mut exporter, mut spans): (_, Arc<dyn Spans>) = (None, Arc::new(Untraced));
        if let Some(endpoint) = &config.tracing.otlp_endpoint {
            let (made, sender) = otlp::exporter(endpoint, config.tracing.sample_ratio, &config.orchestrator_id)?;
            let made = Arc::new(made);
            exporting.spawn(sender.run(stop_exporting.clone()));
            (exporter, spans) = (Some(made.clone()), made);
        }
        let with_reflection = listen::reflection(SERVICE)?;
        let (settings, declared) = (settings(config), declared(config));
        // The last that may refuse, and with it the new epoch begins: until then nothing is taken over.
        let (orchestrator, tasks) =
            Orchestrator::start(settings, &memory, Clock::System, dialer, (store, contents), declared, spans).await?;

        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE, ServingStatus::Serving).await;
        let (stop_server, cut_off) = (CancellationToken::new(), CancellationToken::new());
        let stopped = stop_server.clone().cancelled_owned();
        memory.requests.set_max(config.server.max_receiving_bytes);
        let receiving = Receiving::new(memory.requests.clone());
        let api = Api::new(orchestrator.clone(), memory.requests.clone());
        let router = listen::server(config.server.max_concurrent_streams)
            // What a client may send ahead of being read: requests are small, so this bounds memory and slows nothing.
            .initial_stream_window_size(256 << 10)
            .initial_connection_window_size(1 << 20)
            .layer(MapRequestLayer::new(move |request| receiving.bound(request)))
            .add_service(api::service(api.clone(), config.server.max_request_bytes))
            .add_service(health_service);
        let router = with_reflection(router);
        let connections = Connections::at_most(config.server.max_connections);
        let incoming = listen::incoming(listener, connections.clone(), cut_off.clone());
        let mut servers = JoinSet::new();
        servers.spawn(logged(router.serve_with_incoming_shutdown(incoming, stopped)));
        tracing::info!(%address, "listening");
        let admin_address = admin.as_ref().map(|(_, address)| *address);
        if let Some((listener, address)) = admin {
            let beyond_loopback = config.server.insecure_listen_beyond_loopback;
            let admin = Connections::at_most(web::MAX_CONNECTIONS);
            let in_front = vec![("grpc", connections), ("admin", admin.clone())];
            let metrics = Metrics::new(orchestrator.clone()).and_of(exporter.clone(), in_front);
            let (stop, cut_off) = (stop_server.clone(), cut_off.clone());
            servers.spawn(web::serve(listener, admin, api, metrics.into(), beyond_loopback, stop, cut_off));
            tracing::info!(%address, "dashboard");
        }
        Ok(Self {
            address,
            admin_address,
            orchestrator,
            tasks,
            health,
            servers,
            stop_server,
            _cut_off: cut_off.drop_guard(),
            exporter,
            exporting,
            stop_exporting,
            drain_grace: config.server.drain_grace,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the dashboard is.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Applies what of another configuration can be applied while running.
    ///
    /// # Errors
    /// Nothing was changed: its order has a ring, or the store can't be written.
    pub async fn reload(&mut self, config: &Config) -> Result<(), Refusal> {
        self.orchestrator.reload(settings(config), declared(config)).await?;
        self.drain_grace = config.server.drain_grace;
        if let Some(exporter) = &self.exporter {
            exporter.set_sample_ratio(config.tracing.sample_ratio);
        }
        Ok(())
    }

    /// Serves until `stop` or until this process may no longer write, then shuts down in order: nothing new is
    /// admitted, the running cycle may finish within the grace, the last state is written, watchers are told, and
    /// the connections are closed. When `abort` comes in between, that is the end.
    pub async fn run(mut self, stop: impl Future<Output = ()>, abort: impl Future<Output = ()>) -> Exit {
        select! {
            () = stop => {}
            // Only a store that another process has taken over ends this without having been asked to.
            ended = self.tasks.finished() => return self.ended(ended).await,
        }
        select! {
            exit = self.drain() => exit,
            () = abort => {
                tracing::warn!("aborted by a second signal");
                Exit::Aborted
            }
        }
    }

    async fn drain(mut self) -> Exit {
        /// Long enough to write a record, short enough for those who wait for the process to end.
        const LAST_WRITE: Duration = Duration::from_secs(10);
        tracing::info!(grace = ?self.drain_grace, "shutting down: the running cycle may finish");
        self.health.set_service_status(SERVICE, ServingStatus::NotServing).await;
        self.health.set_service_status("", ServingStatus::NotServing).await;
        self.orchestrator.drain();
        let finished = if let Ok(finished) = timeout(self.drain_grace, self.tasks.finished()).await {
            finished
        } else {
            tracing::warn!("the grace has passed: cancelling the running cycle");
            self.orchestrator.cancel_running();
            let not_written = || StoreError::Other("the record".into(), "could not be written in time".into());
            timeout(LAST_WRITE, self.tasks.finished()).await.unwrap_or_else(|_| Err(not_written()))
        };
        self.ended(finished).await
    }

    /// The orchestrator has ended; closes the connections.
    async fn ended(mut self, finished: Result<(), StoreError>) -> Exit {
        /// For answers that are on their way.
        const LAST_ANSWERS: Duration = Duration::from_secs(5);
        /// Those of the last cycles; a collector is not worth more waiting.
        const LAST_SPANS: Duration = Duration::from_secs(3);
        // Whoever watches the health would keep the server until then.
        for service in ["", SERVICE] {
            self.health.clear_service_status(service).await;
        }
        self.stop_server.cancel();
        // No span comes any more: the last record is written.
        self.stop_exporting.cancel();
        let (answered, exported) = join!(
            timeout(LAST_ANSWERS, async { while self.servers.join_next().await.is_some() {} }),
            timeout(LAST_SPANS, async { while self.exporting.join_next().await.is_some() {} }),
        );
        if answered.is_err() {
            tracing::warn!("not all answers were taken: those who wait for one are cut off");
        }
        if exported.is_err() {
            tracing::warn!("the collector did not take the last spans in time: they are dropped");
        }
        match finished {
            Ok(()) => {
                tracing::info!("drained: everything was finished and recorded");
                Exit::Drained
            }
            Err(error @ StoreError::Fenced(_)) => {
                tracing::error!(%error, "stopped");
                Exit::Fenced
            }
            Err(error) if error.is_final() => {
                tracing::error!(%error, "stopped: the store takes nothing any more");
                Exit::Failed
            }
            Err(error) => {
                tracing::error!(%error, "the last state was not written");
                Exit::Failed
            }
        }
    }
}

/// Serves until a signal: the first of SIGTERM and SIGINT drains, the second aborts. SIGHUP, or a change of `file`,
/// reads the configuration again with `load`, and `applied` is told what applies from then on. `ready` is told once
/// requests are answered.
///
/// # Errors
/// The service did not start.
pub async fn serve(
    mut config: Config,
    file: Option<&Path>,
    load: impl Fn() -> Result<Config, ConfigError>,
    applied: impl Fn(&Config),
    ready: impl FnOnce(&Service),
) -> Result<Exit, StartError> {
    let listen_for = |kind| signal(kind).map_err(StartError::Signals);
    let (mut terminate, mut interrupt) = (listen_for(SignalKind::terminate())?, listen_for(SignalKind::interrupt())?);
    let mut hangup = listen_for(SignalKind::hangup())?;
    if let Err(error) = raise_open_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let mut service = Service::start(&config).await?;
    let mut changes = FileChanges::of(file);
    ready(&service);

    loop {
        select! {
            () = first_of(&mut terminate, &mut interrupt) => break,
            ended = service.tasks.finished() => return Ok(service.ended(ended).await),
            _ = hangup.recv() => tracing::info!("reloading: SIGHUP"),
            () = changes.next() => tracing::info!("reloading: the configuration file has changed"),
        }
        let new = match load() {
            Ok(new) => new,
            Err(error) => {
                tracing::error!("not reloaded, the old configuration goes on:\n{error}");
                continue;
            }
        };
        if config.declares_something() && !new.declares_something() {
            // A file that is being written is empty for a while, and what is forgotten can't be remembered.
            tracing::error!(
                "not reloaded, the old configuration goes on: the new one declares nothing any more; restart to have it so"
            );
            continue;
        }
        let Reload { config: new, needs_restart, changed } = config.reload(new);
        let reloaded = select! {
            // The store may be busy for long.
            () = first_of(&mut terminate, &mut interrupt) => break,
            reloaded = service.reload(&new) => reloaded,
        };
        match reloaded {
            Ok(()) => {
                config = new;
                applied(&config);
                tracing::info!(changed = listed(&changed), "reloaded");
                if !needs_restart.is_empty() {
                    tracing::warn!(keys = needs_restart.join(", "), "changed, and applied only by a restart");
                }
            }
            Err(refusal) => tracing::error!(%refusal, "not reloaded, the old configuration goes on"),
        }
    }
    let abort = first_of(&mut terminate, &mut interrupt);
    Ok(service.run(async {}, abort).await)
}

/// Raises the soft limit of open files to the hard one: each connection and each endpoint takes one.
fn raise_open_files() -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// What has changed, in one line of the log.
fn listed(changed: &[String]) -> String {
    /// More are counted.
    const NAMED: usize = 20;
    let named = changed[..changed.len().min(NAMED)].join(", ");
    match changed.len().saturating_sub(NAMED) {
        0 if named.is_empty() => "nothing".into(),
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

async fn logged<E: Display>(server: impl Future<Output = Result<(), E>>) {
    if let Err(error) = server.await {
        tracing::error!(%error, "a server failed");
    }
}

async fn listen_for_admin(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

async fn first_of(terminate: &mut Signal, interrupt: &mut Signal) {
    select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Tells when a file was written, replaced or removed.
struct FileChanges {
    changed: mpsc::Receiver<()>,
    /// Watches as long as it lives.
    _watcher: Option<notify::RecommendedWatcher>,
}

impl FileChanges {
    /// Editors write a file in several steps; this long after the last one it is read.
    const SETTLE: Duration = Duration::from_millis(200);

    fn of(path: Option<&Path>) -> Self {
        // One place is enough: it stands for any number of changes that nobody has looked at.
        let (tell, changed) = mpsc::channel(1);
        let watcher = path.and_then(|path| match Self::watch(path, tell) {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "changes of the configuration file are not noticed; SIGHUP reloads it");
                None
            }
        });
        Self { changed, _watcher: watcher }
    }

    fn watch(path: &Path, tell: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
        let path = std::path::absolute(path)?;
        let file = path.canonicalize()?;
        // Directories, because many editors put a new file in the place of the old one. Where the path is a link, both
        // that of the link and that of the file.
        let directories: BTreeSet<_> =
            [&path, &file].into_iter().filter_map(|it| it.parent()).map(Path::to_owned).collect();
        // A link may lead through others, which are none of the paths that are told: so what is found is compared.
        let identify =
            move || path.metadata().ok().map(|it| (it.dev(), it.ino(), it.mtime(), it.mtime_nsec(), it.len()));
        let mut seen = identify();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| event.kind.is_access()) {
                return;
            }
            let found = identify();
            if found != seen {
                seen = found;
                // A full channel means that a change is noted already.
                let _ = tell.try_send(());
            }
        })?;
        for directory in &directories {
            watcher.watch(directory, notify::RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    }

    async fn next(&mut self) {
        if self.changed.recv().await.is_none() {
            // Nothing watches.
            return std::future::pending().await;
        }
        while timeout(Self::SETTLE, self.changed.recv()).await.is_ok_and(|change| change.is_some()) {}
    }
}

/// What of a configuration the orchestrator itself is set to.
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
        retention: config.store.retention.clone(),
    }
}

fn declared(config: &Config) -> Declared {
    Declared { subsystems: config.subsystems.clone(), loops: config.loops.clone() }
}
