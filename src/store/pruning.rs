//! Which records retention removes: the rule of every store.

use jiff::Timestamp;

use crate::{
    model::{CycleState, Revision},
    ports::{Retention, RetentionRule},
};

/// Each rule with its states.
pub(super) fn rules(retention: &Retention) -> Vec<(RetentionRule, Vec<CycleState>)> {
    let own = retention.by_state.iter().map(|(state, rule)| (*rule, vec![*state]));
    let others = CycleState::ALL.into_iter().filter(|state| !retention.by_state.contains_key(state)).collect();
    own.chain([(retention.default, others)]).collect()
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
