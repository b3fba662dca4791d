//! The files of the keys that sign the checkpoints of a log.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::StoreUrl;
use crate::{
    file::{self, FileError},
    ledger::{NoteError, SigningKey},
};

/// Why there is no key to sign with. Each message contains the remedy.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file can't be read, or others can read it.
    #[error("the key {} {problem}; see ledger.key_files", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The problem.
        problem: FileError,
    },
    /// It can't be created.
    #[error("the key {} can't be created: {problem}; create its directory, or see ledger.key_files", .path.display())]
    NotCreated {
        /// The file.
        path: PathBuf,
        /// What the system says.
        problem: io::Error,
    },
    /// It does not contain a key.
    #[error("the key {}: {problem}; restore it from a backup, or name another file in ledger.key_files", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The problem.
        problem: NoteError,
    },
    /// The task that reads it has ended.
    #[error("can't read the keys of ledger.key_files: {0}")]
    NotRead(String),
    /// The system refuses a new key.
    #[error("can't make a key: {0}")]
    NotMade(NoteError),
}

/// Reads the keys that sign the checkpoints of a store's log: those in these files, or the one beside the database if
/// there are none. A file that does not exist is created with a new key of this name. `memory:` without files gets a
/// key that ends with the process. Waits for the disk.
///
/// # Errors
/// A file can't be read or created, is open to others, or does not contain a key.
pub fn signing_keys(url: &StoreUrl, files: &[PathBuf], name: &str) -> Result<Vec<SigningKey>, KeyFileError> {
    match (url, files) {
        (StoreUrl::Memory, []) => Ok(vec![SigningKey::generate(name).map_err(KeyFileError::NotMade)?]),
        (StoreUrl::Sqlite(database), []) => Ok(vec![read_or_create(&beside(database, ".key"), name)?]),
        (_, files) => files.iter().map(|path| read_or_create(path, name)).collect(),
    }
}

/// The file with the newest checkpoint of the log of a SQLite database.
pub fn checkpoint_of(database: &Path) -> PathBuf {
    beside(database, ".checkpoint")
}

/// The checkpoint beside a database, if it has one.
pub fn published(url: &StoreUrl) -> Option<String> {
    let StoreUrl::Sqlite(database) = url else { return None };
    fs::read_to_string(checkpoint_of(database)).ok()
}

/// Keeps the checkpoint beside a database, which shows that entries are lost, under another name.
///
/// # Errors
/// It can't be renamed.
pub fn keep_published(url: &StoreUrl) -> io::Result<PathBuf> {
    let StoreUrl::Sqlite(database) = url else { return Err(io::ErrorKind::NotFound.into()) };
    let kept = beside(database, ".checkpoint.lost");
    fs::rename(checkpoint_of(database), &kept)?;
    Ok(kept)
}

/// The file with this suffix beside a database, wherever links lead to that.
fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut path = database.canonicalize().unwrap_or_else(|_| database.to_owned()).into_os_string();
    path.push(suffix);
    path.into()
}

fn read_or_create(path: &Path, name: &str) -> Result<SigningKey, KeyFileError> {
    match file::read_secret(path) {
        Ok(bytes) => {
            let key = String::from_utf8_lossy(&bytes).parse();
            key.map_err(|problem| KeyFileError::Invalid { path: path.to_owned(), problem })
        }
        Err(FileError::Unreadable(error)) if error.kind() == io::ErrorKind::NotFound => create(path, name),
        Err(problem) => Err(KeyFileError::Unreadable { path: path.to_owned(), problem }),
    }
}

fn create(path: &Path, name: &str) -> Result<SigningKey, KeyFileError> {
    let key = SigningKey::generate(name).map_err(KeyFileError::NotMade)?;
    let created = file::create_private(path, &format!("{}\n", key.to_secret()));
    created.map_err(|problem| KeyFileError::NotCreated { path: path.to_owned(), problem })?;
    tracing::info!(path = %path.display(), key = %key.verifying(), "a key was created, which signs checkpoints");
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_key_is_created_once_and_only_its_owner_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let url = StoreUrl::Sqlite(directory.path().join("o.db"));
        let keys = || signing_keys(&url, &[], "a/1");
        let first = keys().unwrap().remove(0);
        let path = directory.path().join("o.db.key");
        assert_eq!((mode(&path), first.verifying().name()), (0o600, "a/1"));
        assert_eq!(keys().unwrap()[0].verifying(), first.verifying());

        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let exposed = |error| matches!(error, KeyFileError::Unreadable { problem: FileError::Exposed(0o644), .. });
        assert!(keys().is_err_and(exposed));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        keys().unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "no key").unwrap();
        assert!(matches!(keys(), Err(KeyFileError::Invalid { .. })));
    }

    #[test]
    fn a_key_that_cannot_be_read_is_not_taken_for_a_missing_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("circle.key");
        symlink(&path, &path).unwrap();
        let unreadable = |error| matches!(error, KeyFileError::Unreadable { .. });
        assert!(signing_keys(&StoreUrl::Memory, &[path], "a").is_err_and(unreadable));
    }

    #[test]
    fn each_file_has_its_own_key_and_memory_has_one_without_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let files = ["old.key", "new.key"].map(|name| directory.path().join(name));
        let keys = signing_keys(&StoreUrl::Memory, &files, "a").unwrap();
        assert_ne!(keys[0].verifying(), keys[1].verifying());
        assert_eq!(signing_keys(&StoreUrl::Memory, &[], "a").unwrap().len(), 1);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        let nowhere = [directory.path().join("no/where.key")];
        assert!(matches!(signing_keys(&StoreUrl::Memory, &nowhere, "a"), Err(KeyFileError::NotCreated { .. })));
    }
}
