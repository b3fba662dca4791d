//! From an endpoint to a stream of bytes: a connection, and TLS on top of it.

use std::{sync::Arc, time::Duration};

use http::uri::Scheme;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{
    outcome,
    tls::{Loaded, Tls},
};
use crate::{
    model::Endpoint,
    transport::{Destination, Stream, Transport},
};

/// Connects.
pub(super) struct Connector {
    pub(super) transport: Arc<dyn Transport>,
    /// Longest time in total, including the start of HTTP/2.
    pub(super) timeout: Duration,
    pub(super) tls: Arc<Tls>,
}

/// A parsed endpoint.
#[derive(Clone, Debug)]
pub(super) struct Target {
    destination: Destination,
    is_tls: bool,
}

impl Target {
    /// Parses an endpoint.
    pub(super) fn of(endpoint: &Endpoint) -> Self {
        let (uri, is_tls) = match endpoint {
            Endpoint::Http(uri) => (uri, false),
            Endpoint::Https(uri) => (uri, true),
            Endpoint::Unix(path) => return Self { destination: Destination::Unix(path.clone()), is_tls: false },
        };
        let authority = uri.split_once("://").map_or(uri.as_str(), |(_, authority)| authority);
        let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
        // An endpoint has a port, which was checked.
        Self { destination: Destination::Tcp { host: host.to_owned(), port: port.parse().unwrap_or_default() }, is_tls }
    }

    /// The authority of requests.
    pub(super) fn authority(&self) -> String {
        match &self.destination {
            Destination::Tcp { host, port } => format!("{host}:{port}"),
            // A Unix socket has no authority.
            Destination::Unix(_) => "localhost".into(),
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
    /// Connects with this TLS, if the target has TLS, until `deadline`.
    ///
    /// # Errors
    /// The reason, for people.
    pub(super) async fn open(
        &self,
        target: &Target,
        tls: &Loaded,
        deadline: Instant,
    ) -> Result<Box<dyn Stream>, String> {
        let stream = self.transport.connect(&target.destination, self.timeout).await?;
        let (true, Destination::Tcp { host, .. }) = (target.is_tls, &target.destination) else { return Ok(stream) };
        let config = tls.config().await?;
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
        let name = name.map_err(|error| format!("{host} can't be a name in a certificate: {error}"))?;
        let stream = match timeout_at(deadline, TlsConnector::from(config).connect(name, stream)).await {
            Ok(stream) => stream.map_err(|error| outcome::chain(&error))?,
            Err(_) => return Err(format!("no TLS handshake within {:?}", self.timeout)),
        };
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err("it speaks TLS, but not HTTP/2 (it did not select h2 by ALPN)".into());
        }
        Ok(Box::new(stream))
    }
}
