//! Every RPC that callers can make, and the message that asks for each. A request of no RPC can't enter by the gate.

use prost::Message;

use super::{rules::Concerns, served};
use crate::{
    model::CycleRequest,
    proto::{bounds::MAX_FIELDS, orchestrator::v1 as pb},
};

/// The path of the service that subsystems implement.
const SUBSYSTEM: &str = "/dreamnet.subsystem.v1.Subsystem";

/// A message that callers ask with.
pub(super) trait Asks: Concerns + Message + Default {
    /// Its RPC.
    const RPC: Rpc;
}

macro_rules! rpcs {
    (@name $rpc:ident) => { stringify!($rpc) };
    (@name $rpc:ident $name:literal) => { $name };
    ($($rpc:ident $(as $name:literal)?: $module:ident::$request:ident,)+) => {
        /// The calls that a caller can make, by their names in the contract. Those of parents are `Subsystem.METHOD`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Rpc { $($rpc,)+ }

        impl Rpc {
            pub(super) const ALL: &[Self] = &[$(Self::$rpc),+];

            pub(super) fn name(self) -> &'static str {
                match self { $(Self::$rpc => rpcs!(@name $rpc $($name)?),)+ }
            }

            /// The RPC of this name.
            pub(super) fn of_name(name: &str) -> Option<Self> {
                match name {
                    $(rpcs!(@name $rpc $($name)?) => Some(Self::$rpc),)+
                    _ => None,
                }
            }

            /// The RPC of a gRPC call with this path, `/SERVICE/METHOD`.
            pub(super) fn of_path(path: &str) -> Option<Self> {
                let (service, method) = path.rsplit_once('/')?;
                match service {
                    SUBSYSTEM => Self::of_name(&format!("Subsystem.{method}")),
                    _ => Self::of_name(method),
                }
            }

            /// The path of its calls over gRPC, `/SERVICE/METHOD`. `None` if it is not in the contract.
            pub(super) fn path(self) -> Option<String> {
                let name = self.name();
                Some(format!("{}/{}", self.service()?, name.strip_prefix("Subsystem.").unwrap_or(name)))
            }

            /// Most names in a request. The contract limits each list, and the fields of all registrations in one call.
            pub(super) fn max_names(self) -> usize {
                match self {
                    Self::RegisterSubsystems => MAX_FIELDS,
                    _ => CycleRequest::MAX_SUBSET,
                }
            }

            #[cfg(test)]
            fn request(self) -> &'static str {
                match self { $(Self::$rpc => stringify!($request),)+ }
            }
        }

        $(impl Asks for $module::$request {
            const RPC: Rpc = Rpc::$rpc;
        })+
    };
}

rpcs! {
    RunCycle: pb::RunCycleRequest,
    CancelCycle: pb::CancelCycleRequest,
    GetStatus: pb::GetStatusRequest,
    WatchCycles: pb::WatchCyclesRequest,
    GetCycle: pb::GetCycleRequest,
    ListCycles: pb::ListCyclesRequest,
    PruneCycles: pb::PruneCyclesRequest,
    PlanCycle: pb::PlanCycleRequest,
    RegisterSubsystem: pb::RegisterSubsystemRequest,
    UpdateSubsystem: pb::UpdateSubsystemRequest,
    RenameSubsystem: pb::RenameSubsystemRequest,
    RegisterSubsystems: pb::RegisterSubsystemsRequest,
    UnregisterSubsystem: pb::UnregisterSubsystemRequest,
    GetSubsystem: pb::GetSubsystemRequest,
    ListSubsystems: pb::ListSubsystemsRequest,
    RenewLease: pb::RenewLeaseRequest,
    SuspendSubsystem: pb::SuspendSubsystemRequest,
    ResumeSubsystem: pb::ResumeSubsystemRequest,
    StartIntervalLoop: pb::StartIntervalLoopRequest,
    StopIntervalLoop: pb::StopIntervalLoopRequest,
    PauseIntervalLoops: pb::PauseIntervalLoopsRequest,
    ResumeIntervalLoops: pb::ResumeIntervalLoopsRequest,
    ListIntervalLoops: pb::ListIntervalLoopsRequest,
    WhoAmI: pb::WhoAmIRequest,
    GetCheckpoint: pb::GetCheckpointRequest,
    GetInclusionProof: pb::GetInclusionProofRequest,
    GetConsistencyProof: pb::GetConsistencyProofRequest,
    ReadEntries: pb::ReadEntriesRequest,
    ListAuditEvents: pb::ListAuditEventsRequest,
    // An orchestrator as a subsystem of others.
    Initialize as "Subsystem.Initialize": served::Initialize,
    RunForParent as "Subsystem.RunCycle": served::RunCycle,
    StatusForParent as "Subsystem.GetStatus": served::GetStatus,
    // Not in the contract: requests at the admin address, of monitoring and of browsers.
    Metrics: self::Scrape,
    Login: self::LogIn,
}

impl Rpc {
    /// The path of its service. `None` if it is not in the contract.
    fn service(self) -> Option<&'static str> {
        Some(match self {
            Self::Metrics | Self::Login => return None,
            Self::Initialize | Self::RunForParent | Self::StatusForParent => SUBSYSTEM,
            Self::WhoAmI => "/dreamnet.orchestrator.v1.Access",
            Self::GetCheckpoint
            | Self::GetInclusionProof
            | Self::GetConsistencyProof
            | Self::ReadEntries
            | Self::ListAuditEvents => "/dreamnet.orchestrator.v1.Ledger",
            _ => "/dreamnet.orchestrator.v1.Orchestrator",
        })
    }

    /// True if its answer is a stream.
    pub(super) fn streams(self) -> bool {
        matches!(self, Self::WatchCycles | Self::ReadEntries)
    }

    /// True if a follower answers its calls itself (see `follower`). Calls of the others go to the leader as they come.
    pub(super) fn is_answered_by_followers(self) -> bool {
        matches!(self, Self::GetCycle | Self::ListCycles | Self::WatchCycles | Self::GetStatus)
    }
}

/// Asks for the metrics.
#[derive(Clone, PartialEq, Message)]
pub struct Scrape {}

/// Asks for a session of the token that its caller presents.
#[derive(Clone, PartialEq, Message)]
pub struct LogIn {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost_types::{FileDescriptorSet, MethodDescriptorProto};

    use super::*;
    use crate::proto;

    #[test]
    fn every_method_of_the_contract_has_its_entry_and_its_request() {
        let files = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file;
        let ours = files.iter().filter(|file| file.package() == "dreamnet.orchestrator.v1");
        let methods = ours.flat_map(|file| &file.service).flat_map(|service| &service.method);
        let methods: BTreeSet<_> = methods.map(|method| (method.name(), method.input_type().to_owned())).collect();
        let is_ours = |rpc: &&Rpc| !matches!(rpc, Rpc::Metrics | Rpc::Login) && !rpc.name().contains('.');
        let of_contract = Rpc::ALL.iter().filter(is_ours);
        let entries = of_contract.map(|rpc| (rpc.name(), format!(".dreamnet.orchestrator.v1.{}", rpc.request())));
        assert_eq!(entries.collect::<BTreeSet<_>>(), methods);
    }

    #[test]
    fn every_rpc_has_the_path_and_the_kind_of_its_method() {
        let files = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file;
        let mut methods = BTreeSet::new();
        for file in files.iter().filter(|file| file.package().starts_with("dreamnet.")) {
            for service in &file.service {
                let path = |method: &MethodDescriptorProto| {
                    format!("/{}.{}/{}", file.package(), service.name(), method.name())
                };
                methods.extend(service.method.iter().map(|method| (path(method), method.server_streaming())));
            }
        }
        let paths = Rpc::ALL.iter().filter_map(|rpc| Some((rpc.path()?, rpc.streams())));
        assert_eq!(paths.collect::<BTreeSet<_>>(), methods);
    }

    #[test]
    fn every_method_of_a_subsystem_has_its_entry_under_the_name_of_the_service() {
        let files = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file;
        let services = files.iter().flat_map(|file| &file.service).filter(|service| service.name() == "Subsystem");
        let methods: Vec<_> = services.flat_map(|service| &service.method).map(MethodDescriptorProto::name).collect();
        for method in &methods {
            let rpc = Rpc::of_path(&format!("{SUBSYSTEM}/{method}")).unwrap();
            assert_eq!(rpc.name(), format!("Subsystem.{method}"));
        }
        assert_eq!(Rpc::ALL.iter().filter(|rpc| rpc.name().contains('.')).count(), methods.len());
        assert_eq!(Rpc::of_path("/dreamnet.orchestrator.v1.Orchestrator/RunCycle"), Some(Rpc::RunCycle));
    }
}
