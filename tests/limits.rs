//! What each caller may use while rights are enforced, how long strangers may stay, and what other processes can see of
//! the service.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
};

use bytes::Bytes;
use common::{
    fleet::{Fleet, Run},
    http::send,
    patiently,
    service::{Client, Home, Service, because, ms, reason, registration},
    tokens::write_tokens,
};
use h2::client::SendRequest;
use orchestrator_core::proto::orchestrator::v1 as pb;
use rustix::process::geteuid;
use tokio::{
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
        let home = Home::new().in_memory();
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
        "token:a has reached the limit of 1 open watches for each caller (limits.watchers); end one of them first"
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

    /// Sends an empty message, and returns the code of the answer.
    async fn call(&mut self, path: &str, token: Option<&str>) -> i32 {
        let mut request = http::Request::post(format!("http://localhost{path}"));
        request = request.header("content-type", "application/grpc");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut send = patiently("a stream", self.send.clone().ready()).await.unwrap();
        let (response, mut body) = send.send_request(request.body(()).unwrap(), false).unwrap();
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

#[tokio::test]
async fn a_stranger_is_disconnected_and_a_caller_or_a_probe_is_not() {
    const WHO: &str = "/dreamnet.orchestrator.v1.Access/WhoAmI";
    let stage = Stage::with("").await;
    let token = stage.texts["a"].as_str();
    let mut each = Vec::new();
    for _ in 0..4 {
        each.push(Bare::connect(&stage.service).await);
    }
    let [silent, mut refused, mut probe, mut caller] = <[Bare; 4]>::try_from(each).ok().unwrap();
    assert_eq!(refused.call(WHO, None).await, Code::Unauthenticated as i32);
    assert_eq!(probe.call("/grpc.health.v1.Health/Check", None).await, 0);
    assert_eq!(caller.call(WHO, Some(token)).await, 0);
    for connection in [silent, refused] {
        patiently("the end of the connection of a stranger", connection.open).await.unwrap();
    }
    assert!(!probe.open.is_finished() && !caller.open.is_finished());
    for connection in [&mut probe, &mut caller] {
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
