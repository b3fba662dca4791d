//! The clients, which use the service all the time, whatever happens to it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fastrand::Rng;
use hyper_util::rt::TokioIo;
use orchestrator_core::{
    model::Payload,
    proto::orchestrator::v1::{self as pb, OverlapPolicy, cycle_event::Event, orchestrator_client::OrchestratorClient},
};
use prost_types::Duration as Span;
use tokio::time::{sleep, timeout};
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;
use tower::service_fn;

use crate::{
    history::{DEADLINE, decode},
    world::World,
};

/// The longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(8);
/// A watcher that gets nothing for this time resumes on another connection.
const SILENCE: Duration = Duration::from_secs(5);

/// The declared subsystems.
const DECLARED: [&str; 5] = ["a", "b", "c", "d", "e"];

/// The outcome of a call.
pub(crate) enum Outcome<T> {
    Answer(T),
    /// With the reason, and the cycle that it names.
    Refused(String, Option<u64>),
    /// It may have happened, or may yet happen.
    Unknown,
}

/// A client, with a connection of its own to the service that is the current one when it connects.
pub(crate) struct Client {
    pub(crate) world: Arc<World>,
    pub(crate) name: &'static str,
    pub(crate) rng: Rng,
    stub: OrchestratorClient<Channel>,
}

impl Client {
    pub(crate) fn new(world: &Arc<World>, name: &'static str, rng: Rng) -> Self {
        Self { stub: stub(world, name), world: world.clone(), name, rng }
    }

    fn note(&self, event: impl std::fmt::Display) {
        self.world.history().note(self.name, event);
    }

    /// Makes a call, and waits for its outcome.
    pub(crate) async fn call<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut OrchestratorClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Outcome<T> {
        let status = match timeout(PATIENCE, call(&mut self.stub)).await {
            Ok(Ok(response)) => return Outcome::Answer(response.into_inner()),
            Ok(Err(status)) => status,
            Err(_) => {
                // No byte of it arrives from now on.
                self.world.network.reset(self.name);
                self.stub = stub(&self.world, self.name);
                return Outcome::Unknown;
            }
        };
        let is_defect = matches!(
            status.code(),
            Code::InvalidArgument | Code::Unimplemented | Code::DataLoss | Code::OutOfRange | Code::PermissionDenied
        );
        if is_defect {
            self.world.history().violated(format_args!("{}: {status:?}", self.name));
        }
        let Some(info) = status.get_details_error_info() else {
            self.note(format_args!("failed: {:?}", status.code()));
            return Outcome::Unknown;
        };
        let cycle_id = info.metadata.get("cycle_id").and_then(|id| id.parse().ok());
        self.note(format_args!("refused: {}, {cycle_id:?}", info.reason));
        if ["LEADER_LOST", "NOT_LEADER", "NO_LEADER"].contains(&info.reason.as_str()) {
            // The next call may reach another replica.
            self.world.network.reset(self.name);
            return Outcome::Unknown;
        }
        Outcome::Refused(info.reason, cycle_id)
    }

    /// A pause between two calls.
    async fn think(&mut self) {
        sleep(Duration::from_millis(self.rng.u64(5..800))).await;
    }

    // -----------------------------------------------------------------------------------------------------------
    // Cycles

    /// Runs and cancels cycles. Repeats each request whose outcome is unknown.
    pub(crate) async fn run_cycles(mut self) {
        let mut number = 0;
        let mut last = None;
        while !self.world.is_over() {
            self.think().await;
            match (self.rng.u32(..10), last) {
                (0, Some(cycle_id)) => self.cancel(cycle_id).await,
                (1, _) if number > 0 => {
                    // An earlier one again.
                    let request_id = format!("{} {}", self.name, self.rng.u32(1..=number));
                    drop(self.run(pb::RunCycleRequest { request_id, ..pb::RunCycleRequest::default() }).await);
                }
                _ => {
                    number += 1;
                    let request = self.request(number);
                    last = self.run_surely(request).await.or(last);
                }
            }
        }
    }

    fn request(&mut self, number: u32) -> pb::RunCycleRequest {
        let overlap_policy = match self.rng.u32(..12) {
            0 => OverlapPolicy::Skip,
            1 => OverlapPolicy::BufferOne,
            2 => OverlapPolicy::CancelOther,
            _ => OverlapPolicy::BufferAll,
        };
        let mut subsystems: Vec<_> =
            DECLARED.iter().filter(|_| self.rng.u32(..3) == 0).map(ToString::to_string).collect();
        if self.rng.u32(..3) == 0 {
            subsystems.clear();
        }
        let deadline = (self.rng.u32(..4) == 0).then(|| span(self.rng.i32(100..DEADLINE)));
        pb::RunCycleRequest {
            subsystems,
            request_id: if self.rng.u32(..5) == 0 { String::new() } else { format!("{} {number}", self.name) },
            overlap_policy: overlap_policy.into(),
            r#async: self.rng.bool(),
            deadline,
            record_outputs: self.rng.bool(),
            ..pb::RunCycleRequest::default()
        }
    }

    /// Runs a cycle, and if that has an id for it, until the outcome is known.
    pub(crate) async fn run_surely(&mut self, request: pb::RunCycleRequest) -> Option<u64> {
        loop {
            match self.run(request.clone()).await {
                Outcome::Answer(cycle_id) => return Some(cycle_id),
                Outcome::Refused(..) => return None,
                Outcome::Unknown if request.request_id.is_empty() || self.world.is_over() => return None,
                Outcome::Unknown => self.think().await,
            }
        }
    }

    async fn run(&mut self, request: pb::RunCycleRequest) -> Outcome<u64> {
        self.note(format_args!("runs {request:?}"));
        let asked = request.clone();
        match self.call(async |stub| stub.run_cycle(asked).await).await {
            Outcome::Answer(pb::RunCycleResponse { cycle_id, telemetry, .. }) => {
                self.world.history().acknowledge(self.name, &request, cycle_id, &telemetry);
                Outcome::Answer(cycle_id)
            }
            Outcome::Refused(reason, named) => {
                if let Some(cycle_id) = named {
                    self.world.history().hear(self.name, cycle_id);
                }
                // It may have been admitted.
                if reason == "STORE_UNAVAILABLE" || reason == "DRAINING" {
                    return Outcome::Unknown;
                }
                Outcome::Refused(reason, named)
            }
            Outcome::Unknown => Outcome::Unknown,
        }
    }

    async fn cancel(&mut self, cycle_id: u64) {
        let request = pb::CancelCycleRequest { cycle_id };
        if let Outcome::Answer(answer) = self.call(async |stub| stub.cancel_cycle(request).await).await {
            let request = pb::RunCycleRequest::default();
            self.world.history().acknowledge(self.name, &request, cycle_id, &answer.telemetry);
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Registrations

    /// Registers and unregisters a subsystem.
    pub(crate) async fn register(mut self, subsystem: &'static str) {
        let mut version = 0;
        while !self.world.is_over() {
            self.think().await;
            self.think().await;
            let standing = (self.rng.u32(..3) > 0).then(|| {
                version += 1;
                version
            });
            self.world.history().may_register(subsystem, standing);
            let outcome = if let Some(version) = standing {
                let request = registration(subsystem, version);
                self.call(async |stub| stub.register_subsystem(request).await.map(|it| it.map(drop))).await
            } else {
                let request = pb::UnregisterSubsystemRequest { name: subsystem.into() };
                self.call(async |stub| stub.unregister_subsystem(request).await.map(|it| it.map(drop))).await
            };
            match outcome {
                Outcome::Answer(()) => self.world.history().registered(subsystem, standing),
                Outcome::Refused(reason, _) if reason == "SUBSYSTEM_NOT_FOUND" => {
                    self.world.history().registered(subsystem, None);
                }
                Outcome::Refused(..) | Outcome::Unknown => {}
            }
        }
    }

    /// Compares a registration with the states that it may have.
    pub(crate) async fn check_registration(&mut self, subsystem: &str) {
        let request = pb::GetSubsystemRequest { name: subsystem.into(), ..pb::GetSubsystemRequest::default() };
        let standing = match self.call(async |stub| stub.get_subsystem(request).await).await {
            Outcome::Answer(found) => {
                let parameters = found.subsystem.unwrap().registration.unwrap().parameters;
                Payload::check(parameters).unwrap().to_json().get("version").and_then(serde_json::Value::as_u64)
            }
            Outcome::Refused(reason, _) if reason == "SUBSYSTEM_NOT_FOUND" => None,
            Outcome::Refused(..) | Outcome::Unknown => {
                return self.world.history().violated("a registration can't be read at the end");
            }
        };
        let mut history = self.world.history();
        let possible = history.registered.get(subsystem).cloned().unwrap_or_else(|| vec![None]);
        if !possible.contains(&standing) {
            history.violated(format_args!("{subsystem} is registered as {standing:?}, and possible is {possible:?}"));
        }
    }

    /// Starts and stops a loop.
    pub(crate) async fn keep_loop(mut self) {
        while !self.world.is_over() {
            self.think().await;
            self.think().await;
            if self.rng.u32(..4) == 0 {
                self.stop_loop().await;
            } else {
                let interval = span(self.rng.i32(100..3000));
                let settings = pb::IntervalLoop {
                    name: "pulse".into(),
                    interval: Some(interval),
                    subsystems: vec!["a".into(), "d".into()],
                    overlap_policy: if self.rng.bool() { OverlapPolicy::BufferOne } else { OverlapPolicy::Skip }.into(),
                    ..pb::IntervalLoop::default()
                };
                let request = pb::StartIntervalLoopRequest { r#loop: Some(settings) };
                drop(self.call(async |stub| stub.start_interval_loop(request).await).await);
            }
            let request = pb::ListIntervalLoopsRequest::default();
            if let Outcome::Answer(listed) = self.call(async |stub| stub.list_interval_loops(request).await).await {
                for ticks in listed.loops.into_iter().filter_map(|it| it.ticks) {
                    let pb::TickCounts { due, ran, skipped, missed, coalesced, dropped } = ticks;
                    if due != ran + skipped + missed + coalesced + dropped {
                        self.world.history().violated(format_args!("ticks don't add up: {ticks:?}"));
                    }
                }
            }
        }
    }

    pub(crate) async fn stop_loop(&mut self) -> bool {
        let request = pb::StopIntervalLoopRequest { name: "pulse".into() };
        match self.call(async |stub| stub.stop_interval_loop(request).await).await {
            Outcome::Answer(_) => true,
            Outcome::Refused(reason, _) => reason == "LOOP_NOT_FOUND",
            Outcome::Unknown => false,
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Reads

    /// Watches, and resumes whenever the stream ends.
    pub(crate) async fn watch(mut self) {
        loop {
            let after = self.world.history().position(self.name);
            let request = pb::WatchCyclesRequest {
                after_revision: Some(after),
                progress: self.rng.bool(),
                ..pb::WatchCyclesRequest::default()
            };
            self.note(format_args!("watches after {after}"));
            if let Outcome::Answer(mut events) = self.call(async |stub| stub.watch_cycles(request).await).await {
                let events_until_it_leaves = self.rng.u32(1..60);
                for _ in 0..events_until_it_leaves {
                    // At the end it stays, so that each record has to be sent to it.
                    let patience = if self.world.is_over() { Duration::from_mins(10) } else { SILENCE };
                    let Ok(Ok(Some(response))) = timeout(patience, events.message()).await else { break };
                    let event = response.event.unwrap();
                    match event.event.unwrap() {
                        Event::Recorded(record) => self.world.history().watch(self.name, event.revision, record),
                        Event::Unreadable(it) => self.world.history().violated(format_args!("unreadable: {it:?}")),
                        Event::Bookmark(_) | Event::Started(_) | Event::Progress(_) => {}
                    }
                }
            }
            if !self.world.is_over() {
                // Its connection may be cut.
                self.world.network.reset(self.name);
            }
            self.think().await;
        }
    }

    /// Reads the whole history in pages, again and again.
    pub(crate) async fn walk(mut self) {
        while !self.world.is_over() {
            for _ in 0..3 {
                self.think().await;
            }
            let page_size = self.rng.u32(2..20);
            drop(self.history(page_size).await);
            for _ in 0..5 {
                self.read_one().await;
            }
            if self.rng.u32(..3) == 0 {
                let request = pb::PlanCycleRequest::default();
                drop(self.call(async |stub| stub.plan_cycle(request).await).await);
            }
        }
    }

    /// Reads one of the newest records, which may not be there yet.
    async fn read_one(&mut self) {
        let newest = self.world.history().highest_cycle();
        let cycle_id = self.rng.u64(newest.saturating_sub(2)..newest + 4).max(1);
        let request = pb::GetCycleRequest { cycle_id };
        if let Outcome::Answer(found) = self.call(async |stub| stub.get_cycle(request).await).await {
            self.world.history().read(self.name, &found.telemetry);
        }
    }

    /// All records, newest first, if they could be read.
    pub(crate) async fn history(&mut self, page_size: u32) -> Option<Vec<Bytes>> {
        let at_least = self.world.history().highest_revision();
        let (mut records, mut page_token) = (Vec::new(), String::new());
        let mut next: Option<u64> = None;
        loop {
            let request = pb::ListCyclesRequest { page_size, page_token, ..pb::ListCyclesRequest::default() };
            let Outcome::Answer(page) = self.call(async |stub| stub.list_cycles(request).await).await else {
                return None;
            };
            for record in page.cycles {
                let revision = decode(&record).revision;
                if next.is_some_and(|next| next != revision) || (next.is_none() && revision < at_least) {
                    let problem = format!("{} lists revision {revision} after {next:?}, known {at_least}", self.name);
                    if next.is_some() || !self.world.may_lag() {
                        self.world.history().violated(problem);
                    }
                }
                next = Some(revision - 1);
                self.world.history().read(self.name, &record);
                records.push(record);
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        if next.unwrap_or(0) != 0 {
            self.world.history().violated(format_args!("{} lists no revision {next:?}", self.name));
        }
        Some(records)
    }

    /// The status of the service.
    pub(crate) async fn status(&mut self) -> Option<pb::OrchestratorStatus> {
        match self.call(async |stub| stub.get_status(pb::GetStatusRequest::default()).await).await {
            Outcome::Answer(answer) => answer.status,
            Outcome::Refused(..) | Outcome::Unknown => None,
        }
    }
}

/// This number of milliseconds.
fn span(milliseconds: i32) -> Span {
    Span { seconds: (milliseconds / 1000).into(), nanos: milliseconds % 1000 * 1_000_000 }
}

/// The request for this version of a registration.
fn registration(subsystem: &str, version: u64) -> pb::RegisterSubsystemRequest {
    let parameters = serde_json::json!({ "version": version });
    let registration = pb::Registration {
        name: subsystem.into(),
        endpoint: "http://fleet-1:1".into(),
        after: vec!["b".into()],
        timeout: Some(span(1000)),
        parameters: Payload::from_json(parameters.as_object().unwrap()).unwrap().as_bytes().clone(),
        ..pb::Registration::default()
    };
    pb::RegisterSubsystemRequest { registration: Some(registration), lease: None }
}

fn stub(world: &Arc<World>, name: &'static str) -> OrchestratorClient<Channel> {
    let (world, host) = (world.clone(), world.network.host(name));
    let connect = service_fn(move |_| {
        let (world, host) = (world.clone(), host.clone());
        async move {
            let service = world.host_for(&host.name);
            host.connect_to(&service, 1).await.map(TokioIo::new)
        }
    });
    OrchestratorClient::new(Endpoint::from_static("http://orchestrator:1").connect_with_connector_lazy(connect))
}
