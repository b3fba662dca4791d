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

use super::{CycleRun, Engine, InputRoom, Member, Observer, Plan, Ran, Slots, Standing, Trace};
use crate::{
    memory::Memory,
    model::{
        Answer, BreakerSpec, Code, CycleId, CycleRequest, CycleState, Epoch, Freshness, Name, Payload, RetrySpec,
        SkipReason, Subsystem, SubsystemReport, SubsystemSpec, SubsystemState, Trigger,
    },
    ports::{CallError, InitializeCall, Left, Reply, RunCall, Snapshot, Subsystems, Untraced},
    random::Random,
};

/// An answer of a subsystem.
#[derive(Clone, Copy)]
enum Does {
    /// An output with a text of this length.
    Answers(usize),
    Fails(Code),
    Hangs,
}

/// The fleet: the answers of each subsystem, call by call; the last one repeats. Each call takes 10 ms.
#[derive(Default)]
struct Fleet {
    script: Mutex<BTreeMap<String, Vec<Does>>>,
    began: Mutex<Option<Instant>>,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    calls: Vec<String>,
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

    /// The calls since the last query, as "10 a": milliseconds after the first call, and the subsystem.
    fn calls(&self) -> Vec<String> {
        *self.began.lock().unwrap() = None;
        std::mem::take(&mut self.log.lock().unwrap().calls)
    }
}

impl Subsystems for Fleet {
    fn initialize<'a>(&'a self, _to: &'a Subsystem, _call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        self.log.lock().unwrap().initialized += 1;
        Box::pin(async { Ok(()) })
    }

    fn run_cycle<'a>(&'a self, to: &'a Subsystem, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let began = *self.began.lock().unwrap().get_or_insert_with(Instant::now);
            let inputs = call.inputs.iter().map(|input| match &input.output {
                Some((output, Freshness::Fresh)) => format!(" {} fresh {}", input.name, output.cycle_id.0),
                Some((output, Freshness::Stale)) => format!(" {} stale {}", input.name, output.cycle_id.0),
                None => format!(" {} absent", input.name),
            });
            let line = format!("{} {}{}", began.elapsed().as_millis(), to.name, inputs.collect::<String>());
            let _in_flight = {
                let mut log = self.log.lock().unwrap();
                log.calls.push(line);
                log.in_flight += 1;
                log.most_in_flight = log.most_in_flight.max(log.in_flight);
                InFlight(self)
            };
            let does = {
                let mut script = self.script.lock().unwrap();
                match script.get_mut(to.name.as_str()) {
                    Some(steps) if steps.len() > 1 => steps.remove(0),
                    steps => steps.map_or(Does::Answers(0), |steps| steps[0]),
                }
            };
            sleep(Duration::from_millis(10)).await;
            match does {
                Does::Answers(bytes) => {
                    let answer = Answer { output: output(bytes), ..Answer::default() };
                    Ok(Reply { answer, held: Memory::whole(0).try_hold(0).unwrap() })
                }
                Does::Fails(code) => Err(CallError { code, message: "as scripted".into() }),
                Does::Hangs => std::future::pending().await,
            }
        })
    }

    fn get_status<'a>(&'a self, _of: &'a Subsystem, _timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(async { Err(CallError { code: Code::Unimplemented, message: String::new() }) })
    }

    fn forget(&self, _left: &[Left]) {}
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

/// An engine over some subsystems.
struct Stage {
    fleet: Arc<Fleet>,
    engine: Engine,
    plan: Arc<Plan>,
}

/// A subsystem without inputs: `name`; with inputs: `name after other…` or `name reads other…`.
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
        reads: others("reads"),
        ..SubsystemSpec::default()
    }
}

impl Stage {
    fn new(slots: usize, subsystems: &[&str]) -> Self {
        Self::of(slots, subsystems.iter().map(|text| spec(text)))
    }

    fn of(slots: usize, specs: impl IntoIterator<Item = SubsystemSpec>) -> Self {
        let fleet = Arc::new(Fleet::default());
        let members = specs.into_iter().map(|spec| {
            let subsystem = Arc::new(Subsystem::from_spec(&spec).unwrap());
            Member::new(subsystem, false, Arc::default())
        });
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

fn report<'a>(ran: &'a Ran, name: &str) -> &'a SubsystemReport {
    ran.finished.subsystems.iter().find(|report| report.name.as_str() == name).unwrap()
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
    let others = ["hangs reads large", "late reads large", "next reads small"];
    let stage = stage_with_outputs(&others, &[LARGE, SMALL]).await;
    stage.fleet.does("hangs", &[Does::Hangs]);
    let late = stage.run_until(3, "late", 50);
    let (_, late, _) = join!(stage.run_until(2, "hangs", 100), late, stage.run(4, "next"));
    let SubsystemState::Skipped(SkipReason::CycleDeadline, message) = &report(&late, "late").state else { panic!() };
    let waited = format!("passed while it waited for memory for its inputs of {} bytes", output(LARGE).len());
    assert!(message.ends_with(&waited), "{message}");
    assert_eq!(stage.fleet.calls(), ["0 hangs large stale 1", "50 next small stale 1"]);
}

#[tokio::test(start_paused = true)]
async fn inputs_larger_than_the_limit_are_a_failure_at_once() {
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
    // The probe fails, and its failure is the only one that counts.
    assert_eq!([attempts(4).await, attempts(5).await], [1, 0]);
    sleep(Duration::from_secs(1)).await;
    stage.fleet.does("a", &[Does::Answers(0)]);
    assert_eq!([attempts(6).await, attempts(7).await], [1, 1]);
}
