//! Backups of a store: they are made while a process has it open, and put in its place while none has.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    AcceptError, Accepted, DatabaseFileError, EntryCodec, LogKeys, OpenError, StoreUrl, accept_file, checkpoint_of,
    published, sqlite,
};
use crate::{file, ledger::SigningKey, model::CycleId};

/// Why a backup was not made or restored. Each message contains the remedy.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// There is a file of this name.
    #[error("{} exists; give the backup another name", .0.display())]
    Exists(PathBuf),
    /// The directory of the backup does not exist.
    #[error("the directory {} does not exist; create it, or give the backup another path", .0.display())]
    NoDirectory(PathBuf),
    /// The store to restore has something in it.
    #[error("{} exists; to restore the backup in its place, give --replace, which keeps it as {}", .store.display(), .kept.display())]
    StoreExists {
        /// The store.
        store: PathBuf,
        /// Where it would be kept.
        kept: PathBuf,
    },
    /// An earlier store is kept already.
    #[error("{} exists, which an earlier --replace has kept; move it away, or remove it", .0.display())]
    KeptExists(PathBuf),
    /// The backup is a database that was not closed.
    #[error("{} is not a whole backup: {} has changes that are not in it; make it with `orchestrator backup`", .backup.display(), .log.display())]
    Unfinished {
        /// The backup.
        backup: PathBuf,
        /// The file with the changes.
        log: PathBuf,
    },
    /// A file can't be read or written.
    #[error("{}: {problem}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        problem: io::Error,
    },
    /// The store can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The restored store can't be accepted.
    #[error(transparent)]
    Accept(#[from] AcceptError),
}

/// The result of [`backup`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackedUp {
    /// The last cycle in the backup.
    pub last_cycle_id: CycleId,
    /// True if the store had a checkpoint, which is beside the backup then.
    pub has_checkpoint: bool,
}

/// Copies a store, which a process may have open, to a new file that only its owner can read, and its checkpoint beside
/// that. The file gets its name once `verify` has accepted the copy. `verify` also gets the checkpoint, if the store
/// has one. Waits for the disk.
///
/// # Errors
/// The file exists or can't be written, the store can't be read, or `verify` refuses the copy.
pub fn backup<E: From<BackupError>>(
    url: &StoreUrl,
    to: &Path,
    verify: impl FnOnce(&Path, Option<&str>) -> Result<(), E>,
) -> Result<BackedUp, E> {
    let database = database(url).map_err(BackupError::from)?;
    if to.exists() {
        return Err(BackupError::Exists(to.to_owned()).into());
    }
    if let Some(directory) = to.parent().filter(|directory| !directory.as_os_str().is_empty() && !directory.exists()) {
        return Err(BackupError::NoDirectory(directory.to_owned()).into());
    }
    // First, so that the backup has all of its entries.
    let checkpoint = published(url);
    let last_cycle_id = sqlite::copy(database, to, |copy| verify(copy, checkpoint.as_deref()))?;
    if let Some(checkpoint) = &checkpoint {
        let path = checkpoint_of(to);
        file::replace(&path, checkpoint).map_err(|problem| BackupError::File { path, problem })?;
    }
    Ok(BackedUp { last_cycle_id, has_checkpoint: checkpoint.is_some() })
}

/// Puts a copy of a backup in the place of a store, which no process has open, once `verify` has accepted the copy, and
/// [accepts](super::accept) it there. A store in that place is kept beside it if `replaces` is true. Waits for the
/// disk.
///
/// # Errors
/// The backup can't be read, `verify` refuses it, a process has the store open, the store exists and `replaces` is
/// false, or a file can't be written.
pub fn restore<E: From<BackupError>>(
    backup: &Path,
    url: &StoreUrl,
    (keys, origin): (LogKeys, Option<String>),
    codec: EntryCodec,
    replaces: bool,
    verify: impl FnOnce(&Path, &[SigningKey]) -> Result<(), E>,
) -> Result<Accepted, E> {
    let database = database(url).map_err(BackupError::from)?;
    if !backup.exists() {
        let missing = OpenError::from(DatabaseFileError::Missing { database: backup.display().to_string() });
        return Err(BackupError::from(missing).into());
    }
    let beside = published(url);
    sqlite::put(backup, database, replaces, |copy| verify(copy, &keys.keys))?;
    if beside.is_none()
        && let Some(checkpoint) = published(&StoreUrl::Sqlite(backup.to_owned()))
    {
        let path = checkpoint_of(database);
        file::replace(&path, &checkpoint).map_err(|problem| BackupError::File { path, problem })?;
    }
    Ok(accept_file(database, keys, origin, codec).map_err(BackupError::from)?)
}

/// The database of a store that has one.
fn database(url: &StoreUrl) -> Result<&Path, OpenError> {
    match url {
        StoreUrl::Memory | StoreUrl::Postgres(_) => Err(OpenError::NoFile { url: url.clone() }),
        StoreUrl::Sqlite(path) => Ok(path),
    }
}
