//! Runs admitted cycles one after another: takes the next in line, notes durably that it begins, has the engine run
//! it, writes its record, and publishes that.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    select,
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{LiveCycle, Refusal, Shared, State};
use crate::{
    engine::{Cycle, Plan, Ran, Share, Trace},
    memory::Held,
    model::{CycleId, CycleRequest, CycleState, Epoch, FinishedCycle, OverlapPolicy, TraceId, Trigger},
    ports::{Durability, OpenCycle, Record, Stage, StoreError, Write},
    record,
};

/// Waits between tries to write: from the first, doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A cycle that has its number.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) cycle_id: CycleId,
    pub(super) request: CycleRequest,
    /// Of the request, as long as the cycle is in line or runs. One of a loop is kept by the loop.
    _room: Option<Held>,
    pub(super) cancel: CancellationToken,
    begun: OnceLock<Begun>,
    /// Its record, or why that is not written yet.
    done: watch::Sender<Option<Result<Arc<Record>, Refusal>>>,
}

/// What is known of a cycle since its beginning was written.
#[derive(Clone, Copy, Debug)]
struct Begun {
    at: Timestamp,
    trace_id: Option<TraceId>,
}

/// A cycle that somebody waits for.
#[derive(Debug)]
pub struct Ticket {
    /// Its number.
    pub cycle_id: CycleId,
    done: watch::Receiver<Option<Result<Arc<Record>, Refusal>>>,
}

impl Ticket {
    /// The ticket of a cycle that was recorded earlier.
    pub(super) fn of_record(record: Arc<Record>) -> Self {
        Self { cycle_id: record.cycle_id, done: watch::channel(Some(Ok(record))).1 }
    }

    /// The record, if there is one now.
    pub fn record_now(&self) -> Option<Arc<Record>> {
        self.done.borrow().clone()?.ok()
    }

    /// Waits for the record.
    ///
    /// # Errors
    /// It could not be written when it was due, or this process ends before it is.
    pub async fn recorded(mut self) -> Result<Arc<Record>, Refusal> {
        match self.done.wait_for(Option::is_some).await {
            Ok(done) => done.clone().unwrap_or(Err(Refusal::Draining)),
            Err(_closed) => Err(Refusal::Draining),
        }
    }
}

impl Admitted {
    pub(super) fn ticket(&self) -> Ticket {
        Ticket { cycle_id: self.cycle_id, done: self.done.subscribe() }
    }

    pub(super) fn to_open(&self) -> OpenCycle {
        let begun = self.begun.get();
        let trace_of_caller = || self.request.trace.as_ref().map(|trace| trace.trace_id);
        OpenCycle {
            cycle_id: self.cycle_id,
            trigger: self.request.trigger.clone(),
            scheduled_at: self.request.scheduled_at,
            request_id: self.request.request_id.clone(),
            trace_id: begun.map_or_else(trace_of_caller, |begun| begun.trace_id),
            stage: begun.map_or(Stage::Waiting(None), |begun| Stage::Begun(begun.at)),
        }
    }
}

impl State {
    /// The one way into the line, for callers and loops alike.
    pub(super) fn admit(
        &mut self,
        request: CycleRequest,
        room: Option<Held>,
        max_queued: usize,
    ) -> Result<Arc<Admitted>, Refusal> {
        if self.draining {
            return Err(Refusal::Draining);
        }
        if let Some(error) = &self.store_error {
            return Err(Refusal::StoreUnavailable(None, error.clone()));
        }
        let running = self.running.as_ref().or(self.queue.front());
        match (request.overlap, running) {
            (OverlapPolicy::Skip, Some(running)) => return Err(Refusal::CycleRunning(running.cycle_id)),
            (OverlapPolicy::BufferOne, Some(_)) => {
                let waits = self.queue.iter().find(|waiting| waiting.request.trigger == request.trigger);
                if let Some(waits) = waits {
                    return Err(Refusal::CycleWaiting(waits.cycle_id));
                }
            }
            _ => {}
        }
        if running.is_some() && self.queue.len() >= max_queued {
            return Err(Refusal::QueueFull(self.queue.len()));
        }
        if let (OverlapPolicy::CancelOther, Some(running)) = (request.overlap, &self.running) {
            running.cancel.cancel();
        }
        self.last_admitted = self.last_admitted.next();
        let admitted = Arc::new(Admitted {
            cycle_id: self.last_admitted,
            cancel: CancellationToken::new(),
            begun: OnceLock::new(),
            done: watch::Sender::new(None),
            request,
            _room: room,
        });
        if let Some(request_id) = &admitted.request.request_id {
            self.requests.insert(request_id.clone(), admitted.clone());
        }
        self.queue.push_back(admitted.clone());
        Ok(admitted)
    }
}

impl Shared {
    /// Runs cycles until the process drains.
    ///
    /// # Errors
    /// The store takes nothing any more: a later epoch has taken it over, or it is damaged.
    pub(super) async fn conduct(self: Arc<Self>) -> Result<(), StoreError> {
        let ended = self.run_cycles().await;
        if let Err(error) = &ended {
            self.give_up(error);
        }
        ended
    }

    async fn run_cycles(&self) -> Result<(), StoreError> {
        while let Some(admitted) = self.next_in_line().await? {
            let trace = Trace::begin(admitted.request.trace.as_ref(), &*self.engine.spans);
            let (ran, plan, trace) = match self.begin(&admitted, trace).await? {
                Ok(cycle) => {
                    let ran = select! {
                        ran = self.engine.run(&cycle, &admitted.cancel, &self.live) => ran,
                        // It could not be recorded, and another process may have its subsystems by now.
                        () = self.store_has_ended.cancelled() => return Err(self.store_ended()),
                    };
                    (ran, Some(cycle.plan), cycle.trace)
                }
                Err(trace) => {
                    let finished = self.cancelled_in_line(&admitted, trace.id());
                    (Ran { finished, shares: Vec::new(), held: Vec::new() }, None, trace)
                }
            };
            let ended = Instant::now();
            let (finished, commit) = self.record(&admitted, ran, plan.as_ref()).await?;
            tell(&finished);
            if let Trace::Collected(spans) = trace {
                self.engine.spans.ended(spans.finish(&finished, ended, commit));
            }
        }
        self.close().await
    }

    async fn next_in_line(&self) -> Result<Option<Arc<Admitted>>, StoreError> {
        loop {
            {
                let mut state = self.state();
                if let Some(admitted) = state.queue.pop_front() {
                    state.running = Some(admitted.clone());
                    return Ok(Some(admitted));
                }
                if state.draining {
                    return Ok(None);
                }
            }
            select! {
                () = self.queue_changed.notified() => {}
                () = self.store_has_ended.cancelled() => return Err(self.store_ended()),
            }
        }
    }

    /// Why nothing will be written any more.
    fn store_ended(&self) -> StoreError {
        let error = self.state().store_error.clone().filter(StoreError::is_final);
        error.unwrap_or_else(|| StoreError::Fenced(self.engine.epoch.next()))
    }

    /// Notes that the cycle begins, in a way that survives the death of this process, before any subsystem hears of
    /// it. Gives the trace back if it was cancelled before that.
    async fn begin(&self, admitted: &Admitted, trace: Trace) -> Result<Result<Cycle, Trace>, StoreError> {
        let settings = self.settings();
        let trace_id = trace.id();
        // What was registered meanwhile counts too: so it is asked for again below, and has then hardly to be waited for.
        self.plan().await;
        let opened = |_: &State| Write {
            durability: Durability::Buffered,
            open: vec![OpenCycle { stage: Stage::Begun(self.clock.now()), trace_id, ..admitted.to_open() }],
            ..Write::default()
        };
        let start = || admitted.begun.get_or_init(|| Begun { at: self.clock.now(), trace_id }).at;
        let begun = self.insist(admitted, opened, |_| {
            start();
        });
        select! {
            biased;
            () = admitted.cancel.cancelled() => return Ok(Err(trace)),
            begun = begun => begun?,
        }
        let started_at = start();
        let revision = {
            let mut state = self.state();
            if let Some(name) = admitted.request.trigger.loop_name() {
                state.loops.begun(name, admitted.request.scheduled_at, started_at);
            }
            state.last_revision
        };
        let plan = self.plan().await;
        let cycle = Cycle {
            cycle_id: admitted.cycle_id,
            request: admitted.request.clone(),
            started_at,
            deadline: admitted.request.deadline.unwrap_or(settings.cycle_deadline),
            plan: plan.clone(),
            trace,
        };
        let live =
            LiveCycle { cycle_id: cycle.cycle_id, request: cycle.request.clone(), started_at: cycle.started_at, plan };
        self.live.start(Arc::new(live), revision);
        Ok(Ok(cycle))
    }

    fn cancelled_in_line(&self, admitted: &Admitted, trace_id: Option<TraceId>) -> FinishedCycle {
        FinishedCycle {
            cycle_id: admitted.cycle_id,
            epoch: self.engine.epoch,
            trigger: admitted.request.trigger.clone(),
            scheduled_at: Some(admitted.request.scheduled_at),
            request_id: admitted.request.request_id.clone(),
            trace_id,
            started_at: None,
            finished_at: self.clock.now(),
            duration: Duration::ZERO,
            state: CycleState::Cancelled,
            error: "cancelled while it waited".into(),
            critical_path: Vec::new(),
            subsystems: Vec::new(),
        }
    }

    /// Writes the record, durably, and publishes it with what the cycle has made. Returns from when to when it wrote.
    async fn record(
        &self,
        admitted: &Admitted,
        Ran { finished, shares, held: _held }: Ran,
        plan: Option<&Arc<Plan>>,
    ) -> Result<(FinishedCycle, Range<Instant>), StoreError> {
        self.live.end();
        let revision = self.state().last_revision.next();
        let record = Arc::new(record::encode(&finished, revision, self.settings().max_record_bytes));
        let is_current = |state: &State, share: &Share| {
            // It may have been unregistered while the cycle ran, and is then forgotten.
            state.registry.get(share.name()).is_ok_and(|now| Arc::ptr_eq(&now.member.standing, &share.standing))
        };
        let build = |state: &State| {
            let all_are = plan.is_some_and(|plan| state.registry.is_as_planned(plan));
            let current = shares.iter().filter(|share| all_are || is_current(state, share));
            let outputs = current.filter_map(|share| Some((share.name().clone(), share.output.clone()?)));
            Write { records: vec![(*record).clone()], outputs: outputs.collect(), ..Write::default() }
        };
        let publish = |state: &mut State| {
            state.running = None;
            if let Some(request_id) = &admitted.request.request_id {
                state.requests.remove(request_id);
            }
            if let Some(name) = finished.trigger.loop_name() {
                state.loops.finished(name, finished.finished_at);
            }
            let ran = finished.started_at.is_some();
            state.publish(record.clone(), ran.then_some(finished.duration));
        };
        let start = Instant::now();
        self.insist(admitted, build, publish).await?;
        let commit = start..Instant::now();
        self.engine.publish(shares);
        self.newest.send_replace(revision);
        admitted.done.send_replace(Some(Ok(record)));
        Ok((finished, commit))
    }

    /// Writes until it is written. Whoever waits for the cycle learns of the first failure, and nothing new is
    /// admitted in between.
    async fn insist(
        &self,
        admitted: &Admitted,
        build: impl Fn(&State) -> Write,
        apply: impl Fn(&mut State),
    ) -> Result<(), StoreError> {
        let mut pause = RETRY.0;
        loop {
            let applied = self.write(&build, |state| {
                state.store_error = None;
                apply(state);
            });
            let error = match applied.await {
                Ok(()) => {
                    // Whoever comes to it from now on waits for the record.
                    admitted.done.send_if_modified(|done| done.take_if(|done| done.is_err()).is_some());
                    return Ok(());
                }
                Err(error) if error.is_final() => return Err(error),
                Err(error) => error,
            };
            tracing::error!(cycle_id = admitted.cycle_id.0, %error, "can't write the record; trying again in {pause:?}");
            let refusal = Refusal::StoreUnavailable(Some(admitted.cycle_id), error.clone());
            self.state().store_error = Some(error);
            admitted.done.send_replace(Some(Err(refusal)));
            sleep(pause).await;
            pause = (pause * 2).min(RETRY.1);
        }
    }

    /// Nothing will be written any more: tells everyone who waits.
    fn give_up(&self, error: &StoreError) {
        let mut state = self.state();
        state.draining = true;
        for admitted in state.queue.iter().chain(&state.running) {
            let refusal = Refusal::StoreUnavailable(Some(admitted.cycle_id), error.clone());
            admitted.done.send_replace(Some(Err(refusal)));
        }
        drop(state);
        self.closed.cancel();
    }

    /// The last write of this process.
    async fn close(&self) -> Result<(), StoreError> {
        self.changes.close();
        self.changes.wait().await;
        let written = self.write(|_| Write { close: true, ..Write::default() }, |_| ()).await;
        self.closed.cancel();
        written
    }
}

/// One line in the log for each cycle; that of one that succeeded is for those who look closely.
fn tell(cycle: &FinishedCycle) {
    let (cycle_id, state, error) = (cycle.cycle_id.0, cycle.state.name(), &cycle.error);
    let duration_ms = cycle.duration.as_secs_f64() * 1e3;
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

/// The record of a cycle that an earlier process had begun and not finished, or had recorded and whose record is lost.
pub(super) fn interrupted(
    cycle_id: CycleId,
    open: Option<&OpenCycle>,
    is_lost: bool,
    epoch: Epoch,
    now: Timestamp,
) -> FinishedCycle {
    let open = open.filter(|open| open.stage != Stage::Unknown);
    let started_at = open.and_then(|open| match open.stage {
        Stage::Begun(at) => Some(at),
        Stage::Waiting(_) | Stage::Unknown => None,
    });
    // The clock may have been set back since it started.
    let finished_at = started_at.map_or(now, |started_at| now.max(started_at));
    let duration = started_at.map(|started_at| finished_at.duration_since(started_at));
    FinishedCycle {
        cycle_id,
        epoch,
        trigger: open.map_or(Trigger::Unknown, |open| open.trigger.clone()),
        scheduled_at: open.map(|open| open.scheduled_at),
        request_id: open.and_then(|open| open.request_id.clone()),
        trace_id: open.and_then(|open| open.trace_id),
        started_at,
        finished_at,
        duration: duration.and_then(|duration| duration.try_into().ok()).unwrap_or_default(),
        state: CycleState::Interrupted,
        error: if is_lost {
            "its record was lost with the damaged end of the store".into()
        } else {
            "the process that ran it ended in the middle of it".into()
        },
        critical_path: Vec::new(),
        subsystems: Vec::new(),
    }
}
