//! Several replicas over one store in PostgreSQL, with a real server: where it is installed. One leads, and another one
//! takes over whatever happens to it.

use std::{
    collections::BTreeSet,
    env,
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::future::join_all;

use crate::common::{
    command::orchestrator,
    door::Door,
    fleet::Run,
    http,
    network::Network,
    patiently,
    postgres::{Pooler, Server, pair, shared, shared_pooler},
    replicas::Replicas,
    service::{Client, Service, decode, invalid, next_event, reason, registration},
};
use orchestrator_core::proto::orchestrator::v1::{
    CycleState, CycleTelemetry, IntervalLoop, RegisterSubsystemsRequest, Registration, ReplicaRole, RunCycleRequest,
    StartIntervalLoopRequest, UnregisterSubsystemRequest, WatchCyclesResponse, cycle_event::Event,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::{Status, Streaming, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// The TTL of leases.
const TTL: Duration = Duration::from_secs(1);
/// Another one: nothing takes as long but the end of a lease.
const LONG: Duration = Duration::from_secs(30);

/// The names of replicas.
const NAMES: [&str; 3] = ["a", "b", "c"];

/// Three replicas over the store at this URL, started together.
async fn three(url: &str, ttl: Duration) -> Replicas {
    Replicas::together(NAMES.map(|name| (name, url.to_owned())), &format!("{ttl:?}")).await
}

/// One replica, `a`, over the store at this URL.
async fn one(url: &str) -> Replicas {
    Replicas::together([("a", url.to_owned())], &format!("{TTL:?}")).await
}

/// The name under which the health service says whether a replica leads.
const LEADER: &str = "dreamnet.orchestrator.v1.Orchestrator/leader";

/// What the health service of a replica says of the service with this name.
async fn is_serving(replica: &Service, service: &str) -> bool {
    let endpoint = Endpoint::from_shared(format!("http://{}", replica.address())).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let answer = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
    answer.status() == ServingStatus::Serving
}

async fn history(client: &mut Client) -> Vec<CycleTelemetry> {
    client.history().await.unwrap().into_iter().map(decode).collect()
}

// ---------------------------------------------------------------------------------------------------------------
// One server

#[tokio::test]
async fn of_replicas_that_start_together_on_an_empty_database_one_leads_and_the_others_name_it() {
    let Some(server) = shared() else { return };
    one_leads_and_the_others_name_it(&server.url()).await;
}

#[tokio::test]
async fn of_replicas_that_start_together_behind_a_pooler_one_leads_as_well() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    one_leads_and_the_others_name_it(&pooler.url(&server.url())).await;
}

async fn one_leads_and_the_others_name_it(url: &str) {
    let replicas = three(url, TTL).await;
    let leader = replicas.leader().await;
    assert_eq!(replicas.client(leader).await.run().await.unwrap().cycle_id, 1);
    for name in NAMES.into_iter().filter(|name| *name != leader) {
        assert_eq!(replicas.follows(name).await, leader);
        let admin = replicas.service(name).admin();
        assert_eq!(http::get(admin, "/leader").await.status, 503);
        replicas.ready(name).await;
        assert_eq!(replicas.metric(name, "orchestrator_is_leader").await, Some(0));
        let metrics = http::get(admin, "/metrics").await.text().await;
        for of_leaders in ["orchestrator_lease_ttl_seconds", "orchestrator_term_start_time_seconds"] {
            assert!(!metrics.contains(of_leaders), "{metrics}");
        }
        assert!(metrics.contains("\norchestrator_start_time_seconds "), "{metrics}");
    }
    let metrics = http::get(replicas.service(leader).admin(), "/metrics").await.text().await;
    for shown in [
        "orchestrator_is_leader 1",
        "orchestrator_lease_remaining_seconds 0.",
        "orchestrator_lease_ttl_seconds 1\n",
        "orchestrator_can_lead 1",
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
    another_replica_goes_on_after_a_kill(&server.url()).await;
}

#[tokio::test]
async fn after_a_kill_of_the_leader_another_replica_goes_on_behind_a_pooler_as_well() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    another_replica_goes_on_after_a_kill(&pooler.url(&server.url())).await;
}

async fn another_replica_goes_on_after_a_kill(url: &str) {
    let mut replicas = three(url, TTL).await;
    let leader = replicas.leader().await;
    replicas.register(&["s"]).await;
    let mut client = replicas.client(leader).await;
    for _ in 0..3 {
        client.run().await.unwrap();
    }
    let before = client.status().await.unwrap();
    replicas.fleet.run("s", Run::Hang);
    let interrupted = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").any(|call| call.cycle_id == interrupted)).await;
    replicas.kill(leader).await;
    let (killed, killed_at) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).unwrap());
    replicas.fleet.run("s", Run::Echo);
    let next = replicas.leader().await;
    // The counters of a term begin with what the kill has interrupted, so monitoring needs to know when it began.
    let metrics = http::get(replicas.service(next).admin(), "/metrics").await.text().await;
    assert!(metrics.contains("orchestrator_cycles_total{state=\"interrupted\",trigger=\"manual\"} 1\n"), "{metrics}");
    let began = metrics.lines().find_map(|line| line.strip_prefix("orchestrator_term_start_time_seconds "));
    assert!(began.unwrap().parse::<f64>().unwrap() > killed_at.as_secs_f64(), "{metrics}");
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
async fn a_leader_that_was_killed_and_started_again_does_not_send_callers_to_itself() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::together([("a", server.url())], &format!("{LONG:?}")).await;
    replicas.kill("a").await;
    replicas.serve("a").await;
    let refused = replicas.client("a").await.status().await.unwrap_err();
    assert_eq!(reason(&refused).why, "NO_LEADER", "{refused:?}");
    assert!(!refused.message().contains("ask a"), "{refused:?}");
}

#[tokio::test]
async fn after_a_graceful_stop_another_replica_goes_on_at_once_and_nothing_is_interrupted() {
    let Some(server) = shared() else { return };
    another_replica_goes_on_after_a_stop(&server.url()).await;
}

#[tokio::test]
async fn after_a_graceful_stop_another_replica_goes_on_behind_a_pooler_as_well() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    another_replica_goes_on_after_a_stop(&pooler.url(&server.url())).await;
}

async fn another_replica_goes_on_after_a_stop(url: &str) {
    let mut replicas = three(url, LONG).await;
    let leader = replicas.leader().await;
    replicas.register(&["s"]).await;
    let mut client = replicas.client(leader).await;
    replicas.fleet.run("s", Run::Hold);
    let running = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    replicas.service(leader).signal(Signal::TERM);
    replicas.home(leader).logged("shutting down", 1).await;
    replicas.fleet.run("s", Run::Echo);
    let last = Instant::now();
    let next = replicas.leader_but(leader).await;
    let took = last.elapsed();
    assert!(took < LONG / 2, "it took {took:?}: {}", replicas.logs());
    assert!(replicas.take(leader).ended().await.success());
    let mut client = replicas.client(next).await;
    assert_eq!(client.run().await.unwrap().cycle_id, running + 1);
    assert!(history(&mut client).await.iter().all(|cycle| cycle.state() == CycleState::Succeeded));
}

#[tokio::test]
async fn a_replica_without_the_key_of_the_others_is_not_ready_and_does_not_lead() {
    let Some(server) = shared() else { return };
    let store = server.url();
    let mut replicas = one(&store).await;
    replicas.client("a").await.run().await.unwrap();
    // It has a directory, and so a key, of its own.
    let mut others = Replicas::none("1s").await;
    others.add("b", &store).await;
    others.serve("b").await;
    let log = others.home("b").logged("this replica can't lead", 1).await;
    assert!(log.contains("the key that sealed it is missing"), "{log}");
    let probed = http::get(others.service("b").admin(), "/readyz").await;
    assert_eq!(probed.status, 503);
    let why = probed.text().await;
    assert!(why.contains("this replica can't lead"), "{why}");
    assert!(!is_serving(others.service("b"), "").await);
    replicas.ready("a").await;
    assert!(replicas.take("a").stop().await.success());
    let mut of_b = others.client("b").await;
    let refused = async {
        loop {
            let refused = of_b.run().await.unwrap_err();
            if refused.message().contains("b can't: ") {
                return refused;
            }
        }
    };
    let refused = patiently("the follower to know that no replica leads", refused).await;
    assert_eq!(reason(&refused).why, "NO_LEADER");
    assert!(refused.message().contains("copy their key"), "{refused:?}");
    assert_eq!(http::get(others.service("b").admin(), "/leader").await.status, 503);
    assert!(!others.shared.path().join("log.key").exists(), "it has no use for a key of its own");
    // The log goes on where the key is.
    replicas.serve("a").await;
    replicas.leader().await;
    assert_eq!(replicas.client("a").await.run().await.unwrap().cycle_id, 2);
    assert!(!replicas.logs().contains("a new log begins"), "{}", replicas.logs());
}

#[tokio::test]
async fn a_leader_that_was_stopped_makes_no_calls_when_it_goes_on_and_follows() {
    let Some(server) = shared() else { return };
    a_stopped_leader_follows(&server.url()).await;
}

#[tokio::test]
async fn a_leader_that_was_stopped_behind_a_pooler_follows_as_well() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    a_stopped_leader_follows(&pooler.url(&server.url())).await;
}

async fn a_stopped_leader_follows(url: &str) {
    let replicas = three(url, TTL).await;
    let leader = replicas.leader().await;
    replicas.register(&["s", "t"]).await;
    let mut client = replicas.client(leader).await;
    let epoch = client.status().await.unwrap().epoch;
    // `t` would be called next.
    let after = Registration { after: vec!["s".into()], ..registration("t", replicas.fleet.endpoint()) };
    client.register(after).await.unwrap();
    replicas.fleet.run("s", Run::Hold);
    let cut = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    replicas.service(leader).signal(Signal::STOP);
    let next = replicas.leader_but(leader).await;
    // The answer arrives while the process is stopped.
    replicas.fleet.run("s", Run::Echo);
    sleep(TTL * 2).await;
    let mut other = replicas.client(next).await;
    let first = other.run().await.unwrap();
    assert!(first.epoch > epoch && first.cycle_id == cut + 1, "{first:?}");
    replicas.service(leader).signal(Signal::CONT);
    replicas.home(leader).logged("this replica follows from now on", 1).await;
    assert_eq!(replicas.follows(leader).await, next);
    assert!(replicas.fleet.now(|state| state.runs("t").all(|call| call.epoch > epoch)), "{}", replicas.logs());
    assert_eq!(other.run().await.unwrap().cycle_id, cut + 2);
    let interrupted: Vec<_> = history(&mut other).await.into_iter().filter(|cycle| cycle.cycle_id == cut).collect();
    assert!(matches!(&interrupted[..], [cycle] if cycle.state() == CycleState::Interrupted), "{interrupted:?}");
    // And it leads again when its turn comes.
    replicas.service(next).signal(Signal::KILL);
    let third = replicas.leader_but(next).await;
    assert_eq!(replicas.client(third).await.run().await.unwrap().cycle_id, cut + 3);
}

#[tokio::test]
async fn a_leader_that_is_cut_from_the_database_ends_its_calls_before_another_one_makes_any() {
    let Some(server) = shared() else { return };
    let (url, network) = (server.url(), Network::before(server.directory()));
    let mut replicas = one(&network.url(&url)).await;
    replicas.add("b", &url).await;
    replicas.serve("b").await;
    replicas.register(&["s"]).await;
    let mut client = replicas.client("a").await;
    replicas.fleet.run("s", Run::Hang);
    let cut = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    network.fall_silent();
    replicas.service("b").leads().await;
    replicas.fleet.run("s", Run::Echo);
    let mut other = replicas.client("b").await;
    assert_eq!(other.run().await.unwrap().cycle_id, cut + 1);
    let [first, second] = two_runs(&replicas).await;
    assert!(first.ended.unwrap().0 < second.began, "{first:?}, {second:?}: {}", replicas.logs());
    // Meanwhile it can't note further cycles, and calls nothing.
    assert!(timeout(TTL / 2, client.run()).await.map_or(true, |ran| ran.is_err()));
    network.mend();
    replicas.home("a").logged("this replica follows from now on", 1).await;
    let interrupted: Vec<_> = history(&mut other).await.iter().map(|cycle| (cycle.cycle_id, cycle.state())).collect();
    assert_eq!(interrupted, [(cut, CycleState::Interrupted), (cut + 1, CycleState::Succeeded)]);
}

/// The two calls of `s`, once they have ended.
async fn two_runs(replicas: &Replicas) -> [crate::common::fleet::Call; 2] {
    replicas.fleet.until("the calls to end", |state| state.runs("s").all(|call| call.ended.is_some())).await;
    replicas.fleet.runs("s").try_into().unwrap()
}

#[tokio::test]
async fn a_leader_that_is_cut_from_its_fleet_only_leads_on() {
    let Some(server) = shared() else { return };
    let replicas = three(&server.url(), TTL).await;
    let leader = replicas.leader().await;
    let door = Door::open().await;
    let of_fleet = replicas.fleet.endpoint().strip_prefix("http://").unwrap().parse().unwrap();
    door.lead_to_address(Some(of_fleet));
    let mut client = replicas.client(leader).await;
    client.register(registration("s", &format!("http://{}", door.address()))).await.unwrap();
    let first = client.run().await.unwrap();
    assert_eq!(first.state(), CycleState::Succeeded);
    door.shut();
    let cut = Instant::now();
    while cut.elapsed() < TTL * 3 {
        let cycle = client.run().await.unwrap();
        assert_eq!((cycle.state(), cycle.epoch), (CycleState::Failed, first.epoch), "{}", replicas.logs());
    }
    door.lead_to_address(Some(of_fleet));
    // The circuit breaker may keep a few further calls back.
    let reached = async { while client.run().await.unwrap().state() != CycleState::Succeeded {} };
    patiently("the fleet to be reached", reached).await;
    assert_eq!(client.status().await.unwrap().epoch, first.epoch);
    assert_eq!(replicas.metric(leader, "orchestrator_leader_changes_total").await, Some(1));
}

#[tokio::test]
async fn a_leader_whose_lease_has_ended_goes_on_if_it_is_renewed_before_another_one_claims_to_lead() {
    let Some(server) = shared() else { return };
    let (url, network) = (server.url(), Network::before(server.directory()));
    let replicas = one(&network.url(&url)).await;
    replicas.register(&["s"]).await;
    let mut client = replicas.client("a").await;
    let epoch = client.status().await.unwrap().epoch;
    replicas.fleet.run("s", Run::Hang);
    let cut = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    network.fall_silent();
    replicas.home("a").logged("could not confirm in time that it leads", 1).await;
    replicas.fleet.until("the call to end", |state| state.runs("s").all(|call| call.ended.is_some())).await;
    network.mend();
    replicas.home("a").logged("this replica leads on", 1).await;
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
    let mut replicas = one(&store).await;
    let mut client = replicas.client("a").await;
    let after_b = Registration { after: vec!["b".into()], ..registration("a", replicas.fleet.endpoint()) };
    client.register(after_b).await.unwrap();
    // Together with what is registered, this is a circular dependency.
    replicas.add("b", &store).await;
    let config = replicas.home("b").path("orchestrator.toml");
    let valid = std::fs::read_to_string(&config).unwrap();
    let endpoint = replicas.fleet.endpoint();
    let valid = format!("{valid}[[subsystems]]\nname = \"b\"\nendpoint = {endpoint:?}\n");
    std::fs::write(&config, format!("{valid}after = [\"a\"]\n")).unwrap();
    replicas.serve("b").await;
    replicas.home("b").logged("this replica can't lead", 1).await;
    assert_eq!(replicas.follows("b").await, "a");
    let status = replicas.client("b").await.status().await.unwrap();
    assert!(status.unable_to_lead.contains("circular dependency"), "{status:?}");
    let server_of_b = format!("http://{}", replicas.service("b").address());
    let (code, said) = orchestrator(None, &["status", "--address", &server_of_b]).await;
    assert!(code == 0 && said.contains("CAN'T LEAD"), "{said}");
    let status = client.status().await.unwrap();
    assert_eq!(status.unable_to_lead, "");
    let epoch = status.epoch;
    assert!(replicas.take("a").stop().await.success());
    // No other replica can lead, and it has not claimed to.
    sleep(TTL * 2).await;
    let follower = replicas.service("b");
    assert_eq!(http::get(follower.admin(), "/leader").await.status, 503);
    let log = replicas.home("b").log();
    assert!(!log.contains("has claimed to lead"), "{log}");
    let refused = follower.client().await.run().await.unwrap_err();
    assert_eq!(reason(&refused).why, "NO_LEADER");
    assert!(refused.message().contains("no replica leads now, and b can't: "), "{refused:?}");
    let invalid = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, &valid).unwrap();
    follower.signal(Signal::HUP);
    follower.leads().await;
    let status = follower.client().await.status().await.unwrap();
    assert!(status.epoch > epoch && status.unable_to_lead.is_empty(), "{status:?}");
    // Without another replica that leads, it does not start, and claims nothing.
    assert!(replicas.take("b").stop().await.success());
    std::fs::write(&config, invalid).unwrap();
    let ended = replicas.home("b").try_serve().await.map(drop).unwrap_err();
    let log = replicas.home("b").logged("has claimed to lead", 1).await;
    assert_eq!((ended.code(), log.matches("has claimed to lead").count()), (Some(1), 1), "{log}");
}

#[tokio::test]
async fn a_replica_of_another_orchestrator_does_not_start_until_that_of_the_store_is_renamed() {
    let Some(server) = shared() else { return };
    let store = server.url();
    let mut replicas = one(&store).await;
    replicas.add("b", &store).await;
    let home = replicas.homes.remove(1).with_args(["--set", "orchestrator_id=eu"]);
    replicas.homes.push(home);
    for stops in [false, true] {
        if stops {
            assert!(replicas.take("a").stop().await.success());
        }
        let ended = replicas.home("b").try_serve().await.map(drop).unwrap_err();
        assert_eq!(ended.code(), Some(2), "{}", replicas.logs());
    }
    let log = replicas.home("b").logged("orchestrator_id is \"eu\"", 2).await;
    assert!(log.contains("that of the orchestrator \"orchestrator\"") && !log.contains("claimed to lead"), "{log}");
    replicas.serve("a").await;
    replicas.service("a").leads().await;
    let (code, said) = orchestrator(None, &["store", "rename", &store, "eu"]).await;
    assert_eq!((code, said), (0, format!("{store} is the store of the orchestrator eu now; it was orchestrator\n")));
    // The leader goes on, and is replaced.
    assert_eq!(replicas.client("a").await.run().await.unwrap().cycle_id, 1);
    replicas.serve("b").await;
    assert_eq!(replicas.follows("b").await, "a");
    assert!(replicas.take("a").stop().await.success());
    replicas.service("b").leads().await;
    assert_eq!(replicas.client("b").await.run().await.unwrap().cycle_id, 2);
    let ended = replicas.home("a").try_serve().await.map(drop).unwrap_err();
    assert_eq!(ended.code(), Some(2), "{}", replicas.logs());
}

#[tokio::test]
async fn while_another_program_has_set_the_epoch_of_the_leader_replicas_name_it_and_read_on_until_the_store_is_accepted()
 {
    let Some(server) = shared() else { return };
    let url = server.url();
    let replicas = three(&url, TTL).await;
    let first = replicas.client(replicas.leader().await).await.run().await.unwrap();
    server.change(&url, "UPDATE leader SET epoch = 9223372036854775806").await;
    for name in NAMES {
        let named = "the epoch in its table leader is 9223372036854775806, which no clock gives";
        let log = replicas.home(name).logged(named, 1).await;
        assert!(log.contains(&format!("`orchestrator store accept {url}`")), "{log}");
    }
    // For longer than the lease of the leader that they know.
    sleep(TTL * 2).await;
    for name in NAMES {
        assert_eq!(history(&mut replicas.client(name).await).await, std::slice::from_ref(&first), "{name}");
        assert_eq!(http::get(replicas.service(name).admin(), "/leader").await.status, 503);
    }
    let key = replicas.shared.path().join("log.key").display().to_string();
    let (code, said) = orchestrator(None, &["store", "accept", &url, "--key-file", &key]).await;
    assert_eq!(code, 0, "{said}");
    // Also of those that have seen later epochs than an empty row has.
    let (mut client, last) = last_cycle(&replicas).await;
    check_history(&client.history().await.unwrap(), &last, [&first], &replicas);
}

#[tokio::test]
async fn a_follower_says_within_a_second_that_no_replica_leads() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b"], &format!("{TTL:?}")).await;
    // Before it has waited for the end of the lease, nothing says that the leader is gone.
    replicas.kill("a").await;
    let mut client = replicas.client("b").await;
    let answered = timeout(Duration::from_secs(1), client.run()).await.unwrap();
    if let Err(refused) = answered {
        assert!(["NOT_LEADER", "NO_LEADER"].contains(&&*reason(&refused).why), "{refused:?}");
    }
}

/// Loads the library that gives a process another clock. The loader knows its directory.
const FAKETIME: &str = "LD_PRELOAD=/usr/$LIB/faketime/libfaketime.so.1";

/// Kills a replica, and starts it again once the other one has run a cycle, within the TTL.
async fn take_over(replicas: &mut Replicas, earlier: &str, later: &str) {
    replicas.take(earlier).kill().await;
    let killed = Instant::now();
    replicas.service(later).leads().await;
    replicas.client(later).await.run().await.unwrap();
    let took = killed.elapsed();
    assert!(took < TTL + Duration::from_secs(2), "it took {took:?}: {}", replicas.logs());
    replicas.serve(earlier).await;
}

#[tokio::test]
#[ignore = "needs libfaketime; .ci/run runs it"]
async fn no_tick_comes_twice_when_the_clocks_of_leaders_are_almost_a_minute_apart() {
    let Some(server) = shared() else { return };
    let (store, mut replicas) = (server.url(), Replicas::none(&format!("{TTL:?}")).await);
    for (name, offset) in [("a", "+29s"), ("b", "-29s")] {
        replicas.add(name, &store).await;
        let home = replicas.homes.pop().unwrap();
        let clock = ["env", FAKETIME, "DONT_FAKE_MONOTONIC=1", &format!("FAKETIME={offset}")];
        replicas.homes.push(home.with_wrapper(clock));
        replicas.serve(name).await;
    }
    replicas.register(&["s"]).await;
    let mut client = replicas.client("a").await;
    let interval = prost_types::Duration { seconds: 0, nanos: 200_000_000 };
    let every = IntervalLoop { name: "l".into(), interval: Some(interval), ..IntervalLoop::default() };
    client.start_interval_loop(StartIntervalLoopRequest { r#loop: Some(every) }).await.unwrap();
    replicas.fleet.until_run("s", 5).await;
    let metrics = http::get(replicas.service("b").admin(), "/metrics").await.text().await;
    let is_behind = ["28.9", "29"].iter().any(|offset| metrics.contains(&format!("clock_offset_seconds {offset}")));
    assert!(is_behind, "{metrics}");
    take_over(&mut replicas, "a", "b").await;
    // It is behind, so it waits for the time of the last tick.
    let runs = replicas.fleet.runs("s").len();
    sleep(TTL * 2).await;
    assert_eq!(replicas.fleet.runs("s").len(), runs, "{}", replicas.logs());
    take_over(&mut replicas, "b", "a").await;
    let runs = replicas.fleet.runs("s").len();
    replicas.fleet.until_run("s", runs + 5).await;
    let cycles = history(&mut replicas.client("a").await).await;
    let of_loop = cycles.iter().filter(|cycle| cycle.r#loop == "l").filter_map(|cycle| cycle.scheduled_at);
    let ticks: Vec<_> = of_loop.map(|due| (due.seconds, due.nanos)).collect();
    assert!(ticks.is_sorted_by(|one, other| one < other), "{ticks:?}");
    assert!(cycles.is_sorted_by_key(|cycle| (cycle.epoch, cycle.revision)));
    assert_eq!(cycles.iter().map(|cycle| cycle.epoch).collect::<BTreeSet<_>>().len(), 3, "{}", replicas.logs());
}

// ---------------------------------------------------------------------------------------------------------------
// A server and a standby that commits wait for

/// Three replicas over both, a subsystem `s`, and a watcher at a replica that follows.
struct Paired {
    primary: Server,
    standby: Server,
    replicas: Replicas,
    leader: &'static str,
    watcher: Watcher,
}

/// The records of one stream, from the first one on.
struct Watcher {
    seen: watch::Receiver<Vec<Bytes>>,
    task: JoinHandle<()>,
}

impl Watcher {
    async fn of(mut client: Client) -> Self {
        let (sender, seen) = watch::channel(Vec::new());
        let mut opened = Ok(client.watch_after(0).await.unwrap());
        let task = tokio::spawn(async move {
            loop {
                let ended = match opened {
                    Ok(events) => Self::reads(events, &sender).await,
                    Err(refused) => refused,
                };
                // Its replica may have to read the store for it, which can't be read while a standby is promoted.
                assert_eq!(reason(&ended).why, "STORE_UNAVAILABLE", "{ended:?}");
                let seen = sender.borrow().len() as u64;
                opened = client.watch_after(seen).await;
            }
        });
        Self { seen, task }
    }

    /// Reads a stream until it ends.
    async fn reads(mut events: Streaming<WatchCyclesResponse>, seen: &watch::Sender<Vec<Bytes>>) -> Status {
        loop {
            match next_event(&mut events).await {
                Ok(event) => {
                    if let Some(Event::Recorded(record)) = event.event {
                        seen.send_modify(|seen| seen.push(record));
                    }
                }
                Err(ended) => return ended,
            }
        }
    }

    /// What it has seen, once that has as many records as the history.
    async fn saw(mut self, history: &[Bytes]) {
        let seen = patiently("all records", self.seen.wait_for(|seen| seen.len() >= history.len())).await;
        assert_eq!(*seen.unwrap(), history, "the watcher has seen other records");
        self.task.abort();
    }
}

impl Paired {
    /// With leases of this TTL. `None` as in [`pair`].
    async fn start(ttl: Duration) -> Option<Self> {
        let (primary, standby, url) = pair()?;
        primary.wait_for_standby().await;
        let replicas = three(&url, ttl).await;
        replicas.register(&["s"]).await;
        let leader = replicas.leader().await;
        let follower = NAMES.into_iter().find(|name| *name != leader).unwrap();
        let watcher = Watcher::of(replicas.client(follower).await).await;
        Some(Self { primary, standby, replicas, leader, watcher })
    }

    /// Runs a cycle whose record waits for the standby, which is away.
    async fn record_that_waits(&self) -> JoinHandle<Result<CycleTelemetry, Status>> {
        let fleet = &self.replicas.fleet;
        fleet.run("s", Run::Hold);
        let mut caller = self.replicas.client(self.leader).await;
        let running = tokio::spawn(async move { caller.run().await });
        fleet.until("the call", |state| state.runs("s").any(|call| call.ended.is_none())).await;
        self.standby.crash().await;
        fleet.run("s", Run::Echo);
        running
    }

    /// Ends this number of waits of the writer for the standby, one after another, by this function of the server.
    async fn end_waits(&self, number: usize, by: &str) {
        let mut last = String::new();
        for _ in 0..number {
            // One that was ended is seen for a moment longer.
            let end = format!(
                "SELECT query_start, {by}(pid) FROM pg_stat_activity
                 WHERE wait_event = 'SyncRep' AND application_name LIKE 'orchestrator/%'
                     AND (query LIKE '%fence AS%' OR query LIKE '%RETURNING found%')
                     AND query_start::text <> '{last}'"
            );
            let ended = async {
                loop {
                    if let Some((started, _)) = self.primary.execute(&end).await.split_once('|') {
                        return started.to_owned();
                    }
                }
            };
            last = patiently("a wait for the standby", ended).await;
        }
    }

    /// The standby goes on in place of the primary, which has ended.
    async fn fail_over(&self) {
        self.primary.crash().await;
        self.standby.promote().await;
    }

    /// Runs a last cycle, and checks that the history has each id once, what was acknowledged, and what was watched.
    async fn check(self, acknowledged: &[CycleTelemetry]) {
        let (mut client, last) = last_cycle(&self.replicas).await;
        let history = client.history().await.unwrap();
        check_history(&history, &last, acknowledged, &self.replicas);
        self.watcher.saw(&history).await;
    }
}

/// Runs cycles until one is acknowledged, wherever the leader is.
async fn last_cycle(replicas: &Replicas) -> (Client, CycleTelemetry) {
    let acknowledged = async {
        loop {
            let mut client = replicas.client(replicas.leader().await).await;
            if let Ok(last) = client.run().await {
                return (client, last);
            }
        }
    };
    patiently("a last cycle", acknowledged).await
}

/// Checks that a history up to this cycle has each id once, in the order of epochs, and what was acknowledged.
fn check_history<'a>(
    history: &[Bytes],
    last: &CycleTelemetry,
    acknowledged: impl IntoIterator<Item = &'a CycleTelemetry>,
    replicas: &Replicas,
) {
    let cycles: Vec<_> = history.iter().cloned().map(decode).collect();
    let mut ids: Vec<_> = cycles.iter().map(|cycle| cycle.cycle_id).collect();
    ids.sort_unstable();
    assert_eq!(ids, (1..=last.cycle_id).collect::<Vec<_>>(), "{}", replicas.logs());
    assert!(cycles.is_sorted_by_key(|cycle| (cycle.epoch, cycle.revision)), "{}", replicas.logs());
    for answer in acknowledged {
        let of_answer = cycles.iter().filter(|cycle| {
            cycle.cycle_id == answer.cycle_id || !answer.request_id.is_empty() && cycle.request_id == answer.request_id
        });
        assert_eq!(of_answer.collect::<Vec<_>>(), [answer], "{}", replicas.logs());
    }
}

#[tokio::test]
async fn while_the_standby_is_away_no_replica_acknowledges_anything_and_reads_go_on() {
    let Some(paired) = Paired::start(TTL).await else { return };
    let mut client = paired.replicas.client(paired.leader).await;
    let first = client.run().await.unwrap();
    paired.standby.crash().await;
    let is_synchronous = paired.replicas.metric(paired.leader, "orchestrator_store_synchronous").await;
    assert_eq!(is_synchronous, Some(1));
    // It can't renew its lease, so it does not lead. Nor does it know yet that it can't write.
    let service = paired.replicas.service(paired.leader);
    let lapsed = async { while http::get(service.admin(), "/leader").await.status == 200 {} };
    patiently("the end of the lease", lapsed).await;
    assert_eq!(http::get(service.admin(), "/readyz").await.status, 200);
    patiently("its health to say so", async { while is_serving(service, LEADER).await {} }).await;
    assert!(is_serving(service, "").await);
    let refused = client.run().await.unwrap_err();
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    assert!(refused.message().contains("waits for a standby that is away"), "{refused:?}");
    assert!(client.status().await.unwrap().store_error.contains("has not returned"));
    assert_eq!(history(&mut client).await, std::slice::from_ref(&first));
    paired.standby.start_again().await;
    let (mut client, _) = last_cycle(&paired.replicas).await;
    assert_eq!(client.status().await.unwrap().epoch, first.epoch, "{}", paired.replicas.logs());
    paired.check(&[first]).await;
}

#[tokio::test]
async fn a_record_whose_wait_for_the_standby_was_cancelled_is_acknowledged_only_once_it_is_replicated() {
    let Some(paired) = Paired::start(LONG).await else { return };
    let caller = paired.record_that_waits().await;
    // Its own, and those of its first two barriers.
    paired.end_waits(3, "pg_cancel_backend").await;
    assert_eq!(paired.primary.execute("SELECT count(*) FROM fleet.cycles").await.trim_end(), "1");
    assert!(!caller.is_finished() && paired.watcher.seen.borrow().is_empty(), "{}", paired.replicas.logs());
    paired.standby.start_again().await;
    let recorded = patiently("the answer", caller).await.unwrap().unwrap();
    assert_eq!(recorded.state(), CycleState::Succeeded);
    paired.check(&[recorded]).await;
}

#[tokio::test]
async fn a_record_that_only_the_lost_primary_had_is_written_again_and_nobody_has_seen_it_before() {
    let Some(paired) = Paired::start(LONG).await else { return };
    let caller = paired.record_that_waits().await;
    paired.end_waits(1, "pg_terminate_backend").await;
    let visible = "SELECT count(*) FROM fleet.cycles";
    paired.primary.shows(visible, "1").await;
    assert!(!caller.is_finished() && paired.watcher.seen.borrow().is_empty(), "{}", paired.replicas.logs());
    paired.primary.crash().await;
    paired.standby.start_again().await;
    assert_eq!(paired.standby.execute(visible).await.trim_end(), "0", "it is on the primary only");
    paired.standby.promote().await;
    // The caller is told that its record was not written, and then it is.
    let refused = patiently("the answer", caller).await.unwrap().unwrap_err();
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    let recorded = paired.replicas.client(paired.leader).await.recorded(1).await;
    assert_eq!(recorded.state(), CycleState::Succeeded);
    for (outcome, commits) in [("not_kept", 1), ("kept", 0)] {
        let metric = format!("orchestrator_store_commits_ambiguous_total{{outcome={outcome:?}}}");
        assert_eq!(paired.replicas.metric(paired.leader, &metric).await, Some(commits), "{outcome}");
    }
    paired.check(&[recorded]).await;
}

#[tokio::test]
async fn under_load_the_same_replica_leads_on_after_a_promotion_and_finishes_its_cycle() {
    let Some(paired) = Paired::start(LONG).await else { return };
    let replicas = &paired.replicas;
    replicas.register(&["t"]).await;
    let mut client = replicas.client(paired.leader).await;
    let epoch = client.status().await.unwrap().epoch;
    replicas.fleet.run("t", Run::Hold);
    let of = |name: &str| RunCycleRequest { subsystems: vec![name.into()], ..RunCycleRequest::default() };
    let running = client.admit_with(of("t")).await.unwrap();
    let (stop, stopped) = watch::channel(false);
    let mut loads = Vec::new();
    for name in NAMES {
        let (mut client, stopped) = (replicas.client(name).await, stopped.clone());
        loads.push(tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            while !*stopped.borrow() {
                acknowledged.extend(client.run_with(of("s")).await.ok());
            }
            acknowledged
        }));
    }
    replicas.fleet.until_run("s", 10).await;
    paired.fail_over().await;
    let runs = replicas.fleet.runs("s").len();
    replicas.fleet.until_run("s", runs + 10).await;
    stop.send_replace(true);
    let mut acknowledged = Vec::new();
    for load in loads {
        acknowledged.extend(patiently("the load to end", load).await.unwrap());
    }
    replicas.fleet.run("t", Run::Echo);
    let finished = client.recorded(running).await;
    assert_eq!((finished.state(), finished.epoch), (CycleState::Succeeded, epoch), "{}", replicas.logs());
    let status = client.status().await.unwrap();
    assert_eq!((status.epoch, status.role()), (epoch, ReplicaRole::Leader));
    acknowledged.push(finished);
    paired.check(&acknowledged).await;
}

#[tokio::test]
async fn a_leader_goes_on_within_its_lease_when_a_standby_is_promoted_in_place_of_a_primary_that_is_silent() {
    // It is renewed every 1.5 s, so that 3.9 s of it are left at least, and a promotion is looked for after 2 s.
    const TTL: Duration = Duration::from_secs(6);
    const OVERDUE: Duration = Duration::from_millis(3700);
    let Some(paired) = Paired::start(TTL).await else { return };
    let mut client = paired.replicas.client(paired.leader).await;
    let first = client.run().await.unwrap();
    let stopped = paired.primary.stop().await;
    let left = async || client.clone().status().await.unwrap().lease_remaining.unwrap();
    let overdue = async { while Duration::try_from(left().await).unwrap() > OVERDUE {} };
    patiently("a renewal to be overdue", overdue).await;
    paired.standby.promote().await;
    let (_, next) = last_cycle(&paired.replicas).await;
    assert_eq!(next.epoch, first.epoch, "{}", paired.replicas.logs());
    let beats: u64 = paired.standby.execute("SELECT beat FROM fleet.leader").await.trim_end().parse().unwrap();
    let renewed = format!("SELECT beat > {} FROM fleet.leader", beats + 4);
    patiently("a TTL of renewals", paired.standby.shows(&renewed, "t")).await;
    let log = paired.replicas.home(paired.leader).log();
    assert!(!log.contains("could not confirm in time that it leads"), "{log}");
    drop(stopped);
    paired.check(&[first, next]).await;
}

#[tokio::test]
async fn a_leader_that_is_alone_with_the_old_primary_makes_no_call_after_its_lease() {
    let Some((primary, standby, _)) = pair() else { return };
    primary.wait_for_standby().await;
    let networks = || [&primary, &standby].map(|server| Network::before(server.directory()));
    let url = |networks: &[Network; 2]| {
        let [primary, standby] = networks.each_ref().map(Network::host);
        format!("postgres://owner@{primary},{standby}/postgres?schema=fleet")
    };
    let (of_a, of_b) = (networks(), networks());
    let mut replicas = one(&url(&of_a)).await;
    replicas.add("b", &url(&of_b)).await;
    replicas.serve("b").await;
    replicas.register(&["s", "t"]).await;
    let mut client = replicas.client("a").await;
    let epoch = client.status().await.unwrap().epoch;
    // `t` would be called next.
    let after = Registration { after: vec!["s".into()], ..registration("t", replicas.fleet.endpoint()) };
    client.register(after).await.unwrap();
    replicas.fleet.run("s", Run::Hold);
    let cut = client.admit().await.unwrap();
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    // On one side `a` and the primary, on the other one `b` and the standby.
    of_b[0].shut();
    of_a[1].shut();
    replicas.doors[0].as_ref().unwrap().shut();
    standby.promote().await;
    replicas.service("b").leads().await;
    replicas.fleet.run("s", Run::Echo);
    let mut other = replicas.client("b").await;
    let next = other.run().await.unwrap();
    assert!(next.epoch > epoch && next.cycle_id == cut + 1, "{next:?}");
    let [first, second] = two_runs(&replicas).await;
    assert!(first.ended.unwrap().0 < second.began, "{first:?}, {second:?}: {}", replicas.logs());
    // The leader of the old primary acknowledges nothing any more.
    assert!(timeout(TTL * 2, client.run()).await.map_or(true, |ran| ran.is_err()));
    assert!(replicas.fleet.now(|state| state.runs("t").all(|call| call.epoch > epoch)), "{}", replicas.logs());
    primary.crash().await;
    of_a[1].mend();
    replicas.home("a").logged("this replica follows from now on", 1).await;
    let last = other.run().await.unwrap();
    assert_eq!((last.epoch, last.cycle_id), (next.epoch, cut + 2), "{}", replicas.logs());
    let states: Vec<_> = history(&mut other).await.iter().map(|cycle| (cycle.cycle_id, cycle.state())).collect();
    let succeeded = |id| (id, CycleState::Succeeded);
    assert_eq!(states, [(cut, CycleState::Interrupted), succeeded(cut + 1), succeeded(cut + 2)]);
}

#[tokio::test]
async fn an_old_primary_that_goes_on_beside_the_new_one_is_not_read_any_more() {
    let Some(mut paired) = Paired::start(LONG).await else { return };
    let leader = paired.leader;
    let request = |id: &str| RunCycleRequest { request_id: id.into(), ..RunCycleRequest::default() };
    let first = paired.replicas.client(leader).await.run_with(request("first")).await.unwrap();
    // Several reads at once, so that each replica has several connections for them.
    let all_read = async |replicas: &Replicas, expected: &[&CycleTelemetry]| {
        for name in NAMES.into_iter().filter(|name| replicas.services[replicas.index(name)].is_some()) {
            // From the answer on, a follower shows what the leader has acknowledged.
            let mut client = replicas.client(name).await;
            patiently("the leader to answer", async { while client.status().await.is_err() {} }).await;
            let reads = (0..8).map(|_| {
                let mut client = Client::clone(&client);
                async move { history(&mut client).await }
            });
            for read in join_all(reads).await {
                assert_eq!(read.iter().collect::<Vec<_>>(), expected, "{name}: {}", replicas.logs());
            }
        }
    };
    all_read(&paired.replicas, &[&first]).await;
    let stopped = paired.primary.stop().await;
    paired.standby.promote().await;
    let goes_on = async {
        let mut client = paired.replicas.client(leader).await;
        loop {
            if let Ok(second) = client.run_with(request("second")).await {
                return second;
            }
        }
    };
    let second = patiently("the leader to go on", goes_on).await;
    let candidates = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orchestrator/candidate'";
    patiently("the followers to go on", paired.standby.shows(candidates, "2")).await;
    drop(stopped);
    all_read(&paired.replicas, &[&first, &second]).await;
    let mut records = Vec::new();
    for name in NAMES {
        let mut client = paired.replicas.client(name).await;
        records = client.history().await.unwrap();
        Watcher::of(client).await.saw(&records).await;
    }
    assert_eq!(records.len(), 2);
    // The next leader reads the outcome of a request in the store.
    assert!(paired.replicas.take(leader).stop().await.success(), "{}", paired.replicas.logs());
    let mut client = paired.replicas.client(paired.replicas.leader().await).await;
    assert_eq!(client.run_with(request("second")).await.unwrap(), second, "{}", paired.replicas.logs());
    all_read(&paired.replicas, &[&first, &second]).await;
    paired.check(&[first, second]).await;
}

#[tokio::test]
async fn a_replica_that_reaches_only_an_earlier_primary_knows_that_it_cannot_lead() {
    let Some((primary, standby, url)) = pair() else { return };
    let mut replicas = Replicas::together([("a", url.clone())], &format!("{LONG:?}")).await;
    replicas.add("b", &url.replace(&format!(",{}", standby.host()), "")).await;
    replicas.serve("b").await;
    assert_eq!(replicas.follows("b").await, "a");
    let (mut client, mut of_b) = (replicas.client("a").await, replicas.client("b").await);
    replicas.home("b").logged("this replica can lead", 1).await;
    client.run().await.unwrap();
    primary.shows("SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()", "1").await;
    standby.promote().await;
    replicas.home("a").logged("an earlier primary takes writes", 1).await;
    client.run().await.unwrap();
    // It has the leader's stream.
    replicas.home("b").logged("this replica does not lead", 1).await;
    let status = of_b.status().await.unwrap();
    let lacks = format!("{} lacks records", primary.directory().display());
    assert!(status.unable_to_lead.contains(&lacks), "{status:?}");
}

#[tokio::test]
async fn after_a_failover_that_has_lost_acknowledged_cycles_no_replica_leads_until_the_store_is_accepted() {
    const LACKS: &str = "an older copy has replaced it";
    // Nothing waits for the standby.
    let Some((primary, standby, url)) = pair() else { return };
    let mut replicas = three(&url, TTL).await;
    let leader = replicas.leader().await;
    assert!(replicas.home(leader).log().contains("commits don't wait for them"), "{}", replicas.logs());
    assert_eq!(replicas.metric(leader, "orchestrator_store_synchronous").await, Some(0));
    assert!(replicas.metric(leader, "orchestrator_store_oldest_xmin_age").await.is_some());
    assert!(replicas.metric(leader, "orchestrator_store_round_trip_seconds_count").await > Some(0));
    let mut client = replicas.client(leader).await;
    client.run().await.unwrap();
    standby.crash().await;
    client.run().await.unwrap();
    primary.crash().await;
    standby.start_again().await;
    standby.promote().await;
    // Until it has found the other server.
    let refused = async {
        loop {
            let refused = client.run().await.unwrap_err();
            if refused.message().contains(LACKS) {
                return refused;
            }
        }
    };
    let refused = patiently("the leader to find out", refused).await;
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    let ended = replicas.take(leader).ended().await;
    assert!(ended.code() == Some(1) && replicas.home(leader).log().contains(LACKS), "{ended}: {}", replicas.logs());
    let accept = format!("run `orchestrator store accept {url}`");
    let last = replicas.home(leader).log();
    assert!(last.contains(&accept) && !last.contains("restore it from a backup"), "{last}");

    let others: Vec<_> = NAMES.into_iter().filter(|name| *name != leader).collect();
    for name in &others {
        replicas.home(name).logged("lacks records", 1).await;
        assert!(replicas.take(name).stop().await.success(), "{}", replicas.logs());
    }
    // Nor does one that is started again, which knows nothing of what is lost.
    let again = replicas.home(leader).try_serve().await;
    replicas.home(leader).logged(&accept, 1).await;
    match again {
        Ok(service) => {
            assert_eq!(http::get(service.admin(), "/leader").await.status, 503);
            assert!(service.stop().await.success());
        }
        // It could have led.
        Err(ended) => assert_eq!(ended.code(), Some(1)),
    }

    let key = replicas.shared.path().join("log.key").display().to_string();
    let (code, said) = orchestrator(None, &["store", "accept", &url, "--key-file", &key]).await;
    assert!(code == 0 && said.starts_with(&format!("{url} can be served now; its last cycle is 1\n")), "{said}");
    replicas.serve_together().await;
    assert_eq!(replicas.client(leader).await.run().await.unwrap().cycle_id, 2);
}

// ---------------------------------------------------------------------------------------------------------------
// Whatever happens

/// The addresses of the replicas.
type Addresses = watch::Receiver<Vec<SocketAddr>>;

/// A client of a replica; `None` if that does not answer in time.
async fn client_of(address: SocketAddr) -> Option<Client> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let connected = timeout(TTL, endpoint.connect()).await.ok()?;
    connected.ok().map(Client::new)
}

/// Runs cycles, one after another, each by one request that is repeated, at whichever replica, until it is answered.
async fn run_cycles(addresses: Addresses, acknowledged: Arc<Mutex<Vec<CycleTelemetry>>>) {
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
        acknowledged.lock().unwrap().push(answer);
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

#[tokio::test(flavor = "multi_thread")]
async fn promises_hold_whatever_happens_to_replicas_and_their_sessions() {
    // Of its own, since all sessions are ended.
    let Some(server) = Server::start("", None) else { return };
    let url = server.url();
    promises_hold(three(&url, TTL).await, (&server, None), Some(&url), 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promises_hold_behind_a_pooler_as_well() {
    let Some(server) = Server::start("", None) else { return };
    let Some(pooler) = Pooler::before(&server) else { return };
    let url = server.url();
    promises_hold(three(&pooler.url(&url), TTL).await, (&server, None), Some(&url), 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promises_hold_whatever_happens_to_a_standby_and_when_it_takes_over() {
    let Some((primary, standby, url)) = pair() else { return };
    primary.wait_for_standby().await;
    promises_hold(three(&url, TTL).await, (&primary, Some(&standby)), Some(&url), 6).await;
    // It was promoted.
    assert!(standby.execute("SELECT pg_is_in_recovery()").await.starts_with('f'));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes"]
async fn promises_hold_after_a_full_disk_and_after_cycles_with_ten_thousand_outputs() {
    const OUTPUTS: usize = 10_000;
    let disk = tempfile::tempdir().unwrap();
    let Some(server) = Server::with_small_disk(disk.path()).await else { return };
    let replicas = three(&format!("postgres://owner@{}/small", server.host()), TTL).await;
    let mut client = replicas.client(replicas.leader().await).await;
    let names: Vec<_> = (0..OUTPUTS).map(|number| format!("s{number}")).collect();
    for some in names.chunks(1000) {
        let registrations = some.iter().map(|name| registration(name, replicas.fleet.endpoint())).collect();
        client.register_subsystems(RegisterSubsystemsRequest { registrations, ..Default::default() }).await.unwrap();
    }
    let with_nul = RunCycleRequest { request_id: "a\0b".into(), ..RunCycleRequest::default() };
    assert_eq!(reason(&client.run_with(with_nul).await.unwrap_err()), invalid(["request_id"]));
    let large = client.run().await.unwrap();
    assert_eq!((large.state(), large.subsystems.len()), (CycleState::Succeeded, OUTPUTS));
    server.fill_disk(disk.path()).await;
    let refused = async { while client.run().await.is_ok() {} };
    patiently("the disk to be full", refused).await;
    server.empty_disk(disk.path()).await;
    last_cycle(&replicas).await;
    for name in names {
        client.unregister_subsystem(UnregisterSubsystemRequest { name }).await.unwrap();
    }
    promises_hold(replicas, (&server, None), None, 8).await;
}

/// Does harm to replicas in each round, and to their server and its standby, if commits wait for one, while cycles are
/// run and watched. In the middle, a later version of the software migrates the store at the URL `migrated`.
/// `ORCHESTRATOR_TEST_ROUNDS` sets the number of rounds, and `ORCHESTRATOR_TEST_SEED` what happens in
/// them.
async fn promises_hold(
    mut replicas: Replicas,
    (primary, standby): (&Server, Option<&Server>),
    migrated: Option<&str>,
    rounds: u64,
) {
    let number = |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let rounds = number("ORCHESTRATOR_TEST_ROUNDS").unwrap_or(rounds);
    let seed = number("ORCHESTRATOR_TEST_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("{rounds} rounds, ORCHESTRATOR_TEST_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    replicas.register(&["s", "t"]).await;
    replicas.fleet.run("t", Run::Late(Duration::from_millis(20), Box::new(Run::Echo)));

    let of = |replicas: &Replicas| replicas.services.iter().flatten().map(Service::address).collect::<Vec<_>>();
    let addresses = watch::Sender::new(of(&replicas));
    let (acknowledged, watched) = (Arc::default(), watch::Sender::new(Vec::new()));
    let runner = tokio::spawn(run_cycles(addresses.subscribe(), Arc::clone(&acknowledged)));
    let watcher = tokio::spawn(watch_records(addresses.subscribe(), watched.clone()));
    for round in 0..rounds {
        sleep(TTL.mul_f64(rng.f64())).await;
        if let Some(url) = migrated.filter(|_| round == rounds / 2) {
            primary.widen(url).await;
        }
        let leader = replicas.leader().await;
        let it = if rng.u8(..4) == 0 { NAMES[rng.usize(..NAMES.len())] } else { leader };
        let duration = TTL.mul_f64(rng.f64() * 3.0);
        match (rng.u8(..if standby.is_some() { 7 } else { 4 }), standby) {
            (0, _) => {
                replicas.take(it).kill().await;
                replicas.serve(it).await;
            }
            (1, _) => {
                assert!(replicas.take(it).stop().await.success(), "{}", replicas.logs());
                replicas.serve(it).await;
            }
            (2, _) => {
                replicas.service(it).signal(Signal::STOP);
                sleep(duration).await;
                replicas.service(it).signal(Signal::CONT);
            }
            (4, Some(standby)) => {
                standby.crash().await;
                sleep(duration).await;
                standby.start_again().await;
            }
            (by @ 5.., Some(standby)) => {
                standby.crash().await;
                let end = if by == 5 { "pg_cancel_backend" } else { "pg_terminate_backend" };
                let end = format!("SELECT {end}(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'");
                let until = Instant::now() + duration;
                while Instant::now() < until {
                    primary.execute(&end).await;
                }
                standby.start_again().await;
            }
            _ => primary.end_sessions().await,
        }
        addresses.send_replace(of(&replicas));
        assert!(!runner.is_finished() && !watcher.is_finished(), "round {round}: {}", replicas.logs());
    }
    if let Some(standby) = standby {
        // It is gone, or goes on beside the new one.
        let stopped = if rng.bool() {
            Some(primary.stop().await)
        } else {
            primary.crash().await;
            None
        };
        standby.promote().await;
        last_cycle(&replicas).await;
        drop(stopped);
        // One that starts now has not seen it.
        let it = NAMES[rng.usize(..NAMES.len())];
        replicas.take(it).kill().await;
        replicas.serve(it).await;
        addresses.send_replace(of(&replicas));
        last_cycle(&replicas).await;
    }
    runner.abort();
    let (mut client, last) = last_cycle(&replicas).await;
    let mut all = watched.subscribe();
    let is_last = |record: &Bytes| decode(record.clone()).revision >= last.revision;
    let all = patiently("all records", all.wait_for(|watched| watched.last().is_some_and(is_last))).await;
    let all = all.unwrap().clone();
    watcher.abort();
    let history = client.history().await.unwrap();
    assert_eq!(all, history, "the watcher has seen other records");
    let acknowledged: Vec<_> = acknowledged.lock().unwrap().clone();
    check_history(&history, &last, &acknowledged, &replicas);
    let terms = history.iter().map(|record| decode(record.clone()).epoch).collect::<BTreeSet<_>>().len();
    println!("{} cycles of {terms} terms, {} acknowledged", history.len(), acknowledged.len());
}

// ---------------------------------------------------------------------------------------------------------------
// The example

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
