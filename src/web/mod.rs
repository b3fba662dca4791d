//! The admin address: the dashboard, the same as JSON, and metrics, over HTTP/1.1 and only to be read.
//!
//! What a path answers is what the RPC beside it in `routes` answers, as canonical proto JSON; its parameters are the
//! fields of that RPC's request.

mod dashboard;
mod guard;
mod json;

use std::{io, net::SocketAddr, pin::Pin, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{Path, Query, State},
    http::header,
    middleware,
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use futures_util::{Stream, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use self::guard::Guard;
use crate::{
    api::Api,
    listen::{self, Connection, Connections},
    proto::orchestrator::v1::orchestrator_server::Orchestrator as _,
    telemetry::metrics::{self, Metrics},
};

/// Connections at one time: people's browsers have six each, and a monitoring system one.
pub(crate) const MAX_CONNECTIONS: usize = 256;

/// The parameters of a URL, in their order.
type Parameters = Query<Vec<(String, String)>>;

/// Serves until `stop` is cancelled, and then for what answers are on their way; everything breaks when `cut_off` is
/// cancelled. With `beyond_loopback`, whoever reaches the address may read.
///
/// # Errors
/// The listener's address can't be told.
pub(crate) async fn serve(
    listener: TcpListener,
    connections: Arc<Connections>,
    api: Api,
    metrics: Arc<Metrics>,
    beyond_loopback: bool,
    stop: CancellationToken,
    cut_off: CancellationToken,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    let router = routes()
        .with_state(api)
        .route("/metrics", get(scrape).with_state(metrics))
        .layer(middleware::from_fn_with_state(Guard { beyond_loopback }, guard::check));
    let incoming = Incoming { address, incoming: Box::pin(listen::incoming(listener, connections, cut_off)) };
    axum::serve(incoming, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

fn routes() -> Router<Api> {
    Router::new()
        .merge(dashboard::routes())
        .route("/api/status", get(status))
        .route("/api/cycles", get(cycles))
        .route("/api/cycles/{cycle_id}", get(cycle))
        .route("/api/plan", get(plan))
        .route("/api/subsystems", get(subsystems))
        .route("/api/subsystems/{name}", get(subsystem))
        .route("/api/loops", get(loops))
        .route("/api/events", get(json::events))
        .fallback(json::no_such_path)
}

async fn status(State(api): State<Api>, Query(parameters): Parameters) -> Response {
    json::answer("GetStatusRequest", "GetStatusResponse", parameters, |request| api.get_status(request)).await
}

async fn cycles(State(api): State<Api>, Query(parameters): Parameters) -> Response {
    json::answer("ListCyclesRequest", "ListCyclesResponse", parameters, |request| api.list_cycles(request)).await
}

async fn cycle(State(api): State<Api>, Path(id): Path<String>, Query(mut parameters): Parameters) -> Response {
    parameters.push(("cycleId".into(), id));
    json::answer("GetCycleRequest", "GetCycleResponse", parameters, |request| api.get_cycle(request)).await
}

async fn plan(State(api): State<Api>, Query(parameters): Parameters) -> Response {
    json::answer("PlanCycleRequest", "PlanCycleResponse", parameters, |request| api.plan_cycle(request)).await
}

async fn subsystems(State(api): State<Api>, Query(parameters): Parameters) -> Response {
    let list = |request| api.list_subsystems(request);
    json::answer("ListSubsystemsRequest", "ListSubsystemsResponse", parameters, list).await
}

async fn subsystem(State(api): State<Api>, Path(name): Path<String>, Query(mut parameters): Parameters) -> Response {
    parameters.push(("name".into(), name));
    json::answer("GetSubsystemRequest", "GetSubsystemResponse", parameters, |request| api.get_subsystem(request)).await
}

async fn loops(State(api): State<Api>, Query(parameters): Parameters) -> Response {
    let list = |request| api.list_interval_loops(request);
    json::answer("ListIntervalLoopsRequest", "ListIntervalLoopsResponse", parameters, list).await
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> Response {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], Body::from_stream(metrics.scrape())).into_response()
}

/// Counted connections, as the HTTP server takes them.
struct Incoming<S> {
    address: SocketAddr,
    incoming: Pin<Box<S>>,
}

impl<S> Listener for Incoming<S>
where
    S: Stream<Item = io::Result<Connection<TcpStream>>> + Send + 'static,
{
    type Io = Connection<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            match self.incoming.next().await {
                Some(Ok(connection)) => return (connection, self.address),
                Some(Err(error)) => tracing::warn!(%error, "can't accept a connection"),
                // It has ended, and the server ends by being told to.
                None => std::future::pending().await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}
