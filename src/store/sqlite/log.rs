//! The tables of the log of the history.

use std::ops::Range;

use rusqlite::{Connection, OptionalExtension, Transaction};

use super::rows::{Snapshot, number};
use crate::{
    ledger::{Hash, Node, Part},
    model::{CycleId, Revision},
    ports::{PageLimits, Write},
    store::{
        frontier::Appended,
        parts::parts as parts_of,
        pruning::needless_hashes,
        row::{integer, kind_number, nanoseconds},
    },
};

/// The leaf of the record of this cycle, if it has one.
pub(super) fn leaf(connection: &Connection, cycle_id: CycleId) -> rusqlite::Result<Option<u64>> {
    let mut query = connection.prepare_cached("SELECT leaf FROM cycles WHERE cycle_id = ?1")?;
    let leaf = query.query_row([integer(cycle_id.0)], |row| row.get::<_, Option<i64>>(0)).optional()?;
    Ok(leaf.flatten().and_then(|leaf| u64::try_from(leaf).ok()))
}

/// The hashes of these nodes; `None` if one is missing.
pub(super) fn hashes(connection: &Connection, nodes: &[Node]) -> rusqlite::Result<Option<Vec<Hash>>> {
    nodes.iter().map(|node| hash(connection, node.number())).collect()
}

/// The hash of the node with this number, if it is there.
pub(super) fn hash(connection: &Connection, node: u64) -> rusqlite::Result<Option<Hash>> {
    let mut query = connection.prepare_cached("SELECT hash FROM hashes WHERE id = ?1")?;
    let hash = query.query_row([integer(node)], |row| Ok(row.get(0).ok())).optional()?;
    // A value that is not a hash counts as a missing one.
    Ok(hash.flatten().map(Hash))
}

/// The log from the first of these leaves on, in parts; `None` if the hash of one is not retained.
pub(super) fn parts(
    connection: &mut Connection,
    leaves: Range<u64>,
    limits: PageLimits,
) -> rusqlite::Result<Option<Vec<Part>>> {
    // One transaction, so that entries and hashes are those of one time.
    let transaction = connection.transaction()?;
    let logged = transaction.query_row("SELECT unlogged_to, last_revision FROM meta", [], |row| {
        Ok(Revision(number(row, 0)?).next()..Revision(number(row, 1)?).next())
    })?;
    parts_of(&mut Snapshot(&transaction), logged, leaves, limits)
}

/// Appends what `write` appends.
pub(super) fn append(transaction: &Transaction<'_>, write: &Write, appended: &Appended) -> rusqlite::Result<()> {
    for (number, hash) in (appended.first_node..).zip(&appended.nodes) {
        transaction
            .prepare_cached("INSERT INTO hashes (id, hash) VALUES (?1, ?2)")?
            .execute((integer(number), &hash.0[..]))?;
    }
    for (leaf, event) in appended.events(write) {
        transaction
            .prepare_cached(
                "INSERT INTO audit (leaf, kind, time, caller, rpc, denied, event)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute((
                integer(leaf),
                kind_number(event.kind),
                nanoseconds(event.time),
                &event.caller,
                &event.rpc,
                event.denied,
                &event.bytes[..],
            ))?;
    }
    for (leaf, entry) in appended.control(write) {
        transaction
            .prepare_cached("INSERT INTO control (leaf, entry) VALUES (?1, ?2)")?
            .execute((integer(leaf), &entry[..]))?;
    }
    Ok(())
}

/// Removes the hashes that no proof needs any more, in a log of `size` leaves of which these were removed now, and all
/// of these ranges are `gone`.
pub(super) fn forget(
    transaction: &Transaction<'_>,
    removed: &[u64],
    size: u64,
    gone: impl Fn(Range<u64>) -> bool,
) -> rusqlite::Result<()> {
    let mut delete = transaction.prepare_cached("DELETE FROM hashes WHERE id >= ?1 AND id < ?2")?;
    for numbers in needless_hashes(removed, size, gone) {
        delete.execute([numbers.start, numbers.end].map(integer))?;
    }
    Ok(())
}
