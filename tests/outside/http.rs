//! RPCs that run or change something, as JSON over HTTP.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use crate::common::{
    Stage,
    fleet::Run,
    http::{Answer, get, send, send_json, send_with_body},
    patiently,
    service::Home,
};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, process::Command};

/// The response to a request with this body.
async fn call(admin: SocketAddr, request: &str, body: &Value) -> Value {
    let answer = send_json(admin, request, &[], &body.to_string()).await;
    let status = answer.status;
    let response = answer.json().await;
    assert_eq!(status, 200, "{request}: {response}");
    response
}

/// The status, the code and the message of a refusal.
async fn refused(answer: Answer) -> (u16, String, String) {
    let status = answer.status;
    let error = answer.json().await["error"].clone();
    assert_eq!(error["code"], status, "{error}");
    (status, error["status"].as_str().unwrap().to_owned(), error["message"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_cycle_is_run_by_a_request_without_a_body() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    let answer = send(stage.service.admin(), "POST /api/cycles", &["Host: localhost", "Content-Length: 0"]).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    let answer = answer.json().await;
    assert_eq!((&answer["cycleId"], &answer["telemetry"]["state"]), (&"1".into(), &"CYCLE_STATE_SUCCEEDED".into()));
    assert_eq!(stage.client.status().await.unwrap().total_cycles, 1);
}

#[tokio::test]
async fn the_request_of_a_cycle_is_the_body() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["a", "b"]).await;
    let of_a = json!({ "subsystems": ["a"], "requestId": "r", "parameters": { "key": [1, null] }, "deadline": "5.5s" });
    let first = call(admin, "POST /api/cycles", &of_a).await;
    assert_eq!(first["telemetry"]["subsystems"].as_array().unwrap().len(), 1);
    assert_eq!(call(admin, "POST /api/cycles", &of_a).await, first, "the same request id");
    let plan = call(admin, "POST /api/cycles", &json!({ "validate_only": true })).await;
    assert_eq!((plan["plan"]["subsystems"].as_array().unwrap().len(), &plan["cycleId"]), (2, &Value::Null));
    // A program that can't send a body has parameters.
    let plan = call(admin, "POST /api/cycles?validateOnly=true&subsystems=b", &json!({})).await;
    assert_eq!(plan["plan"]["subsystems"][0]["name"], "b");

    stage.fleet.run("a", Run::Hang);
    let running = call(admin, "POST /api/cycles", &json!({ "async": true })).await;
    assert_eq!((&running["cycleId"], &running["telemetry"]), (&"2".into(), &Value::Null));
    stage.fleet.until_run("a", 2).await;
    let cancelled = call(admin, "POST /api/cycles/2/cancel", &json!({})).await;
    assert_eq!(cancelled["telemetry"]["state"], "CYCLE_STATE_CANCELLED");
    let pruned = call(admin, "POST /api/cycles/prune", &json!({ "keepNewest": "1", "dryRun": true })).await;
    assert_eq!(pruned["removed"], "1");
}

#[tokio::test]
async fn the_registry_is_changed() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    let registration = |name: &str| json!({ "name": name, "endpoint": stage.fleet.endpoint() });
    let one = json!({ "registration": registration("a"), "lease": "3600s" });
    let registered = call(admin, "POST /api/subsystems", &one).await;
    assert_eq!(
        (&registered["created"], &registered["subsystem"]["breaker"]),
        (&true.into(), &"BREAKER_STATE_CLOSED".into())
    );
    // A subsystem may have the name of an action.
    let all = json!({ "registrations": [registration("b"), registration("resume")] });
    assert_eq!(call(admin, "POST /api/registrations", &all).await, json!({ "created": ["b", "resume"] }));
    assert_eq!(get(admin, "/api/subsystems/resume").await.status, 200);

    let change = json!({ "registration": { "phase": 3 }, "updateMask": "phase" });
    let changed = call(admin, "PATCH /api/subsystems/a", &change).await;
    assert_eq!(
        (&changed["subsystem"]["registration"]["phase"], &changed["previous"]["registration"]["phase"]),
        (&3.into(), &Value::Null)
    );
    let stale = json!({ "registration": { "name": "a" }, "updateMask": "phase", "etag": "old" });
    let answer = send_json(admin, "PATCH /api/subsystems/a", &[], &stale.to_string()).await;
    assert_eq!((answer.status, &answer.json().await["error"]["reason"]), (409, &"ETAG_MISMATCH".into()));

    assert!(call(admin, "POST /api/subsystems/a/renew", &json!({})).await["leaseExpiresAt"].is_string());
    assert_eq!(call(admin, "POST /api/subsystems/a/suspend", &json!({})).await["subsystem"]["suspended"], true);
    assert_eq!(call(admin, "POST /api/subsystems/a/resume", &json!({})).await["subsystem"]["suspended"], Value::Null);
    for (status, body) in [(200, json!({})), (404, json!({}))] {
        let gone = send_json(admin, "DELETE /api/subsystems/a", &[], &body.to_string()).await;
        assert_eq!(gone.status, status);
    }
    let names: Vec<_> =
        stage.client.subsystems().await.unwrap().into_iter().map(|it| it.registration.unwrap().name).collect();
    assert_eq!(names, ["b", "resume"]);
}

#[tokio::test]
async fn the_log_and_its_proofs_are_read() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let of = async |path: &str| get(admin, &format!("/api/log/{path}")).await.json().await;
    let proved = of("inclusion?cycleId=1").await;
    assert!(proved["entry"].is_string() && proved["checkpoint"].is_string(), "{proved}");
    let signed = of("checkpoint").await;
    assert!(signed["checkpoint"].as_str().unwrap().contains(&format!("\n{}\n", proved["size"].as_str().unwrap())));
    let extends = of("consistency?fromSize=1").await;
    assert_eq!((&extends["size"], extends["hashes"].is_array()), (&proved["size"], true), "{extends}");

    let entries = get(admin, "/api/log/entries").await;
    assert_eq!((entries.status, entries.header("content-type")), (200, Some("application/x-ndjson")));
    let entries = entries.text().await;
    let lines: Vec<Value> = entries.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let size: usize = lines[0]["extent"]["size"].as_str().unwrap().parse().unwrap();
    assert_eq!((lines.len(), size >= 3), (size + 1, true), "{entries}");
    assert!(lines[1..].iter().any(|line| line["part"]["entry"] == proved["entry"]), "{entries}");
    for (path, code, reason) in [
        ("entries?size=1000", 400, "NOT_IN_LOG"),
        ("entries?size=many", 400, "INVALID_FIELDS"),
        ("consistency?fromSize=1000", 400, "NOT_IN_LOG"),
        ("inclusion?cycleId=7", 404, "CYCLE_NOT_FOUND"),
    ] {
        let answer = get(admin, &format!("/api/log/{path}")).await;
        assert_eq!((answer.status, &answer.json().await["error"]["reason"]), (code, &reason.into()), "{path}");
    }
}

/// The names of the fields that are inside of a message.
fn named(fields: &[String], inside: &str) -> BTreeSet<String> {
    fields.iter().filter_map(|field| field.strip_prefix(inside)).map(str::to_owned).collect()
}

#[tokio::test]
async fn the_document_requires_what_the_service_refuses_when_it_is_missing() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a"]).await;
    let admin = stage.service.admin();
    let document = get(admin, "/api/openapi.json").await.json().await;
    let required = |schema: &Value| -> BTreeSet<String> {
        let names = schema["required"].as_array().into_iter().flatten();
        names.map(|name| name.as_str().unwrap().to_owned()).collect()
    };
    // The fields that are missing in this body.
    let missing = async |request: &str, body: &Value| -> Vec<String> {
        let error = send_json(admin, request, &[], &body.to_string()).await.json().await["error"].clone();
        let violations = error["fieldViolations"].as_array().cloned().unwrap_or_default();
        violations.iter().map(|it| it["field"].as_str().unwrap().to_owned()).collect()
    };
    let schemas = &document["components"]["schemas"];
    for (request, schema, inner) in [
        ("POST /api/subsystems", "RegisterSubsystemRequest", "registration"),
        ("POST /api/registrations", "RegisterSubsystemsRequest", "registrations"),
        ("POST /api/loops", "StartIntervalLoopRequest", "loop"),
    ] {
        let schema = &schemas[schema];
        let found = missing(request, &json!({})).await;
        assert_eq!(required(schema), named(&found, ""), "{request}");
        let property = &schema["properties"][inner];
        let (body, property, path) = match &property["items"] {
            Value::Null => (json!({ inner: {} }), property, format!("{inner}.")),
            items => (json!({ inner: [{}] }), items, format!("{inner}[0].")),
        };
        let found = missing(request, &body).await;
        assert_eq!(required(property), named(&found, &path), "{request}");
        assert!(!required(schema).is_empty() && !required(property).is_empty(), "{request}");
    }
    // The name is in the path, and the mask says which other fields are read.
    let update = &schemas["UpdateSubsystemRequest"];
    assert_eq!((required(update), required(&update["properties"]["registration"])), Default::default());
    assert_eq!(required(&schemas["RunCycleRequest"]), BTreeSet::new());
    let body = |path: &str| &document["paths"][path]["post"]["requestBody"]["required"];
    assert_eq!((body("/api/subsystems"), body("/api/cycles")), (&true.into(), &false.into()));
}

#[tokio::test]
async fn errors_name_fields_as_json_does() {
    let stage = Stage::new().await;
    let registration = json!({
        "name": "a", "endpoint": stage.fleet.endpoint(), "retry": { "maxAttempts": 99 }, "limits": { "max_issues": 9_999_999 },
    });
    let body = json!({ "registration": registration }).to_string();
    let error =
        send_json(stage.service.admin(), "POST /api/subsystems", &[], &body).await.json().await["error"].clone();
    let fields: Vec<_> = error["fieldViolations"].as_array().unwrap().iter().map(|it| it["field"].clone()).collect();
    assert_eq!(fields, ["registration.retry.maxAttempts", "registration.limits.maxIssues"], "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.starts_with("registration.retry.maxAttempts is 99; "), "{message}");
    assert!(message.contains("; registration.limits.maxIssues is 9999999; "), "{message}");
}

#[tokio::test]
async fn loops_are_started_paused_resumed_and_stopped() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    let started = call(admin, "POST /api/loops", &json!({ "loop": { "name": "pause", "interval": "3600s" } })).await;
    assert_eq!(started["loop"]["loop"]["interval"], "3600s");
    let paused = call(admin, "POST /api/loops/pause", &json!({ "name": "pause" })).await;
    assert_eq!(paused["loops"][0]["paused"], true);
    call(admin, "POST /api/loops/resume", &json!({ "name": "pause" })).await;
    call(admin, "POST /api/loops/pause", &json!({ "all": true })).await;
    call(admin, "POST /api/loops/resume", &json!({ "all": true })).await;
    assert_eq!(call(admin, "POST /api/loops/pause/stop", &json!({})).await["loop"]["loop"]["name"], "pause");
    assert_eq!(get(admin, "/api/loops").await.json().await, json!({}));
}

#[tokio::test]
async fn a_request_that_can_not_be_read_is_refused_by_what_is_wrong() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    let large = format!(r#"{{"requestId": "{}"}}"#, "x".repeat(1 << 20));
    let many = format!(r#"{{"subsystems": ["a"{}]}}"#, r#","a""#.repeat(20_000));
    let values = format!(r#"{{"parameters": {{"list": [0{}]}}}}"#, ",0".repeat(100_000));
    for (request, body, words) in [
        ("POST /api/cycles", "{", "the body is no RunCycleRequest in JSON: EOF"),
        (
            "POST /api/cycles",
            r#"{"subsytems": []}"#,
            "unrecognized field name 'subsytems' at line 1 column 12; /api/openapi.json",
        ),
        ("POST /api/cycles", r#"{"deadline": 5}"#, "deadline: invalid type: integer `5`"),
        ("POST /api/cycles", r#"{"overlapPolicy": "SKIP"}"#, "unrecognized enum value 'SKIP'"),
        ("POST /api/cycles", r#"{"requestId": "a"} {}"#, "trailing characters"),
        ("POST /api/cycles", &large, "the body is longer than 1048576 bytes"),
        ("POST /api/cycles", &many, "subsystems has more than 20000 entries"),
        ("POST /api/cycles", &values, "more than 100000 values"),
        ("POST /api/cycles?async=maybe", "{}", "async is \"maybe\"; give true or false"),
        ("POST /api/cycles?asinc=true", "{}", "there is no asinc; give "),
        ("POST /api/cycles?async=true&async=true", "", "async is given more than once"),
        (
            "POST /api/cycles/1/cancel",
            r#"{"cycleId": "2"}"#,
            "cycleId is \"1\" in the URL, and has another value in the body",
        ),
        (
            "POST /api/cycles",
            r#"{"parameters": {"a": 1, "a": 2}}"#,
            "the key \"a\" is given more than once; give it once at line 1",
        ),
        ("POST /api/cycles/first/cancel", "", "cycleId is \"first\"; give a whole number"),
        (
            "PATCH /api/subsystems/a",
            r#"{"registration": {"name": "b"}}"#,
            "registration.name is \"a\" in the URL, and has another value in the body; leave it out of the body",
        ),
    ] {
        let (status, code, message) = refused(send_json(admin, request, &[], body).await).await;
        assert_eq!((status, code.as_str()), (400, "INVALID_ARGUMENT"), "{request}: {message}");
        assert!(message.contains(words), "{request}: {message}");
    }
    for (kind, given) in [
        ("Content-Type: application/x-www-form-urlencoded", "\"application/x-www-form-urlencoded\""),
        ("Content-Type: text/plain", "\"text/plain\""),
        ("X-None: x", "missing"),
    ] {
        let answer =
            send_with_body(admin, "POST /api/cycles", &["Host: localhost", kind, "Content-Length: 2"], "{}").await;
        let (status, _, message) = refused(answer).await;
        let words = format!("the Content-Type of the body is {given}; send JSON, with Content-Type: application/json");
        assert_eq!((status, message), (400, words));
    }
    let with_charset = ["Host: localhost", "Content-Type: Application/JSON; charset=utf-8", "Content-Length: 2"];
    assert_eq!(send_with_body(admin, "POST /api/cycles", &with_charset, "{}").await.status, 200);

    // What the service finds invalid names the fields.
    let invalid = json!({ "registration": { "name": "a", "endpoint": "localhost:1", "timeout": "0s" } });
    let answer = send_json(admin, "POST /api/subsystems", &[], &invalid.to_string()).await;
    let error = answer.json().await["error"].clone();
    assert_eq!(error["reason"], "INVALID_FIELDS");
    let fields: Vec<_> = error["fieldViolations"].as_array().unwrap().iter().map(|it| it["field"].clone()).collect();
    assert_eq!(fields, ["registration.endpoint", "registration.timeout"], "{error}");
}

#[tokio::test]
async fn a_method_that_a_path_does_not_have_is_refused_with_those_that_it_has() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    for (request, allowed) in [
        ("POST /api/status", "GET,HEAD"),
        ("PUT /api/cycles", "GET,HEAD,POST"),
        ("GET /api/loops/a/stop", "POST"),
        ("OPTIONS /api/subsystems/a", "DELETE,GET,HEAD,PATCH"),
    ] {
        let answer = send(admin, request, &["Host: localhost", "Content-Length: 0"]).await;
        let mut methods: Vec<_> = answer.header("allow").unwrap().split(',').map(str::to_owned).collect();
        methods.sort();
        assert_eq!(methods.join(","), allowed, "{request}");
        assert_eq!(refused(answer).await.0, 405, "{request}");
    }
    for path in ["/", "/app.js", "/metrics", "/livez", "/api/openapi.json"] {
        assert_eq!(
            send(admin, &format!("POST {path}"), &["Host: localhost", "Content-Length: 0"]).await.status,
            405,
            "{path}"
        );
    }
    assert_eq!(send(admin, "POST /api/none", &["Host: localhost", "Content-Length: 0"]).await.status, 404);
}

/// A page of another site, or of another port of this machine, that is open in a local browser.
#[tokio::test]
async fn a_page_of_another_address_changes_nothing() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    let host = format!("Host: localhost:{}", admin.port());
    let own = format!("Origin: http://localhost:{}", admin.port());
    let other_port = format!("Origin: http://localhost:{}", stage.service.address().port());
    let run = async |headers: &[&str]| {
        send_with_body(admin, "POST /api/cycles", &[&[host.as_str(), "Content-Length: 0"], headers].concat(), "")
            .await
            .status
    };
    for headers in [
        &["Origin: http://evil.example"][..],
        &["Origin: null"],
        &[&other_port],
        &["Sec-Fetch-Site: same-site"],
        &["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"],
        &[&own, "Sec-Fetch-Site: cross-site"],
        &["Cookie: other=1"],
    ] {
        assert_eq!(run(headers).await, 403, "{headers:?}");
    }
    let rebound = ["Host: evil.example", "Origin: http://evil.example", "Content-Length: 0"];
    assert_eq!(send(admin, "POST /api/cycles", &rebound).await.status, 403);
    assert_eq!(get(admin, "/api/status").await.json().await["status"]["totalCycles"], Value::Null);
    for headers in [&[][..], &[own.as_str()], &[own.as_str(), "Sec-Fetch-Site: same-origin", "Cookie: other=1"]] {
        assert_eq!(run(headers).await, 200, "{headers:?}");
    }
}

/// Callers that wait for their cycles leave connections for others.
#[tokio::test]
async fn requests_that_wait_for_a_cycle_leave_room_for_others() {
    const MOST: usize = 32;
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register("a", |_| ()).await;
    stage.fleet.run("a", Run::Hold);
    let mut waiting = Vec::new();
    for _ in 0..MOST {
        let mut stream = TcpStream::connect(admin).await.unwrap();
        let request = b"POST /api/cycles HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        waiting.push(stream);
    }
    let all_wait = async {
        while get(admin, "/api/status?omitLastCycle=true").await.json().await["status"]["queuedCycles"] != MOST - 1 {}
    };
    patiently("all requests to wait", all_wait).await;
    let (status, code, message) =
        refused(send_json(admin, "POST /api/loops/pause", &[], r#"{"all": true}"#).await).await;
    assert_eq!((status, code.as_str()), (429, "RESOURCE_EXHAUSTED"));
    assert!(message.contains("limit of 32 requests that run or change something"), "{message}");
    for path in ["/api/cycles", "/metrics"] {
        assert_eq!(get(admin, path).await.status, 200, "{path}");
    }
    stage.fleet.run("a", Run::Echo);
    let ended = waiting.into_iter().map(|mut stream| async move {
        let mut text = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.unwrap();
        text.starts_with("HTTP/1.1 200")
    });
    assert!(patiently("all cycles to end", join_all(ended)).await.into_iter().all(|is_ok| is_ok));
}

#[tokio::test]
async fn a_copy_that_is_looked_at_refuses_changes() {
    let home = Home::new();
    let service = home.serve().await;
    assert!(service.stop().await.success());
    let copy = home.with_args(["--read-only"]).serve().await;
    let answer = send_json(copy.admin(), "POST /api/cycles", &[], "{}").await;
    assert_eq!((answer.status, &answer.json().await["error"]["reason"]), (400, &"READ_ONLY".into()));
}

#[tokio::test]
async fn the_paths_are_described() {
    let stage = Stage::new().await;
    let answer = get(stage.service.admin(), "/api/openapi.json").await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    let served = answer.text().await;
    let kept = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json")).unwrap();
    assert!(served == kept, "docs/openapi.json is not what is served");
}

/// Needs the packages of `tests/openapi/requirements.txt`.
#[tokio::test]
#[ignore = "needs Python packages; .ci/run installs them"]
async fn the_service_answers_as_the_document_says() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "b"]).await;
    stage.client.run().await.unwrap();
    let mut schemathesis = Command::new("schemathesis");
    schemathesis.current_dir(stage.home.path(""));
    let url = format!("http://{}/api/openapi.json", stage.service.admin());
    // Streams of events do not end. Proto JSON takes `null` for a default value, and the document has not all limits.
    schemathesis.args(["run", &url, "--exclude-path", "/api/events", "--max-examples", "50", "--no-color"]);
    schemathesis.args(["--phases", "examples,coverage,fuzzing", "--generation-deterministic", "--checks", "all"]);
    schemathesis.args(["--exclude-checks", "positive_data_acceptance,negative_data_rejection"]);
    let ended = tokio::time::timeout(Duration::from_mins(5), schemathesis.output()).await.unwrap().unwrap();
    let said: String = String::from_utf8_lossy(&ended.stdout)
        .lines()
        .map(|line| {
            // An address with 20,000 names is one line.
            line.chars().take(500).chain(['\n']).collect::<String>()
        })
        .collect();
    assert!(ended.status.success(), "{said}");
    // It is alive, and works.
    assert_eq!(get(stage.service.admin(), "/readyz").await.status, 200);
}
