//! A store in PostgreSQL, with a real server: where it is installed.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::net::TcpListener;

use common::{
    Stage, command,
    command::orchestrator,
    http::get,
    patiently,
    postgres::{Server, shared, shared_pooler},
    service::{Home, Service, decode, next_recorded, reason},
};
use orchestrator_core::ledger::SigningKey;
use tokio::process::Command;

/// A home whose services use a new store on this server.
fn home(server: &Server) -> Home {
    home_at(&server.url())
}

/// A home whose services use the store at this URL.
fn home_at(url: &str) -> Home {
    home_of_file().with_store(url)
}

/// A home whose services use a new file.
fn home_of_file() -> Home {
    let home = Home::new();
    let key_file = home.path("log.key").display().to_string();
    home.with_config(&format!("[ledger]\nkey_files = [{key_file:?}]\n[cluster]\nlease_ttl = \"1s\"\n"))
}

/// Runs a command against a service.
async fn call(service: &Service, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command.args(args).env("ORCHESTRATOR_ADDRESS", service.address().to_string());
    command::run(command).await
}

#[tokio::test]
async fn the_tables_of_a_store_are_made_once_and_then_they_are_there() {
    let Some(server) = shared() else { return };
    let url = server.url();
    let migrate = async || orchestrator(None, &["store", "migrate", &url]).await;
    assert_eq!(migrate().await, (0, format!("{url} has the tables of a new store, in version 1\n")));
    assert_eq!(migrate().await, (0, format!("{url} has version 1 already\n")));
}

#[tokio::test]
async fn the_statements_for_an_administrator_are_printed_without_a_server() {
    let (code, said) =
        orchestrator(None, &["store", "migrate", "--print", "postgres://u:secret@h/d?schema=fleet"]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.starts_with("CREATE SCHEMA IF NOT EXISTS fleet;\n"), "{said}");
    assert!(
        said.contains("CREATE TABLE fleet.cycles (") && !said.contains("SCHEMA.") && !said.contains("secret"),
        "{said}"
    );
}

#[tokio::test]
async fn what_is_wrong_is_said_with_its_exit_code_and_without_the_password() {
    // Nothing listens there.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (url, code, expected) in [
        (format!("postgres://u:secret@{closed}/d"), 1, "can't connect to 127.0.0.1: "),
        ("postgres://u@h/d?sslmode=require".to_owned(), 2, "give sslmode=verify-full, or disable"),
        ("sqlite:o.db".to_owned(), 2, "give postgres://USER@HOST:PORT/DATABASE"),
    ] {
        let (found, said) = orchestrator(None, &["store", "migrate", &url]).await;
        assert_eq!(found, code, "{said}");
        assert!(said.contains(expected) && !said.contains("secret"), "{said}");
    }
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_the_process_was_killed() {
    let Some(server) = shared() else { return };
    is_there_after_the_process_was_killed(home_at(&server.url())).await;
}

#[tokio::test]
async fn what_was_acknowledged_behind_a_pooler_is_there_as_well() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    is_there_after_the_process_was_killed(home_at(&pooler.url(&server.url()))).await;
}

async fn is_there_after_the_process_was_killed(home: Home) {
    let mut stage = Stage::at(home).await;
    stage.register_all(&["a", "b"]).await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let history = stage.client.history().await.unwrap();
    let mut stage = stage.killed().await;
    stage.service.leads().await;
    assert_eq!(stage.client.history().await.unwrap(), history);
    let names: Vec<_> =
        stage.client.subsystems().await.unwrap().into_iter().map(|it| it.registration.unwrap().name).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 4);
    let mut stage = stage.restarted().await;
    assert_eq!(stage.client.history().await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_new_name_and_the_former_ones_are_kept_with_the_output() {
    let Some(server) = shared() else { return };
    let mut stage = Stage::at(home(server)).await;
    stage.register_all(&["a", "b"]).await;
    stage.client.run().await.unwrap();
    let output = stage.client.subsystem("a").await.unwrap().output;
    for (former, name) in [("a", "x"), ("x", "y")] {
        let (code, said) = call(&stage.service, &["subsystems", "rename", former, name]).await;
        assert_eq!(code, 0, "{said}");
    }
    let mut stage = stage.killed().await;
    stage.service.leads().await;
    let renamed = stage.client.subsystem("y").await.unwrap();
    assert_eq!(renamed.former_names, ["x", "a"]);
    assert!(!output.is_empty() && renamed.output == output, "{renamed:?}");
    assert_eq!(stage.client.subsystems().await.unwrap().len(), 2);
}

#[tokio::test]
async fn an_exported_log_is_verified_with_its_key() {
    let Some(server) = shared() else { return };
    let mut stage = Stage::at(home(server)).await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let bundle = stage.home.path("b.jsonl").display().to_string();
    let (code, said) = call(&stage.service, &["export", "--to", &bundle]).await;
    assert_eq!(code, 0, "{said}");
    let secret = std::fs::read_to_string(stage.home.path("log.key")).unwrap();
    let key = secret.trim().parse::<SigningKey>().unwrap().verifying().to_string();
    let (code, said) = call(&stage.service, &["verify", &bundle, "--key", &key]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("1 record, ") && said.contains("are as they were written"), "{said}");
}

#[tokio::test]
async fn a_store_that_is_accepted_is_taken_from_its_leader_which_then_leads_again() {
    let Some(server) = shared() else { return };
    let mut stage = Stage::at(home(server)).await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let epoch = stage.client.status().await.unwrap().epoch;
    let key = stage.home.path("log.key").display().to_string();
    let (code, said) = orchestrator(None, &["store", "accept", stage.home.store(), "--key-file", &key]).await;
    assert_eq!(code, 0, "{said}");
    // It learns of that when it writes.
    assert!(stage.client.run().await.is_err());
    stage.home.logged("this replica follows from now on", 1).await;
    stage.service.leads().await;
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 2);
    assert!(stage.client.status().await.unwrap().epoch > epoch);
}

#[tokio::test]
async fn no_acknowledged_cycle_is_lost_or_twice_while_the_server_ends_sessions() {
    // Of its own, since all sessions are ended.
    let Some(server) = Server::start("", None) else { return };
    let mut stage = Stage::at(home(&server)).await;
    stage.register_all(&["a"]).await;
    let mut acknowledged = Vec::new();
    for _ in 0..20 {
        let ended = server.end_sessions();
        let (run, ()) = tokio::join!(stage.client.run(), ended);
        // A caller may be told that the store is unavailable for now; its cycle is recorded even so.
        acknowledged.extend(run.ok().map(|telemetry| telemetry.cycle_id));
    }
    // The session that was ended last may be found out about only now.
    let last = run_until_acknowledged(&mut stage).await;
    let ids = ids(&mut stage, last).await;
    assert!(acknowledged.iter().all(|id| ids.contains(id)));
}

#[tokio::test]
async fn a_store_without_a_named_key_is_refused() {
    let Some(server) = shared() else { return };
    let home = Home::new().with_store(&server.url());
    let ended = home.try_serve().await.err().unwrap();
    assert!(ended.code() == Some(1) && home.log().contains("ledger.key_files"), "{ended}: {}", home.log());
}

#[tokio::test]
async fn a_changed_store_is_refused_until_it_is_accepted() {
    let Some(server) = shared() else { return };
    let mut stage = Stage::at(home(server)).await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    server.change(home.store(), "UPDATE subsystems SET owner = 'token:other'").await;
    let ended = home.try_serve().await.err().unwrap();
    assert_eq!(ended.code(), Some(1));
    let accept = format!("orchestrator store accept {}", home.store());
    assert!(home.log().contains(r#"the seal of its subsystem "a" does not belong"#), "{}", home.log());
    assert!(home.log().contains(&accept), "{}", home.log());
    let key = home.path("log.key").display().to_string();
    let (code, said) = orchestrator(None, &["store", "accept", home.store(), "--key-file", &key]).await;
    assert_eq!((code, said), (0, format!("{} can be served now; its last cycle is 1\n", home.store())));
    let service = home.serve().await;
    assert_eq!(service.client().await.run().await.unwrap().cycle_id, 2);
}

#[tokio::test]
async fn a_store_is_looked_at_while_another_process_writes_to_it() {
    let Some(server) = shared() else { return };
    let mut stage = Stage::at(home(server)).await;
    stage.client.run().await.unwrap();
    let looking = Home::new().with_store(stage.home.store()).with_args(["--read-only"]).serve().await;
    assert_eq!(looking.client().await.history().await.unwrap(), stage.client.history().await.unwrap());
    assert!(looking.client().await.run().await.is_err());
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 2);
}

#[tokio::test]
async fn a_history_moves_to_postgres_and_back_with_everything_that_a_watcher_sees() {
    let Some(server) = shared() else { return };
    let mut stage = Stage::at(home_of_file()).await;
    stage.register_all(&["a", "b"]).await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let history = stage.client.history().await.unwrap();
    let output = stage.client.subsystem("a").await.unwrap().output;
    let (there, back) = (server.url(), format!("sqlite:{}", stage.home.path("back.db").display()));
    for to in [there, back] {
        let Stage { fleet, home, service, .. } = stage;
        assert!(service.stop().await.success());
        let from = home.store().to_owned();
        let (code, said) = orchestrator(None, &["store", "copy", "--from", &from, "--to", &to]).await;
        assert_eq!(code, 0, "{said}");
        assert!(said.contains(" is the store now, up to cycle 3: 3 records and "), "{said}");
        let ended = home.try_serve().await.err().unwrap();
        assert!(ended.code() == Some(1) && home.log().contains(&format!("copied to {to}, which")), "{}", home.log());
        stage = Stage::again(fleet, home.with_store(&to)).await;
        assert_eq!(stage.client.history().await.unwrap(), history);
        assert_eq!(stage.client.subsystem("a").await.unwrap().output, output);
        let mut watcher = stage.client.watch_after(1).await.unwrap();
        assert_eq!([next_recorded(&mut watcher).await, next_recorded(&mut watcher).await], history[1..]);
    }
    let key = stage.home.path("log.key").display().to_string();
    let file = stage.home.store().strip_prefix("sqlite:").unwrap();
    let (code, said) = orchestrator(None, &["verify", "--db", file, "--key-file", &key]).await;
    assert!(code == 0 && said.contains("the seals of the log"), "{said}");
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 4);
}

// ---------------------------------------------------------------------------------------------------------------
// A standby

/// A server and a standby of it, if PostgreSQL is installed, and the URL of a new store on both.
fn pair() -> Option<(Server, Server, String)> {
    let primary = Server::start("", None)?;
    let standby = primary.standby();
    let url = format!("postgres://owner@{},{}/postgres?schema=fleet", primary.host(), standby.host());
    Some((primary, standby, url))
}

/// The value of a metric, if it is there.
async fn metric(stage: &Stage, series: &str) -> Option<f64> {
    let scrape = get(stage.service.admin(), "/metrics").await.text().await;
    let value = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned));
    value.map(|value| value.parse().unwrap())
}

/// Runs cycles until one is acknowledged. Returns its id.
async fn run_until_acknowledged(stage: &mut Stage) -> u64 {
    let acknowledged = async {
        loop {
            if let Ok(telemetry) = stage.client.run().await {
                return telemetry.cycle_id;
            }
        }
    };
    patiently("an acknowledged cycle", acknowledged).await
}

/// The ids of all cycles, which have no gap.
async fn ids(stage: &mut Stage, last: u64) -> Vec<u64> {
    let history = stage.client.history().await.unwrap();
    let mut ids: Vec<_> = history.into_iter().map(|bytes| decode(bytes).cycle_id).collect();
    ids.sort_unstable();
    assert_eq!(ids, (1..=last).collect::<Vec<_>>(), "{}", stage.home.log());
    ids
}

#[tokio::test]
async fn nothing_is_acknowledged_while_the_standby_is_away_and_reads_go_on() {
    let Some((primary, standby, url)) = pair() else { return };
    let mut stage = Stage::at(home_at(&url)).await;
    primary.wait_for_standby().await;
    stage.register_all(&["a"]).await;
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 1);
    standby.crash().await;
    assert_eq!(metric(&stage, "orchestrator_store_synchronous").await, Some(1.0));
    let refused = stage.client.run().await.unwrap_err();
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    assert!(refused.message().contains("waits for a standby that is away"), "{refused:?}");
    assert_eq!(stage.client.history().await.unwrap().len(), 1);
    assert!(stage.client.status().await.unwrap().store_error.contains("has not returned"));
    standby.start_again().await;
    let last = run_until_acknowledged(&mut stage).await;
    ids(&mut stage, last).await;
}

#[tokio::test]
async fn what_was_on_the_primary_only_was_not_acknowledged_and_no_watcher_has_seen_it() {
    let Some((primary, standby, url)) = pair() else { return };
    let mut stage = Stage::at(home_at(&url)).await;
    primary.wait_for_standby().await;
    stage.register_all(&["a"]).await;
    let mut watcher = stage.client.watch_after(0).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        stage.client.run().await.unwrap();
        seen.push(next_recorded(&mut watcher).await);
    }
    standby.crash().await;
    let mut caller = stage.service.client().await;
    let waiting = tokio::spawn(async move { caller.run().await });
    let in_line = |statement: &str| {
        format!(
            "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%{statement}%' AND pid <> pg_backend_pid()"
        )
    };
    primary.shows(&format!("SELECT count(*) {}", in_line("fence AS")), "1").await;
    primary.execute(&format!("SELECT pg_terminate_backend(pid) {}", in_line("fence AS"))).await;
    // The barrier waits as well.
    primary.shows(&format!("SELECT count(*) {}", in_line("RETURNING found")), "1").await;
    let visible = "SELECT count(*) FROM fleet.open_cycles";
    primary.shows(visible, "1").await;
    primary.crash().await;
    standby.start_again().await;
    assert_eq!(standby.execute(visible).await.trim_end(), "0", "it is on the primary only");
    standby.promote().await;
    let last = run_until_acknowledged(&mut stage).await;
    if let Ok(telemetry) = waiting.await.unwrap() {
        assert!(telemetry.cycle_id <= last);
    }
    ids(&mut stage, last).await;
    assert_eq!(metric(&stage, r#"orchestrator_store_commits_ambiguous_total{outcome="not_kept"}"#).await, Some(1.0));
    assert_eq!(metric(&stage, r#"orchestrator_store_commits_ambiguous_total{outcome="kept"}"#).await, Some(0.0));
    let history = stage.client.history().await.unwrap();
    while seen.len() < history.len() {
        seen.push(next_recorded(&mut watcher).await);
    }
    assert_eq!(seen, history);
}

#[tokio::test]
async fn the_same_process_goes_on_when_a_standby_is_promoted_under_load() {
    let Some((primary, standby, url)) = pair() else { return };
    let mut stage = Stage::at(home_at(&url)).await;
    primary.wait_for_standby().await;
    stage.register_all(&["a", "b"]).await;
    let mut acknowledged = vec![stage.client.run().await.unwrap().cycle_id];
    let epoch = stage.client.status().await.unwrap().epoch;
    let fail_over = async {
        primary.crash().await;
        standby.promote().await;
    };
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let load = async {
        while stopped.try_recv().is_err() {
            acknowledged.extend(stage.client.run().await.ok().map(|telemetry| telemetry.cycle_id));
        }
    };
    let ((), ()) = tokio::join!(load, async {
        fail_over.await;
        stop.send(()).unwrap();
    });
    acknowledged.push(run_until_acknowledged(&mut stage).await);
    let ids = ids(&mut stage, acknowledged[acknowledged.len() - 1]).await;
    assert!(acknowledged.iter().all(|id| ids.contains(id)), "{acknowledged:?}");
    assert_eq!(stage.client.status().await.unwrap().epoch, epoch);
}

#[tokio::test]
async fn a_failover_that_has_lost_acknowledged_cycles_ends_the_process_and_is_named() {
    let Some((primary, standby, url)) = pair() else { return };
    // Nothing waits for the standby.
    let mut stage = Stage::at(home_at(&url)).await;
    assert!(stage.home.log().contains("commits don't wait for them"), "{}", stage.home.log());
    stage.client.run().await.unwrap();
    assert_eq!(metric(&stage, "orchestrator_store_synchronous").await, Some(0.0));
    assert!(metric(&stage, "orchestrator_store_oldest_xmin_age").await.is_some());
    assert!(metric(&stage, "orchestrator_store_round_trip_seconds_count").await.is_some_and(|number| number > 0.0));
    standby.crash().await;
    stage.client.run().await.unwrap();
    primary.crash().await;
    standby.start_again().await;
    standby.promote().await;
    let refused = loop {
        let refused = stage.client.run().await.unwrap_err();
        // Until the service has found the other server.
        if refused.message().contains("an older copy has replaced it") {
            break refused;
        }
    };
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    assert_eq!(stage.service.ended().await.code(), Some(1), "{}", stage.home.log());
    assert!(stage.home.log().contains("an older copy has replaced it"), "{}", stage.home.log());
}

// ---------------------------------------------------------------------------------------------------------------
// A full disk

#[tokio::test]
async fn a_full_disk_refuses_cycles_until_there_is_room_again() {
    let disk = tempfile::tempdir().unwrap();
    let Some(server) = Server::with_small_disk(disk.path()) else { return };
    let path = disk.path().display().to_string();
    let program = async |command: &str| {
        server.execute(&format!("COPY (SELECT 1) TO PROGRAM 'cat > /dev/null; {command}'")).await;
    };
    program(&format!("mkdir {path}/tables")).await;
    server.execute(&format!("CREATE TABLESPACE small LOCATION '{path}/tables'")).await;
    server.execute("CREATE DATABASE small TABLESPACE small").await;
    let url = format!("postgres://owner@{}/small", server.host());
    let mut stage = Stage::at(home_at(&url)).await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    program(&format!("dd if=/dev/zero of={path}/filler bs=8k 2> /dev/null || true")).await;
    // The last pages have room for some more.
    let refused = loop {
        if let Err(refused) = stage.client.run().await {
            break refused;
        }
    };
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    assert!(refused.message().contains("no space left to write"), "{refused:?}");
    assert!(!stage.client.history().await.unwrap().is_empty());
    program(&format!("rm {path}/filler")).await;
    let last = run_until_acknowledged(&mut stage).await;
    ids(&mut stage, last).await;
}
