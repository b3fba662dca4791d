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
    /// What its browser presents.
    #[must_use]
    pub fn credential(&self) -> Credential {
        Credential::Session { token: self.token.clone(), ends_at: self.ends_at }
    }
}

impl Sessions {
    /// Most open sessions: more than people look at one service, and with the largest JWTs 9 MiB.
    pub const MAX: usize = 1024;
    /// Longest time until people have to log in again: a working day.
    pub const MAX_DURATION: Duration = Duration::from_hours(12);

    /// Begins a session of a token that is valid until `valid_until`. Returns its text, which only the browser keeps:
    /// 64 hexadecimal digits of a secret of 256 bits. At the limit, the oldest session of the same token ends, or else
    /// the oldest of all: so one token can't end the sessions of others again and again.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn begin(
        &self,
        token: SessionToken,
        valid_until: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<String, NoRandomness> {
        let mut secret = [0; 32];
        SystemRandom::new().fill(&mut secret).map_err(|_| NoRandomness)?;
        let text = Hex(&secret).to_string();
        let latest = now.saturating_add(Self::MAX_DURATION).unwrap_or(Timestamp::MAX);
        let ends_at = valid_until.map_or(latest, |until| until.min(latest));
        let mut open = self.open();
        if open.sessions.len() >= Self::MAX {
            open.sessions.retain(|_, session| session.ends_at > now);
        }
        if open.sessions.len() >= Self::MAX {
            let oldest = open.sessions.iter().min_by_key(|(_, it)| (it.token != token, it.number));
            if let Some(oldest) = oldest.map(|(digest, _)| *digest) {
                open.sessions.remove(&oldest);
            }
        }
        open.begun += 1;
        let session = Session { token, number: open.begun, ends_at };
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

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_session_is_found_by_its_text_until_it_is_ended() {
        let (sessions, token, now) = (Sessions::default(), token(), at("2027-01-01T00:00:00Z"));
        let text = sessions.begin(token.clone(), None, now).unwrap();
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
        let short = sessions.begin(token.clone(), Some(ends_at), now).unwrap();
        let credential = sessions.find(&short).upgrade().unwrap().credential();
        assert_eq!(credential, Credential::Session { token, ends_at }, "a session outlives its token");
    }

    #[test]
    fn at_the_limit_a_session_of_the_same_token_ends() {
        let (sessions, wall, other, now) = (Sessions::default(), token(), token(), at("2027-01-01T00:00:00Z"));
        let begin = |token: &SessionToken| sessions.begin(token.clone(), None, now).unwrap();
        let is_open = |text: &String| sessions.find(text).upgrade().is_some();
        let of_wall = begin(&wall);
        let of_other: Vec<_> = (1..Sessions::MAX).map(|_| begin(&other)).collect();
        let more: Vec<_> = (0..10).map(|_| begin(&other)).collect();
        assert!(is_open(&of_wall) && !of_other[..10].iter().any(is_open), "the oldest of its own end");
        assert!(of_other[10..].iter().chain(&more).all(is_open));
        let third = begin(&token());
        assert!(is_open(&third) && !is_open(&of_wall), "a further token takes the place of the oldest");

        let later = sessions.begin(wall, None, at("2027-01-01T12:00:00Z")).unwrap();
        assert!(is_open(&later) && !is_open(&third), "those that have ended go first");
        sessions.retain(|_| false);
        assert!(!is_open(&later));
    }
}
