use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use jiff::Timestamp;

use super::{
    Bearer, Credential, Digest, Jwt, NoRandomness,
    token::{Hex, bytes},
};
use crate::model::Identity;

/// The token with which a session began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionToken {
    /// A static token.
    Static(Bearer),
    /// A JWT.
    Jwt(Jwt),
}

/// A session of a browser that has logged in with a token. Its callers are those of the token, until it ends.
#[derive(Debug)]
pub struct Session {
    token: SessionToken,
    /// The caller that has begun it.
    identity: Identity,
    /// Grows with each session.
    number: u64,
    /// The first time at which it is no longer valid.
    ends_at: Timestamp,
}

/// The open sessions, in memory only: they end with the process.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    /// By the digests of their texts, so that the secrets are not kept.
    sessions: BTreeMap<Digest, Arc<Session>>,
    begun: u64,
}

impl Session {
    /// The token with which it began.
    #[must_use]
    pub fn token(&self) -> &SessionToken {
        &self.token
    }

    /// What its browser presents.
    #[must_use]
    pub fn credential(&self) -> Credential {
        Credential::Session { token: self.token.clone(), ends_at: self.ends_at }
    }
}

impl Sessions {
    /// Most open sessions: more than people look at one service, and with the largest JWTs 9 MiB.
    pub const MAX: usize = 1024;
    /// Most open sessions of one identity: as many as it may have watches by default.
    pub const MAX_OF_ONE: usize = 100;
    /// Longest time until people have to log in again: a working day.
    pub const MAX_DURATION: Duration = Duration::from_hours(12);

    /// Begins a session of the token of this caller, which is valid until `valid_until`. Returns its text, which only
    /// the browser keeps: 64 hexadecimal digits of a secret of 256 bits. At a limit, the oldest session of the same
    /// identity ends: nobody can end those of others.
    ///
    /// # Errors
    /// All sessions are taken by others, or the system has no randomness.
    pub fn begin(
        &self,
        token: SessionToken,
        identity: Identity,
        valid_until: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<String, NoSession> {
        let mut secret = [0; 32];
        SystemRandom::new().fill(&mut secret).map_err(|_| NoRandomness)?;
        let text = Hex(&secret).to_string();
        let latest = now.saturating_add(Self::MAX_DURATION).unwrap_or(Timestamp::MAX);
        let ends_at = valid_until.map_or(latest, |until| until.min(latest));
        let mut open = self.open();
        open.sessions.retain(|_, session| session.ends_at > now);
        let own = open.sessions.iter().filter(|(_, it)| it.identity == identity);
        let (own, oldest) = (own.clone().count(), own.min_by_key(|(_, it)| it.number).map(|(digest, _)| *digest));
        if own >= Self::MAX_OF_ONE || open.sessions.len() >= Self::MAX {
            let oldest = oldest.ok_or(NoSession::AllTaken)?;
            open.sessions.remove(&oldest);
        }
        open.begun += 1;
        let session = Session { token, identity, number: open.begun, ends_at };
        open.sessions.insert(Digest::of(text.as_bytes()), Arc::new(session));
        Ok(text)
    }

    /// The session of this text, for as long as it is open. Without one, the returned value leads to none.
    #[must_use]
    pub fn find(&self, text: &str) -> Weak<Session> {
        digest_of(text).and_then(|digest| self.open().sessions.get(&digest).map(Arc::downgrade)).unwrap_or_default()
    }

    /// Ends the session of this text. True if it was open.
    pub fn end(&self, text: &str) -> bool {
        digest_of(text).is_some_and(|digest| self.open().sessions.remove(&digest).is_some())
    }

    /// Ends the sessions whose credential is not accepted any more.
    pub fn retain(&self, mut is_accepted: impl FnMut(&Credential) -> bool) {
        self.open().sessions.retain(|_, session| is_accepted(&session.credential()));
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // A panic leaves the sessions usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a session can't begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSession {
    /// All of them are taken by other callers.
    #[error(
        "all {max} sessions are taken by others; try again when somebody has logged out (a session ends by itself \
         after {hours} hours)",
        max = Sessions::MAX,
        hours = Sessions::MAX_DURATION.as_secs() / 3600
    )]
    AllTaken,
    /// The system has no randomness.
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
}

/// `None` if this is not the text of a session.
fn digest_of(text: &str) -> Option<Digest> {
    bytes::<32>(text).map(|_| Digest::of(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{access::Token, model::Name};

    fn token() -> SessionToken {
        let (_, text) = Token::create(Name::parse("wall").unwrap(), None).unwrap();
        SessionToken::Static(Bearer::parse(&text).unwrap())
    }

    fn identity(name: &str) -> Identity {
        Identity::parse(&format!("token:{name}")).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_session_is_found_by_its_text_until_it_is_ended() {
        let (sessions, token, now) = (Sessions::default(), token(), at("2027-01-01T00:00:00Z"));
        let begin = |until| sessions.begin(token.clone(), identity("wall"), until, now).unwrap();
        let text = begin(None);
        let found = sessions.find(&text);
        let expected = Credential::Session { token: token.clone(), ends_at: at("2027-01-01T12:00:00Z") };
        assert_eq!(found.upgrade().unwrap().credential(), expected);
        assert!(!format!("{sessions:?}").contains(&text), "the secret is kept");
        for other in [format!("{text}0"), text.replace(&text[..1], "x"), "0".repeat(64), String::new()] {
            assert!(sessions.find(&other).upgrade().is_none() && !sessions.end(&other), "{other}");
        }
        assert!(sessions.end(&text) && !sessions.end(&text));
        assert!(found.upgrade().is_none(), "open streams have it");
        let ends_at = at("2027-01-01T00:00:05Z");
        let short = begin(Some(ends_at));
        let credential = sessions.find(&short).upgrade().unwrap().credential();
        assert_eq!(credential, Credential::Session { token, ends_at }, "a session outlives its token");
    }

    #[test]
    fn at_a_limit_only_a_session_of_the_same_identity_ends() {
        let (sessions, now) = (Sessions::default(), at("2027-01-01T00:00:00Z"));
        let begin = |name: &str, now| sessions.begin(token(), identity(name), None, now);
        let is_open = |text: &String| sessions.find(text).upgrade().is_some();
        let wall = begin("wall", now).unwrap();
        let own: Vec<_> = (0..Sessions::MAX_OF_ONE + 10).map(|_| begin("other", now).unwrap()).collect();
        assert!(is_open(&wall) && !own[..10].iter().any(is_open) && own[10..].iter().all(is_open));
        let more = Sessions::MAX - Sessions::MAX_OF_ONE - 1;
        let others: Vec<_> = (0..more).map(|number| begin(&format!("n{number}"), now).unwrap()).collect();
        assert_eq!(begin("late", now), Err(NoSession::AllTaken));
        assert!(is_open(&wall) && others.iter().all(is_open), "a refused login ends none");
        let again = begin("wall", now).unwrap();
        assert!(is_open(&again) && !is_open(&wall), "its own session has given way");

        let later = begin("late", at("2027-01-01T12:00:00Z")).unwrap();
        assert!(is_open(&later) && !is_open(&again), "those that have ended take no place");
        sessions.retain(|_| false);
        assert!(!is_open(&later));
    }
}
