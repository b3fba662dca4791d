//! One HTTP/2 connection: a task that connects, waits for the peer's settings, and then moves what its calls send and are
//! sent.

use std::{future::poll_fn, io, pin::Pin, sync::Arc, task::Poll};

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    connect::{Connector, Target},
    outcome,
    wire::{Seen, Watched},
};

/// The most bytes of headers and trailers in an answer, error texts included. Room for several stack traces.
pub(super) const MAX_HEADERS: u32 = 128 << 10;
/// What a peer may send ahead of being read, for one call. It is held as memory for each call before that is made.
pub(super) const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all calls on a connection.
const CONNECTION_WINDOW: u32 = 1 << 20;

/// A connection that is being made, is used, or has ended. When nobody holds it any more it is closed.
pub(super) struct Connection {
    phase: watch::Receiver<Phase>,
    seen: Arc<Seen>,
    task: AbortOnDropHandle<()>,
}

#[derive(Clone)]
enum Phase {
    Connecting,
    Ready(SendRequest<Bytes>),
    /// Why it can't be used.
    Over(Arc<str>),
}

impl Connection {
    /// Begins to connect.
    pub(super) fn begin(connector: Arc<Connector>, target: Arc<Target>) -> Self {
        let seen = Arc::new(Seen::default());
        let (tell, phase) = watch::channel(Phase::Connecting);
        let task = AbortOnDropHandle::new(tokio::spawn(live(connector, target, seen.clone(), tell)));
        Self { phase, seen, task }
    }

    /// What calls are made with, once it is there.
    ///
    /// # Errors
    /// There is no connection, and why, in words.
    pub(super) async fn ready(&self) -> Result<SendRequest<Bytes>, Arc<str>> {
        let mut phase = self.phase.clone();
        let changed = phase.wait_for(|phase| !matches!(phase, Phase::Connecting)).await;
        match changed.as_deref() {
            Ok(Phase::Ready(send)) => Ok(send.clone()),
            Ok(Phase::Over(why)) => Err(why.clone()),
            Ok(Phase::Connecting) | Err(_) => Err("its connection was given up".into()),
        }
    }

    /// It can't be used any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Over(_)) || self.phase.has_changed().is_err()
    }

    /// What has been seen on it.
    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Cuts it under the feet of its calls: nobody is told.
    pub(super) async fn cut(&self) {
        self.task.abort();
        let mut phase = self.phase.clone();
        // With the task, the teller goes.
        while phase.changed().await.is_ok() {}
    }
}

async fn live(connector: Arc<Connector>, target: Arc<Target>, seen: Arc<Seen>, tell: watch::Sender<Phase>) {
    let deadline = Instant::now() + connector.timeout;
    let over = |why: String| {
        tracing::debug!(endpoint = ?target, why, "connection");
        tell.send_replace(Phase::Over(why.into()));
    };
    let stream = match connector.open(&target, deadline).await {
        Ok(stream) => stream,
        Err(why) => return over(why),
    };
    let handshake = Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADERS)
        .handshake::<_, Bytes>(Watched::new(stream, seen.clone()));
    let (send, mut connection) = match handshake.await {
        Ok(made) => made,
        Err(error) => return over(outcome::of_connection(&error)),
    };
    // Only who has sent its settings speaks HTTP/2, and only then is it known how many calls it takes at one time.
    let settled = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
        Poll::Ready(ended) => Poll::Ready(Some(ended)),
        Poll::Pending if seen.is_settled() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    });
    match timeout_at(deadline, settled).await {
        Ok(None) => {}
        Ok(Some(Ok(()))) => return over(silent()),
        Ok(Some(Err(error))) if error.get_io().is_some_and(|it| it.kind() == io::ErrorKind::BrokenPipe) => {
            return over(silent());
        }
        Ok(Some(Err(error))) => return over(outcome::of_connection(&error)),
        Err(_) => return over(format!("it has taken the connection and said nothing within {:?}", connector.timeout)),
    }
    tell.send_replace(Phase::Ready(send));
    over(match connection.await {
        Ok(()) => "it has closed the connection".into(),
        Err(error) => outcome::of_connection(&error),
    });
}

/// What is said of a peer that hangs up on the first words of HTTP/2.
fn silent() -> String {
    "it has closed the connection without a word of HTTP/2; if it speaks TLS, give https://".into()
}
