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
