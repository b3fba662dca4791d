//! What the orchestrator is doing and has done last, at one look.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{Orchestrator, RunningCycle};
use crate::{
    model::{CycleId, CycleRequest, Epoch, Name, Revision},
    ports::{Record, StoreError},
    schedule::LoopEntry,
};

/// What the orchestrator is doing and has done last.
pub struct Status {
    /// The record of the last cycle.
    pub last: Option<Arc<Record>>,
    /// Cycles ever recorded.
    pub total_cycles: u64,
    /// The cycles that run, the oldest first.
    pub running: Vec<RunningCycle>,
    /// Cycles that wait.
    pub queued: usize,
    /// The first [`WaitingCycle::MAX`] of them, by their ids.
    pub waiting: Vec<WaitingCycle>,
    /// The loops, by name.
    pub loops: Vec<LoopEntry>,
    /// The term of this process.
    pub epoch: Epoch,
    /// When this process started.
    pub started_at: Timestamp,
    /// Time since then.
    pub uptime: Duration,
    /// The configured id.
    pub orchestrator_id: Arc<str>,
    /// How many are registered.
    pub subsystem_count: usize,
    /// The oldest revision that can still be watched.
    pub oldest_revision: Revision,
    /// The newest revision.
    pub newest_revision: Revision,
    /// Why nothing can be written.
    pub store_error: Option<StoreError>,
    /// Watchers connected.
    pub watchers: usize,
}

/// A cycle that waits for its turn.
pub struct WaitingCycle {
    /// Its number.
    pub cycle_id: CycleId,
    /// What is asked for.
    pub request: Arc<CycleRequest>,
    /// The cycle before it that it waits for, and a subsystem that both have; `None` for that where both are over all.
    pub waits_for: Option<(CycleId, Option<Name>)>,
}

impl WaitingCycle {
    /// The most that a status lists: as many as run at one time.
    pub const MAX: usize = 256;
}

impl Orchestrator {
    /// What is being done and was done last.
    pub fn status(&self) -> Status {
        let running = self.0.live.running();
        let mut state = self.0.state();
        let state = &mut *state;
        let ids: Vec<_> = state.line.all_waiting().take(WaitingCycle::MAX).collect();
        let waiting = ids.into_iter().filter_map(|cycle_id| {
            let request = state.live.get(&cycle_id)?.request.clone();
            let waits_for = state.line.obstacle(cycle_id).map(|obstacle| (obstacle.cycle_id, obstacle.shared));
            Some(WaitingCycle { cycle_id, request, waits_for })
        });
        let waiting = waiting.collect();
        Status {
            last: state.last.clone(),
            total_cycles: state.recorded,
            running,
            queued: state.line.waiting(),
            waiting,
            loops: state.loops.iter().cloned().collect(),
            epoch: self.0.engine.epoch,
            started_at: self.0.started_at,
            uptime: self.0.started.elapsed(),
            orchestrator_id: self.0.engine.orchestrator_id.clone(),
            subsystem_count: state.registry.len(),
            oldest_revision: state.pruned_to.next(),
            newest_revision: state.last_revision,
            store_error: state.store_error.clone(),
            watchers: self.0.watchers.len(),
        }
    }
}
