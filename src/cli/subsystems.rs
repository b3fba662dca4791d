//! `orchestrator subsystems`: the registry.

use std::{collections::BTreeSet, path::PathBuf};

use clap::Subcommand;

use super::{
    Exit, Failure,
    cycles::why,
    known,
    output::{
        age, clean, count, duration, grouped, milliseconds, names, note, parse_duration, parse_positive, payload,
        print, subsystem_state, time, word,
    },
    parameters::Parameters,
    remote::{Client, Remote, has_timeout_by_environment},
    table::{Cell, Facts, Page, Table, left, long, right, state, text},
};
use crate::{
    api::registration,
    config::{Config, Overrides},
    proto::{
        bounds::{MAX_FIELDS, MAX_REGISTRATIONS},
        orchestrator::v1 as pb,
    },
};

/// See and change the registry
#[derive(Debug, clap::Args)]
pub(super) struct Subsystems {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the registered subsystems by name
    #[command(
        visible_alias = "ls",
        after_help = "\
With --output json, one object: {\"subsystems\":[...]} with a SubsystemStatus each, written page by page; with \
ndjson, a SubsystemStatus a line.

Examples:
  orchestrator subsystems list
  orchestrator subsystems list --output ndjson | jq .registration"
    )]
    List,
    /// Show one subsystem's registration and state
    #[command(after_help = "\
Examples:
  orchestrator subsystems show prices
  orchestrator subsystems show prices --latest-output --snapshot")]
    Show {
        /// Its name
        name: String,
        /// Also show its latest output
        #[arg(long)]
        latest_output: bool,
        /// Also ask the subsystem for a snapshot of its own state
        #[arg(long)]
        snapshot: bool,
    },
    Register(Box<Register>),
    /// Remove a subsystem and its latest output
    #[command(after_help = "\
A running cycle keeps it until it ends. To remove a subsystem that the configuration file declares, edit the file.

Examples:
  orchestrator subsystems unregister prices")]
    Unregister {
        /// Its name
        name: String,
    },
    /// Take a subsystem out of cycles for maintenance
    #[command(after_help = "\
It stays registered, and cycles record it as skipped, which is not a failure. Survives restarts of the service.

Examples:
  orchestrator subsystems suspend prices")]
    Suspend {
        /// Its name
        name: String,
    },
    /// End a suspension, and close the subsystem's circuit breaker
    #[command(after_help = "\
Examples:
  orchestrator subsystems resume prices")]
    Resume {
        /// Its name
        name: String,
    },
    /// Renew the lease of a subsystem for its full length
    #[command(after_help = "\
Examples:
  orchestrator subsystems renew prices")]
    Renew {
        /// Its name
        name: String,
    },
}

/// Register a subsystem, or replace its registration
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The flags are the keys of [[subsystems]] in the configuration file. A flag that is not given takes its default, even \
if the registration had another value before. The subsystem takes part from the next cycle that starts, and survives \
restarts of the service.

With --file, all [[subsystems]] of the file are registered, up to 1,000 at once: all of these or none. Other tables of \
the file are ignored, so that a configuration file can be used.

Examples:
  orchestrator subsystems register prices --endpoint http://127.0.0.1:50051
  orchestrator subsystems register signals --endpoint unix:/run/signals.sock \\
      --critical --requires prices --reads news --timeout-per-cycle 2s
  orchestrator subsystems register prices --endpoint http://127.0.0.1:50051 \\
      --lease 30s --retry-max-attempts 5 \\
      --retry-retryable-status-codes UNAVAILABLE,RESOURCE_EXHAUSTED
  orchestrator subsystems register --file fleet.toml")]
struct Register {
    /// Unique name: a letter, then letters, digits, '_', '-' or '.'; at most 63 characters
    #[arg(required_unless_present = "file")]
    name: Option<String>,
    /// Where it is dialed: http://HOST:PORT, https://HOST:PORT or unix:/PATH
    #[arg(long, value_name = "URI", required_unless_present = "file")]
    endpoint: Option<String>,
    /// Register all [[subsystems]] of this file (TOML)
    #[arg(long, value_name = "PATH", conflicts_with_all = FLAGS_OF_ONE)]
    file: Option<PathBuf>,
    /// Subsystems in lower phases end before any in a higher phase starts
    #[arg(long, value_name = "NUMBER", default_value_t = 0, allow_negative_numbers = true)]
    phase: i32,
    /// Runs after these subsystems; does not run if one of them fails or is missing
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    requires: Vec<String>,
    /// Runs after these subsystems, even if they fail
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    after: Vec<String>,
    /// Gets the latest outputs of these subsystems, without an order
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    reads: Vec<String>,
    /// Deadline of its part in a cycle, retries included, 1ms to 24h [key: timeout] [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout_per_cycle: Option<prost_types::Duration>,
    /// A cycle in which it fails is FAILED
    #[arg(long)]
    critical: bool,
    /// Record its output in every cycle
    #[arg(long)]
    record_output: bool,
    /// The identity of the server that must answer: cert:URI or cert:DNS-NAME for https://, uid:NUMBER for unix:
    #[arg(long, value_name = "IDENTITY")]
    tls_peer: Option<String>,
    /// The registration expires after this time unless renewed, 1s to 24h [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    lease: Option<prost_types::Duration>,
    #[command(flatten)]
    parameters: Parameters,
    #[command(flatten)]
    retry: Retry,
    #[command(flatten)]
    breaker: Breaker,
    #[command(flatten)]
    limits: Limits,
}

/// Flags that describe one subsystem, and conflict with `--file`.
const FLAGS_OF_ONE: [&str; 24] = [
    "name",
    "endpoint",
    "phase",
    "requires",
    "after",
    "reads",
    "timeout_per_cycle",
    "critical",
    "record_output",
    "tls_peer",
    "one",
    "all",
    "retry_max_attempts",
    "retry_initial_backoff",
    "retry_max_backoff",
    "retry_backoff_multiplier",
    "retry_retryable_status_codes",
    "breaker_failure_threshold",
    "breaker_open_for",
    "breaker_disabled",
    "limits_max_message_bytes",
    "limits_max_output_bytes",
    "limits_max_metrics",
    "limits_max_issues",
];

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_field_names, reason = "they are the names of flags")]
#[command(next_help_heading = "Retries")]
struct Retry {
    /// Most calls, including the first one, 1 to 10 [default: 3]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    retry_max_attempts: Option<u32>,
    /// Wait before the first retry, 1ms to 1h [default: 100ms]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    retry_initial_backoff: Option<prost_types::Duration>,
    /// Longest wait before a retry, up to 1h [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    retry_max_backoff: Option<prost_types::Duration>,
    /// Factor between successive waits, 1 to 100 [default: 2]
    #[arg(long, value_name = "NUMBER")]
    retry_backoff_multiplier: Option<f64>,
    /// The gRPC status codes that are retried, by name [default: UNAVAILABLE]
    #[arg(long, value_name = "CODES", value_delimiter = ',')]
    retry_retryable_status_codes: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_field_names, reason = "they are the names of flags")]
#[command(next_help_heading = "Circuit breaker")]
struct Breaker {
    /// Number of consecutive failed or timed out cycles that opens the breaker, 1 to 1000 [default: 5]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    breaker_failure_threshold: Option<u32>,
    /// How long the breaker stays open before one probe call, 1ms to 24h [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    breaker_open_for: Option<prost_types::Duration>,
    /// Disable the breaker
    #[arg(long)]
    breaker_disabled: bool,
}

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_field_names, reason = "they are the names of flags")]
#[command(next_help_heading = "Limits on one answer")]
struct Limits {
    /// Bytes of the whole message, up to 64 MiB [default: 4194304]
    #[arg(long, value_name = "BYTES", value_parser = parse_positive::<u32>)]
    limits_max_message_bytes: Option<u32>,
    /// Bytes of the output, up to 64 MiB [default: 1048576]
    #[arg(long, value_name = "BYTES", value_parser = parse_positive::<u32>)]
    limits_max_output_bytes: Option<u32>,
    /// Metrics, up to 4096 [default: 64]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    limits_max_metrics: Option<u32>,
    /// Issues, up to 1024 [default: 32]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    limits_max_issues: Option<u32>,
}

impl Subsystems {
    /// Runs the subcommand.
    pub(super) async fn run(self) -> Result<Exit, Failure> {
        let mut client = self.remote.connect().await?;
        match self.command.run(&self.remote, &mut client).await {
            Ok(()) => Ok(Exit::Done),
            Err(failure) => Err(known::explain(failure, &self.remote, &mut client).await),
        }
    }
}

impl Command {
    async fn run(self, remote: &Remote, client: &mut Client) -> Result<(), Failure> {
        let format = remote.format;
        match self {
            Self::List => list(remote, client).await?,
            Self::Show { name, latest_output, snapshot } => {
                let request =
                    pb::GetSubsystemRequest { name, include_output: latest_output, include_snapshot: snapshot };
                let response = remote.quickly(client.get_subsystem(request)).await?.into_inner();
                format.show("GetSubsystemResponse", &response, |response| {
                    shown(response.subsystem.as_ref(), format.page())
                })?;
            }
            Self::Register(register) if register.file.is_some() => {
                let registered = register_file(remote, client, *register).await?;
                format.show("RegisterSubsystemsResponse", &registered.0, |answer| {
                    let (all, new, changed) = (registered.1, answer.created.len(), answer.replaced.len());
                    let unchanged = all - new - changed;
                    let [new, changed, unchanged] = [new, changed, unchanged].map(|number| grouped(number as u64));
                    let all = count(all as u64, "subsystem");
                    format!("registered {all}: {new} new, {changed} changed, {unchanged} unchanged\n")
                })?;
            }
            Self::Register(register) => {
                if remote.timeout.is_some() && register.timeout_per_cycle.is_none() && !has_timeout_by_environment() {
                    note("--timeout limits this command; the timeout of the subsystem is --timeout-per-cycle");
                }
                let request = register.request()?;
                let others = request.registration.as_ref().map(others).unwrap_or_default();
                let response = remote.quickly(client.register_subsystem(request)).await?.into_inner();
                format.show("RegisterSubsystemResponse", &response, |response| {
                    let name = response.subsystem.as_ref().map(name).unwrap_or_default();
                    let before = if response.created { "" } else { ", in place of its previous registration" };
                    format!("subsystem {} is registered{before}\n", clean(&name))
                })?;
                known::note_missing(remote, client, &others, "until it is, it counts as missing").await;
            }
            Self::Unregister { name } => {
                let request = pb::UnregisterSubsystemRequest { name: name.clone() };
                let response = remote.quickly(client.unregister_subsystem(request)).await?.into_inner();
                format.show("UnregisterSubsystemResponse", &response, |_| {
                    format!("subsystem {} is removed\n", clean(&name))
                })?;
            }
            Self::Suspend { name } => {
                let request = pb::SuspendSubsystemRequest { name: name.clone() };
                let response = remote.quickly(client.suspend_subsystem(request)).await?.into_inner();
                format.show("SuspendSubsystemResponse", &response, |_| {
                    format!("subsystem {} is suspended\n", clean(&name))
                })?;
            }
            Self::Resume { name } => {
                let request = pb::ResumeSubsystemRequest { name: name.clone() };
                let response = remote.quickly(client.resume_subsystem(request)).await?.into_inner();
                format.show("ResumeSubsystemResponse", &response, |_| {
                    format!("subsystem {} is resumed\n", clean(&name))
                })?;
            }
            Self::Renew { name } => {
                let request = pb::RenewLeaseRequest { name: name.clone() };
                let response = remote.quickly(client.renew_lease(request)).await?.into_inner();
                format.show("RenewLeaseResponse", &response, |response| {
                    let ends = response.lease_expires_at.as_ref();
                    format!("the lease of {} ends at {} ({})\n", clean(&name), time(ends), age(ends))
                })?;
            }
        }
        Ok(())
    }
}

/// The names that a registration waits for or reads, each once.
fn others(registration: &pb::Registration) -> Vec<String> {
    let pb::Registration { requires, after, reads, .. } = registration;
    let others: BTreeSet<_> = requires.iter().chain(after).chain(reads).cloned().collect();
    others.into_iter().collect()
}

impl Register {
    fn request(self) -> Result<pb::RegisterSubsystemRequest, Failure> {
        let codes = self.retry.retry_retryable_status_codes.iter();
        let registration = pb::Registration {
            name: self.name.unwrap_or_default(),
            endpoint: self.endpoint.unwrap_or_default(),
            phase: self.phase,
            requires: self.requires,
            after: self.after,
            reads: self.reads,
            timeout: self.timeout_per_cycle,
            retry: Some(pb::RetryPolicy {
                max_attempts: self.retry.retry_max_attempts.unwrap_or_default(),
                initial_backoff: self.retry.retry_initial_backoff,
                max_backoff: self.retry.retry_max_backoff,
                backoff_multiplier: self.retry.retry_backoff_multiplier.unwrap_or_default(),
                retryable_status_codes: codes.map(|code| code.to_uppercase()).collect(),
            }),
            breaker: Some(pb::BreakerPolicy {
                failure_threshold: self.breaker.breaker_failure_threshold.unwrap_or_default(),
                open_for: self.breaker.breaker_open_for,
                disabled: self.breaker.breaker_disabled,
            }),
            critical: self.critical,
            parameters: self.parameters.encode()?,
            limits: Some(pb::Limits {
                max_message_bytes: self.limits.limits_max_message_bytes.unwrap_or_default(),
                max_output_bytes: self.limits.limits_max_output_bytes.unwrap_or_default(),
                max_metrics: self.limits.limits_max_metrics.unwrap_or_default(),
                max_issues: self.limits.limits_max_issues.unwrap_or_default(),
            }),
            record_output: self.record_output,
            tls: self.tls_peer.map(|peer| pb::Tls { peer }),
        };
        Ok(pb::RegisterSubsystemRequest { registration: Some(registration), lease: self.lease })
    }
}

/// Registers the subsystems of a file. Returns the changes, and the number of subsystems.
async fn register_file(
    remote: &Remote,
    client: &mut Client,
    Register { file, lease, .. }: Register,
) -> Result<(pb::RegisterSubsystemsResponse, usize), Failure> {
    use prost::Message as _;
    /// Well below the service's default limit of requests.
    const MAX_BYTES: usize = 3 << 20;
    /// Most fields of a registration, without the names in its lists.
    const FIELDS: usize = 32;
    let overrides = Overrides { config: file, ..Overrides::default() };
    let config = Config::load(&overrides, []).map_err(|error| Failure::new(Exit::Usage, error.to_string()))?;
    let mut registered = pb::RegisterSubsystemsResponse::default();
    let mut left = config.subsystems.iter().map(registration).peekable();
    while left.peek().is_some() {
        let (mut registrations, mut bytes, mut fields) = (Vec::new(), 0, 0);
        while let Some(next) = left.next_if(|next| {
            bytes += next.encoded_len();
            fields += FIELDS + next.requires.len() + next.after.len() + next.reads.len();
            let fits = registrations.len() < MAX_REGISTRATIONS && bytes <= MAX_BYTES && fields <= MAX_FIELDS;
            fits || registrations.is_empty()
        }) {
            registrations.push(next);
        }
        let request = pb::RegisterSubsystemsRequest { registrations, lease };
        let answer = remote.quickly(client.register_subsystems(request)).await?.into_inner();
        registered.created.extend(answer.created);
        registered.replaced.extend(answer.replaced);
    }
    Ok((registered, config.subsystems.len()))
}

/// Calls `take` with every page of the registry.
///
/// # Errors
/// The service can't be reached or refuses, or `take` fails.
pub(super) async fn pages<F: clap::Args>(
    remote: &Remote<F>,
    client: &mut Client,
    mut take: impl FnMut(Vec<pb::SubsystemStatus>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut page_token = String::new();
    loop {
        let request = pb::ListSubsystemsRequest { page_size: 1000, page_token };
        let page = remote.quickly(client.list_subsystems(request)).await?.into_inner();
        take(page.subsystems)?;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(());
        }
    }
}

async fn list(remote: &Remote, client: &mut Client) -> Result<(), Failure> {
    use prost::Message as _;
    if let Some(mut list) = remote.format.list("subsystems")? {
        pages(remote, client, |page| {
            page.iter().try_for_each(|status| list.add("SubsystemStatus", &status.encode_to_vec()))
        })
        .await?;
        return list.end();
    }
    let mut table = table();
    pages(remote, client, |page| {
        for status in &page {
            table.row(row(status));
        }
        Ok(())
    })
    .await?;
    print(&table.or("no subsystems", remote.format.page()))
}

/// The name of a subsystem.
pub(super) fn name(status: &pb::SubsystemStatus) -> String {
    status.registration.as_ref().map(|registration| registration.name.clone()).unwrap_or_default()
}

/// A table for [`row`]s.
pub(super) fn table() -> Table {
    Table::new([
        left("SUBSYSTEM"),
        right("PHASE").minor(),
        left("STATUS"),
        left("LAST"),
        right("DURATION").minor(),
        left("ENDPOINT").minor(),
        long("REASON"),
    ])
}

/// The row of a subsystem.
pub(super) fn row(status: &pb::SubsystemStatus) -> [Cell; 7] {
    let registration = status.registration.clone().unwrap_or_default();
    let last = status.last.as_ref();
    let dash = || "-".to_owned();
    [
        text(&registration.name),
        text(registration.phase.to_string()),
        state(stands(status)),
        last.map_or_else(|| text(dash()), |last| state(subsystem_state(last.state()))),
        text(last.map_or_else(dash, duration_of)),
        text(&registration.endpoint),
        text(last.map(why).unwrap_or_default()),
    ]
}

/// How long a part took; a dash if its subsystem was not called.
fn duration_of(part: &pb::SubsystemTelemetry) -> String {
    if part.started_at.is_some() { milliseconds(part.duration_ms) } else { "-".to_owned() }
}

/// Whether the next cycle will call the subsystem.
fn stands(status: &pb::SubsystemStatus) -> &'static str {
    match (status.suspended, status.breaker()) {
        (true, _) => "SUSPENDED",
        (false, _) if status.owner_revoked => "OWNER_REVOKED",
        (false, pb::BreakerState::Open) => "CIRCUIT_OPEN",
        (false, pb::BreakerState::HalfOpen) => "HALF_OPEN",
        (false, pb::BreakerState::Closed | pb::BreakerState::Unspecified) => "READY",
    }
}

/// The source of a subsystem or loop, in words.
pub(super) fn origin(origin: pb::Origin) -> &'static str {
    match origin {
        pb::Origin::Unspecified => "",
        pb::Origin::Config => "the configuration file",
        pb::Origin::Rpc => "RPC",
    }
}

/// One subsystem with its registration and state.
fn shown(status: Option<&pb::SubsystemStatus>, page: Page) -> String {
    let Some(status) = status else { return String::new() };
    let mut shown = Facts::new();
    for (what, is) in facts(status) {
        if what == STATUS { shown.state(what, &is) } else { shown.fact(what, is) }
    }
    if !status.output.is_empty() {
        shown.fact("output", payload(&status.output));
    }
    if !status.snapshot.is_empty() {
        shown.fact("snapshot", payload(&status.snapshot));
    }
    if !status.snapshot_error.is_empty() {
        shown.fact("snapshot", format!("none: {}", status.snapshot_error));
    }
    shown.finish(page)
}

/// Name of the fact that is a state.
pub(super) const STATUS: &str = "status";

/// The registration and the state of a subsystem as names and values, without JSON that it has sent. A value is empty
/// if it does not apply.
pub(super) fn facts(status: &pb::SubsystemStatus) -> Vec<(&'static str, String)> {
    let registration = status.registration.clone().unwrap_or_default();
    let mut facts = Vec::new();
    let mut fact = |what, is| facts.push((what, is));
    fact("subsystem", registration.name.clone());
    fact("declared by", origin(status.origin()).to_owned());
    fact("owner", status.owner.clone());
    fact("endpoint", registration.endpoint.clone());
    fact("phase", registration.phase.to_string());
    for (list, of) in
        [("requires", &registration.requires), ("after", &registration.after), ("reads", &registration.reads)]
    {
        fact(list, names(of, usize::MAX));
    }
    fact("timeout", duration(registration.timeout.as_ref()));
    if let Some(retry) = &registration.retry {
        fact(
            "retry",
            format!(
                "{}, backoff {} to {} times {}, for {}",
                count(retry.max_attempts, "attempt"),
                duration(retry.initial_backoff.as_ref()),
                duration(retry.max_backoff.as_ref()),
                retry.backoff_multiplier,
                names(&retry.retryable_status_codes, usize::MAX)
            ),
        );
    }
    if let Some(breaker) = &registration.breaker {
        let when = format!(
            "opens for {} after {}",
            duration(breaker.open_for.as_ref()),
            count(breaker.failure_threshold, "consecutive failure")
        );
        fact("breaker", if breaker.disabled { "disabled".to_owned() } else { when });
    }
    if let Some(limits) = &registration.limits {
        fact(
            "limits",
            format!(
                "{} in a message, {} of output, {}, {}",
                count(limits.max_message_bytes, "byte"),
                grouped(limits.max_output_bytes.into()),
                count(limits.max_metrics, "metric"),
                count(limits.max_issues, "issue")
            ),
        );
    }
    if registration.critical {
        fact("critical", "a cycle in which it fails is FAILED".to_owned());
    }
    if registration.record_output {
        fact("output", "kept in the record of every cycle".to_owned());
    }
    if let Some(tls) = &registration.tls {
        fact("server", format!("must be {}", tls.peer));
    }
    if status.redacted {
        fact("parameters", "left out: operators see them".to_owned());
    } else if !registration.parameters.is_empty() {
        fact("parameters", payload(&registration.parameters));
    }
    fact(STATUS, stands(status).to_owned());
    fact("breaker state", word(status.breaker().as_str_name(), "BREAKER_STATE_").to_owned());
    fact("initialized", if status.initialized { "yes, in this epoch" } else { "not yet" }.to_owned());
    if status.lease_expires_at.is_some() {
        let ends = status.lease_expires_at.as_ref();
        fact("lease ends", format!("{} ({})", time(ends), age(ends)));
    }
    if let Some(last) = &status.last {
        let (cycle, state) = (status.last_cycle_id, subsystem_state(last.state()));
        let (took, attempts, why) = (duration_of(last), count(last.attempts, "attempt"), why(last));
        fact("last", format!("{state} in cycle {cycle}, {took}, {attempts}  {why}").trim().to_owned());
    }
    if status.output_cycle_id != 0 {
        fact("latest output", format!("of cycle {}", status.output_cycle_id));
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::{super::table::tests::assert_screens, *};

    #[test]
    fn a_list_fits_its_terminal() {
        let status = |name: &str, state: pb::SubsystemState, code: &str, message: &str| pb::SubsystemStatus {
            registration: Some(pb::Registration {
                name: name.into(),
                endpoint: format!("http://{name}.fleet.example.org:50051"),
                phase: 2,
                ..pb::Registration::default()
            }),
            last: Some(pb::SubsystemTelemetry {
                state: state.into(),
                started_at: Some(prost_types::Timestamp::default()),
                duration_ms: 12.3,
                error_code: code.into(),
                error_message: message.into(),
                ..pb::SubsystemTelemetry::default()
            }),
            ..pb::SubsystemStatus::default()
        };
        let mut table = table();
        for status in [
            status("news", pb::SubsystemState::Succeeded, "", ""),
            pb::SubsystemStatus {
                breaker: pb::BreakerState::Open.into(),
                ..status(
                    "prices",
                    pb::SubsystemState::Failed,
                    "UNAVAILABLE",
                    "the subsystem closed the connection before it answered, which is often a crash: see its log for \
                     the reason, and restart it with the same name and endpoint once the reason is gone",
                )
            },
            pb::SubsystemStatus {
                last: None,
                ..status("sentiment-of-the-market", pb::SubsystemState::Waiting, "", "")
            },
        ] {
            table.row(row(&status));
        }
        assert_screens("subsystems-list", |page| table.finish(page));
    }
}
