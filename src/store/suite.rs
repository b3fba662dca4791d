//! What every store has to do, and what only one that outlives its process can.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use jiff::Timestamp;
use proptest::prelude::*;

use super::{StoreUrl, open};
use crate::{
    model::{
        CycleId, CycleState, Epoch, LoopSpec, LoopState, Name, Output, Payload, Revision, SubsystemSpec, TraceId,
        Trigger,
    },
    ports::{
        Contents, Durability, Filter, Found, Lost, OpenCycle, PageLimits, Record, Retention, RetentionRule, SCAN_LIMIT,
        Store, StoreError, StoredLoop, StoredOutput, StoredSubsystem, TriggerKind, Write,
    },
};

const ALL: PageLimits = PageLimits { records: usize::MAX, bytes: usize::MAX };

fn name(name: &str) -> Name {
    Name::parse(name).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn record(id: u64, epoch: Epoch) -> Record {
    Record {
        cycle_id: CycleId(id),
        revision: Revision(id),
        epoch,
        state: if id.is_multiple_of(3) { CycleState::Failed } else { CycleState::Succeeded },
        trigger: if id.is_multiple_of(2) { Trigger::Loop(name("l")) } else { Trigger::Manual },
        request_id: id.is_multiple_of(5).then(|| "five".to_owned()),
        finished_at: at(i64::try_from(id).unwrap()),
        bytes: vec![u8::try_from(id % 251).unwrap(); 100].into(),
    }
}

fn output(cycle_id: u64, text: &str) -> Output {
    let object = serde_json::json!({ "text": text });
    Output { cycle_id: CycleId(cycle_id), payload: Payload::from_json(object.as_object().unwrap()).unwrap() }
}

async fn commit(store: &dyn Store, write: Write) {
    store.commit(Arc::new(write)).await.unwrap();
}

/// A store with so many records.
async fn filled(store: &dyn Store, epoch: Epoch, records: u64) {
    let records = (1..=records).map(|id| record(id, epoch)).collect();
    commit(store, Write { epoch, records, ..Write::default() }).await;
}

fn ids(records: &[Found]) -> Vec<u64> {
    records.iter().map(|record| record.as_ref().unwrap().cycle_id.0).collect()
}

/// Bytes that begin so stand for a record that can't be read.
fn check(record: &Record) -> Result<(), String> {
    if record.bytes.starts_with(b"unreadable") { Err("as scripted".into()) } else { Ok(()) }
}

// ---------------------------------------------------------------------------------------------------------------
// Every store

async fn what_is_written_is_read(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 12).await;
    assert_eq!(store.cycle(CycleId(7)).await.unwrap(), Some(record(7, epoch)));
    assert_eq!(store.cycle(CycleId(13)).await.unwrap(), None);
    let of_request = |id: &str| store.cycle_of_request(id.to_owned());
    assert_eq!(of_request("five").await.unwrap(), Some(record(10, epoch)));
    assert_eq!(of_request("six").await.unwrap(), None);
}

async fn records_follow_each_other(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 3).await;
    for bad in [vec![3], vec![5], vec![4, 6]] {
        let records = bad.iter().map(|id| record(*id, epoch)).collect();
        let write = Write { epoch, records, outputs: vec![(name("a"), output(4, "x"))], ..Write::default() };
        assert!(store.commit(Arc::new(write)).await.is_err(), "{bad:?}");
    }
    commit(store, Write { epoch, records: vec![record(4, epoch)], ..Write::default() }).await;
}

async fn another_epoch_is_fenced(store: &dyn Store, epoch: Epoch) {
    let write = Write { epoch: Epoch(epoch.0 + 1), records: vec![record(1, epoch)], ..Write::default() };
    assert!(matches!(store.commit(Arc::new(write)).await, Err(StoreError::Fenced(_))));
    assert_eq!(store.cycle(CycleId(1)).await.unwrap(), None);
}

async fn pages_go_down(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 12).await;
    let page = async |before: u64, filter: Filter, limits: PageLimits| {
        let page = store.cycles_before(CycleId(before), filter, limits).await.unwrap();
        (ids(&page.records), page.next.map(|next| next.0))
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
    let page = store.cycles_before(CycleId(count + 1), none.clone(), ALL).await.unwrap();
    assert_eq!((page.records.len(), page.next), (0, Some(CycleId(11))));
    let rest = store.cycles_before(CycleId(11), none, ALL).await.unwrap();
    assert_eq!((rest.records.len(), rest.next), (0, None));
}

async fn revisions_go_up(store: &dyn Store, epoch: Epoch) {
    filled(store, epoch, 5).await;
    let after = async |revision: u64, limits| store.cycles_after(Revision(revision), limits).await;
    assert_eq!(ids(&after(0, ALL).await.unwrap()), [1, 2, 3, 4, 5]);
    assert_eq!(ids(&after(3, ALL).await.unwrap()), [4, 5]);
    assert_eq!(ids(&after(5, ALL).await.unwrap()), Vec::<u64>::new());
    assert_eq!(ids(&after(1, PageLimits { records: 2, ..ALL }).await.unwrap()), [2, 3]);
    assert_eq!(ids(&after(1, PageLimits { bytes: 1, ..ALL }).await.unwrap()), [2]);
    let oldest_and_newest =
        |oldest, newest| Err(StoreError::NotRetained { oldest: Revision(oldest), newest: Revision(newest) });
    assert_eq!(after(6, ALL).await, oldest_and_newest(1, 5));

    let newest_three =
        Retention { default: RetentionRule { max_cycles: Some(3), max_age: None }, ..Retention::default() };
    let pruned = store.prune(newest_three, at(0), 100).await.unwrap();
    assert_eq!((pruned.removed, pruned.pruned_to), (2, Revision(2)));
    assert_eq!(after(1, ALL).await, oldest_and_newest(3, 5));
    assert_eq!(ids(&after(2, ALL).await.unwrap()), [3, 4, 5]);
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
    let all = async || ids(&store.cycles_before(CycleId(100), Filter::default(), ALL).await.unwrap().records);
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

macro_rules! every_store {
    ($($test:ident)+) => {
        mod memory {
            $(#[tokio::test]
            async fn $test() {
                let (store, contents) = super::open(&super::StoreUrl::Memory, super::check).await.unwrap();
                super::$test(&*store, contents.epoch).await;
            })+
        }

        mod sqlite {
            $(#[tokio::test]
            async fn $test() {
                let directory = tempfile::tempdir().unwrap();
                let url = super::StoreUrl::Sqlite(directory.path().join("o.db"));
                let (store, contents) = super::open(&url, super::check).await.unwrap();
                super::$test(&*store, contents.epoch).await;
            })+
        }
    };
}

every_store! {
    what_is_written_is_read
    records_follow_each_other
    another_epoch_is_fenced
    pages_go_down
    a_page_does_not_read_everything
    revisions_go_up
    its_size_goes_up_and_its_records_down_again
    retention_counts_ages_and_distinguishes
}

// ---------------------------------------------------------------------------------------------------------------
// SQLite

async fn opened(path: &Path) -> (Arc<dyn Store>, Contents) {
    open(&StoreUrl::Sqlite(path.to_owned()), check).await.unwrap()
}

async fn refused(path: &Path) -> StoreError {
    open(&StoreUrl::Sqlite(path.to_owned()), check).await.err().unwrap()
}

fn stored_subsystem(name: &str) -> (Name, Option<StoredSubsystem>) {
    let spec = SubsystemSpec { name: name.into(), endpoint: "http://h:1".into(), ..SubsystemSpec::default() };
    let name = self::name(name);
    let lease = Some(Duration::from_millis(1500));
    (name.clone(), Some(StoredSubsystem { spec: Some(spec), lease, suspended: true, name }))
}

fn open_cycle(id: u64) -> OpenCycle {
    OpenCycle {
        cycle_id: CycleId(id),
        trigger: Trigger::Loop(name("l")),
        scheduled_at: at(1),
        started_at: Some(at(2)),
        request_id: Some("r".into()),
        trace_id: Some(TraceId(u128::MAX - 1)),
    }
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
        open: vec![open_cycle(2), open_cycle(3)],
        records: vec![record(1, first.epoch), record(2, first.epoch)],
        outputs: vec![(name("a"), output(1, "old")), (name("a"), output(2, "new")), (name("b"), output(2, "b"))],
        subsystems: BTreeMap::from([stored_subsystem("a"), stored_subsystem("b")]),
        loops: BTreeMap::from([(name("l"), Some(stored_loop.clone()))]),
        close: false,
    };
    commit(&*store, write).await;
    commit(&*store, Write { epoch: first.epoch, subsystems: [(name("b"), None)].into(), ..Write::default() }).await;
    drop(store);

    let (store, second) = opened(&path).await;
    assert!(second.epoch > first.epoch);
    assert_eq!((second.last_cycle_id, second.last_revision), (CycleId(2), Revision(2)));
    assert_eq!(second.last_record, Some(Ok(record(2, first.epoch))));
    assert_eq!(second.open, [open_cycle(3)], "what is recorded is no longer open");
    let made = StoredOutput { name: name("a"), output: output(2, "new"), finished_at: Some(at(2)) };
    assert_eq!(second.outputs, [made]);
    assert_eq!(second.subsystems, [stored_subsystem("a").1.unwrap()]);
    assert_eq!(second.loops, [stored_loop]);
    assert!(!second.may_lack_open, "the machine has not restarted");
    commit(&*store, Write { epoch: second.epoch, close: true, ..Write::default() }).await;
}

#[tokio::test]
async fn a_database_of_an_earlier_version_is_brought_up_to_date_with_what_is_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, first) = opened(&path).await;
    filled(&*store, first.epoch, 1).await;
    commit(&*store, Write { epoch: first.epoch, open: vec![open_cycle(2)], ..Write::default() }).await;
    drop(store);
    let raw = rusqlite::Connection::open(&path).unwrap();
    for column in ["database_id", "path", "device", "inode", "commits"] {
        raw.execute_batch(&format!("ALTER TABLE meta DROP COLUMN {column}")).unwrap();
    }
    raw.execute_batch("ALTER TABLE open_cycles DROP COLUMN trace_id; PRAGMA user_version = 1").unwrap();
    drop(raw);
    let (store, second) = opened(&path).await;
    assert_eq!(second.open, [OpenCycle { trace_id: None, ..open_cycle(2) }]);
    commit(&*store, Write { epoch: second.epoch, open: vec![open_cycle(3)], ..Write::default() }).await;
    drop(store);
    assert_eq!(opened(&path).await.1.open[1], open_cycle(3));
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
    commit(&*store, Write { epoch: contents.epoch, close: true, ..Write::default() }).await;
    drop(store);
    restart_machine();
    assert!(!opened(&path).await.1.may_lack_open, "it was closed");
}

#[tokio::test]
async fn a_second_process_is_kept_out_and_one_that_is_overtaken_is_fenced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (first, contents) = opened(&path).await;
    let StoreError::InUse(_, holder) = refused(&path).await else { panic!("opened twice") };
    assert_eq!(holder, format!(" (pid {})", std::process::id()));

    filled(&*first, contents.epoch, 1).await;

    std::fs::remove_file(directory.path().join("o.db.lock")).unwrap();
    #[cfg(target_os = "linux")]
    assert!(matches!(refused(&path).await, StoreError::InUse(..)), "the database itself is locked as well");

    let later = Epoch(contents.epoch.0 + 1);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE meta SET epoch = ?1", [i64::try_from(later.0).unwrap()]).unwrap();
    let write = Arc::new(Write { epoch: contents.epoch, records: vec![record(2, Epoch(1))], ..Write::default() });
    assert_eq!(first.commit(write).await, Err(StoreError::Fenced(later)));
    let pruned = first.prune(Retention::default(), Timestamp::now(), 10).await;
    assert_eq!(pruned.err(), Some(StoreError::Fenced(later)), "nor does it forget anything");
}

#[tokio::test]
async fn an_epoch_begins_with_the_first_commit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
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
    assert!(matches!(refused(&path).await, StoreError::Corrupt(..)));

    std::fs::remove_file(&path).unwrap();
    drop(opened(&path).await);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(refused(&path).await, StoreError::TooNew { found: 99, known: 3, .. }));

    raw.pragma_update(None, "user_version", 3).unwrap();
    raw.execute("UPDATE meta SET epoch = 'none'", []).unwrap();
    assert!(matches!(refused(&path).await, StoreError::Corrupt(..)));
    raw.execute("UPDATE meta SET epoch = 0", []).unwrap();
    drop(opened(&path).await);

    let other = directory.path().join("other.db");
    rusqlite::Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    assert!(matches!(refused(&other).await, StoreError::Foreign(..)));
    assert!(matches!(refused(directory.path()).await, StoreError::ReadOnly(..)), "a directory");
}

#[tokio::test]
async fn what_can_not_be_read_stands_in_its_place_and_the_rest_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 12).await;
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch(
        "UPDATE cycles SET record = CAST('unreadable' AS BLOB) WHERE cycle_id = 2;
         UPDATE cycles SET record = 'text' WHERE cycle_id = 3;
         UPDATE cycles SET state = 99 WHERE cycle_id = 4;
         UPDATE cycles SET trigger = 2, loop = 'no name!' WHERE cycle_id = 5;
         UPDATE cycles SET finished_at = 'noon' WHERE cycle_id = 6;
         UPDATE cycles SET request_id = CAST(x'ff' AS TEXT) WHERE cycle_id = 7;
         UPDATE cycles SET epoch = x'00' WHERE cycle_id = 8;
         UPDATE cycles SET revision = 'nine' WHERE cycle_id = 9;
         DELETE FROM cycles WHERE cycle_id IN (10, 12)",
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

    let page = store.cycles_before(CycleId(100), Filter::default(), ALL).await.unwrap();
    assert_eq!(
        told(&page.records),
        [
            (11, true),
            (0, false),
            (8, false),
            (7, false),
            (6, false),
            (5, false),
            (4, false),
            (3, false),
            (2, false),
            (1, true)
        ]
    );
    // What the filter looks at can be read of cycles 2 and 3, and of no other.
    let interrupted = Filter { states: vec![CycleState::Interrupted], ..Filter::default() };
    let page = store.cycles_before(CycleId(9), interrupted, ALL).await.unwrap();
    assert_eq!(told(&page.records), [(8, false), (7, false), (6, false), (5, false), (4, false)]);
    for cycle_id in 2..=9 {
        let found = store.cycle(CycleId(cycle_id)).await;
        let Err(StoreError::Unreadable(unreadable)) = found else { panic!("{found:?}") };
        assert_eq!(unreadable.cycle_id, CycleId(cycle_id));
    }
    drop(store);
    let contents = opened(&path).await.1;
    assert_eq!(contents.last_record.unwrap().unwrap().cycle_id, CycleId(11));
}

#[tokio::test]
async fn rows_that_can_not_be_read_are_named_and_the_rest_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, first) = opened(&path).await;
    let write = Write {
        epoch: first.epoch,
        open: vec![open_cycle(1)],
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
         INSERT INTO open_cycles VALUES (2, 9, NULL, 0, NULL, NULL, NULL);
         INSERT INTO open_cycles VALUES (1000000000, 1, NULL, 0, NULL, NULL, NULL)",
    )
    .unwrap();
    for _ in 0..2 {
        let (store, contents) = opened(&path).await;
        let unreadable: Vec<_> = contents.unreadable.iter().map(|row| (row.what, row.key.as_str())).collect();
        let open = [("open cycle", "2"), ("open cycle", "1000000000")];
        assert_eq!(unreadable[..2], open);
        assert_eq!(unreadable[2..], [("subsystem", "b"), ("subsystem", "c"), ("loop", "l"), ("output", "b")]);
        assert_eq!((contents.open, contents.last_open), (vec![open_cycle(1)], CycleId(2)));
        assert_eq!(contents.subsystems, [stored_subsystem("a").1.unwrap()]);
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
    commit(&*store, Write { epoch: second.epoch, records: vec![record(4, second.epoch)], ..Write::default() }).await;
    commit(&*store, Write { epoch: second.epoch, ..Write::default() }).await;
    drop(store);
    std::fs::write(&path, &older).unwrap();
    let (store, third) = opened(&path).await;
    assert_eq!(third.lost, Some(Lost { last_cycle_id: CycleId(4), last_revision: Revision(4), commits: 2 }));
    let write = Write { epoch: third.epoch, records: vec![record(4, third.epoch)], ..Write::default() };
    commit(&*store, write).await;
    drop(store);
    let (store, fourth) = opened(&path).await;
    assert_eq!(fourth.lost, None, "it is told once");
    let records = (5..20_000).map(|id| record(id, fourth.epoch)).collect();
    commit(&*store, Write { epoch: fourth.epoch, records, ..Write::default() }).await;
    drop(store);
    std::fs::write(&path, &older).unwrap();
    let behind = refused(&path).await;
    assert!(matches!(behind, StoreError::Behind { has: CycleId(3), noted: CycleId(19_999), .. }), "{behind}");
    let accepted = super::accept(&StoreUrl::Sqlite(path.clone())).unwrap();
    assert_eq!((accepted.last_cycle_id, accepted.noted_cycle_id), (CycleId(3), CycleId(19_999)));
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
    let read = store.cycles_before(CycleId(3000), Filter::default(), ALL).await;
    assert!(matches!(read, Err(StoreError::Corrupt(..))));
    assert!(store.cycle(CycleId(2000)).await.unwrap().is_some(), "the rest is still there");
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_passes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 10).await;
    let big = |id| {
        Arc::new(Write {
            epoch: contents.epoch,
            records: vec![Record { bytes: vec![0; 1 << 20].into(), ..record(id, contents.epoch) }],
            ..Write::default()
        })
    };
    // The writer's own connection has to have the limit, so it is asked for in a way that only tests use.
    super::sqlite::limit_pages(&path, 40);
    assert!(matches!(store.commit(big(11)).await, Err(StoreError::Full(..))));
    assert_eq!(store.cycle(CycleId(11)).await.unwrap(), None);
    assert!(store.cycle(CycleId(10)).await.unwrap().is_some());
    super::sqlite::limit_pages(&path, 1_000_000);
    store.commit(big(11)).await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is written, pruned and read, SQLite answers what memory answers.
    #[test]
    fn sqlite_agrees_with_memory(steps in proptest::collection::vec((0..3_u8, 1..8_u64, 0..20_u64), 1..25)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let url = StoreUrl::Sqlite(directory.path().join("o.db"));
            let (memory, one) = open(&StoreUrl::Memory, check).await.unwrap();
            let (mut sqlite, mut contents) = open(&url, check).await.unwrap();
            let mut last = 0;
            for (what, n, m) in steps {
                match what {
                    0 => {
                        let records = (last + 1..=last + n).map(|id| record(id, Epoch(1))).collect::<Vec<_>>();
                        last += n;
                        commit(&*memory, Write { epoch: one.epoch, records: records.clone(), ..Write::default() }).await;
                        commit(&*sqlite, Write { epoch: contents.epoch, records, ..Write::default() }).await;
                    }
                    1 => {
                        let rule = RetentionRule { max_cycles: Some(m), max_age: Some(Duration::from_secs(m + 5)) };
                        let by_state = BTreeMap::from([(CycleState::Failed, RetentionRule::default())]);
                        let by_state = if n > 4 { by_state } else { BTreeMap::new() };
                        let retention = Retention { default: rule, by_state };
                        let now = at(i64::try_from(last).unwrap());
                        let limit = usize::try_from(n).unwrap();
                        let pruned = memory.prune(retention.clone(), now, limit).await;
                        assert_eq!(sqlite.prune(retention, now, limit).await, pruned);
                    }
                    _ => {
                        drop(sqlite);
                        (sqlite, contents) = open(&url, check).await.unwrap();
                        assert_eq!(contents.last_cycle_id, CycleId(last));
                    }
                }
                let limits = PageLimits { records: usize::try_from(n).unwrap(), bytes: 450 };
                let page = memory.cycles_before(CycleId(m), Filter::default(), limits).await;
                assert_eq!(sqlite.cycles_before(CycleId(m), Filter::default(), limits).await, page);
                let after = memory.cycles_after(Revision(m), limits).await;
                assert_eq!(sqlite.cycles_after(Revision(m), limits).await, after);
            }
        });
    }
}
