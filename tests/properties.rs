//! Promises 4, 6 and 7 for random fleets with random behaviour, on paused time: no subsystem runs before all subsystems
//! that it waits for have ended, nor in two cycles at a time; a cycle ends by its deadline; and nothing grows without
//! bound.
//!
//! Runs 1,000 cases; `ORCHESTRATOR_TEST_CASES` sets another number.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use jiff::SignedDuration;
use orchestrator_core::{
    host::Host,
    ledger::{SealKeys, Signer},
    memory::{Memory, Shares},
    model::{
        Answer, BreakerSpec, Cause, Code, CycleId, CycleRequest, CycleState, Freshness, Issue, LimitsSpec, LoopSpec,
        LoopStart, Name, Payload, RetrySpec, Severity, Subsystem, SubsystemSpec, TickCounts, Trigger,
    },
    orchestrator::{
        Change, Declared, NotCancelled, Orchestrator, OrchestratorTasks, Refusal, Registrar, Settings, TakenOver,
    },
    ports::{
        CallError, Callee, Filter, InitializeCall, Left, Reply, Retention, RunCall, Seals, Snapshot, Subsystems,
        Untraced,
    },
    proto::orchestrator::v1 as pb,
    record::{self, PartFilter},
    store,
};
use proptest::prelude::*;
use prost::Message;
use tokio::time::sleep;

const MAX_CONCURRENT_CALLS: usize = 5;
const MAX_OUTPUTS_BYTES: usize = 4_000;
const MAX_RECORD_BYTES: usize = 20_000;

/// The cause of changes of these tests.
fn by_test() -> Cause {
    Cause::of_service("test")
}

/// The behaviour of a called subsystem.
#[derive(Clone, Debug)]
enum Behaviour {
    Succeeds,
    Fails(Code),
    Hangs,
    AnswersGarbage,
    SendsTooMuch,
    FillsUpTheOutputs,
    DiesInTheMiddle,
    NeedsInitialize { forgets_every: usize },
    CannotInitialize,
}

#[derive(Clone, Debug)]
struct Scripted {
    spec: SubsystemSpec,
    behaviour: Behaviour,
    takes: Duration,
}

#[derive(Clone, Debug)]
struct Step {
    subset: Option<Vec<usize>>,
    deadline: Duration,
    cancel_after: Option<Duration>,
    suspend: Option<usize>,
    /// True if the next step does not wait for the end of this one.
    goes_on: bool,
}

#[derive(Clone, Debug)]
struct Case {
    fleet: Vec<Scripted>,
    steps: Vec<Step>,
}

fn name(i: usize) -> String {
    format!("s{i}")
}

fn names() -> impl Strategy<Value = Vec<String>> {
    // Some of these are not registered.
    proptest::collection::btree_set(0..16_usize, 0..4).prop_map(|some| some.into_iter().map(name).collect())
}

fn behaviour() -> impl Strategy<Value = Behaviour> {
    prop_oneof![
        8 => Just(Behaviour::Succeeds),
        1 => Just(Behaviour::Fails(Code::Internal)),
        1 => Just(Behaviour::Fails(Code::Unavailable)),
        1 => Just(Behaviour::Fails(Code::PermissionDenied)),
        1 => Just(Behaviour::Fails(Code::FailedPrecondition)),
        1 => Just(Behaviour::Hangs),
        1 => Just(Behaviour::AnswersGarbage),
        1 => Just(Behaviour::SendsTooMuch),
        1 => Just(Behaviour::FillsUpTheOutputs),
        1 => Just(Behaviour::DiesInTheMiddle),
        2 => (1..4_usize).prop_map(|forgets_every| Behaviour::NeedsInitialize { forgets_every }),
        1 => Just(Behaviour::CannotInitialize),
    ]
}

fn scripted(i: usize) -> impl Strategy<Value = Scripted> {
    let policies = (1..4_u32, 1..200_i64, 1..4_u32, any::<bool>(), any::<bool>());
    (-1..3_i32, names(), names(), names(), 1..1500_i64, policies, behaviour(), 0..2000_u64).prop_map(
        move |(phase, requires, after, reads, timeout, policies, behaviour, takes)| {
            let (max_attempts, backoff, failure_threshold, no_breaker, critical) = policies;
            let spec = SubsystemSpec {
                name: name(i),
                endpoint: "http://127.0.0.1:1".into(),
                phase: Some(phase),
                requires,
                after,
                reads,
                timeout: Some(SignedDuration::from_millis(timeout)),
                retry: RetrySpec {
                    max_attempts: Some(max_attempts),
                    initial_backoff: Some(SignedDuration::from_millis(backoff)),
                    ..RetrySpec::default()
                },
                breaker: BreakerSpec {
                    failure_threshold: Some(failure_threshold),
                    open_for: Some(SignedDuration::from_secs(2)),
                    disabled: no_breaker,
                },
                critical,
                limits: LimitsSpec { max_output_bytes: Some(2000), max_issues: Some(4), ..LimitsSpec::default() },
                record_output: i.is_multiple_of(2),
                ..SubsystemSpec::default()
            };
            // Most are quick, and some are later than the timeout.
            Scripted { spec, behaviour, takes: Duration::from_millis(takes * takes / 2000) }
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    (
        proptest::option::weighted(0.3, proptest::collection::vec(0..14_usize, 1..6)),
        prop_oneof![20..500_u64, 500..10_000_u64],
        proptest::option::weighted(0.2, 0..1000_u64),
        proptest::option::weighted(0.2, 0..14_usize),
        any::<bool>(),
    )
        .prop_map(|(subset, deadline, cancel_after, suspend, goes_on)| Step {
            goes_on,
            subset,
            deadline: Duration::from_millis(deadline),
            cancel_after: cancel_after.map(Duration::from_millis),
            suspend,
        })
}

fn case() -> impl Strategy<Value = Case> {
    (1..14_usize)
        .prop_flat_map(|n| ((0..n).map(scripted).collect::<Vec<_>>(), proptest::collection::vec(step(), 1..5)))
        .prop_map(|(fleet, steps)| Case { fleet, steps })
}

/// A call as a subsystem saw it.
#[derive(Clone, Debug, PartialEq)]
enum Seen {
    Called { name: String, cycle_id: CycleId, inputs: Vec<(String, Option<(CycleId, Freshness)>)> },
    Ended { name: String, cycle_id: CycleId, output: bool },
}

/// The fleet, behind the port: each behaviour as the dial layer reports it.
struct Fleet {
    scripted: BTreeMap<String, Scripted>,
    seen: Arc<Mutex<Vec<Seen>>>,
    calls: Mutex<BTreeMap<String, usize>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
}

/// Records the end of a call, also when the call is dropped.
struct Ending<'a> {
    fleet: &'a Fleet,
    name: String,
    cycle_id: CycleId,
    output: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.fleet.in_flight.fetch_sub(1, Ordering::Relaxed);
        let (name, cycle_id, output) = (self.name.clone(), self.cycle_id, self.output);
        self.fleet.seen.lock().unwrap().push(Seen::Ended { name, cycle_id, output });
    }
}

fn error<T>(code: Code) -> Result<T, CallError> {
    Err(CallError::new(code, "as scripted"))
}

fn payload(bytes: usize) -> Payload {
    let object = serde_json::json!({ "text": "x".repeat(bytes) });
    Payload::from_json(object.as_object().unwrap()).unwrap()
}

impl Fleet {
    fn of(scripted: impl Iterator<Item = Scripted>) -> Arc<Self> {
        Arc::new(Self {
            scripted: scripted.map(|scripted| (scripted.spec.name.clone(), scripted)).collect(),
            seen: Arc::default(),
            calls: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
        })
    }

    async fn answer(&self, to: &Subsystem, call: &RunCall) -> Result<Answer, CallError> {
        let scripted = &self.scripted[to.name.as_str()];
        let earlier = {
            let mut calls = self.calls.lock().unwrap();
            let calls = calls.entry(to.name.to_string()).or_default();
            *calls += 1;
            *calls - 1
        };
        if let Behaviour::DiesInTheMiddle = scripted.behaviour {
            sleep(scripted.takes / 2).await;
            return error(Code::Unavailable);
        }
        sleep(scripted.takes).await;
        match &scripted.behaviour {
            Behaviour::Succeeds => Ok(Answer { output: payload(10 + call.inputs.len()), ..Answer::default() }),
            Behaviour::FillsUpTheOutputs => Ok(Answer { output: payload(1900), ..Answer::default() }),
            Behaviour::SendsTooMuch if earlier.is_multiple_of(2) => {
                Ok(Answer { output: payload(5000), ..Answer::default() })
            }
            Behaviour::SendsTooMuch => {
                let issue = Issue { severity: Severity::Info, code: "C".into(), message: String::new() };
                Ok(Answer { issues: vec![issue; 5], ..Answer::default() })
            }
            Behaviour::Fails(code) => error(*code),
            Behaviour::Hangs => std::future::pending().await,
            Behaviour::AnswersGarbage => error(Code::Internal),
            Behaviour::NeedsInitialize { forgets_every } if (earlier + 1).is_multiple_of(*forgets_every + 1) => {
                error(Code::FailedPrecondition)
            }
            _ => Ok(Answer::default()),
        }
    }
}

impl Subsystems for Fleet {
    fn initialize<'a>(&'a self, to: Callee<'a>, _call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        Box::pin(async move {
            match self.scripted[to.subsystem.name.as_str()].behaviour {
                Behaviour::CannotInitialize => error(Code::Internal),
                Behaviour::Succeeds => error(Code::Unimplemented),
                _ => Ok(()),
            }
        })
    }

    fn run_cycle<'a>(&'a self, to: Callee<'a>, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let inputs = call.inputs.iter().map(|input| {
                let made = input.output.as_ref().map(|(output, freshness)| (output.cycle_id, *freshness));
                (input.name.to_string(), made)
            });
            let (name, cycle_id) = (to.subsystem.name.to_string(), call.cycle_id);
            self.seen.lock().unwrap().push(Seen::Called { name: name.clone(), cycle_id, inputs: inputs.collect() });
            let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_in_flight.fetch_max(in_flight, Ordering::Relaxed);
            let mut ending = Ending { fleet: self, name, cycle_id, output: false };
            let answer = self.answer(to.subsystem, &call).await;
            ending.output = answer.is_ok();
            let held = Memory::whole(0).try_hold(0).unwrap();
            answer.map(|answer| Reply { answer, held })
        })
    }

    fn get_status<'a>(&'a self, _of: Callee<'a>, _timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(async { error(Code::Unimplemented) })
    }

    fn forget(&self, _left: &[Left]) {}
}

fn settings() -> Settings {
    Settings {
        orchestrator_id: "test".into(),
        cycle_deadline: Duration::from_secs(10),
        max_concurrent_calls: MAX_CONCURRENT_CALLS,
        max_queued: 4,
        max_record_bytes: MAX_RECORD_BYTES,
        max_outputs_bytes: Some(MAX_OUTPUTS_BYTES),
        max_subsystems: 100,
        max_loops: 10,
        max_watchers: 10,
        retention: Retention::default(),
        audit_reads: true,
        revoked: Arc::default(),
    }
}

fn request(step: &Step, registered: &BTreeSet<String>) -> CycleRequest {
    let subset = step.subset.as_ref().map(|some| {
        let some: BTreeSet<_> = some.iter().map(|i| name(*i)).filter(|name| registered.contains(name)).collect();
        some.iter().map(|name| Name::parse(name).unwrap()).collect::<Vec<_>>()
    });
    CycleRequest {
        subset: subset.filter(|some| !some.is_empty()).map(Into::into),
        deadline: Some(step.deadline),
        ..CycleRequest::over_all(Trigger::Manual, jiff::Timestamp::UNIX_EPOCH)
    }
}

/// A new orchestrator, over a fleet without registrations.
async fn start(settings: Settings, fleet: &Arc<Fleet>) -> (Orchestrator, OrchestratorTasks) {
    let host = Host::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 0);
    let store = store::open(&store::StoreUrl::Memory, record::CHECKS, host.clock).await.unwrap();
    let signer = Signer::generate("test").unwrap();
    let contents = store.take_over(Seals::Checked(SealKeys::of(&signer))).await.unwrap();
    let memory = Shares::of(1 << 30);
    let spans = Arc::new(Untraced);
    let (fleet, declared) = (fleet.clone(), Declared::default());
    let store = TakenOver::new(store, contents, signer);
    Orchestrator::start(settings, &memory, host, fleet, store, declared, spans).await.unwrap()
}

/// Runs one case, and compares its events with the promises.
async fn run(case: Case) {
    let fleet = Fleet::of(case.fleet.iter().cloned());
    let (orchestrator, mut tasks) = start(settings(), &fleet).await;

    let mut registered = BTreeMap::new();
    for Scripted { spec, .. } in &case.fleet {
        let Ok(subsystem) = Subsystem::from_spec(spec) else { continue };
        match orchestrator.register(subsystem.clone(), None, &Registrar::Anyone, by_test()).await {
            Ok(outcome) => {
                assert_eq!(outcome.change, Change::Created);
                registered.insert(spec.name.clone(), subsystem);
            }
            Err(Refusal::OrderRing(ring)) => assert!(ring.names().any(|name| name.as_str() == spec.name), "{ring}"),
            Err(refusal) => panic!("{refusal}"),
        }
    }
    let known: BTreeSet<_> = registered.keys().cloned().collect();

    let mut started = Vec::new();
    for (i, step) in case.steps.iter().enumerate() {
        if let Some(suspend) = step.suspend.map(name).filter(|name| known.contains(name)) {
            orchestrator.suspend(&Name::parse(&suspend).unwrap(), i.is_multiple_of(2), by_test()).await.unwrap();
        }
        let ticket = orchestrator.run_cycle(request(step, &known), false).await.unwrap();
        assert_eq!(ticket.cycle_id, CycleId(i as u64 + 1));
        if let Some(cancel_after) = step.cancel_after {
            sleep(cancel_after).await;
            match orchestrator.cancel_cycle(ticket.cycle_id, by_test()).await {
                Ok(_) | Err(NotCancelled::CycleFinished(_)) => {}
                Err(refusal) => panic!("{refusal}"),
            }
        }
        started.push((ticket, step));
        if step.goes_on && i + 1 < case.steps.len() {
            continue;
        }
        for (ticket, step) in started.drain(..) {
            let cycle_id = ticket.cycle_id;
            let record = ticket.recorded().await.unwrap();
            assert!(record.bytes.len() <= MAX_RECORD_BYTES);
            let telemetry = pb::CycleTelemetry::decode(record.bytes.clone()).unwrap();
            assert_eq!((telemetry.cycle_id, telemetry.revision), (cycle_id.0, record.revision.0));
            // Promise 6, on a clock that advances only when all tasks wait.
            let allowed = step.deadline + Duration::from_millis(250);
            assert!(telemetry.duration_ms <= allowed.as_secs_f64() * 1e3, "took {} ms", telemetry.duration_ms);
            check_reports(&telemetry, &registered, step);
            if record.state == CycleState::Cancelled {
                assert!(step.cancel_after.is_some());
            }
        }
        // Promise 7: calls and memory of outputs.
        assert_eq!(fleet.in_flight.load(Ordering::Relaxed), 0, "a call outlives its cycle");
        assert!(fleet.most_in_flight.load(Ordering::Relaxed) <= MAX_CONCURRENT_CALLS);
        let outputs = orchestrator.subsystems(None, usize::MAX);
        let outputs = outputs.iter().filter_map(|entry| entry.member.standing.latest());
        assert!(outputs.map(|output| output.payload.len()).sum::<usize>() <= MAX_OUTPUTS_BYTES);
    }
    check_order(&fleet.seen.lock().unwrap(), &registered);
    let page = orchestrator.history().cycles(None, Filter::default(), PartFilter::default(), 100).await.unwrap();
    let recorded: Vec<_> = page.records.iter().map(|record| record.as_ref().unwrap()).collect();
    let ids: BTreeSet<_> = recorded.iter().map(|record| record.cycle_id.0).collect();
    assert_eq!(ids, (1..=case.steps.len() as u64).collect());
    let revisions: Vec<_> = recorded.iter().rev().map(|record| record.revision.0).collect();
    assert_eq!(revisions, (1..=case.steps.len() as u64).collect::<Vec<_>>());
    orchestrator.drain();
    tasks.finished().await.unwrap();
}

/// Every subsystem of the cycle has one report, and the states fit together.
fn check_reports(telemetry: &pb::CycleTelemetry, registered: &BTreeMap<String, Subsystem>, step: &Step) {
    if telemetry.started_at.is_none() {
        // It was cancelled while it was still in line.
        assert!(step.cancel_after.is_some() && telemetry.state() == pb::CycleState::Cancelled);
        assert!(telemetry.subsystems.is_empty());
        return;
    }
    let reported: Vec<_> = telemetry.subsystems.iter().map(|part| part.name.clone()).collect();
    let expected: BTreeSet<_> = match &step.subset {
        Some(some) => some.iter().map(|i| name(*i)).filter(|name| registered.contains_key(name)).collect(),
        None => registered.keys().cloned().collect(),
    };
    let expected = if expected.is_empty() { registered.keys().cloned().collect() } else { expected };
    assert_eq!(reported.iter().cloned().collect::<BTreeSet<_>>(), expected);
    assert_eq!(reported.len(), expected.len(), "reported twice");
    let state =
        |name: &str| telemetry.subsystems.iter().find(|part| part.name == name).map(pb::SubsystemTelemetry::state);
    for part in &telemetry.subsystems {
        if part.state() == pb::SubsystemState::Succeeded {
            for required in &registered[&part.name].requires {
                assert_eq!(state(required.as_str()), Some(pb::SubsystemState::Succeeded), "{}", part.name);
            }
        }
        assert!(part.attempts > 0 || part.state() != pb::SubsystemState::Succeeded, "succeeded without a call");
    }
    for name in &telemetry.critical_path {
        assert!(reported.contains(name));
    }
}

/// Promise 4, by the events that the subsystems saw.
fn check_order(seen: &[Seen], registered: &BTreeMap<String, Subsystem>) {
    // The cycle in which each subsystem is being called, and the one in which it was called last.
    let mut running = BTreeMap::new();
    let mut last = BTreeMap::new();
    let mut ended: BTreeMap<CycleId, BTreeSet<String>> = BTreeMap::new();
    let mut called: BTreeMap<CycleId, BTreeSet<String>> = BTreeMap::new();
    let mut made: BTreeMap<String, CycleId> = BTreeMap::new();
    for seen in seen {
        match seen {
            Seen::Called { name, cycle_id, inputs } => {
                let subsystem = &registered[name];
                for earlier in subsystem.requires.iter().chain(&subsystem.after) {
                    assert_ne!(running.get(earlier.as_str()), Some(cycle_id), "{name} runs beside {earlier}");
                }
                for (other, registration) in registered {
                    if registration.phase < subsystem.phase {
                        assert_ne!(running.get(other), Some(cycle_id), "{name} runs beside {other} of a lower phase");
                    }
                    if registration.phase > subsystem.phase {
                        let called = called.get(cycle_id).is_some_and(|called| called.contains(other));
                        assert!(!called, "{name} runs after {other} of a higher phase");
                    }
                    let waits_for_us = registration.requires.iter().chain(&registration.after);
                    if waits_for_us.into_iter().any(|waited| waited.as_str() == name) {
                        let called = called.get(cycle_id).is_some_and(|called| called.contains(other));
                        assert!(!called, "{name} runs after {other}, which waits for it");
                    }
                }
                for (input, given) in inputs {
                    if let Some((by, freshness)) = given {
                        assert!(registered.contains_key(input));
                        assert_eq!(*freshness == Freshness::Fresh, by == cycle_id);
                        assert!(made.get(input).is_some_and(|latest| by <= latest), "no subsystem made this output");
                    }
                }
                assert_eq!(running.insert(name.clone(), *cycle_id), None, "{name} is in two calls at a time");
                assert!(last.insert(name.clone(), *cycle_id) <= Some(*cycle_id), "{name} has seen a later cycle");
                called.entry(*cycle_id).or_default().insert(name.clone());
            }
            Seen::Ended { name, cycle_id, output } => {
                assert_eq!(running.remove(name), Some(*cycle_id));
                ended.entry(*cycle_id).or_default().insert(name.clone());
                if *output {
                    made.insert(name.clone(), *cycle_id);
                }
            }
        }
    }
}

#[test]
fn the_promises_hold_for_any_behaviour_of_the_fleet() {
    let cases = std::env::var("ORCHESTRATOR_TEST_CASES").ok().map_or(1000, |cases| cases.parse().unwrap());
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(case in case())| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(run(case));
    });
}

/// Loops run at their own pace: loops over disjoint subsystems lose no tick to each other, however long a cycle takes.
#[tokio::test(start_paused = true)]
async fn loops_over_disjoint_subsystems_lose_no_tick_to_each_other() {
    let scripted = |i: usize, takes| Scripted {
        spec: SubsystemSpec { name: name(i), endpoint: "http://127.0.0.1:1".into(), ..SubsystemSpec::default() },
        behaviour: Behaviour::Succeeds,
        takes: Duration::from_millis(takes),
    };
    let scripted = (0..6).map(|i| scripted(i, if i < 3 { 10 } else { 1200 }));
    let fleet = Fleet::of(scripted);
    let (orchestrator, mut tasks) = start(Settings { max_concurrent_calls: 100, ..settings() }, &fleet).await;
    for scripted in fleet.scripted.values() {
        orchestrator
            .register(Subsystem::from_spec(&scripted.spec).unwrap(), None, &Registrar::Anyone, by_test())
            .await
            .unwrap();
    }
    for (loop_name, milliseconds, subsystems) in [("fast", 500, 0..3), ("slow", 2000, 3..6)] {
        let spec = LoopSpec {
            name: loop_name.into(),
            interval: Some(SignedDuration::from_millis(milliseconds)),
            subsystems: subsystems.map(name).collect(),
            ..LoopSpec::default()
        };
        orchestrator.start_loop(LoopStart::from_spec(&spec).unwrap(), by_test()).await.unwrap();
    }
    sleep(Duration::from_millis(20_250)).await;
    let ticks = |name: &str| {
        let entry = orchestrator.loops().into_iter().find(|entry| entry.settings.name.as_str() == name).unwrap();
        entry.state.ticks
    };
    assert_eq!(ticks("fast"), TickCounts { ran: 40, ..TickCounts::default() });
    assert_eq!(ticks("slow"), TickCounts { ran: 10, ..TickCounts::default() });
    orchestrator.drain();
    tasks.finished().await.unwrap();
}
