//! The circuit breaker of one subsystem: holds back calls while it keeps failing.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::BreakerPolicy;

/// Counts the results of one subsystem, and decides whether it is called. Uses tokio's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Breaker {
    failures: u32,
    open_since: Option<Instant>,
}

/// The state of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls are made.
    Closed,
    /// Calls are held back for this time.
    Open(Duration),
    /// One probe call may be made.
    HalfOpen,
}

impl Breaker {
    /// Its state under `policy`; closed without a policy.
    pub fn state(&self, policy: Option<BreakerPolicy>, now: Instant) -> BreakerState {
        let (Some(policy), Some(since)) = (policy, self.open_since) else { return BreakerState::Closed };
        match policy.open_for.checked_sub(now - since) {
            None | Some(Duration::ZERO) => BreakerState::HalfOpen,
            Some(left) => BreakerState::Open(left),
        }
    }

    /// Records a success in a cycle. Returns true if that closes the breaker.
    pub fn succeeded(&mut self) -> bool {
        std::mem::take(self).open_since.is_some()
    }

    /// Records a failure in a cycle. A failed probe opens the breaker again. Returns true if it was closed and opens.
    pub fn failed(&mut self, policy: Option<BreakerPolicy>, now: Instant) -> bool {
        self.failures = self.failures.saturating_add(1);
        let was_open = self.open_since.is_some();
        if was_open || policy.is_some_and(|policy| self.failures >= policy.failure_threshold) {
            self.open_since = Some(now);
        }
        !was_open && self.open_since.is_some()
    }

    /// Number of consecutive failures.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_breaker_opens_at_the_threshold_probes_later_and_closes_on_success() {
        let open_for = Duration::from_secs(30);
        let policy = Some(BreakerPolicy { failure_threshold: 2, open_for });
        let mut breaker = Breaker::default();
        assert!(!breaker.failed(policy, Instant::now()));
        assert_eq!(breaker.state(policy, Instant::now()), BreakerState::Closed);
        assert!(breaker.failed(policy, Instant::now()), "it opens");
        assert_eq!((breaker.failures(), breaker.state(policy, Instant::now())), (2, BreakerState::Open(open_for)));

        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(breaker.state(policy, Instant::now()), BreakerState::HalfOpen);
        assert!(!breaker.failed(policy, Instant::now()), "it was open");
        assert_eq!((breaker.failures(), breaker.state(policy, Instant::now())), (3, BreakerState::Open(open_for)));

        tokio::time::advance(Duration::from_secs(31)).await;
        assert!(breaker.succeeded(), "it closes");
        assert_eq!((breaker.failures(), breaker.state(policy, Instant::now())), (0, BreakerState::Closed));
        assert!(!breaker.failed(policy, Instant::now()));
        assert_eq!(breaker.state(policy, Instant::now()), BreakerState::Closed);
        assert!(!breaker.succeeded(), "it was closed");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_policy_a_breaker_never_opens() {
        let mut breaker = Breaker::default();
        for _ in 0..5000 {
            assert!(!breaker.failed(None, Instant::now()));
        }
        assert_eq!(breaker.state(None, Instant::now()), BreakerState::Closed);
    }
}
