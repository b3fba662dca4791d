//! The use cases, behind one handle that is cheap to clone.
//!
//! What is known stands in `State`, under one lock, which nobody holds across a wait. It changes only after the change is
//! committed, and in the same order. Each use case stands in the file of what it changes or reads:
//!
//! - a cycle's way: `admission` lets it in, `line` says when it may run, `conductor` runs it, `writing` has it recorded;
//! - what it runs over: `registry` and its changes in `registration`, the order in `planning`, `loops` and their ticks;
//! - what is read: `status`, `history`, `watch` (the stream) with `live` (progress), `snapshots`, `figures` (for metrics);
//! - the process: `recovery` at its start, `tasks` and its end, `reload`, `retention`.

mod admission;
mod aside;
mod conductor;
mod figures;
mod history;
mod line;
mod live;
mod loops;
mod planning;
mod recovery;
mod refusal;
mod registration;
mod registry;
mod reload;
mod retention;
mod snapshots;
mod status;
mod tasks;
mod watch;
mod writing;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use tokio::{
    sync::{Notify, mpsc, watch as newest},
    time::Instant,
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use self::{
    admission::Admitted, figures::Watchers, history::Recent, line::Line, live::Live, registry::Registry,
    writing::ToWrite,
};
use crate::{
    clock::Clock,
    engine::{Engine, Order},
    memory::{Held, Memory},
    model::{CycleId, Revision},
    ports::{Record, Store, StoreError},
    schedule::Loops,
};

pub use self::{
    admission::Ticket,
    figures::{Counts, Figures, Passes},
    live::{LiveChange, LiveCycle, LiveEvent, RunningCycle, Update},
    refusal::Refusal,
    registration::Change,
    registry::{Lease, Origin, Registered},
    reload::{Declared, Settings},
    status::{Status, WaitingCycle},
    tasks::{Stopped, Tasks},
    watch::{Event, From, WatchFilter, Watcher},
};

/// Runs cycles over the registry, records them, and streams the record.
#[derive(Clone)]
pub struct Orchestrator(Arc<Shared>);

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

/// How a change that a caller asks for stands to the end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChangeKind {
    /// It is begun for the time to come, and refused while the process drains.
    Begins,
    /// It ends, renews or finds what is there, and is made as long as the process lives.
    Settles,
}

/// A change that was admitted. The last write of the process waits until this is dropped.
struct Admission {
    _token: TaskTrackerToken,
}

impl Orchestrator {
    /// The one way of all changes that callers ask for.
    ///
    /// # Errors
    /// The process drains.
    fn admit(&self, kind: ChangeKind) -> Result<Admission, Refusal> {
        // Before it is looked at: what passes is waited for.
        let admission = Admission { _token: self.0.changes.token() };
        if kind == ChangeKind::Begins && self.0.state().draining {
            return Err(Refusal::Draining);
        }
        Ok(admission)
    }

    /// Admits a change and makes it to its end, also when whoever asks for it goes away: what is dropped half-way would be
    /// committed, and not be in memory.
    async fn change<T, F>(&self, change: impl FnOnce(Arc<Shared>) -> F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
    {
        let admission = self.admit(ChangeKind::Begins)?;
        let change = change(self.0.clone());
        let changed = tokio::spawn(async move {
            let _admission = admission;
            change.await
        });
        match changed.await {
            Ok(changed) => changed,
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                Err(_runtime_is_shut_down) => Err(Refusal::Draining),
            },
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while this is held is a defect that must not turn into a second one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> Arc<Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
