//! The ready-made monitoring: its files use existing metrics, and Prometheus accepts all of them.

use std::{
    collections::BTreeSet,
    env,
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
};

use crate::common::{
    Stage,
    fleet::Run,
    http::get,
    patiently,
    service::{Home, Service, ms},
    tokens::{write_private, write_tokens},
};
use orchestrator_core::{
    proto::{orchestrator::v1 as pb, subsystem::v1 as subsystem},
    telemetry::metrics::{ALL, Kind},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/monitoring")
}

fn read(name: &str) -> String {
    fs::read_to_string(examples().join(name)).unwrap()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("grafana.json")).unwrap()
}

/// The panels except for headings.
fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row")
}

/// Every expression of the dashboard, as Grafana sends it.
fn expressions(dashboard: &Value) -> Vec<String> {
    let targets = panels(dashboard).flat_map(|panel| panel["targets"].as_array().unwrap());
    let filled_in = |target: &Value| {
        let expression = target["expr"].as_str().unwrap();
        let variables = [("$__rate_interval", "1m"), ("$__range", "1h"), ("$instance", ".*"), ("$subsystem", ".*")];
        variables.into_iter().fold(expression.to_owned(), |text, (name, value)| text.replace(name, value))
    };
    targets.map(filled_in).collect()
}

// ---------------------------------------------------------------------------------------------------------------
// The files

/// The names of metrics in a text, by their prefixes.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    words.filter(|word| word.contains("orchestrator_") || word.starts_with("process_")).collect()
}

#[test]
fn the_files_use_existing_metrics() {
    let recording = read("recording.yml");
    let recorded: BTreeSet<_> = recording.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).collect();
    assert!(!recorded.is_empty());
    let mut known: BTreeSet<String> = recorded.iter().map(|name| (*name).to_owned()).collect();
    for definition in ALL {
        match definition.kind {
            Kind::Histogram => {
                known.extend(["bucket", "sum", "count"].map(|part| format!("{}_{part}", definition.name)));
            }
            Kind::Counter | Kind::Gauge => {
                known.insert(definition.name.to_owned());
            }
        }
    }
    let (alerts, tests) = (read("alerts.yml"), read("rules_test.yml"));
    let dashboard = expressions(&dashboard()).join("\n");
    for (file, text) in [
        ("recording.yml", &recording),
        ("alerts.yml", &alerts),
        ("rules_test.yml", &tests),
        ("grafana.json", &dashboard),
    ] {
        let names = names(text);
        assert!(names.len() > 5, "{file} was not read: {names:?}");
        for name in names {
            assert!(known.contains(name), "{file} uses {name}, which does not exist");
        }
    }
}

#[test]
fn every_alert_is_tested_and_says_what_to_do() {
    let (alerts, tests) = (read("alerts.yml"), read("rules_test.yml"));
    let (_, rules) = alerts.split_once("rules:").unwrap();
    for rule in rules.split("- alert: ").skip(1) {
        let name = rule.lines().next().unwrap();
        for part in ["severity: ", "summary: ", "description: "] {
            assert!(rule.contains(part), "{name} lacks {part}");
        }
        assert!(
            tests.contains(&format!("ALERTS{{alertname=\"{name}\", alertstate=\"firing\"")),
            "{name} is not tested"
        );
    }
}

#[test]
fn every_alert_links_to_its_runbook() {
    let (page, alerts) = ("docs/operations.md", read("alerts.yml"));
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
    let (_, runbooks) = text.split_once("\n## Alerts\n").unwrap();
    let sections: Vec<_> = runbooks.split("\n### ").skip(1).filter_map(|section| section.split_once('\n')).collect();
    let (_, rules) = alerts.split_once("rules:").unwrap();
    let names: Vec<_> = rules.split("- alert: ").skip(1).filter_map(|rule| rule.split_once('\n')).collect();
    assert!(!names.is_empty());
    for (name, rule) in &names {
        let link = format!("runbook_url: {page}#{}", name.to_lowercase());
        assert!(rule.lines().any(|line| line.trim() == link), "{name} lacks {link}");
        let (_, section) = sections.iter().find(|(heading, _)| heading == name).unwrap_or_else(|| {
            panic!("{page} has no section on {name}");
        });
        for part in ["**Meaning.**", "**First look.**", "**Remedy.**", "**Harmless**"] {
            assert!(section.contains(part), "the runbook of {name} lacks {part}");
        }
    }
    for (heading, _) in sections {
        assert!(
            names.iter().any(|(name, _)| *name == heading),
            "{page} has a runbook for {heading}, which is no alert"
        );
    }
}

#[test]
fn grafana_can_show_the_dashboard() {
    let dashboard = dashboard();
    let mut ids = BTreeSet::new();
    let mut places = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title} has the id of another panel");
        let place = |side| panel["gridPos"][side].as_u64().unwrap();
        for (column, line) in (place("x")..place("x") + place("w"))
            .flat_map(|column| (place("y")..place("y") + place("h")).map(move |line| (column, line)))
        {
            assert!(column < 24 && places.insert((column, line)), "{title} overlaps another panel, or the edge");
        }
    }
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    assert!(variables.iter().any(|it| it["type"] == "datasource" && it["name"] == "datasource"));
    assert!(panels(&dashboard).count() > 20);
    for panel in panels(&dashboard) {
        assert!(!panel["description"].as_str().unwrap().is_empty(), "{panel}");
        assert_eq!(panel["datasource"]["uid"], "${datasource}");
        // The schema of Grafana has no default for these.
        let has_legend = panel["options"]["legend"]["showLegend"] == true;
        assert!(has_legend || panel["type"] != "timeseries", "{panel}");
        let mut references = BTreeSet::new();
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"]["uid"], "${datasource}");
            assert!(references.insert(target["refId"].as_str().unwrap()), "{panel}");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// With Prometheus

/// True if Prometheus is installed. With `CHECK_ALL`, a missing one is a failure.
async fn is_installed() -> bool {
    for tool in ["promtool", "prometheus"] {
        let probed = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().await;
        if !probed.is_ok_and(|status| status.success()) {
            let missing = format!("Prometheus IS NOT TESTED WITH: {tool} --version failed");
            assert!(env::var_os("CHECK_ALL").is_none(), "{missing}");
            eprintln!("\n*** {missing} ***\n");
            return false;
        }
    }
    true
}

/// A service with values for every metric, after a cycle.
async fn stage() -> Stage {
    let mut stage = Stage::new().await;
    stage.register_all(&["good", "bad"]).await;
    let odd = [("quote \" backslash \\ newline \n} 1", 1.0), ("𝄞 grüße", f64::MIN), ("\u{1}\u{7f}\r\t", f64::INFINITY)];
    let metrics = odd.map(|(name, value)| (name.to_owned(), value)).into();
    let answer = subsystem::RunCycleResponse { metrics, ..subsystem::RunCycleResponse::default() };
    stage.fleet.run("good", Run::Answer(answer));
    stage.fleet.run("bad", Run::fail(tonic::Code::Internal));
    let registration = Some(stage.registration("leased"));
    let lease = pb::RegisterSubsystemRequest { registration, lease: ms(3_600_000) };
    stage.client.register_subsystem(lease).await.unwrap();
    let hourly = pb::IntervalLoop { name: "hourly".into(), interval: ms(3_600_000), ..pb::IntervalLoop::default() };
    let hourly = pb::StartIntervalLoopRequest { r#loop: Some(hourly) };
    stage.client.start_interval_loop(hourly).await.unwrap();
    stage.client.run().await.unwrap();
    stage
}

#[tokio::test]
#[ignore = "needs Prometheus; .ci/run has it"]
async fn promtool_accepts_the_metrics() {
    if !is_installed().await {
        return;
    }
    let stage = stage().await;
    let text = get(stage.service.admin(), "/metrics").await.text().await;
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.kill_on_drop(true).spawn().unwrap();
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(text.as_bytes()).await.unwrap();
    drop(input);
    let checked = patiently("promtool", promtool.wait_with_output()).await.unwrap();
    let said = String::from_utf8([checked.stdout, checked.stderr].concat()).unwrap();
    assert!(checked.status.success() && said.is_empty(), "{said}");
}

#[tokio::test]
#[ignore = "needs Prometheus; .ci/run has it"]
async fn promtool_accepts_the_rules_and_their_tests() {
    if !is_installed().await {
        return;
    }
    for check in [
        &["check", "config", "prometheus.yml"][..],
        &["check", "config", "prometheus-replicas.yml"],
        &["check", "rules", "recording.yml", "alerts.yml"],
        &["test", "rules", "rules_test.yml"],
    ] {
        let checked = Command::new("promtool").args(check).current_dir(examples()).output().await.unwrap();
        let said = String::from_utf8([checked.stdout, checked.stderr].concat()).unwrap();
        assert!(checked.status.success(), "promtool {}:\n{said}", check.join(" "));
        println!("{said}");
    }
}

/// A Prometheus that scrapes a service as in the example, but more often. It is killed when it is dropped.
struct Prometheus {
    _process: Child,
    address: SocketAddr,
}

impl Prometheus {
    async fn watch(service: &Service, home: &Path) -> Self {
        Self::watch_with(service, home, None).await
    }

    /// With the token in this file, if any.
    async fn watch_with(service: &Service, home: &Path, token: Option<&Path>) -> Self {
        for rules in ["recording.yml", "alerts.yml"] {
            fs::copy(examples().join(rules), home.join(rules)).unwrap();
        }
        let mut config = read("prometheus.yml").replace("127.0.0.1:7780", &service.admin().to_string());
        if let Some(token) = token {
            let authorization = format!("    authorization: {{credentials_file: '{}'}}\n", token.display());
            config = config.replace("    static_configs:\n", &(authorization + "    static_configs:\n"));
        }
        fs::write(home.join("prometheus.yml"), config.replace("interval: 15s", "interval: 500ms")).unwrap();
        let mut process = Command::new("prometheus")
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0"])
            .current_dir(home)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut listening = String::new();
        let address = loop {
            let line = patiently("Prometheus to listen", lines.next_line()).await.unwrap();
            let line = line.unwrap_or_else(|| panic!("Prometheus has ended:\n{listening}"));
            listening += &line;
            listening.push('\n');
            if let Some((_, address)) = line.split_once("msg=\"Listening on\" address=") {
                break address.trim().parse().unwrap();
            }
        };
        // Its further output is read too, so that it is never blocked.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let ready = async { while get(address, "/-/ready").await.status != 200 {} };
        patiently("Prometheus to be ready", ready).await;
        Self { _process: process, address }
    }

    /// Reads the current values of an expression.
    async fn query(&self, expression: &str) -> Value {
        let mut path = "/api/v1/query?query=".to_owned();
        for byte in expression.bytes() {
            write!(path, "%{byte:02x}").unwrap();
        }
        let answer = get(self.address, &path).await.json().await;
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        answer["data"]["result"].clone()
    }

    /// Waits until an expression has exactly this value.
    async fn until(&self, expression: &str, value: &str) {
        let asking = async {
            while self.query(expression).await[0]["value"][1] != value {
                tokio::task::yield_now().await;
            }
        };
        patiently(&format!("{expression} to be {value}"), asking).await;
    }
}

#[tokio::test]
#[ignore = "needs Prometheus; .ci/run has it"]
async fn prometheus_watches_the_service() {
    if !is_installed().await {
        return;
    }
    let mut stage = stage().await;
    let home = tempfile::tempdir().unwrap();
    let prometheus = Prometheus::watch(&stage.service, home.path()).await;
    prometheus.until("up{job=\"orchestrator\"}", "1").await;
    prometheus.until("orchestrator_cycles_total{state=\"degraded\",trigger=\"manual\"}", "1").await;
    stage.client.run().await.unwrap();
    stage.client.run().await.unwrap();
    prometheus.until("orchestrator_cycles_total{state=\"degraded\",trigger=\"manual\"}", "3").await;
    prometheus.until("count(orchestrator_subsystem_metric)", "3").await;
    prometheus
        .until("ALERTS{alertname=\"OrchestratorSubsystemDown\",subsystem=\"bad\",alertstate=\"pending\"}", "1")
        .await;
    prometheus.until("count(instance_loop:orchestrator_loop_last_cycle:timestamp_seconds)", "1").await;

    // Rates need two scrapes. Then every expression of the dashboard has a value, except for those of missing things.
    prometheus.until("count_over_time(orchestrator_epoch[1m]) > bool 2", "1").await;
    let mut empty = BTreeSet::new();
    for expression in expressions(&dashboard()) {
        if prometheus.query(&expression).await.as_array().unwrap().is_empty() {
            empty.insert(expression);
        }
    }
    let nothing = |expression: &&String| {
        let of_replicas = [
            "orchestrator_lease_ttl_seconds",
            "orchestrator_can_lead",
            "orchestrator_store_synchronous",
            "orchestrator_leader_changes_total",
            "orchestrator_clock_offset_seconds",
        ];
        let of_loops_and_retries = ["orchestrator_loop_lag_seconds", "retries_total", "disposition!=\"ran\""];
        of_replicas.iter().chain(&of_loops_and_retries).any(|of| expression.contains(of))
    };
    let missing: Vec<_> = empty.iter().filter(|expression| !nothing(expression)).collect();
    assert!(missing.is_empty(), "these have no value: {missing:#?}");

    stage.service.kill().await;
    prometheus.until("up{job=\"orchestrator\"}", "0").await;
}

#[tokio::test]
#[ignore = "needs Prometheus; .ci/run has it"]
async fn prometheus_scrapes_with_the_token_in_a_file() {
    if !is_installed().await {
        return;
    }
    let home = Home::new().in_memory();
    let tokens = write_tokens(&home.path("tokens.toml"), &["prometheus", "wall"]);
    let config = format!(
        "[access]\nmode = \"enforce\"\ntokens_file = '{}'\n\
         [[access.grants]]\nwho = [\"token:prometheus\"]\nrole = \"monitor\"\n\
         [[access.grants]]\nwho = [\"token:wall\"]\nrole = \"viewer\"\nsubsystems = [\"*\"]\n",
        home.path("tokens.toml").display()
    );
    let home = home.with_config(&config);
    let service = home.serve().await;
    for (name, up) in [("prometheus", "1"), ("wall", "0")] {
        let (_, text) = &tokens[name];
        let token = home.path(name);
        write_private(&token, text);
        let files = tempfile::tempdir().unwrap();
        let prometheus = Prometheus::watch_with(&service, files.path(), Some(&token)).await;
        prometheus.until("up{job=\"orchestrator\"}", up).await;
    }
}
