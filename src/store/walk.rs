//! Goes through the entries of the log in its order, by what the entries themselves say, and finds those that are
//! missing.

use std::array;

use jiff::Timestamp;

use super::{
    counts::Counts,
    entries::{Ahead, Reading, Rows, Said, StoredEntry, Table, check_leaf, is_in_log, said},
};
use crate::{
    ledger::{Entry, Leaves, LogBegan, Node, Proven},
    model::{CycleState, EventKind, Revision},
    ports::{Checks, Log},
};

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
pub(super) struct Source<'s, R> {
    pub(super) rows: &'s mut R,
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

/// One walk. It reads the next entry of each table ahead, to go on with that of the lowest leaf.
pub(super) struct Walk<'w, 's, R> {
    source: &'w mut Source<'s, R>,
    /// The table that it is about: of the entries of the others, it only sees that they are there.
    about: Table,
    place: Place,
    ahead: [Ahead; Table::ALL.len()],
    /// The next entry of each table, once it was examined.
    next: [Option<Passed>; Table::ALL.len()],
}

impl<'w, 's, R: Rows> Walk<'w, 's, R> {
    pub(super) fn new(source: &'w mut Source<'s, R>, about: Table, place: Place) -> Self {
        let ahead = Table::ALL.map(|table| Ahead::new(table, place.rows[table as usize]));
        Self { source, about, place, ahead, next: array::from_fn(|_| None) }
    }

    /// Where a later walk goes on.
    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// The next step; `None` at the end.
    pub(super) fn step(&mut self) -> Result<Option<Step>, R::Error> {
        for table in Table::ALL {
            let index = table as usize;
            while self.next[index].is_none()
                && let Some(row) = self.ahead[index].next(self.source.rows)?
            {
                match self.source.examine(&row, self.about)? {
                    Ok(passed) => self.next[index] = Some(passed),
                    Err(problem) => {
                        self.place.rows[index] = row.place + 1;
                        let is_older = table == Table::Records && row.place <= self.source.unlogged_to.0;
                        return Ok(Some(Step::Damaged { problem, bytes: row.bytes.len(), is_older }));
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
        let (removed, accepted) = (self.source.removed, self.source.accepted);
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
/// retention has removed. `known` is the highest revision of the records that are older than the log, by the table
/// `meta`.
pub(super) fn recount<R: Rows>(
    rows: &mut R,
    checks: Checks,
    log: &Log,
    known: Revision,
) -> Result<Recounted, R::Error> {
    /// Number of rows after which proved nodes are forgotten, since they take memory.
    const FORGET: usize = 10_000;
    let mut log = Log { first_kept: 0, ..log.clone() };
    let mut said = said(rows, &log, checks.control, Leaves::default())?;
    log.first_kept = said.first_kept;
    let proven = || Proven::of(&log.frontier);
    let unlogged_to = unlogged_to(rows, known, &mut proven())?;
    let (removed, accepted) = (&said.removed, &said.accepted);
    let mut source = Source { rows, checks, log: &log, removed, accepted, unlogged_to, proven: proven() };
    let (mut counts, mut present) = (Counts::default(), Leaves::default());
    for table in Table::ALL {
        let mut ahead = Ahead::new(table, 0);
        let mut examined = 0;
        while let Some(row) = ahead.next(source.rows)? {
            if let Ok(Passed { leaf, is, .. }) = source.examine(&row, table)? {
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
fn unlogged_to<R: Rows>(rows: &mut R, known: Revision, proven: &mut Proven) -> Result<Revision, R::Error> {
    let mut records = Ahead::new(Table::Records, 0);
    while let Some(row) = records.next(rows)?.filter(|row| row.place <= known.0) {
        if let Ok(Some(leaf)) = row.leaf
            && is_in_log(rows, proven, leaf, Entry::Cycle(&row.bytes))?
        {
            return Ok(Revision(row.place - 1));
        }
    }
    Ok(known)
}

impl<R: Rows> Source<'_, R> {
    /// Examines a row: an entry that the log has, with its bytes, and that retention has not removed; or a record that
    /// is older than the log. Or else what is wrong.
    fn examine(&mut self, row: &StoredEntry, about: Table) -> Result<Result<Passed, String>, R::Error> {
        let is = if row.table == about { self.read(row)? } else { Ok(Is::Other) };
        let (leaf, is) = match (&row.leaf, is) {
            (Ok(leaf), Ok(is)) => (*leaf, is),
            (_, Err(problem)) => return Ok(Err(problem)),
            (Err(error), _) => return Ok(Err(row.named(error.to_string()))),
        };
        let problem = match leaf {
            Some(leaf) if !self.removed.from(leaf).is_empty() => Some(REMOVED),
            Some(leaf) if !self.accepted.from(leaf).is_empty() => Some(ACCEPTED),
            Some(leaf) if !is_in_log(self.rows, &mut self.proven, leaf, row.table.entry(&row.bytes))? => {
                Some(NOT_IN_LOG)
            }
            None if row.place > self.unlogged_to.0 => Some(WITHOUT_LEAF),
            _ => None,
        };
        if let Some(problem) = problem {
            return Ok(Err(row.named(problem.into())));
        }
        Ok(Ok(Passed { place: row.place, leaf, is, bytes: row.bytes.len() }))
    }

    /// Reads a row, or returns what is wrong.
    fn read(&mut self, row: &StoredEntry) -> Result<Result<Is, String>, R::Error> {
        Ok(match row.table {
            Table::Records => {
                let how = Reading { check: self.checks.record, unlogged_to: self.unlogged_to };
                let hash = match row.leaf {
                    Ok(Some(leaf)) => self.rows.hash(Node::of_leaf(leaf))?,
                    _ => None,
                };
                let record = row.record(how, |leaf, entry| check_leaf(leaf, entry, hash));
                record.map(|record| Is::Record(record.state, record.finished_at)).map_err(|error| error.to_string())
            }
            Table::Events => {
                // The hashes above it, which are examined next, say whether it is in the log.
                let event = row.event(self.checks.event, |_, _| Ok(()));
                event.map(|event| Is::Event(event.entry.kind, event.entry.time)).map_err(|error| error.to_string())
            }
            Table::Controls => Ok(Is::Other),
        })
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
