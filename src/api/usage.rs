//! What each caller uses now, under the limits of `limits`: its open calls, and when it may begin the next one.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::rpc::Rpc;
use crate::{access::CallerLimits, listen::Repeated, model::Identity};

/// How a call counts under the limits of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// As a renewal of a lease, for itself: other calls never keep it out, since a subsystem would lose its
    /// registration.
    Renewal,
    /// As a call.
    Call,
    /// As a call that changes something, unless it turns out that it did not.
    Change,
    /// As a call that reads records.
    HistoryRead,
    /// As a watch.
    Watch,
}

impl Rpc {
    fn load(self) -> Load {
        match self {
            Self::RenewLease => Load::Renewal,
            Self::WatchCycles => Load::Watch,
            Self::GetCycle | Self::ListCycles | Self::GetInclusionProof | Self::ReadEntries | Self::ListAuditEvents => {
                Load::HistoryRead
            }
            Self::CancelCycle
            | Self::RegisterSubsystem
            | Self::RegisterSubsystems
            | Self::UnregisterSubsystem
            | Self::SuspendSubsystem
            | Self::ResumeSubsystem
            | Self::StartIntervalLoop
            | Self::StopIntervalLoop => Load::Change,
            // Cycles may follow each other as fast as they end: each leaves a record, beside its event.
            Self::RunCycle
            | Self::GetStatus
            | Self::PlanCycle
            | Self::GetSubsystem
            | Self::ListSubsystems
            | Self::ListIntervalLoops
            | Self::WhoAmI
            | Self::GetCheckpoint
            | Self::GetConsistencyProof
            | Self::Metrics
            | Self::Login => Load::Call,
        }
    }
}

/// A limit that a caller has reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LimitReached {
    pub(super) identity: Identity,
    /// The key of the limit in the configuration.
    pub(super) key: &'static str,
    pub(super) max: usize,
}

/// The use of all callers.
#[derive(Debug, Default)]
pub(super) struct Usage {
    callers: Mutex<Callers>,
    refused: Repeated,
}

#[derive(Debug, Default)]
struct Callers {
    /// Those with open calls, and those whose next call has to wait.
    of: BTreeMap<Identity, OfCaller>,
    /// The number of them at which others are removed.
    sweep_at: usize,
}

#[derive(Debug, Default)]
struct OfCaller {
    calls: usize,
    renewals: usize,
    history_reads: usize,
    watches: usize,
    pace_of_calls: Pace,
    pace_of_changes: Pace,
    pace_of_renewals: Pace,
}

/// The time at which all calls of a kind so far would have begun, had they come evenly (GCRA, ITU-T I.371).
#[derive(Debug, Default)]
struct Pace(Option<Instant>);

impl Pace {
    /// Begins a call now, unless there were too many of late: a caller that was silent may make the calls of the time
    /// `saved` at once.
    fn begin(&mut self, per_second: u32, saved: Duration, now: Instant) -> bool {
        let each = interval(per_second);
        let even = self.0.map_or(now, |even| even.max(now));
        let is_due = even.duration_since(now) <= saved.saturating_sub(each);
        if is_due {
            self.0 = Some(even + each);
        }
        is_due
    }

    /// Takes back that a call has begun.
    fn give_back(&mut self, per_second: u32) {
        self.0 = self.0.and_then(|even| even.checked_sub(interval(per_second)));
    }

    fn is_ahead(&self, now: Instant) -> bool {
        self.0.is_some_and(|even| even > now)
    }
}

fn interval(per_second: u32) -> Duration {
    Duration::from_secs(1) / per_second.max(1)
}

impl OfCaller {
    /// The counts of open calls of this kind.
    fn counts(&mut self, load: Load) -> Vec<&mut usize> {
        match load {
            Load::Renewal => vec![&mut self.renewals],
            Load::Call | Load::Change => vec![&mut self.calls],
            Load::HistoryRead => vec![&mut self.calls, &mut self.history_reads],
            Load::Watch => vec![&mut self.watches],
        }
    }

    fn is_used(&self, now: Instant) -> bool {
        let paces = [&self.pace_of_calls, &self.pace_of_changes, &self.pace_of_renewals];
        self.calls + self.renewals + self.watches > 0 || paces.iter().any(|pace| pace.is_ahead(now))
    }

    /// The key of a limit that a further call would exceed, and the limit.
    fn exceeded(&self, load: Load, limits: &CallerLimits) -> Option<(&'static str, usize)> {
        let CallerLimits { concurrent_calls, watchers, history_reads, .. } = *limits;
        let open = match load {
            Load::Watch if self.watches >= watchers => return Some(("limits.watchers", watchers)),
            Load::Watch => return None,
            Load::HistoryRead if self.history_reads >= history_reads => {
                return Some(("limits.history_reads", history_reads));
            }
            Load::Renewal => self.renewals,
            Load::Call | Load::Change | Load::HistoryRead => self.calls,
        };
        (open >= concurrent_calls).then_some(("limits.concurrent_calls", concurrent_calls))
    }

    /// Begins a call now, unless there were too many of late: then returns the key of the limit, and the limit.
    fn begin(&mut self, load: Load, limits: &CallerLimits, now: Instant) -> Option<(&'static str, usize)> {
        const SECOND: Duration = Duration::from_secs(1);
        let CallerLimits { calls_per_second, changes_per_second, renewals_per_second, .. } = *limits;
        let reached = |key, per_second: u32| Some((key, per_second as usize));
        if load == Load::Renewal {
            let is_due = self.pace_of_renewals.begin(renewals_per_second, SECOND, now);
            return if is_due { None } else { reached("limits.renewals_per_second", renewals_per_second) };
        }
        if let Some(per_second) = calls_per_second
            && !self.pace_of_calls.begin(per_second, SECOND, now)
        {
            return reached("limits.calls_per_second", per_second);
        }
        if load == Load::Change && !self.pace_of_changes.begin(changes_per_second, CallerLimits::SAVED_CHANGES, now) {
            return reached("limits.changes_per_second", changes_per_second);
        }
        None
    }
}

/// An open call, which counts until all clones are dropped.
#[derive(Clone, Debug)]
pub(super) struct Used(Arc<Open>);

#[derive(Debug)]
struct Open {
    usage: Arc<Usage>,
    identity: Identity,
    load: Load,
    changes_per_second: u32,
    /// False if it does not count as a change.
    changes: AtomicBool,
}

impl Used {
    /// Records whether the call has changed something, or may do so.
    pub(super) fn set_changes(&self, changes: bool) {
        self.0.changes.store(changes, Ordering::Relaxed);
    }
}

impl Usage {
    /// Counts a call of this caller until the returned value is dropped: from its headers on, so that a caller that
    /// begins requests and never ends them is limited as well.
    ///
    /// # Errors
    /// The caller has reached a limit.
    pub(super) fn begin(
        self: &Arc<Self>,
        identity: &Identity,
        rpc: Rpc,
        limits: &CallerLimits,
    ) -> Result<Used, LimitReached> {
        let load = rpc.load();
        let now = Instant::now();
        let mut callers = self.callers();
        let of = callers.of.entry(identity.clone()).or_default();
        let exceeded = of.exceeded(load, limits).or_else(|| of.begin(load, limits, now));
        if exceeded.is_none() {
            of.counts(load).into_iter().for_each(|count| *count += 1);
        }
        callers.sweep(now);
        drop(callers);
        if let Some((key, max)) = exceeded {
            if let Some(times) = self.refused.note() {
                tracing::warn!(caller = %identity, rpc = rpc.name(), key, max, times, "a caller has reached a limit");
            }
            return Err(LimitReached { identity: identity.clone(), key, max });
        }
        let open = Open {
            usage: self.clone(),
            identity: identity.clone(),
            load,
            changes_per_second: limits.changes_per_second,
            changes: AtomicBool::new(false),
        };
        Ok(Used(Arc::new(open)))
    }

    fn callers(&self) -> MutexGuard<'_, Callers> {
        // A panic leaves the counts usable.
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Callers {
    /// Removes callers that use nothing, whenever their number has doubled: so the work for each call is constant.
    fn sweep(&mut self, now: Instant) {
        const LEAST: usize = 64;
        if self.of.len() > self.sweep_at.max(LEAST) {
            self.of.retain(|_, of| of.is_used(now));
            self.sweep_at = self.of.len() * 2;
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut callers = self.usage.callers();
        if let Some(of) = callers.of.get_mut(&self.identity) {
            of.counts(self.load).into_iter().for_each(|count| *count = count.saturating_sub(1));
            if self.load == Load::Change && !*self.changes.get_mut() {
                of.pace_of_changes.give_back(self.changes_per_second);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> Identity {
        Identity::parse(&format!("token:{name}")).unwrap()
    }

    const LIMITS: CallerLimits = CallerLimits {
        calls_per_second: None,
        changes_per_second: 10,
        renewals_per_second: 5,
        concurrent_calls: 3,
        watchers: 1,
        history_reads: 2,
    };

    #[test]
    fn each_kind_of_call_has_its_limit_for_each_caller() {
        let usage = Arc::new(Usage::default());
        let begin = |name, rpc| usage.begin(&identity(name), rpc, &LIMITS).map_err(|it| (it.key, it.max));
        let watch = begin("a", Rpc::WatchCycles).unwrap();
        assert_eq!(begin("a", Rpc::WatchCycles).unwrap_err(), ("limits.watchers", 1));
        let reads = [begin("a", Rpc::GetCycle).unwrap(), begin("a", Rpc::ListCycles).unwrap()];
        assert_eq!(begin("a", Rpc::GetCycle).unwrap_err(), ("limits.history_reads", 2));
        let call = begin("a", Rpc::GetStatus).unwrap();
        assert_eq!(begin("a", Rpc::GetStatus).unwrap_err(), ("limits.concurrent_calls", 3));
        let renewals: Vec<_> = (0..3).map(|_| begin("a", Rpc::RenewLease).unwrap()).collect();
        assert_eq!(begin("a", Rpc::RenewLease).unwrap_err(), ("limits.concurrent_calls", 3));
        drop(renewals);
        assert!(begin("b", Rpc::GetCycle).is_ok() && begin("b", Rpc::WatchCycles).is_ok(), "others are not affected");
        drop((call, watch, reads));
        assert!(begin("a", Rpc::GetCycle).is_ok() && begin("a", Rpc::WatchCycles).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_makes_as_many_calls_in_a_second_as_are_allowed() {
        let usage = Arc::new(Usage::default());
        let limits = CallerLimits { calls_per_second: Some(10), ..LIMITS };
        let begin = |name| usage.begin(&identity(name), Rpc::GetStatus, &limits).map_err(|it| (it.key, it.max));
        for _ in 0..10 {
            begin("a").unwrap();
        }
        assert_eq!(begin("a").unwrap_err(), ("limits.calls_per_second", 10));
        assert!(begin("b").is_ok());
        tokio::time::advance(Duration::from_millis(100)).await;
        assert!(begin("a").is_ok() && begin("a").is_err(), "one more after a tenth of a second");
        tokio::time::advance(Duration::from_mins(1)).await;
        assert_eq!((0..99).filter(|_| begin("a").is_ok()).count(), 10, "silence earns no more than a second of calls");
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_changed_nothing_for_long_makes_many_changes_at_once_and_then_few() {
        const AT_ONCE: usize = 20_000;
        let usage = Arc::new(Usage::default());
        let begin = |rpc| usage.begin(&identity("a"), rpc, &LIMITS).map_err(|it| (it.key, it.max));
        let changes = || begin(Rpc::RegisterSubsystem).map(|used| used.set_changes(true)).is_ok();
        for _ in 0..AT_ONCE {
            assert!(begin(Rpc::RegisterSubsystem).is_ok(), "it changes nothing");
        }
        assert_eq!((0..=AT_ONCE).filter(|_| changes()).count(), AT_ONCE);
        assert_eq!(begin(Rpc::StopIntervalLoop).unwrap_err(), ("limits.changes_per_second", 10));
        assert!(begin(Rpc::RunCycle).is_ok() && begin(Rpc::GetStatus).is_ok(), "they are no changes");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((0..100).filter(|_| changes()).count(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn renewals_have_a_rate_of_their_own() {
        let usage = Arc::new(Usage::default());
        let limits = CallerLimits { calls_per_second: Some(1), ..LIMITS };
        let begin = |rpc| usage.begin(&identity("a"), rpc, &limits).map_err(|it| (it.key, it.max));
        assert!(begin(Rpc::GetStatus).is_ok() && begin(Rpc::GetStatus).is_err());
        assert_eq!((0..10).filter(|_| begin(Rpc::RenewLease).is_ok()).count(), 5);
        assert_eq!(begin(Rpc::RenewLease).unwrap_err(), ("limits.renewals_per_second", 5));
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_use_nothing_are_forgotten() {
        let usage = Arc::new(Usage::default());
        let limits = CallerLimits { calls_per_second: Some(1), ..LIMITS };
        let kept = usage.begin(&identity("kept"), Rpc::WatchCycles, &limits).unwrap();
        for number in 0..10_000 {
            usage.begin(&identity(&format!("a{number}")), Rpc::GetStatus, &limits).unwrap();
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        let callers = usage.callers().of.len();
        assert!(callers <= 65 && usage.callers().of.contains_key(&identity("kept")), "{callers}");
        drop(kept);
    }
}
