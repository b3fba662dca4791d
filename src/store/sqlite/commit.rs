//! One commit: its rows, in one transaction that checks the epoch.

use std::fs;

use rusqlite::{Connection, OptionalExtension, Row, ToSql, Transaction, TransactionBehavior};

use super::{
    identity::Identity,
    log,
    rows::{epoch, number, to_json},
    seal::{put, put_end, renew},
};
use crate::{
    model::{Epoch, Name},
    ports::{Durability, OldEvent, OldRecord, Removal, Write},
    store::{
        frontier::Appended,
        row::{integer, kind_number, nanoseconds, stage_columns, state_number, trigger_number},
        seal::{LOOPS, OPEN_CYCLES, OUTPUTS, SUBSYSTEMS, Seal, Sealer},
        term::{Next, Term},
    },
};

/// Writes in one transaction; or else returns the epoch that has taken over, and then nothing was written.
pub(super) fn transact(
    term: &Term,
    connection: &mut Connection,
    file: &Identity,
    write: &Write,
    appended: &Appended,
) -> rusqlite::Result<Result<Next, Epoch>> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if !write.removal.is_empty() {
        // Another process may have removed the same.
        let epoch = epoch(&transaction)?;
        if epoch != term.current {
            return Ok(Err(epoch));
        }
    }
    let removed = remove_entries(&transaction, write)?;
    let next = term.next(write, appended, &removed);
    if !put_end(&transaction, &term.sealer, &appended.log.frontier, &next, integer(term.current.0))? {
        return Ok(Err(epoch(&transaction)?));
    }
    if term.current != term.epoch {
        transaction.execute("UPDATE meta SET boot_id = ?1", [boot_id()])?;
        file.note(&transaction)?;
        if let Some(renewal) = term.renews() {
            renew(&transaction, &term.sealer, renewal)?;
        }
    }
    put_cycles(&transaction, &term.sealer, write, appended)?;
    log::append(&transaction, write, appended)?;
    if !removed.is_empty() {
        let gone = |leaves| term.removed.contain_with(&next.gone, leaves);
        log::forget(&transaction, &removed, appended.log.frontier.size(), gone)?;
    }
    put_knowledge(&transaction, &term.sealer, write)?;
    transaction.commit()?;
    Ok(Ok(next))
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
        let (trigger, started_at, request) = stage_columns(open);
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
        put(transaction, sealer, &OPEN_CYCLES, values)?;
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
fn remove_entries(transaction: &Transaction<'_>, write: &Write) -> rusqlite::Result<Vec<u64>> {
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
        leaves.extend(*leaf);
    }
    let mut remove = transaction.prepare_cached("DELETE FROM audit WHERE leaf = ?1 AND kind = ?2")?;
    for OldEvent { leaf, kind } in events {
        let rows = remove.execute((integer(*leaf), kind_number(*kind)))?;
        check(rows, &|| format!("the audit event of leaf {leaf}"))?;
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
        put(transaction, sealer, &OUTPUTS, [&name.as_str(), &integer(output.cycle_id.0), &payload])?;
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
                put(transaction, sealer, &SUBSYSTEMS, values)?;
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
                put(transaction, sealer, &LOOPS, [&name.as_str(), &spec, &to_json(&stored.state)?])?;
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
        put(transaction, sealer, &OUTPUTS, [&name.as_str(), &cycle_id, &payload])?;
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
