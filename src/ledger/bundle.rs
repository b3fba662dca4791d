//! The log in a file, in a form that anyone can verify: one JSON object a line. `docs/security.md` describes it for
//! those who write a verifier of their own.
//!
//! The first line has a checkpoint. Each further one is a [`Part`] of the log, in order and without a gap.

use std::ops::Range;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    note::{Checkpoint, NoteError, VerifyingKey},
    tree::{Frontier, Hash, Node},
};

/// A signed checkpoint, with the keys that are said to have signed it: the content of a pin. Whoever wants to be sure
/// of the keys has them from elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The text of the checkpoint.
    pub checkpoint: String,
    /// Public keys in their text form.
    #[serde(default)]
    pub keys: Vec<String>,
}

impl Pin {
    /// Reads its JSON form.
    ///
    /// # Errors
    /// The text has another form.
    pub fn from_json(text: &str) -> Result<Self, BundleError> {
        Ok(serde_json::from_str(text)?)
    }

    /// Its JSON form, in one line.
    ///
    /// # Errors
    /// None, in practice.
    pub fn to_json(&self) -> Result<String, BundleError> {
        Ok(serde_json::to_string(self)?)
    }

    /// The checkpoint, and the first of the keys that has signed it.
    ///
    /// # Errors
    /// None has: the error of the last one.
    pub fn open(&self) -> Result<(Checkpoint, VerifyingKey), NoteError> {
        let mut refused = NoteError::Key("there is none");
        for key in &self.keys {
            match key.parse().and_then(|key: VerifyingKey| Ok((key.open(&self.checkpoint)?, key))) {
                Ok(opened) => return Ok(opened),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

/// The first line of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The checkpoint of the log, and its keys.
    #[serde(flatten)]
    pub pin: Pin,
    /// The first leaf whose entry is wanted: hashes take the place of those before it.
    #[serde(default)]
    pub from_leaf: u64,
}

impl Head {
    /// Reads its JSON form.
    ///
    /// # Errors
    /// The text has another form.
    pub fn from_json(text: &str) -> Result<Self, BundleError> {
        Ok(serde_json::from_str(text)?)
    }

    /// Its JSON form, in one line.
    ///
    /// # Errors
    /// None, in practice.
    pub fn to_json(&self) -> Result<String, BundleError> {
        Ok(serde_json::to_string(self)?)
    }
}

/// A complete subtree of the log: an entry, or several ones of which only the hash is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which leaves it has.
    pub subtree: Node,
    /// Its entry or its hash.
    pub content: Content,
}

/// The content of a part of the log, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// The encoded `LogEntry` of its only leaf.
    Entry(Bytes),
    /// The hash of the subtree.
    Hash(Hash),
}

/// The JSON form of a part.
#[derive(Serialize, Deserialize)]
struct Line {
    first: u64,
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash: Option<String>,
}

impl Part {
    /// The entry of a leaf.
    pub fn entry(leaf: u64, entry: Bytes) -> Self {
        Self { subtree: Node::of_leaf(leaf), content: Content::Entry(entry) }
    }

    /// Its hash, which is computed from the bytes of an entry.
    pub fn hash(&self) -> Hash {
        match &self.content {
            Content::Entry(entry) => Hash::of_leaf([&entry[..]]),
            Content::Hash(hash) => *hash,
        }
    }

    /// Reads its JSON form.
    ///
    /// # Errors
    /// The text has another form, or there is no such subtree.
    pub fn from_json(text: &str) -> Result<Self, BundleError> {
        let Line { first, count, entry, hash } = serde_json::from_str(text)?;
        let bytes = |text: String| BASE64_STANDARD.decode(text).map_err(|_| BundleError::Form("bytes are not base64"));
        let content = match (entry, hash) {
            (Some(entry), None) if count == 1 => Content::Entry(bytes(entry)?.into()),
            (None, Some(hash)) => {
                let hash = bytes(hash)?.try_into().map_err(|_| BundleError::Form("a hash does not have 32 bytes"))?;
                Content::Hash(Hash(hash))
            }
            _ => return Err(BundleError::Form("a part has either an entry, with count 1, or a hash")),
        };
        let subtree = Node::of_leaves(first, count);
        Ok(Self { subtree: subtree.ok_or(BundleError::Form("first and count are not a complete subtree"))?, content })
    }

    /// Its JSON form, in one line.
    ///
    /// # Errors
    /// None, in practice.
    pub fn to_json(&self) -> Result<String, BundleError> {
        let Range { start, end } = self.subtree.leaves();
        let (entry, hash) = match &self.content {
            Content::Entry(entry) => (Some(BASE64_STANDARD.encode(entry)), None),
            Content::Hash(Hash(hash)) => (None, Some(BASE64_STANDARD.encode(hash))),
        };
        Ok(serde_json::to_string(&Line { first: start, count: end - start, entry, hash })?)
    }
}

/// Why a bundle, or a pin, proves nothing.
#[derive(Debug, Error)]
pub enum BundleError {
    /// It is not JSON of this form.
    #[error("it does not have the form of a bundle: {0}")]
    Json(#[from] serde_json::Error),
    /// A value has another form.
    #[error("it does not have the form of a bundle: {0}")]
    Form(&'static str),
    /// A part does not follow the one before.
    #[error("it goes on with leaf {found}, and leaf {expected} comes next")]
    Gap {
        /// The leaf after the last part.
        expected: u64,
        /// The first leaf of this part.
        found: u64,
    },
    /// The checkpoint has another size.
    #[error("its size is {found}, and that of its checkpoint {signed}")]
    Size {
        /// Number of leaves of all parts.
        found: u64,
        /// Number of leaves of the checkpoint.
        signed: u64,
    },
    /// The checkpoint has another root.
    #[error("its entries do not have the root that its checkpoint has: something in it was changed")]
    Root,
    /// The earlier checkpoint is of another log.
    #[error("it is of the log {found}, and the earlier checkpoint of {earlier}")]
    Origin {
        /// The name of its log.
        found: String,
        /// The name of the log of the earlier checkpoint.
        earlier: String,
    },
    /// The earlier checkpoint has more entries.
    #[error("its size is {found}, and that of the earlier checkpoint {earlier}: the last entries are missing")]
    Shorter {
        /// Number of leaves of all parts.
        found: u64,
        /// Number of leaves of the earlier checkpoint.
        earlier: u64,
    },
    /// The earlier checkpoint has another root.
    #[error(
        "up to size {0}, it does not have the root that the earlier checkpoint has: the history was changed since, and \
         signed anew"
    )]
    Rewritten(u64),
    /// The end of the earlier log lies inside of a part.
    #[error(
        "it can't be compared with the earlier checkpoint of size {0}: the last entries up to there are replaced by \
         hashes"
    )]
    NotCompared(u64),
}

/// Verifies a log that is given in parts: against its checkpoint, and if there is an earlier one, that the log extends
/// that of the earlier one.
#[derive(Debug)]
pub struct LogVerifier {
    checkpoint: Checkpoint,
    earlier: Option<Checkpoint>,
    tree: Frontier,
}

impl LogVerifier {
    /// Begins. The signatures of both checkpoints were verified.
    ///
    /// # Errors
    /// They are not of the same log.
    pub fn new(checkpoint: Checkpoint, earlier: Option<Checkpoint>) -> Result<Self, BundleError> {
        if let Some(earlier) = earlier.as_ref().filter(|earlier| earlier.origin != checkpoint.origin) {
            return Err(BundleError::Origin { found: checkpoint.origin, earlier: earlier.origin.clone() });
        }
        let mut verifier = Self { checkpoint, earlier, tree: Frontier::default() };
        verifier.compare()?;
        Ok(verifier)
    }

    /// Adds the next part.
    ///
    /// # Errors
    /// It does not follow the one before, or the log does not extend the earlier one.
    pub fn add(&mut self, part: &Part) -> Result<(), BundleError> {
        let Range { start: found, end } = part.subtree.leaves();
        let expected = self.tree.size();
        if found != expected {
            return Err(BundleError::Gap { expected, found });
        }
        if end > self.checkpoint.size {
            return Err(BundleError::Size { found: end, signed: self.checkpoint.size });
        }
        self.tree.append_subtree(part.subtree, part.hash());
        self.compare()
    }

    /// Ends, after the last part.
    ///
    /// # Errors
    /// The parts are not the log of the checkpoint, or it can't be compared with the earlier one.
    pub fn end(self) -> Result<(), BundleError> {
        let Self { checkpoint: Checkpoint { size: signed, root, .. }, earlier, tree } = self;
        let found = tree.size();
        if found != signed {
            return Err(BundleError::Size { found, signed });
        }
        if tree.root() != root {
            return Err(BundleError::Root);
        }
        match earlier {
            Some(Checkpoint { size: earlier, .. }) if earlier > found => Err(BundleError::Shorter { found, earlier }),
            Some(Checkpoint { size, .. }) => Err(BundleError::NotCompared(size)),
            None => Ok(()),
        }
    }

    /// Compares the log so far with the earlier one, if that has the same size.
    fn compare(&mut self) -> Result<(), BundleError> {
        match self.earlier.take_if(|earlier| earlier.size == self.tree.size()) {
            Some(Checkpoint { size, root, .. }) if root != self.tree.root() => Err(BundleError::Rewritten(size)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Signer;

    fn entry(leaf: u64) -> Bytes {
        vec![0x0a, 1, u8::try_from(leaf).unwrap()].into()
    }

    /// The log of these first leaves.
    fn checkpoint(leaves: u64) -> Checkpoint {
        let mut tree = Frontier::default();
        for leaf in 0..leaves {
            tree.append(Part::entry(leaf, entry(leaf)).hash());
        }
        Checkpoint { origin: "log".to_owned(), size: leaves, root: tree.root() }
    }

    /// The same leaves, of which 4 to 7 are replaced by their hash.
    fn parts(leaves: u64) -> Vec<Part> {
        let mut tree = Frontier::default();
        let nodes: Vec<_> = (4..8).map(|leaf| Part::entry(leaf, entry(leaf)).hash()).collect();
        for node in nodes {
            tree.append(node);
        }
        let replaced = Part { subtree: Node::of_leaves(4, 4).unwrap(), content: Content::Hash(tree.root()) };
        let before = (0..4).map(|leaf| Part::entry(leaf, entry(leaf)));
        before.chain([replaced]).chain((8..leaves).map(|leaf| Part::entry(leaf, entry(leaf)))).collect()
    }

    fn verify(parts: &[Part], checkpoint: Checkpoint, earlier: Option<Checkpoint>) -> Result<(), String> {
        let verify = || {
            let mut verifier = LogVerifier::new(checkpoint, earlier)?;
            parts.iter().try_for_each(|part| verifier.add(part))?;
            verifier.end()
        };
        verify().map_err(|error: BundleError| error.to_string())
    }

    #[test]
    fn a_log_in_parts_is_verified_by_its_checkpoint_and_by_each_earlier_one() {
        for size in 8..20 {
            assert_eq!(verify(&parts(size), checkpoint(size), None), Ok(()));
            for earlier in 0..=size {
                let found = verify(&parts(size), checkpoint(size), Some(checkpoint(earlier)));
                match earlier {
                    5..8 => assert!(found.unwrap_err().contains("replaced by hashes")),
                    _ => assert_eq!(found, Ok(())),
                }
            }
        }
    }

    #[test]
    fn each_change_of_a_log_in_parts_is_noticed() {
        let whole = parts(13);
        for place in 0..whole.len() {
            let mut changed = whole.clone();
            match &mut changed[place].content {
                Content::Entry(bytes) => *bytes = entry(99),
                Content::Hash(hash) => hash.0[3] ^= 1,
            }
            assert!(verify(&changed, checkpoint(13), None).unwrap_err().contains("something in it was changed"));
            let mut without = whole.clone();
            without.remove(place);
            assert!(verify(&without, checkpoint(13), None).is_err(), "without {place}");
            if place > 0 {
                let mut swapped = whole.clone();
                swapped.swap(place - 1, place);
                assert!(verify(&swapped, checkpoint(13), None).unwrap_err().contains("comes next"));
            }
        }
        let longer = verify(&parts(14), checkpoint(13), None).unwrap_err();
        assert_eq!(longer, "its size is 14, and that of its checkpoint 13");
    }

    #[test]
    fn a_log_that_does_not_extend_the_earlier_one_is_noticed() {
        let forged = Checkpoint { root: Hash([7; 32]), ..checkpoint(9) };
        assert!(verify(&parts(13), checkpoint(13), Some(forged)).unwrap_err().contains("signed anew"));
        let longer = verify(&parts(13), checkpoint(13), Some(checkpoint(14))).unwrap_err();
        assert!(longer.contains("the last entries are missing"), "{longer}");
        let other = Checkpoint { origin: "other".into(), ..checkpoint(9) };
        assert!(verify(&parts(13), checkpoint(13), Some(other)).unwrap_err().contains("of the log log"));
        let empty = Checkpoint { root: Hash([7; 32]), ..checkpoint(0) };
        assert!(verify(&parts(13), checkpoint(13), Some(empty)).is_err());
    }

    #[test]
    fn parts_have_a_text_form() {
        for part in parts(13) {
            assert_eq!(Part::from_json(&part.to_json().unwrap()).unwrap(), part);
        }
        assert_eq!(Part::entry(7, entry(2)).to_json().unwrap(), r#"{"first":7,"count":1,"entry":"CgEC"}"#);
        let hash = BASE64_STANDARD.encode([7; 32]);
        for wrong in [
            "",
            "{}",
            r#"{"first":0,"count":1}"#,
            r#"{"first":0,"count":2,"entry":"CgEC"}"#,
            r#"{"first":0,"count":1,"entry":"?"}"#,
            r#"{"first":0,"count":1,"hash":"CgEC"}"#,
            &format!(r#"{{"first":1,"count":2,"hash":"{hash}"}}"#),
            &format!(r#"{{"first":0,"count":3,"hash":"{hash}"}}"#),
            &format!(r#"{{"first":0,"count":0,"hash":"{hash}"}}"#),
            &format!(r#"{{"first":9223372036854775808,"count":9223372036854775808,"hash":"{hash}"}}"#),
            &format!(r#"{{"first":0,"count":1,"entry":"CgEC","hash":"{hash}"}}"#),
        ] {
            assert!(Part::from_json(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_pin_is_opened_by_one_of_its_keys() {
        let [signer, other] = ["log", "other"].map(|name| Signer::generate(name).unwrap());
        let keys = [&other, &signer].map(|signer| signer.keys[0].verifying().to_string());
        let pin = Pin { checkpoint: signer.sign(1, Hash([7; 32])), keys: keys.to_vec() };
        let (opened, key) = pin.open().unwrap();
        assert_eq!((opened.size, &key), (1, signer.keys[0].verifying()));
        assert_eq!(Pin::from_json(&pin.to_json().unwrap()).unwrap(), pin);
        let head = Head { pin: pin.clone(), from_leaf: 7 };
        let text = head.to_json().unwrap();
        assert_eq!((Head::from_json(&text).unwrap(), Pin::from_json(&text).unwrap()), (head, pin.clone()));
        assert!(Pin { keys: vec![keys[0].clone()], ..pin.clone() }.open().is_err());
        assert!(Pin { keys: Vec::new(), ..pin }.open().is_err());
    }
}
