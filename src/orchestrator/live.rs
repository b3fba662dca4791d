//! The live progress of running cycles, for watchers and for the status: of those that run here, or, while this replica
//! follows, of those that the leader tells of.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::{Notify, broadcast, watch as latest},
    time::sleep,
};

use super::Shared;
use crate::{
    engine::{Observer, Plan},
    memory::{Held, Memory},
    model::{CycleId, CycleRequest, Name, Revision, SubsystemState},
    ports::TriggerKind,
};

/// Most events that are kept for slow watchers: more than ten seconds of 16 cycles, at one batch per
/// [`Live::BATCH_EVERY`].
const BACKLOG: usize = 4096;

/// Most bytes of the events that are kept for slow watchers. A batch of updates can take 512 KiB, but most take a
/// hundredth of that.
const BACKLOG_BYTES: usize = 4 << 20;

/// The state of the running cycles, and the channel of their events.
pub(super) struct Live {
    running: Mutex<BTreeMap<CycleId, Running>>,
    events: broadcast::Sender<Weak<LiveEvent>>,
    /// Events that watchers can still receive. A watcher that falls behind starts again with the current state of the
    /// cycles.
    backlog: Mutex<Backlog>,
    /// Memory for the updates in events, until they are dropped.
    room: Memory,
    /// Number of watchers that want progress.
    pub(super) wanted: latest::Sender<usize>,
    /// Notified when updates wait to be sent.
    pub(super) pending: Notify,
}

/// Events, oldest first, and the bytes of their updates.
#[derive(Default)]
struct Backlog {
    events: VecDeque<Arc<LiveEvent>>,
    bytes: usize,
}

struct Running {
    cycle: Arc<LiveCycle>,
    /// Number of subsystems in the cycle.
    total: usize,
    /// The state of each subsystem, by its position in the plan; a subsystem without an entry waits.
    stands: BTreeMap<usize, Update>,
    /// Updates since the last batch was sent, in order.
    changed: Vec<Update>,
    /// Number of updates before those in `changed`.
    sent: u64,
}

/// A running cycle.
#[derive(Debug)]
pub struct LiveCycle {
    /// Its id.
    pub cycle_id: CycleId,
    /// What started it.
    pub trigger: TriggerKind,
    /// The loop that started it, if one did.
    pub loop_name: Option<Name>,
    /// When it was due.
    pub scheduled_at: Timestamp,
    /// When it started.
    pub started_at: Timestamp,
    subsystems: Subsystems,
    /// The revision of its record; unset until it is recorded. 0 if this is not known any more.
    pub(super) revision: Arc<OnceLock<Revision>>,
}

/// The subsystems in a running cycle, in the order of the plan.
#[derive(Debug)]
enum Subsystems {
    Planned(Arc<Plan>),
    /// As the leader has told them.
    Told {
        names: Vec<Name>,
        positions: HashMap<Name, usize>,
    },
}

impl LiveCycle {
    pub(super) fn new(cycle_id: CycleId, request: &CycleRequest, started_at: Timestamp, plan: Arc<Plan>) -> Self {
        let (trigger, scheduled_at) = (TriggerKind::of(&request.trigger), request.scheduled_at);
        let (loop_name, subsystems) = (request.trigger.loop_name().cloned(), Subsystems::Planned(plan));
        Self { cycle_id, trigger, loop_name, scheduled_at, started_at, subsystems, revision: Arc::default() }
    }

    /// A cycle with these subsystems that runs at the leader.
    pub fn told(
        cycle_id: CycleId,
        (trigger, loop_name): (TriggerKind, Option<Name>),
        scheduled_at: Timestamp,
        started_at: Timestamp,
        names: Vec<Name>,
    ) -> Self {
        let positions = names.iter().cloned().zip(0..).collect();
        let subsystems = Subsystems::Told { names, positions };
        Self { cycle_id, trigger, loop_name, scheduled_at, started_at, subsystems, revision: Arc::default() }
    }

    /// Number of subsystems in it.
    fn size(&self) -> usize {
        match &self.subsystems {
            Subsystems::Planned(plan) => plan.size(),
            Subsystems::Told { names, .. } => names.len(),
        }
    }

    /// The subsystem at this position.
    fn name(&self, position: usize) -> Option<&Name> {
        match &self.subsystems {
            Subsystems::Planned(plan) => plan.name(position),
            Subsystems::Told { names, .. } => names.get(position),
        }
    }

    /// The subsystems in it, in the order of the plan: those that are not registered come last.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        (0..self.size()).filter_map(|position| self.name(position))
    }

    /// True if one of these subsystems takes part.
    pub fn has_any(&self, names: &BTreeSet<Name>) -> bool {
        names.iter().any(|name| match &self.subsystems {
            Subsystems::Planned(plan) => plan.has(name),
            Subsystems::Told { positions, .. } => positions.contains_key(name),
        })
    }

    /// Sets the revision of its record. Called before the record is visible.
    pub(super) fn recorded_as(&self, revision: Revision) {
        // A cycle is recorded once, so no revision is set yet.
        let _ = self.revision.set(revision);
    }
}

/// A change of one subsystem's part.
#[derive(Clone, Debug)]
pub struct Update {
    /// The subsystem.
    pub name: Name,
    /// How its part ended; `None` while it is being called.
    pub state: Option<SubsystemState>,
    /// Time since the cycle's start.
    pub elapsed: Duration,
    /// Number of calls so far.
    pub attempts: u32,
}

impl Update {
    /// Its bytes in memory.
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.state.as_ref().map_or(0, |state| state.message().len())
    }
}

/// An event of a running cycle.
#[derive(Clone, Debug)]
pub struct LiveEvent {
    /// The cycle.
    pub cycle: Arc<LiveCycle>,
    /// Its start, or the progress of its parts.
    pub change: LiveChange,
    /// Memory for the updates.
    pub(super) room: Option<Arc<Held>>,
}

/// An event of a running cycle. Its updates are counted from its start.
#[derive(Clone, Debug)]
pub enum LiveChange {
    /// It has started.
    Started,
    /// For a new watcher: the number of updates so far, and the state of each part that does not wait. Without memory
    /// for that, the list is empty and the number is 0.
    Stands(u64, Vec<Update>),
    /// Updates, and the number of updates before them.
    Updated(u64, Vec<Update>),
}

impl LiveChange {
    /// The states of parts.
    pub fn updates(&self) -> &[Update] {
        match self {
            Self::Started => &[],
            Self::Stands(_, updates) | Self::Updated(_, updates) => updates,
        }
    }

    /// The number of updates until the end of this event.
    pub(super) fn known(&self) -> u64 {
        match self {
            Self::Started => 0,
            Self::Stands(after, _) => *after,
            Self::Updated(after, updates) => after + updates.len() as u64,
        }
    }

    /// The number of updates missing between this number and this event.
    pub(super) fn lost(&self, known: u64) -> u64 {
        match self {
            // The current state contains all lost updates.
            Self::Started | Self::Stands(..) => 0,
            Self::Updated(after, _) => after.saturating_sub(known),
        }
    }
}

impl LiveEvent {
    fn bytes(&self) -> usize {
        self.room.as_ref().map_or(0, |room| room.bytes())
    }
}

/// The progress of a running cycle.
#[derive(Clone, Debug)]
pub struct RunningCycle {
    /// The cycle.
    pub cycle: Arc<LiveCycle>,
    /// Number of subsystems in it.
    pub total: usize,
    /// Number of subsystems whose part has ended.
    pub ended: usize,
    /// Number of subsystems that are being called.
    pub running: usize,
}

/// A subscription to events from the moment of its creation.
pub(super) type Events = broadcast::Receiver<Weak<LiveEvent>>;

impl Live {
    /// Time for which updates are collected before they are sent together: too short to be visible, and long enough
    /// that a large cycle does not send a flood of small messages.
    pub(super) const BATCH_EVERY: Duration = Duration::from_millis(40);
    /// Most updates of one event. With error messages of 1 KiB each, such an event is well below the message limit of
    /// clients. A batch of this size is sent at once.
    pub(super) const BATCH: usize = 512;

    /// A state with this memory for events.
    pub(super) fn new(room: Memory) -> Self {
        Self {
            running: Mutex::default(),
            events: broadcast::Sender::new(BACKLOG),
            backlog: Mutex::default(),
            room,
            wanted: latest::Sender::new(0),
            pending: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<CycleId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a cycle. It runs until the returned value is dropped.
    pub(super) fn start(&self, cycle: Arc<LiveCycle>) -> Progress<'_> {
        let cycle_id = cycle.cycle_id;
        self.begin(cycle);
        Progress { live: self, cycle_id }
    }

    fn begin(&self, cycle: Arc<LiveCycle>) {
        let (cycle_id, total) = (cycle.cycle_id, cycle.size());
        let mut running = self.lock();
        self.broadcast(cycle.clone(), LiveChange::Started);
        running.insert(cycle_id, Running { cycle, total, stands: BTreeMap::new(), changed: Vec::new(), sent: 0 });
    }

    /// A cycle runs at the leader.
    pub(super) fn told_start(&self, cycle: LiveCycle) {
        self.begin(Arc::new(cycle));
    }

    /// A cycle at the leader has made progress, of which this many updates were lost on the way.
    pub(super) fn told_progress(&self, cycle_id: CycleId, lost: u64, updates: Vec<Update>) {
        let mut running = self.lock();
        let Some(running) = running.get_mut(&cycle_id) else { return };
        if let Subsystems::Told { positions, .. } = &running.cycle.subsystems {
            for update in &updates {
                if let Some(position) = positions.get(&update.name) {
                    running.stands.insert(*position, update.clone());
                }
            }
        }
        if self.events.receiver_count() > 0 {
            running.sent += lost;
            running.changed.extend(updates);
            self.send(running);
        }
    }

    /// A cycle at the leader was recorded, with this revision.
    pub(super) fn told_end(&self, cycle_id: CycleId, revision: Revision) {
        if let Some(running) = self.lock().remove(&cycle_id) {
            running.cycle.recorded_as(revision);
        }
    }

    /// Nothing more is known of these cycles: the leader tells of them anew, or another one leads.
    pub(super) fn forget(&self) {
        for running in std::mem::take(&mut *self.lock()).into_values() {
            running.cycle.recorded_as(Revision::default());
        }
    }

    /// Sends waiting updates.
    pub(super) fn flush(&self) {
        for running in self.lock().values_mut() {
            self.send(running);
        }
    }

    fn send(&self, running: &mut Running) {
        if running.changed.is_empty() {
            return;
        }
        let updates = std::mem::take(&mut running.changed);
        let after = running.sent;
        running.sent += updates.len() as u64;
        self.broadcast(running.cycle.clone(), LiveChange::Updated(after, updates));
    }

    /// Sends an event. Without memory for them, its updates are lost; watchers notice it by the number in the next
    /// event.
    fn broadcast(&self, cycle: Arc<LiveCycle>, change: LiveChange) {
        let bytes = change.updates().iter().map(Update::bytes).sum();
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        if self.events.receiver_count() == 0 {
            *backlog = Backlog::default();
            return;
        }
        let most = BACKLOG_BYTES.min(self.room.max() / 2);
        let room = loop {
            if backlog.bytes + bytes <= most
                && backlog.events.len() < BACKLOG
                && let Ok(room) = self.room.try_hold(bytes)
            {
                break room;
            }
            let Some(oldest) = backlog.events.pop_front() else { return };
            backlog.bytes -= oldest.bytes();
        };
        let event = Arc::new(LiveEvent { cycle, change, room: Some(Arc::new(room)) });
        // Having no receivers is not an error.
        let _ = self.events.send(Arc::downgrade(&event));
        backlog.bytes += bytes;
        backlog.events.push_back(event);
    }

    /// Subscribes to events from now on, with the current state of each running cycle. Without memory for that, all
    /// updates until now are lost to the subscriber.
    pub(super) fn join(&self) -> (Vec<Arc<LiveEvent>>, Events) {
        let mut running = self.lock();
        let stands = |running: &mut Running| {
            self.send(running);
            let room = self.room.try_hold(running.stands().map(Update::bytes).sum()).ok().map(Arc::new);
            let change = match room {
                Some(_) => LiveChange::Stands(running.sent, running.stands().cloned().collect()),
                None => LiveChange::Stands(0, Vec::new()),
            };
            Arc::new(LiveEvent { cycle: running.cycle.clone(), change, room })
        };
        (running.values_mut().map(stands).collect(), self.events.subscribe())
    }

    /// True while a cycle runs.
    pub(super) fn is_running(&self) -> bool {
        !self.lock().is_empty()
    }

    /// The running cycles, the oldest first.
    pub(super) fn running(&self) -> Vec<RunningCycle> {
        let stands = |running: &Running| {
            let ended = running.stands().filter(|update| update.state.is_some()).count();
            RunningCycle {
                cycle: running.cycle.clone(),
                total: running.total,
                ended,
                running: running.stands.len() - ended,
            }
        };
        self.lock().values().map(stands).collect()
    }
}

impl Running {
    fn stands(&self) -> impl Iterator<Item = &Update> {
        self.stands.values()
    }
}

impl Shared {
    /// Sends live progress in batches.
    pub(super) async fn send_progress(self: Arc<Self>) {
        loop {
            self.history.live().pending.notified().await;
            sleep(Live::BATCH_EVERY).await;
            self.history.live().flush();
        }
    }
}

/// Observes one running cycle. Dropping it sends all remaining updates.
pub(super) struct Progress<'a> {
    live: &'a Live,
    cycle_id: CycleId,
}

impl Progress<'_> {
    fn update(&self, position: usize, state: Option<SubsystemState>, attempts: u32, elapsed: Duration) {
        let mut running = self.live.lock();
        let Some(running) = running.get_mut(&self.cycle_id) else { return };
        let Some(name) = running.cycle.name(position).cloned() else { return };
        let update = Update { name, state, elapsed, attempts };
        if self.live.events.receiver_count() > 0 {
            if running.changed.is_empty() {
                self.live.pending.notify_one();
            }
            running.changed.push(update.clone());
            if running.changed.len() >= Live::BATCH {
                self.live.send(running);
            }
        }
        running.stands.insert(position, update);
    }
}

impl Observer for Progress<'_> {
    fn called(&self, position: usize, attempt: u32, elapsed: Duration) {
        self.update(position, None, attempt, elapsed);
    }

    fn ended(&self, position: usize, state: &SubsystemState, attempts: u32, elapsed: Duration) {
        self.update(position, Some(state.clone()), attempts, elapsed);
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        let mut running = self.live.lock();
        if let Some(mut running) = running.remove(&self.cycle_id) {
            self.live.send(&mut running);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::Member,
        model::{Code, Subsystem, SubsystemSpec, Trigger},
    };

    const MEMBERS: usize = 2 * Live::BATCH;

    fn cycle() -> Arc<LiveCycle> {
        let member = |i| {
            let spec = SubsystemSpec {
                name: format!("s{i}"),
                endpoint: "http://127.0.0.1:1".into(),
                ..SubsystemSpec::default()
            };
            Member::new(Arc::new(Subsystem::from_spec(&spec).unwrap()), false, Arc::default())
        };
        let plan = Arc::new(Plan::compile((0..MEMBERS).map(member)).unwrap());
        let (cycle_id, started_at) = (CycleId(1), Timestamp::UNIX_EPOCH);
        let request = CycleRequest::over_all(Trigger::Manual, started_at);
        Arc::new(LiveCycle::new(cycle_id, &request, started_at, plan))
    }

    /// Fails every subsystem with a long message.
    fn fail_all(live: &Progress<'_>) {
        let state = SubsystemState::Failed(Code::Internal, "x".repeat(1024));
        for position in 0..MEMBERS {
            live.ended(position, &state, 1, Duration::ZERO);
        }
    }

    #[test]
    fn memory_of_events_for_slow_watchers_is_bounded() {
        let room = Memory::whole(4 << 20);
        let live = Live::new(room.clone());
        let (_, mut slow) = live.join();
        let progress = live.start(cycle());
        for _ in 0..10 {
            fail_all(&progress);
        }
        assert!((1 << 20..=2 << 20).contains(&room.held()), "{}", room.held());
        // Its oldest event is gone, by which the slow watcher notices that it fell behind.
        assert!(slow.try_recv().unwrap().upgrade().is_none());
        // Without memory for the state of the cycle, the next event counts the lost updates.
        let taken = room.try_hold(room.max() - room.held()).unwrap();
        let (now, mut new) = live.join();
        assert!(now.len() == 1 && now[0].change.updates().is_empty() && now[0].change.known() == 0);
        drop(taken);
        fail_all(&progress);
        let event = new.try_recv().unwrap().upgrade().unwrap();
        let LiveChange::Updated(after, updates) = &event.change else { panic!("{event:?}") };
        assert_eq!((*after, updates.len()), (10 * MEMBERS as u64, Live::BATCH));
        // A held event keeps its memory.
        drop(progress);
        drop(live);
        assert_eq!(room.held(), event.bytes());
        drop(event);
        assert_eq!(room.held(), 0);
    }
}
