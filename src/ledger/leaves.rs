//! Sets of leaves.

use std::{collections::BTreeMap, iter, ops::Range};

/// A set of leaves, as ranges of which no two meet. So it has at most one range more than there are other leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaves {
    /// The first leaf of each range, and the one after its last one.
    ranges: BTreeMap<u64, u64>,
}

impl Leaves {
    /// Adds these leaves.
    pub fn add(&mut self, Range { mut start, mut end }: Range<u64>) {
        if start >= end {
            return;
        }
        while let Some((&first, &after)) = self.ranges.range(..=end).next_back().filter(|(_, after)| **after >= start) {
            (start, end) = (start.min(first), end.max(after));
            self.ranges.remove(&first);
        }
        self.ranges.insert(start, end);
    }

    /// Those from this leaf on that follow each other; empty if this one is not in the set.
    #[must_use]
    pub fn from(&self, leaf: u64) -> Range<u64> {
        let end = self.ranges.range(..=leaf).next_back().map_or(leaf, |(_, end)| *end);
        leaf..end.max(leaf)
    }

    /// True if each of these leaves is in this set or in the other one.
    #[must_use]
    pub fn contain_with(&self, other: &Self, leaves: Range<u64>) -> bool {
        let mut leaf = leaves.start;
        while leaf < leaves.end {
            let next = self.from(leaf).end.max(other.from(leaf).end);
            if next == leaf {
                return false;
            }
            leaf = next;
        }
        true
    }

    /// The ranges of these leaves that are not in the set, lowest first.
    pub fn missing(&self, leaves: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut leaf = leaves.start;
        iter::from_fn(move || {
            leaf = self.from(leaf).end;
            let next = self.ranges.range(leaf..).next().map_or(leaves.end, |(start, _)| (*start).min(leaves.end));
            let missing = leaf..next;
            leaf = next;
            (!missing.is_empty()).then_some(missing)
        })
    }

    /// Its ranges, lowest first.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().map(|(start, end)| *start..*end)
    }

    /// Number of leaves of the other set that are not in this one.
    #[must_use]
    pub fn count_missing(&self, other: &Self) -> u64 {
        other.ranges().flat_map(|leaves| self.missing(leaves)).map(|leaves| leaves.end - leaves.start).sum()
    }

    /// Number of leaves in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ranges().map(|leaves| leaves.end - leaves.start).sum()
    }
}

impl FromIterator<Range<u64>> for Leaves {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut leaves = Self::default();
        ranges.into_iter().for_each(|range| leaves.add(range));
        leaves
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn some_leaves() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((0u64..60, 0u64..9).prop_map(|(start, length)| start..start + length), 0..12)
    }

    fn all(ranges: &[Range<u64>]) -> BTreeSet<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    proptest! {
        #[test]
        fn a_set_has_the_leaves_that_were_added(ranges in some_leaves(), others in some_leaves(), from in 0u64..70) {
            let (leaves, expected) = (ranges.iter().cloned().collect::<Leaves>(), all(&ranges));
            prop_assert_eq!(leaves.count(), expected.len() as u64);
            let run: Vec<_> = (from..80).take_while(|leaf| expected.contains(leaf)).collect();
            prop_assert_eq!(leaves.from(from).collect::<Vec<_>>(), run);
            let missing: BTreeSet<_> = (from..80).filter(|leaf| !expected.contains(leaf)).collect();
            prop_assert_eq!(leaves.missing(from..80).flatten().collect::<BTreeSet<_>>(), missing);
            let ends: Vec<_> = leaves.ranges.iter().collect();
            prop_assert!(ends.windows(2).all(|two| two[0].1 < two[1].0), "two ranges meet: {:?}", ends);
            let (other, both) = (others.iter().cloned().collect(), all(&[ranges, others].concat()));
            prop_assert_eq!(leaves.count_missing(&other), (both.len() - expected.len()) as u64);
            let has_all = (from..from + 5).all(|leaf| both.contains(&leaf));
            prop_assert_eq!(leaves.contain_with(&other, from..from + 5), has_all);
        }
    }
}
