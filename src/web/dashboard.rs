//! The dashboard: a page, its script and its style, inside the binary.

use axum::{
    Router,
    http::header,
    routing::{MethodRouter, get},
};

use crate::api::Api;

pub(super) fn routes() -> Router<Api> {
    Router::new()
        .route("/", asset("text/html; charset=utf-8", include_str!("dashboard/index.html")))
        .route("/app.js", asset("text/javascript; charset=utf-8", include_str!("dashboard/app.js")))
        .route("/style.css", asset("text/css; charset=utf-8", include_str!("dashboard/style.css")))
}

fn asset(kind: &'static str, text: &'static str) -> MethodRouter<Api> {
    get(async move || ([(header::CONTENT_TYPE, kind)], text))
}
