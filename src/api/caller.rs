//! The caller of a request: where the call came in, and what it presents.

use std::sync::Weak;

use jiff::Timestamp;
use tokio::time::Instant;
use tonic::{Request, codegen::http::HeaderMap};

use super::request;
use crate::{
    access::{Bearer, Credential, Jwt, Presented, Session, SessionToken},
    listen::{Peer, Untrusted},
    model::SpanContext,
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
    /// The session that its request names, if it names one: it may have ended.
    session: Option<Weak<Session>>,
}

impl Caller {
    /// The caller of a request with these headers.
    pub(crate) fn of(way: Way, peer: Peer, headers: &HeaderMap) -> Self {
        let (trace, presented) = (request::trace(headers), credential(headers));
        Self { way, peer, arrived: Instant::now(), trace, presented, session: None }
    }

    /// The same caller, in this session.
    pub(super) fn with_session(self, session: Weak<Session>) -> Self {
        Self { session: Some(session), ..self }
    }

    /// The same caller, with nothing but this token, which may be empty, to prove its identity.
    pub(super) fn with_token(self, token: &str) -> Self {
        let presented = if token.is_empty() { Credential::None } else { parse(token) };
        let peer = Peer { certificates: None, ..self.peer };
        Self { peer, presented, session: None, ..self }
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
        let Peer { certificates, .. } = &self.peer;
        if let (Credential::None, Some(session)) = (&self.presented, &self.session) {
            let ended = Credential::Malformed("is of a session that has ended: log in again");
            return session.upgrade().map_or(ended, |session| session.credential());
        }
        match (&self.presented, certificates, self.peer.user()) {
            (Credential::None, Some(shown), _) => match shown.verify(now) {
                Ok(expires_at) => Credential::Certificate(Presented { chain: shown.chain().to_vec(), expires_at }),
                Err(Untrusted::Expired(at)) => Credential::Expired(at),
                Err(Untrusted::Other(why)) => Credential::Untrusted(why),
            },
            (Credential::None, None, Some(uid)) => Credential::User(uid),
            (presented, ..) => presented.clone(),
        }
    }

    /// A request of this caller.
    pub fn asks<Q>(self, request: Q) -> Request<Q> {
        let mut request = Request::new(request);
        request.extensions_mut().insert(self);
        request
    }
}

/// The credential in the headers of a request. One that is there and bad never counts as none.
fn credential(headers: &HeaderMap) -> Credential {
    let mut values = headers.get_all("authorization").iter();
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
