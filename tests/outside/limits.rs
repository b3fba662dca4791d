//! What each caller may use while rights are enforced, how long strangers may stay, and what other processes can see of
//! the service.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    time::Duration,
};

#[cfg(target_os = "linux")]
use crate::common::disk;
use crate::common::{
    fleet::{Fleet, Run},
    http::send,
    patiently,
    service::{Client, Home, Service, because, ms, reason, registration},
    tokens::write_tokens,
};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use h2::{
    SendStream,
    client::{ResponseFuture, SendRequest},
};
use orchestrator_core::proto::orchestrator::v1 as pb;
use rustix::process::geteuid;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinHandle, yield_now},
};
use tonic::{Code, Request, Status, codegen::http};

/// A service with a token for each of these callers, who may do everything, and with limits of them.
struct Stage {
    home: Home,
    service: Service,
    texts: BTreeMap<String, String>,
}

impl Stage {
    async fn with(limits: &str) -> Self {
        Self::at(Home::new().in_memory(), limits).await
    }

    async fn at(home: Home, limits: &str) -> Self {
        let texts = write_tokens(&home.path("tokens.toml"), &["a", "b"]);
        let texts = texts.into_iter().map(|(name, (_, text))| (name, text)).collect();
        let config = config(&home, limits);
        let home = home.with_config(&config);
        let service = home.serve().await;
        Self { home, service, texts }
    }

    /// A request of this caller.
    fn of<T>(&self, name: &str, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.texts[name]).parse().unwrap());
        request
    }

    async fn status(&self, client: &mut Client, name: &str) -> Result<(), Status> {
        patiently("a status", client.get_status(self.of(name, pb::GetStatusRequest::default()))).await.map(drop)
    }
}

fn config(home: &Home, limits: &str) -> String {
    let tokens = home.path("tokens.toml");
    format!(
        "[access]\nmode = \"enforce\"\ntokens_file = '{}'\n\
         [[access.grants]]\nwho = [\"token:*\"]\nrole = \"admin\"\n\
         [limits]\n{limits}\n",
        tokens.display()
    )
}

/// Waits until a call is not refused any more.
async fn accepted(mut call: impl AsyncFnMut() -> Result<(), Status>) {
    let accepted = async { while call().await.is_err() {} };
    patiently("the end of another call to be seen", accepted).await;
}

#[tokio::test]
async fn a_caller_that_reaches_a_limit_is_refused_and_others_are_not() {
    let stage = Stage::with("watchers = 1\nconcurrent_calls = 2").await;
    let (mut client, mut another) = (stage.service.client().await, stage.service.client().await);
    let limit = |key: &str, max: &str| because(Code::ResourceExhausted, "CALLER_LIMIT", [("limit", key), ("max", max)]);

    let mut watch = async |name| {
        let request = stage.of(name, pb::WatchCyclesRequest::default());
        another.watch_cycles(request).await.map(tonic::Response::into_inner)
    };
    let first = watch("a").await.unwrap();
    let refused = watch("a").await.unwrap_err();
    assert_eq!(reason(&refused), limit("limits.watchers", "1"));
    assert_eq!(
        refused.message(),
        "token:a has reached the limit of 1 open watch for each caller (limits.watchers); end one of them first"
    );
    let _of_b = watch("b").await.unwrap();
    drop(first);
    accepted(async || watch("a").await.map(drop)).await;

    let fleet = Fleet::start().await;
    fleet.run("held", Run::Hold);
    let leased = pb::RegisterSubsystemRequest {
        registration: Some(registration("held", fleet.endpoint())),
        lease: ms(3_600_000),
    };
    client.register_subsystem(stage.of("a", leased)).await.unwrap();
    let running: Vec<_> = (0..2)
        .map(|_| {
            let (mut client, request) = (client.clone(), stage.of("a", pb::RunCycleRequest::default()));
            tokio::spawn(async move { client.run_cycle(request).await.map(drop) })
        })
        .collect();
    let both = async {
        loop {
            let status = client.get_status(stage.of("b", pb::GetStatusRequest::default())).await.unwrap().into_inner();
            let status = status.status.unwrap();
            if status.running_cycles.len() + status.queued_cycles as usize == 2 {
                break;
            }
            yield_now().await;
        }
    };
    patiently("two open calls", both).await;
    let refused = stage.status(&mut client, "a").await.unwrap_err();
    assert_eq!(reason(&refused), limit("limits.concurrent_calls", "2"));
    // Also at the other address.
    let bearer = format!("Authorization: Bearer {}", stage.texts["a"]);
    let answer = send(stage.service.admin(), "GET /api/status", &["Host: localhost", &bearer]).await;
    assert_eq!(answer.status, 429);
    assert_eq!(answer.json().await["error"]["reason"], "CALLER_LIMIT");
    let renewal = pb::RenewLeaseRequest { name: "held".into() };
    client.renew_lease(stage.of("a", renewal)).await.unwrap();
    fleet.run("held", Run::Echo);
    for call in running {
        patiently("the end of a cycle", call).await.unwrap().unwrap();
    }
    stage.status(&mut client, "a").await.unwrap();
    stage.home.logged("a caller has reached a limit", 1).await;
}

#[tokio::test]
async fn a_caller_that_calls_too_often_is_refused_once_a_reload_limits_it() {
    let stage = Stage::with("").await;
    let mut client = stage.service.client().await;
    for _ in 0..10 {
        stage.status(&mut client, "a").await.unwrap();
    }
    fs::write(stage.home.path("orchestrator.toml"), config(&stage.home, "calls_per_second = 1")).unwrap();
    let refused = async {
        loop {
            if let Err(refused) = stage.status(&mut client, "a").await {
                return refused;
            }
        }
    };
    let refused = patiently("a refusal", refused).await;
    let limit = [("limit", "limits.calls_per_second"), ("max", "1")];
    assert_eq!(reason(&refused), because(Code::ResourceExhausted, "CALLER_LIMIT", limit));
    accepted(async || stage.status(&mut client, "a").await).await;
}

/// A bare connection.
struct Bare {
    send: SendRequest<Bytes>,
    open: JoinHandle<()>,
}

impl Bare {
    async fn connect(service: &Service) -> Self {
        let stream = TcpStream::connect(service.address()).await.unwrap();
        let (send, connection) = patiently("a connection", h2::client::handshake(stream)).await.unwrap();
        Self { send, open: tokio::spawn(async move { drop(connection.await) }) }
    }

    /// Sends the headers of a request.
    async fn begin(&self, path: &str, token: Option<&str>) -> (ResponseFuture, SendStream<Bytes>) {
        let mut request = http::Request::post(format!("http://localhost{path}"));
        request = request.header("content-type", "application/grpc");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut send = patiently("a stream", self.send.clone().ready()).await.unwrap();
        send.send_request(request.body(()).unwrap(), false).unwrap()
    }

    /// Sends the headers of a request, and waits until the service has read them: requests on one connection begin in
    /// their order.
    async fn begun(&self, path: &str, token: Option<&str>) -> (ResponseFuture, SendStream<Bytes>) {
        let begun = self.begin(path, token).await;
        self.call(HEALTH, None).await;
        begun
    }

    /// Sends an empty message, and returns the code of the answer.
    async fn call(&self, path: &str, token: Option<&str>) -> i32 {
        let (response, mut body) = self.begin(path, token).await;
        body.send_data(Bytes::from_static(&[0; 5]), true).unwrap();
        let response = patiently("an answer", response).await.unwrap();
        let code = |headers: &http::HeaderMap| headers.get("grpc-status")?.to_str().unwrap().parse().ok();
        if let Some(code) = code(response.headers()) {
            return code;
        }
        let mut body = response.into_body();
        while let Some(data) = body.data().await {
            body.flow_control().release_capacity(data.unwrap().len()).unwrap();
        }
        code(&body.trailers().await.unwrap().unwrap()).unwrap()
    }
}

const HEALTH: &str = "/grpc.health.v1.Health/Check";
const STATUS: &str = "/dreamnet.orchestrator.v1.Orchestrator/GetStatus";

/// Begins requests and does not end them, until another call is refused. Its first refusal, and those requests.
async fn held<const N: usize>(
    begin: impl AsyncFn() -> (ResponseFuture, SendStream<Bytes>),
    mut call: impl AsyncFnMut() -> Result<(), Status>,
) -> (Status, Vec<(ResponseFuture, SendStream<Bytes>)>) {
    let refused = async {
        let mut held = Vec::new();
        loop {
            // One that arrives during another call may be the one that is refused.
            held.retain_mut(|(answer, _): &mut (ResponseFuture, _)| answer.now_or_never().is_none());
            while held.len() < N {
                held.push(begin().await);
            }
            if let Err(refused) = call().await {
                return (refused, held);
            }
        }
    };
    patiently("a refusal", refused).await
}

/// The first refusal of a call that is made again and again.
async fn refused(mut call: impl AsyncFnMut() -> Result<(), Status>) -> Status {
    let refused = async {
        loop {
            if let Err(refused) = call().await {
                return refused;
            }
        }
    };
    patiently("a refusal", refused).await
}

#[tokio::test]
async fn a_request_counts_as_a_call_of_its_caller_while_it_arrives() {
    let stage = Stage::with("concurrent_calls = 2\nhistory_reads = 1").await;
    let (client, slow) = (stage.service.client().await, Bare::connect(&stage.service).await);
    let limit = |key: &str, max: &str| because(Code::ResourceExhausted, "CALLER_LIMIT", [("limit", key), ("max", max)]);
    let token = stage.texts["a"].as_str();
    let begin = async |method: &str| {
        let path = format!("/dreamnet.orchestrator.v1.Orchestrator/{method}");
        slow.begun(&path, Some(token)).await
    };

    let list = async || {
        let request = stage.of("a", pb::ListCyclesRequest::default());
        client.clone().list_cycles(request).await.map(drop)
    };
    let (status, read) = held::<1>(async || begin("GetCycle").await, list).await;
    assert_eq!(reason(&status), limit("limits.history_reads", "1"));
    client.clone().list_cycles(stage.of("b", pb::ListCyclesRequest::default())).await.unwrap();
    stage.status(&mut client.clone(), "a").await.unwrap();

    let call = async || stage.status(&mut client.clone(), "a").await;
    let (status, call) = held::<1>(async || begin("GetStatus").await, call).await;
    assert_eq!(reason(&status), limit("limits.concurrent_calls", "2"));
    stage.status(&mut client.clone(), "b").await.unwrap();

    let renew = async || {
        let renewed = client.clone().renew_lease(stage.of("a", pb::RenewLeaseRequest { name: "x".into() })).await;
        renewed.map(drop).or_else(|status| if status.code() == Code::NotFound { Ok(()) } else { Err(status) })
    };
    let (status, renewals) = held::<2>(async || begin("RenewLease").await, renew).await;
    assert_eq!(reason(&status), limit("limits.concurrent_calls", "2"), "as many renewals");
    drop((read, call, renewals));
    accepted(async || stage.status(&mut client.clone(), "a").await).await;
    accepted(renew).await;
}

#[tokio::test]
async fn requests_that_never_end_give_way_to_other_calls_of_their_caller() {
    let stage = Stage::with("concurrent_calls = 2").await;
    let (client, slow) = (stage.service.client().await, Bare::connect(&stage.service).await);
    let token = Some(stage.texts["a"].as_str());
    let renew = async || {
        let renewed = client.clone().renew_lease(stage.of("a", pb::RenewLeaseRequest { name: "x".into() })).await;
        renewed.map(drop).or_else(|status| if status.code() == Code::NotFound { Ok(()) } else { Err(status) })
    };
    let mut open: Vec<(ResponseFuture, SendStream<Bytes>)> = Vec::new();
    let gave_way = async {
        loop {
            while open.len() < 2 {
                open.push(slow.begun("/dreamnet.orchestrator.v1.Orchestrator/RenewLease", token).await);
            }
            let _ = renew().await;
            for at in (0..open.len()).rev() {
                let Some(answer) = (&mut open[at].0).now_or_never() else { continue };
                let answer = answer.unwrap();
                let message = answer.headers()["grpc-message"].to_str().unwrap().replace("%20", " ");
                if message.contains("gave way") {
                    return (at, message);
                }
                drop(open.remove(at));
            }
        }
    };
    let (at, message) = patiently("a request to give way", gave_way).await;
    assert_eq!(
        (at, message.as_str()),
        (
            0,
            "token:a has reached the limit of 2 open renewals of leases for each caller (limits.concurrent_calls); the \
             request of this call did not arrive, so it gave way to another call"
        )
    );
    accepted(renew).await;
    assert!((&mut open[1].0).now_or_never().is_none(), "there is room beside it");
    stage.home.logged("a caller has reached a limit", 1).await;
}

#[tokio::test]
async fn bodies_that_never_end_give_way_to_other_calls_of_their_caller() {
    let stage = Stage::with("concurrent_calls = 2").await;
    let client = stage.service.client().await;
    let head = format!(
        "POST /api/loops/pause HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: \
         application/json\r\nContent-Length: 9\r\nConnection: close\r\n\r\n{{",
        stage.texts["a"]
    );
    let mut open = Vec::new();
    let gave_way = async {
        loop {
            while open.len() < 2 {
                let mut stream = TcpStream::connect(stage.service.admin()).await.unwrap();
                stream.write_all(head.as_bytes()).await.unwrap();
                open.push(stream);
            }
            let _ = stage.status(&mut client.clone(), "a").await;
            let answered = open.iter().position(|stream| stream.peek(&mut [0]).now_or_never().is_some());
            if let Some(answered) = answered {
                let mut answer = String::new();
                open.remove(answered).read_to_string(&mut answer).await.unwrap();
                // It may also have met a status that was still open.
                if answer.contains("gave way") {
                    return answer;
                }
            }
        }
    };
    let answer = patiently("a request to give way", gave_way).await;
    assert!(answer.starts_with("HTTP/1.1 429") && answer.contains("so it gave way to another call"), "{answer}");
    assert!(answer.contains("\"reason\":\"CALLER_LIMIT\""), "{answer}");
    accepted(async || stage.status(&mut client.clone(), "a").await).await;
}

#[tokio::test]
async fn streams_of_reflection_are_limited_for_each_caller() {
    const REFLECT: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let stage = Stage::with("concurrent_calls = 2").await;
    let connection = Bare::connect(&stage.service).await;
    let open = async |name: &str| {
        let (answer, body) = connection.begin(REFLECT, Some(stage.texts[name].as_str())).await;
        let answer = patiently("an answer", answer).await.unwrap();
        let refused = answer.headers().get("grpc-status").map(|code| code.to_str().unwrap().to_owned());
        refused.map_or(Ok((answer, body)), Err)
    };
    let mut held = vec![open("a").await.unwrap(), open("a").await.unwrap()];
    assert_eq!(open("a").await.unwrap_err(), (Code::ResourceExhausted as i32).to_string());
    open("b").await.unwrap();
    stage.status(&mut stage.service.client().await, "a").await.unwrap();
    held.pop();
    let opened = async { while open("a").await.is_err() {} };
    patiently("the end of the first stream to be seen", opened).await;
}

#[tokio::test]
async fn connections_whose_requests_never_end_give_way_to_others() {
    const MAX: usize = 6;
    let home = Home::new().in_memory().with_args(["--set", &format!("server.max_connections={MAX}")]);
    let stage = Stage::at(home, "").await;
    let token = stage.texts["a"].as_str();
    let mut held = Vec::new();
    for _ in 0..MAX {
        let connection = Bare::connect(&stage.service).await;
        let (answer, mut body) = connection.begin(STATUS, Some(token)).await;
        body.send_data(Bytes::from_static(&[0, 0, 0, 0, 5]), false).unwrap();
        held.push((connection, answer, body));
    }
    let mut client = stage.service.client().await;
    stage.status(&mut client, "b").await.unwrap();
    // Not because these requests took too long.
    let answers = held.iter_mut().map(|(_, answer, _)| answer.now_or_never());
    assert!(!answers.flatten().any(|answer| answer.is_ok()), "a request that never ends was answered");
    assert!(held.iter().any(|(connection, ..)| connection.open.is_finished()), "no connection was closed");
}

#[tokio::test]
async fn calls_of_health_keep_no_other_calls_out() {
    const MAX: usize = 8;
    let home = Home::new().in_memory().with_args(["--set", &format!("server.max_streams={MAX}")]);
    let stage = Stage::at(home, "").await;
    let token = Some(stage.texts["a"].as_str());
    let watcher = Bare::connect(&stage.service).await;
    let mut watches = Vec::new();
    for _ in 0..MAX + 2 {
        let (answer, mut body) = watcher.begin("/grpc.health.v1.Health/Watch", None).await;
        body.send_data(Bytes::from_static(&[0; 5]), true).unwrap();
        watches.push(patiently("an answer", answer).await.unwrap());
    }
    let refused = watches.iter().filter(|answer| answer.headers().contains_key("grpc-status")).count();
    assert!((1..MAX).contains(&(watches.len() - refused)), "{refused} are refused");
    let caller = Bare::connect(&stage.service).await;
    let _first = caller.begin(STATUS, token).await;
    let _second = caller.begin(STATUS, token).await;
    assert_eq!(caller.call(STATUS, token).await, 0);
    // A probe on a connection of its own is answered.
    assert_eq!(Bare::connect(&stage.service).await.call("/grpc.health.v1.Health/Check", None).await, 0);
}

#[tokio::test]
async fn changes_of_a_caller_are_limited_and_calls_that_change_nothing_do_not_count() {
    /// Those of 2,000 seconds.
    const CHANGES: u16 = 2000;
    /// So that few commits take many of them.
    const AT_ONCE: usize = 200;
    let stage = Stage::with("changes_per_second = 1").await;
    let client = stage.service.client().await;
    let register = |caller: &'static str, port: u16| {
        let registration = registration("s", &format!("http://127.0.0.1:{port}"));
        let request = pb::RegisterSubsystemRequest { registration: Some(registration), lease: None };
        let (mut client, request) = (client.clone(), stage.of(caller, request));
        async move { client.register_subsystem(request).await.map(drop) }
    };
    register("b", 1).await.unwrap();
    let unchanged: Vec<_> = stream::iter(0..100).map(|_| register("a", 1)).buffer_unordered(AT_ONCE).collect().await;
    assert!(unchanged.iter().all(Result::is_ok), "{unchanged:?}");
    let changes = stream::iter(0..CHANGES).map(|number| register("a", 1000 + number));
    let changed: Vec<_> = changes.buffer_unordered(AT_ONCE).collect().await;
    assert!(changed.iter().all(Result::is_ok), "{changed:?}");
    let mut port = 10_000;
    let status = refused(async || {
        port += 1;
        register("a", port).await
    });
    let status = status.await;
    let limit = [("limit", "limits.changes_per_second"), ("max", "1")];
    assert_eq!(reason(&status), because(Code::ResourceExhausted, "CALLER_LIMIT", limit));
    assert_eq!(
        status.message(),
        "token:a has reached the limit of 1 change in a second, on average, for each caller \
         (limits.changes_per_second); change less often, or register many subsystems in one call"
    );
    register("b", 1).await.unwrap();
    stage.status(&mut client.clone(), "a").await.unwrap();
}

/// Calls end by their deadline here, as they do when their caller leaves.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn calls_that_are_aborted_before_they_change_something_do_not_count() {
    /// More than a caller may make at once.
    const CALLS: usize = 2100;
    let stage = Stage::at(disk::home(), "changes_per_second = 1").await;
    let client = stage.service.client().await;
    let register = |caller: &'static str, name: &str, within: Option<Duration>| {
        let registration = registration(name, "http://127.0.0.1:1");
        let request = pb::RegisterSubsystemRequest { registration: Some(registration), lease: None };
        let (mut client, mut request) = (client.clone(), stage.of(caller, request));
        if let Some(within) = within {
            request.set_timeout(within);
        }
        async move { client.register_subsystem(request).await.map(drop) }
    };
    register("a", "s", None).await.unwrap();
    let (mut aborted, mut round) = (0, 0);
    while aborted < CALLS {
        // One change has its turn until the disk answers, and the others wait for theirs.
        disk::hangs(&stage.home);
        let first = tokio::spawn(register("b", &format!("s{round}"), None));
        let waiting = stream::iter(0..500).map(|_| register("a", "s", Some(Duration::from_millis(50))));
        let waited: Vec<_> = waiting.buffer_unordered(100).collect().await;
        disk::comes_back(&stage.home);
        let _ = patiently("the first change", first).await.unwrap();
        let is_late = |ended: &&Result<(), Status>| {
            // The client may be the first to see that it is.
            ended.as_ref().is_err_and(|status| matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled))
        };
        aborted += waited.iter().filter(is_late).count();
        round += 1;
    }
    register("a", "new", None).await.unwrap();
}

#[tokio::test]
async fn renewals_of_a_caller_are_limited_by_themselves() {
    let stage = Stage::with("calls_per_second = 1\nrenewals_per_second = 50").await;
    let client = stage.service.client().await;
    let renew = |_| {
        let (mut client, request) = (client.clone(), stage.of("a", pb::RenewLeaseRequest { name: "x".into() }));
        async move { client.renew_lease(request).await.unwrap_err() }
    };
    let refused = stream::iter(0..).map(renew).buffered(50);
    let limited = refused.skip_while(|status| std::future::ready(status.code() == Code::NotFound));
    let mut limited = std::pin::pin!(limited);
    let status = patiently("a refusal", limited.next()).await.unwrap();
    let limit = [("limit", "limits.renewals_per_second"), ("max", "50")];
    assert_eq!(reason(&status), because(Code::ResourceExhausted, "CALLER_LIMIT", limit));
}

/// The data of requests may be on its way when they are refused. The library closes a connection on 256 errors.
#[tokio::test]
async fn a_connection_stays_open_while_many_calls_on_it_are_refused() {
    const STREAMS: u32 = 200;
    const ROUNDS: u32 = 5;
    /// Round trips before the data is sent: a refusal that does not wait for the data has arrived by then.
    const PINGS: u32 = 10;
    let stage = Stage::with("").await;
    let mut connection = TcpStream::connect(stage.service.address()).await.unwrap();
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "localhost"),
        (":path", STATUS),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    // Literals that are not indexed (RFC 7541, 6.2.2).
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    let headers: Vec<u8> =
        headers.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect();
    let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    hello.extend(frame(4, 0, 0, &[]));
    connection.write_all(&hello).await.unwrap();
    let mut answered = 0;
    for round in 0..ROUNDS {
        let streams = (0..STREAMS).map(|number| 2 * (round * STREAMS + number) + 1);
        let begin: Vec<u8> = streams.clone().flat_map(|stream| frame(1, 4, stream, &headers)).collect();
        let data: Vec<u8> = streams.flat_map(|stream| frame(0, 1, stream, &[0; 5])).collect();
        let ping = frame(6, 0, 0, &[0; 8]);
        connection.write_all(&[begin, ping.clone()].concat()).await.unwrap();
        let mut pings = 0;
        while answered < (round + 1) * STREAMS || pings < PINGS {
            let mut head = [0; 9];
            patiently("a frame", connection.read_exact(&mut head)).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            patiently("its payload", connection.read_exact(&mut payload)).await.unwrap();
            match (head[3], head[4]) {
                (6, 1) => {
                    pings += 1;
                    let next = if pings < PINGS { &ping } else { &data };
                    connection.write_all(next).await.unwrap();
                }
                (1, flags) if flags & 1 == 1 => answered += 1,
                (7, _) => panic!("the connection was closed: {}", String::from_utf8_lossy(&payload)),
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn a_stranger_is_disconnected_and_a_caller_or_a_probe_is_not() {
    const WHO: &str = "/dreamnet.orchestrator.v1.Access/WhoAmI";
    let stage = Stage::with("").await;
    let token = stage.texts["a"].as_str();
    let mut each = Vec::new();
    for _ in 0..4 {
        each.push(Bare::connect(&stage.service).await);
    }
    let [silent, refused, probe, caller] = <[Bare; 4]>::try_from(each).ok().unwrap();
    assert_eq!(refused.call(WHO, None).await, Code::Unauthenticated as i32);
    assert_eq!(probe.call("/grpc.health.v1.Health/Check", None).await, 0);
    assert_eq!(caller.call(WHO, Some(token)).await, 0);
    for connection in [silent, refused] {
        patiently("the end of the connection of a stranger", connection.open).await.unwrap();
    }
    assert!(!probe.open.is_finished() && !caller.open.is_finished());
    for connection in [&probe, &caller] {
        assert_eq!(connection.call(WHO, Some(token)).await, 0);
    }
}

#[tokio::test]
async fn other_processes_can_not_read_the_memory_of_a_service_that_enforces_rights() {
    for (mode, is_private) in [("off", false), ("enforce", true)] {
        let home = Home::new().in_memory();
        // The files of a process belong to its user, and to root if it is private: so root tests with another user.
        let mut user = geteuid().as_raw();
        let mut wrapper = Vec::new();
        if user == 0 {
            user = 65534;
            fs::set_permissions(home.path(""), Permissions::from_mode(0o755)).unwrap();
            // Other users may not come to where the binary was built.
            let binary = home.path("orchestrator");
            fs::copy(env!("CARGO_BIN_EXE_orchestrator"), &binary).unwrap();
            let script =
                format!("shift; exec setpriv --reuid={user} --regid={user} --clear-groups {} \"$@\"", binary.display());
            wrapper = vec!["sh".to_owned(), "-c".to_owned(), script, "sh".to_owned()];
        }
        let home = home.with_wrapper(wrapper).with_args(["--set", &format!("access.mode={mode}")]);
        let service = home.serve().await;
        let files = format!("/proc/{}", service.pid());
        let owner = fs::metadata(format!("{files}/mem")).unwrap().uid();
        assert_eq!(owner, if is_private { 0 } else { user }, "{mode}");
        let limits = fs::read_to_string(format!("{files}/limits")).unwrap();
        let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
        let core: Vec<_> = core.split_whitespace().take(2).collect();
        assert!(!is_private || core == ["0", "0"], "{mode}: {limits}");
    }
}
