//! Finds what retention removes next, in the order of the log, and by what the entries themselves say: a column or an
//! index that another program has changed can't have something removed before its time, and neither can an entry that
//! is missing.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{
    entries::{MAX_RECORD, Rows, Table, control_entry},
    frontier::Frontier,
    pruning::{Limits, rules},
    term::Term,
    walk::{Is, Passed, Place, Source, Step, Walk},
};
use crate::{
    ledger::{Leaves, Proven},
    model::{CycleState, EventKind, Revision},
    ports::{Checks, Excess, OldEvent, OldRecord, Retention},
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
    /// Before it nothing is left that the rule may remove.
    place: Place,
    /// Number of entries before it that are missing or not what was written. They may be those of the rule, and count
    /// as such that stay.
    missing: u64,
    /// The problem of the first one of them.
    problem: Option<String>,
}

/// What an entry is for a rule.
#[derive(Clone, Copy)]
enum OfRule {
    No,
    /// The newest record, which no rule removes. A later one may be the newest when it is examined again.
    Stays,
    /// One of the rule, from this time.
    From(Timestamp),
}

/// What one search may still find and examine, of all rules together.
struct Budget {
    /// Most entries that one rule finds.
    limit: usize,
    entries: usize,
    bytes: usize,
}

impl Searches {
    /// What exceeds these limits: at most `limit` records and events; and the problem of a damaged one.
    pub(super) fn excess<R: Rows>(
        &mut self,
        rows: &mut R,
        term: &Term,
        checks: Checks,
        retention: &Retention,
        now: Timestamp,
        limit: usize,
    ) -> Result<(Excess, Option<String>), R::Error> {
        let Term { frontier: Frontier { log, .. }, removed, accepted, unlogged_to, .. } = term;
        let proven = Proven::of(&log.frontier);
        let mut source = Source { rows, checks, log, removed, accepted, unlogged_to: *unlogged_to, proven };
        let mut budget = Budget { limit, entries: MOST_EXAMINED, bytes: MOST_BYTES };
        let newest = term.frontier.last_revision.0;
        let mut records = Vec::new();
        let rules = rules(retention);
        self.records.retain(|states, _| rules.iter().any(|(_, known)| known == states));
        for (rule, states) in &rules {
            let search = self.records.entry(states.clone()).or_default();
            let limits = rule.limits(states.iter().map(|state| term.counts.records_of(*state)).sum(), now);
            let of_rule = |entry: &Passed| match entry.is {
                Is::Record(..) if entry.place >= newest => OfRule::Stays,
                Is::Record(state, time) if states.contains(&state) => OfRule::From(time),
                _ => OfRule::No,
            };
            let oldest = search.oldest(&mut source, Table::Records, limits, &mut budget, of_rule)?;
            records.extend(oldest.into_iter().filter_map(|Passed { place, leaf, is, .. }| match is {
                Is::Record(state, _) => Some(OldRecord { revision: Revision(place), leaf, state }),
                _ => None,
            }));
        }
        records.sort_unstable();
        records.truncate(limit);
        let mut events = Vec::new();
        for (kind, search) in EventKind::ALL.into_iter().zip(&mut self.events) {
            let limits = retention.events.limits(term.counts.events_of(kind), now);
            let of_rule = |entry: &Passed| match entry.is {
                Is::Event(found, time) if found == kind => OfRule::From(time),
                _ => OfRule::No,
            };
            let oldest = search.oldest(&mut source, Table::Events, limits, &mut budget, of_rule)?;
            events.extend(oldest.into_iter().map(|Passed { place, .. }| OldEvent { leaf: place, kind }));
        }
        events.sort_unstable();
        events.truncate(limit - records.len());
        let mut excess = Excess { records, events, is_partial: budget.is_spent(), ..Excess::default() };
        let removed = excess.leaves().map(|leaf| leaf..leaf + 1).collect();
        excess.first_kept = first_kept(&mut source, &removed)?;
        Ok((excess, self.problem()))
    }

    /// The problem of the first search that has found one.
    fn problem(&self) -> Option<String> {
        let mut searches = self.records.values().chain(&self.events);
        searches.find_map(|search| search.problem.clone())
    }
}

impl Search {
    /// The oldest entries of the rule, as far as they exceed its limits and the budget reaches.
    fn oldest<R: Rows>(
        &mut self,
        source: &mut Source<'_, R>,
        about: Table,
        limits: Limits,
        budget: &mut Budget,
        of_rule: impl Fn(&Passed) -> OfRule,
    ) -> Result<Vec<Passed>, R::Error> {
        let mut oldest = Vec::new();
        if limits.exceed_none() {
            return Ok(oldest);
        }
        let mut missing = self.missing;
        let mut walk = Walk::new(source, about, self.place);
        while oldest.len() < budget.limit
            && !budget.is_spent()
            && let Some(step) = walk.step()?
        {
            match step {
                Step::Entry(entry) => {
                    let of_rule = of_rule(&entry);
                    let stays = match of_rule {
                        OfRule::No => false,
                        OfRule::Stays => true,
                        OfRule::From(time) => !limits.are_exceeded(oldest.len() as u64 + missing, time),
                    };
                    // It is examined again by the next search: without end, if it took from the budget.
                    if stays {
                        break;
                    }
                    budget.spend(entry.bytes);
                    if let OfRule::From(_) = of_rule {
                        oldest.push(entry);
                    }
                }
                Step::Missing { leaf, number } => {
                    missing += number;
                    self.problem.get_or_insert_with(|| {
                        format!("leaf {leaf} of the log is missing, and no entry says that retention removed it")
                    });
                }
                Step::Damaged { problem, bytes, is_older } => {
                    budget.spend(bytes);
                    missing += u64::from(is_older);
                    self.problem.get_or_insert(problem);
                }
            }
            if oldest.is_empty() {
                (self.place, self.missing) = (walk.place(), missing);
            }
        }
        Ok(oldest)
    }
}

impl Budget {
    fn spend(&mut self, bytes: usize) {
        self.entries -= 1;
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn is_spent(&self) -> bool {
        self.entries == 0 || self.bytes == 0
    }
}

/// The first leaf whose entry retention has not removed, without these either. Entries about earlier removals go with
/// what is around them. An entry that is missing without a removal stays in the way: nothing may say that retention
/// removed it.
fn first_kept<R: Rows>(source: &mut Source<'_, R>, removed: &Leaves) -> Result<u64, R::Error> {
    let Source { rows, log, removed: earlier, proven, .. } = source;
    let mut leaf = log.first_kept;
    while leaf < log.frontier.size() {
        let next = earlier.from(leaf).end.max(removed.from(leaf).end);
        if next == leaf && control_entry(*rows, proven, leaf)?.is_none() {
            break;
        }
        leaf = next.max(leaf + 1);
    }
    Ok(leaf)
}
