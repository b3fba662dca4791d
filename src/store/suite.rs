//! Tests for every store, and tests for stores that outlive their process.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt;
use jiff::Timestamp;
use proptest::prelude::*;

use super::{FileError, OpenError, StoreUrl, open};
use crate::{
    clock::Clock,
    model::{
        CycleId, CycleState, Epoch, LoopSpec, LoopState, Name, Output, Payload, Revision, SubsystemSpec, TraceId,
        Trigger,
    },
    ports::{
        Contents, Durability, Filter, Found, Lost, OpenCycle, Page, PageLimits, Record, ResumeError, Retention,
        RetentionRule, SCAN_LIMIT, Stage, Store, StoreError, StoredLoop, StoredOutput, StoredSubsystem, TriggerKind,
        Write,
    },
};

const ALL: PageLimits = PageLimits { records: usize::MAX, bytes: usize::MAX };

fn name(name: &str) -> Name {
    Name::parse(name).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

/// The cycle with this revision: of each two, the one with the higher id ends first.
fn cycle_of(revision: u64) -> CycleId {
    CycleId(((revision - 1) ^ 1) + 1)
}

/// The record with this revision.
fn record(revision: u64, epoch: Epoch) -> Record {
    record_of(cycle_of(revision).0, revision, epoch)
}

fn record_of(id: u64, revision: u64, epoch: Epoch) -> Record {
    Record {
        cycle_id: CycleId(id),
        revision: Revision(revision),
        epoch,
        state: if revision.is_multiple_of(3) { CycleState::Failed } else { CycleState::Succeeded },
        trigger: if revision.is_multiple_of(2) { Trigger::Loop(name("l")) } else { Trigger::Manual },
        request_id: revision.is_multiple_of(5).then(|| "five".to_owned()),
        finished_at: at(i64::try_from(revision).unwrap()),
        bytes: vec![u8::try_from(revision % 251).unwrap(); 100].into(),
    }
}

/// Records these revisions, after all earlier ones were recorded in this way.
fn recorded(revisions: RangeInclusive<u64>, epoch: Epoch) -> Write {
    let noted = |revision: u64| revision.next_multiple_of(2);
    let (before, last) = (noted(revisions.start() - 1), noted(*revisions.end()));
    let records: Vec<_> = revisions.map(|revision| record(revision, epoch)).collect();
    let ends: BTreeSet<_> = records.iter().map(|record| record.cycle_id.0).collect();
    let open = (before + 1..=last).filter(|id| !ends.contains(id)).map(open_cycle).collect();
    Write { epoch, last_cycle_id: CycleId(last), open, records, ..Write::default() }
}

fn output(cycle_id: u64, text: &str) -> Output {
    let object = serde_json::json!({ "text": text });
    Output { cycle_id: CycleId(cycle_id), payload: Payload::from_json(object.as_object().unwrap()).unwrap() }
}

async fn commit(store: &dyn Store, write: Write) {
    store.commit(Arc::new(write)).await.unwrap();
}

/// A store with this number of records.
async fn filled(store: &dyn Store, epoch: Epoch, records: u64) {
    commit(store, recorded(1..=records, epoch)).await;
}

/// The revisions of these records, all of which are readable.
fn revisions(records: &[Found]) -> Vec<u64> {
    let revision = |record: &Record| {
        assert_eq!(*record, record_of(record.cycle_id.0, record.revision.0, record.epoch));
        record.revision.0
    };
    records.iter().map(|found| revision(found.as_ref().unwrap())).collect()
}

/// Checks that the store refuses this, and keeps nothing of it.
async fn refuses(store: &dyn Store, write: Write) {
    let size = store.size().await.unwrap().records;
    let refused = store.commit(Arc::new(write.clone())).await;
    assert!(matches!(refused, Err(StoreError::Defect { .. })), "{refused:?} to {write:?}");
    assert_eq!(store.size().await.unwrap().records, size, "{write:?}");
}

/// Bytes with this prefix stand for an unreadable record.
fn check(record: &Record) -> Result<(), String> {
    if record.bytes.starts_with(b"unreadable") { Err("as scripted".into()) } else { Ok(()) }
}

// ---------------------------------------------------------------------------------------------------------------
// Every store

async fn what_is_written_is_read(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 12).await;
    assert_eq!(store.cycle(cycle_of(7)).await.unwrap(), Some(Ok(record(7, epoch))));
    assert_eq!(store.cycle(CycleId(13)).await.unwrap(), None);
    let of_request = |id: &str| store.cycle_of_request(id.to_owned());
    assert_eq!(of_request("five").await.unwrap(), Some(Ok(record(10, epoch))));
    assert_eq!(of_request("six").await.unwrap(), None);
}

async fn revisions_follow_each_other(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 3).await;
    for bad in [vec![3], vec![5], vec![4, 6]] {
        let mut write = recorded(4..=6, epoch);
        write.records.truncate(bad.len());
        for (record, revision) in write.records.iter_mut().zip(bad) {
            record.revision = Revision(revision);
        }
        write.open = vec![open_cycle(5)];
        refuses(store, write).await;
    }
    commit(store, recorded(4..=6, epoch)).await;
    assert_eq!(revisions(&store.cycles_after(Revision(0), ALL).await.unwrap()), [1, 2, 3, 4, 5, 6]);
}

async fn records_come_in_any_order_of_their_ids(store: &dyn Store, epoch: Epoch) {
    let open = (1..=4).map(open_cycle).collect();
    commit(store, Write { epoch, last_cycle_id: CycleId(4), open, ..Write::default() }).await;
    for (revision, id) in (1..).zip([3, 1, 4, 2]) {
        let mut record = record_of(id, revision, epoch);
        record.request_id = Some("twice".into()).filter(|_| id == 3 || id == 1);
        commit(store, Write { epoch, last_cycle_id: CycleId(4), records: vec![record], ..Write::default() }).await;
    }
    let ids = |found: &[Found]| found.iter().map(|found| found.as_ref().unwrap().cycle_id.0).collect::<Vec<_>>();
    assert_eq!(ids(&store.cycles_after(Revision(0), ALL).await.unwrap()), [3, 1, 4, 2]);
    let page = store.cycles_before(Revision(100), Filter::default(), ALL).await.unwrap();
    assert_eq!(ids(&page.records), [2, 4, 1, 3]);
    let latest = store.cycle_of_request("twice".into()).await.unwrap().unwrap().unwrap();
    assert_eq!(latest.cycle_id, CycleId(1), "the one that was recorded last, whatever its id");
}

async fn a_cycle_can_be_noted_and_recorded_in_one_write(store: &dyn Store, epoch: Epoch) {
    let write = |open, records| Write { epoch, last_cycle_id: CycleId(3), open, records, ..Write::default() };
    commit(store, write(vec![open_cycle(2)], vec![record_of(3, 1, epoch), record_of(1, 2, epoch)])).await;
    refuses(store, write(Vec::new(), vec![record_of(3, 3, epoch)])).await;
    commit(store, write(Vec::new(), vec![record_of(2, 3, epoch)])).await;
}

async fn ids_are_noted_completely_and_never_taken_back(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 2).await;
    let write = |last, open: &[u64], record: Option<u64>| Write {
        epoch,
        last_cycle_id: CycleId(last),
        open: open.iter().copied().map(open_cycle).collect(),
        records: record.map(|id| record_of(id, 3, epoch)).into_iter().collect(),
        outputs: vec![(name("a"), output(3, "x"))],
        ..Write::default()
    };
    for (last, open, record) in [
        (3, vec![], None),
        (5, vec![3, 4], None),
        (5, vec![3], Some(5)),
        (3, vec![4], None),
        (3, vec![3, 4], None),
        (4, vec![3, 3], None),
        (1, vec![], None),
    ] {
        refuses(store, write(last, &open, record)).await;
    }
    commit(store, write(5, &[3, 5], Some(4))).await;
    refuses(store, write(4, &[], None)).await;
}

async fn only_an_open_cycle_is_recorded(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 3).await;
    let write = |open, id| Write {
        epoch,
        last_cycle_id: CycleId(4),
        open,
        records: vec![record_of(id, 4, epoch)],
        ..Write::default()
    };
    for recorded_or_never_given in [1, 2, 4, 5] {
        refuses(store, write(Vec::new(), recorded_or_never_given)).await;
    }
    refuses(store, write(vec![open_cycle(3)], 3)).await;
    refuses(store, Write { open: vec![open_cycle(4)], records: Vec::new(), ..write(Vec::new(), 4) }).await;
    commit(store, write(Vec::new(), 3)).await;
}

async fn a_record_leaves_other_open_cycles_open(store: &dyn Store, epoch: Epoch) {
    let write = |open, records| Write { epoch, last_cycle_id: CycleId(3), open, records, ..Write::default() };
    commit(store, write((1..=3).map(open_cycle).collect(), Vec::new())).await;
    commit(store, write(Vec::new(), vec![record_of(3, 1, epoch)])).await;
    commit(store, write(vec![open_cycle(1)], vec![record_of(2, 2, epoch)])).await;
    commit(store, write(Vec::new(), vec![record_of(1, 3, epoch)])).await;
}

async fn pages_neither_skip_nor_repeat_while_records_come_on_top(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 7).await;
    let (mut before, mut last, mut seen) = (Some(Revision(8)), 7, Vec::new());
    while let Some(below) = before {
        let page = store.cycles_before(below, Filter::default(), PageLimits { records: 2, ..ALL }).await.unwrap();
        seen.extend(revisions(&page.records));
        before = page.next;
        // Each time one with a lower id than the last one's, and one with a higher id.
        commit(store, recorded(last + 1..=last + 2, epoch)).await;
        last += 2;
    }
    assert_eq!(seen, [7, 6, 5, 4, 3, 2, 1]);
}

async fn taken_over_again_it_knows_what_was_written_and_fences_the_epoch_before(store: &dyn Store, epoch: Epoch) {
    let settings = LoopSpec { name: "l".into(), ..LoopSpec::default() };
    let stored_loop = StoredLoop { spec: Some(settings), state: LoopState::default(), name: name("l") };
    let write = Write {
        last_cycle_id: CycleId(3),
        open: vec![waiting_cycle(3, Some("three"))],
        outputs: vec![(name("a"), output(1, "a")), (name("b"), output(9, "b")), (name("c"), output(2, "c"))],
        subsystems: [stored_subsystem("a"), stored_subsystem("c")].into(),
        loops: [(name("l"), Some(stored_loop.clone())), (name("m"), Some(stored_loop.clone()))].into(),
        ..recorded(1..=2, epoch)
    };
    commit(store, write).await;
    let less = Write { subsystems: [(name("c"), None)].into(), loops: [(name("m"), None)].into(), ..Write::default() };
    commit(store, Write { epoch, last_cycle_id: CycleId(3), ..less }).await;

    let contents = store.take_over().await.unwrap();
    assert!(contents.epoch > epoch);
    let made =
        |of: &str, cycle_id, finished_at| StoredOutput { name: name(of), output: output(cycle_id, of), finished_at };
    let expected = Contents {
        epoch: contents.epoch,
        last_cycle_id: CycleId(3),
        last_revision: Revision(2),
        last_record: Some(Ok(record(2, epoch))),
        open: vec![waiting_cycle(3, Some("three"))],
        subsystems: vec![(*stored_subsystem("a").1.unwrap()).clone()],
        loops: vec![stored_loop],
        outputs: vec![made("a", 1, Some(at(2))), made("b", 9, None)],
        ..Contents::default()
    };
    assert_eq!(contents, expected);
    let write = |epoch| Write { records: vec![record_of(3, 3, epoch)], ..recorded(3..=3, epoch) };
    let fenced = store.commit(Arc::new(write(epoch))).await;
    assert_eq!(fenced, Err(StoreError::Fenced { by: contents.epoch }));
    let write = Write { last_cycle_id: CycleId(3), open: Vec::new(), ..write(contents.epoch) };
    commit(store, write).await;
    assert_eq!(store.take_over().await.unwrap().open, []);
}

/// Only for stores that were not taken over.
async fn before_it_is_taken_over_it_is_read_and_not_written(store: &dyn Store) {
    let write = Write { epoch: Epoch(1), ..recorded(1..=1, Epoch(1)) };
    for epoch in [Epoch(0), Epoch(1)] {
        let refused = store.commit(Arc::new(Write { epoch, ..write.clone() })).await;
        assert!(matches!(refused, Err(StoreError::Defect { .. })), "{refused:?}");
    }
    let refused = store.prune(Retention::default(), at(0), 1).await;
    assert!(matches!(refused, Err(StoreError::Defect { .. })), "{refused:?}");
    assert_eq!(store.cycle(CycleId(1)).await.unwrap(), None);
    assert_eq!(store.cycles_after(Revision(0), ALL).await.unwrap(), []);
    assert_eq!(store.cycles_before(Revision(9), Filter::default(), ALL).await.unwrap().records, []);
    assert_eq!(store.size().await.unwrap().records, 0);
    let epoch = store.take_over().await.unwrap().epoch;
    filled(store, epoch, 1).await;
}

async fn another_epoch_is_fenced(store: &dyn Store, epoch: Epoch) {
    let write = Write { epoch: Epoch(epoch.0 + 1), ..recorded(1..=1, epoch) };
    assert!(matches!(store.commit(Arc::new(write)).await, Err(StoreError::Fenced { .. })));
    assert_eq!(store.cycle(cycle_of(1)).await.unwrap(), None);
}

async fn pages_go_down(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 12).await;
    let page = async |before: u64, filter: Filter, limits: PageLimits| {
        let page = store.cycles_before(Revision(before), filter, limits).await.unwrap();
        (revisions(&page.records), page.next.map(|next| next.0))
    };
    let three = PageLimits { records: 3, ..ALL };
    assert_eq!(page(u64::MAX >> 1, Filter::default(), three).await, (vec![12, 11, 10], Some(10)));
    assert_eq!(page(3, Filter::default(), three).await, (vec![2, 1], None));
    assert_eq!(page(4, Filter::default(), three).await, (vec![3, 2, 1], None));
    assert_eq!(page(100, Filter::default(), PageLimits { bytes: 250, ..ALL }).await, (vec![12, 11], Some(11)));
    assert_eq!(page(100, Filter::default(), PageLimits { bytes: 1, ..ALL }).await, (vec![12], Some(12)));

    let failed = Filter { states: vec![CycleState::Failed], ..Filter::default() };
    assert_eq!(page(100, failed.clone(), ALL).await, (vec![12, 9, 6, 3], None));
    assert_eq!(page(100, failed, PageLimits { records: 2, ..ALL }).await, (vec![12, 9], Some(7)));
    let of_loop = Filter { loop_name: Some(name("l")), trigger: Some(TriggerKind::Loop), ..Filter::default() };
    assert_eq!(page(7, of_loop, ALL).await, (vec![6, 4, 2], None));
    let some_time = Filter { finished_from: Some(at(3)), finished_before: Some(at(5)), ..Filter::default() };
    assert_eq!(page(100, some_time, ALL).await, (vec![4, 3], None));
}

async fn a_page_does_not_read_everything(store: &dyn Store, epoch: Epoch) {
    let count = SCAN_LIMIT as u64 + 10;
    filled(store, epoch, count).await;
    let none = Filter { states: vec![CycleState::Interrupted], ..Filter::default() };
    let page = store.cycles_before(Revision(count + 1), none.clone(), ALL).await.unwrap();
    assert_eq!((page.records.len(), page.next), (0, Some(Revision(11))));
    let rest = store.cycles_before(Revision(11), none, ALL).await.unwrap();
    assert_eq!((rest.records.len(), rest.next), (0, None));
}

async fn revisions_go_up(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 5).await;
    let after = async |revision: u64, limits| store.cycles_after(Revision(revision), limits).await;
    assert_eq!(revisions(&after(0, ALL).await.unwrap()), [1, 2, 3, 4, 5]);
    assert_eq!(revisions(&after(3, ALL).await.unwrap()), [4, 5]);
    assert_eq!(revisions(&after(5, ALL).await.unwrap()), Vec::<u64>::new());
    assert_eq!(revisions(&after(1, PageLimits { records: 2, ..ALL }).await.unwrap()), [2, 3]);
    assert_eq!(revisions(&after(1, PageLimits { bytes: 1, ..ALL }).await.unwrap()), [2]);
    let oldest_and_newest =
        |oldest, newest| Err(ResumeError::NotRetained { oldest: Revision(oldest), newest: Revision(newest) });
    assert_eq!(after(6, ALL).await, oldest_and_newest(1, 5));

    let newest_three =
        Retention { default: RetentionRule { max_cycles: Some(3), max_age: None }, ..Retention::default() };
    let pruned = store.prune(newest_three, at(0), 100).await.unwrap();
    assert_eq!((pruned.removed, pruned.pruned_to), (2, Revision(2)));
    assert_eq!(after(1, ALL).await, oldest_and_newest(3, 5));
    assert_eq!(revisions(&after(2, ALL).await.unwrap()), [3, 4, 5]);
}

async fn its_size_goes_up_and_its_records_down_again(store: &dyn Store, epoch: Epoch) {
    let empty = store.size().await.unwrap();
    assert_eq!(empty.records, 0);
    filled(store, epoch, 30).await;
    let full = store.size().await.unwrap();
    assert_eq!(full.records, 30);
    assert!(full.bytes >= empty.bytes + 3000, "{full:?} after {empty:?}");
    let newest = Retention { default: RetentionRule { max_cycles: Some(1), max_age: None }, ..Retention::default() };
    store.prune(newest, at(0), 100).await.unwrap();
    assert_eq!(store.size().await.unwrap().records, 1);
}

async fn retention_counts_ages_and_distinguishes(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 30).await;
    let all = async || revisions(&store.cycles_before(Revision(100), Filter::default(), ALL).await.unwrap().records);
    let rule =
        |max_cycles, seconds: Option<u64>| RetentionRule { max_cycles, max_age: seconds.map(Duration::from_secs) };
    let prune = async |retention, limit| store.prune(retention, at(30), limit).await.unwrap().removed;
    let everything = Retention::default();
    assert_eq!(prune(everything, 100).await, 0);
    // 20 succeeded and 10 failed; those that failed are kept longer.
    let by_state = BTreeMap::from([(CycleState::Failed, rule(Some(9), None))]);
    let mixed = Retention { default: rule(Some(5), None), by_state };
    assert_eq!(prune(mixed.clone(), 10).await, 10);
    assert_eq!(prune(mixed.clone(), 10).await, 6);
    assert_eq!(prune(mixed, 10).await, 0);
    assert_eq!(all().await, [30, 29, 28, 27, 26, 25, 24, 23, 21, 18, 15, 12, 9, 6]);
    let young = Retention { default: rule(None, Some(5)), ..Retention::default() };
    assert_eq!(prune(young, 100).await, 9);
    assert_eq!(all().await, [30, 29, 28, 27, 26]);
    let nothing = Retention { default: rule(Some(0), None), ..Retention::default() };
    prune(nothing, 100).await;
    assert_eq!(all().await, [30], "the newest one always stays");
}

async fn retention_removes_low_revisions_first_and_never_the_highest(store: &dyn Store, epoch: Epoch) {
    let open = (1..=4).map(open_cycle).collect();
    commit(store, Write { epoch, last_cycle_id: CycleId(4), open, ..Write::default() }).await;
    let records = (1..).zip([4, 3, 2, 1]).map(|(revision, id)| record_of(id, revision, epoch)).collect();
    commit(store, Write { epoch, last_cycle_id: CycleId(4), records, ..Write::default() }).await;
    let left = async || revisions(&store.cycles_before(Revision(100), Filter::default(), ALL).await.unwrap().records);
    let keep = |max_cycles| Retention { default: RetentionRule { max_cycles, max_age: None }, ..Retention::default() };
    let pruned = store.prune(keep(Some(1)), at(0), 2).await.unwrap();
    assert_eq!((pruned.removed, pruned.pruned_to, left().await), (2, Revision(2), vec![4, 3]));
    store.prune(keep(Some(0)), at(0), 100).await.unwrap();
    assert_eq!(left().await, [4]);
    assert_eq!(store.cycle(CycleId(1)).await.unwrap(), Some(Ok(record_of(1, 4, epoch))));
    assert_eq!(store.cycle(CycleId(4)).await.unwrap(), None);
    refuses(
        store,
        Write { epoch, last_cycle_id: CycleId(4), records: vec![record_of(4, 5, epoch)], ..Write::default() },
    )
    .await;
}

macro_rules! every_store {
    ($($test:ident)+) => {
        mod memory {
            $(#[tokio::test]
            async fn $test() {
                let store = super::open(&super::StoreUrl::Memory, super::check, super::Clock::system()).await.unwrap();
                let epoch = store.take_over().await.unwrap().epoch;
                super::$test(&*store, epoch).await;
            })+
        }

        mod sqlite {
            $(#[tokio::test]
            async fn $test() {
                let directory = tempfile::tempdir().unwrap();
                let url = super::StoreUrl::Sqlite(directory.path().join("o.db"));
                let store = super::open(&url, super::check, super::Clock::system()).await.unwrap();
                let epoch = store.take_over().await.unwrap().epoch;
                super::$test(&*store, epoch).await;
            })+
        }
    };
}

every_store! {
    what_is_written_is_read
    revisions_follow_each_other
    records_come_in_any_order_of_their_ids
    a_cycle_can_be_noted_and_recorded_in_one_write
    ids_are_noted_completely_and_never_taken_back
    only_an_open_cycle_is_recorded
    a_record_leaves_other_open_cycles_open
    taken_over_again_it_knows_what_was_written_and_fences_the_epoch_before
    another_epoch_is_fenced
    pages_go_down
    pages_neither_skip_nor_repeat_while_records_come_on_top
    a_page_does_not_read_everything
    revisions_go_up
    its_size_goes_up_and_its_records_down_again
    retention_counts_ages_and_distinguishes
    retention_removes_low_revisions_first_and_never_the_highest
}

#[tokio::test]
async fn before_a_store_is_taken_over_it_is_read_and_not_written() {
    before_it_is_taken_over_it_is_read_and_not_written(
        &*open(&StoreUrl::Memory, check, Clock::system()).await.unwrap(),
    )
    .await;
    let directory = tempfile::tempdir().unwrap();
    let url = StoreUrl::Sqlite(directory.path().join("o.db"));
    before_it_is_taken_over_it_is_read_and_not_written(&*open(&url, check, Clock::system()).await.unwrap()).await;
}

// ---------------------------------------------------------------------------------------------------------------
// SQLite

async fn try_open(path: &Path) -> Result<(Arc<dyn Store>, Contents), OpenError> {
    let store = open(&StoreUrl::Sqlite(path.to_owned()), check, Clock::system()).await?;
    let contents = store.take_over().await?;
    Ok((store, contents))
}

async fn opened(path: &Path) -> (Arc<dyn Store>, Contents) {
    try_open(path).await.unwrap()
}

async fn refused(path: &Path) -> OpenError {
    try_open(path).await.err().unwrap()
}

fn stored_subsystem(name: &str) -> (Name, Option<Arc<StoredSubsystem>>) {
    let spec = SubsystemSpec { name: name.into(), endpoint: "http://h:1".into(), ..SubsystemSpec::default() };
    let name = self::name(name);
    let lease = Some(Duration::from_millis(1500));
    let stored = StoredSubsystem { spec: Some(spec), lease, suspended: true, name: name.clone() };
    (name, Some(stored.into()))
}

fn open_cycle(id: u64) -> OpenCycle {
    OpenCycle {
        cycle_id: CycleId(id),
        trigger: Trigger::Loop(name("l")),
        scheduled_at: at(1),
        request_id: Some("r".into()),
        trace_id: Some(TraceId(u128::MAX - 1)),
        stage: Stage::Begun(at(2)),
    }
}

fn waiting_cycle(id: u64, request: Option<&'static str>) -> OpenCycle {
    let stage = Stage::Waiting(request.map(|request| request.as_bytes().into()));
    OpenCycle { trigger: Trigger::Manual, request_id: None, trace_id: None, stage, ..open_cycle(id) }
}

/// An open cycle of which nothing can be read.
fn unknown_cycle(id: u64) -> OpenCycle {
    let unknown = OpenCycle { trigger: Trigger::Unknown, stage: Stage::Unknown, ..waiting_cycle(id, None) };
    OpenCycle { scheduled_at: Timestamp::UNIX_EPOCH, ..unknown }
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new/directory/o.db");
    let (store, first) = opened(&path).await;
    assert_eq!((first.last_cycle_id, first.may_lack_open), (CycleId(0), false));
    let loop_spec = LoopSpec { name: "l".into(), ..LoopSpec::default() };
    let state = LoopState { last_cycle_id: CycleId(2), accounted_to: Some(at(9)), ..LoopState::default() };
    let stored_loop = StoredLoop { spec: Some(loop_spec), state, name: name("l") };
    let write = Write {
        epoch: first.epoch,
        durability: Durability::Buffered,
        last_cycle_id: CycleId(6),
        open: vec![
            open_cycle(3),
            waiting_cycle(4, None),
            waiting_cycle(5, Some("five")),
            waiting_cycle(6, Some("six")),
        ],
        records: vec![record(1, first.epoch), record(2, first.epoch)],
        outputs: vec![(name("a"), output(1, "old")), (name("a"), output(2, "new")), (name("b"), output(2, "b"))],
        subsystems: BTreeMap::from([stored_subsystem("a"), stored_subsystem("b")]),
        loops: BTreeMap::from([(name("l"), Some(stored_loop.clone()))]),
        close: false,
    };
    commit(&*store, write).await;
    let more = Write {
        epoch: first.epoch,
        last_cycle_id: CycleId(6),
        open: vec![OpenCycle { trace_id: Some(TraceId(1)), stage: Stage::Begun(at(3)), ..waiting_cycle(6, None) }],
        subsystems: [(name("b"), None)].into(),
        ..Write::default()
    };
    let open = [open_cycle(3), waiting_cycle(4, None), waiting_cycle(5, Some("five")), more.open[0].clone()];
    commit(&*store, more).await;
    drop(store);

    let (store, second) = opened(&path).await;
    assert!(second.epoch > first.epoch);
    assert_eq!((second.last_cycle_id, second.last_revision), (CycleId(6), Revision(2)));
    assert_eq!(second.last_record, Some(Ok(record(2, first.epoch))));
    assert_eq!(second.open, open, "what is recorded is no longer open");
    let made = StoredOutput { name: name("a"), output: output(2, "new"), finished_at: Some(at(1)) };
    assert_eq!(second.outputs, [made]);
    assert_eq!(second.subsystems, [(*stored_subsystem("a").1.unwrap()).clone()]);
    assert_eq!(second.loops, [stored_loop]);
    assert!(!second.may_lack_open, "the machine has not restarted");
    // What was open before can be recorded, one by one, and none that is not.
    let record =
        |revision, id| Write { records: vec![record_of(id, revision, second.epoch)], ..recorded(5..=6, second.epoch) };
    refuses(&*store, record(3, 2)).await;
    commit(&*store, record(3, 5)).await;
    commit(&*store, record(4, 3)).await;
    let close = Write { epoch: second.epoch, last_cycle_id: CycleId(6), close: true, ..Write::default() };
    commit(&*store, close).await;
    drop(store);
    assert_eq!(opened(&path).await.1.open, [open[1].clone(), open[3].clone()]);
}

/// A database as the software of this version left it.
fn database_of_version(path: &Path, version: usize) -> rusqlite::Connection {
    let raw = rusqlite::Connection::open(path).unwrap();
    for migration in include_str!("schema.sql").split("-- migration ").skip(1).take(version) {
        raw.execute_batch(migration.split_once('\n').unwrap().1).unwrap();
    }
    raw.pragma_update(None, "application_id", 0x4472_6d4f).unwrap();
    raw.pragma_update(None, "user_version", i64::try_from(version).unwrap()).unwrap();
    raw
}

#[tokio::test]
async fn a_database_of_an_earlier_version_goes_on_with_its_open_cycles_and_those_that_are_missing_between_them() {
    let directory = tempfile::tempdir().unwrap();
    for version in 1..=3 {
        let path = directory.path().join(format!("{version}.db"));
        let raw = database_of_version(&path, version);
        // 1 to 3 are recorded, 4 has begun, 6 waits, and 8 has begun. The last one is damage.
        raw.execute_batch(
            "WITH ids (id) AS (VALUES (1), (2), (3))
             INSERT INTO cycles SELECT id, id, 7, 1, 1, NULL, 'r', id, x'00' FROM ids;
             UPDATE counts SET cycles = 3 WHERE state = 1;
             UPDATE meta SET epoch = 7, last_cycle_id = 3, last_revision = 3;
             INSERT INTO open_cycles (cycle_id, trigger, loop, scheduled_at, started_at, request_id) VALUES
             (2, 1, NULL, 0, NULL, NULL), (4, 2, 'l', 1, 2, 'r'), (6, 1, NULL, 5, NULL, NULL), (8, 1, NULL, 6, 7, NULL),
             (1000000000, 1, NULL, 0, NULL, NULL)",
        )
        .unwrap();
        drop(raw);
        let (store, contents) = opened(&path).await;
        assert_eq!((contents.last_cycle_id, contents.last_revision), (CycleId(8), Revision(3)));
        let stages: Vec<_> = contents.open.iter().map(|open| (open.cycle_id.0, open.stage.clone())).collect();
        let begun = |nanoseconds| Stage::Begun(Timestamp::from_nanosecond(nanoseconds).unwrap());
        let (waits, unknown) = (Stage::Waiting(None), Stage::Unknown);
        let all = [(4, begun(2)), (5, unknown.clone()), (6, waits), (7, unknown), (8, begun(7))];
        assert_eq!(stages, all);
        assert_eq!(contents.open[1], unknown_cycle(5));
        assert_eq!(contents.open[0].request_id.as_deref(), Some("r"));
        let unreadable: Vec<_> = contents.unreadable.iter().map(|row| row.key.as_str()).collect();
        assert_eq!(unreadable, ["1000000000"]);
        assert_eq!(contents.last_record.unwrap().unwrap().cycle_id, CycleId(3));

        let records = vec![record_of(7, 4, contents.epoch), record_of(9, 5, contents.epoch)];
        let write = Write { epoch: contents.epoch, last_cycle_id: CycleId(9), records, ..Write::default() };
        commit(&*store, write).await;
        drop(store);
        let (store, contents) = opened(&path).await;
        assert_eq!(contents.open.iter().map(|open| open.cycle_id.0).collect::<Vec<_>>(), [4, 5, 6, 8]);
        let two = Retention { default: RetentionRule { max_cycles: Some(2), max_age: None }, ..Retention::default() };
        assert_eq!(store.prune(two, at(0), 100).await.unwrap().pruned_to, Revision(3));
        assert_eq!(store.cycle_of_request("five".into()).await.unwrap().unwrap().unwrap().revision, Revision(5));
    }
}

#[tokio::test]
async fn epochs_grow_whatever_the_clock_says() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, first) = opened(&path).await;
    assert!(first.epoch >= Epoch::by_clock(at(0)), "subsystems that know another store's epochs take it for later");
    filled(&*store, first.epoch, 1).await;
    drop(store);
    // As if the clock had been set back since.
    let ahead = Epoch(first.epoch.0 + 1_000_000_000);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE meta SET epoch = ?1", [i64::try_from(ahead.0).unwrap()]).unwrap();
    drop(raw);
    assert_eq!(opened(&path).await.1.epoch, ahead.next());
}

#[tokio::test]
async fn a_restart_of_the_machine_without_a_close_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 1).await;
    drop(store);
    let restart_machine =
        || rusqlite::Connection::open(&path).unwrap().execute("UPDATE meta SET boot_id = 'another'", []).unwrap();
    restart_machine();
    let (store, contents) = opened(&path).await;
    assert!(contents.may_lack_open);
    let close = Write { epoch: contents.epoch, last_cycle_id: CycleId(2), close: true, ..Write::default() };
    commit(&*store, close).await;
    drop(store);
    restart_machine();
    assert!(!opened(&path).await.1.may_lack_open, "it was closed");
}

#[tokio::test]
async fn a_second_process_is_kept_out_and_one_that_is_overtaken_is_fenced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (first, contents) = opened(&path).await;
    let OpenError::InUse { by, .. } = refused(&path).await else { panic!("opened twice") };
    assert_eq!(by, Some(std::process::id()));

    filled(&*first, contents.epoch, 1).await;

    std::fs::remove_file(directory.path().join("o.db.lock")).unwrap();
    #[cfg(target_os = "linux")]
    assert!(
        matches!(refused(&path).await, OpenError::Files(FileError::InUseByAnotherName { .. })),
        "the database itself is locked as well"
    );

    let later = Epoch(contents.epoch.0 + 1);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE meta SET epoch = ?1", [i64::try_from(later.0).unwrap()]).unwrap();
    let write = Arc::new(recorded(2..=2, contents.epoch));
    assert_eq!(first.commit(write).await, Err(StoreError::Fenced { by: later }));
    let pruned = first.prune(Retention::default(), Timestamp::now(), 10).await;
    assert_eq!(pruned.err(), Some(StoreError::Fenced { by: later }), "nor does it forget anything");
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_another_program_holds_up_is_late_and_kept_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (mut trouble, committing) = (store.trouble(), store.clone());
    let committing = tokio::spawn(async move { committing.commit(Arc::new(recorded(1..=1, contents.epoch))).await });
    // The paused clock moves on as nothing else can.
    let late = trouble.next().await.unwrap();
    let Some(StoreError::Late { store: of, waited, .. }) = late else { panic!("{late:?}") };
    assert_eq!((of, waited), (path.display().to_string(), Duration::from_secs(5)));
    assert!(!committing.is_finished());
    assert_eq!(store.cycle(cycle_of(1)).await.unwrap(), None, "it can be read meanwhile");
    other.execute_batch("COMMIT").unwrap();
    committing.await.unwrap().unwrap();
    assert_eq!(trouble.next().await, Some(None));
    assert!(store.cycle(cycle_of(1)).await.unwrap().is_some());
}

#[tokio::test]
async fn an_epoch_begins_with_the_first_commit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    assert!(store.take_over().await.unwrap().epoch >= contents.epoch);
    let contents = store.take_over().await.unwrap();
    let epoch = || {
        let raw = rusqlite::Connection::open(&path).unwrap();
        raw.query_row("SELECT epoch FROM meta", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    assert_eq!(epoch(), 0);
    filled(&*store, contents.epoch, 1).await;
    assert_eq!(epoch(), i64::try_from(contents.epoch.0).unwrap());
}

#[tokio::test]
async fn a_database_that_is_none_or_damaged_or_too_new_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    std::fs::write(&path, vec![b'x'; 10_000]).unwrap();
    assert!(matches!(refused(&path).await, OpenError::Files(FileError::NotADatabase { .. })));

    std::fs::remove_file(&path).unwrap();
    drop(opened(&path).await);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(refused(&path).await, OpenError::TooNew { found: 99, known: 4, .. }));

    raw.pragma_update(None, "user_version", 4).unwrap();
    raw.execute("UPDATE meta SET epoch = 'none'", []).unwrap();
    assert!(matches!(refused(&path).await, OpenError::Store(StoreError::Corrupt { .. })));
    raw.execute("UPDATE meta SET epoch = 0", []).unwrap();
    drop(opened(&path).await);

    let other = directory.path().join("other.db");
    rusqlite::Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    assert!(matches!(refused(&other).await, OpenError::Foreign { .. }));
    let refused = refused(directory.path()).await;
    assert!(matches!(refused, OpenError::Files(FileError::NotRegular { found: "a directory", .. })), "{refused}");
}

#[tokio::test]
async fn what_can_not_be_read_stands_in_its_place_and_the_rest_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 12).await;
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch(
        "UPDATE cycles SET record = CAST('unreadable' AS BLOB) WHERE revision = 2;
         UPDATE cycles SET record = 'text' WHERE revision = 3;
         UPDATE cycles SET state = 99 WHERE revision = 4;
         UPDATE cycles SET trigger = 2, loop = 'no name!' WHERE revision = 5;
         UPDATE cycles SET finished_at = 'noon' WHERE revision = 6;
         UPDATE cycles SET request_id = CAST(x'ff' AS TEXT) WHERE revision = 7;
         UPDATE cycles SET epoch = x'00' WHERE revision = 8;
         UPDATE cycles SET revision = 'nine' WHERE revision = 9;
         DELETE FROM cycles WHERE revision IN (10, 12)",
    )
    .unwrap();
    let told = |found: &[Found]| {
        let told = found.iter().map(|found| match found {
            Ok(record) => (record.revision.0, true),
            Err(unreadable) => (unreadable.revision.0, false),
        });
        told.collect::<Vec<_>>()
    };
    let after = store.cycles_after(Revision(0), ALL).await.unwrap();
    let unreadable = (2..=10).map(|revision| (revision, false));
    let all: Vec<_> = [(1, true)].into_iter().chain(unreadable).chain([(11, true), (12, false)]).collect();
    assert_eq!(told(&after), all);
    let three = PageLimits { records: 3, ..ALL };
    assert_eq!(told(&store.cycles_after(Revision(8), three).await.unwrap()), all[8..11]);
    assert_eq!(told(&store.cycles_after(Revision(11), three).await.unwrap()), all[11..]);

    // In the other direction it is the same.
    let mut all: Vec<_> = all.into_iter().rev().collect();
    let page = store.cycles_before(Revision(100), Filter::default(), ALL).await.unwrap();
    assert_eq!((told(&page.records), page.scanned, page.next), (all.clone(), 12, None));
    let mut before = Revision(100);
    while !all.is_empty() {
        let Page { records, next, .. } = store.cycles_before(before, Filter::default(), three).await.unwrap();
        assert_eq!(told(&records), all.drain(..3).collect::<Vec<_>>());
        before = next.unwrap_or_default();
    }
    // What the filter looks at can be read of revisions 2 and 3, and of no other.
    let interrupted = Filter { states: vec![CycleState::Interrupted], ..Filter::default() };
    let page = store.cycles_before(Revision(9), interrupted, ALL).await.unwrap();
    assert_eq!(told(&page.records), [(8, false), (7, false), (6, false), (5, false), (4, false)]);
    for revision in 2..=9 {
        let found = store.cycle(cycle_of(revision)).await.unwrap();
        let Some(Err(unreadable)) = found else { panic!("{found:?}") };
        assert_eq!(unreadable.cycle_id, cycle_of(revision));
    }
    // What has no place in the history stays, and the rest goes when it is its turn.
    let ten = Retention { default: RetentionRule { max_cycles: Some(10), max_age: None }, ..Retention::default() };
    assert_eq!(store.prune(ten, at(0), 100).await.unwrap().pruned_to, Revision(2));
    drop(store);
    let contents = opened(&path).await.1;
    assert_eq!(contents.last_record.unwrap().unwrap().revision, Revision(11));
}

#[tokio::test]
async fn rows_that_can_not_be_read_are_named_and_the_rest_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, first) = opened(&path).await;
    let write = Write {
        epoch: first.epoch,
        last_cycle_id: CycleId(4),
        open: (1..=3).map(open_cycle).collect(),
        records: vec![record_of(4, 1, first.epoch)],
        outputs: vec![(name("a"), output(1, "a"))],
        subsystems: BTreeMap::from([stored_subsystem("a")]),
        ..Write::default()
    };
    commit(&*store, write).await;
    drop(store);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch(
        "INSERT INTO loops VALUES ('l', NULL, 'no json');
         INSERT INTO subsystems VALUES ('b', '{\"endpoint\":', NULL, 0);
         INSERT INTO subsystems VALUES ('c', x'00', NULL, 0);
         INSERT INTO outputs VALUES ('b', 1, x'ff');
         UPDATE open_cycles SET trigger = 9 WHERE cycle_id = 2;
         INSERT INTO open_cycles (cycle_id, trigger, scheduled_at) VALUES (-1, 1, 0), (4, 1, 0), (5, 1, 0)",
    )
    .unwrap();
    for _ in 0..2 {
        let (store, contents) = opened(&path).await;
        let unreadable: Vec<_> = contents.unreadable.iter().map(|row| (row.what, row.key.as_str())).collect();
        assert_eq!(unreadable[..4], ["-1", "2", "4", "5"].map(|key| ("open cycle", key)));
        assert_eq!(unreadable[4..], [("subsystem", "b"), ("subsystem", "c"), ("loop", "l"), ("output", "b")]);
        assert_eq!(contents.open, [open_cycle(1), unknown_cycle(2), open_cycle(3)]);
        assert_eq!(contents.subsystems, [(*stored_subsystem("a").1.unwrap()).clone()]);
        assert_eq!(contents.outputs.len(), 1);
        drop(store);
    }
}

#[tokio::test]
async fn what_is_missing_at_the_end_is_known_and_an_older_copy_is_told_from_a_damaged_log() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, first) = opened(&path).await;
    filled(&*store, first.epoch, 3).await;
    drop(store);
    let older = std::fs::read(&path).unwrap();
    let (store, second) = opened(&path).await;
    assert_eq!(second.lost, None);
    commit(&*store, recorded(4..=4, second.epoch)).await;
    commit(&*store, Write { epoch: second.epoch, last_cycle_id: CycleId(4), ..Write::default() }).await;
    drop(store);
    std::fs::write(&path, &older).unwrap();
    let (store, third) = opened(&path).await;
    assert_eq!(third.lost, Some(Lost { last_cycle_id: CycleId(4), last_revision: Revision(4), commits: 2 }));
    commit(&*store, recorded(4..=4, third.epoch)).await;
    drop(store);
    let (store, fourth) = opened(&path).await;
    assert_eq!(fourth.lost, None, "it is told once");
    commit(&*store, recorded(5..=20_000, fourth.epoch)).await;
    drop(store);
    std::fs::write(&path, &older).unwrap();
    let behind = refused(&path).await;
    assert!(matches!(behind, OpenError::Behind { has: CycleId(4), noted: CycleId(20_000), .. }), "{behind}");
    let accepted = super::accept(&StoreUrl::Sqlite(path.clone())).unwrap();
    assert_eq!((accepted.last_cycle_id, accepted.noted_cycle_id), (CycleId(4), CycleId(20_000)));
    assert_eq!(opened(&path).await.1.lost, None);
    // Another database at the same path has a history of its own.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(opened(&path).await.1.lost, None);
}

#[tokio::test]
async fn damage_in_the_middle_is_found_when_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 2000).await;
    drop(store);
    // Some pages in the middle of the file become noise.
    let mut bytes = std::fs::read(&path).unwrap();
    let page = |n: usize, of: usize| bytes.len() * n / of / 4096 * 4096;
    let middle = page(1, 3)..page(1, 2);
    bytes[middle].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    let (store, _) = opened(&path).await;
    let read = store.cycles_before(Revision(3000), Filter::default(), ALL).await;
    assert!(matches!(read, Err(StoreError::Corrupt { .. })));
    assert!(store.cycle(cycle_of(2000)).await.unwrap().is_some(), "the rest is still there");
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_passes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 10).await;
    let big = |revision| {
        let mut write = recorded(revision..=revision, contents.epoch);
        write.records[0].bytes = vec![0; 1 << 20].into();
        Arc::new(write)
    };
    // The writer's own connection has to have the limit, so it is asked for in a way that only tests use.
    super::sqlite::limit_pages(&path, 40);
    assert!(matches!(store.commit(big(11)).await, Err(StoreError::Full { .. })));
    assert_eq!(store.cycle(cycle_of(11)).await.unwrap(), None);
    assert!(store.cycle(cycle_of(10)).await.unwrap().is_some());
    super::sqlite::limit_pages(&path, 1_000_000);
    store.commit(big(11)).await.unwrap();
}

/// What a process may do with a store.
#[derive(Clone, Debug)]
enum Step {
    /// This number of cycles is admitted.
    Admit(u64),
    /// One of the open cycles begins.
    Begin(usize),
    /// Open cycles are recorded, picked in this order, and then this number of newly admitted ones.
    Record(Vec<usize>, u64),
    /// What no process may do, in one of the ways of [`Model::defects`].
    Break(usize),
    Prune {
        max_cycles: u64,
        keeps_failed: bool,
        limit: usize,
    },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..5_u64).prop_map(Step::Admit),
        2 => any::<usize>().prop_map(Step::Begin),
        4 => (proptest::collection::vec(any::<usize>(), 0..5), 0..3_u64).prop_map(|(open, new)| Step::Record(open, new)),
        1 => any::<usize>().prop_map(Step::Break),
        2 => (0..8_u64, any::<bool>(), 1..6_usize)
            .prop_map(|(max_cycles, keeps_failed, limit)| Step::Prune { max_cycles, keeps_failed, limit }),
        1 => Just(Step::Restart),
    ]
}

/// What a store holds beside its records.
#[derive(Default)]
struct Model {
    last_cycle_id: u64,
    last_revision: u64,
    open: BTreeMap<u64, OpenCycle>,
    recorded: Vec<u64>,
}

impl Model {
    fn write(&self) -> Write {
        Write { last_cycle_id: CycleId(self.last_cycle_id), ..Write::default() }
    }

    /// The record of this cycle as the one after `before` others in the same write.
    fn record(&self, id: u64, before: usize) -> Record {
        record_of(id, self.last_revision + 1 + before as u64, Epoch(1))
    }

    /// What a step writes.
    fn next(&self, step: &Step) -> Option<Write> {
        let mut write = self.write();
        let last = self.last_cycle_id;
        match step {
            Step::Admit(count) => {
                write.last_cycle_id = CycleId(last + count);
                write.open = (last + 1..=last + count).map(|id| waiting_cycle(id, Some("again"))).collect();
            }
            Step::Begin(_) if self.open.is_empty() => return None,
            Step::Begin(pick) => {
                let id = self.open.keys().nth(pick % self.open.len()).copied().unwrap();
                write.open = vec![OpenCycle { stage: Stage::Begun(at(3)), ..waiting_cycle(id, None) }];
            }
            Step::Record(picks, new) => {
                let mut open: Vec<_> = self.open.keys().copied().collect();
                let picks = &picks[..picks.len().min(open.len())];
                let picked: Vec<_> = picks.iter().map(|pick| open.remove(pick % open.len())).collect();
                let ids: Vec<_> = picked.into_iter().chain(last + 1..=last + new).collect();
                write.last_cycle_id = CycleId(last + new);
                write.records = ids.into_iter().enumerate().map(|(i, id)| self.record(id, i)).collect();
            }
            Step::Break(_) | Step::Prune { .. } | Step::Restart => return None,
        }
        Some(write)
    }

    /// Writes that break the rules, whatever the store holds.
    fn defects(&self) -> Vec<Write> {
        let (last, write) = (self.last_cycle_id, self.write());
        let later = Write { last_cycle_id: CycleId(last + 1), ..write.clone() };
        let new = self.record(last + 1, 0);
        let open = waiting_cycle(last + 1, None);
        let mut defects = vec![
            Write { records: vec![new.clone()], ..write.clone() },
            later.clone(),
            Write { last_cycle_id: CycleId(last + 2), open: vec![open.clone()], ..write.clone() },
            Write { records: vec![self.record(last + 1, 1)], ..later.clone() },
            Write { records: vec![new], open: vec![open], ..later },
        ];
        if let Some(id) = self.recorded.last() {
            defects.push(Write { records: vec![self.record(*id, 0)], ..write.clone() });
            defects.push(Write { open: vec![waiting_cycle(*id, None)], ..write.clone() });
            defects.push(Write { last_cycle_id: CycleId(last - 1), ..write });
        }
        defects
    }

    fn apply(&mut self, write: &Write) {
        self.last_cycle_id = write.last_cycle_id.0;
        self.open.extend(write.open.iter().map(|open| (open.cycle_id.0, open.clone())));
        for record in &write.records {
            self.open.remove(&record.cycle_id.0);
            self.recorded.push(record.cycle_id.0);
            self.last_revision = record.revision.0;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is written, refused, pruned and read, in whatever order cycles end: SQLite answers what memory answers,
    /// and finds after a restart what was open.
    #[test]
    fn sqlite_agrees_with_memory(steps in proptest::collection::vec((step(), 1..30_u64, 1..6_usize), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let url = StoreUrl::Sqlite(directory.path().join("o.db"));
            let memory = open(&StoreUrl::Memory, check, Clock::system()).await.unwrap();
            let mut one = memory.take_over().await.unwrap();
            let mut sqlite = open(&url, check, Clock::system()).await.unwrap();
            let mut contents = sqlite.take_over().await.unwrap();
            let mut model = Model::default();
            for (step, from, count) in steps {
                if let Some(write) = model.next(&step) {
                    model.apply(&write);
                    commit(&*memory, Write { epoch: one.epoch, ..write.clone() }).await;
                    commit(&*sqlite, Write { epoch: contents.epoch, ..write }).await;
                }
                match step {
                    Step::Admit(_) | Step::Begin(_) | Step::Record(..) => {}
                    Step::Break(way) => {
                        let mut defects = model.defects();
                        let defect = defects.swap_remove(way % defects.len());
                        refuses(&*memory, Write { epoch: one.epoch, ..defect.clone() }).await;
                        refuses(&*sqlite, Write { epoch: contents.epoch, ..defect }).await;
                    }
                    Step::Prune { max_cycles, keeps_failed, limit } => {
                        let max_age = Some(Duration::from_secs(max_cycles + 5));
                        let default = RetentionRule { max_cycles: Some(max_cycles), max_age };
                        let failed = keeps_failed.then(|| (CycleState::Failed, RetentionRule::default()));
                        let retention = Retention { default, by_state: failed.into_iter().collect() };
                        let now = at(i64::try_from(model.last_revision).unwrap());
                        let pruned = memory.prune(retention.clone(), now, limit).await;
                        assert_eq!(sqlite.prune(retention, now, limit).await, pruned);
                    }
                    Step::Restart => {
                        drop(sqlite);
                        sqlite = open(&url, check, Clock::system()).await.unwrap();
                        contents = sqlite.take_over().await.unwrap();
                        one = memory.take_over().await.unwrap();
                        assert_eq!(contents.last_cycle_id, CycleId(model.last_cycle_id));
                        assert_eq!(contents.last_revision, Revision(model.last_revision));
                        assert_eq!(contents.open, model.open.values().cloned().collect::<Vec<_>>());
                        assert_eq!(Contents { epoch: contents.epoch, ..one.clone() }, contents);
                        let last = contents.last_record.clone().map(|found| found.unwrap().cycle_id.0);
                        assert_eq!(last, model.recorded.last().copied());
                    }
                }
                let limits = PageLimits { records: count, bytes: 450 };
                for filter in [Filter::default(), Filter { states: vec![CycleState::Failed], ..Filter::default() }] {
                    let page = memory.cycles_before(Revision(from), filter.clone(), limits).await;
                    assert_eq!(sqlite.cycles_before(Revision(from), filter, limits).await, page);
                }
                let after = memory.cycles_after(Revision(from), limits).await;
                assert_eq!(sqlite.cycles_after(Revision(from), limits).await, after);
                assert_eq!(sqlite.cycle(CycleId(from)).await, memory.cycle(CycleId(from)).await);
                let of_request = memory.cycle_of_request("five".into()).await;
                assert_eq!(sqlite.cycle_of_request("five".into()).await, of_request);
            }
        });
    }
}
