//! Requests of `dreamnet.subsystem.v1`.

use crate::{
    model::{Freshness, Subsystem},
    ports::{InitializeCall, RunCall},
    proto::{subsystem::v1 as pb, timestamp},
};

pub(super) fn initialize(to: &Subsystem, call: &InitializeCall) -> pb::InitializeRequest {
    pb::InitializeRequest {
        subsystem: to.name.to_string(),
        orchestrator_id: call.orchestrator_id.to_string(),
        epoch: call.epoch.0,
        parameters: to.parameters.as_bytes().clone(),
    }
}

pub(super) fn run_cycle(to: &Subsystem, call: RunCall) -> pb::RunCycleRequest {
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
