//! The log of the service.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    process::Stdio,
};

use crate::common::{
    Stage,
    fleet::Run,
    http, patiently,
    service::{Home, Service, ms, registration},
};
use orchestrator_core::proto::orchestrator::v1 as pb;
use rustix::{
    process::Signal,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
};
use serde_json::Value;
use tokio::{process::Command, task};
use tonic::{Code, Request};

/// A home whose services log JSON, as they do without a terminal.
fn home(config: &str) -> Home {
    Home::new().with_config(config).with_log_format("auto")
}

/// All lines so far.
fn lines(home: &Home) -> Vec<Value> {
    let text = fs::read_to_string(home.path("log")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line:?} is not JSON"))).collect()
}

fn with_message(home: &Home, message: &str) -> Vec<Value> {
    lines(home).into_iter().filter(|line| line["message"].as_str().is_some_and(|it| it.starts_with(message))).collect()
}

async fn until_logged(home: &Home, message: &str, times: usize) -> Vec<Value> {
    let logged = async {
        loop {
            let found = with_message(home, message);
            if found.len() >= times {
                return found;
            }
            tokio::task::yield_now().await;
        }
    };
    patiently(message, logged).await
}

#[tokio::test]
async fn a_cycle_that_does_not_succeed_is_a_warn_with_its_fields_and_others_are_at_debug() {
    let mut stage = Stage::at(home("")).await;
    stage.register_all(&["a", "b"]).await;
    stage.client.run().await.unwrap();
    stage.fleet.run("a", Run::Fail(Code::Internal, "no fuel".into()));
    let mut request = Request::new(pb::RunCycleRequest::default());
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    stage.client.run_cycle(request).await.unwrap();

    let logged = until_logged(&stage.home, "a cycle did not succeed", 1).await;
    assert_eq!(logged.len(), 1);
    assert_eq!((&logged[0]["level"], &logged[0]["cycle_id"]), (&"WARN".into(), &2.into()));
    assert_eq!(logged[0]["state"], "DEGRADED");
    assert_eq!(logged[0]["error"], "1 of 2 failed: a INTERNAL: no fuel");
    assert_eq!(logged[0]["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    let registered = with_message(&stage.home, "registered");
    assert_eq!(registered.iter().map(|line| &line["subsystem"]).collect::<Vec<_>>(), ["a", "b"]);
    assert!(with_message(&stage.home, "recorded").is_empty());

    // The level can be changed while the service runs.
    fs::write(stage.home.path("orchestrator.toml"), "[log]\nfilter = \"orchestrator_core=debug\"\n").unwrap();
    stage.service.signal(Signal::HUP);
    let reloaded = until_logged(&stage.home, "reloaded", 1).await;
    assert_eq!(reloaded[0]["changed"], "log.filter");
    stage.fleet.run("a", Run::Echo);
    stage.client.run().await.unwrap();
    let logged = until_logged(&stage.home, "recorded", 1).await;
    assert_eq!((&logged[0]["level"], &logged[0]["cycle_id"]), (&"DEBUG".into(), &3.into()));
    assert_eq!(stage.service.stop().await.code(), Some(0));
    assert_eq!(with_message(&stage.home, "drained").len(), 1);
}

#[tokio::test]
async fn changes_of_the_registry_and_of_breakers_are_logged_once() {
    let mut stage = Stage::at(home("")).await;
    let breaker = |it: &mut pb::Registration| {
        it.breaker = Some(pb::BreakerPolicy { failure_threshold: 2, open_for: ms(1), ..Default::default() });
    };
    stage.register("a", breaker).await;
    // The same registration again only renews it.
    stage.register("a", breaker).await;
    stage.fleet.run("a", Run::Fail(Code::Internal, "no fuel".into()));
    for _ in 0..6 {
        stage.client.run().await.unwrap();
    }
    let opened = until_logged(&stage.home, "its circuit breaker has opened", 1).await;
    assert_eq!(opened.len(), 1, "{opened:?}");
    assert_eq!((&opened[0]["level"], &opened[0]["subsystem"]), (&"WARN".into(), &"a".into()));
    assert_eq!((&opened[0]["cycle_id"], &opened[0]["error"]), (&2.into(), &"no fuel".into()));
    stage.fleet.run("a", Run::Echo);
    let closed = async {
        while with_message(&stage.home, "its circuit breaker has closed").is_empty() {
            stage.client.run().await.unwrap();
        }
    };
    patiently("the breaker to close", closed).await;

    stage.client.suspend_subsystem(pb::SuspendSubsystemRequest { name: "a".into() }).await.unwrap();
    stage.client.resume_subsystem(pb::ResumeSubsystemRequest { name: "a".into() }).await.unwrap();
    stage.client.unregister_subsystem(pb::UnregisterSubsystemRequest { name: "a".into() }).await.unwrap();
    let spec = pb::IntervalLoop { name: "l".into(), interval: ms(3_600_000), ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(spec) }).await.unwrap();
    stage.client.stop_interval_loop(pb::StopIntervalLoopRequest { name: "l".into() }).await.unwrap();
    for (message, field, name) in [
        ("registered", "subsystem", "a"),
        ("suspended", "subsystem", "a"),
        ("resumed", "subsystem", "a"),
        ("unregistered", "subsystem", "a"),
        ("a loop has started", "loop", "l"),
        ("a loop has stopped", "loop", "l"),
    ] {
        let logged = until_logged(&stage.home, message, 1).await;
        assert_eq!(logged.len(), 1, "{message}: {logged:?}");
        assert_eq!((&logged[0]["level"], &logged[0][field]), (&"INFO".into(), &name.into()), "{message}");
    }
}

#[tokio::test]
async fn a_reload_names_its_changes() {
    let entry = |name: &str, phase: i32| {
        format!("[[subsystems]]\nname = \"{name}\"\nendpoint = \"http://127.0.0.1:1\"\nphase = {phase}\n")
    };
    let stage = Stage::at(home(&[entry("a", 1), entry("b", 1)].concat())).await;
    let mut config = String::from("[cycle]\ndeadline = \"1s\"\n");
    for (name, phase) in [("b", 2), ("c", 1)] {
        write!(config, "{}", entry(name, phase)).unwrap();
    }
    fs::write(stage.home.path("orchestrator.toml"), config).unwrap();
    stage.service.signal(Signal::HUP);
    let logged = until_logged(&stage.home, "reloaded", 1).await;
    assert_eq!(logged[0]["changed"], "cycle.deadline, subsystem a removed, subsystem b changed, subsystem c added");
}

#[tokio::test]
async fn dropped_ticks_are_logged_once() {
    let mut stage = Stage::at(home("[cycle]\nmax_queued = 0\n")).await;
    stage.register_all(&["a"]).await;
    stage.fleet.run("a", Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("a", 1).await;
    let overlap_policy = pb::OverlapPolicy::BufferAll.into();
    let spec = pb::IntervalLoop { name: "fast".into(), interval: ms(10), overlap_policy, ..Default::default() };
    stage.client.start_interval_loop(pb::StartIntervalLoopRequest { r#loop: Some(spec) }).await.unwrap();
    let dropped = async { while stage.client.status().await.unwrap().loops[0].ticks.as_ref().unwrap().dropped < 20 {} };
    patiently("twenty dropped ticks", dropped).await;
    let logged = until_logged(&stage.home, "ticks are dropped", 1).await;
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert_eq!((&logged[0]["level"], &logged[0]["loop"]), (&"WARN".into(), &"fast".into()));
    stage.fleet.run("a", Run::Echo);
}

#[tokio::test]
async fn texts_of_others_stay_inside_their_line() {
    const HOSTILE: &str = "no fuel\n2026-01-01T00:00:00Z  INFO forged\u{1b}[31m\u{9b}31m\u{202e}\u{200b}\r";
    for format in ["text", "json"] {
        let mut stage = Stage::at(Home::new().with_log_format(format)).await;
        let breaker = Some(pb::BreakerPolicy { failure_threshold: 1, ..Default::default() });
        stage.register("a", |it| it.breaker = breaker).await;
        stage.fleet.run("a", Run::Fail(Code::Internal, HOSTILE.into()));
        let endpoint = format!("unix:/{HOSTILE}");
        let refused = stage.client.register(registration("b", &endpoint)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        let summary = "1 of 1 failed: a INTERNAL: no fuel 2026-01-01T00:00:00Z  INFO forged[31m31m";
        assert_eq!(stage.client.run().await.unwrap().error, summary);
        // The log is complete once the service has ended.
        let Stage { home, service, .. } = stage;
        assert!(service.stop().await.success());
        let log = home.log();
        let forged = log.lines().filter(|line| line.contains("forged")).count();
        assert_eq!(forged, 2, "of the cycle and of the breaker: {log}");
        assert!(log.lines().all(|line| !line.starts_with("2026-01-01")), "{log}");
        assert!(!log.contains(['\u{1b}', '\u{9b}', '\u{202e}', '\u{200b}', '\r']), "{log}");
        if format == "json" {
            let logged = with_message(&home, "a cycle did not succeed");
            assert_eq!(logged[0]["error"], summary);
        }
    }
}

/// Number of dropped lines of the log.
async fn dropped(service: &Service) -> u64 {
    let metrics = http::get(service.admin(), "/metrics").await;
    let metric = "orchestrator_log_lines_dropped_total ";
    metrics.text().await.lines().find_map(|line| line.strip_prefix(metric)?.parse().ok()).unwrap()
}

#[tokio::test]
async fn an_unread_log_does_not_block_the_service_and_dropped_lines_are_reported() {
    let home = Home::new().with_args(["--log-filter", "trace,h2=trace"]).with_log_format("json");
    let (log, unread) = io::pipe().unwrap();
    let mut service = home.spawn_with_log(unread).listening().await.unwrap();
    let mut client = service.client().await;
    let mut log = Some(BufReader::new(log));
    for _ in 0..2 {
        let before = dropped(&service).await;
        let until_dropped = async {
            while dropped(&service).await == before {
                client.run().await.unwrap();
            }
        };
        patiently("lines to be dropped", until_dropped).await;
        client.run().await.unwrap();
        // Once the log is read again, it reports them itself.
        let mut reading = log.take().unwrap();
        let logged = task::spawn_blocking(move || {
            loop {
                let mut line = String::new();
                reading.read_line(&mut line).unwrap();
                let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?} is not JSON"));
                if line["message"].as_str().is_some_and(|it| it.starts_with("lines of the log were dropped")) {
                    return (reading, line);
                }
            }
        });
        let (reading, line) = patiently("the log to report them", logged).await.unwrap();
        assert_eq!(line["level"], "WARN");
        assert!(line["lines"].as_u64() > Some(0), "{line}");
        log = Some(reading);
    }
    let before = dropped(&service).await;
    let until_dropped = async {
        while dropped(&service).await == before {
            client.run().await.unwrap();
        }
    };
    patiently("lines to be dropped", until_dropped).await;
    service.signal(Signal::TERM);
    assert_eq!(service.ended().await.code(), Some(0));
}

#[tokio::test]
async fn on_a_terminal_lines_are_for_people() {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let mut service = Command::new(env!("CARGO_BIN_EXE_orchestrator"))
        .args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", "off", "--store", "memory:"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::options().write(true).open(name.to_str().unwrap()).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        BufReader::new(File::from(terminal)).read_line(&mut line).map(|_| line)
    });
    let line = patiently("the first line of the log", read).await.unwrap().unwrap();
    assert!(line.contains("INFO") && line.contains("orchestrator_core::serve") && !line.starts_with('{'), "{line:?}");
    service.kill().await.unwrap();
}
