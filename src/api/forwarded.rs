//! The caller of a call that one replica forwards to another, in a header of the forwarded request.
//!
//! Tokens and JWTs go on as they came, in `authorization`. Of everything else that proves an identity, the header says
//! what the caller has shown to the replica: certificates, which are verified again, the user of its process, or the
//! token of its session. It counts only on a connection of a replica in `cluster.peers`.

use std::net::IpAddr;

use bytes::Bytes;
use prost::Message;
use tonic::{
    codegen::http::{HeaderMap, HeaderValue},
    metadata::{BinaryMetadataValue, MetadataMap},
};

use crate::{access::Bearer, transport::Origin};

/// The name of the header. It also marks the call: a call is forwarded once.
pub(super) const HEADER: &str = "orchestrator-caller-bin";

/// The caller, as the replica knows it.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Forwarded {
    /// The name of the replica.
    #[prost(string, tag = "1")]
    pub(super) replica: String,
    /// The IP address of the other side of its connection, of 4 or 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    address: Bytes,
    /// The user of its process.
    #[prost(uint32, optional, tag = "3")]
    user: Option<u32>,
    /// The certificates that it has shown, in DER, if they identify it.
    #[prost(bytes = "bytes", repeated, tag = "4")]
    pub(super) certificates: Vec<Bytes>,
    /// The static token that identifies it, without its secret, if it is not in `authorization`.
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) token: Bytes,
}

impl Forwarded {
    /// Most bytes of the header, so that it fits into the headers of a request together with others of the caller:
    /// three times as many as certificates usually have.
    const MAX_BYTES: usize = 8 << 10;

    /// A caller from here.
    pub(super) fn from(replica: String, origin: Origin) -> Self {
        let (address, user) = match origin {
            Origin::Unknown => (Bytes::new(), None),
            Origin::Address(IpAddr::V4(address)) => (Bytes::copy_from_slice(&address.octets()), None),
            Origin::Address(IpAddr::V6(address)) => (Bytes::copy_from_slice(&address.octets()), None),
            Origin::User(uid) => (Bytes::new(), Some(uid)),
        };
        Self { replica, address, user, ..Self::default() }
    }

    /// The same caller, which these certificates identify, in DER.
    pub(super) fn with_certificates(self, certificates: Vec<Bytes>) -> Self {
        Self { certificates, ..self }
    }

    /// The same caller, which this token identifies.
    pub(super) fn with_token(self, bearer: &Bearer) -> Self {
        Self { token: bearer.to_bytes().into(), ..self }
    }

    /// The other side of its connection.
    pub(super) fn origin(&self) -> Origin {
        let v4 = || <[u8; 4]>::try_from(&self.address[..]).ok().map(IpAddr::from);
        let v6 = || <[u8; 16]>::try_from(&self.address[..]).ok().map(IpAddr::from);
        let address = || v4().or_else(v6).map(Origin::Address);
        self.user.map(Origin::User).or_else(address).unwrap_or_default()
    }

    /// The value of the header. `None` if it would be too large.
    pub(super) fn to_header(&self) -> Option<HeaderValue> {
        if self.encoded_len() > Self::MAX_BYTES {
            return None;
        }
        let mut metadata = MetadataMap::new();
        metadata.insert_bin(HEADER, BinaryMetadataValue::from_bytes(&self.encode_to_vec()));
        metadata.into_headers().remove(HEADER)
    }

    /// The caller in these headers. `None` if they have none, or if it can't be read.
    pub(super) fn find(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(HEADER).iter();
        let (value, other) = (values.next()?, values.next());
        if other.is_some() {
            return None;
        }
        let metadata = MetadataMap::from_headers([(HEADER.parse().ok()?, value.clone())].into_iter().collect());
        Self::decode(metadata.get_bin(HEADER)?.to_bytes().ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_is_the_same_after_the_header() {
        let origins = [
            Origin::Unknown,
            Origin::User(0),
            Origin::Address([10, 0, 0, 1].into()),
            Origin::Address([1u16, 2, 3, 4, 5, 6, 7, 8].into()),
        ];
        for origin in origins {
            let certificates = vec![Bytes::from(vec![7; 3000]), Bytes::from_static(b"x")];
            let token = Bytes::from_static(b"token");
            let caller = Forwarded { certificates, token, ..Forwarded::from("core-2".into(), origin) };
            let header = caller.to_header().unwrap();
            let headers = [(HEADER.parse().unwrap(), header.clone())].into_iter().collect();
            let found = Forwarded::find(&headers).unwrap();
            assert_eq!((found.origin(), &found), (origin, &caller));
            // Which one counts would depend on the order.
            let mut twice = headers;
            twice.append(HEADER, header);
            assert_eq!(Forwarded::find(&twice), None);
        }
        let large = Forwarded { token: vec![0; 9 << 10].into(), ..Forwarded::default() };
        assert_eq!(large.to_header(), None);
        let bad = [(HEADER.parse().unwrap(), HeaderValue::from_static("!"))].into_iter().collect();
        assert_eq!(Forwarded::find(&bad), None);
        assert_eq!(Forwarded::find(&HeaderMap::new()), None);
    }
}
