//! The cost of a cycle, beside its floor in the same run.
//!
//! The floor is a bare tonic client that sends the same calls over connections that it keeps open, all at once, on the
//! same runtime. It has no order, no deadlines and no record. Our cycle is requested and awaited in this process, and
//! ends when its record is written: to a SQLite database on the disk, or to memory. `bare` is a SQLite database without
//! ledger and audit (see the module `bare`); `sqlite` is the one of the service, for cycles of a loop, whose calls
//! nobody makes; `audited` has the event of a call with each cycle. `scraped` is `sqlite` with all metrics written once
//! a round, which is far more often than monitoring reads them; `traced` is `sqlite` with every span of every cycle
//! exported; `tls` is `sqlite` with a fleet that is called over TLS; `postgres` has the record in PostgreSQL on this
//! machine, where that is installed, and `standby` is the same with a standby that each commit waits for. Metrics count
//! the cycles of all sides. The rounds of all sides alternate. One server process serves all sides; it contains the
//! collector, which discards the spans. The module `commits` measures what the stores take of that.
//!
//! `cargo bench --bench cycle` measures every fleet and the commits; `cargo bench --bench cycle -- 28x1` only the fleet
//! of that name, and `-- commits` only the commits. Prints tables for people, and one line of JSON per row.

mod bare;
mod commits;
#[path = "../../tests/outside/common/postgres.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "it is made for tests")]
mod postgres;

use std::{
    env,
    error::Error,
    fs,
    hint::black_box,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, future::try_join_all, stream};
use jiff::Timestamp;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use orchestrator_core::{
    config::Config,
    dial::Dialer,
    host::Host,
    ledger::{SealKeys, Signer},
    memory::Shares,
    model::{
        AuditTargets, Cause, CycleRequest, CycleState, Decision, Identity, OwnEvent, Subsystem, SubsystemSpec, Trigger,
    },
    orchestrator::{Declared, Orchestrator, OrchestratorTasks, TakenOver},
    ports::{Seals, Spans, Store, Untraced},
    proto::subsystem::v1::{
        self as pb,
        subsystem_client::SubsystemClient,
        subsystem_server::{Subsystem as Service, SubsystemServer},
    },
    record, serve,
    store::{self, StoreUrl},
    telemetry::{metrics::Metrics, otlp},
    transport::Sockets,
};
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};
use tokio::{net::TcpListener, runtime::Runtime, task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint, Identity as Certificate, Server, ServerTlsConfig, server::TcpIncoming},
};

use self::bare::Bare;

// The allocator of the service; it serves all sides.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A fleet of subsystems that do nothing.
struct Fleet {
    subsystems: usize,
    endpoints: usize,
    /// Number of cycles of one side before the other side's turn.
    cycles: usize,
    rounds: usize,
}

const FLEETS: [Fleet; 5] = [
    Fleet { subsystems: 28, endpoints: 28, cycles: 100, rounds: 30 },
    Fleet { subsystems: 28, endpoints: 1, cycles: 100, rounds: 30 },
    Fleet { subsystems: 2_800, endpoints: 2_800, cycles: 5, rounds: 10 },
    Fleet { subsystems: 2_800, endpoints: 5, cycles: 5, rounds: 10 },
    Fleet { subsystems: 10_000, endpoints: 5, cycles: 2, rounds: 10 },
];

impl Fleet {
    fn name(&self) -> String {
        format!("{}x{}", self.subsystems, self.endpoints)
    }

    /// The server needs the larger share: it listens, and accepts from all sides.
    fn open_files(&self) -> u64 {
        8 * self.endpoints as u64 + 100
    }
}

fn main() -> Result<()> {
    const NOOP: &str = "--noop-server";
    let mut args = env::args().skip(1);
    let first = args.next();
    if first.as_deref() == Some(NOOP) {
        return serve_noop(args.next().unwrap_or_default().parse()?);
    }
    if env::var_os(KEY).is_none() {
        return with_certificate();
    }
    // Cargo passes `--bench` for measurements; otherwise this only checks that the benchmark works.
    let all: Vec<_> = first.into_iter().chain(args).collect();
    let measure = all.iter().any(|arg| arg == "--bench");
    let wanted = all.iter().find(|arg| !arg.starts_with('-'));
    let is_wanted = |name: &str| wanted.is_none_or(|wanted| wanted == name);

    let open_files = raise_open_files()?;
    let servers = Runtime::new()?.block_on(Servers::start());
    if is_wanted(commits::NAME) {
        Runtime::new()?.block_on(commits::compare(measure, servers.as_ref()))?;
    }
    let fleets: Vec<_> = FLEETS.into_iter().filter(|fleet| is_wanted(&fleet.name())).collect();
    if !fleets.is_empty() {
        println!(
            "{:>12} {:>8} {:>10} {:>10} {:>14} {:>12} {:>12} {:>11}",
            "fleet", "side", "p50 ms", "p99 ms", "CPU ms/cycle", "p50 / floor", "CPU / floor", "CPU / bare"
        );
    }
    for fleet in fleets {
        let name = fleet.name();
        if open_files.is_some_and(|limit| limit < fleet.open_files()) {
            println!("{name:>12} left out: it needs {} open files; raise the hard limit", fleet.open_files());
            continue;
        }
        let fleet = if measure { fleet } else { Fleet { cycles: 1, rounds: 1, ..fleet } };
        let server = NoopServer::start(NOOP, fleet.endpoints)?;
        Runtime::new()?.block_on(compare(&fleet, &server, servers.as_ref()))?;
        if !measure {
            break;
        }
    }
    Ok(())
}

/// Where the certificates are that TLS trusts. It can only be set for another process.
const TRUSTED: &str = "SSL_CERT_FILE";
/// Where the private key of the certificate is.
const KEY: &str = "ORCHESTRATOR_BENCH_KEY";

/// Runs this program again, with a certificate that it trusts.
fn with_certificate() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let [certificate, key] = ["certificate.pem", "key.pem"].map(|name| directory.path().join(name));
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
    fs::write(&certificate, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;
    let mut again = Command::new(env::current_exe()?);
    let status = again.args(env::args_os().skip(1)).env(TRUSTED, certificate).env(KEY, key).status()?;
    if status.success() { Ok(()) } else { Err("the benchmark has failed".into()) }
}

// ---------------------------------------------------------------------------------------------------------------
// Measuring

/// The p50 and p99 of these durations, in milliseconds. There is at least one.
fn quantiles(durations: &mut [Duration]) -> [f64; 2] {
    durations.sort_unstable();
    [0.5, 0.99].map(|quantile| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let index = ((durations.len() - 1) as f64 * quantile).round() as usize;
        durations[index].as_secs_f64() * 1e3
    })
}

/// The measured cost of the cycles of one side.
#[derive(Default)]
struct Measured {
    cycles: Vec<Duration>,
    cpu: Duration,
}

impl Measured {
    /// p50, p99 and CPU of a cycle, in milliseconds.
    #[allow(clippy::cast_precision_loss)]
    fn figures(&mut self) -> [f64; 3] {
        let cpu = self.cpu.as_secs_f64() * 1e3 / self.cycles.len() as f64;
        let [p50, p99] = quantiles(&mut self.cycles);
        [p50, p99, cpu]
    }
}

async fn compare(fleet: &Fleet, server: &NoopServer, servers: Option<&Servers>) -> Result<()> {
    let (endpoints, tls) = server.endpoints.split_at(fleet.endpoints);
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let sqlite = |name: &str| StoreUrl::Sqlite(directory.path().join(name));
    let collector = Some(server.collector.as_str());
    let ours = async |endpoints, store| Ours::start(fleet, endpoints, open(&store).await?, None).await;
    let bare = Arc::new(Bare::create(&directory.path().join("bare.db"), open(&StoreUrl::Memory).await?)?);
    let mut sides = vec![
        Side::Floor(Floor::connect(fleet, endpoints).await?),
        Side::Ours("memory", ours(endpoints, StoreUrl::Memory).await?),
        Side::Ours("bare", Ours::start(fleet, endpoints, bare, None).await?),
        Side::Ours("sqlite", ours(endpoints, sqlite("sqlite.db")).await?),
        Side::Ours("audited", Ours { cause: Some(a_call()), ..ours(endpoints, sqlite("audited.db")).await? }),
        Side::Ours("scraped", {
            let metrics = Some(Arc::new(Metrics::default()));
            Ours { metrics, ..ours(endpoints, sqlite("scraped.db")).await? }
        }),
        Side::Ours("traced", Ours::start(fleet, endpoints, open(&sqlite("traced.db")).await?, collector).await?),
    ];
    if !tls.is_empty() {
        sides.push(Side::Ours("tls", ours(tls, sqlite("tls.db")).await?));
    }
    for (name, server) in servers.iter().flat_map(|servers| servers.sides()) {
        sides.push(Side::Ours(name, ours(endpoints, StoreUrl::parse(&server.url())?).await?));
    }
    let mut sides: Vec<_> = sides.into_iter().map(|side| (side, Measured::default())).collect();
    // The first round of each side fills caches and buffers.
    for round in 0..=fleet.rounds {
        for (side, measured) in &mut sides {
            if round == 1 {
                *measured = Measured::default();
            }
            let cpu = cpu_time();
            for _ in 0..fleet.cycles {
                let start = Instant::now();
                side.cycle().await?;
                measured.cycles.push(start.elapsed());
            }
            side.settle().await?;
            measured.cpu += cpu_time().saturating_sub(cpu);
        }
    }
    let name = fleet.name();
    let (mut floor, mut bare) = (None, None);
    for (side, mut measured) in sides {
        let [p50, p99, cpu] = measured.figures();
        let [floor_p50, _, floor_cpu] = *floor.get_or_insert([p50, p99, cpu]);
        let (p50_ratio, cpu_ratio) = (p50 / floor_p50, cpu / floor_cpu);
        let side_name = side.name();
        if side_name == "bare" {
            bare = Some(cpu);
        }
        let to_bare = bare.map(|bare| cpu / bare);
        let shown = to_bare.map(|ratio| format!("{ratio:.3}")).unwrap_or_default();
        let ratios = format!("{p50_ratio:>12.2} {cpu_ratio:>12.2} {shown:>11}");
        println!("{name:>12} {side_name:>8} {p50:>10.3} {p99:>10.3} {cpu:>14.3} {ratios}");
        let json = serde_json::json!({
            "fleet": name, "side": side_name, "p50_ms": p50, "p99_ms": p99, "cpu_ms": cpu,
            "p50_to_floor": p50_ratio, "cpu_to_floor": cpu_ratio, "cpu_to_bare": to_bare,
        });
        println!("{json}");
        side.end().await?;
    }
    Ok(())
}

/// The CPU time that this process has used, in all its threads.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Raises the soft limit of open files to the hard one, and returns it.
fn raise_open_files() -> Result<Option<u64>> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum)
}

// ---------------------------------------------------------------------------------------------------------------
// The sides

enum Side {
    Floor(Floor),
    Ours(&'static str, Ours),
}

impl Side {
    fn name(&self) -> &'static str {
        match self {
            Self::Floor(_) => "floor",
            Self::Ours(store, _) => store,
        }
    }

    async fn cycle(&self) -> Result<()> {
        match self {
            Self::Floor(floor) => floor.cycle().await,
            Self::Ours(_, ours) => ours.cycle().await,
        }
    }

    /// Does the work of one round's end, and waits until all work of its cycles is done.
    async fn settle(&self) -> Result<()> {
        /// Longer than the interval at which spans are sent. Waiting takes no CPU time.
        const EXPORT: Duration = Duration::from_millis(400);
        let Self::Ours(_, ours) = self else { return Ok(()) };
        if let Some(metrics) = &ours.metrics {
            let pieces: Vec<_> = metrics.clone().scrape(Some(ours.orchestrator.clone())).try_collect().await?;
            black_box(pieces);
        }
        if ours.exporting.is_some() {
            sleep(EXPORT).await;
        }
        Ok(())
    }

    async fn end(self) -> Result<()> {
        match self {
            Self::Floor(_) => Ok(()),
            Self::Ours(_, ours) => ours.end().await,
        }
    }
}

/// PostgreSQL on this machine, where that is installed. All servers wait for the disk.
struct Servers {
    alone: postgres::Server,
    primary: postgres::Server,
    /// Commits of the primary wait for it.
    _standby: postgres::Server,
}

impl Servers {
    async fn start() -> Option<Self> {
        const FSYNC: &str = "-c fsync=on";
        let [alone, primary] = [postgres::Server::start(FSYNC, None)?, postgres::Server::start(FSYNC, None)?];
        let standby = primary.standby();
        primary.wait_for_standby().await;
        Some(Self { alone, primary, _standby: standby })
    }

    /// The sides with their stores on a server, by name.
    fn sides(&self) -> [(&'static str, &postgres::Server); 2] {
        [("postgres", &self.alone), ("standby", &self.primary)]
    }
}

async fn open(store: &StoreUrl) -> Result<Arc<dyn Store>> {
    Ok(store::open(store, record::CHECKS, Host::system().clock).await?)
}

/// A call of `RunCycle` over TCP, by a caller with a token.
fn a_call() -> Arc<Cause> {
    Arc::new(Cause {
        rpc: "RunCycle".into(),
        caller: Identity::parse("token:deployer").ok(),
        peer: "127.0.0.1:50000".into(),
        via: None,
        decision: Decision::Allowed,
        targets: AuditTargets::default(),
        request_digest: Some([7; 32]),
        begun_at: Some(Timestamp::now()),
        own_event: OwnEvent::default(),
    })
}

/// The orchestrator with its connections and its store, in the same composition as the service.
struct Ours {
    orchestrator: Arc<Orchestrator>,
    tasks: OrchestratorTasks,
    /// The call that asks for each cycle.
    cause: Option<Arc<Cause>>,
    /// The metrics, written once a round.
    metrics: Option<Arc<Metrics>>,
    /// Sends the spans until it is stopped.
    exporting: Option<(JoinHandle<()>, CancellationToken)>,
}

impl Ours {
    async fn start(
        fleet: &Fleet,
        endpoints: &[String],
        store: Arc<dyn Store>,
        collector: Option<&str>,
    ) -> Result<Self> {
        let subsystems = (0..fleet.subsystems).map(|i| {
            let endpoint = endpoints[i % endpoints.len()].clone();
            Subsystem::from_spec(&SubsystemSpec { name: format!("s{i}"), endpoint, ..SubsystemSpec::default() })
        });
        let declared =
            Declared { subsystems: subsystems.collect::<std::result::Result<_, _>>()?, ..Declared::default() };
        let memory = Shares::of(1 << 30);
        let host = Host::system();
        let transport = Arc::new(Sockets::default());
        let dialer = Arc::new(Dialer::new(transport, Duration::from_secs(5), memory.replies.clone(), host.clock));
        let signer = Signer::generate("bench")?;
        let contents = store.take_over(Seals::Checked(SealKeys::of(&signer))).await?;
        let settings = serve::settings(&Config::default());
        let (mut spans, mut exporting): (Arc<dyn Spans>, _) = (Arc::new(Untraced), None);
        if let Some(collector) = collector {
            let (exporter, sender) = otlp::exporter(collector, 1.0, host.random.clone(), "bench")?;
            spans = Arc::new(exporter);
            let stop = CancellationToken::new();
            exporting = Some((tokio::spawn(sender.run(stop.clone())), stop));
        }
        let taken_over = TakenOver::new(store, contents, signer);
        let (orchestrator, tasks) =
            Orchestrator::start(settings, &memory, host, dialer, taken_over, declared, spans).await?;
        Ok(Self { orchestrator: Arc::new(orchestrator), tasks, cause: None, metrics: None, exporting })
    }

    async fn cycle(&self) -> Result<()> {
        let request =
            CycleRequest { cause: self.cause.clone(), ..CycleRequest::over_all(Trigger::Manual, Timestamp::now()) };
        let record = self.orchestrator.run_cycle(request, false).await?.recorded().await?;
        if record.state == CycleState::Succeeded { Ok(()) } else { Err("a cycle did not succeed".into()) }
    }

    async fn end(mut self) -> Result<()> {
        self.orchestrator.drain();
        self.tasks.finished().await?;
        if let Some((sending, stop)) = self.exporting {
            stop.cancel();
            sending.await?;
        }
        Ok(())
    }
}

/// Sends only the calls.
struct Floor(Vec<(SubsystemClient<Channel>, pb::RunCycleRequest)>);

impl Floor {
    async fn connect(fleet: &Fleet, endpoints: &[String]) -> Result<Self> {
        let channels: Vec<Channel> = stream::iter(endpoints)
            .map(|endpoint| async { Endpoint::from_shared(endpoint.clone())?.connect().await })
            .buffered(16)
            .try_collect()
            .await?;
        let calls = (0..fleet.subsystems).map(|i| {
            let client = SubsystemClient::new(channels[i % channels.len()].clone());
            let request = pb::RunCycleRequest {
                subsystem: format!("s{i}"),
                cycle_id: 1,
                epoch: 1,
                attempt: 1,
                scheduled_at: Some(std::time::SystemTime::now().into()),
                ..pb::RunCycleRequest::default()
            };
            (client, request)
        });
        Ok(Self(calls.collect()))
    }

    async fn cycle(&self) -> Result<()> {
        let calls = self.0.iter().map(|(client, request)| {
            let mut client = client.clone();
            let request = request.clone();
            async move { client.run_cycle(request).await }
        });
        try_join_all(calls).await?;
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The server

/// The server process. It ends when this end of its input is closed.
struct NoopServer {
    process: Child,
    /// First those without TLS.
    endpoints: Vec<String>,
    /// The address at which it accepts spans.
    collector: String,
}

impl NoopServer {
    fn start(arg: &str, endpoints: usize) -> Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .args([arg, &endpoints.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = process.stdout.take().ok_or("the server has no output")?;
        let mut lines = BufReader::new(output).lines();
        let collector = lines.next().ok_or("the server has not started")??;
        let endpoints = lines.take(endpoints + with_tls(endpoints)).collect::<std::io::Result<_>>()?;
        Ok(Self { process, endpoints, collector })
    }
}

impl Drop for NoopServer {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// The number of endpoints with TLS beside this number without: none for large fleets, whose handshakes take long.
fn with_tls(endpoints: usize) -> usize {
    if endpoints > 28 { 0 } else { endpoints }
}

fn serve_noop(endpoints: usize) -> Result<()> {
    async fn listen(scheme: &str) -> Result<TcpIncoming> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{scheme}://{}", listener.local_addr()?);
        Ok(TcpIncoming::from(listener).with_nodelay(Some(true)))
    }
    let [certificate, key] = [TRUSTED, KEY].map(|file| fs::read(env::var_os(file).unwrap_or_default()));
    let tls = ServerTlsConfig::new().identity(Certificate::from_pem(certificate?, key?));
    Runtime::new()?.block_on(async {
        let collector = TraceServiceServer::new(Noop).max_decoding_message_size(usize::MAX);
        tokio::spawn(Server::builder().add_service(collector).serve_with_incoming(listen("http").await?));
        for _ in 0..endpoints {
            let incoming = listen("http").await?;
            tokio::spawn(Server::builder().add_service(SubsystemServer::new(Noop)).serve_with_incoming(incoming));
        }
        for _ in 0..with_tls(endpoints) {
            let incoming = listen("https").await?;
            let server = Server::builder().tls_config(tls.clone())?.add_service(SubsystemServer::new(Noop));
            tokio::spawn(server.serve_with_incoming(incoming));
        }
        tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
        Ok(())
    })
}

struct Noop;

#[tonic::async_trait]
impl TraceService for Noop {
    async fn export(
        &self,
        _: Request<ExportTraceServiceRequest>,
    ) -> std::result::Result<Response<ExportTraceServiceResponse>, Status> {
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl Service for Noop {
    async fn initialize(
        &self,
        _: Request<pb::InitializeRequest>,
    ) -> std::result::Result<Response<pb::InitializeResponse>, Status> {
        Ok(Response::new(pb::InitializeResponse {}))
    }

    async fn run_cycle(
        &self,
        _: Request<pb::RunCycleRequest>,
    ) -> std::result::Result<Response<pb::RunCycleResponse>, Status> {
        Ok(Response::new(pb::RunCycleResponse::default()))
    }

    async fn get_status(
        &self,
        _: Request<pb::GetStatusRequest>,
    ) -> std::result::Result<Response<pb::GetStatusResponse>, Status> {
        Ok(Response::new(pb::GetStatusResponse::default()))
    }
}
