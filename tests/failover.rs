//! Several replicas over one store in PostgreSQL, with a real server: where it is installed. One leads, and another one
//! takes over whatever happens to it.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{path::Path, time::Duration};

use common::{
    fleet::{Fleet, Run},
    http, patiently,
    postgres::{Server, shared},
    service::{Client, Home, Service, because, decode, reason, registration},
};
use futures_util::future::join_all;
use orchestrator_core::proto::orchestrator::v1::{CycleState, CycleTelemetry};
use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

/// The TTL of leases.
const TTL: Duration = Duration::from_secs(1);

/// Replicas of one orchestrator.
struct Replicas {
    homes: Vec<Home>,
    services: Vec<Option<Service>>,
    fleet: Fleet,
    /// Where their key is.
    _shared: tempfile::TempDir,
}

/// The home of the replica with this name, with a store at this URL and the key in this directory.
fn home(name: &str, store: &str, shared: &Path) -> Home {
    let key_file = shared.join("log.key").display().to_string();
    let config = format!(
        "[ledger]\nkey_files = [{key_file:?}]\n
         [cluster]\nreplica = {name:?}\nlease_ttl = \"{}ms\"\nadvertise = \"http://127.0.0.1:7700\"\n",
        TTL.as_millis()
    );
    Home::new().with_store(store).with_config(&config)
}

impl Replicas {
    /// As many as there are names, started together.
    async fn start(server: &Server, names: &[&str]) -> Self {
        let (shared, store) = (tempfile::tempdir().unwrap(), server.url());
        let homes: Vec<_> = names.iter().map(|name| home(name, &store, shared.path())).collect();
        let services = join_all(homes.iter().map(Home::serve)).await.into_iter().map(Some).collect();
        let replicas = Self { homes, services, fleet: Fleet::start().await, _shared: shared };
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
                if reason(&refused).why != "NO_LEADER" {
                    return refused;
                }
            }
        };
        let refused = patiently("the follower to know its leader", refused).await;
        let of_leader = [("leader", names[leader]), ("leader_address", "http://127.0.0.1:7700")];
        assert_eq!(reason(&refused), because(Code::Unavailable, "NOT_LEADER", of_leader));
        assert_eq!(http::get(replicas.service(i).admin(), "/leader").await.status, 503);
        assert_eq!(http::get(replicas.service(i).admin(), "/readyz").await.status, 200);
        let metrics = http::get(replicas.service(i).admin(), "/metrics").await.text().await;
        assert!(metrics.contains("orchestrator_is_leader 0"), "{metrics}");
    }
    let metrics = http::get(replicas.service(leader).admin(), "/metrics").await.text().await;
    assert!(metrics.contains("orchestrator_is_leader 1"), "{metrics}");
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
    let mut replicas = Replicas::start(server, &["a", "b", "c"]).await;
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
    assert!(took < TTL, "it took {took:?}: {}", replicas.logs());
    let stopped = replicas.services[leader].take().unwrap();
    assert!({ stopped }.ended().await.success());
    let mut client = replicas.client(next).await;
    assert_eq!(client.run().await.unwrap().cycle_id, running + 1);
    assert!(history(&mut client).await.iter().all(|cycle| cycle.state() == CycleState::Succeeded));
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
    let after = orchestrator_core::proto::orchestrator::v1::Registration {
        after: vec!["s".into()],
        ..registration("t", replicas.fleet.endpoint())
    };
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
            if reason(&refused).why == "NOT_LEADER" {
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
