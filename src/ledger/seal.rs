//! Seals: keyed digests of what a store holds beside the log, and of the end of the log itself. A program that can
//! write to the store but does not have the key can't make them. Only the process that has the key checks them, so they
//! are no signatures.

use std::borrow::Cow;

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    hmac::{Context, Key, Tag},
};

use super::{
    Frontier, Hash,
    digest::derive,
    note::{Signer, SigningKey},
};

/// Makes and checks seals: HMAC-SHA-256 (RFC 2104) with a key that is derived from each key of a log.
#[derive(Clone, Debug)]
pub struct SealKeys {
    origin: String,
    /// The first one seals, and all verify.
    keys: Vec<Key>,
}

/// The key that made a seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealedBy {
    /// The one that seals.
    FirstKey,
    /// A later one in the list, which is being replaced.
    OtherKey,
}

/// The sealed pieces. Their number and lengths are sealed as well.
type Pieces<'a> = [Cow<'a, [u8]>];

impl SealKeys {
    /// The purpose of the derived keys.
    const INFO: &[u8] = b"orchestrator: seals of a store";

    /// The keys for the store of this log.
    pub fn of(signer: &Signer) -> Self {
        Self::new(&signer.origin, &signer.keys)
    }

    /// The keys for the store of the log of this name.
    pub fn new(origin: &str, keys: &[SigningKey]) -> Self {
        Self { origin: origin.to_owned(), keys: keys.iter().map(|key| derive(key.seed(), Self::INFO)).collect() }
    }

    /// The seal of these pieces.
    pub fn seal(&self, pieces: &Pieces<'_>) -> [u8; Hash::LEN] {
        let mut seal = [0; Hash::LEN];
        if let Some(key) = self.keys.first() {
            seal.copy_from_slice(tag(key, pieces).as_ref());
        }
        seal
    }

    /// The key that made this seal of these pieces; `None` if none did.
    pub fn check(&self, pieces: &Pieces<'_>, seal: &[u8]) -> Option<SealedBy> {
        let is_by = |key: &Key| verify_slices_are_equal(tag(key, pieces).as_ref(), seal).is_ok();
        let by = self.keys.iter().position(is_by)?;
        Some(if by == 0 { SealedBy::FirstKey } else { SealedBy::OtherKey })
    }

    /// The pieces of the end of the log: its origin, its size and its root.
    pub fn pieces_of<'a>(&'a self, log: &Frontier) -> [Cow<'a, [u8]>; 3] {
        let (size, root) = (log.size().to_be_bytes().to_vec(), log.root().0.to_vec());
        [self.origin.as_bytes().into(), size.into(), root.into()]
    }
}

/// The authentication code of the pieces, each after its length.
fn tag(key: &Key, pieces: &Pieces<'_>) -> Tag {
    let mut context = Context::with_key(key);
    for piece in pieces {
        context.update(&(piece.len() as u64).to_be_bytes());
        context.update(piece);
    }
    context.sign()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::SigningKey;

    fn keys(origin: &str, seeds: &[u8]) -> SealKeys {
        let keys = seeds.iter().map(|seed| SigningKey::of_seed("o", [*seed; 32]).unwrap()).collect();
        SealKeys::of(&Signer { origin: origin.into(), keys })
    }

    fn pieces<const N: usize>(texts: [&str; N]) -> [Cow<'_, [u8]>; N] {
        texts.map(|text| text.as_bytes().into())
    }

    #[test]
    fn the_first_key_seals_and_each_one_verifies() {
        let (old, both, other) = (keys("o", &[1]), keys("o", &[2, 1]), keys("o", &[3]));
        let pieces = pieces(["a", "b"]);
        let seal = old.seal(&pieces);
        assert_eq!(old.check(&pieces, &seal), Some(SealedBy::FirstKey));
        assert_eq!(both.check(&pieces, &seal), Some(SealedBy::OtherKey));
        assert_eq!(both.check(&pieces, &both.seal(&pieces)), Some(SealedBy::FirstKey));
        assert_eq!(other.check(&pieces, &seal), None);
        assert_eq!(old.check(&pieces, &seal[..31]), None);
        assert_eq!(keys("o", &[]).check(&pieces, &[0; 32]), None);
    }

    #[test]
    fn the_limits_of_pieces_are_sealed() {
        let keys = keys("o", &[1]);
        let seal = keys.seal(&pieces(["a", "bc"]));
        assert_eq!(keys.check(&pieces(["ab", "c"]), &seal), None);
        assert_eq!(keys.check(&pieces(["a", "bc", ""]), &seal), None);
        assert_eq!(keys.check(&pieces(["abc"]), &seal), None);
    }

    #[test]
    fn the_end_of_a_log_is_sealed_with_its_origin() {
        let (one, other) = (keys("one", &[1]), keys("other", &[1]));
        let mut log = Frontier::default();
        let empty = one.seal(&one.pieces_of(&log));
        log.append(Hash([7; 32]));
        let seal = one.seal(&one.pieces_of(&log));
        assert_eq!(one.check(&one.pieces_of(&log), &seal), Some(SealedBy::FirstKey));
        assert_eq!(one.check(&one.pieces_of(&log), &empty), None);
        assert_eq!(other.check(&other.pieces_of(&log), &seal), None);
    }
}
