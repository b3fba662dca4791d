//! The status of the orchestrator.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{Orchestrator, RunningCycle};
use crate::{
    model::{CycleId, CycleRequest, Epoch, Name, Revision},
    ports::{Record, StoreError},
    schedule::LoopEntry,
};

/// The running cycles, the last cycle, and the state of the orchestrator.
pub struct Status {
    /// The record of the last cycle.
    pub last: Option<Arc<Record>>,
    /// Number of cycles ever recorded.
    pub total_cycles: u64,
    /// The running cycles, the oldest first.
    pub running: Vec<RunningCycle>,
    /// Number of waiting cycles.
    pub queued: usize,
    /// The first [`WaitingCycle::MAX`] waiting cycles whose ids are noted, by id.
    pub waiting: Vec<WaitingCycle>,
    /// The loops, by name.
    pub loops: Vec<LoopEntry>,
    /// True while all loops are paused.
    pub loops_paused: bool,
    /// True if the store is only looked at.
    pub read_only: bool,
    /// The term of this process.
    pub epoch: Epoch,
    /// When this process started.
    pub started_at: Timestamp,
    /// Time since then.
    pub uptime: Duration,
    /// The configured id.
    pub orchestrator_id: Arc<str>,
    /// Number of registered subsystems.
    pub subsystem_count: usize,
    /// Number of expected subsystems that are not registered.
    pub missing_count: usize,
    /// The first [`Status::MAX_MISSING`] of them, by name.
    pub missing: Vec<Name>,
    /// The oldest revision that can still be watched.
    pub oldest_revision: Revision,
    /// The newest revision.
    pub newest_revision: Revision,
    /// Why the store can't be written, if so.
    pub store_error: Option<StoreError>,
    /// Number of connected watchers.
    pub watchers: usize,
}

impl Status {
    /// Most missing subsystems in a status: more than a person reads.
    pub const MAX_MISSING: usize = 100;
}

/// A waiting cycle.
pub struct WaitingCycle {
    /// Its id.
    pub cycle_id: CycleId,
    /// Its request.
    pub request: Arc<CycleRequest>,
    /// The cycle before it that it waits for, and a subsystem of both; `None` if both are over all subsystems.
    pub waits_for: Option<(CycleId, Option<Name>)>,
}

impl WaitingCycle {
    /// Most waiting cycles in a status: as many as run concurrently.
    pub const MAX: usize = 256;
}

/// Why this process should get no calls now. The text reveals nothing of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The process drains.
    #[error("draining")]
    Draining,
    /// The store can't be written, or a commit is late.
    #[error("the store can't be written")]
    StoreUnavailable,
    /// The process follows, and can't read the store.
    #[error("the store can't be read")]
    StoreUnreadable,
    /// The process follows, and could not take over.
    #[error("this replica can't lead: see its log, or unable_to_lead in its status")]
    UnableToLead,
    /// The process follows, and can't have the leader answer calls.
    #[error("this replica does not reach the leader: see its log")]
    LeaderUnreached,
}

/// No more writes are possible, so the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store has ended")]
pub struct StoreEnded;

impl Orchestrator {
    /// The configured id.
    pub fn id(&self) -> &Arc<str> {
        &self.0.engine.orchestrator_id
    }

    /// Why the store can't be written, if so.
    pub fn store_error(&self) -> Option<StoreError> {
        self.0.state().store_error.borrow().clone()
    }

    /// True if the store is only looked at, so that nothing can be run or changed.
    pub fn is_read_only(&self) -> bool {
        self.0.is_read_only
    }

    /// Checks that cycles and changes are accepted, or reads if the store is only looked at.
    ///
    /// # Errors
    /// The reason why not.
    pub fn check_ready(&self) -> Result<(), NotReady> {
        let state = self.0.state();
        if state.draining {
            Err(NotReady::Draining)
        } else if state.store_error.borrow().is_some() {
            Err(NotReady::StoreUnavailable)
        } else {
            Ok(())
        }
    }

    /// Checks that writes are possible, now or later.
    ///
    /// # Errors
    /// They are not.
    pub fn check_alive(&self) -> Result<(), StoreEnded> {
        if self.0.store_has_ended.is_cancelled() { Err(StoreEnded) } else { Ok(()) }
    }

    /// The status.
    pub fn status(&self) -> Status {
        let running = self.0.history.live().running();
        let mut state = self.0.state();
        let state = &mut *state;
        // Another process could give the others' ids again.
        let noted = state.line.all_waiting().take_while(|cycle_id| *cycle_id <= state.noted);
        let ids: Vec<_> = noted.take(WaitingCycle::MAX).collect();
        let waiting = ids.into_iter().filter_map(|cycle_id| {
            let request = state.live.get(&cycle_id)?.request.clone();
            let waits_for = state.line.obstacle(cycle_id).map(|obstacle| {
                let shared = obstacle.shared.map(|name| state.registry.present(&name).unwrap_or(name));
                (obstacle.cycle_id, shared)
            });
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
            loops_paused: state.loops.are_all_paused(),
            read_only: self.0.is_read_only,
            epoch: self.0.engine.epoch,
            started_at: self.0.started.time(),
            uptime: self.0.started.elapsed(),
            orchestrator_id: self.0.engine.orchestrator_id.clone(),
            subsystem_count: state.registry.len(),
            missing_count: state.registry.missing().len(),
            missing: state.registry.missing().iter().take(Status::MAX_MISSING).cloned().collect(),
            oldest_revision: self.0.history.pruned_to().next(),
            newest_revision: state.last_revision,
            store_error: state.store_error.borrow().clone(),
            watchers: self.0.history.watchers().len(),
        }
    }
}
