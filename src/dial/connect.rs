//! From an endpoint to a stream of bytes: name, socket and TLS.

use std::{io, net::SocketAddr, time::Duration};

use http::uri::Scheme;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{outcome, resolve::Resolver, tls::Trust};
use crate::model::Endpoint;

/// A dead peer is found by the kernel, and not by HTTP/2's pings: servers of grpcio and grpc-go take those for abuse, and
/// end calls that work. After so long without a word the first probe goes out,
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// others in this interval,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// and after so many without an answer the connection is given up.
const KEEPALIVE_PROBES: u32 = 3;
/// What was sent and is not acknowledged, or not taken, for so long ends the connection as well.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_mins(1);

/// A connected socket, whatever it is.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Connects.
#[derive(Debug)]
pub(super) struct Connector {
    /// How long it may take in all, the first words of HTTP/2 included.
    pub(super) timeout: Duration,
    pub(super) trust: Trust,
    pub(super) resolver: Resolver,
}

/// An endpoint, taken apart.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// A host and its port.
    Tcp { host: String, port: u16, is_tls: bool },
    /// The path of a socket.
    Unix(String),
}

impl Target {
    /// Takes an endpoint apart.
    pub(super) fn of(endpoint: &Endpoint) -> Self {
        let (uri, is_tls) = match endpoint {
            Endpoint::Http(uri) => (uri, false),
            Endpoint::Https(uri) => (uri, true),
            Endpoint::Unix(path) => return Self::Unix(path.clone()),
        };
        let authority = uri.split_once("://").map_or(uri.as_str(), |(_, authority)| authority);
        let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
        // An endpoint has a port: that was checked.
        Self::Tcp { host: host.to_owned(), port: port.parse().unwrap_or_default(), is_tls }
    }

    /// What requests name as the server.
    pub(super) fn authority(&self) -> String {
        match self {
            Self::Tcp { host, port, .. } => format!("{host}:{port}"),
            // A socket has none.
            Self::Unix(_) => "localhost".into(),
        }
    }

    /// `http` or `https`.
    pub(super) fn scheme(&self) -> Scheme {
        if matches!(self, Self::Tcp { is_tls: true, .. }) { Scheme::HTTPS } else { Scheme::HTTP }
    }
}

impl Connector {
    /// Connects, until `deadline`.
    ///
    /// # Errors
    /// Why not, in words.
    pub(super) async fn open(&self, target: &Target, deadline: Instant) -> Result<Box<dyn Stream>, String> {
        match target {
            Target::Unix(path) => {
                let connect = self.in_time("no answer", deadline, UnixStream::connect(path));
                let socket = connect.await.map_err(|why| format!("can't connect: {why}"))?;
                Ok(Box::new(socket))
            }
            Target::Tcp { host, port, is_tls } => {
                let addresses = self.resolver.resolve(host, *port);
                let addresses = self.in_time("no answer", deadline, addresses).await;
                let addresses = addresses.map_err(|why| format!("can't find the address of {host}: {why}"))?;
                let socket = self.first_of(&addresses, deadline).await;
                let socket = socket.map_err(|why| format!("can't connect: {why}"))?;
                if !is_tls {
                    return Ok(Box::new(socket));
                }
                let config = self.trust.config().await?;
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
                let name = name.map_err(|error| format!("no certificate can be for {host}: {error}"))?;
                let shake_hands = TlsConnector::from(config).connect(name, socket);
                let stream = self.in_time("no TLS handshake", deadline, shake_hands).await?;
                if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                    return Err("it speaks TLS, but no HTTP/2 (it has not agreed to h2 by ALPN)".into());
                }
                Ok(Box::new(stream))
            }
        }
    }

    /// The first address that takes a connection. Each has its part of the time that is left, so that one that does not
    /// answer leaves some for the next.
    async fn first_of(&self, addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream, String> {
        let mut errors = Vec::new();
        for (tried, address) in addresses.iter().enumerate() {
            let left = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let until = Instant::now() + deadline.saturating_duration_since(Instant::now()) / left;
            match self.in_time("no answer", until, TcpStream::connect(address)).await {
                Ok(socket) => {
                    set_up(&socket).map_err(|error| format!("the socket can't be set up: {error}"))?;
                    return Ok(socket);
                }
                Err(error) if addresses.len() == 1 => return Err(error),
                Err(error) => errors.push(format!("{address}: {error}")),
            }
        }
        Err(errors.join("; "))
    }

    async fn in_time<T>(
        &self,
        what: &str,
        deadline: Instant,
        step: impl Future<Output = io::Result<T>>,
    ) -> Result<T, String> {
        match timeout_at(deadline, step).await {
            Ok(done) => done.map_err(|error| outcome::chain(&error)),
            Err(_) => Err(format!("{what} within {:?}", self.timeout)),
        }
    }
}

fn set_up(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}
