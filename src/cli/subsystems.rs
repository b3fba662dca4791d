//! `orchestrator subsystems`: the registry.

mod changes;
mod fields;

use std::{
    collections::{BTreeSet, HashSet},
    path::PathBuf,
};

use clap::Subcommand;

use self::{changes::changes, fields::Fields};
use super::{
    Exit, Failure,
    cycles::why,
    known,
    output::{
        age, clean, count, duration, grouped, milliseconds, names, note, parse_duration, payload, print,
        subsystem_state, time, word,
    },
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
Subsystems that are expected (registry.expected), but not registered, come last, as MISSING.

With --output json, one object: {\"subsystems\":[...]} with a SubsystemStatus each, written page by page; with \
ndjson, a SubsystemStatus a line. Both have registered subsystems only: `orchestrator status --output json` has the \
missing ones.

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
    Set(Box<Set>),
    /// Give a subsystem another name, by which its output and its history are found
    #[command(after_help = "\
Other registrations and loops that name it name it by the new name. Its former name stays its own: cycles are found by \
both names, and no other subsystem can be registered by it. To rename a subsystem that the configuration file \
declares, change its name there, and add former_names = [\"OLD\"].

A subsystem that registers itself has to use the new name from now on, before its lease ends if it has one.

Examples:
  orchestrator subsystems rename prices market-prices")]
    Rename {
        /// Its name
        name: String,
        /// The name that it is to have
        new_name: String,
        /// Only if the registration still has this etag, which `orchestrator subsystems show` shows
        #[arg(long, value_name = "ETAG")]
        etag: Option<String>,
    },
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
if the registration had another value before; `orchestrator subsystems set` changes some fields only. The output has \
what has changed in a registration that is replaced. The subsystem takes part from the next cycle that starts, and \
survives restarts of the service.

With --file, all [[subsystems]] of the file are registered, up to 1,000 at once: all of these or none. The output has \
the names of those that are new, changed and unchanged, and what has changed, as far as a person reads it. Other \
tables of the file are ignored, so that a configuration file can be used.

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
    /// The registration expires after this time unless renewed, 1s to 24h [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    lease: Option<prost_types::Duration>,
    #[command(flatten)]
    fields: Fields,
}

/// Change some fields of a registration, and leave the others as they are
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The flags are those of `orchestrator subsystems register`. A flag that is not given leaves its field as it is, a list \
is replaced as a whole, and --param changes one parameter. The output has each changed field, before and after. The \
owner, the lease, the latest output and a suspension stay.

The change holds until the subsystem is registered again, which a subsystem that registers itself does when it starts. \
To change a subsystem that the configuration file declares, edit the file.

Examples:
  orchestrator subsystems set prices --timeout-per-cycle 4s
  orchestrator subsystems set signals --requires prices,news --param limit=5
  orchestrator subsystems set signals --clear reads,retry.max_attempts,critical
  orchestrator subsystems set signals --clear parameters.limit")]
struct Set {
    /// Its name
    name: String,
    /// Where it is dialed: http://HOST:PORT, https://HOST:PORT or unix:/PATH
    #[arg(long, value_name = "URI")]
    endpoint: Option<String>,
    /// Give these fields their defaults, by their keys in the configuration file, such as timeout, retry or
    /// retry.max_attempts; parameters.KEY removes one parameter
    #[arg(long, value_name = "KEYS", value_delimiter = ',')]
    clear: Vec<String>,
    /// Only if the registration still has this etag, which `orchestrator subsystems show` shows
    #[arg(long, value_name = "ETAG")]
    etag: Option<String>,
    #[command(flatten)]
    fields: Fields,
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
                let (answer, all) = register_file(remote, client, *register).await?;
                format.show("RegisterSubsystemsResponse", &answer, |answer| registered(answer, &all, format.page()))?;
            }
            Self::Register(register) => {
                note_other_timeout(remote, &register.fields);
                let request = register.request()?;
                let others = request.registration.as_ref().map(others).unwrap_or_default();
                let response = remote.quickly(client.register_subsystem(request)).await?.into_inner();
                format.show("RegisterSubsystemResponse", &response, |response| {
                    let name = response.subsystem.as_ref().map(name).unwrap_or_default();
                    match response.subsystem.as_ref().zip(response.previous.as_ref()) {
                        Some((now, previous)) => format!(
                            "subsystem {} is registered, in place of its previous registration\n{}",
                            clean(&name),
                            changes(previous, now, format.page())
                        ),
                        None if response.created => format!("subsystem {} is registered\n", clean(&name)),
                        None => format!("subsystem {} is registered, as before\n", clean(&name)),
                    }
                })?;
                known::note_missing(remote, client, &others, "until it is, it counts as missing").await;
            }
            Self::Set(set) => {
                note_other_timeout(remote, &set.fields);
                let request = set.request()?;
                let others = request.registration.as_ref().map(others).unwrap_or_default();
                let response = remote.quickly(client.update_subsystem(request)).await?.into_inner();
                format.show("UpdateSubsystemResponse", &response, |response| {
                    let name = response.subsystem.as_ref().map(name).unwrap_or_default();
                    match response.subsystem.as_ref().zip(response.previous.as_ref()) {
                        Some((now, previous)) => {
                            format!("subsystem {} is changed\n{}", clean(&name), changes(previous, now, format.page()))
                        }
                        None => format!("subsystem {} is unchanged: it had these values\n", clean(&name)),
                    }
                })?;
                known::note_missing(remote, client, &others, "until it is, it counts as missing").await;
            }
            Self::Rename { name, new_name, etag } => {
                let etag = etag.unwrap_or_default();
                let request = pb::RenameSubsystemRequest { name: name.clone(), new_name, etag };
                let response = remote.quickly(client.rename_subsystem(request)).await?.into_inner();
                format
                    .show("RenameSubsystemResponse", &response, |response| renamed(&name, response, format.page()))?;
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

/// Prints a note if `--timeout` was given, which is not the timeout of the subsystem.
fn note_other_timeout(remote: &Remote, fields: &Fields) {
    if remote.timeout.is_some() && fields.timeout_per_cycle.is_none() && !has_timeout_by_environment() {
        note("--timeout limits this command; the timeout of the subsystem is --timeout-per-cycle");
    }
}

impl Register {
    fn request(self) -> Result<pb::RegisterSubsystemRequest, Failure> {
        let registration =
            self.fields.registration(self.name.unwrap_or_default(), self.endpoint.unwrap_or_default())?;
        Ok(pb::RegisterSubsystemRequest { registration: Some(registration), lease: self.lease })
    }
}

impl Set {
    /// # Errors
    /// No field is given, or one is both given and cleared.
    fn request(self) -> Result<pb::UpdateSubsystemRequest, Failure> {
        let mut paths = self.fields.paths();
        paths.extend(self.endpoint.iter().map(|_| "endpoint".to_owned()));
        if let Some(both) = self.clear.iter().find(|path| paths.contains(path)) {
            let why = format!("{} is given and also cleared: give one of them", clean(both));
            return Err(Failure::new(Exit::Usage, why));
        }
        paths.extend(self.clear);
        if paths.is_empty() {
            let why = "nothing to change: give the flag of a field, such as --timeout-per-cycle 4s, or --clear KEYS";
            return Err(Failure::new(Exit::Usage, why.to_owned()));
        }
        let registration = self.fields.registration(self.name, self.endpoint.unwrap_or_default())?;
        let update_mask = Some(prost_types::FieldMask { paths });
        Ok(pb::UpdateSubsystemRequest {
            registration: Some(registration),
            update_mask,
            etag: self.etag.unwrap_or_default(),
        })
    }
}

/// Registers the subsystems of a file. Returns the changes, and the names of all of these subsystems.
async fn register_file(
    remote: &Remote,
    client: &mut Client,
    Register { file, lease, .. }: Register,
) -> Result<(pb::RegisterSubsystemsResponse, Vec<String>), Failure> {
    use prost::Message as _;
    /// Well below the service's default limit of requests.
    const MAX_BYTES: usize = 3 << 20;
    /// Most fields of a registration, without the names in its lists.
    const FIELDS: usize = 32;
    let overrides = Overrides { config: file, ..Overrides::default() };
    let config = Config::load(&overrides, []).map_err(|error| Failure::new(Exit::Usage, error.to_string()))?;
    if let Some((name, former_names)) = config.former_names.iter().next() {
        let former = former_names.first().map_or("OLD".to_owned(), ToString::to_string);
        let why = format!(
            "{name} has former_names, which only the configuration file of the service may have: run `orchestrator \
             subsystems rename {former} {name}`, and remove them from this file"
        );
        return Err(Failure::new(Exit::Usage, why));
    }
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
        registered.replacements.extend(answer.replacements);
    }
    Ok((registered, config.subsystems.iter().map(|subsystem| subsystem.name.to_string()).collect()))
}

/// The subsystems of a file, which are all registered now: the names of those that are new, changed and unchanged, and
/// the changes.
fn registered(answer: &pb::RegisterSubsystemsResponse, all: &[String], page: Page) -> String {
    /// Most names of each kind, and most changed registrations, that are shown: more than a person reads.
    const SHOWN: usize = 20;
    let known: HashSet<_> = answer.created.iter().chain(&answer.replaced).collect();
    let unchanged: Vec<_> = all.iter().filter(|name| !known.contains(name)).cloned().collect();
    let kinds = [("new", &answer.created), ("changed", &answer.replaced), ("unchanged", &unchanged)];
    let numbers = kinds.map(|(kind, of)| format!("{} {kind}", grouped(of.len() as u64)));
    let summary = format!("registered {}: {}\n", count(all.len() as u64, "subsystem"), numbers.join(", "));
    let mut facts = Facts::new();
    for (kind, of) in kinds {
        facts.fact(kind, names(of, SHOWN));
    }
    let replaced = answer.replacements.iter().filter_map(|it| it.subsystem.as_ref().zip(it.previous.as_ref()));
    let changed = replaced
        .take(SHOWN)
        .map(|(now, previous)| format!("subsystem {} is changed\n{}", clean(&name(now)), changes(previous, now, page)));
    let sections: Vec<_> = std::iter::once(summary + &facts.finish(page)).chain(changed).collect();
    sections.join("\n")
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
    let request = pb::GetStatusRequest { omit_last_cycle: true, ..pb::GetStatusRequest::default() };
    let status = remote.quickly(client.get_status(request)).await?.into_inner().status.unwrap_or_default();
    for name in &status.missing {
        table.row(row_of_missing(name));
    }
    print(&table.or("no subsystems", remote.format.page()))?;
    let unnamed = u64::from(status.missing_count).saturating_sub(status.missing.len() as u64);
    if unnamed > 0 {
        note(&format!("missing as well: {}", count(unnamed, "more subsystem")));
    }
    Ok(())
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

/// The row of a subsystem that is expected, but not registered.
fn row_of_missing(name: &str) -> [Cell; 7] {
    let dash = || text("-");
    let why = "it is expected (registry.expected), but not registered";
    [text(name), dash(), state("MISSING"), dash(), dash(), dash(), text(why)]
}

/// How long a part took; a dash if its subsystem was not called.
fn duration_of(part: &pb::SubsystemTelemetry) -> String {
    if part.started_at.is_some() { milliseconds(part.duration_ms) } else { "-".to_owned() }
}

/// A subsystem that had this name, and what names it.
fn renamed(former: &str, response: &pb::RenameSubsystemResponse, page: Page) -> String {
    let name = response.subsystem.as_ref().map(name).unwrap_or_default();
    let mut changed = Facts::new();
    changed.fact("changed subsystems", names(&response.changed_subsystems, MAX_CHANGED));
    changed.fact("changed loops", names(&response.changed_loops, MAX_CHANGED));
    format!("subsystem {} is renamed to {}\n{}", clean(former), clean(&name), changed.finish(page))
}

/// Most changed subsystems or loops that are named.
const MAX_CHANGED: usize = 20;

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
    fact("former names", names(&status.former_names, usize::MAX));
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
    fact("etag", status.etag.clone());
    if let Some(last) = &status.last {
        let (cycle, state) = (status.last_cycle_id, subsystem_state(last.state()));
        let attempts = match last.attempts {
            0 => String::new(),
            attempts => format!(", {}", count(attempts, "attempt")),
        };
        let took = if last.started_at.is_some() { format!(", {}", duration_of(last)) } else { String::new() };
        fact("last", format!("{state} in cycle {cycle}{took}{attempts}  {}", why(last)).trim().to_owned());
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
