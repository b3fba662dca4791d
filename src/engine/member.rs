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
use crate::model::{CycleId, Output, Subsystem, SubsystemReport};

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
    /// What is remembered of a subsystem whose latest output is known.
    pub fn with_output(output: Output) -> Self {
        Self(Mutex::new(Remembered { latest: Some(output), ..Remembered::default() }))
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

    /// Closes its breaker.
    pub fn close_breaker(&self) {
        self.lock().breaker.succeeded();
    }
}

impl Remembered {
    pub(super) fn took(&mut self, duration: Duration) {
        self.mean = Some(self.mean.map_or(duration, |mean| mean * 7 / 8 + duration / 8));
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
