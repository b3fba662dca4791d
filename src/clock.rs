//! The wall clock of a process. Durations and deadlines go by tokio's clock, which tests pause.

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the time of day.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Source);

#[derive(Clone, Copy, Debug)]
enum Source {
    System,
    /// Showed this time at that instant.
    Simulated(Timestamp, Instant),
}

impl Clock {
    /// The system's clock, with whatever adjustments are made to it.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that shows `start` now, and moves with tokio's clock.
    pub fn simulated(start: Timestamp) -> Self {
        Self(Source::Simulated(start, Instant::now()))
    }

    /// The current time.
    pub fn now(&self) -> Timestamp {
        match self.0 {
            #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
            Source::System => Timestamp::now(),
            Source::Simulated(start, since) => start.saturating_add(since.elapsed()).unwrap_or(Timestamp::MAX),
        }
    }
}
