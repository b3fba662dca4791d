//! The only place where a refusal becomes a gRPC status.

use std::{
    collections::HashMap,
    fmt::{self, Display},
    time::Duration,
};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::{
    judge::Denied,
    usage::{LimitReached, Load},
};
use crate::{
    access::{NoSession, Role, Unauthenticated},
    cluster::Membership,
    model::{
        self, CycleId, Epoch, Leader, Name, Replica, Violation, Violations,
        text::{count, shortened},
    },
    orchestrator::{NotOwner, Refusal},
    ports::{StoreError, Unreadable, UnreadableEvent},
};

/// The domain of every reason, as in the contract.
const DOMAIN: &str = "orchestrator.dreamnet";

/// Limits of a status. It is sent in trailers, which contain its message twice, once percent-encoded and once with the
/// details in base64; and clients refuse trailers of more than 8 KiB (Java) or 16 KiB (C++, Python). Together these
/// stay below 8 KiB.
const MAX_MESSAGE: usize = 768;
const MAX_DETAILS: usize = 3 << 10;
/// Most bytes of the description of one field.
const MAX_PROBLEM: usize = 512;

/// The status of a refusal, with its details.
pub(super) fn status(refusal: impl Into<Refusal>) -> Status {
    let refusal = refusal.into();
    let message = refusal.to_string();
    let (code, reason, metadata) = match refusal {
        Refusal::Invalid(violations) => return invalid(violations),
        Refusal::SubsystemNotFound(name) => {
            (Code::NotFound, "SUBSYSTEM_NOT_FOUND", vec![("subsystem", name.to_string())])
        }
        Refusal::SubsystemRenamed { former, name } => (
            Code::NotFound,
            "SUBSYSTEM_NOT_FOUND",
            vec![("subsystem", former.to_string()), ("renamed_to", name.to_string())],
        ),
        Refusal::NameReserved { former, name } => (
            Code::FailedPrecondition,
            "SUBSYSTEM_RENAMED",
            vec![("subsystem", former.to_string()), ("renamed_to", name.to_string())],
        ),
        Refusal::NameTaken(name) => (Code::AlreadyExists, "NAME_TAKEN", vec![("subsystem", name.to_string())]),
        Refusal::TooManyFormerNames(name) => {
            (Code::FailedPrecondition, "TOO_MANY_FORMER_NAMES", vec![("subsystem", name.to_string())])
        }
        Refusal::CycleRunning(id) | Refusal::CycleWaiting(id) => {
            (Code::Aborted, "CYCLE_RUNNING", vec![("cycle_id", id.to_string())])
        }
        Refusal::QueueFull(waiting) => {
            (Code::ResourceExhausted, "QUEUE_FULL", vec![("queued_cycles", waiting.to_string())])
        }
        Refusal::StoreUnavailable(id, StoreError::Fenced { by }) => return taken_over(by, id),
        Refusal::StoreUnavailable(id, _) => {
            let id = id.map(|id| ("cycle_id", id.to_string()));
            (Code::Unavailable, "STORE_UNAVAILABLE", id.into_iter().collect())
        }
        Refusal::ChangeIsLate(_) => (Code::Unavailable, "STORE_UNAVAILABLE", vec![]),
        Refusal::Unreadable(Unreadable { cycle_id, revision, .. }) => (
            Code::DataLoss,
            "RECORD_UNREADABLE",
            vec![("cycle_id", cycle_id.to_string()), ("revision", revision.to_string())],
        ),
        Refusal::Unconfirmed | Refusal::NotFollowing => return with_retry(message, "NO_LEADER", HashMap::new()),
        Refusal::CycleNotFound(id) => (Code::NotFound, "CYCLE_NOT_FOUND", vec![("cycle_id", id.to_string())]),
        Refusal::CycleFinished(id) => (Code::FailedPrecondition, "CYCLE_FINISHED", vec![("cycle_id", id.to_string())]),
        Refusal::CycleNotFinished(id) => {
            (Code::FailedPrecondition, "CYCLE_NOT_FINISHED", vec![("cycle_id", id.to_string())])
        }
        Refusal::RevisionNotRetained { oldest, newest, .. } => (
            Code::OutOfRange,
            "REVISION_NOT_RETAINED",
            vec![("oldest_revision", oldest.to_string()), ("newest_revision", newest.to_string())],
        ),
        Refusal::HistoryRewritten { after, now, .. } => (
            Code::FailedPrecondition,
            "HISTORY_REWRITTEN",
            vec![("revision", after.to_string()), ("epoch", now.to_string())],
        ),
        Refusal::CycleNotLogged(id) => {
            (Code::FailedPrecondition, "CYCLE_NOT_LOGGED", vec![("cycle_id", id.to_string())])
        }
        Refusal::NotInLog(size) => (Code::OutOfRange, "NOT_IN_LOG", vec![("size", size.to_string())]),
        Refusal::HashesRemoved(size) => (Code::OutOfRange, "HASHES_REMOVED", vec![("size", size.to_string())]),
        Refusal::EventNotFound(leaf) => (Code::NotFound, "EVENT_NOT_FOUND", vec![("leaf", leaf.to_string())]),
        Refusal::EventUnreadable(UnreadableEvent { leaf, .. }) => {
            (Code::DataLoss, "EVENT_UNREADABLE", vec![("leaf", leaf.to_string())])
        }
        Refusal::NoCheckpoint => (Code::Unavailable, "NO_CHECKPOINT", vec![]),
        Refusal::TooManyWatchers(_) => (Code::ResourceExhausted, "TOO_MANY_WATCHERS", vec![]),
        Refusal::OrderRing(ring) | Refusal::DeclaredRing { ring, .. } => {
            let names = while_it_fits(ring.names().map(Name::as_str), |name| name.len());
            (Code::InvalidArgument, "ORDER_RING", vec![("ring", names.collect::<Vec<_>>().join(","))])
        }
        Refusal::DeclaredInConfig(name) => {
            (Code::FailedPrecondition, "DECLARED_IN_CONFIG", vec![("name", name.to_string())])
        }
        Refusal::EtagMismatch { name, etag } => {
            (Code::Aborted, "ETAG_MISMATCH", vec![("subsystem", name.to_string()), ("etag", etag)])
        }
        // `Entered::refused` adds the RPC to these two.
        Refusal::NotCovered { target, .. } => (Code::PermissionDenied, "NOT_ALLOWED", vec![("target", target)]),
        Refusal::NotOwner(NotOwner { name, .. }) => {
            (Code::PermissionDenied, "NOT_ALLOWED", vec![("target", format!("subsystem {name}"))])
        }
        Refusal::RegistryFull { .. } | Refusal::RegistryMemoryFull(_) => {
            (Code::ResourceExhausted, "REGISTRY_FULL", vec![])
        }
        Refusal::NoLease(name) => (Code::FailedPrecondition, "NO_LEASE", vec![("subsystem", name.to_string())]),
        Refusal::TooManyLoops(_) => (Code::ResourceExhausted, "TOO_MANY_LOOPS", vec![]),
        Refusal::LoopNotFound(name) => (Code::NotFound, "LOOP_NOT_FOUND", vec![("loop", name.to_string())]),
        Refusal::RecordHasNoRoom(id, _) => {
            (Code::ResourceExhausted, "MEMORY_LIMIT", vec![("cycle_id", id.to_string())])
        }
        Refusal::MemoryFull(_) => (Code::ResourceExhausted, "MEMORY_LIMIT", vec![]),
        Refusal::ReadOnly => (Code::FailedPrecondition, "READ_ONLY", vec![]),
        Refusal::Draining => (Code::Unavailable, "DRAINING", vec![]),
    };
    with_reason(code, message, reason, metadata)
}

/// The status of a call that only the leader answers, by another replica.
pub(super) fn not_leader(membership: &Membership) -> Status {
    let leader = match membership.role() {
        model::Role::Follower { leader: Some(leader) } => leader,
        model::Role::Follower { leader: None } | model::Role::Leader { .. } => {
            let message = match (membership.unable(), membership.sight().borrow().problem()) {
                (Some(why), _) => format!("no replica leads now, and {} can't: {why}", membership.replica().name),
                (None, Some(why)) => format!("it is not known which replica leads: {why}"),
                (None, None) => {
                    "no replica leads now: the last leader has ended, or could not renew its lease, as while the \
                         database does not answer or its standby is away; try again"
                        .to_owned()
                }
            };
            return with_retry(message, "NO_LEADER", HashMap::new());
        }
    };
    let message = format!("this replica does not lead: ask {}", of_replica(&leader.replica));
    with_retry(message, "NOT_LEADER", metadata_of(&leader.replica))
}

/// The status of a call during which the replica of this epoch has taken over, which may have taken over what the call
/// has written, and the cycle that it names.
fn taken_over(by: Epoch, cycle_id: Option<CycleId>) -> Status {
    let message = format!(
        "epoch {by} has taken over this store, so this process does not lead any more: the call may have taken \
         effect. {REPEAT}"
    );
    let cycle_id = cycle_id.map(|id| ("cycle_id".to_owned(), id.to_string()));
    with_retry(message, "LEADER_LOST", cycle_id.into_iter().collect())
}

/// What to do after a call that may have taken effect.
const REPEAT: &str = "It can be repeated if it is idempotent, as RunCycle is with a request_id";

/// The status of a call that another replica has sent to the leader of this epoch, which this process is not.
pub(super) fn not_meant(epoch: Option<Epoch>) -> Status {
    let epoch = epoch.map_or_else(|| "that it does not say".to_owned(), |epoch| epoch.to_string());
    let message = format!(
        "a replica has sent this call to the leader with epoch {epoch}, which this process is not, so the call was not \
         made; try again. If that does not help, check cluster.advertise of the replica that leads"
    );
    with_retry(message, "NOT_LEADER", HashMap::new())
}

/// A replica, for people.
fn of_replica(Replica { name, address }: &Replica) -> String {
    address.as_ref().map_or_else(|| name.clone(), |address| format!("{name} at {address}"))
}

/// The leader, for programs.
fn metadata_of(Replica { name, address }: &Replica) -> HashMap<String, String> {
    let address = address.as_ref().map(|address| ("leader_address".to_owned(), address.to_string()));
    [("leader".to_owned(), name.clone())].into_iter().chain(address).collect()
}

/// A status of a replica that can't answer now.
fn with_retry(message: String, reason: &str, metadata: HashMap<String, String>) -> Status {
    /// A term begins within this time, once it is known that none is valid.
    const RETRY: Duration = Duration::from_secs(1);
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    details.set_retry_info(Some(RETRY));
    Status::with_error_details(Code::Unavailable, shortened(message, MAX_MESSAGE), details)
}

/// A status of the contract of subsystems, which has plain codes.
pub(super) fn plain(code: Code, message: &str) -> Status {
    Status::new(code, shortened(message, MAX_MESSAGE))
}

/// The same status for a parent, which retries UNAVAILABLE only: a full line or memory is that for now.
pub(super) fn retryable(status: Status) -> Status {
    match status.code() {
        Code::ResourceExhausted => {
            let details = bytes::Bytes::copy_from_slice(status.details());
            Status::with_details(Code::Unavailable, status.message(), details)
        }
        _ => status,
    }
}

/// The status of a request with malformed fields, each named.
fn invalid(violations: Violations) -> Status {
    let message = shortened(violations.to_string(), MAX_MESSAGE).into_owned();
    let mut details = ErrorDetails::with_error_info("INVALID_FIELDS", DOMAIN, HashMap::new());
    let shorter = violations
        .0
        .into_iter()
        .map(|Violation { field, problem }| Violation { field, problem: shortened(problem, MAX_PROBLEM).into_owned() });
    for Violation { field, problem } in while_it_fits(shorter, |it| it.field.len() + it.problem.len()) {
        details.add_bad_request_violation(field, problem);
    }
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// The first items, as many as fit into the details of a status.
fn while_it_fits<T>(items: impl Iterator<Item = T>, bytes: impl Fn(&T) -> usize) -> impl Iterator<Item = T> {
    /// Bytes of each item in addition to its text.
    const AROUND: usize = 8;
    let mut taken = 0;
    items.take_while(move |item| {
        taken += bytes(item) + AROUND;
        taken <= MAX_DETAILS
    })
}

/// The status of an answer that would be larger than clients accept, of this subsystem or of all.
pub(super) fn answer_too_large(subsystem: Option<&Name>, what_to_do: &str) -> Status {
    let message = format!("the answer would be larger than 3 MiB; {what_to_do}");
    let metadata = subsystem.map(|name| ("subsystem", name.to_string())).into_iter().collect();
    with_reason(Code::ResourceExhausted, message, "ANSWER_TOO_LARGE", metadata)
}

/// The status of a caller that is refused. Clients handle both codes differently: with UNAUTHENTICATED, another
/// credential may help; with PERMISSION_DENIED, only another grant.
pub(super) fn denied(denied: &Denied) -> Status {
    const MAX_VALUE: usize = 512;
    let message = denied.to_string();
    let (code, metadata) = match denied {
        Denied::Unauthenticated(Unauthenticated::Expired(at)) => {
            (Code::Unauthenticated, vec![("expired_at", at.to_string())])
        }
        Denied::Unauthenticated(_) => (Code::Unauthenticated, vec![]),
        Denied::NotAllowed { call, target, .. } => {
            let target = shortened(target, MAX_VALUE).into_owned();
            (Code::PermissionDenied, vec![("rpc", (*call).to_owned()), ("target", target)])
        }
        Denied::NotOwner { call, refusal, .. } => {
            let target = format!("subsystem {}", refusal.name);
            (Code::PermissionDenied, vec![("rpc", (*call).to_owned()), ("target", target)])
        }
    };
    with_reason(code, message, reason(denied), metadata)
}

/// The reason in the status of a caller that is refused.
pub(super) fn reason(denied: &Denied) -> &'static str {
    match denied {
        Denied::Unauthenticated(Unauthenticated::None) => "CREDENTIAL_MISSING",
        Denied::Unauthenticated(Unauthenticated::Expired(_)) => "CREDENTIAL_EXPIRED",
        Denied::Unauthenticated(
            Unauthenticated::Invalid
            | Unauthenticated::Malformed(_)
            | Unauthenticated::NoIdentity(_)
            | Unauthenticated::Untrusted(_)
            | Unauthenticated::Jwt(_),
        ) => "CREDENTIAL_INVALID",
        Denied::NotAllowed { .. } | Denied::NotOwner { .. } => "NOT_ALLOWED",
    }
}

/// Why a follower has no answer of the leader.
pub(super) enum NotAnswered<'a> {
    /// Nothing was sent, for this reason.
    Unreachable(&'a str),
    /// The call was sent, and its answer broke off for this reason.
    Lost(&'a str),
}

/// The status of a call to which a follower has no answer of this leader.
pub(super) fn not_answered(Leader { replica, .. }: &Leader, why: &NotAnswered<'_>) -> Status {
    let leader = of_replica(replica);
    let (reason, message) = match why {
        NotAnswered::Unreachable(why) => (
            "NO_LEADER",
            format!("the leader, {leader}, can't be reached ({why}), so the call was not made; try again"),
        ),
        NotAnswered::Lost(why) => (
            "LEADER_LOST",
            format!("the answer of the leader, {leader}, broke off ({why}): the call may have taken effect. {REPEAT}"),
        ),
    };
    with_retry(message, reason, metadata_of(replica))
}

/// True if a stream has ended with this status since its replica could not go on with it: another replica may be able
/// to.
pub(super) fn is_of_replica(status: &Status) -> bool {
    has_reason(status, &["DRAINING", "LEADER_LOST", "NOT_LEADER", "NO_LEADER"])
}

/// True if the store of this process can't be read or written now.
pub(super) fn is_of_store(status: &Status) -> bool {
    has_reason(status, &["STORE_UNAVAILABLE"])
}

fn has_reason(status: &Status, reasons: &[&str]) -> bool {
    let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    status.code() == Code::Unavailable && reasons.contains(&reason.as_str())
}

/// The status of a login for which there is no session.
pub(super) fn no_session(why: NoSession) -> Status {
    match why {
        NoSession::AllTaken => with_reason(Code::ResourceExhausted, why.to_string(), "SESSIONS_TAKEN", vec![]),
        NoSession::NoRandomness(_) => Status::internal(why.to_string()),
    }
}

/// The reason in the status of a caller that has reached one of its limits.
pub(super) const LIMIT: &str = "CALLER_LIMIT";

/// The status of a call whose caller has reached one of its limits.
pub(super) fn limit_reached(reached: &LimitReached) -> Status {
    let LimitReached { identity, load, key, max, gave_way } = reached;
    let (one, of, remedy) = match (*key, load) {
        ("limits.calls_per_second", _) => ("call", " in a second", "call less often"),
        ("limits.changes_per_second", _) => {
            ("change", " in a second, on average,", "change less often, or register many subsystems in one call")
        }
        ("limits.renewals_per_second", _) => ("renewal", " of leases in a second", "renew longer leases less often"),
        ("limits.watchers", _) => ("open watch", "", "end one of them first"),
        ("limits.history_reads", _) => ("open call", " to read the history", "wait for one of them to end"),
        (_, Load::Reflection) => ("open stream", " of reflection", "end one of them first"),
        (_, Load::Renewal) => ("open renewal", " of leases", "wait for one of them to end"),
        _ => ("open call", "", "wait for one of them to end"),
    };
    let remedy =
        if *gave_way { "the request of this call did not arrive, so it gave way to another call" } else { remedy };
    let limit = count(*max as u64, one);
    let message = format!("{identity} has reached the limit of {limit}{of} for each caller ({key}); {remedy}");
    let metadata = vec![("limit", (*key).to_owned()), ("max", max.to_string())];
    with_reason(Code::ResourceExhausted, message, LIMIT, metadata)
}

impl Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unauthenticated(why @ Unauthenticated::Expired(_)) => {
                write!(f, "{why}; replace it with a valid token or certificate")
            }
            Self::Unauthenticated(why @ (Unauthenticated::NoIdentity(_) | Unauthenticated::Untrusted(_))) => {
                write!(f, "{why}; show another certificate, or send `authorization: Bearer TOKEN` with a valid token")
            }
            Self::Unauthenticated(why) => write!(
                f,
                "{why}; send `authorization: Bearer TOKEN` with a valid token, which `orchestrator token create` \
                 makes, or show a certificate"
            ),
            Self::NotAllowed { identity, call, target, roles } => {
                let roles = roles.iter().map(|role| Role::word(*role)).collect::<Vec<_>>().join(" or ");
                if target.is_empty() {
                    write!(f, "{identity} may not call {call}; it needs a grant with the role {roles}")
                } else {
                    write!(
                        f,
                        "{identity} may not call {call} for {target}; it needs a grant with the role {roles} that \
                         covers it"
                    )
                }?;
                f.write_str(" (access.grants in the configuration of the service)")
            }
            Self::NotOwner { refusal, .. } => refusal.fmt(f),
        }
    }
}

fn with_reason(code: Code, message: String, reason: &str, metadata: Vec<(&str, String)>) -> Status {
    let metadata: HashMap<_, _> = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let message = shortened(message, MAX_MESSAGE);
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, metadata))
}
