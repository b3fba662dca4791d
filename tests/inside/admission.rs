//! Admission to the line: overlap policies, cancellation before the turn, repeated requests, the memory of requests,
//! and the lag of loops.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use orchestrator_core::{
    memory::Shares,
    model::{CycleId, CycleRequest, CycleState, IntervalLoop, LoopSpec, LoopStart, Name, OverlapPolicy, Trigger},
    orchestrator::{Orchestrator, OrchestratorTasks, Refusal, Registrar},
    record, store,
};
use tokio::{sync::Notify, time::sleep};

use crate::kit::{Around, Process, by_test, host, in_memory, of, of_all, settings, start, subsystem, text};

/// Look-ups of requests whose answers the test holds back.
#[derive(Default)]
struct Held {
    /// True if the next answer is held back.
    next: AtomicBool,
    released: Notify,
}

/// An orchestrator over the subsystems `a`, `b` and `c`.
async fn stage(held: Arc<Held>) -> (Orchestrator, OrchestratorTasks) {
    let inner = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
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
        orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await.unwrap();
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
    let record = orchestrator.cancel_cycle(waits.cycle_id, by_test()).await.unwrap();
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

#[tokio::test(start_paused = true)]
async fn only_requests_of_more_than_four_kibibytes_need_memory_until_their_cycles_are_recorded() {
    let memory = Shares::of(1 << 30);
    let requests = &memory.requests;
    let process = Process { memory: memory.clone(), ..Process::default() };
    let (orchestrator, _tasks) = process.over(in_memory().await).await.unwrap();
    orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await.unwrap();
    let of_size = |size: usize| {
        let with = |length: usize| CycleRequest { parameters: text(&"x".repeat(length)), ..of(&["a"]) };
        let request = with(3000 + size - with(3000).footprint());
        assert_eq!(request.footprint(), size);
        request
    };
    let (small, large) = (of_size(4 << 10), of_size((4 << 10) + 1));
    let taken = requests.try_hold(requests.max()).unwrap();
    let first = orchestrator.run_cycle(small, false).await.unwrap();
    let refused = orchestrator.run_cycle(large.clone(), false).await;
    assert!(matches!(refused, Err(Refusal::MemoryFull(_))), "{refused:?}");
    drop(taken);
    let second = orchestrator.run_cycle(large.clone(), false).await.unwrap();
    first.recorded().await.unwrap();
    assert_eq!(requests.held(), large.footprint());
    second.recorded().await.unwrap();
    assert_eq!(requests.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_lag_of_a_loop_is_the_time_that_its_last_tick_has_waited_for_the_start_of_its_cycle() {
    let (orchestrator, _tasks) = stage(Arc::default()).await;
    let spec = LoopSpec {
        name: "x".into(),
        interval: Some("10s".parse().unwrap()),
        subsystems: vec!["a".into()],
        overlap_policy: Some(OverlapPolicy::BufferOne),
        ..LoopSpec::default()
    };
    orchestrator.start_loop(LoopStart::Of(IntervalLoop::from_spec(&spec).unwrap()), by_test()).await.unwrap();
    let lag = || orchestrator.figures().loops[0].1;
    sleep(Duration::from_millis(9500)).await;
    assert_eq!(lag(), None);
    // The tick at 10 s waits for this cycle, which takes a second.
    orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    for (wait, expected) in [(700, 200), (1000, 500), (5000, 500), (5000, 0)] {
        sleep(Duration::from_millis(wait)).await;
        assert_eq!(lag(), Some(Duration::from_millis(expected)));
    }
}
