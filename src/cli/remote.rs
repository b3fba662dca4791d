//! The connection to a running service: where it is, how long to wait for it, and what its refusals say to people.

use std::{
    error::Error as _,
    fmt::{self, Write as _},
    future::Future,
    str::FromStr,
    time::Duration,
};

use jiff::SignedDuration;
use tonic::{
    Code, Status,
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use tonic_types::StatusExt;

use super::{
    Exit, Failure,
    output::{Format, clean, short},
};
use crate::proto::orchestrator::v1::orchestrator_client::OrchestratorClient;

/// The generated client.
pub(super) type Client = OrchestratorClient<Channel>;

/// The most bytes of an answer: the largest record that a service can be configured for, and some room.
const MAX_ANSWER: usize = 80 << 20;
/// How long to wait for an answer that takes no work.
const QUICK: Duration = Duration::from_secs(10);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(5);

/// How a remote command reaches the service and shows what that says, in the formats that all have or in its own.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Connection and output")]
pub(super) struct Remote<F: clap::Args = Format> {
    /// Where the service listens: HOST, HOST:PORT, or a URL that begins with http:// or https://
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "ORCHESTRATOR_ADDRESS",
        default_value = "http://127.0.0.1:7700",
        global = true
    )]
    pub(super) address: Address,
    /// How long to wait for the service, such as 500ms, 10s or 2m. Without it, most commands wait 10s for their answer;
    /// run and cancel wait as long as it takes. A watch never ends by itself: for it, only connecting
    #[arg(long, value_name = "DURATION", env = "ORCHESTRATOR_TIMEOUT", value_parser = timeout, global = true)]
    pub(super) timeout: Option<Duration>,
    #[command(flatten)]
    pub(super) format: F,
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
        const FORMS: &str = "give HOST, HOST:PORT, http://HOST:PORT or https://HOST:PORT";
        let text = text.trim();
        let (scheme, place) = match text.split_once("://") {
            Some((scheme @ ("http" | "https"), place)) => (Some(scheme), place.to_owned()),
            Some((scheme, _)) => return Err(format!("{scheme:?} is no scheme that it is served by; {FORMS}")),
            None if text.starts_with("unix:") => return Err(format!("it is not served on Unix sockets; {FORMS}")),
            None if text.starts_with(':') => (None, format!("127.0.0.1{text}")),
            None => (None, text.to_owned()),
        };
        let place = place.strip_suffix('/').unwrap_or(&place);
        let authority: tonic::codegen::http::uri::Authority =
            place.parse().map_err(|error| format!("{error}; {FORMS}"))?;
        // What follows the host is a port, if it can be one.
        let is_bare = authority.as_str() == authority.host();
        if authority.host().is_empty() || (authority.port().is_none() && !is_bare) {
            return Err(FORMS.to_owned());
        }
        Ok(Self(match (scheme, authority.port()) {
            // A URL without a port has one by its scheme.
            (Some(scheme), _) => format!("{scheme}://{authority}"),
            (None, Some(_)) => format!("http://{authority}"),
            (None, None) => format!("http://{authority}:{DEFAULT_PORT}"),
        }))
    }
}

/// Reads how long to wait.
///
/// # Errors
/// What to give instead.
pub(super) fn timeout(text: &str) -> Result<Duration, String> {
    let duration: Option<SignedDuration> = text.parse().ok();
    let duration = duration.and_then(|duration| Duration::try_from(duration).ok()).filter(|it| !it.is_zero());
    duration.ok_or_else(|| "give a duration above zero with its unit, such as 500ms, 10s or 2m".to_owned())
}

impl Remote {
    /// Reaches the service at this address, and shows tables.
    pub(super) fn at(address: std::net::SocketAddr) -> Self {
        Self { address: Address(format!("http://{address}")), timeout: None, format: Format::default() }
    }
}

impl<F: clap::Args> Remote<F> {
    /// Connects.
    ///
    /// # Errors
    /// The service can't be reached.
    pub(super) async fn connect(&self) -> Result<Client, Failure> {
        let unreachable = |error: &dyn std::error::Error| self.unreachable(&innermost(error));
        let connect = self.timeout.map_or(CONNECT, |timeout| timeout.min(CONNECT));
        let mut endpoint = Endpoint::from_shared(self.address.0.clone())
            .map_err(|error| unreachable(&error))?
            .connect_timeout(connect)
            .tcp_nodelay(true)
            // A watch may be silent for longer than a dead connection should go unnoticed.
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10));
        if self.address.0.starts_with("https://") {
            let tls = ClientTlsConfig::new().with_enabled_roots();
            endpoint = endpoint.tls_config(tls).map_err(|error| unreachable(&error))?;
        }
        // The bound holds for names that don't resolve as well.
        match tokio::time::timeout(connect, endpoint.connect()).await {
            Ok(Ok(channel)) => Ok(Client::new(channel).max_decoding_message_size(MAX_ANSWER)),
            Ok(Err(error)) => Err(unreachable(&error)),
            Err(_) => Err(self.unreachable(&format!("no connection within {}", short(connect)))),
        }
    }

    /// Makes one call that is answered without delay.
    ///
    /// # Errors
    /// The service can't be reached, is late, or refuses.
    pub(super) async fn quickly<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
        self.within(Some(self.timeout.unwrap_or(QUICK)), call).await
    }

    /// Makes one call that takes as long as it takes, unless the user said how long to wait.
    ///
    /// # Errors
    /// The service can't be reached, is late, or refuses.
    pub(super) async fn patiently<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
        self.within(self.timeout, call).await
    }

    async fn within<T>(
        &self,
        limit: Option<Duration>,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        let answer = match limit {
            None => call.await,
            Some(limit) => match tokio::time::timeout(limit, call).await {
                Ok(answer) => answer,
                Err(_) => return Err(self.late(limit)),
            },
        };
        answer.map_err(|status| self.failure(&status))
    }

    /// The service has not answered in time.
    pub(super) fn late(&self, limit: Duration) -> Failure {
        let Address(address) = &self.address;
        Failure::new(
            Exit::Unreachable,
            format!("the service at {address} has not answered within {}; wait longer with --timeout", short(limit)),
        )
    }

    fn unreachable(&self, why: &str) -> Failure {
        let Address(address) = &self.address;
        let mut why = clean(why);
        // What TLS says to an answer that is none of its own, and HTTP/2 to a peer that hangs up on it.
        if why.contains("InvalidContentType") {
            why = format!("it does not speak TLS, so give http:// ({why})");
        } else if why.contains("broken pipe") || why.contains("http2 error") {
            why = format!("what listens there does not speak gRPC: the dashboard has an address of its own ({why})");
        }
        Failure::new(
            Exit::Unreachable,
            format!(
                "can't reach the service at {address}: {why}\nStart it with `orchestrator serve`, or say where it is \
                 with --address or ORCHESTRATOR_ADDRESS."
            ),
        )
    }

    /// What a status says to people.
    pub(super) fn failure(&self, status: &Status) -> Failure {
        if is_connection_lost(status) {
            let why = status.source().map_or_else(|| status.message().to_owned(), innermost);
            return self.unreachable(&why);
        }
        let details = status.get_error_details();
        let mut message = String::from("the service refuses: ");
        let violations = details.bad_request().map(|bad| &bad.field_violations[..]).unwrap_or_default();
        if violations.is_empty() {
            message.push_str(&clean(status.message()));
        } else {
            message.push_str("these fields are wrong");
            for violation in violations {
                let _ = write!(message, "\n  {} {}", clean(&violation.field), clean(&violation.description));
            }
        }
        let code = crate::model::Code::from_number(status.code().into()).name();
        match details.error_info() {
            Some(info) => _ = write!(message, "\n({code}, {})", clean(&info.reason)),
            None => _ = write!(message, "\n({code})"),
        }
        // What the service says is for users of the contract; this is for those of the command line.
        let hint = match (status.code(), reason(status).as_str()) {
            (Code::Unimplemented, _) => {
                "\nThe service is of another version, or something else listens at this address."
            }
            (_, "REVISION_NOT_RETAINED") => {
                "\nCycles of before are gone, or this is another database. Watch with --from-oldest, or with --after and \
                 a revision that is there."
            }
            _ => "",
        };
        message.push_str(hint);
        Failure::new(Exit::Refused, message)
    }

    /// The flag that another command needs to reach the same service; empty for the default.
    pub(super) fn flag(&self) -> String {
        let Address(address) = &self.address;
        if address == "http://127.0.0.1:7700" { String::new() } else { format!(" --address {address}") }
    }
}

/// It is not the service that has spoken: there is no connection to it, or no longer one.
pub(super) fn is_connection_lost(status: &Status) -> bool {
    let answered = status.get_error_details().error_info().is_some();
    // A status that came over the wire has no source.
    !answered && (status.source().is_some() || status.code() == Code::Unavailable)
}

/// The reason that the service gives for a refusal; empty when it gives none.
pub(super) fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

/// The first cause says most: "connection refused" rather than "transport error".
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
        ] {
            assert_eq!(url(text).as_deref(), Ok(expected), "{text}");
        }
        for text in [
            "",
            "127.0.0.1:99999",
            "[::1]:99999",
            "localhost:",
            "unix:/run/o.sock",
            "ftp://example.org",
            "http://",
            "http://a/b",
            "a b",
        ] {
            assert!(url(text).is_err(), "{text:?}");
        }
    }
}
