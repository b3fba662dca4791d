//! The only codec between an audit event and its bytes: the wire form of `AuditEvent`.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use crate::{
    model::{AuditEvent, AuditTargets, Cause, Code, Decision, EventKind, Identity, OwnEvent, excerpt},
    ports::AuditEntry,
    proto::{orchestrator::v1 as pb, read_timestamp, timestamp},
};

/// Encodes an event.
pub fn encode_event(event: &AuditEvent) -> AuditEntry {
    let message = pb::AuditEvent {
        kind: match event.kind {
            EventKind::Change => pb::AuditKind::Change,
            EventKind::Calls => pb::AuditKind::Calls,
            EventKind::Denials => pb::AuditKind::Denials,
        }
        .into(),
        time: Some(timestamp(event.time)),
        code: event.code.map(Code::name).unwrap_or_default().to_owned(),
        reason: event.reason.to_owned(),
        cycle_id: event.cycle_id.0,
        revision: event.revision.0,
        duration_ms: event.duration().map(|duration| duration.as_secs_f64() * 1e3),
        count: event.count,
        ..message_of(&event.cause)
    };
    AuditEntry {
        kind: event.kind,
        time: event.time,
        caller: message.caller.clone(),
        rpc: message.rpc.clone(),
        denied: is_denied(message.decision()),
        bytes: message.encode_to_vec().into(),
    }
}

/// Encodes the cause of an event that is written later, maybe by another process.
pub fn encode_cause(cause: &Cause) -> Bytes {
    message_of(cause).encode_to_vec().into()
}

/// Decodes the result of [`encode_cause`].
///
/// # Errors
/// The problem.
pub fn decode_cause(bytes: Bytes) -> Result<Cause, String> {
    let message = pb::AuditEvent::decode(bytes).map_err(|error| error.to_string())?;
    let nobody = Identity::Nobody;
    let caller = match message.caller.as_str() {
        "" => None,
        text if text == nobody.to_string() => Some(nobody),
        text => Some(Identity::parse(text).map_err(|error| format!("its caller {error}"))?),
    };
    let decision = match message.decision() {
        pb::Decision::Unspecified | pb::Decision::Allowed => Decision::Allowed,
        pb::Decision::WouldBeDenied => Decision::WouldBeDenied,
        pb::Decision::Denied => Decision::Denied,
    };
    let pb::AuditEvent { rpc, peer, via, targets, targets_left_out, request_digest, .. } = message;
    Ok(Cause {
        rpc: rpc.into(),
        caller,
        peer,
        via: Some(via).filter(|via| !via.is_empty()).map(Arc::from),
        decision,
        targets: AuditTargets { named: targets, left_out: targets_left_out },
        request_digest: request_digest.as_ref().try_into().ok(),
        begun_at: None,
        own_event: OwnEvent::default(),
    })
}

/// The event of calls that the replica of this name has answered or denied, from its bytes as [`encode_event`] there
/// made them.
///
/// # Errors
/// The problem.
pub fn read_event(bytes: &Bytes, replica: &str) -> Result<AuditEntry, String> {
    let mut event = pb::AuditEvent::decode(bytes.clone()).map_err(|error| error.to_string())?;
    if event.via.is_empty() {
        excerpt(replica, Cause::MAX_VIA).clone_into(&mut event.via);
    }
    let entry = AuditEntry {
        kind: kind(event.kind()),
        time: event.time.and_then(read_timestamp).ok_or("it has no time")?,
        caller: event.caller.clone(),
        rpc: event.rpc.clone(),
        denied: is_denied(event.decision()),
        bytes: event.encode_to_vec().into(),
    };
    match entry.bytes.len() {
        // A change has its event in the commit that makes it.
        _ if entry.kind == EventKind::Change => Err("it is that of a change".into()),
        bytes if bytes > AuditEvent::MAX_BYTES => Err(format!("it has {bytes} bytes")),
        _ => Ok(entry),
    }
}

/// True if events are copied to the log of the process.
pub fn copies_events() -> bool {
    tracing::enabled!(target: "audit", tracing::Level::DEBUG)
}

/// Copies an event that was written to the log of the process, with the target `audit`.
pub fn copy_event(entry: &AuditEntry) {
    // It was encoded by this process.
    let Ok(event) = pb::AuditEvent::decode(entry.bytes.clone()) else { return };
    tracing::debug!(
        target: "audit",
        time = %entry.time,
        kind = event.kind().as_str_name(),
        rpc = event.rpc,
        caller = event.caller,
        peer = event.peer,
        via = event.via,
        decision = event.decision().as_str_name(),
        code = event.code,
        reason = event.reason,
        targets = event.targets.join(","),
        targets_left_out = event.targets_left_out,
        cycle_id = event.cycle_id,
        revision = event.revision,
        duration_ms = event.duration_ms,
        count = event.count,
        "audit event"
    );
}

/// Checks that clients can decode an event, and that its keys are those in its bytes.
///
/// # Errors
/// The problem.
pub fn check_event(entry: &AuditEntry) -> Result<(), String> {
    let event = pb::AuditEvent::decode(entry.bytes.clone()).map_err(|error| error.to_string())?;
    let keys = [
        ("kind", kind(event.kind()) == entry.kind),
        ("time", event.time == Some(timestamp(entry.time))),
        ("caller", event.caller == entry.caller),
        ("rpc", event.rpc == entry.rpc),
        ("denied", is_denied(event.decision()) == entry.denied),
    ];
    match keys.iter().find(|(_, is_same)| !is_same) {
        Some((column, _)) => Err(format!("its column {column} is not that of its bytes")),
        None => Ok(()),
    }
}

fn kind(kind: pb::AuditKind) -> EventKind {
    match kind {
        pb::AuditKind::Unspecified | pb::AuditKind::Change => EventKind::Change,
        pb::AuditKind::Calls => EventKind::Calls,
        pb::AuditKind::Denials => EventKind::Denials,
    }
}

fn is_denied(decision: pb::Decision) -> bool {
    match decision {
        pb::Decision::Unspecified | pb::Decision::Allowed => false,
        pb::Decision::WouldBeDenied | pb::Decision::Denied => true,
    }
}

/// The part of an event that is known before the change.
fn message_of(cause: &Cause) -> pb::AuditEvent {
    let credential = match cause.caller {
        None | Some(Identity::Nobody) => pb::CredentialKind::Unspecified,
        Some(Identity::Token(_)) => pb::CredentialKind::Token,
        Some(Identity::Certificate(_)) => pb::CredentialKind::Certificate,
        Some(Identity::Uid(_) | Identity::UidAt(..)) => pb::CredentialKind::User,
        Some(Identity::Jwt(_)) => pb::CredentialKind::Jwt,
    };
    let decision = match cause.decision {
        Decision::Allowed => pb::Decision::Allowed,
        Decision::WouldBeDenied => pb::Decision::WouldBeDenied,
        Decision::Denied => pb::Decision::Denied,
    };
    pb::AuditEvent {
        rpc: cause.rpc().to_owned(),
        caller: cause.caller.as_ref().map(ToString::to_string).unwrap_or_default(),
        credential: credential.into(),
        peer: cause.peer().to_owned(),
        via: cause.via().to_owned(),
        decision: decision.into(),
        targets: cause.targets.named.clone(),
        targets_left_out: cause.targets.left_out,
        request_digest: cause.request_digest.map(|digest| Bytes::copy_from_slice(&digest)).unwrap_or_default(),
        ..pb::AuditEvent::default()
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::model::{CycleId, Revision};

    fn largest() -> AuditEvent {
        let cause = Cause {
            rpc: "x".repeat(1000).into(),
            caller: Some(Identity::Certificate("x".repeat(Identity::MAX_LEN).into())),
            peer: "x".repeat(1000),
            via: Some("x".repeat(1000).into()),
            decision: Decision::WouldBeDenied,
            targets: (0..20_000).map(|_| "x".repeat(30)).collect(),
            request_digest: Some([7; 32]),
            begun_at: Some(Timestamp::MIN),
            own_event: OwnEvent::default(),
        };
        let (cycle_id, revision, count) = (CycleId(u64::MAX), Revision(u64::MAX), u64::MAX);
        let (code, reason) = (Some(Code::FailedPrecondition), "CREDENTIAL_MISSING");
        AuditEvent { code, reason, cycle_id, revision, count, ..cause.event(Timestamp::MAX) }
    }

    #[test]
    fn the_largest_event_is_within_its_limit() {
        let entry = encode_event(&largest());
        assert!(entry.bytes.len() <= AuditEvent::MAX_BYTES, "{}", entry.bytes.len());
        assert!(entry.denied);
    }

    #[test]
    fn events_of_another_replica_name_it_and_are_no_changes() {
        let of_calls = |via: Option<Arc<str>>| {
            let cause = Cause { caller: Some(Identity::Uid(7)), via, ..Cause::of_service("GetCycle") };
            AuditEvent { kind: EventKind::Calls, count: 3, ..cause.event(Timestamp::UNIX_EPOCH) }
        };
        let sent = encode_event(&of_calls(None));
        assert_eq!(read_event(&sent.bytes, "b"), Ok(encode_event(&of_calls(Some("b".into())))));
        assert_eq!(read_event(&read_event(&sent.bytes, "b").unwrap().bytes, "c"), read_event(&sent.bytes, "b"));
        let change = encode_event(&Cause::of_service("reload").event(Timestamp::UNIX_EPOCH));
        assert!(read_event(&change.bytes, "b").is_err());
        assert!(read_event(&Bytes::from_static(b"\xff"), "b").is_err());
    }

    #[test]
    fn a_cause_is_the_same_in_a_later_process_except_for_its_time() {
        for caller in ["token:a", "cert:spiffe://a/b", "uid:7", "uid:7@b"].map(|text| Identity::parse(text).unwrap()) {
            let (rpc, peer) = ("RunCycle".into(), "127.0.0.1:1".into());
            let via = Some("core-2".into());
            let cause = Cause { rpc, caller: Some(caller), peer, via, begun_at: None, ..largest().cause };
            assert_eq!(decode_cause(encode_cause(&cause)), Ok(cause));
        }
        let nobody = Cause { caller: Some(Identity::Nobody), ..Cause::of_service("x") };
        assert_eq!(decode_cause(encode_cause(&nobody)), Ok(nobody));
        let of_service = Cause::of_service("reload");
        assert_eq!(decode_cause(encode_cause(&of_service)), Ok(of_service));
        assert!(decode_cause(Bytes::from_static(b"\xff")).is_err());
    }

    #[test]
    fn keys_are_compared_with_the_bytes() {
        let entry = encode_event(&largest());
        assert_eq!(check_event(&entry), Ok(()));
        let changed = [
            ("kind", AuditEntry { kind: EventKind::Denials, ..entry.clone() }),
            ("time", AuditEntry { time: Timestamp::UNIX_EPOCH, ..entry.clone() }),
            ("caller", AuditEntry { caller: "token:b".into(), ..entry.clone() }),
            ("rpc", AuditEntry { rpc: "GetCycle".into(), ..entry.clone() }),
            ("denied", AuditEntry { denied: false, ..entry.clone() }),
        ];
        for (column, entry) in changed {
            assert_eq!(check_event(&entry), Err(format!("its column {column} is not that of its bytes")));
        }
        assert!(check_event(&AuditEntry { bytes: Bytes::from_static(b"\xff"), ..entry }).is_err());
    }
}
