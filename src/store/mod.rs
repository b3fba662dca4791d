//! Stores of records. They implement one trait, [`Store`] in `ports`, and pass one test suite.

mod backup;
mod chain;
mod contents;
mod copying;
mod counts;
mod entries;
mod excess;
mod frontier;
mod jobs;
mod keys;
mod memory;
mod pages;
mod parts;
mod postgres;
mod pruning;
mod row;
mod seal;
mod sqlite;
#[cfg(test)]
mod suite;
mod term;
mod trouble;
mod walk;

use std::{
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use self::backup::{BackedUp, BackupError, backup, restore};
pub use self::copying::{CopyError, Moved, copy};
pub use self::keys::{
    KeyFileError, LogKeys, NewKeys, checkpoint_of, create_key, keep_published, key_beside, published, signing_key,
};
#[cfg(feature = "simulation")]
pub use self::memory::{Fate, Fates, SimulatedDatabase, Statement};
pub use self::postgres::{Migrated, PostgresUrl, migrate, rename, tables};
pub use self::sqlite::DatabaseFileError;
use bytes::Bytes;

use crate::{
    clock::Clock,
    file,
    ledger::{Checkpoint, Hash, SealKeys, Signer},
    model::{CycleId, Name},
    ports::{AuditEntry, Checks, Record, Store, StoreError, Write},
};

/// The location of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// `memory:`: ends with the process.
    Memory,
    /// `sqlite:PATH`: a SQLite database. A relative path is relative to the working directory.
    Sqlite(PathBuf),
    /// `postgres://USER@HOST:PORT/DATABASE`: a schema in a PostgreSQL database.
    Postgres(Box<PostgresUrl>),
}

impl StoreUrl {
    /// Parses a URL.
    ///
    /// # Errors
    /// It is not the URL of a store; the message contains the valid forms.
    pub fn parse(url: &str) -> Result<Self, String> {
        if url == "memory:" {
            return Ok(Self::Memory);
        }
        if PostgresUrl::is_meant(url) {
            return PostgresUrl::parse(url).map(|url| Self::Postgres(Box::new(url)));
        }
        match url.strip_prefix("sqlite:") {
            // SQLite gives these a special meaning.
            Some(path) if !path.is_empty() && !path.starts_with([':', '?']) && !path.starts_with("file:") => {
                if path.starts_with("//") {
                    Err("write the path right after sqlite:, such as sqlite:/var/lib/orchestrator.db".into())
                } else if path.contains('\0') {
                    Err("a path can't contain a NUL".into())
                } else {
                    Ok(Self::Sqlite(path.into()))
                }
            }
            _ => Err(
                "give sqlite:PATH, such as sqlite:/var/lib/orchestrator.db, postgres://USER@HOST/DATABASE, or memory:"
                    .into(),
            ),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(url) => url.fmt(f),
        }
    }
}

/// Opens a store for reading; [`Store::take_over`] allows writing. Each record and audit event that is read has to pass
/// `checks`, which run on a reading thread. `clock` bounds new epochs from below.
///
/// # Errors
/// Another process has it open, it must not be served, or it can't be opened or read.
pub async fn open(url: &StoreUrl, checks: Checks, clock: Clock) -> Result<Arc<dyn Store>, OpenError> {
    match url {
        StoreUrl::Memory => Ok(Arc::new(memory::MemoryStore::new(clock))),
        StoreUrl::Sqlite(path) => Ok(Arc::new(sqlite::SqliteStore::open(path.clone(), checks, clock).await?)),
        StoreUrl::Postgres(url) => Ok(Arc::new(Box::pin(postgres::PostgresStore::open(url, checks, clock)).await?)),
    }
}

/// Opens a store to look at it: it is only read, no file is written or made, and [`Store::take_over`] takes nothing
/// over, with the epoch of the last process that wrote. It takes no writes. Other processes can look at it as well, and
/// none can serve it meanwhile.
///
/// # Errors
/// A process serves it, or it can't be read without a change.
pub async fn look(url: &StoreUrl, checks: Checks, clock: Clock) -> Result<Arc<dyn Store>, OpenError> {
    match url {
        StoreUrl::Memory => Err(DatabaseFileError::Missing { database: url.to_string() }.into()),
        StoreUrl::Sqlite(path) => Ok(Arc::new(sqlite::SqliteStore::look(path.clone(), checks, clock).await?)),
        StoreUrl::Postgres(url) => Ok(Arc::new(Box::pin(postgres::PostgresStore::look(url, checks, clock)).await?)),
    }
}

/// The error for a write to a store that was not taken over.
fn not_taken_over() -> StoreError {
    StoreError::Defect { problem: "a write came before the store was taken over".into() }
}

/// Why a store was not opened. Each message contains the remedy. `store` is its location, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "{store} is in use by another process{}; stop that process first, or name another store, such as a copy that \
         `orchestrator backup` makes",
        .by.map_or_else(String::new, |pid| format!(" (pid {pid})"))
    )]
    InUse {
        /// The location of the store.
        store: String,
        /// The pid of that process, if known.
        by: Option<u32>,
    },
    /// A later version of this software has created it.
    #[error(
        "{store} has schema version {found}, but this version of the software supports up to {known}; use a newer \
         version"
    )]
    TooNew {
        /// The location of the store.
        store: String,
        /// Its version.
        found: i64,
        /// The latest supported version.
        known: i64,
    },
    /// An earlier version of this software has written it last.
    #[error("{store} has schema version {found}, and no log before version {known}; serve it once")]
    TooOld {
        /// The location of the store.
        store: String,
        /// Its version.
        found: i64,
        /// The latest version.
        known: i64,
    },
    /// An earlier version of this software has written it last, and it is only looked at.
    #[error(
        "{store} has schema version {found}, and can't be read without migrating it to version {known}: look at it \
         with the version of this software that wrote it, or at a copy that this version has served"
    )]
    NotMigrated {
        /// The location of the store.
        store: String,
        /// Its version.
        found: i64,
        /// The latest version.
        known: i64,
    },
    /// Other software has created it.
    #[error("{store} is a database of some other software; name another store")]
    Foreign {
        /// The location of the store.
        store: String,
    },
    /// Other software has added a trigger to it.
    #[error(
        "{store} has the trigger {trigger:?}, which this software has not created: it could change what is written. \
         Find out where it comes from, and drop it"
    )]
    Trigger {
        /// The location of the store.
        store: String,
        /// The name of the trigger.
        trigger: String,
    },
    /// Other software has changed the definition of one of its tables, or of an index of it.
    #[error(
        "{store}: the definition of its table {table}, or an index of that, is not the one of this software: another \
         program has changed it, which could change or drop what is written. Drop what was added, or restore it from a \
         backup"
    )]
    Definition {
        /// The location of the store.
        store: String,
        /// The table.
        table: String,
    },
    /// It lacks more acknowledged cycles than a damaged end explains.
    #[error(
        "{store} ends with cycle {has}, but cycle {noted} was acknowledged: an older copy replaced it. To have it \
         go on, with the numbers after {has} given again, run `orchestrator store accept {url}`"
    )]
    Behind {
        /// The location of the store.
        store: String,
        /// Its URL.
        url: StoreUrl,
        /// Its last cycle.
        has: CycleId,
        /// The last cycle that was acknowledged.
        noted: CycleId,
    },
    /// It is in no file, and only files can be used in this way.
    #[error("{url} is not a store in a file, and this is possible for such only: see docs/operations.md")]
    NoFile {
        /// Its URL.
        url: StoreUrl,
    },
    /// The files of a database are invalid.
    #[error(transparent)]
    Files(#[from] DatabaseFileError),
    /// It can't be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The result of [`accept`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The location of the store, for people.
    pub store: String,
    /// Its earlier path, if it was another one.
    pub earlier: Option<PathBuf>,
    /// Its last cycle.
    pub last_cycle_id: CycleId,
    /// The last acknowledged cycle, as noted.
    pub noted_cycle_id: CycleId,
    /// Number of entries that are missing in its log, as the entry of the new log says.
    pub missing: u64,
}

/// Checks the entries of a log, and makes those by which a store is accepted.
#[derive(Clone, Debug)]
pub struct EntryCodec {
    /// What entries have to pass.
    pub checks: Checks,
    /// The audit event of what the operator does.
    pub event: AuditEntry,
    /// Makes the control entry of a new log, of the checkpoint beside its store, and of the leaves that are missing.
    pub began: fn(String, Vec<Range<u64>>) -> Bytes,
}

/// Accepts a store as it is, although it is a copy, lacks acknowledged cycles, or is not what was signed last: a new
/// log begins, with its control entry. `keys` are those of the log, and `origin` its name, if it is not that of the
/// first key. A process that writes to a store in PostgreSQL is fenced by that. Waits for the disk.
///
/// # Errors
/// It does not exist, another process has its file open, or it or a file can't be read or written.
pub async fn accept(
    url: &StoreUrl,
    keys: LogKeys,
    origin: Option<String>,
    codec: EntryCodec,
    clock: Clock,
) -> Result<Accepted, AcceptError> {
    match url {
        StoreUrl::Memory => Err(OpenError::NoFile { url: url.clone() }.into()),
        StoreUrl::Sqlite(path) => accept_file(path, keys, origin, codec),
        StoreUrl::Postgres(url) => Box::pin(postgres::accept(url, keys, origin, codec, clock)).await,
    }
}

/// Accepts a store in a file.
fn accept_file(
    path: &Path,
    keys: LogKeys,
    origin: Option<String>,
    EntryCodec { checks, event, began }: EntryCodec,
) -> Result<Accepted, AcceptError> {
    let url = &StoreUrl::Sqlite(path.to_owned());
    let LogKeys { keys, new } = keys;
    let signer = Signer::of(origin, keys);
    let previous = published(url);
    let write = |missing| Write {
        audit: vec![event],
        began: Some(began(previous.clone().unwrap_or_default(), missing)),
        ..Write::default()
    };
    let (accepted, log) = sqlite::accept(path, (SealKeys::of(&signer), new), checks, write)?;
    let publish = || {
        previous.map(|previous| keep_published(url, &previous)).transpose()?;
        file::replace(&checkpoint_of(path), &signer.sign(log.size(), log.root()))
    };
    let published = publish();
    published.map_err(|problem| AcceptError::Checkpoint { path: checkpoint_of(path), problem })?;
    Ok(accepted)
}

/// Why a store was not accepted. Each message contains the remedy.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A key can't be created.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The checkpoint can't be written, so the store is refused as before.
    #[error("{} can't be written: {problem}; repeat the command once it can", .path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What the system says.
        problem: io::Error,
    },
}

/// The result of [`compact`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Size of the database before, in bytes.
    pub before: u64,
    /// Its size now.
    pub after: u64,
}

/// Makes a database smaller that no process has open: removes its free pages, which removed records have left. Needs as
/// much room beside it as it has afterwards, twice. Waits for the disk.
///
/// # Errors
/// It does not exist, another process has it open, it must not be served, or it can't be written.
pub fn compact(url: &StoreUrl) -> Result<Compacted, OpenError> {
    match url {
        StoreUrl::Memory | StoreUrl::Postgres(_) => Err(OpenError::NoFile { url: url.clone() }),
        StoreUrl::Sqlite(path) => sqlite::compact(path),
    }
}

/// What is expected of the entries of a log.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Check that the keys of records and audit events are those in their bytes, and say what was removed.
    pub checks: Checks,
    /// The SHA-256 of the output of a subsystem, by the record of its cycle; `None` if the record has none.
    pub output: fn(&Record, &Name) -> Option<[u8; Hash::LEN]>,
}

/// The result of [`verify`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Number of entries of the log.
    pub entries: u64,
    /// The entries before this leaf were removed by retention.
    pub first_kept: u64,
    /// Number of all entries that retention has removed.
    pub removed: u64,
    /// Number of entries that were missing when a new log began.
    pub missing: u64,
    /// Number of records in the log that are there.
    pub records: u64,
    /// Number of audit events that are there.
    pub events: u64,
    /// Number of records that are older than the log.
    pub unlogged: u64,
    /// Number of other rows whose seals are valid; `None` if there was no key to check them.
    pub sealed: Option<u64>,
}

/// Verifies a SQLite database, which a process may have open, against a checkpoint whose signature was verified, and
/// its seals if their keys are given: each thing that is wrong is given to `wrong`. Waits for the disk.
///
/// # Errors
/// It does not exist, or can't be read.
pub fn verify(
    path: &Path,
    checkpoint: &Checkpoint,
    keys: Option<SealKeys>,
    rules: Rules,
    wrong: &mut dyn FnMut(String),
) -> Result<Verified, OpenError> {
    sqlite::verify(path, checkpoint, keys, rules, wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for url in ["memory:", "sqlite:a.db", "sqlite:/var/a.db", "postgres://u@h:1,i:2/d?schema=s"] {
            assert_eq!(StoreUrl::parse(url).unwrap().to_string(), url);
        }
        for url in ["", "memory", "memory:x", "sqlite:", "sqlite:///a.db", "sqlite::memory:", "postgres://h", "a.db"] {
            assert!(StoreUrl::parse(url).is_err(), "{url}");
        }
    }
}
