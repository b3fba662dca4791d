//! RPCs as JSON: parameters and a body become a request, and its response becomes a body.

use std::{collections::HashMap, convert::Infallible, future::Future, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes, HttpBody as _},
    extract::{self, Extension, FromRequest, FromRequestParts, Query, RawPathParams},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use prost::{Message, Name};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::body::{self, Unread};
use crate::{
    api::{Api, Caller},
    memory::{Full, Held, Memory, Shares},
    model,
    offload::offload_within,
    proto::{
        json::{self, JsonError},
        orchestrator::v1::{
            self as pb, cycle_event::Event, ledger_server::Ledger as _, orchestrator_server::Orchestrator as _,
        },
    },
    tasks::joined,
};

const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";
const SSE: &str = "text/event-stream";
/// Parameters that request snapshots of subsystems, in both spellings of proto JSON.
const SNAPSHOTS: [&str; 4] = ["includeSnapshots", "include_snapshots", "includeSnapshot", "include_snapshot"];
const CLOSE: [(header::HeaderName, &str); 1] = [(header::CONNECTION, "close")];

/// The RPCs, and the limits of their answers on this address.
#[derive(Clone)]
pub(super) struct Answers {
    api: Api,
    /// Limits answers that are being prepared: each may hold a large page of the history.
    asking: Arc<Semaphore>,
    /// Limits requests for snapshots, which may wait for slow subsystems and must not use up the other limit.
    asking_subsystems: Arc<Semaphore>,
    /// Limits requests that run or change something, which may wait for a cycle and must leave connections for others.
    changing: Arc<Semaphore>,
    /// Memory for the bodies of requests until they are messages.
    requests: Memory,
    /// JSON is made, or read, one at a time, so that it takes at most one processor from cycles.
    turn: Arc<Semaphore>,
    /// Admits one large answer at a time to the wait for room, since it is already in memory.
    large: Arc<Semaphore>,
    /// Limits large answers that clients have not read yet. Clients may read at any speed.
    memory: Memory,
    /// A part of that, for large answers that wait to become JSON, so that room is left for the text.
    waiting: Memory,
    /// Limits streams of events, and of the log.
    streams: Arc<Semaphore>,
    /// Limits large events that clients have not read yet, separately from answers.
    memory_for_events: Memory,
    /// As `large`, for events.
    large_events: Arc<Semaphore>,
    /// The JSON of the last record and its revision, since most streams send the same record. The lock also admits one
    /// stream at a time, so that streams take at most one processor from cycles.
    recorded: Arc<Mutex<(u64, Named)>>,
}

/// The JSON of an event, and its name in a stream.
#[derive(Clone, Default)]
struct Named {
    name: &'static str,
    text: Bytes,
}

impl Answers {
    /// Most connections with streams, which stay open: the rest are for short requests, above all of the
    /// monitoring system.
    const MAX_STREAMS: usize = 192;
    /// More than there are processors, since some wait for the store.
    const MAX_ASKING: usize = 16;
    /// Enough for the people who use the dashboard.
    const MAX_ASKING_SUBSYSTEMS: usize = 16;
    /// What streams and these leave is enough for the others.
    const MAX_CHANGING: usize = 32;
    /// Most bytes of the body of a request: many times as many as most have.
    const MAX_BODY: usize = 1 << 20;
    /// Most bytes of an answer, before it becomes text, that needs no room: all connections together have few such
    /// bytes.
    const SMALL: usize = 16 << 10;
    /// Longest wait of an answer for room: after that, the clients that hold it are slow. Other requests may have to
    /// wait meanwhile.
    const PATIENCE: Duration = Duration::from_secs(1);

    pub(super) fn new(api: Api, Shares { admin: memory, requests, .. }: &Shares) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let answers = memory.part("answers that clients of the admin address have not read yet", memory.max() / 2);
        Self {
            api,
            asking: semaphore(Self::MAX_ASKING),
            asking_subsystems: semaphore(Self::MAX_ASKING_SUBSYSTEMS),
            changing: semaphore(Self::MAX_CHANGING),
            requests: requests.clone(),
            turn: semaphore(1),
            large: semaphore(1),
            waiting: answers.part("answers that wait to become JSON", answers.max() / 2),
            memory: answers,
            streams: semaphore(Self::MAX_STREAMS),
            memory_for_events: memory
                .part("events that clients of the admin address have not read yet", memory.max() / 2),
            large_events: semaphore(1),
            recorded: Arc::default(),
        }
    }

    /// A place for a stream, until it is dropped.
    fn place_for_stream(&self) -> Result<OwnedSemaphorePermit, Status> {
        let full = |_| {
            let max = Self::MAX_STREAMS;
            Status::resource_exhausted(format!("limit of {max} streams reached; try again later"))
        };
        self.streams.clone().try_acquire_owned().map_err(full)
    }

    /// Makes JSON. If it may take longer than a millisecond, it runs on a blocking thread, one at a time.
    async fn encode(&self, kind: &'static str, bytes: Vec<u8>) -> Result<String, JsonError> {
        let is_long = bytes.len() > Self::SMALL;
        let made = offload_within(&self.turn, is_long, move || json::encode(kind, &bytes)).await;
        // Otherwise the process is ending.
        joined(made).unwrap_or(Err(JsonError::TooLarge))
    }

    /// An event as JSON. A large event is not encoded before its turn: until then it is a shared record, or a page that
    /// has its room.
    async fn event(&self, event: &pb::CycleEvent) -> Result<Named, Status> {
        let is_record = matches!(event.event, Some(Event::Recorded(_)));
        let is_large = event.encoded_len() > Self::SMALL;
        let patience = Instant::now() + Self::PATIENCE;
        let _large = if is_large { self.large_events.acquire().await.ok() } else { None };
        let mut recorded = self.recorded.lock().await;
        if is_record && recorded.0 == event.revision {
            return Ok(recorded.1.clone());
        }
        let (name, text) = match self.encode("CycleEvent", event.encode_to_vec()).await {
            // The stream continues after it.
            Err(JsonError::TooLarge) => {
                let instead = unwritable(event);
                (name_of(&instead), self.encode("CycleEvent", instead.encode_to_vec()).await)
            }
            made => (name_of(event), made),
        };
        let text = text.map_err(failed)?;
        let text = if is_large {
            // The cached text is dropped to make room. Only large events wait here.
            *recorded = Default::default();
            drop(recorded);
            let text = hold(&self.memory_for_events, text, patience).await?;
            recorded = self.recorded.lock().await;
            text
        } else {
            text.into()
        };
        let named = Named { name, text };
        if is_record {
            *recorded = (event.revision, named.clone());
        }
        Ok(named)
    }
}

/// A text that keeps its room until all of it has been sent.
async fn hold(memory: &Memory, text: String, patience: Instant) -> Result<Bytes, Status> {
    let max = memory.max();
    // A text that is larger than the limit takes all of it.
    let wanted = text.capacity().min(max);
    let held = timeout_at(patience, memory.hold(wanted))
        .await
        .map_err(|_| no_room(Full { purpose: memory.purpose(), max, wanted }))?;
    Ok(held.around(text.into()))
}

#[allow(clippy::needless_pass_by_value, reason = "it is for `map_err`")]
fn no_room(full: Full) -> Status {
    Status::resource_exhausted(format!("{full}; {}", full.remedy()))
}

/// A request for JSON: the caller, and the parameters, including those of the path.
pub(super) struct Asked {
    answers: Answers,
    caller: Caller,
    parameters: Vec<(String, String)>,
    headers: HeaderMap,
    /// `None` if the request only reads: then it has no body.
    body: Option<Body>,
}

impl FromRequest<Answers> for Asked {
    type Rejection = Response;

    async fn from_request(request: extract::Request, answers: &Answers) -> Result<Self, Response> {
        let (mut parts, body) = request.into_parts();
        let caller = Extension::from_request_parts(&mut parts, answers).await;
        let Extension(caller) = caller.map_err(IntoResponse::into_response)?;
        let query = Query::from_request_parts(&mut parts, answers).await;
        let Query(mut parameters): Query<Vec<_>> = query.map_err(|error| refused(&invalid(&error.body_text())))?;
        let path = RawPathParams::from_request_parts(&mut parts, answers).await;
        let path = path.map_err(|error| refused(&invalid(&error.body_text())))?;
        parameters.extend(path.iter().map(|(name, value)| (name.to_owned(), value.to_owned())));
        let reads = matches!(parts.method, Method::GET | Method::HEAD);
        let (headers, body) = (parts.headers, (!reads).then_some(body));
        Ok(Self { answers: answers.clone(), caller, parameters, headers, body })
    }
}

impl Asked {
    /// The same request, with another name of a parameter.
    pub(super) fn renamed(mut self, renamed: Option<(&str, &str)>) -> Self {
        if let Some((name, field)) = renamed {
            self.parameters.iter_mut().filter(|(it, _)| it == name).for_each(|(it, _)| field.clone_into(it));
        }
        self
    }

    /// Calls an RPC, and returns its response as JSON.
    pub(super) async fn answer<Q, A, F>(self, rpc: &'static str, call: impl FnOnce(Api, Request<Q>) -> F) -> Response
    where
        Q: Message + Name + Default + 'static,
        A: Message + Name + Default,
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        match self.call(rpc, call).await {
            Ok(text) => ([(header::CONTENT_TYPE, JSON)], text).into_response(),
            Err(status) => refused(&status),
        }
    }

    async fn call<Q, A, F>(self, rpc: &'static str, call: impl FnOnce(Api, Request<Q>) -> F) -> Result<Bytes, Status>
    where
        Q: Message + Name + Default + 'static,
        A: Message + Name + Default,
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let Self { answers, caller, parameters, headers, body } = self;
        let asks_subsystems = parameters.iter().any(|(name, _)| SNAPSHOTS.contains(&name.as_str()));
        let changes = body.is_some();
        let request = match body {
            None => caller.asks(json::from_request(&[], parameters).map_err(|error| invalid(&error))?),
            Some(body) => {
                // Nothing of strangers is read.
                let begun = match answers.api.begin(rpc, &caller) {
                    Ok(begun) => begun,
                    Err(status) => {
                        body::forget(body).await;
                        return Err(status);
                    }
                };
                let read = answers.read(&headers, body, parameters);
                answers.api.receive(rpc, caller, begun, read).await?
            }
        };
        let _permit = if changes {
            try_acquire(&answers.changing, Answers::MAX_CHANGING, "requests that run or change something")?
        } else if asks_subsystems {
            try_acquire(&answers.asking_subsystems, Answers::MAX_ASKING_SUBSYSTEMS, "requests for snapshots")?
        } else {
            answers.asking.acquire().await.map_err(|error| Status::unavailable(error.to_string()))?
        };
        let answer = answers.api.unary(rpc, request, call).await?;
        let text = encode(&answers, A::NAME, answer).await;
        // A program that repeats the request would repeat the change.
        text.map_err(|status| if changes { made(&status) } else { status })
    }
}

/// The status of a call that was made, and whose response is missing.
fn made(why: &Status) -> Status {
    Status::new(why.code(), format!("the call was made, but its response can't be sent: {}", why.message()))
}

fn try_acquire<'a>(places: &'a Semaphore, max: usize, of: &str) -> Result<SemaphorePermit<'a>, Status> {
    let full = |_| Status::resource_exhausted(format!("limit of {max} {of} reached; try again later"));
    places.try_acquire().map_err(full)
}

impl Answers {
    /// The request in a body, and in parameters. Without a body, it consists of the parameters.
    async fn read<Q>(&self, headers: &HeaderMap, body: Body, parameters: Vec<(String, String)>) -> Result<Q, Status>
    where
        Q: Message + Name + Default + 'static,
    {
        /// Of each byte: in the text, in the message that is read, in its encoded form, and in the request.
        const COPIES: usize = 4;
        if !body.is_end_stream()
            && let Err(status) = check_type(headers)
        {
            body::forget(body).await;
            return Err(status);
        }
        let mut held: Option<Held> = None;
        let text = body::read(body, Self::MAX_BODY, |bytes| {
            let bytes = COPIES * bytes;
            match &mut held {
                Some(held) => held.resize(bytes),
                // Connections together have few such bytes.
                None if bytes <= Self::SMALL => Ok(()),
                None => self.requests.try_hold(bytes).map(|room| held = Some(room)),
            }
        });
        let text = text.await.map_err(|unread| match unread {
            Unread::NoRoom(full) => no_room(full),
            Unread::TooLong(_) => invalid(&format!("{unread} here; make the call over gRPC, or make it smaller")),
            unread => invalid(&unread),
        })?;
        let is_long = text.len() > Self::SMALL;
        let read = offload_within(&self.turn, is_long, move || json::from_request(&text, parameters)).await;
        let read = joined(read).ok_or_else(|| Status::unavailable("the service is ending"))?;
        read.map_err(|error| invalid(&error))
    }
}

/// Checks that a body is said to be JSON. Programs that do not say so, such as forms, send something else.
fn check_type(headers: &HeaderMap) -> Result<(), Status> {
    const SHOWN: usize = 64;
    let given = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let given = given.map(|given| String::from_utf8_lossy(&given[..given.len().min(SHOWN)]));
    let kind = given.as_deref().map(|given| given.split(';').next().unwrap_or_default().trim());
    if kind.is_some_and(|kind| kind.eq_ignore_ascii_case(JSON)) {
        return Ok(());
    }
    let given = given.map_or_else(|| "missing".to_owned(), |given| format!("{given:?}"));
    Err(invalid(&format!("the Content-Type of the body is {given}; send JSON, with Content-Type: {JSON}")))
}

async fn encode(answers: &Answers, kind: &'static str, answer: impl Message) -> Result<Bytes, Status> {
    let length = answer.encoded_len();
    if length <= Answers::SMALL {
        return answers.encode(kind, answer.encode_to_vec()).await.map(Bytes::from).map_err(failed);
    }
    let waiting = answers.waiting.try_hold(length.min(answers.waiting.max())).map_err(no_room)?;
    let bytes = answer.encode_to_vec();
    // It takes more memory than its bytes.
    drop(answer);
    let patience = Instant::now() + Answers::PATIENCE;
    let _large = answers.large.acquire().await;
    let text = answers.encode(kind, bytes).await.map_err(failed)?;
    drop(waiting);
    hold(&answers.memory, text, patience).await
}

pub(super) async fn no_such_path(uri: Uri) -> Response {
    let message = format!(
        "there is no {}; see /, /metrics, /livez, /readyz, and the paths in /api/openapi.json, such as /api/status and \
         /api/cycles",
        uri.path()
    );
    refused(&Status::not_found(message))
}

/// Adds the error to the answer of the router that a path does not have this method.
pub(super) fn explain(method: &Method, uri: &Uri, response: Response) -> Response {
    let Some(allowed) = response
        .headers()
        .get(header::ALLOW)
        .filter(|_| response.status() == StatusCode::METHOD_NOT_ALLOWED && response.body().is_end_stream())
    else {
        return response;
    };
    let methods = allowed.to_str().unwrap_or_default().replace(',', ", ");
    let message = format!("{method} is not offered at {}; send one of {methods}", uri.path());
    let code = StatusCode::METHOD_NOT_ALLOWED;
    let headers = [(header::ALLOW, allowed.clone()), (header::CONTENT_TYPE, HeaderValue::from_static(JSON))];
    (code, headers, error_with(code, &Status::unimplemented(message))).into_response()
}

/// `WatchCycles`, as server-sent events, or as lines of JSON if the client accepts them.
///
/// <https://html.spec.whatwg.org/multipage/server-sent-events.html>
pub(super) async fn events(asked: Asked) -> Response {
    let Asked { answers, caller, mut parameters, headers, .. } = asked;
    // Bytes that are not text are not a number either, and are refused as such.
    let header = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let as_lines = header(header::ACCEPT.as_str()).is_some_and(|accepted| accepted.contains(LINES));
    // A browser that reconnects sends the last id, and does not read a status: errors are sent inside the stream.
    let resumed = header("last-event-id").filter(|id| !id.is_empty());
    if let Some(revision) = &resumed {
        parameters.retain(|(name, _)| {
            !["afterRevision", "after_revision", "afterEpoch", "after_epoch", "fromOldest", "from_oldest"]
                .contains(&name.as_str())
        });
        parameters.push(("afterRevision".into(), revision.clone()));
    }
    let request: pb::WatchCyclesRequest = match json::from_request(&[], parameters) {
        Ok(request) => request,
        Err(error) => return refused(&invalid(&error)),
    };
    let events = async {
        let permit = answers.place_for_stream()?;
        let events = answers.api.watch_cycles(caller.asks(request)).await?.into_inner();
        // The stream holds its permit until it ends.
        Ok(events.inspect(move |_| _ = &permit))
    };
    let events = match events.await {
        Ok(events) => events,
        Err(status) if resumed.is_some() && !as_lines => {
            return (CLOSE, [(header::CONTENT_TYPE, SSE)], sse_refused(&status)).into_response();
        }
        // Another client may wait for this connection.
        Err(status) => return (CLOSE, refused(&status)).into_response(),
    };
    // Bookmarks keep the stream alive.
    let pieces = stream::unfold(Some((answers, events)), move |open| async move {
        let (answers, mut events) = open?;
        Some(match pieces(&answers, events.next().await?, as_lines).await {
            Ok(pieces) => (pieces, Some((answers, events))),
            // The stream ends with the error, so that a client that reconnects misses nothing.
            Err(status) if as_lines => (vec![(error_text(&status).1 + "\n").into()], None),
            Err(status) => (vec![sse_refused(&status)], None),
        })
    });
    let pieces = pieces.flat_map(|pieces| stream::iter(pieces).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, if as_lines { LINES } else { SSE })], Body::from_stream(pieces)).into_response()
}

/// `ReadEntries`, as lines of JSON.
pub(super) async fn entries(asked: Asked) -> Response {
    let Asked { answers, caller, parameters, .. } = asked;
    let request = match json::from_request(&[], parameters) {
        Ok(request) => request,
        Err(error) => return refused(&invalid(&error)),
    };
    let entries = async {
        let permit = answers.place_for_stream()?;
        let here = |api: Api, request| async move { api.read_entries(request).await };
        let mut entries = answers.api.streaming("ReadEntries", caller.asks(request), here).await?;
        // If it is refused, the answer has the code of that.
        let first = entries.next().await.transpose()?;
        let entries = stream::iter(first.map(Ok)).chain(entries);
        // The stream holds its permit until it ends.
        Ok(Box::pin(entries.inspect(move |_| _ = &permit)))
    };
    let entries = match entries.await {
        Ok(entries) => entries,
        // Another client may wait for this connection.
        Err(status) => return (CLOSE, refused(&status)).into_response(),
    };
    let lines = stream::unfold(Some((answers, entries)), |open| async move {
        let (answers, mut entries) = open?;
        let text = match entries.next().await? {
            Ok(entry) => encode(&answers, pb::ReadEntriesResponse::NAME, entry).await,
            Err(status) => Err(status),
        };
        Some(match text {
            Ok(text) => ([text, "\n".into()], Some((answers, entries))),
            Err(status) => ([error_text(&status).1.into(), "\n".into()], None),
        })
    });
    let pieces = lines.flat_map(|line| stream::iter(line).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, LINES)], Body::from_stream(pieces)).into_response()
}

type Watched = Result<pb::WatchCyclesResponse, Status>;

/// The pieces of an event, so that its text is in memory once for all streams.
async fn pieces(answers: &Answers, event: Watched, as_line: bool) -> Result<Vec<Bytes>, Status> {
    let event = event?.event.unwrap_or_default();
    let Named { name, text } = answers.event(&event).await?;
    if as_line {
        return Ok(vec!["{\"event\":".into(), text, "}\n".into()]);
    }
    Ok(vec![format!("id: {}\nevent: {name}\ndata: ", event.revision).into(), text, "\n\n".into()])
}

/// The name of this event in a stream.
fn name_of(event: &pb::CycleEvent) -> &'static str {
    match event.event {
        Some(Event::Recorded(_)) => "recorded",
        Some(Event::Unreadable(_)) => "unreadable",
        Some(Event::Started(_)) => "started",
        Some(Event::Progress(_)) => "progress",
        Some(Event::Bookmark(_)) | None => "bookmark",
    }
}

fn sse_refused(status: &Status) -> Bytes {
    format!("event: refused\ndata: {}\n\n", error_text(status).1).into()
}

/// The error if an answer can't be converted to JSON.
#[allow(clippy::needless_pass_by_value, reason = "it is for `map_err`")]
fn failed(error: JsonError) -> Status {
    match error {
        JsonError::TooLarge => Status::resource_exhausted(error.to_string()),
        error => Status::internal(error.to_string()),
    }
}

/// The event that replaces a record that can't be converted to JSON.
fn unwritable(event: &pb::CycleEvent) -> pb::CycleEvent {
    let record = match &event.event {
        Some(Event::Recorded(record)) => pb::CycleTelemetry::decode(record.clone()).unwrap_or_default(),
        _ => pb::CycleTelemetry::default(),
    };
    let problem = JsonError::TooLarge.to_string();
    let unreadable = pb::UnreadableCycle { cycle_id: record.cycle_id, revision: event.revision, problem };
    pb::CycleEvent { revision: event.revision, event: Some(Event::Unreadable(unreadable)), epoch: event.epoch }
}

/// The status of a request that can't be read.
fn invalid(error: &impl ToString) -> Status {
    let details = ErrorDetails::with_error_info("INVALID_FIELDS", "orchestrator.dreamnet", HashMap::new());
    Status::with_error_details(Code::InvalidArgument, error.to_string(), details)
}

pub(super) fn refused(status: &Status) -> Response {
    let (code, text) = error_text(status);
    let mut response = (code, [(header::CONTENT_TYPE, JSON)], text).into_response();
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// The code, the reason and the message of an error.
pub(super) fn parts(status: &Status) -> (StatusCode, String, &str) {
    let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    (http_code(status.code()), reason, status.message())
}

fn error_text(status: &Status) -> (StatusCode, String) {
    let code = http_code(status.code());
    (code, error_with(code, status))
}

/// <https://google.aip.dev/193>
fn error_with(code: StatusCode, status: &Status) -> String {
    let mut message = status.message().to_owned();
    let violations = status.get_details_bad_request().map(|invalid| {
        let named = |FieldViolation { field, description, .. }| {
            let name = name_in_json(&field);
            // The message names the fields as well, each before its problem.
            message = message.replacen(&format!("{field} "), &format!("{name} "), 1);
            serde_json::json!({ "field": name, "description": description })
        };
        invalid.field_violations.into_iter().map(named).collect::<serde_json::Value>()
    });
    let mut error = serde_json::json!({
        "code": code.as_u16(),
        "status": model::Code::from_number(status.code() as i32).name(),
        "message": message,
    });
    if let Some(info) = status.get_details_error_info() {
        error["reason"] = info.reason.into();
        error["metadata"] = serde_json::json!(info.metadata);
    }
    if let Some(violations) = violations {
        error["fieldViolations"] = violations;
    }
    serde_json::json!({ "error": error }).to_string()
}

/// The path of a field in the names of JSON, such as `registration.retry.maxAttempts`. The keys of parameters are
/// those of the caller.
fn name_in_json(path: &str) -> String {
    let (of_contract, rest) = match path.find("parameters.") {
        Some(at) => path.split_at(at),
        None => (path, ""),
    };
    let mut name = String::with_capacity(path.len());
    let mut is_next = false;
    for c in of_contract.chars() {
        match c {
            '_' => is_next = true,
            c if is_next => {
                name.extend(c.to_uppercase());
                is_next = false;
            }
            c => name.push(c),
        }
    }
    name + rest
}

/// The mapping of `google/rpc/code.proto`.
fn http_code(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
