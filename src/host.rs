//! The time and the randomness of a process, which a simulation replaces. It is built where the process begins, and
//! passed to everything that needs it; clippy refuses any other source (see `clippy.toml`).

use jiff::Timestamp;

use crate::{
    clock::{Clock, Moment},
    random::Random,
};

/// One clock and one source of randomness for the whole process.
#[derive(Clone, Debug)]
pub struct Host {
    /// Dates records, ticks and epochs.
    pub clock: Clock,
    /// Decides jitter, the ids of spans, and which cycles are traced.
    pub random: Random,
    /// When the process started.
    pub started: Moment,
}

impl Host {
    /// Those of this machine.
    pub fn system() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the one place that makes them")]
        Self::of(Clock::system(), Random::system())
    }

    /// A clock that shows `start` now and moves with tokio's clock, and the sequence of random numbers of `seed`.
    pub fn simulated(start: Timestamp, seed: u64) -> Self {
        Self::of(Clock::simulated(start), Random::seeded(seed))
    }

    /// A process that starts now.
    pub fn of(clock: Clock, random: Random) -> Self {
        Self { clock, random, started: clock.moment() }
    }
}
