//! The tables of the log of the history.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rusqlite::{Connection, OptionalExtension, Transaction, named_params};

use super::{
    error::explain,
    rows::{HAS_REVISION, integer, kind_number, nanoseconds, number},
};
use crate::{
    ledger::{Entry, Frontier, Hash, Node},
    model::{CycleId, Revision},
    ports::{Log, StoreError, Write},
    store::{frontier::Appended, pruning::needless_hashes},
};

/// The log as of the last durable commit, for readers.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedLog(Arc<Mutex<Log>>);

impl SharedLog {
    pub(super) fn get(&self) -> Log {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, log: &Log) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone_from(log);
    }
}

/// The log of a database that is taken over.
pub(super) fn read(connection: &Connection, path: &Path) -> Result<Log, StoreError> {
    let read = || {
        let (size, first_kept) = connection
            .query_row("SELECT log_size, log_first_kept FROM meta", [], |row| Ok((number(row, 0)?, number(row, 1)?)))?;
        let end = connection.query_row("SELECT max(id) + 1 FROM hashes", [], |row| row.get::<_, Option<i64>>(0))?;
        let frontier = hashes(connection, &Frontier::nodes(size))?.and_then(|roots| Frontier::of(size, roots));
        let frontier = frontier.filter(|_| end.unwrap_or_default() == integer(Node::complete_with(size)));
        Ok((size, frontier.map(|frontier| Log { frontier, first_kept })))
    };
    let (size, log) = read().map_err(|error| explain(path, &error))?;
    log.ok_or_else(|| StoreError::Corrupt {
        store: path.display().to_string(),
        problem: format!("log_size in its table meta is {size}, and its table hashes is not that of such a log"),
    })
}

/// The leaf of the record of this cycle, if it has one.
pub(super) fn leaf(connection: &Connection, cycle_id: CycleId) -> rusqlite::Result<Option<u64>> {
    let mut query = connection.prepare_cached("SELECT leaf FROM cycles WHERE cycle_id = ?1")?;
    let leaf = query.query_row([integer(cycle_id.0)], |row| row.get::<_, Option<i64>>(0)).optional()?;
    Ok(leaf.flatten().map(i64::unsigned_abs))
}

/// The hashes of these nodes; `None` if one is missing.
pub(super) fn hashes(connection: &Connection, nodes: &[Node]) -> rusqlite::Result<Option<Vec<Hash>>> {
    let mut query = connection.prepare_cached("SELECT hash FROM hashes WHERE id = ?1")?;
    let mut hash = |node: &Node| query.query_row([integer(node.number())], |row| row.get(0)).optional();
    nodes.iter().map(|node| Ok(hash(node)?.map(Hash))).collect()
}

/// Checks that an entry is the one that was appended as this leaf.
///
/// # Errors
/// They are not, or the hash can't be read.
pub(super) fn check(connection: &Connection, leaf: u64, entry: Entry<'_>) -> Result<(), String> {
    match hashes(connection, &[Node::of_leaf(leaf)]).map_err(|error| error.to_string())?.as_deref() {
        Some([hash]) if *hash == entry.leaf() => Ok(()),
        Some(_) => Err(format!("its bytes were changed: they don't have the hash of leaf {leaf} of the log")),
        None => Err(format!("the log does not contain its leaf {leaf}")),
    }
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
                 VALUES (:leaf, :kind, :time, :caller, :rpc, :denied, :event)",
            )?
            .execute(named_params! {
                ":leaf": integer(leaf),
                ":kind": kind_number(event.kind),
                ":time": nanoseconds(event.time),
                ":caller": event.caller,
                ":rpc": event.rpc,
                ":denied": event.denied,
                ":event": &event.bytes[..],
            })?;
        transaction
            .prepare_cached("UPDATE audit_counts SET events = events + 1 WHERE kind = ?1")?
            .execute([kind_number(event.kind)])?;
    }
    for (leaf, entry) in appended.control(write) {
        transaction
            .prepare_cached("INSERT INTO control (leaf, entry) VALUES (?1, ?2)")?
            .execute((integer(leaf), &entry[..]))?;
    }
    Ok(())
}

/// Removes the hashes that no proof needs any more, in a log of `size` leaves of which these were removed.
pub(super) fn forget(transaction: &Transaction<'_>, removed: &[u64], size: u64) -> rusqlite::Result<()> {
    let mut entries = transaction.prepare_cached(
        "SELECT 1 FROM cycles WHERE leaf >= ?1 AND leaf < ?2 UNION ALL SELECT 1 FROM audit WHERE leaf >= ?1 AND leaf < ?2
         UNION ALL SELECT 1 FROM control WHERE leaf >= ?1 AND leaf < ?2",
    )?;
    let gone = |leaves: Range<u64>| entries.exists([leaves.start, leaves.end].map(integer)).map(|exists| !exists);
    let mut delete = transaction.prepare_cached("DELETE FROM hashes WHERE id >= ?1 AND id < ?2")?;
    for numbers in needless_hashes(removed, size, gone)? {
        delete.execute([numbers.start, numbers.end].map(integer))?;
    }
    Ok(())
}

/// The leaves of these records, and the first leaf that is kept without them and without these audit events: the lower
/// one of that of the record with the lowest revision, or 0 if this is older than the log, and that of the first event.
pub(super) fn leaves_of(
    connection: &Connection,
    revisions: &[Revision],
    events: &[u64],
) -> rusqlite::Result<(Vec<Option<u64>>, u64)> {
    let mut query = connection.prepare_cached("SELECT leaf FROM cycles WHERE revision = ?1")?;
    let mut leaf = |revision: &Revision| query.query_row([integer(revision.0)], |row| row.get::<_, Option<i64>>(0));
    let leaves = revisions.iter().map(|revision| Ok(leaf(revision)?.map(i64::unsigned_abs)));
    let leaves = leaves.collect::<rusqlite::Result<_>>()?;
    let mut query = connection.prepare_cached("SELECT leaf FROM audit ORDER BY leaf LIMIT ?1")?;
    let oldest = query.query_map([integer(events.len() as u64 + 1)], |row| number(row, 0))?;
    let oldest = oldest.collect::<rusqlite::Result<Vec<_>>>()?;
    let first_event = oldest.into_iter().find(|leaf| events.binary_search(leaf).is_err()).unwrap_or(u64::MAX);
    let mut query = connection.prepare_cached(&format!(
        "SELECT revision, leaf FROM cycles WHERE {HAS_REVISION} ORDER BY revision LIMIT ?1"
    ))?;
    let mut rows = query.query([integer(revisions.len() as u64 + 1)])?;
    while let Some(row) = rows.next()? {
        if revisions.binary_search(&Revision(number(row, 0)?)).is_err() {
            let first_record = row.get::<_, Option<i64>>(1)?.map_or(0, i64::unsigned_abs);
            return Ok((leaves, first_record.min(first_event)));
        }
    }
    Ok((leaves, 0))
}
