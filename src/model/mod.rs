//! The domain types: subsystems, cycles and schedules, validated. Pure: no I/O, no wire format except that of the
//! payload, no tonic.

mod audit;
mod begin;
mod code;
mod cycle;
mod histogram;
mod identity;
mod name;
mod parent;
mod payload;
mod replica;
mod schedule;
mod subsystem;
pub mod text;
mod trace;
mod violation;
mod wire;

pub use audit::{AuditEvent, AuditTargets, Cause, Decision, EventKind, OwnEvent};
pub use begin::Begin;
pub use code::Code;
pub use cycle::{
    CycleId, CycleRequest, CycleState, Epoch, FinishedCycle, RequestKey, Revision, SkipReason, SubsystemReport,
    SubsystemState, Trigger, excerpt,
};
pub use histogram::Histogram;
pub(crate) use identity::IdentityKind;
pub use identity::{Identity, IdentityError};
pub use name::{Name, NameError, nearest};
pub use parent::{CallPath, ParentCycle, PathError, Served, ServedSpec, is_orchestrator_id};
pub use payload::Payload;
pub use replica::{CommonSettings, Leader, Replica, Role};
pub use schedule::{
    CatchUp, IntervalLoop, LoopChoice, LoopSpec, LoopStart, LoopState, OverlapPolicy, TickCounts, TickDisposition,
    TickRange,
};
pub use subsystem::{
    Answer, BreakerPolicy, BreakerSpec, Endpoint, Freshness, Input, Issue, Limits, LimitsSpec, Output, RetryPolicy,
    RetrySpec, Severity, Subsystem, SubsystemSpec, TlsSpec,
};
pub use trace::{Method, Span, SpanContext, TraceId, Work};
pub use violation::{Violation, Violations};
pub use wire::Malformed;
pub(crate) use wire::{Field, Fields, Wire};
