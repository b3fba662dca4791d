//! Runs one cycle, from the first call to the report. [`Engine::run`] reads from top to bottom.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt, StreamExt,
    future::{Fuse, FusedFuture},
    stream::FuturesUnordered,
};
use jiff::Timestamp;
use tokio::{
    pin, select,
    task::unconstrained,
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    BreakerState, InputRoom, LastPart, Member, Part, Plan, Slots, Standing, Trace,
    member::Turn,
    plan::{Fate, Named, Step, chain},
    retry::Calls,
    slots::Slot,
    trace::CallSpans,
};
use crate::{
    memory::{Held, Memory},
    model::{
        Answer, Code, CycleId, CycleRequest, CycleState, Epoch, FinishedCycle, Freshness, Input, Name, Output,
        SkipReason, Subsystem, SubsystemReport, SubsystemState, excerpt, text::clean,
    },
    ports::{CallError, Reply, RunCall, Spans, Subsystems},
    random::Random,
};

/// Most bytes of a subsystem's message in the log.
const MAX_LOGGED: usize = 200;

/// Runs cycles, several at a time if they have no subsystem in common.
pub struct Engine {
    /// The fleet.
    pub subsystems: Arc<dyn Subsystems>,
    /// The configured id of this orchestrator.
    pub orchestrator_id: Arc<str>,
    /// The term of this process.
    pub epoch: Epoch,
    /// Memory for the latest outputs.
    pub outputs: Memory,
    /// Slots for the calls of all cycles.
    pub slots: Slots,
    /// Memory for the inputs of those calls, so that a fan-out of large outputs can't use all memory.
    pub inputs: InputRoom,
    /// Memory for the last part of each subsystem.
    pub remembered: Memory,
    /// Receives the spans of cycles.
    pub spans: Arc<dyn Spans>,
    /// Source of the jitter of retries and of span ids.
    pub random: Random,
}

/// A cycle to run.
pub struct CycleRun {
    /// Its id.
    pub cycle_id: CycleId,
    /// Its request.
    pub request: Arc<CycleRequest>,
    /// The order of its subsystems.
    pub plan: Arc<Plan>,
    /// When it starts.
    pub started_at: Timestamp,
    /// Its deadline.
    pub deadline: Duration,
    /// The trace of its calls.
    pub trace: Trace,
}

/// The result of a cycle.
pub struct Ran {
    /// The report.
    pub finished: FinishedCycle,
    /// The parts of the registered subsystems, in the order of the plan: to be [published](Engine::publish) once the
    /// report is recorded.
    pub parts: Vec<Part>,
    /// The memory of the answers, without outputs. Kept until the report is recorded.
    pub held: Vec<Held>,
}

/// Observes a cycle live. Called inside the cycle, so it must not block.
pub trait Observer: Sync {
    /// The subsystem at this position of the plan is being called, for the `attempt`-th time.
    fn called(&self, position: usize, attempt: u32, elapsed: Duration);
    /// The part of the subsystem at this position has ended.
    fn ended(&self, position: usize, state: &SubsystemState, attempts: u32, elapsed: Duration);
}

impl Engine {
    /// Runs a cycle. Ends when every part has ended, when its deadline has passed, or when it is cancelled; in the
    /// latter two cases by dropping the calls that still run.
    ///
    /// Its outputs are visible only inside the cycle, as FRESH inputs, until they are [published](Engine::publish).
    /// Until then no other cycle with one of its subsystems may run.
    pub async fn run(&self, cycle: &CycleRun, cancel: &CancellationToken, observer: &dyn Observer) -> Ran {
        let start = Instant::now();
        let attempts: Vec<_> = cycle.plan.steps.iter().map(|_| AtomicU32::new(0)).collect();
        let mut run = Run::new(self, cycle, start, &attempts, observer);
        let mut calls = FuturesUnordered::new();
        // The resource that the next call waits for, if any.
        let wait = Fuse::terminated();
        let deadline = sleep_until(start + cycle.deadline);
        let cancelled = cancel.cancelled();
        pin!(wait, deadline, cancelled);
        let end = loop {
            while wait.is_terminated() {
                match run.next() {
                    Next::Call(call) => calls.push(self.call(cycle, call, start, observer)),
                    Next::Wait(need) => wait.set(self.wait_for(need).fuse()),
                    Next::Nothing => break,
                }
            }
            let may_have_ended = !calls.is_empty() || wait.is_terminated();
            // Without tokio's budget, which all these calls would share as one task: futures that it leaves out are
            // polled in reverse order, so that under load the first would wait for all others. The select around them
            // still yields.
            let ended = unconstrained(calls.next());
            select! {
                biased;
                () = &mut cancelled => break End::Cancelled,
                () = &mut deadline => break End::Deadline,
                got = &mut wait => run.got(got),
                ended = ended, if may_have_ended => match ended {
                    Some(call) => run.called(call),
                    // Nothing runs or waits, so nothing more can become ready: every part has ended.
                    None => break End::Complete,
                },
            }
        };
        wait.set(Fuse::terminated());
        drop(calls);
        run.finish(end)
    }

    /// Makes parts visible: their outputs become the latest ones, and they the last ones. Call it after the record of
    /// the cycle is committed, and before another cycle with one of these subsystems begins.
    pub fn publish(&self, parts: impl IntoIterator<Item = Part>) {
        for Part { standing, last, output } in parts {
            standing.lock().publish(last, output, &self.remembered);
        }
    }

    async fn wait_for(&self, need: Need) -> Got<'_> {
        match need {
            Need::Slot => Got::Slot(self.slots.take().await),
            Need::Room(bytes) => Got::Room(self.inputs.hold(bytes).await),
        }
    }

    /// Makes the calls of one subsystem, within its deadline.
    async fn call(&self, cycle: &CycleRun, call: Call<'_>, start: Instant, observer: &dyn Observer) -> Ended {
        let Call { position, attempts, inputs, is_probe, slot: _slot, room: _room } = call;
        let member = &cycle.plan.steps[position].member;
        let subsystem = &*member.subsystem;
        let started = Instant::now();
        let deadline = (started + subsystem.timeout).min(start + cycle.deadline);
        let calls = Calls {
            subsystems: &*self.subsystems,
            random: &self.random,
            member,
            run: RunCall {
                cycle_id: cycle.cycle_id,
                epoch: self.epoch,
                attempt: 0,
                scheduled_at: cycle.request.scheduled_at,
                parameters: subsystem.parameters.overlaid(&cycle.request.parameters),
                inputs,
                timeout: Duration::ZERO,
                trace: None,
            },
            orchestrator_id: &self.orchestrator_id,
            deadline,
            spans: CallSpans { cycle, start, subsystem: &member.subsystem, deadline },
            is_probe,
            attempts,
        };
        // From the first call on, which may be that to `Initialize`: a subsystem that hangs there is seen as well.
        observer.called(position, 1, start.elapsed());
        let make = calls.make(|attempt| {
            if attempt > 1 {
                observer.called(position, attempt, start.elapsed());
            }
        });
        let late = || {
            let was_run = attempts.load(Ordering::Relaxed) > 0;
            let what = if was_run { "no answer" } else { "no connection, or no answer to Initialize," };
            SubsystemState::TimedOut(format!("{what} within its timeout of {:?}", subsystem.timeout))
        };
        let result = match timeout_at(deadline, make).await {
            Ok(Ok(reply)) => Ok(reply),
            // Both ends and the library have their own timers, and any of them may fire first.
            Ok(Err(CallError { code: Code::DeadlineExceeded, .. })) if Instant::now() >= deadline => Err(late()),
            Ok(Err(CallError { code: Code::DeadlineExceeded, message })) => Err(SubsystemState::TimedOut(message)),
            Ok(Err(CallError { code, message })) => Err(SubsystemState::Failed(code, message)),
            Err(_) => Err(late()),
        };
        Ended { position, result }
    }
}

/// The next step of a run.
enum Next<'a> {
    Call(Call<'a>),
    /// Waits for this resource, and then checks again.
    Wait(Need),
    Nothing,
}

/// The resource that the next call waits for.
enum Need {
    /// A call slot.
    Slot,
    /// Memory for inputs of this number of bytes.
    Room(usize),
}

/// The awaited resource.
enum Got<'a> {
    Slot(Slot<'a>),
    Room(Held),
}

/// A subsystem to call.
struct Call<'a> {
    position: usize,
    attempts: &'a AtomicU32,
    inputs: Vec<Input>,
    is_probe: bool,
    slot: Slot<'a>,
    /// The memory of its inputs; `None` if they are empty.
    room: Option<Held>,
}

/// Why a subsystem is not called.
enum NotNow {
    /// Its part ends so.
    Ends(SubsystemState),
    /// It first needs memory for inputs of this number of bytes.
    NeedsRoom(usize),
}

/// A subsystem whose calls have ended.
struct Ended {
    position: usize,
    result: Result<Reply, SubsystemState>,
}

/// How a cycle ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Complete,
    Deadline,
    Cancelled,
}

/// The state of a running cycle: ready and ended parts, and their dependencies.
struct Run<'a> {
    engine: &'a Engine,
    cycle: &'a CycleRun,
    plan: &'a Plan,
    start: Instant,
    /// Number of calls of each subsystem.
    attempts: &'a [AtomicU32],
    observer: &'a dyn Observer,
    /// By position.
    parts: Vec<PartState>,
    /// For how many others each relay still waits.
    relays: Vec<u32>,
    /// Index of the current phase, the position where it ends, and how many of its parts have not ended.
    phase: usize,
    phase_end: usize,
    left_in_phase: usize,
    /// Subsystems that can be called: the one whose last [`Turn`] is the longest ago first, and among equals in the
    /// order of the plan. If there are so few slots that the deadline ends cycles early, subsystems without a turn in
    /// one cycle thus come first in the next, so that each gets its turn; otherwise all are equal.
    ready: BinaryHeap<Reverse<(Turn, usize)>>,
    /// The next subsystem to call if it waits for memory for its inputs, with their size in bytes.
    waiting: Option<(usize, usize)>,
    /// The awaited resource, until the next call takes it.
    slot: Option<Slot<'a>>,
    room: Option<Held>,
    last_ended: Option<usize>,
}

/// The state of the part of a subsystem. A subsystem that is left out of the cycle is not in its plan.
enum PartState {
    /// It waits for this number of others, and for its phase.
    Waiting(usize),
    /// It waits for nothing but its call.
    Ready(Release),
    /// It is being called.
    Running(Release, Duration),
    /// It has ended.
    Ended(EndedPart),
}

/// The end of a part's wait for others.
#[derive(Clone, Copy, Default)]
struct Release {
    at: Duration,
    /// The one that ended last before that.
    by: Option<usize>,
}

/// A part that has ended.
struct EndedPart {
    release: Release,
    started: Option<Duration>,
    ended: Duration,
    /// True if it had its turn, see [`Turn::was_whole`].
    turn: Option<bool>,
    state: SubsystemState,
    answer: Answer,
    /// The memory of the answer. The memory of the output is already in its [`Standing`].
    held: Option<Held>,
}

impl PartState {
    fn ended(&self) -> Option<&EndedPart> {
        match self {
            Self::Ended(part) => Some(part),
            Self::Waiting(_) | Self::Ready(_) | Self::Running(..) => None,
        }
    }

    fn release(&self) -> Release {
        match self {
            Self::Waiting(_) => Release::default(),
            Self::Ready(release) | Self::Running(release, _) | Self::Ended(EndedPart { release, .. }) => *release,
        }
    }

    /// When its first call began.
    fn started(&self) -> Option<Duration> {
        match self {
            Self::Waiting(_) | Self::Ready(_) => None,
            Self::Running(_, started) => Some(*started),
            Self::Ended(part) => part.started,
        }
    }

    /// Records the end of a dependency. Returns true if it was the last one.
    fn waits_for_one_less(&mut self) -> bool {
        let Self::Waiting(others) = self else { return false };
        *others -= 1;
        *others == 0
    }

    fn end(&mut self, state: SubsystemState, ended: Duration, turn: Option<bool>, reply: Option<Reply>) {
        let (answer, held) = reply.map_or_else(Default::default, |reply| (reply.answer, Some(reply.held)));
        let (release, started) = (self.release(), self.started());
        *self = Self::Ended(EndedPart { release, started, ended, turn, state, answer, held });
    }
}

impl<'a> Run<'a> {
    fn new(
        engine: &'a Engine,
        cycle: &'a CycleRun,
        start: Instant,
        attempts: &'a [AtomicU32],
        observer: &'a dyn Observer,
    ) -> Self {
        let plan = &*cycle.plan;
        let waits = |step: &Step| PartState::Waiting(step.waits_for.len());
        let mut run = Self {
            engine,
            cycle,
            start,
            attempts,
            observer,
            parts: plan.steps.iter().map(waits).collect(),
            relays: plan.relays.waits.clone(),
            plan,
            phase: 0,
            phase_end: 0,
            left_in_phase: 0,
            ready: BinaryHeap::new(),
            waiting: None,
            slot: None,
            room: None,
            last_ended: None,
        };
        let first = run.open_phase();
        run.release(first);
        run
    }

    /// Begins the next phase, if there is one, with its subsystems without other dependencies.
    fn open_phase(&mut self) -> Vec<usize> {
        let Some(&count) = self.plan.phases.get(self.phase) else { return Vec::new() };
        let positions = self.phase_end..self.phase_end + count;
        self.phase += 1;
        self.phase_end += count;
        self.left_in_phase = count;
        positions.filter(|&position| matches!(self.parts[position], PartState::Waiting(0))).collect()
    }

    /// Releases subsystems whose dependencies have ended, in the order of the plan. One that can't run ends at once,
    /// which may release others.
    fn release(&mut self, free: Vec<usize>) {
        let at = self.start.elapsed();
        let mut free: BinaryHeap<_> = free.into_iter().map(Reverse).collect();
        while let Some(Reverse(position)) = free.pop() {
            self.parts[position] = PartState::Ready(Release { at, by: self.last_ended });
            match self.why_not(position) {
                None => {
                    let last_turn = self.plan.steps[position].member.standing.lock().last_turn;
                    self.ready.push(Reverse((last_turn, position)));
                }
                Some(state) => free.extend(self.end(position, state, None).into_iter().map(Reverse)),
            }
        }
    }

    /// Why a subsystem will not be called, as far as that is certain once its waits are over.
    fn why_not(&self, position: usize) -> Option<SubsystemState> {
        if self.plan.steps[position].member.suspended {
            return Some(SubsystemState::Skipped(SkipReason::Suspended, "it is suspended".into()));
        }
        let plan = &self.plan;
        let (reason, name) = plan.unmet_requirement(position, |required| self.fate(required))?;
        let what = match reason {
            SkipReason::RequirementMissing => "is not registered",
            SkipReason::RequirementLeftOut => match plan.positions.get(name) {
                None => "is not in this cycle",
                Some(&required) if plan.steps[required].member.suspended => "is suspended",
                Some(_) => "was skipped itself",
            },
            _ => "did not succeed",
        };
        Some(SubsystemState::Skipped(reason, format!("it requires {name}, which {what}")))
    }

    fn fate(&self, position: usize) -> Fate {
        self.parts[position].ended().map_or(Fate::LeftOut, |part| Fate::from(&part.state))
    }

    /// The next subsystem to call, or the resource to wait for.
    fn next(&mut self) -> Next<'a> {
        loop {
            let waiting = self.waiting.map(|(position, _)| position);
            let Some(position) = waiting.or_else(|| self.ready.peek().map(|Reverse((_, position))| *position)) else {
                // The slot was taken for a subsystem that was not called after all.
                (self.slot, self.room) = (None, None);
                return Next::Nothing;
            };
            let Some(slot) = self.slot.take() else { return Next::Wait(Need::Slot) };
            if self.waiting.take().is_none() {
                self.ready.pop();
            }
            match self.prepare(position) {
                Ok((inputs, room, is_probe)) => {
                    self.parts[position] = PartState::Running(self.parts[position].release(), self.start.elapsed());
                    let attempts = &self.attempts[position];
                    return Next::Call(Call { position, attempts, inputs, is_probe, slot, room });
                }
                // The slot waits with it. Only running calls hold memory, and they have their own slots, so they end.
                Err(NotNow::NeedsRoom(bytes)) => {
                    self.slot = Some(slot);
                    self.waiting = Some((position, bytes));
                    return Next::Wait(Need::Room(bytes));
                }
                Err(NotNow::Ends(state)) => {
                    self.slot = Some(slot);
                    let free = self.end(position, state, None);
                    self.release(free);
                }
            }
        }
    }

    /// The awaited resource is available.
    fn got(&mut self, got: Got<'a>) {
        match got {
            Got::Slot(slot) => self.slot = Some(slot),
            Got::Room(room) => self.room = Some(room),
        }
    }

    /// Asks the breaker, and collects the inputs and their memory. Also returns true if this is a probe call.
    fn prepare(&mut self, position: usize) -> Result<(Vec<Input>, Option<Held>, bool), NotNow> {
        let step = &self.plan.steps[position];
        let is_probe = match step.member.breaker(Instant::now()) {
            BreakerState::Closed => false,
            BreakerState::HalfOpen => true,
            BreakerState::Open(_) => {
                let failures = step.member.standing.lock().breaker.failures();
                let failures =
                    if failures == 1 { "a failure".to_owned() } else { format!("{failures} failures in a row") };
                let message = format!("not called after {failures}");
                return Err(NotNow::Ends(SubsystemState::CircuitOpen(message)));
            }
        };
        let inputs = self.inputs(step);
        let bytes = inputs.iter().flat_map(|input| &input.output).map(|(output, _)| output.payload.len()).sum();
        let max = self.engine.inputs.max().min(Subsystem::MAX_INPUT_BYTES);
        if bytes > max {
            let message = format!("its inputs are {bytes} bytes; the limit is {max} bytes");
            return Err(NotNow::Ends(SubsystemState::Failed(Code::ResourceExhausted, message)));
        }
        let room = if bytes > 0 { Some(self.room_for(bytes).ok_or(NotNow::NeedsRoom(bytes))?) } else { None };
        Ok((inputs, room, is_probe))
    }

    /// The awaited memory, if it is enough: inputs may have grown meanwhile.
    fn room_for(&mut self, bytes: usize) -> Option<Held> {
        let mut room = self.room.take()?;
        room.resize(bytes).ok().map(|()| room)
    }

    fn inputs(&self, step: &Step) -> Vec<Input> {
        let stale = |standing: &Standing| Some((standing.latest()?, Freshness::Stale));
        let inputs = step.inputs.iter().map(|(name, named)| {
            let output = match named {
                Named::Step(position) => match self.parts[*position].ended() {
                    Some(EndedPart { state: SubsystemState::Succeeded, answer, .. }) => {
                        let output = Output { cycle_id: self.cycle.cycle_id, payload: answer.output.clone() };
                        Some((output, Freshness::Fresh))
                    }
                    _ => stale(&self.plan.steps[*position].member.standing),
                },
                Named::LeftOut(standing) => stale(standing),
                Named::Nowhere => None,
            };
            Input { name: name.clone(), output }
        });
        inputs.collect()
    }

    /// The calls of a subsystem have ended.
    fn called(&mut self, Ended { position, result }: Ended) {
        let duration = self.start.elapsed().saturating_sub(self.parts[position].started().unwrap_or_default());
        let member = &self.plan.steps[position].member;
        let (state, reply) = match result.and_then(|reply| self.keep(&member.standing, reply)) {
            Ok(reply) => {
                let mut remembered = member.standing.lock();
                let closes = remembered.breaker.succeeded();
                remembered.took(duration);
                drop(remembered);
                if closes {
                    let (cycle_id, subsystem) = (self.cycle.cycle_id.0, &member.subsystem.name);
                    tracing::info!(cycle_id, %subsystem, "its circuit breaker has closed");
                }
                (SubsystemState::Succeeded, Some(reply))
            }
            Err(state) => {
                self.count_failure(member, &state, duration);
                (state, None)
            }
        };
        let free = self.end(position, state, reply);
        self.release(free);
    }

    /// Tells the breaker of a failure, after this time.
    fn count_failure(&self, member: &Member, state: &SubsystemState, duration: Duration) {
        let policy = member.subsystem.breaker;
        let mut remembered = member.standing.lock();
        if let SubsystemState::TimedOut(_) = state {
            remembered.took(duration);
        }
        let opens = remembered.breaker.failed(policy, Instant::now());
        drop(remembered);
        if opens {
            let (cycle_id, subsystem) = (self.cycle.cycle_id.0, &member.subsystem.name);
            let error = excerpt(state.message(), MAX_LOGGED);
            tracing::warn!(cycle_id, %subsystem, error, "its circuit breaker has opened: it is not called for a while");
        }
    }

    /// Keeps an answer, if there is memory for its output.
    fn keep(&self, standing: &Standing, reply: Reply) -> Result<Reply, SubsystemState> {
        let Reply { answer, mut held } = reply;
        let bytes = answer.output.len();
        standing.lock().make_room(bytes, &self.engine.outputs).map_err(|full| {
            let message = format!("no memory for its output of {bytes} bytes: {full}");
            SubsystemState::Failed(Code::ResourceExhausted, message)
        })?;
        // Fewer than before, so it fits.
        let _ = held.resize(held.bytes().saturating_sub(bytes));
        Ok(Reply { answer, held })
    }

    /// Records the end of a part, with this reply if it succeeded. Returns subsystems without other pending
    /// dependencies.
    fn end(&mut self, position: usize, state: SubsystemState, reply: Option<Reply>) -> Vec<usize> {
        let elapsed = self.start.elapsed();
        let attempts = self.attempts[position].load(Ordering::Relaxed);
        self.observer.ended(position, &state, attempts, elapsed);
        self.parts[position].end(state, elapsed, Some(true), reply);
        self.last_ended = Some(position);
        self.left_in_phase -= 1;
        if self.left_in_phase == 0 {
            return self.open_phase();
        }
        let (mut free, mut ended) = (Vec::new(), vec![position]);
        while let Some(node) = ended.pop() {
            for later in self.plan.releases(node) {
                if let Some(part) = self.parts.get_mut(later) {
                    if part.waits_for_one_less() {
                        free.push(later);
                    }
                    continue;
                }
                let waits = &mut self.relays[later - self.parts.len()];
                *waits -= 1;
                if *waits == 0 {
                    ended.push(later);
                }
            }
        }
        free
    }

    /// Ends the remaining parts, and makes the report.
    fn finish(mut self, end: End) -> Ran {
        let duration = self.start.elapsed();
        for position in 0..self.parts.len() {
            if self.parts[position].ended().is_none() {
                self.cut_off(position, end, duration);
            }
        }
        let Self { engine, cycle, plan, parts: states, attempts, .. } = self;
        let finished_at = cycle.started_at.saturating_add(duration).unwrap_or(cycle.started_at);
        let called = |position: &usize| states[*position].started().is_some();
        let last =
            (0..states.len()).filter(called).max_by_key(|position| states[*position].ended().map(|part| part.ended));
        let critical_path = chain(last, |position| states[position].release().by).into_iter().filter(called);
        let critical_path = critical_path.map(|position| plan.steps[position].member.subsystem.name.clone()).collect();

        let mut reports = Vec::with_capacity(states.len());
        let mut parts = Vec::with_capacity(states.len());
        let mut held = Vec::new();
        for (position, part) in states.into_iter().enumerate() {
            let PartState::Ended(part) = part else { continue };
            let EndedPart { release, started, ended, turn, state, answer, held: its_held } = part;
            held.extend(its_held);
            let member = &plan.steps[position].member;
            let subsystem = &member.subsystem;
            let records_output = subsystem.record_output || cycle.request.record_outputs;
            let succeeded = state == SubsystemState::Succeeded;
            let report = Arc::new(SubsystemReport {
                name: subsystem.name.clone(),
                queued: started.unwrap_or(release.at).saturating_sub(release.at),
                started,
                ended,
                attempts: attempts[position].load(Ordering::Relaxed),
                issues: answer.issues,
                metrics: answer.metrics,
                recorded_output: (succeeded && records_output).then(|| answer.output.clone()),
                state,
            });
            if let Some(was_whole) = turn {
                member.standing.lock().last_turn = Turn { cycle_id: cycle.cycle_id, was_whole };
            }
            let (cycle_id, started_at) = (cycle.cycle_id, cycle.started_at);
            parts.push(Part {
                standing: member.standing.clone(),
                last: LastPart { cycle_id, started_at, finished_at, report: report.clone() },
                output: succeeded.then_some(Output { cycle_id, payload: answer.output }),
            });
            reports.push((report, subsystem.critical));
        }
        for name in &plan.unregistered {
            let message = "its loop names it, but it is not registered".to_owned();
            reports
                .push((Arc::new(SubsystemReport::not_called(name.clone(), SkipReason::NotRegistered, message)), false));
        }
        let (state, error) = sum_up(&reports, end);
        let finished = FinishedCycle {
            cycle_id: cycle.cycle_id,
            epoch: engine.epoch,
            trigger: cycle.request.trigger.clone(),
            scheduled_at: Some(cycle.request.scheduled_at),
            request_id: cycle.request.request_id.clone(),
            trace_id: cycle.trace.id(),
            started_at: Some(cycle.started_at),
            finished_at,
            duration,
            state,
            error,
            critical_path,
            subsystems: reports.into_iter().map(|(report, _)| report).collect(),
        };
        Ran { finished, parts, held }
    }

    /// Ends a part that had not ended when the cycle did.
    fn cut_off(&mut self, position: usize, end: End, now: Duration) {
        let deadline = self.cycle.deadline;
        let started = self.parts[position].started();
        let state = match (end, started) {
            (End::Deadline, Some(started)) => {
                let state = SubsystemState::TimedOut(format!("no answer within the cycle's deadline of {deadline:?}"));
                self.count_failure(&self.plan.steps[position].member, &state, now.saturating_sub(started));
                state
            }
            (End::Deadline, None) => {
                let waited = match self.waiting {
                    Some((waiting, bytes)) if waiting == position => {
                        format!("while it waited for memory for its inputs of {bytes} bytes")
                    }
                    _ => "before its turn".to_owned(),
                };
                let message = format!("the cycle's deadline of {deadline:?} passed {waited}");
                SubsystemState::Skipped(SkipReason::CycleDeadline, message)
            }
            (End::Cancelled | End::Complete, _) => SubsystemState::Cancelled,
        };
        let attempts = self.attempts[position].load(Ordering::Relaxed);
        self.observer.ended(position, &state, attempts, now);
        self.parts[position].end(state, now, started.map(|_| false), None);
    }
}

/// How a cycle ended, and its failures in one line: the causes first, then the subsystems that were skipped for them.
/// Only this function makes that line. A semicolon is only between two failures.
fn sum_up(reports: &[(Arc<SubsystemReport>, bool)], end: End) -> (CycleState, String) {
    const NAMED: usize = 8;
    let mut failed = 0;
    let mut ran = 0;
    let mut critical_failed = false;
    let (mut causes, mut skipped) = (Vec::new(), Vec::new());
    for (report, critical) in reports {
        let is_failure = report.state.is_failure();
        let counts = is_failure || matches!(report.state, SubsystemState::Succeeded | SubsystemState::Cancelled);
        ran += usize::from(counts);
        failed += usize::from(is_failure);
        critical_failed |= is_failure && *critical;
        match &report.state {
            _ if !is_failure => {}
            state @ SubsystemState::Skipped(SkipReason::RequirementFailed | SkipReason::CycleDeadline, _) => {
                skipped.push((&report.name, state));
            }
            state => causes.push((&report.name, state)),
        }
    }
    let state = match end {
        End::Cancelled => CycleState::Cancelled,
        _ if failed == 0 => CycleState::Succeeded,
        _ if critical_failed || failed == ran => CycleState::Failed,
        _ => CycleState::Degraded,
    };
    let mut text = Vec::new();
    if end == End::Cancelled {
        text.push("cancelled".to_owned());
    }
    if failed > 0 {
        let failures = causes.iter().chain(&skipped).take(NAMED).map(|(name, state)| failure(name, state));
        let mut failures: Vec<_> = failures.collect();
        if failed > NAMED {
            failures.push(format!("and {} more", failed - NAMED));
        }
        text.push(format!("{failed} of {} failed: {}", reports.len(), failures.join("; ")));
    }
    (state, text.join("; "))
}

fn failure(name: &Name, state: &SubsystemState) -> String {
    let message = clean(excerpt(state.message(), MAX_LOGGED)).replace(';', ",");
    let message = message.trim();
    match state {
        SubsystemState::Failed(code, _) => format!("{name} {code}: {message}"),
        SubsystemState::CircuitOpen(_) => format!("{name} circuit open: {message}"),
        SubsystemState::TimedOut(_) => format!("{name} timed out: {message}"),
        _ => format!("{name} skipped: {message}"),
    }
}
