//! `orchestrator conformance`, against a subsystem that keeps the contract, and against others that each break one
//! rule.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    future,
    net::SocketAddr,
    process::Output,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::common::{fleet::to_struct, patiently};
use futures_util::{FutureExt as _, StreamExt as _, stream};
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use orchestrator_core::{
    model::Payload,
    proto::subsystem::v1::{
        self as pb,
        subsystem_client::SubsystemClient,
        subsystem_server::{Subsystem, SubsystemServer},
    },
};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, net::TcpListener, process::Command, task::JoinSet};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, body::Body, codegen::http, service::Routes, transport::Server};
use tower::{Service, util::MapFutureLayer};

/// The names of the served subsystems.
const NAMES: [&str; 2] = ["fake", "other"];
/// Time that a fake takes for a cycle, for checks of a call in progress. The checks give up after 50 ms; the rest is
/// for a busy machine.
const WORK: Duration = Duration::from_millis(300);
/// The checks, all of which are in the report. Each is a rule that the fake can break.
const CHECKS: [&str; 22] = [
    "status",
    "run-before-initialize",
    "initialize",
    "run-cycle",
    "repeated-cycle",
    "concurrent-repeats",
    "older-epoch-in-run-cycle",
    "older-epoch-in-initialize",
    "status-while-running",
    "deadline",
    "cancellation",
    "unknown-subsystem",
    "unknown-fields",
    "absent-and-stale-inputs",
    "large-input",
    "larger-input",
    "concurrent-subsystems",
    "malformed-request",
    "output-limits",
    "status-has-no-effects",
    "health",
    "dropped-connection",
];
const RECOMMENDED: [&str; 3] = ["larger-input", "malformed-request", "health"];
/// Most fakes that are checked concurrently, each of which reads requests of 64 MiB.
const AT_ONCE: usize = 4;
/// Checks that need a call in progress, which does not exist if it is answered at once.
const IN_THE_MIDDLE: [&str; 4] = ["status-while-running", "deadline", "cancellation", "dropped-connection"];

/// Allowed, but less observable: `GetStatus` is not implemented, and says so only while no cycle runs.
const WITHOUT_STATUS: &str = "without-status";

/// Not a separate rule: every answer begins at once and never ends.
const STALLS: &str = "stalls";
/// Not a separate rule: it requires `source`, so that its input is always fresh.
const REQUIRES: &str = "requires";
/// Not a separate rule: an error of 8 KiB.
const LONG_ERROR: &str = "long-error";
/// Not a separate rule: answers of 8 KiB, all different.
const LONG_ANSWERS: &str = "long-answers";

/// A small subsystem that keeps the contract, except for the named rule.
#[derive(Clone, Default)]
struct Fake {
    breaks: &'static str,
    takes: Duration,
    state: Arc<Mutex<State>>,
    /// Held during the work of a cycle, so that it is done once.
    work: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct State {
    initialized: u32,
    epoch: u64,
    runs: u32,
    answers: HashMap<(String, u64, u32), pb::RunCycleResponse>,
    in_flight: BTreeMap<String, u32>,
    first_peer: Option<SocketAddr>,
    /// The next cycle is never answered.
    is_stuck: bool,
}

/// A call in progress.
struct AtWork<'a> {
    fake: &'a Fake,
    subsystem: String,
    /// True if the fake gets stuck when this is dropped before its end.
    sticks: bool,
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        let mut state = self.fake.state.lock().unwrap();
        state.is_stuck |= self.sticks;
        let calls = state.in_flight.get_mut(&self.subsystem).unwrap();
        *calls -= 1;
        if *calls == 0 {
            state.in_flight.remove(&self.subsystem);
        }
    }
}

impl Fake {
    fn breaks(&self, rule: &str) -> bool {
        self.breaks == rule
    }

    fn epoch(&self, epoch: u64, rule: &str) -> Result<(), Status> {
        let mut state = self.state.lock().unwrap();
        if epoch < state.epoch && !self.breaks(rule) {
            return Err(Status::aborted("superseded"));
        }
        state.epoch = state.epoch.max(epoch);
        Ok(())
    }

    fn serves(&self, name: &str) -> Result<(), Status> {
        let serves = NAMES.contains(&name) || self.breaks("unknown-subsystem");
        if serves { Ok(()) } else { Err(Status::not_found(format!("no {name} here"))) }
    }

    fn refuses(&self, request: &pb::RunCycleRequest) -> bool {
        let freshness = |input: &pb::Input| input.freshness() == pb::Freshness::Absent;
        let largest = request.inputs.values().map(|input| input.output.len()).max().unwrap_or_default();
        match self.breaks {
            REQUIRES => request.inputs.get("source").is_some_and(|it| it.freshness() != pb::Freshness::Fresh),
            "absent-and-stale-inputs" => request.inputs.values().any(freshness),
            "large-input" => (1 << 20..5 << 20).contains(&largest),
            "larger-input" => largest > 4 << 20,
            "unknown-fields" => {
                let parameters = Payload::check(request.parameters.clone()).unwrap();
                Payload::from_json(&parameters.to_json()).unwrap().len() != parameters.len()
            }
            _ => false,
        }
    }
}

#[tonic::async_trait]
impl Subsystem for Fake {
    async fn initialize(
        &self,
        request: Request<pb::InitializeRequest>,
    ) -> Result<Response<pb::InitializeResponse>, Status> {
        let request = request.into_inner();
        self.serves(&request.subsystem)?;
        self.epoch(request.epoch, "older-epoch-in-initialize")?;
        if self.breaks(LONG_ERROR) {
            return Err(Status::internal("long".repeat(2 << 10)));
        }
        let mut state = self.state.lock().unwrap();
        state.initialized += 1;
        if self.breaks("initialize") && state.initialized > 1 {
            return Err(Status::already_exists("initialized <before>"));
        }
        Ok(Response::new(pb::InitializeResponse {}))
    }

    async fn run_cycle(&self, request: Request<pb::RunCycleRequest>) -> Result<Response<pb::RunCycleResponse>, Status> {
        let peer = request.remote_addr().unwrap();
        let timeout = request.metadata().get("grpc-timeout").unwrap().to_str().unwrap().to_owned();
        let request = request.into_inner();
        self.serves(&request.subsystem)?;
        self.epoch(request.epoch, "older-epoch-in-run-cycle")?;
        if self.breaks("run-cycle") {
            return Err(Status::internal("the disk is on fire"));
        }
        let subsystem = request.subsystem.clone();
        let is_first_peer = {
            let mut state = self.state.lock().unwrap();
            if state.initialized == 0 {
                let code = if self.breaks("run-before-initialize") { Code::Internal } else { Code::FailedPrecondition };
                return Err(Status::new(code, "not initialized"));
            }
            *state.in_flight.entry(subsystem.clone()).or_default() += 1;
            *state.first_peer.get_or_insert(peer) == peer
        };
        // The check of deadlines gives 50 ms, all other checks give seconds. Nanoseconds have eight digits, so up to
        // 0.1 s.
        let is_short = timeout.ends_with('n');
        let sticks = match self.breaks {
            "cancellation" => !is_short && is_first_peer,
            "dropped-connection" => !is_short && !is_first_peer,
            _ => false,
        };
        let mut at_work = AtWork { fake: self, subsystem: subsystem.clone(), sticks };
        if matches!(self.breaks, "cancellation" | "dropped-connection") {
            // Long enough for the cancellation of an earlier call to arrive.
            tokio::time::sleep(WORK).await;
        }
        if std::mem::take(&mut self.state.lock().unwrap().is_stuck) {
            at_work.sticks = false;
            future::pending::<()>().await;
        }
        if self.refuses(&request) {
            at_work.sticks = false;
            return Err(Status::invalid_argument("refused"));
        }
        if self.breaks("concurrent-subsystems") {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if self.state.lock().unwrap().in_flight.len() > 1 {
                return Err(Status::resource_exhausted("one after the other"));
            }
        }
        let attempt = if self.breaks("repeated-cycle") { request.attempt } else { 1 };
        let key = (subsystem, request.cycle_id, attempt);
        let before = || self.state.lock().unwrap().answers.get(&key).cloned();
        let (answered, _working) = if self.breaks("concurrent-repeats") {
            let answered = before();
            if answered.is_none() {
                // All concurrent calls find that the work is not done yet.
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            (answered, None)
        } else {
            let working = self.work.lock().await;
            let answered = before();
            if answered.is_none() {
                tokio::time::sleep(self.takes).await;
            }
            (answered, Some(working))
        };
        let mut state = self.state.lock().unwrap();
        let answer = answered.filter(|_| !self.breaks(LONG_ANSWERS)).unwrap_or_else(|| {
            state.runs += 1;
            let runs = state.runs;
            let output = to_struct(&json!({ "runs": runs, "by": request.subsystem }));
            let mut answer = pb::RunCycleResponse { output, ..Default::default() };
            answer.metrics.insert("runs".into(), f64::from(runs));
            if self.breaks(LONG_ANSWERS) {
                answer.output = to_struct(&json!({ "runs": runs, "the rest": "long".repeat(2 << 10) }));
            }
            if self.breaks("output-limits") {
                answer.metrics.insert(String::new(), 1.0);
            }
            state.answers.insert(key, answer.clone());
            answer
        });
        drop(state);
        at_work.sticks = false;
        Ok(Response::new(answer))
    }

    async fn get_status(
        &self,
        request: Request<pb::GetStatusRequest>,
    ) -> Result<Response<pb::GetStatusResponse>, Status> {
        self.serves(&request.into_inner().subsystem)?;
        if matches!(self.breaks, "status-while-running" | WITHOUT_STATUS) {
            // Well after the call in progress has been answered.
            let _working = self.work.lock().await;
            tokio::time::sleep(WORK / 2).await;
        }
        if self.breaks(WITHOUT_STATUS) {
            return Err(Status::unimplemented("nothing to show"));
        }
        let mut state = self.state.lock().unwrap();
        if self.breaks("status") && state.initialized == 0 {
            return Err(Status::internal("too early"));
        }
        if self.breaks("status-has-no-effects") {
            state.answers.clear();
        }
        Ok(Response::new(pb::GetStatusResponse { status: to_struct(&json!({ "runs": state.runs })) }))
    }
}

type Answering = <Routes as Service<http::Request<Body>>>::Future;
type Answered = Result<http::Response<Body>, Infallible>;

/// Announces an answer at once, which ends the library's control of the deadline, and sends it when it is ready.
fn announced(answer: impl Future<Output = Answered> + Send + 'static) -> http::Response<Body> {
    let frames = stream::once(answer).flat_map(|answer| {
        let (head, body) = answer.unwrap().into_parts();
        // A refusal has only a head; its status moves to where that of an answer is.
        let refusal = head.headers.contains_key("grpc-status").then(|| Ok(head.headers));
        BodyStream::new(body.with_trailers(future::ready(refusal)))
    });
    let head = http::Response::builder().header("content-type", "application/grpc");
    head.body(Body::new(StreamBody::new(frames))).unwrap()
}

/// Serves it until the returned tasks are dropped.
async fn serve(breaks: &'static str) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (reporter, health) = tonic_health::server::health_reporter();
    let status =
        if breaks == "health" { tonic_health::ServingStatus::NotServing } else { tonic_health::ServingStatus::Serving };
    reporter.set_service_status("", status).await;
    // Fakes that get stuck in the middle of a call take their time before.
    let is_slow = matches!(breaks, "" | WITHOUT_STATUS | "status-while-running" | "deadline");
    let takes = if is_slow { WORK } else { Duration::ZERO };
    let fake = Fake { breaks, takes, ..Fake::default() };
    let service = SubsystemServer::new(fake).max_decoding_message_size(usize::MAX);
    let spoil = move |answer: Answering| match breaks {
        "deadline" => future::ready(Ok(announced(answer))).boxed(),
        STALLS => future::ready(Ok(announced(future::pending()))).boxed(),
        "malformed-request" => async {
            let answer = answer.await?;
            match answer.headers().get("grpc-status") {
                // The library's answer to it.
                Some(status) if status == "3" => future::pending().await,
                _ => Ok(answer),
            }
        }
        .boxed(),
        _ => answer.boxed(),
    };
    let server = Server::builder().layer(MapFutureLayer::new(spoil)).add_service(service).add_service(health);
    let mut servers = JoinSet::new();
    servers.spawn(async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
    (endpoint, servers)
}

async fn conformance(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command.arg("conformance").args(arguments).kill_on_drop(true);
    patiently("the conformance check", command.output()).await.unwrap()
}

fn report(output: &Output) -> Value {
    let stdout = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn with_outcome(report: &Value, outcome: &str) -> Vec<String> {
    let checks = report["checks"].as_array().unwrap().iter();
    checks.filter(|check| check["outcome"] == outcome).map(|check| check["name"].as_str().unwrap().into()).collect()
}

async fn check(endpoint: &str, more: &[&str]) -> (Option<i32>, Value) {
    let [name, other] = NAMES;
    let arguments = [endpoint, "--subsystem", name, "--subsystem", other, "--timeout", "8s", "--output", "json"];
    let output = conformance(&[&arguments[..], more].concat()).await;
    (output.status.code(), report(&output))
}

#[tokio::test]
async fn a_subsystem_that_keeps_the_contract_passes_again_and_again() {
    let (endpoint, _server) = serve("").await;
    let (code, first) = check(&endpoint, &["--strict"]).await;
    assert_eq!(with_outcome(&first, "PASSED"), CHECKS, "{first:#}");
    assert_eq!((code, &first["passed"]), (Some(0), &json!(true)));
    // It is initialized now.
    let (code, again) = check(&endpoint, &["--strict", "--param", "a=1", "--input", r#"prices={"a":1}"#]).await;
    assert_eq!(with_outcome(&again, "NOT_APPLICABLE"), ["run-before-initialize"], "{again:#}");
    assert_eq!((code, with_outcome(&again, "PASSED").len()), (Some(0), CHECKS.len() - 1));
}

#[tokio::test]
async fn each_check_finds_the_subsystem_that_breaks_its_rule() {
    let broken = stream::iter(CHECKS).for_each_concurrent(AT_ONCE, |rule| async move {
        let (endpoint, _server) = serve(rule).await;
        let (code, report) = check(&endpoint, &[]).await;
        assert_eq!(with_outcome(&report, "FAILED"), [rule], "{report:#}");
        let is_recommended = RECOMMENDED.contains(&rule);
        assert_eq!(code, Some(i32::from(!is_recommended)), "{rule}");
        let failed = report["checks"].as_array().unwrap().iter().find(|check| check["name"] == rule).unwrap();
        for said in ["rule", "sent", "came"] {
            assert_ne!(failed[said].as_str().unwrap(), "", "{rule}: {failed}");
        }
        assert_eq!(failed["level"], if is_recommended { "recommended" } else { "required" });
    });
    broken.await;
}

#[tokio::test]
async fn unobservable_rules_are_not_applicable() {
    let (endpoint, _server) = serve("health").await;
    let output = conformance(&[&endpoint, "--subsystem", NAMES[0], "--output", "json"]).await;
    let unseen = with_outcome(&self::report(&output), "NOT_APPLICABLE");
    let expected = CHECKS.into_iter().filter(|it| IN_THE_MIDDLE.contains(it) || *it == "concurrent-subsystems");
    assert_eq!(unseen, expected.collect::<Vec<_>>(), "{output:?}");
    let (endpoint, _server) = serve(WITHOUT_STATUS).await;
    let (code, report) = check(&endpoint, &["--strict"]).await;
    assert_eq!(
        with_outcome(&report, "NOT_APPLICABLE"),
        ["status", "status-while-running", "status-has-no-effects"],
        "{report:#}"
    );
    assert_eq!((code, &report["passed"]), (Some(0), &json!(true)));
    // Without a name, an unknown name can't be checked either; but the fake accepts no made-up name.
    let (endpoint, _server) = serve("unknown-subsystem").await;
    let output = conformance(&[&endpoint, "--output", "json"]).await;
    assert!(
        with_outcome(&self::report(&output), "NOT_APPLICABLE").contains(&"unknown-subsystem".to_owned()),
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(0));
}

#[tokio::test]
async fn recommendations_count_on_request() {
    let (endpoint, _server) = serve("health").await;
    let (code, report) = check(&endpoint, &["--strict"]).await;
    assert_eq!((code, with_outcome(&report, "FAILED")), (Some(1), vec!["health".to_owned()]));
}

#[tokio::test]
async fn a_report_is_for_people_and_for_ci_systems_too() {
    let (endpoint, _server) = serve("initialize").await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.xml");
    let output = conformance(&[&endpoint, "--subsystem", NAMES[0], "--junit", path.to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "initialize failed",
        "  came      ALREADY_EXISTS: initialized <before>",
        "22 checks: 16 passed, 1 failed, 5 not applicable",
    ] {
        assert!(text.contains(line), "{line:?} is missing:\n{text}");
    }
    let xml = std::fs::read_to_string(&path).unwrap();
    assert!(xml.contains(r#"tests="22" failures="1" skipped="5""#), "{xml}");
    assert!(xml.contains(r#"<failure message="ALREADY_EXISTS: initialized &lt;before&gt;">"#), "{xml}");
    assert_eq!(xml.matches("<testcase ").count(), CHECKS.len());
}

#[tokio::test]
async fn the_timeout_applies_to_answers_that_never_end() {
    let (endpoint, _server) = serve(STALLS).await;
    let output = conformance(&[&endpoint, "--subsystem", NAMES[0], "--timeout", "200ms"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("22 checks: 0 passed, 1 failed, 21 not applicable"), "{text}");
    assert!(text.contains("came      DEADLINE_EXCEEDED: no answer within 200ms"), "{text}");
}

#[tokio::test]
async fn a_server_without_grpc_is_reported() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let mut server = JoinSet::new();
    server.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // The sender of an HTTP/2 preface may have disconnected.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            // Unread bytes at the close would reset the connection, and the answer would be lost.
            let _ = stream.shutdown().await;
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        }
    });
    let output = conformance(&[&endpoint, "--subsystem", NAMES[0]]).await;
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains(&format!("can't reach a subsystem at {endpoint}: it speaks HTTP/1, not gRPC")), "{text}");
}

#[tokio::test]
async fn another_caller_with_a_higher_epoch_is_reported() {
    let (endpoint, _server) = serve("").await;
    let mut other = SubsystemClient::connect(endpoint.clone()).await.unwrap();
    let later = pb::InitializeRequest { subsystem: NAMES[0].into(), epoch: u64::MAX, ..Default::default() };
    other.initialize(later).await.unwrap();
    let output = conformance(&[&endpoint, "--subsystem", NAMES[0]]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("Another caller has used a higher epoch with \"fake\": restart it"), "{text}");
}

#[tokio::test]
async fn a_name_that_is_not_served_is_reported_once() {
    let (endpoint, _server) = serve("").await;
    let output = conformance(&[&endpoint]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("1 failed") && text.contains("run-cycle failed\n"), "{text}");
    let hint = format!("{endpoint} does not serve a subsystem \"conformance\": give its name with --subsystem.\n");
    assert!(text.ends_with(&hint), "{text}");
}

#[tokio::test]
async fn a_required_input_is_always_fresh() {
    let (endpoint, _server) = serve(REQUIRES).await;
    let input = ["--input", r#"source={"n":3}"#];
    let (_, report) = check(&endpoint, &input).await;
    assert_eq!(with_outcome(&report, "FAILED"), ["absent-and-stale-inputs"], "{report:#}");
    let (code, report) = check(&endpoint, &[&input[..], &["--requires", "source"]].concat()).await;
    assert_eq!((code, with_outcome(&report, "FAILED")), (Some(0), vec![]), "{report:#}");
    let output = conformance(&[&endpoint, "--requires", "source"]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("add --input 'source={…}'"), "{output:?}");
}

#[tokio::test]
async fn a_report_is_bounded_and_not_lost_when_its_file_can_not_be_written() {
    let (endpoint, _server) = serve(LONG_ERROR).await;
    let output = conformance(&[&endpoint, "--subsystem", NAMES[0], "--junit", "/nowhere/report.xml"]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).starts_with("can't write --junit /nowhere/report.xml"),
        "{output:?}"
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let came = text.lines().find(|line| line.starts_with("  came      INTERNAL: longlong")).unwrap();
    assert!(came.ends_with("… (8202 bytes in all)") && came.len() < 5000, "{came}");

    // The report shows both of two answers that should be the same.
    let (endpoint, _server) = serve(LONG_ANSWERS).await;
    let (_, report) = check(&endpoint, &[]).await;
    let check = report["checks"].as_array().unwrap().iter().find(|check| check["name"] == "repeated-cycle").unwrap();
    let came = check["came"].as_str().unwrap();
    assert_eq!((came.matches(r#"output {"runs":"#).count(), came.len() < 5000), (2, true), "{came}");
}

#[tokio::test]
async fn invalid_arguments_are_wrong_usage() {
    let (endpoint, _server) = serve("").await;
    for wrong in [["--timeout", "100000000h"], ["--timeout", "0s"], ["--subsystem", ""], ["--subsystem", "a b"]] {
        assert_eq!(conformance(&[&[&*endpoint], &wrong[..]].concat()).await.status.code(), Some(2), "{wrong:?}");
    }
    // A repeated name is one subsystem.
    let [name, _] = NAMES;
    let twice = [&*endpoint, "--subsystem", name, "--subsystem", name, "--output", "json"];
    let output = conformance(&twice).await;
    let unseen = with_outcome(&self::report(&output), "NOT_APPLICABLE");
    assert!(unseen.contains(&"concurrent-subsystems".to_owned()), "{unseen:?}");
}

#[tokio::test]
async fn an_unreachable_subsystem_gets_no_verdict() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let output = conformance(&[&endpoint]).await;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let wrong = conformance(&["ftp://example.org"]).await;
    let message = String::from_utf8_lossy(&wrong.stderr);
    assert_eq!((wrong.status.code(), message.matches("ftp://example.org").count()), (Some(2), 1), "{message}");
}
