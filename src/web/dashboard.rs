//! The dashboard: a page, its scripts and its style, inside the binary.

use axum::{Router, http::header, routing::get};

use super::json::Answers;

const HTML: &str = "text/html; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const IMAGE: &str = "image/svg+xml";

/// What the page for logins needs, too: public.
const PUBLIC: &[(&str, &str, &str)] = &[
    ("/style.css", STYLE, include_str!("dashboard/style.css")),
    ("/icon.svg", IMAGE, include_str!("dashboard/icon.svg")),
];

/// By path: content type and content.
const ASSETS: &[(&str, &str, &str)] = &[
    ("/", HTML, include_str!("dashboard/index.html")),
    ("/app.js", SCRIPT, include_str!("dashboard/app.js")),
    ("/api.js", SCRIPT, include_str!("dashboard/api.js")),
    ("/charts.js", SCRIPT, include_str!("dashboard/charts.js")),
    ("/dom.js", SCRIPT, include_str!("dashboard/dom.js")),
    ("/format.js", SCRIPT, include_str!("dashboard/format.js")),
    ("/gantt.js", SCRIPT, include_str!("dashboard/gantt.js")),
    ("/json.js", SCRIPT, include_str!("dashboard/json.js")),
    ("/model.js", SCRIPT, include_str!("dashboard/model.js")),
    ("/parts.js", SCRIPT, include_str!("dashboard/parts.js")),
    ("/route.js", SCRIPT, include_str!("dashboard/route.js")),
    ("/states.js", SCRIPT, include_str!("dashboard/states.js")),
    ("/views/audit.js", SCRIPT, include_str!("dashboard/views/audit.js")),
    ("/views/cycle.js", SCRIPT, include_str!("dashboard/views/cycle.js")),
    ("/views/cycles.js", SCRIPT, include_str!("dashboard/views/cycles.js")),
    ("/views/fleet.js", SCRIPT, include_str!("dashboard/views/fleet.js")),
    ("/views/live.js", SCRIPT, include_str!("dashboard/views/live.js")),
    ("/views/loops.js", SCRIPT, include_str!("dashboard/views/loops.js")),
    ("/views/part.js", SCRIPT, include_str!("dashboard/views/part.js")),
    ("/views/plan.js", SCRIPT, include_str!("dashboard/views/plan.js")),
    ("/views/subsystem.js", SCRIPT, include_str!("dashboard/views/subsystem.js")),
];

pub(super) fn routes() -> Router<Answers> {
    serve(ASSETS)
}

pub(super) fn public_routes() -> Router {
    serve(PUBLIC)
}

fn serve<S: Clone + Send + Sync + 'static>(assets: &'static [(&str, &str, &str)]) -> Router<S> {
    assets.iter().fold(Router::new(), |router, &(path, kind, text)| {
        router.route(path, get(move || async move { ([(header::CONTENT_TYPE, kind)], text) }))
    })
}
