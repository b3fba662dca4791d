use std::fmt;

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{SHA256, digest},
    rand::{SecureRandom, SystemRandom},
};
use jiff::Timestamp;

use crate::model::{Name, Violations};

/// A static token, as far as the service knows it: without its secret. Its text is `orc_ID_SECRET`, with a random
/// secret of 256 bits, so that a plain hash of it can't be guessed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Finds it. Not secret.
    pub id: TokenId,
    /// Its callers are `token:` and this name. Several tokens may have the same name, so that one can replace another.
    pub name: Name,
    /// Of its text.
    pub digest: Digest,
    /// The first time at which it is no longer valid; `None` means that it does not expire.
    pub expires_at: Option<Timestamp>,
}

/// A token as it is written in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSpec {
    /// The id.
    pub id: String,
    /// The name.
    pub name: String,
    /// The digest.
    pub sha256: String,
    /// When it expires, if it does.
    pub expires_at: Option<Timestamp>,
}

/// The id of a token: 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenId([u8; 8]);

/// A SHA-256: 64 hexadecimal digits. Of the text of a token, or of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// A presented token. It keeps a digest instead of the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bearer {
    pub(super) id: TokenId,
    pub(super) digest: Digest,
}

/// The system has no randomness for a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system has no randomness for a secret")]
pub struct NoRandomness;

const PREFIX: &str = "orc_";

impl Token {
    /// Validates a written token.
    ///
    /// # Errors
    /// All invalid keys together.
    pub fn from_spec(spec: &TokenSpec) -> Result<Self, Violations> {
        let TokenSpec { id, name, sha256, expires_at } = spec;
        let mut bad = Violations::default();
        let name = bad.name("name", name);
        let (parsed_id, parsed_digest) = (TokenId::parse(id), Digest::parse(sha256));
        let digits = "hexadecimal digits, in lower case,";
        if parsed_id.is_none() {
            bad.add("id", format!("is {id:?}; give the 16 {digits} between the underscores of the token"));
        }
        if parsed_digest.is_none() {
            bad.add("sha256", format!("is {sha256:?}; give the 64 {digits} of the SHA-256 of the token"));
        }
        let (id, digest) = (parsed_id.unwrap_or(TokenId([0; 8])), parsed_digest.unwrap_or(Digest([0; 32])));
        bad.into_result(Self { id, name, digest, expires_at: *expires_at })
    }

    /// A new token, and its text, which is not stored anywhere.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn create(name: Name, expires_at: Option<Timestamp>) -> Result<(Self, String), NoRandomness> {
        let (mut id, mut secret) = ([0; 8], [0; 32]);
        let random = SystemRandom::new();
        random.fill(&mut id).and_then(|()| random.fill(&mut secret)).map_err(|_| NoRandomness)?;
        let id = TokenId(id);
        let text = format!("{PREFIX}{id}_{}", Hex(&secret));
        Ok((Self { id, name, digest: Digest::of(text.as_bytes()), expires_at }, text))
    }
}

impl Bearer {
    /// Parses the text of a token.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
        bytes::<32>(secret)?;
        Some(Self { id: TokenId::parse(id)?, digest: Digest::of(text.as_bytes()) })
    }

    /// Parses [`Bearer::to_bytes`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (id, digest) = bytes.split_first_chunk()?;
        Some(Self { id: TokenId(*id), digest: Digest(digest.try_into().ok()?) })
    }

    /// The id and the digest. Whoever has them can't make the token, but a replica takes them from another one.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        [&self.id.0[..], &self.digest.0].concat()
    }

    /// True if it is the text of this token. Takes the same time wherever they differ.
    pub(super) fn is_of(&self, token: &Token) -> bool {
        self.id == token.id && verify_slices_are_equal(&self.digest.0, &token.digest.0).is_ok()
    }
}

impl TokenId {
    /// Parses 16 hexadecimal digits in lower case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        bytes(text).map(Self)
    }
}

impl Digest {
    /// The SHA-256 of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut of = [0; 32];
        of.copy_from_slice(digest(&SHA256, bytes).as_ref());
        Self(of)
    }

    /// Parses 64 hexadecimal digits in lower case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        bytes(text).map(Self)
    }
}

/// Bytes as hexadecimal digits in lower case.
pub(super) struct Hex<'a>(pub(super) &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Parses hexadecimal digits in lower case.
pub(super) fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let is_hex = text.len() == 2 * N && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    let mut bytes = [0; N];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2).filter(|_| is_hex)?, 16).ok()?;
    }
    Some(bytes)
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn create(name: &str) -> (Token, String) {
        Token::create(Name::parse(name).unwrap(), None).unwrap()
    }

    #[test]
    fn a_token_is_known_by_its_text_alone() {
        let ((one, text), (other, _)) = (create("a"), create("a"));
        assert_eq!(text.len(), 4 + 16 + 1 + 64, "{text}");
        let bearer = Bearer::parse(&text).unwrap();
        assert!(bearer.is_of(&one) && !bearer.is_of(&other));
        assert!(!format!("{one:?}{bearer:?}").contains(&text[21..]), "the secret is kept");
        assert_eq!(TokenId::parse(&one.id.to_string()), Some(one.id));
        assert_eq!(Digest::parse(&one.digest.to_string()), Some(one.digest));
        assert_eq!(
            Digest::of(b"abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "FIPS 180-2, B.1"
        );
    }

    proptest! {
        #[test]
        fn another_text_is_not_the_token(at in 0_usize..85, digit in "[0-9a-fA-F_ ]") {
            let (token, text) = create("a");
            let mut other = text.clone();
            other.replace_range(at..=at, &digit);
            let is_it = Bearer::parse(&other).is_some_and(|bearer| bearer.is_of(&token));
            prop_assert_eq!(is_it, other == text);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in "(orc_)?[0-9a-f]{0,17}_?[0-9a-f]{0,65}|.{0,99}") {
            let _ = Bearer::parse(&text);
        }
    }
}
