//! The generated contract, as the core reads it: `google.protobuf.Struct` and `CycleTelemetry` fields are carried as
//! the bytes that came (see `build.rs`). [`DESCRIPTORS`] describes the contract as it is written.

#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated; the proto files are the reference")]

use std::sync::OnceLock;

pub mod bounds;
pub mod codec;
pub mod framing;
#[cfg(feature = "service")]
pub mod json;

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

/// [`DESCRIPTORS`], read.
fn descriptors() -> Option<&'static prost_reflect::DescriptorPool> {
    static POOL: OnceLock<Option<prost_reflect::DescriptorPool>> = OnceLock::new();
    POOL.get_or_init(|| prost_reflect::DescriptorPool::decode(DESCRIPTORS).ok()).as_ref()
}

/// A duration as protobuf has it; `None` beyond its range.
pub fn duration(duration: std::time::Duration) -> Option<prost_types::Duration> {
    let duration = jiff::SignedDuration::try_from(duration).ok()?;
    Some(prost_types::Duration { seconds: duration.as_secs(), nanos: duration.subsec_nanos() })
}

/// A time as protobuf has it.
pub fn timestamp(time: jiff::Timestamp) -> prost_types::Timestamp {
    // Protobuf counts the nanoseconds forward also before 1970, jiff away from it.
    let nanos = time.as_nanosecond();
    let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
    #[allow(
        clippy::cast_possible_truncation,
        reason = "a time of the calendar has few seconds, a remainder few digits"
    )]
    prost_types::Timestamp { seconds: seconds as i64, nanos: nanos as i32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_count_forward() {
        let time = timestamp("1969-12-31T23:59:59.75Z".parse().unwrap());
        assert_eq!((time.seconds, time.nanos), (-1, 750_000_000));
    }
}
