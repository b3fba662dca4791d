//! Finds what retention removes next, in the order of the tables, and by what the entries themselves say: a column or
//! an index that another program has changed can't have something removed before its time.

use std::collections::BTreeMap;

use jiff::Timestamp;
use rusqlite::{Row, Statement, Transaction};

use super::{
    commit::Term,
    log,
    rows::{COLUMNS, HAS_REVISION, MAX_RECORD, event, integer, leaf, number, read},
};
use crate::{
    ledger::{Entry, Leaves, Proven},
    model::{CycleState, EventKind, Revision},
    ports::{Check, Checks, EventCheck, Excess, Record, Retention, Unreadable, UnreadableEvent},
    store::pruning::{Limits, rules},
};

/// Most entries that one search examines, and bytes of them after which it examines no further ones, since commits wait
/// meanwhile: more than retention removes at once, and as many bytes as the largest record has.
const MOST_EXAMINED: usize = 512;
const MOST_BYTES: usize = MAX_RECORD;

/// Where the searches go on. Each entry is examined once for each rule, and again when it is removed.
#[derive(Debug, Default)]
pub(super) struct Searches {
    /// By the states of the rule. A rule with other states begins at the oldest record.
    records: BTreeMap<Vec<CycleState>, Search>,
    /// In the order of [`EventKind::ALL`].
    events: [Search; EventKind::ALL.len()],
}

/// The search for the oldest entries of one rule.
#[derive(Clone, Debug, Default)]
struct Search {
    /// Before this revision or leaf nothing is left that the rule may remove.
    next: u64,
    /// Number of entries before it that are not what was written. They may be those of the rule, and stay.
    damaged: u64,
    /// The problem of the first one of them.
    problem: Option<String>,
}

/// What an entry turns out to be.
enum Examined {
    /// One of the rule, from this time, with its leaf in the log.
    Ours(Timestamp, Option<u64>),
    Other,
    /// It is not what was written.
    Damaged(String),
}

/// What one search may still examine, of all rules together.
struct Budget {
    /// Most entries that one rule finds.
    limit: usize,
    entries: usize,
    bytes: usize,
}

impl Searches {
    /// What exceeds these limits: at most `limit` records and events; and the problem of a damaged one.
    pub(super) fn excess(
        &mut self,
        transaction: &Transaction<'_>,
        term: &Term,
        checks: Checks,
        retention: &Retention,
        now: Timestamp,
        limit: usize,
    ) -> rusqlite::Result<(Excess, Option<String>)> {
        let mut budget = Budget { limit, entries: MOST_EXAMINED, bytes: MOST_BYTES };
        let mut proven = Proven::of(&term.frontier.log.frontier);
        let newest = term.frontier.last_revision.0;
        let mut records = Vec::new();
        let mut query = transaction.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM cycles WHERE {HAS_REVISION} AND revision >= ?1 AND revision < ?2 ORDER BY revision"
        ))?;
        let rules = rules(retention);
        self.records.retain(|states, _| rules.iter().any(|(_, known)| known == states));
        for (rule, states) in &rules {
            let search = self.records.entry(states.clone()).or_default();
            let limits = rule.limits(states.iter().map(|state| term.counts.records_of(*state)).sum(), now);
            let examine = |row: &Row<'_>| {
                let (record, leaf) = match examine_record(transaction, row, checks.record, &mut proven)? {
                    Ok(examined) => examined,
                    Err(unreadable) => return Ok(Examined::Damaged(unreadable.to_string())),
                };
                let is_ours = states.contains(&record.state);
                Ok(if is_ours { Examined::Ours(record.finished_at, leaf) } else { Examined::Other })
            };
            records.extend(search.oldest(&mut query, newest, limits, &mut budget, examine)?);
        }
        records.sort_unstable();
        records.truncate(limit);
        let records: Vec<_> = records.into_iter().map(|(revision, leaf)| (Revision(revision), leaf)).collect();
        let room = limit - records.len();
        let mut events = Vec::new();
        let mut query =
            transaction.prepare_cached("SELECT * FROM audit WHERE leaf >= ?1 AND leaf < ?2 ORDER BY leaf")?;
        for (kind, search) in EventKind::ALL.into_iter().zip(&mut self.events) {
            let limits = retention.events.limits(term.counts.events_of(kind), now);
            let examine = |row: &Row<'_>| {
                Ok(match examine_event(transaction, row, checks.event, &mut proven)? {
                    Ok((found, time)) if found == kind => Examined::Ours(time, None),
                    Ok(_) => Examined::Other,
                    Err(unreadable) => Examined::Damaged(unreadable.to_string()),
                })
            };
            let end = term.frontier.log.frontier.size();
            let oldest = search.oldest(&mut query, end, limits, &mut budget, examine)?;
            events.extend(oldest.into_iter().map(|(leaf, _)| leaf));
        }
        events.sort_unstable();
        events.truncate(room);
        let leaves = records.iter().filter_map(|(_, leaf)| *leaf).chain(events.iter().copied());
        let removed = leaves.map(|leaf| leaf..leaf + 1).collect();
        let excess = Excess {
            first_kept: first_kept(transaction, &mut proven, term, &removed)?,
            records,
            events,
            is_partial: budget.is_spent(),
            damaged: None,
        };
        Ok((excess, self.problem()))
    }

    /// The problem of the first search that has found a damaged entry.
    fn problem(&self) -> Option<String> {
        let mut searches = self.records.values().chain(&self.events);
        searches.find_map(|search| search.problem.clone())
    }
}

impl Search {
    /// The oldest entries of the rule, as far as they exceed its limits and the budget reaches: their places, with what
    /// `examine` finds of them. `query` gives the entries from a place on, up to `end`.
    fn oldest(
        &mut self,
        query: &mut Statement<'_>,
        end: u64,
        limits: Limits,
        budget: &mut Budget,
        mut examine: impl FnMut(&Row<'_>) -> rusqlite::Result<Examined>,
    ) -> rusqlite::Result<Vec<(u64, Option<u64>)>> {
        let mut oldest = Vec::new();
        if limits.exceed_none() {
            return Ok(oldest);
        }
        let mut damaged = self.damaged;
        let mut rows = query.query([self.next, end].map(integer))?;
        while oldest.len() < budget.limit
            && !budget.is_spent()
            && let Some(row) = rows.next()?
        {
            let place = number(row, 0)?;
            match examine(row)? {
                Examined::Ours(time, leaf) if limits.are_exceeded(oldest.len() as u64 + damaged, time) => {
                    oldest.push((place, leaf));
                }
                // It stays, and is examined again by the next search: without end, if it took from the budget.
                Examined::Ours(..) => break,
                Examined::Other => {}
                Examined::Damaged(problem) => {
                    damaged += 1;
                    self.problem.get_or_insert(problem);
                }
            }
            budget.spend(row);
            if oldest.is_empty() {
                (self.next, self.damaged) = (place + 1, damaged);
            }
        }
        Ok(oldest)
    }
}

impl Budget {
    fn spend(&mut self, row: &Row<'_>) {
        let values = (0..row.as_ref().column_count()).filter_map(|index| row.get_ref(index).ok()?.as_blob().ok());
        self.entries -= 1;
        self.bytes = self.bytes.saturating_sub(values.map(<[u8]>::len).sum());
    }

    fn is_spent(&self) -> bool {
        self.entries == 0 || self.bytes == 0
    }
}

/// A record that is in the log with the bytes that it has, or older than the log, and its leaf.
fn examine_record(
    transaction: &Transaction<'_>,
    row: &Row<'_>,
    check: Check,
    proven: &mut Proven,
) -> rusqlite::Result<Result<(Record, Option<u64>), Unreadable>> {
    let record = match read(transaction, row, check) {
        Ok(record) => record,
        Err(unreadable) => return Ok(Err(unreadable)),
    };
    let leaf = leaf(row)?;
    let is_sound = match leaf {
        Some(leaf) => log::is_in_log(transaction, proven, leaf, Entry::Cycle(&record.bytes))?,
        None => true,
    };
    let Record { cycle_id, revision, .. } = record;
    let problem = NOT_IN_LOG.into();
    Ok(if is_sound { Ok((record, leaf)) } else { Err(Unreadable { cycle_id, revision, problem }) })
}

/// The kind and the time of an audit event that is in the log with the bytes that it has.
fn examine_event(
    transaction: &Transaction<'_>,
    row: &Row<'_>,
    check: EventCheck,
    proven: &mut Proven,
) -> rusqlite::Result<Result<(EventKind, Timestamp), UnreadableEvent>> {
    let leaf = number(row, "leaf")?;
    let unreadable = |problem| Ok(Err(UnreadableEvent { leaf, problem }));
    let entry = match event(row) {
        Ok(entry) => entry,
        Err(error) => return unreadable(error.to_string()),
    };
    if !log::is_in_log(transaction, proven, leaf, Entry::Audit(&entry.bytes))? {
        return unreadable(NOT_IN_LOG.into());
    }
    match check(&entry) {
        Ok(()) => Ok(Ok((entry.kind, entry.time))),
        Err(problem) => unreadable(problem),
    }
}

/// The problem of an entry whose hashes do not lead to the end of the log.
const NOT_IN_LOG: &str = "its bytes were changed: the log does not have them as its leaf";

/// The first leaf whose entry retention has not removed, without these either. Entries about earlier removals go with
/// what is around them. An entry that is missing without a removal stays in the way: nothing may say that retention
/// removed it.
fn first_kept(
    transaction: &Transaction<'_>,
    proven: &mut Proven,
    term: &Term,
    removed: &Leaves,
) -> rusqlite::Result<u64> {
    let mut leaf = term.frontier.log.first_kept;
    while leaf < term.frontier.log.frontier.size() {
        let next = term.removed.from(leaf).end.max(removed.from(leaf).end);
        if next == leaf && log::control_entry(transaction, proven, leaf)?.is_none() {
            break;
        }
        leaf = next.max(leaf + 1);
    }
    Ok(leaf)
}
