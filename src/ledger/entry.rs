//! The entries of the log, and how they become leaves.

use std::{iter, ops::Range};

use super::tree::Hash;

/// An entry of the log, by the exact bytes that are stored of it. Its encoding is that of `LogEntry` in the contract,
/// with one field: its tag and its length before these bytes, which are never encoded again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// The record of a cycle: an encoded `CycleTelemetry`.
    Cycle(&'a [u8]),
    /// An encoded `AuditEvent`.
    Audit(&'a [u8]),
    /// An encoded `ControlEntry`.
    Control(&'a [u8]),
}

impl Entry<'_> {
    /// The hash of its leaf.
    pub fn leaf(self) -> Hash {
        Hash::of_leaf([&self.head()[..], self.stored()])
    }

    /// The encoded `LogEntry`.
    pub fn to_bytes(self) -> Vec<u8> {
        [&self.head(), self.stored()].concat()
    }

    /// Its tag and its length.
    fn head(self) -> Vec<u8> {
        /// The wire type of a field with a length.
        const LENGTH_DELIMITED: u8 = 2;
        let field = match self {
            Self::Cycle(_) => 1,
            Self::Audit(_) => 2,
            Self::Control(_) => 3,
        };
        let mut head = vec![field << 3 | LENGTH_DELIMITED];
        let mut rest = self.stored().len();
        loop {
            let [low, ..] = rest.to_le_bytes();
            rest >>= 7;
            if rest == 0 {
                head.push(low & 0x7f);
                return head;
            }
            head.push(low | 0x80);
        }
    }

    fn stored(&self) -> &[u8] {
        match self {
            Self::Cycle(stored) | Self::Audit(stored) | Self::Control(stored) => stored,
        }
    }
}

/// What a control entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Retention removed entries.
    Pruned(RecordsPruned),
    /// A new log began.
    Began {
        /// True if the entries were counted anew. Then what earlier ones say is missing does not count any more.
        counts_anew: bool,
        /// The leaves whose entries were missing then.
        missing: Vec<Range<u64>>,
    },
    /// Something else, which only a later version knows.
    Unknown,
}

impl Control {
    /// All leaves whose entries are gone by it, in any order.
    #[must_use]
    pub fn gone(&self) -> Vec<Range<u64>> {
        match self {
            Self::Pruned(pruned) => pruned.all().collect(),
            Self::Began { missing, .. } => missing.clone(),
            Self::Unknown => Vec::new(),
        }
    }

    /// What it says as the entry of this leaf: nothing of later ones, which were not there yet.
    #[must_use]
    pub fn at(mut self, leaf: u64) -> Self {
        let leaves = match &mut self {
            Self::Pruned(RecordsPruned { leaves, first_kept }) => {
                *first_kept = leaf.min(*first_kept);
                leaves
            }
            Self::Began { missing, .. } => missing,
            Self::Unknown => return self,
        };
        leaves.retain_mut(|leaves| {
            leaves.end = leaf.min(leaves.end);
            !leaves.is_empty()
        });
        self
    }
}

/// The removals of retention, in a control entry: an entry that is missing without one was removed by someone else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordsPruned {
    /// The leaves whose records or audit events were removed with this entry, lowest first.
    pub leaves: Vec<Range<u64>>,
    /// All entries below this leaf are gone: records and audit events, and control entries, which this one supersedes.
    pub first_kept: u64,
}

impl RecordsPruned {
    /// The removal of the records and events of these leaves, lowest first.
    pub fn of(leaves: impl IntoIterator<Item = u64>, first_kept: u64) -> Self {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for leaf in leaves {
            match ranges.last_mut() {
                Some(range) if range.end == leaf => range.end += 1,
                _ => ranges.push(leaf..leaf + 1),
            }
        }
        Self { leaves: ranges, first_kept }
    }

    /// All leaves whose entries are gone with it, in any order.
    pub fn all(&self) -> impl Iterator<Item = Range<u64>> {
        self.leaves.iter().cloned().chain(iter::once(0..self.first_kept))
    }
}

/// In a control entry: a new log began, since the store was not what was signed last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBegan {
    /// Why.
    pub reason: LogBeganReason,
    /// The checkpoint that was beside the store, which nobody has verified; empty if there was none.
    pub previous: String,
    /// The leaves whose entries were missing, if the store was accepted with what it had, lowest first; at most
    /// [`LogBegan::MAX_MISSING`].
    pub missing: Vec<Range<u64>>,
}

impl LogBegan {
    /// Most ranges of missing leaves, so that the entry stays small: about 40 KiB. Further leaves stay missing.
    pub const MAX_MISSING: usize = 4096;
}

/// Why a new log began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogBeganReason {
    /// The key that had signed and sealed was missing.
    KeyMissing,
    /// There was no checkpoint that the key had signed.
    CheckpointMissing,
    /// The checkpoint had entries that the store has not.
    Behind,
    /// An operator accepted the store as it was.
    Accepted,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_encoded_with_its_tag_and_length() {
        let bytes = |length: usize| Entry::Cycle(&vec![7; length]).to_bytes();
        assert_eq!(bytes(0), [0x0a, 0]);
        assert_eq!(bytes(127)[..3], [0x0a, 0x7f, 7]);
        assert_eq!(bytes(128)[..4], [0x0a, 0x80, 0x01, 7]);
        assert_eq!(bytes(300)[..4], [0x0a, 0xac, 0x02, 7]);
        assert_eq!(Entry::Audit(b"x").to_bytes(), [0x12, 1, b'x']);
        assert_eq!(Entry::Control(b"x").to_bytes(), [0x1a, 1, b'x']);
    }

    #[test]
    fn the_kind_and_the_length_of_an_entry_are_part_of_its_leaf() {
        let entry = Entry::Cycle(b"ab");
        assert_eq!(entry.leaf(), Hash::of_leaf([&entry.to_bytes()[..]]));
        assert_ne!(entry.leaf(), Entry::Control(b"ab").leaf());
    }

    #[test]
    fn an_entry_says_nothing_of_its_own_leaf_or_later_ones() {
        let pruned = RecordsPruned { leaves: vec![1..3, 4..u64::MAX, 9..10], first_kept: u64::MAX };
        assert_eq!(
            Control::Pruned(pruned).at(7),
            Control::Pruned(RecordsPruned { leaves: vec![1..3, 4..7], first_kept: 7 })
        );
        let some = |leaves: Range<u64>| iter::once(leaves).filter(|leaves| !leaves.is_empty()).collect();
        let began = |leaves| Control::Began { counts_anew: true, missing: some(leaves) };
        assert_eq!(began(2..9).at(7), began(2..7));
        assert_eq!(began(7..9).at(7), began(7..7));
    }

    #[test]
    fn consecutive_leaves_are_one_range() {
        assert_eq!(RecordsPruned::of([1, 2, 3, 5], 1).leaves, [1..4, 5..6]);
        assert_eq!(RecordsPruned::of([], 7), RecordsPruned { leaves: Vec::new(), first_kept: 7 });
    }
}
