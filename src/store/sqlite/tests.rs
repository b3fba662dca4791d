//! Tests of what only SQLite has: the database outlives its process, and others reach its files.

use std::{collections::BTreeMap, ops::RangeInclusive, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;

use super::{
    DatabaseFileError, accept,
    schema::{latest, migrate_to},
    writer::limit_pages,
};
use crate::{
    clock::Clock,
    ledger::{RecordsPruned, SealKeys},
    model::{CycleId, CycleState, Epoch, LoopSpec, LoopState, Revision, TraceId, Trigger},
    ports::{
        Contents, Durability, EventRule, Excess, Filter, Found, Lost, OpenCycle, Page, PageLimits, Removal, Retention,
        RetentionRule, Seals, Stage, Store, StoreError, StoredLoop, StoredOutput, Write,
    },
    store::{
        Accepted, NewKeys, OpenError, StoreUrl, look, open,
        suite::{
            ALL, CHECKS, at, commit, cycle_of, encode_pruned, event, filled, keys, keys_of, name, open_cycle, output,
            pruned, record, record_of, recorded, refuses, request, seals, stored_subsystem, waiting_cycle,
        },
    },
};

async fn try_open(path: &Path) -> Result<(Arc<dyn Store>, Contents), OpenError> {
    let store = open(&StoreUrl::Sqlite(path.to_owned()), CHECKS, Clock::system()).await?;
    let contents = store.take_over(seals()).await?;
    Ok((store, contents))
}

async fn opened(path: &Path) -> (Arc<dyn Store>, Contents) {
    try_open(path).await.unwrap()
}

async fn refused(path: &Path) -> OpenError {
    try_open(path).await.err().unwrap()
}

/// Accepts a database as it is.
fn accepted(path: &Path) -> Accepted {
    let write = |_| Write { began: Some(Bytes::from_static(b"began")), ..Write::default() };
    accept(path, (keys(), NewKeys::default()), CHECKS, write).unwrap().0
}

/// An open cycle of which only the id can be read.
fn unknown_cycle(id: u64) -> OpenCycle {
    let unknown = OpenCycle { trigger: Trigger::Unknown, stage: Stage::Unknown, ..waiting_cycle(id, None) };
    OpenCycle { scheduled_at: Timestamp::UNIX_EPOCH, ..unknown }
}

#[tokio::test]
async fn everything_is_kept_across_a_restart() {
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
        audit: vec![event(1)],
        began: None,
        removal: Removal::default(),
        outputs: vec![(name("a"), output(1, "old")), (name("a"), output(2, "new")), (name("b"), output(2, "b"))],
        renamed: BTreeMap::new(),
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
    assert_eq!(second.open, open, "recorded cycles are no longer open");
    let made = StoredOutput { name: name("a"), output: output(2, "new"), finished_at: Some(at(1)) };
    assert_eq!(second.outputs, [made]);
    assert_eq!(second.subsystems, [(*stored_subsystem("a").1.unwrap()).clone()]);
    assert_eq!(second.loops, [stored_loop]);
    assert!(!second.may_lack_open, "the machine has not restarted");
    // Cycles that were open before can be recorded, one by one, and no others.
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
pub(super) fn database_of_version(path: &Path, version: usize) -> rusqlite::Connection {
    let raw = rusqlite::Connection::open(path).unwrap();
    for migration in include_str!("schema.sql").split("-- migration ").skip(1).take(version) {
        raw.execute_batch(migration.split_once('\n').unwrap().1).unwrap();
    }
    raw.pragma_update(None, "application_id", 0x4472_6d4f).unwrap();
    raw.pragma_update(None, "user_version", i64::try_from(version).unwrap()).unwrap();
    raw
}

#[tokio::test]
async fn a_database_of_an_earlier_version_keeps_its_open_cycles_and_finds_the_missing_ones() {
    let directory = tempfile::tempdir().unwrap();
    for version in 1..=3 {
        let path = directory.path().join(format!("{version}.db"));
        let raw = database_of_version(&path, version);
        // 1 to 3 are recorded, 4 has started, 6 waits, and 8 has started. The last row is damaged.
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
        let noted = Write { epoch: contents.epoch, last_cycle_id: CycleId(9), ..Write::default() };
        assert_eq!(pruned(&*store, &noted, two, at(0), 100).await.last(), Some(&Revision(3)));
        assert_eq!(
            store.cycle_of_request(request("five", None)).await.unwrap().unwrap().unwrap().revision,
            Revision(5)
        );
    }
}

#[tokio::test]
async fn a_copy_of_the_file_alone_is_recognized_since_the_first_commit_until_it_is_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let (path, copy) = (directory.path().join("o.db"), directory.path().join("copy.db"));
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 1).await;
    // The file as it is while it is served, without its log.
    std::fs::copy(&path, &copy).unwrap();
    drop(store);
    let is_copy = |error| matches!(error, OpenError::Files(DatabaseFileError::Copy { .. }));
    assert!(is_copy(refused(&copy).await));
    let accepted = accepted(&copy);
    assert_eq!(accepted.earlier, Some(path.canonicalize().unwrap()));
    assert_eq!(self::accepted(&copy).earlier, None, "it is at home there now");
    opened(&copy).await;

    // The first version that noted where a database is.
    let earlier = directory.path().join("3.db");
    let raw = database_of_version(&earlier, 3);
    raw.execute("UPDATE meta SET path = CAST('/elsewhere/o.db' AS BLOB), device = 1, inode = 1", []).unwrap();
    drop(raw);
    assert!(is_copy(refused(&earlier).await));
}

#[tokio::test]
async fn a_database_with_another_name_is_refused_unless_it_was_last_used_by_this_one() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (path, other) = (at("o.db"), at("other.db"));
    let is_linked = |error| matches!(error, OpenError::Files(DatabaseFileError::Linked { .. }));
    let used = async |path: &Path| {
        let (store, contents) = opened(path).await;
        filled(&*store, contents.epoch, 1).await;
    };
    used(&path).await;
    std::fs::hard_link(&path, &other).unwrap();
    opened(&path).await;

    // It was renamed since, or a backup was put back.
    std::fs::rename(&path, at("renamed.db")).unwrap();
    assert!(is_linked(refused(&at("renamed.db")).await));
    std::fs::copy(&other, &path).unwrap();
    opened(&path).await;
    std::fs::hard_link(&path, at("backup.db")).unwrap();
    assert!(is_linked(refused(&path).await));

    // It is of a version that did not note its name.
    for (version, links, is_refused) in [(2, 2, true), (2, 1, false), (5, 2, true), (5, 1, false)] {
        let path = at(&format!("{version} {links}.db"));
        drop(database_of_version(&path, version));
        if links > 1 {
            std::fs::hard_link(&path, path.with_extension("link")).unwrap();
        }
        match try_open(&path).await {
            Ok(_) => assert!(!is_refused, "{version} {links}"),
            Err(error) => assert!(is_refused && is_linked(error.clone()), "{version} {links}: {error}"),
        }
    }
}

#[tokio::test]
async fn a_renamed_database_is_opened_though_other_empty_files_have_its_old_names() {
    let directory = tempfile::tempdir().unwrap();
    let (path, renamed) = (directory.path().join("o.db"), directory.path().join("renamed.db"));
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 1).await;
    drop(store);
    std::fs::rename(&path, &renamed).unwrap();
    let log = directory.path().join("o.db-wal");
    std::fs::write(&log, "records").unwrap();
    assert!(matches!(refused(&renamed).await, OpenError::Files(DatabaseFileError::LogLeftBehind { .. })));
    std::fs::write(&log, "").unwrap();
    std::fs::write(&path, "").unwrap();
    assert_eq!(opened(&renamed).await.1.last_cycle_id, CycleId(2));
}

#[tokio::test]
async fn the_largest_record_is_read_and_a_larger_one_is_unreadable() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 1).await;
    let raw = rusqlite::Connection::open(&path).unwrap();
    // Older than the log, so that it has no hash.
    raw.execute("UPDATE meta SET unlogged_to = last_revision", []).unwrap();
    for (bytes, is_read) in [(64_u32 << 20, true), ((64 << 20) + 1, false)] {
        raw.execute("UPDATE cycles SET leaf = NULL, record = zeroblob(?1)", [bytes]).unwrap();
        store.take_over(Seals::Renewed(keys())).await.unwrap();
        let found = store.cycle(cycle_of(1)).await.unwrap().unwrap();
        assert_eq!(found.is_ok(), is_read, "{bytes}");
    }
}

#[tokio::test]
async fn epochs_grow_also_if_the_clock_is_set_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, first) = opened(&path).await;
    assert!(
        first.epoch >= Epoch::by_clock(at(0)),
        "subsystems that know the epochs of another store consider it later"
    );
    filled(&*store, first.epoch, 1).await;
    drop(store);
    // The clock has been set back since.
    let ahead = Epoch(first.epoch.0 + 1_000_000_000);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE meta SET epoch = ?1", [i64::try_from(ahead.0).unwrap()]).unwrap();
    drop(raw);
    let refused = refused(&path).await;
    assert!(matches!(refused, OpenError::Store(StoreError::Tampered { .. })), "no process has written it: {refused}");
    accepted(&path);
    assert_eq!(opened(&path).await.1.epoch, ahead.next());
}

#[tokio::test]
async fn a_restart_of_the_machine_without_a_close_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 1).await;
    drop(store);
    #[cfg(target_os = "linux")]
    {
        let raw = rusqlite::Connection::open(&path).unwrap();
        let noted: String = raw.query_row("SELECT boot_id FROM meta", [], |row| row.get(0)).unwrap();
        assert_eq!(noted, std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
    }
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
async fn a_second_process_is_refused_and_a_superseded_one_is_fenced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (first, contents) = opened(&path).await;
    let OpenError::InUse { by, .. } = refused(&path).await else { panic!("opened twice") };
    assert_eq!(by, Some(std::process::id()));

    filled(&*first, contents.epoch, 1).await;

    std::fs::remove_file(directory.path().join("o.db.lock")).unwrap();
    #[cfg(target_os = "linux")]
    assert!(
        matches!(refused(&path).await, OpenError::Files(DatabaseFileError::InUseByAnotherName { .. })),
        "the database itself is locked as well"
    );

    let later = Epoch(contents.epoch.0 + 1);
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE meta SET epoch = ?1", [i64::try_from(later.0).unwrap()]).unwrap();
    let write = Arc::new(recorded(2..=2, contents.epoch));
    assert_eq!(first.commit(write).await, Err(StoreError::Fenced { by: later }));
    let excess = first.excess(Retention::default(), Timestamp::now(), 10).await;
    assert_eq!(excess.err(), Some(StoreError::Fenced { by: later }), "nor can it remove records");
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_another_program_delays_is_late_and_still_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (mut trouble, committing) = (store.trouble(), store.clone());
    let committing = tokio::spawn(async move { committing.commit(Arc::new(recorded(1..=1, contents.epoch))).await });
    // The paused clock advances because no task can run.
    let late = trouble.next().await.unwrap();
    let Some(StoreError::Late { store: of, waited, .. }) = late else { panic!("{late:?}") };
    assert_eq!((of, waited), (path.display().to_string(), Duration::from_secs(5)));
    assert!(!committing.is_finished());
    assert_eq!(store.cycle(cycle_of(1)).await.unwrap(), None, "the store can be read meanwhile");
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
    assert!(store.take_over(seals()).await.unwrap().epoch >= contents.epoch);
    let contents = store.take_over(seals()).await.unwrap();
    let epoch = || {
        let raw = rusqlite::Connection::open(&path).unwrap();
        raw.query_row("SELECT epoch FROM meta", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    assert_eq!(epoch(), 0);
    filled(&*store, contents.epoch, 1).await;
    assert_eq!(epoch(), i64::try_from(contents.epoch.0).unwrap());
}

#[tokio::test]
async fn a_database_of_an_earlier_version_is_not_looked_at_and_not_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o 100%.db");
    let url = StoreUrl::Sqlite(path.clone());
    let earlier = latest() - 1;
    migrate_to(&mut rusqlite::Connection::open(&path).unwrap(), 0, earlier).unwrap();
    let before = std::fs::read(&path).unwrap();
    let refused = look(&url, CHECKS, Clock::system()).await.err().unwrap();
    assert!(matches!(refused, OpenError::NotMigrated { found, known, .. } if (found, known) == (earlier, latest())));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 1).await;
    drop(store);
    let store = look(&url, CHECKS, Clock::system()).await.unwrap();
    assert_eq!(store.take_over(seals()).await.unwrap().epoch, contents.epoch);
    let write = Write { epoch: contents.epoch, ..Write::default() };
    assert!(matches!(store.commit(Arc::new(write)).await, Err(StoreError::Defect { .. })), "it takes no writes");
}

#[tokio::test]
async fn a_foreign_damaged_or_too_new_database_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    std::fs::write(&path, vec![b'x'; 10_000]).unwrap();
    assert!(matches!(refused(&path).await, OpenError::Files(DatabaseFileError::NotADatabase { .. })));

    std::fs::remove_file(&path).unwrap();
    drop(opened(&path).await);
    let raw = rusqlite::Connection::open(&path).unwrap();
    let current: i64 = raw.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(refused(&path).await, OpenError::TooNew { found: 99, known, .. } if known == current));

    raw.pragma_update(None, "user_version", current).unwrap();
    raw.execute("UPDATE meta SET epoch = 'none'", []).unwrap();
    assert!(matches!(refused(&path).await, OpenError::Store(StoreError::Corrupt { .. })));
    raw.execute("UPDATE meta SET epoch = 0", []).unwrap();
    drop(opened(&path).await);

    let other = directory.path().join("other.db");
    rusqlite::Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    assert!(matches!(refused(&other).await, OpenError::Foreign { .. }));
    // Other software that has numbered its schema, and made no table yet.
    let numbered = directory.path().join("numbered.db");
    rusqlite::Connection::open(&numbered).unwrap().pragma_update(None, "user_version", 1).unwrap();
    assert!(matches!(refused(&numbered).await, OpenError::Foreign { .. }));
    let refused = refused(directory.path()).await;
    assert!(
        matches!(refused, OpenError::Files(DatabaseFileError::NotRegular { found: "a directory", .. })),
        "{refused}"
    );
}

#[tokio::test]
async fn an_unreadable_record_keeps_its_place_and_the_others_are_read() {
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
         UPDATE cycles SET revision = -9 WHERE revision = 9;
         DELETE FROM cycles WHERE revision IN (10, 12)",
    )
    .unwrap();
    let shown = |found: &[Found]| {
        let shown = found.iter().map(|found| match found {
            Ok(record) => (record.revision.0, true),
            Err(unreadable) => (unreadable.revision.0, false),
        });
        shown.collect::<Vec<_>>()
    };
    let after = store.cycles_after(Revision(0), ALL).await.unwrap();
    let unreadable = (2..=10).map(|revision| (revision, false));
    let all: Vec<_> = [(1, true)].into_iter().chain(unreadable).chain([(11, true), (12, false)]).collect();
    assert_eq!(shown(&after), all);
    let three = PageLimits { records: 3, ..ALL };
    assert_eq!(shown(&store.cycles_after(Revision(8), three).await.unwrap()), all[8..11]);
    assert_eq!(shown(&store.cycles_after(Revision(11), three).await.unwrap()), all[11..]);

    // The other direction gives the same records.
    let mut all: Vec<_> = all.into_iter().rev().collect();
    let page = store.cycles_before(Revision(100), Filter::default(), ALL).await.unwrap();
    assert_eq!((shown(&page.records), page.scanned, page.next), (all.clone(), 12, None));
    let mut before = Revision(100);
    while !all.is_empty() {
        let Page { records, next, .. } = store.cycles_before(before, Filter::default(), three).await.unwrap();
        assert_eq!(shown(&records), all.drain(..3).collect::<Vec<_>>());
        before = next.unwrap_or_default();
    }
    // The fields that the filter compares are readable in revisions 2 and 3 only.
    let interrupted = Filter { states: vec![CycleState::Interrupted], ..Filter::default() };
    let page = store.cycles_before(Revision(9), interrupted, ALL).await.unwrap();
    assert_eq!(shown(&page.records), [(8, false), (7, false), (6, false), (5, false), (4, false)]);
    for revision in 2..=9 {
        let found = store.cycle(cycle_of(revision)).await.unwrap();
        let Some(Err(unreadable)) = found else { panic!("{found:?}") };
        assert_eq!(unreadable.cycle_id, cycle_of(revision));
    }
    // Nobody knows whether the second one is what its columns say, so it stays.
    let rule = |max_cycles| RetentionRule { max_cycles: Some(max_cycles), max_age: None };
    let of_default = |max_cycles| Retention { default: rule(max_cycles), ..Retention::default() };
    let excess = store.excess(of_default(10), at(0), 100).await.unwrap();
    assert_eq!(excess.records.iter().map(|record| record.revision).collect::<Vec<_>>(), [Revision(1)]);
    let damaged = excess.damaged.unwrap().to_string();
    assert!(damaged.contains("the record of cycle 1, revision 2,"), "{damaged}");
    let noted = Write { epoch: contents.epoch, last_cycle_id: CycleId(12), ..Write::default() };
    assert_eq!(pruned(&*store, &noted, of_default(11), at(0), 100).await, [Revision(1)]);
    drop(store);
    let contents = opened(&path).await.1;
    assert_eq!(contents.last_record.unwrap().unwrap().revision, Revision(11));
}

#[tokio::test]
async fn a_search_for_old_records_ends_at_its_limit_and_the_next_one_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let (store, contents) = opened(&directory.path().join("o.db")).await;
    let mut write = recorded(1..=1200, contents.epoch);
    for record in &mut write.records[..1000] {
        record.state = CycleState::Succeeded;
    }
    commit(&*store, write).await;
    let none = RetentionRule { max_cycles: Some(0), max_age: None };
    let retention = Retention { by_state: BTreeMap::from([(CycleState::Failed, none)]), ..Retention::default() };
    let search = async || {
        let excess = store.excess(retention.clone(), at(0), 256).await.unwrap();
        let found = excess.records.iter().map(|record| record.revision.0).collect::<Vec<_>>();
        (found, excess.is_partial)
    };
    let failed = |revisions: RangeInclusive<u64>| revisions.filter(|number| number.is_multiple_of(3)).collect();
    assert_eq!(search().await, (Vec::new(), true));
    assert_eq!(search().await, (failed(1001..=1024), true));
    // It begins at the first one that is still there, and the newest record stays.
    assert_eq!(search().await, (failed(1001..=1199), false));
}

/// Another program may change a row between the search that has found it and its removal.
#[tokio::test]
async fn what_was_changed_since_it_was_found_is_not_removed() {
    let retention = Retention {
        default: RetentionRule { max_cycles: Some(2), max_age: None },
        events: EventRule { max_events: Some(2), max_age: None },
        ..Retention::default()
    };
    for (change, named) in [
        ("UPDATE cycles SET state = 3 WHERE revision = 1", "the record of revision 1"),
        ("UPDATE cycles SET leaf = 3 WHERE revision = 2", "the record of revision 2"),
        ("DELETE FROM cycles WHERE revision = 1", "the record of revision 1"),
        ("UPDATE audit SET kind = 3 WHERE leaf = 4", "the audit event of leaf 4"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("o.db");
        let (store, contents) = opened(&path).await;
        let noted = Write { audit: (1..=3).map(event).collect(), ..recorded(1..=4, contents.epoch) };
        commit(&*store, noted.clone()).await;
        let Excess { records, events, first_kept, .. } = store.excess(retention.clone(), at(0), 10).await.unwrap();
        assert_eq!((records.len(), events.len()), (2, 1));
        rusqlite::Connection::open(&path).unwrap().execute_batch(change).unwrap();
        let entry = Some(encode_pruned(&RecordsPruned::of([0, 1, 4], first_kept)));
        let removal = Removal { records, events, first_kept, entry };
        let Write { epoch, last_cycle_id, .. } = noted;
        let write = Write { epoch, last_cycle_id, removal, ..Write::default() };
        let refused = store.commit(Arc::new(write)).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("{named} is not what retention has found any more")), "{change}: {refused}");
    }
}

#[tokio::test]
async fn unreadable_rows_are_named_and_the_others_are_read() {
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
        "INSERT INTO loops (name, state) VALUES ('l', 'no json');
         INSERT INTO subsystems (name, spec, suspended) VALUES ('b', '{\"endpoint\":', 0), ('c', x'00', 0);
         INSERT INTO outputs (name, cycle_id, payload) VALUES ('b', 1, x'ff');
         UPDATE open_cycles SET trigger = 9 WHERE cycle_id = 2;
         INSERT INTO open_cycles (cycle_id, trigger, scheduled_at) VALUES (-1, 1, 0), (4, 1, 0), (5, 1, 0)",
    )
    .unwrap();
    for _ in 0..2 {
        let (store, contents) = opened(&path).await;
        let unreadable: Vec<_> = contents.unreadable.iter().map(|row| (row.what, row.key.as_str())).collect();
        assert_eq!(unreadable[..4], ["-1", "2", "4", "5"].map(|key| ("open cycle", key)));
        assert_eq!(unreadable[4..], [("subsystem", "b"), ("subsystem", "c"), ("loop", "l"), ("output", "b")]);
        assert!(contents.unreadable.iter().all(|row| !row.is_sealed), "{:?}", contents.unreadable);
        let unsealed = OpenCycle { stage: Stage::Unsealed, ..unknown_cycle(2) };
        assert_eq!(contents.open, [open_cycle(1), unsealed, open_cycle(3)]);
        assert_eq!(contents.subsystems, [(*stored_subsystem("a").1.unwrap()).clone()]);
        assert_eq!(contents.outputs.len(), 1);
        drop(store);
    }
}

#[tokio::test]
async fn the_definitions_of_its_tables_are_those_of_each_version_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let count = include_str!("schema.sql").matches("-- migration ").count();
    for version in 1..=count {
        let path = directory.path().join(format!("{version}.db"));
        let raw = database_of_version(&path, version);
        raw.execute_batch(
            "CREATE TABLE another (counts); CREATE INDEX of_another ON another (counts);
                           CREATE VIEW seen AS SELECT * FROM cycles",
        )
        .unwrap();
        drop(raw);
        for _ in 0..2 {
            drop(opened(&path).await);
        }
        // Before the missing migrations, and afterwards.
        let other = directory.path().join(format!("{version} changed.db"));
        let raw = database_of_version(&other, version);
        raw.execute("ALTER TABLE cycles ADD COLUMN more INTEGER DEFAULT 1", []).unwrap();
        let refused = refused(&other).await;
        assert!(matches!(&refused, OpenError::Definition { table, .. } if table == "cycles"), "{version}: {refused}");
    }
}

#[tokio::test]
async fn the_missing_end_is_known_and_an_older_copy_is_distinguished_from_a_damaged_log() {
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
    assert_eq!(fourth.lost, None, "it is reported once");
    commit(&*store, recorded(5..=20_000, fourth.epoch)).await;
    drop(store);
    std::fs::write(&path, &older).unwrap();
    let behind = refused(&path).await;
    assert!(matches!(behind, OpenError::Behind { has: CycleId(4), noted: CycleId(20_000), .. }), "{behind}");
    let accepted = accepted(&path);
    assert_eq!((accepted.last_cycle_id, accepted.noted_cycle_id), (CycleId(4), CycleId(20_000)));
    assert_eq!(accepted.earlier, None, "it has its path");
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
    assert!(store.cycle(cycle_of(2000)).await.unwrap().is_some(), "other records can still be read");
}

#[tokio::test]
async fn a_full_disk_loses_no_record_and_writes_recover() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    filled(&*store, contents.epoch, 10).await;
    let big = |revision| {
        let mut write = recorded(revision..=revision, contents.epoch);
        write.records[0].bytes = vec![0; 1 << 20].into();
        Arc::new(write)
    };
    // The writer's own connection needs the limit, so it is set in a way that only tests use.
    limit_pages(&path, 40);
    assert!(matches!(store.commit(big(11)).await, Err(StoreError::Full { .. })));
    assert_eq!(store.cycle(cycle_of(11)).await.unwrap(), None);
    assert!(store.cycle(cycle_of(10)).await.unwrap().is_some());
    limit_pages(&path, 1_000_000);
    store.commit(big(11)).await.unwrap();
}

/// Writes that put more than 16 MiB into SQLite's log if it is never checkpointed.
type Fill = fn(Epoch) -> Vec<Write>;

#[tokio::test]
async fn the_log_is_checkpointed_every_4_mib_whatever_fills_it() {
    let large_records: Fill = |epoch| {
        let large = |revision| {
            let mut write = recorded(revision..=revision, epoch);
            write.records[0].bytes = vec![0; 1 << 19].into();
            write
        };
        (1..=40).map(large).collect()
    };
    let large_outputs: Fill = |epoch| {
        let large = |count: u32| vec![(name("a"), output(1, &count.to_string().repeat(1 << 18)))];
        (10..50).map(|count| Write { epoch, outputs: large(count), ..Write::default() }).collect()
    };
    let small_commits: Fill = |epoch| {
        let small = |revision| Write { durability: Durability::Buffered, ..recorded(revision..=revision, epoch) };
        (1..=1000).map(small).collect()
    };
    let directory = tempfile::tempdir().unwrap();
    let assert_short = |what: &str| {
        let bytes = std::fs::metadata(directory.path().join(format!("{what}.db-wal"))).unwrap().len();
        assert!(bytes < 6 << 20, "{what}: {bytes} bytes");
    };
    for (what, fill) in
        [("large records", large_records), ("large outputs", large_outputs), ("small commits", small_commits)]
    {
        let (store, contents) = opened(&directory.path().join(format!("{what}.db"))).await;
        for write in fill(contents.epoch) {
            commit(&*store, write).await;
        }
        assert_short(what);
    }
    // Records that are removed together lie apart.
    let (store, contents) = opened(&directory.path().join("removals.db")).await;
    let apart = |revision| {
        let mut record = record_of(revision * 1237 % 4096 + 1, revision, contents.epoch);
        record.bytes = vec![0; 400].into();
        record
    };
    let noted = Write { epoch: contents.epoch, last_cycle_id: CycleId(4096), ..Write::default() };
    commit(&*store, Write { records: (1..=4096).map(apart).collect(), ..noted.clone() }).await;
    let one = Retention { default: RetentionRule { max_cycles: Some(1), max_age: None }, ..Retention::default() };
    while !pruned(&*store, &noted, one.clone(), at(0), 256).await.is_empty() {}
    assert_short("removals");
}

/// The error for a database that was changed in this way after a process had closed it.
async fn refused_after(change: &str) -> OpenError {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    let stored_loop = StoredLoop { name: name("l"), spec: None, state: LoopState::default() };
    let write = Write {
        last_cycle_id: CycleId(4),
        open: vec![open_cycle(3), waiting_cycle(4, Some("four"))],
        outputs: vec![(name("a"), output(1, "a")), (name("b"), output(2, "b"))],
        subsystems: [stored_subsystem("a"), stored_subsystem("b")].into(),
        loops: [(name("l"), Some(stored_loop))].into(),
        ..recorded(1..=2, contents.epoch)
    };
    commit(&*store, write).await;
    drop(store);
    opened(&path).await;
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch(change).unwrap();
    drop(raw);
    refused(&path).await
}

#[tokio::test]
async fn a_row_that_was_changed_without_the_key_is_not_taken_over() {
    for (change, row) in [
        ("UPDATE subsystems SET spec = replace(spec, 'http://h:1', 'http://h:2') WHERE name = 'a'", "subsystem \"a\""),
        ("UPDATE subsystems SET owner = 'token:other' WHERE name = 'a'", "subsystem \"a\""),
        ("UPDATE subsystems SET suspended = 0 WHERE name = 'a'", "subsystem \"a\""),
        ("UPDATE subsystems SET lease_ms = NULL WHERE name = 'b'", "subsystem \"b\""),
        ("UPDATE subsystems SET former_names = NULL WHERE name = 'b'", "subsystem \"b\""),
        ("UPDATE subsystems SET seal = NULL WHERE name = 'b'", "subsystem \"b\""),
        ("DELETE FROM subsystems WHERE name = 'b'; UPDATE subsystems SET name = 'b'", "subsystem \"b\""),
        ("UPDATE loops SET state = replace(state, '0', '1')", "loop \"l\""),
        ("UPDATE outputs SET payload = (SELECT payload FROM outputs WHERE name = 'b')", "output \"a\""),
        ("UPDATE outputs SET cycle_id = 2 WHERE name = 'a'", "output \"a\""),
        ("UPDATE open_cycles SET request = x'00' WHERE cycle_id = 4", "open cycle \"4\""),
        ("UPDATE open_cycles SET audit = NULL WHERE cycle_id = 3", "open cycle \"3\""),
        ("UPDATE open_cycles SET triggered_by = 'token:other' WHERE cycle_id = 3", "open cycle \"3\""),
    ] {
        let refused = refused_after(change).await;
        assert!(is_tampered(&refused, row), "{change}: {refused}");
    }
}

#[tokio::test]
async fn an_output_that_was_changed_without_the_key_is_not_sealed_under_a_new_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let (store, contents) = opened(&path).await;
    let outputs = vec![(name("a"), output(1, "a")), (name("b"), output(2, "b"))];
    commit(&*store, Write { outputs, ..recorded(1..=2, contents.epoch) }).await;
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute("UPDATE outputs SET payload = (SELECT payload FROM outputs WHERE name = 'b') WHERE name = 'a'", [])
        .unwrap();
    drop(raw);
    let renamed = [(name("a"), name("x"))].into();
    let write = Write { epoch: contents.epoch, last_cycle_id: CycleId(2), renamed, ..Write::default() };
    commit(&*store, write).await;
    drop(store);
    let refused = refused(&path).await;
    assert!(is_tampered(&refused, "output \"a\""), "{refused}");
}

/// True if a store was refused for the seal of this row.
fn is_tampered(refused: &OpenError, row: &str) -> bool {
    let is_of_row = |problem: &str| problem.contains(&format!("the seal of its {row}"));
    matches!(refused, OpenError::Store(StoreError::Tampered { problem, .. }) if is_of_row(problem))
}

#[tokio::test]
async fn subsystems_of_an_earlier_version_have_no_former_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let raw = database_of_version(&path, 4);
    raw.execute("INSERT INTO subsystems VALUES ('a', NULL, NULL, 1)", []).unwrap();
    drop(raw);
    let (store, contents) = opened(&path).await;
    assert!(contents.subsystems[0].former_names.is_empty());
    let subsystems = [stored_subsystem("a")].into();
    commit(&*store, Write { epoch: contents.epoch, subsystems, ..Write::default() }).await;
    drop(store);
    assert_eq!(opened(&path).await.1.subsystems, [(*stored_subsystem("a").1.unwrap()).clone()]);
}

#[tokio::test]
async fn a_log_without_its_seal_is_not_taken_over() {
    for change in [
        "UPDATE meta SET seal = NULL",
        "UPDATE meta SET seal = zeroblob(32)",
        "UPDATE meta SET log_size = 1; DELETE FROM hashes WHERE id > 0",
    ] {
        let refused = refused_after(change).await;
        assert!(refused.to_string().contains("the seal of its log"), "{change}: {refused}");
    }
}

#[tokio::test]
async fn another_key_takes_over_while_the_earlier_one_is_in_the_list_and_seals_everything_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let process = async |keys: SealKeys| {
        let store = open(&StoreUrl::Sqlite(path.clone()), CHECKS, Clock::system()).await?;
        let Contents { epoch, last_cycle_id, .. } = store.take_over(Seals::Checked(keys)).await?;
        let subsystems = if last_cycle_id == CycleId(0) { [stored_subsystem("a")].into() } else { BTreeMap::new() };
        commit(&*store, Write { epoch, last_cycle_id: CycleId(2), subsystems, ..first_records(last_cycle_id, epoch) })
            .await;
        Ok::<_, OpenError>(())
    };
    process(keys_of([1])).await.unwrap();
    assert!(process(keys_of([2])).await.unwrap_err().to_string().contains("the seal of its log"));
    process(keys_of([2, 1])).await.unwrap();
    process(keys_of([2])).await.unwrap();
    assert!(process(keys_of([1])).await.is_err());
}

/// The first two records, unless they are there.
fn first_records(last: CycleId, epoch: Epoch) -> Write {
    if last == CycleId(0) { recorded(1..=2, epoch) } else { Write { epoch, ..Write::default() } }
}

#[tokio::test]
async fn a_database_of_an_earlier_version_is_sealed_by_the_first_commit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("o.db");
    let raw = database_of_version(&path, 4);
    raw.execute("INSERT INTO subsystems VALUES ('a', NULL, NULL, 1)", []).unwrap();
    drop(raw);
    let (store, contents) = opened(&path).await;
    assert!(!contents.is_sealed && contents.subsystems.len() == 1);
    commit(&*store, Write { epoch: contents.epoch, ..Write::default() }).await;
    drop(store);
    let (store, contents) = opened(&path).await;
    assert!(contents.is_sealed && contents.subsystems.len() == 1);
    drop(store);
    rusqlite::Connection::open(&path).unwrap().execute("UPDATE subsystems SET suspended = 0", []).unwrap();
    assert!(matches!(refused(&path).await, OpenError::Store(StoreError::Tampered { .. })));
}
