//! Runs one cycle, from the first call to the report. [`Engine::run`] reads from top to bottom.
//!
//! Below it: the state of a part (`part_state`), what subsystems hand to each other (`inputs_and_outputs`), and the end
//! (`report`).

mod inputs_and_outputs;
mod part_state;
mod report;

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

use self::part_state::{EndedPart, PartState, Release};
use super::{
    InputRoom, Member, Part, Plan, RevokedOwners, Slots, Trace,
    member::Turn,
    plan::{Fate, Step},
    refusals::Refusals,
    retry::Calls,
    slots::Slot,
    trace::CallSpans,
};
use crate::{
    memory::{Held, Memory},
    model::{
        Code, CycleId, CycleRequest, Epoch, FinishedCycle, Freshness, Input, Name, SkipReason, SubsystemState, Trigger,
        text::shortened,
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
    /// The owners whose subsystems are not called.
    pub revoked: RevokedOwners,
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
    /// The part of the subsystem at this position has ended. Subsystems that are not registered come after all others,
    /// and end at once.
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
        let refusals = Refusals::default();
        let mut calls = FuturesUnordered::new();
        // The resource that the next call waits for, if any.
        let wait = Fuse::terminated();
        let deadline = sleep_until(start + cycle.deadline);
        let cancelled = cancel.cancelled();
        pin!(wait, deadline, cancelled);
        let end = loop {
            while wait.is_terminated() {
                match run.next() {
                    Next::Call(call) => calls.push(self.call(cycle, call, start, &refusals, observer)),
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
                    Some(ended) => run.called(ended),
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
    async fn call(
        &self,
        cycle: &CycleRun,
        prepared: PreparedCalls<'_>,
        start: Instant,
        refusals: &Refusals,
        observer: &dyn Observer,
    ) -> EndedCalls {
        let PreparedCalls { position, attempts, inputs, is_probe, slot: _slot, room: _room } = prepared;
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
                path: cycle.request.path.clone(),
            },
            orchestrator_id: &self.orchestrator_id,
            deadline,
            spans: CallSpans { cycle, start, subsystem: &member.subsystem, deadline },
            is_probe,
            refusals,
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
            Ok(Err(CallError { code: Code::DeadlineExceeded, message, .. })) => Err(SubsystemState::TimedOut(message)),
            Ok(Err(CallError { code, message, .. })) => Err(SubsystemState::Failed(code, message)),
            Err(_) => Err(late()),
        };
        EndedCalls { position, result }
    }
}

/// The next step of a run.
enum Next<'a> {
    Call(PreparedCalls<'a>),
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

/// The calls of a subsystem, which can begin.
struct PreparedCalls<'a> {
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

/// The calls of a subsystem, which have ended.
struct EndedCalls {
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
        let not_registered = run.not_registered();
        for position in run.parts.len()..plan.size() {
            observer.ended(position, &not_registered, 0, start.elapsed());
        }
        let first = run.open_phase();
        run.release(first);
        run
    }

    /// The part of a subsystem that is in this cycle, but not registered.
    fn not_registered(&self) -> SubsystemState {
        let CycleRequest { subset, trigger, .. } = &*self.cycle.request;
        let why = match (subset, trigger) {
            (None, _) => "it is expected",
            (Some(_), Trigger::Parent(_)) => "the configuration serves it to a parent",
            (Some(_), _) => "its loop names it",
        };
        SubsystemState::Skipped(SkipReason::NotRegistered, format!("{why}, but it is not registered"))
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
        let member = &self.plan.steps[position].member;
        if member.suspended {
            return Some(SubsystemState::Skipped(SkipReason::Suspended, "it is suspended".into()));
        }
        if let Some(owner) = self.engine.revoked.owner_of(member) {
            let message = format!("its owner {owner} is revoked");
            return Some(SubsystemState::Skipped(SkipReason::OwnerRevoked, message));
        }
        let plan = &self.plan;
        let given = &self.cycle.request.inputs;
        let is_given = |name: &Name| matches!(given.get(name), Some((_, Freshness::Fresh)));
        let (reason, name) = plan.unmet_requirement(position, |required| self.fate(required), is_given)?;
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
                    return Next::Call(PreparedCalls { position, attempts, inputs, is_probe, slot, room });
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

    /// The calls of a subsystem have ended.
    fn called(&mut self, EndedCalls { position, result }: EndedCalls) {
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
            let error = &*shortened(state.message(), MAX_LOGGED);
            tracing::warn!(cycle_id, %subsystem, error, "its circuit breaker has opened: it is not called for a while");
        }
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
}
