//! The gRPC client side: calls subsystems over connections that those with one endpoint share.

mod convert;
mod outcome;

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::net::UnixStream;
use tonic::{
    Request, Response, Status,
    transport::{self, Certificate, Channel, ClientTlsConfig, Uri},
};
use tower::service_fn;

use crate::{
    model::{Answer, Code, Endpoint, Payload, SpanContext, Subsystem},
    ports::{CallError, InitializeCall, RunCall, Subsystems},
    proto::subsystem::v1::{self as pb, subsystem_client::SubsystemClient},
};

/// There is no certificate where one should be.
#[derive(Debug, thiserror::Error)]
#[error("holds no certificate; give PEM, which begins with -----BEGIN CERTIFICATE-----")]
pub struct NoCertificate;

/// Calls subsystems over gRPC.
pub struct Dialer {
    connect_timeout: Duration,
    tls: ClientTlsConfig,
    channels: Mutex<HashMap<Endpoint, Channel>>,
}

impl Dialer {
    /// A ping goes out after so long without an answer. Peers that follow gRPC's rules take offence at less.
    const KEEPALIVE: Duration = Duration::from_secs(30);
    /// The connection is given up when a ping has no answer for so long.
    const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
    /// The most bytes of headers and trailers in an answer, error messages included. Room for a stack trace: when
    /// it meets much more, the HTTP/2 library gives up the whole connection, and the calls of others on it.
    const MAX_HEADERS: u32 = 64 << 10;

    /// A dialer that gives up connecting after `connect_timeout`, and trusts the certificates of the system.
    pub fn new(connect_timeout: Duration) -> Self {
        Self { connect_timeout, tls: ClientTlsConfig::new().with_native_roots(), channels: Mutex::default() }
    }

    /// Trusts the certificates in `ca`, which is PEM, as well.
    ///
    /// # Errors
    /// There is none in it.
    pub fn and_trust(mut self, ca: &[u8]) -> Result<Self, NoCertificate> {
        // tonic passes over what it can't read.
        if !CertificateDer::pem_slice_iter(ca).flatten().any(|it| webpki::anchor_from_trusted_cert(&it).is_ok()) {
            return Err(NoCertificate);
        }
        let ca = Certificate::from_pem(ca);
        let with_system = self.tls.ca_certificate(ca.clone());
        // Where the system has none, as in a small container, tonic would not take these either.
        let system_has_some =
            transport::Endpoint::from_static("https://localhost").tls_config(with_system.clone()).is_ok();
        self.tls = if system_has_some { with_system } else { ClientTlsConfig::new().ca_certificate(ca) };
        Ok(self)
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<Endpoint, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client for a subsystem. Connects when it is first used, and again when the connection is lost.
    fn client(&self, subsystem: &Subsystem) -> Result<SubsystemClient<Channel>, CallError> {
        let mut channels = self.channels();
        let channel = if let Some(channel) = channels.get(&subsystem.endpoint) {
            channel.clone()
        } else {
            let channel = self.connect(&subsystem.endpoint).map_err(|error| CallError {
                code: Code::Unavailable,
                message: format!("can't dial {}: {}", subsystem.endpoint, outcome::chain(&error)),
            })?;
            channels.insert(subsystem.endpoint.clone(), channel.clone());
            channel
        };
        let max_message_bytes = subsystem.limits.max_message_bytes as usize;
        Ok(SubsystemClient::new(channel).max_decoding_message_size(max_message_bytes))
    }

    fn connect(&self, endpoint: &Endpoint) -> Result<Channel, transport::Error> {
        let configure = |uri: String| {
            Ok(transport::Endpoint::from_shared(uri)?
                .user_agent(concat!("orchestrator/", env!("CARGO_PKG_VERSION")))?
                .connect_timeout(self.connect_timeout)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(Self::KEEPALIVE)
                .keep_alive_timeout(Self::KEEPALIVE_TIMEOUT)
                .http2_max_header_list_size(Self::MAX_HEADERS))
        };
        match endpoint {
            Endpoint::Http(uri) => Ok(configure(uri.clone())?.connect_lazy()),
            Endpoint::Https(uri) => Ok(configure(uri.clone())?.tls_config(self.tls.clone())?.connect_lazy()),
            Endpoint::Unix(path) => {
                let path = Arc::new(PathBuf::from(path));
                // The URI only names the authority, which a socket has none of.
                let endpoint = configure("http://localhost".into())?;
                Ok(endpoint.connect_with_connector_lazy(service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move { UnixStream::connect(&*path).await.map(TokioIo::new) }
                })))
            }
        }
    }
}

impl Subsystems for Dialer {
    fn initialize<'a>(&'a self, to: &'a Subsystem, call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        Box::pin(async move {
            let mut client = self.client(to)?;
            let timeout = call.timeout;
            let mut request = with_timeout(convert::initialize_request(to, &call), timeout);
            join_trace(&mut request, call.trace);
            answered(client.initialize(request), timeout).await.map(|pb::InitializeResponse {}| ())
        })
    }

    fn run_cycle<'a>(&'a self, to: &'a Subsystem, call: RunCall) -> BoxFuture<'a, Result<Answer, CallError>> {
        Box::pin(async move {
            let mut client = self.client(to)?;
            let (timeout, trace) = (call.timeout, call.trace.clone());
            let mut request = with_timeout(convert::run_cycle_request(to, call), timeout);
            join_trace(&mut request, trace);
            convert::answer(answered(client.run_cycle(request), timeout).await?)
        })
    }

    fn get_status<'a>(&'a self, of: &'a Subsystem, timeout: Duration) -> BoxFuture<'a, Result<Payload, CallError>> {
        Box::pin(async move {
            let mut client = self.client(of)?;
            let request = pb::GetStatusRequest { subsystem: of.name.to_string() };
            let answer = answered(client.get_status(with_timeout(request, timeout)), timeout).await?;
            let status = convert::payload("status", answer.status)?;
            let (bytes, allowed) = (status.len(), of.limits.max_output_bytes as usize);
            if bytes > allowed {
                let message = format!("its status is {bytes} bytes; allowed are {allowed}, as of output");
                return Err(CallError { code: Code::ResourceExhausted, message });
            }
            Ok(status)
        })
    }

    fn retain(&self, registered: &[Arc<Subsystem>]) {
        let endpoints: HashSet<_> = registered.iter().map(|subsystem| &subsystem.endpoint).collect();
        self.channels().retain(|endpoint, _| endpoints.contains(endpoint));
    }
}

fn with_timeout<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// Tells of the trace, in the headers of W3C Trace Context.
fn join_trace<T>(request: &mut Request<T>, trace: Option<SpanContext>) {
    let Some(trace) = trace else { return };
    let state = trace.state.as_deref().map(|state| ("tracestate", state.to_owned()));
    for (header, value) in [("traceparent", trace.to_string())].into_iter().chain(state) {
        // Neither can be malformed: it was checked, or made here.
        if let Ok(value) = value.try_into() {
            request.metadata_mut().insert(header, value);
        }
    }
}

/// Awaits an answer. The client library may panic over malformed trailers, and a subsystem must not be able to end
/// more than its own call.
async fn answered<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
    timeout: Duration,
) -> Result<T, CallError> {
    let called_at = tokio::time::Instant::now();
    match AssertUnwindSafe(call).catch_unwind().await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(outcome::of(&status, called_at.elapsed() >= timeout)),
        Err(_panic) => Err(CallError { code: Code::Internal, message: "its answer breaks the gRPC protocol".into() }),
    }
}
