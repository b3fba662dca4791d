use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use bytes::Bytes;
use jiff::Timestamp;
use rustls_pki_types::CertificateDer;

use super::{
    Bearer, CallerLimits, Digest, Grant, Issuer, Jwt, JwtError, NoIdentity, Right, Rights, SessionToken, Token,
    TokenId,
    certificate::{identity_of, key_of},
    jwt::Verified,
};
use crate::model::Identity;

/// Whether rights are enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Every caller may do everything, and credentials are not read.
    #[default]
    Off,
    /// Every caller may do everything. Calls that [`Mode::Enforce`] would refuse are logged and counted.
    DryRun,
    /// Callers may do what their grants allow.
    Enforce,
}

impl Mode {
    /// All modes, as they are written.
    pub const WORDS: &[(&str, Self)] = &[("off", Self::Off), ("dry_run", Self::DryRun), ("enforce", Self::Enforce)];
}

/// The proof of its identity that a caller presents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Nothing.
    None,
    /// It has no known form. The text describes it, for messages.
    Malformed(&'static str),
    /// A static token.
    Bearer(Bearer),
    /// A session.
    Session {
        /// The token with which it began.
        token: SessionToken,
        /// When the session ends.
        ends_at: Timestamp,
    },
    /// A JWT.
    Jwt(Jwt),
    /// A certificate whose private key the caller has.
    Certificate(Presented),
    /// A certificate that is not trusted any more, for this reason.
    Untrusted(String),
    /// A certificate that has expired at this time.
    Expired(Timestamp),
    /// The system says that the caller is a process of this user.
    User(u32),
    /// The replica of this name says that the caller is a process of this user on its machine.
    UserAt(u32, Arc<str>),
    /// What a caller presented to a replica, which has forwarded its call.
    Forwarded {
        /// What the replica presents. It counts only if that is in `cluster.peers`.
        by: Box<Credential>,
        /// What the caller presented.
        of: Box<Credential>,
    },
}

impl Credential {
    /// What a call presents that says to be forwarded, but does not come from a replica.
    pub const NOT_OF_REPLICA: Self =
        Self::Malformed("has the header `orchestrator-caller-bin`, which only the replicas in cluster.peers may send");
}

/// A certificate that was verified, and is trusted now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presented {
    /// In DER: first its own, then those that verify it.
    pub chain: Vec<Bytes>,
    /// When the first of these expires.
    pub expires_at: Timestamp,
}

/// A caller whose identity is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authenticated {
    /// Its identity.
    pub identity: Identity,
    /// Its groups. Only a JWT has some: at most [`Issuer::MAX_GROUPS`].
    pub groups: Vec<String>,
    /// When its credential expires, if it does.
    pub expires_at: Option<Timestamp>,
}

/// Why the identity of a caller is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unauthenticated {
    /// The caller presented no credential.
    None,
    /// The credential has expired at this time.
    Expired(Timestamp),
    /// The credential is malformed; the text says how.
    Malformed(&'static str),
    /// The credential was never valid, was removed, or is revoked.
    Invalid,
    /// The certificate has no name that identifies its owner.
    NoIdentity(NoIdentity),
    /// The certificate is not trusted any more; the text says why.
    Untrusted(String),
    /// The JWT is not valid.
    Jwt(JwtError),
}

/// Identities and credentials that are revoked before they expire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revoked {
    identities: BTreeSet<Identity>,
    tokens: BTreeSet<TokenId>,
    keys: BTreeSet<Digest>,
}

impl Revoked {
    /// Most entries.
    pub const MAX: usize = 10_000;

    /// Adds an identity, the id of a token, or the SHA-256 of the public key of a certificate.
    ///
    /// # Errors
    /// The text has another form; the message names the valid ones.
    pub fn add(&mut self, text: &str) -> Result<(), String> {
        if let Some(id) = TokenId::parse(text) {
            self.tokens.insert(id);
        } else if let Some(digest) = Digest::parse(text) {
            self.keys.insert(digest);
        } else if text.contains(':') {
            self.identities.insert(Identity::parse(text).map_err(|error| error.to_string())?);
        } else {
            return Err(format!(
                "is {text:?}; give an identity such as token:NAME, the 16 hexadecimal digits of a token's id, or the \
                 64 of the SHA-256 of the public key of a certificate"
            ));
        }
        Ok(())
    }

    /// True if this identity is revoked.
    #[must_use]
    pub fn has_identity(&self, identity: &Identity) -> bool {
        self.identities.contains(identity)
    }

    /// True if certificates whose public key has this SHA-256 are revoked.
    #[must_use]
    pub fn has_key(&self, digest: &Digest) -> bool {
        self.keys.contains(digest)
    }

    /// The identities among them.
    #[must_use]
    pub fn identities(&self) -> &BTreeSet<Identity> {
        &self.identities
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.identities.len() + self.tokens.len() + self.keys.len()
    }

    /// True if nothing is revoked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The grants and revocations by which calls are judged.
#[derive(Clone, Debug)]
pub struct Policy {
    mode: Mode,
    grants: Vec<Grant>,
    tokens: BTreeMap<TokenId, Token>,
    issuer: Option<Issuer>,
    revoked: Revoked,
    own_uid: u32,
    limits: CallerLimits,
    peers: BTreeSet<Identity>,
}

impl Policy {
    /// A policy with these tokens, of a service that runs as the user `own_uid`. Of two tokens with the same id, the
    /// last one counts.
    #[must_use]
    pub fn new(mode: Mode, grants: Vec<Grant>, tokens: Vec<Token>, revoked: Revoked, own_uid: u32) -> Self {
        let tokens = tokens.into_iter().map(|token| (token.id, token)).collect();
        let (issuer, limits, peers) = (None, CallerLimits::default(), BTreeSet::new());
        Self { mode, grants, tokens, issuer, revoked, own_uid, limits, peers }
    }

    /// The policy that also accepts the JWTs of this issuer.
    #[must_use]
    pub fn with_issuer(self, issuer: Option<Issuer>) -> Self {
        Self { issuer, ..self }
    }

    /// The same policy, with other limits of each caller.
    #[must_use]
    pub fn with_limits(self, limits: CallerLimits) -> Self {
        Self { limits, ..self }
    }

    /// The same policy, which takes the word of these other replicas for what the callers present whose calls they
    /// forward.
    #[must_use]
    pub fn with_peers(self, peers: BTreeSet<Identity>) -> Self {
        Self { peers, ..self }
    }

    /// True if it takes the word of other replicas.
    #[must_use]
    pub fn has_peers(&self) -> bool {
        !self.peers.is_empty()
    }

    /// True if this credential is that of another replica, at this time.
    #[must_use]
    pub fn is_of_replica(&self, credential: &Credential, now: Timestamp) -> bool {
        self.replica(credential, now).is_some()
    }

    /// Another replica with this credential.
    fn replica(&self, credential: &Credential, now: Timestamp) -> Option<Authenticated> {
        self.authenticate(credential, now).ok().filter(|known| self.peers.contains(&known.identity))
    }

    /// The limits of each caller.
    #[must_use]
    pub fn limits(&self) -> &CallerLimits {
        &self.limits
    }

    /// Whether it is enforced.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The identity behind a credential, at this time.
    ///
    /// # Errors
    /// The credential is missing, or not valid. A bad credential never counts as none.
    pub fn authenticate(&self, credential: &Credential, now: Timestamp) -> Result<Authenticated, Unauthenticated> {
        let mut groups = Vec::new();
        let (identity, expires_at, is_revoked) = match credential {
            Credential::None => return Err(Unauthenticated::None),
            Credential::Malformed(how) => return Err(Unauthenticated::Malformed(how)),
            Credential::Untrusted(why) => return Err(Unauthenticated::Untrusted(why.clone())),
            Credential::Expired(at) => return Err(Unauthenticated::Expired(*at)),
            Credential::Bearer(bearer) => self.token(bearer)?,
            Credential::Session { token: SessionToken::Static(bearer), ends_at } => {
                let (identity, expires_at, is_revoked) = self.token(bearer)?;
                (identity, Some(expires_at.map_or(*ends_at, |at| at.min(*ends_at))), is_revoked)
            }
            Credential::Session { token: SessionToken::Jwt(jwt), ends_at } => {
                let verified = self.jwt(jwt, now)?;
                groups = verified.groups;
                (verified.identity, Some(verified.expires_at.min(*ends_at)), false)
            }
            Credential::Jwt(jwt) => {
                let verified = self.jwt(jwt, now)?;
                groups = verified.groups;
                (verified.identity, Some(verified.expires_at), false)
            }
            Credential::Certificate(Presented { chain, expires_at }) => {
                let own = CertificateDer::from(chain.first().map_or(&[][..], |own| own));
                let identity = identity_of(&own).map_err(Unauthenticated::NoIdentity)?;
                // Each call comes here, and most services have revoked no key.
                let has_revoked = || chain.iter().any(|it| key_of(it).is_some_and(|key| self.revoked.has_key(&key)));
                let is_revoked = !self.revoked.keys.is_empty() && has_revoked();
                (identity, Some(*expires_at), is_revoked)
            }
            Credential::User(uid) => (Identity::Uid(*uid), None, false),
            Credential::UserAt(uid, replica) => {
                (Identity::of_user(*uid, replica).ok_or(Unauthenticated::Invalid)?, None, false)
            }
            Credential::Forwarded { by, of } => {
                let Some(replica) = self.replica(by, now) else {
                    return self.authenticate(&Credential::NOT_OF_REPLICA, now);
                };
                let known = self.authenticate(of, now)?;
                let expires_at = replica.expires_at.into_iter().chain(known.expires_at).min();
                return Ok(Authenticated { expires_at, ..known });
            }
        };
        if is_revoked || self.revoked.has_identity(&identity) {
            return Err(Unauthenticated::Invalid);
        }
        match expires_at {
            Some(expired) if expired <= now => Err(Unauthenticated::Expired(expired)),
            expires_at => Ok(Authenticated { identity, groups, expires_at }),
        }
    }

    /// The identity behind a token, when it expires, and whether it is revoked.
    fn token(&self, bearer: &Bearer) -> Result<(Identity, Option<Timestamp>, bool), Unauthenticated> {
        let token = self.tokens.get(&bearer.id).filter(|token| bearer.is_of(token));
        let token = token.ok_or(Unauthenticated::Invalid)?;
        let is_revoked = self.revoked.tokens.contains(&token.id);
        Ok((Identity::Token(token.name.clone()), token.expires_at, is_revoked))
    }

    fn jwt(&self, jwt: &Jwt, now: Timestamp) -> Result<Verified, Unauthenticated> {
        let issuer = self.issuer.as_ref().ok_or(JwtError::NoIssuer);
        issuer.and_then(|issuer| issuer.verify(jwt, now)).map_err(Unauthenticated::Jwt)
    }

    /// The rights of a caller, by its identity and its groups. The user of the service itself may do everything: it can
    /// read its files as well, and a mistake in the grants can't shut it out.
    #[must_use]
    pub fn rights(&self, identity: &Identity, groups: &[String]) -> Rights {
        let own = (*identity == Identity::Uid(self.own_uid)).then_some(Right::ADMIN);
        Rights(self.grants.iter().flat_map(|grant| grant.rights_of(identity, groups)).chain(own).collect())
    }
}

impl fmt::Display for Unauthenticated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("the call has no credential"),
            Self::Expired(at) => write!(f, "the credential of the call has expired at {at}"),
            Self::Malformed(how) => write!(f, "the credential of the call {how}"),
            Self::Invalid => f.write_str("the credential of the call is not valid: it is unknown or revoked"),
            Self::Jwt(problem) => write!(f, "the credential of the call {problem}"),
            Self::NoIdentity(problem) => write!(f, "the certificate of the caller {problem}"),
            Self::Untrusted(why) => write!(f, "the certificate of the caller is not trusted any more: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Name;

    #[test]
    fn a_token_counts_until_it_expires_or_is_revoked_or_removed() {
        let [before, at]: [Timestamp; 2] =
            ["2027-01-01T00:00:00Z", "2027-01-02T00:00:00Z"].map(|it| it.parse().unwrap());
        let (token, text) = Token::create(Name::parse("wall").unwrap(), Some(at)).unwrap();
        let (_, foreign) = Token::create(Name::parse("wall").unwrap(), None).unwrap();
        let credential = |text: &str| Credential::Bearer(Bearer::parse(text).unwrap());
        let policy = |tokens: &[&Token], revoked: &[&str]| {
            let mut all = Revoked::default();
            for text in revoked {
                all.add(text).unwrap();
            }
            let policy = Policy::new(Mode::Enforce, Vec::new(), tokens.iter().copied().cloned().collect(), all, 1);
            move |credential: &Credential, now| policy.authenticate(credential, now)
        };
        let known = Authenticated {
            identity: Identity::parse("token:wall").unwrap(),
            groups: Vec::new(),
            expires_at: Some(at),
        };
        let valid = policy(&[&token], &["token:other", "0000000000000000"]);
        assert_eq!(valid(&credential(&text), before), Ok(known));
        assert_eq!(valid(&credential(&text), at), Err(Unauthenticated::Expired(at)));
        assert_eq!(valid(&credential(&foreign), before), Err(Unauthenticated::Invalid));
        assert_eq!(valid(&Credential::None, before), Err(Unauthenticated::None));
        assert_eq!(valid(&Credential::Malformed("x"), before), Err(Unauthenticated::Malformed("x")));
        assert_eq!(policy(&[], &[])(&credential(&text), before), Err(Unauthenticated::Invalid));
        for revoked in ["token:wall", &token.id.to_string()] {
            let refused = policy(&[&token], &[revoked])(&credential(&text), before);
            assert_eq!(refused, Err(Unauthenticated::Invalid), "{revoked}");
        }
        let session =
            |ends_at| Credential::Session { token: SessionToken::Static(Bearer::parse(&text).unwrap()), ends_at };
        let ended = Err(Unauthenticated::Expired(before));
        assert_eq!(valid(&session(before), before), ended, "a session ends before its token");
        assert_eq!(valid(&session(Timestamp::MAX), at), Err(Unauthenticated::Expired(at)), "or with its token");
        assert_eq!(policy(&[], &[])(&session(at), before), Err(Unauthenticated::Invalid));
        // The id alone is not enough.
        let mut other = token.clone();
        other.digest = Digest::of(b"other");
        assert_eq!(policy(&[&other], &[])(&credential(&text), before), Err(Unauthenticated::Invalid));
    }

    #[test]
    fn what_a_replica_forwards_counts_while_it_is_a_peer() {
        let now: Timestamp = "2027-01-01T00:00:00Z".parse().unwrap();
        let policy = |peers: &[&str], revoked: &[&str]| {
            let mut all = Revoked::default();
            for text in revoked {
                all.add(text).unwrap();
            }
            let peers = peers.iter().map(|text| Identity::parse(text).unwrap()).collect();
            Policy::new(Mode::Enforce, Vec::new(), Vec::new(), all, 7).with_peers(peers)
        };
        let by = |uid| Box::new(Credential::User(uid));
        let of = |uid: u32| Box::new(Credential::UserAt(uid, "core-2".into()));
        let forwarded = Credential::Forwarded { by: by(1), of: of(7) };
        let known = policy(&["uid:1"], &[]).authenticate(&forwarded, now).unwrap().identity;
        assert_eq!(known.to_string(), "uid:7@core-2");
        // The same number is another user on another machine, who has no right here.
        assert!(policy(&[], &[]).rights(&known, &[]).0.is_empty());
        assert!(!policy(&[], &[]).rights(&Identity::Uid(7), &[]).0.is_empty());
        let none = Credential::Forwarded { by: by(1), of: Box::new(Credential::None) };
        assert_eq!(policy(&["uid:1"], &[]).authenticate(&none, now), Err(Unauthenticated::None));
        for (peers, revoked) in [(&[][..], &[][..]), (&["uid:2"], &[]), (&["uid:1"], &["uid:1"])] {
            let refused = policy(peers, revoked).authenticate(&forwarded, now);
            assert!(matches!(refused, Err(Unauthenticated::Malformed(_))), "{peers:?} {revoked:?}");
        }
        // One replica takes no word of another about a third one.
        let twice = Credential::Forwarded { by: Box::new(forwarded), of: of(7) };
        assert!(policy(&["uid:1"], &[]).authenticate(&twice, now).is_err());
    }

    #[test]
    fn a_revocation_is_an_identity_an_id_or_a_digest() {
        let mut revoked = Revoked::default();
        for text in ["token:a", "cert:spiffe://a/b", "uid:7", &"a".repeat(16), &"0".repeat(64)] {
            assert_eq!(revoked.add(text), Ok(()), "{text}");
        }
        assert_eq!(revoked.len(), 5);
        for text in ["", "a", "token:", &"A".repeat(16)] {
            assert!(revoked.add(text).is_err(), "{text}");
        }
    }
}
