//! The audit: each change of the service has one event, which says who made it, and each event its change. Calls that
//! change nothing, and denied ones, are summed up.

use std::fs;

use crate::common::{
    Stage, command,
    fleet::Run,
    patiently,
    service::{Client, Home, ms},
    tokens::{write_private, write_tokens},
};
use futures_util::{StreamExt, stream};
use orchestrator_core::proto::orchestrator::v1::{
    self as pb, AuditEvent, AuditKind, CredentialKind, Decision, ledger_client::LedgerClient,
};
use prost::Message;
use rustix::process::Signal;
use tonic::{
    Code, Request,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

/// The audit events in the database, oldest first.
fn events(home: &Home) -> Vec<AuditEvent> {
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    let mut query = database.prepare("SELECT event FROM audit ORDER BY leaf").unwrap();
    let events = query.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
    events.map(|bytes| AuditEvent::decode(&bytes.unwrap()[..]).unwrap()).collect()
}

/// The RPC, the targets and the cycle of each event.
fn brief(events: &[AuditEvent]) -> Vec<(&str, Vec<&str>, u64)> {
    events
        .iter()
        .map(|event| (event.rpc.as_str(), event.targets.iter().map(String::as_str).collect(), event.cycle_id))
        .collect()
}

async fn start_loop(client: &mut Client, name: &str, interval: i64) {
    let settings = pb::IntervalLoop { name: name.into(), interval: ms(interval), ..pb::IntervalLoop::default() };
    client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await.unwrap();
}

#[tokio::test]
async fn each_change_has_one_event_and_a_call_that_changes_nothing_has_none() {
    const HOUR: i64 = 3_600_000;
    let mut stage = Stage::new().await;
    let one = |name: &str| name.to_owned();
    for _ in 0..2 {
        // The second time, nothing changes.
        stage.register("a", |_| {}).await;
        stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: one("a") }).await.unwrap();
        start_loop(&mut stage.client, "hourly", HOUR).await;
    }
    for _ in 0..2 {
        let registration = Some(pb::Registration { phase: 1, ..stage.registration("a") });
        let update = pb::UpdateSubsystemRequest { registration, ..pb::UpdateSubsystemRequest::default() };
        stage.client.update_subsystem(update).await.unwrap();
    }
    for (name, new_name) in [("a", "renamed"), ("renamed", "a")] {
        let rename = pb::RenameSubsystemRequest { name: one(name), new_name: one(new_name), etag: String::new() };
        stage.client.rename_subsystem(rename).await.unwrap();
    }
    stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: one("a") }).await.unwrap();
    stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: one("a") }).await.unwrap();
    for _ in 0..2 {
        let all = pb::PauseIntervalLoopsRequest { all: true, ..Default::default() };
        stage.client.pause_interval_loops(all).await.unwrap();
        let hourly = pb::PauseIntervalLoopsRequest { name: one("hourly"), ..Default::default() };
        stage.client.pause_interval_loops(hourly).await.unwrap();
    }
    let all = pb::ResumeIntervalLoopsRequest { all: true, ..Default::default() };
    stage.client.resume_interval_loops(all).await.unwrap();
    stage.client.stop_interval_loop(pb::StopIntervalLoopRequest { name: one("hourly") }).await.unwrap();
    let request = || pb::RunCycleRequest { request_id: one("r"), ..pb::RunCycleRequest::default() };
    stage.client.run_with(request()).await.unwrap();
    stage.client.run_with(request()).await.unwrap();
    let only_a = pb::RunCycleRequest { subsystems: vec![one("a")], ..pb::RunCycleRequest::default() };
    stage.client.run_with(only_a).await.unwrap();
    stage.client.run_cycle(pb::RunCycleRequest { validate_only: true, ..request() }).await.unwrap();
    stage.fleet.run("a", Run::Hold);
    let waits_for_its_cancellation = stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 3).await;
    stage.client.cancel(waits_for_its_cancellation).await.unwrap();
    stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: one("a") }).await.unwrap();
    // Refused, so it changes nothing.
    stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: one("a") }).await.unwrap_err();

    let events = events(&stage.home);
    let expected = [
        ("RegisterSubsystem", vec!["a"], 0),
        ("SuspendSubsystem", vec!["a"], 0),
        ("StartIntervalLoop", vec!["*", "loop:hourly"], 0),
        ("UpdateSubsystem", vec!["a"], 0),
        ("RenameSubsystem", vec!["a", "renamed"], 0),
        ("RenameSubsystem", vec!["renamed", "a"], 0),
        ("ResumeSubsystem", vec!["a"], 0),
        ("PauseIntervalLoops", vec!["loop:*"], 0),
        ("PauseIntervalLoops", vec!["loop:hourly"], 0),
        ("ResumeIntervalLoops", vec!["loop:*"], 0),
        ("StopIntervalLoop", vec!["loop:hourly"], 0),
        ("RunCycle", vec!["*"], 1),
        ("RunCycle", vec!["a"], 2),
        ("RunCycle", vec!["*"], 3),
        ("CancelCycle", vec!["*"], 3),
        ("UnregisterSubsystem", vec!["a"], 0),
    ];
    assert_eq!(brief(&events), expected);
    for event in &events {
        let AuditEvent { caller, peer, code, count, .. } = event;
        assert_eq!((caller.as_str(), code.as_str(), *count), ("nobody", "OK", 1), "{event:?}");
        assert!(peer == "127.0.0.1" && event.time.is_some() && event.duration_ms.is_some(), "{event:?}");
        assert_eq!((event.decision(), event.credential()), (Decision::Allowed, CredentialKind::Unspecified));
        assert_eq!(event.request_digest.len(), 32);
    }
    // The event of a call that does not wait is written with the admission, others with the record.
    assert_eq!(events[11..15].iter().map(|event| event.revision).collect::<Vec<_>>(), [1, 2, 0, 3]);
}

#[tokio::test]
async fn a_change_of_many_names_the_first_ones_and_counts_the_others() {
    let mut stage = Stage::new().await;
    let names: Vec<_> = (0..40).map(|i| format!("subsystem-{i:02}")).collect();
    let registrations = names.iter().map(|name| stage.registration(name)).collect();
    let all = pb::RegisterSubsystemsRequest { registrations, lease: None };
    stage.client.register_subsystems(all).await.unwrap();
    let events = events(&stage.home);
    assert_eq!((events.len(), &events[0].targets[..], events[0].targets_left_out), (1, &names[..16], 24));
}

#[tokio::test]
async fn what_the_service_changes_by_itself_has_an_event_and_the_cycles_of_loops_have_none() {
    let home = Home::new();
    let config = "[[loops]]\nname = \"fast\"\ninterval = \"20ms\"\n";
    let mut stage = Stage::at(home.with_config(config)).await;
    let registration = Some(stage.registration("a"));
    let leased = pb::RegisterSubsystemRequest { registration, lease: ms(1000) };
    stage.client.register_subsystem(leased).await.unwrap();
    let gone = async { while stage.client.subsystem("a").await.is_ok() {} };
    patiently("the lease to end", gone).await;
    assert!(!stage.client.status().await.unwrap().last_cycle.is_empty(), "the loop has run");
    stage.service.signal(Signal::HUP);
    let home = &stage.home;
    let reloaded = async {
        while events(home).len() < 3 {
            tokio::task::yield_now().await;
        }
    };
    patiently("the reload", reloaded).await;
    let events = events(home);
    let expected = [("RegisterSubsystem", vec!["a"], 0), ("lease_end", vec!["a"], 0), ("reload", vec![], 0)];
    assert_eq!(brief(&events), expected);
    for event in &events[1..] {
        assert_eq!((event.caller.as_str(), event.peer.as_str(), event.request_digest.len()), ("", "", 0));
        assert_eq!(event.duration_ms, None);
    }
}

/// The calls of a cycle that was running or waiting when the process was killed.
#[tokio::test]
async fn the_event_of_an_interrupted_cycle_is_written_by_the_next_process() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.fleet.run("a", Run::Hold);
    let calls: Vec<_> = (0..2)
        .map(|_| {
            let mut client = stage.client.clone();
            tokio::spawn(async move { client.run().await })
        })
        .collect();
    stage.fleet.until_run("a", 1).await;
    // The second cycle waits for the first one, and a third one is acknowledged before it has run.
    let third = async {
        let mut waiting = 0;
        while waiting < 1 {
            waiting = stage.client.status().await.unwrap().queued_cycles;
        }
        stage.client.admit().await.unwrap()
    };
    assert_eq!(patiently("the second cycle to wait", third).await, 3);
    let Stage { fleet, home, service, .. } = stage;
    service.kill().await;
    for call in calls {
        call.await.unwrap().unwrap_err();
    }
    assert_eq!(brief(&events(&home)), [("RegisterSubsystem", vec!["a"], 0), ("RunCycle", vec!["*"], 3)]);

    fleet.run("a", Run::Echo);
    let mut stage = Stage::again(fleet, home).await;
    stage.client.recorded(3).await;
    stage.client.recorded(2).await;
    let events = events(&stage.home);
    let mut of_cycles = brief(&events[1..]);
    of_cycles.sort_unstable();
    let expected = [("RunCycle", vec!["*"], 1), ("RunCycle", vec!["*"], 2), ("RunCycle", vec!["*"], 3)];
    assert_eq!(of_cycles, expected);
    let of = |cycle_id| events.iter().find(|event| event.cycle_id == cycle_id).unwrap();
    assert_eq!((of(1).code.as_str(), of(1).revision, of(1).duration_ms), ("UNKNOWN", 1, None));
    assert_eq!((of(2).code.as_str(), of(2).caller.as_str()), ("OK", "nobody"));
    assert_eq!(of(1).peer, "127.0.0.1");
    assert_eq!(of(1).request_digest, of(2).request_digest);
}

/// A service in this mode in which a token for `NAME` is an admin, and the text of the token.
async fn with_token(mode: &str, name: &str) -> (Stage, String) {
    with_token_at(Home::new(), mode, name).await
}

async fn with_token_at(home: Home, mode: &str, name: &str) -> (Stage, String) {
    let tokens = home.path("tokens.toml");
    let written = write_tokens(&tokens, &[name]);
    let config = format!(
        "[access]\nmode = \"{mode}\"\ntokens_file = \"{}\"\n[[access.grants]]\nwho = [\"token:{name}\"]\nrole = \"admin\"",
        tokens.display()
    );
    (Stage::at(home.with_config(&config)).await, written[name].1.clone())
}

type Orchestrator = pb::orchestrator_client::OrchestratorClient<Channel>;

async fn orchestrator(stage: &Stage) -> Orchestrator {
    Orchestrator::connect(format!("http://{}", stage.service.address())).await.unwrap()
}

fn with<T>(bearer: &str, request: T) -> Request<T> {
    let mut request = Request::new(request);
    let bearer: MetadataValue<Ascii> = format!("Bearer {bearer}").parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    request
}

#[tokio::test]
async fn an_event_names_the_caller_and_never_contains_its_token_or_its_request() {
    let (stage, token) = with_token("enforce", "ops").await;
    let mut client = orchestrator(&stage).await;
    let register = |stage: &Stage, secret: &str| {
        let secret = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(secret.into())) };
        let parameters = prost_types::Struct { fields: [("key".to_owned(), secret)].into() }.encode_to_vec().into();
        let registration = Some(pb::Registration { parameters, ..stage.registration("a") });
        pb::RegisterSubsystemRequest { registration, lease: None }
    };
    for secret in ["hunter2", "hunter3", "hunter2"] {
        client.register_subsystem(with(&token, register(&stage, secret))).await.unwrap();
    }
    client.register_subsystem(register(&stage, "hunter4")).await.unwrap_err();
    let events = events(&stage.home);
    assert_eq!(events.len(), 3);
    for event in &events {
        assert_eq!((event.caller.as_str(), event.credential()), ("token:ops", CredentialKind::Token));
        let bytes = event.encode_to_vec();
        let contains = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(!contains("hunter") && !contains(&token) && !contains("http://"), "{event:?}");
    }
    let digest = |i: usize| &events[i].request_digest;
    assert!(digest(0) == digest(2) && digest(0) != digest(1));
}

#[tokio::test]
async fn in_a_dry_run_an_event_says_what_would_be_denied() {
    let (stage, token) = with_token("dry_run", "ops").await;
    let mut client = orchestrator(&stage).await;
    client.run_cycle(with(&token, pb::RunCycleRequest::default())).await.unwrap();
    client.run_cycle(pb::RunCycleRequest::default()).await.unwrap();
    let events = events(&stage.home);
    let said = |event: &AuditEvent| (event.caller.clone(), event.decision());
    let expected = [("token:ops".to_owned(), Decision::Allowed), ("nobody".to_owned(), Decision::WouldBeDenied)];
    assert_eq!(events.iter().map(said).collect::<Vec<_>>(), expected);
}

// ---------------------------------------------------------------------------------------------------------------
// Listing and retention

type Ledger = LedgerClient<Channel>;

async fn list(stage: &Stage, request: pb::ListAuditEventsRequest) -> pb::ListAuditEventsResponse {
    let mut ledger = Ledger::connect(format!("http://{}", stage.service.address())).await.unwrap();
    ledger.list_audit_events(request).await.unwrap().into_inner()
}

/// The RPCs of listed events.
fn rpcs(listed: &pb::ListAuditEventsResponse) -> Vec<String> {
    let rpc = |logged: &pb::LoggedAuditEvent| AuditEvent::decode(logged.event.clone()).unwrap().rpc;
    listed.events.iter().map(rpc).collect()
}

#[tokio::test]
async fn events_are_listed_by_pages_and_filters_and_a_changed_one_is_named() {
    for home in [Home::new(), Home::new().in_memory()] {
        let mut stage = Stage::at(home).await;
        stage.register("a", |_| {}).await;
        for _ in 0..3 {
            stage.client.run().await.unwrap();
        }
        let request = pb::ListAuditEventsRequest { page_size: 3, ..pb::ListAuditEventsRequest::default() };
        let first = list(&stage, request.clone()).await;
        assert_eq!(rpcs(&first), ["RunCycle"; 3]);
        assert_eq!(first.events.iter().map(|event| event.leaf).collect::<Vec<_>>(), [6, 4, 2]);
        let rest = list(&stage, pb::ListAuditEventsRequest { page_token: first.next_page_token, ..request }).await;
        assert_eq!((rpcs(&rest), rest.next_page_token.as_str()), (vec!["RegisterSubsystem".to_owned()], ""));
        let filter = |change: fn(&mut pb::ListAuditEventsRequest)| {
            let mut request = pb::ListAuditEventsRequest::default();
            change(&mut request);
            request
        };
        assert_eq!(rpcs(&list(&stage, filter(|it| it.rpc = "RegisterSubsystem".into())).await).len(), 1);
        assert_eq!(rpcs(&list(&stage, filter(|it| it.caller = "nobody".into())).await).len(), 4);
        assert_eq!(rpcs(&list(&stage, filter(|it| it.caller = "token:a".into())).await).len(), 0);
        assert_eq!(rpcs(&list(&stage, filter(|it| it.denied = true)).await).len(), 0);
        let later = |it: &mut pb::ListAuditEventsRequest| {
            it.since = Some(prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 });
        };
        assert_eq!(rpcs(&list(&stage, filter(later)).await).len(), 0);
        if !stage.home.path("o.db").exists() {
            continue;
        }
        let database = rusqlite::Connection::open(stage.home.path("o.db")).unwrap();
        database.execute("UPDATE audit SET event = CAST(event || x'00' AS BLOB) WHERE leaf = 4", []).unwrap();
        let found = list(&stage, pb::ListAuditEventsRequest::default()).await;
        assert_eq!((found.events.len(), found.unreadable.len(), found.unreadable[0].leaf), (3, 1, 4));
        assert!(found.unreadable[0].problem.contains("its bytes were changed"), "{found:?}");
    }
}

#[tokio::test]
async fn old_events_are_removed_provably() {
    let home =
        Home::new().with_args(["--set", "audit.retention.max_events=2", "--set", "store.retention.max_cycles=1"]);
    let mut stage = Stage::at(home).await;
    for _ in 0..10 {
        stage.client.run().await.unwrap();
    }
    // The retention looks at its start.
    let stage = stage.restarted().await;
    let removed = async { while list(&stage, pb::ListAuditEventsRequest::default()).await.events.len() > 2 {} };
    patiently("old events to be removed", removed).await;
    let mut ledger = Ledger::connect(format!("http://{}", stage.service.address())).await.unwrap();
    let key = ledger.get_checkpoint(pb::GetCheckpointRequest {}).await.unwrap().into_inner().keys.remove(0);
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    assert_eq!(events(&home).len(), 2);
    let db = home.path("o.db").display().to_string();
    let verify = async || command::orchestrator(None, &["verify", "--db", &db, "--key", &key]).await;
    let (code, said) = verify().await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("1 record and 2 audit events are as they were written"), "{said}");
    assert!(said.contains("entries 0 to 16 were removed by retention"), "{said}");
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    database.execute("DELETE FROM audit WHERE leaf = (SELECT max(leaf) FROM audit)", []).unwrap();
    drop(database);
    assert_eq!(verify().await.0, 1);
}

#[tokio::test]
async fn the_command_line_lists_events() {
    let (stage, token) = with_token("enforce", "ops").await;
    let mut client = orchestrator(&stage).await;
    for _ in 0..2 {
        client.run_cycle(with(&token, pb::RunCycleRequest::default())).await.unwrap();
    }
    let credentials = stage.home.path("ops.token");
    write_private(&credentials, &token);
    let address = format!("http://{}", stage.service.address());
    let audit = async |args: &[&str]| {
        let (exit, text) =
            command::orchestrator(Some(&credentials), &[&["audit", "--address", &address], args].concat()).await;
        assert_eq!(exit, 0, "{text}");
        text
    };
    let table = audit(&["--caller", "token:ops", "--since", "1h"]).await;
    assert_eq!(table.matches("RunCycle").count(), 2, "{table}");
    assert!(table.contains("token:ops") && table.contains("127.0.0.1"), "{table}");
    assert!(audit(&["--denied"]).await.contains("no events"));
    let json = audit(&["--limit", "1", "--output", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let event = &json["events"][0];
    assert_eq!((event["leaf"].as_str(), event["event"]["cycleId"].as_str()), (Some("3"), Some("2")), "{json}");
}

// ---------------------------------------------------------------------------------------------------------------
// Calls that change nothing, and denied ones

/// The events that a service has written when it has ended.
async fn stopped(stage: Stage) -> Vec<AuditEvent> {
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    events(&home)
}

/// The RPC, the code or the reason, the number of calls, and the targets of each sum.
fn sums(events: &[AuditEvent]) -> Vec<(&str, &str, u64, Vec<&str>)> {
    let sums = events.iter().filter(|event| event.kind() != AuditKind::Change);
    let mut sums: Vec<_> = sums
        .map(|event| {
            let result = if event.reason.is_empty() { &event.code } else { &event.reason };
            let targets = event.targets.iter().map(String::as_str).collect();
            (event.rpc.as_str(), result.as_str(), event.count, targets)
        })
        .collect();
    sums.sort_unstable();
    sums
}

#[tokio::test]
async fn calls_that_change_nothing_are_summed_up_and_written_at_the_end_at_the_latest() {
    let (stage, token) = with_token("enforce", "ops").await;
    let mut client = orchestrator(&stage).await;
    let register = pb::RegisterSubsystemRequest { registration: Some(stage.registration("a")), lease: ms(60_000) };
    for _ in 0..3 {
        client.register_subsystem(with(&token, register.clone())).await.unwrap();
        client.renew_lease(with(&token, pb::RenewLeaseRequest { name: "a".into() })).await.unwrap();
        client.get_status(with(&token, pb::GetStatusRequest::default())).await.unwrap();
        client.list_subsystems(with(&token, pb::ListSubsystemsRequest::default())).await.unwrap();
    }
    for name in ["a", "b", "a"] {
        let _ = client
            .get_subsystem(with(&token, pb::GetSubsystemRequest { name: name.into(), ..Default::default() }))
            .await;
    }
    client.unregister_subsystem(with(&token, pb::UnregisterSubsystemRequest { name: "b".into() })).await.unwrap_err();
    let request = pb::RunCycleRequest { request_id: "r".into(), ..Default::default() };
    for _ in 0..2 {
        client.run_cycle(with(&token, request.clone())).await.unwrap();
    }
    let events = stopped(stage).await;
    let expected = [
        ("GetStatus", "OK", 3, vec!["*"]),
        ("GetSubsystem", "NOT_FOUND", 1, vec!["b"]),
        ("GetSubsystem", "OK", 2, vec!["a"]),
        ("ListSubsystems", "OK", 3, vec!["*"]),
        ("RegisterSubsystem", "OK", 2, vec!["a"]),
        ("RenewLease", "OK", 3, vec!["a"]),
        ("RunCycle", "OK", 1, vec!["*"]),
        ("UnregisterSubsystem", "NOT_FOUND", 1, vec!["b"]),
    ];
    assert_eq!(sums(&events), expected);
    let changes: Vec<_> = events.iter().filter(|event| event.kind() == AuditKind::Change).cloned().collect();
    assert_eq!(brief(&changes), [("RegisterSubsystem", vec!["a"], 0), ("RunCycle", vec!["*"], 1)]);
    for event in &events {
        assert_eq!((event.caller.as_str(), event.peer.as_str()), ("token:ops", "127.0.0.1"), "{event:?}");
        assert!(event.time.is_some() && event.duration_ms.is_some(), "{event:?}");
        assert_eq!(event.request_digest.is_empty(), event.kind() == AuditKind::Calls, "{event:?}");
    }
}

#[tokio::test]
async fn calls_that_change_nothing_have_no_event_if_they_are_not_to_be_audited_or_callers_are_not_told_apart() {
    let without = Home::new().with_args(["--set", "audit.reads=off"]);
    for (home, mode, denials) in [(without, "enforce", 1), (Home::new(), "off", 0)] {
        let (stage, token) = with_token_at(home, mode, "ops").await;
        let mut client = orchestrator(&stage).await;
        client.get_status(with(&token, pb::GetStatusRequest::default())).await.unwrap();
        let denied = client.get_status(pb::GetStatusRequest::default()).await;
        assert_eq!(denied.is_err(), denials == 1);
        client.run_cycle(with(&token, pb::RunCycleRequest::default())).await.unwrap();
        let events = stopped(stage).await;
        assert_eq!(sums(&events).len(), denials, "{events:?}");
        assert_eq!(events.len(), denials + 1);
    }
}

#[tokio::test]
async fn a_stream_has_an_event_at_its_beginning_and_one_at_its_end() {
    let (stage, token) = with_token("enforce", "ops").await;
    let mut client = orchestrator(&stage).await;
    let until = async |count: usize| {
        let streams = async {
            loop {
                let all = events(&stage.home);
                let of_stream: Vec<_> = all.into_iter().filter(|event| event.rpc == "WatchCycles").collect();
                if of_stream.len() >= count {
                    return of_stream;
                }
                tokio::task::yield_now().await;
            }
        };
        patiently("the event of a stream", streams).await
    };
    let stream = client.watch_cycles(with(&token, pb::WatchCyclesRequest::default())).await.unwrap();
    let begun = until(1).await;
    assert_eq!((begun.len(), begun[0].code.as_str(), begun[0].count), (1, "", 1));
    drop(stream);
    let both = until(2).await;
    assert_eq!((both.len(), both[1].code.as_str(), both[1].count), (2, "CANCELLED", 1));
    assert!(both[1].duration_ms > both[0].duration_ms, "{both:?}");
    assert!(both.iter().all(|event| event.kind() == AuditKind::Calls && event.caller == "token:ops"));
}

/// Calls the service this number of times with a token. Returns the codes of the answers.
async fn call_often(stage: &Stage, token: &str, calls: usize) -> Vec<Code> {
    /// The service closes the connections of strangers after a while.
    const ON_A_CONNECTION: usize = 200;
    const AT_ONCE: usize = 50;
    let mut codes = Vec::new();
    for _ in 0..calls / ON_A_CONNECTION {
        let client = orchestrator(stage).await;
        let call = |_| {
            let mut client = client.clone();
            async move {
                let answer = client.get_status(with(token, pb::GetStatusRequest::default())).await;
                answer.map_or_else(|status| status.code(), |_| Code::Ok)
            }
        };
        codes.extend(stream::iter(0..ON_A_CONNECTION).map(call).buffer_unordered(AT_ONCE).collect::<Vec<_>>().await);
    }
    codes
}

/// So a flood of strangers slows others down no more than one of callers. How long calls of others take would say less:
/// here, the clients and the service share few processors.
#[tokio::test]
async fn a_denied_call_takes_no_more_time_of_the_processors_than_an_allowed_one() {
    const CALLS: usize = 1000;
    const ROUNDS: usize = 5;
    let (stage, token) = with_token("enforce", "ops").await;
    let (mut allowed, mut denied) = (0, 0);
    // The first round prepares connections, buffers and code.
    for round in 0..=ROUNDS {
        for (token, expected, spent) in
            [(token.as_str(), Code::Ok, &mut allowed), ("malformed", Code::Unauthenticated, &mut denied)]
        {
            let before = stage.service.processor_time();
            assert_eq!(call_often(&stage, token, CALLS).await, [expected; CALLS]);
            *spent += if round > 0 { stage.service.processor_time() - before } else { 0 };
        }
    }
    println!("{} calls took {allowed} ticks if allowed, and {denied} if denied", ROUNDS * CALLS);
    assert!(denied * 5 <= allowed * 6, "{denied} ticks, and {allowed} if allowed");
}

/// Strangers cost the service a sum for each network, RPC and reason.
#[tokio::test]
async fn denied_calls_add_up_and_take_no_memory() {
    const CALLS: usize = 10_000;
    const LOOKS: usize = 4;
    let (stage, _) = with_token("enforce", "ops").await;
    let denied = async |calls: usize| {
        let codes = call_often(&stage, "malformed", calls).await;
        assert!(codes.iter().all(|code| *code == Code::Unauthenticated), "{codes:?}");
    };
    // Before the first look at the memory, everything is in use. The allocator keeps up to 2 MiB for a while, so the
    // smallest of some looks counts.
    let least = async || {
        let mut least = u64::MAX;
        for _ in 0..LOOKS {
            denied(1000).await;
            least = least.min(stage.service.memory().0);
        }
        least
    };
    let before = least().await;
    denied(CALLS).await;
    let after = least().await;
    println!("{} KiB more after {CALLS} denied calls", after.saturating_sub(before) >> 10);
    assert!(after < before + (1 << 20), "{before} bytes before, {after} after");
    let events = stopped(stage).await;
    let denials: Vec<_> = events.iter().filter(|event| event.kind() == AuditKind::Denials).collect();
    assert_eq!(denials.iter().map(|event| event.count).sum::<u64>(), (2 * LOOKS * 1000 + CALLS) as u64);
    // One for each 10 seconds that this took.
    assert!(denials.len() <= 10, "{}", denials.len());
    for event in denials {
        let AuditEvent { rpc, reason, caller, peer, .. } = event;
        assert_eq!((&**rpc, &**reason), ("GetStatus", "CREDENTIAL_INVALID"));
        assert_eq!((&**caller, &**peer, event.decision()), ("nobody", "127.0.0.1", Decision::Denied));
    }
}

#[tokio::test]
async fn calls_beyond_a_limit_of_their_caller_are_summed_up() {
    const REFUSED: usize = 20;
    let home = Home::new();
    let texts = write_tokens(&home.path("tokens.toml"), &["a"]);
    let config = format!(
        "[access]\nmode = \"enforce\"\ntokens_file = \"{}\"
         [[access.grants]]\nwho = [\"token:a\"]\nrole = \"admin\"
         [limits]\nwatchers = 0",
        home.path("tokens.toml").display()
    );
    let stage = Stage::at(home.with_config(&config)).await;
    let mut client = orchestrator(&stage).await;
    for _ in 0..REFUSED {
        let request = with(&texts["a"].1, pb::WatchCyclesRequest::default());
        assert_eq!(client.watch_cycles(request).await.unwrap_err().code(), Code::ResourceExhausted);
    }
    let events = stopped(stage).await;
    let refused: Vec<_> = events.iter().filter(|event| event.reason == "CALLER_LIMIT").collect();
    assert_eq!(refused.iter().map(|event| event.count).sum::<u64>(), REFUSED as u64);
    // One for each 10 seconds that this took.
    assert!(refused.len() <= 2, "{refused:?}");
    let AuditEvent { rpc, caller, code, peer, .. } = refused[0];
    assert_eq!((&**rpc, &**caller, &**code), ("WatchCycles", "token:a", "RESOURCE_EXHAUSTED"));
    assert_eq!(
        (&**peer, refused[0].decision(), refused[0].kind()),
        ("127.0.0.1", Decision::Denied, AuditKind::Denials)
    );
}

#[tokio::test]
async fn denials_of_a_known_caller_name_it_and_its_targets() {
    let home = Home::new();
    let tokens = write_tokens(&home.path("tokens.toml"), &["a", "b", "wall"]);
    let config = format!(
        "[access]\nmode = \"enforce\"\ntokens_file = \"{}\"
         [[access.grants]]\nwho = [\"token:a\", \"token:b\"]\nrole = \"registrar\"\nsubsystems = [\"s\"]
         phases = [0, 10]\nendpoints = [\"http://*:*\"]
         [[access.grants]]\nwho = [\"token:wall\"]\nrole = \"viewer\"\nsubsystems = [\"*\"]",
        home.path("tokens.toml").display()
    );
    let stage = Stage::at(home.with_config(&config)).await;
    let mut client = orchestrator(&stage).await;
    let register =
        |name: &str| pb::RegisterSubsystemRequest { registration: Some(stage.registration(name)), lease: None };
    let token = |name: &str| tokens[name].1.clone();
    client.register_subsystem(with(&token("a"), register("s"))).await.unwrap();
    // By its grant, and by the owner.
    client.register_subsystem(with(&token("b"), register("other"))).await.unwrap_err();
    client.register_subsystem(with(&token("b"), register("s"))).await.unwrap_err();
    // The audit is for auditors, also one event of it.
    let mut ledger = Ledger::connect(format!("http://{}", stage.service.address())).await.unwrap();
    ledger.list_audit_events(with(&token("wall"), pb::ListAuditEventsRequest::default())).await.unwrap_err();
    let event = pb::GetInclusionProofRequest { event_leaf: Some(0), ..Default::default() };
    let refused = ledger.get_inclusion_proof(with(&token("wall"), event)).await.unwrap_err();
    assert!(refused.message().contains("for the audit"), "{refused:?}");
    let events = stopped(stage).await;
    let expected = [
        ("GetInclusionProof", "NOT_ALLOWED", 1, vec!["*"]),
        ("ListAuditEvents", "NOT_ALLOWED", 1, vec!["*"]),
        ("RegisterSubsystem", "NOT_ALLOWED", 2, vec!["other", "s"]),
    ];
    assert_eq!(sums(&events), expected);
    let callers: Vec<_> = events[1..].iter().map(|event| event.caller.as_str()).collect();
    assert_eq!(callers, ["token:b", "token:wall", "token:wall"]);
}

#[tokio::test]
async fn no_token_and_no_secret_is_in_the_database_or_in_the_log_and_each_event_is_copied_to_the_log() {
    let home = Home::new().with_log_format("json").with_args(["--set", "log.filter=debug"]);
    let (stage, token) = with_token_at(home, "enforce", "ops").await;
    let mut client = orchestrator(&stage).await;
    let secret = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("hunter2".into())) };
    let wrong = format!("orc_{}_{}", "0".repeat(16), "5".repeat(64));
    for credentials in [&token, &wrong] {
        // A secret that is not a part of the registration, but in a header or in a name that is refused.
        let mut request = with(credentials, pb::RenewLeaseRequest { name: "hunter2!".into() });
        request.metadata_mut().insert("x-secret", "hunter2".parse().unwrap());
        client.renew_lease(request).await.unwrap_err();
        let registration = pb::Registration { phase: 1 << 30, ..stage.registration("hunter2!") };
        let request = pb::RegisterSubsystemRequest { registration: Some(registration), lease: None };
        client.register_subsystem(with(credentials, request)).await.unwrap_err();
    }
    let parameters = prost_types::Struct { fields: [("key".to_owned(), secret)].into() }.encode_to_vec().into();
    let run = pb::RunCycleRequest { parameters, ..Default::default() };
    client.run_cycle(with(&token, run)).await.unwrap();
    client.get_status(with(&wrong, pb::GetStatusRequest::default())).await.unwrap_err();
    let logged = stage.home.logged("\"target\":\"audit\"", 1).await;
    let copied: serde_json::Value =
        serde_json::from_str(logged.lines().find(|line| line.contains("\"target\":\"audit\"")).unwrap()).unwrap();
    assert_eq!((&copied["rpc"], &copied["caller"]), (&"RunCycle".into(), &"token:ops".into()), "{copied}");

    let in_use = ["o.db", "o.db-wal"].map(|file| (file, fs::read(stage.home.path(file)).unwrap()));
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let left = ["o.db", "log"].map(|file| (file, fs::read(home.path(file)).unwrap()));
    let (_, text) = token.rsplit_once('_').unwrap();
    for secret in [text, &"5".repeat(64), "hunter2"] {
        for (file, bytes) in in_use.iter().chain(&left) {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{file} contains {secret}");
        }
    }
}
