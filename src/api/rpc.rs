//! Every RPC that callers can make, and the message that asks for each. A request of no RPC can't enter by the gate.

use prost::Message;

use super::rules::Concerns;
use crate::{
    model::CycleRequest,
    proto::{bounds::MAX_FIELDS, orchestrator::v1 as pb},
};

/// A message that callers ask with.
pub(super) trait Asks: Concerns + Message + Default {
    /// Its RPC.
    const RPC: Rpc;
}

macro_rules! rpcs {
    ($($rpc:ident: $module:ident::$request:ident,)+) => {
        /// The calls that a caller can make, by their names in the contract.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Rpc { $($rpc,)+ }

        impl Rpc {
            pub(super) const ALL: &[Self] = &[$(Self::$rpc),+];

            pub(super) fn name(self) -> &'static str {
                match self { $(Self::$rpc => stringify!($rpc),)+ }
            }

            /// The method of this name in the contract.
            pub(super) fn of_name(name: &str) -> Option<Self> {
                match name {
                    $(stringify!($rpc) => Some(Self::$rpc),)+
                    _ => None,
                }
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
    // Not in the contract: requests at the admin address, of monitoring and of browsers.
    Metrics: self::Scrape,
    Login: self::LogIn,
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

    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::proto;

    #[test]
    fn every_method_of_the_contract_has_its_entry_and_its_request() {
        let files = FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap().file;
        let ours = files.iter().filter(|file| file.package() == "dreamnet.orchestrator.v1");
        let methods = ours.flat_map(|file| &file.service).flat_map(|service| &service.method);
        let methods: BTreeSet<_> = methods.map(|method| (method.name(), method.input_type().to_owned())).collect();
        let of_contract = Rpc::ALL.iter().filter(|rpc| !matches!(rpc, Rpc::Metrics | Rpc::Login));
        let entries = of_contract.map(|rpc| (rpc.name(), format!(".dreamnet.orchestrator.v1.{}", rpc.request())));
        assert_eq!(entries.collect::<BTreeSet<_>>(), methods);
    }
}
