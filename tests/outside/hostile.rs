//! Every command against a service whose texts all contain terminal commands: none of them may reach the terminal.

use std::{net::SocketAddr, path::Path, process::Stdio};

use crate::common::{patiently, terminal::Terminal};
use clap::CommandFactory;
use http_body_util::{BodyExt, Full};
use orchestrator_core::{cli::Cli, model::Payload, proto::DESCRIPTORS};
use prost::{Message, bytes::Bytes};
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};
use serde_json::json;
use tokio::{net::TcpListener, process::Command, task::JoinSet};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Status, body::Body, codegen::http, service::Routes, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};

/// Colours, a title, C1, the direction of writing, invisible characters, and lines that look like those of the command.
const HOSTILE: &str =
    "\x1b[31mred\x1b]0;title\x07\u{9b}2J\u{202e}\u{2066}\u{200b}\u{feff}\u{7f}\0\tx\r\nFORGED\u{2028}\u{85}end";

// ---------------------------------------------------------------------------------------------------------------
// The service

/// The answers of a service.
#[derive(Clone, Copy, Debug)]
enum Says {
    /// Answers in which every text is hostile.
    Answers,
    /// NOT_FOUND, with a reason that the command line knows.
    NotFound(&'static str),
    /// An error about all fields.
    Invalid,
    /// An error without details.
    Bare(Code),
}

/// Serves all methods of both contracts.
struct Service {
    address: SocketAddr,
    _task: JoinSet<()>,
}

impl Service {
    async fn start(says: Says) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = move |request: http::Request<axum::body::Body>| async move {
            let path = request.uri().path().to_owned();
            // It reads the request before it answers, or the client would take the rest for a broken connection.
            request.into_body().collect().await.unwrap();
            says.to(&path)
        };
        let routes = Routes::from(axum::Router::new().fallback(answer));
        let mut task = JoinSet::new();
        task.spawn(async move {
            Server::builder().add_routes(routes).serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Self { address, _task: task }
    }
}

impl Says {
    fn to(self, path: &str) -> http::Response<Body> {
        let details = match self {
            Self::Answers => return answers(path).unwrap_or_else(|| Status::unimplemented(HOSTILE).into_http()),
            Self::NotFound(reason) => {
                let metadata = ["subsystem", "loop", "cycle_id", "oldest_revision", "newest_revision"];
                let metadata = metadata.map(|key| (key.to_owned(), HOSTILE.to_owned()));
                ErrorDetails::with_error_info(reason, HOSTILE, metadata)
            }
            Self::Invalid => {
                let mut details = ErrorDetails::with_error_info(HOSTILE, HOSTILE, [(HOSTILE.into(), HOSTILE.into())]);
                details.add_bad_request_violation(HOSTILE, HOSTILE);
                details
            }
            Self::Bare(code) => return Status::new(code, HOSTILE).into_http(),
        };
        let code = if matches!(self, Self::Invalid) { Code::InvalidArgument } else { Code::NotFound };
        Status::with_error_details(code, HOSTILE, details).into_http()
    }
}

/// The answer of a method, all its texts hostile. The stream has one event of each kind, and then fails.
fn answers(path: &str) -> Option<http::Response<Body>> {
    let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
    let (service, method) = path.trim_start_matches('/').split_once('/')?;
    let method = pool.get_service_by_name(service)?.methods().find(|it| it.name() == method)?;
    let output = method.output();
    let messages = if method.is_server_streaming() {
        ["started", "progress", "bookmark", "recorded"].map(|kind| filled(&output, &[kind])).to_vec()
    } else if method.name() == "RunCycle" {
        // The record comes in the stream.
        let mut answer = filled(&output, &[]);
        if service.contains("orchestrator") {
            answer.clear_field_by_name("telemetry");
        }
        vec![answer]
    } else {
        vec![filled(&output, &[])]
    };
    let mut frames = Vec::new();
    for message in messages {
        let bytes = message.encode_to_vec();
        frames.push(0);
        frames.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
        frames.extend(bytes);
    }
    let status = if method.is_server_streaming() { Status::data_loss(HOSTILE) } else { Status::new(Code::Ok, "") };
    let trailers = status.into_http::<()>().into_parts().0.headers;
    let body = Full::new(Bytes::from(frames)).with_trailers(async move { Some(Ok(trailers)) });
    let response = http::Response::builder().header("content-type", "application/grpc");
    Some(response.body(Body::new(body)).unwrap())
}

/// A message in which every field is set. Of the fields of a oneof, the one in `chosen` is set, or else the first.
fn filled(of: &MessageDescriptor, chosen: &[&str]) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        let is_passed_over = field.containing_oneof().is_some_and(|oneof| {
            let first = oneof.fields().next().unwrap();
            let taken = oneof.fields().find(|it| chosen.contains(&it.name())).unwrap_or(first);
            taken.number() != field.number()
        });
        // With a token, it would request pages forever.
        if is_passed_over || field.name() == "next_page_token" {
            continue;
        }
        let value = if field.is_map() {
            let Kind::Message(entry) = field.kind() else { unreachable!() };
            let value = value(&entry.map_entry_value_field(), chosen);
            Value::Map([(MapKey::String(HOSTILE.into()), value)].into())
        } else if field.is_list() {
            Value::List(vec![value(&field, chosen)])
        } else {
            value(&field, chosen)
        };
        message.set_field(&field, value);
    }
    message
}

fn value(field: &FieldDescriptor, chosen: &[&str]) -> Value {
    match field.kind() {
        Kind::String => Value::String(HOSTILE.into()),
        Kind::Bytes => Value::Bytes(Bytes::from_static(HOSTILE.as_bytes())),
        // Less is shown of a suspended subsystem or a stopped loop.
        Kind::Bool => Value::Bool(!matches!(field.name(), "suspended" | "stopped")),
        Kind::Double => Value::F64(1.0),
        Kind::Int32 => Value::I32(1),
        Kind::Int64 => Value::I64(1),
        Kind::Uint32 => Value::U32(1),
        Kind::Uint64 => Value::U64(1),
        // Subsystems have failed, and cycles are degraded.
        Kind::Enum(_) => Value::EnumNumber(2),
        Kind::Message(of) if of.full_name() == "google.protobuf.Struct" => {
            let json = json!({ HOSTILE: { HOSTILE: [HOSTILE] } });
            let payload = Payload::from_json(json.as_object().unwrap()).unwrap();
            Value::Message(DynamicMessage::decode(of, payload.as_bytes().clone()).unwrap())
        }
        Kind::Message(of) => Value::Message(filled(&of, chosen)),
        other => panic!("{} is of kind {other:?}, which the contract did not have", field.full_name()),
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The commands

/// The arguments with which each command is tried. Commands that call a service find it by the environment.
fn lines(command: &str) -> &'static [&'static str] {
    match command {
        "serve" => &["serve --config FILE"],
        "check" => &["check --config FILE"],
        "demo" => &["demo --cycles 1 --interval 100ms --listen 127.0.0.1:0"],
        "conformance" => &[
            "conformance http://ADDRESS --subsystem a --timeout 1s --junit JUNIT",
            "conformance http://ADDRESS --timeout 1s",
        ],
        "health" => &["health"],
        "completions" => &["completions bash"],
        "man" => &["man FILE"],
        // These need a terminal: see below.
        "top" => &["top"],
        "run" => &["run --details", "run --quiet", "run --async --subsystem a", "run --validate-only"],
        "cancel" => &["cancel 1"],
        "status" => &["status --subsystems", "status --snapshots"],
        "watch" => &["watch --from-oldest --progress", "watch --subsystem a --loop l"],
        "cycles list" => &["cycles list", "cycles list --subsystem a --loop l"],
        "cycles show" => &["cycles show 1 --details"],
        "subsystems list" => &["subsystems list"],
        "subsystems show" => &["subsystems show a --latest-output --snapshot"],
        "subsystems register" => {
            &["subsystems register a --endpoint http://127.0.0.1:1 --reads b", "subsystems register --file FILE"]
        }
        "subsystems set" => &["subsystems set a --phase 1 --reads b --param k=1"],
        "subsystems rename" => &["subsystems rename a b"],
        "subsystems unregister" => &["subsystems unregister a"],
        "subsystems suspend" => &["subsystems suspend a"],
        "subsystems resume" => &["subsystems resume a"],
        "subsystems renew" => &["subsystems renew a"],
        "loops list" => &["loops list"],
        "loops start" => &["loops start l --interval 1s --subsystem a"],
        "loops stop" => &["loops stop l"],
        "loops pause" => &["loops pause l", "loops pause --all"],
        "loops resume" => &["loops resume l", "loops resume --all"],
        "report" => &["report", "report --output csv", "report --subsystem a --loop l"],
        "plan" => &["plan", "plan --subsystem a"],
        "store accept" => &["store accept sqlite:FILE"],
        "store compact" => &["store compact sqlite:FILE"],
        "store copy" => &["store copy --from sqlite:FILE --to sqlite:FILE.copy"],
        "store key" => &["store key FILE.key"],
        "store migrate" => &["store migrate --print postgres://a@h/d", "store migrate postgres://a@127.0.0.1:1/d"],
        "store rename" => &["store rename postgres://a@127.0.0.1:1/d b"],
        "cycles prune" => &["cycles prune --keep-newest 1", "cycles prune --finished-before 1h --dry-run"],
        "backup" => &["backup sqlite:FILE --to FILE.backup"],
        "restore" => &["restore FILE sqlite:FILE.restored"],
        "whoami" => &["whoami"],
        "audit" => &["audit", "audit --denied --caller a --all"],
        "certs init" => &["certs init --dir FILE"],
        "certs issue" => &["certs issue viewer a --dir FILE"],
        "certs renew" => &["certs renew --dir FILE"],
        "certs list" => &["certs list --dir FILE"],
        "token create" => &["token create a --file FILE"],
        "token list" => &["token list --file FILE"],
        "token revoke" => &["token revoke 0123456789abcdef --file FILE"],
        "checkpoint" => &["checkpoint", "checkpoint --pin PIN"],
        "export" => &["export --to FILE.jsonl"],
        "verify" => &["verify --db FILE --key PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"],
        new => panic!("add the arguments with which `orchestrator {new}` is tried here: it may print texts of others"),
    }
}

/// The commands without subcommands.
fn commands(command: &clap::Command, path: &str) -> Vec<String> {
    let mut found = Vec::new();
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        let path = format!("{path} {}", below.get_name()).trim().to_owned();
        if below.has_subcommands() { found.extend(commands(below, &path)) } else { found.push(path) }
    }
    found
}

#[track_caller]
fn assert_harmless(what: &str, text: &str) {
    let harmful = |c: char| c != '\n' && HOSTILE.contains(c) && !(c.is_ascii_graphic() || c == ' ');
    assert!(!text.contains(harmful), "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("FORGED")), "{what} takes lines from others: {text}");
}

fn orchestrator(address: SocketAddr) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command.env("ORCHESTRATOR_ADDRESS", address.to_string()).env_remove("ORCHESTRATOR_TIMEOUT");
    command.env_remove("ORCHESTRATOR_CONFIG").env_remove("NO_COLOR").stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs all lines of all commands against this service, and returns how many of them showed one of its texts.
async fn run_all(says: Says, format: &str, files: &Path) -> usize {
    let service = Service::start(says).await;
    let [config, junit, pin] = ["o.toml", "junit.xml", "o.pin"].map(|name| files.join(name));
    let mut showed = 0;
    for path in commands(&Cli::command(), "") {
        for line in lines(&path) {
            let address = service.address.to_string();
            let line = line.replace("ADDRESS", &address).replace("FILE", config.to_str().unwrap());
            let line = line.replace("JUNIT", junit.to_str().unwrap()).replace("PIN", pin.to_str().unwrap());
            let mut command = orchestrator(service.address);
            command.args(line.split(' ')).env("ORCHESTRATOR_OUTPUT", format);
            let ended = patiently(&line, command.output()).await.unwrap();
            let shown = [ended.stdout, ended.stderr].map(|text| String::from_utf8(text).unwrap());
            for text in &shown {
                assert_harmless(&format!("{line} ({says:?}, {format})"), text);
            }
            showed += usize::from(shown.iter().any(|text| text.contains("FORGED")));
        }
    }
    if junit.exists() {
        assert_harmless("the JUnit report", &std::fs::read_to_string(&junit).unwrap());
    }
    showed
}

/// A configuration with hostile errors.
fn home() -> tempfile::TempDir {
    let files = tempfile::tempdir().unwrap();
    let quoted = "\\u001b[31m\\u009b2J\\u202e\\r\\nFORGED";
    let config = format!(
        "\"{quoted}\" = 1\n[store]\nurl = \"{quoted}\"\n[log]\nfilter = \"{quoted}\"\n[[subsystems]]\nname = \
         \"{quoted}\"\nendpoint = \"{quoted}\"\nrequires = [\"{quoted}\"]\n[subsystems.parameters]\n\"{quoted}\" = \
         1e999\n"
    );
    std::fs::write(files.path().join("o.toml"), config).unwrap();
    files
}

#[tokio::test]
async fn answers_can_not_command_the_terminal() {
    let files = home();
    let (table, json) = tokio::join!(run_all(Says::Answers, "table", files.path()), async {
        let files = home();
        run_all(Says::Answers, "json", files.path()).await
    });
    assert!(table > 20 && json > 20, "few hostile texts are shown: {table}, {json}");
}

#[tokio::test]
async fn refusals_can_not_command_the_terminal() {
    let all = async |says| {
        let files = home();
        let showed = run_all(says, "table", files.path()).await;
        assert!(showed > 15, "{says:?}: {showed}");
    };
    tokio::join!(all(Says::NotFound("SUBSYSTEM_NOT_FOUND")), all(Says::Invalid), all(Says::Bare(Code::Unavailable)));
}

#[tokio::test]
async fn texts_of_files_can_not_command_the_terminal() {
    let files = tempfile::tempdir().unwrap();
    let config = files.path().join("o.toml");
    // An error of parsing shows the invalid line.
    std::fs::write(&config, "[cycle]\ndeadline = \x1b[31m\u{9b}2J\u{202e} x\n").unwrap();
    for name in ["serve", "check"] {
        let mut command = orchestrator("127.0.0.1:1".parse().unwrap());
        let ended = patiently("it to end", command.args([name, "--config"]).arg(&config).output()).await.unwrap();
        let why = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(2), "{why}");
        assert!(why.contains("is not TOML"), "{why}");
        assert_harmless(name, &why);
    }
}

#[tokio::test]
async fn live_views_show_texts_and_obey_none() {
    let service = Service::start(Says::Answers).await;
    for line in ["top", "watch --from-oldest --progress", "run --details"] {
        let mut terminal = Terminal::new(120, 40);
        let mut command = Command::new("setsid");
        command.args(["--ctty", env!("CARGO_BIN_EXE_orchestrator")]).args(line.split(' ')).kill_on_drop(true);
        command.env("ORCHESTRATOR_ADDRESS", service.address.to_string());
        terminal.connect(&mut command);
        let mut child = command.spawn().unwrap();
        terminal.until_shown("FORGED").await;
        terminal.press(if line == "top" { "q" } else { "\x03" });
        patiently("it to end", child.wait()).await.unwrap();
        let written = terminal.written();
        for command in ["\x1b[31mred", "\x1b]0;", "\x07", "\u{9b}", "\u{202e}", "\u{2066}", "\u{feff}", "\r\nFORGED"] {
            assert!(!written.contains(command), "{line}: {command:?} in {written:?}");
        }
    }
}
