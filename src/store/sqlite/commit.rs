//! One commit: its rows, in one transaction that checks the epoch.

use std::{fs, iter, ops::Range};

use rusqlite::{Connection, OptionalExtension, Row, ToSql, Transaction, TransactionBehavior};

use super::{
    counts::Counts,
    identity::Identity,
    log,
    note::Mark,
    rows::{epoch, integer, kind_number, nanoseconds, number, state_number, to_json, trigger_number},
    seal::{LOOPS, OPEN_CYCLES, OUTPUTS, SUBSYSTEMS, Seal, Sealer},
};
use crate::{
    ledger::Leaves,
    model::{Epoch, Name, Revision, Trigger},
    ports::{Durability, Log, OldEvent, OldRecord, Removal, Stage, Write},
    store::frontier::{Appended, Frontier},
};

/// The term of one epoch as the writer.
pub(super) struct Term {
    pub(super) epoch: Epoch,
    /// The epoch of the database while no other process has taken over: this one from its first commit on.
    pub(super) current: Epoch,
    pub(super) database_id: [u8; 16],
    /// Number of all commits so far.
    pub(super) commits: u64,
    /// The highest revision that was ever removed.
    pub(super) pruned_to: Revision,
    /// The highest revision of the records that are older than the log.
    pub(super) unlogged_to: Revision,
    pub(super) counts: Counts,
    pub(super) frontier: Frontier,
    /// The leaves that retention has removed: those below `log.first_kept` of the frontier, and others.
    pub(super) removed: Leaves,
    /// The leaves that were missing when the entries were counted anew, so that they are in no number of `counts`.
    pub(super) accepted: Leaves,
    /// Number of leaves in `removed`.
    pub(super) removed_count: u64,
    /// The leaf of the entry with which the entries were counted anew.
    pub(super) counted_at: Option<u64>,
    pub(super) sealer: Sealer,
    /// What the first commit of the term seals anew, if anything.
    pub(super) renewal: Option<Renewal>,
}

/// The rows that are sealed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Renewal {
    /// Those that another key has sealed.
    OtherKey,
    /// Those without a seal as well: an earlier version wrote the database.
    Missing,
    /// Those with a wrong seal as well.
    Everything,
}

impl Term {
    /// Writes in one transaction; or else returns the epoch that has taken over, and then nothing was written.
    pub(super) fn transact(
        &self,
        connection: &mut Connection,
        here: &Identity,
        write: &Write,
        appended: &Appended,
    ) -> rusqlite::Result<Result<Written, Epoch>> {
        let last_revision = write.records.last().map_or(self.frontier.last_revision, |record| record.revision);
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if !write.removal.is_empty() {
            // Another process may have removed the same.
            let epoch = epoch(&transaction)?;
            if epoch != self.current {
                return Ok(Err(epoch));
            }
        }
        let mut counts = self.counts;
        let removed = remove_entries(&transaction, write, &mut counts)?;
        counts.add(write);
        let gone: Leaves =
            if removed.is_empty() { Leaves::default() } else { ranges(&removed, &appended.log).collect() };
        let removed_count = self.removed_count + self.removed.count_missing(&gone);
        let counted_at = self.counted_at_by(write, appended);
        let values = [
            integer(self.epoch.0),
            integer(write.last_cycle_id.0),
            integer(last_revision.0),
            integer(self.pruned_to_by(write).0),
            integer(self.commits + 1),
            write.close.into(),
            integer(appended.log.first_kept),
            integer(removed_count),
            counted_at.map_or(-1, integer),
            integer(self.unlogged_to.0),
        ];
        let current = integer(self.current.0);
        if !self.sealer.put_end(&transaction, &appended.log.frontier, values, counts, current)? {
            return Ok(Err(epoch(&transaction)?));
        }
        if self.current != self.epoch {
            transaction.execute("UPDATE meta SET boot_id = ?1", [boot_id()])?;
            here.note(&transaction)?;
            if let Some(renewal) = self.renewal {
                self.sealer.renew(&transaction, renewal)?;
            }
        }
        put_cycles(&transaction, &self.sealer, write, appended)?;
        log::append(&transaction, write, appended)?;
        if !removed.is_empty() {
            let gone = |leaves| self.removed.contain_with(&gone, leaves);
            log::forget(&transaction, &removed, appended.log.frontier.size(), gone)?;
        }
        put_knowledge(&transaction, &self.sealer, write)?;
        transaction.commit()?;
        Ok(Ok(Written { counts, gone, removed_count, counted_at }))
    }

    /// Advances by `write`, and by what it has appended to the log and removed from it.
    pub(super) fn advance(&mut self, write: &Write, appended: Appended, written: Written) {
        let Written { counts, gone, removed_count, counted_at } = written;
        (self.counts, self.removed_count, self.counted_at) = (counts, removed_count, counted_at);
        gone.ranges().for_each(|leaves| self.removed.add(leaves));
        self.current = self.epoch;
        self.commits += 1;
        self.pruned_to = self.pruned_to_by(write);
        self.frontier.advance(write, appended);
    }

    /// The leaf of the entry with which the entries were counted anew, after this write.
    fn counted_at_by(&self, write: &Write, appended: &Appended) -> Option<u64> {
        let is_anew = self.current != self.epoch && self.renewal == Some(Renewal::Everything);
        let began = appended.control(write).next().filter(|_| is_anew && write.began.is_some());
        began.map_or(self.counted_at, |(leaf, _)| Some(leaf))
    }

    /// The highest revision that was ever removed, after this write.
    fn pruned_to_by(&self, write: &Write) -> Revision {
        write.removal.records.last().map(|record| record.revision).unwrap_or_default().max(self.pruned_to)
    }

    pub(super) fn mark(&self) -> Mark {
        let Frontier { last_cycle_id, last_revision, .. } = self.frontier;
        Mark { id: self.database_id, commits: self.commits, last_cycle_id, last_revision }
    }
}

/// What a transaction has changed, beside what the write says.
pub(super) struct Written {
    counts: Counts,
    /// The leaves of all entries that it has removed, and all before the first one that is kept.
    gone: Leaves,
    removed_count: u64,
    counted_at: Option<u64>,
}

/// These removed leaves, and all before the first one that this log keeps.
fn ranges(removed: &[u64], log: &Log) -> impl Iterator<Item = Range<u64>> {
    removed.iter().map(|leaf| *leaf..*leaf + 1).chain(iter::once(0..log.first_kept))
}

/// Sets the durability of further commits.
pub(super) fn synchronize(connection: &Connection, durability: Durability) -> rusqlite::Result<()> {
    let level = match durability {
        Durability::Durable => "FULL",
        Durability::Buffered => "NORMAL",
    };
    connection.pragma_update(None, "synchronous", level)
}

fn put_cycles(
    transaction: &Transaction<'_>,
    sealer: &Sealer,
    write: &Write,
    appended: &Appended,
) -> rusqlite::Result<()> {
    for open in &write.open {
        let (trigger, started_at, request) = match &open.stage {
            Stage::Waiting(request) => (trigger_number(&open.trigger), None, request.as_deref()),
            Stage::Begun(at) => (trigger_number(&open.trigger), Some(nanoseconds(*at)), None),
            Stage::Unknown | Stage::Unsealed => (trigger_number(&Trigger::Unknown), None, None),
        };
        let values: [&dyn ToSql; _] = [
            &integer(open.cycle_id.0),
            &trigger,
            &open.trigger.loop_name().map(Name::as_str),
            &nanoseconds(open.scheduled_at),
            &started_at,
            &open.request_id,
            &open.triggered_by.as_ref().map(ToString::to_string),
            &open.trace_id.map(|trace_id| trace_id.0.to_be_bytes()),
            &request,
            &open.audit.as_deref(),
        ];
        sealer.put(transaction, &OPEN_CYCLES, values)?;
    }
    for (leaf, record) in appended.records(write) {
        transaction
            .prepare_cached(
                "INSERT INTO cycles
                 (cycle_id, revision, epoch, state, trigger, loop, request_id, triggered_by, finished_at, leaf, record)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
            )?
            .execute((
                integer(record.cycle_id.0),
                integer(record.revision.0),
                integer(record.epoch.0),
                state_number(record.state),
                trigger_number(&record.trigger),
                record.trigger.loop_name().map(Name::as_str),
                &record.request_id,
                record.triggered_by.as_ref().map(ToString::to_string),
                nanoseconds(record.finished_at),
                integer(leaf),
                &record.bytes[..],
            ))?;
        transaction
            .prepare_cached("DELETE FROM open_cycles WHERE cycle_id = ?1")?
            .execute([integer(record.cycle_id.0)])?;
    }
    Ok(())
}

/// Removes entries, and returns their leaves, lowest first.
///
/// # Errors
/// One of them is not what was found any more: its row would say otherwise what is counted and removed.
fn remove_entries(transaction: &Transaction<'_>, write: &Write, counts: &mut Counts) -> rusqlite::Result<Vec<u64>> {
    let Removal { records, events, first_kept, .. } = &write.removal;
    if write.removal.is_empty() {
        return Ok(Vec::new());
    }
    let check = |rows, what: &dyn Fn() -> String| {
        if rows > 0 {
            return Ok(());
        }
        let problem = format!("{} is not what retention has found any more, so nothing was removed", what());
        Err(rusqlite::Error::ToSqlConversionFailure(problem.into()))
    };
    let mut leaves = Vec::new();
    let mut remove =
        transaction.prepare_cached("DELETE FROM cycles WHERE revision = ?1 AND leaf IS ?2 AND state = ?3")?;
    for OldRecord { revision, leaf, state } in records {
        let rows = remove.execute((integer(revision.0), leaf.map(integer), state_number(*state)))?;
        check(rows, &|| format!("the record of revision {revision}"))?;
        counts.remove_record(*state);
        leaves.extend(*leaf);
    }
    let mut remove = transaction.prepare_cached("DELETE FROM audit WHERE leaf = ?1 AND kind = ?2")?;
    for OldEvent { leaf, kind } in events {
        let rows = remove.execute((integer(*leaf), kind_number(*kind)))?;
        check(rows, &|| format!("the audit event of leaf {leaf}"))?;
        counts.remove_event(*kind);
        leaves.push(*leaf);
    }
    // The entry of this removal replaces them.
    let mut query = transaction.prepare_cached("DELETE FROM control WHERE leaf >= 0 AND leaf < ?1 RETURNING leaf")?;
    let control = query.query_map([integer(*first_kept)], |row| number(row, 0))?;
    for leaf in control {
        leaves.push(leaf?);
    }
    leaves.sort_unstable();
    Ok(leaves)
}

fn put_knowledge(transaction: &Transaction<'_>, sealer: &Sealer, write: &Write) -> rusqlite::Result<()> {
    for (name, output) in &write.outputs {
        let payload = &output.payload.as_bytes()[..];
        sealer.put(transaction, &OUTPUTS, [&name.as_str(), &integer(output.cycle_id.0), &payload])?;
    }
    for (former, name) in &write.renamed {
        rename(transaction, sealer, former, name)?;
    }
    for (name, stored) in &write.subsystems {
        match stored {
            Some(stored) => {
                let values: [&dyn ToSql; _] = [
                    &name.as_str(),
                    &stored.spec.as_ref().map(to_json).transpose()?,
                    &stored.lease.map(|lease| i64::try_from(lease.as_millis()).unwrap_or(i64::MAX)),
                    &stored.suspended,
                    &stored.owner.as_ref().map(ToString::to_string),
                    &(!stored.former_names.is_empty()).then(|| to_json(&stored.former_names)).transpose()?,
                ];
                sealer.put(transaction, &SUBSYSTEMS, values)?;
            }
            None => {
                for forget in ["DELETE FROM subsystems WHERE name = ?1", "DELETE FROM outputs WHERE name = ?1"] {
                    transaction.prepare_cached(forget)?.execute([name.as_str()])?;
                }
            }
        }
    }
    for (name, stored) in &write.loops {
        match stored {
            Some(stored) => {
                let spec = stored.spec.as_ref().map(to_json).transpose()?;
                sealer.put(transaction, &LOOPS, [&name.as_str(), &spec, &to_json(&stored.state)?])?;
            }
            None => {
                transaction.prepare_cached("DELETE FROM loops WHERE name = ?1")?.execute([name.as_str()])?;
            }
        }
    }
    Ok(())
}

/// Moves the output of a subsystem to its new name, and removes its row of the former one. An output that another
/// program has changed stays as it is: the next start finds that its seal is wrong.
fn rename(transaction: &Transaction<'_>, sealer: &Sealer, former: &Name, name: &Name) -> rusqlite::Result<()> {
    let of_row = |row: &Row<'_>| {
        let is_ours = matches!(sealer.check_row(row, &OUTPUTS)?, Seal::Valid(_));
        is_ours.then(|| Ok((row.get::<_, i64>("cycle_id")?, row.get::<_, Vec<u8>>("payload")?))).transpose()
    };
    let mut query = transaction.prepare_cached("SELECT * FROM outputs WHERE name = ?1")?;
    let output = query.query_row([former.as_str()], of_row).optional()?.flatten();
    if let Some((cycle_id, payload)) = output {
        sealer.put(transaction, &OUTPUTS, [&name.as_str(), &cycle_id, &payload])?;
        transaction.prepare_cached("DELETE FROM outputs WHERE name = ?1")?.execute([former.as_str()])?;
    }
    transaction.prepare_cached("DELETE FROM subsystems WHERE name = ?1")?.execute([former.as_str()])?;
    Ok(())
}

/// The boot id of the machine from `/proc`; `None` if it does not exist.
pub(super) fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}
