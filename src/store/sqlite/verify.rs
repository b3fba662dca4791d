//! Verifies a database from the outside: every entry of its log, every column that a read relies on, every hash, and
//! every index.

use std::{cell::Cell, convert::Infallible, ops::Range, path::Path};

use rusqlite::{Connection, OptionalExtension, Row};

use super::{
    error::explain,
    log::{hash, hashes},
    note::Mark,
    opening::read_only,
    place::DatabaseFileError,
    rows::{COLUMNS, CONTROL_ENTRY, number, value_of},
    schema::check_current,
};
use crate::{
    ledger::{Checkpoint, Control, Entry, Frontier, Hash, Leaves, Node, SealKeys},
    model::text::count,
    ports::{AuditEntry, Record},
    store::{
        OpenError, Rules, Verified,
        counts::Counts,
        row::{self, Wrong, bytes, event, integer, key, kind_number, name, record, state_number},
        seal::{Seal, Sealer, TABLES},
    },
};

/// Verifies the database at this path, which a process may have open: what is wrong is given to `wrong`, one by one.
pub(in super::super) fn verify(
    path: &Path,
    checkpoint: &Checkpoint,
    keys: Option<SealKeys>,
    rules: Rules,
    wrong: &mut dyn FnMut(String),
) -> Result<Verified, OpenError> {
    if !path.exists() {
        return Err(DatabaseFileError::Missing { database: path.display().to_string() }.into());
    }
    let explained = |error| explain(path, &error);
    let mut connection = read_only(path).map_err(explained)?;
    check_current(&connection, path)?;
    // One transaction, so that all that is read belongs together.
    let transaction = connection.transaction().map_err(explained)?;
    let (size, first_kept) = transaction
        .query_row("SELECT log_size, log_first_kept FROM meta", [], |row| Ok((number(row, 0)?, number(row, 1)?)))
        .map_err(explained)?;
    let verified = Verified { entries: size, first_kept, ..Verified::default() };
    let id = Mark::read(&transaction).map_err(explained)?.id;
    let faults = Cell::new(0);
    let mut counted = |fault| {
        faults.set(faults.get() + 1);
        wrong(fault);
    };
    let verifier = Verifier {
        database: &transaction,
        faults: &faults,
        checkpoint,
        sealer: keys.map(|keys| Sealer::new(keys, id)),
        rules,
        wrong: &mut counted,
        verified,
        removed: Leaves::default(),
        accepted: Leaves::default(),
        counted_at: None,
        is_compared: false,
    };
    Ok(verifier.verify().map_err(explained)?)
}

struct Verifier<'a> {
    database: &'a Connection,
    /// Number of faults so far.
    faults: &'a Cell<u64>,
    checkpoint: &'a Checkpoint,
    /// `None` if the key is not at hand.
    sealer: Option<Sealer>,
    rules: Rules,
    wrong: &'a mut dyn FnMut(String),
    verified: Verified,
    /// The leaves that retention has removed, by the entries that say so.
    removed: Leaves,
    /// The leaves that were missing when the entries were counted anew.
    accepted: Leaves,
    /// The leaf of the entry that says so.
    counted_at: Option<u64>,
    /// True once the checkpoint was compared with the tree.
    is_compared: bool,
}

/// A row that claims to be a leaf.
struct Leaf {
    leaf: u64,
    entry: Claimed,
}

/// The row of a record.
#[derive(Clone, Copy)]
struct RecordRow {
    revision: i64,
    cycle_id: i64,
}

/// The entry that a row claims to be.
enum Claimed {
    Record(RecordRow),
    Event,
    Control,
}

impl Verifier<'_> {
    fn verify(mut self) -> rusqlite::Result<Verified> {
        self.check_numbers()?;
        self.read_pruned()?;
        self.check_entries()?;
        self.check_unlogged()?;
        self.check_outputs()?;
        if let Some(sealer) = self.sealer.take() {
            self.check_seals(&sealer)?;
            self.check_counts()?;
        }
        self.check_indexes()?;
        Ok(self.verified)
    }

    /// Compares indexes with their tables. A cycle is found by them, and so is that of a repeated request. Neither
    /// hashes nor seals say what they contain.
    fn check_indexes(&mut self) -> rusqlite::Result<()> {
        let mut query = self.database.prepare("PRAGMA integrity_check")?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let problem: String = row.get(0)?;
            if problem != "ok" {
                (self.wrong)(format!("SQLite finds damage in the database: {problem}"));
            }
        }
        Ok(())
    }

    /// No row has a number that this software gives to none: what follows leaves such rows out.
    fn check_numbers(&mut self) -> rusqlite::Result<()> {
        for (table, condition) in [
            (
                "cycles",
                "revision < 1 OR cycle_id < 1 OR typeof(cycle_id) <> 'integer' OR leaf < 0
                 OR typeof(leaf) NOT IN ('integer', 'null')",
            ),
            ("audit", "leaf < 0"),
            ("control", &format!("leaf < 0 OR typeof({CONTROL_ENTRY}) <> 'blob'")),
            ("hashes", "id < 0 OR typeof(hash) <> 'blob' OR length(hash) <> 32"),
            ("meta", "id <> 0"),
        ] {
            let query = format!("SELECT count(*) FROM {table} WHERE {condition}");
            let rows = self.database.query_row(&query, [], |row| number(row, 0))?;
            if rows > 0 {
                let rows = count(rows, "row");
                (self.wrong)(format!("the table {table} has {rows} that no version of this software has written"));
            }
        }
        Ok(())
    }

    /// What control entries say of removed records.
    fn read_pruned(&mut self) -> rusqlite::Result<()> {
        let query = format!("SELECT leaf, {CONTROL_ENTRY} FROM control WHERE leaf >= 0 ORDER BY leaf");
        let mut query = self.database.prepare(&query)?;
        let mut rows = query.query([])?;
        let mut first_kept = 0;
        while let Some(row) = rows.next()? {
            let leaf = number(row, 0)?;
            let entry = row.get::<_, Vec<u8>>(1).map_err(|error| error.to_string());
            let said = entry.and_then(|entry| (self.rules.checks.control)(&entry));
            if said.as_ref().is_ok_and(|said| said.gone().iter().any(|leaves| leaves.end > leaf)) {
                (self.wrong)(format!("leaf {leaf}, a control entry, names leaves that are not before it"));
            }
            match said.map(|said| said.at(leaf)) {
                Ok(Control::Pruned(pruned)) => {
                    first_kept = first_kept.max(pruned.first_kept);
                    pruned.all().for_each(|leaves| self.removed.add(leaves));
                }
                Ok(Control::Began { counts_anew: true, missing }) => {
                    (self.accepted, self.counted_at) = (missing.into_iter().collect(), Some(leaf));
                }
                Ok(Control::Began { counts_anew: false, .. } | Control::Unknown) => {}
                Err(problem) => (self.wrong)(format!("leaf {leaf}, a control entry, can't be read: {problem}")),
            }
        }
        if self.verified.first_kept != first_kept {
            let claimed = self.verified.first_kept;
            (self.wrong)(format!(
                "by the table meta, the entries before leaf {claimed} were removed; by the log, those before leaf \
                 {first_kept}"
            ));
            self.verified.first_kept = first_kept;
        }
        self.verified.removed = self.removed.count();
        Ok(())
    }

    /// Walks over all leaves, and makes the tree anew.
    fn check_entries(&mut self) -> rusqlite::Result<()> {
        let Verified { entries: size, .. } = self.verified;
        let end = self.database.query_row("SELECT max(id) + 1 FROM hashes", [], |row| row.get::<_, Option<i64>>(0))?;
        // Otherwise each leaf up to there would be named.
        if size > 0 && end.unwrap_or_default() < integer(Node::of_leaf(size - 1).number()) {
            let entries = count(size, "entry");
            (self.wrong)(format!(
                "by the table meta, the log has {entries}, and the table hashes is not that of such a log"
            ));
            return Ok(());
        }
        let claims = "SELECT leaf, 1, revision, cycle_id FROM cycles WHERE leaf >= 0 AND typeof(leaf) = 'integer'
                      UNION ALL SELECT leaf, 2, 0, 0 FROM audit WHERE leaf >= 0
                      UNION ALL SELECT leaf, 3, 0, 0 FROM control WHERE leaf >= 0 ORDER BY leaf";
        let mut query = self.database.prepare(claims)?;
        let claims = query.query_map([], |row| {
            let entry = match row.get(1)? {
                1 => Claimed::Record(RecordRow { revision: row.get(2)?, cycle_id: row.get(3).unwrap_or_default() }),
                2 => Claimed::Event,
                _ => Claimed::Control,
            };
            Ok(Leaf { leaf: number(row, 0)?, entry })
        })?;
        let mut claims = claims.peekable();
        let mut tree = Some(Frontier::default());
        let (mut leaf, mut last_revision) = (0, 0);
        self.compare_root(tree.as_ref(), leaf);
        while leaf < size {
            // As much as possible at once of what was removed: below that, there are no hashes.
            let removed = self.removed.from(leaf);
            let is_removed = |beside: Range<u64>| beside.start >= removed.start && beside.end <= removed.end;
            let Ok(subtree) = Node::largest_of(leaf, size, |beside| Ok::<_, Infallible>(is_removed(beside)));
            let Range { end, .. } = subtree.leaves();
            let stored = hashes(self.database, &[subtree])?.and_then(|hashes| hashes.first().copied());
            let claimed = claims.peek().map_or(size, |claim| claim.as_ref().map_or(leaf, |claim| claim.leaf.min(size)));
            if removed.is_empty() && stored.is_none() && claimed > leaf {
                leaf = self.pass_nothing(leaf..claimed)?;
                tree = None;
                self.compare_root(None, leaf);
                continue;
            }
            let mut next_before = |leaf| claims.next_if(|claim| claim.as_ref().map_or(true, |claim| claim.leaf < leaf));
            if removed.is_empty() {
                let is_accepted = !self.accepted.from(leaf).is_empty();
                match next_before(end).transpose()? {
                    Some(claim) if is_accepted => {
                        (self.wrong)(format!("{claim} is there, although a new log began without it"));
                    }
                    Some(claim) => {
                        let hash = self.check_entry(&claim, &mut last_revision)?;
                        if hash.is_some() && hash != stored {
                            (self.wrong)(format!("{claim} was changed: its bytes don't have the hash of its leaf"));
                        }
                    }
                    None if is_accepted => self.verified.missing += 1,
                    None => {
                        (self.wrong)(format!("leaf {leaf} is missing, and no entry says that retention removed it"));
                    }
                }
                while let Some(extra) = next_before(end).transpose()? {
                    (self.wrong)(format!("{extra} is not the entry of that leaf"));
                }
            }
            while let Some(extra) = next_before(end).transpose()? {
                (self.wrong)(format!("{extra} is there, although the log says that retention removed it"));
            }
            self.check_no_hashes(subtree.below())?;
            // On with the stored hash, so that each fault is named once.
            tree = match (tree, stored) {
                (Some(mut tree), Some(stored)) => {
                    self.compare_nodes(subtree, &tree.append_subtree(subtree, stored))?;
                    Some(tree)
                }
                (_, None) => {
                    (self.wrong)(format!("the table hashes lacks the hash of {}", Named(&(leaf..end))));
                    None
                }
                (None, _) => None,
            };
            leaf = end;
            self.compare_root(tree.as_ref(), leaf);
        }
        for extra in claims {
            let extra = extra?;
            (self.wrong)(format!("{extra} is beyond the end of the log, which has {}", count(size, "entry")));
        }
        self.check_no_hashes(Node::complete_with(size)..i64::MAX.unsigned_abs())?;
        let Checkpoint { origin, size: signed, .. } = self.checkpoint;
        if *signed > size {
            (self.wrong)(format!(
                "the log has {}, and the checkpoint of {origin} {signed}: the last ones are missing",
                count(size, "entry")
            ));
        } else if !self.is_compared {
            (self.wrong)(format!(
                "the checkpoint of {origin} has {}, and retention has removed the last of them: it proves nothing of the \
                 others",
                count(*signed, "entry")
            ));
        }
        Ok(())
    }

    /// Passes the first of these leaves, of which no row is one, together with those after it that have no hash either:
    /// another program may have claimed any number of them. Returns the leaf after them.
    fn pass_nothing(&mut self, Range { start, end }: Range<u64>) -> rusqlite::Result<u64> {
        let mut query = self.database.prepare_cached("SELECT min(id) FROM hashes WHERE id >= ?1")?;
        let next: Option<i64> = query.query_row([integer(Node::of_leaf(start + 1).number())], |row| row.get(0))?;
        let (mut low, mut high) = (start + 1, end);
        // The hashes of a leaf and of the nodes that become complete with it are before those of the next leaf.
        while low < high {
            let middle = low + (high - low) / 2;
            if next.is_none_or(|next| integer(Node::of_leaf(middle + 1).number()) <= next) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let signed = Some(self.checkpoint.size).filter(|signed| *signed > start).unwrap_or(end);
        let unsaid = |said: &Leaves| said.missing(start..end).next().unwrap_or(end..end);
        let (not_removed, not_accepted) = (unsaid(&self.removed), unsaid(&self.accepted));
        let mut end = low.min(signed).min(not_removed.end);
        if not_accepted.start > start {
            end = end.min(not_accepted.start);
            self.verified.missing += end - start;
        } else {
            end = end.min(not_accepted.end);
            let leaves = Named(&(start..end));
            let (are, them) = if end - start == 1 { ("is", "it") } else { ("are", "them") };
            (self.wrong)(format!("{leaves} {are} missing, and no entry says that retention removed {them}"));
        }
        (self.wrong)(format!("the table hashes lacks the hash of {}", Named(&(start..end))));
        Ok(end)
    }

    /// The hash of an entry that is there; `None` if it can't be read, which is reported.
    fn check_entry(&mut self, claim: &Leaf, last_revision: &mut u64) -> rusqlite::Result<Option<Hash>> {
        let row = match claim.entry {
            Claimed::Record(row) => row,
            Claimed::Event => return self.check_event(claim),
            Claimed::Control => {
                let query = format!("SELECT {CONTROL_ENTRY} FROM control WHERE leaf = ?1");
                let mut query = self.database.prepare_cached(&query)?;
                // One that can't be read was reported.
                let entry: Option<Vec<u8>> = query.query_row([integer(claim.leaf)], |row| Ok(row.get(0).ok()))?;
                return Ok(entry.map(|entry| Entry::Control(&entry).leaf()));
            }
        };
        let Some(record) = self.record(row)? else { return Ok(None) };
        self.verified.records += 1;
        if let Err(problem) = (self.rules.checks.record)(&record) {
            (self.wrong)(format!("{claim}: {problem}"));
        }
        if record.revision.0 <= *last_revision {
            (self.wrong)(format!("{claim} has revision {}, which is out of order", record.revision));
        }
        *last_revision = record.revision.0;
        Ok(Some(Entry::Cycle(&record.bytes).leaf()))
    }

    /// The hash of an audit event; `None` if it can't be read, which is reported.
    fn check_event(&mut self, claim: &Leaf) -> rusqlite::Result<Option<Hash>> {
        let mut query = self.database.prepare_cached("SELECT * FROM audit WHERE leaf = ?1")?;
        let read = |row: &Row<'_>| Ok::<_, Wrong>(AuditEntry { bytes: bytes(row, "event")?, ..event(row)? });
        let event = match query.query_row([integer(claim.leaf)], |row| Ok(read(row)))? {
            Ok(event) => event,
            Err(error) => {
                (self.wrong)(format!("{claim} can't be read: {error}"));
                return Ok(None);
            }
        };
        self.verified.events += 1;
        if let Err(problem) = (self.rules.checks.event)(&event) {
            (self.wrong)(format!("{claim}: {problem}"));
        }
        Ok(Some(Entry::Audit(&event.bytes).leaf()))
    }

    /// The record of a cycle; `None` if it can't be read, which is reported.
    fn record(&mut self, row: RecordRow) -> rusqlite::Result<Option<Record>> {
        let mut query = self.database.prepare_cached(&format!("SELECT {COLUMNS} FROM cycles WHERE revision = ?1"))?;
        let read = query.query_row([row.revision], |row| Ok(record(row)))?;
        Ok(read.map_err(|error| (self.wrong)(format!("{row} can't be read: {error}"))).ok())
    }

    /// Compares the nodes that become complete with a subtree.
    fn compare_nodes(&mut self, subtree: Node, nodes: &[Hash]) -> rusqlite::Result<()> {
        for (id, node) in (subtree.number()..).zip(nodes) {
            if hash(self.database, id)? != Some(*node) {
                (self.wrong)(format!("the hash {id} in the table hashes is not that of the entries below it"));
            }
        }
        Ok(())
    }

    /// Compares the root of the first `size` entries with that of the checkpoint, if this has the same size.
    fn compare_root(&mut self, tree: Option<&Frontier>, size: u64) {
        let Checkpoint { origin, size: signed, root } = self.checkpoint;
        if size != *signed {
            return;
        }
        self.is_compared = true;
        if tree.is_some_and(|tree| tree.root() != *root) {
            let entries = count(size, "entry");
            (self.wrong)(format!("the log does not have the root of the checkpoint of {origin} after {entries}"));
        }
    }

    /// Records without a leaf are older than the log.
    fn check_unlogged(&mut self) -> rusqlite::Result<()> {
        let last: i64 = self.database.query_row("SELECT unlogged_to FROM meta", [], |row| row.get(0))?;
        let unlogged = "SELECT revision, cycle_id FROM cycles WHERE leaf IS NULL ORDER BY revision";
        let mut query = self.database.prepare(unlogged)?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let row = RecordRow { revision: row.get(0)?, cycle_id: row.get(1).unwrap_or_default() };
            let Some(record) = self.record(row)? else { continue };
            self.verified.unlogged += 1;
            if integer(record.revision.0) > last {
                (self.wrong)(format!("{row} has no leaf, and was written since the log began"));
            }
            if let Err(problem) = (self.rules.checks.record)(&record) {
                (self.wrong)(format!("{row}: {problem}"));
            }
        }
        Ok(())
    }

    /// Checks that there are no hashes with these numbers.
    fn check_no_hashes(&mut self, numbers: Range<u64>) -> rusqlite::Result<()> {
        let mut query = self.database.prepare_cached("SELECT id FROM hashes WHERE id >= ?1 AND id < ?2")?;
        let mut rows = query.query([numbers.start, numbers.end].map(integer))?;
        while let Some(row) = rows.next()? {
            let id: i64 = row.get(0)?;
            (self.wrong)(format!("the hash {id} in the table hashes belongs to no entry"));
        }
        Ok(())
    }

    /// The latest outputs are those of their records, as far as these are retained.
    fn check_outputs(&mut self) -> rusqlite::Result<()> {
        let mut query = self.database.prepare("SELECT name, cycle_id, payload FROM outputs ORDER BY name")?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let read = || Ok((name(row, "name")?, row::number(row, "cycle_id")?, bytes(row, "payload")?));
            let (name, cycle_id, payload) = match read() {
                Ok(read) => read,
                Err(error) => {
                    let error: Wrong = error;
                    (self.wrong)(format!("a row of the table outputs can't be read: {error}"));
                    continue;
                }
            };
            let Some(Ok(record)) = record_of(self.database, cycle_id)? else { continue };
            if (self.rules.output)(&record, &name).is_some_and(|hash| hash != Hash::of_bytes(&payload).0) {
                (self.wrong)(format!("the output of {name} is not that of the record of cycle {cycle_id}"));
            }
        }
        Ok(())
    }

    /// The seals are those of a process with the key.
    fn check_seals(&mut self, sealer: &Sealer) -> rusqlite::Result<()> {
        let size = self.verified.entries;
        let log = hashes(self.database, &Frontier::nodes(size))?.and_then(|roots| Frontier::of(size, roots));
        if let Some(log) = log {
            let seal = self.database.query_row("SELECT * FROM meta", [], |row| Ok(sealer.check_end(row, &log)?))?;
            if !matches!(seal, Seal::Valid(_)) {
                let entries = count(size, "entry");
                (self.wrong)(format!("the seal of the log does not belong to its {entries} and the table meta"));
            }
        }
        let mut sealed = 0;
        for table in TABLES {
            let mut query = self.database.prepare(&format!("SELECT * FROM {}", table.name))?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                if let Seal::Valid(_) = sealer.check_row(row, table)? {
                    sealed += 1;
                } else {
                    let key = key(value_of(row.get_ref(0)?));
                    (self.wrong)(format!("the seal of the {} {key:?} does not belong to what it contains", table.row));
                }
            }
        }
        self.verified.sealed = Some(sealed);
        Ok(())
    }

    /// Counts all records and events by their columns.
    fn count(&self) -> rusqlite::Result<Counts> {
        let mut records = self.database.prepare("SELECT count(*) FROM cycles WHERE state = ?1")?;
        let mut events = self.database.prepare("SELECT count(*) FROM audit WHERE kind = ?1")?;
        Counts::of(
            |state| records.query_row([state_number(state)], |row| number(row, 0)),
            |kind| events.query_row([kind_number(kind)], |row| number(row, 0)),
        )
    }

    /// The numbers of records and events, which are sealed, are those of the rows. If anything else is wrong, that
    /// may be why they are not. So this finds missing records that are older than the log.
    fn check_counts(&mut self) -> rusqlite::Result<()> {
        if self.faults.get() > 0 {
            return Ok(());
        }
        let sealed = self.database.query_row("SELECT * FROM meta", [], |row| Ok(Counts::of_row(row)?))?;
        let found = self.count()?;
        let (removed, counted_at): (u64, i64) =
            self.database.query_row("SELECT log_removed, log_counted_at FROM meta", [], |row| {
                Ok((number(row, 0)?, row.get(1)?))
            })?;
        if removed != self.verified.removed {
            let found = self.verified.removed;
            (self.wrong)(format!(
                "by the table meta, retention has removed {}; by the log, {found}",
                count(removed, "entry")
            ));
        }
        let counted_at = u64::try_from(counted_at).ok().filter(|leaf| *leaf >= self.verified.first_kept);
        if counted_at != self.counted_at.filter(|leaf| *leaf >= self.verified.first_kept) {
            (self.wrong)("by the table meta, another entry of the log than its last one says what was missing".into());
        }
        for (column, (sealed, found)) in Counts::COLUMNS.iter().zip(sealed.columns().iter().zip(found.columns())) {
            if *sealed != found {
                (self.wrong)(format!(
                    "by the table meta, the number of {column} is {sealed}; by the rows, it is {found}"
                ));
            }
        }
        Ok(())
    }
}

/// The record of a cycle, if it exists.
fn record_of(database: &Connection, cycle_id: u64) -> rusqlite::Result<Option<Result<Record, Wrong>>> {
    let mut query = database.prepare_cached(&format!("SELECT {COLUMNS} FROM cycles WHERE cycle_id = ?1"))?;
    query.query_row([integer(cycle_id)], |row| Ok(record(row))).optional()
}

/// Leaves, as they are named.
struct Named<'a>(&'a Range<u64>);

impl std::fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Range { start, end } = *self.0;
        if end - start == 1 { write!(f, "leaf {start}") } else { write!(f, "the leaves {start} to {}", end - 1) }
    }
}

impl std::fmt::Display for RecordRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the record of cycle {}", self.cycle_id)
    }
}

impl std::fmt::Display for Leaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.entry {
            Claimed::Record(row) => write!(f, "{row} (leaf {})", self.leaf),
            Claimed::Event => write!(f, "the audit event of leaf {}", self.leaf),
            Claimed::Control => write!(f, "the control entry of leaf {}", self.leaf),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::PathBuf};

    use jiff::Timestamp;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        clock::Clock,
        ledger::RecordsPruned,
        model::{CycleId, CycleState, Epoch, LoopState, Name},
        ports::{AuditEntry, Checks, Removal, Retention, RetentionRule, StoredLoop, Write},
        store::{
            StoreUrl, open,
            sqlite::tests::database_of_version,
            suite::{
                CHECKS, check, commit, event, filled, keys, name, open_cycle, output, record, recorded, seals,
                stored_subsystem,
            },
        },
    };

    /// The leaves of the records that are removed, in place of a `ControlEntry`.
    const REMOVED: &[u8] = b"0, 1, 3";

    fn control(entry: &[u8]) -> Result<Control, String> {
        let pruned = RecordsPruned::of([0, 1, 3], 2);
        if entry == REMOVED { Ok(Control::Pruned(pruned)) } else { Err("as scripted".into()) }
    }

    /// Events of this caller stand for such with other keys.
    fn check_event(entry: &AuditEntry) -> Result<(), String> {
        if entry.caller == "other" { Err("its column caller is not that of its bytes".into()) } else { Ok(()) }
    }

    /// Each output of cycle 2 is that of this text.
    fn output_sha256(record: &Record, _: &Name) -> Option<[u8; Hash::LEN]> {
        (record.cycle_id == CycleId(2)).then(|| Hash::of_bytes(output(2, "two").payload.as_bytes()).0)
    }

    /// A database with 10 records, of which three are removed before the last two are written.
    async fn database() -> (TempDir, PathBuf, Checkpoint) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("o.db");
        let store = open(&StoreUrl::Sqlite(path.clone()), CHECKS, Clock::system()).await.unwrap();
        let epoch = store.take_over(seals()).await.unwrap().epoch;
        filled(&*store, epoch, 8).await;
        // All records but those of failed cycles, of which the third is the first one.
        let three = RetentionRule { max_cycles: Some(3), max_age: None };
        let failed = BTreeMap::from([(CycleState::Failed, RetentionRule::default())]);
        let retention = Retention { default: three, by_state: failed, ..Retention::default() };
        let excess = store.excess(retention, Timestamp::UNIX_EPOCH, 10).await.unwrap();
        let records = excess.records;
        assert_eq!(records.iter().map(|record| record.revision.0).collect::<Vec<_>>(), [1, 2, 4]);
        let removal = Removal { records, events: Vec::new(), first_kept: 2, entry: Some(REMOVED.into()) };
        commit(&*store, Write { epoch, last_cycle_id: CycleId(8), removal, ..Write::default() }).await;
        commit(&*store, recorded(9..=10, epoch)).await;
        let log = store.log().frontier;
        let checkpoint = Checkpoint { origin: "log".into(), size: log.size(), root: log.root() };
        (directory, path, checkpoint)
    }

    /// The result of verifying a database, and the faults.
    fn verified(path: &Path, checkpoint: &Checkpoint) -> (Verified, Vec<String>) {
        let mut faults = Vec::new();
        let rules = Rules { checks: Checks { record: check, event: check_event, control }, output: output_sha256 };
        let verified = verify(path, checkpoint, Some(keys()), rules, &mut |fault| faults.push(fault)).unwrap();
        (verified, faults)
    }

    const NOTHING: Verified = Verified {
        entries: 0,
        first_kept: 0,
        removed: 0,
        missing: 0,
        records: 0,
        events: 0,
        unlogged: 0,
        sealed: None,
    };
    const SOUND: Verified = Verified { entries: 11, first_kept: 2, removed: 3, records: 7, sealed: Some(0), ..NOTHING };

    #[tokio::test]
    async fn an_unchanged_database_is_verified_by_each_checkpoint_of_what_is_kept() {
        let (_directory, path, newest) = database().await;
        assert_eq!(verified(&path, &newest), (SOUND, Vec::new()));
        let mut log = Frontier::default();
        for size in 1..=8 {
            log.append(Entry::Cycle(&record(size, Epoch(1)).bytes).leaf());
            let (found, faults) = verified(&path, &Checkpoint { size, root: log.root(), ..newest.clone() });
            assert_eq!(found, SOUND);
            match size {
                1 => assert!(faults.concat().ends_with("it proves nothing of the others"), "{faults:?}"),
                _ => assert_eq!(faults, Vec::<String>::new()),
            }
            if size > 1 {
                let (_, faults) = verified(&path, &Checkpoint { size, ..newest.clone() });
                let root =
                    format!("the log does not have the root of the checkpoint of log after {}", count(size, "entry"));
                assert_eq!(faults, [root]);
            }
        }
        let (_, faults) = verified(&path, &Checkpoint { size: 12, ..newest });
        assert_eq!(faults, ["the log has 11 entries, and the checkpoint of log 12: the last ones are missing"]);
    }

    #[tokio::test]
    async fn each_change_of_a_database_is_named_and_nothing_else() {
        let (directory, path, checkpoint) = database().await;
        let inserted = "INSERT INTO cycles SELECT REVISION, 99, epoch, state, trigger, loop, request_id, triggered_by,
                        finished_at, LEAF, record FROM cycles WHERE revision = 5";
        let insert = |revision: &str, leaf: &str| inserted.replace("REVISION", revision).replace("LEAF", leaf);
        let changes: [(&str, &[&str]); 14] = [
            (
                "DELETE FROM cycles WHERE revision = 5",
                &["leaf 4 is missing, and no entry says that retention removed it"],
            ),
            (
                &insert("4", "3"),
                &["the record of cycle 99 (leaf 3) is there, although the log says that retention removed it"],
            ),
            (
                "UPDATE cycles SET leaf = 1 WHERE revision = 9",
                &[
                    "the record of cycle 10 (leaf 1) is there, although the log says that retention removed it",
                    "leaf 9 is missing, and no entry says that retention removed it",
                ],
            ),
            (
                "UPDATE cycles SET leaf = 11 WHERE revision = 10",
                &[
                    "leaf 10 is missing, and no entry says that retention removed it",
                    "the record of cycle 9 (leaf 11) is beyond the end of the log, which has 11 entries",
                ],
            ),
            (
                "UPDATE cycles SET leaf = NULL WHERE revision = 10",
                &[
                    "leaf 10 is missing, and no entry says that retention removed it",
                    "the record of cycle 9 has no leaf, and was written since the log began",
                ],
            ),
            (
                "UPDATE cycles SET revision = 100 WHERE revision = 5",
                &["the record of cycle 5 (leaf 5) has revision 6, which is out of order"],
            ),
            (
                "UPDATE cycles SET state = 99 WHERE revision = 5",
                &["the record of cycle 6 can't be read: its state is 99, which has no meaning"],
            ),
            (
                "UPDATE meta SET log_first_kept = 3",
                &[
                    "by the table meta, the entries before leaf 3 were removed; by the log, those before leaf 2",
                    "the seal of the log does not belong to its 11 entries and the table meta",
                ],
            ),
            (
                "UPDATE hashes SET hash = zeroblob(32) WHERE id = 12",
                &["the hash 12 in the table hashes is not that of the entries below it"],
            ),
            ("DELETE FROM hashes WHERE id = 2", &["the table hashes lacks the hash of the leaves 0 to 1"]),
            (
                "INSERT INTO hashes VALUES (0, zeroblob(32)), (19, zeroblob(32))",
                &[
                    "the hash 0 in the table hashes belongs to no entry",
                    "the hash 19 in the table hashes belongs to no entry",
                ],
            ),
            (&insert("1", "NULL"), &["the record of cycle 99 has no leaf, and was written since the log began"]),
            (
                &insert("1", "NULL").replace(" record ", " CAST('unreadable' AS BLOB) "),
                &[
                    "the record of cycle 99 has no leaf, and was written since the log began",
                    "the record of cycle 99: as scripted",
                ],
            ),
            // As if it were older than the log.
            (
                &(insert("1", "NULL") + "; UPDATE meta SET unlogged_to = 1"),
                &["the seal of the log does not belong to its 11 entries and the table meta"],
            ),
        ];
        let changed = directory.path().join("changed.db");
        for (change, expected) in changes {
            fs::copy(&path, &changed).unwrap();
            Connection::open(&changed).unwrap().execute_batch(change).unwrap();
            let (found, faults) = verified(&changed, &checkpoint);
            assert_eq!(faults, expected, "{change}");
            assert_eq!(found.unlogged, u64::from(change.contains("NULL")), "{change}");
        }
    }

    #[tokio::test]
    async fn each_change_of_an_audit_event_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("o.db");
        let store = open(&StoreUrl::Sqlite(path.clone()), CHECKS, Clock::system()).await.unwrap();
        let epoch = store.take_over(seals()).await.unwrap().epoch;
        // The leaves 0 and 1 are records, 2 to 4 events, and 5 is a record.
        commit(&*store, Write { audit: (1..=3).map(event).collect(), ..recorded(1..=2, epoch) }).await;
        commit(&*store, recorded(3..=3, epoch)).await;
        let log = store.log().frontier;
        let checkpoint = Checkpoint { origin: "log".into(), size: log.size(), root: log.root() };
        let sound = Verified { entries: 6, records: 3, events: 3, sealed: Some(1), ..Verified::default() };
        drop(store);
        assert_eq!(verified(&path, &checkpoint), (sound, Vec::new()));
        let changes: [(&str, &[&str]); 6] = [
            ("DELETE FROM audit WHERE leaf = 3", &["leaf 3 is missing, and no entry says that retention removed it"]),
            (
                "UPDATE audit SET event = x'00' WHERE leaf = 3",
                &["the audit event of leaf 3 was changed: its bytes don't have the hash of its leaf"],
            ),
            (
                "UPDATE audit SET leaf = 99 WHERE leaf = 3; UPDATE audit SET leaf = 3 WHERE leaf = 4;
                 UPDATE audit SET leaf = 4 WHERE leaf = 99",
                &[
                    "the audit event of leaf 3 was changed: its bytes don't have the hash of its leaf",
                    "the audit event of leaf 4 was changed: its bytes don't have the hash of its leaf",
                ],
            ),
            (
                "UPDATE audit SET caller = 'other' WHERE leaf = 2",
                &["the audit event of leaf 2: its column caller is not that of its bytes"],
            ),
            (
                "UPDATE audit SET time = 'x' WHERE leaf = 2",
                &["the audit event of leaf 2 can't be read: its time is a text, and not a number"],
            ),
            (
                "INSERT INTO audit SELECT 6, time, caller, rpc, denied, event, kind FROM audit WHERE leaf = 2",
                &["the audit event of leaf 6 is beyond the end of the log, which has 6 entries"],
            ),
        ];
        let changed = directory.path().join("changed.db");
        for (change, expected) in changes {
            fs::copy(&path, &changed).unwrap();
            Connection::open(&changed).unwrap().execute_batch(change).unwrap();
            assert_eq!(verified(&changed, &checkpoint).1, expected, "{change}");
        }
    }

    #[tokio::test]
    async fn each_change_of_what_is_sealed_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("o.db");
        let store = open(&StoreUrl::Sqlite(path.clone()), CHECKS, Clock::system()).await.unwrap();
        let epoch = store.take_over(seals()).await.unwrap().epoch;
        let write = Write {
            last_cycle_id: CycleId(3),
            open: vec![open_cycle(3)],
            outputs: vec![(name("a"), output(2, "two")), (name("b"), output(1, "one"))],
            subsystems: [stored_subsystem("a")].into(),
            loops: [(name("l"), Some(StoredLoop { name: name("l"), spec: None, state: LoopState::default() }))].into(),
            ..recorded(1..=2, epoch)
        };
        commit(&*store, write).await;
        let log = store.log().frontier;
        let checkpoint = Checkpoint { origin: "log".into(), size: log.size(), root: log.root() };
        let sound = Verified { entries: 2, records: 2, sealed: Some(5), ..Verified::default() };
        drop(store);
        assert_eq!(verified(&path, &checkpoint), (sound, Vec::new()));
        let seal_of = |row: &str| format!("the seal of the {row} does not belong to what it contains");
        let not_of_record = "the output of a is not that of the record of cycle 2".to_owned();
        let changes = [
            ("UPDATE subsystems SET owner = NULL", vec![seal_of("subsystem \"a\"")]),
            ("UPDATE loops SET spec = '{}'", vec![seal_of("loop \"l\"")]),
            ("UPDATE open_cycles SET request_id = NULL", vec![seal_of("open cycle \"3\"")]),
            ("UPDATE outputs SET payload = x'' WHERE name = 'a'", vec![not_of_record, seal_of("output \"a\"")]),
            (
                "INSERT INTO outputs (name, cycle_id, payload) VALUES ('', 1, x'')",
                vec![
                    "a row of the table outputs can't be read: its name can't be used: \"\" is not a \
                     name: a name is 1 to 63 characters, a letter, then letters, digits, '_', '-' or '.'"
                        .into(),
                    seal_of("output \"\""),
                ],
            ),
            (
                "UPDATE meta SET seal = NULL",
                vec!["the seal of the log does not belong to its 2 entries and the table meta".into()],
            ),
            (
                "UPDATE meta SET last_cycle_id = last_cycle_id + 1",
                vec!["the seal of the log does not belong to its 2 entries and the table meta".into()],
            ),
        ];
        let changed = directory.path().join("changed.db");
        for (change, expected) in changes {
            fs::copy(&path, &changed).unwrap();
            Connection::open(&changed).unwrap().execute_batch(change).unwrap();
            assert_eq!(verified(&changed, &checkpoint).1, expected, "{change}");
        }
    }

    #[test]
    fn a_database_without_a_log_is_not_verified() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("o.db");
        drop(database_of_version(&path, 4));
        let checkpoint = Checkpoint { origin: "log".into(), size: 0, root: Frontier::default().root() };
        let rules = Rules { checks: Checks { record: check, event: check_event, control }, output: output_sha256 };
        let refused = verify(&path, &checkpoint, None, rules, &mut |_| {});
        assert!(matches!(refused, Err(OpenError::TooOld { found: 4, .. })), "{refused:?}");
    }
}
