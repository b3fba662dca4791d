//! The other side of a connection: where it comes from, and the certificates that it has shown.

use std::{fmt::Debug, net::IpAddr, sync::Arc};

use bytes::Bytes;
use jiff::Timestamp;

use super::standing::Standing;
use crate::transport::Origin;

/// The other side of a connection. Travels with each request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    /// Where it comes from.
    pub(crate) origin: Origin,
    /// Its certificates, if it has shown any.
    pub(crate) certificates: Option<Arc<dyn Certificates>>,
    /// Whether it is known, which those that authenticate it record.
    pub(crate) standing: Standing,
}

impl Peer {
    /// The user of its process, if the system says it.
    pub(crate) fn user(&self) -> Option<u32> {
        if let Origin::User(uid) = self.origin { Some(uid) } else { None }
    }

    /// The other side of a connection to another replica, which this peer is: it had this origin, and has shown these
    /// certificates, in DER. They are verified as those of this peer are.
    pub(crate) fn of_replica(&self, origin: Origin, shown: Vec<Bytes>) -> Self {
        let certificates = self.certificates.as_ref().filter(|_| !shown.is_empty());
        Self { origin, certificates: certificates.map(|own| own.of_another(shown)), standing: self.standing.clone() }
    }

    /// What counts as one peer, as text: an IPv4 address, the 64-bit prefix of an IPv6 address, or a user.
    pub(crate) fn network(&self) -> String {
        match self.origin.network() {
            Some(prefix @ IpAddr::V6(_)) => format!("{prefix}/64"),
            Some(address @ IpAddr::V4(_)) => address.to_string(),
            None => self.origin.to_string(),
        }
    }
}

/// The certificates that a peer has shown. They were verified at the beginning of its connection.
pub(crate) trait Certificates: Debug + Send + Sync {
    /// In DER: first its own, whose key it has, then those that it sent to verify it.
    fn chain(&self) -> &[Bytes];

    /// Verifies them against the authorities that are trusted now: a connection outlives certificates, and the trust
    /// in authorities. Returns when the first of them expires.
    ///
    /// # Errors
    /// They are not trusted any more.
    fn verify(&self, now: Timestamp) -> Result<Timestamp, Untrusted>;

    /// Those of another peer, in DER, which were not verified yet.
    fn of_another(&self, chain: Vec<Bytes>) -> Arc<dyn Certificates>;
}

/// Why certificates are not trusted any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Untrusted {
    /// One of them has expired at this time.
    Expired(Timestamp),
    /// The reason, as the library words it.
    Other(String),
}
