//! Stores: where the record is kept. One contract, the trait [`Store`] in `ports`, and one suite of
//! tests that every store passes.

mod frontier;
mod memory;
mod sqlite;
#[cfg(test)]
mod suite;

use std::{fmt, path::PathBuf, sync::Arc};

use crate::{
    clock::Clock,
    model::CycleId,
    ports::{Contents, Record, Store, StoreError},
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

/// Opens a store, and reads what an earlier process left. A new epoch begins in it with the first commit. Each record that
/// is read has to pass `check`, which is done where it keeps nobody waiting. `clock` bounds the new epoch from below.
///
/// # Errors
/// Another process has it open, it is a copy, or it can't be opened, read or written.
pub async fn open(url: &StoreUrl, check: Check, clock: Clock) -> Result<(Arc<dyn Store>, Contents), StoreError> {
    match url {
        StoreUrl::Memory => {
            let (store, contents) = memory::Memory::new(clock);
            Ok((Arc::new(store), contents))
        }
        StoreUrl::Sqlite(path) => {
            let (store, contents) = sqlite::Sqlite::open(path.clone(), check, clock).await?;
            Ok((Arc::new(store), contents))
        }
    }
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
pub fn accept(url: &StoreUrl) -> Result<Accepted, StoreError> {
    match url {
        StoreUrl::Memory => Err(StoreError::Missing(url.to_string())),
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
