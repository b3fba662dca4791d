//! The work of the one task or thread of a store that writes.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};

use crate::ports::{Contents, Excess, Retention, Seals, StoreError, Write};

/// Most jobs in the queue: the orchestrator makes one write at a time, and retention asks beside it.
const QUEUE: usize = 8;

/// A job, and where its result goes.
pub(super) enum Job {
    TakeOver(Seals, oneshot::Sender<Result<Contents, StoreError>>),
    Commit(Arc<Write>, oneshot::Sender<Result<(), StoreError>>),
    Excess(Retention, Timestamp, usize, oneshot::Sender<Result<Excess, StoreError>>),
}

/// The queue of the writer, which ends once this is dropped.
pub(super) struct Jobs(mpsc::Sender<Job>);

impl Jobs {
    /// A queue, and its other end.
    pub(super) fn new() -> (Self, mpsc::Receiver<Job>) {
        let (jobs, incoming) = mpsc::channel(QUEUE);
        (Self(jobs), incoming)
    }

    pub(super) async fn take_over(&self, seals: Seals) -> Result<Contents, StoreError> {
        self.ask(|reply| Job::TakeOver(seals, reply)).await
    }

    pub(super) async fn commit(&self, write: Arc<Write>) -> Result<(), StoreError> {
        self.ask(|reply| Job::Commit(write, reply)).await
    }

    pub(super) async fn excess(
        &self,
        retention: Retention,
        now: Timestamp,
        limit: usize,
    ) -> Result<Excess, StoreError> {
        self.ask(|reply| Job::Excess(retention, now, limit, reply)).await
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job) -> Result<T, StoreError> {
        let gone = || StoreError::Defect { problem: "its writer has ended".into() };
        let (reply, answer) = oneshot::channel();
        self.0.send(job(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}
