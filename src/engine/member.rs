//! A member of the fleet: a registration, and what is remembered between its cycles.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::{Breaker, BreakerState};
use crate::model::{CycleId, Histogram, Output, Subsystem, SubsystemReport, SubsystemState};

/// One registered subsystem, as plans hold it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its registration.
    pub subsystem: Arc<Subsystem>,
    /// It is taken out of cycles.
    pub suspended: bool,
    /// What is remembered of it. Kept when its registration is replaced.
    pub standing: Arc<Standing>,
    /// It has been initialized with this registration in this epoch. New with every registration.
    initialized: Arc<AtomicBool>,
}

impl Member {
    /// A member that has not been initialized.
    pub fn new(subsystem: Arc<Subsystem>, suspended: bool, standing: Arc<Standing>) -> Self {
        Self { subsystem, suspended, standing, initialized: Arc::default() }
    }

    /// The same member, taken out of cycles or put back.
    #[must_use]
    pub fn suspended(self, suspended: bool) -> Self {
        Self { suspended, ..self }
    }

    /// It has been initialized and has not asked for it again since.
    pub fn is_initialized(&self) -> bool {
        self.initialized.load(Ordering::Relaxed)
    }

    pub(super) fn set_initialized(&self, initialized: bool) {
        self.initialized.store(initialized, Ordering::Relaxed);
    }

    /// How its breaker stands.
    pub fn breaker(&self, now: Instant) -> BreakerState {
        self.standing.lock().breaker.state(self.subsystem.breaker, now)
    }
}

/// What is remembered of a subsystem between its cycles.
#[derive(Debug, Default)]
pub struct Standing(Mutex<Remembered>);

#[derive(Debug, Default)]
pub(super) struct Remembered {
    pub(super) breaker: Breaker,
    pub(super) latest: Option<Output>,
    pub(super) last: Option<LastPart>,
    pub(super) mean: Option<Duration>,
    tally: Tally,
}

/// What is counted of a subsystem since this process started, or since it was registered.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How its parts ended.
    pub outcomes: Outcomes,
    /// Calls of its `RunCycle`.
    pub attempts: u64,
    /// Those of them that were not the first of their part.
    pub retries: u64,
    /// How long its parts took from the first call to the end, unless they were cancelled.
    pub durations: Histogram,
    /// Whether the last part that says something about it succeeded: one that was skipped or cancelled says nothing.
    pub is_up: Option<bool>,
    /// When the cycle that made its latest output ended; `None` when there is no output, or that is not known any more.
    pub output_at: Option<Timestamp>,
}

/// How parts ended, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field counts the state of its name")]
pub struct Outcomes {
    pub succeeded: u64,
    pub failed: u64,
    pub timed_out: u64,
    pub skipped: u64,
    pub circuit_open: u64,
    pub cancelled: u64,
}

/// A subsystem's part in the last cycle that this process ran with it.
#[derive(Clone, Debug)]
pub struct LastPart {
    /// The cycle.
    pub cycle_id: CycleId,
    /// When the cycle started.
    pub started_at: Timestamp,
    /// Its part.
    pub report: Arc<SubsystemReport>,
}

impl Standing {
    /// What is remembered of a subsystem whose latest output is known, and perhaps when its cycle ended.
    pub fn with_output(output: Output, output_at: Option<Timestamp>) -> Self {
        let tally = Tally { output_at, ..Tally::default() };
        Self(Mutex::new(Remembered { latest: Some(output), tally, ..Remembered::default() }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Remembered> {
        // Nothing that holds this lock can panic half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its latest output.
    pub fn latest(&self) -> Option<Output> {
        self.lock().latest.clone()
    }

    /// Its part in the last cycle.
    pub fn last(&self) -> Option<LastPart> {
        self.lock().last.clone()
    }

    /// The moving mean of the durations of its successful parts; each new one weighs an eighth.
    pub fn mean_duration(&self) -> Option<Duration> {
        self.lock().mean
    }

    /// Looks at what is counted of it, and at its part in the last cycle.
    pub fn look<T>(&self, look: impl FnOnce(&Tally, Option<&LastPart>) -> T) -> T {
        let remembered = self.lock();
        look(&remembered.tally, remembered.last.as_ref())
    }

    /// Closes its breaker.
    pub fn close_breaker(&self) {
        self.lock().breaker.succeeded();
    }
}

impl Remembered {
    pub(super) fn took(&mut self, duration: Duration) {
        self.mean = Some(self.mean.map_or(duration, |mean| mean * 7 / 8 + duration / 8));
    }

    /// Its part in a cycle that ended at this time.
    pub(super) fn ended(&mut self, part: LastPart, cycle_ended_at: Timestamp) {
        let SubsystemReport { state, attempts, started, ended, .. } = &*part.report;
        let tally = &mut self.tally;
        let Outcomes { succeeded, failed, timed_out, skipped, circuit_open, cancelled } = &mut tally.outcomes;
        let (counter, is_up) = match state {
            SubsystemState::Succeeded => (succeeded, Some(true)),
            SubsystemState::Failed(..) => (failed, Some(false)),
            SubsystemState::TimedOut(_) => (timed_out, Some(false)),
            SubsystemState::CircuitOpen(_) => (circuit_open, Some(false)),
            SubsystemState::Skipped(..) => (skipped, None),
            SubsystemState::Cancelled => (cancelled, None),
        };
        *counter += 1;
        tally.is_up = is_up.or(tally.is_up);
        tally.attempts += u64::from(*attempts);
        tally.retries += u64::from(attempts.saturating_sub(1));
        if let Some(started) = started.filter(|_| *state != SubsystemState::Cancelled) {
            tally.durations.observe(ended.saturating_sub(started));
        }
        if *state == SubsystemState::Succeeded {
            tally.output_at = Some(cycle_ended_at);
        }
        self.last = Some(part);
    }
}

/// Room for the latest outputs of all subsystems together.
#[derive(Debug)]
pub struct OutputBudget {
    used: AtomicUsize,
    max: AtomicUsize,
}

impl OutputBudget {
    /// Room for `max` bytes, of which `used` are taken.
    pub fn new(used: usize, max: usize) -> Self {
        Self { used: AtomicUsize::new(used), max: AtomicUsize::new(max) }
    }

    /// Takes `new` bytes in place of `old` ones, if they fit.
    pub(super) fn exchange(&self, old: usize, new: usize) -> Result<(), usize> {
        let max = self.max.load(Ordering::Relaxed);
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            let used = used.saturating_sub(old) + new;
            (new <= old || used <= max).then_some(used)
        });
        taken.map(|_| ()).map_err(|_| max)
    }

    /// Gives back the bytes of an output that is forgotten.
    pub fn give_back(&self, output: &Output) {
        let _ = self.exchange(output.payload.len(), 0);
    }

    /// Changes how much room there is. What is kept now stays.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }
}
