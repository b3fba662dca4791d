//! The tasks of an orchestrator, and their end: each has a name, and the end of one is noticed.

use std::{convert::Infallible, sync::Arc};

use tokio::{select, task::JoinHandle};

use super::{Orchestrator, Shared};
use crate::{
    parts::{Ended, Parts},
    ports::StoreError,
};

/// The tasks of an [`Orchestrator`].
pub struct Tasks {
    pub(super) conductor: JoinHandle<Result<(), StoreError>>,
    pub(super) helpers: Parts,
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
    /// a task has ended by a defect. May be called again after [`Stopped::Helper`] only.
    ///
    /// # Errors
    /// Why it has ended before the last write.
    pub async fn finished(&mut self) -> Result<(), Stopped> {
        let finished = select! {
            biased;
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
pub(super) async fn lasting(task: impl Future<Output = ()>) -> Result<(), Infallible> {
    task.await;
    Ok(())
}

impl Shared {
    /// Takes ticks, leases, progress and retention in hand, each as a task that sleeps until there is something to do.
    pub(super) fn start_helpers(self: &Arc<Self>) -> Parts {
        let mut helpers = Parts::default();
        helpers.start("the timer of loops", lasting(self.clone().fire_ticks()));
        helpers.start("the timer of leases", lasting(self.clone().expire_leases()));
        helpers.start("the retention of the history", lasting(self.clone().prune()));
        helpers.start("the live progress", lasting(self.clone().send_progress()));
        helpers
    }
}
