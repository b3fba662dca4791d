//! Leaves that belong to a log, by hashes that may have been changed.

use std::collections::HashMap;

use super::tree::{Frontier, Hash, Node};

/// The nodes of a log that were proved to belong to it, by its frontier, which is known. Leaves beside each other are
/// proved by few hashes.
#[derive(Debug)]
pub struct Proven {
    /// By their numbers.
    nodes: HashMap<u64, Hash>,
    size: u64,
}

impl Proven {
    /// Those of the frontier of the log.
    pub fn of(log: &Frontier) -> Self {
        let nodes =
            Frontier::nodes(log.size()).into_iter().map(Node::number).zip(log.roots().iter().copied()).collect();
        Self { nodes, size: log.size() }
    }

    /// True if the log has this hash as this leaf, and the stored hashes of the nodes above it are right as well: once
    /// retention has removed all below a node, its hash is all that is left, and a wrong one would be so for good.
    /// `stored` gives the hash of a node that is not proved yet, if it is there.
    ///
    /// # Errors
    /// Those of `stored`.
    pub fn has<E>(
        &mut self,
        leaf: u64,
        mut hash: Hash,
        mut stored: impl FnMut(Node) -> Result<Option<Hash>, E>,
    ) -> Result<bool, E> {
        if leaf >= self.size {
            return Ok(false);
        }
        let (mut node, mut climbed) = (Node::of_leaf(leaf), Vec::new());
        let proven = loop {
            if let Some(proven) = self.nodes.get(&node.number()) {
                break *proven;
            }
            let beside = node.beside();
            let (own, Some(other)) = (stored(node)?, stored(beside)?) else { return Ok(false) };
            if own != Some(hash) {
                return Ok(false);
            }
            climbed.extend([(node.number(), hash), (beside.number(), other)]);
            hash = if node.is_left() { Hash::of_children(hash, other) } else { Hash::of_children(other, hash) };
            // Each leaf is below a node of the frontier.
            node = node.above();
        };
        if proven == hash {
            self.nodes.extend(climbed);
        }
        Ok(proven == hash)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_leaf_is_proved_unless_a_hash_above_it_was_changed(
            size in 1u64..200,
            leaves in proptest::collection::vec(0u64..210, 1..20),
            changed in 0u64..400,
        ) {
            let entry = |leaf: u64| Hash::of_leaf([&leaf.to_be_bytes()[..]]);
            let (mut log, mut nodes) = (Frontier::default(), Vec::new());
            for leaf in 0..size {
                nodes.extend(log.append(entry(leaf)));
            }
            let mut proven = Proven::of(&log);
            let stored = |node: Node| {
                let number = node.number();
                let hash = nodes.get(usize::try_from(number).unwrap()).copied();
                Ok::<_, Infallible>(if number == changed { Some(entry(999)) } else { hash })
            };
            // The nodes on the way from a leaf to the frontier, and beside it.
            let nodes_of = |leaf: u64| {
                let frontier = Frontier::nodes(size);
                let mut node = Node::of_leaf(leaf);
                let mut nodes = Vec::new();
                while !frontier.contains(&node) {
                    nodes.extend([node, node.beside()].map(Node::number));
                    node = node.above();
                }
                nodes
            };
            for leaf in leaves {
                let Ok(other) = proven.has(leaf, entry(leaf + 1), stored);
                prop_assert!(!other);
                let Ok(has) = proven.has(leaf, entry(leaf), stored);
                // A proved node is not read again.
                prop_assert!(leaf >= size || has || nodes_of(leaf).contains(&changed));
                prop_assert!(!has || leaf < size);
            }
        }
    }
}
