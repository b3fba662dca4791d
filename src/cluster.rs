//! The replicas of one orchestrator over one store, one of which leads.
//!
//! [`Membership`] is what a replica knows of itself and of the leader; its [`Role`] changes during the life of the
//! process. A store that one process has for itself makes that process its leader for good.

use std::sync::Arc;

use tokio::sync::watch;

use crate::model::{Epoch, Replica, Role};

/// A replica and its role. All clones are of the same replica.
#[derive(Clone, Debug)]
pub struct Membership {
    replica: Arc<Replica>,
    /// False if the store admits only one process, so that there are no other replicas.
    has_peers: bool,
    role: watch::Receiver<Role>,
}

impl Membership {
    /// A replica that shares its store with others. Also returns what changes its role: until then it is a follower,
    /// and no leader is known.
    pub fn of(replica: Replica) -> (Self, watch::Sender<Role>) {
        let (change, role) = watch::channel(Role::Follower { leader: None });
        (Self { replica: Arc::new(replica), has_peers: true, role }, change)
    }

    /// The only process of an orchestrator, which leads for this term.
    #[must_use]
    pub fn alone(replica: Replica, epoch: Epoch) -> Self {
        // A receiver keeps the last value of a sender that is gone.
        let role = watch::channel(Role::Leader { epoch }).1;
        Self { replica: Arc::new(replica), has_peers: false, role }
    }

    /// This replica.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// True if other processes may share the store.
    pub fn has_peers(&self) -> bool {
        self.has_peers
    }

    /// Its role now.
    pub fn role(&self) -> Role {
        self.role.borrow().clone()
    }

    /// Its role, and each change of it.
    pub fn roles(&self) -> watch::Receiver<Role> {
        self.role.clone()
    }
}
