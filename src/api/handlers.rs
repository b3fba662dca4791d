//! Common parts of the handlers of all RPCs: turns for long work. They reach the orchestrator only through a call that
//! has entered.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tonic::Status;

use super::{error::status, served::ServedNames};
use crate::{
    access::Reach, clock::Clock, model::Violations, offload::offload_within, orchestrator::Refusal, tasks::joined,
};

/// Most bytes of an answer: below the 4 MiB that clients accept by default.
pub(super) const MAX_ANSWER: usize = 3 << 20;

/// Most concurrent requests for all snapshots; further ones wait.
const MAX_ASKING_ALL: usize = 2;

/// The shared state of handlers. All clones share their bounds.
#[derive(Clone)]
pub(super) struct Handlers {
    pub(super) clock: Clock,
    /// True if other machines may be able to use the service without any right.
    pub(super) is_insecure: bool,
    /// The names under which this orchestrator is served as a subsystem.
    pub(super) served: Arc<ServedNames>,
    /// Where subsystems may be dialed.
    pub(super) reach: Arc<Reach>,
    /// Limits requests for all snapshots, which have any size until the answer is assembled.
    pub(super) asking_all: Arc<Semaphore>,
    /// Long work is done one at a time, so that it takes at most one processor from cycles.
    pub(super) turn: Arc<Semaphore>,
}

impl Handlers {
    pub(super) fn new(clock: Clock, is_insecure: bool, reach: Reach) -> Self {
        let [asking_all, turn] = [MAX_ASKING_ALL, 1].map(|places| Arc::new(Semaphore::new(places)));
        Self { clock, is_insecure, served: Arc::default(), reach: Arc::new(reach), asking_all, turn }
    }

    /// Runs work over this many subsystems: with many it may take milliseconds, and runs on a blocking thread.
    pub(super) async fn offload<T: Send + 'static>(
        &self,
        subsystems: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        const FEW: usize = 512;
        let done = offload_within(&self.turn, subsystems > FEW, work).await;
        joined(done).ok_or_else(|| status(Refusal::Draining))
    }
}

pub(super) fn invalid(violations: Violations) -> Status {
    status(Refusal::Invalid(violations))
}
