//! Judges callers by the policy in force: first their identity, then the rule of the call, then its targets.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use jiff::Timestamp;
use tokio::{select, sync::watch, time::sleep};
use tonic::{Code, Status, codegen::http::HeaderMap};

use super::{
    caller::{Caller, Way},
    calls::CallCounts,
    error,
    gate::named,
    rpc::Rpc,
    rules::{self, READERS, REGISTRARS, Rule},
    usage::LimitReached,
};
use crate::{
    access::{Authenticated, CallerLimits, Credential, Mode, Policy, Rights, Role, Sessions, Targets, Unauthenticated},
    clock::Clock,
    listen::{Peer, Repeated},
    model::{self, AuditTargets, Cause, Decision, Identity, Name, OwnEvent, text::clean},
    orchestrator::{NotOwner, Registered, Registrar, Sum, Sums},
    proto::orchestrator::v1 as pb,
};

/// Why a caller is refused.
#[derive(Clone, Debug)]
pub(super) enum Denied {
    /// Its identity is not known.
    Unauthenticated(Unauthenticated),
    /// It has no right to this call.
    NotAllowed {
        identity: Identity,
        call: &'static str,
        /// The first target that no grant covers; empty if no grant is for this call.
        target: String,
        /// The roles that may make the call.
        roles: &'static [Role],
    },
    /// It may make the call, but another caller owns its target.
    NotOwner { identity: Identity, call: &'static str, refusal: NotOwner },
}

impl Denied {
    /// The identity of the caller, as far as it is known.
    fn identity(&self) -> Identity {
        match self {
            Self::Unauthenticated(_) => Identity::Nobody,
            Self::NotAllowed { identity, .. } | Self::NotOwner { identity, .. } => identity.clone(),
        }
    }
}

/// The authority of a caller whose call was admitted.
#[derive(Clone, Debug)]
pub(super) enum Authority {
    /// The policy is not enforced: callers may do everything, and are not told apart.
    Anyone,
    /// The policy is enforced, and allows the call.
    Granted { identity: Identity, rights: Rights },
}

impl Authority {
    /// The caller, if callers are told apart.
    pub(super) fn identity(&self) -> Option<&Identity> {
        match self {
            Self::Anyone => None,
            Self::Granted { identity, .. } => Some(identity),
        }
    }

    /// Checks that the caller may have this registration, where a former name of another subsystem means the present
    /// one.
    ///
    /// # Errors
    /// The first part of it that no grant covers.
    pub(super) fn covers(&self, registration: &pb::Registration, renamed: &BTreeMap<Name, Name>) -> Result<(), String> {
        let Self::Granted { rights, .. } = self else { return Ok(()) };
        let registrations = vec![rules::registering(registration)];
        let targets = Targets { registrations, ..Targets::default() };
        rights.cover(REGISTRARS, &targets.by_present_names(renamed))
    }

    /// The caller as one that changes registrations.
    pub(super) fn registrar(&self) -> Registrar {
        match self {
            Self::Anyone => Registrar::Anyone,
            Self::Granted { identity, rights } if rights.are_unlimited() => Registrar::Admin(identity.clone()),
            Self::Granted { identity, .. } => Registrar::Owner(identity.clone()),
        }
    }
}

/// What a caller may see of the parameters of subsystems and loops. They are written for the subsystems, not for those
/// that look on.
impl Authority {
    pub(super) fn sees_parameters_of(&self, registered: &Registered) -> bool {
        let Registered { member, .. } = registered;
        match self {
            Self::Anyone => true,
            Self::Granted { identity, rights } => {
                member.owner.as_ref() == Some(identity) || rights.operate(member.subsystem.name.as_str())
            }
        }
    }

    pub(super) fn sees_parameters_of_loop(&self, name: &Name) -> bool {
        match self {
            Self::Anyone => true,
            Self::Granted { rights, .. } => rights.operate_loop(name.as_str()),
        }
    }
}

/// The knowledge of the service about a caller.
pub(super) struct Who {
    pub(super) mode: Mode,
    pub(super) identity: Identity,
    /// When its credential expires, if it does.
    pub(super) expires_at: Option<Timestamp>,
    pub(super) rights: Rights,
    /// Why its identity is not known.
    pub(super) problem: Option<Unauthenticated>,
}

/// A call that is admitted.
pub(super) struct Judged {
    /// The identity of the caller; `Nobody` if the policy is off.
    pub(super) identity: Identity,
    /// What it may change.
    pub(super) authority: Authority,
    /// The code with which the call would be refused if the policy was enforced.
    pub(super) would_be_denied: Option<Code>,
}

/// The policy in force. All clones share it.
#[derive(Clone)]
pub(super) struct Judge(Arc<Shared>);

struct Shared {
    policy: watch::Sender<Arc<Policy>>,
    clock: Clock,
    denied: Repeated,
    sessions: Sessions,
    /// Where calls are summed up for the audit.
    sums: Sums,
}

impl Judge {
    pub(super) fn new(policy: Policy, clock: Clock, sums: Sums) -> Self {
        let policy = watch::Sender::new(Arc::new(policy));
        let (denied, sessions) = (Repeated::default(), Sessions::default());
        Self(Arc::new(Shared { policy, clock, denied, sessions, sums }))
    }

    /// Where calls are summed up for the audit.
    pub(super) fn sums(&self) -> Sums {
        self.0.sums.clone()
    }

    /// Applies another policy. Open streams are judged by it at once, and sessions of tokens that it does not accept
    /// end.
    pub(super) fn apply(&self, policy: Policy) {
        let (policy, now) = (Arc::new(policy), self.0.clock.now());
        self.0.policy.send_replace(policy.clone());
        self.0.sessions.retain(|credential| policy.authenticate(credential, now).is_ok());
    }

    /// True if the word of another replica counts: callers are not told apart, or it is known which are replicas.
    pub(super) fn knows_replicas(&self) -> bool {
        let policy = self.0.policy.borrow();
        policy.mode() == Mode::Off || policy.has_peers()
    }

    /// False if callers are not told apart, so that sessions have no purpose.
    pub(super) fn reads_credentials(&self) -> bool {
        self.0.policy.borrow().mode() != Mode::Off
    }

    /// The same caller, in the session of this text. If that has ended, the identity of the caller is not known.
    pub(super) fn in_session(&self, caller: Caller, text: &str) -> Caller {
        caller.with_session(self.0.sessions.find(text))
    }

    /// Begins a session of the token that a caller presents, and returns its text.
    ///
    /// # Errors
    /// The token is missing or not valid, whether or not the policy is enforced; or there is no session left.
    pub(super) fn begin_session(&self, caller: &Caller) -> Result<String, Status> {
        let (policy, now) = (self.0.policy.borrow().clone(), self.0.clock.now());
        let known = policy.authenticate(&caller.credential(now), now);
        let known = known.and_then(|known| Ok((known, caller.token().ok_or(Unauthenticated::None)?)));
        let (Authenticated { identity, expires_at, .. }, token) = known.map_err(|why| {
            self.denied(
                caller,
                Rpc::Login.name(),
                &Denied::Unauthenticated(why),
                AuditTargets::default(),
                policy.mode(),
            )
        })?;
        self.0.sessions.begin(token, identity, expires_at, now).map_err(error::no_session)
    }

    /// Ends the session of this text, and its open streams.
    pub(super) fn end_session(&self, text: &str) {
        if self.0.sessions.end(text) {
            self.judge_again();
        }
    }

    /// Judges open streams again, since certificates of callers may not be trusted any more.
    pub(super) fn judge_again(&self) {
        self.0.policy.send_modify(|_| {});
    }

    /// The caller of a gRPC request with these headers on a connection of this peer. If they say that a replica has
    /// forwarded it, that one has to be a replica.
    pub(super) fn caller(&self, peer: Peer, headers: &HeaderMap) -> Caller {
        let caller = Caller::of(Way::Grpc, peer, headers);
        if !caller.was_forwarded {
            return caller;
        }
        let (policy, now) = (self.0.policy.borrow().clone(), self.0.clock.now());
        caller.forwarding(headers, |credential| policy.is_of_replica(credential, now), now)
    }

    /// The identity of a caller, before its request is read. `None` if the policy is not enforced.
    ///
    /// # Errors
    /// It is not known, and the policy is enforced.
    pub(super) fn identify(&self, caller: &Caller, call: &'static str) -> Result<Option<Identity>, Status> {
        let policy = self.0.policy.borrow().clone();
        if policy.mode() != Mode::Enforce {
            return Ok(None);
        }
        let now = self.0.clock.now();
        let authenticated = policy.authenticate(&caller.credential(now), now);
        let denied =
            |why| self.denied(caller, call, &Denied::Unauthenticated(why), AuditTargets::default(), policy.mode());
        let Authenticated { identity, .. } = authenticated.map_err(denied)?;
        caller.peer.standing.identified();
        Ok(Some(identity))
    }

    /// Checks that a caller may make a call. In the mode `dry_run`, it may make every call;
    /// calls that would be refused are logged and counted.
    ///
    /// # Errors
    /// It may not, and the policy is enforced.
    pub(super) fn check<'t>(
        &self,
        caller: &Caller,
        rpc: Rpc,
        calls: &CallCounts,
        targets: impl FnOnce() -> Targets<'t>,
    ) -> Result<Judged, Status> {
        let judged = self.judge(caller, rpc.name(), rpc.rule(), targets)?;
        if let Some(code) = judged.would_be_denied {
            calls.would_be_denied(caller.way, rpc, code);
        }
        Ok(judged)
    }

    /// Checks that a caller may use a service beside the RPCs. As [`Judge::check`], but not counted.
    ///
    /// # Errors
    /// It may not, and the policy is enforced.
    pub(super) fn check_beside(&self, caller: &Caller, name: &'static str, rule: Rule) -> Result<(), Status> {
        self.judge(caller, name, rule, Targets::default).map(drop)
    }

    /// The status of a call that was let in, but turned out to be denied for this subsystem.
    pub(super) fn denied_later(&self, caller: &Caller, call: &'static str, denied: &Denied, name: &Name) -> Status {
        self.denied(caller, call, denied, [name.as_str()].into_iter().collect(), Mode::Enforce)
    }

    /// The status of a call whose caller has reached one of its limits. It is summed up for the audit.
    pub(super) fn limit_reached(&self, caller: &Caller, call: &'static str, reached: &LimitReached) -> Status {
        let status = error::limit_reached(reached);
        self.sum_up(caller, call, reached.identity.clone(), AuditTargets::default(), &status, error::LIMIT);
        status
    }

    /// Judges a call by the policy in force.
    ///
    /// # Errors
    /// It is denied, and the policy is enforced.
    fn judge<'t>(
        &self,
        caller: &Caller,
        call: &'static str,
        rule: Rule,
        targets: impl FnOnce() -> Targets<'t>,
    ) -> Result<Judged, Status> {
        let policy = self.0.policy.borrow().clone();
        let anyone = |identity| Judged { identity, authority: Authority::Anyone, would_be_denied: None };
        if policy.mode() == Mode::Off {
            return Ok(anyone(Identity::Nobody));
        }
        let targets = targets();
        let denied = match judge(&policy, self.0.clock.now(), caller, (call, rule), &targets) {
            Ok((Authenticated { identity, .. }, rights)) if policy.mode() == Mode::Enforce => {
                let authority = Authority::Granted { identity: identity.clone(), rights };
                return Ok(Judged { authority, ..anyone(identity) });
            }
            Ok((Authenticated { identity, .. }, _)) => return Ok(anyone(identity)),
            Err(denied) => denied,
        };
        let status = self.denied(caller, call, &denied, named(&targets), policy.mode());
        if policy.mode() == Mode::Enforce {
            return Err(status);
        }
        Ok(Judged { would_be_denied: Some(status.code()), ..anyone(denied.identity()) })
    }

    /// The limits of each caller.
    pub(super) fn limits(&self) -> CallerLimits {
        *self.0.policy.borrow().limits()
    }

    /// The time by which callers are judged.
    pub(super) fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    /// The caller, as the policy in force knows it.
    pub(super) fn who(&self, caller: &Caller) -> Who {
        let policy = self.0.policy.borrow().clone();
        let mode = policy.mode();
        let nobody =
            Who { mode, identity: Identity::Nobody, expires_at: None, rights: Rights::default(), problem: None };
        if mode == Mode::Off {
            return nobody;
        }
        let now = self.0.clock.now();
        let credential = caller.credential(now);
        match policy.authenticate(&credential, now) {
            Ok(Authenticated { identity, groups, expires_at }) => {
                let expires_at = match &credential {
                    // That of the replica is no concern of its callers.
                    Credential::Forwarded { of, .. } => policy.authenticate(of, now).ok().and_then(|it| it.expires_at),
                    _ => expires_at,
                };
                Who { rights: policy.rights(&identity, &groups), identity, expires_at, ..nobody }
            }
            Err(why) => Who { problem: Some(why), ..nobody },
        }
    }

    /// Waits until the caller of an open stream over all subsystems may no longer have it, and returns why. The caller
    /// is judged again when the policy changes, when its credential expires, and each minute, since clocks can be set.
    /// `None` if that never happens, because the policy is not enforced; the mode changes only with a restart.
    pub(super) fn lapse(&self, caller: &Caller, rpc: Rpc) -> Option<BoxFuture<'static, Status>> {
        const AGAIN: Duration = Duration::from_mins(1);
        /// If a timer is ahead of the clock.
        const AT_LEAST: Duration = Duration::from_millis(10);
        let mut changes = self.0.policy.subscribe();
        if changes.borrow().mode() != Mode::Enforce {
            return None;
        }
        let (this, caller) = (self.clone(), caller.clone());
        let lapse = async move {
            loop {
                let policy = changes.borrow_and_update().clone();
                let now = this.0.clock.now();
                let expires_at = match judge(&policy, now, &caller, (rpc.name(), rpc.rule()), &Targets::ALL) {
                    Ok((Authenticated { expires_at, .. }, _)) => expires_at,
                    Err(denied) => {
                        return this.denied(&caller, rpc.name(), &denied, named(&Targets::ALL), policy.mode());
                    }
                };
                let valid_for = expires_at.and_then(|at| Duration::try_from(at.duration_since(now)).ok());
                let wait = valid_for.map_or(AGAIN, |valid_for| valid_for.clamp(AT_LEAST, AGAIN));
                select! {
                    biased;
                    // The sender is in `this`.
                    _ = changes.changed() => {}
                    () = sleep(wait) => {}
                }
            }
        };
        Some(lapse.boxed())
    }

    /// The status of a denied call, which is also logged, and summed up for the audit if the policy is enforced.
    fn denied(
        &self,
        caller: &Caller,
        call: &'static str,
        denied: &Denied,
        targets: AuditTargets,
        mode: Mode,
    ) -> Status {
        let status = error::denied(denied);
        if mode == Mode::Enforce {
            self.sum_up(caller, call, denied.identity(), targets, &status, error::reason(denied));
        }
        if let Some(times) = self.0.denied.note() {
            // Its message is bounded, even if the caller sends a longer one.
            let (peer, way, why) = (caller.peer.origin, caller.way.name(), clean(status.message()));
            if mode == Mode::Enforce {
                tracing::warn!(call, way, %peer, times, "a call was denied: {why}");
            } else {
                tracing::warn!(call, way, %peer, times, "access.mode = \"enforce\" would deny a call: {why}");
            }
        }
        status
    }

    /// Sums up a denied call for the audit.
    fn sum_up(
        &self,
        caller: &Caller,
        call: &'static str,
        identity: Identity,
        targets: AuditTargets,
        status: &Status,
        reason: &'static str,
    ) {
        let cause = Cause {
            rpc: call.into(),
            caller: Some(identity),
            peer: caller.peer.network(),
            via: caller.via(),
            decision: Decision::Denied,
            targets,
            request_digest: None,
            begun_at: Some(self.now()),
            own_event: OwnEvent::default(),
        };
        let code = model::Code::from_number(status.code() as i32);
        self.0.sums.add(Sum::Denials, &cause, Some(code), reason);
    }
}

/// The identity of a caller that may make this call, and its rights.
fn judge(
    policy: &Policy,
    now: Timestamp,
    caller: &Caller,
    (call, rule): (&'static str, Rule),
    targets: &Targets<'_>,
) -> Result<(Authenticated, Rights), Denied> {
    let known = policy.authenticate(&caller.credential(now), now).map_err(Denied::Unauthenticated)?;
    caller.peer.standing.identified();
    let rights = policy.rights(&known.identity, &known.groups);
    // Replicas have the history anyway.
    if rule == READERS && caller.is_replica() && policy.is_of_replica(&caller.credential(now), now) {
        return Ok((known, rights));
    }
    if let Rule::Roles(roles) = rule
        && let Err(target) = rights.cover(roles, targets)
    {
        return Err(Denied::NotAllowed { identity: known.identity, call, target, roles });
    }
    Ok((known, rights))
}
