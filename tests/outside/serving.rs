//! Bounds on the memory that clients take in the server, over bare HTTP/2: answers that they don't read, messages that
//! they don't end, streams and connections.

use std::{net::SocketAddr, time::Duration};

use crate::common::{
    Stage,
    fleet::{self, Run},
    http::get,
    patiently,
    service::Home,
};
use bytes::Bytes;
use h2::{RecvStream, SendStream, client::SendRequest};
use orchestrator_core::proto::{
    orchestrator::v1::{self as pb, ledger_client::LedgerClient},
    subsystem::v1 as subsystem,
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tonic::{
    Code,
    codegen::http::{HeaderMap, Request, Response},
};

const SERVICE: &str = "dreamnet.orchestrator.v1.Orchestrator";
const REFLECTION: &str = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// A bare connection, whose streams give the server this window for its answers.
struct Bare {
    send: SendRequest<Bytes>,
    address: SocketAddr,
    /// The task that drives it.
    _connection: JoinSet<()>,
}

impl Bare {
    async fn connect(address: SocketAddr, window: u32) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let made = h2::client::Builder::new().initial_window_size(window).handshake(stream);
        let (send, connection) = patiently("a connection", made).await.unwrap();
        let mut connections = JoinSet::new();
        connections.spawn(async move { drop(connection.await) });
        Self { send: patiently("a connection", send.ready()).await.unwrap(), address, _connection: connections }
    }

    /// Opens a stream, and sends these bytes as the start of its body, or as all of it.
    async fn call(&mut self, path: &str, body: &[u8], is_all: bool) -> Call {
        let request =
            Request::post(format!("http://{}/{path}", self.address)).header("content-type", "application/grpc");
        self.send = patiently("a free stream", self.send.clone().ready()).await.unwrap();
        let (response, mut sent) = self.send.send_request(request.body(()).unwrap(), false).unwrap();
        sent.send_data(Bytes::copy_from_slice(body), is_all).unwrap();
        Call { response, _sent: sent }
    }
}

#[tokio::test]
async fn a_wrong_content_type_is_refused_on_every_path() {
    let stage = Stage::new().await;
    let mut bare = Bare::connect(stage.service.address(), 1 << 16).await;
    let mut status_of = async |path: &str, kind: Option<&str>| {
        let mut request = Request::post(format!("http://{}/{path}", bare.address));
        if let Some(kind) = kind {
            request = request.header("content-type", kind);
        }
        bare.send = patiently("a free stream", bare.send.clone().ready()).await.unwrap();
        let (response, mut sent) = bare.send.send_request(request.body(()).unwrap(), false).unwrap();
        sent.send_data(Bytes::from_static(&[0; 5]), true).unwrap();
        let response = patiently("an answer", response).await.unwrap();
        (response.status().as_u16(), code_of(response.headers()))
    };
    for path in [&format!("{SERVICE}/GetStatus"), "grpc.health.v1.Health/Check", REFLECTION] {
        for kind in [None, Some("application/json"), Some("application/grpc+json"), Some("application/grpcx")] {
            assert_eq!(status_of(path, kind).await, (415, Some(Code::InvalidArgument)), "{path} {kind:?}");
        }
        for kind in ["application/grpc", "application/grpc+proto", "Application/gRPC; charset=utf-8"] {
            assert_eq!(status_of(path, Some(kind)).await.0, 200, "{path} {kind}");
        }
    }
}

struct Call {
    response: h2::client::ResponseFuture,
    /// The request stays open until this is dropped.
    _sent: SendStream<Bytes>,
}

impl Call {
    /// Its answer, once the first piece of it has arrived or it is refused.
    async fn begun(self) -> (RecvStream, Option<Bytes>) {
        let mut body = patiently("an answer", self.response).await.unwrap().into_body();
        let first = patiently("the first piece", body.data()).await.map(Result::unwrap);
        (body, first)
    }

    /// The code with which it ended.
    async fn code(self) -> Code {
        self.end().await.unwrap()
    }

    /// The code with which it ended, unless it was reset.
    async fn end(self) -> Option<Code> {
        let response: Response<RecvStream> = patiently("an answer", self.response).await.unwrap();
        if let Some(code) = code_of(response.headers()) {
            return Some(code);
        }
        let mut body = response.into_body();
        let trailers = patiently("the end of the answer", async {
            while let Some(data) = body.data().await {
                body.flow_control().release_capacity(data.ok()?.len()).unwrap();
            }
            body.trailers().await.unwrap()
        });
        code_of(&trailers.await?)
    }
}

fn code_of(headers: &HeaderMap) -> Option<Code> {
    Some(Code::from_bytes(headers.get("grpc-status")?.as_bytes()))
}

/// A message as it travels.
fn framed(message: &impl Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    [vec![0], u32::try_from(bytes.len()).unwrap().to_be_bytes().to_vec(), bytes].concat()
}

/// A prefix that announces a message of this number of bytes.
fn prefix(bytes: u32) -> Vec<u8> {
    [vec![0], bytes.to_be_bytes().to_vec()].concat()
}

/// A stage with one recorded cycle of 2 MB.
async fn with_large_record(home: Home) -> Stage {
    let mut stage = Stage::at(home).await;
    let output = fleet::to_struct(&serde_json::json!({ "text": "x".repeat(2 << 20) }));
    let answer = subsystem::RunCycleResponse { output, ..subsystem::RunCycleResponse::default() };
    let limits = Some(pb::Limits { max_output_bytes: 3 << 20, ..pb::Limits::default() });
    stage
        .register("a", |it| {
            it.record_output = true;
            it.limits = limits;
        })
        .await;
    stage.fleet.run("a", Run::Answer(answer));
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), pb::CycleState::Succeeded, "{}", cycle.error);
    stage
}

fn with(settings: &[&str]) -> Home {
    Home::new().with_args(settings.iter().flat_map(|setting| ["--set", setting]))
}

/// Services whose allocator reserves no memory before it is asked for, and so takes no huge pages either.
fn with_exact_memory() -> Home {
    Home::new().with_wrapper(["env", "MIMALLOC_ARENA_EAGER_COMMIT=0"])
}

// ---------------------------------------------------------------------------------------------------------------
// Answers

#[tokio::test]
async fn the_memory_of_unread_answers_of_all_streams_is_bounded() {
    const CALLS: usize = 100;
    let mut stage = with_large_record(with(&["memory.max_bytes=134217728"])).await;
    let (_, before) = stage.service.memory();
    let get = framed(&pb::GetCycleRequest { cycle_id: 1 });
    let (mut bares, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        // A shut window alone would let each stream hold the whole record in memory.
        let mut bare = Bare::connect(stage.service.address(), 0).await;
        for _ in 0..CALLS / 10 {
            calls.push(bare.call(&format!("{SERVICE}/GetCycle"), &get, true).await);
        }
        bares.push(bare);
    }
    // 16 MiB have room for at most seven of them. The others are refused, in trailers, which no window holds up, or
    // give way.
    let mut ended = JoinSet::new();
    for call in calls {
        ended.spawn(call.end());
    }
    for _ in 0..CALLS - 7 {
        let end = patiently("calls to end", ended.join_next()).await.unwrap().unwrap();
        assert!(matches!(end, Some(Code::ResourceExhausted) | None), "{end:?}");
    }
    // Small answers are still sent. Large ones get memory once unread ones have given way to them.
    stage.client.get_status(pb::GetStatusRequest { omit_last_cycle: true, ..Default::default() }).await.unwrap();
    patiently("room", async { while stage.client.cycle(1).await.is_err() {} }).await;
    let (_, most) = stage.service.memory();
    assert!(most - before < 100 << 20, "{} MB more", (most - before) >> 20);
}

#[tokio::test]
async fn readers_of_the_log_that_stall_leave_memory_for_others() {
    const READERS: usize = 100;
    let mut stage = with_large_record(with(&["memory.max_bytes=134217728"])).await;
    let mut ledger = LedgerClient::connect(format!("http://{}", stage.service.address())).await.unwrap();
    // The log that they read has the record.
    let proof = pb::GetInclusionProofRequest { cycle_id: 1, ..Default::default() };
    ledger.get_inclusion_proof(proof).await.unwrap();
    let (_, before) = stage.service.memory();
    let read = framed(&pb::ReadEntriesRequest::default());
    let (mut bares, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let mut bare = Bare::connect(stage.service.address(), 0).await;
        for _ in 0..READERS / 10 {
            calls.push(bare.call("dreamnet.orchestrator.v1.Ledger/ReadEntries", &read, true).await);
        }
        bares.push(bare);
    }
    stage.client.get_status(pb::GetStatusRequest { omit_last_cycle: true, ..Default::default() }).await.unwrap();
    patiently("room", async { while stage.client.cycle(1).await.is_err() {} }).await;
    let (_, most) = stage.service.memory();
    assert!(most - before < 100 << 20, "{} MB more", (most - before) >> 20);
}

#[tokio::test]
async fn one_connection_leaves_memory_for_the_answers_of_others() {
    let mut stage = with_large_record(with(&["memory.max_bytes=134217728"])).await;
    let mut bare = Bare::connect(stage.service.address(), 0).await;
    let get = framed(&pb::GetCycleRequest { cycle_id: 1 });
    let mut refused = JoinSet::new();
    for _ in 0..10 {
        refused.spawn(bare.call(&format!("{SERVICE}/GetCycle"), &get, true).await.code());
    }
    // Its share is 4 MiB, which is enough for one.
    for _ in 0..9 {
        let code = patiently("calls to be refused", refused.join_next()).await.unwrap().unwrap();
        assert_eq!(code, Code::ResourceExhausted);
    }
    stage.client.cycle(1).await.unwrap();
}

#[tokio::test]
async fn a_slow_reader_is_aborted_however_many_connections_it_has() {
    let mut stage = with_large_record(with(&["memory.max_bytes=134217728"])).await;
    let get = framed(&pb::GetCycleRequest { cycle_id: 1 });
    let (mut bares, mut slow) = (Vec::new(), JoinSet::new());
    for _ in 0..8 {
        let mut bare = Bare::connect(stage.service.address(), 16 << 10).await;
        let (mut body, mut piece) = bare.call(&format!("{SERVICE}/GetCycle"), &get, true).await.begun().await;
        bares.push(bare);
        slow.spawn(async move {
            let mut pace = tokio::time::interval(Duration::from_secs(1));
            while let Some(taken) = piece {
                pace.tick().await;
                body.flow_control().release_capacity(taken.len()).unwrap();
                piece = body.data().await.and_then(Result::ok);
            }
        });
    }
    // There is memory for seven of them, and at that pace they would take two minutes.
    patiently("room", async { while stage.client.cycle(1).await.is_err() {} }).await;
}

#[tokio::test]
async fn a_stream_of_reflection_is_read_only_as_fast_as_its_answers() {
    let stage = Stage::at(with_exact_memory()).await;
    let address = stage.service.address();
    let ask = framed(&tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            tonic_reflection::pb::v1::server_reflection_request::MessageRequest::FileContainingSymbol(SERVICE.into()),
        ),
    });
    // Streams with three requests take no more memory than those with one.
    let (mut before, _) = stage.service.memory();
    let (mut bares, mut taken) = (Vec::new(), Vec::new());
    for times in [1, 3] {
        let mut bare = Bare::connect(address, 0).await;
        let mut calls = Vec::new();
        for _ in 0..250 {
            calls.push(bare.call(REFLECTION, &ask.repeat(times), false).await);
        }
        for call in &mut calls {
            patiently("the beginning of an answer", &mut call.response).await.unwrap();
        }
        // By the time that the same number of other requests is answered, these have been answered as far as possible.
        let mut other = Bare::connect(address, 65_535).await;
        for _ in 0..250 {
            assert_eq!(other.call(REFLECTION, &ask, true).await.code().await, Code::Ok);
        }
        let (after, _) = stage.service.memory();
        taken.push(after.saturating_sub(before));
        before = after;
        bares.push((bare, other, calls));
    }
    assert!(taken[1] * 2 < taken[0] * 3, "{taken:?} bytes");
}

// ---------------------------------------------------------------------------------------------------------------
// Requests

#[tokio::test]
async fn every_path_has_the_same_limit_of_a_message() {
    let stage = Stage::new().await;
    let mut bare = Bare::connect(stage.service.address(), 65_535).await;
    let own = format!("{SERVICE}/RegisterSubsystem");
    for (path, limit) in [
        (own.as_str(), 4 << 20),
        ("grpc.health.v1.Health/Check", 8 << 10),
        ("grpc.health.v1.Health/Watch", 8 << 10),
        (REFLECTION, 8 << 10),
        ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", 8 << 10),
    ] {
        // It is refused as soon as the prefix has arrived.
        let refused = bare.call(path, &prefix(limit + 1), false).await.code().await;
        assert!(matches!(refused, Code::OutOfRange), "{path}: {refused:?}");
    }
    // Two messages where one is allowed, and half of one.
    let check = "grpc.health.v1.Health/Check";
    assert_eq!(bare.call(check, &prefix(0).repeat(2), true).await.code().await, Code::InvalidArgument);
    assert_eq!(bare.call(check, &prefix(1), true).await.code().await, Code::InvalidArgument);
    assert_eq!(bare.call(check, &prefix(0), true).await.code().await, Code::Ok);
}

#[tokio::test]
async fn a_prefix_reserves_no_memory() {
    let mut stage = Stage::at(with_exact_memory()).await;
    let before = stage.service.reserved();
    let mut bare = Bare::connect(stage.service.address(), 65_535).await;
    let begun = [prefix((4 << 20) - 1), vec![0]].concat();
    let mut calls = Vec::new();
    for _ in 0..200 {
        calls.push(bare.call(&format!("{SERVICE}/RegisterSubsystem"), &begun, false).await);
    }
    // Bytes that were sent before this request have been read by then.
    bare.call("grpc.health.v1.Health/Check", &prefix(0), true).await.code().await;
    stage.client.status().await.unwrap();
    let more = stage.service.reserved().saturating_sub(before);
    assert!(more < 100 << 20, "{} MB more", more >> 20);
    drop(calls);
}

// ---------------------------------------------------------------------------------------------------------------
// Streams and connections

#[tokio::test]
async fn streams_of_all_connections_are_bounded_together() {
    let stage = Stage::at(with(&["server.max_streams=3"])).await;
    let address = stage.service.address();
    let [watch, check] = ["WatchCycles", "GetStatus"].map(|rpc| format!("dreamnet.orchestrator.v1.Orchestrator/{rpc}"));
    let (watch, check) = (&*watch, &*check);
    let mut watches = Vec::new();
    let mut bare = Bare::connect(address, 65_535).await;
    for _ in 0..3 {
        let mut call = bare.call(watch, &prefix(0), true).await;
        patiently("a watch", &mut call.response).await.unwrap();
        watches.push(call);
    }
    assert_eq!(bare.call(check, &prefix(0), true).await.code().await, Code::ResourceExhausted);
    // Others still have one stream each.
    let mut another = Bare::connect(address, 65_535).await;
    let mut call = another.call(watch, &prefix(0), true).await;
    patiently("a watch", &mut call.response).await.unwrap();
    assert_eq!(another.call(check, &prefix(0), true).await.code().await, Code::ResourceExhausted);
    watches.pop();
    let room = async { while another.call(check, &prefix(0), true).await.code().await != Code::Ok {} };
    patiently("room", room).await;
}

#[tokio::test]
async fn idle_connections_give_way_to_newcomers_and_busy_ones_stay() {
    let mut stage = Stage::at(with(&["server.max_connections=3"])).await;
    let address = stage.service.address();
    let mut busy = stage.client.watch_after(0).await.unwrap();
    crate::common::service::next_event(&mut busy).await.unwrap();
    // They connect one after another, and none leaves. Some don't even send a preface.
    let mut idle = Vec::new();
    for i in 0..9 {
        if i % 3 == 0 {
            idle.push((None, Some(TcpStream::connect(address).await.unwrap())));
        } else {
            let mut bare = Bare::connect(address, 65_535).await;
            assert_eq!(bare.call("grpc.health.v1.Health/Check", &prefix(0), true).await.code().await, Code::Ok);
            idle.push((Some(bare), None));
        }
    }
    stage.client.status().await.unwrap();
    // This was logged, but not each time.
    let said = stage.home.log().matches("the limit of connections is reached").count();
    assert!((1..4).contains(&said), "{}", stage.home.log());
}

#[tokio::test]
async fn connections_whose_streams_are_silent_give_way_and_those_of_watchers_stay() {
    let mut stage = Stage::at(with(&["server.max_connections=4"])).await;
    let address = stage.service.address();
    let mut watcher = stage.client.watch_after(0).await.unwrap();
    crate::common::service::next_event(&mut watcher).await.unwrap();
    // A watch of health, and a stream of reflection without a request.
    let mut silent = Vec::new();
    for i in 0..6 {
        let (path, body) = [("grpc.health.v1.Health/Watch", prefix(0)), (REFLECTION, Vec::new())][i % 2].clone();
        let mut bare = Bare::connect(address, 65_535).await;
        assert_eq!(bare.call("grpc.health.v1.Health/Check", &prefix(0), true).await.code().await, Code::Ok);
        let call = bare.call(path, &body, false).await;
        silent.push((bare, call));
    }
    stage.client.run().await.unwrap();
    crate::common::service::next_recorded(&mut watcher).await;
}

#[tokio::test]
async fn idle_connections_to_the_admin_address_give_way() {
    const PLACES: usize = 256;
    let stage = Stage::new().await;
    let mut idle = Vec::new();
    for _ in 0..PLACES {
        let mut stream = TcpStream::connect(stage.service.admin()).await.unwrap();
        stream.write_all(b"GET /api/loops HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        patiently("an answer", stream.read_exact(&mut [0; 20])).await.unwrap();
        idle.push(stream);
    }
    // The service would close them after a while, which is longer than the test waits.
    let answer = tokio::time::timeout(std::time::Duration::from_secs(10), get(stage.service.admin(), "/metrics"));
    assert_eq!(answer.await.unwrap().status, 200);
}

#[tokio::test]
async fn snapshots_of_hanging_subsystems_leave_the_admin_address_to_others() {
    let mut stage = Stage::new().await;
    // It accepts connections, and never sends anything.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    stage
        .register("hangs", |it| {
            it.endpoint = endpoint;
            it.timeout = crate::common::service::ms(600_000);
        })
        .await;
    let admin = stage.service.admin();
    let mut asking = Vec::new();
    for i in 0..40 {
        let path = ["/api/status?includeSnapshots=true", "/api/subsystems/hangs?includeSnapshot=true"][i % 2];
        let mut stream = TcpStream::connect(admin).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.unwrap();
        asking.push(stream);
    }
    for path in ["/api/status", "/api/loops", "/metrics"] {
        let answer = patiently("an answer beside them", get(admin, path)).await;
        assert_eq!(answer.status, 200, "{path}");
    }
    // The number of waiting requests is bounded too.
    let refused = patiently("one more to be refused", get(admin, "/api/status?includeSnapshots=true")).await;
    assert_eq!(refused.status, 429);
}
