//! What a replica does while it can't confirm that it leads: another one may call the same subsystems by now.

use jiff::Timestamp;

use super::{Orchestrator, Refusal, State, ended::Ended};
use crate::{model::Epoch, ports::StoreError};

impl Orchestrator {
    /// The lease has ended: running cycles are cancelled, no further ones begin, and no tick is accounted for. Records
    /// are still written, as long as no other replica has claimed to lead.
    pub fn lapse(&self) {
        let mut state = self.0.state();
        state.has_lapsed = true;
        state.hold_leases();
        self.0.history.set_unconfirmed(true);
        let running: Vec<_> = state.live.keys().copied().filter(|cycle_id| state.line.runs(*cycle_id)).collect();
        tracing::error!(
            cycles = running.len(),
            "this replica could not confirm in time that it leads: running cycles are cancelled, and none begins"
        );
        for cycle_id in running {
            state.end(cycle_id, Ended::Unconfirmed);
        }
    }

    /// The lease was renewed before another replica has claimed to lead: cycles go on. Ticks that were due meanwhile
    /// count as those of a time in which no process ran, and the leases of subsystems begin anew, as after one.
    pub fn confirm(&self) {
        let now = self.0.clock.now();
        let mut state = self.0.state();
        state.has_lapsed = false;
        state.release_leases();
        self.0.history.set_unconfirmed(false);
        state.loops.catch_up(now);
        drop(state);
        tracing::info!("this replica leads on: its lease was renewed");
        self.0.leases_changed.notify_one();
        self.0.loops_changed.notify_one();
        self.0.queue_changed.notify_one();
    }

    /// Another replica leads, for this term: nothing is written any more.
    pub fn fence(&self, by: Epoch) {
        self.0.history.set_unconfirmed(false);
        self.0.store_ends(&StoreError::Fenced { by });
    }
}

impl State {
    /// When the next tick fires; `None` also while none may.
    pub(super) fn next_tick_at(&self) -> Option<Timestamp> {
        self.loops.next_at().filter(|_| !self.has_lapsed)
    }

    /// The refusal of a request for what this replica does not know: `refusal`, unless another one may know it.
    pub(super) fn unknown(&self, refusal: Refusal) -> Refusal {
        if self.has_lapsed { Refusal::Unconfirmed } else { refusal }
    }

    /// True if a cycle whose turn has come may begin.
    pub(super) fn may_begin(&self) -> bool {
        !self.draining && !self.has_lapsed
    }
}
