//! The port to subsystems: how they are called.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use jiff::Timestamp;

use crate::{
    memory::Held,
    model::{Answer, CallPath, Code, CycleId, Endpoint, Epoch, Identity, Input, Name, Payload, SpanContext, Subsystem},
};

/// Calls of subsystems. Hides the transport.
///
/// A call sends its `timeout` to the subsystem. The caller enforces it by dropping the future, which cancels the call.
pub trait Subsystems: Send + Sync + 'static {
    /// Initializes a subsystem. One that needs no initialization answers UNIMPLEMENTED.
    fn initialize<'a>(&'a self, to: Callee<'a>, call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>>;

    /// Runs a subsystem's part in a cycle.
    fn run_cycle<'a>(&'a self, to: Callee<'a>, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>>;

    /// Requests a snapshot of a subsystem's state.
    fn get_status<'a>(&'a self, of: Callee<'a>, timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>>;

    /// Releases resources of these subsystems, which have left their endpoints.
    fn forget(&self, left: &[Left]);
}

/// A subsystem that is called.
#[derive(Clone, Copy, Debug)]
pub struct Callee<'a> {
    /// Its registration.
    pub subsystem: &'a Subsystem,
    /// The caller that registered it, if that is known.
    pub owner: Option<&'a Identity>,
}

/// A subsystem that is no longer at an endpoint: it was unregistered, or has another endpoint now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Its name.
    pub name: Name,
    /// True if no other subsystem uses the endpoint.
    pub was_last: bool,
}

/// The data of an `Initialize` call.
#[derive(Clone, Debug)]
pub struct InitializeCall {
    /// The configured id of this orchestrator.
    pub orchestrator_id: Arc<str>,
    /// The term of this process.
    pub epoch: Epoch,
    /// Remaining time of the subsystem, from now.
    pub timeout: Duration,
    /// The parent of its spans.
    pub trace: Option<SpanContext>,
    /// The path of the cycle, if a parent started it.
    pub path: Option<CallPath>,
}

/// The data of a `RunCycle` call.
#[derive(Clone, Debug)]
pub struct RunCall {
    /// The cycle.
    pub cycle_id: CycleId,
    /// The term of this process.
    pub epoch: Epoch,
    /// 1 for the first call in this cycle.
    pub attempt: u32,
    /// When the cycle was due.
    pub scheduled_at: Timestamp,
    /// The parameters of the registration, overridden by those of the cycle.
    pub parameters: Payload,
    /// One per name in `requires`, `after` and `reads`.
    pub inputs: Vec<Input>,
    /// Remaining time of the subsystem, from now.
    pub timeout: Duration,
    /// The parent of its spans.
    pub trace: Option<SpanContext>,
    /// The path of the cycle, if a parent started it.
    pub path: Option<CallPath>,
}

/// The answer of a subsystem, with its memory.
#[derive(Debug)]
pub struct Reply {
    /// The answer.
    pub answer: Answer,
    /// Kept as long as the answer is.
    pub held: Held,
}

/// A snapshot of a subsystem's state, with its memory.
#[derive(Debug)]
pub struct Snapshot {
    /// The snapshot.
    pub status: Payload,
    /// Kept as long as the status is.
    pub held: Held,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct CallError {
    /// The gRPC status code; DEADLINE_EXCEEDED for every late call, whichever side detected it.
    pub code: Code,
    /// The error message.
    pub message: String,
    /// The fault of its connection that is the cause; `None` if there is another cause, or the connection was not made
    /// in time.
    pub fault: Option<ConnectionFault>,
}

/// A fault of a connection, which says how far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionFault {
    /// The endpoint refused the connection, or no route leads there: the call was not sent.
    Refused,
    /// The connection was lost after the call had been made: the subsystem may have been at work.
    Lost,
}

impl CallError {
    /// A failure whose cause is not a fault of the connection.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), fault: None }
    }
}
