//! Audit events: who changed what, and with which result. Each field is bounded, and an event has at most 1 KiB.

use std::{borrow::Cow, time::Duration};

use jiff::Timestamp;

use super::{Code, CycleId, Identity, Revision, excerpt};

/// The decision about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The caller may make it.
    Allowed,
    /// It was answered, and would be denied if the policy was enforced.
    WouldBeDenied,
    /// It was denied.
    Denied,
}

/// The things that a change concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditTargets {
    /// The first ones: at most [`AuditTargets::MAX`], with at most [`AuditTargets::MAX_BYTES`] bytes together.
    pub named: Vec<String>,
    /// Number of further ones.
    pub left_out: u64,
}

impl AuditTargets {
    /// Most targets that are named.
    pub const MAX: usize = 16;
    /// Most bytes of all named targets.
    pub const MAX_BYTES: usize = 480;
}

impl<T: Into<String>> FromIterator<T> for AuditTargets {
    fn from_iter<I: IntoIterator<Item = T>>(targets: I) -> Self {
        let (mut all, mut bytes) = (Self::default(), 0);
        for target in targets {
            let target = target.into();
            bytes += target.len();
            if all.left_out > 0 || all.named.len() == Self::MAX || bytes > Self::MAX_BYTES {
                all.left_out += 1;
            } else {
                all.named.push(target);
            }
        }
        all
    }
}

/// The cause of a change, as far as it is known before the change: a call, or the service itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The RPC; or the action of the service, in lower case.
    pub rpc: Cow<'static, str>,
    /// The caller; `None` for the service itself.
    pub caller: Option<Identity>,
    /// The other side of the connection; empty for the service itself.
    pub peer: String,
    /// The decision about the call.
    pub decision: Decision,
    /// The things that it concerns.
    pub targets: AuditTargets,
    /// The keyed digest of the request.
    pub request_digest: Option<[u8; 32]>,
    /// When the call began; `None` if that is not known any more.
    pub begun_at: Option<Timestamp>,
}

impl Cause {
    /// Most bytes of a text that is not bounded by its type.
    const MAX_TEXT: usize = 64;

    /// An action of the service itself.
    pub fn of_service(action: &'static str) -> Self {
        Self {
            rpc: action.into(),
            caller: None,
            peer: String::new(),
            decision: Decision::Allowed,
            targets: AuditTargets::default(),
            request_digest: None,
            begun_at: None,
        }
    }

    /// The RPC, or the action of the service, bounded.
    pub fn rpc(&self) -> &str {
        excerpt(&self.rpc, Self::MAX_TEXT)
    }

    /// The other side of the connection, bounded.
    pub fn peer(&self) -> &str {
        excerpt(&self.peer, Self::MAX_TEXT)
    }

    /// The event of the change that succeeds at this time.
    pub fn event(&self, time: Timestamp) -> AuditEvent {
        AuditEvent {
            time,
            cause: self.clone(),
            code: Code::Ok,
            cycle_id: CycleId::default(),
            revision: Revision::default(),
            count: 1,
        }
    }
}

/// An audit event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEvent {
    /// When the change was written.
    pub time: Timestamp,
    /// Its cause.
    pub cause: Cause,
    /// The result; [`Code::Unknown`] if the process ended before it could answer.
    pub code: Code,
    /// The cycle that was started or cancelled; 0 if there is none.
    pub cycle_id: CycleId,
    /// The revision of its record, if that is written together with the event; else 0.
    pub revision: Revision,
    /// Number of calls for which it stands.
    pub count: u64,
}

impl AuditEvent {
    /// Most bytes of an encoded event.
    pub const MAX_BYTES: usize = 1 << 10;

    /// The time from the beginning of the call to the change, by the wall clock.
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
        assert_eq!(shape(of(16, 30)), (16, 0));
        assert_eq!(shape(of(17, 30)), (16, 1));
        assert_eq!(shape(of(20_000, 63)), (7, 19_993));
        assert_eq!(shape(of(1, 481)), (0, 1));
    }
}
