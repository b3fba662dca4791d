//! The endpoints that refuse connections in a running cycle.
//!
//! A process that has died takes all its subsystems along. Without this, each of them would make all its attempts, one
//! subsystem after the other. So the waits between attempts that an endpoint refused count for all subsystems there:
//! what one of them has waited for in vain, the later ones don't wait for again. Each still makes one attempt, since
//! the process may be back.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::model::{Endpoint, Name, Subsystem};

/// The endpoints whose last attempt in a cycle was refused. At most one for each subsystem of the cycle.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<BTreeMap<Endpoint, Refusal>>);

/// The refusals of one endpoint since it last took a connection.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    /// The subsystem that was refused first.
    pub(super) of: Name,
    /// Number of waits before the latest attempt, as the subsystem with most of them counts. Those of concurrent
    /// attempts are not added up, since they pass at the same time.
    pub(super) waits: u32,
}

impl Refusals {
    /// The refusals of a subsystem's endpoint; `None` if it refuses none, as far as is known.
    pub(super) fn at(&self, subsystem: &Subsystem) -> Option<Refusal> {
        self.lock().get(&subsystem.endpoint).cloned()
    }

    /// The endpoint refuses a subsystem after this number of waits, its own and earlier ones.
    pub(super) fn refused(&self, subsystem: &Subsystem, waits: u32) {
        let mut refusals = self.lock();
        let first = || Refusal { of: subsystem.name.clone(), waits };
        let refusal = refusals.entry(subsystem.endpoint.clone()).or_insert_with(first);
        refusal.waits = refusal.waits.max(waits);
    }

    /// The endpoint does not refuse a subsystem.
    pub(super) fn took(&self, subsystem: &Subsystem) {
        self.lock().remove(&subsystem.endpoint);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Endpoint, Refusal>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
