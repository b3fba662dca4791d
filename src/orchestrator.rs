//! The use cases, behind one handle that is cheap to clone.
//!
//! All durable changes are built and committed one after another under one lock (`Shared::write`), and change what
//! is in memory only once they are committed; so memory and store see them in one order, and nothing is shown that a
//! crash could take back.

mod conductor;
mod figures;
mod history;
mod live;
mod refusal;
mod registry;
mod retention;
mod watch;

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
    sync::{Notify, watch as newest},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    conductor::Admitted,
    figures::Watchers,
    history::Recent,
    live::Live,
    registry::{Declarations, Entries, Registry},
};
use crate::{
    clock::Clock,
    engine::{Engine, InputRoom, Member, Order, Plan, Slots, Standing},
    memory::{Held, Memory, Shares},
    model::{
        CycleId, CycleRequest, Epoch, IntervalLoop, LoopSpec, Name, Revision, Subsystem, TickDisposition, Trigger,
        Violations,
    },
    parts::{Ended, Parts},
    ports::{
        Contents, Lost, OpenCycle, Record, Retention, Spans, Store, StoreError, StoredOutput, StoredSubsystem,
        Subsystems, UnreadableRow, Write,
    },
    record::{self, Participation},
    schedule::Loops,
};

pub use self::{
    conductor::Ticket,
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
    /// A task beside it has ended by a defect: without it, loops or leases would stand still and nobody would know. Cycles
    /// still run, and [`Orchestrator::drain`] ends them.
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
    /// Held while a durable change is built and committed. The order of what is registered changes only then.
    writing: Arc<tokio::sync::Mutex<Order>>,
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
    /// Admitted cycles that wait, and the one that runs.
    queue: VecDeque<Arc<Admitted>>,
    running: Option<Arc<Admitted>>,
    /// Those of them that have a request id.
    requests: HashMap<String, Arc<Admitted>>,
    last_admitted: CycleId,
    /// The highest id that is noted in the store.
    last_noted: CycleId,
    /// The last record, and how far the history goes.
    last: Option<Arc<Record>>,
    last_cycle_id: CycleId,
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
        self.last_cycle_id = self.last_cycle_id.max(record.cycle_id);
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
    /// The cycle that runs.
    pub running: Option<RunningCycle>,
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
    /// Takes up what an earlier process left in the store, and begins to run cycles. The store comes with what it held
    /// when it was opened.
    ///
    /// # Errors
    /// The order of what is declared and stored has a ring, there is no memory for it, or the store can't be written.
    pub async fn start(
        settings: Settings,
        memory: &Shares,
        clock: Clock,
        subsystems: Arc<dyn Subsystems>,
        (store, contents): (Arc<dyn Store>, Contents),
        declared: Declared,
        spans: Arc<dyn Spans>,
    ) -> Result<(Self, Tasks), Refusal> {
        let (now, begin) = (clock.now(), Instant::now());
        memory.outputs.set_max(settings.max_outputs_bytes);
        let hold = |bytes| memory.registry.try_hold(bytes).map_err(Refusal::RegistryMemoryFull);
        let mut state = State {
            registry: Registry::default(),
            loops: Loops::default(),
            queue: VecDeque::new(),
            running: None,
            requests: HashMap::new(),
            last_admitted: contents.last_cycle_id,
            last_noted: contents.last_cycle_id,
            last: None,
            last_cycle_id: contents.last_cycle_id,
            last_revision: contents.last_revision,
            pruned_to: contents.pruned_to,
            recent: VecDeque::new(),
            recent_bytes: 0,
            store_error: None,
            unreadable: BTreeSet::new(),
            draining: false,
            counts: Counts::default(),
        };
        match contents.last_record {
            Some(Ok(record)) => state.last = Some(Arc::new(record)),
            Some(Err(unreadable)) => state.tell_unreadable(&unreadable),
            None => {}
        }
        tell_unreadable_rows(&contents.unreadable);
        let mut write = Write { epoch: contents.epoch, ..Write::default() };

        // The registry: what is declared wins over what was registered by RPC under the same name.
        let mut latest: HashMap<Name, _> =
            contents.outputs.into_iter().map(|stored| (stored.name.clone(), stored)).collect();
        let mut stored: BTreeMap<Name, StoredSubsystem> =
            contents.subsystems.into_iter().map(|stored| (stored.name.clone(), stored)).collect();
        let mut entries = Vec::new();
        let mut standing = |name: &Name| {
            let standing = |stored: StoredOutput| {
                Arc::new(Standing::with_output(stored.output, stored.finished_at, &memory.outputs))
            };
            latest.remove(name).map_or_else(Arc::default, standing)
        };
        for subsystem in declared.subsystems {
            let name = subsystem.name.clone();
            let suspended = stored.remove(&name).is_some_and(|stored| {
                if stored.spec.is_some() {
                    let kept = StoredSubsystem { spec: None, lease: None, ..stored.clone() };
                    write.subsystems.insert(name.clone(), Some(kept));
                }
                stored.suspended
            });
            let held = hold(subsystem.footprint())?;
            let member = Member::new(Arc::new(subsystem), suspended, standing(&name)).holding(held);
            entries.push(Registered { member, declared: true, lease: None });
        }
        for (name, stored) in stored {
            let Some(spec) = &stored.spec else {
                // It was declared once, and is no more.
                write.subsystems.insert(name, None);
                continue;
            };
            let standing = standing(&name);
            match Subsystem::from_spec(spec) {
                Ok(subsystem) => {
                    let held = hold(subsystem.footprint())?;
                    let member = Member::new(Arc::new(subsystem), stored.suspended, standing).holding(held);
                    let lease = stored.lease.map(|length| Lease::new(length, begin));
                    entries.push(Registered { member, declared: false, lease });
                }
                // Rules have become stricter since. It stays stored, output and all, for a version that takes it.
                Err(violations) => {
                    tracing::error!(subsystem = %name, %violations, "left out: a stored registration is invalid");
                }
            }
        }
        // What can't be read stays stored, with its output.
        for row in contents.unreadable.iter().filter(|row| row.what == "subsystem") {
            latest.remove(row.key.as_str());
        }
        // Outputs whose subsystem nobody registers any more.
        write.subsystems.extend(latest.into_keys().map(|name| (name, None)));
        let order = Order::of(entries.iter().map(|entry| entry.member.subsystem.clone()));
        state.registry = Registry::of(entries)?;

        // The loops.
        let mut stored: BTreeMap<Name, _> =
            contents.loops.into_iter().map(|stored| (stored.name.clone(), stored)).collect();
        for settings in declared.loops {
            let held = hold(settings.footprint())?;
            if let Some(stored) = stored.remove(&settings.name) {
                state.loops.restore(settings, true, stored.state, Some(held), now);
            } else {
                let entry = state.loops.started(settings, true, now);
                state.loops.put(entry.holding(held));
            }
        }
        for (name, stored) in stored {
            match stored.spec.as_ref().map(IntervalLoop::from_spec) {
                Some(Ok(settings)) => {
                    let held = hold(settings.footprint())?;
                    state.loops.restore(settings, false, stored.state, Some(held), now);
                }
                Some(Err(violations)) => {
                    tracing::error!("loop" = %name, %violations, "left out: a stored loop is invalid");
                }
                None => {
                    write.loops.insert(name, None);
                }
            }
        }

        // Cycles that an earlier process had begun.
        let last_lost = contents.lost.map(|lost| lost.last_cycle_id).unwrap_or_default();
        if let Some(lost) = &contents.lost {
            tell_lost(lost, contents.open.first(), &state);
        }
        // A cycle begins only once the one before it is recorded: where one is open, the number of none is missing.
        let may_be_lost = contents.may_lack_open && contents.open.is_empty();
        let may_be_lost = if may_be_lost { state.last_cycle_id.next() } else { CycleId::default() };
        let missing = contents.last_cycle_id.0 + 1..=may_be_lost.max(last_lost).0;
        let open = contents.open.iter().map(|open| (open.cycle_id, Some(open)));
        for (cycle_id, open) in open.chain(missing.map(|id| (CycleId(id), None))) {
            let revision = state.last_revision.next();
            let is_lost = contents.lost.is_some_and(|lost| revision <= lost.last_revision);
            let finished = conductor::interrupted(cycle_id, open, is_lost, contents.epoch, now);
            let record = record::encode(&finished, revision, settings.max_record_bytes);
            if !is_lost {
                tracing::warn!(
                    cycle_id = cycle_id.0,
                    "recorded as interrupted: an earlier process ended in the middle of it"
                );
            }
            write.records.push(record.clone());
            state.publish(Arc::new(record), None);
        }
        (state.last_admitted, state.last_noted) = (state.last_cycle_id, state.last_cycle_id);
        write.last_cycle_id = state.last_noted;
        let (loops, mark) = state.loops.unwritten();
        for (name, stored) in loops {
            write.loops.entry(name).or_insert(stored);
        }
        store.commit(Arc::new(write)).await?;
        state.loops.written(mark);

        let watching = memory.history.part("what watchers look for and read ahead", memory.history.max() / 4);
        let shared = Arc::new(Shared {
            engine: Engine {
                subsystems,
                orchestrator_id: settings.orchestrator_id.clone(),
                epoch: contents.epoch,
                outputs: memory.outputs.clone(),
                remembered: memory.registry.clone(),
                slots: Slots::new(settings.max_concurrent_calls),
                inputs: InputRoom::new(memory.inputs.clone()),
                spans,
            },
            newest: newest::Sender::new(state.last_revision),
            live: Live::new(watching.clone()),
            watching,
            // With what is known of them, if it is asked for.
            _recent: memory.history.try_hold(3 * State::RECENT_BYTES).ok(),
            history: memory.history.clone(),
            settings: Mutex::new(Arc::new(settings)),
            memory: memory.registry.clone(),
            requests: memory.requests.clone(),
            clock,
            started_at: now,
            started: Instant::now(),
            store,
            state: Mutex::new(state),
            writing: Arc::new(tokio::sync::Mutex::new(order)),
            planning: tokio::sync::Mutex::new(()),
            changes: TaskTracker::new(),
            queue_changed: Notify::new(),
            loops_changed: Notify::new(),
            leases_changed: Notify::new(),
            watchers: Watchers::default(),
            store_has_ended: CancellationToken::new(),
            closed: CancellationToken::new(),
        });
        let mut helpers = Parts::default();
        helpers.start("the timer of loops", lasting(shared.clone().fire_ticks()));
        helpers.start("the timer of leases", lasting(shared.clone().expire_leases()));
        helpers.start("the retention of the history", lasting(shared.clone().prune()));
        helpers.start("the live progress", lasting(shared.clone().send_progress()));
        let conductor = tokio::spawn(shared.clone().conduct());
        Ok((Self(shared), Tasks { conductor, helpers }))
    }

    // -----------------------------------------------------------------------------------------------------------
    // Cycles

    /// Admits a cycle, or finds the one that an earlier call with the same request id started. With `durably` it is
    /// known to the store before this returns, and recorded whatever happens then.
    ///
    /// # Errors
    /// An unknown subsystem, or what the overlap policy says.
    pub async fn run_cycle(&self, request: CycleRequest, durably: bool) -> Result<Ticket, Refusal> {
        let admitted = match self.0.admit_once(request).await? {
            Found::Recorded(record) => return Ok(Ticket::of_record(Arc::new(record))),
            Found::Admitted(admitted) => admitted,
        };
        if durably {
            // Each write notes it.
            let written = self.0.write(|_| Write::default(), |_| ()).await;
            written.map_err(|error| Refusal::StoreUnavailable(Some(admitted.cycle_id), error))?;
        }
        Ok(admitted.ticket())
    }

    /// Cancels a cycle that runs or waits, and waits for its record.
    ///
    /// # Errors
    /// It has finished, or never was.
    pub async fn cancel_cycle(&self, cycle_id: CycleId) -> Result<Arc<Record>, Refusal> {
        let ticket = {
            let state = self.0.state();
            let admitted = state.queue.iter().chain(&state.running).find(|admitted| admitted.cycle_id == cycle_id);
            match admitted {
                Some(admitted) => {
                    admitted.cancel.cancel();
                    admitted.ticket()
                }
                None if cycle_id.0 > 0 && cycle_id <= state.last_cycle_id => {
                    return Err(Refusal::CycleFinished(cycle_id));
                }
                None => return Err(Refusal::CycleNotFound(cycle_id)),
            }
        };
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
        {
            let state = self.0.state();
            if cycle_id > state.last_cycle_id && cycle_id <= state.last_admitted {
                return Err(Refusal::CycleNotFinished(cycle_id));
            }
        }
        let record = self.0.read_one(self.0.store.cycle(cycle_id)).await?;
        record.map(Arc::new).ok_or(Refusal::CycleNotFound(cycle_id))
    }

    /// A page of records below the revision `before`, newest first, of at most `max_records`.
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
            total_cycles: state.last_cycle_id.0,
            running,
            queued: state.queue.len(),
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

    /// Admits nothing any more, and cancels what waits. The running cycle may finish; then [`Tasks::finished`]
    /// returns.
    pub fn drain(&self) {
        let mut state = self.0.state();
        state.draining = true;
        for waiting in &state.queue {
            waiting.cancel.cancel();
        }
        drop(state);
        self.0.queue_changed.notify_one();
    }

    /// Cancels the running cycle, if there is one.
    pub fn cancel_running(&self) {
        if let Some(running) = &self.0.state().running {
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

/// Tells what of an earlier process's state can't be read, and is left out.
fn tell_unreadable_rows(rows: &[UnreadableRow]) {
    /// Where all is damaged, that is known after a few.
    const TOLD: usize = 64;
    for UnreadableRow { what, key, problem } in rows.iter().take(TOLD) {
        tracing::error!(what, key, problem, "left out: a row of the store can't be read; it stays there");
    }
    if rows.len() > TOLD {
        tracing::error!(rows = rows.len() - TOLD, "left out: further rows of the store can't be read");
    }
}

/// Tells what was acknowledged and is not in the store any more.
fn tell_lost(lost: &Lost, first_open: Option<&OpenCycle>, state: &State) {
    let (last_revision, commits) = (lost.last_revision, lost.commits);
    if last_revision > state.last_revision {
        // They were recorded in the order of their ids.
        let first = first_open.map_or(state.last_cycle_id.next(), |open| open.cycle_id);
        let cycles = format!("{first} to {}", first.0 + (last_revision.0 - state.last_revision.next().0));
        let revisions = format!("{} to {last_revision}", state.last_revision.next());
        tracing::error!(
            cycles,
            revisions,
            commits,
            "records that were acknowledged are missing: the end of the store was damaged, or an older copy was put in its \
             place. They are recorded as interrupted, so that their numbers are not given again; what was registered or \
             changed meanwhile is missing as well"
        );
    } else {
        tracing::error!(
            commits,
            "changes that were acknowledged are missing, such as registrations, loops or suspensions: the end of the store was \
             damaged, or an older copy was put in its place"
        );
    }
}

/// Where a cycle that was asked for stands.
enum Found {
    Recorded(Record),
    Admitted(Arc<Admitted>),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while this is held is a defect that must not turn into a second one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> Arc<Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Room for a request as long as its cycle waits or runs. Small ones need none: their number is bounded.
    fn room_of(&self, request: &CycleRequest) -> Result<Option<Held>, Refusal> {
        const SMALL: usize = 4 << 10;
        match self.requests.try_hold(request.footprint()) {
            Err(full) if request.footprint() > SMALL => Err(full.into()),
            held => Ok(held.ok()),
        }
    }

    async fn admit_once(&self, mut request: CycleRequest) -> Result<Found, Refusal> {
        let max_queued = self.settings().max_queued;
        let mut room = self.room_of(&request)?;
        let mut looked_at = None;
        let mut is_checked = request.subset.is_none();
        loop {
            {
                let mut state = self.state();
                if let Some(live) = request.request_id.as_ref().and_then(|id| state.requests.get(id)) {
                    return Ok(Found::Admitted(live.clone()));
                }
                // A cycle that was recorded since the history was looked into may be the one.
                let is_new = request.request_id.is_none() || looked_at == Some(state.last_revision);
                if is_new && is_checked {
                    let admitted = state.admit(request, room.take(), max_queued)?;
                    drop(state);
                    self.queue_changed.notify_one();
                    return Ok(Found::Admitted(admitted));
                }
                looked_at = Some(state.last_revision);
            }
            if let Some(request_id) = &request.request_id
                && let Some(record) = self.read_one(self.store.cycle_of_request(request_id.clone())).await?
            {
                return Ok(Found::Recorded(record));
            }
            if !is_checked {
                request.subset = self.registered_names(request.subset).await?;
                is_checked = true;
            }
        }
    }

    /// The same names, as the registry has them.
    async fn registered_names(&self, subset: Option<Arc<[Name]>>) -> Result<Option<Arc<[Name]>>, Refusal> {
        let Some(subset) = subset else { return Ok(None) };
        let plan = self.plan().await;
        let names = aside(subset.len(), move || plan.own_names(&subset)).await;
        names.map(Some).map_err(Refusal::SubsystemNotFound)
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

    async fn register(
        &self,
        subsystems: Vec<Subsystem>,
        lease: Option<Duration>,
    ) -> Result<Vec<(Registered, Change)>, Refusal> {
        let order = self.writing.clone().lock_owned().await;
        let max = self.settings().max_subsystems;
        let (earlier, registered): (Vec<_>, _) = {
            let state = self.state();
            let earlier = subsystems.iter().map(|subsystem| state.registry.get(&subsystem.name).ok().cloned());
            (earlier.collect(), state.registry.len())
        };
        if let Some(declared) = earlier.iter().flatten().find(|earlier| earlier.declared) {
            return Err(Refusal::DeclaredInConfig(declared.name().clone()));
        }
        let new = earlier.iter().filter(|earlier| earlier.is_none()).count();
        if new > 0 && registered + new > max {
            return Err(Refusal::RegistryFull { registered, new, max });
        }
        let mut moved = Vec::new();
        let change = |(subsystem, earlier): (Subsystem, Option<Registered>)| {
            if let Some(earlier) = &earlier
                && *earlier.member.subsystem == subsystem
                && earlier.lease.map(|lease| lease.length) == lease
            {
                return Ok((earlier.clone(), Change::Renewed));
            }
            let held = self.memory.try_hold(subsystem.footprint()).map_err(Refusal::RegistryMemoryFull)?;
            let Some(earlier) = earlier else {
                let member = Member::new(Arc::new(subsystem), false, Arc::default()).holding(held);
                return Ok((Registered { member, declared: false, lease: None }, Change::Created));
            };
            let Member { subsystem: before, suspended, standing, .. } = &earlier.member;
            if before.endpoint != subsystem.endpoint {
                moved.push(standing.clone());
            }
            let member = Member::new(Arc::new(subsystem), *suspended, standing.clone()).holding(held);
            Ok((Registered { member, ..earlier }, Change::Replaced))
        };
        let entries: Result<Vec<_>, Refusal> = subsystems.into_iter().zip(earlier).map(change).collect();
        let mut entries = entries?;

        let changed = entries.iter().filter(|(_, change)| *change != Change::Renewed);
        let changed: Vec<_> = changed.map(|(entry, _)| entry.clone()).collect();
        let mut put = |state: &mut State| {
            let mut left = Vec::new();
            // The time that writing took is not part of it.
            let begin = Instant::now();
            for (entry, change) in &mut entries {
                entry.lease = lease.map(|length| Lease::new(length, begin));
                match (*change, entry.lease) {
                    // Nothing durable changes.
                    (Change::Renewed, Some(lease)) => state.registry.set_lease(entry.name(), lease),
                    (Change::Renewed, None) => {}
                    (Change::Created | Change::Replaced, _) => left.extend(state.registry.put(entry.clone())),
                }
            }
            // What failed was at the other endpoint.
            for standing in &moved {
                standing.close_breaker();
            }
            left
        };
        if changed.is_empty() {
            put(&mut self.state());
        } else {
            let names =
                changed.iter().map(|entry| &entry.member.subsystem).map(|it| it.requires.len() + it.after.len());
            let work = registered + names.sum::<usize>();
            let (mut order, checked) = aside(work, move || {
                let mut order = order;
                let subsystems = changed.iter().map(|entry| entry.member.subsystem.clone()).collect();
                let checked = order.change(subsystems, &[]).map(|undo| {
                    let stored = |entry: &Registered| StoredSubsystem { lease, ..entry.to_stored() };
                    let stored = changed.iter().map(|entry| (entry.name().clone(), Some(stored(entry))));
                    (undo, stored.collect())
                });
                (order, checked)
            })
            .await;
            let (undo, subsystems) = checked.map_err(Refusal::OrderRing)?;
            let written = self.write_locked(|_| Write { subsystems, ..Write::default() }, put).await;
            match written {
                Ok(left) => self.engine.subsystems.forget(&left),
                Err(error) => {
                    order.undo(undo);
                    return Err(error.into());
                }
            }
        }
        self.leases_changed.notify_one();
        for (entry, change) in &entries {
            let endpoint = &entry.member.subsystem.endpoint;
            match change {
                Change::Created => tracing::info!(subsystem = %entry.name(), %endpoint, "registered"),
                Change::Replaced => {
                    tracing::info!(subsystem = %entry.name(), %endpoint, "registered with changes");
                }
                Change::Renewed => {}
            }
        }
        Ok(entries)
    }

    async fn unregister(&self, name: &Name) -> Result<(), Refusal> {
        let mut order = self.writing.lock().await;
        if self.state().registry.get(name)?.declared {
            return Err(Refusal::DeclaredInConfig(name.clone()));
        }
        self.forget(&mut order, std::slice::from_ref(name)).await?;
        tracing::info!(subsystem = %name, "unregistered");
        Ok(())
    }

    async fn suspend(&self, name: &Name, suspended: bool) -> Result<Registered, Refusal> {
        let _writing = self.writing.lock().await;
        let earlier = self.state().registry.get(name)?.clone();
        if !suspended && earlier.member.standing.close_breaker() {
            tracing::info!(subsystem = %name, "its circuit breaker is closed: it is resumed");
        }
        if earlier.member.suspended == suspended {
            return Ok(earlier);
        }
        let member = earlier.member.suspended(suspended);
        let entry = Registered { member, ..earlier };
        let subsystems = BTreeMap::from([(name.clone(), Some(entry.to_stored()))]);
        let put = |state: &mut State| {
            // Its lease may have been renewed in between.
            let lease = state.registry.get(name).ok().and_then(|now| now.lease);
            let entry = Registered { lease, ..entry };
            state.registry.put(entry.clone());
            entry
        };
        let entry = self.write_locked(|_| Write { subsystems, ..Write::default() }, put).await?;
        tracing::info!(subsystem = %name, "{}", if suspended { "suspended" } else { "resumed" });
        Ok(entry)
    }

    async fn start_loop(&self, spec: &LoopSpec) -> Result<LoopEntry, Refusal> {
        // Each name is a part in the record of every cycle.
        let max = self.settings().max_subsystems;
        let named = spec.subsystems.len();
        if named > max {
            let mut bad = Violations::default();
            bad.add("subsystems", format!("are {named}; registry.max_subsystems allows {max}"));
            return Err(Refusal::Invalid(bad));
        }
        // Many names take a while to read.
        let wanted = IntervalLoop::from_spec(spec);
        let _writing = self.writing.lock().await;
        let now = self.clock.now();
        let (settings, declared) = {
            let state = self.state();
            let earlier = Name::parse(&spec.name).ok().and_then(|name| state.loops.get(&name).cloned());
            match earlier {
                Some(earlier) if earlier.declared => {
                    let only_named = *spec == LoopSpec { name: spec.name.clone(), ..LoopSpec::default() };
                    if !only_named && wanted? != *earlier.settings {
                        return Err(Refusal::DeclaredInConfig(earlier.settings.name.clone()));
                    }
                    if !earlier.state.stopped {
                        return Ok(earlier);
                    }
                    ((*earlier.settings).clone(), true)
                }
                Some(earlier) => {
                    let settings = wanted?;
                    if settings == *earlier.settings {
                        return Ok(earlier);
                    }
                    (settings, false)
                }
                None => {
                    let settings = wanted?;
                    if state.loops.len() >= self.settings().max_loops {
                        return Err(Refusal::TooManyLoops(state.loops.len()));
                    }
                    (settings, false)
                }
            }
        };
        let held = self.memory.try_hold(settings.footprint()).map_err(Refusal::RegistryMemoryFull)?;
        let build = |state: &State| {
            let entry = state.loops.started(settings.clone(), declared, now);
            Write { loops: BTreeMap::from([(settings.name.clone(), Some(entry.to_stored()))]), ..Write::default() }
        };
        let put = |state: &mut State| {
            // Ticks may have fallen due and been accounted for in between.
            let now = self.clock.now();
            state.follow_clock(now);
            let entry = state.loops.started(settings.clone(), declared, now).holding(held);
            state.loops.put(entry.clone());
            entry
        };
        let entry = self.write_locked(build, put).await?;
        self.loops_changed.notify_one();
        tracing::info!("loop" = %entry.settings.name, interval = ?entry.settings.interval, "a loop has started");
        Ok(entry)
    }

    async fn stop_loop(&self, name: &Name) -> Result<LoopEntry, Refusal> {
        let _writing = self.writing.lock().await;
        if self.state().loops.get(name).is_none() {
            return Err(Refusal::LoopNotFound(name.clone()));
        }
        let stopped = |state: &State| Some(state.loops.get(name)?.clone().stopped(self.clock.now()));
        let build = |state: &State| {
            let stored = stopped(state).filter(|entry| entry.declared).map(|entry| entry.to_stored());
            Write { loops: BTreeMap::from([(name.clone(), stored)]), ..Write::default() }
        };
        let put = |state: &mut State| {
            state.follow_clock(self.clock.now());
            let entry = stopped(state)?;
            if entry.declared {
                state.loops.put(entry.clone());
            } else {
                state.loops.remove(name);
            }
            Some(entry)
        };
        let entry = self.write_locked(build, put).await?;
        tracing::info!("loop" = %name, "a loop has stopped");
        entry.ok_or_else(|| Refusal::LoopNotFound(name.clone()))
    }

    /// Builds and commits one durable change, and with it what has changed in loops and which cycles were admitted since
    /// the last one. Once it is committed, `apply` changes what is in memory.
    async fn write<T>(
        &self,
        build: impl FnOnce(&State) -> Write,
        apply: impl FnOnce(&mut State) -> T,
    ) -> Result<T, StoreError> {
        let _writing = self.writing.lock().await;
        self.write_locked(build, apply).await
    }

    /// The same, for those who hold `writing` already.
    async fn write_locked<T>(
        &self,
        build: impl FnOnce(&State) -> Write,
        apply: impl FnOnce(&mut State) -> T,
    ) -> Result<T, StoreError> {
        let (write, mark) = {
            let state = self.state();
            let mut write = Write { epoch: self.engine.epoch, last_cycle_id: state.last_admitted, ..build(&state) };
            let open = write.open.iter().map(|open| open.cycle_id);
            let known: Vec<_> = open.chain(write.records.iter().map(|record| record.cycle_id)).collect();
            let live = state.queue.iter().chain(&state.running);
            let new = live.filter(|live| live.cycle_id > state.last_noted && !known.contains(&live.cycle_id));
            write.open.extend(new.map(|live| live.to_open()));
            let (loops, mark) = state.loops.unwritten();
            for (name, stored) in loops {
                write.loops.entry(name).or_insert(stored);
            }
            (write, mark)
        };
        let (durability, noted, started) = (write.durability, write.last_cycle_id, Instant::now());
        let committed = self.store.commit(Arc::new(write)).await;
        if let Err(error) = &committed
            && error.is_final()
        {
            self.store_ends(error);
        }
        let mut state = self.state();
        state.counts.committed(durability, started.elapsed(), &committed);
        committed?;
        state.loops.written(mark);
        state.last_noted = noted;
        Ok(apply(&mut state))
    }

    /// Tells of a record that can't be read, if that is why.
    fn tell_if_unreadable<T>(&self, found: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Unreadable(unreadable)) = &found {
            self.state().tell_unreadable(unreadable);
        }
        found
    }

    /// Nothing will be written any more: ends the process.
    fn store_ends(&self, error: &StoreError) {
        self.state().store_error = Some(error.clone());
        self.store_has_ended.cancel();
    }

    /// Removes subsystems durably. `writing` is held.
    async fn forget(&self, order: &mut Order, names: &[Name]) -> Result<(), Refusal> {
        let subsystems = names.iter().map(|name| (name.clone(), None)).collect();
        let remove =
            |state: &mut State| names.iter().filter_map(|name| state.registry.remove(name)).collect::<Vec<_>>();
        let left = self.write_locked(|_| Write { subsystems, ..Write::default() }, remove).await?;
        // Without some of them, there still is an order.
        order.change(Vec::new(), names).map_err(Refusal::OrderRing)?;
        self.engine.subsystems.forget(&left);
        Ok(())
    }

    async fn reload(&self, settings: Settings, declared: Declared) -> Result<(), Refusal> {
        let order = self.writing.clone().lock_owned().await;
        let Entries { entries: before, .. } = self.state().registry.snapshot();
        let Declared { subsystems, loops } = declared;
        let hold = |settings: IntervalLoop| {
            let held = self.memory.try_hold(settings.footprint()).map_err(Refusal::RegistryMemoryFull)?;
            Ok((settings, held))
        };
        let loops = loops.into_iter().map(hold).collect::<Result<Vec<_>, Refusal>>()?;
        let memory = self.memory.clone();
        let (mut order, changes) = aside(before.len() + subsystems.len(), move || {
            let mut order = order;
            let changes = Declarations::of(subsystems, &before, &memory).and_then(|changes| {
                let put = changes.put.iter().map(|entry| entry.member.subsystem.clone()).collect();
                let ordered = order.change(put, &changes.removed).map_err(|ring| changes.refuse(ring));
                ordered.map(|undo| (undo, changes))
            });
            (order, changes)
        })
        .await;
        let (undo, Declarations { put, removed, moved, stored, .. }) = changes?;
        let stopped: Vec<_> = {
            let state = self.state();
            let declared = state.loops.iter().filter(|entry| entry.declared).map(|entry| &entry.settings.name);
            declared.filter(|name| !loops.iter().any(|(settings, _)| settings.name == **name)).cloned().collect()
        };
        let write = Write {
            subsystems: stored,
            loops: stopped.iter().map(|name| (name.clone(), None)).collect(),
            ..Write::default()
        };
        let apply = |state: &mut State| {
            let mut left: Vec<_> = removed.iter().filter_map(|name| state.registry.remove(name)).collect();
            left.extend(put.into_iter().filter_map(|entry| state.registry.put(entry)));
            for name in stopped {
                state.loops.remove(&name);
            }
            let now = self.clock.now();
            state.follow_clock(now);
            for (settings, held) in loops {
                let entry = match state.loops.get(&settings.name) {
                    Some(earlier) if earlier.declared && *earlier.settings == settings => continue,
                    Some(earlier) if earlier.state.stopped => state.loops.started(settings, true, now).stopped(now),
                    _ => state.loops.started(settings, true, now),
                };
                state.loops.put(entry.holding(held));
            }
            left
        };
        match self.write_locked(|_| write, apply).await {
            Ok(left) => self.engine.subsystems.forget(&left),
            Err(error) => {
                order.undo(undo);
                return Err(error.into());
            }
        }
        for standing in moved {
            standing.close_breaker();
        }

        self.engine.outputs.set_max(settings.max_outputs_bytes);
        self.engine.slots.set_max(settings.max_concurrent_calls);
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(Settings { orchestrator_id: self.engine.orchestrator_id.clone(), ..settings });
        self.loops_changed.notify_one();
        Ok(())
    }

    // -----------------------------------------------------------------------------------------------------------
    // Helpers: each is one task that sleeps, and does one pass when there is something to do.

    /// Starts the cycles of loops when their ticks are due.
    async fn fire_ticks(self: Arc<Self>) {
        /// The wall clock may be set: it is looked at this often at least.
        const LOOK_AGAIN: Duration = Duration::from_secs(1);
        loop {
            let next = self.state().loops.next_at();
            let wait = next.map(|at| Duration::try_from(at.duration_since(self.clock.now())).unwrap_or_default());
            select! {
                () = self.loops_changed.notified() => {}
                () = sleep(wait.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN)), if next.is_some() => {}
            }
            self.fire_due_ticks();
        }
    }

    fn fire_due_ticks(&self) {
        let now = self.clock.now();
        let max_queued = self.settings().max_queued;
        let mut state = self.state();
        state.follow_clock(now);
        for (settings, due_at) in state.loops.due(now) {
            let request = CycleRequest {
                trigger: Trigger::Loop(settings.name.clone()),
                scheduled_at: due_at,
                subset: settings.subset.clone(),
                parameters: settings.parameters.clone(),
                request_id: None,
                overlap: settings.overlap,
                deadline: settings.deadline,
                record_outputs: settings.record_outputs,
                trace: None,
            };
            let (disposition, cycle_id) = match state.admit(request, None, max_queued) {
                Ok(admitted) => (TickDisposition::Ran, Some(admitted.cycle_id)),
                Err(Refusal::CycleRunning(_)) => (TickDisposition::Skipped, None),
                Err(Refusal::CycleWaiting(_)) => (TickDisposition::Coalesced, None),
                Err(refusal) => {
                    let is_news = state.loops.warns_of_drops(&settings.name, now);
                    // Those of a process that drains are no surprise.
                    if is_news && !matches!(refusal, Refusal::Draining) {
                        tracing::warn!("loop" = %settings.name, %due_at, %refusal, "ticks are dropped");
                    }
                    (TickDisposition::Dropped, None)
                }
            };
            state.loops.account(&settings.name, due_at, disposition, cycle_id, now);
        }
        drop(state);
        self.queue_changed.notify_one();
    }

    /// Unregisters those whose lease has ended.
    async fn expire_leases(self: Arc<Self>) {
        /// When the store could not be written.
        const RETRY: Duration = Duration::from_secs(1);
        loop {
            let next = self.state().registry.next_expiry();
            select! {
                () = self.leases_changed.notified() => continue,
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            if let Err(error) = self.forget_expired().await {
                tracing::error!(%error, "can't unregister those whose lease was not renewed; trying again");
                sleep(RETRY).await;
            }
        }
    }

    /// Those that end together in one commit, up to a number in which a cycle that is to begin hardly waits for it.
    async fn forget_expired(&self) -> Result<(), Refusal> {
        const MAX: usize = 1000;
        let mut order = self.writing.lock().await;
        let expired = self.state().registry.expired(Instant::now(), MAX);
        if !expired.is_empty() {
            self.forget(&mut order, &expired).await?;
        }
        for name in expired {
            tracing::info!(subsystem = %name, "unregistered: its lease was not renewed");
        }
        Ok(())
    }

    /// Sends live progress in batches.
    async fn send_progress(self: Arc<Self>) {
        loop {
            self.live.pending.notified().await;
            sleep(Live::BATCH_EVERY).await;
            self.live.flush();
        }
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
