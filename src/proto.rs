//! The generated contract, as the core uses it: fields of type `google.protobuf.Struct` and `CycleTelemetry` are
//! carried as received bytes (see `build.rs`). [`DESCRIPTORS`] describes the contract as it is written.

#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated; the proto files are the reference")]

use std::sync::OnceLock;

pub mod bounds;
pub mod codec;
pub mod framing;
pub mod gzip;
#[cfg(feature = "service")]
pub mod json;
#[cfg(feature = "service")]
pub mod schema;
pub mod timeout;

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

/// The value of a protobuf duration; `None` if it is negative or malformed. The conversion of `prost-types` overflows
/// for the lowest number of seconds.
pub fn read_duration(duration: prost_types::Duration) -> Option<std::time::Duration> {
    const NANOS: u32 = 1_000_000_000;
    let nanos = u32::try_from(duration.nanos).ok().filter(|nanos| *nanos < NANOS)?;
    Some(std::time::Duration::new(u64::try_from(duration.seconds).ok()?, nanos))
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

/// The value of a protobuf timestamp; `None` if it is malformed or outside of the range of the library.
pub fn read_timestamp(time: prost_types::Timestamp) -> Option<jiff::Timestamp> {
    // Before 1970, protobuf counts nanoseconds forward, too.
    let nanos = Some(time.nanos).filter(|nanos| *nanos >= 0)?;
    jiff::Timestamp::new(time.seconds, nanos).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_of_any_value_is_read_or_refused() {
        let read = |seconds, nanos| read_duration(prost_types::Duration { seconds, nanos });
        assert_eq!(read(1, 999_999_999), Some(std::time::Duration::new(1, 999_999_999)));
        for (seconds, nanos) in [(i64::MIN, 0), (i64::MIN, i32::MIN), (0, -1), (-1, 0), (1, -1), (0, 1_000_000_000)] {
            assert_eq!(read(seconds, nanos), None, "{seconds} s {nanos} ns");
        }
    }

    #[test]
    fn times_before_1970_count_forward() {
        let time = timestamp("1969-12-31T23:59:59.75Z".parse().unwrap());
        assert_eq!((time.seconds, time.nanos), (-1, 750_000_000));
    }
}
