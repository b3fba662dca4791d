//! The generated contract, as the core reads it: `google.protobuf.Struct` and `CycleTelemetry` fields are carried as
//! the bytes that came (see `build.rs`). [`DESCRIPTORS`] describes the contract as it is written.

#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated; the proto files are the reference")]

/// What subsystems implement.
pub mod subsystem {
    /// `dreamnet.subsystem.v1`
    pub mod v1 {
        tonic::include_proto!("dreamnet.subsystem.v1");
    }
}

/// What the orchestrator serves.
pub mod orchestrator {
    /// `dreamnet.orchestrator.v1`
    pub mod v1 {
        tonic::include_proto!("dreamnet.orchestrator.v1");
    }
}

/// An encoded `google.protobuf.FileDescriptorSet` of both packages, with imports and source info.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
