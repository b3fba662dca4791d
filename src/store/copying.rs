//! Copies a store to another database, row by row, while no process serves either of them.
//!
//! The rows are the same in all databases, and so are their bytes, hashes and seals. A mark in each of the two says how
//! far the copy is: the target has one from the first row on until everything was compared, and the source gets one
//! then. So at any time at most one of them can be served.

use std::path::PathBuf;

use tokio::runtime::Handle;

use self::Kind::{AnyText, Bytes, Flag, Number, Text};
use super::{
    OpenError, StoreUrl,
    counts::Counts,
    keys::key_file_beside,
    postgres,
    row::{Row, Value, Wrong},
    seal::META,
    sqlite,
};
use crate::{clock::Clock, ledger::Hash, model::CycleId, ports::StoreError};

/// Most rows that are written at once, and bytes of their values after which no further ones are added.
const MOST_ROWS: usize = 1000;
const MOST_BYTES: usize = 1 << 20;

/// What the values of a column are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Number,
    /// A truth value, which is a number in SQLite.
    Flag,
    Text,
    /// A text with any characters, which is bytes in PostgreSQL.
    AnyText,
    Bytes,
}

/// A table whose rows are copied.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) name: &'static str,
    /// The first one is the primary key.
    pub(super) columns: &'static [(&'static str, Kind)],
}

/// All tables with the same rows in every database. What else a database has says where it is, and stays there.
pub(super) const TABLES: [Table; 8] = [
    Table {
        name: "cycles",
        columns: &[
            ("revision", Number),
            ("cycle_id", Number),
            ("epoch", Number),
            ("state", Number),
            ("trigger", Number),
            ("loop", Text),
            ("request_id", AnyText),
            ("triggered_by", Text),
            ("finished_at", Number),
            ("leaf", Number),
            ("record", Bytes),
        ],
    },
    Table {
        name: "open_cycles",
        columns: &[
            ("cycle_id", Number),
            ("trigger", Number),
            ("loop", Text),
            ("scheduled_at", Number),
            ("started_at", Number),
            ("request_id", AnyText),
            ("triggered_by", Text),
            ("trace_id", Bytes),
            ("request", Bytes),
            ("audit", Bytes),
            ("seal", Bytes),
        ],
    },
    Table { name: "outputs", columns: &[("name", Text), ("cycle_id", Number), ("payload", Bytes), ("seal", Bytes)] },
    Table {
        name: "subsystems",
        columns: &[
            ("name", Text),
            ("spec", Text),
            ("lease_ms", Number),
            ("suspended", Flag),
            ("owner", Text),
            ("former_names", Text),
            ("seal", Bytes),
        ],
    },
    Table { name: "loops", columns: &[("name", Text), ("spec", Text), ("state", Text), ("seal", Bytes)] },
    Table { name: "hashes", columns: &[("id", Number), ("hash", Bytes)] },
    Table { name: "control", columns: &[("leaf", Number), ("entry", Bytes)] },
    Table {
        name: "audit",
        columns: &[
            ("leaf", Number),
            ("kind", Number),
            ("time", Number),
            ("caller", Text),
            ("rpc", Text),
            ("denied", Flag),
            ("event", Bytes),
        ],
    },
];

/// A value that is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Copied {
    Null,
    Number(i64),
    Text(String),
    Bytes(Vec<u8>),
}

impl Copied {
    fn of(row: &dyn Row, column: &str, kind: Kind) -> Result<Self, Wrong> {
        let text = |bytes: &[u8]| {
            let text = String::from_utf8(bytes.to_vec());
            text.map(Self::Text).map_err(|error| Wrong::new(column, format!("is no text: {error}")))
        };
        match (kind, row.value(column)?) {
            (_, Value::Null) => Ok(Self::Null),
            (Number | Flag, Value::Integer(number)) => Ok(Self::Number(number)),
            (Text | AnyText, Value::Text(bytes)) => text(bytes),
            (Bytes, Value::Blob(bytes)) => Ok(Self::Bytes(bytes.to_vec())),
            (Number | Flag, other) => Err(Wrong::kind(column, other, "a number")),
            (Text | AnyText, other) => Err(Wrong::kind(column, other, "a text")),
            (Bytes, other) => Err(Wrong::kind(column, other, "bytes")),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Null | Self::Number(_) => &[],
            Self::Text(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }

    /// Adds it, so that no other values give the same bytes.
    fn add_to(&self, bytes: &mut Vec<u8>) {
        let (kind, number) = match self {
            Self::Null => (0, 0),
            Self::Number(number) => (1, *number),
            Self::Text(_) => (2, 0),
            Self::Bytes(_) => (3, 0),
        };
        bytes.push(kind);
        bytes.extend(number.to_be_bytes());
        bytes.extend((self.bytes().len() as u64).to_be_bytes());
        bytes.extend(self.bytes());
    }
}

/// The values of a row, in the order of the columns of its table.
pub(super) type Values = Vec<Copied>;

/// The row of the table `meta`, as far as it does not say which database that is: all that is sealed, and the seal.
pub(super) fn meta_columns() -> Vec<(&'static str, Kind)> {
    let kind = |column| (column, if column == "is_closed" { Flag } else { Number });
    META.into_iter().chain(Counts::COLUMNS).map(kind).chain([("log_size", Number), ("seal", Bytes)]).collect()
}

/// Why a database is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotServed {
    /// It was copied to the store at this URL, which goes on in its place.
    MovedTo(String),
    /// It is an unfinished copy of the store at this URL.
    UnfinishedCopyOf(String),
    /// An older copy has replaced it, which lacks acknowledged commits: the text says of which it is known.
    Lacks(String),
}

impl NotServed {
    const UNFINISHED: &str = "unfinished:";
    const LACKS: &str = "lacks:";

    /// The mark with this text.
    pub(super) fn parse(text: &str) -> Self {
        if let Some(url) = text.strip_prefix(Self::UNFINISHED) {
            return Self::UnfinishedCopyOf(url.to_owned());
        }
        text.strip_prefix(Self::LACKS)
            .map_or_else(|| Self::MovedTo(text.to_owned()), |problem| Self::Lacks(problem.to_owned()))
    }

    /// True if it can be served once it is accepted.
    pub(super) fn is_acceptable(&self) -> bool {
        matches!(self, Self::MovedTo(_) | Self::Lacks(_))
    }

    /// As it is stored.
    pub(super) fn text(&self) -> String {
        match self {
            Self::MovedTo(url) => url.clone(),
            Self::UnfinishedCopyOf(url) => format!("{}{url}", Self::UNFINISHED),
            Self::Lacks(problem) => format!("{}{problem}", Self::LACKS),
        }
    }

    /// The error for a database with this mark, which is at this URL.
    pub(super) fn refusal(&self, url: String) -> StoreError {
        let problem = match self {
            Self::MovedTo(to) => format!(
                "it was copied to {to}, which goes on in its place: set store.url to that. To have this one go on \
                 instead, see that no process serves that one any more, and run `orchestrator store accept {url}` \
                 (with --key-file for each of ledger.key_files)"
            ),
            Self::UnfinishedCopyOf(from) => format!(
                "it is an unfinished copy of {from}, which may still be served; to copy that again, remove this one \
                 first"
            ),
            Self::Lacks(problem) => format!(
                "{problem}. If another server has all of them, set store.url to that. To have this one go on without \
                 them, with a new log, run `orchestrator store accept {url}` (with --key-file for each of \
                 ledger.key_files)"
            ),
        };
        StoreError::NotServed { store: url, problem }
    }
}

/// What the row of the table `meta` says about whether a database can be copied, or copied to.
pub(super) struct Standing {
    pub(super) not_served: Option<NotServed>,
    /// The last process wrote everything that it had to, and all of that is there.
    pub(super) is_closed: bool,
    pub(super) is_empty: bool,
}

/// Takes the rows of a table, one by one, in the order of their primary keys.
pub(super) type Each<'r> = &'r mut dyn FnMut(&dyn Row) -> Result<(), CopyError>;

/// A database that no process serves while it is copied, or copied to. All of it waits for the disk or the network.
pub(super) trait Database {
    /// Its URL, by which it is found from everywhere on this machine.
    fn url(&self) -> String;
    fn standing(&mut self) -> Result<Standing, CopyError>;
    /// Marks it, or takes its mark away. Earlier writes are on the disk then.
    fn mark(&mut self, not_served: Option<&NotServed>) -> Result<(), CopyError>;
    fn rows(&mut self, table: &Table, each: Each<'_>) -> Result<(), CopyError>;
    fn put(&mut self, table: &Table, rows: &[Values]) -> Result<(), CopyError>;
    /// Gives the row of the table `meta`, with [`meta_columns`].
    fn meta(&mut self, read: Each<'_>) -> Result<(), CopyError>;
    /// The id that a copy shares.
    fn store_id(&mut self) -> Result<[u8; 16], CopyError>;
    fn put_meta(&mut self, values: &Values, id: [u8; 16]) -> Result<(), CopyError>;
    /// The newest checkpoint of the log, if there is one.
    fn checkpoint(&mut self) -> Result<Option<String>, CopyError>;
    fn put_checkpoint(&mut self, checkpoint: Option<&str>) -> Result<(), CopyError>;
}

/// The result of [`copy`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The URL of the source, without a password.
    pub from: String,
    /// The URL of the target, without a password.
    pub to: String,
    /// Number of records.
    pub records: u64,
    /// Number of audit events.
    pub events: u64,
    /// The last cycle.
    pub last_cycle_id: CycleId,
    /// The key of the log beside the source, which stays there.
    pub key_file: Option<PathBuf>,
}

/// Why a store was not copied. Each message contains the remedy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It can't be opened, or be read or written.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It ends with the process.
    #[error("memory: ends with its process, and can't be copied")]
    Memory,
    /// The last process that served it did not write everything, or still runs.
    #[error(
        "{store} was not closed: a process serves it, or was killed. Stop that process; if there is none, start one \
         and stop it, so that the store has everything"
    )]
    NotClosed {
        /// The URL of the store.
        store: String,
    },
    /// Nothing was written to it.
    #[error("{store} is empty, so there is nothing to copy; see whether this is the store that is meant")]
    Empty {
        /// The URL of the store.
        store: String,
    },
    /// The target has something in it.
    #[error("{store} is not empty; name a new store")]
    NotEmpty {
        /// The URL of the store.
        store: String,
    },
    /// The copy is not what was copied.
    #[error(
        "{store} has other rows in its table {table} than {source_store}: another program has changed one of them. \
         Remove it, and copy again"
    )]
    Differs {
        /// The URL of the copy.
        store: String,
        /// The URL of the source.
        source_store: String,
        /// The table.
        table: String,
    },
}

impl From<StoreError> for CopyError {
    fn from(error: StoreError) -> Self {
        OpenError::from(error).into()
    }
}

/// Copies a store to an empty one, compares both, and marks the source, which is not served any more. Neither may be
/// served meanwhile. If the copy ends before that mark, the target is refused, and the source can be served. If only
/// the mark of the target is left, a repetition compares both again, and takes it away.
///
/// # Errors
/// A store can't be used, the source was not closed, or the target is not empty.
pub async fn copy(from: &StoreUrl, to: &StoreUrl, clock: Clock) -> Result<Moved, CopyError> {
    let (from, to, runtime) = (from.clone(), to.clone(), Handle::current());
    let copied = tokio::task::spawn_blocking(move || {
        let mut source = open(&from, Side::Source, clock, &runtime)?;
        check(&source.url(), &source.standing()?)?;
        let mut target = open(&to, Side::Target, clock, &runtime)?;
        Ok(Moved { key_file: key_file_beside(&from), ..copy_all(&mut *source, &mut *target)? })
    });
    copied.await.map_err(|error| StoreError::Defect { problem: error.to_string() })?
}

/// Whether a database is copied, or copied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Target,
}

fn open(url: &StoreUrl, side: Side, clock: Clock, runtime: &Handle) -> Result<Box<dyn Database>, CopyError> {
    match url {
        StoreUrl::Memory => Err(CopyError::Memory),
        StoreUrl::Sqlite(path) => Ok(Box::new(sqlite::Copying::open(path, side)?)),
        StoreUrl::Postgres(url) => Ok(Box::new(postgres::Copying::open(url, side, clock, runtime.clone())?)),
    }
}

/// Checks that the source can be copied.
fn check(store: &str, standing: &Standing) -> Result<(), CopyError> {
    let store = store.to_owned();
    match standing {
        Standing { is_empty: true, .. } => Err(CopyError::Empty { store }),
        Standing { is_closed: false, .. } => Err(CopyError::NotClosed { store }),
        // It may be that of an earlier attempt, at whose end only the other one was left.
        _ => Ok(()),
    }
}

fn copy_all(source: &mut dyn Database, target: &mut dyn Database) -> Result<Moved, CopyError> {
    let (from, to) = (source.url(), target.url());
    let (moved, unfinished) = (NotServed::MovedTo(to.clone()), NotServed::UnfinishedCopyOf(from.clone()));
    match (source.standing()?.not_served, target.standing()?) {
        (Some(mark), Standing { not_served: Some(of_target), .. }) if mark == moved && of_target == unfinished => {}
        (Some(mark), _) => return Err(mark.refusal(from).into()),
        (_, Standing { not_served: Some(mark), .. }) => return Err(mark.refusal(to).into()),
        (_, Standing { is_empty: false, .. }) => return Err(CopyError::NotEmpty { store: to }),
        (None, _) => {
            target.mark(Some(&unfinished))?;
            for table in &TABLES {
                copy_table(source, target, table)?;
            }
            let meta = meta_of(source)?;
            target.put_meta(&meta, source.store_id()?)?;
            target.put_checkpoint(source.checkpoint()?.as_deref())?;
        }
    }
    let (mut records, mut events) = (0, 0);
    let differs =
        |table: &str| CopyError::Differs { store: to.clone(), source_store: from.clone(), table: table.into() };
    for table in &TABLES {
        let (number, digest) = digest(source, table)?;
        if self::digest(target, table)? != (number, digest) {
            return Err(differs(table.name));
        }
        match table.name {
            "cycles" => records = number,
            "audit" => events = number,
            _ => {}
        }
    }
    let meta = meta_of(source)?;
    if meta != meta_of(target)? || source.store_id()? != target.store_id()? {
        return Err(differs("meta"));
    }
    let last = meta_columns().iter().zip(&meta).find_map(|((column, _), value)| match value {
        Copied::Number(number) if *column == "last_cycle_id" => u64::try_from(*number).ok(),
        _ => None,
    });
    source.mark(Some(&moved))?;
    target.mark(None)?;
    Ok(Moved { from, to, records, events, last_cycle_id: CycleId(last.unwrap_or_default()), key_file: None })
}

/// Copies the rows of a table.
fn copy_table(source: &mut dyn Database, target: &mut dyn Database, table: &Table) -> Result<(), CopyError> {
    let store = source.url();
    let (mut rows, mut bytes) = (Vec::new(), 0);
    source.rows(table, &mut |row| {
        let values = values(&store, table.name, table.columns, row)?;
        bytes += values.iter().map(|value| value.bytes().len()).sum::<usize>();
        rows.push(values);
        if rows.len() >= MOST_ROWS || bytes >= MOST_BYTES {
            target.put(table, &rows)?;
            (rows, bytes) = (Vec::new(), 0);
        }
        Ok(())
    })?;
    if rows.is_empty() { Ok(()) } else { target.put(table, &rows) }
}

/// The number of rows of a table, and a digest of all their values in the order of their primary keys.
fn digest(database: &mut dyn Database, table: &Table) -> Result<(u64, Hash), CopyError> {
    let store = database.url();
    let (mut number, mut digest, mut bytes) = (0, Hash::of_bytes(&[]), Vec::new());
    database.rows(table, &mut |row| {
        bytes.clear();
        bytes.extend(digest.0);
        for value in values(&store, table.name, table.columns, row)? {
            value.add_to(&mut bytes);
        }
        (number, digest) = (number + 1, Hash::of_bytes(&bytes));
        Ok(())
    })?;
    Ok((number, digest))
}

/// The row of the table `meta`.
fn meta_of(database: &mut dyn Database) -> Result<Values, CopyError> {
    let (store, mut meta) = (database.url(), Values::new());
    database.meta(&mut |row| {
        meta = values(&store, "meta", &meta_columns(), row)?;
        Ok(())
    })?;
    Ok(meta)
}

/// The values of these columns of a row.
fn values(store: &str, table: &str, columns: &[(&str, Kind)], row: &dyn Row) -> Result<Values, CopyError> {
    let values = columns.iter().map(|(column, kind)| Copied::of(row, column, *kind)).collect::<Result<_, _>>();
    let damaged = |wrong| {
        let problem = format!("a row of its table {table} can't be copied: {wrong}");
        StoreError::Corrupt { store: store.to_owned(), problem }.into()
    };
    values.map_err(damaged)
}

#[cfg(test)]
mod tests;
