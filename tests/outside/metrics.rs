//! Metrics: their values after known events, their table in the documentation, and their format, which Prometheus
//! accepts.

#![allow(clippy::float_cmp, reason = "what is compared was counted, or sent as it is")]

use std::{collections::BTreeMap, env, fmt::Write as _, fs, net::SocketAddr, path::Path};

use crate::common::{
    Stage,
    fleet::{Fleet, Run},
    http::get,
    patiently,
    service::{Home, ms, next_recorded, registration},
};
use orchestrator_core::{
    model,
    proto::{DESCRIPTORS, orchestrator::v1 as pb, subsystem::v1 as subsystem},
    telemetry::metrics::{ALL, Kind},
};
use prost_reflect::DescriptorPool;
use tonic::{Code, Request, codegen::http::uri::PathAndQuery, transport::Channel};

/// The result of a scrape.
struct Scrape {
    text: String,
    /// Values by name and labels, as they are written.
    series: BTreeMap<String, f64>,
}

impl Scrape {
    async fn of(admin: SocketAddr) -> Self {
        let answer = get(admin, "/metrics").await;
        assert_eq!(answer.status, 200);
        assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
        let text = answer.text().await;
        let mut series = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let twice = series.insert(name.to_owned(), value.parse().unwrap());
            assert!(twice.is_none(), "{name} occurs twice");
        }
        Self { text, series }
    }

    fn get(&self, series: &str) -> Option<f64> {
        self.series.get(series).copied()
    }

    /// Asserts the values of series.
    #[track_caller]
    fn has<const N: usize>(&self, expected: [(&str, f64); N]) {
        for (series, value) in expected {
            assert_eq!(self.get(series), Some(value), "{series}");
        }
    }

    /// The sum of all series of a metric.
    fn sum(&self, metric: &str) -> f64 {
        let is_of =
            |series: &str| series.strip_prefix(metric).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'));
        self.series.iter().filter(|(series, _)| is_of(series)).map(|(_, value)| value).sum()
    }
}

/// Scrapes until the metrics fulfill this condition.
async fn until(admin: SocketAddr, what: &str, holds: impl Fn(&Scrape) -> bool) -> Scrape {
    let scraping = async {
        loop {
            let scrape = Scrape::of(admin).await;
            if holds(&scrape) {
                return scrape;
            }
        }
    };
    patiently(what, scraping).await
}

fn metrics<const N: usize>(metrics: [(&str, f64); N]) -> Run {
    let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
    Run::Answer(subsystem::RunCycleResponse { metrics, ..subsystem::RunCycleResponse::default() })
}

#[tokio::test]
async fn connections_to_subsystems_are_counted_and_so_is_each_step_that_failed() {
    let mut stage = Stage::new().await;
    let at_socket = Fleet::at_socket(&stage.home.path("fleet.sock"));
    let plain = stage.fleet.endpoint().to_owned();
    let admin = format!("http://{}", stage.service.admin());
    let another = format!("uid:{}", rustix::process::geteuid().as_raw() + 1);
    for (name, endpoint, peer) in [
        ("a", plain.as_str(), None),
        ("b", &plain, None),
        ("connect", "http://127.0.0.1:1", None),
        ("tls", &plain.replace("http", "https"), None),
        ("http2", &admin, None),
        ("identity", at_socket.endpoint(), Some(&another)),
    ] {
        let tls = peer.map(|peer| pb::Tls { peer: peer.clone() });
        stage.client.register(pb::Registration { tls, ..registration(name, endpoint) }).await.unwrap();
    }
    stage.client.run().await.unwrap();
    // A connection that has failed ends a little after its call.
    let only_two = async {
        loop {
            let scrape = Scrape::of(stage.service.admin()).await;
            if scrape.get("orchestrator_dial_connections") == Some(2.0) {
                break scrape;
            }
        }
    };
    let scrape = patiently("the connections that have failed to end", only_two).await;
    for step in ["connect", "tls", "http2", "identity"] {
        let failures = scrape.get(&format!("orchestrator_dial_failures_total{{step=\"{step}\"}}"));
        assert!(failures >= Some(1.0), "{step}: {failures:?}");
    }
}

#[tokio::test]
async fn cycles_and_their_parts_are_counted() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["good", "idle"]).await;
    stage
        .register("bad", |it| {
            let open_for = ms(3_600_000);
            it.breaker = Some(pb::BreakerPolicy { failure_threshold: 2, open_for, disabled: false });
            it.retry = Some(pb::RetryPolicy { max_attempts: 3, initial_backoff: ms(1), ..pb::RetryPolicy::default() });
        })
        .await;
    stage.register("needs-bad", |it| it.requires = vec!["bad".into()]).await;
    stage.register("late", |it| it.timeout = ms(1)).await;
    stage.fleet.run("bad", Run::fail(Code::Unavailable));
    stage.fleet.run("late", Run::Hang);
    stage.fleet.run("good", metrics([("temperature", -3.5), ("load", 0.25)]));
    let idle = pb::SuspendSubsystemRequest { name: "idle".into() };
    stage.client.suspend_subsystem(idle).await.unwrap();

    let before = Scrape::of(admin).await;
    before.has([
        ("orchestrator_cycles_total{state=\"succeeded\",trigger=\"manual\"}", 0.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"good\",state=\"succeeded\"}", 0.0),
        ("orchestrator_subsystem_duration_seconds_count{subsystem=\"good\"}", 0.0),
    ]);
    assert_eq!(before.get("orchestrator_subsystem_up{subsystem=\"good\"}"), None, "its state is unknown");

    for _ in 0..3 {
        stage.client.run().await.unwrap();
    }
    let scrape = Scrape::of(admin).await;
    scrape.has([
        ("orchestrator_cycles_total{state=\"degraded\",trigger=\"manual\"}", 3.0),
        ("orchestrator_cycle_duration_seconds_count{state=\"degraded\"}", 3.0),
        ("orchestrator_cycles_queued", 0.0),
        ("orchestrator_cycles_running", 0.0),
        ("orchestrator_subsystem_up{subsystem=\"good\"}", 1.0),
        ("orchestrator_subsystem_up{subsystem=\"bad\"}", 0.0),
        ("orchestrator_subsystem_up{subsystem=\"late\"}", 0.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"good\",state=\"succeeded\"}", 3.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"bad\",state=\"failed\"}", 2.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"bad\",state=\"circuit_open\"}", 1.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"needs-bad\",state=\"skipped\"}", 3.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"late\",state=\"timed_out\"}", 3.0),
        ("orchestrator_subsystem_duration_seconds_count{subsystem=\"bad\"}", 2.0),
        ("orchestrator_subsystem_duration_seconds_count{subsystem=\"late\"}", 3.0),
        ("orchestrator_subsystem_duration_seconds_bucket{subsystem=\"late\",le=\"60\"}", 3.0),
        ("orchestrator_subsystem_attempts_total{subsystem=\"good\"}", 3.0),
        ("orchestrator_subsystem_retries_total{subsystem=\"good\"}", 0.0),
        ("orchestrator_subsystem_attempts_total{subsystem=\"bad\"}", 6.0),
        ("orchestrator_subsystem_retries_total{subsystem=\"bad\"}", 4.0),
        ("orchestrator_subsystem_breaker_state{subsystem=\"bad\",state=\"open\"}", 1.0),
        ("orchestrator_subsystem_breaker_state{subsystem=\"bad\",state=\"closed\"}", 0.0),
        ("orchestrator_subsystem_breaker_state{subsystem=\"good\",state=\"closed\"}", 1.0),
        ("orchestrator_subsystem_suspended{subsystem=\"idle\"}", 1.0),
        ("orchestrator_subsystem_suspended{subsystem=\"good\"}", 0.0),
        ("orchestrator_subsystem_metric{subsystem=\"good\",metric=\"temperature\"}", -3.5),
        ("orchestrator_subsystem_metric{subsystem=\"good\",metric=\"load\"}", 0.25),
        ("orchestrator_subsystems{origin=\"rpc\"}", 5.0),
        ("orchestrator_subsystems{origin=\"config\"}", 0.0),
        ("orchestrator_store_records", 3.0),
        ("orchestrator_store_commit_errors_total", 0.0),
        ("orchestrator_connections{server=\"grpc\"}", 1.0),
        ("orchestrator_memory_limit_bytes{purpose=\"all\"}", 1_073_741_824.0),
        ("orchestrator_memory_limit_bytes{purpose=\"answers\"}", 134_217_728.0),
        ("orchestrator_memory_held_bytes{purpose=\"answers\"}", 0.0),
        ("orchestrator_draining", 0.0),
    ]);
    for nothing_known in ["needs-bad", "idle"] {
        assert_eq!(scrape.get(&format!("orchestrator_subsystem_up{{subsystem=\"{nothing_known}\"}}")), None);
    }
    // Each cycle begins with a buffered commit and ends with a durable one; registering and suspending are durable.
    scrape.has([("orchestrator_store_commit_duration_seconds_count{durability=\"buffered\"}", 3.0)]);
    assert!(scrape.sum("orchestrator_store_size_bytes") > 0.0);

    // The last numbers of a failed part are no longer shown.
    stage.fleet.run("good", Run::fail(Code::Internal));
    stage.client.run().await.unwrap();
    let scrape = Scrape::of(admin).await;
    scrape.has([("orchestrator_subsystem_up{subsystem=\"good\"}", 0.0)]);
    assert_eq!(scrape.get("orchestrator_subsystem_metric{subsystem=\"good\",metric=\"load\"}"), None);

    let unregister = pb::UnregisterSubsystemRequest { name: "bad".into() };
    stage.client.unregister_subsystem(unregister).await.unwrap();
    let scrape = Scrape::of(admin).await;
    assert!(!scrape.text.contains("\"bad\""), "its series are removed with it");
    assert!(scrape.text.contains("\"needs-bad\""));
}

#[tokio::test]
async fn a_cancelled_part_does_not_count_for_the_subsystem() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["held"]).await;
    stage.fleet.run("held", Run::Hold);
    let running = stage.client.admit().await.unwrap();
    stage.fleet.until_run("held", 1).await;
    let waiting = stage.client.admit().await.unwrap();
    Scrape::of(admin).await.has([("orchestrator_cycles_running", 1.0), ("orchestrator_cycles_queued", 1.0)]);

    let (one, mut other) = (stage.client.clone(), stage.client.clone());
    let cancel_waiting = tokio::spawn(async move { other.cancel(waiting).await.unwrap() });
    stage.client = one;
    stage.client.cancel(running).await.unwrap();
    cancel_waiting.await.unwrap();
    let scrape = Scrape::of(admin).await;
    scrape.has([
        ("orchestrator_cycles_total{state=\"cancelled\",trigger=\"manual\"}", 2.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"held\",state=\"cancelled\"}", 1.0),
        ("orchestrator_subsystem_duration_seconds_count{subsystem=\"held\"}", 0.0),
    ]);
    assert_eq!(scrape.get("orchestrator_subsystem_up{subsystem=\"held\"}"), None);
}

#[tokio::test]
async fn metrics_show_the_stored_state_after_a_restart() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a", "held"]).await;
    stage.client.run().await.unwrap();
    let made = "orchestrator_subsystem_output_timestamp_seconds{subsystem=\"a\"}";
    let before = Scrape::of(stage.service.admin()).await.get(made).unwrap();
    stage.fleet.run("held", Run::Hold);
    stage.client.admit().await.unwrap();
    stage.fleet.until_run("held", 2).await;

    let stage = stage.killed().await;
    let after = Scrape::of(stage.service.admin()).await;
    // The wire form has the time in the precision of the record.
    assert!((after.get(made).unwrap() - before).abs() < 0.001, "{:?} and {before}", after.get(made));
    after.has([
        ("orchestrator_cycles_total{state=\"interrupted\",trigger=\"manual\"}", 1.0),
        ("orchestrator_subsystem_outcomes_total{subsystem=\"a\",state=\"succeeded\"}", 0.0),
        ("orchestrator_store_records", 2.0),
    ]);
    let epoch = stage.client.clone().status().await.unwrap().epoch;
    #[allow(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit")]
    let epoch = epoch as f64;
    assert_eq!(after.get("orchestrator_epoch"), Some(epoch));
}

#[tokio::test]
async fn ticks_of_loops_are_counted() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["held"]).await;
    stage.fleet.run("held", Run::Hold);
    for (name, overlap) in [("skips", pb::OverlapPolicy::Skip), ("waits", pb::OverlapPolicy::BufferOne)] {
        let (name, overlap_policy) = (name.into(), overlap.into());
        let settings = pb::IntervalLoop { name, interval: ms(20), overlap_policy, ..pb::IntervalLoop::default() };
        let request = pb::StartIntervalLoopRequest { r#loop: Some(settings) };
        stage.client.start_interval_loop(request).await.unwrap();
    }
    let ticks = |name: &str, disposition: &str| {
        format!("orchestrator_loop_ticks_total{{loop=\"{name}\",disposition=\"{disposition}\"}}")
    };
    let lag = |name: &str| format!("orchestrator_loop_lag_seconds{{loop=\"{name}\"}}");
    let (skipped, coalesced) = (ticks("skips", "skipped"), ticks("waits", "coalesced"));
    let stuck = until(admin, "ticks that do not run", |scrape| {
        scrape.get(&skipped) > Some(1.0) && scrape.get(&coalesced) > Some(1.0)
    })
    .await;
    stuck.has([
        ("orchestrator_loop_interval_seconds{loop=\"skips\"}", 0.02),
        ("orchestrator_loop_stopped{loop=\"skips\"}", 0.0),
        ("orchestrator_loop_paused{loop=\"skips\"}", 0.0),
        ("orchestrator_cycles_running", 1.0),
    ]);
    // The oldest waiting tick gets older.
    let before = stuck.get(&lag("waits")).unwrap();
    let after = until(admin, "the lag to grow", |scrape| scrape.get(&lag("waits")) > Some(before + 0.02)).await;
    assert_eq!(after.get("orchestrator_loop_last_cycle_timestamp_seconds{loop=\"waits\"}"), None);

    stage.fleet.run("held", Run::Echo);
    let ran = ticks("waits", "ran");
    let went_on = until(admin, "ticks that run", |scrape| scrape.get(&ran) > Some(2.0)).await;
    let last_cycle = "orchestrator_loop_last_cycle_timestamp_seconds{loop=\"waits\"}";
    assert!(went_on.get(last_cycle) > went_on.get("orchestrator_term_start_time_seconds"));
    assert!(went_on.get("orchestrator_term_start_time_seconds") >= went_on.get("orchestrator_start_time_seconds"));
    assert!(went_on.get("orchestrator_cycles_total{state=\"succeeded\",trigger=\"loop\"}") > Some(0.0));

    for name in ["skips", "waits"] {
        stage.client.stop_interval_loop(pb::StopIntervalLoopRequest { name: name.into() }).await.unwrap();
    }
    assert!(!Scrape::of(admin).await.text.contains("loop=\""), "removed loops are not shown");
}

#[tokio::test]
async fn watchers_are_counted_and_stalled_ones_are_shown() {
    /// More records than the cache for watchers holds.
    const CYCLES: u32 = 300;
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["large"]).await;
    stage.register("large", |it| it.record_output = true).await;
    // So large that few records fill the buffers of a stalled watcher.
    stage.fleet.run("large", Run::large_output(64 << 10));
    let stalled = stage.service.client().await.watch_after(0).await.unwrap();
    let mut healthy = stage.client.watch_after(0).await.unwrap();
    for _ in 0..CYCLES {
        stage.client.run().await.unwrap();
        next_recorded(&mut healthy).await;
    }
    let scrape =
        until(admin, "the watcher to be behind", |scrape| scrape.sum("orchestrator_watchers_lagging") > 0.0).await;
    scrape.has([("orchestrator_watchers", 2.0), ("orchestrator_watchers_lagging", 1.0)]);
    let events = scrape.sum("orchestrator_watcher_events_total");
    assert!(events > CYCLES.into() && events < (2 * CYCLES).into(), "{events}");

    drop(stalled);
    let left = until(admin, "the watcher to leave", |scrape| scrape.sum("orchestrator_watchers") == 1.0).await;
    left.has([("orchestrator_watchers_lagging", 0.0)]);
    assert!(left.sum("orchestrator_watcher_events_total") >= events, "sent events stay counted");
}

#[tokio::test]
async fn errors_of_the_store_are_counted() {
    let mut stage = Stage::new().await;
    let admin = stage.service.admin();
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let (database, elsewhere) = (stage.home.path("o.db"), stage.home.path("elsewhere"));
    fs::rename(&database, &elsewhere).unwrap();
    stage.client.run().await.unwrap_err();
    let errors = "orchestrator_store_commit_errors_total";
    let failing = until(admin, "the next try", |scrape| scrape.get(errors) > Some(1.0)).await;
    failing
        .has([("orchestrator_subsystem_up{subsystem=\"a\"}", 1.0), ("orchestrator_connections{server=\"grpc\"}", 1.0)]);

    fs::rename(&elsewhere, &database).unwrap();
    // A cycle is counted once its record is durable, so this comes after the store counts the record.
    let succeeded = "orchestrator_cycles_total{state=\"succeeded\",trigger=\"manual\"}";
    let recorded = until(admin, "the record", |scrape| scrape.get(succeeded) == Some(2.0)).await;
    assert!(recorded.get(errors) > Some(1.0), "counted errors stay counted");
    recorded.has([("orchestrator_store_records", 2.0)]);
}

#[tokio::test]
async fn names_of_metrics_may_be_any_text() {
    let mut stage = Stage::new().await;
    stage.register_all(&["odd"]).await;
    stage.fleet.run("odd", metrics(HOSTILE));
    stage.client.run().await.unwrap();
    Scrape::of(stage.service.admin()).await.has([
        ("orchestrator_subsystem_metric{subsystem=\"odd\",metric=\"quote \\\" backslash \\\\ newline \\n} 1\"}", 1.0),
        ("orchestrator_subsystem_metric{subsystem=\"odd\",metric=\"𝄞 grüße\"}", -0.125),
        ("orchestrator_subsystem_metric{subsystem=\"odd\",metric=\"infinite\"}", f64::INFINITY),
    ]);
}

/// Unusual answers that the contract allows.
const HOSTILE: [(&str, f64); 6] = [
    ("quote \" backslash \\ newline \n} 1", 1.0),
    ("𝄞 grüße", -0.125),
    ("infinite", f64::INFINITY),
    ("tiny", f64::MIN_POSITIVE),
    ("control \u{1} \u{7f} \r \t", f64::MAX),
    ("none", f64::NAN),
];

#[tokio::test]
async fn every_call_is_counted_by_its_rpc_and_by_the_code_of_its_answer() {
    let stage = Stage::new().await;
    let admin = stage.service.admin();
    let channel = Channel::from_shared(format!("http://{}", stage.service.address())).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
    let service = pool.get_service_by_name("dreamnet.orchestrator.v1.Orchestrator").unwrap();
    for method in service.methods() {
        let path = format!("/{}/{}", service.full_name(), method.name()).parse::<PathAndQuery>().unwrap();
        grpc.ready().await.unwrap();
        // An empty request is valid for some RPCs and invalid for others.
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let code = if method.is_server_streaming() {
            drop(grpc.server_streaming(Request::new(()), path, codec).await.unwrap());
            Code::Cancelled
        } else {
            grpc.unary(Request::new(()), path, codec).await.map_or_else(|status| status.code(), |_| Code::Ok)
        };
        let code = model::Code::from_number(code as i32);
        let series = format!("orchestrator_calls_total{{server=\"grpc\",rpc=\"{}\",code=\"{code}\"}}", method.name());
        until(admin, &series, |scrape| scrape.get(&series) == Some(1.0)).await;
    }
    let paths = [
        ("/api/status", "GetStatus", "OK"),
        ("/api/cycles", "ListCycles", "OK"),
        ("/api/cycles/9", "GetCycle", "NOT_FOUND"),
        ("/api/plan", "PlanCycle", "OK"),
        ("/api/subsystems", "ListSubsystems", "OK"),
        ("/api/subsystems/nobody", "GetSubsystem", "NOT_FOUND"),
        ("/api/loops", "ListIntervalLoops", "OK"),
        ("/api/events", "WatchCycles", "CANCELLED"),
    ];
    for (path, rpc, code) in paths {
        drop(get(admin, path).await);
        let series = format!("orchestrator_calls_total{{server=\"admin\",rpc=\"{rpc}\",code=\"{code}\"}}");
        until(admin, &series, |scrape| scrape.get(&series) == Some(1.0)).await;
    }
    let scrape = Scrape::of(admin).await;
    assert!(scrape.get("orchestrator_calls_total{server=\"admin\",rpc=\"Metrics\",code=\"OK\"}") > Some(1.0));
}

// ---------------------------------------------------------------------------------------------------------------
// The table

/// A service with values for every metric.
async fn everything() -> Stage {
    let fleet = Fleet::start().await;
    let home = Home::new().with_config(&format!(
        "[access]\nmode = \"dry_run\"\n[[subsystems]]\nname = \"declared\"\nendpoint = {:?}\n[[loops]]\nname = \"quick\"\ninterval = \"20ms\"\n",
        fleet.endpoint()
    ));
    let stage = Stage::at(home).await;
    let mut stage = Stage { fleet, ..stage };
    stage.fleet.run("declared", metrics([("load", 0.5)]));
    let registration = Some(stage.registration("leased"));
    let request = pb::RegisterSubsystemRequest { registration, lease: ms(3_600_000) };
    stage.client.register_subsystem(request).await.unwrap();
    let mut cycles = stage.client.watch_after(0).await.unwrap();
    next_recorded(&mut cycles).await;
    stage
}

#[tokio::test]
async fn shown_and_defined_metrics_are_the_same() {
    let stage = everything().await;
    // The first cycle of the loop with both is the last to show its metrics.
    let both = "orchestrator_subsystem_up{subsystem=\"leased\"}";
    let scrape = until(stage.service.admin(), "a cycle of both", |scrape| scrape.get(both).is_some()).await;
    let mut kinds = BTreeMap::new();
    let mut helps = BTreeMap::new();
    for line in scrape.text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            assert!(kinds.insert(name, kind).is_none(), "{name} begins twice");
        } else if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            helps.insert(name, help);
        }
    }
    let shown = |definition: &&orchestrator_core::telemetry::metrics::Definition| {
        // TLS has its own test, and so have replicas and the store in PostgreSQL.
        const OF_REPLICAS: [&str; 6] = [
            "orchestrator_forwarded_calls_total",
            "orchestrator_lease_remaining_seconds",
            "orchestrator_lease_ttl_seconds",
            "orchestrator_can_lead",
            "orchestrator_leader_changes_total",
            "orchestrator_clock_offset_seconds",
        ];
        let is_here = !definition.name.starts_with("orchestrator_tls_")
            && !definition.help.contains("PostgreSQL")
            && !OF_REPLICAS.contains(&definition.name);
        is_here && (cfg!(target_os = "linux") || !definition.name.starts_with("process_"))
    };
    let defined: BTreeMap<_, _> = ALL.iter().filter(shown).map(|it| (it.name, it.kind.name())).collect();
    assert_eq!(kinds, defined);
    let defined: BTreeMap<_, _> = ALL.iter().filter(shown).map(|it| (it.name, it.help)).collect();
    assert_eq!(helps, defined);

    for series in scrape.series.keys() {
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let definition = ALL.iter().find(|it| {
            let is_histogram = it.kind == Kind::Histogram;
            let suffix = name.strip_prefix(it.name);
            suffix == Some("") || (is_histogram && matches!(suffix, Some("_bucket" | "_sum" | "_count")))
        });
        let labels: Vec<_> =
            labels.split(',').filter_map(|label| label.split_once('=')).map(|(name, _)| name).collect();
        let labels: Vec<_> = labels.into_iter().filter(|name| *name != "le").collect();
        assert_eq!(labels, definition.unwrap_or_else(|| panic!("{name} is not defined")).labels, "{series}");
    }
}

#[test]
fn the_table_in_the_documentation_agrees_with_the_definitions() {
    const HEAD: &str = "| name | type | labels | meaning |\n|---|---|---|---|\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, table) = text.split_once(HEAD).unwrap_or((&text, ""));
    let mut expected = String::new();
    for definition in ALL {
        let labels: Vec<_> = definition.labels.iter().map(|label| format!("`{label}`")).collect();
        let (kind, labels) = (definition.kind.name(), labels.join(", "));
        writeln!(expected, "| `{}` | {kind} | {labels} | {} |", definition.name, definition.help).unwrap();
    }
    if env::var_os("ORCHESTRATOR_TEST_UPDATE").is_some() {
        fs::write(&path, [before, HEAD, &expected].concat()).unwrap();
    } else {
        assert!(
            table == expected,
            "docs/metrics.md is out of date; renew it with\n\n    ORCHESTRATOR_TEST_UPDATE=1 cargo test --test \
             outside metrics::\n"
        );
    }
}
