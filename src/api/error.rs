//! The one place where a refusal becomes a gRPC status.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    model::{Violation, Violations},
    orchestrator::Refusal,
};

/// The domain of every reason: the contract gives it.
const DOMAIN: &str = "orchestrator.dreamnet";

/// The status of a refusal, with its details.
pub(super) fn status(refusal: Refusal) -> Status {
    let message = refusal.to_string();
    let (code, reason, metadata) = match refusal {
        Refusal::Invalid(violations) => return invalid(violations),
        Refusal::SubsystemNotFound(name) => {
            (Code::NotFound, "SUBSYSTEM_NOT_FOUND", vec![("subsystem", name.to_string())])
        }
        Refusal::CycleRunning(id) | Refusal::CycleWaiting(id) => {
            (Code::Aborted, "CYCLE_RUNNING", vec![("cycle_id", id.to_string())])
        }
        Refusal::QueueFull(waiting) => {
            (Code::ResourceExhausted, "QUEUE_FULL", vec![("queued_cycles", waiting.to_string())])
        }
        Refusal::StoreUnavailable(id, _) => {
            let id = id.map(|id| ("cycle_id", id.to_string()));
            (Code::Unavailable, "STORE_UNAVAILABLE", id.into_iter().collect())
        }
        Refusal::CycleNotFound(id) => (Code::NotFound, "CYCLE_NOT_FOUND", vec![("cycle_id", id.to_string())]),
        Refusal::CycleFinished(id) => (Code::FailedPrecondition, "CYCLE_FINISHED", vec![("cycle_id", id.to_string())]),
        Refusal::CycleNotFinished(id) => {
            (Code::FailedPrecondition, "CYCLE_NOT_FINISHED", vec![("cycle_id", id.to_string())])
        }
        Refusal::RevisionNotRetained { oldest, newest, .. } => (
            Code::OutOfRange,
            "REVISION_NOT_RETAINED",
            vec![("oldest_revision", oldest.to_string()), ("newest_revision", newest.to_string())],
        ),
        Refusal::TooManyWatchers(_) => (Code::ResourceExhausted, "TOO_MANY_WATCHERS", vec![]),
        Refusal::OrderRing(ring) => {
            let names: Vec<_> = ring.names().map(ToString::to_string).collect();
            (Code::InvalidArgument, "ORDER_RING", vec![("ring", names.join(","))])
        }
        Refusal::DeclaredInConfig(name) => {
            (Code::FailedPrecondition, "DECLARED_IN_CONFIG", vec![("name", name.to_string())])
        }
        Refusal::RegistryFull(_) => (Code::ResourceExhausted, "REGISTRY_FULL", vec![]),
        Refusal::NoLease(name) => (Code::FailedPrecondition, "NO_LEASE", vec![("subsystem", name.to_string())]),
        Refusal::TooManyLoops(_) => (Code::ResourceExhausted, "TOO_MANY_LOOPS", vec![]),
        Refusal::LoopNotFound(name) => (Code::NotFound, "LOOP_NOT_FOUND", vec![("loop", name.to_string())]),
        Refusal::Draining => (Code::Unavailable, "DRAINING", vec![]),
    };
    with_reason(code, message, reason, metadata)
}

/// The status of a request with malformed fields, each named.
fn invalid(violations: Violations) -> Status {
    let message = violations.to_string();
    let mut details = ErrorDetails::with_error_info("INVALID_FIELDS", DOMAIN, HashMap::new());
    for Violation { field, problem } in violations.0 {
        details.add_bad_request_violation(field, problem);
    }
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// The status of an answer that would be larger than clients take.
pub(super) fn answer_too_large(what_to_do: &str) -> Status {
    let message = format!("the answer would be larger than 3 MiB; {what_to_do}");
    with_reason(Code::ResourceExhausted, message, "ANSWER_TOO_LARGE", vec![])
}

fn with_reason(code: Code, message: String, reason: &str, metadata: Vec<(&str, String)>) -> Status {
    let metadata: HashMap<_, _> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, metadata))
}
