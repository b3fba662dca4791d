//! Listening and stopping.

use std::{collections::BTreeMap, io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};
use tonic_health::{ServingStatus, server::HealthReporter};

#[cfg(feature = "tls")]
use super::Tls;
use super::{
    Subsystem,
    calls::{Hosted, HostedSubsystems},
};
use crate::{
    listen::{self, Connections, Entrance, Limits, Secure},
    memory::Memory,
    model::{self, Name, NameError},
    proto::subsystem::v1::subsystem_server::SubsystemServer,
    transport::{self, Listener, Transport},
};

/// The name under which `grpc.health.v1` knows the service; the empty name stands for the whole process.
const SERVICE: &str = "dreamnet.subsystem.v1.Subsystem";

/// Most concurrent connections. An orchestrator needs one; the others are for its successor and for people.
const MAX_CONNECTIONS: usize = 256;
/// Most concurrent calls on a connection: the default limit of an orchestrator, whose calls may all be for this
/// endpoint.
const MAX_CONCURRENT_STREAMS: u32 = 1024;
/// Most concurrent calls on all connections.
const MAX_STREAMS: usize = 8 * MAX_CONCURRENT_STREAMS as usize;
/// Bytes of all requests that are being received, and of all answers that are not read yet: some of the largest.
const MAX_MEMORY: usize = 1 << 30;
/// Most bytes of one request: the largest inputs that an orchestrator sends, and some more for the rest of the message.
const MAX_REQUEST: usize = model::Subsystem::MAX_INPUT_BYTES + (1 << 20);
/// Most bytes of one answer: the largest limit of a registration.
const MAX_ANSWER: usize = 64 << 20;

/// Why subsystems are not served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A name is invalid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Two subsystems have the same name.
    #[error("two subsystems have the name {0}: names must be unique")]
    SameName(Name),
    /// The address can't be listened on.
    #[error("can't listen on {0:?}: {1}; give HOST:PORT, where port 0 takes a free one, or unix:/path")]
    Address(String, io::Error),
    /// A file of TLS can't be read or used, or TLS is combined with a `unix:` address.
    #[error("TLS: {0}")]
    Tls(String),
    /// The reflection service can't be built.
    #[error("can't describe the contract: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Subsystems to be served at one endpoint, with `grpc.health.v1` and reflection.
#[derive(Default)]
pub struct Server {
    subsystems: Vec<(String, Hosted)>,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
}

impl Server {
    /// A server without subsystems.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a subsystem, under its registered name.
    #[must_use]
    pub fn subsystem(mut self, name: impl Into<String>, subsystem: impl Subsystem) -> Self {
        self.subsystems.push((name.into(), Hosted::new(subsystem)));
        self
    }

    /// Serves over TLS, and accepts only the orchestrator.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// Listens on `HOST:PORT`, where port 0 takes a free one, or on `unix:/path`, and serves until [`Serving::stop`] is
    /// called or the returned value is dropped. Without TLS, callers are not authenticated: prefer a loopback address.
    ///
    /// # Errors
    /// A name is invalid or used twice, the address can't be listened on, or the files of TLS can't be used.
    pub async fn listen(self, address: &str) -> Result<Serving, ListenError> {
        let refused = |error| ListenError::Address(address.to_owned(), error);
        let ready = self.build().await?;
        if let Some(path) = address.strip_prefix("unix:") {
            if ready.secure.is_some() {
                return Err(ListenError::Tls(format!("there is none at {address}; give HOST:PORT")));
            }
            let listener = transport::listen_at_path(Path::new(path), None).await.map_err(refused)?;
            return Ok(ready.start(listener, address.to_owned()));
        }
        let (listener, address) = transport::listen_at(address).await.map_err(refused)?;
        Ok(ready.start_at(listener, address))
    }

    /// The same, in another network than that of this machine, such as a simulated one.
    ///
    /// # Errors
    /// As those of [`Server::listen`].
    pub async fn listen_over(self, transport: &dyn Transport, address: SocketAddr) -> Result<Serving, ListenError> {
        let refused = |error| ListenError::Address(address.to_string(), error);
        let ready = self.build().await?;
        let (listener, address) = transport.listen(address).await.map_err(refused)?;
        Ok(ready.start_at(listener, address))
    }

    async fn build(self) -> Result<Ready, ListenError> {
        let mut subsystems = BTreeMap::new();
        for (name, hosted) in self.subsystems {
            let name = Name::parse(&name)?;
            if subsystems.insert(name.to_string(), Arc::new(hosted)).is_some() {
                return Err(ListenError::SameName(name));
            }
        }
        let calls = SubsystemServer::new(HostedSubsystems { subsystems })
            .max_decoding_message_size(MAX_REQUEST)
            .max_encoding_message_size(MAX_ANSWER);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE, ServingStatus::Serving).await;
        let services = listen::reflection(&[SERVICE])?.and(calls).and(health_service);
        let server = listen::Server::new(services, limits());
        #[cfg(feature = "tls")]
        let (secure, renewal) = match self.tls {
            None => (None, None),
            Some(tls) => tls.start().await.map(|(secure, renewal)| (Some(secure), Some(renewal)))?,
        };
        #[cfg(not(feature = "tls"))]
        let (secure, renewal) = (None, None);
        Ok(Ready { server, health, secure, renewal })
    }
}

/// A server that does not listen yet.
struct Ready {
    server: listen::Server,
    health: HealthReporter,
    /// Its TLS, and the task that reads the files of TLS again.
    secure: Option<Arc<Secure>>,
    renewal: Option<AbortOnDropHandle<()>>,
}

impl Ready {
    fn start_at(self, listener: Box<dyn Listener>, address: SocketAddr) -> Serving {
        let scheme = if self.secure.is_some() { "https" } else { "http" };
        self.start(listener, format!("{scheme}://{address}"))
    }

    fn start(self, listener: Box<dyn Listener>, endpoint: String) -> Serving {
        let Self { server, health, secure, renewal } = self;
        let (stop, cut_off) = (CancellationToken::new(), CancellationToken::new());
        let connections = Connections::at_most(MAX_CONNECTIONS);
        let serve = server.serve(Entrance { listener, secure }, connections, stop.clone(), cut_off.clone());
        let server = AbortOnDropHandle::new(tokio::spawn(serve));
        Serving { endpoint, health, stop, server, _renewal: renewal, _cut_off: cut_off.drop_guard() }
    }
}

/// Served subsystems. Dropping it stops them at once.
pub struct Serving {
    endpoint: String,
    health: HealthReporter,
    stop: CancellationToken,
    server: AbortOnDropHandle<()>,
    _renewal: Option<AbortOnDropHandle<()>>,
    _cut_off: DropGuard,
}

impl Serving {
    /// The endpoint for registrations of these subsystems: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/path`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Stops: new calls are refused, and running calls may finish within the grace period.
    pub async fn stop(mut self, grace: Duration) {
        for service in ["", SERVICE] {
            self.health.set_service_status(service, ServingStatus::NotServing).await;
            // Ends watches of the health service, which would keep the server for the whole grace period.
            self.health.clear_service_status(service).await;
        }
        self.stop.cancel();
        match timeout(grace, self.server).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the server of subsystems failed"),
            Err(_) => tracing::warn!(?grace, "the grace period has passed: aborting running calls"),
        }
    }
}

/// Limits of each peer, and of all peers together.
fn limits() -> Limits {
    Limits {
        max_concurrent_streams: MAX_CONCURRENT_STREAMS,
        max_streams: MAX_STREAMS,
        max_request_bytes: MAX_REQUEST,
        windows: (1 << 20, 1 << 20),
        requests: Memory::whole(MAX_MEMORY).part("requests that are being received", MAX_MEMORY),
        answers: Memory::whole(MAX_MEMORY).part("answers that are not read yet", MAX_MEMORY),
        large_streams: &[],
    }
}
