//! The caller of a request: where the call came in, and what it presents.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::time::Instant;
use tonic::{
    Request,
    codegen::http::{HeaderMap, HeaderValue, header::AUTHORIZATION},
};

use super::{
    forwarded::{self, Forwarded},
    request,
};
use crate::{
    access::{Bearer, Credential, Jwt, Presented, Session, SessionToken},
    listen::{Peer, Untrusted},
    model::SpanContext,
    transport::Origin,
};

/// The entrance of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The gRPC service.
    Grpc,
    /// The admin address.
    Admin,
}

impl Way {
    pub(super) const ALL: [Self; 2] = [Self::Grpc, Self::Admin];

    /// As metrics and the log call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Admin => "admin",
        }
    }
}

/// The caller, as far as known. Passed in the extensions of a request to the gate.
#[derive(Clone, Debug)]
pub struct Caller {
    pub(super) way: Way,
    /// The other side of its connection, which may be a proxy.
    pub(super) peer: Peer,
    /// When the headers of its request arrived.
    pub(super) arrived: Instant,
    /// The span in which it asks.
    pub(super) trace: Option<SpanContext>,
    /// What its request presents to prove its identity.
    presented: Credential,
    /// The same, as its request says it, for the leader.
    authorization: Option<HeaderValue>,
    /// The session that its request names, if it names one: it may have ended.
    session: Option<Weak<Session>>,
    /// True if its request says that a replica has forwarded it, which may not be true.
    pub(super) was_forwarded: bool,
    /// The replica that has forwarded its request. All of the above is then what this replica has said.
    via: Option<Arc<Via>>,
    /// What another replica says of a call of its own; it is a replica then.
    pub(super) own: Option<Arc<Own>>,
}

/// A call of another replica itself.
#[derive(Debug)]
pub(super) struct Own {
    /// The name of the replica.
    pub(super) replica: String,
    /// The encoded audit events that it reports.
    pub(super) events: Vec<Bytes>,
}

/// A replica that forwards calls.
#[derive(Debug)]
struct Via {
    connection: Peer,
    name: Arc<str>,
}

impl Caller {
    /// The caller of a request with these headers.
    pub(crate) fn of(way: Way, peer: Peer, headers: &HeaderMap) -> Self {
        let (trace, presented) = (request::trace(headers), credential(headers));
        let was_forwarded = headers.contains_key(forwarded::HEADER);
        let (arrived, session, via) = (Instant::now(), None, None);
        let mut authorization = headers.get(AUTHORIZATION).cloned();
        if let Some(authorization) = &mut authorization {
            authorization.set_sensitive(true);
        }
        let own = None;
        Self { way, peer, arrived, trace, presented, authorization, session, was_forwarded, via, own }
    }

    /// The caller of a request with these headers of replicas, which this caller has sent. If this one is a replica
    /// (`is_replica` says so of its credential), that is the one that it names, or itself. Otherwise it is one whose
    /// identity is not known.
    pub(super) fn forwarding(
        self,
        headers: &HeaderMap,
        is_replica: impl FnOnce(&Credential) -> bool,
        now: Timestamp,
    ) -> Self {
        let forwarded = Forwarded::find(headers).filter(|_| is_replica(&of_connection(&self.peer, now)));
        let Some(forwarded) = forwarded else {
            // A token proves what it does, whoever sends it. A certificate may be that of a replica, not of its caller.
            let presented = match self.presented {
                Credential::None => Credential::NOT_OF_REPLICA,
                presented => presented,
            };
            return Self { presented, ..self };
        };
        let origin = forwarded.origin();
        let Forwarded { replica, certificates, token, is_own, events, .. } = forwarded;
        // It may stay, whatever becomes of its callers.
        self.peer.standing.identified();
        if is_own {
            return Self { own: Some(Arc::new(Own { replica, events })), ..self };
        }
        let peer = self.peer.of_replica(origin, certificates);
        let presented = match (self.presented, Bearer::from_bytes(&token)) {
            (Credential::None, Some(bearer)) => Credential::Bearer(bearer),
            (presented, _) => presented,
        };
        let via = Some(Arc::new(Via { connection: self.peer, name: replica.into() }));
        Self { peer, presented, via, ..self }
    }

    /// This caller, as this replica describes it to another one, and what goes into the header `authorization` beside
    /// that, if that is not there already.
    pub(super) fn described(&self, replica: &str) -> (Forwarded, Option<HeaderValue>) {
        let from_here = Forwarded::from(replica.to_owned(), self.peer.origin);
        match (&self.presented, &self.session) {
            (Credential::None, None) => {
                let shown = self.peer.certificates.as_ref().map(|shown| shown.chain().to_vec());
                (from_here.with_certificates(shown.unwrap_or_default()), None)
            }
            (Credential::None, Some(session)) => match session.upgrade().as_deref().map(Session::token) {
                Some(SessionToken::Static(bearer)) => (from_here.with_token(bearer), None),
                Some(SessionToken::Jwt(jwt)) => {
                    (from_here, HeaderValue::try_from(format!("Bearer {}", jwt.as_str())).ok())
                }
                // It identifies nobody any more, and least of all the user of a process.
                None => (Forwarded::from(replica.to_owned(), Origin::Unknown), None),
            },
            _ if self.authorization.is_some() => (from_here, self.authorization.clone()),
            _ => (Forwarded::from(replica.to_owned(), Origin::Unknown), None),
        }
    }

    /// True if it is another replica itself.
    pub(super) fn is_replica(&self) -> bool {
        self.own.is_some()
    }

    /// The name of the replica that has forwarded its request.
    pub(super) fn via(&self) -> Option<Arc<str>> {
        self.via.as_ref().map(|via| via.name.clone())
    }

    /// The same caller, in this session.
    pub(super) fn with_session(self, session: Weak<Session>) -> Self {
        Self { session: Some(session), ..self }
    }

    /// The same caller, with nothing but this token, which may be empty, to prove its identity.
    pub(super) fn with_token(self, token: &str) -> Self {
        let presented = if token.is_empty() { Credential::None } else { parse(token) };
        let peer = Peer { certificates: None, ..self.peer };
        Self { peer, presented, authorization: None, session: None, ..self }
    }

    /// The token that it presents, if that is what it presents.
    pub(super) fn token(&self) -> Option<SessionToken> {
        match &self.presented {
            Credential::Bearer(bearer) => Some(SessionToken::Static(*bearer)),
            Credential::Jwt(jwt) => Some(SessionToken::Jwt(jwt.clone())),
            _ => None,
        }
    }

    /// What it presents to prove its identity: a token, or else a session, or else the certificate of its connection,
    /// or else the user of its process.
    pub(super) fn credential(&self, now: Timestamp) -> Credential {
        if let (Credential::None, Some(session)) = (&self.presented, &self.session) {
            let ended = Credential::Malformed("is of a session that has ended: log in again");
            return session.upgrade().map_or(ended, |session| session.credential());
        }
        let own = match &self.presented {
            Credential::None => of_connection(&self.peer, now),
            presented => presented.clone(),
        };
        let Some(Via { connection, name }) = self.via.as_deref() else { return own };
        let of = match own {
            Credential::User(uid) => Credential::UserAt(uid, name.clone()),
            own => own,
        };
        Credential::Forwarded { by: Box::new(of_connection(connection, now)), of: Box::new(of) }
    }

    /// A request of this caller.
    pub fn asks<Q>(self, request: Q) -> Request<Q> {
        let mut request = Request::new(request);
        request.extensions_mut().insert(self);
        request
    }
}

/// What the connection of a peer proves: its certificate, or else the user of its process.
fn of_connection(peer: &Peer, now: Timestamp) -> Credential {
    match (&peer.certificates, peer.user()) {
        (Some(shown), _) => match shown.verify(now) {
            Ok(expires_at) => Credential::Certificate(Presented { chain: shown.chain().to_vec(), expires_at }),
            Err(Untrusted::Expired(at)) => Credential::Expired(at),
            Err(Untrusted::Other(why)) => Credential::Untrusted(why),
        },
        (None, Some(uid)) => Credential::User(uid),
        (None, None) => Credential::None,
    }
}

/// The credential in the headers of a request. One that is there and bad never counts as none.
fn credential(headers: &HeaderMap) -> Credential {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (value, other) = (values.next(), values.next());
    let Some(value) = value else { return Credential::None };
    if other.is_some() {
        return Credential::Malformed("is not the only header `authorization`");
    }
    let token = value.to_str().ok().and_then(|text| text.split_once(' '));
    let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
    match token {
        None => Credential::Malformed("is not of the form `authorization: Bearer TOKEN`"),
        Some(token) => parse(token),
    }
}

/// The credential with the text of a token or a JWT.
fn parse(token: &str) -> Credential {
    match (Bearer::parse(token), Jwt::parse(token)) {
        (Some(bearer), _) => Credential::Bearer(bearer),
        (None, Some(jwt)) => Credential::Jwt(jwt),
        (None, None) => Credential::Malformed("is not a token, which has the form orc_ID_SECRET, nor a JWT"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{access::Sessions, model::Identity};

    #[test]
    fn a_replica_describes_its_callers_and_another_one_knows_them() {
        let now = Timestamp::UNIX_EPOCH;
        let text = format!("orc_{}_{}", "0".repeat(16), "0".repeat(64));
        let bearer = Bearer::parse(&text).unwrap();
        let of = |origin, way| {
            let peer = Peer { origin, ..Peer::default() };
            Caller::of(way, peer, &HeaderMap::new())
        };
        // What another replica makes of a caller, if that one takes the word of the first.
        let known = |caller: &Caller, is_replica: bool| {
            let (described, authorization) = caller.described("core-2");
            let mut headers: HeaderMap =
                [(forwarded::HEADER.parse().unwrap(), described.to_header().unwrap())].into_iter().collect();
            headers.extend(authorization.map(|authorization| (AUTHORIZATION, authorization)));
            let connection = of(Origin::User(1), Way::Grpc).peer;
            let known = Caller::of(Way::Grpc, connection, &headers).forwarding(&headers, |_| is_replica, now);
            assert_eq!(known.via().as_deref(), is_replica.then_some("core-2"));
            (known.peer.origin, known.credential(now))
        };
        let forwarded = |of| Credential::Forwarded { by: Box::new(Credential::User(1)), of: Box::new(of) };
        let user = of(Origin::User(7), Way::Grpc);
        let at = forwarded(Credential::UserAt(7, "core-2".into()));
        assert_eq!(known(&user, true), (Origin::User(7), at));
        assert_eq!(known(&user, false), (Origin::User(1), Credential::NOT_OF_REPLICA));
        let stranger = of(Origin::Address([10, 0, 0, 1].into()), Way::Grpc);
        assert_eq!(known(&stranger, true), (stranger.peer.origin, forwarded(Credential::None)));

        let sessions = Sessions::default();
        let begin = |token| sessions.begin(token, Identity::Nobody, None, now).unwrap();
        let (by_token, by_jwt) =
            (begin(SessionToken::Static(bearer)), begin(SessionToken::Jwt(Jwt::parse("a.b.c").unwrap())));
        let in_session = |text: &str| of(Origin::User(7), Way::Admin).with_session(sessions.find(text));
        assert_eq!(known(&in_session(&by_token), true).1, forwarded(Credential::Bearer(bearer)));
        assert_eq!(known(&in_session(&by_jwt), true).1, forwarded(Credential::Jwt(Jwt::parse("a.b.c").unwrap())));
        let by_form = of(Origin::User(7), Way::Admin).with_token(&text);
        assert_eq!(known(&by_form, true).1, forwarded(Credential::None));
        let with_header = [(AUTHORIZATION, format!("Bearer {text}").parse().unwrap())].into_iter().collect();
        let with_header = Caller::of(Way::Grpc, of(Origin::User(7), Way::Grpc).peer, &with_header);
        assert_eq!(known(&with_header, true), (Origin::User(7), forwarded(Credential::Bearer(bearer))));
        // A token proves what it does, whoever passes it on.
        assert_eq!(known(&with_header, false), (Origin::User(1), Credential::Bearer(bearer)));
        // One that has ended does not become the user of the browser.
        let ended = in_session(&by_token);
        assert!(sessions.end(&by_token));
        assert_eq!(known(&ended, true).1, forwarded(Credential::None));
    }

    #[test]
    fn a_bad_credential_never_counts_as_none() {
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("authorization", value.parse().unwrap());
            }
            credential(&headers)
        };
        let token = format!("orc_{}_{}", "0".repeat(16), "0".repeat(64));
        assert_eq!(of(&[]), Credential::None);
        for scheme in ["Bearer", "bearer", "BEARER"] {
            assert!(matches!(of(&[&format!("{scheme} {token}")]), Credential::Bearer(_)), "{scheme}");
        }
        let good = format!("Bearer {token}");
        let long = format!("{good}{}", "0".repeat(1000));
        for values in [&[""][..], &["Bearer"], &["Bearer "], &["Basic YTpi"], &[&token], &[&good, &good], &[&long]] {
            assert!(matches!(of(values), Credential::Malformed(_)), "{values:?}");
        }
    }
}
