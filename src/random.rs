//! The randomness of a process. Not for secrets: a few outputs reveal the next ones.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fastrand::Rng;

/// One sequence of random numbers. All clones draw from it.
#[derive(Clone, Debug)]
pub struct Random(Arc<Mutex<Rng>>);

impl Random {
    /// A sequence that differs from process to process.
    pub fn system() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the one place that takes randomness from the machine")]
        Self::of(Rng::new())
    }

    /// The sequence of this seed.
    pub fn seeded(seed: u64) -> Self {
        Self::of(Rng::with_seed(seed))
    }

    fn of(rng: Rng) -> Self {
        Self(Arc::new(Mutex::new(rng)))
    }

    /// From 0 up to, but not including, 1.
    pub fn fraction(&self) -> f64 {
        self.rng().f64()
    }

    /// An identifier of 64 bits. Not zero.
    pub fn id64(&self) -> u64 {
        self.rng().u64(1..)
    }

    /// An identifier of 128 bits. Not zero.
    pub fn id128(&self) -> u128 {
        self.rng().u128(1..)
    }

    fn rng(&self) -> MutexGuard<'_, Rng> {
        // A panic leaves the generator usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_of_a_seed_draw_from_one_sequence() {
        let draw = |random: &Random| (random.id64(), random.id128(), random.fraction().to_bits());
        let (one, other) = (Random::seeded(7), Random::seeded(7));
        let numbers = [draw(&one), draw(&one.clone()), draw(&one)];
        assert_eq!(numbers, [draw(&other), draw(&other), draw(&other)]);
        assert_ne!(numbers[0], numbers[1]);
        assert_ne!(numbers[0], draw(&Random::seeded(8)));
    }
}
