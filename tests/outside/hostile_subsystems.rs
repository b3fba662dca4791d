//! Subsystems that send data that no gRPC library would send, and other peers: proxies, other servers, closed ports.
//! Each affects only its own part of the cycle.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::common::{
    Stage,
    fleet::{Fleet, Run},
    patiently,
    service::{Home, ms, part, registration},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use h2::{Reason, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response};
use orchestrator_core::{
    clock::Clock,
    dial::Dialer,
    memory::Memory,
    model::{CycleId, Epoch, Payload, Subsystem, SubsystemSpec},
    ports::{Callee, RunCall, Subsystems},
    proto::{
        orchestrator::v1::{self as pb, CycleState, CycleTelemetry, SubsystemState},
        subsystem::v1 as subsystem,
    },
    transport::Sockets,
};
use prost::Message;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinSet,
};
use tonic::transport::Identity;

// ---------------------------------------------------------------------------------------------------------------
// The stage: scripted HTTP/2 servers, frame by frame

/// The behaviour of a server in a call of `RunCycle`, as the subsystem of this name.
type Act = Arc<dyn Fn(String, SendResponse<Bytes>) -> BoxFuture<'static, ()> + Send + Sync>;

fn act<F: Future<Output = ()> + Send + 'static>(
    act: impl Fn(String, SendResponse<Bytes>) -> F + Send + Sync + 'static,
) -> Act {
    Arc::new(move |name, respond| Box::pin(act(name, respond)))
}

/// An HTTP/2 server. It ends when it is dropped.
struct Raw {
    endpoint: String,
    connections: Arc<AtomicUsize>,
    _server: JoinSet<()>,
}

impl Raw {
    async fn start(act: Act) -> Self {
        Self::with(h2::server::Builder::new(), act).await
    }

    async fn with(settings: h2::server::Builder, act: Act) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = connections.clone();
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                socket.set_nodelay(true).unwrap();
                serving.spawn(serve(socket, settings.clone(), act.clone()));
            }
        });
        Self { endpoint, connections, _server: server }
    }
}

async fn serve(socket: TcpStream, settings: h2::server::Builder, act: Act) {
    let Ok(mut connection) = settings.handshake::<_, Bytes>(socket).await else { return };
    let mut calls = JoinSet::new();
    while let Some(Ok((request, respond))) = connection.accept().await {
        calls.spawn(answer(request, respond, act.clone()));
    }
}

async fn answer(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>, act: Act) {
    let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
    let mut body = request.into_body();
    let mut message = BytesMut::new();
    while let Some(Ok(chunk)) = body.data().await {
        let _ = body.flow_control().release_capacity(chunk.len());
        message.extend_from_slice(&chunk);
    }
    if method != "RunCycle" {
        // No other method is implemented.
        let _ = respond.send_response(status("12", ""), true);
        return;
    }
    let request = subsystem::RunCycleRequest::decode(&message[5..]).unwrap();
    act(request.subsystem, respond).await;
}

/// The headers of an answer that consists of a status.
fn status(code: &str, message: &str) -> Response<()> {
    let response = grpc().header("grpc-status", code);
    response.header("grpc-message", HeaderValue::from_bytes(message.as_bytes()).unwrap()).body(()).unwrap()
}

fn grpc() -> http::response::Builder {
    Response::builder().status(200).header("content-type", "application/grpc")
}

fn ok() -> HeaderMap {
    [("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))].into_iter().collect()
}

fn framed(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap());
    framed.put_slice(message);
    framed.freeze()
}

/// Answers OK with these bytes of body, which need not be well-formed.
fn body(mut respond: SendResponse<Bytes>, bytes: impl Into<Bytes>) {
    let Ok(mut stream) = respond.send_response(grpc().body(()).unwrap(), false) else { return };
    let _ = stream.send_data(bytes.into(), false);
    let _ = stream.send_trailers(ok());
}

/// Sends an empty answer.
fn succeed(respond: SendResponse<Bytes>) {
    body(respond, framed(b""));
}

/// A server that listens, and does something other than HTTP/2 with each connection.
async fn other_server<F: Future<Output = ()> + Send + 'static>(
    serve: impl Fn(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let mut serving = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            serving.spawn(serve(socket));
        }
    });
    (address, server)
}

/// Sends this once it has received something, and closes the connection.
async fn says(what: &'static [u8]) -> (SocketAddr, JoinSet<()>) {
    other_server(move |mut socket| async move {
        let mut preface = [0; 24];
        let _ = socket.read_exact(&mut preface).await;
        let _ = socket.write_all(what).await;
        let _ = socket.shutdown().await;
        // Until the other side closes, too: a close with unread bytes would reset the connection.
        let _ = socket.read_to_end(&mut Vec::new()).await;
    })
    .await
}

/// The kinds of frames.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;

/// Flags of frames.
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Greets a client of HTTP/2, by hand.
async fn greet(socket: &mut TcpStream) {
    socket.write_all(&[frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, 1, 0, &[])].concat()).await.unwrap();
    socket.read_exact(&mut [0; 24]).await.unwrap();
}

/// Kind, flags, stream and payload of the next frame.
async fn next_frame(socket: &mut TcpStream) -> std::io::Result<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    socket.read_exact(&mut head).await?;
    let [a, b, c, kind, flags, stream @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    socket.read_exact(&mut payload).await?;
    Ok((kind, flags, u32::from_be_bytes(stream), payload))
}

/// Sends an empty answer to the call on this stream.
async fn succeed_by_hand(socket: &mut TcpStream, stream: u32) {
    let answer = [
        frame(HEADERS, END_HEADERS, stream, b"\x88\x0f\x10\x10application/grpc"),
        frame(DATA, 0, stream, &framed(b"")),
        frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x00\x0bgrpc-status\x010"),
    ];
    socket.write_all(&answer.concat()).await.unwrap();
}

/// Sends this repeatedly until the connection has ended.
async fn flood(socket: TcpStream, what: &[u8]) {
    let (mut from, mut to) = socket.into_split();
    let mut nowhere = tokio::io::sink();
    let answers = tokio::io::copy(&mut from, &mut nowhere);
    let what = what.repeat((16 << 10) / what.len());
    let _ = tokio::join!(answers, async { while to.write_all(&what).await.is_ok() {} });
}

fn retried(max_attempts: u32) -> pb::RetryPolicy {
    pb::RetryPolicy { max_attempts, initial_backoff: ms(1), max_backoff: ms(1), ..Default::default() }
}

async fn register(stage: &mut Stage, name: &str, endpoint: &str, max_attempts: u32) {
    let registration = pb::Registration { retry: Some(retried(max_attempts)), ..registration(name, endpoint) };
    stage.client.register(registration).await.unwrap();
}

/// The end of a part: state, code, message, attempts.
fn ended<'a>(cycle: &'a CycleTelemetry, name: &str) -> (SubsystemState, &'a str, &'a str, u32) {
    let part = part(cycle, name);
    (part.state(), &part.error_code, &part.error_message, part.attempts)
}

const SUCCEEDED: SubsystemState = SubsystemState::Succeeded;
const FAILED: SubsystemState = SubsystemState::Failed;

// ---------------------------------------------------------------------------------------------------------------
// Faults that affect a connection

#[tokio::test]
async fn an_error_text_of_any_size_affects_only_its_sender() {
    let server = Raw::start(act(|name, mut respond| async move {
        match name.strip_prefix("says_") {
            Some(bytes) => _ = respond.send_response(status("10", &"e".repeat(bytes.parse().unwrap())), true),
            None => succeed(respond),
        }
    }))
    .await;
    let mut stage = Stage::new().await;
    for name in ["says_120000", "says_170000", "says_1000000", "one", "other"] {
        // With one attempt, the policy would not retry a call that a neighbour breaks.
        register(&mut stage, name, &server.endpoint, 1).await;
    }
    let cycle = stage.client.run().await.unwrap();
    for _ in 0..5 {
        let cycle = stage.client.run().await.unwrap();
        for name in ["one", "other"] {
            assert_eq!(ended(&cycle, name), (SUCCEEDED, "", "", 1));
        }
    }
    // The start of a message within the limit is kept, and an error says why a longer one is not.
    let start = "e".repeat((1 << 10) - "…".len()) + "…";
    assert_eq!(ended(&cycle, "says_120000"), (FAILED, "ABORTED", &*start, 1));
    for name in ["says_170000", "says_1000000"] {
        let too_long = "its headers or its error message are over 131072 bytes";
        assert_eq!(ended(&cycle, name), (FAILED, "RESOURCE_EXHAUSTED", too_long, 1));
    }
}

#[tokio::test]
async fn a_subsystem_that_violates_http2_repeatedly_breaks_only_its_own_connection() {
    let server = Raw::start(act(|name, mut respond| async move {
        // An invalid length fails the stream, and counts against the connection in the library.
        let answer = match name.as_str() {
            "broken" => grpc().header("content-length", "7").body(()).unwrap(),
            _ => return succeed(respond),
        };
        let _ = respond.send_response(answer, true);
    }))
    .await;
    let mut stage = Stage::new().await;
    register(&mut stage, "broken", &server.endpoint, 1).await;
    register(&mut stage, "neighbour", &server.endpoint, 1).await;
    for _ in 0..3 {
        let cycle = stage.client.run().await.unwrap();
        let (how, code, message, _) = ended(&cycle, "broken");
        assert_eq!((how, code), (FAILED, "INTERNAL"), "{message}");
        assert!(message.starts_with("its answer violates HTTP/2"), "{message}");
        assert_eq!(ended(&cycle, "neighbour"), (SUCCEEDED, "", "", 1));
    }
    assert_eq!(server.connections.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_connection_that_is_flooded_without_an_open_call_is_closed() {
    let floods = [
        ("pings", frame(PING, 0, 0, &[0; 8])),
        ("settings", frame(SETTINGS, 0, 0, &[])),
        ("windows", frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
        ("hints", frame(HEADERS, END_HEADERS, 1, b"\x08\x03103")),
    ];
    let mut stage = Stage::new().await;
    let (mut servers, mut begin, mut over) = (Vec::new(), Vec::new(), Vec::new());
    for (name, what) in floods {
        let (begins, is_over) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        begin.push(begins.clone());
        over.push((name, is_over.clone()));
        let (address, server) = other_server(move |mut socket| {
            let (begins, is_over, what) = (begins.clone(), is_over.clone(), what.clone());
            async move {
                greet(&mut socket).await;
                tokio::select! {
                    () = async {
                        while let Ok((_, flags, stream, _)) = next_frame(&mut socket).await {
                            if stream != 0 && flags & END_STREAM != 0 {
                                succeed_by_hand(&mut socket, stream).await;
                            }
                        }
                    } => {}
                    () = begins.notified() => {
                        flood(socket, &what).await;
                        is_over.notify_one();
                    }
                }
            }
        })
        .await;
        servers.push(server);
        register(&mut stage, name, &format!("http://{address}"), 1).await;
    }
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    for begin in begin {
        begin.notify_one();
    }
    for (name, over) in over {
        patiently(&format!("the connection flooded with {name} to end"), over.notified()).await;
    }
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn a_flood_in_a_call_fails_only_that_call() {
    // Interim answers belong to one call. Its neighbour has called by then, and is answered on the next connection.
    let interim = [b"\x08\x03103\x00\x04link\x64", &[b'x'; 100][..]].concat();
    let connections = AtomicUsize::new(0);
    let (shared, _server) = other_server(move |mut socket| {
        let (interim, is_first) = (interim.clone(), connections.fetch_add(1, Ordering::Relaxed) == 0);
        async move {
            greet(&mut socket).await;
            let (mut hints, mut neighbour) = (None, None);
            while let Ok((_, flags, stream, payload)) = next_frame(&mut socket).await {
                if stream == 0 || flags & END_STREAM == 0 {
                    continue;
                }
                match payload.windows(5).any(|it| it == b"hints") {
                    true => hints = Some(stream),
                    false if is_first => neighbour = Some(stream),
                    false => succeed_by_hand(&mut socket, stream).await,
                }
                if let Some(stream) = hints.filter(|_| neighbour.is_some() || !is_first) {
                    return flood(socket, &frame(HEADERS, END_HEADERS, stream, &interim)).await;
                }
            }
        }
    })
    .await;
    // A ping does not belong to a call.
    let (pings, _server) = other_server(|mut socket| async move {
        greet(&mut socket).await;
        while next_frame(&mut socket).await.unwrap().0 != HEADERS {}
        flood(socket, &frame(PING, 0, 0, &[0; 8])).await;
    })
    .await;
    let mut stage = Stage::new().await;
    for (name, address) in [("hints", shared), ("neighbour", shared), ("pings", pings)] {
        register(&mut stage, name, &format!("http://{address}"), 1).await;
    }
    for _ in 0..2 {
        let cycle = stage.client.run().await.unwrap();
        let flood = "Initialize: it sent more than 4194304 bytes besides its answers while no call began or ended";
        assert_eq!(ended(&cycle, "hints"), (FAILED, "RESOURCE_EXHAUSTED", flood, 0));
        assert_eq!(ended(&cycle, "neighbour"), (SUCCEEDED, "", "", 1));
        assert_eq!(ended(&cycle, "pings"), (FAILED, "UNAVAILABLE", flood, 0));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Use of memory and time

#[tokio::test]
async fn an_answer_is_read_only_up_to_its_limits_and_takes_no_more_memory_than_it_has() {
    const SENDERS: usize = 3;
    let server = Raw::start(act(|name, respond| async move {
        let message = match name.split('-').next().unwrap() {
            // Issues of two bytes each; an unknown field; one output in many pieces.
            "issues" => b"\x1a\x00".repeat(2 << 20),
            "unknown" => b"\xf8\x7f\x00".repeat(4 << 18),
            "pieces" => b"\x0a\x00".repeat(2 << 20),
            _ => unreachable!("{name}"),
        };
        body(respond, framed(&message[..message.len().min(4 << 20)]));
    }))
    .await;
    let mut stage = Stage::new().await;
    for kind in ["issues", "unknown", "pieces"] {
        for sender in 0..SENDERS {
            let name = format!("{kind}-{sender}");
            // Decoding takes this time in code that is not optimized.
            let registration = pb::Registration { timeout: ms(60_000), ..registration(&name, &server.endpoint) };
            stage.client.register(registration).await.unwrap();
        }
    }
    let (before, _) = stage.service.memory();
    let cycle = stage.client.run().await.unwrap();
    let (_, most) = stage.service.memory();
    for sender in 0..SENDERS {
        let (how, code, message, _) = ended(&cycle, &format!("issues-{sender}"));
        assert_eq!((how, code), (FAILED, "RESOURCE_EXHAUSTED"), "{message}");
        assert!(message.contains("issues: 33 or more, allowed are 32"), "{message}");
        assert_eq!(ended(&cycle, &format!("unknown-{sender}")), (SUCCEEDED, "", "", 1));
        assert_eq!(ended(&cycle, &format!("pieces-{sender}")), (SUCCEEDED, "", "", 1));
    }
    // Nine messages of up to 4 MiB; each message of issues took 275 MiB.
    let taken = most.saturating_sub(before) >> 20;
    assert!(taken < 150, "{taken} MiB");
}

#[tokio::test]
async fn announced_bytes_take_no_memory_and_are_refused_at_once_over_the_limit() {
    let hold = || {
        act(|name, mut respond| async move {
            let mut stream = respond.send_response(grpc().body(()).unwrap(), false).unwrap();
            // Exactly the limit, or one byte more, and then nothing.
            let announced: u32 = if name.starts_with("over") { (4 << 20) + 1 } else { 4 << 20 };
            let _ = stream.send_data([&[0][..], &announced.to_be_bytes(), b"x"].concat().into(), false);
            let _ = std::future::poll_fn(|cx| stream.poll_reset(cx)).await;
        })
    };
    // One at a time: some servers close the connection after many cancelled calls.
    let (server, other) = (Raw::start(hold()).await, Raw::start(hold()).await);
    let mut stage = Stage::new().await;
    for i in 0..200 {
        let timeout = ms(500);
        let hangs = pb::Registration { timeout, ..registration(&format!("hangs-{i}"), &server.endpoint) };
        stage.client.register(hangs).await.unwrap();
    }
    register(&mut stage, "over", &other.endpoint, 1).await;
    let (before, _) = stage.service.memory();
    let cycle = stage.client.run().await.unwrap();
    let (_, most) = stage.service.memory();
    let too_large = "its answer is 4194305 bytes; the limit is 4194304 bytes";
    assert_eq!(ended(&cycle, "over"), (FAILED, "RESOURCE_EXHAUSTED", too_large, 1));
    assert_eq!(ended(&cycle, "hangs-0").0, SubsystemState::TimedOut);
    // 800 MiB are announced.
    let taken = most.saturating_sub(before) >> 20;
    assert!(taken < 100, "{taken} MiB");
}

#[tokio::test]
async fn answers_without_memory_are_refused_and_all_others_are_accepted() {
    let server = Raw::start(act(|name, respond| async move {
        let output = if name.starts_with("large") { "x".repeat(3 << 20) } else { "x".to_owned() };
        let output = crate::common::fleet::to_struct(&serde_json::json!({ "large": output }));
        body(respond, framed(&subsystem::RunCycleResponse { output, ..Default::default() }.encode_to_vec()));
    }))
    .await;
    // Their share is 10 MiB.
    let mut stage = Stage::at(Home::new().with_args(["--set", "memory.max_bytes=67108864"])).await;
    let limits = Some(pb::Limits { max_output_bytes: 4 << 20, ..Default::default() });
    for name in ["large-1", "large-2", "large-3", "large-4", "small-1", "small-2"] {
        let registration = pb::Registration { limits, ..registration(name, &server.endpoint) };
        stage.client.register(registration).await.unwrap();
    }
    let cycle = stage.client.run().await.unwrap();
    for name in ["small-1", "small-2"] {
        assert_eq!(ended(&cycle, name), (SUCCEEDED, "", "", 1));
    }
    let refused = cycle.subsystems.iter().filter(|part| part.state() == FAILED).collect::<Vec<_>>();
    assert!(!refused.is_empty());
    for part in refused {
        assert_eq!(part.error_code, "RESOURCE_EXHAUSTED");
        assert!(part.error_message.starts_with("no memory for its answer: the limit of"), "{part:?}");
    }
}

#[tokio::test]
async fn a_cycle_ends_by_its_deadline_whatever_its_subsystems_send() {
    let server = Raw::start(act(|name, respond| async move {
        // Issues of two bytes each, or an unknown field.
        let message =
            if name == "issues" { b"\x1a\x00".repeat(2 << 20) } else { b"\xf8\x7f\x00".repeat((4 << 20) / 3) };
        body(respond, framed(&message));
    }))
    .await;
    let mut stage = Stage::new().await;
    for name in ["issues", "unknown-1", "unknown-2", "unknown-3"] {
        register(&mut stage, name, &server.endpoint, 1).await;
    }
    let request = pb::RunCycleRequest { deadline: ms(1000), ..Default::default() };
    let cycle = stage.client.run_with(request).await.unwrap();
    assert!(cycle.duration_ms <= 1250.0, "{}", cycle.duration_ms);
}

// ---------------------------------------------------------------------------------------------------------------
// Contents of answers

#[tokio::test]
async fn answers_of_proxies_and_restarts_are_mapped_as_in_grpc() {
    let calls = Arc::new(std::sync::Mutex::new(HashMap::<String, usize>::new()));
    let seen = calls.clone();
    let server = Raw::start(act(move |name, mut respond| {
        let nth = {
            let mut calls = seen.lock().unwrap();
            let nth = calls.entry(name.clone()).or_default();
            *nth += 1;
            *nth
        };
        async move {
            let html = |status: u16| Response::builder().status(status).header("content-type", "text/html");
            match name.as_str() {
                "reset_refused" => respond.send_reset(Reason::REFUSED_STREAM),
                "refused_once" if nth == 1 => respond.send_reset(Reason::REFUSED_STREAM),
                "reset_cancelled" => respond.send_reset(Reason::CANCEL),
                "reset_internal" => respond.send_reset(Reason::INTERNAL_ERROR),
                "reset_calm" => respond.send_reset(Reason::ENHANCE_YOUR_CALM),
                "refused_once" => succeed(respond),
                "html_200" => {
                    let mut stream = respond.send_response(html(200).body(()).unwrap(), false).unwrap();
                    stream.send_data(Bytes::from_static(b"<html>"), true).unwrap();
                }
                "status_in_503" => {
                    let answer = html(503).header("grpc-status", "9").header("grpc-message", "mine").body(()).unwrap();
                    let _ = respond.send_response(answer, true);
                }
                "two" => body(respond, [framed(b""), framed(b"")].concat()),
                "none" => body(respond, Bytes::new()),
                "compressed" => body(respond, Bytes::from_static(b"\x01\0\0\0\0")),
                "no_status" => {
                    let mut stream = respond.send_response(grpc().body(()).unwrap(), false).unwrap();
                    stream.send_data(framed(b""), true).unwrap();
                }
                "no_number" => _ = respond.send_response(status("abc", "why"), true),
                http => {
                    let status = http.strip_prefix("http_").unwrap().parse().unwrap();
                    let mut stream = respond.send_response(html(status).body(()).unwrap(), false).unwrap();
                    stream.send_data(Bytes::from_static(b"<html>a proxy's page</html>"), true).unwrap();
                }
            }
        }
    }))
    .await;
    let mut stage = Stage::new().await;
    let proxy = |status: &str| format!("the answer is not gRPC, but HTTP {status} with content of type \"text/html\"");
    let reset = |reason: &str| format!("it reset the stream of the call: {reason}");
    let cases = [
        ("http_400", "INTERNAL", proxy("400 Bad Request")),
        ("http_401", "UNAUTHENTICATED", proxy("401 Unauthorized")),
        ("http_403", "PERMISSION_DENIED", proxy("403 Forbidden")),
        ("http_404", "UNIMPLEMENTED", proxy("404 Not Found")),
        ("http_429", "UNAVAILABLE", proxy("429 Too Many Requests")),
        ("http_500", "UNKNOWN", proxy("500 Internal Server Error")),
        ("http_502", "UNAVAILABLE", proxy("502 Bad Gateway")),
        ("http_503", "UNAVAILABLE", proxy("503 Service Unavailable")),
        ("http_504", "UNAVAILABLE", proxy("504 Gateway Timeout")),
        ("html_200", "UNKNOWN", proxy("200 OK")),
        ("status_in_503", "FAILED_PRECONDITION", "mine".into()),
        ("reset_refused", "UNAVAILABLE", reset("refused stream before processing any application logic")),
        ("reset_cancelled", "CANCELLED", reset("stream no longer needed")),
        ("reset_internal", "INTERNAL", reset("unexpected internal error encountered")),
        ("reset_calm", "RESOURCE_EXHAUSTED", reset("detected excessive load generating behavior")),
        ("two", "INTERNAL", "its answer has more than one message".into()),
        ("none", "INTERNAL", "its answer is OK but has no message".into()),
        (
            "compressed",
            "INTERNAL",
            "its message is compressed, but not by gzip (grpc-encoding), which was offered".into(),
        ),
        ("no_status", "UNKNOWN", "its answer ended without a grpc-status".into()),
        ("no_number", "UNKNOWN", "its grpc-status \"abc\" is not a gRPC status code: why".into()),
    ];
    for (name, ..) in &cases {
        register(&mut stage, name, &server.endpoint, 2).await;
    }
    register(&mut stage, "refused_once", &server.endpoint, 1).await;
    let cycle = stage.client.run().await.unwrap();
    for (name, code, message) in &cases {
        let attempts = match *code {
            // FAILED_PRECONDITION causes one initialization and another attempt.
            "UNAVAILABLE" | "FAILED_PRECONDITION" => 2,
            _ => 1,
        };
        assert_eq!(ended(&cycle, name), (FAILED, *code, &**message, attempts), "{name}");
    }
    // A call that was certainly not processed is repeated, which its record does not show.
    assert_eq!(ended(&cycle, "refused_once"), (SUCCEEDED, "", "", 1));
    assert_eq!(server.connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_call_that_a_restarting_server_has_not_processed_is_made_again() {
    let restarted = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let flag = restarted.clone();
    let mut servers = JoinSet::new();
    servers.spawn(async move {
        // The first connection answers Initialize, and closes without having processed RunCycle.
        let (mut socket, _) = listener.accept().await.unwrap();
        let settings = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &[0, 0, 0, 4, 1, 0, 0, 0, 0]].concat();
        socket.write_all(&settings).await.unwrap();
        let mut received = [0; 16 << 10];
        // UNIMPLEMENTED, as literals without indexing: RFC 7541, 6.2.2.
        let literal = |name: &str, value: &str| {
            let length = |text: &str| u8::try_from(text.len()).unwrap();
            [&[0, length(name)][..], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
        };
        let block = [&[0x88][..], &literal("content-type", "application/grpc"), &literal("grpc-status", "12")].concat();
        let mut seen = Vec::new();
        let headers_of =
            |bytes: &[u8], stream: u8| bytes.windows(6).any(|head| head[0] == 1 && head[2..] == [0, 0, 0, stream]);
        while !headers_of(&seen, 1) {
            let read = socket.read(&mut received).await.unwrap();
            seen.extend_from_slice(&received[..read]);
        }
        let length = u8::try_from(block.len()).unwrap();
        socket.write_all(&[&[0, 0, length, 1, 5, 0, 0, 0, 1][..], &block].concat()).await.unwrap();
        while !headers_of(&seen, 3) {
            let read = socket.read(&mut received).await.unwrap();
            seen.extend_from_slice(&received[..read]);
        }
        socket.write_all(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]).await.unwrap();
        let (second, _) = listener.accept().await.unwrap();
        flag.store(true, Ordering::Relaxed);
        serve(second, h2::server::Builder::new(), act(|_, respond| async { succeed(respond) })).await;
    });
    let mut stage = Stage::new().await;
    register(&mut stage, "a", &endpoint, 1).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(ended(&cycle, "a"), (SUCCEEDED, "", "", 1));
    assert!(restarted.load(Ordering::Relaxed));
}

#[tokio::test]
async fn invalid_fields_beside_a_status_change_neither_its_code_nor_its_text() {
    let server = Raw::start(act(|name, mut respond| async move {
        let bytes = |bytes: &'static [u8]| HeaderValue::from_bytes(bytes).unwrap();
        let (message, details) = match name.as_str() {
            "text" => (bytes(b"caf\xe9 %FF"), None),
            "details" => (bytes(b"gone"), Some(bytes(b"not base64!"))),
            _ => (bytes(b"gone"), Some(bytes(b"\xff\xfe"))),
        };
        let mut answer = grpc().header("grpc-status", "14").header("grpc-message", message);
        if let Some(details) = details {
            answer = answer.header("grpc-status-details-bin", details);
        }
        let _ = respond.send_response(answer.body(()).unwrap(), true);
    }))
    .await;
    let mut stage = Stage::at(Home::new().with_log_format("json")).await;
    for name in ["text", "details", "bytes"] {
        register(&mut stage, name, &server.endpoint, 2).await;
    }
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(ended(&cycle, "text"), (FAILED, "UNAVAILABLE", "caf\u{fffd} \u{fffd}", 2));
    for name in ["details", "bytes"] {
        assert_eq!(ended(&cycle, name), (FAILED, "UNAVAILABLE", "gone", 2));
    }
    // Every line of the log is still one of JSON.
    assert!(stage.home.log().lines().all(|line| line.starts_with('{')), "{}", stage.home.log());
}

#[tokio::test]
async fn conformance_reports_bad_details_as_a_finding() {
    let server = Raw::start(act(|_, mut respond| async move {
        let bad = HeaderValue::from_bytes(b"\xff not base64!").unwrap();
        let answer =
            grpc().header("grpc-status", "13").header("grpc-message", "told").header("grpc-status-details-bin", bad);
        let _ = respond.send_response(answer.body(()).unwrap(), true);
    }))
    .await;
    let checked = tokio::process::Command::new(env!("CARGO_BIN_EXE_orchestrator"))
        .args(["conformance", &server.endpoint, "--subsystem", "a", "--timeout", "2s"])
        .output();
    let checked = patiently("the verdict", checked).await.unwrap();
    let report = String::from_utf8_lossy(&checked.stdout);
    assert_eq!(checked.status.code(), Some(1), "{report}");
    assert!(report.contains("came      INTERNAL: told"), "{report}");
    assert!(checked.stderr.is_empty(), "{}", String::from_utf8_lossy(&checked.stderr));
}

// ---------------------------------------------------------------------------------------------------------------
// Other peers

#[tokio::test]
async fn another_protocol_is_named() {
    let mut stage = Stage::new().await;
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let tls = Fleet::behind_tls(Identity::from_pem(cert.pem(), signing_key.serialize_pem())).await;
    let (http1, _http1) = says(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
    let (ssh, _ssh) = says(b"SSH-2.0-OpenSSH_9.2p1\r\n").await;
    let (alert, _alert) = says(b"\x15\x03\x01\x00\x02\x02\x46").await;
    let (mute, _mute) = says(b"").await;
    let cases = [
        ("http1", format!("http://{http1}"), "it speaks HTTP/1, not gRPC (\"HTTP/1.1 400 Bad Request\")"),
        ("ssh", format!("http://{ssh}"), "it speaks SSH (\"SSH-2.0-OpenSSH_9.2p1\"); give the port of a gRPC server"),
        ("alert", format!("http://{alert}"), "it speaks TLS, so give https://"),
        ("tls", tls.endpoint().replace("https", "http"), "https://"),
        ("mute", format!("http://{mute}"), "it closed the connection before any HTTP/2"),
        ("plain", stage.fleet.endpoint().replace("http", "https"), "it does not speak TLS, so give http://"),
    ];
    for (name, endpoint, _) in &cases {
        register(&mut stage, name, endpoint, 1).await;
    }
    let cycle = stage.client.run().await.unwrap();
    for (name, _, words) in &cases {
        let (how, code, message, _) = ended(&cycle, name);
        assert_eq!((how, code), (FAILED, "UNAVAILABLE"), "{name}: {message}");
        assert!(message.contains(words), "{name}: {message}");
    }
}

#[tokio::test]
async fn a_silent_peer_takes_the_connect_timeout() {
    let (mute, _server) = other_server(|socket| async move {
        let _socket = socket;
        std::future::pending::<()>().await;
    })
    .await;
    let mut stage = Stage::at(Home::new().with_args(["--set", "dial.connect_timeout=300ms"])).await;
    for (name, scheme) in [("plain", "http"), ("tls", "https")] {
        register(&mut stage, name, &format!("{scheme}://{mute}"), 1).await;
    }
    let cycle = stage.client.run().await.unwrap();
    let silent = "Initialize: it accepted the connection and sent nothing within 300ms";
    assert_eq!(ended(&cycle, "plain"), (FAILED, "UNAVAILABLE", silent, 0));
    assert_eq!(ended(&cycle, "tls"), (FAILED, "UNAVAILABLE", "Initialize: no TLS handshake within 300ms", 0));
}

#[tokio::test]
async fn the_certificates_of_the_system_are_read_once() {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let identity = || Identity::from_pem(cert.pem(), signing_key.serialize_pem());
    let (first, second) = (Fleet::behind_tls(identity()).await, Fleet::behind_tls(identity()).await);
    let home = Home::new();
    let (trusted, nothing) = (home.path("system.pem"), home.path("nothing"));
    fs::write(&trusted, cert.pem()).unwrap();
    fs::create_dir(&nothing).unwrap();
    let system =
        [format!("SSL_CERT_FILE={}", trusted.display()), format!("SSL_CERT_DIR={}", nothing.display())].map(Into::into);
    let mut stage = Stage::at(home.with_wrapper(["env".to_owned()]).with_wrapper::<String>(system)).await;
    stage.client.register(registration("first", first.endpoint())).await.unwrap();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    fs::remove_file(&trusted).unwrap();
    stage.client.register(registration("second", second.endpoint())).await.unwrap();
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn lookups_that_hang_delay_neither_reads_nor_the_end() {
    // A name server that never answers, in a mount namespace of the service's own.
    let silent = std::net::UdpSocket::bind("127.0.0.1:53");
    let home = Home::new();
    let resolv = home.path("resolv.conf");
    fs::write(&resolv, "nameserver 127.0.0.1\noptions timeout:20 attempts:2\n").unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.display());
    let wrapper = ["unshare", "-rm", "sh", "-c", &script, "sh"].map(str::to_owned);
    let can = std::process::Command::new(&wrapper[0]).args(&wrapper[1..]).arg("true").output();
    if silent.is_err() || !can.is_ok_and(|it| it.status.success()) {
        eprintln!("SKIPPED: this takes port 53 of the loopback interface and a mount namespace");
        return;
    }
    let mut stage = Stage::at(home.with_wrapper(wrapper).with_args(["--set", "dial.connect_timeout=500ms"])).await;
    for i in 0..600 {
        register(&mut stage, &format!("hangs-{i}"), &format!("http://hangs-{i}.example:1"), 1).await;
    }
    let first = stage.client.run().await.unwrap();
    let no_address = "Initialize: can't find the address of hangs-0.example: no answer within 500ms";
    assert_eq!(ended(&first, "hangs-0"), (FAILED, "UNAVAILABLE", no_address, 0));
    // Every lookup hangs for 40 s more, but reads and the end of the process do not.
    patiently("the record", stage.client.cycle(first.cycle_id)).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(15), stage.service.stop()).await;
    assert!(ended.expect("it waits for lookups").success());
}

// ---------------------------------------------------------------------------------------------------------------
// Connections

#[tokio::test]
async fn concurrent_calls_stay_within_the_limit_of_the_peer_and_all_are_made() {
    const TAKEN: usize = 3;
    const SUBSYSTEMS: usize = 40;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (now, seen, names) = (running.clone(), most.clone(), order.clone());
    let full = Arc::new(Notify::new());
    let mut settings = h2::server::Builder::new();
    settings.max_concurrent_streams(u32::try_from(TAKEN).unwrap());
    let server = Raw::with(
        settings,
        act(move |name, respond| {
            let (now, seen, names, full) = (now.clone(), seen.clone(), names.clone(), full.clone());
            async move {
                names.lock().unwrap().push(name);
                seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                // The first calls wait until the allowed number is here.
                if now.load(Ordering::SeqCst) == TAKEN {
                    full.notify_waiters();
                } else if names.lock().unwrap().len() < TAKEN {
                    full.notified().await;
                }
                now.fetch_sub(1, Ordering::SeqCst);
                succeed(respond);
            }
        }),
    )
    .await;
    let mut stage = Stage::new().await;
    for i in 0..SUBSYSTEMS {
        register(&mut stage, &format!("s{i:02}"), &server.endpoint, 1).await;
    }
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded, "{}", cycle.error);
    assert_eq!(most.load(Ordering::SeqCst), TAKEN);
    assert_eq!(server.connections.load(Ordering::Relaxed), 1);
    assert_eq!(order.lock().unwrap().len(), SUBSYSTEMS);
}

/// On a clock that advances when all tasks wait, a call takes three hours. Servers of grpcio and grpc-go count pings,
/// and close connections with more than a few of them.
#[tokio::test(start_paused = true)]
async fn a_call_of_hours_works_without_pings() {
    let (address, _server) = other_server(|mut socket| async move {
        greet(&mut socket).await;
        let frames = async {
            loop {
                assert_ne!(next_frame(&mut socket).await.unwrap().0, PING);
            }
        };
        let _: Result<(), _> = tokio::time::timeout(Duration::from_hours(3), frames).await;
        let block =
            [&[0x88, 0, 11][..], b"grpc-status", &[1], b"5", &[0, 12], b"content-type", &[16], b"application/grpc"];
        socket.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block.concat())).await.unwrap();
        let _ = socket.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let spec = SubsystemSpec { name: "a".into(), endpoint: format!("http://{address}"), ..Default::default() };
    let subsystem = Subsystem::from_spec(&spec).unwrap();
    let callee = Callee { subsystem: &subsystem, owner: None };
    let (transport, clock) = (Arc::new(Sockets::default()), Clock::system());
    let dialer = Dialer::new(transport, Duration::from_hours(1), Memory::whole(1 << 20), clock);
    let call = RunCall {
        cycle_id: CycleId(1),
        epoch: Epoch(1),
        attempt: 1,
        scheduled_at: jiff::Timestamp::UNIX_EPOCH,
        parameters: Payload::default(),
        inputs: Vec::new(),
        timeout: Duration::from_hours(24),
        trace: None,
        path: None,
    };
    let error = dialer.run_cycle(callee, call).await.unwrap_err();
    assert_eq!(error.to_string(), "NOT_FOUND: ");
}

#[tokio::test]
async fn a_connection_is_made_when_it_is_used_and_again_when_it_is_lost() {
    let fleet = Fleet::start().await;
    let mut stage = Stage::new().await;
    register(&mut stage, "a", fleet.endpoint(), 1).await;
    assert_eq!(fleet.now(|state| state.connections), 0);
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
    fleet.run("a", Run::Disconnect);
    assert_eq!(ended(&stage.client.run().await.unwrap(), "a").1, "UNAVAILABLE");
    fleet.run("a", Run::Echo);
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn a_dead_process_of_many_subsystems_is_waited_for_once_in_a_cycle_and_the_running_one_is_told_from_the_others() {
    const SUBSYSTEMS: usize = 28;
    let (hangs, called) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
    let (hanging, calling) = (hangs.clone(), called.clone());
    let server = Raw::start(act(move |name, respond| {
        let hangs = name == "s03" && hanging.load(Ordering::Relaxed);
        let called = calling.clone();
        async move {
            if hangs {
                called.notify_one();
                std::future::pending::<()>().await;
            }
            succeed(respond);
        }
    }))
    .await;
    let mut stage = Stage::new().await;
    let names: Vec<_> = (0..SUBSYSTEMS).map(|number| format!("s{number:02}")).collect();
    for (number, name) in names.iter().enumerate() {
        let after = number.checked_sub(1).map(|before| names[before].clone());
        let after = after.into_iter().collect();
        let retry = Some(retried(3));
        let registration = pb::Registration { after, retry, ..registration(name, &server.endpoint) };
        stage.client.register(registration).await.unwrap();
    }
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);

    // It dies while s03 runs.
    hangs.store(true, Ordering::Relaxed);
    let mut client = stage.client.clone();
    let running = tokio::spawn(async move { client.run().await.unwrap() });
    patiently("the call of s03", called.notified()).await;
    drop(server);
    let cycle = patiently("the end of the cycle", running).await.unwrap();
    let refused = "can't connect: Connection refused (os error 111)";
    for name in &names[..3] {
        assert_eq!(ended(&cycle, name), (SUCCEEDED, "", "", 1));
    }
    let lost = format!("the connection was lost during the call: it closed the connection; {refused}");
    assert_eq!(ended(&cycle, "s03"), (FAILED, "UNAVAILABLE", &*lost, 3));
    let never_called =
        |first| format!("{refused}; no further attempt, since the endpoint refused {first} in this cycle as well");
    for name in &names[4..] {
        assert_eq!(ended(&cycle, name), (FAILED, "UNAVAILABLE", &*never_called("s03"), 1));
    }

    // It is still dead in the next cycle.
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(ended(&cycle, "s00"), (FAILED, "UNAVAILABLE", refused, 3));
    for name in &names[1..] {
        assert_eq!(ended(&cycle, name), (FAILED, "UNAVAILABLE", &*never_called("s00"), 1));
    }
}

/// Answers that are under way when their calls are cancelled arrive for streams that no longer exist. The HTTP/2
/// library closes a connection on a thousand such frames, unless it remembers the streams.
#[tokio::test]
async fn answers_to_many_cancelled_calls_do_not_end_the_connection() {
    const CALLS: usize = 1500;
    let (connections, begun) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Semaphore::new(0)));
    let (counted, begins) = (connections.clone(), begun.clone());
    let (address, _server) = other_server(move |mut socket| {
        let begins = begins.clone();
        let is_first = counted.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            greet(&mut socket).await;
            socket.write_all(&frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 24).to_be_bytes())).await.unwrap();
            let mut cancelled = Vec::new();
            while let Ok((kind, _, stream, _)) = next_frame(&mut socket).await {
                match kind {
                    HEADERS if is_first && cancelled.len() < CALLS => begins.add_permits(1),
                    HEADERS => succeed_by_hand(&mut socket, stream).await,
                    RST_STREAM => cancelled.push(stream),
                    _ => continue,
                }
                if kind == RST_STREAM && cancelled.len() == CALLS {
                    for stream in &cancelled {
                        succeed_by_hand(&mut socket, *stream).await;
                    }
                    begins.add_permits(1);
                }
            }
        }
    })
    .await;
    let spec = SubsystemSpec { name: "a".into(), endpoint: format!("http://{address}"), ..Default::default() };
    let subsystem = Subsystem::from_spec(&spec).unwrap();
    let callee = Callee { subsystem: &subsystem, owner: None };
    let (transport, clock) = (Arc::new(Sockets::default()), Clock::system());
    let dialer = Dialer::new(transport, Duration::from_secs(10), Memory::whole(1 << 30), clock);
    let call = || RunCall {
        cycle_id: CycleId(1),
        epoch: Epoch(1),
        attempt: 1,
        scheduled_at: jiff::Timestamp::UNIX_EPOCH,
        parameters: Payload::default(),
        inputs: Vec::new(),
        timeout: Duration::from_mins(1),
        trace: None,
        path: None,
    };
    let calls = futures_util::future::join_all((0..CALLS).map(|_| dialer.run_cycle(callee, call())));
    let all_begun = async { begun.acquire_many(CALLS.try_into().unwrap()).await.unwrap().forget() };
    tokio::select! {
        biased;
        () = all_begun => {}
        _ = calls => panic!("no call is answered"),
    }
    // All late answers were sent; they are read before that of the next call.
    patiently("all late answers to be sent", begun.acquire()).await.unwrap().forget();
    patiently("the next call to be answered", dialer.run_cycle(callee, call())).await.unwrap();
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}
