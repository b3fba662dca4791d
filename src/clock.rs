//! The wall clock of a process. Durations and deadlines go by tokio's clock, which tests pause; those that other
//! machines rely on by a [`Moment`].

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the time of day.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Source);

#[derive(Clone, Copy, Debug)]
enum Source {
    System,
    /// Each simulation leaves one, so that clocks can be copied.
    Simulated(&'static Mutex<Simulated>),
}

/// A simulated clock.
#[derive(Clone, Copy, Debug)]
struct Simulated {
    /// The wall clock showed this time at that instant.
    shown: (Timestamp, Instant),
    /// When the machine was started.
    booted: Instant,
    /// For how long it was suspended since.
    suspended: Duration,
}

/// One moment by all clocks of a machine. None of them alone counts the time that other machines have lived through:
/// tokio's clock stands still while the machine is suspended, the clock of its boot while it is migrated or restored,
/// and the wall clock can be set.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    instant: Instant,
    since_boot: Duration,
    time: Timestamp,
}

impl Moment {
    /// The time of day.
    #[must_use]
    pub fn time(&self) -> Timestamp {
        self.time
    }

    /// The time since this moment, by tokio's clock.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.instant.elapsed()
    }

    /// The time from this moment until `later`, by the clock that went furthest. Zero if that is not later.
    #[must_use]
    pub fn until(&self, later: &Self) -> Duration {
        let by_wall = Duration::try_from(later.time.duration_since(self.time)).unwrap_or_default();
        let by_boot = later.since_boot.saturating_sub(self.since_boot);
        later.instant.saturating_duration_since(self.instant).max(by_boot).max(by_wall)
    }
}

impl Clock {
    /// The system's clock, with whatever adjustments are made to it.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that shows `start` now, and moves with tokio's clock.
    pub fn simulated(start: Timestamp) -> Self {
        let now = Instant::now();
        let simulated = Simulated { shown: (start, now), booted: now, suspended: Duration::ZERO };
        Self(Source::Simulated(Box::leak(Box::new(Mutex::new(simulated)))))
    }

    /// Sets a simulated clock and its copies, as the clock of a machine is set: forward or back. Leaves the system's
    /// clock unchanged.
    pub fn set(&self, time: Timestamp) {
        if let Source::Simulated(shown) = self.0 {
            shown.lock().unwrap_or_else(PoisonError::into_inner).shown = (time, Instant::now());
        }
    }

    /// Lets a simulated machine be suspended for this long, which tokio's clock does not see. Leaves the system's clock
    /// unchanged.
    pub fn suspend(&self, duration: Duration) {
        if let Source::Simulated(shown) = self.0 {
            let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            shown.suspended += duration;
            let (time, since) = shown.shown;
            shown.shown = (time.saturating_add(duration).unwrap_or(Timestamp::MAX), since);
        }
    }

    /// True if it moves with tokio's clock.
    pub fn is_simulated(&self) -> bool {
        matches!(self.0, Source::Simulated(_))
    }

    /// The current time.
    pub fn now(&self) -> Timestamp {
        match self.0 {
            #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
            Source::System => Timestamp::now(),
            Source::Simulated(shown) => {
                let (time, since) = shown.lock().unwrap_or_else(PoisonError::into_inner).shown;
                time.saturating_add(since.elapsed()).unwrap_or(Timestamp::MAX)
            }
        }
    }

    /// This moment, by all clocks.
    pub fn moment(&self) -> Moment {
        Moment { instant: Instant::now(), since_boot: self.since_boot(), time: self.now() }
    }

    /// Time since the machine was started, with that in which it was suspended, where the system knows it.
    fn since_boot(self) -> Duration {
        match self.0 {
            Source::System => {
                #[cfg(target_os = "linux")]
                let clock = rustix::time::ClockId::Boottime;
                #[cfg(not(target_os = "linux"))]
                let clock = rustix::time::ClockId::Monotonic;
                Duration::try_from(rustix::time::clock_gettime(clock)).unwrap_or_default()
            }
            Source::Simulated(shown) => {
                let Simulated { booted, suspended, .. } = *shown.lock().unwrap_or_else(PoisonError::into_inner);
                booted.elapsed() + suspended
            }
        }
    }
}
