//! The spans of a cycle: made while it runs, and only if it is traced.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;

use super::CycleRun;
use crate::{
    model::{Code, FinishedCycle, Method, Span, SpanContext, Subsystem, TraceId, Work},
    ports::{CallError, Spans},
    random::Random,
};

/// The trace of a cycle.
#[derive(Debug)]
pub enum Trace {
    /// None.
    None,
    /// Its spans are not collected here. The context is still sent to subsystems, whose spans other systems may
    /// collect.
    HandedOn(SpanContext),
    /// The spans of this cycle are collected.
    Collected(Collected),
}

/// The spans of a cycle: one for each call, and two more.
#[derive(Debug)]
pub struct Collected {
    root: SpanContext,
    parent: Option<u64>,
    /// Source of span ids.
    random: Random,
    calls: Mutex<Vec<Span>>,
}

impl Trace {
    /// The trace of a cycle of `caller`. A caller with a trace has decided whether it is sampled; otherwise `spans`
    /// decides.
    pub fn begin(caller: Option<&SpanContext>, spans: &dyn Spans, random: &Random) -> Self {
        let collected =
            |root, parent| Self::Collected(Collected { root, parent, random: random.clone(), calls: Mutex::default() });
        let root = |is_sampled| SpanContext::root(TraceId(random.id128()), random.id64(), is_sampled);
        match (spans.samples(), caller) {
            (None, None) => Self::None,
            (Some(_), Some(caller)) if caller.is_sampled => {
                collected(caller.sibling(random.id64()), Some(caller.span_id))
            }
            (_, Some(caller)) => Self::HandedOn(caller.clone()),
            (Some(true), None) => collected(root(true), None),
            (Some(false), None) => Self::HandedOn(root(false)),
        }
    }

    /// Its trace id, if it has one.
    pub fn id(&self) -> Option<TraceId> {
        match self {
            Self::None => None,
            Self::HandedOn(context) => Some(context.trace_id),
            Self::Collected(collected) => Some(collected.root.trace_id),
        }
    }
}

impl Collected {
    /// All spans of a cycle that ended at `ended`, and was then committed.
    pub fn finish(self, cycle: &FinishedCycle, ended: Instant, commit: Range<Instant>) -> Vec<Span> {
        let Self { root, parent, random, calls } = self;
        let mut spans = calls.into_inner().unwrap_or_else(PoisonError::into_inner);
        spans.reserve_exact(2);
        let before_commit = commit.start.saturating_duration_since(ended);
        spans.push(Span {
            context: root.sibling(random.id64()),
            parent: Some(root.span_id),
            started_at: cycle.finished_at.saturating_add(before_commit).unwrap_or(cycle.finished_at),
            duration: commit.end - commit.start,
            work: Work::Commit,
        });
        spans.push(Span {
            context: root,
            parent,
            started_at: cycle.started_at.unwrap_or(cycle.finished_at),
            duration: cycle.duration + commit.end.saturating_duration_since(ended),
            work: Work::Cycle {
                cycle_id: cycle.cycle_id,
                epoch: cycle.epoch,
                trigger: cycle.trigger.clone(),
                state: cycle.state,
                error: cycle.error.clone(),
                has_remote_parent: parent.is_some(),
            },
        });
        spans
    }

    fn calls(&self) -> MutexGuard<'_, Vec<Span>> {
        // A list is still valid after a panic.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The source of spans for the calls of one subsystem in one cycle.
#[derive(Clone, Copy)]
pub(super) struct CallSpans<'a> {
    pub(super) cycle: &'a CycleRun,
    /// When the cycle began to run.
    pub(super) start: Instant,
    pub(super) subsystem: &'a Arc<Subsystem>,
    /// The deadline of the calls.
    pub(super) deadline: Instant,
}

impl<'a> CallSpans<'a> {
    /// A call begins.
    pub(super) fn begin(self, method: Method, attempt: u32) -> CallSpan<'a> {
        match &self.cycle.trace {
            Trace::None => CallSpan { context: None, open: None },
            Trace::HandedOn(context) => CallSpan { context: Some(context.clone()), open: None },
            Trace::Collected(collected) => {
                let open = Open { of: self, collected, method, attempt, started: Instant::now() };
                CallSpan { context: Some(collected.root.sibling(collected.random.id64())), open: Some(open) }
            }
        }
    }
}

/// A call in progress. Dropping it before its end means that the call was abandoned.
pub(super) struct CallSpan<'a> {
    context: Option<SpanContext>,
    open: Option<Open<'a>>,
}

struct Open<'a> {
    of: CallSpans<'a>,
    collected: &'a Collected,
    method: Method,
    attempt: u32,
    started: Instant,
}

impl CallSpan<'_> {
    /// The context for the subsystem.
    pub(super) fn context(&self) -> Option<SpanContext> {
        self.context.clone()
    }

    /// The call has ended.
    pub(super) fn end<T>(mut self, result: &Result<T, CallError>) {
        match result {
            Ok(_) => self.ended(Code::Ok, ""),
            Err(error) => self.ended(error.code, &error.message),
        }
    }

    fn ended(&mut self, code: Code, message: &str) {
        let (Some(open), Some(context)) = (self.open.take(), self.context.take()) else { return };
        let Open { of: CallSpans { cycle, start, subsystem, .. }, collected, method, attempt, started } = open;
        let since_start = started.saturating_duration_since(start);
        collected.calls().push(Span {
            context,
            parent: Some(collected.root.span_id),
            started_at: cycle.started_at.saturating_add(since_start).unwrap_or(cycle.started_at),
            duration: started.elapsed(),
            work: Work::Call {
                subsystem: subsystem.clone(),
                method,
                cycle_id: cycle.cycle_id,
                attempt,
                code,
                message: message.to_owned(),
            },
        });
    }
}

impl Drop for CallSpan<'_> {
    fn drop(&mut self) {
        if self.open.as_ref().is_some_and(|open| Instant::now() >= open.of.deadline) {
            self.ended(Code::DeadlineExceeded, "abandoned: its deadline has passed");
        } else {
            self.ended(Code::Cancelled, "abandoned: the cycle was cancelled");
        }
    }
}
