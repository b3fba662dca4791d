//! Limits how much a task reads before other tasks run.

use std::task::{Context, Poll};

use tokio::task::coop;

/// Consumes the task's tokio budget for bytes that it has read, so that its turn ends after 64 KiB. By itself a read
/// costs one of 128 steps, so that a megabyte of small frames would be one turn, while other connections wait.
pub(crate) fn end_sooner(cx: &mut Context<'_>, bytes: usize) {
    const STEP: usize = 512;
    for _ in 0..bytes / STEP {
        match coop::poll_proceed(cx) {
            Poll::Ready(step) => step.made_progress(),
            Poll::Pending => break,
        }
    }
}
