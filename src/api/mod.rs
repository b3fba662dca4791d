//! The `dreamnet.orchestrator.v1.Orchestrator` service: parses, calls the orchestrator, converts.

mod error;
mod request;
mod response;
mod streaming;

use std::{convert::Infallible, panic::resume_unwind, pin::Pin, sync::Arc};

use futures_util::{Stream, stream};
use prost::Message;
use tokio::{
    sync::Semaphore,
    task::{spawn_blocking, yield_now},
};
use tonic::{Request, Response, Status, body::Body, codegen::http, server::NamedService};

pub use self::response::{plan, registration};
use self::{error::status, streaming::Watching};
use crate::{
    clock::Clock,
    memory::{Held, Memory},
    model::Name,
    orchestrator::{Change, Orchestrator, Page, Refusal, Registered, Schedule},
    proto::{
        orchestrator::v1::{
            self as pb,
            orchestrator_server::{Orchestrator as Service, OrchestratorServer},
        },
        timestamp,
    },
};

/// The most bytes of an answer: below the 4 MiB that clients take by default.
const MAX_ANSWER: usize = 3 << 20;

/// Serves these RPCs; requests may have this many bytes.
pub fn service(
    api: Api,
    max_request_bytes: usize,
) -> impl tonic::codegen::Service<
    http::Request<Body>,
    Response = http::Response<Body>,
    Error = Infallible,
    Future: Send + 'static,
> + NamedService
+ Clone
+ Send
+ Sync
+ 'static {
    let others = OrchestratorServer::new(api.clone()).max_decoding_message_size(max_request_bytes);
    Watching { others, api, max_request_bytes }
}

/// What `WatchCycles` answers.
type Events = Pin<Box<dyn Stream<Item = Result<pb::WatchCyclesResponse, Status>> + Send>>;

/// The service's RPCs. All clones share their bounds.
#[derive(Clone)]
pub struct Api {
    orchestrator: Orchestrator,
    clock: Clock,
    /// What requests have become, while they wait.
    requests: Memory,
    /// For those who ask for the snapshots of all: what comes is of any size until it is seen what fits.
    asking_all: Arc<Semaphore>,
    /// What takes long is done one at a time, so that it takes no more than one processor from cycles.
    turn: Arc<Semaphore>,
}

/// How many may ask for the snapshots of all at one time; the others wait.
const MAX_ASKING_ALL: usize = 2;

impl Api {
    /// The RPCs of this orchestrator, whose requests are made at the time of `clock`. What requests become is held under the limit for `requests`.
    pub fn new(orchestrator: Orchestrator, clock: Clock, requests: Memory) -> Self {
        let [asking_all, turn] = [MAX_ASKING_ALL, 1].map(|places| Arc::new(Semaphore::new(places)));
        Self { orchestrator, clock, requests, asking_all, turn }
    }

    /// Room for what a request becomes, for as long as it waits: lists of short texts grow the most.
    fn hold(&self, request: &impl Message) -> Result<Option<Held>, Status> {
        const GROWTH: usize = 16;
        /// Bytes of one that needs none: as long as others fill it, small requests go on.
        const SMALL: usize = 512;
        let bytes = request.encoded_len();
        match self.requests.try_hold(bytes.saturating_mul(GROWTH)) {
            Err(full) if bytes > SMALL => Err(status(Refusal::MemoryFull(full))),
            held => Ok(held.ok()),
        }
    }

    /// Does what goes over so many subsystems: where they are many it may take milliseconds, and is done where no cycle waits
    /// for it.
    async fn over<T: Send + 'static>(
        &self,
        subsystems: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        const FEW: usize = 512;
        if subsystems <= FEW {
            return Ok(work());
        }
        let turn = self.turn.clone().acquire_owned().await;
        let done = spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        done.await.map_err(|ended| match ended.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_runtime_is_shut_down) => status(Refusal::Draining),
        })
    }

    async fn schedule(&self, subset: Option<Arc<[Name]>>) -> Schedule {
        let _turn = self.turn.acquire().await;
        self.orchestrator.plan_cycle(subset).await
    }
}

/// What every handler returns.
type Answer<T> = Result<Response<T>, Status>;

fn invalid(violations: crate::model::Violations) -> Status {
    status(Refusal::Invalid(violations))
}

impl Api {
    fn subsystem_status(&self, registered: &Registered) -> pb::SubsystemStatus {
        let status = response::subsystem_status(&self.orchestrator, registered, false, None);
        pb::SubsystemStatus { last: status.last.map(response::listed_part), ..status }
    }

    /// The status of each, as many as fit in one answer.
    async fn statuses(
        &self,
        of: &[Arc<Registered>],
        with_snapshots: bool,
        room: usize,
    ) -> (Vec<pb::SubsystemStatus>, bool) {
        /// Snapshots are of any size, so they are asked for a few at a time.
        const AT_ONCE: usize = 64;
        let _permit = if with_snapshots { self.asking_all.acquire().await.ok() } else { None };
        let mut statuses = Vec::with_capacity(of.len());
        let mut bytes = 0;
        for some in of.chunks(AT_ONCE) {
            // Of many it takes a while.
            yield_now().await;
            let snapshots = if with_snapshots { self.orchestrator.snapshots(some).await } else { Vec::new() };
            let mut snapshots = snapshots.iter();
            for registered in some {
                let mut status = response::subsystem_status(&self.orchestrator, registered, false, snapshots.next());
                status.last = status.last.map(response::listed_part);
                bytes += status.encoded_len() + response::AROUND;
                if bytes > room {
                    return (statuses, false);
                }
                statuses.push(status);
            }
        }
        (statuses, true)
    }
}

#[tonic::async_trait]
impl Service for Api {
    async fn run_cycle(&self, request: Request<pb::RunCycleRequest>) -> Answer<pb::RunCycleResponse> {
        let trace = request::trace(request.metadata());
        let request = request.into_inner();
        let (held, named) = (self.hold(&request)?, request.subsystems.len());
        let (validate_only, is_async) = (request.validate_only, request.r#async);
        let now = self.clock.now();
        let read = move || request::cycle(request, trace, now);
        let request = self.over(named, read).await?.map_err(invalid)?;
        if validate_only {
            let subset = self.orchestrator.registered_names(request.subset).await.map_err(status)?;
            let (plan, next) = response::plan_page(self.schedule(subset).await, 0, usize::MAX, MAX_ANSWER);
            if next.is_some() {
                return Err(error::answer_too_large(None, "ask PlanCycle, which has pages"));
            }
            return Ok(Response::new(pb::RunCycleResponse { plan: Some(plan), ..Default::default() }));
        }
        let ticket = self.orchestrator.run_cycle(request, is_async).await.map_err(status)?;
        // What is left of the request is the cycle's.
        drop(held);
        let cycle_id = ticket.cycle_id.0;
        let record = if is_async { ticket.record_now() } else { Some(ticket.recorded().await.map_err(status)?) };
        let telemetry = match record {
            Some(record) => self.orchestrator.keep(&record).await.map_err(status)?,
            None => bytes::Bytes::new(),
        };
        Ok(Response::new(pb::RunCycleResponse { cycle_id, telemetry, plan: None }))
    }

    async fn cancel_cycle(&self, request: Request<pb::CancelCycleRequest>) -> Answer<pb::CancelCycleResponse> {
        let cycle_id = request::cycle_id(request.into_inner().cycle_id).map_err(invalid)?;
        let record = self.orchestrator.cancel_cycle(cycle_id).await.map_err(status)?;
        let telemetry = self.orchestrator.keep(&record).await.map_err(status)?;
        Ok(Response::new(pb::CancelCycleResponse { telemetry }))
    }

    async fn get_status(&self, request: Request<pb::GetStatusRequest>) -> Answer<pb::GetStatusResponse> {
        let pb::GetStatusRequest { include_subsystems, include_snapshots, omit_last_cycle } = request.into_inner();
        let mut status = self.orchestrator.status();
        if omit_last_cycle {
            status.last = None;
        }
        let (loops, last) = (std::mem::take(&mut status.loops), status.last.take());
        let mut answer = response::status(status);
        if let Some(last) = last {
            answer.last_cycle = self.orchestrator.keep(&last).await.map_err(self::status)?;
        }
        let room = MAX_ANSWER.saturating_sub(answer.encoded_len());
        answer.loops = response::listed_loops(&loops, room);
        if answer.encoded_len() > MAX_ANSWER && !answer.loops.is_empty() {
            answer.last_cycle.clear();
        }
        if include_subsystems || include_snapshots {
            let room = MAX_ANSWER.saturating_sub(answer.encoded_len());
            let registered = self.orchestrator.subsystems(None, usize::MAX);
            let (subsystems, all_fit) = self.statuses(&registered, include_snapshots, room).await;
            if !all_fit {
                return Err(error::answer_too_large(
                    None,
                    "page through ListSubsystems, and ask for snapshots one by one",
                ));
            }
            answer.subsystems = subsystems;
        }
        Ok(Response::new(pb::GetStatusResponse { status: Some(answer) }))
    }

    type WatchCyclesStream = Events;

    async fn watch_cycles(&self, request: Request<pb::WatchCyclesRequest>) -> Answer<Self::WatchCyclesStream> {
        let (from, filter, progress) = request::watch(request.into_inner()).map_err(invalid)?;
        let watcher = self.orchestrator.watch(from, filter, progress).map_err(status)?;
        let events = stream::unfold(Some(watcher), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(event) => Some((Ok(response::event(event)), Some(watcher))),
                Err(refusal) => Some((Err(status(refusal)), None)),
            }
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn get_cycle(&self, request: Request<pb::GetCycleRequest>) -> Answer<pb::GetCycleResponse> {
        let cycle_id = request::cycle_id(request.into_inner().cycle_id).map_err(invalid)?;
        let record = self.orchestrator.cycle(cycle_id).await.map_err(status)?;
        Ok(Response::new(pb::GetCycleResponse { telemetry: record.bytes.clone() }))
    }

    async fn list_cycles(&self, request: Request<pb::ListCyclesRequest>) -> Answer<pb::ListCyclesResponse> {
        let request::List { before, filter, participation, page_size } =
            request::list(request.into_inner()).map_err(invalid)?;
        let Page { records, next, .. } =
            self.orchestrator.cycles(before, filter, participation, page_size).await.map_err(status)?;
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
        Ok(Response::new(answer))
    }

    async fn plan_cycle(&self, request: Request<pb::PlanCycleRequest>) -> Answer<pb::PlanCycleResponse> {
        let request = request.into_inner();
        let _held = self.hold(&request)?;
        let read = self.over(request.subsystems.len(), move || request::plan(request)).await?;
        let request::PlanPage { subset, from, page_size } = read.map_err(invalid)?;
        let (plan, next) = response::plan_page(self.schedule(subset).await, from, page_size, MAX_ANSWER);
        let next_page_token = next.map(|next| next.to_string()).unwrap_or_default();
        Ok(Response::new(pb::PlanCycleResponse { plan: Some(plan), next_page_token }))
    }

    async fn register_subsystem(
        &self,
        request: Request<pb::RegisterSubsystemRequest>,
    ) -> Answer<pb::RegisterSubsystemResponse> {
        let request = request.into_inner();
        let _held = self.hold(&request)?;
        let pb::RegisterSubsystemRequest { registration, lease } = request;
        let subsystem = request::registration(registration).map_err(invalid)?;
        let lease = request::lease(lease).map_err(invalid)?;
        let (registered, change) = self.orchestrator.register(subsystem, lease).await.map_err(status)?;
        let subsystem = Some(self.subsystem_status(&registered));
        Ok(Response::new(pb::RegisterSubsystemResponse { subsystem, created: change == Change::Created }))
    }

    async fn register_subsystems(
        &self,
        request: Request<pb::RegisterSubsystemsRequest>,
    ) -> Answer<pb::RegisterSubsystemsResponse> {
        let request = request.into_inner();
        let _held = self.hold(&request)?;
        let named =
            request.registrations.iter().map(|it| 1 + it.requires.len() + it.after.len() + it.reads.len()).sum();
        let read = self.over(named, move || request::registrations(request)).await?;
        let (subsystems, lease) = read.map_err(invalid)?;
        let registered = self.orchestrator.register_all(subsystems, lease).await.map_err(status)?;
        let mut answer = pb::RegisterSubsystemsResponse::default();
        for (registered, change) in registered {
            let name = registered.member.subsystem.name.to_string();
            match change {
                Change::Created => answer.created.push(name),
                Change::Replaced => answer.replaced.push(name),
                Change::Renewed => {}
            }
        }
        Ok(Response::new(answer))
    }

    async fn unregister_subsystem(
        &self,
        request: Request<pb::UnregisterSubsystemRequest>,
    ) -> Answer<pb::UnregisterSubsystemResponse> {
        let name = subsystem_name(&request.into_inner().name)?;
        self.orchestrator.unregister(&name).await.map_err(status)?;
        Ok(Response::new(pb::UnregisterSubsystemResponse {}))
    }

    async fn get_subsystem(&self, request: Request<pb::GetSubsystemRequest>) -> Answer<pb::GetSubsystemResponse> {
        let pb::GetSubsystemRequest { name, include_output, include_snapshot } = request.into_inner();
        let registered = self.orchestrator.subsystem(&subsystem_name(&name)?).map(Arc::new).map_err(status)?;
        let snapshot = if include_snapshot {
            self.orchestrator.snapshots(std::slice::from_ref(&registered)).await.pop()
        } else {
            None
        };
        let mut subsystem =
            response::subsystem_status(&self.orchestrator, &registered, include_output, snapshot.as_ref());
        if subsystem.encoded_len() + response::AROUND > MAX_ANSWER {
            subsystem.last = subsystem.last.map(response::listed_part);
        }
        if subsystem.encoded_len() + response::AROUND > MAX_ANSWER {
            let (output, snapshot) = (subsystem.output.len(), subsystem.snapshot.len());
            return Err(error::answer_too_large(
                Some(&registered.member.subsystem.name),
                &if output.max(snapshot) < MAX_ANSWER - (1 << 20) {
                    format!("ask for the output of {name} and for its snapshot one by one")
                } else {
                    let [output, snapshot] = [output, snapshot].map(|bytes| format!("{bytes} bytes"));
                    format!(
                        "of {name}, {output} are its output and {snapshot} its snapshot: ask without the larger one, and keep it \
                     below 2 MiB by limits.max_output_bytes of the registration"
                    )
                },
            ));
        }
        Ok(Response::new(pb::GetSubsystemResponse { subsystem: Some(subsystem) }))
    }

    async fn list_subsystems(&self, request: Request<pb::ListSubsystemsRequest>) -> Answer<pb::ListSubsystemsResponse> {
        let pb::ListSubsystemsRequest { page_size, page_token } = request.into_inner();
        let (after, page_size) = request::page(page_size, &page_token, 100).map_err(invalid)?;
        let mut found = self.orchestrator.subsystems(after.as_ref().map(Name::as_str), page_size + 1);
        let more_follow = found.len() > page_size;
        found.truncate(page_size);
        let (subsystems, all_fit) = self.statuses(&found, false, MAX_ANSWER).await;
        let last = subsystems.last().and_then(|last| last.registration.as_ref()).map(|last| last.name.clone());
        let next_page_token = last.filter(|_| more_follow || !all_fit).unwrap_or_default();
        Ok(Response::new(pb::ListSubsystemsResponse { subsystems, next_page_token }))
    }

    async fn renew_lease(&self, request: Request<pb::RenewLeaseRequest>) -> Answer<pb::RenewLeaseResponse> {
        let name = subsystem_name(&request.into_inner().name)?;
        let expires_at = self.orchestrator.renew_lease(&name).map_err(status)?;
        Ok(Response::new(pb::RenewLeaseResponse { lease_expires_at: Some(timestamp(expires_at)) }))
    }

    async fn suspend_subsystem(
        &self,
        request: Request<pb::SuspendSubsystemRequest>,
    ) -> Answer<pb::SuspendSubsystemResponse> {
        let name = subsystem_name(&request.into_inner().name)?;
        let registered = self.orchestrator.suspend(&name, true).await.map_err(status)?;
        Ok(Response::new(pb::SuspendSubsystemResponse { subsystem: Some(self.subsystem_status(&registered)) }))
    }

    async fn resume_subsystem(
        &self,
        request: Request<pb::ResumeSubsystemRequest>,
    ) -> Answer<pb::ResumeSubsystemResponse> {
        let name = subsystem_name(&request.into_inner().name)?;
        let registered = self.orchestrator.suspend(&name, false).await.map_err(status)?;
        Ok(Response::new(pb::ResumeSubsystemResponse { subsystem: Some(self.subsystem_status(&registered)) }))
    }

    async fn start_interval_loop(
        &self,
        request: Request<pb::StartIntervalLoopRequest>,
    ) -> Answer<pb::StartIntervalLoopResponse> {
        let request = request.into_inner();
        let _held = self.hold(&request)?;
        let named = request.r#loop.as_ref().map_or(0, |settings| settings.subsystems.len());
        let read = self.over(named, move || request::interval_loop(request.r#loop)).await?;
        let entry = self.orchestrator.start_loop(read.map_err(invalid)?).await.map_err(|refusal| match refusal {
            Refusal::Invalid(violations) => invalid(violations.inside("loop")),
            refusal => status(refusal),
        })?;
        Ok(Response::new(pb::StartIntervalLoopResponse { r#loop: Some(response::loop_status(&entry)) }))
    }

    async fn stop_interval_loop(
        &self,
        request: Request<pb::StopIntervalLoopRequest>,
    ) -> Answer<pb::StopIntervalLoopResponse> {
        let name = subsystem_name(&request.into_inner().name)?;
        let entry = self.orchestrator.stop_loop(&name).await.map_err(status)?;
        Ok(Response::new(pb::StopIntervalLoopResponse { r#loop: Some(response::loop_status(&entry)) }))
    }

    async fn list_interval_loops(
        &self,
        request: Request<pb::ListIntervalLoopsRequest>,
    ) -> Answer<pb::ListIntervalLoopsResponse> {
        let pb::ListIntervalLoopsRequest { page_size, page_token } = request.into_inner();
        let (after, page_size) = request::page(page_size, &page_token, 1000).map_err(invalid)?;
        let mut answer = pb::ListIntervalLoopsResponse::default();
        let mut last = None;
        let mut bytes = 0;
        for entry in self.orchestrator.loops() {
            if after.as_ref().is_some_and(|after| entry.settings.name <= *after) {
                continue;
            }
            let status = response::loop_status(&entry);
            bytes += status.encoded_len() + response::AROUND;
            // One alone always fits.
            if let Some(last) = last.filter(|_| answer.loops.len() == page_size || bytes > MAX_ANSWER) {
                answer.next_page_token = last;
                break;
            }
            last = Some(entry.settings.name.to_string());
            answer.loops.push(status);
        }
        Ok(Response::new(answer))
    }
}

fn subsystem_name(name: &str) -> Result<Name, Status> {
    request::name("name", name).map_err(invalid)
}
