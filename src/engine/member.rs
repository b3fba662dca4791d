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
    latest: Option<(Output, Room)>,
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
    /// What is remembered of a subsystem whose latest output is known. Takes its room in `budget`, also beyond its end.
    pub fn with_output(output: Output, budget: &Arc<OutputBudget>) -> Self {
        let room = Room::of(budget, output.payload.len());
        Self(Mutex::new(Remembered { latest: Some((output, room)), ..Remembered::default() }))
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
    /// There is no room for it: so many bytes all outputs together may take.
    pub(super) fn keep(&self, output: Output, budget: &Arc<OutputBudget>) -> Result<(), usize> {
        let bytes = output.payload.len();
        let latest = &mut self.lock().latest;
        if let Some((old, room)) = latest {
            room.resize(bytes)?;
            *old = output;
        } else {
            let mut room = Room::of(budget, 0);
            room.resize(bytes)?;
            *latest = Some((output, room));
        }
        Ok(())
    }

    /// Its part in the last cycle.
    pub fn last(&self) -> Option<LastPart> {
        self.lock().last.clone()
    }

    /// The moving mean of the durations of its successful parts; each new one weighs an eighth.
    pub fn mean_duration(&self) -> Option<Duration> {
        self.lock().mean
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
}

/// Room for the latest outputs of all subsystems together, in bytes.
#[derive(Debug)]
pub struct OutputBudget {
    used: AtomicUsize,
    max: AtomicUsize,
}

impl OutputBudget {
    /// Room for `max` bytes, all of it free.
    pub fn new(max: usize) -> Self {
        Self { used: AtomicUsize::new(0), max: AtomicUsize::new(max) }
    }

    /// Changes how much room there is. What is kept now stays.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }
}

/// The part of a budget that one output takes. It comes back when nobody holds the output any more: one that is
/// unregistered in the middle of a cycle is still read by others until that ends.
#[derive(Debug)]
struct Room {
    budget: Arc<OutputBudget>,
    bytes: usize,
}

impl Room {
    fn of(budget: &Arc<OutputBudget>, bytes: usize) -> Self {
        budget.used.fetch_add(bytes, Ordering::Relaxed);
        Self { budget: budget.clone(), bytes }
    }

    /// Takes `bytes` in place of those it has, if they fit, or are fewer.
    fn resize(&mut self, bytes: usize) -> Result<(), usize> {
        let max = self.budget.max.load(Ordering::Relaxed);
        let taken = self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            let used = used - self.bytes + bytes;
            (bytes <= self.bytes || used <= max).then_some(used)
        });
        taken.map_err(|_| max)?;
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
