//! The gRPC client side: calls subsystems. Subsystems with the same endpoint share a connection.
//!
//! It is our own client over the `h2` crate, for unary calls only, because data that a subsystem sends may affect only
//! its own call: not the connection of others, not the memory of the process, not the time of a worker thread. `client`
//! has the connection of one endpoint (`connection`, by `connect` and `tls`, seen through by `wire`), `server` checks
//! who answers there, `unary` makes one call on it, `outcome` says what became of it, and `decode` reads the answer.
//! `counts` has the figures of all connections.

mod client;
mod connect;
mod connection;
mod counts;
mod decode;
mod outcome;
mod request;
mod server;
mod tls;
mod unary;
mod wire;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use prost::Message;
use tokio::{sync::Semaphore, time::Instant};

pub(crate) use self::tls::{Loaded, Material};
use self::{
    client::Failure,
    connect::{Connector, Target, Unconnected},
};
pub use self::{
    client::{Client, Received},
    counts::Counts,
    tls::{NoCertificate, Tls, authorities, tls_in_words},
    unary::Call,
};
use crate::{
    access::{Reach, Revoked},
    clock::Clock,
    memory::{Held, Memory},
    model::{CallPath, Endpoint, Identity, Limits, Name, SpanContext, Subsystem, text::shortened},
    offload::offload_within,
    ports::{CallError, Callee, InitializeCall, Left, Reply, RunCall, Snapshot, Subsystems},
    proto::framing::framed,
    transport::{Stream, Transport},
};

/// Calls subsystems over gRPC.
pub struct Dialer {
    connector: Arc<Connector>,
    replies: Memory,
    endpoints: Mutex<HashMap<Endpoint, Clients>>,
    /// Permits for encoding or decoding of large messages on blocking threads.
    offloaded: Arc<Semaphore>,
}

/// The clients of one endpoint.
struct Clients {
    /// The shared client of the subsystems there,
    shared: Arc<Client>,
    /// except for subsystems whose answer broke a connection: each of these has its own client from then on.
    apart: HashMap<Name, Arc<Client>>,
}

impl Dialer {
    /// Larger messages are encoded and decoded on blocking threads, since that can take longer than a millisecond.
    const LONG: usize = 64 << 10;
    /// Most concurrent messages on blocking threads, so that processors are left for other work.
    const MAX_OFFLOADED: usize = 2;
    /// Most bytes of a peer's error message that are kept: the limit of a record.
    const MAX_MESSAGE: usize = 1 << 10;

    /// A dialer that connects over `transport` and gives up after `connect_timeout`, trusts the certificates of the
    /// system, connects everywhere, and takes memory for answers from `replies`.
    pub fn new(transport: Arc<dyn Transport>, connect_timeout: Duration, replies: Memory, clock: Clock) -> Self {
        Self::with(transport, connect_timeout, replies, Arc::new(Tls::of_system(clock)), Reach::default())
    }

    /// As [`Dialer::new`], with this TLS for `https` endpoints, and within this reach.
    pub fn with(
        transport: Arc<dyn Transport>,
        connect_timeout: Duration,
        replies: Memory,
        tls: Arc<Tls>,
        reach: Reach,
    ) -> Self {
        Self {
            connector: Arc::new(Connector::new(transport, connect_timeout, tls, reach)),
            replies,
            endpoints: Mutex::default(),
            offloaded: Arc::new(Semaphore::new(Self::MAX_OFFLOADED)),
        }
    }

    /// Makes no further call to servers with these identities and certificates.
    pub fn revoke(&self, revoked: Revoked) {
        self.connector.revoke(revoked);
    }

    /// Figures of its connections.
    pub fn counts(&self) -> Arc<Counts> {
        self.connector.counts.clone()
    }

    /// A client of one endpoint, with its own connection.
    ///
    /// # Errors
    /// The endpoint can't be dialed.
    pub fn client(&self, endpoint: &Endpoint) -> Result<Client, CallError> {
        Client::new(endpoint, self.connector.clone(), self.replies.clone())
    }

    fn endpoints(&self) -> MutexGuard<'_, HashMap<Endpoint, Clients>> {
        self.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client for a subsystem.
    fn client_of(&self, subsystem: &Subsystem) -> Result<Arc<Client>, CallError> {
        let mut endpoints = self.endpoints();
        if let Some(clients) = endpoints.get(&subsystem.endpoint) {
            return Ok(clients.apart.get(&subsystem.name).unwrap_or(&clients.shared).clone());
        }
        let shared = Arc::new(self.client(&subsystem.endpoint)?);
        let clients = Clients { shared: shared.clone(), apart: HashMap::new() };
        endpoints.insert(subsystem.endpoint.clone(), clients);
        Ok(shared)
    }

    /// Gives a subsystem its own connection while it is registered there.
    fn put_apart(&self, subsystem: &Subsystem) {
        let Ok(own) = self.client(&subsystem.endpoint) else { return };
        let mut endpoints = self.endpoints();
        let Some(clients) = endpoints.get_mut(&subsystem.endpoint) else { return };
        if clients.apart.contains_key(&subsystem.name) {
            return;
        }
        clients.apart.insert(subsystem.name.clone(), Arc::new(own));
        drop(endpoints);
        let (subsystem, endpoint) = (&subsystem.name, &subsystem.endpoint);
        tracing::warn!(%subsystem, %endpoint, "its answer could break the shared connection: it has its own \
                                               connection now");
    }

    /// Makes a call and reads the answer.
    async fn call<T: Send + 'static>(
        &self,
        to: Callee<'_>,
        call: Call,
        read: impl FnOnce(&[u8], &Limits) -> Result<T, CallError> + Send + 'static,
    ) -> Result<(T, Held), CallError> {
        let client = self.client_of(to.subsystem)?;
        let received = client.make(&call, expected(to)).await.map_err(|Failure { error, breaks_connection }| {
            if breaks_connection {
                self.put_apart(to.subsystem);
            }
            CallError { message: shortened(&*error.message, Self::MAX_MESSAGE).into_owned(), ..error }
        })?;
        // It is not retried.
        drop(call);
        let Received { message, mut held } = received;
        // The decoded answer is at most as large, and exists beside the encoded one for a while.
        held.grow(message.len()).map_err(|full| unary::no_room(&full))?;
        let limits = to.subsystem.limits;
        let len = message.len();
        self.offload(len, move || read(&message, &limits).map(|read| (read, held))).await?
    }

    fn described(
        to: &Subsystem,
        path: &'static str,
        timeout: Duration,
        (trace, through): (Option<SpanContext>, Option<CallPath>),
        message: Bytes,
    ) -> Call {
        Call { path, timeout, trace, through, message, max_answer: to.limits.max_message_bytes as usize }
    }

    /// Runs `work` on a blocking thread if it is for many bytes.
    async fn offload<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, CallError> {
        let done = offload_within(&self.offloaded, bytes > Self::LONG, work).await;
        done.map_err(|error| outcome::broken(format!("a large message was not processed: {error}")))
    }
}

impl Subsystems for Dialer {
    fn initialize<'a>(&'a self, to: Callee<'a>, call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        Box::pin(async move {
            let message = framed(&request::initialize(to.subsystem, &call));
            let path = "/dreamnet.subsystem.v1.Subsystem/Initialize";
            let call = Self::described(to.subsystem, path, call.timeout, (call.trace, call.path), message);
            // It is empty.
            self.call(to, call, |_, _| Ok(())).await.map(|_| ())
        })
    }

    fn run_cycle<'a>(&'a self, to: Callee<'a>, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let (timeout, caused_by) = (call.timeout, (call.trace.clone(), call.path.clone()));
            let request = request::run_cycle(to.subsystem, call);
            let message = self.offload(request.encoded_len(), move || framed(&request)).await?;
            let path = "/dreamnet.subsystem.v1.Subsystem/RunCycle";
            let call = Self::described(to.subsystem, path, timeout, caused_by, message);
            let (answer, mut held) = self.call(to, call, decode::answer).await?;
            held.resize(decode::size(&answer)).map_err(|full| unary::no_room(&full))?;
            Ok(Reply { answer, held })
        })
    }

    fn get_status<'a>(&'a self, of: Callee<'a>, timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(async move {
            let request = crate::proto::subsystem::v1::GetStatusRequest { subsystem: of.subsystem.name.to_string() };
            let path = "/dreamnet.subsystem.v1.Subsystem/GetStatus";
            let call = Self::described(of.subsystem, path, timeout, (None, None), framed(&request));
            let (status, mut held) = self.call(of, call, decode::status).await?;
            // Fewer than before, so it fits.
            let _ = held.resize(status.len());
            Ok(Snapshot { status, held })
        })
    }

    fn forget(&self, left: &[Left]) {
        let mut endpoints = self.endpoints();
        for Left { endpoint, name, was_last } in left {
            if *was_last {
                endpoints.remove(endpoint);
            } else if let Some(clients) = endpoints.get_mut(endpoint) {
                clients.apart.remove(name);
            }
        }
    }
}

/// Connects to another server than that of a subsystem: to one of these, or without any to that of the endpoint's host.
/// Takes at most `timeout`.
///
/// # Errors
/// The reason, for people.
pub(crate) async fn connect(
    transport: Arc<dyn Transport>,
    endpoint: &Endpoint,
    (tls, reach): (Arc<Tls>, Reach),
    (expected, revoked): (&[Identity], &Revoked),
    timeout: Duration,
) -> Result<Box<dyn Stream>, String> {
    let loaded = tls.current();
    let connector = Connector::new(transport, timeout, tls, reach);
    let opened = connector.open(&Target::of(endpoint, None), &loaded, Instant::now() + timeout).await;
    let (stream, server) = opened.map_err(|Unconnected { why, .. }| why)?;
    let (first, others) = expected.split_first().unzip();
    let checked = server.check(first, revoked);
    let is_other = || others.into_iter().flatten().any(|other| server.check(Some(other), revoked).is_ok());
    match checked {
        Err(why) if !is_other() => Err(why),
        _ => Ok(stream),
    }
}

/// The server that must answer: the one in the registration, or else at an `https` endpoint the owner, if it has
/// registered by a certificate. Without one, the server of the endpoint's host.
fn expected(to: Callee<'_>) -> Option<&Identity> {
    let is_tls = matches!(to.subsystem.endpoint, Endpoint::Https(_));
    let owner = to.owner.filter(|owner| is_tls && matches!(owner, Identity::Certificate(_)));
    to.subsystem.peer.as_ref().or(owner)
}
