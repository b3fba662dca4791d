//! The real service: a process of its own that can be killed, and a client of it.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use bytes::Bytes;
use orchestrator_core::proto::orchestrator::v1::{
    self as pb, cycle_event::Event, orchestrator_client::OrchestratorClient,
};
use prost::Message;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use tonic_types::StatusExt;

use super::{http, patiently};

/// The files of a service: its database, its configuration and its log survive its restarts.
pub struct Home {
    dir: TempDir,
    wrapper: Vec<String>,
    args: Vec<String>,
    store: String,
    admin: String,
    log_format: &'static str,
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Home {
    /// An empty home.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = format!("sqlite:{}", dir.path().join("o.db").display());
        Self { dir, wrapper: Vec::new(), args: Vec::new(), store, admin: "127.0.0.1:0".into(), log_format: "text" }
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

    /// The same home, whose services keep their record at this URL.
    #[must_use]
    pub fn with_store(self, url: &str) -> Self {
        Self { store: url.into(), ..self }
    }

    /// The URL of the store of its services.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// The same home, whose services keep their record only in memory.
    #[must_use]
    pub fn in_memory(self) -> Self {
        Self { store: "memory:".into(), ..self }
    }

    /// The same home, whose services log in this format instead of as text.
    #[must_use]
    pub fn with_log_format(self, log_format: &'static str) -> Self {
        Self { log_format, ..self }
    }

    /// The same home, whose services serve their dashboard at this address.
    #[must_use]
    pub fn with_admin(self, address: SocketAddr) -> Self {
        Self { admin: address.to_string(), ..self }
    }

    /// The same home, whose services are started by this command, which receives their command line as its arguments.
    #[must_use]
    pub fn with_wrapper<A: Into<String>>(mut self, wrapper: impl IntoIterator<Item = A>) -> Self {
        self.wrapper.extend(wrapper.into_iter().map(Into::into));
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

    /// Starts the service and waits until it listens or ends.
    pub async fn try_serve(&self) -> Result<Service, ExitStatus> {
        self.spawn().listening().await
    }

    /// Starts the service and does not wait.
    pub fn spawn(&self) -> Starting {
        self.spawn_with_log(fs::File::options().create(true).append(true).open(self.path("log")).unwrap())
    }

    /// Starts the service with another destination of its log, and does not wait.
    pub fn spawn_with_log(&self, stderr: impl Into<Stdio>) -> Starting {
        let log = self.path("log");
        let command: Vec<_> =
            self.wrapper.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_orchestrator")]).collect();
        let child = Command::new(command[0])
            .args(&command[1..])
            .args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", &self.admin, "--store", &self.store])
            .args(["--log-format", self.log_format])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Starting { child, log }
    }

    /// Waits until its services have logged this text at least this number of times. Returns their whole log.
    pub async fn logged(&self, text: &str, times: usize) -> String {
        let logged = async {
            loop {
                let log = fs::read_to_string(self.path("log")).unwrap_or_default();
                if log.matches(text).count() >= times {
                    return log;
                }
                tokio::task::yield_now().await;
            }
        };
        patiently(text, logged).await
    }

    /// The last lines that its services have logged.
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
    /// Waits until it listens or ends.
    pub async fn listening(mut self) -> Result<Service, ExitStatus> {
        let mut lines = BufReader::new(self.child.stdout.take().unwrap()).lines();
        let line = patiently("the service to listen", lines.next_line()).await.unwrap();
        let Some(line) = line else {
            return Err(patiently("the service to end", self.child.wait()).await.unwrap());
        };
        let address = line.strip_prefix("listening on ").and_then(|address| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("the service printed {line:?}"));
        let line = patiently("the address of the dashboard", lines.next_line()).await.unwrap().unwrap();
        let url = line.strip_prefix("dashboard at http").map(|url| url.strip_prefix('s').unwrap_or(url));
        let admin = url.and_then(|url| url.strip_prefix("://")?.strip_suffix('/')?.parse().ok());
        let admin = admin.unwrap_or_else(|| panic!("the service printed {line:?}"));
        Ok(Service { child: self.child, address, admin, log: self.log })
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap()
    }

    /// Waits until it has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        patiently("the service to end", self.child.wait()).await.unwrap()
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
    admin: SocketAddr,
    log: PathBuf,
}

impl Service {
    /// The address at which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of its dashboard.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// A client on a connection of its own.
    pub async fn client(&self) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        let channel = patiently("a connection to the service", endpoint.connect()).await.unwrap();
        Client::new(channel)
    }

    /// A client on a connection of its own, with TLS. A refusal of its certificate is only seen by the first call.
    pub async fn client_with(&self, tls: ClientTlsConfig) -> Result<Client, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap().tls_config(tls)?;
        Ok(Client::new(patiently("a connection to the service", endpoint.connect()).await?))
    }

    /// Waits until it leads.
    pub async fn leads(&self) {
        let leads = async { while http::get(self.admin, "/leader").await.status != 200 {} };
        patiently("the replica to lead", leads).await;
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until it has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        patiently("the service to end", self.child.wait()).await.unwrap()
    }

    /// Sends SIGTERM until it has ended: the service ignores a second one within a second of the first.
    pub async fn aborted(&mut self) -> ExitStatus {
        let aborted = async {
            loop {
                self.signal(Signal::TERM);
                if let Ok(status) = timeout(Duration::from_millis(100), self.child.wait()).await {
                    return status.unwrap();
                }
            }
        };
        patiently("the service to be aborted", aborted).await
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

    /// Its resident memory now, and the peak of it, in bytes.
    pub fn memory(&self) -> (u64, u64) {
        (self.measured("VmRSS:"), self.measured("VmHWM:"))
    }

    /// The memory that it has reserved, written to or not, in bytes.
    pub fn reserved(&self) -> u64 {
        self.measured("VmData:")
    }

    /// The time that processors have spent on it so far, in ticks of the system.
    pub fn processor_time(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // Its name, in parentheses, may contain spaces. User and system time are the 14th and 15th field.
        let (_, after_name) = stat.rsplit_once(") ").unwrap();
        after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    /// A line of its `/proc/PID/status`, in bytes.
    fn measured(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
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

/// The generated client, with the common requests of tests.
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

    /// Admits a cycle of everything and returns its number.
    pub async fn admit(&mut self) -> Result<u64, Status> {
        self.admit_with(pb::RunCycleRequest::default()).await
    }

    /// Admits a cycle and returns its number.
    pub async fn admit_with(&mut self, request: pb::RunCycleRequest) -> Result<u64, Status> {
        Ok(self.run_cycle(pb::RunCycleRequest { r#async: true, ..request }).await?.into_inner().cycle_id)
    }

    /// Cancels a cycle and returns its telemetry.
    pub async fn cancel(&mut self, cycle_id: u64) -> Result<pb::CycleTelemetry, Status> {
        Ok(decode(self.cancel_cycle(pb::CancelCycleRequest { cycle_id }).await?.into_inner().telemetry))
    }

    /// The record of a cycle.
    pub async fn cycle(&mut self, cycle_id: u64) -> Result<pb::CycleTelemetry, Status> {
        Ok(decode(self.get_cycle(pb::GetCycleRequest { cycle_id }).await?.into_inner().telemetry))
    }

    /// Waits for the record of a cycle.
    pub async fn recorded(&mut self, cycle_id: u64) -> pb::CycleTelemetry {
        let request = pb::WatchCyclesRequest { from_oldest: true, ..pb::WatchCyclesRequest::default() };
        let mut cycles = self.watch_cycles(request).await.unwrap().into_inner();
        loop {
            let cycle = decode(next_recorded(&mut cycles).await);
            if cycle.cycle_id == cycle_id {
                return cycle;
            }
        }
    }

    /// One registered subsystem, with its latest output.
    pub async fn subsystem(&mut self, name: &str) -> Result<pb::SubsystemStatus, Status> {
        let request = pb::GetSubsystemRequest { name: name.to_owned(), include_output: true, include_snapshot: false };
        Ok(self.get_subsystem(request).await?.into_inner().subsystem.unwrap())
    }

    /// Watches the recorded cycles after a revision.
    pub async fn watch_after(&mut self, revision: u64) -> Result<Streaming<pb::WatchCyclesResponse>, Status> {
        let request = pb::WatchCyclesRequest { after_revision: Some(revision), ..pb::WatchCyclesRequest::default() };
        Ok(self.watch_cycles(request).await?.into_inner())
    }
}

/// The next event of a stream.
pub async fn next_event(stream: &mut Streaming<pb::WatchCyclesResponse>) -> Result<pb::CycleEvent, Status> {
    let next = patiently("the next event", stream.message()).await?;
    Ok(next.unwrap_or_else(|| panic!("the stream ended without an error")).event.unwrap())
}

/// The next recorded cycle of a stream, as the bytes that were recorded.
pub async fn next_recorded(stream: &mut Streaming<pb::WatchCyclesResponse>) -> Bytes {
    loop {
        if let Some(Event::Recorded(record)) = next_event(stream).await.unwrap().event {
            return record;
        }
    }
}

/// The machine-readable part of an error.
#[derive(Debug, PartialEq)]
pub struct Reason {
    /// The gRPC status code.
    pub code: Code,
    /// The reason of its `ErrorInfo`.
    pub why: String,
    /// The metadata of its `ErrorInfo`.
    pub metadata: BTreeMap<String, String>,
    /// The fields of its `BadRequest`, by path.
    pub fields: Vec<String>,
}

/// Reads the details that every error has.
pub fn reason(status: &Status) -> Reason {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("{status:?} has no ErrorInfo"));
    assert_eq!(info.domain, "orchestrator.dreamnet");
    assert!(!status.message().is_empty());
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    Reason {
        code: status.code(),
        why: info.reason.clone(),
        metadata: info.metadata.clone().into_iter().collect(),
        fields: violations.into_iter().map(|violation| violation.field).collect(),
    }
}

/// The machine-readable part of an error with this reason and no fields.
pub fn because<const N: usize>(code: Code, why: &str, metadata: [(&str, &str); N]) -> Reason {
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    Reason { code, why: why.to_owned(), metadata, fields: Vec::new() }
}

/// The machine-readable part of an error about these fields.
pub fn invalid<const N: usize>(fields: [&str; N]) -> Reason {
    let fields = fields.map(str::to_owned).into();
    Reason { fields, ..because(Code::InvalidArgument, "INVALID_FIELDS", []) }
}

/// A registration with only defaults.
pub fn registration(name: &str, endpoint: &str) -> pb::Registration {
    pb::Registration { name: name.to_owned(), endpoint: endpoint.to_owned(), ..pb::Registration::default() }
}

/// One subsystem's part in a cycle.
pub fn part<'a>(cycle: &'a pb::CycleTelemetry, name: &str) -> &'a pb::SubsystemTelemetry {
    let part = cycle.subsystems.iter().find(|part| part.name == name);
    part.unwrap_or_else(|| panic!("{name} is not in {cycle:?}"))
}

/// A duration for a field of a message.
#[allow(clippy::unnecessary_wraps, reason = "none of those fields has to be set")]
pub fn ms(milliseconds: i64) -> Option<prost_types::Duration> {
    #[allow(clippy::cast_possible_truncation, reason = "a remainder has few digits")]
    let nanos = (milliseconds % 1000 * 1_000_000) as i32;
    Some(prost_types::Duration { seconds: milliseconds / 1000, nanos })
}

/// Decodes a record.
pub fn decode(telemetry: Bytes) -> pb::CycleTelemetry {
    pb::CycleTelemetry::decode(telemetry).unwrap()
}
