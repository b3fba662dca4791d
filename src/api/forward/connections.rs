//! The connections to the leader: as many as the open calls need.

use std::{
    convert::identity,
    error::Error,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, ready},
};
use hyper_util::rt::TokioIo;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    TimeoutExpired,
    codegen::http::Uri,
    transport::{self, Channel},
};
use tower::service_fn;

use super::socket::Socket;
use crate::{
    model::{Endpoint, Leader},
    transport::Stream,
};

/// Connects to the gRPC server of another replica, after it has checked that it is one. The error is for people.
pub type Connect = Arc<dyn Fn(Endpoint) -> BoxFuture<'static, Result<Box<dyn Stream>, String>> + Send + Sync>;

/// Bytes that the leader may send ahead in one call. They are in no other memory until the caller reads them.
pub(super) const WINDOW: u32 = 32 << 10;

/// The connections to one leader at a time.
pub(super) struct Connections {
    connect: Connect,
    /// Longest time until a connection is there and its server has begun HTTP/2.
    timeout: Duration,
    /// Most calls on one connection: as many as the leader admits there.
    max_calls: u32,
    open: Mutex<Open>,
}

struct Open {
    to: Option<Leader>,
    connections: Vec<Connection>,
    /// A permit for each connection that is being made or has not ended, also if it gets no further calls.
    room: Arc<Semaphore>,
    /// The number of the next connection.
    next: u64,
}

impl Open {
    /// No connections to this leader yet.
    fn to(to: Option<Leader>, next: u64) -> Self {
        Self { to, connections: Vec::new(), room: Arc::new(Semaphore::new(Connections::MAX)), next }
    }
}

struct Connection {
    number: u64,
    places: Arc<Semaphore>,
    /// Dropped when it has ended.
    open: Weak<OwnedSemaphorePermit>,
    made: Making,
}

/// A connection that is being made, or was made. All calls that wait for it share the attempt, and its error.
type Making = Shared<BoxFuture<'static, Result<Channel, Arc<str>>>>;

/// A place for a call.
pub(super) struct Place {
    /// The connection. It is not made anew when it ends.
    pub(super) channel: Channel,
    number: u64,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Connections {
    /// Most connections to a leader: with the default limit of calls on each, twice as many calls as clients can have
    /// open.
    pub(super) const MAX: usize = 64;

    pub(super) fn new((connect, timeout): (Connect, Duration), max_calls: u32) -> Self {
        Self { connect, timeout, max_calls, open: Mutex::new(Open::to(None, 0)) }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // A panic leaves them usable.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place on a connection to this leader, where it is `at`. Connections to an earlier leader are not used any
    /// more, and end with their calls.
    ///
    /// # Errors
    /// There is no connection, for this reason. Nothing was sent.
    pub(super) async fn place(&self, to: &Leader, at: &Endpoint) -> Result<Place, Arc<str>> {
        let (number, permit, made) = self.find(to, at)?;
        match made.await {
            Ok(channel) => Ok(Place { channel, number, _permit: permit }),
            Err(why) => {
                self.forget(number);
                Err(why)
            }
        }
    }

    fn find(&self, to: &Leader, at: &Endpoint) -> Result<(u64, Option<OwnedSemaphorePermit>, Making), Arc<str>> {
        let mut open = self.open();
        if open.to.as_ref() != Some(to) {
            *open = Open::to(Some(to.clone()), open.next);
        }
        open.connections.retain(|connection| connection.open.strong_count() > 0);
        let free = open.connections.iter().find_map(|connection| {
            let permit = connection.places.clone().try_acquire_owned().ok()?;
            Some((connection.number, Some(permit), connection.made.clone()))
        });
        if let Some(found) = free {
            return Ok(found);
        }
        let room = open.room.clone().try_acquire_owned();
        let room = Arc::new(room.map_err(|_| format!("all {} connections are in use", Self::MAX))?);
        let (number, places) = (open.next, Arc::new(Semaphore::new(self.max_calls as usize)));
        open.next += 1;
        let still_open = Arc::downgrade(&room);
        let made = connect((self.connect.clone(), self.timeout), at.clone(), self.max_calls, room);
        // It goes on if the first call does not wait for it.
        let made = AbortOnDropHandle::new(tokio::spawn(made))
            .map(|made| made.unwrap_or_else(|_| Err(Ended.to_string().into())));
        let made = made.boxed().shared();
        let permit = places.clone().try_acquire_owned().ok();
        open.connections.push(Connection { number, places, open: still_open, made: made.clone() });
        Ok((number, permit, made))
    }

    /// Makes no further call on this connection, since it takes none.
    pub(super) fn leave(&self, place: &Place) {
        self.forget(place.number);
    }

    fn forget(&self, number: u64) {
        self.open().connections.retain(|connection| connection.number != number);
    }

    /// Makes no further call on the present connections. They don't count any more, since streams on them may stay open
    /// for days.
    pub(super) fn leave_all(&self) {
        let mut open = self.open();
        *open = Open::to(open.to.take(), open.next);
    }
}

async fn connect(
    (connect, timeout): (Connect, Duration),
    at: Endpoint,
    max_calls: u32,
    open: Arc<OwnedSemaphorePermit>,
) -> Result<Channel, Arc<str>> {
    let deadline = Instant::now() + timeout;
    let (socket, settled) = Socket::new(connect(at.clone()).await?, open);
    // The library would connect again by itself, and let each waiting call wait for another attempt.
    let mut once = Some(TokioIo::new(socket));
    let connector = service_fn(move |_: Uri| ready(once.take().ok_or(Ended)));
    let channel = async {
        let (Endpoint::Http(origin) | Endpoint::Https(origin) | Endpoint::Unix(origin)) = &at;
        let authority = origin.split_once("://").map_or(origin.as_str(), |(_, authority)| authority);
        // The library refuses https:// without its own TLS.
        let endpoint = transport::Endpoint::from_shared(format!("http://{authority}"))?;
        let origin = origin.parse().map(|origin| endpoint.clone().origin(origin)).unwrap_or(endpoint);
        let limited = origin
            .initial_stream_window_size(WINDOW)
            // A caller that does not read its answer keeps no other one waiting.
            .initial_connection_window_size(WINDOW.saturating_mul(max_calls).clamp(WINDOW, i32::MAX as u32));
        limited.connect_with_connector(connector).await
    };
    let channel: Result<_, transport::Error> = channel.await;
    let channel = channel.map_err(|error| in_words(&error))?;
    // Otherwise the first calls would wait for a server that says nothing, or be lost to another one.
    match timeout_at(deadline, settled).await {
        Ok(Ok(settled)) => settled.map(|()| channel).map_err(Into::into),
        Ok(Err(_)) => Err(Ended.to_string().into()),
        Err(_) => Err(format!("it accepted the connection and sent nothing within {timeout:?}").into()),
    }
}

/// The connection has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the connection has ended")]
struct Ended;

/// True if a call with this error was certainly not sent, since its connection had ended before.
pub(super) fn is_unsent(error: &transport::Error) -> bool {
    causes(error).any(<dyn Error>::is::<Ended>)
}

/// True if a call has failed with this error since its deadline has passed.
pub(super) fn is_late(error: &transport::Error) -> bool {
    causes(error).any(<dyn Error>::is::<TimeoutExpired>)
}

/// The innermost cause, which says the most.
pub(super) fn in_words(error: &(dyn Error + 'static)) -> String {
    causes(error).last().map_or_else(|| error.to_string(), ToString::to_string)
}

fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| identity(*error).source())
}
