//! The cursor of a watcher, which receives every record once and in order, from the store or from the cache.

use std::{
    collections::{BTreeSet, HashSet},
    future::pending,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use orchestrator_core::{
    memory::Shares,
    model::{CycleId, CycleRequest, CycleState, Name, Revision, Subsystem, Trigger},
    orchestrator::{
        Event, From, Orchestrator, OrchestratorTasks, Position, Refusal, Registrar, Settings, WatchFilter, Watched,
        Watcher,
    },
    ports::{Filter, Retention, RetentionRule},
    record::{self, PartFilter},
    store,
};
use tokio::time::{Instant, sleep, timeout};

use crate::kit::{Fleet, Process, around, by_test, host, in_memory, of, settings, start, subsystem, text};

/// More records than the cache for watchers holds.
const MANY: u64 = 600;
const MIB: usize = 1 << 20;

/// An orchestrator over the subsystems `a` to `d`.
async fn stage(settings: Settings) -> (Orchestrator, OrchestratorTasks) {
    let store = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
    let (orchestrator, tasks) = start(settings, Arc::new(Fleet::default()), store).await;
    for name in ["a", "b", "c", "d"] {
        orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await.unwrap();
    }
    (orchestrator, tasks)
}

/// Records this number of cycles, of `a` to `d` in turn, four side by side.
async fn record(orchestrator: &Orchestrator, cycles: u64) {
    let mut left = cycles;
    while left > 0 {
        let mut tickets = Vec::new();
        for name in ["a", "b", "c", "d"].into_iter().take(usize::try_from(left).unwrap()) {
            tickets.push(orchestrator.run_cycle(of(&[name]), false).await.unwrap());
        }
        left -= tickets.len() as u64;
        for ticket in tickets {
            ticket.recorded().await.unwrap();
        }
    }
}

/// The next event of a watcher: a revision, or `None` for a bookmark.
async fn next(watcher: &mut Watcher) -> Result<Option<Revision>, Refusal> {
    match watcher.next().await? {
        Event::Recorded(record) => Ok(Some(record.revision)),
        Event::Bookmark(..) => Ok(None),
        event => panic!("{event:?}"),
    }
}

/// After the record with this revision, whatever its epoch.
fn after(revision: u64) -> From {
    From::After(Position { revision: Revision(revision), epoch: None })
}

async fn revisions(watcher: &mut Watcher, count: usize) -> Vec<u64> {
    let mut revisions = Vec::new();
    while revisions.len() < count {
        revisions.extend(next(watcher).await.unwrap().map(|revision| revision.0));
    }
    revisions
}

#[tokio::test(start_paused = true)]
async fn a_watcher_gets_each_later_record_once_and_in_order_wherever_it_begins() {
    let (orchestrator, _tasks) = stage(settings()).await;
    record(&orchestrator, MANY).await;
    let watch = |from| orchestrator.history().watch(from, WatchFilter::default(), false).unwrap();
    let mut now = watch(From::Now);
    // The first records are read from the store, the last ones from the cache.
    for (from, first) in [(From::Oldest, 1), (after(0), 1), (after(MANY - 3), MANY - 2)] {
        let expected: Vec<_> = (first..=MANY).collect();
        let mut watcher = watch(from);
        assert_eq!(revisions(&mut watcher, expected.len()).await, expected, "{from:?}");
        // It receives one bookmark when it is up to date.
        assert_eq!(next(&mut watcher).await.unwrap(), None, "{from:?}");
    }
    assert_eq!(next(&mut now).await.unwrap(), None);
    record(&orchestrator, 5).await;
    assert_eq!(revisions(&mut now, 5).await, (MANY + 1..=MANY + 5).collect::<Vec<_>>());
    // It has fallen behind by more than the cache.
    record(&orchestrator, MANY).await;
    assert_eq!(revisions(&mut now, 600).await, (MANY + 6..=2 * MANY + 5).collect::<Vec<_>>());
}

/// Such a record can still be lost: its answer may be on its way from a database that another one replaces.
#[tokio::test(start_paused = true)]
async fn a_record_is_not_read_before_its_commit_is_acknowledged() {
    let store = in_memory().await;
    let (orchestrator, tasks) = start(settings(), Arc::new(Fleet::default()), store.clone()).await;
    for name in ["a", "b"] {
        orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await.unwrap();
    }
    record(&orchestrator, 2).await;
    drop((orchestrator, tasks));
    // It keeps records, and does not say so.
    let silent = around(
        store.clone(),
        Box::new(|inner, write| {
            Box::pin(async move {
                inner.commit(write.clone()).await?;
                if write.records.is_empty() { Ok(()) } else { pending().await }
            })
        }),
    );
    let (orchestrator, _tasks) = start(settings(), Arc::new(Fleet::default()), silent).await;
    let cycle_id = orchestrator.run_cycle(of(&["a"]), false).await.unwrap().cycle_id;
    sleep(Duration::from_mins(1)).await;
    assert!(store.cycle(cycle_id).await.unwrap().is_some(), "it is in the store");
    let mut watcher = orchestrator.history().watch(From::Oldest, WatchFilter::default(), false).unwrap();
    assert_eq!(revisions(&mut watcher, 2).await, [1, 2]);
    assert_eq!(next(&mut watcher).await.unwrap(), None);
    assert!(orchestrator.cycle(cycle_id).await.is_err());
    let page = orchestrator.history().cycles(None, Filter::default(), PartFilter::default(), 10).await.unwrap();
    assert_eq!(page.records.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_filter_applies_to_records_in_the_store_and_in_the_cache() {
    let (orchestrator, _tasks) = stage(settings()).await;
    record(&orchestrator, MANY).await;
    let of_b = WatchFilter {
        parts: PartFilter { subsystems: [Name::parse("b").unwrap()].into(), ..PartFilter::default() },
        ..WatchFilter::default()
    };
    let mut watcher = orchestrator.history().watch(From::Oldest, of_b, false).unwrap();
    for revision in revisions(&mut watcher, 150).await {
        let page =
            orchestrator.history().cycles(Some(Revision(revision + 1)), Filter::default(), PartFilter::default(), 1);
        let record = page.await.unwrap().records.remove(0).unwrap();
        // The filter selects the second cycle of each four.
        assert_eq!(record.cycle_id.0 % 4, 2);
    }
    assert_eq!(next(&mut watcher).await.unwrap(), None);
    let failed = WatchFilter { states: vec![CycleState::Failed], ..WatchFilter::default() };
    let mut watcher = orchestrator.history().watch(From::Oldest, failed, false).unwrap();
    assert_eq!(next(&mut watcher).await.unwrap(), None, "nothing has failed");
}

#[tokio::test(start_paused = true)]
async fn an_idle_watcher_receives_a_bookmark_every_thirty_seconds() {
    let (orchestrator, _tasks) = stage(settings()).await;
    record(&orchestrator, 1).await;
    let mut watcher = orchestrator.history().watch(From::Oldest, WatchFilter::default(), false).unwrap();
    assert_eq!(next(&mut watcher).await.unwrap(), Some(Revision(1)));
    for wait in [0, 30, 30] {
        let asked = Instant::now();
        let Event::Bookmark(up_to, _) = watcher.next().await.unwrap() else { panic!("a record came") };
        assert_eq!((up_to.revision, asked.elapsed().as_secs()), (Revision(1), wait));
    }
    // A client that resumes after it misses no record.
    record(&orchestrator, 1).await;
    let mut again = orchestrator.history().watch(after(1), WatchFilter::default(), false).unwrap();
    assert_eq!(next(&mut again).await.unwrap(), Some(Revision(2)));
}

#[tokio::test(start_paused = true)]
async fn a_bookmark_is_sent_in_time_while_events_come_that_the_filter_rejects() {
    /// More than the runtime lets a task receive before others have their turn.
    const EVENTS: usize = 200;
    let (orchestrator, _tasks) = stage(Settings { max_subsystems: 2 * EVENTS, ..settings() }).await;
    let names: Vec<_> = (0..EVENTS).map(|i| format!("s{i}")).collect();
    for name in &names {
        orchestrator.register(subsystem(name), None, &Registrar::Anyone, by_test()).await.unwrap();
    }
    let filter = WatchFilter { loops: [Name::parse("other").unwrap()].into(), ..WatchFilter::default() };
    let mut watcher = orchestrator.history().watch(From::Now, filter, true).unwrap();
    assert_eq!(next(&mut watcher).await.unwrap(), None);
    assert!(next(&mut watcher).now_or_never().is_none());
    tokio::time::sleep(Duration::from_millis(29_900)).await;
    for name in &names {
        orchestrator.run_cycle(of(&[name]), false).await.unwrap();
    }
    // Their starts wait for the watcher, and none of the cycles has ended.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(orchestrator.status().running.len(), EVENTS);
    assert!(matches!(next(&mut watcher).now_or_never(), Some(Ok(None))));
}

#[tokio::test(start_paused = true)]
async fn a_watcher_whose_next_record_was_removed_is_refused_with_the_retained_range() {
    let rule = RetentionRule { max_cycles: Some(10), max_age: None };
    let settings = Settings { retention: Retention { default: rule, ..Retention::default() }, ..settings() };
    let (orchestrator, _tasks) = stage(settings).await;
    let mut behind = orchestrator.history().watch(From::Oldest, WatchFilter::default(), false).unwrap();
    assert_eq!(next(&mut behind).await.unwrap(), None);
    record(&orchestrator, MANY).await;
    // The next pass of retention.
    tokio::time::sleep(Duration::from_secs(61)).await;
    let oldest = orchestrator.status().oldest_revision;
    assert_eq!(oldest, Revision(MANY - 9));
    let is_refused = |refused: Refusal, asked: u64| {
        let gone = Refusal::RevisionNotRetained { after: Revision(asked), oldest, newest: Revision(MANY) };
        assert_eq!(format!("{refused:?}"), format!("{gone:?}"));
        let why =
            if asked > MANY { "is in the future: 600 is the newest" } else { "are no longer all retained: 591 is" };
        assert!(refused.to_string().contains(why), "{refused}");
    };
    is_refused(next(&mut behind).await.unwrap_err(), 0);
    for revision in [0, MANY - 11, MANY + 1] {
        let refused = orchestrator.history().watch(after(revision), WatchFilter::default(), false);
        is_refused(refused.err().unwrap(), revision);
    }
    let mut oldest = orchestrator.history().watch(after(MANY - 10), WatchFilter::default(), false).unwrap();
    assert_eq!(next(&mut oldest).await.unwrap(), Some(Revision(MANY - 9)));
}

#[tokio::test(start_paused = true)]
async fn a_replica_whose_lease_has_ended_does_not_say_that_what_it_does_not_know_does_not_exist() {
    let (orchestrator, _tasks) = stage(settings()).await;
    record(&orchestrator, 1).await;
    let watch = || orchestrator.history().watch(after(2), WatchFilter::default(), false);
    assert!(matches!(watch(), Err(Refusal::RevisionNotRetained { .. })));
    orchestrator.lapse();
    assert!(matches!(watch(), Err(Refusal::Unconfirmed)));
    assert!(matches!(orchestrator.cycle(CycleId(2)).await, Err(Refusal::Unconfirmed)));
    assert_eq!(orchestrator.cycle(CycleId(1)).await.unwrap().cycle_id, CycleId(1));
    orchestrator.confirm();
    assert!(matches!(watch(), Err(Refusal::RevisionNotRetained { .. })));
    assert!(matches!(orchestrator.cycle(CycleId(2)).await, Err(Refusal::CycleNotFound(CycleId(2)))));
}

#[tokio::test(start_paused = true)]
async fn progress_of_a_cycle_comes_before_its_record_and_beside_the_progress_of_other_cycles() {
    let (orchestrator, _tasks) = stage(settings()).await;
    let mut watcher = orchestrator.history().watch(From::Now, WatchFilter::default(), true).unwrap();
    let mut started = Vec::new();
    let mut recorded = Vec::new();
    for name in ["a", "b", "c"] {
        orchestrator.run_cycle(of(&[name]), false).await.unwrap();
    }
    while recorded.len() < 3 {
        match watcher.next().await.unwrap() {
            Event::Started(cycle, up_to) => {
                assert_eq!(up_to.revision.0, recorded.len() as u64);
                started.push(cycle.cycle_id);
            }
            Event::Progress(event, ..) => {
                assert!(started.contains(&event.cycle.cycle_id) && !recorded.contains(&event.cycle.cycle_id));
            }
            Event::Recorded(record) => {
                assert!(started.contains(&record.cycle_id));
                recorded.push(record.cycle_id);
            }
            Event::Bookmark(..) => {}
            Event::Unreadable(unreadable) => panic!("{unreadable}"),
        }
    }
    started.sort();
    assert_eq!(started, [CycleId(1), CycleId(2), CycleId(3)]);
}

#[tokio::test(start_paused = true)]
async fn watchers_are_limited_in_number_and_end_with_the_process_after_its_last_record() {
    let (orchestrator, mut tasks) = stage(Settings { max_watchers: 2, ..settings() }).await;
    let watch = || orchestrator.history().watch(From::Now, WatchFilter::default(), false);
    let (first, mut second) = (watch().unwrap(), watch().unwrap());
    assert!(matches!(watch().err(), Some(Refusal::TooManyWatchers(2))));
    drop(first);
    drop(watch().unwrap());
    assert_eq!(next(&mut second).await.unwrap(), None);
    let ticket = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    assert!(timeout(Duration::from_millis(500), ticket.recorded()).await.is_err(), "it runs");
    orchestrator.drain();
    tasks.finished().await.unwrap();
    assert_eq!(next(&mut second).await.unwrap(), Some(Revision(1)));
    assert!(matches!(next(&mut second).await, Err(Refusal::Draining)));
}

/// The event in short, with the cycle and the revision that it names.
fn brief(event: &Event) -> (&'static str, u64) {
    match event {
        Event::Started(cycle, _) => ("started", cycle.cycle_id.0),
        Event::Progress(event, ..) => ("progress", event.cycle.cycle_id.0),
        Event::Recorded(record) => ("recorded", record.cycle_id.0),
        Event::Bookmark(position, _) => ("bookmark", position.revision.0),
        Event::Unreadable(unreadable) => panic!("{unreadable}"),
    }
}

/// The events of a watcher until it has none for a second.
async fn all(watcher: &mut Watcher) -> Vec<(&'static str, u64)> {
    let mut events = Vec::new();
    while let Ok(event) = timeout(Duration::from_secs(1), watcher.next()).await {
        events.push(brief(&event.unwrap()));
    }
    events
}

#[tokio::test(start_paused = true)]
async fn a_filter_applies_to_progress_as_well() {
    let (orchestrator, _tasks) = stage(settings()).await;
    let of_b = PartFilter { subsystems: [Name::parse("b").unwrap()].into(), ..PartFilter::default() };
    let loops: HashSet<_> = [Name::parse("x").unwrap()].into();
    let filters = [
        WatchFilter { parts: of_b.clone(), ..WatchFilter::default() },
        WatchFilter { loops: loops.clone(), ..WatchFilter::default() },
        WatchFilter { parts: of_b, loops, ..WatchFilter::default() },
    ];
    let mut watchers = Vec::new();
    for filter in filters {
        let mut watcher = orchestrator.history().watch(From::Now, filter, true).unwrap();
        assert_eq!(all(&mut watcher).await, [("bookmark", 0)]);
        watchers.push(watcher);
    }
    let of_loop = |name: &str| CycleRequest { trigger: Trigger::Loop(Name::parse("x").unwrap()), ..of(&[name]) };
    for request in [of(&["a"]), of(&["b"]), of_loop("c"), of_loop("b")] {
        orchestrator.run_cycle(request, false).await.unwrap().recorded().await.unwrap();
    }
    for (watcher, cycles) in watchers.iter_mut().zip([&[2, 4][..], &[3, 4], &[4]]) {
        let mut expected = Vec::new();
        for cycle_id in cycles {
            expected.extend(["started", "progress", "progress", "recorded"].map(|event| (event, *cycle_id)));
        }
        let mut events = all(watcher).await;
        // Events of different cycles come in any order.
        events.sort_by_key(|(_, cycle_id)| *cycle_id);
        assert_eq!(events, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_waits_for_earlier_events_of_other_cycles_only() {
    let (orchestrator, _tasks) = stage(settings()).await;
    let names: Vec<_> = (0..30).map(|i| format!("s{i}")).collect();
    orchestrator
        .register_all(names.iter().map(|name| subsystem(name)).collect(), None, &Registrar::Anyone, by_test())
        .await
        .unwrap();
    let mut watcher = orchestrator.history().watch(From::Now, WatchFilter::default(), true).unwrap();
    assert_eq!(all(&mut watcher).await, [("bookmark", 0)]);
    orchestrator.run_cycle(of(&["a"]), false).await.unwrap().recorded().await.unwrap();
    let mut events = Vec::new();
    // The cycle has sent three events. For each event that the watcher takes, there are further ones.
    for name in &names {
        orchestrator.run_cycle(of(&[name]), false).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        events.push(brief(&watcher.next().await.unwrap()));
        if events.contains(&("recorded", 1)) {
            break;
        }
    }
    let of_first: Vec<_> = events.iter().filter(|(_, cycle_id)| *cycle_id == 1).map(|(event, _)| *event).collect();
    assert_eq!(of_first, ["started", "progress", "progress", "recorded"]);
    assert!(events.len() <= 5, "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn a_watcher_that_joins_a_large_cycle_receives_its_state_in_pieces() {
    const PARTS: usize = 1100;
    let limits = Settings { max_subsystems: 2000, max_concurrent_calls: 1050, ..settings() };
    let (orchestrator, _tasks) = stage(limits).await;
    let names: Vec<_> = (0..PARTS).map(|i| format!("s{i}")).collect();
    orchestrator
        .register_all(names.iter().map(|name| subsystem(name)).collect(), None, &Registrar::Anyone, by_test())
        .await
        .unwrap();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let ticket = orchestrator.run_cycle(of(&names), false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let now = &orchestrator.status().running[0];
    assert_eq!((now.total, now.running, now.ended), (PARTS, 1050, 0));
    let mut watcher = orchestrator.history().watch(From::Now, WatchFilter::default(), true).unwrap();
    assert_eq!(brief(&watcher.next().await.unwrap()), ("bookmark", 0));
    assert_eq!(brief(&watcher.next().await.unwrap()), ("started", 1));
    let (mut called, mut ended, mut sizes) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    loop {
        match watcher.next().await.unwrap() {
            Event::Progress(event, _, lost) => {
                assert_eq!(lost, 0);
                sizes.push(event.change.updates().len());
                for update in event.change.updates() {
                    let parts = if update.state.is_some() { &mut ended } else { &mut called };
                    assert!(parts.insert(update.name.clone()), "{update:?}");
                }
            }
            Event::Recorded(_) => break,
            event => panic!("{event:?}"),
        }
    }
    assert_eq!((called.len(), ended.len(), &sizes[..3]), (PARTS, PARTS, &[512, 512, 26][..]));
    assert!(sizes.iter().all(|size| (1..=512).contains(size)), "{sizes:?}");
    ticket.recorded().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_watcher_is_shown_a_record_at_once_and_lags_while_its_next_record_is_not_cached() {
    const CACHED: u64 = 256;
    let (orchestrator, _tasks) = stage(settings()).await;
    let mut watcher = orchestrator.history().watch(From::Now, WatchFilter::default(), false).unwrap();
    let mut behind = orchestrator.history().watch(From::Now, WatchFilter::default(), false).unwrap();
    assert_eq!(next(&mut watcher).await.unwrap(), None);
    let figures = || {
        let Watched { watchers, lagging, events } = orchestrator.history().watched();
        (watchers, lagging, events)
    };
    assert_eq!(figures(), (2, 0, 1));
    let ticket = orchestrator.run_cycle(of(&["a"]), false).await.unwrap();
    let start = Instant::now();
    assert_eq!(next(&mut watcher).await.unwrap(), Some(Revision(1)));
    assert_eq!(start.elapsed(), Duration::from_secs(1));
    ticket.recorded().await.unwrap();
    record(&orchestrator, CACHED - 1).await;
    assert_eq!(figures(), (2, 0, 2));
    record(&orchestrator, 1).await;
    assert_eq!(figures(), (2, 1, 2));
    drop(watcher);
    assert_eq!(figures(), (1, 1, 2));
    assert_eq!(revisions(&mut behind, 257).await.len(), 257);
    assert_eq!(figures(), (1, 0, 2 + CACHED + 1));
}

#[tokio::test(start_paused = true)]
async fn the_cache_for_watchers_and_their_filters_count_as_memory_of_the_history() {
    // The share of the history is 64 MiB.
    let memory = Shares::of(512 << 20);
    let store = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
    let process = Process { memory: memory.clone(), ..Process::default() };
    let (orchestrator, _tasks) = process.over(store).await.unwrap();
    // 8 MiB of records, with the state in which they are decoded for filters.
    assert_eq!(memory.history.held(), 24 << 20);
    // Filters have a quarter: each name counts as 128 bytes.
    let filter = |names: usize| {
        let loops = (0..names).map(|i| Name::parse(&format!("l{i}")).unwrap()).collect();
        WatchFilter { loops, ..WatchFilter::default() }
    };
    let _watcher = orchestrator.history().watch(From::Now, filter((16 << 20) / 128), false).unwrap();
    let refused = orchestrator.history().watch(From::Now, filter(1), false).err();
    assert!(matches!(&refused, Some(Refusal::MemoryFull(full)) if full.max == 16 << 20), "{refused:?}");
}

/// Records cycles with these numbers of parts, each of which adds an output to the record: the record of one part has a
/// mebibyte. Returns the number of records that are cached for watchers.
async fn cached(parts: &[usize]) -> usize {
    let settings = Settings { max_watchers: 20, max_record_bytes: 16 * MIB, max_outputs_bytes: None, ..settings() };
    let store = store::open(&store::StoreUrl::Memory, record::CHECKS, host().clock).await.unwrap();
    let fleet = Arc::new(Fleet::default());
    let (orchestrator, _tasks) = start(settings, fleet.clone(), store).await;
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
    orchestrator.register_all(names.map(subsystem).into(), None, &Registrar::Anyone, by_test()).await.unwrap();
    let answer = |bytes: usize| fleet.answer.lock().unwrap().output = text(&"x".repeat(bytes));
    let run = async |parts: usize| {
        let request = CycleRequest { record_outputs: true, ..of(&names[..parts]) };
        orchestrator.run_cycle(request, false).await.unwrap().recorded().await.unwrap().bytes.len()
    };
    answer(MIB / 2);
    let beside = run(1).await - MIB / 2;
    answer(MIB - beside);
    for parts in parts {
        let size = run(*parts).await;
        assert!(if *parts == 1 { size == MIB } else { size > 8 * MIB }, "{parts}: {size}");
    }
    // A watcher lags while its next record is not cached.
    let watchers: Vec<_> = (1..=parts.len() as u64)
        .map(|sent| orchestrator.history().watch(after(sent), WatchFilter::default(), false).unwrap())
        .collect();
    watchers.len() - orchestrator.history().watched().lagging
}

#[tokio::test(start_paused = true)]
async fn the_last_eight_mebibytes_of_records_are_cached_and_at_least_one_record() {
    assert_eq!(cached(&[1; 11]).await, 8);
    assert_eq!(cached(&[1, 9]).await, 1);
    assert_eq!(cached(&[9, 1, 1]).await, 2);
}

/// An orchestrator with this memory over `a` and `b`, which runs after `a`.
async fn within(memory: &Shares) -> (Orchestrator, OrchestratorTasks) {
    let process = Process { memory: memory.clone(), ..Process::default() };
    let (orchestrator, tasks) = process.over(in_memory().await).await.unwrap();
    let second = Subsystem { after: vec![Name::parse("a").unwrap()], ..subsystem("b") };
    orchestrator.register_all(vec![subsystem("a"), second], None, &Registrar::Anyone, by_test()).await.unwrap();
    (orchestrator, tasks)
}

#[tokio::test(start_paused = true)]
async fn the_filter_of_a_watcher_takes_memory_until_it_disconnects() {
    let memory = Shares::of(1 << 30);
    let (orchestrator, _tasks) = within(&memory).await;
    let names = |count| (0..count).map(|i| Name::parse(&format!("n{i}")).unwrap());
    let of_loops = |count| WatchFilter { loops: names(count).collect(), ..WatchFilter::default() };
    let of_parts = |count| WatchFilter {
        parts: PartFilter { subsystems: names(count).collect(), ..PartFilter::default() },
        ..WatchFilter::default()
    };
    let idle = memory.history.held();
    let _others = memory.history.try_hold(memory.history.max() - idle - 1000).unwrap();
    let taken = memory.history.held();
    // A name is counted with 128 bytes.
    for filter in [of_loops(10), of_parts(10)] {
        let refused = orchestrator.history().watch(From::Now, filter, false).err();
        assert!(matches!(refused, Some(Refusal::MemoryFull(_))), "{refused:?}");
    }
    let watchers =
        [of_loops(3), of_parts(3)].map(|filter| orchestrator.history().watch(From::Now, filter, false).unwrap());
    assert!(memory.history.held() > taken);
    let refused = orchestrator.history().watch(From::Now, of_loops(3), false).err();
    assert!(matches!(refused, Some(Refusal::MemoryFull(_))), "{refused:?}");
    drop(watchers);
    assert_eq!(memory.history.held(), taken);
    orchestrator.history().watch(From::Now, of_loops(3), false).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_next_event_counts_the_updates_that_were_lost_for_lack_of_memory() {
    let memory = Shares::of(1 << 30);
    let (orchestrator, _tasks) = within(&memory).await;
    let mut watcher = orchestrator.history().watch(From::Now, WatchFilter::default(), true).unwrap();
    assert_eq!(brief(&watcher.next().await.unwrap()), ("bookmark", 0));
    assert!(watcher.next().now_or_never().is_none(), "it waits");
    orchestrator.run_cycle(of(&["a", "b"]), false).await.unwrap();
    assert_eq!(brief(&watcher.next().await.unwrap()), ("started", 1));
    // The call of `a` is the first update.
    let taken = memory.history.try_hold(memory.history.max() - memory.history.held()).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    drop(taken);
    let mut found = Vec::new();
    loop {
        match watcher.next().await.unwrap() {
            Event::Progress(event, _, lost) => found.push((event.change.updates().len(), lost)),
            Event::Recorded(_) => break,
            event => panic!("{event:?}"),
        }
    }
    // The end of `a` and the call of `b` come together, and then the end of `b`.
    assert_eq!(found, [(2, 1), (1, 0)]);
}

#[tokio::test(start_paused = true)]
async fn the_status_has_the_number_of_parts_that_run_and_that_have_ended() {
    let (orchestrator, _tasks) = within(&Shares::of(1 << 30)).await;
    let ticket = orchestrator.run_cycle(of(&["a", "b"]), false).await.unwrap();
    for expected in [(2, 1, 0), (2, 1, 1)] {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let now = &orchestrator.status().running[0];
        assert_eq!((now.total, now.running, now.ended), expected);
    }
    ticket.recorded().await.unwrap();
    assert!(orchestrator.status().running.is_empty());
}
