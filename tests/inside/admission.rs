//! Admission to the line: overlap policies, cancellation before the turn, and repeated requests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use orchestrator_core::{
    model::{CycleId, CycleRequest, CycleState, Name, OverlapPolicy, Trigger},
    orchestrator::{Orchestrator, OrchestratorTasks, Refusal},
    record, store,
};
use tokio::{sync::Notify, time::sleep};

use crate::kit::{Around, host, of, of_all, settings, start, subsystem};

/// Look-ups of requests whose answers the test holds back.
#[derive(Default)]
struct Held {
    /// True if the next answer is held back.
    next: AtomicBool,
    released: Notify,
}

/// An orchestrator over the subsystems `a`, `b` and `c`.
async fn stage(held: Arc<Held>) -> (Orchestrator, OrchestratorTasks) {
    let inner = store::open(&store::StoreUrl::Memory, record::check, host().clock).await.unwrap();
    let delay = move || -> BoxFuture<'static, ()> {
        let (held, waits) = (held.clone(), held.next.swap(false, Ordering::Relaxed));
        Box::pin(async move {
            if waits {
                held.released.notified().await;
            }
        })
    };
    let store = Around { delay: Box::new(delay), ..Around::over(inner) };
    let (orchestrator, tasks) = start(settings(), Arc::default(), Arc::new(store)).await;
    for name in ["a", "b", "c"] {
        orchestrator.register(subsystem(name), None).await.unwrap();
    }
    (orchestrator, tasks)
}

/// Requests a cycle. Returns its id.
async fn ask(orchestrator: &Orchestrator, overlap: OverlapPolicy, request: CycleRequest) -> Result<u64, Refusal> {
    let ticket = orchestrator.run_cycle(CycleRequest { overlap, ..request }, false).await?;
    // Its turn comes, if it is free.
    sleep(Duration::from_millis(1)).await;
    Ok(ticket.cycle_id.0)
}

#[tokio::test(start_paused = true)]
async fn skip_refuses_a_cycle_that_would_wait_for_another() {
    let (orchestrator, _tasks) = stage(Arc::default()).await;
    let skip = |request| ask(&orchestrator, OverlapPolicy::Skip, request);
    assert_eq!(skip(of(&["a"])).await.unwrap(), 1);
    for conflicting in [of(&["b", "a"]), of_all()] {
        assert!(matches!(skip(conflicting).await, Err(Refusal::CycleRunning(CycleId(1)))));
    }
    assert_eq!(skip(of(&["b"])).await.unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn buffer_one_lets_one_cycle_of_each_trigger_wait_for_a_subsystem() {
    let (orchestrator, _tasks) = stage(Arc::default()).await;
    let buffer = |request| ask(&orchestrator, OverlapPolicy::BufferOne, request);
    let by_loop = |name: &str| CycleRequest { trigger: Trigger::Loop(Name::parse(name).unwrap()), ..of(&["a"]) };
    assert_eq!(buffer(of(&["a"])).await.unwrap(), 1);
    assert_eq!(buffer(of(&["a", "b"])).await.unwrap(), 2);
    assert!(matches!(buffer(of(&["a"])).await, Err(Refusal::CycleWaiting(CycleId(2)))));
    assert_eq!(buffer(by_loop("x")).await.unwrap(), 3);
    assert_eq!(buffer(by_loop("y")).await.unwrap(), 4);
    assert!(matches!(buffer(by_loop("x")).await, Err(Refusal::CycleWaiting(CycleId(3)))));
    // Nothing is before it.
    assert_eq!(buffer(of(&["c"])).await.unwrap(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_cycle_that_is_cancelled_while_it_waits_is_recorded_before_its_turn() {
    let (orchestrator, _tasks) = stage(Arc::default()).await;
    let runs = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    sleep(Duration::from_millis(1)).await;
    let waits = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    let record = orchestrator.cancel_cycle(waits.cycle_id).await.unwrap();
    assert_eq!((record.state, record.cycle_id), (CycleState::Cancelled, CycleId(2)));
    assert!(runs.record_now().is_none());
    assert_eq!(runs.recorded().await.unwrap().state, CycleState::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_request_finds_its_cycle_even_if_that_is_recorded_during_the_look_up() {
    let held = Arc::new(Held::default());
    let (orchestrator, _tasks) = stage(held.clone()).await;
    let orchestrator = Arc::new(orchestrator);
    // More records of other cycles than the cache holds, or fewer.
    for (id, others) in [("few", 10), ("many", 300)] {
        let ask = || {
            let (orchestrator, request_id) = (orchestrator.clone(), Some(id.to_owned()));
            async move { orchestrator.run_cycle(CycleRequest { request_id, ..of(&["a"]) }, false).await }
        };
        held.next.store(true, Ordering::Relaxed);
        // The store has no such cycle, and its answer does not arrive.
        let second = tokio::spawn(ask());
        sleep(Duration::from_millis(1)).await;
        let first = ask().await.unwrap();
        let cycle_id = first.cycle_id;
        first.recorded().await.unwrap();
        for _ in 0..others {
            orchestrator.run_cycle(of(&["b"]), false).await.unwrap().recorded().await.unwrap();
        }
        held.released.notify_one();
        assert_eq!(second.await.unwrap().unwrap().cycle_id, cycle_id, "{id}");
    }
}
