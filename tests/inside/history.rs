//! Retention on paused time, paging through the history meanwhile, and the memory for reads.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use orchestrator_core::{
    host::Host,
    memory::{Full, Shares},
    model::{CycleId, CycleState, Epoch, Name, Revision, Trigger},
    orchestrator::{
        Declared, Event, From, History, NotCancelled, Orchestrator, OrchestratorTasks, Position, RecordHasNoRoom,
        Refusal, Registrar, Settings, Stopped, WatchFilter,
    },
    ports::{Filter, Record, Retention, RetentionRule, Store, StoreError, Unreadable, Write},
    proto::orchestrator::v1::CycleTelemetry,
    record::{self, PartFilter},
    store,
};
use prost::Message;
use tokio::time::{Instant, sleep};

use crate::kit::{
    Around, Fleet, Process, around, by_test, errors, host, in_memory, of, of_all, seals, settings, start, start_with,
    subsystem,
};

const MINUTE: Duration = Duration::from_mins(1);
const MIB: usize = 1 << 20;

async fn keeping(retention: Retention) -> (Orchestrator, OrchestratorTasks) {
    let store = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
    let settings = Settings { retention, ..settings() };
    let (orchestrator, tasks) = start(settings, Arc::new(Fleet::default()), store).await;
    orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await.unwrap();
    (orchestrator, tasks)
}

/// Runs a cycle, which takes a second. Cancels it if `state` is CANCELLED.
async fn run(orchestrator: &Orchestrator, state: CycleState) {
    let ticket = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    if state == CycleState::Cancelled {
        orchestrator.cancel_cycle(ticket.cycle_id, by_test()).await.unwrap();
    }
    assert_eq!(ticket.recorded().await.unwrap().state, state);
}

/// The cycles that are retained, the newest first.
async fn retained(orchestrator: &Orchestrator) -> Vec<u64> {
    let page = orchestrator.history().cycles(None, Filter::default(), PartFilter::default(), 1000).await.unwrap();
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
    let (orchestrator, _tasks) = keeping(Retention { default: few(2), by_state, ..Retention::default() }).await;
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
        store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap(),
    );
    let settings = Settings { retention, ..settings() };
    let (orchestrator, mut tasks) = start(settings.clone(), Arc::default(), store.clone()).await;
    orchestrator.register(subsystem("a"), None, &Registrar::Anyone, by_test()).await.unwrap();
    for _ in 0..3 {
        run(&orchestrator, CycleState::Succeeded).await;
    }
    orchestrator.drain();
    tasks.finished().await.unwrap();
    let contents = store.take_over(seals()).await.unwrap();
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
    orchestrator.register(subsystem("b"), None, &Registrar::Anyone, by_test()).await.unwrap();
    for cycle in 0..CYCLES {
        let name = if cycle % 3 == 0 { "b" } else { "a" };
        orchestrator.run_cycle(of(&[name]), false).await.unwrap().recorded().await.unwrap();
    }
    let of_b = PartFilter { subsystems: [Name::parse("b").unwrap()].into(), ..PartFilter::default() };
    for size in [80, 7] {
        let (mut found, mut scanned, mut before) = (Vec::new(), 0, None);
        loop {
            let page = orchestrator.history().cycles(before, Filter::default(), of_b.clone(), size).await.unwrap();
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
        let page = orchestrator.history().cycles(before, Filter::default(), PartFilter::default(), 3).await.unwrap();
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
        assert!(
            matches!(orchestrator.cancel_cycle(never, by_test()).await, Err(NotCancelled::CycleNotFound(id)) if id == never)
        );
    }
    runs.recorded().await.unwrap();
    let refused = orchestrator.cancel_cycle(CycleId(1), by_test()).await;
    assert!(matches!(refused, Err(NotCancelled::CycleFinished(CycleId(1)))), "{refused:?}");
    waits.recorded().await.unwrap();
}

/// An orchestrator over records of these sizes, the oldest first, of cycles without subsystems.
async fn with_records(sizes: impl IntoIterator<Item = usize>) -> (Orchestrator, OrchestratorTasks) {
    let record = |(id, size): (u64, usize)| {
        let mut telemetry = CycleTelemetry { error: "x".repeat(size), ..CycleTelemetry::default() };
        telemetry.error.truncate(2 * size - telemetry.encoded_len());
        let bytes = telemetry.encode_to_vec();
        assert_eq!(bytes.len(), size);
        Record {
            cycle_id: CycleId(id),
            revision: Revision(id),
            epoch: Epoch(1),
            state: CycleState::Failed,
            trigger: Trigger::Manual,
            request_id: None,
            triggered_by: None,
            finished_at: Timestamp::UNIX_EPOCH,
            bytes: bytes.into(),
        }
    };
    let records: Vec<_> = (1..).zip(sizes).map(record).collect();
    let store = in_memory().await;
    let (epoch, last_cycle_id) = (store.take_over(seals()).await.unwrap().epoch, CycleId(records.len() as u64));
    store.commit(Arc::new(Write { epoch, last_cycle_id, records, ..Write::default() })).await.unwrap();
    start(settings(), Arc::default(), store).await
}

#[tokio::test(start_paused = true)]
async fn a_page_has_at_most_three_mebibytes_but_at_least_one_record() {
    let cases: [(&[usize], &[&[usize]]); 4] = [
        (&[MIB; 7], &[&[MIB; 3], &[MIB; 3], &[MIB]]),
        (&[MIB, MIB + 1, MIB, MIB], &[&[MIB, MIB], &[MIB + 1, MIB]]),
        (&[4 * MIB, 5 * MIB], &[&[5 * MIB], &[4 * MIB]]),
        (&[1000, 4 * MIB, 1000], &[&[1000], &[4 * MIB], &[1000]]),
    ];
    for (sizes, expected) in cases {
        let (orchestrator, _tasks) = with_records(sizes.iter().copied()).await;
        let (mut pages, mut before) = (Vec::new(), None);
        loop {
            let page =
                orchestrator.history().cycles(before, Filter::default(), PartFilter::default(), 1000).await.unwrap();
            pages.push(page.records.into_iter().map(|record| record.unwrap().bytes.len()).collect::<Vec<_>>());
            let Some(next) = page.next else { break };
            before = Some(next);
        }
        assert_eq!(pages, expected, "{sizes:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_page_of_a_filter_that_nothing_passes_ends_after_32_mebibytes_or_10_000_records() {
    let of_a = PartFilter { subsystems: [Name::parse("a").unwrap()].into(), ..PartFilter::default() };
    // The first page ends with a whole page of the store.
    for (sizes, ends_at) in [(vec![MIB; 40], 6..=9), (vec![100; 10_100], 37..=101)] {
        let (orchestrator, _tasks) = with_records(sizes).await;
        let page = |before| orchestrator.history().cycles(before, Filter::default(), of_a.clone(), 10);
        let first = page(None).await.unwrap();
        let next = first.next.unwrap();
        assert!(first.records.is_empty() && ends_at.contains(&next.0), "{next}");
        let last = page(Some(next)).await.unwrap();
        assert!(last.records.is_empty() && last.next.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_follows_shows_the_records_that_it_knows_to_be_acknowledged_and_no_others() {
    let store = in_memory().await;
    let (orchestrator, _tasks) = start(settings(), Arc::default(), store.clone()).await;
    for _ in 0..3 {
        orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    }
    let history = History::new(store.clone(), &Shares::of(512 * MIB).history, &settings());
    let shown = async |before: Option<u64>| {
        let page = history.cycles(before.map(Revision), Filter::default(), PartFilter::default(), 10).await.unwrap();
        page.records.into_iter().map(|record| record.unwrap().cycle_id.0).collect::<Vec<_>>()
    };
    assert_eq!((history.known(), shown(None).await), (None, vec![]));
    assert_eq!(history.cycle(CycleId(1)).await.unwrap(), None);

    history.raise(Position { revision: Revision(2), epoch: None });
    // It never goes back.
    history.raise(Position { revision: Revision(1), epoch: None });
    assert_eq!(history.known().map(|position| position.revision), Some(Revision(2)));
    assert_eq!((shown(None).await, shown(Some(9)).await), (vec![2, 1], vec![2, 1]));
    assert!(history.cycle(CycleId(2)).await.unwrap().is_some());
    assert_eq!(history.cycle(CycleId(3)).await.unwrap(), None);
    let mut watcher = history.watch(From::Oldest, WatchFilter::default(), false).unwrap();
    for cycle_id in [1, 2] {
        let event = watcher.next().await.unwrap();
        assert!(matches!(&event, Event::Recorded(record) if record.cycle_id.0 == cycle_id), "{event:?}");
    }
    let event = watcher.next().await.unwrap();
    assert!(matches!(event, Event::Bookmark(Position { revision: Revision(2), .. }, _)), "{event:?}");

    // The stream of the leader gives it, maybe again.
    let third = store.cycle(CycleId(3)).await.unwrap().unwrap().unwrap();
    for _ in 0..2 {
        history.add(third.clone().into());
        history.show();
    }
    let event = watcher.next().await.unwrap();
    assert!(matches!(&event, Event::Recorded(record) if **record == third), "{event:?}");
    assert_eq!(shown(None).await, [3, 2, 1]);
    history.close();
    assert!(matches!(watcher.next().await, Err(Refusal::Draining)));
}

#[tokio::test(start_paused = true)]
async fn an_unreadable_record_is_counted_and_logged_once_and_only_ten_thousand_are() {
    let revision = Arc::new(AtomicU64::new(0));
    let found = revision.clone();
    let read = move |record: Record| {
        let revision = Revision(found.load(Ordering::Relaxed));
        Err(Unreadable { cycle_id: record.cycle_id, revision, problem: "as scripted".into() })
    };
    let inner = in_memory().await;
    let store = Around { read: Box::new(read), ..Around::over(inner) };
    let (orchestrator, _tasks) = start(settings(), Arc::default(), Arc::new(store)).await;
    orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    let look_at = async |number| {
        revision.store(number, Ordering::Relaxed);
        let refused = orchestrator.cycle(CycleId(1)).await;
        assert!(matches!(&refused, Err(Refusal::Unreadable(it)) if it.revision.0 == number), "{refused:?}");
    };
    errors();
    for number in [1, 1, 2, 1, 2] {
        look_at(number).await;
    }
    assert_eq!((orchestrator.figures().counts.unreadable_records, errors().lines().count()), (2, 2));
    for number in 1..10_010 {
        look_at(number).await;
    }
    assert_eq!(orchestrator.figures().counts.unreadable_records, 10_000);
}

#[tokio::test(start_paused = true)]
async fn a_read_is_refused_when_its_memory_is_not_free_within_ten_seconds() {
    let memory = Shares::of(512 * MIB);
    let history = &memory.history;
    let settings = Settings { max_record_bytes: 8 * MIB, ..settings() };
    let process = Process { memory: memory.clone(), settings, ..Process::default() };
    let (orchestrator, _tasks) = process.over(in_memory().await).await.unwrap();
    let record = orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    let page = || orchestrator.history().cycles(None, Filter::default(), PartFilter::default(), 10);
    let idle = history.held();

    let taken = history.try_hold(history.max() - idle).unwrap();
    let full = |wanted| Full { purpose: history.purpose(), max: history.max(), wanted };
    let start = Instant::now();
    let refused = orchestrator.cycle(CycleId(1)).await;
    assert!(matches!(&refused, Err(Refusal::MemoryFull(why)) if *why == full(8 * MIB)), "{refused:?}");
    assert_eq!(start.elapsed(), Duration::from_secs(10));
    // Records that do not pass its filter are in memory beside those that do.
    let refused = page().await;
    assert!(matches!(&refused, Err(Refusal::MemoryFull(why)) if *why == full(16 * MIB)), "{refused:?}");
    let refused = orchestrator.history().keep(&record).await;
    let size = record.bytes.len();
    assert!(matches!(&refused, Err(RecordHasNoRoom(CycleId(1), why)) if *why == full(size)), "{refused:?}");

    // A record that was read counts until it is dropped.
    drop(taken);
    let kept = orchestrator.history().keep(&record).await.unwrap();
    let read = orchestrator.cycle(CycleId(1)).await.unwrap();
    let listed = page().await.unwrap();
    assert_eq!((&kept, &read.bytes, &listed.records[0].as_ref().unwrap().bytes), (&record.bytes, &kept, &kept));
    assert_eq!(history.held(), idle + 3 * size);
    drop((kept, read, listed));
    assert_eq!(history.held(), idle);
}

/// An orchestrator that keeps one record, whose store fails to remove others, after its first attempt.
async fn fails_to_remove(error: StoreError) -> (Orchestrator, OrchestratorTasks) {
    let inner = in_memory().await;
    let commit = move |store: Arc<dyn Store>, write: Arc<Write>| -> futures_util::future::BoxFuture<'static, _> {
        let error = error.clone();
        Box::pin(async move { if write.removal.records.is_empty() { store.commit(write).await } else { Err(error) } })
    };
    let rule = RetentionRule { max_cycles: Some(1), max_age: None };
    let retention = Retention { default: rule, ..Retention::default() };
    let store = around(inner, Box::new(commit));
    let (orchestrator, tasks) = start(Settings { retention, ..settings() }, Arc::default(), store).await;
    for _ in 0..3 {
        orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    }
    sleep(MINUTE + Duration::from_secs(1)).await;
    assert_eq!(orchestrator.figures().counts.retention.failed, 1);
    (orchestrator, tasks)
}

#[tokio::test(start_paused = true)]
async fn damage_to_old_records_does_not_end_the_process_and_another_writer_does() {
    let damaged = StoreError::Corrupt { store: "memory:".into(), problem: "as scripted".into() };
    let (orchestrator, _tasks) = fails_to_remove(damaged).await;
    orchestrator.run_cycle(of_all(), false).await.unwrap().recorded().await.unwrap();
    assert_eq!(retained(&orchestrator).await, [4, 3, 2, 1]);

    let (_orchestrator, mut tasks) = fails_to_remove(StoreError::Fenced { by: Epoch(9) }).await;
    let ended = tasks.finished().await;
    assert!(matches!(ended, Err(Stopped::Store(StoreError::Fenced { by: Epoch(9) }))), "{ended:?}");
}
