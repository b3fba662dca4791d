//! The revoked owners, whose subsystems are not called.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use super::Member;
use crate::model::Identity;

/// The revoked identities. All clones share them, so that a cycle that runs sees a revocation at once.
#[derive(Clone, Debug, Default)]
pub struct RevokedOwners(Arc<Mutex<Arc<BTreeSet<Identity>>>>);

impl RevokedOwners {
    /// Replaces all of them.
    pub fn set(&self, identities: Arc<BTreeSet<Identity>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = identities;
    }

    /// The owner of this subsystem, if it is revoked.
    #[must_use]
    pub fn owner_of<'m>(&self, member: &'m Member) -> Option<&'m Identity> {
        let owner = member.owner.as_ref()?;
        let revoked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        revoked.contains(owner).then_some(owner)
    }
}
