//! Subsystems that the library serves keep the contract's rules, seen through a real client.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

use crate::common::{
    fleet::{from_struct, to_struct},
    patiently,
    pki::{Authority, Issued},
    service::{Home, registration},
};
use orchestrator_core::{
    proto::{
        orchestrator::v1::{self as core, CycleState, SubsystemState},
        subsystem::v1::{self as pb, subsystem_client::SubsystemClient},
    },
    subsystem::{Answer, Code, Cycle, Failure, Input, ListenError, Object, Server, Serving, Severity, Subsystem, Tls},
};
use rcgen::SanType;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener},
    process::Command,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{
    Code as Status, Request,
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// The events that a probe has seen so far.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    /// Cycles whose work has begun.
    begun: Vec<u64>,
    /// Cycles whose work was stopped.
    stopped: Vec<u64>,
    /// Number of running pieces of its work.
    running: usize,
    /// The parameters of its last initialization.
    initialized: Option<Object>,
    /// True once held work may continue.
    released: bool,
}

/// Follows the parameter `do`, and logs its work.
#[derive(Clone, Default)]
struct Probe(Arc<watch::Sender<Seen>>);

impl Probe {
    fn seen(&self) -> Seen {
        self.0.borrow().clone()
    }

    async fn until(&self, what: &str, holds: impl FnMut(&Seen) -> bool) {
        patiently(what, self.0.subscribe().wait_for(holds)).await.unwrap();
    }

    fn release(&self) {
        self.0.send_modify(|seen| seen.released = true);
    }
}

/// Running work. Unless it is marked as done, it logs that it was stopped.
struct Running {
    probe: Probe,
    cycle_id: u64,
    is_done: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.probe.0.send_modify(|seen| {
            seen.running -= 1;
            if !self.is_done {
                seen.stopped.push(self.cycle_id);
            }
        });
    }
}

impl Subsystem for Probe {
    async fn initialize(&self, parameters: Object) -> Result<(), Failure> {
        self.0.send_modify(|seen| seen.initialized = Some(parameters));
        Ok(())
    }

    async fn run_cycle(&self, cycle: Cycle) -> Result<Answer, Failure> {
        self.0.send_modify(|seen| {
            seen.begun.push(cycle.cycle_id);
            seen.running += 1;
            assert_eq!(seen.running, 1, "overlaps");
        });
        let mut running = Running { probe: self.clone(), cycle_id: cycle.cycle_id, is_done: false };
        match cycle.parameters.get("do").and_then(Value::as_str) {
            Some("hold") => drop(self.0.subscribe().wait_for(|seen| seen.released).await?),
            Some("fail") => {
                running.is_done = true;
                return Err(Failure::new(Code::ResourceExhausted, "no room"));
            }
            Some("panic") => panic!("as requested"),
            _ => {}
        }
        running.is_done = true;
        let mut answer = Answer::default();
        if cycle.parameters.get("do").and_then(Value::as_str) == Some("fill") {
            answer.output("filling", "x".repeat(LARGE));
        }
        answer.output("call", self.seen().begun.len());
        Ok(answer)
    }

    async fn get_status(&self) -> Option<Object> {
        Some(Object::from_iter([("begun".into(), self.seen().begun.into())]))
    }
}

/// A probe that requires initialization.
struct Strict(Probe);

impl Subsystem for Strict {
    const NEEDS_INITIALIZE: bool = true;

    async fn initialize(&self, parameters: Object) -> Result<(), Failure> {
        if parameters.contains_key("refuse") {
            return Err(Failure::new(Code::InvalidArgument, "as requested"));
        }
        self.0.initialize(parameters).await
    }

    async fn run_cycle(&self, cycle: Cycle) -> Result<Answer, Failure> {
        self.0.run_cycle(cycle).await
    }
}

/// A probe that is served as `a`, and a client of it.
async fn served() -> (Probe, Serving, SubsystemClient<Channel>) {
    let probe = Probe::default();
    let serving = Server::new().subsystem("a", probe.clone()).listen("127.0.0.1:0").await.unwrap();
    let client = client(&serving).await;
    (probe, serving, client)
}

async fn client(serving: &Serving) -> SubsystemClient<Channel> {
    SubsystemClient::new(channel(serving).await)
}

async fn channel(serving: &Serving) -> Channel {
    Endpoint::from_shared(serving.endpoint().to_owned()).unwrap().connect().await.unwrap()
}

fn call(subsystem: &str, cycle_id: u64, what: &str) -> pb::RunCycleRequest {
    let parameters = to_struct(&json!({ "do": what }));
    pb::RunCycleRequest {
        subsystem: subsystem.into(),
        cycle_id,
        epoch: 1,
        parameters,
        ..pb::RunCycleRequest::default()
    }
}

fn initialize(subsystem: &str, epoch: u64, parameters: &Value) -> pb::InitializeRequest {
    pb::InitializeRequest {
        subsystem: subsystem.into(),
        epoch,
        parameters: to_struct(parameters),
        ..pb::InitializeRequest::default()
    }
}

type Called = Result<Value, tonic::Status>;

/// Calls, and reads the output.
async fn run(client: &SubsystemClient<Channel>, request: impl tonic::IntoRequest<pb::RunCycleRequest>) -> Called {
    client.clone().run_cycle(request).await.map(|answer| from_struct(&answer.into_inner().output))
}

fn start(client: &SubsystemClient<Channel>, request: pb::RunCycleRequest) -> JoinHandle<Called> {
    let client = client.clone();
    tokio::spawn(async move { run(&client, request).await })
}

#[tokio::test]
async fn a_repeated_call_receives_the_first_answer() {
    let (probe, _serving, mut client) = served().await;
    for cycle_id in 1..=3 {
        assert_eq!(run(&client, call("a", cycle_id, "")).await.unwrap(), json!({ "call": cycle_id }));
    }
    client.initialize(initialize("a", 1, &json!({ "other": 1 }))).await.unwrap();
    let repeated = pb::RunCycleRequest { attempt: 2, ..call("a", 3, "fail") };
    assert_eq!(run(&client, repeated).await.unwrap(), json!({ "call": 3 }));
    assert_eq!(run(&client, call("a", 2, "")).await.unwrap(), json!({ "call": 2 }));
    assert_eq!(probe.seen().begun, [1, 2, 3]);
    // Memory is bounded: old answers are forgotten.
    for cycle_id in 4..=10 {
        run(&client, call("a", cycle_id, "")).await.unwrap();
    }
    assert_eq!(run(&client, call("a", 1, "")).await.unwrap(), json!({ "call": 11 }));
}

#[tokio::test]
async fn a_repeated_call_waits_for_the_first_one() {
    let (probe, _serving, client) = served().await;
    let calls: Vec<_> = (0..3).map(|_| start(&client, call("a", 1, "hold"))).collect();
    probe.until("the work to begin", |seen| seen.running == 1).await;
    // One of the callers may leave: the others still wait.
    calls[0].abort();
    let others = calls.into_iter().skip(1);
    client.clone().get_status(pb::GetStatusRequest { subsystem: "a".into() }).await.unwrap();
    probe.release();
    for call in others {
        assert_eq!(call.await.unwrap().unwrap(), json!({ "call": 1 }));
    }
    assert_eq!(probe.seen().begun, [1]);
}

/// Bytes that take more than a moment to be decoded or encoded, and fit into the initial window.
const LARGE: usize = 300 << 10;

#[test]
fn large_messages_delay_no_other_calls() {
    // The runtime has one thread for long work, and one for all other work.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().max_blocking_threads(1).build().unwrap().block_on(async {
        let (probe, _serving, client) = served().await;
        let output = to_struct(&json!({ "filling": "x".repeat(LARGE) }));
        let input = pb::Input { output, freshness: pb::Freshness::Fresh.into(), cycle_id: 1 };
        let large_inputs = pb::RunCycleRequest { inputs: [("b".into(), input)].into(), ..call("a", 1, "") };
        for (request, begins) in [(large_inputs, false), (call("a", 2, "fill"), true)] {
            let (release, held) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || held.recv());
            let cycle_id = request.cycle_id;
            let large = start(&client, request);
            // The large message has arrived when the last call is answered: they use one connection.
            for _ in 0..3 {
                client.clone().get_status(pb::GetStatusRequest { subsystem: "a".into() }).await.unwrap();
            }
            assert_eq!((probe.seen().begun.contains(&cycle_id), large.is_finished()), (begins, false));
            drop(release);
            busy.await.unwrap().unwrap_err();
            assert_eq!(large.await.unwrap().unwrap()["call"], cycle_id);
        }
    });
}

#[tokio::test]
async fn a_failure_is_not_an_answer_and_may_be_retried() {
    let (_probe, _serving, client) = served().await;
    let failure = run(&client, call("a", 1, "fail")).await.unwrap_err();
    assert_eq!((failure.code(), failure.message()), (Status::ResourceExhausted, "no room"));
    assert_eq!(run(&client, call("a", 1, "")).await.unwrap(), json!({ "call": 2 }));
}

#[tokio::test]
async fn an_older_epoch_is_refused_and_a_newer_one_starts_afresh() {
    let (probe, _serving, mut client) = served().await;
    let of_epoch = |epoch, cycle_id, what| pb::RunCycleRequest { epoch, ..call("a", cycle_id, what) };
    run(&client, of_epoch(2, 7, "")).await.unwrap();
    assert_eq!(run(&client, of_epoch(1, 8, "")).await.unwrap_err().code(), Status::Aborted);
    assert_eq!(client.initialize(initialize("a", 1, &json!({}))).await.unwrap_err().code(), Status::Aborted);
    let old = start(&client, of_epoch(2, 8, "hold"));
    probe.until("the work to begin", |seen| seen.running == 1).await;
    client.initialize(initialize("a", 3, &json!({}))).await.unwrap();
    assert_eq!(old.await.unwrap().unwrap_err().code(), Status::Cancelled);
    assert_eq!(probe.seen().stopped, [8]);
    assert_eq!(run(&client, of_epoch(2, 9, "")).await.unwrap_err().code(), Status::Aborted);
    assert_eq!(run(&client, of_epoch(3, 9, "")).await.unwrap(), json!({ "call": 3 }));
}

#[tokio::test]
async fn a_name_that_is_not_served_is_not_found() {
    let (probe, _serving, mut client) = served().await;
    let status = run(&client, call("b", 1, "")).await.unwrap_err();
    assert_eq!(status.code(), Status::NotFound);
    assert!(status.message().contains("\"b\""), "{status}");
    assert_eq!(client.initialize(initialize("", 1, &json!({}))).await.unwrap_err().code(), Status::NotFound);
    let status = client.get_status(pb::GetStatusRequest { subsystem: "A".into() }).await.unwrap_err();
    assert_eq!(status.code(), Status::NotFound);
    let status = run(&client, call(&"\u{1}".repeat(5000), 1, "")).await.unwrap_err();
    assert_eq!(status.code(), Status::NotFound, "{status}");
    assert_eq!(probe.seen(), Seen::default());
}

#[tokio::test]
async fn a_subsystem_that_needs_initialization_asks_for_it() {
    let probe = Probe::default();
    let serving = Server::new().subsystem("a", Strict(probe.clone())).listen("127.0.0.1:0").await.unwrap();
    let mut client = client(&serving).await;
    assert_eq!(run(&client, call("a", 1, "")).await.unwrap_err().code(), Status::FailedPrecondition);
    let refused = client.initialize(initialize("a", 1, &json!({ "refuse": true }))).await.unwrap_err();
    assert_eq!(refused.code(), Status::InvalidArgument);
    assert_eq!(run(&client, call("a", 1, "")).await.unwrap_err().code(), Status::FailedPrecondition);
    for parameters in [json!({ "n": 1 }), json!({ "n": 2 })] {
        client.initialize(initialize("a", 1, &parameters)).await.unwrap();
        assert_eq!(probe.seen().initialized.map(Value::from), Some(parameters));
    }
    run(&client, call("a", 1, "")).await.unwrap();
    // It has no status.
    let status = client.get_status(pb::GetStatusRequest { subsystem: "a".into() }).await.unwrap_err();
    assert_eq!(status.code(), Status::Unimplemented);
}

#[tokio::test]
async fn initialization_waits_for_running_work() {
    let (probe, _serving, client) = served().await;
    let held = start(&client, call("a", 1, "hold"));
    probe.until("the work to begin", |seen| seen.running == 1).await;
    let mut initializing = client.clone();
    let initialized = tokio::spawn(async move { initializing.initialize(initialize("a", 1, &json!({}))).await });
    // Both have arrived when the second is answered: they use one connection.
    for _ in 0..2 {
        client.clone().get_status(pb::GetStatusRequest { subsystem: "a".into() }).await.unwrap();
    }
    assert_eq!((probe.seen().running, probe.seen().initialized), (1, None));
    probe.release();
    initialized.await.unwrap().unwrap();
    assert_eq!(held.await.unwrap().unwrap(), json!({ "call": 1 }));
    assert!(probe.seen().initialized.is_some());
}

#[tokio::test]
async fn a_panic_ends_only_its_own_call() {
    let quiet = Probe::default();
    let server = Server::new().subsystem("a", Probe::default()).subsystem("quiet", quiet.clone());
    let serving = server.listen("127.0.0.1:0").await.unwrap();
    let client = client(&serving).await;
    let other = start(&client, call("quiet", 1, "hold"));
    quiet.until("the other's work to begin", |seen| seen.running == 1).await;
    let panicked = run(&client, call("a", 1, "panic")).await.unwrap_err();
    assert_eq!((panicked.code(), panicked.message()), (Status::Internal, "it panicked: as requested"));
    assert_eq!(run(&client, call("a", 1, "")).await.unwrap(), json!({ "call": 2 }));
    quiet.release();
    assert_eq!(other.await.unwrap().unwrap(), json!({ "call": 1 }));
}

#[tokio::test]
async fn work_stops_when_its_caller_cancels() {
    let (probe, _serving, client) = served().await;
    let cancelled = start(&client, call("a", 1, "hold"));
    probe.until("the work to begin", |seen| seen.running == 1).await;
    cancelled.abort();
    probe.until("the work to stop", |seen| seen.stopped == [1]).await;
}

/// A client whose connection breaks on request.
struct Breakable {
    client: SubsystemClient<Channel>,
    cut: oneshot::Sender<()>,
    proxy: JoinHandle<()>,
}

impl Breakable {
    async fn to(serving: &Serving) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = serving.endpoint().strip_prefix("http://").unwrap().to_owned();
        let (cut, cut_off) = oneshot::channel();
        let proxy = tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(server).await.unwrap();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                _ = cut_off => {}
            }
            // The server sees only the end of the stream, and has seen it when it closes its side.
            far.shutdown().await.unwrap();
            far.read_to_end(&mut Vec::new()).await.unwrap();
        });
        Self { client: SubsystemClient::connect(address).await.unwrap(), cut, proxy }
    }

    async fn cut(self) {
        self.cut.send(()).unwrap();
        patiently("the server to see that the connection broke", self.proxy).await.unwrap();
    }
}

#[tokio::test]
async fn work_outlives_its_connection_for_the_retry() {
    let (probe, serving, client) = served().await;
    let breakable = Breakable::to(&serving).await;
    let first = start(&breakable.client, call("a", 1, "hold"));
    probe.until("the work to begin", |seen| seen.running == 1).await;
    breakable.cut().await;
    first.await.unwrap().unwrap_err();
    let retry = start(&client, pb::RunCycleRequest { attempt: 2, ..call("a", 1, "hold") });
    // The retry gets the answer whether it comes before the end of the work or after it.
    probe.release();
    assert_eq!(retry.await.unwrap().unwrap(), json!({ "call": 1 }));
    assert_eq!((probe.seen().begun, probe.seen().stopped), (vec![1], vec![]));
}

#[tokio::test]
async fn work_stops_at_its_deadline_with_or_without_its_caller() {
    /// Time enough for the work to begin.
    const DEADLINE: Duration = Duration::from_millis(300);
    let (probe, serving, client) = served().await;
    let within = |cycle_id| {
        let mut request = Request::new(call("a", cycle_id, "hold"));
        request.set_timeout(DEADLINE);
        request
    };
    run(&client, within(1)).await.unwrap_err();
    probe.until("the work to stop", |seen| seen.stopped == [1]).await;

    let breakable = Breakable::to(&serving).await;
    let of_breakable = breakable.client.clone();
    let call = tokio::spawn(async move { run(&of_breakable, within(2)).await });
    probe.until("the work to begin", |seen| seen.begun == [1, 2]).await;
    breakable.cut().await;
    call.await.unwrap().unwrap_err();
    probe.until("the work to stop", |seen| seen.stopped == [1, 2]).await;
}

#[tokio::test]
async fn a_later_cycle_ends_the_earlier_one() {
    let (probe, _serving, client) = served().await;
    let earlier = start(&client, call("a", 1, "hold"));
    probe.until("the work to begin", |seen| seen.begun == [1]).await;
    let later = start(&client, call("a", 2, "hold"));
    probe.until("the later work to begin", |seen| seen.begun == [1, 2]).await;
    assert_eq!(earlier.await.unwrap().unwrap_err().code(), Status::Cancelled);
    // An earlier cycle does not end a later one.
    assert_eq!(run(&client, call("a", 1, "")).await.unwrap_err().code(), Status::Aborted);
    probe.release();
    assert_eq!(later.await.unwrap().unwrap(), json!({ "call": 2 }));
    assert_eq!(probe.seen().stopped, [1]);
}

#[tokio::test]
async fn stopping_lets_calls_finish_within_the_grace() {
    let (probe, serving, client) = served().await;
    let endpoint = serving.endpoint().to_owned();
    let call_that_runs = start(&client, call("a", 1, "hold"));
    probe.until("the work to begin", |seen| seen.running == 1).await;
    let stopping = tokio::spawn(serving.stop(Duration::from_mins(1)));
    // It no longer listens, while the call still runs.
    let refused = async { while SubsystemClient::connect(endpoint.clone()).await.is_ok() {} };
    patiently("the port to close", refused).await;
    assert_eq!(probe.seen().running, 1);
    probe.release();
    assert_eq!(call_that_runs.await.unwrap().unwrap(), json!({ "call": 1 }));
    patiently("the end", stopping).await.unwrap();

    let (probe, serving, client) = served().await;
    let call_that_hangs = start(&client, call("a", 1, "hold"));
    probe.until("the work to begin", |seen| seen.running == 1).await;
    serving.stop(Duration::ZERO).await;
    call_that_hangs.await.unwrap().unwrap_err();
    probe.until("the work to stop", |seen| seen.stopped == [1]).await;
}

#[tokio::test]
async fn health_and_reflection_are_served_beside_subsystems() {
    let (probe, serving, client) = served().await;
    let channel = channel(&serving).await;
    let mut health = HealthClient::new(channel.clone());
    let request = |service: &str| HealthCheckRequest { service: service.into() };
    let mut of_subsystems = health.watch(request("dreamnet.subsystem.v1.Subsystem")).await.unwrap().into_inner();
    let mut is_now = async || of_subsystems.message().await.unwrap().unwrap().status();
    assert_eq!(is_now().await, ServingStatus::Serving);
    assert_eq!(health.check(request("")).await.unwrap().into_inner().status(), ServingStatus::Serving);

    let list = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers = reflection.server_reflection_info(tokio_stream::once(list)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(listed)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services")
    };
    assert!(listed.service.iter().any(|service| service.name == "dreamnet.subsystem.v1.Subsystem"), "{listed:?}");

    let held = start(&client, call("a", 1, "hold"));
    probe.until("the work to begin", |seen| seen.running == 1).await;
    let stopping = tokio::spawn(serving.stop(Duration::from_mins(1)));
    assert_eq!(is_now().await, ServingStatus::NotServing);
    probe.release();
    held.await.unwrap().unwrap();
    // The watch is still open, and delays no call.
    patiently("the end", stopping).await.unwrap();
}

#[tokio::test]
async fn many_subsystems_run_at_the_same_time_behind_one_endpoint() {
    let probes: Vec<_> = (0..100).map(|i| (format!("s{i}"), Probe::default())).collect();
    let server = probes.iter().fold(Server::new(), |server, (name, probe)| server.subsystem(name, probe.clone()));
    let serving = server.listen("127.0.0.1:0").await.unwrap();
    let client = client(&serving).await;
    let calls: Vec<_> = probes.iter().map(|(name, _)| start(&client, call(name, 1, "hold"))).collect();
    for (_, probe) in &probes {
        probe.until("all to run at once", |seen| seen.running == 1).await;
    }
    for ((_, probe), call) in probes.iter().zip(calls) {
        probe.release();
        assert_eq!(call.await.unwrap().unwrap(), json!({ "call": 1 }));
    }
}

#[tokio::test]
async fn invalid_subsystems_and_addresses_are_refused() {
    let refused = |server: Server, address: &'static str| async move {
        server.listen(address).await.err().unwrap_or_else(|| panic!("{address} is listened on"))
    };
    let error = refused(Server::new().subsystem("not a name", Probe::default()), "127.0.0.1:0").await;
    assert!(matches!(error, ListenError::Name(_)), "{error}");
    let twice = Server::new().subsystem("a", Probe::default()).subsystem("a", Probe::default());
    assert!(matches!(refused(twice, "127.0.0.1:0").await, ListenError::SameName(_)));
    assert!(matches!(refused(Server::new(), "nowhere").await, ListenError::Address(..)));
}

#[tokio::test]
async fn a_socket_is_served_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.sock");
    let address = format!("unix:{}", path.display());
    // A killed process leaves this file.
    drop(UnixListener::bind(&path).unwrap());
    let serving = Server::new().subsystem("a", Probe::default()).listen(&address).await.unwrap();
    assert_eq!(serving.endpoint(), address);
    assert_eq!(run(&client(&serving).await, call("a", 1, "")).await.unwrap(), json!({ "call": 1 }));
    let second = Server::new().subsystem("a", Probe::default()).listen(&address).await;
    assert!(matches!(second.err(), Some(ListenError::Address(..))));
    serving.stop(Duration::from_mins(1)).await;
    assert!(!path.exists());
}

const ORCHESTRATOR: &str = "spiffe://fleet/core";

/// TLS with new files in a directory, and who has signed its certificate and those of its clients.
fn tls_in(directory: &Path) -> (Authority, Tls) {
    let authority = Authority::new("fleet");
    let (certificate, key) = authority.service().write(directory, "own");
    let authorities = authority.write(directory.join("ca.pem"));
    (authority, Tls { certificate, key, authorities, caller: ORCHESTRATOR.into() })
}

/// What a client with this TLS gets for a call.
async fn ran_over(serving: &Serving, tls: ClientTlsConfig) -> Result<Value, tonic::Status> {
    let endpoint = Endpoint::from_shared(serving.endpoint().to_owned()).unwrap().tls_config(tls).unwrap();
    run(&SubsystemClient::new(endpoint.connect_lazy()), call("a", 1, "")).await
}

#[tokio::test]
async fn with_tls_only_the_orchestrator_may_call() {
    let dir = tempfile::tempdir().unwrap();
    let (authority, tls) = tls_in(dir.path());
    let probe = Probe::default();
    let serving = Server::new().subsystem("a", probe.clone()).tls(tls).listen("127.0.0.1:0").await.unwrap();
    assert!(serving.endpoint().starts_with("https://127.0.0.1:"), "{}", serving.endpoint());
    let of = |issued: &Issued| authority.trusted().identity(issued.identity());
    let two = authority.service_with(|it| {
        it.subject_alt_names = ["spiffe://fleet/a", ORCHESTRATOR].map(|it| SanType::URI(it.try_into().unwrap())).into();
    });
    let foreign = Authority::new("fleet").client(ORCHESTRATOR);
    for (what, tls, reason) in [
        ("another subsystem", of(&authority.client("spiffe://fleet/a")), "only spiffe://fleet/core may call"),
        ("a certificate without a URI", of(&authority.service()), "only spiffe://fleet/core may call"),
        ("a certificate with two", of(&two), "only spiffe://fleet/core may call"),
        ("another authority", of(&foreign), ""),
        ("no certificate", authority.trusted(), ""),
    ] {
        let refused = ran_over(&serving, tls).await.unwrap_err();
        assert!(format!("{refused:?}").contains(reason), "{what}: {refused:?}");
    }
    let plain = Endpoint::from_shared(serving.endpoint().replace("https", "http")).unwrap().connect_lazy();
    run(&SubsystemClient::new(plain), call("a", 1, "")).await.unwrap_err();
    assert_eq!(probe.seen(), Seen::default());
    let answer = ran_over(&serving, of(&authority.client(ORCHESTRATOR))).await.unwrap();
    assert_eq!(answer, json!({ "call": 1 }));
}

#[tokio::test]
async fn new_connections_use_the_files_of_tls_as_they_are_if_they_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let (authority, tls) = tls_in(dir.path());
    let serving = Server::new().subsystem("a", Probe::default()).tls(tls.clone()).listen("127.0.0.1:0").await.unwrap();
    let orchestrator = authority.client(ORCHESTRATOR).identity();
    let earlier = authority.trusted().identity(orchestrator.clone());
    // The server shows a certificate of a new authority, and still trusts its clients by the earlier one.
    let renewed = Authority::new("renewed");
    let later = renewed.trusted().identity(orchestrator);
    ran_over(&serving, later.clone()).await.unwrap_err();
    fs::write(&tls.certificate, "nonsense").unwrap();
    ran_over(&serving, earlier.clone()).await.unwrap();
    renewed.service().write(dir.path(), "own");
    patiently("the new certificate", async { while ran_over(&serving, later.clone()).await.is_err() {} }).await;
    ran_over(&serving, earlier).await.unwrap_err();
}

#[tokio::test]
async fn files_of_tls_that_can_not_be_used_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, tls) = tls_in(dir.path());
    let listen = async |tls: Tls, address: &str| {
        let served = Server::new().subsystem("a", Probe::default()).tls(tls).listen(address).await;
        served.err().unwrap().to_string()
    };
    let at_socket = format!("unix:{}", dir.path().join("a.sock").display());
    assert_eq!(listen(tls.clone(), &at_socket).await, format!("TLS: there is none at {at_socket}; give HOST:PORT"));
    let missing = Tls { key: dir.path().join("missing"), ..tls.clone() };
    let refused = listen(missing, "127.0.0.1:0").await;
    assert!(refused.contains("missing can't be read"), "{refused}");
    fs::set_permissions(&tls.key, Permissions::from_mode(0o644)).unwrap();
    let refused = listen(tls, "127.0.0.1:0").await;
    assert!(refused.contains("own.key has mode 0644"), "{refused}");
}

#[tokio::test]
async fn payloads_that_break_the_contract_are_refused() {
    let deep = |_: Cycle| async {
        let nested = (0..40).fold(json!(1), |inner, _| json!({ "in": inner }));
        let mut answer = Answer::default();
        answer.output("deep", nested);
        Ok::<_, Failure>(answer)
    };
    let serving = Server::new().subsystem("deep", deep).listen("127.0.0.1:0").await.unwrap();
    let client = client(&serving).await;
    let status = run(&client, call("deep", 1, "")).await.unwrap_err();
    assert_eq!(status.code(), Status::Internal);
    assert!(status.message().starts_with("its output nests"), "{status}");
    let malformed =
        pb::RunCycleRequest { parameters: b"\x0a\x05not a struct".as_slice().into(), ..call("deep", 1, "") };
    assert_eq!(run(&client, malformed).await.unwrap_err().code(), Status::InvalidArgument);
}

#[tokio::test]
async fn a_subsystem_in_rust_passes_the_conformance_check() {
    let serving = Server::new().subsystem("a", Strict(Probe::default())).subsystem("b", Strict(Probe::default()));
    let serving = serving.listen("127.0.0.1:0").await.unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command
        .args(["conformance", serving.endpoint(), "--strict", "--subsystem", "a", "--subsystem", "b"])
        .kill_on_drop(true);
    let output = patiently("the conformance check", command.output()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Passes its inputs on, and reports them as issues.
async fn relay(cycle: Cycle) -> Result<Answer, Failure> {
    let mut answer = Answer::default();
    for (name, input) in &cycle.inputs {
        let (code, of) = match input {
            Input::Fresh(_) => ("FRESH", cycle.cycle_id),
            Input::Stale { cycle_id, .. } => ("STALE", *cycle_id),
            Input::Absent => ("ABSENT", 0),
        };
        answer.issue(Severity::Info, code, format!("{name} of cycle {of}"));
        if let Some(output) = input.output() {
            answer.output(name, output.clone());
        }
    }
    answer.metric("inputs", [0.0, 1.0, 2.0, 3.0][cycle.inputs.len()]);
    answer.output("has_time_left", cycle.deadline.is_some() && cycle.scheduled_at.is_some());
    Ok(answer)
}

#[tokio::test]
async fn a_subsystem_in_rust_takes_part_in_a_real_cycle() {
    let source = Probe::default();
    let server = Server::new().subsystem("source", Strict(source.clone())).subsystem("relay", relay);
    let serving = server.listen("127.0.0.1:0").await.unwrap();
    let home = Home::new();
    let service = home.serve().await;
    let mut client = service.client().await;
    let parameters = to_struct(&json!({ "do": "" }));
    client.register(core::Registration { parameters, ..registration("source", serving.endpoint()) }).await.unwrap();
    let relay = core::Registration {
        after: vec!["source".into()],
        reads: vec!["relay".into(), "nobody".into()],
        record_output: true,
        ..registration("relay", serving.endpoint())
    };
    client.register(relay).await.unwrap();

    for (cycle_id, relays) in [(1, "ABSENT: relay of cycle 0"), (2, "STALE: relay of cycle 1")] {
        let cycle = client.run().await.unwrap();
        assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");
        let part = cycle.subsystems.iter().find(|part| part.name == "relay").unwrap();
        let issues: Vec<_> = part.issues.iter().map(|issue| format!("{}: {}", issue.code, issue.message)).collect();
        let sources = format!("FRESH: source of cycle {cycle_id}");
        assert_eq!(issues, ["ABSENT: nobody of cycle 0", relays, &sources]);
        assert_eq!(from_struct(&part.output)["source"], json!({ "call": cycle_id }));
        assert_eq!(from_struct(&part.output)["has_time_left"], true);
        assert_eq!((part.attempts, part.metrics["inputs"]), (1, 3.0));
    }
    assert_eq!(source.seen().initialized.map(Value::from), Some(json!({ "do": "" })));

    let failing = to_struct(&json!({ "do": "panic" }));
    let cycle = client.run_with(core::RunCycleRequest { parameters: failing, ..Default::default() }).await.unwrap();
    let [source, relay] = &cycle.subsystems[..] else { panic!("{cycle:?}") };
    assert_eq!((source.state(), source.error_code.as_str()), (SubsystemState::Failed, "INTERNAL"));
    assert_eq!(relay.state(), SubsystemState::Succeeded);
    serving.stop(Duration::from_mins(1)).await;
}
