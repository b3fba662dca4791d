//! Cycles: running and cancelling them, their plan, their history and their stream.

use std::sync::Arc;

use futures_util::{Stream, stream};
use tonic::Status;

use super::{
    error::{self, status},
    gate::{Entered, Reading},
    handlers::{Handlers, MAX_ANSWER, invalid},
    request, response,
};
use crate::{
    engine::Schedule,
    model::{CycleRequest, Name},
    orchestrator::{History, Orchestrator, Pruned},
    ports::Page,
    proto::orchestrator::v1 as pb,
};

impl Handlers {
    pub(super) async fn prune_cycles(
        &self,
        mut call: Entered<pb::PruneCyclesRequest>,
    ) -> Result<pb::PruneCyclesResponse, Status> {
        let (request, by) = call.take_change();
        let limit = request::prune_limit(&request, self.clock.now()).map_err(invalid)?;
        let Pruned { removed, kept } = if request.dry_run {
            Pruned { removed: call.orchestrator().count_prunable(limit).await.map_err(status)?, kept: None }
        } else {
            call.orchestrator().prune(limit, by).await.map_err(status)?
        };
        let oldest_revision = call.orchestrator().status().oldest_revision.0;
        let kept = kept.map(|error| error.to_string()).unwrap_or_default();
        Ok(pb::PruneCyclesResponse { removed, oldest_revision, kept })
    }

    pub(super) async fn run_cycle(
        &self,
        mut call: Entered<pb::RunCycleRequest>,
    ) -> Result<pb::RunCycleResponse, Status> {
        let trace = call.caller.trace.clone();
        let triggered_by = call.authority.identity().cloned();
        let (request, by) = call.take_change();
        let (validate_only, is_async) = (request.validate_only, request.r#async);
        let named = request.subsystems.len();
        let now = self.clock.now();
        let read = move || request::cycle(request, triggered_by, trace, now);
        let request = self.offload(named, read).await?.map_err(invalid)?;
        if validate_only {
            let subset = call.orchestrator().registered_names(request.subset).await.map_err(status)?;
            let (plan, next) =
                response::plan_page(self.schedule(call.orchestrator(), subset).await, 0, usize::MAX, MAX_ANSWER);
            if next.is_some() {
                return Err(error::answer_too_large(None, "use PlanCycle, which has pages"));
            }
            return Ok(pb::RunCycleResponse { plan: Some(plan), ..Default::default() });
        }
        let request = CycleRequest { cause: Some(Arc::new(by)), ..request };
        let ticket = call.orchestrator().run_cycle(request, is_async).await.map_err(status)?;
        // The rest of the request belongs to the cycle.
        call.forget_request();
        let cycle_id = ticket.cycle_id.0;
        let record = if is_async { ticket.record_now() } else { Some(ticket.recorded().await.map_err(status)?) };
        let telemetry = match record {
            Some(record) => call.orchestrator().history().keep(&record).await.map_err(status)?,
            None => bytes::Bytes::new(),
        };
        Ok(pb::RunCycleResponse { cycle_id, telemetry, plan: None })
    }

    pub(super) async fn plan_cycle(
        &self,
        mut call: Entered<pb::PlanCycleRequest>,
    ) -> Result<pb::PlanCycleResponse, Status> {
        let request = call.take_request();
        let read = self.offload(request.subsystems.len(), move || request::plan(request)).await?;
        let request::PlanPage { subset, from, page_size } = read.map_err(invalid)?;
        let (plan, next) =
            response::plan_page(self.schedule(call.orchestrator(), subset).await, from, page_size, MAX_ANSWER);
        let next_page_token = next.map(|next| next.to_string()).unwrap_or_default();
        Ok(pb::PlanCycleResponse { plan: Some(plan), next_page_token })
    }

    async fn schedule(&self, orchestrator: &Orchestrator, subset: Option<Arc<[Name]>>) -> Schedule {
        let _turn = self.turn.acquire().await;
        orchestrator.plan_cycle(subset).await
    }
}

pub(super) async fn cancel_cycle(mut call: Entered<pb::CancelCycleRequest>) -> Result<pb::CancelCycleResponse, Status> {
    let (request, by) = call.take_change();
    let cycle_id = request::cycle_id(request.cycle_id).map_err(invalid)?;
    let record = call.orchestrator().cancel_cycle(cycle_id, by).await.map_err(status)?;
    let telemetry = call.orchestrator().history().keep(&record).await.map_err(status)?;
    Ok(pb::CancelCycleResponse { telemetry })
}

pub(super) async fn get_cycle(mut call: Entered<pb::GetCycleRequest>) -> Result<pb::GetCycleResponse, Status> {
    let cycle_id = request::cycle_id(call.take_request().cycle_id).map_err(invalid)?;
    let record = call.orchestrator().cycle(cycle_id).await.map_err(status)?;
    Ok(pb::GetCycleResponse { telemetry: record.bytes.clone() })
}

pub(super) async fn list_cycles(
    history: &History,
    request: pb::ListCyclesRequest,
) -> Result<pb::ListCyclesResponse, Status> {
    let request::List { before, filter, parts, page_size } = request::list(request).map_err(invalid)?;
    let Page { records, next, .. } = history.cycles(before, filter, parts, page_size).await.map_err(status)?;
    let mut answer = pb::ListCyclesResponse {
        next_page_token: next.map(|next| next.to_string()).unwrap_or_default(),
        ..Default::default()
    };
    for found in records {
        match found {
            Ok(record) => answer.cycles.push(record.bytes),
            Err(unreadable) => answer.unreadable.push(response::unreadable(unreadable)),
        }
    }
    Ok(answer)
}

/// Begins a stream, which keeps the call until it ends.
pub(super) fn watch_cycles(
    mut call: Reading<pb::WatchCyclesRequest>,
) -> Result<impl Stream<Item = Result<pb::WatchCyclesResponse, Status>>, Status> {
    // Followers would follow each other.
    if call.caller.was_forwarded && call.membership().has_peers() && call.membership().role().epoch().is_none() {
        return Err(error::not_leader(call.membership()));
    }
    let (from, filter, progress) = request::watch(call.take_request()).map_err(invalid)?;
    let watcher = call.history().watch(from, filter, progress).map_err(status)?;
    // The rest of the request belongs to the watcher.
    call.forget_request();
    Ok(stream::unfold(Some((watcher, call)), |open| async {
        let (mut watcher, call) = open?;
        match watcher.next().await {
            Ok(event) => Some((Ok(response::event(event)), Some((watcher, call)))),
            Err(refusal) => Some((Err(status(refusal)), None)),
        }
    }))
}
