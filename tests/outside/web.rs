//! The admin address: JSON, events, and access to them.

use std::{collections::BTreeSet, fs, path::Path};

use crate::common::{
    Stage,
    fleet::Run,
    http::{get, send},
    patiently,
    service::Home,
};
use orchestrator_core::proto::{orchestrator::v1 as pb, subsystem::v1 as subsystem};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;

#[tokio::test]
async fn answers_of_rpcs_are_available_as_json() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["a", "b"]).await;
    stage.client.run().await.unwrap();
    stage.fleet.run("b", Run::fail(Code::Internal));
    stage.client.run().await.unwrap();

    let status = get(admin, "/api/status").await.json().await;
    assert_eq!(
        (&status["status"]["totalCycles"], &status["status"]["lastCycle"]["cycleId"]),
        (&"2".into(), &"2".into())
    );
    let status = get(admin, "/api/status?omitLastCycle=true").await.json().await;
    assert_eq!((&status["status"]["totalCycles"], &status["status"]["lastCycle"]), (&"2".into(), &Value::Null));
    let cycles = get(admin, "/api/cycles?states=CYCLE_STATE_DEGRADED&pageSize=5").await.json().await;
    assert_eq!(cycles["cycles"].as_array().unwrap().len(), 1);
    assert_eq!(cycles["cycles"][0]["cycleId"], "2");
    let cycle = get(admin, "/api/cycles/1").await.json().await;
    assert_eq!(cycle["telemetry"]["state"], "CYCLE_STATE_SUCCEEDED");
    let page = get(admin, "/api/subsystems?page_size=1").await.json().await;
    assert_eq!((&page["subsystems"][0]["registration"]["name"], &page["nextPageToken"]), (&"a".into(), &"a".into()));
    let subsystem = get(admin, "/api/subsystems/b?includeOutput").await.json().await;
    assert_eq!(subsystem["subsystem"]["outputCycleId"], "1");
    let plan = get(admin, "/api/plan").await.json().await;
    assert_eq!(plan["plan"]["subsystems"].as_array().unwrap().len(), 2);
    assert_eq!(get(admin, "/api/loops").await.json().await, serde_json::json!({}));
}

#[tokio::test]
async fn errors_are_reported() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    for (path, status, code, word) in [
        ("/api/cycles/9", 404, "NOT_FOUND", "9"),
        ("/api/cycles/none", 400, "INVALID_ARGUMENT", "none"),
        ("/api/cycles/18446744073709551616", 400, "INVALID_ARGUMENT", "from 0 to 18446744073709551615"),
        ("/api/cycles?pageToken=%2B5", 400, "INVALID_ARGUMENT", "not a token of this service"),
        ("/api/subsystems/%ff", 400, "INVALID_ARGUMENT", "UTF-8"),
        ("/api/cycles?size=5", 400, "INVALID_ARGUMENT", "there is no size; give pageSize, "),
        ("/api/cycles?states=FOO", 400, "INVALID_ARGUMENT", "give CYCLE_STATE_SUCCEEDED, "),
        ("/api/cycles?pageSize=5000", 400, "INVALID_ARGUMENT", "pageSize"),
        ("/api/cycles?pageSize=5&pageSize=6", 400, "INVALID_ARGUMENT", "pageSize is given more than once"),
        (
            "/api/cycles?finishedFrom=2026-01-01T00:00:00.5Z&finishedFrom=2027-01-01T00:00:00Z",
            400,
            "INVALID_ARGUMENT",
            "finishedFrom is given",
        ),
        ("/api/cycles/1?cycleId=2", 400, "INVALID_ARGUMENT", "cycleId is given more than once"),
        ("/api/subsystems/a?name=b", 400, "INVALID_ARGUMENT", "name is given more than once"),
        ("/api/cycle", 404, "NOT_FOUND", "/api/cycles"),
        ("/api/events?afterRevision=7", 400, "OUT_OF_RANGE", "7"),
    ] {
        let answer = get(admin, path).await;
        assert_eq!(answer.status, status, "{path}");
        let error = answer.json().await;
        assert_eq!(error["error"]["status"], code, "{path}");
        assert!(error["error"]["message"].as_str().unwrap().contains(word), "{path}: {error}");
    }
    let missing = get(admin, "/api/subsystems/none").await.json().await;
    assert_eq!(missing["error"]["reason"], "SUBSYSTEM_NOT_FOUND");
    assert_eq!(missing["error"]["metadata"]["subsystem"], "none");
}

#[tokio::test]
async fn only_this_machine_can_ask() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    for host in ["evil.example", "10.0.0.1:7780"] {
        assert_eq!(send(admin, "GET /api/status", &[&format!("Host: {host}")]).await.status, 403);
    }
    let cross_site = ["Host: localhost", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors"];
    assert_eq!(send(admin, "GET /api/status", &cross_site).await.status, 403);

    let page = get(admin, "/").await;
    assert_eq!(page.status, 200);
    let head = page.head.to_lowercase();
    assert!(head.contains("content-security-policy: default-src 'none'; script-src 'self'"), "{head}");
    assert!(head.contains("x-content-type-options: nosniff"), "{head}");
}

/// A script that is missing, or served with another type, results in a blank page.
#[tokio::test]
async fn the_dashboard_is_complete_and_needs_no_other_site() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    let mut seen = BTreeSet::new();
    let mut wanted = vec!["/".to_owned()];
    while let Some(path) = wanted.pop() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let answer = get(admin, &path).await;
        assert_eq!(answer.status, 200, "{path}");
        let kind = match path.rsplit_once('.') {
            Some((_, "js")) => "text/javascript",
            Some((_, "css")) => "text/css",
            Some((_, "svg")) => "image/svg+xml",
            _ => "text/html",
        };
        let head = answer.head.to_lowercase();
        assert!(head.contains(&format!("content-type: {kind}")), "{path}: {head}");
        let text = answer.text().await;
        // The only other address is the namespace of SVG elements.
        let rest = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!rest.contains("http://") && !rest.contains("https://") && !rest.contains("url("), "{path}");
        for unsafe_call in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!text.contains(unsafe_call), "{path} has {unsafe_call}");
        }
        let page = Path::new(&path);
        for reference in text.split('"').skip(1).step_by(2) {
            let is_file = reference.starts_with('/') && !reference.starts_with("/api/") && reference != "/logout";
            if kind == "text/html" && is_file {
                wanted.push(reference.to_owned());
            } else if kind == "text/javascript" && (reference.starts_with("./") || reference.starts_with("../")) {
                let folder = page.parent().unwrap();
                let target = match reference.strip_prefix("../") {
                    Some(name) => folder.parent().unwrap().join(name),
                    None => folder.join(reference.trim_start_matches("./")),
                };
                wanted.push(target.display().to_string());
            }
        }
    }
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/web/dashboard");
    let files: usize = [folder.to_owned(), format!("{folder}/views")]
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap().map(Result::unwrap))
        .filter(|entry| entry.file_type().unwrap().is_file())
        // One is only for checking the scripts, and the other one for logins.
        .filter(|entry| !["jsconfig.json", "login.html"].iter().any(|other| entry.file_name() == *other))
        .count();
    assert_eq!(seen.len(), files, "{seen:?}");
}

#[tokio::test]
async fn events_are_streamed_and_resumed() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register("a", |_| ()).await;
    stage.client.run().await.unwrap();
    stage.client.run().await.unwrap();

    let mut events = get(admin, "/api/events?fromOldest=true").await;
    assert!(events.head.contains("text/event-stream"));
    let mut next = async || [events.line().await, events.line().await, events.line().await];
    for revision in ["1", "2"] {
        let [id, event, data] = next().await;
        assert_eq!((id.as_str(), event.as_str()), (format!("id: {revision}").as_str(), "event: recorded"));
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["recorded"]["cycleId"], revision);
    }
    assert_eq!(next().await[1], "event: bookmark");
    stage.client.run().await.unwrap();
    assert_eq!(next().await[0], "id: 3");

    // Browsers resume by this header, whatever the address contains.
    let mut resumed = send(admin, "GET /api/events?fromOldest=true", &["Host: localhost", "Last-Event-ID: 2"]).await;
    assert_eq!(resumed.line().await, "id: 3");
    let mut gone = send(admin, "GET /api/events", &["Host: localhost", "Last-Event-ID: 99"]).await;
    assert_eq!((gone.status, gone.line().await.as_str()), (200, "event: refused"));
    assert!(gone.line().await.contains("OUT_OF_RANGE"));
    for garbage in ["2x", "\u{ff}", "-1"] {
        let header = format!("Last-Event-ID: {garbage}");
        assert_eq!(send(admin, "GET /api/events", &["Host: localhost", &header]).await.status, 400, "{garbage}");
    }

    let lines = ["Host: localhost", "Accept: application/x-ndjson"];
    let mut lines = send(admin, "GET /api/events?afterRevision=1", &lines).await;
    let line: Value = serde_json::from_str(&lines.line().await).unwrap();
    assert_eq!(line["event"]["recorded"]["cycleId"], "2");
}

/// Many open streams, read or not, do not block monitoring.
#[tokio::test]
async fn streams_leave_connections_for_others() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    let mut streams = Vec::new();
    let refused = loop {
        let answer = get(admin, "/api/events").await;
        if answer.status != 200 {
            break answer;
        }
        streams.push(answer);
    };
    assert_eq!((refused.status, streams.len()), (429, 192));
    assert!(refused.head.contains("connection: close"), "{}", refused.head);
    let error = refused.json().await;
    assert_eq!(error["error"]["status"], "RESOURCE_EXHAUSTED");
    assert_eq!(get(admin, "/metrics").await.status, 200);
    // A browser receives the error inside the stream, and reconnects by itself.
    let mut resumed = send(admin, "GET /api/events", &["Host: localhost", "Last-Event-ID: 0"]).await;
    assert_eq!((resumed.status, resumed.line().await.as_str()), (200, "event: refused"));
    drop(streams);
    patiently("a place", async { while get(admin, "/api/events").await.status != 200 {} }).await;
}

#[tokio::test]
async fn open_streams_end_with_the_service() {
    let home = Home::new();
    let service = home.serve().await;
    let events = get(service.admin(), "/api/events").await;
    let idle = TcpStream::connect(service.admin()).await.unwrap();
    assert!(service.stop().await.success());
    assert!(events.text().await.contains("event: refused"));
    drop(idle);
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let home = Home::new().with_admin(address);
    assert_eq!(home.try_serve().await.err().and_then(|status| status.code()), Some(1));
    assert!(home.log().contains(&format!("can't listen on {address} for the dashboard")), "{}", home.log());
}

/// Registers a subsystem whose records are 6 MB as JSON: a control character takes six bytes there.
async fn register_one_with_a_large_output(stage: &mut Stage) {
    let output = crate::common::fleet::to_struct(&serde_json::json!({ "text": "\u{1}".repeat(1 << 20) }));
    let answer = subsystem::RunCycleResponse { output, ..subsystem::RunCycleResponse::default() };
    stage
        .register("a", |it| {
            it.record_output = true;
            it.limits = Some(pb::Limits { max_output_bytes: 2 << 20, ..pb::Limits::default() });
        })
        .await;
    stage.fleet.run("a", Run::Answer(answer));
}

/// Unread answers are produced only up to a limit of memory.
#[tokio::test]
async fn unread_answers_take_bounded_memory() {
    const ASKING: usize = 100;
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    register_one_with_a_large_output(&mut stage).await;
    let cycle = stage.client.run().await.unwrap();
    assert_eq!(cycle.state(), pb::CycleState::Succeeded, "{}", cycle.error);
    let mut asking = Vec::new();
    for path in ["/api/cycles/1", "/api/events?fromOldest=true"] {
        for _ in 0..ASKING {
            let mut stream = TcpStream::connect(admin).await.unwrap();
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.unwrap();
            // The first answer arrives, and the memory does not suffice for all others. Events are shared, and sent to
            // all.
            if asking.is_empty() || path.starts_with("/api/events") {
                patiently("an answer", stream.read_exact(&mut [0; 2000])).await.unwrap();
            }
            asking.push(stream);
        }
    }
    for small in ["/metrics", "/api/loops", "/api/status?omitLastCycle=true"] {
        assert_eq!(get(admin, small).await.status, 200, "{small}");
    }
    let refused = get(admin, "/api/cycles/1").await;
    assert_eq!(refused.status, 429);
    let why = refused.text().await;
    let limits = [
        "the limit of 32 MiB for answers that clients of the admin address have not read yet is reached",
        "the limit of 16 MiB for answers that wait to become JSON is reached",
    ];
    assert!(limits.iter().any(|limit| why.contains(limit)), "{why}");
    let (_, most) = stage.service.memory();
    assert!(most < 500 << 20, "{} MB", most >> 20);
    drop(asking);
    assert_eq!(get(admin, "/api/cycles/1").await.json().await["telemetry"]["cycleId"], "1");
}

/// The memory of the events that single streams wait to send is bounded as well.
#[tokio::test]
async fn unread_events_take_bounded_memory() {
    /// Five of them fit into the memory at a time.
    const RECORDS: usize = 7;
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    register_one_with_a_large_output(&mut stage).await;
    for _ in 0..RECORDS {
        stage.client.run().await.unwrap();
    }
    let mut given = Vec::new();
    let mut refused = Vec::new();
    for revision in 0..RECORDS {
        let mut events = get(admin, &format!("/api/events?afterRevision={revision}")).await;
        let line = events.line().await;
        if line == "event: refused" {
            refused.push(events);
        } else {
            assert_eq!(line, format!("id: {}", revision + 1));
            given.push(events);
        }
    }
    assert_eq!((given.len(), refused.len()), (5, RECORDS - 5));
    // The stream ends with the error, and a client that reconnects misses no record once there is memory.
    for mut events in refused {
        let error = events.line().await;
        assert!(error.contains("the limit of 32 MiB for events"), "{error}");
        assert_eq!(events.text().await, "");
    }
    // Small events, and answers, have their own memory.
    let mut newest = get(admin, &format!("/api/events?afterRevision={RECORDS}")).await;
    assert_eq!([newest.line().await, newest.line().await], [format!("id: {RECORDS}"), "event: bookmark".to_owned()]);
    assert_eq!(get(admin, "/api/cycles/1").await.status, 200);
    drop(given);
    let again = async || get(admin, &format!("/api/events?afterRevision={}", RECORDS - 1)).await.line().await;
    patiently("room", async { while again().await == "event: refused" {} }).await;
}

#[tokio::test]
async fn an_endless_head_of_a_request_is_refused() {
    let stage = Stage::new().await;
    let long = format!("Cookie: {}", "x".repeat(200 << 10));
    assert_eq!(send(stage.service.admin(), "GET /", &["Host: localhost", &long]).await.status, 431);
    assert_eq!(send(stage.service.admin(), "GET /", &["Host: localhost", &long[..20 << 10]]).await.status, 200);
}

#[tokio::test]
async fn a_record_with_too_many_values_for_json_is_passed_over() {
    const NULLS: usize = 150_000;
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    let (_, before) = stage.service.memory();
    stage.fleet.run("nulls", Run::output(&serde_json::json!({ "list": vec![Value::Null; NULLS] })));
    stage.register("nulls", |it| it.record_output = true).await;
    stage.client.run().await.unwrap();
    let refused = get(admin, "/api/cycles/1").await;
    assert_eq!(refused.status, 429);
    let refused = refused.text().await;
    assert!(refused.contains("more than 140000 values") && refused.contains("ask by gRPC"), "{refused}");
    let mut events = get(admin, "/api/events?fromOldest=true").await;
    assert_eq!([events.line().await, events.line().await], ["id: 1", "event: unreadable"]);
    let (_, most) = stage.service.memory();
    // As messages, all of them would take 130 MiB.
    assert!(most - before < 64 << 20, "{} MiB more", (most - before) >> 20);
    // Other records are sent.
    stage.fleet.run("nulls", Run::Echo);
    stage.client.run().await.unwrap();
    assert_eq!(get(admin, "/api/cycles/2").await.status, 200);
}
