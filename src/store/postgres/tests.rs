//! Tests with a real server.

use std::{fs, net::TcpListener, path::Path};

use super::{
    connect::{Connection, Connector},
    error::{explain, is_ambiguous, is_worth_repeating},
    *,
};
use crate::ports::StoreError;

#[path = "../../../tests/common/pki.rs"]
#[allow(dead_code, unreachable_pub)]
mod pki;
#[path = "../../../tests/common/postgres.rs"]
#[allow(dead_code, unreachable_pub)]
pub(in crate::store) mod server;

use server::{Server, shared};

fn url(url: &str) -> PostgresUrl {
    PostgresUrl::parse(url).unwrap()
}

async fn connector(of: &str) -> Connector {
    Connector::new(url(of), Clock::system()).await.unwrap()
}

async fn connect(to: &str) -> Result<Connection, StoreError> {
    connector(to).await.connect().await
}

async fn migrated(of: &str) -> Result<Migrated, OpenError> {
    migrate(&url(of), Clock::system()).await
}

#[tokio::test]
async fn processes_that_create_a_store_at_once_all_find_it() {
    let Some(server) = shared() else { return };
    let store = server.url();
    let all = futures_util::future::join_all((0..8).map(|_| migrated(&store))).await;
    let mut from: Vec<_> =
        all.into_iter().map(|migrated| migrated.unwrap()).map(|Migrated { from, to }| (from, to)).collect();
    from.sort_unstable();
    assert_eq!(from, [[(0, 1)].as_slice(), &[(1, 1); 7]].concat());
}

#[tokio::test]
async fn the_printed_statements_make_the_store_that_a_migration_makes() {
    let Some(server) = shared() else { return };
    let (printed, made) = (server.url(), server.url());
    connect(&printed).await.unwrap().batch_execute(&tables(&url(&printed))).await.unwrap();
    migrated(&made).await.unwrap();
    assert_eq!(migrated(&printed).await.unwrap(), Migrated { from: 1, to: 1 });
    let columns = async |store: &str| {
        let (connection, schema) = (connect(store).await.unwrap(), url(store).schema().to_owned());
        let columns = "SELECT table_name || '.' || column_name || ' ' || data_type FROM information_schema.columns
                       WHERE table_schema = $1 ORDER BY 1";
        let rows = connection.query(columns, &[&schema]).await.unwrap();
        rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>()
    };
    let of_printed = columns(&printed).await;
    assert!(of_printed.len() > 60 && of_printed == columns(&made).await, "{of_printed:?}");
}

#[tokio::test]
async fn a_store_of_a_later_version_is_used_only_as_long_as_that_version_allows() {
    let Some(server) = shared() else { return };
    let store = server.url();
    migrated(&store).await.unwrap();
    let (connection, schema) = (connect(&store).await.unwrap(), url(&store).schema().to_owned());
    let set = async |usable_from: i32| {
        let set = format!("UPDATE {schema}.store_schema SET version = 99, usable_from = {usable_from}");
        connection.batch_execute(&set).await.unwrap();
    };
    set(1).await;
    assert_eq!(migrated(&store).await.unwrap(), Migrated { from: 99, to: 99 });
    set(2).await;
    assert!(matches!(migrated(&store).await, Err(OpenError::TooNew { found: 99, known: 1, .. })));
}

#[tokio::test]
async fn tables_of_other_software_stay_as_they_are() {
    let Some(server) = shared() else { return };
    let store = server.url();
    let (connection, schema) = (connect(&store).await.unwrap(), url(&store).schema().to_owned());
    connection
        .batch_execute(&format!("CREATE SCHEMA {schema}; CREATE TABLE {schema}.cycles (mine int)"))
        .await
        .unwrap();
    assert!(matches!(migrated(&store).await, Err(OpenError::Foreign { .. })));
    let tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = $1";
    assert_eq!(connection.query_one(tables, &[&schema]).await.unwrap().get::<_, i64>(0), 1);
}

#[tokio::test]
async fn a_user_who_may_not_create_tables_uses_those_of_their_owner() {
    let Some(server) = shared() else { return };
    let owners = server.url();
    let (owner, schema) = (connect(&owners).await.unwrap(), url(&owners).schema().to_owned());
    let user = format!("user_{schema}");
    owner.batch_execute(&format!("CREATE ROLE {user} LOGIN")).await.unwrap();
    let of_user = server.url_of(&user, &schema);
    let refused = migrated(&of_user).await.unwrap_err();
    assert!(matches!(refused, OpenError::Store(StoreError::ReadOnly { .. })), "{refused}");
    assert!(refused.to_string().contains("`orchestrator store migrate` as the owner"), "{refused}");
    migrated(&owners).await.unwrap();
    let grant = format!(
        "GRANT USAGE ON SCHEMA {schema} TO {user};
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {user}"
    );
    owner.batch_execute(&grant).await.unwrap();
    assert_eq!(migrated(&of_user).await.unwrap(), Migrated { from: 1, to: 1 });
}

/// A server that accepts connections and says nothing, and an address at which none is.
fn useless_hosts() -> (TcpListener, String) {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let hosts = format!("{},{closed}", silent.local_addr().unwrap());
    (silent, hosts)
}

#[tokio::test]
async fn the_first_host_that_takes_writes_is_used() {
    let Some(server) = shared() else { return };
    let (_silent, useless) = useless_hosts();
    let connection = connect(&format!("postgres://owner@{useless},{}/postgres", server.host())).await.unwrap();
    assert_eq!(connection.query_one("SELECT 1", &[]).await.unwrap().get::<_, i32>(0), 1);

    // As a standby is.
    let database = url(&server.url()).schema().to_owned();
    connection.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
    let read_only = format!("ALTER DATABASE {database} SET default_transaction_read_only = on");
    connection.batch_execute(&read_only).await.unwrap();
    let standby = format!("postgres://owner@{}/{database}", server.host());
    let refused = connect(&standby).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("database does not allow writes"), "{refused}");
}

#[tokio::test]
async fn each_host_that_cannot_be_used_is_named_with_its_problem() {
    let (_silent, useless) = useless_hosts();
    let refused = connect(&format!("postgres://owner@{useless}/postgres?sslmode=disable")).await.map(drop).unwrap_err();
    assert!(!refused.is_final());
    let refused = refused.to_string();
    assert!(refused.contains("127.0.0.1: no answer within 2s"), "{refused}");
    assert!(refused.contains("and to 127.0.0.1: ") && refused.contains("refused"), "{refused}");
}

#[tokio::test]
async fn each_error_of_the_server_has_its_remedy() {
    let Some(server) = shared() else { return };
    let connection = connect(&server.url()).await.unwrap();
    let raised = async |code: &str| {
        let raise = format!("DO $$ BEGIN RAISE 'as scripted' USING ERRCODE = '{code}'; END $$");
        connection.batch_execute(&raise).await.unwrap_err()
    };
    for (codes, remedy, is_final) in [
        (["53100"].as_slice(), "free some space", false),
        (&["42501"], "make it writable", false),
        (&["25006"], "name all servers", false),
        (&["53300"], "raise max_connections", false),
        (&["57014"], "has cancelled it", false),
        (&["3D000"], "CREATE DATABASE", false),
        (&["28000", "28P01"], "pg_hba.conf", false),
        (&["08006", "40001", "40P01", "53200", "55P03", "57P03", "58030"], "as scripted (SQLSTATE", false),
        (&["22021", "23505", "42P01", "54000", "0A000"], "report the defect", true),
        (&["XX001", "XX002"], "is damaged", true),
    ] {
        for code in codes {
            let error = explain("s", &raised(code).await);
            assert!(error.to_string().contains(remedy), "{code}: {error}");
            assert_eq!(error.is_final(), is_final, "{code}");
        }
    }
    for (code, ambiguous, again) in [
        ("08006", true, false),
        ("40003", true, false),
        ("57P01", true, false),
        ("57014", false, false),
        ("40001", false, true),
        ("40P01", false, true),
        ("23505", false, false),
    ] {
        let error = raised(code).await;
        assert_eq!((is_ambiguous(&error), is_worth_repeating(&error)), (ambiguous, again), "{code}");
    }
}

#[tokio::test]
async fn a_session_that_the_server_ends_leaves_the_outcome_unknown() {
    let Some(server) = shared() else { return };
    let (ended, other) = (connect(&server.url()).await.unwrap(), connect(&server.url()).await.unwrap());
    let pid: i32 = ended.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let statement = ended.query_one("SELECT pg_sleep(60)", &[]);
    let end = async {
        let is_active = "SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = $1 AND query LIKE '%pg_sleep(60)'
                         AND state = 'active'";
        while !other.query_one(is_active, &[&pid]).await.unwrap().get::<_, bool>(0) {}
        other.query_one("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
    };
    let (error, ()) = tokio::join!(statement, end);
    assert!(is_ambiguous(&error.unwrap_err()));
    // Also what is asked of it from now on: it may be lost on the way.
    assert!(is_ambiguous(&ended.query_one("SELECT 1", &[]).await.unwrap_err()));
}

#[tokio::test]
async fn a_warning_is_known_when_the_statement_returns() {
    let Some(server) = shared() else { return };
    let connection = connect(&server.url()).await.unwrap();
    connection.batch_execute("DO $$ BEGIN RAISE NOTICE 'a'; END $$").await.unwrap();
    assert_eq!(connection.take_warning(), None);
    connection.batch_execute("DO $$ BEGIN RAISE WARNING 'b'; END $$").await.unwrap();
    assert_eq!(connection.take_warning().as_deref(), Some("b"));
    assert_eq!(connection.take_warning(), None);
}

/// A port that no server has.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_server_proves_its_name_and_a_user_their_password() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let file = |name: &str| directory.path().join(name);
    let (authority, other) = (pki::Authority::new("a"), pki::Authority::new("b"));
    let issued = authority
        .service_with(|params| params.subject_alt_names.retain(|name| matches!(name, rcgen::SanType::DnsName(_))));
    fs::create_dir(file("server")).unwrap();
    fs::write(file("server/cert.pem"), &issued.certificate).unwrap();
    fs::write(file("server/key.pem"), &issued.key).unwrap();
    fs::write(file("server/pg_hba.conf"), "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n").unwrap();
    fs::write(file("a.pem"), &authority.certificate).unwrap();
    fs::write(file("b.pem"), &other.certificate).unwrap();
    let port = free_port();
    let options = format!(
        "-c listen_addresses=127.0.0.1 -c port={port} -c ssl=on -c ssl_cert_file=cert.pem -c ssl_key_file=key.pem"
    );
    let Some(server) = Server::start(&options, Some(&file("server"))) else { return };
    let socket = connect(&format!("postgres://owner@{}:{port}/postgres", server.host())).await.unwrap();
    socket.batch_execute("ALTER ROLE owner PASSWORD 'secret'").await.unwrap();

    let to = |host: &str, authority: &str| {
        let authority = file(authority).display().to_string();
        format!("postgres://owner:secret@{host}:{port}/postgres?sslrootcert={authority}")
    };
    let connection = connect(&to("localhost", "a.pem")).await.unwrap();
    let is_encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert!(connection.query_one(is_encrypted, &[]).await.unwrap().get::<_, bool>(0));
    for (url, said) in [
        (to("127.0.0.1", "a.pem"), "not valid for name"),
        (to("localhost", "b.pem"), "UnknownIssuer"),
        (to("localhost", "a.pem").replace("secret", "guess"), "pg_hba.conf"),
        (to("localhost", "c.pem"), "c.pem can't be read"),
    ] {
        let refused = match Connector::new(self::url(&url), Clock::system()).await {
            Ok(connector) => connector.connect().await.map(drop).unwrap_err(),
            Err(error) => error,
        };
        assert!(refused.to_string().contains(said), "{url}: {refused}");
    }

    let password = file("password");
    fs::write(&password, "secret\n").unwrap();
    let by_file = to("localhost", "a.pem").replace(":secret", "") + &format!("&password_file={}", password.display());
    set_mode(&password, 0o644);
    let refused = connect(&by_file).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("run chmod 600"), "{refused}");
    set_mode(&password, 0o600);
    connect(&by_file).await.unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}
