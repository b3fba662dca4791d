//! The errors of SQLite and of the system, as errors of a store.

use std::{io, path::Path};

use rusqlite::{ErrorCode, ffi};

use super::place::DatabaseFileError;
use crate::{ports::StoreError, store::OpenError};

/// Maps an error of SQLite to an error of the store.
pub(super) fn explain(path: &Path, error: &rusqlite::Error) -> StoreError {
    let (store, problem) = (path.display().to_string(), error.to_string());
    let Some(code) = error.sqlite_error_code() else {
        // A value that no version of this software has written, or a missing one.
        return StoreError::Corrupt { store, problem };
    };
    match code {
        ErrorCode::DiskFull => StoreError::Full { store, problem },
        ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied => {
            StoreError::ReadOnly { store, problem: format!("{problem}; {WRITABLE}") }
        }
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => StoreError::Corrupt { store, problem },
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => {
            let problem = format!("{problem}: another program has locked it; end that program's transaction");
            StoreError::Unavailable { store, problem }
        }
        ErrorCode::SystemIoFailure => {
            let extended = error.sqlite_error().map_or(ffi::SQLITE_IOERR, |error| error.extended_code);
            io_failure(store, &problem, extended)
        }
        // These are or may be temporary.
        ErrorCode::OutOfMemory
        | ErrorCode::OperationAborted
        | ErrorCode::OperationInterrupted
        | ErrorCode::FileLockingProtocolFailed => StoreError::Unavailable { store, problem },
        // Mainly a missing table or column, or a row that already exists.
        _ => StoreError::Unusable { store, problem },
    }
}

/// Maps SQLite's "disk I/O error", whose extended code says what has failed. Each may be temporary.
///
/// <https://www.sqlite.org/rescode.html>
fn io_failure(store: String, problem: &str, extended: i32) -> StoreError {
    let (failed, remedy) = match extended {
        // Written only to make it grow, at the start. SQLite doesn't pass the error of the system on.
        ffi::SQLITE_IOERR_SHMSIZE => {
            let problem = format!("{problem} when {store}-shm had to grow (code {extended})");
            return StoreError::Full { store, problem };
        }
        ffi::SQLITE_IOERR_WRITE | ffi::SQLITE_IOERR_TRUNCATE => (
            "when it was written",
            "see whether its disk is full, over a quota, or over a limit of file sizes (ulimit -f)",
        ),
        ffi::SQLITE_IOERR_LOCK
        | ffi::SQLITE_IOERR_UNLOCK
        | ffi::SQLITE_IOERR_RDLOCK
        | ffi::SQLITE_IOERR_CHECKRESERVEDLOCK
        | ffi::SQLITE_IOERR_SHMOPEN
        | ffi::SQLITE_IOERR_SHMLOCK
        | ffi::SQLITE_IOERR_SHMMAP => {
            ("when it was locked or shared with other processes", "put it on a file system of this machine with locks")
        }
        ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC => ("when it was synced", DISK),
        ffi::SQLITE_IOERR_READ | ffi::SQLITE_IOERR_SHORT_READ => ("when it was read", DISK),
        _ => ("of another kind", DISK),
    };
    let problem = format!("{problem} {failed} (code {extended}); {remedy}");
    StoreError::Unavailable { store, problem }
}

/// The remedy where this process may not write.
const WRITABLE: &str = "make it writable for this process";
/// The remedy for an error that only the system can explain.
const DISK: &str = "see the log of the system (dmesg) for errors of its disk";

pub(super) fn unavailable(path: &Path, problem: String) -> StoreError {
    StoreError::Unavailable { store: path.display().to_string(), problem }
}

pub(super) fn unreadable(path: &Path, error: &io::Error) -> StoreError {
    unavailable(path, format!("it can't be read: {error}"))
}

pub(super) fn unwritable(path: &Path, error: &io::Error) -> OpenError {
    let (store, problem) = (path.display().to_string(), error.to_string());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full { store, problem }.into(),
        io::ErrorKind::IsADirectory => DatabaseFileError::NotRegular { path: store, found: "a directory" }.into(),
        _ => StoreError::ReadOnly { store, problem: format!("{problem}; {WRITABLE}") }.into(),
    }
}

/// The error for the directory of a database, which can't be created.
pub(super) fn not_created(directory: &Path, error: &io::Error) -> OpenError {
    let path = directory.display().to_string();
    match error.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => DatabaseFileError::NoDirectory { path }.into(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => unwritable(directory, error),
        _ => DatabaseFileError::NotCreated { directory: path, problem: error.to_string() }.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error of the store for this result code of SQLite.
    fn explained(code: i32) -> StoreError {
        explain(Path::new("o.db"), &rusqlite::Error::SqliteFailure(ffi::Error::new(code), None))
    }

    #[test]
    fn each_error_of_sqlite_has_its_remedy() {
        for (codes, remedy) in [
            (&[ffi::SQLITE_FULL, ffi::SQLITE_IOERR_SHMSIZE][..], "free some space"),
            (&[ffi::SQLITE_IOERR_WRITE], "is full, over a quota"),
            (&[ffi::SQLITE_IOERR_FSYNC, ffi::SQLITE_IOERR_READ, ffi::SQLITE_IOERR], "(dmesg)"),
            (&[ffi::SQLITE_IOERR_LOCK], "file system of this machine with locks"),
            (&[ffi::SQLITE_READONLY, ffi::SQLITE_CANTOPEN, ffi::SQLITE_PERM], "make it writable for this process"),
            (&[ffi::SQLITE_CORRUPT, ffi::SQLITE_NOTADB], "is damaged"),
            (&[ffi::SQLITE_BUSY, ffi::SQLITE_LOCKED], "end that program's transaction"),
            (&[ffi::SQLITE_ERROR, ffi::SQLITE_CONSTRAINT], "if another program has changed it"),
        ] {
            for code in codes {
                let said = explained(*code).to_string();
                assert!(said.contains(remedy), "{code}: {said}");
            }
        }
    }

    #[test]
    fn a_write_is_retried_after_an_error_that_may_be_temporary() {
        for code in [
            ffi::SQLITE_IOERR,
            ffi::SQLITE_IOERR_SHMSIZE,
            ffi::SQLITE_NOMEM,
            ffi::SQLITE_ABORT,
            ffi::SQLITE_INTERRUPT,
            ffi::SQLITE_PROTOCOL,
        ] {
            let error = explained(code);
            assert!(!error.is_final(), "{code}: {error}");
        }
    }

    #[test]
    fn each_error_of_the_system_has_its_remedy() {
        use io::ErrorKind as Kind;
        let file = |error: &io::Error| unwritable(Path::new("o.db"), error);
        let directory = |error: &io::Error| not_created(Path::new("d"), error);
        for (error, kind, remedy) in [
            (&file as &dyn Fn(&_) -> _, Kind::StorageFull, "free some space"),
            (&file, Kind::QuotaExceeded, "free some space"),
            (&file, Kind::IsADirectory, "o.db is a directory, not a regular file"),
            (&file, Kind::PermissionDenied, "make it writable"),
            (&directory, Kind::StorageFull, "free some space"),
            (&directory, Kind::QuotaExceeded, "free some space"),
            (&directory, Kind::AlreadyExists, "d is not a directory"),
            (&directory, Kind::NotADirectory, "d is not a directory"),
            (&directory, Kind::PermissionDenied, "create it, or give the database another path"),
        ] {
            let said = error(&kind.into()).to_string();
            assert!(said.contains(remedy), "{kind:?}: {said}");
        }
    }
}
