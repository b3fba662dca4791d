//! The processes of one orchestrator.

use super::{Endpoint, Epoch};

/// One process of an orchestrator, which may have several over one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Its name, for people: by the rule of [`is_orchestrator_id`](super::is_orchestrator_id). Two replicas should not
    /// have the same one, but nothing depends on that.
    pub name: String,
    /// Where the other replicas reach its gRPC server, over `http` or `https`; `None` if it has not said so.
    pub address: Option<Endpoint>,
}

/// The replica that leads: it alone runs cycles and writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// The replica.
    pub replica: Replica,
    /// Its term.
    pub epoch: Epoch,
}

/// What a replica does at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads.
    Leader {
        /// Its term.
        epoch: Epoch,
    },
    /// It does not, and takes over once no other replica leads.
    Follower {
        /// The replica that leads, as far as it is known; never this one.
        leader: Option<Leader>,
    },
}

impl Role {
    /// The term, if it leads.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        match self {
            Self::Leader { epoch } => Some(*epoch),
            Self::Follower { .. } => None,
        }
    }
}
