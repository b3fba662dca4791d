//! The orchestrator of this process, which it has while it leads, and the history, which it always has.

use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

use super::{error, forwarded::Said};
use crate::{
    cluster::{Membership, Sight},
    model::{Epoch, Role},
    orchestrator::{History, NotReady, Orchestrator, StoreEnded},
};

/// The orchestrator, if this process leads, and the history. All clones have the same.
#[derive(Clone)]
pub(super) struct Leading {
    now: Arc<Mutex<Option<Arc<Orchestrator>>>>,
    membership: Membership,
    history: History,
}

impl Leading {
    /// This history, and no orchestrator yet.
    pub(super) fn new(membership: Membership, history: History) -> Self {
        Self { now: Arc::default(), membership, history }
    }

    pub(super) fn membership(&self) -> &Membership {
        &self.membership
    }

    pub(super) fn history(&self) -> &History {
        &self.history
    }

    /// What this leader tells other replicas of itself. Nothing while it does not lead.
    pub(super) fn said(&self) -> Said {
        match self.get() {
            Some(_) => Said { acknowledged: self.history.known(), settings: Some(self.membership.settings()) },
            None => Said::default(),
        }
    }

    /// Calls reach this orchestrator from now on; `None`: none.
    pub(super) fn set(&self, orchestrator: Option<Arc<Orchestrator>>) {
        let earlier = std::mem::replace(&mut *self.now.lock().unwrap_or_else(PoisonError::into_inner), orchestrator);
        // It may be the last one to hold a lot of memory, so not under the lock.
        drop(earlier);
    }

    /// The orchestrator, if there is one.
    pub(super) fn get(&self) -> Option<Arc<Orchestrator>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The orchestrator.
    ///
    /// # Errors
    /// This process does not lead.
    pub(super) fn orchestrator(&self) -> Result<Arc<Orchestrator>, Status> {
        self.get().ok_or_else(|| error::not_leader(&self.membership))
    }

    /// Checks that this process is the leader for which a call of another replica is meant: it leads, in this term. So
    /// another orchestrator takes none of its calls, whatever address the leader has said.
    ///
    /// # Errors
    /// It is not.
    pub(super) fn check_meant(&self, epoch: Option<Epoch>) -> Result<(), Status> {
        match self.membership.role() {
            Role::Leader { epoch: own } if Some(own) == epoch && self.membership.has_peers() => Ok(()),
            Role::Follower { leader: Some(_) } => Err(error::not_leader(&self.membership)),
            Role::Leader { .. } | Role::Follower { leader: None } => Err(error::not_meant(epoch)),
        }
    }

    /// Checks that cycles and changes are accepted, or, by a follower, that the store can be read, and that it could
    /// take over.
    pub(super) fn check_ready(&self) -> Result<(), NotReady> {
        match self.get() {
            Some(orchestrator) => orchestrator.check_ready(),
            None if matches!(*self.membership.sight().borrow(), Sight::Blind(_)) => Err(NotReady::StoreUnreadable),
            None if self.membership.unable().is_some() => Err(NotReady::UnableToLead),
            None => Ok(()),
        }
    }

    /// Checks that writes are possible, now or later.
    pub(super) fn check_alive(&self) -> Result<(), StoreEnded> {
        self.get().map_or(Ok(()), |orchestrator| orchestrator.check_alive())
    }
}
