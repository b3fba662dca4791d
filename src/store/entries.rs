//! The entries of the log as a database has them, and what control entries say.

use std::{collections::VecDeque, fmt::Display};

use bytes::Bytes;

use super::row::{Row, Value, Wrong, event, found, leaf, number};
use crate::{
    ledger::{Control, Entry, Hash, Leaves, Node, Proven},
    model::{CycleId, Revision},
    ports::{
        AuditEntry, Check, ControlDecoder, EventCheck, Found, FoundEvent, Log, LoggedEvent, Record, Unreadable,
        UnreadableEvent,
    },
};

/// Most bytes of a record that is read: the largest `cycle.max_record_bytes`.
pub(super) const MAX_RECORD: usize = 64 << 20;
/// Most bytes of an entry about the log itself: this software writes about 60 KiB. Another program may have put one
/// there that takes as much memory as the machine has.
pub(super) const MAX_CONTROL: usize = 1 << 20;
/// Most rows that are read at once, and bytes of them after which no further ones are: a walk needs few of them.
const MOST_ROWS: usize = 64;
pub(super) const MOST_BYTES: usize = 1 << 20;

/// How records are read.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    pub(super) check: Check,
    /// The highest revision of the records that are older than the log: by the process that has the store open, since
    /// another program can change that number in the table `meta` meanwhile.
    pub(super) unlogged_to: Revision,
}

/// The tables that have the entries of the log, in the order of their numbers here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Records,
    Events,
    Controls,
}

/// The rows of a database, as of one moment.
pub(super) trait Rows {
    type Error: From<Wrong> + Display;

    /// The rows of a table from this place on, in the order of their places: at most `limit`, and none any more after
    /// [`MOST_BYTES`] of them; at least one if there is any.
    fn rows(&mut self, table: Table, from: u64, limit: usize) -> Result<Vec<StoredEntry>, Self::Error>;

    /// The hash of a node, if it is there.
    fn hash(&mut self, node: Node) -> Result<Option<Hash>, Self::Error>;
}

impl Table {
    pub(super) const ALL: [Self; 3] = [Self::Records, Self::Events, Self::Controls];

    /// The column of the places of its rows: revisions, or else leaves.
    pub(super) fn place(self) -> &'static str {
        match self {
            Self::Records => "revision",
            Self::Events | Self::Controls => "leaf",
        }
    }

    /// The column of the bytes of its entries.
    pub(super) fn bytes(self) -> &'static str {
        match self {
            Self::Records => "record",
            Self::Events => "event",
            Self::Controls => "entry",
        }
    }

    /// Most bytes of an entry that is read.
    fn most_bytes(self) -> usize {
        match self {
            Self::Records | Self::Events => MAX_RECORD,
            Self::Controls => MAX_CONTROL,
        }
    }

    /// The entry with these bytes.
    pub(super) fn entry(self, bytes: &[u8]) -> Entry<'_> {
        match self {
            Self::Records => Entry::Cycle(bytes),
            Self::Events => Entry::Audit(bytes),
            Self::Controls => Entry::Control(bytes),
        }
    }
}

/// A row of an entry.
pub(super) struct StoredEntry {
    pub(super) table: Table,
    /// Its revision, or its leaf if it is not a record; 0 if that can't be read.
    pub(super) place: u64,
    /// `None` for a record that is older than the log.
    pub(super) leaf: Result<Option<u64>, Wrong>,
    /// Empty if it has none.
    pub(super) bytes: Bytes,
    content: Result<Content, String>,
    cycle_id: CycleId,
}

/// What the columns of a row say.
enum Content {
    Record(Record),
    Event(AuditEntry),
    Control,
}

impl StoredEntry {
    /// The entry in this row, or what is wrong with it.
    ///
    /// # Errors
    /// The row does not have the columns of the table.
    pub(super) fn of(table: Table, row: &dyn Row) -> Result<Self, Wrong> {
        let place = number(row, table.place());
        let stored = match row.value(table.bytes())? {
            Value::Blob(bytes) => Ok(bytes),
            _ => Err(format!("its {} is not bytes", table.bytes())),
        };
        let stored = stored.and_then(|bytes| match bytes.len() {
            length if length > table.most_bytes() => Err(format!("it is {length} bytes long")),
            _ => Ok(Bytes::copy_from_slice(bytes)),
        });
        let columns = || match table {
            Table::Records => found(row).map(Content::Record),
            Table::Events => event(row).map(Content::Event),
            Table::Controls => Ok(Content::Control),
        };
        let content = match (&stored, &place) {
            (Ok(_), Ok(_)) => columns().map_err(|wrong| wrong.to_string()),
            (Ok(_), Err(wrong)) => Err(wrong.to_string()),
            (Err(problem), _) => Err(problem.clone()),
        };
        let is_record = table == Table::Records;
        Ok(Self {
            table,
            place: place.clone().unwrap_or_default(),
            leaf: if is_record { leaf(row) } else { place.map(Some) },
            bytes: stored.unwrap_or_default(),
            content,
            cycle_id: CycleId(number(row, "cycle_id").unwrap_or_default()),
        })
    }

    /// Its record, if it can be read and has the bytes that were written. `is_leaf` says whether the log has an entry
    /// as a leaf.
    pub(super) fn record(&self, how: Reading, is_leaf: impl FnOnce(u64, Entry<'_>) -> Result<(), String>) -> Found {
        let record = match &self.content {
            Ok(Content::Record(record)) => Ok(Record { bytes: self.bytes.clone(), ..record.clone() }),
            Ok(_) => Err("it is no record".to_owned()),
            Err(problem) => Err(problem.clone()),
        };
        let checked = record.and_then(|record| {
            match self.leaf.as_ref().map_err(ToString::to_string)? {
                Some(leaf) => is_leaf(*leaf, Entry::Cycle(&record.bytes))?,
                None if self.place <= how.unlogged_to.0 => {}
                None => return Err("it is not in the log, although it was written since the log began".into()),
            }
            (how.check)(&record).map(|()| record)
        });
        checked.map_err(|problem| self.unreadable(problem))
    }

    /// Its audit event, if that can be read.
    pub(super) fn event(
        &self,
        check: EventCheck,
        is_leaf: impl FnOnce(u64, Entry<'_>) -> Result<(), String>,
    ) -> FoundEvent {
        let leaf = self.place;
        let entry = match &self.content {
            Ok(Content::Event(entry)) => Ok(AuditEntry { bytes: self.bytes.clone(), ..entry.clone() }),
            Ok(_) => Err("it is no audit event".to_owned()),
            Err(problem) => Err(problem.clone()),
        };
        let checked = entry.and_then(|entry| {
            is_leaf(leaf, Entry::Audit(&entry.bytes))?;
            check(&entry).map(|()| LoggedEvent { leaf, entry })
        });
        checked.map_err(|problem| UnreadableEvent { leaf, problem })
    }

    fn unreadable(&self, problem: String) -> Unreadable {
        Unreadable { cycle_id: self.cycle_id, revision: Revision(self.place), problem }
    }

    /// A problem of it, with its name.
    pub(super) fn named(&self, problem: String) -> String {
        match self.table {
            Table::Records => self.unreadable(problem).to_string(),
            Table::Events => UnreadableEvent { leaf: self.place, problem }.to_string(),
            Table::Controls => format!("leaf {}, a control entry, can't be read: {problem}", self.place),
        }
    }

    /// The problem of its size, or of its bytes.
    pub(super) fn problem(&self) -> Option<&String> {
        self.content.as_ref().err()
    }
}

/// The rows of a table from one on, in their order, of which some are read ahead.
pub(super) struct Ahead {
    table: Table,
    rows: VecDeque<StoredEntry>,
    /// The place from which the next ones are read; `None` at the end.
    from: Option<u64>,
    /// Number of rows that are read next: first a single one, since most walks need no more.
    limit: usize,
}

impl Ahead {
    /// The rows from this place on.
    pub(super) fn new(table: Table, from: u64) -> Self {
        Self { table, rows: VecDeque::new(), from: Some(from), limit: 1 }
    }

    /// The next row, which stays the next one.
    pub(super) fn peek<R: Rows>(&mut self, rows: &mut R) -> Result<Option<&StoredEntry>, R::Error> {
        if self.rows.is_empty()
            && let Some(from) = self.from
        {
            self.rows = rows.rows(self.table, from, self.limit)?.into();
            // No place is after the highest number of a database.
            let next = self.rows.back().map(|last| last.place + 1);
            self.from = next.filter(|next| i64::try_from(*next).is_ok());
            self.limit = (self.limit * 2).min(MOST_ROWS);
        }
        Ok(self.rows.front())
    }

    /// The next row.
    pub(super) fn next<R: Rows>(&mut self, rows: &mut R) -> Result<Option<StoredEntry>, R::Error> {
        self.peek(rows)?;
        Ok(self.rows.pop_front())
    }
}

/// Checks that an entry is the one that was appended as this leaf, of which this is the hash.
///
/// # Errors
/// It is not, or the log does not have the leaf.
pub(super) fn check_leaf(leaf: u64, entry: Entry<'_>, hash: Option<Hash>) -> Result<(), String> {
    match hash {
        Some(hash) if hash == entry.leaf() => Ok(()),
        Some(_) => Err(format!("its bytes were changed: they don't have the hash of leaf {leaf} of the log")),
        None => Err(format!("the log does not contain its leaf {leaf}")),
    }
}

/// The entry about the log itself that is this leaf, if it is in the log.
pub(super) fn control_entry<R: Rows>(rows: &mut R, proven: &mut Proven, leaf: u64) -> Result<Option<Bytes>, R::Error> {
    let found = rows.rows(Table::Controls, leaf, 1)?.pop().filter(|row| row.place == leaf);
    let Some(row) = found.filter(|row| row.problem().is_none()) else { return Ok(None) };
    Ok(is_in_log(rows, proven, leaf, Entry::Control(&row.bytes))?.then_some(row.bytes))
}

/// True if an entry is this leaf of the log: by its hashes up to the end of the log, which is sealed. The hash of the
/// leaf alone could have been changed with the entry.
pub(super) fn is_in_log<R: Rows>(
    rows: &mut R,
    proven: &mut Proven,
    leaf: u64,
    entry: Entry<'_>,
) -> Result<bool, R::Error> {
    proven.has(leaf, entry.leaf(), |node| rows.hash(node))
}

/// What the control entries of a log say.
pub(super) struct Said {
    /// The leaves that retention has removed.
    pub(super) removed: Leaves,
    /// All entries before this leaf are removed.
    pub(super) first_kept: u64,
    /// The leaves that were missing when the entries were counted anew, so that they are in no number of entries.
    pub(super) accepted: Leaves,
}

/// The leaves that were missing when the entries were counted anew, by the entry of the leaf `counted_at`, if there is
/// one; `None` if it is not there, although retention has not removed it.
pub(super) fn accepted<R: Rows>(
    rows: &mut R,
    log: &Log,
    decode: ControlDecoder,
    counted_at: Option<u64>,
) -> Result<Option<Leaves>, R::Error> {
    let Some(counted_at) = counted_at else { return Ok(Some(Leaves::default())) };
    let entry = control_entry(rows, &mut Proven::of(&log.frontier), counted_at)?;
    Ok(match entry.map(|entry| decode(&entry).map(|said| said.at(counted_at))) {
        Some(Ok(Control::Began { missing, .. })) => Some(missing.into_iter().collect()),
        _ => (counted_at < log.first_kept).then(Leaves::default),
    })
}

/// What the control entries in the log say, without those that have come back to an accepted leaf.
pub(super) fn said<R: Rows>(
    rows: &mut R,
    log: &Log,
    decode: ControlDecoder,
    accepted: Leaves,
) -> Result<Said, R::Error> {
    let (mut removed, mut first_kept, mut proven) = (Leaves::default(), log.first_kept, Proven::of(&log.frontier));
    removed.add(0..first_kept);
    let mut controls = Ahead::new(Table::Controls, 0);
    while let Some(row) = controls.next(rows)? {
        let is_counted = row.problem().is_none() && accepted.from(row.place).is_empty();
        if !is_counted || !is_in_log(rows, &mut proven, row.place, Entry::Control(&row.bytes))? {
            continue;
        }
        // An unreadable entry proves nothing.
        if let Ok(Control::Pruned(pruned)) = decode(&row.bytes).map(|said| said.at(row.place)) {
            pruned.all().for_each(|leaves| removed.add(leaves));
            first_kept = first_kept.max(pruned.first_kept);
        }
    }
    Ok(Said { removed, first_kept, accepted })
}
