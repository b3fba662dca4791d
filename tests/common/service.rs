//! The real service: a process of its own that can be killed, and a client of it.

use std::{
    fs,
    net::SocketAddr,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use bytes::Bytes;
use orchestrator_core::proto::orchestrator::v1::{self as pb, orchestrator_client::OrchestratorClient};
use prost::Message;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::patiently;

/// Where a service lives: its database, its configuration and its log survive its restarts.
pub struct Home {
    dir: TempDir,
    args: Vec<String>,
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Home {
    /// An empty home.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), args: Vec::new() }
    }

    /// A path inside it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same home, whose services read this configuration file.
    #[must_use]
    pub fn with_config(self, toml: &str) -> Self {
        let path = self.path("orchestrator.toml");
        fs::write(&path, toml).unwrap();
        self.with_args(["--config".to_owned(), path.display().to_string()])
    }

    /// The same home, whose services are started with these further arguments.
    #[must_use]
    pub fn with_args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts the service and waits until it listens.
    pub async fn serve(&self) -> Service {
        let log = self.path("log");
        match self.try_serve().await {
            Ok(service) => service,
            Err(status) => panic!("the service did not start: {status}\n{}", tail(&log)),
        }
    }

    /// Starts the service and waits until it listens, or has ended without.
    pub async fn try_serve(&self) -> Result<Service, ExitStatus> {
        self.spawn().listening().await
    }

    /// Starts the service and does not wait.
    pub fn spawn(&self) -> Starting {
        let log = self.path("log");
        let stderr = fs::File::options().create(true).append(true).open(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_orchestrator"))
            .args(["serve", "--listen", "127.0.0.1:0", "--store"])
            .arg(format!("sqlite:{}", self.path("o.db").display()))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Starting { child, log }
    }

    /// What its services have logged last.
    pub fn log(&self) -> String {
        tail(&self.path("log"))
    }
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    const LINES: usize = 40;
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// A service that may not listen yet. It is killed when it is dropped.
pub struct Starting {
    child: Child,
    log: PathBuf,
}

impl Starting {
    /// Waits until it listens, or has ended without.
    pub async fn listening(mut self) -> Result<Service, ExitStatus> {
        let mut lines = BufReader::new(self.child.stdout.take().unwrap()).lines();
        let line = patiently("the service to listen", lines.next_line()).await.unwrap();
        let Some(line) = line else {
            return Err(patiently("the service to end", self.child.wait()).await.unwrap());
        };
        let address = line.strip_prefix("listening on ").and_then(|address| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("the service printed {line:?}"));
        Ok(Service { child: self.child, address, log: self.log })
    }

    /// Kills it with SIGKILL, and waits until it is gone.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// A running service. It is killed when it is dropped.
pub struct Service {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
}

impl Service {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A client on a connection of its own.
    pub async fn client(&self) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        let channel = patiently("a connection to the service", endpoint.connect()).await.unwrap();
        Client::new(channel)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until it has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        patiently("the service to end", self.child.wait()).await.unwrap()
    }

    /// Kills it with SIGKILL, and waits until it is gone.
    pub async fn kill(mut self) {
        self.signal(Signal::KILL);
        self.ended().await;
    }

    /// Stops it with SIGTERM.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// The memory that it holds now, and the most that it ever held, in bytes.
    pub fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    fn pid(&self) -> Pid {
        let id = self.child.id().unwrap();
        Pid::from_raw(id.try_into().unwrap()).unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the end of the service's log:\n{}", tail(&self.log));
        }
    }
}

/// The generated client, and what tests ask of it again and again.
#[derive(Clone)]
pub struct Client(OrchestratorClient<Channel>);

impl Deref for Client {
    type Target = OrchestratorClient<Channel>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Client {
    /// A client on this connection.
    pub fn new(channel: Channel) -> Self {
        Self(OrchestratorClient::new(channel).max_decoding_message_size(usize::MAX))
    }

    /// Registers a subsystem.
    pub async fn register(&mut self, registration: pb::Registration) -> Result<pb::RegisterSubsystemResponse, Status> {
        let request = pb::RegisterSubsystemRequest { registration: Some(registration), lease: None };
        Ok(self.register_subsystem(request).await?.into_inner())
    }

    /// Runs a cycle of everything and returns its telemetry.
    pub async fn run(&mut self) -> Result<pb::CycleTelemetry, Status> {
        self.run_with(pb::RunCycleRequest::default()).await
    }

    /// Runs a cycle and returns its telemetry.
    pub async fn run_with(&mut self, request: pb::RunCycleRequest) -> Result<pb::CycleTelemetry, Status> {
        Ok(decode(self.run_cycle(request).await?.into_inner().telemetry))
    }

    /// The whole history, oldest first, as the bytes that were recorded.
    pub async fn history(&mut self) -> Result<Vec<Bytes>, Status> {
        let mut cycles = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListCyclesRequest { page_size: 1000, page_token, ..pb::ListCyclesRequest::default() };
            let page = self.list_cycles(request).await?.into_inner();
            cycles.extend(page.cycles);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                cycles.reverse();
                return Ok(cycles);
            }
        }
    }

    /// Every registered subsystem, by name.
    pub async fn subsystems(&mut self) -> Result<Vec<pb::SubsystemStatus>, Status> {
        let mut subsystems = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListSubsystemsRequest { page_size: 1000, page_token };
            let page = self.list_subsystems(request).await?.into_inner();
            subsystems.extend(page.subsystems);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(subsystems);
            }
        }
    }

    /// The status.
    pub async fn status(&mut self) -> Result<pb::OrchestratorStatus, Status> {
        let response = self.get_status(pb::GetStatusRequest::default()).await?.into_inner();
        Ok(response.status.unwrap())
    }

    /// Watches the recorded cycles after a revision.
    pub async fn watch_after(&mut self, revision: u64) -> Result<Streaming<pb::WatchCyclesResponse>, Status> {
        let request = pb::WatchCyclesRequest { after_revision: Some(revision), ..pb::WatchCyclesRequest::default() };
        Ok(self.watch_cycles(request).await?.into_inner())
    }
}

/// A registration with nothing but defaults.
pub fn registration(name: &str, endpoint: &str) -> pb::Registration {
    pb::Registration { name: name.to_owned(), endpoint: endpoint.to_owned(), ..pb::Registration::default() }
}

/// A record as it is read.
pub fn decode(telemetry: Bytes) -> pb::CycleTelemetry {
    pb::CycleTelemetry::decode(telemetry).unwrap()
}
