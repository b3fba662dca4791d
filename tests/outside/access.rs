//! Who may do what: callers with tokens in every role, over gRPC and at the admin address.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt};

use crate::common::{
    command::orchestrator,
    http::{Answer, send, send_json},
    patiently,
    raw::Raw,
    service::{Home, Service},
    tokens::{write_private, write_tokens},
};
use bytes::Bytes;
use orchestrator_core::{
    access::{Token, TokenId},
    config::tokens_text,
    model::Name,
    proto::{self, orchestrator::v1 as pb},
};
use prost::Message;
use prost_types::FileDescriptorSet;
use tokio::process::Command;
use tonic::{Code, Request, Status, Streaming, client::Grpc, transport::Endpoint};
use tonic_types::StatusExt;

const ROLES: [&str; 6] = ["monitor", "viewer", "operator", "registrar", "auditor", "admin"];

/// Each method of the contract, with the roles that may call it. Nobody else may.
const GOLDEN: &[(&str, &[&str])] = &[
    ("RunCycle", &["operator", "admin"]),
    ("CancelCycle", &["operator", "admin"]),
    ("GetStatus", &["monitor", "viewer", "operator", "auditor", "admin"]),
    ("WatchCycles", &["viewer", "operator", "auditor", "admin"]),
    ("GetCycle", &["viewer", "operator", "auditor", "admin"]),
    ("ListCycles", &["viewer", "operator", "auditor", "admin"]),
    ("PruneCycles", &["admin"]),
    ("PlanCycle", &["viewer", "operator", "auditor", "admin"]),
    ("RegisterSubsystem", &["registrar", "admin"]),
    ("UpdateSubsystem", &["registrar", "admin"]),
    ("RenameSubsystem", &["registrar", "admin"]),
    ("RegisterSubsystems", &["registrar", "admin"]),
    ("UnregisterSubsystem", &["registrar", "admin"]),
    ("GetSubsystem", &["viewer", "operator", "registrar", "auditor", "admin"]),
    ("ListSubsystems", &["viewer", "operator", "auditor", "admin"]),
    ("RenewLease", &["registrar", "admin"]),
    ("SuspendSubsystem", &["operator", "admin"]),
    ("ResumeSubsystem", &["operator", "admin"]),
    ("StartIntervalLoop", &["operator", "admin"]),
    ("StopIntervalLoop", &["operator", "admin"]),
    ("PauseIntervalLoops", &["operator", "admin"]),
    ("ResumeIntervalLoops", &["operator", "admin"]),
    ("ListIntervalLoops", &["viewer", "operator", "auditor", "admin"]),
    ("WhoAmI", &ROLES),
    ("GetCheckpoint", &ROLES),
    ("GetInclusionProof", &["viewer", "operator", "auditor", "admin"]),
    ("GetConsistencyProof", &ROLES),
    ("ReadEntries", &["auditor", "admin"]),
    ("ListAuditEvents", &["auditor", "admin"]),
];

/// Grants for all targets to a token named as each role.
const GRANTS: &str = r#"
[[access.grants]]
who = ["token:monitor"]
role = "monitor"
[[access.grants]]
who = ["token:viewer"]
role = "viewer"
subsystems = ["*"]
[[access.grants]]
who = ["token:operator"]
role = "operator"
subsystems = ["*"]
loops = ["*"]
[[access.grants]]
who = ["token:registrar"]
role = "registrar"
subsystems = ["*"]
reads = ["*"]
phases = [0, 60]
endpoints = ["http://*:*"]
[[access.grants]]
who = ["token:auditor"]
role = "auditor"
subsystems = ["*"]
[[access.grants]]
who = ["token:admin"]
role = "admin"
"#;

/// A service whose callers need tokens.
struct Stage {
    home: Home,
    service: Service,
    texts: BTreeMap<String, String>,
    ids: BTreeMap<String, TokenId>,
}

impl Stage {
    /// A service in this mode, with these grants and a token for each name.
    async fn new(mode: &str, grants: &str, names: &[&str]) -> Self {
        let home = Home::new().in_memory();
        let created = write_tokens(&home.path("tokens.toml"), names);
        let ids = created.iter().map(|(name, (id, _))| (name.clone(), *id)).collect();
        let texts = created.into_iter().map(|(name, (_, text))| (name, text)).collect();
        let config = config(&home, mode, "", grants);
        let home = home.with_config(&config);
        let service = home.serve().await;
        Self { home, service, texts, ids }
    }

    /// In the mode `enforce`, with a token for each role.
    async fn with_roles() -> Self {
        Self::new("enforce", GRANTS, &ROLES).await
    }

    /// Calls a method as the token of this name, or as nobody, and returns the first answer.
    async fn call(&self, name: Option<&str>, method: &str, request: &impl Message) -> Result<Bytes, Status> {
        let mut answers = self.open(name, method, request.encode_to_vec()).await?;
        let first = patiently("an answer", answers.message()).await?;
        first.ok_or_else(|| Status::unknown("no answer"))
    }

    async fn open(&self, name: Option<&str>, method: &str, request: Vec<u8>) -> Result<Streaming<Bytes>, Status> {
        let path = format!("/dreamnet.orchestrator.v1.Orchestrator/{method}");
        self.open_path(name, &path, request).await
    }

    async fn open_path(&self, name: Option<&str>, path: &str, request: Vec<u8>) -> Result<Streaming<Bytes>, Status> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.service.address())).unwrap();
        let channel = patiently("a connection", endpoint.connect()).await.unwrap();
        let mut client = Grpc::new(channel);
        client.ready().await.unwrap();
        let mut request = Request::new(tokio_stream::once(Bytes::from(request)));
        if let Some(name) = name {
            let text = self.texts.get(name).map_or(name, String::as_str);
            request.metadata_mut().insert("authorization", format!("Bearer {text}").parse().unwrap());
        }
        let opened = client.streaming(request, path.parse().unwrap(), Raw);
        patiently("the beginning of an answer", opened).await.map(tonic::Response::into_inner)
    }

    /// Requests a path of the admin address as the token of this name, or as nobody.
    async fn get(&self, name: Option<&str>, path: &str) -> Answer {
        let authorization = name.map(|name| format!("Authorization: Bearer {}", self.texts[name]));
        let headers: Vec<_> = ["Host: localhost"].into_iter().chain(authorization.as_deref()).collect();
        send(self.service.admin(), &format!("GET {path}"), &headers).await
    }
}

fn config(home: &Home, mode: &str, access: &str, grants: &str) -> String {
    let tokens = home.path("tokens.toml");
    format!("[access]\nmode = \"{mode}\"\ntokens_file = \"{}\"\n{access}\n{grants}", tokens.display())
}

fn reason(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("{status:?} has no reason"));
    (status.code(), info.reason)
}

/// The metadata of the reason of a denied call: the RPC and the target.
fn denied(answer: Result<Bytes, Status>) -> (String, String) {
    let status = answer.unwrap_err();
    assert_eq!(reason(&status), (Code::PermissionDenied, "NOT_ALLOWED".into()), "{status:?}");
    let metadata = status.get_details_error_info().unwrap().metadata;
    (metadata["rpc"].clone(), metadata["target"].clone())
}

#[tokio::test]
async fn each_method_may_be_called_in_the_roles_of_the_table_and_in_no_other() {
    let stage = Stage::with_roles().await;
    let files = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file;
    let ours = files.iter().filter(|file| file.package() == "dreamnet.orchestrator.v1");
    let services = ours.flat_map(|file| &file.service);
    let methods = services.flat_map(|service| service.method.iter().map(move |method| (service.name(), method.name())));
    let mut called = 0;
    for (service, method) in methods {
        let (_, allowed) = GOLDEN.iter().find(|(name, _)| *name == method).unwrap_or_else(|| panic!("no {method}"));
        let request = match method {
            "GetStatus" => pb::GetStatusRequest { omit_last_cycle: true, ..Default::default() }.encode_to_vec(),
            _ => Vec::new(),
        };
        let path = format!("/dreamnet.orchestrator.v1.{service}/{method}");
        let call = async |name| match stage.open_path(name, &path, request.clone()).await {
            // It is open until its caller leaves.
            Ok(_) if method == "WatchCycles" => Code::Ok,
            Ok(mut answers) => {
                patiently(method, answers.message()).await.map_or_else(|status| status.code(), |_| Code::Ok)
            }
            Err(status) => status.code(),
        };
        assert_eq!(call(None).await, Code::Unauthenticated, "{method} by nobody");
        for role in ROLES {
            let code = call(Some(role)).await;
            assert_ne!(code, Code::Unauthenticated, "{method} by {role}");
            assert_eq!(code != Code::PermissionDenied, allowed.contains(&role), "{method} by {role}: {code:?}");
        }
        called += 1;
    }
    assert_eq!(called, GOLDEN.len());
}

#[tokio::test]
async fn a_monitor_reads_metrics_and_the_status_without_records() {
    let stage = Stage::with_roles().await;
    let status = |change: fn(&mut pb::GetStatusRequest)| {
        let mut request = pb::GetStatusRequest { omit_last_cycle: true, ..Default::default() };
        change(&mut request);
        request
    };
    assert!(stage.call(Some("monitor"), "GetStatus", &status(|_| {})).await.is_ok());
    for change in [
        (|it| it.omit_last_cycle = false) as fn(&mut pb::GetStatusRequest),
        |it| it.include_subsystems = true,
        |it| it.include_snapshots = true,
    ] {
        let refused = stage.call(Some("monitor"), "GetStatus", &status(change)).await;
        assert_eq!(denied(refused), ("GetStatus".into(), "all subsystems".into()));
    }
    // Snapshots are calls of subsystems, so viewers get none.
    let refused = stage.call(Some("viewer"), "GetStatus", &status(|it| it.include_snapshots = true)).await;
    assert_eq!(denied(refused), ("GetStatus".into(), "outputs and snapshots".into()));
}

#[tokio::test]
async fn an_operator_of_one_subsystem_sees_no_outputs_of_others() {
    let grants = "[[access.grants]]\nwho = [\"token:both\"]\nrole = \"viewer\"\nsubsystems = [\"*\"]\n[[access.grants]]\nwho = \
                  [\"token:both\"]\nrole = \"operator\"\nsubsystems = [\"alarm\"]\n";
    let stage = Stage::new("enforce", grants, &["both"]).await;
    let get = async |name: &str, include_output| {
        let request = pb::GetSubsystemRequest { name: name.into(), include_output, ..Default::default() };
        stage.call(Some("both"), "GetSubsystem", &request).await
    };
    assert_eq!(denied(get("average", true).await), ("GetSubsystem".into(), "outputs and snapshots".into()));
    for (name, include_output) in [("average", false), ("alarm", true)] {
        assert_eq!(get(name, include_output).await.unwrap_err().code(), Code::NotFound, "{name}");
    }
}

#[tokio::test]
async fn the_admin_address_asks_for_a_token() {
    let stage = Stage::with_roles().await;
    for path in ["/", "/app.js", "/api/status", "/api/events", "/metrics", "/no/such/path"] {
        let bare = stage.get(None, path).await;
        assert_eq!(bare.status, 401, "{path}");
        assert!(bare.head.to_lowercase().contains("www-authenticate: bearer"), "{}", bare.head);
        assert_eq!(stage.get(Some("monitor"), path).await.status, if path == "/metrics" { 200 } else { 403 }, "{path}");
        let of_viewer = match path {
            "/metrics" => 403,
            "/no/such/path" => 404,
            _ => 200,
        };
        assert_eq!(stage.get(Some("viewer"), path).await.status, of_viewer, "{path}");
    }
    let error = stage.get(None, "/api/status").await.json().await;
    assert_eq!(error["error"]["reason"], "CREDENTIAL_MISSING");
    let error = stage.get(Some("monitor"), "/api/status").await.json().await;
    assert_eq!(error["error"]["metadata"]["rpc"], "GetStatus");
}

#[tokio::test]
async fn changes_over_http_need_the_same_rights_as_over_grpc() {
    let stage = Stage::with_roles().await;
    let post = async |name: Option<&str>, path: &str, body: &str| {
        let bearer = name.map(|name| format!("Authorization: Bearer {}", stage.texts[name]));
        let headers: Vec<_> = bearer.as_deref().into_iter().collect();
        send_json(stage.service.admin(), &format!("POST {path}"), &headers, body).await
    };
    for (path, rpc, body) in [
        ("/api/cycles", "RunCycle", "{}"),
        ("/api/cycles/1/cancel", "CancelCycle", ""),
        ("/api/cycles/prune", "PruneCycles", "{}"),
        ("/api/subsystems", "RegisterSubsystem", "{}"),
        ("/api/registrations", "RegisterSubsystems", "{}"),
        ("/api/subsystems/a/suspend", "SuspendSubsystem", ""),
        ("/api/subsystems/a/renew", "RenewLease", ""),
        ("/api/subsystems/a/rename", "RenameSubsystem", r#"{"newName": "a-2"}"#),
        ("/api/loops", "StartIntervalLoop", "{}"),
        ("/api/loops/pause", "PauseIntervalLoops", r#"{"all": true}"#),
    ] {
        let (_, allowed) = GOLDEN.iter().find(|(name, _)| *name == rpc).unwrap();
        assert_eq!(post(None, path, body).await.status, 401, "{rpc} by nobody");
        for role in ROLES {
            let answer = post(Some(role), path, body).await;
            let (status, text) = (answer.status, answer.text().await);
            assert_eq!(status != 403, allowed.contains(&role), "{rpc} by {role}: {status} {text}");
            assert!(status == 403 || !text.contains("NOT_ALLOWED"), "{text}");
        }
    }
    // Nothing of strangers is read, and they can read why.
    let unread = post(None, "/api/registrations", &" ".repeat(200 << 10)).await;
    assert_eq!((unread.status, &unread.json().await["error"]["reason"]), (401, &"CREDENTIAL_MISSING".into()));
    let denied = post(Some("viewer"), "/api/cycles", r#"{"subsystems": ["a"]}"#).await.json().await;
    assert_eq!(denied["error"]["metadata"], serde_json::json!({ "rpc": "RunCycle", "target": "" }));
    // The description is for every caller, as reflection is.
    assert_eq!(stage.get(None, "/api/openapi.json").await.status, 401);
    for role in ROLES {
        assert_eq!(stage.get(Some(role), "/api/openapi.json").await.status, 200, "{role}");
    }
}

#[tokio::test]
async fn health_is_public_and_reflection_needs_a_token() {
    let stage = Stage::with_roles().await;
    let first = async |name, path: &str, request: &[u8]| {
        let mut answers = stage.open_path(name, path, request.to_vec()).await.map_err(|status| status.code())?;
        patiently(path, answers.message()).await.map(|answer| answer.is_some()).map_err(|status| status.code())
    };
    assert_eq!(first(None, "/grpc.health.v1.Health/Check", &[]).await, Ok(true));
    // `list_services`.
    let list = [7 << 3 | 2, 0];
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        assert_eq!(first(None, &path, &list).await, Err(Code::Unauthenticated), "{version}");
        assert_eq!(first(Some("monitor"), &path, &list).await, Ok(true), "{version}");
    }
}

#[tokio::test]
async fn a_bad_credential_is_not_a_missing_right() {
    let stage = Stage::with_roles().await;
    let list = pb::ListCyclesRequest::default();
    let as_who = async |name| reason(&stage.call(name, "ListCycles", &list).await.unwrap_err());
    assert_eq!(as_who(None).await, (Code::Unauthenticated, "CREDENTIAL_MISSING".into()));
    assert_eq!(as_who(Some("nonsense")).await, (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
    let (_, unknown) = Token::create(Name::parse("viewer").unwrap(), None).unwrap();
    assert_eq!(as_who(Some(&unknown)).await, (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
    assert_eq!(as_who(Some("registrar")).await, (Code::PermissionDenied, "NOT_ALLOWED".into()));
    let status = stage.call(Some("registrar"), "ListCycles", &list).await.unwrap_err();
    assert_eq!(
        status.message(),
        "token:registrar may not call ListCycles; it needs a grant with the role viewer or operator or auditor or \
         admin (access.grants in the configuration of the service)"
    );
    // Secrets are not in the log.
    stage.home.logged("a call was denied", 1).await;
    let log = fs::read_to_string(stage.home.path("log")).unwrap();
    assert!(stage.texts.values().all(|text| !log.contains(&text[21..])), "{log}");
}

#[tokio::test]
async fn a_grant_covers_its_targets_and_no_others() {
    let grants = r#"
[[access.grants]]
who = ["token:*"]
role = "registrar"
subsystems = ["{1}", "{1}-*"]
reads = ["shared"]
endpoints = ["http://127.0.0.1:*"]
phases = [0, 9]
[[access.grants]]
who = ["token:a"]
role = "operator"
subsystems = ["a", "a-*"]
loops = ["a"]
"#;
    let stage = Stage::new("enforce", grants, &["a", "b"]).await;
    let registration = |name: &str| crate::common::service::registration(name, "http://127.0.0.1:1");
    let register = async |who, registration| {
        let request = pb::RegisterSubsystemRequest { registration: Some(registration), lease: None };
        stage.call(Some(who), "RegisterSubsystem", &request).await
    };
    for name in ["a", "a-1"] {
        register("a", registration(name)).await.unwrap();
    }
    let of = |target: &str| ("RegisterSubsystem".to_owned(), target.to_owned());
    assert_eq!(denied(register("a", registration("b")).await), of("subsystem b"));
    assert_eq!(denied(register("b", registration("a")).await), of("subsystem a"));
    let change = |change: fn(&mut pb::Registration)| {
        let mut registration = registration("a");
        change(&mut registration);
        registration
    };
    for (target, changed) in [
        ("input x", change(|it| it.reads = vec!["shared".into(), "x".into()])),
        ("critical", change(|it| it.critical = true)),
        ("endpoint http://10.0.0.1:1", change(|it| it.endpoint = "http://10.0.0.1:1".into())),
        ("phase 10", change(|it| it.phase = 10)),
    ] {
        assert_eq!(denied(register("a", changed).await), of(&format!("{target} of subsystem a")));
    }
    let update = async |who, name: &str, path: &str, endpoint: &str, phase| {
        let values = Some(pb::Registration { phase, ..crate::common::service::registration(name, endpoint) });
        let update_mask = Some(prost_types::FieldMask { paths: vec![path.into()] });
        let request = pb::UpdateSubsystemRequest { registration: values, update_mask, etag: String::new() };
        stage.call(Some(who), "UpdateSubsystem", &request).await
    };
    let of = |target: &str| ("UpdateSubsystem".to_owned(), target.to_owned());
    update("a", "a", "phase", "", 9).await.unwrap();
    assert_eq!(denied(update("a", "a", "phase", "", 10).await), of("phase 10 of subsystem a"));
    let elsewhere = denied(update("a", "a", "endpoint", "http://10.0.0.1:1", 0).await);
    assert_eq!(elsewhere, of("endpoint http://10.0.0.1:1 of subsystem a"));
    assert_eq!(denied(update("b", "a", "phase", "", 1).await), of("subsystem a"));
    // One of several is enough to refuse all.
    let all =
        pb::RegisterSubsystemsRequest { registrations: vec![registration("a-2"), registration("b")], lease: None };
    let refused = stage.call(Some("a"), "RegisterSubsystems", &all).await;
    assert_eq!(denied(refused), ("RegisterSubsystems".into(), "subsystem b".into()));
    let unregister = pb::UnregisterSubsystemRequest { name: "a".into() };
    assert_eq!(
        denied(stage.call(Some("b"), "UnregisterSubsystem", &unregister).await),
        ("UnregisterSubsystem".into(), "subsystem a".into())
    );

    let run = |names: &[&str]| pb::RunCycleRequest {
        subsystems: names.iter().map(ToString::to_string).collect(),
        validate_only: true,
        ..Default::default()
    };
    assert!(stage.call(Some("a"), "RunCycle", &run(&["a", "a-1"])).await.is_ok());
    let refused = stage.call(Some("a"), "RunCycle", &run(&["a", "b"])).await;
    assert_eq!(denied(refused), ("RunCycle".into(), "subsystem b".into()));
    assert_eq!(
        denied(stage.call(Some("a"), "RunCycle", &run(&[])).await),
        ("RunCycle".into(), "all subsystems".into())
    );
    let start = |name: &str| {
        let settings = pb::IntervalLoop {
            name: name.into(),
            interval: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
            subsystems: vec!["a".into()],
            ..Default::default()
        };
        pb::StartIntervalLoopRequest { r#loop: Some(settings) }
    };
    assert!(stage.call(Some("a"), "StartIntervalLoop", &start("a")).await.is_ok());
    let refused = stage.call(Some("a"), "StartIntervalLoop", &start("b")).await;
    assert_eq!(denied(refused), ("StartIntervalLoop".into(), "loop b".into()));
}

#[tokio::test]
async fn a_caller_that_may_run_only_one_subsystem_gets_the_result_of_its_cycle() {
    let grants = r#"
[[access.grants]]
who = ["token:ops"]
role = "operator"
subsystems = ["a"]
[[access.grants]]
who = ["token:admin"]
role = "admin"
"#;
    let stage = Stage::new("enforce", grants, &["ops", "admin"]).await;
    for name in ["a", "b"] {
        let registration = Some(crate::common::service::registration(name, "http://127.0.0.1:1"));
        let request = pb::RegisterSubsystemRequest { registration, lease: None };
        stage.call(Some("admin"), "RegisterSubsystem", &request).await.unwrap();
    }
    let token = stage.home.path("ops.token");
    write_private(&token, &stage.texts["ops"]);
    let address = stage.service.address().to_string();
    let run =
        async |flags: &[&str]| orchestrator(Some(&token), &[&["run", "--address", &address], flags].concat()).await;
    let (exit, text) = run(&["--subsystem", "a"]).await;
    assert!(exit == 11 && text.contains("FAILED") && text.contains("no progress is shown: "), "{exit} {text}");
    let (exit, text) = run(&["--subsystem", "a", "--quiet"]).await;
    assert!(exit == 11 && text.contains("FAILED") && !text.contains("no progress"), "{exit} {text}");
    for others in [&["--subsystem", "a,b"][..], &[]] {
        let (exit, text) = run(others).await;
        assert!(exit == 1 && text.contains("NOT_ALLOWED"), "{others:?}: {exit} {text}");
    }
}

#[tokio::test]
async fn nothing_of_a_stranger_is_read() {
    let stage = Stage::with_roles().await;
    let first = async |name, method| {
        let mut answers = stage.open(name, method, b"no message".to_vec()).await?;
        patiently("an answer", answers.message()).await.map(drop)
    };
    for method in ["ListCycles", "WatchCycles", "NoSuchMethod"] {
        assert_eq!(first(None, method).await.unwrap_err().code(), Code::Unauthenticated, "{method}");
    }
    assert_eq!(first(Some("admin"), "ListCycles").await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(first(Some("admin"), "NoSuchMethod").await.unwrap_err().code(), Code::Unimplemented);
    let metrics = stage.get(Some("admin"), "/metrics").await.text().await;
    let line = "orchestrator_calls_total{server=\"grpc\",rpc=\"ListCycles\",code=\"UNAUTHENTICATED\"} 1";
    assert!(metrics.contains(line), "{metrics}");
}

/// Waits until a watch ends.
async fn ended(mut watch: Streaming<Bytes>) -> (Code, String) {
    loop {
        match patiently("the end of a watch", watch.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the watch has ended without a reason"),
            Err(status) => return reason(&status),
        }
    }
}

#[tokio::test]
async fn a_watch_ends_when_its_token_expires() {
    let stage = Stage::with_roles().await;
    let expires_at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(5);
    let (token, text) = Token::create(Name::parse("viewer").unwrap(), Some(expires_at)).unwrap();
    write_private(&stage.home.path("tokens.toml"), &tokens_text(&[token]));
    stage.home.logged("reloaded", 1).await;
    let watch = stage.open(Some(&text), "WatchCycles", Vec::new()).await.unwrap();
    assert_eq!(ended(watch).await, (Code::Unauthenticated, "CREDENTIAL_EXPIRED".into()));
    assert!(jiff::Timestamp::now() >= expires_at);
}

#[tokio::test]
async fn a_watch_ends_when_a_reload_takes_its_right_away() {
    let [removed, revoked, no_token] = [
        (Code::PermissionDenied, "NOT_ALLOWED"),
        (Code::Unauthenticated, "CREDENTIAL_INVALID"),
        (Code::Unauthenticated, "CREDENTIAL_INVALID"),
    ];
    let stage = Stage::with_roles().await;
    let file = stage.home.path("orchestrator.toml");
    let watch = async |name| stage.open(Some(name), "WatchCycles", Vec::new()).await.unwrap();
    let others = tokio::spawn(ended(watch("admin").await));

    let without_viewer = GRANTS.replace("token:viewer", "token:x");
    let of_viewer = watch("viewer").await;
    fs::write(&file, config(&stage.home, "enforce", "", &without_viewer)).unwrap();
    let (code, why) = ended(of_viewer).await;
    assert_eq!((code, why.as_str()), removed);

    let of_operator = watch("operator").await;
    let access = format!("revoked = [\"{}\"]", stage.ids["operator"]);
    fs::write(&file, config(&stage.home, "enforce", &access, &without_viewer)).unwrap();
    let (code, why) = ended(of_operator).await;
    assert_eq!((code, why.as_str()), revoked);

    let of_auditor = watch("auditor").await;
    write_private(
        &stage.home.path("tokens.toml"),
        &fs::read_to_string(stage.home.path("tokens.toml")).unwrap().replace("name = \"auditor\"", "name = \"other\""),
    );
    // The name of a token is its identity.
    let (code, _) = ended(of_auditor).await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(!others.is_finished(), "another watch has ended");

    write_private(&stage.home.path("tokens.toml"), "");
    let (code, why) = others.await.unwrap();
    assert_eq!((code, why.as_str()), no_token);
}

#[tokio::test]
async fn off_reads_no_credentials_and_dry_run_refuses_nothing() {
    let list = pb::ListCyclesRequest::default();
    let stage = Stage::new("off", GRANTS, &["viewer"]).await;
    for name in [None, Some("nonsense")] {
        assert!(stage.call(name, "ListCycles", &list).await.is_ok());
    }
    assert!(!stage.get(None, "/metrics").await.text().await.contains("orchestrator_calls_would_be_denied_total{"));

    let stage = Stage::new("dry_run", GRANTS, &["viewer"]).await;
    for name in [None, Some("nonsense"), Some("viewer")] {
        assert!(stage.call(name, "ListCycles", &list).await.is_ok());
    }
    assert!(stage.call(Some("viewer"), "RunCycle", &pb::RunCycleRequest::default()).await.is_ok());
    stage.home.logged("access.mode = \"enforce\" would deny a call", 1).await;
    let metrics = stage.get(None, "/metrics").await.text().await;
    for (rpc, code, count) in [("ListCycles", "UNAUTHENTICATED", 2), ("RunCycle", "PERMISSION_DENIED", 1)] {
        let name = "orchestrator_calls_would_be_denied_total";
        let line = format!("{name}{{server=\"grpc\",rpc=\"{rpc}\",code=\"{code}\"}} {count}");
        assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn a_file_of_tokens_that_others_can_read_is_refused() {
    let home = Home::new().in_memory();
    let tokens = home.path("tokens.toml");
    write_private(&tokens, "");
    fs::set_permissions(&tokens, fs::Permissions::from_mode(0o644)).unwrap();
    let config = config(&home, "enforce", "", "");
    let home = home.with_config(&config);
    let Err(status) = home.try_serve().await else { panic!("it serves") };
    assert_eq!(status.code(), Some(1));
    assert!(home.log().contains("has mode 0644"), "{}", home.log());
}

#[tokio::test]
async fn a_token_of_the_command_line_works_until_it_is_revoked() {
    let home = Home::new().in_memory();
    let (tokens, ops, wall) = (home.path("tokens.toml"), home.path("ops.token"), home.path("wall.token"));
    let (file, to) = (tokens.to_str().unwrap(), ops.to_str().unwrap());
    let (exit, text) = orchestrator(None, &["token", "create", "ops", "--file", file, "--to", to]).await;
    assert_eq!(exit, 0, "{text}");
    for path in [&tokens, &ops] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
    let (exit, printed) = orchestrator(None, &["token", "create", "wall", "--expires", "8h", "--file", file]).await;
    let secret = printed.lines().find(|line| line.starts_with("orc_")).unwrap_or_else(|| panic!("{printed}"));
    assert_eq!(exit, 0);
    write_private(&wall, secret);
    let config = config(&home, "enforce", "", "[[access.grants]]\nwho = [\"token:ops\"]\nrole = \"admin\"\n");
    let home = home.with_config(&config);
    let service = home.serve().await;
    let address = format!("http://{}", service.address());

    let whoami = async |credentials| orchestrator(credentials, &["whoami", "--address", &address]).await;
    let (exit, text) = whoami(Some(&*ops)).await;
    assert!(exit == 0 && text.contains("token:ops") && text.contains("ENFORCE") && text.contains("ADMIN"), "{text}");
    let (exit, text) = whoami(Some(&*wall)).await;
    assert!(exit == 0 && text.contains("token:wall") && !text.contains("ADMIN"), "{text}");
    let (exit, text) = whoami(None).await;
    assert!(exit == 1 && text.contains("CREDENTIAL_MISSING"), "{text}");
    let (exit, text) = orchestrator(Some(&ops), &["status", "--address", &address]).await;
    assert_eq!(exit, 0, "{text}");
    let (exit, text) = orchestrator(Some(&wall), &["status", "--address", &address]).await;
    assert!(exit == 1 && text.contains("PERMISSION_DENIED, NOT_ALLOWED"), "{text}");

    let (exit, list) = orchestrator(None, &["token", "list", "--file", file]).await;
    let line = list.lines().find(|line| line.contains("token:ops")).unwrap_or_else(|| panic!("{list}"));
    let id = line.split_whitespace().next().unwrap();
    assert!(exit == 0 && !list.contains(&fs::read_to_string(&ops).unwrap()[21..85]), "{list}");
    let (exit, text) = orchestrator(None, &["token", "revoke", id, "--file", file]).await;
    assert_eq!(exit, 0, "{text}");
    let refused = async {
        loop {
            let (exit, text) = whoami(Some(&*ops)).await;
            if exit == 1 {
                return text;
            }
        }
    };
    let text = patiently("the token to be refused", refused).await;
    assert!(text.contains("CREDENTIAL_INVALID"), "{text}");
    let (exit, text) = orchestrator(None, &["token", "revoke", id, "--file", file]).await;
    assert!(exit == 1 && text.contains(id), "{text}");
}

#[tokio::test]
async fn a_token_is_sent_neither_in_clear_to_another_machine_nor_from_an_open_file() {
    let home = Home::new();
    let path = home.path("token");
    write_private(&path, "orc_x");
    let (exit, text) = orchestrator(Some(&path), &["whoami", "--address", "http://192.0.2.1:7700"]).await;
    assert!(exit == 2 && text.contains("would be sent in clear"), "{text}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let (exit, text) = orchestrator(Some(&path), &["whoami"]).await;
    assert!(exit == 2 && text.contains("has mode 0644"), "{text}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, "a token\n").unwrap();
    let (exit, text) = orchestrator(Some(&path), &["whoami"]).await;
    assert!(exit == 2 && text.contains("contains no token"), "{text}");
}

#[tokio::test]
async fn curl_gets_what_its_token_may() {
    let stage = Stage::with_roles().await;
    let status = async |name: Option<&str>, path: &str| {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]);
        if let Some(name) = name {
            curl.arg("--header").arg(format!("Authorization: Bearer {}", stage.texts[name]));
        }
        let output = patiently("curl", curl.arg(format!("http://{}{path}", stage.service.admin())).output()).await;
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    for (path, of_nobody, of_viewer, of_monitor) in
        [("/api/status", "401", "200", "403"), ("/metrics", "401", "403", "200")]
    {
        assert_eq!(status(None, path).await, of_nobody, "{path}");
        assert_eq!(status(Some("viewer"), path).await, of_viewer, "{path}");
        assert_eq!(status(Some("monitor"), path).await, of_monitor, "{path}");
    }
}

#[tokio::test]
async fn beyond_loopback_needs_tls_and_access_rules() {
    let serve = ["serve", "--store", "memory:", "--admin-listen", "off", "--listen", "0.0.0.0:0"];
    let (exit, text) = orchestrator(None, &serve).await;
    assert!(exit == 2 && text.contains("TLS and access.mode = \"enforce\""), "{text}");
    let enforced = [&serve[..], &["--set", "access.mode=enforce", "--insecure-listen-beyond-loopback"]].concat();
    let (exit, text) = orchestrator(None, &enforced).await;
    assert!(exit == 2 && text.contains("has no TLS"), "{text}");
}

#[tokio::test]
async fn whoami_says_why_an_identity_is_not_known() {
    let stage = Stage::new("dry_run", GRANTS, &["operator"]).await;
    let who = async |name| {
        let path = "/dreamnet.orchestrator.v1.Access/WhoAmI";
        let mut answers = stage.open_path(name, path, Vec::new()).await.unwrap();
        pb::WhoAmIResponse::decode(patiently("an answer", answers.message()).await.unwrap().unwrap()).unwrap()
    };
    let operator = who(Some("operator")).await;
    let right = pb::Right {
        role: pb::Role::Operator.into(),
        subsystems: vec!["*".into()],
        loops: vec!["*".into()],
        ..Default::default()
    };
    assert_eq!((operator.identity.as_str(), &operator.rights[..]), ("token:operator", &[right][..]));
    assert_eq!((operator.mode(), operator.problem.as_str()), (pb::AccessMode::DryRun, ""));
    let nobody = who(Some("nonsense")).await;
    assert_eq!(nobody.identity, "nobody");
    assert!(nobody.problem.contains("is not a token"), "{}", nobody.problem);

    let stage = Stage::new("off", GRANTS, &[]).await;
    let path = "/dreamnet.orchestrator.v1.Access/WhoAmI";
    let mut answers = stage.open_path(None, path, Vec::new()).await.unwrap();
    let who = pb::WhoAmIResponse::decode(patiently("an answer", answers.message()).await.unwrap().unwrap()).unwrap();
    assert_eq!((who.mode(), who.identity.as_str(), who.problem.as_str()), (pb::AccessMode::Off, "nobody", ""));
}
