//! Probes of supervisors, such as Kubernetes: `/livez` and `/readyz`, and `/leader` for a load balancer. They are
//! public, so an answer is `ok`, or one of few reasons with status 503.

use std::fmt::Display;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};

use super::Web;

pub(super) fn routes() -> Router<Web> {
    Router::new().route("/livez", get(livez)).route("/readyz", get(readyz)).route("/leader", get(leader))
}

/// Fails if only a restart can help. A start may take long, such as to migrate a large store, and counts as life.
async fn livez(State(web): State<Web>) -> Response {
    answer(web.started().map_or(Ok(()), |started| started.api.check_alive()))
}

/// Fails while no cycle or change is accepted, or, by a follower, while it can't read the store, could not take over,
/// or does not reach the leader.
async fn readyz(State(web): State<Web>) -> Response {
    match web.started() {
        Some(started) => answer(started.api.check_ready()),
        None => answer(Err("starting")),
    }
}

/// Fails unless this replica leads, under a valid lease.
async fn leader(State(web): State<Web>) -> Response {
    match web.started() {
        Some(started) if started.api.membership().is_leading() => answer(Ok::<_, &str>(())),
        Some(_) => answer(Err("this replica does not lead")),
        None => answer(Err("starting")),
    }
}

fn answer(outcome: Result<(), impl Display>) -> Response {
    let (status, text) = match outcome {
        Ok(()) => (StatusCode::OK, "ok".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason.to_string()),
    };
    (status, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
}
