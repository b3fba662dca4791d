//! The service itself: its description, its limits, its start and end, and its reload.

use std::{collections::BTreeSet, fs, net::SocketAddr, os::unix::fs::symlink, path::Path, process::Stdio};

use crate::common::{
    Stage,
    command::orchestrator,
    fleet::Run,
    http::get,
    patiently,
    service::{Home, Service, because, decode, next_event, reason, registration},
};
use http_body::Frame;
use http_body_util::StreamBody;
use orchestrator_core::proto::orchestrator::v1::{self as pb, CycleState, Origin, SubsystemState, cycle_event::Event};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Signal, kill_process},
    time::{ClockId, clock_gettime},
};
use tokio::{
    net::{TcpStream, UnixDatagram},
    process::Command,
    task::JoinHandle,
};
use tokio_stream::StreamExt;
use tonic::{
    Code, Request, Status,
    codegen::{Service as _, http},
    transport::Channel,
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_client::HealthClient,
};

const SERVICE: &str = "dreamnet.orchestrator.v1.Orchestrator";

async fn channel(service: &Service) -> Channel {
    Channel::from_shared(format!("http://{}", service.address())).unwrap().connect().await.unwrap()
}

// ---------------------------------------------------------------------------------------------------------------
// Its description

macro_rules! reflection {
    ($name:ident, $version:ident) => {
        /// Sends a request of reflection, and returns the names of services or the encoded files.
        async fn $name(channel: Channel, symbol: Option<&str>) -> (BTreeSet<String>, Vec<Vec<u8>>) {
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
            };
            let ask = match symbol {
                None => MessageRequest::ListServices(String::new()),
                Some(symbol) => MessageRequest::FileContainingSymbol(symbol.to_owned()),
            };
            let request = ServerReflectionRequest { host: String::new(), message_request: Some(ask) };
            let mut client = ServerReflectionClient::new(channel);
            let asked = client.server_reflection_info(tokio_stream::once(request)).await.unwrap();
            let answer = asked.into_inner().message().await.unwrap().unwrap();
            match answer.message_response.unwrap() {
                MessageResponse::ListServicesResponse(list) => {
                    (list.service.into_iter().map(|service| service.name).collect(), Vec::new())
                }
                MessageResponse::FileDescriptorResponse(files) => (BTreeSet::new(), files.file_descriptor_proto),
                other => panic!("{other:?}"),
            }
        }
    };
}

reflection!(reflect_v1, v1);
reflection!(reflect_v1alpha, v1alpha);

#[tokio::test]
async fn it_describes_itself_to_new_and_to_old_clients() {
    let stage = Stage::new().await;
    let channel = channel(&stage.service).await;
    for (services, files) in [
        (reflect_v1(channel.clone(), None).await.0, reflect_v1(channel.clone(), Some(SERVICE)).await.1),
        (reflect_v1alpha(channel.clone(), None).await.0, reflect_v1alpha(channel.clone(), Some(SERVICE)).await.1),
    ] {
        for name in [SERVICE, "grpc.health.v1.Health"] {
            assert!(services.contains(name), "{services:?}");
        }
        let file: prost_types::FileDescriptorProto = prost::Message::decode(&files[0][..]).unwrap();
        let service = file.service.iter().find(|service| service.name() == "Orchestrator").unwrap();
        assert_eq!(service.method.len(), 23);
        // A Struct is described as one, whatever its internal type is.
        let registration = file.message_type.iter().find(|message| message.name() == "Registration").unwrap();
        let parameters = registration.field.iter().find(|field| field.name() == "parameters").unwrap();
        assert_eq!(parameters.type_name(), ".google.protobuf.Struct");
    }
}

async fn health(client: &mut HealthClient<Channel>, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    client.check(request).await.unwrap().into_inner().status()
}

#[tokio::test]
async fn it_reports_its_identity() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "orchestrator_id=me"])).await;
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.orchestrator_id.as_str(), status.version.as_str()), ("me", env!("CARGO_PKG_VERSION")));
    // Everything says the same commit, or none: see build.rs.
    let said = orchestrator(None, &["--version"]).await.1;
    let expected = if status.commit.is_empty() { String::new() } else { format!(" ({})", status.commit) };
    assert_eq!(said, format!("orchestrator {}{expected}\n", status.version));
    assert_eq!(status.commit, env!("BUILD_COMMIT"));
    let metrics = get(stage.service.admin(), "/metrics").await.text().await;
    let info = format!("orchestrator_build_info{{version=\"{}\",commit=\"{}\"}} 1\n", status.version, status.commit);
    assert!(metrics.contains(&info), "{info}");
    assert_eq!((status.total_cycles, status.subsystem_count), (0, 0));
    assert!(status.last_cycle.is_empty() && status.running_cycle.is_none() && status.store_error.is_empty());
    assert_eq!((status.oldest_revision, status.newest_revision), (1, 0));
    assert!(status.started_at.is_some() && status.uptime.is_some());
    let mut stage = stage.restarted().await;
    assert!(stage.client.status().await.unwrap().epoch > status.epoch);
}

#[tokio::test]
async fn unknown_methods_and_large_messages_are_refused_and_the_service_continues() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "server.max_request_bytes=65536"])).await;
    let mut registration = stage.registration("a");
    registration.reads = (0..20_000).map(|i| format!("name{i}")).collect();
    let refused = stage.client.register(registration).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    assert!(refused.message().contains("message length too large"), "{refused:?}");
    // A method that the service does not have, and services that are not served.
    let mut grpc = tonic::client::Grpc::new(channel(&stage.service).await);
    for path in ["/dreamnet.orchestrator.v1.Orchestrator/Nothing", "/dreamnet.subsystem.v1.Subsystem/RunCycle", "/"] {
        grpc.ready().await.unwrap();
        let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let unknown: Status = grpc.unary(Request::new(()), path, codec).await.unwrap_err();
        assert_eq!(unknown.code(), Code::Unimplemented);
    }
    stage.register("a", |_| {}).await;
    assert_eq!(stage.client.run().await.unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn the_longest_list_of_names_is_read_with_the_least_memory() {
    let mut stage = Stage::at(Home::new().with_args(["--set", "memory.max_bytes=67108864"])).await;
    let subsystems = (0..20_000).map(|i| format!("s{i:062}")).collect();
    let request = pb::RunCycleRequest { subsystems, ..pb::RunCycleRequest::default() };
    let refused = stage.client.run_cycle(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "they are not registered: {refused:?}");
}

#[tokio::test]
async fn a_status_can_leave_out_the_last_cycle() {
    let mut stage = Stage::new().await;
    stage.register("a", |_| {}).await;
    let ran = stage.client.run().await.unwrap();
    let whole = stage.client.status().await.unwrap();
    assert_eq!(decode(whole.last_cycle.clone()), ran);
    let request = pb::GetStatusRequest { omit_last_cycle: true, ..pb::GetStatusRequest::default() };
    let without = stage.client.get_status(request).await.unwrap().into_inner().status.unwrap();
    let rest = |status| pb::OrchestratorStatus { last_cycle: Vec::new().into(), uptime: None, ..status };
    assert!(without.last_cycle.is_empty());
    assert_eq!(rest(without), rest(whole));
}

#[tokio::test]
async fn the_refusal_of_too_large_a_status_names_the_remedy() {
    let mut stage = Stage::new().await;
    let parameters = crate::common::fleet::to_struct(&serde_json::json!({ "p": "x".repeat(60_000) }));
    for i in 0..60 {
        stage.register(&format!("s{i}"), |it| it.parameters = parameters.clone()).await;
    }
    let request = pb::GetStatusRequest { include_subsystems: true, ..pb::GetStatusRequest::default() };
    let refused = stage.client.get_status(request).await.unwrap_err();
    assert_eq!(reason(&refused), because(Code::ResourceExhausted, "ANSWER_TOO_LARGE", []));
    assert!(refused.message().contains("ListSubsystems"));
    // Pages end below the message limit of clients.
    let page = stage.client.list_subsystems(pb::ListSubsystemsRequest::default()).await.unwrap().into_inner();
    assert!(!page.next_page_token.is_empty());
    assert_eq!(stage.client.subsystems().await.unwrap().len(), 60);
}

// ---------------------------------------------------------------------------------------------------------------
// Its start and its end

/// Runs the binary to its end, and returns its exit code and its output.
async fn run_binary(args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output = patiently("the service to end", command.output()).await.unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test]
async fn it_listens_on_loopback_unless_the_risk_is_accepted() {
    let (code, said) = run_binary(&["serve", "--listen", "0.0.0.0:0", "--store", "memory:"]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--listen: server.listen is 0.0.0.0:0, which is not a loopback address"), "{said}");
    assert!(said.contains("--insecure-listen-beyond-loopback"), "{said}");
    let (code, said) = run_binary(&["serve", "--listen", "nowhere", "--store", "memory:"]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("give an IP address and a port"), "{said}");
}

#[tokio::test]
async fn an_error_at_the_start_has_an_exit_code_and_a_reason() {
    let stage = Stage::new().await;
    let address = stage.service.address().to_string();
    let (code, said) = run_binary(&["serve", "--listen", &address, "--store", "memory:"]).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&format!("can't listen on {address}: ")), "{said}");
    assert!(said.contains("is another process using it?"), "{said}");
    let (code, said) = run_binary(&["serve", "--set", "cycle.deadlines=1s"]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("cycle.deadlines"), "{said}");
    let home = Home::new().with_config(
        "[[subsystems]]\nname = \"a\"\nendpoint = \"http://h:1\"\nafter = [\"b\"]\n\
         [[subsystems]]\nname = \"b\"\nendpoint = \"http://h:1\"\nafter = [\"a\"]\n",
    );
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(2));
    assert!(home.log().contains("circular dependency: a is after b, b is after a"), "{}", home.log());
    assert!(home.log().contains("orchestrator.toml:5)"), "{}", home.log());
}

#[tokio::test]
async fn a_circular_dependency_at_the_start_names_the_subsystems_registered_by_rpc() {
    let mut stage = Stage::at(Home::new().with_config("")).await;
    stage.register("by_rpc", |it| it.requires = vec!["declared".into()]).await;
    let Stage { home, service, .. } = stage;
    assert!(service.stop().await.success());
    let config = home.path("orchestrator.toml");
    fs::write(&config, "[[subsystems]]\nname = \"declared\"\nendpoint = \"http://h:1\"\nafter = [\"by_rpc\"]\n")
        .unwrap();
    assert_eq!(home.try_serve().await.err().unwrap().code(), Some(1));
    assert!(home.log().contains("of these, by_rpc was registered by RPC: change the"), "{}", home.log());
    // No record or registration was lost.
    fs::write(&config, "").unwrap();
    assert!(home.serve().await.client().await.subsystem("by_rpc").await.is_ok());
}

/// A stage whose only subsystem is held in a running cycle, with another cycle that waits.
async fn busy(home: Home) -> (Stage, JoinHandle<Result<pb::CycleTelemetry, Status>>) {
    let mut stage = Stage::at(home).await;
    stage.register("held", |_| {}).await;
    stage.fleet.run("held", Run::Hold);
    let mut client = stage.client.clone();
    let running = tokio::spawn(async move { client.run().await });
    stage.fleet.until_run("held", 1).await;
    (stage, running)
}

async fn draining(health_client: &mut HealthClient<Channel>) {
    let draining = async { while health(health_client, SERVICE).await == ServingStatus::Serving {} };
    patiently("the service to drain", draining).await;
}

#[tokio::test]
async fn the_first_signal_lets_the_running_cycle_finish() {
    let (mut stage, running) = busy(Home::new()).await;
    let waiting = stage.client.admit().await.unwrap();
    let mut health_client = HealthClient::new(channel(&stage.service).await);
    for name in ["", SERVICE] {
        assert_eq!(health(&mut health_client, name).await, ServingStatus::Serving);
    }
    let request = HealthCheckRequest { service: SERVICE.into() };
    let mut changes = health_client.watch(request).await.unwrap().into_inner();
    stage.service.signal(Signal::INT);
    let mut status = ServingStatus::Serving;
    while status == ServingStatus::Serving {
        let change: Option<HealthCheckResponse> = patiently("a change of health", changes.message()).await.unwrap();
        status = change.unwrap().status();
    }
    assert_eq!(status, ServingStatus::NotServing);
    draining(&mut health_client).await;
    let ended = async { while health(&mut health_client, "").await == ServingStatus::Serving {} };
    patiently("the health of the whole process to change", ended).await;

    // No cycle starts any more, and the existing ones can be read.
    let registration = stage.registration("new");
    let same = stage.registration("held");
    let drains = async { while stage.client.register(same.clone()).await.is_ok() {} };
    patiently("changes to be refused", drains).await;
    let settings =
        pb::IntervalLoop { name: "l".into(), interval: crate::common::service::ms(1000), ..Default::default() };
    let refused = [
        stage.client.run().await.unwrap_err(),
        stage.client.admit().await.unwrap_err(),
        stage.client.register(registration).await.unwrap_err(),
        stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "held".into() }).await.unwrap_err(),
        stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(settings) }).await.unwrap_err(),
    ];
    for status in refused {
        assert_eq!(reason(&status), because(Code::Unavailable, "DRAINING", []));
    }
    assert_eq!(stage.client.status().await.unwrap().running_cycle.unwrap().cycle_id, 1);
    stage.fleet.run("held", Run::Echo);
    let cycle = patiently("the cycle to end", running).await.unwrap().unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded);
    // Watches of its health end, and are not aborted.
    assert_eq!(patiently("the end of the watch", changes.message()).await.unwrap(), None);
    assert_eq!(stage.service.ended().await.code(), Some(0), "{}", stage.home.log());

    let Stage { home, .. } = stage;
    let service = home.serve().await;
    // The waiting cycle was acknowledged, so it runs now.
    assert_eq!(service.client().await.recorded(waiting).await.state(), CycleState::Succeeded);
}

/// The next message to the service manager, line by line.
async fn told(manager: &UnixDatagram) -> Vec<String> {
    let mut message = [0; 1024];
    let length = patiently("a message to the service manager", manager.recv(&mut message)).await.unwrap();
    String::from_utf8_lossy(&message[..length]).lines().map(ToOwned::to_owned).collect()
}

/// The time of the clock that service managers compare, in microseconds.
fn monotonic() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}

#[tokio::test]
async fn the_service_manager_is_told_of_the_start_of_reloads_and_of_the_shutdown() {
    let home = Home::new().with_config(LOOP).with_args(["--set", "server.drain_grace=2m"]);
    let socket = home.path("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    let (stage, _running) =
        busy(home.with_wrapper(["env".to_owned(), format!("NOTIFY_SOCKET={}", socket.display())])).await;
    assert_eq!(told(&manager).await, ["STATUS=starting: opening the store"]);
    let serving = format!("STATUS=serving at {}", stage.service.address());
    assert_eq!(told(&manager).await, ["READY=1", &serving]);

    let before = monotonic();
    stage.service.signal(Signal::HUP);
    let [reloading, since, status] = &told(&manager).await[..] else { panic!("three lines") };
    assert_eq!((reloading.as_str(), status.as_str()), ("RELOADING=1", "STATUS=reloading: SIGHUP"));
    let since: i64 = since.strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap();
    assert!((before..=monotonic()).contains(&since), "{since}");
    assert_eq!(told(&manager).await, ["READY=1", &serving]);

    // A change of the file is told as well, and that it can't be applied.
    fs::write(stage.home.path("orchestrator.toml"), "x").unwrap();
    assert_eq!(told(&manager).await[0], "RELOADING=1");
    assert_eq!(told(&manager).await, ["READY=1".to_owned(), format!("{serving}; the last reload failed: see the log")]);

    // The manager waits for drain_grace and the 15 s after it, whatever its own limit is.
    stage.service.signal(Signal::TERM);
    let stopping = told(&manager).await;
    assert_eq!(stopping[..2], ["STOPPING=1", "EXTEND_TIMEOUT_USEC=135000000"]);
    assert!(stopping[2].starts_with("STATUS=shutting down"), "{stopping:?}");
}

#[tokio::test]
async fn a_check_of_its_health_fails_while_it_drains() {
    let (mut stage, running) = busy(Home::new()).await;
    let address = stage.service.address().to_string();
    let health = ["health", "--address", &address];
    assert_eq!(orchestrator(None, &health).await, (0, "SERVING\n".into()));
    let mut health_client = HealthClient::new(channel(&stage.service).await);
    stage.service.signal(Signal::TERM);
    let drains = async {
        let request = || HealthCheckRequest { service: String::new() };
        while health_client.check(request()).await.unwrap().into_inner().status() == ServingStatus::Serving {}
    };
    patiently("the service to drain", drains).await;
    assert_eq!(orchestrator(None, &health).await, (1, "NOT_SERVING\n".into()));
    stage.fleet.run("held", Run::Echo);
    running.await.unwrap().unwrap();
    stage.service.ended().await;
    assert_eq!(orchestrator(None, &health).await.0, 4);
}

/// The status and the text of the answer to a probe.
async fn probe(admin: SocketAddr, path: &str) -> (u16, String) {
    let answer = get(admin, path).await;
    (answer.status, answer.text().await)
}

#[tokio::test]
async fn it_is_alive_but_not_ready_while_it_starts() {
    let admin = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let home = Home::new().with_admin(admin);
    assert!(home.serve().await.stop().await.success());
    // Another program is writing to the database.
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    database.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let starting = home.spawn();
    patiently("it to listen", async { while TcpStream::connect(admin).await.is_err() {} }).await;
    assert_eq!(probe(admin, "/livez").await, (200, "ok".into()));
    assert_eq!(probe(admin, "/readyz").await, (503, "starting".into()));
    assert_eq!(probe(admin, "/api/status").await, (503, "the service is starting; try again later\n".into()));
    database.execute_batch("ROLLBACK").unwrap();
    let _service = starting.listening().await.unwrap();
    assert_eq!(probe(admin, "/readyz").await, (200, "ok".into()));
    assert_eq!(get(admin, "/api/status").await.status, 200);
}

#[tokio::test]
async fn it_is_alive_but_not_ready_while_it_drains() {
    let (stage, running) = busy(Home::new()).await;
    let admin = stage.service.admin();
    assert_eq!(probe(admin, "/readyz").await, (200, "ok".into()));
    let mut health_client = HealthClient::new(channel(&stage.service).await);
    stage.service.signal(Signal::TERM);
    draining(&mut health_client).await;
    let drains = async { while probe(admin, "/readyz").await != (503, "draining".into()) {} };
    patiently("it not to be ready", drains).await;
    assert_eq!(probe(admin, "/livez").await, (200, "ok".into()));
    stage.fleet.run("held", Run::Echo);
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn it_is_alive_but_not_ready_while_its_store_can_not_be_written() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    let (database, elsewhere) = (stage.home.path("o.db"), stage.home.path("elsewhere"));
    fs::rename(&database, &elsewhere).unwrap();
    assert_eq!(reason(&stage.client.run().await.unwrap_err()).why, "STORE_UNAVAILABLE");
    // Without its path.
    assert_eq!(probe(admin, "/readyz").await, (503, "the store can't be written".into()));
    assert_eq!(probe(admin, "/livez").await, (200, "ok".into()));
    fs::rename(&elsewhere, &database).unwrap();
    let recovers = async { while probe(admin, "/readyz").await != (200, "ok".into()) {} };
    patiently("it to be ready again", recovers).await;
}

#[tokio::test]
async fn after_the_grace_the_running_cycle_is_cancelled_and_recorded() {
    let (mut stage, running) = busy(Home::new().with_args(["--set", "server.drain_grace=50ms"])).await;
    let waiting = stage.client.admit().await.unwrap();
    stage.service.signal(Signal::TERM);
    let cycle = patiently("the cycle to end", running).await.unwrap().unwrap();
    assert_eq!((cycle.state(), cycle.subsystems[0].state()), (CycleState::Cancelled, SubsystemState::Cancelled));
    assert_eq!(stage.service.ended().await.code(), Some(0), "{}", stage.home.log());
    let Stage { fleet, home, .. } = stage;
    fleet.run("held", Run::Echo);
    let service = home.serve().await;
    let mut client = service.client().await;
    assert_eq!(client.cycle(1).await.unwrap(), cycle);
    assert_eq!(client.recorded(waiting).await.state(), CycleState::Succeeded);
    assert_eq!(client.run().await.unwrap().cycle_id, waiting + 1);
}

#[tokio::test]
async fn the_second_signal_aborts() {
    let (mut stage, _running) = busy(Home::new()).await;
    let mut health_client = HealthClient::new(channel(&stage.service).await);
    stage.service.signal(Signal::TERM);
    draining(&mut health_client).await;
    assert_eq!(stage.service.aborted().await.code(), Some(130), "{}", stage.home.log());
    let Stage { home, .. } = stage;
    let service = home.serve().await;
    assert_eq!(service.client().await.cycle(1).await.unwrap().state(), CycleState::Interrupted);
}

#[tokio::test]
async fn two_signals_at_once_are_one() {
    let (mut stage, running) = busy(Home::new()).await;
    let mut health_client = HealthClient::new(channel(&stage.service).await);
    // `timeout` does this: it signals its child and then the group of the child.
    stage.service.signal(Signal::TERM);
    stage.service.signal(Signal::INT);
    draining(&mut health_client).await;
    stage.fleet.run("held", Run::Echo);
    assert_eq!(stage.service.ended().await.code(), Some(0), "{}", stage.home.log());
    assert_eq!(running.await.unwrap().unwrap().state(), CycleState::Succeeded);
}

#[tokio::test]
async fn an_idle_service_with_watchers_ends_at_once() {
    let mut stage = Stage::new().await;
    let mut stream = stage.client.watch_after(0).await.unwrap();
    assert!(matches!(next_event(&mut stream).await.unwrap().event, Some(Event::Bookmark(_))));
    stage.service.signal(Signal::TERM);
    assert_eq!(reason(&next_event(&mut stream).await.unwrap_err()).why, "DRAINING");
    assert_eq!(stage.service.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_signal_is_handled_during_the_start() {
    let home = Home::new();
    assert!(home.serve().await.stop().await.success());
    // Another program is writing to the database, and does not finish.
    let database = rusqlite::Connection::open(home.path("o.db")).unwrap();
    database.execute_batch("BEGIN EXCLUSIVE").unwrap();
    fs::remove_file(home.path("o.db.lock")).unwrap();
    let mut starting = home.spawn();
    let opening = async {
        while !home.path("o.db.lock").exists() {
            tokio::task::yield_now().await;
        }
    };
    patiently("the store to be opened", opening).await;
    kill_process(starting.pid(), Signal::TERM).unwrap();
    assert_eq!(starting.ended().await.code(), Some(0), "{}", home.log());
    assert!(home.log().contains("stopped before it was started"), "{}", home.log());
}

#[tokio::test]
async fn too_few_open_files_are_reported() {
    for files in [5, 6, 7, 8, 12, 16, 20, 24] {
        let limited = ["sh".to_owned(), "-c".to_owned(), format!("ulimit -n {files}; exec \"$0\" \"$@\"")];
        let home = Home::new().with_wrapper(limited);
        let ended = home.try_serve().await.err().unwrap();
        assert_eq!(ended.code(), Some(1), "{files}: {}", home.log());
        assert!(home.log().contains("open files"), "{files}: {}", home.log());
        assert!(!home.log().contains("panic"), "{files}: {}", home.log());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Reloading

const LOOP: &str = "[[loops]]\nname = \"l\"\ninterval = \"1h\"\n";

async fn until_logged(home: &Home, text: &str, times: usize) {
    let logged = async {
        while home.log().matches(text).count() < times {
            tokio::task::yield_now().await;
        }
    };
    patiently(text, logged).await;
}

#[tokio::test]
async fn a_reload_applies_some_keys_and_names_those_that_need_a_restart() {
    let mut stage = Stage::at(Home::new().with_config("orchestrator_id = \"before\"\n")).await;
    stage.register_all(&["by_rpc", "both"]).await;
    stage.client.run().await.unwrap();
    let endpoint = stage.fleet.endpoint().to_owned();
    let declare =
        |name: &str, more: &str| format!("[[subsystems]]\nname = \"{name}\"\nendpoint = \"{endpoint}\"\n{more}");
    let config = [
        "orchestrator_id = \"after\"\n[server]\nmax_watchers = 0\nmax_connections = 7\n",
        "[registry]\nmax_subsystems = 3\n",
        LOOP,
        &declare("declared", "critical = true\n"),
        &declare("both", ""),
    ];
    // The change of the file is noticed.
    let path = stage.home.path("orchestrator.toml");
    fs::write(&path, config.concat()).unwrap();
    until_logged(&stage.home, "INFO orchestrator_core::serve: reloaded", 1).await;
    until_logged(&stage.home, "keys=\"orchestrator_id, server.max_connections\"", 1).await;
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.orchestrator_id.as_str(), status.subsystem_count, status.loops.len()), ("before", 3, 1));
    let both = stage.client.subsystem("both").await.unwrap();
    assert_eq!((both.origin(), both.output_cycle_id), (Origin::Config, 1));
    assert_eq!(stage.client.watch_after(0).await.unwrap_err().code(), Code::ResourceExhausted);
    let one_more = stage.registration("one_more");
    assert_eq!(reason(&stage.client.register(one_more).await.unwrap_err()).why, "REGISTRY_FULL");
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.subsystems.len(), 3);
    // An unchanged subsystem was not initialized again.
    assert_eq!(stage.fleet.initializations("by_rpc").len(), 1);

    // Subsystems that are no longer declared are removed; those registered by RPC stay. An editor replaces the file.
    fs::write(stage.home.path("new"), declare("declared", "")).unwrap();
    fs::rename(stage.home.path("new"), &path).unwrap();
    until_logged(&stage.home, "INFO orchestrator_core::serve: reloaded", 2).await;
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.subsystem_count, status.loops.len()), (2, 0));
    assert!(!stage.client.subsystem("declared").await.unwrap().registration.unwrap().critical);
    assert_eq!(stage.client.subsystem("both").await.unwrap_err().code(), Code::NotFound);
    stage.client.watch_after(0).await.unwrap();
    let mut stage = stage.killed().await;
    assert_eq!(stage.client.status().await.unwrap().subsystem_count, 2);
}

#[tokio::test]
async fn a_file_behind_links_is_reloaded_each_time_a_link_is_moved() {
    // Kubernetes mounts a ConfigMap in this way: the file is a link through a link, and an update replaces that link.
    let home = Home::new();
    let at = home.path("");
    let point_to = |version: u32| {
        let directory = at.join(format!("v{version}"));
        fs::create_dir(&directory).unwrap();
        let declares = format!("[[subsystems]]\nname = \"s{version}\"\nendpoint = \"http://127.0.0.1:1\"\n");
        fs::write(directory.join("orchestrator.toml"), declares).unwrap();
        symlink(&directory, at.join("new")).unwrap();
        fs::rename(at.join("new"), at.join("data")).unwrap();
    };
    point_to(0);
    let path = home.path("orchestrator.toml");
    symlink("data/orchestrator.toml", &path).unwrap();
    let mut stage = Stage::at(home.with_args(["--config".to_owned(), path.display().to_string()])).await;
    for version in 1..=3 {
        point_to(version);
        fs::remove_dir_all(at.join(format!("v{}", version - 1))).unwrap();
        let name = format!("s{version}");
        patiently("the reload", async { while stage.client.subsystem(&name).await.is_err() {} }).await;
    }
}

#[tokio::test]
async fn a_change_is_noticed_whichever_part_of_the_path_is_replaced() {
    let home = Home::new();
    let at = home.path("");
    let write = |directory: &str, version: u32| {
        let directory = at.join(directory);
        fs::create_dir_all(&directory).unwrap();
        let declares = format!("[[subsystems]]\nname = \"s{version}\"\nendpoint = \"http://127.0.0.1:1\"\n");
        fs::write(directory.join("orchestrator.toml"), declares).unwrap();
    };
    // A link to a directory above the file, and a directory below it.
    write("releases/1/etc", 0);
    symlink("releases/1", at.join("current")).unwrap();
    let path = at.join("current/etc/orchestrator.toml");
    let mut stage = Stage::at(home.with_args(["--config".to_owned(), path.display().to_string()])).await;
    let swap = |version: u32| {
        write(&format!("releases/{version}/etc"), version);
        symlink(format!("releases/{version}"), at.join("new")).unwrap();
        fs::rename(at.join("new"), at.join("current")).unwrap();
    };
    let replace = |version: u32| {
        fs::rename(at.join("current/etc"), at.join(format!("old{version}"))).unwrap();
        write("current/etc", version);
    };
    let rewrite = |version: u32| write("current/etc", version);
    let changes: [&dyn Fn(u32); 6] = [&swap, &rewrite, &replace, &rewrite, &replace, &swap];
    for (version, change) in (2..).zip(changes) {
        change(version);
        let name = format!("s{version}");
        patiently(&name, async { while stage.client.subsystem(&name).await.is_err() {} }).await;
    }
}

#[tokio::test]
async fn a_configuration_that_is_not_a_regular_file_is_refused_at_once() {
    let home = Home::new().with_config(LOOP);
    let path = home.path("orchestrator.toml");
    let pipe = home.path("pipe");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let cases =
        [(&*pipe, "is a pipe; give a regular file"), (Path::new("/dev/zero"), "is a device; give a regular file")];
    for (file, why) in cases {
        let (code, said) = run_binary(&["serve", "--config", file.to_str().unwrap()]).await;
        assert_eq!((code, said), (Some(2), format!("{}: {why}\n", file.display())));
    }
    // The same holds if it replaces a regular file.
    let mut stage = Stage::at(home).await;
    for (file, why) in cases {
        symlink(file, stage.home.path("new")).unwrap();
        fs::rename(stage.home.path("new"), &path).unwrap();
        until_logged(&stage.home, why, 1).await;
        assert_eq!(stage.client.status().await.unwrap().loops.len(), 1);
    }
    assert_eq!(stage.service.stop().await.code(), Some(0));
}

#[tokio::test]
async fn a_bad_reload_changes_nothing() {
    let mut stage = Stage::at(Home::new().with_config(LOOP)).await;
    stage.register("by_rpc", |it| it.after = vec!["declared".into()]).await;
    let path = stage.home.path("orchestrator.toml");
    let refused = "not reloaded, the old configuration still applies";
    let bad = [
        "[cycle]\ndeadline = \"never\"\n".to_owned(),
        // The declared subsystems have a circular dependency with one registered by RPC.
        "[[subsystems]]\nname = \"declared\"\nendpoint = \"http://h:1\"\nafter = [\"by_rpc\"]\n".to_owned(),
        // A half-written file looks like this.
        String::new(),
    ];
    for (i, bad) in bad.into_iter().enumerate() {
        fs::write(&path, bad).unwrap();
        // SIGHUP requests a reload at once; the change of the file may request another one.
        stage.service.signal(Signal::HUP);
        until_logged(&stage.home, refused, i + 1).await;
        let status = stage.client.status().await.unwrap();
        assert_eq!((status.loops.len(), status.subsystem_count), (1, 1));
    }
    let log = stage.home.log();
    assert!(log.contains("orchestrator.toml:2"), "{log}");
    until_logged(&stage.home, "of these, by_rpc was registered by RPC", 1).await;
    assert_eq!(stage.client.run().await.unwrap().subsystems.len(), 1);
    fs::write(&path, "[[subsystems]]\nname = \"declared\"\nendpoint = \"http://h:1\"\n").unwrap();
    stage.service.signal(Signal::HUP);
    until_logged(&stage.home, "INFO orchestrator_core::serve: reloaded", 1).await;
    let status = stage.client.status().await.unwrap();
    assert_eq!((status.loops.len(), status.subsystem_count), (0, 2));
    let history = stage.client.history().await.unwrap();
    assert_eq!(history.into_iter().map(|record| decode(record).cycle_id).collect::<Vec<_>>(), [1]);
}

#[tokio::test]
async fn the_memory_of_requests_that_never_end_is_bounded() {
    let home = Home::new().with_args(["--set", "server.max_receiving_bytes=1048576"]);
    let service = home.serve().await;
    let channel = channel(&service).await;
    let half_sent = || {
        // The prefix promises 512 KiB, the largest request that is ever accepted.
        let begin = [vec![0, 0, 0x08, 0, 0], vec![0; 450 << 10]].concat();
        let frames = tokio_stream::iter([Ok::<_, Status>(Frame::data(bytes::Bytes::from(begin)))]);
        let body = StreamBody::new(frames.chain(tokio_stream::pending()));
        let request = http::Request::post(format!("http://{}/{SERVICE}/RegisterSubsystem", service.address()))
            .header("content-type", "application/grpc")
            .body(tonic::body::Body::new(body))
            .unwrap();
        let mut channel = channel.clone();
        async move {
            std::future::poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
            let response = channel.call(request).await.unwrap();
            response.headers().get("grpc-status").unwrap().to_str().unwrap().to_owned()
        }
    };
    // There is memory for two of them.
    let refused = async {
        tokio::select! { first = half_sent() => first, second = half_sent() => second, third = half_sent() => third }
    };
    let code = patiently("one to be refused", refused).await;
    assert_eq!(code, (Code::ResourceExhausted as i32).to_string());
    // A larger request never fits, even alone: the limit of one request says so.
    let mut client = service.client().await;
    let mut large = registration("a", "http://127.0.0.1:1");
    large.reads = (0..60_000).map(|i| format!("a_long_name{i}")).collect();
    let refused = client.register(large).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    assert!(refused.message().contains("the limit is 524288 bytes"), "{refused:?}");
    // Others have memory again once those have ended.
    let registered = async { while client.register(registration("a", "http://127.0.0.1:1")).await.is_err() {} };
    patiently("a registration", registered).await;
}
