//! What is counted for monitoring while cycles run, and a look at it.

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
    ports::{Durability, Record, StoreError, StoreSize, TriggerKind},
    schedule::LoopEntry,
};

/// What is counted since this process started, and how things stand now.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Cycles and commits.
    pub counts: Counts,
    /// Cycles that wait.
    pub queued: usize,
    /// Cycles that run.
    pub running: usize,
    /// The loops, by name, each with how late it is; `None` when that is not known yet.
    pub loops: Vec<(LoopEntry, Option<Duration>)>,
    /// Watchers connected.
    pub watchers: usize,
    /// Those of them that have to read the store to go on.
    pub lagging: usize,
    /// Events that watchers were given.
    pub events: u64,
    /// Subsystems that the configuration file declares.
    pub declared: usize,
    /// Subsystems that were registered by RPC.
    pub registered: usize,
    /// Those of them that have a lease.
    pub leases: usize,
    /// The term of this process.
    pub epoch: Epoch,
    /// When this process started.
    pub started_at: Timestamp,
    /// Nothing is admitted any more.
    pub draining: bool,
}

/// What is counted of cycles and commits.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    cycles: BTreeMap<(CycleState, TriggerKind), u64>,
    durations: BTreeMap<CycleState, Histogram>,
    commits: BTreeMap<Durability, Histogram>,
    /// Commits that failed.
    pub commit_errors: u64,
    /// Records that can't be read, each once.
    pub unreadable_records: u64,
    /// Looks for records that are not to be kept any more.
    pub retention: Passes,
    /// Ends of leases, some at a time.
    pub leases: Passes,
}

/// What became of something that a task does again and again.
#[derive(Clone, Debug, Default)]
pub struct Passes {
    /// How often it was done.
    pub done: u64,
    /// How often it failed; the log says why.
    pub failed: u64,
    /// When it was done last.
    pub done_at: Option<Timestamp>,
}

impl Passes {
    /// It was tried.
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
    /// Cycles that were recorded.
    pub fn cycles(&self, state: CycleState, trigger: TriggerKind) -> u64 {
        self.cycles.get(&(state, trigger)).copied().unwrap_or_default()
    }

    /// How long those of them took that this process ran.
    pub fn durations(&self, state: CycleState) -> Histogram {
        self.durations.get(&state).cloned().unwrap_or_default()
    }

    /// How long commits took that did not fail.
    pub fn commits(&self, durability: Durability) -> Histogram {
        self.commits.get(&durability).cloned().unwrap_or_default()
    }

    /// A cycle was recorded; `ran_for` is missing where this process did not run it.
    pub(super) fn recorded(&mut self, record: &Record, ran_for: Option<Duration>) {
        *self.cycles.entry((record.state, TriggerKind::of(&record.trigger))).or_default() += 1;
        if let Some(ran_for) = ran_for {
            self.durations.entry(record.state).or_default().observe(ran_for);
        }
    }

    /// A commit has returned.
    pub(super) fn committed(&mut self, durability: Durability, took: Duration) {
        self.commits.entry(durability).or_default().observe(took);
    }

    /// A commit has failed.
    pub(super) fn commit_failed(&mut self) {
        self.commit_errors += 1;
    }
}

impl Orchestrator {
    /// What is counted, and how things stand, but for single subsystems.
    pub fn figures(&self) -> Figures {
        let now = self.0.clock.now();
        let state = self.0.state();
        // From here on the latest records are at hand.
        let at_hand = state.recent.front().map_or(state.last_revision, |first| Revision(first.record.revision.0 - 1));
        let (watchers, lagging, events) = self.0.watchers.look(at_hand);
        let waiting = state.oldest_waiting_ticks();
        Figures {
            counts: state.counts.clone(),
            queued: state.line.waiting(),
            running: state.line.running(),
            loops: state.loops.iter().map(|entry| (entry.clone(), lag(entry, &waiting, now))).collect(),
            watchers,
            lagging,
            events,
            declared: state.registry.declared(),
            registered: state.registry.len() - state.registry.declared(),
            leases: state.registry.leases(),
            epoch: self.0.engine.epoch,
            started_at: self.0.started_at,
            draining: state.draining,
        }
    }

    /// How much the store holds.
    ///
    /// # Errors
    /// The store can't be read.
    pub async fn store_size(&self) -> Result<StoreSize, StoreError> {
        self.0.store.size().await
    }
}

impl State {
    /// When the oldest cycle that waits was due, for each loop of which one waits.
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

/// For how long the oldest tick of a loop waits for its cycle to begin, or, when none does, had waited last.
fn lag(entry: &LoopEntry, waiting: &BTreeMap<&Name, Timestamp>, now: Timestamp) -> Option<Duration> {
    let waits = waiting.get(&entry.settings.name).map(|due_at| now.duration_since(*due_at));
    waits.map(|waits| Duration::try_from(waits).unwrap_or_default()).or(entry.lag)
}

/// The watchers that are connected, each where it is.
#[derive(Debug, Default)]
pub(super) struct Watchers(Mutex<WatcherList>);

#[derive(Debug, Default)]
struct WatcherList {
    next: u64,
    connected: BTreeMap<u64, Arc<Cursor>>,
    /// Given to those that have left.
    events: u64,
}

/// How far a watcher is. A watcher that stalls does nothing, so this is where others see it.
#[derive(Debug, Default)]
struct Cursor {
    revision: AtomicU64,
    events: AtomicU64,
}

/// A watcher's place among them, which it has until it leaves.
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

    /// Takes a place, if fewer than `max` have one.
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

    /// How many there are, how many of them are before this revision, and how many events they were given.
    fn look(&self, at_hand: Revision) -> (usize, usize, u64) {
        let list = self.lock();
        let cursors = || list.connected.values();
        let lagging = cursors().filter(|it| it.revision.load(Ordering::Relaxed) < at_hand.0).count();
        let events: u64 = cursors().map(|it| it.events.load(Ordering::Relaxed)).sum();
        (list.connected.len(), lagging, list.events + events)
    }
}

impl WatcherPlace {
    /// The watcher is given an event.
    pub(super) fn given(&self, cursor: Revision) {
        self.cursor.revision.store(cursor.0, Ordering::Relaxed);
        self.cursor.events.fetch_add(1, Ordering::Relaxed);
    }
}
