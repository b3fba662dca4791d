//! The tasks of an orchestrator, from their start to their end. Each has a name and a purpose, and none ends unnoticed: without
//! it, loops or leases would stand still, and nobody would know.

use std::{convert::Infallible, sync::Arc};

use tokio::{select, sync::mpsc, task::JoinHandle};

use super::{Orchestrator, Shared, writing::ToWrite};
use crate::{
    parts::{Ended, Part, Parts},
    ports::StoreError,
};

const CONDUCTOR: Part =
    Part { name: "the conductor of cycles", purpose: "runs cycles when it is their turn and has them recorded" };
const WRITER: Part = Part { name: "the writer", purpose: "commits whatever is to last" };
const LOOPS: Part = Part { name: "the timer of loops", purpose: "starts the cycles of loops when their ticks are due" };
const LEASES: Part =
    Part { name: "the timer of leases", purpose: "unregisters subsystems whose lease was not renewed" };
const RETENTION: Part =
    Part { name: "the retention of the history", purpose: "removes records that are too old or too many" };
const PROGRESS: Part = Part { name: "the live progress", purpose: "sends watchers what happens in running cycles" };

/// The tasks of an [`Orchestrator`].
pub struct Tasks {
    conductor: JoinHandle<Result<(), StoreError>>,
    /// All others. What they do ends with the last write.
    others: Parts,
}

/// Why an [`Orchestrator`] has ended before its last write was done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Stopped {
    /// A later epoch has taken over the store, or the last write failed.
    #[error(transparent)]
    Store(StoreError),
    /// The conductor of cycles has ended by a defect.
    #[error(transparent)]
    Conductor(Ended),
    /// Another task has ended by a defect. Cycles still run, unless it is the writer, and [`Orchestrator::drain`] ends them.
    #[error(transparent)]
    Other(Ended),
}

impl Orchestrator {
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
    /// a task has ended by a defect. May be called again after [`Stopped::Other`] only.
    ///
    /// # Errors
    /// Why it has ended before the last write.
    pub async fn finished(&mut self) -> Result<(), Stopped> {
        let finished = select! {
            biased;
            finished = &mut self.conductor => match finished {
                Ok(finished) => finished.map_err(Stopped::Store),
                Err(panicked) => Err(Stopped::Conductor(Ended::of(CONDUCTOR, panicked))),
            },
            ended = self.others.next_ended() => return Err(Stopped::Other(ended)),
        };
        // They hold nothing that would have to be written.
        self.others.abort();
        finished
    }
}

impl Tasks {
    /// Starts all of them. But for the conductor, each sleeps until there is something to do, for ever.
    pub(super) fn start(shared: &Arc<Shared>, asked: mpsc::Receiver<Box<dyn ToWrite>>) -> Self {
        let mut others = Parts::default();
        others.start(WRITER, lasting(shared.clone().write_changes(asked)));
        others.start(LOOPS, lasting(shared.clone().fire_ticks()));
        others.start(LEASES, lasting(shared.clone().expire_leases()));
        others.start(RETENTION, lasting(shared.clone().prune()));
        others.start(PROGRESS, lasting(shared.clone().send_progress()));
        Self { conductor: tokio::spawn(shared.clone().conduct()), others }
    }
}

/// A task whose end says nothing.
async fn lasting(task: impl Future<Output = ()>) -> Result<(), Infallible> {
    task.await;
    Ok(())
}
