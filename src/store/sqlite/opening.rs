//! Opens a database: takes its locks, sees whether it may be served, and migrates it. Or opens it to look at it.

use std::{fmt::Write as _, fs, ops::Range, os::unix::ffi::OsStrExt, path::Path};

use rusqlite::{Connection, OpenFlags, TransactionBehavior, config::DbConfig};

use super::{
    BUSY,
    contents::refusal,
    error::{explain, unwritable},
    identity::Identity,
    log,
    note::{Mark, Note},
    place::{DatabaseFileError, LockedDatabase, note_of},
    rows::{Snapshot, epoch, number},
    schema::{check_version, latest, migrate},
    seal::{renew, seal_end},
};
use crate::{
    ledger::{Frontier, SealKeys},
    model::Revision,
    ports::{Checks, Log, StoreError, Write},
    store::{
        AcceptError, Accepted, Compacted, NewKeys, OpenError, StoreUrl,
        contents::{check_extent, check_unsealed_epoch, read_log},
        copying::NotServed,
        counts::Counts,
        frontier::Appended,
        row::integer,
        seal::{Renewal, Sealer},
        walk::{Recounted, recount},
    },
};

/// Which databases are opened, beside those that may be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowed {
    None,
    /// Copies of other databases, and one that was moved.
    Copies,
    /// Those that are not served, for any reason.
    NotServed,
}

/// A database of this software with the current schema.
pub(super) struct Opened {
    pub(super) place: LockedDatabase,
    pub(super) connection: Connection,
    /// Its file.
    pub(super) here: Identity,
    /// Its file when it was last used.
    noted: Option<Identity>,
}

impl Opened {
    pub(super) fn at(path: &Path, allowed: Allowed) -> Result<Self, OpenError> {
        let mut place = LockedDatabase::take(path)?;
        let opened = Self::open(&place.path, allowed);
        if let Err(OpenError::Files(DatabaseFileError::NotADatabase { .. }) | OpenError::Foreign { .. }) = opened {
            place.leave();
        }
        let (connection, here, noted) = opened?;
        Ok(Self { place, connection, here, noted })
    }

    fn open(path: &Path, allowed: Allowed) -> Result<(Connection, Identity, Option<Identity>), OpenError> {
        let explained = |error| explain(path, &error);
        // A foreign database, or a copy, is not changed.
        let connection = open_file(path).map_err(explained)?;
        let version = check_version(&connection, path)?;
        let here = Identity::at(path).map_err(|error| unwritable(path, &error))?;
        let (not_served, noted) = if version < Identity::SINCE {
            (None, None)
        } else {
            (Identity::not_served(&connection).map_err(explained)?, Identity::noted(&connection).map_err(explained)?)
        };
        let noted = noted.filter(|_| not_served.is_none());
        match (&not_served, allowed) {
            (_, Allowed::NotServed) | (None, _) => {}
            (Some(not_served), Allowed::Copies) if not_served.is_acceptable() => {}
            (Some(not_served), _) => {
                return Err(not_served.refusal(StoreUrl::Sqlite(path.to_owned()).to_string()).into());
            }
        }
        match here.check(noted.as_ref()) {
            Err(DatabaseFileError::Copy { .. }) if allowed == Allowed::Copies => {}
            checked => checked?,
        }
        let mut connection = configure(connection).map_err(explained)?;
        migrate(&mut connection, version).map_err(explained)?;
        Ok((connection, here, noted))
    }
}

/// Accepts a database with its current file and contents: seals them, and appends to its log what `write` makes of the
/// leaves that are missing. First saves the new ones of its keys. Also returns the end of the log.
pub(in crate::store) fn accept(
    path: &Path,
    (keys, new): (SealKeys, NewKeys),
    checks: Checks,
    write: impl FnOnce(Vec<Range<u64>>) -> Write,
) -> Result<(Accepted, Frontier), AcceptError> {
    if !path.exists() {
        return Err(OpenError::from(DatabaseFileError::Missing { database: path.display().to_string() }).into());
    }
    let Opened { place, mut connection, here, noted } = Opened::at(path, Allowed::Copies)?;
    let log = log_of_meta(&connection, &place.path).map_err(OpenError::from)?;
    let epoch = epoch(&connection).map_err(|error| OpenError::from(explain(&place.path, &error)))?;
    let extent = check_extent(&mut Snapshot(&connection)).map_err(|refused| refusal(&place.path, refused));
    extent.map_err(OpenError::from)?;
    let store = place.path.display().to_string();
    check_unsealed_epoch(epoch).map_err(|problem| {
        let problem = format!("epoch in its table meta {problem}");
        OpenError::from(StoreError::Corrupt { store, problem })
    })?;
    new.save()?;
    let accepted = (|| {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut database = Snapshot(&transaction);
        let known = transaction.query_row("SELECT unlogged_to FROM meta", [], |row| number(row, 0)).map(Revision)?;
        let Recounted { log, said, mut counts, unlogged_to } = recount(&mut database, checks, &log, known)?;
        let write = write(said.accepted.ranges().collect());
        counts.add(&write);
        let appended = Appended::to(&log, &write);
        here.note(&transaction)?;
        let mark = Mark::read(&transaction)?;
        let sealer = Sealer::new(keys, mark.id);
        log::append(&transaction, &write, &appended)?;
        transaction.execute(
            "UPDATE meta SET log_size = ?1, log_first_kept = ?2, log_removed = ?3, log_counted_at = ?4, unlogged_to = ?5",
            [
                integer(appended.log.frontier.size()),
                integer(log.first_kept),
                integer(said.removed.count()),
                appended.control(&write).next().map_or(-1, |(leaf, _)| integer(leaf)),
                integer(unlogged_to.0),
            ],
        )?;
        for (column, count) in Counts::COLUMNS.iter().zip(counts.columns()) {
            transaction.execute(&format!("UPDATE meta SET {column} = ?1"), [count])?;
        }
        seal_end(&transaction, &sealer, &appended.log.frontier)?;
        renew(&transaction, &sealer, Renewal::Everything)?;
        transaction.commit()?;
        Ok((mark, appended.log.frontier, said.accepted.count()))
    })();
    let (mark, end, missing) = accepted.map_err(|error| OpenError::from(explain(&place.path, &error)))?;
    let (note, known) = Note::open(&place.path)?;
    note.write(&mark).map_err(|error| unwritable(&note_of(&place.path), &error))?;
    let accepted = Accepted {
        store: place.path.display().to_string(),
        earlier: noted.map(|noted| noted.path).filter(|earlier| *earlier != place.path),
        last_cycle_id: mark.last_cycle_id,
        noted_cycle_id: known
            .filter(|known| known.id == mark.id)
            .map_or(mark.last_cycle_id, |known| known.last_cycle_id),
        missing,
    };
    Ok((accepted, end))
}

/// The log of a database, by its table `meta`.
fn log_of_meta(connection: &Connection, path: &Path) -> Result<Log, StoreError> {
    let extent = connection
        .query_row("SELECT log_size, log_first_kept FROM meta", [], |row| Ok((number(row, 0)?, number(row, 1)?)));
    let (size, first_kept) = extent.map_err(|error| explain(path, &error))?;
    read_log(&mut Snapshot(connection), size, first_kept).map_err(|refused| refusal(path, refused))
}

/// Removes the free pages of a database.
pub(in crate::store) fn compact(path: &Path) -> Result<Compacted, OpenError> {
    if !path.exists() {
        return Err(DatabaseFileError::Missing { database: path.display().to_string() }.into());
    }
    let Opened { place, connection, .. } = Opened::at(path, Allowed::None)?;
    let size = || fs::metadata(&place.path).map_or(0, |file| file.len());
    let truncate = || connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    let compacted = (|| {
        truncate()?;
        let before = size();
        connection.execute_batch("VACUUM")?;
        truncate()?;
        Ok(Compacted { before, after: size() })
    })();
    compacted.map_err(|error: rusqlite::Error| explain(&place.path, &error).into())
}

pub(super) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    configure(open_file(path)?)
}

fn open_file(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    harden(&connection)?;
    Ok(connection)
}

/// Opens a database that is only read, which a process may have open.
pub(super) fn read_only(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    harden(&connection)?;
    Ok(connection)
}

/// Opens a database of the current schema that is only looked at.
pub(super) fn look(given: &Path) -> Result<LockedDatabase, OpenError> {
    let place = LockedDatabase::look(given)?;
    let path = &place.path;
    let connection = immutable(path).map_err(|error| explain(path, &error))?;
    let (found, known) = (check_version(&connection, path)?, latest());
    if found < known {
        return Err(OpenError::NotMigrated { store: path.display().to_string(), found, known });
    }
    if let Some(unfinished @ NotServed::UnfinishedCopyOf(_)) =
        Identity::not_served(&connection).map_err(|error| explain(path, &error))?
    {
        return Err(unfinished.refusal(StoreUrl::Sqlite(path.clone()).to_string()).into());
    }
    Ok(place)
}

/// Opens a database that no process changes: SQLite neither locks it nor makes a file beside it.
pub(super) fn immutable(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => uri.push(char::from(*byte)),
            byte => {
                let _ = write!(uri, "%{byte:02X}");
            }
        }
    }
    let connection = Connection::open_with_flags(uri + "?immutable=1", flags)?;
    harden(&connection)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Limits what the contents of the file can make SQLite do. <https://www.sqlite.org/security.html>
fn harden(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    // One that is added later does nothing.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    // Nor can a table of another program keep rows of ours from being removed.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, false)?;
    Ok(())
}

fn configure(connection: Connection) -> rusqlite::Result<Connection> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // A checkpoint waits for the disk, so the writer decides when.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    // Where that costs no further writes, bytes of removed rows are overwritten.
    connection.pragma_update(None, "secure_delete", "FAST")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}
