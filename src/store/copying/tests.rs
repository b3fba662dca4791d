use std::{collections::BTreeSet, path::Path, sync::Arc};

use super::*;
use crate::{
    ledger::SigningKey,
    model::LoopState,
    ports::{Contents, EventFilter, Found, LoggedEvent, Retention, RetentionRule, Seals, Store, StoredLoop, Write},
    store::{
        EntryCodec, LogKeys, NewKeys, accept, open as open_store,
        postgres::tests::server::shared,
        suite::{
            ALL, CHECKS, commit, event, keys, name, open_cycle, output, pruned, record_of, recorded, stored_subsystem,
            waiting_cycle,
        },
    },
};

fn sqlite(directory: &Path, name: &str) -> StoreUrl {
    StoreUrl::Sqlite(directory.canonicalize().unwrap().join(name))
}

fn postgres() -> Option<StoreUrl> {
    Some(StoreUrl::parse(&shared()?.url()).unwrap())
}

async fn copied(from: &StoreUrl, to: &StoreUrl) -> Result<Moved, CopyError> {
    copy(from, to, Clock::system()).await
}

/// Copies once no store is open any more: one that was dropped is closed by its thread.
async fn copied_once_closed(from: &StoreUrl, to: &StoreUrl) -> Result<Moved, CopyError> {
    let copied = async {
        loop {
            match copied(from, to).await {
                Err(CopyError::Open(error)) if error.to_string().contains("is in use by another process") => {}
                copied => return copied,
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_mins(1), copied).await.unwrap()
}

async fn taken_over(url: &StoreUrl) -> Result<(Arc<dyn Store>, Contents), String> {
    let store = open_store(url, CHECKS, Clock::system()).await.map_err(|error| error.to_string())?;
    let contents = store.take_over(Seals::Checked(keys())).await.map_err(|error| error.to_string())?;
    Ok((store, contents))
}

/// Writes a store with rows of all kinds, and closes it.
async fn write(url: &StoreUrl) {
    let (store, Contents { epoch, .. }) = taken_over(url).await.unwrap();
    let write = Write {
        outputs: vec![(name("a"), output(2, "two")), (name("b"), output(1, "one"))],
        subsystems: [stored_subsystem("a"), stored_subsystem("b")].into(),
        loops: [(name("l"), Some(StoredLoop { name: name("l"), spec: None, state: LoopState::default() }))].into(),
        audit: (1..=5).map(event).collect(),
        ..recorded(1..=40, epoch)
    };
    commit(&*store, write).await;
    let noted = Write { epoch, last_cycle_id: CycleId(40), ..Write::default() };
    let default = RetentionRule { max_cycles: Some(30), max_age: None };
    pruned(&*store, &noted, Retention { default, ..Retention::default() }, jiff::Timestamp::UNIX_EPOCH, 100).await;
    let mut begun = open_cycle(41);
    begun.request_id = Some("a\0b".into());
    let open = vec![begun, waiting_cycle(42, Some("again"))];
    commit(&*store, Write { last_cycle_id: CycleId(42), open, close: true, ..noted }).await;
    store.publish_checkpoint("the newest one".into()).await.unwrap();
}

/// What a store contains, but for the epoch that a process would get.
async fn everything(url: &StoreUrl) -> (Contents, Vec<Found>, Vec<Option<LoggedEvent>>) {
    let store = crate::store::look(url, CHECKS, Clock::system()).await.unwrap();
    let contents = store.take_over(Seals::Checked(keys())).await.unwrap();
    let records = store.cycles_after(contents.pruned_to, ALL).await.unwrap();
    let events = store.events_before(u64::MAX >> 1, EventFilter::default(), 100).await.unwrap().events;
    (contents, records, events.into_iter().map(Result::ok).collect())
}

#[tokio::test]
async fn a_store_comes_back_from_postgres_byte_for_byte() {
    let Some(there) = postgres() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (first, last) = (sqlite(directory.path(), "first.db"), sqlite(directory.path(), "last.db"));
    write(&first).await;
    let written = everything(&first).await;
    assert!(written.0.open.len() == 2 && written.0.is_sealed && written.2.len() == 5, "{written:?}");
    for (from, to) in [(&first, &there), (&there, &last)] {
        let moved = copied(from, to).await.unwrap();
        assert_eq!((moved.records, moved.events, moved.last_cycle_id), (30, 5, CycleId(42)));
        assert_eq!((moved.from, moved.to), (from.to_string(), to.to_string()));
        assert_eq!(everything(to).await, written);
        let refused = taken_over(from).await.err().unwrap();
        let there = format!("it was copied to {to}, which goes on in its place");
        assert!(refused.contains(&there) && refused.contains("store accept"), "{refused}");
        let refused = copied(from, &sqlite(directory.path(), "other.db")).await.unwrap_err().to_string();
        assert!(refused.contains(&there), "{refused}");
    }
    let (store, contents) = taken_over(&last).await.unwrap();
    assert_eq!(contents.checkpoint.as_deref(), Some("the newest one"));
    let record = record_of(41, 41, contents.epoch);
    let write = Write { epoch: contents.epoch, last_cycle_id: CycleId(42), records: vec![record], ..Write::default() };
    commit(&*store, write).await;
}

#[tokio::test]
async fn every_column_of_every_table_is_copied() {
    let (mut copied, mut stays) = (BTreeSet::new(), BTreeSet::new());
    for Table { name, columns } in &TABLES {
        copied.extend(columns.iter().map(|(column, _)| format!("{name}.{column}")));
    }
    copied.extend(meta_columns().iter().map(|(column, _)| format!("meta.{column}")));
    for column in ["id", "database_id", "path", "device", "inode", "boot_id", "store_id", "token", "found"] {
        stays.insert(format!("meta.{column}"));
    }
    stays.insert("meta.not_served".into());
    let check = |found: BTreeSet<String>, tables: &[&str]| {
        let is_other = |column: &&String| tables.iter().any(|table| column.starts_with(&format!("{table}.")));
        let found: BTreeSet<_> = found.iter().filter(|column| !is_other(column)).collect();
        let is_known = |column: &&&String| copied.contains(**column) || stays.contains(**column);
        let unknown: Vec<_> = found.iter().filter(|column| !is_known(column)).collect();
        assert!(unknown.is_empty(), "neither copied nor known to stay: {unknown:?}");
        let missing: Vec<_> = copied.iter().filter(|column| !found.contains(column)).collect();
        assert!(missing.is_empty(), "copied, and not there: {missing:?}");
    };
    let directory = tempfile::tempdir().unwrap();
    let url = sqlite(directory.path(), "o.db");
    drop(open_store(&url, CHECKS, Clock::system()).await.unwrap());
    let database = rusqlite::Connection::open(directory.path().join("o.db")).unwrap();
    let columns =
        "SELECT t.name || '.' || c.name FROM sqlite_schema t, pragma_table_info(t.name) c WHERE t.type = 'table'";
    let mut columns = database.prepare(columns).unwrap();
    check(columns.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect(), &[]);
    if let Some(server) = shared() {
        let url = server.url();
        drop(open_store(&StoreUrl::parse(&url).unwrap(), CHECKS, Clock::system()).await.unwrap());
        // These say where the store is, and who writes to it.
        check(server.columns(&url).await, &["store_schema", "checkpoint", "leader"]);
    }
}

/// A database that fails, as if the process were killed there, once this number of writes and marks was made.
struct Failing {
    database: Box<dyn Database>,
    left: usize,
}

impl Failing {
    fn count(&mut self) -> Result<(), CopyError> {
        let problem = "as scripted".into();
        let left = self.left.checked_sub(1);
        self.left = left.ok_or(StoreError::Unavailable { store: "s".into(), problem })?;
        Ok(())
    }
}

impl Database for Failing {
    fn url(&self) -> String {
        self.database.url()
    }
    fn standing(&mut self) -> Result<Standing, CopyError> {
        self.database.standing()
    }
    fn mark(&mut self, not_served: Option<&NotServed>) -> Result<(), CopyError> {
        self.count()?;
        self.database.mark(not_served)
    }
    fn rows(&mut self, table: &Table, each: Each<'_>) -> Result<(), CopyError> {
        self.database.rows(table, each)
    }
    fn put(&mut self, table: &Table, rows: &[Values]) -> Result<(), CopyError> {
        self.count()?;
        self.database.put(table, rows)
    }
    fn meta(&mut self, read: Each<'_>) -> Result<(), CopyError> {
        self.database.meta(read)
    }
    fn store_id(&mut self) -> Result<[u8; 16], CopyError> {
        self.database.store_id()
    }
    fn put_meta(&mut self, values: &Values, id: [u8; 16]) -> Result<(), CopyError> {
        self.count()?;
        self.database.put_meta(values, id)
    }
    fn checkpoint(&mut self) -> Result<Option<String>, CopyError> {
        self.database.checkpoint()
    }
    fn put_checkpoint(&mut self, checkpoint: Option<&str>) -> Result<(), CopyError> {
        self.count()?;
        self.database.put_checkpoint(checkpoint)
    }
}

/// Copies until the target has failed after this number of writes, and the source after this number of marks.
async fn interrupted(from: &StoreUrl, to: &StoreUrl, (writes, marks): (usize, usize)) -> Result<(), CopyError> {
    let (from, to, runtime) = (from.clone(), to.clone(), Handle::current());
    let copied = tokio::task::spawn_blocking(move || {
        let side = |url, side| super::open(url, side, Clock::system(), &runtime);
        let mut source = Failing { database: side(&from, Side::Source)?, left: marks };
        let mut target = Failing { database: side(&to, Side::Target)?, left: writes };
        copy_all(&mut source, &mut target).map(drop)
    });
    copied.await.unwrap()
}

#[tokio::test]
async fn an_interrupted_copy_is_refused_and_its_source_is_not() {
    let Some(server) = shared() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut number = 0;
    let mut new = |is_postgres| {
        number += 1;
        let file = sqlite(directory.path(), &format!("{number}.db"));
        if is_postgres { StoreUrl::parse(&server.url()).unwrap() } else { file }
    };
    for (of_postgres, to_postgres) in [(false, true), (true, false)] {
        let from = new(of_postgres);
        write(&from).await;
        let written = everything(&from).await;
        // The mark, eight tables, the row of meta, the checkpoint, and then the mark of the source.
        for at in [(1, 0), (2, 0), (5, 0), (9, 0), (10, 0), (11, 0)] {
            let to = new(to_postgres);
            interrupted(&from, &to, at).await.unwrap_err();
            let refused = taken_over(&to).await.err().unwrap();
            assert!(refused.contains(&format!("it is an unfinished copy of {from}")), "{at:?}: {refused}");
            let refused = copied_once_closed(&from, &to).await.unwrap_err().to_string();
            assert!(refused.contains("remove this one first"), "{at:?}: {refused}");
            assert_eq!(everything(&from).await, written, "{at:?}");
        }
        // All that is left is the mark of the target.
        let to = new(to_postgres);
        interrupted(&from, &to, (11, 1)).await.unwrap_err();
        assert!(taken_over(&from).await.is_err() && taken_over(&to).await.is_err());
        copied_once_closed(&from, &to).await.unwrap();
        assert_eq!(everything(&to).await, written);
        taken_over(&to).await.unwrap();
    }
}

#[tokio::test]
async fn a_store_that_was_moved_goes_on_once_it_is_accepted() {
    let Some(there) = postgres() else { return };
    let directory = tempfile::tempdir().unwrap();
    let here = sqlite(directory.path(), "o.db");
    write(&here).await;
    let codec = EntryCodec { checks: CHECKS, event: event(1), began: |_, _| "began".into() };
    let origin = Some("log".to_owned());
    for (from, to) in [(here, there.clone()), (there, sqlite(directory.path(), "back.db"))] {
        copied(&from, &to).await.unwrap();
        // Those of `keys`.
        let key = SigningKey::of_seed("log", [7; SigningKey::SEED]).unwrap();
        let keys = LogKeys { keys: vec![key], new: NewKeys::default() };
        accept(&from, keys, origin.clone(), codec.clone(), Clock::system()).await.unwrap();
        let (_store, contents) = taken_over(&from).await.unwrap();
        assert_eq!(contents.last_cycle_id, CycleId(42));
    }
}

#[tokio::test]
async fn what_cannot_be_copied_is_refused_and_stays() {
    let Some(there) = postgres() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| sqlite(directory.path(), name);
    let refusal = async |from: &StoreUrl, to: &StoreUrl| copied(from, to).await.unwrap_err().to_string();
    let (here, new) = (file("o.db"), file("new.db"));
    assert!(refusal(&here, &new).await.contains("does not exist"));
    assert!(refusal(&StoreUrl::Memory, &new).await.contains("ends with its process"));
    write(&here).await;
    assert!(refusal(&here, &StoreUrl::Memory).await.contains("ends with its process"));
    assert!(refusal(&here, &here).await.contains("in use"));
    for store in [&here, &there] {
        let (service, contents) = taken_over(store).await.unwrap();
        let noted = Write { epoch: contents.epoch, last_cycle_id: contents.last_cycle_id, ..Write::default() };
        commit(&*service, noted.clone()).await;
        if store == &there {
            // An empty store that is served is not empty.
            assert!(refusal(store, &new).await.contains("was not closed"));
            assert!(refusal(&here, store).await.contains("is not empty"));
        } else {
            assert!(refusal(store, &new).await.contains("in use"));
            drop(service);
            assert!(refusal(store, &new).await.contains("was not closed"));
            let (service, contents) = taken_over(store).await.unwrap();
            commit(&*service, Write { epoch: contents.epoch, close: true, ..noted }).await;
        }
    }
    let other = file("other.db");
    drop(open_store(&other, CHECKS, Clock::system()).await.unwrap());
    assert!(refusal(&other, &new).await.contains("is empty"));
    assert!(!directory.path().join("new.db").exists());
    copied(&here, &other).await.unwrap();
}

#[tokio::test]
async fn a_process_that_took_the_source_over_before_it_was_copied_can_write_nothing() {
    let Some(there) = postgres() else { return };
    write(&there).await;
    let directory = tempfile::tempdir().unwrap();
    let (early, contents) = taken_over(&there).await.unwrap();
    copied(&there, &sqlite(directory.path(), "o.db")).await.unwrap();
    let write = Write { epoch: contents.epoch, last_cycle_id: contents.last_cycle_id, ..Write::default() };
    let refused = early.commit(Arc::new(write)).await.unwrap_err();
    assert!(matches!(refused, StoreError::NotServed { .. }), "{refused}");
}

#[tokio::test]
async fn a_copy_with_another_row_is_not_taken_for_the_store() {
    let Some(there) = postgres() else { return };
    let directory = tempfile::tempdir().unwrap();
    let here = sqlite(directory.path(), "o.db");
    write(&here).await;
    interrupted(&here, &there, (11, 1)).await.unwrap_err();
    let change = "UPDATE outputs SET cycle_id = cycle_id + 1 WHERE name = 'b'";
    shared().unwrap().change(&there.to_string(), change).await;
    let refused = copied(&here, &there).await.unwrap_err().to_string();
    assert!(refused.contains("other rows in its table outputs"), "{refused}");
    assert!(taken_over(&there).await.is_err());
}
