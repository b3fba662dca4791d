//! The use cases, behind one handle that is cheap to clone.
//!
//! What is known stands in `State`, under one lock, which nobody holds across a wait. It changes only after the change is
//! committed, and in the same order (`writing`). A cycle's way: `admission`, `line`, `conductor`, `writing`.

mod admission;
mod conductor;
mod figures;
mod history;
mod line;
mod live;
mod loops;
mod recovery;
mod refusal;
mod registration;
mod registry;
mod reload;
mod retention;
mod watch;
mod writing;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    convert::Infallible,
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use tokio::{
    select,
    sync::{Notify, mpsc, watch as newest},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    admission::{Admitted, Asked},
    figures::Watchers,
    history::Recent,
    line::Line,
    live::Live,
    registry::Registry,
    writing::ToWrite,
};
use crate::{
    clock::Clock,
    engine::{Engine, Order, Plan},
    memory::{Held, Memory},
    model::{CycleId, CycleRequest, Epoch, IntervalLoop, LoopSpec, Name, Revision, Subsystem},
    parts::{Ended, Parts},
    ports::{Record, Retention, Store, StoreError, Write},
    record::Participation,
    schedule::Loops,
};

pub use self::{
    admission::Ticket,
    figures::{Counts, Figures},
    live::{LiveCycle, LiveEvent, RunningCycle, Update},
    refusal::Refusal,
    registry::{Lease, Registered},
    watch::{Event, From, WatchFilter, Watcher},
};
pub use crate::{
    engine::{BreakerState, LastShare, Outcomes, PlannedSubsystem, Ring, Schedule},
    ports::{CallError, Durability, Filter, Page, Snapshot, StoreSize, TriggerKind, Unreadable},
    schedule::LoopEntry,
};

/// What can be set, and set anew while the process runs, except for `orchestrator_id`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Told to every subsystem in `Initialize`.
    pub orchestrator_id: Arc<str>,
    /// Of cycles whose request names none.
    pub cycle_deadline: Duration,
    /// Calls that are made at one time, by all cycles together.
    pub max_concurrent_calls: usize,
    /// How many cycles may wait.
    pub max_queued: usize,
    /// Bytes of one record.
    pub max_record_bytes: usize,
    /// Bytes of the latest outputs of all subsystems together.
    pub max_outputs_bytes: usize,
    /// How many subsystems may be registered.
    pub max_subsystems: usize,
    /// How many loops there may be.
    pub max_loops: usize,
    /// How many watchers there may be.
    pub max_watchers: usize,
    /// What is kept of the history.
    pub retention: Retention,
}

/// What registering a subsystem has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not registered before.
    Created,
    /// Its registration or the length of its lease was another one.
    Replaced,
    /// It was registered just so: at most its lease has begun anew.
    Renewed,
}

/// What the configuration file declares.
#[derive(Clone, Debug, Default)]
pub struct Declared {
    /// Subsystems, each name once.
    pub subsystems: Vec<Subsystem>,
    /// Loops, each name once.
    pub loops: Vec<IntervalLoop>,
}

/// Runs cycles over the registry, records them, and streams the record.
#[derive(Clone)]
pub struct Orchestrator(Arc<Shared>);

/// The tasks of an [`Orchestrator`].
pub struct Tasks {
    conductor: JoinHandle<Result<(), StoreError>>,
    helpers: Parts,
}

/// Why an [`Orchestrator`] has ended before its last write was done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Stopped {
    /// A later epoch has taken over the store, or the last write failed.
    #[error(transparent)]
    Store(StoreError),
    /// What runs the cycles has ended by a defect.
    #[error(transparent)]
    Conductor(Ended),
    /// A task beside it has ended by a defect: without it, loops or leases would stand still and nobody would know.
    /// Cycles still run, unless it is the writer, and [`Orchestrator::drain`] ends them.
    #[error(transparent)]
    Helper(Ended),
}

struct Shared {
    settings: Mutex<Arc<Settings>>,
    /// For registrations and loops.
    memory: Memory,
    /// For requests whose cycles wait or run.
    requests: Memory,
    clock: Clock,
    started_at: Timestamp,
    started: Instant,
    engine: Engine,
    store: Arc<dyn Store>,
    /// Room for records that are read, or wait in answers.
    history: Memory,
    /// The part of it for what watchers look for, and have read and not been given.
    watching: Memory,
    /// The part of it for `State::recent`.
    _recent: Option<Held>,
    state: Mutex<State>,
    /// Held while the registry or a loop is changed, so that one such change is made at a time. The order of what is registered
    /// changes only then.
    order: Arc<tokio::sync::Mutex<Order>>,
    /// Changes for the one writer.
    to_write: mpsc::Sender<Box<dyn ToWrite>>,
    /// Held while the plan is made anew, so that it is made once for all who ask for it.
    planning: tokio::sync::Mutex<()>,
    /// Durable changes that callers have asked for. The last write waits for them.
    changes: TaskTracker,
    queue_changed: Notify,
    loops_changed: Notify,
    leases_changed: Notify,
    newest: newest::Sender<Revision>,
    live: Live,
    watchers: Watchers,
    /// Nothing will be written any more: `State::store_error` says why.
    store_has_ended: CancellationToken,
    /// The last write is done.
    closed: CancellationToken,
}

struct State {
    registry: Registry,
    loops: Loops,
    /// Which cycles may run now.
    line: Line,
    /// All cycles that were admitted and are not recorded.
    live: BTreeMap<CycleId, Arc<Admitted>>,
    /// Those of them that have a request id.
    requests: HashMap<String, Arc<Admitted>>,
    /// Those of them that were cancelled before their turn, and are to be recorded.
    cancelled: VecDeque<Arc<Admitted>>,
    last_admitted: CycleId,
    /// The highest id that is in the store, and the highest one that is there to stay whatever happens to the machine.
    noted: CycleId,
    noted_durably: CycleId,
    /// Cycles ever recorded.
    recorded: u64,
    /// The last record, and how far the history goes.
    last: Option<Arc<Record>>,
    last_revision: Revision,
    pruned_to: Revision,
    /// The latest records without a gap, oldest first, for watchers that are nearly up to date.
    recent: VecDeque<Arc<Recent>>,
    recent_bytes: usize,
    store_error: Option<StoreError>,
    /// The records that could not be read, each of which was told of.
    unreadable: BTreeSet<(CycleId, Revision)>,
    draining: bool,
    counts: Counts,
}

impl State {
    /// How much of the history is kept at hand: enough that only those who were away read the store.
    const RECENT_RECORDS: usize = 256;
    const RECENT_BYTES: usize = 8 << 20;

    /// So many records that can't be read are told of one by one. More are not remembered, nor told of.
    const MAX_UNREADABLE: usize = 10_000;

    /// Nothing is left to be run or recorded, but for what runs.
    fn is_drained(&self) -> bool {
        self.draining && self.cancelled.is_empty()
    }

    /// Has loops go on from where the clock was set back to.
    fn follow_clock(&mut self, now: Timestamp) {
        for name in self.loops.follow_clock(now) {
            tracing::warn!("loop" = %name, "the clock was set back: its ticks go on from there");
        }
    }

    /// Tells of a record that can't be read, once.
    fn tell_unreadable(&mut self, unreadable: &Unreadable) {
        let Unreadable { cycle_id, revision, problem } = unreadable;
        let is_full = self.unreadable.len() == Self::MAX_UNREADABLE;
        if !is_full && self.unreadable.insert((*cycle_id, *revision)) {
            self.counts.unreadable_records += 1;
            tracing::error!(
                cycle_id = cycle_id.0,
                revision = revision.0,
                problem,
                "the record of a cycle can't be read, and is passed over"
            );
        }
    }

    /// `ran_for` is missing where this process did not run the cycle.
    fn publish(&mut self, record: Arc<Record>, ran_for: Option<Duration>) {
        self.counts.recorded(&record, ran_for);
        self.recorded += 1;
        self.last_revision = record.revision;
        self.last = Some(record.clone());
        self.recent_bytes += record.bytes.len();
        self.recent.push_back(Recent::new(record));
        while self.recent.len() > Self::RECENT_RECORDS
            || (self.recent_bytes > Self::RECENT_BYTES && self.recent.len() > 1)
        {
            if let Some(oldest) = self.recent.pop_front() {
                self.recent_bytes -= oldest.record.bytes.len();
            }
        }
    }
}

/// What the orchestrator is doing and has done last.
pub struct Status {
    /// The record of the last cycle.
    pub last: Option<Arc<Record>>,
    /// Cycles ever recorded.
    pub total_cycles: u64,
    /// The cycles that run, the oldest first.
    pub running: Vec<RunningCycle>,
    /// Cycles that wait.
    pub queued: usize,
    /// The loops, by name.
    pub loops: Vec<LoopEntry>,
    /// The term of this process.
    pub epoch: Epoch,
    /// When this process started.
    pub started_at: Timestamp,
    /// Time since then.
    pub uptime: Duration,
    /// The configured id.
    pub orchestrator_id: Arc<str>,
    /// How many are registered.
    pub subsystem_count: usize,
    /// The oldest revision that can still be watched.
    pub oldest_revision: Revision,
    /// The newest revision.
    pub newest_revision: Revision,
    /// Why nothing can be written.
    pub store_error: Option<StoreError>,
    /// Watchers connected.
    pub watchers: usize,
}

impl Orchestrator {
    // -----------------------------------------------------------------------------------------------------------
    // Cycles

    /// Admits a cycle, or finds the one that an earlier call with the same request id started. With `durably` it is
    /// known to the store before this returns, and recorded whatever happens then.
    ///
    /// # Errors
    /// An unknown subsystem, or what the overlap policy says.
    pub async fn run_cycle(&self, request: CycleRequest, durably: bool) -> Result<Ticket, Refusal> {
        // The last write waits for it.
        let _change = durably.then(|| self.0.changes.token());
        let admitted = match self.0.admit_once(request, durably).await {
            Ok(Asked::Recorded(record)) => return Ok(Ticket::of_record(record)),
            Ok(Asked::Live(admitted)) => admitted,
            Err(refusal) => {
                self.0.note_named_by(&refusal).await?;
                return Err(refusal);
            }
        };
        if durably && self.0.state().noted_durably < admitted.cycle_id {
            // A durable write, whatever is in it, notes all that is admitted.
            let written = self.0.write(|_| Write::default(), |_| ()).await;
            written.map_err(|error| self.0.state().unavailable(admitted.cycle_id, error))?;
        }
        Ok(admitted.ticket())
    }

    /// Cancels a cycle that runs or waits, and waits for its record.
    ///
    /// # Errors
    /// It has finished, or never was.
    pub async fn cancel_cycle(&self, cycle_id: CycleId) -> Result<Arc<Record>, Refusal> {
        let ticket = {
            let mut state = self.0.state();
            match state.cancel(cycle_id) {
                Some(admitted) => admitted.ticket(),
                None if cycle_id.0 > 0 && cycle_id <= state.last_admitted => {
                    return Err(Refusal::CycleFinished(cycle_id));
                }
                None => return Err(Refusal::CycleNotFound(cycle_id)),
            }
        };
        self.0.queue_changed.notify_one();
        ticket.recorded().await
    }

    /// What a cycle would do now.
    ///
    /// # Errors
    /// None; names that are not registered are in the answer.
    pub async fn plan_cycle(&self, subset: Option<Arc<[Name]>>) -> Schedule {
        let plan = self.0.plan().await;
        let size = plan.members().len();
        aside(size, move || plan.schedule(subset.as_deref())).await
    }

    /// The same names, as the registry has them.
    ///
    /// # Errors
    /// One is not registered.
    pub async fn registered_names(&self, subset: Option<Arc<[Name]>>) -> Result<Option<Arc<[Name]>>, Refusal> {
        self.0.registered_names(subset).await
    }

    /// The bytes of a record that is at hand, as an answer that may wait for its client.
    ///
    /// # Errors
    /// Too many answers wait.
    pub async fn keep(&self, record: &Record) -> Result<Bytes, Refusal> {
        self.0.keep(record).await
    }

    /// The record of a cycle.
    ///
    /// # Errors
    /// There is none, or not yet; or too much is being read.
    pub async fn cycle(&self, cycle_id: CycleId) -> Result<Arc<Record>, Refusal> {
        if self.0.state().live.contains_key(&cycle_id) {
            return Err(Refusal::CycleNotFinished(cycle_id));
        }
        let record = self.0.read_one(self.0.store.cycle(cycle_id)).await?;
        record.map(Arc::new).ok_or(Refusal::CycleNotFound(cycle_id))
    }

    /// A page of records before the revision `before`, newest first, of at most `max_records`.
    ///
    /// # Errors
    /// The store can't be read, or too much is being read.
    pub async fn cycles(
        &self,
        before: Option<Revision>,
        filter: Filter,
        participation: Participation,
        max_records: usize,
    ) -> Result<Page, Refusal> {
        self.0.page(before, filter, participation, max_records).await
    }

    /// What is being done and was done last.
    pub fn status(&self) -> Status {
        let running = self.0.live.running();
        let state = self.0.state();
        Status {
            last: state.last.clone(),
            total_cycles: state.recorded,
            running,
            queued: state.line.waiting(),
            loops: state.loops.iter().cloned().collect(),
            epoch: self.0.engine.epoch,
            started_at: self.0.started_at,
            uptime: self.0.started.elapsed(),
            orchestrator_id: self.0.engine.orchestrator_id.clone(),
            subsystem_count: state.registry.len(),
            oldest_revision: state.pruned_to.next(),
            newest_revision: state.last_revision,
            store_error: state.store_error.clone(),
            watchers: self.0.watchers.len(),
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Registry

    /// Registers a subsystem, or replaces its registration. Returns it, and what that has changed.
    ///
    /// # Errors
    /// The order would have a ring, the file declares the name, the registry is full, or the store can't be written.
    pub async fn register(
        &self,
        subsystem: Subsystem,
        lease: Option<Duration>,
    ) -> Result<(Registered, Change), Refusal> {
        let mut registered = self.register_all(vec![subsystem], lease).await?;
        // One for each.
        Ok(registered.remove(0))
    }

    /// Registers all of these subsystems, each name once, or none: in one commit. Otherwise as [`Orchestrator::register`],
    /// for each, in their order.
    ///
    /// # Errors
    /// One can't be registered.
    pub async fn register_all(
        &self,
        subsystems: Vec<Subsystem>,
        lease: Option<Duration>,
    ) -> Result<Vec<(Registered, Change)>, Refusal> {
        self.change(move |shared| async move { shared.register(subsystems, lease).await }).await
    }

    /// Removes a subsystem and its latest output.
    ///
    /// # Errors
    /// It is not registered, the file declares it, or the store can't be written.
    pub async fn unregister(&self, name: &Name) -> Result<(), Refusal> {
        let name = name.clone();
        self.change(|shared| async move { shared.unregister(&name).await }).await
    }

    /// Takes a subsystem out of cycles, or puts it back and closes its breaker.
    ///
    /// # Errors
    /// It is not registered, or the store can't be written.
    pub async fn suspend(&self, name: &Name, suspended: bool) -> Result<Registered, Refusal> {
        let name = name.clone();
        self.change(|shared| async move { shared.suspend(&name, suspended).await }).await
    }

    /// Renews a lease. Returns when it ends now.
    ///
    /// # Errors
    /// It is not registered, or has no lease.
    pub fn renew_lease(&self, name: &Name) -> Result<Timestamp, Refusal> {
        let lease = self.0.state().registry.renew(name)?;
        Ok(self.lease_ends_at(&lease))
    }

    /// When a lease ends, on the wall clock.
    pub fn lease_ends_at(&self, lease: &Lease) -> Timestamp {
        let left = lease.expires.saturating_duration_since(Instant::now());
        self.0.clock.now().saturating_add(left).unwrap_or(Timestamp::MAX)
    }

    /// A subsystem.
    ///
    /// # Errors
    /// It is not registered.
    pub fn subsystem(&self, name: &Name) -> Result<Registered, Refusal> {
        self.0.state().registry.get(name).cloned()
    }

    /// Up to `max` subsystems after this name, by name.
    pub fn subsystems(&self, after: Option<&str>, max: usize) -> Vec<Arc<Registered>> {
        self.0.state().registry.after(after).take(max).cloned().collect()
    }

    /// Asks subsystems for their own snapshots, some at a time, each for at most five seconds. Answers in order.
    pub async fn snapshots(&self, of: &[Arc<Registered>]) -> Vec<Result<Snapshot, CallError>> {
        const AT_ONCE: usize = 64;
        const PATIENCE: Duration = Duration::from_secs(5);
        let subsystems = &self.0.engine.subsystems;
        let ask = |registered: &Arc<Registered>| {
            let subsystem = registered.member.subsystem.clone();
            async move {
                let asked = timeout(PATIENCE, subsystems.get_status(&subsystem, PATIENCE)).await;
                asked.unwrap_or_else(|_| {
                    Err(CallError {
                        code: crate::model::Code::DeadlineExceeded,
                        message: format!("no answer within {PATIENCE:?}"),
                    })
                })
            }
        };
        stream::iter(of.iter().map(ask).collect::<Vec<_>>()).buffered(AT_ONCE).collect().await
    }

    // -----------------------------------------------------------------------------------------------------------
    // Loops

    /// Starts a loop, or gives a running one new settings.
    ///
    /// # Errors
    /// A field is malformed, the file declares the name with other settings, or the store can't be written.
    pub async fn start_loop(&self, spec: LoopSpec) -> Result<LoopEntry, Refusal> {
        self.change(|shared| async move { shared.start_loop(&spec).await }).await
    }

    /// Stops a loop. One that the file declares stays listed; others are forgotten.
    ///
    /// # Errors
    /// There is none of that name, or the store can't be written.
    pub async fn stop_loop(&self, name: &Name) -> Result<LoopEntry, Refusal> {
        let name = name.clone();
        self.change(|shared| async move { shared.stop_loop(&name).await }).await
    }

    /// The loops, by name.
    pub fn loops(&self) -> Vec<LoopEntry> {
        self.0.state().loops.iter().cloned().collect()
    }

    // -----------------------------------------------------------------------------------------------------------
    // Stream

    /// Follows the record.
    ///
    /// # Errors
    /// Too many watch already, or the records wanted are not all there.
    pub fn watch(&self, from: From, filter: WatchFilter, progress: bool) -> Result<Watcher, Refusal> {
        Watcher::new(self.0.clone(), from, filter, progress)
    }

    // -----------------------------------------------------------------------------------------------------------
    // Life

    /// Makes a durable change to its end, also when whoever asks for it goes away: what is dropped half-way would be
    /// committed, and not be in memory.
    async fn change<T, F>(&self, change: impl FnOnce(Arc<Shared>) -> F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
    {
        if self.0.state().draining {
            return Err(Refusal::Draining);
        }
        match self.0.changes.spawn(change(self.0.clone())).await {
            Ok(changed) => changed,
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                Err(_runtime_is_shut_down) => Err(Refusal::Draining),
            },
        }
    }

    /// Puts other settings and declarations in the place of the present ones.
    ///
    /// # Errors
    /// The order would have a ring, or the store can't be written; then nothing has changed.
    pub async fn reload(&self, settings: Settings, declared: Declared) -> Result<(), Refusal> {
        self.change(|shared| async move { shared.reload(settings, declared).await }).await
    }

    /// Admits nothing any more, and cancels what waits, but for cycles that were acknowledged and are waited for by nobody: the
    /// next process runs these. Cycles that run may finish; then [`Tasks::finished`] returns.
    pub fn drain(&self) {
        let mut state = self.0.state();
        state.draining = true;
        let waiting = state.live.values().filter(|it| state.line.waits(it.cycle_id) && !it.is_promised());
        for cycle_id in waiting.map(|it| it.cycle_id).collect::<Vec<_>>() {
            state.cancel(cycle_id);
        }
        drop(state);
        self.0.queue_changed.notify_one();
    }

    /// Cancels the cycles that run.
    pub fn cancel_running(&self) {
        let state = self.0.state();
        for running in state.live.values().filter(|it| state.line.runs(it.cycle_id)) {
            running.cancel.cancel();
        }
    }
}

impl Tasks {
    /// Waits until the last write is done, after [`Orchestrator::drain`], or until this process may no longer write, or
    /// a task has ended by a defect. May be called again after [`Stopped::Helper`] only.
    ///
    /// # Errors
    /// Why it has ended before the last write.
    pub async fn finished(&mut self) -> Result<(), Stopped> {
        let finished = select! {
            finished = &mut self.conductor => match finished {
                Ok(finished) => finished.map_err(Stopped::Store),
                Err(panicked) => Err(Stopped::Conductor(Ended::of("the conductor of cycles", panicked))),
            },
            ended = self.helpers.next_ended() => return Err(Stopped::Helper(ended)),
        };
        // They hold nothing that would have to be written.
        self.helpers.abort();
        finished
    }
}

/// A task that runs for ever, as a part: its end says nothing.
async fn lasting(task: impl Future<Output = ()>) -> Result<(), Infallible> {
    task.await;
    Ok(())
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while this is held is a defect that must not turn into a second one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> Arc<Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The order over all that is registered now. After changes it is made anew, once for all of them and apart from
    /// those who change more.
    async fn plan(&self) -> Arc<Plan> {
        if let Ok(plan) = self.state().registry.plan() {
            return plan;
        }
        let _planning = self.planning.lock().await;
        let snapshot = match self.state().registry.plan() {
            Ok(plan) => return plan,
            Err(snapshot) => snapshot,
        };
        let (snapshot, plan) = aside(snapshot.entries.len(), move || {
            let plan = snapshot.plan();
            (snapshot, plan)
        })
        .await;
        self.state().registry.planned(&snapshot, plan)
    }

    /// Takes ticks, leases, progress and retention in hand, each as a task that sleeps until there is something to do.
    fn start_helpers(self: &Arc<Self>) -> Parts {
        let mut helpers = Parts::default();
        helpers.start("the timer of loops", lasting(self.clone().fire_ticks()));
        helpers.start("the timer of leases", lasting(self.clone().expire_leases()));
        helpers.start("the retention of the history", lasting(self.clone().prune()));
        helpers.start("the live progress", lasting(self.clone().send_progress()));
        helpers
    }

    /// Tells of a record that can't be read, if that is why.
    fn tell_if_unreadable<T>(&self, found: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Unreadable(unreadable)) = &found {
            self.state().tell_unreadable(unreadable);
        }
        found
    }
}

/// Does what takes the longer the larger the registry is: where that may take longer than a millisecond, on a thread that
/// no other task waits for.
async fn aside<T: Send + 'static>(size: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    const SHORT: usize = 256;
    if size <= SHORT {
        return work();
    }
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The runtime is shut down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}
