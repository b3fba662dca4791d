//! `serve --read-only`: a look at a copy of a database, beside the service that runs the fleet.

use std::{collections::BTreeMap, fs, path::Path};

use crate::common::{
    Stage,
    command::orchestrator,
    http::get,
    patiently,
    service::{Client, Home, decode, ms, next_event, next_recorded, reason},
};
use orchestrator_core::proto::orchestrator::v1::{self as pb, CycleState, cycle_event::Event};
use tonic::{Code, Status};

/// The files of a directory, without the log of its services.
fn files(home: &Home) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(home.path("")).unwrap().map(Result::unwrap);
    let files = entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
    files.filter(|(name, _)| name != "log").collect()
}

fn url(home: &Home) -> String {
    format!("sqlite:{}", home.path("o.db").display())
}

/// A home with a backup of a running service as its database, to look at.
async fn backup_of(original: &Home) -> Home {
    let home = Home::new();
    let copy = home.path("o.db").display().to_string();
    let (code, said) = orchestrator(None, &["backup", &url(original), "--to", &copy]).await;
    assert_eq!(code, 0, "{said}");
    home.with_args(["--read-only"])
}

/// Starts a service that has to be refused, and returns what it logs.
async fn refused(home: &Home) -> String {
    let ended = home.try_serve().await.err().map(|status| status.code());
    assert_eq!(ended, Some(Some(1)), "{}", home.log());
    home.log()
}

/// The outcome of each call that would run or change something.
async fn changes(client: &mut Client) -> Vec<(&'static str, Option<Status>)> {
    let name = || "a".to_owned();
    let hourly = pb::IntervalLoop { name: "l".into(), interval: ms(3_600_000), ..Default::default() };
    let all = || pb::PauseIntervalLoopsRequest { all: true, ..Default::default() };
    let none = pb::RegisterSubsystemsRequest::default();
    vec![
        ("RunCycle", client.run().await.err()),
        ("CancelCycle", client.cancel(1).await.err()),
        (
            "PruneCycles",
            client.prune_cycles(pb::PruneCyclesRequest { keep_newest: 1, ..Default::default() }).await.err(),
        ),
        (
            "RegisterSubsystem",
            client.register(crate::common::service::registration("b", "http://127.0.0.1:1")).await.err(),
        ),
        ("RegisterSubsystems", client.register_subsystems(none).await.err()),
        (
            "RenameSubsystem",
            client.rename_subsystem(pb::RenameSubsystemRequest { name: name(), ..Default::default() }).await.err(),
        ),
        (
            "UnregisterSubsystem",
            client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: name() }).await.err(),
        ),
        ("RenewLease", client.renew_lease(pb::RenewLeaseRequest { name: name() }).await.err()),
        ("SuspendSubsystem", client.suspend_subsystem(pb::SuspendSubsystemRequest { name: name() }).await.err()),
        ("ResumeSubsystem", client.resume_subsystem(pb::ResumeSubsystemRequest { name: name() }).await.err()),
        (
            "StartIntervalLoop",
            client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(hourly) }).await.err(),
        ),
        ("StopIntervalLoop", client.stop_interval_loop(pb::StopIntervalLoopRequest { name: name() }).await.err()),
        ("PauseIntervalLoops", client.pause_interval_loops(all()).await.err()),
        (
            "ResumeIntervalLoops",
            client.resume_interval_loops(pb::ResumeIntervalLoopsRequest { name: name(), all: false }).await.err(),
        ),
    ]
}

#[tokio::test]
async fn a_copy_is_looked_at_while_the_original_runs_cycles() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a"]).await;
    let quick = pb::IntervalLoop { name: "quick".into(), interval: ms(20), ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(quick) }).await.unwrap();
    stage.client.recorded(3).await;
    let look = backup_of(&stage.home).await;
    let before = files(&look);
    let service = look.serve().await;
    let mut client = service.client().await;

    let (there, here) = (stage.client.status().await.unwrap(), client.status().await.unwrap());
    assert!(here.read_only && !there.read_only && here.total_cycles >= 3, "{here:?}");
    assert_eq!((here.epoch, here.subsystem_count), (there.epoch, 1), "it has taken nothing over");
    let history = client.history().await.unwrap();
    assert_eq!(history, stage.client.history().await.unwrap()[..history.len()]);
    let newest = decode(history.last().unwrap().clone());
    assert_eq!(client.cycle(newest.cycle_id).await.unwrap(), newest);
    let seen = client.subsystem("a").await.unwrap();
    assert!(!seen.output.is_empty());
    assert_eq!((seen.last.as_ref(), seen.last_cycle_id), (newest.subsystems.first(), newest.cycle_id));
    let loops_of = async |client: &mut Client| {
        client.list_interval_loops(pb::ListIntervalLoopsRequest::default()).await.unwrap().into_inner().loops
    };
    let (loops, theirs) = (loops_of(&mut client).await, loops_of(&mut stage.client).await);
    assert!(loops.len() == 1 && loops[0].next_due_at.is_none(), "{loops:?}");
    // A busy machine misses some, and the copy counts no others.
    let missed = |loops: &[pb::IntervalLoopStatus]| loops[0].ticks.unwrap().missed;
    assert!(missed(&loops) <= missed(&theirs), "{loops:?}, {theirs:?}");
    let mut watch = client.watch_after(0).await.unwrap();
    for record in &history {
        assert_eq!(next_recorded(&mut watch).await, record);
    }
    assert!(matches!(next_event(&mut watch).await.unwrap().event, Some(Event::Bookmark(_))));

    for (rpc, refused) in changes(&mut client).await {
        let refused = refused.unwrap_or_else(|| panic!("{rpc} was not refused"));
        assert_eq!((refused.code(), reason(&refused).why.as_str()), (Code::FailedPrecondition, "READ_ONLY"), "{rpc}");
        assert!(refused.message().contains("--read-only"), "{refused:?}");
    }
    let snapshot = pb::GetSubsystemRequest { name: "a".into(), include_snapshot: true, include_output: false };
    let asked = client.get_subsystem(snapshot).await.unwrap().into_inner().subsystem.unwrap();
    assert!(asked.snapshot_error.contains("--read-only"), "{asked:?}");
    assert_eq!(get(service.admin(), "/api/status").await.json().await["status"]["readOnly"], true);
    assert_eq!(get(service.admin(), "/readyz").await.status, 200);
    assert_eq!(get(service.admin(), "/metrics").await.status, 200);
    let (code, said) = orchestrator(None, &["status", "--address", &service.address().to_string()]).await;
    assert!(code == 0 && said.contains("READ ONLY"), "{said}");

    // The original runs on, and its calls are accepted.
    let seen = stage.client.status().await.unwrap().total_cycles;
    assert!(seen >= here.total_cycles);
    let after = stage.client.recorded(seen + 2).await;
    assert_eq!((after.state(), after.epoch), (CycleState::Succeeded, there.epoch));
    assert_eq!(client.status().await.unwrap().total_cycles, here.total_cycles);
    assert!(service.stop().await.success(), "{}", look.log());
    assert_eq!(reason(&next_event(&mut watch).await.unwrap_err()).why, "DRAINING");
    assert!(files(&look) == before, "something was written: {:?}", files(&look).keys());
}

#[tokio::test]
async fn a_look_can_be_shared_and_keeps_a_service_from_the_copy_until_it_ends() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let look = backup_of(&stage.home).await;
    let (one, two) = (look.serve().await, look.serve().await);
    for service in [&one, &two] {
        assert_eq!(service.client().await.status().await.unwrap().total_cycles, 1);
    }
    let serving = Home::new().with_store(&url(&look));
    assert!(refused(&serving).await.contains("looks at it (serve --read-only)"), "{}", serving.log());
    assert!(one.stop().await.success() && two.stop().await.success());
    // The copy is whole: a service can still be started with it, once it is accepted.
    let (code, said) = orchestrator(None, &["store", "accept", &url(&look)]).await;
    assert_eq!(code, 0, "{said}");
    let serving = Home::new().with_store(&url(&look));
    assert_eq!(serving.serve().await.client().await.run().await.unwrap().cycle_id, 2);
}

#[tokio::test]
async fn a_database_that_can_not_be_read_without_a_change_is_refused_and_left_alone() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let look_at =
        |path: &Path| Home::new().with_store(&format!("sqlite:{}", path.display())).with_args(["--read-only"]);
    let original = stage.home.path("o.db");
    let pid = stage.service.pid().as_raw_nonzero();
    let said = refused(&look_at(&original)).await;
    assert!(said.contains(&format!("is in use by another process (pid {pid})")), "{said}");
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 2, "it goes on");

    // Without its service, its newest commits are still in its log.
    let Stage { home, service, .. } = stage;
    service.kill().await;
    let before = files(&home);
    let said = refused(&look_at(&original)).await;
    assert!(said.contains("o.db-wal has changes that are not in it") && said.contains("orchestrator backup"), "{said}");
    assert!(files(&home) == before);

    let none = home.path("none.db");
    assert!(refused(&look_at(&none)).await.contains("none.db does not exist"));
    assert!(refused(&Home::new().in_memory().with_args(["--read-only"])).await.contains("memory: does not exist"));
    let other = home.path("other.db");
    rusqlite::Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (a)").unwrap();
    assert!(refused(&look_at(&other)).await.contains("a database of some other software"));
    let new: Vec<_> = files(&home).into_keys().filter(|name| !before.contains_key(name)).collect();
    assert_eq!(new, ["other.db"], "nothing was made beside them");
}

#[tokio::test]
async fn the_log_of_a_copy_is_exported_and_verified_by_the_checkpoint_that_was_made_with_it() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a"]).await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let (code, checkpoint) =
        orchestrator(None, &["checkpoint", "--output", "json", "--address", &stage.service.address().to_string()])
            .await;
    assert_eq!(code, 0, "{checkpoint}");
    let checkpoint: serde_json::Value = serde_json::from_str(&checkpoint).unwrap();
    let key = checkpoint["keys"][0].as_str().unwrap().to_owned();
    let look = backup_of(&stage.home).await;
    let service = look.serve().await;
    let address = service.address().to_string();
    let bundle = stage.home.path("copy.jsonl").display().to_string();
    let (code, said) = orchestrator(None, &["export", "--to", &bundle, "--key", &key, "--address", &address]).await;
    assert_eq!(code, 0, "{said}");
    let (code, said) = orchestrator(None, &["verify", &bundle, "--key", &key]).await;
    assert_eq!(code, 0, "{said}");
    let copy = look.path("o.db").display().to_string();
    let (code, said) = orchestrator(None, &["verify", "--db", &copy, "--key", &key]).await;
    assert!(code == 0 && said.contains("3 records"), "{said}");
    patiently("the service to end", service.stop()).await;
}
