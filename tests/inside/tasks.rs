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
    orchestrator::{Orchestrator, OrchestratorTasks, Stopped},
    ports::{Store, StoreError},
    record, store,
};
use tokio::{sync::watch, time::sleep};

use crate::kit::{Around, Fleet, Prune, host, of_all, settings, start, subsystem};

/// An orchestrator over a store that panics after this number of commits.
async fn over(fleet: Fleet, commits: usize, prune: Box<Prune>) -> (Orchestrator, OrchestratorTasks) {
    let inner = store::open(&store::StoreUrl::Memory, record::check, host().clock).await.unwrap();
    let committed = AtomicUsize::new(0);
    let commit = move |store: Arc<dyn Store>, write| -> futures_util::future::BoxFuture<'static, _> {
        let is_defect = committed.fetch_add(1, Ordering::SeqCst) >= commits;
        Box::pin(async move {
            assert!(!is_defect, "a defect");
            store.commit(write).await
        })
    };
    let around = Around { inner, commit: Box::new(commit), prune, trouble: watch::Sender::new(None) };
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
    orchestrator.register(subsystem("a"), None).await.unwrap();
    orchestrator.run_cycle(of_all(), false).await.unwrap();
    assert_eq!(ended(tasks).await, expected("the conductor of cycles"));

    // The first commit is that of the takeover.
    let (orchestrator, tasks) = over(Fleet::default(), 1, fine()).await;
    tokio::spawn(async move { orchestrator.register(subsystem("a"), None).await });
    assert_eq!(ended(tasks).await, expected("the writer"));

    let (orchestrator, tasks) = over(Fleet { forget_panics: true, ..Fleet::default() }, MANY, fine()).await;
    orchestrator.register(subsystem("a"), Some(Duration::from_secs(1))).await.unwrap();
    assert_eq!(ended(tasks).await, expected("the timer of leases"));

    let (_orchestrator, tasks) = over(Fleet::default(), MANY, Box::new(|| panic!("a defect"))).await;
    assert_eq!(ended(tasks).await, expected("the retention of the history"));
}

#[tokio::test(start_paused = true)]
async fn repeated_work_of_tasks_is_counted_by_its_outcome() {
    let tries = AtomicUsize::new(0);
    let first_fails = move || match tries.fetch_add(1, Ordering::SeqCst) {
        0 => Err(StoreError::Full { store: "memory:".into(), problem: "as scripted".into() }),
        _ => Ok(()),
    };
    let (orchestrator, _tasks) = over(Fleet::default(), usize::MAX, Box::new(first_fails)).await;
    orchestrator.register(subsystem("a"), Some(Duration::from_secs(1))).await.unwrap();
    sleep(Duration::from_secs(30)).await;
    let counts = orchestrator.figures().counts;
    assert_eq!((counts.retention.done, counts.retention.failed, counts.retention.done_at), (0, 1, None));
    assert_eq!((counts.leases.done, counts.leases.failed), (1, 0));
    sleep(Duration::from_mins(1)).await;
    let counts = orchestrator.figures().counts;
    assert_eq!((counts.retention.done, counts.retention.failed), (1, 1));
    assert_eq!(counts.retention.done_at, Some(host().clock.now() + Duration::from_mins(1)));
}
