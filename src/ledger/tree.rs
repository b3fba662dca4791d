//! The tree: how entries become hashes, and which nodes a log of a given size has.

use std::{fmt, ops::Range};

use aws_lc_rs::digest::{Context, SHA256, SHA256_OUTPUT_LEN};

/// A SHA-256, such as that of a leaf or of a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hash(pub [u8; Hash::LEN]);

impl Hash {
    /// Its length in bytes.
    pub const LEN: usize = SHA256_OUTPUT_LEN;

    /// The hash of these bytes themselves.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self::of([], [bytes])
    }

    /// The hash of an entry, which is given in pieces (RFC 9162, section 2.1.1).
    pub fn of_leaf<'a>(entry: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self::of([0], entry)
    }

    /// The hash of a node above two others.
    pub(super) fn of_children(left: Self, right: Self) -> Self {
        Self::of([1], [&left.0[..], &right.0[..]])
    }

    /// The hash of a log without entries.
    pub(super) fn of_nothing() -> Self {
        Self::of([], [])
    }

    fn of<'a, const N: usize>(prefix: [u8; N], pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut context = Context::new(&SHA256);
        context.update(&prefix);
        for piece in pieces {
            context.update(piece);
        }
        let mut hash = Self([0; Self::LEN]);
        hash.0.copy_from_slice(context.finish().as_ref());
        hash
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A complete subtree: 2^`level` leaves, from leaf `index` · 2^`level` on. Its hash never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    level: u32,
    index: u64,
}

impl Node {
    /// The node of this leaf.
    pub fn of_leaf(index: u64) -> Self {
        Self { level: 0, index }
    }

    /// The subtree of `count` leaves from leaf `first` on; `None` if no log has such a complete subtree.
    pub fn of_leaves(first: u64, count: u64) -> Option<Self> {
        let end = first.checked_add(count)?;
        let is_one = count.is_power_of_two() && first.is_multiple_of(count) && i64::try_from(end).is_ok();
        is_one.then(|| Self { level: count.ilog2(), index: first >> count.ilog2() })
    }

    /// The largest complete subtree of a log of `size` leaves that contains this leaf and of which all other leaves
    /// are `gone`. `gone` is asked about ranges beside it, of which each is twice as long as the one before.
    ///
    /// # Errors
    /// Those of `gone`.
    pub fn largest_of<E>(leaf: u64, size: u64, mut gone: impl FnMut(Range<u64>) -> Result<bool, E>) -> Result<Self, E> {
        let mut node = Self::of_leaf(leaf);
        loop {
            let (beside, above) = (node.beside(), node.above());
            if above.leaves().end > size || !gone(beside.leaves())? {
                return Ok(node);
            }
            node = above;
        }
    }

    /// The other half of the node above it.
    pub(super) fn beside(self) -> Self {
        Self { index: self.index ^ 1, ..self }
    }

    /// The node of which it is a half.
    pub(super) fn above(self) -> Self {
        Self { level: self.level + 1, index: self.index / 2 }
    }

    /// True if it is the left half of the node above it.
    pub(super) fn is_left(self) -> bool {
        self.index.is_multiple_of(2)
    }

    /// Its leaves.
    pub fn leaves(self) -> Range<u64> {
        self.index << self.level..(self.index + 1) << self.level
    }

    /// The numbers of the nodes below it.
    pub fn below(self) -> Range<u64> {
        let number = self.number();
        number - ((2 << self.level) - 2)..number
    }

    /// Its number: how many nodes of the log are complete before it. A node becomes complete with its last leaf, after
    /// the nodes below it.
    pub fn number(self) -> u64 {
        Self::complete_with(self.leaves().end - 1) + u64::from(self.level)
    }

    /// Number of complete nodes in a log of `size` leaves.
    pub fn complete_with(size: u64) -> u64 {
        // A tree of 2^k leaves has 2^(k+1) - 1 nodes, and a log consists of one for each bit of its size.
        size.saturating_mul(2) - u64::from(size.count_ones())
    }

    /// The complete subtrees of which a range of leaves consists, from left to right. The range begins at a multiple of
    /// the largest power of two below its length, as all ranges in proofs do.
    pub(super) fn of_range(range: Range<u64>) -> impl Iterator<Item = Self> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let level = (rest.end - rest.start).checked_ilog2()?;
            let node = Self { level, index: rest.start >> level };
            rest.start += 1 << level;
            Some(node)
        })
    }
}

/// The hash of a subtree, from those of the complete ones of which it consists, from left to right.
pub(super) fn fold(hashes: &[Hash]) -> Hash {
    let mut hashes = hashes.iter().rev().copied();
    let last = hashes.next().unwrap_or_else(Hash::of_nothing);
    hashes.fold(last, |right, left| Hash::of_children(left, right))
}

/// The right edge of a log: the hashes that are needed to append to it, and its root. At most 64 hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    /// The complete subtrees of which the log consists, largest first: one for each bit of its size.
    roots: Vec<Hash>,
}

impl Frontier {
    /// The nodes whose hashes are the frontier of a log of `size` leaves. At most 64.
    pub fn nodes(size: u64) -> Vec<Node> {
        Node::of_range(0..size).collect()
    }

    /// The frontier of a log of `size` leaves, from the hashes of [`Self::nodes`]; `None` if their number is another
    /// one.
    pub fn of(size: u64, roots: Vec<Hash>) -> Option<Self> {
        (roots.len() == size.count_ones() as usize).then_some(Self { size, roots })
    }

    /// The hashes of its [nodes](Self::nodes).
    pub(super) fn roots(&self) -> &[Hash] {
        &self.roots
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The root of the log.
    pub fn root(&self) -> Hash {
        fold(&self.roots)
    }

    /// Appends a leaf. Returns the hashes of the nodes that become complete with it, in the order of their numbers, of
    /// which the first is [`Node::complete_with`] the earlier size.
    pub fn append(&mut self, leaf: Hash) -> Vec<Hash> {
        self.append_subtree(Node::of_leaf(self.size), leaf)
    }

    /// Appends all leaves of a complete subtree, which begins at the end of the log. Returns its hash, and those of the
    /// nodes above it that become complete, in the order of their numbers.
    pub fn append_subtree(&mut self, subtree: Node, hash: Hash) -> Vec<Hash> {
        let mut complete = vec![hash];
        let mut node = hash;
        // An odd index has the subtree to its left beside it, and both together complete the one above.
        for left in self.roots.split_off(self.roots.len() - subtree.index.trailing_ones() as usize).into_iter().rev() {
            node = Hash::of_children(left, node);
            complete.push(node);
        }
        self.roots.push(node);
        self.size = subtree.leaves().end;
        complete
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All nodes of a log, by their numbers.
    #[derive(Default)]
    pub(in super::super) struct Log {
        pub(in super::super) nodes: Vec<Hash>,
        pub(in super::super) frontier: Frontier,
    }

    impl Log {
        pub(in super::super) fn of(size: u64) -> Self {
            let mut log = Self::default();
            for index in 0..size {
                assert_eq!(log.nodes.len() as u64, Node::complete_with(index));
                log.nodes.extend(log.frontier.append(leaf(index)));
            }
            log
        }

        pub(in super::super) fn read(&self, nodes: &[Node]) -> Vec<Hash> {
            nodes.iter().map(|node| self.nodes[usize::try_from(node.number()).unwrap()]).collect()
        }
    }

    pub(in super::super) fn leaf(index: u64) -> Hash {
        Hash::of_leaf([&index.to_be_bytes()[..]])
    }

    /// The root as section 2.1.1 defines it, word by word.
    fn root(leaves: &[Hash]) -> Hash {
        match leaves {
            [] => Hash::of_nothing(),
            [leaf] => *leaf,
            _ => {
                let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
                Hash::of_children(root(left), root(right))
            }
        }
    }

    #[test]
    fn a_log_without_entries_has_the_hash_of_nothing() {
        let root = format!("{:?}", Frontier::default().root());
        assert_eq!(root, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn an_entry_in_pieces_has_the_hash_of_the_whole() {
        assert_eq!(Hash::of_leaf([&b"ab"[..], b"c"]), Hash::of_leaf([&b"abc"[..]]));
    }

    proptest! {
        #[test]
        fn the_root_is_that_of_the_definition(size in 0u64..300) {
            let leaves: Vec<_> = (0..size).map(leaf).collect();
            prop_assert_eq!(Log::of(size).frontier.root(), root(&leaves));
        }

        #[test]
        fn a_frontier_is_read_back_from_the_nodes(size in 0u64..300) {
            let log = Log::of(size);
            prop_assert_eq!(Frontier::of(size, log.read(&Frontier::nodes(size))), Some(log.frontier));
        }

        #[test]
        fn a_log_is_made_of_subtrees_as_of_leaves(size in 1u64..300, from in 0u64..300) {
            let log = Log::of(size);
            let from = from % size;
            let mut made = Log::of(from).frontier;
            while made.size() < size {
                let subtree = Node::largest_of(made.size(), size, |beside| Ok::<_, ()>(beside.start >= from)).unwrap();
                prop_assert_eq!(subtree.leaves().start, made.size());
                let [hash] = log.read(&[subtree])[..] else { unreachable!() };
                let number = usize::try_from(subtree.number()).unwrap();
                let complete = made.append_subtree(subtree, hash);
                prop_assert_eq!(&complete[..], &log.nodes[number..number + complete.len()]);
            }
            prop_assert_eq!(made, log.frontier);
        }

        #[test]
        fn the_largest_subtree_of_gone_leaves_has_no_other_ones(size in 1u64..300, gone: u64, leaf in 0u64..300) {
            let leaf = leaf % size;
            let is_gone = |index: u64| index == leaf || gone >> (index % 64) & 1 == 1;
            let largest = Node::largest_of(leaf, size, |mut beside| Ok::<_, ()>(beside.all(is_gone))).unwrap();
            prop_assert!(largest.leaves().all(is_gone) && largest.leaves().end <= size);
            let above = Node { level: largest.level + 1, index: largest.index / 2 };
            prop_assert!(above.leaves().end > size || !above.leaves().all(is_gone));
        }

        #[test]
        fn the_nodes_below_a_node_are_complete_just_before_it(size in 1u64..300) {
            for node in (0..9).flat_map(|level| (0..size >> level).map(move |index| Node { level, index })) {
                let levels = (0..node.level).flat_map(|level| {
                    let Range { start, end } = node.leaves();
                    (start >> level..end >> level).map(move |index| Node { level, index }.number())
                });
                let mut below: Vec<_> = levels.collect();
                below.sort_unstable();
                prop_assert_eq!(below, node.below().collect::<Vec<_>>());
            }
        }

        #[test]
        fn nodes_are_numbered_in_the_order_in_which_they_become_complete(size in 1u64..300) {
            let log = Log::of(size);
            prop_assert_eq!(Node::of_leaf(size).number(), log.nodes.len() as u64);
            for node in (0..9).flat_map(|level| (0..size >> level).map(move |index| Node { level, index })) {
                let leaves: Vec<_> = (node.index << node.level..(node.index + 1) << node.level).map(leaf).collect();
                prop_assert_eq!(log.nodes[usize::try_from(node.number()).unwrap()], root(&leaves));
            }
        }
    }
}
