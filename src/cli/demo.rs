//! `orchestrator demo`: the service and a simulated DreamNet, live.

mod fleet;

use std::{
    collections::BTreeMap,
    env,
    fmt::Display,
    future, io, mem,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use jiff::SignedDuration;
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::timeout,
};

use self::fleet::Fleet;
use super::{
    Exit, Failure, HOST,
    output::{count, parse_positive, print, short},
    remote::Remote,
    subsystems::{name, pages},
    watch,
};
use crate::{
    api::{interval_loop, registration},
    config::{Config, LogFormat, LogSettings},
    model::{Begin, IntervalLoop, Name, Payload, Served, Subsystem},
    proto::orchestrator::v1::{self as pb, cycle_event::Event},
    serve::{self, Service, StartError},
    store::StoreUrl,
    tasks::joined,
    telemetry,
    transport::Sockets,
};

/// The topology: names, order, phases, timeouts, which of them share an endpoint, and the loop.
const DREAMNET: &str = include_str!("../../examples/dreamnet.toml");

/// Longest wait until the view has ended, which a paused reader of its output can block.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Run the service with 28 simulated subsystems, live on the terminal
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The subsystems and their order are those of examples/dreamnet.toml. They run in this process, behind real sockets: \
each makes its output from its inputs, works for a while, and occasionally is slow, fails, or hangs until its timeout.

They and their loop are registered by RPC, so that commands can change them: `orchestrator subsystems` and \
`orchestrator loops`. With --store sqlite:PATH, changes of subsystems stay for the next demo.

Ctrl-C or SIGTERM stops everything, and cancels running cycles; nothing is left behind but what --store names.

Examples:
  orchestrator demo
  orchestrator demo --interval 2s --seed 42
  orchestrator demo --store sqlite:demo.db
  orchestrator demo --cycles 3 | cat")]
pub(super) struct Demo {
    /// Time between the starts of cycles, 10ms to 1h
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = interval)]
    interval: Duration,
    /// Loopback address to listen on [default: 127.0.0.1:7700, or a free port if that one is in use]
    #[arg(long, value_name = "ADDRESS", value_parser = loopback)]
    listen: Option<SocketAddr>,
    /// The store: memory: or sqlite:PATH
    #[arg(long, value_name = "URL", default_value = "memory:", value_parser = StoreUrl::parse)]
    store: StoreUrl,
    /// Seed of the simulated failures: the same seed gives the same failures
    #[arg(long, value_name = "NUMBER", default_value_t = 23)]
    seed: u64,
    /// Be a subsystem of another orchestrator under this name, which is also the id of this one
    #[arg(long, value_name = "NAME", value_parser = Name::parse)]
    serve_as: Option<Name>,
    /// Stop after this number of cycles
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u64>)]
    cycles: Option<u64>,
}

fn interval(text: &str) -> Result<Duration, String> {
    let allowed = Duration::from_millis(10)..=Duration::from_hours(1);
    let given: Option<SignedDuration> = text.parse().ok();
    let given = given.and_then(|given| Duration::try_from(given).ok()).filter(|given| allowed.contains(given));
    given.ok_or_else(|| "give a duration from 10ms to 1h, such as 500ms or 5s".to_owned())
}

fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: Option<SocketAddr> = text.parse().ok();
    let address = address.filter(|address| address.ip().to_canonical().is_loopback());
    address.ok_or_else(|| "give a loopback address and a port, such as 127.0.0.1:7701; port 0 takes a free one".into())
}

impl Demo {
    /// Runs until a signal stops it, or the given number of cycles has run.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        // More lines would disturb the live view, which itself shows cycles that did not succeed.
        let log = LogSettings { filter: "error".into(), format: LogFormat::Text };
        let _log = telemetry::init(&log).map_err(refused)?;
        let mut config = self.config()?;
        // They are registered by RPC, since commands can't change those of a configuration.
        let (mut subsystems, loops) = (mem::take(&mut config.subsystems), mem::take(&mut config.loops));
        let fleet = Fleet::start(&mut subsystems, self.seed, self.pace()).await.map_err(refused)?;
        let (service, is_moved) = self.start(&mut config).await.map_err(refused)?;
        let address = service.address();
        let greeting = self.greeting(&service, is_moved, &fleet);
        let mut shown = Ok(());
        let until_stopped = async {
            let mut tasks = JoinSet::new();
            // A separate task: its output may wait for a paused reader.
            let showing = async {
                let remote = Remote::at(address);
                tasks.spawn(async move {
                    register(&remote, &subsystems, loops).await?;
                    show(&remote, &greeting, self.cycles).await
                });
                let shown = tasks.join_next().await.unwrap_or(Ok(Ok(())));
                joined(shown).unwrap_or(Ok(()))
            };
            shown = select! {
                // Signals are handled before anything is printed.
                biased;
                told = told_to_stop() => told.map_err(refused),
                shown = showing => shown,
            };
            // If it ran on while the service stops, it would report the end of the stream.
            _ = timeout(LAST_LINES, tasks.shutdown()).await;
        };
        // A second signal aborts the shutdown.
        let stop_again = async || {
            if told_to_stop().await.is_err() {
                future::pending::<()>().await;
            }
        };
        let exit = service.run(until_stopped, stop_again).await;
        fleet.stop().await;
        shown?;
        Ok(match exit {
            serve::Exit::Drained => Exit::Done,
            serve::Exit::Aborted => Exit::Left,
            serve::Exit::Failed | serve::Exit::Fenced => Exit::Refused,
        })
    }

    /// Duration of the simulated work relative to its default, so that a cycle takes half of the interval.
    fn pace(&self) -> f64 {
        const DEFAULT: Duration = Duration::from_secs(5);
        self.interval.min(DEFAULT).div_duration_f64(DEFAULT)
    }

    fn config(&self) -> Result<Config, Failure> {
        let mut config = Config::from_toml_str("examples/dreamnet.toml", DREAMNET).map_err(refused)?;
        config.store.url = self.store.clone();
        if let Some(listen) = self.listen {
            config.server.listen = listen;
        }
        if let Some(name) = &self.serve_as {
            config.orchestrator_id = name.to_string();
            config.serves = vec![Served { name: name.clone(), subset: None, parameters: Payload::default() }];
        }
        // A demo stops at once, without waiting for its cycle.
        config.server.drain_grace = Duration::ZERO;
        for settings in &mut config.loops {
            settings.interval = self.interval;
        }
        Ok(config)
    }

    /// Starts the service; also returns true if it uses another port because the default port is in use.
    async fn start(&self, config: &mut Config) -> Result<(Service, bool), StartError> {
        let mut is_moved = false;
        loop {
            match Service::start(config, Begin::default(), HOST.clone(), Arc::new(Sockets::default())).await {
                Err(StartError::Listen(_, error)) if !is_moved && self.listen.is_none() && is_taken(&error) => {
                    config.server.listen.set_port(0);
                    is_moved = true;
                }
                Err(StartError::AdminListen(taken, error)) if taken.port() != 0 && is_taken(&error) => {
                    config.admin.listen = Some((taken.ip(), 0).into());
                }
                started => return Ok((started?, is_moved)),
            }
        }
    }

    fn greeting(&self, service: &Service, is_moved: bool, fleet: &Fleet) -> String {
        const SERVICE: &str = "dreamnet.orchestrator.v1.Orchestrator";
        let address = service.address();
        let dashboard = service.admin_address().map(|address| format!("dashboard at http://{address}/\n"));
        let taken = if is_moved { ", because 127.0.0.1:7700 is in use" } else { "" };
        // The path as it was called, so that the lines can be copied even if the binary is not installed.
        let program = env::args().next().unwrap_or_else(|| "orchestrator".into());
        let remote = Remote::at(address);
        let export = match remote.flag().as_str() {
            "" => String::new(),
            _ => format!("  export ORCHESTRATOR_ADDRESS={address}\n"),
        };
        // grpcurl accepts this form, which is short enough for these lines to fit into a terminal.
        let server = match address {
            SocketAddr::V4(v4) if *v4.ip() == Ipv4Addr::LOCALHOST => format!(":{}", v4.port()),
            other => other.to_string(),
        };
        format!(
            "\
listening on {address}{taken}
{dashboard}
DreamNet, simulated: {subsystems} behind {endpoints}, a cycle every {interval}. Each
makes its output from those of others; now and then one is slow, fails or hangs.
Store {store}, seed {seed}. Ctrl-C stops it all.

In another terminal:
{export}  {program} top
  {program} status
  {program} plan
  {program} run
  {program} cycles show 1
  {program} subsystems show DreamNetOSCore --latest-output
  {program} subsystems set NeuralMesh --timeout-per-cycle 1ms
  {program} subsystems set NeuralMesh --clear timeout

  grpcurl -plaintext {server} list
  grpcurl -plaintext {server} describe {SERVICE}
  grpcurl -plaintext {server} {SERVICE}/RunCycle
  grpcurl -plaintext {server} {SERVICE}/GetStatus
  grpcurl -plaintext {server} {SERVICE}/WatchCycles

",
            subsystems = count(fleet.subsystems() as u64, "subsystem"),
            endpoints = count(fleet.endpoints() as u64, "endpoint"),
            dashboard = dashboard.unwrap_or_default(),
            interval = short(self.interval),
            store = self.store,
            seed = self.seed,
        )
    }
}

/// Registers the subsystems, and starts the loops. Of subsystems that the store already has, by this name or by another
/// one that they were given since, only the endpoint changes: the rest may have been changed on purpose.
async fn register(remote: &Remote, subsystems: &[Subsystem], loops: Vec<IntervalLoop>) -> Result<(), Failure> {
    let mut client = remote.connect().await?;
    // The present name of each, by all names that it has had.
    let mut known = BTreeMap::new();
    let take = |page: Vec<pb::SubsystemStatus>| {
        for subsystem in page {
            let present = name(&subsystem);
            known.extend(subsystem.former_names.into_iter().map(|former| (former, present.clone())));
            known.insert(present.clone(), present);
        }
        Ok(())
    };
    pages(remote, &mut client, take).await?;
    let mut new = Vec::new();
    for one in subsystems.iter().map(registration) {
        let Some(name) = known.get(&one.name).cloned() else {
            new.push(one);
            continue;
        };
        let values = pb::Registration { name, endpoint: one.endpoint, ..pb::Registration::default() };
        let update_mask = Some(prost_types::FieldMask { paths: vec!["endpoint".to_owned()] });
        let request = pb::UpdateSubsystemRequest { registration: Some(values), update_mask, etag: String::new() };
        remote.quickly(client.update_subsystem(request)).await?;
    }
    if !new.is_empty() {
        let request = pb::RegisterSubsystemsRequest { registrations: new, lease: None };
        remote.quickly(client.register_subsystems(request)).await?;
    }
    for settings in loops {
        let settings = IntervalLoop { offset: due_now(settings.interval), ..settings };
        let request = pb::StartIntervalLoopRequest { r#loop: Some(interval_loop(&settings)) };
        remote.quickly(client.start_interval_loop(request)).await?;
    }
    Ok(())
}

/// Shows the cycles until the given number has run.
async fn show(remote: &Remote, greeting: &str, cycles: Option<u64>) -> Result<(), Failure> {
    print(greeting)?;
    let mut recorded = 0;
    let is_last = move |event: &pb::CycleEvent| {
        recorded += u64::from(matches!(event.event, Some(Event::Recorded(_))));
        Some(recorded) == cycles
    };
    watch::follow(remote, pb::WatchCyclesRequest::default(), None, is_last).await
}

fn is_taken(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrInUse
}

fn refused(error: impl Display) -> Failure {
    Failure::new(Exit::Refused, error.to_string())
}

/// The offset of a loop whose first tick is due at once, so that the first cycle of a demo starts without delay.
fn due_now(interval: Duration) -> Duration {
    /// Time until the cycles are watched.
    const SOON: Duration = Duration::from_millis(500);
    let now = Duration::try_from(HOST.clock.now().as_duration()).unwrap_or_default() + SOON;
    let beyond = now.as_nanos() % interval.as_nanos().max(1);
    u64::try_from(beyond).map(Duration::from_nanos).unwrap_or_default()
}

/// Waits for the next SIGTERM or SIGINT.
async fn told_to_stop() -> io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
