//! The log in parts, as proofs and exports need it.

use std::{convert::Infallible, ops::Range};

use super::entries::{Ahead, Rows, StoredEntry, Table};
use crate::{
    ledger::{Content, Hash, Node, Part},
    model::Revision,
    ports::PageLimits,
};

/// The log from the first of these leaves on, in parts; `None` if the hash of one is not retained. `logged` are the
/// revisions of the records that have a leaf.
pub(super) fn parts<R: Rows>(
    rows: &mut R,
    logged: Range<Revision>,
    leaves: Range<u64>,
    limits: PageLimits,
) -> Result<Option<Vec<Part>>, R::Error> {
    let mut tables = [
        Ahead::new(Table::Records, revision_from(rows, logged, leaves.start)?),
        Ahead::new(Table::Events, leaves.start),
        Ahead::new(Table::Controls, leaves.start),
    ];
    let (mut parts, mut bytes, mut next) = (Vec::new(), 0, leaves.start);
    while next < leaves.end && parts.len() < limits.records {
        let mut first = leaves.end;
        for table in &mut tables {
            first = first.min(leaf_of(table.peek(rows)?, next).unwrap_or(leaves.end));
        }
        let subtree = if first <= next {
            Node::of_leaf(next)
        } else {
            // The leaves on its left are in an earlier part.
            let is_gone = |beside: Range<u64>| Ok::<_, Infallible>(beside.start > next && beside.end <= first);
            let Ok(largest) = Node::largest_of(next, leaves.end, is_gone);
            largest
        };
        let Some(hash) = rows.hash(subtree)? else { return Ok(None) };
        let mut content = Content::Hash(hash);
        for table in &mut tables {
            while leaf_of(table.peek(rows)?, next).is_some_and(|leaf| leaf <= next)
                && let Some(row) = table.next(rows)?
            {
                let entry = row.table.entry(&row.bytes).to_bytes();
                if Hash::of_leaf([&entry[..]]) == hash {
                    bytes += entry.len();
                    content = Content::Entry(entry.into());
                }
            }
        }
        if !parts.is_empty() && bytes > limits.bytes {
            break;
        }
        parts.push(Part { subtree, content });
        next = subtree.leaves().end;
    }
    Ok(Some(parts))
}

/// The leaf of a row, if there is one. A leaf that can't be read counts as the next one.
fn leaf_of(row: Option<&StoredEntry>, next: u64) -> Option<u64> {
    row.map(|row| row.leaf.as_ref().map_or(next, |leaf| leaf.unwrap_or(next)))
}

/// The first revision whose record is this leaf or a later one. Records in the log have increasing leaves.
fn revision_from<R: Rows>(rows: &mut R, logged: Range<Revision>, leaf: u64) -> Result<u64, R::Error> {
    let (mut low, mut high) = (logged.start.0, logged.end.0);
    while low < high {
        let middle = low + (high - low) / 2;
        match rows.rows(Table::Records, middle, 1)?.pop() {
            Some(row) if row.leaf.as_ref().is_ok_and(|found| found.is_some_and(|found| found < leaf)) => {
                low = row.place + 1;
            }
            Some(_) | None => high = middle,
        }
    }
    Ok(low)
}
