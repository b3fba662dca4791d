//! Cycles that the service itself ends.

use super::State;
use crate::model::CycleId;

/// Why the service itself ends a cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Ended {
    /// No call of the parent has waited for it for a while.
    Alone,
    /// Its deadline passed before its turn.
    Late,
    /// A later term of the parent has begun.
    Superseded,
    /// The lease of this replica has ended, so that another one may lead.
    Unconfirmed,
}

impl Ended {
    /// As audit events call it.
    pub(super) fn action(self) -> &'static str {
        match self {
            Self::Alone => "parent_gone",
            Self::Late => "parent_deadline",
            Self::Superseded => "parent_superseded",
            Self::Unconfirmed => "lease_lapsed",
        }
    }

    /// The error of a cancelled cycle, with this reason after its first word.
    pub(super) fn explain(self, cancelled: &str) -> String {
        let why = match self {
            Self::Alone => "since no call of its parent waits for it",
            Self::Late => "since its deadline passed",
            Self::Superseded => "since a later epoch of its parent has begun",
            Self::Unconfirmed => "since this replica could not confirm that it leads",
        };
        let (first, rest) = cancelled.split_at(cancelled.find([' ', ';']).unwrap_or(cancelled.len()));
        match rest.strip_prefix(' ') {
            Some(rest) => format!("{first} {rest}, {why}"),
            None => format!("{first}, {why}{rest}"),
        }
    }
}

impl State {
    /// Cancels a cycle.
    pub(super) fn end(&mut self, cycle_id: CycleId, why: Ended) {
        self.attended.ends(cycle_id);
        if let Some(admitted) = self.live.get(&cycle_id) {
            admitted.end(why);
        }
        self.cancel(cycle_id);
        tracing::info!(cycle_id = cycle_id.0, why = why.action(), "a cycle is cancelled by the service");
    }
}
