//! An orchestrator as a subsystem of another one, its parent: a cycle of the parent is one cycle of the child.

use std::{process::Stdio, time::Duration};

use crate::common::{
    Stage, command,
    door::Door,
    fleet::{End, Run, from_struct, to_struct},
    http::get,
    patiently,
    service::{Client, Home, Service, ms, part, registration},
    tokens::write_tokens,
};
use orchestrator_core::proto::{
    orchestrator::v1::{
        self as pb, AuditEvent, CycleState, SkipReason, SubsystemState, Trigger, ledger_client::LedgerClient,
    },
    subsystem::v1::{self as pbs, Freshness, subsystem_client::SubsystemClient},
};
use prost::Message;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    task::JoinHandle,
};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

/// A child that serves all its subsystems as `eu`.
const CHILD: &str = "orchestrator_id = \"child\"\n[[serves]]\nname = \"eu\"\n";
/// The epoch of a parent that a test plays.
const EPOCH: u64 = 7;

/// A child with this configuration.
async fn child(config: &str) -> Stage {
    Stage::at(Home::new().with_config(config)).await
}

/// The endpoint of a service.
fn endpoint(service: &Service) -> String {
    format!("http://{}", service.address())
}

/// A parent that a test plays, on a connection of its own.
struct Parent(SubsystemClient<Channel>);

impl Parent {
    async fn of(child: &Service) -> Self {
        let endpoint = Endpoint::from_shared(endpoint(child)).unwrap();
        Self(SubsystemClient::new(patiently("a connection", endpoint.connect()).await.unwrap()))
    }

    /// A parent that has initialized the child as `eu`.
    async fn initialized(child: &Service) -> Self {
        let mut parent = Self::of(child).await;
        parent.initialize("hub", EPOCH).await.unwrap();
        parent
    }

    async fn initialize(&mut self, id: &str, epoch: u64) -> Result<(), Status> {
        self.0.initialize(initialize(id, epoch)).await.map(|_| ())
    }

    async fn run(&mut self, cycle_id: u64) -> Result<Value, Status> {
        self.ask(run(cycle_id)).await
    }

    async fn ask(&mut self, request: impl tonic::IntoRequest<pbs::RunCycleRequest>) -> Result<Value, Status> {
        Ok(from_struct(&self.0.run_cycle(request).await?.into_inner().output))
    }

    /// Begins a cycle, on the same connection.
    fn begin(&self, cycle_id: u64) -> JoinHandle<Result<Value, Status>> {
        let mut call = Self(self.0.clone());
        tokio::spawn(async move { call.run(cycle_id).await })
    }
}

fn initialize(id: &str, epoch: u64) -> pbs::InitializeRequest {
    pbs::InitializeRequest { subsystem: "eu".into(), orchestrator_id: id.into(), epoch, ..Default::default() }
}

fn run(cycle_id: u64) -> pbs::RunCycleRequest {
    pbs::RunCycleRequest { subsystem: "eu".into(), cycle_id, epoch: EPOCH, attempt: 1, ..Default::default() }
}

/// A request with this credential.
fn with<T>(bearer: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", bearer.parse().unwrap());
    request
}

/// Waits for the answer of a begun call.
async fn answered(call: JoinHandle<Result<Value, Status>>) -> Result<Value, Status> {
    patiently("the answer", call).await.unwrap()
}

/// Waits until the child has this number of waiting cycles that are noted in its store.
async fn until_waiting(client: &mut Client, number: usize) {
    let waits = async {
        while client.status().await.unwrap().waiting_cycles.len() < number {
            tokio::task::yield_now().await;
        }
    };
    patiently("a cycle to wait", waits).await;
}

// ---------------------------------------------------------------------------------------------------------------
// A parent and its child

#[tokio::test]
async fn a_cycle_of_the_parent_is_one_cycle_of_the_child_with_its_parameters_and_inputs() {
    let mut child = child(&format!("{CHILD}parameters = {{ of_name = 1, own = 1, both = 1 }}\n")).await;
    child
        .register("a", |it| {
            it.requires = vec!["prices".into()];
            it.reads = vec!["nobody".into(), "b".into()];
            it.parameters = to_struct(&json!({ "own": 0, "registered": 0 }));
        })
        .await;
    child.register_all(&["b"]).await;
    child.fleet.run("b", Run::output(&json!({ "of": "the child" })));
    let mut parent = Stage::at(Home::new().with_config("orchestrator_id = \"hub\"\n")).await;
    parent.register_all(&["prices", "b"]).await;
    let as_eu = pb::Registration {
        requires: vec!["prices".into()],
        after: vec!["b".into()],
        parameters: to_struct(&json!({ "both": 2, "of_parent": 2 })),
        record_output: true,
        ..registration("eu", &endpoint(&child.service))
    };
    parent.client.register(as_eu).await.unwrap();

    let request = pb::RunCycleRequest { parameters: to_struct(&json!({ "of_cycle": 3 })), ..Default::default() };
    let cycle = parent.client.run_with(request).await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded, "{}", cycle.error);
    let output = from_struct(&part(&cycle, "eu").output);
    assert_eq!(
        (&output["cycle_id"], &output["state"], &output["subsystems"], &output["succeeded"], &output["failed"]),
        (&json!(1), &json!("SUCCEEDED"), &json!(2), &json!(2), &json!(0))
    );
    assert!(output["durations_ms"]["a"].as_f64().unwrap() > 0.0, "{output}");

    let record = child.client.cycle(1).await.unwrap();
    assert_eq!((record.trigger(), record.scheduled_at), (Trigger::Parent, cycle.scheduled_at));
    let of = record.parent.clone().unwrap();
    let expected = pb::ParentCycle {
        orchestrator_id: "hub".into(),
        subsystem: "eu".into(),
        epoch: cycle.epoch,
        cycle_id: cycle.cycle_id,
    };
    assert_eq!(of, expected);
    assert_eq!(record.request_id, format!("hub/eu/{}/1", cycle.epoch));

    let [call] = &child.fleet.runs("a")[..] else { panic!("a is called once") };
    assert_eq!(
        call.parameters,
        json!({ "registered": 0, "own": 1, "of_name": 1, "both": 2, "of_parent": 2, "of_cycle": 3 })
    );
    assert_eq!(call.path.as_deref(), Some("hub child"));
    let input = |name: &str| (call.inputs[name].freshness, call.inputs[name].output.clone());
    assert_eq!(input("prices"), (Freshness::Fresh, json!({ "by": "prices", "cycle": 1 })));
    assert_eq!(input("nobody").0, Freshness::Absent);
    // The child has a `b` of its own, which has made nothing before.
    assert_ne!(input("b").1, json!({ "by": "b", "cycle": 1 }));
    // The subsystems of the parent are not called in a cycle of a parent.
    assert_eq!(parent.fleet.runs("prices")[0].path, None);

    // The child's own cycle has no input of a parent.
    let own = child.client.run().await.unwrap();
    assert_eq!(part(&own, "a").skip_reason(), SkipReason::RequirementMissing);

    let address = child.service.address().to_string();
    let list = ["cycles", "list", "--address", &address, "--trigger", "parent"];
    let (code, text) = command::orchestrator(None, &list).await;
    assert!(code == 0 && text.contains(" parent ") && !text.contains("manual"), "{text}");
    let (_, text) = command::orchestrator(None, &["cycles", "show", "1", "--address", &address]).await;
    assert!(text.contains(&format!("cycle 1 of hub, epoch {}, as its subsystem eu", cycle.epoch)), "{text}");
}

#[tokio::test]
async fn the_cycle_of_a_parent_with_a_long_id_is_found_by_its_request_id() {
    let mut child = child(CHILD).await;
    child.register_all(&["a"]).await;
    let hub = "h".repeat(128);
    let mut parent = Parent::of(&child.service).await;
    parent.initialize(&hub, EPOCH).await.unwrap();
    parent.run(1).await.unwrap();
    let mut listed = async |request_id: String| {
        let request = pb::ListCyclesRequest { request_id, ..Default::default() };
        child.client.list_cycles(request).await.map(|listed| listed.into_inner().cycles)
    };
    let request_id = format!("{hub}/eu/{EPOCH}/1");
    let cycles = listed(request_id.clone()).await.unwrap();
    let found: Vec<_> = cycles.into_iter().map(|it| pb::CycleTelemetry::decode(it).unwrap().request_id).collect();
    assert_eq!(found, std::slice::from_ref(&request_id));
    // Another text of that length is the id of no request.
    let refused = listed(request_id.replace('/', "-")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
}

#[tokio::test]
async fn a_degraded_cycle_is_an_answer_with_an_issue_and_a_failed_one_a_failure() {
    let mut child = child(CHILD).await;
    child.register_all(&["a", "b"]).await;
    let mut parent = Stage::new().await;
    parent.client.register(registration("eu", &endpoint(&child.service))).await.unwrap();
    child.fleet.run("b", Run::Fail(Code::Internal, "no fuel".into()));
    let cycle = parent.client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded);
    let [issue] = &part(&cycle, "eu").issues[..] else { panic!("{cycle:?}") };
    assert_eq!((issue.severity(), issue.code.as_str()), (pbs::Severity::Error, "CYCLE_DEGRADED"));
    assert_eq!(issue.message, "cycle 1 of child was DEGRADED: 1 of 2 failed: b INTERNAL: no fuel");

    child.fleet.run("a", Run::Fail(Code::Internal, "no fuel".into()));
    let cycle = parent.client.run().await.unwrap();
    let eu = part(&cycle, "eu");
    assert_eq!((cycle.state(), eu.error_code.as_str(), eu.attempts), (CycleState::Failed, "INTERNAL", 1));
    assert!(eu.error_message.starts_with("cycle 2 of child was FAILED: 2 of 2 failed: a INTERNAL"), "{eu:?}");
}

#[tokio::test]
async fn a_failure_two_orchestrators_below_is_an_issue_at_the_top() {
    let mut city = child("orchestrator_id = \"city\"\n[[serves]]\nname = \"city\"\n").await;
    city.register_all(&["a", "b"]).await;
    let mut region = child(CHILD).await;
    region.client.register(registration("city", &endpoint(&city.service))).await.unwrap();
    let mut top = Stage::new().await;
    top.client.register(registration("eu", &endpoint(&region.service))).await.unwrap();
    assert_eq!(part(&top.client.run().await.unwrap(), "eu").issues, []);
    city.fleet.run("b", Run::Fail(Code::Internal, "no fuel".into()));
    let cycle = top.client.run().await.unwrap();
    assert_eq!(region.client.cycle(2).await.unwrap().state(), CycleState::Succeeded);
    let [issue] = &part(&cycle, "eu").issues[..] else { panic!("{cycle:?}") };
    assert_eq!((issue.severity(), issue.code.as_str()), (pbs::Severity::Error, "ERRORS_REPORTED"));
    assert_eq!(
        issue.message,
        "in cycle 2 of child, subsystems reported 1 error: city CYCLE_DEGRADED: cycle 2 of city was DEGRADED: 1 of 2 failed: b \
         INTERNAL: no fuel"
    );
    let metrics = get(top.service.admin(), "/metrics").await.text().await;
    let counted = "orchestrator_subsystem_issues_total{subsystem=\"eu\",severity=\"error\"} 1\n";
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn a_name_has_the_subsystems_that_the_configuration_says_also_after_a_reload() {
    let subset = "orchestrator_id = \"child\"\n[[serves]]\nname = \"eu\"\nsubsystems = [\"a\", \"x\"]\n";
    let mut child = child("orchestrator_id = \"child\"\n").await;
    child.register_all(&["a", "b"]).await;
    let mut parent = Parent::of(&child.service).await;
    // It serves no name, and so not even the service.
    assert_eq!(parent.initialize("hub", EPOCH).await.unwrap_err().code(), Code::Unimplemented);
    std::fs::write(child.home.path("orchestrator.toml"), subset).unwrap();
    child.home.logged("served name eu added", 1).await;
    let path = child.home.path("orchestrator.toml").display().to_string();
    let (code, text) = command::orchestrator(None, &["check", "--config", &path]).await;
    assert!(code == 0 && text.lines().any(|line| line.starts_with("is served as") && line.ends_with("eu")), "{text}");
    parent.initialize("hub", EPOCH).await.unwrap();
    let output = parent.run(1).await.unwrap();
    assert_eq!((&output["state"], &output["skipped"]), (&json!("DEGRADED"), &json!(1)));
    let record = child.client.cycle(1).await.unwrap();
    assert_eq!(record.subsystems.len(), 2);
    assert_eq!(part(&record, "x").skip_reason(), SkipReason::NotRegistered);
    assert!(record.error.contains("the configuration serves it to a parent, but it is not registered"), "{record:?}");
    let unknown = pbs::RunCycleRequest { subsystem: "us".into(), ..run(2) };
    assert_eq!(parent.ask(unknown).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(child.client.status().await.unwrap().total_cycles, 1);
}

#[tokio::test]
async fn orchestrators_that_call_each_other_in_a_ring_are_refused_at_once() {
    let serves = |id: &str| format!("orchestrator_id = \"{id}\"\n[[serves]]\nname = \"{id}\"\n");
    let (mut one, other) = (child(&serves("one")).await, child(&serves("other")).await);
    let mut of_other = other.client.clone();
    // A ring that is not refused would wait in line for itself until these timeouts.
    let to = |name, at: &Stage| pb::Registration { timeout: ms(600_000), ..registration(name, &endpoint(&at.service)) };
    one.client.register(to("other", &other)).await.unwrap();
    of_other.register(to("one", &one)).await.unwrap();
    let long = pb::RunCycleRequest { deadline: ms(600_000), ..Default::default() };
    let cycle = patiently("the ring to be refused", one.client.run_with(long.clone())).await.unwrap();
    assert_eq!((cycle.state(), part(&cycle, "other").attempts), (CycleState::Failed, 1));
    let nested = of_other.cycle(1).await.unwrap();
    let refused = part(&nested, "one");
    assert_eq!(refused.error_code, "INVALID_ARGUMENT");
    assert!(refused.error_message.contains("in a ring: one other one; remove"), "{refused:?}");
    assert_eq!(one.client.status().await.unwrap().total_cycles, 1);

    // Itself, and another one with its id.
    one.client.register(to("one", &one)).await.unwrap();
    let of_itself = pb::RunCycleRequest { subsystems: vec!["one".into()], ..long };
    let cycle = patiently("the ring to be refused", one.client.run_with(of_itself)).await.unwrap();
    assert!(part(&cycle, "one").error_message.contains("in a ring: one one; remove"), "{cycle:?}");
}

#[tokio::test]
async fn at_most_eight_orchestrators_call_each_other() {
    let mut child = child(CHILD).await;
    child.register_all(&["a"]).await;
    let mut parent = Parent::initialized(&child.service).await;
    let with = |path: &str, cycle_id| {
        let mut request = Request::new(run(cycle_id));
        request.metadata_mut().insert("orchestrator-path", path.parse().unwrap());
        request
    };
    parent.ask(with("1 2 3 4 5 6 7", 1)).await.unwrap();
    assert_eq!(child.fleet.runs("a")[0].path.as_deref(), Some("1 2 3 4 5 6 7 child"));
    for path in ["1 2 3 4 5 6 7 8", "1 2 3 4 5 6 7 8 9", "1  2", "1 child 2"] {
        let refused = parent.ask(with(path, 2)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{path}: {refused}");
    }
    assert_eq!(child.fleet.runs("a").len(), 1);
}

// ---------------------------------------------------------------------------------------------------------------
// Once

#[tokio::test]
async fn the_child_runs_a_cycle_once_when_the_call_of_the_parent_is_cut() {
    let mut child = child(CHILD).await;
    child.register_all(&["a"]).await;
    child.fleet.run("a", Run::Hold);
    let first = Parent::initialized(&child.service).await;
    let call = first.begin(1);
    child.fleet.until_run("a", 1).await;
    // Its connection goes with it.
    call.abort();
    drop(first);
    let again = Parent::of(&child.service).await;
    let (second, third) = (again.begin(1), again.begin(1));
    child.fleet.run("a", Run::Echo);
    let [second, third] = [answered(second).await.unwrap(), answered(third).await.unwrap()];
    assert_eq!((&second["cycle_id"], second.clone()), (&json!(1), third));
    // Also when it was answered long ago.
    let mut late = Parent::of(&child.service).await;
    assert_eq!(late.run(1).await.unwrap(), second);
    assert_eq!((child.fleet.runs("a").len(), child.client.status().await.unwrap().total_cycles), (1, 1));
    assert_eq!(late.run(2).await.unwrap()["cycle_id"], 2);
}

#[tokio::test]
async fn the_parent_retries_a_call_that_was_cut_and_gets_the_cycle_of_the_first_one() {
    let mut child = child(CHILD).await;
    child.register_all(&["a"]).await;
    child.fleet.run("a", Run::Hold);
    let door = Door::open().await;
    door.lead_to(Some(&child.service));
    let mut parent = Stage::new().await;
    let through_door = pb::Registration {
        retry: Some(pb::RetryPolicy { max_attempts: 10, ..Default::default() }),
        ..registration("eu", &format!("http://{}", door.address()))
    };
    parent.client.register(through_door).await.unwrap();
    let mut client = parent.client.clone();
    let cycle = tokio::spawn(async move { client.run().await });
    child.fleet.until_run("a", 1).await;
    door.shut();
    let ended = async {
        while !get(child.service.admin(), "/metrics").await.text().await.contains(r#"rpc="Subsystem.RunCycle""#) {
            tokio::task::yield_now().await;
        }
    };
    patiently("the first call to be counted", ended).await;
    door.lead_to(Some(&child.service));
    child.fleet.run("a", Run::Echo);
    let cycle = patiently("the cycle of the parent", cycle).await.unwrap().unwrap();
    let eu = part(&cycle, "eu");
    assert!(eu.state() == SubsystemState::Succeeded && eu.attempts > 1, "{eu:?}");
    assert_eq!((child.fleet.runs("a").len(), child.client.status().await.unwrap().total_cycles), (1, 1));
}

#[tokio::test]
async fn a_cycle_that_had_begun_when_the_child_died_is_not_run_again() {
    let mut child = child(CHILD).await;
    child.register_all(&["a"]).await;
    child.fleet.run("a", Run::Hold);
    let call = Parent::initialized(&child.service).await.begin(1);
    child.fleet.until_run("a", 1).await;
    let child = child.killed().await;
    answered(call).await.unwrap_err();
    // It knows no parent any more, and asks to be initialized.
    let mut parent = Parent::of(&child.service).await;
    assert_eq!(parent.run(1).await.unwrap_err().code(), Code::FailedPrecondition);
    parent.initialize("hub", EPOCH).await.unwrap();
    let refused = parent.run(1).await.unwrap_err();
    assert_eq!(refused.code(), Code::Internal);
    assert!(refused.message().starts_with("cycle 1 of child was INTERRUPTED: the process"), "{refused}");
    assert_eq!(child.fleet.runs("a").len(), 1);
    let mut client = child.client.clone();
    let record = client.cycle(1).await.unwrap();
    assert_eq!((record.trigger(), record.parent.unwrap().cycle_id), (Trigger::Parent, 1));
}

#[tokio::test]
async fn a_cycle_that_only_waited_when_the_child_ended_runs_in_the_next_process_when_it_is_asked_for_again() {
    for kills in [true, false] {
        let mut child = child(CHILD).await;
        child.register("a", |it| it.requires = vec!["prices".into()]).await;
        child.register_all(&["busy"]).await;
        child.fleet.run("busy", Run::Hold);
        let busy =
            child.client.admit_with(pb::RunCycleRequest { subsystems: vec!["busy".into()], ..Default::default() });
        busy.await.unwrap();
        child.fleet.until_run("busy", 1).await;
        let parent = Parent::initialized(&child.service).await;
        let prices =
            pbs::Input { output: to_struct(&json!({ "eur": 1 })), freshness: Freshness::Fresh.into(), cycle_id: 1 };
        let request = pbs::RunCycleRequest {
            parameters: to_struct(&json!({ "p": 1 })),
            inputs: [("prices".to_owned(), prices)].into(),
            ..run(1)
        };
        let mut caller = parent.0.clone();
        let asked = request.clone();
        let call = tokio::spawn(async move { caller.run_cycle(asked).await.map(|_| Value::Null) });
        until_waiting(&mut child.client, 1).await;
        let child = if kills {
            child.killed().await
        } else {
            // The last cycle ends, and the one that waits is left to the next process.
            child.service.signal(rustix::process::Signal::TERM);
            child.home.logged("shutting down", 1).await;
            child.fleet.run("busy", Run::Echo);
            let Stage { fleet, home, mut service, .. } = child;
            assert!(service.ended().await.success());
            Stage::again(fleet, home).await
        };
        let refused = answered(call).await.unwrap_err();
        assert!(kills || refused.code() == Code::Unavailable, "{refused}");
        child.fleet.run("busy", Run::Echo);
        let mut parent = Parent::initialized(&child.service).await;
        let output = parent.ask(request).await.unwrap();
        assert_eq!((&output["cycle_id"], &output["state"]), (&json!(2), &json!("SUCCEEDED")), "{kills}");
        let [ran] = &child.fleet.runs("a")[..] else { panic!("a runs once") };
        assert_eq!((ran.cycle_id, ran.parameters.clone()), (2, json!({ "p": 1 })));
        assert_eq!((ran.inputs["prices"].freshness, ran.path.as_deref()), (Freshness::Fresh, Some("hub child")));
    }
}

#[tokio::test]
async fn a_later_epoch_of_a_parent_ends_the_cycles_of_earlier_ones() {
    let mut child = child(CHILD).await;
    child.register_all(&["a"]).await;
    child.fleet.run("a", Run::Hold);
    let mut parent = Parent::of(&child.service).await;
    assert_eq!(parent.run(1).await.unwrap_err().code(), Code::FailedPrecondition);
    parent.initialize("hub", EPOCH).await.unwrap();
    let call = parent.begin(1);
    child.fleet.until_run("a", 1).await;
    let mut later = Parent::of(&child.service).await;
    later.initialize("hub", EPOCH + 1).await.unwrap();
    let ended = answered(call).await.unwrap_err();
    assert_eq!(ended.code(), Code::Internal);
    assert!(ended.message().contains("was CANCELLED: cancelled, since a later epoch of its parent"), "{ended}");
    // Nor can another parent begin the same epoch: its calls could not be told from these.
    let other = later.initialize("other", EPOCH + 1).await.unwrap_err();
    assert_eq!(other.code(), Code::Aborted);
    assert!(other.message().contains("hub has called in epoch 8; give each parent a name of its own"), "{other}");
    for refused in [parent.run(2).await.map(|_| ()), parent.initialize("hub", EPOCH).await] {
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        assert!(refused.message().contains("epoch 7 has ended: hub has called in epoch 8"), "{refused}");
    }
    child.fleet.run("a", Run::Echo);
    // Its cycles count from 1 again.
    let again = pbs::RunCycleRequest { epoch: EPOCH + 1, ..run(1) };
    assert_eq!(later.ask(again).await.unwrap()["cycle_id"], 2);
}

// ---------------------------------------------------------------------------------------------------------------
// Time

#[tokio::test]
async fn a_call_without_time_for_an_answer_runs_nothing() {
    let mut child = child(CHILD).await;
    child.register_all(&["a"]).await;
    let mut parent = Parent::initialized(&child.service).await;
    let mut request = Request::new(run(1));
    request.set_timeout(Duration::from_millis(99));
    let refused = parent.ask(request).await.unwrap_err();
    // Of the two ends, either may be the first.
    assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&refused.code()), "{refused}");
    assert_eq!(child.client.status().await.unwrap().total_cycles, 0);
    assert_eq!(parent.run(1).await.unwrap()["cycle_id"], 1);
}

#[tokio::test]
async fn a_cycle_that_hangs_ends_before_the_timeout_of_its_parent() {
    let mut child = child(CHILD).await;
    child.register_all(&["a", "b"]).await;
    child.fleet.run("a", Run::Hang);
    let mut parent = Stage::new().await;
    let mut to_child = registration("eu", &endpoint(&child.service));
    to_child.timeout = ms(2_000);
    parent.client.register(to_child).await.unwrap();
    // On a busy machine the answer may be late.
    parent.client.run().await.unwrap();
    let record = child.client.recorded(1).await;
    assert_eq!((record.state(), part(&record, "b").state()), (CycleState::Degraded, SubsystemState::Succeeded));
    let late = part(&record, "a");
    assert!(late.error_message.contains("no answer within the cycle's deadline of 1."), "{late:?}");
    assert_eq!(late.state(), SubsystemState::TimedOut);
    let [call] = &child.fleet.runs("a")[..] else { panic!("a is called once") };
    assert_eq!(call.ended.unwrap().1, End::Dropped);
}

// ---------------------------------------------------------------------------------------------------------------
// Callers

#[tokio::test]
async fn a_parent_needs_the_rights_of_its_cycles_and_is_in_the_record_and_in_the_audit() {
    let config = |tokens: &str| {
        format!(
            "orchestrator_id = \"child\"\n[access]\nmode = \"enforce\"\ntokens_file = '{tokens}'\n{}",
            r#"
[[access.grants]]
who = ["token:hub"]
role = "operator"
subsystems = ["a"]
[[access.grants]]
who = ["token:viewer"]
role = "viewer"
subsystems = ["*"]
[[access.grants]]
who = ["token:admin"]
role = "admin"
[[serves]]
name = "eu"
subsystems = ["a"]
[[serves]]
name = "world"
"#
        )
    };
    let home = Home::new();
    let tokens = write_tokens(&home.path("tokens.toml"), &["hub", "viewer", "admin"]);
    let text = config(&home.path("tokens.toml").display().to_string());
    let home = home.with_config(&text);
    let mut child = Stage::at(home).await;
    let as_caller = |name: &str| format!("Bearer {}", tokens[name].1);
    let admin = as_caller("admin");
    for name in ["a", "b"] {
        let registration = Some(registration(name, child.fleet.endpoint()));
        let request = pb::RegisterSubsystemRequest { registration, lease: None };
        child.client.register_subsystem(with(&admin, request)).await.unwrap();
    }
    let mut parent = Parent::of(&child.service).await;
    assert_eq!(parent.initialize("hub", EPOCH).await.unwrap_err().code(), Code::Unauthenticated);
    let (hub, viewer) = (as_caller("hub"), as_caller("viewer"));
    let refused = parent.0.initialize(with(&viewer, initialize("hub", EPOCH))).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("token:viewer may not call Subsystem.Initialize"), "{refused}");
    parent.0.initialize(with(&hub, initialize("hub", EPOCH))).await.unwrap();
    let world = pbs::RunCycleRequest { subsystem: "world".into(), ..run(1) };
    assert_eq!(parent.ask(with(&hub, world)).await.unwrap_err().code(), Code::PermissionDenied);

    let mut request = with(&hub, run(1));
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.metadata_mut().insert("traceparent", trace.parse().unwrap());
    assert_eq!(parent.ask(request).await.unwrap()["state"], "SUCCEEDED");
    let get = with(&admin, pb::GetCycleRequest { cycle_id: 1 });
    let record = child.client.get_cycle(get).await.unwrap().into_inner().telemetry;
    let record = pb::CycleTelemetry::decode(record).unwrap();
    assert_eq!(record.triggered_by, "token:hub");
    assert_eq!(record.trace_id, "0af7651916cd43dd8448eb211c80319c");
    assert!(child.fleet.runs("a")[0].trace[0].as_ref().unwrap().contains(&record.trace_id));
    // Another caller has no part in it.
    let status = pbs::GetStatusRequest { subsystem: "eu".into() };
    let status = parent.0.get_status(with(&viewer, status)).await.unwrap().into_inner().status;
    let status = from_struct(&status);
    assert_eq!(status["last_cycle"], json!({ "cycle_id": 1, "state": "SUCCEEDED" }));
    assert_eq!((&status["orchestrator_id"], &status["subsystems"]), (&json!("child"), &json!(2)));

    let channel = Endpoint::from_shared(endpoint(&child.service)).unwrap().connect().await.unwrap();
    let filter = pb::ListAuditEventsRequest { rpc: "Subsystem.RunCycle".into(), ..Default::default() };
    let events = LedgerClient::new(channel).list_audit_events(with(&admin, filter)).await.unwrap().into_inner().events;
    let [event] = &events[..] else { panic!("{events:?}") };
    let event = AuditEvent::decode(event.event.clone()).unwrap();
    assert_eq!((event.caller.as_str(), event.cycle_id, &event.targets[..]), ("token:hub", 1, &["a".to_owned()][..]));
}

#[tokio::test]
async fn a_full_line_is_a_reason_to_try_again() {
    let mut child = child(&format!("{CHILD}[cycle]\nmax_queued = 0\n")).await;
    child.register_all(&["a"]).await;
    child.fleet.run("a", Run::Hold);
    child.client.admit().await.unwrap();
    child.fleet.until_run("a", 1).await;
    let mut parent = Parent::initialized(&child.service).await;
    let refused = parent.run(1).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("cycle.max_queued"), "{refused}");
    child.fleet.run("a", Run::Echo);
    child.client.recorded(1).await;
    assert_eq!(parent.run(1).await.unwrap()["cycle_id"], 2);
}

// ---------------------------------------------------------------------------------------------------------------
// The contract

#[tokio::test]
async fn an_orchestrator_passes_the_strict_check_of_the_contract_of_a_subsystem() {
    // Requests of 64 MiB are recommended.
    let config = "orchestrator_id = \"child\"\n\
                  [server]\nmax_request_bytes = 67_108_864\n\
                  [memory]\nmax_bytes = 4_294_967_296\n\
                  [[serves]]\nname = \"eu\"\nsubsystems = [\"a\"]\n\
                  [[serves]]\nname = \"us\"\nsubsystems = [\"b\"]\n";
    let mut child = child(config).await;
    child.register_all(&["a", "b"]).await;
    // Long enough for the checks of a call in progress.
    child.fleet.run("a", Run::Late(Duration::from_millis(400), Box::new(Run::Echo)));
    let endpoint = endpoint(&child.service);
    let args = ["conformance", &endpoint, "--subsystem", "eu", "--subsystem", "us", "--strict", "--output", "json"];
    let (code, text) = command::orchestrator(None, &args).await;
    let report: Value = serde_json::from_str(&text).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let others: Vec<_> = checks.iter().filter(|check| check["outcome"] != "PASSED").collect();
    assert_eq!((code, others), (0, vec![]), "{report:#}");
    assert_eq!(checks.len(), 22);
}

// ---------------------------------------------------------------------------------------------------------------
// The example

/// A region of the example, on a free port.
struct Region {
    process: Child,
    address: String,
    _lines: Lines<BufReader<ChildStdout>>,
}

impl Region {
    async fn start(name: &str) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_orchestrator"))
            .args(["demo", "--serve-as", name, "--listen", "127.0.0.1:0", "--interval", "1h"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let line = patiently("the region to listen", lines.next_line()).await.unwrap().unwrap();
        let address = line.strip_prefix("listening on ").unwrap().to_owned();
        Self { process, address, _lines: lines }
    }
}

#[tokio::test]
async fn the_example_is_a_parent_with_three_regions() {
    let mut config = include_str!("../../examples/regions/parent.toml").to_owned();
    let script = include_str!("../../examples/regions/run");
    let mut regions = Vec::new();
    for (name, port) in [("eu", "7711"), ("us", "7712"), ("asia", "7713")] {
        assert!(script.contains(&format!(" {name}:{port}")), "{name} has another port in the script");
        let region = Region::start(name).await;
        let address = format!("127.0.0.1:{port}");
        assert!(config.contains(&address));
        config = config.replace(&address, &region.address);
        regions.push((name, region));
    }
    let home = Home::new().with_config(&config);
    let parent = home.serve().await;
    let mut client = parent.client().await;
    let cycle = client.run().await.unwrap();
    for (name, region) in &mut regions {
        let summary = part(&cycle, name);
        assert_eq!(summary.state(), SubsystemState::Succeeded, "{summary:?}");
        let latest = client.subsystem(name).await.unwrap();
        assert_eq!(from_struct(&latest.output)["subsystems"], 28);
        let list = ["cycles", "list", "--trigger", "parent", "--address", &region.address];
        let (code, text) = command::orchestrator(None, &list).await;
        assert!(code == 0 && text.contains(" parent "), "{text}");
        region.process.kill().await.unwrap();
    }
}
