use std::{borrow::Cow, fmt, sync::Arc};

use rustls_pki_types::CertificateDer;
use webpki::EndEntityCert;

use crate::model::Name;

/// The identity of a caller, as far as the service knows it. Shown as `nobody`, or as its kind, a colon and its name,
/// such as `token:monitoring`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Identity {
    /// The caller presented no credential.
    Nobody,
    /// The caller has the static token of this name.
    Token(Name),
    /// The caller has the private key of a certificate with this URI or DNS name: 1 to [`Identity::MAX_LEN`] printable
    /// ASCII characters.
    Certificate(Arc<str>),
    /// The caller is a process of this user, on the same machine.
    Uid(u32),
}

/// The kinds of identities that a grant can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Token,
    Certificate,
    Uid,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Token, Self::Certificate, Self::Uid];

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Certificate => "cert",
            Self::Uid => "uid",
        }
    }

    /// Splits `KIND:NAME`.
    pub(super) fn split(text: &str) -> Result<(Self, &str), IdentityError> {
        let (word, name) = text.split_once(':').ok_or_else(|| IdentityError::form(text))?;
        let kind = Self::ALL.into_iter().find(|kind| kind.word() == word).ok_or_else(|| IdentityError::form(text))?;
        if is_nameable(name) { Ok((kind, name)) } else { Err(IdentityError::form(text)) }
    }
}

/// Why a text or a certificate gives no identity. Reads well after its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The text has another form.
    #[error(
        "is {0:?}; give token:NAME, cert:URI, cert:DNS-NAME or uid:NUMBER, with at most {max} printable ASCII \
         characters after the colon",
        max = Identity::MAX_LEN
    )]
    Form(String),
    /// The certificate can't be parsed.
    #[error("can't be parsed: {0}")]
    Certificate(String),
    /// The certificate has no name that identifies its owner.
    #[error(
        "has {uris} URI names and {dns} DNS names as alternative names; it needs exactly one URI name, or none and \
         exactly one DNS name"
    )]
    Names {
        /// Number of URI names.
        uris: usize,
        /// Number of DNS names.
        dns: usize,
    },
    /// The name in the certificate is too long, or has other characters.
    #[error("has a name that is not 1 to {max} printable ASCII characters", max = Identity::MAX_LEN)]
    Unprintable,
}

impl IdentityError {
    fn form(text: &str) -> Self {
        const SHOWN: usize = 64;
        Self::Form(text.chars().take(SHOWN).collect())
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
        let (kind, name) = Kind::split(text)?;
        let parsed = match kind {
            Kind::Token => Name::parse(name).ok().map(Self::Token),
            Kind::Certificate => Some(Self::Certificate(name.into())),
            // In the form in which it is shown.
            Kind::Uid => name.parse().ok().filter(|uid: &u32| uid.to_string() == name).map(Self::Uid),
        };
        parsed.ok_or_else(|| IdentityError::form(text))
    }

    /// The owner of a certificate whose chain is verified: its only URI name, or its only DNS name if it has no URI
    /// name. Its common name does not count (RFC 9525, section 2).
    ///
    /// # Errors
    /// The certificate can't be parsed, or has no such name.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let parsed = EndEntityCert::try_from(certificate);
        let parsed = parsed.map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let (uris, dns): (Vec<_>, Vec<_>) = (parsed.valid_uri_names().collect(), parsed.valid_dns_names().collect());
        Self::of_names(&uris, &dns)
    }

    fn of_names(uris: &[&str], dns: &[&str]) -> Result<Self, IdentityError> {
        let name = match (uris, dns) {
            ([name], _) | ([], [name]) => *name,
            _ => return Err(IdentityError::Names { uris: uris.len(), dns: dns.len() }),
        };
        if is_nameable(name) { Ok(Self::Certificate(name.into())) } else { Err(IdentityError::Unprintable) }
    }

    /// The kind and the name, unless it is nobody.
    pub(super) fn parts(&self) -> Option<(Kind, Cow<'_, str>)> {
        match self {
            Self::Nobody => None,
            Self::Token(name) => Some((Kind::Token, name.as_str().into())),
            Self::Certificate(name) => Some((Kind::Certificate, name.as_ref().into())),
            Self::Uid(uid) => Some((Kind::Uid, uid.to_string().into())),
        }
    }
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
        for text in ["token:wall", "cert:spiffe://dreamnet/process/main", "cert:core.dreamnet", "cert:*", "uid:0"] {
            assert_eq!(Identity::parse(text).unwrap().to_string(), text);
        }
        let long = format!("cert:{}", "a".repeat(257));
        for text in
            ["", "nobody", "wall", "token:", "token:a b", "token:1", "uid:-1", "uid:01", "uid:x", "user:a", &long]
        {
            assert!(Identity::parse(text).is_err(), "{text}");
        }
        assert!(Identity::parse("cert:ä").is_err());
    }

    #[test]
    fn a_certificate_is_known_by_its_only_uri_or_else_by_its_only_dns_name() {
        let of = |uris: &[&str], dns: &[&str]| Identity::of_names(uris, dns).map(|it| it.to_string());
        assert_eq!(of(&["spiffe://a/b"], &["x", "y"]).unwrap(), "cert:spiffe://a/b");
        assert_eq!(of(&[], &["core.dreamnet"]).unwrap(), "cert:core.dreamnet");
        for (uris, dns) in [(&["a:1", "a:2"][..], &["x"][..]), (&[], &["x", "y"]), (&[], &[])] {
            assert_eq!(of(uris, dns), Err(IdentityError::Names { uris: uris.len(), dns: dns.len() }));
        }
        for name in ["spiffe://a b", "spiffe://ä", &"a".repeat(257), ""] {
            assert_eq!(of(&[name], &[]), Err(IdentityError::Unprintable), "{name}");
        }
    }

    #[test]
    fn the_common_name_of_a_certificate_does_not_count() {
        let of = |names: &[&str]| {
            let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
            parameters.distinguished_name.push(rcgen::DnType::CommonName, "admin");
            let uri = |name: &&str| rcgen::SanType::URI((*name).try_into().unwrap());
            parameters.subject_alt_names = names.iter().map(uri).collect();
            let key = rcgen::KeyPair::generate().unwrap();
            Identity::of_certificate(parameters.self_signed(&key).unwrap().der())
        };
        assert_eq!(of(&["spiffe://a/b"]).unwrap().to_string(), "cert:spiffe://a/b");
        assert_eq!(of(&[]), Err(IdentityError::Names { uris: 0, dns: 0 }));
        let nonsense = CertificateDer::from(&b"nonsense"[..]);
        assert!(matches!(Identity::of_certificate(&nonsense), Err(IdentityError::Certificate(_))));
    }
}
