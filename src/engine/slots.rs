//! The bounds on calls over all running cycles together: on their number, and on the bytes of their inputs.
//!
//! Both are given first in, first out. A run has one request at a time, so that they go to the cycles in turn.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Mutex, Notify};

use crate::memory::{Held, Memory};

/// Call slots: the number of calls that may be made at one time.
#[derive(Debug)]
pub struct Slots {
    max: AtomicUsize,
    taken: AtomicUsize,
    /// Only the first in line waits for it.
    freed: Notify,
    queue: Queue,
}

/// A call slot. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Slot<'a>(&'a Slots);

/// Room for the inputs of calls.
#[derive(Debug)]
pub struct InputRoom {
    memory: Memory,
    queue: Queue,
}

/// The request that holds this lock is the first in line. The library gives the lock to the others in the order in which
/// they came.
type Queue = Mutex<()>;

impl Slots {
    /// This number of slots, all of them free.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { max: max.into(), taken: 0.into(), freed: Notify::new(), queue: Queue::default() }
    }

    /// Changes their number. If more are taken, those calls go on, and new ones begin once fewer than `max` are left.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
        self.freed.notify_one();
    }

    /// Takes a slot, if one is free and no earlier request waits.
    pub(super) fn try_take(&self) -> Option<Slot<'_>> {
        let _first = self.queue.try_lock().ok()?;
        self.add()
    }

    /// Takes a slot once one is free and all earlier requests are met.
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
    /// Room in this memory.
    #[must_use]
    pub fn new(memory: Memory) -> Self {
        Self { memory, queue: Queue::default() }
    }

    /// The limit, in bytes.
    pub(super) fn max(&self) -> usize {
        self.memory.max()
    }

    /// Holds `bytes`, if there is room and no earlier request waits.
    pub(super) fn try_hold(&self, bytes: usize) -> Option<Held> {
        let _first = self.queue.try_lock().ok()?;
        self.memory.try_hold(bytes).ok()
    }

    /// Holds `bytes` once there is room and all earlier requests are met. Never returns if `bytes` are more than the limit.
    pub(super) async fn hold(&self, bytes: usize) -> Held {
        let _first = self.queue.lock().await;
        self.memory.hold(bytes).await
    }
}
