//! Subsystems: validated registrations, and the inputs and answers of subsystems.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    ops::RangeInclusive,
    time::Duration,
};

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

use super::{Code, CycleId, Identity, Malformed, Name, Payload, Violations, name::with_present_names};

const MS: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);

/// A registration before validation: from the configuration file, a request, or the store. Fields that are not set take
/// the defaults that [`Subsystem`] documents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "each field is that of `Subsystem`, before validation")]
pub struct SubsystemSpec {
    pub name: String,
    pub endpoint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<i32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<SignedDuration>,
    pub retry: RetrySpec,
    pub breaker: BreakerSpec,
    pub critical: bool,
    #[serde(skip_serializing_if = "Payload::is_empty")]
    pub parameters: Payload,
    pub limits: LimitsSpec,
    pub record_output: bool,
    #[serde(skip_serializing_if = "TlsSpec::is_empty")]
    pub tls: TlsSpec,
}

/// A [`RetryPolicy`] before validation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "each field is that of `RetryPolicy`, before validation")]
pub struct RetrySpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_backoff: Option<SignedDuration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_backoff: Option<SignedDuration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff_multiplier: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub retryable_status_codes: Vec<String>,
}

/// A [`BreakerPolicy`] before validation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "each field is that of `BreakerPolicy`, before validation")]
pub struct BreakerSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_threshold: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_for: Option<SignedDuration>,
    pub disabled: bool,
}

/// [`Limits`] before validation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "each field is that of `Limits`, before validation")]
pub struct LimitsSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_message_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_output_bytes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_metrics: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_issues: Option<u32>,
}

/// The TLS of a subsystem before validation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsSpec {
    /// That of [`Subsystem::peer`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

impl TlsSpec {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A registration: the identity, order and policies of a subsystem.
#[derive(Clone, Debug, PartialEq)]
pub struct Subsystem {
    /// Unique name.
    pub name: Name,
    /// Where it is dialed.
    pub endpoint: Endpoint,
    /// Every subsystem in a lower phase ends before any in a higher phase starts. ±1,000,000, default 0.
    pub phase: i32,
    /// Runs after these, unless one of them fails or is missing, with their fresh output.
    pub requires: Vec<Name>,
    /// Runs after these, even if they fail.
    pub after: Vec<Name>,
    /// Gets their latest output, without an order.
    pub reads: Vec<Name>,
    /// Deadline of its part in a cycle, initialization and all attempts together. 1 ms to 24 h, default 10 s.
    pub timeout: Duration,
    /// How its calls are retried.
    pub retry: RetryPolicy,
    /// The circuit breaker; `None` means that it is disabled.
    pub breaker: Option<BreakerPolicy>,
    /// True if a cycle in which it fails is FAILED.
    pub critical: bool,
    /// Sent to it in every call, [canonical](Payload::canonical). At most [`Subsystem::MAX_PARAMETERS`] bytes.
    pub parameters: Payload,
    /// Limits on its answers.
    pub limits: Limits,
    /// True if the record of every cycle contains its output.
    pub record_output: bool,
    /// The server that must answer at its endpoint: the owner of a certificate for `https`, a user for `unix`. Default
    /// `None`: as the dialer decides.
    pub peer: Option<Identity>,
}

impl Subsystem {
    /// Most bytes of parameters.
    pub const MAX_PARAMETERS: usize = 64 << 10;
    /// The range of phases.
    pub const PHASES: RangeInclusive<i32> = -1_000_000..=1_000_000;
    /// Its timeout unless the registration has one.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
    /// What its timeout may be.
    pub const TIMEOUTS: RangeInclusive<Duration> = MS..=DAY;
    /// Most names in `requires`, `after` and `reads` together: each is an input of every call.
    pub const MAX_INPUTS: usize = 1024;
    /// Most former names that a registration keeps. Each is one more name that no other subsystem can have, and by
    /// which the history is searched; a subsystem is renamed a few times in years.
    pub const MAX_FORMER_NAMES: usize = 16;
    /// Most bytes of inputs in one call. More than gRPC servers accept by default (4 MiB).
    pub const MAX_INPUT_BYTES: usize = 64 << 20;

    /// Validates a registration.
    ///
    /// # Errors
    /// All invalid fields together.
    pub fn from_spec(spec: &SubsystemSpec) -> Result<Self, Violations> {
        let mut bad = Violations::default();
        let name = bad.name("name", &spec.name);
        let endpoint = Endpoint::parse(&spec.endpoint).unwrap_or_else(|error| {
            bad.add("endpoint", error);
            Endpoint::Unix(String::new())
        });
        let peer = peer(&mut bad, spec, &endpoint);
        let requires = bad.names("requires", &spec.requires);
        let after = bad.names("after", &spec.after);
        let reads = bad.names("reads", &spec.reads);
        let inputs = requires.len() + after.len() + reads.len();
        if inputs > Self::MAX_INPUTS {
            bad.add("reads", format!("makes {inputs} inputs; the limit is {}", Self::MAX_INPUTS));
        }
        for (field, names) in [("requires", &spec.requires), ("after", &spec.after)] {
            if names.contains(&spec.name) {
                bad.add(field, format!("contains {name} itself: it can't run after itself"));
            }
        }
        let subsystem = Self {
            endpoint,
            phase: bad.number("phase", spec.phase, 0, Self::PHASES),
            timeout: bad.duration("timeout", spec.timeout, Self::DEFAULT_TIMEOUT, Self::TIMEOUTS),
            retry: RetryPolicy::from_spec(&spec.retry, &mut bad),
            breaker: BreakerPolicy::from_spec(&spec.breaker, &mut bad),
            critical: spec.critical,
            parameters: bad.payload("parameters", &spec.parameters, Self::MAX_PARAMETERS),
            limits: Limits::from_spec(&spec.limits, &mut bad),
            record_output: spec.record_output,
            peer,
            name,
            requires,
            after,
            reads,
        };
        bad.into_result(subsystem)
    }

    /// The registration with every default filled in, as it is shown and stored.
    #[must_use]
    pub fn to_spec(&self) -> SubsystemSpec {
        let names = |names: &[Name]| names.iter().map(ToString::to_string).collect();
        let breaker = self.breaker.unwrap_or_default();
        SubsystemSpec {
            name: self.name.to_string(),
            endpoint: self.endpoint.to_string(),
            phase: Some(self.phase),
            requires: names(&self.requires),
            after: names(&self.after),
            reads: names(&self.reads),
            timeout: signed(self.timeout),
            retry: RetrySpec {
                max_attempts: Some(self.retry.max_attempts),
                initial_backoff: signed(self.retry.initial_backoff),
                max_backoff: signed(self.retry.max_backoff),
                backoff_multiplier: Some(self.retry.backoff_multiplier),
                retryable_status_codes: self.retry.retryable.iter().map(ToString::to_string).collect(),
            },
            breaker: BreakerSpec {
                failure_threshold: Some(breaker.failure_threshold),
                open_for: signed(breaker.open_for),
                disabled: self.breaker.is_none(),
            },
            critical: self.critical,
            parameters: self.parameters.clone(),
            limits: LimitsSpec {
                max_message_bytes: Some(self.limits.max_message_bytes),
                max_output_bytes: Some(self.limits.max_output_bytes),
                max_metrics: Some(self.limits.max_metrics),
                max_issues: Some(self.limits.max_issues),
            },
            record_output: self.record_output,
            tls: TlsSpec { peer: self.peer.as_ref().map(ToString::to_string) },
        }
    }

    /// Most bytes of the registration in memory, with its entries in the order and in plans.
    #[must_use]
    pub fn footprint(&self) -> usize {
        /// Fixed cost of a subsystem, and of a name in a list.
        const ALONE: usize = 1 << 10;
        const NAMED: usize = 128;
        let named = [&self.requires, &self.after, &self.reads].into_iter().flatten();
        let names = named.map(|name| name.as_str().len() + NAMED).sum::<usize>();
        let peer = self.peer.as_ref().map_or(0, |peer| peer.to_string().len());
        ALONE + self.parameters.len() + self.endpoint.to_string().len() + names + peer
    }

    /// The registration that names other subsystems by their present names.
    #[must_use]
    pub fn by_present_names(self, present: impl Fn(&Name) -> Option<Name>) -> Self {
        self.with_present_names(present).unwrap_or(self)
    }

    /// The same; `None` if it names none by a former one.
    #[must_use]
    pub fn with_present_names(&self, present: impl Fn(&Name) -> Option<Name>) -> Option<Self> {
        let lists = [&self.requires, &self.after, &self.reads];
        let [requires, after, reads] = lists.map(|names| with_present_names(names, &present));
        if requires.is_none() && after.is_none() && reads.is_none() {
            return None;
        }
        let unchanged = self.clone();
        Some(Self {
            requires: requires.unwrap_or(unchanged.requires),
            after: after.unwrap_or(unchanged.after),
            reads: reads.unwrap_or(unchanged.reads),
            ..unchanged
        })
    }

    /// The names of its inputs, each once: `requires`, `after`, `reads`.
    pub fn input_names(&self) -> impl Iterator<Item = &Name> {
        let mut seen = HashSet::new();
        [&self.requires, &self.after, &self.reads].into_iter().flatten().filter(move |name| seen.insert(*name))
    }
}

/// The server that must answer at an endpoint, if the registration says so.
fn peer(bad: &mut Violations, spec: &SubsystemSpec, endpoint: &Endpoint) -> Option<Identity> {
    let text = spec.tls.peer.as_deref()?;
    let peer = Identity::parse(text).ok();
    let needed = match (endpoint, &peer) {
        (Endpoint::Https(_), Some(Identity::Certificate(_))) | (Endpoint::Unix(_), Some(Identity::Uid(_))) => {
            return peer;
        }
        (Endpoint::Http(_), _) => "the endpoint needs https:// or unix:, since others can't prove their identity",
        (Endpoint::Https(_), _) => "for https://, give cert:URI or cert:DNS-NAME, a name in the server's certificate",
        (Endpoint::Unix(_), _) => "for unix:, give uid:NUMBER, the user of the server",
    };
    bad.add("tls.peer", format!("is {text:?}; {needed}"));
    None
}

/// For validated durations, which are far from the limits of the signed type.
fn signed(duration: Duration) -> Option<SignedDuration> {
    SignedDuration::try_from(duration).ok()
}

/// Where a subsystem is dialed. Subsystems with equal endpoints share one connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// `http://host:port`: HTTP/2 without TLS. Contains the whole URI.
    Http(String),
    /// `https://host:port`: with TLS. Contains the whole URI.
    Https(String),
    /// `unix:/path`: a Unix domain socket. Contains the path.
    Unix(String),
}

impl Endpoint {
    const MAX_LEN: usize = 1024;

    /// Parses one of these forms.
    ///
    /// # Errors
    /// The problem, and valid values.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is missing; give http://host:port, https://host:port or unix:/path".into());
        }
        if text.len() > Self::MAX_LEN {
            return Err(format!("is {} bytes long; the limit is {} bytes", text.len(), Self::MAX_LEN));
        }
        let wrong = || format!("is {text:?}; give http://host:port, https://host:port or unix:/path");
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            let fits = path.starts_with('/') && path.len() < 108 && !path.contains(char::is_control);
            return if fits {
                Ok(Self::Unix(path.to_owned()))
            } else {
                Err(format!(
                    "is {text:?}; the path of a unix: endpoint is absolute, shorter than 108 bytes and without \
                     control characters"
                ))
            };
        }
        let (tls, authority) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(wrong()),
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = authority.rsplit_once(':').ok_or_else(wrong)?;
        // In canonical form: no sign, no leading zeros.
        let port_is_good = port.parse::<u16>().is_ok_and(|number| number != 0 && number.to_string() == port);
        let host_is_good = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
            Some(address) => address.is_some_and(|a| a.parse::<std::net::Ipv6Addr>().is_ok()),
            None => {
                !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            }
        };
        if !port_is_good || !host_is_good {
            return Err(wrong());
        }
        let (scheme, kind): (_, fn(String) -> Self) = if tls { ("https", Self::Https) } else { ("http", Self::Http) };
        Ok(kind(format!("{scheme}://{authority}")))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(uri) | Self::Https(uri) => f.write_str(uri),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// How calls are retried, in the terms of gRFC A6
/// (<https://github.com/grpc/proposal/blob/master/A6-client-retries.md>).
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Most calls, including the first one. 1 to 10, default 3.
    pub max_attempts: u32,
    /// 1 ms to 1 h, default 100 ms.
    pub initial_backoff: Duration,
    /// `initial_backoff` to 1 h, default 1 s.
    pub max_backoff: Duration,
    /// 1 to 100, default 2.
    pub backoff_multiplier: f64,
    /// Default: UNAVAILABLE.
    pub retryable: Vec<Code>,
}

impl RetryPolicy {
    /// What backoffs may be.
    pub const BACKOFFS: RangeInclusive<Duration> = MS..=HOUR;

    fn from_spec(spec: &RetrySpec, bad: &mut Violations) -> Self {
        let initial_backoff =
            bad.duration("retry.initial_backoff", spec.initial_backoff, Duration::from_millis(100), Self::BACKOFFS);
        let default_max = Duration::from_secs(1).max(initial_backoff);
        let mut retryable = Vec::new();
        for (i, name) in spec.retryable_status_codes.iter().enumerate() {
            match Code::from_name(name) {
                None | Some(Code::Ok | Code::Cancelled) => bad.add(
                    format!("retry.retryable_status_codes[{i}]"),
                    format!("is {name:?}; give the name of a gRPC status code other than OK and CANCELLED"),
                ),
                Some(code) => retryable.push(code),
            }
        }
        if spec.retryable_status_codes.is_empty() {
            retryable.push(Code::Unavailable);
        }
        Self {
            max_attempts: bad.number("retry.max_attempts", spec.max_attempts, 3, 1..=10),
            initial_backoff,
            max_backoff: bad.duration(
                "retry.max_backoff",
                spec.max_backoff,
                default_max,
                initial_backoff..=*Self::BACKOFFS.end(),
            ),
            backoff_multiplier: bad.number("retry.backoff_multiplier", spec.backoff_multiplier, 2.0, 1.0..=100.0),
            retryable,
        }
    }

    /// How long the `retry`-th retry (1, 2, 3 …) waits. `random` in 0..1 makes the ±20 % of gRFC A6.
    #[must_use]
    pub fn backoff(&self, retry: u32, random: f64) -> Duration {
        let exponent = i32::try_from(retry.saturating_sub(1)).unwrap_or(i32::MAX);
        let grown = self.initial_backoff.as_secs_f64() * self.backoff_multiplier.powi(exponent);
        let capped = grown.min(self.max_backoff.as_secs_f64());
        Duration::from_secs_f64(capped * (0.8 + 0.4 * random))
    }
}

/// When the circuit breaker holds back calls of a failing subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// Number of consecutive failed or timed out cycles that opens the breaker. 1 to 1,000, default 5.
    pub failure_threshold: u32,
    /// How long the breaker stays open before one probe call. 1 ms to 24 h, default 30 s.
    pub open_for: Duration,
}

impl Default for BreakerPolicy {
    fn default() -> Self {
        Self { failure_threshold: 5, open_for: Duration::from_secs(30) }
    }
}

impl BreakerPolicy {
    /// What `open_for` may be.
    pub const OPEN_FOR: RangeInclusive<Duration> = MS..=DAY;

    fn from_spec(spec: &BreakerSpec, bad: &mut Violations) -> Option<Self> {
        let default = Self::default();
        let policy = Self {
            failure_threshold: bad.number(
                "breaker.failure_threshold",
                spec.failure_threshold,
                default.failure_threshold,
                1..=1000,
            ),
            open_for: bad.duration("breaker.open_for", spec.open_for, default.open_for, Self::OPEN_FOR),
        };
        (!spec.disabled).then_some(policy)
    }
}

/// Limits on one answer of a subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of the whole message. Up to 64 MiB, default 4 MiB.
    pub max_message_bytes: u32,
    /// Most bytes of the output. Up to 64 MiB, default 1 MiB.
    pub max_output_bytes: u32,
    /// Most metrics. Up to 4,096, default 64.
    pub max_metrics: u32,
    /// Most issues. Up to 1,024, default 32.
    pub max_issues: u32,
}

impl Limits {
    /// The defaults.
    pub const DEFAULT: Self =
        Self { max_message_bytes: 4 << 20, max_output_bytes: 1 << 20, max_metrics: 64, max_issues: 32 };
    /// Most bytes of an issue's code and of a metric's name.
    pub const MAX_WORD: usize = 128;
    /// Most bytes of an issue's message.
    pub const MAX_ISSUE_MESSAGE: usize = 4 << 10;

    fn from_spec(spec: &LimitsSpec, bad: &mut Violations) -> Self {
        const MAX_BYTES: u32 = 64 << 20;
        let Self { max_message_bytes: message, max_output_bytes: output, max_metrics, max_issues } = Self::DEFAULT;
        Self {
            max_message_bytes: bad.number("limits.max_message_bytes", spec.max_message_bytes, message, 1..=MAX_BYTES),
            max_output_bytes: bad.number("limits.max_output_bytes", spec.max_output_bytes, output, 0..=MAX_BYTES),
            max_metrics: bad.number("limits.max_metrics", spec.max_metrics, max_metrics, 0..=4096),
            max_issues: bad.number("limits.max_issues", spec.max_issues, max_issues, 0..=1024),
        }
    }

    /// Checks an answer against these limits.
    ///
    /// # Errors
    /// The first limit that is exceeded, for people.
    pub fn check(&self, answer: &Answer) -> Result<(), Malformed> {
        let over = |what: &str, found: usize, allowed: usize| {
            if found > allowed { Err(Malformed(format!("{what}: {found}, allowed are {allowed}"))) } else { Ok(()) }
        };
        over("bytes of output", answer.output.len(), self.max_output_bytes as usize)?;
        over("metrics", answer.metrics.len(), self.max_metrics as usize)?;
        over("issues", answer.issues.len(), self.max_issues as usize)?;
        for name in answer.metrics.keys() {
            over("bytes in the name of a metric", name.len(), Self::MAX_WORD)?;
            if name.is_empty() {
                return Err(Malformed("a metric has no name".into()));
            }
        }
        for issue in &answer.issues {
            over("bytes in the code of an issue", issue.code.len(), Self::MAX_WORD)?;
            over("bytes in the message of an issue", issue.message.len(), Self::MAX_ISSUE_MESSAGE)?;
        }
        Ok(())
    }
}

/// Whether an input is current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Made in this cycle.
    Fresh,
    /// Made in another cycle.
    Stale,
}

/// An output, and the cycle that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The cycle that made it.
    pub cycle_id: CycleId,
    /// The output.
    pub payload: Payload,
}

/// One input of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// The subsystem that makes it.
    pub name: Name,
    /// Its latest output and freshness; `None` means ABSENT.
    pub output: Option<(Output, Freshness)>,
}

/// The answer of a subsystem in a cycle.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The output for other subsystems.
    pub output: Payload,
    /// Numbers to follow over time.
    pub metrics: BTreeMap<String, f64>,
    /// Its issues, which did not fail it.
    pub issues: Vec<Issue>,
}

/// A problem or information that does not fail a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issue {
    /// Its severity.
    pub severity: Severity,
    /// A short constant.
    pub code: String,
    /// What happened.
    pub message: String,
}

/// The severity of an [`Issue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words say it; the contract defines them")]
pub enum Severity {
    Info,
    Warning,
    Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, endpoint: &str) -> SubsystemSpec {
        SubsystemSpec { name: name.into(), endpoint: endpoint.into(), ..SubsystemSpec::default() }
    }

    #[test]
    fn endpoints() {
        for (given, shown) in [
            ("http://127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("http://host.example:1/", "http://host.example:1"),
            ("https://[::1]:443", "https://[::1]:443"),
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
        ] {
            assert_eq!(Endpoint::parse(given).unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "localhost:1",
            "http://",
            "http://h",
            "http://h:0",
            "http://h:99999",
            "http://h:+80",
            "http://h:080",
            "http://h:1/path",
            "ftp://h:1",
            "unix:relative",
            "unix:/new\nline",
            "unix:/\u{1b}[31m",
            "http://[::1:5",
            "http://user@h:1",
        ] {
            assert!(Endpoint::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_bad_field_is_named_at_once() {
        let bad = SubsystemSpec {
            after: vec!["ok".into(), "not ok".into()],
            timeout: Some(SignedDuration::ZERO),
            retry: RetrySpec {
                max_attempts: Some(0),
                retryable_status_codes: vec!["OK".into()],
                ..RetrySpec::default()
            },
            limits: LimitsSpec { max_issues: Some(9999), ..LimitsSpec::default() },
            ..spec("9", "nowhere")
        };
        let Violations(found) = Subsystem::from_spec(&bad).unwrap_err();
        let fields: Vec<_> = found.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "name",
                "endpoint",
                "after[1]",
                "timeout",
                "retry.retryable_status_codes[0]",
                "retry.max_attempts",
                "limits.max_issues"
            ]
        );
    }

    #[test]
    fn a_registration_returns_its_spec() {
        let subsystem = Subsystem::from_spec(&spec("A", "http://h:1")).unwrap();
        assert_eq!(Subsystem::from_spec(&subsystem.to_spec()).unwrap(), subsystem);
        let json = serde_json::to_string(&subsystem.to_spec()).unwrap();
        assert_eq!(serde_json::from_str::<SubsystemSpec>(&json).unwrap(), subsystem.to_spec());
    }

    #[test]
    fn every_field_of_a_registration_is_shown() {
        let full = SubsystemSpec {
            phase: Some(-3),
            requires: vec!["r".into()],
            after: vec!["a".into()],
            reads: vec!["i".into()],
            timeout: Some(SignedDuration::from_secs(7)),
            retry: RetrySpec {
                max_attempts: Some(4),
                initial_backoff: Some(SignedDuration::from_millis(150)),
                max_backoff: Some(SignedDuration::from_secs(9)),
                backoff_multiplier: Some(1.5),
                retryable_status_codes: vec!["ABORTED".into()],
            },
            breaker: BreakerSpec {
                failure_threshold: Some(8),
                open_for: Some(SignedDuration::from_secs(6)),
                disabled: false,
            },
            critical: true,
            parameters: Payload::from_json(serde_json::json!({ "p": 1 }).as_object().unwrap()).unwrap(),
            limits: LimitsSpec {
                max_message_bytes: Some(1),
                max_output_bytes: Some(2),
                max_metrics: Some(3),
                max_issues: Some(4),
            },
            record_output: true,
            tls: TlsSpec { peer: Some("cert:spiffe://fleet/a".into()) },
            ..spec("A", "https://h:1")
        };
        assert_eq!(Subsystem::from_spec(&full).unwrap().to_spec(), full);
    }

    #[test]
    fn all_lists_of_names_count_as_inputs() {
        let of = |requires: usize, after: usize, reads: usize| {
            let names = |list: char, count: usize| (0..count).map(|i| format!("{list}{i}")).collect();
            Subsystem::from_spec(&SubsystemSpec {
                requires: names('r', requires),
                after: names('a', after),
                reads: names('i', reads),
                ..spec("A", "http://h:1")
            })
        };
        assert!(of(400, 400, 224).is_ok());
        assert!(of(400, 2, 600).is_ok());
        for reads in [225, 226] {
            assert_eq!(of(400, 400, reads).unwrap_err().0[0].field, "reads");
        }
    }

    #[test]
    fn parameters_have_a_limit() {
        let of = |bytes: usize| {
            let json = serde_json::json!({ "p": "x".repeat(bytes) });
            let parameters = Payload::from_json(json.as_object().unwrap()).unwrap();
            (parameters.len(), Subsystem::from_spec(&SubsystemSpec { parameters, ..spec("A", "http://h:1") }))
        };
        let around = of(60_000).0 - 60_000;
        for (bytes, fits) in [(0, true), (1, false), (2, false)] {
            let (len, read) = of(Subsystem::MAX_PARAMETERS - around + bytes);
            assert_eq!(len, Subsystem::MAX_PARAMETERS + bytes);
            assert_eq!(read.is_ok(), fits);
            assert!(read.is_err() || read.unwrap().parameters.len() == len);
        }
    }

    #[test]
    fn the_server_that_must_answer_has_an_identity_that_the_endpoint_can_prove() {
        let of = |endpoint: &str, peer: &str| {
            let tls = TlsSpec { peer: Some(peer.into()) };
            Subsystem::from_spec(&SubsystemSpec { tls, ..spec("A", endpoint) }).map_err(|bad| bad.0[0].field.clone())
        };
        for (endpoint, peer) in
            [("https://h:1", "cert:spiffe://fleet/a"), ("https://h:1", "cert:a.example"), ("unix:/a", "uid:0")]
        {
            assert_eq!(of(endpoint, peer).unwrap().peer.unwrap().to_string(), peer);
        }
        for (endpoint, peer) in [
            ("http://h:1", "cert:a"),
            ("https://h:1", "uid:0"),
            ("https://h:1", "spiffe://fleet/a"),
            ("https://h:1", "token:a"),
            ("https://h:1", ""),
            ("unix:/a", "cert:a"),
        ] {
            assert_eq!(of(endpoint, peer), Err("tls.peer".to_owned()), "{endpoint} {peer}");
        }
    }

    #[test]
    fn an_endpoint_has_a_limit() {
        let http = |bytes: usize| format!("http://{}:1", "h".repeat(bytes - 9));
        let unix = |bytes: usize| format!("unix:/{}", "p".repeat(bytes - 1));
        assert!(Endpoint::parse(&http(1024)).is_ok() && Endpoint::parse(&unix(107)).is_ok());
        for bad in [http(1025), http(1026), unix(108), unix(109)] {
            assert!(Endpoint::parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_answer_may_reach_its_limits_and_not_exceed_them() {
        let limits = Limits { max_message_bytes: 1 << 20, max_output_bytes: 12, max_metrics: 2, max_issues: 2 };
        let issue = |code: usize, message: usize| Issue {
            severity: Severity::Info,
            code: "c".repeat(code),
            message: "m".repeat(message),
        };
        let full = Answer {
            output: Payload::from_json(serde_json::json!({ "x": "123" }).as_object().unwrap()).unwrap(),
            metrics: BTreeMap::from([("a".repeat(Limits::MAX_WORD), 1.0), ("b".into(), 2.0)]),
            issues: vec![issue(Limits::MAX_WORD, Limits::MAX_ISSUE_MESSAGE), issue(1, 0)],
        };
        assert_eq!(full.output.len(), 12);
        assert_eq!(limits.check(&full), Ok(()));
        let more_metrics = |names: &[&str]| {
            let others = names.iter().map(|name| ((*name).to_owned(), 0.0));
            Answer { metrics: full.metrics.clone().into_iter().chain(others).collect(), ..full.clone() }
        };
        let word = "w".repeat(Limits::MAX_WORD + 1);
        for (over, limits) in [
            (full.clone(), Limits { max_output_bytes: 11, ..limits }),
            (full.clone(), Limits { max_output_bytes: 10, ..limits }),
            (more_metrics(&["c"]), limits),
            (more_metrics(&["c", "d"]), limits),
            (Answer { issues: vec![issue(1, 1); 3], ..full.clone() }, limits),
            (Answer { issues: vec![issue(Limits::MAX_WORD + 1, 0)], ..full.clone() }, limits),
            (Answer { issues: vec![issue(1, Limits::MAX_ISSUE_MESSAGE + 1)], ..full.clone() }, limits),
            (Answer { metrics: BTreeMap::from([(word, 0.0)]), ..full.clone() }, limits),
            (Answer { metrics: BTreeMap::from([(String::new(), 0.0)]), ..full.clone() }, limits),
        ] {
            assert!(limits.check(&over).is_err(), "{over:?}");
        }
    }

    #[test]
    fn backoff_grows_to_its_cap() {
        let policy = Subsystem::from_spec(&spec("A", "http://h:1")).unwrap().retry;
        let steps: Vec<_> = (1..=5).map(|retry| policy.backoff(retry, 0.5).as_millis()).collect();
        assert_eq!(steps, [100, 200, 400, 800, 1000]);
        assert_eq!(policy.backoff(1, 0.0).as_millis(), 80);
    }
}
