//! Which records, events and hashes retention removes: the rules of every store.

use std::{convert::Infallible, ops::Range, time::Duration};

use jiff::Timestamp;

use crate::{
    ledger::Node,
    model::CycleState,
    ports::{EventRule, Retention, RetentionRule},
};

/// Each rule with its states.
pub(super) fn rules(retention: &Retention) -> Vec<(RetentionRule, Vec<CycleState>)> {
    let own = retention.by_state.iter().map(|(state, rule)| (*rule, vec![*state]));
    let others = CycleState::ALL.into_iter().filter(|state| !retention.by_state.contains_key(state)).collect();
    own.chain([(retention.default, others)]).collect()
}

/// The limits of one rule at some time, given the number of its entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// This number of the oldest entries is more than there may be.
    too_many: u64,
    /// Entries from this time, or before, are too old.
    too_old: Option<Timestamp>,
}

impl Limits {
    fn new(max: Option<u64>, max_age: Option<Duration>, count: u64, now: Timestamp) -> Self {
        Self {
            too_many: max.map_or(0, |max| count.saturating_sub(max)),
            too_old: max_age.filter(|_| count > 0).and_then(|age| now.checked_sub(age).ok()),
        }
    }

    /// True if no entry can exceed them.
    pub(super) fn exceed_none(self) -> bool {
        self.too_many == 0 && self.too_old.is_none()
    }

    /// True if an entry from this time exceeds them, when this number of entries is older.
    pub(super) fn are_exceeded(self, older: u64, time: Timestamp) -> bool {
        older < self.too_many || self.too_old.is_some_and(|limit| time <= limit)
    }

    /// Those of these entries that exceed them; they are all entries of the rule, the oldest first.
    pub(super) fn excess<T>(self, entries: impl Iterator<Item = (T, Timestamp)>) -> impl Iterator<Item = T> {
        let entries = (0..).zip(entries).take_while(move |(older, (_, time))| self.are_exceeded(*older, *time));
        entries.map(|(_, (entry, _))| entry)
    }
}

impl RetentionRule {
    /// Its limits, when it has this number of records.
    pub(super) fn limits(self, count: u64, now: Timestamp) -> Limits {
        Limits::new(self.max_cycles, self.max_age, count, now)
    }
}

impl EventRule {
    /// Its limits, when it has this number of events.
    pub(super) fn limits(self, count: u64, now: Timestamp) -> Limits {
        Limits::new(self.max_events, self.max_age, count, now)
    }
}

/// The numbers of the hashes that no proof of the rest needs, given the removed leaves, in increasing order, and the
/// size of the log: those of all nodes below the largest subtrees of which all entries are `gone`.
pub(super) fn needless_hashes(removed: &[u64], size: u64, gone: impl Fn(Range<u64>) -> bool) -> Vec<Range<u64>> {
    let mut needless = Vec::new();
    let mut done = 0;
    for leaf in removed {
        if *leaf >= done {
            let Ok(largest) = Node::largest_of(*leaf, size, |beside| Ok::<_, Infallible>(gone(beside)));
            needless.push(largest.below());
            done = largest.leaves().end;
        }
    }
    needless
}
