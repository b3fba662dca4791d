//! Traces: the spans that a collector receives, and the traces that callers and subsystems join.

use std::{collections::BTreeMap, fs, net::SocketAddr, process::Stdio, sync::Arc};

use crate::common::{
    Stage,
    fleet::{Call, Run},
    http::get,
    patiently,
    process::Running,
    service::{Client, Home, decode, ms, registration},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value as Any},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use orchestrator_core::proto::orchestrator::v1::{self as pb, CycleState};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::TcpListener,
    process::Command,
    sync::watch,
    task::JoinSet,
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, transport::Server};

// ---------------------------------------------------------------------------------------------------------------
// A receiver of OTLP over gRPC

type Seen = Vec<(Value, Span)>;

/// Keeps every span that it receives. It stops when it is dropped.
struct Collector {
    address: SocketAddr,
    seen: Arc<watch::Sender<Seen>>,
    stop: CancellationToken,
    server: JoinSet<()>,
}

struct Receiver {
    seen: Arc<watch::Sender<Seen>>,
    answers: bool,
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let resource = attributes(&of_resource.resource.unwrap().attributes);
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.seen.send_modify(|seen| seen.extend(spans.map(|span| (resource.clone(), span))));
        }
        if !self.answers {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> Self {
        Self::at("127.0.0.1:0", true).await
    }

    async fn at(address: &str, answers: bool) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(watch::Sender::new(Seen::new()));
        let service = TraceServiceServer::new(Receiver { seen: seen.clone(), answers });
        let server = Server::builder().add_service(service);
        let (mut servers, stop) = (JoinSet::new(), CancellationToken::new());
        let stopped = stop.clone().cancelled_owned();
        let incoming = TcpListenerStream::new(listener);
        servers.spawn(async move { server.serve_with_incoming_shutdown(incoming, stopped).await.unwrap() });
        Self { address, seen, stop, server: servers }
    }

    /// Stops, and closes its connections.
    async fn stop(mut self) {
        self.stop.cancel();
        patiently("the collector to stop", self.server.join_next()).await.unwrap().unwrap();
    }

    fn home(&self) -> Home {
        Home::new().with_args(["--set".to_owned(), format!("tracing.otlp_endpoint=http://{}", self.address)])
    }

    async fn until(&self, what: &str, holds: impl Fn(&Seen) -> bool) -> Seen {
        let mut seen = self.seen.subscribe();
        patiently(what, seen.wait_for(|seen| holds(seen))).await.unwrap().clone()
    }

    /// The spans of a cycle, which arrive together.
    async fn of_cycle(&self, cycle: &pb::CycleTelemetry) -> Trace {
        let id = &cycle.trace_id;
        let is_root = |span: &Span| {
            let of = attributes(&span.attributes)["orchestrator.cycle_id"].as_u64();
            hex(&span.trace_id) == *id && span.name == "cycle" && of == Some(cycle.cycle_id)
        };
        let what = format!("the trace of cycle {}", cycle.cycle_id);
        let seen = self.until(&what, |seen| seen.iter().any(|(_, span)| is_root(span)));
        let mut spans = Vec::new();
        for (resource, span) in seen.await {
            if hex(&span.trace_id) == *id && resource["service.name"] == "orchestrator" {
                assert_eq!(resource["service.instance.id"], "orchestrator");
                spans.push(span);
            }
        }
        Trace { id: id.clone(), spans }
    }

    fn count(&self) -> usize {
        self.seen.borrow().len()
    }
}

/// The spans of one trace.
struct Trace {
    id: String,
    spans: Vec<Span>,
}

impl Trace {
    fn named(&self, name: &str) -> Vec<&Span> {
        self.spans.iter().filter(|span| span.name == name).collect()
    }

    fn root(&self) -> &Span {
        let [root] = self.named("cycle")[..] else { panic!("{:?}", self.spans) };
        root
    }

    /// The calls of a method of a subsystem, in the order of their starts.
    fn calls(&self, subsystem: &str, method: &str) -> Vec<&Span> {
        let mut calls = self.named(&format!("dreamnet.subsystem.v1.Subsystem/{method}"));
        calls.retain(|span| attributes(&span.attributes)["orchestrator.subsystem"] == subsystem);
        calls.sort_by_key(|span| span.start_time_unix_nano);
        calls
    }

    /// The header with the context of a span.
    fn parent_header(&self, span: &Span) -> String {
        format!("00-{}-{}-01", self.id, hex(&span.span_id))
    }
}

fn hex(bytes: &[u8]) -> String {
    let number = bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte));
    format!("{number:0digits$x}", digits = 2 * bytes.len())
}

fn attributes(attributes: &[KeyValue]) -> Value {
    let value = |value: &AnyValue| match value.value.as_ref().unwrap() {
        Any::StringValue(text) => json!(text),
        Any::IntValue(number) => json!(number),
        Any::BoolValue(truth) => json!(truth),
        other => panic!("{other:?}"),
    };
    let all: BTreeMap<_, _> = attributes.iter().map(|it| (it.key.clone(), value(it.value.as_ref().unwrap()))).collect();
    json!(all)
}

/// The status of a span, its gRPC code and its attempt.
fn outcome(span: &Span) -> (StatusCode, String, i64) {
    let attributes = attributes(&span.attributes);
    let code = attributes["rpc.response.status_code"].as_str().unwrap().to_owned();
    let is_error = span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error);
    assert_eq!(attributes.get("error.type").and_then(Value::as_str), is_error.then_some(code.as_str()));
    let status = if is_error { StatusCode::Error } else { StatusCode::Unset };
    (status, code, attributes["orchestrator.attempt"].as_i64().unwrap())
}

fn outcomes(spans: &[&Span]) -> Vec<(StatusCode, String, i64)> {
    spans.iter().map(|span| outcome(span)).collect()
}

fn ok(attempt: i64) -> (StatusCode, String, i64) {
    (StatusCode::Unset, "OK".into(), attempt)
}

fn failed(code: &str, attempt: i64) -> (StatusCode, String, i64) {
    (StatusCode::Error, code.into(), attempt)
}

const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const NOT_SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// Runs a cycle for a caller that sends these headers.
async fn run_from(client: &mut Client, headers: &[(&'static str, &'static str)]) -> pb::CycleTelemetry {
    let mut request = Request::new(pb::RunCycleRequest::default());
    for (header, value) in headers {
        request.metadata_mut().append(*header, value.parse().unwrap());
    }
    decode(client.run_cycle(request).await.unwrap().into_inner().telemetry)
}

fn last_headers(stage: &Stage, name: &str) -> [Option<String>; 2] {
    stage.fleet.runs(name).last().unwrap().trace.clone()
}

// ---------------------------------------------------------------------------------------------------------------
// Contents of a trace

#[tokio::test]
async fn a_cycle_is_a_trace_of_its_calls_and_its_commit() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    stage.register("b", |it| it.after = vec!["a".into()]).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!((cycle.trace_id.len(), cycle.state()), (32, CycleState::Succeeded));

    let trace = collector.of_cycle(&cycle).await;
    let root = trace.root();
    assert!(root.parent_span_id.is_empty());
    assert_eq!(root.kind(), SpanKind::Internal);
    assert_eq!(
        attributes(&root.attributes),
        json!({
            "orchestrator.cycle_id": 1, "orchestrator.epoch": cycle.epoch,
            "orchestrator.cycle.state": "SUCCEEDED", "orchestrator.cycle.trigger": "MANUAL",
        })
    );
    assert_eq!(trace.spans.len(), 6, "{:?}", trace.spans);
    for span in trace.spans.iter().filter(|span| span.name != "cycle") {
        assert_eq!(span.parent_span_id, root.span_id);
        assert!(span.start_time_unix_nano >= root.start_time_unix_nano, "{span:?}");
        assert!(span.end_time_unix_nano <= root.end_time_unix_nano, "{span:?}");
    }
    assert_eq!(trace.named("commit").len(), 1);

    let calls = stage.fleet.calls();
    let header_of = |call: &Call| call.trace.clone();
    for name in ["a", "b"] {
        let [initialized, ran] = ["Initialize", "RunCycle"].map(|method| {
            let [span] = trace.calls(name, method)[..] else { panic!("{method} of {name}") };
            assert_eq!((outcome(span), span.kind()), (ok(1), SpanKind::Client));
            let (host, port) = stage.fleet.endpoint().strip_prefix("http://").unwrap().rsplit_once(':').unwrap();
            assert_eq!(
                attributes(&span.attributes),
                json!({
                    "rpc.system.name": "grpc", "rpc.method": format!("dreamnet.subsystem.v1.Subsystem/{method}"),
                    "rpc.response.status_code": "OK", "server.address": host,
                    "server.port": port.parse::<i64>().unwrap(), "orchestrator.subsystem": name,
                    "orchestrator.cycle_id": 1, "orchestrator.attempt": 1,
                })
            );
            span
        });
        // Each subsystem receives the context of its own call.
        let sent: Vec<_> = calls.iter().filter(|call| call.subsystem == name).map(header_of).collect();
        assert_eq!(sent, [[Some(trace.parent_header(initialized)), None], [Some(trace.parent_header(ran)), None]]);
    }
    // The times are those of the record.
    let a = crate::common::service::part(&cycle, "a").started_at.unwrap();
    let [ran] = trace.calls("a", "Initialize")[..] else { panic!() };
    let started = a.seconds * 1_000_000_000 + i64::from(a.nanos);
    assert!(i64::try_from(ran.start_time_unix_nano).unwrap().abs_diff(started) < 100_000_000);

    // Each cycle is a trace of its own.
    let second = stage.client.run().await.unwrap();
    assert_ne!(second.trace_id, cycle.trace_id);
    let trace = collector.of_cycle(&second).await;
    assert_eq!(trace.spans.len(), 4);
    // The record contains the id as well.
    assert_eq!(stage.client.cycle(1).await.unwrap().trace_id, cycle.trace_id);
}

#[tokio::test]
async fn every_attempt_and_every_kind_of_failure_is_a_span() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    let quick = |it: &mut pb::Registration| {
        let initial_backoff = ms(1);
        it.retry = Some(pb::RetryPolicy { max_attempts: 3, initial_backoff, ..Default::default() });
    };
    stage.register("flaky", quick).await;
    stage.register("late", |it| it.timeout = ms(200)).await;
    stage.register("broken", |_| {}).await;
    stage.register("bare", |_| {}).await;
    stage.fleet.run("flaky", Run::fail(Code::Unavailable));
    stage.fleet.run("late", Run::Hang);
    stage.fleet.run("broken", Run::Fail(Code::Internal, "no fuel".into()));
    stage.fleet.script("bare", |script| script.initialize = crate::common::fleet::Initialize::Unimplemented);

    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Degraded);
    let trace = collector.of_cycle(&cycle).await;
    let status = trace.root().status.clone().unwrap();
    assert_eq!((status.code(), status.message), (StatusCode::Error, cycle.error.clone()));
    let ran = |name| outcomes(&trace.calls(name, "RunCycle"));
    assert_eq!(ran("flaky"), [1, 2, 3].map(|attempt| failed("UNAVAILABLE", attempt)));
    assert_eq!(ran("late"), [failed("DEADLINE_EXCEEDED", 1)]);
    assert_eq!(ran("broken"), [failed("INTERNAL", 1)]);
    assert_eq!(trace.calls("broken", "RunCycle")[0].status.as_ref().unwrap().message, "no fuel");
    assert_eq!(ran("bare"), [ok(1)]);
    // Needing no initialization is not an error.
    assert_eq!(outcomes(&trace.calls("bare", "Initialize")), [(StatusCode::Unset, "UNIMPLEMENTED".into(), 1)]);
    // Every attempt had a context of its own.
    let sent: Vec<_> = stage.fleet.runs("flaky").into_iter().map(|call| call.trace[0].clone()).collect();
    let spans = trace.calls("flaky", "RunCycle");
    assert_eq!(sent, spans.into_iter().map(|span| Some(trace.parent_header(span))).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_abandoned_call_has_a_span() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    stage.fleet.run("a", Run::Hang);
    let cycle_id = stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 1).await;
    let cancelled = stage.client.cancel(cycle_id).await.unwrap();
    let trace = collector.of_cycle(&cancelled).await;
    assert_eq!(outcomes(&trace.calls("a", "RunCycle")), [failed("CANCELLED", 1)]);
    assert_eq!(attributes(&trace.root().attributes)["orchestrator.cycle.state"], "CANCELLED");

    let short = pb::RunCycleRequest { deadline: ms(100), ..Default::default() };
    let late = stage.client.run_with(short).await.unwrap();
    let trace = collector.of_cycle(&late).await;
    assert_eq!(outcomes(&trace.calls("a", "RunCycle")), [failed("DEADLINE_EXCEEDED", 1)]);

    // The span of a loop's cycle names the loop.
    stage.fleet.run("a", Run::Echo);
    let interval = ms(10);
    let spec = pb::IntervalLoop { name: "fast".into(), interval, ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(spec) }).await.unwrap();
    let seen = collector.until("a cycle of the loop", |seen| {
        seen.iter().any(|(_, span)| attributes(&span.attributes)["orchestrator.loop"] == "fast")
    });
    seen.await;
}

#[tokio::test]
async fn a_cycle_that_is_cancelled_in_line_has_a_trace() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    stage.fleet.run("a", Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 1).await;
    let own = stage.client.admit().await.unwrap();
    let mut request = Request::new(pb::RunCycleRequest { r#async: true, ..Default::default() });
    request.metadata_mut().insert("traceparent", SAMPLED.parse().unwrap());
    let of_caller = stage.client.run_cycle(request).await.unwrap().into_inner().cycle_id;
    for waiting in [own, of_caller] {
        let cycle = patiently("a cancelled cycle", stage.client.cancel(waiting)).await.unwrap();
        let trace = collector.of_cycle(&cycle).await;
        assert_eq!(attributes(&trace.root().attributes)["orchestrator.cycle.state"], "CANCELLED");
        assert_eq!((trace.named("commit").len(), trace.spans.len()), (1, 2), "{:?}", trace.spans);
        assert_eq!(cycle.trace_id == TRACE_ID, cycle.cycle_id == of_caller);
        assert_eq!(trace.root().parent_span_id.is_empty(), cycle.cycle_id == own);
    }
}

/// Its spans are lost with the process, but those of its subsystems can be found by the id.
#[tokio::test]
async fn an_interrupted_cycle_keeps_its_trace_id() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    stage.fleet.run("a", Run::Hold);
    let running = stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 1).await;
    let [parent, _] = last_headers(&stage, "a");
    let mut request = Request::new(pb::RunCycleRequest { r#async: true, ..Default::default() });
    request.metadata_mut().insert("traceparent", SAMPLED.parse().unwrap());
    let waiting = stage.client.run_cycle(request).await.unwrap().into_inner().cycle_id;

    let mut stage = stage.killed().await;
    stage.fleet.run("a", Run::Echo);
    let interrupted = stage.client.cycle(running).await.unwrap();
    assert_eq!((interrupted.state(), interrupted.trace_id.len()), (CycleState::Interrupted, 32));
    let parent = parent.unwrap();
    assert!(parent.starts_with(&format!("00-{}-", interrupted.trace_id)), "{parent}");
    // The waiting cycle runs now, in the trace of its caller.
    let ran = stage.client.recorded(waiting).await;
    assert_eq!((ran.state(), ran.trace_id.as_str()), (CycleState::Succeeded, TRACE_ID));
    assert!(last_headers(&stage, "a")[0].as_ref().unwrap().starts_with(&format!("00-{TRACE_ID}-")));
}

// ---------------------------------------------------------------------------------------------------------------
// Callers

#[tokio::test]
async fn the_trace_of_a_caller_is_joined() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    let headers = [("traceparent", SAMPLED), ("tracestate", "x=1"), ("tracestate", "y=2")];
    let cycle = run_from(&mut stage.client, &headers).await;
    assert_eq!(cycle.trace_id, TRACE_ID);
    let trace = collector.of_cycle(&cycle).await;
    assert_eq!(hex(&trace.root().parent_span_id), "b7ad6b7169203331");
    let [ran] = trace.calls("a", "RunCycle")[..] else { panic!() };
    assert_eq!(last_headers(&stage, "a"), [Some(trace.parent_header(ran)), Some("x=1,y=2".into())]);

    // A caller's decision not to sample is followed and passed on.
    let cycle = run_from(&mut stage.client, &[("traceparent", NOT_SAMPLED), ("tracestate", "x=1")]).await;
    assert_eq!(cycle.trace_id, TRACE_ID);
    assert_eq!(last_headers(&stage, "a"), [Some(NOT_SAMPLED.into()), Some("x=1".into())]);
    let unsampled = cycle.cycle_id;

    // A malformed or repeated header is ignored.
    for headers in [&[("traceparent", "00-1-2-01")][..], &[("traceparent", SAMPLED), ("traceparent", SAMPLED)]] {
        let cycle = run_from(&mut stage.client, headers).await;
        assert!(cycle.trace_id != TRACE_ID && cycle.trace_id.len() == 32, "{}", cycle.trace_id);
        assert!(collector.of_cycle(&cycle).await.root().parent_span_id.is_empty());
    }
    // Spans arrive in the order of cycles, so this cycle has none.
    let of_unsampled = |seen: &Seen| {
        seen.iter().filter(|(_, span)| attributes(&span.attributes)["orchestrator.cycle_id"] == unsampled).count()
    };
    assert_eq!(of_unsampled(&collector.seen.borrow()), 0);
}

#[tokio::test]
async fn without_a_collector_the_trace_of_a_caller_is_passed_on_unchanged() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    assert_eq!(stage.client.run().await.unwrap().trace_id, "");
    assert_eq!(last_headers(&stage, "a"), [None, None]);
    for sent in [SAMPLED, NOT_SAMPLED] {
        assert_eq!(run_from(&mut stage.client, &[("traceparent", sent)]).await.trace_id, TRACE_ID);
        assert_eq!(last_headers(&stage, "a"), [Some(sent.into()), None]);
    }
}

#[tokio::test]
async fn the_ratio_applies_to_requests_without_a_decision_of_the_caller() {
    let collector = Collector::start().await;
    let config =
        |ratio: &str| format!("[tracing]\notlp_endpoint = \"http://{}\"\nsample_ratio = {ratio}\n", collector.address);
    let mut stage = Stage::at(Home::new().with_config(&config("0"))).await;
    stage.register("a", |_| {}).await;
    let dropped = stage.client.run().await.unwrap();
    // Subsystems receive the decision, so that they do not sample either; their logs can still be found by the id.
    let [parent, _] = last_headers(&stage, "a");
    let parent = parent.unwrap();
    assert!(parent.starts_with(&format!("00-{}-", dropped.trace_id)) && parent.ends_with("-00"), "{parent}");
    collector.of_cycle(&run_from(&mut stage.client, &[("traceparent", SAMPLED)]).await).await;
    assert!(collector.seen.borrow().iter().all(|(_, span)| hex(&span.trace_id) == TRACE_ID));

    // It can be changed while the service runs.
    fs::write(stage.home.path("orchestrator.toml"), config("1")).unwrap();
    stage.service.signal(Signal::HUP);
    let reloaded = async { while !stage.home.log().contains("reloaded changed=\"tracing.sample_ratio\"") {} };
    patiently("the reload", reloaded).await;
    collector.of_cycle(&stage.client.run().await.unwrap()).await;
}

// ---------------------------------------------------------------------------------------------------------------
// The collector

#[tokio::test]
async fn while_a_collector_is_away_only_its_spans_are_lost() {
    let collector = Collector::start().await;
    let address = collector.address.to_string();
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    collector.of_cycle(&stage.client.run().await.unwrap()).await;

    collector.stop().await;
    let line = "can't send spans to the collector; they are dropped";
    let logged = async {
        while !stage.home.log().contains(line) {
            assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
        }
    };
    patiently(line, logged).await;

    let collector = Collector::at(&address, true).await;
    let back = async {
        while collector.count() == 0 {
            assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
        }
    };
    patiently("the collector to be found again", back).await;
    let log = stage.home.log();
    assert_eq!(log.matches(line).count(), 1, "{log}");
    let metrics = metrics(&stage).await;
    assert!(metrics["not_taken"] > 0 && metrics["sent"] > 0 && metrics["no_room"] == 0, "{metrics:?}");
    patiently("its return to be logged", async {
        while !stage.home.log().contains("the collector accepts spans again") {}
    })
    .await;
}

/// The counts of spans by their outcome, from the metrics.
async fn metrics(stage: &Stage) -> BTreeMap<String, u64> {
    let text = get(stage.service.admin(), "/metrics").await.text().await;
    let found =
        text.lines().filter_map(|line| line.strip_prefix("orchestrator_spans_total{result=\"")?.split_once("\"} "));
    found.map(|(result, spans)| (result.to_owned(), spans.parse().unwrap())).collect()
}

#[tokio::test]
async fn a_shutdown_sends_the_remaining_spans() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    stage.fleet.run("a", Run::Hold);
    let cycle_id = stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 1).await;
    stage.service.signal(Signal::TERM);
    patiently("the service to drain", async { while !stage.home.log().contains("shutting down") {} }).await;
    stage.fleet.run("a", Run::Echo);
    assert_eq!(stage.service.ended().await.code(), Some(0), "{}", stage.home.log());
    let is_root =
        |span: &Span| span.name == "cycle" && attributes(&span.attributes)["orchestrator.cycle_id"] == cycle_id;
    assert!(collector.seen.borrow().iter().any(|(_, span)| is_root(span)));
    assert!(stage.home.log().contains("drained: everything was finished and recorded"), "{}", stage.home.log());
}

#[tokio::test]
async fn a_collector_that_hangs_does_not_delay_a_shutdown() {
    let collector = Collector::at("127.0.0.1:0", false).await;
    let mut stage = Stage::at(collector.home()).await;
    stage.register("a", |_| {}).await;
    let cycle = stage.client.run().await.unwrap();
    collector.of_cycle(&cycle).await;
    assert_eq!(stage.service.stop().await.code(), Some(0), "{}", stage.home.log());
    let log = stage.home.log();
    assert!(log.contains("the collector did not accept the last spans in time"), "{log}");
}

#[tokio::test]
async fn a_collector_behind_https_is_dialed_with_tls() {
    const HANDSHAKE: u8 = 0x16;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("tracing.otlp_endpoint=https://{}", listener.local_addr().unwrap());
    let mut stage = Stage::at(Home::new().with_args(["--set".to_owned(), endpoint])).await;
    stage.register("a", |_| {}).await;
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    let (mut connection, _) = patiently("the exporter to connect", listener.accept()).await.unwrap();
    assert_eq!(patiently("its first byte", connection.read_u8()).await.unwrap(), HANDSHAKE);
}

#[tokio::test]
async fn an_invalid_endpoint_is_refused() {
    let home =
        Home::new().with_args(["--set", "tracing.otlp_endpoint=localhost:4317", "--set", "tracing.sample_ratio=2"]);
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2));
    let log = home.log();
    assert!(log.contains("tracing.otlp_endpoint is \"localhost:4317\"; give http://host:port"), "{log}");
    assert!(log.contains("tracing.sample_ratio is 2; give a number from 0 to 1"), "{log}");
}

// ---------------------------------------------------------------------------------------------------------------
// Another language

/// Needs the packages of `tests/python/requirements.txt`.
#[tokio::test]
#[ignore = "needs Python packages; .ci/run installs them"]
async fn a_subsystem_in_python_joins_the_trace() {
    let collector = Collector::start().await;
    let mut stage = Stage::at(collector.home()).await;
    let python = Running::python("traced.py", collector.address).await;
    stage.client.register(registration("python", &python.endpoint())).await.unwrap();

    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded, "{}", cycle.error);
    let [ours] = [collector.of_cycle(&cycle).await.calls("python", "RunCycle")[0].clone()];
    // The span of its gRPC server is a child of our call, and the span of its work is a child of that.
    let by_python = |seen: &Seen, name: &str, parent: &[u8]| {
        let is = |span: &Span| {
            span.name.ends_with(name) && span.parent_span_id == parent && hex(&span.trace_id) == cycle.trace_id
        };
        let found = seen.iter().find(|(resource, span)| resource["service.name"] == "python" && is(span));
        found.map(|(_, span)| span.span_id.clone())
    };
    let server = collector.until("the span of its server", |seen| by_python(seen, "RunCycle", &ours.span_id).is_some());
    let server = by_python(&server.await, "RunCycle", &ours.span_id).unwrap();
    collector.until("the span of its work", |seen| by_python(seen, "think", &server).is_some()).await;
    python.kill().await;
}

/// Needs `tests/collector`, built as `otel-collector` in the `PATH`.
#[tokio::test]
#[ignore = "needs OpenTelemetry's Collector; .ci/run builds it"]
async fn the_collector_of_opentelemetry_accepts_a_cycle() {
    let home = Home::new();
    // The Collector does not print its port.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let config = json!({
        "receivers": { "otlp": { "protocols": { "grpc": { "endpoint": address.to_string() } } } },
        "exporters": { "debug": { "verbosity": "detailed" } },
        "service": {
            "telemetry": { "metrics": { "level": "none" } },
            "pipelines": { "traces": { "receivers": ["otlp"], "exporters": ["debug"] } },
        },
    });
    let path = home.path("collector.yaml");
    // JSON is YAML, too.
    fs::write(&path, config.to_string()).unwrap();
    let mut command = Command::new("otel-collector");
    command.arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut collector = command.spawn().unwrap();
    let mut lines = BufReader::new(collector.stderr.take().unwrap()).lines();
    let mut next = async || patiently("a line of the Collector", lines.next_line()).await.unwrap().unwrap();
    while !next().await.contains("Everything is ready") {}

    let home = home.with_args(["--set".to_owned(), format!("tracing.otlp_endpoint=http://{address}")]);
    let mut stage = Stage::at(home).await;
    stage.register_all(&["a", "b"]).await;
    stage.fleet.run("b", Run::fail(Code::Internal));
    let cycle = stage.client.run().await.unwrap();
    let (mut names, mut errors) = (Vec::new(), 0);
    while names.len() < 6 || errors == 0 {
        let line = next().await;
        match line.split_once(": ").map(|(key, value)| (key.trim(), value.trim())) {
            Some(("Trace ID", trace_id)) => assert_eq!(trace_id, cycle.trace_id),
            Some(("Name", name)) => names.push(name.rsplit('/').next().unwrap().to_owned()),
            Some(("Status code", "Error")) => errors += 1,
            _ => {}
        }
    }
    names.sort();
    assert_eq!(names, ["Initialize", "Initialize", "RunCycle", "RunCycle", "commit", "cycle"]);
    collector.kill().await.unwrap();
}
