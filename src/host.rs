//! The time and the randomness of a process, which a simulation replaces. It is built where the process begins, and
//! passed to everything that needs it; clippy refuses any other source (see `clippy.toml`).

use jiff::Timestamp;

use crate::{clock::Clock, random::Random};

/// One clock and one source of randomness for the whole process.
#[derive(Clone, Debug)]
pub struct Host {
    /// Dates records, ticks and epochs.
    pub clock: Clock,
    /// Decides jitter, the ids of spans, and which cycles are traced.
    pub random: Random,
}

impl Host {
    /// Those of this machine.
    pub fn system() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the one place that makes them")]
        Self { clock: Clock::system(), random: Random::system() }
    }

    /// A clock that shows `start` now and moves with tokio's clock, and the sequence of random numbers of `seed`.
    pub fn simulated(start: Timestamp, seed: u64) -> Self {
        Self { clock: Clock::simulated(start), random: Random::seeded(seed) }
    }
}
