//! The client of one endpoint: all calls to it share one connection, which is made when it is first used, and again when
//! it is lost.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{
    Uri,
    uri::{Authority, PathAndQuery},
};

use super::{
    connect::{Connector, Target},
    connection::{Connection, STREAM_WINDOW},
    outcome,
    unary::{self, Call, Failed},
};
use crate::{
    memory::{Held, Memory},
    model::Endpoint,
    ports::CallError,
};

/// Calls what is served at one endpoint.
pub struct Client {
    connector: Arc<Connector>,
    target: Arc<Target>,
    authority: Authority,
    /// Where answers take their memory.
    replies: Memory,
    current: Mutex<Option<Arc<Connection>>>,
}

/// The message of an answer, and the memory that it takes.
#[derive(Debug)]
pub struct Received {
    /// The encoded message.
    pub message: Vec<u8>,
    /// As many bytes as it has.
    pub held: Held,
}

/// Why a call has failed, and what it costs others on its connection.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: CallError,
    /// What was sent in it has cost the connection, or may do so when it comes more often.
    pub(super) breaks_connection: bool,
}

impl Client {
    /// How often a call is made that was not sent, because its connection took no more, or that has ended with its
    /// connection over what another one was sent. Who does that is put apart, so it ends soon.
    const MAX_TRIES: usize = 8;

    pub(super) fn new(endpoint: &Endpoint, connector: Arc<Connector>, replies: Memory) -> Result<Self, CallError> {
        let target = Target::of(endpoint);
        let authority = target.authority().try_into();
        let authority = authority.map_err(|error| outcome::unavailable(format!("can't dial {endpoint}: {error}")))?;
        Ok(Self { connector, target: Arc::new(target), authority, replies, current: Mutex::default() })
    }

    /// Waits until there is a connection.
    ///
    /// # Errors
    /// There is none, and why, in words.
    pub async fn connect(&self) -> Result<(), CallError> {
        let ready = self.connection().ready().await;
        ready.map(|_| ()).map_err(|why| outcome::unavailable(why.to_string()))
    }

    /// Makes a call. Dropping it cancels the call.
    ///
    /// # Errors
    /// It failed: what the peer says, or UNAVAILABLE where it can't be reached.
    pub async fn call(&self, call: &Call) -> Result<Received, CallError> {
        self.make(call).await.map_err(|failure| failure.error)
    }

    /// Makes a call. It is made again, unseen, where the first one has surely not been processed, and where the connection
    /// was lost over what another call was sent: a repeated call is the contract's way to be answered after all.
    pub(super) async fn make(&self, call: &Call) -> Result<Received, Failure> {
        let failure = |error| Failure { error, breaks_connection: false };
        let mut held = match self.replies.try_hold(STREAM_WINDOW as usize) {
            Ok(held) => held,
            Err(_) => self.replies.hold(STREAM_WINDOW as usize).await,
        };
        let mut was_unprocessed = false;
        for _ in 0..Self::MAX_TRIES {
            let connection = self.connection();
            let send = connection.ready().await.map_err(|why| failure(outcome::unavailable(why.to_string())))?;
            match unary::make(call, self.uri(call.path), send, connection.seen(), &mut held).await {
                Ok(message) => {
                    // Less than before, so there is room.
                    let _ = held.resize(message.capacity());
                    return Ok(Received { message, held });
                }
                Err(Failed::NotSent | Failed::CutOff) => self.leave(&connection),
                Err(Failed::Unprocessed(error)) => {
                    // Once, as gRPC has it: what is not processed again is told, and retried after a pause.
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
        Err(failure(outcome::unavailable("its connections end before a call is answered".into())))
    }

    /// Cuts the connection under the feet of its calls, and waits until that is done: nobody is told.
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
        // All three are there.
        Uri::from_parts(parts).unwrap_or_default()
    }

    /// The connection to use, new if there is none that can be used.
    fn connection(&self) -> Arc<Connection> {
        let mut current = self.current();
        match &*current {
            Some(connection) if !connection.is_over() => connection.clone(),
            _ => {
                let connection = Arc::new(Connection::begin(self.connector.clone(), self.target.clone()));
                *current = Some(connection.clone());
                connection
            }
        }
    }

    /// No further call is made on this connection. It goes when those on it have ended.
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
