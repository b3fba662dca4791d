//! New names of subsystems, by RenameSubsystem and by the configuration file: what moves to them, and what still finds
//! the former ones.

use std::fs;

use crate::common::{
    Stage,
    command::orchestrator,
    fleet::{Call, Run, from_struct},
    http, patiently,
    service::{Client, Home, Reason, because, decode, invalid, ms, next_recorded, part, reason, registration},
};
use orchestrator_core::proto::{
    orchestrator::v1::{self as pb, BreakerState, CycleState, SkipReason, SubsystemState},
    subsystem::v1::Freshness,
};
use rustix::process::Signal;
use serde_json::json;
use tonic::{Code, Response, Status};

const NOWHERE: &str = "http://127.0.0.1:1";

async fn rename(client: &mut Client, name: &str, new_name: &str) -> Result<pb::RenameSubsystemResponse, Reason> {
    rename_if(client, name, new_name, "").await
}

async fn rename_if(
    client: &mut Client,
    name: &str,
    new_name: &str,
    etag: &str,
) -> Result<pb::RenameSubsystemResponse, Reason> {
    let request = pb::RenameSubsystemRequest { name: name.into(), new_name: new_name.into(), etag: etag.into() };
    client.rename_subsystem(request).await.map(Response::into_inner).map_err(|status| reason(&status))
}

/// The refusal of a call by a former name.
fn renamed_to(former: &str, name: &str) -> Reason {
    because(Code::NotFound, "SUBSYSTEM_NOT_FOUND", [("subsystem", former), ("renamed_to", name)])
}

/// The refusal of a registration by a former name.
fn reserved_by(former: &str, name: &str) -> Reason {
    because(Code::FailedPrecondition, "SUBSYSTEM_RENAMED", [("subsystem", former), ("renamed_to", name)])
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Status>) -> Reason {
    reason(&result.unwrap_err())
}

/// The ids of the cycles in which this subsystem took part, newest first.
async fn cycles_of(client: &mut Client, name: &str) -> Vec<u64> {
    let request = pb::ListCyclesRequest { subsystem: name.into(), ..pb::ListCyclesRequest::default() };
    let page = client.list_cycles(request).await.unwrap().into_inner();
    page.cycles.into_iter().map(|cycle| decode(cycle).cycle_id).collect()
}

fn over(names: &[&str]) -> pb::RunCycleRequest {
    let subsystems = names.iter().map(ToString::to_string).collect();
    pb::RunCycleRequest { subsystems, ..pb::RunCycleRequest::default() }
}

/// Starts a loop over these subsystems, whose cycles wait for others.
/// A service with the subsystems `old` and `other`, and a cycle that runs over the latter until it is released.
async fn with_a_cycle_of_another() -> (Stage, u64) {
    let mut stage = Stage::new().await;
    stage.register_all(&["old", "other"]).await;
    stage.fleet.run("other", Run::Hold);
    let running = stage.client.admit_with(over(&["other"])).await.unwrap();
    stage.fleet.until_run("other", 1).await;
    (stage, running)
}

async fn start_loop(client: &mut Client, name: &str, interval_ms: i64, subsystems: &[&str]) -> pb::IntervalLoop {
    let settings = pb::IntervalLoop {
        name: name.into(),
        interval: ms(interval_ms),
        overlap_policy: pb::OverlapPolicy::BufferOne.into(),
        subsystems: subsystems.iter().map(ToString::to_string).collect(),
        ..pb::IntervalLoop::default()
    };
    let started = client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await;
    started.unwrap().into_inner().r#loop.unwrap().r#loop.unwrap()
}

/// The subsystems of the only loop.
async fn names_of_loop(client: &mut Client) -> Vec<String> {
    let loops = client.list_interval_loops(pb::ListIntervalLoopsRequest::default()).await.unwrap().into_inner().loops;
    let [only] = &loops[..] else { panic!("{loops:?}") };
    only.r#loop.clone().unwrap().subsystems
}

/// An input that was seen: its freshness, its cycle, and the subsystem that made it.
fn seen(call: &Call, name: &str) -> (Freshness, u64, serde_json::Value) {
    let input = call.inputs.get(name).unwrap_or_else(|| panic!("{name} is no input of {call:?}"));
    (input.freshness, input.cycle_id, input.output["by"].clone())
}

#[tokio::test]
async fn a_subsystem_keeps_everything_under_its_new_name_also_after_a_kill() {
    let mut stage = Stage::new().await;
    stage.register("old", |it| it.phase = 3).await;
    stage.register("reader", |it| it.reads = vec!["x".into(), "old".into()]).await;
    stage.register("alarm", |it| (it.phase, it.requires) = (3, vec!["old".into()])).await;
    stage.register("other", |_| {}).await;
    start_loop(&mut stage.client, "hourly", 3_600_000, &["other", "old"]).await;
    stage.client.run().await.unwrap();
    let before = stage.client.subsystem("old").await.unwrap();

    let renamed = rename(&mut stage.client, "old", "new").await.unwrap();
    assert_eq!(
        (renamed.changed_subsystems, renamed.changed_loops),
        (vec!["alarm".into(), "reader".into()], vec!["hourly".into()])
    );
    assert!(!renamed.subsystem.unwrap().initialized);
    for end in ["none", "kill", "stop"] {
        stage = match end {
            "kill" => stage.killed().await,
            "stop" => stage.restarted().await,
            _ => stage,
        };
        let now = stage.client.subsystem("new").await.unwrap();
        assert_eq!(now.former_names, ["old"], "{end}");
        assert_eq!((&now.output, now.output_cycle_id), (&before.output, 1), "{end}");
        assert_eq!((now.last.unwrap().state(), now.last_cycle_id), (SubsystemState::Succeeded, 1), "{end}");
        let expected = pb::Registration { name: "new".into(), ..before.registration.clone().unwrap() };
        assert_eq!(now.registration.unwrap(), expected, "{end}");
        let reader = stage.client.subsystem("reader").await.unwrap().registration.unwrap();
        assert_eq!(reader.reads, ["x", "new"], "{end}");
        let alarm = stage.client.subsystem("alarm").await.unwrap().registration.unwrap();
        assert_eq!(alarm.requires, ["new"], "{end}");
        assert_eq!(names_of_loop(&mut stage.client).await, ["other", "new"], "{end}");
        assert_eq!(refusal(stage.client.subsystem("old").await), renamed_to("old", "new"), "{end}");
        assert_eq!(
            refusal(stage.client.register(registration("old", NOWHERE)).await),
            reserved_by("old", "new"),
            "{end}"
        );
        assert_eq!(stage.client.subsystems().await.unwrap().len(), 4, "{end}");
    }

    // It is a new name for the component, which gets it in all calls, and whose readers get its output by it.
    stage.fleet.clear_calls();
    let cycle = stage.client.run_with(over(&["reader"])).await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded);
    let calls = stage.fleet.runs("reader");
    assert_eq!(seen(&calls[0], "new"), (Freshness::Stale, 1, json!("old")));
    let cycle = stage.client.run().await.unwrap();
    assert_eq!((cycle.state(), cycle.subsystems.len()), (CycleState::Succeeded, 4));
    assert_eq!((stage.fleet.initializations("new").len(), stage.fleet.runs("old").len()), (1, 0));
    assert_eq!(seen(&stage.fleet.runs("alarm")[0], "new"), (Freshness::Fresh, 3, json!("new")));

    // Its history is found by both names, and is as it was recorded.
    for name in ["new", "old"] {
        assert_eq!(cycles_of(&mut stage.client, name).await, [3, 1], "{name}");
    }
    let first = stage.client.cycle(1).await.unwrap();
    assert_eq!(part(&first, "old").state(), SubsystemState::Succeeded);
    let address = stage.service.address().to_string();
    let list = ["cycles", "list", "--subsystem", "new", "--output", "ndjson", "--address", &address];
    let (code, listed) = orchestrator(None, &list).await;
    assert_eq!((code, listed.lines().count()), (0, 2), "{listed}");
    for name in ["new", "old"] {
        let report = ["report", "--subsystem", name, "--output", "ndjson", "--address", &address];
        let (code, report) = orchestrator(None, &report).await;
        let figures: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!((code, &figures["name"], &figures["cycles"]), (0, &json!("new"), &json!(2)), "{report}");
    }

    // Without it, its names are free, and the history of the former one is its own again.
    stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: "new".into() }).await.unwrap();
    assert!(stage.client.register(stage.registration("old")).await.unwrap().created);
    assert_eq!(stage.client.subsystem("old").await.unwrap().output_cycle_id, 0);
    assert_eq!(cycles_of(&mut stage.client, "new").await, [3]);
    assert_eq!(cycles_of(&mut stage.client, "old").await, [1]);
}

#[tokio::test]
async fn a_suspension_and_a_lease_stay_and_the_breaker_closes() {
    let mut stage = Stage::new().await;
    let held = pb::Registration {
        breaker: Some(pb::BreakerPolicy { failure_threshold: 1, ..pb::BreakerPolicy::default() }),
        ..stage.registration("old")
    };
    let lease = ms(3_600_000);
    let request = pb::RegisterSubsystemRequest { registration: Some(held), lease };
    stage.client.register_subsystem(request).await.unwrap();
    stage.fleet.run("old", Run::fail(Code::Internal));
    stage.client.run().await.unwrap();
    assert_eq!(stage.client.subsystem("old").await.unwrap().breaker(), BreakerState::Open);
    stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "old".into() }).await.unwrap();

    let renamed = rename(&mut stage.client, "old", "new").await.unwrap().subsystem.unwrap();
    assert!(renamed.suspended && renamed.lease_expires_at.is_some());
    assert_eq!(renamed.breaker(), BreakerState::Closed);
    // Its process has to renew it by the new name.
    let renew = |name: &str| pb::RenewLeaseRequest { name: name.into() };
    assert_eq!(refusal(stage.client.renew_lease(renew("old")).await), renamed_to("old", "new"));
    stage.client.renew_lease(renew("new")).await.unwrap();
    let mut stage = stage.killed().await;
    let now = stage.client.subsystem("new").await.unwrap();
    assert!(now.suspended && now.lease_expires_at.is_some());
    // No metric has the former name.
    let metrics = http::get(stage.service.admin(), "/metrics").await.text().await;
    assert!(metrics.contains("subsystem=\"new\"") && !metrics.contains("subsystem=\"old\""), "{metrics}");
}

#[tokio::test]
async fn the_end_of_a_lease_frees_the_former_names() {
    let mut stage = Stage::new().await;
    let request = pb::RegisterSubsystemRequest { registration: Some(stage.registration("old")), lease: ms(1000) };
    stage.client.register_subsystem(request).await.unwrap();
    rename(&mut stage.client, "old", "new").await.unwrap();
    stage.home.logged("its lease was not renewed", 1).await;
    assert!(stage.client.register(stage.registration("old")).await.unwrap().created);
}

#[tokio::test]
async fn a_running_cycle_ends_with_the_former_name_and_its_output_is_that_of_the_new_one() {
    let mut stage = Stage::new().await;
    stage.register_all(&["old", "other"]).await;
    stage.register("reader", |it| it.reads = vec!["old".into()]).await;
    for (number, request) in [over(&[]), over(&["old"])].into_iter().enumerate() {
        let [old, new] = if number == 0 { ["old", "new"] } else { ["new", "newer"] };
        let request = if number == 0 { request } else { over(&["new"]) };
        stage.fleet.run(old, Run::Hold);
        let running = stage.client.admit_with(request).await.unwrap();
        // The second round holds what the first one has already run once, under its new name.
        stage.fleet.until_run(old, number + 1).await;
        let renamed = rename(&mut stage.client, old, new).await.unwrap();
        assert_eq!(renamed.changed_subsystems, ["reader"]);
        // A cycle over the new name waits for the one that calls it by the former name.
        let waiting = stage.client.admit_with(over(&[new])).await.unwrap();
        let status = stage.client.status().await.unwrap();
        let shown: Vec<_> = status.waiting_cycles.iter().map(|it| (it.cycle_id, it.waits_for_cycle_id)).collect();
        assert_eq!(shown, [(waiting, running)]);
        assert_eq!(stage.fleet.runs(new).len(), 0);
        // One over another subsystem does not, unless the first one is over all.
        if number > 0 {
            let side_by_side = stage.client.run_with(over(&["other"])).await.unwrap();
            assert_eq!(side_by_side.state(), CycleState::Succeeded);
        }
        stage.fleet.run(old, Run::Echo);
        let ended = stage.client.recorded(running).await;
        assert_eq!(part(&ended, old).state(), SubsystemState::Succeeded);
        let next = stage.client.recorded(waiting).await;
        assert_eq!(part(&next, new).state(), SubsystemState::Succeeded);
        let (first, second) = (&stage.fleet.runs(old)[number], &stage.fleet.runs(new)[0]);
        assert!(first.ended.unwrap().0 < second.began, "{first:?} {second:?}");
    }
    let now = stage.client.subsystem("newer").await.unwrap();
    assert_eq!(now.former_names, ["new", "old"]);
    assert_eq!(from_struct(&now.output)["by"], json!("newer"));
}

#[tokio::test]
async fn the_output_of_a_cycle_that_ends_after_the_new_name_is_kept_also_after_a_kill() {
    let mut stage = Stage::new().await;
    stage.register("old", |_| {}).await;
    stage.register("reader", |it| it.reads = vec!["old".into()]).await;
    stage.fleet.run("old", Run::Hold);
    let running = stage.client.admit_with(over(&["old"])).await.unwrap();
    stage.fleet.until_run("old", 1).await;
    rename(&mut stage.client, "old", "new").await.unwrap();
    stage.fleet.run("old", Run::Echo);
    stage.client.recorded(running).await;
    assert_eq!(stage.client.subsystem("new").await.unwrap().output_cycle_id, running);
    let mut stage = stage.killed().await;
    assert_eq!(stage.client.subsystem("new").await.unwrap().output_cycle_id, running);
    assert_eq!(refusal(stage.client.subsystem("old").await), renamed_to("old", "new"));
    stage.client.run_with(over(&["reader"])).await.unwrap();
    assert_eq!(seen(&stage.fleet.runs("reader")[0], "new"), (Freshness::Stale, running, json!("old")));
}

#[tokio::test]
async fn a_waiting_cycle_calls_the_subsystem_by_its_new_name_also_in_the_next_process() {
    let (mut stage, running) = with_a_cycle_of_another().await;
    let waiting = stage.client.admit_with(over(&["old", "other"])).await.unwrap();
    rename(&mut stage.client, "old", "new").await.unwrap();
    let waits_too = stage.client.admit_with(over(&["new"])).await.unwrap();
    let mut stage = stage.killed().await;
    stage.fleet.run("other", Run::Echo);
    assert_eq!(stage.client.recorded(running).await.state(), CycleState::Interrupted);
    for cycle_id in [waiting, waits_too] {
        let cycle = stage.client.recorded(cycle_id).await;
        assert_eq!((cycle.state(), part(&cycle, "new").state()), (CycleState::Succeeded, SubsystemState::Succeeded));
    }
    let runs = stage.fleet.runs("new");
    assert_eq!((runs.len(), stage.fleet.runs("old").len()), (2, 0));
    assert!(runs[0].ended.unwrap().0 < runs[1].began);
}

#[tokio::test]
async fn a_loop_without_a_pause_between_its_cycles_delays_no_new_name() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    start_loop(&mut stage.client, "busy", 10, &["a", "b"]).await;
    start_loop(&mut stage.client, "all", 15, &[]).await;
    let mut names = vec!["a".to_owned()];
    for number in 0..8 {
        stage.fleet.until_run(names.last().unwrap(), 1).await;
        let new = format!("a{number}");
        rename(&mut stage.client, names.last().unwrap(), &new).await.unwrap();
        names.push(new);
    }
    stage.fleet.until_run(names.last().unwrap(), 1).await;
    // The component was in one cycle at a time, whatever its name was.
    let mut calls: Vec<_> = names.iter().flat_map(|name| stage.fleet.runs(name)).collect();
    calls.sort_by_key(|call| call.began);
    for pair in calls.windows(2) {
        assert!(pair[0].ended.is_some_and(|(ended, _)| ended < pair[1].began), "{pair:?}");
    }
    assert!(calls.windows(2).all(|pair| pair[0].cycle_id < pair[1].cycle_id));
    // No cycle has it twice, or lacks it.
    for record in stage.client.history().await.unwrap() {
        let cycle = decode(record);
        assert_eq!((cycle.state(), cycle.subsystems.len()), (CycleState::Succeeded, 2), "{cycle:?}");
    }
}

#[tokio::test]
async fn a_cycle_that_named_the_new_name_before_does_not_call_the_subsystem_beside_another_one() {
    let (mut stage, holding) = with_a_cycle_of_another().await;
    // This loop names it before it exists, and its cycle waits.
    start_loop(&mut stage.client, "early", 10, &["new", "other"]).await;
    let waits = async {
        loop {
            if let [waiting, ..] = &stage.client.status().await.unwrap().waiting_cycles[..] {
                return waiting.cycle_id;
            }
            tokio::task::yield_now().await;
        }
    };
    let waiting = patiently("the cycle of the loop", waits).await;
    stage.client.stop_interval_loop(pb::StopIntervalLoopRequest { name: "early".into() }).await.unwrap();
    stage.fleet.run("old", Run::Hold);
    let running = stage.client.admit_with(over(&["old"])).await.unwrap();
    stage.fleet.until_run("old", 1).await;
    rename(&mut stage.client, "old", "new").await.unwrap();
    stage.fleet.run("other", Run::Echo);
    stage.client.recorded(holding).await;
    let early = stage.client.recorded(waiting).await;
    assert_eq!(part(&early, "new").skip_reason(), SkipReason::NotRegistered);
    assert_eq!(part(&early, "other").state(), SubsystemState::Succeeded);
    stage.fleet.run("old", Run::Echo);
    assert_eq!(stage.client.recorded(running).await.state(), CycleState::Succeeded);
    assert_eq!(stage.fleet.runs("new").len(), 0);
}

#[tokio::test]
async fn a_new_name_is_refused_with_the_reason_and_nothing_changes() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    stage.register("c", |it| it.requires = vec!["future".into()]).await;
    stage.register("d", |it| it.after = vec!["c".into()]).await;
    rename(&mut stage.client, "b", "b2").await.unwrap();
    let before = stage.client.subsystems().await.unwrap();
    let etag = stage.client.subsystem("a").await.unwrap().etag;
    let client = &mut stage.client;
    for (name, new_name, expected) in [
        ("", "x", invalid(["name"])),
        ("a", "not a name", invalid(["new_name"])),
        ("a", "a", invalid(["new_name"])),
        ("x", "y", because(Code::NotFound, "SUBSYSTEM_NOT_FOUND", [("subsystem", "x")])),
        ("b", "b2", renamed_to("b", "b2")),
        ("a", "b2", because(Code::AlreadyExists, "NAME_TAKEN", [("subsystem", "b2")])),
        ("a", "b", reserved_by("b", "b2")),
        ("d", "future", because(Code::InvalidArgument, "ORDER_RING", [("ring", "c,future")])),
    ] {
        assert_eq!(rename(client, name, new_name).await.unwrap_err(), expected, "{name} {new_name}");
    }
    let other = rename_if(client, "a", "a2", "other").await.unwrap_err();
    assert_eq!(other, because(Code::Aborted, "ETAG_MISMATCH", [("subsystem", "a"), ("etag", &etag)]));
    assert_eq!(client.subsystems().await.unwrap(), before);
    rename_if(client, "a", "a2", &etag).await.unwrap();
    // Back again, and then the other name is free for it, and for no other.
    rename(client, "a2", "a").await.unwrap();
    assert_eq!(client.subsystem("a").await.unwrap().former_names, ["a2"]);
    assert_eq!(rename(client, "b2", "a2").await.unwrap_err(), reserved_by("a2", "a"));

    for number in 0..15 {
        let name = client.subsystems().await.unwrap()[0].registration.clone().unwrap().name;
        rename(client, &name, &format!("a-{number}")).await.unwrap();
    }
    let full = rename(client, "a-14", "one-more").await.unwrap_err();
    assert_eq!(full, because(Code::FailedPrecondition, "TOO_MANY_FORMER_NAMES", [("subsystem", "a-14")]));
    rename(client, "a-14", "a").await.unwrap();
}

#[tokio::test]
async fn registrations_and_loops_may_name_a_subsystem_by_a_former_name() {
    let mut stage = Stage::new().await;
    stage.register("old", |_| {}).await;
    stage.register("reader", |it| it.reads = vec!["old".into()]).await;
    rename(&mut stage.client, "old", "new").await.unwrap();
    rename(&mut stage.client, "new", "newer").await.unwrap();
    // A component that registers itself, and names what it reads as before: its registration is unchanged.
    let again = pb::Registration { reads: vec!["old".into()], ..stage.registration("reader") };
    let answer = stage.client.register(again).await.unwrap();
    assert_eq!((answer.created, answer.previous), (false, None));
    assert_eq!(answer.subsystem.unwrap().registration.unwrap().reads, ["newer"]);
    let settings = start_loop(&mut stage.client, "l", 3_600_000, &["old", "new", "reader"]).await;
    assert_eq!(settings.subsystems, ["newer", "reader"]);
    // The caller of a cycle gets the present name.
    assert_eq!(refusal(stage.client.run_with(over(&["old"])).await), renamed_to("old", "newer"));
    let status = stage.client.register(registration("old", NOWHERE)).await.unwrap_err();
    assert!(status.message().contains("renamed to newer"), "{}", status.message());
}

#[tokio::test]
async fn a_watcher_of_either_name_gets_the_cycles_of_both() {
    let mut stage = Stage::new().await;
    stage.register_all(&["old", "other"]).await;
    let watch = |name: &str| pb::WatchCyclesRequest {
        after_revision: Some(0),
        subsystems: vec![name.into()],
        ..pb::WatchCyclesRequest::default()
    };
    let mut before = stage.client.watch_cycles(watch("old")).await.unwrap().into_inner();
    stage.client.run_with(over(&["old"])).await.unwrap();
    rename(&mut stage.client, "old", "new").await.unwrap();
    stage.client.run_with(over(&["other"])).await.unwrap();
    stage.client.run_with(over(&["new"])).await.unwrap();
    let mut after = stage.client.watch_cycles(watch("new")).await.unwrap().into_inner();
    for watcher in [&mut before, &mut after] {
        for cycle_id in [1, 3] {
            assert_eq!(decode(next_recorded(watcher).await).cycle_id, cycle_id);
        }
    }
}

fn declared(stage_endpoint: &str, old_and_new: &str) -> String {
    format!(
        "[[subsystems]]\n{old_and_new}\nendpoint = \"{stage_endpoint}\"\n\
         [[subsystems]]\nname = \"watcher\"\nendpoint = \"{stage_endpoint}\"\nreads = [\"old\"]\n"
    )
}

#[tokio::test]
async fn the_configuration_file_renames_at_a_reload_and_at_a_start() {
    for way in ["reload", "start"] {
        let fleet = crate::common::fleet::Fleet::start().await;
        let first = declared(fleet.endpoint(), "name = \"old\"");
        let home = Home::new().with_config(&first);
        let mut stage = Stage::again(fleet, home).await;
        stage.register("by-rpc", |it| it.reads = vec!["old".into()]).await;
        start_loop(&mut stage.client, "l", 3_600_000, &["old", "by-rpc"]).await;
        stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "old".into() }).await.unwrap();
        stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: "old".into() }).await.unwrap();
        stage.client.run().await.unwrap();
        stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "old".into() }).await.unwrap();
        let refused = rename(&mut stage.client, "old", "new").await.unwrap_err();
        assert_eq!(refused, because(Code::FailedPrecondition, "DECLARED_IN_CONFIG", [("name", "old")]));

        let second = declared(stage.fleet.endpoint(), "name = \"new\"\nformer_names = [\"old\"]");
        fs::write(stage.home.path("orchestrator.toml"), &second).unwrap();
        if way == "start" {
            stage = stage.restarted().await;
        } else {
            stage.service.signal(Signal::HUP);
        }
        stage.home.logged("renamed by the configuration file", 1).await;
        let is_reloaded = async {
            while stage.client.subsystem("new").await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        patiently("the new name", is_reloaded).await;
        for end in ["none", "kill"] {
            if end == "kill" {
                stage = stage.killed().await;
            }
            let now = stage.client.subsystem("new").await.unwrap();
            assert_eq!((&now.former_names[..], now.output_cycle_id), (&["old".to_owned()][..], 1), "{way} {end}");
            assert!(now.suspended, "{way} {end}");
            for name in ["by-rpc", "watcher"] {
                let registration = stage.client.subsystem(name).await.unwrap().registration.unwrap();
                assert_eq!(registration.reads, ["new"], "{way} {end} {name}");
            }
            assert_eq!(names_of_loop(&mut stage.client).await, ["new", "by-rpc"], "{way} {end}");
            assert_eq!(refusal(stage.client.subsystem("old").await), renamed_to("old", "new"), "{way} {end}");
            assert_eq!(refusal(stage.client.register(stage.registration("old")).await), reserved_by("old", "new"));
        }
        stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: "new".into() }).await.unwrap();
        stage.client.run().await.unwrap();
        assert_eq!(cycles_of(&mut stage.client, "new").await, [2, 1], "{way}");
    }
}

#[tokio::test]
async fn a_former_name_in_the_file_that_is_registered_stays_with_the_other_until_it_is_gone() {
    let fleet = crate::common::fleet::Fleet::start().await;
    let declared =
        format!("[[subsystems]]\nname = \"new\"\nformer_names = [\"old\"]\nendpoint = \"{}\"\n", fleet.endpoint());
    let home = Home::new();
    let mut stage = Stage::again(fleet, home).await;
    stage.register("old", |_| {}).await;
    stage.client.run().await.unwrap();
    stage.home = stage.home.with_config(&declared);
    let mut stage = stage.restarted().await;
    stage.home.logged("not a former name of it", 1).await;
    assert_eq!(stage.client.subsystem("old").await.unwrap().output_cycle_id, 1);
    let new = stage.client.subsystem("new").await.unwrap();
    assert_eq!((&new.former_names[..], new.output_cycle_id), (&[][..], 0));
    stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: "old".into() }).await.unwrap();
    let mut stage = stage.restarted().await;
    assert_eq!(stage.client.subsystem("new").await.unwrap().former_names, ["old"]);
}

#[tokio::test]
async fn the_file_takes_a_former_name_of_a_subsystem_that_was_registered_by_rpc() {
    let mut stage = Stage::new().await;
    stage.register("old", |_| {}).await;
    rename(&mut stage.client, "old", "new").await.unwrap();
    let declared = format!("[[subsystems]]\nname = \"old\"\nendpoint = \"{}\"\n", stage.fleet.endpoint());
    stage.home = stage.home.with_config(&declared);
    for _ in 0..2 {
        stage = stage.restarted().await;
        assert_eq!(stage.client.subsystem("new").await.unwrap().former_names, [""; 0]);
        assert!(stage.client.subsystem("old").await.is_ok());
    }
}

#[test]
fn former_names_in_the_file_are_checked() {
    let check = |toml: &str| {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), toml).unwrap();
        let overrides = orchestrator_core::config::Overrides {
            config: Some(path.path().to_owned()),
            ..orchestrator_core::config::Overrides::default()
        };
        orchestrator_core::config::Config::load(&overrides, []).unwrap_err().to_string()
    };
    let subsystem = |name: &str, former_names: &str| {
        format!("[[subsystems]]\nname = \"{name}\"\nendpoint = \"{NOWHERE}\"\nformer_names = [{former_names}]\n")
    };
    let many: Vec<_> = (0..17).map(|number| format!("\"n{number}\"")).collect();
    for (toml, expected) in [
        (subsystem("a", "\"b\"") + &subsystem("b", ""), "contains b, which is declared"),
        (subsystem("a", "\"a\""), "contains a, which is declared"),
        (subsystem("a", "\"x\"") + &subsystem("b", "\"x\""), "contains x, a former name of a as well"),
        (subsystem("a", "\"not a name\""), "is not a name"),
        (subsystem("a", &many.join(", ")), "are 17; the limit is 16"),
    ] {
        let refused = check(&toml);
        assert!(refused.contains(expected), "{refused}");
    }
}

#[tokio::test]
async fn the_command_line_and_http_rename_as_well() {
    let mut stage = Stage::new().await;
    stage.register("old", |_| {}).await;
    stage.register("reader", |it| it.reads = vec!["old".into()]).await;
    let address = stage.service.address().to_string();
    let of =
        async |args: &[&str]| orchestrator(None, &[&["subsystems"], args, &["--address", &address]].concat()).await;
    let (code, text) = of(&["rename", "old", "new"]).await;
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("subsystem old is renamed to new\n") && text.contains("reader"), "{text}");
    let (code, text) = of(&["show", "new"]).await;
    assert!(code == 0 && text.lines().any(|line| line.starts_with("former names") && line.ends_with(" old")), "{text}");
    let (code, text) = of(&["show", "old"]).await;
    assert!(code != 0 && text.contains("it has been renamed to new") && !text.contains("Did you mean"), "{text}");

    let answer =
        http::send_json(stage.service.admin(), "POST /api/subsystems/new/rename", &[], "{\"newName\": \"newest\"}")
            .await;
    let answer = answer.json().await;
    assert_eq!(answer["subsystem"]["formerNames"], json!(["new", "old"]), "{answer}");
    assert_eq!(answer["changedSubsystems"], json!(["reader"]));
}
