//! One gRPC call over HTTP/2: a request with one message, and an answer with at most one message and a status.
//!
//! The rules are those of <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>.

use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, client::SendRequest};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version, header};
use tokio::{task::yield_now, time::Instant};

use super::{
    connection::{MAX_HEADERS, STREAM_WINDOW},
    outcome,
    wire::{self, Flooded, Seen},
};
use crate::{
    memory::{Full, Held},
    model::{CallPath, SpanContext},
    ports::CallError,
    proto::{
        framing::Prefix,
        gzip::{self, Inflating, NotInflated},
        timeout,
    },
};

const USER_AGENT: &str = concat!("orchestrator/", env!("CARGO_PKG_VERSION"));

/// The request of a call.
#[derive(Clone, Debug)]
pub struct Call {
    /// The method, such as `/package.Service/Method`.
    pub path: &'static str,
    /// The deadline that is sent to the peer, from now. The caller enforces it.
    pub timeout: Duration,
    /// The parent of the peer's spans.
    pub trace: Option<SpanContext>,
    /// The orchestrators through which the call has come.
    pub through: Option<CallPath>,
    /// The message, framed by [`framing`](crate::proto::framing).
    pub message: Bytes,
    /// Most bytes of the message in the answer.
    pub max_answer: usize,
}

/// How a call failed.
#[derive(Debug)]
pub(super) enum Failed {
    /// It was not sent: the connection accepts no more calls.
    NotSent,
    /// It was sent, but certainly not processed.
    Unprocessed(CallError),
    /// Another call broke the connection.
    CutOff,
    /// The peer failed or sent an invalid answer. `breaks_connection` is true if that broke the connection, or may
    /// break it.
    Call { error: CallError, breaks_connection: bool },
}

impl From<CallError> for Failed {
    fn from(error: CallError) -> Self {
        Self::Call { error, breaks_connection: false }
    }
}

/// Makes a call on a connection. Dropping it cancels the call.
///
/// The answer takes its memory from `held`, which includes the data that the peer may send ahead.
pub(super) async fn make(
    call: &Call,
    to: Uri,
    mut send: SendRequest<Bytes>,
    seen: &Seen,
    held: &mut Held,
) -> Result<Vec<u8>, Failed> {
    let _open = seen.open();
    let called_at = Instant::now();
    let is_late = || called_at.elapsed() >= call.timeout;
    let (response, mut request) = send.send_request(head(call, to), false).map_err(|_| Failed::NotSent)?;
    let stream = response.stream_id().as_u32();
    let failed = |error: &h2::Error| failure(error, stream, seen, is_late());
    // The library does not copy it, and keeps it until the peer's window allows sending. If the stream has already
    // ended, the answer contains the reason.
    let _ = request.send_data(call.message.clone(), true);
    let (answer, mut body) = response.await.map_err(|error| failed(&error))?.into_parts();
    // A status in the headers is the whole answer.
    if let Some(status) = outcome::of_status(&answer.headers, is_late()) {
        status?;
        return Err(outcome::broken("its answer is OK but has no message").into());
    }
    if let Some(error) = outcome::of_http(answer.status, &answer.headers) {
        return Err(error.into());
    }
    let mut incoming = Incoming { is_gzip: gzip::is_announced(&answer.headers), ..Incoming::default() };
    loop {
        let chunk = match body.data().await {
            None => break,
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) if is_end(&error) => break,
            Some(Err(error)) => return Err(failed(&error)),
        };
        let window = body.flow_control();
        window.release_capacity(chunk.len()).map_err(|error| failed(&error))?;
        incoming.take(&chunk, call.max_answer, held)?;
    }
    let trailers = trailers(&mut body).await.map_err(|error| failed(&error))?;
    let status = outcome::of_status(&trailers, is_late());
    if let Some(status) = &status {
        status.clone()?;
    }
    let is_compressed = incoming.is_compressed;
    let message = incoming.finish()?;
    if status.is_none() {
        return Err(outcome::without_status().into());
    }
    if is_compressed { Ok(inflate(message, call.max_answer, held).await?) } else { Ok(message) }
}

/// Decompresses the message of an answer.
async fn inflate(compressed: Vec<u8>, max: usize, held: &mut Held) -> Result<Vec<u8>, CallError> {
    let mut inflating = Inflating::new(compressed.into(), max);
    let hold =
        |bytes: usize, held: &mut Held| held.resize(STREAM_WINDOW as usize + bytes).map_err(|full| no_room(&full));
    while !inflating.step(|bytes| hold(bytes, held).map_err(Refused)).map_err(|Refused(error)| error)? {
        // Other calls have their turn.
        yield_now().await;
    }
    Ok(inflating.into_message())
}

/// The error of an answer that was not decompressed.
struct Refused(CallError);

impl From<NotInflated> for Refused {
    fn from(why: NotInflated) -> Self {
        let message = format!("its answer is compressed, and {why}");
        Self(match why {
            NotInflated::TooLarge(_) => outcome::too_large(message),
            NotInflated::Malformed(_) | NotInflated::Rest => outcome::broken(message),
        })
    }
}

async fn trailers(body: &mut RecvStream) -> Result<HeaderMap, h2::Error> {
    match body.trailers().await {
        Ok(trailers) => Ok(trailers.unwrap_or_default()),
        Err(error) if is_end(&error) => Ok(HeaderMap::new()),
        Err(error) => Err(error),
    }
}

/// A server that does not need the rest of the request resets the stream with this code after its answer (RFC 9113,
/// section 8.1).
fn is_end(error: &h2::Error) -> bool {
    error.is_reset() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR)
}

fn head(call: &Call, to: Uri) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = to;
    let headers = request.headers_mut();
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
    let (accepted, encodings) = gzip::ACCEPTED;
    headers.insert(accepted, encodings);
    let mut insert = |name: &'static str, value: String| {
        // None of the headers can be malformed: each was checked, or made here.
        if let Ok(value) = value.try_into() {
            headers.insert(name, value);
        }
    };
    insert(timeout::HEADER, timeout::text(call.timeout));
    // The headers of W3C Trace Context.
    if let Some(trace) = &call.trace {
        insert("traceparent", trace.to_string());
        if let Some(state) = trace.state.as_deref() {
            insert("tracestate", state.to_owned());
        }
    }
    if let Some(path) = &call.through {
        insert("orchestrator-path", path.to_string());
    }
    request
}

/// The failure of the call on this stream by an HTTP/2 error.
fn failure(error: &h2::Error, stream: u32, seen: &Seen, is_late: bool) -> Failed {
    if seen.is_unprocessed(stream) {
        return Failed::Unprocessed(outcome::unavailable("it is going away and has not processed the call"));
    }
    if error.is_reset() && error.is_remote() {
        let reason = error.reason().unwrap_or(Reason::INTERNAL_ERROR);
        let error = outcome::of_reset(reason, is_late);
        return if reason == Reason::REFUSED_STREAM { Failed::Unprocessed(error) } else { error.into() };
    }
    match seen.flooded() {
        None => {}
        Some(Flooded::InCalls) if seen.stream() == stream => {
            return Failed::Call { error: outcome::too_large(wire::flood()), breaks_connection: true };
        }
        // The frame belonged to no call.
        Some(Flooded::InCalls) if seen.stream() == 0 => return outcome::unavailable(wire::flood()).into(),
        // The frame belonged to another call.
        Some(Flooded::InCalls | Flooded::Unused) => return Failed::CutOff,
    }
    // The library rejected a frame, of this call or of another one on the connection.
    if error.is_library() {
        let is_own = error.is_reset() || seen.stream() == stream;
        if !is_own && seen.stream() != 0 {
            return Failed::CutOff;
        }
        if is_own {
            let error = if seen.had_large_headers(stream) {
                outcome::too_large(format!("its headers or its error message are over {MAX_HEADERS} bytes"))
            } else {
                outcome::broken(format!("its answer violates HTTP/2: {error}"))
            };
            return Failed::Call { error, breaks_connection: true };
        }
    }
    outcome::lost(error).into()
}

/// Collects the message of an answer. Its memory grows with the received bytes, not with the announced ones.
#[derive(Default)]
struct Incoming {
    /// True if a compressed message is in gzip.
    is_gzip: bool,
    is_compressed: bool,
    prefix: [u8; Prefix::BYTES],
    prefix_len: usize,
    announced: usize,
    message: Vec<u8>,
}

impl Incoming {
    /// Smallest allocation for a longer message.
    const LEAST: usize = 16 << 10;

    fn take(&mut self, mut chunk: &[u8], max: usize, held: &mut Held) -> Result<(), CallError> {
        if self.prefix_len < Prefix::BYTES {
            let step = chunk.len().min(Prefix::BYTES - self.prefix_len);
            self.prefix[self.prefix_len..][..step].copy_from_slice(&chunk[..step]);
            self.prefix_len += step;
            chunk = &chunk[step..];
            if self.prefix_len == Prefix::BYTES {
                self.announce(max)?;
            }
        }
        if chunk.is_empty() {
            return Ok(());
        }
        let len = self.message.len() + chunk.len();
        if len > self.announced {
            return Err(outcome::broken("its answer has more than one message"));
        }
        if len > self.message.capacity() {
            let room = (2 * self.message.capacity()).max(Self::LEAST).max(len).min(self.announced);
            held.resize(STREAM_WINDOW as usize + room).map_err(|full| no_room(&full))?;
            self.message.reserve_exact(room - self.message.len());
        }
        self.message.extend_from_slice(chunk);
        Ok(())
    }

    fn announce(&mut self, max: usize) -> Result<(), CallError> {
        let Prefix { flag, length } = Prefix::read(self.prefix);
        self.announced = length;
        self.is_compressed = flag == 1;
        match flag {
            0 | 1 if self.announced > max => {
                let announced = self.announced;
                Err(outcome::too_large(format!("its answer is {announced} bytes; the limit is {max} bytes")))
            }
            0 => Ok(()),
            1 if self.is_gzip => Ok(()),
            1 => Err(outcome::broken("its message is compressed, but not by gzip (grpc-encoding), which was offered")),
            _ => Err(outcome::broken(format!("its answer is not gRPC: its message begins with the flag {flag}"))),
        }
    }

    /// The message, of an answer whose status is OK.
    fn finish(self) -> Result<Vec<u8>, CallError> {
        let (came, announced) = (self.message.len(), self.announced);
        match self.prefix_len {
            0 => Err(outcome::broken("its answer is OK but has no message")),
            Prefix::BYTES if came == announced => Ok(self.message),
            _ => Err(outcome::broken(format!("its answer is incomplete: {came} of {announced} announced bytes"))),
        }
    }
}

/// The error if the memory for answers is full.
pub(super) fn no_room(full: &Full) -> CallError {
    outcome::too_large(format!("no memory for its answer: {full}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;
    use crate::{memory::Memory, model::Code};

    #[test]
    fn an_answer_takes_memory_as_it_arrives_and_is_one_message() {
        let memory = Memory::whole(1 << 20);
        let mut held = memory.try_hold(0).unwrap();
        let take = |incoming: &mut Incoming, bytes: &[u8], held: &mut Held| incoming.take(bytes, 1 << 22, held);
        // All announced bytes except the last one have come.
        let mut incoming = Incoming::default();
        take(&mut incoming, &[0, 0, 0x3f, 0xff], &mut held).unwrap();
        take(&mut incoming, &[0xff, 1, 2], &mut held).unwrap();
        assert_eq!(memory.held(), STREAM_WINDOW as usize + Incoming::LEAST);
        assert_eq!(incoming.finish().unwrap_err().code, Code::Internal);
        // More than the memory allows.
        let mut incoming = Incoming::default();
        take(&mut incoming, &[0, 0, 0x3f, 0xff, 0xff], &mut held).unwrap();
        let error = take(&mut incoming, &vec![0; 1 << 20], &mut held).unwrap_err();
        assert_eq!(error.code, Code::ResourceExhausted, "{error}");
        for (bytes, code, words) in [
            (&[0, 0, 0x40, 0, 1][..], Code::ResourceExhausted, "4194305 bytes; the limit is 4194304"),
            (&[1, 0, 0, 0, 0], Code::Internal, "compressed"),
            (b"<html>", Code::Internal, "the flag 60"),
            (&[0, 0, 0, 0, 1, 7, 0, 0, 0, 0, 0], Code::Internal, "more than one message"),
            (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], Code::Internal, "more than one message"),
        ] {
            let error = take(&mut Incoming::default(), bytes, &mut held).unwrap_err();
            assert!(error.code == code && error.message.contains(words), "{error}");
        }
        let mut whole = Incoming::default();
        take(&mut whole, &[0, 0, 0, 0, 1, 7], &mut held).unwrap();
        assert_eq!(whole.finish().unwrap(), [7]);
        assert!(Incoming::default().finish().unwrap_err().message.contains("has no message"));
    }

    #[tokio::test]
    async fn a_compressed_answer_keeps_its_limit_and_takes_memory_as_it_grows() {
        const ZEROS: usize = 1 << 20;
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&vec![0; ZEROS]).unwrap();
        let compressed = encoder.finish().unwrap();
        let memory = Memory::whole(STREAM_WINDOW as usize + compressed.len() + 2 * ZEROS);
        let inflated = async |max, memory: &Memory| {
            let mut held = memory.try_hold(0).unwrap();
            let message = inflate(compressed.clone(), max, &mut held).await.map_err(|error| error.code)?;
            assert!(memory.held() >= message.capacity());
            Ok(message)
        };
        assert_eq!(inflated(ZEROS, &memory).await, Ok(vec![0; ZEROS]));
        assert_eq!(inflated(ZEROS - 1, &memory).await, Err(Code::ResourceExhausted));
        assert_eq!(
            inflated(ZEROS, &Memory::whole(STREAM_WINDOW as usize + (ZEROS / 2))).await,
            Err(Code::ResourceExhausted)
        );
        let mut held = memory.try_hold(0).unwrap();
        assert_eq!(inflate(b"no gzip".to_vec(), 100, &mut held).await.unwrap_err().code, Code::Internal);
    }
}
