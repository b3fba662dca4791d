//! What a replica answers itself while it does not lead: reads of the history, from the store, and watches, from the
//! one stream that it has from the leader. It shows no record that no leader has told it to be acknowledged. Without a
//! leader, reads go on.
//!
//! The caller is judged here, by the same rules, and the leader is told for the audit (`forward`).

use prost::Message;
use tonic::{Request, Response, Status};

use super::{
    Answer, Api, Events, cycles,
    error::{is_of_replica, is_of_store, status},
    forward::Forwarder,
    gate::Reading,
    handlers::invalid,
    request, response,
    rpc::{Asks, Rpc},
};
use crate::{model::Revision, orchestrator::Refusal, proto::orchestrator::v1 as pb};

impl Api {
    /// The forwarder, while this replica does not lead.
    pub(super) fn follows(&self) -> Option<&Forwarder> {
        self.forwarder.as_ref().filter(|forwarder| forwarder.follows())
    }

    /// The forwarder, if the leader answers calls of this RPC, as they come. If the leader would not take the word of
    /// this replica for what its callers read, that are all but those of its own status.
    pub(super) fn forwards(&self, rpc: Rpc) -> Option<&Forwarder> {
        let is_answered = rpc.is_answered_by_followers() && (rpc == Rpc::GetStatus || self.gate.judge.knows_replicas());
        self.follows().filter(|_| !is_answered)
    }

    /// The status of the leader, with the role of this replica.
    pub(super) async fn status_of_both(
        &self,
        forwarder: &Forwarder,
        request: Request<pb::GetStatusRequest>,
    ) -> Answer<pb::GetStatusResponse> {
        let mut answer: pb::GetStatusResponse = self.only(forwarder, Rpc::GetStatus, request).await?;
        answer.status = answer.status.map(|status| response::asked_at(self.membership(), status));
        Ok(Response::new(answer))
    }

    /// The record of a cycle. One that is not acknowledged here may be at the leader, and so may all while the store
    /// can't be read.
    pub(super) async fn read_cycle(
        &self,
        forwarder: &Forwarder,
        request: Request<pb::GetCycleRequest>,
    ) -> Answer<pb::GetCycleResponse> {
        let read = |call: Reading<pb::GetCycleRequest>| async move {
            let cycle_id = request::cycle_id(call.request().cycle_id).map_err(invalid)?;
            match call.history().cycle(cycle_id).await.map_err(status) {
                Ok(Some(record)) => Ok(pb::GetCycleResponse { telemetry: record.bytes.clone() }),
                Ok(None) => self.pass_on(forwarder, &call).await,
                Err(unread) => self.pass_unread(forwarder, &call, unread).await,
            }
        };
        self.gate.answer_reading(request, read).await
    }

    /// A page of the history, by any replica. A follower that does not follow the leader's stream may lack the newest
    /// records, so it answers only if the leader can't. If it lacks some that the page before, of another replica, has
    /// left for this one, it does not answer.
    pub(super) async fn read_cycles(&self, request: Request<pb::ListCyclesRequest>) -> Answer<pb::ListCyclesResponse> {
        let read = |call: Reading<pb::ListCyclesRequest>| async move {
            if let Some(forwarder) = self.follows() {
                // Other tokens are refused below.
                let before = request::place(&call.request().page_token).map(Revision).unwrap_or_default();
                let lacks_some = || call.history().lacks(before);
                if !forwarder.is_current() || lacks_some() {
                    match self.pass_on(forwarder, &call).await {
                        Err(status) if is_of_replica(&status) && !lacks_some() => {}
                        answered => return answered,
                    }
                }
            }
            let listed = async {
                let request = call.request().clone();
                if self.follows().is_some() && !request.subsystem.is_empty() {
                    call.history().read_names().await.map_err(status)?;
                }
                cycles::list_cycles(call.history(), request).await
            };
            match (listed.await, self.follows()) {
                (Err(unread), Some(forwarder)) => self.pass_unread(forwarder, &call, unread).await,
                (listed, _) => listed,
            }
        };
        self.gate.answer_reading(request, read).await
    }

    /// A watch. It stays open while replicas take over from each other, unless it is forwarded.
    pub(super) async fn watch(&self, request: Request<pb::WatchCyclesRequest>) -> Answer<Events> {
        let here = |api: Self, request| async move { api.watch_here(request).await };
        self.streaming(Rpc::WatchCycles.name(), request, here).await.map(Response::new)
    }

    async fn watch_here(&self, request: Request<pb::WatchCyclesRequest>) -> Answer<Events> {
        let read = |call: Reading<pb::WatchCyclesRequest>| async move {
            if let Some(forwarder) = self.follows() {
                let pb::WatchCyclesRequest { after_revision, subsystems, .. } = call.request();
                // It may resume after a record that another replica has given it.
                let is_unknown = || {
                    let known = call.history().known().map(|known| known.revision.0);
                    known.is_none() || known < *after_revision
                };
                if is_unknown() && !forwarder.refresh().await && is_unknown() {
                    return Err(status(Refusal::NotFollowing));
                }
                if !subsystems.is_empty() {
                    call.history().read_names().await.map_err(status)?;
                }
            }
            cycles::watch_cycles(call)
        };
        self.gate.stream_reading(request, read).await.map(Response::new)
    }

    /// Has the leader answer a read that has failed here, if the store can't be read here.
    async fn pass_unread<Q: Asks, A: Message + Default>(
        &self,
        forwarder: &Forwarder,
        call: &Reading<Q>,
        unread: Status,
    ) -> Result<A, Status> {
        if !is_of_store(&unread) {
            return Err(unread);
        }
        match self.pass_on(forwarder, call).await {
            Err(status) if is_of_replica(&status) => Err(unread),
            answered => answered,
        }
    }

    /// Has the leader answer a call that was let in here.
    async fn pass_on<Q: Asks, A: Message + Default>(
        &self,
        forwarder: &Forwarder,
        call: &Reading<Q>,
    ) -> Result<A, Status> {
        let _room = self.gate.room(call.request().encoded_len())?;
        let answered = forwarder.only(Q::RPC, call.caller.clone(), call.begun(), call.request()).await;
        if !answered.as_ref().is_err_and(is_of_replica) {
            call.is_audited_elsewhere();
        }
        answered
    }
}
