//! What each caller uses now, under the limits of `limits`: its open calls, and when it may begin the next one.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::rpc::Rpc;
use crate::{access::CallerLimits, listen::Repeated, model::Identity};

/// How a call counts under the limits of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// Not at all: without it, a subsystem would lose its registration.
    Exempt,
    /// As a call.
    Call,
    /// As a call that reads records.
    HistoryRead,
    /// As a watch.
    Watch,
}

impl Rpc {
    fn load(self) -> Load {
        match self {
            Self::RenewLease => Load::Exempt,
            Self::WatchCycles => Load::Watch,
            Self::GetCycle | Self::ListCycles | Self::GetInclusionProof | Self::ReadEntries | Self::ListAuditEvents => {
                Load::HistoryRead
            }
            Self::RunCycle
            | Self::CancelCycle
            | Self::GetStatus
            | Self::PlanCycle
            | Self::RegisterSubsystem
            | Self::RegisterSubsystems
            | Self::UnregisterSubsystem
            | Self::GetSubsystem
            | Self::ListSubsystems
            | Self::SuspendSubsystem
            | Self::ResumeSubsystem
            | Self::StartIntervalLoop
            | Self::StopIntervalLoop
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
    history_reads: usize,
    watches: usize,
    /// When all calls so far would have begun, had they come evenly.
    even: Option<Instant>,
}

impl OfCaller {
    /// The counts of open calls of this kind.
    fn counts(&mut self, load: Load) -> Vec<&mut usize> {
        match load {
            Load::Exempt => Vec::new(),
            Load::Call => vec![&mut self.calls],
            Load::HistoryRead => vec![&mut self.calls, &mut self.history_reads],
            Load::Watch => vec![&mut self.watches],
        }
    }

    fn is_used(&self, now: Instant) -> bool {
        self.calls > 0 || self.watches > 0 || self.even.is_some_and(|even| even > now)
    }

    /// The key of a limit that a further call would exceed, and the limit.
    fn exceeded(&self, load: Load, limits: &CallerLimits) -> Option<(&'static str, usize)> {
        let CallerLimits { calls_per_second: _, concurrent_calls, watchers, history_reads } = *limits;
        let is_call = matches!(load, Load::Call | Load::HistoryRead);
        match load {
            Load::Watch if self.watches >= watchers => Some(("limits.watchers", watchers)),
            Load::HistoryRead if self.history_reads >= history_reads => Some(("limits.history_reads", history_reads)),
            _ if is_call && self.calls >= concurrent_calls => Some(("limits.concurrent_calls", concurrent_calls)),
            _ => None,
        }
    }

    /// Begins a call now, unless there were too many of late (GCRA, ITU-T I.371).
    fn begin(&mut self, per_second: u32, now: Instant) -> bool {
        const PERIOD: Duration = Duration::from_secs(1);
        let each = PERIOD / per_second.max(1);
        let even = self.even.map_or(now, |even| even.max(now));
        let is_due = even.duration_since(now) <= PERIOD.saturating_sub(each);
        if is_due {
            self.even = Some(even + each);
        }
        is_due
    }
}

/// An open call, which counts until it is dropped.
#[derive(Debug)]
pub(super) struct Used {
    usage: Arc<Usage>,
    identity: Identity,
    load: Load,
}

impl Usage {
    /// Counts a call of this caller until the returned value is dropped.
    ///
    /// # Errors
    /// The caller has reached a limit.
    pub(super) fn begin(
        self: &Arc<Self>,
        identity: &Identity,
        rpc: Rpc,
        limits: &CallerLimits,
    ) -> Result<Option<Used>, LimitReached> {
        let load = rpc.load();
        if load == Load::Exempt {
            return Ok(None);
        }
        let now = Instant::now();
        let mut callers = self.callers();
        let of = callers.of.entry(identity.clone()).or_default();
        let exceeded = of.exceeded(load, limits).or_else(|| {
            let per_second = limits.calls_per_second.filter(|per_second| !of.begin(*per_second, now))?;
            Some(("limits.calls_per_second", per_second as usize))
        });
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
        Ok(Some(Used { usage: self.clone(), identity: identity.clone(), load }))
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

impl Drop for Used {
    fn drop(&mut self) {
        let mut callers = self.usage.callers();
        if let Some(of) = callers.of.get_mut(&self.identity) {
            of.counts(self.load).into_iter().for_each(|count| *count = count.saturating_sub(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> Identity {
        Identity::parse(&format!("token:{name}")).unwrap()
    }

    const LIMITS: CallerLimits =
        CallerLimits { calls_per_second: None, concurrent_calls: 3, watchers: 1, history_reads: 2 };

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
        assert!(begin("a", Rpc::RenewLease).unwrap().is_none(), "it is exempt");
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
