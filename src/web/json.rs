//! RPCs as JSON: parameters become a request, its answer becomes a body.

use std::{convert::Infallible, future::Future, panic::resume_unwind, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{Extension, FromRequestParts, Query, RawPathParams},
    http::{HeaderMap, StatusCode, Uri, header, request::Parts},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use prost::{Message, Name};
use tokio::{
    sync::{Mutex, Semaphore},
    task::spawn_blocking,
    time::{Instant, timeout_at},
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::{
    api::{Api, Caller},
    memory::{Full, Memory},
    model,
    proto::{
        json::{self, JsonError},
        orchestrator::v1::{self as pb, cycle_event::Event, orchestrator_server::Orchestrator as _},
    },
};

const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";
const SSE: &str = "text/event-stream";
/// What asks subsystems for their snapshots, in both spellings of proto JSON.
const SNAPSHOTS: [&str; 4] = ["includeSnapshots", "include_snapshots", "includeSnapshot", "include_snapshot"];
const CLOSE: [(header::HeaderName, &str); 1] = [(header::CONNECTION, "close")];

/// The RPCs, and room for what they answer here.
#[derive(Clone)]
pub(super) struct Answers {
    api: Api,
    /// For what is asked and not made yet: a large page of the history is held meanwhile.
    asking: Arc<Semaphore>,
    /// For what is asked of subsystems, which may let it wait: the places of others are not for that.
    asking_subsystems: Arc<Semaphore>,
    /// Answers are made one at a time, so that a large one takes no more than one processor from cycles.
    turn: Arc<Semaphore>,
    /// Who looks for room for a large answer: one at a time, for it has been made by then.
    large: Arc<Semaphore>,
    /// For large answers that are not taken yet. Peers may take theirs as slowly as they like.
    memory: Memory,
    /// A part of that, for large answers that wait to become JSON: those that are being made find room beside them.
    waiting: Memory,
    /// For streams of events.
    streams: Arc<Semaphore>,
    /// For large events that are not taken yet, so that neither they nor answers keep the other out.
    memory_for_events: Memory,
    /// As `large`, for events.
    large_events: Arc<Semaphore>,
    /// The text of the record that a stream was given last, by its revision: most others are given the same. It is also
    /// their turn, so that however many take no more than one processor from cycles.
    recorded: Arc<Mutex<(u64, Named)>>,
}

/// The JSON of an event, and what a stream calls it.
#[derive(Clone, Default)]
struct Named {
    name: &'static str,
    text: Bytes,
}

impl Answers {
    /// Connections that may be streams of events, which stay open: the others are left for whoever asks and goes, above
    /// all for the monitoring system.
    const MAX_STREAMS: usize = 192;
    /// More than the processors are, since some wait for the store.
    const MAX_ASKING: usize = 16;
    /// Enough for the people who look.
    const MAX_ASKING_SUBSYSTEMS: usize = 16;
    /// The most bytes of an answer, before it becomes text, that needs no room: all connections together can't have many.
    const SMALL: usize = 16 << 10;
    /// How long an answer may wait for room: if there is none by then, those who have it are slow. All that ask meanwhile may
    /// have to wait for it.
    const PATIENCE: Duration = Duration::from_secs(1);

    pub(super) fn new(api: Api, memory: &Memory) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let answers = memory.part("answers that the admin address's clients have not taken yet", memory.max() / 2);
        Self {
            api,
            asking: semaphore(Self::MAX_ASKING),
            asking_subsystems: semaphore(Self::MAX_ASKING_SUBSYSTEMS),
            turn: semaphore(1),
            large: semaphore(1),
            waiting: answers.part("answers that wait to become JSON", answers.max() / 2),
            memory: answers,
            streams: semaphore(Self::MAX_STREAMS),
            memory_for_events: memory
                .part("events that the admin address's clients have not taken yet", memory.max() / 2),
            large_events: semaphore(1),
            recorded: Arc::default(),
        }
    }

    /// Makes JSON: where it may take longer than a millisecond, aside, one after the other.
    async fn make(&self, kind: &'static str, bytes: Vec<u8>) -> Result<String, JsonError> {
        if bytes.len() <= Self::SMALL {
            return json::encode(kind, &bytes);
        }
        let turn = self.turn.clone().acquire_owned().await;
        let made = spawn_blocking(move || {
            let _turn = turn;
            json::encode(kind, &bytes)
        });
        made.await.unwrap_or_else(|ended| match ended.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The process ends.
            Err(_) => Err(JsonError::TooLarge),
        })
    }

    /// An event as JSON. A large one is not even encoded before its turn: until then it is the record that others have as well,
    /// or a page that has its room.
    async fn event(&self, event: &pb::CycleEvent) -> Result<Named, Status> {
        let is_record = matches!(event.event, Some(Event::Recorded(_)));
        let is_large = event.encoded_len() > Self::SMALL;
        let patience = Instant::now() + Self::PATIENCE;
        let _large = if is_large { self.large_events.acquire().await.ok() } else { None };
        let mut recorded = self.recorded.lock().await;
        if is_record && recorded.0 == event.revision {
            return Ok(recorded.1.clone());
        }
        let (name, text) = match self.make("CycleEvent", event.encode_to_vec()).await {
            // The stream goes on past it.
            Err(JsonError::TooLarge) => {
                let instead = unwritable(event);
                (name_of(&instead), self.make("CycleEvent", instead.encode_to_vec()).await)
            }
            made => (name_of(event), made),
        };
        let text = text.map_err(failed)?;
        let text = if is_large {
            // What is kept for others makes room, and nobody waits for this one but large ones.
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

/// A text that has its room as long as any of it is to be sent.
async fn hold(memory: &Memory, text: String, patience: Instant) -> Result<Bytes, Status> {
    let max = memory.max();
    // One that is larger than all room takes it all.
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

/// A request for JSON: who asks, and the parameters, those of the path as well.
pub(super) struct Asked {
    answers: Answers,
    caller: Caller,
    parameters: Vec<(String, String)>,
}

impl FromRequestParts<Answers> for Asked {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, answers: &Answers) -> Result<Self, Response> {
        let caller = Extension::from_request_parts(parts, answers).await;
        let Extension(caller) = caller.map_err(IntoResponse::into_response)?;
        let query = Query::from_request_parts(parts, answers).await;
        let Query(mut parameters): Query<Vec<_>> = query.map_err(IntoResponse::into_response)?;
        let path = RawPathParams::from_request_parts(parts, answers).await;
        let path = path.map_err(IntoResponse::into_response)?;
        parameters.extend(path.iter().map(|(name, value)| (name.to_owned(), value.to_owned())));
        Ok(Self { answers: answers.clone(), caller, parameters })
    }
}

impl Asked {
    /// Makes a call and answers with what it answered.
    pub(super) async fn answer<Q, A, F>(self, call: impl FnOnce(Api, Request<Q>) -> F) -> Response
    where
        Q: Message + Name + Default,
        A: Message + Name,
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let Self { answers, caller, parameters } = self;
        let asks_subsystems = parameters.iter().any(|(name, _)| SNAPSHOTS.contains(&name.as_str()));
        let request = match json::from_parameters(Q::NAME, parameters) {
            Ok(request) => request,
            Err(error) => return refused(&invalid(&error)),
        };
        let asking = if asks_subsystems {
            answers.asking_subsystems.try_acquire().map_err(|_| {
                let max = Answers::MAX_ASKING_SUBSYSTEMS;
                Status::resource_exhausted(format!(
                    "{max} requests wait for snapshots, and no more may; try again later"
                ))
            })
        } else {
            answers.asking.acquire().await.map_err(|error| Status::unavailable(error.to_string()))
        };
        let _asking = match asking {
            Ok(asking) => asking,
            Err(status) => return refused(&status),
        };
        match call(answers.api.clone(), caller.asks(request)).await {
            Ok(answer) => match encode(&answers, A::NAME, answer.into_inner()).await {
                Ok(bytes) => ([(header::CONTENT_TYPE, JSON)], bytes).into_response(),
                Err(status) => refused(&status),
            },
            Err(status) => refused(&status),
        }
    }
}

async fn encode(answers: &Answers, kind: &'static str, answer: impl Message) -> Result<Bytes, Status> {
    let length = answer.encoded_len();
    if length <= Answers::SMALL {
        return answers.make(kind, answer.encode_to_vec()).await.map(Bytes::from).map_err(failed);
    }
    let waiting = answers.waiting.try_hold(length.min(answers.waiting.max())).map_err(no_room)?;
    let bytes = answer.encode_to_vec();
    // It takes more than its bytes.
    drop(answer);
    let patience = Instant::now() + Answers::PATIENCE;
    let _large = answers.large.acquire().await;
    let text = answers.make(kind, bytes).await.map_err(failed)?;
    drop(waiting);
    hold(&answers.memory, text, patience).await
}

pub(super) async fn no_such_path(uri: Uri) -> Response {
    let message = format!(
        "there is no {}; see /, /metrics, /api/status, /api/cycles, /api/cycles/ID, /api/plan, /api/subsystems, \
         /api/subsystems/NAME, /api/loops and /api/events",
        uri.path()
    );
    refused(&Status::not_found(message))
}

/// `WatchCycles`, as server-sent events, or as lines of JSON to whoever accepts those.
///
/// <https://html.spec.whatwg.org/multipage/server-sent-events.html>
pub(super) async fn events(headers: HeaderMap, asked: Asked) -> Response {
    let Asked { answers, caller, mut parameters } = asked;
    // What is no text is no number either, and is refused as such.
    let header = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let as_lines = header(header::ACCEPT.as_str()).is_some_and(|accepted| accepted.contains(LINES));
    // A browser that has lost its connection says what it saw last, and reads no status: it is told inside the stream.
    let resumed = header("last-event-id").filter(|id| !id.is_empty());
    if let Some(revision) = &resumed {
        parameters.retain(|(name, _)| {
            !["afterRevision", "after_revision", "fromOldest", "from_oldest"].contains(&name.as_str())
        });
        parameters.push(("afterRevision".into(), revision.clone()));
    }
    let request = match json::from_parameters("WatchCyclesRequest", parameters) {
        Ok(request) => request,
        Err(error) => return refused(&invalid(&error)),
    };
    let events = async {
        let Ok(place) = answers.streams.clone().try_acquire_owned() else {
            let max = Answers::MAX_STREAMS;
            let message = format!("{max} streams of events are open here, and no more may be; try again later");
            return Err(Status::resource_exhausted(message));
        };
        let events = answers.api.watch_cycles(caller.asks(request)).await?.into_inner();
        // It has the place as long as it lives.
        Ok(events.inspect(move |_| _ = &place))
    };
    let events = match events.await {
        Ok(events) => events,
        Err(status) if resumed.is_some() && !as_lines => {
            return (CLOSE, [(header::CONTENT_TYPE, SSE)], sse_refused(&status)).into_response();
        }
        // Its connection may be what others wait for.
        Err(status) => return (CLOSE, refused(&status)).into_response(),
    };
    // Nothing has to keep the stream alive: bookmarks do.
    let pieces = stream::unfold(Some((answers, events)), move |open| async move {
        let (answers, mut events) = open?;
        Some(match pieces(&answers, events.next().await?, as_lines).await {
            Ok(pieces) => (pieces, Some((answers, events))),
            // It ends with that, so that who comes again misses nothing.
            Err(status) if as_lines => (vec![(error_text(&status).1 + "\n").into()], None),
            Err(status) => (vec![sse_refused(&status)], None),
        })
    });
    let pieces = pieces.flat_map(|pieces| stream::iter(pieces).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, if as_lines { LINES } else { SSE })], Body::from_stream(pieces)).into_response()
}

type Watched = Result<pb::WatchCyclesResponse, Status>;

/// An event as it is sent, in pieces, so that its text is there once however many it waits for.
async fn pieces(answers: &Answers, event: Watched, as_line: bool) -> Result<Vec<Bytes>, Status> {
    let event = event?.event.unwrap_or_default();
    let Named { name, text } = answers.event(&event).await?;
    if as_line {
        return Ok(vec!["{\"event\":".into(), text, "}\n".into()]);
    }
    Ok(vec![format!("id: {}\nevent: {name}\ndata: ", event.revision).into(), text, "\n\n".into()])
}

/// What a stream of events calls this one.
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

/// Why there is no JSON of an answer.
#[allow(clippy::needless_pass_by_value, reason = "it is for `map_err`")]
fn failed(error: JsonError) -> Status {
    match error {
        JsonError::TooLarge => Status::resource_exhausted(error.to_string()),
        error => Status::internal(error.to_string()),
    }
}

/// What stands in the place of a record of which there is no JSON.
fn unwritable(event: &pb::CycleEvent) -> pb::CycleEvent {
    let record = match &event.event {
        Some(Event::Recorded(record)) => pb::CycleTelemetry::decode(record.clone()).unwrap_or_default(),
        _ => pb::CycleTelemetry::default(),
    };
    let problem = JsonError::TooLarge.to_string();
    let unreadable = pb::UnreadableCycle { cycle_id: record.cycle_id, revision: event.revision, problem };
    pb::CycleEvent { revision: event.revision, event: Some(Event::Unreadable(unreadable)) }
}

fn invalid(error: &JsonError) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn refused(status: &Status) -> Response {
    let (code, text) = error_text(status);
    (code, [(header::CONTENT_TYPE, JSON)], text).into_response()
}

/// <https://google.aip.dev/193>
fn error_text(status: &Status) -> (StatusCode, String) {
    let code = http_code(status.code());
    let mut error = serde_json::json!({
        "code": code.as_u16(),
        "status": model::Code::from_number(status.code() as i32).name(),
        "message": status.message(),
    });
    if let Some(info) = status.get_details_error_info() {
        error["reason"] = info.reason.into();
        error["metadata"] = serde_json::json!(info.metadata);
    }
    (code, serde_json::json!({ "error": error }).to_string())
}

/// As `google/rpc/code.proto` maps them.
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
