//! The examples, each a subsystem in another language, against the real service: without TLS, and with it.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::common::{
    fleet::{Fleet, Run, from_struct, to_struct},
    patiently,
    pki::{Authority, Issued},
    process::Running,
    service::{Client, Home, Service, decode, registration},
    tokens::write_private,
};
use futures_util::future::join_all;
use orchestrator_core::{
    config::Config,
    proto::{
        orchestrator::v1::{self as pb, CycleState, SubsystemState, cycle_event::Event},
        subsystem::v1::{self as subsystem, Freshness, subsystem_client::SubsystemClient},
    },
};
use rcgen::SanType;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    sync::OnceCell,
};
use tonic::{
    Code, Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// An example: a folder of `examples`, and shell commands that are run in it.
struct Example {
    /// Its subsystem's name. Differs from the folder if that has another example.
    name: &'static str,
    folder: &'static str,
    /// Succeeds if the language's tools are installed. Then the build has to succeed too.
    probe: &'static str,
    build: &'static str,
    start: &'static str,
    /// True if it could be built. Several tests need it, but two builds in one folder would disturb each other.
    built: OnceCell<bool>,
}

impl Example {
    const fn new(folder: &'static str, probe: &'static str, build: &'static str, start: &'static str) -> Self {
        Self { name: folder, folder, probe, build, start, built: OnceCell::const_new() }
    }

    const fn named(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }
}

#[rustfmt::skip]
static EXAMPLES: [Example; 8] = [
    Example::new("python", "python3 --version", "python3 -m grpc_tools.protoc -I ../../proto --python_out=. \
                                                 --grpc_python_out=. ../../proto/dreamnet/*/v1/*.proto", "python3 \
                                                 subsystem.py"),
    Example::new("go", "go version && python3 --version", "go generate && go build", "./alarm"),
    Example::new("java", "mvn --version", "mvn -B -q package", "java -jar target/forecast.jar"),
    // With the kit, which its dependency refers to.
    Example::new("node", "npm --version", "(cd ../../clients/node && npm ci --silent && npm run --silent build) && \
                                           npm ci --silent && npm run --silent build", "node dist/subsystem.js"),
    Example::new("rust", "cargo --version", "cargo build --quiet", "cargo run --quiet --"),
    Example::new("ruby", "grpc_tools_ruby_protoc --version && ruby -e 'require \"grpc\"'",
                 "grpc_tools_ruby_protoc -I ../../proto --ruby_out=. --grpc_out=. ../../proto/dreamnet/*/v1/*.proto",
                 "ruby subsystem.rb"),
    Example::new("cpp", "cmake --version && pkg-config --exists grpc++ && command -v grpc_cpp_plugin",
                 "cmake -S . -B build && cmake --build build -j2", "./build/ramp"),
    // With the kit, which is not installed here: its README says how to.
    Example::new("python", "python3 --version", "python3 -c 'import grpc, google.protobuf'",
                 "env PYTHONPATH=../../clients/python/src python3 kit.py").named("python-kit"),
];

/// The index of the one in TypeScript.
const NODE: usize = 3;

/// The examples that can be tested here, which this prints.
async fn examples() -> &'static [&'static Example] {
    static TESTED: OnceCell<Vec<&'static Example>> = OnceCell::const_new();
    let find = async || {
        let (mut tested, mut missing) = (Vec::new(), Vec::new());
        for example in &EXAMPLES {
            if example.build().await { &mut tested } else { &mut missing }.push(example);
        }
        let names = |examples: &[&Example]| examples.iter().map(|it| it.name).collect::<Vec<_>>().join(", ");
        eprintln!("\nexamples that are tested: {}", names(&tested));
        if !missing.is_empty() {
            eprintln!("*** examples that are NOT TESTED: {} ***", names(&missing));
        }
        tested
    };
    TESTED.get_or_init(find).await
}

impl Example {
    fn shell(&self, command: &str) -> Command {
        let mut shell = Command::new("sh");
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples").join(self.folder);
        shell.args(["-c", command, "sh"]).current_dir(folder).stdin(Stdio::null()).kill_on_drop(true);
        shell
    }

    /// Builds it. False if its language's tools are missing, which is a failure if `CHECK_ALL` is set.
    async fn build(&self) -> bool {
        *self.built.get_or_init(|| self.build_once()).await
    }

    async fn build_once(&self) -> bool {
        let started = Instant::now();
        let probed = self.shell(self.probe).stdout(Stdio::null()).status().await.unwrap();
        if !probed.success() {
            let missing = format!("examples/{} IS NOT TESTED: `{}` failed", self.folder, self.probe);
            assert!(std::env::var_os("CHECK_ALL").is_none(), "{missing}");
            eprintln!("\n*** {missing} ***\n");
            return false;
        }
        let built = self.shell(self.build).stdout(Stdio::null()).status().await.unwrap();
        assert!(
            built.success(),
            "examples/{}: `{}` failed; its README lists the required tools",
            self.folder,
            self.build
        );
        eprintln!("examples/{} was built in {:.1?}", self.folder, started.elapsed());
        true
    }

    async fn start(&self, args: &[&str]) -> Running {
        let mut shell = self.shell(&format!("exec {} \"$@\"", self.start));
        shell.args(args);
        Running::start(shell, &format!("examples/{}", self.name)).await
    }

    /// Starts it, and lets it register itself after another subsystem.
    async fn join(&self, service: &Service, after: &str) -> Running {
        let orchestrator = service.address().to_string();
        let flags = ["--listen", "127.0.0.1:0", "--name", self.name, "--orchestrator", &orchestrator];
        self.start(&[&flags[..], &["--after", after]].concat()).await
    }
}

/// Waits until the registry fulfills this condition.
async fn until_registry(client: &mut Client, what: &str, holds: impl Fn(&[pb::SubsystemStatus]) -> bool) {
    // The registry has no stream of its changes, so this asks repeatedly.
    patiently(what, async { while !holds(&client.subsystems().await.unwrap()) {} }).await;
}

async fn until_registered(client: &mut Client, name: &str, running: &Running) {
    let is = |it: &pb::Registration| it.name == name && it.endpoint == running.endpoint();
    let holds = |all: &[pb::SubsystemStatus]| all.iter().any(|it| it.registration.as_ref().is_some_and(is));
    until_registry(client, &format!("{name} to register"), holds).await;
}

fn part<'a>(cycle: &'a pb::CycleTelemetry, name: &str) -> &'a pb::SubsystemTelemetry {
    cycle.subsystems.iter().find(|part| part.name == name).unwrap()
}

fn value(cycle: &pb::CycleTelemetry, name: &str) -> f64 {
    let output = from_struct(&part(cycle, name).output);
    output["value"].as_f64().unwrap_or_else(|| panic!("{name} gave {output}"))
}

/// Runs one of our commands, prints its output, and returns its exit code.
async fn show(title: &str, arguments: &[&str]) -> Option<i32> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    let output = patiently(title, command.args(arguments).kill_on_drop(true).output()).await.unwrap();
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    eprintln!("\n== {title}\n{stdout}{stderr}");
    output.status.code()
}

async fn show_cycle(service: &Service, title: &str, cycle: &pb::CycleTelemetry) {
    let address = service.address().to_string();
    let code = show(title, &["cycles", "show", &cycle.cycle_id.to_string(), "--address", &address]).await;
    assert_eq!(code, Some(0));
}

async fn recorded(client: &mut Client) -> pb::CycleTelemetry {
    client.run_with(pb::RunCycleRequest { record_outputs: true, ..pb::RunCycleRequest::default() }).await.unwrap()
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools, Go, Maven, npm, Ruby and C++ with gRPC; .ci/run runs it"]
async fn outputs_flow_across_languages_and_the_others_continue_when_one_is_killed() {
    let fleet = Fleet::start().await;
    fleet.run("sensor", Run::output(&json!({ "value": 40 })));
    let home = Home::new();
    let service = home.serve().await;
    let mut client = service.client().await;
    client.register(registration("sensor", fleet.endpoint())).await.unwrap();

    // A chain: each subsystem reads the output of the one before it.
    let mut chain = Vec::new();
    let mut before = "sensor";
    for example in examples().await {
        let running = example.join(&service, before).await;
        until_registered(&mut client, example.name, &running).await;
        chain.push((example, before, running));
        before = example.name;
    }

    let cycle = recorded(&mut client).await;
    show_cycle(&service, "a cycle across languages", &cycle).await;
    assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");
    // The number passes through the chain: the average of 40 is 40, the sum of that is 40, the forecast without growth
    // is 40, and the peak of the number plus one, the median of that, and what follows that are 41.
    let mut expected = 40.0;
    for (example, before, _) in &chain {
        let part = part(&cycle, example.name);
        // A subsystem with an input value has an output value, and reports no missing one.
        assert!(part.issues.iter().all(|issue| issue.code != "NO_VALUE"), "{part:?}");
        assert!(!part.metrics.is_empty(), "{part:?}");
        eprintln!("{before} gave {} to {}, which made {}", value(&cycle, before), part.name, value(&cycle, &part.name));
        if example.name == "node" {
            expected += 1.0;
        }
        assert!((value(&cycle, example.name) - expected).abs() < 1e-9, "{cycle:?}");
    }

    for killed in 0..chain.len() {
        let (example, before, running) = chain.remove(killed);
        // A stopped process is called and does not answer; then it is killed during the call.
        let watch = pb::WatchCyclesRequest { progress: true, ..pb::WatchCyclesRequest::default() };
        let mut events = client.watch_cycles(watch).await.unwrap().into_inner();
        running.signal(Signal::STOP);
        let mut caller = client.clone();
        let running_cycle = tokio::spawn(async move { recorded(&mut caller).await });
        let until_called = async {
            loop {
                let event = events.message().await.unwrap().unwrap().event.unwrap().event.unwrap();
                let Event::Progress(progress) = event else { continue };
                let is = |it: &pb::SubsystemProgress| it.name == example.name && it.state() == SubsystemState::Running;
                if progress.updates.iter().any(is) {
                    break;
                }
            }
        };
        patiently(&format!("{} to be called", example.name), until_called).await;
        running.kill().await;

        let cycle = running_cycle.await.unwrap();
        show_cycle(&service, &format!("a cycle in which {} was killed", example.name), &cycle).await;
        assert_eq!(cycle.state(), CycleState::Degraded, "{cycle:?}");
        let failed = part(&cycle, example.name);
        assert_eq!((failed.state(), failed.error_code.as_str()), (SubsystemState::Failed, "UNAVAILABLE"), "{failed:?}");
        // It was at work, unlike subsystems that can't be reached.
        assert!(failed.error_message.starts_with("the connection was lost during the call"), "{failed:?}");
        for (other, ..) in &chain {
            assert_eq!(part(&cycle, other.name).state(), SubsystemState::Succeeded, "{cycle:?}");
        }
        assert_eq!(decode(client.history().await.unwrap().pop().unwrap()), cycle);

        let running = example.join(&service, before).await;
        until_registered(&mut client, example.name, &running).await;
        let cycle = recorded(&mut client).await;
        assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");
        chain.insert(killed, (example, before, running));
    }

    // An orchestrator that has lost them receives a new registration when they renew their lease.
    for (example, ..) in &chain {
        let request = pb::UnregisterSubsystemRequest { name: example.name.into() };
        client.unregister_subsystem(request).await.unwrap();
    }
    for (example, _, running) in &chain {
        until_registered(&mut client, example.name, running).await;
    }

    // On a request to stop, they leave the registry.
    for (example, _, mut running) in chain {
        running.signal(Signal::TERM);
        patiently(&format!("{} to stop", example.name), running.process.wait()).await.unwrap();
        let gone = |all: &[pb::SubsystemStatus]| {
            all.iter().all(|it| it.registration.as_ref().is_some_and(|it| it.name != example.name))
        };
        assert!(gone(&client.subsystems().await.unwrap()), "{} is still registered", example.name);
    }
}

fn request(cycle_id: u64, epoch: u64, parameters: &Value) -> subsystem::RunCycleRequest {
    subsystem::RunCycleRequest {
        subsystem: "it".into(),
        cycle_id,
        epoch,
        attempt: 1,
        parameters: to_struct(parameters),
        inputs: [
            ("fresh", Freshness::Fresh, cycle_id, json!({ "value": 3 })),
            ("stale", Freshness::Stale, cycle_id - 1, json!({ "value": 5 })),
        ]
        .into_iter()
        .map(|(name, freshness, cycle_id, output)| {
            let input = subsystem::Input { output: to_struct(&output), freshness: freshness.into(), cycle_id };
            (name.to_owned(), input)
        })
        .chain([("absent".to_owned(), subsystem::Input { freshness: Freshness::Absent.into(), ..Default::default() })])
        .collect(),
        ..subsystem::RunCycleRequest::default()
    }
}

async fn cycles(client: &mut SubsystemClient<Channel>) -> Value {
    let request = subsystem::GetStatusRequest { subsystem: "it".into() };
    let status = client.get_status(request).await.unwrap().into_inner().status;
    from_struct(&status)["cycles"].clone()
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools, Go, Maven, npm, Ruby and C++ with gRPC; .ci/run runs it"]
async fn each_passes_the_conformance_check() {
    for example in examples().await {
        let running = example.start(&["--listen", "127.0.0.1:0", "--name", "it"]).await;
        let endpoint = running.endpoint();
        // With `work_ms`, it works for longer than the checks wait before they cancel a call. The timeout leaves time
        // for the largest message while other tests take the processors.
        let given = ["--strict", "--timeout", "30s", "--param", "work_ms=200", "--input", r#"sensor={"value":3}"#];
        let arguments = [&["conformance", &endpoint, "--subsystem", "it"], &given[..]].concat();
        let code = show(&format!("conformance of examples/{}", example.name), &arguments).await;
        assert_eq!(code, Some(0), "{}", example.name);
    }
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools, Go, Maven, npm, Ruby and C++ with gRPC; .ci/run runs it"]
async fn each_keeps_the_contract() {
    for example in examples().await {
        let running = example.start(&["--listen", "127.0.0.1:0", "--name", "it"]).await;
        let channel = Channel::from_shared(running.endpoint()).unwrap().connect().await.unwrap();
        let mut client = SubsystemClient::new(channel.clone());
        let none = json!({});
        let long = json!({ "work_ms": 3_600_000 });
        let name = example.name;

        let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert_eq!(health.status(), ServingStatus::Serving, "{name}");

        // Before `Initialize`.
        assert_eq!(cycles(&mut client).await, json!(0), "{name}");
        let early = client.run_cycle(request(2, 1, &none)).await.unwrap_err();
        assert_eq!(early.code(), Code::FailedPrecondition, "{name}: {early:?}");
        let initialize = |epoch| subsystem::InitializeRequest { subsystem: "it".into(), epoch, ..Default::default() };
        client.initialize(initialize(1)).await.unwrap();

        // Other names.
        let other = subsystem::RunCycleRequest { subsystem: "other".into(), ..request(2, 1, &none) };
        assert_eq!(client.run_cycle(other).await.unwrap_err().code(), Code::NotFound, "{name}");
        let other = subsystem::InitializeRequest { subsystem: "other".into(), ..initialize(1) };
        assert_eq!(client.initialize(other).await.unwrap_err().code(), Code::NotFound, "{name}");
        let other = subsystem::GetStatusRequest { subsystem: "other".into() };
        assert_eq!(client.get_status(other).await.unwrap_err().code(), Code::NotFound, "{name}");

        // Repeated calls, during the work of the first one and after it.
        let mut second = client.clone();
        let working = json!({ "work_ms": 100 });
        let (first, repeated) =
            tokio::join!(client.run_cycle(request(2, 1, &working)), second.run_cycle(request(2, 1, &working)));
        let answer = first.unwrap().into_inner();
        let again = client.run_cycle(request(2, 1, &none)).await.unwrap().into_inner();
        for repeated in [repeated.unwrap().into_inner(), again] {
            // The comparison is not of bytes: the fields of a Struct have no order.
            assert_eq!(from_struct(&repeated.output), from_struct(&answer.output), "{name}");
            assert_eq!((&repeated.metrics, &repeated.issues), (&answer.metrics, &answer.issues), "{name}");
        }
        assert_eq!(cycles(&mut client).await, json!(1), "{name}");
        let codes: Vec<_> = answer.issues.iter().map(|issue| issue.code.as_str()).collect();
        assert!(codes.contains(&"NO_VALUE"), "{name}: {codes:?}");
        assert_eq!(answer.issues.iter().filter(|issue| issue.message.starts_with("absent")).count(), 1, "{name}");

        // A call that ends by its deadline, or by its caller, gives its turn to the next; other calls are answered
        // meanwhile.
        let mut late = Request::new(request(3, 1, &long));
        late.set_timeout(Duration::from_millis(100));
        let mut caller = client.clone();
        let (late, seen) = tokio::join!(caller.run_cycle(late), cycles(&mut client));
        assert!(matches!(late.unwrap_err().code(), Code::DeadlineExceeded | Code::Cancelled), "{name}");
        assert_eq!(seen, json!(1), "{name}");
        let abandoned = tokio::spawn(async move { caller.run_cycle(request(3, 1, &long)).await });
        assert_eq!(cycles(&mut client).await, json!(1), "{name}");
        abandoned.abort();
        patiently("the turn", client.run_cycle(request(4, 1, &none))).await.unwrap();
        assert_eq!(cycles(&mut client).await, json!(2), "{name}");

        // Epochs. The cycles of an older epoch are over.
        client.run_cycle(request(4, 2, &none)).await.unwrap();
        assert_eq!(cycles(&mut client).await, json!(3), "{name}");
        assert_eq!(client.run_cycle(request(5, 1, &none)).await.unwrap_err().code(), Code::Aborted, "{name}");
        assert_eq!(client.initialize(initialize(1)).await.unwrap_err().code(), Code::Aborted, "{name}");

        // What its cycles have built up remains when it is initialized again.
        client.initialize(initialize(2)).await.unwrap();
        assert_eq!(cycles(&mut client).await, json!(3), "{name}");
    }
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools, Go, Maven, npm, Ruby and C++ with gRPC; .ci/run runs it"]
async fn each_stops_although_a_client_stays_connected() {
    for example in examples().await {
        let mut running = example.start(&["--listen", "127.0.0.1:0", "--name", "it"]).await;
        // One client sends nothing, the other nothing after its preface and its settings, as a peer that is gone.
        let _silent = TcpStream::connect(&running.address).await.unwrap();
        let mut gone = TcpStream::connect(&running.address).await.unwrap();
        gone.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        gone.read_exact(&mut [0; 9]).await.unwrap();
        running.signal(Signal::TERM);
        patiently(&format!("{} to stop", example.name), running.process.wait()).await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools; .ci/run runs it"]
async fn a_subsystem_in_python_takes_part() {
    let python = &EXAMPLES[0];
    if !python.build().await {
        return;
    }
    let example = python.start(&["--listen", "127.0.0.1:0"]).await;
    let fleet = Fleet::start().await;
    let home = Home::new();
    let service = home.serve().await;
    let mut client = service.client().await;

    client.register(registration("sensor", fleet.endpoint())).await.unwrap();
    let average = pb::Registration {
        requires: vec!["sensor".into()],
        reads: vec!["nobody".into()],
        parameters: to_struct(&json!({ "window": 2 })),
        record_output: true,
        ..registration("average", &example.endpoint())
    };
    client.register(average).await.unwrap();

    // The parameters of `Initialize`, the FRESH input, the ABSENT one, output, metrics and issues.
    for (value, average, values) in [(10, 10, 1), (20, 15, 2), (30, 25, 2)] {
        fleet.run("sensor", Run::output(&json!({ "value": value })));
        let cycle = client.run().await.unwrap();
        assert_eq!(cycle.state(), CycleState::Succeeded, "{cycle:?}");
        let part = part(&cycle, "average");
        assert_eq!(from_struct(&part.output), json!({ "value": average }));
        assert_eq!(part.metrics, [("values".to_owned(), f64::from(values))].into());
        let issues: Vec<_> = part.issues.iter().map(|issue| (issue.code.as_str(), issue.message.as_str())).collect();
        assert_eq!(issues, [("NO_VALUE", "nobody gave no value")]);
        assert_eq!(part.attempts, 1);
    }

    let request = pb::GetSubsystemRequest { name: "average".into(), include_output: true, include_snapshot: true };
    let status = client.get_subsystem(request).await.unwrap().into_inner().subsystem.unwrap();
    assert!(status.initialized);
    assert_eq!(from_struct(&status.snapshot), json!({ "cycles": 3, "values": [20, 30] }));
    assert_eq!(from_struct(&status.output), json!({ "value": 25 }));

    // It dies, and its part fails. It restarts without its memory, and asks for initialization in the middle of the
    // cycle.
    let address = example.address.clone();
    example.kill().await;
    let cycle = client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Degraded, "{cycle:?}");
    let example = python.start(&["--listen", &address]).await;
    assert_eq!(example.address, address);
    let cycle = client.run().await.unwrap();
    let part = part(&cycle, "average");
    assert_eq!(part.state(), SubsystemState::Succeeded, "{part:?}");
    assert_eq!((part.attempts, from_struct(&part.output)), (2, json!({ "value": 30 })));
    let last = client.history().await.unwrap().pop().unwrap();
    assert_eq!(decode(last), cycle);
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools; .ci/run runs it"]
async fn the_example_in_python_reports_errors_in_one_line() {
    let python = &EXAMPLES[0];
    if !python.build().await {
        return;
    }
    let home = Home::new();
    let service = home.serve().await;
    let taken = service.address().to_string();
    let invalid_name = ["--listen", "127.0.0.1:0", "--name", "x y", "--orchestrator", &taken];
    for (arguments, code, said) in [
        (&["--listen", "nope"][..], 2, "'nope' is not HOST:PORT"),
        (&["--listen", "0.0.0.0:500000"], 2, "'0.0.0.0:500000' is not HOST:PORT"),
        (&["--listen", &taken], 1, "the port is in use"),
        (&invalid_name, 1, "INVALID_ARGUMENT: registration.name \"x y\""),
        (&["--listen", "127.0.0.1:0", "--credentials", "/nowhere"], 1, "--credentials: [Errno 2]"),
    ] {
        let mut shell = python.shell(&format!("exec {} \"$@\"", python.start));
        let ended = patiently("it to end", shell.args(arguments).output()).await.unwrap();
        let problem = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(code), "{arguments:?}: {problem}");
        assert!(problem.contains(said) && !problem.contains("Traceback"), "{arguments:?}: {problem}");
    }
}

// ---------------------------------------------------------------------------------------------------------------
// With TLS

/// A directory as `orchestrator certs issue` makes it.
struct Credentials(PathBuf);

impl Credentials {
    /// TLS of a client that shows this certificate.
    fn tls(&self) -> ClientTlsConfig {
        let read = |name| fs::read(self.0.join(name)).unwrap();
        let tls = self.without_certificate();
        tls.identity(Identity::from_pem(read("cert.pem"), read("key.pem")))
    }

    /// TLS of a client that shows none.
    fn without_certificate(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(fs::read(self.0.join("ca.pem")).unwrap()))
    }

    fn argument(&self) -> String {
        self.0.display().to_string()
    }
}

/// A client of a subsystem, which connects with its first call.
fn subsystem_at(address: &str, tls: ClientTlsConfig) -> SubsystemClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
    SubsystemClient::new(endpoint.connect_lazy())
}

/// Calls `RunCycle` with an epoch that, if it were accepted, would lock the orchestrator out.
async fn lock_out(address: &str, name: &str, tls: ClientTlsConfig) -> Status {
    /// JavaScript has no larger whole numbers.
    const EPOCH: u64 = (1 << 53) - 1;
    let request =
        subsystem::RunCycleRequest { subsystem: name.into(), cycle_id: 1, epoch: EPOCH, ..Default::default() };
    let mut client = subsystem_at(address, tls);
    patiently("a refusal", client.run_cycle(request)).await.unwrap_err()
}

#[tokio::test]
#[ignore = "needs Python with grpcio-tools, Go, Maven, npm, Ruby and C++ with gRPC; .ci/run runs it"]
async fn each_registers_with_its_certificate_and_accepts_only_the_orchestrator() {
    const NOBODY: &str = "a client without a certificate";
    let examples = examples().await;
    let home = Home::new();
    let pki = home.path("pki");
    let certs = async |args: &[&str]| {
        let dir = pki.display().to_string();
        assert_eq!(show("certs", &[&["certs", "--dir", &dir], args].concat()).await, Some(0));
    };
    certs(&["init"]).await;
    for example in examples {
        certs(&["issue", "subsystem", example.name, "--host", "localhost"]).await;
    }
    let credentials = |name: &str| Credentials(pki.join(name));
    let home = home.in_memory().with_args(["--secure".to_owned(), pki.display().to_string()]);
    let service = home.serve().await;
    let mut client = service.client_with(credentials("admin").tls()).await.unwrap();

    let orchestrator = format!("localhost:{}", service.address().port());
    let mut running = Vec::new();
    for example in examples {
        let own = credentials(example.name).argument();
        let flags = ["--listen", "127.0.0.1:0", "--name", example.name, "--orchestrator", &orchestrator];
        let other = if example.name == "node" { "python" } else { "node" };
        let started = example.start(&[&flags[..], &["--credentials", &own, "--reads", other]].concat()).await;
        running.push((example, started));
    }
    for (example, started) in &running {
        let (name, endpoint) = (example.name, format!("https://{}", started.address));
        let owner = format!("cert:spiffe://fleet/subsystem/{name}");
        let is = |it: &pb::SubsystemStatus| {
            it.owner == owner && it.registration.as_ref().is_some_and(|it| it.name == name && it.endpoint == endpoint)
        };
        until_registry(&mut client, &format!("{name} to register"), |all| all.iter().any(is)).await;
    }
    assert_eq!(recorded(&mut client).await.state(), CycleState::Succeeded);

    for (example, started) in &running {
        let name = example.name;
        let others = examples.iter().map(|it| it.name).filter(|other| *other != name).chain(["admin"]);
        for (who, tls) in others
            .map(|other| (other, credentials(other).tls()))
            .chain([(NOBODY, credentials("core").without_certificate())])
        {
            let refused = lock_out(&started.address, name, tls).await;
            eprintln!("{name} refuses {who}: {refused:?}");
            // Otherwise the connection is refused, and the client may not see the reason.
            if !matches!(name, "go" | "rust") && who != NOBODY {
                assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
                assert_eq!(refused.message(), "only spiffe://fleet/core may call", "{name}");
            }
        }
        // The same call by the orchestrator's own certificate.
        let request = subsystem::GetStatusRequest { subsystem: name.into() };
        subsystem_at(&started.address, credentials("core").tls()).get_status(request).await.unwrap();
    }
    // None of those calls has changed anything.
    assert_eq!(recorded(&mut client).await.state(), CycleState::Succeeded);

    for (example, mut started) in running {
        started.signal(Signal::TERM);
        patiently(&format!("{} to stop", example.name), started.process.wait()).await.unwrap();
    }
    assert!(client.subsystems().await.unwrap().is_empty());
}

/// DreamNet's processes register their modules, and one of them also runs the loop.
const DREAMNET: &str = r#"
[server.tls]
cert_file = "DIR/core/cert.pem"
key_file = "DIR/core/key.pem"
client_ca_file = "DIR/core/ca.pem"
[dial]
ca_file = "DIR/core/ca.pem"
[access]
mode = "enforce"

[[access.grants]]
who = ["cert:spiffe://dreamnet/process/*"]
role = "registrar"
subsystems = ["*"]
reads = ["*"]
phases = [0, 60]
endpoints = ["https://127.0.0.1:*"]
[[access.grants]]
who = ["cert:spiffe://dreamnet/process/0"]
role = "operator"
subsystems = ["*"]
loops = ["dreamnet"]
"#;

/// Serves the modules with these names in one process. Without an orchestrator, it does not register them.
const PROCESS: &str = r#"
import { serveSubsystems } from "../../clients/node/dreamnet/dist/index.js";
const [listen, credentials, orchestrator, ...names] = process.argv.slice(1);
const modules = Object.fromEntries(names.map((name) => [name, { run: () => ({ name }) }]));
const options = { listen, credentials, caller: "spiffe://dreamnet/core", orchestrator };
const { address } = await serveSubsystems(modules, options);
console.log(`listening on ${address}`);
"#;

/// Starts a process with these modules.
async fn process(listen: &str, credentials: &Credentials, orchestrator: &str, modules: &[String]) -> Running {
    let mut shell = EXAMPLES[NODE].shell("exec node --input-type=module --eval \"$@\"");
    shell.arg(PROCESS).args([listen, &credentials.argument(), orchestrator]).args(modules);
    Running::start(shell, "a process of DreamNet").await
}

/// The number of open connections from this machine to any of these addresses.
fn connections_to(processes: &[Running]) -> usize {
    const ESTABLISHED: &str = "01";
    let ports: BTreeSet<_> = processes.iter().map(|it| it.address.rsplit_once(':').unwrap().1).collect();
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let is_one = |line: &&str| {
        let columns: Vec<_> = line.split_ascii_whitespace().collect();
        let port = u16::from_str_radix(columns[2].split_once(':').unwrap().1, 16).unwrap();
        columns[3] == ESTABLISHED && ports.contains(&*port.to_string())
    };
    table.lines().skip(1).filter(is_one).count()
}

#[tokio::test]
#[ignore = "needs npm; .ci/run runs it"]
async fn modules_of_dreamnet_share_the_connection_of_their_process_and_belong_to_it() {
    if !EXAMPLES[NODE].build().await {
        return;
    }
    let text = include_str!("../../examples/dreamnet.toml");
    let config = Config::from_toml_str("examples/dreamnet.toml", text).unwrap();
    let modules: Vec<_> = config.subsystems.iter().map(|it| it.name.to_string()).collect();
    assert_eq!(modules.len(), 28);

    let (home, authority) = (Home::new(), Authority::new("dreamnet"));
    let issue = |name: &str| {
        let directory = home.path(name.rsplit('/').next().unwrap());
        fs::create_dir_all(&directory).unwrap();
        let uri = SanType::URI(format!("spiffe://dreamnet/{name}").try_into().unwrap());
        let Issued { certificate, key } = authority.service_with(|it| it.subject_alt_names.push(uri));
        write_private(&directory.join("key.pem"), &key);
        fs::write(directory.join("cert.pem"), certificate).unwrap();
        authority.write(directory.join("ca.pem"));
        Credentials(directory)
    };
    issue("core");
    let own: Vec<_> = (0..modules.len()).map(|number| issue(&format!("process/{number}"))).collect();
    let config = DREAMNET.replace("DIR", &home.path("").display().to_string());
    let home = home.in_memory().with_config(&config);

    for count in [1, 4, 28] {
        let service = home.serve().await;
        let orchestrator = format!("localhost:{}", service.address().port());
        let parts: Vec<_> = modules.chunks(modules.len() / count).collect();
        let started = parts.iter().zip(&own).map(|(part, own)| process("127.0.0.1:0", own, &orchestrator, part));
        let mut processes = join_all(started).await;
        assert_eq!(processes.len(), count);
        let mut main = service.client_with(own[0].tls()).await.unwrap();
        for _ in 0..2 {
            let cycle = main.run().await.unwrap();
            assert_eq!((cycle.state(), cycle.subsystems.len()), (CycleState::Succeeded, 28), "{cycle:?}");
            assert_eq!(connections_to(&processes), count);
        }
        if count != 4 {
            continue;
        }

        // The second process can neither change the modules of the first one, nor call them, nor answer for them.
        let theirs = &parts[0][0];
        let mut second = service.client_with(own[1].tls()).await.unwrap();
        let renewed = second.renew_lease(pb::RenewLeaseRequest { name: theirs.clone() }).await;
        let unregistered = second.unregister_subsystem(pb::UnregisterSubsystemRequest { name: theirs.clone() }).await;
        let registered = second.register(registration(theirs, &format!("https://{}", processes[1].address))).await;
        for refused in [renewed.unwrap_err(), unregistered.unwrap_err(), registered.unwrap_err()] {
            assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
        }
        let refused = lock_out(&processes[0].address, theirs, own[1].tls()).await;
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
        let first = processes.remove(0);
        let address = first.address.clone();
        first.kill().await;
        let _instead = process(&address, &own[1], "", parts[0]).await;
        let cycle = main.run().await.unwrap();
        let failed = part(&cycle, theirs);
        let why = "a server with the certificate of cert:spiffe://dreamnet/process/1 answers, but \
                   cert:spiffe://dreamnet/process/0 must";
        assert_eq!(failed.state(), SubsystemState::Failed, "{failed:?}");
        assert!(failed.error_message.contains(why), "{failed:?}");
    }
}
