//! The OpenAPI document of the RPCs at this address, made from the table of routes and from the contract.
//!
//! <https://spec.openapis.org/oas/v3.1.1.html>

use std::sync::OnceLock;

use axum::{
    extract::{Extension, State},
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{
    json,
    routes::{ENTRIES, EVENTS, Method, ROUTES, Route},
};
use crate::{
    api::{Api, Caller},
    proto::schema::{Parameter, Rpc, Schemas},
};

pub(super) const PATH: &str = "/api/openapi.json";

const DESCRIPTION: &str = "\
The RPCs of the package `dreamnet.orchestrator.v1` as JSON over HTTP. Requests and responses are those of the contract, \
as canonical proto JSON: names of fields are in lowerCamelCase (names in snake_case are accepted as well), integers of \
64 bits are strings, and fields with their default value are left out.

A GET only reads, and the fields of its request are parameters. Any other method runs or changes something, and its \
request is the body, with `Content-Type: application/json` and at most 1 MiB. An empty body stands for `{}`.

A caller presents a token as over gRPC, a browser a session. A browser may only send such a request from a page of \
this address.";

/// Returns the document to callers whose identity is known.
pub(super) async fn serve(State(api): State<Api>, Extension(caller): Extension<Caller>) -> Response {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    match api.check_description(&caller) {
        Ok(()) => {
            ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.get_or_init(document).as_str()).into_response()
        }
        Err(status) => json::refused(&status),
    }
}

/// The text of the document.
fn document() -> String {
    // The contract of a build is readable.
    let Some(mut schemas) = Schemas::new() else { return "{}\n".into() };
    let mut paths: Map<String, Value> = Map::new();
    for route in ROUTES {
        if let Some(operation) = operation(route, &mut schemas) {
            let path = paths.entry(route.path).or_insert_with(|| json!({}));
            path[word(route.method)] = operation;
        }
    }
    let tags: Vec<_> = schemas
        .services()
        .into_iter()
        .map(|(name, description)| json!({ "name": name, "description": description }))
        .collect();
    let mut schemas: Map<_, _> = schemas.into_named().into_iter().collect();
    schemas.insert("Error".into(), error());
    let content = json!({ "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } });
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Orchestrator",
            "version": "v1",
            "description": DESCRIPTION,
            "license": { "name": "Apache License 2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/", "description": "The admin address, such as http://127.0.0.1:7780" }],
        // Without access rules, callers need no credential.
        "security": [{}, { "token": [] }, { "session": [] }],
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": { "Error": { "description": "The call was refused, or has failed.", "content": content } },
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token, which `orchestrator token create` makes, or a JWT.",
                },
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "orc-7780",
                    "description": "The session of a browser, from `/login`. The name ends with the port of the \
                                    address, and begins with `__Host-` over TLS.",
                },
            },
        },
    });
    format!("{document:#}\n")
}

fn word(method: Method) -> &'static str {
    match method {
        Method::Get => "get",
        Method::Post => "post",
        Method::Patch => "patch",
        Method::Delete => "delete",
    }
}

/// `None` if the RPC is not in the contract.
fn operation(route: &Route, schemas: &mut Schemas) -> Option<Value> {
    let rpc = schemas.rpc(route.rpc)?;
    let names = route.path.split('/').filter_map(|it| it.strip_prefix('{')?.strip_suffix('}'));
    let field_of = |name| route.renamed.filter(|(it, _)| *it == name).map_or(name, |(_, field)| field);
    let (names, in_path): (Vec<_>, Vec<_>) = names.map(|name| (name, field_of(name))).unzip();
    let mut parameters = Vec::new();
    for (name, field) in names.iter().zip(&in_path) {
        let Parameter { comment, schema, .. } = schemas.parameter_at(&rpc, field)?;
        parameters
            .push(json!({ "name": name, "in": "path", "required": true, "description": comment, "schema": schema }));
    }
    if route.method == Method::Get {
        let others = schemas.parameters(&rpc).into_iter().filter(|it| !in_path.contains(&it.name.as_str()));
        parameters.extend(others.map(|Parameter { name, comment, schema }| {
            json!({ "name": name, "in": "query", "description": comment, "schema": schema })
        }));
    }
    if route.path == EVENTS {
        parameters.push(json!({
            "name": "Last-Event-ID",
            "in": "header",
            "description": "Continues after this event, as `afterRevision` does, which it takes precedence over.",
            "schema": { "type": "string", "pattern": "^[0-9]+$" },
        }));
    }
    let mut operation = json!({
        "operationId": route.rpc,
        "tags": [rpc.service],
        "summary": first_sentence(&rpc.comment),
        "description": rpc.comment,
        "responses": {
            "200": { "description": "The response of the RPC.", "content": content(route, &rpc, schemas) },
            "431": { "description": "The head of the request is longer than 32 KiB." },
            "4XX": { "$ref": "#/components/responses/Error" },
            "5XX": { "$ref": "#/components/responses/Error" },
        },
    });
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    // A DELETE has all of its request in the path.
    if matches!(route.method, Method::Post | Method::Patch) {
        let (schema, is_required) = schemas.request(&rpc, &in_path);
        operation["requestBody"] =
            json!({ "required": is_required, "content": { "application/json": { "schema": schema } } });
    }
    Some(operation)
}

fn content(route: &Route, rpc: &Rpc, schemas: &mut Schemas) -> Value {
    let mut schema = schemas.response(rpc);
    if ![EVENTS, ENTRIES].contains(&route.path) {
        return json!({ "application/json": { "schema": schema } });
    }
    schema["description"] = "One object a line. The last one may be an `Error`.".into();
    if route.path == ENTRIES {
        return json!({ "application/x-ndjson": { "schema": schema } });
    }
    let events = "Server-sent events: `id` is the revision, `event` is the kind (`recorded`, `unreadable`, `started`, \
                  `progress` or `bookmark`), and `data` is a `CycleEvent`. The last one may be `refused`, with an \
                  `Error`.";
    json!({
        "text/event-stream": { "schema": { "type": "string", "description": events } },
        "application/x-ndjson": { "schema": schema },
    })
}

/// An error as JSON, as `json` writes it.
fn error() -> Value {
    let text = |description: &str| json!({ "type": "string", "description": description });
    let violation = json!({
        "type": "object",
        "properties": { "field": text("Its path in the request."), "description": text("What is wrong with it.") },
    });
    let properties = json!({
        "code": { "type": "integer", "format": "int32", "description": "The status of HTTP." },
        "status": text("The name of the gRPC status code, such as NOT_FOUND."),
        "message": text("What was wrong, and what to do."),
        "reason": text("A constant, such as CYCLE_NOT_FOUND: the contract lists them at each RPC."),
        "metadata": {
            "type": "object",
            "additionalProperties": { "type": "string" },
            "description": "What the reason is about, such as the name of a subsystem.",
        },
        "fieldViolations": { "type": "array", "items": violation, "description": "The invalid fields of the request." },
    });
    let error = json!({ "type": "object", "required": ["code", "status", "message"], "properties": properties });
    json!({
        "type": "object",
        "description": "Why a call was refused, or has failed.",
        "required": ["error"],
        "properties": { "error": error },
    })
}

fn first_sentence(comment: &str) -> String {
    let first = comment.split("\n\n").next().unwrap_or_default();
    first.split_inclusive(". ").next().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use super::*;

    #[test]
    fn the_document_in_the_repository_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        let made = document();
        if std::env::var_os("ORCHESTRATOR_TEST_UPDATE").is_some() {
            fs::write(path, &made).unwrap();
        }
        let kept = fs::read_to_string(path).unwrap();
        assert!(kept == made, "docs/openapi.json is old: ORCHESTRATOR_TEST_UPDATE=1 cargo test --lib openapi");
    }

    #[test]
    fn the_document_has_every_route_and_what_it_refers_to() {
        let document: Value = serde_json::from_str(&document()).unwrap();
        let mut rpcs = BTreeSet::new();
        for Route { method, path, rpc, .. } in ROUTES {
            assert_eq!(document["paths"][path][word(*method)]["operationId"], *rpc, "{path}");
            assert!(rpcs.insert(rpc), "{rpc} has two routes");
        }
        let text = document.to_string();
        for reference in text.split("\"$ref\":\"#").skip(1).map(|rest| rest.split('"').next().unwrap()) {
            assert!(document.pointer(reference).is_some(), "{reference}");
        }
    }

    #[test]
    fn every_rpc_has_a_route() {
        let all: BTreeSet<_> = Schemas::new().unwrap().rpcs().into_iter().collect();
        assert_eq!(all, ROUTES.iter().map(|route| route.rpc.to_owned()).collect());
    }
}
