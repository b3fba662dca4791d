//! The RPCs that the admin address offers as JSON: one table, which the server and the OpenAPI document follow.
//!
//! A GET only reads: the fields of its request are parameters. Any other method runs or changes something: its request
//! is the body. A name in braces is a field of the request in both cases.

use axum::{
    Router,
    response::Response,
    routing::{MethodFilter, on},
};
use futures_util::{FutureExt, future::BoxFuture};

use super::json::{self, Answers, Asked};
use crate::proto::orchestrator::v1::{
    access_server::Access as _, ledger_server::Ledger as _, orchestrator_server::Orchestrator as _,
};

/// An RPC at a path.
pub(super) struct Route {
    pub(super) method: Method,
    /// As in axum and in OpenAPI.
    pub(super) path: &'static str,
    /// Its name in the contract.
    pub(super) rpc: &'static str,
    /// The name in the path, and the field that it is, if that has another name.
    pub(super) renamed: Option<(&'static str, &'static str)>,
    answer: fn(Asked) -> BoxFuture<'static, Response>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Post,
    Patch,
    Delete,
}

impl Method {
    fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Post => MethodFilter::POST,
            Self::Patch => MethodFilter::PATCH,
            Self::Delete => MethodFilter::DELETE,
        }
    }
}

macro_rules! routes {
    ($($method:ident $path:literal $rpc:ident = $call:ident $(($name:literal is $field:literal))?;)+) => {
        pub(super) static ROUTES: &[Route] = &[
            Route {
                method: Method::Get,
                path: EVENTS,
                rpc: "WatchCycles",
                renamed: None,
                answer: |asked| json::events(asked).boxed(),
            },
            Route {
                method: Method::Get,
                path: ENTRIES,
                rpc: "ReadEntries",
                renamed: None,
                answer: |asked| json::entries(asked).boxed(),
            },
            $(Route {
                method: Method::$method,
                path: $path,
                rpc: stringify!($rpc),
                renamed: first(&[$(($name, $field))?]),
                answer: |asked| {
                    asked.answer(stringify!($rpc), |api, request| async move { api.$call(request).await }).boxed()
                },
            },)+
        ];
    };
}

/// The stream of events, which has media types of its own.
pub(super) const EVENTS: &str = "/api/events";
/// The log, which is streamed as lines of JSON.
pub(super) const ENTRIES: &str = "/api/log/entries";

routes! {
    Get "/api/status" GetStatus = get_status;
    Get "/api/plan" PlanCycle = plan_cycle;

    Get "/api/cycles" ListCycles = list_cycles;
    Post "/api/cycles" RunCycle = run_cycle;
    Get "/api/cycles/{cycleId}" GetCycle = get_cycle;
    Post "/api/cycles/{cycleId}/cancel" CancelCycle = cancel_cycle;
    Post "/api/cycles/prune" PruneCycles = prune_cycles;

    Get "/api/subsystems" ListSubsystems = list_subsystems;
    Post "/api/subsystems" RegisterSubsystem = register_subsystem;
    Get "/api/subsystems/{name}" GetSubsystem = get_subsystem;
    Patch "/api/subsystems/{name}" UpdateSubsystem = update_subsystem ("name" is "registration.name");
    Delete "/api/subsystems/{name}" UnregisterSubsystem = unregister_subsystem;
    Post "/api/subsystems/{name}/rename" RenameSubsystem = rename_subsystem;
    Post "/api/subsystems/{name}/renew" RenewLease = renew_lease;
    Post "/api/subsystems/{name}/suspend" SuspendSubsystem = suspend_subsystem;
    Post "/api/subsystems/{name}/resume" ResumeSubsystem = resume_subsystem;
    // Many at once. A subsystem may have any name, so there is no room for another word below `/api/subsystems/`.
    Post "/api/registrations" RegisterSubsystems = register_subsystems;

    Get "/api/loops" ListIntervalLoops = list_interval_loops;
    Post "/api/loops" StartIntervalLoop = start_interval_loop;
    Post "/api/loops/{name}/stop" StopIntervalLoop = stop_interval_loop;
    // One loop, or all of them.
    Post "/api/loops/pause" PauseIntervalLoops = pause_interval_loops;
    Post "/api/loops/resume" ResumeIntervalLoops = resume_interval_loops;

    Get "/api/log/checkpoint" GetCheckpoint = get_checkpoint;
    Get "/api/log/inclusion" GetInclusionProof = get_inclusion_proof;
    Get "/api/log/consistency" GetConsistencyProof = get_consistency_proof;

    Get "/api/audit" ListAuditEvents = list_audit_events;
    Get "/api/whoami" WhoAmI = who_am_i;
}

const fn first(renamed: &[(&'static str, &'static str)]) -> Option<(&'static str, &'static str)> {
    match renamed {
        [renamed, ..] => Some(*renamed),
        [] => None,
    }
}

pub(super) fn router() -> Router<Answers> {
    ROUTES.iter().fold(Router::new(), |router, route| {
        let answer = move |asked: Asked| (route.answer)(asked.renamed(route.renamed));
        router.route(route.path, on(route.method.filter(), answer))
    })
}
