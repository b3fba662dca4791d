//! Interval loops: starting, stopping, pausing and listing them.

use prost::Message;
use tonic::Status;

use super::{
    error::status,
    gate::Entered,
    handlers::{Handlers, MAX_ANSWER, invalid},
    request, response,
};
use crate::{orchestrator::Refusal, proto::orchestrator::v1 as pb};

impl Handlers {
    pub(super) async fn start_interval_loop(
        &self,
        mut call: Entered<pb::StartIntervalLoopRequest>,
    ) -> Result<pb::StartIntervalLoopResponse, Status> {
        let (request, by) = call.take_change();
        let named = request.r#loop.as_ref().map_or(0, |settings| settings.subsystems.len());
        let read = self.offload(named, move || request::interval_loop(request.r#loop)).await?;
        let entry =
            call.orchestrator().start_loop(read.map_err(invalid)?, by).await.map_err(|refusal| match refusal {
                Refusal::Invalid(violations) => invalid(violations.inside("loop")),
                refusal => status(refusal),
            })?;
        Ok(pb::StartIntervalLoopResponse { r#loop: Some(response::loop_status(&call.authority, &entry)) })
    }
}

pub(super) async fn stop_interval_loop(
    mut call: Entered<pb::StopIntervalLoopRequest>,
) -> Result<pb::StopIntervalLoopResponse, Status> {
    let (request, by) = call.take_change();
    let name = request::name("name", &request.name).map_err(invalid)?;
    let entry = call.orchestrator().stop_loop(&name, by).await.map_err(status)?;
    Ok(pb::StopIntervalLoopResponse { r#loop: Some(response::loop_status(&call.authority, &entry)) })
}

pub(super) async fn pause_interval_loops(
    mut call: Entered<pb::PauseIntervalLoopsRequest>,
) -> Result<pb::PauseIntervalLoopsResponse, Status> {
    let (request, by) = call.take_change();
    let choice = request::loop_choice(&request.name, request.all).map_err(invalid)?;
    let loops = call.orchestrator().pause_loops(choice, true, by).await.map_err(status)?;
    Ok(pb::PauseIntervalLoopsResponse { loops: response::listed_loops(&call.authority, &loops, MAX_ANSWER) })
}

pub(super) async fn resume_interval_loops(
    mut call: Entered<pb::ResumeIntervalLoopsRequest>,
) -> Result<pb::ResumeIntervalLoopsResponse, Status> {
    let (request, by) = call.take_change();
    let choice = request::loop_choice(&request.name, request.all).map_err(invalid)?;
    let loops = call.orchestrator().pause_loops(choice, false, by).await.map_err(status)?;
    Ok(pb::ResumeIntervalLoopsResponse { loops: response::listed_loops(&call.authority, &loops, MAX_ANSWER) })
}

pub(super) async fn list_interval_loops(
    mut call: Entered<pb::ListIntervalLoopsRequest>,
) -> Result<pb::ListIntervalLoopsResponse, Status> {
    let pb::ListIntervalLoopsRequest { page_size, page_token } = call.take_request();
    let (after, page_size) = request::page(page_size, &page_token, 1000).map_err(invalid)?;
    let mut answer = pb::ListIntervalLoopsResponse::default();
    let mut last = None;
    let mut bytes = 0;
    for entry in call.orchestrator().loops() {
        if after.as_ref().is_some_and(|after| entry.settings.name <= *after) {
            continue;
        }
        let status = response::loop_status(&call.authority, &entry);
        bytes += status.encoded_len() + response::AROUND;
        // A single entry always fits.
        if let Some(last) = last.filter(|_| answer.loops.len() == page_size || bytes > MAX_ANSWER) {
            answer.next_page_token = last;
            break;
        }
        last = Some(entry.settings.name.to_string());
        answer.loops.push(status);
    }
    Ok(answer)
}
