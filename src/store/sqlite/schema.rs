//! The schema of a database, and its migrations.

use std::{collections::BTreeSet, path::Path};

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

/// The schema version of this software.
pub(super) fn latest() -> i64 {
    i64::try_from(migrations().count()).unwrap_or(i64::MAX)
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
    let known = latest();
    if found > known {
        return Err(OpenError::TooNew { store: path.display().to_string(), found, known });
    }
    check_triggers(connection, path)?;
    check_definitions(connection, path, found)?;
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

/// Checks that the tables of a database of this version, and their indexes, are defined as the migrations do: a
/// generated column, another default or a further index could change or drop what is written. Tables of other programs,
/// and views, may be there.
fn check_definitions(connection: &Connection, path: &Path, version: i64) -> Result<(), OpenError> {
    let store = || path.display().to_string();
    let ours = (|| {
        let mut ours = Connection::open_in_memory()?;
        migrate_to(&mut ours, 0, version)?;
        definitions(&ours)
    })();
    let ours = ours.map_err(|error| explain(path, &error))?;
    let found = definitions(connection).map_err(|error| explain(path, &error))?;
    let tables: BTreeSet<_> = ours.iter().map(|definition| &definition.table).collect();
    let found: BTreeSet<_> = found.iter().filter(|definition| tables.contains(&definition.table)).collect();
    match ours.iter().collect::<BTreeSet<_>>().symmetric_difference(&found).next() {
        Some(Definition { table, .. }) => Err(OpenError::Definition { store: store(), table: table.clone() }),
        None => Ok(()),
    }
}

/// The definition of a table, or of an index of it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Definition {
    table: String,
    name: String,
    kind: String,
    /// Without the differences of spaces; `None` for an index that belongs to a constraint.
    sql: Option<String>,
}

/// The definitions in a database.
fn definitions(connection: &Connection) -> rusqlite::Result<Vec<Definition>> {
    let mut query = connection.prepare("SELECT lower(tbl_name), lower(name), type, sql FROM sqlite_schema")?;
    let rows = query.query_map([], |row| {
        let sql: Option<String> = row.get(3)?;
        let sql = sql.map(|sql| sql.split_whitespace().collect::<Vec<_>>().join(" "));
        Ok(Definition { table: row.get(0)?, name: row.get(1)?, kind: row.get(2)?, sql })
    })?;
    rows.collect()
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
    migrate_to(connection, found, i64::MAX)
}

/// Applies the migrations after this version, up to that of `last`.
pub(super) fn migrate_to(connection: &mut Connection, found: i64, last: i64) -> rusqlite::Result<()> {
    let versions = (1_i64..).zip(migrations());
    for (version, statements) in versions.filter(|(version, _)| *version > found && *version <= last) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(statements)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
    }
    Ok(())
}
