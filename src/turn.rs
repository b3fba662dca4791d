//! How much a task reads before others have their turn.

use std::task::{Context, Poll};

use tokio::task::coop;

/// Takes steps of the task's turn for what it has read, so that it ends after 64 KiB. By itself a read is one step of 128:
/// a megabyte of small frames would be one turn, for which other connections wait.
pub(crate) fn end_sooner(cx: &mut Context<'_>, bytes: usize) {
    const STEP: usize = 512;
    for _ in 0..bytes / STEP {
        match coop::poll_proceed(cx) {
            Poll::Ready(step) => step.made_progress(),
            Poll::Pending => break,
        }
    }
}
