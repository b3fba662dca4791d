//! The schema of a database, and its migrations.

use std::path::Path;

use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior};

use super::{error::explain, place::DatabaseFileError};
use crate::store::OpenError;

/// The migrations, each starting with its own line.
const SCHEMA: &str = include_str!("schema.sql");
const MIGRATION: &str = "-- migration ";
/// "DrmO": the application id in the header of a database.
const APPLICATION_ID: i64 = 0x4472_6d4f;

/// The migrations, each without the line with its number.
fn migrations() -> impl Iterator<Item = &'static str> {
    SCHEMA.split(MIGRATION).skip(1).map(|migration| migration.split_once('\n').unwrap_or_default().1)
}

/// The schema version of a database, if this software can use it.
pub(super) fn check_version(connection: &Connection, path: &Path) -> Result<i64, OpenError> {
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let tables = || connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0));
    let read = || Ok((pragma("user_version")?, pragma("application_id")?, tables()?));
    let (found, application_id, tables) = read().map_err(|error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => DatabaseFileError::NotADatabase { path: path.display().to_string() }.into(),
        _ => OpenError::from(explain(path, &error)),
    })?;
    if application_id != APPLICATION_ID && (tables > 0 || found > 0) {
        return Err(OpenError::Foreign { store: path.display().to_string() });
    }
    let known = i64::try_from(migrations().count()).unwrap_or(i64::MAX);
    if found > known {
        return Err(OpenError::TooNew { store: path.display().to_string(), found, known });
    }
    check_triggers(connection, path)?;
    Ok(found)
}

/// Checks that the database has no trigger: this software creates none, and each could change what is written. Views
/// only read.
fn check_triggers(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let trigger = "SELECT name FROM sqlite_schema WHERE type = 'trigger' ORDER BY name LIMIT 1";
    let trigger = connection.query_row(trigger, [], |row| row.get(0)).optional();
    match trigger.map_err(|error| explain(path, &error))? {
        Some(trigger) => Err(OpenError::Trigger { store: path.display().to_string(), trigger }),
        None => Ok(()),
    }
}

/// Checks that a database has the current schema.
pub(super) fn check_current(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let (found, known) = (check_version(connection, path)?, i64::try_from(migrations().count()).unwrap_or(i64::MAX));
    if found < known {
        return Err(OpenError::TooOld { store: path.display().to_string(), found, known });
    }
    Ok(())
}

/// Applies the missing migrations to a database of this version.
pub(super) fn migrate(connection: &mut Connection, found: i64) -> rusqlite::Result<()> {
    for (version, statements) in (1_i64..).zip(migrations()).filter(|(version, _)| *version > found) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(statements)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
    }
    Ok(())
}
