//! The status of all.

use prost::Message;
use tonic::Status;

use super::{
    error::{self, status as refused},
    gate::Entered,
    handlers::{Handlers, MAX_ANSWER},
    response,
};
use crate::proto::orchestrator::v1 as pb;

impl Handlers {
    pub(super) async fn get_status(
        &self,
        mut call: Entered<pb::GetStatusRequest>,
    ) -> Result<pb::GetStatusResponse, Status> {
        let pb::GetStatusRequest { include_subsystems, include_snapshots, omit_last_cycle } = call.take_request();
        let mut status = call.orchestrator().status();
        if omit_last_cycle {
            status.last = None;
        }
        let (loops, last) = (std::mem::take(&mut status.loops), status.last.take());
        let mut answer = response::status(status, self.is_insecure, call.membership());
        if let Some(last) = last {
            answer.last_cycle = call.orchestrator().history().keep(&last).await.map_err(refused)?;
        }
        let room = MAX_ANSWER.saturating_sub(answer.encoded_len());
        answer.loops = response::listed_loops(&call.authority, &loops, room);
        if answer.encoded_len() > MAX_ANSWER && !answer.loops.is_empty() {
            answer.last_cycle.clear();
        }
        if include_subsystems || include_snapshots {
            let room = MAX_ANSWER.saturating_sub(answer.encoded_len());
            let registered = call.orchestrator().subsystems(None, usize::MAX);
            let (subsystems, all_fit) = self.statuses(&call, &registered, include_snapshots, room).await;
            if !all_fit {
                return Err(error::answer_too_large(
                    None,
                    "page through ListSubsystems, and request snapshots one by one",
                ));
            }
            answer.subsystems = subsystems;
        }
        Ok(pb::GetStatusResponse { status: Some(answer) })
    }
}
