//! The tasks of an orchestrator, from their start to their end. Each has a name and a purpose. An unexpected end of one
//! is detected: otherwise loops or leases would stop unnoticed.

use std::sync::Arc;

use tokio::{select, sync::mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::{Orchestrator, Shared, writing::ToWrite};
use crate::{
    ports::StoreError,
    tasks::{Task, TaskEnded, Tasks},
};

const CONDUCTOR: Task =
    Task { name: "the conductor of cycles", purpose: "runs cycles when it is their turn and has them recorded" };
const WRITER: Task = Task { name: "the writer", purpose: "commits changes to the store" };
const LOOPS: Task = Task { name: "the timer of loops", purpose: "starts the cycles of loops when their ticks are due" };
const LEASES: Task =
    Task { name: "the timer of leases", purpose: "unregisters subsystems whose lease was not renewed" };
const ATTENDED: Task = Task {
    name: "the timer of parents' cycles",
    purpose: "ends cycles of parents that no call waits for, or whose deadline passes before their turn",
};
const RETENTION: Task =
    Task { name: "the retention of the history", purpose: "removes records beyond the limits of retention" };
const CHECKPOINTS: Task =
    Task { name: "the checkpoints of the log", purpose: "signs and publishes how far the log goes" };
const AUDIT: Task =
    Task { name: "the audit of reads and denials", purpose: "has the events of calls that change nothing written" };
const PROGRESS: Task = Task { name: "the live progress", purpose: "sends the progress of running cycles to watchers" };

/// The tasks of an [`Orchestrator`]. They end when this is dropped.
pub struct OrchestratorTasks {
    conductor: AbortOnDropHandle<Result<(), StoreError>>,
    /// All other tasks. Their work ends with the last write.
    others: Tasks,
}

/// Why an [`Orchestrator`] has ended before its last write was done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Stopped {
    /// A later epoch has taken over the store, or the last write failed.
    #[error(transparent)]
    Store(StoreError),
    /// The conductor of cycles has ended because of a defect.
    #[error(transparent)]
    Conductor(TaskEnded),
    /// Another task has ended because of a defect. Cycles still run, unless it is the writer, and
    /// [`Orchestrator::drain`] ends them.
    #[error(transparent)]
    Other(TaskEnded),
}

impl Orchestrator {
    /// Stops admission, and cancels waiting cycles, except for acknowledged ones without a waiting caller: the next
    /// process runs these. Running cycles may finish; then [`OrchestratorTasks::finished`] returns.
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

    /// Cancels the running cycles.
    pub fn cancel_running(&self) {
        let state = self.0.state();
        for running in state.live.values().filter(|it| state.line.runs(it.cycle_id)) {
            running.cancel.cancel();
        }
    }
}

impl OrchestratorTasks {
    /// Waits until the last write is done, after [`Orchestrator::drain`], or until this process may no longer write, or
    /// a task has ended because of a defect. May be called again after [`Stopped::Other`] only.
    ///
    /// # Errors
    /// Why it has ended before the last write.
    pub async fn finished(&mut self) -> Result<(), Stopped> {
        let finished = select! {
            biased;
            finished = &mut self.conductor => match finished {
                Ok(finished) => finished.map_err(Stopped::Store),
                Err(panicked) => Err(Stopped::Conductor(TaskEnded::of(CONDUCTOR, panicked))),
            },
            ended = self.others.next_ended() => return Err(Stopped::Other(ended)),
        };
        // The other tasks have nothing left to write.
        self.others.abort();
        finished
    }

    /// Starts no task that could change something: the store is only looked at.
    pub(super) fn only_read(shared: &Arc<Shared>) -> Self {
        let conductor = AbortOnDropHandle::new(tokio::spawn(shared.clone().only_read()));
        Self { conductor, others: Tasks::default() }
    }

    /// Starts all tasks. Each except the conductor runs until it is dropped, and sleeps while there is nothing to do.
    pub(super) fn start(shared: &Arc<Shared>, asked: mpsc::Receiver<Box<dyn ToWrite>>) -> Self {
        let mut others = Tasks::default();
        others.start_infallible(WRITER, shared.clone().write_changes(asked));
        others.start_infallible(LOOPS, shared.clone().fire_ticks());
        others.start_infallible(LEASES, shared.clone().expire_leases());
        others.start_infallible(ATTENDED, shared.clone().end_unattended());
        others.start_infallible(RETENTION, shared.clone().prune());
        others.start_infallible(CHECKPOINTS, shared.clone().publish_checkpoints());
        others.start_infallible(AUDIT, shared.clone().write_sums());
        others.start_infallible(PROGRESS, shared.clone().send_progress());
        Self { conductor: AbortOnDropHandle::new(tokio::spawn(shared.clone().conduct())), others }
    }
}
