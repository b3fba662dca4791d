//! The audit: each change of the service has one event, which says who made it, and each event its change.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{fs, os::unix::fs::PermissionsExt};

use common::{
    Stage,
    fleet::Run,
    patiently,
    service::{Client, Home, ms},
};
use orchestrator_core::{
    access::Token,
    config::tokens_text,
    model::Name,
    proto::orchestrator::v1::{self as pb, AuditEvent, CredentialKind, Decision},
};
use prost::Message;
use rustix::process::Signal;
use tonic::{
    Request,
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
    stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: one("a") }).await.unwrap();
    stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: one("a") }).await.unwrap();
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
        ("ResumeSubsystem", vec!["a"], 0),
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
    assert_eq!(events[5..9].iter().map(|event| event.revision).collect::<Vec<_>>(), [1, 2, 0, 3]);
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
    let home = Home::new();
    let (token, text) = Token::create(Name::parse(name).unwrap(), None).unwrap();
    let tokens = home.path("tokens.toml");
    fs::write(&tokens, tokens_text(&[token])).unwrap();
    fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).unwrap();
    let config = format!(
        "[access]\nmode = \"{mode}\"\ntokens_file = \"{}\"\n[[access.grants]]\nwho = [\"token:{name}\"]\nrole = \"admin\"",
        tokens.display()
    );
    (Stage::at(home.with_config(&config)).await, text)
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
