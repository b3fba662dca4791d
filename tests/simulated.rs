//! A whole service in a simulation: its network is in memory, its clock is paused, and its randomness has a seed. It
//! starts in the same way as `serve`, and opens no socket.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::{
    collections::BTreeMap,
    future::{pending, ready},
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use orchestrator_core::{
    config::Config,
    host::Host,
    model::{Begin, Epoch, Replica},
    ports::{Claim, ClaimId, Claimed},
    proto::orchestrator::v1::{CycleState, CycleTelemetry, RunCycleRequest, orchestrator_client::OrchestratorClient},
    serve::{Exit, Service},
    store::{Fate, Fates, SimulatedDatabase, Statement},
    subsystem::{Answer, Code, Cycle, Failure, Server},
    transport::{Admit, Connected, Destination, Listener, Origin, Transport},
};
use prost::Message;
use tokio::{
    io::{DuplexStream, duplex},
    join,
    sync::{Mutex as AsyncMutex, mpsc, oneshot},
    time::{Instant, sleep},
};
use tonic::transport::Endpoint;
use tower::service_fn;

/// Connects every name to the listener at its port.
#[derive(Default)]
struct Network {
    listening: Mutex<BTreeMap<u16, mpsc::Sender<DuplexStream>>>,
}

struct Incoming(AsyncMutex<mpsc::Receiver<DuplexStream>>);

impl Transport for Network {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<(Box<dyn Listener>, SocketAddr)>> {
        Box::pin(async move {
            let (sender, receiver) = mpsc::channel(8);
            self.listening.lock().unwrap().insert(address.port(), sender);
            Ok((Box::new(Incoming(AsyncMutex::new(receiver))) as _, address))
        })
    }

    fn listen_at_path<'a>(&'a self, _: &'a Path, _: u32) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(ready(Err(io::ErrorKind::Unsupported.into())))
    }

    fn connect<'a>(&'a self, to: &'a Destination, _: Admit<'a>, _: Duration) -> BoxFuture<'a, io::Result<Connected>> {
        Box::pin(async move {
            let Destination::Tcp { port, .. } = to else { return Err(io::ErrorKind::Unsupported.into()) };
            let (near, far) = duplex(64 << 10);
            let listener = self.listening.lock().unwrap().get(port).cloned();
            let listener = listener.ok_or(io::ErrorKind::ConnectionRefused)?;
            listener.send(far).await.map_err(|_ended| io::ErrorKind::ConnectionRefused)?;
            Ok((Box::new(near) as _, Origin::Unknown))
        })
    }
}

impl Listener for Incoming {
    fn accept(&self) -> BoxFuture<'_, io::Result<Connected>> {
        Box::pin(async {
            match self.0.lock().await.recv().await {
                Some(stream) => Ok((Box::new(stream) as _, Origin::Unknown)),
                None => pending().await,
            }
        })
    }
}

/// Fails twice in each cycle, so that the record holds the jitter of two retries.
async fn flaky(cycle: Cycle) -> Result<Answer, Failure> {
    sleep(Duration::from_millis(20)).await;
    if cycle.attempt < 3 {
        return Err(Failure::new(Code::Unavailable, "not yet"));
    }
    let mut answer = Answer::default();
    answer.output("attempt", cycle.attempt);
    Ok(answer)
}

/// The records of two cycles, as a client of the service receives them.
async fn records(seed: u64) -> [Bytes; 2] {
    let network = Arc::new(Network::default());
    let fleet = Server::new().subsystem("flaky", flaky).subsystem("calm", |_| async { Ok(Answer::default()) });
    let fleet = fleet.listen_over(&*network, ([127, 0, 0, 1], 2).into()).await.unwrap();
    let config = r#"
        server.listen = "127.0.0.1:1"
        admin.listen = "off"
        store.url = "memory:"
        memory.max_bytes = 268435456

        [[subsystems]]
        name = "flaky"
        endpoint = "http://fleet:2"
        retry = { max_attempts = 3, initial_backoff = "100ms", max_backoff = "1s" }

        [[subsystems]]
        name = "calm"
        endpoint = "http://fleet:2"
        after = ["flaky"]
    "#;
    let config = Config::from_toml_str("simulated.toml", config).unwrap();
    let host = Host::simulated("2026-01-01T00:00:00Z".parse().unwrap(), seed);
    let service = Service::start(&config, Begin::Again, host, network.clone()).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(service.run(async { drop(stopped.await) }, async || pending().await));

    let connect = service_fn(move |_| {
        let network = network.clone();
        async move {
            let to = Destination::Tcp { host: "orchestrator".into(), port: 1 };
            let connected = network.connect(&to, &|_| Ok(()), Duration::MAX).await;
            connected.map(|(stream, _)| TokioIo::new(stream))
        }
    });
    let channel = Endpoint::from_static("http://orchestrator:1").connect_with_connector(connect).await.unwrap();
    let mut client = OrchestratorClient::new(channel);
    let mut records = Vec::new();
    for _ in 0..2 {
        records.push(client.run_cycle(RunCycleRequest::default()).await.unwrap().into_inner().telemetry);
    }
    drop(client);
    drop(stop);
    assert_eq!(running.await.unwrap(), Exit::Drained);
    fleet.stop(Duration::from_secs(1)).await;
    records.try_into().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_replica_whose_term_is_over_before_it_has_begun_follows_at_once() {
    const LOOKS: Duration = Duration::from_millis(100);
    let config = r#"
        server.listen = "127.0.0.1:1"
        admin.listen = "off"
        store.url = "memory:"
        memory.max_bytes = 268435456
        cluster.lease_ttl = "10s"
    "#;
    let config = Config::from_toml_str("simulated.toml", config).unwrap();
    let (host, database) = (Host::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1), SimulatedDatabase::new(false));
    let clock = host.clock;
    // Once it has claimed to lead, its next read of the store takes very long.
    let has_claimed = Arc::<AtomicBool>::default();
    let is_next = has_claimed.clone();
    let fates: Fates = Box::new(move |statement| {
        if statement == Statement::Read && is_next.swap(false, Ordering::Relaxed) {
            return Fate { travels: Duration::from_hours(1), ..Fate::default() };
        }
        Fate { returns: 3 * LOOKS, ..Fate::default() }
    });
    let store = database.share(clock, clock, fates);
    let other = database.share(clock, clock, Box::new(|_| Fate::default())).leadership().unwrap();
    let claims = async {
        let seen = loop {
            sleep(LOOKS).await;
            let seen = other.observe().await.unwrap();
            if seen.leader.is_some() {
                break seen;
            }
        };
        has_claimed.store(true, Ordering::Relaxed);
        let replica = Replica { name: "other".into(), address: None };
        let lease_ttl = Duration::from_secs(10);
        let claim = Claim { id: ClaimId(1), replica, lease_ttl, at_least: Epoch::default() };
        assert!(matches!(other.claim(&seen, &claim).await.unwrap(), Claimed::Won(_)));
        Instant::now()
    };
    let starts = Service::start_over(&config, Begin::Again, host, Arc::new(Network::default()), async { Ok(store) });
    let (service, claimed) = join!(starts, claims);
    let took = claimed.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    let stopped = ready(());
    assert_eq!(service.unwrap().run(stopped, async || pending().await).await, Exit::Drained);
}

#[tokio::test(start_paused = true)]
async fn records_are_the_same_bytes_for_the_same_clock_and_seed() {
    let first = records(7).await;
    for record in &first {
        let record = CycleTelemetry::decode(record.clone()).unwrap();
        assert_eq!(record.state(), CycleState::Succeeded, "{record:?}");
        assert_eq!(record.subsystems[0].attempts, 3);
    }
    assert_eq!(records(7).await, first);
    // The seed reaches the record.
    assert_ne!(records(8).await, first);
}
