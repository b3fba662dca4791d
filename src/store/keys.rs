//! The files of the keys that sign the checkpoints of a log.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::StoreUrl;
use crate::{
    file::{self, FileError},
    ledger::{NoteError, SigningKey},
    model::excerpt,
};

/// Most lost checkpoints that are kept beside the first one. An incident makes one, so that there are hardly more.
const KEPT_LOST: usize = 8;

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
    #[error("the key {} can't be created: {problem}; {}", .path.display(), remedy(problem))]
    NotCreated {
        /// The file.
        path: PathBuf,
        /// What the system says.
        problem: io::Error,
    },
    /// It does not contain a key.
    #[error(
        "the key {}: {problem}; restore it from a backup, or name another file in ledger.key_files",
        .path.display()
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The problem.
        problem: NoteError,
    },
    /// None is named, and the store has no place beside it for one.
    #[error(
        "a store in PostgreSQL has no file beside it: name the file of its key in ledger.key_files, or with --key-file"
    )]
    NotNamed,
    /// The task that reads it has ended.
    #[error("can't read the keys of ledger.key_files: {0}")]
    NotRead(String),
    /// The system refuses a new key.
    #[error("can't make a key: {0}")]
    NotMade(NoteError),
}

/// What to do about a key that can't be created.
fn remedy(problem: &io::Error) -> &'static str {
    match problem.kind() {
        io::ErrorKind::AlreadyExists => "keep that one, or give another file",
        io::ErrorKind::PermissionDenied => {
            "let the user of the service write to its directory, or name another file in ledger.key_files"
        }
        _ => "create its directory, or name another file in ledger.key_files",
    }
}

/// The keys that sign the checkpoints of a store's log.
#[derive(Debug)]
pub struct LogKeys {
    /// All of them. The first one seals.
    pub keys: Vec<SigningKey>,
    /// Those that are new.
    pub new: NewKeys,
}

/// New keys, with their files, which don't exist yet.
#[derive(Debug, Default)]
pub struct NewKeys(Vec<(PathBuf, String)>);

impl LogKeys {
    /// Reads the keys in these files, or the one beside the database if there are none. For a file that does not exist,
    /// makes a new key. It has the name of the first one that exists, since it is to replace that, or else this name.
    /// `memory:` without files gets a key that ends with the process. Waits for the disk.
    ///
    /// # Errors
    /// A file can't be read, is open to others, or does not contain a key.
    pub fn read(url: &StoreUrl, files: &[PathBuf], name: &str) -> Result<Self, KeyFileError> {
        let beside = match (url, files) {
            (StoreUrl::Memory, []) => {
                let key = SigningKey::generate(name).map_err(KeyFileError::NotMade)?;
                return Ok(Self { keys: vec![key], new: NewKeys::default() });
            }
            (StoreUrl::Postgres(_), []) => return Err(KeyFileError::NotNamed),
            (StoreUrl::Sqlite(database), []) => [beside(database, ".key")],
            _ => Default::default(),
        };
        let files = if files.is_empty() { &beside } else { files };
        let mut read = files.iter().map(|path| read_if_exists(path)).collect::<Result<Vec<_>, _>>()?;
        let name = read.iter().flatten().next().map_or(name, |key| key.verifying().name()).to_owned();
        let mut new = NewKeys::default();
        for (path, key) in files.iter().zip(&mut read) {
            if key.is_none() {
                let made = SigningKey::generate(&name).map_err(KeyFileError::NotMade)?;
                new.0.push((path.clone(), made.to_secret()));
                *key = Some(made);
            }
        }
        Ok(Self { keys: read.into_iter().flatten().collect(), new })
    }

    /// True if no file existed, so that none of the keys can have sealed what the store contains.
    pub fn are_new(&self) -> bool {
        self.new.0.len() == self.keys.len()
    }
}

impl NewKeys {
    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Creates their files, which only their owner can read. Waits for the disk.
    ///
    /// # Errors
    /// One can't be created.
    pub fn save(self) -> Result<(), KeyFileError> {
        for (path, secret) in self.0 {
            if let Err(problem) = file::create_private(&path, &format!("{secret}\n")) {
                return Err(KeyFileError::NotCreated { path, problem });
            }
            tracing::info!(path = %path.display(), "a key was created, which signs checkpoints");
        }
        Ok(())
    }
}

/// The file with the newest checkpoint of the log of a SQLite database.
pub fn checkpoint_of(database: &Path) -> PathBuf {
    beside(database, ".checkpoint")
}

/// The text of the checkpoint beside a database, if it has one: at most 16 KiB, which no checkpoint exceeds. Waits for
/// the disk.
pub fn published(url: &StoreUrl) -> Option<String> {
    const MAX: usize = 16 << 10;
    let StoreUrl::Sqlite(database) = url else { return None };
    let mut bytes = Vec::new();
    File::open(checkpoint_of(database)).ok()?.take(MAX as u64).read_to_end(&mut bytes).ok()?;
    Some(excerpt(&String::from_utf8_lossy(&bytes), MAX).to_owned())
}

/// Keeps this checkpoint, which the store does not go on from, in a file of another name beside the database: with the
/// suffix `.checkpoint.lost`, and later ones with `.checkpoint.lost.2` and so on. The first one and the newest
/// eight are kept. Waits for the disk.
///
/// # Errors
/// It can't be written.
pub fn keep_published(url: &StoreUrl, checkpoint: &str) -> io::Result<PathBuf> {
    let StoreUrl::Sqlite(database) = url else { return Err(io::ErrorKind::NotFound.into()) };
    let first = beside(database, ".checkpoint.lost");
    if !first.exists() {
        file::replace(&first, checkpoint)?;
        return Ok(first);
    }
    let mut numbers = lost_after(&first)?;
    let nth = |number: u64| beside(database, &format!(".checkpoint.lost.{number}"));
    let newest = numbers.last().map_or_else(|| first.clone(), |number| nth(*number));
    // A start that is repeated keeps it once.
    if fs::read(&newest).is_ok_and(|kept| kept == checkpoint.as_bytes()) {
        return Ok(newest);
    }
    let next = numbers.last().map_or(2, |number| number.saturating_add(1));
    file::replace(&nth(next), checkpoint)?;
    numbers.push(next);
    for number in &numbers[..numbers.len().saturating_sub(KEPT_LOST)] {
        fs::remove_file(nth(*number))?;
    }
    Ok(nth(next))
}

/// The numbers of the files after the first one, in increasing order.
fn lost_after(first: &Path) -> io::Result<Vec<u64>> {
    let (Some(directory), Some(name)) = (first.parent(), first.file_name()) else { return Ok(Vec::new()) };
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?.file_name();
        let number = entry.to_str().zip(name.to_str()).and_then(|(entry, name)| entry.strip_prefix(name));
        numbers.extend(number.and_then(|number| number.strip_prefix('.')?.parse::<u64>().ok()).filter(|it| *it > 1));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The file with this suffix beside a database, wherever links lead to that.
fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut path = database.canonicalize().unwrap_or_else(|_| database.to_owned()).into_os_string();
    path.push(suffix);
    path.into()
}

/// Reads a key that signs checkpoints. Waits for the disk.
///
/// # Errors
/// The file can't be read, is open to others, or does not contain a key.
pub fn signing_key(path: &Path) -> Result<SigningKey, KeyFileError> {
    let read = file::read_secret(path);
    let bytes = read.map_err(|problem| KeyFileError::Unreadable { path: path.to_owned(), problem })?;
    let key = String::from_utf8_lossy(&bytes).parse();
    key.map_err(|problem| KeyFileError::Invalid { path: path.to_owned(), problem })
}

/// Makes a key with this name in a new file, which only its owner can read. Waits for the disk.
///
/// # Errors
/// The file exists, or it can't be created.
pub fn create_key(path: &Path, name: &str) -> Result<SigningKey, KeyFileError> {
    let key = SigningKey::generate(name).map_err(KeyFileError::NotMade)?;
    NewKeys(vec![(path.to_owned(), key.to_secret())]).save()?;
    Ok(key)
}

/// The file of the key beside the database of a store, if it exists.
pub(super) fn key_file_beside(url: &StoreUrl) -> Option<PathBuf> {
    let StoreUrl::Sqlite(database) = url else { return None };
    Some(beside(database, ".key")).filter(|file| file.exists())
}

/// The key beside the database of a store, if it exists. Waits for the disk.
///
/// # Errors
/// The file can't be read, is open to others, or does not contain a key.
pub fn key_beside(url: &StoreUrl) -> Result<Option<SigningKey>, KeyFileError> {
    let StoreUrl::Sqlite(database) = url else { return Ok(None) };
    read_if_exists(&beside(database, ".key"))
}

fn read_if_exists(path: &Path) -> Result<Option<SigningKey>, KeyFileError> {
    match signing_key(path) {
        Err(KeyFileError::Unreadable { problem: FileError::Unreadable(error), .. })
            if error.kind() == io::ErrorKind::NotFound =>
        {
            Ok(None)
        }
        read => read.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    /// The keys of a process, whose files exist from then on.
    fn signing_keys(url: &StoreUrl, files: &[PathBuf]) -> Result<Vec<SigningKey>, KeyFileError> {
        let LogKeys { keys, new } = LogKeys::read(url, files, "a/1")?;
        new.save()?;
        Ok(keys)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_key_is_created_once_and_only_its_owner_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let url = StoreUrl::Sqlite(directory.path().join("o.db"));
        let keys = || signing_keys(&url, &[]);
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
        assert!(signing_keys(&StoreUrl::Memory, &[path]).is_err_and(unreadable));
    }

    #[test]
    fn a_new_key_beside_another_one_has_its_name_and_its_file_exists_once_it_is_saved() {
        let directory = tempfile::tempdir().unwrap();
        let (old, new) = (directory.path().join("old.key"), directory.path().join("new.key"));
        signing_keys(&StoreUrl::Memory, std::slice::from_ref(&old)).unwrap();
        let keys = LogKeys::read(&StoreUrl::Memory, &[new.clone(), old], "b").unwrap();
        assert!(!keys.are_new() && keys.keys.iter().all(|key| key.verifying().name() == "a/1"));
        assert!(!new.exists());
        keys.new.save().unwrap();
        assert_eq!(signing_key(&new).unwrap().verifying(), keys.keys[0].verifying());
        assert!(LogKeys::read(&StoreUrl::Memory, &[directory.path().join("other.key")], "b").unwrap().are_new());
    }

    #[test]
    fn the_first_lost_checkpoint_and_the_newest_ones_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let url = StoreUrl::Sqlite(directory.path().join("o.db"));
        let keep = |checkpoint: u64| {
            let kept = keep_published(&url, &checkpoint.to_string()).unwrap();
            kept.file_name().unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(
            [keep(1), keep(1), keep(2)],
            ["o.db.checkpoint.lost", "o.db.checkpoint.lost", "o.db.checkpoint.lost.2"]
        );
        for checkpoint in 3..=12 {
            keep(checkpoint);
        }
        assert_eq!(keep(12), "o.db.checkpoint.lost.12", "it is the newest one already");
        let read = |path: PathBuf| fs::read_to_string(path).unwrap().parse::<u64>().unwrap();
        let mut kept: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|file| read(file.unwrap().path())).collect();
        kept.sort_unstable();
        assert_eq!(kept, [1, 5, 6, 7, 8, 9, 10, 11, 12]);
    }

    #[test]
    fn each_file_has_its_own_key_and_memory_has_one_without_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let files = ["old.key", "new.key"].map(|name| directory.path().join(name));
        let keys = signing_keys(&StoreUrl::Memory, &files).unwrap();
        assert_ne!(keys[0].verifying(), keys[1].verifying());
        assert_eq!(signing_keys(&StoreUrl::Memory, &[]).unwrap().len(), 1);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        let nowhere = [directory.path().join("no/where.key")];
        assert!(matches!(signing_keys(&StoreUrl::Memory, &nowhere), Err(KeyFileError::NotCreated { .. })));
    }
}
