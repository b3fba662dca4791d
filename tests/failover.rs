//! Several replicas over one store in PostgreSQL, with a real server: where it is installed. One leads, and another one
//! takes over whatever happens to it.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{
    collections::BTreeMap,
    env,
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;

use common::{
    fleet::{Fleet, Run},
    http, patiently,
    postgres::{Server, shared},
    service::{Client, Home, Service, because, decode, next_event, reason, registration},
};
use futures_util::future::join_all;
use orchestrator_core::proto::orchestrator::v1::{
    CycleState, CycleTelemetry, Registration, ReplicaRole, RunCycleRequest, cycle_event::Event,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    process::Command,
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Status, transport::Endpoint};

/// The TTL of leases.
const TTL: Duration = Duration::from_secs(1);
/// Another one: nothing takes as long but the end of a lease.
const LONG: Duration = Duration::from_secs(30);

/// Replicas of one orchestrator.
struct Replicas {
    homes: Vec<Home>,
    services: Vec<Option<Service>>,
    fleet: Fleet,
    /// The directory of their key.
    shared: tempfile::TempDir,
}

/// The home of the replica with this name, with a store at this URL and the key in this directory.
fn home(name: &str, store: &str, shared: &Path, ttl: Duration) -> Home {
    let key_file = shared.join("log.key").display().to_string();
    let config = format!(
        "[ledger]\nkey_files = [{key_file:?}]\n
         [cluster]\nreplica = {name:?}\nlease_ttl = \"{}ms\"\nadvertise = \"http://127.0.0.1:7700\"\n",
        ttl.as_millis()
    );
    Home::new().with_store(store).with_config(&config)
}

impl Replicas {
    /// As many as there are names, started together.
    async fn start(server: &Server, names: &[&str]) -> Self {
        Self::with_ttl(server, names, TTL).await
    }

    /// The same, with leases of this TTL.
    async fn with_ttl(server: &Server, names: &[&str], ttl: Duration) -> Self {
        let store = server.url();
        Self::at(names.iter().map(|name| (*name, store.clone())), ttl).await
    }

    /// Those with these names and URLs of their common store.
    async fn at(replicas: impl Iterator<Item = (&str, String)>, ttl: Duration) -> Self {
        let shared = tempfile::tempdir().unwrap();
        let homes: Vec<_> = replicas.map(|(name, store)| home(name, &store, shared.path(), ttl)).collect();
        let services = join_all(homes.iter().map(Home::serve)).await.into_iter().map(Some).collect();
        let replicas = Self { homes, services, fleet: Fleet::start().await, shared };
        replicas.leader().await;
        replicas
    }

    /// The index of the replica that leads, once one does.
    async fn leader(&self) -> usize {
        self.leader_but(None).await
    }

    /// The same, where one is not asked.
    async fn leader_but(&self, other: Option<usize>) -> usize {
        let leads = async {
            loop {
                for (i, service) in self.services.iter().enumerate().filter(|(i, _)| Some(*i) != other) {
                    if let Some(service) = service
                        && http::get(service.admin(), "/leader").await.status == 200
                    {
                        return i;
                    }
                }
            }
        };
        patiently("a replica to lead", leads).await
    }

    fn service(&self, i: usize) -> &Service {
        self.services[i].as_ref().unwrap()
    }

    async fn client(&self, i: usize) -> Client {
        self.service(i).client().await
    }

    async fn register(&self, leader: usize, names: &[&str]) {
        for name in names {
            self.client(leader).await.register(registration(name, self.fleet.endpoint())).await.unwrap();
        }
    }

    /// The log of each of them.
    fn logs(&self) -> String {
        let of_each = self.homes.iter().map(|home| format!("{}\n", home.log()));
        of_each.collect::<Vec<_>>().join("---\n")
    }
}

/// A socket in front of the server, which can stop to pass anything on, as a network does that is cut.
struct Network {
    directory: tempfile::TempDir,
    is_cut: watch::Sender<bool>,
}

impl Network {
    fn before(server: &Server) -> Self {
        const NAME: &str = ".s.PGSQL.5432";
        let (directory, is_cut) = (tempfile::tempdir().unwrap(), watch::Sender::new(false));
        let listener = UnixListener::bind(directory.path().join(NAME)).unwrap();
        let (server, cut) = (server.directory().join(NAME), is_cut.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, cut) = (server.clone(), cut.subscribe());
                tokio::spawn(async move {
                    let server = UnixStream::connect(server).await.unwrap();
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    let both = (pass_on(from_client, to_server, cut.clone()), pass_on(from_server, to_client, cut));
                    tokio::join!(both.0, both.1)
                });
            }
        });
        Self { directory, is_cut }
    }

    fn set_cut(&self, is_cut: bool) {
        self.is_cut.send_replace(is_cut);
    }

    /// The URL of the store at `url`, by way of this.
    fn url(&self, url: &str) -> String {
        let (_, schema) = url.rsplit_once("schema=").unwrap();
        let host = self.directory.path().display().to_string().replace('/', "%2F");
        format!("postgres://owner@{host}/postgres?schema={schema}")
    }
}

async fn pass_on(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut is_cut: watch::Receiver<bool>) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        let _ = is_cut.wait_for(|is_cut| !is_cut).await;
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

async fn history(client: &mut Client) -> Vec<CycleTelemetry> {
    client.history().await.unwrap().into_iter().map(decode).collect()
}

#[tokio::test]
async fn of_replicas_that_start_together_on_an_empty_database_one_leads_and_the_others_name_it() {
    let Some(server) = shared() else { return };
    let names = ["a", "b", "c"];
    let replicas = Replicas::start(server, &names).await;
    let leader = replicas.leader().await;
    assert_eq!(replicas.client(leader).await.run().await.unwrap().cycle_id, 1);
    for (i, _) in names.iter().enumerate().filter(|(i, _)| *i != leader) {
        let refused = async {
            loop {
                let refused = replicas.client(i).await.run().await.unwrap_err();
                if reason(&refused).metadata.contains_key("leader") {
                    return refused;
                }
            }
        };
        let refused = patiently("the follower to know its leader", refused).await;
        let of_leader = [("leader", names[leader]), ("leader_address", "http://127.0.0.1:7700")];
        // Nothing listens there.
        assert_eq!(reason(&refused), because(Code::Unavailable, "NO_LEADER", of_leader));
        assert_eq!(http::get(replicas.service(i).admin(), "/leader").await.status, 503);
        assert_eq!(http::get(replicas.service(i).admin(), "/readyz").await.status, 200);
        let metrics = http::get(replicas.service(i).admin(), "/metrics").await.text().await;
        assert!(metrics.contains("orchestrator_is_leader 0"), "{metrics}");
    }
    let metrics = http::get(replicas.service(leader).admin(), "/metrics").await.text().await;
    for shown in [
        "orchestrator_is_leader 1",
        "orchestrator_lease_remaining_seconds 0.",
        "orchestrator_leader_changes_total 1",
        "orchestrator_clock_offset_seconds ",
    ] {
        assert!(metrics.contains(shown), "{shown} is not in {metrics}");
    }
    let status = replicas.client(leader).await.status().await.unwrap();
    assert_eq!((status.role(), status.leader), (ReplicaRole::Leader, status.replica));
    assert!(status.lease_remaining.is_some());
}

#[tokio::test]
async fn after_a_kill_of_the_leader_another_replica_goes_on_within_its_ttl() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b", "c"]).await;
    let leader = replicas.leader().await;
    replicas.register(leader, &["s"]).await;
    let mut client = replicas.client(leader).await;
    for _ in 0..3 {
        client.run().await.unwrap();
    }
    let before = client.status().await.unwrap();
    replicas.fleet.run("s", Run::Hang);
    let interrupted = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").any(|call| call.cycle_id == interrupted)).await;
    replicas.services[leader].take().unwrap().kill().await;
    let killed = Instant::now();
    replicas.fleet.run("s", Run::Echo);
    let next = replicas.leader().await;
    let mut client = replicas.client(next).await;
    let cycle = client.run().await.unwrap();
    let took = killed.elapsed();
    assert!(took < TTL + Duration::from_secs(2), "it took {took:?}: {}", replicas.logs());
    assert!(cycle.epoch > before.epoch);
    let states: Vec<_> = history(&mut client).await.iter().map(|cycle| (cycle.cycle_id, cycle.state())).collect();
    let succeeded = |id| (id, CycleState::Succeeded);
    let expected =
        [succeeded(1), succeeded(2), succeeded(3), (interrupted, CycleState::Interrupted), succeeded(interrupted + 1)];
    assert_eq!(states, expected);
}

#[tokio::test]
async fn after_a_graceful_stop_another_replica_goes_on_at_once_and_nothing_is_interrupted() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::with_ttl(server, &["a", "b", "c"], LONG).await;
    let leader = replicas.leader().await;
    replicas.register(leader, &["s"]).await;
    let mut client = replicas.client(leader).await;
    replicas.fleet.run("s", Run::Hold);
    let running = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    replicas.service(leader).signal(Signal::TERM);
    replicas.homes[leader].logged("shutting down", 1).await;
    replicas.fleet.run("s", Run::Echo);
    let last = Instant::now();
    let next = replicas.leader_but(Some(leader)).await;
    let took = last.elapsed();
    assert!(took < LONG / 2, "it took {took:?}: {}", replicas.logs());
    let stopped = replicas.services[leader].take().unwrap();
    assert!({ stopped }.ended().await.success());
    let mut client = replicas.client(next).await;
    assert_eq!(client.run().await.unwrap().cycle_id, running + 1);
    assert!(history(&mut client).await.iter().all(|cycle| cycle.state() == CycleState::Succeeded));
}

#[tokio::test]
async fn a_replica_without_the_key_of_the_others_does_not_lead() {
    let Some(server) = shared() else { return };
    let store = server.url();
    let mut replicas = Replicas::at([("a", store.clone())].into_iter(), TTL).await;
    replicas.client(0).await.run().await.unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let other = home("b", &store, elsewhere.path(), TTL);
    let follower = other.serve().await;
    assert!({ replicas.services[0].take().unwrap() }.stop().await.success());
    other.logged("this replica can't lead", 1).await;
    assert!(other.log().contains("the key that sealed it is missing"), "{}", other.log());
    assert_eq!(http::get(follower.admin(), "/leader").await.status, 503);
    assert!(!elsewhere.path().join("log.key").exists(), "it has no use for a key of its own");
    // The log goes on where the key is.
    replicas.services[0] = Some(replicas.homes[0].serve().await);
    replicas.leader().await;
    assert_eq!(replicas.client(0).await.run().await.unwrap().cycle_id, 2);
    assert!(!replicas.logs().contains("a new log begins"), "{}", replicas.logs());
}

#[tokio::test]
async fn a_leader_that_was_stopped_makes_no_calls_when_it_goes_on_and_follows() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b", "c"]).await;
    let leader = replicas.leader().await;
    replicas.register(leader, &["s", "t"]).await;
    let mut client = replicas.client(leader).await;
    let epoch = client.status().await.unwrap().epoch;
    // `t` would be called next.
    let after = Registration { after: vec!["s".into()], ..registration("t", replicas.fleet.endpoint()) };
    client.register(after).await.unwrap();
    replicas.fleet.run("s", Run::Hold);
    let cut = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    replicas.service(leader).signal(Signal::STOP);
    let next = replicas.leader_but(Some(leader)).await;
    // The answer arrives while the process is stopped.
    replicas.fleet.run("s", Run::Echo);
    sleep(TTL * 2).await;
    let mut other = replicas.client(next).await;
    let first = other.run().await.unwrap();
    assert!(first.epoch > epoch && first.cycle_id == cut + 1, "{first:?}");
    replicas.service(leader).signal(Signal::CONT);
    replicas.homes[leader].logged("this replica follows from now on", 1).await;
    let follows = async {
        loop {
            let refused = replicas.client(leader).await.run().await.unwrap_err();
            if reason(&refused).metadata.contains_key("leader") {
                return;
            }
        }
    };
    patiently("it to follow", follows).await;
    assert!(replicas.fleet.now(|state| state.runs("t").all(|call| call.epoch > epoch)), "{}", replicas.logs());
    assert_eq!(other.run().await.unwrap().cycle_id, cut + 2);
    let interrupted: Vec<_> = history(&mut other).await.into_iter().filter(|cycle| cycle.cycle_id == cut).collect();
    assert!(matches!(&interrupted[..], [cycle] if cycle.state() == CycleState::Interrupted), "{interrupted:?}");
    // And it leads again when its turn comes.
    replicas.service(next).signal(Signal::KILL);
    let third = replicas.leader_but(Some(next)).await;
    assert_eq!(replicas.client(third).await.run().await.unwrap().cycle_id, cut + 3);
}

#[tokio::test]
async fn a_leader_that_is_cut_from_the_database_ends_its_calls_before_another_one_makes_any() {
    let Some(server) = shared() else { return };
    let (url, network) = (server.url(), Network::before(server));
    let replicas = Replicas::at([("a", network.url(&url))].into_iter(), TTL).await;
    let other = home("b", &url, replicas.shared.path(), TTL);
    let other = other.serve().await;
    replicas.register(0, &["s"]).await;
    let mut client = replicas.client(0).await;
    replicas.fleet.run("s", Run::Hang);
    let cut = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    network.set_cut(true);
    other.leads().await;
    replicas.fleet.run("s", Run::Echo);
    let mut of_other = other.client().await;
    assert_eq!(of_other.run().await.unwrap().cycle_id, cut + 1);
    replicas.fleet.until("the call to end", |state| state.runs("s").all(|call| call.ended.is_some())).await;
    let (first, second) = {
        let runs = replicas.fleet.runs("s");
        (runs[0].clone(), runs[1].clone())
    };
    assert!(first.ended.unwrap().0 < second.began, "{first:?}, {second:?}: {}", replicas.logs());
    // Meanwhile it can't note further cycles, and calls nothing.
    assert!(timeout(TTL / 2, client.run()).await.map_or(true, |ran| ran.is_err()));
    network.set_cut(false);
    replicas.homes[0].logged("this replica follows from now on", 1).await;
    let interrupted: Vec<_> =
        history(&mut of_other).await.iter().map(|cycle| (cycle.cycle_id, cycle.state())).collect();
    assert_eq!(interrupted, [(cut, CycleState::Interrupted), (cut + 1, CycleState::Succeeded)]);
}

#[tokio::test]
async fn a_leader_whose_lease_has_ended_goes_on_if_it_is_renewed_before_another_one_claims_to_lead() {
    let Some(server) = shared() else { return };
    let (url, network) = (server.url(), Network::before(server));
    let replicas = Replicas::at([("a", network.url(&url))].into_iter(), TTL).await;
    replicas.register(0, &["s"]).await;
    let mut client = replicas.client(0).await;
    let epoch = client.status().await.unwrap().epoch;
    replicas.fleet.run("s", Run::Hang);
    let cut = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    network.set_cut(true);
    replicas.homes[0].logged("could not confirm in time that it leads", 1).await;
    replicas.fleet.until("the call to end", |state| state.runs("s").all(|call| call.ended.is_some())).await;
    network.set_cut(false);
    replicas.homes[0].logged("this replica leads on", 1).await;
    replicas.fleet.run("s", Run::Echo);
    let cancelled = client.recorded(cut).await;
    assert_eq!(cancelled.state(), CycleState::Cancelled);
    assert!(cancelled.error.contains("could not confirm that it leads"), "{}", cancelled.error);
    let next = client.run().await.unwrap();
    assert_eq!((next.cycle_id, next.epoch, next.state()), (cut + 1, epoch, CycleState::Succeeded));
}

#[tokio::test]
async fn a_replica_that_cannot_lead_with_its_configuration_leaves_the_lead_to_others_until_it_is_reloaded() {
    let Some(server) = shared() else { return };
    let store = server.url();
    let mut replicas = Replicas::at([("a", store.clone())].into_iter(), TTL).await;
    let mut client = replicas.client(0).await;
    let after_b = Registration { after: vec!["b".into()], ..registration("a", replicas.fleet.endpoint()) };
    client.register(after_b).await.unwrap();
    // Together with what is registered, this is a circular dependency.
    let ring = home("b", &store, replicas.shared.path(), TTL);
    let valid = std::fs::read_to_string(ring.path("orchestrator.toml")).unwrap();
    let endpoint = replicas.fleet.endpoint();
    let declared = format!("[[subsystems]]\nname = \"b\"\nendpoint = {endpoint:?}\n");
    let valid = format!("{valid}{declared}");
    std::fs::write(ring.path("orchestrator.toml"), format!("{valid}after = [\"a\"]\n")).unwrap();
    let follower = ring.serve().await;
    ring.logged("this replica can't lead", 1).await;
    let epoch = client.status().await.unwrap().epoch;
    assert!(replicas.services[0].take().unwrap().stop().await.success());
    // No other replica can lead, and it has not claimed to.
    sleep(TTL * 2).await;
    assert_eq!(http::get(follower.admin(), "/leader").await.status, 503);
    assert!(!ring.log().contains("has claimed to lead"), "{}", ring.log());
    std::fs::write(ring.path("orchestrator.toml"), &valid).unwrap();
    follower.signal(Signal::HUP);
    follower.leads().await;
    assert!(follower.client().await.status().await.unwrap().epoch > epoch);
}

#[tokio::test]
async fn a_follower_says_within_a_second_that_no_replica_leads() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b"]).await;
    let leader = replicas.leader().await;
    let follower = 1 - leader;
    // Before it has waited for the end of the lease, nothing says that the leader is gone.
    replicas.service(leader).signal(Signal::KILL);
    let mut client = replicas.client(follower).await;
    let answered = timeout(Duration::from_secs(1), client.run()).await.unwrap();
    if let Err(refused) = answered {
        assert!(["NOT_LEADER", "NO_LEADER"].contains(&&*reason(&refused).why), "{refused:?}");
    }
}

/// The addresses of the replicas.
type Addresses = watch::Receiver<Vec<SocketAddr>>;

/// A client of a replica; `None` if that does not answer in time.
async fn client_of(address: SocketAddr) -> Option<Client> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let connected = timeout(TTL, endpoint.connect()).await.ok()?;
    connected.ok().map(Client::new)
}

/// Runs cycles, one after another, each by one request that is repeated, at whichever replica, until it is answered.
async fn run_cycles(addresses: Addresses, acknowledged: Arc<Mutex<BTreeMap<String, CycleTelemetry>>>) {
    for number in 0.. {
        let request_id = format!("request-{number}");
        let answer = 'answered: loop {
            let now = addresses.borrow().clone();
            for address in now {
                let Some(mut client) = client_of(address).await else { continue };
                let request = RunCycleRequest { request_id: request_id.clone(), ..RunCycleRequest::default() };
                if let Ok(Ok(telemetry)) = timeout(TTL, client.run_with(request)).await {
                    break 'answered telemetry;
                }
            }
        };
        acknowledged.lock().unwrap().insert(request_id, answer);
    }
}

/// Watches the records from the first one on, at whichever replica.
async fn watch_records(addresses: Addresses, watched: watch::Sender<Vec<Bytes>>) {
    loop {
        let now = addresses.borrow().clone();
        for address in now {
            let Some(mut client) = client_of(address).await else { continue };
            let after = watched.borrow().last().map_or(0, |record| decode(record.clone()).revision);
            let Ok(Ok(mut events)) = timeout(TTL, client.watch_after(after)).await else { continue };
            // A replica that was stopped sends nothing.
            while let Ok(Ok::<_, Status>(event)) = timeout(TTL * 3, next_event(&mut events)).await {
                if let Some(Event::Recorded(record)) = event.event {
                    watched.send_modify(|watched| watched.push(record));
                }
            }
        }
    }
}

/// `ORCHESTRATOR_TEST_ROUNDS` sets the number of rounds, and `ORCHESTRATOR_TEST_SEED` what happens in them.
#[tokio::test(flavor = "multi_thread")]
async fn promises_hold_whatever_happens_to_replicas_and_their_sessions() {
    // Of its own, since all sessions are ended.
    let Some(server) = Server::start("", None) else { return };
    let number = |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let rounds = number("ORCHESTRATOR_TEST_ROUNDS").unwrap_or(10);
    let seed = number("ORCHESTRATOR_TEST_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("{rounds} rounds, ORCHESTRATOR_TEST_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut replicas = Replicas::start(&server, &["a", "b", "c"]).await;
    replicas.register(replicas.leader().await, &["s", "t"]).await;
    replicas.fleet.run("t", Run::Late(Duration::from_millis(20), Box::new(Run::Echo)));

    let of = |replicas: &Replicas| replicas.services.iter().flatten().map(Service::address).collect::<Vec<_>>();
    let addresses = watch::Sender::new(of(&replicas));
    let (acknowledged, watched) = (Arc::default(), watch::Sender::new(Vec::new()));
    let runner = tokio::spawn(run_cycles(addresses.subscribe(), Arc::clone(&acknowledged)));
    let watcher = tokio::spawn(watch_records(addresses.subscribe(), watched.clone()));
    for round in 0..rounds {
        sleep(TTL.mul_f64(rng.f64())).await;
        let leader = replicas.leader().await;
        let it = if rng.u8(..4) == 0 { rng.usize(..3) } else { leader };
        match rng.u8(..4) {
            0 => {
                replicas.services[it].take().unwrap().kill().await;
                replicas.services[it] = Some(replicas.homes[it].serve().await);
            }
            1 => {
                assert!(replicas.services[it].take().unwrap().stop().await.success(), "{}", replicas.logs());
                replicas.services[it] = Some(replicas.homes[it].serve().await);
            }
            2 => {
                replicas.service(it).signal(Signal::STOP);
                sleep(TTL.mul_f64(rng.f64() * 3.0)).await;
                replicas.service(it).signal(Signal::CONT);
            }
            _ => server.end_sessions().await,
        }
        addresses.send_replace(of(&replicas));
        assert!(!runner.is_finished() && !watcher.is_finished(), "round {round}: {}", replicas.logs());
    }
    runner.abort();
    // The last term may just end.
    let ended = async {
        loop {
            let mut client = replicas.client(replicas.leader().await).await;
            if let Ok(last) = client.run().await {
                return (client, last);
            }
        }
    };
    let (mut client, last) = patiently("a last cycle", ended).await;
    let all = watched
        .subscribe()
        .wait_for(|watched| watched.last().is_some_and(|record| decode(record.clone()).revision >= last.revision))
        .await
        .unwrap()
        .clone();
    watcher.abort();
    let history = client.history().await.unwrap();
    assert_eq!(all, history, "the watcher has seen other records");
    let cycles: Vec<_> = history.into_iter().map(decode).collect();
    let mut ids: Vec<_> = cycles.iter().map(|cycle| cycle.cycle_id).collect();
    ids.sort_unstable();
    assert_eq!(ids, (1..=last.cycle_id).collect::<Vec<_>>(), "{}", replicas.logs());
    assert!(cycles.is_sorted_by_key(|cycle| (cycle.epoch, cycle.revision)), "{}", replicas.logs());
    let acknowledged = acknowledged.lock().unwrap().clone();
    for (request_id, answer) in &acknowledged {
        let of_request: Vec<_> = cycles.iter().filter(|cycle| cycle.request_id == *request_id).collect();
        assert_eq!(of_request, [answer], "{request_id}: {}", replicas.logs());
    }
    let terms = cycles.iter().map(|cycle| cycle.epoch).collect::<std::collections::BTreeSet<_>>().len();
    println!("{} cycles of {terms} terms, {} acknowledged", cycles.len(), acknowledged.len());
}

#[tokio::test]
#[ignore = "listens at the ports of the example; .ci/run runs it"]
async fn the_example_goes_on_when_its_leader_is_killed() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/replicas/run");
    let mut script = Command::new(script)
        .arg(env!("CARGO_BIN_EXE_orchestrator"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(script.stdout.take().unwrap()).lines();
    let mut next = async || patiently("the next line", lines.next_line()).await.unwrap().unwrap();
    let mut cycles = 0;
    let mut said = Vec::new();
    // Two records after the second kill.
    while said.iter().filter(|line: &&String| line.contains("was killed while it led")).count() < 2 || cycles < 10 {
        let line = next().await;
        if let Some((_, cycle)) = line.split_once("  cycle ") {
            cycles += 1;
            assert!(cycle.starts_with(&format!("{cycles} ")), "{line}");
        }
        said.push(line);
    }
    assert!(said.iter().any(|line| line.contains("INTERRUPTED")), "{said:#?}");
    let id = Pid::from_raw(script.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(id, Signal::TERM).unwrap();
    patiently("the script to end", script.wait()).await.unwrap();
}
