//! Replicas that don't lead, over a store in PostgreSQL with a real server, where it is installed: they answer as the
//! leader does.

use std::{cell::RefCell, collections::BTreeMap, path::Path, time::Duration};

use crate::common::{
    door::Door,
    fleet::{Run, to_struct},
    http,
    network::Network,
    patiently,
    pki::{Authority, Issued},
    postgres::{Server, shared},
    replicas::Replicas,
    service::{Client, Home, Service, because, decode, next_event, next_recorded, reason, registration},
    tokens::write_tokens,
};
use bytes::Bytes;
use orchestrator_core::proto::orchestrator::v1::{
    self as pb, access_client::AccessClient, cycle_event::Event, ledger_client::LedgerClient,
};
use prost::Message;
use rcgen::SanType;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;
use tokio::{
    process::Command,
    time::{Instant, timeout},
};
use tonic::{
    Code, Request, Status,
    metadata::{BinaryMetadataValue, MetadataValue},
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// A connection to a replica.
async fn channel(service: &Service) -> Channel {
    Endpoint::from_shared(format!("http://{}", service.address())).unwrap().connect().await.unwrap()
}

// ---------------------------------------------------------------------------------------------------------------
// As the leader

#[tokio::test]
async fn every_kind_of_call_has_the_answer_of_the_leader() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b"], "10s").await;
    let (mut leader, mut follower) = (replicas.client("a").await, replicas.client("b").await);
    let watch = pb::WatchCyclesRequest { after_revision: Some(0), progress: true, ..Default::default() };
    let mut watch = follower.watch_cycles(watch).await.unwrap().into_inner();

    replicas.register(&["s"]).await;
    let cycle = follower.run().await.unwrap();
    assert_eq!((cycle.cycle_id, cycle.state()), (1, pb::CycleState::Succeeded));
    assert_eq!(decode(next_recorded(&mut watch).await), cycle);
    for asked in [&mut leader, &mut follower] {
        assert_eq!(asked.cycle(1).await.unwrap(), cycle);
        assert_eq!(asked.history().await.unwrap().len(), 1);
        assert_eq!(asked.status().await.unwrap().total_cycles, 1);
        // Errors have their details.
        let refused = asked.cycle(7).await.unwrap_err();
        assert_eq!(reason(&refused), because(Code::NotFound, "CYCLE_NOT_FOUND", [("cycle_id", "7")]));
    }

    // More than a megabyte in one request, and in its answer.
    let parameters = json!({ "text": "x".repeat(40 << 10) });
    let parameters = to_struct(&parameters);
    let many = (0..32).map(|i| pb::Registration {
        parameters: parameters.clone(),
        ..registration(&format!("many-{i}"), replicas.fleet.endpoint())
    });
    let many = pb::RegisterSubsystemsRequest { registrations: many.collect(), ..Default::default() };
    assert!(many.encoded_len() > 1 << 20);
    follower.register_subsystems(many).await.unwrap();
    let listed = follower.subsystems().await.unwrap();
    assert_eq!((listed.len(), &listed), (33, &leader.subsystems().await.unwrap()));
    assert!(listed.iter().map(Message::encoded_len).sum::<usize>() > 1 << 20);

    let service = replicas.service("b");
    let checkpoint = pb::GetCheckpointRequest::default();
    let mut ledger = LedgerClient::new(channel(service).await);
    assert!(!ledger.get_checkpoint(checkpoint).await.unwrap().into_inner().checkpoint.is_empty());
    let mut entries = ledger.read_entries(pb::ReadEntriesRequest::default()).await.unwrap().into_inner();
    assert!(entries.message().await.unwrap().is_some());
    let who = AccessClient::new(channel(service).await).who_am_i(pb::WhoAmIRequest {}).await.unwrap();
    assert_eq!(who.into_inner().identity, "nobody");
    assert!(replicas.metric("b", r#"orchestrator_forwarded_calls_total{code="OK"}"#).await.unwrap() >= 7);
    assert_eq!(replicas.metric("a", r#"orchestrator_forwarded_calls_total{code="OK"}"#).await, None);
}

#[tokio::test]
async fn a_follower_serves_json_and_events_and_its_own_probes() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b"], "10s").await;
    replicas.register(&["s"]).await;
    let admin = replicas.service("b").admin();
    let mut events = http::send(admin, "GET /api/events", &["Host: localhost", "Accept: application/x-ndjson"]).await;
    assert!(events.line().await.contains("bookmark"));
    let ran = http::send_json(admin, "POST /api/cycles", &[], "{}").await;
    assert_eq!(ran.status, 200);
    assert_eq!(ran.json().await["cycleId"], "1");
    assert!(events.line().await.contains(r#""recorded""#));
    let status = http::get(admin, "/api/status").await.json().await;
    assert_eq!(status["status"]["totalCycles"], "1");
    assert!(http::get(admin, "/api/log/entries").await.line().await.starts_with('{'));
    let missing = http::get(admin, "/api/cycles/7").await;
    assert_eq!((missing.status, missing.json().await["error"]["reason"].clone()), (404, json!("CYCLE_NOT_FOUND")));
    replicas.ready("b").await;
    for (path, leader, follower) in [("/leader", 200, 503), ("/readyz", 200, 200), ("/livez", 200, 200)] {
        for (name, expected) in [("a", leader), ("b", follower)] {
            assert_eq!(http::get(replicas.service(name).admin(), path).await.status, expected, "{name}{path}");
        }
    }
}

#[tokio::test]
async fn a_call_ends_at_the_leader_with_its_deadline_and_with_its_caller() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b"], "10s").await;
    replicas.register(&["s"]).await;
    replicas.fleet.run("s", Run::Hang);
    let mut client = replicas.client("b").await;
    let ended = async |code: &str, calls: u64| {
        let metric = format!(r#"orchestrator_calls_total{{server="grpc",rpc="RunCycle",code="{code}"}}"#);
        let counted = async { while replicas.metric("a", &metric).await != Some(calls) {} };
        patiently("the call to end at the leader", counted).await;
    };
    let mut late = Request::new(pb::RunCycleRequest::default());
    late.set_timeout(Duration::from_millis(300));
    // The library of the client may be the first to see it, and says it in its own way.
    let late = client.run_cycle(late).await.unwrap_err().code();
    assert!(matches!(late, Code::Cancelled | Code::DeadlineExceeded), "{late:?}");
    ended("CANCELLED", 1).await;
    let left = timeout(Duration::from_millis(300), client.run_cycle(pb::RunCycleRequest::default()));
    assert!(left.await.is_err());
    ended("CANCELLED", 2).await;
}

// ---------------------------------------------------------------------------------------------------------------
// Reads

/// How often this RPC was answered with OK at a replica.
fn answered(rpc: &str) -> String {
    format!(r#"orchestrator_calls_total{{server="grpc",rpc="{rpc}",code="OK"}}"#)
}

#[tokio::test]
async fn a_follower_reads_the_history_itself_and_goes_on_without_a_leader() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b"], "60s").await;
    replicas.register(&["s"]).await;
    let mut client = replicas.client("b").await;
    let mut cycles = Vec::new();
    for _ in 0..3 {
        // It is there as soon as the caller has its answer.
        let cycle = client.run().await.unwrap();
        assert_eq!(client.cycle(cycle.cycle_id).await.unwrap(), cycle);
        cycles.push(cycle);
    }
    // The leader has told these to this replica itself.
    let mut of_leader = replicas.client("a").await;
    let direct = of_leader.run().await.unwrap();
    let listed = async { while client.history().await.unwrap().len() < 4 {} };
    patiently("the stream of the leader", listed).await;
    assert_eq!(client.cycle(4).await.unwrap(), direct);
    assert_eq!(replicas.metric("a", &answered("GetCycle")).await, None, "the leader was not asked");
    // A page goes on from one of another replica, which may know more records.
    let before = |revision: &str| pb::ListCyclesRequest { page_token: revision.into(), ..Default::default() };
    for (revision, asked) in [("5", None), ("9", Some(1))] {
        let page = client.list_cycles(before(revision)).await.unwrap().into_inner();
        assert_eq!(page.cycles.len(), 4);
        assert_eq!(replicas.metric("a", &answered("ListCycles")).await, asked, "before {revision}");
    }
    // A cycle that is not there may be at the leader.
    let refused = client.cycle(7).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::NotFound, "CYCLE_NOT_FOUND", [("cycle_id", "7")]));

    replicas.kill("a").await;
    assert_eq!(client.cycle(1).await.unwrap(), cycles[0]);
    let listed = client.history().await.unwrap();
    assert_eq!(listed.into_iter().map(|bytes| decode(bytes).cycle_id).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(client.list_cycles(before("5")).await.unwrap().into_inner().cycles.len(), 4);
    assert_eq!(reason(&client.list_cycles(before("9")).await.unwrap_err()).why, "NO_LEADER");
    let admin = replicas.service("b").admin();
    assert_eq!(http::get(admin, "/api/cycles/1").await.status, 200);
    assert_eq!(reason(&client.cycle(7).await.unwrap_err()).why, "NO_LEADER");
}

/// The leader `a`, and `b`, which reaches the server of the store through this network only.
async fn behind_a_network(server: &Server, ttl: &str) -> (Replicas, Network) {
    let (url, network) = (server.url(), Network::before(server.directory()));
    let mut replicas = Replicas::none(ttl).await;
    for (name, store) in [("a", &url), ("b", &network.url(&url))] {
        replicas.add(name, store).await;
        replicas.serve(name).await;
    }
    (replicas, network)
}

#[tokio::test]
async fn a_follower_that_cannot_read_the_store_has_the_leader_answer() {
    let Some(server) = shared() else { return };
    let (mut replicas, network) = behind_a_network(server, "60s").await;
    replicas.register(&["s"]).await;
    let mut client = replicas.client("b").await;
    let cycle = client.run().await.unwrap();
    network.shut();
    assert_eq!(client.cycle(1).await.unwrap(), cycle);
    assert_eq!(client.history().await.unwrap().len(), 1);
    assert_eq!(replicas.metric("a", &answered("GetCycle")).await, Some(1));
    replicas.kill("a").await;
    assert_eq!(reason(&client.cycle(1).await.unwrap_err()).why, "STORE_UNAVAILABLE");
}

#[tokio::test]
async fn a_follower_that_cannot_read_the_store_says_why_it_knows_no_leader() {
    let Some(server) = shared() else { return };
    let (mut replicas, network) = behind_a_network(server, "3s").await;
    replicas.ready("b").await;
    let mut client = replicas.client("b").await;
    network.shut();
    replicas.kill("a").await;
    let refused = async {
        loop {
            let refused = client.run().await.unwrap_err();
            let message = refused.message();
            if message.starts_with("it is not known which replica leads: postgres://")
                && message.contains("can't connect")
            {
                return refused;
            }
        }
    };
    let refused = patiently("the follower to know no leader", refused).await;
    assert_eq!(reason(&refused).why, "NO_LEADER");
}

#[tokio::test]
async fn a_follower_without_a_leader_lists_nothing_before_it_knows_what_is_acknowledged() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b"], "60s").await;
    replicas.register(&["s"]).await;
    replicas.client("b").await.run().await.unwrap();
    replicas.kill("a").await;
    let stopped = replicas.services[1].take().unwrap().stop().await;
    assert!(stopped.success());
    let again = replicas.homes[1].serve().await;
    let refused = again.client().await.history().await.unwrap_err();
    assert_eq!(reason(&refused).why, "NO_LEADER");
}

#[tokio::test]
async fn a_follower_finds_the_cycles_of_a_renamed_subsystem_by_each_of_its_names() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b"], "10s").await;
    replicas.register(&["old", "other"]).await;
    let (mut leader, mut follower) = (replicas.client("a").await, replicas.client("b").await);
    let of = |name: &str| vec![name.to_owned()];
    let run = |name: &str| pb::RunCycleRequest { subsystems: of(name), ..Default::default() };
    follower.run_cycle(run("old")).await.unwrap();
    // It begins before the name is changed.
    let watch = pb::WatchCyclesRequest { from_oldest: true, subsystems: of("old"), ..Default::default() };
    let mut watch = follower.watch_cycles(watch).await.unwrap().into_inner();
    assert_eq!(decode(next_recorded(&mut watch).await).cycle_id, 1);
    let rename = pb::RenameSubsystemRequest { name: "old".into(), new_name: "new".into(), ..Default::default() };
    leader.rename_subsystem(rename).await.unwrap();
    leader.run_cycle(run("other")).await.unwrap();
    leader.run_cycle(run("new")).await.unwrap();
    assert_eq!(decode(next_recorded(&mut watch).await).cycle_id, 3);
    for name in ["old", "new"] {
        let listed = pb::ListCyclesRequest { subsystem: name.into(), ..Default::default() };
        let listed = follower.list_cycles(listed).await.unwrap().into_inner().cycles;
        assert_eq!(listed.into_iter().map(|bytes| decode(bytes).cycle_id).collect::<Vec<_>>(), [3, 1], "{name}");
    }
    assert_eq!(replicas.metric("a", &answered("ListCycles")).await, None, "the leader was not asked");
}

#[tokio::test]
async fn all_watchers_at_a_follower_are_fed_by_one_stream_of_the_leader() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b"], "10s").await;
    replicas.register(&["s", "t"]).await;
    let mut client = replicas.client("b").await;
    client.run().await.unwrap();
    let of_leader = async || replicas.metric("a", "orchestrator_watchers").await.unwrap();
    let mut watches = Vec::new();
    for i in 0..20 {
        // Some of them have a filter, and some want progress.
        let subsystems = if i % 4 == 0 { vec!["t".to_owned()] } else { vec![] };
        let request = pb::WatchCyclesRequest {
            progress: i % 2 == 0,
            from_oldest: true,
            subsystems,
            ..pb::WatchCyclesRequest::default()
        };
        watches.push((i, client.watch_cycles(request).await.unwrap().into_inner()));
    }
    for (_, watch) in &mut watches {
        assert_eq!(decode(next_recorded(watch).await).cycle_id, 1);
    }
    let one = async { while of_leader().await != 1 {} };
    patiently("the stream with progress", one).await;
    replicas.fleet.run("s", Run::Hang);
    let request = pb::RunCycleRequest { subsystems: vec!["s".into()], r#async: true, ..Default::default() };
    let cycle_id = client.run_cycle(request).await.unwrap().into_inner().cycle_id;
    for (i, watch) in watches.iter_mut().filter(|(i, _)| i % 2 == 0 && i % 4 != 0) {
        let (mut has_started, mut is_called) = (false, false);
        while !is_called {
            match next_event(watch).await.unwrap().event {
                Some(Event::Started(started)) => {
                    assert_eq!((started.cycle_id, &*started.subsystems), (cycle_id, &["s".to_owned()][..]), "{i}");
                    has_started = true;
                }
                Some(Event::Progress(progress)) => {
                    assert!(has_started);
                    is_called =
                        progress.updates.iter().any(|it| it.name == "s" && it.state() == pb::SubsystemState::Running);
                }
                other => assert!(matches!(other, Some(Event::Bookmark(_))), "{i}: {other:?}"),
            }
        }
    }
    assert_eq!(of_leader().await, 1);
    client.cancel_cycle(pb::CancelCycleRequest { cycle_id }).await.unwrap();
    replicas.fleet.run("s", Run::Echo);
    let last = client.run().await.unwrap();
    for (i, watch) in &mut watches {
        let mut seen = Vec::new();
        while seen.last() != Some(&last.cycle_id) {
            seen.push(decode(next_recorded(watch).await).cycle_id);
        }
        // The cycle over `s` alone does not pass a filter by `t`.
        assert_eq!(seen, if *i % 4 == 0 { vec![3] } else { vec![2, 3] }, "{i}");
    }
    assert_eq!(of_leader().await, 1);
    assert_eq!(replicas.metric("b", "orchestrator_watchers").await, Some(20));
    for replica in ["a", "b"] {
        assert_eq!(replicas.metric(replica, "orchestrator_acknowledged_revision").await, Some(3), "{replica}");
    }
    // Once no watcher wants progress, the stream is that of records.
    drop(watches);
    patiently("the stream without progress", async { while of_leader().await != 1 {} }).await;
}

// ---------------------------------------------------------------------------------------------------------------
// Without the leader

#[tokio::test]
async fn without_its_leader_a_follower_says_so_at_once() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b"], "60s").await;
    replicas.register(&["s"]).await;
    replicas.fleet.run("s", Run::Hang);
    let mut client = replicas.client("b").await;
    let mut of_watch = replicas.client("b").await;
    let mut watch = of_watch.watch_cycles(pb::WatchCyclesRequest::default()).await.unwrap().into_inner();
    assert!(matches!(next_event(&mut watch).await.unwrap().event, Some(Event::Bookmark(_))));
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move { client.run().await }
    });
    replicas.fleet.until("the call", |state| state.runs("s").next().is_some()).await;
    let address = format!("http://{}", replicas.doors[0].as_ref().unwrap().address());
    replicas.ready("b").await;
    replicas.kill("a").await;
    let of_a = [("leader", "a"), ("leader_address", address.as_str())];
    let lost = patiently("the answer to break off", waiting).await.unwrap().unwrap_err();
    assert_eq!(reason(&lost), because(Code::Unavailable, "LEADER_LOST", of_a));
    let begun = Instant::now();
    let refused = client.run().await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(reason(&refused), because(Code::Unavailable, "NO_LEADER", of_a));
    let answer = http::get(replicas.service("b").admin(), "/api/status").await;
    assert_eq!((answer.status, answer.json().await["error"]["reason"].clone()), (503, json!("NO_LEADER")));
    // The failover takes its time, in which no follower reaches a leader.
    assert_eq!(http::get(replicas.service("b").admin(), "/readyz").await.status, 200);
}

#[tokio::test]
async fn a_watch_stays_open_while_replicas_take_over_and_has_every_record_once() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b", "c"], "1s").await;
    replicas.register(&["s"]).await;
    let from_oldest = || pb::WatchCyclesRequest { from_oldest: true, ..Default::default() };
    let mut clients = BTreeMap::new();
    let mut watches = Vec::new();
    // One of them becomes the watch of the leader.
    for name in ["b", "c"] {
        let mut client = replicas.client(name).await;
        watches.push(client.watch_cycles(from_oldest()).await.unwrap().into_inner());
        clients.insert(name, client);
    }
    let mut acknowledged = Vec::new();
    let run = async |client: &mut Client| {
        let ran = async {
            loop {
                match client.run().await {
                    Ok(cycle) => return cycle,
                    Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
                }
            }
        };
        patiently("a cycle to run", ran).await
    };
    for round in 0..3 {
        if round == 1 {
            replicas.kill("a").await;
        }
        for _ in 0..3 {
            let cycle = run(clients.get_mut("b").unwrap()).await;
            acknowledged.push(cycle.cycle_id);
        }
    }
    let leader = replicas.leader().await;
    assert_ne!(leader, "a");
    for watch in &mut watches {
        let mut revisions = Vec::new();
        let mut seen = Vec::new();
        while seen.last() < acknowledged.last() {
            let record = decode(next_recorded(watch).await);
            revisions.push(record.revision);
            seen.push(record.cycle_id);
        }
        assert_eq!(revisions, (1..=revisions.len() as u64).collect::<Vec<_>>());
        assert!(acknowledged.iter().all(|cycle_id| seen.contains(cycle_id)), "{seen:?}");
    }
}

#[tokio::test]
async fn a_follower_that_stops_ends_its_watches() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b"], "10s").await;
    let mut client = replicas.client("b").await;
    let mut watch = client.watch_cycles(pb::WatchCyclesRequest::default()).await.unwrap().into_inner();
    next_event(&mut watch).await.unwrap();
    let stopped = replicas.services[1].take().unwrap().stop().await;
    assert!(stopped.success(), "{}", replicas.homes[1].log());
    let ended = loop {
        if let Err(status) = next_event(&mut watch).await {
            break status;
        }
    };
    assert_eq!(reason(&ended), because(Code::Unavailable, "DRAINING", []));
}

// ---------------------------------------------------------------------------------------------------------------
// What replicas have in common

/// The tables of a store, without those by which replicas agree who leads.
const TABLES: [&str; 10] =
    ["meta", "cycles", "open_cycles", "outputs", "subsystems", "loops", "hashes", "control", "audit", "checkpoint"];

#[tokio::test]
async fn a_replica_that_knows_records_which_the_database_lacks_does_not_lead_and_names_them() {
    let Some(server) = shared() else { return };
    let mut replicas = Replicas::start(server, &["a", "b"], "5s").await;
    let url = replicas.homes[0].store().to_owned();
    replicas.register(&["s"]).await;
    let mut client = replicas.client("b").await;
    client.run().await.unwrap();
    let copies = TABLES.map(|table| format!("CREATE TABLE old_{table} AS TABLE {table};"));
    server.change(&url, &copies.concat()).await;
    client.run().await.unwrap();
    let mut watch = client.watch_cycles(pb::WatchCyclesRequest::default()).await.unwrap().into_inner();
    next_event(&mut watch).await.unwrap();

    replicas.take("a").kill().await;
    let restored = TABLES.map(|table| format!("TRUNCATE {table}; INSERT INTO {table} SELECT * FROM old_{table};"));
    server.change(&url, &restored.concat()).await;
    replicas.homes[1].logged("revision 2 is not there, or is another one, and the newest is 1", 1).await;
    assert!(!replicas.homes[1].log().contains("has claimed to lead"), "{}", replicas.homes[1].log());
    // One that knows nothing of it can lead.
    replicas.serve("a").await;
    replicas.service("a").leads().await;
    assert_eq!(http::get(replicas.service("b").admin(), "/leader").await.status, 503);
    let ended = loop {
        if let Err(status) = next_event(&mut watch).await {
            break status;
        }
    };
    assert_eq!(reason(&ended).why, "REVISION_NOT_RETAINED");
}

#[tokio::test]
async fn a_follower_finds_out_that_it_can_lead_without_a_log_of_what_a_start_says() {
    const SAID: &str = "renamed by the configuration file";
    let Some(server) = shared() else { return };
    let declare =
        |name: &str, more: &str| format!("[[subsystems]]\nname = {name:?}\nendpoint = \"http://127.0.0.1:9\"\n{more}");
    let configs = RefCell::new(vec![declare("y", "former_names = [\"x\"]\n"), declare("x", "")]);
    let config = |_: &Path, _: &Home| configs.borrow_mut().pop().unwrap();
    let mut replicas = Replicas::start_with(server, &["a", "b"], "10s", "http", config).await;
    replicas.home("b").logged("this replica can lead", 1).await;
    // From now on, the store has something of it.
    let suspend = pb::SuspendSubsystemRequest { name: "x".into() };
    replicas.client("a").await.suspend_subsystem(suspend).await.unwrap();
    assert!(replicas.take("b").stop().await.success());
    replicas.serve("b").await;
    let log = replicas.home("b").logged("this replica can lead", 2).await;
    assert!(!log.contains(SAID), "{log}");
    assert!(replicas.take("a").stop().await.success());
    replicas.service("b").leads().await;
    replicas.home("b").logged(SAID, 1).await;
}

#[tokio::test]
async fn a_follower_warns_once_of_what_differs_in_the_configuration_of_the_leader() {
    const WARNING: &str = "the leader has another configuration than this replica";
    let Some(server) = shared() else { return };
    let declare = |name: &str| format!("[[subsystems]]\nname = {name:?}\nendpoint = \"http://127.0.0.1:9\"\n");
    // A name or a value, and what each replica may have for itself.
    let configs = [
        declare("x"),
        declare("y") + "[log]\nfilter = \"info\"\n",
        declare("x") + "timeout = \"7s\"\n[[loops]]\nname = \"l\"\ninterval = \"1h\"\n[cycle]\nmax_queued = 7\n",
        declare("x") + "[server]\ndrain_grace = \"1s\"\n",
    ];
    let next = std::cell::Cell::new(0);
    let config = |_: &Path, _: &Home| configs[next.replace(next.get() + 1)].clone();
    let replicas = Replicas::start_with(server, &["a", "b", "c", "d"], "10s", "http", config).await;
    for (index, keys) in [(1, "\"subsystems\""), (2, "\"cycle.max_queued, subsystems, loops\"")] {
        let log = replicas.homes[index].logged(WARNING, 1).await;
        let warning = log.lines().find(|line| line.contains(WARNING)).unwrap();
        assert!(warning.contains(keys), "{warning}");
    }
    for name in ["b", "c", "d"] {
        for _ in 0..3 {
            replicas.client(name).await.status().await.unwrap();
        }
    }
    for (index, times) in [(0, 0), (1, 1), (2, 1), (3, 0)] {
        let log = replicas.homes[index].logged("", 0).await;
        assert_eq!(log.matches(WARNING).count(), times, "{index}");
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Who calls

const GRANTS: &str = r#"
[[access.grants]]
who = ["cert:spiffe://fleet/admin/*"]
role = "admin"
[[access.grants]]
who = ["cert:spiffe://fleet/operator/*", "token:operator"]
role = "operator"
subsystems = ["*"]
[[access.grants]]
who = ["cert:spiffe://fleet/viewer/*"]
role = "viewer"
subsystems = ["*"]
"#;

/// Replicas with TLS that enforce access.
struct Secure {
    replicas: Replicas,
    authority: Authority,
    token: String,
}

impl Secure {
    /// With these identities of replicas.
    async fn start(server: &Server, peers: &str) -> Self {
        let authority = Authority::new("fleet");
        let core = authority.service_with(|params| {
            params.subject_alt_names.push(SanType::URI("spiffe://fleet/core".try_into().unwrap()));
        });
        let token = std::cell::OnceCell::new();
        let config = |shared: &Path, home: &Home| {
            if token.get().is_none() {
                core.write(shared, "core");
                authority.write(shared.join("ca.pem"));
                let written = write_tokens(&shared.join("tokens.toml"), &["operator"]);
                token.set(written["operator"].1.clone()).unwrap();
            }
            let path = |name: &str| shared.join(name).display().to_string();
            format!(
                "peers = {peers}\n[server]\nlisten_unix = {:?}\n[server.tls]\ncert_file = {:?}\nkey_file = {:?}\n\
                 client_ca_file = {:?}\nclient_auth = \"optional\"\n[dial]\nca_file = {:?}\n[access]\nmode = \
                 \"enforce\"\ntokens_file = {:?}\n{GRANTS}",
                home.path("socket").display().to_string(),
                path("core.pem"),
                path("core.key"),
                path("ca.pem"),
                path("ca.pem"),
                path("tokens.toml"),
            )
        };
        let replicas = Replicas::start_with(server, &["a", "b"], "10s", "https", config).await;
        let token = token.into_inner().unwrap();
        Self { replicas, authority, token }
    }

    /// A connection to a replica, with the certificate of this identity, if there is one.
    async fn channel(&self, replica: &str, uri: Option<&str>) -> Channel {
        let tls = self.authority.trusted().domain_name("localhost");
        let tls = uri.map_or(tls.clone(), |uri| tls.identity(self.authority.client(uri).identity()));
        self.channel_with(replica, tls).await
    }

    async fn channel_with(&self, replica: &str, tls: ClientTlsConfig) -> Channel {
        let address = self.replicas.service(replica).address();
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.unwrap()
    }

    async fn who(
        &self,
        replica: &str,
        uri: Option<&str>,
        request: Request<pb::WhoAmIRequest>,
    ) -> Result<String, Status> {
        let mut client = AccessClient::new(self.channel(replica, uri).await);
        Ok(client.who_am_i(request).await?.into_inner().identity)
    }

    /// The first audit event of the leader that passes, once there is one.
    async fn event(&self, what: &str, passes: impl Fn(&pb::AuditEvent) -> bool) -> pb::AuditEvent {
        let mut ledger = LedgerClient::new(self.channel("a", Some("spiffe://fleet/admin/a")).await);
        let found = async {
            loop {
                let events =
                    ledger.list_audit_events(pb::ListAuditEventsRequest::default()).await.unwrap().into_inner();
                let mut events = events.events.into_iter().map(|it| pb::AuditEvent::decode(it.event).unwrap());
                if let Some(event) = events.find(&passes) {
                    return event;
                }
            }
        };
        patiently(what, found).await
    }
}

const PEERS: &str = r#"["cert:spiffe://fleet/core"]"#;

fn with_token<Q>(request: Q, token: &str) -> Request<Q> {
    let mut request = Request::new(request);
    let value = format!("Bearer {token}");
    request.metadata_mut().insert("authorization", MetadataValue::try_from(value).unwrap());
    request
}

#[tokio::test]
async fn a_caller_has_its_own_rights_through_a_follower_and_the_audit_has_both() {
    let Some(server) = shared() else { return };
    let secure = Secure::start(server, PEERS).await;
    let who = pb::WhoAmIRequest::default;
    for uri in ["spiffe://fleet/viewer/v", "spiffe://fleet/stranger"] {
        assert_eq!(secure.who("b", Some(uri), Request::new(who())).await.unwrap(), format!("cert:{uri}"));
    }
    let by_token = secure.who("b", Some("spiffe://fleet/viewer/v"), with_token(who(), &secure.token)).await;
    assert_eq!(by_token.unwrap(), "token:operator");

    let mut watcher = Client::new(secure.channel("b", None).await);
    let watch = watcher.watch_cycles(with_token(pb::WatchCyclesRequest::default(), &secure.token)).await;
    next_event(&mut watch.unwrap().into_inner()).await.unwrap();

    let mut operator = Client::new(secure.channel("b", Some("spiffe://fleet/operator/o")).await);
    let admit = || pb::RunCycleRequest { r#async: true, ..Default::default() };
    operator.run_cycle(admit()).await.unwrap();
    let event = secure.event("the change", |event| event.rpc == "RunCycle").await;
    assert_eq!(
        (event.caller.as_str(), event.credential()),
        ("cert:spiffe://fleet/operator/o", pb::CredentialKind::Certificate)
    );
    assert_eq!((event.via.as_str(), event.peer.as_str()), ("b", "127.0.0.1"));
    let mut of_leader = Client::new(secure.channel("a", Some("spiffe://fleet/admin/a")).await);
    of_leader.run_cycle(admit()).await.unwrap();
    let event =
        secure.event("another change", |event| event.caller.ends_with("/admin/a") && event.rpc == "RunCycle").await;
    assert_eq!(event.via, "");

    let mut viewer = Client::new(secure.channel("b", Some("spiffe://fleet/viewer/v")).await);
    viewer.status().await.unwrap();
    let refused = viewer.run_cycle(admit()).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).why.as_str()), (Code::PermissionDenied, "NOT_ALLOWED"));
    let denied =
        secure.event("the denial", |event| event.decision() == pb::Decision::Denied && event.rpc == "RunCycle").await;
    assert_eq!((denied.caller.as_str(), denied.via.as_str()), ("cert:spiffe://fleet/viewer/v", "b"));

    // Strangers get no further than the follower, and the audit has them.
    let refused = secure.who("b", None, Request::new(who())).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::Unauthenticated, "CREDENTIAL_MISSING", []));
    let denied = secure.event("the stranger", |event| event.reason == "CREDENTIAL_MISSING").await;
    assert_eq!((denied.rpc.as_str(), denied.via.as_str()), ("WhoAmI", "b"));
}

#[tokio::test]
async fn a_follower_judges_the_readers_of_the_history_and_the_leader_has_its_reads_in_the_audit() {
    let Some(server) = shared() else { return };
    let mut secure = Secure::start(server, PEERS).await;
    let mut operator = Client::new(secure.channel("b", Some("spiffe://fleet/operator/o")).await);
    operator.run_cycle(pb::RunCycleRequest::default()).await.unwrap();
    let mut viewer = Client::new(secure.channel("b", Some("spiffe://fleet/viewer/v")).await);
    viewer.cycle(1).await.unwrap();
    assert_eq!(viewer.history().await.unwrap().len(), 1);
    let mut stranger = Client::new(secure.channel("b", Some("spiffe://fleet/stranger")).await);
    let refused = stranger.cycle(1).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).why.as_str()), (Code::PermissionDenied, "NOT_ALLOWED"));
    assert_eq!(
        secure.replicas.metric("b", r#"orchestrator_forwarded_calls_total{code="PERMISSION_DENIED"}"#).await,
        None
    );
    // Before the leader is asked for anything, such as whether it has that record.
    let (door, of_leader) = (secure.replicas.doors[0].as_ref().unwrap(), secure.replicas.service("a"));
    door.shut();
    let refused = stranger.watch_after(1000).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).why.as_str()), (Code::PermissionDenied, "NOT_ALLOWED"));
    door.lead_to(Some(of_leader));
    drop((operator, viewer, stranger));
    // It reports its last calls when it ends.
    let stopped = secure.replicas.services[1].take().unwrap().stop().await;
    assert!(stopped.success(), "{}", secure.replicas.homes[1].log());
    for (rpc, caller, decision) in [
        ("GetCycle", "cert:spiffe://fleet/viewer/v", pb::Decision::Allowed),
        ("GetCycle", "cert:spiffe://fleet/stranger", pb::Decision::Denied),
        ("WatchCycles", "cert:spiffe://fleet/stranger", pb::Decision::Denied),
    ] {
        let is_it = |event: &pb::AuditEvent| event.rpc == rpc && event.caller == caller;
        let event = secure.event("the read", is_it).await;
        assert_eq!((event.decision(), event.via.as_str(), event.count), (decision, "b", 1));
        assert_eq!(event.peer, "127.0.0.1");
    }
}

#[tokio::test]
async fn a_user_of_the_machine_of_a_follower_is_another_one_than_that_of_the_leader() {
    let Some(server) = shared() else { return };
    let secure = Secure::start(server, PEERS).await;
    let uid = rustix::process::geteuid().as_raw();
    for (replica, identity, is_admin) in [("a", format!("uid:{uid}\n"), true), ("b", format!("uid:{uid}@b\n"), false)] {
        let home = &secure.replicas.homes[secure.replicas.index(replica)];
        let mut whoami = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
        whoami.args(["whoami", "--address", &format!("unix:{}", home.path("socket").display())]);
        let (code, said) = crate::common::command::run(whoami).await;
        assert_eq!(code, 0, "{said}");
        assert!(said.contains(&identity) && said.contains("ADMIN") == is_admin, "{replica}: {said}");
        assert!(!said.contains("expires"), "the certificate of the replica is not that of its caller: {said}");
    }
}

/// The header of replicas, as somebody else would forge it.
#[derive(Clone, PartialEq, Message)]
struct Forged {
    #[prost(string, tag = "1")]
    replica: String,
    #[prost(uint32, optional, tag = "3")]
    user: Option<u32>,
    #[prost(bytes = "bytes", repeated, tag = "4")]
    certificates: Vec<Bytes>,
}

impl Forged {
    /// A request with this header, meant for the leader of this epoch.
    fn in_request(&self, token: Option<&str>, epoch: u64) -> Request<pb::WhoAmIRequest> {
        let request = pb::WhoAmIRequest::default();
        let mut request = token.map_or_else(|| Request::new(request), |token| with_token(request, token));
        let value = BinaryMetadataValue::from_bytes(&self.encode_to_vec());
        request.metadata_mut().insert_bin("orchestrator-caller-bin", value);
        request.metadata_mut().insert("orchestrator-leader-epoch", epoch.into());
        request
    }
}

#[tokio::test]
async fn a_forged_identity_is_refused_by_the_leader_and_by_a_follower() {
    let Some(server) = shared() else { return };
    let secure = Secure::start(server, PEERS).await;
    let Issued { certificate, .. } = secure.authority.client("spiffe://fleet/admin/a");
    let certificates = vec![der(&certificate).into()];
    let forged = Forged { replica: "b".into(), user: None, certificates };
    let mut admin = Client::new(secure.channel("a", Some("spiffe://fleet/admin/a")).await);
    let epoch = admin.status().await.unwrap().epoch;
    for replica in ["a", "b"] {
        // Neither strangers nor callers that are known.
        for uri in [None, Some("spiffe://fleet/operator/o")] {
            let refused = secure.who(replica, uri, forged.in_request(None, epoch)).await.unwrap_err();
            assert_eq!(reason(&refused), because(Code::Unauthenticated, "CREDENTIAL_INVALID", []), "{replica} {uri:?}");
        }
    }
    // With a token, the caller is that of the token.
    let with_token = |epoch| forged.in_request(Some(&secure.token), epoch);
    assert_eq!(secure.who("a", None, with_token(epoch)).await.unwrap(), "token:operator");
    // But not in another term.
    let refused = secure.who("a", None, with_token(epoch + 1)).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::Unavailable, "NOT_LEADER", []));
    // A replica itself may say it.
    let core = Issued {
        certificate: std::fs::read_to_string(secure.replicas.shared.path().join("core.pem")).unwrap(),
        key: std::fs::read_to_string(secure.replicas.shared.path().join("core.key")).unwrap(),
    };
    let tls = secure.authority.trusted().domain_name("localhost").identity(core.identity());
    let mut client = AccessClient::new(secure.channel_with("a", tls).await);
    let request = forged.in_request(None, epoch);
    assert_eq!(client.who_am_i(request).await.unwrap().into_inner().identity, "cert:spiffe://fleet/admin/a");
    // But the certificates of another authority prove nothing.
    let other = Authority::new("other").client("spiffe://fleet/admin/a");
    let other = Forged { certificates: vec![der(&other.certificate).into()], ..forged };
    let refused = client.who_am_i(other.in_request(None, epoch)).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::Unauthenticated, "CREDENTIAL_INVALID", []));
}

/// A certificate in DER.
fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

#[tokio::test]
async fn a_leader_takes_no_word_of_a_replica_that_is_not_a_peer_but_takes_tokens() {
    let Some(server) = shared() else { return };
    let secure = Secure::start(server, "[]").await;
    let refused =
        secure.who("b", Some("spiffe://fleet/admin/a"), Request::new(pb::WhoAmIRequest {})).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::Unauthenticated, "CREDENTIAL_INVALID", []));
    assert!(refused.message().contains("cluster.peers"), "{refused:?}");
    let by_token =
        secure.who("b", Some("spiffe://fleet/admin/a"), with_token(pb::WhoAmIRequest {}, &secure.token)).await;
    assert_eq!(by_token.unwrap(), "token:operator");
    let mut watcher = Client::new(secure.channel("b", None).await);
    let watch = watcher.watch_cycles(with_token(pb::WatchCyclesRequest::default(), &secure.token)).await;
    next_event(&mut watch.unwrap().into_inner()).await.unwrap();
}

// ---------------------------------------------------------------------------------------------------------------
// Something else at the address of the leader

#[tokio::test]
async fn a_replica_with_the_certificate_of_another_fleet_is_not_ready() {
    let Some(server) = shared() else { return };
    let fleets = ["fleet", "fleet", "another"].map(|fleet| (fleet, Authority::new(fleet)));
    let next = std::cell::Cell::new(0);
    let config = |_: &Path, home: &Home| {
        // Of one fleet, all certificates are by the first authority.
        let (fleet, authority) = &fleets[if next.replace(next.get() + 1) == 2 { 2 } else { 0 }];
        let core = authority.service_with(|params| {
            let identity = format!("spiffe://{fleet}/core");
            params.subject_alt_names.push(SanType::URI(identity.try_into().unwrap()));
        });
        let ca = authority.write(home.path("ca.pem"));
        let (certificate, key) = core.write(ca.parent().unwrap(), "core");
        format!(
            "peers = [\"cert:spiffe://{fleet}/core\"]\n[server.tls]\ncert_file = {certificate:?}\nkey_file = \
             {key:?}\nclient_ca_file = {ca:?}\nclient_auth = \"optional\"\n[dial]\nca_file = {ca:?}\n"
        )
    };
    let replicas = Replicas::start_with(server, &["a", "b", "c"], "10s", "https", config).await;
    let is_serving = async |name: &str, authority: &Authority| {
        let address = replicas.service(name).address();
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
        let endpoint = endpoint.tls_config(authority.trusted().domain_name("localhost")).unwrap();
        let mut health = HealthClient::new(endpoint.connect().await.unwrap());
        let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
        answer.status() == ServingStatus::Serving
    };
    let serving = async { while !is_serving("b", &fleets[0].1).await {} };
    patiently("the replica of this fleet to be ready", serving).await;
    let of_another = replicas.home("c");
    of_another.logged("this replica can lead", 1).await;
    let log = of_another.logged("the history of the leader is not followed", 1).await;
    assert!(log.contains("invalid peer certificate"), "{log}");
    assert!(!is_serving("c", &fleets[2].1).await);
}

/// Ends the connections to the replica behind a door, and waits until the follower of this client knows it.
async fn shut(door: &Door, client: &mut Client) {
    door.shut();
    let known = async {
        while client.run().await.map_or_else(|status| reason(&status).why, |_| String::new()) != "NO_LEADER" {}
    };
    patiently("the connections to end", known).await;
}

#[tokio::test]
async fn nothing_is_done_by_another_orchestrator_at_the_address_of_the_leader() {
    let Some(server) = shared() else { return };
    let replicas = Replicas::start(server, &["a", "b"], "60s").await;
    let others = Replicas::start(server, &["c"], "60s").await;
    let home = Home::new().with_store("memory:");
    let alone = home.serve().await;
    let mut client = replicas.client("b").await;
    for other in [&alone, others.service("c")] {
        let door = replicas.doors[0].as_ref().unwrap();
        shut(door, &mut client).await;
        door.lead_to(Some(other));
        let refused = client.run().await.unwrap_err();
        assert_eq!(reason(&refused), because(Code::Unavailable, "NOT_LEADER", []));
        assert!(refused.message().contains("check cluster.advertise"), "{refused:?}");
        let registered = client.register(registration("s", replicas.fleet.endpoint())).await;
        assert_eq!(reason(&registered.unwrap_err()).why, "NOT_LEADER");
        let refused = client.status().await.unwrap_err();
        assert_eq!(reason(&refused).why, "NOT_LEADER");
        let mut direct = other.client().await;
        assert_eq!(direct.status().await.unwrap().total_cycles, 0);
        assert!(direct.subsystems().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_leader_that_accepts_connections_and_says_nothing_keeps_no_call_waiting() {
    let Some(server) = shared() else { return };
    let config = |_: &Path, _: &Home| "[dial]\nconnect_timeout = \"300ms\"\n".to_owned();
    let replicas = Replicas::start_with(server, &["a", "b"], "60s", "http", config).await;
    let door = replicas.doors[0].as_ref().unwrap();
    let address = format!("http://{}", door.address());
    let mut client = replicas.client("b").await;
    shut(door, &mut client).await;
    door.fall_silent();
    let refused = patiently("the answer", client.run()).await.unwrap_err();
    let of_a = [("leader", "a"), ("leader_address", address.as_str())];
    assert_eq!(reason(&refused), because(Code::Unavailable, "NO_LEADER", of_a));
    assert!(refused.message().contains("sent nothing within 300ms"), "{refused:?}");
}
