//! The listening side of all servers: limited connections, TLS, and for gRPC explicit limits, streams that can be ended
//! individually, and reflection.

mod answering;
mod connection;
mod connections;
mod peer;
mod receiving;
mod repeated;
mod rooms;
mod server;
mod services;
mod standing;
mod streams;
#[cfg(feature = "tls")]
mod tls;

use std::time::Duration;

use tonic::codegen::http::HeaderMap;
use tonic_reflection::server::{Builder, Error};

#[cfg(feature = "tls")]
pub(crate) use self::tls::{Clients, Loaded, Material, Protocol, Tls};
pub(crate) use self::{
    connection::{Broken, Connection, Secure},
    connections::{Beside, Busy, Connections, Entrance, serve_each},
    peer::{Peer, Untrusted},
    repeated::Repeated,
    server::{Limits, Server},
    services::Services,
};
use crate::proto;

/// Reflection, v1 and v1alpha, of these services and of the health service.
///
/// # Errors
/// The descriptors of the contract can't be read.
pub(crate) fn reflection(services: &[&str]) -> Result<Services, Error> {
    let descriptions = || {
        let builder = Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that clients can decode the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        services.iter().fold(builder, |builder, service| builder.with_service_name(*service))
    };
    Ok(Services::default().and(descriptions().build_v1()?).and(descriptions().build_v1alpha()?))
}

/// Parses a `grpc-timeout`: at most eight digits and a unit.
///
/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>
pub(crate) fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u32 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    let unit = match unit {
        "H" => Duration::from_hours(1),
        "M" => Duration::from_mins(1),
        "S" => Duration::from_secs(1),
        "m" => Duration::from_millis(1),
        "u" => Duration::from_micros(1),
        "n" => Duration::from_nanos(1),
        _ => return None,
    };
    Some(unit * count)
}
