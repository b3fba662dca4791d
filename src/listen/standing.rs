//! Whether the peer of a connection is known, which limits how long it may stay.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The standing of a peer. All clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Standing(Arc<Mutex<Stands>>);

#[derive(Clone, Copy, Debug)]
enum Stands {
    /// It has to identify itself.
    Stranger,
    /// A stranger that has asked for the health of the service at this time.
    Probe(Instant),
    /// It may stay.
    Known,
}

impl Default for Standing {
    fn default() -> Self {
        Self::of(Stands::Known)
    }
}

impl Standing {
    /// Time until the connection of a stranger is closed that asks for nothing but health: load balancers do.
    pub(super) const PROBE: Duration = Duration::from_mins(1);

    /// That of a stranger.
    pub(super) fn stranger() -> Self {
        Self::of(Stands::Stranger)
    }

    fn of(stands: Stands) -> Self {
        Self(Arc::new(Mutex::new(stands)))
    }

    /// Records that the peer has proved its identity.
    pub(crate) fn identified(&self) {
        *self.stands() = Stands::Known;
    }

    /// Records that the peer asks for the health of the service.
    pub(super) fn probes(&self) {
        let mut stands = self.stands();
        if !matches!(*stands, Stands::Known) {
            *stands = Stands::Probe(Instant::now());
        }
    }

    /// True if the peer may stay.
    pub(super) fn is_known(&self) -> bool {
        matches!(*self.stands(), Stands::Known)
    }

    /// How long it may stay at least, although it is a stranger.
    pub(super) fn stays_until(&self) -> Option<Instant> {
        if let Stands::Probe(at) = *self.stands() { Some(at + Self::PROBE) } else { None }
    }

    fn stands(&self) -> MutexGuard<'_, Stands> {
        // A panic leaves the value usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
