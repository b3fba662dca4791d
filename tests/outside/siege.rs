//! All loads at once that clients and subsystems can put on the memory and time of the service, while a healthy client
//! calls and its cycles have a deadline.
//!
//! `cargo test --test outside siege:: -- --ignored --nocapture` prints the figures. `ORCHESTRATOR_TEST_SIEGE_SECONDS`
//! sets the duration, 60 by default; `ORCHESTRATOR_TEST_SIEGE_CGROUP` names a directory of a memory cgroup with a
//! limit, in which the service then runs.

use std::{
    env,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::common::{
    fleet::{Fleet, Run},
    service::{Client, Home, Service, ms, part, registration},
};
use bytes::{BufMut, Bytes, BytesMut};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use orchestrator_core::proto::{orchestrator::v1 as pb, subsystem::v1 as sub};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};
use tonic::codegen::http::Request;

type Sender = http2::SendRequest<BoxBody<Bytes, std::io::Error>>;

/// The deadline of the healthy client's cycles.
const DEADLINE: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute, and its figures mean something only on a machine that does nothing else"]
async fn healthy_clients_are_served_while_others_take_all_they_can() {
    let home = Home::new().with_args(["--set", "cycle.deadline=1s", "--set", "log.filter=warn"]);
    let home = match env::var("ORCHESTRATOR_TEST_SIEGE_CGROUP") {
        Ok(cgroup) => home.with_wrapper([
            "sh".into(),
            "-c".into(),
            format!("echo $$ > {cgroup}/cgroup.procs && exec \"$0\" \"$@\""),
        ]),
        Err(_) => home,
    };
    let seconds = env::var("ORCHESTRATOR_TEST_SIEGE_SECONDS").map_or(60, |text| text.parse().unwrap());
    let mut service = home.serve().await;
    let mut client = service.client().await;
    let fleet = Fleet::behind(4).await;
    subsystems(&mut client, &fleet).await;

    let ends = Instant::now() + Duration::from_secs(seconds);
    let quiet = healthy(&service, Instant::now() + Duration::from_secs(5)).await;
    println!("in quiet: {quiet:?}; memory {}", memory(&service));
    let mut siege = JoinSet::new();
    let (address, admin) = (service.address(), service.admin());
    for i in 0..12 {
        siege.spawn(untaken_answers(address, i));
        siege.spawn(endless_messages(address, i));
        siege.spawn(announced_messages(address));
        siege.spawn(stalled_watchers(address, i));
    }
    siege.spawn(large_lists(address));
    siege.spawn(registrations(service.client().await, fleet.endpoint().to_owned()));
    siege.spawn(snapshots(admin));
    siege.spawn(idle_connections(address));
    siege.spawn(idle_connections(admin));
    let besieged = healthy(&service, ends).await;
    println!("besieged: {besieged:?}; memory {}", memory(&service));
    siege.abort_all();
    while siege.join_next().await.is_some() {}
    let after = healthy(&service, Instant::now() + Duration::from_secs(5)).await;
    println!("afterwards: {after:?}; memory {}", memory(&service));

    service.signal(rustix::process::Signal::TERM);
    assert!(service.ended().await.success(), "{}", home.log());
    for figures in [&quiet, &besieged, &after] {
        assert!(figures.calls > 0 && figures.cycles > 0 && figures.refused == 0, "{figures:?}");
        // The deadline of a cycle holds, by its own record.
        assert!(figures.latest_end <= DEADLINE + Duration::from_millis(250), "{figures:?}");
    }
}

fn memory(service: &Service) -> String {
    let (now, most) = service.memory();
    format!("{} MiB now, {} MiB at most", now >> 20, most >> 20)
}

// ---------------------------------------------------------------------------------------------------------------
// The healthy client

#[derive(Debug, Default)]
struct Figures {
    calls: usize,
    median: Duration,
    p99: Duration,
    worst: Duration,
    cycles: usize,
    refused: usize,
    /// The latest end of a cycle, after its start.
    latest_end: Duration,
}

/// Asks for the status and runs cycles repeatedly, on connections of its own.
async fn healthy(service: &Service, ends: Instant) -> Figures {
    const ENOUGH: usize = 10;
    let mut figures = Figures::default();
    let mut client = service.client().await;
    let mut took = Vec::new();
    while Instant::now() < ends && figures.refused < ENOUGH {
        for _ in 0..20 {
            let asked = Instant::now();
            match client.status().await {
                Ok(_) => took.push(asked.elapsed()),
                Err(status) => {
                    println!("the healthy client's status is refused: {status}");
                    figures.refused += 1;
                }
            }
            sleep(Duration::from_millis(5)).await;
        }
        match client.run().await {
            Ok(cycle) => {
                figures.cycles += 1;
                figures.latest_end = figures.latest_end.max(Duration::from_secs_f64(cycle.duration_ms / 1e3));
                let healthy = part(&cycle, "healthy");
                if healthy.state() != pb::SubsystemState::Succeeded {
                    println!("the healthy subsystem has {}: {}", healthy.state().as_str_name(), healthy.error_message);
                    figures.refused += 1;
                }
            }
            Err(status) => {
                println!("the healthy client's cycle is refused: {status}");
                figures.refused += 1;
            }
        }
    }
    took.sort();
    figures.calls = took.len();
    if let (Some(median), Some(worst)) = (took.get(took.len() / 2), took.last()) {
        (figures.median, figures.p99, figures.worst) = (*median, took[took.len() * 99 / 100], *worst);
    }
    figures
}

/// Registers a healthy subsystem, and others whose answers are as large as possible.
async fn subsystems(client: &mut Client, fleet: &Fleet) {
    let issue = sub::Issue { severity: 0, code: String::new(), message: String::new() };
    let empty_issues = sub::RunCycleResponse { issues: vec![issue; 2 << 20], ..sub::RunCycleResponse::default() };
    let text = sub::Issue { severity: 2, code: "LARGE".into(), message: "x".repeat(100 << 10) };
    let large_issues = sub::RunCycleResponse { issues: vec![text; 30], ..sub::RunCycleResponse::default() };
    let limits = Some(pb::Limits { max_message_bytes: 64 << 20, max_issues: 1024, ..pb::Limits::default() });
    client.register(registration("healthy", fleet.endpoint())).await.unwrap();
    for i in 0..4 {
        for (kind, run) in [
            ("empty", Run::Raw(empty_issues.encode_to_vec().into())),
            ("large", Run::Answer(large_issues.clone())),
            ("output", Run::large_output(8 << 20)),
            ("hangs", Run::Hang),
        ] {
            let name = format!("{kind}{i}");
            fleet.run(&name, run);
            let registration = pb::Registration {
                limits,
                timeout: ms(800),
                breaker: Some(pb::BreakerPolicy { disabled: true, ..pb::BreakerPolicy::default() }),
                ..registration(&name, &fleet.endpoints()[1 + i % 3])
            };
            client.register(registration).await.unwrap();
        }
    }
    // A history with records of the largest size.
    client.run().await.unwrap();
}

// ---------------------------------------------------------------------------------------------------------------
// The others

/// A connection whose answers are not read.
async fn connect(address: SocketAddr) -> Option<Sender> {
    let stream = TcpStream::connect(address).await.ok()?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(0)
        .handshake(TokioIo::new(stream))
        .await
        .ok()?;
    tokio::spawn(connection);
    Some(sender)
}

fn call(path: &str, body: BoxBody<Bytes, std::io::Error>) -> Request<BoxBody<Bytes, std::io::Error>> {
    Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap()
}

fn framed(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(message.len().try_into().unwrap());
    framed.put_slice(message);
    framed.freeze()
}

/// A body of these bytes. Unless it `ends`, it stays open without further bytes.
fn body(bytes: Bytes, ends: bool) -> BoxBody<Bytes, std::io::Error> {
    use futures_util::{StreamExt, stream};
    let first = stream::iter([Ok(Frame::data(bytes))]);
    if ends {
        BoxBody::new(StreamBody::new(first))
    } else {
        BoxBody::new(StreamBody::new(first.chain(stream::pending())))
    }
}

/// Keeps the largest number of calls open that one connection may have, and replaces calls that have ended.
async fn keep_open(address: SocketAddr, path: &'static str, make: impl Fn() -> BoxBody<Bytes, std::io::Error>) {
    const CALLS: usize = 200;
    loop {
        let Some(sender) = connect(address).await else {
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let mut calls = JoinSet::new();
        for _ in 0..CALLS {
            let mut sender = sender.clone();
            let request = call(path, make());
            calls.spawn(async move {
                if sender.ready().await.is_ok()
                    && let Ok(answer) = sender.send_request(request).await
                {
                    let mut body = answer.into_body();
                    while let Some(Ok(_)) = body.frame().await {}
                }
            });
        }
        while calls.join_next().await.is_some() {}
    }
}

/// Requests the largest records, and descriptions, and does not read them.
async fn untaken_answers(address: SocketAddr, i: usize) {
    let request = pb::GetCycleRequest { cycle_id: 1 }.encode_to_vec();
    if i.is_multiple_of(2) {
        keep_open(address, "/dreamnet.orchestrator.v1.Orchestrator/GetCycle", || body(framed(&request), true)).await;
    }
    // `file_containing_symbol`
    let symbol = b"dreamnet.orchestrator.v1.Orchestrator";
    let mut request = vec![0x22, u8::try_from(symbol.len()).unwrap()];
    request.extend(symbol);
    let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    keep_open(address, path, || body(framed(&request), false)).await;
}

/// Sends a message of 4 MiB that never ends, to RPCs with small messages.
async fn endless_messages(address: SocketAddr, i: usize) {
    let path = match i % 2 {
        0 => "/grpc.health.v1.Health/Check",
        _ => "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    };
    let mut bytes = framed(&vec![0; 4 << 20]).to_vec();
    bytes.truncate(4 << 20);
    let bytes = Bytes::from(bytes);
    keep_open(address, path, || body(bytes.clone(), false)).await;
}

/// Announces messages of just under 4 MiB.
async fn announced_messages(address: SocketAddr) {
    let announced = Bytes::from_static(&[0, 0, 0x3f, 0xff, 0xff, 0]);
    keep_open(address, "/dreamnet.orchestrator.v1.Orchestrator/GetStatus", || body(announced.clone(), false)).await;
}

/// Watches from the beginning, every second watcher with a filter of many names, and does not read.
async fn stalled_watchers(address: SocketAddr, i: usize) {
    let subsystems = if i.is_multiple_of(2) { Vec::new() } else { (0..200_000).map(|i| format!("s{i}")).collect() };
    let request = pb::WatchCyclesRequest { from_oldest: true, subsystems, ..pb::WatchCyclesRequest::default() };
    let request = framed(&request.encode_to_vec());
    keep_open(address, "/dreamnet.orchestrator.v1.Orchestrator/WatchCycles", || body(request.clone(), true)).await;
}

/// Sends lists with the largest number of entries that a message can hold.
async fn large_lists(address: SocketAddr) {
    // Field 3 of `ListCyclesRequest`, packed, and field 1 of `PlanCycleRequest`, empty and repeated.
    let mut states = vec![0x1a];
    prost::encoding::encode_varint(4_000_000, &mut states);
    states.resize(states.len() + 4_000_000, 1);
    let names = [0x0a, 0].repeat(2_000_000);
    let (states, names) = (framed(&states), framed(&names));
    let lists = keep_open(address, "/dreamnet.orchestrator.v1.Orchestrator/ListCycles", || body(states.clone(), true));
    let plans = keep_open(address, "/dreamnet.orchestrator.v1.Orchestrator/PlanCycle", || body(names.clone(), true));
    tokio::join!(lists, plans);
}

/// Registers and unregisters subsystems with an order.
async fn registrations(mut client: Client, endpoint: String) {
    for i in 0_u64.. {
        let name = format!("chain{}", i % 500);
        let after = vec![format!("chain{}", (i % 500) + 1)];
        let registration = pb::Registration { after, ..registration(&name, &endpoint) };
        _ = client.register(registration).await;
        _ = client.suspend_subsystem(pb::SuspendSubsystemRequest { name }).await;
    }
}

/// Requests snapshots of subsystems that hang.
async fn snapshots(admin: SocketAddr) {
    let ask = || async move {
        loop {
            if let Ok(mut stream) = TcpStream::connect(admin).await {
                let request =
                    b"GET /api/status?includeSnapshots=true HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
                if stream.write_all(request).await.is_ok() {
                    _ = stream.read_to_end(&mut Vec::new()).await;
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let mut asking = JoinSet::new();
    for _ in 0..16 {
        asking.spawn(ask());
    }
    while asking.join_next().await.is_some() {}
}

/// Connects, sends the preface of a protocol, and stays idle, on as many connections as possible.
async fn idle_connections(address: SocketAddr) {
    const CONNECTIONS: usize = 5_000;
    let mut open = std::collections::VecDeque::new();
    loop {
        if let Ok(mut stream) = TcpStream::connect(address).await {
            _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
            open.push_back(stream);
        }
        if open.len() > CONNECTIONS {
            open.pop_front();
            sleep(Duration::from_millis(10)).await;
        }
    }
}
