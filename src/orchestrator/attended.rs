//! Cycles of parents: each ends when no call of the parent has waited for it for a while, and has a deadline that
//! counts from the call, whether it waits or runs.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    select,
    time::{Instant, sleep_until},
};

use super::{
    NotRecorded, Orchestrator, Refusal, Shared, State, Ticket,
    admission::{Admitted, Asked},
    ended::Ended,
};
use crate::{
    model::{CycleId, CycleRequest, Epoch, Name},
    ports::Record,
};

/// Longest time that a cycle goes on while no call waits for it. A parent that retries after a lost connection is back
/// before that.
const ALONE: Duration = Duration::from_secs(5);

/// The cycles of parents that are not recorded.
#[derive(Default)]
pub(super) struct Attended(BTreeMap<CycleId, Attendance>);

/// The calls that wait for a cycle.
struct Attendance {
    calls: usize,
    /// When the last of them ended. Without meaning while there are calls.
    alone_since: Instant,
    /// Its deadline; `None` if it has the configured one, which counts from its start.
    due: Option<Instant>,
    is_ending: bool,
}

impl Attended {
    /// Adds a cycle that enters the line.
    pub(super) fn enter(&mut self, admitted: &Admitted) {
        let now = Instant::now();
        let due = admitted.request.deadline.map(|deadline| now + deadline);
        self.0.insert(admitted.cycle_id, Attendance { calls: 0, alone_since: now, due, is_ending: false });
    }

    /// Removes a cycle, if it is one of these.
    pub(super) fn leave(&mut self, cycle_id: CycleId) {
        self.0.remove(&cycle_id);
    }

    /// A cycle is cancelled, if it is one of these.
    pub(super) fn ends(&mut self, cycle_id: CycleId) {
        if let Some(attendance) = self.0.get_mut(&cycle_id) {
            attendance.is_ending = true;
        }
    }

    /// The time until the deadline of a cycle that counts from its call.
    pub(super) fn time_left(&self, cycle_id: CycleId) -> Option<Duration> {
        Some(self.0.get(&cycle_id)?.due?.saturating_duration_since(Instant::now()))
    }
}

/// A handle to wait for a cycle of a parent. The cycle counts as attended until it is dropped.
pub struct AttendedTicket {
    ticket: Ticket,
    /// Its cycle, unless it was recorded earlier.
    attends: Option<(Arc<Shared>, CycleId)>,
}

impl AttendedTicket {
    /// Waits for the record.
    ///
    /// # Errors
    /// As those of [`Ticket::recorded`].
    pub async fn recorded(self) -> Result<Arc<Record>, NotRecorded> {
        self.ticket.clone().recorded().await
    }
}

impl Drop for AttendedTicket {
    fn drop(&mut self) {
        let Some((shared, cycle_id)) = self.attends.take() else { return };
        if let Some(attendance) = shared.state().attended.0.get_mut(&cycle_id) {
            attendance.calls -= 1;
            attendance.alone_since = Instant::now();
        }
        shared.attended_changed.notify_one();
    }
}

impl Orchestrator {
    /// Admits a cycle of a parent, or finds the one that an earlier call for the same cycle of the parent started. Its
    /// deadline counts from now. If this process ends before its turn, the next one runs it, if it is asked again.
    ///
    /// # Errors
    /// As those of [`Orchestrator::run_cycle`].
    pub async fn run_for_parent(&self, request: CycleRequest) -> Result<AttendedTicket, Refusal> {
        let admitted = match self.0.admit_once(request, false).await? {
            Asked::Recorded(record) => {
                return Ok(AttendedTicket { ticket: Ticket::of_record(record), attends: None });
            }
            Asked::Live(admitted) => admitted,
        };
        admitted.promise();
        let attends = self.0.state().attended.0.get_mut(&admitted.cycle_id).map(|attendance| {
            attendance.calls += 1;
            (self.0.clone(), admitted.cycle_id)
        });
        self.0.attended_changed.notify_one();
        Ok(AttendedTicket { ticket: admitted.ticket(), attends })
    }

    /// Ends the cycles of parents that called by this name in an epoch before `epoch`: a later term has begun.
    pub fn end_earlier(&self, name: &Name, epoch: Epoch) {
        let mut state = self.0.state();
        let is_earlier = |cycle_id: &CycleId| {
            let parent = state.live.get(cycle_id).and_then(|admitted| admitted.request.trigger.parent());
            parent.is_some_and(|parent| parent.subsystem == *name && parent.epoch < epoch)
        };
        let earlier: Vec<_> = state.attended.0.keys().copied().filter(is_earlier).collect();
        for cycle_id in earlier {
            state.end(cycle_id, Ended::Superseded);
        }
        drop(state);
        self.0.queue_changed.notify_one();
    }
}

impl State {
    /// Ends the cycles that nobody waits for, and those whose deadline has passed before their turn. Returns when the
    /// next one may have to end, and whether one has ended.
    fn end_unattended(&mut self, now: Instant) -> (Option<Instant>, bool) {
        let (mut next, mut ended): (Option<Instant>, Vec<_>) = (None, Vec::new());
        for (cycle_id, Attendance { calls, alone_since, due, is_ending }) in &self.attended.0 {
            let alone_until = (*calls == 0).then(|| *alone_since + ALONE);
            // Once it runs, it ends at its deadline by itself.
            let due = due.filter(|_| self.line.waits(*cycle_id));
            let at = [(alone_until, Ended::Alone), (due, Ended::Late)];
            let at = at.into_iter().filter_map(|(at, why)| Some((at?, why))).min();
            match at {
                _ if *is_ending => {}
                Some((at, why)) if at <= now => ended.push((*cycle_id, why)),
                Some((at, _)) => next = Some(next.map_or(at, |next| next.min(at))),
                None => {}
            }
        }
        for (cycle_id, why) in &ended {
            self.end(*cycle_id, *why);
        }
        (next, !ended.is_empty())
    }
}

impl Shared {
    /// Ends cycles of parents when their time has come, as long as the process lives.
    pub(super) async fn end_unattended(self: Arc<Self>) {
        loop {
            let (next, has_ended) = self.state().end_unattended(Instant::now());
            if has_ended {
                self.queue_changed.notify_one();
            }
            select! {
                biased;
                () = self.attended_changed.notified() => {}
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }
}
