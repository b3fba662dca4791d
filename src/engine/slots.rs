//! Limits on the calls of all running cycles together: on their number, and on the bytes of their inputs.
//!
//! Both are first in, first out. A run makes one request at a time, so that cycles are served in turn.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Mutex, Notify};

use crate::memory::{Held, Memory};

/// Call slots: they limit the number of concurrent calls.
#[derive(Debug)]
pub struct Slots {
    max: AtomicUsize,
    taken: AtomicUsize,
    /// Only the first request in line waits for it.
    freed: Notify,
    queue: Queue,
}

/// A call slot. Released when dropped.
#[derive(Debug)]
pub(super) struct Slot<'a>(&'a Slots);

/// Memory for the inputs of calls.
#[derive(Debug)]
pub struct InputRoom {
    memory: Memory,
    queue: Queue,
}

/// The request that holds this lock is the first in line. The library passes the lock to the others in order.
type Queue = Mutex<()>;

impl Slots {
    /// This number of slots, all of them free.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { max: max.into(), taken: 0.into(), freed: Notify::new(), queue: Queue::default() }
    }

    /// Changes their number. If more are in use, their calls continue, and new ones begin once fewer than `max` are in
    /// use.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
        self.freed.notify_one();
    }

    /// Takes a slot once one is free and all earlier requests have theirs.
    pub(super) async fn take(&self) -> Slot<'_> {
        let _first = self.queue.lock().await;
        loop {
            if let Some(slot) = self.add() {
                return slot;
            }
            self.freed.notified().await;
        }
    }

    fn add(&self) -> Option<Slot<'_>> {
        let max = self.max.load(Ordering::Relaxed);
        let more = |taken: usize| (taken < max).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Slot(self))
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.freed.notify_one();
    }
}

impl InputRoom {
    /// Memory for inputs under this limit.
    #[must_use]
    pub fn new(memory: Memory) -> Self {
        Self { memory, queue: Queue::default() }
    }

    /// The limit, in bytes.
    pub(super) fn max(&self) -> usize {
        self.memory.max()
    }

    /// Holds `bytes` once they fit and all earlier requests have theirs. Never returns if `bytes` are more than the
    /// limit.
    pub(super) async fn hold(&self, bytes: usize) -> Held {
        let _first = self.queue.lock().await;
        self.memory.hold(bytes).await
    }
}
