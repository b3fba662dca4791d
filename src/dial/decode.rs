//! Decodes answers of `dreamnet.subsystem.v1` with the limits of the registration: an answer over a limit is refused as
//! soon as the limit is exceeded, before any further data is built.

use bytes::Bytes;

use super::outcome::{broken, too_large};
use crate::{
    model::{Answer, Field, Fields, Issue, Limits, Malformed, Payload, Severity, Wire},
    ports::CallError,
};

/// Memory of an issue or a metric, without its strings.
const ITEM: usize = 128;

/// Reads a `RunCycleResponse`.
///
/// # Errors
/// It is malformed: INTERNAL; or it is over a limit: RESOURCE_EXHAUSTED.
pub(super) fn answer(message: &[u8], limits: &Limits) -> Result<Answer, CallError> {
    let mut answer = Answer::default();
    let mut output = Embedded::new("output", limits);
    let mut fields = Fields(message);
    while let Some(field) = fields.next().map_err(unreadable)? {
        match field {
            Field { number: 1, wire: Wire::Bytes(bytes) } => output.add(bytes)?,
            Field { number: 2, wire: Wire::Bytes(entry) } => {
                let (name, value) = metric(entry)?;
                answer.metrics.insert(name, value);
                within("metrics", answer.metrics.len(), limits.max_metrics as usize)?;
            }
            Field { number: 3, wire: Wire::Bytes(bytes) } => {
                within("issues", answer.issues.len() + 1, limits.max_issues as usize)?;
                answer.issues.push(issue(bytes)?);
            }
            Field { number: 1..=3, .. } => return Err(unreadable(Malformed("has a field of another type".into()))),
            _unknown_field => {}
        }
    }
    answer.output = output.check()?;
    Ok(answer)
}

/// Reads a `GetStatusResponse`, whose status is bounded like an output.
///
/// # Errors
/// As [`answer`].
pub(super) fn status(message: &[u8], limits: &Limits) -> Result<Payload, CallError> {
    let mut status = Embedded::new("status", limits);
    let mut fields = Fields(message);
    while let Some(field) = fields.next().map_err(unreadable)? {
        match field {
            Field { number: 1, wire: Wire::Bytes(bytes) } => status.add(bytes)?,
            Field { number: 1, .. } => return Err(unreadable(Malformed("has a field of another type".into()))),
            _unknown_field => {}
        }
    }
    status.check()
}

/// The memory of an answer in bytes.
pub(super) fn size(answer: &Answer) -> usize {
    let issues = answer.issues.iter().map(|issue| issue.code.capacity() + issue.message.capacity() + ITEM);
    let metrics = answer.metrics.keys().map(|name| name.capacity() + ITEM);
    answer.output.len() + issues.sum::<usize>() + metrics.sum::<usize>()
}

/// A copy of a `Struct` in an answer, so that it does not keep the whole message in memory.
struct Embedded {
    field: &'static str,
    max: usize,
    bytes: Vec<u8>,
}

impl Embedded {
    fn new(field: &'static str, limits: &Limits) -> Self {
        Self { field, max: limits.max_output_bytes as usize, bytes: Vec::new() }
    }

    /// Protobuf merges repeated occurrences of a message field, which is the same as decoding their concatenation.
    fn add(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        let len = self.bytes.len() + bytes.len();
        if len > self.max {
            let (field, max) = (self.field, self.max);
            return Err(too_large(format!(
                "its answer is over its limits: bytes of {field}: {len}, allowed are {max}"
            )));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn check(self) -> Result<Payload, CallError> {
        let Self { field, bytes, .. } = self;
        Payload::check(Bytes::from(bytes)).map_err(|malformed| broken(format!("its {field} {malformed}")))
    }
}

fn metric(entry: &[u8]) -> Result<(String, f64), CallError> {
    let (mut name, mut value) = (String::new(), 0.0);
    let mut fields = Fields(entry);
    while let Some(field) = fields.next().map_err(unreadable)? {
        match field {
            Field { number: 1, wire: Wire::Bytes(bytes) } => {
                name = text("bytes in the name of a metric", bytes, Limits::MAX_WORD)?;
            }
            Field { number: 2, wire: Wire::Fixed64(bits) } => value = f64::from_bits(bits),
            Field { number: 1..=2, .. } => return Err(unreadable(Malformed("has a metric of another type".into()))),
            _unknown_field => {}
        }
    }
    Ok((name, value))
}

fn issue(bytes: &[u8]) -> Result<Issue, CallError> {
    let mut issue = Issue { severity: Severity::Warning, code: String::new(), message: String::new() };
    let mut fields = Fields(bytes);
    while let Some(field) = fields.next().map_err(unreadable)? {
        match field {
            Field { number: 1, wire: Wire::Varint(severity) } => {
                issue.severity = match severity {
                    1 => Severity::Info,
                    3 => Severity::Error,
                    // Not set, or from a later version.
                    _ => Severity::Warning,
                };
            }
            Field { number: 2, wire: Wire::Bytes(code) } => {
                issue.code = text("bytes in the code of an issue", code, Limits::MAX_WORD)?;
            }
            Field { number: 3, wire: Wire::Bytes(message) } => {
                issue.message = text("bytes in the message of an issue", message, Limits::MAX_ISSUE_MESSAGE)?;
            }
            Field { number: 1..=3, .. } => return Err(unreadable(Malformed("has an issue of another type".into()))),
            _unknown_field => {}
        }
    }
    Ok(issue)
}

fn text(what: &str, bytes: &[u8], max: usize) -> Result<String, CallError> {
    within(what, bytes.len(), max)?;
    let text =
        std::str::from_utf8(bytes).map_err(|_| unreadable(Malformed("contains a string that is not UTF-8".into())))?;
    Ok(text.to_owned())
}

fn within(what: &str, found: usize, allowed: usize) -> Result<(), CallError> {
    if found <= allowed {
        return Ok(());
    }
    Err(too_large(format!("its answer is over its limits: {what}: {found} or more, allowed are {allowed}")))
}

fn unreadable(Malformed(problem): Malformed) -> CallError {
    broken(format!("its answer {problem}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::{model::Code, proto::subsystem::v1 as pb};

    const LIMITS: Limits = Limits { max_message_bytes: 4 << 20, max_output_bytes: 1000, max_metrics: 4, max_issues: 4 };

    #[test]
    fn reading_stops_at_the_limit() {
        // Issues of two bytes each, and beyond the limit bytes that are not a message.
        let issues = [&b"\x1a\x00".repeat(5)[..], b"\xff"].concat();
        assert_eq!(answer(&issues, &LIMITS).unwrap_err().code, Code::ResourceExhausted);
        // Metrics count by name.
        let same = b"\x12\x03\x0a\x01a".repeat(100);
        assert_eq!(answer(&same, &LIMITS).unwrap().metrics.len(), 1);
        let others: Vec<_> = (b'a'..b'f').flat_map(|name| [0x12, 3, 0x0a, 1, name]).collect();
        assert_eq!(answer(&others, &LIMITS).unwrap_err().code, Code::ResourceExhausted);
        // The sizes of repeated outputs add up.
        let outputs = b"\x0a\x02\x10\x01".repeat(501);
        assert_eq!(answer(&outputs, &LIMITS).unwrap_err().code, Code::ResourceExhausted);
    }

    proptest! {
        /// Messages that prost encodes are decoded as by prost.
        #[test]
        fn reads_what_prost_writes(
            metrics in proptest::collection::btree_map(".{1,9}", any::<f64>().prop_filter("", |it| !it.is_nan()), 0..4),
            issues in proptest::collection::vec((0..5_i32, ".{0,9}", ".{0,9}"), 0..4),
        ) {
            let sent = pb::RunCycleResponse {
                output: Payload::from_json(&[("k".to_owned(), 1.into())].into_iter().collect()).unwrap().as_bytes().clone(),
                metrics,
                issues: issues.into_iter().map(|(severity, code, message)| pb::Issue { severity, code, message }).collect(),
            };
            let read = answer(&sent.encode_to_vec(), &LIMITS).unwrap();
            prop_assert_eq!(read.output.as_bytes(), &sent.output);
            prop_assert_eq!(&read.metrics, &sent.metrics);
            for (read, sent) in read.issues.iter().zip(&sent.issues) {
                prop_assert_eq!((&read.code, &read.message), (&sent.code, &sent.message));
                let severity = match sent.severity() {
                    pb::Severity::Info => Severity::Info,
                    pb::Severity::Unspecified | pb::Severity::Warning => Severity::Warning,
                    pb::Severity::Error => Severity::Error,
                };
                prop_assert_eq!(read.severity, severity);
            }
            prop_assert_eq!(read.issues.len(), sent.issues.len());
        }

        /// Arbitrary bytes are refused, or decoded as by prost.
        #[test]
        fn agrees_with_prost(bytes in proptest::collection::vec(0_u8..40, 0..24)) {
            if answer(&bytes, &LIMITS).is_ok() {
                prop_assert!(pb::RunCycleResponse::decode(&bytes[..]).is_ok());
            }
        }
    }
}
