//! Retention on paused time, and paging through the history meanwhile.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orchestrator_core::{
    host::Host,
    model::{CycleId, CycleState, Name},
    orchestrator::{Declared, NotCancelled, Orchestrator, OrchestratorTasks, Refusal, Settings},
    ports::{Filter, Retention, RetentionRule},
    record::{self, PartFilter},
    store,
};
use tokio::time::sleep;

use crate::kit::{Fleet, host, of, settings, start, start_with, subsystem};

const MINUTE: Duration = Duration::from_mins(1);

async fn keeping(retention: Retention) -> (Orchestrator, OrchestratorTasks) {
    let store = store::open(&store::StoreUrl::Memory, record::check, host().clock).await.unwrap();
    let settings = Settings { retention, ..settings() };
    let (orchestrator, tasks) = start(settings, Arc::new(Fleet::default()), store).await;
    orchestrator.register(subsystem("a"), None).await.unwrap();
    (orchestrator, tasks)
}

/// Runs a cycle, which takes a second. Cancels it if `state` is CANCELLED.
async fn run(orchestrator: &Orchestrator, state: CycleState) {
    let ticket = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    if state == CycleState::Cancelled {
        orchestrator.cancel_cycle(ticket.cycle_id).await.unwrap();
    }
    assert_eq!(ticket.recorded().await.unwrap().state, state);
}

/// The cycles that are retained, the newest first.
async fn retained(orchestrator: &Orchestrator) -> Vec<u64> {
    let page = orchestrator.cycles(None, Filter::default(), PartFilter::default(), 1000).await.unwrap();
    page.records.into_iter().map(|record| record.unwrap().cycle_id.0).collect()
}

#[tokio::test(start_paused = true)]
async fn records_are_removed_by_age_but_the_newest_one_stays() {
    let rule = RetentionRule { max_cycles: None, max_age: Some(10 * MINUTE) };
    let (orchestrator, _tasks) = keeping(Retention { default: rule, ..Retention::default() }).await;
    run(&orchestrator, CycleState::Succeeded).await;
    sleep(5 * MINUTE).await;
    run(&orchestrator, CycleState::Succeeded).await;
    run(&orchestrator, CycleState::Succeeded).await;
    sleep(4 * MINUTE).await;
    assert_eq!(retained(&orchestrator).await, [3, 2, 1]);
    sleep(2 * MINUTE).await;
    assert_eq!(retained(&orchestrator).await, [3, 2]);
    assert!(matches!(orchestrator.cycle(CycleId(1)).await, Err(Refusal::CycleNotFound(CycleId(1)))));
    sleep(60 * MINUTE).await;
    assert_eq!(retained(&orchestrator).await, [3]);
    // Removed records still count, and their ids are not used again.
    assert_eq!(orchestrator.status().total_cycles, 3);
    run(&orchestrator, CycleState::Succeeded).await;
    assert_eq!(retained(&orchestrator).await[0], 4);
}

#[tokio::test(start_paused = true)]
async fn a_rule_for_a_state_replaces_the_rule_for_all_states() {
    let few = |max_cycles| RetentionRule { max_cycles: Some(max_cycles), max_age: None };
    let by_state = BTreeMap::from([(CycleState::Cancelled, few(3))]);
    let (orchestrator, _tasks) = keeping(Retention { default: few(2), by_state }).await;
    for _ in 0..5 {
        run(&orchestrator, CycleState::Cancelled).await;
        run(&orchestrator, CycleState::Succeeded).await;
    }
    sleep(2 * MINUTE).await;
    assert_eq!(retained(&orchestrator).await, [10, 9, 8, 7, 5]);
}

#[tokio::test(start_paused = true)]
async fn all_records_over_the_number_are_removed_within_a_minute() {
    // More than one commit removes.
    const CYCLES: u64 = 600;
    let (orchestrator, _tasks) = keeping(Retention::default()).await;
    for _ in 0..CYCLES {
        run(&orchestrator, CycleState::Succeeded).await;
    }
    let few = RetentionRule { max_cycles: Some(10), max_age: None };
    let retention = Retention { default: few, ..Retention::default() };
    orchestrator.reload(Settings { retention, ..settings() }, Declared::default()).await.unwrap();
    sleep(MINUTE + Duration::from_secs(1)).await;
    assert_eq!(retained(&orchestrator).await, (CYCLES - 9..=CYCLES).rev().collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn after_a_long_downtime_no_record_is_removed_for_its_age_at_first() {
    let rule = RetentionRule { max_cycles: None, max_age: Some(10 * MINUTE) };
    let (retention, store) = (
        Retention { default: rule, ..Retention::default() },
        store::open(&store::StoreUrl::Memory, record::check, host().clock).await.unwrap(),
    );
    let settings = Settings { retention, ..settings() };
    let (orchestrator, mut tasks) = start(settings.clone(), Arc::default(), store.clone()).await;
    orchestrator.register(subsystem("a"), None).await.unwrap();
    for _ in 0..3 {
        run(&orchestrator, CycleState::Succeeded).await;
    }
    orchestrator.drain();
    tasks.finished().await.unwrap();
    let contents = store.take_over().await.unwrap();
    let later = Host::simulated("2027-01-01T00:00:00Z".parse().unwrap(), 0);
    let (orchestrator, _tasks) = start_with(settings, later, Arc::default(), (store, contents)).await;
    sleep(9 * MINUTE).await;
    assert_eq!(retained(&orchestrator).await, [3, 2, 1]);
    sleep(2 * MINUTE).await;
    assert_eq!(retained(&orchestrator).await, [3]);
}

#[tokio::test(start_paused = true)]
async fn a_page_with_a_filter_is_filled_from_as_many_records_as_that_takes() {
    const CYCLES: u64 = 300;
    let (orchestrator, _tasks) = keeping(Retention::default()).await;
    orchestrator.register(subsystem("b"), None).await.unwrap();
    for cycle in 0..CYCLES {
        let name = if cycle % 3 == 0 { "b" } else { "a" };
        orchestrator.run_cycle(of(&[name]), false).await.unwrap().recorded().await.unwrap();
    }
    let of_b = PartFilter { subsystems: [Name::parse("b").unwrap()].into(), ..PartFilter::default() };
    for size in [80, 7] {
        let (mut found, mut scanned, mut before) = (Vec::new(), 0, None);
        loop {
            let page = orchestrator.cycles(before, Filter::default(), of_b.clone(), size).await.unwrap();
            let is_full = page.records.len() == size;
            found.extend(page.records.into_iter().map(|record| record.unwrap().cycle_id.0));
            scanned += page.scanned;
            assert!(scanned >= 3 * found.len() - 2);
            let Some(next) = page.next else { break };
            assert!(is_full);
            before = Some(next);
        }
        assert_eq!(found, (1..=CYCLES).rev().filter(|id| id % 3 == 1).collect::<Vec<_>>());
    }
}

#[tokio::test(start_paused = true)]
async fn a_walk_by_pages_finds_each_record_once_while_others_are_recorded() {
    let (orchestrator, _tasks) = keeping(Retention::default()).await;
    for _ in 0..10 {
        run(&orchestrator, CycleState::Succeeded).await;
    }
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = orchestrator.cycles(before, Filter::default(), PartFilter::default(), 3).await.unwrap();
        found.extend(page.records.into_iter().map(|record| record.unwrap().revision.0));
        let Some(next) = page.next else { break };
        before = Some(next);
        run(&orchestrator, CycleState::Succeeded).await;
    }
    assert_eq!(found, (1..=10).rev().collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_live_cycle_is_refused_as_not_finished_and_an_unknown_one_as_not_found() {
    let (orchestrator, _tasks) = keeping(Retention::default()).await;
    let runs = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    let waits = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    for ticket in [&runs, &waits] {
        let refused = orchestrator.cycle(ticket.cycle_id).await;
        assert!(matches!(refused, Err(Refusal::CycleNotFinished(id)) if id == ticket.cycle_id), "{refused:?}");
    }
    for never in [CycleId(0), CycleId(3)] {
        assert!(matches!(orchestrator.cycle(never).await, Err(Refusal::CycleNotFound(id)) if id == never));
        assert!(matches!(orchestrator.cancel_cycle(never).await, Err(NotCancelled::CycleNotFound(id)) if id == never));
    }
    runs.recorded().await.unwrap();
    let refused = orchestrator.cancel_cycle(CycleId(1)).await;
    assert!(matches!(refused, Err(NotCancelled::CycleFinished(CycleId(1)))), "{refused:?}");
    waits.recorded().await.unwrap();
}
