//! The store from outside: opening, refusals, and errors of writing.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, SystemTime},
};

#[cfg(target_os = "linux")]
use crate::common::disk;
use crate::common::{
    Stage,
    fleet::Run,
    http, patiently,
    service::{Client, Home, Service, because, decode, invalid, ms, next_event, next_recorded, reason},
};
use futures_util::{StreamExt, stream::FuturesOrdered};
use orchestrator_core::{
    clock::Clock,
    config::Config,
    dial::Dialer,
    host::Host,
    ledger::{SealKeys, Signer, SigningKey},
    memory::Shares,
    orchestrator::{Declared, Orchestrator, Stopped, TakenOver},
    ports::{self, Contents, Seals, StoreError, Untraced, Write},
    proto::orchestrator::v1::{self as pb, CycleState, Origin, Trigger, cycle_event::Event},
    record, serve, store,
    transport::Sockets,
};
use rusqlite::Connection;
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Resource, Rlimit, Signal, getrlimit, prlimit},
};
use tokio::time;
use tonic::Code;

/// Starts a service that must refuse to run, and returns its message.
async fn refused(home: &Home) -> String {
    match home.try_serve().await {
        Ok(_) => panic!("it serves:\n{}", home.log()),
        Err(status) => assert_eq!(status.code(), Some(1), "{}", home.log()),
    }
    home.log()
}

#[tokio::test]
async fn a_second_process_is_refused_with_the_pid_of_the_first() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let said = refused(&stage.home).await;
    let pid = stage.service.pid().as_raw_nonzero();
    assert!(said.contains(&format!("is in use by another process (pid {pid}); stop that process first")), "{said}");
    // The first process continues in its epoch.
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 2);
    let epoch = stage.client.status().await.unwrap().epoch;
    let mut stage = stage.killed().await;
    assert!(stage.client.status().await.unwrap().epoch > epoch);
}

/// A home whose services open the database by this path.
fn at_store(path: &Path) -> Home {
    Home::new().with_store(&format!("sqlite:{}", path.display()))
}

#[tokio::test]
async fn a_second_process_is_refused_by_any_path_and_the_first_continues() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let epoch = stage.client.status().await.unwrap().epoch;
    let (database, directory) = (stage.home.path("o.db"), stage.home.path(""));
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link.db");
    symlink(&database, &link).unwrap();
    let linked_directory = elsewhere.path().join("directory");
    symlink(&directory, &linked_directory).unwrap();
    let cd = format!("cd {} && exec \"$@\"", elsewhere.path().display());
    let relative = Home::new().with_wrapper(["sh", "-c", &cd, "sh"]).with_store("sqlite:directory/./o.db");
    for home in [at_store(&link), at_store(&linked_directory.join("o.db")), relative] {
        let said = refused(&home).await;
        assert!(said.contains("o.db is in use by another process (pid "), "{said}");
        assert_eq!(stage.client.run().await.unwrap().epoch, epoch, "{}", stage.home.log());
    }
    // It is the same file, but it would have another log and another lock beside it.
    for hard_link in [stage.home.path("hard.db"), elsewhere.path().join("hard.db")] {
        fs::hard_link(&database, &hard_link).unwrap();
        let said = refused(&at_store(&hard_link)).await;
        assert!(said.contains("hard.db is in use by another process, which has it open by another name"), "{said}");
        assert_eq!(stage.client.run().await.unwrap().epoch, epoch, "{}", stage.home.log());
        fs::remove_file(hard_link).unwrap();
    }
    let mut stage = stage.killed().await;
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 7);
}

#[tokio::test]
async fn a_database_behind_a_link_is_opened_and_made_where_the_link_leads() {
    let elsewhere = tempfile::tempdir().unwrap();
    let home = Home::new();
    symlink(home.path("o.db"), elsewhere.path().join("link.db")).unwrap();
    let linked = at_store(&elsewhere.path().join("link.db"));
    for cycle_id in 1..=2 {
        let service = linked.serve().await;
        assert_eq!(service.client().await.run().await.unwrap().cycle_id, cycle_id);
        service.kill().await;
    }
    let service = home.serve().await;
    assert_eq!(service.client().await.run().await.unwrap().cycle_id, 3);
}

#[tokio::test]
async fn a_refused_start_does_not_take_over() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.after = vec!["b".into()]).await;
    let Stage { home, service, fleet, .. } = stage;
    assert!(service.stop().await.success());
    let epoch = || -> i64 {
        let database = Connection::open(home.path("o.db")).unwrap();
        database.query_row("SELECT epoch FROM meta", [], |row| row.get(0)).unwrap()
    };
    let before = epoch();
    let database = format!("sqlite:{}", home.path("o.db").display());
    let ring = format!("[[subsystems]]\nname = \"b\"\nendpoint = \"{}\"\nafter = [\"a\"]\n", fleet.endpoint());
    let said = refused(&Home::new().with_store(&database).with_config(&ring)).await;
    assert!(said.contains("circular dependency") || said.contains("ring") || said.contains("tail"), "{said}");
    assert_eq!(epoch(), before);
}

/// Changes the store as if another process had taken over, past all locks.
fn take_over(home: &Home) {
    let database = Connection::open(home.path("o.db")).unwrap();
    assert_eq!(database.execute("UPDATE meta SET epoch = epoch + 1", []).unwrap(), 1);
}

#[tokio::test]
async fn a_superseded_process_is_fenced_when_it_writes() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    take_over(&stage.home);
    let refused = stage.client.run().await.unwrap_err();
    assert_eq!(reason(&refused).why, "LEADER_LOST", "{refused:?}");
    assert!(refused.message().contains("has taken over this store"), "{refused:?}");
    assert_eq!(stage.service.ended().await.code(), Some(3), "{}", stage.home.log());
}

#[tokio::test]
async fn a_superseded_process_ends_without_waiting_for_its_running_cycle() {
    let mut stage = Stage::new().await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("held", 1).await;
    take_over(&stage.home);
    let registration = stage.registration("b");
    assert_eq!(reason(&stage.client.register(registration).await.unwrap_err()).why, "LEADER_LOST");
    assert_eq!(stage.service.ended().await.code(), Some(3), "{}", stage.home.log());
}

#[tokio::test]
async fn an_idle_process_notices_that_it_was_superseded() {
    let home = Home::new();
    let (host, url) = (Host::system(), store::StoreUrl::Sqlite(home.path("o.db")));
    let store = store::open(&url, record::CHECKS, host.clock).await.unwrap();
    let signer = Signer::generate("test").unwrap();
    let contents = store.take_over(Seals::Checked(SealKeys::of(&signer))).await.unwrap();
    let memory = Shares::of(1 << 30);
    let (transport, timeout) = (Arc::new(Sockets::default()), Duration::from_secs(1));
    let dialer = Arc::new(Dialer::new(transport, timeout, memory.replies.clone(), host.clock));
    let (settings, declared) = (serve::settings(&Config::default()), Declared::default());
    let (store, spans) = (TakenOver::new(store, contents, signer), Arc::new(Untraced));
    let start = Orchestrator::start(settings, &memory, host, dialer, store, declared, spans);
    let (orchestrator, mut tasks) = start.await.unwrap();
    take_over(&home);
    for _ in 0..1000 {
        time::pause();
        time::advance(Duration::from_mins(1)).await;
        time::resume();
        tokio::select! {
            ended = tasks.finished() => {
                assert!(matches!(ended, Err(Stopped::Store(StoreError::Fenced { .. }))), "{ended:?}");
                return;
            }
            // The store is used meanwhile.
            size = orchestrator.store_size() => assert!(size.is_ok(), "{size:?}"),
        }
    }
    panic!("it runs for hours");
}

#[tokio::test]
async fn a_write_that_no_retry_can_complete_ends_the_service() {
    let changes = [
        ("DROP TABLE cycles", "refuses a required write: no such table"),
        (
            "INSERT INTO cycles (cycle_id, revision, epoch, state, trigger, loop, request_id, finished_at, record)
             SELECT 2, 2, epoch, state, trigger, loop, request_id, finished_at, record FROM cycles",
            "refuses a required write: UNIQUE constraint failed",
        ),
        (
            "PRAGMA writable_schema = 1; UPDATE sqlite_schema SET rootpage = 999 WHERE name = 'sqlite_autoindex_cycles_1'",
            "is damaged: ",
        ),
    ];
    for (change, expected) in changes {
        let mut stage = Stage::new().await;
        stage.client.run().await.unwrap();
        let database = Connection::open(stage.home.path("o.db")).unwrap();
        database.execute_batch(change).unwrap();
        // Other connections read the changed schema.
        if change.contains("writable_schema") {
            database.execute_batch("CREATE TABLE again (x)").unwrap();
        }
        drop(database);
        let refused = stage.client.run().await.unwrap_err();
        assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
        assert!(refused.message().contains(expected), "{refused:?}");
        assert_eq!(stage.service.ended().await.code(), Some(1), "{}", stage.home.log());
        assert!(stage.home.log().contains("stopped: the store accepts no more writes"), "{}", stage.home.log());
    }
}

#[tokio::test]
async fn a_request_id_that_a_store_does_not_accept_is_refused_before_admission() {
    let mut stage = Stage::new().await;
    let request = pb::RunCycleRequest { request_id: "a\0b".into(), ..Default::default() };
    assert_eq!(reason(&stage.client.run_with(request).await.unwrap_err()), invalid(["request_id"]));
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 1);
}

#[tokio::test]
async fn a_cycle_whose_start_could_not_be_written_at_first_can_be_awaited_and_cancelled() {
    let mut stage = Stage::at(limited()).await;
    stage.register("a", |_| {}).await;
    stage.fleet.run("a", Run::Hold);
    limit(&stage.service, Some(1));
    let request = pb::RunCycleRequest { request_id: "r".into(), ..Default::default() };
    let refused = stage.client.run_with(request.clone()).await.unwrap_err();
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    limit(&stage.service, None);
    stage.fleet.until_run("a", 1).await;
    let (mut client, again) = (stage.client.clone(), request.clone());
    let waiting = tokio::spawn(async move { client.run_with(again).await });
    let cancelled = stage.client.cancel(1).await.unwrap();
    assert_eq!(cancelled.state(), CycleState::Cancelled);
    assert_eq!(patiently("the answer", waiting).await.unwrap().unwrap(), cancelled);
}

#[tokio::test]
async fn a_log_that_grows_because_of_a_reader_is_reported_once_and_truncated_when_the_reader_leaves() {
    let mut stage = Stage::new().await;
    stage.register("large", |it| it.record_output = true).await;
    stage.fleet.run("large", Run::large_output(900_000));
    let log_bytes = || fs::metadata(stage.home.path("o.db-wal")).unwrap().len();
    let reader = Connection::open(stage.home.path("o.db")).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM meta").unwrap();
    let mut client = stage.client.clone();
    let line = "the log can't be checkpointed into the database, and grows";
    while log_bytes() < 32 << 20 {
        client.run().await.unwrap();
        assert!(!stage.home.log().contains(line) || log_bytes() > 16 << 20, "{}", stage.home.log());
    }
    assert_eq!(stage.home.log().matches(line).count(), 1, "{}", stage.home.log());
    reader.execute_batch("COMMIT").unwrap();
    stage.fleet.run("large", Run::Echo);
    patiently("the log to be cut", async {
        while log_bytes() > 4 << 20 {
            client.run().await.unwrap();
        }
    })
    .await;
    assert_eq!(stage.home.log().matches(line).count(), 1, "{}", stage.home.log());
    let line = "the log was checkpointed into the database";
    patiently("that report", async { while !stage.home.log().contains(line) {} }).await;
    assert_eq!(stage.home.log().matches(line).count(), 1, "{}", stage.home.log());
}

#[tokio::test]
async fn unreadable_records_are_named_once_and_passed_over() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    for _ in 0..6 {
        stage.client.run().await.unwrap();
    }
    let database = Connection::open(stage.home.path("o.db")).unwrap();
    database
        .execute_batch(
            "UPDATE cycles SET record = (SELECT record FROM cycles WHERE cycle_id = 1) WHERE cycle_id = 3;
             UPDATE cycles SET record = x'ff' WHERE cycle_id = 2;
             UPDATE cycles SET state = 99 WHERE cycle_id = 4;
             UPDATE cycles SET record = 'text' WHERE cycle_id = 6",
        )
        .unwrap();
    drop(database);
    // Now all records are read from the store.
    let mut stage = stage.killed().await;
    for _ in 0..2 {
        let page = stage.client.list_cycles(pb::ListCyclesRequest::default()).await.unwrap().into_inner();
        assert_eq!(page.cycles.into_iter().map(|record| decode(record).cycle_id).collect::<Vec<_>>(), [5, 1]);
        let unreadable: Vec<_> = page.unreadable.iter().map(|cycle| (cycle.cycle_id, cycle.revision)).collect();
        assert_eq!(unreadable, [(6, 6), (4, 4), (3, 3), (2, 2)]);
    }
    let refused = reason(&stage.client.cycle(2).await.unwrap_err());
    assert_eq!(refused, because(Code::DataLoss, "RECORD_UNREADABLE", [("cycle_id", "2"), ("revision", "2")]));
    let mut stream = stage.client.watch_after(0).await.unwrap();
    let mut seen = Vec::new();
    loop {
        let event = next_event(&mut stream).await.unwrap();
        match event.event.unwrap() {
            Event::Recorded(record) => seen.push((decode(record).revision, true)),
            Event::Unreadable(cycle) => seen.push((cycle.revision, false)),
            _ => break,
        }
    }
    assert_eq!(seen, [(1, true), (2, false), (3, false), (4, false), (5, true), (6, false)]);
    assert_eq!(stage.client.status().await.unwrap().total_cycles, 6);
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 7);

    let address = format!("http://{}", stage.service.address());
    for command in [&["cycles", "list"][..], &["report"], &["status"]] {
        let command =
            Command::new(env!("CARGO_BIN_EXE_orchestrator")).args(command).args(["--address", &address]).output();
        let said = command.unwrap();
        assert!(said.status.success(), "{said:?}");
    }
    let answer = http::get(stage.service.admin(), "/api/cycles").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json().await["unreadable"][0]["cycleId"], "6");
    let metrics = http::get(stage.service.admin(), "/metrics").await.text().await;
    assert!(metrics.contains("orchestrator_store_unreadable_records_total 4\n"), "{metrics}");
    assert_eq!(stage.home.log().matches("the record of a cycle can't be read").count(), 4, "{}", stage.home.log());
}

#[tokio::test]
async fn a_damaged_end_of_the_log_is_reported_and_its_ids_are_not_used_again() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let Stage { home, service, .. } = stage;
    service.kill().await;
    let log = home.path("o.db-wal");
    let mut bytes = fs::read(&log).unwrap();
    bytes[32..].fill(0xa5);
    fs::write(&log, bytes).unwrap();
    let service = home.serve().await;
    let mut client = service.client().await;
    let said = home.log();
    assert!(said.contains("acknowledged records are missing") && said.contains("1 to 3"), "{said}");
    for cycle in client.history().await.unwrap().into_iter().map(decode) {
        assert_eq!(cycle.state(), CycleState::Interrupted);
        assert!(cycle.error.contains("its record was lost"), "{cycle:?}");
    }
    // A watcher that had received all of them continues at its position.
    let mut stream = client.watch_after(3).await.unwrap();
    assert_eq!(client.run().await.unwrap().cycle_id, 4);
    assert_eq!(decode(next_recorded(&mut stream).await).cycle_id, 4);
    assert!(client.subsystems().await.unwrap().is_empty());
}

#[tokio::test]
async fn unreadable_rows_are_named_and_do_not_prevent_the_start() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    stage.client.run().await.unwrap();
    stage.fleet.run("a", Run::Hold);
    assert_eq!(stage.client.admit().await.unwrap(), 2);
    let Stage { home, service, .. } = stage;
    service.kill().await;
    let database = Connection::open(home.path("o.db")).unwrap();
    let spec = "SELECT spec FROM subsystems WHERE name = 'b'";
    let spec: String = database.query_row(spec, [], |row| row.get(0)).unwrap();
    database
        .execute_batch(
            "UPDATE subsystems SET spec = '{' WHERE name = 'b';
             INSERT INTO loops (name, spec, state) VALUES ('l', '{', '{}');
             UPDATE open_cycles SET trigger = 9 WHERE cycle_id = 2",
        )
        .unwrap();
    drop(database);
    for _ in 0..2 {
        let service = home.serve().await;
        let names: Vec<_> = service.client().await.subsystems().await.unwrap();
        assert_eq!(names.len(), 1);
        for key in ["key=\"b\"", "key=\"l\""] {
            assert!(home.log().contains(key), "{}", home.log());
        }
        // Another program may have written the row, so no record is made of it.
        assert_eq!(service.client().await.cycle(2).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(service.client().await.status().await.unwrap().total_cycles, 1);
        assert!(home.log().contains("what=\"open cycle\" key=\"2\""), "{}", home.log());
        assert!(service.stop().await.success());
    }
    let home = home.with_args(["--set", "access.mode=\"enforce\""]);
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1), "{}", home.log());
    let said = home.log();
    assert!(said.contains("the row of its open cycle \"2\" can't be read") && said.contains("store accept"), "{said}");
    let home = home.with_args(["--set", "access.mode=\"off\""]);
    // The row of a registration is kept for a repair, with its output.
    let database = Connection::open(home.path("o.db")).unwrap();
    assert_eq!(database.execute("UPDATE subsystems SET spec = ?1 WHERE name = 'b'", [spec]).unwrap(), 1);
    drop(database);
    let service = home.serve().await;
    assert_eq!(service.client().await.subsystem("b").await.unwrap().output_cycle_id, 1);
    assert!(service.stop().await.success());
    // Once it is accepted as it is, what is unknown of the open cycle stays unknown in its record.
    assert_eq!(accept(&home.path("o.db")).0, Some(0));
    let cycle = home.serve().await.client().await.cycle(2).await.unwrap();
    assert_eq!((cycle.state(), cycle.trigger()), (CycleState::Interrupted, Trigger::Unspecified));
}

/// Runs `orchestrator store accept`, and returns its exit code and its message.
fn accept(path: &Path) -> (Option<i32>, String) {
    let url = format!("sqlite:{}", path.display());
    let output = Command::new(env!("CARGO_BIN_EXE_orchestrator")).args(["store", "accept", &url]).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[tokio::test]
async fn a_copy_is_refused_until_it_is_accepted_and_the_original_continues() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.client.run().await.unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let original = Connection::open(stage.home.path("o.db")).unwrap();
    let backup = |name: &str| {
        let path = elsewhere.path().join(name);
        original.execute("VACUUM INTO ?1", [path.to_str().unwrap()]).unwrap();
        path
    };
    let (look, moved) = (backup("look.db"), backup("moved.db"));
    let before = fs::read(&look).unwrap();
    let said = refused(&at_store(&look)).await;
    assert!(said.contains("look.db is a copy of ") && said.contains("orchestrator store accept sqlite:"), "{said}");
    assert_eq!(fs::read(&look).unwrap(), before, "it was not changed");
    // Its subsystems have not seen another epoch.
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);

    let Stage { home, service, fleet, .. } = stage;
    let (code, said) = accept(&home.path("o.db"));
    assert!(code == Some(1) && said.contains("is in use by another process"), "{said}");
    assert!(service.stop().await.success());
    let (code, said) = accept(&moved);
    assert!(code == Some(0) && said.contains("moved.db can be served now; its last cycle is 1"), "{said}");
    let moved = at_store(&moved);
    for cycle_id in 2..=3 {
        let service = moved.serve().await;
        let cycle = service.client().await.run().await.unwrap();
        assert_eq!((cycle.cycle_id, cycle.state()), (cycle_id, CycleState::Succeeded));
        service.kill().await;
    }
    drop(fleet);
    let (code, said) = accept(&elsewhere.path().join("none.db"));
    assert!(code == Some(1) && said.contains("none.db does not exist"), "{said}");
    assert!(!elsewhere.path().join("none.db").exists());
}

#[tokio::test]
async fn a_renamed_database_is_accepted_unless_its_log_is_missing_or_it_has_two_names() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    service.kill().await;
    let renamed = home.path("renamed.db");
    fs::hard_link(home.path("o.db"), &renamed).unwrap();
    let said = refused(&at_store(&renamed)).await;
    assert!(said.contains("renamed.db is the same file as ") && said.contains("a hard link"), "{said}");
    // It can still be opened by its own name.
    let service = home.serve().await;
    assert_eq!(service.client().await.run().await.unwrap().cycle_id, 2);
    service.kill().await;
    fs::remove_file(home.path("o.db")).unwrap();
    let said = refused(&at_store(&renamed)).await;
    assert!(said.contains("the log with its latest records is still at ") && said.contains("o.db-wal"), "{said}");
    fs::rename(home.path("o.db-wal"), home.path("renamed.db-wal")).unwrap();
    let service = at_store(&renamed).serve().await;
    assert_eq!(service.client().await.run().await.unwrap().cycle_id, 3);
}

#[tokio::test]
async fn a_log_without_its_database_is_kept_until_the_database_returns() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    service.kill().await;
    let elsewhere = home.path("elsewhere.db");
    fs::rename(home.path("o.db"), &elsewhere).unwrap();
    for _ in 0..2 {
        let said = refused(&home).await;
        assert!(said.contains("put the database back in its place") && said.contains("o.db-wal"), "{said}");
    }
    fs::rename(elsewhere, home.path("o.db")).unwrap();
    assert_eq!(home.serve().await.client().await.run().await.unwrap().cycle_id, 2);
}

#[tokio::test]
async fn a_missing_or_replaced_database_is_logged_as_an_error_with_its_last_cycle() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    fs::rename(home.path("o.db"), home.path("removed.db")).unwrap();
    let service = home.serve().await;
    assert_eq!(service.client().await.run().await.unwrap().cycle_id, 1);
    let log = home.log();
    let line = log.lines().find(|line| line.contains("is gone")).unwrap_or_else(|| panic!("{log}"));
    assert!(
        line.contains("ERROR") && line.contains("last_cycle_id=2") && line.contains("put the database back"),
        "{line}"
    );

    assert!(service.stop().await.success());
    fs::rename(home.path("removed.db"), home.path("o.db")).unwrap();
    let service = home.serve().await;
    assert_eq!(service.client().await.run().await.unwrap().cycle_id, 3);
    let log = home.log();
    let line = log.lines().find(|line| line.contains("another database")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("ERROR") && line.contains("last_cycle_id=1") && line.contains("ends with cycle 2"), "{line}");
}

#[tokio::test]
async fn a_backup_that_is_restored_in_its_place_is_the_same_database() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    fs::copy(home.path("o.db"), home.path("backup.db")).unwrap();
    fs::rename(home.path("backup.db"), home.path("o.db")).unwrap();
    let service = home.serve().await;
    assert_eq!(service.client().await.run().await.unwrap().cycle_id, 2);
    assert!(home.log().contains("the file of this database is another one"), "{}", home.log());
}

#[tokio::test]
async fn nothing_is_acknowledged_into_a_database_that_was_removed() {
    for file in ["o.db", "o.db-wal"] {
        let mut stage = Stage::new().await;
        stage.client.run().await.unwrap();
        fs::rename(stage.home.path(file), stage.home.path("elsewhere")).unwrap();
        let refused = stage.client.run().await.unwrap_err();
        assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
        assert!(refused.message().contains("was removed or replaced"), "{refused:?}");
        // Once the file is back in its place, it is written again, and contains the cycle that ran.
        fs::rename(stage.home.path("elsewhere"), stage.home.path(file)).unwrap();
        patiently("writing to continue", async { while stage.client.run().await.is_err() {} }).await;
        let mut stage = stage.killed().await;
        let history = stage.client.history().await.unwrap();
        assert_eq!(history.into_iter().map(|record| decode(record).cycle_id).collect::<Vec<_>>(), [1, 2, 3]);
    }
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_refused_and_left_unchanged() {
    let stage = Stage::new().await;
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let database = Connection::open(home.path("o.db")).unwrap();
    let known: i64 = database.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    database.pragma_update(None, "user_version", known + 1).unwrap();
    drop(database);
    let before = fs::read(home.path("o.db")).unwrap();
    let said = refused(&home).await;
    let expected = format!("has schema version {}, but this version of the software supports up to {known}", known + 1);
    assert!(said.contains(&expected), "{said}");
    assert_eq!(fs::read(home.path("o.db")).unwrap(), before);
}

#[tokio::test]
async fn a_foreign_database_is_refused_and_left_unchanged() {
    let home = Home::new();
    fs::write(home.path("o.db"), "It was a dark and stormy night. ".repeat(100)).unwrap();
    let before = fs::read(home.path("o.db")).unwrap();
    let said = refused(&home).await;
    assert!(said.contains("o.db is not an SQLite database, or its beginning is damaged; name another store"), "{said}");
    assert_eq!(fs::read(home.path("o.db")).unwrap(), before);
    let entries = |home: &Home| fs::read_dir(home.path("")).unwrap().count();
    // The database and the log of the service.
    assert_eq!(entries(&home), 2, "no file is left beside it");

    // Other software numbers its schemas, too.
    for version in [0, 1] {
        let home = Home::new();
        let database = Connection::open(home.path("o.db")).unwrap();
        database.execute_batch("CREATE TABLE recipes (name TEXT)").unwrap();
        database.pragma_update(None, "user_version", version).unwrap();
        drop(database);
        let before = fs::read(home.path("o.db")).unwrap();
        let said = refused(&home).await;
        assert!(said.contains("o.db is a database of some other software; name another store"), "{version}: {said}");
        let (code, said) = accept(&home.path("o.db"));
        assert!(code == Some(1) && said.contains("of some other software; name another store"), "{said}");
        assert_eq!(fs::read(home.path("o.db")).unwrap(), before);
        assert_eq!(entries(&home), 2, "no file is left beside it");
    }
}

#[tokio::test]
async fn a_damaged_database_is_refused() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.record_output = true).await;
    for _ in 0..20 {
        stage.client.run().await.unwrap();
    }
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let mut bytes = fs::read(home.path("o.db")).unwrap();
    // All but the first page, by which the file is recognized.
    bytes[4096..].fill(0xa5);
    fs::write(home.path("o.db"), bytes).unwrap();
    let said = refused(&home).await;
    assert!(said.contains("o.db is damaged: "), "{said}");
    assert!(said.contains("restore it from a backup"), "{said}");
}

#[tokio::test]
async fn a_database_from_which_no_process_can_continue_is_refused_and_left_unchanged() {
    let mut stage = Stage::new().await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let sound = fs::read(home.path("o.db")).unwrap();
    let most = i64::MAX;
    for (change, expected) in [
        (
            "last_cycle_id = 2",
            "last_cycle_id in its table meta is 2, and 3 is the newest cycle in its history".to_owned(),
        ),
        (
            "last_revision = 1",
            "last_revision in its table meta is 1, and 3 is the newest revision in its history".to_owned(),
        ),
        (
            "pruned_to = 4",
            "last_revision in its table meta is 3, and 4 is a revision that was already removed".to_owned(),
        ),
        ("epoch = -1", "epoch in its table meta is -1, which leaves no next number".to_owned()),
        (&format!("epoch = {most}"), format!("epoch in its table meta is {most}, which leaves no next number")),
        (
            &format!("last_cycle_id = {most}"),
            format!("last_cycle_id in its table meta is {most}, which leaves no next number"),
        ),
        (&format!("commits = {most}"), format!("commits in its table meta is {most}, which leaves no next number")),
    ] {
        fs::write(home.path("o.db"), &sound).unwrap();
        let database = Connection::open(home.path("o.db")).unwrap();
        database.execute(&format!("UPDATE meta SET {change}"), []).unwrap();
        drop(database);
        let before = fs::read(home.path("o.db")).unwrap();
        let said = refused(&home).await;
        assert!(said.contains(&format!("o.db is damaged: {expected}")), "{expected}:\n{said}");
        assert!(said.contains("restore it from a backup"), "{said}");
        assert_eq!(fs::read(home.path("o.db")).unwrap(), before);
    }
}

/// Creates something that is not a regular file at this path, and returns its description.
type Put = fn(&Path) -> &'static str;

const PUT_IRREGULAR: [Put; 4] = [
    |path| {
        fs::create_dir(path).unwrap();
        "a directory"
    },
    |path| {
        mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        "a pipe"
    },
    |path| {
        // The file of a socket stays when the socket is closed.
        UnixListener::bind(path).unwrap();
        "a socket"
    },
    |path| {
        symlink("/dev/null", path).unwrap();
        "a device"
    },
];

#[tokio::test]
async fn a_file_that_is_not_regular_is_named_and_no_file_is_created() {
    let assert_named = |said: &str, path: &Path, is: &str| {
        let expected = format!("{} is {is}, not a regular file; give", path.display());
        assert!(said.contains(&expected), "{expected}:\n{said}");
    };
    let entries = |home: &Home| {
        let entries = fs::read_dir(home.path("")).unwrap().map(|entry| entry.unwrap().file_name());
        entries.filter(|name| name != "log").count()
    };
    for put in PUT_IRREGULAR {
        let home = Home::new();
        let is = put(&home.path("o.db"));
        let path = if is == "a device" { "/dev/null".into() } else { home.path("o.db") };
        assert_named(&refused(&home).await, &path, is);
        let (code, said) = accept(&home.path("o.db"));
        assert_eq!(code, Some(1), "{said}");
        assert_named(&said, &path, is);
        assert_eq!(entries(&home), 1);
    }
    let said = refused(&at_store(Path::new("/dev/null"))).await;
    assert_named(&said, Path::new("/dev/null"), "a device");
    for name in ["/dev/null.lock", "/dev/null.last"] {
        assert!(!Path::new(name).exists(), "{name}");
    }
    for (put, name) in
        PUT_IRREGULAR.into_iter().cycle().zip(["o.db.lock", "o.db.last", "o.db-wal", "o.db-shm", "o.db.last"])
    {
        let home = Home::new();
        fs::write(home.path("o.db"), "").unwrap();
        let is = put(&home.path(name));
        assert_named(&refused(&home).await, &home.path(name), is);
        assert_eq!(entries(&home), 2);
    }
    let home = Home::new();
    fs::write(home.path("file"), "").unwrap();
    let said = refused(&at_store(&home.path("file/o.db"))).await;
    assert!(said.contains("file is not a directory and can't be created; give the database another path"), "{said}");
    #[cfg(target_os = "linux")]
    {
        let said = refused(&at_store(Path::new("/proc/none/o.db"))).await;
        assert!(said.contains("/proc/none can't be created: ") && !said.contains("make it writable"), "{said}");
    }
}

/// A home whose services get an error if a file may not grow, instead of a signal that kills them.
fn limited() -> Home {
    Home::new().with_wrapper(["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"])
}

#[tokio::test]
async fn a_start_on_a_full_disk_is_refused_with_the_cause_and_the_remedy() {
    let home = Home::new();
    assert!(home.serve().await.stop().await.success());
    // No file may have more than 8 or 16 KiB, depending on the shell.
    let home = home.with_wrapper(["sh", "-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "sh"]);
    let said = refused(&home).await;
    let expected = "disk I/O error when ";
    assert!(said.contains(expected) && said.contains("o.db-shm had to grow"), "{said}");
    assert!(said.contains("no space left to write ") && said.contains("free some space"), "{said}");
}

/// Limits the size of the service's files, which simulates a full disk.
fn limit(service: &Service, bytes: Option<u64>) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Fsize);
    let limit = Rlimit { current: bytes.or(maximum), maximum };
    prlimit(Some(service.pid()), Resource::Fsize, limit).unwrap();
}

#[tokio::test]
async fn when_the_disk_is_full_no_record_is_lost_reads_continue_and_the_service_recovers() {
    let mut stage = Stage::at(limited()).await;
    stage.register("a", |_| {}).await;
    let first = stage.client.run().await.unwrap();
    let mut stream = stage.client.watch_after(0).await.unwrap();
    assert_eq!(decode(next_recorded(&mut stream).await), first);
    assert!(matches!(next_event(&mut stream).await.unwrap().event, Some(Event::Bookmark(_))));

    // The disk fills up while a cycle runs.
    stage.fleet.run("a", Run::Hold);
    let mut client = stage.client.clone();
    let request = pb::RunCycleRequest { request_id: "r".into(), ..Default::default() };
    let again = request.clone();
    let running = tokio::spawn(async move { client.run_with(again).await });
    stage.fleet.until_run("a", 2).await;
    limit(&stage.service, Some(1));
    stage.fleet.run("a", Run::Echo);
    let refused = patiently("the answer", running).await.unwrap().unwrap_err();
    let refused = reason(&refused);
    assert_eq!((refused.code, refused.why.as_str()), (Code::Unavailable, "STORE_UNAVAILABLE"));
    assert_eq!(refused.metadata["cycle_id"], "2");

    // Reads continue, and nothing is acknowledged.
    let status = stage.client.status().await.unwrap();
    assert!(status.store_error.contains("o.db"), "{status:?}");
    assert_eq!((status.total_cycles, decode(status.last_cycle)), (1, first.clone()));
    assert_eq!(stage.client.cycle(1).await.unwrap(), first);
    assert_eq!(stage.client.history().await.unwrap().len(), 1);
    assert_eq!(reason(&stage.client.cycle(2).await.unwrap_err()).why, "CYCLE_NOT_FINISHED");
    let mut from_oldest = stage.client.watch_after(0).await.unwrap();
    assert_eq!(decode(next_recorded(&mut from_oldest).await), first);
    let refused = [
        stage.client.run().await.unwrap_err(),
        stage.client.admit().await.unwrap_err(),
        stage.client.register(stage.registration("b")).await.unwrap_err(),
        stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "a".into() }).await.unwrap_err(),
        stage
            .client
            .start_interval_loop(pb::StartIntervalLoopRequest {
                r#loop: Some(pb::IntervalLoop { name: "l".into(), interval: ms(1000), ..Default::default() }),
            })
            .await
            .unwrap_err(),
    ];
    for status in refused {
        assert_eq!(reason(&status).why, "STORE_UNAVAILABLE", "{status:?}");
    }
    assert_eq!(stage.client.subsystems().await.unwrap().len(), 1);
    assert!(!stage.client.subsystem("a").await.unwrap().suspended);
    assert!(stage.client.status().await.unwrap().loops.is_empty());

    // There is space again.
    limit(&stage.service, None);
    let second = decode(next_recorded(&mut stream).await);
    assert_eq!((second.cycle_id, second.state()), (2, CycleState::Succeeded));
    assert_eq!(stage.client.run_with(request).await.unwrap(), second);
    assert_eq!(stage.client.status().await.unwrap().store_error, "");
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 3);
    stage.register("b", |_| {}).await;
    let mut stage = stage.killed().await;
    let history = stage.client.history().await.unwrap();
    assert_eq!(history.into_iter().map(|record| decode(record).cycle_id).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(stage.client.subsystems().await.unwrap().len(), 2);
}

/// A limit of the size of files with which the log of the service can grow, and that of a database can't once it has
/// [grown beyond it](grow_beyond_room).
const ROOM: u64 = 64 << 10;

/// Runs cycles until they are written behind the first bytes of the log of the database.
async fn grow_beyond_room(stage: &mut Stage) {
    let length = || fs::metadata(stage.home.path("o.db-wal")).unwrap().len();
    // Its beginning is written again after the start.
    let before = length().max(ROOM);
    while length() <= before {
        stage.client.run().await.unwrap();
    }
}

#[tokio::test]
async fn a_reload_that_is_refused_because_the_disk_is_full_is_to_be_repeated() {
    let mut stage = Stage::at(limited().with_config("")).await;
    grow_beyond_room(&mut stage).await;
    limit(&stage.service, Some(ROOM));
    stage.service.signal(Signal::HUP);
    stage.home.logged("not reloaded, the old configuration still applies", 1).await;
    stage.home.logged("send SIGHUP again once the store can be written", 1).await;
    limit(&stage.service, None);
    stage.service.signal(Signal::HUP);
    stage.home.logged("reloaded changed=\"nothing\"", 1).await;
}

#[tokio::test]
async fn a_shutdown_on_a_full_disk_does_not_wait_for_the_grace_period_and_names_what_is_lost() {
    // Longer than the test waits for the end.
    let mut stage = Stage::at(limited().with_args(["--set", "server.drain_grace=10m"])).await;
    stage.register("a", |_| {}).await;
    grow_beyond_room(&mut stage).await;
    stage.fleet.run("a", Run::Hold);
    let mut client = stage.client.clone();
    let begun = stage.fleet.runs("a").len() + 1;
    let running = tokio::spawn(async move { client.run().await });
    stage.fleet.until_run("a", begun).await;
    limit(&stage.service, Some(ROOM));
    stage.fleet.run("a", Run::Echo);
    let refused = reason(&patiently("the answer", running).await.unwrap().unwrap_err());
    assert_eq!(refused.why, "STORE_UNAVAILABLE");
    let cycle_id: u64 = refused.metadata["cycle_id"].parse().unwrap();

    stage.service.signal(Signal::TERM);
    assert_eq!(stage.service.ended().await.code(), Some(1), "{}", stage.home.log());
    let log = stage.home.log();
    assert!(log.contains("not recorded: the next start records") && log.contains(&format!("\"{cycle_id}\"")), "{log}");
    assert!(log.contains("the last state was not written"), "{log}");
    let Stage { fleet, home, .. } = stage;
    let mut stage = Stage::again(fleet, home).await;
    assert_eq!(stage.client.cycle(cycle_id).await.unwrap().state(), CycleState::Interrupted);
}

#[tokio::test]
async fn ticks_are_dropped_while_the_disk_is_full_and_a_kill_then_loses_no_acknowledged_cycle() {
    let mut stage = Stage::at(limited()).await;
    stage.register("a", |_| {}).await;
    let settings = pb::IntervalLoop { name: "l".into(), interval: ms(20), ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await.unwrap();
    stage.client.recorded(1).await;
    limit(&stage.service, Some(1));
    let dropped = async {
        loop {
            let status = stage.client.status().await.unwrap();
            if status.loops[0].ticks.unwrap().dropped >= 2 {
                return status;
            }
        }
    };
    let status = patiently("ticks to be dropped", dropped).await;
    assert!(!status.store_error.is_empty());
    let before = stage.client.history().await.unwrap();
    let Stage { home, service, .. } = stage;
    service.kill().await;
    let service = home.serve().await;
    let mut client = service.client().await;
    let after = client.history().await.unwrap();
    assert_eq!(after[..before.len()], before);
    let cycles: Vec<_> = after.into_iter().map(decode).collect();
    assert!(cycles.iter().map(|cycle| cycle.cycle_id).eq(1..=cycles.len() as u64));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn while_the_disk_hangs_no_cycle_is_admitted_and_the_pending_write_is_recorded_afterwards() {
    let mut stage = Stage::at(disk::home()).await;
    stage.register("a", |_| {}).await;
    disk::hangs(&stage.home);
    let refused = reason(&patiently("the answer", stage.client.run()).await.unwrap_err());
    assert_eq!((refused.code, refused.why.as_str()), (Code::Unavailable, "STORE_UNAVAILABLE"));
    assert_eq!(refused.metadata["cycle_id"], "1");
    let status = stage.client.status().await.unwrap();
    let expected = "o.db has not returned within 5s, and is still awaited";
    assert!(status.store_error.contains(expected), "{status:?}");
    let refused = [
        stage.client.run().await.unwrap_err(),
        stage.client.admit().await.unwrap_err(),
        stage.client.register(stage.registration("b")).await.unwrap_err(),
    ];
    for status in refused {
        assert_eq!(reason(&status).why, "STORE_UNAVAILABLE", "{status:?}");
    }
    assert_eq!(stage.fleet.runs("a").len(), 1);
    assert!(stage.client.history().await.unwrap().is_empty(), "the history can be read");

    let mut stream = stage.client.watch_after(0).await.unwrap();
    disk::comes_back(&stage.home);
    let first = decode(next_recorded(&mut stream).await);
    assert_eq!((first.cycle_id, first.state()), (1, CycleState::Succeeded));
    assert_eq!(stage.client.status().await.unwrap().store_error, "");
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 2);
    let mut stage = stage.killed().await;
    assert_eq!(stage.client.status().await.unwrap().total_cycles, 2);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_registration_whose_write_hangs_is_refused_and_may_still_be_made() {
    let mut stage = Stage::at(disk::home()).await;
    disk::hangs(&stage.home);
    let status = patiently("the answer", stage.client.register(stage.registration("a"))).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).why.as_str()), (Code::Unavailable, "STORE_UNAVAILABLE"));
    assert!(status.message().contains("may still be made"), "{status:?}");
    disk::comes_back(&stage.home);
    // The last write comes after it.
    let mut stage = stage.restarted().await;
    assert_eq!(stage.client.subsystems().await.unwrap().len(), 1);
}

/// Causes a power failure while this number of cycles runs side by side, and checks the state of the next process.
#[cfg(target_os = "linux")]
async fn lose_power(mut stage: Stage, running: usize) -> Stage {
    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    let recorded = stage.client.history().await.unwrap();
    for name in &NAMES[..running] {
        stage.fleet.run(name, Run::Hold);
        let nth = stage.fleet.runs(name).len() + 1;
        let request = pb::RunCycleRequest { subsystems: vec![(*name).into()], ..Default::default() };
        let mut client = stage.client.clone();
        tokio::spawn(async move { client.run_with(request).await });
        stage.fleet.until_run(name, nth).await;
    }
    let Stage { fleet, home, service, .. } = stage;
    service.kill().await;
    disk::loses_power(&home);
    let seen = fleet.calls().iter().map(|call| call.cycle_id).max().unwrap_or_default();
    let database = Connection::open(home.path("o.db")).unwrap();
    let noted: i64 = database.query_row("SELECT last_cycle_id FROM meta", [], |row| row.get(0)).unwrap();
    drop(database);
    if running == 1 {
        assert_eq!(u64::try_from(noted).unwrap() + 1, seen, "the note of its start is lost");
    }

    let service = home.serve().await;
    let mut client = service.client().await;
    for name in NAMES {
        fleet.run(name, Run::Echo);
    }
    let next = client.run().await.unwrap();
    assert!(
        next.cycle_id > seen,
        "{running} running: a subsystem has seen {}, and {} is used now",
        seen,
        next.cycle_id
    );
    // Each id has one record, and acknowledged records are unchanged.
    let history = client.history().await.unwrap();
    assert_eq!(history[..recorded.len()], recorded);
    let cycles: Vec<_> = history.into_iter().map(decode).collect();
    let mut ids: Vec<_> = cycles.iter().map(|cycle| cycle.cycle_id).collect();
    ids.sort_unstable();
    assert_eq!(ids, (1..=next.cycle_id).collect::<Vec<_>>());
    let interrupted = &cycles[recorded.len()..cycles.len() - 1];
    assert!(interrupted.iter().all(|cycle| cycle.state() == CycleState::Interrupted), "{interrupted:?}");
    Stage { fleet, home, service, client }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn after_a_power_failure_no_known_cycle_id_is_used_again() {
    let mut stage = Stage::at(disk::home()).await;
    stage.register_all(&["a", "b", "c", "d"]).await;
    for running in [0, 1, 2, 3, 4, 1] {
        stage = lose_power(stage, running).await;
    }
}

#[tokio::test]
async fn a_killed_cycle_is_recorded_and_a_killed_idle_process_leaves_no_record() {
    let mut stage = Stage::new().await;
    stage.register("held", |_| {}).await;
    stage.client.run().await.unwrap();
    let stage = stage.killed().await;
    let mut stage = stage.killed().await;
    assert_eq!(stage.client.status().await.unwrap().total_cycles, 1);
    stage.fleet.run("held", Run::Hold);
    let settings = pb::IntervalLoop { name: "l".into(), interval: ms(10), ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await.unwrap();
    stage.fleet.until_run("held", 2).await;
    let mut stage = stage.killed().await;
    let interrupted = stage.client.cycle(2).await.unwrap();
    assert_eq!(interrupted.state(), CycleState::Interrupted);
    assert_eq!((interrupted.trigger(), interrupted.r#loop.as_str()), (Trigger::Loop, "l"));
    assert!(interrupted.scheduled_at.is_some() && interrupted.started_at.is_some());
    assert!(interrupted.finished_at.is_some());
    assert_eq!(interrupted.epoch, stage.client.status().await.unwrap().epoch);
}

/// Writes to the store of a home as a process with the key of its log can.
async fn write(home: &Home, change: impl FnOnce(Contents) -> Write) {
    let key: SigningKey = fs::read_to_string(home.path("o.db.key")).unwrap().parse().unwrap();
    let signer = Signer { origin: key.verifying().name().to_owned(), keys: vec![key] };
    let url = store::StoreUrl::Sqlite(home.path("o.db"));
    let store = store::open(&url, record::CHECKS, Clock::system()).await.unwrap();
    let contents = store.take_over(Seals::Checked(SealKeys::of(&signer))).await.unwrap();
    let (epoch, last_cycle_id) = (contents.epoch, contents.last_cycle_id);
    store.commit(Arc::new(Write { epoch, last_cycle_id, ..change(contents) })).await.unwrap();
}

/// Changes the phase of the only stored registration.
async fn set_phase(home: &Home, phase: i32) {
    let change = |mut contents: Contents| {
        let mut stored = contents.subsystems.remove(0);
        stored.spec.as_mut().unwrap().phase = Some(phase);
        Write { subsystems: [(stored.name.clone(), Some(Arc::new(stored)))].into(), ..Write::default() }
    };
    write(home, change).await;
}

#[tokio::test]
async fn a_stored_registration_that_breaks_a_rule_is_left_out_and_stays_stored() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    // A later version with wider bounds could have written this.
    set_phase(&home, 9_999_999).await;
    let service = home.serve().await;
    assert!(service.client().await.subsystems().await.unwrap().is_empty());
    assert!(home.log().contains("skipped: a stored registration is invalid"), "{}", home.log());
    assert!(service.stop().await.success());
    set_phase(&home, 0).await;
    let service = home.serve().await;
    let status = service.client().await.subsystem("a").await.unwrap();
    assert_eq!((status.origin(), status.output_cycle_id), (Origin::Rpc, 1));
}

/// Blocks writes of the service until it is dropped, as a program that copies the database may. The service waits for
/// at most five seconds.
fn lock(home: &Home) -> Connection {
    let database = Connection::open(home.path("o.db")).unwrap();
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    database
}

fn lease(registration: pb::Registration) -> pb::RegisterSubsystemRequest {
    pb::RegisterSubsystemRequest { registration: Some(registration), lease: ms(1000) }
}

async fn lease_ends_at(client: &mut Client) -> SystemTime {
    client.subsystem("a").await.unwrap().lease_expires_at.unwrap().try_into().unwrap()
}

#[tokio::test]
async fn an_expired_lease_is_not_renewed_while_its_end_is_being_written() {
    let mut stage = Stage::new().await;
    let request = lease(stage.registration("a"));
    stage.client.register_subsystem(request).await.unwrap();
    let locked = lock(&stage.home);
    // An expired lease is shown with the current time as its end.
    let ends_at = lease_ends_at(&mut stage.client).await;
    while lease_ends_at(&mut stage.client).await < ends_at + Duration::from_millis(200) {}
    let renewed = stage.client.renew_lease(pb::RenewLeaseRequest { name: "a".into() }).await;
    drop(locked);
    patiently("the end of the lease", async { while stage.client.subsystem("a").await.is_ok() {} }).await;
    assert_eq!(reason(&renewed.unwrap_err()).why, "SUBSYSTEM_NOT_FOUND");
}

#[tokio::test]
async fn a_lease_begins_when_it_is_acknowledged() {
    let mut stage = Stage::new().await;
    let locked = lock(&stage.home);
    let (mut client, request) = (stage.client.clone(), lease(stage.registration("a")));
    let registering = tokio::spawn(async move { client.register_subsystem(request).await });
    // Time enough for the service to receive the request.
    for _ in 0..100 {
        stage.client.status().await.unwrap();
    }
    let unlocked_at = SystemTime::now();
    drop(locked);
    patiently("the registration", registering).await.unwrap().unwrap();
    assert!(lease_ends_at(&mut stage.client).await >= unlocked_at + Duration::from_secs(1));
}

#[tokio::test]
async fn a_tick_that_ran_has_a_cycle_in_the_history_whenever_the_process_is_killed() {
    let mut stage = Stage::new().await;
    stage.client.run().await.unwrap();
    let settings = pb::IntervalLoop { name: "l".into(), interval: ms(2000), ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await.unwrap();
    let locked = lock(&stage.home);
    let ran = async |client: &mut Client| client.status().await.unwrap().loops[0].ticks.unwrap().ran;
    let before = ran(&mut stage.client).await;
    // They are written one after another, and the start of the cycle after them.
    let mut registering: FuturesOrdered<_> = (0..64)
        .map(|i| {
            let (mut client, registration) = (stage.client.clone(), stage.registration(&format!("a{i}")));
            async move { client.register(registration).await }
        })
        .collect();
    let first = async {
        tokio::select! {
            first = registering.next() => first.unwrap().unwrap(),
            () = async {
                while ran(&mut stage.client.clone()).await == before {}
                drop(locked);
                std::future::pending::<()>().await;
            } => unreachable!(),
        }
    };
    patiently("the first registration", first).await;
    for _ in 0..4 {
        registering.next().await.unwrap().unwrap();
    }
    let mut stage = stage.killed().await;
    let status = stage.client.status().await.unwrap();
    assert!(status.loops[0].last_cycle_id <= status.total_cycles, "{status:?}");
}

#[tokio::test]
async fn signals_are_handled_while_a_reload_waits_for_the_store() {
    let mut stage = Stage::at(Home::new().with_config("")).await;
    stage.client.run().await.unwrap();
    let _locked = lock(&stage.home);
    for (signal, logged) in [(Signal::HUP, "reloading: SIGHUP"), (Signal::TERM, "shutting down")] {
        stage.service.signal(signal);
        patiently(logged, async { while !stage.home.log().contains(logged) {} }).await;
    }
    assert!(!stage.home.log().contains("not reloaded"), "{}", stage.home.log());
    assert_eq!(stage.service.aborted().await.code(), Some(130), "{}", stage.home.log());
}

#[tokio::test]
async fn a_cycle_does_not_end_before_it_started_though_the_clock_was_set_back() {
    let mut stage = Stage::new().await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("held", 1).await;
    let Stage { home, service, .. } = stage;
    service.kill().await;
    let an_hour_later = |mut contents: Contents| {
        let mut open = contents.open.remove(0);
        let ports::Stage::Begun(at) = open.stage else { panic!("{open:?}") };
        open.stage = ports::Stage::Begun(at + Duration::from_hours(1));
        Write { open: vec![open], ..Write::default() }
    };
    write(&home, an_hour_later).await;
    let service = home.serve().await;
    let cycle = service.client().await.cycle(1).await.unwrap();
    assert_eq!(cycle.state(), CycleState::Interrupted);
    assert_eq!((cycle.finished_at, cycle.duration_ms.to_bits()), (cycle.started_at, 0));
}

#[tokio::test]
async fn only_the_owner_of_a_new_database_can_use_its_files() {
    let directory = tempfile::tempdir().unwrap();
    let below = directory.path().join("of/the/fleet");
    let home = at_store(&below.join("o.db"));
    let service = home.serve().await;
    service.client().await.run().await.unwrap();
    let files = || fs::read_dir(&below).unwrap().map(|entry| entry.unwrap().path());
    // The first checkpoint comes after the first entry of the log.
    let published = async {
        while !below.join("o.db.checkpoint").exists() {
            tokio::task::yield_now().await;
        }
    };
    patiently("the first checkpoint", published).await;
    let modes: BTreeMap<_, _> =
        files().map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), mode(&path))).collect();
    for file in ["o.db", "o.db-wal", "o.db-shm", "o.db.key", "o.db.checkpoint", "o.db.last", "o.db.lock"] {
        assert_eq!(modes[file], 0o600, "{file}");
    }
    assert_eq!((mode(&below), mode(below.parent().unwrap())), (0o700, 0o700));
    assert!(service.stop().await.success());
    assert!(!home.log().contains("other users of this machine"), "{}", home.log());

    // What others may be meant to read stays as it is.
    let database = below.join("o.db");
    fs::set_permissions(&database, Permissions::from_mode(0o640)).unwrap();
    let _service = home.serve().await;
    assert_eq!(mode(&database), 0o640);
    assert!(home.log().contains("other users of this machine can read the database"), "{}", home.log());
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

#[tokio::test]
async fn a_database_to_which_somebody_has_added_a_trigger_is_refused() {
    let home = Home::new();
    let service = home.serve().await;
    service.client().await.run().await.unwrap();
    assert!(service.stop().await.success());
    let database = Connection::open(home.path("o.db")).unwrap();
    database.execute_batch("CREATE VIEW ids AS SELECT cycle_id FROM cycles").unwrap();
    assert!(home.serve().await.stop().await.success(), "a view only reads");
    let trigger = "CREATE TRIGGER quiet AFTER INSERT ON cycles BEGIN DELETE FROM cycles WHERE cycle_id = 1; END";
    database.execute_batch(trigger).unwrap();
    let refused = refused(&home).await;
    assert!(refused.contains("the trigger \"quiet\""), "{refused}");
    database.execute_batch("DROP TRIGGER quiet").unwrap();
    home.serve().await;
}

#[tokio::test]
async fn a_store_in_memory_forgets_everything() {
    let home = Home::new().in_memory();
    let mut stage = Stage::at(home).await;
    stage.register("a", |_| {}).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(stage.client.cycle(1).await.unwrap(), cycle);
    assert!(!stage.home.path("o.db").exists());
    let mut stage = stage.restarted().await;
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.total_cycles, status.subsystem_count), (0, 0));
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 1);
}
