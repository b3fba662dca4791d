//! `orchestrator demo`, as a new user runs it.

use std::{net::SocketAddr, path::Path, process::Stdio};

use crate::common::{
    fleet::from_struct,
    patiently,
    service::{Client, decode},
};
use orchestrator_core::{
    config::Config,
    proto::orchestrator::v1::{self as pb, CycleState, cycle_event::Event},
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStdout, Command},
};
use tonic::transport::Endpoint;

/// A demo that runs in an empty directory. It is killed when this is dropped.
struct Demo {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    first_line: String,
    directory: TempDir,
}

impl Demo {
    async fn start(args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_orchestrator"))
            .arg("demo")
            .args(args)
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first_line = patiently("the demo to listen", lines.next_line()).await.unwrap().unwrap();
        Self { child, lines, first_line, directory }
    }

    fn address(&self) -> SocketAddr {
        let address = self.first_line.strip_prefix("listening on ").unwrap();
        address.split(',').next().unwrap().parse().unwrap()
    }

    async fn client(&self) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address())).unwrap();
        Client::new(patiently("a connection to the demo", endpoint.connect()).await.unwrap())
    }

    fn signal(&self, signal: Signal) {
        let id = self.child.id().unwrap();
        kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// Waits until it has succeeded, and returns its further lines. It leaves no file, and reports no problem.
    async fn ended(mut self) -> Vec<String> {
        let mut rest = Vec::new();
        while let Some(line) = patiently("the demo to end", self.lines.next_line()).await.unwrap() {
            rest.push(line);
        }
        let mut complaints = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut complaints).await.unwrap();
        let status = patiently("the demo to end", self.child.wait()).await.unwrap();
        assert!(status.success(), "{status}\n{complaints}");
        assert_eq!(complaints, "");
        assert_eq!(files(self.directory.path()), [""; 0]);
        rest
    }
}

fn files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The lines about recorded cycles.
fn recorded(lines: &[String]) -> Vec<&str> {
    lines.iter().filter_map(|line| line.split_once("Z  cycle ").map(|(_, cycle)| cycle)).collect()
}

#[tokio::test]
async fn it_runs_cycles_over_dreamnet_until_a_signal_stops_it() {
    let demo = Demo::start(&["--listen", "127.0.0.1:0", "--interval", "250ms", "--seed", "23"]).await;
    let mut client = demo.client().await;

    // It records cycles of all subsystems, in the order of their phases.
    let phases = Config::from_toml_str("dreamnet.toml", include_str!("../../examples/dreamnet.toml")).unwrap();
    let phase_of = |name: &str| phases.subsystems.iter().find(|it| it.name.as_str() == name).unwrap().phase;
    let mut stream = client.watch_after(0).await.unwrap();
    let mut cycles = Vec::new();
    while cycles.len() < 2 {
        let response = patiently("a cycle", stream.message()).await.unwrap().unwrap();
        if let Some(Event::Recorded(record)) = response.event.unwrap().event {
            cycles.push(decode(record));
        }
    }
    let nanos = |time: &prost_types::Timestamp| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    for cycle in &cycles {
        assert_eq!((cycle.subsystems.len(), cycle.r#loop.as_str()), (28, "heartbeat"));
        for earlier in &cycle.subsystems {
            for later in cycle.subsystems.iter().filter(|it| phase_of(&it.name) > phase_of(&earlier.name)) {
                let (end, start) = (earlier.finished_at.as_ref().unwrap(), later.started_at.as_ref().unwrap());
                assert!(nanos(end) <= nanos(start), "{} ran before {} had ended", later.name, earlier.name);
            }
        }
    }
    // The seed decides these states.
    assert_eq!(cycles[0].state(), CycleState::Succeeded, "{:?}", cycles[0]);
    assert_eq!(cycles[1].state(), CycleState::Degraded, "{:?}", cycles[1]);

    let request = pb::GetStatusRequest { include_subsystems: true, ..pb::GetStatusRequest::default() };
    let status = client.get_status(request).await.unwrap().into_inner().status.unwrap();
    assert_eq!(status.subsystems.len(), 28);
    assert!(status.total_cycles >= 2);

    // Outputs are made from inputs of this cycle, and of the previous one where the order is the other way round.
    let request =
        pb::GetSubsystemRequest { name: "EconomicEngineCore".into(), include_output: true, include_snapshot: true };
    let economy = client.get_subsystem(request).await.unwrap().into_inner().subsystem.unwrap();
    let output = from_struct(&economy.output);
    assert_eq!(output["heard"]["AgentRegistryCore"], "FRESH");
    assert!(output["heard"]["DreamVault"].as_str().unwrap().starts_with("STALE, of cycle "), "{output}");
    assert!(from_struct(&economy.snapshot)["cycles"].as_f64().unwrap() >= 2.0);

    drop(stream);
    demo.signal(Signal::TERM);
    let address = demo.address();
    let lines = demo.ended().await;
    assert!(recorded(&lines)[0].starts_with("1  SUCCEEDED"), "{lines:#?}");
    for tried in ["orchestrator top", "orchestrator status", "/GetStatus", "/WatchCycles", "/RunCycle", " list"] {
        assert!(lines.iter().any(|line| line.ends_with(tried)), "{tried} is not among {lines:#?}");
    }
    assert!(lines.contains(&format!("  export ORCHESTRATOR_ADDRESS={address}")), "{lines:#?}");
    tokio::net::TcpStream::connect(address).await.unwrap_err();
}

#[tokio::test]
async fn it_ends_after_the_given_cycles_and_the_seed_decides_their_failures() {
    let run = async || {
        let args = ["--listen", "127.0.0.1:0", "--interval", "100ms", "--seed", "23", "--cycles", "3"];
        let lines = Demo::start(&args).await.ended().await;
        let words =
            |line: &&str| line.split("  ").filter(|word| !word.ends_with(" s") && !word.ends_with(" ms")).collect();
        recorded(&lines).iter().map(words).collect::<Vec<String>>()
    };
    let (once, again) = tokio::join!(run(), run());
    assert_eq!(once, again);
    assert!(once.len() == 3 && once[1].contains("DEGRADED"), "{once:?}");
}

#[tokio::test]
async fn it_uses_another_port_if_its_own_is_in_use() {
    // If this fails, another process uses the port, which has the same effect.
    let _taken = TcpListener::bind("127.0.0.1:7700").await;
    let demo = Demo::start(&[]).await;
    assert!(demo.first_line.ends_with(", because 127.0.0.1:7700 is in use"), "{}", demo.first_line);
    demo.client().await.status().await.unwrap();
    demo.signal(Signal::INT);
    demo.ended().await;
}

#[tokio::test]
async fn it_keeps_the_record_in_the_given_store() {
    let home = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", home.path().join("demo.db").display());
    let args = ["--listen", "127.0.0.1:0", "--store", &store, "--interval", "100ms", "--cycles", "1"];
    let first = Demo::start(&args).await.ended().await;
    assert_eq!(recorded(&first)[0].split("  ").next(), Some("1"));
    let demo = Demo::start(&args[..4]).await;
    let history = demo.client().await.history().await.unwrap();
    assert_eq!(decode(history[0].clone()).cycle_id, 1);
    demo.signal(Signal::TERM);
    demo.ended().await;
}

#[tokio::test]
async fn its_subsystems_can_be_changed_and_the_changes_stay_in_the_given_store() {
    let home = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", home.path().join("demo.db").display());
    let args = ["--listen", "127.0.0.1:0", "--store", &store, "--interval", "100ms"];
    let demo = Demo::start(&args).await;
    let mut client = demo.client().await;
    let phase = |phase| pb::Registration { name: "NeuralMesh".into(), phase, ..pb::Registration::default() };
    let request = pb::UpdateSubsystemRequest { registration: Some(phase(70)), ..pb::UpdateSubsystemRequest::default() };
    client.update_subsystem(request).await.unwrap();
    client.stop_interval_loop(pb::StopIntervalLoopRequest { name: "heartbeat".into() }).await.unwrap();
    let before = client.subsystem("NeuralMesh").await.unwrap().registration.unwrap();
    demo.signal(Signal::TERM);
    demo.ended().await;

    let demo = Demo::start(&args).await;
    let mut client = demo.client().await;
    let after = client.subsystem("NeuralMesh").await.unwrap().registration.unwrap();
    assert_ne!(after.endpoint, before.endpoint, "its process is another one");
    assert_eq!(pb::Registration { endpoint: before.endpoint.clone(), ..after }, before);
    assert_eq!(client.run().await.unwrap().subsystems.len(), 28);
    demo.signal(Signal::TERM);
    demo.ended().await;
}

#[tokio::test]
async fn a_renamed_subsystem_keeps_its_new_name_in_the_given_store() {
    let home = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", home.path().join("demo.db").display());
    let args = ["--listen", "127.0.0.1:0", "--store", &store, "--interval", "100ms"];
    let demo = Demo::start(&args).await;
    let mut client = demo.client().await;
    let before = client.subsystem("NeuralMesh").await.unwrap().registration.unwrap();
    let (name, new_name) = ("NeuralMesh".to_owned(), "Mesh".to_owned());
    let request = pb::RenameSubsystemRequest { name, new_name, ..pb::RenameSubsystemRequest::default() };
    client.rename_subsystem(request).await.unwrap();
    demo.signal(Signal::TERM);
    demo.ended().await;

    let demo = Demo::start(&args).await;
    let mut client = demo.client().await;
    client.stop_interval_loop(pb::StopIntervalLoopRequest { name: "heartbeat".into() }).await.unwrap();
    let after = client.subsystem("Mesh").await.unwrap().registration.unwrap();
    assert_ne!(after.endpoint, before.endpoint, "its process is another one");
    assert_eq!(pb::Registration { name: before.name.clone(), endpoint: before.endpoint.clone(), ..after }, before);
    let cycle = client.run().await.unwrap();
    let names: Vec<_> = cycle.subsystems.iter().map(|part| part.name.as_str()).collect();
    assert!(names.len() == 28 && names.contains(&"Mesh") && !names.contains(&"NeuralMesh"), "{names:?}");
    demo.signal(Signal::TERM);
    demo.ended().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn it_stops_on_a_signal_while_its_output_is_not_read() {
    use nix::fcntl::{FcntlArg, fcntl};
    let args = ["--listen", "127.0.0.1:0", "--interval", "10ms"];
    let mut demo = Demo::start(&args).await;
    // The smallest size of a pipe: a page, which the lines of some fifty cycles fill.
    fcntl(demo.lines.get_ref().get_ref(), FcntlArg::F_SETPIPE_SZ(1)).unwrap();
    let mut client = demo.client().await;
    patiently("cycles", async { while client.status().await.unwrap().total_cycles < 100 {} }).await;
    demo.signal(Signal::TERM);
    assert!(patiently("the demo to end", demo.child.wait()).await.unwrap().success());
}
