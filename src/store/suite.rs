//! Tests for every store.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Range, RangeInclusive},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use proptest::prelude::*;

use super::{StoreUrl, open};
use crate::{
    clock::Clock,
    ledger::{
        Checkpoint, Control, Entry, Frontier, Inclusion, LogVerifier, Node, Part, Path, RecordsPruned, SealKeys,
        Signer, SigningKey,
    },
    model::{
        CycleId, CycleState, Epoch, EventKind, Identity, LoopSpec, LoopState, Name, Output, ParentCycle, Payload,
        RequestKey, Revision, SubsystemSpec, TraceId, Trigger,
    },
    ports::{
        AuditEntry, Checks, Contents, EventFilter, EventRule, Excess, Filter, Found, FoundEvent, Log, LoggedEvent,
        OldEvent, OldRecord, OpenCycle, PageLimits, Record, Removal, ResumeError, Retention, RetentionRule, SCAN_LIMIT,
        Seals, Stage, Store, StoreError, StoredLoop, StoredOutput, StoredSubsystem, TriggerKind, Write,
    },
};

pub(super) const ALL: PageLimits = PageLimits { records: usize::MAX, bytes: usize::MAX };

pub(super) fn name(name: &str) -> Name {
    Name::parse(name).unwrap()
}

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

/// The keys of every store in tests.
pub(super) fn keys() -> SealKeys {
    keys_of([7])
}

/// The keys with these seeds, of which the first one seals.
pub(super) fn keys_of<const N: usize>(seeds: [u8; N]) -> SealKeys {
    let keys = seeds.map(|seed| SigningKey::of_seed("log", [seed; SigningKey::SEED]).unwrap()).into();
    SealKeys::of(&Signer { origin: "log".into(), keys })
}

/// How every store in tests is taken over.
pub(super) fn seals() -> Seals {
    Seals::Checked(keys())
}

/// The cycle with this revision: of each two, the one with the higher id ends first.
pub(super) fn cycle_of(revision: u64) -> CycleId {
    CycleId(((revision - 1) ^ 1) + 1)
}

/// The record with this revision.
pub(super) fn record(revision: u64, epoch: Epoch) -> Record {
    record_of(cycle_of(revision).0, revision, epoch)
}

pub(super) fn record_of(id: u64, revision: u64, epoch: Epoch) -> Record {
    Record {
        cycle_id: CycleId(id),
        revision: Revision(revision),
        epoch,
        state: if revision.is_multiple_of(3) { CycleState::Failed } else { CycleState::Succeeded },
        trigger: if revision.is_multiple_of(2) { Trigger::Loop(name("l")) } else { Trigger::Manual },
        request_id: revision.is_multiple_of(5).then(|| "five".to_owned()),
        triggered_by: revision.is_multiple_of(10).then_some(Identity::Uid(10)),
        finished_at: at(i64::try_from(revision).unwrap()),
        bytes: vec![u8::try_from(revision % 251).unwrap(); 100].into(),
    }
}

/// The key of a request.
pub(super) fn request(id: &str, triggered_by: Option<Identity>) -> RequestKey {
    RequestKey { request_id: id.to_owned(), triggered_by }
}

/// Records these revisions, after all earlier ones were recorded in this way.
pub(super) fn recorded(revisions: RangeInclusive<u64>, epoch: Epoch) -> Write {
    let noted = |revision: u64| revision.next_multiple_of(2);
    let (before, last) = (noted(revisions.start() - 1), noted(*revisions.end()));
    let records: Vec<_> = revisions.map(|revision| record(revision, epoch)).collect();
    let ends: BTreeSet<_> = records.iter().map(|record| record.cycle_id.0).collect();
    let open = (before + 1..=last).filter(|id| !ends.contains(id)).map(open_cycle).collect();
    Write { epoch, last_cycle_id: CycleId(last), open, records, ..Write::default() }
}

/// The audit event with this number.
pub(super) fn event(number: u8) -> AuditEntry {
    AuditEntry {
        kind: EventKind::Change,
        time: at(number.into()),
        caller: format!("token:{}", number % 2),
        rpc: "RunCycle".into(),
        denied: number.is_multiple_of(3),
        bytes: vec![number; 50].into(),
    }
}

pub(super) fn output(cycle_id: u64, text: &str) -> Output {
    let object = serde_json::json!({ "text": text });
    Output { cycle_id: CycleId(cycle_id), payload: Payload::from_json(object.as_object().unwrap()).unwrap() }
}

pub(super) fn stored_subsystem(name: &str) -> (Name, Option<Arc<StoredSubsystem>>) {
    let spec = SubsystemSpec { name: name.into(), endpoint: "http://h:1".into(), ..SubsystemSpec::default() };
    let name = self::name(name);
    let lease = Some(Duration::from_millis(1500));
    let owner = Some(Identity::Token(name.clone()));
    let former_names = vec![self::name("first"), self::name("second")];
    let stored = StoredSubsystem { spec: Some(spec), lease, suspended: true, owner, former_names, name: name.clone() };
    (name, Some(stored.into()))
}

pub(super) async fn commit(store: &dyn Store, write: Write) {
    store.commit(Arc::new(write)).await.unwrap();
}

/// A store with this number of records.
pub(super) async fn filled(store: &dyn Store, epoch: Epoch, records: u64) {
    commit(store, recorded(1..=records, epoch)).await;
}

pub(super) fn open_cycle(id: u64) -> OpenCycle {
    OpenCycle {
        cycle_id: CycleId(id),
        trigger: Trigger::Loop(name("l")),
        scheduled_at: at(1),
        request_id: Some("r".into()),
        triggered_by: Some(Identity::Token(name("t"))),
        trace_id: Some(TraceId(u128::MAX - 1)),
        audit: Some(Bytes::from_static(b"by")),
        stage: Stage::Begun(at(2)),
    }
}

pub(super) fn waiting_cycle(id: u64, request: Option<&'static str>) -> OpenCycle {
    let stage = Stage::Waiting(request.map(|request| request.as_bytes().into()));
    OpenCycle {
        trigger: Trigger::Manual,
        request_id: None,
        triggered_by: None,
        trace_id: None,
        audit: None,
        stage,
        ..open_cycle(id)
    }
}

fn revisions_of(range: RangeInclusive<u64>) -> Vec<Revision> {
    range.map(Revision).collect()
}

/// Removes what exceeds the retention, and returns its revisions. `noted` is a write of the same epoch that notes the
/// ids that are noted.
pub(super) async fn pruned(
    store: &dyn Store,
    noted: &Write,
    retention: Retention,
    now: Timestamp,
    limit: usize,
) -> Vec<Revision> {
    let excess = store.excess(retention, now, limit).await.unwrap();
    let mut leaves: Vec<_> = excess.leaves().collect();
    leaves.sort_unstable();
    let Excess { records, events, first_kept, .. } = excess;
    let has_leaves = !leaves.is_empty();
    let entry = has_leaves.then(|| encode_pruned(&RecordsPruned::of(leaves, first_kept)));
    let revisions: Vec<_> = records.iter().map(|record| record.revision).collect();
    if has_leaves || !revisions.is_empty() {
        let removal = Removal { records, events, first_kept, entry };
        let Write { epoch, last_cycle_id, .. } = *noted;
        commit(store, Write { epoch, last_cycle_id, removal, ..Write::default() }).await;
    }
    revisions
}

/// The record of this revision, in a log that has only records.
fn old_record(revision: u64) -> OldRecord {
    let state = record(revision.max(1), Epoch(1)).state;
    OldRecord { revision: Revision(revision), leaf: revision.checked_sub(1), state }
}

/// The revisions of these records, all of which are readable.
pub(super) fn revisions(records: &[Found]) -> Vec<u64> {
    let revision = |record: &Record| {
        assert_eq!(*record, record_of(record.cycle_id.0, record.revision.0, record.epoch));
        record.revision.0
    };
    records.iter().map(|found| revision(found.as_ref().unwrap())).collect()
}

/// Checks that the store refuses this write, and keeps no part of it.
pub(super) async fn refuses(store: &dyn Store, write: Write) {
    let size = store.size().await.unwrap().records;
    let refused = store.commit(Arc::new(write.clone())).await;
    assert!(matches!(refused, Err(StoreError::Defect { .. })), "{refused:?} to {write:?}");
    assert_eq!(store.size().await.unwrap().records, size, "{write:?}");
}

pub(super) const CHECKS: Checks = Checks { record: check, event: |_| Ok(()), control: decode_control };

/// An entry about a removal, as these tests encode it: numbers of eight bytes.
pub(super) fn encode_pruned(pruned: &RecordsPruned) -> Bytes {
    let ends = pruned.leaves.iter().flat_map(|leaves| [leaves.start, leaves.end]);
    ends.chain([pruned.first_kept]).flat_map(u64::to_be_bytes).collect()
}

fn decode_control(bytes: &[u8]) -> Result<Control, String> {
    if bytes == b"began" {
        return Ok(Control::Began { counts_anew: true, missing: Vec::new() });
    }
    let (numbers, rest) = bytes.as_chunks();
    let numbers: Vec<_> = numbers.iter().copied().map(u64::from_be_bytes).collect();
    match (numbers.as_chunks(), rest) {
        ((leaves, &[first_kept]), []) => {
            let leaves = leaves.iter().map(|&[start, end]| start..end).collect();
            Ok(Control::Pruned(RecordsPruned { leaves, first_kept }))
        }
        _ => Err("as scripted".into()),
    }
}

/// Bytes with this prefix stand for an unreadable record.
pub(super) fn check(record: &Record) -> Result<(), String> {
    if record.bytes.starts_with(b"unreadable") { Err("as scripted".into()) } else { Ok(()) }
}

// ---------------------------------------------------------------------------------------------------------------
// Every store

async fn written_cycles_are_read(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 12).await;
    assert_eq!(store.cycle(cycle_of(7)).await.unwrap(), Some(Ok(record(7, epoch))));
    assert_eq!(store.cycle(CycleId(13)).await.unwrap(), None);
    let of_request = |id: &str, triggered_by| store.cycle_of_request(request(id, triggered_by));
    assert_eq!(of_request("five", None).await.unwrap(), Some(Ok(record(5, epoch))));
    assert_eq!(of_request("five", Some(Identity::Uid(10))).await.unwrap(), Some(Ok(record(10, epoch))));
    assert_eq!(of_request("five", Some(Identity::Uid(11))).await.unwrap(), None);
    assert_eq!(of_request("six", None).await.unwrap(), None);
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
    let latest = store.cycle_of_request(request("twice", None)).await.unwrap().unwrap().unwrap();
    assert_eq!(latest.cycle_id, CycleId(1), "the record with the highest revision");
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

async fn pages_neither_skip_nor_repeat_records_while_others_are_added(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 7).await;
    let (mut before, mut last, mut seen) = (Some(Revision(8)), 7, Vec::new());
    while let Some(below) = before {
        let page = store.cycles_before(below, Filter::default(), PageLimits { records: 2, ..ALL }).await.unwrap();
        seen.extend(revisions(&page.records));
        before = page.next;
        // Each time, a record with a lower id than the last one, and a record with a higher id.
        commit(store, recorded(last + 1..=last + 2, epoch)).await;
        last += 2;
    }
    assert_eq!(seen, [7, 6, 5, 4, 3, 2, 1]);
}

async fn a_second_takeover_reads_everything_and_fences_the_earlier_epoch(store: &dyn Store, epoch: Epoch) {
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

    let contents = store.take_over(seals()).await.unwrap();
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
        is_sealed: true,
        ..Contents::default()
    };
    assert_eq!(contents, expected);
    let write = |epoch| Write { records: vec![record_of(3, 3, epoch)], ..recorded(3..=3, epoch) };
    let fenced = store.commit(Arc::new(write(epoch))).await;
    assert_eq!(fenced, Err(StoreError::Fenced { by: contents.epoch }));
    let write = Write { last_cycle_id: CycleId(3), open: Vec::new(), ..write(contents.epoch) };
    commit(store, write).await;
    assert_eq!(store.take_over(seals()).await.unwrap().open, []);
}

/// Only for stores that were not taken over.
async fn can_be_read_but_not_written(store: &dyn Store) {
    let write = Write { epoch: Epoch(1), ..recorded(1..=1, Epoch(1)) };
    for epoch in [Epoch(0), Epoch(1)] {
        let refused = store.commit(Arc::new(Write { epoch, ..write.clone() })).await;
        assert!(matches!(refused, Err(StoreError::Defect { .. })), "{refused:?}");
    }
    let refused = store.excess(Retention::default(), at(0), 1).await;
    assert!(matches!(refused, Err(StoreError::Defect { .. })), "{refused:?}");
    assert_eq!(store.cycle(CycleId(1)).await.unwrap(), None);
    assert_eq!(store.cycles_after(Revision(0), ALL).await.unwrap(), []);
    assert_eq!(store.cycles_before(Revision(9), Filter::default(), ALL).await.unwrap().records, []);
    assert_eq!(store.size().await.unwrap().records, 0);
    let epoch = store.take_over(seals()).await.unwrap().epoch;
    filled(store, epoch, 1).await;
}

async fn another_epoch_is_fenced(store: &dyn Store, epoch: Epoch) {
    let write = Write { epoch: Epoch(epoch.0 + 1), ..recorded(1..=1, epoch) };
    assert!(matches!(store.commit(Arc::new(write)).await, Err(StoreError::Fenced { .. })));
    assert_eq!(store.cycle(cycle_of(1)).await.unwrap(), None);
}

async fn pages_go_from_the_newest_record_to_the_oldest(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 12).await;
    let page = async |before: u64, filter: Filter, limits: PageLimits| {
        let page = store.cycles_before(Revision(before), filter, limits).await.unwrap();
        (revisions(&page.records), page.next.map(|next| next.0))
    };
    let three = PageLimits { records: 3, ..ALL };
    assert_eq!(page(u64::MAX >> 1, Filter::default(), three).await, (vec![12, 11, 10], Some(10)));
    assert_eq!(page(3, Filter::default(), three).await, (vec![2, 1], None));
    assert_eq!(page(4, Filter::default(), three).await, (vec![3, 2, 1], None));
    for bytes in [200, 250] {
        assert_eq!(page(100, Filter::default(), PageLimits { bytes, ..ALL }).await, (vec![12, 11], Some(11)));
    }
    assert_eq!(page(100, Filter::default(), PageLimits { bytes: 1, ..ALL }).await, (vec![12], Some(12)));

    let failed = Filter { states: vec![CycleState::Failed], ..Filter::default() };
    assert_eq!(page(100, failed.clone(), ALL).await, (vec![12, 9, 6, 3], None));
    assert_eq!(page(100, failed, PageLimits { records: 2, ..ALL }).await, (vec![12, 9], Some(7)));
    let of_loop = Filter { loop_name: Some(name("l")), trigger: Some(TriggerKind::Loop), ..Filter::default() };
    assert_eq!(page(7, of_loop, ALL).await, (vec![6, 4, 2], None));
    let of_request = Filter { request_id: Some("five".into()), ..Filter::default() };
    assert_eq!(page(100, of_request.clone(), ALL).await, (vec![10, 5], None));
    assert_eq!(page(100, of_request.clone(), PageLimits { records: 1, ..ALL }).await, (vec![10], Some(6)));
    assert_eq!(page(6, of_request.clone(), ALL).await, (vec![5], None));
    let and_loop = Filter { loop_name: Some(name("l")), ..of_request };
    assert_eq!(page(100, and_loop, ALL).await, (vec![10], None));
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

async fn records_after_a_revision_go_up(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 5).await;
    let after = async |revision: u64, limits| store.cycles_after(Revision(revision), limits).await;
    assert_eq!(revisions(&after(0, ALL).await.unwrap()), [1, 2, 3, 4, 5]);
    assert_eq!(revisions(&after(3, ALL).await.unwrap()), [4, 5]);
    assert_eq!(revisions(&after(5, ALL).await.unwrap()), Vec::<u64>::new());
    assert_eq!(revisions(&after(1, PageLimits { records: 2, ..ALL }).await.unwrap()), [2, 3]);
    assert_eq!(revisions(&after(1, PageLimits { bytes: 200, ..ALL }).await.unwrap()), [2, 3]);
    assert_eq!(revisions(&after(1, PageLimits { bytes: 1, ..ALL }).await.unwrap()), [2]);
    let oldest_and_newest =
        |oldest, newest| Err(ResumeError::NotRetained { oldest: Revision(oldest), newest: Revision(newest) });
    assert_eq!(after(6, ALL).await, oldest_and_newest(1, 5));

    let newest_three =
        Retention { default: RetentionRule { max_cycles: Some(3), max_age: None }, ..Retention::default() };
    assert_eq!(pruned(store, &recorded(1..=5, epoch), newest_three, at(0), 100).await, revisions_of(1..=2));
    assert_eq!(after(1, ALL).await, oldest_and_newest(3, 5));
    assert_eq!(revisions(&after(2, ALL).await.unwrap()), [3, 4, 5]);
}

async fn the_size_grows_and_the_number_of_records_falls_again(store: &dyn Store, epoch: Epoch) {
    let empty = store.size().await.unwrap();
    assert_eq!(empty.records, 0);
    filled(store, epoch, 30).await;
    let full = store.size().await.unwrap();
    assert_eq!(full.records, 30);
    assert!(full.bytes >= empty.bytes + 3000, "{full:?} after {empty:?}");
    let newest = Retention { default: RetentionRule { max_cycles: Some(1), max_age: None }, ..Retention::default() };
    pruned(store, &recorded(1..=30, epoch), newest, at(0), 100).await;
    assert_eq!(store.size().await.unwrap().records, 1);
}

async fn retention_applies_number_age_and_state(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 30).await;
    let all = async || revisions(&store.cycles_before(Revision(100), Filter::default(), ALL).await.unwrap().records);
    let rule =
        |max_cycles, seconds: Option<u64>| RetentionRule { max_cycles, max_age: seconds.map(Duration::from_secs) };
    let noted = recorded(1..=30, epoch);
    let prune = async |retention, limit| pruned(store, &noted, retention, at(30), limit).await.len();
    let everything = Retention::default();
    assert_eq!(prune(everything, 100).await, 0);
    // 20 succeeded and 10 failed; failed cycles are kept longer.
    let by_state = BTreeMap::from([(CycleState::Failed, rule(Some(9), None))]);
    let mixed = Retention { default: rule(Some(5), None), by_state, ..Retention::default() };
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

async fn the_newest_record_stays_until_there_is_another_one(store: &dyn Store, epoch: Epoch) {
    let none = Retention { default: RetentionRule { max_cycles: Some(0), max_age: None }, ..Retention::default() };
    commit(store, recorded(1..=1, epoch)).await;
    assert_eq!(pruned(store, &recorded(1..=1, epoch), none.clone(), at(0), 100).await, []);
    commit(store, recorded(2..=2, epoch)).await;
    assert_eq!(pruned(store, &recorded(2..=2, epoch), none, at(0), 100).await, [Revision(1)]);
}

async fn retention_removes_low_revisions_first_and_never_the_highest(store: &dyn Store, epoch: Epoch) {
    let open = (1..=4).map(open_cycle).collect();
    commit(store, Write { epoch, last_cycle_id: CycleId(4), open, ..Write::default() }).await;
    let records = (1..).zip([4, 3, 2, 1]).map(|(revision, id)| record_of(id, revision, epoch)).collect();
    commit(store, Write { epoch, last_cycle_id: CycleId(4), records, ..Write::default() }).await;
    let left = async || revisions(&store.cycles_before(Revision(100), Filter::default(), ALL).await.unwrap().records);
    let keep = |max_cycles| Retention { default: RetentionRule { max_cycles, max_age: None }, ..Retention::default() };
    let noted = Write { epoch, last_cycle_id: CycleId(4), ..Write::default() };
    assert_eq!(pruned(store, &noted, keep(Some(1)), at(0), 2).await, revisions_of(1..=2));
    assert_eq!(left().await, [4, 3]);
    pruned(store, &noted, keep(Some(0)), at(0), 100).await;
    assert_eq!(left().await, [4]);
    assert_eq!(store.cycle(CycleId(1)).await.unwrap(), Some(Ok(record_of(1, 4, epoch))));
    assert_eq!(store.cycle(CycleId(4)).await.unwrap(), None);
    refuses(
        store,
        Write { epoch, last_cycle_id: CycleId(4), records: vec![record_of(4, 5, epoch)], ..Write::default() },
    )
    .await;
}

async fn the_log_keeps_what_proofs_of_the_rest_need(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 20).await;
    let extent = || (store.log().frontier.size(), store.log().first_kept);
    let leaf = async |revision| store.leaf(cycle_of(revision)).await.unwrap();
    let hash = |revision| Entry::Cycle(&record(revision, epoch).bytes).leaf();
    assert_eq!(extent(), (20, 0));
    assert_eq!((leaf(1).await, leaf(18).await, leaf(21).await), (Some(0), Some(17), None));
    let nodes = [0, 17].map(Node::of_leaf).to_vec();
    assert_eq!(store.nodes(nodes).await.unwrap(), Some(vec![hash(1), hash(18)]));

    let three = Retention { default: RetentionRule { max_cycles: Some(3), max_age: None }, ..Retention::default() };
    pruned(store, &recorded(1..=20, epoch), three, at(0), 100).await;
    assert_eq!(extent(), (21, 17), "the removal has an entry as well");
    assert_eq!((leaf(17).await, leaf(18).await), (None, Some(17)));
    let needed: Vec<_> = Frontier::nodes(17).into_iter().chain((17..21).map(Node::of_leaf)).collect();
    assert!(store.nodes(needed).await.unwrap().is_some());
    assert_eq!(store.nodes(vec![Node::of_leaf(15)]).await.unwrap(), None);
}

async fn audit_events_are_leaves_between_records_and_removals(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 4).await;
    let write = |events: &[u8], removal| Write {
        epoch,
        last_cycle_id: CycleId(4),
        audit: events.iter().copied().map(event).collect(),
        removal,
        ..Write::default()
    };
    let removal = Removal {
        records: vec![old_record(1)],
        events: Vec::new(),
        first_kept: 1,
        entry: Some(Bytes::from_static(b"pruned")),
    };
    commit(store, write(&[1, 2], removal)).await;
    commit(store, Write { audit: vec![event(3)], ..recorded(5..=6, epoch) }).await;
    let record = |revision| record(revision, epoch).bytes;
    let entries = [
        Entry::Cycle(&record(4)).leaf(),
        Entry::Audit(&event(1).bytes).leaf(),
        Entry::Audit(&event(2).bytes).leaf(),
        Entry::Control(b"pruned").leaf(),
        Entry::Cycle(&record(5)).leaf(),
        Entry::Cycle(&record(6)).leaf(),
        Entry::Audit(&event(3).bytes).leaf(),
    ];
    let leaves = (3..10).map(Node::of_leaf).collect();
    assert_eq!(store.nodes(leaves).await.unwrap(), Some(entries.to_vec()));
    assert_eq!(store.log().frontier.size(), 10);

    // The first event is kept, and so are the hashes from it on.
    let one = Retention { default: RetentionRule { max_cycles: Some(1), max_age: None }, ..Retention::default() };
    pruned(store, &recorded(1..=6, epoch), one, at(0), 100).await;
    assert_eq!(store.log().first_kept, 4);
}

async fn an_old_event_keeps_few_hashes_of_what_was_removed_after_it(store: &dyn Store, epoch: Epoch) {
    const RECORDS: u64 = 1000;
    commit(store, Write { audit: vec![event(1)], ..recorded(1..=1, epoch) }).await;
    commit(store, recorded(2..=RECORDS, epoch)).await;
    let one = Retention { default: RetentionRule { max_cycles: Some(1), max_age: None }, ..Retention::default() };
    // In parts, as retention does it.
    for _ in 0..10 {
        pruned(store, &recorded(1..=RECORDS, epoch), one.clone(), at(0), 100).await;
    }
    let (leaf, Log { frontier, first_kept }) = (1, store.log());
    assert_eq!(first_kept, leaf);
    let mut kept = Vec::new();
    for leaf in 0..frontier.size() {
        if store.nodes(vec![Node::of_leaf(leaf)]).await.unwrap().is_some() {
            kept.push(leaf);
        }
    }
    // The event and the leaf beside it; the last record and the removals.
    assert_eq!(kept, [vec![0, 1], (RECORDS..frontier.size()).collect()].concat());
    let path = Path::of_inclusion(leaf, frontier.size());
    let proof = Inclusion(path.hashes(&store.nodes(path.nodes()).await.unwrap().unwrap()));
    let hash = Entry::Audit(&event(1).bytes).leaf();
    assert_eq!(proof.verify(leaf, hash, frontier.size(), frontier.root()), Ok(()));
    // Once the event is gone as well, only what the last record needs is left.
    let nothing = Retention { events: EventRule { max_events: Some(0), max_age: None }, ..one };
    pruned(store, &recorded(1..=RECORDS, epoch), nothing, at(0), 100).await;
    assert_eq!(store.nodes(vec![Node::of_leaf(1)]).await.unwrap(), None);
}

async fn audit_events_are_listed_from_the_newest_and_removed_by_number_and_age(store: &dyn Store, epoch: Epoch) {
    // The leaves 0 and 1 are records, 2 to 11 are the events 1 to 10.
    commit(store, Write { audit: (1..=10).map(event).collect(), ..recorded(1..=2, epoch) }).await;
    let list = async |before, filter, limit| {
        let page = store.events_before(before, filter, limit).await.unwrap();
        let number = |found: FoundEvent| {
            let LoggedEvent { leaf, entry } = found.unwrap();
            assert_eq!(entry, event(entry.bytes[0]));
            assert_eq!(leaf, u64::from(entry.bytes[0]) + 1);
            entry.bytes[0]
        };
        (page.events.into_iter().map(number).collect::<Vec<_>>(), page.next)
    };
    let all = EventFilter::default;
    assert_eq!(list(1000, all(), 4).await, (vec![10, 9, 8, 7], Some(8)));
    assert_eq!(list(8, all(), 4).await, (vec![6, 5, 4, 3], Some(4)));
    assert_eq!(list(4, all(), 4).await, (vec![2, 1], None));
    assert_eq!(list(1000, EventFilter { since: Some(at(8)), ..all() }, 9).await, (vec![10, 9, 8], None));
    let caller = Some("token:1".into());
    assert_eq!(list(1000, EventFilter { caller, ..all() }, 3).await, (vec![9, 7, 5], Some(5)));
    assert_eq!(list(1000, EventFilter { denied: true, ..all() }, 9).await, (vec![9, 6, 3], None));
    assert_eq!(list(1000, EventFilter { rpc: Some("GetCycle".into()), ..all() }, 9).await, (vec![], None));

    let keep = |max_events, seconds: Option<u64>| Retention {
        events: EventRule { max_events, max_age: seconds.map(Duration::from_secs) },
        ..Retention::default()
    };
    let noted = recorded(1..=2, epoch);
    for (retention, limit, left) in [
        (keep(None, None), 100, 10),
        (keep(Some(8), None), 100, 8),
        (keep(Some(2), None), 3, 5),
        (keep(None, Some(2)), 100, 2),
        (keep(Some(0), None), 100, 0),
    ] {
        pruned(store, &noted, retention, at(10), limit).await;
        assert_eq!(list(1000, all(), 100).await.0, (11 - left..=10).rev().collect::<Vec<_>>());
    }
    assert_eq!(store.log().first_kept, 0, "the first record is kept");
    let refused = |events: &[u64]| {
        let entry = Some(Bytes::from_static(b"pruned"));
        let events = events.iter().map(|leaf| OldEvent { leaf: *leaf, kind: EventKind::Change }).collect();
        let removal = Removal { events, entry, ..Removal::default() };
        Write { epoch, last_cycle_id: CycleId(2), removal, ..Write::default() }
    };
    for events in [&[3, 2][..], &[3, 3], &[1000]] {
        refuses(store, refused(events)).await;
    }
}

async fn events_of_one_kind_push_out_no_others(store: &dyn Store, epoch: Epoch) {
    let of_kind = |number: u8| {
        let kind = if number <= 4 { EventKind::Change } else { EventKind::Denials };
        AuditEntry { kind, ..event(number) }
    };
    // The leaf 0 is a record, 1 to 4 are changes, 5 to 20 denials.
    commit(store, Write { audit: (1..=20).map(of_kind).collect(), ..recorded(1..=1, epoch) }).await;
    commit(store, recorded(2..=2, epoch)).await;
    let three = Retention {
        default: RetentionRule { max_cycles: Some(1), max_age: None },
        events: EventRule { max_events: Some(3), max_age: None },
        ..Retention::default()
    };
    let left = async |kind| {
        let filter = EventFilter { kind, ..EventFilter::default() };
        let page = store.events_before(1000, filter, 100).await.unwrap();
        page.events.into_iter().map(|found| found.unwrap().leaf).collect::<Vec<_>>()
    };
    // In parts, of which each removes the oldest ones.
    for expected in [[20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 4, 3, 2].as_slice(), &[20, 19, 18, 4, 3, 2]] {
        pruned(store, &recorded(1..=2, epoch), three.clone(), at(0), 8).await;
        assert_eq!(left(None).await, expected);
    }
    assert_eq!(left(Some(EventKind::Denials)).await, [20, 19, 18]);
    assert_eq!(left(Some(EventKind::Calls)).await, Vec::<u64>::new());
    assert_eq!(store.log().first_kept, 2);
    let young = EventRule { max_events: None, max_age: Some(Duration::from_secs(1)) };
    let young = Retention { events: young, ..Retention::default() };
    pruned(store, &recorded(1..=2, epoch), young, at(19), 100).await;
    assert_eq!(left(None).await, [20, 19]);
}

async fn the_log_is_read_in_parts_that_have_its_root(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 20).await;
    // The leaves 20 and 21 are records, 22 to 24 are events, and 25 is the entry of the removal.
    commit(store, Write { audit: (1..=3).map(event).collect(), ..recorded(21..=22, epoch) }).await;
    let two = Retention { default: RetentionRule { max_cycles: Some(2), max_age: None }, ..Retention::default() };
    pruned(store, &recorded(1..=22, epoch), two, at(0), 100).await;
    let read = async |mut leaves: Range<u64>, limits: PageLimits| {
        let mut parts = Vec::new();
        while !leaves.is_empty() {
            let page = store.parts(leaves.clone(), limits).await.unwrap().unwrap();
            assert!(!page.is_empty() && page.len() <= limits.records);
            leaves.start = page.last().unwrap().subtree.leaves().end;
            parts.extend(page);
        }
        parts
    };
    let whole = read(0..26, ALL).await;
    let expected = [
        Entry::Cycle(&record(21, epoch).bytes).to_bytes(),
        Entry::Cycle(&record(22, epoch).bytes).to_bytes(),
        Entry::Audit(&event(1).bytes).to_bytes(),
        Entry::Audit(&event(2).bytes).to_bytes(),
        Entry::Audit(&event(3).bytes).to_bytes(),
        Entry::Control(&encode_pruned(&RecordsPruned::of(0..20, 20))).to_bytes(),
    ];
    let expected: Vec<_> = (20..).zip(expected).map(|(leaf, entry)| Part::entry(leaf, entry.into())).collect();
    assert_eq!(whole[2..], expected);
    // What is gone is two complete subtrees.
    assert_eq!(whole[..2].iter().map(|part| part.subtree.leaves()).collect::<Vec<_>>(), [0..16, 16..20]);
    let log = store.log().frontier;
    let checkpoint = Checkpoint { origin: "log".into(), size: log.size(), root: log.root() };
    let mut verifier = LogVerifier::new(checkpoint, None).unwrap();
    for part in &whole {
        verifier.add(part).unwrap();
    }
    verifier.end().unwrap();

    for limits in [PageLimits { records: 1, ..ALL }, PageLimits { records: 3, ..ALL }, PageLimits { bytes: 1, ..ALL }] {
        assert_eq!(read(0..26, limits).await, whole);
        assert_eq!(read(20..24, limits).await, whole[2..6]);
    }
    // These begin or end inside of what is gone.
    for leaves in [0..15, 17..26] {
        assert_eq!(store.parts(leaves, ALL).await.unwrap(), None);
    }
}

async fn removals_are_in_order_and_leave_the_newest_record(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 6).await;
    let removing = |revisions: &[u64], first_kept| {
        let records = revisions.iter().map(|revision| old_record(*revision)).collect();
        let removal = Removal { records, events: Vec::new(), first_kept, entry: Some(Bytes::from_static(b"pruned")) };
        Write { epoch, last_cycle_id: CycleId(6), removal, ..Write::default() }
    };
    for (revisions, first_kept) in [(&[2, 1][..], 2), (&[1, 1], 1), (&[0], 0), (&[6], 0), (&[1, 7], 1), (&[1], 7)] {
        refuses(store, removing(revisions, first_kept)).await;
    }
    commit(store, removing(&[1, 2, 3], 3)).await;
    refuses(store, removing(&[4], 2)).await;
    commit(store, removing(&[4], 3)).await;
    commit(store, removing(&[5], 5)).await;
    assert_eq!(revisions(&store.cycles_after(Revision(5), ALL).await.unwrap()), [6]);
}

async fn a_new_name_gets_the_output_of_the_former_one_and_leaves_nothing_of_it(store: &dyn Store, epoch: Epoch) {
    let outputs = |names: &[&str], cycle_id| names.iter().map(|of| (name(of), output(cycle_id, of))).collect();
    let write = Write {
        outputs: outputs(&["a", "b", "c"], 1),
        subsystems: [stored_subsystem("a"), stored_subsystem("b")].into(),
        ..recorded(1..=2, epoch)
    };
    commit(store, write).await;
    // An output that comes with the same write is moved as well, also in place of another one.
    let write = Write {
        epoch,
        last_cycle_id: CycleId(2),
        outputs: outputs(&["b"], 2),
        renamed: [("a", "x"), ("b", "c"), ("d", "y")].map(|(former, to)| (name(former), name(to))).into(),
        subsystems: [stored_subsystem("x")].into(),
        ..Write::default()
    };
    commit(store, write).await;
    let contents = store.take_over(seals()).await.unwrap();
    assert_eq!(contents.subsystems, [(*stored_subsystem("x").1.unwrap()).clone()]);
    let made = |of: &str, cycle_id, by: &str| (name(of), output(cycle_id, by));
    let kept: Vec<_> = contents.outputs.into_iter().map(|stored| (stored.name, stored.output)).collect();
    assert_eq!(kept, [made("c", 2, "b"), made("x", 1, "a")]);
}

async fn the_first_commit_under_another_key_leaves_no_row_that_the_earlier_one_has_sealed(
    store: &dyn Store,
    epoch: Epoch,
) {
    let names = ["a", "b", "c"];
    let write = Write {
        open: vec![open_cycle(3), open_cycle(4)],
        last_cycle_id: CycleId(4),
        outputs: names.map(|of| (name(of), output(1, of))).into(),
        subsystems: names.map(stored_subsystem).into(),
        ..recorded(1..=2, epoch)
    };
    commit(store, write).await;
    let epoch = store.take_over(Seals::Checked(keys_of([8, 7]))).await.unwrap().epoch;
    // `b` changes, and its output does not.
    let write = Write {
        epoch,
        last_cycle_id: CycleId(4),
        records: vec![record_of(4, 3, epoch)],
        renamed: [(name("a"), name("x"))].into(),
        subsystems: [stored_subsystem("x"), stored_subsystem("b")].into(),
        ..Write::default()
    };
    commit(store, write).await;
    let contents = store.take_over(Seals::Checked(keys_of([8]))).await.unwrap();
    assert_eq!(contents.open, [open_cycle(3)]);
    let subsystems: Vec<_> = contents.subsystems.into_iter().map(|stored| stored.name).collect();
    let outputs: Vec<_> = contents.outputs.into_iter().map(|stored| (stored.name, stored.output)).collect();
    assert_eq!(subsystems, ["b", "c", "x"].map(name));
    assert_eq!(outputs, [("b", "b"), ("c", "c"), ("x", "a")].map(|(of, by)| (name(of), output(1, by))));
}

async fn a_cycle_of_a_parent_is_one_while_it_is_open_and_in_the_history(store: &dyn Store, epoch: Epoch) {
    let parent = ParentCycle::parse("hub/eu/1/2").unwrap();
    let (trigger, request_id) = (Trigger::Parent(parent.clone()), Some(parent.to_string()));
    let open = OpenCycle { trigger: trigger.clone(), request_id: request_id.clone(), ..open_cycle(3) };
    commit(store, Write { open: vec![open.clone()], last_cycle_id: CycleId(3), ..recorded(1..=2, epoch) }).await;
    let contents = store.take_over(seals()).await.unwrap();
    assert_eq!(contents.open, [open]);
    let record = Record { trigger, request_id, ..record_of(3, 3, contents.epoch) };
    let records = vec![record.clone()];
    commit(store, Write { epoch: contents.epoch, last_cycle_id: CycleId(3), records, ..Write::default() }).await;
    assert_eq!(store.cycle(CycleId(3)).await.unwrap(), Some(Ok(record.clone())));
    let filter = Filter { trigger: Some(TriggerKind::Parent), ..Filter::default() };
    let page = store.cycles_before(Revision(4), filter, ALL).await.unwrap();
    assert_eq!(page.records, [Ok(record)]);
}

async fn a_request_id_can_have_any_character(store: &dyn Store, epoch: Epoch) {
    let request_id = Some("\0a\u{10ffff}\0".to_owned());
    let open = OpenCycle { request_id: request_id.clone(), ..open_cycle(1) };
    commit(store, Write { epoch, last_cycle_id: CycleId(1), open: vec![open.clone()], ..Write::default() }).await;
    let contents = store.take_over(seals()).await.unwrap();
    assert_eq!((contents.open, contents.unreadable), (vec![open], Vec::new()));
    let (epoch, record) = (contents.epoch, Record { request_id, ..record_of(1, 1, epoch) });
    let records = vec![record.clone()];
    commit(store, Write { epoch, last_cycle_id: CycleId(1), records, ..Write::default() }).await;
    let found = store.cycle_of_request(request("\0a\u{10ffff}\0", record.triggered_by.clone())).await.unwrap();
    assert_eq!(found, Some(Ok(record)));
}

async fn one_write_can_have_ten_thousand_outputs(store: &dyn Store, epoch: Epoch) {
    let outputs = || (0..10_000).map(|number| (name(&format!("s{number}")), output(1, "o"))).collect();
    commit(store, Write { outputs: outputs(), ..recorded(1..=2, epoch) }).await;
    commit(store, Write { outputs: outputs(), ..recorded(3..=4, epoch) }).await;
    assert_eq!(store.take_over(seals()).await.unwrap().outputs.len(), 10_000);
}

/// The URL of a new store in PostgreSQL, if that is installed.
fn postgres_url() -> Option<StoreUrl> {
    Some(StoreUrl::parse(&super::postgres::tests::server::shared()?.url()).unwrap())
}

/// The URL of a new store in PostgreSQL behind a pooler, if both are installed.
fn pooled_url() -> Option<StoreUrl> {
    let (server, pooler) =
        (super::postgres::tests::server::shared()?, super::postgres::tests::server::shared_pooler()?);
    Some(StoreUrl::parse(&pooler.url(&server.url())).unwrap())
}

/// The store at this URL, which is new, and the epoch for which it was taken over.
async fn opened(url: &StoreUrl) -> (Arc<dyn Store>, Epoch) {
    let store = open(url, CHECKS, Clock::system()).await.unwrap();
    let epoch = store.take_over(seals()).await.unwrap().epoch;
    (store, epoch)
}

/// Statements that take turns in being slow, and never fail: their answers may be lost.
#[cfg(feature = "simulation")]
fn fates() -> super::Fates {
    let mut statements = 0_u64;
    Box::new(move |_| {
        statements += 1;
        let fate = super::Fate { travels: Duration::from_millis(statements % 3), ..super::Fate::default() };
        // The outcome of such a one is found out: it was executed.
        let lost = statements.is_multiple_of(5).then(|| fate.travels + Duration::from_millis(1));
        super::Fate { lost_after: lost, ..fate }
    })
}

macro_rules! every_store {
    ($($test:ident)+) => {
        mod memory {
            $(#[tokio::test]
            async fn $test() {
                let (store, epoch) = super::opened(&super::StoreUrl::Memory).await;
                super::$test(&*store, epoch).await;
            })+
        }

        mod postgres {
            $(#[tokio::test]
            async fn $test() {
                let Some(url) = super::postgres_url() else { return };
                let (store, epoch) = super::opened(&url).await;
                super::$test(&*store, epoch).await;
            })+
        }

        mod postgres_of_a_later_version {
            $(#[tokio::test]
            async fn $test() {
                let Some(url) = super::postgres_url() else { return };
                super::super::postgres::tests::widen(&url).await;
                let (store, epoch) = super::opened(&url).await;
                super::$test(&*store, epoch).await;
            })+
        }

        mod pooled {
            $(#[tokio::test]
            async fn $test() {
                let Some(url) = super::pooled_url() else { return };
                let (store, epoch) = super::opened(&url).await;
                super::$test(&*store, epoch).await;
            })+
        }

        #[cfg(feature = "simulation")]
        mod simulated {
            $(#[tokio::test(start_paused = true)]
            async fn $test() {
                let database = super::super::SimulatedDatabase::new(true);
                let store = database.open(super::Clock::system(), super::fates());
                let epoch = store.take_over(super::seals()).await.unwrap().epoch;
                super::$test(&*store, epoch).await;
            })+
        }

        mod sqlite {
            $(#[tokio::test]
            async fn $test() {
                let directory = tempfile::tempdir().unwrap();
                let url = super::StoreUrl::Sqlite(directory.path().join("o.db"));
                let (store, epoch) = super::opened(&url).await;
                super::$test(&*store, epoch).await;
            })+
        }
    };
}

every_store! {
    written_cycles_are_read
    revisions_follow_each_other
    records_come_in_any_order_of_their_ids
    a_cycle_can_be_noted_and_recorded_in_one_write
    ids_are_noted_completely_and_never_taken_back
    only_an_open_cycle_is_recorded
    a_record_leaves_other_open_cycles_open
    a_second_takeover_reads_everything_and_fences_the_earlier_epoch
    a_new_name_gets_the_output_of_the_former_one_and_leaves_nothing_of_it
    the_first_commit_under_another_key_leaves_no_row_that_the_earlier_one_has_sealed
    a_cycle_of_a_parent_is_one_while_it_is_open_and_in_the_history
    another_epoch_is_fenced
    pages_go_from_the_newest_record_to_the_oldest
    pages_neither_skip_nor_repeat_records_while_others_are_added
    a_page_does_not_read_everything
    records_after_a_revision_go_up
    the_size_grows_and_the_number_of_records_falls_again
    retention_applies_number_age_and_state
    the_newest_record_stays_until_there_is_another_one
    retention_removes_low_revisions_first_and_never_the_highest
    removals_are_in_order_and_leave_the_newest_record
    the_log_keeps_what_proofs_of_the_rest_need
    the_log_is_read_in_parts_that_have_its_root
    audit_events_are_leaves_between_records_and_removals
    an_old_event_keeps_few_hashes_of_what_was_removed_after_it
    audit_events_are_listed_from_the_newest_and_removed_by_number_and_age
    events_of_one_kind_push_out_no_others
    a_request_id_can_have_any_character
    one_write_can_have_ten_thousand_outputs
}

#[tokio::test]
async fn a_store_can_be_read_but_not_written_before_the_takeover() {
    can_be_read_but_not_written(&*open(&StoreUrl::Memory, CHECKS, Clock::system()).await.unwrap()).await;
    let directory = tempfile::tempdir().unwrap();
    let url = StoreUrl::Sqlite(directory.path().join("o.db"));
    can_be_read_but_not_written(&*open(&url, CHECKS, Clock::system()).await.unwrap()).await;
    if let Some(url) = postgres_url() {
        can_be_read_but_not_written(&*open(&url, CHECKS, Clock::system()).await.unwrap()).await;
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Random steps

/// An action of a process on a store.
#[derive(Clone, Debug)]
enum Step {
    /// This number of cycles is admitted.
    Admit(u64),
    /// One of the open cycles starts.
    Begin(usize),
    /// Open cycles are recorded, picked in this order, and then this number of newly admitted ones.
    Record(Vec<usize>, u64),
    /// A write that no process may make: one of [`Model::defects`].
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

/// The expected state of a store beside its records.
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

    /// The write of a step.
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

/// Takes these steps with a store and with memory, and compares all results.
fn agrees_with_memory(open_again: impl AsyncFn() -> Arc<dyn Store>, steps: Vec<(Step, u64, usize)>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let memory = open(&StoreUrl::Memory, CHECKS, Clock::system()).await.unwrap();
        let mut one = memory.take_over(seals()).await.unwrap();
        let mut store = open_again().await;
        let mut contents = store.take_over(seals()).await.unwrap();
        let mut model = Model::default();
        for (step, from, count) in steps {
            if let Some(write) = model.next(&step) {
                model.apply(&write);
                commit(&*memory, Write { epoch: one.epoch, ..write.clone() }).await;
                commit(&*store, Write { epoch: contents.epoch, ..write }).await;
            }
            match step {
                Step::Admit(_) | Step::Begin(_) | Step::Record(..) => {}
                Step::Break(way) => {
                    let mut defects = model.defects();
                    let defect = defects.swap_remove(way % defects.len());
                    refuses(&*memory, Write { epoch: one.epoch, ..defect.clone() }).await;
                    refuses(&*store, Write { epoch: contents.epoch, ..defect }).await;
                }
                Step::Prune { max_cycles, keeps_failed, limit } => {
                    let max_age = Some(Duration::from_secs(max_cycles + 5));
                    let default = RetentionRule { max_cycles: Some(max_cycles), max_age };
                    let failed = keeps_failed.then(|| (CycleState::Failed, RetentionRule::default()));
                    let by_state = failed.into_iter().collect();
                    let retention = Retention { default, by_state, ..Retention::default() };
                    let now = at(i64::try_from(model.last_revision).unwrap());
                    let noted = |epoch| Write { epoch, ..model.write() };
                    let gone = pruned(&*memory, &noted(one.epoch), retention.clone(), now, limit).await;
                    assert_eq!(pruned(&*store, &noted(contents.epoch), retention, now, limit).await, gone);
                }
                Step::Restart => {
                    drop(store);
                    store = open_again().await;
                    contents = store.take_over(seals()).await.unwrap();
                    one = memory.take_over(seals()).await.unwrap();
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
                assert_eq!(store.cycles_before(Revision(from), filter, limits).await, page);
            }
            let after = memory.cycles_after(Revision(from), limits).await;
            assert_eq!(store.cycles_after(Revision(from), limits).await, after);
            assert_eq!(store.cycle(CycleId(from)).await, memory.cycle(CycleId(from)).await);
            for triggered_by in [None, Some(Identity::Uid(10))] {
                let five = request("five", triggered_by);
                let of_request = memory.cycle_of_request(five.clone()).await;
                assert_eq!(store.cycle_of_request(five).await, of_request);
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// For any writes, refusals, removals and reads, and any order in which cycles end, SQLite gives the results of
    /// memory. After a restart it finds the open cycles.
    #[test]
    fn sqlite_agrees_with_memory(steps in proptest::collection::vec((step(), 1..30_u64, 1..6_usize), 1..30)) {
        let directory = tempfile::tempdir().unwrap();
        let url = StoreUrl::Sqlite(directory.path().join("o.db"));
        agrees_with_memory(async || open(&url, CHECKS, Clock::system()).await.unwrap(), steps);
    }

    /// The same for PostgreSQL.
    #[test]
    fn postgres_agrees_with_memory(steps in proptest::collection::vec((step(), 1..30_u64, 1..6_usize), 1..30)) {
        if let Some(url) = postgres_url() {
            agrees_with_memory(async || open(&url, CHECKS, Clock::system()).await.unwrap(), steps);
        }
    }

    /// The same for PostgreSQL behind a pooler.
    #[test]
    fn pooled_postgres_agrees_with_memory(steps in proptest::collection::vec((step(), 1..30_u64, 1..6_usize), 1..30)) {
        if let Some(url) = pooled_url() {
            agrees_with_memory(async || open(&url, CHECKS, Clock::system()).await.unwrap(), steps);
        }
    }

    /// The same for the database of simulations.
    #[test]
    #[cfg(feature = "simulation")]
    fn a_simulated_database_agrees_with_memory(
        steps in proptest::collection::vec((step(), 1..30_u64, 1..6_usize), 1..30),
    ) {
        let database = super::SimulatedDatabase::new(true);
        agrees_with_memory(async || database.open(Clock::system(), fates()), steps);
    }
}
