//! Proofs: that a log contains a leaf, and that it extends an earlier one.

use std::ops::Range;

use thiserror::Error;

use super::tree::{Hash, Node, fold};

/// The reason why a proof proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProofError {
    /// It does not lead to the root.
    #[error("the proof does not lead to the root of the log")]
    Mismatch,
    /// It is about a leaf or a log that the log can't contain.
    #[error("a log of size {size} does not reach to {claimed}")]
    TooShort {
        /// Number of leaves of the log.
        size: u64,
        /// The index of the leaf, or the size of the earlier log.
        claimed: u64,
    },
}

/// The subtrees whose hashes a proof consists of. Not all of them are complete: their hashes follow from [nodes](Node).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path(Vec<Range<u64>>);

impl Path {
    /// The path of a proof that the log of the first `size` leaves contains leaf `index`. Empty, as that of the only
    /// leaf, if the log does not reach to it.
    pub fn of_inclusion(index: u64, size: u64) -> Self {
        let mut beside = Vec::new();
        let mut range = 0..size;
        while index < size && range.end - range.start > 1 {
            let (left, right) = halves(&range);
            let (inside, outside) = if index < left.end { (left, right) } else { (right, left) };
            beside.push(outside);
            range = inside;
        }
        beside.reverse();
        Self(beside)
    }

    /// The path of a proof that the log of the first `size` leaves extends that of the first `earlier` ones. Empty, as
    /// between equal logs, if it can't.
    pub fn of_consistency(earlier: u64, size: u64) -> Self {
        let mut beside = Vec::new();
        let mut range = 0..size;
        // Down to the subtree that ends with the earlier log. It is left out if it is all of it: the verifier knows its
        // root.
        if (1..size).contains(&earlier) {
            while range.end != earlier {
                let (left, right) = halves(&range);
                let (inside, outside) = if earlier <= left.end { (left, right) } else { (right, left) };
                beside.push(outside);
                range = inside;
            }
            if range.start > 0 {
                beside.push(range);
            }
        }
        beside.reverse();
        Self(beside)
    }

    /// The nodes from which [`Self::hashes`] makes the proof. At most 64 for each of its hashes.
    pub fn nodes(&self) -> Vec<Node> {
        self.0.iter().cloned().flat_map(Node::of_range).collect()
    }

    /// The hashes of the proof, given those of its [nodes](Self::nodes) in their order.
    pub fn hashes(&self, nodes: &[Hash]) -> Vec<Hash> {
        let mut rest = nodes;
        let hash = |subtree: &Range<u64>| {
            let count = Node::of_range(subtree.clone()).count();
            let (own, others) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            rest = others;
            fold(own)
        };
        self.0.iter().map(hash).collect()
    }
}

/// A proof that a log contains a leaf (RFC 9162, section 2.1.3): the hashes beside the path from it to the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inclusion(pub Vec<Hash>);

impl Inclusion {
    /// Checks that the log of `size` leaves with this root contains the leaf (section 2.1.3.2).
    ///
    /// # Errors
    /// It does not prove this.
    pub fn verify(&self, index: u64, leaf: Hash, size: u64, root: Hash) -> Result<(), ProofError> {
        if index >= size {
            return Err(ProofError::TooShort { size, claimed: index });
        }
        let (mut position, mut last) = (index, size - 1);
        let mut hash = leaf;
        for beside in &self.0 {
            if last == 0 {
                return Err(ProofError::Mismatch);
            }
            if position & 1 == 1 || position == last {
                hash = Hash::of_children(*beside, hash);
                ascend(&mut position, &mut last);
            } else {
                hash = Hash::of_children(hash, *beside);
            }
            (position, last) = (position >> 1, last >> 1);
        }
        if last == 0 && hash == root { Ok(()) } else { Err(ProofError::Mismatch) }
    }
}

/// A proof that a log extends an earlier one (RFC 9162, section 2.1.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consistency(pub Vec<Hash>);

impl Consistency {
    /// Checks that the log of `size` leaves with this root extends the earlier one (section 2.1.4.2). A log without
    /// leaves is extended by every log.
    ///
    /// # Errors
    /// It does not prove this.
    pub fn verify(&self, (earlier, earlier_root): (u64, Hash), (size, root): (u64, Hash)) -> Result<(), ProofError> {
        if earlier > size {
            return Err(ProofError::TooShort { size, claimed: earlier });
        }
        if earlier == size || earlier == 0 {
            let same = earlier_root == if earlier == 0 { Hash::of_nothing() } else { root };
            return if same && self.0.is_empty() { Ok(()) } else { Err(ProofError::Mismatch) };
        }
        let known = earlier.is_power_of_two().then_some(earlier_root);
        let mut path = known.into_iter().chain(self.0.iter().copied());
        let Some(first) = path.next() else { return Err(ProofError::Mismatch) };
        let (mut position, mut last) = (earlier - 1, size - 1);
        let below = position.trailing_ones();
        (position, last) = (position >> below, last >> below);
        let (mut old, mut new) = (first, first);
        for beside in path {
            if last == 0 {
                return Err(ProofError::Mismatch);
            }
            if position & 1 == 1 || position == last {
                old = Hash::of_children(beside, old);
                new = Hash::of_children(beside, new);
                ascend(&mut position, &mut last);
            } else {
                new = Hash::of_children(new, beside);
            }
            (position, last) = (position >> 1, last >> 1);
        }
        if last == 0 && old == earlier_root && new == root { Ok(()) } else { Err(ProofError::Mismatch) }
    }
}

/// Ascends past the levels at which a node has no other beside it.
fn ascend(position: &mut u64, last: &mut u64) {
    while *position != 0 && *position & 1 == 0 {
        (*position, *last) = (*position >> 1, *last >> 1);
    }
}

/// The subtrees below that of a range of two leaves or more: the left one is the largest complete one that is smaller.
fn halves(range: &Range<u64>) -> (Range<u64>, Range<u64>) {
    let middle = range.start + (1 << (range.end - range.start - 1).ilog2());
    (range.start..middle, middle..range.end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::tree::{
            Frontier,
            tests::{Log, leaf},
        },
        *,
    };

    fn inclusion(index: u64, size: u64, log: &Log) -> Inclusion {
        let path = Path::of_inclusion(index, size);
        Inclusion(path.hashes(&log.read(&path.nodes())))
    }

    fn consistency(earlier: u64, size: u64, log: &Log) -> Consistency {
        let path = Path::of_consistency(earlier, size);
        Consistency(path.hashes(&log.read(&path.nodes())))
    }

    fn root(size: u64) -> Hash {
        Log::of(size).frontier.root()
    }

    #[test]
    fn a_log_contains_its_leaves_and_no_others() {
        let log = Log::of(40);
        for size in 1..=40 {
            for index in 0..size {
                let proof = inclusion(index, size, &log);
                assert_eq!(proof.verify(index, leaf(index), size, root(size)), Ok(()));
                assert_eq!(proof.verify(index, leaf(index + 1), size, root(size)), Err(ProofError::Mismatch));
                assert_eq!(proof.verify(index, leaf(index), size, root(size + 1)), Err(ProofError::Mismatch));
                for other in (0..size).filter(|other| *other != index) {
                    assert_eq!(proof.verify(other, leaf(index), size, root(size)), Err(ProofError::Mismatch));
                }
            }
        }
    }

    #[test]
    fn a_leaf_beyond_the_end_is_not_proved() {
        let proof = Inclusion(Vec::new());
        let error = proof.verify(1, leaf(1), 1, leaf(1));
        assert_eq!(error, Err(ProofError::TooShort { size: 1, claimed: 1 }));
    }

    #[test]
    fn a_log_extends_its_beginnings_and_no_others() {
        let log = Log::of(40);
        for size in 0..=40 {
            for earlier in 0..=size {
                let proof = consistency(earlier, size, &log);
                let (old, new) = ((earlier, root(earlier)), (size, root(size)));
                assert_eq!(proof.verify(old, new), Ok(()), "{earlier} of {size}");
                let forged = leaf(99);
                assert_eq!(proof.verify((earlier, forged), new), Err(ProofError::Mismatch));
                if earlier > 0 {
                    assert_eq!(proof.verify(old, (size, forged)), Err(ProofError::Mismatch));
                }
            }
        }
    }

    #[test]
    fn a_shorter_log_extends_no_longer_one() {
        let error = Consistency(Vec::new()).verify((2, root(2)), (1, root(1)));
        assert_eq!(error, Err(ProofError::TooShort { size: 1, claimed: 2 }));
    }

    /// A log after retention: the nodes of its beginning, and everything after it.
    #[test]
    fn proofs_of_what_is_kept_need_no_node_of_a_pruned_beginning() {
        let size = 40;
        for kept_from in 0..size {
            let roots = Frontier::nodes(kept_from);
            let is_kept = |node: &Node| node.number() >= Node::complete_with(kept_from) || roots.contains(node);
            for index in kept_from..size {
                assert!(Path::of_inclusion(index, size).nodes().iter().all(is_kept), "{index} from {kept_from}");
                assert!(Path::of_consistency(index, size).nodes().iter().all(is_kept), "{index} from {kept_from}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_proof_with_another_hash_proves_nothing(
            size in 2u64..200,
            index in any::<u64>(),
            place in any::<prop::sample::Index>(),
            change in 1u8..,
        ) {
            let (log, index) = (Log::of(size), index % size);
            let Inclusion(mut proof) = inclusion(index, size, &log);
            place.get_mut(&mut proof).0[7] ^= change;
            prop_assert!(Inclusion(proof).verify(index, leaf(index), size, log.frontier.root()).is_err());
        }

        #[test]
        fn a_proof_of_another_length_proves_nothing(size in 2u64..200, earlier in 1u64..200) {
            let log = Log::of(size);
            let earlier = earlier.min(size - 1);
            let (old, new) = ((earlier, root(earlier)), (size, root(size)));
            let Consistency(proof) = consistency(earlier, size, &log);
            let longer = [&proof[..], &[leaf(0)]].concat();
            prop_assert!(Consistency(longer).verify(old, new).is_err());
            prop_assert!(Consistency(proof[1..].to_vec()).verify(old, new).is_err());
        }
    }
}
