//! The errors of SQLite and of the system, as errors of a store.

use std::{io, path::Path};

use rusqlite::ErrorCode;

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
            StoreError::ReadOnly { store, problem }
        }
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => StoreError::Corrupt { store, problem },
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => {
            let problem = format!("{problem}: another program has locked it; end that program's transaction");
            StoreError::Unavailable { store, problem }
        }
        // These are or may be temporary.
        ErrorCode::SystemIoFailure
        | ErrorCode::OutOfMemory
        | ErrorCode::OperationAborted
        | ErrorCode::OperationInterrupted
        | ErrorCode::FileLockingProtocolFailed => StoreError::Unavailable { store, problem },
        // Mainly a missing table or column, or a row that already exists.
        _ => StoreError::Unusable { store, problem },
    }
}

pub(super) fn unavailable(path: &Path, problem: String) -> StoreError {
    StoreError::Unavailable { store: path.display().to_string(), problem }
}

pub(super) fn unwritable(path: &Path, error: &io::Error) -> OpenError {
    let (store, problem) = (path.display().to_string(), error.to_string());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full { store, problem }.into(),
        io::ErrorKind::IsADirectory => DatabaseFileError::NotRegular { path: store, found: "a directory" }.into(),
        _ => StoreError::ReadOnly { store, problem }.into(),
    }
}
