//! The rules of the contract: which calls do work, wait for it, or are refused.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use serde_json::Value;
use tokio::{
    task::{AbortHandle, JoinError},
    time::{Instant, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

use super::{Answer, Cycle, Failure, Input, Object, Subsystem};
use crate::{
    listen::Broken,
    model::{Name, Payload, Severity, excerpt, text::shortened},
    offload::offload,
    proto::{
        read_timestamp,
        subsystem::v1::{self as pb, subsystem_server},
        timeout,
    },
    tasks::panic_message,
};

/// Most bytes of the message of a failure: it is sent in headers, which are small by default.
const MAX_MESSAGE: usize = 4 << 10;

// ---------------------------------------------------------------------------------------------------------------
// The service

/// All subsystems behind one endpoint.
pub(super) struct HostedSubsystems {
    pub(super) subsystems: BTreeMap<String, Arc<Hosted>>,
}

impl HostedSubsystems {
    fn find(&self, name: &str) -> Result<&Arc<Hosted>, Status> {
        self.subsystems.get(name).ok_or_else(|| {
            // A longer text is not a name, and would not fit into the headers of the answer.
            let name = excerpt(name, Name::MAX_LEN);
            Status::not_found(format!("subsystem {name:?} is not served here; check its endpoint in the registration"))
        })
    }
}

#[tonic::async_trait]
impl subsystem_server::Subsystem for HostedSubsystems {
    async fn initialize(
        &self,
        request: Request<pb::InitializeRequest>,
    ) -> Result<Response<pb::InitializeResponse>, Status> {
        let request = request.into_inner();
        self.find(&request.subsystem)?.initialize(request).await?;
        Ok(Response::new(pb::InitializeResponse {}))
    }

    async fn run_cycle(&self, request: Request<pb::RunCycleRequest>) -> Result<Response<pb::RunCycleResponse>, Status> {
        let deadline = timeout::read(request.metadata().as_ref()).map(|timeout| Instant::now() + timeout);
        let broken = request.extensions().get().cloned().unwrap_or_default();
        let request = request.into_inner();
        let hosted = self.find(&request.subsystem)?;
        hosted.run_cycle(request, deadline, broken).await.map(Response::new)
    }

    async fn get_status(
        &self,
        request: Request<pb::GetStatusRequest>,
    ) -> Result<Response<pb::GetStatusResponse>, Status> {
        let hosted = self.find(&request.into_inner().subsystem)?;
        let status = spawned(hosted.implementation.clone().get_status()).await.unwrap_or_else(|end| Err(ended(end)))?;
        let status = status.ok_or_else(|| Status::unimplemented("it has no status"))?;
        let status = offload(is_long(&status), move || to_struct("status", &status)).await.map_err(ended)??;
        Ok(Response::new(pb::GetStatusResponse { status }))
    }
}

/// Runs the work in a separate task, so that a panic affects nothing else. The task stops when the future is dropped.
fn spawned<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> AbortOnDropHandle<T> {
    AbortOnDropHandle::new(tokio::spawn(work))
}

// ---------------------------------------------------------------------------------------------------------------
// One subsystem

/// One subsystem and its latest cycles.
pub(super) struct Hosted {
    implementation: Arc<dyn Implementation>,
    state: Mutex<State>,
    /// Held by running work: `initialize` and `run_cycle` never overlap.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct State {
    /// The highest epoch so far.
    epoch: u64,
    is_initialized: bool,
    /// The latest cycles, oldest first, all of this epoch.
    works: VecDeque<Arc<Work>>,
}

/// The work of one cycle, running or done.
struct Work {
    cycle_id: u64,
    /// Number of calls that wait for the answer. Changed under the lock of the state.
    callers: AtomicUsize,
    answer: Shared<BoxFuture<'static, Result<pb::RunCycleResponse, Status>>>,
    task: AbortHandle,
}

/// Number of cycles whose answers are kept. A call is repeated within its cycle's deadline, so the latest is nearly
/// enough; the others are for delayed calls.
const REMEMBERED: usize = 4;

impl Hosted {
    pub(super) fn new(subsystem: impl Subsystem) -> Self {
        Self { implementation: Arc::new(subsystem), state: Mutex::default(), turn: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn initialize(&self, request: pb::InitializeRequest) -> Result<(), Status> {
        self.state().enter_epoch(request.epoch)?;
        let (implementation, turn) = (self.implementation.clone(), self.turn.clone());
        let work = spawned(async move {
            let _turn = turn.lock().await;
            let is_long = request.parameters.len() > LONG;
            let parameters =
                offload(is_long, move || from_struct("parameters", request.parameters)).await.map_err(ended)??;
            implementation.initialize(parameters).await
        });
        work.await.unwrap_or_else(|end| Err(ended(end)))?;
        self.state().is_initialized = true;
        Ok(())
    }

    async fn run_cycle(
        self: &Arc<Self>,
        request: pb::RunCycleRequest,
        deadline: Option<Instant>,
        broken: Broken,
    ) -> Result<pb::RunCycleResponse, Status> {
        let caller = {
            let mut state = self.state();
            state.enter_epoch(request.epoch)?;
            if self.implementation.needs_initialize() && !state.is_initialized {
                return Err(Status::failed_precondition("not initialized: call Initialize first"));
            }
            let work = match state.known(request.cycle_id)? {
                Some(work) => work,
                None => state.remember(self.begin(request, deadline)),
            };
            work.callers.fetch_add(1, Ordering::Relaxed);
            Caller { hosted: self.clone(), work, broken }
        };
        caller.work.answer.clone().await
    }

    fn begin(&self, request: pb::RunCycleRequest, deadline: Option<Instant>) -> Work {
        let (implementation, turn) = (self.implementation.clone(), self.turn.clone());
        let cycle_id = request.cycle_id;
        let run = async move {
            let _turn = turn.lock().await;
            let inputs = request.inputs.iter().map(|(name, input)| name.len() + input.output.len());
            let bytes = request.parameters.len() + inputs.sum::<usize>();
            let cycle = offload(bytes > LONG, move || cycle(request, deadline)).await.map_err(ended)??;
            let answer = implementation.run_cycle(cycle).await?;
            offload(is_long(&answer.output), move || response(answer)).await.map_err(ended)?
        };
        let task = spawned(async move {
            match deadline {
                None => run.await,
                Some(deadline) => timeout_at(deadline, run)
                    .await
                    .unwrap_or_else(|_| Err(Status::deadline_exceeded("stopped: its deadline has passed"))),
            }
        });
        Work {
            cycle_id,
            callers: AtomicUsize::new(0),
            task: task.abort_handle(),
            answer: task.map(|end| end.unwrap_or_else(|end| Err(ended(end)))).boxed().shared(),
        }
    }
}

impl State {
    /// Refuses a superseded caller. A new epoch ends the work of the old one.
    fn enter_epoch(&mut self, epoch: u64) -> Result<(), Status> {
        let seen = self.epoch;
        if epoch < seen {
            return Err(Status::aborted(format!(
                "epoch {epoch} has ended: epoch {seen} has called; restart this subsystem if that orchestrator is gone"
            )));
        }
        if epoch > seen {
            self.epoch = epoch;
            for work in self.works.drain(..) {
                work.task.abort();
            }
        }
        Ok(())
    }

    /// The work that was done, or is being done, for this cycle.
    ///
    /// If this cycle has no work yet and may begin, running work of earlier cycles is stopped: a subsystem is in one
    /// cycle at a time.
    fn known(&mut self, cycle_id: u64) -> Result<Option<Arc<Work>>, Status> {
        self.works.retain(|work| !work.has_failed());
        if let Some(work) = self.works.iter().find(|work| work.cycle_id == cycle_id) {
            return Ok(Some(work.clone()));
        }
        if let Some(later) = self.works.iter().find(|work| work.cycle_id > cycle_id && work.is_running()) {
            return Err(Status::aborted(format!("cycle {cycle_id} has ended: cycle {} is running", later.cycle_id)));
        }
        self.works.retain(|work| {
            let is_running = work.is_running();
            if is_running {
                work.task.abort();
            }
            !is_running
        });
        Ok(None)
    }

    fn remember(&mut self, work: Work) -> Arc<Work> {
        let work = Arc::new(work);
        if self.works.len() == REMEMBERED {
            self.works.pop_front();
        }
        self.works.push_back(work.clone());
        work
    }
}

impl Work {
    fn is_running(&self) -> bool {
        !self.task.is_finished()
    }

    fn has_failed(&self) -> bool {
        self.answer.clone().now_or_never().is_some_and(|answer| answer.is_err())
    }
}

/// A call that waits for work. When the last such call is cancelled, the work stops.
struct Caller {
    hosted: Arc<Hosted>,
    work: Arc<Work>,
    broken: Broken,
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut state = self.hosted.state();
        let is_last = self.work.callers.fetch_sub(1, Ordering::Relaxed) == 1;
        if is_last && !self.broken.is_set() && self.work.is_running() {
            self.work.task.abort();
            state.works.retain(|work| !Arc::ptr_eq(work, &self.work));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The implementation behind the rules

/// A type-erased [`Subsystem`], with the messages of the contract.
trait Implementation: Send + Sync {
    fn needs_initialize(&self) -> bool;
    fn initialize(self: Arc<Self>, parameters: Object) -> BoxFuture<'static, Result<(), Status>>;
    fn run_cycle(self: Arc<Self>, cycle: Cycle) -> BoxFuture<'static, Result<Answer, Status>>;
    fn get_status(self: Arc<Self>) -> BoxFuture<'static, Result<Option<Object>, Status>>;
}

impl<T: Subsystem> Implementation for T {
    fn needs_initialize(&self) -> bool {
        Self::NEEDS_INITIALIZE
    }

    fn initialize(self: Arc<Self>, parameters: Object) -> BoxFuture<'static, Result<(), Status>> {
        Box::pin(async move { Subsystem::initialize(&*self, parameters).await.map_err(status) })
    }

    fn run_cycle(self: Arc<Self>, cycle: Cycle) -> BoxFuture<'static, Result<Answer, Status>> {
        Box::pin(async move { Subsystem::run_cycle(&*self, cycle).await.map_err(status) })
    }

    fn get_status(self: Arc<Self>) -> BoxFuture<'static, Result<Option<Object>, Status>> {
        Box::pin(async move { Ok(Subsystem::get_status(&*self).await) })
    }
}

/// The status for work that ended without a result.
fn ended(end: JoinError) -> Status {
    match end.try_into_panic() {
        Ok(panic) => Status::internal(shortened(format!("it panicked: {}", panic_message(&*panic)), MAX_MESSAGE)),
        Err(_) => Status::cancelled("stopped: a later cycle or epoch has begun, or the server is stopping"),
    }
}

fn status(Failure { code, message }: Failure) -> Status {
    // A failure is an error even if its code is OK.
    let code = if code == super::Code::Ok { super::Code::Unknown } else { code };
    Status::new(tonic::Code::from_i32(code as i32), shortened(message, MAX_MESSAGE))
}

// ---------------------------------------------------------------------------------------------------------------
// To and from the messages

/// Most bytes that are decoded or encoded on a worker thread, within a millisecond.
const LONG: usize = 64 << 10;

/// True if an encoded object has more than about [`LONG`] bytes.
fn is_long(object: &Object) -> bool {
    fn fits(key: &str, value: &Value, left: &mut usize) -> bool {
        /// Bytes of a value besides its key and its string.
        const LEAST: usize = 8;
        let text = value.as_str().map_or(0, str::len);
        let Some(rest) = left.checked_sub(LEAST + key.len() + text) else { return false };
        *left = rest;
        match value {
            Value::Array(items) => items.iter().all(|item| fits("", item, left)),
            Value::Object(object) => object.iter().all(|(key, value)| fits(key, value, left)),
            _ => true,
        }
    }
    let mut left = LONG;
    !object.iter().all(|(key, value)| fits(key, value, &mut left))
}

fn cycle(request: pb::RunCycleRequest, deadline: Option<Instant>) -> Result<Cycle, Status> {
    let scheduled_at = request.scheduled_at.and_then(read_timestamp);
    let inputs = request.inputs.into_iter().map(|(name, input)| {
        let freshness = input.freshness();
        let cycle_id = input.cycle_id;
        let output = || from_struct(&format!("inputs[{name:?}].output"), input.output);
        let input = match freshness {
            pb::Freshness::Fresh => Input::Fresh(output()?),
            pb::Freshness::Stale => Input::Stale { output: output()?, cycle_id },
            pb::Freshness::Absent | pb::Freshness::Unspecified => Input::Absent,
        };
        Ok((name, input))
    });
    Ok(Cycle {
        inputs: inputs.collect::<Result<_, Status>>()?,
        subsystem: request.subsystem,
        cycle_id: request.cycle_id,
        epoch: request.epoch,
        attempt: request.attempt,
        scheduled_at,
        deadline,
        parameters: from_struct("parameters", request.parameters)?,
    })
}

fn response(answer: Answer) -> Result<pb::RunCycleResponse, Status> {
    let issues = answer.issues.into_iter().map(|issue| pb::Issue {
        severity: match issue.severity {
            Severity::Info => pb::Severity::Info,
            Severity::Warning => pb::Severity::Warning,
            Severity::Error => pb::Severity::Error,
        }
        .into(),
        code: issue.code,
        message: issue.message,
    });
    Ok(pb::RunCycleResponse {
        issues: issues.collect(),
        output: to_struct("output", &answer.output)?,
        metrics: answer.metrics,
    })
}

fn from_struct(field: &str, bytes: bytes::Bytes) -> Result<Object, Status> {
    match Payload::check(bytes) {
        Ok(payload) => Ok(payload.to_json()),
        Err(malformed) => Err(Status::invalid_argument(format!("{field} {malformed}"))),
    }
}

fn to_struct(field: &str, object: &Object) -> Result<bytes::Bytes, Status> {
    match Payload::from_json(object) {
        Ok(payload) => Ok(payload.as_bytes().clone()),
        Err(malformed) => Err(Status::internal(format!("its {field} {malformed}"))),
    }
}
