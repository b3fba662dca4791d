use std::{borrow::Cow, fmt, sync::Arc};

use super::{Name, text::shortened};

/// The identity of a caller or of a server, as far as the service knows it. Shown as `nobody`, or as its kind, a colon
/// and its name, such as `token:monitoring`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// It presented no credential.
    Nobody,
    /// It has the static token of this name.
    Token(Name),
    /// It has the private key of a certificate with this URI or DNS name: 1 to [`Identity::MAX_LEN`] printable ASCII
    /// characters.
    Certificate(Arc<str>),
    /// It is a process of this user, on the same machine.
    Uid(u32),
    /// It is a process of this user, on the machine of the replica of this name, which has forwarded its call. Shown as
    /// `uid:NUMBER@REPLICA`: numbers of users mean something else on each machine.
    UidAt(u32, Arc<str>),
    /// It has a JWT with this name: 1 to [`Identity::MAX_LEN`] printable ASCII characters.
    Jwt(Arc<str>),
}

/// The kinds of names in a grant: those of identities, and the groups of callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdentityKind {
    Token,
    Certificate,
    Uid,
    Jwt,
    Group,
}

impl IdentityKind {
    const ALL: [Self; 5] = [Self::Token, Self::Certificate, Self::Uid, Self::Jwt, Self::Group];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Certificate => "cert",
            Self::Uid => "uid",
            Self::Jwt => "jwt",
            Self::Group => "group",
        }
    }

    /// Splits `KIND:NAME`.
    pub(crate) fn split(text: &str) -> Result<(Self, &str), IdentityError> {
        let (word, name) = text.split_once(':').ok_or_else(|| IdentityError::form(text))?;
        let kind = Self::ALL.into_iter().find(|kind| kind.word() == word).ok_or_else(|| IdentityError::form(text))?;
        if is_nameable(name) { Ok((kind, name)) } else { Err(IdentityError::form(text)) }
    }
}

/// A text is not an identity. Reads well after its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "is {0:?}; give token:NAME, cert:URI, cert:DNS-NAME, jwt:NAME, uid:NUMBER or uid:NUMBER@REPLICA, or in a grant \
     group:NAME, with at most {max} printable ASCII characters after the colon",
    max = Identity::MAX_LEN
)]
pub struct IdentityError(String);

impl IdentityError {
    fn form(text: &str) -> Self {
        const SHOWN: usize = 64;
        Self(shortened(text, SHOWN).into_owned())
    }
}

/// A name can be shown, logged and compared as it is: no spaces, no control characters, nothing that looks like another
/// character.
fn is_nameable(name: &str) -> bool {
    (1..=Identity::MAX_LEN).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

impl Identity {
    /// Most characters of a name in an identity.
    pub const MAX_LEN: usize = 256;

    /// Parses the form in which identities are shown, without `nobody`.
    ///
    /// # Errors
    /// The text has another form.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let (kind, name) = IdentityKind::split(text)?;
        let parsed = match kind {
            IdentityKind::Token => Name::parse(name).ok().map(Self::Token),
            IdentityKind::Certificate => Some(Self::Certificate(name.into())),
            // In the form in which it is shown.
            IdentityKind::Jwt => Some(Self::Jwt(name.into())),
            // Callers are members of groups, and no caller is one.
            IdentityKind::Group => None,
            IdentityKind::Uid => match name.split_once('@') {
                None => uid(name).map(Self::Uid),
                Some((name, replica)) => uid(name).and_then(|uid| Self::of_user(uid, replica)),
            },
        };
        parsed.ok_or_else(|| IdentityError::form(text))
    }

    /// The owner of a certificate with this name. `None` if the name is too long, or has other characters.
    #[must_use]
    pub fn of_certificate(name: &str) -> Option<Self> {
        is_nameable(name).then(|| Self::Certificate(name.into()))
    }

    /// The caller with this name in its JWT. `None` if the name is too long, or has other characters.
    #[must_use]
    pub fn of_subject(name: &str) -> Option<Self> {
        is_nameable(name).then(|| Self::Jwt(name.into()))
    }

    /// The user with this number on the machine of this replica. `None` if the name of the replica is too long, or has
    /// other characters.
    #[must_use]
    pub fn of_user(uid: u32, replica: &str) -> Option<Self> {
        const LONGEST_UID: usize = 10;
        let fits = replica.len() < Self::MAX_LEN - LONGEST_UID;
        (fits && is_nameable(replica)).then(|| Self::UidAt(uid, replica.into()))
    }

    /// Approximate bytes that it takes in memory.
    #[must_use]
    pub fn footprint(&self) -> usize {
        let name = match self {
            Self::Nobody | Self::Uid(_) => 0,
            Self::Token(name) => name.as_str().len(),
            Self::Certificate(name) | Self::Jwt(name) | Self::UidAt(_, name) => name.len(),
        };
        size_of::<Self>() + name
    }

    /// The kind and the name, unless it is nobody.
    pub(crate) fn parts(&self) -> Option<(IdentityKind, Cow<'_, str>)> {
        match self {
            Self::Nobody => None,
            Self::Token(name) => Some((IdentityKind::Token, name.as_str().into())),
            Self::Certificate(name) => Some((IdentityKind::Certificate, name.as_ref().into())),
            Self::Jwt(name) => Some((IdentityKind::Jwt, name.as_ref().into())),
            Self::Uid(uid) => Some((IdentityKind::Uid, uid.to_string().into())),
            Self::UidAt(uid, replica) => Some((IdentityKind::Uid, format!("{uid}@{replica}").into())),
        }
    }
}

/// The number of a user, in the form in which it is shown.
fn uid(text: &str) -> Option<u32> {
    text.parse().ok().filter(|uid: &u32| uid.to_string() == text)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts() {
            None => f.write_str("nobody"),
            Some((kind, name)) => write!(f, "{}:{name}", kind.word()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_shown_as_it_is_parsed() {
        for text in [
            "token:wall",
            "cert:spiffe://dreamnet/process/main",
            "cert:core.dreamnet",
            "cert:*",
            "uid:0",
            "uid:7@core-2.example",
            "jwt:auth0|5f",
        ] {
            assert_eq!(Identity::parse(text).unwrap().to_string(), text);
        }
        let long = format!("cert:{}", "a".repeat(257));
        for text in [
            "",
            "nobody",
            "wall",
            "token:",
            "token:a b",
            "token:1",
            "uid:-1",
            "uid:01",
            "uid:x",
            "uid:1@",
            "uid:01@core",
            "user:a",
            "group:a",
            &long,
        ] {
            assert!(Identity::parse(text).is_err(), "{text}");
        }
        assert!(Identity::parse("cert:ä").is_err());
    }
}
