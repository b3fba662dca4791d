//! Cycles of parents, on paused time: how long they go on without a call that waits for them, and their deadline.

use std::{sync::Arc, time::Duration};

use orchestrator_core::{
    model::{CycleId, CycleRequest, CycleState, Name, ParentCycle, Trigger},
    orchestrator::{Orchestrator, OrchestratorTasks, Registrar},
    ports::Record,
    proto::orchestrator::v1 as pb,
};
use prost::Message;
use tokio::time::{Instant, sleep};

use crate::kit::{by_test, in_memory, of, of_all, settings, start, subsystem};

/// An orchestrator over the subsystem `a`, whose calls take a second, before `b`, `c`, up to `z`.
async fn stage() -> (Orchestrator, OrchestratorTasks) {
    let (orchestrator, tasks) = start(settings(), Arc::default(), in_memory().await).await;
    let mut before = None;
    for name in ('a'..='z').map(String::from) {
        let after: Vec<_> = before.replace(name.clone()).into_iter().collect();
        let mut subsystem = subsystem(&name);
        subsystem.after = after.iter().map(|name| Name::parse(name).unwrap()).collect();
        orchestrator.register(subsystem, None, &Registrar::Anyone, by_test()).await.unwrap();
    }
    (orchestrator, tasks)
}

/// The request of a parent's cycle with this id.
fn of_parent(cycle_id: u64, request: CycleRequest) -> CycleRequest {
    let parent = ParentCycle::parse(&format!("hub/eu/1/{cycle_id}")).unwrap();
    CycleRequest { request_id: Some(parent.to_string()), trigger: Trigger::Parent(parent), ..request }
}

async fn recorded(orchestrator: &Orchestrator, cycle_id: u64) -> Arc<Record> {
    loop {
        if let Ok(record) = orchestrator.cycle(CycleId(cycle_id)).await {
            return (*record).clone().into();
        }
        sleep(Duration::from_millis(100)).await;
    }
}

fn error(record: &Record) -> String {
    pb::CycleTelemetry::decode(record.bytes.clone()).unwrap().error
}

#[tokio::test(start_paused = true)]
async fn a_cycle_that_no_call_waits_for_is_cancelled_after_five_seconds() {
    let (orchestrator, _tasks) = stage().await;
    let request = || CycleRequest { deadline: Some(Duration::from_hours(1)), ..of_parent(1, of_all()) };
    let (first, second) =
        (orchestrator.run_for_parent(request()).await.unwrap(), orchestrator.run_for_parent(request()).await.unwrap());
    sleep(Duration::from_secs(1)).await;
    drop(first);
    sleep(Duration::from_secs(6)).await;
    assert!(orchestrator.cycle(CycleId(1)).await.is_err(), "a call still waits for it");
    drop(second);
    // A call that comes back in time joins.
    sleep(Duration::from_millis(4900)).await;
    let third = orchestrator.run_for_parent(request()).await.unwrap();
    sleep(Duration::from_secs(2)).await;
    drop(third);
    let left = Instant::now();
    let record = recorded(&orchestrator, 1).await;
    assert_eq!((record.state, left.elapsed().as_secs()), (CycleState::Cancelled, 5));
    assert!(error(&record).starts_with("cancelled, since no call of its parent waits for it"), "{}", error(&record));
    // It is not run again.
    let again = orchestrator.run_for_parent(request()).await.unwrap().recorded().await.unwrap();
    assert_eq!((again.cycle_id, again.state), (CycleId(1), CycleState::Cancelled));
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_a_cycle_counts_while_it_waits() {
    let (orchestrator, _tasks) = stage().await;
    let busy = |seconds| CycleRequest { deadline: Some(Duration::from_secs(seconds)), ..of(&["a", "b", "c", "d"]) };
    let begun = Instant::now();
    // Takes 4 s.
    orchestrator.run_cycle(busy(60), false).await.unwrap();
    sleep(Duration::from_millis(10)).await;
    let request = |cycle_id, millis| {
        let deadline = Some(Duration::from_millis(millis));
        CycleRequest { deadline, ..of_parent(cycle_id, of(&["a", "b", "c", "d"])) }
    };
    let tickets = [
        orchestrator.run_for_parent(request(1, 2000)).await.unwrap(),
        orchestrator.run_for_parent(request(2, 5500)).await.unwrap(),
    ];
    let [late, short] = tickets;
    let late = late.recorded().await.unwrap();
    assert_eq!((late.state, begun.elapsed().as_secs()), (CycleState::Cancelled, 2));
    assert_eq!(error(&late), "cancelled while it waited, since its deadline passed");
    // Of 5.5 s, 1.5 s are left when its turn comes.
    let short = short.recorded().await.unwrap();
    assert_eq!((short.state, begun.elapsed().as_secs()), (CycleState::Degraded, 5));
    // Another cycle has the configured deadline, from its start.
    let last = orchestrator.run_for_parent(of_parent(3, of(&["a"]))).await.unwrap().recorded().await.unwrap();
    assert_eq!(last.state, CycleState::Succeeded);
}
