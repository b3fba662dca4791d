//! The tasks of an orchestrator: a defect in one ends the orchestrator and names the task, and repeated work is
//! counted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use orchestrator_core::{
    model::{CycleId, CycleRequest, CycleState, Epoch},
    orchestrator::{NotRecorded, Orchestrator, OrchestratorTasks, Refusal, Registrar, Stopped},
    ports::{Store, StoreError},
    record, store,
};
use tokio::time::{sleep, timeout};

use crate::kit::{Around, Fleet, Prune, by_test, host, of, of_all, settings, start, subsystem};

/// An orchestrator over a store that panics after this number of commits.
async fn over(fleet: Fleet, commits: usize, prune: Box<Prune>) -> (Orchestrator, OrchestratorTasks) {
    let inner = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
    let committed = AtomicUsize::new(0);
    let commit = move |store: Arc<dyn Store>, write| -> futures_util::future::BoxFuture<'static, _> {
        let is_defect = committed.fetch_add(1, Ordering::SeqCst) >= commits;
        Box::pin(async move {
            assert!(!is_defect, "a defect");
            store.commit(write).await
        })
    };
    let around = Around { commit: Box::new(commit), prune, ..Around::over(inner) };
    start(settings(), Arc::new(fleet), Arc::new(around)).await
}

/// The name of the task that ended the orchestrator, and the reason.
async fn ended(mut tasks: OrchestratorTasks) -> (&'static str, String) {
    match tasks.finished().await.unwrap_err() {
        Stopped::Conductor(ended) | Stopped::Other(ended) => (ended.task.name, ended.why),
        Stopped::Store(error) => panic!("{error}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_defect_in_a_task_ends_the_orchestrator_and_names_the_task() {
    const MANY: usize = usize::MAX;
    let fine = || -> Box<Prune> { Box::new(|| Ok(())) };
    let expected = |task| (task, "it panicked: a defect".to_owned());

    let (orchestrator, tasks) = over(Fleet { call_panics: true, ..Fleet::default() }, MANY, fine()).await;
    orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await.unwrap();
    orchestrator.run_cycle(of_all(), false).await.unwrap();
    assert_eq!(ended(tasks).await, expected("the conductor of cycles"));

    // The first commit is that of the takeover.
    let (orchestrator, tasks) = over(Fleet::default(), 1, fine()).await;
    tokio::spawn(async move { orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await });
    assert_eq!(ended(tasks).await, expected("the writer"));

    let (orchestrator, tasks) = over(Fleet { forget_panics: true, ..Fleet::default() }, MANY, fine()).await;
    orchestrator.register(subsystem("a"), Some(Duration::from_secs(1)), &Registrar::Anyone, by_test()).await.unwrap();
    assert_eq!(ended(tasks).await, expected("the timer of leases"));

    let (_orchestrator, tasks) = over(Fleet::default(), MANY, Box::new(|| panic!("a defect"))).await;
    assert_eq!(ended(tasks).await, expected("the retention of the history"));
}

#[tokio::test(start_paused = true)]
async fn an_idle_process_ends_once_another_has_taken_over_its_store() {
    let passes = AtomicUsize::new(0);
    let taken_over = move || match passes.fetch_add(1, Ordering::SeqCst) {
        0..3 => Ok(()),
        _ => Err(StoreError::Fenced { by: Epoch(9) }),
    };
    let (orchestrator, mut tasks) = over(Fleet::default(), usize::MAX, Box::new(taken_over)).await;
    let ended = timeout(Duration::from_mins(5), tasks.finished()).await.unwrap();
    assert!(matches!(ended, Err(Stopped::Store(StoreError::Fenced { by: Epoch(9) }))), "{ended:?}");
    let refused = orchestrator.run_cycle(of_all(), false).await;
    assert!(matches!(refused, Err(Refusal::Draining)), "{refused:?}");
}

/// Runs a cycle over `a`, with others over `a` behind it, and drains the process. Returns the states of the cycles in
/// the record of the next process.
async fn drained(ends: impl Fn(&Orchestrator)) -> Vec<CycleState> {
    let store = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
    let (orchestrator, mut tasks) = start(settings(), Arc::default(), store.clone()).await;
    orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await.unwrap();
    let named = || CycleRequest { request_id: Some("named".into()), ..of(&["a"]) };
    let mut tickets = Vec::new();
    // Only the callers of the second and of the fifth one are promised that their cycles will run.
    for (request, is_promised) in
        [(of(&["a"]), false), (of(&["a"]), true), (of(&["a"]), false), (named(), false), (named(), true)]
    {
        tickets.push(orchestrator.run_cycle(request, is_promised).await.unwrap());
    }
    assert_eq!(tickets[3].cycle_id, tickets[4].cycle_id, "it is the same request");
    sleep(Duration::from_millis(100)).await;
    orchestrator.drain();
    let refused = orchestrator.run_cycle(of(&["a"]), true).await;
    assert!(matches!(refused, Err(Refusal::Draining)), "{refused:?}");
    ends(&orchestrator);
    tasks.finished().await.unwrap();
    let draining = tickets.swap_remove(1).recorded().await;
    assert!(matches!(draining, Err(NotRecorded::Draining)), "{draining:?}");

    let (orchestrator, _tasks) = start(settings(), Arc::default(), store).await;
    let last = orchestrator.run_cycle(of(&["a"]), false).await.unwrap().recorded().await.unwrap();
    assert_eq!(last.cycle_id, CycleId(5));
    let mut states = Vec::new();
    for cycle_id in 1..=4 {
        states.push(orchestrator.cycle(CycleId(cycle_id)).await.unwrap().state);
    }
    states
}

#[tokio::test(start_paused = true)]
async fn a_draining_process_finishes_running_cycles_leaves_promised_ones_to_the_next_and_cancels_others() {
    use CycleState::{Cancelled, Succeeded};
    assert_eq!(drained(|_| ()).await, [Succeeded, Succeeded, Cancelled, Succeeded]);
    assert_eq!(drained(Orchestrator::cancel_running).await, [Cancelled, Succeeded, Cancelled, Succeeded]);
}

#[tokio::test(start_paused = true)]
async fn repeated_work_of_tasks_is_counted_by_its_outcome() {
    let tries = AtomicUsize::new(0);
    let first_fails = move || match tries.fetch_add(1, Ordering::SeqCst) {
        0 => Err(StoreError::Full { store: "memory:".into(), problem: "as scripted".into() }),
        _ => Ok(()),
    };
    let (orchestrator, _tasks) = over(Fleet::default(), usize::MAX, Box::new(first_fails)).await;
    orchestrator.register(subsystem("a"), Some(Duration::from_secs(1)), &Registrar::Anyone, by_test()).await.unwrap();
    sleep(Duration::from_secs(30)).await;
    let counts = orchestrator.figures().counts;
    assert_eq!((counts.retention.done, counts.retention.failed, counts.retention.done_at), (0, 1, None));
    assert_eq!((counts.leases.done, counts.leases.failed), (1, 0));
    sleep(Duration::from_mins(1)).await;
    let counts = orchestrator.figures().counts;
    assert_eq!((counts.retention.done, counts.retention.failed), (1, 1));
    assert_eq!(counts.retention.done_at, Some(host().clock.now() + Duration::from_mins(1)));
}
