//! The accept loop of a gRPC server: all paths follow the same rules, and all tasks are owned.

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use hyper::{body::Incoming, server::conn::http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{select, sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Status,
    body::Body,
    codegen::http::{HeaderMap, Request, Response, StatusCode, header::CONTENT_TYPE},
};

use super::{
    answering::{Answer, Patience},
    connection::{Broken, Connection},
    connections::{Connections, Entrance, serve_each},
    receiving::{Received, Rule, Upload},
    repeated::Repeated,
    rooms::Rooms,
    services::Services,
    streams::{Streams, Taking},
};
use crate::{
    memory::Memory,
    proto::{gzip, timeout as grpc_timeout},
};

/// The limits of a server.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Most streams on one connection. At the limit, a client waits.
    pub(crate) max_concurrent_streams: u32,
    /// Most streams on all connections. Further ones are refused.
    pub(crate) max_streams: usize,
    /// Most bytes of one request.
    pub(crate) max_request_bytes: usize,
    /// Bytes that a client may send ahead on one stream, and on one connection.
    pub(crate) windows: (u32, u32),
    /// Memory for requests while they are being received.
    pub(crate) requests: Memory,
    /// Memory for answers until they are read.
    pub(crate) answers: Memory,
    /// Paths whose answers are streams of large messages, which wait for memory.
    pub(crate) large_streams: &'static [&'static str],
}

impl Limits {
    /// Most streams that a client has opened and reset again before this process has come to look at them. A client
    /// that opens and resets streams endlessly is disconnected (CVE-2023-44487). But a replica resets what its callers
    /// leave, and all of that waits while this process does not run: 64 KiB are read before the streams in them are
    /// looked at.
    fn max_resets(&self) -> usize {
        /// As many as the streams of a client that is full four times over, but at least this number.
        const LEAST: usize = 64;
        LEAST.max(4 * self.max_concurrent_streams as usize)
    }

    /// Most streams on all connections that lead to health and reflection: whoever holds these keeps no other call out.
    fn max_besides(&self) -> usize {
        self.max_streams.div_ceil(4)
    }
}

/// Services, and their limits.
#[derive(Clone)]
pub(crate) struct Server(Arc<Shared>);

struct Shared {
    services: Services,
    limits: Limits,
    answers: Arc<Rooms>,
    permits: Arc<Semaphore>,
    /// Permits for those of them that lead to health and reflection.
    besides: Arc<Semaphore>,
    /// Permits to read the rest of a request that was answered before it had arrived.
    rests: Semaphore,
    full: Repeated,
    cut_off: Repeated,
}

impl Server {
    /// A server without services.
    pub(crate) fn new(services: Services, limits: Limits) -> Self {
        let permits = Arc::new(Semaphore::new(limits.max_streams));
        let answers = Rooms::new(limits.answers.clone());
        let besides = Arc::new(Semaphore::new(limits.max_besides()));
        let rests = Semaphore::new(limits.max_streams.div_ceil(RESTS));
        let (full, cut_off) = Default::default();
        Self(Arc::new(Shared { services, limits, answers, permits, besides, rests, full, cut_off }))
    }

    /// Serves until `stop` is cancelled, and then until open calls have ended; `cut_off` aborts all connections.
    pub(crate) async fn serve(
        self,
        entrance: Entrance,
        connections: Arc<Connections>,
        stop: CancellationToken,
        cut_off: CancellationToken,
    ) {
        let serve = |connection| self.clone().serve_connection(connection, stop.clone());
        serve_each(entrance, connections, &stop, cut_off, serve).await;
    }

    async fn serve_connection(self, connection: Connection, stop: CancellationToken) {
        let (state, broken) = (connection.state(), connection.broken());
        let limits = &self.0.limits;
        let streams = Streams {
            state: state.clone(),
            permits: self.0.permits.clone(),
            answers: self.0.answers.of_connection(&state),
            ends: Arc::default(),
            tasks: TaskTracker::new(),
        };
        let calls = ConnectionCalls { server: self.clone(), streams: streams.clone(), broken };
        let mut http2 = http2::Builder::new(streams.clone());
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.max_concurrent_streams)
            .initial_stream_window_size(limits.windows.0)
            .initial_connection_window_size(limits.windows.1)
            // A dead peer is detected after 40 s, and its streams end.
            .keep_alive_interval(Some(Duration::from_secs(30)))
            .keep_alive_timeout(Duration::from_secs(10))
            .max_pending_accept_reset_streams(Some(limits.max_resets()))
            .max_local_error_reset_streams(Some(256))
            .max_header_list_size(Received::<Incoming>::MAX_HEADERS);
        let served = http2.serve_connection(TokioIo::new(connection), calls);
        let ended = select! {
            biased;
            ended = state.serve(served, http2::Connection::graceful_shutdown, &stop) => ended,
            () = streams.left() => None,
        };
        if let Some(Err(error)) = ended {
            tracing::debug!(%error, "a connection has ended");
            if let Some(error) = flood(&error)
                && let Some(times) = self.0.cut_off.note()
            {
                tracing::warn!(%error, times, "a connection was closed: its client opens and resets too many streams");
            }
        }
        streams.tasks.close();
        streams.tasks.wait().await;
    }

    fn rule(&self, path: &str) -> Rule {
        /// Most bytes of a request to health and reflection, which contain only names.
        const SMALL: usize = 8 << 10;
        if is_beside(path) {
            Rule { max_bytes: SMALL, is_stream: path.starts_with("/grpc.reflection.") }
        } else {
            Rule { max_bytes: self.0.limits.max_request_bytes, is_stream: false }
        }
    }

    async fn answer(self, request: Request<Incoming>, broken: Broken, streams: Streams) -> Response<Answer> {
        let taking = Taking::current();
        let limits = &self.0.limits;
        let path = request.uri().path();
        let (rule, is_large_stream) = (self.rule(path), limits.large_streams.contains(&path));
        let mut has_permit = taking.has_permit();
        let mut max = limits.max_streams;
        // It counted as a busy call until its path was known.
        let (beside, arriving) = if is_beside(path) {
            let permit = self.0.besides.clone().try_acquire_owned().ok();
            if permit.is_none() && !taking.is_only() {
                (has_permit, max) = (false, limits.max_besides());
            }
            (Some(streams.state.beside(permit)), None)
        } else {
            (None, Some(streams.state.arriving()))
        };
        if path.starts_with(HEALTH) {
            streams.state.standing.probes();
        }
        let patience = if is_large_stream { Patience::AfterFirst } else { Patience::None };
        let size = size_of_headers(request.headers());
        let (head, body) = request.into_parts();
        let upload = Upload::of(body);
        let mut request = Request::from_parts(head, upload.clone());
        let is_gzip = gzip::is_announced(request.headers());
        let headers = limits.requests.try_hold(size);
        let refused = match &headers {
            _ if !has_permit => Some(format!("limit of open calls reached: {max}")),
            Err(full) if size > SMALL_HEADERS => Some(full.to_string()),
            _ => None,
        };
        let response = if let Some(refused) = refused {
            if let Some(times) = self.0.full.note() {
                tracing::warn!(times, "a call was refused: {refused}");
            }
            // Refusals would wait like its answers.
            if streams.state.is_stalled() {
                streams.state.cut_off();
            }
            Status::resource_exhausted(format!("{refused}; try again later")).into_http()
        } else if !is_grpc(request.headers()) {
            unsupported(request.headers())
        } else {
            let within = grpc_timeout::read(request.headers());
            request.extensions_mut().insert(broken);
            request.extensions_mut().insert(streams.state.peer());
            gzip::remove(request.headers_mut());
            let (room, of_stream) = (limits.requests.clone(), taking.clone());
            let received = |body| Received::new(body, rule, is_gzip, room, headers.ok(), of_stream, arriving);
            let call = self.0.services.call(request.map(|body| Body::new(received(body))));
            match within {
                None => call.await,
                Some(within) => timeout(within, call)
                    .await
                    .unwrap_or_else(|_| Status::deadline_exceeded("the deadline of the call has passed").into_http()),
            }
        };
        if !rule.is_stream
            && upload.is_unfinished()
            && let Ok(_permit) = self.0.rests.try_acquire()
        {
            upload.forget_rest().await;
        }
        let mut response = response.map(|body| Answer::new(body, streams.answers, taking, patience, beside));
        let (accepted, encodings) = gzip::ACCEPTED;
        response.headers_mut().insert(accepted, encodings);
        response
    }
}

/// One of this many streams may wait for the rest of a request that was answered before.
const RESTS: usize = 16;

/// The beginning of the paths of health, which is public.
const HEALTH: &str = "/grpc.health.";

/// True if a path leads to health or reflection.
fn is_beside(path: &str) -> bool {
    path.starts_with("/grpc.")
}

/// True if this is a gRPC call with protobuf messages.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim_end();
    ["application/grpc", "application/grpc+proto"].iter().any(|it| kind.eq_ignore_ascii_case(it))
}

/// The answer to a request that is not a gRPC call, as in the protocol, with a status for clients that read it.
///
/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#requests>
fn unsupported(headers: &HeaderMap) -> Response<Body> {
    const SHOWN: usize = 64;
    let kind = headers.get(CONTENT_TYPE).map_or("missing".into(), |kind| {
        format!("{:?}", String::from_utf8_lossy(&kind.as_bytes()[..kind.len().min(SHOWN)]))
    });
    let message = format!("the content-type is {kind}; send application/grpc, with messages in protobuf");
    let mut response = Status::invalid_argument(message).into_http();
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response
}

/// Bytes of headers that need no reservation: they are included in the cost of a stream.
const SMALL_HEADERS: usize = 4 << 10;

/// Their approximate size in memory.
fn size_of_headers(headers: &HeaderMap) -> usize {
    /// Size of an entry of their table.
    const OF_EACH: usize = 128;
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + OF_EACH).sum()
}

/// The kind of flood, if the error is caused by one.
fn flood(error: &hyper::Error) -> Option<&h2::Error> {
    let error = std::error::Error::source(error)?.downcast_ref::<h2::Error>()?;
    (error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM)).then_some(error)
}

/// The calls of one connection.
struct ConnectionCalls {
    server: Server,
    streams: Streams,
    broken: Broken,
}

impl hyper::service::Service<Request<Incoming>> for ConnectionCalls {
    type Response = Response<Answer>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Answer>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let (server, broken, streams) = (self.server.clone(), self.broken.clone(), self.streams.clone());
        Box::pin(async move { Ok(server.answer(request, broken, streams).await) })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{Ready, ready},
        task::{Context, Poll},
    };

    use bytes::Bytes;
    use h2::{RecvStream, client::SendRequest};
    use http_body_util::Full;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::{Instant, sleep},
    };

    use super::*;
    use tonic::codegen::Service;

    /// Answers with the number of bytes in the path.
    #[derive(Clone)]
    struct Zeros;

    impl tonic::server::NamedService for Zeros {
        const NAME: &str = "Zeros";
    }

    impl Service<Request<Body>> for Zeros {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Ready<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<Body>) -> Self::Future {
            let bytes = request.uri().path().strip_prefix("/Zeros/").unwrap().parse().unwrap();
            ready(Ok(Response::new(Body::new(Full::from(vec![0; bytes])))))
        }
    }

    /// A connection to a server with this limit of streams, and of bytes of memory for answers.
    async fn open(max_concurrent_streams: u32, answers: usize) -> DuplexStream {
        let limits = Limits {
            max_concurrent_streams,
            max_streams: max_concurrent_streams as usize,
            max_request_bytes: 1 << 10,
            windows: (64 << 10, 64 << 10),
            requests: Memory::whole(1 << 20),
            answers: Memory::whole(answers),
            large_streams: &[],
        };
        let (peer, stream) = duplex(1 << 20);
        let server = Server::new(Services::default().and(Zeros), limits);
        tokio::spawn(server.serve_connection(Connection::of(stream).await, CancellationToken::new()));
        peer
    }

    /// A client of a server with this number of bytes of memory for answers. Its window for each stream has this size.
    async fn connect(answers: usize, window: u32) -> SendRequest<Bytes> {
        let peer = open(10, answers).await;
        let made = h2::client::Builder::new().initial_window_size(window).handshake(peer).await;
        let (send, connection) = made.unwrap();
        tokio::spawn(async move { drop(connection.await) });
        send
    }

    async fn ask(send: &mut SendRequest<Bytes>, bytes: usize) -> RecvStream {
        let request = Request::post(format!("http://localhost/Zeros/{bytes}")).header(CONTENT_TYPE, "application/grpc");
        let request = request.body(()).unwrap();
        let (response, _) = send.clone().ready().await.unwrap().send_request(request, true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_client_does_not_read_ends_and_its_connection_continues() {
        // It ends sooner if other clients may need the memory.
        for (answers, after) in [(1 << 20, 60), (150 << 10, 5)] {
            let mut client = connect(answers, 0).await;
            let begun = Instant::now();
            let mut answer = ask(&mut client, 100 << 10).await;
            let error = answer.data().await.unwrap().unwrap_err();
            assert_eq!(error.reason(), Some(h2::Reason::CANCEL));
            assert_eq!(begun.elapsed().as_secs(), after);
            drop(ask(&mut client, 100 << 10).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_gets_its_whole_answer() {
        let mut client = connect(1 << 20, 16 << 10).await;
        let mut answer = ask(&mut client, 100 << 10).await;
        let mut taken = 0;
        while let Some(data) = answer.data().await {
            let bytes = data.unwrap().len();
            taken += bytes;
            sleep(Duration::from_secs(40)).await;
            answer.flow_control().release_capacity(bytes).unwrap();
        }
        assert_eq!(taken, 100 << 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_the_end_of_an_answer_loses_its_connection() {
        let mut client = connect(1 << 20, 1).await;
        let begun = Instant::now();
        let mut answer = ask(&mut client, 10 << 10).await;
        assert_eq!(answer.data().await.unwrap().unwrap().len(), 1);
        assert!(answer.data().await.unwrap().is_err());
        assert_eq!(begun.elapsed().as_secs(), 60);
    }

    /// A frame of HTTP/2 with this type and these flags (RFC 9113, section 4.1).
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    #[tokio::test]
    async fn many_streams_that_are_reset_at_once_leave_the_connection_to_others_but_not_any_number() {
        const HEADERS: u8 = 1;
        const RST_STREAM: u8 = 3;
        const SETTINGS: u8 = 4;
        const GOAWAY: u8 = 7;
        // POST http://x/Zeros/1, by the static table of HPACK (RFC 7541, appendix A).
        let head = [&[0x83, 0x86, 0x01, 1, b'x', 0x04, 8][..], b"/Zeros/1"].concat();
        let call = |stream| frame(HEADERS, 0b101, stream, &head);
        for (resets, ends) in [(190, HEADERS), (400, GOAWAY)] {
            let mut peer = open(50, 1 << 20).await;
            let mut said = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat();
            for stream in (1..).step_by(2).take(resets) {
                said.extend(call(stream));
                said.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
            }
            let last = 2 * u32::try_from(resets).unwrap() + 1;
            said.extend(call(last));
            peer.write_all(&said).await.unwrap();
            let end = loop {
                let mut head = [0; 9];
                peer.read_exact(&mut head).await.unwrap();
                let [a, b, c, kind, _, stream @ ..] = head;
                let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
                peer.read_exact(&mut payload).await.unwrap();
                if kind == GOAWAY || (kind == HEADERS && u32::from_be_bytes(stream) == last) {
                    break kind;
                }
            };
            assert_eq!(end, ends, "{resets}");
        }
    }
}
