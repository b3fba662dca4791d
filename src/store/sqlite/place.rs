//! Where a database is: its real path, whichever links lead to it, and the locks that keep a second process out.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, Write as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::unwritable;
use crate::{file::irregular, store::OpenError};

/// What is wrong with the files of a database.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// There is no database.
    #[error("there is no database {database}")]
    Missing {
        /// Where one was looked for.
        database: String,
    },
    /// It can't be made where it is to be.
    #[error("{path}: no directory is or can be there; give the database another path")]
    NoDirectory {
        /// Where a directory is needed.
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
    /// Something else is in the place of the database, or of a file beside it.
    #[error("{path} is {found}, and a regular file is needed there; give the database another path, or move this away")]
    NotRegular {
        /// The place.
        path: String,
        /// What is there.
        found: &'static str,
    },
    /// Another process has it open, and came to it by another name, such as a hard link.
    #[error(
        "{database} is in use by another process, which has it open by another name; stop that process first, or name \
         another store"
    )]
    InUseByAnotherName {
        /// The database.
        database: String,
    },
    /// It has more than one name.
    #[error(
        "{database} is the same file as {other} (a hard link), and SQLite looks for a database's log beside the name that \
         it is opened by: remove the names that are not its own, and open it by the one that is"
    )]
    Linked {
        /// The name that it was to be opened by.
        database: String,
        /// Its other names, as far as they are known.
        other: String,
    },
    /// It is a copy of another database.
    #[error(
        "{copy} is a copy of {original}: served, it would take the fleet over from there. To have it go on in that one's \
         place, see that no process serves that one any more, and run `orchestrator store accept sqlite:{copy}`"
    )]
    Copy {
        /// The copy.
        copy: String,
        /// The database that it was copied from.
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
    /// It is gone, and its log is not.
    #[error(
        "{database} is not there or empty, and its log with the latest records, {log}, is: put the database back in its \
         place, or move the log away to begin a new one"
    )]
    LogAlone {
        /// The database.
        database: String,
        /// Its log.
        log: String,
    },
}

/// A database that this process alone may open, for as long as this lives.
pub(super) struct Place {
    /// The path of the file itself, absolute and without links.
    pub(super) path: PathBuf,
    /// Beside the database, so that it is found by whoever opens it by the same path. It holds the number of the process.
    _lock: File,
    /// There was no such file before.
    made_lock: bool,
    /// The database itself, for those that came by another path. Closing it would free the locks that SQLite has on the
    /// same file, so it stays open for longer than all of SQLite's connections.
    _database: File,
}

/// The device and the inode of a file.
pub(super) type FileId = (u64, u64);

impl Place {
    /// Finds the database, makes an empty one where there is none, and locks it.
    pub(super) fn take(given: &Path) -> Result<Self, OpenError> {
        if let Some(directory) = given.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            fs::create_dir_all(directory).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                    FileError::NoDirectory { path: directory.display().to_string() }.into()
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => unwritable(directory, &error),
                _ => {
                    let (directory, problem) = (directory.display().to_string(), error.to_string());
                    FileError::NotCreated { directory, problem }.into()
                }
            })?;
        }
        // Also where a link leads to a file that is not there yet.
        let create = || File::options().read(true).write(true).create(true).truncate(false).open(given);
        let path = match given.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => create().and_then(|_| given.canonicalize()),
            found => found,
        };
        let path = path.map_err(|error| unwritable(given, &error))?;
        // Before anything is made beside it, and before SQLite says of another file that the database can't be opened.
        for file in [path.clone(), lock_of(&path), note_of(&path), log_of(&path), beside(&path, "-shm")] {
            check_regular(&file)?;
        }
        let (lock, made_lock) = lock_beside(&path)?;
        let database = File::options().read(true).write(true).open(&path).map_err(|error| unwritable(&path, &error))?;
        if !lock_file(&database) {
            return Err(FileError::InUseByAnotherName { database: path.display().to_string() }.into());
        }
        let log = log_of(&path);
        let has = |file: io::Result<fs::Metadata>| file.is_ok_and(|file| file.len() > 0);
        // SQLite would remove a log whose database is empty.
        if !has(database.metadata()) && has(fs::metadata(&log)) {
            let (database, log) = (path.display().to_string(), log.display().to_string());
            return Err(FileError::LogAlone { database, log }.into());
        }
        Ok(Self { path, _lock: lock, made_lock, _database: database })
    }

    /// Removes the file beside a database that turns out not to be ours, unless it was there before.
    pub(super) fn leave(&mut self) {
        if std::mem::take(&mut self.made_lock) {
            let _ = fs::remove_file(lock_of(&self.path));
        }
    }
}

/// Something is there that is not a regular file.
fn check_regular(path: &Path) -> Result<(), FileError> {
    let Ok(found) = fs::metadata(path) else { return Ok(()) };
    match irregular(found.file_type()) {
        Some(found) => Err(FileError::NotRegular { path: path.display().to_string(), found }),
        None => Ok(()),
    }
}

/// Takes the lock on a file beside the database. It is free as soon as the process that has it ends, however that ends.
/// Says as well whether it was made for that.
fn lock_beside(path: &Path) -> Result<(File, bool), OpenError> {
    let name = lock_of(path);
    let failed = |error: io::Error| unwritable(&name, &error);
    let mut options = File::options();
    options.read(true).write(true);
    let (mut file, is_new) = match options.create_new(true).open(&name) {
        // A link may lead to a file that is not there yet.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            (options.create_new(false).create(true).truncate(false).open(&name).map_err(failed)?, false)
        }
        made => (made.map_err(failed)?, true),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            return Err(OpenError::InUse { store: path.display().to_string(), by: holder.trim().parse().ok() });
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    // The number only helps people; the lock is what counts.
    let noted = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
    noted.map_err(failed)?;
    Ok((file, is_new))
}

/// Whether this process alone has this file now, by whichever name: a hard link, or a mount of the file itself, has another
/// lock beside it. `true` where file systems can't tell.
#[cfg(target_os = "linux")]
fn lock_file(file: &File) -> bool {
    use nix::{errno::Errno, fcntl, libc};
    // The last byte that can be locked: SQLite locks bytes at 1 GiB. It is of the open file and not of the process, so
    // closing another descriptor of the database does not free it.
    let byte = libc::flock {
        l_type: libc::c_short::try_from(libc::F_WRLCK).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: libc::off_t::MAX - 1,
        l_len: 1,
        l_pid: 0,
    };
    !matches!(fcntl::fcntl(file, fcntl::FcntlArg::F_OFD_SETLK(&byte)), Err(Errno::EAGAIN | Errno::EACCES))
}

#[cfg(not(target_os = "linux"))]
fn lock_file(_: &File) -> bool {
    true
}

/// Which file is at this path.
pub(super) fn file_id(path: &Path) -> io::Result<FileId> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

/// The file beside a database whose lock keeps a second process out.
fn lock_of(path: &Path) -> PathBuf {
    beside(path, ".lock")
}

/// The file beside a database in which it is noted how far it was written.
pub(super) fn note_of(path: &Path) -> PathBuf {
    beside(path, ".last")
}

/// SQLite's log of a database.
pub(super) fn log_of(path: &Path) -> PathBuf {
    beside(path, "-wal")
}

/// The file beside this one whose name goes on like this.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
