//! Notes beside a database how far it was written. At the next start, the note shows if its end is missing, because its
//! log was damaged or an older copy replaced it.
//!
//! The note is written after each durable commit, without waiting for the disk: it survives the death of the process,
//! as do the noted writes. The loss of power may restore an earlier note, but never one ahead of the database.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, str};

use rusqlite::{Connection, Row};

use super::{
    error::unwritable,
    place::{note_of, private},
    rows::number,
};
use crate::{
    model::{CycleId, Revision},
    ports::Lost,
    store::{OpenError, StoreUrl, frontier::Frontier, term::Term},
};

/// Most cycles missing at the end that are treated as lost, and recorded as such. A damaged log does not contain more:
/// then an older copy has replaced the database.
const MAX_LOST: u64 = 10_000;

/// How far a database was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The id of its database: another one may have been created at the same path.
    pub(super) id: [u8; 16],
    /// Number of commits.
    pub(super) commits: u64,
    pub(super) last_cycle_id: CycleId,
    pub(super) last_revision: Revision,
}

/// The file with the mark.
pub(super) struct Note(File);

impl Note {
    /// The note beside this database, with its mark; `None` if it can't be read.
    pub(super) fn open(database: &Path) -> Result<(Self, Option<Mark>), OpenError> {
        /// More bytes than it ever contains.
        const MAX: usize = 1 << 10;
        let path = note_of(database);
        let file = private().create(true).truncate(false).open(&path);
        let file = file.map_err(|error| unwritable(&path, &error))?;
        let mut bytes = [0; MAX];
        let read = file.read_at(&mut bytes, 0).unwrap_or_default();
        let text = str::from_utf8(&bytes[..read]).unwrap_or_default();
        Ok((Self(file), Mark::parse(text)))
    }

    /// Writes the mark over the previous one.
    pub(super) fn write(&self, mark: &Mark) -> io::Result<()> {
        self.0.write_all_at(mark.to_text().as_bytes(), 0)
    }
}

impl Mark {
    /// How far this database was written.
    pub(super) fn read(connection: &Connection) -> rusqlite::Result<Self> {
        connection.query_row("SELECT * FROM meta", [], Self::of_row)
    }

    /// How far the database with this id is written in this term.
    pub(super) fn of(term: &Term, id: [u8; 16]) -> Self {
        let Frontier { last_cycle_id, last_revision, .. } = term.frontier;
        Self { id, commits: term.commits, last_cycle_id, last_revision }
    }

    /// The mark in the row of the table `meta`.
    pub(super) fn of_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("database_id")?,
            commits: number(row, "commits")?,
            last_cycle_id: CycleId(number(row, "last_cycle_id")?),
            last_revision: Revision(number(row, "last_revision")?),
        })
    }

    /// Always of the same length, so that one write replaces another.
    fn to_text(self) -> String {
        let Self { id, commits, last_cycle_id, last_revision } = self;
        format!("{:032x} {commits:020} {:020} {:020}\n", u128::from_be_bytes(id), last_cycle_id.0, last_revision.0)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.strip_suffix('\n')?.split(' ');
        let id = u128::from_str_radix(words.next()?, 16).ok()?.to_be_bytes();
        let mut number = || words.next()?.parse().ok();
        Some(Self { id, commits: number()?, last_cycle_id: CycleId(number()?), last_revision: Revision(number()?) })
    }
}

/// True if the note beside a database belongs to it.
pub(super) fn is_of_this_database(path: &Path, mark: &Mark, noted: &Mark) -> bool {
    if noted.id != mark.id {
        let (store, last_cycle_id) = (path.display(), noted.last_cycle_id);
        if mark.commits == 0 {
            tracing::error!(
                %store,
                %last_cycle_id,
                "the database of this path, which ended with this cycle, is gone: a new one begins with cycle 1. If \
                 that is a mistake, stop this process and put the database back, or restore it from a backup"
            );
        } else {
            tracing::error!(
                %store,
                %last_cycle_id,
                "another database, which ended with this cycle, was at this path before; this one ends with cycle {}. \
                 If that is a mistake, stop this process and put the other one back, or restore it from a backup",
                mark.last_cycle_id
            );
        }
    }
    noted.id == mark.id
}

/// Checks that the database does not lack more noted commits than a damaged log can have contained.
pub(super) fn refuse_older_copy(path: &Path, mark: &Mark, noted: Option<&Mark>) -> Result<(), OpenError> {
    let Some(noted) = noted else { return Ok(()) };
    if noted.last_cycle_id.0.saturating_sub(mark.last_cycle_id.0) <= MAX_LOST {
        return Ok(());
    }
    Err(OpenError::Behind {
        store: path.display().to_string(),
        url: StoreUrl::Sqlite(path.to_owned()),
        has: mark.last_cycle_id,
        noted: noted.last_cycle_id,
    })
}

/// Acknowledged commits that are not in the database, by the note beside it.
pub(super) fn lost(mark: &Mark, noted: &Mark) -> Option<Lost> {
    let commits = noted.commits.saturating_sub(mark.commits);
    (commits > 0).then_some(Lost {
        last_cycle_id: noted.last_cycle_id.max(mark.last_cycle_id),
        last_revision: noted.last_revision.max(mark.last_revision),
        commits,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written_and_nothing_else_is() {
        let mark = Mark { id: [7; 16], commits: u64::MAX, last_cycle_id: CycleId(1), last_revision: Revision(2) };
        let text = mark.to_text();
        assert_eq!(Mark::parse(&text), Some(mark));
        for end in 0..text.len() {
            assert_eq!(Mark::parse(&text[..end]), None);
        }
        assert_eq!(Mark::parse(&"\0".repeat(96)), None);
    }
}
