//! The live progress of the running cycles: for those who watch it, and for the status.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::{Notify, broadcast},
    time::sleep,
};

use super::Shared;
use crate::{
    engine::{Observer, Plan},
    memory::{Held, Memory},
    model::{CycleId, CycleRequest, Name, Revision, SubsystemState, Trigger},
};

/// Batches that a watcher may fall behind before it loses some: at one batch each [`Live::BATCH_EVERY`] more than
/// ten seconds of 16 cycles.
const BACKLOG: usize = 4096;

/// Bytes of the batches that are kept for watchers which have fallen behind. A batch can take 512 KiB, and most take a
/// hundredth of that.
const BACKLOG_BYTES: usize = 4 << 20;

/// What is known of the running cycles, and the channel that tells of them.
pub(super) struct Live {
    running: Mutex<BTreeMap<CycleId, Running>>,
    events: broadcast::Sender<Weak<LiveEvent>>,
    /// What watchers can still be given. A watcher that comes too late starts over with how the cycles stand.
    backlog: Mutex<Backlog>,
    /// For the updates in events, as long as anybody keeps them.
    room: Memory,
    /// Updates wait to be sent.
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
    /// Subsystems in it.
    total: usize,
    /// How each subsystem stands, by its position in the plan; one that is missing waits.
    stands: BTreeMap<usize, Update>,
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
    pub request: Arc<CycleRequest>,
    /// When it started.
    pub started_at: Timestamp,
    /// The order of those that are in it.
    pub plan: Arc<Plan>,
    /// Where its record is; none before it is recorded.
    pub(super) revision: Arc<OnceLock<Revision>>,
}

impl LiveCycle {
    pub(super) fn new(cycle_id: CycleId, request: Arc<CycleRequest>, started_at: Timestamp, plan: Arc<Plan>) -> Self {
        Self { cycle_id, request, started_at, plan, revision: Arc::default() }
    }

    /// The registered subsystems in it, in the order of the plan.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &Name> {
        self.plan.members().map(|member| &member.subsystem.name)
    }

    /// Whether one of these takes part.
    pub fn has_any(&self, names: &BTreeSet<Name>) -> bool {
        names.iter().any(|name| self.plan.has(name))
    }

    /// What started it.
    pub fn trigger(&self) -> &Trigger {
        &self.request.trigger
    }

    /// Its record has this revision. Called before anybody can read that.
    pub(super) fn recorded_as(&self, revision: Revision) {
        // It is recorded once.
        let _ = self.revision.set(revision);
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

/// Something that happened in a running cycle.
#[derive(Clone, Debug)]
pub struct LiveEvent {
    /// The cycle.
    pub cycle: Arc<LiveCycle>,
    /// What happened.
    pub change: LiveChange,
    /// For the updates.
    pub(super) room: Option<Arc<Held>>,
}

/// What happened in a running cycle, or is told of it. Its updates are counted, from its start on.
#[derive(Clone, Debug)]
pub enum LiveChange {
    /// It has started.
    Started,
    /// A watcher has come to it after this number of updates: how its parts stand, but for those that wait. None of them where
    /// there is no room for that: then the number is 0.
    Stands(u64, Vec<Update>),
    /// After this number of updates, these came.
    Updated(u64, Vec<Update>),
}

impl LiveChange {
    /// How parts stand.
    pub fn updates(&self) -> &[Update] {
        match self {
            Self::Started => &[],
            Self::Stands(_, updates) | Self::Updated(_, updates) => updates,
        }
    }

    /// The number of updates that are known with this.
    pub(super) fn known(&self) -> u64 {
        match self {
            Self::Started => 0,
            Self::Stands(after, _) => *after,
            Self::Updated(after, updates) => after + updates.len() as u64,
        }
    }

    /// How many updates are missing for one who knew of this number.
    pub(super) fn lost(&self, known: u64) -> u64 {
        match self {
            // How it stands says all that was lost.
            Self::Started | Self::Stands(..) => 0,
            Self::Updated(after, _) => after.saturating_sub(known),
        }
    }

    /// Leaves the first updates, and returns the rest.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        match self {
            Self::Started => Self::Started,
            Self::Stands(after, updates) => Self::Stands(*after, updates.split_off(at)),
            Self::Updated(after, updates) => Self::Updated(*after + at as u64, updates.split_off(at)),
        }
    }
}

impl LiveEvent {
    fn bytes(&self) -> usize {
        self.room.as_ref().map_or(0, |room| room.bytes())
    }
}

/// How far a running cycle is.
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
pub(super) type Events = broadcast::Receiver<Weak<LiveEvent>>;

impl Live {
    /// How long updates are gathered before they are sent together: too short for an eye to see, and long enough
    /// that a large cycle does not become a flood of small messages.
    pub(super) const BATCH_EVERY: Duration = Duration::from_millis(40);
    /// The most updates of one event, so that with error messages of 1 KiB it is well below what clients take. After so
    /// many a batch is sent at once.
    pub(super) const BATCH: usize = 512;

    /// With room for what watchers are told.
    pub(super) fn new(room: Memory) -> Self {
        Self {
            running: Mutex::default(),
            events: broadcast::Sender::new(BACKLOG),
            backlog: Mutex::default(),
            room,
            pending: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<CycleId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A cycle starts. It runs until what is returned is dropped.
    pub(super) fn start(&self, cycle: Arc<LiveCycle>) -> Progress<'_> {
        let cycle_id = cycle.cycle_id;
        let total = cycle.names().len();
        let mut running = self.lock();
        self.tell(cycle.clone(), LiveChange::Started);
        running.insert(cycle_id, Running { cycle, total, stands: BTreeMap::new(), changed: Vec::new(), sent: 0 });
        Progress { live: self, cycle_id }
    }

    /// Sends what waits to be sent.
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
        self.tell(running.cycle.clone(), LiveChange::Updated(after, updates));
    }

    /// Sends an event. Updates for which there is no room are lost, which watchers see by the number of the next ones.
    fn tell(&self, cycle: Arc<LiveCycle>, change: LiveChange) {
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
        // Nobody listening is no error.
        let _ = self.events.send(Arc::downgrade(&event));
        backlog.bytes += bytes;
        backlog.events.push_back(event);
    }

    /// Everything from now on, and how each running cycle stands. Where there is no room for that, all updates until now are lost
    /// to who joins.
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

    /// Those that run, the oldest first.
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
            self.live.pending.notified().await;
            sleep(Live::BATCH_EVERY).await;
            self.live.flush();
        }
    }
}

/// Follows one running cycle. Once it is dropped all is sent that has happened in it.
pub(super) struct Progress<'a> {
    live: &'a Live,
    cycle_id: CycleId,
}

impl Progress<'_> {
    fn update(&self, position: usize, state: Option<SubsystemState>, attempts: u32, elapsed: Duration) {
        let mut running = self.live.lock();
        let Some(running) = running.get_mut(&self.cycle_id) else { return };
        let Some(member) = running.cycle.plan.member(position) else { return };
        let update = Update { name: member.subsystem.name.clone(), state, elapsed, attempts };
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
        model::{Code, OverlapPolicy, Payload, Subsystem, SubsystemSpec},
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
        let request = Arc::new(CycleRequest {
            trigger: Trigger::Manual,
            scheduled_at: started_at,
            subset: None,
            parameters: Payload::default(),
            request_id: None,
            overlap: OverlapPolicy::Skip,
            deadline: None,
            record_outputs: false,
            trace: None,
        });
        Arc::new(LiveCycle::new(cycle_id, request, started_at, plan))
    }

    /// Every subsystem fails at length.
    fn fail_all(live: &Progress<'_>) {
        let state = SubsystemState::Failed(Code::Internal, "x".repeat(1024));
        for position in 0..MEMBERS {
            live.ended(position, &state, 1, Duration::ZERO);
        }
    }

    #[test]
    fn what_slow_watchers_have_not_taken_has_bounded_room() {
        let room = Memory::whole(4 << 20);
        let live = Live::new(room.clone());
        let (_, mut slow) = live.join();
        let progress = live.start(cycle());
        for _ in 0..10 {
            fail_all(&progress);
        }
        assert!((1 << 20..=2 << 20).contains(&room.held()), "{}", room.held());
        // It sees that it came too late, and starts over.
        assert!(slow.try_recv().unwrap().upgrade().is_none());
        // Without room for how the cycle stands, it is told so by what it is given next.
        let taken = room.try_hold(room.max() - room.held()).unwrap();
        let (now, mut new) = live.join();
        assert!(now.len() == 1 && now[0].change.updates().is_empty() && now[0].change.known() == 0);
        drop(taken);
        fail_all(&progress);
        let event = new.try_recv().unwrap().upgrade().unwrap();
        let LiveChange::Updated(after, updates) = &event.change else { panic!("{event:?}") };
        assert_eq!((*after, updates.len()), (10 * MEMBERS as u64, Live::BATCH));
        // Who has an event keeps its room.
        drop(progress);
        drop(live);
        assert_eq!(room.held(), event.bytes());
        drop(event);
        assert_eq!(room.held(), 0);
    }
}
