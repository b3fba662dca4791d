//! What each caller uses now, under the limits of `limits`: its open calls, and when it may begin the next one.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::SetOnce, time::Instant};

use super::rpc::Rpc;
use crate::{
    access::CallerLimits,
    listen::Repeated,
    model::{Identity, OwnEvent},
};

/// How a call counts under the limits of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// As a renewal of a lease, for itself: other calls never keep it out, since a subsystem would lose its
    /// registration.
    Renewal,
    /// As a call.
    Call,
    /// As a call, and as a change once it has changed something.
    Change,
    /// As a call that reads records.
    HistoryRead,
    /// As a watch.
    Watch,
    /// As a stream of reflection, for itself: such streams, which may stay open, never keep other calls out.
    Reflection,
}

impl Load {
    /// The places that it takes while it is open.
    fn places(self) -> &'static [Place] {
        match self {
            Self::Renewal => &[Place::Renewal],
            Self::Call | Self::Change => &[Place::Call],
            Self::HistoryRead => &[Place::HistoryRead, Place::Call],
            Self::Watch => &[Place::Watch],
            Self::Reflection => &[Place::Reflection],
        }
    }
}

/// A place of an open call. Each caller has a limited number of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Call,
    Renewal,
    HistoryRead,
    Watch,
    Reflection,
}

impl Place {
    const ALL: [Self; 5] = [Self::Call, Self::Renewal, Self::HistoryRead, Self::Watch, Self::Reflection];

    /// The key of their limit, and the limit.
    fn limit(self, limits: &CallerLimits) -> (&'static str, usize) {
        match self {
            Self::Call | Self::Renewal | Self::Reflection => ("limits.concurrent_calls", limits.concurrent_calls),
            Self::HistoryRead => ("limits.history_reads", limits.history_reads),
            Self::Watch => ("limits.watchers", limits.watchers),
        }
    }
}

impl Rpc {
    /// How its calls count.
    pub(super) fn load(self) -> Load {
        match self {
            Self::RenewLease => Load::Renewal,
            Self::WatchCycles => Load::Watch,
            Self::GetCycle | Self::ListCycles | Self::GetInclusionProof | Self::ReadEntries | Self::ListAuditEvents => {
                Load::HistoryRead
            }
            Self::CancelCycle
            | Self::PruneCycles
            | Self::RegisterSubsystem
            | Self::UpdateSubsystem
            | Self::RenameSubsystem
            | Self::RegisterSubsystems
            | Self::UnregisterSubsystem
            | Self::SuspendSubsystem
            | Self::ResumeSubsystem
            | Self::StartIntervalLoop
            | Self::StopIntervalLoop
            | Self::PauseIntervalLoops
            | Self::ResumeIntervalLoops => Load::Change,
            // Cycles may follow each other as fast as they end: each leaves a record, beside its event.
            Self::RunCycle
            | Self::Initialize
            | Self::RunForParent
            | Self::StatusForParent
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
    /// How the call counts.
    pub(super) load: Load,
    /// The key of the limit in the configuration.
    pub(super) key: &'static str,
    pub(super) max: usize,
    /// True if the call had its place, and gave way to another one since its request had not arrived.
    pub(super) gave_way: bool,
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
    /// The number of the next call.
    next: u64,
}

#[derive(Debug, Default)]
struct OfCaller {
    /// Open calls that have their places, oldest first.
    open: BTreeMap<u64, Open>,
    /// The number of taken places of each kind.
    taken: [usize; Place::ALL.len()],
    pace_of_calls: Pace,
    pace_of_changes: Pace,
    pace_of_renewals: Pace,
}

/// An open call.
#[derive(Debug)]
struct Open {
    load: Load,
    since: Instant,
    /// Set to end it. `None` once its request has arrived: then it keeps its places to its end.
    gives_way: Option<Arc<SetOnce<LimitReached>>>,
}

/// The time at which all calls of a kind so far would have begun, had they come evenly (GCRA, ITU-T I.371).
#[derive(Debug, Default)]
struct Pace(Option<Instant>);

impl Pace {
    /// True if a call may begin now: a caller that was silent may make the calls of the time `saved` at once.
    fn is_due(&self, per_second: u32, saved: Duration, now: Instant) -> bool {
        let even = self.0.map_or(now, |even| even.max(now));
        even.duration_since(now) <= saved.saturating_sub(interval(per_second))
    }

    /// Counts a call that has begun.
    fn count(&mut self, per_second: u32, now: Instant) {
        self.0 = Some(self.0.map_or(now, |even| even.max(now)) + interval(per_second));
    }

    fn is_ahead(&self, now: Instant) -> bool {
        self.0.is_some_and(|even| even > now)
    }
}

fn interval(per_second: u32) -> Duration {
    Duration::from_secs(1) / per_second.max(1)
}

impl OfCaller {
    fn is_used(&self, now: Instant) -> bool {
        let paces = [&self.pace_of_calls, &self.pace_of_changes, &self.pace_of_renewals];
        !self.open.is_empty() || paces.iter().any(|pace| pace.is_ahead(now))
    }

    /// Makes room for a further call. Otherwise returns the key of the limit that it would exceed, and the limit.
    fn make_room(&mut self, identity: &Identity, load: Load, limits: &CallerLimits, now: Instant) -> Reached {
        for place in load.places() {
            let (key, max) = place.limit(limits);
            if self.taken[*place as usize] >= max && !self.make_way(identity, *place, (key, max), now) {
                return Some((key, max));
            }
        }
        None
    }

    /// Ends the oldest call with a place of this kind whose request had time to arrive and has not, so that requests
    /// that never end keep no others out. Returns false if no call had to give way.
    fn make_way(&mut self, identity: &Identity, place: Place, limit: (&'static str, usize), now: Instant) -> bool {
        /// Most requests arrive at once; a large one over a slow link loses its place only at the limit.
        const TIME_TO_ARRIVE: Duration = Duration::from_secs(1);
        let is_late = |open: &Open| now.duration_since(open.since) >= TIME_TO_ARRIVE;
        let late = self.open.iter().take_while(|(_, open)| is_late(open));
        let oldest = late.filter(|(_, open)| open.load.places().contains(&place)).find_map(|(number, open)| {
            let (key, max) = limit;
            let reached = LimitReached { identity: identity.clone(), load: open.load, key, max, gave_way: true };
            Some((*number, open.gives_way.clone()?, reached))
        });
        let Some((number, gives_way, reached)) = oldest else { return false };
        self.end(number);
        // It is set only once, since the call is not open any more.
        let _ = gives_way.set(reached);
        true
    }

    /// The key of the limit of its pace that a further call would exceed, and the limit.
    fn paced(&self, load: Load, limits: &CallerLimits, now: Instant) -> Reached {
        const SECOND: Duration = Duration::from_secs(1);
        let CallerLimits { calls_per_second, changes_per_second, renewals_per_second, .. } = *limits;
        let exceeded = |pace: &Pace, key, per_second: u32, saved| {
            (!pace.is_due(per_second, saved, now)).then_some((key, per_second as usize))
        };
        if load == Load::Renewal {
            return exceeded(&self.pace_of_renewals, "limits.renewals_per_second", renewals_per_second, SECOND);
        }
        let calls = calls_per_second
            .and_then(|per_second| exceeded(&self.pace_of_calls, "limits.calls_per_second", per_second, SECOND));
        calls.or_else(|| {
            let saved = CallerLimits::SAVED_CHANGES;
            let changes = || exceeded(&self.pace_of_changes, "limits.changes_per_second", changes_per_second, saved);
            (load == Load::Change).then(changes).flatten()
        })
    }

    /// Counts a call that begins. A change is counted when it is made.
    fn count(&mut self, load: Load, limits: &CallerLimits, now: Instant) {
        if load == Load::Renewal {
            self.pace_of_renewals.count(limits.renewals_per_second, now);
        } else if let Some(per_second) = limits.calls_per_second {
            self.pace_of_calls.count(per_second, now);
        }
    }

    /// Opens a call, which takes its places.
    fn open(&mut self, number: u64, open: Open) {
        for place in open.load.places() {
            self.taken[*place as usize] += 1;
        }
        self.open.insert(number, open);
    }

    /// Gives the places of a call back, if it has any.
    fn end(&mut self, number: u64) {
        for place in self.open.remove(&number).iter().flat_map(|open| open.load.places()) {
            self.taken[*place as usize] -= 1;
        }
    }
}

/// The key of a limit that was reached, and the limit.
type Reached = Option<(&'static str, usize)>;

/// An open call, which counts until all clones are dropped.
#[derive(Clone, Debug)]
pub(super) struct Used(Arc<OpenCall>);

#[derive(Debug)]
struct OpenCall {
    usage: Arc<Usage>,
    identity: Identity,
    number: u64,
    load: Load,
    changes_per_second: u32,
    gives_way: Arc<SetOnce<LimitReached>>,
}

impl Used {
    /// Records that its request has arrived, so that it keeps its places to its end.
    ///
    /// # Errors
    /// It gave way to another call before that.
    pub(super) fn has_arrived(&self) -> Result<(), LimitReached> {
        let OpenCall { usage, identity, number, gives_way, .. } = &*self.0;
        let mut callers = usage.callers();
        if let Some(open) = callers.of.get_mut(identity).and_then(|of| of.open.get_mut(number)) {
            open.gives_way = None;
        }
        gives_way.get().map_or(Ok(()), |reached| Err(reached.clone()))
    }

    /// Waits until it has to give way to another call, since its request has not arrived.
    pub(super) async fn gives_way(&self) -> LimitReached {
        self.0.gives_way.wait().await.clone()
    }

    /// Records whether it has an event of its own, and so has changed something. A change counts when it is made, also
    /// if its caller does not wait for it: a call that is aborted before its turn does not count.
    pub(super) fn own_event(&self) -> OwnEvent {
        let OpenCall { usage, identity, load, changes_per_second, .. } = &*self.0;
        if *load != Load::Change {
            return OwnEvent::default();
        }
        let (usage, identity, per_second) = (usage.clone(), identity.clone(), *changes_per_second);
        OwnEvent::reported_to(move || {
            let mut callers = usage.callers();
            callers.of.entry(identity.clone()).or_default().pace_of_changes.count(per_second, Instant::now());
        })
    }
}

impl Usage {
    /// Counts a call of this caller until the returned value is dropped: from its headers on, so that a caller that
    /// begins requests and never ends them is limited as well. At the limit, such requests give way to further calls.
    ///
    /// # Errors
    /// The caller has reached a limit.
    pub(super) fn begin(
        self: &Arc<Self>,
        identity: &Identity,
        load: Load,
        limits: &CallerLimits,
    ) -> Result<Used, LimitReached> {
        let (now, gives_way) = (Instant::now(), Arc::new(SetOnce::new()));
        let mut callers = self.callers();
        let number = callers.next;
        callers.next += 1;
        let of = callers.of.entry(identity.clone()).or_default();
        // A call that is refused for its pace puts no other out.
        let reached = of.paced(load, limits, now).or_else(|| of.make_room(identity, load, limits, now));
        if reached.is_none() {
            of.count(load, limits, now);
            of.open(number, Open { load, since: now, gives_way: Some(gives_way.clone()) });
        }
        callers.sweep(now);
        drop(callers);
        if let Some((key, max)) = reached {
            return Err(LimitReached { identity: identity.clone(), load, key, max, gave_way: false });
        }
        let (usage, identity, changes_per_second) = (self.clone(), identity.clone(), limits.changes_per_second);
        Ok(Used(Arc::new(OpenCall { usage, identity, number, load, changes_per_second, gives_way })))
    }

    /// Logs that a caller has reached a limit by this call.
    pub(super) fn log(&self, call: &'static str, reached: &LimitReached) {
        let LimitReached { identity, key, max, gave_way, .. } = reached;
        if let Some(times) = self.refused.note() {
            tracing::warn!(caller = %identity, rpc = call, key, max, gave_way, times, "a caller has reached a limit");
        }
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

impl Drop for OpenCall {
    fn drop(&mut self) {
        if let Some(of) = self.usage.callers().of.get_mut(&self.identity) {
            of.end(self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

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
        let begin = |name, rpc: Rpc| usage.begin(&identity(name), rpc.load(), &LIMITS).map_err(|it| (it.key, it.max));
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
        let begin = |name| usage.begin(&identity(name), Load::Call, &limits).map_err(|it| (it.key, it.max));
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
        let begin = |rpc: Rpc| usage.begin(&identity("a"), rpc.load(), &LIMITS).map_err(|it| (it.key, it.max));
        let changes = || begin(Rpc::RegisterSubsystem).map(|used| used.own_event().set()).is_ok();
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
    async fn a_change_counts_once_and_when_it_is_made_also_after_its_call() {
        let usage = Arc::new(Usage::default());
        let begin = || usage.begin(&identity("a"), Load::Change, &LIMITS);
        let made_later: Vec<_> = (0..20_000).map(|_| begin().unwrap().own_event()).collect();
        assert!(begin().is_ok(), "none is made yet");
        for event in &made_later {
            event.set();
            event.set();
        }
        assert_eq!(begin().unwrap_err().key, "limits.changes_per_second");
        tokio::time::advance(Duration::from_millis(100)).await;
        assert!(begin().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_limit_the_oldest_request_that_has_not_arrived_gives_way() {
        let usage = Arc::new(Usage::default());
        let begin = |rpc: Rpc| usage.begin(&identity("a"), rpc.load(), &LIMITS);
        let gave_way = |used: &Used| used.gives_way().now_or_never().map(|it| (it.key, it.gave_way));
        let arrived = begin(Rpc::GetStatus).unwrap();
        arrived.has_arrived().unwrap();
        let [first, second] = [Rpc::ListCycles, Rpc::GetStatus].map(|rpc| begin(rpc).unwrap());
        assert!(!begin(Rpc::GetStatus).unwrap_err().gave_way, "they may be about to arrive");
        tokio::time::advance(Duration::from_secs(1)).await;
        let third = begin(Rpc::GetStatus).unwrap();
        assert_eq!(gave_way(&first), Some(("limits.concurrent_calls", true)));
        assert_eq!([&arrived, &second, &third].map(gave_way), [None; 3]);
        assert_eq!(first.has_arrived().unwrap_err().load, Load::HistoryRead);
        second.has_arrived().unwrap();
        assert_eq!(begin(Rpc::GetStatus).unwrap_err().key, "limits.concurrent_calls", "its place is given away once");
        drop(first);
        assert!(begin(Rpc::GetStatus).is_err(), "it had none any more");
        drop(arrived);
        begin(Rpc::GetStatus).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn renewals_have_a_rate_of_their_own() {
        let usage = Arc::new(Usage::default());
        let limits = CallerLimits { calls_per_second: Some(1), ..LIMITS };
        let begin = |rpc: Rpc| usage.begin(&identity("a"), rpc.load(), &limits).map_err(|it| (it.key, it.max));
        assert!(begin(Rpc::GetStatus).is_ok() && begin(Rpc::GetStatus).is_err());
        assert_eq!((0..10).filter(|_| begin(Rpc::RenewLease).is_ok()).count(), 5);
        assert_eq!(begin(Rpc::RenewLease).unwrap_err(), ("limits.renewals_per_second", 5));
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_use_nothing_are_forgotten() {
        let usage = Arc::new(Usage::default());
        let limits = CallerLimits { calls_per_second: Some(1), ..LIMITS };
        let kept = usage.begin(&identity("kept"), Load::Watch, &limits).unwrap();
        for number in 0..10_000 {
            usage.begin(&identity(&format!("a{number}")), Load::Call, &limits).unwrap();
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        let callers = usage.callers().of.len();
        assert!(callers <= 65 && usage.callers().of.contains_key(&identity("kept")), "{callers}");
        drop(kept);
    }
}
