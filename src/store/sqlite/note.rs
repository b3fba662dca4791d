//! Notes beside a database how far it was written. At the next start, the note shows if its end is missing, because its
//! log was damaged or an older copy replaced it.
//!
//! The note is written after each durable commit, without waiting for the disk: it survives the death of the process,
//! as do the noted writes. The loss of power may restore an earlier note, but never one ahead of the database.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, str};

use super::{place::note_of, unwritable};
use crate::{
    model::{CycleId, Revision},
    store::OpenError,
};

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
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
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
