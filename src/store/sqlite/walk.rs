//! Goes through the entries of the log in its order, by what the entries themselves say, and finds those that are
//! missing.

use std::array;

use jiff::Timestamp;
use rusqlite::{CachedStatement, Row, Rows, Transaction};

use super::{
    counts::Counts,
    log::{self, Said},
    rows::{COLUMNS, CONTROL_ENTRY, HAS_REVISION, MAX_RECORD, Reading, event, integer, leaf, number, read},
};
use crate::{
    ledger::{Entry, Leaves, LogBegan, Proven},
    model::{CycleId, CycleState, EventKind, Revision},
    ports::{Checks, Log, Unreadable, UnreadableEvent},
};

/// The tables that have the entries of the log, in the order of their numbers here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Records,
    Events,
    Controls,
}

impl Table {
    const ALL: [Self; 3] = [Self::Records, Self::Events, Self::Controls];

    /// Those of its rows that have a place from one on, in the order of their places, with this as the first column.
    fn query<'t>(self, transaction: &'t Transaction<'_>) -> rusqlite::Result<CachedStatement<'t>> {
        match self {
            Self::Records => transaction.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} AND revision >= ?1 ORDER BY revision"
            )),
            Self::Events => transaction.prepare_cached("SELECT * FROM audit WHERE leaf >= ?1 ORDER BY leaf"),
            Self::Controls => transaction.prepare_cached(&format!(
                "SELECT leaf, {CONTROL_ENTRY} AS entry FROM control WHERE leaf >= ?1 ORDER BY leaf"
            )),
        }
    }
}

/// How far a walk has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    /// All leaves before this one were passed.
    leaf: u64,
    /// The rows before these places of the tables were passed.
    rows: [u64; Table::ALL.len()],
}

/// What a walk comes to.
pub(super) enum Step {
    /// An entry of the log, or a record that is older than the log.
    Entry(Passed),
    /// This number of entries is missing before the next one, the first of them at this leaf: no entry says that
    /// retention has removed them, or that a new log began without them.
    Missing { leaf: u64, number: u64 },
    /// A row that is not what was written, with its number of bytes. `is_older` if it is older than the log: others
    /// have a leaf, which is missing then.
    Damaged { problem: String, bytes: usize, is_older: bool },
}

/// An entry that is what was written.
pub(super) struct Passed {
    /// Its revision, or its leaf if it is not a record.
    pub(super) place: u64,
    /// `None` if it is older than the log.
    pub(super) leaf: Option<u64>,
    pub(super) is: Is,
    /// Its number of bytes.
    pub(super) bytes: usize,
}

/// What an entry is, as far as the walk is about its table.
#[derive(Clone, Copy)]
pub(super) enum Is {
    Record(CycleState, Timestamp),
    Event(EventKind, Timestamp),
    Other,
}

/// The log whose entries are passed.
pub(super) struct Source<'s> {
    pub(super) transaction: &'s Transaction<'s>,
    pub(super) checks: Checks,
    pub(super) log: &'s Log,
    /// The leaves that retention has removed.
    pub(super) removed: &'s Leaves,
    /// The leaves that were missing when the entries were counted anew.
    pub(super) accepted: &'s Leaves,
    /// The highest revision of the records that are older than the log.
    pub(super) unlogged_to: Revision,
    pub(super) proven: Proven,
}

/// The statements of one walk.
pub(super) struct Statements<'t>([CachedStatement<'t>; Table::ALL.len()]);

impl<'t> Statements<'t> {
    pub(super) fn of(transaction: &'t Transaction<'_>) -> rusqlite::Result<Self> {
        let [records, events, controls] = Table::ALL.map(|table| table.query(transaction));
        Ok(Self([records?, events?, controls?]))
    }
}

/// One walk. It reads the next entry of each table ahead, to go on with that of the lowest leaf.
pub(super) struct Walk<'w, 's> {
    source: &'w mut Source<'s>,
    /// The table that it is about: of the entries of the others, it only sees that they are there.
    about: Table,
    place: Place,
    rows: [Rows<'w>; Table::ALL.len()],
    /// The next entry of each table, once it was read.
    next: [Option<Passed>; Table::ALL.len()],
}

impl<'w, 's> Walk<'w, 's> {
    pub(super) fn new(
        source: &'w mut Source<'s>,
        Statements([records, events, controls]): &'w mut Statements<'_>,
        about: Table,
        place: Place,
    ) -> rusqlite::Result<Self> {
        let from = place.rows.map(|row| [integer(row)]);
        let rows = [records.query(from[0])?, events.query(from[1])?, controls.query(from[2])?];
        Ok(Self { source, about, place, rows, next: array::from_fn(|_| None) })
    }

    /// Where a later walk goes on.
    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// The next step; `None` at the end.
    pub(super) fn step(&mut self) -> rusqlite::Result<Option<Step>> {
        for table in Table::ALL {
            let index = table as usize;
            while self.next[index].is_none()
                && let Some(row) = self.rows[index].next()?
            {
                let place = number(row, 0)?;
                match self.source.examine(table, row, place, self.about)? {
                    Ok(passed) => self.next[index] = Some(passed),
                    Err(problem) => {
                        self.place.rows[index] = place + 1;
                        let is_older = table == Table::Records && place <= self.source.unlogged_to.0;
                        return Ok(Some(Step::Damaged { problem, bytes: bytes_of(row), is_older }));
                    }
                }
            }
        }
        let leaves = self.next.iter().enumerate();
        let first = leaves.filter_map(|(index, next)| next.as_ref().map(|next| (next.leaf, index))).min();
        let Some((leaf, index)) = first else { return Ok(None) };
        if let Some(missing) = leaf.and_then(|leaf| self.missing_before(leaf)) {
            return Ok(Some(missing));
        }
        let Some(passed) = self.next[index].take() else { return Ok(None) };
        self.place.rows[index] = passed.place + 1;
        self.place.leaf = self.place.leaf.max(leaf.map_or(0, |leaf| leaf + 1));
        Ok(Some(Step::Entry(passed)))
    }

    /// Passes the leaves up to this one. Returns those of them that are missing, if any.
    fn missing_before(&mut self, leaf: u64) -> Option<Step> {
        let Source { removed, accepted, .. } = *self.source;
        let from = self.place.leaf.min(leaf);
        self.place.leaf = self.place.leaf.max(leaf);
        let unnamed = removed.missing(from..leaf).flat_map(|leaves| accepted.missing(leaves));
        let mut missing = unnamed.peekable();
        let first = missing.peek()?.start;
        Some(Step::Missing { leaf: first, number: missing.map(|leaves| leaves.end - leaves.start).sum() })
    }
}

/// What the entries of a log say, whatever its table `meta` says of them.
pub(super) struct Recounted {
    pub(super) log: Log,
    /// What control entries say. Its accepted leaves are those that are missing now: the first ones, up to the number
    /// of ranges that the entry about a new log can name.
    pub(super) said: Said,
    pub(super) counts: Counts,
    pub(super) unlogged_to: Revision,
}

/// Counts all entries that are what was written, and finds the leaves that no such entry has, except those that
/// retention has removed.
pub(super) fn recount(transaction: &Transaction<'_>, checks: Checks, log: &Log) -> rusqlite::Result<Recounted> {
    /// Number of rows after which proved nodes are forgotten, since they take memory.
    const FORGET: usize = 10_000;
    let mut log = Log { first_kept: 0, ..log.clone() };
    let mut said = log::said(transaction, &log, checks.control, Leaves::default())?;
    log.first_kept = said.first_kept;
    let proven = || Proven::of(&log.frontier);
    let unlogged_to = unlogged_to(transaction, &mut proven())?;
    let (removed, accepted) = (&said.removed, &said.accepted);
    let mut source = Source { transaction, checks, log: &log, removed, accepted, unlogged_to, proven: proven() };
    let (mut counts, mut present) = (Counts::default(), Leaves::default());
    for table in Table::ALL {
        let mut query = table.query(transaction)?;
        let mut rows = query.query([0])?;
        let mut examined = 0;
        while let Some(row) = rows.next()? {
            let place = number(row, 0)?;
            if let Ok(Passed { leaf, is, .. }) = source.examine(table, row, place, table)? {
                counts.add_entry(is);
                present.add(leaf.map_or(0..0, |leaf| leaf..leaf + 1));
            }
            examined += 1;
            if examined % FORGET == 0 {
                source.proven = proven();
            }
        }
    }
    let missing = removed.missing(0..log.frontier.size()).flat_map(|leaves| present.missing(leaves));
    said.accepted = missing.take(LogBegan::MAX_MISSING).collect();
    Ok(Recounted { log, said, counts, unlogged_to })
}

/// The highest revision of the records that are older than the log: those before the first one that is proved to be in
/// it, whatever other rows claim.
fn unlogged_to(transaction: &Transaction<'_>, proven: &mut Proven) -> rusqlite::Result<Revision> {
    let known = transaction.query_row("SELECT unlogged_to FROM meta", [], |row| number(row, 0)).map(Revision)?;
    let mut query = transaction.prepare(&format!(
        "SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} AND revision <= ?1 AND leaf IS NOT NULL ORDER BY revision"
    ))?;
    let mut rows = query.query([integer(known.0)])?;
    while let Some(row) = rows.next()? {
        let bytes = row.get_ref("record")?.as_blob().unwrap_or_default();
        if let Ok(Some(leaf)) = leaf(row)
            && log::is_in_log(transaction, proven, leaf, Entry::Cycle(bytes))?
        {
            return Ok(Revision(number(row, "revision")? - 1));
        }
    }
    Ok(known)
}

impl Source<'_> {
    /// Examines a row: an entry that the log has, with its bytes, and that retention has not removed; or a record that
    /// is older than the log. Or else what is wrong.
    fn examine(
        &mut self,
        table: Table,
        row: &Row<'_>,
        place: u64,
        about: Table,
    ) -> rusqlite::Result<Result<Passed, String>> {
        let bytes = row.get_ref(table.bytes())?.as_blob().unwrap_or_default();
        if bytes.len() > MAX_RECORD {
            return Ok(Err(named(table, row, place, format!("it is {} bytes long", bytes.len()))));
        }
        let leaf = if table == Table::Records { leaf(row) } else { Ok(Some(place)) };
        let is = if table == about { self.read(table, row, place) } else { Ok(Is::Other) };
        let (leaf, is) = match (leaf, is) {
            (Ok(leaf), Ok(is)) => (leaf, is),
            (_, Err(problem)) => return Ok(Err(problem)),
            (Err(error), _) => return Ok(Err(named(table, row, place, error.to_string()))),
        };
        let problem = match leaf {
            Some(leaf) if !self.removed.from(leaf).is_empty() => Some(REMOVED),
            Some(leaf) if !self.accepted.from(leaf).is_empty() => Some(ACCEPTED),
            Some(leaf) if !log::is_in_log(self.transaction, &mut self.proven, leaf, table.entry(bytes))? => {
                Some(NOT_IN_LOG)
            }
            None if place > self.unlogged_to.0 => Some(WITHOUT_LEAF),
            _ => None,
        };
        if let Some(problem) = problem {
            return Ok(Err(named(table, row, place, problem.into())));
        }
        Ok(Ok(Passed { place, leaf, is, bytes: bytes_of(row) }))
    }

    /// Reads a row, or returns what is wrong.
    fn read(&self, table: Table, row: &Row<'_>, place: u64) -> Result<Is, String> {
        match table {
            Table::Records => {
                let how = Reading { check: self.checks.record, unlogged_to: self.unlogged_to };
                let read = read(self.transaction, row, how);
                let record = read.map_err(|unreadable| unreadable.to_string())?;
                Ok(Is::Record(record.state, record.finished_at))
            }
            Table::Events => {
                let read = event(row).map_err(|error| error.to_string());
                let checked = read.and_then(|entry| (self.checks.event)(&entry).map(|()| entry));
                let entry = checked.map_err(|problem| named(table, row, place, problem))?;
                Ok(Is::Event(entry.kind, entry.time))
            }
            Table::Controls => Ok(Is::Other),
        }
    }
}

impl Table {
    /// The column of the bytes of its entries.
    fn bytes(self) -> &'static str {
        match self {
            Self::Records => "record",
            Self::Events => "event",
            Self::Controls => "entry",
        }
    }

    fn entry(self, bytes: &[u8]) -> Entry<'_> {
        match self {
            Self::Records => Entry::Cycle(bytes),
            Self::Events => Entry::Audit(bytes),
            Self::Controls => Entry::Control(bytes),
        }
    }
}

/// The problem of an entry whose hashes do not lead to the end of the log.
const NOT_IN_LOG: &str = "its bytes were changed, or hashes of the log: the log does not have them as its leaf";
/// The problem of an entry that was put back.
const REMOVED: &str = "it is there, although the log says that retention removed it";
/// The problem of an entry that is in no number of entries.
const ACCEPTED: &str = "it is there, although a new log began without it; `orchestrator store accept` counts it";
/// The problem of a record that is not older than the log.
const WITHOUT_LEAF: &str = "it has no leaf, and was written since the log began";

/// A problem of a row, with the name of its entry.
fn named(table: Table, row: &Row<'_>, place: u64, problem: String) -> String {
    match table {
        Table::Records => {
            let cycle_id = CycleId(number(row, "cycle_id").unwrap_or_default());
            Unreadable { cycle_id, revision: Revision(place), problem }.to_string()
        }
        Table::Events => UnreadableEvent { leaf: place, problem }.to_string(),
        Table::Controls => format!("leaf {place}, a control entry, can't be read: {problem}"),
    }
}

/// Number of bytes of the large values of a row.
fn bytes_of(row: &Row<'_>) -> usize {
    let values = (0..row.as_ref().column_count()).filter_map(|index| row.get_ref(index).ok()?.as_blob().ok());
    values.map(<[u8]>::len).sum()
}
