//! Which records, events and hashes retention removes: the rule of every store.

use std::ops::Range;

use jiff::Timestamp;

use crate::{
    ledger::Node,
    model::{CycleState, Revision},
    ports::{EventRule, Retention, RetentionRule},
};

/// Each rule with its states.
pub(super) fn rules(retention: &Retention) -> Vec<(RetentionRule, Vec<CycleState>)> {
    let own = retention.by_state.iter().map(|(state, rule)| (*rule, vec![*state]));
    let others = CycleState::ALL.into_iter().filter(|state| !retention.by_state.contains_key(state)).collect();
    own.chain([(retention.default, others)]).collect()
}

/// The leaves of the audit events of one kind to remove, given their number; `oldest` has the lowest leaves, in order.
pub(super) fn events_to_prune(
    rule: EventRule,
    count: u64,
    oldest: impl Iterator<Item = (u64, Timestamp)>,
    now: Timestamp,
) -> Vec<u64> {
    let too_many = rule.max_events.map_or(0, |max| count.saturating_sub(max));
    let too_old = rule.max_age.and_then(|age| now.checked_sub(age).ok());
    (0_u64..)
        .zip(oldest)
        .take_while(|(i, (_, time))| *i < too_many || too_old.is_some_and(|limit| *time <= limit))
        .map(|(_, (leaf, _))| leaf)
        .collect()
}

/// The records of one rule to remove, given their number; `oldest` has those with the lowest revisions, in order.
pub(super) fn to_prune(
    rule: RetentionRule,
    count: u64,
    oldest: impl Iterator<Item = (Revision, Timestamp)>,
    now: Timestamp,
    keep: Revision,
) -> Vec<Revision> {
    let too_many = rule.max_cycles.map_or(0, |max| count.saturating_sub(max));
    let too_old = rule.max_age.and_then(|age| now.checked_sub(age).ok());
    (0_u64..)
        .zip(oldest)
        .take_while(|(i, (_, finished_at))| *i < too_many || too_old.is_some_and(|limit| *finished_at <= limit))
        .map(|(_, (revision, _))| revision)
        .filter(|revision| *revision != keep)
        .collect()
}

/// The numbers of the hashes that no proof of the rest needs, given the removed leaves, in increasing order, and the
/// size of the log: those of all nodes below the largest subtrees of which all entries are `gone`.
pub(super) fn needless_hashes<E>(
    removed: &[u64],
    size: u64,
    mut gone: impl FnMut(Range<u64>) -> Result<bool, E>,
) -> Result<Vec<Range<u64>>, E> {
    let mut needless = Vec::new();
    let mut done = 0;
    for leaf in removed {
        if *leaf >= done {
            let largest = Node::largest_of(*leaf, size, &mut gone)?;
            needless.push(largest.below());
            done = largest.leaves().end;
        }
    }
    Ok(needless)
}
