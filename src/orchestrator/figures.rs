//! Counters for monitoring, and a snapshot of them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;

use super::{Orchestrator, State};
use crate::{
    model::{CycleState, Epoch, Histogram, Name, Revision},
    ports::{Durability, Record, ServerFigures, StoreError, StoreSize, TriggerKind},
    schedule::LoopEntry,
};

/// Counters since this process started, and the current state.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Counters of cycles and commits.
    pub counts: Counts,
    /// Number of waiting cycles.
    pub queued: usize,
    /// Number of running cycles.
    pub running: usize,
    /// The loops, by name, each with its lag; `None` while it is unknown.
    pub loops: Vec<(LoopEntry, Option<Duration>)>,
    /// Number of subsystems that the configuration file declares.
    pub declared: usize,
    /// Number of subsystems that were registered by RPC.
    pub registered: usize,
    /// Number of expected subsystems that are not registered.
    pub missing: usize,
    /// Number of these subsystems with a lease.
    pub leases: usize,
    /// The term of this process.
    pub epoch: Epoch,
    /// When this process started.
    pub started_at: Timestamp,
    /// When it began this term. `None` if it only looks at its store.
    pub term_began_at: Option<Timestamp>,
    /// True while the process drains: no more cycles are admitted.
    pub draining: bool,
}

/// The watchers of the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Number of connected watchers.
    pub watchers: usize,
    /// Number of these watchers that have to read the store.
    pub lagging: usize,
    /// Number of events sent to watchers.
    pub events: u64,
}

/// Counters of cycles and commits.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    cycles: BTreeMap<(CycleState, TriggerKind), u64>,
    durations: BTreeMap<CycleState, Histogram>,
    commits: BTreeMap<Durability, Histogram>,
    /// Number of failed commits.
    pub commit_errors: u64,
    /// Number of unreadable records, each counted once.
    pub unreadable_records: u64,
    /// Passes of retention, which remove records.
    pub retention: Passes,
    /// Passes that unregister subsystems with expired leases.
    pub leases: Passes,
}

/// The outcomes of the repeated work of a task.
#[derive(Clone, Debug, Default)]
pub struct Passes {
    /// Number of successes.
    pub done: u64,
    /// Number of failures; the log has the reasons.
    pub failed: u64,
    /// Time of the last success.
    pub done_at: Option<Timestamp>,
}

impl Passes {
    /// Counts an attempt.
    pub(super) fn tried<T, E>(&mut self, result: &Result<T, E>, now: Timestamp) {
        if result.is_ok() {
            self.done += 1;
            self.done_at = Some(now);
        } else {
            self.failed += 1;
        }
    }
}

impl Counts {
    /// Number of recorded cycles in this state, by this trigger.
    pub fn cycles(&self, state: CycleState, trigger: TriggerKind) -> u64 {
        self.cycles.get(&(state, trigger)).copied().unwrap_or_default()
    }

    /// Durations of cycles that this process ran.
    pub fn durations(&self, state: CycleState) -> Histogram {
        self.durations.get(&state).cloned().unwrap_or_default()
    }

    /// Durations of successful commits.
    pub fn commits(&self, durability: Durability) -> Histogram {
        self.commits.get(&durability).cloned().unwrap_or_default()
    }

    /// Counts a recorded cycle; `ran_for` is `None` if this process did not run it.
    pub(super) fn recorded(&mut self, record: &Record, ran_for: Option<Duration>) {
        *self.cycles.entry((record.state, TriggerKind::of(&record.trigger))).or_default() += 1;
        if let Some(ran_for) = ran_for {
            self.durations.entry(record.state).or_default().observe(ran_for);
        }
    }

    /// Counts a successful commit.
    pub(super) fn committed(&mut self, durability: Durability, took: Duration) {
        self.commits.entry(durability).or_default().observe(took);
    }

    /// Counts a failed commit.
    pub(super) fn commit_failed(&mut self) {
        self.commit_errors += 1;
    }
}

impl Orchestrator {
    /// The counters and the current state, without single subsystems.
    pub fn figures(&self) -> Figures {
        let now = self.0.clock.now();
        let state = self.0.state();
        let counts =
            Counts { unreadable_records: self.0.history.extent().unreadable_records(), ..state.counts.clone() };
        let waiting = state.oldest_waiting_ticks();
        Figures {
            counts,
            queued: state.line.waiting(),
            running: state.line.running(),
            loops: state.loops.iter().map(|entry| (entry.clone(), lag(entry, &waiting, now))).collect(),
            declared: state.registry.declared(),
            registered: state.registry.len() - state.registry.declared(),
            missing: state.registry.missing().len(),
            leases: state.registry.leases(),
            epoch: self.0.engine.epoch,
            started_at: self.0.started.time(),
            term_began_at: (!self.0.is_read_only).then_some(self.0.term_began_at),
            draining: state.draining,
        }
    }

    /// The size of the store.
    ///
    /// # Errors
    /// The store can't be read.
    pub async fn store_size(&self) -> Result<StoreSize, StoreError> {
        self.0.store.size().await
    }

    /// Figures of the server of the store, if that is on one.
    pub async fn store_server(&self) -> Option<ServerFigures> {
        self.0.store.server().await
    }
}

impl State {
    /// The time at which the oldest waiting cycle of each loop was due. Loops without a waiting cycle are missing.
    fn oldest_waiting_ticks(&self) -> BTreeMap<&Name, Timestamp> {
        let mut oldest = BTreeMap::new();
        for waiting in self.live.values().filter(|it| self.line.waits(it.cycle_id)) {
            if let Some(name) = waiting.request.trigger.loop_name() {
                oldest.entry(name).or_insert(waiting.request.scheduled_at);
            }
        }
        oldest
    }
}

/// The time that the oldest waiting tick of a loop has waited for its cycle to start. If no tick waits, the time that
/// the last one waited.
fn lag(entry: &LoopEntry, waiting: &BTreeMap<&Name, Timestamp>, now: Timestamp) -> Option<Duration> {
    let waits = waiting.get(&entry.settings.name).map(|due_at| now.duration_since(*due_at));
    waits.map(|waits| Duration::try_from(waits).unwrap_or_default()).or(entry.lag)
}

/// The connected watchers, with their positions.
#[derive(Debug, Default)]
pub(super) struct Watchers(Mutex<WatcherList>);

#[derive(Debug, Default)]
struct WatcherList {
    next: u64,
    connected: BTreeMap<u64, Arc<Cursor>>,
    /// Events sent to watchers that have left.
    events: u64,
}

/// The position of a watcher. A stalled watcher does not run, so others read its position here.
#[derive(Debug, Default)]
struct Cursor {
    revision: AtomicU64,
    events: AtomicU64,
}

/// The entry of a watcher, until [`Watchers::leave`].
pub(super) struct WatcherPlace {
    key: u64,
    cursor: Arc<Cursor>,
}

impl Watchers {
    fn lock(&self) -> MutexGuard<'_, WatcherList> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.lock().connected.len()
    }

    /// Adds a watcher, if there are fewer than `max`.
    pub(super) fn enter(&self, cursor: Revision, max: usize) -> Option<WatcherPlace> {
        let mut list = self.lock();
        if list.connected.len() >= max {
            return None;
        }
        let cursor = Arc::new(Cursor { revision: cursor.0.into(), events: 0.into() });
        let key = list.next;
        list.next += 1;
        list.connected.insert(key, cursor.clone());
        Some(WatcherPlace { key, cursor })
    }

    pub(super) fn leave(&self, place: &WatcherPlace) {
        let mut list = self.lock();
        list.connected.remove(&place.key);
        list.events += place.cursor.events.load(Ordering::Relaxed);
    }

    /// The watchers, of which those lag whose position is before this revision.
    pub(super) fn look(&self, at_hand: Revision) -> Watched {
        let list = self.lock();
        let cursors = || list.connected.values();
        let lagging = cursors().filter(|it| it.revision.load(Ordering::Relaxed) < at_hand.0).count();
        let events: u64 = cursors().map(|it| it.events.load(Ordering::Relaxed)).sum();
        Watched { watchers: list.connected.len(), lagging, events: list.events + events }
    }
}

impl WatcherPlace {
    /// Counts an event sent to the watcher.
    pub(super) fn given(&self, cursor: Revision) {
        self.cursor.revision.store(cursor.0, Ordering::Relaxed);
        self.cursor.events.fetch_add(1, Ordering::Relaxed);
    }
}
