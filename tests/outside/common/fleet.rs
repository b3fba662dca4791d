//! A scripted fleet: any number of fake subsystems behind a few endpoints, each with a script that can be changed while
//! it runs, and a log of all calls.
//!
//! It does not use `orchestrator_core::subsystem`, which enforces the contract: a fake must be able to break it, down
//! to the bytes, and must log all calls, including those that the library would answer from memory.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http_body_util::{BodyExt, Full};
use orchestrator_core::{
    model::Payload,
    proto::subsystem::v1::{
        self as pb,
        subsystem_server::{Subsystem, SubsystemServer},
    },
};
use prost::Message;
use prost_types::Timestamp;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener},
    sync::watch,
    task::JoinSet,
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codec::CompressionEncoding,
    codegen::http,
    transport::{
        Identity, ServerTlsConfig,
        server::{Connected, Server, TlsConnectInfo},
    },
};
use tower::util::MapResponseLayer;

use super::patiently;

// ---------------------------------------------------------------------------------------------------------------
// Scripts

/// The behaviour of a fake subsystem. By default it needs no initialization and always succeeds.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// The behaviour of `Initialize`.
    pub initialize: Initialize,
    /// `RunCycle` answers FAILED_PRECONDITION until `Initialize` has been called.
    pub needs_initialize: bool,
    /// The behaviour of `RunCycle`.
    pub run: Run,
}

/// The behaviour of `Initialize`.
#[derive(Clone, Debug, Default)]
pub enum Initialize {
    /// Succeeds.
    #[default]
    Succeed,
    /// Is not implemented.
    Unimplemented,
    /// Fails.
    Fail(Code),
}

/// The behaviour of `RunCycle`.
#[derive(Clone, Debug, Default)]
pub enum Run {
    /// Succeeds with an output that names the subsystem as `by` and the cycle as `cycle`.
    #[default]
    Echo,
    /// Succeeds with this answer, which may break the contract.
    Answer(pb::RunCycleResponse),
    /// Fails.
    Fail(Code, String),
    /// Never answers.
    Hang,
    /// Waits until the script is changed, and then follows the new one.
    Hold,
    /// Behaves as the other one does, after this delay.
    Late(Duration, Box<Run>),
    /// Answers with a message of these bytes, which need not be well-formed.
    Raw(Bytes),
    /// Announces a longer message than it sends.
    Truncated,
    /// Closes the connection in the middle of the call.
    Disconnect,
}

impl Run {
    /// Succeeds with this output.
    pub fn output(output: &Value) -> Self {
        Self::Answer(pb::RunCycleResponse { output: to_struct(output), ..pb::RunCycleResponse::default() })
    }

    /// Answers with an output that is not a `Struct`.
    pub fn malformed_output() -> Self {
        let output = Bytes::from_static(b"\x0a\x05not a struct");
        Self::Answer(pb::RunCycleResponse { output, ..pb::RunCycleResponse::default() })
    }

    /// Answers with a well-formed output of at least this number of bytes.
    pub fn large_output(bytes: usize) -> Self {
        Self::output(&json!({ "large": "x".repeat(bytes) }))
    }

    /// Answers with this number of metrics.
    pub fn metrics(count: usize) -> Self {
        let metrics = (0..count).map(|i| (format!("metric_{i}"), 1.0)).collect();
        Self::Answer(pb::RunCycleResponse { metrics, ..pb::RunCycleResponse::default() })
    }

    /// Answers with this number of issues.
    pub fn issues(count: usize) -> Self {
        let issue = pb::Issue { severity: pb::Severity::Warning.into(), code: "CODE".into(), message: "text".into() };
        Self::Answer(pb::RunCycleResponse { issues: vec![issue; count], ..pb::RunCycleResponse::default() })
    }

    /// Fails with this code.
    pub fn fail(code: Code) -> Self {
        Self::Fail(code, "as scripted".into())
    }
}

/// A JSON object as the encoding of a `Struct`.
pub fn to_struct(object: &Value) -> Bytes {
    Payload::from_json(object.as_object().unwrap()).unwrap().as_bytes().clone()
}

/// The JSON object of an encoded `Struct`.
pub fn from_struct(bytes: &Bytes) -> Value {
    Payload::check(bytes.clone()).unwrap().to_json().into()
}

// ---------------------------------------------------------------------------------------------------------------
// The log

/// A received call.
#[derive(Clone, Debug)]
pub struct Call {
    /// The RPC.
    pub method: Method,
    /// The called subsystem.
    pub subsystem: String,
    /// The cycle; 0 where the RPC has none.
    pub cycle_id: u64,
    /// The epoch; 0 where the RPC has none.
    pub epoch: u64,
    /// The attempt; 0 where the RPC has none.
    pub attempt: u32,
    /// The timeout of the caller.
    pub timeout: Option<Duration>,
    /// `traceparent` and `tracestate`, if they were sent.
    pub trace: [Option<String>; 2],
    /// `orchestrator-path`, if it was sent.
    pub path: Option<String>,
    /// The orchestrator's id; empty where the RPC has none.
    pub orchestrator_id: String,
    /// When the cycle was due, if the RPC contains it.
    pub scheduled_at: Option<Timestamp>,
    /// The parameters.
    pub parameters: Value,
    /// The inputs.
    pub inputs: BTreeMap<String, SeenInput>,
    /// The certificate that the caller has shown, in DER, if the RPC is `RunCycle`.
    pub certificate: Option<Vec<u8>>,
    /// Its position among all starts and ends of calls of this fleet.
    pub began: u64,
    /// Its end and the position of that; `None` while it runs.
    pub ended: Option<(u64, End)>,
}

/// An RPC of a subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the contract defines them")]
pub enum Method {
    Initialize,
    RunCycle,
    GetStatus,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was answered with this code.
    Answered(Code),
    /// Its caller cancelled it or went away.
    Dropped,
}

/// A received input.
#[derive(Clone, Debug, PartialEq)]
pub struct SeenInput {
    /// Its freshness.
    pub freshness: pb::Freshness,
    /// The cycle that produced it.
    pub cycle_id: u64,
    /// The output.
    pub output: Value,
}

/// The state of a fleet, for conditions of [`Fleet::until`].
#[derive(Default)]
pub struct State {
    default: Script,
    fakes: HashMap<String, Fake>,
    /// All calls, in the order of their starts.
    pub calls: Vec<Call>,
    positions: u64,
    /// Number of open connections.
    pub connections: usize,
    /// Number of calls whose epoch is older than one that the same subsystem has already seen.
    pub stale_calls: usize,
}

#[derive(Default)]
struct Fake {
    script: Option<Script>,
    epoch: u64,
    initialized: bool,
}

impl State {
    fn script(&self, name: &str) -> &Script {
        self.fakes.get(name).and_then(|fake| fake.script.as_ref()).unwrap_or(&self.default)
    }

    fn next_position(&mut self) -> u64 {
        self.positions += 1;
        self.positions
    }

    /// The calls of `RunCycle` of a subsystem.
    pub fn runs<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Call> {
        self.calls.iter().filter(move |call| call.method == Method::RunCycle && call.subsystem == name)
    }

    /// The calls of `Initialize` of a subsystem.
    pub fn initializations<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Call> {
        self.calls.iter().filter(move |call| call.method == Method::Initialize && call.subsystem == name)
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The fleet

/// A running fleet. It stops when it is dropped.
pub struct Fleet {
    endpoints: Vec<String>,
    state: Arc<watch::Sender<State>>,
    servers: JoinSet<()>,
    compresses: bool,
}

impl Fleet {
    /// A fleet behind one endpoint.
    pub async fn start() -> Self {
        Self::behind(1).await
    }

    /// A fleet behind one endpoint, which compresses its answers if its caller accepts that.
    pub async fn that_compresses() -> Self {
        Self { compresses: true, ..Self::unserved() }.with_endpoints(1).await
    }

    /// A fleet behind this number of endpoints, each of which serves every name.
    pub async fn behind(endpoints: usize) -> Self {
        Self::unserved().with_endpoints(endpoints).await
    }

    async fn with_endpoints(mut self, endpoints: usize) -> Self {
        for _ in 0..endpoints {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            self.endpoints.push(format!("http://{}", listener.local_addr().unwrap()));
            let incoming = TcpListenerStream::new(listener).map(|stream| {
                stream.and_then(|stream| {
                    stream.set_nodelay(true)?;
                    Ok(stream)
                })
            });
            self.serve(incoming, None);
        }
        self
    }

    /// A fleet behind a Unix socket at this path.
    pub fn at_socket(path: &Path) -> Self {
        let mut fleet = Self::unserved();
        fleet.endpoints.push(format!("unix:{}", path.display()));
        fleet.serve(UnixListenerStream::new(UnixListener::bind(path).unwrap()), None);
        fleet
    }

    /// A fleet behind TLS, which shows this certificate.
    pub async fn behind_tls(identity: Identity) -> Self {
        Self::behind_tls_with(ServerTlsConfig::new().identity(identity)).await
    }

    /// A fleet behind this TLS.
    pub async fn behind_tls_with(tls: ServerTlsConfig) -> Self {
        let mut fleet = Self::unserved();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        fleet.endpoints.push(format!("https://{}", listener.local_addr().unwrap()));
        fleet.serve(TcpListenerStream::new(listener), Some(tls));
        fleet
    }

    fn unserved() -> Self {
        let state = Arc::new(watch::Sender::new(State::default()));
        Self { endpoints: Vec::new(), state, servers: JoinSet::new(), compresses: false }
    }

    fn serve<S>(&mut self, incoming: impl Stream<Item = io::Result<S>> + Send + 'static, tls: Option<ServerTlsConfig>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let state = self.state.clone();
        let counted = self.state.clone();
        let incoming = incoming.map(move |stream| stream.map(|stream| Connection::new(stream, counted.clone())));
        let mut service = SubsystemServer::new(FakeService { state })
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX);
        if self.compresses {
            service = service.send_compressed(CompressionEncoding::Gzip);
        }
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        let server = server.layer(MapResponseLayer::new(spoil)).add_service(service);
        self.servers.spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    }

    /// The first endpoint.
    pub fn endpoint(&self) -> &str {
        &self.endpoints[0]
    }

    /// All endpoints.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// Changes the script of one subsystem, also for a held call.
    pub fn script(&self, name: &str, change: impl FnOnce(&mut Script)) {
        self.state.send_modify(|state| {
            let mut script = state.script(name).clone();
            change(&mut script);
            state.fakes.entry(name.to_owned()).or_default().script = Some(script);
        });
    }

    /// Changes the behaviour of one subsystem's `RunCycle`.
    pub fn run(&self, name: &str, run: Run) {
        self.script(name, |script| script.run = run);
    }

    /// Changes the script of all subsystems without one of their own.
    pub fn default_script(&self, script: Script) {
        self.state.send_modify(|state| state.default = script);
    }

    /// Makes a subsystem forget that it was initialized, as if it had been restarted.
    pub fn forget_initialization(&self, name: &str) {
        self.state.send_modify(|state| state.fakes.entry(name.to_owned()).or_default().initialized = false);
    }

    /// Reads the current state.
    pub fn now<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.borrow())
    }

    /// All calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.now(|state| state.calls.clone())
    }

    /// Forgets the calls so far.
    pub fn clear_calls(&self) {
        self.state.send_modify(|state| state.calls.retain(|call| call.ended.is_none()));
    }

    /// Waits until the state fulfills this condition.
    pub async fn until(&self, what: &str, holds: impl FnMut(&State) -> bool) {
        let mut state = self.state.subscribe();
        patiently(what, state.wait_for(holds)).await.unwrap();
    }

    /// The calls of `RunCycle` of a subsystem so far.
    pub fn runs(&self, name: &str) -> Vec<Call> {
        self.now(|state| state.runs(name).cloned().collect())
    }

    /// The calls of `Initialize` of a subsystem so far.
    pub fn initializations(&self, name: &str) -> Vec<Call> {
        self.now(|state| state.initializations(name).cloned().collect())
    }

    /// Waits until a subsystem is being called in its `nth` run (1 is the first).
    pub async fn until_run(&self, name: &str, nth: usize) {
        self.until(&format!("run {nth} of {name}"), |state| state.runs(name).count() >= nth).await;
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The service

struct FakeService {
    state: Arc<watch::Sender<State>>,
}

/// A call that is being answered. If it is dropped first, it is logged as [`End::Dropped`].
struct Ongoing {
    state: Arc<watch::Sender<State>>,
    began: u64,
    end: End,
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        self.state.send_modify(|state| {
            let position = state.next_position();
            if let Ok(index) = state.calls.binary_search_by_key(&self.began, |call| call.began) {
                state.calls[index].ended = Some((position, self.end));
            }
        });
    }
}

impl FakeService {
    fn begin(&self, mut call: Call) -> Ongoing {
        let mut began = 0;
        self.state.send_modify(|state| {
            began = state.next_position();
            call.began = began;
            state.calls.push(call);
        });
        Ongoing { state: self.state.clone(), began, end: End::Dropped }
    }

    /// Refuses a superseded caller, as the contract requires.
    fn check_epoch(&self, name: &str, epoch: u64) -> Result<(), Status> {
        let mut result = Ok(());
        self.state.send_modify(|state| {
            let fake = state.fakes.entry(name.to_owned()).or_default();
            if epoch < fake.epoch {
                result = Err(Status::aborted(format!("epoch {epoch} is older than {}", fake.epoch)));
                state.stale_calls += 1;
            } else {
                fake.epoch = epoch;
            }
        });
        result
    }

    fn initialized(&self, name: &str) -> Result<(), Status> {
        let mut result = Ok(());
        self.state.send_modify(|state| {
            let script = state.script(name).initialize.clone();
            result = match script {
                Initialize::Succeed => {
                    state.fakes.entry(name.to_owned()).or_default().initialized = true;
                    Ok(())
                }
                Initialize::Unimplemented => Err(Status::unimplemented("needs none")),
                Initialize::Fail(code) => Err(Status::new(code, "as scripted")),
            };
        });
        result
    }

    async fn act(
        &self,
        request: &pb::RunCycleRequest,
        connection: &CancellationToken,
    ) -> Result<Response<pb::RunCycleResponse>, Status> {
        self.check_epoch(&request.subsystem, request.epoch)?;
        let (ready, mut run) = {
            let state = self.state.borrow();
            let script = state.script(&request.subsystem);
            let initialized = state.fakes.get(&request.subsystem).is_some_and(|fake| fake.initialized);
            (initialized || !script.needs_initialize, script.run.clone())
        };
        if !ready {
            return Err(Status::failed_precondition("not initialized"));
        }
        loop {
            run = match run {
                Run::Echo => {
                    let output = to_struct(&json!({ "by": request.subsystem, "cycle": request.cycle_id }));
                    return Ok(Response::new(pb::RunCycleResponse { output, ..pb::RunCycleResponse::default() }));
                }
                Run::Answer(answer) => return Ok(Response::new(answer)),
                Run::Fail(code, message) => return Err(Status::new(code, message)),
                Run::Hang => std::future::pending().await,
                Run::Hold => {
                    let mut state = self.state.subscribe();
                    let changed = state.wait_for(|state| !matches!(state.script(&request.subsystem).run, Run::Hold));
                    let changed = changed.await.map_err(|_| Status::cancelled("the fleet has stopped"))?;
                    changed.script(&request.subsystem).run.clone()
                }
                Run::Late(by, run) => {
                    tokio::time::sleep(by).await;
                    *run
                }
                Run::Raw(bytes) => return Ok(spoiled(&bytes, bytes.len())),
                Run::Truncated => return Ok(spoiled(&pb::RunCycleResponse::default().encode_to_vec(), 1000)),
                Run::Disconnect => {
                    connection.cancel();
                    std::future::pending().await
                }
            };
        }
    }
}

#[tonic::async_trait]
impl Subsystem for FakeService {
    async fn initialize(
        &self,
        request: Request<pb::InitializeRequest>,
    ) -> Result<Response<pb::InitializeResponse>, Status> {
        let (timeout, trace, path) = (timeout_of(&request), trace_of(&request), path_of(&request));
        let request = request.into_inner();
        let mut ongoing = self.begin(Call {
            epoch: request.epoch,
            timeout,
            trace,
            path,
            orchestrator_id: request.orchestrator_id,
            parameters: from_struct(&request.parameters),
            ..Call::of(Method::Initialize, &request.subsystem)
        });
        let checked = self.check_epoch(&request.subsystem, request.epoch);
        let answer = checked.and_then(|()| self.initialized(&request.subsystem));
        ongoing.end = End::answered(&answer);
        answer.map(|()| Response::new(pb::InitializeResponse {}))
    }

    async fn run_cycle(&self, request: Request<pb::RunCycleRequest>) -> Result<Response<pb::RunCycleResponse>, Status> {
        let over_tls = request.extensions().get::<TlsConnectInfo<CancellationToken>>();
        let shown = over_tls.and_then(TlsConnectInfo::peer_certs);
        let certificate = shown.and_then(|chain| Some(chain.first()?.to_vec()));
        let plain = || request.extensions().get::<CancellationToken>();
        let connection = over_tls.map(TlsConnectInfo::get_ref).or_else(plain).cloned().unwrap_or_default();
        let (timeout, trace, path) = (timeout_of(&request), trace_of(&request), path_of(&request));
        let request = request.into_inner();
        let inputs = request.inputs.iter().map(|(name, input)| (name.clone(), SeenInput::of(input))).collect();
        let mut ongoing = self.begin(Call {
            cycle_id: request.cycle_id,
            epoch: request.epoch,
            attempt: request.attempt,
            timeout,
            trace,
            path,
            scheduled_at: request.scheduled_at,
            parameters: from_struct(&request.parameters),
            inputs,
            certificate,
            ..Call::of(Method::RunCycle, &request.subsystem)
        });
        let answer = self.act(&request, &connection).await;
        ongoing.end = End::answered(&answer);
        answer
    }

    async fn get_status(
        &self,
        request: Request<pb::GetStatusRequest>,
    ) -> Result<Response<pb::GetStatusResponse>, Status> {
        let name = request.into_inner().subsystem;
        let mut ongoing = self.begin(Call::of(Method::GetStatus, &name));
        ongoing.end = End::Answered(Code::Ok);
        let status = to_struct(&json!({ "name": name }));
        Ok(Response::new(pb::GetStatusResponse { status }))
    }
}

impl Call {
    fn of(method: Method, subsystem: &str) -> Self {
        Self {
            method,
            subsystem: subsystem.to_owned(),
            cycle_id: 0,
            epoch: 0,
            attempt: 0,
            timeout: None,
            trace: [None, None],
            path: None,
            orchestrator_id: String::new(),
            scheduled_at: None,
            parameters: json!({}),
            inputs: BTreeMap::new(),
            certificate: None,
            began: 0,
            ended: None,
        }
    }
}

/// The timeout in `grpc-timeout`.
fn timeout_of<T>(request: &Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().unwrap();
    let (number, unit) = text.split_at(text.len() - 1);
    let number: u64 = number.parse().unwrap();
    Some(match unit {
        "H" => Duration::from_hours(number),
        "M" => Duration::from_mins(number),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        _ => Duration::from_nanos(number),
    })
}

/// The headers of W3C Trace Context.
fn trace_of<T>(request: &Request<T>) -> [Option<String>; 2] {
    ["traceparent", "tracestate"].map(|header| Some(request.metadata().get(header)?.to_str().unwrap().to_owned()))
}

/// The orchestrators through which a call has come.
fn path_of<T>(request: &Request<T>) -> Option<String> {
    Some(request.metadata().get("orchestrator-path")?.to_str().unwrap().to_owned())
}

impl End {
    fn answered<T>(answer: &Result<T, Status>) -> Self {
        Self::Answered(answer.as_ref().map_or_else(Status::code, |_| Code::Ok))
    }
}

impl SeenInput {
    fn of(input: &pb::Input) -> Self {
        Self { freshness: input.freshness(), cycle_id: input.cycle_id, output: from_struct(&input.output) }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Malformed messages and broken connections

const GRPC_STATUS: http::HeaderName = http::HeaderName::from_static("grpc-status");

/// Bytes that travel with a response and become its body.
#[derive(Clone)]
struct Spoiled(Bytes);

/// A response with one message of these bytes that announces `length` of them.
fn spoiled(bytes: &[u8], length: usize) -> Response<pb::RunCycleResponse> {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).unwrap());
    frame.put_slice(bytes);
    let mut response = Response::new(pb::RunCycleResponse::default());
    response.extensions_mut().insert(Spoiled(frame.freeze()));
    response
}

fn spoil(mut response: http::Response<Body>) -> http::Response<Body> {
    if let Some(Spoiled(frame)) = response.extensions_mut().remove() {
        let trailers = http::HeaderMap::from_iter([(GRPC_STATUS, http::HeaderValue::from_static("0"))]);
        *response.body_mut() = Body::new(Full::new(frame).with_trailers(async { Some(Ok(trailers)) }));
    }
    response
}

/// A connection that can be closed from inside a call.
struct Connection<S> {
    stream: S,
    token: CancellationToken,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    state: Arc<watch::Sender<State>>,
}

impl<S> Connection<S> {
    fn new(stream: S, state: Arc<watch::Sender<State>>) -> Self {
        state.send_modify(|state| state.connections += 1);
        let token = CancellationToken::new();
        Self { stream, closed: Box::pin(token.clone().cancelled_owned()), token, state }
    }

    fn check_open(&self) -> io::Result<()> {
        if self.token.is_cancelled() { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        self.state.send_modify(|state| state.connections -= 1);
    }
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = CancellationToken;

    fn connect_info(&self) -> CancellationToken {
        self.token.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.closed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(self.check_open());
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check_open()?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
