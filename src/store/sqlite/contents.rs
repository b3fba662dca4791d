//! Reads what an earlier process left in a database.

use std::path::Path;

use rusqlite::Connection;

use super::{commit::boot_id, error::explain, note::Mark, rows::Snapshot};
use crate::{
    clock::Clock,
    ports::{Checks, Contents, Seals, StoreError},
    store::{
        StoreUrl,
        contents::{Refused, read_contents as read_tables},
        keys::published,
        term::Term,
    },
};

/// What a database contains.
pub(super) struct Read {
    pub(super) contents: Contents,
    pub(super) term: Term,
    pub(super) mark: Mark,
}

/// Reads all tables except the history, with the next epoch, and checks all seals.
///
/// # Errors
/// It can't be read, no process could continue from it, or a seal does not belong to what it seals.
pub(super) fn read_contents(
    connection: &mut Connection,
    path: &Path,
    checks: Checks,
    clock: Clock,
    seals: Seals,
) -> Result<Read, StoreError> {
    let explained = |error| explain(path, &error);
    let transaction = connection.transaction().map_err(explained)?;
    let read = read_tables(&mut Snapshot(&transaction), checks, clock, seals);
    let (mut contents, term) = read.map_err(|refused| refusal(path, refused))?;
    let mark = Mark::read(&transaction).map_err(explained)?;
    contents.may_lack_open = may_lack_open(&transaction).map_err(explained)?;
    contents.checkpoint = published(&StoreUrl::Sqlite(path.to_owned()));
    Ok(Read { contents, term, mark })
}

/// The error for contents that are not read.
pub(super) fn refusal(path: &Path, refused: Refused<rusqlite::Error>) -> StoreError {
    let store = path.display().to_string();
    match refused {
        Refused::Unreadable(error) => explain(path, &error),
        Refused::Corrupt(problem) => StoreError::Corrupt { store, problem },
        Refused::Tampered(problem) => StoreError::Tampered { url: format!("sqlite:{store}"), store, problem },
    }
}

/// True if the machine has restarted since the database was written last, and it was not closed.
fn may_lack_open(connection: &Connection) -> rusqlite::Result<bool> {
    let (was_closed, last): (bool, Option<String>) =
        connection.query_row("SELECT is_closed, boot_id FROM meta", [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let boot_id = boot_id();
    Ok(!was_closed && (boot_id.is_none() || last != boot_id))
}
