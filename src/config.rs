//! One [`Config`], from a file, the environment and flags; the later overrides the earlier.
//!
//! Every key has a default, so that no file is needed. Unknown keys are refused. All errors are reported together, each
//! with the place of the value, the problem and the allowed values. `examples/orchestrator.toml` is the reference of
//! all keys.

mod jwt;
mod reader;
pub mod secure;
mod settings;
mod tls;
mod tokens;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ffi::OsString,
    fmt::{self, Display},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tracing_subscriber::EnvFilter;

pub use self::{
    jwt::{JwtSettings, read_issuer},
    tls::{ClientAuth, DialTls, Tls, TlsSettings, TlsVersion},
    tokens::{read_tokens, tokens_text},
};
use self::{
    reader::{Node, PREFIX, Problems, Reader, Table, parse, put},
    settings::SETTINGS,
};
use crate::{
    access::{Allowed, CallerLimits, Grant, GrantSpec, Mode, Reach, Revoked, Role},
    engine::{Member, Plan},
    file::{self, FileError},
    memory::Shares,
    model::{
        BreakerPolicy, BreakerSpec, CatchUp, CycleState, Endpoint, Identity, IntervalLoop, LimitsSpec, LoopSpec, Name,
        OverlapPolicy, RetryPolicy, RetrySpec, Served, ServedSpec, Subsystem, SubsystemSpec, TlsSpec, Violations,
        is_orchestrator_id, text::clean,
    },
    ports::{EventRule, Retention, RetentionRule},
    store::StoreUrl,
};

const MS: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

/// The settings of one orchestrator, valid.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Sent to every subsystem in `Initialize`. 1 to 128 characters, default `orchestrator`.
    pub orchestrator_id: String,
    /// The gRPC server.
    pub server: ServerSettings,
    /// The admin address.
    pub admin: AdminSettings,
    /// The rights of callers.
    pub access: AccessSettings,
    /// The limits of each caller, while access is enforced.
    pub limits: CallerLimits,
    /// The memory limit.
    pub memory: MemorySettings,
    /// The store.
    pub store: StoreSettings,
    /// The replicas over one store.
    pub cluster: ClusterSettings,
    /// The audit.
    pub audit: AuditSettings,
    /// The log of the history.
    pub ledger: LedgerSettings,
    /// Limits of cycles.
    pub cycle: CycleSettings,
    /// The registry.
    pub registry: RegistrySettings,
    /// How subsystems are dialed.
    pub dial: DialSettings,
    /// The log.
    pub log: LogSettings,
    /// Tracing of cycles.
    pub tracing: TracingSettings,
    /// Declared subsystems, each name once.
    pub subsystems: Vec<Subsystem>,
    /// Former names of declared subsystems, newest first, by their name: at most [`Subsystem::MAX_FORMER_NAMES`] of
    /// each. None of them is declared, or is a former name of two.
    pub former_names: BTreeMap<Name, Arc<[Name]>>,
    /// Declared loops, each name once.
    pub loops: Vec<IntervalLoop>,
    /// The names under which this orchestrator is served as a subsystem, each once. At most [`Served::MAX`].
    pub serves: Vec<Served>,
}

/// The gRPC server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    /// Default `127.0.0.1:7700`. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// The path of a socket to serve on as well, which is shorter than 108 bytes. Default: none.
    pub listen_unix: Option<PathBuf>,
    /// The mode of its file: who may connect. Default 0600, the user of the service.
    pub unix_mode: u32,
    /// True if `listen` may be an address other than loopback, although there are no access rules. Default false.
    pub insecure_listen_beyond_loopback: bool,
    /// Most open connections. 1 to 1,000,000, default one for each 256 KiB of `memory.max_bytes`, at most 4,096: each
    /// costs a file descriptor and about 30 KB in addition to that memory.
    pub max_connections: Option<usize>,
    /// Most open calls and watches on one connection. 1 to 100,000, default 256: enough for a gateway with the watches
    /// of many users, and still a limit on the memory for one connection. At the limit, clients wait for a free stream.
    pub max_concurrent_streams: u32,
    /// Most open calls and watches on all connections. 1 to 1,000,000, default as for `max_connections`: each costs
    /// about 10 KB. Further ones are refused, except for one on each connection.
    pub max_streams: Option<usize>,
    /// Most bytes of one request. 64 KiB to 64 MiB, default 4 MiB, as in gRPC. Never more than half of
    /// `max_receiving_bytes`, since a request is in memory twice while it is read.
    pub max_request_bytes: usize,
    /// Bytes of all requests together that are being received at one time. 1 MiB to 64 GiB, default 3/32 of
    /// `memory.max_bytes`, and never more than all of it. Requests beyond it are refused.
    pub max_receiving_bytes: Option<usize>,
    /// Most concurrent watchers on all connections. 0 to 100,000, default 2,000.
    pub max_watchers: usize,
    /// Longest time that a shutdown waits for running cycles and open calls. 0 s to 1 h, default 30 s.
    pub drain_grace: Duration,
    /// TLS, if it has a certificate: see [`Config::server_tls`].
    pub tls: TlsSettings,
}

/// The admin address: the dashboard, JSON and metrics, over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminSettings {
    /// Default `127.0.0.1:7780`. Port 0 takes a free one. `None`, written `off`: disabled.
    pub listen: Option<SocketAddr>,
    /// What differs from the TLS of the gRPC server: see [`Config::admin_tls`].
    pub tls: TlsSettings,
}

/// The rights of callers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AccessSettings {
    /// Default [`Mode::Off`].
    pub mode: Mode,
    /// The file of static tokens. Default: none.
    pub tokens_file: Option<PathBuf>,
    /// The issuer of JWTs.
    pub jwt: JwtSettings,
    /// Identities and credentials that are revoked before they expire: at most [`Revoked::MAX`] entries. Default: none.
    pub revoked: Revoked,
    /// At most [`Grant::MAX`]. Default: none.
    pub grants: Vec<Grant>,
}

impl AccessSettings {
    /// The identities whose subsystems are not called: the revoked ones, as far as access is enforced.
    #[must_use]
    pub fn revoked_owners(&self) -> BTreeSet<Identity> {
        if self.mode == Mode::Enforce { self.revoked.identities().clone() } else { BTreeSet::new() }
    }
}

/// The memory limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySettings {
    /// Most bytes of all data whose size clients and subsystems decide: requests, answers, outputs, records,
    /// registrations. 64 MiB to 1 TiB. Each purpose has its share (`memory::Shares`), and requests over it are refused.
    /// Default: 1 GiB, or half of the memory of the machine or the memory group (cgroup) of the process, if that is
    /// less.
    pub max_bytes: Option<usize>,
}

impl MemorySettings {
    /// The largest default of `max_bytes`.
    pub const DEFAULT_MAX_BYTES: usize = GIB;
}

/// The store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSettings {
    /// Default `sqlite:orchestrator.db`.
    pub url: StoreUrl,
    /// Default: the newest 100,000 cycles. At a cycle every 5 s that is five days, and with 28 subsystems about 300 MB.
    pub retention: Retention,
}

/// The replicas over one store in PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterSettings {
    /// The name of this replica, by the rule of [`is_orchestrator_id`]. Default: the name of the host.
    pub replica: Option<String>,
    /// Where other replicas reach the gRPC server of this one: an `http` or `https` endpoint. Default: none, and they
    /// can't.
    pub advertise: Option<Endpoint>,
    /// How long a leader is waited for that has stopped to renew its lease. Default 10 s; the same for all replicas.
    ///
    /// 1 s to 5 min: a lease is renewed at each quarter of it, within which a commit has to return, also on a busy
    /// machine; and no cycle runs for as long when the leader is gone.
    pub lease_ttl: Duration,
    /// The identities of the certificates of the replicas: at most [`ClusterSettings::MAX_PEERS`]. Default: none, and
    /// no replica takes the word of another one for who calls.
    pub peers: BTreeSet<Identity>,
}

impl ClusterSettings {
    /// Most identities of replicas, which is many more than replicas that are useful.
    pub const MAX_PEERS: usize = 100;
}

/// Whether calls that change nothing have audit events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditReads {
    /// They are summed up, and each sum has one.
    Summary,
    /// They have none, unless they are denied.
    Off,
}

impl AuditReads {
    const WORDS: &[(&str, Self)] = &[("summary", Self::Summary), ("off", Self::Off)];
}

/// The audit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditSettings {
    /// Whether calls that change nothing have events. Default: as sums.
    pub reads: AuditReads,
    /// Default: the newest 1,000,000 events, for 400 days. An event takes about 200 bytes.
    pub retention: EventRule,
}

/// The log of the history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerSettings {
    /// Files of the keys that sign checkpoints, each created if it does not exist. Empty, the default: one beside the
    /// database, or a key that ends with the process. At most 8.
    pub key_files: Vec<PathBuf>,
    /// The name of the log. 1 to 128 printable ASCII characters other than space and `+`. Default: that of the first
    /// key.
    pub origin: Option<String>,
}

impl LedgerSettings {
    /// Most keys: one that is being replaced, and as many as are hardly ever needed.
    const MAX_KEYS: usize = 8;
}

/// Limits of cycles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CycleSettings {
    /// Deadline of a cycle whose request or loop has none. 1 ms to 24 h, default 60 s.
    pub deadline: Duration,
    /// Most concurrent calls of subsystems by all running cycles. 1 to 100,000, default 1,024.
    pub max_concurrent_calls: usize,
    /// Most cycles that wait for another one with a subsystem in common. 0 to 10,000, default 64.
    pub max_queued: usize,
    /// Most bytes of the record of one cycle; details are left out of a larger one. 64 KiB to 64 MiB, default 3 MiB,
    /// below the 4 MiB that gRPC clients accept by default. More than that is allowed up to 1/32 of `memory.max_bytes`,
    /// the room for unread answers on one connection: a larger record could not be answered.
    pub max_record_bytes: usize,
    /// Bytes of the latest outputs of all subsystems together. 1 MiB to 64 GiB, at most `memory.max_bytes`; default
    /// 8/32 of that. A larger one takes memory from everything else.
    pub max_outputs_bytes: Option<usize>,
}

/// Limits of the registry, and what should be in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistrySettings {
    /// Most registered subsystems. 1 to 1,000,000, default 20,000.
    pub max_subsystems: usize,
    /// Most interval loops. 1 to 10,000, default 256.
    pub max_loops: usize,
    /// Subsystems that should be registered. Cycles over all subsystems record each that is not. Default: none.
    pub expected: BTreeSet<Name>,
}

impl RegistrySettings {
    /// Most expected subsystems: as many as a record of 3 MiB has room for.
    pub const MAX_EXPECTED: usize = 20_000;
}

/// How subsystems are dialed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialSettings {
    /// CA certificates (PEM) for `https` endpoints, in addition to those of the system. Default: none.
    pub ca_file: Option<PathBuf>,
    /// The certificate of the service and the intermediate ones, in PEM, for subsystems that ask for one. Default: that
    /// of the gRPC server: see [`Config::dial_tls`].
    pub cert_file: Option<PathBuf>,
    /// Its private key, in PEM.
    pub key_file: Option<PathBuf>,
    /// Hosts that may be dialed: at most [`Allowed::MAX`]. Default: all.
    pub allow: Vec<Allowed>,
    /// True if endpoints without TLS may be on other machines although access is enforced. Default false.
    pub allow_http: bool,
    /// The directory of the sockets that may be dialed, an absolute path. Default: all, and none if access is enforced.
    pub unix_dir: Option<PathBuf>,
    /// Longest time for connecting. 1 ms to 1 h, default 5 s.
    pub connect_timeout: Duration,
}

/// The log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// Directives of [`EnvFilter`], valid. Default `info`.
    pub filter: String,
    /// Default: [`LogFormat::Auto`].
    pub format: LogFormat,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Export of the spans of cycles.
#[derive(Clone, Debug, PartialEq)]
pub struct TracingSettings {
    /// A collector that receives OTLP over gRPC, `http://host:port` or `https://host:port`. Default: none, and no
    /// spans.
    pub otlp_endpoint: Option<String>,
    /// Fraction of cycles that are traced, unless the caller decides. 0 to 1, default 1.
    pub sample_ratio: f64,
}

/// The flags of the configuration.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Overrides {
    /// Configuration file (TOML); without one, defaults apply
    #[arg(long, value_name = "PATH", env = "ORCHESTRATOR_CONFIG")]
    pub config: Option<PathBuf>,
    /// Address to listen on, such as 127.0.0.1:7700 [key: server.listen]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Address of the dashboard and the metrics, such as 127.0.0.1:7780, or off [key: admin.listen]
    #[arg(long, value_name = "ADDRESS")]
    pub admin_listen: Option<String>,
    /// The store: sqlite:PATH, postgres://USER@HOST/DATABASE or memory: [key: store.url]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Log filter, such as info or orchestrator_core=debug [key: log.filter]
    #[arg(long, value_name = "FILTER")]
    pub log_filter: Option<String>,
    /// Log format: text, json, or auto, which is text on a terminal and json elsewhere [key: log.format]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Allow addresses other than loopback, although there are no access rules: anyone who can connect can run, change
    /// and read everything
    #[arg(long)]
    pub insecure_listen_beyond_loopback: bool,
    /// Use TLS and enforce access, with the files that `orchestrator certs` creates in this directory; grants of the
    /// configuration file are added, and --set can change settings [keys: server.tls, dial.ca_file, access,
    /// cluster.peers]
    #[arg(long, value_name = "DIR")]
    pub secure: Option<PathBuf>,
    /// Set any key of the configuration file, such as cycle.deadline=30s; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// The place of a value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A default.
    Default,
    /// In this file, on this line; the whole file is line 0.
    File(Arc<str>, usize),
    /// In this environment variable.
    Environment(Arc<str>),
    /// In this flag.
    Flag(Arc<str>),
}

/// One problem of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The place of the value.
    pub origin: Source,
    /// The key, with the subsystem or loop that it belongs to; empty if the problem concerns no key.
    pub key: String,
    /// The problem and the allowed values.
    pub problem: String,
}

/// The problems of a configuration, in the order of the file, the environment, the flags. One line each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// At most [`ConfigError::MAX_PROBLEMS`].
    pub problems: Vec<Problem>,
    /// Number of further problems, and of values that were not checked any more.
    pub left_out: usize,
}

/// The result of replacing the configuration of a running process.
#[derive(Clone, Debug, PartialEq)]
pub struct Reload {
    /// The configuration that applies now: the new one, except for settings that need a restart.
    pub config: Config,
    /// Keys that have changed and need a restart.
    pub needs_restart: Vec<&'static str>,
    /// Other changes: keys, and subsystems and loops by their names.
    pub changed: Vec<String>,
}

/// One setting of the process, without declared subsystems and loops: see [`settings`].
struct Setting {
    /// Such as `cycle.deadline`.
    key: &'static str,
    on_reload: OnReload,
    of_replicas: OfReplicas,
    /// Sets it in the configuration to the written value, if there is a valid one.
    read: fn(&mut Reader<'_>, &mut Config),
    differs: fn(&Config, &Config) -> bool,
    /// Its value, in a text that is another one for each.
    text: fn(&Config) -> String,
    copy: fn(&Config, &mut Config),
}

/// How a change of a setting applies to a running process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnReload {
    /// The change applies at once.
    Applies,
    /// The process keeps the old value, and logs it.
    NeedsRestart,
}

/// Whether the replicas of one orchestrator should have a setting in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OfReplicas {
    /// They should: it matters to callers, cycles or the history, and that of the leader applies.
    Common,
    /// Each has its own: it is of one process, or of its machine.
    Own,
}

/// Variables that are not settings: for other commands, and for tests.
const OTHER_VARIABLES: [&str; 8] =
    ["ADDRESS", "CA_FILE", "CERT_FILE", "CONFIG", "CREDENTIALS", "KEY_FILE", "OUTPUT", "TIMEOUT"];
/// Prefixes of variables that are not settings. Kubernetes sets the last two in every pod beside a service with the
/// name `orchestrator`.
const OTHER_PREFIXES: [&str; 4] = ["TEST_", "TORTURE_", "SERVICE_", "PORT_"];

impl LogFormat {
    const WORDS: &[(&str, Self)] = &[("auto", Self::Auto), ("text", Self::Text), ("json", Self::Json)];
}

impl Config {
    /// Merges the file, `environment` and the flags. Only variables `ORCHESTRATOR_…` are read; an empty one counts as
    /// unset.
    ///
    /// # Errors
    /// All problems together, up to [`ConfigError::MAX_PROBLEMS`]; a file that is not TOML is not checked any further.
    pub fn load(
        overrides: &Overrides,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let mut table = match &overrides.config {
            Some(path) => read_file(path)?,
            None => Table::new(),
        };
        let variables = read_environment(environment, &mut problems);
        overrides.put_into(&mut table, &mut problems);
        Self::read(table, variables, problems)
    }

    /// Reads the text of a file, without the environment and flags. Errors use `name` for the file.
    ///
    /// # Errors
    /// As in [`Config::load`].
    pub fn from_toml_str(name: &str, text: &str) -> Result<Self, ConfigError> {
        Self::read(parse(name, text)?, BTreeMap::new(), Problems::default())
    }

    /// True if it declares subsystems or loops.
    #[must_use]
    pub fn declares_something(&self) -> bool {
        !self.subsystems.is_empty() || !self.loops.is_empty()
    }

    /// Where subsystems may be dialed.
    #[must_use]
    pub fn reach(&self) -> Reach {
        let DialSettings { allow, allow_http, unix_dir, .. } = &self.dial;
        Reach { mode: self.access.mode, allow: allow.clone(), allow_http: *allow_http, unix_dir: unix_dir.clone() }
    }

    /// Applies `new` to a process that runs with `self`.
    #[must_use]
    pub fn reload(&self, mut new: Self) -> Reload {
        let (mut needs_restart, mut changed) = (Vec::new(), Vec::new());
        for setting in SETTINGS {
            if !(setting.differs)(self, &new) {
                continue;
            }
            match setting.on_reload {
                OnReload::Applies => changed.push(setting.key.to_owned()),
                OnReload::NeedsRestart => {
                    (setting.copy)(self, &mut new);
                    needs_restart.push(setting.key);
                }
            }
        }
        let subsystems = [self, &new].map(|config| {
            let of = |subsystem: &Subsystem| (subsystem.clone(), config.former_names.get(&subsystem.name).cloned());
            config.subsystems.iter().map(of).collect::<Vec<_>>()
        });
        changed.extend(changed_entries("subsystem", &subsystems[0], &subsystems[1], |(it, _)| &it.name));
        changed.extend(changed_entries("loop", &self.loops, &new.loops, |it| &it.name));
        changed.extend(changed_entries("served name", &self.serves, &new.serves, |it| &it.name));
        if self.access.grants != new.access.grants {
            changed.push("access.grants".to_owned());
        }
        Reload { config: new, needs_restart, changed }
    }

    /// What the replicas of one orchestrator should have in common: the key of each setting or list, and a text that is
    /// another one for each value. It may contain secrets of a list.
    pub fn in_common(&self) -> impl Iterator<Item = (&'static str, String)> {
        let of_replicas = |setting: &&Setting| setting.of_replicas == OfReplicas::Common;
        let settings = SETTINGS.iter().filter(of_replicas).map(|setting| (setting.key, (setting.text)(self)));
        let Self { access, subsystems, former_names, loops, serves, .. } = self;
        let lists = [
            ("access.grants", format!("{:?}", access.grants)),
            ("subsystems", format!("{:?} {former_names:?}", by_name(subsystems, |it| &it.name))),
            ("loops", format!("{:?}", by_name(loops, |it| &it.name))),
            ("serves", format!("{:?}", by_name(serves, |it| &it.name))),
        ];
        settings.chain(lists)
    }

    /// What contradicts `cluster.advertise`, so that other replicas don't reach this one there, unless something else
    /// listens there and passes connections on.
    pub fn contradicts_advertise(&self) -> Option<&'static str> {
        let advertise = self.cluster.advertise.as_ref()?;
        let (is_https, has_tls) = (matches!(advertise, Endpoint::Https(_)), self.server_tls().is_some());
        let is_here_only = self.server.listen.ip().to_canonical().is_loopback();
        match () {
            () if is_https && !has_tls => Some("it begins with https://, and server.tls has no certificate"),
            () if !is_https && has_tls => Some("it begins with http://, and server.tls has a certificate"),
            () if is_here_only && !is_loopback(host_of(advertise)) => {
                Some("server.listen is a loopback address, which other machines don't reach")
            }
            () => None,
        }
    }

    /// The limits that a narrower one keeps out of reach in a process with `memory` bytes for data of clients and
    /// subsystems. Reading the configuration refuses these as far as `memory.max_bytes` is known; a process may have
    /// less by default, or keep an earlier limit that needs a restart.
    pub fn out_of_reach(&self, memory: usize) -> impl Iterator<Item = OutOfReach> {
        /// Bytes of an answer that always have room on a connection.
        const ANSWER: usize = 4 * MIB;
        let Self { server, cycle, .. } = self;
        let shares = Shares::of(memory);
        let (request, of_receiving) = match server.max_receiving_bytes {
            Some(receiving) => {
                (receiving / 2, "half of server.max_receiving_bytes, because a request is in memory twice")
            }
            None => {
                (shares.requests.max() / 2, "half of 3/32 of memory.max_bytes, because a request is in memory twice")
            }
        };
        let (receiving, outputs) = (server.max_receiving_bytes, cycle.max_outputs_bytes);
        let (record, of_connection) = (
            (shares.answers.max() / 4).max(ANSWER),
            "1/32 of memory.max_bytes, the memory for answers on one connection",
        );
        [
            ("server.max_receiving_bytes", receiving.unwrap_or_default(), memory, "memory.max_bytes"),
            ("server.max_request_bytes", server.max_request_bytes, request, of_receiving),
            ("cycle.max_outputs_bytes", outputs.unwrap_or_default(), memory, "memory.max_bytes"),
            ("cycle.max_record_bytes", cycle.max_record_bytes, record, of_connection),
        ]
        .into_iter()
        .filter(|(_, value, max, _)| value > max)
        .map(|(key, value, max, of)| OutOfReach { key, value, max, of })
    }

    fn read(table: Table, variables: BTreeMap<String, Node>, mut problems: Problems) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(table, variables, &mut problems);
        let config = Self::from_reader(&mut reader);
        reader.finish();
        problems.into_result(config)
    }

    /// Reads every key. A refused value is replaced by its default for the rest of the pass.
    fn from_reader(read: &mut Reader<'_>) -> Self {
        let mut config = Self::default();
        for setting in SETTINGS {
            (setting.read)(read, &mut config);
        }
        let (has_tls, listen) = (config.server_tls().is_some(), config.server.listen);
        refuse_beyond_loopback(read, &config, has_tls, "server.listen", listen, "run, change and read everything");
        if let Some(listen) = config.admin.listen {
            let has_tls = config.admin_tls().is_some();
            refuse_beyond_loopback(read, &config, has_tls, "admin.listen", listen, "read everything");
        }
        refuse_one_address_twice(read, &config);
        refuse_collector_in_clear(read, &config);
        tls::refuse_incomplete(read, &config);
        refuse_peers_without_certificates(read, &config);
        jwt::refuse_incomplete(read, &config.access.jwt);
        refuse_limits_out_of_reach(read, &config);
        let kind = Kind { of: "grant", list: "access.grants", max: Grant::MAX, limit: "a configuration" };
        config.access.grants = entries(read, kind, grant_spec, Grant::from_spec, |_| "");
        let (max, limit) = (config.registry.max_subsystems, "registry.max_subsystems");
        let kind = Kind { of: "subsystem", list: "subsystems", max, limit };
        let declared = entries(read, kind, declared_spec, DeclaredSpec::validate, |it| &it.subsystem.name);
        for (subsystem, former_names) in declared {
            if !former_names.is_empty() {
                config.former_names.insert(subsystem.name.clone(), former_names);
            }
            config.subsystems.push(subsystem);
        }
        let kind = Kind { of: "loop", list: "loops", max: config.registry.max_loops, limit: "registry.max_loops" };
        config.loops = entries(read, kind, loop_spec, IntervalLoop::from_spec, |it| &it.name);
        let kind = Kind { of: "served name", list: "serves", max: Served::MAX, limit: "a configuration" };
        config.serves = entries(read, kind, served_spec, Served::from_spec, |it| &it.name);
        // Refused entries are left out of the list, so positions in it would be wrong: the order is checked only
        // without problems.
        if read.is_content() {
            refuse_ring(read, &config.subsystems);
            refuse_other_names(read, &config);
            refuse_out_of_reach(read, &config);
        }
        config
    }
}

/// A limit that another one keeps out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfReach {
    /// Its key.
    pub key: &'static str,
    /// Its value, in bytes.
    pub value: usize,
    /// The most bytes that are within reach.
    pub max: usize,
    /// The limit that they come from.
    pub of: &'static str,
}

impl Default for Config {
    /// All defaults, without subsystems and loops.
    fn default() -> Self {
        Self {
            orchestrator_id: "orchestrator".into(),
            server: ServerSettings {
                listen: (Ipv4Addr::LOCALHOST, 7700).into(),
                listen_unix: None,
                unix_mode: 0o600,
                insecure_listen_beyond_loopback: false,
                max_connections: None,
                max_concurrent_streams: 256,
                max_streams: None,
                max_request_bytes: 4 * MIB,
                max_receiving_bytes: None,
                max_watchers: 2000,
                drain_grace: Duration::from_secs(30),
                tls: TlsSettings::default(),
            },
            admin: AdminSettings { listen: Some((Ipv4Addr::LOCALHOST, 7780).into()), tls: TlsSettings::default() },
            access: AccessSettings::default(),
            limits: CallerLimits::default(),
            memory: MemorySettings { max_bytes: None },
            store: StoreSettings { url: StoreUrl::Sqlite("orchestrator.db".into()), retention: default_retention() },
            cluster: ClusterSettings {
                replica: None,
                advertise: None,
                lease_ttl: Duration::from_secs(10),
                peers: BTreeSet::new(),
            },
            audit: AuditSettings { reads: AuditReads::Summary, retention: DEFAULT_AUDIT },
            ledger: LedgerSettings::default(),
            cycle: CycleSettings {
                deadline: Duration::from_mins(1),
                max_concurrent_calls: 1024,
                max_queued: 64,
                max_record_bytes: 3 * MIB,
                max_outputs_bytes: None,
            },
            registry: RegistrySettings { max_subsystems: 20_000, max_loops: 256, expected: BTreeSet::new() },
            dial: DialSettings {
                ca_file: None,
                cert_file: None,
                key_file: None,
                allow: Vec::new(),
                allow_http: false,
                unix_dir: None,
                connect_timeout: Duration::from_secs(5),
            },
            log: LogSettings { filter: "info".into(), format: LogFormat::Auto },
            tracing: TracingSettings { otlp_endpoint: None, sample_ratio: 1.0 },
            subsystems: Vec::new(),
            former_names: BTreeMap::new(),
            loops: Vec::new(),
            serves: Vec::new(),
        }
    }
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "give an IP address and a port, such as 127.0.0.1:7700 or [::1]:7700".to_owned())
}

fn admin_address(text: &str) -> Result<Option<SocketAddr>, String> {
    match text {
        "off" => Ok(None),
        _ => listen_address(text).map(Some).map_err(|example| format!("{example}, or off")),
    }
}

impl Config {
    /// True if other machines may be able to use the service without any right.
    pub fn is_insecure(&self) -> bool {
        self.server.insecure_listen_beyond_loopback && self.access.mode != Mode::Enforce
    }
}

/// An address that other machines can reach needs both TLS and access rules. Without rules, a flag accepts the risk.
fn refuse_beyond_loopback(
    read: &mut Reader<'_>,
    config: &Config,
    has_tls: bool,
    key: &str,
    listen: SocketAddr,
    could: &str,
) {
    let is_insecure = config.server.insecure_listen_beyond_loopback;
    if listen.ip().to_canonical().is_loopback() {
        return;
    }
    match config.access.mode {
        Mode::Enforce if has_tls => {}
        Mode::Enforce => read.refuse(
            key,
            format!(
                "is {listen}, which is not a loopback address, and has no TLS: tokens of callers would be sent in \
                 clear; give server.tls.cert_file and server.tls.key_file, or a loopback address such as \
                 127.0.0.1:7700"
            ),
        ),
        Mode::Off | Mode::DryRun if is_insecure => {}
        Mode::Off | Mode::DryRun => read.refuse(
            key,
            format!(
                "is {listen}, which is not a loopback address, and has no access rules: anyone who can connect could \
                 {could}; give a loopback address such as 127.0.0.1:7700, or TLS and access.mode = \"enforce\", or \
                 accept the risk with --insecure-listen-beyond-loopback"
            ),
        ),
    }
}

/// True if this host is this machine itself.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    address.map_or(host.eq_ignore_ascii_case("localhost"), |address| address.to_canonical().is_loopback())
}

/// Spans have the names of subsystems and the messages of failures: if access is enforced, they leave this machine only
/// encrypted.
fn refuse_collector_in_clear(read: &mut Reader<'_>, config: &Config) {
    let Some(endpoint) = &config.tracing.otlp_endpoint else { return };
    let Some((host, _)) = endpoint.strip_prefix("http://").and_then(|authority| authority.rsplit_once(':')) else {
        return;
    };
    if config.access.mode == Mode::Enforce && !is_loopback(host) {
        let problem =
            format!("is {endpoint}: access.mode = \"enforce\" needs https:// for a collector on another machine");
        read.refuse("tracing.otlp_endpoint", problem);
    }
}

/// Refuses declared subsystems that may not be dialed.
fn refuse_out_of_reach(read: &mut Reader<'_>, config: &Config) {
    let reach = config.reach();
    for (number, subsystem) in config.subsystems.iter().enumerate() {
        if let Err(problem) = reach.check(&subsystem.endpoint) {
            read.refuse(&format!("subsystems[{number}].endpoint"), problem);
        }
    }
}

/// The second listener would fail, and blame another process.
fn refuse_one_address_twice(read: &mut Reader<'_>, config: &Config) {
    let listen = config.server.listen;
    let Some(admin) = config.admin.listen.filter(|admin| admin.port() == listen.port() && admin.port() != 0) else {
        return;
    };
    // 0.0.0.0 takes all addresses of IPv4, and [::] those of both.
    let takes =
        |one: IpAddr, other: IpAddr| one == other || (one.is_unspecified() && (one.is_ipv6() || other.is_ipv4()));
    if takes(listen.ip(), admin.ip()) || takes(admin.ip(), listen.ip()) {
        let problem =
            format!("is {admin}, and server.listen is {listen}; give each a port of its own, or set it to off");
        read.refuse("admin.listen", problem);
    }
}

/// A limit that is written must fit within the limit above it: otherwise nothing of that size is ever accepted, and no
/// later attempt helps. Defaults give way instead.
fn refuse_limits_out_of_reach(read: &mut Reader<'_>, config: &Config) {
    let memory = config.memory.max_bytes.unwrap_or(MemorySettings::DEFAULT_MAX_BYTES);
    for OutOfReach { key, value, max, of } in config.out_of_reach(memory) {
        if read.is_written(key) {
            read.refuse(key, format!("is {value}; give at most {max}, {of}, or raise that limit"));
        }
    }
}

/// Parses the id of an orchestrator, or the name of a replica.
///
/// # Errors
/// What to give instead.
pub(crate) fn orchestrator_id(text: &str) -> Result<String, String> {
    if is_orchestrator_id(text) {
        Ok(text.to_owned())
    } else {
        Err("give 1 to 128 letters, digits and signs, without spaces".into())
    }
}

/// The identities of replicas: a list of texts.
fn peers(read: &mut Reader<'_>, key: &str) -> BTreeSet<Identity> {
    let mut peers = BTreeSet::new();
    let texts = read.texts(key);
    if texts.len() > ClusterSettings::MAX_PEERS {
        read.refuse(key, format!("has {} entries; give at most {}", texts.len(), ClusterSettings::MAX_PEERS));
        return peers;
    }
    for (number, text) in texts.iter().enumerate() {
        match Identity::parse(text) {
            Ok(peer @ Identity::Certificate(_)) => {
                peers.insert(peer);
            }
            _ => read.refuse(
                &format!("{key}[{number}]"),
                format!("is {text:?}; give cert:NAME, with the URI or the DNS name in the certificate of a replica"),
            ),
        }
    }
    peers
}

/// Replicas identify each other by certificates, so each has to ask the others for theirs.
fn refuse_peers_without_certificates(read: &mut Reader<'_>, config: &Config) {
    const PEERS: &str = "cluster.peers";
    if read.is_written(PEERS) && !config.cluster.peers.is_empty() && config.server.tls.client_ca_file.is_none() {
        read.refuse(PEERS, "needs server.tls.client_ca_file, the authorities that sign the certificates of replicas");
    }
}

/// The address of a replica for the others.
fn advertised(text: &str) -> Result<Endpoint, String> {
    match Endpoint::parse(text) {
        Ok(endpoint) if host_of(&endpoint).parse().is_ok_and(|address: IpAddr| address.is_unspecified()) => {
            Err(format!("is {text}, which is no address of a machine; give the one by which other machines reach it"))
        }
        Ok(endpoint @ (Endpoint::Http(_) | Endpoint::Https(_))) => Ok(endpoint),
        Ok(Endpoint::Unix(_)) | Err(_) => Err("give http://host:port or https://host:port of server.listen, as other \
                                               machines reach it"
            .into()),
    }
}

/// The name or the IP address of the host of an `http` or `https` endpoint, without brackets.
fn host_of(endpoint: &Endpoint) -> &str {
    let (Endpoint::Http(uri) | Endpoint::Https(uri) | Endpoint::Unix(uri)) = endpoint;
    let authority = uri.split_once("://").map_or(uri.as_str(), |(_, authority)| authority);
    authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']'])
}

fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("give the path of a file, or leave it out".into()) } else { Ok(text.into()) }
}

fn directory(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') { Ok(text.into()) } else { Err("give the absolute path of a directory".into()) }
}

/// The hosts that may be dialed: a list of texts.
fn allowed(read: &mut Reader<'_>, key: &str) -> Vec<Allowed> {
    let texts = read.texts(key);
    if texts.len() > Allowed::MAX {
        read.refuse(key, format!("has {} entries; give at most {}", texts.len(), Allowed::MAX));
        return Vec::new();
    }
    let mut all = Vec::with_capacity(texts.len());
    for (number, text) in texts.iter().enumerate() {
        match Allowed::parse(text) {
            Ok(allowed) => all.push(allowed),
            Err(problem) => read.refuse(&format!("{key}[{number}]"), problem),
        }
    }
    all
}

/// Names of subsystems.
fn expected(read: &mut Reader<'_>, key: &str) -> BTreeSet<Name> {
    let (texts, max) = (read.texts(key), RegistrySettings::MAX_EXPECTED);
    if texts.len() > max {
        read.refuse(key, format!("has {} entries; give at most {max}", texts.len()));
        return BTreeSet::new();
    }
    let mut names = BTreeSet::new();
    for (number, text) in texts.iter().enumerate() {
        match Name::parse(text) {
            Ok(name) => _ = names.insert(name),
            Err(problem) => read.refuse(&format!("{key}[{number}]"), problem.to_string()),
        }
    }
    names
}

/// The path of a socket. <https://man7.org/linux/man-pages/man7/unix.7.html>
fn socket_path(text: &str) -> Result<PathBuf, String> {
    const MAX_LEN: usize = 107;
    if (1..=MAX_LEN).contains(&text.len()) && !text.contains('\0') && !text.starts_with("unix:") {
        Ok(text.into())
    } else {
        Err(format!("give the path of a socket, such as /run/orchestrator.sock, at most {MAX_LEN} bytes"))
    }
}

/// The mode of a file, in octal digits.
fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| text.len() <= 4 && *mode <= 0o777);
    mode.ok_or_else(|| "give a mode in octal digits, such as \"0600\" or \"0660\"".to_owned())
}

fn log_filter(text: &str) -> Result<String, String> {
    const EXAMPLE: &str = "give a level (off, error, warn, info, debug, trace), or several such as \
                           info,orchestrator_core=debug";
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    if text.trim().is_empty() {
        return Err(EXAMPLE.into());
    }
    // The parser treats a word that is not a level as the name of a module, so that a misspelt level would disable the
    // log.
    let is_slip = |part: &&str| {
        let word = part.trim();
        let is_level = part.len() == word.len() && LEVELS.contains(&word.to_lowercase().as_str());
        word.chars().all(|c| c.is_ascii_alphabetic()) && !is_level
    };
    if let Some(word) = text.split(',').find(is_slip) {
        return Err(format!("{word:?} is not a level; {EXAMPLE}"));
    }
    EnvFilter::builder().parse(text).map(|_| text.to_owned()).map_err(|error| format!("{error}; {EXAMPLE}"))
}

fn collector(text: &str) -> Result<String, String> {
    match Endpoint::parse(text) {
        Ok(Endpoint::Http(uri) | Endpoint::Https(uri)) => Ok(uri),
        Ok(Endpoint::Unix(_)) | Err(_) => {
            Err("give http://host:port or https://host:port of a collector for OTLP over gRPC, usually port 4317"
                .into())
        }
    }
}

/// The entries of a list, by name.
fn by_name<T>(entries: &[T], name: fn(&T) -> &Name) -> BTreeMap<&Name, &T> {
    entries.iter().map(|entry| (name(entry), entry)).collect()
}

/// The added, removed and changed entries of a list, by name.
fn changed_entries<'a, T: PartialEq>(
    kind: &str,
    old: &'a [T],
    new: &'a [T],
    name: fn(&T) -> &Name,
) -> impl Iterator<Item = String> {
    let (old, new) = (by_name(old, name), by_name(new, name));
    let names: BTreeSet<_> = old.keys().chain(new.keys()).copied().collect();
    names.into_iter().filter_map(move |name| {
        let what = match (old.get(name), new.get(name)) {
            (Some(old), Some(new)) if old == new => return None,
            (Some(_), Some(_)) => "changed",
            (None, _) => "added",
            (_, None) => "removed",
        };
        Some(format!("{kind} {name} {what}"))
    })
}

fn default_retention() -> Retention {
    let default = RetentionRule { max_cycles: Some(100_000), max_age: None };
    Retention { default, ..Retention::default() }
}

/// A year and a month, so that a yearly review finds all events.
const DEFAULT_AUDIT: EventRule =
    EventRule { max_events: Some(1_000_000), max_age: Some(Duration::from_hours(400 * 24)) };

fn audit_retention(read: &mut Reader<'_>, key: &str) -> EventRule {
    let max_events = read.number(&format!("{key}.max_events"), 1..=i64::MAX.unsigned_abs());
    let max_age = read.duration(&format!("{key}.max_age"), Duration::from_secs(1)..=DAY * 36_600);
    EventRule { max_events: max_events.or(DEFAULT_AUDIT.max_events), max_age: max_age.or(DEFAULT_AUDIT.max_age) }
}

fn key_files(read: &mut Reader<'_>, key: &str) -> Vec<PathBuf> {
    let files = read.texts(key);
    if files.len() > LedgerSettings::MAX_KEYS || files.iter().any(String::is_empty) {
        read.refuse(key, format!("give at most {} paths, none of which is empty", LedgerSettings::MAX_KEYS));
    }
    files.into_iter().map(PathBuf::from).collect()
}

fn origin(text: &str) -> Result<String, String> {
    let fits = (1..=128).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic() && c != '+');
    if fits { Ok(text.to_owned()) } else { Err("give 1 to 128 letters, digits and signs, without spaces and +".into()) }
}

fn retention(read: &mut Reader<'_>, key: &str) -> Retention {
    let mut rule = |prefix: &str| RetentionRule {
        max_cycles: read.number(&format!("{prefix}.max_cycles"), 1..=i64::MAX.unsigned_abs()),
        max_age: read.duration(&format!("{prefix}.max_age"), Duration::from_secs(1)..=DAY * 36_600),
    };
    let mut default = rule(key);
    default.max_cycles = default.max_cycles.or(default_retention().default.max_cycles);
    let by_state = CycleState::ALL
        .into_iter()
        .map(|state| (state, rule(&format!("{key}.{}", state.key()))))
        .filter(|(_, rule)| *rule != RetentionRule::default())
        .collect();
    Retention { default, by_state, ..Retention::default() }
}

/// Refuses circular dependencies between declared subsystems. Subsystems that were registered by RPC are not known
/// here.
fn refuse_ring(read: &mut Reader<'_>, subsystems: &[Subsystem]) {
    /// Most places that are named: a ring can be as long as the list.
    const LOCATED: usize = 8;
    let members = subsystems.iter().map(|it| Member::new(Arc::new(it.clone()), false, Arc::default()));
    let Err(ring) = Plan::compile(members) else { return };
    let key = |name: &Name| {
        let number = subsystems.iter().position(|it| it.name == *name).unwrap_or_default();
        format!("subsystems[{number}]")
    };
    let located = ring.names().take(LOCATED).filter_map(|name| Some(format!("{name} at {}", read.origin(&key(name))?)));
    let located = located.collect::<Vec<_>>().join(", ");
    let first = ring.names().next().map(key).unwrap_or_default();
    read.refuse(&first, format!("can't be ordered: {ring} ({located})"));
}

/// Refuses former names that are also names of declared subsystems, or former names of others.
fn refuse_other_names(read: &mut Reader<'_>, config: &Config) {
    let declared: HashSet<_> = config.subsystems.iter().map(|subsystem| &subsystem.name).collect();
    let mut owners: HashMap<&Name, &Name> = HashMap::new();
    for (number, subsystem) in config.subsystems.iter().enumerate() {
        let former_names = config.former_names.get(&subsystem.name);
        for former in former_names.into_iter().flat_map(|names| &**names) {
            let key = format!("subsystems[{number}].former_names");
            if declared.contains(former) {
                read.refuse(&key, format!("contains {former}, which is declared; remove one of them"));
            } else if let Some(other) = owners.insert(former, &subsystem.name) {
                read.refuse(&key, format!("contains {former}, a former name of {other} as well; remove one of them"));
            }
        }
    }
}

/// The kind of entries of a list.
#[derive(Clone, Copy)]
struct Kind {
    /// The name of one entry.
    of: &'static str,
    /// The key of the list.
    list: &'static str,
    max: usize,
    /// The source of the limit `max`.
    limit: &'static str,
}

/// Reads a list of tables: each is first read as it is written, then checked. A list over its limit is not examined.
fn entries<S, T>(
    read: &mut Reader<'_>,
    Kind { of, list, max, limit }: Kind,
    spec: fn(&mut Reader<'_>) -> S,
    validate: fn(&S) -> Result<T, Violations>,
    name: fn(&S) -> &str,
) -> Vec<T> {
    let mut all = Vec::new();
    let mut first: HashMap<String, Source> = HashMap::new();
    let declared = read.list(list);
    let length = declared.len();
    if length > max {
        read.refuse(list, format!("are {length}; {limit} allows {max}"));
        return all;
    }
    for (number, node) in declared.into_iter().enumerate() {
        if read.gives_up(length - number) {
            break;
        }
        let origin = node.origin.clone();
        let mut entry = read.entry(of, list, number, node);
        let spec = spec(&mut entry);
        match validate(&spec) {
            Ok(valid) => all.push(valid),
            Err(violations) => entry.refuse_all(violations),
        }
        match first.get(name(&spec)) {
            _ if name(&spec).is_empty() => {}
            Some(first) => entry.refuse("name", format!("is declared twice, first at {first}; rename or remove one")),
            None => drop(first.insert(name(&spec).to_owned(), origin)),
        }
        entry.finish();
    }
    all
}

/// A declared subsystem before validation.
struct DeclaredSpec {
    subsystem: SubsystemSpec,
    former_names: Vec<String>,
}

impl DeclaredSpec {
    fn validate(&self) -> Result<(Subsystem, Arc<[Name]>), Violations> {
        const MAX: usize = Subsystem::MAX_FORMER_NAMES;
        let mut bad = Violations::default();
        if self.former_names.len() > MAX {
            bad.add("former_names", format!("are {}; the limit is {MAX}", self.former_names.len()));
        }
        let former_names = bad.names("former_names", &self.former_names);
        match Subsystem::from_spec(&self.subsystem) {
            Ok(subsystem) => bad.into_result((subsystem, former_names.into())),
            Err(mut violations) => {
                violations.extend(bad);
                Err(violations)
            }
        }
    }
}

fn declared_spec(read: &mut Reader<'_>) -> DeclaredSpec {
    DeclaredSpec { former_names: read.texts("former_names"), subsystem: subsystem_spec(read) }
}

fn subsystem_spec(read: &mut Reader<'_>) -> SubsystemSpec {
    SubsystemSpec {
        name: read.text("name").unwrap_or_default(),
        endpoint: read.text("endpoint").unwrap_or_default(),
        phase: read.number("phase", Subsystem::PHASES),
        requires: read.texts("requires"),
        after: read.texts("after"),
        reads: read.texts("reads"),
        timeout: read.signed_duration("timeout", Subsystem::TIMEOUTS),
        retry: RetrySpec {
            max_attempts: read.number("retry.max_attempts", 0..=u32::MAX),
            initial_backoff: read.signed_duration("retry.initial_backoff", RetryPolicy::BACKOFFS),
            max_backoff: read.signed_duration("retry.max_backoff", RetryPolicy::BACKOFFS),
            backoff_multiplier: read.float("retry.backoff_multiplier"),
            retryable_status_codes: read.texts("retry.retryable_status_codes"),
        },
        breaker: BreakerSpec {
            failure_threshold: read.number("breaker.failure_threshold", 0..=u32::MAX),
            open_for: read.signed_duration("breaker.open_for", BreakerPolicy::OPEN_FOR),
            disabled: read.flag("breaker.disabled").unwrap_or_default(),
        },
        critical: read.flag("critical").unwrap_or_default(),
        parameters: read.payload("parameters"),
        limits: LimitsSpec {
            max_message_bytes: read.number("limits.max_message_bytes", 0..=u32::MAX),
            max_output_bytes: read.number("limits.max_output_bytes", 0..=u32::MAX),
            max_metrics: read.number("limits.max_metrics", 0..=u32::MAX),
            max_issues: read.number("limits.max_issues", 0..=u32::MAX),
        },
        record_output: read.flag("record_output").unwrap_or_default(),
        tls: TlsSpec { peer: read.text("tls.peer").filter(|peer| !peer.is_empty()) },
    }
}

/// The revoked identities and credentials: a list of texts.
fn revoked(read: &mut Reader<'_>, key: &str) -> Revoked {
    let mut revoked = Revoked::default();
    let texts = read.texts(key);
    if texts.len() > Revoked::MAX {
        read.refuse(key, format!("has {} entries; give at most {}", texts.len(), Revoked::MAX));
        return revoked;
    }
    for (number, text) in texts.iter().enumerate() {
        if let Err(problem) = revoked.add(text) {
            read.refuse(&format!("{key}[{number}]"), problem);
        }
    }
    revoked
}

fn grant_spec(read: &mut Reader<'_>) -> GrantSpec {
    GrantSpec {
        who: read.texts("who"),
        role: read.choice("role", &Role::ALL.map(|role| (role.word(), role))),
        subsystems: read.texts("subsystems"),
        loops: read.texts("loops"),
        reads: read.texts("reads"),
        phases: read.numbers("phases", Subsystem::PHASES),
        endpoints: read.texts("endpoints"),
        max_timeout: read.signed_duration("max_timeout", Subsystem::TIMEOUTS),
    }
}

fn loop_spec(read: &mut Reader<'_>) -> LoopSpec {
    const OVERLAP_POLICIES: [(&str, OverlapPolicy); 4] = [
        ("skip", OverlapPolicy::Skip),
        ("buffer_one", OverlapPolicy::BufferOne),
        ("buffer_all", OverlapPolicy::BufferAll),
        ("cancel_other", OverlapPolicy::CancelOther),
    ];
    LoopSpec {
        name: read.text("name").unwrap_or_default(),
        interval: read.signed_duration("interval", IntervalLoop::INTERVALS),
        offset: read.signed_duration("offset", IntervalLoop::SHIFTS),
        jitter: read.signed_duration("jitter", IntervalLoop::SHIFTS),
        overlap_policy: read.choice("overlap_policy", &OVERLAP_POLICIES),
        catch_up: read.choice("catch_up", &[("none", CatchUp::None), ("one", CatchUp::One)]),
        catch_up_window: read.signed_duration("catch_up_window", IntervalLoop::SHIFTS),
        subsystems: read.texts("subsystems"),
        parameters: read.payload("parameters"),
        deadline: read.signed_duration("deadline", IntervalLoop::DEADLINES),
        record_outputs: read.flag("record_outputs").unwrap_or_default(),
    }
}

fn served_spec(read: &mut Reader<'_>) -> ServedSpec {
    ServedSpec {
        name: read.text("name").unwrap_or_default(),
        subsystems: read.texts("subsystems"),
        parameters: read.payload("parameters"),
    }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let name = path.display().to_string();
    parse(&name, &file_text(&name, file::read(path))?)
}

/// The text of a file that was read.
fn file_text(name: &str, read: Result<Vec<u8>, FileError>) -> Result<String, ConfigError> {
    let problem = match read.map(String::from_utf8) {
        Ok(Ok(text)) => return Ok(text),
        Ok(Err(_)) => "is not UTF-8".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(ConfigError::of(Problem::new(Source::File(name.into(), 0), "", problem)))
}

fn read_environment(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    problems: &mut Problems,
) -> BTreeMap<String, Node> {
    let mut variables = BTreeMap::new();
    for (name, value) in environment {
        let Ok(name) = name.into_string() else { continue };
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        // Also set by Kubernetes.
        let is_link = rest == "PORT" && value.to_string_lossy().contains("://");
        if is_link || OTHER_VARIABLES.contains(&rest) || OTHER_PREFIXES.iter().any(|it| rest.starts_with(it)) {
            continue;
        }
        if value.is_empty() {
            continue;
        }
        let origin = Source::Environment(name.as_str().into());
        match value.into_string() {
            Ok(value) => drop(variables.insert(name, Node::from_word(&value, origin))),
            Err(_) => problems.push(Problem::new(origin, "", "is not UTF-8")),
        }
    }
    variables
}

impl Overrides {
    fn put_into(&self, table: &mut Table, problems: &mut Problems) {
        let mut set = |flag: String, key: &str, value: &str| {
            let origin = Source::Flag(flag.into());
            if let Err(problem) = put(table, key, Node::from_word(value, origin.clone())) {
                problems.push(Problem::new(origin, key, problem));
            }
        };
        if let Some(dir) = &self.secure {
            let flag = || format!("--secure {}", dir.display());
            set(flag(), "access.mode", "enforce");
            for (key, path) in secure::settings(dir) {
                set(flag(), key, &path.to_string_lossy());
            }
        }
        for setting in &self.set {
            match setting.split_once('=') {
                Some((key, value)) => set(format!("--set {}", key.trim()), key.trim(), value.trim()),
                None => set(format!("--set {setting}"), "", ""),
            }
        }
        let insecure = self.insecure_listen_beyond_loopback.then(|| "true".to_owned());
        for (flag, key, value) in [
            ("--listen", "server.listen", &self.listen),
            ("--admin-listen", "admin.listen", &self.admin_listen),
            ("--store", "store.url", &self.store),
            ("--log-filter", "log.filter", &self.log_filter),
            ("--log-format", "log.format", &self.log_format),
            ("--insecure-listen-beyond-loopback", "server.insecure_listen_beyond_loopback", &insecure),
        ] {
            if let Some(value) = value {
                set(flag.to_owned(), key, value);
            }
        }
        if let Some(dir) = &self.secure
            && let Err(problem) = secure::add_grants(table, dir)
        {
            problems.push(Problem::new(Source::Flag("--secure".into()), "", problem));
        }
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(name, 0) => f.write_str(name),
            Self::File(name, line) => write!(f, "{name}:{line}"),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

impl Problem {
    fn new(origin: Source, key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { origin, key: key.into(), problem: problem.into() }
    }
}

impl Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Longer than any key with its name.
        const SHOWN: usize = 200;
        let Self { origin, key, problem } = self;
        let cut = key.char_indices().nth(SHOWN).map(|(at, _)| format!("{}…", &key[..at]));
        let key = cut.as_ref().unwrap_or(key);
        let space = if key.is_empty() { "" } else { " " };
        // Keys and values can contain any characters.
        f.write_str(&clean(&format!("{origin}: {key}{space}{problem}")))
    }
}

impl ConfigError {
    /// Most problems that are reported: a generated file can have one in each line.
    pub const MAX_PROBLEMS: usize = 100;

    /// Reading the configuration ended because of a defect.
    pub(crate) fn unread(defect: &dyn Display) -> Self {
        Self::of(Problem::new(Source::Default, "", format!("the configuration can't be read: {defect}")))
    }

    fn of(problem: Problem) -> Self {
        Self { problems: vec![problem], left_out: 0 }
    }
}

impl Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            let line_end = if i == 0 { "" } else { "\n" };
            write!(f, "{line_end}{problem}")?;
        }
        match self.left_out {
            0 => Ok(()),
            left_out => write!(f, "\nand possibly {left_out} more: at most {} are reported", Self::MAX_PROBLEMS),
        }
    }
}

#[cfg(test)]
mod tests;
