//! A member of the fleet: a registration, and its state between cycles.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::{Breaker, BreakerState};
use crate::{
    memory::{Full, Held, Memory},
    model::{CycleId, Histogram, Identity, Name, Output, Severity, Subsystem, SubsystemReport, SubsystemState},
    ports::Callee,
};

/// One registered subsystem in plans.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its registration.
    pub subsystem: Arc<Subsystem>,
    /// True while it is suspended.
    pub suspended: bool,
    /// The caller that registered it; `None` if it is declared, or was registered by nobody in particular.
    pub owner: Option<Identity>,
    /// Its state between cycles.
    pub standing: Arc<Standing>,
    /// The name that a cycle has to lock to call it: the one that it had first in this process. A new name does not
    /// change it, so that cycles of before and after exclude each other.
    pub lock: Name,
    kept: Arc<Kept>,
}

/// State of one registration, kept until its last reference is dropped.
#[derive(Debug, Default)]
struct Kept {
    /// True once it has been initialized with this registration in this epoch.
    initialized: AtomicBool,
    /// The memory of the registration.
    _held: Option<Held>,
}

impl Member {
    /// A member without an owner that has not been initialized.
    pub fn new(subsystem: Arc<Subsystem>, suspended: bool, standing: Arc<Standing>) -> Self {
        let lock = subsystem.name.clone();
        Self { subsystem, suspended, owner: None, standing, lock, kept: Arc::default() }
    }

    /// The member with another registration, not initialized yet. Its state between cycles, its suspension, its owner
    /// and its lock stay.
    #[must_use]
    pub fn with(&self, subsystem: Subsystem, held: Held) -> Self {
        Self { subsystem: Arc::new(subsystem), ..self.clone() }.holding(held)
    }

    /// The same member with this owner.
    #[must_use]
    pub fn owned_by(self, owner: Option<Identity>) -> Self {
        Self { owner, ..self }
    }

    /// The same member, not initialized yet, with the memory of its registration.
    #[must_use]
    pub fn holding(self, held: Held) -> Self {
        Self { kept: Arc::new(Kept { _held: Some(held), ..Kept::default() }), ..self }
    }

    /// The same member, suspended or resumed.
    #[must_use]
    pub fn suspended(self, suspended: bool) -> Self {
        Self { suspended, ..self }
    }

    /// It, as the port calls it.
    pub fn callee(&self) -> Callee<'_> {
        Callee { subsystem: &self.subsystem, owner: self.owner.as_ref() }
    }

    /// True while it is initialized: it has not asked for `Initialize` again since.
    pub fn is_initialized(&self) -> bool {
        self.kept.initialized.load(Ordering::Relaxed)
    }

    pub(super) fn set_initialized(&self, initialized: bool) {
        self.kept.initialized.store(initialized, Ordering::Relaxed);
    }

    /// The state of its breaker.
    pub fn breaker(&self, now: Instant) -> BreakerState {
        self.standing.lock().breaker.state(self.subsystem.breaker, now)
    }
}

/// The state of a subsystem between its cycles. Kept when its registration is replaced.
#[derive(Debug, Default)]
pub struct Standing(Mutex<Remembered>);

/// The contents of a [`Standing`]. Visible state changes when a cycle is recorded; state that affects further calls
/// changes at once.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    counts: SubsystemCounts,
    latest: Option<Output>,
    last: Option<(LastPart, Held)>,

    /// Memory for the latest output, or for the one that replaces it once its cycle is recorded.
    output_room: Option<Held>,
    pub(super) breaker: Breaker,
    pub(super) mean: Option<Duration>,
    pub(super) last_turn: Turn,
}

/// When a subsystem had its turn: it was called, or was not called for its own reason. Later turns are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    /// The cycle; 0 before the first.
    pub(super) cycle_id: CycleId,
    /// True if its call was not ended by the end of the cycle.
    pub(super) was_whole: bool,
}

/// The counts of a subsystem's recorded parts, since this process started or since its registration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubsystemCounts {
    /// Number of parts that ended as SUCCEEDED.
    pub succeeded: u64,
    /// As FAILED.
    pub failed: u64,
    /// As TIMED_OUT.
    pub timed_out: u64,
    /// As SKIPPED.
    pub skipped: u64,
    /// As CIRCUIT_OPEN.
    pub circuit_open: u64,
    /// As CANCELLED.
    pub cancelled: u64,
    /// Number of calls of its `RunCycle`.
    pub attempts: u64,
    /// Number of these calls that were retries.
    pub retries: u64,
    /// Number of its issues of severity INFO.
    pub infos: u64,
    /// Of severity WARNING, or of none.
    pub warnings: u64,
    /// Of severity ERROR.
    pub errors: u64,
    /// Durations of its parts from the first call to the end, without cancelled ones.
    pub durations: Histogram,
    /// Whether its last part succeeded, not counting skipped and cancelled ones.
    pub is_up: Option<bool>,
    /// When the cycle that made its latest output ended; `None` if it has no output, or the time is no longer known.
    pub output_at: Option<Timestamp>,
}

/// A subsystem's part in a cycle that has run, until [`Engine::publish`](super::Engine::publish) shows it.
#[derive(Debug)]
pub struct Part {
    /// The state to update.
    pub standing: Arc<Standing>,
    /// How it ended.
    pub last: LastPart,
    /// Its output; `None` unless it succeeded. `standing` holds its memory.
    pub output: Option<Output>,
}

/// A subsystem's part in the last cycle that was recorded with it.
#[derive(Clone, Debug)]
pub struct LastPart {
    /// The cycle.
    pub cycle_id: CycleId,
    /// When the cycle started.
    pub started_at: Timestamp,
    /// When the cycle ended.
    pub finished_at: Timestamp,
    /// How its part ended. Without issues, metrics and output if there was no memory for them.
    pub report: Arc<SubsystemReport>,
}

impl Part {
    /// The subsystem.
    pub fn name(&self) -> &Name {
        &self.last.report.name
    }
}

impl Standing {
    /// The state of a subsystem with a stored output, and the time of its cycle if known. The output is held in
    /// `outputs`, even over the limit.
    pub fn with_output(output: Output, output_at: Option<Timestamp>, outputs: &Memory) -> Self {
        let output_room = Some(outputs.hold_beyond(output.payload.len()));
        let counts = SubsystemCounts { output_at, ..SubsystemCounts::default() };
        Self(Mutex::new(Remembered { counts, latest: Some(output), output_room, ..Remembered::default() }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Remembered> {
        // No holder of this lock can panic in the middle of a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its latest output, once the cycle that made it is recorded.
    pub fn latest(&self) -> Option<Output> {
        self.lock().latest.clone()
    }

    /// Its part in the last recorded cycle.
    pub fn last(&self) -> Option<LastPart> {
        self.lock().last.as_ref().map(|(last, _)| last.clone())
    }

    /// Sets its last part, from the record of a cycle that an earlier process ran. It is not counted.
    pub fn restore(&self, last: LastPart, memory: &Memory) {
        self.lock().keep(last, memory);
    }

    /// The moving mean of the durations of its parts that succeeded or timed out, in which each new one weighs an
    /// eighth. Other failures may have come at once, and say nothing about the work.
    pub fn mean_duration(&self) -> Option<Duration> {
        self.lock().mean
    }

    /// Its counters.
    pub fn counts(&self) -> SubsystemCounts {
        self.lock().counts.clone()
    }

    /// Closes its breaker. Returns true if it was open.
    pub fn close_breaker(&self) -> bool {
        self.lock().breaker.succeeded()
    }
}

impl Remembered {
    /// Records the duration of a part that succeeded or timed out.
    pub(super) fn took(&mut self, duration: Duration) {
        self.mean = Some(self.mean.map_or(duration, |mean| mean * 7 / 8 + duration / 8));
    }

    /// Replaces the reservation of the latest output by one for its successor.
    ///
    /// # Errors
    /// It does not fit into `outputs`.
    pub(super) fn make_room(&mut self, bytes: usize, outputs: &Memory) -> Result<(), Full> {
        match &mut self.output_room {
            Some(room) => room.resize(bytes)?,
            none => *none = Some(outputs.try_hold(bytes)?),
        }
        Ok(())
    }

    /// Publishes a recorded part.
    pub(super) fn publish(&mut self, part: LastPart, output: Option<Output>, memory: &Memory) {
        let SubsystemReport { state, attempts, started, ended, issues, .. } = &*part.report;
        let counts = &mut self.counts;
        let (counter, is_up) = match state {
            SubsystemState::Succeeded => (&mut counts.succeeded, Some(true)),
            SubsystemState::Failed(..) => (&mut counts.failed, Some(false)),
            SubsystemState::TimedOut(_) => (&mut counts.timed_out, Some(false)),
            SubsystemState::CircuitOpen(_) => (&mut counts.circuit_open, Some(false)),
            SubsystemState::Skipped(..) => (&mut counts.skipped, None),
            SubsystemState::Cancelled => (&mut counts.cancelled, None),
        };
        *counter += 1;
        counts.is_up = is_up.or(counts.is_up);
        counts.attempts += u64::from(*attempts);
        counts.retries += u64::from(attempts.saturating_sub(1));
        for issue in issues {
            *match issue.severity {
                Severity::Info => &mut counts.infos,
                Severity::Warning => &mut counts.warnings,
                Severity::Error => &mut counts.errors,
            } += 1;
        }
        if let Some(started) = started.filter(|_| *state != SubsystemState::Cancelled) {
            counts.durations.observe(ended.saturating_sub(started));
        }
        if output.is_some() {
            (self.latest, counts.output_at) = (output, Some(part.finished_at));
        }
        self.keep(part, memory);
    }

    /// Replaces the last part. All of it is kept if it fits into `memory`; the record of the cycle contains it anyway.
    fn keep(&mut self, mut part: LastPart, memory: &Memory) {
        // The previous one is dropped first.
        self.last = None;
        let held = memory.try_hold(part.report.details()).unwrap_or_else(|_full| {
            part.report = Arc::new(part.report.without_details());
            memory.hold_beyond(0)
        });
        self.last = Some((part, held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Payload, SubsystemSpec};

    fn member() -> Member {
        let spec =
            SubsystemSpec { name: "a".into(), endpoint: "http://127.0.0.1:1".into(), ..SubsystemSpec::default() };
        Member::new(Arc::new(Subsystem::from_spec(&spec).unwrap()), false, Arc::default())
    }

    #[test]
    fn the_memory_of_a_registration_is_held_until_its_last_reference_is_dropped() {
        let memory = Memory::whole(100);
        let first = member();
        first.set_initialized(true);
        let member = first.clone().holding(memory.try_hold(60).unwrap());
        assert!(!member.is_initialized() && first.is_initialized(), "this registration was not initialized");
        let suspended = member.clone().suspended(true);
        drop(member);
        assert_eq!(memory.held(), 60);
        drop(suspended);
        assert_eq!(memory.held(), 0);
    }

    #[test]
    fn a_stored_output_is_the_latest_one_and_held_even_over_the_limit() {
        let payload = Payload::from_json(serde_json::json!({ "text": "stored" }).as_object().unwrap()).unwrap();
        let outputs = Memory::whole(1);
        let stored = Output { cycle_id: CycleId(7), payload };
        let standing = Standing::with_output(stored.clone(), Some(Timestamp::UNIX_EPOCH), &outputs);
        assert_eq!(standing.latest(), Some(stored.clone()));
        assert_eq!(standing.counts(), SubsystemCounts { output_at: Some(Timestamp::UNIX_EPOCH), ..Default::default() });
        assert_eq!(outputs.held(), stored.payload.len());
        // Its successor takes its place.
        standing.lock().make_room(0, &outputs).unwrap();
        assert_eq!(outputs.held(), 0);
    }

    #[test]
    fn only_an_open_breaker_can_be_closed() {
        let standing = Standing::default();
        assert!(!standing.close_breaker());
        let policy = Some(crate::model::BreakerPolicy { failure_threshold: 1, open_for: Duration::from_secs(1) });
        standing.lock().breaker.failed(policy, Instant::now());
        assert!(standing.close_breaker() && !standing.close_breaker());
    }

    #[test]
    fn each_duration_weighs_an_eighth_in_the_mean() {
        let standing = Standing::default();
        assert_eq!(standing.mean_duration(), None);
        for (took, mean) in [(800, 800), (0, 700), (1500, 800)] {
            standing.lock().took(Duration::from_millis(took));
            assert_eq!(standing.mean_duration(), Some(Duration::from_millis(mean)));
        }
    }

    #[test]
    fn the_counts_have_the_durations_of_all_parts_with_a_call_that_were_not_cancelled() {
        let standing = Standing::default();
        let publish = |state: SubsystemState, started| {
            let (name, started) = (Name::parse("a").unwrap(), Duration::from_secs(started));
            let (metrics, issues) = Default::default();
            let report = SubsystemReport {
                name,
                queued: Duration::ZERO,
                started: Some(started),
                ended: Duration::from_secs(5),
                attempts: 1,
                issues,
                metrics,
                output_sha256: None,
                recorded_output: None,
                state,
            };
            let (started_at, finished_at) = (Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH);
            let last = LastPart { cycle_id: CycleId(1), started_at, finished_at, report: Arc::new(report) };
            standing.lock().publish(last, None, &Memory::whole(100));
        };
        publish(SubsystemState::Succeeded, 3);
        publish(SubsystemState::Cancelled, 1);
        publish(SubsystemState::TimedOut(String::new()), 0);
        let counts = standing.counts();
        assert_eq!((counts.succeeded, counts.cancelled, counts.timed_out), (1, 1, 1));
        let mut durations = Histogram::default();
        durations.observe(Duration::from_secs(2));
        durations.observe(Duration::from_secs(5));
        assert_eq!(counts.durations, durations);
    }
}
