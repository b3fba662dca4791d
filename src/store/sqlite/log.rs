//! The tables of the log of the history.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rusqlite::{Connection, OptionalExtension, Row, Transaction, types::ValueRef};

use super::{
    error::explain,
    rows::{CONTROL_ENTRY, MAX_RECORD, integer, kind_number, nanoseconds, number},
};
use crate::{
    ledger::{Content, Control, Entry, Frontier, Hash, Leaves, Node, Part, Proven},
    model::{CycleId, Revision},
    ports::{ControlDecoder, Log, PageLimits, StoreError, Write},
    store::{frontier::Appended, pruning::needless_hashes},
};

/// What readers know of the log.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedLog {
    /// As of the last durable commit.
    log: Arc<Mutex<Log>>,
    /// The highest revision of the records that are older than it.
    unlogged_to: Arc<AtomicU64>,
}

impl SharedLog {
    pub(super) fn get(&self) -> Log {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, log: &Log) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone_from(log);
    }

    pub(super) fn unlogged_to(&self) -> Revision {
        Revision(self.unlogged_to.load(Ordering::Relaxed))
    }

    pub(super) fn begins_after(&self, unlogged_to: Revision) {
        self.unlogged_to.store(unlogged_to.0, Ordering::Relaxed);
    }
}

/// More entries than any log can have: a thousand a second for nine thousand years. Another program may have set a
/// larger size, whose numbers of nodes would be too large for a database.
const ENDLESS: u64 = 1 << 48;

/// The log of a database that is taken over, or accepted.
///
/// # Errors
/// It can't be read, its hashes are not those of such a log, or rows have the leaves of entries that are still to come.
pub(super) fn read(connection: &Connection, path: &Path) -> Result<Log, StoreError> {
    let explained = |error| explain(path, &error);
    let corrupt = |problem| StoreError::Corrupt { store: path.display().to_string(), problem };
    let last = |query: &str| connection.query_row(query, [], |row| row.get::<_, Option<i64>>(0)).map_err(explained);
    let numbers = |row: &Row<'_>| Ok((number(row, 0)?, number(row, 1)?));
    let (size, first_kept) =
        connection.query_row("SELECT log_size, log_first_kept FROM meta", [], numbers).map_err(explained)?;
    let roots = hashes(connection, &Frontier::nodes(size)).map_err(explained)?;
    let frontier = roots.and_then(|roots| Frontier::of(size, roots));
    let end = last("SELECT max(id) + 1 FROM hashes")?.unwrap_or_default();
    let is_end = |_: &Frontier| size < ENDLESS && end == integer(Node::complete_with(size));
    let frontier = frontier.filter(is_end).ok_or_else(|| {
        corrupt(format!("log_size in its table meta is {size}, and its table hashes is not that of such a log"))
    })?;
    for (table, query) in [("audit", "SELECT max(leaf) FROM audit"), ("control", "SELECT max(leaf) FROM control")] {
        if let Some(leaf) = last(query)?.filter(|leaf| *leaf >= integer(size)) {
            return Err(corrupt(format!(
                "log_size in its table meta is {size}, and a row of its table {table}, which another program has \
                 written, is leaf {leaf} already; remove such rows"
            )));
        }
    }
    Ok(Log { frontier, first_kept })
}

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

/// The entry about the log itself that is this leaf, if it is in the log.
pub(super) fn control_entry(
    connection: &Connection,
    proven: &mut Proven,
    leaf: u64,
) -> rusqlite::Result<Option<Vec<u8>>> {
    let mut query = connection.prepare_cached(&format!("SELECT {CONTROL_ENTRY} FROM control WHERE leaf = ?1"))?;
    let entry: Option<Option<Vec<u8>>> = query.query_row([integer(leaf)], |row| Ok(row.get(0).ok())).optional()?;
    let Some(entry) = entry.flatten() else { return Ok(None) };
    Ok(is_in_log(connection, proven, leaf, Entry::Control(&entry))?.then_some(entry))
}

/// True if an entry is this leaf of the log: by its hashes up to the end of the log, which is sealed. The hash of the
/// leaf alone could have been changed with the entry.
pub(super) fn is_in_log(
    connection: &Connection,
    proven: &mut Proven,
    leaf: u64,
    entry: Entry<'_>,
) -> rusqlite::Result<bool> {
    proven.has(leaf, entry.leaf(), |node| hash(connection, node.number()))
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
pub(super) fn accepted(
    connection: &Connection,
    log: &Log,
    decode: ControlDecoder,
    counted_at: Option<u64>,
) -> rusqlite::Result<Option<Leaves>> {
    let Some(counted_at) = counted_at else { return Ok(Some(Leaves::default())) };
    let entry = control_entry(connection, &mut Proven::of(&log.frontier), counted_at)?;
    Ok(match entry.map(|entry| decode(&entry).map(|said| said.at(counted_at))) {
        Some(Ok(Control::Began { missing, .. })) => Some(missing.into_iter().collect()),
        _ => (counted_at < log.first_kept).then(Leaves::default),
    })
}

/// What the control entries in the log say, without those that have come back to an accepted leaf.
pub(super) fn said(
    connection: &Connection,
    log: &Log,
    decode: ControlDecoder,
    accepted: Leaves,
) -> rusqlite::Result<Said> {
    let (mut removed, mut first_kept, mut proven) = (Leaves::default(), log.first_kept, Proven::of(&log.frontier));
    removed.add(0..first_kept);
    let mut query = connection.prepare("SELECT leaf FROM control WHERE leaf >= 0 ORDER BY leaf")?;
    for leaf in query.query_map([], |row| number(row, 0))? {
        let leaf = leaf?;
        let entry = control_entry(connection, &mut proven, leaf)?.filter(|_| accepted.from(leaf).is_empty());
        // An unreadable entry proves nothing.
        if let Some(Ok(Control::Pruned(pruned))) = entry.map(|entry| decode(&entry).map(|said| said.at(leaf))) {
            pruned.all().for_each(|leaves| removed.add(leaves));
            first_kept = first_kept.max(pruned.first_kept);
        }
    }
    Ok(Said { removed, first_kept, accepted })
}

/// The first revision whose record is this leaf or a later one. Records in the log have increasing leaves.
fn revision_from(connection: &Connection, leaf: u64) -> rusqlite::Result<i64> {
    let (mut low, mut high) = connection.query_row("SELECT unlogged_to, last_revision FROM meta", [], |row| {
        Ok((number(row, 0)? + 1, number(row, 1)? + 1))
    })?;
    let mut next = connection
        .prepare_cached("SELECT revision, leaf FROM cycles WHERE revision >= ?1 ORDER BY revision LIMIT 1")?;
    while low < high {
        let middle = low + (high - low) / 2;
        let of_row = |row: &Row<'_>| Ok((number(row, 0)?, row.get::<_, Option<i64>>(1)?));
        match next.query_row([integer(middle)], of_row).optional()? {
            Some((revision, Some(found))) if found < integer(leaf) => low = revision + 1,
            Some(_) | None => high = middle,
        }
    }
    Ok(integer(low))
}

/// The log from the first of these leaves on, in parts; `None` if the hash of one is not retained.
pub(super) fn parts(
    connection: &mut Connection,
    leaves: Range<u64>,
    limits: PageLimits,
) -> rusqlite::Result<Option<Vec<Part>>> {
    // One transaction, so that entries and hashes are those of one time.
    let transaction = connection.transaction()?;
    let revisions = [revision_from(&transaction, leaves.start)?, revision_from(&transaction, leaves.end)?];
    let mut records = transaction.prepare_cached(
        "SELECT leaf, 1, record FROM cycles WHERE revision >= ?1 AND revision < ?2 ORDER BY revision",
    )?;
    let mut events =
        transaction.prepare_cached("SELECT leaf, 2, event FROM audit WHERE leaf >= ?1 AND leaf < ?2 ORDER BY leaf")?;
    let mut controls = transaction
        .prepare_cached("SELECT leaf, 3, entry FROM control WHERE leaf >= ?1 AND leaf < ?2 ORDER BY leaf")?;
    let of_leaves = [leaves.start, leaves.end].map(integer);
    let mut stored = [
        records.query_map(revisions, stored)?.peekable(),
        events.query_map(of_leaves, stored)?.peekable(),
        controls.query_map(of_leaves, stored)?.peekable(),
    ];
    let (mut parts, mut bytes, mut next) = (Vec::new(), 0, leaves.start);
    while next < leaves.end && parts.len() < limits.records {
        // An error belongs to the next leaf.
        let of = |entry: &rusqlite::Result<(u64, _)>| entry.as_ref().map_or(next, |(leaf, _)| *leaf);
        let first = stored.iter_mut().filter_map(|kind| kind.peek().map(of)).min().unwrap_or(leaves.end);
        let subtree = if first <= next {
            Node::of_leaf(next)
        } else {
            // What is on its left is in an earlier part.
            let is_gone = |beside: Range<u64>| Ok(beside.start > next && beside.end <= first);
            Node::largest_of::<rusqlite::Error>(next, leaves.end, is_gone)?
        };
        let Some(hash) = hash(&transaction, subtree.number())? else { return Ok(None) };
        let mut content = Content::Hash(hash);
        while let Some(entry) = stored.iter_mut().find_map(|kind| kind.next_if(|entry| of(entry) <= next)) {
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

/// The leaf of a row, and its [`entry`].
fn stored(row: &Row<'_>) -> rusqlite::Result<(u64, Vec<u8>)> {
    Ok((number(row, 0)?, entry(row)?))
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
