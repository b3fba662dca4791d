//! `orchestrator backup` and `orchestrator restore`, with a real service.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use crate::common::{
    Stage,
    service::{Client, Home, because, next_event, reason},
};
use orchestrator_core::proto::orchestrator::v1::{CycleEvent, WatchCyclesRequest, cycle_event::Event};
use rusqlite::Connection;
use tonic::{Code, Status};

/// Runs a command, and returns its exit code and what it prints.
fn orchestrator(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_orchestrator")).args(args).output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), said.concat())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn url(home: &Home) -> String {
    format!("sqlite:{}", home.path("o.db").display())
}

/// A stopped service with three cycles, and a backup that was made after two of them while it ran.
async fn backed_up() -> Home {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    for _ in 0..2 {
        stage.client.run().await.unwrap();
    }
    let backup = stage.home.path("backup.db");
    let (code, said) = orchestrator(&["backup", &url(&stage.home), "--to", text(&backup)]);
    assert!(code == Some(0) && said.contains("its last cycle is 2"), "{said}");
    assert!(said.contains("2 records and") && said.contains("are as they were written"), "{said}");
    assert!(said.contains("the seals of the log and of"), "{said}");
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    home
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_running_service_is_whole_private_and_verified_without_the_rest() {
    let home = backed_up().await;
    let backup = home.path("backup.db");
    for file in [backup.clone(), home.path("backup.db.checkpoint")] {
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{}", file.display());
    }
    assert!(!home.path("backup.db.key").exists());
    let (code, said) = orchestrator(&["verify", "--db", text(&backup), "--key-file", text(&home.path("o.db.key"))]);
    assert!(code == Some(0) && said.contains("2 records"), "{said}");
    assert_eq!(beside(&home, "backup.db"), ["backup.db", "backup.db.checkpoint"]);
    let (code, said) = orchestrator(&["backup", &url(&home), "--to", text(&backup)]);
    assert!(code == Some(1) && said.contains("backup.db exists"), "{said}");
    let none = format!("sqlite:{}", home.path("none.db").display());
    let (code, said) = orchestrator(&["backup", &none, "--to", text(&home.path("other.db"))]);
    assert!(code == Some(1) && said.contains("none.db does not exist"), "{said}");
    assert!(!home.path("other.db").exists() && !home.path("none.db").exists());
}

/// The files whose names begin so, sorted.
fn beside(home: &Home, name: &str) -> Vec<String> {
    let files = fs::read_dir(home.path("")).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = files.filter(|file| file.starts_with(name)).collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_not_what_was_recorded_is_no_backup_unless_that_is_asked_for() {
    let home = backed_up().await;
    let (store, key) = (url(&home), home.path("o.db.key"));
    let bad = home.path("bad.db");
    let back_up = |more: &[&str]| orchestrator(&[&["backup", &*store, "--to", text(&bad)], more].concat());
    let change = |sql: &str| Connection::open(home.path("o.db")).unwrap().execute(sql, []).unwrap();
    let refused = |(code, said): (Option<i32>, String), problems: &[&str]| {
        assert!(code == Some(1) && problems.iter().all(|problem| said.contains(problem)), "{said}");
        assert!(said.contains("no backup was made"), "{said}");
        assert!(beside(&home, "bad.db").is_empty(), "{:?}", beside(&home, "bad.db"));
    };
    change("UPDATE subsystems SET owner = 'token:other'");
    change("UPDATE hashes SET hash = zeroblob(32) WHERE id = 0");
    let seal = "wrong: the seal of the subsystem \"a\"";
    let hash = "wrong: the log does not have the root of the checkpoint";
    let seal_and_hash = &[seal, hash, "differs from what was recorded in"];
    refused(back_up(&[]), seal_and_hash);

    // The key is elsewhere. Without it the seals are compared with nothing, and with another one the checkpoint is not.
    fs::rename(&key, home.path("moved.key")).unwrap();
    refused(back_up(&["--key-file", text(&home.path("moved.key"))]), seal_and_hash);
    let (code, said) = back_up(&[]);
    assert!(code == Some(1) && said.contains(hash) && !said.contains(seal), "{said}");
    let other = Stage::new().await;
    refused(back_up(&["--key-file", text(&other.home.path("o.db.key"))]), &["it is not signed by the key"]);
    let (code, said) = back_up(&["--key-file", text(&home.path("none.key"))]);
    assert!(code == Some(1) && said.contains("none.key"), "{said}");

    let (code, said) = back_up(&["--unverified"]);
    assert!(code == Some(0) && said.contains("It was not verified"), "{said}");
    assert_eq!(beside(&home, "bad.db"), ["bad.db", "bad.db.checkpoint"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_the_key_at_hand_is_verified_against_its_checkpoint() {
    let home = backed_up().await;
    fs::rename(home.path("o.db.key"), home.path("moved.key")).unwrap();
    let back_up = |name: &str| orchestrator(&["backup", &url(&home), "--to", text(&home.path(name))]);
    let (code, said) = back_up("later.db");
    assert!(code == Some(0) && said.contains("3 records and"), "{said}");
    assert!(said.contains("the seals were not checked") && said.contains("nor was the signature"), "{said}");
    fs::remove_file(home.path("o.db.checkpoint")).unwrap();
    let (code, said) = back_up("without.db");
    assert!(code == Some(0) && said.contains("The store has no checkpoint, so nothing shows"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_is_served_under_enforce_and_what_it_replaced_is_kept() {
    let home = backed_up().await.with_args(["--set", "access.mode=\"enforce\""]);
    let (store, backup) = (url(&home), home.path("backup.db"));
    let service = home.serve().await;
    let restore = ["restore", text(&backup), &store];
    let replace = ["restore", text(&backup), &store, "--replace"];
    let (code, said) = orchestrator(&replace);
    assert!(code == Some(1) && said.contains("is in use by another process"), "{said}");
    assert!(service.stop().await.success());
    let (code, said) = orchestrator(&restore);
    assert!(
        code == Some(1) && said.contains("o.db exists; to restore the backup in its place, give --replace"),
        "{said}"
    );
    let (code, said) = orchestrator(&replace);
    assert!(code == Some(0) && said.contains("o.db can be served now; its last cycle is 2"), "{said}");
    assert!(home.serve().await.stop().await.success());
    assert!(!home.log().contains("a new log begins"), "it was accepted: {}", home.log());
    let cycles = |name: &str| {
        let database = Connection::open(home.path(name)).unwrap();
        database.query_row("SELECT count(*) FROM cycles", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    assert_eq!((cycles("o.db"), cycles("o.db.replaced")), (2, 3));
    let (code, said) =
        orchestrator(&["verify", "--db", text(&home.path("o.db")), "--key-file", text(&home.path("o.db.key"))]);
    assert_eq!(code, Some(0), "{said}");
    // What is kept is not overwritten.
    let (code, said) = orchestrator(&replace);
    assert!(code == Some(1) && said.contains("o.db.replaced exists, which an earlier"), "{said}");
}

/// The first event of a stream that resumes at this position.
async fn resumed(client: &mut Client, after_revision: u64, after_epoch: u64) -> Result<CycleEvent, Status> {
    let request =
        WatchCyclesRequest { after_revision: Some(after_revision), after_epoch, ..WatchCyclesRequest::default() };
    next_event(&mut client.watch_cycles(request).await?.into_inner()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_learns_that_the_history_has_gone_on_from_a_backup() {
    let mut stage = Stage::at(backed_up().await).await;
    let third = resumed(&mut stage.client, 2, 0).await.unwrap();
    let Some(Event::Recorded(_)) = third.event else { panic!("{third:?}") };
    let up_to_date = resumed(&mut stage.client, 3, third.epoch).await.unwrap();
    assert_eq!((up_to_date.revision, up_to_date.epoch), (3, third.epoch));
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let (code, said) = orchestrator(&["restore", text(&home.path("backup.db")), &url(&home), "--replace"]);
    assert_eq!(code, Some(0), "{said}");

    let mut stage = Stage::at(home).await;
    let client = &mut stage.client;
    // Without another third record, nothing shows it but the range.
    let future = resumed(client, 3, third.epoch).await.unwrap_err();
    assert_eq!(reason(&future).why, "REVISION_NOT_RETAINED", "{future}");
    let other = client.run().await.unwrap();
    assert_ne!(other.epoch, third.epoch);
    let rewritten = resumed(client, 3, third.epoch).await.unwrap_err();
    let epoch = other.epoch.to_string();
    let expected = because(Code::FailedPrecondition, "HISTORY_REWRITTEN", [("revision", "3"), ("epoch", &epoch)]);
    assert_eq!(reason(&rewritten), expected, "{rewritten}");
    assert_eq!(resumed(client, 3, other.epoch).await.unwrap().revision, 3);
    assert!(resumed(client, 2, 0).await.is_ok(), "it is not checked unless that is asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_was_changed_or_can_not_be_verified_is_restored_only_when_that_is_asked_for() {
    let home = backed_up().await;
    let backup = home.path("backup.db");
    let elsewhere = format!("sqlite:{}", home.path("elsewhere/o.db").display());
    let (code, said) = orchestrator(&["restore", text(&backup), &elsewhere]);
    assert!(code == Some(1) && said.contains("the key of the log is missing"), "{said}");
    assert!(!home.path("elsewhere").exists());
    let with_key =
        ["restore", text(&backup), &elsewhere, "--key-file", text(&home.path("o.db.key"))].map(str::to_owned);
    let with_key: Vec<_> = with_key.iter().map(String::as_str).collect();
    Connection::open(&backup).unwrap().execute("UPDATE subsystems SET owner = 'token:other'", []).unwrap();
    let (code, said) = orchestrator(&with_key);
    assert!(code == Some(1) && said.contains("the seal of the subsystem \"a\""), "{said}");
    assert_eq!(fs::read_dir(home.path("elsewhere")).unwrap().count(), 0, "nothing was restored");
    let (code, said) = orchestrator(&[&with_key[..], &["--unverified"]].concat());
    assert!(code == Some(0) && said.contains("can be served now"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_restored_is_what_was_verified() {
    let home = backed_up().await;
    let (backup, store) = (home.path("backup.db"), url(&home));
    let whole = fs::read(&backup).unwrap();
    // The file itself was changed, and its log has what is in the true one.
    let database = Connection::open(&backup).unwrap();
    let changes = "PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0; UPDATE meta SET last_cycle_id = 2";
    database.execute_batch(changes).unwrap();
    let replace = ["restore", text(&backup), &store, "--replace"];
    let (code, said) = orchestrator(&replace);
    assert!(code == Some(1) && said.contains("backup.db-wal has changes that are not in it"), "{said}");
    drop(database);
    fs::write(&backup, whole).unwrap();
    // Nor is another file written to, or read, in the place of the copy.
    let other = home.path("other");
    fs::write(&other, "other").unwrap();
    std::os::unix::fs::symlink(&other, home.path("o.db.new")).unwrap();
    fs::write(home.path("o.db.new-wal"), "").unwrap();
    let (code, said) = orchestrator(&replace);
    assert!(code == Some(0) && said.contains("can be served now"), "{said}");
    assert_eq!(fs::read_to_string(&other).unwrap(), "other");
    let is_link = fs::symlink_metadata(home.path("o.db")).unwrap().is_symlink();
    assert!(!is_link && !home.path("o.db.new-wal").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_store_replaces_none() {
    let home = backed_up().await;
    let note = home.path("note.db");
    fs::write(&note, "a text, and no database at all").unwrap();
    let (code, said) = orchestrator(&["restore", text(&note), &url(&home), "--replace", "--unverified"]);
    assert!(code == Some(1) && said.contains("is not an SQLite database"), "{said}");
    assert!(home.path("o.db").exists() && !home.path("o.db.replaced").exists());
    assert!(home.serve().await.stop().await.success());

    // In a place without a store, nothing is left of the attempt.
    let elsewhere = format!("sqlite:{}", home.path("elsewhere.db").display());
    let (code, said) = orchestrator(&["restore", text(&note), &elsewhere, "--unverified"]);
    assert!(code == Some(1) && said.contains("is not an SQLite database"), "{said}");
    assert!(beside(&home, "elsewhere").is_empty(), "{:?}", beside(&home, "elsewhere"));
}
