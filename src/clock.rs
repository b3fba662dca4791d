//! The wall clock of a process. Durations and deadlines go by tokio's clock, which tests pause.

use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the time of day.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Source);

#[derive(Clone, Copy, Debug)]
enum Source {
    System,
    /// Showed this time at that instant. Each simulation leaves one, so that clocks can be copied.
    Simulated(&'static Mutex<(Timestamp, Instant)>),
}

impl Clock {
    /// The system's clock, with whatever adjustments are made to it.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that shows `start` now, and moves with tokio's clock.
    pub fn simulated(start: Timestamp) -> Self {
        Self(Source::Simulated(Box::leak(Box::new(Mutex::new((start, Instant::now()))))))
    }

    /// Sets a simulated clock and its copies, as the clock of a machine is set: forward or back. Leaves the system's
    /// clock unchanged.
    pub fn set(&self, time: Timestamp) {
        if let Source::Simulated(shown) = self.0 {
            *shown.lock().unwrap_or_else(PoisonError::into_inner) = (time, Instant::now());
        }
    }

    /// The current time.
    pub fn now(&self) -> Timestamp {
        match self.0 {
            #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
            Source::System => Timestamp::now(),
            Source::Simulated(shown) => {
                let (time, since) = *shown.lock().unwrap_or_else(PoisonError::into_inner);
                time.saturating_add(since.elapsed()).unwrap_or(Timestamp::MAX)
            }
        }
    }
}
