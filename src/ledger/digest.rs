//! Digests of requests in audit events, and of registrations in etags. They are keyed: readers of an event or an etag
//! could otherwise guess a small secret in a request or in parameters, and recognize it by its hash.

use aws_lc_rs::hmac::{HMAC_SHA256, Key, sign};

use super::{Hash, note::Signer};

/// Makes keyed digests: HMAC-SHA-256 with a key that is derived from the first key of a log.
#[derive(Debug)]
pub struct DigestKey(Key);

impl DigestKey {
    /// The purpose of the derived key.
    const INFO: &[u8] = b"orchestrator: digests of requests";

    /// Derives the key of this log.
    pub fn of(signer: &Signer) -> Self {
        Self(derive(signer.keys.first().map_or(&[][..], |key| key.seed()), Self::INFO))
    }

    /// The digest of these bytes.
    pub fn digest(&self, bytes: &[u8]) -> [u8; Hash::LEN] {
        let mut digest = [0; Hash::LEN];
        digest.copy_from_slice(sign(&self.0, bytes).as_ref());
        digest
    }
}

/// The key for a purpose, from a secret, by HKDF-Expand (RFC 5869, section 2.3). The secret is random, so it needs no
/// extraction (section 3.3).
pub(super) fn derive(secret: &[u8], purpose: &[u8]) -> Key {
    let first_block = [purpose, &[1]].concat();
    Key::new(HMAC_SHA256, sign(&Key::new(HMAC_SHA256, secret), &first_block).as_ref())
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::hkdf::{HKDF_SHA256, Prk};

    use super::*;
    use crate::ledger::SigningKey;

    #[test]
    fn the_key_is_that_of_hkdf() {
        let signer = |seed| Signer { origin: "o".into(), keys: vec![SigningKey::of_seed("o", [seed; 32]).unwrap()] };
        let expected = Prk::new_less_safe(HKDF_SHA256, &[7; 32]);
        let expected = Key::from(expected.expand(&[DigestKey::INFO], HMAC_SHA256).unwrap());
        let digest = DigestKey::of(&signer(7)).digest(b"request");
        assert_eq!(digest, sign(&expected, b"request").as_ref());
        assert_ne!(digest, DigestKey::of(&signer(8)).digest(b"request"));
    }
}
