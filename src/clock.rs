//! The wall clock, which tests can put on tokio's paused time.

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the time of day.
#[derive(Clone, Copy, Debug)]
pub enum Clock {
    /// The system's clock, with whatever adjustments are made to it.
    System,
    /// Starts at a given time and moves with tokio's clock.
    Simulated(Timestamp, Instant),
}

impl Clock {
    /// A clock that shows `start` now.
    pub fn simulated(start: Timestamp) -> Self {
        Self::Simulated(start, Instant::now())
    }

    /// What time it is.
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => Timestamp::now(),
            Self::Simulated(start, since) => start.saturating_add(since.elapsed()).unwrap_or(Timestamp::MAX),
        }
    }
}
