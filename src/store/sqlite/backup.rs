//! Backups of a database: copied while a process writes to it, and put in the place of another one.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use rusqlite::Connection;

use super::{
    error::explain,
    opening::read_only,
    place::{DatabaseFileError, LockedDatabase, beside, log_of, logs_of, private},
    rows::number,
    schema::check_version,
};
use crate::{
    file::sync_directory,
    model::CycleId,
    store::{BackupError, OpenError},
};

/// Copies the database at `path` to the new file `to`, which only its owner can read, and which gets its name once
/// `verify` has accepted the copy. Returns its last cycle.
///
/// In one read transaction, which neither waits for the process that writes nor makes it wait. (The backup API of
/// SQLite would begin again after each commit.) Free pages, which may have bytes of removed rows, are left out.
pub(in crate::store) fn copy<E: From<BackupError>>(
    path: &Path,
    to: &Path,
    verify: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<CycleId, E> {
    let new = beside(to, ".new");
    let copied = copy_whole(path, &new).map_err(E::from);
    let copied = copied.and_then(|last_cycle_id| verify(&new).map(|()| last_cycle_id));
    forget_reading(&new);
    let copied = copied.and_then(|last_cycle_id| finish(&new, to).map(|()| last_cycle_id).map_err(E::from));
    if copied.is_err() {
        let _ = fs::remove_file(&new);
    }
    copied
}

/// Writes a copy of the database at `path` into a file that only its owner can read. Returns its last cycle.
fn copy_whole(path: &Path, new: &Path) -> Result<CycleId, BackupError> {
    let explained = |error| OpenError::from(explain(path, &error));
    if !path.exists() {
        return Err(OpenError::from(DatabaseFileError::Missing { database: path.display().to_string() }).into());
    }
    let database = read_only(path).map_err(explained)?;
    check_version(&database, path)?;
    // SQLite writes into an empty file that exists.
    create_new(new).map_err(|problem| BackupError::File { path: new.to_owned(), problem })?;
    database.execute("VACUUM INTO ?1", [new.display().to_string()]).map_err(explained)?;
    let last = |copy: Connection| copy.query_row("SELECT last_cycle_id FROM meta", [], |row| number(row, 0));
    let last = read_only(new).and_then(last);
    Ok(last.map(CycleId).map_err(|error| OpenError::from(explain(new, &error)))?)
}

/// Puts a copy of the database `from` in the place `path` once `verify` has accepted the copy, and keeps what is there
/// if `replaces` is true. `verify` gets the copy, since another program could change `from` meanwhile.
pub(in crate::store) fn put<E: From<BackupError>>(
    from: &Path,
    path: &Path,
    replaces: bool,
    verify: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    // A copy of the database lacks their contents.
    for log in logs_of(from) {
        if log.exists() {
            return Err(BackupError::Unfinished { backup: from.to_owned(), log }.into());
        }
    }
    let mut place = LockedDatabase::take(path).map_err(BackupError::from)?;
    let new = beside(&place.path, ".new");
    let copied = copy_new(from, &new).map_err(|problem| BackupError::File { path: new.clone(), problem });
    let copied = copied.map_err(E::from).and_then(|()| verify(&new));
    forget_reading(&new);
    let put = copied.and_then(|()| replace(&new, &place, replaces).map_err(E::from));
    if put.is_err() {
        let _ = fs::remove_file(&new);
        place.leave();
    }
    put
}

/// Gives the database `new` its place.
fn replace(new: &Path, place: &LockedDatabase, replaces: bool) -> Result<(), BackupError> {
    let path = &place.path;
    let kept = beside(path, ".replaced");
    let has_store = fs::metadata(path).is_ok_and(|store| store.len() > 0);
    if has_store && !replaces {
        return Err(BackupError::StoreExists { store: path.clone(), kept });
    }
    if has_store && kept.exists() {
        return Err(BackupError::KeptExists(kept));
    }
    let explained = |error| OpenError::from(explain(new, &error));
    check_version(&read_only(new).map_err(explained)?, new)?;
    if has_store {
        // The database last: without its log it is still a database.
        for (from, to) in [(log_of(path), log_of(&kept)), (path.clone(), kept)] {
            match fs::rename(&from, &to) {
                Err(problem) if problem.kind() != io::ErrorKind::NotFound => {
                    return Err(BackupError::File { path: to, problem });
                }
                _ => {}
            }
        }
    }
    let _ = fs::remove_file(beside(path, "-shm"));
    finish(new, path)
}

/// Removes files that reading a copy may have made beside it.
fn forget_reading(copy: &Path) {
    let _ = (fs::remove_file(log_of(copy)), fs::remove_file(beside(copy, "-shm")));
}

/// Creates a file that only its owner can read, in the place of one that an interrupted process has left, or of a link
/// that somebody else has put there.
fn create_new(path: &Path) -> io::Result<File> {
    let _ = fs::remove_file(path);
    private().create_new(true).open(path)
}

/// Copies the bytes of a database.
fn copy_new(from: &Path, new: &Path) -> io::Result<()> {
    // A log of an earlier copy would be read as part of this one.
    let _ = logs_of(new).map(fs::remove_file);
    io::copy(&mut File::open(from)?, &mut create_new(new)?).map(drop)
}

/// Gives a file that was written its name, and waits until both are on the disk.
fn finish(new: &Path, path: &Path) -> Result<(), BackupError> {
    let finished = (|| {
        File::open(new)?.sync_all()?;
        fs::rename(new, path)?;
        sync_directory(path)
    })();
    finished.map_err(|problem| BackupError::File { path: path.to_owned(), problem })
}
