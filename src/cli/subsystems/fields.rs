//! The flags of a registration, which `register` and `set` share.

use super::super::{
    Failure,
    output::{parse_duration, parse_positive},
    parameters::Parameters,
};
use crate::proto::orchestrator::v1 as pb;

/// The fields of a registration besides its name and its endpoint.
#[derive(Debug, clap::Args)]
pub(super) struct Fields {
    /// Subsystems in lower phases end before any in a higher phase starts [default: 0]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    phase: Option<i32>,
    /// Runs after these subsystems; does not run if one of them fails or is missing
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    requires: Vec<String>,
    /// Runs after these subsystems, even if they fail
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    after: Vec<String>,
    /// Gets the latest outputs of these subsystems, without an order
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    reads: Vec<String>,
    /// Deadline of its part in a cycle, retries included, 1ms to 24h [key: timeout] [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(super) timeout_per_cycle: Option<prost_types::Duration>,
    /// A cycle in which it fails is FAILED
    #[arg(long)]
    critical: bool,
    /// Record its output in every cycle
    #[arg(long)]
    record_output: bool,
    /// The identity of the server that must answer: cert:URI or cert:DNS-NAME for https://, uid:NUMBER for unix:
    #[arg(long, value_name = "IDENTITY")]
    tls_peer: Option<String>,
    #[command(flatten)]
    parameters: Parameters,
    #[command(flatten)]
    retry: Retry,
    #[command(flatten)]
    breaker: Breaker,
    #[command(flatten)]
    limits: Limits,
}

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_field_names, reason = "they are the names of flags")]
#[command(next_help_heading = "Retries")]
struct Retry {
    /// Most calls, including the first one, 1 to 10 [default: 3]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    retry_max_attempts: Option<u32>,
    /// Wait before the first retry, 1ms to 1h [default: 100ms]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    retry_initial_backoff: Option<prost_types::Duration>,
    /// Longest wait before a retry, up to 1h [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    retry_max_backoff: Option<prost_types::Duration>,
    /// Factor between successive waits, 1 to 100 [default: 2]
    #[arg(long, value_name = "NUMBER")]
    retry_backoff_multiplier: Option<f64>,
    /// The gRPC status codes that are retried, by name [default: UNAVAILABLE]
    #[arg(long, value_name = "CODES", value_delimiter = ',')]
    retry_retryable_status_codes: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_field_names, reason = "they are the names of flags")]
#[command(next_help_heading = "Circuit breaker")]
struct Breaker {
    /// Number of consecutive failed or timed out cycles that opens the breaker, 1 to 1000 [default: 5]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    breaker_failure_threshold: Option<u32>,
    /// How long the breaker stays open before one probe call, 1ms to 24h [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    breaker_open_for: Option<prost_types::Duration>,
    /// Disable the breaker
    #[arg(long)]
    breaker_disabled: bool,
}

#[derive(Debug, clap::Args)]
#[allow(clippy::struct_field_names, reason = "they are the names of flags")]
#[command(next_help_heading = "Limits on one answer")]
struct Limits {
    /// Bytes of the whole message, up to 64 MiB [default: 4194304]
    #[arg(long, value_name = "BYTES", value_parser = parse_positive::<u32>)]
    limits_max_message_bytes: Option<u32>,
    /// Bytes of the output, up to 64 MiB [default: 1048576]
    #[arg(long, value_name = "BYTES", value_parser = parse_positive::<u32>)]
    limits_max_output_bytes: Option<u32>,
    /// Metrics, up to 4096 [default: 64]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    limits_max_metrics: Option<u32>,
    /// Issues, up to 1024 [default: 32]
    #[arg(long, value_name = "NUMBER", value_parser = parse_positive::<u32>)]
    limits_max_issues: Option<u32>,
}

impl Fields {
    /// The paths of the fields that are given, as in a `google.protobuf.FieldMask`.
    pub(super) fn paths(&self) -> Vec<String> {
        let Self {
            phase,
            requires,
            after,
            reads,
            timeout_per_cycle,
            critical,
            record_output,
            tls_peer,
            parameters,
            retry:
                Retry {
                    retry_max_attempts,
                    retry_initial_backoff,
                    retry_max_backoff,
                    retry_backoff_multiplier,
                    retry_retryable_status_codes,
                },
            breaker: Breaker { breaker_failure_threshold, breaker_open_for, breaker_disabled },
            limits: Limits { limits_max_message_bytes, limits_max_output_bytes, limits_max_metrics, limits_max_issues },
        } = self;
        let given = [
            ("phase", phase.is_some()),
            ("requires", !requires.is_empty()),
            ("after", !after.is_empty()),
            ("reads", !reads.is_empty()),
            ("timeout", timeout_per_cycle.is_some()),
            ("critical", *critical),
            ("record_output", *record_output),
            ("tls.peer", tls_peer.is_some()),
            ("retry.max_attempts", retry_max_attempts.is_some()),
            ("retry.initial_backoff", retry_initial_backoff.is_some()),
            ("retry.max_backoff", retry_max_backoff.is_some()),
            ("retry.backoff_multiplier", retry_backoff_multiplier.is_some()),
            ("retry.retryable_status_codes", !retry_retryable_status_codes.is_empty()),
            ("breaker.failure_threshold", breaker_failure_threshold.is_some()),
            ("breaker.open_for", breaker_open_for.is_some()),
            ("breaker.disabled", *breaker_disabled),
            ("limits.max_message_bytes", limits_max_message_bytes.is_some()),
            ("limits.max_output_bytes", limits_max_output_bytes.is_some()),
            ("limits.max_metrics", limits_max_metrics.is_some()),
            ("limits.max_issues", limits_max_issues.is_some()),
        ];
        let paths = given.into_iter().filter(|(_, is_given)| *is_given).map(|(path, _)| path.to_owned());
        paths.chain(parameters.paths()).collect()
    }

    /// The registration with these fields.
    ///
    /// # Errors
    /// The parameters are invalid.
    pub(super) fn registration(self, name: String, endpoint: String) -> Result<pb::Registration, Failure> {
        let codes = self.retry.retry_retryable_status_codes.iter();
        Ok(pb::Registration {
            name,
            endpoint,
            phase: self.phase.unwrap_or_default(),
            requires: self.requires,
            after: self.after,
            reads: self.reads,
            timeout: self.timeout_per_cycle,
            retry: Some(pb::RetryPolicy {
                max_attempts: self.retry.retry_max_attempts.unwrap_or_default(),
                initial_backoff: self.retry.retry_initial_backoff,
                max_backoff: self.retry.retry_max_backoff,
                backoff_multiplier: self.retry.retry_backoff_multiplier.unwrap_or_default(),
                retryable_status_codes: codes.map(|code| code.to_uppercase()).collect(),
            }),
            breaker: Some(pb::BreakerPolicy {
                failure_threshold: self.breaker.breaker_failure_threshold.unwrap_or_default(),
                open_for: self.breaker.breaker_open_for,
                disabled: self.breaker.breaker_disabled,
            }),
            critical: self.critical,
            parameters: self.parameters.encode()?,
            limits: Some(pb::Limits {
                max_message_bytes: self.limits.limits_max_message_bytes.unwrap_or_default(),
                max_output_bytes: self.limits.limits_max_output_bytes.unwrap_or_default(),
                max_metrics: self.limits.limits_max_metrics.unwrap_or_default(),
                max_issues: self.limits.limits_max_issues.unwrap_or_default(),
            }),
            record_output: self.record_output,
            tls: self.tls_peer.map(|peer| pb::Tls { peer }),
        })
    }
}
