//! The connection to a running service: its address, timeouts, and messages for its errors.

use std::{
    error::Error as _,
    fmt::{self, Write as _},
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::pin,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use jiff::SignedDuration;
use tonic::{
    Code, Status,
    codegen::http::Uri,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::{ErrorInfo, StatusExt};
use tower::{Service, service_fn};

use super::{
    Exit, Failure, HOST,
    credentials::{Bearer, Credentials},
    known::Unknown,
    output::{Format, clean, short},
};
use crate::{
    access::{Reach, Revoked},
    config::secure::{AUTHORITY, CERTIFICATE, KEY, service_of},
    dial::{self, authorities, tls_in_words},
    file::{self, FileError},
    model::{self, Identity},
    pem::Pem,
    proto::orchestrator::v1::{
        access_client::AccessClient, ledger_client::LedgerClient, orchestrator_client::OrchestratorClient,
    },
    transport::{Sockets, Stream},
};

/// A connection over TLS, as the client library takes it.
type Connected = TokioIo<Box<dyn Stream>>;

/// A connection whose calls have the credential of the caller.
type Identified = InterceptedService<Channel, Bearer>;

/// The generated client.
pub(super) type Client = OrchestratorClient<Identified>;

/// The generated client of the log.
pub(super) type Ledger = LedgerClient<Identified>;

/// Checks over the connection of a [`Client`] whether the service still responds.
pub(super) type Health = HealthClient<Channel>;

/// Most bytes of an answer: a bit more than the largest record that a service can be configured for.
const MAX_ANSWER: usize = 80 << 20;
/// Longest wait for an answer that the service gives at once.
const QUICK: Duration = Duration::from_secs(10);
/// Longest time for connecting.
const CONNECT: Duration = Duration::from_secs(5);
/// Silence after which the health service is asked. TCP and HTTP/2 don't help: a stopped process keeps its connections,
/// and a proxy answers pings itself.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest wait for the answer of the health service.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// How a remote command reaches the service and prints its answers, in the common formats or in formats of its own.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Connection and output")]
pub(super) struct Remote<F: clap::Args = Format> {
    /// Where the service listens: HOST, HOST:PORT, a URL that begins with http:// or https://, or unix:PATH
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "ORCHESTRATOR_ADDRESS",
        default_value = "http://127.0.0.1:7700",
        global = true
    )]
    pub(super) address: Address,
    /// Longest wait for the service, such as 500ms, 10s or 2m. By default, most commands wait 10s for their answer; run
    /// and cancel wait without a limit while the service responds. For watch and top, it limits connecting and the
    /// health check of a silent service
    #[arg(long, value_name = "DURATION", env = "ORCHESTRATOR_TIMEOUT", value_parser = timeout, global = true)]
    pub(super) timeout: Option<Duration>,
    #[command(flatten)]
    tls: Tls,
    #[command(flatten)]
    credentials: Credentials,
    #[command(flatten)]
    pub(super) format: F,
}

/// TLS for an address with `https://`.
#[derive(Clone, Debug, Default, clap::Args)]
struct Tls {
    /// With https://, trust only the authorities in this file (PEM). By default, those of the system
    #[arg(long, value_name = "PATH", env = "ORCHESTRATOR_CA_FILE", global = true)]
    ca_file: Option<PathBuf>,
    /// With https://, show this certificate to the service (PEM, with its intermediate certificates)
    #[arg(long, value_name = "PATH", env = "ORCHESTRATOR_CERT_FILE", global = true)]
    cert_file: Option<PathBuf>,
    /// The private key of --cert-file (PEM)
    #[arg(long, value_name = "PATH", env = "ORCHESTRATOR_KEY_FILE", global = true)]
    key_file: Option<PathBuf>,
    /// With https://, the identity in the certificate of the service, such as cert:spiffe://fleet/core, whatever its
    /// host. By default, that of the service in the fleet that an authority in --ca-file names, as `orchestrator certs`
    /// makes it; without such an authority, the certificate must be for the host of the address
    #[arg(
        long,
        value_name = "IDENTITY",
        env = "ORCHESTRATOR_SERVER_IDENTITY",
        value_parser = identity_of_certificate,
        global = true
    )]
    server_identity: Option<Identity>,
}

impl Tls {
    /// Reads the files. Also returns the identity that the service must have, if its host does not identify it.
    ///
    /// # Errors
    /// A file can't be read, or can't be used; or only one of a certificate and its key is given. Reads well by itself.
    fn read(&self, credentials: &Credentials) -> Result<(dial::Tls, Option<Identity>), String> {
        let Self { ca_file, cert_file, key_file, server_identity } = self.or(credentials.directory());
        let trusted = ca_file.as_deref().map(|path| pem("--ca-file", path, file::read)).transpose()?;
        let own = match (&cert_file, &key_file) {
            (Some(cert_file), Some(key_file)) => {
                let certificate = pem("--cert-file", cert_file, file::read)?;
                Some((certificate, pem("--key-file", key_file, file::read_secret)?))
            }
            (None, None) => None,
            (Some(_), None) => return Err("--cert-file needs --key-file, its private key".to_owned()),
            (None, Some(_)) => return Err("--key-file needs --cert-file, its certificate".to_owned()),
        };
        let of_fleet = || authorities(&trusted.as_ref()?.bytes).ok()?.iter().find_map(service_of);
        let expected = server_identity.or_else(of_fleet);
        let material = dial::Material { without_system: trusted.is_some(), authorities: trusted, own };
        Ok((dial::Tls::new(dial::Loaded::of(material, HOST.clock)?), expected))
    }

    /// Connects over TLS to the server that must answer.
    ///
    /// # Errors
    /// The files of TLS can't be used.
    fn connector(
        &self,
        credentials: &Credentials,
        to: &Uri,
        timeout: Duration,
    ) -> Result<impl Service<Uri, Response = Connected, Error = io::Error, Future: Send> + use<>, Failure> {
        let (tls, expected) = self.read(credentials).map_err(|why| Failure::new(Exit::Usage, clean(&why)))?;
        let (transport, tls) = (Arc::new(Sockets::default()), Arc::new(tls));
        let (host, port) = (to.host().unwrap_or_default(), to.port_u16().unwrap_or(443));
        let endpoint = model::Endpoint::Https(format!("https://{host}:{port}"));
        Ok(service_fn(move |_| {
            let (transport, tls, endpoint, expected) =
                (transport.clone(), tls.clone(), endpoint.clone(), expected.clone());
            async move {
                let expected = (expected.as_slice(), &Revoked::default());
                let connected = dial::connect(transport, &endpoint, (tls, Reach::default()), expected, timeout).await;
                connected.map(TokioIo::new).map_err(io::Error::other)
            }
        }))
    }

    /// With the files of a directory, where none are given.
    fn or(&self, directory: Option<&Path>) -> Self {
        let Some(directory) = directory else { return self.clone() };
        let file = |given: &Option<PathBuf>, name: &str| given.clone().or_else(|| Some(directory.join(name)));
        let has_certificate = self.cert_file.is_some() || self.key_file.is_some();
        Self {
            ca_file: file(&self.ca_file, AUTHORITY),
            cert_file: if has_certificate { self.cert_file.clone() } else { file(&None, CERTIFICATE) },
            key_file: if has_certificate { self.key_file.clone() } else { file(&None, KEY) },
            server_identity: self.server_identity.clone(),
        }
    }

    /// The flags that another command needs for the same connection.
    fn flags(&self) -> String {
        let files = [("--ca-file", &self.ca_file), ("--cert-file", &self.cert_file), ("--key-file", &self.key_file)];
        let files = files.into_iter().filter_map(|(flag, path)| Some(format!(" {flag} {}", path.as_ref()?.display())));
        files.chain(self.server_identity.iter().map(|identity| format!(" --server-identity {identity}"))).collect()
    }
}

fn pem(flag: &str, path: &Path, read: fn(&Path) -> Result<Vec<u8>, FileError>) -> Result<Pem, String> {
    let name = format!("{flag} {}", path.display());
    match read(path) {
        Ok(bytes) => Ok(Pem { name, path: path.to_owned(), bytes }),
        Err(error) => Err(format!("{name} {error}")),
    }
}

/// Reads the identity of a certificate.
///
/// # Errors
/// It is another one, or invalid.
fn identity_of_certificate(text: &str) -> Result<Identity, String> {
    match Identity::parse(text) {
        Ok(identity @ Identity::Certificate(_)) => Ok(identity),
        _ => Err("give cert:NAME, with the URI or the DNS name in the certificate".to_owned()),
    }
}

/// Where a service listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address(String);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const DEFAULT_PORT: u16 = 7700;
        const FORMS: &str = "give HOST, HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:PATH";
        let text = text.trim();
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() { Err(FORMS.to_owned()) } else { Ok(Self(format!("unix:{path}"))) };
        }
        let (scheme, place) = match text.split_once("://") {
            Some((scheme @ ("http" | "https"), place)) => (Some(scheme), place.to_owned()),
            Some((scheme, _)) => return Err(format!("{scheme:?} is not a supported scheme; {FORMS}")),
            None if text.starts_with(':') => (None, format!("127.0.0.1{text}")),
            None => (None, text.to_owned()),
        };
        let place = place.strip_suffix('/').unwrap_or(&place);
        let authority: tonic::codegen::http::uri::Authority =
            place.parse().map_err(|error| format!("{error}; {FORMS}"))?;
        // The text after the host is a port, if it can be one.
        let is_bare = authority.as_str() == authority.host();
        if authority.host().is_empty() || (authority.port().is_none() && !is_bare) {
            return Err(FORMS.to_owned());
        }
        Ok(Self(match (scheme, authority.port()) {
            // A URL without a port uses the port of its scheme.
            (Some(scheme), _) => format!("{scheme}://{authority}"),
            (None, Some(_)) => format!("http://{authority}"),
            (None, None) => format!("http://{authority}:{DEFAULT_PORT}"),
        }))
    }
}

/// Reads a timeout.
///
/// # Errors
/// The text is invalid; the message says which form is valid.
pub(super) fn timeout(text: &str) -> Result<Duration, String> {
    let duration: Option<SignedDuration> = text.parse().ok();
    let duration = duration.and_then(|duration| Duration::try_from(duration).ok()).filter(|it| !it.is_zero());
    duration.ok_or_else(|| "give a duration above zero with its unit, such as 500ms, 10s or 2m".to_owned())
}

impl Remote {
    /// Reaches the service at this address, and shows tables.
    pub(super) fn at(address: std::net::SocketAddr) -> Self {
        Self {
            address: Address(format!("http://{address}")),
            timeout: None,
            credentials: Credentials::default(),
            tls: Tls::default(),
            format: Format::default(),
        }
    }
}

impl<F: clap::Args> Remote<F> {
    /// Connects.
    ///
    /// # Errors
    /// The service can't be reached.
    pub(super) async fn connect(&self) -> Result<Client, Failure> {
        self.connect_for_long().await.map(|(client, _)| client)
    }

    /// Connects, for calls without a time limit.
    ///
    /// # Errors
    /// The service can't be reached.
    pub(super) async fn connect_for_long(&self) -> Result<(Client, Health), Failure> {
        let (channel, bearer) = self.channel().await?;
        let client =
            OrchestratorClient::with_interceptor(channel.clone(), bearer).max_decoding_message_size(MAX_ANSWER);
        Ok((client, Health::new(channel)))
    }

    /// Connects to the service that shows callers their identity.
    ///
    /// # Errors
    /// The service can't be reached.
    pub(super) async fn connect_to_access(&self) -> Result<AccessClient<Identified>, Failure> {
        let (channel, bearer) = self.channel().await?;
        Ok(AccessClient::with_interceptor(channel, bearer))
    }

    /// Connects to the service that has the log of the history.
    ///
    /// # Errors
    /// The service can't be reached.
    pub(super) async fn connect_to_ledger(&self) -> Result<(Ledger, Health), Failure> {
        let (channel, bearer) = self.channel().await?;
        let client = LedgerClient::with_interceptor(channel.clone(), bearer).max_decoding_message_size(MAX_ANSWER);
        Ok((client, Health::new(channel)))
    }

    async fn channel(&self) -> Result<(Channel, Bearer), Failure> {
        let bearer = self.credentials.read(&self.address.0)?;
        let unreachable = |error: &dyn std::error::Error| self.unreachable(&innermost(error));
        let connect = self.timeout.map_or(CONNECT, |timeout| timeout.min(CONNECT));
        let endpoint = |url: String| Endpoint::from_shared(url).map_err(|error| unreachable(&error));
        // The limit covers slow name lookups as well.
        let connected = if let Some(authority) = self.address.0.strip_prefix("https://") {
            let to = Uri::from_str(&self.address.0).map_err(|error| unreachable(&error))?;
            let connector = self.tls.connector(&self.credentials, &to, connect)?;
            // The library refuses https:// without its own TLS, which can't verify an identity.
            let endpoint = endpoint(format!("http://{authority}"))?.origin(to);
            tokio::time::timeout(connect, endpoint.connect_with_connector(connector)).await
        } else {
            if let Some(identity) = &self.tls.server_identity {
                let problem = "can't be verified without TLS; give an address with https://";
                return Err(Failure::new(Exit::Usage, format!("--server-identity {identity} {problem}")));
            }
            let endpoint = endpoint(self.address.0.clone())?.connect_timeout(connect).tcp_nodelay(true);
            tokio::time::timeout(connect, endpoint.connect()).await
        };
        match connected {
            Ok(Ok(channel)) => Ok((channel, bearer)),
            Ok(Err(error)) => Err(unreachable(&error)),
            Err(_) => Err(self.unreachable(&format!("no connection within {}", short(connect)))),
        }
    }

    /// Makes one call that is answered without delay.
    ///
    /// # Errors
    /// The service can't be reached, is late, or refuses.
    pub(super) async fn quickly<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
        self.within(self.timeout.unwrap_or(QUICK), call).await
    }

    /// Makes one call without a time limit, unless the user gave one.
    ///
    /// # Errors
    /// The service can't be reached, is late or no longer there, or refuses.
    pub(super) async fn patiently<T>(
        &self,
        health: &Health,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        match self.timeout {
            Some(limit) => self.within(limit, call).await,
            None => self.while_there(health, call).await?.map_err(|status| self.failure(&status)),
        }
    }

    async fn within<T>(&self, limit: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => answer.map_err(|status| self.failure(&status)),
            Err(_) => Err(self.late(limit)),
        }
    }

    /// Awaits work without a time limit, as long as the service responds.
    ///
    /// # Errors
    /// The service does not respond.
    pub(super) async fn while_there<T>(&self, health: &Health, awaited: impl Future<Output = T>) -> Result<T, Failure> {
        let mut awaited = pin!(awaited);
        loop {
            if let Ok(came) = tokio::time::timeout(SILENCE, &mut awaited).await {
                return Ok(came);
            }
            tokio::select! {
                biased;
                came = &mut awaited => return Ok(came),
                there = self.is_there(health.clone()) => there?,
            }
        }
    }

    /// Any answer, even an error, shows that the service responds.
    async fn is_there(&self, mut health: Health) -> Result<(), Failure> {
        let limit = self.timeout.map_or(SIGN_OF_LIFE, |timeout| timeout.min(SIGN_OF_LIFE));
        match tokio::time::timeout(limit, health.check(HealthCheckRequest::default())).await {
            Ok(Err(status)) if is_connection_lost(&status) => Err(self.failure(&status)),
            Ok(_) => Ok(()),
            Err(_) => Err(self.silent(&format!("has not responded for {}", short(SILENCE + limit)))),
        }
    }

    /// The service has not answered in time.
    pub(super) fn late(&self, limit: Duration) -> Failure {
        self.silent(&format!("did not answer within {}", short(limit)))
    }

    fn silent(&self, how: &str) -> Failure {
        let Address(address) = &self.address;
        Failure::new(Exit::Unreachable, format!("the service at {address} {how}; wait longer with --timeout"))
    }

    fn unreachable(&self, why: &str) -> Failure {
        let Address(address) = &self.address;
        let mut why = tls_in_words(clean(why));
        if let Some(remedy) = tls_remedy(&why) {
            return Failure::new(Exit::Unreachable, format!("can't reach the service at {address}: {why}\n{remedy}"));
        }
        // Errors of the HTTP/2 library when the peer closes the connection at some moment, or answers in another
        // protocol, as TLS does.
        let not_http2 = [
            "broken pipe",
            "connection closed",
            "connection reset",
            "connection was not ready",
            "http2 error",
            "frame with invalid size",
        ];
        if not_http2.iter().any(|said| why.contains(said)) {
            let remedy = "The dashboard has its own address. Give that of the service (127.0.0.1:7700 by default) with \
                          --address or ORCHESTRATOR_ADDRESS, with https:// if it has TLS.";
            why = format!("the server at this address does not speak gRPC ({why})\n{remedy}");
            if address.starts_with("https://") {
                why +=
                    "\nIt may also have refused this client: see whether it needs another certificate in --cert-file.";
            }
        } else {
            why += "\nStart it with `orchestrator serve`, or give its address with --address or ORCHESTRATOR_ADDRESS.";
        }
        Failure::new(Exit::Unreachable, format!("can't reach the service at {address}: {why}"))
    }

    /// The message for a status.
    pub(super) fn failure(&self, status: &Status) -> Failure {
        if is_connection_lost(status) {
            let why = status.source().map_or_else(|| status.message().to_owned(), innermost);
            return self.unreachable(&why);
        }
        let details = status.get_error_details();
        let mut message = String::from("the service refused: ");
        let violations = details.bad_request().map(|bad| &bad.field_violations[..]).unwrap_or_default();
        let in_commands = details.error_info().and_then(|info| self.in_commands(info));
        if let Some((what, _)) = &in_commands {
            message.push_str(what);
        } else if violations.is_empty() {
            message.push_str(&clean(status.message()));
        } else {
            message.push_str("these fields are invalid");
            for violation in violations {
                let _ = write!(message, "\n  {} {}", clean(&violation.field), clean(&violation.description));
            }
        }
        let code = crate::model::Code::from_number(status.code().into()).name();
        match details.error_info() {
            Some(info) => _ = write!(message, "\n({code}, {})", clean(&info.reason)),
            None => _ = write!(message, "\n({code})"),
        }
        if let Some((_, what_to_do)) = in_commands {
            message.push_str(&what_to_do);
        } else if status.code() == Code::Unimplemented {
            message.push_str("\nThe service is a different version, or another server listens at this address.");
        }
        let unknown = details.error_info().and_then(unknown);
        // As if this program had found the bad value.
        let exit = if status.code() == Code::InvalidArgument { Exit::Usage } else { Exit::Refused };
        let is_denied = status.code() == Code::PermissionDenied;
        Failure { unknown, is_denied, ..Failure::new(exit, message) }
    }

    /// The problem and its remedy in terms of commands, for reasons whose message from the service names RPCs.
    fn in_commands(&self, info: &ErrorInfo) -> Option<(String, String)> {
        if let Some(unknown) = unknown(info) {
            // The remedy depends on the names that exist.
            return Some((unknown.message(), String::new()));
        }
        let metadata = |key: &str| info.metadata.get(key).map(|value| clean(value));
        let flag = self.flag();
        let cycle = || metadata("cycle_id");
        Some(match info.reason.as_str() {
            "CYCLE_FINISHED" => {
                let id = cycle()?;
                let what = format!("cycle {id} has already finished");
                (what, format!("\nTo see its result: orchestrator cycles show {id}{flag}"))
            }
            "CYCLE_NOT_FINISHED" => {
                let what = format!("cycle {} is still waiting or running", cycle()?);
                (what, format!("\nTo wait for its record: orchestrator watch{flag}"))
            }
            "CYCLE_NOT_FOUND" => {
                let what = format!(
                    "the history has no cycle {}: the id was never given, or the record is no longer retained",
                    cycle()?
                );
                (what, format!("\nTo list the history: orchestrator cycles list{flag}"))
            }
            "ETAG_MISMATCH" => {
                let name = metadata("subsystem")?;
                let what = format!("the registration of {name} was changed since its etag was read");
                (what, format!("\nTo see it, with its etag: orchestrator subsystems show {name}{flag}"))
            }
            "MEMORY_LIMIT" => {
                let id = cycle()?;
                let what = format!("cycle {id} is recorded, but the service has no memory now to return its record");
                (what, format!("\nTo see it later: orchestrator cycles show {id}{flag}"))
            }
            // For a subsystem, the message of the service says which part is too large.
            "ANSWER_TOO_LARGE" if !info.metadata.contains_key("subsystem") => {
                let what = "the answer would be larger than 3 MiB".to_owned();
                (what, format!("\nTo read the plan page by page: orchestrator plan{flag}"))
            }
            "REVISION_NOT_RETAINED" => {
                let (oldest, newest) = (metadata("oldest_revision")?, metadata("newest_revision")?);
                let what = match (oldest.parse::<u64>(), newest.parse::<u64>()) {
                    (Ok(oldest), Ok(newest)) if oldest > newest => {
                        format!("there is no record after that revision; the newest was {newest}")
                    }
                    _ => format!("only revisions {oldest} to {newest} are retained, not all after that one"),
                };
                let what_to_do = "\nEarlier records were removed, or this is another database. Use --from-oldest, or \
                                  --after with a retained revision.";
                (what, what_to_do.to_owned())
            }
            _ => return None,
        })
    }

    /// The flag that another command needs to reach the same service; empty for the default address.
    pub(super) fn flag(&self) -> String {
        let Address(address) = &self.address;
        let place = if address == "http://127.0.0.1:7700" { String::new() } else { format!(" --address {address}") };
        let tls = if address.starts_with("https://") { self.tls.flags() } else { String::new() };
        place + &tls + &self.credentials.flag()
    }
}

/// What to do about a failed TLS handshake, or one that was not tried.
fn tls_remedy(why: &str) -> Option<&'static str> {
    const REFUSED: &str = "It does not accept the certificate in --cert-file (ORCHESTRATOR_CERT_FILE): give one that \
                           is valid now, from an authority that it trusts.";
    /// Alerts are those of RFC 8446, 6.
    const REMEDIES: [(&str, &str); 13] = [
        ("this address speaks TLS", "Give the address with https://."),
        ("does not speak TLS", "Give the address with http://."),
        (
            "UnknownIssuer",
            "Its certificate is from an authority that is not trusted here: give the certificate of that authority \
             with --ca-file or ORCHESTRATOR_CA_FILE.",
        ),
        ("not valid for name", "Give it the address that its certificate is for, or the service another certificate."),
        ("certificate expired", "The service needs a new certificate."),
        (
            " answers, but ",
            "Another server has this address, or the service has another identity than its fleet gives it: then name \
             it with --server-identity or ORCHESTRATOR_SERVER_IDENTITY.",
        ),
        (
            "fatal alert: CertificateRequired",
            "It requires a certificate of its clients: give one with --cert-file and --key-file, or \
             ORCHESTRATOR_CERT_FILE and ORCHESTRATOR_KEY_FILE.",
        ),
        ("fatal alert: UnknownCA", REFUSED),
        ("fatal alert: BadCertificate", REFUSED),
        ("fatal alert: CertificateExpired", REFUSED),
        ("fatal alert: CertificateUnknown", REFUSED),
        ("fatal alert: DecryptError", REFUSED),
        (
            "fatal alert: NoApplicationProtocol",
            "The server at this address does not speak gRPC. The dashboard has its own address; give that of the \
             service.",
        ),
    ];
    REMEDIES.into_iter().find(|(said, _)| why.contains(said)).map(|(_, remedy)| remedy)
}

/// True if the environment sets the timeout.
pub(super) fn has_timeout_by_environment() -> bool {
    std::env::var_os("ORCHESTRATOR_TIMEOUT").is_some_and(|timeout| !timeout.is_empty())
}

/// True if the status is not an answer of the service: there is no connection to it, or it was lost.
pub(super) fn is_connection_lost(status: &Status) -> bool {
    let answered = status.get_error_details().error_info().is_some();
    // A status that came over the wire has no source.
    !answered && (status.source().is_some() || status.code() == Code::Unavailable)
}

/// True if a retry may help.
pub(super) fn is_passing(status: &Status) -> bool {
    is_connection_lost(status) || status.code() == Code::Unavailable
}

/// The key of the present name of a subsystem in the details of an error about a former name.
const RENAMED_TO: &str = "renamed_to";

/// True if this is the error about a former name of a subsystem.
pub(super) fn is_renamed(status: &Status) -> bool {
    status.get_error_details().error_info().is_some_and(|info| info.metadata.contains_key(RENAMED_TO))
}

/// The name that was not found, if that is the reason.
fn unknown(info: &ErrorInfo) -> Option<Unknown> {
    let name = |key: &str| info.metadata.get(key).cloned();
    match info.reason.as_str() {
        // The message has the present name of a renamed one.
        "SUBSYSTEM_NOT_FOUND" if info.metadata.contains_key(RENAMED_TO) => None,
        "SUBSYSTEM_NOT_FOUND" => name("subsystem").map(Unknown::Subsystem),
        "LOOP_NOT_FOUND" => name("loop").map(Unknown::Loop),
        _ => None,
    }
}

/// The reason in the error details; empty if there is no such detail.
pub(super) fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

/// The root cause is the most specific: "connection refused" rather than "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_many_forms() {
        let url = |text: &str| text.parse().map(|Address(url)| url);
        for (text, expected) in [
            ("127.0.0.1:7701", "http://127.0.0.1:7701"),
            ("example.org", "http://example.org:7700"),
            ("[::1]", "http://[::1]:7700"),
            ("[::1]:99", "http://[::1]:99"),
            (":7701", "http://127.0.0.1:7701"),
            ("http://example.org:1/", "http://example.org:1"),
            ("https://example.org", "https://example.org"),
            ("unix:/run/o.sock", "unix:/run/o.sock"),
            ("unix:///run/o.sock", "unix:/run/o.sock"),
            ("unix:o.sock", "unix:o.sock"),
        ] {
            assert_eq!(url(text).as_deref(), Ok(expected), "{text}");
        }
        for text in [
            "",
            "127.0.0.1:99999",
            "[::1]:99999",
            "localhost:",
            "unix:",
            "ftp://example.org",
            "http://",
            "http://a/b",
            "a b",
        ] {
            assert!(url(text).is_err(), "{text:?}");
        }
    }
}
