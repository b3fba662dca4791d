//! Cycles: what is asked for, and what became of it.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Code, Issue, Name, OverlapPolicy, Payload, SpanContext, TraceId};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl $name {
            /// The next one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// The number of a cycle: 1, 2, 3 …, gapless, never reused. 0 stands before the first.
    CycleId
}
counter! {
    /// The term of one orchestrator process. 0 stands before the first.
    Epoch
}
counter! {
    /// The position of a record in the history: 1, 2, 3 …. 0 stands before the first.
    Revision
}

impl Epoch {
    /// An epoch that is later than those of stores that are gone: subsystems may live on that know their epochs, and
    /// their cycles, whose numbers begin anew. In milliseconds since 1970.
    #[must_use]
    pub fn by_clock(now: Timestamp) -> Self {
        Self(now.as_millisecond().unsigned_abs())
    }
}

/// What started a cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Not known: it was interrupted before that was written down.
    Unknown,
    /// A call of `RunCycle`.
    Manual,
    /// A tick of this loop.
    Loop(Name),
}

impl Trigger {
    /// The loop, if one did.
    #[must_use]
    pub fn loop_name(&self) -> Option<&Name> {
        match self {
            Self::Loop(name) => Some(name),
            Self::Unknown | Self::Manual => None,
        }
    }

    /// The word for it, such as `MANUAL`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Manual => "MANUAL",
            Self::Loop(_) => "LOOP",
        }
    }
}

/// A cycle that somebody wants to be run.
#[derive(Clone, Debug)]
pub struct CycleRequest {
    /// What started it.
    pub trigger: Trigger,
    /// When it was due, or asked for.
    pub scheduled_at: Timestamp,
    /// Only these subsystems; `None` means all.
    pub subset: Option<Arc<[Name]>>,
    /// Over those of the registrations.
    pub parameters: Payload,
    /// Makes the request idempotent.
    pub request_id: Option<String>,
    /// What happens when a cycle with a subsystem in common runs or waits.
    pub overlap: OverlapPolicy,
    /// How long the cycle may take; `None` means the configured deadline.
    pub deadline: Option<Duration>,
    /// Keep all outputs in the record.
    pub record_outputs: bool,
    /// The span of the caller that asks for it.
    pub trace: Option<SpanContext>,
}

impl CycleRequest {
    /// The most bytes of a `request_id`.
    pub const MAX_REQUEST_ID: usize = 128;
    /// The most names in a subset.
    pub const MAX_SUBSET: usize = 20_000;

    /// About the bytes that it takes in memory, with its places in line, of which each name has one; the names themselves are the
    /// registry's.
    pub fn footprint(&self) -> usize {
        const PLACE: usize = size_of::<Name>() + size_of::<CycleId>();
        let names = self.subset.as_ref().map_or(0, |subset| subset.len() * PLACE);
        let request_id = self.request_id.as_ref().map_or(0, String::len);
        size_of::<Self>() + names + request_id + self.parameters.len()
    }
}

/// How a cycle ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CycleState {
    /// No subsystem failed.
    Succeeded,
    /// Some failed, none of them critical.
    Degraded,
    /// All failed, or a critical one did.
    Failed,
    /// It was cancelled.
    Cancelled,
    /// The process died in it.
    Interrupted,
}

impl CycleState {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Succeeded, Self::Degraded, Self::Failed, Self::Cancelled, Self::Interrupted];

    /// Its name in settings and labels, such as `succeeded`.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }

    /// The word for it, such as `DEGRADED`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "SUCCEEDED",
            Self::Degraded => "DEGRADED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::Interrupted => "INTERRUPTED",
        }
    }
}

/// How a subsystem's part in a cycle ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SubsystemState {
    /// It answered, and its output counts.
    Succeeded,
    /// It answered with an error, could not be reached, or broke the contract.
    Failed(Code, String),
    /// It had not answered when a deadline had passed. Says which one.
    TimedOut(String),
    /// It was not called.
    Skipped(SkipReason, String),
    /// It was not called because its breaker is open.
    CircuitOpen(String),
    /// The cycle was cancelled before it ended.
    Cancelled,
}

impl SubsystemState {
    /// It counts against the cycle.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Succeeded | Self::Cancelled => false,
            Self::Failed(..) | Self::TimedOut(_) | Self::CircuitOpen(_) => true,
            Self::Skipped(reason, _) => reason.is_failure(),
        }
    }

    /// The status code that ended it, if it was called, or would have been, and did not succeed.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Succeeded | Self::Skipped(..) => None,
            Self::Failed(code, _) => Some(*code),
            Self::TimedOut(_) => Some(Code::DeadlineExceeded),
            Self::CircuitOpen(_) => Some(Code::Unavailable),
            Self::Cancelled => Some(Code::Cancelled),
        }
    }

    /// What went wrong; empty when nothing did.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Succeeded => "",
            Self::Cancelled => "the cycle was cancelled",
            Self::Failed(_, message)
            | Self::TimedOut(message)
            | Self::Skipped(_, message)
            | Self::CircuitOpen(message) => message,
        }
    }
}

/// Why a subsystem was not called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// It is suspended.
    Suspended,
    /// One that it requires did not succeed.
    RequirementFailed,
    /// One that it requires is not registered.
    RequirementMissing,
    /// One that it requires is suspended or not in the subset.
    RequirementLeftOut,
    /// The cycle's deadline had passed.
    CycleDeadline,
    /// A loop names it, but it is not registered.
    NotRegistered,
}

impl SkipReason {
    /// It counts against the cycle: somebody wanted it to run and it could not.
    #[must_use]
    pub fn is_failure(self) -> bool {
        !matches!(self, Self::Suspended | Self::RequirementLeftOut)
    }
}

/// What one subsystem did in one cycle.
#[derive(Clone, Debug, PartialEq)]
pub struct SubsystemReport {
    /// Its name.
    pub name: Name,
    /// How its part ended.
    pub state: SubsystemState,
    /// From the cycle's start to its first call; `None` when it was not called.
    pub started: Option<Duration>,
    /// From the cycle's start to the end of its part.
    pub ended: Duration,
    /// How long it waited for a free call slot.
    pub queued: Duration,
    /// How often its `RunCycle` was called.
    pub attempts: u32,
    /// What went wrong without failing.
    pub issues: Vec<Issue>,
    /// Its numbers.
    pub metrics: BTreeMap<String, f64>,
    /// Its output, if that is to be recorded.
    pub recorded_output: Option<Payload>,
}

impl SubsystemReport {
    /// Bytes that issues, metrics and the output take in memory.
    #[must_use]
    pub fn details(&self) -> usize {
        /// What an entry takes beside its texts.
        const AROUND: usize = 96;
        let issues = self.issues.iter().map(|issue| issue.code.len() + issue.message.len() + AROUND).sum::<usize>();
        let metrics = self.metrics.keys().map(|name| name.len() + AROUND).sum::<usize>();
        issues + metrics + self.recorded_output.as_ref().map_or(0, Payload::len)
    }

    /// The same without issues, metrics and output.
    #[must_use]
    pub fn without_details(&self) -> Self {
        let Self { name, state, started, ended, queued, attempts, issues: _, metrics: _, recorded_output: _ } = self;
        Self {
            name: name.clone(),
            state: state.clone(),
            started: *started,
            ended: *ended,
            queued: *queued,
            attempts: *attempts,
            issues: Vec::new(),
            metrics: BTreeMap::new(),
            recorded_output: None,
        }
    }

    /// The report of one that was skipped as soon as the cycle started.
    #[must_use]
    pub fn not_called(name: Name, reason: SkipReason, message: String) -> Self {
        Self {
            name,
            state: SubsystemState::Skipped(reason, message),
            started: None,
            ended: Duration::ZERO,
            queued: Duration::ZERO,
            attempts: 0,
            issues: Vec::new(),
            metrics: BTreeMap::new(),
            recorded_output: None,
        }
    }
}

/// The longest beginning of `text` that has at most `max` bytes.
#[must_use]
pub fn excerpt(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// What became of a cycle.
#[derive(Clone, Debug, PartialEq)]
pub struct FinishedCycle {
    /// Its number.
    pub cycle_id: CycleId,
    /// The term of the process that ran it.
    pub epoch: Epoch,
    /// What started it.
    pub trigger: Trigger,
    /// When it was due; `None` when that is not known.
    pub scheduled_at: Option<Timestamp>,
    /// The id of the request.
    pub request_id: Option<String>,
    /// The trace that it belongs to.
    pub trace_id: Option<TraceId>,
    /// When it started; `None` when it never did, or that is not known.
    pub started_at: Option<Timestamp>,
    /// When it ended, or was found.
    pub finished_at: Timestamp,
    /// From start to end, by the monotonic clock.
    pub duration: Duration,
    /// How it ended.
    pub state: CycleState,
    /// What failed, in one line.
    pub error: String,
    /// The chain that ended last, first to last.
    pub critical_path: Vec<Name>,
    /// One per subsystem, in the order of the plan.
    pub subsystems: Vec<Arc<SubsystemReport>>,
}
