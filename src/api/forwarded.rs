//! What one replica says of a call that it makes to another, in a header of the request: whose call it forwards, or
//! that it is a call of its own. The answer says how far the history of the leader goes.
//!
//! Tokens and JWTs go on as they came, in `authorization`. Of everything else that proves an identity, the header says
//! what the caller has shown to the replica: certificates, which are verified again, the user of its process, or the
//! token of its session. It counts only on a connection of a replica in `cluster.peers`.
//!
//! A second header says for which term the call is meant: at the address of a leader, another process may answer.

use std::net::IpAddr;

use bytes::Bytes;
use prost::Message;
use tonic::{
    codegen::http::{HeaderMap, HeaderValue},
    metadata::{BinaryMetadataValue, MetadataMap},
};

use crate::{
    access::Bearer,
    model::{CommonSettings, Epoch, Revision},
    orchestrator::Position,
    transport::Origin,
};

/// The name of the header. It also marks the call: a call is forwarded once.
pub(super) const HEADER: &str = "orchestrator-caller-bin";

/// The name of the header with the epoch of the leader, as the replica knows it.
pub(super) const EPOCH: &str = "orchestrator-leader-epoch";

/// The name of the header by which the answer to such a call says up to which record the leader has acknowledged the
/// history: its revision and its epoch, or 0 if that is not known.
const ACKNOWLEDGED: &str = "orchestrator-acknowledged";

/// The name of the header of such an answer with the settings that replicas should have in common, as the leader has
/// them.
const SETTINGS: &str = "orchestrator-settings";

/// What the answer to such a call says of the leader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// The newest acknowledged record.
    pub(super) acknowledged: Option<Position>,
    /// Its settings.
    pub(super) settings: Option<CommonSettings>,
}

impl Said {
    /// Puts it into the headers of an answer.
    pub(super) fn put(self, headers: &mut HeaderMap) {
        let acknowledged = self.acknowledged.map(|Position { revision, epoch }| {
            let epoch = epoch.unwrap_or_default();
            format!("{revision} {epoch}")
        });
        let (acknowledged, settings) = (acknowledged.as_deref(), self.settings.as_ref().map(CommonSettings::as_str));
        for (name, text) in [(ACKNOWLEDGED, acknowledged), (SETTINGS, settings)] {
            if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
                headers.insert(name, value);
            }
        }
    }

    /// Takes it from the headers of an answer.
    pub(super) fn take(headers: &mut HeaderMap) -> Self {
        let mut text = |name| headers.remove(name)?.to_str().map(str::to_owned).ok();
        let acknowledged = text(ACKNOWLEDGED).and_then(|text| {
            let (revision, epoch) = text.split_once(' ')?;
            let (revision, epoch) = (Revision(revision.parse().ok()?), Epoch(epoch.parse().ok()?));
            Some(Position { revision, epoch: Some(epoch).filter(|epoch| *epoch != Epoch::default()) })
        });
        Self { acknowledged, settings: text(SETTINGS).map(|text| CommonSettings::parse(&text)) }
    }
}

/// The epoch for which a call with these headers is meant. `None` if they don't say it.
pub(super) fn meant_for(headers: &HeaderMap) -> Option<Epoch> {
    headers.get(EPOCH)?.to_str().ok()?.parse().ok().map(Epoch)
}

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
    /// True for a call of the replica itself.
    #[prost(bool, tag = "6")]
    pub(super) is_own: bool,
    /// Audit events of calls that the replica has answered or denied itself. A call of its own with some of them is
    /// nothing but this report.
    #[prost(bytes = "bytes", repeated, tag = "7")]
    pub(super) events: Vec<Bytes>,
}

impl Forwarded {
    /// Most bytes of the header, so that it fits into the headers of a request together with others of the caller:
    /// three times as many as certificates usually have.
    pub(super) const MAX_BYTES: usize = 8 << 10;

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

    /// The replica of this name itself.
    pub(super) fn own(replica: String) -> Self {
        Self { replica, is_own: true, ..Self::default() }
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
    fn an_answer_says_how_far_the_history_is_acknowledged_and_which_settings_the_leader_has() {
        let known = Position { revision: Revision(7), epoch: Some(Epoch(3)) };
        for position in [Position::default(), Position { epoch: None, ..known }, known] {
            let settings = CommonSettings::of("1.0.0", [("loops", 1), ("subsystems", 2)]);
            let said = Said { acknowledged: Some(position), settings: Some(settings) };
            let mut headers = HeaderMap::new();
            said.clone().put(&mut headers);
            assert_eq!(Said::take(&mut headers), said);
            assert!(headers.is_empty(), "callers don't get it");
        }
        for bad in ["", "7", "7 x", "-1 3"] {
            let headers = [ACKNOWLEDGED, SETTINGS].map(|name| (name.parse().unwrap(), bad.parse().unwrap()));
            let said = Said::take(&mut headers.into_iter().collect());
            assert_eq!(said.acknowledged, None, "{bad}");
        }
    }

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
