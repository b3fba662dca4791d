//! The registry: registrations by RPC and by the configuration file, leases, maintenance, snapshots.

use std::time::Duration;

use crate::common::{
    Stage,
    command::orchestrator,
    fleet::{Method, Run, from_struct, to_struct},
    http, patiently,
    service::{Client, Home, Reason, because, decode, invalid, ms, next_recorded, part, reason, registration},
};
use orchestrator_core::proto::{
    orchestrator::v1::{self as pb, BreakerState, CycleState, Origin, SkipReason, SubsystemState},
    subsystem::v1 as subsystem,
};
use rustix::process::Signal;
use serde_json::json;
use tokio::time::{sleep, timeout};
use tonic::{Code, Response, Status};

const NOWHERE: &str = "http://127.0.0.1:1";

async fn register(
    client: &mut Client,
    registration: pb::Registration,
) -> Result<pb::RegisterSubsystemResponse, Reason> {
    client.register(registration).await.map_err(|status| reason(&status))
}

async fn register_all(
    client: &mut Client,
    registrations: Vec<pb::Registration>,
    lease: Option<prost_types::Duration>,
) -> Result<pb::RegisterSubsystemsResponse, Reason> {
    let registered = client.register_subsystems(pb::RegisterSubsystemsRequest { registrations, lease }).await;
    registered.map(Response::into_inner).map_err(|status| reason(&status))
}

/// Number of durable commits of the service.
async fn commits(stage: &Stage) -> u64 {
    const COUNT: &str = "orchestrator_store_commit_duration_seconds_count{durability=\"durable\"} ";
    let metrics = http::get(stage.service.admin(), "/metrics").await.text().await;
    let line = metrics.lines().find(|line| line.starts_with(COUNT));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{metrics}"))
}

async fn lease(
    client: &mut Client,
    name: &str,
    lease: Option<prost_types::Duration>,
) -> Result<pb::SubsystemStatus, Status> {
    let registration = Some(registration(name, NOWHERE));
    let answer = client.register_subsystem(pb::RegisterSubsystemRequest { registration, lease }).await?;
    Ok(answer.into_inner().subsystem.unwrap())
}

async fn renew(client: &mut Client, name: &str) -> Result<prost_types::Timestamp, Reason> {
    let renewed = client.renew_lease(pb::RenewLeaseRequest { name: name.into() }).await;
    renewed.map(|answer| answer.into_inner().lease_expires_at.unwrap()).map_err(|status| reason(&status))
}

async fn suspend(client: &mut Client, name: &str) -> Result<pb::SubsystemStatus, Reason> {
    let suspended = client.suspend_subsystem(pb::SuspendSubsystemRequest { name: name.into() }).await;
    suspended.map(|answer| answer.into_inner().subsystem.unwrap()).map_err(|status| reason(&status))
}

async fn resume(client: &mut Client, name: &str) -> Result<pb::SubsystemStatus, Reason> {
    let resumed = client.resume_subsystem(pb::ResumeSubsystemRequest { name: name.into() }).await;
    resumed.map(|answer| answer.into_inner().subsystem.unwrap()).map_err(|status| reason(&status))
}

async fn unregister(client: &mut Client, name: &str) -> Result<(), Reason> {
    let gone = client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: name.into() }).await;
    gone.map(|_| ()).map_err(|status| reason(&status))
}

async fn registered(client: &mut Client) -> Vec<String> {
    let statuses = client.subsystems().await.unwrap();
    statuses.into_iter().map(|status| status.registration.unwrap().name).collect()
}

fn not_found(name: &str) -> Reason {
    because(Code::NotFound, "SUBSYSTEM_NOT_FOUND", [("subsystem", name)])
}

#[tokio::test]
async fn registering_is_an_idempotent_upsert_that_survives_restarts() {
    let mut stage = Stage::new().await;
    let first = pb::Registration { requires: vec!["b".into()], ..stage.registration("a") };
    let answer = register(&mut stage.client, first.clone()).await.unwrap();
    assert!(answer.created);
    let status = answer.subsystem.unwrap();
    assert_eq!((status.origin(), status.breaker(), status.suspended), (Origin::Rpc, BreakerState::Closed, false));
    assert_eq!((status.lease_expires_at, status.last_cycle_id, status.output_cycle_id), (None, 0, 0));
    // Every default is filled in.
    let shown = status.registration.unwrap();
    let expected = pb::Registration {
        timeout: ms(10_000),
        retry: Some(pb::RetryPolicy {
            max_attempts: 3,
            initial_backoff: ms(100),
            max_backoff: ms(1000),
            backoff_multiplier: 2.0,
            retryable_status_codes: vec!["UNAVAILABLE".into()],
        }),
        breaker: Some(pb::BreakerPolicy { failure_threshold: 5, open_for: ms(30_000), disabled: false }),
        limits: Some(pb::Limits {
            max_message_bytes: 4 << 20,
            max_output_bytes: 1 << 20,
            max_metrics: 64,
            max_issues: 32,
        }),
        ..first.clone()
    };
    assert_eq!(shown, expected);
    for again in [first, shown.clone()] {
        let answer = register(&mut stage.client, again).await.unwrap();
        assert_eq!((answer.created, answer.subsystem.unwrap().registration.as_ref()), (false, Some(&shown)));
    }
    let full = pb::Registration {
        phase: -7,
        requires: vec!["x".into()],
        after: vec!["y".into()],
        reads: vec!["a".into()],
        timeout: ms(1500),
        retry: Some(pb::RetryPolicy {
            max_attempts: 10,
            initial_backoff: ms(1),
            max_backoff: ms(3_600_000),
            backoff_multiplier: 1.5,
            retryable_status_codes: vec!["INTERNAL".into(), "DATA_LOSS".into()],
        }),
        breaker: Some(pb::BreakerPolicy { failure_threshold: 1000, open_for: ms(86_400_000), disabled: false }),
        critical: true,
        parameters: to_struct(&json!({ "nested": { "list": [1, "two", null, true] } })),
        limits: Some(pb::Limits { max_message_bytes: 1, max_output_bytes: 2, max_metrics: 3, max_issues: 4 }),
        record_output: true,
        ..stage.registration("a")
    };
    let answer = register(&mut stage.client, full.clone()).await.unwrap();
    assert_eq!((answer.created, answer.subsystem.unwrap().registration), (false, Some(full.clone())));
    for restart in ["stop", "kill"] {
        stage = if restart == "stop" { stage.restarted().await } else { stage.killed().await };
        let shown = stage.client.subsystem("a").await.unwrap().registration.unwrap();
        assert_eq!(from_struct(&shown.parameters), from_struct(&full.parameters), "{restart}");
        assert_eq!(pb::Registration { parameters: full.parameters.clone(), ..shown }, full, "{restart}");
    }
    unregister(&mut stage.client, "a").await.unwrap();
    let mut stage = stage.killed().await;
    assert!(registered(&mut stage.client).await.is_empty());
    assert!(register(&mut stage.client, full).await.unwrap().created);
}

#[tokio::test]
async fn a_circular_dependency_is_refused_and_named() {
    let mut stage = Stage::new().await;
    let ring = |names| because(Code::InvalidArgument, "ORDER_RING", [("ring", names)]);
    stage.register("a", |it| it.requires = vec!["b".into()]).await;
    stage.register("b", |it| it.after = vec!["c".into()]).await;
    let closes = pb::Registration { after: vec!["a".into()], ..stage.registration("c") };
    let status = stage.client.register(closes).await.unwrap_err();
    assert_eq!(reason(&status), ring("a,b,c"));
    assert!(status.message().contains("a requires b, b is after c, c is after a"), "{}", status.message());
    // Nothing has changed, and `reads` adds no order.
    assert_eq!(registered(&mut stage.client).await, ["a", "b"]);
    stage.register("c", |it| it.reads = vec!["a".into()]).await;
    let later = pb::Registration { phase: 3, ..stage.registration("c") };
    assert_eq!(register(&mut stage.client, later).await.unwrap_err(), ring("b,c"));
    let itself = pb::Registration { after: vec!["d".into()], ..stage.registration("d") };
    assert_eq!(register(&mut stage.client, itself).await.unwrap_err(), invalid(["registration.after"]));
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn a_circular_dependency_by_a_later_registration_is_refused_also_in_a_large_registry() {
    let mut stage = Stage::new().await;
    let name = |i: usize| format!("s{i:03}");
    let link =
        |i: usize, after: usize| pb::Registration { after: vec![name(after)], ..registration(&name(i), NOWHERE) };
    // More than are compared on the spot. Each waits for the next one.
    let chain: Vec<_> = (0..300).map(|i| link(i, i + 1)).collect();
    register_all(&mut stage.client, chain, None).await.unwrap();
    for closes in [0, 150, 299] {
        let refused = stage.client.register(link(300, closes)).await.unwrap_err();
        let Reason { why, metadata, .. } = reason(&refused);
        assert_eq!(why, "ORDER_RING");
        assert!(metadata["ring"].starts_with(&format!("{},", name(closes))), "{metadata:?}");
    }
    let open = pb::Registration { reads: vec![name(0)], ..registration(&name(300), NOWHERE) };
    stage.client.register(open).await.unwrap();
    // Each cycle has all subsystems that were registered before it.
    for last in 301..304 {
        stage.client.register(registration(&name(last), NOWHERE)).await.unwrap();
        let plan = stage.client.plan_cycle(pb::PlanCycleRequest::default()).await.unwrap().into_inner().plan.unwrap();
        assert_eq!((plan.subsystems.len(), plan.levels), (last + 1, 301));
    }
}

#[tokio::test]
async fn many_subsystems_are_registered_at_once_all_or_none_and_survive_a_restart() {
    let mut stage = Stage::new().await;
    let fleet = |n: usize| (0..n).map(|i| stage.registration(&format!("s{i:04}"))).collect::<Vec<_>>();
    let (all, one_more) = (fleet(1000), fleet(1001));
    let before = commits(&stage).await;
    let answer = register_all(&mut stage.client, all.clone(), None).await.unwrap();
    assert_eq!((answer.created.len(), answer.replaced.len()), (1000, 0));
    assert_eq!(answer.created[17], "s0017");
    assert_eq!(commits(&stage).await, before + 1);
    // The same again is not a change; one difference is.
    let mut stage = stage.killed().await;
    assert_eq!(registered(&mut stage.client).await.len(), 1000);
    assert_eq!(
        register_all(&mut stage.client, all.clone(), None).await.unwrap(),
        pb::RegisterSubsystemsResponse::default()
    );
    let changed = pb::Registration { critical: true, ..all[3].clone() };
    let answer = register_all(&mut stage.client, vec![all[2].clone(), changed], None).await.unwrap();
    assert_eq!((&answer.created[..], &answer.replaced[..]), (&[][..], &["s0003".to_owned()][..]));
    let [pb::Replacement { subsystem: Some(now), previous: Some(before) }] = &answer.replacements[..] else {
        panic!("{answer:?}")
    };
    let critical = |status: &pb::SubsystemStatus| status.registration.as_ref().unwrap().critical;
    assert!(critical(now) && !critical(before), "{answer:?}");

    let client = &mut stage.client;
    let refused = register_all(client, one_more, None).await.unwrap_err();
    assert_eq!(refused, invalid(["registrations"]));
    assert_eq!(register_all(client, vec![], None).await.unwrap_err(), invalid(["registrations"]));
    let named = |name: &str, endpoint: &str| registration(name, endpoint);
    let bad = vec![named("new", NOWHERE), named("b", "nowhere"), named("1", NOWHERE), named("new", NOWHERE)];
    let fields = ["registrations[1].endpoint", "registrations[2].name", "registrations[3].name"];
    assert_eq!(register_all(client, bad, None).await.unwrap_err(), invalid(fields));
    let waits = |name: &str, after: &str| pb::Registration { after: vec![after.into()], ..named(name, NOWHERE) };
    let ring = vec![named("new", NOWHERE), waits("b", "a"), waits("a", "b")];
    let refused = register_all(client, ring, None).await.unwrap_err();
    assert_eq!(refused, because(Code::InvalidArgument, "ORDER_RING", [("ring", "a,b")]));
    let refused = register_all(client, vec![named("new", NOWHERE)], ms(1)).await.unwrap_err();
    assert_eq!(refused, invalid(["lease"]));
    assert_eq!(registered(client).await.len(), 1000);
    // A reversed order is valid in whatever sequence its subsystems are given.
    register_all(client, vec![waits("a", "b"), named("b", NOWHERE)], None).await.unwrap();
    register_all(client, vec![waits("b", "a"), named("a", NOWHERE)], None).await.unwrap();
}

#[tokio::test]
async fn leases_that_expire_together_end_in_one_commit_also_after_a_restart() {
    let mut stage = Stage::new().await;
    let fleet: Vec<_> = (0..500).map(|i| stage.registration(&format!("s{i}"))).collect();
    for restart in [false, true] {
        let answer = register_all(&mut stage.client, fleet.clone(), ms(2000)).await.unwrap();
        assert_eq!(answer.created.len(), 500);
        if restart {
            stage = stage.restarted().await;
        }
        assert!(stage.client.subsystem("s7").await.unwrap().lease_expires_at.is_some());
        let before = commits(&stage).await;
        let ended = async { while !registered(&mut stage.client).await.is_empty() {} };
        patiently("the leases to end", ended).await;
        assert_eq!(commits(&stage).await, before + 1, "{restart}");
    }
}

#[tokio::test]
async fn the_memory_of_registrations_loops_and_last_parts_is_bounded() {
    // Registrations and loops have a sixteenth of the memory.
    let mut stage = Stage::at(Home::new().with_args(["--set", "memory.max_bytes=67108864"])).await;
    let large = to_struct(&json!({ "p": "x".repeat(60 << 10) }));
    let full = || because(Code::ResourceExhausted, "REGISTRY_FULL", []);
    let issues = subsystem::RunCycleResponse {
        issues: (0..30).map(|_| subsystem::Issue { message: "x".repeat(4 << 10), ..Default::default() }).collect(),
        ..Default::default()
    };
    stage.fleet.run("talks", Run::Answer(issues));
    stage.register("talks", |_| {}).await;
    let registration =
        |i: usize| pb::Registration { parameters: large.clone(), ..registration(&format!("s{i}"), NOWHERE) };
    let mut registered = 0;
    let refused = loop {
        match stage.client.register(registration(registered)).await {
            Ok(_) => registered += 1,
            Err(refused) => break refused,
        }
    };
    assert_eq!(reason(&refused), full());
    assert!((60..70).contains(&registered), "{registered}");
    assert!(refused.message().contains("the limit of 4 MiB for registrations and loops"), "{}", refused.message());
    let many = (100..103).map(registration).collect();
    assert_eq!(register_all(&mut stage.client, many, None).await.unwrap_err(), full());
    let interval_loop =
        pb::IntervalLoop { name: "l".into(), interval: ms(3_600_000), parameters: large.clone(), ..Default::default() };
    let start = |interval_loop: &pb::IntervalLoop| pb::StartIntervalLoopRequest { r#loop: Some(interval_loop.clone()) };
    let refused = stage.client.start_interval_loop(start(&interval_loop)).await.unwrap_err();
    assert_eq!(reason(&refused), full());

    // The record has the issues, which the status does not keep.
    let request = pb::RunCycleRequest { subsystems: vec!["talks".into()], ..Default::default() };
    let cycle = stage.client.run_with(request.clone()).await.unwrap();
    assert_eq!(part(&cycle, "talks").issues.len(), 30);
    let last = stage.client.subsystem("talks").await.unwrap().last.unwrap();
    assert_eq!((last.state(), last.issues.len()), (SubsystemState::Succeeded, 0));

    // Removed subsystems free their memory.
    for gone in ["s0", "s1", "s2"] {
        unregister(&mut stage.client, gone).await.unwrap();
    }
    stage.client.run_with(request).await.unwrap();
    assert_eq!(stage.client.subsystem("talks").await.unwrap().last.unwrap().issues.len(), 30);
    stage.client.start_interval_loop(start(&interval_loop)).await.unwrap();
    let registered_now = stage.client.status().await.unwrap().subsystem_count;
    let mut stage = stage.restarted().await;
    assert_eq!(registered_now, stage.client.status().await.unwrap().subsystem_count);
}

#[tokio::test]
async fn the_last_part_of_a_subsystem_is_known_after_a_restart() {
    let mut stage = Stage::new().await;
    stage.register_all(&["often", "rarely", "never"]).await;
    stage.register("skipped", |it| it.requires = vec!["nobody".into()]).await;
    stage.register("talks", |it| it.record_output = true).await;
    stage.fleet.run("rarely", Run::fail(Code::Internal));
    stage.fleet.run("talks", Run::issues(2));
    let mut cycles = Vec::new();
    for names in [&["rarely", "skipped"][..], &["talks"], &["often"], &["often"]] {
        let subsystems = names.iter().map(|&name| name.into()).collect();
        cycles.push(stage.client.run_with(pb::RunCycleRequest { subsystems, ..Default::default() }).await.unwrap());
    }
    for restart in ["kill", "stop"] {
        stage = if restart == "kill" { stage.killed().await } else { stage.restarted().await };
        for (name, cycle) in [("rarely", 0), ("skipped", 0), ("talks", 1), ("often", 3)] {
            let (cycle, found) = (&cycles[cycle], stage.client.subsystem(name).await.unwrap());
            assert_eq!((found.last.as_ref(), found.last_cycle_id), (Some(part(cycle, name)), cycle.cycle_id), "{name}");
        }
        assert_eq!(stage.client.subsystem("never").await.unwrap().last, None);
        // They were counted by the process that ran them.
        let metrics = http::get(stage.service.admin(), "/metrics").await.text().await;
        assert!(!metrics.contains("orchestrator_subsystem_up{"), "{metrics}");
    }
}

#[tokio::test]
async fn every_bad_field_is_named_by_its_path() {
    let mut stage = Stage::new().await;
    let names = |n: usize| (0..n).map(|i| format!("n{i}")).collect::<Vec<_>>();
    let good = || registration("a", NOWHERE);
    let bad = pb::Registration {
        name: "9".into(),
        endpoint: "nowhere".into(),
        phase: 1_000_001,
        requires: vec!["a b".into()],
        after: vec!["x".into(), "x".into()],
        reads: vec![String::new()],
        timeout: ms(0),
        retry: Some(pb::RetryPolicy {
            max_attempts: 11,
            initial_backoff: ms(3_600_001),
            max_backoff: ms(3_600_001),
            backoff_multiplier: 0.5,
            retryable_status_codes: vec!["INTERNAL".into(), "OK".into(), "CANCELLED".into(), "14".into()],
        }),
        breaker: Some(pb::BreakerPolicy { failure_threshold: 1001, open_for: ms(86_400_001), disabled: false }),
        limits: Some(pb::Limits {
            max_message_bytes: (64 << 20) + 1,
            max_output_bytes: (64 << 20) + 1,
            max_metrics: 4097,
            max_issues: 1025,
        }),
        ..Default::default()
    };
    let mut fields = register(&mut stage.client, bad).await.unwrap_err().fields;
    fields.sort();
    let expected = [
        "after[1]",
        "breaker.failure_threshold",
        "breaker.open_for",
        "endpoint",
        "limits.max_issues",
        "limits.max_message_bytes",
        "limits.max_metrics",
        "limits.max_output_bytes",
        "name",
        "phase",
        "reads[0]",
        "requires[0]",
        "retry.backoff_multiplier",
        "retry.initial_backoff",
        "retry.max_attempts",
        "retry.max_backoff",
        "retry.retryable_status_codes[1]",
        "retry.retryable_status_codes[2]",
        "retry.retryable_status_codes[3]",
        "timeout",
    ];
    assert_eq!(fields, expected.map(|field| format!("registration.{field}")));

    let no_duration = Some(prost_types::Duration { seconds: 1, nanos: -1 });
    let lowest = Some(prost_types::Duration { seconds: i64::MIN, nanos: 0 });
    let cases = [
        (pb::Registration { name: "a".repeat(64), ..good() }, "name"),
        (pb::Registration { timeout: no_duration, ..good() }, "timeout"),
        (pb::Registration { timeout: lowest, ..good() }, "timeout"),
        (pb::Registration { timeout: ms(86_400_001), ..good() }, "timeout"),
        (pb::Registration { timeout: ms(-1), ..good() }, "timeout"),
        (pb::Registration { reads: names(1025), ..good() }, "reads"),
        (pb::Registration { parameters: b"\xff".as_slice().into(), ..good() }, "parameters"),
        (pb::Registration { parameters: to_struct(&json!({ "p": "x".repeat(64 << 10) })), ..good() }, "parameters"),
        (pb::Registration { endpoint: "unix:relative".into(), ..good() }, "endpoint"),
        (
            pb::Registration {
                retry: Some(pb::RetryPolicy { initial_backoff: ms(2000), max_backoff: ms(1000), ..Default::default() }),
                ..good()
            },
            "retry.max_backoff",
        ),
        (
            pb::Registration {
                retry: Some(pb::RetryPolicy { backoff_multiplier: f64::NAN, ..Default::default() }),
                ..good()
            },
            "retry.backoff_multiplier",
        ),
    ];
    for (registration, field) in cases {
        let refused = register(&mut stage.client, registration).await.unwrap_err();
        assert_eq!(refused, invalid([&*format!("registration.{field}")]));
    }
    let nothing = pb::RegisterSubsystemRequest::default();
    let refused = stage.client.register_subsystem(nothing).await.unwrap_err();
    assert_eq!(reason(&refused), invalid(["registration"]));
    for length in [999, 86_400_001] {
        let refused = lease(&mut stage.client, "a", ms(length)).await.unwrap_err();
        assert_eq!(reason(&refused), invalid(["lease"]));
    }
    assert!(registered(&mut stage.client).await.is_empty());
    let largest = pb::Registration { name: "a".repeat(63), reads: names(1024), timeout: ms(1), ..good() };
    register(&mut stage.client, largest).await.unwrap();
    // Names in other requests are checked in the same way.
    let client = &mut stage.client;
    let refused = [
        unregister(client, "").await.unwrap_err(),
        suspend(client, "a b").await.unwrap_err(),
        resume(client, "1").await.unwrap_err(),
        renew(client, "").await.unwrap_err(),
        reason(&client.subsystem("").await.unwrap_err()),
    ];
    assert!(refused.iter().all(|refused| *refused == invalid(["name"])), "{refused:?}");
}

#[tokio::test]
async fn a_long_refusal_fits_the_limits_of_clients() {
    // The limit of trailers in Java's gRPC; others accept more.
    const MAX_TRAILERS: usize = 8 << 10;
    let mut stage = Stage::new().await;
    let fits = |refused: &Status| {
        let escaped: usize = refused.message().bytes().map(|byte| if byte.is_ascii_graphic() { 1 } else { 3 }).sum();
        let trailers = escaped + refused.details().len().div_ceil(3) * 4;
        assert!(trailers < MAX_TRAILERS, "{trailers}: {refused:?}");
    };
    for letter in ["9", "ß", "\u{10ffff}"] {
        let bad = |i| format!("{}{i}", letter.repeat(60));
        let after = (0..100).map(bad).collect();
        let endpoint = letter.repeat(1000 / letter.len());
        let refused =
            stage.client.register(pb::Registration { endpoint, after, ..registration("a", "") }).await.unwrap_err();
        fits(&refused);
        let Reason { why, fields, .. } = reason(&refused);
        assert_eq!((why.as_str(), &*fields[0]), ("INVALID_FIELDS", "registration.endpoint"));
        assert!(fields.len() > 1, "{fields:?}");
    }
    let name = |i: usize| format!("{}{i}", "n".repeat(60));
    let link =
        |i: usize, after: usize| pb::Registration { after: vec![name(after)], ..registration(&name(i), NOWHERE) };
    for i in 0..200 {
        register(&mut stage.client, link(i, i + 1)).await.unwrap();
    }
    let refused = stage.client.register(link(200, 0)).await.unwrap_err();
    fits(&refused);
    let Reason { why, metadata, .. } = reason(&refused);
    assert_eq!(why, "ORDER_RING");
    assert!(metadata["ring"].split(',').all(|name| name.len() >= 61), "{metadata:?}");
}

#[tokio::test]
async fn numbers_in_parameters_survive_a_restart_to_the_last_bit() {
    // A fast but inexact parser of decimals misreads the first numbers.
    let numbers =
        json!({ "numbers": [393.353_623_069_839_56, 943.994_899_123_776_9, 0.003_469_308_845_626_216_6, -0.0] });
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.parameters = to_struct(&numbers)).await;
    let before = stage.client.subsystem("a").await.unwrap().registration;
    let mut stage = stage.killed().await;
    assert_eq!(stage.client.subsystem("a").await.unwrap().registration, before);
}

#[tokio::test]
async fn the_same_parameters_in_another_order_are_not_a_change() {
    let mut stage = Stage::new().await;
    // On the wire, a map may come in any order, and with entries that later ones replace.
    let [a, b, outdated] = [json!({ "a": 1 }), json!({ "b": [{}] }), json!({ "b": 7 })].map(|one| to_struct(&one));
    let with = |parameters: [&[u8]; 3]| {
        vec![pb::Registration { parameters: parameters.concat().into(), ..registration("s", NOWHERE) }]
    };
    let client = &mut stage.client;
    assert_eq!(register_all(client, with([&outdated, &a, &b]), None).await.unwrap().created, ["s"]);
    let unchanged = pb::RegisterSubsystemsResponse::default();
    assert_eq!(register_all(client, with([&outdated, &b, &a]), None).await.unwrap(), unchanged);
    assert_eq!(register_all(client, with([&a, &b, b""]), None).await.unwrap(), unchanged);
    assert_eq!(register_all(client, with([&a, &outdated, b""]), None).await.unwrap().replaced, ["s"]);
}

#[tokio::test]
async fn an_unregistered_name_is_not_found() {
    let mut stage = Stage::new().await;
    let client = &mut stage.client;
    let refused = [
        unregister(client, "x").await.unwrap_err(),
        suspend(client, "x").await.unwrap_err(),
        resume(client, "x").await.unwrap_err(),
        renew(client, "x").await.unwrap_err(),
        reason(&client.subsystem("x").await.unwrap_err()),
    ];
    assert!(refused.iter().all(|refused| *refused == not_found("x")), "{refused:?}");
}

#[tokio::test]
async fn a_lease_ends_unless_it_is_renewed() {
    let mut stage = Stage::new().await;
    let client = &mut stage.client;
    let far = |status: &pb::SubsystemStatus| status.lease_expires_at.unwrap().seconds;
    let long = lease(client, "long", ms(3_600_000)).await.unwrap();
    lease(client, "none", None).await.unwrap();
    lease(client, "short", ms(1000)).await.unwrap();
    let no_lease = because(Code::FailedPrecondition, "NO_LEASE", [("subsystem", "none")]);
    assert_eq!(renew(client, "none").await.unwrap_err(), no_lease);
    assert!(renew(client, "long").await.unwrap().seconds >= far(&long));
    // The same registration renews it, too, and can change its length.
    assert!(far(&lease(client, "long", ms(3_600_000)).await.unwrap()) >= far(&long));
    let longer = lease(client, "long", ms(7_200_000)).await.unwrap();
    assert!(far(&longer) > far(&long) + 3000);
    assert!(lease(client, "long", None).await.unwrap().lease_expires_at.is_none());

    // A lease ends only by time, and a renewal in time keeps it.
    let renewing = async {
        loop {
            renew(client, "short").await.unwrap();
        }
    };
    assert!(timeout(Duration::from_millis(1300), renewing).await.is_err());
    while registered(client).await.contains(&"short".to_owned()) {}
    assert_eq!(renew(client, "short").await.unwrap_err(), not_found("short"));
    let mut stage = stage.restarted().await;
    assert_eq!(registered(&mut stage.client).await, ["long", "none"]);
}

#[tokio::test]
async fn no_lease_ends_while_the_process_is_stopped() {
    let mut stage = Stage::new().await;
    lease(&mut stage.client, "a", ms(2000)).await.unwrap();
    let suspend = pb::SuspendSubsystemRequest { name: "a".into() };
    stage.client.suspend_subsystem(suspend).await.unwrap();
    stage.service.signal(Signal::STOP);
    // A process that is stopped does nothing that could be awaited.
    sleep(Duration::from_secs(4)).await;
    stage.service.signal(Signal::CONT);
    renew(&mut stage.client, "a").await.unwrap();
    assert!(stage.client.subsystem("a").await.unwrap().suspended, "it is the same registration");
    stage.home.logged("did not run for a while", 1).await;
    patiently("the end of the lease", async { while registered(&mut stage.client).await.contains(&"a".to_owned()) {} })
        .await;
}

#[tokio::test]
async fn expected_subsystems_that_are_not_registered_are_told_by_the_record_the_plan_and_the_status() {
    let expecting = |names: &str| format!("[registry]\nexpected = [{names}]\n");
    let mut stage = Stage::at(Home::new().with_config(&expecting(r#""gone", "here", "never""#))).await;
    stage.register("here", |_| {}).await;
    stage.register("other", |_| {}).await;
    lease(&mut stage.client, "gone", ms(1000)).await.unwrap();
    // Its process has died, and its lease runs out.
    patiently("the end of the lease", async {
        while registered(&mut stage.client).await.contains(&"gone".to_owned()) {}
    })
    .await;
    let missing = |cycle: &pb::CycleTelemetry| -> Vec<_> {
        let skipped = cycle.subsystems.iter().filter(|it| it.skip_reason() == SkipReason::NotRegistered);
        skipped.map(|it| (it.name.clone(), it.state(), it.error_message.clone())).collect()
    };
    let is = |name: &str| {
        let message = "it is expected, but it is not registered".to_owned();
        (name.to_owned(), SubsystemState::Skipped, message)
    };
    let cycle = stage.client.run().await.unwrap();
    assert_eq!((cycle.state(), missing(&cycle)), (CycleState::Degraded, vec![is("gone"), is("never")]));
    let error = "2 of 4 failed: gone skipped: it is expected, but it is not registered; never skipped";
    assert!(cycle.error.starts_with(error), "{}", cycle.error);
    assert_eq!(decode(stage.client.history().await.unwrap().pop().unwrap()), cycle);
    // A cycle over some subsystems expects only these.
    let subset = pb::RunCycleRequest { subsystems: vec!["here".into()], ..pb::RunCycleRequest::default() };
    assert_eq!(stage.client.run_with(subset).await.unwrap().state(), CycleState::Succeeded);

    let status = stage.client.status().await.unwrap();
    assert_eq!((status.missing_count, status.missing), (2, vec!["gone".to_owned(), "never".to_owned()]));
    let metrics = http::get(stage.service.admin(), "/metrics").await.text().await;
    assert!(metrics.contains("\norchestrator_subsystems_missing 2\n"), "{metrics}");
    let address = stage.service.address().to_string();
    let (code, said) = orchestrator(None, &["status", "--address", &address]).await;
    let told = "gone, never, which are expected (registry.expected) and not registered";
    assert!(code == 0 && said.contains("MISSING") && said.contains(told), "{said}");
    let (code, said) = orchestrator(None, &["plan", "--address", &address]).await;
    assert!(code == 0 && said.matches("not registered").count() == 2, "{said}");

    // A registration ends it, and so does a reload of the file.
    stage.register("gone", |_| {}).await;
    assert_eq!(missing(&stage.client.run().await.unwrap()), [is("never")]);
    std::fs::write(stage.home.path("orchestrator.toml"), expecting("\"here\"")).unwrap();
    stage.service.signal(Signal::HUP);
    stage.home.logged("reloaded", 1).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!((cycle.state(), cycle.subsystems.len()), (CycleState::Succeeded, 3), "{cycle:?}");
    assert_eq!(stage.client.status().await.unwrap().missing_count, 0);
    let unregister = pb::UnregisterSubsystemRequest { name: "here".into() };
    stage.client.unregister_subsystem(unregister).await.unwrap();
    // The same after a restart, by the file alone.
    let mut stage = stage.restarted().await;
    assert_eq!(missing(&stage.client.run().await.unwrap()), [is("here")]);
}

#[tokio::test]
async fn a_restart_renews_leases_for_their_full_length() {
    let mut stage = Stage::new().await;
    let before = lease(&mut stage.client, "a", ms(3_600_000)).await.unwrap().lease_expires_at.unwrap();
    let mut stage = stage.killed().await;
    let after = stage.client.subsystem("a").await.unwrap().lease_expires_at.unwrap();
    assert!((after.seconds, after.nanos) > (before.seconds, before.nanos));
    // A subsystem with a lease takes part like any other.
    assert_eq!(stage.client.run().await.unwrap().subsystems.len(), 1);
}

#[tokio::test]
async fn a_suspended_subsystem_stays_registered_and_out_of_cycles_also_after_a_restart() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.client.run().await.unwrap();
    for _ in 0..2 {
        assert!(suspend(&mut stage.client, "a").await.unwrap().suspended);
    }
    // A new registration does not end the suspension.
    stage.register("a", |it| it.critical = true).await;
    let mut stage = stage.killed().await;
    let status = stage.client.subsystem("a").await.unwrap();
    assert!(status.suspended && status.registration.unwrap().critical);
    let cycle = stage.client.run().await.unwrap();
    assert_eq!((cycle.state(), part(&cycle, "a").skip_reason()), (CycleState::Succeeded, SkipReason::Suspended));
    for _ in 0..2 {
        assert!(!resume(&mut stage.client, "a").await.unwrap().suspended);
    }
    let mut stage = stage.restarted().await;
    assert_eq!(part(&stage.client.run().await.unwrap(), "a").state(), SubsystemState::Succeeded);
    assert_eq!(stage.fleet.runs("a").len(), 2);
}

#[tokio::test]
async fn declared_subsystems_are_changed_only_in_the_configuration() {
    let fleet = crate::common::fleet::Fleet::start().await;
    let config = format!("[[subsystems]]\nname = \"declared\"\nendpoint = \"{}\"\n", fleet.endpoint());
    let home = Home::new().with_config(&config);
    let mut stage = Stage::at(home).await;
    let refused = because(Code::FailedPrecondition, "DECLARED_IN_CONFIG", [("name", "declared")]);
    let same = registration("declared", fleet.endpoint());
    assert_eq!(register(&mut stage.client, same).await.unwrap_err(), refused);
    assert_eq!(unregister(&mut stage.client, "declared").await.unwrap_err(), refused);
    assert_eq!(stage.client.subsystem("declared").await.unwrap().origin(), Origin::Config);
    assert_eq!(renew(&mut stage.client, "declared").await.unwrap_err().why, "NO_LEASE");
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    assert_eq!(fleet.runs("declared").len(), 1);
    // A declared subsystem can be suspended, and a restart keeps that.
    suspend(&mut stage.client, "declared").await.unwrap();
    let mut stage = stage.killed().await;
    assert!(stage.client.subsystem("declared").await.unwrap().suspended);
    let status = resume(&mut stage.client, "declared").await.unwrap();
    assert_eq!(status.output_cycle_id, 1);
}

#[tokio::test]
async fn a_declaration_replaces_a_registration_by_rpc_and_a_removed_one_is_forgotten() {
    let mut stage = Stage::at(Home::new().with_config("")).await;
    stage.register("a", |it| it.critical = true).await;
    stage.client.run().await.unwrap();
    let declared = format!("[[subsystems]]\nname = \"a\"\nendpoint = \"{}\"\n", stage.fleet.endpoint());
    std::fs::write(stage.home.path("orchestrator.toml"), declared).unwrap();
    let mut stage = stage.restarted().await;
    let status = stage.client.subsystem("a").await.unwrap();
    assert_eq!((status.origin(), status.output_cycle_id), (Origin::Config, 1));
    assert!(!status.registration.unwrap().critical);
    std::fs::write(stage.home.path("orchestrator.toml"), "").unwrap();
    let mut stage = stage.restarted().await;
    assert!(registered(&mut stage.client).await.is_empty());
    // Its output was removed with it.
    stage.register("a", |_| {}).await;
    assert_eq!(stage.client.subsystem("a").await.unwrap().output_cycle_id, 0);
}

#[tokio::test]
async fn unregistering_removes_the_output_and_a_running_cycle_keeps_its_subsystems() {
    let mut stage = Stage::new().await;
    stage.register("maker", |_| {}).await;
    stage.register("reader", |it| (it.phase, it.reads) = (1, vec!["maker".into()])).await;
    stage.client.run().await.unwrap();
    assert_eq!(stage.client.subsystem("maker").await.unwrap().output_cycle_id, 1);
    let mut cycles = stage.client.watch_after(1).await.unwrap();
    stage.fleet.run("maker", Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("maker", 2).await;
    unregister(&mut stage.client, "maker").await.unwrap();
    stage.fleet.run("maker", Run::Echo);
    let cycle = decode(next_recorded(&mut cycles).await);
    assert_eq!((cycle.cycle_id, part(&cycle, "maker").state()), (2, SubsystemState::Succeeded));
    // This process and the next one forget it all the same.
    stage.client.run().await.unwrap();
    let input = |stage: &Stage| stage.fleet.runs("reader").pop().unwrap().inputs["maker"].clone();
    assert_eq!(input(&stage).freshness, subsystem::Freshness::Absent);
    let mut stage = stage.restarted().await;
    stage.register("maker", |it| it.phase = 2).await;
    stage.client.run().await.unwrap();
    assert_eq!(input(&stage).freshness, subsystem::Freshness::Absent);
}

#[tokio::test]
async fn the_registry_is_bounded_and_listed_by_pages() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "registry.max_subsystems=5"])).await;
    for name in ["c", "a", "e", "b", "d"] {
        stage.register(name, |_| {}).await;
    }
    let full = because(Code::ResourceExhausted, "REGISTRY_FULL", []);
    let one_more = stage.registration("f");
    assert_eq!(register(&mut stage.client, one_more.clone()).await.unwrap_err(), full);
    // An existing subsystem can be changed, and a removed one makes room for another.
    stage.register("a", |it| it.critical = true).await;
    unregister(&mut stage.client, "e").await.unwrap();
    register(&mut stage.client, one_more).await.unwrap();
    assert_eq!(stage.client.status().await.unwrap().subsystem_count, 5);

    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListSubsystemsRequest { page_size: 2, page_token };
        let page = stage.client.list_subsystems(request).await.unwrap().into_inner();
        let names = page.subsystems.into_iter().map(|status| status.registration.unwrap().name);
        pages.push(names.collect::<Vec<_>>().concat());
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, ["ab", "cd", "f"]);
    for (request, field) in [
        (pb::ListSubsystemsRequest { page_size: 1001, ..Default::default() }, "page_size"),
        (pb::ListSubsystemsRequest { page_token: "no token".into(), ..Default::default() }, "page_token"),
    ] {
        let refused = stage.client.list_subsystems(request).await.unwrap_err();
        assert_eq!(reason(&refused), invalid([field]));
    }
}

#[tokio::test]
async fn a_subsystem_with_many_issues_does_not_hide_the_others() {
    let mut stage = Stage::new().await;
    let issue = subsystem::Issue { severity: 1, code: "C".into(), message: "m".repeat(4 << 10) };
    stage.fleet.run("b", Run::Answer(subsystem::RunCycleResponse { issues: vec![issue; 1024], ..Default::default() }));
    stage.register_all(&["a", "c"]).await;
    let limits = pb::Limits { max_issues: 1024, max_message_bytes: 8 << 20, ..Default::default() };
    stage.register("b", |it| it.limits = Some(limits)).await;
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    assert_eq!(registered(&mut stage.client).await, ["a", "b", "c"]);
    let request = pb::ListSubsystemsRequest::default();
    let page = stage.client.list_subsystems(request).await.unwrap().into_inner();
    assert!(prost::Message::encoded_len(&page) <= 3 << 20);
}

#[tokio::test]
async fn snapshots_are_current_and_a_missing_one_has_a_reason() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.client.register(registration("nowhere", NOWHERE)).await.unwrap();
    let request =
        |name: &str| pb::GetSubsystemRequest { name: name.into(), include_snapshot: true, ..Default::default() };
    let status = stage.client.get_subsystem(request("a")).await.unwrap().into_inner().subsystem.unwrap();
    assert_eq!((from_struct(&status.snapshot), status.snapshot_error.as_str()), (json!({ "name": "a" }), ""));
    assert!(status.output.is_empty());
    let status = stage.client.get_subsystem(request("nowhere")).await.unwrap().into_inner().subsystem.unwrap();
    assert!(status.snapshot.is_empty() && status.snapshot_error.starts_with("UNAVAILABLE: "), "{status:?}");
    assert_eq!(stage.fleet.calls().len(), 1);
    assert_eq!(stage.fleet.calls()[0].method, Method::GetStatus);

    // A snapshot has the limit of an output.
    stage.register("terse", |it| it.limits = Some(pb::Limits { max_output_bytes: 10, ..Default::default() })).await;
    let status = stage.client.get_subsystem(request("terse")).await.unwrap().into_inner().subsystem.unwrap();
    assert!(status.snapshot.is_empty() && status.snapshot_error.starts_with("RESOURCE_EXHAUSTED: "), "{status:?}");
    unregister(&mut stage.client, "terse").await.unwrap();

    // The status has snapshots on request.
    stage.fleet.clear_calls();
    let ask = |include_subsystems, include_snapshots| pb::GetStatusRequest {
        include_subsystems,
        include_snapshots,
        omit_last_cycle: false,
    };
    for (request, subsystems, snapshots) in
        [(ask(false, false), 0, 0), (ask(true, false), 2, 0), (ask(false, true), 2, 1)]
    {
        let status = stage.client.get_status(request).await.unwrap().into_inner().status.unwrap();
        assert_eq!(status.subsystems.len(), subsystems);
        assert_eq!(status.subsystems.iter().filter(|it| !it.snapshot.is_empty()).count(), snapshots);
    }
    assert_eq!(stage.fleet.calls().len(), 1);
}

/// The handler of a request is dropped when its caller goes away, at whichever step it is.
#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_change_half_done() {
    let mut stage = Stage::new().await;
    for i in 0..150_u64 {
        let mut client = stage.client.clone();
        let registration = registration(&format!("s{i:03}"), NOWHERE);
        let _ = timeout(Duration::from_micros(i * 20), client.register(registration)).await;
    }
    // Unfinished registrations come first: each waits for its turn, as this one does.
    let mut before = Vec::new();
    for phase in 1.. {
        stage.register("last", |it| it.phase = phase).await;
        let now = registered(&mut stage.client).await;
        if now == before {
            break;
        }
        before = now;
    }
    let mut stage = stage.killed().await;
    assert_eq!(registered(&mut stage.client).await, before);
}
