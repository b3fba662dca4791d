//! The server at the other end of a connection: what it has proved, and whether it is the one that must answer.

use std::fmt;

use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{client::verify_server_name, server::ParsedCertificate};

use super::outcome;
use crate::{
    access::{Digest, NoIdentity, Revoked, identity_of, key_of},
    model::Identity,
    pem::next_expiry,
    transport::Origin,
};

/// The server at the other end of a connection, as it has proved to be.
#[derive(Debug)]
pub(super) enum Server {
    /// Nothing is proved.
    Unknown,
    /// A process of this user.
    User(u32),
    /// It has the key of a certificate, whose chain was verified.
    Certificate(Shown),
}

/// The certificate of a server.
#[derive(Debug)]
pub(super) struct Shown {
    certificate: CertificateDer<'static>,
    owner: Result<Identity, NoIdentity>,
    /// Of the public keys of all certificates that it has sent.
    keys: Vec<Digest>,
    /// Why it is not valid for the host of the endpoint.
    not_of_host: Option<String>,
    /// When the first of all certificates expires that it has sent, except those that had expired before it connected:
    /// its own was verified without them.
    expires_at: Option<Timestamp>,
}

impl Server {
    /// The server of a connection without TLS.
    pub(super) fn without_tls(origin: Origin) -> Self {
        if let Origin::User(uid) = origin { Self::User(uid) } else { Self::Unknown }
    }

    /// The server with these certificates, first its own, at the endpoint with this host, verified at this time.
    pub(super) fn with(chain: &[CertificateDer<'static>], host: &ServerName<'_>, now: Timestamp) -> Self {
        let Some(certificate) = chain.first().cloned() else { return Self::Unknown };
        Self::Certificate(Shown {
            owner: identity_of(&certificate),
            keys: chain.iter().filter_map(|it| key_of(it)).collect(),
            not_of_host: not_of(&certificate, host),
            expires_at: next_expiry(chain, now),
            certificate,
        })
    }

    /// True if a certificate has expired since it was verified.
    pub(super) fn has_expired(&self, now: Timestamp) -> bool {
        matches!(self, Self::Certificate(Shown { expires_at: Some(expiry), .. }) if *expiry < now)
    }

    /// Checks that it is the server that must answer: the expected one, or without an expectation that of the
    /// endpoint's host if it has TLS. It may not be revoked.
    ///
    /// # Errors
    /// It is another one, or revoked; the message names both.
    pub(super) fn check(&self, expected: Option<&Identity>, revoked: &Revoked) -> Result<(), String> {
        let identity = match self {
            Self::Unknown => None,
            Self::User(uid) => Some(Identity::Uid(*uid)),
            Self::Certificate(shown) => {
                if let Some(key) = shown.keys.iter().find(|key| revoked.has_key(key)) {
                    return Err(format!("access.revoked has the public key {key} of the server"));
                }
                shown.owner.clone().ok()
            }
        };
        if let Some(identity) = identity.as_ref().filter(|identity| revoked.has_identity(identity)) {
            return Err(format!("the server is {identity}, which access.revoked has"));
        }
        match (self, expected) {
            (Self::Unknown | Self::User(_), None) => Ok(()),
            (Self::Certificate(shown), None) => shown.not_of_host.clone().map_or(Ok(()), Err),
            (Self::Certificate(shown), Some(expected)) if shown.is_of(expected) => Ok(()),
            (Self::User(_), Some(_)) if identity.as_ref() == expected => Ok(()),
            (_, Some(expected)) => Err(format!("{self} answers, but {expected} must")),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("a server that can't prove its identity"),
            Self::User(uid) => write!(f, "a server of {}", Identity::Uid(*uid)),
            Self::Certificate(Shown { owner: Ok(owner), .. }) => write!(f, "a server with the certificate of {owner}"),
            Self::Certificate(Shown { owner: Err(problem), .. }) => {
                write!(f, "a server with a certificate that {problem}")
            }
        }
    }
}

impl Shown {
    /// True if it is the certificate of this identity. A DNS name may be one of several, as usual for servers.
    fn is_of(&self, identity: &Identity) -> bool {
        if self.owner.as_ref() == Ok(identity) {
            return true;
        }
        let Identity::Certificate(name) = identity else { return false };
        // A URI is no DNS name.
        ServerName::try_from(&**name).is_ok_and(|name| not_of(&self.certificate, &name).is_none())
    }
}

/// Why a certificate is not valid for this host (RFC 9525).
fn not_of(certificate: &CertificateDer<'_>, host: &ServerName<'_>) -> Option<String> {
    let checked = ParsedCertificate::try_from(certificate).and_then(|it| verify_server_name(&it, host));
    checked.err().map(|error| outcome::chain(&error))
}
