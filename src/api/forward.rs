//! Calls that a follower has the leader answer: whole messages go there as they came, and its answer comes back as it
//! arrives, without being read.
//!
//! The follower only identifies the caller, so that strangers get no further, and counts its calls under its limits.
//! The leader judges the call and writes it into the audit: `forwarded` tells it who calls. A call that was not sent is
//! sent again if another replica leads meanwhile; of one that was sent, only its caller knows whether it may be
//! repeated.
//!
//! Each answer says up to which record the leader has acknowledged the history. The follower notes that before it
//! passes the answer on, so that its caller finds there what it was told of. `own` has the follower's own calls.

mod connections;
mod messages;
mod own;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    array,
    future::{pending, poll_fn},
    mem,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
    vec,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use http_body::{Body as _, Frame};
use prost::Message;
use tokio::{
    select,
    sync::watch,
    time::{self, Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{
        Service as _,
        http::{
            self, HeaderMap, HeaderValue,
            header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, TE},
        },
    },
};

pub use self::connections::Connect;
use self::{
    connections::{Connections, Place, WINDOW, in_words, is_late, is_unsent},
    messages::Messages,
};
use super::{
    Answer, Answers, Api,
    caller::Caller,
    calls::{CODES, CountedCall},
    error::{self, NotAnswered},
    forwarded::{self, Said},
    gate::Begun,
    rpc::Rpc,
};
use crate::{
    cluster::Membership,
    memory::{Held, Memory},
    model::{Code, Epoch, Leader, Role, text::shortened},
    orchestrator::{History, Position, Refusal},
    proto::{framing, timeout},
};

/// Has the leader answer calls. All clones share the connections to it.
#[derive(Clone)]
pub struct Forwarder(Arc<Shared>);

struct Shared {
    /// This replica.
    membership: Membership,
    /// What this replica shows of the history.
    history: History,
    /// True while it follows the history of the leader.
    is_current: watch::Sender<bool>,
    /// False while the leader can't be reached, and before one was.
    reaches: AtomicBool,
    connections: Connections,
    /// Memory for what the leader sends ahead.
    answers: Memory,
    counts: Arc<ForwardedCounts>,
    /// Cancelled when open streams are to end.
    ending: CancellationToken,
}

/// Number of ended calls that the leader was to answer.
#[derive(Debug)]
pub struct ForwardedCounts([AtomicU64; CODES]);

impl Default for ForwardedCounts {
    /// None yet.
    fn default() -> Self {
        Self(array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl ForwardedCounts {
    /// All that are not 0, by the code of their answer.
    pub fn iter(&self) -> impl Iterator<Item = (Code, u64)> {
        let counts = (0..).zip(&self.0).map(|(code, calls)| (Code::from_number(code), calls.load(Ordering::Relaxed)));
        counts.filter(|(_, calls)| *calls > 0)
    }
}

/// A call for the leader.
pub(super) struct Outgoing {
    pub(super) rpc: Rpc,
    pub(super) caller: Caller,
    /// Counts it under the limits of its caller.
    pub(super) begun: Begun,
    /// Counts it, unless it is counted elsewhere.
    pub(super) counted: Option<CountedCall>,
    pub(super) headers: HeaderMap,
    /// The message, with its prefix, in pieces.
    pub(super) message: Vec<Bytes>,
    /// Waits until the caller loses the right to the answer.
    pub(super) lapse: Option<BoxFuture<'static, Status>>,
}

impl Forwarder {
    /// Longest time for the last answers of a replica after another one leads.
    const LAST_ANSWERS: Duration = Duration::from_secs(5);

    /// Has the leader that this replica knows answer calls, over connections made by `connect`, within this time, each
    /// with at most `max_calls` calls. What it acknowledges is shown in `history`. What it sends ahead takes memory
    /// from `answers`.
    pub fn new(
        membership: Membership,
        history: History,
        connect: (Connect, Duration),
        max_calls: u32,
        answers: Memory,
    ) -> Self {
        let connections = Connections::new(connect, max_calls);
        let (is_current, reaches, counts, ending) = Default::default();
        Self(Arc::new(Shared { membership, history, is_current, reaches, connections, answers, counts, ending }))
    }

    /// Number of ended calls that the leader was to answer.
    pub fn counts(&self) -> Arc<ForwardedCounts> {
        self.0.counts.clone()
    }

    /// Uses new connections from now on, since other servers may be trusted.
    pub fn connect_anew(&self) {
        self.0.connections.leave_all();
    }

    /// Ends open streams, and those that begin from now on: the process ends.
    pub fn end_streams(&self) {
        self.0.ending.cancel();
    }

    /// True while the history of this replica follows that of the leader.
    pub(super) fn is_current(&self) -> bool {
        *self.0.is_current.borrow()
    }

    /// False while the leader can't be reached, and before one was: see [`Forwarder::keep_contact`].
    pub(super) fn reaches_leader(&self) -> bool {
        self.0.reaches.load(Ordering::Relaxed)
    }

    /// True while this replica does not lead.
    pub(super) fn follows(&self) -> bool {
        self.0.membership.role().epoch().is_none()
    }

    /// Has the leader answer a call. Its answer ends early when the caller may no longer have it, and when another
    /// replica leads.
    ///
    /// # Errors
    /// There is no answer.
    pub(super) async fn send(&self, call: Outgoing) -> Result<http::Response<Body>, Status> {
        let Outgoing { rpc, caller, begun, counted, headers, message, lapse } = call;
        let mut counted = Counted { counts: self.0.counts.clone(), call: counted, code: Code::Cancelled };
        let sent = self.try_send(rpc, &caller, headers, message).await;
        let Sent { response, leader, place, room } = match sent {
            Ok(sent) => sent,
            Err(status) => {
                counted.failed(&status);
                return Err(status);
            }
        };
        counted.ended(response.headers());
        let (roles, of, ending) = (self.0.membership.roles(), leader.clone(), self.0.ending.clone());
        let ends = async move {
            let lapse = lapse.unwrap_or_else(|| pending().boxed());
            let ending = async { if rpc.streams() { ending.cancelled().await } else { pending().await } };
            select! {
                biased;
                status = lapse => status,
                why = superseded(roles, &of) => error::not_answered(&of, &NotAnswered::Lost(why)),
                () = ending => error::status(Refusal::Draining),
            }
        };
        let kept = Kept { _place: place, _room: room, _begun: begun };
        let passing = |body| Passing { body, ends: ends.boxed(), leader, counted, _kept: kept, is_over: false };
        Ok(response.map(|body| Body::new(passing(body))))
    }

    /// Has the leader answer a call whose answer is one message, and which is counted elsewhere.
    pub(super) async fn only<Q: Message, A: Message + Default>(
        &self,
        rpc: Rpc,
        caller: Caller,
        begun: Begun,
        request: &Q,
    ) -> Result<A, Status> {
        let (headers, message) = (headers(&caller)?, vec![framing::framed(request)]);
        let answer = self.send(Outgoing { rpc, caller, begun, counted: None, headers, message, lapse: None }).await?;
        Messages::of(answer, self.0.answers.clone())?.only().await
    }

    async fn try_send(
        &self,
        rpc: Rpc,
        caller: &Caller,
        mut headers: HeaderMap,
        message: Vec<Bytes>,
    ) -> Result<Sent, Status> {
        describe(caller, &self.0.membership.replica().name, &mut headers)?;
        if caller.was_forwarded {
            return Err(error::not_leader(&self.0.membership));
        }
        self.deliver(rpc, headers, message, caller.arrived).await
    }

    /// Sends a request whose headers `arrived` then, and notes what the answer says of the history.
    async fn deliver(
        &self,
        rpc: Rpc,
        headers: HeaderMap,
        message: Vec<Bytes>,
        arrived: Instant,
    ) -> Result<Sent, Status> {
        let room = self.0.answers.try_hold(WINDOW as usize).map_err(|full| error::status(Refusal::MemoryFull(full)))?;
        let mut request = http::Request::new(message);
        let path = rpc.path().and_then(|path| path.parse().ok());
        *request.uri_mut() = path.ok_or_else(|| Status::internal("this call has no path"))?;
        (*request.method_mut(), *request.version_mut()) = (http::Method::POST, http::Version::HTTP_2);
        *request.headers_mut() = headers;
        let mut roles = self.0.membership.roles();
        let mut may_repeat = true;
        loop {
            let role = roles.borrow_and_update().clone();
            let Role::Follower { leader: Some(leader) } = &role else {
                return Err(error::not_leader(&self.0.membership));
            };
            let (why, was_connected) = match self.send_to(leader, &request, arrived, roles.clone()).await {
                Ok((mut response, place)) => {
                    let Said { acknowledged, settings } = Said::take(response.headers_mut());
                    if let Some(newest) = acknowledged {
                        self.note(newest, leader.epoch).await;
                    }
                    if let Some(settings) = settings {
                        self.0.membership.compare_settings(&settings);
                    }
                    return Ok(Sent { response, leader: leader.clone().into(), place, room });
                }
                Err(Failed::Late) => return Err(Status::deadline_exceeded("the deadline of the call has passed")),
                Err(Failed::Sent(why)) => return Err(error::not_answered(leader, &NotAnswered::Lost(&why))),
                Err(Failed::Unsent { why, was_connected }) => (why, was_connected),
            };
            // A connection ends between two calls, or with a leader that another replica has replaced.
            let may_help = was_connected || roles.has_changed().unwrap_or_default();
            if !mem::take(&mut may_repeat) || !may_help {
                return Err(error::not_answered(leader, &NotAnswered::Unreachable(&why)));
            }
        }
    }

    /// Notes up to which record the leader of this epoch has acknowledged its history. If it can't be compared in time
    /// with what is known, that is left to the stream.
    async fn note(&self, newest: Position, by: Epoch) {
        const TO_COMPARE: Duration = Duration::from_secs(2);
        match time::timeout(TO_COMPARE, self.0.history.compare(newest, by)).await {
            Ok(Ok(())) => self.0.history.raise(newest),
            Ok(Err(refusal)) => tracing::debug!(%refusal, "what the leader has acknowledged is not noted"),
            Err(_) => tracing::debug!("what the leader has acknowledged is not noted: the store does not answer"),
        }
    }

    /// Sends a request to this leader, and waits for the beginning of its answer.
    async fn send_to(
        &self,
        leader: &Leader,
        request: &http::Request<Vec<Bytes>>,
        arrived: Instant,
        roles: watch::Receiver<Role>,
    ) -> Result<(http::Response<Body>, Place), Failed> {
        let unsent = |was_connected| move |why: Arc<str>| Failed::Unsent { why, was_connected };
        let at = leader.replica.address.as_ref();
        let at = at.ok_or_else(|| unsent(false)("it has no cluster.advertise in its configuration".into()))?;
        let mut place = self.0.connections.place(leader, at).await.map_err(unsent(false))?;
        let mut request = request.clone().map(|message| Body::new(Pieces(message.into_iter())));
        if let Some(timeout) = timeout::read(request.headers())
            && let Ok(left) = timeout::text(timeout.saturating_sub(arrived.elapsed())).parse()
        {
            request.headers_mut().insert(timeout::HEADER, left);
        }
        request.headers_mut().insert(forwarded::EPOCH, leader.epoch.0.into());
        let answer = async {
            poll_fn(|cx| place.channel.poll_ready(cx)).await?;
            place.channel.call(request).await
        };
        let answer = select! {
            biased;
            answer = answer => answer,
            why = superseded(roles, leader) => return Err(Failed::Sent(why.into())),
        };
        match answer {
            Ok(response) => match not_grpc(&response) {
                None => Ok((response, place)),
                Some(failed) => Err(failed),
            },
            Err(error) if is_late(&error) => Err(Failed::Late),
            Err(error) if is_unsent(&error) => {
                self.0.connections.leave(&place);
                Err(Failed::Unsent { why: in_words(&error).into(), was_connected: true })
            }
            Err(error) => Err(Failed::Sent(in_words(&error).into())),
        }
    }
}

/// What a response means that is no answer of a gRPC server: another server is at the address of the leader, or before
/// it. `None` if it is one.
fn not_grpc(response: &http::Response<Body>) -> Option<Failed> {
    let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("no type");
    let status = response.status();
    // A gRPC server refuses large headers so, too.
    let is_grpc = status == http::StatusCode::OK && kind.starts_with("application/grpc");
    if is_grpc || status == http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE {
        return None;
    }
    let why = format!(
        "its answer, with the HTTP status {status} and {}, is not that of a gRPC server: check its cluster.advertise",
        shortened(kind, 64)
    );
    // A proxy may have passed the call on before it failed, but not one that has refused the request itself.
    Some(if status.is_client_error() || status.is_redirection() {
        Failed::Unsent { why: why.into(), was_connected: false }
    } else {
        Failed::Sent(why.into())
    })
}

/// A call whose answer has begun.
struct Sent {
    response: http::Response<Body>,
    leader: Arc<Leader>,
    place: Place,
    room: Held,
}

/// Why an answer has not begun.
enum Failed {
    /// Nothing was sent.
    Unsent {
        why: Arc<str>,
        /// True if there was a connection, which had ended.
        was_connected: bool,
    },
    /// Its deadline has passed.
    Late,
    /// The call may have taken effect.
    Sent(Arc<str>),
}

/// Waits until another replica than this leader has led for some time, in which its last answers can come. Returns why
/// no more of them are awaited.
async fn superseded(mut roles: watch::Receiver<Role>, leader: &Leader) -> &'static str {
    if roles.wait_for(|role| is_other(role, leader)).await.is_err() {
        // The role does not change any more.
        pending::<()>().await;
    }
    sleep(Forwarder::LAST_ANSWERS).await;
    "another replica leads"
}

/// True if a replica of this role knows that another one than `leader` leads.
fn is_other(role: &Role, leader: &Leader) -> bool {
    match role {
        Role::Leader { .. } => true,
        Role::Follower { leader: Some(other) } => other != leader,
        // It may be the same again.
        Role::Follower { leader: None } => false,
    }
}

/// Puts the caller into the headers of a request, and removes what belongs to its connection.
///
/// # Errors
/// The caller is too large for the headers.
fn describe(caller: &Caller, replica: &str, headers: &mut HeaderMap) -> Result<(), Status> {
    let (described, authorization) = caller.described(replica);
    let described = described.to_header().ok_or_else(|| {
        Status::resource_exhausted(
            "the certificates of the caller are too large to be forwarded; make the call to the leader, which \
             GetStatus names, or send fewer intermediate certificates",
        )
    })?;
    for of_connection in [CONNECTION, CONTENT_LENGTH, HOST] {
        headers.remove(of_connection);
    }
    headers.insert(forwarded::HEADER, described);
    if let Some(authorization) = authorization.filter(|_| !headers.contains_key(AUTHORIZATION)) {
        headers.insert(AUTHORIZATION, authorization);
    }
    Ok(())
}

/// The pieces of a message, as the body of a request.
struct Pieces(vec::IntoIter<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.next().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_slice().is_empty()
    }
}

/// A call that is counted once its answer has ended. One that its caller ended is CANCELLED.
struct Counted {
    counts: Arc<ForwardedCounts>,
    call: Option<CountedCall>,
    code: Code,
}

impl Counted {
    /// Records the status in these headers or trailers, if they have one.
    fn ended(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.failed(&status);
        }
    }

    /// Records the status of the answer.
    fn failed(&mut self, status: &Status) {
        self.code = Code::from_number(status.code() as i32);
        if let Some(call) = &mut self.call {
            call.answered((status.code() != tonic::Code::Ok).then_some(status));
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counts.0[self.code as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// What an answer keeps to its end.
struct Kept {
    _place: Place,
    /// Memory for what the leader sends ahead.
    _room: Held,
    _begun: Begun,
}

/// The body of an answer of the leader, as it arrives. If it breaks off, its caller gets a status.
struct Passing {
    body: Body,
    /// Why it ends before its end.
    ends: BoxFuture<'static, Status>,
    leader: Arc<Leader>,
    counted: Counted,
    _kept: Kept,
    is_over: bool,
}

impl Passing {
    /// The last frame, with this status.
    fn end(&mut self, status: &Status) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.is_over = true;
        self.counted.failed(status);
        Poll::Ready(Some(framing::trailers(status)))
    }
}

impl http_body::Body for Passing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        // First, so that an answer without a pause ends as well.
        if let Poll::Ready(status) = self.ends.poll_unpin(cx) {
            return self.end(&status);
        }
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            broken => {
                let why = broken.and_then(Result::err).map_or("it has ended".to_owned(), |error| in_words(&error));
                let status = error::not_answered(&self.leader, &NotAnswered::Lost(&why));
                return self.end(&status);
            }
        };
        if let Some(trailers) = frame.trailers_ref() {
            self.counted.ended(trailers);
            self.is_over = true;
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }
}

/// Reads the whole message of a request, in pieces. Its memory is held as long as the body.
async fn read(body: &mut Body) -> Result<Vec<Bytes>, Status> {
    let mut pieces = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
        pieces.extend(frame?.into_data());
    }
    Ok(pieces)
}

impl Api {
    /// The same RPCs, which the leader answers while this replica does not lead. Without a `forwarder`, they have no
    /// answer then.
    #[must_use]
    pub fn forwarding(self, forwarder: Option<Forwarder>) -> Self {
        Self { forwarder, ..self }
    }

    /// Has the leader answer a call over gRPC that has begun, once its message has arrived.
    pub(super) async fn forward(
        self,
        forwarder: Forwarder,
        rpc: Rpc,
        caller: Caller,
        begun: Begun,
        request: http::Request<Body>,
    ) -> Result<http::Response<Body>, Status> {
        let mut counted = self.gate.counted(rpc, Some(&caller));
        let (head, mut body) = request.into_parts();
        let arrived = read(&mut body).await;
        let message = arrived.and_then(|message| self.gate.has_arrived(&begun, &caller, rpc.name()).map(|()| message));
        let message = message.inspect_err(|status| counted.answered(Some(status)))?;
        let lapse = self.lapse(rpc, &caller);
        let (counted, headers) = (Some(counted), head.headers);
        forwarder.send(Outgoing { rpc, caller, begun, counted, headers, message, lapse }).await
    }

    /// Makes a call of the admin address: here, or by asking the leader.
    ///
    /// # Errors
    /// The status of the call.
    pub(crate) async fn unary<Q, A, F>(
        &self,
        rpc: &str,
        request: Request<Q>,
        here: impl FnOnce(Self, Request<Q>) -> F,
    ) -> Result<A, Status>
    where
        Q: Message,
        A: Message + Default,
        F: Future<Output = Answer<A>>,
    {
        let rpc = known(rpc)?;
        let Some(forwarder) = self.forwards(rpc) else {
            return here(self.clone(), request).await.map(Response::into_inner);
        };
        self.only(forwarder, rpc, request).await
    }

    /// Has the leader answer a call whose answer is one message.
    pub(super) async fn only<Q: Message, A: Message + Default>(
        &self,
        forwarder: &Forwarder,
        rpc: Rpc,
        request: Request<Q>,
    ) -> Result<A, Status> {
        self.ask(forwarder, rpc, request).await?.only().await
    }

    /// Makes a call of the admin address whose answer is a stream: here, or by asking the leader.
    ///
    /// # Errors
    /// The status of the call.
    pub(crate) async fn streaming<Q, A, F>(
        &self,
        rpc: &str,
        request: Request<Q>,
        here: impl FnOnce(Self, Request<Q>) -> F,
    ) -> Result<Answers<A>, Status>
    where
        Q: Message,
        A: Message + Default + 'static,
        F: Future<Output = Answer<Answers<A>>>,
    {
        let rpc = known(rpc)?;
        let Some(forwarder) = self.forwards(rpc) else {
            return here(self.clone(), request).await.map(Response::into_inner);
        };
        let answer = self.ask(forwarder, rpc, request).await?;
        let messages = stream::unfold(Some(answer), |answer| async {
            let mut answer = answer?;
            match answer.next().await.transpose()? {
                Ok(message) => Some((Ok(message), Some(answer))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(messages.boxed())
    }

    /// Has the leader answer a call of the admin address.
    async fn ask<Q: Message, A: Message + Default>(
        &self,
        forwarder: &Forwarder,
        rpc: Rpc,
        request: Request<Q>,
    ) -> Result<Messages<A>, Status> {
        let (_, mut extensions, message) = request.into_parts();
        let mut counted = self.gate.counted(rpc, extensions.get());
        let arrived = self.gate.arrive(rpc, &mut extensions);
        let (caller, begun) = arrived.inspect_err(|status| counted.answered(Some(status)))?;
        let room = self.gate.room(message.encoded_len()).inspect_err(|status| counted.answered(Some(status)))?;
        let (message, headers) = (vec![framing::framed(&message)], headers(&caller)?);
        let lapse = self.lapse(rpc, &caller);
        let counted = Some(counted);
        let answer = forwarder.send(Outgoing { rpc, caller, begun, counted, headers, message, lapse }).await?;
        drop(room);
        Messages::of(answer, forwarder.0.answers.clone())
    }

    /// Waits until the caller of a stream may no longer have it.
    fn lapse(&self, rpc: Rpc, caller: &Caller) -> Option<BoxFuture<'static, Status>> {
        self.gate.judge.lapse(caller, rpc).filter(|_| rpc.streams())
    }
}

/// The RPC with this name.
fn known(name: &str) -> Result<Rpc, Status> {
    Rpc::of_name(name).ok_or_else(|| Status::internal("an unknown RPC"))
}

/// The headers of all calls over gRPC.
fn headers_of_grpc() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers
}

/// The headers of a call over gRPC, with the trace of its caller.
fn headers(caller: &Caller) -> Result<HeaderMap, Status> {
    let value = |text: String| HeaderValue::try_from(text).map_err(|_| Status::internal("a trace is no header"));
    let mut headers = headers_of_grpc();
    if let Some(trace) = &caller.trace {
        headers.insert("traceparent", value(trace.to_string())?);
        if let Some(state) = trace.state.as_deref() {
            headers.insert("tracestate", value(state.to_owned())?);
        }
    }
    Ok(headers)
}
