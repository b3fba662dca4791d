//! Decisions of a simulation that don't depend on the order in which they are made.
//!
//! Where several tasks wait for one `watch` channel of tokio, they are woken in an order that no seed decides. They run
//! at the same simulated time; so what is decided then depends on the time and on what it is about, and not on how many
//! decisions came before.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use fastrand::Rng;
use tokio::time::Instant;

/// The source of some decisions.
#[derive(Clone, Copy)]
pub(crate) struct Chance {
    seed: u64,
    began: Instant,
}

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, began: Instant::now() }
    }

    /// The source of all decisions about something.
    pub(crate) fn of(self, about: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        (self.seed, about).hash(&mut hasher);
        Self { seed: hasher.finish(), ..self }
    }

    /// The decisions about something, at any time.
    pub(crate) fn on(self, about: &impl Hash) -> Rng {
        Rng::with_seed(self.of(about).seed)
    }

    /// The decisions about something now.
    pub(crate) fn now(self, about: &impl Hash) -> Rng {
        self.on(&(about, self.elapsed()))
    }

    /// The time since the start.
    pub(crate) fn elapsed(self) -> Duration {
        self.began.elapsed()
    }
}
