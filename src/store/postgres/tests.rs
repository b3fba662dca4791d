//! Tests with a real server.

use std::{
    cell::Cell,
    env, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use super::{
    connect::{Connection, Connector},
    error::{explain, is_ambiguous, is_worth_repeating},
    leader::LONGEST_LEASE,
    parameter::Parameter,
    schema::Migrations,
    *,
};
use crate::{
    model::{Endpoint, Epoch, Leader, Replica, Revision},
    ports::{Claim, ClaimId, Claimed, Renewed, RetentionRule, Seals, Store, StoreError},
    store::{
        StoreUrl,
        suite::{ALL, CHECKS, commit, event, keys, name, output, pruned, recorded, revisions},
    },
};

#[path = "../../../tests/outside/common/pki.rs"]
#[allow(dead_code, unreachable_pub)]
mod pki;
#[path = "../../../tests/outside/common/postgres.rs"]
#[allow(dead_code, unreachable_pub)]
pub(in crate::store) mod server;

use server::{ADDS, Server, shared, shared_pooler};

fn url(url: &str) -> PostgresUrl {
    PostgresUrl::parse(url).unwrap()
}

async fn connector(of: &str) -> Connector {
    Connector::new(url(of), Clock::system()).await.unwrap()
}

async fn connect(to: &str) -> Result<Connection, StoreError> {
    connector(to).await.connect(APPLICATION).await
}

/// The only row of a statement.
async fn one(
    connection: &Connection,
    text: &str,
    parameters: &[&dyn Parameter],
) -> Result<tokio_postgres::Row, tokio_postgres::Error> {
    connection.query(text, parameters).await.map(|mut rows| rows.pop().unwrap())
}

async fn migrated(of: &str) -> Result<Migrated, OpenError> {
    migrate(&url(of), None, Clock::system()).await
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
    connect(&printed).await.unwrap().batch_execute(&tables(&url(&printed), None)).await.unwrap();
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

/// A migration of a later version, which earlier ones can't use.
const REPLACES: &str = "2, usable from 2\nCREATE TABLE SCHEMA.later (id bigint PRIMARY KEY);\n";

/// A migration of a later version that adds to the tables.
fn adds() -> String {
    format!("2, usable from 1{ADDS};\n")
}

/// A store that a later version of this software has opened, with this migration after those of this version.
async fn opened_later(of: &str, migration: &str) -> Result<PostgresStore, OpenError> {
    let connector = connector(of).await.with_migrations(Migrations::and(migration));
    PostgresStore::open_by(connector, (CHECKS, Clock::system()), false).await
}

/// Adds to the tables of a new store what a later version of this software may add.
pub(in crate::store) async fn widen(url: &StoreUrl) {
    opened_later(&url.to_string(), &adds()).await.unwrap();
}

/// Executes each kind of statement of a leader, which records this revision and the next one.
async fn works(store: &dyn Store, epoch: Epoch, first: u64) {
    let noted = Write { outputs: vec![(name("a"), output(1, "a"))], ..recorded(first..=first + 1, epoch) };
    commit(store, Write { audit: vec![event(1)], ..noted.clone() }).await;
    let Write { last_cycle_id, .. } = noted;
    let renamed = [(name("a"), name("b"))].into();
    commit(store, Write { epoch, last_cycle_id, renamed, ..Write::default() }).await;
    let newest = RetentionRule { max_cycles: Some(1), ..RetentionRule::default() };
    let retention = Retention { default: newest, ..Retention::default() };
    let removed = pruned(store, &noted, retention, Clock::system().now(), 9).await;
    assert_eq!(removed.last(), Some(&Revision(first)));
    assert_eq!(revisions(&store.cycles_after(Revision(first), ALL).await.unwrap()), [first + 1]);
    let events = store.events_before(u64::MAX >> 1, EventFilter::default(), 1).await.unwrap().events;
    assert!(matches!(&events[..], [Ok(_)]), "{events:?}");
    store.publish_checkpoint(format!("of {first}")).await.unwrap();
    assert_eq!(store.leadership().unwrap().renew(epoch).await.unwrap(), Renewed::Acknowledged);
}

#[tokio::test]
async fn a_leader_goes_on_while_a_later_version_adds_to_its_tables_and_they_take_over_from_each_other() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (older, first) = led(&store_url, "older").await;
    works(&*older, first, 1).await;
    let later = opened_later(&store_url, &adds()).await.unwrap();
    assert_eq!(migrated(&store_url).await.unwrap(), Migrated { from: 2, to: 2 });
    // Its statements were prepared for the tables as they were.
    works(&*older, first, 3).await;
    let second = claimed(&later, &claim_of("later")).await;
    works(&later, second, 5).await;
    let fenced = older.commit(Arc::new(recorded(5..=6, first))).await.unwrap_err();
    assert_eq!(fenced, StoreError::Fenced { by: second });
    let third = claimed(&*older, &claim_of("older")).await;
    works(&*older, third, 7).await;
    // Also a process of the older version that starts now.
    let (again, fourth) = led(&store_url, "older").await;
    works(&*again, fourth, 9).await;
}

#[tokio::test]
async fn a_migration_that_older_versions_cannot_use_ends_the_term_of_one_of_them() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (older, first) = led(&store_url, "older").await;
    works(&*older, first, 1).await;
    let leadership = older.leadership().unwrap();
    let seen = leadership.observe().await.unwrap();
    let later = opened_later(&store_url, REPLACES).await.unwrap();
    let fenced = older.commit(Arc::new(recorded(3..=4, first))).await.unwrap_err();
    let now = leadership.observe().await.unwrap();
    assert_eq!(fenced, StoreError::Fenced { by: now.epoch });
    assert_eq!(leadership.renew(first).await.unwrap(), Renewed::Superseded);
    // Others wait for the end of its lease, and so does it itself.
    assert!(now.leader.is_some() && now.beat > seen.beat && now.claim != seen.claim, "{now:?}");
    let too_new = StoreError::TooNew { store: url(&store_url).to_string(), found: 2, known: 1 };
    let looked = older.look().unwrap().take_over(Seals::Checked(keys())).await;
    assert_eq!(looked.unwrap_err(), too_new);
    let Claimed::Won(claimed_in_vain) = leadership.claim(&now, &claim_of("older")).await.unwrap() else { panic!() };
    assert_eq!(older.take_over(Seals::Checked(keys())).await.unwrap_err(), too_new);
    leadership.release(claimed_in_vain).await.unwrap();
    assert!(matches!(migrated(&store_url).await, Err(OpenError::TooNew { found: 2, known: 1, .. })));
    let second = claimed(&later, &claim_of("later")).await;
    works(&later, second, 3).await;
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
    assert_eq!(one(&connection, tables, &[&schema]).await.unwrap().get::<_, i64>(0), 1);
}

#[tokio::test]
async fn a_store_with_a_trigger_or_a_rule_of_other_software_is_refused() {
    let Some(server) = shared() else { return };
    for (addition, undo) in [
        (
            "CREATE FUNCTION drops() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER other BEFORE INSERT ON cycles FOR EACH ROW EXECUTE FUNCTION drops()",
            "DROP TRIGGER other ON cycles",
        ),
        ("CREATE RULE other AS ON DELETE TO cycles DO INSTEAD NOTHING", "DROP RULE other ON cycles"),
    ] {
        let store = server.url();
        drop(opened(&store).await);
        server.change(&store, addition).await;
        let refused = crate::store::open(&StoreUrl::parse(&store).unwrap(), CHECKS, Clock::system()).await;
        let refused = refused.map(drop).unwrap_err().to_string();
        assert!(refused.contains(r#"has the trigger "other of the table cycles""#), "{refused}");
        server.change(&store, undo).await;
        drop(opened(&store).await);
    }
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
    let refused = migrated(&of_user).await.unwrap_err();
    assert!(refused.to_string().contains("grant its user the rights"), "{refused}");
    let granted = migrate(&url(&owners), Some(&user), Clock::system()).await.unwrap();
    assert_eq!(granted, Migrated { from: 1, to: 1 });
    assert_eq!(migrated(&of_user).await.unwrap(), granted);
    drop(opened(&of_user).await);
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
    assert_eq!(one(&connection, "SELECT 1", &[]).await.unwrap().get::<_, i32>(0), 1);

    // As a standby is.
    let database = url(&server.url()).schema().to_owned();
    connection.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
    let read_only = format!("ALTER DATABASE {database} SET default_transaction_read_only = on");
    connection.batch_execute(&read_only).await.unwrap();
    let standby = format!("postgres://owner@{}/{database}", server.host());
    let refused = connect(&standby).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("it takes no writes"), "{refused}");
}

#[tokio::test]
async fn each_host_that_cannot_be_used_is_named_with_its_problem() {
    let (_silent, useless) = useless_hosts();
    let refused = connect(&format!("postgres://owner@{useless}/postgres?sslmode=disable")).await.map(drop).unwrap_err();
    assert!(!refused.is_final());
    let refused = refused.to_string();
    let hosts: Vec<_> = useless.split(',').collect();
    assert!(refused.contains(&format!("{}: no answer within 2s", hosts[0])), "{refused}");
    assert!(refused.contains(&format!("and to {}: ", hosts[1])) && refused.contains("refused"), "{refused}");
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
        (&["42501"], "--grant-to", false),
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
    let pid: i32 = one(&ended, "SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let statement = one(&ended, "SELECT pg_sleep(60)", &[]);
    let end = async {
        let is_active = "SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = $1 AND query LIKE '%pg_sleep(60)'
                         AND state = 'active'";
        while !one(&other, is_active, &[&pid]).await.unwrap().get::<_, bool>(0) {}
        one(&other, "SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
    };
    let (error, ()) = tokio::join!(statement, end);
    assert!(is_ambiguous(&error.unwrap_err()));
    // Also what is asked of it from now on: it may be lost on the way.
    assert!(is_ambiguous(&one(&ended, "SELECT 1", &[]).await.unwrap_err()));
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
    fs::write(
        file("server/pg_hba.conf"),
        "local all all trust\nhostssl all known 127.0.0.1/32 cert\nhostssl all all 127.0.0.1/32 scram-sha-256\n",
    )
    .unwrap();
    fs::write(file("a.pem"), &authority.certificate).unwrap();
    fs::write(file("server/ca.pem"), &authority.certificate).unwrap();
    fs::write(file("b.pem"), &other.certificate).unwrap();
    let port = free_port();
    let options = format!(
        "-c listen_addresses=127.0.0.1 -c port={port} -c ssl=on -c ssl_cert_file=cert.pem -c ssl_key_file=key.pem \
         -c ssl_ca_file=ca.pem"
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
    assert!(one(&connection, is_encrypted, &[]).await.unwrap().get::<_, bool>(0));
    for (url, said) in [
        (to("127.0.0.1", "a.pem"), "not valid for name"),
        (to("localhost", "b.pem"), "UnknownIssuer"),
        (to("localhost", "a.pem").replace("secret", "guess"), "pg_hba.conf"),
        (to("localhost", "a.pem").replace(":secret", ""), "password_file=FILE"),
        (to("localhost", "c.pem"), "c.pem can't be read"),
    ] {
        let refused = match Connector::new(self::url(&url), Clock::system()).await {
            Ok(connector) => connector.connect(APPLICATION).await.map(drop).unwrap_err(),
            Err(error) => error,
        };
        assert!(refused.to_string().contains(said), "{url}: {refused}");
    }

    socket.batch_execute("CREATE ROLE known LOGIN").await.unwrap();
    let (mine, key) = (file("mine.pem"), file("mine.key"));
    let of_user = authority.service_with(|params| {
        params.distinguished_name.push(rcgen::DnType::CommonName, "known");
    });
    fs::write(&mine, &of_user.certificate).unwrap();
    fs::write(&key, &of_user.key).unwrap();
    set_mode(&key, 0o644);
    let with = |key: &Path| {
        let of_known = to("localhost", "a.pem").replace("owner:secret", "known");
        of_known + &format!("&sslcert={}&sslkey={}", mine.display(), key.display())
    };
    let refused = Connector::new(self::url(&with(&key)), Clock::system()).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("mine.key") && refused.contains("run chmod 600"), "{refused}");
    set_mode(&key, 0o600);
    let connection = connect(&with(&key)).await.unwrap();
    assert_eq!(one(&connection, "SELECT current_user::text", &[]).await.unwrap().get::<_, String>(0), "known");
    let other_key = file("server/key.pem");
    set_mode(&other_key, 0o600);
    let refused = Connector::new(self::url(&with(&other_key)), Clock::system()).await.map(drop).unwrap_err();
    assert!(refused.to_string().contains("is not the key of the certificate in sslcert"), "{refused}");

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

// ---------------------------------------------------------------------------------------------------------------
// Commits whose answer is lost

/// Where a connection is cut: after this number of bytes to the server, or from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Request(usize),
    Answer(usize),
    /// Not at all: the last message of the next statement that is executed does not arrive, and nothing after it, as if
    /// the process had stopped.
    BeforeSync,
    /// Not at all: nothing goes on of what connections send from now on, as if their server or its sessions had
    /// stopped. This is the number of these connections so far.
    Held(usize),
}

/// The message that ends a statement, behind the one that executes it.
const EXECUTE_AND_SYNC: &[u8] = b"E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04";
const SYNC: usize = 5;

/// A socket in front of a server, whose connections can be cut.
struct Proxy {
    directory: tempfile::TempDir,
    cut: Arc<Mutex<Option<Cut>>>,
}

impl Proxy {
    fn before(server: PathBuf) -> Self {
        const NAME: &str = ".s.PGSQL.5432";
        let (directory, cut) = (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(None)));
        let listener = UnixListener::bind(directory.path().join(NAME)).unwrap();
        let shared = cut.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = UnixStream::connect(server.join(NAME)).await.unwrap();
                tokio::spawn(forwarded(client, server, shared.clone()));
            }
        });
        Self { directory, cut }
    }

    fn host(&self) -> String {
        self.directory.path().display().to_string().replace('/', "%2F")
    }
}

/// Forwards a connection until it ends or is cut.
async fn forwarded(mut client: UnixStream, mut server: UnixStream, cut: Arc<Mutex<Option<Cut>>>) {
    let (mut request, mut answer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        // Returns how many of these bytes go on, and whether the connection ends there.
        let allowed = |bytes: usize, is_request: bool| {
            let mut cut = cut.lock().unwrap();
            let left = match &mut *cut {
                Some(Cut::Request(left)) if is_request => left,
                Some(Cut::Answer(left)) if !is_request => left,
                _ => return (bytes, false),
            };
            if bytes < *left {
                *left -= bytes;
                return (bytes, false);
            }
            let last = *left;
            *cut = None;
            (last, true)
        };
        let is_over = tokio::select! {
            biased;
            read = client.read(&mut request) => {
                let bytes = read.unwrap_or(0);
                if bytes > 0 && let Some(Cut::Held(connections)) = &mut *cut.lock().unwrap() {
                    *connections += 1;
                    break;
                }
                let stops = request[..bytes].ends_with(EXECUTE_AND_SYNC)
                    && cut.lock().unwrap().take_if(|cut| *cut == Cut::BeforeSync).is_some();
                if stops {
                    server.write_all(&request[..bytes - SYNC]).await.unwrap();
                    // Until the server ends the session.
                    let _ = server.read_to_end(&mut Vec::new()).await;
                    return;
                }
                let (goes_on, is_cut) = allowed(bytes, true);
                bytes == 0 || server.write_all(&request[..goes_on]).await.is_err() || is_cut
            }
            read = server.read(&mut answer) => {
                let bytes = read.unwrap_or(0);
                let (goes_on, is_cut) = allowed(bytes, false);
                bytes == 0 || client.write_all(&answer[..goes_on]).await.is_err() || is_cut
            }
        };
        if is_over {
            return;
        }
    }
    // It is held until the client ends it.
    let _ = client.read_to_end(&mut request).await;
}

async fn opened(url: &str) -> (Arc<dyn Store>, Epoch) {
    let store = crate::store::open(&StoreUrl::parse(url).unwrap(), CHECKS, Clock::system()).await.unwrap();
    let epoch = store.take_over(Seals::Checked(keys())).await.unwrap().epoch;
    (store, epoch)
}

/// A store that a replica with this name has claimed and taken over.
async fn led(url: &str, name: &str) -> (Arc<dyn Store>, Epoch) {
    led_by(url, &claim_of(name)).await
}

/// A store that was taken over by this claim.
async fn led_by(url: &str, claim: &Claim) -> (Arc<dyn Store>, Epoch) {
    let store = crate::store::open(&StoreUrl::parse(url).unwrap(), CHECKS, Clock::system()).await.unwrap();
    let epoch = claimed(&*store, claim).await;
    (store, epoch)
}

/// The term of a replica that claims this store so, and takes it over.
async fn claimed(store: &dyn Store, claim: &Claim) -> Epoch {
    let leadership = store.leadership().unwrap();
    let seen = leadership.observe().await.unwrap();
    let Claimed::Won(epoch) = leadership.claim(&seen, claim).await.unwrap() else { panic!("{seen:?}") };
    assert_eq!(store.take_over(Seals::Checked(keys())).await.unwrap().epoch, epoch);
    epoch
}

/// A claim of a replica with this name.
fn claim_of(name: &str) -> Claim {
    static IDS: AtomicU64 = AtomicU64::new(1 << 40);
    Claim {
        id: ClaimId(IDS.fetch_add(1, Ordering::Relaxed)),
        replica: Replica { name: name.into(), address: Some(Endpoint::parse("https://h:1").unwrap()) },
        orchestrator_id: "o".into(),
        lease_ttl: Duration::from_secs(10),
        at_least: Epoch::by_clock(Clock::system().now()),
    }
}

#[tokio::test]
async fn of_claims_at_once_one_wins_and_all_see_whose_it_is() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let stores = futures_util::future::join_all((0..8).map(|_| async {
        crate::store::open(&StoreUrl::parse(&store_url).unwrap(), CHECKS, Clock::system()).await.unwrap()
    }));
    let leaderships: Vec<_> = stores.await.into_iter().map(|store| store.leadership().unwrap()).collect();
    let seen = leaderships[0].observe().await.unwrap();
    assert_eq!((seen.epoch, &seen.leader), (Epoch(0), &None));
    let names: Vec<_> = (0..8).map(|i| format!("r{i}")).collect();
    let claims = leaderships.iter().zip(&names).map(async |(leadership, name)| {
        let claimed = leadership.claim(&seen, &claim_of(name)).await.unwrap();
        if let Claimed::Won(epoch) = claimed { Some((name.clone(), epoch)) } else { None }
    });
    let won: Vec<_> = futures_util::future::join_all(claims).await.into_iter().flatten().collect();
    let [(name, epoch)] = &won[..] else { panic!("{won:?}") };
    let replica = claim_of(name).replica;
    for leadership in &leaderships {
        let observed = leadership.observe().await.unwrap();
        assert_eq!(observed.leader, Some(Leader { replica: replica.clone(), epoch: *epoch }));
        assert_eq!(observed.lease_ttl, Duration::from_secs(10));
    }
    assert_eq!(leaderships[0].renew(*epoch).await.unwrap(), Renewed::Acknowledged);
    assert_eq!(leaderships[0].observe().await.unwrap().beat, seen.beat + 2);
    leaderships[0].release(*epoch).await.unwrap();
    assert_eq!(leaderships[0].observe().await.unwrap().leader, None);
    assert_eq!(leaderships[0].renew(*epoch).await.unwrap(), Renewed::Superseded);
}

#[tokio::test]
async fn a_store_is_that_of_the_orchestrator_whose_replica_has_claimed_it_until_it_is_renamed() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (store, epoch) = led(&store_url, "a").await;
    let leadership = store.leadership().unwrap();
    let seen = leadership.observe().await.unwrap();
    assert_eq!(seen.check_orchestrator("o"), Ok(()));
    let other = seen.check_orchestrator("eu").unwrap_err().to_string();
    assert!(other.contains("\"eu\"") && other.contains("\"o\""), "{other}");
    let renamed = rename(&url(&store_url), "eu", CHECKS, Clock::system()).await.unwrap();
    assert_eq!(renamed.as_deref(), Some("o"));
    // The leader goes on, and a claim of one that has seen the earlier id fails.
    assert_eq!(leadership.renew(epoch).await.unwrap(), Renewed::Acknowledged);
    assert_eq!(leadership.claim(&seen, &claim_of("a")).await.unwrap(), Claimed::Lost);
    let seen = leadership.observe().await.unwrap();
    assert_eq!((seen.epoch, seen.orchestrator_id.as_deref()), (epoch, Some("eu")));
    // What no replica of a valid configuration has written keeps none from leading.
    server.change(&store_url, "UPDATE leader SET orchestrator_id = 'a b'").await;
    assert_eq!(leadership.observe().await.unwrap().orchestrator_id, None);
}

#[tokio::test]
async fn a_claim_fences_the_earlier_leader_before_it_commits_anything() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (earlier, first) = led(&store_url, "a").await;
    commit(&*earlier, recorded(1..=2, first)).await;
    let (later, second) = led(&store_url, "b").await;
    assert!(second > first);
    let fenced = earlier.commit(Arc::new(recorded(3..=4, first))).await.unwrap_err();
    assert_eq!(fenced, StoreError::Fenced { by: second });
    let fenced = earlier.take_over(Seals::Checked(keys())).await.unwrap_err();
    assert_eq!(fenced, StoreError::Fenced { by: second });
    assert_eq!(earlier.leadership().unwrap().renew(first).await.unwrap(), Renewed::Superseded);
    later.publish_checkpoint("later".into()).await.unwrap();
    let fenced = earlier.publish_checkpoint("earlier".into()).await.unwrap_err();
    assert_eq!(fenced, StoreError::Fenced { by: second });
    let taken = later.take_over(Seals::Checked(keys())).await.unwrap();
    assert_eq!(taken.checkpoint.as_deref(), Some("later"));
    commit(&*later, recorded(3..=4, second)).await;
    assert_eq!(revisions(&later.cycles_after(Revision(0), ALL).await.unwrap()), [1, 2, 3, 4]);
    // An operator who accepts the store, or a process without a claim, is later than all of these.
    let (_, without) = opened(&store_url).await;
    assert!(without > second);
}

#[tokio::test]
async fn a_leader_that_stops_in_the_middle_of_a_commit_does_not_keep_the_lead() {
    let Some(server) = shared() else { return };
    stops_in_the_middle_of_a_commit(server, &server.url(), server.directory()).await;
}

#[tokio::test]
async fn a_leader_that_stops_in_the_middle_of_a_commit_behind_a_pooler_does_not_keep_the_lead() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    stops_in_the_middle_of_a_commit(server, &pooler.url(&server.url()), pooler.directory()).await;
}

/// Waits until a session that has locked a table of the store at this URL in this mode has executed its statement, and
/// waits for what ends it.
async fn until_stopped(server: &Server, store_url: &str, table: &str, mode: &str) {
    let schema = url(store_url).schema().to_owned();
    let stopped = format!(
        "SELECT count(*) FROM pg_locks k JOIN pg_stat_activity USING (pid)
         WHERE wait_event = 'ClientRead' AND relation = '{schema}.{table}'::regclass AND k.mode = '{mode}'"
    );
    server.shows(&stopped, "1").await;
}

/// Two leaders of the store at this URL, by way of what listens in this directory.
async fn stops_in_the_middle_of_a_commit(server: &Server, direct: &str, directory: &Path) {
    let proxy = Proxy::before(directory.to_owned());
    let (stopped, first) = led(&server::through(proxy.directory.path(), direct), "a").await;
    commit(&*stopped, recorded(1..=2, first)).await;
    *proxy.cut.lock().unwrap() = Some(Cut::BeforeSync);
    let committing = tokio::spawn({
        let (store, write) = (stopped.clone(), recorded(3..=4, first));
        async move { store.commit(Arc::new(write)).await }
    });
    until_stopped(server, direct, "meta", "RowExclusiveLock").await;
    let other = crate::store::open(&StoreUrl::parse(direct).unwrap(), CHECKS, Clock::system()).await.unwrap();
    let leadership = other.leadership().unwrap();
    let seen = leadership.observe().await.unwrap();
    // The first attempt waits for the row in vain, and ends the session that has locked it.
    leadership.claim(&seen, &claim_of("b")).await.unwrap_err();
    let claimed = leadership.claim(&seen, &claim_of("b")).await.unwrap();
    let Claimed::Won(second) = claimed else { panic!("{claimed:?}") };
    let contents = other.take_over(Seals::Checked(keys())).await.unwrap();
    assert_eq!((contents.epoch, contents.last_revision), (second, Revision(2)));
    assert_eq!(committing.await.unwrap().unwrap_err(), StoreError::Fenced { by: second });
    commit(&*other, recorded(3..=4, second)).await;
}

#[tokio::test]
async fn a_transaction_of_any_earlier_term_that_goes_on_no_more_does_not_keep_the_lead() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (store, first) = led(&store_url, "a").await;
    let stalled = connector(&store_url).await.connect("orchestrator/7").await.unwrap();
    let schema = url(&store_url).schema().to_owned();
    stalled.batch_execute(&format!("BEGIN; UPDATE {schema}.leader SET beat = beat")).await.unwrap();
    let leadership = store.leadership().unwrap();
    let seen = leadership.observe().await.unwrap();
    leadership.claim(&seen, &claim_of("b")).await.unwrap_err();
    let claimed = leadership.claim(&seen, &claim_of("b")).await.unwrap();
    assert!(matches!(claimed, Claimed::Won(epoch) if epoch > first), "{claimed:?}");
}

#[tokio::test]
async fn a_checkpoint_whose_publisher_has_stopped_does_not_keep_the_lead() {
    let Some(server) = shared() else { return };
    publisher_has_stopped(server, &server.url(), server.directory()).await;
}

#[tokio::test]
async fn a_checkpoint_whose_publisher_has_stopped_behind_a_pooler_does_not_keep_the_lead() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    publisher_has_stopped(server, &pooler.url(&server.url()), pooler.directory()).await;
}

/// A leader of the store at this URL, by way of what listens in this directory, and one that takes over from it.
async fn publisher_has_stopped(server: &Server, direct: &str, directory: &Path) {
    let proxy = Proxy::before(directory.to_owned());
    let (stopped, first) = led(&server::through(proxy.directory.path(), direct), "a").await;
    stopped.publish_checkpoint("first".into()).await.unwrap();
    *proxy.cut.lock().unwrap() = Some(Cut::BeforeSync);
    let publishing = tokio::spawn(async move { stopped.publish_checkpoint("second".into()).await });
    until_stopped(server, direct, "leader", "RowShareLock").await;
    let other = crate::store::open(&StoreUrl::parse(direct).unwrap(), CHECKS, Clock::system()).await.unwrap();
    let leadership = other.leadership().unwrap();
    let seen = leadership.observe().await.unwrap();
    leadership.claim(&seen, &claim_of("b")).await.unwrap_err();
    let claimed = leadership.claim(&seen, &claim_of("b")).await.unwrap();
    assert!(matches!(claimed, Claimed::Won(epoch) if epoch > first), "{claimed:?}");
    publishing.await.unwrap().unwrap_err();
    let taken = other.take_over(Seals::Checked(keys())).await.unwrap();
    assert_eq!(taken.checkpoint.as_deref(), Some("first"));
}

#[tokio::test]
async fn what_an_operator_does_with_the_store_is_not_ended_by_a_candidate() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (store, _) = led(&store_url, "a").await;
    let copying = connect(&store_url).await.unwrap();
    let schema = url(&store_url).schema().to_owned();
    copying.batch_execute(&format!("BEGIN; SELECT 1 FROM {schema}.meta FOR UPDATE")).await.unwrap();
    let leadership = store.leadership().unwrap();
    let seen = leadership.observe().await.unwrap();
    for _ in 0..2 {
        leadership.claim(&seen, &claim_of("b")).await.unwrap_err();
    }
    copying.batch_execute("COMMIT").await.unwrap();
    assert!(matches!(leadership.claim(&seen, &claim_of("b")).await.unwrap(), Claimed::Won(_)));
}

#[tokio::test]
async fn a_row_that_is_not_shown_in_time_is_looked_at_again() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (store, epoch) = led(&store_url, "a").await;
    let (other, schema) = (connect(&store_url).await.unwrap(), url(&store_url).schema().to_owned());
    other.batch_execute(&format!("BEGIN; LOCK TABLE {schema}.leader IN ACCESS EXCLUSIVE MODE")).await.unwrap();
    let leadership = store.leadership().unwrap();
    let error = leadership.observe().await.unwrap_err();
    assert!(!error.is_final() && error.to_string().contains("has not answered within 2s"), "{error}");
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(leadership.observe().await.unwrap().epoch, epoch);
}

#[tokio::test]
async fn a_row_with_an_address_and_a_lease_of_no_replica_says_who_leads_all_the_same() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (store, epoch) = led(&store_url, "a").await;
    for (lease_ms, lease_ttl) in [("-5", Duration::ZERO), ("9000000000000000", LONGEST_LEASE)] {
        let set = format!("UPDATE leader SET address = 'gopher://x', lease_ms = {lease_ms}");
        server.change(&store_url, &set).await;
        let observed = store.leadership().unwrap().observe().await.unwrap();
        let replica = Replica { name: "a".into(), address: None };
        assert_eq!((observed.leader, observed.lease_ttl), (Some(Leader { replica, epoch }), lease_ttl));
    }
}

#[tokio::test]
async fn a_row_with_an_epoch_that_no_clock_gives_is_named_wherever_it_is_read() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (store, epoch) = led(&store_url, "a").await;
    server.change(&store_url, "UPDATE leader SET epoch = 9223372036854775806").await;
    let leadership = store.leadership().unwrap();
    assert_eq!(leadership.renew(epoch).await.unwrap(), Renewed::Superseded);
    let observed = leadership.observe().await.map(drop).unwrap_err();
    let published = store.publish_checkpoint("note".into()).await.unwrap_err();
    let taken = store.take_over(Seals::Checked(keys())).await.map(drop).unwrap_err();
    for error in [observed, published, taken] {
        assert!(matches!(error, StoreError::Tampered { .. }), "{error}");
        assert!(error.to_string().contains("the epoch in its table leader is 9223372036854775806"), "{error}");
    }
    // Another token, by which a commit finds the row.
    let store_url = server.url();
    let (store, epoch) = opened(&store_url).await;
    server.change(&store_url, "UPDATE leader SET epoch = 9223372036854775806; UPDATE meta SET token = 1").await;
    let committed = store.commit(Arc::new(recorded(1..=2, epoch))).await.unwrap_err();
    assert!(committed.to_string().contains("the epoch in its table leader"), "{committed}");
}

#[tokio::test]
async fn a_session_that_stopped_in_a_commit_is_replaced_while_the_lease_goes_on_to_be_renewed() {
    let Some(server) = shared() else { return };
    // The commit does not arrive, or the end of it does not: then the session has locked the row.
    for (cut, until) in [(Cut::Held(0), Some(Cut::Held(1))), (Cut::BeforeSync, None)] {
        let proxy = Proxy::before(server.directory().to_owned());
        let claim = Claim { lease_ttl: Duration::from_millis(500), ..claim_of("a") };
        let (store, epoch) = led_by(&server::through(proxy.directory.path(), &server.url()), &claim).await;
        let leadership = store.leadership().unwrap();
        commit(&*store, recorded(1..=2, epoch)).await;
        // The connection of a term begins with its first renewal.
        assert_eq!(leadership.renew(epoch).await.unwrap(), Renewed::Acknowledged);
        *proxy.cut.lock().unwrap() = Some(cut);
        let committing = tokio::spawn({
            let (store, write) = (store.clone(), recorded(3..=4, epoch));
            async move { store.commit(Arc::new(write)).await }
        });
        while *proxy.cut.lock().unwrap() != until {
            tokio::task::yield_now().await;
        }
        *proxy.cut.lock().unwrap() = None;
        let renewed = async {
            while !committing.is_finished() {
                assert_eq!(leadership.renew(epoch).await.unwrap(), Renewed::Acknowledged);
            }
        };
        timeout(Duration::from_secs(30), renewed).await.unwrap();
        let error = committing.await.unwrap().unwrap_err();
        assert!(!error.is_final() && error.to_string().contains("although another one"), "{error}");
        commit(&*store, recorded(3..=4, epoch)).await;
        assert_eq!(revisions(&store.cycles_after(Revision(0), ALL).await.unwrap()), [1, 2, 3, 4]);
    }
}

/// What will be known of a statement.
type Outcome<T> = tokio::task::JoinHandle<Result<T, StoreError>>;

/// Begins a commit and a renewal at a server that does not answer them any more, behind a proxy.
async fn stopped(proxy: &Proxy, store: &Arc<dyn Store>, epoch: Epoch) -> (Outcome<()>, Outcome<Renewed>) {
    // The connection of a term begins with its first renewal.
    assert_eq!(store.leadership().unwrap().renew(epoch).await.unwrap(), Renewed::Acknowledged);
    *proxy.cut.lock().unwrap() = Some(Cut::Held(0));
    let renewing = tokio::spawn({
        let leadership = store.leadership().unwrap();
        async move { leadership.renew(epoch).await }
    });
    let committing = tokio::spawn({
        let (store, write) = (store.clone(), recorded(3..=4, epoch));
        async move { store.commit(Arc::new(write)).await }
    });
    while *proxy.cut.lock().unwrap() != Some(Cut::Held(2)) {
        tokio::task::yield_now().await;
    }
    (committing, renewing)
}

#[tokio::test]
async fn a_leader_whose_sessions_stopped_finds_that_another_replica_has_claimed_to_lead() {
    let Some(server) = shared() else { return };
    let proxy = Proxy::before(server.directory().to_owned());
    let direct = server.url();
    let schema = url(&direct).schema().to_owned();
    let (store, first) = led(&format!("postgres://owner@{}/postgres?schema={schema}", proxy.host()), "a").await;
    commit(&*store, recorded(1..=2, first)).await;
    let (committing, renewing) = stopped(&proxy, &store, first).await;
    *proxy.cut.lock().unwrap() = None;
    let (other, second) = led(&direct, "b").await;
    let error = renewing.await.unwrap().unwrap_err().to_string();
    assert!(error.contains(&format!("epoch {second} has taken over")), "{error}");
    assert_eq!(store.leadership().unwrap().renew(first).await.unwrap(), Renewed::Superseded);
    assert_eq!(committing.await.unwrap().unwrap_err(), StoreError::Fenced { by: second });
    commit(&*other, recorded(3..=4, second)).await;
}

#[tokio::test]
async fn a_leader_whose_server_stopped_goes_on_with_the_standby_that_was_promoted() {
    let Some(server) = Server::start("", None) else { return };
    let (proxy, standby) = (Proxy::before(server.directory().to_owned()), server.standby());
    server.wait_for_standby().await;
    let schema = url(&server.url()).schema().to_owned();
    let both = format!("postgres://owner@{},{}/postgres?schema={schema}", proxy.host(), standby.host());
    let (store, epoch) = led(&both, "a").await;
    commit(&*store, recorded(1..=2, epoch)).await;
    let (committing, renewing) = stopped(&proxy, &store, epoch).await;
    standby.promote().await;
    let error = renewing.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("a standby was promoted"), "{error}");
    assert_eq!(store.leadership().unwrap().renew(epoch).await.unwrap(), Renewed::Acknowledged);
    // It did not arrive, so it was not kept, and the next one goes on from what was.
    let error = committing.await.unwrap().unwrap_err();
    assert!(!error.is_final(), "{error}");
    commit(&*store, recorded(3..=4, epoch)).await;
    // Also over the connection that its reads had to the first server.
    assert_eq!(revisions(&store.cycles_after(Revision(0), ALL).await.unwrap()), [1, 2, 3, 4]);
}

#[tokio::test]
async fn an_earlier_primary_that_goes_on_beside_the_one_that_was_promoted_is_not_used_any_more() {
    let Some(primary) = Server::start("", None) else { return };
    let standby = primary.standby();
    primary.wait_for_standby().await;
    let schema = url(&primary.url()).schema().to_owned();
    let both = format!("postgres://owner@{},{}/postgres?schema={schema}", primary.host(), standby.host());
    let (store, epoch) = led(&both, "a").await;
    commit(&*store, recorded(1..=2, epoch)).await;
    let all_read = async || {
        let reads = (0..2 * READERS).map(|_| store.cycles_after(Revision(0), ALL));
        let all = futures_util::future::join_all(reads).await;
        all.into_iter().map(|read| revisions(&read.unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(all_read().await, [[1, 2]; 2 * READERS]);
    let stopped = primary.stop().await;
    standby.promote().await;
    while let Err(error) = store.commit(Arc::new(recorded(3..=4, epoch))).await {
        assert!(!error.is_final(), "{error}");
    }
    drop(stopped);
    // Connections that were idle lead there, and its host comes first.
    assert_eq!(all_read().await, [[1, 2, 3, 4]; 2 * READERS]);
    let leadership = store.leadership().unwrap();
    assert_eq!(leadership.observe().await.unwrap().epoch, epoch);
    assert_eq!(primary.execute(&format!("SELECT count(*) FROM {schema}.cycles")).await.trim_end(), "2");
    assert_eq!(connect(&both).await.unwrap().server().timeline, Some(2), "a process that starts looks at both");
    standby.crash().await;
    leadership.observe().await.unwrap_err();
    let refused = leadership.observe().await.unwrap_err();
    assert!(!refused.is_final());
    for said in [&primary.directory().display().to_string(), "timeline 1", "timeline 2", "rebuild it as a standby"] {
        assert!(refused.to_string().contains(said), "{said} is not in {refused}");
    }
}

#[tokio::test]
async fn a_leader_at_an_earlier_primary_that_goes_on_notices_that_a_standby_was_promoted() {
    let Some(primary) = Server::start("", None) else { return };
    let standby = primary.standby();
    let schema = url(&primary.url()).schema().to_owned();
    let both = format!("postgres://owner@{},{}/postgres?schema={schema}", primary.host(), standby.host());
    let (store, epoch) = led(&both, "a").await;
    commit(&*store, recorded(1..=2, epoch)).await;
    let caught_up = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()";
    primary.shows(caught_up, "1").await;
    standby.promote().await;
    // No commit waits for a standby, so each is answered.
    let mut next = 3;
    let refused = loop {
        match store.commit(Arc::new(recorded(next..=next + 1, epoch))).await {
            Ok(()) => next += 2,
            Err(error) if error.is_final() => break error,
            Err(_) => {}
        }
    };
    assert!(matches!(refused, StoreError::NotServed { .. }), "{refused:?}");
}

#[tokio::test]
async fn a_replica_that_knows_of_a_record_does_not_read_from_an_earlier_primary_that_lacks_it() {
    let Some(primary) = Server::start("", None) else { return };
    let standby = primary.standby();
    primary.wait_for_standby().await;
    let schema = url(&primary.url()).schema().to_owned();
    let of = |hosts: &str| format!("postgres://owner@{hosts}/postgres?schema={schema}");
    let (store, first) = led(&of(&primary.host()), "a").await;
    commit(&*store, recorded(1..=2, first)).await;
    let both = StoreUrl::parse(&of(&format!("{},{}", primary.host(), standby.host()))).unwrap();
    let follower = crate::store::open(&both, CHECKS, Clock::system()).await.unwrap();
    let read = async || follower.cycles_after(Revision(0), ALL).await.map(|found| revisions(&found));
    assert_eq!(read().await.unwrap(), [1, 2]);
    // The earlier primary goes on.
    standby.promote().await;
    let (other, second) = led(&of(&standby.host()), "b").await;
    commit(&*other, recorded(3..=4, second)).await;
    assert_eq!(read().await.unwrap(), [1, 2], "it does not know of the other server yet");
    follower.require(Revision(4), second);
    let found = loop {
        match read().await {
            Ok(found) => break found,
            Err(ResumeError::Store(StoreError::Behind { server, .. })) => {
                assert_eq!(server, primary.directory().display().to_string());
            }
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(found, [1, 2, 3, 4]);
    for (revision, epoch) in [(5, second), (4, second.next())] {
        follower.require(Revision(revision), epoch);
        read().await.unwrap_err();
    }
    follower.require(Revision(4), first);
    assert_eq!(read().await.unwrap(), [1, 2, 3, 4]);
}

#[tokio::test]
async fn an_output_that_was_changed_without_the_key_is_not_sealed_under_a_new_name() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let (store, epoch) = opened(&store_url).await;
    let outputs = vec![(name("a"), output(1, "a")), (name("b"), output(2, "b"))];
    commit(&*store, Write { outputs, ..recorded(1..=2, epoch) }).await;
    let of_b = "UPDATE outputs SET payload = (SELECT payload FROM outputs WHERE name = 'b') WHERE name = 'a'";
    server.change(&store_url, of_b).await;
    let renamed = [(name("a"), name("x"))].into();
    commit(&*store, Write { epoch, last_cycle_id: CycleId(2), renamed, ..Write::default() }).await;
    let refused = store.take_over(Seals::Checked(keys())).await.unwrap_err();
    assert!(refused.to_string().contains("the seal of its output \"a\""), "{refused}");
}

#[tokio::test]
async fn the_outcome_of_a_commit_is_right_wherever_its_connection_is_cut() {
    let Some(server) = shared() else { return };
    cut_everywhere(server, server.directory(), "").await;
}

#[tokio::test]
async fn the_outcome_of_a_commit_is_right_wherever_its_connection_to_a_pooler_is_cut() {
    let (Some(server), Some(pooler)) = (shared(), shared_pooler()) else { return };
    cut_everywhere(server, pooler.directory(), "&pooled=true").await;
}

#[tokio::test]
async fn reads_that_are_not_awaited_any_more_count_until_they_end() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let store = Arc::new(PostgresStore::open(&url(&store_url), CHECKS, Clock::system()).await.unwrap());
    let (other, observer) = (connect(&store_url).await.unwrap(), connect(&store_url).await.unwrap());
    let schema = url(&store_url).schema().to_owned();
    other.batch_execute(&format!("BEGIN; LOCK TABLE {schema}.cycles IN ACCESS EXCLUSIVE MODE")).await.unwrap();
    let reads: Vec<_> = (0..2 * READERS)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.cycle(CycleId(1)).await })
        })
        .collect();
    let waiting =
        format!("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{schema}%'");
    while one(&observer, &waiting, &[]).await.unwrap().get::<_, i64>(0) < i64::try_from(READERS).unwrap() {}
    for read in reads {
        read.abort();
        assert!(read.await.unwrap_err().is_cancelled());
    }
    assert_eq!(store.readers.permits.available_permits(), 0);
    other.batch_execute("COMMIT").await.unwrap();
    let _all = store.readers.permits.acquire_many(u32::try_from(READERS).unwrap()).await.unwrap();
    assert_eq!(store.readers.idle().len(), READERS);
}

#[tokio::test]
async fn reads_that_stopped_and_are_not_awaited_any_more_do_not_keep_others_from_reading() {
    let Some(server) = shared() else { return };
    let (store_url, proxy) = (server.url(), Proxy::before(server.directory().to_owned()));
    let through = server::through(proxy.directory.path(), &store_url);
    let store = Arc::new(PostgresStore::open(&url(&through), CHECKS, Clock::system()).await.unwrap());
    let read = || {
        let store = store.clone();
        tokio::spawn(async move { store.cycle(CycleId(1)).await })
    };
    while store.readers.idle().len() < READERS {
        for read in futures_util::future::join_all((0..READERS).map(|_| read())).await {
            assert_eq!(read.unwrap().unwrap(), None);
        }
    }
    *proxy.cut.lock().unwrap() = Some(Cut::Held(0));
    let reads: Vec<_> = (0..READERS).map(|_| read()).collect();
    while *proxy.cut.lock().unwrap() != Some(Cut::Held(READERS)) {
        tokio::task::yield_now().await;
    }
    for read in reads {
        read.abort();
        assert!(read.await.unwrap_err().is_cancelled());
    }
    *proxy.cut.lock().unwrap() = None;
    assert_eq!(store.readers.permits.available_permits(), 0);
    assert_eq!(tokio::time::timeout(STATEMENT * 3, read()).await.unwrap().unwrap().unwrap(), None);
}

#[tokio::test]
async fn a_read_that_takes_too_long_is_ended_by_the_server_as_well() {
    let Some(server) = shared() else { return };
    let store_url = server.url();
    let store = PostgresStore::open(&url(&store_url), CHECKS, Clock::system()).await.unwrap();
    let other = connect(&store_url).await.unwrap();
    let schema = url(&store_url).schema().to_owned();
    other.batch_execute(&format!("BEGIN; LOCK TABLE {schema}.cycles IN ACCESS EXCLUSIVE MODE")).await.unwrap();
    let error = store.cycle(CycleId(1)).await.unwrap_err();
    assert!(!error.is_final() && error.to_string().contains("it took too long"), "{error}");
    assert_eq!(store.readers.idle().len(), 1, "the connection is of further use");
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(store.cycle(CycleId(1)).await.unwrap(), None);
}

/// Cuts connections to what listens in this directory, at places all over a commit and its answer: with
/// `ORCHESTRATOR_TEST_EVERY_BYTE` in the environment, after each byte.
async fn cut_everywhere(server: &Server, directory: &Path, parameters: &str) {
    let proxy = Proxy::before(directory.to_owned());
    let schema = url(&server.url()).schema().to_owned();
    let through = format!("postgres://owner@{}/postgres?schema={schema}{parameters}", proxy.host());
    let (store, epoch) = opened(&through).await;
    let direct = connect(&server.url_of("owner", &schema)).await.unwrap();
    let stored = async || {
        let number = format!("SELECT count(*) FROM {schema}.cycles");
        one(&direct, &number, &[]).await.unwrap().get::<_, i64>(0)
    };
    // A commit has some 2,300 bytes, and its answer some 100; both are more on a new connection.
    let (of_request, of_answer) = if env::var_os("ORCHESTRATOR_TEST_EVERY_BYTE").is_some() { (1, 1) } else { (97, 19) };
    let requests = (0..6000).step_by(of_request).map(Cut::Request);
    let answers = (0..1200).step_by(of_answer).map(Cut::Answer);
    let (mut revision, mut lost) = (0, 0);
    for cut in requests.chain(answers) {
        revision += 1;
        let write = Arc::new(recorded(revision..=revision, epoch));
        *proxy.cut.lock().unwrap() = Some(cut);
        while let Err(error) = store.commit(write.clone()).await {
            assert!(!error.is_final(), "{cut:?}: {error}");
            assert_eq!(stored().await, i64::try_from(revision - 1).unwrap(), "{cut:?}: {error}");
            lost += 1;
        }
        assert_eq!(stored().await, i64::try_from(revision).unwrap(), "{cut:?}");
    }
    *proxy.cut.lock().unwrap() = None;
    assert!(lost > 10, "only {lost} commits were not kept");
    let all = store.cycles_after(Revision(0), ALL).await.unwrap();
    assert_eq!(revisions(&all), (1..=revision).collect::<Vec<_>>());
    let contents = store.take_over(Seals::Checked(keys())).await.unwrap();
    assert_eq!(contents.last_revision.0, revision);
}

#[tokio::test]
async fn a_commit_whose_wait_for_a_standby_is_cancelled_is_acknowledged_only_once_it_is_replicated() {
    // Its settings are those of all its databases.
    let Some(server) = Server::start("", None) else { return };
    let store_url = server.url();
    let (store, epoch) = opened(&store_url).await;
    let other = connect(&store_url).await.unwrap();
    other.batch_execute("SET synchronous_commit = local").await.unwrap();
    let wait_for = async |standby: &str| {
        other.batch_execute(&format!("ALTER SYSTEM SET synchronous_standby_names = '{standby}'")).await.unwrap();
        other.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    };
    wait_for("away").await;
    let (acknowledged, is_over) = (Cell::new(0), Cell::new(false));
    // A server that has read its settings begins to wait for the standby a moment later.
    let commits = async {
        while !is_over.get() {
            let revision = acknowledged.get() + 1;
            store.commit(Arc::new(recorded(revision..=revision, epoch))).await.unwrap();
            acknowledged.set(revision);
        }
    };
    let operator = async {
        // A commit, and then its first two barriers. A wait that was cancelled is seen for a moment longer.
        let mut before = String::new();
        for _ in 0..3 {
            let cancel = "SELECT query_start::text, pg_cancel_backend(pid) FROM pg_stat_activity
                          WHERE application_name = 'orchestrator' AND wait_event = 'SyncRep'
                              AND query_start::text <> $1 AND pid <> pg_backend_pid()";
            before = loop {
                if let Some(row) = other.query(cancel, &[&before]).await.unwrap().first() {
                    break row.get(0);
                }
            };
        }
        let visible = format!("SELECT count(*) FROM {}.cycles", url(&store_url).schema());
        let visible: i64 = one(&other, &visible, &[]).await.unwrap().get(0);
        assert_eq!(u64::try_from(visible), Ok(acknowledged.get() + 1), "visible, and not replicated");
        is_over.set(true);
        wait_for("").await;
    };
    tokio::join!(commits, operator);
    let stored = store.cycles_after(Revision(0), ALL).await.unwrap();
    assert_eq!(revisions(&stored), (1..=acknowledged.get()).collect::<Vec<_>>());
}
