//! Seals: keyed digests of what a store holds beside the log, and of the end of the log itself. A program that can
//! write to the store but does not have the key can't make them. Only the process that has the key checks them, so they
//! are no signatures.

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    hmac::{self, Key},
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

/// The bytes that a seal covers: pieces, each after its length, so that their number and their limits are sealed as
/// well.
#[derive(Debug, Default)]
pub struct Sealed(Vec<u8>);

impl Sealed {
    /// Removes all pieces, for others.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds a piece.
    pub fn add(&mut self, piece: &[u8]) {
        self.0.extend((piece.len() as u64).to_be_bytes());
        self.0.extend(piece);
    }
}

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

    /// The seal.
    pub fn seal(&self, sealed: &Sealed) -> [u8; Hash::LEN] {
        let mut seal = [0; Hash::LEN];
        if let Some(key) = self.keys.first() {
            seal.copy_from_slice(hmac::sign(key, &sealed.0).as_ref());
        }
        seal
    }

    /// The key that made this seal; `None` if none did.
    pub fn check(&self, sealed: &Sealed, seal: &[u8]) -> Option<SealedBy> {
        let is_by = |key: &Key| verify_slices_are_equal(hmac::sign(key, &sealed.0).as_ref(), seal).is_ok();
        let by = self.keys.iter().position(is_by)?;
        Some(if by == 0 { SealedBy::FirstKey } else { SealedBy::OtherKey })
    }

    /// Adds the end of the log: its origin, its size and its root.
    pub fn add_end(&self, sealed: &mut Sealed, log: &Frontier) {
        sealed.add(self.origin.as_bytes());
        sealed.add(&log.size().to_be_bytes());
        sealed.add(&log.root().0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::SigningKey;

    fn keys(origin: &str, seeds: &[u8]) -> SealKeys {
        let keys = seeds.iter().map(|seed| SigningKey::of_seed("o", [*seed; 32]).unwrap()).collect();
        SealKeys::of(&Signer { origin: origin.into(), keys })
    }

    fn end(keys: &SealKeys, log: &Frontier) -> Sealed {
        let mut sealed = Sealed::default();
        keys.add_end(&mut sealed, log);
        sealed
    }

    fn pieces<const N: usize>(texts: [&str; N]) -> Sealed {
        let mut sealed = Sealed::default();
        for text in texts {
            sealed.add(text.as_bytes());
        }
        sealed
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
        let empty = one.seal(&end(&one, &log));
        log.append(Hash([7; 32]));
        let seal = one.seal(&end(&one, &log));
        assert_eq!(one.check(&end(&one, &log), &seal), Some(SealedBy::FirstKey));
        assert_eq!(one.check(&end(&one, &log), &empty), None);
        assert_eq!(other.check(&end(&other, &log), &seal), None);
    }
}
