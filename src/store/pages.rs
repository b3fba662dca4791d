//! Pages of the history and of the audit.

use std::{collections::VecDeque, ops::ControlFlow};

use super::{
    entries::{Ahead, Reading, Rows, StoredEntry, Table, check_leaf},
    row::{Row, Wrong, event, found, number},
};
use crate::{
    ledger::{Hash, Node},
    model::{CycleId, Revision},
    ports::{EventCheck, EventFilter, EventPage, Filter, Found, Page, PageLimits, ResumeError, SCAN_LIMIT, Unreadable},
};

/// Takes a row of a page, and decides whether the next one is read.
pub(super) type Each<'e> = &'e mut dyn FnMut(&dyn Row) -> Result<ControlFlow<()>, Wrong>;

/// The history and the audit of a database, as of one moment.
pub(super) trait History: Rows {
    /// The highest revision that was ever pruned, and the newest one.
    fn range(&mut self) -> Result<(Revision, Revision), Self::Error>;

    /// The columns of records below this revision, highest first: of the cycles of this request, or all.
    fn records_below(&mut self, before: u64, request_id: Option<&str>, each: Each<'_>) -> Result<(), Self::Error>;

    /// The columns of audit events below this leaf, highest first.
    fn events_below(&mut self, before: u64, each: Each<'_>) -> Result<(), Self::Error>;

    /// The rows of the first of these places, in their order: at least one, and no more than a few large ones.
    fn rows_at(&mut self, table: Table, places: &[u64]) -> Result<Vec<StoredEntry>, Self::Error>;
}

/// The record in a row, if it can be read and has the bytes that were written.
pub(super) fn record_of<R: Rows>(rows: &mut R, how: Reading, row: &StoredEntry) -> Result<Found, R::Error> {
    let hash = hash_of(rows, row)?;
    Ok(row.record(how, |leaf, entry| check_leaf(leaf, entry, hash)))
}

/// The hash of the leaf of a row, if it has one.
fn hash_of<R: Rows>(rows: &mut R, row: &StoredEntry) -> Result<Option<Hash>, R::Error> {
    match row.leaf {
        Ok(Some(leaf)) => rows.hash(Node::of_leaf(leaf)),
        _ => Ok(None),
    }
}

/// A revision on a page.
struct Listed {
    revision: Revision,
    /// False if it was given, not pruned, and is not there.
    is_there: bool,
    /// Number of examined records before it.
    scanned: usize,
}

/// The revisions of a page, as rows are examined.
struct Listing<'f> {
    filter: &'f Filter,
    most: usize,
    /// Above this revision, every revision exists.
    complete_above: Revision,
    listed: Vec<Listed>,
    /// The last one that was examined, or the one before which the page begins.
    last: Revision,
    scanned: usize,
    /// Where the next page begins.
    next: Option<Revision>,
}

impl Listing<'_> {
    fn add(&mut self, row: &dyn Row) -> Result<ControlFlow<()>, Wrong> {
        let at = Revision(number(row, "revision")?);
        if self.add_missing_above(at).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let is_wanted = found(row).map_or(true, |found| self.filter.wants(&found));
        if self.scanned == SCAN_LIMIT || (is_wanted && self.listed.len() == self.most) {
            self.next = Some(at.next());
            return Ok(ControlFlow::Break(()));
        }
        if is_wanted {
            self.listed.push(Listed { revision: at, is_there: true, scanned: self.scanned });
        }
        self.scanned += 1;
        self.last = at;
        Ok(ControlFlow::Continue(()))
    }

    /// Lists the revisions between the last one and this one, which must be missing.
    fn add_missing_above(&mut self, at: Revision) -> ControlFlow<()> {
        while self.last > at.max(self.complete_above).next() {
            if self.scanned == SCAN_LIMIT || self.listed.len() == self.most {
                self.next = Some(self.last);
                return ControlFlow::Break(());
            }
            self.last = Revision(self.last.0 - 1);
            self.listed.push(Listed { revision: self.last, is_there: false, scanned: self.scanned });
            self.scanned += 1;
        }
        ControlFlow::Continue(())
    }
}

/// Records below a revision: see `Store::cycles_before`.
pub(super) fn cycles_before<H: History>(
    history: &mut H,
    how: Reading,
    before: Revision,
    filter: &Filter,
    limits: PageLimits,
) -> Result<Page, H::Error> {
    let (pruned_to, newest) = history.range()?;
    // The records of a request are found by the index of its ids: the revisions between them are not missing.
    let complete_above = if filter.request_id.is_some() { before } else { pruned_to };
    let mut listing = Listing {
        filter,
        most: limits.records,
        complete_above,
        listed: Vec::new(),
        last: before.min(newest.next()),
        scanned: 0,
        next: None,
    };
    history.records_below(before.0, filter.request_id.as_deref(), &mut |row| listing.add(row))?;
    if listing.next.is_none() {
        let _ = listing.add_missing_above(Revision::default());
    }
    let Listing { listed, scanned, next, .. } = listing;
    let places: Vec<_> = listed.iter().filter(|listed| listed.is_there).map(|listed| listed.revision.0).collect();
    let (mut page, mut bytes, mut ahead) = (Page { next, scanned, records: Vec::new() }, 0, VecDeque::new());
    let mut places = &places[..];
    for Listed { revision, is_there, scanned } in listed {
        if !is_there {
            page.records.push(Err(missing(revision)));
            continue;
        }
        if ahead.is_empty() {
            ahead = history.rows_at(Table::Records, places)?.into();
            places = &places[ahead.len().min(places.len())..];
        }
        let found = match ahead.pop_front() {
            Some(row) => record_of(history, how, &row)?,
            None => Err(missing(revision)),
        };
        bytes += length(&found);
        if !page.records.is_empty() && bytes > limits.bytes {
            return Ok(Page { next: Some(revision.next()), scanned, ..page });
        }
        page.records.push(found);
    }
    Ok(page)
}

/// Records after a revision: see `Store::cycles_after`.
pub(super) fn cycles_after<H: History>(
    history: &mut H,
    how: Reading,
    revision: Revision,
    limits: PageLimits,
) -> Result<Result<Vec<Found>, ResumeError>, H::Error> {
    let (pruned_to, newest) = history.range()?;
    if revision < pruned_to || revision > newest {
        return Ok(Err(ResumeError::NotRetained { oldest: pruned_to.next(), newest }));
    }
    let mut rows = Ahead::new(Table::Records, revision.next().0);
    let mut records: Vec<Found> = Vec::new();
    let (mut bytes, mut next) = (0, revision.next());
    loop {
        let at = rows.peek(history)?.map_or(newest.next(), |row| Revision(row.place));
        // Above the pruned revisions, every revision exists.
        while next < at && records.len() < limits.records {
            records.push(Err(missing(next)));
            next = next.next();
        }
        if records.len() >= limits.records {
            break;
        }
        let Some(row) = rows.next(history)? else { break };
        let found = record_of(history, how, &row)?;
        bytes += length(&found);
        if !records.is_empty() && bytes > limits.bytes {
            break;
        }
        records.push(found);
        next = at.next();
    }
    Ok(Ok(records))
}

/// Audit events below a leaf: see `Store::events_before`.
pub(super) fn events_before<H: History>(
    history: &mut H,
    check: EventCheck,
    before: u64,
    filter: &EventFilter,
    limit: usize,
) -> Result<EventPage, H::Error> {
    let (mut leaves, mut scanned, mut next) = (Vec::new(), 0, None);
    history.events_below(before, &mut |row| {
        let leaf = number(row, "leaf")?;
        let is_wanted = event(row).map_or(true, |entry| filter.wants(&entry));
        if scanned == SCAN_LIMIT || (is_wanted && leaves.len() == limit) {
            next = Some(leaf + 1);
            return Ok(ControlFlow::Break(()));
        }
        if is_wanted {
            leaves.push(leaf);
        }
        scanned += 1;
        Ok(ControlFlow::Continue(()))
    })?;
    let (mut events, mut rest) = (Vec::new(), &leaves[..]);
    while !rest.is_empty() {
        let rows = history.rows_at(Table::Events, rest)?;
        if rows.is_empty() {
            break;
        }
        rest = &rest[rows.len().min(rest.len())..];
        for row in rows {
            let hash = hash_of(history, &row)?;
            events.push(row.event(check, |leaf, entry| check_leaf(leaf, entry, hash)));
        }
    }
    Ok(EventPage { events, next })
}

/// The error for a missing revision that was given and not pruned.
fn missing(revision: Revision) -> Unreadable {
    Unreadable { cycle_id: CycleId::default(), revision, problem: "no row has this revision".into() }
}

fn length(found: &Found) -> usize {
    found.as_ref().map_or(0, |record| record.bytes.len())
}
