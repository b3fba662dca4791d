//! Cycles: requests and results.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    CallPath, Cause, Code, Freshness, Identity, Issue, Name, Output, OverlapPolicy, ParentCycle, Payload, SpanContext,
    TraceId,
};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl $name {
            /// The next number.
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
    /// The id of a cycle: 1, 2, 3 …, gapless, never reused. 0 means before the first.
    CycleId
}
counter! {
    /// The term of one orchestrator process. 0 means before the first.
    Epoch
}
counter! {
    /// The position of a record in the history: 1, 2, 3 …. 0 means before the first.
    Revision
}

impl Epoch {
    /// An epoch that is later than those of deleted stores: subsystems may have seen their epochs and cycles, whose ids
    /// start again from 1. In milliseconds since 1970.
    #[must_use]
    pub fn by_clock(now: Timestamp) -> Self {
        Self(now.as_millisecond().unsigned_abs())
    }
}

/// What started a cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Not known: it was interrupted before its trigger was written.
    Unknown,
    /// A call of `RunCycle`.
    Manual,
    /// A tick of this loop.
    Loop(Name),
    /// This cycle of another orchestrator, in which this one is a subsystem.
    Parent(ParentCycle),
}

impl Trigger {
    /// The loop, if one started it.
    #[must_use]
    pub fn loop_name(&self) -> Option<&Name> {
        match self {
            Self::Loop(name) => Some(name),
            Self::Unknown | Self::Manual | Self::Parent(_) => None,
        }
    }

    /// The cycle of a parent, if one started it.
    #[must_use]
    pub fn parent(&self) -> Option<&ParentCycle> {
        match self {
            Self::Parent(parent) => Some(parent),
            Self::Unknown | Self::Manual | Self::Loop(_) => None,
        }
    }

    /// The word for it, such as `MANUAL`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Manual => "MANUAL",
            Self::Loop(_) => "LOOP",
            Self::Parent(_) => "PARENT",
        }
    }
}

/// The key by which a repeated request finds its cycle. Ids of different callers are different.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestKey {
    /// The id of the request.
    pub request_id: String,
    /// Its caller; `None` if callers are not told apart.
    pub triggered_by: Option<Identity>,
}

/// A request to run a cycle.
#[derive(Clone, Debug)]
pub struct CycleRequest {
    /// What started it.
    pub trigger: Trigger,
    /// When it was due, or requested.
    pub scheduled_at: Timestamp,
    /// Only these subsystems; `None` means all.
    pub subset: Option<Arc<[Name]>>,
    /// Parameters, which take precedence over those of the registrations.
    pub parameters: Payload,
    /// Makes the request idempotent, together with `triggered_by`.
    pub request_id: Option<String>,
    /// Its caller; `None` for a loop, or if callers are not told apart.
    pub triggered_by: Option<Identity>,
    /// What happens when a cycle with a subsystem in common runs or waits.
    pub overlap: OverlapPolicy,
    /// Deadline of the cycle; `None` means the configured one.
    pub deadline: Option<Duration>,
    /// True if the record contains all outputs.
    pub record_outputs: bool,
    /// The span of the caller.
    pub trace: Option<SpanContext>,
    /// The inputs of its parent, by name: a subsystem that names one gets it, unless a subsystem of that name is
    /// registered here.
    pub inputs: Arc<BTreeMap<Name, (Output, Freshness)>>,
    /// The path of its calls, if a parent started it.
    pub path: Option<CallPath>,
    /// The call that asks for it, for its audit event; `None` if it is a tick of a loop.
    pub cause: Option<Arc<Cause>>,
}

impl CycleRequest {
    /// Most bytes of a `request_id`.
    pub const MAX_REQUEST_ID: usize = 128;
    /// Most names in a subset.
    pub const MAX_SUBSET: usize = 20_000;

    /// A request over all subsystems, which waits for its turn. It adds nothing to what is registered and configured.
    #[must_use]
    pub fn over_all(trigger: Trigger, scheduled_at: Timestamp) -> Self {
        Self {
            trigger,
            scheduled_at,
            subset: None,
            parameters: Payload::default(),
            request_id: None,
            triggered_by: None,
            overlap: OverlapPolicy::BufferAll,
            deadline: None,
            record_outputs: false,
            trace: None,
            inputs: Arc::default(),
            path: None,
            cause: None,
        }
    }

    /// Approximate bytes that it takes in memory, with one place in line for each name; the names themselves belong to
    /// the registry.
    pub fn footprint(&self) -> usize {
        const PLACE: usize = size_of::<Name>() + size_of::<CycleId>();
        const INPUT: usize = size_of::<(Name, Output, Freshness)>();
        let names = self.subset.as_ref().map_or(0, |subset| subset.len() * PLACE);
        let request_id = self.request_id.as_ref().map_or(0, String::len);
        let caller = self.triggered_by.as_ref().map_or(0, Identity::footprint);
        let inputs = self.inputs.iter().map(|(name, (output, _))| INPUT + name.as_str().len() + output.payload.len());
        size_of::<Self>() + names + request_id + caller + self.parameters.len() + inputs.sum::<usize>()
    }

    /// The key by which it finds its cycle, if it is idempotent.
    #[must_use]
    pub fn key(&self) -> Option<RequestKey> {
        let request_id = self.request_id.clone()?;
        Some(RequestKey { request_id, triggered_by: self.triggered_by.clone() })
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
    /// All states.
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
    /// It answered, and its output was accepted.
    Succeeded,
    /// It answered with an error, could not be reached, or violated the contract.
    Failed(Code, String),
    /// It did not answer before a deadline, which is given.
    TimedOut(String),
    /// It was not called.
    Skipped(SkipReason, String),
    /// It was not called because its breaker is open.
    CircuitOpen(String),
    /// The cycle was cancelled before it ended.
    Cancelled,
}

impl SubsystemState {
    /// True if it counts as a failure of the cycle.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Succeeded | Self::Cancelled => false,
            Self::Failed(..) | Self::TimedOut(_) | Self::CircuitOpen(_) => true,
            Self::Skipped(reason, _) => reason.is_failure(),
        }
    }

    /// The status code of its failure, if it was called, or would have been, and did not succeed.
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

    /// The message of its failure; empty if it did not fail.
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
    /// A required subsystem did not succeed.
    RequirementFailed,
    /// A required subsystem is not registered.
    RequirementMissing,
    /// A required subsystem is suspended or not in the subset.
    RequirementLeftOut,
    /// The cycle's deadline had passed.
    CycleDeadline,
    /// A loop names it, or the configuration expects it, but it is not registered.
    NotRegistered,
    /// Its owner is revoked.
    OwnerRevoked,
}

impl SkipReason {
    /// True if it counts as a failure of the cycle: it was to run and could not.
    #[must_use]
    pub fn is_failure(self) -> bool {
        !matches!(self, Self::Suspended | Self::RequirementLeftOut)
    }
}

/// The result of one subsystem in one cycle.
#[derive(Clone, Debug, PartialEq)]
pub struct SubsystemReport {
    /// Its name.
    pub name: Name,
    /// How its part ended.
    pub state: SubsystemState,
    /// From the cycle's start to its first call; `None` if it was not called.
    pub started: Option<Duration>,
    /// From the cycle's start to the end of its part.
    pub ended: Duration,
    /// How long it waited for a free call slot.
    pub queued: Duration,
    /// Number of calls of its `RunCycle`.
    pub attempts: u32,
    /// Its issues, which did not fail it.
    pub issues: Vec<Issue>,
    /// Its metrics.
    pub metrics: BTreeMap<String, f64>,
    /// The SHA-256 of its output, as it was received; `None` if it has none.
    pub output_sha256: Option<[u8; 32]>,
    /// Its output, if it is recorded.
    pub recorded_output: Option<Payload>,
}

impl SubsystemReport {
    /// Bytes of issues, metrics and the output in memory.
    #[must_use]
    pub fn details(&self) -> usize {
        /// Bytes of an entry without its strings.
        const AROUND: usize = 96;
        let issues = self.issues.iter().map(|issue| issue.code.len() + issue.message.len() + AROUND).sum::<usize>();
        let metrics = self.metrics.keys().map(|name| name.len() + AROUND).sum::<usize>();
        issues + metrics + self.recorded_output.as_ref().map_or(0, Payload::len)
    }

    /// The same report without issues, metrics and output.
    #[must_use]
    pub fn without_details(&self) -> Self {
        let Self {
            name,
            state,
            started,
            ended,
            queued,
            attempts,
            issues: _,
            metrics: _,
            output_sha256: _,
            recorded_output: _,
        } = self;
        Self {
            name: name.clone(),
            state: state.clone(),
            started: *started,
            ended: *ended,
            queued: *queued,
            attempts: *attempts,
            issues: Vec::new(),
            metrics: BTreeMap::new(),
            output_sha256: None,
            recorded_output: None,
        }
    }

    /// The report of a subsystem that was not called, whose part ended at the start of the cycle.
    #[must_use]
    pub fn not_called(name: Name, state: SubsystemState) -> Self {
        Self {
            name,
            state,
            started: None,
            ended: Duration::ZERO,
            queued: Duration::ZERO,
            attempts: 0,
            issues: Vec::new(),
            metrics: BTreeMap::new(),
            output_sha256: None,
            recorded_output: None,
        }
    }
}

/// The longest prefix of `text` of at most `max` bytes.
#[must_use]
pub fn excerpt(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// The result of a cycle.
#[derive(Clone, Debug, PartialEq)]
pub struct FinishedCycle {
    /// Its id.
    pub cycle_id: CycleId,
    /// The term of the process that ran it.
    pub epoch: Epoch,
    /// What started it.
    pub trigger: Trigger,
    /// When it was due; `None` if that is not known.
    pub scheduled_at: Option<Timestamp>,
    /// The id of the request.
    pub request_id: Option<String>,
    /// The caller that started it; `None` for a loop, or if callers were not told apart.
    pub triggered_by: Option<Identity>,
    /// Its trace.
    pub trace_id: Option<TraceId>,
    /// When it started; `None` if it never did, or that is not known.
    pub started_at: Option<Timestamp>,
    /// When it ended, or was found.
    pub finished_at: Timestamp,
    /// From start to end, by the monotonic clock.
    pub duration: Duration,
    /// How it ended.
    pub state: CycleState,
    /// A summary of the failures, in one line.
    pub error: String,
    /// The chain of subsystems that ended last, first to last.
    pub critical_path: Vec<Name>,
    /// One per subsystem, in the order of the plan.
    pub subsystems: Vec<Arc<SubsystemReport>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Severity;

    #[test]
    fn an_epoch_by_the_clock_counts_milliseconds() {
        assert_eq!(Epoch::by_clock("1970-01-01T00:00:01.5Z".parse().unwrap()), Epoch(1_500));
    }

    #[test]
    fn each_trigger_and_each_state_has_one_word() {
        let of_loop = Trigger::Loop(Name::parse("l").unwrap());
        let of_parent = Trigger::Parent(ParentCycle::parse("hub/eu/1/2").unwrap());
        let words = [Trigger::Unknown, Trigger::Manual, of_loop, of_parent].map(|trigger| trigger.name());
        assert_eq!(words, ["UNKNOWN", "MANUAL", "LOOP", "PARENT"]);
        for state in CycleState::ALL {
            assert_eq!(state.name().to_lowercase(), state.key());
        }
    }

    #[test]
    fn a_part_that_was_to_run_and_could_not_is_a_failure() {
        let skipped = |reason| SubsystemState::Skipped(reason, String::new());
        for failure in [
            SubsystemState::Failed(Code::Internal, String::new()),
            SubsystemState::TimedOut(String::new()),
            SubsystemState::CircuitOpen(String::new()),
            skipped(SkipReason::RequirementFailed),
            skipped(SkipReason::RequirementMissing),
            skipped(SkipReason::CycleDeadline),
            skipped(SkipReason::NotRegistered),
            skipped(SkipReason::OwnerRevoked),
        ] {
            assert!(failure.is_failure(), "{failure:?}");
        }
        for other in [
            SubsystemState::Succeeded,
            SubsystemState::Cancelled,
            skipped(SkipReason::Suspended),
            skipped(SkipReason::RequirementLeftOut),
        ] {
            assert!(!other.is_failure(), "{other:?}");
        }
    }

    #[test]
    fn the_size_of_details_grows_by_each_byte_of_them() {
        let report = |code: usize, message: usize, metric: usize, output: usize| {
            let json = serde_json::json!({ "text": "x".repeat(output) });
            let issue = Issue { severity: Severity::Info, code: "c".repeat(code), message: "m".repeat(message) };
            SubsystemReport {
                issues: vec![issue],
                metrics: BTreeMap::from([("n".repeat(metric), 1.0)]),
                output_sha256: None,
                recorded_output: Payload::from_json(json.as_object().unwrap()).ok(),
                ..SubsystemReport::not_called(Name::parse("a").unwrap(), SubsystemState::Succeeded)
            }
        };
        let size = report(10, 10, 10, 10).details();
        for longer in [report(17, 10, 10, 10), report(10, 17, 10, 10), report(10, 10, 17, 10), report(10, 10, 10, 17)] {
            // The lengths in the encoding of the output stay one byte each.
            assert_eq!(longer.details(), size + 7);
        }
        assert!(size > 40 && size < 1_000);
        assert_eq!(report(10, 10, 10, 10).without_details().details(), 0);
    }
}
