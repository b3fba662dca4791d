//! The services of `dreamnet.orchestrator.v1`, and that of a subsystem for parents (`served`). Each call enters by the
//! `gate`, and its handler parses it, calls the orchestrator and converts the answer.

mod caller;
mod calls;
mod cycles;
mod error;
mod follower;
mod forward;
mod forwarded;
mod gate;
mod handlers;
mod judge;
mod leading;
mod ledger;
mod loops;
mod registry;
mod request;
mod response;
mod rpc;
mod rules;
mod served;
mod status;
mod streaming;
mod update;
mod usage;

use std::{future::ready, pin::Pin, sync::Arc};

use futures_util::Stream;
use tokio::select;
use tonic::{Request, Response, Status, codegen::http::HeaderMap};

pub use self::{
    caller::{Caller, Way},
    calls::CallCounts,
    forward::{Connect, ForwardedCounts, Forwarder},
    gate::{Begun, Entered, EnteredHere},
    response::{interval_loop, plan, registration},
    rpc::{LogIn, Scrape},
};
use self::{
    gate::Gate,
    handlers::Handlers,
    judge::Judge,
    leading::Leading,
    rpc::Rpc,
    streaming::{Called, Watching},
};
use crate::{
    access::{Policy, Reach},
    clock::Clock,
    cluster::Membership,
    listen::{Peer, Services},
    memory::Memory,
    orchestrator::{History, NotReady, Orchestrator, StoreEnded, Sums},
    proto::orchestrator::v1::{
        self as pb,
        access_server::{Access, AccessServer},
        ledger_server::LedgerServer,
        orchestrator_server::{Orchestrator as Service, OrchestratorServer},
    },
    proto::subsystem::v1::subsystem_server::SubsystemServer,
};

/// Adds the services with these RPCs to others; a request has at most this many bytes.
pub(crate) fn services(api: Api, max_request_bytes: usize, others: Services) -> Services {
    let orchestrator = Watching {
        others: OrchestratorServer::new(api.clone()).max_decoding_message_size(max_request_bytes),
        api: api.clone(),
        max_request_bytes,
    };
    let subsystem = SubsystemServer::new(api.clone()).max_decoding_message_size(max_request_bytes);
    others
        .and(Called { service: orchestrator, api: api.clone() })
        .and(Called { service: subsystem, api: api.clone() })
        .and(Called { service: AccessServer::new(api.clone()), api: api.clone() })
        .and(Called { service: LedgerServer::new(api.clone()), api })
}

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The stream of `WatchCycles`.
type Events = Answers<pb::WatchCyclesResponse>;

/// The result of every RPC.
type Answer<T> = Result<Response<T>, Status>;

/// The service's RPCs. All clones share their limits.
///
/// The maker of a request has to put its [`Caller`] into the extensions.
#[derive(Clone)]
pub struct Api {
    gate: Gate,
    handlers: Handlers,
    /// `None` if no other process can lead.
    forwarder: Option<Forwarder>,
}

impl Api {
    /// The RPCs of this replica, for callers that `policy` allows. The time of requests comes from `clock`. Calls
    /// without an event of their own are summed up in `sums`. `history` is read also while this replica follows.
    /// Decoded requests are held under the limit `requests`. Subsystems are registered within `reach`. The status says
    /// `is_insecure`.
    ///
    /// There is no orchestrator before [`Api::lead`].
    pub fn new(
        membership: Membership,
        policy: Policy,
        (clock, sums): (Clock, Sums),
        history: History,
        requests: Memory,
        reach: Reach,
        is_insecure: bool,
    ) -> Self {
        let judge = Judge::new(policy, clock, sums);
        let gate = Gate::new(Leading::new(membership, history), judge, requests);
        Self { gate, handlers: Handlers::new(clock, is_insecure, reach), forwarder: None }
    }

    /// Calls reach this orchestrator from now on: this replica leads.
    pub fn lead(&self, orchestrator: Arc<Orchestrator>) {
        self.gate.leading.set(Some(orchestrator));
    }

    /// Calls reach no orchestrator any more: this replica follows. Open calls keep the earlier one to their end.
    pub fn follow(&self) {
        self.gate.leading.set(None);
    }

    /// This replica, and its role.
    pub fn membership(&self) -> &Membership {
        self.gate.leading.membership()
    }

    /// Applies another policy, also to open streams.
    pub fn apply(&self, policy: Policy) {
        self.gate.judge.apply(policy);
    }

    /// Judges the callers of open streams again, since their certificates may not be trusted any more.
    pub(crate) fn judge_again(&self) {
        self.gate.judge.judge_again();
    }

    /// Begins a stream of the reflection service. It counts as open until the returned value is dropped.
    ///
    /// # Errors
    /// The identity of its caller is not known, or has reached one of its limits.
    pub(crate) fn begin_reflection(
        &self,
        peer: Peer,
        headers: &HeaderMap,
    ) -> Result<impl Send + Unpin + 'static + use<>, Status> {
        self.gate.begin_reflection(&Caller::of(Way::Grpc, peer, headers))
    }

    /// Begins a call of the RPC with this name at the admin address, before the body of its request is read.
    ///
    /// # Errors
    /// The identity of the caller is not known, or has reached one of its limits.
    pub(crate) fn begin(&self, rpc: &str, caller: &Caller) -> Result<Begun, Status> {
        self.gate.begin(caller, Rpc::of_name(rpc))
    }

    /// The request of a call that has begun, as `read` makes it.
    ///
    /// # Errors
    /// Those of `read`. Or it took its time, and gave way to another call of its caller.
    pub(crate) async fn receive<Q>(
        &self,
        rpc: &str,
        caller: Caller,
        begun: Begun,
        read: impl Future<Output = Result<Q, Status>>,
    ) -> Result<Request<Q>, Status> {
        let request = select! {
            biased;
            request = read => request?,
            status = self.gate.gives_way(begun.clone(), &caller, Rpc::of_name(rpc)) => return Err(status),
        };
        let mut request = caller.asks(request);
        request.extensions_mut().insert(begun);
        Ok(request)
    }

    /// Checks that a caller may have a description of the contract.
    ///
    /// # Errors
    /// Its identity is not known.
    pub(crate) fn check_description(&self, caller: &Caller) -> Result<(), Status> {
        self.gate.judge.check_beside(caller, "OpenAPI", rules::REFLECTION)
    }

    /// Checks that a caller may have the files of the dashboard.
    ///
    /// # Errors
    /// It may not.
    pub fn check_dashboard(&self, caller: &Caller) -> Result<(), Status> {
        self.gate.judge.check_beside(caller, "Dashboard", rules::DASHBOARD)
    }

    /// False if callers are not told apart, so that nobody needs to log in.
    pub fn reads_credentials(&self) -> bool {
        self.gate.judge.reads_credentials()
    }

    /// The same caller, in the session of this text. If that has ended, the identity of the caller is not known.
    #[must_use]
    pub fn in_session(&self, caller: Caller, text: &str) -> Caller {
        self.gate.judge.in_session(caller, text)
    }

    /// Begins a session of a token, for the dashboard, and returns its text.
    ///
    /// # Errors
    /// The token is missing, not valid, or has no right to the dashboard.
    pub async fn log_in(&self, caller: Caller, token: &str) -> Result<String, Status> {
        let begin = |call: EnteredHere<LogIn>| ready(self.gate.judge.begin_session(&call.caller));
        self.gate.answer_here(caller.with_token(token).asks(LogIn {}), begin).await.map(Response::into_inner)
    }

    /// Ends the session of this text, if it is open, and its streams.
    pub fn log_out(&self, text: &str) {
        self.gate.judge.end_session(text);
    }

    /// Checks that cycles and changes are accepted; by a follower, that the store can be read, that it could take over,
    /// and that it reaches the leader. Public: the reason reveals nothing.
    ///
    /// # Errors
    /// The service drains, its store can't be written or read, or it is of no use as a follower.
    pub fn check_ready(&self) -> Result<(), NotReady> {
        self.gate.leading.check_ready()?;
        match self.follows() {
            Some(forwarder) if !forwarder.reaches_leader() => Err(NotReady::LeaderUnreached),
            _ => Ok(()),
        }
    }

    /// Checks that a restart is not the only way to write again.
    ///
    /// # Errors
    /// It is.
    pub fn check_alive(&self) -> Result<(), StoreEnded> {
        self.gate.leading.check_alive()
    }

    /// Number of ended calls by result.
    pub fn calls(&self) -> Arc<CallCounts> {
        self.gate.calls()
    }

    /// Admits a reader of the metrics, until the returned value is dropped.
    ///
    /// # Errors
    /// This caller may not.
    pub async fn scrape(&self, request: Request<Scrape>) -> Result<EnteredHere<Scrape>, Status> {
        self.gate.answer_here(request, |call| ready(Ok(call))).await.map(Response::into_inner)
    }
}

#[tonic::async_trait]
impl Service for Api {
    async fn run_cycle(&self, request: Request<pb::RunCycleRequest>) -> Answer<pb::RunCycleResponse> {
        self.gate.answer(request, |call| self.handlers.run_cycle(call)).await
    }

    async fn cancel_cycle(&self, request: Request<pb::CancelCycleRequest>) -> Answer<pb::CancelCycleResponse> {
        self.gate.answer(request, cycles::cancel_cycle).await
    }

    async fn get_status(&self, request: Request<pb::GetStatusRequest>) -> Answer<pb::GetStatusResponse> {
        match self.follows() {
            Some(forwarder) => self.status_of_both(forwarder, request).await,
            None => self.gate.answer(request, |call| self.handlers.get_status(call)).await,
        }
    }

    type WatchCyclesStream = Events;

    async fn watch_cycles(&self, request: Request<pb::WatchCyclesRequest>) -> Answer<Events> {
        self.watch(request).await
    }

    async fn get_cycle(&self, request: Request<pb::GetCycleRequest>) -> Answer<pb::GetCycleResponse> {
        match self.follows() {
            Some(forwarder) => self.read_cycle(forwarder, request).await,
            None => self.gate.answer(request, cycles::get_cycle).await,
        }
    }

    async fn list_cycles(&self, request: Request<pb::ListCyclesRequest>) -> Answer<pb::ListCyclesResponse> {
        self.read_cycles(request).await
    }

    async fn prune_cycles(&self, request: Request<pb::PruneCyclesRequest>) -> Answer<pb::PruneCyclesResponse> {
        self.gate.answer(request, |call| self.handlers.prune_cycles(call)).await
    }

    async fn plan_cycle(&self, request: Request<pb::PlanCycleRequest>) -> Answer<pb::PlanCycleResponse> {
        self.gate.answer(request, |call| self.handlers.plan_cycle(call)).await
    }

    async fn register_subsystem(
        &self,
        request: Request<pb::RegisterSubsystemRequest>,
    ) -> Answer<pb::RegisterSubsystemResponse> {
        self.gate.answer(request, |call| self.handlers.register_subsystem(call)).await
    }

    async fn update_subsystem(
        &self,
        request: Request<pb::UpdateSubsystemRequest>,
    ) -> Answer<pb::UpdateSubsystemResponse> {
        self.gate.answer(request, |call| self.handlers.update_subsystem(call)).await
    }

    async fn rename_subsystem(
        &self,
        request: Request<pb::RenameSubsystemRequest>,
    ) -> Answer<pb::RenameSubsystemResponse> {
        self.gate.answer(request, |call| self.handlers.rename_subsystem(call)).await
    }

    async fn register_subsystems(
        &self,
        request: Request<pb::RegisterSubsystemsRequest>,
    ) -> Answer<pb::RegisterSubsystemsResponse> {
        self.gate.answer(request, |call| self.handlers.register_subsystems(call)).await
    }

    async fn unregister_subsystem(
        &self,
        request: Request<pb::UnregisterSubsystemRequest>,
    ) -> Answer<pb::UnregisterSubsystemResponse> {
        self.gate.answer(request, registry::unregister_subsystem).await
    }

    async fn get_subsystem(&self, request: Request<pb::GetSubsystemRequest>) -> Answer<pb::GetSubsystemResponse> {
        self.gate.answer(request, registry::get_subsystem).await
    }

    async fn list_subsystems(&self, request: Request<pb::ListSubsystemsRequest>) -> Answer<pb::ListSubsystemsResponse> {
        self.gate.answer(request, |call| self.handlers.list_subsystems(call)).await
    }

    async fn renew_lease(&self, request: Request<pb::RenewLeaseRequest>) -> Answer<pb::RenewLeaseResponse> {
        self.gate.answer(request, registry::renew_lease).await
    }

    async fn suspend_subsystem(
        &self,
        request: Request<pb::SuspendSubsystemRequest>,
    ) -> Answer<pb::SuspendSubsystemResponse> {
        self.gate.answer(request, registry::suspend_subsystem).await
    }

    async fn resume_subsystem(
        &self,
        request: Request<pb::ResumeSubsystemRequest>,
    ) -> Answer<pb::ResumeSubsystemResponse> {
        self.gate.answer(request, registry::resume_subsystem).await
    }

    async fn start_interval_loop(
        &self,
        request: Request<pb::StartIntervalLoopRequest>,
    ) -> Answer<pb::StartIntervalLoopResponse> {
        self.gate.answer(request, |call| self.handlers.start_interval_loop(call)).await
    }

    async fn stop_interval_loop(
        &self,
        request: Request<pb::StopIntervalLoopRequest>,
    ) -> Answer<pb::StopIntervalLoopResponse> {
        self.gate.answer(request, loops::stop_interval_loop).await
    }

    async fn pause_interval_loops(
        &self,
        request: Request<pb::PauseIntervalLoopsRequest>,
    ) -> Answer<pb::PauseIntervalLoopsResponse> {
        self.gate.answer(request, loops::pause_interval_loops).await
    }

    async fn resume_interval_loops(
        &self,
        request: Request<pb::ResumeIntervalLoopsRequest>,
    ) -> Answer<pb::ResumeIntervalLoopsResponse> {
        self.gate.answer(request, loops::resume_interval_loops).await
    }

    async fn list_interval_loops(
        &self,
        request: Request<pb::ListIntervalLoopsRequest>,
    ) -> Answer<pb::ListIntervalLoopsResponse> {
        self.gate.answer(request, loops::list_interval_loops).await
    }
}

#[tonic::async_trait]
impl Access for Api {
    async fn who_am_i(&self, request: Request<pb::WhoAmIRequest>) -> Answer<pb::WhoAmIResponse> {
        let who = |call: EnteredHere<pb::WhoAmIRequest>| ready(Ok(response::who(&self.gate.judge.who(&call.caller))));
        self.gate.answer_here(request, who).await
    }
}
