//! The connections to the leader: as many as the open calls need.

use std::{
    convert::identity,
    error::Error,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, ready},
};
use hyper_util::rt::TokioIo;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{
    TimeoutExpired,
    codegen::http::Uri,
    transport::{self, Channel},
};
use tower::service_fn;

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
    /// Most calls on one connection: as many as the leader admits there.
    max_calls: u32,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    to: Option<Leader>,
    connections: Vec<Connection>,
    /// The number of the next connection.
    next: u64,
}

struct Connection {
    number: u64,
    places: Arc<Semaphore>,
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
    /// Most connections: with the default limit of calls on each, twice as many calls as clients can have open.
    const MAX: usize = 64;

    pub(super) fn new(connect: Connect, max_calls: u32) -> Self {
        Self { connect, max_calls, open: Mutex::default() }
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
            *open = Open { to: Some(to.clone()), connections: Vec::new(), next: open.next };
        }
        let free = open.connections.iter().find_map(|connection| {
            let permit = connection.places.clone().try_acquire_owned().ok()?;
            Some((connection.number, Some(permit), connection.made.clone()))
        });
        if let Some(found) = free {
            return Ok(found);
        }
        if open.connections.len() == Self::MAX {
            return Err(format!("all {} connections are full", Self::MAX).into());
        }
        let (number, places) = (open.next, Arc::new(Semaphore::new(self.max_calls as usize)));
        open.next += 1;
        let made = connect(self.connect.clone(), at.clone(), self.max_calls).boxed().shared();
        let permit = places.clone().try_acquire_owned().ok();
        open.connections.push(Connection { number, places, made: made.clone() });
        Ok((number, permit, made))
    }

    /// Makes no further call on this connection.
    pub(super) fn leave(&self, place: &Place) {
        self.forget(place.number);
    }

    fn forget(&self, number: u64) {
        self.open().connections.retain(|connection| connection.number != number);
    }

    /// Makes no further call on the present connections.
    pub(super) fn leave_all(&self) {
        self.open().connections.clear();
    }
}

async fn connect(connect: Connect, at: Endpoint, max_calls: u32) -> Result<Channel, Arc<str>> {
    let stream = connect(at.clone()).await?;
    // The library would connect again by itself, and let each waiting call wait for another attempt.
    let mut once = Some(TokioIo::new(stream));
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
    channel.map_err(|error| in_words(&error).into())
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
