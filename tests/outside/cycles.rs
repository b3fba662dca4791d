//! Cycles: their order, the inputs of subsystems, every way in which a part or a cycle can end, and overlap.

use std::{collections::BTreeMap, time::Duration};

use crate::common::{
    Stage,
    fleet::{Call, End, Fleet, Initialize, Method, Run, State, from_struct, to_struct},
    patiently,
    service::{Client, Home, because, decode, invalid, ms, next_recorded, part, reason, registration},
};
use orchestrator_core::proto::{
    orchestrator::v1::{
        self as pb, BreakerState, CycleState, OverlapPolicy, SkipReason, SubsystemState, Trigger, cycle_event::Event,
    },
    subsystem::v1 as subsystem,
};
use serde_json::json;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

fn names<const N: usize>(names: [&str; N]) -> Vec<String> {
    names.map(str::to_owned).into()
}

/// Runs a cycle in the background.
fn start(client: &Client, request: pb::RunCycleRequest) -> JoinHandle<Result<pb::CycleTelemetry, Status>> {
    let mut client = client.clone();
    tokio::spawn(async move { client.run_with(request).await })
}

async fn ended(running: JoinHandle<Result<pb::CycleTelemetry, Status>>) -> Result<pb::CycleTelemetry, Status> {
    patiently("the cycle to end", running).await.unwrap()
}

fn ended_at(call: &Call) -> u64 {
    call.ended.unwrap().0
}

fn states(cycle: &pb::CycleTelemetry) -> BTreeMap<&str, SubsystemState> {
    cycle.subsystems.iter().map(|part| (part.name.as_str(), part.state())).collect()
}

// ---------------------------------------------------------------------------------------------------------------
// Order

#[tokio::test]
async fn each_subsystem_starts_as_soon_as_its_predecessors_have_ended() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    stage.register("after_a", |it| it.after = names(["a", "nobody"])).await;
    stage.register("after_both", |it| (it.requires, it.after) = (names(["a"]), names(["b"]))).await;
    stage.register("reader", |it| it.reads = names(["a"])).await;
    stage.register("earlier", |it| it.phase = -5).await;
    stage.register("later", |it| it.phase = 1).await;
    for held in ["a", "b", "earlier", "after_a"] {
        stage.fleet.run(held, Run::Hold);
    }
    let running = start(&stage.client, pb::RunCycleRequest::default());
    stage.fleet.until_run("earlier", 1).await;
    assert_eq!(stage.fleet.calls().len(), 2, "one to initialize it, one to run it, and none of a later phase");
    stage.fleet.run("earlier", Run::Echo);
    for name in ["a", "b", "reader"] {
        stage.fleet.until_run(name, 1).await;
    }
    stage.fleet.run("a", Run::Echo);
    // While `b` still runs.
    stage.fleet.until_run("after_a", 1).await;
    stage.fleet.run("b", Run::Echo);
    // While `after_a` still runs.
    stage.fleet.until_run("after_both", 1).await;
    stage.fleet.run("after_a", Run::Echo);
    let cycle = ended(running).await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");

    let call = |name| stage.fleet.runs(name).pop().unwrap();
    let starts_after = |later, earlier| assert!(call(later).began > ended_at(&call(earlier)), "{later}, {earlier}");
    for (later, earlier) in [("a", "earlier"), ("after_a", "a"), ("after_both", "a"), ("after_both", "b")] {
        starts_after(later, earlier);
    }
    for earlier in ["a", "b", "after_a", "after_both", "reader", "earlier"] {
        starts_after("later", earlier);
    }
    let order: Vec<_> = cycle.subsystems.iter().map(|part| part.name.as_str()).collect();
    assert_eq!(order, ["earlier", "a", "b", "reader", "after_a", "after_both", "later"]);
}

#[tokio::test]
async fn inputs_are_fresh_stale_or_absent_also_after_a_restart() {
    use subsystem::Freshness::{Absent, Fresh, Stale};
    let mut stage = Stage::new().await;
    stage.register("early", |it| (it.phase, it.reads) = (-1, names(["maker", "early"]))).await;
    stage.register("maker", |_| {}).await;
    stage.register("needs", |it| it.requires = names(["maker"])).await;
    stage.register("follows", |it| (it.after, it.reads) = (names(["maker", "nobody"]), names(["maker"]))).await;

    let seen = |stage: &Stage, name: &str| {
        let inputs = stage.fleet.runs(name).pop().unwrap().inputs;
        inputs.into_iter().map(|(name, it)| (name, it.freshness, it.cycle_id, it.output)).collect::<Vec<_>>()
    };
    let input = |name: &str, freshness, cycle: u64| {
        let output = if cycle == 0 { json!({}) } else { json!({ "by": name, "cycle": cycle }) };
        (name.to_owned(), freshness, cycle, output)
    };
    stage.client.run().await.unwrap();
    assert_eq!(seen(&stage, "early"), [input("early", Absent, 0), input("maker", Absent, 0)]);
    assert_eq!(seen(&stage, "needs"), [input("maker", Fresh, 1)]);
    assert_eq!(seen(&stage, "follows"), [input("maker", Fresh, 1), input("nobody", Absent, 0)]);

    stage.client.run().await.unwrap();
    assert_eq!(seen(&stage, "early"), [input("early", Stale, 1), input("maker", Stale, 1)]);

    // It fails, and its last output remains an input.
    stage.fleet.run("maker", Run::fail(Code::Internal));
    stage.client.run().await.unwrap();
    assert_eq!(stage.fleet.runs("needs").len(), 2);
    assert_eq!(seen(&stage, "follows"), [input("maker", Stale, 2), input("nobody", Absent, 0)]);

    let mut stage = stage.restarted().await;
    stage.client.run().await.unwrap();
    assert_eq!(seen(&stage, "early"), [input("early", Stale, 3), input("maker", Stale, 2)]);
    let mut stage = stage.killed().await;
    stage.client.run().await.unwrap();
    assert_eq!(seen(&stage, "early"), [input("early", Stale, 4), input("maker", Stale, 2)]);
    let maker = stage.client.subsystem("maker").await.unwrap();
    assert_eq!((maker.output_cycle_id, from_struct(&maker.output)), (2, json!({ "by": "maker", "cycle": 2 })));
}

#[tokio::test]
async fn initialize_comes_first_in_an_epoch_and_again_on_request_or_after_a_change() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "orchestrator_id=home"])).await;
    stage.fleet.script("a", |script| script.needs_initialize = true);
    stage.fleet.script("none", |script| script.initialize = Initialize::Unimplemented);
    stage.fleet.script("bad", |script| script.initialize = Initialize::Fail(Code::PermissionDenied));
    let configure = |it: &mut pb::Registration| it.parameters = to_struct(&json!({ "n": 1 }));
    stage.register("a", configure).await;
    stage.register_all(&["none", "bad"]).await;

    let cycle = stage.client.run().await.unwrap();
    let bad = part(&cycle, "bad");
    assert_eq!((bad.state(), bad.error_code.as_str()), (SubsystemState::Failed, "PERMISSION_DENIED"));
    assert_eq!((bad.error_message.as_str(), bad.attempts), ("Initialize: as scripted", 0));
    let none = part(&cycle, "none");
    assert_eq!((none.state(), none.attempts), (SubsystemState::Succeeded, 1));
    let first = stage.fleet.initializations("a").pop().unwrap();
    assert_eq!((first.orchestrator_id.as_str(), &first.parameters), ("home", &json!({ "n": 1 })));
    let epoch = stage.client.status().await.unwrap().epoch;
    assert_eq!(first.epoch, epoch);
    assert!(first.timeout.unwrap() <= Duration::from_secs(10));
    assert!(stage.client.subsystem("a").await.unwrap().initialized);
    assert!(!stage.client.subsystem("bad").await.unwrap().initialized);

    // It is not repeated in the next cycle, nor without a change, nor after maintenance.
    stage.register("a", configure).await;
    let name = || "a".to_owned();
    stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: name() }).await.unwrap();
    stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: name() }).await.unwrap();
    stage.client.run().await.unwrap();
    assert_eq!(stage.fleet.initializations("a").len(), 1);
    assert_eq!(stage.fleet.initializations("none").len(), 1);
    // A failed initialization is tried again.
    assert_eq!(stage.fleet.initializations("bad").len(), 2);

    // It was restarted, and asks for it.
    stage.fleet.forget_initialization("a");
    let cycle = stage.client.run().await.unwrap();
    let a = part(&cycle, "a");
    assert_eq!((a.state(), a.attempts), (SubsystemState::Succeeded, 2));
    assert_eq!(stage.fleet.initializations("a").len(), 2);

    // Other parameters.
    stage.register("a", |it| it.parameters = to_struct(&json!({ "n": 2 }))).await;
    assert!(!stage.client.subsystem("a").await.unwrap().initialized);
    stage.client.run().await.unwrap();
    assert_eq!(stage.fleet.initializations("a").last().unwrap().parameters, json!({ "n": 2 }));

    // Another epoch.
    let mut stage = stage.restarted().await;
    stage.client.run().await.unwrap();
    let initialized = stage.fleet.initializations("a");
    assert_eq!(initialized.len(), 4);
    assert!(initialized[3].epoch > epoch);

    // A subsystem that always asks for it fails.
    stage.fleet.run("a", Run::fail(Code::FailedPrecondition));
    let cycle = stage.client.run().await.unwrap();
    let a = part(&cycle, "a");
    assert_eq!((a.error_code.as_str(), a.attempts), ("FAILED_PRECONDITION", 2));
    assert_eq!(stage.fleet.now(|state| state.stale_calls), 0);
}

#[tokio::test]
async fn parameters_of_the_cycle_override_those_of_the_registration() {
    let mut stage = Stage::new().await;
    stage.register("a", |it| it.parameters = to_struct(&json!({ "a": 1, "b": { "x": 1 } }))).await;
    stage.register("b", |_| {}).await;
    let parameters = to_struct(&json!({ "b": { "y": 2 }, "c": null }));
    stage.client.run_with(pb::RunCycleRequest { parameters, ..Default::default() }).await.unwrap();
    // A top-level key replaces the whole value.
    assert_eq!(stage.fleet.runs("a")[0].parameters, json!({ "a": 1, "b": { "y": 2 }, "c": null }));
    assert_eq!(stage.fleet.runs("b")[0].parameters, json!({ "b": { "y": 2 }, "c": null }));
    stage.client.run().await.unwrap();
    assert_eq!(stage.fleet.runs("a")[1].parameters, json!({ "a": 1, "b": { "x": 1 } }));
    for parameters in [b"\xff".as_slice().into(), to_struct(&json!({ "p": "x".repeat(64 << 10) }))] {
        let request = pb::RunCycleRequest { parameters, ..Default::default() };
        assert_eq!(reason(&stage.client.run_with(request).await.unwrap_err()), invalid(["parameters"]));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// How parts end

const CODES: [(Code, &str); 16] = [
    (Code::Cancelled, "CANCELLED"),
    (Code::Unknown, "UNKNOWN"),
    (Code::InvalidArgument, "INVALID_ARGUMENT"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
    (Code::NotFound, "NOT_FOUND"),
    (Code::AlreadyExists, "ALREADY_EXISTS"),
    (Code::PermissionDenied, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, "RESOURCE_EXHAUSTED"),
    (Code::FailedPrecondition, "FAILED_PRECONDITION"),
    (Code::Aborted, "ABORTED"),
    (Code::OutOfRange, "OUT_OF_RANGE"),
    (Code::Unimplemented, "UNIMPLEMENTED"),
    (Code::Internal, "INTERNAL"),
    (Code::Unavailable, "UNAVAILABLE"),
    (Code::DataLoss, "DATA_LOSS"),
    (Code::Unauthenticated, "UNAUTHENTICATED"),
];

#[tokio::test]
async fn every_code_is_recorded_and_only_unavailable_is_retried_by_default() {
    let mut stage = Stage::new().await;
    for (code, name) in CODES {
        stage.fleet.run(name, Run::Fail(code, format!("told {name}")));
        stage.register(name, |it| it.retry = Some(quick_retry(3, &[]))).await;
    }
    stage.register("healthy", |_| {}).await;
    let cycle = stage.client.run().await.unwrap();
    for (code, name) in CODES {
        let part = part(&cycle, name);
        assert_eq!((part.error_code.as_str(), part.error_message.as_str()), (name, &*format!("told {name}")));
        // gRPC's code for a deadline, from either side.
        let is_late = code == Code::DeadlineExceeded;
        assert_eq!(part.state(), if is_late { SubsystemState::TimedOut } else { SubsystemState::Failed }, "{name}");
        let attempts = match code {
            Code::Unavailable => 3,
            // It is called once more after `Initialize`.
            Code::FailedPrecondition => 2,
            _ => 1,
        };
        assert_eq!(part.attempts, attempts, "{name}");
        assert_eq!(stage.fleet.runs(name).len(), attempts as usize, "{name}");
    }
    let healthy = part(&cycle, "healthy");
    assert_eq!((healthy.state(), healthy.error_code.as_str()), (SubsystemState::Succeeded, ""));
    assert_eq!(cycle.state(), CycleState::Degraded);
    assert!(cycle.error.starts_with("16 of 17 failed: ABORTED ABORTED: told ABORTED; "), "{}", cycle.error);
    assert!(cycle.error.ends_with("and 8 more"), "{}", cycle.error);
}

fn quick_retry(max_attempts: u32, codes: &[&str]) -> pb::RetryPolicy {
    pb::RetryPolicy {
        max_attempts,
        initial_backoff: ms(1),
        max_backoff: ms(1),
        retryable_status_codes: codes.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn an_answer_that_breaks_the_contract_or_its_limits_fails_only_its_subsystem() {
    let mut stage = Stage::new().await;
    let unreliable = Fleet::start().await;
    let issue = |code: String, message: String| subsystem::Issue { severity: 1, code, message };
    let answers = |answer| Run::Answer(answer);
    let issues = |issues| answers(subsystem::RunCycleResponse { issues, ..Default::default() });
    let metric =
        |name: String| answers(subsystem::RunCycleResponse { metrics: [(name, 1.0)].into(), ..Default::default() });
    // This number of nested objects. Built by hand, because the kit would refuse them.
    let nested = |objects: usize| {
        let object = (1..objects).fold(Vec::new(), |inner: Vec<u8>, _| {
            let wrap = |tag: u8, bytes: &[u8]| {
                let mut field = vec![tag];
                prost::encode_length_delimiter(bytes.len(), &mut field).unwrap();
                field.extend(bytes);
                field
            };
            wrap(0x0a, &[wrap(0x0a, b"k"), wrap(0x12, &wrap(0x2a, &inner))].concat())
        });
        answers(subsystem::RunCycleResponse { output: object.into(), ..Default::default() })
    };
    // `{"x": NaN}`, which JSON can't represent.
    let nan = [b"\x0a\x0e\x0a\x01x\x12\x09\x11".as_slice(), &f64::NAN.to_le_bytes()].concat();
    let not_finite = answers(subsystem::RunCycleResponse { output: nan.into(), ..Default::default() });
    let cases = [
        ("garbage", Run::Raw(b"\xff\xff".as_slice().into()), "INTERNAL"),
        ("truncated", Run::Truncated, "INTERNAL"),
        ("no_struct", Run::malformed_output(), "INTERNAL"),
        ("too_deep", nested(31), "INTERNAL"),
        ("not_finite", not_finite, "INTERNAL"),
        ("large_message", Run::large_output(5 << 20), "RESOURCE_EXHAUSTED"),
        ("large_output", Run::large_output(1 << 20), "RESOURCE_EXHAUSTED"),
        ("many_metrics", Run::metrics(65), "RESOURCE_EXHAUSTED"),
        ("many_issues", Run::issues(33), "RESOURCE_EXHAUSTED"),
        ("nameless_metric", metric(String::new()), "RESOURCE_EXHAUSTED"),
        ("long_metric", metric("m".repeat(129)), "RESOURCE_EXHAUSTED"),
        ("long_code", issues(vec![issue("c".repeat(129), String::new())]), "RESOURCE_EXHAUSTED"),
        ("long_issue", issues(vec![issue("C".into(), "m".repeat((4 << 10) + 1))]), "RESOURCE_EXHAUSTED"),
    ];
    for (name, run, _) in &cases {
        stage.fleet.run(name, run.clone());
        stage.register(name, |_| {}).await;
    }
    let fitting = [
        ("deep_enough", nested(30)),
        ("fits_metrics", Run::metrics(64)),
        ("fits_issues", Run::issues(32)),
        ("fits_output", Run::large_output((1 << 20) - 40)),
        ("fits_words", issues(vec![issue("c".repeat(128), "m".repeat(4 << 10))])),
        ("empty", Run::Raw(b"".as_slice().into())),
    ];
    for (name, run) in &fitting {
        stage.fleet.run(name, run.clone());
        stage.register(name, |_| {}).await;
    }
    // One that fits into the trailers of a call, and one that does not.
    for (name, bytes) in [("long_message", 50_000), ("too_long_message", 80_000)] {
        stage.fleet.run(name, Run::Fail(Code::Internal, "e".repeat(bytes)));
        stage.register(name, |it| it.retry = Some(quick_retry(1, &[]))).await;
    }
    // These break their connection.
    unreliable.run("disconnects", Run::Disconnect);
    for (name, endpoint) in [("disconnects", unreliable.endpoint()), ("unreachable", "http://127.0.0.1:1")] {
        let retry = Some(quick_retry(2, &[]));
        stage.client.register(pb::Registration { retry, ..registration(name, endpoint) }).await.unwrap();
    }

    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Degraded, "{cycle:?}");
    for (name, _, code) in &cases {
        let part = part(&cycle, name);
        assert_eq!((part.state(), part.error_code.as_str()), (SubsystemState::Failed, *code), "{part:?}");
        assert!(!part.error_message.is_empty(), "{part:?}");
        assert!(part.metrics.is_empty() && part.issues.is_empty(), "{part:?}");
    }
    for (name, _) in &fitting {
        assert_eq!(part(&cycle, name).state(), SubsystemState::Succeeded, "{:?}", part(&cycle, name));
    }
    assert_eq!(part(&cycle, "fits_metrics").metrics.len(), 64);
    assert_eq!(part(&cycle, "fits_issues").issues.len(), 32);
    let long = part(&cycle, "long_message");
    assert_eq!((long.error_code.as_str(), long.error_message.len()), ("INTERNAL", 1 << 10), "{long:?}");
    let too_long = part(&cycle, "too_long_message");
    assert_eq!(too_long.state(), SubsystemState::Failed, "{too_long:?}");
    // One is called until it breaks; the other can't even be initialized.
    for (name, attempts) in [("disconnects", 2), ("unreachable", 0)] {
        let part = part(&cycle, name);
        assert_eq!((part.error_code.as_str(), part.attempts), ("UNAVAILABLE", attempts), "{part:?}");
    }
    // A refused answer is not an output.
    assert_eq!(stage.client.subsystem("large_output").await.unwrap().output_cycle_id, 0);

    // The limits are those of the registration.
    stage.register("many_metrics", |it| it.limits = Some(pb::Limits { max_metrics: 65, ..Default::default() })).await;
    let subset = |name| pb::RunCycleRequest { subsystems: names([name]), ..Default::default() };
    assert_eq!(stage.client.run_with(subset("many_metrics")).await.unwrap().state(), CycleState::Succeeded);
    // Its connection is dialed again.
    unreliable.run("disconnects", Run::Echo);
    assert_eq!(stage.client.run_with(subset("disconnects")).await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn a_subsystem_that_breaks_the_connection_does_not_affect_its_neighbours() {
    let mut stage = Stage::new().await;
    // More than the HTTP/2 library tolerates.
    stage.fleet.run("flood", Run::Hold);
    stage.register("flood", |it| it.retry = Some(quick_retry(1, &[]))).await;
    stage.fleet.run("neighbour", Run::Hold);
    stage.register("neighbour", |it| it.retry = Some(quick_retry(1, &[]))).await;
    let running = start(&stage.client, pb::RunCycleRequest::default());
    for name in ["flood", "neighbour"] {
        stage.fleet.until_run(name, 1).await;
    }
    stage.fleet.run("flood", Run::Fail(Code::Internal, "e".repeat(1_000_000)));
    stage.fleet.until_run("neighbour", 2).await;
    stage.fleet.run("neighbour", Run::Echo);
    let cycle = ended(running).await.unwrap();
    let flood = part(&cycle, "flood");
    assert_eq!((flood.state(), flood.error_code.as_str()), (SubsystemState::Failed, "RESOURCE_EXHAUSTED"), "{flood:?}");
    let neighbour = part(&cycle, "neighbour");
    // Its call was repeated, which its record does not show.
    assert_eq!((neighbour.state(), neighbour.attempts), (SubsystemState::Succeeded, 1), "{neighbour:?}");
}

#[tokio::test]
async fn a_late_subsystem_is_timed_out_and_delays_only_its_successors() {
    let mut stage = Stage::new().await;
    stage.fleet.run("late", Run::Hang);
    stage.register("late", |it| it.timeout = ms(100)).await;
    stage.register("follows", |it| it.after = names(["late"])).await;
    stage.register("needs", |it| it.requires = names(["late"])).await;
    stage.register("needs_that", |it| it.requires = names(["needs"])).await;
    let cycle = stage.client.run().await.unwrap();
    let late = part(&cycle, "late");
    assert_eq!((late.state(), late.error_code.as_str()), (SubsystemState::TimedOut, "DEADLINE_EXCEEDED"));
    assert_eq!(late.attempts, 1);
    assert_eq!(part(&cycle, "follows").state(), SubsystemState::Succeeded);
    for name in ["needs", "needs_that"] {
        let skipped = part(&cycle, name);
        assert_eq!((skipped.state(), skipped.skip_reason()), (SubsystemState::Skipped, SkipReason::RequirementFailed));
        assert_eq!((skipped.attempts, skipped.error_code.as_str()), (0, ""));
        assert!(skipped.started_at.is_none() && skipped.finished_at.is_none());
    }
    assert_eq!(cycle.state(), CycleState::Degraded);
    // It received its deadline, and its call was cancelled.
    let dropped = |state: &State| state.runs("late").all(|call| call.ended.is_some());
    stage.fleet.until("the late call to end", dropped).await;
    assert!(stage.fleet.runs("late")[0].timeout.unwrap() <= Duration::from_millis(100));
}

#[tokio::test]
async fn the_deadline_of_the_cycle_ends_all_running_and_waiting_parts() {
    let mut stage = Stage::new().await;
    stage.register("quick", |_| {}).await;
    stage.fleet.run("late", Run::Hang);
    stage.register("late", |it| it.after = names(["quick"])).await;
    stage.register("waits", |it| it.after = names(["late"])).await;
    stage.register("later", |it| it.phase = 1).await;
    let request = pb::RunCycleRequest { deadline: ms(300), ..Default::default() };
    let cycle = stage.client.run_with(request).await.unwrap();
    assert_eq!(cycle.state(), CycleState::Degraded, "{cycle:?}");
    assert_eq!(part(&cycle, "quick").state(), SubsystemState::Succeeded);
    assert_eq!(part(&cycle, "late").state(), SubsystemState::TimedOut);
    for name in ["waits", "later"] {
        let part = part(&cycle, name);
        assert_eq!((part.state(), part.skip_reason()), (SubsystemState::Skipped, SkipReason::CycleDeadline), "{name}");
    }
    let failed = "3 of 4 failed: late timed out: ";
    assert!(cycle.error.starts_with(failed), "{}", cycle.error);
    let skipped = "skipped: the cycle's deadline of 300ms passed before its turn";
    assert!(cycle.error.ends_with(&format!("; waits {skipped}; later {skipped}")), "{}", cycle.error);
    assert!(stage.fleet.runs("late")[0].timeout.unwrap() <= Duration::from_millis(300));

    // The configured deadline applies to requests without one.
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.deadline=100ms"])).await;
    stage.fleet.run("late", Run::Hang);
    stage.register("late", |_| {}).await;
    assert_eq!(part(&stage.client.run().await.unwrap(), "late").state(), SubsystemState::TimedOut);
    let too_short = pb::RunCycleRequest { deadline: ms(0), ..Default::default() };
    assert_eq!(reason(&stage.client.run_with(too_short).await.unwrap_err()), invalid(["deadline"]));
}

#[tokio::test]
async fn skipped_parts_have_a_reason_and_only_some_count_as_failures() {
    let mut stage = Stage::new().await;
    stage.register_all(&["resting", "healthy"]).await;
    let name = "resting".to_owned();
    stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name }).await.unwrap();
    stage.register("needs_resting", |it| it.requires = names(["resting"])).await;
    stage.register("after_resting", |it| it.after = names(["resting"])).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!((cycle.state(), cycle.error.as_str()), (CycleState::Succeeded, ""));
    assert_eq!(part(&cycle, "resting").skip_reason(), SkipReason::Suspended);
    assert_eq!(part(&cycle, "needs_resting").skip_reason(), SkipReason::RequirementLeftOut);
    assert_eq!(part(&cycle, "needs_resting").error_message, "it requires resting, which is suspended");
    assert_eq!(part(&cycle, "after_resting").state(), SubsystemState::Succeeded);
    assert!(stage.fleet.runs("resting").is_empty());

    stage.register("needs_nobody", |it| it.requires = names(["resting", "nobody"])).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(part(&cycle, "needs_nobody").skip_reason(), SkipReason::RequirementMissing);
    assert_eq!(cycle.state(), CycleState::Degraded);
    assert!(cycle.error.contains("needs_nobody skipped: it requires nobody, which is not registered"), "{cycle:?}");

    // Left out of a subset.
    let subsystems = names(["needs_resting"]);
    let cycle = stage.client.run_with(pb::RunCycleRequest { subsystems, ..Default::default() }).await.unwrap();
    assert_eq!(states(&cycle), [("needs_resting", SubsystemState::Skipped)].into());
    assert_eq!(part(&cycle, "needs_resting").skip_reason(), SkipReason::RequirementLeftOut);
    assert_eq!(part(&cycle, "needs_resting").error_message, "it requires resting, which is not in this cycle");
    assert_eq!(cycle.state(), CycleState::Succeeded);

    // Skipped because of another skipped subsystem.
    stage.register("second", |it| it.requires = names(["needs_resting"])).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(part(&cycle, "second").error_message, "it requires needs_resting, which was skipped itself");
}

#[tokio::test]
async fn the_error_of_a_cycle_is_one_line_that_names_each_failure() {
    let mut stage = Stage::new().await;
    stage
        .register("broken", |it| {
            it.breaker = Some(pb::BreakerPolicy { failure_threshold: 1, open_for: ms(3_600_000), disabled: false });
        })
        .await;
    stage.register("slow", |_| {}).await;
    stage.register("never", |it| it.requires = names(["broken"])).await;
    stage.fleet.run("broken", Run::Fail(Code::Internal, "the disk; it\nis on fire\x1b[31m".into()));
    let cycle = stage.client.run().await.unwrap();
    let never = "never skipped: it requires broken, which did not succeed";
    let expected = format!("2 of 3 failed: broken INTERNAL: the disk, it is on fire[31m; {never}");
    assert_eq!(cycle.error, expected);
    assert_eq!(part(&cycle, "broken").error_message, "the disk; it\nis on fire\x1b[31m");
    // The error of a breaker contains only facts that still hold when the record is read.
    let cycle = stage.client.run().await.unwrap();
    let expected = format!("2 of 3 failed: broken circuit open: not called after a failure; {never}");
    assert_eq!(cycle.error, expected);
}

#[tokio::test]
async fn a_breaker_opens_probes_once_and_closes() {
    let mut stage = Stage::new().await;
    stage.fleet.run("a", Run::fail(Code::Unavailable));
    // The registration changes the time for which it stays open, so that the test need not wait.
    let registered = |open_for| {
        move |it: &mut pb::Registration| {
            it.breaker = Some(pb::BreakerPolicy { failure_threshold: 2, open_for: ms(open_for), disabled: false });
            it.retry = Some(quick_retry(2, &[]));
        }
    };
    let (long, short) = (registered(3_600_000), registered(1));
    stage.register("a", long).await;
    let run = async |stage: &mut Stage| stage.client.run().await.unwrap().subsystems.pop().unwrap();
    let half_open = async |stage: &mut Stage| {
        while stage.client.subsystem("a").await.unwrap().breaker() != BreakerState::HalfOpen {
            tokio::task::yield_now().await;
        }
    };
    for _ in 0..2 {
        assert_eq!(stage.client.subsystem("a").await.unwrap().breaker(), BreakerState::Closed);
        let failed = run(&mut stage).await;
        assert_eq!((failed.state(), failed.attempts), (SubsystemState::Failed, 2));
    }
    assert_eq!(stage.client.subsystem("a").await.unwrap().breaker(), BreakerState::Open);
    let held_back = run(&mut stage).await;
    assert_eq!((held_back.state(), held_back.attempts), (SubsystemState::CircuitOpen, 0));
    assert!(held_back.started_at.is_none());
    assert_eq!(stage.fleet.runs("a").len(), 4);

    // The probe fails: one attempt, whatever the retry policy says.
    stage.register("a", short).await;
    half_open(&mut stage).await;
    let probe = run(&mut stage).await;
    assert_eq!((probe.state(), probe.attempts), (SubsystemState::Failed, 1));
    stage.register("a", long).await;
    assert_eq!(run(&mut stage).await.state(), SubsystemState::CircuitOpen);

    // The probe succeeds.
    stage.fleet.run("a", Run::Echo);
    stage.register("a", short).await;
    half_open(&mut stage).await;
    assert_eq!(run(&mut stage).await.state(), SubsystemState::Succeeded);
    stage.register("a", long).await;
    assert_eq!(stage.client.subsystem("a").await.unwrap().breaker(), BreakerState::Closed);

    // It also opens for a late subsystem, and `ResumeSubsystem` closes it.
    stage.fleet.run("a", Run::Hang);
    stage
        .register("a", |it| {
            long(it);
            it.timeout = ms(20);
        })
        .await;
    for _ in 0..2 {
        assert_eq!(run(&mut stage).await.state(), SubsystemState::TimedOut);
    }
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(part(&cycle, "a").state(), SubsystemState::CircuitOpen);
    assert_eq!(cycle.state(), CycleState::Failed);
    // From here on, it has time to answer.
    stage.register("a", long).await;
    stage.fleet.run("a", Run::Echo);
    stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: "a".into() }).await.unwrap();
    assert_eq!(run(&mut stage).await.state(), SubsystemState::Succeeded);

    // So does another endpoint: the failures were at the old one.
    stage.fleet.run("a", Run::fail(Code::Internal));
    for _ in 0..2 {
        run(&mut stage).await;
    }
    assert_eq!(stage.client.subsystem("a").await.unwrap().breaker(), BreakerState::Open);
    let elsewhere = stage.fleet.endpoint().replace("127.0.0.1", "localhost");
    stage.register("a", |it| it.endpoint = elsewhere).await;
    assert_eq!(run(&mut stage).await.state(), SubsystemState::Failed);

    // Without a breaker, calls continue.
    stage.fleet.run("a", Run::fail(Code::Internal));
    stage
        .register("a", |it| {
            it.breaker = Some(pb::BreakerPolicy { failure_threshold: 1, disabled: true, ..Default::default() });
        })
        .await;
    for _ in 0..3 {
        assert_eq!(run(&mut stage).await.state(), SubsystemState::Failed);
    }
}

#[tokio::test]
async fn retries_are_for_listed_codes_numbered_and_inside_one_deadline() {
    let mut stage = Stage::new().await;
    stage.fleet.run("listed", Run::fail(Code::ResourceExhausted));
    stage.register("listed", |it| it.retry = Some(quick_retry(4, &["RESOURCE_EXHAUSTED", "INTERNAL"]))).await;
    // A list replaces the default one.
    stage.fleet.run("unlisted", Run::fail(Code::Unavailable));
    stage.register("unlisted", |it| it.retry = Some(quick_retry(4, &["INTERNAL"]))).await;
    // An answer that breaks a limit counts as an error with this code.
    stage.fleet.run("large", Run::metrics(65));
    stage.register("large", |it| it.retry = Some(quick_retry(2, &["RESOURCE_EXHAUSTED"]))).await;
    stage.fleet.run("recovers", Run::fail(Code::Unavailable));
    stage
        .register("recovers", |it| it.retry = Some(pb::RetryPolicy { max_attempts: 10, ..quick_retry(10, &[]) }))
        .await;
    // The next wait would end after its deadline.
    stage.fleet.run("hopeless", Run::fail(Code::Unavailable));
    stage
        .register("hopeless", |it| {
            it.retry = Some(pb::RetryPolicy { initial_backoff: ms(3_600_000), ..Default::default() });
        })
        .await;
    stage.fleet.run("once", Run::fail(Code::Unavailable));
    stage.register("once", |it| it.retry = Some(quick_retry(1, &[]))).await;

    let cycle = stage.client.run().await.unwrap();
    for (name, attempts) in
        [("listed", 4), ("unlisted", 1), ("large", 2), ("recovers", 10), ("hopeless", 1), ("once", 1)]
    {
        let part = part(&cycle, name);
        assert_eq!((part.state(), part.attempts), (SubsystemState::Failed, attempts), "{part:?}");
    }
    assert!(part(&cycle, "hopeless").error_message.ends_with("no time is left to retry"));
    let runs = stage.fleet.runs("recovers");
    assert_eq!(runs.iter().map(|call| call.attempt).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
    assert!(runs.iter().all(|call| call.cycle_id == 1 && call.scheduled_at == cycle.scheduled_at));
    // The rest of one deadline.
    assert!(runs.is_sorted_by(|earlier, later| earlier.timeout >= later.timeout));

    // An attempt that succeeds is the last.
    stage
        .register("recovers", |it| {
            it.retry = Some(pb::RetryPolicy { max_attempts: 10, initial_backoff: ms(50), ..Default::default() });
        })
        .await;
    let subsystems = names(["recovers"]);
    let running = start(&stage.client, pb::RunCycleRequest { subsystems, ..Default::default() });
    stage.fleet.until_run("recovers", 12).await;
    stage.fleet.run("recovers", Run::Echo);
    let cycle = ended(running).await.unwrap();
    let part = part(&cycle, "recovers");
    assert_eq!((part.state(), part.error_code.as_str()), (SubsystemState::Succeeded, ""));
    assert_eq!(part.attempts as usize, stage.fleet.runs("recovers").len() - 10);
    assert!(part.attempts >= 3);
}

// ---------------------------------------------------------------------------------------------------------------
// How cycles end

#[tokio::test]
async fn a_cycle_succeeds_is_degraded_or_fails() {
    let mut stage = Stage::new().await;
    let empty = stage.client.run().await.unwrap();
    assert_eq!((empty.state(), empty.subsystems.len(), empty.critical_path.len()), (CycleState::Succeeded, 0, 0));

    stage.register_all(&["a", "b"]).await;
    let run = async |stage: &mut Stage| stage.client.run().await.unwrap().state();
    assert_eq!(run(&mut stage).await, CycleState::Succeeded);
    stage.fleet.run("a", Run::fail(Code::Internal));
    assert_eq!(run(&mut stage).await, CycleState::Degraded);
    stage.register("a", |it| it.critical = true).await;
    assert_eq!(run(&mut stage).await, CycleState::Failed);
    stage.register("a", |_| {}).await;
    stage.fleet.run("b", Run::fail(Code::Internal));
    let failed = stage.client.run().await.unwrap();
    assert_eq!(failed.state(), CycleState::Failed);
    assert_eq!(failed.error, "2 of 2 failed: a INTERNAL: as scripted; b INTERNAL: as scripted");
}

#[tokio::test]
async fn a_record_has_its_times_its_trigger_and_its_durations() {
    let mut stage = Stage::new().await;
    let metrics = BTreeMap::from([("m".to_owned(), 0.25)]);
    let issues = vec![subsystem::Issue { severity: 3, code: "C".into(), message: "text".into() }];
    let answer = subsystem::RunCycleResponse { metrics: metrics.clone(), issues, ..Default::default() };
    stage.fleet.run("a", Run::Answer(answer));
    stage.register_all(&["a", "b"]).await;
    let cycle = stage.client.run().await.unwrap();
    let status = stage.client.status().await.unwrap();
    assert_eq!((cycle.cycle_id, cycle.revision, cycle.epoch), (1, 1, status.epoch));
    assert_eq!((cycle.trigger(), cycle.r#loop.as_str()), (Trigger::Manual, ""));
    assert!(!cycle.truncated);
    assert_eq!(part(&cycle, "a").metrics, metrics);
    let issue = &part(&cycle, "a").issues[0];
    assert_eq!(
        (issue.severity(), issue.code.as_str(), issue.message.as_str()),
        (subsystem::Severity::Error, "C", "text")
    );

    let between = |from: Option<prost_types::Timestamp>, to: Option<prost_types::Timestamp>| {
        let nanos = |time: prost_types::Timestamp| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
        nanos(to.unwrap()) - nanos(from.unwrap())
    };
    #[allow(clippy::cast_possible_truncation, reason = "a cycle is short")]
    let nanos = |ms: f64| (ms * 1e6).round() as i128;
    assert_eq!(between(cycle.started_at, cycle.finished_at), nanos(cycle.duration_ms));
    assert!(between(cycle.scheduled_at, cycle.started_at) >= 0);
    for part in &cycle.subsystems {
        assert_eq!(between(part.started_at, part.finished_at), nanos(part.duration_ms));
        assert!(between(cycle.started_at, part.started_at) >= 0);
        assert!(between(part.finished_at, cycle.finished_at) >= 0);
    }
    assert_eq!(stage.fleet.runs("a")[0].scheduled_at, cycle.scheduled_at);
    assert_eq!(decode(status.last_cycle), cycle);
    assert_eq!(status.total_cycles, 1);
    let last = stage.client.subsystem("a").await.unwrap();
    assert_eq!((last.last.as_ref(), last.last_cycle_id), (Some(part(&cycle, "a")), 1));
}

#[tokio::test]
async fn the_critical_path_is_the_chain_that_ended_last() {
    let mut stage = Stage::new().await;
    stage.register_all(&["slow", "quick"]).await;
    stage.register("after_both", |it| it.after = names(["slow", "quick"])).await;
    stage.register("after_quick", |it| it.after = names(["quick"])).await;
    stage.register("later", |it| it.phase = 1).await;
    stage.fleet.run("slow", Run::Hold);
    let running = start(&stage.client, pb::RunCycleRequest::default());
    let quick_ended = |state: &State| state.runs("after_quick").any(|call| call.ended.is_some());
    stage.fleet.until("after_quick to end", quick_ended).await;
    stage.fleet.run("slow", Run::Echo);
    assert_eq!(ended(running).await.unwrap().critical_path, ["slow", "after_both", "later"]);
}

#[tokio::test]
async fn a_subset_keeps_its_order_and_reads_outputs_of_others() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.register("b", |it| it.after = names(["a"])).await;
    stage.register("c", |it| it.after = names(["b", "a"])).await;
    stage.client.run().await.unwrap();
    let subsystems = names(["c", "a"]);
    let cycle = stage.client.run_with(pb::RunCycleRequest { subsystems, ..Default::default() }).await.unwrap();
    let order: Vec<_> = cycle.subsystems.iter().map(|part| part.name.as_str()).collect();
    assert_eq!(order, ["a", "c"]);
    let c = stage.fleet.runs("c").pop().unwrap();
    assert!(c.began > ended_at(stage.fleet.runs("a").last().unwrap()));
    let freshness = |name: &str| (c.inputs[name].freshness, c.inputs[name].cycle_id);
    assert_eq!(freshness("a"), (subsystem::Freshness::Fresh, 2));
    assert_eq!(freshness("b"), (subsystem::Freshness::Stale, 1));

    let unknown = pb::RunCycleRequest { subsystems: names(["a", "nobody"]), ..Default::default() };
    let refused = stage.client.run_with(unknown).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::NotFound, "SUBSYSTEM_NOT_FOUND", [("subsystem", "nobody")]));
    let bad = pb::RunCycleRequest { subsystems: names(["a", "a", "9"]), ..Default::default() };
    let refused = stage.client.run_with(bad).await.unwrap_err();
    assert_eq!(reason(&refused), invalid(["subsystems[1]", "subsystems[2]"]));
    assert_eq!(stage.client.status().await.unwrap().total_cycles, 2);
}

#[tokio::test]
async fn a_plan_shows_the_calls_of_a_cycle_and_makes_none() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    stage.register("b", |it| it.after = names(["a"])).await;
    stage.register("c", |it| it.phase = 7).await;
    stage.register("d", |it| (it.phase, it.requires) = (7, names(["nobody"]))).await;
    let validate = |subsystems| pb::RunCycleRequest { validate_only: true, subsystems, ..Default::default() };
    let answer = stage.client.run_cycle(validate(vec![])).await.unwrap().into_inner();
    assert_eq!((answer.cycle_id, answer.telemetry.len()), (0, 0));
    let plan = answer.plan.unwrap();
    let planned: Vec<_> = plan
        .subsystems
        .iter()
        .map(|it| (it.name.as_str(), it.phase, it.level, it.waits_for.join(","), it.skip_reason()))
        .collect();
    let expected = [
        ("a", 0, 0, String::new(), SkipReason::Unspecified),
        ("b", 0, 1, "a".to_owned(), SkipReason::Unspecified),
        ("c", 7, 2, String::new(), SkipReason::Unspecified),
        ("d", 7, 2, String::new(), SkipReason::RequirementMissing),
    ];
    assert_eq!(planned, expected);
    assert_eq!((plan.levels, plan.expected_duration_ms), (3, 0.0));
    let refused = stage.client.run_cycle(validate(names(["nobody"]))).await.unwrap_err();
    assert_eq!(reason(&refused).why, "SUBSYSTEM_NOT_FOUND");
    assert!(stage.fleet.calls().is_empty());
    assert_eq!(stage.client.status().await.unwrap().total_cycles, 0);

    stage.client.run().await.unwrap();
    let request = pb::PlanCycleRequest { subsystems: names(["b", "nobody"]), ..Default::default() };
    let plan = stage.client.plan_cycle(request).await.unwrap().into_inner().plan.unwrap();
    let planned: Vec<_> = plan.subsystems.iter().map(|it| (it.name.as_str(), it.skip_reason())).collect();
    assert_eq!(planned, [("b", SkipReason::Unspecified), ("nobody", SkipReason::NotRegistered)]);
    assert_eq!(plan.critical_path, ["b"]);
    assert!(plan.expected_duration_ms > 0.0);
    let plan = stage.client.plan_cycle(pb::PlanCycleRequest::default()).await.unwrap().into_inner().plan.unwrap();
    assert_eq!(plan.critical_path, ["a", "b", "c"]);
    assert_eq!(stage.client.status().await.unwrap().total_cycles, 1);
}

#[tokio::test]
async fn a_plan_expects_the_timeout_of_a_subsystem_that_is_always_late_until_its_breaker_opens() {
    let mut stage = Stage::new().await;
    stage.fleet.run("late", Run::Hang);
    stage
        .register("late", |it| {
            it.timeout = ms(50);
            it.breaker = Some(pb::BreakerPolicy { failure_threshold: 2, open_for: ms(3_600_000), disabled: false });
        })
        .await;
    stage.register("needs_late", |it| it.requires = names(["late"])).await;
    let plan = async |stage: &mut Stage| {
        stage.client.plan_cycle(pb::PlanCycleRequest::default()).await.unwrap().into_inner().plan.unwrap()
    };
    stage.client.run().await.unwrap();
    let one_late = plan(&mut stage).await;
    assert!(one_late.subsystems[0].expected_duration_ms >= 50.0, "{one_late:?}");
    assert!(one_late.expected_duration_ms >= 50.0 && one_late.critical_path[0] == "late", "{one_late:?}");
    assert_eq!(one_late.subsystems[0].breaker(), BreakerState::Closed);

    stage.client.run().await.unwrap();
    let held_back = plan(&mut stage).await;
    assert_eq!(held_back.subsystems[0].breaker(), BreakerState::Open);
    assert_eq!(held_back.subsystems[1].skip_reason(), SkipReason::RequirementFailed);
    assert!(held_back.expected_duration_ms < 50.0, "{held_back:?}");
}

// ---------------------------------------------------------------------------------------------------------------
// Overlap

/// A stage with one held subsystem, in a running cycle.
async fn held() -> (Stage, JoinHandle<Result<pb::CycleTelemetry, Status>>) {
    held_at(Home::new()).await
}

async fn held_at(home: Home) -> (Stage, JoinHandle<Result<pb::CycleTelemetry, Status>>) {
    let mut stage = Stage::at(home).await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    let running = start(&stage.client, pb::RunCycleRequest::default());
    stage.fleet.until_run("held", 1).await;
    (stage, running)
}

#[tokio::test]
async fn an_async_caller_gets_the_id_at_once() {
    let (mut stage, running) = held().await;
    let request = pb::RunCycleRequest { request_id: "r".into(), r#async: true, ..Default::default() };
    let answer = stage.client.run_cycle(request.clone()).await.unwrap().into_inner();
    assert_eq!((answer.cycle_id, answer.telemetry.len(), answer.plan), (2, 0, None));
    let early = stage.client.cycle(2).await.unwrap_err();
    assert_eq!(reason(&early), because(Code::FailedPrecondition, "CYCLE_NOT_FINISHED", [("cycle_id", "2")]));
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.queued_cycles, status.total_cycles), (1, 0));
    let running_now = status.running_cycle.unwrap();
    assert_eq!(status.running_cycles, std::slice::from_ref(&running_now));
    assert_eq!((running_now.cycle_id, running_now.trigger()), (1, Trigger::Manual));
    assert_eq!((running_now.total, running_now.ended, running_now.running), (1, 0, 1));
    stage.fleet.run("held", Run::Echo);
    ended(running).await.unwrap();
    let cycle = stage.client.recorded(2).await;
    assert_eq!(cycle.state(), CycleState::Succeeded);
    // Asked for again once it has finished.
    let answer = stage.client.run_cycle(request).await.unwrap().into_inner();
    assert_eq!((answer.cycle_id, decode(answer.telemetry)), (2, cycle));
}

#[tokio::test]
async fn one_request_id_is_one_cycle_while_it_runs_when_it_has_finished_and_after_a_restart() {
    let mut stage = Stage::new().await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    let request = |id: &str| pb::RunCycleRequest { request_id: id.into(), ..Default::default() };
    let first = start(&stage.client, request("one"));
    stage.fleet.until_run("held", 1).await;
    // The rest of the request is ignored.
    let second = start(&stage.client, pb::RunCycleRequest { subsystems: names(["nobody"]), ..request("one") });
    let number = stage.client.admit_with(request("one")).await.unwrap();
    assert_eq!((number, stage.client.admit_with(request("two")).await.unwrap()), (1, 2));
    assert_eq!(stage.client.admit_with(request("two")).await.unwrap(), 2);
    stage.fleet.run("held", Run::Echo);
    let cycle = ended(first).await.unwrap();
    assert_eq!((cycle.cycle_id, cycle.request_id.as_str()), (1, "one"));
    assert_eq!(ended(second).await.unwrap(), cycle);
    assert_eq!(stage.client.run_with(request("one")).await.unwrap(), cycle);
    assert_eq!(stage.client.run_with(request("two")).await.unwrap().cycle_id, 2);
    let mut stage = stage.killed().await;
    assert_eq!(stage.client.run_with(request("one")).await.unwrap(), cycle);
    assert_eq!(stage.client.run_with(request("three")).await.unwrap().cycle_id, 3);
    assert_eq!(stage.fleet.runs("held").len(), 3);
    let too_long = stage.client.run_with(request(&"x".repeat(129))).await.unwrap_err();
    assert_eq!(reason(&too_long), invalid(["request_id"]));
    stage.client.run_with(request(&"x".repeat(128))).await.unwrap();
    // Nobody takes the id of a cycle that a parent may start.
    let of_parent = stage.client.run_with(request("hub/eu/1764374400000/17")).await.unwrap_err();
    assert_eq!(reason(&of_parent), invalid(["request_id"]));
}

#[tokio::test]
async fn overlap_policies_skip_buffer_and_cancel() {
    let (mut stage, running) = held_at(Home::new().with_args(["--set", "cycle.max_queued=3"])).await;
    let with = |policy: OverlapPolicy| pb::RunCycleRequest { overlap_policy: policy.into(), ..Default::default() };
    let busy = |cycle_id| because(Code::Aborted, "CYCLE_RUNNING", [("cycle_id", cycle_id)]);
    assert_eq!(reason(&stage.client.admit_with(with(OverlapPolicy::Skip)).await.unwrap_err()), busy("1"));
    assert_eq!(stage.client.admit_with(with(OverlapPolicy::BufferOne)).await.unwrap(), 2);
    assert_eq!(reason(&stage.client.admit_with(with(OverlapPolicy::BufferOne)).await.unwrap_err()), busy("2"));
    assert_eq!(stage.client.admit_with(with(OverlapPolicy::BufferAll)).await.unwrap(), 3);
    // The default policy waits as well.
    assert_eq!(stage.client.admit().await.unwrap(), 4);
    let full = because(Code::ResourceExhausted, "QUEUE_FULL", [("queued_cycles", "3")]);
    for policy in [OverlapPolicy::BufferAll, OverlapPolicy::CancelOther] {
        assert_eq!(reason(&stage.client.admit_with(with(policy)).await.unwrap_err()), full);
    }
    let unknown = pb::RunCycleRequest { overlap_policy: 99, ..Default::default() };
    assert_eq!(reason(&stage.client.admit_with(unknown).await.unwrap_err()), invalid(["overlap_policy"]));
    stage.fleet.run("held", Run::Echo);
    assert_eq!(ended(running).await.unwrap().state(), CycleState::Succeeded);
    assert_eq!(stage.client.recorded(4).await.state(), CycleState::Succeeded);

    // The running cycle is cancelled, and the waiting ones keep their place.
    stage.fleet.run("held", Run::Hold);
    let running = start(&stage.client, pb::RunCycleRequest::default());
    stage.fleet.until_run("held", 5).await;
    assert_eq!(stage.client.admit().await.unwrap(), 6);
    assert_eq!(stage.client.admit_with(with(OverlapPolicy::CancelOther)).await.unwrap(), 7);
    assert_eq!(ended(running).await.unwrap().state(), CycleState::Cancelled);
    stage.fleet.until_run("held", 6).await;
    stage.fleet.run("held", Run::Echo);
    assert_eq!(stage.client.recorded(7).await.state(), CycleState::Succeeded);
    let history = stage.client.history().await.unwrap();
    let ids: Vec<_> = history.into_iter().map(|record| decode(record).cycle_id).collect();
    assert_eq!(ids, (1..=7).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_cancelled_cycle_keeps_its_finished_parts() {
    let mut stage = Stage::new().await;
    stage.register("quick", |_| {}).await;
    stage.register("held", |it| it.after = names(["quick"])).await;
    stage.register("waits", |it| it.after = names(["held"])).await;
    stage.fleet.run("held", Run::Hold);
    let running = start(&stage.client, pb::RunCycleRequest::default());
    stage.fleet.until_run("held", 1).await;
    let waiting = stage.client.admit().await.unwrap();
    let after = stage.client.admit().await.unwrap();

    // A waiting cycle is recorded when those before it have ended.
    let mut client = stage.client.clone();
    let cancelled_in_line = tokio::spawn(async move { client.cancel(waiting).await });
    let cycle = stage.client.cancel(1).await.unwrap();
    assert_eq!(ended(running).await.unwrap(), cycle);
    assert_eq!(cycle.state(), CycleState::Cancelled);
    assert_eq!(cycle.error, "cancelled");
    let ends: Vec<_> = cycle.subsystems.iter().map(|it| (it.name.as_str(), it.state(), it.attempts)).collect();
    let expected = [
        ("quick", SubsystemState::Succeeded, 1),
        ("held", SubsystemState::Cancelled, 1),
        ("waits", SubsystemState::Cancelled, 0),
    ];
    assert_eq!(ends, expected);
    let cycle = ended(cancelled_in_line).await.unwrap();
    assert_eq!((cycle.cycle_id, cycle.state(), cycle.started_at), (waiting, CycleState::Cancelled, None));
    assert!(cycle.subsystems.is_empty());
    // Its call was cancelled as well, and its output of an earlier cycle is not lost.
    let dropped = |state: &State| state.runs("held").next().unwrap().ended.is_some_and(|(_, end)| end == End::Dropped);
    stage.fleet.until("the held call to be dropped", dropped).await;
    stage.fleet.run("held", Run::Echo);
    assert_eq!(stage.client.recorded(after).await.state(), CycleState::Succeeded);

    let finished = stage.client.cancel(1).await.unwrap_err();
    assert_eq!(reason(&finished), because(Code::FailedPrecondition, "CYCLE_FINISHED", [("cycle_id", "1")]));
    let unknown = stage.client.cancel(99).await.unwrap_err();
    assert_eq!(reason(&unknown), because(Code::NotFound, "CYCLE_NOT_FOUND", [("cycle_id", "99")]));
    assert_eq!(reason(&stage.client.cancel(0).await.unwrap_err()), invalid(["cycle_id"]));
    // A cancelled part does not count against its subsystem.
    assert_eq!(stage.client.subsystem("held").await.unwrap().breaker(), BreakerState::Closed);
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_stop_its_cycle() {
    let (mut stage, running) = held().await;
    let mut cycles = stage.client.watch_after(0).await.unwrap();
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
    // The service has answered this after it noticed that the caller disconnected.
    assert_eq!(stage.client.status().await.unwrap().running_cycle.unwrap().cycle_id, 1);
    stage.fleet.run("held", Run::Echo);
    assert_eq!(decode(next_recorded(&mut cycles).await).state(), CycleState::Succeeded);
}

#[tokio::test]
async fn calls_wait_for_a_free_slot() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.max_concurrent_calls=1"])).await;
    stage.register_all(&["a", "b", "c"]).await;
    stage.fleet.run("a", Run::Hold);
    let running = start(&stage.client, pb::RunCycleRequest::default());
    stage.fleet.until_run("a", 1).await;
    assert_eq!(stage.client.status().await.unwrap().running_cycle.unwrap().running, 1);
    stage.fleet.run("a", Run::Echo);
    let cycle = ended(running).await.unwrap();
    let runs: Vec<_> = ["a", "b", "c"].map(|name| stage.fleet.runs(name).pop().unwrap()).into();
    assert!(
        runs.iter().all(|one| runs.iter().filter(|other| other.began < one.began).all(|it| ended_at(it) < one.began))
    );
    assert!(cycle.subsystems.iter().filter(|part| part.queued_ms > 0.0).count() >= 2, "{cycle:?}");
}

#[tokio::test]
async fn subsystems_that_wait_for_a_slot_get_it_in_the_order_of_the_plan() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.max_concurrent_calls=1"])).await;
    stage.register_all(&["a", "b", "c", "d"]).await;
    stage.register("e", |it| it.requires = names(["missing"])).await;
    for name in ["f", "g"] {
        stage.register(name, |it| it.after = names(["e"])).await;
    }
    stage.client.run().await.unwrap();
    let called: Vec<_> = stage.fleet.calls().into_iter().filter(|call| call.method == Method::RunCycle).collect();
    let called: Vec<_> = called.iter().map(|call| call.subsystem.as_str()).collect();
    assert_eq!(called, ["a", "b", "c", "d", "f", "g"]);
}

#[tokio::test]
async fn with_few_slots_every_subsystem_gets_its_turn_within_a_few_cycles() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.max_concurrent_calls=1"])).await;
    let hanging = |it: &mut pb::Registration| {
        it.breaker = Some(pb::BreakerPolicy { disabled: true, ..Default::default() });
    };
    for name in ["a", "b", "c"] {
        stage.fleet.run(name, Run::Hang);
        stage.register(name, hanging).await;
    }
    stage.register_all(&["d", "suspended"]).await;
    stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "suspended".into() }).await.unwrap();
    stage.register("last", |it| it.after = names(["d"])).await;
    let mut called = Vec::new();
    for _ in 0..6 {
        let request = pb::RunCycleRequest { deadline: ms(500), ..Default::default() };
        let cycle = stage.client.run_with(request).await.unwrap();
        let parts = cycle.subsystems.iter().filter(|part| part.started_at.is_some());
        called.push(parts.map(|part| part.name.clone()).collect::<Vec<_>>().join(" "));
    }
    // A hanging subsystem takes one cycle, and then comes after the subsystems that waited meanwhile.
    assert_eq!(called, ["a", "b", "c", "a d last", "b", "c"]);
}

// ---------------------------------------------------------------------------------------------------------------
// Outputs and connections

#[tokio::test]
async fn outputs_are_recorded_on_request() {
    let mut stage = Stage::new().await;
    stage.register("plain", |_| {}).await;
    stage.register("kept", |it| it.record_output = true).await;
    let cycle = stage.client.run().await.unwrap();
    assert!(part(&cycle, "plain").output.is_empty());
    assert_eq!(from_struct(&part(&cycle, "kept").output), json!({ "by": "kept", "cycle": 1 }));
    let request = pb::RunCycleRequest { record_outputs: true, ..Default::default() };
    let cycle = stage.client.run_with(request).await.unwrap();
    assert_eq!(from_struct(&part(&cycle, "plain").output), json!({ "by": "plain", "cycle": 2 }));
    assert_eq!(stage.client.cycle(2).await.unwrap(), cycle);
}

#[tokio::test]
async fn a_record_that_is_too_large_is_truncated_and_readers_get_everything() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.max_record_bytes=65536"])).await;
    let output = to_struct(&json!({ "large": "x".repeat(100_000) }));
    let metrics = BTreeMap::from([("m".to_owned(), 1.0)]);
    let answer = subsystem::RunCycleResponse { output, metrics: metrics.clone(), ..Default::default() };
    stage.fleet.run("large", Run::Answer(answer));
    stage.register("large", |it| it.record_output = true).await;
    stage.register("reader", |it| it.after = names(["large"])).await;
    let cycle = stage.client.run().await.unwrap();
    assert!(cycle.truncated);
    assert!(part(&cycle, "large").output.is_empty());
    assert_eq!(part(&cycle, "large").metrics, metrics);
    let input = &stage.fleet.runs("reader")[0].inputs["large"];
    assert_eq!(input.output["large"].as_str().unwrap().len(), 100_000);
}

#[tokio::test]
async fn an_output_without_memory_is_a_failure_and_memory_is_freed() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.max_outputs_bytes=1048576"])).await;
    for name in ["a", "b"] {
        stage.fleet.run(name, Run::large_output(700_000));
    }
    stage.register("a", |_| {}).await;
    stage.register("b", |it| it.after = names(["a"])).await;
    for _ in 0..2 {
        let cycle = stage.client.run().await.unwrap();
        assert_eq!(part(&cycle, "a").state(), SubsystemState::Succeeded);
        let b = part(&cycle, "b");
        assert_eq!((b.state(), b.error_code.as_str()), (SubsystemState::Failed, "RESOURCE_EXHAUSTED"), "{b:?}");
    }
    // A stored output counts after a restart, and that of an unregistered subsystem does not.
    let mut stage = stage.restarted().await;
    assert_eq!(part(&stage.client.run().await.unwrap(), "b").state(), SubsystemState::Failed);
    stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: "a".into() }).await.unwrap();
    assert_eq!(part(&stage.client.run().await.unwrap(), "b").state(), SubsystemState::Succeeded);
}

#[tokio::test]
async fn outputs_leave_memory_for_other_purposes() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "memory.max_bytes=67108864"])).await;
    let large = ["a", "b", "c", "d", "e", "f"];
    for name in large {
        stage.fleet.run(name, Run::large_output(3_900_000));
        let limits = pb::Limits { max_output_bytes: 4 << 20, ..pb::Limits::default() };
        stage.register(name, |it| it.limits = Some(limits)).await;
    }
    // Their share is a quarter of the memory, 16 MiB, and stays held.
    for (i, name) in large.into_iter().enumerate() {
        let only = pb::RunCycleRequest { subsystems: names([name]), ..pb::RunCycleRequest::default() };
        let cycle = stage.client.run_with(only).await.unwrap();
        let expected = if i < 4 { SubsystemState::Succeeded } else { SubsystemState::Failed };
        assert_eq!(part(&cycle, name).state(), expected, "{cycle:?}");
    }
}

#[tokio::test]
async fn a_subsystem_that_is_unregistered_during_its_call_frees_its_memory() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "cycle.max_outputs_bytes=1048576"])).await;
    for nth in 1..=3 {
        stage.fleet.run("a", Run::Hold);
        stage.register("a", |_| {}).await;
        let running = start(&stage.client, pb::RunCycleRequest::default());
        stage.fleet.until_run("a", nth).await;
        stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: "a".into() }).await.unwrap();
        stage.fleet.run("a", Run::large_output(700_000));
        let cycle = ended(running).await.unwrap();
        assert_eq!(part(&cycle, "a").state(), SubsystemState::Succeeded, "{cycle:?}");
    }
}

#[tokio::test]
async fn one_endpoint_is_one_connection_also_at_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let at_socket = Fleet::at_socket(&dir.path().join("fleet.sock"));
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b", "c"]).await;
    for name in ["d", "e"] {
        stage.client.register(registration(name, at_socket.endpoint())).await.unwrap();
    }
    for _ in 0..2 {
        assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    }
    assert_eq!(stage.fleet.now(|state| state.connections), 1);
    assert_eq!(at_socket.now(|state| state.connections), 1);
    // No cycle is left waiting.
    for name in ["d", "e"] {
        stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: name.into() }).await.unwrap();
    }
    at_socket.until("the connection to close", |state| state.connections == 0).await;
}

#[tokio::test]
async fn a_cycle_that_a_kill_interrupts_is_recorded_at_the_next_start() {
    let (mut stage, _running) = held().await;
    let request = pb::RunCycleRequest { request_id: "waits".into(), ..Default::default() };
    assert_eq!(stage.client.admit_with(request.clone()).await.unwrap(), 2);
    let epoch = stage.client.status().await.unwrap().epoch;
    let mut stage = stage.killed().await;
    let first = stage.client.cycle(1).await.unwrap();
    assert_eq!((first.state(), first.trigger()), (CycleState::Interrupted, Trigger::Manual));
    assert!(first.started_at.is_some() && first.subsystems.is_empty() && !first.error.is_empty());
    assert!(first.epoch > epoch);
    // The other cycle had not started. It was acknowledged under its id, and runs under it.
    stage.fleet.run("held", Run::Echo);
    let second = stage.client.run_with(request).await.unwrap();
    assert_eq!((second.cycle_id, second.state()), (2, CycleState::Succeeded));
    assert_eq!(second.epoch, first.epoch);
    assert_eq!(stage.client.run().await.unwrap().cycle_id, 3);
    let mut cycles = stage.client.watch_after(0).await.unwrap();
    for cycle_id in 1..=3 {
        assert_eq!(decode(next_recorded(&mut cycles).await).cycle_id, cycle_id);
    }
    let bookmark = crate::common::service::next_event(&mut cycles).await.unwrap();
    assert!(matches!((bookmark.revision, &bookmark.event), (3, Some(Event::Bookmark(_)))), "{bookmark:?}");
}

#[tokio::test]
async fn the_memory_of_all_waiting_cycles_is_bounded() {
    // 6 MiB of the smallest allowed memory are for requests.
    let home = Home::new().with_args(["--set", "memory.max_bytes=67108864", "--set", "cycle.max_queued=10000"]);
    let mut stage = Stage::at(home).await;
    stage.fleet.run("a", Run::Hold);
    stage.register("a", |_| {}).await;
    let parameters = to_struct(&json!({ "text": "x".repeat(60 << 10) }));
    let large = pb::RunCycleRequest { parameters, ..Default::default() };
    let mut admitted = 0;
    let refused = loop {
        match stage.client.admit_with(large.clone()).await {
            Ok(_) => admitted += 1,
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&refused), because(Code::ResourceExhausted, "MEMORY_LIMIT", []));
    assert!((60..=105).contains(&admitted), "{admitted}");
    // Small requests are still admitted, and finished ones free their memory.
    let small = stage.client.admit().await.unwrap();
    stage.fleet.run("a", Run::Echo);
    stage.client.recorded(small).await;
    stage.client.admit_with(large).await.unwrap();
}
