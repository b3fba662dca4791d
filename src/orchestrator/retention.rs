//! Removes what is no longer to be kept, and doubts the clock before it removes much for its age.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio::{
    select,
    time::{Instant, sleep},
};

use super::Shared;
use crate::ports::{Retention, StoreError};

/// What one pass removes, short enough that a commit hardly waits for it. More than a look finds that has become too old
/// since the last one.
const BATCH: usize = 256;

impl Shared {
    /// Removes what is no longer to be kept.
    pub(super) async fn prune(self: Arc<Self>) {
        /// Age passes without new records.
        const EVERY: Duration = Duration::from_mins(1);
        /// So many new records are worth a look.
        const RECORDS: u64 = 64;
        let mut newest = self.newest.subscribe();
        let mut looked_at = *newest.borrow();
        let last = self.state().last.as_ref().map(|record| record.finished_at);
        let mut doubt = Doubt::new(last.unwrap_or_else(|| self.clock.now()));
        let mut is_told = false;
        loop {
            let looked = self.look(&mut doubt).await;
            self.state().counts.retention.tried(&looked, self.clock.now());
            match looked {
                Ok(removed_for_age) => {
                    let is_full = removed_for_age == BATCH;
                    if is_full && !is_told {
                        tracing::warn!(
                            removed = BATCH,
                            "many records are too old at once: no more than these are removed for it at a time, every minute \
                             and every {RECORDS} cycles; if the clock is wrong, set it right"
                        );
                    }
                    is_told = is_full;
                }
                // One that has nothing to write learns of it here.
                Err(error @ (StoreError::Fenced { .. } | StoreError::Defect { .. })) => self.store_ends(&error),
                // Damage to what is old does not keep new cycles from being recorded.
                Err(error) => tracing::warn!(%error, "can't remove old records"),
            }
            select! {
                biased;
                () = sleep(EVERY) => {}
                changed = newest.wait_for(|revision| revision.0 >= looked_at.0 + RECORDS) => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
            looked_at = *newest.borrow();
        }
    }

    /// Removes all that are too many, and then one batch of those that are too old, however many there are: the clock may
    /// be wrong in ways that nothing tells, and somebody may notice. Returns how many were too old.
    async fn look(&self, doubt: &mut Doubt) -> Result<usize, StoreError> {
        let now = self.clock.now();
        let retention = self.settings().retention.clone();
        let by_number = without_ages(&retention);
        while self.remove(by_number.clone(), now).await? == BATCH {}
        match shortest_age(&retention) {
            Some(shortest) if !doubt.doubts(now, shortest) => self.remove(retention, now).await,
            _ => Ok(0),
        }
    }

    async fn remove(&self, retention: Retention, now: Timestamp) -> Result<usize, StoreError> {
        let pruned = self.store.prune(retention, now, BATCH).await?;
        self.state().pruned_to = pruned.pruned_to;
        Ok(pruned.removed)
    }
}

fn shortest_age(Retention { default, by_state }: &Retention) -> Option<Duration> {
    by_state.values().chain([default]).filter_map(|rule| rule.max_age).min()
}

/// The same rules, but without those for ages.
fn without_ages(retention: &Retention) -> Retention {
    let mut retention = retention.clone();
    retention.default.max_age = None;
    for rule in retention.by_state.values_mut() {
        rule.max_age = None;
    }
    retention
}

/// A clock that leaps forward makes everything old. It may be wrong, and what is removed is gone, so for some time nothing
/// is removed for its age: somebody can set it right. After a long downtime the clock leaps as well, and nothing is lost by
/// waiting.
struct Doubt {
    /// What the clock showed when it was last looked at; at first, when the last cycle was recorded.
    shown: Timestamp,
    at: Instant,
    until: Option<Instant>,
}

impl Doubt {
    /// How long a leap is doubted, unless what is kept is not kept for so long: until somebody has read the log.
    const LONGEST: Duration = Duration::from_hours(24);
    /// A leap of this part of the shortest `max_age` is none: at most so much of the history is removed at once.
    const PART: u32 = 10;

    fn new(shown: Timestamp) -> Self {
        Self { shown, at: Instant::now(), until: None }
    }

    /// Whether nothing is to be removed for its age now.
    fn doubts(&mut self, now: Timestamp, shortest_age: Duration) -> bool {
        let passed = SignedDuration::try_from(self.at.elapsed()).unwrap_or(SignedDuration::MAX);
        let leap = now.duration_since(self.shown).saturating_sub(passed);
        let much = SignedDuration::try_from(shortest_age / Self::PART).unwrap_or(SignedDuration::MAX);
        (self.shown, self.at) = (now, Instant::now());
        if leap > much {
            let wait = shortest_age.min(Self::LONGEST);
            tracing::warn!(
                %now,
                leap = format!("{leap:#}"),
                "the clock is ahead of the last cycle, or has leapt: if it is wrong, set it right; for {wait:?} nothing is \
                 removed for its age"
            );
            self.until = Some(Instant::now() + wait);
        } else if leap < -much && self.until.take().is_some() {
            tracing::info!(%now, "the clock was set back: what is too old by it is removed");
        }
        self.until.is_some_and(|until| Instant::now() < until)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);
    const HOUR: Duration = Duration::from_hours(1);

    #[tokio::test(start_paused = true)]
    async fn a_leap_of_the_clock_is_doubted_for_a_while() {
        let mut now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut doubt = Doubt::new(now);
        let mut pass = async |doubt: &mut Doubt, minutes: u32, leap: SignedDuration| {
            for _ in 0..minutes {
                advance(MINUTE).await;
                now += MINUTE;
                doubt.doubts(now, HOUR * 240);
            }
            now += leap;
            doubt.doubts(now, HOUR * 240)
        };
        let years = SignedDuration::from_hours(80_000);
        // It runs evenly, or is set a little.
        assert!(!pass(&mut doubt, 100, SignedDuration::ZERO).await);
        assert!(!pass(&mut doubt, 1, SignedDuration::from_hours(24)).await);
        // Nobody sets it back.
        assert!(pass(&mut doubt, 1, years).await);
        assert!(pass(&mut doubt, 24 * 60 - 1, SignedDuration::ZERO).await);
        assert!(!pass(&mut doubt, 1, SignedDuration::ZERO).await);
        // Somebody does.
        assert!(pass(&mut doubt, 1, years).await);
        assert!(!pass(&mut doubt, 1, -years).await);
    }
}
