//! The calls that checks make.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use serde_json::Value;
use tokio::time::Instant;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::super::{Exit, Failure, HOST};
use crate::{
    dial::{Call, Client, Dialer},
    memory::Memory,
    model::{Code, Endpoint, Payload},
    ports::CallError,
    proto::{
        framing::{framed, framed_bytes},
        subsystem::v1 as pb,
        timestamp,
    },
    transport::Sockets,
};

/// The name that is used when the user names no subsystem.
const MADE_UP_NAME: &str = "conformance";
/// Most bytes of one answer: the largest limit of a registration.
const MAX_ANSWER: usize = 64 << 20;
/// Most bytes of all concurrent answers.
const MAX_ANSWERS: usize = 1 << 30;
const CONNECT: Duration = Duration::from_secs(5);

const INITIALIZE: &str = "/dreamnet.subsystem.v1.Subsystem/Initialize";
const RUN_CYCLE: &str = "/dreamnet.subsystem.v1.Subsystem/RunCycle";
const GET_STATUS: &str = "/dreamnet.subsystem.v1.Subsystem/GetStatus";

/// The caller of one subsystem, with its own epoch and increasing cycle ids.
pub(super) struct Probe {
    endpoint: Endpoint,
    /// The subsystem that is checked, and others at the same endpoint. Empty if the user has named none.
    names: Vec<String>,
    parameters: Bytes,
    inputs: BTreeMap<String, pb::Input>,
    /// The inputs that are always fresh.
    required: Vec<String>,
    timeout: Duration,
    epoch: u64,
    next_cycle: AtomicU64,
    dialer: Dialer,
    client: Client,
}

impl Probe {
    /// Connects.
    ///
    /// # Errors
    /// It can't be reached, an input is not an object or nests too deep, or a required input is not among them.
    pub(super) async fn connect(
        endpoint: Endpoint,
        names: Vec<String>,
        parameters: Bytes,
        inputs: Vec<(String, Value)>,
        required: Vec<String>,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let inputs = inputs.into_iter().map(|(name, output)| {
            let wrong = |what: String| Failure::new(Exit::Usage, format!("the input {name} {what}"));
            let object = output.as_object().ok_or_else(|| wrong("is not a JSON object".into()))?;
            let payload = Payload::from_json(object).map_err(|malformed| wrong(malformed.to_string()))?;
            let output = payload.as_bytes().clone();
            Ok((name, pb::Input { output, freshness: pb::Freshness::Fresh.into(), cycle_id: 0 }))
        });
        let inputs = inputs.collect::<Result<BTreeMap<_, _>, Failure>>()?;
        if let Some(name) = required.iter().find(|name| !inputs.contains_key(*name)) {
            let message = format!("--requires {name} needs its output: add --input '{name}={{…}}'");
            return Err(Failure::new(Exit::Usage, message));
        }
        let unreachable = |why: String| {
            Failure::new(Exit::Unreachable, format!("can't reach a subsystem at {endpoint}: {}", super::clean(&why)))
        };
        let unreachable = |error: CallError| unreachable(error.message);
        let replies = Memory::whole(MAX_ANSWERS);
        let dialer = Dialer::new(Arc::new(Sockets::default()), CONNECT, replies, HOST.clock);
        let client = dialer.client(&endpoint).map_err(unreachable)?;
        client.connect().await.map_err(unreachable)?;
        // Both grow from run to run, so that a subsystem can be checked again. A run makes fewer cycles than it takes
        // milliseconds, times 100, and the ids stay exact in languages whose numbers are doubles.
        let now = u64::try_from(HOST.clock.now().as_millisecond()).unwrap_or_default();
        let next_cycle = AtomicU64::new(now * 100);
        Ok(Self { endpoint, names, parameters, inputs, required, timeout, epoch: now, next_cycle, dialer, client })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The subsystem that is checked.
    pub(super) fn name(&self) -> &str {
        self.names.first().map_or(MADE_UP_NAME, String::as_str)
    }

    /// The names that the user has given: the subsystem that is checked, and others at the same endpoint.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether the subsystem requires this input, which is always fresh then.
    pub(super) fn requires(&self, name: &str) -> bool {
        self.required.iter().any(|required| required == name)
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// A request for a new cycle.
    pub(super) fn next_cycle(&self) -> pb::RunCycleRequest {
        let cycle_id = self.next_cycle.fetch_add(1, Ordering::Relaxed);
        let mut inputs = self.inputs.clone();
        for input in inputs.values_mut() {
            input.cycle_id = cycle_id;
        }
        pb::RunCycleRequest {
            subsystem: self.name().to_owned(),
            cycle_id,
            epoch: self.epoch,
            attempt: 1,
            scheduled_at: Some(timestamp(HOST.clock.now())),
            parameters: self.parameters.clone(),
            inputs,
        }
    }

    /// The request of `Initialize`.
    pub(super) fn initialization(&self) -> pb::InitializeRequest {
        pb::InitializeRequest {
            subsystem: self.name().to_owned(),
            orchestrator_id: "conformance".into(),
            epoch: self.epoch,
            parameters: self.parameters.clone(),
        }
    }

    /// Makes a call on this connection, and waits for the answer within the timeout.
    async fn call<T: Message + Default>(
        &self,
        client: &Client,
        path: &'static str,
        message: Bytes,
        deadline: Duration,
    ) -> Result<T, CallError> {
        let call = Call { path, timeout: deadline, trace: None, through: None, message, max_answer: MAX_ANSWER };
        let Ok(answer) = tokio::time::timeout(self.timeout, client.call(&call)).await else {
            let message = format!("no answer within {:?}", self.timeout);
            return Err(CallError::new(Code::DeadlineExceeded, message));
        };
        let malformed = |error: prost::DecodeError| CallError::new(Code::Internal, error.to_string());
        T::decode(&answer?.message[..]).map_err(malformed)
    }

    pub(super) async fn initialize(&self, request: &pb::InitializeRequest) -> Result<(), CallError> {
        let answer = self.call(&self.client, INITIALIZE, framed(request), self.timeout).await;
        answer.map(|pb::InitializeResponse {}| ())
    }

    pub(super) async fn run(&self, request: &pb::RunCycleRequest) -> Result<pb::RunCycleResponse, CallError> {
        self.call(&self.client, RUN_CYCLE, framed(request), self.timeout).await
    }

    /// Calls `RunCycle` with a deadline that only the server enforces. Also returns how long the call took.
    pub(super) async fn run_late(
        &self,
        request: &pb::RunCycleRequest,
        deadline: Duration,
    ) -> (Result<pb::RunCycleResponse, CallError>, Duration) {
        let begun = Instant::now();
        (self.call(&self.client, RUN_CYCLE, framed(request), deadline).await, begun.elapsed())
    }

    /// Calls `RunCycle` with these bytes as the request.
    pub(super) async fn run_raw(&self, request: Bytes) -> Result<pb::RunCycleResponse, CallError> {
        self.call(&self.client, RUN_CYCLE, framed_bytes(&request), self.timeout).await
    }

    pub(super) async fn status(&self) -> Result<pb::GetStatusResponse, CallError> {
        let request = pb::GetStatusRequest { subsystem: self.name().to_owned() };
        self.call(&self.client, GET_STATUS, framed(&request), self.timeout).await
    }

    pub(super) async fn health(&self, service: &str) -> Result<HealthCheckResponse, CallError> {
        let request = HealthCheckRequest { service: service.to_owned() };
        self.call(&self.client, "/grpc.health.v1.Health/Check", framed(&request), self.timeout).await
    }

    /// Begins a call on a separate connection, and closes the connection after a while. Returns how long the call took,
    /// if it was answered before that.
    ///
    /// # Errors
    /// A second connection can't be made.
    pub(super) async fn cut_off(
        &self,
        request: &pb::RunCycleRequest,
        after: Duration,
    ) -> Result<Option<Duration>, CallError> {
        let client = self.dialer.client(&self.endpoint)?;
        client.connect().await?;
        let begun = Instant::now();
        let call = self.call::<pb::RunCycleResponse>(&client, RUN_CYCLE, framed(request), self.timeout);
        // Dropped only after the cut: dropping the call cancels it.
        tokio::pin!(call);
        let took = tokio::time::timeout(after, &mut call).await.ok().map(|_| begun.elapsed());
        client.cut().await;
        Ok(took)
    }
}
