//! The access rules: which roles may call each RPC, and which targets each request has. The table in
//! `docs/security.md` is for users, and `tests/outside/access.rs` calls every method in every role.

use crate::{
    access::{Registering, Role, Targets},
    model::{Limits, Name, Served, Subsystem},
    proto::{self, bounds::MAX_REGISTRATIONS, orchestrator::v1 as pb},
};

use super::{
    rpc::{LogIn, Rpc, Scrape},
    served::OfParent,
};

/// The callers that may make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Every caller whose identity is known.
    Authenticated,
    /// Callers with a grant of one of these roles that covers the targets of the request.
    Roles(&'static [Role]),
}

/// The roles that may read the activity of all subsystems.
pub(super) const READERS: Rule = Rule::Roles(&[Role::Viewer, Role::Operator, Role::Auditor, Role::Admin]);
/// The roles that may run cycles.
const OPERATORS: Rule = Rule::Roles(&[Role::Operator, Role::Admin]);
/// The roles that may change the registry.
pub(super) const REGISTRARS: &[Role] = &[Role::Registrar, Role::Admin];

/// The rule of reflection and of the OpenAPI document, which describe the contract.
pub(super) const REFLECTION: Rule = Rule::Authenticated;
/// The rule of the files of the dashboard, which are useless to callers that may not read.
pub(super) const DASHBOARD: Rule = READERS;

impl Rpc {
    /// True if a former name of a subsystem means the present one in its requests, beside the name of a registration
    /// itself. Other calls by a former name are refused, and their callers told the present one.
    pub(super) fn takes_former_names(self) -> bool {
        matches!(
            self,
            Self::RegisterSubsystem
                | Self::RegisterSubsystems
                | Self::StartIntervalLoop
                | Self::PlanCycle
                | Self::Initialize
                | Self::RunForParent
        )
    }

    /// True if this call runs or changes something, or may do so.
    pub(super) fn changes(self) -> bool {
        match self {
            Self::RunCycle
            | Self::RunForParent
            | Self::CancelCycle
            | Self::PruneCycles
            | Self::RegisterSubsystem
            | Self::RegisterSubsystems
            | Self::UpdateSubsystem
            | Self::RenameSubsystem
            | Self::UnregisterSubsystem
            | Self::RenewLease
            | Self::SuspendSubsystem
            | Self::ResumeSubsystem
            | Self::StartIntervalLoop
            | Self::StopIntervalLoop
            | Self::PauseIntervalLoops
            | Self::ResumeIntervalLoops => true,
            Self::GetStatus
            | Self::WatchCycles
            | Self::GetCycle
            | Self::ListCycles
            | Self::PlanCycle
            | Self::GetSubsystem
            | Self::ListSubsystems
            | Self::ListIntervalLoops
            | Self::WhoAmI
            | Self::GetCheckpoint
            | Self::GetInclusionProof
            | Self::GetConsistencyProof
            | Self::ReadEntries
            | Self::ListAuditEvents
            // It changes only what this process knows of its parents.
            | Self::Initialize
            | Self::StatusForParent
            | Self::Metrics
            | Self::Login => false,
        }
    }

    /// The callers that may make this call.
    pub(super) fn rule(self) -> Rule {
        match self {
            Self::WhoAmI | Self::GetCheckpoint | Self::GetConsistencyProof => Rule::Authenticated,
            Self::Metrics => Rule::Roles(&[Role::Monitor, Role::Admin]),
            Self::GetStatus => Rule::Roles(&[Role::Monitor, Role::Viewer, Role::Operator, Role::Auditor, Role::Admin]),
            Self::GetSubsystem => {
                Rule::Roles(&[Role::Viewer, Role::Operator, Role::Registrar, Role::Auditor, Role::Admin])
            }
            // A session is for the dashboard.
            Self::Login => DASHBOARD,
            Self::WatchCycles
            | Self::GetCycle
            | Self::GetInclusionProof
            | Self::ListCycles
            | Self::PlanCycle
            | Self::ListSubsystems
            | Self::ListIntervalLoops
            | Self::StatusForParent => READERS,
            Self::ListAuditEvents | Self::ReadEntries => Rule::Roles(&[Role::Auditor, Role::Admin]),
            // A parent needs the same right as another caller that runs a cycle of the same subsystems.
            Self::RunCycle
            | Self::Initialize
            | Self::RunForParent
            | Self::CancelCycle
            | Self::SuspendSubsystem
            | Self::ResumeSubsystem
            | Self::StartIntervalLoop
            | Self::StopIntervalLoop
            | Self::PauseIntervalLoops
            | Self::ResumeIntervalLoops => OPERATORS,
            Self::RegisterSubsystem
            | Self::UpdateSubsystem
            | Self::RenameSubsystem
            | Self::RegisterSubsystems
            | Self::UnregisterSubsystem
            | Self::RenewLease => Rule::Roles(REGISTRARS),
            // It is final.
            Self::PruneCycles => Rule::Roles(&[Role::Admin]),
        }
    }
}

/// A request with targets.
pub(super) trait Concerns {
    /// Its targets, as it names them: names may be malformed, and are then refused later.
    fn targets(&self) -> Targets<'_>;
}

/// A request over these subsystems; an empty list means all.
fn subset(names: &[String]) -> Targets<'_> {
    match names {
        [] => Targets::ALL,
        names => Targets { subsystems: names.iter().map(String::as_str).collect(), ..Targets::default() },
    }
}

fn subsystem(name: &str) -> Targets<'_> {
    Targets { subsystems: vec![name], ..Targets::default() }
}

fn loops(name: &str, all: bool) -> Targets<'_> {
    Targets { r#loop: (!all).then_some(name), all_loops: all, ..Targets::default() }
}

/// A registration, as far as a grant limits it.
pub(super) fn registering(registration: &pb::Registration) -> Registering<'_> {
    let limits = registration.limits.unwrap_or_default();
    let or_default = |limit, default| if limit == 0 { default } else { limit };
    let Limits { max_message_bytes, max_output_bytes, max_metrics, max_issues } = Limits::DEFAULT;
    let timeout = registration.timeout.and_then(proto::read_duration);
    let inputs = [&registration.requires, &registration.after, &registration.reads];
    Registering {
        name: &registration.name,
        endpoint: &registration.endpoint,
        phase: registration.phase,
        inputs: inputs.into_iter().flatten().map(String::as_str).collect(),
        timeout: timeout.unwrap_or(Subsystem::DEFAULT_TIMEOUT),
        critical: registration.critical,
        record_output: registration.record_output,
        limits: Limits {
            max_message_bytes: or_default(limits.max_message_bytes, max_message_bytes),
            max_output_bytes: or_default(limits.max_output_bytes, max_output_bytes),
            max_metrics: or_default(limits.max_metrics, max_metrics),
            max_issues: or_default(limits.max_issues, max_issues),
        },
        peer: registration.tls.as_ref().map_or("", |tls| &tls.peer),
    }
}

impl Concerns for pb::RunCycleRequest {
    fn targets(&self) -> Targets<'_> {
        subset(&self.subsystems)
    }
}

/// The subsystems that the configuration serves under the name that a parent calls. A call by another name concerns
/// nothing.
impl<Q> Concerns for OfParent<Q> {
    fn targets(&self) -> Targets<'_> {
        match self.served.as_deref() {
            None => Targets::default(),
            Some(Served { subset: None, .. }) => Targets::ALL,
            Some(Served { subset: Some(names), .. }) => {
                Targets { subsystems: names.iter().map(Name::as_str).collect(), ..Targets::default() }
            }
        }
    }
}

/// The subsystems of a cycle are not known from its id.
impl Concerns for pb::CancelCycleRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

/// Without the last record and the subsystems, there are only counts, ids and loops.
impl Concerns for pb::GetStatusRequest {
    fn targets(&self) -> Targets<'_> {
        if self.omit_last_cycle && !self.include_subsystems && !self.include_snapshots {
            return Targets::default();
        }
        Targets { details: self.include_snapshots, ..Targets::ALL }
    }
}

/// Records are whole, also with a filter.
impl Concerns for pb::WatchCyclesRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

impl Concerns for pb::GetCycleRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

impl Concerns for pb::ListCyclesRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

impl Concerns for pb::PruneCyclesRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

impl Concerns for pb::PlanCycleRequest {
    fn targets(&self) -> Targets<'_> {
        subset(&self.subsystems)
    }
}

impl Concerns for pb::RegisterSubsystemRequest {
    fn targets(&self) -> Targets<'_> {
        Targets { registrations: self.registration.iter().map(registering).collect(), ..Targets::default() }
    }
}

/// The registration that results is only known at its turn, and then judged by [`Authority::covers`].
///
/// [`Authority::covers`]: super::judge::Authority::covers
impl Concerns for pb::UpdateSubsystemRequest {
    fn targets(&self) -> Targets<'_> {
        subsystem(self.registration.as_ref().map_or("", |registration| &registration.name))
    }
}

/// A subsystem of the new name has to be covered as well. Its whole registration is judged at its turn, as above.
impl Concerns for pb::RenameSubsystemRequest {
    fn targets(&self) -> Targets<'_> {
        Targets { subsystems: vec![&self.name, &self.new_name], ..Targets::default() }
    }
}

impl Concerns for pb::RegisterSubsystemsRequest {
    fn targets(&self) -> Targets<'_> {
        let registrations = self.registrations.iter().take(MAX_REGISTRATIONS).map(registering).collect();
        Targets { registrations, ..Targets::default() }
    }
}

impl Concerns for pb::UnregisterSubsystemRequest {
    fn targets(&self) -> Targets<'_> {
        subsystem(&self.name)
    }
}

impl Concerns for pb::GetSubsystemRequest {
    fn targets(&self) -> Targets<'_> {
        Targets { details: self.include_output || self.include_snapshot, ..subsystem(&self.name) }
    }
}

impl Concerns for pb::ListSubsystemsRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

impl Concerns for pb::RenewLeaseRequest {
    fn targets(&self) -> Targets<'_> {
        subsystem(&self.name)
    }
}

impl Concerns for pb::SuspendSubsystemRequest {
    fn targets(&self) -> Targets<'_> {
        subsystem(&self.name)
    }
}

impl Concerns for pb::ResumeSubsystemRequest {
    fn targets(&self) -> Targets<'_> {
        subsystem(&self.name)
    }
}

/// A declared loop is restarted by its name alone, and its subsystems are then not known here: so these are all.
impl Concerns for pb::StartIntervalLoopRequest {
    fn targets(&self) -> Targets<'_> {
        let Some(settings) = &self.r#loop else { return Targets::ALL };
        Targets { r#loop: Some(&settings.name), ..subset(&settings.subsystems) }
    }
}

impl Concerns for pb::StopIntervalLoopRequest {
    fn targets(&self) -> Targets<'_> {
        Targets { r#loop: Some(&self.name), ..Targets::default() }
    }
}

impl Concerns for pb::PauseIntervalLoopsRequest {
    fn targets(&self) -> Targets<'_> {
        loops(&self.name, self.all)
    }
}

impl Concerns for pb::ResumeIntervalLoopsRequest {
    fn targets(&self) -> Targets<'_> {
        loops(&self.name, self.all)
    }
}

impl Concerns for pb::ListIntervalLoopsRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

/// It concerns only its caller.
impl Concerns for pb::WhoAmIRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::default()
    }
}

/// A checkpoint and its proofs contain hashes only.
impl Concerns for pb::GetCheckpointRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::default()
    }
}

/// The proof contains the record or the event.
impl Concerns for pb::GetInclusionProofRequest {
    fn targets(&self) -> Targets<'_> {
        Targets { audit: self.event_leaf.is_some(), ..Targets::ALL }
    }
}

impl Concerns for pb::GetConsistencyProofRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::default()
    }
}

impl Concerns for LogIn {
    fn targets(&self) -> Targets<'_> {
        Targets::default()
    }
}

/// Records are whole, and so are events.
impl Concerns for pb::ReadEntriesRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

/// Events name subsystems.
impl Concerns for pb::ListAuditEventsRequest {
    fn targets(&self) -> Targets<'_> {
        Targets::ALL
    }
}

impl Concerns for Scrape {
    fn targets(&self) -> Targets<'_> {
        Targets::default()
    }
}
