//! A member of the fleet: a registration, and what is remembered between its cycles.

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
    model::{CycleId, Histogram, Output, Subsystem, SubsystemReport, SubsystemState},
};

/// One registered subsystem, as plans hold it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its registration.
    pub subsystem: Arc<Subsystem>,
    /// It is taken out of cycles.
    pub suspended: bool,
    /// What is remembered of it. Kept when its registration is replaced.
    pub standing: Arc<Standing>,
    kept: Arc<Kept>,
}

/// What is kept for as long as anybody has the registration. New with every one.
#[derive(Debug, Default)]
struct Kept {
    /// It has been initialized with this registration in this epoch.
    initialized: AtomicBool,
    /// The memory that the registration takes.
    _held: Option<Held>,
}

impl Member {
    /// A member that has not been initialized.
    pub fn new(subsystem: Arc<Subsystem>, suspended: bool, standing: Arc<Standing>) -> Self {
        Self { subsystem, suspended, standing, kept: Arc::default() }
    }

    /// The same member, not initialized yet, with the memory that its registration takes.
    #[must_use]
    pub fn holding(self, held: Held) -> Self {
        Self { kept: Arc::new(Kept { _held: Some(held), ..Kept::default() }), ..self }
    }

    /// The same member, taken out of cycles or put back.
    #[must_use]
    pub fn suspended(self, suspended: bool) -> Self {
        Self { suspended, ..self }
    }

    /// It has been initialized and has not asked for it again since.
    pub fn is_initialized(&self) -> bool {
        self.kept.initialized.load(Ordering::Relaxed)
    }

    pub(super) fn set_initialized(&self, initialized: bool) {
        self.kept.initialized.store(initialized, Ordering::Relaxed);
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
    latest: Option<(Output, Held)>,
    last: Option<(LastPart, Held)>,
    pub(super) mean: Option<Duration>,
    pub(super) last_turn: Turn,
    tally: Tally,
}

/// When a subsystem had its turn: it was called, or was not called for a reason of its own. The greater, the more lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    /// The cycle; 0 before the first.
    pub(super) cycle_id: CycleId,
    /// Its call was not cut short by the end of the cycle.
    pub(super) was_whole: bool,
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
    /// Its part. Without issues, metrics and output where there was no memory for them.
    pub report: Arc<SubsystemReport>,
}

impl Standing {
    /// What is remembered of a subsystem whose latest output is known, and perhaps when its cycle ended. The output is held
    /// in `outputs`, also beyond the limit.
    pub fn with_output(output: Output, output_at: Option<Timestamp>, outputs: &Memory) -> Self {
        let held = outputs.hold_beyond(output.payload.len());
        let tally = Tally { output_at, ..Tally::default() };
        Self(Mutex::new(Remembered { latest: Some((output, held)), tally, ..Remembered::default() }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Remembered> {
        // Nothing that holds this lock can panic half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its latest output.
    pub fn latest(&self) -> Option<Output> {
        self.lock().latest.as_ref().map(|(output, _)| output.clone())
    }

    /// Makes an output the latest one.
    ///
    /// # Errors
    /// There is no room for it in `outputs`.
    pub(super) fn keep(&self, output: Output, outputs: &Memory) -> Result<(), Full> {
        let bytes = output.payload.len();
        let latest = &mut self.lock().latest;
        if let Some((old, held)) = latest {
            held.resize(bytes)?;
            *old = output;
        } else {
            *latest = Some((output, outputs.try_hold(bytes)?));
        }
        Ok(())
    }

    /// Its part in the last cycle.
    pub fn last(&self) -> Option<LastPart> {
        self.lock().last.as_ref().map(|(last, _)| last.clone())
    }

    /// The moving mean of the durations of its successful parts; each new one weighs an eighth.
    pub fn mean_duration(&self) -> Option<Duration> {
        self.lock().mean
    }

    /// Looks at what is counted of it, and at its part in the last cycle.
    pub fn look<T>(&self, look: impl FnOnce(&Tally, Option<&LastPart>) -> T) -> T {
        let remembered = self.lock();
        look(&remembered.tally, remembered.last.as_ref().map(|(last, _)| last))
    }

    /// Closes its breaker. Whether it was open.
    pub fn close_breaker(&self) -> bool {
        self.lock().breaker.succeeded()
    }
}

impl Remembered {
    pub(super) fn took(&mut self, duration: Duration) {
        self.mean = Some(self.mean.map_or(duration, |mean| mean * 7 / 8 + duration / 8));
    }

    /// Its part in a cycle that ended at this time. It is remembered whole if there is room in `memory`; the record of the
    /// cycle has it anyway.
    pub(super) fn ended(&mut self, mut part: LastPart, cycle_ended_at: Timestamp, memory: &Memory) {
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
        // The one before gives way to it.
        self.last = None;
        let held = memory.try_hold(part.report.details()).unwrap_or_else(|_full| {
            part.report = Arc::new(part.report.without_details());
            memory.hold_beyond(0)
        });
        self.last = Some((part, held));
    }
}
