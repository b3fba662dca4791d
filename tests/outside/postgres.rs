//! A store in PostgreSQL, with a real server: where it is installed.

use std::{net::TcpListener, process::Stdio};

use crate::common::{
    Stage, command,
    command::orchestrator,
    network::Network,
    patiently,
    postgres::{Pooler, Server, shared, shared_pooler, through},
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
    let (code, said) = orchestrator(None, &["store", "migrate", "--grant-to", "nobody here", &url]).await;
    assert!(
        code == 1 && said.contains("can't be granted to nobody here: role \"nobody here\" does not exist"),
        "{said}"
    );
}

#[tokio::test]
async fn the_statements_for_an_administrator_are_printed_without_a_server() {
    let url = "postgres://u:secret@h/d?schema=fleet";
    let (code, said) = orchestrator(None, &["store", "migrate", "--print", "--grant-to", "a \"b\"", url]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.starts_with("BEGIN;\nCREATE SCHEMA IF NOT EXISTS fleet;\n") && said.ends_with("COMMIT;\n"), "{said}");
    assert!(said.contains("GRANT USAGE ON SCHEMA fleet TO \"a \"\"b\"\"\";\n"), "{said}");
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
        (format!("postgres://u:secret@{closed}/d"), 1, "can't connect to 127.0.0.1:"),
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

#[tokio::test]
async fn a_store_behind_a_pooler_that_the_url_does_not_tell_of_is_refused_with_the_remedy() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    let home = home_at(&through(pooler.directory(), &server.url()));
    let ended = home.try_serve().await.map(drop).unwrap_err();
    assert_eq!(ended.code(), Some(1), "{}", home.log());
    assert!(home.log().contains("add pooled=true to store.url"), "{}", home.log());
}

#[tokio::test]
async fn a_start_behind_a_pooler_whose_server_is_away_says_why() {
    let Some(server) = Server::start("", None) else { return };
    let Some(pooler) = Pooler::before(&server) else { return };
    let home = home_at(&pooler.url(&server.url()));
    assert!(home.serve().await.stop().await.success());
    server.crash().await;
    // The pooler keeps its first client waiting while it tries to connect, and tells the next one, by its last message.
    for _ in 0..2 {
        let ended = home.try_serve().await.map(drop).unwrap_err();
        assert_eq!(ended.code(), Some(1), "{}", home.log());
    }
    assert!(home.log().contains("server login has been failing"), "{}", home.log());
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
    let (code, said) = call(&stage.service, &["audit", "--changes"]).await;
    assert!(code == 0 && said.contains("store accept"), "{said}");
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
async fn a_new_store_begins_with_the_key_that_was_made_for_it() {
    let Some(server) = shared() else { return };
    let home = home(server);
    let file = home.path("log.key").display().to_string();
    let (code, public) = orchestrator(None, &["store", "key", &file]).await;
    assert_eq!(code, 0, "{public}");
    let (code, said) = orchestrator(None, &["store", "key", &file]).await;
    assert!(code == 1 && said.contains("keep that one"), "{said}");
    let mut stage = Stage::at(home).await;
    stage.client.run().await.unwrap();
    let (code, said) = call(&stage.service, &["checkpoint", "--output", "json"]).await;
    assert!(code == 0 && said.contains(public.trim()), "{said}");
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
    assert!(home.log().contains(&accept) && home.log().contains("(with --key-file for each of"), "{}", home.log());
    let key = home.path("log.key").display().to_string();
    let (code, said) = orchestrator(None, &["store", "accept", home.store(), "--key-file", &key]).await;
    let told = format!("{} can be served now; its last cycle is 1\nrestart the replicas that ", home.store());
    assert!(code == 0 && said.starts_with(&told), "{said}");
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
        let (code, said) = copy(&from, &to).await;
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

/// Runs a copy of a store. Returns its exit code and what it has said.
async fn copy(from: &str, to: &str) -> (i32, String) {
    orchestrator(None, &["store", "copy", "--from", from, "--to", to]).await
}

#[tokio::test]
async fn a_copy_that_is_killed_anywhere_leaves_one_store_that_goes_on() {
    /// Copies that are killed: at equal distances, by the bytes that have passed.
    const KILLS: usize = 6;
    let Some(server) = shared() else { return };
    let network = Network::before(server.directory());
    let mut stage = Stage::at(home_of_file()).await;
    stage.register_all(&["a", "b"]).await;
    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let files = tempfile::tempdir().unwrap();
    // The bytes of a whole copy to PostgreSQL, and of one back.
    let mut of_whole = [0, 0];
    for number in 0..KILLS + 2 {
        let history = stage.client.history().await.unwrap();
        let Stage { fleet, home, service, .. } = stage;
        assert!(service.stop().await.success(), "{}", home.log());
        let (from, is_back) = (home.store().to_owned(), number % 2 == 1);
        let file = files.path().join(format!("{number}.db"));
        let to = if is_back { format!("sqlite:{}", file.display()) } else { network.url(&server.url()) };
        let before = network.passed();
        let mut added = Vec::new();
        if let Some(kill) = number.checked_sub(2) {
            network.fall_silent_after(of_whole[usize::from(is_back)] * (kill + 1) / (KILLS + 1));
            let mut copying = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
            copying.args(["store", "copy", "--from", &from, "--to", &to]).stdout(Stdio::null());
            let mut copying = copying.spawn().unwrap();
            network.until_silent().await;
            copying.kill().await.unwrap();
            network.mend();
            // The source is served as before, or names the copy that goes on.
            match home.try_serve().await {
                Ok(service) => {
                    service.leads().await;
                    let mut client = service.client().await;
                    assert_eq!(client.history().await.unwrap(), history);
                    client.run().await.unwrap();
                    added.extend(client.history().await.unwrap().pop());
                    assert!(service.stop().await.success(), "{}", home.log());
                }
                Err(_) => assert!(home.log().contains(&format!("it was copied to {to}")), "{}", home.log()),
            }
        }
        let (mut code, mut said) = copy(&from, &to).await;
        if code != 0 && said.contains("remove this one first") {
            if is_back {
                std::fs::remove_file(&file).unwrap();
            } else {
                let (_, schema) = to.split_once("schema=").unwrap();
                server.execute(&format!("DROP SCHEMA {schema} CASCADE")).await;
            }
            (code, said) = copy(&from, &to).await;
        }
        assert_eq!(code, 0, "{number}: {said}");
        if number < 2 {
            of_whole[number] = network.passed() - before;
        }
        stage = Stage::again(fleet, home.with_store(&to)).await;
        stage.service.leads().await;
        assert_eq!(stage.client.history().await.unwrap(), [history, added].concat());
    }
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

// ---------------------------------------------------------------------------------------------------------------
// A full disk

#[tokio::test]
async fn a_full_disk_refuses_cycles_until_there_is_room_again() {
    let disk = tempfile::tempdir().unwrap();
    let Some(server) = Server::with_small_disk(disk.path()).await else { return };
    let url = format!("postgres://owner@{}/small", server.host());
    let mut stage = Stage::at(home_at(&url)).await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    server.fill_disk(disk.path()).await;
    // The last pages have room for some more.
    let refused = loop {
        if let Err(refused) = stage.client.run().await {
            break refused;
        }
    };
    assert_eq!(reason(&refused).why, "STORE_UNAVAILABLE", "{refused:?}");
    assert!(refused.message().contains("no space left to write"), "{refused:?}");
    assert!(!stage.client.history().await.unwrap().is_empty());
    server.empty_disk(disk.path()).await;
    let last = run_until_acknowledged(&mut stage).await;
    ids(&mut stage, last).await;
}
