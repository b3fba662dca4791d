//! Audit events: who called what, and with which result. Each field is bounded, and an event has at most 1 KiB.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;

use super::{Code, CycleId, Identity, Revision, excerpt};

/// What an audit event is about. Retention keeps as many of each kind, so that those of one kind, such as the denials
/// of strangers, push out no others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventKind {
    /// A change.
    #[default]
    Change,
    /// Calls that changed nothing, such as reads.
    Calls,
    /// Denied calls.
    Denials,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Change, Self::Calls, Self::Denials];
}

/// The decision about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Decision {
    /// The caller may make it.
    Allowed,
    /// It was answered, and would be denied if the policy was enforced.
    WouldBeDenied,
    /// It was denied.
    Denied,
}

/// The things that a call concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditTargets {
    /// The first ones: at most [`AuditTargets::MAX`], with at most [`AuditTargets::MAX_BYTES`] bytes together.
    pub named: Vec<String>,
    /// Number of further ones. Of several calls, each counts those that are not named.
    pub left_out: u64,
}

impl AuditTargets {
    /// Most targets that are named.
    pub const MAX: usize = 16;
    /// Most bytes of all named targets.
    pub const MAX_BYTES: usize = 440;

    /// Adds a target, after earlier ones of this many bytes.
    fn push(&mut self, target: String, bytes: &mut usize) {
        *bytes += target.len();
        if self.left_out > 0 || self.named.len() == Self::MAX || *bytes > Self::MAX_BYTES {
            self.left_out += 1;
        } else {
            self.named.push(target);
        }
    }

    /// Adds the targets of another call.
    pub fn add(&mut self, others: Self) {
        let mut bytes = self.named.iter().map(String::len).sum();
        for target in others.named {
            if !self.named.contains(&target) {
                self.push(target, &mut bytes);
            }
        }
        self.left_out = self.left_out.saturating_add(others.left_out);
    }
}

impl<T: Into<String>> FromIterator<T> for AuditTargets {
    fn from_iter<I: IntoIterator<Item = T>>(targets: I) -> Self {
        let (mut all, mut bytes) = (Self::default(), 0);
        for target in targets {
            all.push(target.into(), &mut bytes);
        }
        all
    }
}

/// Whether a call has an event of its own, or will have one. All clones share it. It is no part of what a cause is.
#[derive(Clone, Default)]
pub struct OwnEvent(Arc<Inner>);

#[derive(Default)]
struct Inner {
    is_set: AtomicBool,
    report: Option<Box<dyn Fn() + Send + Sync>>,
}

impl OwnEvent {
    /// Calls `report` when the call has one, once. It is called while the change is applied, so it must not wait.
    pub fn reported_to(report: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner { is_set: AtomicBool::new(false), report: Some(Box::new(report)) }))
    }

    /// It has one from now on.
    pub fn set(&self) {
        if !self.0.is_set.swap(true, Ordering::Relaxed)
            && let Some(report) = &self.0.report
        {
            report();
        }
    }

    /// True if it has one.
    pub fn is_set(&self) -> bool {
        self.0.is_set.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for OwnEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnEvent").field(&self.is_set()).finish()
    }
}

impl PartialEq for OwnEvent {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for OwnEvent {}

/// The cause of an event, as far as it is known before the result: a call, or the service itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The RPC; or the action of the service, in lower case.
    pub rpc: Cow<'static, str>,
    /// The caller; `None` for the service itself.
    pub caller: Option<Identity>,
    /// The other side of the connection; empty for the service itself.
    pub peer: String,
    /// The name of the replica that forwarded the call; `None` if it came to this one.
    pub via: Option<Arc<str>>,
    /// The decision about the call.
    pub decision: Decision,
    /// The things that it concerns.
    pub targets: AuditTargets,
    /// The keyed digest of the request.
    pub request_digest: Option<[u8; 32]>,
    /// When the call began; `None` if that is not known any more.
    pub begun_at: Option<Timestamp>,
    /// Whether a change has, or will have, an event with this cause.
    pub own_event: OwnEvent,
}

impl Cause {
    /// Most bytes of texts that are not bounded by their types: twice those of the longest RPC; a little more than
    /// those of addresses; and as many as an event has room for.
    const MAX_RPC: usize = 40;
    const MAX_PEER: usize = 64;
    /// Most bytes of the name of a replica.
    pub const MAX_VIA: usize = 56;

    /// An action of the service itself.
    pub fn of_service(action: &'static str) -> Self {
        Self {
            rpc: action.into(),
            caller: None,
            peer: String::new(),
            via: None,
            decision: Decision::Allowed,
            targets: AuditTargets::default(),
            request_digest: None,
            begun_at: None,
            own_event: OwnEvent::default(),
        }
    }

    /// The RPC, or the action of the service, bounded.
    pub fn rpc(&self) -> &str {
        excerpt(&self.rpc, Self::MAX_RPC)
    }

    /// The other side of the connection, bounded.
    pub fn peer(&self) -> &str {
        excerpt(&self.peer, Self::MAX_PEER)
    }

    /// The replica that forwarded the call, bounded; empty without one.
    pub fn via(&self) -> &str {
        excerpt(self.via.as_deref().unwrap_or_default(), Self::MAX_VIA)
    }

    /// The event of the change that succeeds at this time.
    pub fn event(&self, time: Timestamp) -> AuditEvent {
        AuditEvent {
            kind: EventKind::Change,
            time,
            cause: self.clone(),
            code: Some(Code::Ok),
            reason: "",
            cycle_id: CycleId::default(),
            revision: Revision::default(),
            count: 1,
        }
    }
}

/// An audit event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEvent {
    /// What it is about.
    pub kind: EventKind,
    /// When the change was written, or the last one of several calls ended.
    pub time: Timestamp,
    /// Its cause; of several calls, that of the first one, with the targets of all.
    pub cause: Cause,
    /// The result; [`Code::Unknown`] if the process ended before it could answer, `None` if a stream has begun.
    pub code: Option<Code>,
    /// Why calls were denied, as their statuses say it; empty if they were not.
    pub reason: &'static str,
    /// The cycle that was started or cancelled; 0 if the call concerns none.
    pub cycle_id: CycleId,
    /// The revision of its record, if that is written together with the event; else 0.
    pub revision: Revision,
    /// Number of calls for which it stands.
    pub count: u64,
}

impl AuditEvent {
    /// Most bytes of an encoded event.
    pub const MAX_BYTES: usize = 1 << 10;

    /// The time from the beginning of the call, or of the first one, to `time`, by the wall clock.
    pub fn duration(&self) -> Option<Duration> {
        let begun_at = self.cause.begun_at?;
        Some(Duration::try_from(self.time.duration_since(begun_at)).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_bounded_by_number_and_by_bytes_and_the_rest_is_counted() {
        let of = |count: usize, length: usize| (0..count).map(|_| "x".repeat(length)).collect::<AuditTargets>();
        let shape = |targets: AuditTargets| (targets.named.len(), targets.left_out);
        assert_eq!(shape(of(0, 1)), (0, 0));
        assert_eq!(shape(of(16, 27)), (16, 0));
        assert_eq!(shape(of(17, 27)), (16, 1));
        assert_eq!(shape(of(20_000, 63)), (6, 19_994));
        assert_eq!(shape(of(1, 441)), (0, 1));
    }

    #[test]
    fn targets_of_several_calls_are_named_once_within_the_same_bounds() {
        let of = |names: &[&str]| names.iter().copied().collect::<AuditTargets>();
        let mut all = of(&["a", "b"]);
        all.add(of(&["b", "c"]));
        assert_eq!(all, of(&["a", "b", "c"]));
        let many: Vec<_> = (0..30).map(|i| i.to_string()).collect();
        all.add(many.iter().map(String::as_str).collect());
        all.add(of(&["a", "d"]));
        assert_eq!((all.named.len(), all.left_out), (AuditTargets::MAX, 3 + 14 + 1));
    }
}
