//! Cycles side by side: those that share no subsystem run at the same time, and the others one after another.

use std::collections::BTreeMap;

use crate::common::{
    Stage,
    fleet::Run,
    patiently,
    service::{Client, because, decode, ms, next_event, part, reason},
};
use orchestrator_core::proto::{
    orchestrator::v1::{self as pb, CycleState, OverlapPolicy, SubsystemState, cycle_event::Event},
    subsystem::v1::Freshness,
};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

fn of(subsystems: &[&str]) -> pb::RunCycleRequest {
    let subsystems = subsystems.iter().map(|&name| name.to_owned()).collect();
    pb::RunCycleRequest { subsystems, ..Default::default() }
}

fn with(policy: OverlapPolicy, subsystems: &[&str]) -> pb::RunCycleRequest {
    pb::RunCycleRequest { overlap_policy: policy.into(), ..of(subsystems) }
}

type Running = JoinHandle<Result<pb::CycleTelemetry, Status>>;

fn start(client: &Client, request: pb::RunCycleRequest) -> Running {
    let mut client = client.clone();
    tokio::spawn(async move { client.run_with(request).await })
}

async fn ended(running: Running) -> pb::CycleTelemetry {
    patiently("the cycle to end", running).await.unwrap().unwrap()
}

/// A service with these subsystems, each of which answers only once it is released.
async fn stage_of(names: &[&str]) -> Stage {
    let mut stage = Stage::new().await;
    stage.register_all(names).await;
    for name in names {
        stage.fleet.run(name, Run::Hold);
    }
    stage
}

fn ids(cycles: &[pb::RunningCycle]) -> Vec<u64> {
    cycles.iter().map(|cycle| cycle.cycle_id).collect()
}

#[tokio::test]
async fn cycles_that_share_nothing_run_at_the_same_time_and_are_recorded_as_they_end() {
    let mut stage = stage_of(&["a", "b", "c"]).await;
    let first = start(&stage.client, of(&["a"]));
    stage.fleet.until_run("a", 1).await;
    let second = start(&stage.client, of(&["b"]));
    stage.fleet.until_run("b", 1).await;
    let whole = start(&stage.client, of(&[]));
    patiently("the third to wait", async { while stage.client.status().await.unwrap().queued_cycles != 1 {} }).await;
    let status = stage.client.status().await.unwrap();
    assert_eq!(ids(&status.running_cycles), [1, 2]);
    assert_eq!(status.running_cycle.unwrap().cycle_id, 1);
    assert_eq!(status.total_cycles, 0);

    // The later cycle is recorded first, and so is listed as the older one.
    stage.fleet.run("b", Run::Echo);
    let second = ended(second).await;
    assert_eq!((second.cycle_id, second.revision), (2, 1));
    let status = stage.client.status().await.unwrap();
    assert_eq!((ids(&status.running_cycles), status.queued_cycles), (vec![1], 1));
    assert_eq!((status.total_cycles, status.newest_revision), (1, 1));
    assert_eq!(decode(status.last_cycle).cycle_id, 2);
    assert_eq!(reason(&stage.client.cycle(1).await.unwrap_err()).code, Code::FailedPrecondition);
    assert_eq!(reason(&stage.client.cancel(2).await.unwrap_err()).code, Code::FailedPrecondition);

    stage.fleet.run("a", Run::Echo);
    let first = ended(first).await;
    assert_eq!((first.cycle_id, first.revision), (1, 2));
    // The cycle over all subsystems has waited for both, and no cycle is before it now.
    stage.fleet.until_run("c", 1).await;
    stage.fleet.run("c", Run::Echo);
    let whole = ended(whole).await;
    assert_eq!((whole.cycle_id, whole.revision, whole.subsystems.len()), (3, 3, 3));
    let history: Vec<_> = stage.client.history().await.unwrap().into_iter().map(decode).collect();
    let by_revision: Vec<_> = history.iter().map(|cycle| cycle.cycle_id).collect();
    assert_eq!(by_revision, [2, 1, 3]);
    let listed = stage.client.list_cycles(pb::ListCyclesRequest::default()).await.unwrap().into_inner().cycles;
    let newest_first: Vec<_> = listed.into_iter().map(|cycle| decode(cycle).cycle_id).collect();
    assert_eq!(newest_first, [3, 1, 2]);
}

#[tokio::test]
async fn no_cycle_overtakes_a_waiting_one_with_which_it_shares_a_subsystem() {
    let mut stage = stage_of(&["a", "b", "c"]).await;
    let first = start(&stage.client, of(&["a"]));
    stage.fleet.until_run("a", 1).await;
    // The second cycle waits for the first, and so blocks its subsystems for later cycles.
    assert_eq!(stage.client.admit_with(of(&["a", "b"])).await.unwrap(), 2);
    assert_eq!(stage.client.admit_with(of(&["b"])).await.unwrap(), 3);
    let beside = start(&stage.client, of(&["c"]));
    stage.fleet.until_run("c", 1).await;
    assert_eq!(stage.fleet.runs("b").len(), 0);
    stage.fleet.run("a", Run::Echo);
    ended(first).await;
    stage.fleet.until_run("b", 1).await;
    for name in ["b", "c"] {
        stage.fleet.run(name, Run::Echo);
    }
    ended(beside).await;
    for cycle_id in [2, 3] {
        assert_eq!(stage.client.recorded(cycle_id).await.state(), CycleState::Succeeded);
    }
    let order: Vec<_> = stage.fleet.runs("b").iter().map(|call| call.cycle_id).collect();
    assert_eq!(order, [2, 3]);
}

#[tokio::test]
async fn a_waiting_cycle_that_is_cancelled_is_recorded_at_once_and_unblocks_later_ones() {
    let mut stage = stage_of(&["a", "b"]).await;
    let first = start(&stage.client, of(&["a"]));
    stage.fleet.until_run("a", 1).await;
    assert_eq!(stage.client.admit_with(of(&["a", "b"])).await.unwrap(), 2);
    let third = start(&stage.client, of(&["b"]));
    patiently("the third to wait", async { while stage.client.status().await.unwrap().queued_cycles != 2 {} }).await;
    let cancelled = patiently("the record of the second", stage.client.cancel(2)).await.unwrap();
    assert_eq!((cancelled.state(), cancelled.revision), (CycleState::Cancelled, 1));
    assert_eq!((cancelled.started_at, cancelled.subsystems.len()), (None, 0));
    // No other cycle shares its subsystem any more.
    stage.fleet.until_run("b", 1).await;
    for name in ["a", "b"] {
        stage.fleet.run(name, Run::Echo);
    }
    assert_eq!((ended(first).await.cycle_id, ended(third).await.cycle_id), (1, 3));
}

#[tokio::test]
async fn overlap_policies_apply_to_cycles_with_a_subsystem_in_common() {
    let mut stage = stage_of(&["a", "b", "c"]).await;
    let [first, beside] = [start(&stage.client, of(&["a", "b"])), start(&stage.client, of(&["c"]))];
    for name in ["a", "b", "c"] {
        stage.fleet.until_run(name, 1).await;
    }
    let cycle_of = |name: &str| stage.fleet.runs(name)[0].cycle_id.to_string();
    for name in ["b", "c"] {
        let refusal = reason(&stage.client.clone().run_with(with(OverlapPolicy::Skip, &[name])).await.unwrap_err());
        assert_eq!(refusal, because(Code::Aborted, "CYCLE_RUNNING", [("cycle_id", &cycle_of(name))]));
    }

    // One waiting cycle of each kind is allowed.
    for (name, cycle_id) in [("a", 3), ("c", 4)] {
        let request = with(OverlapPolicy::BufferOne, &[name]);
        assert_eq!(stage.client.admit_with(request).await.unwrap(), cycle_id);
    }
    let refusal = stage.client.run_with(with(OverlapPolicy::BufferOne, &["a"])).await.unwrap_err();
    assert_eq!(reason(&refusal), because(Code::Aborted, "CYCLE_RUNNING", [("cycle_id", "3")]));
    assert_eq!(stage.client.admit_with(with(OverlapPolicy::BufferOne, &["b"])).await.unwrap(), 5);

    // Only the running cycles that share a subsystem with it are cancelled.
    let other = start(&stage.client, with(OverlapPolicy::CancelOther, &["b"]));
    assert_eq!(ended(first).await.state(), CycleState::Cancelled);
    for name in ["a", "b", "c"] {
        stage.fleet.run(name, Run::Echo);
    }
    assert_eq!(ended(beside).await.state(), CycleState::Succeeded);
    assert_eq!(ended(other).await.state(), CycleState::Succeeded);
    for cycle_id in 3..=5 {
        assert_eq!(stage.client.recorded(cycle_id).await.state(), CycleState::Succeeded, "{cycle_id}");
    }
}

#[tokio::test]
async fn progress_continues_when_another_cycle_is_recorded() {
    let mut stage = stage_of(&["a", "b", "c"]).await;
    stage.register("after_a", |it| it.after = vec!["a".into()]).await;
    let request = pb::WatchCyclesRequest { progress: true, ..Default::default() };
    let mut events = stage.client.watch_cycles(request).await.unwrap().into_inner();
    assert!(matches!(next_event(&mut events).await.unwrap().event, Some(Event::Bookmark(_))));
    let first = start(&stage.client, of(&["a", "after_a"]));
    stage.fleet.until_run("a", 1).await;
    let second = start(&stage.client, of(&["b"]));
    stage.fleet.until_run("b", 1).await;
    stage.fleet.run("b", Run::Echo);
    ended(second).await;
    stage.fleet.run("a", Run::Echo);
    ended(first).await;

    let mut heard: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut last_revision = 0;
    while last_revision < 2 {
        let event = next_event(&mut events).await.unwrap();
        assert!(event.revision >= last_revision, "{event:?}");
        last_revision = event.revision;
        let (cycle_id, what) = match event.event.unwrap() {
            Event::Started(started) => (started.cycle_id, vec!["started".to_owned()]),
            Event::Progress(progress) => {
                assert_eq!(progress.dropped, 0);
                let update = |update: &pb::SubsystemProgress| format!("{} {:?}", update.name, update.state());
                (progress.cycle_id, progress.updates.iter().map(update).collect())
            }
            Event::Recorded(record) => (decode(record).cycle_id, vec!["recorded".to_owned()]),
            Event::Bookmark(_) => continue,
            Event::Unreadable(it) => panic!("{it:?}"),
        };
        heard.entry(cycle_id).or_default().extend(what);
    }
    let of_second = ["started", "b Running", "b Succeeded", "recorded"];
    assert_eq!(heard[&2], of_second);
    let of_first = ["started", "a Running", "a Succeeded", "after_a Running", "after_a Succeeded", "recorded"];
    assert_eq!(heard[&1], of_first);
}

#[tokio::test]
async fn an_acknowledged_cycle_that_waits_outlives_the_process() {
    for kill in [false, true] {
        let mut stage = stage_of(&["a", "b"]).await;
        let running = start(&stage.client, of(&["a"]));
        stage.fleet.until_run("a", 1).await;
        let request = pb::RunCycleRequest {
            request_id: "promised".into(),
            deadline: ms(60_000),
            record_outputs: true,
            ..of(&["a", "b"])
        };
        assert_eq!(stage.client.admit_with(request.clone()).await.unwrap(), 2);
        let mut stage = if kill {
            stage.killed().await
        } else {
            stage.service.signal(Signal::TERM);
            // No cycle starts while it drains.
            while stage.client.register(stage.registration("a")).await.is_ok() {}
            stage.fleet.run("a", Run::Echo);
            assert!(stage.service.ended().await.success());
            Stage::again(stage.fleet, stage.home).await
        };
        for name in ["a", "b"] {
            stage.fleet.run(name, Run::Echo);
        }
        let second = patiently("the second", stage.client.run_with(request)).await.unwrap();
        assert_eq!((second.cycle_id, second.state()), (2, CycleState::Succeeded));
        assert!(part(&second, "b").attempts == 1 && !part(&second, "b").output.is_empty());
        let first = stage.client.cycle(1).await.unwrap();
        assert_eq!(first.state(), if kill { CycleState::Interrupted } else { CycleState::Succeeded });
        assert_eq!(stage.client.run().await.unwrap().cycle_id, 3);
        drop(running);
    }
}

#[tokio::test]
async fn an_output_of_another_cycle_is_stale_and_names_that_cycle() {
    let mut stage = stage_of(&["maker", "slow"]).await;
    stage.register("reader", |it| (it.after, it.reads) = (vec!["slow".into()], vec!["maker".into()])).await;
    let reading = start(&stage.client, of(&["slow", "reader"]));
    stage.fleet.until_run("slow", 1).await;
    stage.fleet.run("maker", Run::Echo);
    let made = stage.client.run_with(of(&["maker"])).await.unwrap();
    assert_eq!(part(&made, "maker").state(), SubsystemState::Succeeded);
    stage.fleet.run("slow", Run::Echo);
    ended(reading).await;
    let call = stage.fleet.runs("reader").pop().unwrap();
    let input = &call.inputs["maker"];
    assert_eq!((input.freshness, input.cycle_id), (Freshness::Stale, made.cycle_id));
}

#[tokio::test]
async fn loops_over_disjoint_subsystems_lose_no_tick_to_each_other() {
    let mut stage = stage_of(&["quick", "slow"]).await;
    stage.fleet.run("quick", Run::Echo);
    let a_loop = |name: &str, interval, subsystem: &str| pb::StartIntervalLoopRequest {
        r#loop: Some(pb::IntervalLoop {
            name: name.into(),
            interval: ms(interval),
            subsystems: vec![subsystem.into()],
            ..Default::default()
        }),
    };
    stage.client.start_interval_loop(a_loop("slow", 50, "slow")).await.unwrap();
    stage.fleet.until_run("slow", 1).await;
    stage.client.start_interval_loop(a_loop("quick", 50, "quick")).await.unwrap();
    stage.fleet.until_run("quick", 10).await;
    let status = stage.client.status().await.unwrap();
    let ticks = |name: &str| {
        let status = status.loops.iter().find(|it| it.r#loop.as_ref().unwrap().name == name);
        status.unwrap().ticks.unwrap()
    };
    // The slow loop is in its first cycle all the time.
    assert!(stage.fleet.runs("slow").len() == 1 && ticks("slow").skipped > 0, "{:?}", ticks("slow"));
    assert!(ticks("quick").ran >= 10, "{:?}", ticks("quick"));
    stage.fleet.run("slow", Run::Echo);
}
