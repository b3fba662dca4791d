//! Interval loops: their cycles and the counts of their ticks, also through restarts.

use std::collections::BTreeMap;

use crate::common::{
    Stage,
    fleet::{Run, to_struct},
    patiently,
    service::{Client, Home, Reason, because, decode, invalid, ms, next_recorded, part, reason},
};
use orchestrator_core::proto::orchestrator::v1::{
    self as pb, CatchUp, CycleState, IntervalLoop, IntervalLoopStatus, Origin, OverlapPolicy, SkipReason,
    SubsystemState, TickDisposition, Trigger, ledger_client::LedgerClient,
};
use prost::Message;
use rustix::process::Signal;
use serde_json::json;
use tonic::Code;

fn every(name: &str, milliseconds: i64) -> IntervalLoop {
    IntervalLoop { name: name.into(), interval: ms(milliseconds), ..Default::default() }
}

async fn start(client: &mut Client, settings: IntervalLoop) -> Result<IntervalLoopStatus, Reason> {
    let request = pb::StartIntervalLoopRequest { r#loop: Some(settings) };
    let started = client.start_interval_loop(request).await;
    started.map(|answer| answer.into_inner().r#loop.unwrap()).map_err(|status| reason(&status))
}

async fn stop(client: &mut Client, name: &str) -> Result<IntervalLoopStatus, Reason> {
    let stopped = client.stop_interval_loop(pb::StopIntervalLoopRequest { name: name.into() }).await;
    stopped.map(|answer| answer.into_inner().r#loop.unwrap()).map_err(|status| reason(&status))
}

async fn list(client: &mut Client) -> Vec<IntervalLoopStatus> {
    let loops = client.list_interval_loops(pb::ListIntervalLoopsRequest::default()).await.unwrap().into_inner().loops;
    for entry in &loops {
        let ticks = entry.ticks.unwrap();
        assert_eq!(ticks.due, ticks.ran + ticks.skipped + ticks.missed + ticks.coalesced + ticks.dropped, "{entry:?}");
    }
    loops
}

async fn get(client: &mut Client, name: &str) -> IntervalLoopStatus {
    list(client).await.into_iter().find(|entry| name == entry.r#loop.as_ref().unwrap().name).unwrap()
}

/// Waits until a loop fulfills this condition.
async fn until(client: &mut Client, name: &str, holds: impl Fn(&IntervalLoopStatus) -> bool) -> IntervalLoopStatus {
    let asking = async {
        loop {
            let entry = get(client, name).await;
            if holds(&entry) {
                return entry;
            }
        }
    };
    patiently(&format!("a condition of loop {name}"), asking).await
}

fn nanos(time: prost_types::Timestamp) -> i128 {
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)
}

fn next_due(entry: &IntervalLoopStatus) -> i128 {
    nanos(entry.next_due_at.unwrap())
}

#[tokio::test]
async fn loops_start_cycles_each_at_its_own_pace_with_its_own_subsystems() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    let mut cycles = stage.client.watch_after(0).await.unwrap();
    let quick = IntervalLoop {
        subsystems: vec!["a".into(), "nobody".into()],
        parameters: to_struct(&json!({ "pace": "quick" })),
        offset: ms(7),
        jitter: ms(5),
        record_outputs: true,
        overlap_policy: OverlapPolicy::BufferOne.into(),
        ..every("quick", 20)
    };
    let started = start(&mut stage.client, quick.clone()).await.unwrap();
    // Every default is filled in.
    let expected = IntervalLoop { catch_up: CatchUp::None.into(), catch_up_window: ms(60_000), ..quick };
    assert_eq!((started.r#loop.as_ref(), started.origin()), (Some(&expected), Origin::Rpc));
    assert_eq!((started.stopped, started.ticks.unwrap().due), (false, 0));
    start(&mut stage.client, IntervalLoop { deadline: ms(5000), ..every("calm", 30) }).await.unwrap();
    start(&mut stage.client, every("never", 3_600_000)).await.unwrap();
    let names: Vec<_> = list(&mut stage.client).await.into_iter().map(|it| it.r#loop.unwrap().name).collect();
    assert_eq!(names, ["calm", "never", "quick"]);

    let (mut quick, mut calm) = (0, 0);
    while quick < 3 || calm < 3 {
        let cycle = decode(next_recorded(&mut cycles).await);
        assert_eq!(cycle.trigger(), Trigger::Loop);
        let due = nanos(cycle.scheduled_at.unwrap());
        assert!(due <= nanos(cycle.started_at.unwrap()));
        if cycle.r#loop == "quick" {
            quick += 1;
            assert_eq!(due.rem_euclid(20_000_000), 7_000_000);
            assert_eq!(cycle.state(), CycleState::Degraded);
            assert_eq!(cycle.subsystems.len(), 2);
            assert_eq!(part(&cycle, "nobody").skip_reason(), SkipReason::NotRegistered);
            assert!(!part(&cycle, "a").output.is_empty());
            let runs = stage.fleet.runs("a");
            let run = runs.iter().find(|run| run.cycle_id == cycle.cycle_id).unwrap();
            assert_eq!((&run.parameters, run.scheduled_at), (&json!({ "pace": "quick" }), cycle.scheduled_at));
        } else {
            calm += 1;
            assert_eq!((cycle.r#loop.as_str(), due.rem_euclid(30_000_000)), ("calm", 0));
            assert_eq!((cycle.state(), cycle.subsystems.len()), (CycleState::Succeeded, 2));
        }
    }
    let status = stage.client.status().await.unwrap();
    assert_eq!(status.loops.len(), 3);
    let entry = get(&mut stage.client, "quick").await;
    assert!(entry.ticks.unwrap().ran >= 3 && entry.last_cycle_id > 0);
    assert_eq!(get(&mut stage.client, "never").await.ticks.unwrap().due, 0);

    let last = stop(&mut stage.client, "quick").await.unwrap();
    assert!(last.stopped && last.next_due_at.is_none() && last.ticks.unwrap().ran >= 3);
    let gone = because(Code::NotFound, "LOOP_NOT_FOUND", [("loop", "quick")]);
    assert_eq!(stop(&mut stage.client, "quick").await.unwrap_err(), gone);
    assert_eq!(list(&mut stage.client).await.len(), 2);
}

#[tokio::test]
async fn a_due_tick_that_waits_for_its_jitter_outlives_an_edit_and_is_counted_when_its_loop_stops() {
    const YEAR: i64 = 366 * 86_400_000;
    let now = || i128::from(jiff::Timestamp::now().as_millisecond());
    // The tick is due in a moment, and fired at some time in the year after it.
    let due_soon = || IntervalLoop {
        offset: ms(i64::try_from((now() + 2000) % i128::from(YEAR)).unwrap()),
        jitter: ms(YEAR - 1),
        ..every("yearly", YEAR)
    };
    let declared = |settings: &IntervalLoop, overlap: &str| {
        let offset = settings.offset.unwrap();
        format!(
            "[[loops]]\nname = \"declared\"\ninterval = \"{YEAR}ms\"\njitter = \"{}ms\"\noffset = \"{}ms\"\n\
             overlap_policy = \"{overlap}\"\n",
            YEAR - 1,
            offset.seconds * 1000 + i64::from(offset.nanos / 1_000_000),
        )
    };
    let mut stage = Stage::at(Home::new().with_config("")).await;
    let client = &mut stage.client;
    let settings = due_soon();
    let due = next_due(&start(client, settings.clone()).await.unwrap());
    std::fs::write(stage.home.path("orchestrator.toml"), declared(&settings, "skip")).unwrap();
    stage.service.signal(Signal::HUP);
    let is_declared = async { while list(client).await.len() < 2 {} };
    patiently("the loop that the file declares", is_declared).await;
    assert_eq!(next_due(&get(client, "declared").await), due);
    until(client, "yearly", |_| now() * 1_000_000 > due).await;

    // An edit by RPC and by the file changes the parameters, but not the due times.
    let edited = IntervalLoop { parameters: to_struct(&json!({ "edited": true })), ..settings.clone() };
    assert_eq!(next_due(&start(client, edited).await.unwrap()), due);
    std::fs::write(stage.home.path("orchestrator.toml"), declared(&settings, "buffer_one")).unwrap();
    stage.service.signal(Signal::HUP);
    let is_edited = |it: &IntervalLoopStatus| it.r#loop.as_ref().unwrap().overlap_policy() == OverlapPolicy::BufferOne;
    assert_eq!(next_due(&until(client, "declared", is_edited).await), due);

    // One loop gets other due times, the other is stopped.
    let moved = start(client, every("yearly", YEAR)).await.unwrap();
    assert!(next_due(&moved) > due);
    for dropped in [moved, stop(client, "declared").await.unwrap()] {
        let ticks = dropped.ticks.unwrap();
        assert_eq!((ticks.due, ticks.dropped), (1, 1), "{dropped:?}");
        assert_eq!(dropped.not_run[0].disposition(), TickDisposition::Dropped);
        assert_eq!(nanos(dropped.not_run[0].first_due_at.unwrap()), due);
    }
}

#[tokio::test]
async fn a_cycle_of_a_loop_that_is_stopped_runs_on() {
    let mut stage = Stage::new().await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    start(&mut stage.client, every("l", 10)).await.unwrap();
    stage.fleet.until_run("held", 1).await;
    let running = stage.client.status().await.unwrap().running_cycle.unwrap();
    assert_eq!((running.trigger(), running.r#loop.as_str()), (Trigger::Loop, "l"));
    let last = stop(&mut stage.client, "l").await.unwrap();
    assert_eq!(last.last_cycle_id, running.cycle_id);
    stage.fleet.run("held", Run::Echo);
    assert_eq!(stage.client.recorded(running.cycle_id).await.state(), CycleState::Succeeded);
    assert_eq!(stage.client.run().await.unwrap().cycle_id, running.cycle_id + 1);
}

#[tokio::test]
async fn new_settings_replace_old_ones_and_the_counts_continue() {
    let mut stage = Stage::new().await;
    start(&mut stage.client, every("l", 10)).await.unwrap();
    let before = until(&mut stage.client, "l", |entry| entry.ticks.unwrap().ran >= 2).await;
    let replaced = start(&mut stage.client, every("l", 3_600_000)).await.unwrap();
    assert!(replaced.ticks.unwrap().due >= before.ticks.unwrap().due);
    assert!(replaced.last_cycle_id >= before.last_cycle_id);
    assert_eq!(next_due(&replaced).rem_euclid(3_600_000_000_000), 0);
    // The same settings change nothing.
    assert_eq!(start(&mut stage.client, every("l", 3_600_000)).await.unwrap(), replaced);
    assert_eq!(list(&mut stage.client).await, [replaced]);
}

#[tokio::test]
async fn a_loop_whose_cycles_call_nothing_is_reported_once() {
    let mut stage = Stage::new().await;
    start(&mut stage.client, every("idle", 10)).await.unwrap();
    until(&mut stage.client, "idle", |entry| entry.ticks.unwrap().ran >= 3).await;
    stage.register("a", |_| {}).await;
    stage.fleet.until_run("a", 1).await;
    let name = "a".to_owned();
    stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name }).await.unwrap();
    let ran = get(&mut stage.client, "idle").await.ticks.unwrap().ran;
    until(&mut stage.client, "idle", |entry| entry.ticks.unwrap().ran >= ran + 3).await;
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let log = home.log();
    let logged: Vec<_> = log.lines().filter(|line| line.contains("the cycles of this loop call nothing")).collect();
    assert_eq!(logged.len(), 2, "once before the registration and once after it: {log}");
    assert!(logged.iter().all(|line| line.contains("WARN") && line.contains("loop=idle")), "{logged:?}");
}

#[tokio::test]
async fn overruns_are_counted_and_listed() {
    let mut stage = Stage::new().await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    start(&mut stage.client, every("l", 10)).await.unwrap();
    stage.fleet.until_run("held", 1).await;
    let entry = until(&mut stage.client, "l", |entry| entry.ticks.unwrap().skipped >= 3).await;
    let ticks = entry.ticks.unwrap();
    assert_eq!(ticks.ran, 1);
    let listed: Vec<_> = entry.not_run.iter().filter(|it| it.disposition() == TickDisposition::Skipped).collect();
    assert_eq!(listed.iter().map(|range| range.count).sum::<u64>(), ticks.skipped, "{entry:?}");
    for range in listed {
        let (first, last) = (nanos(range.first_due_at.unwrap()), nanos(range.last_due_at.unwrap()));
        assert_eq!(first + i128::from(range.count - 1) * 10_000_000, last);
    }
    // No cycle was started for the overruns.
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.queued_cycles, status.running_cycle.unwrap().cycle_id), (0, 1));
    stage.fleet.run("held", Run::Echo);
    until(&mut stage.client, "l", |entry| entry.ticks.unwrap().ran >= 2).await;
}

#[tokio::test]
async fn overlapping_ticks_are_coalesced_queued_dropped_or_cancel() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.max_queued=2"])).await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    let with = |policy: OverlapPolicy| IntervalLoop { overlap_policy: policy.into(), ..every("l", 10) };

    start(&mut stage.client, with(OverlapPolicy::BufferOne)).await.unwrap();
    let entry = until(&mut stage.client, "l", |entry| entry.ticks.unwrap().coalesced >= 3).await;
    // One cycle runs, one waits.
    assert_eq!(entry.ticks.unwrap().ran, 2);
    assert_eq!(stage.client.status().await.unwrap().queued_cycles, 1);
    assert!(entry.not_run.iter().any(|range| range.disposition() == TickDisposition::Coalesced));

    start(&mut stage.client, with(OverlapPolicy::BufferAll)).await.unwrap();
    let entry = until(&mut stage.client, "l", |entry| entry.ticks.unwrap().dropped >= 3).await;
    assert_eq!(entry.ticks.unwrap().ran, 3);
    assert!(entry.not_run.iter().any(|range| range.disposition() == TickDisposition::Dropped));

    let mut cycles = stage.client.watch_after(0).await.unwrap();
    stop(&mut stage.client, "l").await.unwrap();
    for cycle_id in 1..=3 {
        stage.client.cancel(cycle_id).await.unwrap();
    }
    start(&mut stage.client, with(OverlapPolicy::CancelOther)).await.unwrap();
    let mut cancelled = 0;
    while cancelled < 5 {
        let cycle = decode(next_recorded(&mut cycles).await);
        assert_eq!(cycle.state(), CycleState::Cancelled);
        cancelled += 1;
    }
    assert_eq!(get(&mut stage.client, "l").await.ticks.unwrap().skipped, 0);
}

#[tokio::test]
async fn started_and_stopped_loops_stay_so_after_a_restart() {
    let config = "[[loops]]\nname = \"declared\"\ninterval = \"10ms\"\njitter = \"1ms\"\n";
    let mut stage = Stage::at(Home::new().with_config(config)).await;
    start(&mut stage.client, IntervalLoop { offset: ms(3), ..every("by_rpc", 10) }).await.unwrap();
    start(&mut stage.client, every("forgotten", 10)).await.unwrap();
    let before = until(&mut stage.client, "by_rpc", |entry| entry.ticks.unwrap().ran >= 2).await;
    until(&mut stage.client, "declared", |entry| entry.ticks.unwrap().ran >= 2).await;
    assert_eq!(get(&mut stage.client, "declared").await.origin(), Origin::Config);
    // A declared loop keeps its settings. It may be started with the same settings, or stopped.
    let refused = because(Code::FailedPrecondition, "DECLARED_IN_CONFIG", [("name", "declared")]);
    assert_eq!(start(&mut stage.client, every("declared", 10)).await.unwrap_err(), refused);
    let alike = IntervalLoop { jitter: ms(1), ..every("declared", 10) };
    assert!(!start(&mut stage.client, alike.clone()).await.unwrap().stopped);
    stop(&mut stage.client, "forgotten").await.unwrap();
    let stopped = stop(&mut stage.client, "declared").await.unwrap();
    assert!(stopped.stopped && stopped.next_due_at.is_none());

    for restart in ["stop", "kill"] {
        stage = if restart == "stop" { stage.restarted().await } else { stage.killed().await };
        let names: Vec<_> = list(&mut stage.client).await.into_iter().map(|it| it.r#loop.unwrap().name).collect();
        assert_eq!(names, ["by_rpc", "declared"], "{restart}");
        assert_eq!(get(&mut stage.client, "declared").await, stopped, "{restart}");
        let after = get(&mut stage.client, "by_rpc").await;
        assert_eq!(after.r#loop, before.r#loop);
        let ran = after.ticks.unwrap().ran;
        assert!(ran >= before.ticks.unwrap().ran);
        until(&mut stage.client, "by_rpc", |entry| entry.ticks.unwrap().ran > ran).await;
    }
    let only_named = IntervalLoop { name: "declared".into(), ..Default::default() };
    let again = start(&mut stage.client, only_named).await.unwrap();
    assert_eq!((again.stopped, again.r#loop.as_ref().unwrap().jitter), (false, alike.jitter));
    let ran = again.ticks.unwrap().ran;
    until(&mut stage.client, "declared", |entry| entry.ticks.unwrap().ran > ran).await;
    // Loops that the file no longer declares are removed.
    std::fs::write(stage.home.path("orchestrator.toml"), "").unwrap();
    let mut stage = stage.restarted().await;
    assert_eq!(list(&mut stage.client).await.len(), 1);
    assert!(stage.home.log().contains("the configuration does not declare them any more"), "{}", stage.home.log());
    let removals = audited(&stage, "serve").await;
    assert_eq!(removals.len(), 1, "{removals:?}");
    assert_eq!(removals[0].targets, ["declared"]);
}

/// The audit events of this action of the service.
async fn audited(stage: &Stage, action: &str) -> Vec<pb::AuditEvent> {
    let request = pb::ListAuditEventsRequest::default();
    let mut ledger = LedgerClient::connect(format!("http://{}", stage.service.address())).await.unwrap();
    let events = ledger.list_audit_events(request).await.unwrap().into_inner().events;
    let events = events.into_iter().map(|event| pb::AuditEvent::decode(event.event).unwrap());
    events.filter(|event| event.rpc == action).collect()
}

#[tokio::test]
async fn every_tick_is_counted_also_while_the_service_is_down() {
    /// A start may be quicker than a tick: then the service is restarted once more.
    const RESTARTS: usize = 100;
    let mut stage = Stage::new().await;
    let one = |window| IntervalLoop { catch_up: CatchUp::One.into(), catch_up_window: ms(window), ..every("", 10) };
    // Their ticks differ, so that no loop skips one because of another.
    for (name, offset, settings) in [("none", 0, every("", 10)), ("one", 3, one(60_000)), ("outside", 6, one(0))] {
        start(&mut stage.client, IntervalLoop { name: name.into(), offset: ms(offset), ..settings }).await.unwrap();
        until(&mut stage.client, name, |entry| entry.ticks.unwrap().ran >= 1).await;
    }
    let mut coalesced = 0;
    let mut missed = BTreeMap::from([("none", 0), ("outside", 0)]);
    for _ in 0..RESTARTS {
        let mut before = Vec::new();
        for name in ["none", "one", "outside"] {
            before.push((name, get(&mut stage.client, name).await));
        }
        stage = stage.restarted().await;
        for (name, before) in before {
            let ran = before.ticks.unwrap().ran;
            let after = until(&mut stage.client, name, |after| after.ticks.unwrap().ran > ran).await;
            let (ticks, earlier) = (after.ticks.unwrap(), before.ticks.unwrap());
            // The number of ticks between the two times, whatever happened in between.
            let due = i128::from(ticks.due - earlier.due);
            assert_eq!(next_due(&after) - next_due(&before), due * 10_000_000, "{name}");
            match missed.get_mut(name) {
                Some(missed) => {
                    *missed += ticks.missed - earlier.missed;
                    assert_eq!(ticks.coalesced, 0, "{after:?}");
                    assert!(*missed == 0 || after.not_run.iter().any(|it| it.disposition() == TickDisposition::Missed));
                }
                None => coalesced += ticks.coalesced - earlier.coalesced,
            }
        }
        if coalesced > 0 && missed.values().all(|missed| *missed > 0) {
            break;
        }
    }
    assert!(coalesced > 0 && missed.values().all(|missed| *missed > 0), "{coalesced} {missed:?}");
    // The same after a kill: ticks that were not written down are missed.
    let before = get(&mut stage.client, "none").await;
    let mut stage = stage.killed().await;
    let after = get(&mut stage.client, "none").await;
    let due = i128::from(after.ticks.unwrap().due - before.ticks.unwrap().due);
    assert_eq!(next_due(&after) - next_due(&before), due * 10_000_000);
}

async fn pause(client: &mut Client, name: &str, all: bool) -> Result<Vec<IntervalLoopStatus>, Reason> {
    let paused = client.pause_interval_loops(pb::PauseIntervalLoopsRequest { name: name.into(), all }).await;
    paused.map(|answer| answer.into_inner().loops).map_err(|status| reason(&status))
}

async fn resume(client: &mut Client, name: &str, all: bool) -> Result<Vec<IntervalLoopStatus>, Reason> {
    let resumed = client.resume_interval_loops(pb::ResumeIntervalLoopsRequest { name: name.into(), all }).await;
    resumed.map(|answer| answer.into_inner().loops).map_err(|status| reason(&status))
}

/// The names of the loops, each with whether it is paused.
async fn paused(client: &mut Client) -> Vec<(String, bool)> {
    let loops = list(client).await.into_iter();
    loops
        .map(|entry| {
            assert_eq!(entry.next_due_at.is_none(), entry.paused, "{entry:?}");
            (entry.r#loop.unwrap().name, entry.paused)
        })
        .collect()
}

fn named<const N: usize>(loops: [(&str, bool); N]) -> Vec<(String, bool)> {
    loops.map(|(name, paused)| (name.to_owned(), paused)).into()
}

#[tokio::test]
async fn a_paused_loop_has_no_ticks_until_it_is_resumed_also_after_a_restart() {
    let config = "[[loops]]\nname = \"declared\"\ninterval = \"10ms\"\n";
    let mut stage = Stage::at(Home::new().with_config(config)).await;
    start(&mut stage.client, every("by_rpc", 10)).await.unwrap();
    for name in ["by_rpc", "declared"] {
        until(&mut stage.client, name, |entry| entry.ticks.unwrap().ran >= 2).await;
        let paused = pause(&mut stage.client, name, false).await.unwrap();
        assert!(paused[0].paused && !paused[0].stopped && paused[0].next_due_at.is_none(), "{paused:?}");
        assert_eq!(pause(&mut stage.client, name, false).await.unwrap(), paused, "it changes nothing");
    }
    let before = list(&mut stage.client).await;
    assert_eq!(stage.client.run().await.unwrap().trigger(), Trigger::Manual);
    // Other settings do not resume it.
    let edited = start(&mut stage.client, every("by_rpc", 20)).await.unwrap();
    assert!(edited.paused && edited.next_due_at.is_none(), "{edited:?}");
    for restart in ["stop", "kill"] {
        stage = if restart == "stop" { stage.restarted().await } else { stage.killed().await };
        let after = list(&mut stage.client).await;
        assert_eq!((&after[0], &after[1]), (&edited, &before[1]), "{restart}");
    }
    for (name, before) in ["by_rpc", "declared"].iter().zip(before) {
        let resumed = resume(&mut stage.client, name, false).await.unwrap();
        assert!(!resumed[0].paused, "{resumed:?}");
        let ticks = before.ticks.unwrap();
        let after = until(&mut stage.client, name, |entry| entry.ticks.unwrap().ran > ticks.ran).await;
        assert_eq!(after.ticks.unwrap().missed, ticks.missed, "ticks of the pause were not due");
    }
    let gone = because(Code::NotFound, "LOOP_NOT_FOUND", [("loop", "none")]);
    assert_eq!(pause(&mut stage.client, "none", false).await.unwrap_err(), gone);
    assert_eq!(resume(&mut stage.client, "none", false).await.unwrap_err(), gone);
    assert_eq!(pause(&mut stage.client, "", false).await.unwrap_err(), invalid(["name"]));
    assert_eq!(resume(&mut stage.client, "by_rpc", true).await.unwrap_err(), invalid(["all"]));
}

#[tokio::test]
async fn the_pause_of_all_loops_is_beside_that_of_each_and_includes_later_ones() {
    const HOUR: i64 = 3_600_000;
    let mut stage = Stage::new().await;
    for name in ["a", "b"] {
        start(&mut stage.client, every(name, HOUR)).await.unwrap();
    }
    pause(&mut stage.client, "a", false).await.unwrap();
    assert!(!stage.client.status().await.unwrap().loops_paused);
    let all = pause(&mut stage.client, "", true).await.unwrap();
    assert!(all.len() == 2 && all.iter().all(|entry| entry.paused), "{all:?}");
    let later = start(&mut stage.client, every("later", HOUR)).await.unwrap();
    assert!(later.paused && later.next_due_at.is_none(), "{later:?}");
    assert!(resume(&mut stage.client, "a", false).await.unwrap()[0].paused, "all are paused");
    pause(&mut stage.client, "a", false).await.unwrap();

    let mut stage = stage.killed().await;
    assert!(stage.client.status().await.unwrap().loops_paused);
    assert_eq!(paused(&mut stage.client).await, named([("a", true), ("b", true), ("later", true)]));
    let all = resume(&mut stage.client, "", true).await.unwrap();
    assert_eq!(all.iter().filter(|entry| entry.paused).count(), 1);
    assert_eq!(paused(&mut stage.client).await, named([("a", true), ("b", false), ("later", false)]));
    assert!(!stage.client.status().await.unwrap().loops_paused);
    let mut stage = stage.restarted().await;
    assert_eq!(paused(&mut stage.client).await, named([("a", true), ("b", false), ("later", false)]));
}

#[tokio::test]
async fn a_service_that_begins_paused_starts_no_cycle_by_itself_until_its_loops_are_resumed() {
    let config = "[[loops]]\nname = \"declared\"\ninterval = \"10ms\"\ncatch_up = \"one\"\n";
    let mut stage = Stage::at(Home::new().with_config(config)).await;
    let before = until(&mut stage.client, "declared", |entry| entry.ticks.unwrap().ran >= 2).await;
    let Stage { fleet, home, service, .. } = stage;
    service.kill().await;

    let mut stage = Stage::again(fleet, home.with_args(["--paused"])).await;
    assert!(stage.client.status().await.unwrap().loops_paused);
    assert_eq!(paused(&mut stage.client).await, named([("declared", true)]));
    let manual = stage.client.run().await.unwrap();
    assert_eq!(manual.trigger(), Trigger::Manual);
    let still = get(&mut stage.client, "declared").await;
    assert!(still.ticks.unwrap().due >= before.ticks.unwrap().due, "the ticks while it was down are accounted for");
    stage = stage.restarted().await;
    assert_eq!(get(&mut stage.client, "declared").await, still);
    let pauses = audited(&stage, "serve --paused").await;
    assert_eq!(pauses.len(), 1, "the second start changed nothing: {pauses:?}");

    resume(&mut stage.client, "", true).await.unwrap();
    let ran = still.ticks.unwrap().ran;
    until(&mut stage.client, "declared", |entry| entry.ticks.unwrap().ran > ran).await;
}

#[tokio::test]
async fn bad_settings_are_refused_field_by_field() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "registry.max_loops=2"])).await;
    let good = || every("l", 1000);
    let cases = [
        (IntervalLoop { name: "9".into(), ..good() }, vec!["name"]),
        (IntervalLoop { interval: None, ..good() }, vec!["interval"]),
        (IntervalLoop { interval: ms(9), ..good() }, vec!["interval"]),
        (IntervalLoop { interval: ms(366 * 86_400_000 + 1), ..good() }, vec!["interval"]),
        (IntervalLoop { offset: ms(1000), jitter: ms(1000), ..good() }, vec!["offset", "jitter"]),
        (IntervalLoop { overlap_policy: 99, catch_up: 99, ..good() }, vec!["overlap_policy", "catch_up"]),
        (IntervalLoop { catch_up_window: ms(366 * 86_400_000 + 1), ..good() }, vec!["catch_up_window"]),
        (IntervalLoop { subsystems: vec!["a".into(), "a".into()], ..good() }, vec!["subsystems[1]"]),
        (IntervalLoop { parameters: b"\xff".as_slice().into(), ..good() }, vec!["parameters"]),
        (IntervalLoop { parameters: to_struct(&json!({ "p": "x".repeat(64 << 10) })), ..good() }, vec!["parameters"]),
        (IntervalLoop { deadline: ms(0), ..good() }, vec!["deadline"]),
    ];
    for (settings, fields) in cases {
        let refused = start(&mut stage.client, settings).await.unwrap_err();
        assert_eq!(refused.fields, fields.iter().map(|field| format!("loop.{field}")).collect::<Vec<_>>());
        assert_eq!((refused.code, refused.why.as_str()), (Code::InvalidArgument, "INVALID_FIELDS"));
    }
    let nothing = stage.client.start_interval_loop(pb::StartIntervalLoopRequest::default()).await.unwrap_err();
    assert_eq!(reason(&nothing), invalid(["loop"]));
    assert_eq!(stop(&mut stage.client, "").await.unwrap_err(), invalid(["name"]));

    for name in ["one", "two"] {
        start(&mut stage.client, every(name, 3_600_000)).await.unwrap();
    }
    let full = because(Code::ResourceExhausted, "TOO_MANY_LOOPS", []);
    assert_eq!(start(&mut stage.client, every("three", 3_600_000)).await.unwrap_err(), full);
    start(&mut stage.client, every("two", 7_200_000)).await.unwrap();
    stop(&mut stage.client, "one").await.unwrap();
    start(&mut stage.client, every("three", 3_600_000)).await.unwrap();
}

#[tokio::test]
async fn a_loop_names_at_most_as_many_subsystems_as_may_be_registered() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "registry.max_subsystems=2"])).await;
    let over = |names: &[&str]| IntervalLoop {
        subsystems: names.iter().map(ToString::to_string).collect(),
        ..every("l", 3_600_000)
    };
    start(&mut stage.client, over(&["a", "b"])).await.unwrap();
    assert_eq!(start(&mut stage.client, over(&["a", "b", "c"])).await.unwrap_err(), invalid(["loop.subsystems"]));
}

#[tokio::test]
async fn cycles_of_loops_have_deadlines_of_their_own() {
    // Nothing else ends the cycle.
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.deadline=1h"])).await;
    stage.fleet.run("late", Run::Hang);
    stage.register("late", |it| it.timeout = ms(3_600_000)).await;
    let mut cycles = stage.client.watch_after(0).await.unwrap();
    start(&mut stage.client, IntervalLoop { deadline: ms(50), ..every("l", 20) }).await.unwrap();
    let cycle = decode(patiently("the deadline", next_recorded(&mut cycles)).await);
    assert_eq!((cycle.state(), part(&cycle, "late").state()), (CycleState::Failed, SubsystemState::TimedOut));
}

#[tokio::test]
async fn loops_are_listed_by_pages_and_large_ones_do_not_hide_the_status() {
    let mut stage = Stage::new().await;
    let large = to_struct(&json!({ "text": "x".repeat(60_000) }));
    for i in 0..60 {
        let settings = IntervalLoop { parameters: large.clone(), ..every(&format!("l{i:02}"), 3_600_000) };
        let request = pb::StartIntervalLoopRequest { r#loop: Some(settings) };
        stage.client.start_interval_loop(request).await.unwrap();
    }
    let mut names = Vec::new();
    let mut request = pb::ListIntervalLoopsRequest::default();
    loop {
        let page = stage.client.list_interval_loops(request.clone()).await.unwrap().into_inner();
        assert!(prost::Message::encoded_len(&page) < 4 << 20);
        names.extend(page.loops.into_iter().map(|it| it.r#loop.unwrap().name));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(names, (0..60).map(|i| format!("l{i:02}")).collect::<Vec<_>>());
    let request = pb::ListIntervalLoopsRequest { page_size: 2, page_token: "l07".into() };
    let page = stage.client.list_interval_loops(request).await.unwrap().into_inner();
    assert_eq!((page.loops.len(), page.next_page_token.as_str()), (2, "l09"));

    let status = stage.client.status().await.unwrap();
    assert!(prost::Message::encoded_len(&status) < 4 << 20);
    let last = status.loops[59].r#loop.as_ref().unwrap();
    assert_eq!((last.name.as_str(), &last.interval, last.parameters.is_empty()), ("l59", &ms(3_600_000), true));
}
