//! Traces, which join the spans of a cycle with those of its caller and of the subsystems.
//!
//! By <https://www.w3.org/TR/trace-context/>.

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{Code, CycleId, CycleState, Epoch, Subsystem, Trigger};

/// The id of a trace. Not zero. Displayed as 32 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(pub u128);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A reference to a span. Displayed as the header `traceparent`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanContext {
    /// The trace.
    pub trace_id: TraceId,
    /// The span in it. Not zero.
    pub span_id: u64,
    /// True if the trace is sampled.
    pub is_sampled: bool,
    /// Vendor-specific data, passed on unchanged.
    pub state: Option<Arc<str>>,
}

impl SpanContext {
    /// Most bytes of `tracestate` that are passed on: the minimum of the standard.
    const MAX_STATE: usize = 512;

    /// The first span of a new trace.
    #[must_use]
    pub fn root(trace_id: TraceId, span_id: u64, is_sampled: bool) -> Self {
        Self { trace_id, span_id, is_sampled, state: None }
    }

    /// Another span of the same trace.
    #[must_use]
    pub fn sibling(&self, span_id: u64) -> Self {
        Self { span_id, ..self.clone() }
    }

    /// Parses the headers `traceparent` and `tracestate`; `None` if they are invalid, as the standard requires.
    #[must_use]
    pub fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let parts: Vec<_> = traceparent.split('-').collect();
        let [version, trace_id, span_id, flags, more @ ..] = &parts[..] else { return None };
        let is_hex = |text: &str, digits: usize| {
            text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        // A later version may append fields.
        if !is_hex(version, 2) || *version == "ff" || (*version == "00" && !more.is_empty()) {
            return None;
        }
        if !is_hex(trace_id, 32) || !is_hex(span_id, 16) || !is_hex(flags, 2) {
            return None;
        }
        let trace_id = u128::from_str_radix(trace_id, 16).ok().filter(|id| *id != 0).map(TraceId)?;
        let span_id = u64::from_str_radix(span_id, 16).ok().filter(|id| *id != 0)?;
        let is_sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        let is_header = |text: &&str| text.len() <= Self::MAX_STATE && text.bytes().all(|b| (b' '..=b'~').contains(&b));
        let state = tracestate.filter(|text| !text.is_empty()).filter(is_header).map(Arc::from);
        Some(Self { trace_id, span_id, is_sampled, state })
    }
}

impl fmt::Display for SpanContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.is_sampled))
    }
}

/// A span that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Its id.
    pub context: SpanContext,
    /// Its parent.
    pub parent: Option<u64>,
    /// When it started.
    pub started_at: Timestamp,
    /// How long it took.
    pub duration: Duration,
    /// Its work.
    pub work: Work,
}

/// The work of a span.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// A cycle, from its start until it was recorded.
    Cycle {
        /// Its id.
        cycle_id: CycleId,
        /// The term of the process that ran it.
        epoch: Epoch,
        /// What started it.
        trigger: Trigger,
        /// How it ended.
        state: CycleState,
        /// A summary of the failures.
        error: String,
        /// True if the parent span belongs to another process.
        has_remote_parent: bool,
    },
    /// One call of a subsystem.
    Call {
        /// The subsystem.
        subsystem: Arc<Subsystem>,
        /// The called method.
        method: Method,
        /// The cycle.
        cycle_id: CycleId,
        /// The attempt that it belongs to.
        attempt: u32,
        /// How it ended. An abandoned call ends with DEADLINE_EXCEEDED or CANCELLED.
        code: Code,
        /// The error message.
        message: String,
    },
    /// Writing the record.
    Commit,
}

/// A method of a subsystem that cycles call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `Initialize`.
    Initialize,
    /// `RunCycle`.
    RunCycle,
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_context_is_read_as_it_was_written() {
        let context = SpanContext::parse(PARENT, Some("a=1,b=2")).unwrap();
        assert_eq!(context.to_string(), PARENT);
        assert_eq!(context.trace_id.to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert!(context.is_sampled);
        assert_eq!(context.state.as_deref(), Some("a=1,b=2"));
        let sibling = context.sibling(1);
        assert_eq!((sibling.trace_id, &sibling.state), (context.trace_id, &context.state));
        assert_eq!(sibling.span_id, 1);
    }

    #[test]
    fn only_the_lowest_flag_says_that_a_trace_is_sampled() {
        for (flags, is_sampled) in [("00", false), ("01", true), ("02", false), ("03", true)] {
            let header = format!("{}{flags}", &PARENT[..53]);
            assert_eq!(SpanContext::parse(&header, None).unwrap().is_sampled, is_sampled, "{flags}");
        }
    }

    #[test]
    fn an_invalid_header_is_ignored() {
        for header in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(SpanContext::parse(header, None), None, "{header}");
        }
        let later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more";
        assert!(SpanContext::parse(later, None).is_some());
        assert_eq!(SpanContext::parse(PARENT, Some("a\u{1b}")).unwrap().state, None);
    }
}
