//! Loops: when they are started, stopped and started again.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use orchestrator_core::{
    model::{CatchUp, IntervalLoop, LoopStart, Name},
    orchestrator::{Declared, Orchestrator, OrchestratorTasks, Refusal},
    ports::Store,
    schedule::{LoopEntry, LoopOrigin},
};
use tokio::time::sleep;

use crate::kit::{Process, by_test, host, hourly, in_memory};

/// A process whose file declares the loops `declared` and `other`.
async fn declaring(store: &Arc<dyn Store>) -> (Orchestrator, OrchestratorTasks) {
    let declared = Declared { loops: vec![hourly("declared"), hourly("other")], ..Declared::default() };
    Process { declared, ..Process::default() }.over(store.clone()).await.unwrap()
}

/// When the cycle of its next tick starts.
fn fires_at(entry: &LoopEntry) -> Option<Timestamp> {
    entry.next.map(|tick| tick.fires_at)
}

#[tokio::test(start_paused = true)]
async fn starting_a_loop_again_changes_only_different_settings() {
    let (orchestrator, _tasks) = declaring(&in_memory().await).await;
    let start = |settings: IntervalLoop| orchestrator.start_loop(LoopStart::Of(settings), by_test());
    let as_declared =
        |name: &str| orchestrator.start_loop(LoopStart::AsDeclared(Name::parse(name).unwrap()), by_test());
    let own = start(hourly("own")).await.unwrap();
    assert_eq!((own.origin, fires_at(&own).is_some()), (LoopOrigin::Rpc, true));
    // Unchanged loops keep their next tick, to the same random delay.
    assert_eq!(fires_at(&start(hourly("own")).await.unwrap()), fires_at(&own));
    let declared = start(hourly("declared")).await.unwrap();
    assert_eq!((declared.origin, fires_at(&declared).is_some()), (LoopOrigin::Config, true));
    assert_eq!(fires_at(&as_declared("declared").await.unwrap()), fires_at(&declared));
    assert_eq!(fires_at(&start(hourly("declared")).await.unwrap()), fires_at(&declared));
    // A stopped one gets a new tick.
    assert_eq!(fires_at(&orchestrator.stop_loop(&Name::parse("declared").unwrap(), by_test()).await.unwrap()), None);
    let again = as_declared("declared").await.unwrap();
    assert!(!again.state.stopped && fires_at(&again).is_some());

    let catching_up = |name: &str| IntervalLoop { catch_up: CatchUp::One, ..hourly(name) };
    let changed = start(catching_up("own")).await.unwrap();
    assert_eq!((&*changed.settings, changed.origin), (&catching_up("own"), LoopOrigin::Rpc));
    let refused = start(catching_up("declared")).await;
    assert!(matches!(refused, Err(Refusal::DeclaredInConfig(_))), "{refused:?}");
    // A name alone means a loop that the file declares.
    for other in ["own", "unknown"] {
        let refused = as_declared(other).await.unwrap_err();
        assert!(matches!(&refused, Refusal::Invalid(bad) if bad.to_string().contains("interval")), "{refused:?}");
    }
    let names: Vec<_> = orchestrator.loops().iter().map(|entry| entry.settings.name.to_string()).collect();
    assert_eq!(names, ["declared", "other", "own"]);
}

#[tokio::test(start_paused = true)]
async fn a_started_or_stopped_loop_stays_so_though_the_process_dies_at_once() {
    let store = in_memory().await;
    let listed = |orchestrator: &Orchestrator| -> Vec<_> {
        let state = |entry: &LoopEntry| if entry.state.stopped { "stopped" } else { "started" };
        orchestrator.loops().iter().map(|entry| format!("{} {}", entry.settings.name, state(entry))).collect()
    };
    let stop = async |orchestrator: &Orchestrator, name| {
        orchestrator.stop_loop(&Name::parse(name).unwrap(), by_test()).await.unwrap();
    };
    let (orchestrator, tasks) = declaring(&store).await;
    orchestrator.start_loop(LoopStart::Of(hourly("own")), by_test()).await.unwrap();
    drop(tasks);
    let (orchestrator, tasks) = declaring(&store).await;
    assert_eq!(listed(&orchestrator), ["declared started", "other started", "own started"]);
    stop(&orchestrator, "own").await;
    drop(tasks);
    let (orchestrator, tasks) = declaring(&store).await;
    assert_eq!(listed(&orchestrator), ["declared started", "other started"]);
    stop(&orchestrator, "declared").await;
    drop(tasks);
    let (orchestrator, _tasks) = declaring(&store).await;
    assert_eq!(listed(&orchestrator), ["declared stopped", "other started"]);
}

#[tokio::test(start_paused = true)]
async fn ticks_continue_at_once_after_the_clock_is_set_back_by_an_hour() {
    let host = host();
    let clock = host.clock;
    let process = Process { host, ..Process::default() };
    let (orchestrator, _tasks) = process.over(in_memory().await).await.unwrap();
    let steady = IntervalLoop { interval: Duration::from_secs(10), jitter: Duration::ZERO, ..hourly("steady") };
    orchestrator.start_loop(LoopStart::Of(steady), by_test()).await.unwrap();
    let ran = || orchestrator.loops()[0].state.ticks.ran;
    sleep(Duration::from_secs(35)).await;
    assert_eq!(ran(), 3);
    clock.set(clock.now() - Duration::from_hours(1));
    sleep(Duration::from_secs(30)).await;
    assert_eq!(ran(), 6);
}
