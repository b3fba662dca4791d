//! Calls and answers, to and from the messages of `dreamnet.subsystem.v1`.

use bytes::Bytes;

use crate::{
    model::{Answer, Code, Freshness, Issue, Payload, Severity, Subsystem},
    ports::{CallError, InitializeCall, RunCall},
    proto::{subsystem::v1 as pb, timestamp},
};

pub(super) fn initialize_request(to: &Subsystem, call: &InitializeCall) -> pb::InitializeRequest {
    pb::InitializeRequest {
        subsystem: to.name.to_string(),
        orchestrator_id: call.orchestrator_id.to_string(),
        epoch: call.epoch.0,
        parameters: to.parameters.as_bytes().clone(),
    }
}

pub(super) fn run_cycle_request(to: &Subsystem, call: RunCall) -> pb::RunCycleRequest {
    let inputs = call.inputs.into_iter().map(|input| {
        let message = match input.output {
            None => pb::Input { freshness: pb::Freshness::Absent.into(), ..pb::Input::default() },
            Some((output, freshness)) => pb::Input {
                output: output.payload.as_bytes().clone(),
                freshness: match freshness {
                    Freshness::Fresh => pb::Freshness::Fresh,
                    Freshness::Stale => pb::Freshness::Stale,
                }
                .into(),
                cycle_id: output.cycle_id.0,
            },
        };
        (input.name.to_string(), message)
    });
    pb::RunCycleRequest {
        subsystem: to.name.to_string(),
        cycle_id: call.cycle_id.0,
        epoch: call.epoch.0,
        attempt: call.attempt,
        scheduled_at: Some(timestamp(call.scheduled_at)),
        parameters: call.parameters.as_bytes().clone(),
        inputs: inputs.collect(),
    }
}

pub(super) fn answer(response: pb::RunCycleResponse) -> Result<Answer, CallError> {
    let issues = response.issues.into_iter().map(|issue| Issue {
        severity: match issue.severity() {
            pb::Severity::Info => Severity::Info,
            pb::Severity::Unspecified | pb::Severity::Warning => Severity::Warning,
            pb::Severity::Error => Severity::Error,
        },
        code: issue.code,
        message: issue.message,
    });
    Ok(Answer { output: payload("output", response.output)?, metrics: response.metrics, issues: issues.collect() })
}

/// A `Struct` in an answer.
pub(super) fn payload(field: &str, bytes: Bytes) -> Result<Payload, CallError> {
    Payload::check(bytes)
        .map_err(|malformed| CallError { code: Code::Internal, message: format!("its {field} {malformed}") })
}
