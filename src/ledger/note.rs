//! Checkpoints: a log's size and root, signed. The text is a C2SP checkpoint (<https://c2sp.org/tlog-checkpoint>) in a
//! signed note (<https://c2sp.org/signed-note>), with keys in the text form of Go's `golang.org/x/mod/sumdb/note`.

use std::{fmt, str::FromStr};

use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
    signature::{ED25519, ED25519_PUBLIC_KEY_LEN, Ed25519KeyPair, KeyPair, ParsedPublicKey},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use thiserror::Error;

use super::tree::Hash;

/// The kind of all our keys and signatures.
const ED25519_KIND: u8 = 1;

/// The size and the root of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The name of the log, which no other log has.
    pub origin: String,
    /// Number of leaves.
    pub size: u64,
    /// The hash of the root.
    pub root: Hash,
}

impl Checkpoint {
    /// The checkpoint in a signed text whose signatures nobody has verified.
    ///
    /// # Errors
    /// The text is not a checkpoint.
    pub fn unverified(text: &str) -> Result<Self, NoteError> {
        VerifyingKey::parse(text)
    }
}

/// The reason why a text is not a checkpoint of a key, or not a key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NoteError {
    /// The text does not have the form of a key.
    #[error("not a key: {0}")]
    Key(&'static str),
    /// The text does not have the form of a signed checkpoint.
    #[error("not a checkpoint: {0}")]
    Checkpoint(&'static str),
    /// No signature is by the key.
    #[error("it is not signed by the key {0}")]
    NotSigned(String),
    /// The signature by the key is not one of this text.
    #[error("the signature by the key {0} does not belong to this text")]
    Forged(String),
}

/// Signs the checkpoints of one log.
#[derive(Debug)]
pub struct Signer {
    /// The name of the log, which no other log has. One line.
    pub origin: String,
    /// The keys, each of which signs.
    pub keys: Vec<SigningKey>,
}

impl Signer {
    /// A signer with these keys. Without a name, the log has that of the first key.
    pub fn of(origin: Option<String>, keys: Vec<SigningKey>) -> Self {
        let name = || keys.first().map(|key| key.verifying().name().to_owned()).unwrap_or_default();
        Self { origin: origin.unwrap_or_else(name), keys }
    }

    /// A signer with a new key of the same name as the log.
    ///
    /// # Errors
    /// As [`SigningKey::generate`].
    pub fn generate(origin: &str) -> Result<Self, NoteError> {
        Ok(Self { origin: origin.to_owned(), keys: vec![SigningKey::generate(origin)?] })
    }

    /// The signed checkpoint of the log of this size, with this root.
    pub fn sign(&self, size: u64, root: Hash) -> String {
        SigningKey::sign(&Checkpoint { origin: self.origin.clone(), size, root }, &self.keys)
    }
}

/// Signs checkpoints.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    seed: [u8; SigningKey::SEED],
    verifying: VerifyingKey,
}

impl SigningKey {
    /// Length of the secret in bytes.
    pub const SEED: usize = 32;
    const PREFIX: &str = "PRIVATE+KEY+";

    /// A new key, by the randomness of the system. White space and `+` in its name become `-`.
    ///
    /// # Errors
    /// The system gives no randomness, or the name is empty.
    pub fn generate(name: &str) -> Result<Self, NoteError> {
        let mut seed = [0; Self::SEED];
        rand::fill(&mut seed).map_err(|_| NoteError::Key("the system gives no randomness"))?;
        Self::of_seed(&name.replace(|c: char| c.is_whitespace() || c == '+', "-"), seed)
    }

    /// The key of a secret, which must be random.
    ///
    /// # Errors
    /// `name` is empty, or has a space or a `+`.
    pub fn of_seed(name: &str, seed: [u8; Self::SEED]) -> Result<Self, NoteError> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| NoteError::Key("its secret is refused"))?;
        let verifying = VerifyingKey::of(name, pair.public_key().as_ref())?;
        Ok(Self { pair, seed, verifying })
    }

    /// The secret, from which other keys are derived.
    pub(super) fn seed(&self) -> &[u8] {
        &self.seed
    }

    /// The key with which others verify.
    pub fn verifying(&self) -> &VerifyingKey {
        &self.verifying
    }

    /// The secret form, for the file of the key.
    pub fn to_secret(&self) -> String {
        let VerifyingKey { name, id, .. } = &self.verifying;
        let secret = BASE64_STANDARD.encode([&[ED25519_KIND][..], &self.seed].concat());
        format!("{}{name}+{:08x}+{secret}", Self::PREFIX, u32::from_be_bytes(*id))
    }

    /// The signed text of a checkpoint, with one signature for each key.
    pub fn sign<'a>(checkpoint: &Checkpoint, keys: impl IntoIterator<Item = &'a Self>) -> String {
        let Checkpoint { origin, size, root } = checkpoint;
        let body = format!("{origin}\n{size}\n{}\n", BASE64_STANDARD.encode(root.0));
        let signatures = keys.into_iter().map(|key| {
            let VerifyingKey { name, id, .. } = &key.verifying;
            let signature = [&id[..], key.pair.sign(body.as_bytes()).as_ref()].concat();
            format!("{}{name} {}\n", VerifyingKey::SIGNATURE, BASE64_STANDARD.encode(signature))
        });
        format!("{body}\n{}", signatures.collect::<String>())
    }
}

impl FromStr for SigningKey {
    type Err = NoteError;

    /// Parses the secret form. White space around it is ignored.
    fn from_str(text: &str) -> Result<Self, NoteError> {
        let parts =
            text.trim().strip_prefix(Self::PREFIX).ok_or(NoteError::Key("it does not begin with PRIVATE+KEY+"))?;
        let (name, id, seed) = split_key(parts)?;
        let seed = seed.try_into().map_err(|_| NoteError::Key("its secret has a wrong length"))?;
        let key = Self::of_seed(name, seed)?;
        if key.verifying.id == id { Ok(key) } else { Err(NoteError::Key("its id does not belong to its secret")) }
    }
}

/// Without the secret.
impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.verifying)
    }
}

/// Verifies checkpoints. Its text form is public.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyingKey {
    name: String,
    id: [u8; 4],
    key: [u8; ED25519_PUBLIC_KEY_LEN],
}

impl VerifyingKey {
    /// The beginning of a line with a signature.
    const SIGNATURE: &str = "\u{2014} ";
    /// Most bytes of a signed text: enough for the signatures of a few dozen keys.
    const MAX_TEXT: usize = 16 << 10;

    fn of(name: &str, key: &[u8]) -> Result<Self, NoteError> {
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '+') {
            return Err(NoteError::Key("its name is empty, or has a space or a +"));
        }
        let key = <[u8; _]>::try_from(key).map_err(|_| NoteError::Key("it has a wrong length"))?;
        let text = [name.as_bytes(), &[b'\n', ED25519_KIND], &key[..]].concat();
        let hash = digest(&SHA256, &text);
        let id = hash.as_ref().first_chunk().copied().unwrap_or_default();
        Ok(Self { name: name.to_owned(), id, key })
    }

    /// Opens a signed checkpoint, if this key signed it. Signatures by other keys are ignored.
    ///
    /// # Errors
    /// The text is not a signed checkpoint, or this key has not signed it.
    pub fn open(&self, text: &str) -> Result<Checkpoint, NoteError> {
        if text.len() > Self::MAX_TEXT {
            return Err(NoteError::Checkpoint("it is too long"));
        }
        let (body, signatures) =
            text.rsplit_once("\n\n").ok_or(NoteError::Checkpoint("it has no empty line before its signatures"))?;
        let body = &text[..=body.len()];
        let signatures = signatures.strip_suffix('\n').ok_or(NoteError::Checkpoint("its last line has no end"))?;
        let mut own = None;
        for line in signatures.split('\n') {
            let parsed = split_signature(line).ok_or(NoteError::Checkpoint("it has a line that is no signature"))?;
            let (name, id, signature) = parsed;
            if name == self.name && id == self.id {
                own = own.or(Some(signature));
            }
        }
        let signature = own.ok_or_else(|| NoteError::NotSigned(self.to_string()))?;
        let forged = || NoteError::Forged(self.to_string());
        let key = ParsedPublicKey::new(&ED25519, self.key).map_err(|_| forged())?;
        key.verify_sig(body.as_bytes(), &signature).map_err(|_| forged())?;
        Self::parse(body)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn parse(body: &str) -> Result<Checkpoint, NoteError> {
        let mut lines = body.lines();
        let mut line = || lines.next().filter(|line| !line.is_empty()).ok_or(NoteError::Checkpoint("it is too short"));
        let (origin, size, root) = (line()?, line()?, line()?);
        let number = size.parse().ok().filter(|number: &u64| number.to_string() == size);
        let root = BASE64_STANDARD.decode(root).ok().and_then(|root| root.try_into().ok());
        Ok(Checkpoint {
            origin: origin.to_owned(),
            size: number.ok_or(NoteError::Checkpoint("its second line is not a size"))?,
            root: Hash(root.ok_or(NoteError::Checkpoint("its third line is not a hash"))?),
        })
    }
}

impl fmt::Display for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = BASE64_STANDARD.encode([&[ED25519_KIND][..], &self.key].concat());
        write!(f, "{}+{:08x}+{key}", self.name, u32::from_be_bytes(self.id))
    }
}

impl FromStr for VerifyingKey {
    type Err = NoteError;

    fn from_str(text: &str) -> Result<Self, NoteError> {
        let (name, id, key) = split_key(text.trim())?;
        let key = Self::of(name, &key)?;
        if key.id == id { Ok(key) } else { Err(NoteError::Key("its id does not belong to it")) }
    }
}

/// The name and the id of a key, and the signature, of a line.
fn split_signature(line: &str) -> Option<(&str, [u8; 4], Vec<u8>)> {
    let (name, signature) = line.strip_prefix(VerifyingKey::SIGNATURE)?.split_once(' ')?;
    let signature = BASE64_STANDARD.decode(signature).ok()?;
    let (id, signature) = signature.split_first_chunk()?;
    Some((name, *id, signature.to_vec()))
}

/// The name, the id and the bytes of a key's text.
fn split_key(text: &str) -> Result<(&str, [u8; 4], Vec<u8>), NoteError> {
    const FORM: NoteError = NoteError::Key("its form is not NAME+ID+KEY");
    let (name, rest) = text.split_once('+').ok_or(FORM)?;
    let (id, key) = rest.split_once('+').ok_or(FORM)?;
    let id = u32::from_str_radix(id, 16).ok().filter(|number| format!("{number:08x}") == id).ok_or(FORM)?;
    let key = BASE64_STANDARD.decode(key).map_err(|_| NoteError::Key("it is not base64"))?;
    match key.split_first() {
        Some((&ED25519_KIND, key)) => Ok((name, id.to_be_bytes(), key.to_vec())),
        _ => Err(NoteError::Key("it is not an Ed25519 key")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str, secret: u8) -> SigningKey {
        SigningKey::of_seed(name, [secret; SigningKey::SEED]).unwrap()
    }

    fn checkpoint() -> Checkpoint {
        Checkpoint { origin: "example.org/log".to_owned(), size: 42, root: Hash([7; 32]) }
    }

    #[test]
    fn a_checkpoint_is_opened_by_the_keys_that_signed_it() {
        let (old, new) = (key("old", 1), key("new", 2));
        let text = SigningKey::sign(&checkpoint(), [&old, &new]);
        assert_eq!(old.verifying().open(&text), Ok(checkpoint()));
        assert_eq!(new.verifying().open(&text), Ok(checkpoint()));
        let other = key("old", 3);
        assert_eq!(other.verifying().open(&text), Err(NoteError::NotSigned(other.verifying().to_string())));
    }

    #[test]
    fn a_changed_checkpoint_is_refused() {
        let key = key("old", 1);
        let text = SigningKey::sign(&checkpoint(), [&key]);
        let forged = Err(NoteError::Forged(key.verifying().to_string()));
        assert_eq!(key.verifying().open(&text.replace("\n42\n", "\n43\n")), forged);
        assert_eq!(key.verifying().open(&text.replace("example", "Example")), forged);
        assert!(key.verifying().open(&text.replace("\n\n", "\nmore\n\n")).is_err());
        for wrong in ["", "\n\n", &text[..text.len() - 1], &format!("{text}more\n"), &text.replacen(" old ", " ", 1)] {
            assert!(key.verifying().open(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn keys_have_a_text_form() {
        let signing = key("example.org/log", 1);
        let text = signing.verifying().to_string();
        assert_eq!(text.parse::<VerifyingKey>().as_ref(), Ok(signing.verifying()));
        assert_eq!(signing.to_secret().parse::<SigningKey>().unwrap().verifying(), signing.verifying());
        assert!(!format!("{signing:?}").contains(&signing.to_secret()));
        for wrong in ["", "a", "a+b", "a+00000000+AQ==", &text.replacen("example", "other", 1), &signing.to_secret()] {
            assert!(wrong.parse::<VerifyingKey>().is_err(), "{wrong}");
        }
        let new = SigningKey::generate("a +b/c").unwrap();
        assert_eq!(new.verifying().name(), "a--b/c");
        assert_ne!(new.to_secret(), SigningKey::generate("a +b/c").unwrap().to_secret());
        for name in ["", "a b", "a+b", "a\n"] {
            assert!(SigningKey::of_seed(name, [1; SigningKey::SEED]).is_err(), "{name:?}");
        }
    }
}
