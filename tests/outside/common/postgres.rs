//! A PostgreSQL server. The tests of the store in `src` use it as well, so it needs nothing else of the kit.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
};

use rustix::process::{Pid, Signal, geteuid, kill_process};

/// Starts a server in a new directory, writes the path of that, and ends the server once its input ends: when the test
/// ends in any way. `$1` has further options of the server, `$2` is a directory whose files are copied there first, and
/// `$3` is that of the primary if the server is to be a standby.
const SCRIPT: &str = r#"
set -e
PATH="$PATH:$(ls -d /usr/lib/postgresql/*/bin 2> /dev/null | tail -n 1)"
directory="$(mktemp -d)"
data="$directory/data"
if [ -n "$3" ]; then
    pg_basebackup --pgdata "$data" --dbname "host=$3 user=owner application_name=standby" --write-recovery-conf \
        --checkpoint fast --no-sync
else
    initdb --pgdata "$data" --username owner --auth trust --encoding UTF8 --locale C --no-sync > /dev/null
fi
if [ -n "$2" ]; then cp "$2"/* "$data/" && chmod 600 "$data"/*.pem; fi
cat >> "$data/postgresql.conf" << END
unix_socket_directories = '$directory'
listen_addresses = ''
fsync = off
max_connections = 200
END
pg_ctl start --wait --silent --pgdata "$data" --log "$directory/log" --options "$1"
echo "$directory"
read -r _ || true
pg_ctl stop --silent --mode immediate --pgdata "$data" 2> /dev/null || true
rm -rf "$directory"
"#;

/// Does something with the server in the directory `$1`, which takes part in the words after that.
const CONTROL: &str = r#"
PATH="$PATH:$(ls -d /usr/lib/postgresql/*/bin 2> /dev/null | tail -n 1)"
directory="$1"
shift
exec pg_ctl "$@" --wait --silent --pgdata "$directory/data" --log "$directory/log"
"#;

/// Starts pgbouncer in front of the server whose socket is in the directory `$1`, writes the path of its own directory,
/// and ends it once its input ends. Each transaction gets the session that has waited longest.
const POOLER: &str = r#"
set -e
PATH="$PATH:/usr/sbin"
directory="$(mktemp -d)"
cat > "$directory/pgbouncer.ini" << END
[databases]
postgres = host=$1 user=owner
[pgbouncer]
listen_addr =
listen_port = 5432
unix_socket_dir = $directory
auth_type = any
pool_mode = transaction
server_round_robin = 1
default_pool_size = 20
max_client_conn = 1000
END
pgbouncer --quiet "$directory/pgbouncer.ini" 2> "$directory/log" &
until [ -S "$directory/.s.PGSQL.5432" ]; do kill -0 $!; sleep 0.01; done
echo "$directory"
read -r _ || true
kill $!
wait
rm -rf "$directory"
"#;

/// A server that ends with the test. Its superuser is `owner`, and its database for tests `postgres`.
pub struct Server {
    directory: PathBuf,
    /// The options it was started with.
    options: String,
    /// Ends once its input is closed.
    process: Child,
}

/// The statements of a migration that a later version of the software may have. They add columns to each table, a table
/// and an index.
pub const ADDS: &str = "
DO $$
DECLARE found regclass;
BEGIN
    FOR found IN SELECT oid FROM pg_class WHERE relkind = 'r' AND relname <> 'store_schema' AND relnamespace =
        (SELECT relnamespace FROM pg_class WHERE oid = 'SCHEMA.meta'::regclass)
    LOOP
        EXECUTE format('ALTER TABLE %s ADD COLUMN later text, ADD COLUMN number bigint NOT NULL DEFAULT 7', found);
    END LOOP;
END $$;
CREATE TABLE SCHEMA.later (id bigint PRIMARY KEY, outputs bytea);
CREATE INDEX later_cycles ON SCHEMA.cycles (finished_at)";

/// The server that all tests of this process share. `None` where PostgreSQL is not installed, which is reported; with
/// `ORCHESTRATOR_TEST_POSTGRES=required`, tests fail instead.
pub fn shared() -> Option<&'static Server> {
    static SERVER: LazyLock<Option<Server>> = LazyLock::new(|| Server::start("", None));
    SERVER.as_ref()
}

/// A server and a standby of it, and the URL of a new store on both. `None` as in [`shared`].
pub fn pair() -> Option<(Server, Server, String)> {
    let primary = Server::start("", None)?;
    let standby = primary.standby();
    let url = format!("postgres://owner@{},{}/postgres?schema=fleet", primary.host(), standby.host());
    Some((primary, standby, url))
}

impl Server {
    /// Starts a server with these options, and with copies of the files of a directory beside its data. `None` as in
    /// [`shared`].
    pub fn start(options: &str, files: Option<&Path>) -> Option<Self> {
        if !is_installed("command -v initdb || ls /usr/lib/postgresql/*/bin/initdb", "PostgreSQL") {
            return None;
        }
        let files = files.unwrap_or(Path::new("")).display().to_string();
        let (directory, process) = started(as_user(SCRIPT).args([options, &files]));
        Some(Self { directory, options: options.to_owned(), process })
    }

    /// Starts a server with a database `small` on a disk of 24 MiB at this path, which it alone sees. `None` as in
    /// [`shared`], and where this process may not mount one, which is reported.
    pub async fn with_small_disk(path: &Path) -> Option<Self> {
        const MOUNT: &str = r#"mount -t tmpfs -o size=24m,mode=1777 tmpfs "$0" && exec "$@""#;
        let with_disk = |command: &Command| {
            let mut within = Command::new("unshare");
            within.args(["--mount", "sh", "-c", MOUNT]).arg(path).arg(command.get_program()).args(command.get_args());
            within.current_dir("/");
            within
        };
        if !is_installed("command -v initdb || ls /usr/lib/postgresql/*/bin/initdb", "PostgreSQL") {
            return None;
        }
        if !with_disk(&Command::new("true")).status().is_ok_and(|it| it.success()) {
            eprintln!("SKIPPED: this mounts a disk");
            return None;
        }
        let (directory, process) = started(&mut with_disk(as_user(SCRIPT).args(["", ""])));
        let (server, path) = (Self { directory, options: String::new(), process }, path.display());
        server.run(&format!("mkdir {path}/tables")).await;
        server.execute(&format!("CREATE TABLESPACE small LOCATION '{path}/tables'")).await;
        server.execute("CREATE DATABASE small TABLESPACE small").await;
        Some(server)
    }

    /// Fills its small disk, which is at this path.
    pub async fn fill_disk(&self, path: &Path) {
        self.run(&format!("dd if=/dev/zero of={}/filler bs=8k 2> /dev/null || true", path.display())).await;
    }

    /// Makes room again on its small disk, which is at this path.
    pub async fn empty_disk(&self, path: &Path) {
        self.run(&format!("rm {}/filler", path.display())).await;
    }

    /// Has the server run a command of the shell.
    async fn run(&self, command: &str) {
        self.execute(&format!("COPY (SELECT 1) TO PROGRAM 'cat > /dev/null; {command}'")).await;
    }

    /// Starts a standby of this server with the same options, and with the name `standby`.
    pub fn standby(&self) -> Self {
        let (options, primary) = (self.options.clone(), self.directory.display().to_string());
        let (directory, process) = started(as_user(SCRIPT).args([&options, "", &primary]));
        Self { directory, options, process }
    }

    /// Ends the server at once, as when its machine fails.
    pub async fn crash(&self) {
        self.control(&["stop", "--mode", "immediate"]).await;
    }

    /// Stops the server as when its machine hangs: connections stay open, and nothing answers. It goes on once what is
    /// returned is dropped.
    pub async fn stop(&self) -> Stopped {
        let own = fs::read_to_string(self.directory.join("data/postmaster.pid")).unwrap();
        let all = self.execute("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()").await;
        let all = own.lines().take(1).chain(all.lines()).map(|pid| Pid::from_raw(pid.trim().parse().unwrap()).unwrap());
        let stopped = Stopped(all.collect());
        // The first one starts the others. Any other one may have ended meanwhile.
        for pid in &stopped.0 {
            let _ = kill_process(*pid, Signal::STOP);
        }
        stopped
    }

    /// Starts the server after it has crashed.
    pub async fn start_again(&self) {
        self.control(&["start"]).await;
    }

    /// Makes a standby take writes.
    pub async fn promote(&self) {
        self.control(&["promote"]).await;
    }

    async fn control(&self, action: &[&str]) {
        let mut command = tokio::process::Command::from(as_user(CONTROL));
        command.arg(&self.directory).args(action).stdin(Stdio::null()).stdout(Stdio::null());
        assert!(command.status().await.unwrap().success(), "{action:?}");
    }

    /// Has commits wait for the standby, which is there.
    pub async fn wait_for_standby(&self) {
        self.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'").await;
        self.execute("SELECT pg_reload_conf()").await;
        // Commits wait from the moment on at which the checkpointer has read the settings.
        self.execute("CHECKPOINT").await;
        self.shows("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", "1").await;
    }

    /// Waits until a query returns this.
    pub async fn shows(&self, query: &str, expected: &str) {
        while self.execute(query).await.trim_end() != expected {}
    }

    /// The URL of a store on it that no other test has.
    pub fn url(&self) -> String {
        static SCHEMAS: AtomicU32 = AtomicU32::new(0);
        let number = SCHEMAS.fetch_add(1, Ordering::Relaxed);
        self.url_of("owner", &format!("test_{}_{number}", std::process::id()))
    }

    /// The URL of the store in this schema, for this user.
    pub fn url_of(&self, user: &str, schema: &str) -> String {
        format!("postgres://{user}@{}/postgres?schema={schema}", self.host())
    }

    /// Ends all sessions of orchestrators, whatever they do.
    pub async fn end_sessions(&self) {
        self.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'orchestrator%'",
        )
        .await;
    }

    /// Changes the tables of the store at this URL, as another program would.
    pub async fn change(&self, url: &str, statement: &str) {
        let (_, schema) = url.rsplit_once("schema=").unwrap();
        self.execute(&format!("SET search_path = {schema}; {statement}")).await;
    }

    /// Migrates the store at this URL, as a later version of the software may: see [`ADDS`].
    pub async fn widen(&self, url: &str) {
        let (_, schema) = url.rsplit_once("schema=").unwrap();
        let adds = ADDS.replace("SCHEMA.", &format!("{schema}."));
        let note = format!("UPDATE {schema}.store_schema SET version = 2, usable_from = 1");
        // The tables are in use, so that it may have to be repeated, as by a replica.
        while !self.executed(&format!("{adds}; {note}")).await.status.success() {}
    }

    /// The columns of the tables of the store at this URL, each behind the name of its table and a dot.
    #[allow(dead_code, reason = "only tests in `src` use it")]
    pub async fn columns(&self, url: &str) -> BTreeSet<String> {
        let (_, schema) = url.rsplit_once("schema=").unwrap();
        let columns = "SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = ";
        let found = self.execute(&format!("{columns} '{schema}'")).await;
        found.lines().map(str::to_owned).collect()
    }

    /// Executes a statement, and returns what it returns: a line for each row.
    pub async fn execute(&self, statement: &str) -> String {
        let output = self.executed(statement).await;
        assert!(output.status.success(), "{statement}");
        String::from_utf8(output.stdout).unwrap()
    }

    async fn executed(&self, statement: &str) -> Output {
        let mut psql = tokio::process::Command::new("psql");
        psql.args(["--quiet", "--no-psqlrc", "--tuples-only", "--no-align", "--username", "owner", "--dbname"]);
        psql.args(["postgres", "--command", statement]).arg("--host").arg(&self.directory);
        psql.stderr(Stdio::inherit()).output().await.unwrap()
    }

    /// The directory of its socket.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of its socket, as the host of a URL.
    pub fn host(&self) -> String {
        host(&self.directory)
    }
}

/// The processes of a server that has stopped.
pub struct Stopped(Vec<Pid>);

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// A pooler in front of a server, which executes each transaction in any of its sessions.
pub struct Pooler {
    directory: PathBuf,
    /// Ends once its input is closed.
    process: Child,
}

/// The pooler in front of the shared server, if both are installed: see [`shared`].
pub fn shared_pooler() -> Option<&'static Pooler> {
    static POOLER: LazyLock<Option<Pooler>> = LazyLock::new(|| Pooler::before(shared()?));
    POOLER.as_ref()
}

impl Pooler {
    /// Starts a pooler. `None` as in [`shared`].
    pub fn before(server: &Server) -> Option<Self> {
        if !is_installed("PATH=$PATH:/usr/sbin command -v pgbouncer", "pgbouncer") {
            return None;
        }
        let (directory, process) = started(as_user(POOLER).arg(&server.directory));
        Some(Self { directory, process })
    }

    /// The directory of its socket.
    #[allow(dead_code, reason = "only tests in `src` use it")]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A URL of the server behind it, as one that leads through it.
    pub fn url(&self, of_server: &str) -> String {
        through(&self.directory, of_server) + "&pooled=true"
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// The URL of a store, by way of the socket in this directory.
pub fn through(directory: &Path, url: &str) -> String {
    let (user, rest) = url.split_once('@').unwrap();
    let (_, rest) = rest.split_once('/').unwrap();
    format!("{user}@{}/{rest}", host(directory))
}

/// A directory as the host of a URL.
pub fn host(directory: &Path) -> String {
    directory.display().to_string().replace('/', "%2F")
}

/// A script, as another user than root, which is no user for a server.
fn as_user(script: &str) -> Command {
    let mut command = if geteuid().is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--", "sh", "-c"]);
        command
    } else {
        let mut command = Command::new("sh");
        command.arg("-c");
        command
    };
    command.args([script, "sh"]).current_dir("/");
    command
}

/// Runs a script. Returns the directory that it writes.
fn started(command: &mut Command) -> (PathBuf, Child) {
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut directory = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut directory).unwrap();
    assert!(!directory.is_empty(), "it did not start: {command:?}");
    (directory.trim_end().into(), process)
}

/// True if this command finds what is needed. If not, that is reported, or the test fails where it is required.
fn is_installed(find: &str, what: &str) -> bool {
    let is_there = Command::new("sh").args(["-c", find]).output().is_ok_and(|found| found.status.success());
    if !is_there {
        let is_required = env::var("ORCHESTRATOR_TEST_POSTGRES").is_ok_and(|it| it == "required");
        assert!(!is_required, "{what} is not installed");
        eprintln!("*** NOT CHECKED: the store in PostgreSQL: {what} is not installed ***");
    }
    is_there
}
