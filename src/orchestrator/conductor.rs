//! The life of a cycle, from its turn to its record. Each running cycle is a task that the conductor starts and owns.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{
    select,
    sync::oneshot,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    LiveCycle, NotRecorded, Shared, State,
    admission::{Admitted, Begun},
    line::max_running,
    writing::{LONGEST_PAUSE, ToWrite},
};
use crate::{
    clock::Clock,
    engine::{CycleRun, Engine, Part, Plan, Ran, Trace},
    model::{CycleId, CycleState, FinishedCycle, Revision, TraceId},
    ports::{AuditEntry, Durability, Record, StoreError, Write},
    record::{self, Encoded},
    tasks::joined,
};

impl State {
    /// True if no cycle is left to be run or recorded, except running ones.
    fn is_drained(&self) -> bool {
        self.draining && self.cancelled.is_empty()
    }
}

impl Shared {
    /// Runs cycles until the process drains, and then writes for the last time.
    ///
    /// # Errors
    /// The store accepts no more writes: a later epoch has taken it over, or it is damaged.
    pub(super) async fn conduct(self: Arc<Self>) -> Result<(), StoreError> {
        let ran = select! {
            biased;
            ran = self.run_cycles() => ran,
            error = self.can_not_record() => Err(error),
        };
        let ended = match ran {
            Ok(()) => self.close().await,
            Err(error) => Err(error),
        };
        self.give_up(ended.as_ref().err());
        ended
    }

    /// Waits until the process drains. Nothing is run or written.
    pub(super) async fn only_read(self: Arc<Self>) -> Result<(), StoreError> {
        while !self.state().draining {
            self.queue_changed.notified().await;
        }
        self.give_up(None);
        Ok(())
    }

    async fn run_cycles(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut running = JoinSet::new();
        loop {
            while let Some(admitted) = self.next_in_line() {
                let shared = self.clone();
                running.spawn(async move { shared.run(&admitted).await });
            }
            self.note_waiting();
            if running.is_empty() && self.state().is_drained() {
                return Ok(());
            }
            select! {
                biased;
                () = self.queue_changed.notified() => {}
                Some(ended) = running.join_next() => joined(ended).unwrap_or_else(|| Err(self.store_ended()))?,
                // Running cycles could not be recorded, and another process may use their subsystems by now: their
                // calls are dropped.
                () = self.store_has_ended.cancelled() => return Err(self.store_ended()),
            }
        }
    }

    /// Waits until the process drains and only cycles are left that can't be recorded, or can't begin, because the
    /// store can't be written: for longer than the longest pause between two attempts, and one more fails. Returns why.
    async fn can_not_record(&self) -> StoreError {
        const LOOK: Duration = Duration::from_millis(500);
        let mut store_error = self.state().store_error.subscribe();
        let mut since = None;
        loop {
            // A commit that is late may still succeed.
            let fails = |error: &Option<StoreError>| error.as_ref().is_some_and(|error| !error.is_late());
            if !fails(&store_error.borrow_and_update()) {
                since = None;
                // The sender lives as long as `self`.
                let _ = store_error.wait_for(fails).await;
            }
            if !self.state().draining || self.history.live().is_running() {
                since = None;
            } else if since.get_or_insert_with(Instant::now).elapsed() > LONGEST_PAUSE {
                // Everything that waits is written with it.
                match self.note(Durability::Buffered).await {
                    Err(error) if !error.is_late() => {
                        let cycles = listed(self.state().live.keys().copied());
                        tracing::error!(
                            %error,
                            cycles,
                            "not recorded: the next start records those of these cycles that had begun as INTERRUPTED"
                        );
                        return error;
                    }
                    _ => since = None,
                }
            }
            sleep(LOOK).await;
        }
    }

    /// A cycle whose turn has come, or a cycle that was cancelled before its turn and is to be recorded.
    fn next_in_line(&self) -> Option<Arc<Admitted>> {
        let mut state = self.state();
        if let Some(cancelled) = state.cancelled.pop_front() {
            return Some(cancelled);
        }
        if !state.may_begin() {
            return None;
        }
        let max = max_running(state.registry.relations());
        let cycle_id = state.line.start_next(max)?;
        state.live.get(&cycle_id).cloned()
    }

    /// Runs a cycle, unless it is cancelled before it begins, and records it.
    async fn run(&self, admitted: &Arc<Admitted>) -> Result<(), StoreError> {
        let trace = Trace::begin(admitted.request.trace.as_ref(), &*self.engine.spans, &self.engine.random);
        let Some(begun) = self.begin(admitted, trace.id()).await? else {
            return self.record_unbegun(admitted, trace).await;
        };
        let plan = self.plan_of(admitted.cycle_id, admitted.request.subset.clone()).await;
        let cycle = CycleRun {
            cycle_id: admitted.cycle_id,
            request: admitted.request.clone(),
            started_at: begun.at,
            deadline: self.time_of(admitted),
            plan: plan.clone(),
            trace,
        };
        let live = Arc::new(LiveCycle::new(admitted.cycle_id, &admitted.request, begun.at, plan.clone()));
        let progress = self.history.live().start(live.clone());
        let mut ran = self.engine.run(&cycle, &admitted.cancel, &progress).await;
        drop(progress);
        if let (CycleState::Cancelled, Some(ended)) = (ran.finished.state, admitted.ended()) {
            ran.finished.error = ended.explain(&ran.finished.error);
        }
        self.record(admitted, ran, Some((plan, live)), cycle.trace).await
    }

    /// The time that a cycle has from now on. A parent's has less the longer it has waited.
    fn time_of(&self, admitted: &Admitted) -> Duration {
        let left = self.state().attended.time_left(admitted.cycle_id);
        left.or(admitted.request.deadline).unwrap_or(self.settings().cycle_deadline)
    }

    /// Notes the start of a cycle, which survives the death of this process, before any subsystem is called. `None` if
    /// it was cancelled before that.
    async fn begin(&self, admitted: &Arc<Admitted>, trace_id: Option<TraceId>) -> Result<Option<Begun>, StoreError> {
        if admitted.cancel.is_cancelled() {
            return Ok(None);
        }
        // Subsystems that were registered meanwhile count too, so the plan is requested again; then it is usually up to
        // date.
        self.plan().await;
        let (begun, written) = oneshot::channel();
        let change = Begin { admitted: admitted.clone(), clock: self.clock, trace_id, begins: None, begun };
        self.ask_to_write(Box::new(change)).await?;
        written.await.map_err(|_| self.store_ended())
    }

    /// Records a cycle that was cancelled before it began.
    async fn record_unbegun(&self, admitted: &Arc<Admitted>, trace: Trace) -> Result<(), StoreError> {
        const WAITED: &str = "cancelled while it waited";
        let request = &admitted.request;
        let finished = FinishedCycle {
            cycle_id: admitted.cycle_id,
            epoch: self.engine.epoch,
            trigger: request.trigger.clone(),
            scheduled_at: Some(request.scheduled_at),
            request_id: request.request_id.clone(),
            triggered_by: request.triggered_by.clone(),
            trace_id: trace.id(),
            started_at: None,
            finished_at: self.clock.now(),
            duration: Duration::ZERO,
            state: CycleState::Cancelled,
            error: admitted.ended().map_or(WAITED.to_owned(), |ended| ended.explain(WAITED)),
            critical_path: Vec::new(),
            subsystems: Vec::new(),
        };
        self.record(admitted, Ran { finished, parts: Vec::new(), held: Vec::new() }, None, trace).await
    }

    /// Writes the record durably, with the new outputs, and publishes it.
    async fn record(
        &self,
        admitted: &Arc<Admitted>,
        ran: Ran,
        live: Option<(Arc<Plan>, Arc<LiveCycle>)>,
        trace: Trace,
    ) -> Result<(), StoreError> {
        let ended = Instant::now();
        let Ran { finished, parts, held } = ran;
        let (recorded, written) = oneshot::channel();
        let change = Recording {
            admitted: admitted.clone(),
            encoded: record::encode(&finished, self.settings().max_record_bytes),
            ran_for: finished.started_at.map(|_| finished.duration),
            outputs: parts.iter().filter_map(|part| part.output.as_ref()).map(|output| output.payload.len()).sum(),
            parts,
            live,
            record: None,
            started: None,
            cancelled: None,
            recorded,
        };
        let start = Instant::now();
        self.ask_to_write(Box::new(change)).await?;
        written.await.map_err(|_| self.store_ended())?;
        let commit = start..Instant::now();
        drop(held);
        tell(&finished);
        if let Some(name) = finished.trigger.loop_name().filter(|_| finished.state == CycleState::Succeeded)
            && self.state().loops.warns_of_empty(name, finished.subsystems.is_empty())
        {
            tracing::warn!(
                "loop" = %name,
                "the cycles of this loop call nothing, because no subsystem is registered; register some, or stop the \
                 loop"
            );
        }
        if let Trace::Collected(spans) = trace {
            self.engine.spans.ended(spans.finish(&finished, ended, commit));
        }
        Ok(())
    }

    /// No more writes are possible: notifies all waiting callers.
    fn give_up(&self, error: Option<&StoreError>) {
        let mut state = self.state();
        state.draining = true;
        for admitted in state.live.values() {
            admitted.put_off(match error {
                Some(error) => state.unavailable(admitted.cycle_id, error.clone()),
                None => NotRecorded::Draining,
            });
        }
        drop(state);
        self.closed.cancel();
        // Another replica adds what follows.
        if !matches!(error, Some(StoreError::Fenced { .. })) {
            self.history.close();
        }
    }

    /// The last write of this process, which waits for a late commit.
    async fn close(&self) -> Result<(), StoreError> {
        self.changes.close();
        self.changes.wait().await;
        loop {
            self.no_late_commit().await;
            self.write_last_sums().await;
            let closed = self.edit(|_| Write { close: true, ..Write::default() }, |_| ()).await;
            if !closed.as_ref().is_err_and(StoreError::is_late) {
                self.publish_last_checkpoint().await;
                return closed;
            }
        }
    }
}

/// These ids, in one line of the log.
fn listed(mut ids: impl ExactSizeIterator<Item = CycleId>) -> String {
    /// Most ids that are named; further ones are counted.
    const NAMED: usize = 20;
    let named: Vec<_> = ids.by_ref().take(NAMED).map(|id| id.to_string()).collect();
    let more = if ids.len() > 0 { format!(" and {} more", ids.len()) } else { String::new() };
    named.join(", ") + &more
}

/// The start of a cycle.
struct Begin {
    admitted: Arc<Admitted>,
    clock: Clock,
    trace_id: Option<TraceId>,
    /// Its entry that is being written.
    begins: Option<Begun>,
    begun: oneshot::Sender<Option<Begun>>,
}

impl ToWrite for Begin {
    fn add_to(&mut self, write: &mut Write, _: &State) {
        let is_cancelled = self.admitted.cancel.is_cancelled();
        self.begins = (!is_cancelled).then(|| Begun { at: self.clock.now(), trace_id: self.trace_id });
        write.open.extend(self.begins.map(|begun| self.admitted.to_begun(begun)));
    }

    fn insists(&self) -> Option<&Arc<Admitted>> {
        Some(&self.admitted)
    }

    fn apply(&mut self, state: &mut State) {
        let Some(begun) = self.begins else { return };
        let request = &self.admitted.request;
        if let Some(name) = request.trigger.loop_name() {
            state.loops.begun(name, request.scheduled_at, begun.at);
        }
    }

    fn done(self: Box<Self>) {
        let _ = self.begun.send(self.begins);
    }
}

/// The record of a cycle.
struct Recording {
    admitted: Arc<Admitted>,
    encoded: Encoded,
    ran_for: Option<Duration>,
    parts: Vec<Part>,
    /// Bytes of their outputs.
    outputs: usize,
    /// Its plan and progress; `None` if it did not run.
    live: Option<(Arc<Plan>, Arc<LiveCycle>)>,
    record: Option<Arc<Record>>,
    /// The events of the call that started it and of the one that cancelled it, as far as they are written with it.
    started: Option<AuditEntry>,
    cancelled: Option<AuditEntry>,
    recorded: oneshot::Sender<()>,
}

impl ToWrite for Recording {
    fn prepare(&mut self, last: &mut Revision, now: Timestamp) {
        *last = last.next();
        self.record = Some(Arc::new(self.encoded.at(*last)));
        self.started = self.admitted.event_of_record(*last, now);
        self.cancelled = self.admitted.event_of_cancel(*last, now);
    }

    fn add_to(&mut self, write: &mut Write, state: &State) {
        write.records.extend(self.record.as_deref().cloned());
        let all_are_registered = self.live.as_ref().is_some_and(|(plan, _)| state.registry.is_as_planned(plan));
        // Outputs of subsystems that were unregistered while the cycle ran are dropped. Those of renamed ones are
        // stored under their present name.
        let present_name = |part: &Part| {
            if all_are_registered {
                return Some(part.name().clone());
            }
            let registered = state.registry.get_by_any_name(part.name());
            let registered = registered.filter(|it| Arc::ptr_eq(&it.member.standing, &part.standing));
            registered.map(|it| it.name().clone())
        };
        let outputs = self.parts.iter().filter_map(|part| Some((present_name(part)?, part.output.clone()?)));
        write.outputs.extend(outputs);
        write.audit.extend(self.started.iter().chain(&self.cancelled).cloned());
        write.durability = Durability::Durable;
    }

    fn size(&self) -> (usize, usize) {
        (self.encoded.size() + self.outputs, self.parts.len() + 1)
    }

    fn insists(&self) -> Option<&Arc<Admitted>> {
        Some(&self.admitted)
    }

    fn committed(&mut self, engine: &Engine) {
        engine.publish(std::mem::take(&mut self.parts));
    }

    fn apply(&mut self, state: &mut State) {
        let Some(record) = &self.record else { return };
        let cycle_id = self.admitted.cycle_id;
        state.line.leave(cycle_id);
        state.live.remove(&cycle_id);
        state.attended.leave(cycle_id);
        if self.cancelled.is_some() {
            self.admitted.cancel_is_written();
        }
        if let Some(key) = self.admitted.request.key() {
            state.requests.remove(&key);
        }
        if let Some(name) = record.trigger.loop_name() {
            state.loops.finished(name, record.finished_at);
        }
        if let Some((_, live)) = &self.live {
            live.recorded_as(record.revision);
        }
        state.add_record(record.clone(), self.ran_for);
    }

    fn done(self: Box<Self>) {
        if let Some(record) = self.record {
            self.admitted.finish(record);
        }
        let _ = self.recorded.send(());
    }
}

/// Writes one line in the log for each cycle; at DEBUG for a successful one.
fn tell(cycle: &FinishedCycle) {
    let (cycle_id, state, error) = (cycle.cycle_id.0, cycle.state.name(), &cycle.error);
    // To the microsecond, without the digits that binary fractions add.
    let duration_ms = (cycle.duration.as_secs_f64() * 1e6).round() / 1e3;
    let loop_name = cycle.trigger.loop_name().map(tracing::field::display);
    let trace_id = cycle.trace_id.map(tracing::field::display);
    match cycle.state {
        CycleState::Succeeded => {
            tracing::debug!(cycle_id, state, duration_ms, "loop" = loop_name, trace_id, "recorded");
        }
        _ => {
            tracing::warn!(
                cycle_id,
                state,
                error,
                duration_ms,
                "loop" = loop_name,
                trace_id,
                "a cycle did not succeed"
            );
        }
    }
}
