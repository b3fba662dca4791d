//! Reads what an earlier process left in a database: all tables except the history. Unreadable rows are collected
//! beside the readable ones.

use std::time::Duration;

use jiff::Timestamp;

use super::{
    counts::Counts,
    entries::{self, Reading, Rows, Said, StoredEntry, accepted, check_leaf, said},
    frontier::Frontier,
    row::{
        Row, Wrong, flag, identity, integer, integer_of, json, key, name, number, open_cycle, optional_integer, output,
        time, unknown_cycle,
    },
    seal::{LOOPS, OPEN_CYCLES, OUTPUTS, Renewal, SUBSYSTEMS, Seal, Sealer, Table},
    term::Term,
    walk::recount,
};
use crate::{
    clock::Clock,
    ledger::{self, Node, SealedBy},
    model::{CycleId, Epoch, Revision, text::count},
    ports::{Checks, Contents, Log, Seals, Stage, StoredLoop, StoredOutput, StoredSubsystem, UnreadableRow},
};

/// Reads the rows of a table.
pub(super) type Read<'r> = &'r mut dyn FnMut(&dyn Row) -> Result<(), Wrong>;

/// The rows of a database, as of one moment, that are not in the log.
pub(super) trait Tables: Rows {
    /// The id of the database, which a copy shares.
    fn store_id(&mut self) -> Result<[u8; 16], Self::Error>;

    /// The row of the table `meta`.
    fn meta(&mut self, read: Read<'_>) -> Result<(), Self::Error>;

    /// The rows of a sealed table, in the order of their primary keys. Those of open cycles have the further column
    /// `is_recorded`, and those of outputs `finished_at`, of the record of their cycle.
    fn sealed(&mut self, table: &Table, read: Read<'_>) -> Result<(), Self::Error>;

    /// The number after the highest one of a node.
    fn end_of_hashes(&mut self) -> Result<u64, Self::Error>;

    /// The record with the highest revision.
    fn last_record(&mut self) -> Result<Option<StoredEntry>, Self::Error>;

    /// The highest id of a cycle in the history.
    fn newest_cycle_id(&mut self) -> Result<Option<u64>, Self::Error>;

    /// The highest leaf of the rows of a table whose places are leaves.
    fn last_leaf(&mut self, table: entries::Table) -> Result<Option<u64>, Self::Error>;
}

/// Why the contents of a database are not read.
pub(super) enum Refused<E> {
    /// They can't be read.
    Unreadable(E),
    /// No process could continue from them.
    Corrupt(String),
    /// A seal does not belong to what it seals.
    Tampered(String),
}

impl<E> From<E> for Refused<E> {
    fn from(error: E) -> Self {
        Self::Unreadable(error)
    }
}

/// The values of the table `meta`, but those of [`Counts`].
struct Meta {
    current: Epoch,
    commits: u64,
    last_cycle_id: CycleId,
    last_revision: Revision,
    pruned_to: Revision,
    log_size: u64,
    first_kept: u64,
    removed: u64,
    counted_at: Option<u64>,
    unlogged_to: Revision,
}

impl Meta {
    fn of_row(row: &dyn Row) -> Result<Self, Wrong> {
        Ok(Self {
            current: Epoch(number(row, "epoch")?),
            commits: number(row, "commits")?,
            last_cycle_id: CycleId(number(row, "last_cycle_id")?),
            last_revision: Revision(number(row, "last_revision")?),
            pruned_to: Revision(number(row, "pruned_to")?),
            log_size: number(row, "log_size")?,
            first_kept: number(row, "log_first_kept")?,
            removed: number(row, "log_removed")?,
            counted_at: u64::try_from(integer_of(row, "log_counted_at")?).ok(),
            unlogged_to: Revision(number(row, "unlogged_to")?),
        })
    }
}

/// Reads all tables except the history, with the next epoch, and checks all seals. Also returns the term that begins
/// with the next commit.
///
/// # Errors
/// They can't be read, no process could continue from them, or a seal does not belong to what it seals.
pub(super) fn read_contents<D: Tables>(
    database: &mut D,
    checks: Checks,
    clock: Clock,
    seals: Seals,
) -> Result<(Contents, Term), Refused<D::Error>> {
    let last = check_extent(database)?;
    let meta = of_meta(database, Meta::of_row)?;
    let mut contents = Contents {
        epoch: meta.current.next().max(Epoch::by_clock(clock.now())),
        last_cycle_id: meta.last_cycle_id,
        last_revision: meta.last_revision,
        pruned_to: meta.pruned_to,
        ..Contents::default()
    };
    if let Some(row) = last {
        let how = Reading { check: checks.record, unlogged_to: meta.unlogged_to };
        let hash = match row.leaf {
            Ok(Some(leaf)) => database.hash(Node::of_leaf(leaf))?,
            _ => None,
        };
        contents.last_record = Some(row.record(how, |leaf, entry| check_leaf(leaf, entry, hash)));
    }
    let mut log = read_log(database, meta.log_size, meta.first_kept)?;
    let (keys, are_checked) = match seals {
        Seals::Checked(keys) => (keys, true),
        Seals::Renewed(keys) => (keys, false),
    };
    let sealer = Sealer::new(keys, database.store_id()?);
    let (seal, mut counts) =
        of_meta(database, |row| Ok((sealer.check_end(row, &log.frontier)?, Counts::of_row(row)?)))?;
    let mut renewal = match seal {
        _ if !are_checked => Some(Renewal::Everything),
        Seal::Valid(SealedBy::FirstKey) => None,
        Seal::Valid(SealedBy::OtherKey) => Some(Renewal::OtherKey),
        // The log came with its seal, so an earlier version has written neither.
        Seal::Missing if log.frontier.size() == 0 => Some(Renewal::Missing),
        Seal::Missing | Seal::Wrong => {
            let entries = count(log.frontier.size(), "entry");
            return Err(Refused::Tampered(format!(
                "the seal of its log does not belong to its {entries} and its table meta"
            )));
        }
    };
    let (mut unlogged_to, mut counted_at) = (meta.unlogged_to, meta.counted_at);
    let said = if matches!(renewal, Some(Renewal::Missing | Renewal::Everything)) {
        let checked = check_unsealed_epoch(meta.current);
        checked.map_err(|problem| Refused::Corrupt(format!("epoch in its table meta {problem}")))?;
        let recounted = recount(database, checks, &log, unlogged_to)?;
        (log, counts, unlogged_to) = (recounted.log, recounted.counts, recounted.unlogged_to);
        (contents.missing, counted_at) = (recounted.said.accepted.ranges().collect(), None);
        recounted.said
    } else {
        let accepted = accepted(database, &log, checks.control, counted_at)?;
        let said = accepted.map(|accepted| said(database, &log, checks.control, accepted));
        said.transpose()?.filter(|said| said.removed.count() == meta.removed).ok_or_else(|| {
            Refused::Tampered(
                "entries of its log about removals, or about a new log, are missing or have come back".into(),
            )
        })?
    };
    let mut rows =
        SealedRows { sealer: &sealer, renewal: &mut renewal, unreadable: &mut contents.unreadable, changed: None };
    let last_cycle_id = integer(contents.last_cycle_id.0);
    rows.read_all(database, &OPEN_CYCLES, |row, is_sealed| {
        let cycle_id = integer_of(row, "cycle_id")?;
        if !(1..=last_cycle_id).contains(&cycle_id) {
            return Err(Wrong::new("cycle_id", "is a number that was given to no cycle"));
        }
        if flag(row, "is_recorded")? {
            return Err(Wrong::new("cycle_id", "is that of a recorded cycle"));
        }
        let read = open_cycle(row);
        let stage = if is_sealed { Stage::Unknown } else { Stage::Unsealed };
        let unknown = |_: &_| unknown_cycle(CycleId(cycle_id.unsigned_abs()), stage);
        contents.open.push(read.as_ref().map_or_else(unknown, Clone::clone));
        read.map(drop)
    })?;
    rows.read_all(database, &SUBSYSTEMS, |row, _| {
        let lease_ms = optional_integer(row, "lease_ms")?;
        contents.subsystems.push(StoredSubsystem {
            name: name(row, "name")?,
            spec: json(row, "spec")?,
            lease: lease_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
            suspended: flag(row, "suspended")?,
            owner: identity(row, "owner")?,
            former_names: json(row, "former_names")?.unwrap_or_default(),
        });
        Ok(())
    })?;
    rows.read_all(database, &LOOPS, |row, _| {
        let state = json(row, "state")?.unwrap_or_default();
        contents.loops.push(StoredLoop { name: name(row, "name")?, spec: json(row, "spec")?, state });
        Ok(())
    })?;
    rows.read_all(database, &OUTPUTS, |row, _| {
        let output = output(row)?;
        let finished_at = optional_integer(row, "finished_at")?;
        contents.outputs.push(StoredOutput {
            name: name(row, "name")?,
            output,
            finished_at: finished_at.map(|_| time(row, "finished_at")).transpose()?,
        });
        Ok(())
    })?;
    if let Some(changed) = rows.changed {
        return Err(Refused::Tampered(format!("the seal of its {changed} does not belong to what it contains now")));
    }
    let Contents { last_cycle_id, last_revision, open, subsystems, loops, outputs, unreadable, .. } = &contents;
    let has_rows =
        !(open.is_empty() && subsystems.is_empty() && loops.is_empty() && outputs.is_empty() && unreadable.is_empty());
    let is_empty = *last_cycle_id == CycleId(0) && !has_rows;
    let is_sealed = is_empty || (are_checked && seal != Seal::Missing);
    let frontier = Frontier {
        last_cycle_id: *last_cycle_id,
        last_revision: *last_revision,
        open: open.iter().map(|open| open.cycle_id).collect(),
        log,
    };
    contents.is_sealed = is_sealed;
    let Said { removed, accepted, .. } = said;
    let term = Term {
        epoch: contents.epoch,
        current: meta.current,
        commits: meta.commits,
        pruned_to: contents.pruned_to,
        unlogged_to,
        counts,
        frontier,
        removed_count: removed.count(),
        removed,
        accepted,
        counted_at,
        sealer,
        renewal,
    };
    Ok((contents, term))
}

/// Refuses an epoch that no clock can have given, in a place that no seal protects. Few epochs would be left after it,
/// and subsystems that have heard of it would refuse those of another store. The error is the end of a sentence that
/// begins with its name.
pub(super) fn check_unsealed_epoch(epoch: Epoch) -> Result<(), String> {
    if epoch <= Epoch::by_clock(Timestamp::MAX) {
        return Ok(());
    }
    Err(format!("is {epoch}, which no clock gives, and it has no seal"))
}

/// More entries than any log can have: a thousand a second for nine thousand years. Another program may have set a
/// larger size, whose numbers of nodes would be too large for a database.
const ENDLESS: u64 = 1 << 48;

/// The log of this size, by the table of hashes.
///
/// # Errors
/// It can't be read, its hashes are not those of such a log, or rows have the leaves of entries that are still to come.
pub(super) fn read_log<D: Tables>(database: &mut D, size: u64, first_kept: u64) -> Result<Log, Refused<D::Error>> {
    let mut roots = Some(Vec::new());
    for node in ledger::Frontier::nodes(size.min(ENDLESS)) {
        let root = database.hash(node)?;
        roots = roots.zip(root).map(|(mut roots, root)| {
            roots.push(root);
            roots
        });
    }
    let frontier = roots.and_then(|roots| ledger::Frontier::of(size, roots));
    let end = database.end_of_hashes()?;
    let frontier = frontier.filter(|_| size < ENDLESS && end == Node::complete_with(size)).ok_or_else(|| {
        Refused::Corrupt(format!(
            "log_size in its table meta is {size}, and its table hashes is not that of such a log"
        ))
    })?;
    for (table, name) in [(entries::Table::Events, "audit"), (entries::Table::Controls, "control")] {
        if let Some(leaf) = database.last_leaf(table)?.filter(|leaf| *leaf >= size) {
            return Err(Refused::Corrupt(format!(
                "log_size in its table meta is {size}, and a row of its table {name}, which another program has \
                 written, is leaf {leaf} already; remove such rows"
            )));
        }
    }
    Ok(Log { frontier, first_kept })
}

/// What the row of the table `meta` says.
fn of_meta<D: Tables, T>(database: &mut D, read: impl FnOnce(&dyn Row) -> Result<T, Wrong>) -> Result<T, D::Error> {
    let (mut read, mut found) = (Some(read), None);
    database.meta(&mut |row| {
        found = read.take().map(|read| read(row)).transpose()?;
        Ok(())
    })?;
    found.ok_or_else(|| Wrong::new("table meta", "has no row").into())
}

/// Refuses a database from whose numbers no process could continue. Returns the record with the highest revision.
pub(super) fn check_extent<D: Tables>(database: &mut D) -> Result<Option<StoredEntry>, Refused<D::Error>> {
    let mut numbers = Numbers::default();
    database.meta(&mut |row| numbers.read(row))?;
    numbers.newest_cycle_id = database.newest_cycle_id()?;
    let last = database.last_record()?;
    numbers.newest_revision = last.as_ref().map(|row| row.place);
    numbers.check().map_err(Refused::Corrupt)?;
    Ok(last)
}

/// The extent of a database: by its table `meta`, from which every commit continues, and by the history.
#[derive(Default)]
struct Numbers {
    /// Each with its column.
    meta: [(&'static str, i64); Self::COLUMNS.len()],
    newest_cycle_id: Option<u64>,
    newest_revision: Option<u64>,
}

impl Numbers {
    const COLUMNS: [&str; 5] = ["epoch", "last_cycle_id", "last_revision", "pruned_to", "commits"];

    fn read(&mut self, row: &dyn Row) -> Result<(), Wrong> {
        for (number, column) in self.meta.iter_mut().zip(Self::COLUMNS) {
            *number = (column, integer_of(row, column)?);
        }
        Ok(())
    }

    /// Refuses a state from which no process could continue: the next number already exists, or is out of range.
    fn check(&self) -> Result<(), String> {
        if let Some((column, number)) = self.meta.iter().find(|(_, number)| !(0..i64::MAX).contains(number)) {
            return Err(format!("{column} in its table meta is {number}, which leaves no next number"));
        }
        let meta = |wanted| self.meta.iter().find(|(column, _)| *column == wanted).map_or(0, |(_, number)| *number);
        let (last_cycle_id, last_revision) = (meta("last_cycle_id"), meta("last_revision"));
        for (column, last, newest, is) in [
            ("last_cycle_id", last_cycle_id, self.newest_cycle_id, "is the newest cycle in its history"),
            ("last_revision", last_revision, self.newest_revision, "is the newest revision in its history"),
            (
                "last_revision",
                last_revision,
                Some(meta("pruned_to").unsigned_abs()),
                "is a revision that was already removed",
            ),
        ] {
            if let Some(newest) = newest.map(integer).filter(|newest| *newest > last) {
                return Err(format!("{column} in its table meta is {last}, and {newest} {is}"));
            }
        }
        Ok(())
    }
}

/// Reads sealed tables, and collects unreadable rows separately.
struct SealedRows<'a> {
    sealer: &'a Sealer,
    renewal: &'a mut Option<Renewal>,
    unreadable: &'a mut Vec<UnreadableRow>,
    /// The first row that can be read and has not the seal that belongs to it.
    changed: Option<String>,
}

impl SealedRows<'_> {
    fn read_all<D: Tables>(
        &mut self,
        database: &mut D,
        table: &Table,
        mut read: impl FnMut(&dyn Row, bool) -> Result<(), Wrong>,
    ) -> Result<(), D::Error> {
        let key_column = table.columns[0];
        database.sealed(table, &mut |row| {
            let key = || row.value(key_column).map_or_else(|_| String::new(), key);
            let is_sealed = match self.sealer.check_row(row, table)? {
                Seal::Valid(SealedBy::FirstKey) => true,
                Seal::Valid(SealedBy::OtherKey) => {
                    *self.renewal = (*self.renewal).max(Some(Renewal::OtherKey));
                    true
                }
                Seal::Missing => *self.renewal >= Some(Renewal::Missing),
                Seal::Wrong => *self.renewal == Some(Renewal::Everything),
            };
            match read(row, is_sealed) {
                // It is not used.
                Err(wrong) => {
                    let problem = wrong.to_string();
                    self.unreadable.push(UnreadableRow { what: table.row, key: key(), problem, is_sealed });
                }
                Ok(()) if !is_sealed => {
                    self.changed.get_or_insert_with(|| format!("{} {:?}", table.row, key()));
                }
                Ok(()) => {}
            }
            Ok(())
        })
    }
}
