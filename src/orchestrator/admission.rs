//! Admission to the line of cycles, for callers and loops: applies the overlap policy, and gives the cycle its id.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    NotCancelled, NotRecorded, Orchestrator, Refusal, Shared, State,
    ended::Ended,
    line::{Locks, max_running},
    refusal::NotAdmitted,
};
use crate::{
    memory::{Full, Held},
    model::{AuditEvent, Cause, CycleId, CycleRequest, OverlapPolicy, RequestKey, Revision, TraceId, Trigger},
    ports::{AuditEntry, Durability, OpenCycle, Record, Stage, Write},
    record,
};

/// An admitted cycle, from its id to its record.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) cycle_id: CycleId,
    pub(super) request: Arc<CycleRequest>,
    /// Memory of the request while the cycle is in line or runs. The loop holds the memory of its own requests.
    _room: Option<Held>,
    pub(super) cancel: CancellationToken,
    /// True if the event of the call that started it is written with its admission; else it is written with its record.
    is_async: bool,
    /// The first call that cancels it, or the service itself.
    cancelled_by: OnceLock<Cause>,
    /// Why the service itself cancels it.
    ended: OnceLock<Ended>,
    /// True once the event of that call is written with its record.
    cancel_is_written: AtomicBool,
    /// True if its caller has received its id and does not wait: the next process runs it if this one does not.
    is_promised: AtomicBool,
    /// Its record, or the reason why it is not written yet.
    done: watch::Sender<Option<Result<Arc<Record>, NotRecorded>>>,
}

/// The start of a cycle, as it was written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    pub(super) at: Timestamp,
    pub(super) trace_id: Option<TraceId>,
}

/// A handle to wait for a cycle.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// Its id.
    pub cycle_id: CycleId,
    done: watch::Receiver<Option<Result<Arc<Record>, NotRecorded>>>,
}

impl Ticket {
    /// The ticket of a cycle that was recorded earlier.
    pub(super) fn of_record(record: Arc<Record>) -> Self {
        Self { cycle_id: record.cycle_id, done: watch::channel(Some(Ok(record))).1 }
    }

    /// The record, if it is written.
    pub fn record_now(&self) -> Option<Arc<Record>> {
        self.done.borrow().clone()?.ok()
    }

    /// Waits for the record.
    ///
    /// # Errors
    /// The record could not be written yet, or the process ends before that.
    pub async fn recorded(mut self) -> Result<Arc<Record>, NotRecorded> {
        match self.done.wait_for(Option::is_some).await {
            Ok(done) => done.clone().unwrap_or(Err(NotRecorded::Draining)),
            Err(_closed) => Err(NotRecorded::Draining),
        }
    }
}

impl Admitted {
    /// A cycle whose caller waits for its record, unless `is_async`: then the caller only waits for its id.
    pub(super) fn new(cycle_id: CycleId, request: Arc<CycleRequest>, room: Option<Held>, is_async: bool) -> Arc<Self> {
        Arc::new(Self {
            cycle_id,
            request,
            _room: room,
            cancel: CancellationToken::new(),
            is_async,
            cancelled_by: OnceLock::new(),
            ended: OnceLock::new(),
            cancel_is_written: AtomicBool::new(false),
            is_promised: AtomicBool::new(is_async),
            done: watch::Sender::new(None),
        })
    }

    pub(super) fn ticket(&self) -> Ticket {
        Ticket { cycle_id: self.cycle_id, done: self.done.subscribe() }
    }

    /// From now on, a graceful end of the process leaves the cycle to the next one if it still waits.
    pub(super) fn promise(&self) {
        self.is_promised.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_promised(&self) -> bool {
        self.is_promised.load(Ordering::Relaxed)
    }

    /// The event of the call that started it, to be written with its admission.
    pub(super) fn event_of_admission(&self, now: Timestamp) -> Option<AuditEntry> {
        let cause = self.request.cause.as_ref().filter(|_| self.is_async)?;
        Some(self.event(cause, Revision::default(), now))
    }

    /// The event of the call that started it, to be written with its record.
    pub(super) fn event_of_record(&self, revision: Revision, now: Timestamp) -> Option<AuditEntry> {
        Some(self.event(self.cause_for_record()?, revision, now))
    }

    /// The event of the call that cancelled it, to be written with its record.
    pub(super) fn event_of_cancel(&self, revision: Revision, now: Timestamp) -> Option<AuditEntry> {
        Some(self.event(self.cancelled_by.get()?, revision, now))
    }

    pub(super) fn cancel_is_written(&self) {
        self.cancel_is_written.store(true, Ordering::Relaxed);
    }

    fn event(&self, cause: &Cause, revision: Revision, now: Timestamp) -> AuditEntry {
        record::encode_event(&AuditEvent { cycle_id: self.cycle_id, revision, ..cause.event(now) })
    }

    fn cause_for_record(&self) -> Option<&Cause> {
        self.request.cause.as_deref().filter(|_| !self.is_async)
    }

    /// Passes its written record to waiting callers.
    pub(super) fn finish(&self, record: Arc<Record>) {
        self.done.send_replace(Some(Ok(record)));
    }

    /// Notifies waiting callers that its record can't be written now, or not by this process.
    pub(super) fn put_off(&self, why: NotRecorded) {
        self.done.send_replace(Some(Err(why)));
    }

    /// Lets new callers wait for the record again, because the store can be written again.
    pub(super) fn resume(&self) {
        self.done.send_if_modified(|done| done.take_if(|done| done.is_err()).is_some());
    }

    /// Records why the service itself cancels it, for its event and its record, unless a caller has cancelled it.
    pub(super) fn end(&self, why: Ended) {
        if self.cancelled_by.set(Cause::of_service(why.action())).is_ok() {
            // Nothing else sets it.
            let _ = self.ended.set(why);
        }
    }

    /// Why the service itself has cancelled it, if it has.
    pub(super) fn ended(&self) -> Option<Ended> {
        self.ended.get().copied()
    }

    /// Its stored form while it waits.
    pub(super) fn to_waiting(&self) -> OpenCycle {
        // The next process decides the ticks of a loop again.
        let is_asked_for = matches!(self.request.trigger, Trigger::Manual | Trigger::Parent(_));
        let stage = Stage::Waiting(is_asked_for.then(|| record::encode_request(&self.request)));
        self.to_open(stage, self.request.trace.as_ref().map(|trace| trace.trace_id))
    }

    /// Its stored form from its start until it is recorded.
    pub(super) fn to_begun(&self, Begun { at, trace_id }: Begun) -> OpenCycle {
        self.to_open(Stage::Begun(at), trace_id)
    }

    fn to_open(&self, stage: Stage, trace_id: Option<TraceId>) -> OpenCycle {
        let CycleRequest { trigger, scheduled_at, request_id, triggered_by, .. } = &*self.request;
        OpenCycle {
            cycle_id: self.cycle_id,
            trigger: trigger.clone(),
            scheduled_at: *scheduled_at,
            request_id: request_id.clone(),
            triggered_by: triggered_by.clone(),
            trace_id,
            audit: self.cause_for_record().map(record::encode_cause),
            stage,
        }
    }
}

/// The result of looking for the cycle of a request.
pub(super) enum Asked {
    Recorded(Arc<Record>),
    Live(Arc<Admitted>),
}

impl State {
    /// The locks of a cycle of this request.
    fn locks_of(&self, request: &CycleRequest) -> Locks {
        request.subset.as_ref().map_or(Locks::All, |subset| Locks::Names(self.registry.locks_of(subset)))
    }

    /// Admits a cycle, or refuses it. With `is_async`, it is promised to its caller.
    pub(super) fn admit(
        &mut self,
        request: Arc<CycleRequest>,
        room: Option<Held>,
        is_async: bool,
        max_queued: usize,
    ) -> Result<Arc<Admitted>, NotAdmitted> {
        if self.draining {
            return Err(NotAdmitted::Draining);
        }
        if let Some(error) = &*self.store_error.borrow() {
            return Err(NotAdmitted::StoreUnavailable(error.clone()));
        }
        let locks = self.locks_of(&request);
        let conflict = self.line.first_conflict(&locks);
        match (request.overlap, conflict) {
            (OverlapPolicy::Skip, Some(other)) => return Err(NotAdmitted::CycleRunning(other)),
            (OverlapPolicy::BufferOne, Some(_)) => {
                let is_alike = |other: &&Arc<Admitted>| {
                    self.line.waits(other.cycle_id) && other.request.trigger == request.trigger
                };
                let alike = self.live.values().filter(is_alike).map(|other| other.cycle_id).collect();
                if let Some(waits) = self.line.first_conflict_of(&alike, &locks) {
                    return Err(NotAdmitted::CycleWaiting(waits));
                }
            }
            _ => {}
        }
        // Cycles that were cancelled before their turn count until they are recorded.
        let waiting = self.live.len() - self.line.running();
        let has_to_wait = conflict.is_some() || self.line.running() >= max_running(self.registry.relations());
        if has_to_wait && waiting >= max_queued {
            return Err(NotAdmitted::QueueFull(waiting));
        }
        if request.overlap == OverlapPolicy::CancelOther {
            for running in self.line.running_conflicts(&locks) {
                self.cancel(running);
            }
        }
        if let Some(cause) = &request.cause {
            cause.own_event.set();
        }
        self.last_admitted = self.last_admitted.next();
        let admitted = Admitted::new(self.last_admitted, request, room, is_async);
        self.enter(admitted.clone());
        Ok(admitted)
    }

    /// The unfinished cycle of a request, promised from now on if requested.
    fn promised(&self, request: &RequestKey, promised: bool) -> Option<Arc<Admitted>> {
        let live = self.requests.get(request)?;
        if promised {
            live.promise();
        }
        Some(live.clone())
    }

    /// Adds a cycle to the end of the line.
    pub(super) fn enter(&mut self, admitted: Arc<Admitted>) {
        if let Some(key) = admitted.request.key() {
            self.requests.insert(key, admitted.clone());
        }
        self.line.enter(admitted.cycle_id, self.locks_of(&admitted.request));
        if admitted.request.trigger.parent().is_some() {
            self.attended.enter(&admitted);
        }
        self.live.insert(admitted.cycle_id, admitted);
    }

    /// Cancels a cycle. A waiting one leaves the line at once, and the conductor records it.
    pub(super) fn cancel(&mut self, cycle_id: CycleId) -> Option<Arc<Admitted>> {
        let admitted = self.live.get(&cycle_id)?.clone();
        admitted.cancel.cancel();
        if self.line.waits(cycle_id) {
            self.line.leave(cycle_id);
            self.cancelled.push_back(admitted.clone());
        }
        Some(admitted)
    }
}

impl Orchestrator {
    /// Admits a cycle, or finds the one that an earlier call with the same request id started. With `durably`, this
    /// returns only once the store has noted the cycle, which is then recorded even if the process ends.
    ///
    /// # Errors
    /// A subsystem is not registered; the overlap policy does not let the cycle wait; too many cycles wait; there is no
    /// memory for the request; the store can't be read or written; or the process drains.
    pub async fn run_cycle(&self, request: CycleRequest, durably: bool) -> Result<Ticket, Refusal> {
        // Also while the process drains, a repeated request finds its cycle; `State::admit` refuses others.
        // A drain waits only for changes that are durable.
        let _open = durably.then(|| self.open_change());
        let admitted = match self.0.admit_once(request, durably).await? {
            Asked::Recorded(record) => return Ok(Ticket::of_record(record)),
            Asked::Live(admitted) => admitted,
        };
        if durably && self.0.state().noted_durably < admitted.cycle_id {
            let noted = self.0.note(Durability::Durable).await;
            noted.map_err(|error| self.0.state().unavailable(admitted.cycle_id, error))?;
        }
        Ok(admitted.ticket())
    }

    /// Cancels a running or waiting cycle, and waits for its record. The event of the first call that cancels it is
    /// written with the record. Further calls change nothing.
    ///
    /// # Errors
    /// It has finished or was never admitted; or, once it is cancelled, as [`Ticket::recorded`].
    pub async fn cancel_cycle(&self, cycle_id: CycleId, by: Cause) -> Result<Arc<Record>, NotCancelled> {
        let (admitted, is_first) = {
            let _open = self.open_change();
            let mut state = self.0.state();
            match state.cancel(cycle_id) {
                Some(admitted) => {
                    let is_first = admitted.cancelled_by.set(by.clone()).is_ok();
                    if is_first {
                        by.own_event.set();
                    }
                    (admitted, is_first)
                }
                None if cycle_id.0 > 0 && cycle_id <= state.last_admitted => {
                    return Err(NotCancelled::CycleFinished(cycle_id));
                }
                None => return Err(NotCancelled::CycleNotFound(cycle_id)),
            }
        };
        self.0.queue_changed.notify_one();
        let record = admitted.ticket().recorded().await?;
        if is_first && !admitted.cancel_is_written.load(Ordering::Relaxed) {
            // Its record was being written when this call came.
            let _open = self.open_change();
            let clock = self.0.clock;
            let event = move |_: &State| {
                let event = AuditEvent { cycle_id, ..by.event(clock.now()) };
                Write { audit: vec![record::encode_event(&event)], ..Write::default() }
            };
            let written = self.0.edit(event, |_| ()).await;
            written.map_err(|error| NotRecorded::StoreUnavailable(Some(cycle_id), error))?;
        }
        Ok(record)
    }
}

impl Shared {
    /// Admits a cycle, or finds the one that an earlier call with the same request id started. A `promised` cycle is
    /// left to the next process if this one does not run it.
    pub(super) async fn admit_once(&self, mut request: CycleRequest, promised: bool) -> Result<Asked, Refusal> {
        let max_queued = self.settings().max_queued;
        let mut room = self.room_of(&request)?;
        let key = request.key();
        // The configuration names those of a parent's cycle. As with a loop, one that is not registered is recorded.
        let mut is_checked = request.subset.is_none() || request.trigger.parent().is_some();
        loop {
            // Cycles that are recorded from now on are found without the store.
            let newest = self.state().last_revision;
            if let Some(key) = &key {
                if let Some(live) = self.state().promised(key, promised) {
                    return Ok(Asked::Live(live));
                }
                let recorded = self.history.read_one(self.store.cycle_of_request(key.clone())).await?;
                if let Some(record) = recorded {
                    return Ok(Asked::Recorded(Arc::new(record)));
                }
            }
            if !is_checked {
                request.subset = self.registered_names(request.subset).await?;
                is_checked = true;
            }
            let admitted = {
                let mut state = self.state();
                if let Some(key) = &key {
                    if let Some(live) = state.promised(key, promised) {
                        return Ok(Asked::Live(live));
                    }
                    match self.history.extent().recorded_since(newest, key) {
                        Ok(None) => {}
                        Ok(Some(record)) => return Ok(Asked::Recorded(record)),
                        Err(_too_many) => continue,
                    }
                }
                state.admit(Arc::new(request), room.take(), promised, max_queued)
            };
            let admitted = match admitted {
                Ok(admitted) => admitted,
                Err(refusal) => {
                    self.note_named_by(&refusal).await?;
                    return Err(refusal.into());
                }
            };
            self.queue_changed.notify_one();
            return Ok(Asked::Live(admitted));
        }
    }

    /// Memory for a request while its cycle waits or runs. Small requests need none: their number is limited.
    pub(super) fn room_of(&self, request: &CycleRequest) -> Result<Option<Held>, Full> {
        const SMALL: usize = 4 << 10;
        match self.requests.try_hold(request.footprint()) {
            Err(full) if request.footprint() > SMALL => Err(full),
            held => Ok(held.ok()),
        }
    }
}
