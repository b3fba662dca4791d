//! From an endpoint to a stream of bytes: a connection, and TLS on top of it.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::uri::Scheme;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{
    counts::{Counts, Step},
    outcome,
    server::Server,
    tls::{Loaded, Tls},
};
use crate::{
    access::{Reach, Revoked},
    model::Endpoint,
    transport::{Destination, Stream, Transport, was_refused},
};

/// Connects.
pub(super) struct Connector {
    pub(super) transport: Arc<dyn Transport>,
    /// Longest time in total, including the start of HTTP/2.
    pub(super) timeout: Duration,
    pub(super) tls: Arc<Tls>,
    /// Where it connects.
    pub(super) reach: Reach,
    /// Servers that are not called.
    pub(super) revoked: Mutex<Arc<Revoked>>,
    pub(super) counts: Arc<Counts>,
}

/// Why there is no connection.
pub(super) struct Unconnected {
    pub(super) step: Step,
    /// For people.
    pub(super) why: String,
    /// True if it was [refused](was_refused).
    pub(super) was_refused: bool,
}

impl Step {
    /// The error if this step fails.
    pub(super) fn failed(self) -> impl Fn(String) -> Unconnected {
        move |why| Unconnected { step: self, why, was_refused: false }
    }
}

/// A parsed endpoint.
#[derive(Clone, Debug)]
pub(super) struct Target {
    endpoint: Endpoint,
    destination: Destination,
    is_tls: bool,
}

impl Target {
    /// Parses an endpoint. The socket of a `unix` endpoint must be in this directory, if there is one.
    pub(super) fn of(endpoint: &Endpoint, unix_dir: Option<&PathBuf>) -> Self {
        let (uri, is_tls) = match endpoint {
            Endpoint::Http(uri) => (uri, false),
            Endpoint::Https(uri) => (uri, true),
            Endpoint::Unix(path) => {
                let destination = Destination::Unix { path: path.into(), within: unix_dir.cloned() };
                return Self { endpoint: endpoint.clone(), destination, is_tls: false };
            }
        };
        let authority = uri.split_once("://").map_or(uri.as_str(), |(_, authority)| authority);
        let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
        // An endpoint has a port, which was checked.
        let destination = Destination::Tcp { host: host.to_owned(), port: port.parse().unwrap_or_default() };
        Self { endpoint: endpoint.clone(), destination, is_tls }
    }

    /// The authority of requests.
    pub(super) fn authority(&self) -> String {
        match &self.destination {
            Destination::Tcp { host, port } => format!("{host}:{port}"),
            // A Unix socket has no authority.
            Destination::Unix { .. } => "localhost".into(),
        }
    }

    /// True if connections have TLS.
    pub(super) fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// `http` or `https`.
    pub(super) fn scheme(&self) -> Scheme {
        if self.is_tls { Scheme::HTTPS } else { Scheme::HTTP }
    }
}

impl Connector {
    pub(super) fn new(transport: Arc<dyn Transport>, timeout: Duration, tls: Arc<Tls>, reach: Reach) -> Self {
        Self { transport, timeout, tls, reach, revoked: Mutex::default(), counts: Arc::default() }
    }

    /// The servers that are not called.
    pub(super) fn revoked(&self) -> Arc<Revoked> {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the servers that are not called.
    pub(super) fn revoke(&self, revoked: Revoked) {
        *self.revoked.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(revoked);
    }

    /// Connects with this TLS, if the target has TLS, until `deadline`. Returns the server as well.
    ///
    /// # Errors
    /// A step fails.
    pub(super) async fn open(
        &self,
        target: &Target,
        tls: &Loaded,
        deadline: Instant,
    ) -> Result<(Box<dyn Stream>, Server), Unconnected> {
        let allowed = self.reach.check(&target.endpoint).map_err(|why| format!("its endpoint {why}"));
        allowed.map_err(Step::Connect.failed())?;
        let host = if let Destination::Tcp { host, .. } = &target.destination { host } else { "" };
        let admit = |address| self.reach.check_address(target.is_tls, host, address);
        let connected = self.transport.connect(&target.destination, &admit, self.timeout).await;
        let (stream, origin) = connected.map_err(|error| Unconnected {
            step: Step::Connect,
            why: error.to_string(),
            was_refused: was_refused(error.kind()),
        })?;
        if !target.is_tls {
            return Ok((stream, Server::without_tls(origin)));
        }
        self.secure(stream, host, tls, deadline).await.map_err(Step::Tls.failed())
    }

    /// Makes the TLS handshake with the server of this host.
    async fn secure(
        &self,
        stream: Box<dyn Stream>,
        host: &str,
        tls: &Loaded,
        deadline: Instant,
    ) -> Result<(Box<dyn Stream>, Server), String> {
        let config = tls.config().await?;
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
        let name = name.map_err(|error| format!("{host} can't be a name in a certificate: {error}"))?;
        let stream = match timeout_at(deadline, TlsConnector::from(config).connect(name.clone(), stream)).await {
            Ok(stream) => stream.map_err(|error| outcome::chain(&error))?,
            Err(_) => return Err(format!("no TLS handshake within {:?}", self.timeout)),
        };
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(b"h2") {
            return Err("it speaks TLS, but not HTTP/2 (it did not select h2 by ALPN)".into());
        }
        let server = Server::with(session.peer_certificates().unwrap_or_default(), &name, tls.now());
        Ok((Box::new(stream), server))
    }
}
