//! The log of the history: each record is a leaf, and changed records are recognized.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
#[cfg(target_os = "linux")]
use std::{
    env,
    future::{pending, ready},
    sync::Arc,
};

#[cfg(target_os = "linux")]
use crate::common::disk;
use crate::common::{
    Stage, command,
    door::Door,
    patiently,
    service::{Home, Service, because, decode, invalid, next_event, reason},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
#[cfg(target_os = "linux")]
use orchestrator_core::{config::Config, host::Host, model::Begin, serve, transport::Sockets};
use orchestrator_core::{
    ledger::{
        BundleError, Checkpoint, Consistency, Content, Entry, Frontier, Hash, Inclusion, LogVerifier, Node, Part, Pin,
        Signer, SigningKey, VerifyingKey,
    },
    proto::orchestrator::v1::{
        self as pb, ControlEntry, LogBeganReason, LogEntry, cycle_event::Event, ledger_client::LedgerClient, log_part,
        read_entries_response,
    },
};
use prost::Message;
use rusqlite::{Connection, params};
use tokio::io::{AsyncBufReadExt, BufReader};
#[cfg(target_os = "linux")]
use tokio::runtime::Builder;
use tonic::{Code, Response, Status, transport::Channel};

/// The numbers and hashes in the table of complete nodes.
fn hashes(database: &Connection) -> Vec<(u64, Hash)> {
    let mut query = database.prepare("SELECT id, hash FROM hashes ORDER BY id").unwrap();
    let rows = query.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?))).unwrap();
    rows.map(|row| row.map(|(id, hash)| (id.unsigned_abs(), Hash(hash))).unwrap()).collect()
}

/// The entries in the database, by their leaves, as the contract encodes them.
fn entries(database: &Connection) -> Vec<(u64, Vec<u8>)> {
    let rows = "SELECT leaf, record, 1 FROM cycles WHERE leaf IS NOT NULL
                UNION ALL SELECT leaf, event, 2 FROM audit UNION ALL SELECT leaf, entry, 3 FROM control ORDER BY leaf";
    let mut query = database.prepare(rows).unwrap();
    let entries = query.query_map([], |row| {
        let (leaf, stored): (i64, Vec<u8>) = (row.get(0)?, row.get(1)?);
        let entry = match row.get(2)? {
            1 => Entry::Cycle(&stored),
            2 => Entry::Audit(&stored),
            _ => Entry::Control(&stored),
        };
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

/// Writes the database as the software of this version of the schema would have written it: without what came later.
fn write_as_version(version: usize, path: &Path) {
    let later = path.with_extension("later");
    fs::rename(path, &later).unwrap();
    let earlier = database(path);
    for migration in include_str!("../../src/store/sqlite/schema.sql").split("-- migration ").skip(1).take(version) {
        earlier.execute_batch(migration.split_once('\n').unwrap().1).unwrap();
    }
    earlier.execute("ATTACH ?1 AS later", [later.to_str().unwrap()]).unwrap();
    let columns = |schema: &str, table: &str| {
        let mut query = earlier.prepare("SELECT name FROM pragma_table_info(?2, ?1)").unwrap();
        let columns = query.query_map([schema, table], |row| row.get(0)).unwrap();
        columns.collect::<rusqlite::Result<Vec<String>>>().unwrap()
    };
    for table in ["meta", "cycles", "open_cycles", "outputs", "subsystems", "loops"] {
        let known = columns("later", table);
        let columns: Vec<_> = columns("main", table).into_iter().filter(|column| known.contains(column)).collect();
        let columns = columns.join(", ");
        let copy = format!("DELETE FROM {table}; INSERT INTO {table} ({columns}) SELECT {columns} FROM later.{table}");
        earlier.execute_batch(&copy).unwrap();
    }
    earlier
        .execute_batch("UPDATE counts SET cycles = (SELECT count(*) FROM cycles WHERE cycles.state = counts.state)")
        .unwrap();
    earlier.pragma_update(None, "application_id", 0x4472_6d4f).unwrap();
    earlier.pragma_update(None, "user_version", i64::try_from(version).unwrap()).unwrap();
}

#[tokio::test]
async fn each_record_is_a_leaf_of_the_log_from_its_commit_on_and_the_event_of_its_call_follows_it() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.record_output = true).await;
    for cycles in 1..=5 {
        let cycle = stage.client.run().await.unwrap();
        let database = database(&stage.home.path("o.db"));
        let entries = entries(&database);
        // The registration is the first entry.
        assert_eq!(entries.len(), 1 + 2 * cycles);
        assert_eq!(log_of(&entries).1, hashes(&database));
        let entry = LogEntry::decode(&entries[2 * cycles - 1].1[..]).unwrap().entry;
        let Some(pb::log_entry::Entry::Cycle(record)) = entry else { panic!("{entry:?}") };
        assert_eq!(decode(record), cycle);
    }
    // It goes on in the next process, also with the records of cycles that were interrupted.
    stage.fleet.run("a", crate::common::fleet::Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 6).await;
    let mut stage = stage.killed().await;
    stage.fleet.run("a", crate::common::fleet::Run::Echo);
    stage.client.run().await.unwrap();
    let database = database(&stage.home.path("o.db"));
    let entries = entries(&database);
    assert_eq!(entries.len(), 1 + 2 * 7);
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
    write_as_version(4, &home.path("o.db"));
    fs::remove_file(home.path("o.db.checkpoint")).unwrap();
    let mut stage = Stage::again(fleet, home).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.cycle_id, 4);
    let database = database(&stage.home.path("o.db"));
    let entries = entries(&database);
    assert_eq!((entries.len(), log_of(&entries).1), (2, hashes(&database)));
    assert_eq!(stage.client.history().await.unwrap().len(), 4);
}

/// What is left proves that it was there, and what is gone was removed by retention.
#[tokio::test]
async fn retention_appends_what_it_removes_and_keeps_the_hashes_of_the_rest() {
    let home = Home::new().with_args(["--set", "store.retention.max_cycles=5"]);
    let mut stage = Stage::at(home).await;
    let mut records = Vec::new();
    for _ in 0..70 {
        let cycle_id = stage.client.run().await.unwrap().cycle_id;
        let record = stage.client.get_cycle(pb::GetCycleRequest { cycle_id }).await.unwrap().into_inner().telemetry;
        records.push(Entry::Cycle(&record).to_bytes());
    }
    let removed = async { while stage.client.status().await.unwrap().oldest_revision < 60 {} };
    patiently("old records to be removed", removed).await;
    assert!(stage.service.stop().await.success());
    let database = database(&stage.home.path("o.db"));
    let kept = entries(&database);
    let mut gone = Vec::new();
    for (_, entry) in kept.iter().filter(|(_, entry)| entry[0] == 0x1a) {
        let entry = LogEntry::decode(&entry[..]).unwrap().entry;
        let Some(pb::log_entry::Entry::Control(ControlEntry { entry })) = entry else { panic!("{entry:?}") };
        let Some(pb::control_entry::Entry::RecordsPruned(pruned)) = entry else { panic!("{entry:?}") };
        gone.extend(pruned.leaves.iter().flat_map(|range| range.first..range.first + range.count));
        assert_eq!(pruned.first_kept, 1, "the event of the first call");
    }
    assert!((59..70).contains(&gone.len()), "{gone:?}");
    // The whole log, of what was there and is there, has the nodes that are left. An event stands between each two
    // records, so that none are left out.
    let mut whole: Vec<_> = gone.into_iter().zip(records).chain(kept).collect();
    whole.sort_unstable();
    let (_, nodes) = log_of(&whole);
    assert_eq!(hashes(&database), nodes);
}

/// The hashes of a log with an old entry that is kept, and thousands of removed ones after it.
#[tokio::test]
async fn an_old_event_is_proved_by_few_hashes_after_all_later_records_were_removed() {
    let home = Home::new().with_args(["--set", "store.retention.max_cycles=5"]);
    let mut stage = Stage::at(home.with_config("[[loops]]\nname = \"fast\"\ninterval = \"10ms\"\n")).await;
    // Its event is in the log from here on. Cycles of the loop have none.
    stage.client.run().await.unwrap();
    let removed = async {
        loop {
            let status = stage.client.status().await.unwrap();
            if status.oldest_revision > 200 {
                return status;
            }
        }
    };
    patiently("hundreds of records to be removed", removed).await;
    let mut ledger = ledger(&stage).await;
    let mut list = async |request| ledger.list_audit_events(request).await.unwrap().into_inner().events;
    let [event] = &list(pb::ListAuditEventsRequest::default()).await[..] else { panic!("one event") };
    let event = event.clone();

    let mut ledger = self::ledger(&stage).await;
    let request = pb::GetInclusionProofRequest { event_leaf: Some(event.leaf), ..Default::default() };
    let proved = ledger.get_inclusion_proof(request).await.unwrap().into_inner();
    let signed = checkpoint(&mut ledger).await.1.open(&proved.checkpoint).unwrap();
    assert_eq!(proved.entry, Entry::Audit(&event.event).to_bytes());
    let proof = Inclusion(hashes_of(&proved.hashes));
    let leaf = Hash::of_leaf([&proved.entry[..]]);
    assert_eq!(proof.verify(event.leaf, leaf, signed.size, signed.root), Ok(()));
    // A log that ends among what is gone can't be compared any more: the hash of its last entry is not there.
    let (_, parts) = read_log(&mut ledger, 0, 0).await.unwrap();
    let gone = parts.iter().map(|part| part.subtree.leaves()).find(|leaves| leaves.end - leaves.start > 1).unwrap();
    let size = gone.start + 1;
    let refused = consistency(&mut ledger, size, 0).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::OutOfRange, "HASHES_REMOVED", [("size", &size.to_string())]));

    assert!(stage.service.stop().await.success());
    let database = database(&stage.home.path("o.db"));
    let (entries, hashes) = (entries(&database).len(), hashes(&database).len());
    println!("{} entries were written, {entries} are kept, with {hashes} hashes", signed.size);
    // Less than a path of 10 for each entry that is kept. A log that forgets nothing has two for each that was written.
    assert!(hashes < 10 * entries && 2 * (hashes as u64) < 3 * signed.size, "{hashes}");
}

#[tokio::test]
async fn an_event_is_proved_by_its_leaf_and_no_other_entry_is() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let mut ledger = ledger(&stage).await;
    let mut prove = async |cycle_id, event_leaf| {
        let request = pb::GetInclusionProofRequest { cycle_id, event_leaf: Some(event_leaf), ..Default::default() };
        ledger.get_inclusion_proof(request).await.map(Response::into_inner)
    };
    assert_eq!(prove(0, 1).await.unwrap().entry[0], 0x12, "an audit event");
    for (leaf, name) in [(0, "0"), (2, "2"), (u64::MAX, "18446744073709551615")] {
        let refused = prove(0, leaf).await.unwrap_err();
        assert_eq!(reason(&refused), because(Code::NotFound, "EVENT_NOT_FOUND", [("leaf", name)]));
    }
    assert_eq!(reason(&prove(1, 1).await.unwrap_err()), invalid(["event_leaf"]));
    let database = database(&stage.home.path("o.db"));
    database.execute("UPDATE audit SET event = CAST(event || x'00' AS BLOB)", []).unwrap();
    let refused = prove(0, 1).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::DataLoss, "EVENT_UNREADABLE", [("leaf", "1")]));
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

// ---------------------------------------------------------------------------------------------------------------
// Checkpoints and proofs

type Ledger = LedgerClient<Channel>;

async fn ledger(stage: &Stage) -> Ledger {
    LedgerClient::connect(format!("http://{}", stage.service.address())).await.unwrap()
}

async fn checkpoint(ledger: &mut Ledger) -> (String, VerifyingKey) {
    let answer = ledger.get_checkpoint(pb::GetCheckpointRequest {}).await.unwrap().into_inner();
    (answer.checkpoint, answer.keys[0].parse().unwrap())
}

async fn inclusion(ledger: &mut Ledger, cycle_id: u64, size: u64) -> Result<pb::GetInclusionProofResponse, Status> {
    let request = pb::GetInclusionProofRequest { cycle_id, size, ..Default::default() };
    ledger.get_inclusion_proof(request).await.map(Response::into_inner)
}

async fn consistency(
    ledger: &mut Ledger,
    from_size: u64,
    size: u64,
) -> Result<pb::GetConsistencyProofResponse, Status> {
    ledger.get_consistency_proof(pb::GetConsistencyProofRequest { from_size, size }).await.map(Response::into_inner)
}

fn hashes_of(hashes: &[Bytes]) -> Vec<Hash> {
    hashes.iter().map(|hash| Hash(hash[..].try_into().unwrap())).collect()
}

#[tokio::test]
async fn a_record_is_proved_by_its_bytes_and_a_signed_checkpoint_from_disk_and_in_memory() {
    for home in [Home::new(), Home::new().in_memory()] {
        let mut stage = Stage::at(home).await;
        let mut ledger = ledger(&stage).await;
        let (empty, key) = checkpoint(&mut ledger).await;
        assert_eq!(key.open(&empty).unwrap().size, 0);
        for cycle_id in 1..=3 {
            let cycle = stage.client.run().await.unwrap();
            // It waits for a checkpoint with the record.
            let proved = inclusion(&mut ledger, cycle_id, 0).await.unwrap();
            let signed = key.open(&proved.checkpoint).unwrap();
            // Each record is followed by the event of its call.
            assert_eq!((signed.size, proved.leaf), (proved.size, 2 * (cycle_id - 1)));
            let leaf = Hash::of_leaf([&proved.entry[..]]);
            let proof = Inclusion(hashes_of(&proved.hashes));
            assert_eq!(proof.verify(proved.leaf, leaf, signed.size, signed.root), Ok(()));
            let Some(pb::log_entry::Entry::Cycle(record)) = LogEntry::decode(proved.entry).unwrap().entry else {
                panic!()
            };
            assert_eq!(decode(record), cycle);
        }
        let (newest, _) = checkpoint(&mut ledger).await;
        let newest = key.open(&newest).unwrap();
        let earlier = inclusion(&mut ledger, 2, 3).await.unwrap();
        assert_eq!((earlier.size, earlier.checkpoint.as_str()), (3, ""));
        let proved = consistency(&mut ledger, 0, 0).await.unwrap();
        assert_eq!((proved.size, proved.hashes.len()), (6, 0));
        let log = log_of(&[]).0;
        assert_eq!(Consistency(Vec::new()).verify((0, log.root()), (newest.size, newest.root)), Ok(()));

        for refused in [
            inclusion(&mut ledger, 3, 4).await.unwrap_err(),
            inclusion(&mut ledger, 3, 7).await.unwrap_err(),
            consistency(&mut ledger, 7, 6).await.unwrap_err(),
            consistency(&mut ledger, 1, u64::MAX).await.unwrap_err(),
            consistency(&mut ledger, u64::MAX, 0).await.unwrap_err(),
        ] {
            assert_eq!(reason(&refused), because(Code::OutOfRange, "NOT_IN_LOG", [("size", "6")]));
        }
        let unknown = inclusion(&mut ledger, 9, 0).await.unwrap_err();
        assert_eq!(reason(&unknown), because(Code::NotFound, "CYCLE_NOT_FOUND", [("cycle_id", "9")]));
        assert_eq!(reason(&inclusion(&mut ledger, 0, 0).await.unwrap_err()), invalid(["cycle_id"]));
    }
}

#[tokio::test]
async fn the_checkpoint_beside_the_database_has_all_entries_at_the_end_and_the_next_process_extends_it() {
    let mut stage = Stage::new().await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let key = checkpoint(&mut ledger(&stage).await).await.1;
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let mode = |file: &str| fs::metadata(home.path(file)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("o.db.key"), 0o600);
    let first = key.open(&fs::read_to_string(home.path("o.db.checkpoint")).unwrap()).unwrap();
    assert_eq!(first.size, 6);
    assert!(first.origin.starts_with("orchestrator/"), "{}", first.origin);

    let mut stage = Stage::again(fleet, home).await;
    let mut ledger = ledger(&stage).await;
    assert_eq!(checkpoint(&mut ledger).await.1, key, "the key stays the same");
    stage.client.run().await.unwrap();
    let proved = inclusion(&mut ledger, 4, 0).await.unwrap();
    let second = key.open(&proved.checkpoint).unwrap();
    let extension = Consistency(hashes_of(&consistency(&mut ledger, 6, 8).await.unwrap().hashes));
    assert_eq!(extension.verify((first.size, first.root), (second.size, second.root)), Ok(()));
    assert_eq!(first.origin, second.origin);
}

#[tokio::test]
async fn a_log_has_the_name_and_the_keys_that_the_configuration_gives() {
    let home = Home::new();
    let keys = ["old.key", "new.key"].map(|name| home.path(name).display().to_string());
    let set = format!("ledger.key_files=[\"{}\", \"{}\"]", keys[0], keys[1]);
    let stage = Stage::at(home.with_args(["--set", set.as_str(), "--set", "ledger.origin=example.org/log"])).await;
    let mut ledger = ledger(&stage).await;
    let answer = ledger.get_checkpoint(pb::GetCheckpointRequest {}).await.unwrap().into_inner();
    assert_eq!(answer.keys.len(), 2);
    for key in answer.keys {
        let key: VerifyingKey = key.parse().unwrap();
        let opened = key.open(&answer.checkpoint).unwrap();
        assert_eq!((key.name(), opened.origin.as_str()), ("example.org/log", "example.org/log"));
    }
    assert!(!stage.home.path("o.db.key").exists());
}

#[tokio::test]
async fn a_key_that_others_can_read_is_refused() {
    let home = Home::new();
    assert!(home.serve().await.stop().await.success());
    fs::set_permissions(home.path("o.db.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let ended = home.try_serve().await.err().unwrap();
    assert_eq!(ended.code(), Some(1), "{}", home.log());
    assert!(
        home.log().contains("o.db.key has mode 0644, so that other users of this machine could use it"),
        "{}",
        home.log()
    );
}

#[tokio::test]
async fn a_log_that_lacks_its_end_or_is_another_one_keeps_the_checkpoint() {
    let mut stage = Stage::new().await;
    for _ in 0..2 {
        stage.client.run().await.unwrap();
    }
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let older = fs::read(home.path("o.db")).unwrap();
    let mut stage = Stage::again(fleet, home).await;
    stage.client.run().await.unwrap();
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());

    // The same file with older contents.
    fs::write(home.path("o.db"), older).unwrap();
    let Stage { home, service, .. } = Stage::again(fleet, home).await;
    assert!(home.log().contains("a new log begins: its log has size 4, and its checkpoint 6"), "{}", home.log());
    assert!(home.path("o.db.checkpoint.lost").exists());
    assert!(service.stop().await.success());

    // It has as many entries as the checkpoint now, and other ones.
    fs::copy(home.path("o.db.checkpoint.lost"), home.path("o.db.checkpoint")).unwrap();
    assert!(home.serve().await.stop().await.success());
    assert!(home.log().contains("its log is not that of its checkpoint, up to the size 6 of that"), "{}", home.log());
}

/// The home of a service that was killed after this number of syncs of its files, and some more.
#[cfg(target_os = "linux")]
async fn synced_often(times: usize) -> Home {
    let mut stage = Stage::at(disk::with_journal()).await;
    // The machine has restarted since, at each of the points.
    database(&stage.home.path("o.db")).execute("UPDATE meta SET boot_id = 'before'", []).unwrap();
    stage.register("a", |_| {}).await;
    let syncs = |home: &Home| {
        let mut journal = disk::journal(home);
        std::iter::from_fn(|| journal.next_sync().map(drop)).count()
    };
    while syncs(&stage.home) < times + 10 {
        for _ in 0..50 {
            stage.client.admit().await.unwrap();
            stage.client.run().await.unwrap();
        }
    }
    let Stage { home, service, .. } = stage;
    service.kill().await;
    home
}

/// A machine loses power after each sync, with everything that was not synced. What a process has published is the
/// worst case: a checkpoint is read from then on when its file is synced, before that is renamed.
#[cfg(target_os = "linux")]
#[test]
fn after_a_power_failure_the_log_extends_the_last_checkpoint() {
    let points = env::var("ORCHESTRATOR_TEST_POWER_FAILURES").map_or(100, |text| text.parse().unwrap());
    let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
    let home = runtime.block_on(synced_often(points));
    drop(runtime);
    let key = stolen(&home);
    let config = format!(
        "server.listen = \"127.0.0.1:0\"\nadmin.listen = \"off\"\nstore.url = \"sqlite:{}\"\n",
        home.path("o.db").display()
    );
    let config = Config::from_toml_str("test.toml", &config).unwrap();
    let mut journal = disk::journal(&home);
    let (mut point, mut published) = (0, None);
    while point < points {
        let (synced, files) = journal.next_sync().unwrap();
        if synced.starts_with("o.db.checkpoint.") {
            published = Some(String::from_utf8(files[&synced].clone()).unwrap());
        }
        let Some(published) = &published else { continue };
        for name in ["o.db", "o.db-wal"] {
            // They stay the same files.
            fs::write(home.path(name), files.get(name).map_or(&[][..], Vec::as_slice)).unwrap();
        }
        let _ = fs::remove_file(home.path("o.db-shm"));
        let _ = fs::remove_file(home.path("o.db.last"));
        fs::write(home.path("o.db.checkpoint"), published).unwrap();
        point += 1;

        let served = async || {
            let service =
                serve::Service::start(&config, Begin::Again, Host::system(), Arc::new(Sockets::default())).await;
            service.map_err(|error| error.to_string())?.run(ready(()), async || pending().await).await;
            Ok::<_, String>(())
        };
        // The files are free once all of its tasks are gone, and no process is left that another test has forked
        // meanwhile: it has them open as well until it runs its own program.
        let in_use = format!("in use by another process (pid {})", std::process::id());
        let ended = loop {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            match runtime.block_on(served()) {
                Err(error) if error.contains(&in_use) => {}
                ended => break ended,
            }
        };
        assert_eq!(ended, Ok(()), "point {point}, after {synced}");
        let database = database(&home.path("o.db"));
        assert_eq!(new_logs(&database), [], "point {point}, after {synced}");
        let earlier = key.verifying().open(published).unwrap();
        let later = fs::read_to_string(home.path("o.db.checkpoint")).unwrap();
        let later = key.verifying().open(&later).unwrap();
        let mut log = Frontier::default();
        for (leaf, entry) in entries(&database) {
            if leaf == earlier.size {
                assert_eq!(log.root(), earlier.root, "point {point}, after {synced}");
            }
            log.append(Hash::of_leaf([&entry[..]]));
        }
        assert!(later.size >= earlier.size, "point {point}, after {synced}");
        assert_eq!((log.size(), log.root()), (later.size, later.root), "point {point}, after {synced}");
    }
}

/// Proofs in the form that `tests/witness` reads.
async fn proofs(ledger: &mut Ledger, cycle_id: u64, earlier: &str, earlier_size: u64) -> serde_json::Value {
    let proved = inclusion(ledger, cycle_id, 0).await.unwrap();
    let extension = consistency(ledger, earlier_size, proved.size).await.unwrap();
    let base64 = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    let all = |hashes: &[Bytes]| hashes.iter().map(|hash| base64(hash)).collect::<Vec<_>>();
    serde_json::json!({
        "key": checkpoint(ledger).await.1.to_string(),
        "checkpoint": proved.checkpoint,
        "entry": base64(&proved.entry),
        "leaf": proved.leaf,
        "inclusion": all(&proved.hashes),
        "earlier": earlier,
        "extension": all(&extension.hashes),
    })
}

/// The program in `tests/witness`, which `.ci/run` builds: its exit code and what it says.
fn witness(proofs: &serde_json::Value) -> (Option<i32>, String) {
    let mut witness = Command::new("ledger-witness");
    witness.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut witness = witness.spawn().unwrap_or_else(|error| panic!("tests/witness, built as ledger-witness: {error}"));
    witness.stdin.take().unwrap().write_all(proofs.to_string().as_bytes()).unwrap();
    let output = witness.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The same program, with a key and a bundle.
fn witness_bundle(key: &VerifyingKey, bundle: &Path) -> (Option<i32>, String) {
    let mut witness = Command::new("ledger-witness");
    witness.arg(key.to_string()).stdin(fs::File::open(bundle).unwrap());
    let output = witness.output().unwrap_or_else(|error| panic!("tests/witness, built as ledger-witness: {error}"));
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs tests/witness, which Go builds"]
async fn independent_software_verifies_a_bundle() {
    let empty = Home::new();
    let (home, key) = verified_home().await;
    let home = home.with_args(["--set", "store.retention.max_cycles=100"]);
    for (home, is_whole) in [(&home, true), (&empty, false)] {
        let service = home.serve().await;
        let bundle = home.path("b.jsonl");
        assert_eq!(call(Some(service.address()), &["export", "--to", bundle.to_str().unwrap()]).await.0, 0);
        if !is_whole {
            let key =
                Pin::from_json(fs::read_to_string(&bundle).unwrap().lines().next().unwrap()).unwrap().open().unwrap().1;
            assert_eq!(witness_bundle(&key, &bundle), (Some(0), String::new()));
            continue;
        }
        assert_eq!(witness_bundle(&key, &bundle), (Some(0), String::new()));
        let count = fs::read_to_string(&bundle).unwrap().lines().count();
        for place in 0..count {
            let without = rewritten(&bundle, |lines| drop(lines.remove(place)));
            assert_eq!(witness_bundle(&key, &without).0, Some(1), "without line {place}");
        }
        let doubled = rewritten(&bundle, |lines| lines.push(lines[count - 1].clone()));
        assert_eq!(witness_bundle(&key, &doubled).0, Some(1));
    }
}

#[tokio::test]
#[ignore = "needs tests/witness, which Go builds"]
async fn independent_software_verifies_the_proofs() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.record_output = true).await;
    let mut ledger = ledger(&stage).await;
    for _ in 0..7 {
        stage.client.run().await.unwrap();
    }
    let earlier = inclusion(&mut ledger, 7, 0).await.unwrap();
    for _ in 0..6 {
        stage.client.run().await.unwrap();
    }
    inclusion(&mut ledger, 13, 0).await.unwrap();
    for cycle_id in 1..=13 {
        let proofs = proofs(&mut ledger, cycle_id, &earlier.checkpoint, earlier.size).await;
        assert_eq!(witness(&proofs), (Some(0), String::new()), "{proofs}");
        let changed = |key: &str, value: serde_json::Value| {
            let mut changed = proofs.clone();
            changed[key] = value;
            witness(&changed).0
        };
        assert_eq!(
            changed("entry", proofs["checkpoint"].as_str().map(|it| BASE64_STANDARD.encode(it)).into()),
            Some(1)
        );
        assert_eq!(changed("leaf", (proofs["leaf"].as_u64().unwrap() ^ 1).into()), Some(1));
        assert_eq!(changed("extension", serde_json::json!([])), Some(1));
        let forged = proofs["checkpoint"].as_str().unwrap().replacen("\n27\n", "\n26\n", 1);
        assert_eq!(changed("checkpoint", forged.into()), Some(1));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Reading the log

/// The extent of the log from this leaf on, and its parts.
async fn read_log(ledger: &mut Ledger, from_leaf: u64, size: u64) -> Result<(pb::LogExtent, Vec<Part>), Status> {
    let mut stream = ledger.read_entries(pb::ReadEntriesRequest { from_leaf, size }).await?.into_inner();
    let (mut extent, mut parts) = (None, Vec::new());
    while let Some(message) = patiently("the next part", stream.message()).await? {
        let pb::LogPart { first, count, content } = match message.response.unwrap() {
            read_entries_response::Response::Extent(first) => {
                assert_eq!(extent.replace(first), None);
                continue;
            }
            read_entries_response::Response::Part(part) => part,
        };
        let content = match content.unwrap() {
            log_part::Content::Entry(entry) => Content::Entry(entry),
            log_part::Content::Hash(hash) => Content::Hash(Hash(hash[..].try_into().unwrap())),
        };
        assert!(extent.is_some(), "the extent comes first");
        parts.push(Part { subtree: Node::of_leaves(first, count).unwrap(), content });
    }
    Ok((extent.unwrap(), parts))
}

/// Verifies these parts against this checkpoint.
fn verify_parts(parts: &[Part], checkpoint: Checkpoint, earlier: Option<Checkpoint>) -> Result<(), BundleError> {
    let mut verifier = LogVerifier::new(checkpoint, earlier)?;
    parts.iter().try_for_each(|part| verifier.add(part))?;
    verifier.end()
}

/// The entries among these parts, by their leaves.
fn entries_of(parts: &[Part]) -> BTreeMap<u64, Bytes> {
    let entry = |part: &Part| match &part.content {
        Content::Entry(entry) => Some((part.subtree.leaves().start, entry.clone())),
        Content::Hash(_) => None,
    };
    parts.iter().filter_map(entry).collect()
}

#[tokio::test]
async fn the_log_is_read_by_its_exact_entries_and_verified_also_after_retention() {
    for home in [Home::new(), Home::new().in_memory()] {
        let mut stage = Stage::at(home.with_args(["--set", "store.retention.max_cycles=5"])).await;
        let mut ledger = ledger(&stage).await;
        let key = checkpoint(&mut ledger).await.1;
        let (extent, parts) = read_log(&mut ledger, 0, 0).await.unwrap();
        assert_eq!((extent.size, parts.len()), (0, 0), "the empty log");
        verify_parts(&parts, key.open(&extent.checkpoint).unwrap(), None).unwrap();
        for _ in 0..9 {
            stage.client.run().await.unwrap();
        }
        let earlier = inclusion(&mut ledger, 9, 0).await.unwrap();
        let (extent, before) = read_log(&mut ledger, 0, 18).await.unwrap();
        assert_eq!((extent.size, extent.checkpoint.as_str(), before.len()), (18, "", 18));
        assert_eq!(entries_of(&before)[&16], earlier.entry);
        for _ in 0..60 {
            stage.client.run().await.unwrap();
        }
        let removed = async { while stage.client.status().await.unwrap().oldest_revision < 50 {} };
        patiently("old records to be removed", removed).await;
        // Its record is after the removal.
        let cycle_id = stage.client.run().await.unwrap().cycle_id;
        let newest = inclusion(&mut ledger, cycle_id, 0).await.unwrap();
        let (extent, parts) = read_log(&mut ledger, 0, 0).await.unwrap();
        let signed = key.open(&extent.checkpoint).unwrap();
        assert_eq!((signed.size, extent.keys), (extent.size, vec![key.to_string()]));
        let first = key.open(&earlier.checkpoint).unwrap();
        let entries = entries_of(&parts);
        verify_parts(&parts, signed, Some(first)).unwrap();
        assert_eq!(entries[&newest.leaf], newest.entry);
        // The records are gone, and their hashes are those of the bytes that were there. The events are there.
        for part in &before {
            let leaf = part.subtree.leaves().start;
            let now = parts.iter().find(|now| now.subtree == part.subtree).unwrap();
            assert_eq!((now.hash(), entries.contains_key(&leaf)), (part.hash(), leaf % 2 == 1));
        }

        // From a later leaf on, hashes replace all entries before it.
        let (extent, later) = read_log(&mut ledger, 20, 0).await.unwrap();
        verify_parts(&later, key.open(&extent.checkpoint).unwrap(), None).unwrap();
        let expected: BTreeMap<_, _> = entries.into_iter().filter(|(leaf, _)| *leaf >= 20).collect();
        assert_eq!(entries_of(&later), expected);
        let size = extent.size.to_string();
        for (from_leaf, of_size) in [(extent.size + 1, 0), (0, u64::MAX), (u64::MAX, 0), (9, 8)] {
            let refused = read_log(&mut ledger, from_leaf, of_size).await.unwrap_err();
            assert_eq!(reason(&refused), because(Code::OutOfRange, "NOT_IN_LOG", [("size", size.as_str())]));
        }
    }
}

#[tokio::test]
async fn an_entry_whose_bytes_were_changed_is_read_as_a_hash_and_never_served() {
    let mut stage = Stage::new().await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let mut ledger = ledger(&stage).await;
    inclusion(&mut ledger, 3, 0).await.unwrap();
    let before = read_log(&mut ledger, 0, 0).await.unwrap().1;
    let changes = "UPDATE cycles SET record = CAST(record || x'00' AS BLOB) WHERE cycle_id = 2;
                   UPDATE audit SET event = 'text' WHERE leaf = 3;
                   INSERT INTO control VALUES (4, x'00')";
    database(&stage.home.path("o.db")).execute_batch(changes).unwrap();
    let (extent, parts) = read_log(&mut ledger, 0, 0).await.unwrap();
    let key = checkpoint(&mut ledger).await.1;
    verify_parts(&parts, key.open(&extent.checkpoint).unwrap(), None).unwrap();
    let mut expected = entries_of(&before);
    assert!(expected.remove(&2).is_some() && expected.remove(&3).is_some());
    assert_eq!(entries_of(&parts), expected);
}

// ---------------------------------------------------------------------------------------------------------------
// Verifying a database

/// What `orchestrator verify` says of a database: its exit code, and what it prints.
fn verify(database: &Path, key: &VerifyingKey, more: &[&str]) -> (Option<i32>, String) {
    verify_with(database, &[&["--key", &key.to_string()], more].concat())
}

fn verify_with(database: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut verify = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    verify.arg("verify").arg("--db").arg(database).args(more);
    let output = verify.output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), said.concat())
}

/// The home of a service that was stopped after this number of cycles without a subsystem, and its key. The record of
/// cycle n is leaf 2n - 2, and the event of its call leaf 2n - 1.
async fn stopped_after(cycles: usize) -> (Home, VerifyingKey) {
    let mut stage = Stage::new().await;
    for _ in 0..cycles {
        stage.client.run().await.unwrap();
    }
    let (_, key) = checkpoint(&mut ledger(&stage).await).await;
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    (home, key)
}

/// Number of rows of a table.
fn count(path: &Path, table: &str) -> i64 {
    database(path).query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
}

/// A stopped service with a log of 12 records, of which 6 are removed: its home, and its key. The record of cycle n is
/// leaf 2n - 1, and the event of its call leaf 2n.
async fn verified_home() -> (Home, VerifyingKey) {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.record_output = true).await;
    for _ in 0..11 {
        stage.client.run().await.unwrap();
    }
    let key = checkpoint(&mut ledger(&stage).await).await.1;
    let database = stage.home.path("o.db");
    let while_served = verify(&database, &key, &[]);
    assert!(while_served.1.contains("11 records and 12 audit events are as they were written"), "{while_served:?}");
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let home = home.with_args(["--set", "store.retention.max_cycles=5"]);
    let mut stage = Stage::again(fleet, home).await;
    let removed = async { while stage.client.status().await.unwrap().oldest_revision < 7 {} };
    patiently("old records to be removed", removed).await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    (home, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_change_of_a_database_is_named_when_it_is_verified() {
    let (home, key) = verified_home().await;
    let path = home.path("o.db");
    let (code, said) = verify(&path, &key, &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("26 entries, signed up to 26; 6 records and 13 audit events are as they were written"),
        "{said}"
    );

    let changes: [(&str, &[&str]); 27] = [
        (
            "UPDATE cycles SET record = CAST(record || x'00' AS BLOB) WHERE cycle_id = 9",
            &["cycle 9 (leaf 17) was changed"],
        ),
        (
            "UPDATE cycles SET record = (SELECT record FROM cycles WHERE cycle_id = 8) WHERE cycle_id = 9",
            &["cycle 9 (leaf 17) was changed", "it contains cycle 8, revision 8"],
        ),
        ("DELETE FROM audit WHERE leaf = 14", &["leaf 14 is missing, and no entry says that retention removed it"]),
        ("UPDATE audit SET event = CAST(event || x'00' AS BLOB) WHERE leaf = 14", &["event of leaf 14 was changed"]),
        ("UPDATE audit SET caller = 'token:b' WHERE leaf = 14", &["leaf 14: its column caller is not that of its"]),
        ("UPDATE cycles SET state = 3 WHERE cycle_id = 7", &["cycle 7 (leaf 13): its column state is not that"]),
        ("UPDATE cycles SET request_id = 'r' WHERE cycle_id = 7", &["its column request_id is not that of its bytes"]),
        ("UPDATE cycles SET finished_at = finished_at + 1 WHERE cycle_id = 7", &["its column finished_at is not"]),
        ("DELETE FROM cycles WHERE cycle_id = 8", &["leaf 15 is missing, and no entry says that retention removed it"]),
        ("DELETE FROM control", &["leaf 23 is missing", "leaf 1 is missing"]),
        ("UPDATE control SET entry = x''", &["leaf 23 was changed"]),
        (
            "UPDATE cycles SET leaf = 99 WHERE cycle_id = 8; UPDATE cycles SET leaf = 15 WHERE cycle_id = 9;
             UPDATE cycles SET leaf = 17 WHERE cycle_id = 8",
            &["cycle 9 (leaf 15) was changed", "cycle 8 (leaf 17) was changed"],
        ),
        ("UPDATE cycles SET leaf = NULL WHERE cycle_id = 8", &["leaf 15 is missing", "cycle 8 has no leaf"]),
        ("UPDATE cycles SET cycle_id = -8 WHERE cycle_id = 8", &["the table cycles has 1 row that no version"]),
        ("UPDATE cycles SET leaf = -15 WHERE cycle_id = 8", &["the table cycles has 1 row that no version"]),
        ("UPDATE hashes SET hash = zeroblob(32) WHERE id = 47", &["event of leaf 25 was changed"]),
        ("UPDATE hashes SET hash = zeroblob(32) WHERE id = 6", &["the hash 6 in the table hashes is not that of the entries"]),
        ("DELETE FROM hashes WHERE id = 7", &["the table hashes lacks the hash of leaf 4"]),
        (
            "UPDATE hashes SET hash = x'00' WHERE id = 6",
            &["the table hashes has 1 row that no version", "the hash 6 in the table hashes is not that of the entries"],
        ),
        (
            "UPDATE cycles SET leaf = 'x' WHERE cycle_id = 8",
            &["the table cycles has 1 row that no version", "leaf 15 is missing"],
        ),
        ("UPDATE cycles SET cycle_id = 'x' WHERE cycle_id = 8", &["the table cycles has 1 row that no version"]),
        (
            "UPDATE control SET entry = 'x'",
            &["the table control has 1 row that no version", "leaf 23, a control entry, can't be read"],
        ),
        ("UPDATE meta SET log_size = 9000000000000000", &["the table hashes is not that of such a log"]),
        (
            "UPDATE meta SET log_size = 1099511627776; INSERT INTO hashes VALUES (2199023255510, zeroblob(32))",
            &[
                "the leaves 26 to 1099511627774 are missing, and no entry says that retention removed them",
                "the table hashes lacks the hash of the leaves 26 to 1099511627774",
            ],
        ),
        (
            "UPDATE control SET entry = zeroblob(2000000)",
            &["the table control has 1 row that no version", "leaf 23, a control entry, can't be read"],
        ),
        ("INSERT INTO hashes VALUES (99, zeroblob(32))", &["the hash 99 in the table hashes belongs to no entry"]),
        (
            "DELETE FROM cycles WHERE cycle_id = 12; DELETE FROM audit WHERE leaf = 25; DELETE FROM hashes WHERE id >= 46;
             UPDATE meta SET log_size = 24, last_cycle_id = 11, last_revision = 11",
            &["the log has 24 entries, and the checkpoint of"],
        ),
    ];
    for (i, (change, expected)) in changes.into_iter().enumerate() {
        let changed = home.path(&format!("changed-{i}.db"));
        fs::copy(&path, &changed).unwrap();
        database(&changed).execute_batch(change).unwrap();
        let signed = home.path("o.db.checkpoint");
        let (code, said) = verify(&changed, &key, &["--checkpoint", signed.to_str().unwrap()]);
        assert_eq!(code, Some(1), "{change}: {said}");
        for expected in expected {
            assert!(said.contains(expected), "{change}: {said}");
        }
    }
}

#[tokio::test]
async fn a_database_whose_removals_are_hidden_is_not_served() {
    let (home, _) = verified_home().await;
    assert_eq!(database(&home.path("o.db")).execute("DELETE FROM control", []).unwrap(), 1);
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{}", home.log());
    assert!(
        home.log().contains("entries of its log about removals, or about a new log, are missing"),
        "{}",
        home.log()
    );
}

/// Its next entries could not be written.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_entries_beyond_the_end_of_its_log_is_neither_served_nor_accepted() {
    let (home, _) = verified_home().await;
    let path = home.path("o.db");
    for (plant, expected) in [
        (
            "INSERT INTO audit SELECT 30, time, caller, rpc, denied, event, kind FROM audit WHERE leaf = 14",
            "log_size in its table meta is 26, and a row of its table audit, which another program has written, is leaf 30",
        ),
        (
            "DELETE FROM audit WHERE leaf = 30; INSERT INTO control SELECT 26, entry FROM control",
            "log_size in its table meta is 26, and a row of its table control, which another program has written, is \
             leaf 26",
        ),
    ] {
        database(&path).execute_batch(plant).unwrap();
        assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{}", home.log());
        assert!(home.log().contains(expected), "{}", home.log());
        let (code, said) = call(None, &["store", "accept", &format!("sqlite:{}", path.display())]).await;
        assert!(code == 1 && said.contains(expected), "{said}");
    }
    assert_eq!(database(&path).execute("DELETE FROM control WHERE leaf = 26", []).unwrap(), 1);
    assert!(home.serve().await.stop().await.success());
}

/// The next process could not go on from it.
#[tokio::test]
async fn a_database_with_numbers_that_leave_no_next_one_is_not_accepted() {
    let (home, _) = stopped_after(3).await;
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    for (change, expected) in [
        ("UPDATE meta SET last_cycle_id = 1", "last_cycle_id in its table meta is 1, and 3 is the newest cycle"),
        ("UPDATE meta SET pruned_to = 9", "and 9 is a revision that was already removed"),
        (
            "UPDATE meta SET log_size = 4611686018427387904; DELETE FROM hashes;
             INSERT INTO hashes VALUES (9223372036854775806, zeroblob(32))",
            "its table hashes is not that of such a log",
        ),
    ] {
        fs::write(&path, &untouched).unwrap();
        database(&path).execute_batch(change).unwrap();
        let (code, said) = call(None, &["store", "accept", &format!("sqlite:{}", path.display())]).await;
        assert!(code == 1 && said.contains(expected), "{change}: {said}");
    }
}

/// What an entry says of leaves that are still to come would have them missing from the beginning.
#[tokio::test(flavor = "multi_thread")]
async fn an_accepted_entry_about_removals_says_nothing_of_later_leaves() {
    let (home, key) = stopped_after(3).await;
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    let everything = pb::LeafRange { first: 4, count: u64::MAX };
    for (leaves, first_kept) in [(vec![everything], 0), (Vec::new(), u64::MAX)] {
        fs::write(&path, &untouched).unwrap();
        let removal = pb::control_entry::Entry::RecordsPruned(pb::RecordsPruned { leaves, first_kept });
        let removal = pb::ControlEntry { entry: Some(removal) }.encode_to_vec();
        let connection = database(&path);
        let put = "INSERT INTO control (leaf, entry) VALUES (?1, ?2)";
        append(&connection, |leaf| connection.execute(put, params![leaf, removal]));
        drop(connection);
        let (code, said) = call(None, &["store", "accept", &format!("sqlite:{}", path.display())]).await;
        assert_eq!(code, 0, "{said}");
        for _ in 0..2 {
            let service = home.serve().await;
            service.client().await.run().await.unwrap();
            assert!(service.stop().await.success());
        }
        let (code, said) = verify(&path, &key, &[]);
        assert!(
            code == Some(1) && said.contains("leaf 6, a control entry, names leaves that are not before it"),
            "{said}"
        );
        // The entry of the new log, two records and the events of their calls.
        assert!(
            !["leaf 7", "leaf 8", "leaf 9", "leaf 10", "leaf 11"].iter().any(|later| said.contains(later)),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_key_that_was_lost_before_the_first_entry_leaves_no_fault_behind() {
    let home = Home::new();
    assert!(home.serve().await.stop().await.success());
    fs::remove_file(home.path("o.db.key")).unwrap();
    let service = home.serve().await;
    service.client().await.run().await.unwrap();
    assert!(service.stop().await.success());
    let path = home.path("o.db");
    let began = new_logs(&database(&path));
    assert!(matches!(&began[..], [(LogBeganReason::KeyMissing, _)]), "{began:?}");
    let (code, said) =
        verify(&path, stolen(&home).verifying(), &["--key-file", home.path("o.db.key").to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_verified_only_by_a_checkpoint_that_the_key_has_signed() {
    let (home, key) = verified_home().await;
    let path = home.path("o.db");
    let other = SigningKey::generate(key.name()).unwrap();
    let (code, said) = verify(&path, other.verifying(), &[]);
    assert!(code == Some(1) && said.contains("it is not signed by the key"), "{said}");
    // The whole history, made anew and signed with another key.
    let signed = home.path("other.checkpoint");
    let forged = Signer { origin: key.name().into(), keys: vec![other] }.sign(26, Hash([1; 32]));
    fs::write(&signed, forged).unwrap();
    let (code, said) = verify(&path, &key, &["--checkpoint", signed.to_str().unwrap()]);
    assert!(code == Some(1) && said.contains("it is not signed by the key"), "{said}");
    let (code, said) =
        verify(&home.path("no.db"), &key, &["--checkpoint", home.path("o.db.checkpoint").to_str().unwrap()]);
    assert!(code == Some(1) && said.contains("no.db does not exist"), "{said}");
    assert!(!home.path("no.db").exists());
}

// ---------------------------------------------------------------------------------------------------------------
// Seals

#[tokio::test]
async fn a_record_that_is_not_in_the_log_is_not_served() {
    let mut stage = Stage::new().await;
    for _ in 0..2 {
        stage.client.run().await.unwrap();
    }
    let database = database(&stage.home.path("o.db"));
    assert_eq!(database.execute("UPDATE cycles SET leaf = NULL WHERE cycle_id = 1", []).unwrap(), 1);
    // Nor if the database says that it is older than the log.
    for change in ["", "UPDATE meta SET unlogged_to = 2"] {
        database.execute_batch(change).unwrap();
        let refused = stage.client.cycle(1).await.unwrap_err();
        assert_eq!((refused.code(), reason(&refused).why.as_str()), (Code::DataLoss, "RECORD_UNREADABLE"), "{change}");
        assert!(refused.message().contains("it is not in the log"), "{}", refused.message());
    }
}

#[tokio::test]
async fn numbers_that_no_log_has_end_no_read_of_it() {
    let mut stage = Stage::new().await;
    for _ in 0..2 {
        stage.client.run().await.unwrap();
    }
    let mut ledger = ledger(&stage).await;
    checkpoint(&mut ledger).await;
    let database = database(&stage.home.path("o.db"));
    for change in [
        "UPDATE meta SET unlogged_to = -5, last_revision = 9223372036854775806",
        "UPDATE meta SET unlogged_to = 0; UPDATE cycles SET revision = 9223372036854775807, leaf = 0 WHERE cycle_id = 2;
         DELETE FROM cycles WHERE cycle_id = 1",
    ] {
        database.execute_batch(change).unwrap();
        // Whether it can be read or not.
        let _ = patiently("an answer", read_log(&mut ledger, 0, 0)).await;
    }
    assert!(!stage.home.log().contains("panicked"), "{}", stage.home.log());
}

/// Adds a copy of the first audit event to the end of the log, as a program without the key can.
fn append_event(database: &Connection) {
    let copied = "INSERT INTO audit SELECT ?1, time, caller, rpc, denied, event, kind FROM audit ORDER BY leaf LIMIT 1";
    append(database, |leaf| database.execute(copied, [leaf]));
}

/// Adds the entry that `put` puts as this leaf to the end of the log, as a program without the key can.
fn append(database: &Connection, put: impl FnOnce(i64) -> rusqlite::Result<usize>) {
    let mut log = Frontier::default();
    let entries = entries(database);
    for (_, entry) in &entries {
        log.append(Hash::of_leaf([&entry[..]]));
    }
    assert_eq!(put(i64::try_from(entries.len()).unwrap()).unwrap(), 1);
    let (_, entry) = self::entries(database).pop().unwrap();
    let nodes = log.append(Hash::of_leaf([&entry[..]]));
    let first: i64 = database.query_row("SELECT max(id) + 1 FROM hashes", [], |row| row.get(0)).unwrap();
    for (id, node) in (first..).zip(nodes) {
        database.execute("INSERT INTO hashes VALUES (?1, ?2)", params![id, node.0]).unwrap();
    }
    database.execute("UPDATE meta SET log_size = log_size + 1", []).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_without_the_key_changes_is_neither_signed_nor_used() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    for _ in 0..2 {
        stage.client.run().await.unwrap();
    }
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    let key_file = home.path("o.db.key");
    let seals = ["--key-file", key_file.to_str().unwrap()];
    let (code, said) = verify_with(&path, &seals);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the seals of the log and of 4 other rows are valid"), "{said}");

    for (change, at_start, verified) in [
        ("", "the seal of its log", "the seal of the log does not belong to its 7 entries"),
        (
            "UPDATE hashes SET hash = zeroblob(32) WHERE id = (SELECT max(id) FROM hashes)",
            "the seal of its log",
            "the seal of the log does not belong to its 6 entries",
        ),
        (
            "UPDATE meta SET last_cycle_id = last_cycle_id + 2;
             INSERT INTO open_cycles (cycle_id, trigger, scheduled_at) VALUES (3, 0, 0), (4, 0, 0)",
            "the seal of its log",
            "the seal of the log does not belong to its 6 entries and the table meta",
        ),
        (
            "UPDATE subsystems SET spec = replace(spec, 'http://', 'http://x') WHERE name = 'a'",
            "the seal of its subsystem \"a\"",
            "the seal of the subsystem \"a\"",
        ),
        ("UPDATE subsystems SET owner = 'token:x' WHERE name = 'b'", "its subsystem \"b\"", "the subsystem \"b\""),
        (
            "UPDATE meta SET epoch = 9223372036854775806",
            "the seal of its log",
            "the seal of the log does not belong to its 6 entries and the table meta",
        ),
        (
            "UPDATE meta SET succeeded = 1000",
            "the seal of its log",
            "the seal of the log does not belong to its 6 entries and the table meta",
        ),
        ("UPDATE outputs SET payload = x'' WHERE name = 'a'", "its output \"a\"", "the output of a is not that of"),
    ] {
        let database = database(&path);
        if change.is_empty() {
            append_event(&database);
        }
        database.execute_batch(change).unwrap();
        drop(database);
        let (code, said) = verify_with(&path, &seals);
        assert!(code == Some(1) && said.contains(verified), "{change}: {said}");
        let ended = home.try_serve().await.err().unwrap_or_else(|| panic!("{change}: it serves"));
        assert_eq!(ended.code(), Some(1), "{}", home.log());
        assert!(home.log().contains(at_start), "{change}: {}", home.log());
        for log in ["o.db-wal", "o.db-shm"] {
            let _ = fs::remove_file(home.path(log));
        }
        fs::write(&path, &untouched).unwrap();
    }
    assert!(home.serve().await.stop().await.success());
}

#[tokio::test]
async fn an_epoch_that_no_clock_gives_is_not_accepted_either() {
    let home = Home::new();
    assert!(home.serve().await.stop().await.success());
    let path = home.path("o.db");
    database(&path).execute("UPDATE meta SET epoch = 9223372036854775806", []).unwrap();
    let url = format!("sqlite:{}", path.display());
    let (code, said) = call(None, &["store", "accept", &url]).await;
    assert!(
        code == 1 && said.contains("epoch in its table meta is 9223372036854775806, which no clock gives"),
        "{said}"
    );
    fs::remove_file(home.path("o.db.key")).unwrap();
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{}", home.log());
    assert!(home.log().contains("which no clock gives"), "{}", home.log());
    // The next epoch can be any later one.
    database(&path).execute("UPDATE meta SET epoch = 1", []).unwrap();
    assert_eq!(call(None, &["store", "accept", &url]).await.0, 0);
    assert!(home.serve().await.stop().await.success());
}

#[tokio::test]
async fn retention_removes_nothing_that_is_not_what_its_columns_say() {
    let (mut home, _) = stopped_after(3).await;
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    for (rule, change, named) in [
        (
            "audit.retention.max_age=\"1h\"",
            "UPDATE audit SET time = 0 WHERE leaf = 1",
            "the audit event of leaf 1 can't be read: its column time is not that of its bytes",
        ),
        (
            "store.retention.max_age=\"1h\"",
            "UPDATE cycles SET finished_at = 0 WHERE cycle_id = 1",
            "the record of cycle 1, revision 1, can't be read: its column finished_at is not that of its bytes",
        ),
        (
            "store.retention.max_cycles=2",
            "UPDATE cycles SET revision = 9 WHERE cycle_id = 1; UPDATE cycles SET revision = 1 WHERE cycle_id = 2;
             UPDATE cycles SET revision = 2 WHERE cycle_id = 1",
            "the record of cycle 2, revision 1, can't be read: it contains cycle 2, revision 2",
        ),
        (
            "store.retention.max_cycles=2",
            "UPDATE cycles SET record = (SELECT record FROM cycles WHERE cycle_id = 2) WHERE cycle_id = 1",
            "the record of cycle 1, revision 1, can't be read: its bytes were changed",
        ),
    ] {
        fs::write(&path, &untouched).unwrap();
        database(&path).execute_batch(change).unwrap();
        home = home.with_args(["--set", rule]);
        let service = home.serve().await;
        home.logged(&format!("retention keeps more than its limits allow: {named}"), 1).await;
        let kept = |table| count(&path, table);
        assert_eq!((kept("cycles"), kept("audit"), kept("control")), (3, 3, 0), "{change}");
        assert!(service.stop().await.success());
        fs::remove_file(home.path("log")).unwrap();
    }
}

#[tokio::test]
async fn a_branch_of_the_log_without_the_hashes_to_compare_it_is_not_the_log() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let earlier = fs::read(home.path("o.db.checkpoint")).unwrap();
    let mut stage = Stage::again(fleet, home).await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    // The first hash is that of the whole log then, and below another one now.
    fs::write(home.path("o.db.checkpoint"), earlier).unwrap();
    assert_eq!(database(&home.path("o.db")).execute("DELETE FROM hashes WHERE id = 0", []).unwrap(), 1);
    let home = home.with_args(["--set", "access.mode=\"enforce\""]);
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{}", home.log());
    assert!(home.log().contains("its log is not that of its checkpoint, up to the size 1 of that"), "{}", home.log());
}

#[tokio::test]
async fn a_table_with_another_definition_is_neither_served_nor_verified() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let (_, key) = checkpoint(&mut ledger(&stage).await).await;
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    for (change, table) in [
        ("ALTER TABLE audit ADD COLUMN whole INTEGER GENERATED ALWAYS AS (1)", "audit"),
        ("ALTER TABLE outputs ADD COLUMN more INTEGER NOT NULL DEFAULT 1", "outputs"),
        ("CREATE UNIQUE INDEX one_owner ON subsystems (owner)", "subsystems"),
        ("DROP INDEX cycles_by_request; CREATE INDEX cycles_by_request ON cycles (request_id)", "cycles"),
        (
            "PRAGMA writable_schema = ON;
             UPDATE sqlite_schema SET sql = replace(sql, 'DEFAULT 1', 'DEFAULT 2') WHERE name = 'audit'",
            "audit",
        ),
    ] {
        database(&path).execute_batch(change).unwrap();
        assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{change}: {}", home.log());
        let named =
            format!("the definition of its table {table}, or an index of that, is not the one of this software");
        assert!(home.log().contains(&named), "{change}: {}", home.log());
        let (code, said) = verify(&path, &key, &[]);
        assert!(code == Some(1) && said.contains(&named), "{change}: {said}");
        fs::write(&path, &untouched).unwrap();
        fs::remove_file(home.path("log")).unwrap();
    }
    assert!(home.serve().await.stop().await.success());
}

#[tokio::test]
async fn an_index_that_lacks_a_row_is_named_by_verify() {
    let (home, key) = stopped_after(3).await;
    let path = home.path("o.db");
    assert_eq!(verify(&path, &key, &[]).0, Some(0));
    // The pages of an empty index take the place of those of the index, whose definition stays.
    database(&path)
        .execute_batch(
            "PRAGMA writable_schema = ON;
             CREATE INDEX none ON cycles (cycle_id) WHERE cycle_id = 0;
             UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema WHERE name = 'none')
                 WHERE name = 'sqlite_autoindex_cycles_1';
             DELETE FROM sqlite_schema WHERE name = 'none'",
        )
        .unwrap();
    let (code, said) = verify(&path, &key, &[]);
    assert!(code == Some(1) && said.contains("missing from index sqlite_autoindex_cycles_1"), "{code:?}: {said}");
}

/// Which record is the oldest is said by the records themselves, in the order of their table.
#[tokio::test]
async fn other_columns_of_older_records_have_none_removed_before_its_time() {
    let (home, _) = stopped_after(6).await;
    let path = home.path("o.db");
    // As if all but the fifth and the last were of a state that is kept.
    assert_eq!(database(&path).execute("UPDATE cycles SET state = 3 WHERE cycle_id NOT IN (5, 6)", []).unwrap(), 4);
    let home =
        home.with_args(["--set", "store.retention.max_cycles=3", "--set", "store.retention.failed.max_cycles=100"]);
    let service = home.serve().await;
    home.logged("retention keeps more than its limits allow: the record of cycle 1, revision 1, can't be read", 1)
        .await;
    assert!(service.stop().await.success());
    let count = |table| count(&path, table);
    assert_eq!((count("cycles"), count("control")), (6, 0));
}

/// Puts another entry in the place of a leaf, with the hash that this has then, and without the hashes above it, which
/// end in a seal.
fn forge(database: &Connection, leaf: u64, entry: Entry<'_>, put: &str, bytes: &[u8]) {
    assert_eq!(database.execute(put, (i64::try_from(leaf).unwrap(), bytes)).unwrap(), 1);
    let number = i64::try_from(Node::of_leaf(leaf).number()).unwrap();
    let forged = database.execute("UPDATE hashes SET hash = ?2 WHERE id = ?1", (number, &entry.leaf().0[..]));
    assert_eq!(forged.unwrap(), 1);
}

#[tokio::test]
async fn an_entry_with_a_forged_hash_neither_counts_as_a_removal_nor_is_removed() {
    let (mut home, key) = stopped_after(6).await;
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    let count = |table| count(&path, table);
    // The record of cycle n is leaf 2n - 2, and the event of its call leaf 2n - 1. As if retention had removed the
    // event of the first cycle and all before leaf 8.
    let removal = pb::RecordsPruned { leaves: Vec::new(), first_kept: 8 };
    let removal = pb::ControlEntry { entry: Some(pb::control_entry::Entry::RecordsPruned(removal)) }.encode_to_vec();
    database(&path).execute("DELETE FROM audit WHERE leaf = 1", []).unwrap();
    let put = "INSERT INTO control (leaf, entry) VALUES (?1, ?2)";
    forge(&database(&path), 1, Entry::Control(&removal), put, &removal);
    home = home.with_args(["--set", "store.retention.max_cycles=5"]);
    let service = home.serve().await;
    // Nor is the record beside it in the tree.
    home.logged("the record of cycle 1, revision 1, can't be read: its bytes were changed, or hashes of the log", 1)
        .await;
    assert!(service.stop().await.success());
    assert_eq!((count("cycles"), count("control")), (6, 1));
    database(&path).execute("DELETE FROM control WHERE leaf = 1", []).unwrap();
    let (code, said) = verify(&path, &key, &[]);
    let named = "leaf 1 is missing, and no entry says that retention removed it";
    assert!(code == Some(1) && said.contains(named), "{code:?}: {said}");

    // As if the first cycle had been cancelled.
    fs::write(&path, &untouched).unwrap();
    fs::remove_file(home.path("log")).unwrap();
    let record: Vec<u8> =
        database(&path).query_row("SELECT record FROM cycles WHERE cycle_id = 1", [], |row| row.get(0)).unwrap();
    let state = pb::CycleState::Cancelled.into();
    let record = pb::CycleTelemetry { state, ..decode(record.into()) }.encode_to_vec();
    let put = "UPDATE cycles SET record = ?2, state = 4 WHERE leaf = ?1";
    forge(&database(&path), 0, Entry::Cycle(&record), put, &record);
    let service = home.serve().await;
    home.logged("the record of cycle 1, revision 1, can't be read: its bytes were changed, or hashes of the log", 1)
        .await;
    assert!(service.stop().await.success());
    assert_eq!((count("cycles"), count("control")), (6, 0));
}

#[tokio::test]
async fn retention_of_records_that_are_older_than_the_log_leaves_the_log_as_it_is() {
    let mut stage = Stage::new().await;
    for _ in 0..4 {
        stage.client.run().await.unwrap();
    }
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    write_as_version(4, &home.path("o.db"));
    fs::remove_file(home.path("o.db.checkpoint")).unwrap();
    let url = format!("sqlite:{}", home.path("o.db").display());
    assert_eq!(call(None, &["store", "accept", &url]).await.0, 0);
    // A row that claims a leaf is still older than the log.
    database(&home.path("o.db")).execute("UPDATE cycles SET leaf = 0 WHERE revision = 1", []).unwrap();
    assert_eq!(call(None, &["store", "accept", &url]).await.0, 0);
    database(&home.path("o.db")).execute("UPDATE cycles SET leaf = NULL WHERE revision = 1", []).unwrap();
    assert_eq!(call(None, &["store", "accept", &url]).await.0, 0);
    let mut stage = Stage::again(fleet, home.with_args(["--set", "store.retention.max_cycles=3"])).await;
    let removed = async { while stage.client.status().await.unwrap().oldest_revision < 2 {} };
    patiently("an old record to be removed", removed).await;
    let (_, key) = checkpoint(&mut ledger(&stage).await).await;
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let path = home.path("o.db");
    let (code, said) = verify(&path, &key, &[]);
    assert_eq!(code, Some(0), "{said}");
    // Only the sealed numbers say that there were more of them.
    let older = "DELETE FROM cycles WHERE leaf IS NULL AND revision = 2";
    assert_eq!(database(&path).execute(older, []).unwrap(), 1);
    let (code, said) = verify(&path, &key, &["--key-file", home.path("o.db.key").to_str().unwrap()]);
    let named = "by the table meta, the number of succeeded is 3; by the rows, it is 2";
    assert!(code == Some(1) && said.contains(named), "{code:?}: {said}");
}

/// Retention says only of what it has removed that it did.
#[tokio::test]
async fn what_another_program_has_removed_is_missing_also_after_retention_has_removed_what_follows() {
    let (home, key) = stopped_after(6).await;
    let path = home.path("o.db");
    // The record of cycle n is leaf 2n - 2, and the event of its call leaf 2n - 1.
    database(&path).execute_batch("DELETE FROM cycles WHERE cycle_id = 1; DELETE FROM audit WHERE leaf = 3").unwrap();
    let home = home.with_args(["--set", "store.retention.max_cycles=2", "--set", "audit.retention.max_events=1"]);
    let service = home.serve().await;
    let removed = || database(&path).query_row("SELECT count(*) FROM control", [], |row| row.get::<_, i64>(0)).unwrap();
    let waited = async {
        while removed() == 0 {
            tokio::task::yield_now().await;
        }
    };
    patiently("old records to be removed", waited).await;
    assert!(service.stop().await.success());
    let (code, said) = verify(&path, &key, &[]);
    assert_eq!(code, Some(1), "{said}");
    for missing in [0, 3] {
        let named = format!("leaf {missing} is missing, and no entry says that retention removed it");
        assert!(said.contains(&named), "{missing}: {said}");
    }
}

/// What another program takes away, and puts back later, has nothing younger removed in its place.
#[tokio::test]
async fn retention_removes_nothing_in_the_place_of_what_is_missing() {
    let (home, key) = stopped_after(6).await;
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    let count = |table| count(&path, table);
    let mut home = home.with_args(["--set", "store.retention.max_cycles=3", "--set", "audit.retention.max_events=3"]);
    // The record of cycle n is leaf 2n - 2, and the event of its call leaf 2n - 1.
    for (take, put_back, kept) in [
        // A missing record may have been an event, for all that is known, so one event less is removed for each.
        (
            "UPDATE cycles SET revision = -revision WHERE cycle_id <= 3",
            "UPDATE cycles SET revision = -revision WHERE revision < 0",
            (6, 5),
        ),
        (
            "CREATE TABLE away AS SELECT * FROM audit WHERE leaf IN (1, 3); DELETE FROM audit WHERE leaf IN (1, 3)",
            "INSERT INTO audit SELECT * FROM away; DROP TABLE away",
            (4, 5),
        ),
        // With others in their places.
        (
            "CREATE TABLE away AS SELECT * FROM cycles WHERE cycle_id <= 3; DELETE FROM cycles WHERE cycle_id <= 3;
             INSERT INTO audit SELECT leaf - 1, time, caller, rpc, denied, event, kind FROM audit WHERE leaf < 6;
             INSERT INTO control SELECT 1, event FROM audit WHERE leaf = 1",
            "INSERT INTO cycles SELECT * FROM away; DROP TABLE away; DELETE FROM audit WHERE leaf IN (0, 2, 4);
             DELETE FROM control WHERE leaf = 1",
            (6, 5),
        ),
    ] {
        database(&path).execute_batch(take).unwrap();
        let service = home.serve().await;
        home.logged("retention keeps more than its limits allow", 1).await;
        assert!(service.stop().await.success());
        database(&path).execute_batch(put_back).unwrap();
        assert_eq!((count("cycles"), count("audit")), kept, "{take}");
        let (code, said) = verify(&path, &key, &["--key-file", home.path("o.db.key").to_str().unwrap()]);
        assert_eq!(code, Some(0), "{take}: {said}");
        fs::write(&path, &untouched).unwrap();
        fs::remove_file(home.path("log")).unwrap();
    }

    // Once an operator has accepted it, the limits are those of the entries that were there, and what is taken away
    // since then still counts.
    database(&path).execute_batch("DELETE FROM cycles WHERE cycle_id <= 2").unwrap();
    let (code, said) = call(None, &["store", "accept", &format!("sqlite:{}", path.display())]).await;
    assert!(code == 0 && said.contains("its log has 2 entries less than it should"), "{code}: {said}");
    database(&path).execute_batch("UPDATE cycles SET revision = -revision WHERE cycle_id = 3").unwrap();
    let service = home.serve().await;
    home.logged("retention keeps more than its limits allow: leaf 4 of the log is missing", 1).await;
    assert!(service.stop().await.success());
    database(&path).execute_batch("UPDATE cycles SET revision = 3 WHERE cycle_id = 3").unwrap();
    assert_eq!(count("cycles"), 4);
    let (code, said) = verify_with(&path, &["--key-file", home.path("o.db.key").to_str().unwrap()]);
    assert!(code == Some(0) && said.contains("missing when a new log began: 2 entries"), "{code:?}: {said}");
    for _ in 0..2 {
        let service = home.serve().await;
        let waited = async {
            while count("cycles") > 3 || count("audit") > 3 {
                tokio::task::yield_now().await;
            }
        };
        patiently("old entries to be removed", waited).await;
        service.client().await.run().await.unwrap();
        assert!(service.stop().await.success());
        home = home.with_args(["--set", "store.retention.max_cycles=3"]);
    }
}

/// Entries that come back after a store was accepted are in no number, until it is accepted with them.
#[tokio::test]
async fn what_comes_back_to_an_accepted_store_is_named_until_it_is_accepted_as_well() {
    let (home, _) = stopped_after(6).await;
    let path = home.path("o.db");
    let untouched = fs::read(&path).unwrap();
    let url = format!("sqlite:{}", path.display());
    let change = |change: &str| database(&path).execute_batch(change).unwrap();
    let verified = || verify_with(&path, &["--key-file", home.path("o.db.key").to_str().unwrap()]);
    let accepted = async || assert_eq!(call(None, &["store", "accept", &url]).await.0, 0);
    // The record of cycle n is leaf 2n - 2.
    for (take, put_back) in [
        (
            "CREATE TABLE away AS SELECT * FROM cycles WHERE cycle_id <= 2; DELETE FROM cycles WHERE cycle_id <= 2",
            "INSERT INTO cycles SELECT * FROM away",
        ),
        (
            "UPDATE cycles SET leaf = NULL WHERE cycle_id <= 2",
            "UPDATE cycles SET leaf = 2 * cycle_id - 2 WHERE cycle_id <= 2",
        ),
        (
            "UPDATE cycles SET leaf = leaf + 1000 WHERE cycle_id <= 2",
            "UPDATE cycles SET leaf = leaf - 1000 WHERE cycle_id <= 2",
        ),
        ("UPDATE cycles SET state = 3 WHERE cycle_id <= 2", "UPDATE cycles SET state = 1 WHERE cycle_id <= 2"),
    ] {
        change(take);
        accepted().await;
        change(put_back);
        let (code, said) = verified();
        assert_eq!(code, Some(1), "{take}: {said}");
        for leaf in [0, 2] {
            assert!(said.contains(&format!("(leaf {leaf}) is there, although a new log began without it")), "{said}");
        }
        accepted().await;
        let (code, said) = verified();
        assert!(code == Some(0) && !said.contains("missing"), "{take}: {said}");
        fs::write(&path, &untouched).unwrap();
    }
    // What the table `meta` says was removed is not taken for it.
    change("UPDATE meta SET log_first_kept = 4; DELETE FROM cycles WHERE leaf < 4; DELETE FROM audit WHERE leaf < 4");
    let (code, said) = call(None, &["store", "accept", &url]).await;
    assert!(code == 0 && said.contains("its log has 4 entries less than it should"), "{code}: {said}");
    fs::write(&path, &untouched).unwrap();
    // Now they count again, and are missed again.
    change("CREATE TABLE away AS SELECT * FROM cycles WHERE cycle_id <= 2; DELETE FROM cycles WHERE cycle_id <= 2");
    accepted().await;
    change("INSERT INTO cycles SELECT * FROM away");
    accepted().await;
    // An earlier entry does not take the place of the last one.
    change(
        "CREATE TABLE last AS SELECT * FROM control ORDER BY leaf DESC LIMIT 1; DELETE FROM control WHERE leaf = 15",
    );
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{}", home.log());
    let missing = "entries of its log about removals, or about a new log, are missing or have come back";
    assert!(home.log().contains(missing), "{}", home.log());
    change("INSERT INTO control SELECT * FROM last; DELETE FROM cycles WHERE cycle_id <= 2");
    let home = home.with_args(["--set", "store.retention.max_cycles=4"]);
    let service = home.serve().await;
    home.logged("retention keeps more than its limits allow: leaf 0 of the log is missing", 1).await;
    assert!(service.stop().await.success());
    change("INSERT INTO cycles SELECT * FROM away");
    let (code, said) = verify_with(&path, &["--key-file", home.path("o.db.key").to_str().unwrap()]);
    assert!(code == Some(0) && said.contains("6 records"), "{code:?}: {said}");
}

#[tokio::test]
async fn a_key_is_replaced_by_a_start_with_both() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let with_keys = |home: Home, names: &[&str]| {
        let paths: Vec<_> = names.iter().map(|name| format!("{:?}", home.path(name))).collect();
        home.with_args(["--set", &format!("ledger.key_files=[{}]", paths.join(", "))])
    };
    // The new key is created with the name of the log, and seals.
    let home = with_keys(home, &["new.key", "o.db.key"]);
    assert!(home.serve().await.stop().await.success());
    let home = with_keys(home, &["new.key"]);
    let service = home.serve().await;
    assert_eq!(service.client().await.subsystems().await.unwrap().len(), 1);
    assert!(service.stop().await.success());
    let home = with_keys(home, &["o.db.key"]);
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1));
    assert!(home.log().contains("the seal of its log"), "{}", home.log());
}

#[tokio::test]
async fn the_record_of_a_cycle_has_the_hash_of_each_output_whether_it_is_recorded_or_not() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.record_output = true).await;
    stage.register("b", |_| {}).await;
    let cycle = stage.client.run().await.unwrap();
    let database = database(&stage.home.path("o.db"));
    for part in &cycle.subsystems {
        let output = "SELECT payload FROM outputs WHERE name = ?1";
        let output: Vec<u8> = database.query_row(output, [&part.name], |row| row.get(0)).unwrap();
        assert_eq!(part.output_sha256, Hash::of_bytes(&output).0[..], "{}", part.name);
        assert!(part.output.is_empty() != (part.name == "a") && (part.name == "b" || part.output == output));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The start of a log

/// The reasons of new logs in a database, and the checkpoints that they name.
fn new_logs(database: &Connection) -> Vec<(LogBeganReason, String)> {
    let entries =
        entries(database).into_iter().filter_map(|(_, entry)| match LogEntry::decode(&entry[..]).unwrap().entry {
            Some(pb::log_entry::Entry::Control(ControlEntry {
                entry: Some(pb::control_entry::Entry::LogBegan(began)),
            })) => Some((began.reason(), began.previous)),
            _ => None,
        });
    entries.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_not_what_was_signed_last_begins_a_new_log_and_enforce_waits_for_an_operator() {
    const FILES: [&str; 4] = ["o.db", "o.db.last", "o.db.key", "o.db.checkpoint"];
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.client.run().await.unwrap();
    let Stage { fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let older = fs::read(home.path("o.db")).unwrap();
    let mut stage = Stage::again(fleet, home).await;
    stage.client.run().await.unwrap();
    let Stage { fleet: _fleet, home, service, .. } = stage;
    assert!(service.stop().await.success());
    let whole = FILES.map(|name| fs::read(home.path(name)).unwrap());
    let checkpoint = String::from_utf8(whole[3].clone()).unwrap();
    let place = home.path("");
    let restore = || {
        for log in ["o.db-wal", "o.db-shm"] {
            let _ = fs::remove_file(place.join(log));
        }
        for (name, bytes) in FILES.iter().zip(&whole) {
            crate::common::tokens::write_private(&place.join(name), "");
            fs::write(place.join(name), bytes).unwrap();
        }
    };
    let remove = |name: &str| fs::remove_file(place.join(name)).unwrap();
    let damage = |nth: usize| {
        restore();
        match nth {
            0 => remove("o.db.key"),
            1 => remove("o.db.checkpoint"),
            2 => fs::write(place.join("o.db"), &older).unwrap(),
            _ => remove("o.db"),
        }
    };
    let url = format!("sqlite:{}", place.join("o.db").display());
    let mut home = home;
    for (nth, why, reason) in [
        (0, "the key that sealed it is missing", LogBeganReason::KeyMissing),
        (1, "beside it is no checkpoint that its key has signed", LogBeganReason::CheckpointMissing),
        (2, "its log has size 3, and its checkpoint 5", LogBeganReason::Behind),
        (3, "its log has size 0, and its checkpoint 5", LogBeganReason::Behind),
    ] {
        damage(nth);
        assert!(home.serve().await.stop().await.success());
        assert!(home.log().contains(&format!("a new log begins: {why}")), "{}", home.log());
        let previous = if nth == 1 { String::new() } else { checkpoint.clone() };
        assert_eq!(new_logs(&database(&place.join("o.db"))), [(reason, previous.clone())]);
        // It goes on from there.
        assert!(home.serve().await.stop().await.success());
        assert_eq!(new_logs(&database(&place.join("o.db"))).len(), 1);

        damage(nth);
        home = home.with_args(["--set", "access.mode=\"enforce\""]);
        let ended = home.try_serve().await.err().unwrap_or_else(|| panic!("{why}: it serves"));
        assert_eq!(ended.code(), Some(1), "{}", home.log());
        assert!(home.log().contains(why) && home.log().contains("orchestrator store accept"), "{}", home.log());
        assert_eq!(place.join("o.db.key").exists(), nth != 0, "it makes no key");
        let mut accept = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
        assert!(accept.args(["store", "accept", &url]).status().unwrap().success());
        assert!(home.serve().await.stop().await.success());
        assert_eq!(new_logs(&database(&place.join("o.db"))), [(LogBeganReason::Accepted, previous)]);
        let (code, said) = verify_with(&place.join("o.db"), &["--key-file", place.join("o.db.key").to_str().unwrap()]);
        assert_eq!(code, Some(0), "{said}");
        home = home.with_args(["--set", "access.mode=\"off\""]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_looks_as_if_an_earlier_version_had_written_it_waits_for_an_operator_under_enforce() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let no_log = "UPDATE cycles SET leaf = NULL; UPDATE meta SET log_size = 0, seal = NULL; DELETE FROM hashes;
                  DELETE FROM audit; DELETE FROM control; UPDATE outputs SET seal = NULL;
                  UPDATE subsystems SET seal = NULL, spec = replace(spec, 'http://', 'http://x')";
    database(&home.path("o.db")).execute_batch(no_log).unwrap();
    let home = home.with_args(["--set", "access.mode=\"enforce\""]);
    for file in ["o.db.checkpoint", "o.db.key"] {
        let ended = home.try_serve().await.err().unwrap();
        assert_eq!(ended.code(), Some(1), "{}", home.log());
        assert!(home.log().contains("it has no seals"), "{}", home.log());
        fs::remove_file(home.path(file)).unwrap();
    }
    // Without a key, no seal can be checked.
    for seal in ["NULL", "zeroblob(32)"] {
        database(&home.path("o.db")).execute(&format!("UPDATE meta SET seal = {seal}"), []).unwrap();
        assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{}", home.log());
        assert!(!home.path("o.db.key").exists());
    }
    let home = home.with_args(["--set", "access.mode=\"off\""]);
    assert!(home.serve().await.stop().await.success());
    assert!(
        home.log().contains("without seals: whether other programs have changed it can't be seen"),
        "{}",
        home.log()
    );
}

// ---------------------------------------------------------------------------------------------------------------
// Bundles and pins

/// Runs a command that calls this service, if any; its exit code, and what it prints.
async fn call(service: Option<SocketAddr>, args: &[&str]) -> (i32, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command.args(args);
    if let Some(address) = service {
        command.env("ORCHESTRATOR_ADDRESS", address.to_string());
    }
    command::run(command).await
}

/// `orchestrator verify` of a bundle, with an earlier checkpoint in a file, if any.
async fn verify_bundle(bundle: &Path, key: &VerifyingKey, since: Option<&Path>) -> (i32, String) {
    let key = key.to_string();
    let mut args = vec!["verify", bundle.to_str().unwrap(), "--key", &key];
    if let Some(since) = since {
        args.extend(["--since", since.to_str().unwrap()]);
    }
    call(None, &args).await
}

/// The bundle with other lines.
fn rewritten(bundle: &Path, change: impl FnOnce(&mut Vec<String>)) -> PathBuf {
    let mut lines: Vec<_> = fs::read_to_string(bundle).unwrap().lines().map(str::to_owned).collect();
    change(&mut lines);
    let path = bundle.with_extension("changed");
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exported_log_is_verified_without_the_service_and_each_change_of_it_is_noticed() {
    // Leaf 0 is a registration. The records of the cycles 1 to 6 are removed, by leaf 23, and no others from here on.
    let (home, key) = verified_home().await;
    let home = home.with_args(["--set", "store.retention.max_cycles=100"]);
    let service = home.serve().await;
    let (bundle, pin) = (home.path("b.jsonl"), home.path("o.db.checkpoint"));
    let to = bundle.to_str().unwrap();
    let (code, said) = call(Some(service.address()), &["export", "--to", to]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("has 20 entries of the log orchestrator/") && said.contains(" of 26"), "{said}");
    assert_eq!(fs::metadata(&bundle).unwrap().permissions().mode() & 0o777, 0o600);
    let (code, said) = call(Some(service.address()), &["export", "--to", to]).await;
    assert!(code == 1 && said.contains("exists; give another file"), "{code}: {said}");

    let (code, said) = verify_bundle(&bundle, &key, Some(&pin)).await;
    assert_eq!(code, 0, "{said}");
    for expected in [
        "of 26 entries, as the key has signed it",
        "6 records, 13 audit events and 1 entry about removals are as they were written",
        "retention has removed 6 entries",
        "it extends the earlier log of 26 entries",
    ] {
        assert!(said.contains(expected), "{said}");
    }
    let other = SigningKey::generate(key.name()).unwrap();
    let (code, said) = verify_bundle(&bundle, other.verifying(), None).await;
    assert!(code == 1 && said.contains("is not signed by the key"), "{said}");

    // The first line has the checkpoint, and each further one a leaf.
    let count = fs::read_to_string(&bundle).unwrap().lines().count();
    assert_eq!(count, 27);
    let part = |line: &str| Part::from_json(line).unwrap();
    for place in 1..count {
        let changed = rewritten(&bundle, |lines| {
            let Part { subtree, content } = part(&lines[place]);
            let content = match content {
                Content::Entry(entry) => Content::Entry([&entry[..], b"\x00"].concat().into()),
                Content::Hash(Hash(hash)) => Content::Hash(Hash(hash.map(|byte| byte ^ 1))),
            };
            lines[place] = Part { subtree, content }.to_json().unwrap();
        });
        let (code, said) = verify_bundle(&changed, &key, None).await;
        assert_eq!(code, 1, "line {place}: {said}");
    }
    for (change, expected) in [
        (Box::new(|lines: &mut Vec<String>| drop(lines.remove(9))) as Box<dyn FnOnce(&mut Vec<String>)>, "comes next"),
        (Box::new(|lines| lines.swap(9, 11)), "comes next"),
        (Box::new(|lines| lines.truncate(20)), "its size is 19, and that of its checkpoint 26"),
        // An entry that is left out, as if retention had removed it.
        (
            Box::new(|lines| {
                let (subtree, hash) = (part(&lines[16]).subtree, part(&lines[16]).hash());
                lines[16] = Part { subtree, content: Content::Hash(hash) }.to_json().unwrap();
            }),
            "leaf 15 is missing, and no entry says that retention has removed",
        ),
    ] {
        let (code, said) = verify_bundle(&rewritten(&bundle, change), &key, None).await;
        assert!(code == 1 && said.contains(expected), "{said}");
    }

    // What an earlier export has can be left out.
    let later = home.path("later.jsonl");
    let args = ["export", "--from-leaf", "18", "--to", later.to_str().unwrap()];
    assert_eq!(call(Some(service.address()), &args).await.0, 0);
    let (code, said) = verify_bundle(&later, &key, Some(&bundle)).await;
    assert!(code == 0 && said.contains("hashes take the place of the entries before leaf 18"), "{said}");
    assert!(said.contains("3 records, 4 audit events and 1 entry about removals"), "{said}");
}

/// The key of a service that was stopped.
fn stolen(home: &Home) -> SigningKey {
    fs::read_to_string(home.path("o.db.key")).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_is_signed_anew_with_the_stolen_key_passes_alone_and_fails_with_an_earlier_checkpoint() {
    let mut stage = Stage::new().await;
    let address = Some(stage.service.address());
    let [pin, bundle] = ["o.pin", "b.jsonl"].map(|name| stage.home.path(name));
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    inclusion(&mut ledger(&stage).await, 3, 0).await.unwrap();
    assert_eq!(call(address, &["checkpoint", "--pin", pin.to_str().unwrap()]).await.0, 0);
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    inclusion(&mut ledger(&stage).await, 6, 0).await.unwrap();
    assert_eq!(call(address, &["export", "--to", bundle.to_str().unwrap()]).await.0, 0);
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let key = stolen(&home);
    assert_eq!(verify_bundle(&bundle, key.verifying(), Some(&pin)).await.0, 0);

    // Another record in place of the one of cycle 2, with all hashes, and the signature.
    let forged = rewritten(&bundle, |lines| {
        let origin = Pin::from_json(&lines[0]).unwrap().open().unwrap().0.origin;
        let forged = Part::entry(
            2,
            Entry::Cycle(&pb::CycleTelemetry { cycle_id: 2, ..Default::default() }.encode_to_vec()).to_bytes().into(),
        );
        lines[3] = forged.to_json().unwrap();
        let mut log = Frontier::default();
        for line in &lines[1..] {
            log.append(Part::from_json(line).unwrap().hash());
        }
        let checkpoint = SigningKey::sign(&Checkpoint { origin, size: log.size(), root: log.root() }, [&key]);
        lines[0] = Pin { checkpoint, keys: vec![key.verifying().to_string()] }.to_json().unwrap();
    });
    let (code, said) = verify_bundle(&forged, key.verifying(), None).await;
    assert_eq!(code, 0, "{said}");
    let (code, said) = verify_bundle(&forged, key.verifying(), Some(&pin)).await;
    assert!(code == 1 && said.contains("the history was changed since, and signed anew"), "{said}");
}

/// A service with the key and the name of the log of another one, and a history of its own of this many cycles.
async fn impostor(home: &Home, cycles: usize) -> Stage {
    let text = fs::read_to_string(home.path("o.db.checkpoint")).unwrap();
    let origin = stolen(home).verifying().open(&text).unwrap().origin;
    let keys = format!("ledger.key_files=[\"{}\"]", home.path("o.db.key").display());
    let args = ["--set", keys.as_str(), "--set", &format!("ledger.origin={origin}")].map(str::to_owned);
    let mut stage = Stage::at(Home::new().with_args(args)).await;
    for _ in 0..cycles {
        stage.client.run().await.unwrap();
    }
    inclusion(&mut ledger(&stage).await, cycles as u64, 0).await.unwrap();
    stage
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_holds_a_service_to_its_history() {
    let mut stage = Stage::new().await;
    let pin = stage.home.path("o.pin");
    let hold = async |service: &Service, more: &[&str]| {
        let args = ["checkpoint", "--pin", pin.to_str().unwrap()];
        call(Some(service.address()), &[&args, more].concat()).await
    };
    let kept = || Pin::from_json(&fs::read_to_string(&pin).unwrap()).unwrap();
    let size = || kept().open().unwrap().0.size;
    stage.client.run().await.unwrap();
    inclusion(&mut ledger(&stage).await, 1, 0).await.unwrap();
    let (code, said) = hold(&stage.service, &[]).await;
    let key = checkpoint(&mut ledger(&stage).await).await.1;
    assert!(code == 0 && said.contains("of 2 entries is pinned") && said.contains(&key.to_string()), "{said}");
    for (cycle_id, entries) in [(2, 4), (3, 6)] {
        stage.client.run().await.unwrap();
        inclusion(&mut ledger(&stage).await, cycle_id, 0).await.unwrap();
        let (code, said) = hold(&stage.service, &[]).await;
        assert_eq!(code, 0, "{said}");
        let expected = format!("has {entries} entries, and is unchanged up to {}, the size of the pin", entries - 2);
        assert!(said.contains(&expected), "{said}");
        assert_eq!(size(), entries);
    }
    // The newest checkpoint by itself is what the file beside the database contains.
    let printed = call(Some(stage.service.address()), &["checkpoint"]).await;
    assert_eq!(printed, (0, fs::read_to_string(stage.home.path("o.db.checkpoint")).unwrap()));

    let other = SigningKey::generate(key.name()).unwrap().verifying().to_string();
    let (code, said) = hold(&stage.service, &["--key", &other]).await;
    assert!(code == 3 && said.contains("is not signed by the key"), "{code}: {said}");
    // A key that is given takes the place of those in the pin.
    fs::write(&pin, Pin { keys: vec![other, key.to_string()], ..kept() }.to_json().unwrap()).unwrap();
    assert_eq!(hold(&stage.service, &[]).await.0, 0);
    assert_eq!(kept().keys.len(), 2);
    assert_eq!(hold(&stage.service, &["--key", &key.to_string()]).await.0, 0);
    assert_eq!(kept().keys, [key.to_string()]);
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());

    // A log of other entries, a shorter one, and one of another name.
    let longer = impostor(&home, 4).await;
    let (code, said) = hold(&longer.service, &[]).await;
    assert!(code == 3 && said.contains("does not extend that of 6 entries"), "{code}: {said}");
    let shorter = impostor(&home, 2).await;
    let (code, said) = hold(&shorter.service, &[]).await;
    assert!(
        code == 3
            && said
                .contains("the log of the service has 4 entries, and the pinned one 6: the last entries are missing"),
        "{code}: {said}"
    );
    let keys = format!("ledger.key_files=[\"{}\"]", home.path("o.db.key").display());
    let other_home = Home::new().with_args(["--set", &keys, "--set", "ledger.origin=another"]);
    let renamed = other_home.serve().await;
    let (code, said) = hold(&renamed, &[]).await;
    assert!(
        code == 3 && said.contains("the service has the log another, and the pin is of orchestrator/"),
        "{code}: {said}"
    );
    assert_eq!(size(), 6, "the pin stays");
    fs::write(&pin, "text").unwrap();
    let (code, said) = hold(&longer.service, &[]).await;
    assert!(code == 1 && said.contains("does not have the form"), "{code}: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_with_a_pin_shows_proved_records_over_restarts_and_ends_when_the_history_was_changed() {
    let mut stage = Stage::new().await;
    let door = Door::open().await;
    door.lead_to(Some(&stage.service));
    let pin = stage.home.path("o.pin");
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command.args(["watch", "--from-oldest", "--output", "json", "--pin", pin.to_str().unwrap()]);
    command.env("ORCHESTRATOR_ADDRESS", door.address().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut watch = command.spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut shown = async |cycle_id: u64| {
        let next = async {
            loop {
                let line: serde_json::Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
                if let Some(id) = line["event"]["recorded"]["cycleId"].as_str() {
                    return id.to_owned();
                }
            }
        };
        assert_eq!(patiently("the next record", next).await, cycle_id.to_string());
    };
    let pinned = || Pin::from_json(&fs::read_to_string(&pin).unwrap()).unwrap().open().unwrap().0.size;
    for cycle_id in 1..=3 {
        stage.client.run().await.unwrap();
        shown(cycle_id).await;
        assert!(pinned() >= 2 * cycle_id, "what is shown is pinned");
    }
    door.shut();
    let mut stage = stage.killed().await;
    door.lead_to(Some(&stage.service));
    for cycle_id in 4..=5 {
        stage.client.run().await.unwrap();
        shown(cycle_id).await;
    }
    door.shut();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let impostor = impostor(&home, 6).await;
    door.lead_to(Some(&impostor.service));
    let ended = patiently("the watch to end", watch.wait_with_output()).await.unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(3), "{said}");
    assert!(said.contains("The history was changed, and signed anew"), "{said}");
}

#[tokio::test]
async fn bookmarks_have_the_newest_checkpoint_once() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let mut ledger = ledger(&stage).await;
    inclusion(&mut ledger, 1, 0).await.unwrap();
    let (newest, key) = checkpoint(&mut ledger).await;
    let mut stream = stage.client.watch_after(1).await.unwrap();
    let Some(Event::Bookmark(bookmark)) = next_event(&mut stream).await.unwrap().event else { panic!() };
    assert_eq!(bookmark.checkpoint, newest);
    assert_eq!(key.open(&bookmark.checkpoint).unwrap().size, 2);
}
