//! Durations, counted in buckets.

use std::time::Duration;

/// A histogram of durations. The buckets are the same everywhere, so that histograms can be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Number of durations for each bound, above the previous one; the last entry is above all bounds.
    counts: [u64; Self::BOUNDS.len() + 1],
    sum: Duration,
}

impl Histogram {
    /// The upper bounds of the buckets, in seconds: from a write without a disk wait to the longest cycle by default.
    pub const BOUNDS: [f64; 15] =
        [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

    /// Counts a duration.
    pub fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = Self::BOUNDS.partition_point(|bound| *bound < seconds);
        self.counts[bucket] += 1;
        self.sum = self.sum.saturating_add(duration);
    }

    /// Number of durations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of the durations.
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// Each bound, with the number of durations up to it.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut so_far = 0;
        Self::BOUNDS.into_iter().zip(self.counts).map(move |(bound, count)| {
            so_far += count;
            (bound, so_far)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let mut histogram = Histogram::default();
        for milliseconds in [0, 1, 2, 60_000, 60_001] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let cumulative: Vec<_> = histogram.cumulative().collect();
        assert_eq!((cumulative[0], cumulative[1]), ((0.001, 2), (0.0025, 3)));
        assert_eq!(cumulative[14], (60.0, 4));
        assert_eq!((histogram.count(), histogram.sum()), (5, Duration::from_millis(120_004)));
    }
}
