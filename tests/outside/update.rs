//! Changes of registrations by UpdateSubsystem: the fields of a mask, and nothing else.

use crate::common::{
    Stage,
    fleet::{from_struct, to_struct},
    http,
    service::{Client, Home, Reason, because, invalid, ms, reason, registration},
};
use orchestrator_core::proto::orchestrator::v1 as pb;
use serde_json::json;
use tonic::{Code, Status};

const NOWHERE: &str = "http://127.0.0.1:1";

/// Asks to change the fields with these paths to the values that `set` gives.
fn request(name: &str, paths: &[&str], set: impl FnOnce(&mut pb::Registration)) -> pb::UpdateSubsystemRequest {
    let mut values = registration(name, "");
    set(&mut values);
    let paths = paths.iter().map(ToString::to_string).collect();
    let update_mask = Some(prost_types::FieldMask { paths });
    pb::UpdateSubsystemRequest { registration: Some(values), update_mask, etag: String::new() }
}

async fn send(client: &mut Client, request: pb::UpdateSubsystemRequest) -> Result<pb::UpdateSubsystemResponse, Status> {
    Ok(client.update_subsystem(request).await?.into_inner())
}

async fn update(
    client: &mut Client,
    name: &str,
    paths: &[&str],
    set: impl FnOnce(&mut pb::Registration),
) -> Result<pb::UpdateSubsystemResponse, Reason> {
    send(client, request(name, paths, set)).await.map_err(|status| reason(&status))
}

/// The registration of `a`.
async fn registered(client: &mut Client) -> pb::Registration {
    client.subsystem("a").await.unwrap().registration.unwrap()
}

/// Number of durable commits of the service.
async fn commits(stage: &Stage) -> u64 {
    const COUNT: &str = "orchestrator_store_commit_duration_seconds_count{durability=\"durable\"} ";
    let metrics = http::get(stage.service.admin(), "/metrics").await.text().await;
    let line = metrics.lines().find(|line| line.starts_with(COUNT));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{metrics}"))
}

#[tokio::test]
async fn the_fields_of_the_mask_are_changed_in_one_commit_and_others_stay_also_after_a_restart() {
    let mut stage = Stage::new().await;
    stage
        .register("a", |it| {
            it.phase = 7;
            it.requires = vec!["x".into(), "y".into()];
            it.reads = vec!["z".into()];
            it.timeout = ms(1000);
            it.retry = Some(pb::RetryPolicy { max_attempts: 7, initial_backoff: ms(20), ..Default::default() });
            it.critical = true;
            it.parameters = to_struct(&json!({ "limit": 1, "gone": true, "a.b": 2, "kept": { "deep": [1] } }));
        })
        .await;
    let before = registered(&mut stage.client).await;
    let commits_before = commits(&stage).await;

    let paths = [
        "timeout",
        "requires",
        "retry.max_attempts",
        "critical",
        "parameters.limit",
        "parameters.gone",
        "parameters.a.b",
    ];
    let set = |it: &mut pb::Registration| {
        it.timeout = ms(4000);
        it.requires = vec!["y".into()];
        it.retry = Some(pb::RetryPolicy { max_attempts: 2, initial_backoff: ms(9000), ..Default::default() });
        it.parameters = to_struct(&json!({ "limit": 5, "a.b": 3, "not in the mask": 1 }));
        it.phase = 99;
    };
    let changed = update(&mut stage.client, "a", &paths, set).await.unwrap();
    let mut expected = pb::Registration {
        timeout: ms(4000),
        requires: vec!["y".into()],
        critical: false,
        parameters: to_struct(&json!({ "limit": 5, "a.b": 3, "kept": { "deep": [1] } })),
        ..before.clone()
    };
    expected.retry.as_mut().unwrap().max_attempts = 2;
    let parameters = |of: &pb::Registration| from_struct(&of.parameters);
    let (after, previous) = (changed.subsystem.unwrap(), changed.previous.unwrap());
    let now = after.registration.unwrap();
    assert_eq!(parameters(&now), parameters(&expected));
    assert_eq!(pb::Registration { parameters: expected.parameters.clone(), ..now.clone() }, expected);
    assert_eq!(previous.registration, Some(before));
    assert_ne!(after.etag, previous.etag);
    assert_eq!(commits(&stage).await, commits_before + 1);

    let mut stage = stage.killed().await;
    let status = stage.client.subsystem("a").await.unwrap();
    assert_eq!((status.registration.unwrap(), status.etag), (now, after.etag));
}

#[tokio::test]
async fn a_field_of_the_mask_without_a_value_gets_its_default() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    let defaults = registered(&mut stage.client).await;
    stage
        .register("a", |it| {
            it.phase = 7;
            it.after = vec!["x".into()];
            it.timeout = ms(1000);
            it.retry = Some(pb::RetryPolicy { max_attempts: 7, ..Default::default() });
            it.breaker = Some(pb::BreakerPolicy { disabled: true, ..Default::default() });
            it.limits = Some(pb::Limits { max_issues: 1, ..Default::default() });
            it.record_output = true;
            it.parameters = to_struct(&json!({ "limit": 1 }));
        })
        .await;
    let paths = ["phase", "after", "timeout", "retry", "breaker.disabled", "limits", "record_output", "parameters"];
    update(&mut stage.client, "a", &paths, |_| {}).await.unwrap();
    assert_eq!(registered(&mut stage.client).await, defaults);
    // An endpoint has no default.
    let refused = update(&mut stage.client, "a", &["endpoint"], |_| {}).await.unwrap_err();
    assert_eq!(refused, invalid(["registration.endpoint"]));
}

#[tokio::test]
async fn without_a_mask_the_fields_that_are_set_are_changed_and_with_a_star_all_of_them() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| (it.phase, it.critical) = (7, true)).await;
    let endpoint = stage.fleet.endpoint().to_owned();
    let client = &mut stage.client;
    for no_mask in [None, Some(prost_types::FieldMask::default())] {
        let timeout = ms(if no_mask.is_some() { 1000 } else { 2000 });
        let values = pb::Registration { timeout, ..registration("a", "") };
        let request =
            pb::UpdateSubsystemRequest { registration: Some(values), update_mask: no_mask, etag: String::new() };
        send(client, request).await.unwrap();
        let now = registered(client).await;
        assert_eq!((now.timeout, now.phase, now.critical, &now.endpoint), (timeout, 7, true, &endpoint));
    }
    update(client, "a", &["*"], |it| it.endpoint = NOWHERE.into()).await.unwrap();
    let now = registered(client).await;
    assert_eq!((now.timeout, now.phase, now.critical, now.endpoint.as_str()), (ms(10_000), 0, false, NOWHERE));
}

#[tokio::test]
async fn a_change_that_is_refused_changes_nothing() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.requires = vec!["b".into()]).await;
    stage.register("b", |_| {}).await;
    let before = stage.client.subsystems().await.unwrap();
    let commits_before = commits(&stage).await;
    let client = &mut stage.client;

    for paths in [&["timeout", "time_out"][..], &["name"], &["retry.attempts"], &["*", "timeout"], &[""]] {
        let status = send(client, request("a", paths, |it| it.timeout = ms(1))).await.unwrap_err();
        assert_eq!(reason(&status), invalid(["update_mask"]), "{paths:?}");
        let unknown = paths.iter().find(|path| **path != "timeout").unwrap();
        for named in [&format!("{unknown:?}"), "timeout, retry[.max_attempts, ", "parameters.KEY"] {
            assert!(status.message().contains(named), "no {named} in {}", status.message());
        }
    }
    let nothing = pb::UpdateSubsystemRequest::default();
    assert_eq!(reason(&send(client, nothing).await.unwrap_err()), invalid(["registration"]));
    assert_eq!(update(client, "", &["phase"], |_| {}).await.unwrap_err(), invalid(["registration.name"]));
    let not_found = because(Code::NotFound, "SUBSYSTEM_NOT_FOUND", [("subsystem", "x")]);
    assert_eq!(update(client, "x", &["phase"], |_| {}).await.unwrap_err(), not_found);

    // Good by themselves, and not with the rest.
    let late = update(client, "a", &["retry.initial_backoff"], |it| {
        it.retry = Some(pb::RetryPolicy { initial_backoff: ms(2000), ..Default::default() });
    });
    assert_eq!(late.await.unwrap_err(), invalid(["registration.retry.max_backoff"]));
    let too_many = update(client, "a", &["reads"], |it| it.reads = (0..1024).map(|i| format!("r{i}")).collect());
    assert_eq!(too_many.await.unwrap_err(), invalid(["registration.reads"]));
    let ring = update(client, "b", &["phase", "after"], |it| it.after = vec!["a".into()]).await.unwrap_err();
    assert_eq!((ring.code, ring.why.as_str()), (Code::InvalidArgument, "ORDER_RING"));

    assert_eq!(client.subsystems().await.unwrap(), before);
    // The order of before as well: it is no ring the other way round.
    update(client, "b", &["reads"], |it| it.reads = vec!["a".into()]).await.unwrap();
    assert_eq!(commits(&stage).await, commits_before + 1);
}

#[tokio::test]
async fn an_etag_holds_until_the_registration_changes() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    let client = &mut stage.client;
    let etag = client.subsystem("a").await.unwrap().etag;
    assert_eq!(client.subsystems().await.unwrap()[0].etag, etag);
    client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "a".into() }).await.unwrap();
    let with = |etag: &str, phase| pb::UpdateSubsystemRequest {
        etag: etag.into(),
        ..request("a", &["phase"], |it| it.phase = phase)
    };
    let changed = send(client, with(&etag, 1)).await.unwrap().subsystem.unwrap();
    let refused = reason(&send(client, with(&etag, 2)).await.unwrap_err());
    assert_eq!(refused, because(Code::Aborted, "ETAG_MISMATCH", [("subsystem", "a"), ("etag", &changed.etag)]));
    assert_eq!(registered(client).await.phase, 1);
    // Equal registrations have equal etags.
    send(client, with(&changed.etag, 0)).await.unwrap();
    assert_eq!(client.subsystem("a").await.unwrap().etag, etag);
}

#[tokio::test]
async fn a_subsystem_keeps_its_lease_suspension_and_output() {
    let mut stage = Stage::new().await;
    let registration = Some(stage.registration("a"));
    let leased = pb::RegisterSubsystemRequest { registration, lease: ms(3_600_000) };
    stage.client.register_subsystem(leased).await.unwrap();
    stage.client.run().await.unwrap();
    stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "a".into() }).await.unwrap();
    let changed = update(&mut stage.client, "a", &["phase"], |it| it.phase = 3).await.unwrap();
    let (after, previous) = (changed.subsystem.unwrap(), changed.previous.unwrap());
    assert!(after.suspended && after.lease_expires_at.is_some(), "{after:?}");
    assert_eq!((previous.output_cycle_id, after.output_cycle_id, after.last_cycle_id), (1, 1, 1));
    let mut stage = stage.killed().await;
    let status = stage.client.subsystem("a").await.unwrap();
    assert!(status.suspended && status.lease_expires_at.is_some() && status.output_cycle_id == 1, "{status:?}");
}

#[tokio::test]
async fn an_unchanged_registration_is_not_written() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.timeout = ms(1000)).await;
    stage.client.run().await.unwrap();
    let commits_before = commits(&stage).await;
    let same = update(&mut stage.client, "a", &["timeout", "phase"], |it| it.timeout = ms(1000)).await.unwrap();
    assert_eq!(same.previous, None);
    // It stays initialized.
    assert!(same.subsystem.unwrap().initialized);
    assert_eq!(commits(&stage).await, commits_before);
    // A change is for the next cycle, which initializes it with the new parameters.
    update(&mut stage.client, "a", &["parameters.k"], |it| it.parameters = to_struct(&json!({ "k": 1 })))
        .await
        .unwrap();
    assert!(!stage.client.subsystem("a").await.unwrap().initialized);
    stage.client.run().await.unwrap();
    assert_eq!(from_struct(&registered(&mut stage.client).await.parameters), json!({ "k": 1 }));
}

#[tokio::test]
async fn declared_subsystems_are_changed_only_in_the_configuration() {
    let config = format!("[[subsystems]]\nname = \"declared\"\nendpoint = \"{NOWHERE}\"\n");
    let mut stage = Stage::at(Home::new().with_config(&config)).await;
    let status = send(&mut stage.client, request("declared", &["phase"], |it| it.phase = 1)).await.unwrap_err();
    let refused = because(Code::FailedPrecondition, "DECLARED_IN_CONFIG", [("name", "declared")]);
    assert_eq!(reason(&status), refused);
    assert!(status.message().contains("configuration file"), "{}", status.message());
}
