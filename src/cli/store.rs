//! `orchestrator store`: work on a store that no process has open.

use std::{error::Error, ops::Range, path::PathBuf};

use bytes::Bytes;
use clap::Subcommand;

use super::{
    Exit, Failure,
    output::{clean, count, grouped, print},
};
use crate::{
    config,
    host::Host,
    ledger::{LogBegan, LogBeganReason},
    model::Cause,
    record,
    store::{self, Accepted, Compacted, EntryCodec, KeyFileError, LogKeys, Migrated, Moved, PostgresUrl, StoreUrl},
};

/// Work on a store that no process has open
#[derive(Debug, clap::Args)]
pub(super) struct Store {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Accept(Accept),
    Compact(Compact),
    Copy(Copy),
    Key(Key),
    Migrate(Migrate),
    Rename(Rename),
}

/// Make the file of a store smaller, after records were removed
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Retention and `orchestrator cycles prune` leave the file as large as it was, and new records use its free pages. This \
command removes them: it writes the database anew, which takes up to half a minute for 500 MB that are left, and twice \
as much room on the disk. No service may have the store open, since none of its commits could be made meanwhile. The \
history and its log stay as they are.

Exit codes:
  0    it is compact
  1    the database does not exist, a process has it open, or it can't be used
  2    wrong usage

Examples:
  orchestrator store compact
  orchestrator store compact sqlite:/var/lib/orchestrator/orchestrator.db")]
struct Compact {
    /// The store, as in store.url
    #[arg(value_name = "URL", value_parser = StoreUrl::parse, default_value = "sqlite:orchestrator.db")]
    url: StoreUrl,
}

/// Move a store to another database: from SQLite to PostgreSQL, or back
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Copies everything, byte for byte: the history with its log and its newest checkpoint, registrations, loops, latest \
outputs, and waiting cycles. Then it reads both stores and compares digests of all rows. From then on, the target is \
the store, and the source is refused, with a message that names the target. Watchers resume, and earlier checkpoints \
and pins stay valid, since the log is the same.

Stop the service first. The source must have been closed: a store whose process was killed is served once more before, \
and stopped. The target must be new or empty. A copy that is interrupted leaves a target that is refused, and a source \
that is served as before: remove the target, and copy again. If the source is refused already, repeat the command.

The keys of the log are in files, which stay where they are: see what the command prints. In PostgreSQL, the user in \
the URL becomes the owner of the tables: if the service has another one, run `orchestrator store migrate --grant-to \
USER` with the same URL afterwards.

Exit codes:
  0    the target is the store now
  1    a store can't be used, is served, or was not closed, the target is not
       empty, or the copy differs
  2    wrong usage

Examples:
  orchestrator store copy --from sqlite:/var/lib/orchestrator/orchestrator.db \\
    --to postgres://owner@db1.example,db2.example/fleet
  orchestrator store copy --from postgres://owner@localhost/fleet \\
    --to sqlite:orchestrator.db")]
struct Copy {
    /// The source, as in store.url
    #[arg(long, value_name = "URL", value_parser = StoreUrl::parse)]
    from: StoreUrl,
    /// The target
    #[arg(long, value_name = "URL", value_parser = StoreUrl::parse)]
    to: StoreUrl,
}

/// Make a key of the log, for a store that does not exist yet
#[derive(Debug, clap::Args)]
#[command(after_help = "\
All replicas over a store in PostgreSQL need the same key: make it once, copy the file to each machine, and name it in \
ledger.key_files. Only the user of the service may be able to read it. It is in no backup of the database, so keep a \
copy elsewhere.

The command prints the public key, by which others verify the history: `orchestrator verify --key`.

Exit codes:
  0    it is made
  1    the file exists, or can't be created
  2    wrong usage

Examples:
  orchestrator store key /var/lib/orchestrator/log.key")]
struct Key {
    /// The new file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Make the tables of a store in PostgreSQL, or bring them up to date
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The user in the URL becomes the owner of the tables; with --print, the user who executes the statements. The user of \
the service needs fewer rights: USAGE of the schema, and SELECT, INSERT, UPDATE and DELETE of all its tables. \
--grant-to gives them to that user: give it each time, since a migration can add tables. A service whose user is not \
the owner can't migrate: run this command before you replace it by a newer version.

Several processes can migrate at once: one does it, and the others wait. A store of a later version of this software \
stays as it is, and so do tables of other software.

URL: postgres://USER@HOST:PORT,HOST:PORT/DATABASE?PARAMETER=VALUE&PARAMETER=VALUE. The first host that takes writes is \
used. Parameters:
  password_file    the file with the password, which nobody else may read; a
                   password in the URL can be seen by others on this machine
  pooled           true if a pooler such as pgbouncer is in between, which
                   executes each transaction in any session; false
  schema           the schema of the tables; orchestrator
  sslcert, sslkey  the files with a certificate of the user and with its
                   private key, which nobody else may read; none
  sslmode          verify-full, or disable; verify-full unless all hosts are on
                   this machine
  sslrootcert      the file with the certificate of the authority of the
                   servers; those that the system trusts
  dbname, host, port, user    as elsewhere; host=/DIRECTORY is a socket
A host without a port has 5432. The connection is encrypted unless sslmode is disable, which it is where all hosts are \
on this machine and there is no sslrootcert.

Exit codes:
  0    the tables are up to date
  1    no server can be used, or the user may not do it
  2    wrong usage

Examples:
  orchestrator store migrate --grant-to service \\
    'postgres://owner@db1.example:5433,db2.example/fleet?sslrootcert=ca.pem'
  orchestrator store migrate 'postgres:///fleet?host=/var/run/postgresql'
  orchestrator store migrate --print --grant-to service postgres://db1/fleet \\
    | psql --set ON_ERROR_STOP=1 --dbname fleet")]
struct Migrate {
    /// The store
    #[arg(value_name = "URL", value_parser = PostgresUrl::parse)]
    url: PostgresUrl,
    /// Give this user of the database the rights that the service needs
    #[arg(long, value_name = "USER", value_parser = user)]
    grant_to: Option<String>,
    /// Print the statements that make the tables of a new store, for an administrator, and connect to no server
    #[arg(long)]
    print: bool,
}

/// Rename the orchestrator of a store in PostgreSQL
#[derive(Debug, clap::Args)]
#[command(after_help = "\
All replicas over a store in PostgreSQL have one orchestrator_id: one with another id does not start, since it may be \
that of another orchestrator, by mistake. This command changes the id. Then change orchestrator_id in the \
configuration of each replica, and restart one after the other, the leader last: until then, replicas with the earlier \
id only follow, and the leader goes on.

For subsystems, and for orchestrators that this one calls, the one with the new id is another orchestrator: retries of \
its cycles don't find those of the earlier id.

Exit codes:
  0    the orchestrator has this id
  1    the store does not exist, or can't be used
  2    wrong usage

Examples:
  orchestrator store rename postgres://service@db1.example,db2.example/fleet eu")]
struct Rename {
    /// The store
    #[arg(value_name = "URL", value_parser = PostgresUrl::parse)]
    url: PostgresUrl,
    /// The new orchestrator_id: 1 to 128 letters, digits and signs, without spaces
    #[arg(value_name = "ID", value_parser = config::orchestrator_id)]
    id: String,
}

/// Accept a store as it is, although it is a copy, or not what was signed last
#[derive(Debug, clap::Args)]
#[command(after_help = "\
`orchestrator serve` refuses a database that is a copy of another one, because a copy takes over the fleet: its epoch \
is higher, and subsystems then refuse calls of the original. It also refuses a database that lacks many acknowledged \
cycles, one that another program has changed, and, with access.mode = \"enforce\" or in PostgreSQL, one that is not \
what was signed last: its key or its checkpoint is missing, or an older copy has replaced it. In PostgreSQL, an older \
copy of the whole database is complete in itself, and only replicas that run meanwhile know what it lacks: after a \
restore, run this command before any replica starts, so that the log tells of it. This command accepts the database \
once, with everything that is in it. First make sure that no process serves the original any more.

A new log begins, which goes on from the entries that are there: an entry says so, and contains the earlier \
checkpoint, which SQLite also keeps in a file with the suffix .checkpoint.lost. A pin (`orchestrator checkpoint \
--pin`) of what is there stays valid; one of what is lost does not. A key that is missing is created.

If ledger.key_files is set, as it is for PostgreSQL, give the same files as --key-file, and ledger.origin as --origin. \
Stop all replicas before: one that knows of acknowledged records which are lost does not lead before it is restarted.

To look at a copy, see `orchestrator serve --read-only`.

Exit codes:
  0    it may be served
  1    the database does not exist, a process has it open, or it can't be used
  2    wrong usage

Examples:
  orchestrator store accept sqlite:/var/lib/orchestrator/orchestrator.db
  orchestrator store accept postgres://service@db1.example,db2.example/fleet \\
    --key-file /var/lib/orchestrator/log.key")]
struct Accept {
    /// The store, as in store.url
    #[arg(value_name = "URL", value_parser = StoreUrl::parse)]
    url: StoreUrl,
    #[command(flatten)]
    log: LogArgs,
}

/// The settings of the log of a store, as `orchestrator serve` gets them.
#[derive(Debug, clap::Args)]
pub(super) struct LogArgs {
    /// A key of the log, as in ledger.key_files; repeat it for several keys
    #[arg(long, value_name = "FILE")]
    key_file: Vec<PathBuf>,
    /// The name of the log, if ledger.origin is set
    #[arg(long, value_name = "NAME")]
    pub(super) origin: Option<String>,
}

impl LogArgs {
    /// Reads the keys of the log of this store, or makes a new one.
    ///
    /// # Errors
    /// A file can't be used.
    pub(super) fn keys(&self, url: &StoreUrl) -> Result<LogKeys, KeyFileError> {
        LogKeys::read(url, &self.key_file, &self.origin.clone().unwrap_or_else(new_name))
    }
}

/// A name for a new log, which no other one has.
fn new_name() -> String {
    format!("orchestrator/{:032x}", Host::system().random.id128())
}

/// Parses the name of a user of a database, which the server would cut beyond this length.
fn user(text: &str) -> Result<String, String> {
    let fits = (1..=63).contains(&text.len()) && !text.chars().any(char::is_control);
    if fits { Ok(text.to_owned()) } else { Err("give a name of 1 to 63 bytes, without control characters".into()) }
}

impl Store {
    /// Runs the subcommand.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let refused = |error: &dyn Error| Failure::new(Exit::Refused, clean(&error.to_string()));
        let Accept { url, log } = match self.command {
            Command::Accept(accept) => accept,
            Command::Key(Key { file }) => {
                let made = store::create_key(&file, &new_name()).map_err(|error| refused(&error))?;
                print(&format!("{}\n", made.verifying()))?;
                return Ok(Exit::Done);
            }
            Command::Migrate(Migrate { url, grant_to, print: true }) => {
                print(&store::tables(&url, grant_to.as_deref()))?;
                return Ok(Exit::Done);
            }
            Command::Migrate(Migrate { url, grant_to, print: false }) => {
                let migrated = store::migrate(&url, grant_to.as_deref(), Host::system().clock).await;
                let migrated = migrated.map_err(|error| refused(&error))?;
                let rights = grant_to.map(|user| format!("; {user} has the rights of a service")).unwrap_or_default();
                print(&(clean(&format!("{}{rights}", brought(&url, migrated))) + "\n"))?;
                return Ok(Exit::Done);
            }
            Command::Rename(Rename { url, id }) => {
                let renamed = store::rename(&url, &id, record::CHECKS, Host::system().clock).await;
                let earlier = renamed.map_err(|error| refused(&error))?;
                let earlier = earlier.map_or_else(|| "it had none".to_owned(), |earlier| format!("it was {earlier}"));
                print(&(clean(&format!("{url} is the store of the orchestrator {id} now; {earlier}")) + "\n"))?;
                return Ok(Exit::Done);
            }
            Command::Copy(Copy { from, to }) => {
                let moved = store::copy(&from, &to, Host::system().clock).await.map_err(|error| refused(&error))?;
                print(&moved_to(&moved))?;
                return Ok(Exit::Done);
            }
            Command::Compact(Compact { url }) => {
                let Compacted { before, after } = store::compact(&url).map_err(|error| refused(&error))?;
                let (before, after) = (grouped(before), grouped(after));
                print(&(clean(&format!("{url} has {after} bytes now; it had {before}")) + "\n"))?;
                return Ok(Exit::Done);
            }
        };
        let keys = log.keys(&url).map_err(|error| refused(&error))?;
        let accepted = store::accept(&url, keys, log.origin, entries("store accept"), Host::system().clock)
            .await
            .map_err(|error| refused(&error))?;
        print(&told(&accepted))?;
        if matches!(url, StoreUrl::Postgres(_)) {
            print("restart the replicas that know of records which it lacks: their logs say so\n")?;
        }
        Ok(Exit::Done)
    }
}

/// The message about migrated tables.
fn brought(url: &PostgresUrl, Migrated { from, to }: Migrated) -> String {
    match from {
        0 => format!("{url} has the tables of a new store, in version {to}"),
        from if from == to => format!("{url} has version {to} already"),
        from => format!("{url} has version {to} now; it had version {from}"),
    }
}

/// The message about a store that was copied.
fn moved_to(Moved { from, to, records, events, last_cycle_id, key_file }: &Moved) -> String {
    let (records, events) = (count(*records, "record"), count(*events, "audit event"));
    let key = match key_file {
        Some(file) => format!("the key of its log stays in {}: name that file in ledger.key_files", file.display()),
        None => "the keys of its log stay where they are: name the same files in ledger.key_files".into(),
    };
    let lines = [
        format!("{to} is the store now, up to cycle {last_cycle_id}: {records} and {events}"),
        key,
        format!("{from} is refused from now on"),
    ];
    lines.iter().map(|line| clean(line) + "\n").collect()
}

/// The entries of a log that begins when an operator accepts a store, by the command with this name.
pub(super) fn entries(command: &'static str) -> EntryCodec {
    let event = record::encode_event(&Cause::of_service(command).event(Host::system().clock.now()));
    EntryCodec { checks: record::CHECKS, event, began }
}

fn began(previous: String, missing: Vec<Range<u64>>) -> Bytes {
    record::encode_began(&LogBegan { reason: LogBeganReason::Accepted, previous, missing })
}

/// The message about an accepted store.
pub(super) fn told(accepted: &Accepted) -> String {
    let Accepted { store, earlier, last_cycle_id, noted_cycle_id, missing } = accepted;
    let mut lines = vec![format!("{store} can be served now; its last cycle is {last_cycle_id}")];
    lines.extend(
        earlier.iter().map(|earlier| format!("it is a copy of {}, which must no longer be served", earlier.display())),
    );
    if noted_cycle_id > last_cycle_id {
        let first = last_cycle_id.next();
        lines.push(if first == *noted_cycle_id {
            format!("cycle {first} is lost; its id is given again")
        } else {
            format!("cycles {first} to {noted_cycle_id} are lost; their ids are given again")
        });
    }
    if *missing > 0 {
        lines.push(format!("its log has {} less than it should, and the new log says so", count(*missing, "entry")));
    }
    // A path can contain any characters.
    lines.iter().map(|line| clean(line) + "\n").collect()
}
