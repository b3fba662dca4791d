//! The use cases, behind one handle.
//!
//! `State` holds everything that is known, under one lock, which is never held across an await. It changes only after
//! the change is committed, and in the same order. Each use case is in the file of what it changes or reads:
//!
//! - the path of a cycle: `admission` admits it, `line` decides when it may run, `conductor` runs it, `writing` records
//!   it, `attended` ends one that a parent no longer waits for;
//! - its inputs: `registry` and its changes in `registration`, the order in `planning`, `loops` and their ticks;
//! - reads: `history`, which outlasts the terms of a replica, `watch` (its stream) with `live` (progress), `status`,
//!   `snapshots`, `figures` (for metrics), `checkpoints` and proofs of the log;
//! - the process: `recovery` at its start, `tasks` and its end, `reload`, `retention`, `audit` of calls that change
//!   nothing, `lead` where another replica may lead.

mod admission;
mod attended;
mod audit;
mod checkpoints;
mod conductor;
mod ended;
mod entries;
mod figures;
mod history;
mod lead;
mod line;
mod live;
mod loops;
mod offload;
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
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use tokio::{
    select,
    sync::{Notify, OwnedMutexGuard, mpsc, oneshot, watch as latest},
    time::Instant,
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use self::{
    admission::Admitted, attended::Attended, checkpoints::Checkpoints, line::Line, registry::Registry, writing::ToWrite,
};
use crate::{
    clock::{Clock, Moment},
    engine::{Engine, Order},
    memory::Memory,
    model::{Cause, CycleId, RequestKey, Revision},
    ports::{Record, Store, StoreError},
    schedule::Loops,
    tasks::joined,
};

pub use self::{
    admission::Ticket,
    attended::AttendedTicket,
    audit::{Sum, Sums},
    checkpoints::{Logged, Proved, Published},
    figures::{Counts, Figures, Passes, Watched},
    history::History,
    live::{LiveChange, LiveCycle, LiveEvent, RunningCycle, Update},
    recovery::TakenOver,
    refusal::{NotCancelled, NotOwner, NotRecorded, NotRegistered, NotRenewed, RecordHasNoRoom, Refusal},
    registration::{Change, Outcome, Registrar, Renamed},
    registry::{Lease, Origin, Registered},
    reload::{Declared, Settings},
    retention::{PruneLimit, Pruned},
    status::{NotReady, Status, StoreEnded, WaitingCycle},
    tasks::{OrchestratorTasks, Stopped},
    watch::{Event, From, Position, WatchFilter, Watcher},
};

/// Runs cycles over the registry, records them, and streams the record.
///
/// It can't be cloned, so a handler that borrows it from an admitted call reaches it only as long as that call lives.
pub struct Orchestrator(Arc<Shared>);

struct Shared {
    settings: Mutex<Arc<Settings>>,
    /// Memory for registrations and loops.
    memory: Memory,
    /// Memory for requests of waiting and running cycles.
    requests: Memory,
    clock: Clock,
    /// When the process started.
    started: Moment,
    /// When this term began.
    term_began_at: Timestamp,
    engine: Engine,
    /// True if the store is only looked at.
    is_read_only: bool,
    store: Arc<dyn Store>,
    /// The history, as far as it is shown.
    history: History,
    /// The part of its memory for readers of the log, since they may stall.
    reading_log: Memory,
    state: Mutex<State>,
    /// Held while the registry or a loop is changed, so that one such change is made at a time. The order of subsystems
    /// changes only then.
    order: Arc<tokio::sync::Mutex<Order>>,
    /// The queue of the writer.
    to_write: mpsc::Sender<Box<dyn ToWrite>>,
    /// Held while the plan is computed, so that it is computed once for all requests.
    planning: tokio::sync::Mutex<()>,
    /// Held while records are found and removed, so that none is removed twice.
    removing: tokio::sync::Mutex<()>,
    /// Durable changes of callers. The last write waits for them.
    changes: TaskTracker,
    queue_changed: Notify,
    loops_changed: Notify,
    leases_changed: Notify,
    attended_changed: Notify,
    checkpoints: Checkpoints,
    sums: Sums,
    /// Cancelled once no more writes are possible: `State::store_error` has the reason.
    store_has_ended: CancellationToken,
    /// Cancelled once the last write is done.
    closed: CancellationToken,
}

struct State {
    registry: Registry,
    loops: Loops,
    /// The line of cycles.
    line: Line,
    /// All admitted cycles that are not recorded.
    live: BTreeMap<CycleId, Arc<Admitted>>,
    /// Those cycles by the keys of their requests.
    requests: HashMap<RequestKey, Arc<Admitted>>,
    /// The parents' cycles among them.
    attended: Attended,
    /// Cycles that were cancelled before their turn, and are to be recorded.
    cancelled: VecDeque<Arc<Admitted>>,
    last_admitted: CycleId,
    /// The highest id in the store, and the highest one that survives the loss of power.
    noted: CycleId,
    noted_durably: CycleId,
    /// Number of cycles ever recorded.
    recorded: u64,
    /// The last record, and the highest revision.
    last: Option<Arc<Record>>,
    last_revision: Revision,
    /// The history, as far as it is shown, which changes together with this.
    history: History,
    /// Why the store can't be written now. Cycles are put off only while there is a reason.
    store_error: latest::Sender<Option<StoreError>>,
    draining: bool,
    /// True while this replica can't confirm that it leads.
    has_lapsed: bool,
    /// Since when no lease of a subsystem expires, while no change can be written.
    leases_held: Option<Instant>,
    /// When the process was last known to run. Only while there are leases.
    ran_at: Option<Instant>,
    counts: Counts,
}

/// The turn of one change of the registry or of a loop.
struct Turn {
    /// The order of subsystems, which only such changes change.
    order: OwnedMutexGuard<Order>,
    /// The cause of the change, for its audit event.
    cause: Cause,
    /// Notifies the caller if the commit of the change is late; `None` if no caller is to be notified.
    late: Option<oneshot::Sender<StoreError>>,
}

/// A change that has begun. The last write of the process waits until this is dropped.
struct OpenChange {
    _token: TaskTrackerToken,
}

impl Orchestrator {
    /// Begins a change. All changes of callers pass here. A change that ends, renews or finds an existing thing is
    /// admitted until the process ends; others have to check that the process does not drain, once they are admitted.
    fn open_change(&self) -> OpenChange {
        OpenChange { _token: self.0.changes.token() }
    }

    /// Begins a change of the registry or of a loop, waits until it is its turn, and completes it then, even if the
    /// caller goes away: a change that is dropped half-way would be committed, but missing in memory. A caller that
    /// goes away before takes its change along, so that no more changes wait than callers. A late commit ends the wait.
    async fn change<T, F>(&self, cause: Cause, change: impl FnOnce(Arc<Shared>, Turn) -> F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
    {
        // Begun before the check, so that the last write waits for it.
        let open = self.open_change();
        if self.0.state().draining {
            return Err(Refusal::Draining);
        }
        let order = select! {
            biased;
            late = self.0.late_commit() => return Err(late.into()),
            order = self.0.order.clone().lock_owned() => order,
        };
        let (notify, late) = oneshot::channel();
        let change = change(self.0.clone(), Turn { order, cause, late: Some(notify) });
        let changed = tokio::spawn(async move {
            let _open = open;
            change.await
        });
        select! {
            biased;
            changed = changed => joined(changed).unwrap_or(Err(Refusal::Draining)),
            Ok(late) = late => Err(Refusal::ChangeIsLate(late)),
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while this lock is held is a defect that must not cause a second one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings(&self) -> Arc<Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
