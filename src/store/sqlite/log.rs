//! The tables of the log of the history.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rusqlite::{Connection, OptionalExtension, Row, Transaction, named_params, types::ValueRef};

use super::{
    error::explain,
    rows::{HAS_REVISION, MAX_RECORD, integer, kind_number, nanoseconds, number},
};
use crate::{
    ledger::{Content, Entry, Frontier, Hash, Node, Part},
    model::{CycleId, Revision},
    ports::{Log, PageLimits, StoreError, Write},
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
    nodes.iter().map(|node| hash(connection, *node)).collect()
}

/// The hash of this node, if it is there.
fn hash(connection: &Connection, node: Node) -> rusqlite::Result<Option<Hash>> {
    let mut query = connection.prepare_cached("SELECT hash FROM hashes WHERE id = ?1")?;
    Ok(query.query_row([integer(node.number())], |row| row.get(0)).optional()?.map(Hash))
}

/// True if the table of no kind has an entry of these leaves.
fn is_gone(connection: &Connection, leaves: Range<u64>) -> rusqlite::Result<bool> {
    let mut entries = connection.prepare_cached(
        "SELECT 1 FROM cycles WHERE leaf >= ?1 AND leaf < ?2 UNION ALL SELECT 1 FROM audit WHERE leaf >= ?1 AND leaf < ?2
         UNION ALL SELECT 1 FROM control WHERE leaf >= ?1 AND leaf < ?2",
    )?;
    Ok(!entries.exists([leaves.start, leaves.end].map(integer))?)
}

/// The log from the first of these leaves on, in parts; `None` if the hash of one is not retained.
pub(super) fn parts(
    connection: &mut Connection,
    leaves: Range<u64>,
    limits: PageLimits,
) -> rusqlite::Result<Option<Vec<Part>>> {
    // One transaction, so that entries and hashes are those of one time.
    let transaction = connection.transaction()?;
    let mut query = transaction.prepare_cached(
        "SELECT leaf, 1, record FROM cycles WHERE leaf >= ?1 AND leaf < ?2
         UNION ALL SELECT leaf, 2, event FROM audit WHERE leaf >= ?1 AND leaf < ?2
         UNION ALL SELECT leaf, 3, entry FROM control WHERE leaf >= ?1 AND leaf < ?2 ORDER BY leaf",
    )?;
    let stored = query.query_map([leaves.start, leaves.end].map(integer), |row| Ok((number(row, 0)?, entry(row)?)))?;
    let mut stored = stored.peekable();
    let (mut parts, mut bytes, mut next) = (Vec::new(), 0, leaves.start);
    while next < leaves.end && parts.len() < limits.records {
        let is_here = |entry: &rusqlite::Result<(u64, _)>| entry.as_ref().map_or(true, |(leaf, _)| *leaf == next);
        let subtree = if stored.peek().is_some_and(is_here) {
            Node::of_leaf(next)
        } else {
            // What is on its left is in an earlier part.
            let is_next = |beside: Range<u64>| Ok(beside.start > next && is_gone(&transaction, beside)?);
            Node::largest_of::<rusqlite::Error>(next, leaves.end, is_next)?
        };
        let Some(hash) = hash(&transaction, subtree)? else { return Ok(None) };
        let mut content = Content::Hash(hash);
        while let Some(entry) = stored.next_if(is_here) {
            let (_, entry) = entry?;
            if Hash::of_leaf([&entry[..]]) == hash {
                bytes += entry.len();
                content = Content::Entry(entry.into());
            }
        }
        if !parts.is_empty() && bytes > limits.bytes {
            break;
        }
        parts.push(Part { subtree, content });
        next = subtree.leaves().end;
    }
    Ok(Some(parts))
}

/// The encoded `LogEntry` of a row of a leaf, a kind and bytes; empty if these can't be the bytes of an entry.
fn entry(row: &Row<'_>) -> rusqlite::Result<Vec<u8>> {
    Ok(match (row.get(1)?, row.get_ref(2)?) {
        (_, ValueRef::Blob(bytes)) if bytes.len() > MAX_RECORD => Vec::new(),
        (1, ValueRef::Blob(bytes)) => Entry::Cycle(bytes).to_bytes(),
        (2, ValueRef::Blob(bytes)) => Entry::Audit(bytes).to_bytes(),
        (_, ValueRef::Blob(bytes)) => Entry::Control(bytes).to_bytes(),
        _ => Vec::new(),
    })
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
    let gone = |leaves| is_gone(transaction, leaves);
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
