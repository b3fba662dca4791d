//! The live progress of the running cycle: for those who watch it, and for the status.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::{Notify, broadcast};

use crate::{
    engine::{Observer, Plan},
    memory::{Held, Memory},
    model::{CycleId, CycleRequest, Name, Revision, SubsystemState, Trigger},
};

/// Batches that a watcher may fall behind before it loses some: at one batch each [`Live::BATCH_EVERY`] more than
/// ten seconds.
const BACKLOG: usize = 256;

/// What is known of the running cycle, and the channel that tells of it.
pub(super) struct Live {
    running: Mutex<Option<Running>>,
    events: broadcast::Sender<Arc<LiveEvent>>,
    /// Updates wait to be sent.
    pub(super) pending: Notify,
}

struct Running {
    cycle: Arc<LiveCycle>,
    /// The newest revision; there is none newer before the cycle ends.
    revision: Revision,
    /// How each subsystem stands, by its position in the plan; `None` waits.
    stands: Vec<Option<Update>>,
    /// Positions that changed since the last batch was sent, in order.
    changed: Vec<Update>,
    /// Updates before those in `changed`.
    sent: u64,
}

/// A cycle that runs.
#[derive(Debug)]
pub struct LiveCycle {
    /// Its number.
    pub cycle_id: CycleId,
    /// What is asked for.
    pub request: CycleRequest,
    /// When it started.
    pub started_at: Timestamp,
    /// Its order.
    pub plan: Arc<Plan>,
}

impl LiveCycle {
    /// The registered subsystems in it, in the order of the plan.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.plan.names(self.request.subset.as_deref())
    }

    /// Whether one of these takes part.
    pub fn has_any(&self, names: &HashSet<Name>) -> bool {
        match self.request.subset.as_deref() {
            None => names.iter().any(|name| self.plan.has(name)),
            Some(subset) => subset.iter().any(|name| names.contains(name) && self.plan.has(name)),
        }
    }

    /// What started it.
    pub fn trigger(&self) -> &Trigger {
        &self.request.trigger
    }
}

/// How one subsystem's part stands since a moment.
#[derive(Clone, Debug)]
pub struct Update {
    /// The subsystem.
    pub name: Name,
    /// How its part ended; `None` is that it is being called.
    pub state: Option<SubsystemState>,
    /// Since the cycle's start.
    pub elapsed: Duration,
    /// Calls so far.
    pub attempts: u32,
}

impl Update {
    /// What it takes.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.state.as_ref().map_or(0, |state| state.message().len())
    }
}

/// Something that happened in the running cycle.
#[derive(Clone, Debug)]
pub struct LiveEvent {
    /// The newest revision when it happened.
    pub revision: Revision,
    /// The cycle.
    pub cycle: Arc<LiveCycle>,
    /// It has just started, or a watcher has just come to it.
    pub started: bool,
    /// How many updates came before these.
    pub first: u64,
    /// What changed.
    pub updates: Vec<Update>,
}

/// How far the running cycle is.
#[derive(Clone, Debug)]
pub struct RunningCycle {
    /// The cycle.
    pub cycle: Arc<LiveCycle>,
    /// Subsystems in it.
    pub total: usize,
    /// Those whose part has ended.
    pub ended: usize,
    /// Those that are being called.
    pub running: usize,
}

/// What happens from the moment on at which it was taken.
pub(super) type Events = broadcast::Receiver<Arc<LiveEvent>>;

impl Live {
    /// How long updates are gathered before they are sent together: too short for an eye to see, and long enough
    /// that a large cycle does not become a flood of small messages.
    pub(super) const BATCH_EVERY: Duration = Duration::from_millis(40);
    /// The most updates of one event, so that with error messages of 1 KiB it is well below what clients take. After so
    /// many a batch is sent at once.
    pub(super) const BATCH: usize = 512;

    pub(super) fn new() -> Self {
        Self { running: Mutex::default(), events: broadcast::Sender::new(BACKLOG), pending: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn start(&self, cycle: Arc<LiveCycle>, revision: Revision) {
        let stands = vec![None; cycle.plan.members().len()];
        let mut running = self.lock();
        // Nobody listening is no error.
        let _ = self.events.send(Arc::new(LiveEvent {
            revision,
            cycle: cycle.clone(),
            started: true,
            first: 0,
            updates: Vec::new(),
        }));
        *running = Some(Running { cycle, revision, stands, changed: Vec::new(), sent: 0 });
    }

    /// Sends what waits to be sent.
    pub(super) fn flush(&self) {
        if let Some(running) = &mut *self.lock() {
            self.send(running);
        }
    }

    fn send(&self, running: &mut Running) {
        if running.changed.is_empty() {
            return;
        }
        let updates = std::mem::take(&mut running.changed);
        let first = running.sent;
        running.sent += updates.len() as u64;
        let cycle = running.cycle.clone();
        let revision = running.revision;
        let _ = self.events.send(Arc::new(LiveEvent { revision, cycle, started: false, first, updates }));
    }

    pub(super) fn end(&self) {
        let mut running = self.lock();
        if let Some(running) = &mut *running {
            self.send(running);
        }
        *running = None;
    }

    /// Everything from now on, and how the running cycle stands, with its room. Where there is none, all updates until now are
    /// lost to who joins.
    pub(super) fn join(&self, room: &Memory) -> (Option<(LiveEvent, Option<Held>)>, Events) {
        let mut running = self.lock();
        let now = running.as_mut().map(|running| {
            self.send(running);
            let stands = || running.stands.iter().flatten();
            let held = room.try_hold(stands().map(Update::bytes).sum()).ok();
            let updates = if held.is_some() { stands().cloned().collect() } else { Vec::new() };
            let first = if held.is_some() { running.sent } else { 0 };
            let (revision, cycle) = (running.revision, running.cycle.clone());
            (LiveEvent { revision, cycle, started: true, first, updates }, held)
        });
        (now, self.events.subscribe())
    }

    pub(super) fn running(&self) -> Option<RunningCycle> {
        let running = self.lock();
        let Running { cycle, stands, .. } = running.as_ref()?;
        let ended = stands.iter().flatten().filter(|update| update.state.is_some()).count();
        Some(RunningCycle {
            cycle: cycle.clone(),
            total: cycle.names().count(),
            ended,
            running: stands.iter().flatten().count() - ended,
        })
    }

    fn update(&self, position: usize, state: Option<SubsystemState>, attempts: u32, elapsed: Duration) {
        let mut running = self.lock();
        let Some(running) = &mut *running else { return };
        let Some(member) = running.cycle.plan.member(position) else { return };
        let update = Update { name: member.subsystem.name.clone(), state, elapsed, attempts };
        if self.events.receiver_count() > 0 {
            if running.changed.is_empty() {
                self.pending.notify_one();
            }
            running.changed.push(update.clone());
            if running.changed.len() >= Self::BATCH {
                self.send(running);
            }
        }
        running.stands[position] = Some(update);
    }
}

impl Observer for Live {
    fn called(&self, position: usize, attempt: u32, elapsed: Duration) {
        self.update(position, None, attempt, elapsed);
    }

    fn ended(&self, position: usize, state: &SubsystemState, attempts: u32, elapsed: Duration) {
        self.update(position, Some(state.clone()), attempts, elapsed);
    }
}
