//! Stores: where the record is kept. One contract, the trait [`Store`] in `ports`, and one suite of
//! tests that every store passes.

mod frontier;
mod memory;
mod sqlite;
#[cfg(test)]
mod suite;

use std::{fmt, path::PathBuf, sync::Arc};

pub use self::sqlite::FileError;
use crate::{
    clock::Clock,
    model::CycleId,
    ports::{Record, Store, StoreError},
};

/// Where the record is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreUrl {
    /// `memory:`: gone when the process ends.
    Memory,
    /// `sqlite:PATH`: a SQLite database. A relative path starts at the working directory.
    Sqlite(PathBuf),
}

impl StoreUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// It is none of a store; the message says what is.
    pub fn parse(url: &str) -> Result<Self, String> {
        if url == "memory:" {
            return Ok(Self::Memory);
        }
        match url.strip_prefix("sqlite:") {
            // SQLite has meanings of its own for these.
            Some(path) if !path.is_empty() && !path.starts_with([':', '?']) && !path.starts_with("file:") => {
                if path.starts_with("//") {
                    Err("write the path right after sqlite:, such as sqlite:/var/lib/orchestrator.db".into())
                } else if path.contains('\0') {
                    Err("a path holds no NUL".into())
                } else {
                    Ok(Self::Sqlite(path.into()))
                }
            }
            _ => Err("give sqlite:PATH, such as sqlite:/var/lib/orchestrator.db, or memory:".into()),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
        }
    }
}

/// Says what is wrong with a record's bytes. What passes can be read by everybody.
pub type Check = fn(&Record) -> Result<(), String>;

/// Opens a store, so that it can be read; [`Store::take_over`] lets it be written. Each record that is read has to pass
/// `check`, which is done where it keeps nobody waiting. `clock` bounds new epochs from below.
///
/// # Errors
/// Another process has it open, it is not what may be served, or it can't be opened or read.
pub async fn open(url: &StoreUrl, check: Check, clock: Clock) -> Result<Arc<dyn Store>, OpenError> {
    match url {
        StoreUrl::Memory => Ok(Arc::new(memory::Memory::new(clock))),
        StoreUrl::Sqlite(path) => Ok(Arc::new(sqlite::Sqlite::open(path.clone(), check, clock).await?)),
    }
}

/// Why a store that is only open takes no writes.
fn not_taken_over() -> StoreError {
    StoreError::Defect { problem: "a write came before the store was taken over".into() }
}

/// Why a store was not opened. Each says what to do about it. `store` is where the store is, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "{store} is in use by another process{}; stop that process first, or name another store",
        .by.map_or_else(String::new, |pid| format!(" (pid {pid})"))
    )]
    InUse {
        /// Which store.
        store: String,
        /// The number of that process, if it is known.
        by: Option<u32>,
    },
    /// A later version of this software has made it.
    #[error(
        "{store} has schema version {found}, and this version of the software knows up to {known}; use a newer one"
    )]
    TooNew {
        /// Which store.
        store: String,
        /// The version that it has.
        found: i64,
        /// The latest version that is known here.
        known: i64,
    },
    /// Some other software has made it.
    #[error("{store} is a database of some other software; name another store")]
    Foreign {
        /// Which store.
        store: String,
    },
    /// It lacks more of what was acknowledged than a damaged end explains.
    #[error(
        "{store} ends with cycle {has}, and cycle {noted} was acknowledged: an older copy was put in its place. To have it \
         go on, with the numbers after {has} given again, run `orchestrator store accept {url}`"
    )]
    Behind {
        /// Which store.
        store: String,
        /// Its URL.
        url: StoreUrl,
        /// Its last cycle.
        has: CycleId,
        /// The last cycle that was acknowledged.
        noted: CycleId,
    },
    /// Something is wrong with the files of a database.
    #[error(transparent)]
    Files(#[from] FileError),
    /// It can't be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What [`accept`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The database.
    pub path: PathBuf,
    /// Where it was when it was last used, if that was elsewhere.
    pub earlier: Option<PathBuf>,
    /// Its last cycle.
    pub last_cycle_id: CycleId,
    /// The last cycle that is known to have been acknowledged in it.
    pub noted_cycle_id: CycleId,
}

/// Lets a store be opened as what it is now, though it is a copy, or lacks what was acknowledged. Waits for the disk.
///
/// # Errors
/// There is none, another process has it open, or it can't be opened or written.
pub fn accept(url: &StoreUrl) -> Result<Accepted, OpenError> {
    match url {
        StoreUrl::Memory => Err(FileError::Missing { database: url.to_string() }.into()),
        StoreUrl::Sqlite(path) => sqlite::accept(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for url in ["memory:", "sqlite:a.db", "sqlite:/var/a.db"] {
            assert_eq!(StoreUrl::parse(url).unwrap().to_string(), url);
        }
        for url in ["", "memory", "memory:x", "sqlite:", "sqlite:///a.db", "sqlite::memory:", "postgres://h/d", "a.db"]
        {
            assert!(StoreUrl::parse(url).is_err(), "{url}");
        }
    }
}
