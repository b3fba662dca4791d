//! A complete subsystem in Rust, made with the library.
//!
//! It adds up the `value` of its inputs, and keeps the highest sum of the latest `window` cycles (a parameter).

use std::{
    collections::VecDeque,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use clap::Parser;
use orchestrator_core::{
    proto::orchestrator::v1::{self as pb, orchestrator_client::OrchestratorClient},
    subsystem::{Answer, Code, Cycle, Failure, Input, Object, Server, Severity, Subsystem, Tls},
};
use serde_json::{Value, json};
use tokio::{
    pin, select,
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// Time until the orchestrator unregisters a dead subsystem.
const LEASE: Duration = Duration::from_secs(15);
/// Time for running calls to end after a signal, and for answers of the orchestrator.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Peak(Mutex<State>);

#[derive(Default)]
struct State {
    window: usize,
    /// The latest sums, at most `window`.
    sums: VecDeque<f64>,
    cycles: u64,
}

impl Peak {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subsystem for Peak {
    // After a restart the orchestrator calls `initialize` first, in the same cycle.
    const NEEDS_INITIALIZE: bool = true;

    async fn initialize(&self, parameters: Object) -> Result<(), Failure> {
        let given = parameters.get("window").cloned().unwrap_or(json!(60));
        let window = given.as_u64().filter(|window| (1..=1000).contains(window));
        let refusal = || Failure::new(Code::InvalidArgument, format!("window is {given}, not 1 to 1000"));
        self.state().window = usize::try_from(window.ok_or_else(refusal)?)?;
        Ok(())
    }

    async fn run_cycle(&self, cycle: Cycle) -> Result<Answer, Failure> {
        work(&cycle.parameters).await?;
        let mut answer = Answer::default();
        let mut sum = 0.0;
        for (name, input) in &cycle.inputs {
            let Some(value) = input.output().and_then(|output| output.get("value")?.as_f64()) else {
                answer.issue(Severity::Warning, "NO_VALUE", format!("{name} gave no value"));
                continue;
            };
            if let Input::Stale { cycle_id, .. } = input {
                answer.issue(Severity::Info, "STALE_VALUE", format!("{name} gave its value in cycle {cycle_id}"));
            }
            sum += value;
        }
        let mut state = self.state();
        state.cycles += 1;
        state.sums.push_back(sum);
        let over = state.sums.len().saturating_sub(state.window);
        state.sums.drain(..over);
        let peak = state.sums.iter().copied().fold(sum, f64::max);
        answer.output("value", peak);
        answer.metric("below_peak", peak - sum);
        Ok(answer)
    }

    async fn get_status(&self) -> Option<Object> {
        let State { cycles, sums, .. } = &*self.state();
        Some(Object::from_iter([("cycles".into(), json!(cycles)), ("sums".into(), json!(sums))]))
    }
}

/// Simulates work for `work_ms` milliseconds (a parameter). When the deadline passes or the caller cancels, it is
/// dropped here, before anything has changed.
async fn work(parameters: &Object) -> Result<(), Failure> {
    let ms = parameters.get("work_ms").and_then(Value::as_f64).unwrap_or_default();
    sleep(Duration::try_from_secs_f64(ms / 1000.0)?).await;
    Ok(())
}

/// Connects to the orchestrator with the first call: over TLS with the certificate in this directory, or without TLS.
fn connect(orchestrator: &str, credentials: Option<&Path>) -> Result<OrchestratorClient<Channel>, Box<dyn Error>> {
    let endpoint = match credentials {
        None => Endpoint::from_shared(format!("http://{orchestrator}"))?,
        Some(directory) => {
            let read = |name| fs::read(directory.join(name));
            let tls = ClientTlsConfig::new()
                .identity(Identity::from_pem(read("cert.pem")?, read("key.pem")?))
                .ca_certificate(Certificate::from_pem(read("ca.pem")?));
            Endpoint::from_shared(format!("https://{orchestrator}"))?.tls_config(tls)?
        }
    };
    Ok(OrchestratorClient::new(endpoint.timeout(GRACE).connect_lazy()))
}

/// Registers with a lease and renews it until a signal stops it. Retries without a limit.
async fn stay_registered(
    orchestrator: &str,
    credentials: Option<&Path>,
    registration: pb::Registration,
    stop: impl Future<Output = ()>,
) -> Result<(), Box<dyn Error>> {
    let mut client = connect(orchestrator, credentials)?;
    let name = registration.name.clone();
    let register = pb::RegisterSubsystemRequest { registration: Some(registration), lease: Some(LEASE.try_into()?) };
    let mut registered = false;
    pin!(stop);
    loop {
        let answer = if registered {
            client.renew_lease(pb::RenewLeaseRequest { name: name.clone() }).await.map(drop)
        } else {
            client.register_subsystem(register.clone()).await.map(drop)
        };
        let pause = match answer {
            Ok(()) => {
                registered = true;
                LEASE / 3
            }
            Err(status) => {
                eprintln!("{orchestrator}: {:?}: {}", status.code(), status.message());
                // The lease has expired, or the subsystem was registered without one.
                registered &= !matches!(status.code(), tonic::Code::NotFound | tonic::Code::FailedPrecondition);
                // The new connection uses the certificate as it is now.
                match connect(orchestrator, credentials) {
                    Ok(connected) => client = connected,
                    Err(error) => eprintln!("{error}"),
                }
                Duration::from_secs(1)
            }
        };
        select! {
            () = sleep(pause) => {}
            () = &mut stop => break,
        }
    }
    if registered && let Err(status) = client.unregister_subsystem(pb::UnregisterSubsystemRequest { name }).await {
        eprintln!("{orchestrator}: {:?}: {}", status.code(), status.message());
    }
    Ok(())
}

#[derive(Parser)]
#[command(about = "A complete subsystem in Rust")]
struct Flags {
    /// Address to listen on
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50054")]
    listen: String,
    /// The subsystem's name
    #[arg(long, value_name = "NAME", default_value = "peak")]
    name: String,
    /// Orchestrator to register with [default: not registered]
    #[arg(long, value_name = "HOST:PORT")]
    orchestrator: Option<String>,
    /// Directory with cert.pem, key.pem and ca.pem for TLS [default: no TLS]
    #[arg(long, value_name = "DIR")]
    credentials: Option<PathBuf>,
    /// With TLS: the URI in the certificate of the orchestrator
    #[arg(long, value_name = "URI", default_value = "spiffe://fleet/core")]
    caller: String,
    /// Subsystems that it requires
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    requires: Vec<String>,
    /// Subsystems that it runs after, even if they fail
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    after: Vec<String>,
    /// Subsystems whose latest output it reads
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    reads: Vec<String>,
}

async fn serve(flags: Flags) -> Result<(), Box<dyn Error>> {
    let Flags { listen, name, orchestrator, credentials, caller, requires, after, reads } = flags;
    let [mut terminated, mut interrupted] = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let stop = async {
        select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
    };

    let mut server = Server::new().subsystem(&name, Peak::default());
    if let Some(directory) = &credentials {
        server = server.tls(Tls::in_directory(directory, caller));
    }
    let serving = server.listen(&listen).await?;
    let endpoint = serving.endpoint().to_owned();
    println!("listening on {}", endpoint.split_once("://").map_or(&*endpoint, |(_, address)| address));
    match orchestrator {
        None => stop.await,
        Some(orchestrator) => {
            let registration = pb::Registration { name, endpoint, requires, after, reads, ..Default::default() };
            stay_registered(&orchestrator, credentials.as_deref(), registration, stop).await?;
        }
    }
    serving.stop(GRACE).await;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    match serve(Flags::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
