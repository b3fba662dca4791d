//! Reads what an earlier process left in a database: all tables except the history. Unreadable rows are collected
//! beside the readable ones.

use std::{path::Path, time::Duration};

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};

use super::{
    commit::{Renewal, boot_id},
    counts::Counts,
    error::explain,
    log::{self, Said},
    note::Mark,
    rows::{
        COLUMNS, HAS_REVISION, Reading, identity, integer, json, key, name, number, open_cycle, read, time,
        unknown_cycle, wrong,
    },
    seal::{LOOPS, OPEN_CYCLES, OUTPUTS, SUBSYSTEMS, Seal, Sealer, Table},
    walk::recount,
};
use crate::{
    clock::Clock,
    ledger::SealedBy,
    model::{CycleId, Epoch, Output, Payload, Revision, text::count},
    ports::{
        Checks, Contents, Log, Seals, Stage, StoreError, StoredLoop, StoredOutput, StoredSubsystem, UnreadableRow,
    },
};

/// What a database contains.
pub(super) struct Read {
    pub(super) contents: Contents,
    /// The stored epoch.
    pub(super) current: Epoch,
    pub(super) mark: Mark,
    /// The highest revision of the records that are older than the log.
    pub(super) unlogged_to: Revision,
    pub(super) counts: Counts,
    pub(super) log: Log,
    pub(super) said: Said,
    /// The leaf of the entry with which the entries were counted anew.
    pub(super) counted_at: Option<u64>,
    pub(super) sealer: Sealer,
    /// The rows that are to be sealed anew.
    pub(super) renewal: Option<Renewal>,
}

/// Reads all tables except the history, with the next epoch, and checks all seals.
///
/// # Errors
/// It can't be read, no process could continue from it, or a seal does not belong to what it seals.
pub(super) fn read_contents(
    connection: &mut Connection,
    path: &Path,
    checks: Checks,
    clock: Clock,
    seals: Seals,
) -> Result<Read, StoreError> {
    let explained = |error| explain(path, &error);
    let transaction = connection.transaction().map_err(explained)?;
    let numbers = Numbers::read(&transaction).map_err(explained)?;
    numbers.check().map_err(|problem| StoreError::Corrupt { store: path.display().to_string(), problem })?;
    let (current, mark, mut contents) = (|| {
        let boot_id = boot_id();
        let (current, mark, unlogged_to, mut contents) = transaction.query_row("SELECT * FROM meta", [], |row| {
            let (was_closed, last_boot_id): (bool, Option<String>) = (row.get("is_closed")?, row.get("boot_id")?);
            let (current, mark) = (Epoch(number(row, "epoch")?), Mark::of_row(row)?);
            let unlogged_to = Revision(number(row, "unlogged_to")?);
            let contents = Contents {
                epoch: current.next().max(Epoch::by_clock(clock.now())),
                last_cycle_id: mark.last_cycle_id,
                last_revision: mark.last_revision,
                pruned_to: Revision(number(row, "pruned_to")?),
                may_lack_open: !was_closed && (boot_id.is_none() || last_boot_id != boot_id),
                ..Contents::default()
            };
            Ok((current, mark, unlogged_to, contents))
        })?;
        contents.last_record = transaction
            .query_row(
                &format!("SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} ORDER BY revision DESC LIMIT 1"),
                [],
                |row| Ok(read(&transaction, row, Reading { check: checks.record, unlogged_to })),
            )
            .optional()?;
        Ok((current, mark, contents))
    })()
    .map_err(explained)?;
    let mut log = log::read(&transaction, path)?;
    let (keys, are_checked) = match seals {
        Seals::Checked(keys) => (keys, true),
        Seals::Renewed(keys) => (keys, false),
    };
    let sealer = Sealer::new(keys, mark.id);
    let of_end = |row: &Row<'_>| {
        let unlogged_to = Revision(number(row, "unlogged_to")?);
        let (removed, counted_at): (_, i64) = (number(row, "log_removed")?, row.get("log_counted_at")?);
        let counted_at = u64::try_from(counted_at).ok();
        Ok((sealer.check_end(row, &log.frontier)?, (unlogged_to, removed, counted_at), Counts::of_row(row)?))
    };
    let (seal, numbers, mut counts) = transaction.query_row("SELECT * FROM meta", [], of_end).map_err(explained)?;
    let (mut unlogged_to, removed, mut counted_at) = numbers;
    let mut renewal = match seal {
        _ if !are_checked => Some(Renewal::Everything),
        Seal::Valid(SealedBy::FirstKey) => None,
        Seal::Valid(SealedBy::OtherKey) => Some(Renewal::OtherKey),
        // The log came with its seal, so an earlier version has written neither.
        Seal::Missing if log.frontier.size() == 0 => Some(Renewal::Missing),
        Seal::Missing | Seal::Wrong => {
            let entries = count(log.frontier.size(), "entry");
            let problem = format!("the seal of its log does not belong to its {entries} and its table meta");
            return Err(tampered(path, problem));
        }
    };
    let said = if matches!(renewal, Some(Renewal::Missing | Renewal::Everything)) {
        check_unsealed_epoch(current)
            .map_err(|problem| StoreError::Corrupt { store: path.display().to_string(), problem })?;
        let recounted = recount(&transaction, checks, &log).map_err(explained)?;
        (log, counts, unlogged_to) = (recounted.log, recounted.counts, recounted.unlogged_to);
        (contents.missing, counted_at) = (recounted.said.accepted.ranges().collect(), None);
        recounted.said
    } else {
        let accepted = log::accepted(&transaction, &log, checks.control, counted_at).map_err(explained)?;
        let said = accepted.map(|accepted| log::said(&transaction, &log, checks.control, accepted));
        said.transpose().map_err(explained)?.filter(|said| said.removed.count() == removed).ok_or_else(|| {
            tampered(
                path,
                "entries of its log about removals, or about a new log, are missing or have come back".into(),
            )
        })?
    };
    let (mut unreadable, mut changed) = (Vec::new(), None);
    let mut rows = Rows {
        transaction: &transaction,
        path,
        sealer: &sealer,
        renewal: &mut renewal,
        unreadable: &mut unreadable,
        changed: &mut changed,
    };
    let noted = 1..=integer(contents.last_cycle_id.0);
    let open = "SELECT *, EXISTS (SELECT 1 FROM cycles WHERE cycle_id = open_cycles.cycle_id) AS is_recorded
                FROM open_cycles ORDER BY cycle_id";
    rows.read_all(&OPEN_CYCLES, open, |row, is_sealed| {
        let cycle_id: i64 = row.get("cycle_id")?;
        if !noted.contains(&cycle_id) {
            return Err(wrong(row, "cycle_id", NotOpen("its number was given to no cycle")));
        }
        if row.get("is_recorded")? {
            return Err(wrong(row, "cycle_id", NotOpen("it is recorded")));
        }
        let read = open_cycle(row);
        let stage = if is_sealed { Stage::Unknown } else { Stage::Unsealed };
        let unknown = |_| unknown_cycle(CycleId(cycle_id.unsigned_abs()), stage);
        contents.open.push(read.as_ref().map_or_else(unknown, Clone::clone));
        read.map(drop)
    })?;
    contents.subsystems = rows.read_all(&SUBSYSTEMS, "SELECT * FROM subsystems ORDER BY name", |row, _| {
        let lease_ms: Option<i64> = row.get("lease_ms")?;
        Ok(StoredSubsystem {
            name: name(row, "name")?,
            spec: json(row, "spec")?,
            lease: lease_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
            suspended: row.get("suspended")?,
            owner: identity(row, "owner")?,
            former_names: json(row, "former_names")?.unwrap_or_default(),
        })
    })?;
    contents.loops = rows.read_all(&LOOPS, "SELECT * FROM loops ORDER BY name", |row, _| {
        let state = json(row, "state")?.unwrap_or_default();
        Ok(StoredLoop { name: name(row, "name")?, spec: json(row, "spec")?, state })
    })?;
    let outputs = "SELECT outputs.*, finished_at FROM outputs LEFT JOIN cycles USING (cycle_id) ORDER BY name";
    contents.outputs = rows.read_all(&OUTPUTS, outputs, |row, _| {
        let bytes: Vec<u8> = row.get("payload")?;
        let payload = Payload::check(bytes.into()).map_err(|malformed| wrong(row, "payload", malformed))?;
        let finished_at: Option<i64> = row.get("finished_at")?;
        Ok(StoredOutput {
            name: name(row, "name")?,
            output: Output { cycle_id: CycleId(number(row, "cycle_id")?), payload },
            finished_at: finished_at.map(|_| time(row, "finished_at")).transpose()?,
        })
    })?;
    if let Some(changed) = changed {
        return Err(tampered(path, format!("the seal of its {changed} does not belong to what it contains now")));
    }
    contents.unreadable = unreadable;
    let Contents { last_cycle_id, open, subsystems, loops, outputs, unreadable, .. } = &contents;
    let has_rows =
        !(open.is_empty() && subsystems.is_empty() && loops.is_empty() && outputs.is_empty() && unreadable.is_empty());
    let is_empty = *last_cycle_id == CycleId(0) && !has_rows;
    contents.is_sealed = is_empty || (are_checked && seal != Seal::Missing);
    Ok(Read { contents, current, mark, unlogged_to, counts, log, said, counted_at, sealer, renewal })
}

/// Refuses an epoch that no clock can have given, if nothing shows that this software wrote it: the next epochs would
/// be used up soon, and subsystems would refuse those of another store.
pub(super) fn check_unsealed_epoch(epoch: Epoch) -> Result<(), String> {
    if epoch <= Epoch::by_clock(Timestamp::MAX) {
        return Ok(());
    }
    Err(format!("epoch in its table meta is {epoch}, which no clock gives, and it has no seal"))
}

fn tampered(path: &Path, problem: String) -> StoreError {
    StoreError::Tampered { store: path.display().to_string(), problem }
}

/// The extent of a database: by its table `meta`, from which every commit continues, and by the history.
pub(super) struct Numbers {
    /// Each with its column.
    meta: [(&'static str, i64); 5],
    newest_cycle_id: Option<i64>,
    newest_revision: Option<i64>,
}

impl Numbers {
    const COLUMNS: [&str; 5] = ["epoch", "last_cycle_id", "last_revision", "pruned_to", "commits"];

    pub(super) fn read(connection: &Connection) -> rusqlite::Result<Self> {
        // Each from the end of its index. A revision that is not a number belongs to an unreadable record.
        let newest = |column: &str| {
            let newest = format!(
                "SELECT {column} FROM cycles WHERE typeof({column}) = 'integer' ORDER BY {column} DESC LIMIT 1"
            );
            connection.query_row(&newest, [], |row| row.get(0)).optional()
        };
        connection.query_row("SELECT * FROM meta", [], |row| {
            let mut meta = Self::COLUMNS.map(|column| (column, 0));
            for (column, number) in &mut meta {
                *number = row.get(*column)?;
            }
            Ok(Self { meta, newest_cycle_id: newest("cycle_id")?, newest_revision: newest("revision")? })
        })
    }

    /// Refuses a state from which no process could continue: the next number already exists, or is out of range.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some((column, number)) = self.meta.iter().find(|(_, number)| !(0..i64::MAX).contains(number)) {
            return Err(format!("{column} in its table meta is {number}, which leaves no next number"));
        }
        let meta = |wanted| self.meta.iter().find(|(column, _)| *column == wanted).map_or(0, |(_, number)| *number);
        let (last_cycle_id, last_revision) = (meta("last_cycle_id"), meta("last_revision"));
        for (column, last, newest, is) in [
            ("last_cycle_id", last_cycle_id, self.newest_cycle_id, "is the newest cycle in its history"),
            ("last_revision", last_revision, self.newest_revision, "is the newest revision in its history"),
            ("last_revision", last_revision, Some(meta("pruned_to")), "is a revision that was already removed"),
        ] {
            if let Some(newest) = newest.filter(|newest| *newest > last) {
                return Err(format!("{column} in its table meta is {last}, and {newest} {is}"));
            }
        }
        Ok(())
    }
}

/// Reads tables, and collects unreadable rows separately.
struct Rows<'a> {
    transaction: &'a Transaction<'a>,
    path: &'a Path,
    sealer: &'a Sealer,
    renewal: &'a mut Option<Renewal>,
    unreadable: &'a mut Vec<UnreadableRow>,
    /// The first row that can be read and has not the seal that belongs to it.
    changed: &'a mut Option<String>,
}

impl Rows<'_> {
    fn read_all<T>(
        &mut self,
        table: &Table,
        query: &str,
        mut read: impl FnMut(&Row<'_>, bool) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let mut all = Vec::new();
        let mut read_rows = || {
            let mut query = self.transaction.prepare(query)?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let key = || row.get_ref(0).map_or_else(|_| String::new(), key);
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
                    Ok(read) => all.push(read),
                    Err(error) => {
                        let problem = error.to_string();
                        self.unreadable.push(UnreadableRow { what: table.row, key: key(), problem, is_sealed });
                        // It is not used.
                        continue;
                    }
                }
                if !is_sealed {
                    self.changed.get_or_insert_with(|| format!("{} {:?}", table.row, key()));
                }
            }
            Ok(())
        };
        read_rows().map_err(|error| explain(self.path, &error))?;
        Ok(all)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("it is not open: {0}")]
struct NotOpen(&'static str);
