//! The generated contract, as the core uses it: fields of type `google.protobuf.Struct` and `CycleTelemetry` are
//! carried as received bytes (see `build.rs`). [`DESCRIPTORS`] describes the contract as it is written.

#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated; the proto files are the reference")]

use std::sync::OnceLock;

pub mod bounds;
pub mod codec;
pub mod framing;
#[cfg(feature = "service")]
pub mod json;

/// The contract of subsystems.
pub mod subsystem {
    /// `dreamnet.subsystem.v1`
    pub mod v1 {
        tonic::include_proto!("dreamnet.subsystem.v1");
    }
}

/// The contract of the orchestrator.
pub mod orchestrator {
    /// `dreamnet.orchestrator.v1`
    pub mod v1 {
        tonic::include_proto!("dreamnet.orchestrator.v1");
    }
}

/// An encoded `google.protobuf.FileDescriptorSet` of both packages, with imports and source info.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// [`DESCRIPTORS`], parsed.
fn descriptors() -> Option<&'static prost_reflect::DescriptorPool> {
    static POOL: OnceLock<Option<prost_reflect::DescriptorPool>> = OnceLock::new();
    POOL.get_or_init(|| prost_reflect::DescriptorPool::decode(DESCRIPTORS).ok()).as_ref()
}

/// A protobuf duration; `None` if it is out of range.
pub fn duration(duration: std::time::Duration) -> Option<prost_types::Duration> {
    let duration = jiff::SignedDuration::try_from(duration).ok()?;
    Some(prost_types::Duration { seconds: duration.as_secs(), nanos: duration.subsec_nanos() })
}

/// A protobuf timestamp.
pub fn timestamp(time: jiff::Timestamp) -> prost_types::Timestamp {
    // Before 1970, protobuf counts nanoseconds forward, jiff backward.
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
