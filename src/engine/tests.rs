//! Runs of the engine over a scripted fleet, on paused time.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::{BoxFuture, join_all};
use jiff::{SignedDuration, Timestamp};
use tokio::{
    join,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{CycleRun, Engine, InputRoom, Member, Observer, Plan, Ran, RevokedOwners, Slots, Standing, Trace};
use crate::{
    memory::Memory,
    model::{
        Answer, BreakerSpec, Code, CycleId, CycleRequest, CycleState, Epoch, Freshness, Identity, Method, Name,
        Payload, RetrySpec, SkipReason, Span, SpanContext, Subsystem, SubsystemReport, SubsystemSpec, SubsystemState,
        TraceId, Trigger, Work,
    },
    ports::{
        CallError, Callee, ConnectionFault, InitializeCall, Left, Reply, RunCall, Snapshot, Spans, Subsystems, Untraced,
    },
    random::Random,
};

/// An answer of a subsystem.
#[derive(Clone, Copy)]
enum Does {
    /// An output with a text of this length.
    Answers(usize),
    /// An empty text after this number of milliseconds.
    Takes(u64),
    Fails(Code),
    Faults(ConnectionFault),
    Hangs,
}

/// The fleet: the answers of each subsystem, call by call; the last one repeats. Each `RunCycle` takes 10 ms, and
/// `Initialize` succeeds at once, unless the script says otherwise.
#[derive(Default)]
struct Fleet {
    script: Script,
    initialize_script: Script,
    began: Mutex<Option<Instant>>,
    log: Mutex<Log>,
}

type Script = Mutex<BTreeMap<String, Vec<Does>>>;

#[derive(Default)]
struct Log {
    calls: Vec<String>,
    received: Vec<RunCall>,
    initialized: usize,
    in_flight: usize,
    most_in_flight: usize,
}

struct InFlight<'a>(&'a Fleet);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.log.lock().unwrap().in_flight -= 1;
    }
}

impl Fleet {
    fn does(&self, name: &str, script: &[Does]) {
        self.script.lock().unwrap().insert(name.to_owned(), script.to_vec());
    }

    fn initializes(&self, name: &str, script: &[Does]) {
        self.initialize_script.lock().unwrap().insert(name.to_owned(), script.to_vec());
    }

    /// The calls since the last query, as "10 a": milliseconds after the first call, and the subsystem.
    fn calls(&self) -> Vec<String> {
        *self.began.lock().unwrap() = None;
        std::mem::take(&mut self.log.lock().unwrap().calls)
    }
}

impl Subsystems for Fleet {
    fn initialize<'a>(&'a self, to: Callee<'a>, _call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        self.log.lock().unwrap().initialized += 1;
        let does = next(&self.initialize_script, &to.subsystem.name);
        Box::pin(async move {
            match does {
                Some(does) => answer(does).await.map(|_| ()),
                None => Ok(()),
            }
        })
    }

    fn run_cycle<'a>(&'a self, to: Callee<'a>, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let began = *self.began.lock().unwrap().get_or_insert_with(Instant::now);
            let inputs = call.inputs.iter().map(|input| match &input.output {
                Some((output, Freshness::Fresh)) => format!(" {} fresh {}", input.name, output.cycle_id.0),
                Some((output, Freshness::Stale)) => format!(" {} stale {}", input.name, output.cycle_id.0),
                None => format!(" {} absent", input.name),
            });
            let line = format!("{} {}{}", began.elapsed().as_millis(), to.subsystem.name, inputs.collect::<String>());
            let _in_flight = {
                let mut log = self.log.lock().unwrap();
                log.calls.push(line);
                log.received.push(call);
                log.in_flight += 1;
                log.most_in_flight = log.most_in_flight.max(log.in_flight);
                InFlight(self)
            };
            let does = next(&self.script, &to.subsystem.name).unwrap_or(Does::Answers(0));
            let answer = Answer { output: answer(does).await?, ..Answer::default() };
            Ok(Reply { answer, held: Memory::whole(0).try_hold(0).unwrap() })
        })
    }

    fn get_status<'a>(&'a self, _of: Callee<'a>, _timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(async { Err(CallError::new(Code::Unimplemented, "")) })
    }

    fn forget(&self, _left: &[Left]) {}
}

/// The next answer of a subsystem, if it has a script.
fn next(script: &Script, name: &Name) -> Option<Does> {
    let mut script = script.lock().unwrap();
    let steps = script.get_mut(name.as_str())?;
    Some(if steps.len() > 1 { steps.remove(0) } else { steps[0] })
}

async fn answer(does: Does) -> Result<Payload, CallError> {
    sleep(Duration::from_millis(if let Does::Takes(ms) = does { ms } else { 10 })).await;
    match does {
        Does::Answers(bytes) => Ok(output(bytes)),
        Does::Takes(_) => Ok(output(0)),
        Does::Fails(code) => Err(CallError::new(code, "as scripted")),
        Does::Faults(fault) => {
            Err(CallError { fault: Some(fault), ..CallError::new(Code::Unavailable, format!("{fault:?}")) })
        }
        Does::Hangs => std::future::pending().await,
    }
}

fn output(bytes: usize) -> Payload {
    let object = serde_json::json!({ "text": "x".repeat(bytes) });
    Payload::from_json(object.as_object().unwrap()).unwrap()
}

struct Nobody;

impl Observer for Nobody {
    fn called(&self, _position: usize, _attempt: u32, _elapsed: Duration) {}
    fn ended(&self, _position: usize, _state: &SubsystemState, _attempts: u32, _elapsed: Duration) {}
}

/// An observer that keeps the attempts reported to it.
#[derive(Default)]
struct Seen {
    called: Mutex<Vec<(u32, Duration)>>,
    ended: Mutex<Vec<(u32, Duration)>>,
}

impl Observer for Seen {
    fn called(&self, _position: usize, attempt: u32, elapsed: Duration) {
        self.called.lock().unwrap().push((attempt, elapsed));
    }

    fn ended(&self, _position: usize, _state: &SubsystemState, attempts: u32, elapsed: Duration) {
        self.ended.lock().unwrap().push((attempts, elapsed));
    }
}

/// An engine over some subsystems.
struct Stage {
    fleet: Arc<Fleet>,
    engine: Engine,
    plan: Arc<Plan>,
}

/// A subsystem without inputs: `name`; with inputs: `name after other…`, `name requires other…` or `name reads other…`.
fn spec(text: &str) -> SubsystemSpec {
    let words: Vec<_> = text.split(' ').map(str::to_owned).collect();
    let others = |relation: &str| match words.get(1) {
        Some(word) if word == relation => words[2..].to_vec(),
        _ => Vec::new(),
    };
    SubsystemSpec {
        name: words[0].clone(),
        endpoint: "http://127.0.0.1:1".into(),
        after: others("after"),
        requires: others("requires"),
        reads: others("reads"),
        ..SubsystemSpec::default()
    }
}

fn member(spec: &SubsystemSpec) -> Member {
    Member::new(Arc::new(Subsystem::from_spec(spec).unwrap()), false, Arc::default())
}

impl Stage {
    fn new(slots: usize, subsystems: &[&str]) -> Self {
        Self::of(slots, subsystems.iter().map(|text| spec(text)))
    }

    fn of(slots: usize, specs: impl IntoIterator<Item = SubsystemSpec>) -> Self {
        Self::with(slots, specs.into_iter().map(|spec| member(&spec)))
    }

    fn with(slots: usize, members: impl IntoIterator<Item = Member>) -> Self {
        let fleet = Arc::new(Fleet::default());
        let plan = Arc::new(Plan::compile(members).unwrap());
        let memory = Memory::whole(1 << 30);
        let engine = Engine {
            subsystems: fleet.clone(),
            orchestrator_id: "test".into(),
            epoch: Epoch(1),
            outputs: memory.part("outputs", 1 << 20),
            slots: Slots::new(slots),
            inputs: InputRoom::new(memory.part("inputs", 1 << 20)),
            remembered: memory,
            revoked: RevokedOwners::default(),
            spans: Arc::new(Untraced),
            random: Random::seeded(0),
        };
        Self { fleet, engine, plan }
    }

    fn cycle(&self, cycle_id: u64, subset: &str, deadline: u64) -> CycleRun {
        let subset = subset.split(' ').map(|name| Name::parse(name).unwrap()).collect::<Vec<_>>();
        let plan = self.plan.of_cycle(Some(&subset));
        CycleRun {
            cycle_id: CycleId(cycle_id),
            request: Arc::new(CycleRequest {
                subset: Some(subset.into()),
                ..CycleRequest::over_all(Trigger::Manual, Timestamp::UNIX_EPOCH)
            }),
            plan,
            started_at: Timestamp::UNIX_EPOCH,
            deadline: Duration::from_millis(deadline),
            trace: Trace::None,
        }
    }

    /// Runs a cycle over these subsystems, without publishing it.
    async fn run(&self, cycle_id: u64, subset: &str) -> Ran {
        self.run_until(cycle_id, subset, 10_000).await
    }

    async fn run_until(&self, cycle_id: u64, subset: &str, deadline: u64) -> Ran {
        self.engine.run(&self.cycle(cycle_id, subset, deadline), &CancellationToken::new(), &Nobody).await
    }

    async fn run_and_publish(&self, cycle_id: u64, subset: &str) {
        let ran = self.run(cycle_id, subset).await;
        assert_eq!(ran.finished.state, CycleState::Succeeded, "{}", ran.finished.error);
        self.engine.publish(ran.parts);
    }

    fn standing(&self, name: &str) -> Arc<Standing> {
        let member = self.plan.members().find(|member| member.subsystem.name.as_str() == name);
        member.unwrap().standing.clone()
    }

    /// After this number of milliseconds.
    async fn at<T>(&self, ms: u64, then: impl FnOnce(&Self) -> T) -> T {
        sleep(Duration::from_millis(ms)).await;
        then(self)
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn report<'a>(ran: &'a Ran, name: &str) -> &'a SubsystemReport {
    ran.finished.subsystems.iter().find(|report| report.name.as_str() == name).unwrap()
}

// ---------------------------------------------------------------------------------------------------------------
// Order

fn of_phase(phase: i32, text: &str) -> SubsystemSpec {
    SubsystemSpec { phase: Some(phase), ..spec(text) }
}

#[tokio::test(start_paused = true)]
async fn a_subsystem_waits_for_all_its_dependencies_and_a_phase_for_all_of_the_lower_phases() {
    let first = ["a", "b after a", "c after a b"].map(|text| of_phase(1, text));
    let later = [of_phase(2, "d"), of_phase(2, "e"), of_phase(3, "f")];
    let stage = Stage::of(10, first.into_iter().chain(later));
    let ran = stage.run(1, "a b c d e f").await;
    assert_eq!(stage.fleet.calls().join(", "), "0 a, 10 b a fresh 1, 20 c a fresh 1 b fresh 1, 30 d, 30 e, 40 f");
    assert_eq!(ran.finished.duration, ms(50));
}

#[tokio::test(start_paused = true)]
async fn a_subsystem_still_waits_for_others_through_those_that_are_left_out() {
    // Several subsystems of the cycle meet in `meet…`, and `both` waits for one of them through another.
    let stage = Stage::new(
        10,
        &[
            "slow",
            "b",
            "c",
            "d after c",
            "meet1 after slow b",
            "e after meet1",
            "meet2 after b d",
            "f after meet2",
            "both after meet1 f",
            "g after both",
        ],
    );
    stage.fleet.does("slow", &[Does::Takes(50)]);
    stage.run(1, "slow b c d e f g").await;
    let calls: Vec<_> =
        stage.fleet.calls().iter().map(|call| call.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(calls, ["0 b", "0 c", "0 slow", "10 d", "20 f", "50 e", "50 g"]);
}

#[tokio::test(start_paused = true)]
async fn a_subsystem_whose_requirement_is_not_met_is_skipped_with_the_reason() {
    let texts = [
        "ok",
        "fails",
        "outside",
        "runs requires ok",
        "a requires nobody",
        "b requires outside",
        "c requires paused",
        "d requires c",
        "e requires fails",
        "f requires a",
    ];
    let owner = Identity::parse("token:gone").unwrap();
    let others = [
        member(&spec("paused")).suspended(true),
        member(&spec("owned")).owned_by(Some(owner.clone())),
        member(&spec("g requires owned")),
        member(&spec("others")).owned_by(Some(Identity::parse("token:here").unwrap())),
    ];
    let stage = Stage::with(10, texts.map(|text| member(&spec(text))).into_iter().chain(others));
    stage.engine.revoked.set(Arc::new([owner].into()));
    stage.fleet.does("fails", &[Does::Fails(Code::Internal)]);
    let ran = stage.run(1, "ok fails runs a b c d e f g paused owned others").await;
    let skipped = |name| match &report(&ran, name).state {
        SubsystemState::Skipped(reason, message) => (*reason, message.as_str()),
        state => panic!("{name}: {state:?}"),
    };
    assert_eq!(report(&ran, "runs").state, SubsystemState::Succeeded);
    assert_eq!(skipped("paused"), (SkipReason::Suspended, "it is suspended"));
    assert_eq!(skipped("a"), (SkipReason::RequirementMissing, "it requires nobody, which is not registered"));
    assert_eq!(skipped("b"), (SkipReason::RequirementLeftOut, "it requires outside, which is not in this cycle"));
    assert_eq!(skipped("c"), (SkipReason::RequirementLeftOut, "it requires paused, which is suspended"));
    assert_eq!(skipped("d"), (SkipReason::RequirementLeftOut, "it requires c, which was skipped itself"));
    assert_eq!(skipped("e"), (SkipReason::RequirementFailed, "it requires fails, which did not succeed"));
    assert_eq!(skipped("f"), (SkipReason::RequirementFailed, "it requires a, which did not succeed"));
    assert_eq!(skipped("owned"), (SkipReason::OwnerRevoked, "its owner token:gone is revoked"));
    assert_eq!(skipped("g"), (SkipReason::RequirementFailed, "it requires owned, which did not succeed"));
    assert_eq!(report(&ran, "others").state, SubsystemState::Succeeded);
}

// ---------------------------------------------------------------------------------------------------------------
// Call slots

#[tokio::test(start_paused = true)]
async fn concurrent_runs_get_call_slots_in_turn_and_never_more_than_exist() {
    let stage = Stage::new(2, &["a1", "a2", "a3", "a4", "b1", "b2", "b3", "b4"]);
    let (first, second) = join!(stage.run(1, "a1 a2 a3 a4"), stage.run(2, "b1 b2 b3 b4"));
    // The first run came when both slots were free. The second one does not wait for its end.
    assert_eq!(stage.fleet.calls(), ["0 a1", "0 a2", "10 a3", "10 b1", "20 a4", "20 b2", "30 b3", "30 b4"]);
    assert_eq!(stage.fleet.log.lock().unwrap().most_in_flight, 2);
    assert_eq!(report(&first, "a4").queued, Duration::from_millis(20));
    assert_eq!(report(&second, "b1").queued, Duration::from_millis(10));
}

#[tokio::test(start_paused = true)]
async fn the_number_of_slots_changes_under_running_cycles() {
    let stage = Stage::new(3, &["a1", "a2", "a3", "a4", "a5", "b1", "b2", "b3"]);
    let lowered = stage.at(5, |stage| stage.engine.slots.set_max(1));
    let raised = stage.at(25, |stage| stage.engine.slots.set_max(3));
    join!(stage.run(1, "a1 a2 a3 a4 a5"), stage.run(2, "b1 b2 b3"), lowered, raised);
    // Running calls continue. New ones start when fewer calls than the new limit run, and at once when it is raised.
    assert_eq!(stage.fleet.calls(), ["0 a1", "0 a2", "0 a3", "10 a4", "20 b1", "25 a5", "25 b2", "30 b3"]);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_waits_for_a_slot_ends_at_its_deadline_and_when_it_is_cancelled() {
    let stage = Stage::new(1, &["hangs", "late", "cancelled", "next"]);
    stage.fleet.does("hangs", &[Does::Hangs]);
    let began = Instant::now();
    let cancel = CancellationToken::new();
    let cycle = stage.cycle(3, "cancelled", 10_000);
    let cancelled = async {
        let ran = stage.engine.run(&cycle, &cancel, &Nobody).await;
        (ran, began.elapsed())
    };
    let late = async { (stage.run_until(2, "late", 50).await, began.elapsed()) };
    let cancels = stage.at(30, |_| cancel.cancel());
    let (_, late, cancelled, next, ()) =
        join!(stage.run_until(1, "hangs", 100), late, cancelled, stage.run(4, "next"), cancels);
    let (late, took) = late;
    assert_eq!(took, Duration::from_millis(50));
    assert!(matches!(report(&late, "late").state, SubsystemState::Skipped(SkipReason::CycleDeadline, _)));
    let (cancelled, took) = cancelled;
    assert_eq!((took, cancelled.finished.state), (Duration::from_millis(30), CycleState::Cancelled));
    // Neither leaves an entry in the line.
    assert_eq!(next.finished.state, CycleState::Succeeded);
    assert_eq!(stage.fleet.calls(), ["0 hangs", "100 next"]);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_dropped_gives_its_slots_back() {
    let stage = Stage::new(1, &["hangs", "waits", "next"]);
    stage.fleet.does("hangs", &[Does::Hangs]);
    let both = async { join!(stage.run(1, "hangs"), stage.run(2, "waits")) };
    assert!(timeout(Duration::from_millis(50), both).await.is_err());
    stage.run_and_publish(3, "next").await;
    assert_eq!(stage.fleet.calls(), ["0 hangs", "50 next"]);
}

#[tokio::test(start_paused = true)]
async fn a_subsystem_that_is_not_called_takes_no_slot() {
    let breaker = BreakerSpec { failure_threshold: Some(1), ..BreakerSpec::default() };
    let stage = Stage::of(1, [SubsystemSpec { breaker, ..spec("broken") }, spec("next"), spec("other")]);
    stage.fleet.does("broken", &[Does::Fails(Code::Internal)]);
    stage.run(1, "broken").await;
    stage.fleet.calls();
    // It comes before the next subsystem, and also when no other subsystem is left.
    for (cycle_id, subset) in [(2, "broken next"), (3, "broken")] {
        let ran = stage.run(cycle_id, subset).await;
        assert!(matches!(report(&ran, "broken").state, SubsystemState::CircuitOpen(_)));
    }
    stage.run_and_publish(4, "other").await;
    assert_eq!(stage.fleet.calls(), ["0 next", "10 other"]);
}

// ---------------------------------------------------------------------------------------------------------------
// Inputs

/// A stage whose subsystems `large` and `small` have outputs, with memory for these outputs as inputs in calls.
async fn stage_with_outputs(subsystems: &[&str], room: &[usize]) -> Stage {
    let mut stage = Stage::new(100, &[&["large", "small"], subsystems].concat());
    stage.fleet.does("large", &[Does::Answers(LARGE)]);
    stage.fleet.does("small", &[Does::Answers(SMALL)]);
    stage.run_and_publish(1, "large small").await;
    stage.fleet.calls();
    let max = room.iter().map(|bytes| output(*bytes).len()).sum();
    stage.engine.inputs = InputRoom::new(Memory::whole(1 << 30).part("inputs", max));
    stage
}

const LARGE: usize = 80;
const SMALL: usize = 10;

#[tokio::test(start_paused = true)]
async fn memory_for_inputs_is_granted_in_the_order_of_requests_over_all_runs() {
    let others = ["a reads large", "b reads large", "c reads small", "d"];
    let stage = stage_with_outputs(&others, &[LARGE, SMALL]).await;
    let runs = [(2, "a"), (3, "b"), (4, "c"), (5, "d")].map(|(cycle_id, subset)| stage.run(cycle_id, subset));
    join_all(runs).await;
    // The third run would fit, but it came after the second one. The last one needs no memory.
    let expected = ["0 a large stale 1", "0 d", "10 b large stale 1", "10 c small stale 1"];
    assert_eq!(stage.fleet.calls(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_waits_for_memory_ends_at_its_deadline_and_unblocks_others() {
    let others = ["hangs reads large", "late reads large", "later reads large", "next reads small"];
    let stage = stage_with_outputs(&others, &[LARGE, SMALL]).await;
    stage.fleet.does("hangs", &[Does::Hangs]);
    let late = stage.run_until(3, "late later", 50);
    let (_, late, _) = join!(stage.run_until(2, "hangs", 100), late, stage.run(4, "next"));
    let SubsystemState::Skipped(SkipReason::CycleDeadline, message) = &report(&late, "late").state else { panic!() };
    let waited = format!("passed while it waited for memory for its inputs of {} bytes", output(LARGE).len());
    assert!(message.ends_with(&waited), "{message}");
    let message = report(&late, "later").state.message();
    assert!(message.ends_with("passed before its turn"), "{message}");
    assert_eq!(stage.fleet.calls(), ["0 hangs large stale 1", "50 next small stale 1"]);
}

#[tokio::test(start_paused = true)]
async fn inputs_may_be_as_large_as_the_limit_and_larger_ones_are_a_failure_at_once() {
    let stage = stage_with_outputs(&["a reads large"], &[LARGE]).await;
    stage.run_and_publish(2, "a").await;
    assert_eq!(stage.fleet.calls(), ["0 a large stale 1"]);

    let stage = stage_with_outputs(&["hangs reads small", "a reads large"], &[LARGE - 1]).await;
    stage.fleet.does("hangs", &[Does::Hangs]);
    let (_, ran) = join!(stage.run_until(2, "hangs", 100), stage.run(3, "a"));
    assert!(matches!(report(&ran, "a").state, SubsystemState::Failed(Code::ResourceExhausted, _)));
    assert_eq!(ran.finished.duration, Duration::ZERO);
}

// ---------------------------------------------------------------------------------------------------------------
// Outputs

#[tokio::test(start_paused = true)]
async fn no_result_of_a_run_is_visible_before_it_is_published() {
    let stage = Stage::new(10, &["a", "own after a", "other reads a"]);
    let standing = stage.standing("a");
    let seen = || {
        let outcomes = (standing.counts().succeeded, standing.counts().output_at.is_some());
        (standing.latest().map(|output| output.cycle_id.0), standing.last().map(|last| last.cycle_id.0), outcomes)
    };
    let first = stage.run(1, "a own").await;
    assert_eq!(seen(), (None, None, (0, false)));
    stage.run_and_publish(2, "other").await;
    stage.engine.publish(first.parts);
    assert_eq!(seen(), (Some(1), Some(1), (1, true)));
    stage.run_and_publish(3, "other").await;

    let fourth = stage.run(4, "a own").await;
    assert_eq!(seen(), (Some(1), Some(1), (1, true)));
    stage.run_and_publish(5, "other").await;
    stage.engine.publish(fourth.parts);
    stage.run_and_publish(6, "other").await;
    let expected = [
        "0 a",
        "10 own a fresh 1",
        "20 other a absent",
        "30 other a stale 1",
        "40 a",
        "50 own a fresh 4",
        "60 other a stale 1",
        "70 other a stale 4",
    ];
    assert_eq!(stage.fleet.calls(), expected);
}

#[tokio::test(start_paused = true)]
async fn an_output_reuses_the_memory_of_the_previous_one_also_while_both_exist() {
    let mut stage = Stage::new(10, &["a", "b after a"]);
    let [first, second, third] = [60, 100, 20].map(|bytes| output(bytes).len());
    stage.engine.outputs = Memory::whole(1 << 30).part("outputs", second + third - 1);
    stage.fleet.does("a", &[Does::Answers(60), Does::Answers(100), Does::Answers(0)]);
    stage.run_and_publish(1, "a").await;
    assert_eq!(stage.engine.outputs.held(), first);

    stage.fleet.does("b", &[Does::Answers(20)]);
    let ran = stage.run(2, "a b").await;
    let SubsystemState::Failed(Code::ResourceExhausted, message) = &report(&ran, "b").state else { panic!() };
    assert!(message.starts_with(&format!("no memory for its output of {third} bytes")), "{message}");
    assert_eq!((stage.standing("a").latest().unwrap().payload.len(), stage.engine.outputs.held()), (first, second));
    stage.engine.publish(ran.parts);
    assert_eq!((stage.standing("a").latest().unwrap().payload.len(), stage.engine.outputs.held()), (second, second));

    // The difference to a smaller output is free at once.
    stage.run_and_publish(3, "a b").await;
    assert_eq!(stage.engine.outputs.held(), output(0).len() + third);
}

// ---------------------------------------------------------------------------------------------------------------
// Attempts

fn with_retries(name: &str, max_attempts: u32) -> SubsystemSpec {
    let initial_backoff = Some(SignedDuration::from_millis(100));
    let retry = RetrySpec { max_attempts: Some(max_attempts), initial_backoff, ..RetrySpec::default() };
    SubsystemSpec { retry, ..spec(name) }
}

#[tokio::test(start_paused = true)]
async fn a_retryable_failure_is_tried_again_up_to_the_limit_and_another_one_is_not() {
    let unavailable = Does::Fails(Code::Unavailable);
    let stage = Stage::of(10, ["recovers", "fails", "refuses"].map(|name| with_retries(name, 3)));
    stage.fleet.does("recovers", &[unavailable, unavailable, Does::Answers(0)]);
    stage.fleet.does("fails", &[unavailable]);
    stage.fleet.does("refuses", &[Does::Fails(Code::PermissionDenied)]);
    let ran = stage.run(1, "recovers fails refuses").await;
    let of = |name| (report(&ran, name).state.code(), report(&ran, name).attempts);
    assert_eq!(of("recovers"), (None, 3));
    assert_eq!(of("fails"), (Some(Code::Unavailable), 3));
    assert_eq!(of("refuses"), (Some(Code::PermissionDenied), 1));
    stage.engine.publish(ran.parts);
    let counts = stage.standing("recovers").counts();
    assert_eq!((counts.attempts, counts.retries), (3, 2));
}

#[tokio::test(start_paused = true)]
async fn a_backoff_beyond_the_deadline_ends_the_attempts() {
    let mut hurried = with_retries("hurried", 5);
    hurried.timeout = Some(SignedDuration::from_millis(15));
    hurried.retry.initial_backoff = Some(SignedDuration::from_secs(3600));
    hurried.retry.max_backoff = Some(SignedDuration::from_secs(3600));
    let stage = Stage::of(10, [hurried]);
    stage.fleet.does("hurried", &[Does::Fails(Code::Unavailable)]);
    let ran = stage.run(1, "hurried").await;
    assert!(report(&ran, "hurried").state.message().ends_with("no time is left to retry"));
    assert_eq!(ran.finished.duration, Duration::from_millis(10));
}

/// Attempts and message of each, in the order of the names.
fn attempts_and_messages(ran: &Ran, names: &str) -> Vec<(u32, String)> {
    let of = |name| (report(ran, name).attempts, report(ran, name).state.message().to_owned());
    names.split(' ').map(of).collect()
}

const REFUSED: Does = Does::Faults(ConnectionFault::Refused);

#[tokio::test(start_paused = true)]
async fn what_one_subsystem_has_waited_for_in_vain_the_later_ones_at_its_endpoint_do_not_wait_for_again() {
    let as_well = "Refused; no further attempt, since the endpoint refused a in this cycle as well";
    let expected = |list: &[(u32, &str)]| list.iter().map(|(n, text)| (*n, (*text).to_owned())).collect::<Vec<_>>();
    let elsewhere = SubsystemSpec { endpoint: "http://127.0.0.1:2".into(), ..with_retries("e after a", 3) };
    let chain = ["a", "b after a", "c after b", "d after c"].map(|text| with_retries(text, 3));
    let patient = with_retries("p after d", 5);
    let stage = Stage::of(10, chain.into_iter().chain([patient, elsewhere]));
    for name in ["a", "b", "c", "d", "e", "p"] {
        stage.fleet.does(name, &[REFUSED]);
    }
    let ran = stage.run(1, "a b c d e p").await;
    // A longer policy waits for what is left of it, which no other subsystem has waited for.
    let ends = [(3, "Refused"), (1, as_well), (1, as_well), (1, as_well), (3, "Refused"), (3, as_well)];
    assert_eq!(attempts_and_messages(&ran, "a b c d e p"), expected(&ends));

    // Each cycle begins anew, and so does the count once the endpoint has taken a connection.
    stage.fleet.does("b", &[Does::Fails(Code::Internal)]);
    let ran = stage.run(2, "a b c d").await;
    let as_well = as_well.replace(" a ", " c ");
    let ends = [(3, "Refused"), (1, "as scripted"), (3, "Refused"), (1, &as_well)];
    assert_eq!(attempts_and_messages(&ran, "a b c d"), expected(&ends));
}

#[tokio::test(start_paused = true)]
async fn subsystems_that_wait_for_their_endpoint_at_the_same_time_make_all_their_attempts() {
    let stage = Stage::of(10, ["a", "b", "c"].map(|name| with_retries(name, 3)));
    for name in ["a", "b", "c"] {
        stage.fleet.does(name, &[REFUSED, REFUSED, Does::Answers(0)]);
    }
    let ran = stage.run(1, "a b c").await;
    assert_eq!((ran.finished.state, ran.finished.error.as_str()), (CycleState::Succeeded, ""));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_counted_only_for_refused_connections() {
    // One attempt says nothing about what a subsystem with three of them waits for.
    let names = "hasty a b c";
    let stage = Stage::of(
        10,
        [with_retries("hasty", 1)]
            .into_iter()
            .chain(["a after hasty", "b after a", "c after b"].map(|text| with_retries(text, 3))),
    );
    stage.fleet.does("hasty", &[REFUSED]);
    stage.fleet.does("a", &[REFUSED, Does::Fails(Code::Unavailable)]);
    stage.fleet.does("b", &[Does::Faults(ConnectionFault::Lost), REFUSED, REFUSED]);
    stage.fleet.does("c", &[REFUSED]);
    let ran = stage.run(1, names).await;
    let attempts: Vec<_> = attempts_and_messages(&ran, names).into_iter().map(|(attempts, _)| attempts).collect();
    assert_eq!(attempts, [1, 3, 3, 1]);
    // What the last error does not say: it was at work when its connection was lost, unlike the one that was refused.
    assert_eq!(report(&ran, "b").state.message(), "Lost; Refused");
    let refused = "Refused; no further attempt, since the endpoint refused b in this cycle as well";
    assert_eq!(report(&ran, "c").state.message(), refused);
}

#[tokio::test(start_paused = true)]
async fn a_subsystem_that_lost_its_initialization_is_initialized_once_more_in_a_cycle() {
    let lost = Does::Fails(Code::FailedPrecondition);
    let stage = Stage::new(10, &["a"]);
    stage.run_and_publish(1, "a").await;
    assert_eq!(stage.fleet.log.lock().unwrap().initialized, 1);
    stage.fleet.does("a", &[lost, Does::Answers(0)]);
    stage.run_and_publish(2, "a").await;
    assert_eq!(stage.fleet.log.lock().unwrap().initialized, 2);
    stage.fleet.does("a", &[lost]);
    let ran = stage.run(3, "a").await;
    assert_eq!((report(&ran, "a").state.code(), report(&ran, "a").attempts), (Some(Code::FailedPrecondition), 2));
    assert_eq!(stage.fleet.log.lock().unwrap().initialized, 3);
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_holds_calls_back_until_a_single_probe_succeeds() {
    let open_for = Some(SignedDuration::from_secs(1));
    let breaker = BreakerSpec { failure_threshold: Some(2), open_for, ..BreakerSpec::default() };
    let stage = Stage::of(10, [SubsystemSpec { breaker, ..with_retries("a", 3) }]);
    stage.fleet.does("a", &[Does::Fails(Code::Unavailable)]);
    let attempts = async |cycle_id| report(&stage.run(cycle_id, "a").await, "a").attempts;
    assert_eq!([attempts(1).await, attempts(2).await, attempts(3).await], [3, 3, 0]);
    sleep(Duration::from_secs(1)).await;
    // The failure of the probe opens it again.
    assert_eq!([attempts(4).await, attempts(5).await], [1, 0]);
    sleep(Duration::from_secs(1)).await;
    stage.fleet.does("a", &[Does::Answers(0)]);
    assert_eq!([attempts(6).await, attempts(7).await], [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_reports_the_number_of_failures() {
    let breaker =
        |failure_threshold| BreakerSpec { failure_threshold: Some(failure_threshold), ..BreakerSpec::default() };
    let one = SubsystemSpec { breaker: breaker(1), ..spec("one") };
    let two = SubsystemSpec { breaker: breaker(2), ..spec("two") };
    let stage = Stage::of(10, [one, two]);
    for name in ["one", "two"] {
        stage.fleet.does(name, &[Does::Fails(Code::Internal)]);
    }
    stage.run(1, "two").await;
    stage.run(2, "one two").await;
    let ran = stage.run(3, "one two").await;
    assert_eq!(report(&ran, "one").state, SubsystemState::CircuitOpen("not called after a failure".into()));
    assert_eq!(report(&ran, "two").state, SubsystemState::CircuitOpen("not called after 2 failures in a row".into()));
}

#[tokio::test(start_paused = true)]
async fn each_attempt_has_its_number_and_the_time_that_is_left() {
    let mut a = with_retries("a", 3);
    a.timeout = Some(SignedDuration::from_secs(1));
    let stage = Stage::of(10, [a]);
    stage.fleet.initializes("a", &[Does::Takes(20)]);
    stage.fleet.does("a", &[Does::Fails(Code::Unavailable)]);
    let seen = Seen::default();
    let ran = stage.engine.run(&stage.cycle(1, "a", 10_000), &CancellationToken::new(), &seen).await;
    let received = std::mem::take(&mut stage.fleet.log.lock().unwrap().received);
    let began: Vec<_> = received.iter().map(|call| ms(1000).saturating_sub(call.timeout)).collect();
    assert_eq!(received.iter().map(|call| call.attempt).collect::<Vec<_>>(), [1, 2, 3]);
    // Each takes 10 ms, and the backoff before it at least 80 ms.
    assert!(began[0] == ms(20) && began[1] >= ms(110) && began[2] >= began[1] + ms(90), "{began:?}");
    // The first one shows from the call of Initialize on.
    let shown = [(1, Duration::ZERO), (2, began[1]), (3, began[2])];
    assert_eq!(*seen.called.lock().unwrap(), shown);
    assert_eq!(*seen.ended.lock().unwrap(), [(3, report(&ran, "a").ended)]);
}

#[tokio::test(start_paused = true)]
async fn a_failed_initialize_fails_the_part_and_an_unimplemented_one_does_not() {
    let stage = Stage::of(10, ["refuses", "has-none"].map(|name| with_retries(name, 3)));
    stage.fleet.initializes("refuses", &[Does::Fails(Code::FailedPrecondition)]);
    stage.fleet.initializes("has-none", &[Does::Fails(Code::Unimplemented)]);
    let ran = stage.run(1, "refuses").await;
    let expected = SubsystemState::Failed(Code::FailedPrecondition, "Initialize: as scripted".into());
    assert_eq!((&report(&ran, "refuses").state, report(&ran, "refuses").attempts), (&expected, 0));
    // It never was initialized, so it did not lose its initialization.
    assert_eq!(stage.fleet.log.lock().unwrap().initialized, 1);
    stage.run(2, "refuses").await;
    assert_eq!(stage.fleet.log.lock().unwrap().initialized, 2);

    stage.run_and_publish(3, "has-none").await;
    stage.run_and_publish(4, "has-none").await;
    assert_eq!(stage.fleet.log.lock().unwrap().initialized, 3);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_names_the_missing_answer() {
    let names = ["hangs", "unreachable", "early", "just-late"];
    let timeout = Some(SignedDuration::from_millis(10));
    let mut specs = names.map(|name| SubsystemSpec { timeout, ..spec(name) });
    specs[2].timeout = None;
    let stage = Stage::of(10, specs);
    stage.fleet.does("hangs", &[Does::Hangs]);
    stage.fleet.initializes("unreachable", &[Does::Hangs]);
    for name in ["early", "just-late"] {
        stage.fleet.does(name, &[Does::Fails(Code::DeadlineExceeded)]);
    }
    let ran = stage.run(1, &names.join(" ")).await;
    let of = |name| match &report(&ran, name).state {
        SubsystemState::TimedOut(message) => message.as_str(),
        state => panic!("{name}: {state:?}"),
    };
    assert_eq!(of("hangs"), "no answer within its timeout of 10ms");
    assert_eq!(of("unreachable"), "no connection, or no answer to Initialize, within its timeout of 10ms");
    // A subsystem may answer DEADLINE_EXCEEDED before its timeout has passed: then its own message is kept.
    assert_eq!(of("early"), "as scripted");
    assert_eq!(of("just-late"), "no answer within its timeout of 10ms");
}

// ---------------------------------------------------------------------------------------------------------------
// Report

#[tokio::test(start_paused = true)]
async fn the_critical_path_is_the_chain_to_the_part_that_ended_last() {
    let stage = Stage::new(10, &["a", "b", "c after a", "d after a b", "e after c"]);
    stage.fleet.does("b", &[Does::Takes(30)]);
    let ran = stage.run(1, "a b c d e").await;
    let path: Vec<_> = ran.finished.critical_path.iter().map(Name::as_str).collect();
    assert_eq!((path, ran.finished.duration), (vec!["b", "d"], ms(40)));
    // It waited for others, but not for a call slot.
    assert_eq!((report(&ran, "d").started, report(&ran, "d").queued), (Some(ms(30)), Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn an_output_is_recorded_if_the_subsystem_or_the_cycle_asks_for_it_and_the_part_succeeded() {
    let always = ["always", "fails"].map(|name| SubsystemSpec { record_output: true, ..spec(name) });
    let stage = Stage::of(10, always.into_iter().chain([spec("asked")]));
    stage.fleet.does("fails", &[Does::Fails(Code::Internal)]);
    let recorded = |ran: &Ran| -> Vec<_> {
        let with_output = ran.finished.subsystems.iter().filter(|report| report.recorded_output.is_some());
        with_output.map(|report| report.name.to_string()).collect()
    };
    let mut cycle = stage.cycle(1, "always asked fails", 10_000);
    let ran = stage.engine.run(&cycle, &CancellationToken::new(), &Nobody).await;
    assert_eq!(recorded(&ran), ["always"]);
    let request = CycleRequest { record_outputs: true, ..(*cycle.request).clone() };
    cycle.request = Arc::new(request);
    let ran = stage.engine.run(&cycle, &CancellationToken::new(), &Nobody).await;
    assert_eq!(recorded(&ran), ["always", "asked"]);
}

#[tokio::test(start_paused = true)]
async fn a_cycle_fails_with_a_critical_subsystem_or_with_all_that_ran_and_is_degraded_otherwise() {
    let critical = SubsystemSpec { critical: true, ..spec("critical") };
    let members = [spec("ok"), spec("fails"), critical].map(|spec| member(&spec));
    let stage = Stage::with(10, members.into_iter().chain([member(&spec("paused")).suspended(true)]));
    for name in ["fails", "critical"] {
        stage.fleet.does(name, &[Does::Fails(Code::Internal)]);
    }
    let of = async |subset| stage.run(1, subset).await.finished.state;
    assert_eq!(of("ok paused").await, CycleState::Succeeded);
    assert_eq!(of("paused").await, CycleState::Succeeded);
    assert_eq!(of("ok fails").await, CycleState::Degraded);
    assert_eq!(of("ok critical").await, CycleState::Failed);
    // One that is suspended was not to run.
    assert_eq!(of("fails paused").await, CycleState::Failed);
    stage.fleet.does("critical", &[Does::Answers(0)]);
    assert_eq!(of("critical fails").await, CycleState::Degraded);
}

#[tokio::test(start_paused = true)]
async fn the_error_of_a_cycle_names_eight_failures_causes_before_subsystems_skipped_for_them() {
    let breaker = BreakerSpec { failure_threshold: Some(1), ..BreakerSpec::default() };
    let timeout = Some(SignedDuration::from_millis(5));
    let held_back = SubsystemSpec { breaker, ..spec("held-back") };
    let late = SubsystemSpec { timeout, ..spec("late") };
    let fleet = ["cause", "a-skipped requires cause", "after after cause", "ok"].map(spec);
    let more = (1..=9).map(|i| spec(&format!("f{i}")));
    let stage = Stage::of(100, fleet.into_iter().chain([held_back, late]).chain(more));
    for name in ["cause", "after", "held-back", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9"] {
        stage.fleet.does(name, &[Does::Fails(Code::Internal)]);
    }
    let error = async |subset| stage.run(1, subset).await.finished.error;
    assert_eq!(error("ok").await, "");
    assert_eq!(error("held-back").await, "1 of 1 failed: held-back INTERNAL: as scripted");
    assert_eq!(
        error("cause a-skipped after held-back late ok").await,
        "5 of 6 failed: cause INTERNAL: as scripted; held-back circuit open: not called after a failure; \
         late timed out: no answer within its timeout of 5ms; after INTERNAL: as scripted; \
         a-skipped skipped: it requires cause, which did not succeed"
    );
    let named = |n| (1..=n).map(|i| format!("f{i} INTERNAL: as scripted")).collect::<Vec<_>>().join("; ");
    assert_eq!(error("f1 f2 f3 f4 f5 f6 f7 f8").await, format!("8 of 8 failed: {}", named(8)));
    assert_eq!(error("f1 f2 f3 f4 f5 f6 f7 f8 f9").await, format!("9 of 9 failed: {}; and 1 more", named(8)));
}

#[tokio::test(start_paused = true)]
async fn the_error_of_a_cancelled_cycle_says_so_beside_its_failures() {
    let stage = Stage::new(10, &["fails", "hangs"]);
    stage.fleet.does("fails", &[Does::Fails(Code::Internal)]);
    stage.fleet.does("hangs", &[Does::Hangs]);
    let (cycle, cancel) = (stage.cycle(1, "fails hangs", 10_000), CancellationToken::new());
    let (ran, ()) = join!(stage.engine.run(&cycle, &cancel, &Nobody), stage.at(50, |_| cancel.cancel()));
    assert_eq!(ran.finished.state, CycleState::Cancelled);
    assert_eq!(ran.finished.error, "cancelled; 1 of 2 failed: fails INTERNAL: as scripted");
    assert_eq!(report(&ran, "hangs").state, SubsystemState::Cancelled);
}

// ---------------------------------------------------------------------------------------------------------------
// Traces

/// Tracing that samples cycles, or does not, if their caller does not decide.
struct Samples(bool);

impl Spans for Samples {
    fn samples(&self) -> Option<bool> {
        Some(self.0)
    }

    fn ended(&self, _: Vec<Span>) {}
}

#[test]
fn a_caller_with_a_trace_decides_whether_its_cycle_is_sampled() {
    let random = Random::seeded(0);
    let caller = |is_sampled| SpanContext::root(TraceId(7), 1, is_sampled);
    let begin = |caller: Option<&SpanContext>, spans: &dyn Spans| Trace::begin(caller, spans, &random);
    assert!(matches!(begin(Some(&caller(true)), &Samples(false)), Trace::Collected(_)));
    assert!(matches!(begin(None, &Samples(true)), Trace::Collected(_)));
    // A trace that is not collected here is handed on to the subsystems.
    for (is_sampled, spans) in [(false, &Samples(true) as &dyn Spans), (true, &Untraced)] {
        let caller = caller(is_sampled);
        let trace = begin(Some(&caller), spans);
        assert!(matches!(&trace, Trace::HandedOn(context) if *context == caller), "{trace:?}");
        assert_eq!(trace.id(), Some(TraceId(7)));
    }
    let unsampled = begin(None, &Samples(false));
    assert!(matches!(&unsampled, Trace::HandedOn(context) if !context.is_sampled), "{unsampled:?}");
    assert_eq!(begin(None, &Untraced).id(), None);
}

#[tokio::test(start_paused = true)]
async fn a_collected_trace_has_a_span_for_each_call_and_for_the_commit_below_that_of_the_cycle() {
    let timeout = Some(SignedDuration::from_millis(200));
    let stage = Stage::of(10, [with_retries("a", 2), SubsystemSpec { timeout, ..spec("late") }, spec("hangs")]);
    stage.fleet.initializes("a", &[Does::Takes(5)]);
    stage.fleet.does("a", &[Does::Fails(Code::Unavailable), Does::Answers(0)]);
    for name in ["late", "hangs"] {
        stage.fleet.does(name, &[Does::Hangs]);
    }
    let caller = SpanContext::root(TraceId(7), 1, true);
    let trace = Trace::begin(Some(&caller), &Samples(false), &Random::seeded(0));
    let (cycle, cancel) = (CycleRun { trace, ..stage.cycle(1, "a late hangs", 10_000) }, CancellationToken::new());
    let began = Instant::now();
    let (ran, ()) = join!(stage.engine.run(&cycle, &cancel, &Nobody), stage.at(300, |_| cancel.cancel()));
    assert_eq!(ran.finished.trace_id, Some(TraceId(7)));
    let Trace::Collected(collected) = cycle.trace else { panic!() };
    // The commit waits for 40 ms, and takes 20 ms.
    let ended = began + ms(300);
    let mut spans = collected.finish(&ran.finished, ended, ended + ms(40)..ended + ms(60));
    let at = |span: &Span| u64::try_from(span.started_at.as_millisecond()).unwrap();

    let root = spans.pop().unwrap();
    assert_eq!((root.context.trace_id, root.parent, at(&root), root.duration), (TraceId(7), Some(1), 0, ms(360)));
    assert!(matches!(root.work, Work::Cycle { has_remote_parent: true, state: CycleState::Cancelled, .. }));
    let commit = spans.pop().unwrap();
    assert_eq!((&commit.work, at(&commit), commit.duration), (&Work::Commit, 340, ms(20)));
    for span in spans.iter().chain([&commit]) {
        assert_eq!((span.context.trace_id, span.parent), (TraceId(7), Some(root.context.span_id)));
    }

    // Each call hands its span to the subsystem.
    let received = std::mem::take(&mut stage.fleet.log.lock().unwrap().received);
    let mut handed_on: Vec<_> = received.iter().map(|call| call.trace.clone().unwrap().span_id).collect();
    let is_run = |span: &&Span| matches!(span.work, Work::Call { method: Method::RunCycle, .. });
    let mut own: Vec<_> = spans.iter().filter(is_run).map(|span| span.context.span_id).collect();
    handed_on.sort_unstable();
    own.sort_unstable();
    assert_eq!(own, handed_on);

    let call = |span: &Span| {
        let Work::Call { subsystem, method, attempt, code, message, .. } = &span.work else { panic!() };
        let shown = format!("{} {method:?} {attempt}: {code} {message}", subsystem.name);
        (shown, at(span), span.duration.as_millis())
    };
    // Without those of Initialize that take no time.
    let calls: Vec<_> = spans.iter().map(call).filter(|(.., took)| *took > 0).collect();
    // After a backoff.
    let second = calls[2].1;
    assert!((95..=135).contains(&second), "{second}");
    let expected = [
        ("a Initialize 1: OK ", 0, 5),
        ("a RunCycle 1: UNAVAILABLE as scripted", 5, 10),
        ("a RunCycle 2: OK ", second, 10),
        ("late RunCycle 1: DEADLINE_EXCEEDED abandoned: its deadline has passed", 0, 200),
        ("hangs RunCycle 1: CANCELLED abandoned: the cycle was cancelled", 0, 300),
    ];
    assert_eq!(calls, expected.map(|(shown, at, took)| (shown.to_owned(), at, took)));
}
