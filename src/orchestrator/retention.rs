//! Removes old records and audit events, and checks the clock before it removes many for their age. Also removes the
//! oldest records when a caller asks for it.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio::{
    select,
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{Orchestrator, Refusal, Shared, State, writing::ToWrite};
use crate::{
    ledger::RecordsPruned,
    model::{Cause, Revision},
    ports::{
        AuditEntry, Durability, Excess, Log, PageLimits, Removal, ResumeError, Retention, RetentionRule, StoreError,
        Write,
    },
    record,
};

/// Most records and audit events that one pass removes, so that a commit hardly waits for it. More than become too old
/// between two passes.
const BATCH: usize = 256;

/// Which of the oldest records a caller has removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PruneLimit {
    /// All but this number of the newest ones, at least 1.
    KeepNewest(u64),
    /// Those that finished before this time.
    FinishedBefore(Timestamp),
}

/// The result of [`Orchestrator::prune`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pruned {
    /// Number of removed records.
    pub removed: u64,
    /// The first record that stays because it is not what was written.
    pub kept: Option<StoreError>,
}

impl PruneLimit {
    /// The limit as one of all records, at a time that makes it so.
    fn retention(self) -> (Retention, Timestamp) {
        let (default, now) = match self {
            Self::KeepNewest(number) => {
                (RetentionRule { max_cycles: Some(number), max_age: None }, Timestamp::UNIX_EPOCH)
            }
            // A record of exactly this age is too old.
            Self::FinishedBefore(time) => (
                RetentionRule { max_cycles: None, max_age: Some(Duration::ZERO) },
                time.saturating_sub(Duration::from_nanos(1)).unwrap_or(Timestamp::MIN),
            ),
        };
        (Retention { default, ..Retention::default() }, now)
    }
}

impl Orchestrator {
    /// Removes the oldest records that exceed this limit, step by step, up to the first one that does not. The newest
    /// one stays. Steps that were made stay so if a later one fails, or if the future is dropped.
    ///
    /// # Errors
    /// The store can't be read or written, or the process drains.
    pub async fn prune(&self, limit: PruneLimit, by: Cause) -> Result<Pruned, Refusal> {
        let (retention, now) = limit.retention();
        let mut pruned = Pruned { removed: 0, kept: None };
        loop {
            if self.0.state().draining {
                return Err(Refusal::Draining);
            }
            let cause = (pruned.removed == 0).then(|| by.clone());
            let removed = self.0.remove(retention.clone(), now, BATCH, cause, &mut pruned.kept).await?;
            pruned.removed += removed.count as u64;
            if !removed.goes_on {
                return Ok(pruned);
            }
        }
    }

    /// The number of records that [`Orchestrator::prune`] would remove, including those that can't be verified.
    ///
    /// # Errors
    /// The store can't be read, or too much is being read.
    pub async fn count_prunable(&self, limit: PruneLimit) -> Result<u64, Refusal> {
        const PAGE: PageLimits = PageLimits { records: 1000, bytes: 256 << 10 };
        let before = match limit {
            PruneLimit::KeepNewest(number) => {
                return Ok(self.0.store.size().await?.records.saturating_sub(number));
            }
            PruneLimit::FinishedBefore(time) => time,
        };
        let mut count = 0;
        let mut after = self.0.history.pruned_to();
        loop {
            let newest = self.0.state().last_revision;
            let _room = self.0.history.room(self.0.history.max_record().max(PAGE.bytes)).await?;
            let page = match self.0.store.cycles_after(after, PAGE).await {
                Ok(page) => page,
                Err(ResumeError::NotRetained { oldest, newest }) => {
                    return Err(Refusal::RevisionNotRetained { after, oldest, newest });
                }
                Err(ResumeError::Store(error)) => return Err(error.into()),
            };
            if page.is_empty() {
                return Ok(count);
            }
            for found in page {
                after = after.next();
                let is_older = found.as_ref().map_or(true, |record| record.finished_at < before);
                if !is_older || after >= newest {
                    return Ok(count);
                }
                count += 1;
            }
        }
    }
}

impl Shared {
    /// Removes records that exceed the limits.
    pub(super) async fn prune(self: Arc<Self>) {
        /// Longest time between passes, since records age without new ones.
        const EVERY: Duration = Duration::from_mins(1);
        /// Number of new records that starts a pass.
        const RECORDS: u64 = 64;
        let mut newest = self.history.revisions();
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
                            "many records are too old at once: at most this number is removed for age at a time, every \
                             minute and every {RECORDS} cycles; if the clock is wrong, set it right"
                        );
                    }
                    is_told = is_full;
                }
                // An idle process detects here that it is fenced.
                Err(error @ (StoreError::Fenced { .. } | StoreError::Defect { .. })) => self.store_ends(&error),
                // Damage to old records does not prevent recording new cycles.
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

    /// Removes all records over the number, and then one batch of records over the age, however many there are: the
    /// clock may be wrong without a sign, and an operator may notice. Returns the number of records that were too old.
    ///
    /// # Errors
    /// The store failed; or all others were removed, but one stays, since it is not what the store says about it.
    async fn look(&self, doubt: &mut Doubt) -> Result<usize, StoreError> {
        let now = self.clock.now();
        let retention = self.settings().retention.clone();
        let by_number = without_ages(&retention);
        let mut damaged = None;
        while self.remove(by_number.clone(), now, BATCH, None, &mut damaged).await?.goes_on {}
        let mut removed_for_age = 0;
        if let Some(shortest) = shortest_age(&retention)
            && !doubt.doubts(now, shortest)
        {
            while removed_for_age < BATCH {
                let limit = BATCH - removed_for_age;
                let Removed { count, goes_on } = self.remove(retention.clone(), now, limit, None, &mut damaged).await?;
                removed_for_age += count;
                if !goes_on {
                    break;
                }
            }
        }
        damaged.map_or(Ok(removed_for_age), Err)
    }

    /// Removes at most this number of records and events over these limits: none any more once the process drains,
    /// since nothing may follow its last write. The first one that stays because it is not what was written is put into
    /// `damaged`.
    ///
    /// All removed entries are in the published checkpoint. So the next process can compare its log with that: the
    /// hashes of a checkpoint go only with entries that follow it.
    async fn remove(
        &self,
        retention: Retention,
        now: Timestamp,
        limit: usize,
        cause: Option<Cause>,
        damaged: &mut Option<StoreError>,
    ) -> Result<Removed, StoreError> {
        let _turn = self.removing.lock().await;
        let mut excess = self.store.excess(retention, now, limit).await?;
        *damaged = damaged.take().or(excess.damaged.take());
        if excess.end() > self.history.checkpoint().borrow().size {
            // Without a newer one, the rest is removed later.
            let _ = self.published(excess.end()).await;
        }
        let signed = self.history.checkpoint().borrow().size.max(self.store.log().first_kept);
        // Commits go on between two searches.
        let is_searched = excess.is_partial && excess.records.is_empty() && excess.events.is_empty();
        let excess = excess.before(signed);
        // Counted before the check, so that the last write waits for it.
        let _token = self.changes.token();
        if self.state().draining {
            return Ok(Removed { count: 0, goes_on: false });
        }
        let count = excess.records.len() + excess.events.len();
        if count > 0 {
            let (removed, written) = oneshot::channel();
            let write = async {
                self.ask_to_write(Box::new(Removing {
                    removal: removal(excess, &self.store.log()),
                    cause,
                    event: None,
                    removed,
                }))
                .await?;
                written.await.unwrap_or_else(|_| Err(self.store_ended()))
            };
            select! {
                biased;
                removed = write => removed?,
                late = self.late_commit() => return Err(late),
            }
        }
        Ok(Removed { count, goes_on: count > 0 || is_searched })
    }
}

/// What one step of a pass has done.
struct Removed {
    /// Number of removed records and events.
    count: usize,
    /// True if there may be more to remove.
    goes_on: bool,
}

/// The removal of these records and events, with its entry in the log.
fn removal(excess: Excess, log: &Log) -> Removal {
    let mut leaves: Vec<_> = excess.leaves().collect();
    leaves.sort_unstable();
    let Excess { records, events, first_kept, .. } = excess;
    // Without an entry that says so, nothing of the log is gone.
    let first_kept = if leaves.is_empty() { log.first_kept } else { first_kept };
    let entry = |leaves| record::encode_pruned(&RecordsPruned::of(leaves, first_kept));
    Removal { records, events, first_kept, entry: (!leaves.is_empty()).then(|| entry(leaves)) }
}

/// The removal of old records. Its entry in the log takes the place of an audit event, unless it has a cause.
struct Removing {
    removal: Removal,
    cause: Option<Cause>,
    event: Option<AuditEntry>,
    removed: oneshot::Sender<Result<(), StoreError>>,
}

impl ToWrite for Removing {
    fn prepare(&mut self, _: &mut Revision, now: Timestamp) {
        self.event = self.cause.as_ref().map(|cause| record::encode_event(&cause.event(now)));
    }

    fn add_to(&mut self, write: &mut Write, _: &State) {
        write.removal = self.removal.clone();
        write.audit.extend(self.event.clone());
        write.durability = Durability::Durable;
    }

    fn size(&self) -> (usize, usize) {
        (0, self.removal.records.len() + self.removal.events.len())
    }

    fn is_needed(&self) -> bool {
        false
    }

    fn apply(&mut self, state: &mut State) {
        if let Some(cause) = &self.cause {
            cause.own_event.set();
        }
        if let Some(last) = self.removal.records.last() {
            state.history.pruned(last.revision);
        }
    }

    fn done(self: Box<Self>) {
        let _ = self.removed.send(Ok(()));
    }

    fn failed(self: Box<Self>, error: StoreError) {
        let _ = self.removed.send(Err(error));
    }
}

fn shortest_age(Retention { default, by_state, events }: &Retention) -> Option<Duration> {
    by_state.values().chain([default]).map(|rule| rule.max_age).chain([events.max_age]).flatten().min()
}

/// The same rules without ages.
fn without_ages(retention: &Retention) -> Retention {
    let mut retention = retention.clone();
    retention.default.max_age = None;
    retention.events.max_age = None;
    for rule in retention.by_state.values_mut() {
        rule.max_age = None;
    }
    retention
}

/// A forward leap of the clock makes all records old. It may be wrong, and removal is final, so for some time no record
/// is removed for its age: an operator can correct the clock. After a long downtime the clock leaps as well, and the
/// delay does no harm.
struct Doubt {
    /// The time of the clock at the last check; initially, at the last recorded cycle.
    shown: Timestamp,
    at: Instant,
    until: Option<Instant>,
}

impl Doubt {
    /// How long removals are suspended after a leap, unless `max_age` is shorter: until an operator has read the log.
    const LONGEST: Duration = Duration::from_hours(24);
    /// A leap of less than this fraction of the shortest `max_age` is ignored: at most that fraction of the history is
    /// removed at once.
    const PART: u32 = 10;

    fn new(shown: Timestamp) -> Self {
        Self { shown, at: Instant::now(), until: None }
    }

    /// True while no record is removed for its age.
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
                "the clock is ahead of the last cycle, or has leapt: if it is wrong, set it right; for {wait:?} \
                 nothing is removed for its age"
            );
            self.until = Some(Instant::now() + wait);
        } else if leap < -much && self.until.take().is_some() {
            tracing::info!(%now, "the clock was set back: removal for age resumes");
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
        // The clock runs evenly, or is adjusted slightly.
        assert!(!pass(&mut doubt, 100, SignedDuration::ZERO).await);
        assert!(!pass(&mut doubt, 1, SignedDuration::from_hours(24)).await);
        // The clock leaps by more than the tenth part.
        assert!(pass(&mut doubt, 1, SignedDuration::from_hours(25)).await);
        assert!(!pass(&mut doubt, 1, -SignedDuration::from_hours(25)).await);
        // The clock is not set back.
        assert!(pass(&mut doubt, 1, years).await);
        assert!(pass(&mut doubt, 24 * 60 - 1, SignedDuration::ZERO).await);
        assert!(!pass(&mut doubt, 1, SignedDuration::ZERO).await);
        // The clock is set back.
        assert!(pass(&mut doubt, 1, years).await);
        assert!(!pass(&mut doubt, 1, -years).await);
    }
}
