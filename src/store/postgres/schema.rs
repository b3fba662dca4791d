//! The schema of a database, and its migrations.

use std::{fmt::Write as _, str::FromStr, sync::Arc};

use tokio_postgres::{Error, error::SqlState};

use super::{
    commit::RANDOM_TOKEN,
    connect::{Connection, Connector},
    error::{explain, is_worth_repeating},
};
use crate::{ports::StoreError, store::OpenError};

/// The migrations, each starting with its own line.
const SCHEMA: &str = include_str!("schema.sql");
const MIGRATION: &str = "-- migration ";
/// What stands for the schema of the tables in [`SCHEMA`].
const PLACE: &str = "SCHEMA.";

/// The table that says which migrations a database has: it is there before the first one.
const TABLE: &str = "CREATE TABLE SCHEMA.store_schema (
    id          smallint PRIMARY KEY CHECK (id = 0),
    version     integer  NOT NULL,  -- the last migration
    usable_from integer  NOT NULL   -- the lowest version of the software's own schema with which it may still be used
);
INSERT INTO SCHEMA.store_schema (id, version, usable_from) VALUES (0, 0, 0);
";

/// The migrations that a version of the software knows, in their order.
#[derive(Clone)]
pub(super) struct Migrations(Arc<[Migration]>);

/// One migration.
struct Migration {
    version: i32,
    /// The lowest version of the software's own schema with which the database may still be used after it.
    usable_from: i32,
    statements: String,
}

impl Migrations {
    /// Those of this version.
    pub(super) fn of_this_version() -> Self {
        Self::of(SCHEMA)
    }

    /// Those in this text.
    fn of(text: &str) -> Self {
        let migration = |(version, migration): (i32, &str)| {
            let (line, statements) = migration.split_once('\n').unwrap_or_default();
            let usable_from = line.rsplit(' ').next().and_then(|number| i32::from_str(number).ok()).unwrap_or(version);
            Migration { version, usable_from, statements: statements.to_owned() }
        };
        Self((1..).zip(text.split(MIGRATION).skip(1)).map(migration).collect())
    }

    /// Those of a later version, which has this one more, with its own line.
    #[cfg(test)]
    pub(super) fn and(next: &str) -> Self {
        Self::of(&format!("{SCHEMA}{MIGRATION}{next}"))
    }

    /// The last version.
    fn latest(&self) -> i32 {
        self.0.last().map_or(0, |migration| migration.version)
    }

    /// Those after this version.
    fn after(&self, version: i32) -> impl Iterator<Item = &Migration> {
        self.0.iter().filter(move |migration| migration.version > version)
    }

    /// Checks that a database of the version `found` may be used by this software.
    ///
    /// # Errors
    /// It may not: a later version has migrated it.
    pub(super) fn check(&self, found: i32, usable_from: i32) -> Result<(), TooNew> {
        let known = self.latest();
        if usable_from > known { Err(TooNew { found, known }) } else { Ok(()) }
    }
}

/// A later version of this software has migrated a database, so that this one can't use it any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct TooNew {
    found: i32,
    known: i32,
}

impl TooNew {
    fn at_open(self, store: String) -> OpenError {
        OpenError::TooNew { store, found: self.found.into(), known: self.known.into() }
    }

    /// The error of a process that has opened it before.
    pub(super) fn later(self, store: String) -> StoreError {
        StoreError::TooNew { store, found: self.found.into(), known: self.known.into() }
    }
}

/// The result of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// The schema version before; 0 if there was no store.
    pub from: i32,
    /// The schema version now.
    pub to: i32,
}

/// The statements that make the tables of a new store in this schema, or that bring one of this version to the newest.
pub(super) fn statements(schema: &str, from: i32) -> String {
    let mut all = String::new();
    if from == 0 {
        let _ = writeln!(all, "CREATE SCHEMA IF NOT EXISTS {schema};\n{}", in_schema(TABLE, schema));
    }
    for migration in Migrations::of_this_version().after(from) {
        let _ = writeln!(all, "{}\n{}", in_schema(&migration.statements, schema).trim(), note(schema, migration));
    }
    all
}

/// The statements that give a role the rights to these tables that a service needs.
pub(super) fn grants(schema: &str, role: &str) -> String {
    let role = role.replace('"', "\"\"");
    format!(
        "GRANT USAGE ON SCHEMA {schema} TO \"{role}\";\n\
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO \"{role}\";\n"
    )
}

/// Notes that a migration was applied.
fn note(schema: &str, Migration { version, usable_from, .. }: &Migration) -> String {
    format!("UPDATE {schema}.store_schema SET version = {version}, usable_from = {usable_from};")
}

fn in_schema(statements: &str, schema: &str) -> String {
    statements.replace(PLACE, &format!("{schema}."))
}

/// Applies the missing migrations, in one transaction. Several processes can do it at once: they wait for each other.
/// If none is missing, the user needs no right for it. A leader goes on meanwhile, unless its version can't use the
/// tables any more: then its term is over.
///
/// # Errors
/// The user may not do it, a later version of this software was there, the tables are those of other software, or the
/// database can't be used.
pub(super) async fn migrate(connector: &Connector, connection: &mut Connection) -> Result<Migrated, OpenError> {
    /// Most times that it is tried: in between, another process creates the tables, or uses them.
    const ATTEMPTS: usize = 5;
    let (store, schema) = (connector.url().to_string(), connector.url().schema());
    let mut attempts = 0;
    loop {
        attempts += 1;
        match migrate_once(connector.migrations(), connection, &store, schema).await {
            Err(Failed::Statement(error))
                if attempts < ATTEMPTS && (is_there(&error) && attempts == 1 || is_worth_repeating(&error)) => {}
            Err(Failed::Statement(error)) if error.code() == Some(&SqlState::DUPLICATE_TABLE) => {
                return Err(OpenError::Foreign { store });
            }
            Err(Failed::VersionNotRead(error)) => return Err(explain(&store, &error).into()),
            Err(Failed::Statement(error)) => return Err(refusal(&store, &error)),
            Err(Failed::TooNew(too_new)) => return Err(too_new.at_open(store)),
            Ok(migrated) => return Ok(migrated),
        }
    }
}

/// Checks that a database has the current schema.
pub(super) async fn check(connector: &Connector, connection: &Connection) -> Result<(), OpenError> {
    let store = connector.url().to_string();
    let found = version(connection, connector.url().schema()).await.map_err(|error| explain(&store, &error))?;
    let (found, usable_from) = found.unwrap_or_default();
    let (migrations, known) = (connector.migrations(), connector.migrations().latest());
    migrations.check(found, usable_from).map_err(|too_new| too_new.at_open(store.clone()))?;
    if found < known {
        return Err(OpenError::NotMigrated { store, found: found.into(), known: known.into() });
    }
    Ok(())
}

/// Checks that no table of the store has a trigger, or a rule that rewrites statements: this software creates none, and
/// each could change what is written.
pub(super) async fn check_additions(connector: &Connector, connection: &Connection) -> Result<(), OpenError> {
    let additions = "SELECT t.tgname || ' of the table ' || c.relname
                     FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
                     WHERE NOT t.tgisinternal AND t.tgenabled <> 'D' AND c.relnamespace = to_regnamespace($1)
                     UNION ALL
                     SELECT r.rulename || ' of the table ' || c.relname
                     FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
                     WHERE c.relkind IN ('r', 'p') AND c.relnamespace = to_regnamespace($1)
                     ORDER BY 1 LIMIT 1";
    let (store, schema) = (connector.url().to_string(), connector.url().schema());
    let found = connection.query(additions, &[&schema]).await.map_err(|error| explain(&store, &error))?;
    match found.first() {
        Some(row) => Err(OpenError::Trigger { store, trigger: row.get(0) }),
        None => Ok(()),
    }
}

/// Why the migrations were not applied.
enum Failed {
    VersionNotRead(Error),
    Statement(Error),
    TooNew(TooNew),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Statement(error)
    }
}

async fn migrate_once(
    migrations: &Migrations,
    connection: &mut Connection,
    store: &str,
    schema: &str,
) -> Result<Migrated, Failed> {
    let check =
        |(found, usable_from): (i32, i32)| migrations.check(found, usable_from).map(|()| found).map_err(Failed::TooNew);
    let known = version(connection, schema).await.map_err(Failed::VersionNotRead)?.map(check).transpose()?;
    let latest = migrations.latest();
    if let Some(to) = known.filter(|known| *known >= latest) {
        return Ok(Migrated { from: to, to });
    }
    let transaction = connection.transaction().await?;
    if known.is_none() {
        let create = format!("CREATE SCHEMA IF NOT EXISTS {schema};\n{}", in_schema(TABLE, schema));
        transaction.batch_execute(&create).await?;
    }
    let lock = format!("SELECT version, usable_from FROM {schema}.store_schema WHERE id = 0 FOR UPDATE");
    let row = transaction.query_typed_one(&lock, &[]).await?;
    let from = check((row.get("version"), row.get("usable_from")))?;
    if from > 0 && migrations.after(from).any(|migration| migration.usable_from > from) {
        transaction.batch_execute(&in_schema(&end_of_term(), schema)).await?;
    }
    for migration in migrations.after(from) {
        transaction.batch_execute(&in_schema(&migration.statements, schema)).await?;
        transaction.batch_execute(&note(schema, migration)).await?;
    }
    transaction.commit().await?;
    if from < latest {
        tracing::info!(store, from, to = latest, "the schema of the database was migrated");
    }
    Ok(Migrated { from, to: latest.max(from) })
}

/// The statements that end the term of a leader: nothing of it commits any more. It may call subsystems until its lease
/// ends, so other replicas wait for that, as after a claim.
fn end_of_term() -> String {
    format!(
        "UPDATE SCHEMA.leader l SET epoch = greatest(l.epoch, m.epoch) + 1, claim = {RANDOM_TOKEN}, beat = beat + 1
         FROM SCHEMA.meta m WHERE l.id = 0 AND m.id = 0;
         UPDATE SCHEMA.meta SET token = {RANDOM_TOKEN} WHERE id = 0"
    )
}

/// The schema version and the lowest one with which it may be used, if there is a store.
async fn version(connection: &Connection, schema: &str) -> Result<Option<(i32, i32)>, Error> {
    let table = format!("{schema}.store_schema");
    let is_there = connection.query("SELECT 1 WHERE to_regclass($1) IS NOT NULL", &[&table]).await?;
    if is_there.is_empty() {
        return Ok(None);
    }
    let row = connection.query(&format!("SELECT version, usable_from FROM {table} WHERE id = 0"), &[]).await?;
    Ok(row.first().map(|row| (row.get("version"), row.get("usable_from"))))
}

/// True if a table, a schema, or one of their entries in the catalogue exists already.
fn is_there(error: &Error) -> bool {
    let codes = [SqlState::DUPLICATE_TABLE, SqlState::DUPLICATE_SCHEMA, SqlState::UNIQUE_VIOLATION];
    error.code().is_some_and(|code| codes.contains(code))
}

/// The error for tables that were not made.
fn refusal(store: &str, error: &Error) -> OpenError {
    if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        let (store, problem) =
            (store.to_owned(), error.as_db_error().map_or_else(String::new, |it| it.message().into()));
        let remedy = "run `orchestrator store migrate` as the owner of the schema, with --grant-to for this user";
        return StoreError::ReadOnly { store, problem: format!("{problem}; {remedy}") }.into();
    }
    explain(store, error).into()
}
