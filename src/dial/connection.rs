//! One HTTP/2 connection: a task that connects, waits for the peer's settings, and then transfers the data of its
//! calls.

use std::{future::poll_fn, io, pin::Pin, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

use super::{
    connect::{Connector, Target, Unconnected},
    counts::Step,
    outcome,
    server::Server,
    tls::{Loaded, Tls},
    wire::{Seen, Watched},
};
use crate::ports::{CallError, ConnectionFault};

/// Most bytes of headers and trailers in an answer, including error messages. Enough for several stack traces.
pub(super) const MAX_HEADERS: u32 = 128 << 10;
/// Bytes that a peer may send ahead for one call. This memory is reserved before each call.
pub(super) const STREAM_WINDOW: u32 = 64 << 10;
/// Bytes that a peer may send ahead for all calls on a connection.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Most cancelled calls whose late answers are ignored. To the library, frames of a call that it has forgotten violate
/// the protocol, and it closes a connection on 1,024 of them. By default it remembers 50 calls for a second: a cycle
/// that is cancelled with a thousand calls would end the connection of the calls of others.
const REMEMBERED: usize = 4096;
/// How long they are remembered: a peer that is told of the end of a call sends nothing more, but what it has sent
/// before may wait in buffers.
const REMEMBERED_FOR: Duration = Duration::from_secs(30);

/// A connection that is being made, is in use, or has ended. It is closed when its last handle is dropped.
pub(super) struct Connection {
    phase: watch::Receiver<Phase>,
    /// Cancelled once it no longer connects. Wakes calls in the order in which they wait, unlike `phase`.
    settled: CancellationToken,
    seen: Arc<Seen>,
    /// The TLS that it was made with, if its target has TLS.
    tls: Option<Arc<Loaded>>,
    task: AbortOnDropHandle<()>,
}

#[derive(Clone)]
enum Phase {
    Connecting,
    Ready(SendRequest<Bytes>, Arc<Server>),
    /// Why it is not usable.
    Over(CallError),
}

impl Connection {
    /// Starts to connect.
    pub(super) fn begin(connector: Arc<Connector>, target: Arc<Target>) -> Self {
        let seen = Arc::new(Seen::default());
        let ((tell, phase), settled) = (watch::channel(Phase::Connecting), CancellationToken::new());
        let tls = connector.tls.current();
        let of_target = Some(tls.clone()).filter(|_| target.is_tls());
        let task = AbortOnDropHandle::new(tokio::spawn(live(
            connector,
            target,
            tls,
            seen.clone(),
            (tell, settled.clone().drop_guard()),
        )));
        Self { phase, settled, seen, tls: of_target, task }
    }

    /// The handle for calls, once it is connected, and the server.
    ///
    /// # Errors
    /// There is no connection.
    pub(super) async fn ready(&self) -> Result<(SendRequest<Bytes>, Arc<Server>), CallError> {
        self.settled.cancelled().await;
        match &*self.phase.borrow() {
            Phase::Ready(send, server) => Ok((send.clone(), server.clone())),
            Phase::Over(why) => Err(why.clone()),
            Phase::Connecting => Err(outcome::unavailable("its connection was abandoned")),
        }
    }

    /// True if it is no longer usable.
    pub(super) fn is_over(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Over(_)) || self.phase.has_changed().is_err()
    }

    /// True if its server must be verified again: it was made with other TLS than connections have now, or a
    /// certificate of its server has expired.
    pub(super) fn is_outdated(&self, tls: &Tls) -> bool {
        let Some(made_with) = &self.tls else { return false };
        !Arc::ptr_eq(made_with, &tls.current())
            || matches!(&*self.phase.borrow(), Phase::Ready(_, server) if server.has_expired(made_with.now()))
    }

    /// The observed traffic.
    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Closes it without notice to its calls.
    pub(super) async fn cut(&self) {
        self.task.abort();
        let mut phase = self.phase.clone();
        // Aborting the task drops the sender.
        while phase.changed().await.is_ok() {}
    }
}

async fn live(
    connector: Arc<Connector>,
    target: Arc<Target>,
    tls: Arc<Loaded>,
    seen: Arc<Seen>,
    (tell, connecting): (watch::Sender<Phase>, DropGuard),
) {
    let deadline = Instant::now() + connector.timeout;
    let over = |why: CallError| {
        tracing::debug!(endpoint = ?target, why = why.message, "connection");
        tell.send_replace(Phase::Over(why));
    };
    let unconnected = |Unconnected { step, why, was_refused }| {
        connector.counts.failed(step);
        over(CallError { fault: was_refused.then_some(ConnectionFault::Refused), ..outcome::unavailable(why) });
    };
    let (stream, server) = match connector.open(&target, &tls, deadline).await {
        Ok(opened) => opened,
        Err(why) => return unconnected(why),
    };
    let no_http2 = |why| unconnected(Step::Http2.failed()(why));
    let handshake = Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_reset_streams(REMEMBERED)
        .reset_stream_duration(REMEMBERED_FOR)
        .handshake::<_, Bytes>(Watched::new(stream, seen.clone()));
    let failed = |error: &h2::Error| match error.get_io() {
        Some(io) if has_left(io, &target) => silent(&target),
        _ => outcome::of_connection(error),
    };
    let (send, mut connection) = match handshake.await {
        Ok(made) => made,
        Err(error) => return no_http2(failed(&error)),
    };
    // Only the settings show that the peer speaks HTTP/2, and how many concurrent calls it accepts.
    let settled = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
        Poll::Ready(ended) => Poll::Ready(Some(ended)),
        Poll::Pending if seen.is_settled() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    });
    match timeout_at(deadline, settled).await {
        Ok(None) => {}
        Ok(Some(Ok(()))) => return no_http2(silent(&target)),
        Ok(Some(Err(error))) => return no_http2(failed(&error)),
        Err(_) => {
            let why = format!("it accepted the connection and sent nothing within {:?}", connector.timeout);
            return no_http2(why);
        }
    }
    let _open = connector.counts.clone().opened();
    tell.send_replace(Phase::Ready(send, Arc::new(server)));
    drop(connecting);
    over(outcome::unavailable(match connection.await {
        Ok(()) => "it closed the connection".into(),
        Err(error) => outcome::of_connection(&error),
    }));
}

/// True if a peer has closed the connection. With TLS, it may have done so without a word, or before it read what it
/// was sent: then the connection is reset.
fn has_left(error: &io::Error, target: &Target) -> bool {
    match error.kind() {
        io::ErrorKind::BrokenPipe => true,
        io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => target.is_tls(),
        _ => false,
    }
}

/// The message if a peer closes the connection at the start of HTTP/2. With TLS 1.3, a client learns only then that its
/// certificate was refused, and the reason is often lost.
fn silent(target: &Target) -> String {
    let remedy = if target.is_tls() {
        "it may accept only another certificate than that of the orchestrator (dial.cert_file)"
    } else {
        "if it speaks TLS, give https://"
    };
    format!("it closed the connection before any HTTP/2; {remedy}")
}
