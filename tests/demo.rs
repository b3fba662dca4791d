//! `orchestrator demo`, as a new user starts it.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::{collections::BTreeMap, process::Stdio};

use common::{
    patiently,
    service::{Client, decode},
};
use orchestrator_core::{
    config::Config,
    proto::orchestrator::v1::{self as pb, cycle_event::Event},
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

struct Demo {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Demo {
    async fn start(args: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_orchestrator"))
            .args(["demo", "--listen", "127.0.0.1:0", "--interval", "300ms"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let first = patiently("the demo to listen", lines.next_line()).await.unwrap().unwrap();
        let address = first.strip_prefix("listening on ").unwrap().to_owned();
        Self { process, lines, address }
    }

    async fn client(&self) -> Client {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        Client::new(endpoint.connect().await.unwrap())
    }

    /// The rest of what it prints, and its exit code.
    async fn end(mut self) -> (String, Option<i32>) {
        let mut text = String::new();
        while let Some(line) = patiently("the demo to go on", self.lines.next_line()).await.unwrap() {
            text += &line;
            text.push('\n');
        }
        (text, patiently("the demo to end", self.process.wait()).await.unwrap().code())
    }
}

#[tokio::test]
async fn it_runs_the_28_in_the_order_of_their_phases() {
    let demo = Demo::start(&[]).await;
    let mut client = demo.client().await;
    let mut events = client.watch_after(0).await.unwrap();
    let first = loop {
        let event = patiently("a cycle", events.message()).await.unwrap().unwrap().event.unwrap();
        if let Some(Event::Recorded(record)) = event.event {
            break decode(record);
        }
    };
    assert_eq!((first.cycle_id, first.subsystems.len(), first.r#loop.as_str()), (1, 28, "heartbeat"));

    let config = Config::from_toml_str("dreamnet.toml", include_str!("../examples/dreamnet.toml")).unwrap();
    let phases: BTreeMap<_, _> = config.subsystems.iter().map(|it| (it.name.as_str(), it.phase)).collect();
    let nanos = |at: prost_types::Timestamp| i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    let called: Vec<_> = first
        .subsystems
        .iter()
        .filter_map(|part| Some((phases[part.name.as_str()], nanos(part.started_at?), nanos(part.finished_at?))))
        .collect();
    assert!(called.len() > 14, "{first:?}");
    for (phase, _, ended) in &called {
        let later = called.iter().filter(|(other, ..)| other > phase);
        assert!(later.into_iter().all(|(_, started, _)| started >= ended), "{first:?}");
    }

    let request = pb::GetStatusRequest { include_subsystems: true, include_snapshots: true };
    let status = client.get_status(request).await.unwrap().into_inner().status.unwrap();
    assert_eq!(status.subsystems.len(), 28);
    assert!(status.subsystems.iter().all(|it| it.snapshot_error.is_empty() && !it.snapshot.is_empty()));

    let pid = Pid::from_raw(demo.process.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let (text, code) = demo.end().await;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("28 subsystems behind 4 endpoints"), "{text}");
    assert!(text.contains("dreamnet.orchestrator.v1.Orchestrator/RunCycle"), "{text}");
}

#[tokio::test]
async fn it_ends_by_itself_after_so_many_cycles() {
    let (text, code) = Demo::start(&["--cycles", "2"]).await.end().await;
    assert_eq!(code, Some(0), "{text}");
    let recorded: Vec<_> = text.lines().filter(|line| line.contains("  loop heartbeat")).collect();
    assert_eq!(recorded.len(), 2, "{text}");
    assert!(recorded[0].contains("cycle 1") && recorded[1].contains("cycle 2"), "{text}");
}
