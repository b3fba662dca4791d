//! The client of one endpoint: all calls share one connection, which is made on first use, and again after it is lost.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{
    Uri,
    uri::{Authority, PathAndQuery},
};

use super::{
    connect::{Connector, Target},
    connection::{Connection, STREAM_WINDOW},
    counts::Step,
    outcome,
    server::Server,
    unary::{self, Call, Failed},
};
use crate::{
    memory::{Held, Memory},
    model::{Endpoint, Identity},
    ports::CallError,
};

/// Calls the services at one endpoint.
pub struct Client {
    connector: Arc<Connector>,
    target: Arc<Target>,
    authority: Authority,
    /// The memory for answers.
    replies: Memory,
    current: Mutex<Option<Arc<Connection>>>,
}

/// The message of an answer, with its memory.
#[derive(Debug)]
pub struct Received {
    /// The encoded message.
    pub message: Vec<u8>,
    /// Its memory.
    pub held: Held,
}

/// Why a call has failed, and its effect on other calls on the connection.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: CallError,
    /// True if its answer broke the connection, or may break it when it is repeated.
    pub(super) breaks_connection: bool,
}

impl Client {
    /// Most attempts of a call that was not sent, because its connection accepted no more calls, or that ended because
    /// another call broke the connection. The subsystem of such a call gets its own connection, so this ends soon.
    const MAX_TRIES: usize = 8;

    pub(super) fn new(endpoint: &Endpoint, connector: Arc<Connector>, replies: Memory) -> Result<Self, CallError> {
        let target = Target::of(endpoint, connector.reach.unix_dir.as_ref());
        let authority = target.authority().try_into();
        let authority = authority.map_err(|error| outcome::unavailable(format!("can't dial {endpoint}: {error}")))?;
        Ok(Self { connector, target: Arc::new(target), authority, replies, current: Mutex::default() })
    }

    /// Waits until there is a connection.
    ///
    /// # Errors
    /// The reason why there is no connection.
    pub async fn connect(&self) -> Result<(), CallError> {
        let connection = self.connection();
        let (_, server) = connection.ready().await?;
        self.check(&server, None)
    }

    /// Checks that a server may be called: that it is this one, or without one that of the endpoint's host.
    fn check(&self, server: &Server, expected: Option<&Identity>) -> Result<(), CallError> {
        server.check(expected, &self.connector.revoked()).map_err(|why| {
            self.connector.counts.failed(Step::Identity);
            outcome::unavailable(why)
        })
    }

    /// Makes a call. Dropping it cancels the call.
    ///
    /// # Errors
    /// It failed: the status of the peer, or UNAVAILABLE if it can't be reached.
    pub async fn call(&self, call: &Call) -> Result<Received, CallError> {
        self.make(call, None).await.map_err(|failure| failure.error)
    }

    /// Makes a call to this server, or without one to that of the endpoint's host. It is transparently retried if it
    /// was certainly not processed, or if another call broke the connection: the contract allows repeated calls.
    pub(super) async fn make(&self, call: &Call, expected: Option<&Identity>) -> Result<Received, Failure> {
        let failure = |error| Failure { error, breaks_connection: false };
        let mut held = match self.replies.try_hold(STREAM_WINDOW as usize) {
            Ok(held) => held,
            Err(_) => self.replies.hold(STREAM_WINDOW as usize).await,
        };
        let mut was_unprocessed = false;
        for _ in 0..Self::MAX_TRIES {
            let connection = self.connection();
            let (send, server) = connection.ready().await.map_err(failure)?;
            self.check(&server, expected).map_err(failure)?;
            match unary::make(call, self.uri(call.path), send, connection.seen(), &mut held).await {
                Ok(message) => {
                    // Less than before, so it fits.
                    let _ = held.resize(message.capacity());
                    return Ok(Received { message, held });
                }
                Err(Failed::NotSent | Failed::CutOff) => self.leave(&connection),
                Err(Failed::Unprocessed(error)) => {
                    // Once, as in gRPC: a second failure is returned, and retried after a pause.
                    if was_unprocessed {
                        return Err(failure(error));
                    }
                    was_unprocessed = true;
                    if connection.seen().is_going_away() {
                        self.leave(&connection);
                    }
                }
                Err(Failed::Call { error, breaks_connection }) => return Err(Failure { error, breaks_connection }),
            }
        }
        Err(failure(outcome::unavailable("its connections end before a call is answered")))
    }

    /// Closes the connection without notice to its calls, and waits until it is closed.
    pub async fn cut(&self) {
        let connection = self.current().take();
        if let Some(connection) = connection {
            connection.cut().await;
        }
    }

    fn uri(&self, path: &'static str) -> Uri {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.target.scheme());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_static(path));
        // All three parts are set.
        Uri::from_parts(parts).unwrap_or_default()
    }

    /// The current connection, or a new one if it is not usable, or its server must be verified again. Calls on the
    /// earlier one keep it until they end.
    fn connection(&self) -> Arc<Connection> {
        let mut current = self.current();
        match &*current {
            Some(connection) if !connection.is_over() && !connection.is_outdated(&self.connector.tls) => {
                connection.clone()
            }
            _ => {
                let connection = Arc::new(Connection::begin(self.connector.clone(), self.target.clone()));
                *current = Some(connection.clone());
                connection
            }
        }
    }

    /// Makes no further call on this connection. It is closed when its calls have ended.
    fn leave(&self, connection: &Arc<Connection>) {
        let mut current = self.current();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection)) {
            *current = None;
        }
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
