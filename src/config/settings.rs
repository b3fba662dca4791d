//! The list of all settings. Other lists of settings are generated from it.

use std::time::Duration;

use super::{
    AuditReads, ClientAuth, DAY, GIB, HOUR, KIB, LogFormat, MIB, MS,
    OfReplicas::{Common, Own},
    OnReload::{Applies, NeedsRestart},
    Setting, TlsVersion, admin_address, advertised, allowed, audit_retention, collector, directory, expected,
    jwt::claim,
    key_files, listen_address, log_filter, mode, orchestrator_id, origin, path, peers, retention, revoked, socket_path,
};
use crate::{access::Mode, store::StoreUrl};

const SECOND: Duration = Duration::from_secs(1);

/// Makes [`SETTINGS`]. A line has the field, which is also the key; the effect of a reload; whether replicas should
/// have it in common; and the method of the reader, with its limits. A setting that is not written keeps its default.
macro_rules! settings {
    ($(
        $first:ident $(. $rest:ident)*: $on_reload:ident, $of_replicas:ident,
        $read:ident($($allowed:expr)?)$(.map($wrap:path))?;
    )+) => {
        #[allow(clippy::float_cmp, reason = "an unchanged number is bitwise equal")]
        pub(super) const SETTINGS: &[Setting] = &[$({
            const KEY: &str = concat!(stringify!($first) $(, ".", stringify!($rest))*);
            Setting {
                key: KEY,
                on_reload: $on_reload,
                of_replicas: $of_replicas,
                read: |reader, config| {
                    if let Some(value) = reader.$read(KEY $(, $allowed)?)$(.map($wrap))? {
                        config.$first$(.$rest)* = value;
                    }
                },
                differs: |one, other| one.$first$(.$rest)* != other.$first$(.$rest)*,
                text: |config| format!("{:?}", config.$first$(.$rest)*),
                copy: |from, to| to.$first$(.$rest)*.clone_from(&from.$first$(.$rest)*),
            }
        }),+];
    };
}

settings! {
    orchestrator_id: NeedsRestart, Own, parsed(orchestrator_id);
    server.listen: NeedsRestart, Own, parsed(listen_address);
    server.listen_unix: NeedsRestart, Own, parsed(socket_path).map(Some);
    server.unix_mode: NeedsRestart, Own, parsed(mode);
    server.insecure_listen_beyond_loopback: NeedsRestart, Own, flag();
    server.max_connections: NeedsRestart, Own, number(1..=1_000_000).map(Some);
    server.max_concurrent_streams: NeedsRestart, Common, number(1..=100_000);
    server.max_streams: NeedsRestart, Own, number(1..=1_000_000).map(Some);
    server.max_request_bytes: NeedsRestart, Common, number(64 * KIB..=64 * MIB);
    server.max_receiving_bytes: NeedsRestart, Own, number(MIB..=64 * GIB).map(Some);
    server.max_watchers: Applies, Own, number(0..=100_000);
    server.drain_grace: Applies, Own, duration(Duration::ZERO..=HOUR);
    server.tls.cert_file: NeedsRestart, Own, parsed(path).map(Some);
    server.tls.key_file: NeedsRestart, Own, parsed(path).map(Some);
    server.tls.client_ca_file: NeedsRestart, Own, parsed(path).map(Some);
    server.tls.client_auth: NeedsRestart, Own, choice(ClientAuth::WORDS).map(Some);
    server.tls.min_version: NeedsRestart, Own, choice(TlsVersion::WORDS).map(Some);
    admin.listen: NeedsRestart, Own, parsed(admin_address);
    admin.tls.cert_file: NeedsRestart, Own, parsed(path).map(Some);
    admin.tls.key_file: NeedsRestart, Own, parsed(path).map(Some);
    admin.tls.client_ca_file: NeedsRestart, Own, parsed(path).map(Some);
    admin.tls.client_auth: NeedsRestart, Own, choice(ClientAuth::WORDS).map(Some);
    admin.tls.min_version: NeedsRestart, Own, choice(TlsVersion::WORDS).map(Some);
    access.mode: NeedsRestart, Common, choice(Mode::WORDS);
    access.tokens_file: Applies, Own, parsed(path).map(Some);
    access.jwt.issuer: Applies, Common, parsed(claim).map(Some);
    access.jwt.audience: Applies, Common, parsed(claim).map(Some);
    access.jwt.jwks_file: Applies, Own, parsed(path).map(Some);
    access.jwt.name_claim: Applies, Common, parsed(claim);
    access.jwt.groups_claim: Applies, Common, parsed(claim);
    access.jwt.max_lifetime: Applies, Common, duration(SECOND..=366 * DAY).map(Some);
    access.revoked: Applies, Common, group(revoked);
    limits.calls_per_second: Applies, Common, number(1..=1_000_000).map(Some);
    limits.changes_per_second: Applies, Common, number(1..=1_000_000);
    limits.renewals_per_second: Applies, Common, number(1..=1_000_000);
    limits.concurrent_calls: Applies, Common, number(1..=100_000);
    limits.watchers: Applies, Common, number(0..=100_000);
    limits.history_reads: Applies, Common, number(1..=100_000);
    memory.max_bytes: NeedsRestart, Own, number(64 * MIB..=1024 * GIB).map(Some);
    store.url: NeedsRestart, Own, parsed(StoreUrl::parse);
    store.retention: Applies, Common, group(retention);
    cluster.replica: NeedsRestart, Own, parsed(orchestrator_id).map(Some);
    cluster.advertise: NeedsRestart, Own, parsed(advertised).map(Some);
    cluster.lease_ttl: NeedsRestart, Common, duration(SECOND..=300 * SECOND);
    cluster.peers: Applies, Common, group(peers);
    audit.reads: Applies, Common, choice(AuditReads::WORDS);
    audit.retention: Applies, Common, group(audit_retention);
    ledger.key_files: NeedsRestart, Own, group(key_files);
    ledger.origin: NeedsRestart, Common, parsed(origin).map(Some);
    cycle.deadline: Applies, Common, duration(MS..=DAY);
    cycle.max_concurrent_calls: Applies, Common, number(1..=100_000);
    cycle.max_queued: Applies, Common, number(0..=10_000);
    cycle.max_record_bytes: Applies, Common, number(64 * KIB..=64 * MIB);
    cycle.max_outputs_bytes: Applies, Common, number(MIB..=64 * GIB).map(Some);
    registry.max_subsystems: Applies, Common, number(1..=1_000_000);
    registry.max_loops: Applies, Common, number(1..=10_000);
    registry.expected: Applies, Common, group(expected);
    dial.ca_file: NeedsRestart, Own, parsed(path).map(Some);
    dial.cert_file: NeedsRestart, Own, parsed(path).map(Some);
    dial.key_file: NeedsRestart, Own, parsed(path).map(Some);
    dial.allow: NeedsRestart, Common, group(allowed);
    dial.allow_http: NeedsRestart, Common, flag();
    dial.unix_dir: NeedsRestart, Own, parsed(directory).map(Some);
    dial.connect_timeout: NeedsRestart, Common, duration(MS..=HOUR);
    log.filter: Applies, Own, parsed(log_filter);
    log.format: NeedsRestart, Own, choice(LogFormat::WORDS);
    tracing.otlp_endpoint: NeedsRestart, Own, parsed(collector).map(Some);
    tracing.sample_ratio: Applies, Own, ratio();
}
