//! `orchestrator top` on a terminal.

use std::{net::SocketAddr, process::Stdio};

use crate::common::{
    Stage,
    door::Door,
    fleet::{Run, to_struct},
    patiently,
    service::Home,
    terminal::Terminal,
    tokens::{write_private, write_tokens},
};
use orchestrator_core::proto::subsystem::v1 as pbs;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::process::{Child, Command};
use tonic::Code;

/// The command on a terminal.
struct Top {
    child: Child,
    terminal: Terminal,
}

fn command(address: SocketAddr) -> Command {
    // In its own session, so that it uses its own terminal, not the one of the test runner.
    let mut command = Command::new("setsid");
    command.args(["--ctty", env!("CARGO_BIN_EXE_orchestrator"), "top"]);
    for variable in ["TIMEOUT", "OUTPUT", "CONFIG"] {
        command.env_remove(format!("ORCHESTRATOR_{variable}"));
    }
    command
        .env("ORCHESTRATOR_ADDRESS", address.to_string())
        .env_remove("NO_COLOR")
        .env("LC_ALL", "C.UTF-8")
        .kill_on_drop(true);
    command
}

impl Top {
    fn start(address: SocketAddr, columns: u16, rows: u16) -> Self {
        let terminal = Terminal::new(columns, rows);
        let mut command = command(address);
        terminal.connect(&mut command);
        Self { child: command.spawn().unwrap(), terminal }
    }

    /// Waits until the row of a subsystem contains all of these texts.
    async fn row(&mut self, name: &str, has: &[&str]) {
        self.terminal
            .until(&format!("a row of {name} with {has:?}"), |shown| {
                let of_it = |line: &&str| line.split_whitespace().any(|word| word == name);
                shown.lines().filter(of_it).any(|line| has.iter().all(|text| line.contains(text)))
            })
            .await;
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// Waits until it has ended and restored the terminal, and returns its exit code.
    async fn ended(mut self) -> i32 {
        let code = patiently("top to end", self.child.wait()).await.unwrap().code().unwrap();
        self.terminal.until_given_back().await;
        code
    }
}

#[tokio::test]
async fn it_shows_the_progress_of_a_cycle_and_its_failure() {
    let mut stage = Stage::new().await;
    stage.register_all(&["calm", "held", "ill"]).await;
    stage.register("late", |it| it.requires = vec!["held".into()]).await;
    stage.fleet.run("held", Run::Hold);
    stage.fleet.run("ill", Run::fail(Code::Internal));
    let mut top = Top::start(stage.service.address(), 120, 30);
    top.terminal.until_shown("no cycle runs").await;
    top.row("calm", &["-", "ABSENT"]).await;

    stage.client.admit().await.unwrap();
    let shown = top.terminal.until_shown("1 failed  1 waiting  1 running: held").await;
    assert!(shown.contains("cycle 1, manual: 2 of 4 ended"), "{shown}");
    top.row("held", &["▸", "running"]).await;
    top.row("late", &["·"]).await;
    top.row("calm", &["✓", "SUCCEEDED", "FRESH"]).await;
    top.row("ill", &["✗", "FAILED", "ABSENT", "INTERNAL as scripted"]).await;

    stage.fleet.run("held", Run::Echo);
    let shown = top.terminal.until_shown("last: cycle 1 DEGRADED").await;
    assert!(shown.contains("1 of 4 failed: ill INTERNAL: as scripted"), "{shown}");
    top.row("late", &["SUCCEEDED", "FRESH", "#1"]).await;
    stage.fleet.run("ill", Run::Echo);
    stage.client.run().await.unwrap();
    top.row("ill", &["SUCCEEDED", "FRESH", "#2"]).await;
    top.terminal.until_shown("history: 2 cycles").await;

    top.terminal.press("q");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn a_cycle_is_opened() {
    let mut stage = Stage::new().await;
    stage.register_all(&["calm", "ill"]).await;
    stage.fleet.run("ill", Run::fail(Code::Internal));
    stage.client.run().await.unwrap();
    stage.fleet.run("ill", Run::Hold);
    stage.client.admit().await.unwrap();
    let mut top = Top::start(stage.service.address(), 100, 30);
    top.terminal.until_shown("running: ill").await;
    top.terminal.press("\t");
    top.terminal.until_shown("1 running, 1 recorded").await;
    top.terminal.press("\r");
    top.row("ill", &["RUNNING"]).await;
    stage.fleet.run("ill", Run::Echo);
    // Its record replaces its progress.
    top.row("ill", &["SUCCEEDED", " ms"]).await;
    top.terminal.until_shown("critical path").await;
    top.terminal.press("\x1b");
    top.terminal.until_shown("2 recorded").await;
    top.terminal.press("j\r");
    top.row("ill", &["FAILED", "INTERNAL as scripted"]).await;
    top.row("calm", &["SUCCEEDED"]).await;
    top.terminal.press("q");
    top.terminal.until_shown("2 recorded").await;
    top.terminal.press("q");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn a_subsystem_skipped_for_a_failure_keeps_failing_while_the_next_cycle_runs() {
    let mut stage = Stage::new().await;
    stage.register_all(&["held"]).await;
    stage.register("needy", |it| it.requires = vec!["nobody".into()]).await;
    stage.client.run().await.unwrap();
    let mut top = Top::start(stage.service.address(), 100, 24);
    top.row("needy", &["SKIPPED", "it requires nobody"]).await;
    top.terminal.until_shown("failing 1").await;

    stage.fleet.run("held", Run::Hold);
    stage.client.admit().await.unwrap();
    let shown = top.terminal.until("needy to be skipped", |shown| shown.contains("1 of 2 ended")).await;
    assert!(shown.contains("running: held") && shown.contains("failing 1"), "{shown}");
    stage.fleet.run("held", Run::Echo);
    top.terminal.until_shown("last: cycle 2 DEGRADED").await;
    top.terminal.until_shown("failing 1").await;
    top.terminal.press("q");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn the_smallest_terminal_shows_the_state_of_the_connection() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let mut top = Top::start(stage.service.address(), 40, 10);
    top.row("a", &["SUCCEEDED"]).await;
    top.terminal.until_shown("  connected").await;
    stage.service.kill().await;
    top.terminal.until_shown("  the connection is lost").await;
    top.terminal.press("q");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn the_mode_of_access_control_and_an_insecure_service_are_shown() {
    let stage = Stage::new().await;
    let mut top = Top::start(stage.service.address(), 120, 24);
    let shown = top.terminal.until_shown("access off").await;
    assert!(!shown.contains("INSECURE"), "{shown}");
    top.terminal.press("q");
    assert_eq!(top.ended().await, 0);

    let config = "[access]\nmode = \"dry_run\"\n[server]\ninsecure_listen_beyond_loopback = true\n";
    let stage = Stage::at(Home::new().with_config(config)).await;
    let mut top = Top::start(stage.service.address(), 120, 24);
    top.terminal.until_shown("access dry_run nobody").await;
    top.terminal.until_shown("INSECURE: other machines may need no right: access.mode is not enforce").await;
    top.terminal.press("q");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn a_viewer_opens_a_subsystem_without_its_output() {
    let home = Home::new();
    let (tokens, credentials) = (home.path("tokens.toml"), home.path("wall.token"));
    let (_, token) = write_tokens(&tokens, &["wall"]).remove("wall").unwrap();
    write_private(&credentials, &token);
    let home = home.with_config(&format!(
        "[access]\nmode = \"enforce\"\ntokens_file = {tokens:?}\n\
         [[access.grants]]\nwho = [\"token:wall\"]\nrole = \"viewer\"\nsubsystems = [\"*\"]\n\
         [[subsystems]]\nname = \"alpha\"\nendpoint = \"http://127.0.0.1:9\"\n"
    ));
    let service = home.serve().await;
    let terminal = Terminal::new(100, 40);
    let mut command = command(service.address());
    terminal.connect(command.env("ORCHESTRATOR_CREDENTIALS", &credentials));
    let mut top = Top { child: command.spawn().unwrap(), terminal };
    top.row("alpha", &["ABSENT"]).await;
    top.terminal.press("\r");
    top.terminal.until_shown("http://127.0.0.1:9").await;
    top.terminal.until_shown("  connected").await;
    // Back, and out.
    top.terminal.press("qq");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn it_survives_a_crash_of_the_service() {
    let home = Home::new();
    let mut stage = Stage::at(home).await;
    stage.register_all(&["a", "b"]).await;
    stage.client.run().await.unwrap();
    let door = Door::open().await;
    door.lead_to(Some(&stage.service));
    let mut top = Top::start(door.address(), 80, 24);
    top.row("a", &["SUCCEEDED", "#1"]).await;
    top.terminal.until_shown("cycles 1 ").await;

    stage.fleet.run("a", Run::Hold);
    stage.client.admit().await.unwrap();
    top.terminal.until_shown("running: a").await;
    let Stage { fleet, home, service, .. } = stage;
    door.lead_to(None);
    service.kill().await;
    let shown = top.terminal.until_shown("the connection is lost; reconnecting").await;
    assert!(shown.contains("running: a") && shown.contains("FRESH"), "the last known state stays\n{shown}");
    let dim = |screen: &vt100::Screen| screen.cell(12, 0).is_some_and(vt100::Cell::dim);
    top.terminal.until_screen("the fleet to be dimmed", dim).await;

    let service = home.serve().await;
    fleet.run("a", Run::Echo);
    service.client().await.run().await.unwrap();
    door.lead_to(Some(&service));
    top.terminal.until_shown("  connected").await;
    top.terminal.until_screen("the fleet to be lit", |screen| !dim(screen)).await;
    // It shows the cycles recorded meanwhile: the one in which the service died, and the next one.
    let shown = top.terminal.until_shown("last: cycle 3 SUCCEEDED").await;
    assert!(shown.contains("history: 3 cycles"), "{shown}");
    top.row("a", &["SUCCEEDED", "#3"]).await;
    top.terminal.press("\t");
    top.row("2", &["INTERRUPTED"]).await;

    top.terminal.press("\x03");
    assert_eq!(top.ended().await, 130);
}

#[tokio::test]
async fn it_reconnects_when_the_network_falls_silent() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let door = Door::open().await;
    door.lead_to(Some(&stage.service));
    let mut top = Top::start(door.address(), 100, 24);
    // It has read the history, and follows the stream.
    top.terminal.until_shown("last: cycle 1 SUCCEEDED").await;
    door.fall_silent();
    top.terminal.until_shown("the service does not answer; reconnecting").await;
    stage.client.run().await.unwrap();
    door.lead_to(Some(&stage.service));
    // The polled values come again as well as the stream.
    top.terminal
        .until("all data to arrive", |shown| shown.contains("  connected") && shown.contains("cycles 2 "))
        .await;
    top.row("a", &["SUCCEEDED", "#2"]).await;
    stage.register_all(&["b"]).await;
    top.row("b", &["ABSENT"]).await;
    top.terminal.press("q");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn keys_work_while_it_connects() {
    // A server listens and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    for (key, code) in [("q", 0), ("\x03", 130)] {
        let mut top = Top::start(silent.local_addr().unwrap(), 80, 24);
        top.terminal.until_shown("connecting").await;
        top.terminal.press(key);
        assert_eq!(top.ended().await, code, "{key:?}");
    }
}

#[tokio::test]
async fn it_filters_sorts_and_opens_a_subsystem() {
    /// Terminal commands.
    const ESCAPE: &str = "\x1b]0;title\x07\u{9b}2Jend";
    let mut stage = Stage::new().await;
    stage.register_all(&["alpha", "beta", "gamma"]).await;
    let answer = pbs::RunCycleResponse {
        output: to_struct(&json!({ "deep": { "er": ESCAPE } })),
        metrics: [("speed".to_owned(), 4.5)].into(),
        issues: vec![pbs::Issue { severity: 0, code: "SLOW".into(), message: ESCAPE.into() }],
    };
    stage.fleet.run("beta", Run::Answer(answer));
    stage.fleet.run("gamma", Run::Fail(Code::Internal, ESCAPE.into()));
    stage.client.run().await.unwrap();
    let mut top = Top::start(stage.service.address(), 100, 50);
    top.row("gamma", &["FAILED", "INTERNAL ]0;title2Jend"]).await;

    let order = |names: [&'static str; 3]| {
        move |shown: &str| {
            let lines: Vec<_> = shown.lines().collect();
            let position = |name: &str| lines.iter().rposition(|line| line.trim().starts_with(name));
            names.map(position).is_sorted() && names.iter().all(|name| position(name).is_some())
        }
    };
    top.terminal.press("s");
    top.terminal.until("those that fail first", order(["gamma", "alpha", "beta"])).await;
    top.terminal.press("r");
    top.terminal.until("those that fail last", order(["beta", "alpha", "gamma"])).await;

    top.terminal.press("/bet");
    top.terminal.until("only beta", |shown| shown.contains("1 of 3 with \"bet\"") && !shown.contains("alpha")).await;
    top.terminal.press("\r\r");
    let shown = top.terminal.until_shown("\"deep\": {").await;
    for expected in ["endpoint", "READY", "SLOW", "]0;title2Jend", "speed", "4.5", r#""er": "\u001b]0;title\u0007"#] {
        assert!(shown.contains(expected), "no {expected:?} in\n{shown}");
    }
    // A terminal of the smallest size, and a large one again.
    top.terminal.resize(20, 5);
    top.terminal.until_shown("too small").await;
    top.terminal.resize(100, 50);
    top.terminal.until_shown("\"deep\": {").await;
    top.terminal.press("?");
    top.terminal.until_shown("reverse the order").await;
    top.terminal.press("q");
    top.terminal.until_shown("fleet: 1 of 3").await;

    top.signal(Signal::TERM);
    assert_eq!(top.ended().await, 130);
}

#[tokio::test]
async fn ten_thousand_subsystems_can_be_searched() {
    let entry = |i| format!("[[subsystems]]\nname = \"s{i:04}\"\nendpoint = \"http://127.0.0.1:1\"\n");
    let config: String = (0..10_000).map(entry).collect();
    let service = Home::new().with_config(&config).serve().await;
    let mut top = Top::start(service.address(), 80, 24);
    top.terminal.until_shown("fleet: 10,000 subsystems").await;
    top.row("s0000", &["ABSENT"]).await;
    top.terminal.press("G");
    top.row("s9999", &["ABSENT"]).await;
    top.terminal.press("/777\r");
    top.terminal.until_shown("fleet: 19 of 10,000 with \"777\"").await;
    top.row("s7770", &["ABSENT"]).await;
    top.terminal.press("G\r");
    top.terminal.until_shown("─ s9777 ").await;
    top.terminal.press("\x1b");
    top.row("s9777", &["ABSENT"]).await;
    // Escape leaves the search first, and then the view.
    top.terminal.press("\x1b");
    top.terminal.until_shown("fleet: 10,000 subsystems").await;
    top.terminal.press("\x1b");
    assert_eq!(top.ended().await, 0);
}

#[tokio::test]
async fn colours_are_omitted_on_request() {
    let mut stage = Stage::new().await;
    stage.register_all(&["a"]).await;
    stage.client.run().await.unwrap();
    let coloured = async |no_color: &str| {
        let terminal = Terminal::new(80, 24);
        let mut command = command(stage.service.address());
        terminal.connect(command.env("NO_COLOR", no_color));
        let mut top = Top { child: command.spawn().unwrap(), terminal };
        top.row("a", &["SUCCEEDED"]).await;
        let is_coloured = |screen: &vt100::Screen| {
            let cells = (0..24).flat_map(|row| (0..80).filter_map(move |column| screen.cell(row, column)));
            cells.filter(|cell| cell.fgcolor() != vt100::Color::Default).count() > 0
        };
        let coloured = top.terminal.look(is_coloured);
        top.terminal.press("q");
        assert_eq!(top.ended().await, 0);
        coloured
    };
    assert_eq!((coloured("").await, coloured("1").await), (true, false));
}

#[tokio::test]
async fn without_a_terminal_or_a_service_it_names_the_remedy() {
    let stage = Stage::new().await;
    let refused = async |command: &mut Command| {
        let ended = patiently("top to end", command.output()).await.unwrap();
        assert_eq!((ended.status.code(), ended.stdout.as_slice()), (Some(2), &[][..]));
        let why = String::from_utf8(ended.stderr).unwrap();
        assert!(why.contains("orchestrator watch") && why.contains("orchestrator status"), "{why}");
    };
    let mut piped = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    refused(piped.arg("top").stdin(Stdio::null())).await;

    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let top = Top::start(nobody, 100, 24);
    top.terminal.until_shown("can't reach the service").await;
    assert_eq!(top.ended().await, 4);
    let terminal = Terminal::new(80, 24);
    let mut command = command(stage.service.address());
    terminal.connect(command.args(["--output", "json"]));
    refused(command.stdout(Stdio::piped()).stderr(Stdio::piped())).await;
}
