//! The command line against the real service: what each command prints, and how it exits.

use std::{
    fs::File,
    io::{PipeReader, PipeWriter, Read, Write},
    net::SocketAddr,
    path::Path,
    process::{Output, Stdio},
    sync::Arc,
};

use crate::common::{
    door::Door,
    fleet::{Fleet, Run, from_struct, to_struct},
    patiently,
    service::{Client, Home, Service, decode, ms, part, registration},
    terminal::{self, Terminal},
};
use orchestrator_core::proto::{
    orchestrator::v1::{self as pb, SubsystemState},
    subsystem::v1 as pbs,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStderr, ChildStdout, Command},
};
use tonic::Code;

// ---------------------------------------------------------------------------------------------------------------
// The kit

/// The address of the service, for the command line.
struct Cli(SocketAddr);

/// The result of a command.
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ended {
    /// Its output, if it ended with this exit code.
    #[track_caller]
    fn with(self, code: i32) -> String {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }

    /// Its error message, if it ended with this exit code and printed nothing.
    #[track_caller]
    fn refused_with(self, code: i32) -> String {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{}", self.stderr);
        self.stderr
    }
}

/// The binary, without settings from the environment of the tests.
fn orchestrator() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    for variable in ["ADDRESS", "TIMEOUT", "OUTPUT", "CONFIG"] {
        command.env_remove(format!("ORCHESTRATOR_{variable}"));
    }
    command.env_remove("NO_COLOR").env_remove("COLUMNS").env("LC_ALL", "C.UTF-8");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn ended(command: &mut Command) -> Ended {
    patiently("a command to end", command.output()).await.unwrap().into()
}

impl Cli {
    fn of(service: &Service) -> Self {
        Self(service.address())
    }

    /// A command, which finds the service by its environment.
    fn command(&self, line: &str) -> Command {
        let mut command = orchestrator();
        command.env("ORCHESTRATOR_ADDRESS", self.0.to_string()).args(line.split_whitespace());
        command
    }

    async fn run(&self, line: &str) -> Ended {
        ended(&mut self.command(line)).await
    }

    /// Its output as JSON, if it succeeded.
    async fn json(&self, line: &str) -> Value {
        let output = ended(self.command(line).env("ORCHESTRATOR_OUTPUT", "json")).await.with(0);
        assert_eq!(output.lines().count(), 1, "{output}");
        serde_json::from_str(&output).unwrap()
    }

    /// Starts a command whose output is read while it runs.
    fn start(&self, line: &str) -> Running {
        let mut child = self.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        Running { child, stdout, stderr }
    }
}

struct Running {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    stderr: Lines<BufReader<ChildStderr>>,
}

impl Running {
    async fn line(&mut self) -> String {
        patiently("a line of output", self.stdout.next_line()).await.unwrap().unwrap()
    }

    async fn error_line(&mut self) -> String {
        patiently("a line on stderr", self.stderr.next_line()).await.unwrap().unwrap()
    }

    /// The rest of its output.
    async fn rest(&mut self) -> String {
        let mut rest = String::new();
        while let Some(line) = patiently("a line of output", self.stdout.next_line()).await.unwrap() {
            rest += &line;
            rest.push('\n');
        }
        rest
    }

    /// Reads stderr up to a line that contains this.
    async fn until_error(&mut self, what: &str) {
        while !self.error_line().await.contains(what) {}
    }

    fn interrupt(&self) {
        interrupt(&self.child);
    }

    async fn code(&mut self) -> i32 {
        patiently("a command to end", self.child.wait()).await.unwrap().code().unwrap()
    }
}

/// Interrupts a command, as Ctrl-C does.
fn interrupt(child: &Child) {
    let id = child.id().unwrap();
    kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), Signal::INT).unwrap();
}

/// A service, a fleet, and a registered subsystem for each name.
async fn house(names: &[&str]) -> (Home, Fleet, Service, Client) {
    let (home, fleet) = (Home::new(), Fleet::start().await);
    let service = home.serve().await;
    let mut client = service.client().await;
    for name in names {
        client.register(registration(name, fleet.endpoint())).await.unwrap();
    }
    (home, fleet, service, client)
}

/// The cells of the row that begins with this text.
#[track_caller]
fn row<'a>(table: &'a str, first: &str) -> Vec<&'a str> {
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(first));
    line.unwrap_or_else(|| panic!("no {first} in\n{table}")).split_whitespace().collect()
}

// ---------------------------------------------------------------------------------------------------------------
// Every command

#[tokio::test]
async fn subsystems_are_registered_shown_and_removed() {
    let (_home, fleet, service, mut client) = house(&[]).await;
    let cli = Cli::of(&service);
    assert_eq!(cli.run("subsystems list").await.with(0), "no subsystems\n");
    assert_eq!(cli.json("subsystems list").await, json!({ "subsystems": [] }));

    let register = format!(
        "subsystems register a --endpoint {} --phase -3 --requires x,y --after z --reads w --timeout-per-cycle 2s \
         --critical --record-output --lease 30s --param limit=5 --params-json {{\"limit\":1,\"deep\":{{\"er\":true}}}} \
         --retry-max-attempts 5 --retry-initial-backoff 10ms --retry-max-backoff 20ms --retry-backoff-multiplier 1.5 \
         --retry-retryable-status-codes UNAVAILABLE,ABORTED --breaker-failure-threshold 7 --breaker-open-for 1m \
         --limits-max-message-bytes 1000 --limits-max-output-bytes 900 --limits-max-metrics 8 --limits-max-issues 9",
        fleet.endpoint()
    );
    assert_eq!(cli.run(&register).await.with(0), "subsystem a is registered\n");
    assert_eq!(cli.run(&register).await.with(0), "subsystem a is registered, as before\n");
    let replaced = cli.json(&register).await;
    assert_eq!(replaced.get("created"), None, "canonical JSON has no defaults: {replaced}");
    let expected = json!({
        "name": "a", "endpoint": fleet.endpoint(), "phase": -3, "requires": ["x", "y"], "after": ["z"],
        "reads": ["w"], "timeout": "2s", "critical": true, "recordOutput": true,
        "parameters": { "limit": 5.0, "deep": { "er": true } },
        "retry": {
            "maxAttempts": 5, "initialBackoff": "0.010s", "maxBackoff": "0.020s", "backoffMultiplier": 1.5,
            "retryableStatusCodes": ["UNAVAILABLE", "ABORTED"],
        },
        "breaker": { "failureThreshold": 7, "openFor": "60s" },
        "limits": { "maxMessageBytes": 1000, "maxOutputBytes": 900, "maxMetrics": 8, "maxIssues": 9 },
    });
    assert_eq!(replaced["subsystem"]["registration"], expected);
    let registered = client.subsystems().await.unwrap();
    assert_eq!(registered[0].registration.as_ref().unwrap().phase, -3);

    let shown = cli.run("subsystems show a --latest-output --snapshot").await.with(0);
    for expected in
        ["requires       x, y", "5 attempts, backoff 10ms to 20ms times 1.5", r#"{"name":"a"}"#, "lease ends"]
    {
        assert!(shown.contains(expected), "no {expected:?} in\n{shown}");
    }
    let snapshot = cli.json("subsystems show a --snapshot").await;
    assert_eq!(snapshot["subsystem"]["snapshot"], json!({ "name": "a" }));
    assert_eq!(row(&cli.run("subsystems list").await.with(0), "a")[..3], ["a", "-3", "READY"]);

    assert!(cli.run("subsystems renew a").await.with(0).contains("(in 2"));
    assert!(cli.json("subsystems renew a").await["leaseExpiresAt"].as_str().unwrap().ends_with('Z'));
    assert_eq!(cli.run("subsystems suspend a").await.with(0), "subsystem a is suspended\n");
    assert_eq!(cli.json("subsystems list").await["subsystems"][0]["suspended"], true);
    assert_eq!(row(&cli.run("subsystems list").await.with(0), "a")[2], "SUSPENDED");
    assert_eq!(cli.run("subsystems resume a").await.with(0), "subsystem a is resumed\n");
    assert_eq!(cli.json("subsystems unregister a").await, json!({}));
    assert!(cli.run("subsystems unregister a").await.refused_with(1).contains("SUBSYSTEM_NOT_FOUND"));
}

#[tokio::test]
async fn some_fields_of_a_registration_are_changed_and_the_changes_shown() {
    let (_home, fleet, service, mut client) = house(&["b"]).await;
    let cli = Cli::of(&service);
    let endpoint = fleet.endpoint();
    let register = format!(
        "subsystems register a --endpoint {endpoint} --requires b --reads b --critical --retry-max-attempts 5 --param \
         limit=1 --param gone=true --param kept=\"x\" --lease 1h"
    );
    cli.run(&register).await.with(0);
    let set = "subsystems set a --timeout-per-cycle 4s --phase 3 --after b --param limit=5 \
               --clear requires,critical,retry,parameters.gone";
    let changed = cli.run(set).await.with(0);
    let expected = "\
subsystem a is changed
after               - → b
critical            yes → no
parameters.gone     true → -
parameters.limit    1 → 5
phase               0 → 3
requires            b → -
retry.max_attempts  5 → 3
timeout             10s → 4s
";
    assert_eq!(changed, expected);
    assert_eq!(cli.run(set).await.with(0), "subsystem a is unchanged: it had these values\n");
    let json = cli.json("subsystems set a --limits-max-issues 7").await;
    assert_eq!(json["subsystem"]["registration"]["limits"]["maxIssues"], 7);
    assert_eq!(json["previous"]["registration"]["limits"]["maxIssues"], 32);
    let registration = client.subsystem("a").await.unwrap().registration.unwrap();
    assert_eq!((registration.phase, registration.reads), (3, vec!["b".to_owned()]));
    assert_eq!(from_struct(&registration.parameters), json!({ "kept": "x", "limit": 5 }));

    // Each field that `register` has, and back again.
    let all = "subsystems set a --endpoint http://127.0.0.1:1 --phase 1 --requires x --after y --reads z \
               --timeout-per-cycle 2s --critical --record-output --params-json {\"n\":1} --retry-max-attempts 5 \
               --retry-initial-backoff 10ms --retry-max-backoff 20ms --retry-backoff-multiplier 1.5 \
               --retry-retryable-status-codes aborted --breaker-failure-threshold 7 --breaker-open-for 1m \
               --limits-max-message-bytes 1000 --limits-max-output-bytes 900 \
               --limits-max-metrics 8 --limits-max-issues 9";
    let changed = cli.run(all).await;
    for name in ["x", "y", "z"] {
        assert!(changed.stderr.contains(&format!("subsystem {name} is not registered")), "{}", changed.stderr);
    }
    assert_eq!(changed.with(0).lines().count(), 23);
    // A disabled breaker has no policy to keep.
    let disabled = cli.run("subsystems set a --breaker-disabled").await.with(0);
    assert_eq!(row(&disabled, "breaker.disabled"), ["breaker.disabled", "no", "→", "yes"]);
    assert_eq!(row(&disabled, "breaker.failure_threshold"), ["breaker.failure_threshold", "7", "→", "5"]);
    let replaced = cli.run(&register).await.with(0);
    assert!(replaced.starts_with("subsystem a is registered, in place of its previous registration\n"), "{replaced}");
    assert_eq!(row(&replaced, "limits.max_issues"), ["limits.max_issues", "9", "→", "32"]);
    let without_lease = cli.run(&format!("subsystems register a --endpoint {endpoint}")).await.with(0);
    assert_eq!(row(&without_lease, "lease"), ["lease", "yes", "→", "no"]);

    let etag = client.subsystem("a").await.unwrap().etag;
    assert!(cli.run("subsystems show a").await.with(0).contains(&etag));
    cli.run(&format!("subsystems set a --etag {etag} --phase 1")).await.with(0);
    let outdated = cli.run(&format!("subsystems set a --etag {etag} --phase 2")).await.refused_with(1);
    assert!(outdated.contains("orchestrator subsystems show a") && outdated.contains("ETAG_MISMATCH"), "{outdated}");
    let unknown = cli.run("subsystems set a --clear time").await.refused_with(2);
    assert!(unknown.contains("\"time\", which is not a field") && unknown.contains("timeout"), "{unknown}");
    for line in ["subsystems set a", "subsystems set a --phase 1 --clear phase"] {
        cli.run(line).await.refused_with(2);
    }
}

#[tokio::test]
async fn a_cycle_is_planned_run_and_found_in_the_history() {
    let (_home, fleet, service, mut client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    let c = pb::Registration { requires: vec!["a".into()], ..registration("c", fleet.endpoint()) };
    client.register(c).await.unwrap();

    assert_eq!(row(&cli.run("plan").await.with(0), "0").len(), 3);
    let plan = cli.json("plan --subsystem a,c").await;
    let c = json!({ "name": "c", "level": 1, "waitsFor": ["a"], "breaker": "BREAKER_STATE_CLOSED" });
    assert_eq!(plan["plan"]["subsystems"][1], c);
    for line in ["run --validate-only", "run --dry-run"] {
        assert!(cli.run(line).await.with(0).contains("WAITS FOR"));
    }
    assert_eq!(cli.json("run --validate-only").await["plan"]["levels"], 2);
    assert_eq!(cli.run("cycles list").await.with(0), "no cycles\n");
    assert_eq!(cli.json("cycles list").await, json!({ "cycles": [] }));
    assert!(row(&cli.run("status").await.with(0), "last").contains(&"-"));

    // Without a terminal: plain lines on stderr, the cycle as a table on stdout.
    let ran = cli.run("run --record-outputs --details --param n=1").await;
    assert!(ran.stderr.contains("cycle 1  started      3 subsystems, manual"), "{}", ran.stderr);
    let parts = ran.stderr.lines().filter(|line| line.contains("SUCCEEDED")).count();
    assert_eq!(parts, 3, "{}", ran.stderr);
    let table = ran.with(0);
    assert_eq!(row(&table, "state"), ["state", "SUCCEEDED"]);
    assert!(table.contains(r#"{"by":"a","cycle":1}"#), "{table}");
    assert_eq!(fleet.now(|state| state.runs("a").next().unwrap().parameters.clone()), json!({ "n": 1 }));

    let ran = cli.json("run --subsystem b --request-id once").await;
    assert_eq!(ran["telemetry"]["state"], "CYCLE_STATE_SUCCEEDED");
    assert_eq!(ran["telemetry"]["subsystems"].as_array().unwrap().len(), 1);
    assert_eq!(ran, cli.json("run --request-id once").await, "the same id gets the same cycle");
    let of_request = cli.json("cycles list --request-id once").await;
    assert_eq!(of_request["cycles"].as_array().unwrap().iter().map(|it| &it["cycleId"]).collect::<Vec<_>>(), ["2"]);
    assert_eq!(cli.json("cycles list --request-id twice").await, json!({ "cycles": [] }));
    assert_eq!(cli.run("run --async").await.with(0), "cycle 3 is admitted\n");
    let mut events = client.watch_after(2).await.unwrap();
    let recorded = async { while events.message().await.unwrap().unwrap().event.unwrap().revision < 3 {} };
    patiently("cycle 3 to be recorded", recorded).await;

    let listed = cli.run("cycles list --limit 1 --subsystem c --subsystem-state succeeded --trigger manual").await;
    assert_eq!(row(&listed.with(0), "3")[..3], ["3", "SUCCEEDED", "manual"]);
    let listed =
        cli.json("cycles list --state succeeded --finished-from 1h --finished-before 2100-01-01T00:00:00Z").await;
    let ids: Vec<_> = listed["cycles"].as_array().unwrap().iter().map(|cycle| cycle["cycleId"].clone()).collect();
    assert_eq!(ids, ["3", "2", "1"]);
    assert_eq!(cli.json("cycles list --state failed --all").await, json!({ "cycles": [] }));
    let lines = cli.run("cycles list --finished-from yesterday --output ndjson").await.with(0);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(json!(lines), listed["cycles"]);
    assert_eq!(cli.run("cycles list --finished-before 2026-01-31 --output ndjson").await.with(0), "");
    assert_eq!(row(&cli.run("cycles show 2").await.with(0), "request")[2], "once");
    assert_eq!(cli.json("cycles show 2").await["telemetry"]["requestId"], "once");

    let status = cli.json("status --snapshots").await["status"].clone();
    assert_eq!((&status["totalCycles"], &status["lastCycle"]["cycleId"]), (&json!("3"), &json!("3")));
    assert_eq!(status["subsystems"][2]["snapshot"], json!({ "name": "c" }));
    let status = cli.run("status").await.with(0);
    assert!(!status.contains("SUBSYSTEM"), "{status}");
    assert!(status.contains("cycle 3 SUCCEEDED in "), "{status}");
    let status = cli.run("status --subsystems").await.with(0);
    assert_eq!(row(&status, "c")[..4], ["c", "0", "READY", "SUCCEEDED"]);
}

#[tokio::test]
async fn a_plan_gives_the_reason_why_a_subsystem_will_not_be_called() {
    let (_home, fleet, service, mut client) = house(&[]).await;
    let cli = Cli::of(&service);
    let mut broken = registration("broken", fleet.endpoint());
    broken.breaker = Some(pb::BreakerPolicy { failure_threshold: 1, open_for: ms(3_600_000), disabled: false });
    client.register(broken).await.unwrap();
    let mut needs = registration("needs", fleet.endpoint());
    needs.requires = vec!["broken".into()];
    client.register(needs).await.unwrap();
    fleet.run("broken", Run::fail(Code::Internal));
    client.run().await.unwrap();
    let plan = cli.run("plan").await.with(0);
    assert!(row(&plan, "0").ends_with(&["circuit", "open"]), "{plan}");
    assert!(plan.contains("requires broken, which can't succeed"), "{plan}");
    cli.run("subsystems suspend broken").await.with(0);
    let plan = cli.run("plan").await.with(0);
    assert!(plan.contains("requires broken, which is suspended"), "{plan}");
    let plan = cli.run("plan --subsystem needs").await.with(0);
    assert!(plan.contains("requires broken, which is not in this cycle"), "{plan}");
}

#[tokio::test]
async fn waiting_cycles_are_listed_with_the_reason_and_can_be_cancelled() {
    let (_home, fleet, service, mut client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    fleet.run("a", Run::Hold);
    let over = |subsystems: &[&str]| pb::RunCycleRequest {
        subsystems: subsystems.iter().map(ToString::to_string).collect(),
        r#async: true,
        ..pb::RunCycleRequest::default()
    };
    client.admit_with(over(&["a"])).await.unwrap();
    fleet.until_run("a", 1).await;
    client.admit_with(over(&["b", "a"])).await.unwrap();
    client.admit_with(over(&[])).await.unwrap();
    let status = cli.run("status").await.with(0);
    assert_eq!(row(&status, "queued"), ["queued", "2", "cycles"]);
    for id in ["2", "3"] {
        let row = row(&status, id);
        assert!(row[1] == "manual" && row.ends_with(&["cycle", "1", "(a)"]), "{status}");
    }
    let waiting = cli.json("status").await["status"]["waitingCycles"].take();
    assert_eq!((&waiting[0]["cycleId"], &waiting[0]["waitsForSubsystem"]), (&json!("2"), &json!("a")));
    assert_eq!(row(&cli.run("cancel 2").await.with(0), "state"), ["state", "CANCELLED"]);
    let waiting = cli.json("status").await["status"]["waitingCycles"].take();
    assert_eq!(waiting.as_array().unwrap().len(), 1);
    assert_eq!((&waiting[0]["cycleId"], &waiting[0]["waitsForCycleId"]), (&json!("3"), &json!("1")));
    assert!(cli.run("cancel --help").await.with(0).contains("waitingCycles"));
}

#[tokio::test]
async fn loops_are_started_listed_and_stopped() {
    let (_home, _fleet, service, _client) = house(&["a"]).await;
    let cli = Cli::of(&service);
    assert_eq!(cli.run("loops list").await.with(0), "no loops\n");
    let started = cli
        .json(
            "loops start l --interval 1h --offset 5m --jitter 1s --overlap-policy buffer_one --catch-up one \
             --catch-up-window 2h --subsystem a --deadline 3s --record-outputs --param k=true",
        )
        .await;
    let settings = json!({
        "name": "l", "interval": "3600s", "offset": "300s", "jitter": "1s",
        "overlapPolicy": "OVERLAP_POLICY_BUFFER_ONE", "catchUp": "CATCH_UP_ONE", "catchUpWindow": "7200s",
        "subsystems": ["a"], "deadline": "3s", "recordOutputs": true, "parameters": { "k": true },
    });
    assert_eq!(started["loop"]["loop"], settings);
    assert_eq!(cli.json("loops list").await["loops"][0]["loop"], settings);
    assert_eq!(row(&cli.run("loops list").await.with(0), "l")[..3], ["l", "1h", "in"]);
    assert_eq!(row(&cli.run("status").await.with(0), "l")[1], "1h");
    let shown = cli.run("loops start fast --interval 10ms").await.with(0);
    assert_eq!(row(&shown, "interval"), ["interval", "10ms"]);

    // The output shows its cycles, and distinguishes them from others.
    let mut watch = cli.start("watch --loop fast");
    assert!(watch.line().await.ends_with("loop fast"));
    watch.interrupt();
    assert_eq!(watch.code().await, 130);
    assert_eq!(row(&cli.run("loops pause l").await.with(0), "l")[2], "paused");
    assert_eq!(row(&cli.run("loops pause --all").await.with(0), "fast")[2], "paused");
    let status = cli.run("status").await.with(0);
    assert!(status.contains("PAUSED") && status.contains("loops resume --all"), "{status}");
    let still = cli.run("loops resume l").await;
    assert!(
        still.stderr.contains("still paused with all loops: l; `orchestrator loops resume --all`"),
        "{}",
        still.stderr
    );
    assert_eq!(cli.json("loops pause l").await["loops"][0]["paused"], true);
    let still = cli.run("loops resume --all").await;
    assert!(still.stderr.contains("still paused by name: l; `orchestrator loops resume NAME`"), "{}", still.stderr);
    assert_eq!(row(&cli.run("loops resume l fast").await.with(0), "l")[2], "in");
    assert!(cli.run("loops pause").await.refused_with(2).contains("NAME"));
    assert!(cli.run("loops pause l --all").await.refused_with(2).contains("--all"));
    assert!(cli.run("loops stop fast").await.with(0).contains("stopped"));
    assert_eq!(cli.json("cycles list --trigger loop --loop l").await, json!({ "cycles": [] }));
    assert_eq!(cli.json("loops stop l").await["loop"]["stopped"], true);
    assert!(cli.run("loops stop l").await.refused_with(1).contains("LOOP_NOT_FOUND"));
}

#[tokio::test]
async fn long_lists_are_read_page_by_page() {
    const NAMES: usize = 2500;
    let entry = |i| format!("[[subsystems]]\nname = \"s{i}\"\nendpoint = \"http://127.0.0.1:1\"\n");
    let config: String = (0..NAMES).map(entry).collect();
    let home = Home::new().with_config(&config);
    let service = home.serve().await;
    let cli = Cli::of(&service);
    let table = cli.run("subsystems list").await.with(0);
    assert_eq!(table.lines().count(), NAMES + 1);
    let listed = cli.json("subsystems list").await;
    assert_eq!(listed["subsystems"].as_array().unwrap().len(), NAMES);
    assert_eq!(cli.json("status --subsystems").await["status"]["subsystems"].as_array().unwrap().len(), NAMES);
    assert!(cli.run("status").await.with(0).lines().count() < 20);
}

// ---------------------------------------------------------------------------------------------------------------
// The report

/// Runs four cycles of a chain a, b, c, d without failures, then eight with e at its end: in two of them d fails at
/// once, in one d fails after two retries, and in one a fails, which b and c require. Returns when the second part
/// began.
async fn two_periods(fleet: &Fleet, client: &mut Client) -> String {
    let chained = |name: &str| registration(name, fleet.endpoint());
    let quickly = pb::RetryPolicy { max_attempts: 3, initial_backoff: ms(1), max_backoff: ms(1), ..Default::default() };
    for registration in [
        chained("a"),
        pb::Registration { requires: vec!["a".into()], ..chained("b") },
        pb::Registration { requires: vec!["b".into()], ..chained("c") },
        pb::Registration { after: vec!["c".into()], retry: Some(quickly), ..chained("d") },
    ] {
        client.register(registration).await.unwrap();
    }
    for _ in 0..4 {
        client.run().await.unwrap();
    }
    client.register(pb::Registration { after: vec!["d".into()], ..chained("e") }).await.unwrap();
    let first = client.run().await.unwrap();
    for (name, run) in [
        ("d", Run::fail(Code::Internal)),
        ("d", Run::fail(Code::Internal)),
        ("d", Run::fail(Code::Unavailable)),
        ("a", Run::fail(Code::Internal)),
        ("a", Run::Echo),
        ("a", Run::Echo),
        ("a", Run::Echo),
    ] {
        fleet.run(name, run);
        client.run().await.unwrap();
        fleet.run(name, Run::Echo);
    }
    first.finished_at.unwrap().to_string()
}

#[tokio::test]
async fn a_report_agrees_with_the_records() {
    let (_home, fleet, service, mut client) = house(&[]).await;
    let cli = Cli::of(&service);
    let since = two_periods(&fleet, &mut client).await;
    // Its end is in the future, so that the period before is long enough.
    let period = format!("report --since {since} --until 2100-01-01T00:00:00Z");

    let report = cli.json(&format!("{period} --sort name")).await;
    assert_eq!(report["completeSince"], Value::Null);
    assert_eq!(report["until"], "2100-01-01T00:00:00Z");
    let cycles = &report["cycles"];
    let counted = ["cycles", "succeeded", "degraded", "failed", "cancelled", "interrupted", "previousCycles"];
    assert_eq!(counted.map(|count| cycles[count].as_u64().unwrap()), [8, 4, 4, 0, 0, 0, 4]);
    assert_eq!(cycles["startedBy"], json!([{ "trigger": "TRIGGER_MANUAL", "loop": "", "cycles": 8 }]));
    assert_eq!((&cycles["successRate"], &cycles["successRateChange"]), (&json!(0.5), &json!(-0.5)));

    let subsystems = report["subsystems"].as_array().unwrap();
    let column = |column: &str| subsystems.iter().map(|it| it[column].clone()).collect::<Vec<_>>();
    let all = |figures: Value| figures.as_array().unwrap().clone();
    assert_eq!(column("name"), all(json!(["a", "b", "c", "d", "e"])));
    assert_eq!(column("cycles"), all(json!([8, 8, 8, 8, 8])));
    assert_eq!(column("succeeded"), all(json!([7, 7, 7, 5, 8])));
    assert_eq!(column("failed"), all(json!([1, 0, 0, 3, 0])));
    assert_eq!(column("skipped"), all(json!([0, 1, 1, 0, 0])));
    assert_eq!(column("successRate"), all(json!([0.875, 0.875, 0.875, 0.625, 1.0])));
    assert_eq!(column("retries"), all(json!([0, 0, 0, 2, 0])));
    assert_eq!(column("previousCycles"), all(json!([4, 4, 4, 4, 0])));
    assert_eq!(column("successRateChange"), all(json!([-0.125, -0.125, -0.125, -0.375, null])));
    // Each waits for another one, so all called subsystems are on the critical path.
    assert_eq!(column("criticalCycles"), all(json!([8, 7, 7, 8, 8])));
    assert_eq!(column("criticalCycleShare"), all(json!([1.0, 0.875, 0.875, 1.0, 1.0])));

    // The times agree with the records.
    let records: Vec<_> =
        client.history().await.unwrap().into_iter().map(decode).filter(|it| it.cycle_id > 4).collect();
    let close =
        |reported: &Value, expected: f64| (reported.as_f64().unwrap() - expected).abs() <= expected * 0.005 + 0.001;
    let mut shares = 0.0;
    for it in subsystems {
        let parts: Vec<_> = records.iter().map(|cycle| part(cycle, it["name"].as_str().unwrap())).collect();
        assert!(close(&it["criticalMs"], parts.iter().map(|part| part.duration_ms).sum()), "{it}");
        let mut durations: Vec<_> =
            parts.iter().filter(|it| it.state() == SubsystemState::Succeeded).map(|part| part.duration_ms).collect();
        durations.sort_by(f64::total_cmp);
        assert!(close(&it["p50Ms"], durations[durations.len().div_ceil(2) - 1]), "{it} {durations:?}");
        assert!(close(&it["p99Ms"], durations[durations.len() - 1]), "{it} {durations:?}");
        let share = it["criticalTimeShare"].as_f64().unwrap();
        let expected = it["criticalMs"].as_f64().unwrap() / cycles["criticalMs"].as_f64().unwrap();
        assert!((share - expected).abs() < 0.01, "{it}");
        shares += share;
        if let Some(before) = it["previousP95Ms"].as_f64() {
            let expected = it["p95Ms"].as_f64().unwrap() / before - 1.0;
            assert!((it["p95Change"].as_f64().unwrap() - expected).abs() < 1e-9, "{it}");
        }
    }
    assert!((shares - 1.0).abs() < 1e-9, "{shares}");

    // The same as a table.
    let table = cli.run(&format!("{period} --sort success-rate")).await.with(0);
    assert_eq!(row(&table, "cycles")[1..], ["8:", "4", "SUCCEEDED,", "4", "DEGRADED"]);
    assert_eq!(row(&table, "started"), ["started", "by", "manual", "8"]);
    let names: Vec<_> =
        table.lines().skip_while(|line| !line.starts_with("SUBSYSTEM")).map(|line| &line[..1]).collect();
    assert_eq!(names, ["S", "d", "a", "b", "c", "e"], "{table}");
    assert_eq!(row(&table, "d")[1..4], ["8", "62.5", "%"]);
    assert!(row(&table, "d").ends_with(&["3", "FAILED"]), "{table}");
    assert!(row(&table, "b").ends_with(&["1", "SKIPPED"]), "{table}");
    assert!(table.contains("-37.5 pp") && row(&table, "e").ends_with(&["new", "new", "new"]), "{table}");

    // The same as CSV.
    let csv = cli.run(&format!("{period} --sort name --output csv")).await.with(0);
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let headings: Vec<_> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    let lines: Vec<_> = reader.records().map(Result::unwrap).collect();
    assert_eq!(lines.len(), 5);
    for (line, it) in lines.iter().zip(subsystems) {
        for (heading, cell) in headings.iter().zip(line) {
            match &it[heading] {
                Value::Null => assert_eq!(cell, "", "{heading} of {line:?}"),
                Value::String(name) => assert_eq!(cell, name),
                // The last digit may differ between parsers.
                figure => {
                    let difference = cell.parse::<f64>().unwrap() - figure.as_f64().unwrap();
                    assert!(difference.abs() < 1e-9, "{heading} of {line:?}: {figure}");
                }
            }
        }
    }
    assert_eq!(headings.len(), subsystems[0].as_object().unwrap().len());

    // Parts of the report.
    let some = cli.json(&format!("{period} --subsystem e,d --limit 1 --sort retries")).await;
    assert_eq!(some["subsystems"], json!([subsystems[3]]), "shares are among all");
    assert_eq!(&some["cycles"], cycles);
    let lines = cli.run(&format!("{period} --sort name --output ndjson")).await.with(0);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(json!(lines), report["subsystems"]);
    let none = cli.json("report --since 2000-01-01T00:00:00Z --until 2000-01-02T00:00:00Z").await;
    assert_eq!((&none["cycles"]["cycles"], &none["subsystems"]), (&json!(0), &json!([])));
    let none = cli.run("report --since 2000-01-01T00:00:00Z --until 2000-01-02T00:00:00Z").await.with(0);
    assert_eq!(row(&none, "cycles"), ["cycles", "none"]);
    let all_as_new = cli.run("report --since 1h").await.with(0);
    assert!(all_as_new.contains("no cycles to compare with") && !all_as_new.contains("new"), "{all_as_new}");
}

#[tokio::test]
async fn a_report_fits_a_narrow_terminal_with_each_number_beside_its_unit() {
    let (_home, fleet, service, mut client) = house(&[]).await;
    two_periods(&fleet, &mut client).await;
    let (code, report) = on_a_terminal(&mut Cli::of(&service).command("report"), 40).await;
    let lines: Vec<_> = report.lines().map(plain).collect();
    assert!(code == 0 && lines.len() > 20, "{report}");
    for line in lines {
        let first = line.split_whitespace().next().unwrap_or_default();
        let is_unit = ["%", "ms", "s", "pp"].contains(&first.trim_end_matches(','));
        assert!(line.chars().count() <= 40 && !is_unit, "{line:?} in\n{report}");
    }
}

#[tokio::test]
async fn a_report_without_calls_has_no_rate_of_success() {
    let (_home, _fleet, service, mut client) = house(&[]).await;
    client.run().await.unwrap();
    let report = Cli::of(&service).json("report").await;
    let cycles = &report["cycles"];
    assert_eq!((&cycles["cycles"], &cycles["succeeded"]), (&json!(1), &json!(1)), "{report}");
    assert_eq!((&cycles["successRate"], &cycles["p50Ms"]), (&Value::Null, &Value::Null), "{report}");
}

#[tokio::test]
async fn a_report_counts_only_complete_periods() {
    let config = "[store.retention]\nmax_cycles = 2\n[store.retention.failed]\nmax_cycles = 5\n";
    let home = Home::new().with_config(config);
    let (fleet, service) = (Fleet::start().await, home.serve().await);
    let mut client = service.client().await;
    client.register(registration("a", fleet.endpoint())).await.unwrap();
    // Cycles with odd ids fail, and are kept for longer.
    for i in 1..=8 {
        fleet.run("a", if i % 2 == 0 { Run::Echo } else { Run::fail(Code::Internal) });
        client.run().await.unwrap();
    }
    // A start removes the records beyond the limit.
    assert!(service.stop().await.success());
    let service = home.serve().await;
    let mut client = service.client().await;
    let pruned = async { while client.status().await.unwrap().oldest_revision < 5 {} };
    patiently("old records to be removed", pruned).await;
    assert_eq!(client.history().await.unwrap().len(), 6);

    let cli = Cli::of(&service);
    let report = cli.run("report --output json").await;
    let begins = client.cycle(5).await.unwrap().finished_at.unwrap().to_string();
    assert!(report.stderr.contains("the history begins at "), "{}", report.stderr);
    assert!(report.stderr.contains("a part of this period is counted"), "{}", report.stderr);
    let report: Value = serde_json::from_str(&report.with(0)).unwrap();
    assert_eq!(report["completeSince"], begins);
    let a = &report["subsystems"][0];
    assert_eq!((&a["cycles"], &a["failed"], &a["successRate"]), (&json!(4), &json!(2), &json!(0.5)));
    // A period that begins later is complete.
    let period = format!("report --since {begins} --until 2100-01-01T00:00:00Z");
    let complete = cli.run(&period).await;
    assert!(complete.stderr.contains("a part of the period before"), "{}", complete.stderr);
}

#[tokio::test]
async fn a_long_report_shows_its_progress() {
    let (_home, fleet, service, mut client) = house(&[]).await;
    // Records so large that a few fill a page.
    fleet.run("a", Run::large_output(1_000_000));
    client.register(pb::Registration { record_output: true, ..registration("a", fleet.endpoint()) }).await.unwrap();
    for _ in 0..7 {
        client.run().await.unwrap();
    }
    let cli = Cli::of(&service);
    let (code, shown) = on_a_terminal(&mut cli.command("report"), 200).await;
    assert_eq!(code, 0, "{shown}");
    assert!(shown.contains("reading  [") && shown.contains("cycles, back to "), "{shown:?}");
    // The progress is removed before the table is printed.
    let table = shown.rsplit("\x1b[2K").next().unwrap();
    assert_eq!(row(table, "cycles")[1..], ["7:", "7", "SUCCEEDED"]);
    assert_eq!(row(table, "a")[1], "7");
}

#[tokio::test]
async fn a_report_can_be_interrupted() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut report = Cli(listener.local_addr().unwrap()).start("report");
    let (mut connection, _) = patiently("a connection", listener.accept()).await.unwrap();
    // The server has received a request, and will not answer.
    patiently("a request", connection.read_u8()).await.unwrap();
    report.interrupt();
    assert_eq!(report.code().await, 130);
}

#[tokio::test]
async fn a_report_explains_invalid_arguments() {
    let (_home, fleet, service, mut client) = house(&["a"]).await;
    client.run().await.unwrap();
    client.register(registration("b", fleet.endpoint())).await.unwrap();
    let cli = Cli::of(&service);
    for (line, code, expected) in [
        ("report --since 2100-01-01T00:00:00Z", 2, "--since is 2100-01-01 00:00:00Z, which is not in the past"),
        ("report --since 1h --until 2h", 2, "which is not after --since"),
        ("report --since tomorrow", 2, "such as 2h or 7d"),
        ("report --output yaml", 2, "[possible values: table, json, ndjson, csv]"),
        ("report --sort speed", 2, "critical-time"),
        ("report --limit 0", 2, "--limit"),
        ("report --subsystem a,nobody", 1, "subsystem nobody is not registered, and is in no cycle of the history"),
        ("report --subsystem a --loop l", 1, "loop l does not exist, and the history has no cycle of it"),
        ("report --subsystem b", 1, "b took part in no cycle that finished from "),
        ("report --loop 1", 2, "loop \"1\" is not a name"),
    ] {
        let wrong = cli.run(line).await.refused_with(code);
        assert!(wrong.contains(expected), "{line}: {wrong}");
    }
    // Other commands have no CSV output.
    assert!(cli.run("status --output csv").await.refused_with(2).contains("[possible values: table, json, ndjson]"));
}

// ---------------------------------------------------------------------------------------------------------------
// Exit codes

#[tokio::test]
async fn the_exit_code_depends_on_the_state_of_the_cycle() {
    let (home, fleet, service, _client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    fleet.run("a", Run::fail(Code::Internal));
    let degraded = cli.run("run --quiet").await;
    assert_eq!(degraded.stderr, "");
    let degraded = degraded.with(10);
    assert_eq!(row(&degraded, "state"), ["state", "DEGRADED"]);
    assert!(row(&degraded, "a").ends_with(&["INTERNAL", "as", "scripted"]));
    fleet.run("b", Run::fail(Code::Internal));
    assert_eq!(row(&cli.run("run").await.with(11), "state"), ["state", "FAILED"]);

    fleet.run("a", Run::Hang);
    let mut run = cli.start("run");
    run.until_error("cycle 3  started").await;
    let cancelled = cli.run("cancel 3").await.with(0);
    assert_eq!(row(&cancelled, "state"), ["state", "CANCELLED"]);
    assert_eq!(run.code().await, 12);
    assert!(cli.run("cancel 3").await.refused_with(1).contains("CYCLE_FINISHED"));
    assert!(cli.run("cancel 33").await.refused_with(1).contains("CYCLE_NOT_FOUND"));

    // On Ctrl-C, the user is informed that the cycle continues.
    let mut run = cli.start("run");
    run.until_error("cycle 4  started").await;
    assert!(cli.run("run --overlap-policy skip").await.refused_with(1).contains("CYCLE_RUNNING"));
    run.interrupt();
    run.until_error(&format!("orchestrator cancel 4 --address http://{}", cli.0)).await;
    assert_eq!(run.code().await, 130);
    let status = cli.run("status").await.with(0);
    assert!(status.contains("cycle 4, manual, started "), "{status}");
    assert_eq!(cli.json("cancel 4").await["telemetry"]["state"], "CYCLE_STATE_CANCELLED");
    let late = cli.run("run --timeout 100ms --quiet").await.refused_with(4);
    assert!(late.contains("within 100ms"), "{late}");
    // The message depends on the speed of the machine.
    assert!(late.contains("Cycle 5 continues") || late.contains("The cycle may have been admitted"), "{late}");
    drop((service, home));
}

#[tokio::test]
async fn a_wrong_address_is_explained() {
    let (_home, _fleet, service, _client) = house(&[]).await;
    let cli = Cli::of(&service);
    let asked = async |address: String| cli.run(&format!("status --address {address}")).await.refused_with(4);
    let dashboard = asked(service.admin().to_string()).await;
    let is_explained = |said: &str| {
        said.contains("does not speak gRPC")
            && said.contains("The dashboard has its own address")
            && !said.contains("Start it")
    };
    assert!(is_explained(&dashboard), "{dashboard}");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let speaks_otherwise = async {
        let mut peers = Vec::new();
        loop {
            let (mut peer, _) = listener.accept().await.unwrap();
            peer.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").await.unwrap();
            peers.push(peer);
        }
    };
    let other = tokio::select! {
        other = asked(address) => other,
        () = speaks_otherwise => unreachable!("it never ends"),
    };
    assert!(is_explained(&other), "{other}");
    let tls = asked(format!("https://{}", service.address())).await;
    assert!(tls.contains("it does not speak TLS, so give http://"), "{tls}");
    for line in ["cycles show abc", "cycles show 0", "cancel null"] {
        assert!(cli.run(line).await.refused_with(2).contains("give the id of a cycle: see"), "{line}");
    }
}

#[tokio::test]
async fn a_refusal_names_the_invalid_fields() {
    let (_home, fleet, service, _client) = house(&[]).await;
    let cli = Cli::of(&service);
    let wrong = cli.run("subsystems register 1a --endpoint nowhere --timeout-per-cycle 0s").await.refused_with(2);
    for field in ["registration.name \"1a\"", "registration.endpoint", "registration.timeout"] {
        assert!(wrong.contains(&format!("\n  {field}")), "{wrong}");
    }
    assert!(wrong.ends_with("(INVALID_ARGUMENT, INVALID_FIELDS)\n"), "{wrong}");
    let endpoint = fleet.endpoint();
    cli.run(&format!("subsystems register a --endpoint {endpoint} --after b")).await.with(0);
    let ring = cli.run(&format!("subsystems register b --endpoint {endpoint} --after a")).await.refused_with(2);
    assert!(ring.contains("b is after a") && ring.contains("ORDER_RING"), "{ring}");
    assert!(cli.run("run --subsystem nobody").await.refused_with(1).contains("SUBSYSTEM_NOT_FOUND"));
    assert!(cli.run("cycles show 9").await.refused_with(1).contains("CYCLE_NOT_FOUND"));
    assert!(cli.run("loops start l").await.refused_with(2).contains("interval"));
    let gone = cli.run("watch --after 7").await.refused_with(1);
    assert!(gone.contains("REVISION_NOT_RETAINED") && gone.contains("--from-oldest"), "{gone}");
}

#[tokio::test]
async fn all_subsystems_in_a_file_are_registered_at_once() {
    let (home, fleet, service, mut client) = house(&["a"]).await;
    let cli = Cli::of(&service);
    let endpoint = fleet.endpoint();
    let table =
        |name: &str, more: &str| format!("[[subsystems]]\nname = \"{name}\"\nendpoint = \"{endpoint}\"\n{more}\n");
    let write = |text: String| {
        let path = home.path("fleet.toml");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let many = (0..1500).map(|i| table(&format!("s{i}"), "after = [\"a\"]")).collect::<String>();
    let file = write(format!("[log]\nfilter = \"debug\"\n{}{}{many}", table("a", ""), table("b", "critical = true")));
    let said = cli.run(&format!("subsystems register --file {file}")).await.with(0);
    assert_eq!(said.lines().next(), Some("registered 1,502 subsystems: 1,501 new, 0 changed, 1 unchanged"));
    assert_eq!(row(&said, "new")[1..4], ["b,", "s0,", "s1,"]);
    assert!(said.contains(" and 1,481 more\n") && !said.contains("s19"), "{said}");
    assert_eq!(row(&said, "unchanged"), ["unchanged", "a"]);
    assert!(client.subsystem("b").await.unwrap().registration.unwrap().critical);
    assert_eq!(client.status().await.unwrap().subsystem_count, 1502);
    let file = write(table("a", "") + &table("b", ""));
    let said = cli.run(&format!("subsystems register --file {file}")).await.with(0);
    assert!(said.contains("\nsubsystem b is changed\n"), "{said}");
    assert_eq!(
        (row(&said, "changed"), row(&said, "critical")),
        (vec!["changed", "b"], vec!["critical", "yes", "→", "no"])
    );
    let said = cli.json(&format!("subsystems register --file {file} --lease 1h")).await;
    assert_eq!((&said["replaced"], said.get("created")), (&json!(["a", "b"]), None));

    let file = write(table("c", "after = [\"d\"]") + &table("d", "after = [\"c\"]"));
    let ring = cli.run(&format!("subsystems register --file {file}")).await.refused_with(2);
    assert!(ring.contains("fleet.toml:1: subsystems[0] can't be ordered"), "{ring}");
    let two = cli.run(&format!("subsystems register a --file {file}")).await.refused_with(2);
    assert!(two.contains("cannot be used with"), "{two}");
    assert!(client.subsystem("c").await.is_err());
}

#[tokio::test]
async fn for_a_misspelt_name_a_similar_one_is_suggested() {
    let (_home, fleet, service, mut client) = house(&["prices", "news", "gone"]).await;
    let cli = Cli::of(&service);
    client.run().await.unwrap();
    cli.run("subsystems unregister gone").await.with(0);
    cli.run("loops start heartbeat --interval 24h").await.with(0);
    let refused = async |line: &str| {
        let refused = cli.run(line).await.refused_with(1);
        // The remedy names commands, not RPCs.
        for rpc in ["ListSubsystems", "ListIntervalLoops", "GetCycle", "WatchCycles"] {
            assert!(!refused.contains(rpc), "{line}: {refused}");
        }
        refused
    };
    for line in [
        "cycles list --subsystem price",
        "cycles list --subsystem price --state failed --all --output json",
        "cycles list --subsystem price --loop heartbeat",
        "plan --subsystem news,price",
        "run --subsystem price",
        "run --async --subsystem price",
        "run --validate-only --subsystem price",
        "watch --subsystem news,price",
        "watch --from-oldest --subsystem PRICES",
        "report --subsystem price",
        "subsystems show price",
        "subsystems set price --phase 1",
        "subsystems rename price rates",
        "subsystems unregister price",
        "subsystems suspend price",
        "subsystems resume price",
        "subsystems renew price",
    ] {
        let refused = refused(line).await;
        assert!(refused.contains("Did you mean prices? "), "{line}: {refused}");
        assert!(refused.contains("orchestrator subsystems list --address"), "{line}: {refused}");
    }
    for line in
        ["cycles list --loop heartbat", "watch --loop heartbat", "report --loop heartbat", "loops stop heartbat"]
    {
        let refused = refused(line).await;
        assert!(refused.contains("loop heartbat does not exist"), "{line}: {refused}");
        assert!(refused.contains("Did you mean heartbeat? ") && refused.contains("loops list"), "{line}: {refused}");
    }
    // If no name is similar, none is suggested.
    let unlike = refused("cycles list --subsystem Nope").await;
    assert!(unlike.contains("subsystem Nope is not registered") && !unlike.contains("Did you mean"), "{unlike}");
    assert!(refused("cancel 1").await.contains("orchestrator cycles show 1 --address"));

    // The history knows subsystems that are gone, also if no record passes the other filters.
    assert_eq!(row(&cli.run("cycles list --subsystem gone").await.with(0), "1")[1], "SUCCEEDED");
    assert_eq!(cli.run("cycles list --subsystem gone --state failed").await.with(0), "no cycles\n");
    assert_eq!(cli.run("cycles list --loop heartbeat").await.with(0), "no cycles\n");
    let mut watch = cli.start("watch --from-oldest --subsystem gone");
    assert!(watch.line().await.contains("cycle 1  SUCCEEDED"));

    // A name that may be registered later is not an error, but may be a typing error.
    let endpoint = fleet.endpoint();
    for line in [
        "loops start other --interval 24h --subsystem price".to_owned(),
        format!("subsystems register sums --endpoint {endpoint} --reads price"),
    ] {
        let started = cli.run(&line).await;
        assert!(started.stderr.contains("subsystem price is not registered: until it is, "), "{}", started.stderr);
        assert!(started.stderr.contains("Did you mean prices? "), "{}", started.stderr);
        started.with(0);
    }
}

#[tokio::test]
async fn a_run_that_calls_nothing_succeeds_and_says_why() {
    let (_home, fleet, service, mut client) = house(&[]).await;
    let cli = Cli::of(&service);
    let why = async |line: &str| {
        let ran = cli.run(line).await;
        assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
        assert!(ran.stdout.contains("SUCCEEDED"), "{line}: the record is shown\n{}", ran.stdout);
        ran.stderr
    };
    assert!(why("run").await.contains("no subsystem was called: no subsystem is registered"));
    client.register(registration("a", fleet.endpoint())).await.unwrap();
    let b = pb::Registration { requires: vec!["a".into()], ..registration("b", fleet.endpoint()) };
    client.register(b).await.unwrap();
    for line in ["run --subsystem b", "run --quiet --subsystem b", "run --output json --subsystem b"] {
        let why = why(line).await;
        assert!(why.contains("no subsystem was called: b: it requires a, which is not in this cycle"), "{line}: {why}");
    }
    cli.run("subsystems suspend a").await.with(0);
    assert!(why("run").await.contains("a: it is suspended; b: it requires a"));
    cli.run("subsystems resume a").await.with(0);
    let ran = cli.run("run --quiet").await;
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));

    // A plan of one has one level, whatever it waits for elsewhere.
    assert_eq!(cli.json("plan --subsystem b").await["plan"]["levels"], 1);
}

#[tokio::test]
async fn an_expected_subsystem_that_is_missing_is_shown_wherever_its_cycle_is() {
    let fleet = Fleet::start().await;
    let config = "[registry]\nexpected = [\"a\", \"b\", \"gone\"]\n";
    let home = Home::new().with_config(config);
    let service = home.serve().await;
    let mut client = service.client().await;
    for name in ["a", "b"] {
        client.register(registration(name, fleet.endpoint())).await.unwrap();
    }
    let cli = Cli::of(&service);
    let listed = cli.run("subsystems list").await.with(0);
    assert_eq!(row(&listed, "gone")[..3], ["gone", "-", "MISSING"]);
    assert_eq!(row(&listed, "a")[2], "READY");
    assert_eq!(cli.json("subsystems list").await["subsystems"].as_array().unwrap().len(), 2);

    let ran = cli.run("run").await;
    assert!(ran.stderr.contains("cycle 1  started      3 subsystems, manual"), "{}", ran.stderr);
    let line = ran.stderr.lines().find(|line| line.contains("  gone")).unwrap();
    assert!(line.contains("SKIPPED") && line.ends_with("it is expected, but it is not registered"), "{line}");
    assert_eq!(row(&ran.with(10), "gone")[..2], ["gone", "SKIPPED"]);

    let path = home.path("check.toml");
    let table = format!("[[subsystems]]\nname = \"a\"\nendpoint = \"{}\"\n", fleet.endpoint());
    std::fs::write(&path, format!("{config}{table}")).unwrap();
    let shown = ended(orchestrator().arg("check").arg("--config").arg(&path)).await.with(0);
    assert_eq!(row(&shown, "expects")[1..].join(" "), "b, gone, not declared here");
    assert!(shown.lines().any(|line| line.contains("gone") && line.ends_with("not registered")), "{shown}");
}

#[tokio::test]
async fn an_interrupted_cycle_is_shown_with_what_is_not_known_of_it() {
    let (home, fleet, service, client) = house(&["a"]).await;
    fleet.run("a", Run::Hang);
    let mut client = client;
    client.admit().await.unwrap();
    fleet.until_run("a", 1).await;
    service.kill().await;
    let service = home.serve().await;
    let cli = Cli::of(&service);
    let status = cli.run("status").await.with(0);
    let last = status.lines().find(|line| line.starts_with("last")).unwrap();
    assert!(
        last.contains("cycle 1 INTERRUPTED, found ") && last.contains("manual, its parts are not known: "),
        "{last}"
    );
    let listed = cli.run("cycles list").await.with(0);
    assert_eq!(row(&listed, "1")[1], "INTERRUPTED");
    assert_eq!(row(&listed, "1").iter().filter(|cell| **cell == "unknown").count(), 2, "{listed}");
    let shown = cli.run("cycles show 1").await.with(0);
    assert_eq!(
        (row(&shown, "duration"), row(&shown, "succeeded")),
        (vec!["duration", "unknown"], vec!["succeeded", "unknown"])
    );
}

#[tokio::test]
async fn attempts_are_counted_from_the_first_call() {
    let (_home, fleet, service, mut client) = house(&[]).await;
    client.register(registration("nowhere", "http://127.0.0.1:1")).await.unwrap();
    let retry = pb::RetryPolicy { max_attempts: 2, initial_backoff: ms(1), ..Default::default() };
    client.register(pb::Registration { retry: Some(retry), ..registration("again", fleet.endpoint()) }).await.unwrap();
    fleet.run("again", Run::fail(Code::Unavailable));
    let cli = Cli::of(&service);
    let ran = cli.run("run").await;
    assert!(
        ran.stderr.lines().any(|line| line.contains("RUNNING") && line.ends_with("again  attempt 2")),
        "{}",
        ran.stderr
    );
    let failed = |line: &&str| line.contains("FAILED") && line.contains("again  after 2 attempts  UNAVAILABLE");
    assert!(ran.stderr.lines().any(|line| failed(&line)), "{}", ran.stderr);
    let shown = ran.with(11);
    // It has failed in `Initialize`.
    let cells = row(&shown, "nowhere");
    assert!(cells.contains(&"-") && !cells.contains(&"0"), "{shown}");
    let of_one = cli.run("subsystems show nowhere").await.with(0);
    let last = of_one.lines().find(|line| line.starts_with("last")).unwrap();
    assert!(last.contains("FAILED in cycle 1") && !last.contains("attempt"), "{last}");
}

#[tokio::test]
async fn an_empty_variable_of_the_environment_counts_as_unset() {
    let (_home, _fleet, service, _client) = house(&["a"]).await;
    let mut command = Cli::of(&service).command("subsystems list");
    for variable in ["CREDENTIALS", "CA_FILE", "CERT_FILE", "KEY_FILE", "TIMEOUT", "OUTPUT", "CONFIG"] {
        command.env(format!("ORCHESTRATOR_{variable}"), "");
    }
    assert_eq!(row(&ended(&mut command).await.with(0), "a")[2], "READY");
    let mut check = orchestrator();
    check.arg("check").env("ORCHESTRATOR_CONFIG", "").env("ORCHESTRATOR_SERVER_LISTEN", "");
    assert!(ended(&mut check).await.with(0).contains("127.0.0.1:7700"));
}

#[tokio::test]
async fn usage_lists_missing_arguments_without_those_of_the_environment() {
    let wrong = async |line: &str, address: &str| {
        let mut command = orchestrator();
        command.args(line.split_whitespace()).env("ORCHESTRATOR_ADDRESS", address);
        ended(command.env("ORCHESTRATOR_TIMEOUT", "3s").env("ORCHESTRATOR_OUTPUT", "json")).await.refused_with(2)
    };
    for line in ["subsystems register", "cancel", "cycles show", "cycles list --limit 3 --all", "loops start"] {
        let wrong = wrong(line, "127.0.0.1:7701").await;
        assert!(wrong.contains("Usage: "), "{line}: {wrong}");
        for flag in ["--address", "--timeout", "--output"] {
            assert!(!wrong.contains(flag), "{line}: {wrong}");
        }
    }
    let (_home, fleet, service, _client) = house(&[]).await;
    let line = format!("subsystems register a --endpoint {} --timeout 2s", fleet.endpoint());
    let registered = Cli::of(&service).run(&line).await;
    assert!(registered.stderr.contains("the timeout of the subsystem is --timeout-per-cycle"), "{}", registered.stderr);

    let environment = wrong("status", "ftp://example.org").await;
    assert!(environment.contains("comes from the environment") && environment.contains("ftp"), "{environment}");
    assert!(!wrong("status --timeout soon", "127.0.0.1:7701").await.contains("environment"));
}

#[tokio::test]
async fn wrong_usage_and_an_unreachable_service_have_their_own_exit_codes() {
    for line in [
        "",
        "nonsense",
        "run --async --validate-only",
        "run --param x",
        "run --param x=text",
        "run --params-json [1]",
        "run --deadline soon",
        "run --overlap-policy wait",
        "cancel",
        "cancel x",
        "cycles list --state fine",
        "cycles list --subsystem-state failed",
        "cycles list --limit 0",
        "cycles list --limit 3 --all",
        "cycles list --finished-from 1h --finished-before 2h",
        "watch --after latest",
        "subsystems register a --endpoint http://127.0.0.1:1 --retry-max-attempts 0",
        "subsystems register a --endpoint http://127.0.0.1:1 --limits-max-issues 0",
        "cycles list --finished-from tomorrow",
        "report --since soon",
        "watch --after 1 --from-oldest",
        "subsystems register a",
        "status --address unix:",
        "status --address ftp://example.org",
        "status --timeout 0s",
        "status --output yaml",
        "completions tcsh",
    ] {
        let wrong = ended(orchestrator().args(line.split_whitespace())).await;
        assert!(!wrong.stderr.is_empty(), "{line}");
        for words_of_machines in ["18446744073709551615", "invalid digit"] {
            assert!(!wrong.stderr.contains(words_of_machines), "{line}: {}", wrong.stderr);
        }
        assert_eq!((wrong.code, wrong.stdout.as_str()), (2, ""), "{line}: {}", wrong.stderr);
    }
    // A port that was free a moment ago.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for line in ["run", "status", "watch", "cancel 1", "cycles list", "subsystems list", "loops list", "plan"] {
        let unreachable = Cli(nobody).run(line).await.refused_with(4);
        assert!(unreachable.contains(&format!("http://{nobody}: ")), "{unreachable}");
        assert!(unreachable.contains("orchestrator serve"), "{unreachable}");
    }
    // A server listens and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let late = Cli(silent.local_addr().unwrap()).run("status --timeout 50ms").await.refused_with(4);
    assert!(late.contains("50ms"), "{late}");
}

// ---------------------------------------------------------------------------------------------------------------
// The stream

#[tokio::test]
async fn a_watch_goes_on_through_a_crash_without_a_gap_or_a_repetition() {
    let (home, fleet, service, mut client) = house(&["a"]).await;
    client.run().await.unwrap();
    let door = Door::open().await;
    door.lead_to(Some(&service));
    let cli = Cli(door.address());
    let mut json = cli.start("watch --from-oldest --output json");
    let mut lines = cli.start("watch --from-oldest");
    let id = |line: &str| line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap();
    assert_eq!(id(&lines.line().await), 1);
    client.run().await.unwrap();
    assert_eq!(id(&lines.line().await), 2);

    // A cycle that runs when the process dies, while its caller waits.
    fleet.run("a", Run::Hang);
    let mut run = cli.start("run");
    run.until_error("cycle 3  started").await;
    door.lead_to(None);
    service.kill().await;
    run.until_error("the connection is lost; reconnecting").await;
    lines.until_error("the connection is lost; reconnecting").await;

    // Recorded before the watchers are back.
    let service = home.serve().await;
    fleet.run("a", Run::Echo);
    service.client().await.run().await.unwrap();
    door.lead_to(Some(&service));
    assert_eq!(run.code().await, 12);
    assert_eq!([id(&lines.line().await), id(&lines.line().await)], [3, 4]);
    lines.until_error("connected again").await;

    // A shutdown is reported as one.
    door.lead_to(None);
    service.stop().await;
    lines.until_error("the service is shutting down; reconnecting").await;
    let service = home.serve().await;
    service.client().await.run().await.unwrap();
    door.lead_to(Some(&service));
    assert_eq!(id(&lines.line().await), 5);

    let mut recorded = Vec::new();
    let mut revisions = Vec::new();
    while recorded.len() < 5 {
        let event: Value = serde_json::from_str(&json.line().await).unwrap();
        let event = &event["event"];
        let number = |value: &Value| value.as_str().unwrap().parse::<u64>().unwrap();
        revisions.push(number(&event["revision"]));
        if let Some(cycle) = event.get("recorded") {
            recorded.push(number(&cycle["cycleId"]));
        }
    }
    assert_eq!(recorded, [1, 2, 3, 4, 5]);
    assert!(revisions.is_sorted(), "{revisions:?}");
    for mut watch in [json, lines] {
        watch.interrupt();
        assert_eq!(watch.code().await, 130);
    }
}

#[tokio::test]
async fn commands_leave_a_silent_service_and_connect_again() {
    // A server listens and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut cancel = Cli(silent.local_addr().unwrap()).start("cancel 3");

    let (_home, fleet, service, mut client) = house(&[]).await;
    let a = pb::Registration { timeout: ms(3_600_000), ..registration("a", fleet.endpoint()) };
    client.register(a).await.unwrap();
    client.run().await.unwrap();
    let cli = Cli::of(&service);
    let mut watch = cli.start("watch --from-oldest");
    assert!(watch.line().await.contains("cycle 1  SUCCEEDED"));
    fleet.run("a", Run::Hold);
    let mut run = cli.start("run --deadline 1h");
    run.until_error("RUNNING").await;
    client.admit().await.unwrap();

    // Its process stops and keeps its connections.
    service.signal(Signal::STOP);
    assert_eq!(watch.error_line().await, "the service does not answer; reconnecting");
    run.until_error("the service does not answer; reconnecting").await;
    fleet.run("a", Run::Echo);
    service.signal(Signal::CONT);
    let shown = run.rest().await;
    assert_eq!(run.code().await, 0, "{shown}");
    assert_eq!(row(&shown, "cycle"), ["cycle", "2"]);
    for expected in ["cycle 2  SUCCEEDED", "cycle 3  SUCCEEDED"] {
        let line = watch.line().await;
        assert!(line.contains(expected), "no gap and no repetition: {line}");
    }

    cancel.until_error("has not responded for 10s; wait longer with --timeout").await;
    cancel.until_error("orchestrator cycles show 3 --address").await;
    assert_eq!(cancel.code().await, 4);
}

#[tokio::test]
async fn a_watch_shows_the_requested_events() {
    let (_home, fleet, service, mut client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    fleet.run("a", Run::fail(Code::Internal));
    client.run().await.unwrap();
    fleet.run("a", Run::Echo);
    client.run().await.unwrap();
    let subset = pb::RunCycleRequest { subsystems: vec!["b".into()], ..pb::RunCycleRequest::default() };
    client.run_with(subset).await.unwrap();
    let mut watch = cli.start("watch --after 1 --subsystem a --state succeeded,degraded --progress");
    let shown = watch.line().await;
    assert!(shown.contains("cycle 2  SUCCEEDED"), "{shown}");
    fleet.run("a", Run::fail(Code::Internal));
    client.run().await.unwrap();
    let mut shown = Vec::new();
    while shown.last().is_none_or(|line: &String| !line.contains("DEGRADED")) {
        shown.push(watch.line().await);
    }
    assert!(shown[0].contains("cycle 4  started      2 subsystems, manual"), "{shown:?}");
    assert!(shown.iter().any(|line| line.contains("FAILED        a  INTERNAL as scripted")), "{shown:?}");
    assert!(shown.last().unwrap().ends_with("a INTERNAL: as scripted"), "{shown:?}");
}

// ---------------------------------------------------------------------------------------------------------------
// Terminals and pipes

/// Terminal commands.
const ESCAPE: &str = "\x1b[31mred\x1b]0;title\x07\u{9b}2J\u{202e}\r\nend";

#[tokio::test]
async fn texts_from_subsystems_can_not_command_the_terminal() {
    let (_home, fleet, service, _client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    fleet.run("a", Run::Fail(Code::Internal, ESCAPE.into()));
    let answer = pbs::RunCycleResponse {
        output: to_struct(&json!({ ESCAPE: ESCAPE })),
        metrics: [(ESCAPE.to_owned(), 1.0)].into(),
        issues: vec![pbs::Issue { severity: 0, code: ESCAPE.into(), message: ESCAPE.into() }],
    };
    fleet.run("b", Run::Answer(answer));
    let clean = |text: &str| {
        let bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(bad), "{text:?}");
    };
    let ran = cli.run("run --details --record-outputs --request-id \x1b[31mid").await;
    clean(&ran.stderr);
    let shown = ran.with(10);
    clean(&shown);
    assert!(shown.contains("[31mred]0;title2J  end"), "{shown:?}");
    assert!(shown.contains(" ISSUE ") && shown.contains(" METRIC ") && shown.contains(" OUTPUT"), "{shown}");
    for line in [
        "run --details --record-outputs --output json --request-id \x1b[31mid",
        "cycles list",
        "cycles list --output json",
        "subsystems list",
        "subsystems show b --latest-output",
        "subsystems show a",
        "status --snapshots",
    ] {
        let shown = cli.run(line).await;
        clean(&shown.stdout);
        clean(&shown.stderr);
        assert!(shown.stdout.contains("31m"), "{line}: {}", shown.stdout);
    }
    let json = cli.json("cycles show 1").await;
    let message = &json["telemetry"]["subsystems"][0]["errorMessage"];
    assert_eq!(message, ESCAPE, "JSON contains the same text, escaped");
    let mut watch = cli.start("watch --from-oldest");
    clean(&watch.line().await);
}

#[tokio::test]
async fn a_closed_pipe_ends_a_command_quietly() {
    let (_home, _fleet, service, mut client) = house(&["a"]).await;
    client.run().await.unwrap();
    let cli = Cli::of(&service);
    for line in
        ["cycles list", "cycles list --output json", "subsystems list", "watch --from-oldest", "completions zsh"]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = cli.command(line);
        let child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let ended: Ended = patiently("a command to end", child.wait_with_output()).await.unwrap().into();
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{line}");
    }
}

/// A pipe of one page with this number of free bytes, whose reader does not read.
#[cfg(target_os = "linux")]
fn unread(free: usize) -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let size = nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(1)).unwrap();
    writer.write_all(&vec![b' '; usize::try_from(size).unwrap() - free]).unwrap();
    (reader, writer)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn ctrl_c_works_while_output_waits_for_its_reader() {
    // The output for this number of cycles does not fit.
    let names: Vec<_> = (0..100).map(|n| format!("subsystem-{n:03}")).collect();
    let (_home, _fleet, service, mut client) = house(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    client.run().await.unwrap();
    let cli = Cli::of(&service);
    for line in [
        "run --quiet",
        "run --quiet --output json",
        "report",
        "report --output csv",
        "watch --from-oldest --output json",
        "cycles list --output json",
        "cycles show 1",
        "subsystems list",
        "status --subsystems",
        "plan",
    ] {
        let (reader, writer) = unread(4096);
        let mut child = cli.command(line).stdout(writer).stderr(Stdio::null()).spawn().unwrap();
        patiently("output", async {
            while rustix::io::ioctl_fionread(&reader).unwrap() == 0 {
                client.status().await.unwrap();
            }
        })
        .await;
        interrupt(&child);
        assert_eq!(patiently(line, child.wait()).await.unwrap().code(), Some(130), "{line}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn ctrl_c_works_while_a_note_waits_for_its_reader() {
    let (_home, fleet, service, mut client) = house(&["a"]).await;
    let door = Door::open().await;
    let cli = Cli(door.address());
    fleet.run("a", Run::Hold);
    // The pipe has room for a note, but not for the end of its line.
    for (line, note) in [
        ("run", "XXXX-XX-XX XX:XX:XXZ  cycle 1  started      1 subsystem, manual"),
        ("watch", "the connection is lost; reconnecting"),
    ] {
        door.lead_to(Some(&service));
        let (reader, writer) = unread(note.len());
        let mut child = cli.command(line).stdout(Stdio::piped()).stderr(writer).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        patiently("a watcher", async { while client.status().await.unwrap().watchers == 0 {} }).await;
        if line == "watch" {
            // A connection that has carried an event exists for both sides.
            fleet.run("a", Run::Echo);
            client.run().await.unwrap();
            patiently("a cycle", lines.next_line()).await.unwrap().unwrap();
            door.shut();
        }
        patiently("the note", async {
            while rustix::io::ioctl_fionread(&reader).unwrap() < 4096 {
                client.status().await.unwrap();
            }
        })
        .await;
        interrupt(&child);
        assert_eq!(patiently(line, child.wait()).await.unwrap().code(), Some(130), "{line}");
        patiently("no watcher", async { while client.status().await.unwrap().watchers > 0 {} }).await;
    }
}

/// The output of a command on a terminal with this number of columns.
async fn on_a_terminal(command: &mut Command, columns: u16) -> (i32, String) {
    let (master, program) = terminal::open(columns, 40);
    let side = || program.try_clone().unwrap();
    let mut child = command.env("TERM", "xterm").stdout(side()).stderr(side()).spawn().unwrap();
    command.stdout(Stdio::null()).stderr(Stdio::null());
    drop(program);
    let read = tokio::task::spawn_blocking(move || {
        let (mut shown, mut chunk) = (Vec::new(), [0; 4096]);
        let mut master = File::from(master);
        // The end of a terminal whose other side is closed is an error.
        while let Ok(length @ 1..) = master.read(&mut chunk) {
            shown.extend(&chunk[..length]);
        }
        String::from_utf8(shown).unwrap()
    });
    let code = patiently("a command to end", child.wait()).await.unwrap().code().unwrap();
    (code, patiently("its output", read).await.unwrap())
}

#[tokio::test]
async fn on_a_terminal_a_cycle_shows_its_progress_and_tables_fit() {
    let (_home, fleet, service, mut client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    fleet.run("a", Run::Hold);
    fleet.run("b", Run::Fail(Code::Internal, "long ".repeat(36)));
    let mut run = cli.command("run");
    let (release, run) = tokio::join!(
        async {
            fleet.until_run("a", 1).await;
            // Once another watcher has received it, the bar has as well.
            let request = pb::WatchCyclesRequest { progress: true, ..pb::WatchCyclesRequest::default() };
            let mut stream = client.watch_cycles(request).await.unwrap().into_inner();
            let has_failed = |event| match event {
                Some(pb::cycle_event::Event::Progress(progress)) => {
                    progress.updates.iter().any(|update| update.state() == pb::SubsystemState::Failed)
                }
                _ => false,
            };
            while !has_failed(stream.message().await.unwrap().unwrap().event.unwrap().event) {}
            fleet.run("a", Run::Echo);
        },
        on_a_terminal(&mut run, 90)
    );
    let () = release;
    let (code, shown) = run;
    assert_eq!(code, 10);
    assert!(shown.contains("cycle 1  ["), "{shown:?}");
    assert!(shown.contains("1 failure"), "{shown:?}");
    // The bar is gone before the table comes.
    let table = shown.rsplit("\x1b[2K").next().unwrap();
    assert!(table.contains("\x1b[33mDEGRADED"), "{table:?}");

    let (code, list) = on_a_terminal(&mut cli.command("cycles list"), 90).await;
    assert_eq!(code, 0);
    let widths: Vec<_> = list.lines().map(|line| plain(line).chars().count()).collect();
    // The error is below its row, in two lines, and no word is broken.
    assert!(widths.len() == 4 && widths.iter().all(|width| *width <= 90), "{list}");
    assert!(list.contains("  error: 1 of 2 failed") && list.trim_end().ends_with(" long …"), "{list}");
    let (_, wide) = on_a_terminal(&mut cli.command("cycles list --wide"), 90).await;
    assert!(wide.matches("long").count() >= 20 && !wide.contains('…'), "{wide}");
    let (_, ascii) = on_a_terminal(cli.command("cycles list").env("LC_ALL", "C"), 90).await;
    assert!(ascii.trim_end().ends_with(" long ...") && ascii.is_ascii(), "{ascii}");
    let (_, asked) = on_a_terminal(cli.command("cycles list").env("COLUMNS", "60"), 90).await;
    assert!(asked.lines().all(|line| plain(line).chars().count() <= 60), "{asked}");
    let watch = terminal_of_one_record(&cli, 90).await;
    assert!(watch.ends_with('…') && watch.chars().count() == 90, "{watch:?}");
    let (_, list) = on_a_terminal(cli.command("cycles list").env("NO_COLOR", "1"), 90).await;
    assert!(!list.contains('\x1b') && list.contains("DEGRADED"), "{list:?}");
    let piped = cli.run("cycles list").await.with(0);
    assert!(!piped.contains('\x1b') && piped.contains(&"long ".repeat(20)), "{piped:?}");
}

/// The first recorded cycle, as `watch` shows it on a terminal with this number of columns.
async fn terminal_of_one_record(cli: &Cli, columns: u16) -> String {
    let terminal = Terminal::new(columns, 24);
    let mut command = cli.command("watch --from-oldest");
    terminal.connect(&mut command);
    let mut watch = command.kill_on_drop(true).spawn().unwrap();
    let shown = terminal.until_shown("cycle 1  DEGRADED").await;
    watch.kill().await.unwrap();
    shown.lines().next().unwrap().to_owned()
}

#[tokio::test]
async fn a_list_of_cycles_says_if_more_exist() {
    let (_home, _fleet, service, _client) = house(&["a"]).await;
    let cli = Cli::of(&service);
    for _ in 0..21 {
        cli.run("run --quiet").await.with(0);
    }
    let list = cli.run("cycles list").await;
    assert_eq!(
        (list.stdout.lines().count(), list.stderr.trim()),
        (21, "There are more than these 20: use --limit or --all.")
    );
    for asked in ["cycles list --limit 20", "cycles list --all"] {
        assert_eq!(cli.run(asked).await.stderr, "", "{asked}");
    }
}

#[tokio::test]
async fn a_part_that_was_not_called_has_no_duration() {
    let (_home, _fleet, service, _client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    cli.run("subsystems suspend a").await.with(0);
    cli.run("run --quiet").await.with(0);
    let list = cli.run("subsystems list").await.with(0);
    assert_eq!(row(&list, "a")[..5], ["a", "0", "SUSPENDED", "SKIPPED", "-"], "{list}");
    assert!(list.starts_with("SUBSYSTEM  PHASE  STATUS"), "{list}");
}

#[tokio::test]
async fn a_waiting_run_shows_only_its_own_cycle() {
    let (_home, fleet, service, mut client) = house(&["a", "b"]).await;
    let cli = Cli::of(&service);
    fleet.run("a", Run::Hold);
    fleet.run("b", Run::Hold);
    let others = pb::RunCycleRequest { subsystems: vec!["a".into()], r#async: true, ..pb::RunCycleRequest::default() };
    client.admit_with(others).await.unwrap();
    fleet.until_run("a", 1).await;
    let mut run = cli.command("run");
    let ((), (code, shown)) = tokio::join!(
        async {
            while client.status().await.unwrap().queued_cycles == 0 {}
            fleet.run("a", Run::Echo);
            fleet.until_run("b", 1).await;
            let request = pb::WatchCyclesRequest { progress: true, ..pb::WatchCyclesRequest::default() };
            let mut stream = client.watch_cycles(request).await.unwrap().into_inner();
            let progress = |event| matches!(event, Some(pb::cycle_event::Event::Progress(_)));
            while !progress(stream.message().await.unwrap().unwrap().event.unwrap().event) {}
            fleet.run("b", Run::Echo);
        },
        on_a_terminal(&mut run, 90)
    );
    assert_eq!(code, 0);
    assert!(shown.contains("cycle 2  [") && !shown.contains("cycle 1  ["), "{shown:?}");
}

#[tokio::test]
async fn ctrl_c_removes_the_bar() {
    let (_home, fleet, service, _client) = house(&["a"]).await;
    fleet.run("a", Run::Hold);
    let mut terminal = Terminal::new(80, 24);
    // In its own session, so that Ctrl-C reaches it, not the runner of the tests.
    let mut command = Command::new("setsid");
    command.args(["--ctty", env!("CARGO_BIN_EXE_orchestrator"), "run"]);
    command.env("ORCHESTRATOR_ADDRESS", service.address().to_string()).kill_on_drop(true);
    terminal.connect(&mut command);
    let mut run = command.spawn().unwrap();
    terminal.until_shown("running a").await;
    terminal.press("\x03");
    let shown = terminal.until_shown("To see its result").await;
    assert!(shown.contains("Cycle 1 continues") && !shown.contains("running a"), "{shown}");
    assert_eq!(patiently("it to end", run.wait()).await.unwrap().code(), Some(130));
}

/// Text without colours.
fn plain(text: &str) -> String {
    let mut parts = text.split('\x1b');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once('m').map_or("", |(_, rest)| rest))
}

// ---------------------------------------------------------------------------------------------------------------
// Without a service

#[tokio::test]
async fn check_prints_the_plan_or_all_errors() {
    let check = async |config: &Path, more: &[&str]| {
        ended(orchestrator().arg("check").arg("--config").arg(config).args(more)).await
    };
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let shown = check(&examples.join("dreamnet.toml"), &[]).await.with(0);
    assert!(shown.contains("28 subsystems, 1 loop") && shown.contains("heartbeat  5s"), "{shown}");
    let plan: Value =
        serde_json::from_str(&check(&examples.join("dreamnet.toml"), &["--output", "json"]).await.with(0)).unwrap();
    assert_eq!(plan["plan"]["subsystems"].as_array().unwrap().len(), 28);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o.toml");
    std::fs::write(&path, "[cycle]\ndeadine = \"3s\"\n[[subsystems]]\nname = \"1\"\nendpoint = \"x\"\n").unwrap();
    let wrong = check(&path, &["--set", "store.url=tape:"]).await.refused_with(2);
    for problem in
        ["o.toml:2: cycle.deadine is unknown; did you mean cycle.deadline?", "o.toml:4:", "o.toml:5:", "tape:"]
    {
        assert!(wrong.contains(problem), "no {problem:?} in\n{wrong}");
    }
    let ring = |a: &str, b: &str| {
        format!("[[subsystems]]\nname = \"{a}\"\nendpoint = \"http://127.0.0.1:1\"\nafter = [\"{b}\"]\n")
    };
    std::fs::write(&path, ring("a", "b") + &ring("b", "a")).unwrap();
    let wrong = check(&path, &[]).await.refused_with(2);
    assert!(wrong.contains("o.toml:1: subsystems[0] can't be ordered: circular dependency: a is after b"), "{wrong}");
    assert!(wrong.contains(&format!("(a at {0}:1, b at {0}:5)", path.display())), "{wrong}");
    std::fs::write(&path, ring("a", "b") + "requires = [\"gone\"]\nreads = [\"gone\"]\n").unwrap();
    let shown = check(&path, &[]).await.with(0);
    assert!(shown.contains("requires gone, which is not registered"), "{shown}");
    assert!(shown.contains("gone (a requires it), b (a is after it), gone (a reads it)"), "{shown}");
}

#[tokio::test]
async fn help_needs_no_other_page() {
    let help = async |line: &str| ended(orchestrator().args(line.split_whitespace()).arg("--help")).await.with(0);
    let all = help("").await;
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "10 ", "11 ", "12 ", "130 "] {
        assert!(all.contains(&format!("\n  {code}")), "{all}");
    }
    for line in [
        "serve",
        "run",
        "cancel",
        "status",
        "health",
        "watch",
        "cycles list",
        "cycles show",
        "cycles prune",
        "subsystems list",
        "subsystems show",
        "subsystems register",
        "subsystems rename",
        "subsystems unregister",
        "subsystems suspend",
        "subsystems resume",
        "subsystems renew",
        "loops list",
        "loops start",
        "loops stop",
        "loops pause",
        "loops resume",
        "report",
        "plan",
        "check",
        "checkpoint",
        "export",
        "verify",
        "backup",
        "restore",
        "completions",
        "man",
    ] {
        let help = help(line).await;
        assert!(help.contains("Examples:\n  orchestrator "), "{help}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = ended(orchestrator().args(["completions", shell])).await.with(0);
        assert!(script.contains("ORCHESTRATOR_COMPLETE"), "{shell}");
    }
}

#[tokio::test]
async fn completions_have_the_names_that_the_service_knows() {
    let (_home, _fleet, service, _) = house(&["prices", "news"]).await;
    Cli::of(&service).run("loops start heartbeat --interval 24h").await.with(0);
    let address = service.address().to_string();
    // As the script for bash asks; the last word is the one to complete.
    let asked = async |address: &str, line: &str| {
        let words: Vec<_> = line.split(' ').collect();
        let mut command = orchestrator();
        command.env("ORCHESTRATOR_COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string());
        command.env("ORCHESTRATOR_ADDRESS", address).arg("--").args(words);
        let completions = ended(&mut command).await.with(0);
        completions.lines().filter(|line| !line.starts_with('-')).map(str::to_owned).collect::<Vec<_>>()
    };
    for (line, expected) in [
        ("orchestrator subsystems show ", &["news", "prices"][..]),
        ("orchestrator subsystems set p", &["prices"]),
        ("orchestrator run --subsystem prices,n", &["prices,news"]),
        ("orchestrator subsystems register other --requires ", &["news", "prices"]),
        ("orchestrator loops pause ", &["heartbeat"]),
        ("orchestrator watch --loop ", &["heartbeat"]),
        ("orchestrator cancel ", &[]),
    ] {
        assert_eq!(asked(&address, line).await, expected, "{line}");
    }
    // The line itself says which service is meant; one that is not there has none.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    assert_eq!(asked(&nobody, "orchestrator subsystems show ").await, Vec::<String>::new());
    for option in [format!("--address {address}"), format!("--address={address}")] {
        let line = format!("orchestrator subsystems {option} show n");
        assert_eq!(asked(&nobody, &line).await, ["news"], "{line}");
    }
}

#[tokio::test]
async fn the_examples_in_the_help_are_valid() {
    let mut tried = 0;
    for line in ["run", "watch", "cycles list", "subsystems register", "loops start", "report", "plan", "export"] {
        let help = ended(orchestrator().args(line.split_whitespace()).arg("--help")).await.with(0);
        let examples = help.split("Examples:\n").nth(1).unwrap().replace("\\\n", " ");
        // No server listens, so a valid command fails only at the connection.
        let nobody = Arc::new(TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap());
        for example in examples.lines().filter(|line| line.starts_with("  orchestrator ")) {
            let example = example.split(" | ").next().unwrap().split(" > ").next().unwrap();
            let example = example.trim().trim_start_matches("orchestrator ");
            let arguments = example.split_whitespace().map(|word| word.trim_matches('\''));
            let tried_one = ended(orchestrator().args(arguments).env("ORCHESTRATOR_ADDRESS", nobody.to_string())).await;
            assert_eq!(tried_one.code, 4, "{example}: {}", tried_one.stderr);
            tried += 1;
        }
    }
    assert!(tried > 15, "{tried}");
}
