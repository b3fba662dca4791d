//! Checkpoints of the log and the proofs that refer to them, on paused time: when they are published, and what can be
//! proved once old records are gone.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use orchestrator_core::{
    ledger::{Checkpoint, Hash, VerifyingKey},
    model::CycleId,
    orchestrator::{Logged, Orchestrator, OrchestratorTasks, Published, Refusal, Settings},
    ports::{Retention, RetentionRule, StoreError},
};
use tokio::time::sleep;

use crate::kit::{Around, in_memory, of_all, settings, start, warnings};

struct Stage {
    orchestrator: Orchestrator,
    tasks: OrchestratorTasks,
    /// The published checkpoints.
    published: Arc<Mutex<Vec<String>>>,
    /// True while none can be published.
    fails: Arc<AtomicBool>,
}

impl Stage {
    async fn new(settings: Settings) -> Self {
        let inner = in_memory().await;
        let (published, fails): (Arc<Mutex<Vec<String>>>, Arc<AtomicBool>) = Default::default();
        let (keep, fail) = (published.clone(), fails.clone());
        let publish = move |checkpoint: &str| {
            if fail.load(Ordering::Relaxed) {
                return Err(StoreError::Full { store: "memory:".into(), problem: "as scripted".into() });
            }
            keep.lock().unwrap().push(checkpoint.to_owned());
            Ok(())
        };
        let store = Arc::new(Around { publish: Box::new(publish), ..Around::over(inner) });
        let (orchestrator, tasks) = start(settings, Arc::default(), store).await;
        Self { orchestrator, tasks, published, fails }
    }

    /// Runs cycles that call nothing, which takes no time. Returns the last one.
    async fn run(&self, cycles: usize) -> CycleId {
        let mut last = CycleId(0);
        for _ in 0..cycles {
            last = self.orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap().cycle_id;
        }
        last
    }

    /// What the only key of the log has signed.
    fn open(&self, note: &str) -> Checkpoint {
        let keys = self.orchestrator.log_keys();
        assert_eq!(keys.len(), 1);
        keys[0].parse::<VerifyingKey>().unwrap().open(note).unwrap()
    }

    fn opened(&self, published: &Published) -> Checkpoint {
        let opened = self.open(&published.note);
        assert_eq!(opened.size, published.size);
        opened
    }
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_for_a_cycle_covers_it_and_the_proofs_refer_to_its_root() {
    let stage = Stage::new(settings()).await;
    let mut earlier = stage.opened(&stage.orchestrator.checkpoint().await.unwrap());
    assert_eq!(earlier.size, 0);
    for cycles in [1, 1, 1, 4] {
        let cycle_id = stage.run(cycles).await;
        let covering = stage.opened(&stage.orchestrator.checkpoint_of(Logged::Cycle(cycle_id)).await.unwrap());
        assert_eq!(covering.size, cycle_id.0);
        for cycle_id in 1..=cycle_id.0 {
            let proved = stage.orchestrator.prove(Logged::Cycle(CycleId(cycle_id)), covering.size).await.unwrap();
            assert_eq!(proved.leaf, cycle_id - 1);
            let leaf = Hash::of_leaf([&proved.entry[..]]);
            assert_eq!(proved.proof.verify(proved.leaf, leaf, covering.size, covering.root), Ok(()));
        }
        let extension = stage.orchestrator.prove_extension(earlier.size, covering.size).await.unwrap();
        assert_eq!(extension.verify((earlier.size, earlier.root), (covering.size, covering.root)), Ok(()));
        earlier = covering;
    }
    let refused = stage.orchestrator.checkpoint_of(Logged::Cycle(CycleId(8))).await;
    assert!(matches!(refused, Err(Refusal::CycleNotFound(CycleId(8)))), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn each_published_checkpoint_has_new_entries_and_the_last_one_has_all() {
    for idle in [Duration::ZERO, Duration::from_secs(5)] {
        let mut stage = Stage::new(settings()).await;
        stage.run(2).await;
        sleep(Duration::from_secs(5)).await;
        stage.run(3).await;
        sleep(idle).await;
        stage.orchestrator.drain();
        stage.tasks.finished().await.unwrap();
        let sizes: Vec<_> = stage.published.lock().unwrap().iter().map(|note| stage.open(note).size).collect();
        assert!(sizes.is_sorted_by(|earlier, later| earlier < later), "{sizes:?}");
        assert_eq!(sizes.last(), Some(&5), "after {idle:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_that_can_not_be_published_is_retried_and_logged_once() {
    let stage = Stage::new(settings()).await;
    for _ in 0..2 {
        warnings();
        stage.fails.store(true, Ordering::Relaxed);
        let cycle_id = stage.run(1).await;
        let refused = stage.orchestrator.checkpoint_of(Logged::Cycle(cycle_id)).await;
        assert!(matches!(refused, Err(Refusal::NoCheckpoint)), "{refused:?}");
        let said = warnings();
        assert_eq!(said.lines().count(), 1, "{said}");
        stage.fails.store(false, Ordering::Relaxed);
        let covering = stage.opened(&stage.orchestrator.checkpoint_of(Logged::Cycle(cycle_id)).await.unwrap());
        assert_eq!(covering.size, cycle_id.0);
    }
}

#[tokio::test(start_paused = true)]
async fn proofs_are_given_as_far_as_retention_has_left_their_hashes() {
    let rule = RetentionRule { max_cycles: Some(5), max_age: None };
    let retention = Retention { default: rule, ..Retention::default() };
    let stage = Stage::new(Settings { retention, ..settings() }).await;
    stage.run(20).await;
    sleep(Duration::from_secs(61)).await;
    // The last entry says that the records of the first 15 cycles were removed: of them, the hashes of 8, 4, 2 and 1
    // leaves are left.
    let beyond = || Some(Refusal::NotInLog(21));
    let removed = |size| Some(Refusal::HashesRemoved(size));
    for (earlier, size, expected) in [
        (0, 0, None),
        (0, 21, None),
        (8, 12, None),
        (14, 21, None),
        (15, 15, None),
        (15, 21, None),
        (16, 20, None),
        (21, 21, None),
        (1, 21, removed(1)),
        (13, 21, removed(13)),
        (20, 19, beyond()),
        (0, 22, beyond()),
        (21, 22, beyond()),
    ] {
        let proved = stage.orchestrator.prove_extension(earlier, size).await;
        assert_eq!(format!("{:?}", proved.err()), format!("{expected:?}"), "from {earlier} to {size}");
    }
    for (cycle_id, size, expected) in
        [(16, 16, None), (16, 21, None), (20, 20, None), (16, 15, beyond()), (20, 22, beyond())]
    {
        let proved = stage.orchestrator.prove(Logged::Cycle(CycleId(cycle_id)), size).await;
        assert_eq!(format!("{:?}", proved.err()), format!("{expected:?}"), "of cycle {cycle_id} in {size} entries");
    }
    let removed = stage.orchestrator.prove(Logged::Cycle(CycleId(15)), 21).await;
    assert!(matches!(removed, Err(Refusal::CycleNotFound(CycleId(15)))), "{removed:?}");
}

#[tokio::test(start_paused = true)]
async fn retention_removes_only_what_the_published_checkpoint_contains() {
    let rule = RetentionRule { max_cycles: Some(2), max_age: None };
    let retention = Retention { default: rule, ..Retention::default() };
    let stage = Stage::new(Settings { retention, ..settings() }).await;
    let cycle_id = stage.run(10).await;
    assert_eq!(stage.orchestrator.checkpoint_of(Logged::Cycle(cycle_id)).await.unwrap().size, 10);
    stage.fails.store(true, Ordering::Relaxed);
    stage.run(20).await;
    let kept = async || {
        let mut kept = Vec::new();
        for cycle_id in 1..=30 {
            match stage.orchestrator.cycle(CycleId(cycle_id)).await {
                Err(Refusal::CycleNotFound(_)) => {}
                found => kept.push(found.unwrap().cycle_id.0),
            }
        }
        kept
    };
    sleep(Duration::from_mins(5)).await;
    assert_eq!(kept().await, (11..=30).collect::<Vec<_>>());
    stage.fails.store(false, Ordering::Relaxed);
    sleep(Duration::from_mins(5)).await;
    assert_eq!(kept().await, [29, 30]);
}
