//! The port to a collector of spans.

use crate::model::Span;

/// Receives the spans of cycles.
pub trait Spans: Send + Sync + 'static {
    /// Decides whether a cycle is traced, if its caller does not decide. `None` if no cycle is ever traced.
    fn samples(&self) -> Option<bool>;

    /// Receives the spans of one cycle. Must not block, since cycles wait for it.
    fn ended(&self, spans: Vec<Span>);
}

/// Tracing is disabled.
#[derive(Clone, Copy, Debug)]
pub struct Untraced;

impl Spans for Untraced {
    fn samples(&self) -> Option<bool> {
        None
    }

    fn ended(&self, _: Vec<Span>) {}
}
