//! The location of a database: its real path with links resolved, and the locks that keep a second process out.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write as _},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::error::{not_created, unreadable, unwritable};
use crate::{file::irregular, store::OpenError};

/// The problem with the files of a database.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseFileError {
    /// The database does not exist.
    #[error("database {database} does not exist")]
    Missing {
        /// Its path.
        database: String,
    },
    /// It can't be created at this path.
    #[error("{path} is not a directory and can't be created; give the database another path")]
    NoDirectory {
        /// The path of the required directory.
        path: String,
    },
    /// A directory for it can't be created.
    #[error("{directory} can't be created: {problem}; create it, or give the database another path")]
    NotCreated {
        /// The directory.
        directory: String,
        /// What the system says.
        problem: String,
    },
    /// It is not a database at all, or its first bytes are damaged.
    #[error(
        "{path} is not an SQLite database, or its beginning is damaged; name another store, or restore it from a backup"
    )]
    NotADatabase {
        /// The file.
        path: String,
    },
    /// The database, or a file beside it, is not a regular file.
    #[error("{path} is {found}, not a regular file; give the database another path, or move it away")]
    NotRegular {
        /// The path.
        path: String,
        /// The kind of the file.
        found: &'static str,
    },
    /// Another process has it open under another name, such as a hard link, or looks at it.
    #[error(
        "{database} is in use by another process, which has it open by another name, or looks at it (serve --read-only); \
         stop that process first, or name another store"
    )]
    InUseByAnotherName {
        /// The database.
        database: String,
    },
    /// It was not closed, or copied while a process wrote to it.
    #[error(
        "{database} is not whole: {log} has changes that are not in it, and can't be read without writing; look at a \
         backup instead, which `orchestrator backup` makes of it"
    )]
    Unfinished {
        /// The database.
        database: String,
        /// The file with the changes.
        log: String,
    },
    /// It has more than one name.
    #[error(
        "{database} is the same file as {other} (a hard link), and SQLite looks for a database's log beside the name \
         that it is opened by: remove the names that are not its own, and open it by the one that is"
    )]
    Linked {
        /// The name by which it was to be opened.
        database: String,
        /// Its other names, if known.
        other: String,
    },
    /// It is a copy of another database.
    #[error(
        "{copy} is a copy of {original}: if it is served, it takes over the fleet. To have it continue in the \
         original's place, see that no process serves that one any more, and run `orchestrator store accept \
         sqlite:{copy}`"
    )]
    Copy {
        /// The copy.
        copy: String,
        /// The original database.
        original: String,
    },
    /// It was renamed without its log.
    #[error(
        "{database} was renamed, and the log with its latest records is still at {log}; move that to {database}-wal"
    )]
    LogLeftBehind {
        /// The database.
        database: String,
        /// Its log.
        log: String,
    },
    /// It is missing, but its log exists.
    #[error(
        "{database} is missing or empty, but its log with the latest records, {log}, exists: put the database back in \
         its place, or move the log away to begin a new one"
    )]
    LogAlone {
        /// The database.
        database: String,
        /// Its log.
        log: String,
    },
}

/// A locked database, which no other process can serve until it is dropped.
pub(super) struct LockedDatabase {
    /// The path of the file itself, absolute and without links.
    pub(super) path: PathBuf,
    /// The lock file beside the database, for processes that use the same path. It contains the pid. `None` if the
    /// database is only looked at.
    _lock: Option<File>,
    /// There was no such file before.
    made_lock: bool,
    /// There was no database before.
    made_database: bool,
    /// The lock on the database itself, for processes that use another path. Closing the file would release SQLite's
    /// locks on it, so it stays open longer than all of SQLite's connections.
    _database: File,
}

/// The device and the inode of a file.
pub(super) type FileId = (u64, u64);

impl LockedDatabase {
    /// Finds the database, creates an empty one if it does not exist, and locks it.
    pub(super) fn take(given: &Path) -> Result<Self, OpenError> {
        if let Some(directory) = given.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            let created = DirBuilder::new().recursive(true).mode(0o700).create(directory);
            created.map_err(|error| not_created(directory, &error))?;
        }
        // Also if a link leads to a file that does not exist yet.
        let create = || private().create(true).truncate(false).open(given);
        let there = given.canonicalize();
        let made_database = there.is_err();
        let path = there.or_else(|_| create().and_then(|_| given.canonicalize()));
        let path = path.map_err(|error| unwritable(given, &error))?;
        // Before any file is created beside it, and before SQLite reports another file as a database that can't be
        // opened.
        for file in [path.clone(), lock_of(&path), note_of(&path), log_of(&path), beside(&path, "-shm")] {
            check_regular(&file)?;
        }
        let (lock, made_lock) = lock_beside(&path)?;
        let database = private().open(&path).map_err(|error| unwritable(&path, &error))?;
        if !lock_file(&database, Lock::Exclusive) {
            return Err(DatabaseFileError::InUseByAnotherName { database: path.display().to_string() }.into());
        }
        report_exposed(&path, &database);
        let log = log_of(&path);
        let has = |file: io::Result<fs::Metadata>| file.is_ok_and(|file| file.len() > 0);
        // SQLite would remove the log of an empty database.
        if !has(database.metadata()) && has(fs::metadata(&log)) {
            let (database, log) = (path.display().to_string(), log.display().to_string());
            return Err(DatabaseFileError::LogAlone { database, log }.into());
        }
        Ok(Self { path, _lock: Some(lock), made_lock, made_database, _database: database })
    }

    /// Finds a database to look at, and locks it in a way that leaves no trace: others can look at it as well, and no
    /// process can serve it.
    pub(super) fn look(given: &Path) -> Result<Self, OpenError> {
        let missing = |_| DatabaseFileError::Missing { database: given.display().to_string() };
        let path = given.canonicalize().map_err(missing)?;
        check_regular(&path)?;
        let database = File::open(&path).map_err(|error| unreadable(&path, &error))?;
        // The lock on the database does not exist on all file systems.
        let beside = File::open(lock_of(&path)).ok();
        let is_served =
            beside.as_ref().is_some_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)));
        if is_served || !lock_file(&database, Lock::Shared) {
            return Err(OpenError::InUse { store: path.display().to_string(), by: beside.and_then(holder_of) });
        }
        // They can't be read without writing beside the database.
        for log in logs_of(&path) {
            if fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
                let (database, log) = (path.display().to_string(), log.display().to_string());
                return Err(DatabaseFileError::Unfinished { database, log }.into());
            }
        }
        Ok(Self { path, _lock: None, made_lock: false, made_database: false, _database: database })
    }

    /// Removes the files that were made to lock a database that turns out not to be ours, or gets no contents.
    pub(super) fn leave(&mut self) {
        let is_empty = || fs::metadata(&self.path).is_ok_and(|database| database.len() == 0);
        if std::mem::take(&mut self.made_database) && is_empty() {
            let _ = fs::remove_file(&self.path);
        }
        if std::mem::take(&mut self.made_lock) {
            let _ = fs::remove_file(lock_of(&self.path));
        }
    }
}

/// Opens a file for reading and writing. If that creates it, only its owner can use it. SQLite gives the mode of the
/// database to the files beside it.
pub(super) fn private() -> OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600);
    options
}

/// Logs that users other than the owner of a database can read it. Its mode stays: they may be meant to.
fn report_exposed(path: &Path, database: &File) {
    const OTHERS: u32 = 0o077;
    if let Ok(mode) = database.metadata().map(|file| file.mode() & 0o777)
        && mode & OTHERS != 0
    {
        tracing::warn!(
            path = %path.display(),
            mode = %format_args!("{mode:04o}"),
            "other users of this machine can read the database, or even change it: if that is not intended, run \
             chmod 600 on it and on the files beside it"
        );
    }
}

/// Checks whether the path is something other than a regular file.
fn check_regular(path: &Path) -> Result<(), DatabaseFileError> {
    let Ok(found) = fs::metadata(path) else { return Ok(()) };
    match irregular(found.file_type()) {
        Some(found) => Err(DatabaseFileError::NotRegular { path: path.display().to_string(), found }),
        None => Ok(()),
    }
}

/// Locks a file beside the database. The lock is released when its process ends in any way. Says as well whether it was
/// made for that.
fn lock_beside(path: &Path) -> Result<(File, bool), OpenError> {
    let name = lock_of(path);
    let failed = |error: io::Error| unwritable(&name, &error);
    let mut options = private();
    let (mut file, is_new) = match options.create_new(true).open(&name) {
        Ok(file) => (file, true),
        // It exists. A link may lead to a file that is not there yet.
        Err(_) => (options.create_new(false).create(true).truncate(false).open(&name).map_err(failed)?, false),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(OpenError::InUse { store: path.display().to_string(), by: holder_of(file) });
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    // The pid is only for people; only the lock counts.
    let noted = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
    noted.map_err(failed)?;
    Ok((file, is_new))
}

/// The pid in a lock file.
fn holder_of(mut lock: File) -> Option<u32> {
    let mut holder = String::new();
    let _ = lock.read_to_string(&mut holder);
    holder.trim().parse().ok()
}

/// A lock on the database itself.
#[derive(Clone, Copy, Debug)]
enum Lock {
    /// Of the process that serves it.
    Exclusive,
    /// Of processes that look at it.
    Shared,
}

/// True if no other process has a lock on this file that excludes this one, under any name: a hard link, or a mount of
/// the file itself, has another lock file beside it. Also true on file systems without such locks.
#[cfg(target_os = "linux")]
fn lock_file(file: &File, lock: Lock) -> bool {
    use nix::{errno::Errno, fcntl, libc};
    let kind = match lock {
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Shared => libc::F_RDLCK,
    };
    // The last byte that can be locked: SQLite locks bytes at 1 GiB. The lock belongs to the open file, not to the
    // process, so closing another descriptor of the database does not release it.
    let byte = libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: libc::off_t::MAX,
        l_len: 1,
        l_pid: 0,
    };
    !matches!(fcntl::fcntl(file, fcntl::FcntlArg::F_OFD_SETLK(&byte)), Err(Errno::EAGAIN | Errno::EACCES))
}

#[cfg(not(target_os = "linux"))]
fn lock_file(_: &File, _: Lock) -> bool {
    true
}

/// The file at this path.
pub(super) fn file_id(path: &Path) -> io::Result<FileId> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

/// The file beside a database whose lock keeps a second process out.
fn lock_of(path: &Path) -> PathBuf {
    beside(path, ".lock")
}

/// The file beside a database with the note of how far it was written.
pub(super) fn note_of(path: &Path) -> PathBuf {
    beside(path, ".last")
}

/// SQLite's log of a database.
pub(super) fn log_of(path: &Path) -> PathBuf {
    beside(path, "-wal")
}

/// The files beside a database whose contents belong to it: its log, and a journal that another program may have left
/// there.
pub(super) fn logs_of(path: &Path) -> [PathBuf; 2] {
    [log_of(path), beside(path, "-journal")]
}

/// The file beside this one with this suffix.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
