//! The port to what several replicas agree by on which one leads.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use jiff::Timestamp;

use super::StoreError;
use crate::model::{Epoch, Leader, Replica};

/// The row of a database that says which replica leads. It has a beat, which the leader raises at short intervals; a
/// replica for which it has stood still for long enough claims the row.
///
/// Each method is one statement. If its future is dropped, or it returns an error, it may have been executed, or may
/// still be.
pub trait Leadership: Send + Sync + 'static {
    /// Reads the row.
    ///
    /// # Errors
    /// It can't be read, or there was no answer for some seconds: a follower that waited for longer would not see the
    /// end of a term.
    fn observe(&self) -> BoxFuture<'_, Result<Observed, StoreError>>;

    /// Claims the row, if it is still as it was `seen`, for a new term, whose epoch is later than all earlier ones.
    /// Nothing of an earlier epoch commits once this was executed. The store takes over for this term only once a claim
    /// was acknowledged, here or by a [renewal](Self::renew).
    ///
    /// # Errors
    /// The outcome is not known, or a commit of the earlier leader is in the way. Sessions of that leader which have
    /// begun a commit and stopped in the middle of it are ended, so that a later claim succeeds.
    fn claim<'a>(&'a self, seen: &'a Observed, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>>;

    /// Raises the beat of a term, as durably as commits are. Acknowledges the claim of that term as well. It may have
    /// to wait for a standby.
    ///
    /// # Errors
    /// The outcome is not known. Also without an answer, once another replica has claimed a later term.
    fn renew(&self, epoch: Epoch) -> BoxFuture<'_, Result<Renewed, StoreError>>;

    /// Ends a term, so that another replica can claim the row at once.
    ///
    /// # Errors
    /// The outcome is not known.
    fn release(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>>;
}

/// The row as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// The term of the row; the lowest epoch if no replica has ever claimed it.
    pub epoch: Epoch,
    /// Number of renewals of all terms.
    pub beat: u64,
    /// The id of the claim that began the term.
    pub claim: ClaimId,
    /// The replica of the term; `None` if no replica has ever claimed the row, or the term was released.
    pub leader: Option<Leader>,
    /// The TTL of the lease of that replica.
    pub lease_ttl: Duration,
    /// The orchestrator whose replicas have claimed the row; `None` if none ever has.
    pub orchestrator_id: Option<Arc<str>>,
    /// The time by the clock of the database.
    pub time: Timestamp,
    /// The error of a server that lacks an acknowledged record: see [`Store::require`](super::Store::require).
    pub behind: Option<StoreError>,
}

impl Observed {
    /// Checks that replicas of the orchestrator with this id may claim the row.
    ///
    /// # Errors
    /// It is that of another orchestrator.
    pub fn check_orchestrator(&self, own: &str) -> Result<(), OtherOrchestrator> {
        match &self.orchestrator_id {
            Some(found) if **found != *own => Err(OtherOrchestrator { own: own.to_owned(), found: found.clone() }),
            _ => Ok(()),
        }
    }
}

/// The store is that of another orchestrator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "orchestrator_id is {own:?} in the configuration of this replica, and the store is that of the orchestrator \
     {found:?}: set orchestrator_id to {found:?}, or name another store in store.url. To rename the orchestrator of \
     the store, run `orchestrator store rename`"
)]
pub struct OtherOrchestrator {
    /// The id of this one.
    pub own: String,
    /// The id in the store.
    pub found: Arc<str>,
}

/// A number that no two claims have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimId(pub u64);

impl ClaimId {
    /// The id with these random bits, less one that databases have no room for.
    #[must_use]
    pub fn of(random: u64) -> Self {
        Self(random >> 1)
    }
}

/// A claim of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its id.
    pub id: ClaimId,
    /// The replica.
    pub replica: Replica,
    /// The id of its orchestrator.
    pub orchestrator_id: Arc<str>,
    /// The TTL of its lease. Other replicas wait at least as long before they claim the row.
    pub lease_ttl: Duration,
    /// The lowest epoch of the new term, by the clock of the replica.
    pub at_least: Epoch,
}

/// The outcome of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// The replica leads, for this term.
    Won(Epoch),
    /// The row was not as it was seen any more: the leader is alive, or another replica has claimed it.
    Lost,
}

/// The outcome of a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// The row has the beat.
    Acknowledged,
    /// The row has another term: this one is over.
    Superseded,
}
