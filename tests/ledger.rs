//! The log of the history: each record is a leaf, and changed records are recognized.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::path::Path;

use common::{
    Stage, patiently,
    service::{Home, because, decode, next_event, reason},
};
use orchestrator_core::{
    ledger::{Entry, Frontier, Hash, Node},
    proto::orchestrator::v1::{self as pb, ControlEntry, LogEntry, cycle_event::Event},
};
use prost::Message;
use rusqlite::{Connection, params};
use tonic::Code;

/// The numbers and hashes in the table of complete nodes.
fn hashes(database: &Connection) -> Vec<(u64, Hash)> {
    let mut query = database.prepare("SELECT id, hash FROM hashes ORDER BY id").unwrap();
    let rows = query.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?))).unwrap();
    rows.map(|row| row.map(|(id, hash)| (id.unsigned_abs(), Hash(hash))).unwrap()).collect()
}

/// The entries in the database, by their leaves, as the contract encodes them.
fn entries(database: &Connection) -> Vec<(u64, Vec<u8>)> {
    let rows = "SELECT leaf, record, TRUE FROM cycles WHERE leaf IS NOT NULL
                UNION ALL SELECT leaf, entry, FALSE FROM control ORDER BY leaf";
    let mut query = database.prepare(rows).unwrap();
    let entries = query.query_map([], |row| {
        let (leaf, stored): (i64, Vec<u8>) = (row.get(0)?, row.get(1)?);
        let entry = if row.get(2)? { Entry::Cycle(&stored) } else { Entry::Control(&stored) };
        Ok((leaf.unsigned_abs(), entry.to_bytes()))
    });
    entries.unwrap().map(Result::unwrap).collect()
}

/// The log that consists of these entries, with all its nodes.
fn log_of(entries: &[(u64, Vec<u8>)]) -> (Frontier, Vec<(u64, Hash)>) {
    let mut log = Frontier::default();
    let mut nodes = Vec::new();
    for (leaf, entry) in entries {
        assert_eq!(*leaf, log.size(), "leaves are dense");
        nodes.extend(log.append(Hash::of_leaf([&entry[..]])));
    }
    (log, (0..).zip(nodes).collect())
}

fn database(path: &Path) -> Connection {
    Connection::open(path).unwrap()
}

#[tokio::test]
async fn each_record_is_a_leaf_of_the_log_from_its_commit_on() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.record_output = true).await;
    for cycles in 1..=5 {
        let cycle = stage.client.run().await.unwrap();
        let database = database(&stage.home.path("o.db"));
        let entries = entries(&database);
        assert_eq!(entries.len(), cycles);
        assert_eq!(log_of(&entries).1, hashes(&database));
        let entry = LogEntry::decode(&entries[cycles - 1].1[..]).unwrap().entry;
        let Some(pb::log_entry::Entry::Cycle(record)) = entry else { panic!("{entry:?}") };
        assert_eq!(decode(record), cycle);
    }
    // It goes on in the next process, also with the records of cycles that were interrupted.
    stage.fleet.run("a", common::fleet::Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 6).await;
    let mut stage = stage.killed().await;
    stage.fleet.run("a", common::fleet::Run::Echo);
    stage.client.run().await.unwrap();
    let database = database(&stage.home.path("o.db"));
    let entries = entries(&database);
    assert_eq!(entries.len(), 7);
    assert_eq!(log_of(&entries).1, hashes(&database));
}

#[tokio::test]
async fn records_of_an_earlier_version_are_not_in_the_log_and_later_ones_are() {
    let mut stage = Stage::new().await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let earlier = "ALTER TABLE cycles DROP COLUMN leaf; ALTER TABLE meta DROP COLUMN log_size;
                   ALTER TABLE meta DROP COLUMN log_first_kept; DROP TABLE hashes; DROP TABLE control;
                   PRAGMA user_version = 4";
    database(&home.path("o.db")).execute_batch(earlier).unwrap();
    let mut stage = Stage::again(fleet, home).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.cycle_id, 4);
    let database = database(&stage.home.path("o.db"));
    let entries = entries(&database);
    assert_eq!((entries.len(), log_of(&entries).1), (1, hashes(&database)));
    assert_eq!(stage.client.history().await.unwrap().len(), 4);
}

/// What is left proves that it was there, and what is gone was removed by retention.
#[tokio::test]
async fn retention_appends_what_it_removes_and_keeps_what_proofs_of_the_rest_need() {
    let home = Home::new().with_args(["--set", "store.retention.max_cycles=5"]);
    let mut stage = Stage::at(home).await;
    let mut all = Vec::new();
    for cycle in 0..70 {
        let cycle_id = stage.client.run().await.unwrap().cycle_id;
        let record = stage.client.get_cycle(pb::GetCycleRequest { cycle_id }).await.unwrap().into_inner().telemetry;
        all.push((cycle, Entry::Cycle(&record).to_bytes()));
    }
    let removed = async { while stage.client.status().await.unwrap().oldest_revision < 60 {} };
    patiently("old records to be removed", removed).await;
    assert!(stage.service.stop().await.success());
    let database = database(&stage.home.path("o.db"));
    let kept = entries(&database);
    let (control, records): (Vec<_>, Vec<_>) = kept.iter().cloned().partition(|(_, entry)| entry[0] == 0x1a);
    let mut gone = Vec::new();
    let mut first_kept = 0;
    for (_, entry) in &control {
        let entry = LogEntry::decode(&entry[..]).unwrap().entry;
        let Some(pb::log_entry::Entry::Control(ControlEntry { entry })) = entry else { panic!("{entry:?}") };
        let Some(pb::control_entry::Entry::RecordsPruned(pruned)) = entry else { panic!("{entry:?}") };
        gone.extend(pruned.leaves.iter().flat_map(|range| range.first..range.first + range.count));
        first_kept = pruned.first_kept;
    }
    assert_eq!(gone, (0..first_kept).collect::<Vec<_>>());
    assert!((59..70).contains(&first_kept) && records[0].0 == first_kept, "{first_kept}: {records:?}");

    // The whole log, of what was there and is there, has the nodes that are left.
    let mut whole: Vec<_> = all.into_iter().filter(|(leaf, _)| *leaf < first_kept).collect();
    whole.extend(kept);
    let (_, nodes) = log_of(&whole);
    let needed: Vec<_> = Frontier::nodes(first_kept).into_iter().map(Node::number).collect();
    let is_left = |number: &u64| *number >= Node::complete_with(first_kept) || needed.contains(number);
    assert_eq!(hashes(&database), nodes.into_iter().filter(|(number, _)| is_left(number)).collect::<Vec<_>>());
}

/// A fault of the disk, as far as the database itself does not notice it.
#[tokio::test]
async fn a_record_with_a_flipped_bit_is_named_and_never_served() {
    const FLIPS: usize = 1000;
    const CYCLES: usize = 50;
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    for _ in 0..CYCLES {
        stage.client.run().await.unwrap();
    }
    let mut database = database(&stage.home.path("o.db"));
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let records = {
        let mut query = database.prepare("SELECT record FROM cycles ORDER BY cycle_id").unwrap();
        let records = query.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
        records.collect::<Result<Vec<_>, _>>().unwrap()
    };
    for _ in 0..FLIPS / CYCLES {
        let transaction = database.transaction().unwrap();
        for (cycle_id, record) in (1_i64..).zip(&records) {
            let mut flipped = record.clone();
            flipped[random.usize(..record.len())] ^= 1 << random.u32(..8);
            let flip = "UPDATE cycles SET record = ?2 WHERE cycle_id = ?1";
            transaction.execute(flip, params![cycle_id, flipped]).unwrap();
        }
        transaction.commit().unwrap();
        for cycle_id in 1..=CYCLES as u64 {
            let refused = stage.client.cycle(cycle_id).await.unwrap_err();
            let id = cycle_id.to_string();
            let expected = [("cycle_id", &id[..]), ("revision", &id[..])];
            assert_eq!(reason(&refused), because(Code::DataLoss, "RECORD_UNREADABLE", expected));
            assert!(refused.message().contains(&format!("the record of cycle {id}")), "{refused:?}");
            assert!(refused.message().contains("its bytes were changed"), "{refused:?}");
        }
        let page = stage.client.list_cycles(pb::ListCyclesRequest::default()).await.unwrap().into_inner();
        assert_eq!((page.cycles.len(), page.unreadable.len()), (0, CYCLES));
    }
    // Watchers that read from the store get none of them, either.
    let mut stage = stage.restarted().await;
    let mut stream = stage.client.watch_after(0).await.unwrap();
    for revision in 1..=CYCLES as u64 {
        let Some(Event::Unreadable(cycle)) = next_event(&mut stream).await.unwrap().event else { panic!("{revision}") };
        assert_eq!(cycle.revision, revision);
    }
}
