//! The admin address: the dashboard, RPCs as JSON, and metrics, over HTTP/1.1.
//!
//! It listens before the service has started: then only the probes have an answer. Each path in `routes` is an RPC,
//! with its request and its response as canonical proto JSON. The dashboard only reads.

mod body;
mod dashboard;
mod guard;
mod json;
mod login;
mod openapi;
mod probes;
mod routes;

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Extension, State},
    http::{Request, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use http_body::{Body as _, Frame, SizeHint};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use self::{guard::Guard, json::Answers, login::Login};
use crate::{
    api::{Api, Caller, Scrape},
    listen::{self, Beside, Busy, Connection, Connections, Entrance},
    memory::Shares,
    telemetry::metrics::{self, Metrics},
};

/// Most concurrent connections: a browser has up to six, and a monitoring system one.
pub(crate) const MAX_CONNECTIONS: usize = 256;

/// Longest time for a client to send the head of a request, and for a connection to be idle. When all connections are
/// in use, others wait at most this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Most bytes of the head of a request: its address may contain the names of a filter, and cookies of other servers on
/// this host. The library's default is 400 KiB for each connection.
const MAX_HEAD: usize = 32 << 10;

/// The server of the admin address. All clones serve the same.
#[derive(Clone)]
pub(crate) struct Web {
    address: SocketAddr,
    guard: Guard,
    started: Arc<OnceLock<Started>>,
}

/// The pages and the RPCs of a service that has started.
struct Started {
    api: Api,
    pages: Router,
}

impl Web {
    /// The server at this address, which is exposed `beyond_loopback`, and has TLS if it `is_secure`.
    pub(crate) fn at(address: SocketAddr, beyond_loopback: bool, is_secure: bool) -> Self {
        Self { address, guard: Guard { beyond_loopback, is_secure }, started: Arc::default() }
    }

    /// The service has started: serves everything from now on. `memory` limits large requests, and large answers that
    /// clients have not read yet.
    pub(crate) fn open(&self, api: Api, metrics: Arc<Metrics>, memory: &Shares) {
        let login = Login::at(self.address, self.guard.is_secure, api.clone());
        // RPCs enter by the gate, and other paths here.
        let dashboard = dashboard::routes().fallback(json::no_such_path);
        let dashboard = dashboard.layer(middleware::from_fn_with_state(login.clone(), login::admit));
        let pages = routes::router()
            .merge(dashboard)
            .with_state(Answers::new(api.clone(), memory))
            .merge(dashboard::public_routes())
            .merge(login.clone().routes())
            .route(openapi::PATH, get(openapi::serve).with_state(api.clone()))
            .route("/metrics", get(scrape).with_state((api.clone(), metrics)))
            .layer(middleware::from_fn_with_state(login, login::identify));
        self.started.get_or_init(|| Started { api, pages });
    }

    fn started(&self) -> Option<&Started> {
        self.started.get()
    }

    /// Serves until `stop` is cancelled, and then until open answers have been sent; `cut_off` aborts all connections.
    pub(crate) async fn serve(
        self,
        entrance: Entrance,
        connections: Arc<Connections>,
        stop: CancellationToken,
        cut_off: CancellationToken,
    ) {
        let guard = middleware::from_fn_with_state(self.guard, guard::check);
        let router = probes::routes().fallback(page).with_state(self).layer(guard);
        let serve = |connection| serve_connection(connection, router.clone(), stop.clone());
        listen::serve_each(entrance, connections, &stop, cut_off, serve).await;
    }
}

/// Everything but the probes.
async fn page(State(web): State<Web>, request: Request<Body>) -> Response {
    let Some(Started { pages, .. }) = web.started() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "the service is starting; try again later\n").into_response();
    };
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let Ok(response) = pages.clone().oneshot(request).await;
    json::explain(&method, &uri, response)
}

/// Serves one connection. Not with `axum::serve`, which waits for requests forever, and accepts HTTP/2 without limits.
async fn serve_connection(connection: Connection, router: Router, stop: CancellationToken) {
    let state = connection.state();
    let (busy, peer) = (state.clone(), state.clone());
    let from_peer = move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.peer());
        let arriving = (!request.body().is_end_stream()).then(|| peer.arriving());
        request.map(|body| Body::new(Arriving { body, arriving }))
    };
    let router = router.map_request(from_peer).map_future(move |answer| {
        let busy = busy.busy();
        async move { answer.await.map(|response| response.map(|body| Open { body, _busy: busy })) }
    });
    let mut http1 = http1::Builder::new();
    http1.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(MAX_HEAD);
    let served = http1.serve_connection(TokioIo::new(connection), TowerToHyperService::new(router));
    if let Some(Err(error)) = state.serve(served, http1::Connection::graceful_shutdown, &stop).await {
        tracing::debug!(%error, "a connection has ended");
    }
}

/// The body of a request. Its connection counts as idle until it has arrived.
struct Arriving {
    body: Incoming,
    arriving: Option<Beside>,
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if self.body.is_end_stream() {
            self.arriving = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer. Its connection counts as busy until it has been sent.
struct Open {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for Open {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

async fn scrape(State((api, metrics)): State<(Api, Arc<Metrics>)>, Extension(caller): Extension<Caller>) -> Response {
    match api.scrape(caller.asks(Scrape {})).await {
        Ok(call) => {
            ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], Body::from_stream(metrics.scrape(call))).into_response()
        }
        Err(status) => json::refused(&status),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::timeout,
    };

    use super::*;

    async fn connect() -> DuplexStream {
        let (peer, stream) = duplex(1024);
        let router = Router::new().route("/", get(async || "it"));
        tokio::spawn(serve_connection(Connection::of(stream).await, router, CancellationToken::new()));
        peer
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_request_does_not_keep_the_connection() {
        for said in ["GET / HTTP/1.1\r\nHost: localhost\r\nX: ", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
            let mut peer = connect().await;
            peer.write_all(said.as_bytes()).await.unwrap();
            let mut answer = String::new();
            timeout(PATIENCE * 2, peer.read_to_string(&mut answer)).await.unwrap().unwrap();
            assert_eq!(answer.starts_with("HTTP/1.1 200"), said.ends_with("\r\n\r\n"), "{answer}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_http_1_is_accepted() {
        let mut peer = connect().await;
        peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE / 2, peer.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
    }
}
