//! Writes what is sealed.

use std::sync::LazyLock;

use rusqlite::{
    Row, ToSql, Transaction, params_from_iter,
    types::{ToSqlOutput, ValueRef},
};

use super::rows::value_of;
use crate::{
    ledger::Frontier,
    store::{
        row::{Row as _, Value, integer},
        seal::{Renewal, Sealer, TABLES, Table, meta_columns},
        term::Next,
    },
};

/// Writes the row of the table `meta`, if its epoch is still the expected one: the sealed columns, the size of the log,
/// and the seal.
static PUT_META: LazyLock<String> = LazyLock::new(|| {
    let columns: Vec<_> = meta_columns().chain(["log_size", "seal"]).map(|column| format!("{column} = ?")).collect();
    format!("UPDATE meta SET {} WHERE epoch = ?", columns.join(", "))
});

/// Write a row of each of [`TABLES`]: its sealed columns, and then its seal. Each commit needs them, so they are not
/// put together there.
static PUT_ROW: LazyLock<Vec<String>> = LazyLock::new(|| {
    let put = |table: &&Table| {
        let (columns, places) = (table.columns.join(", "), "?, ".repeat(table.columns.len()));
        format!("INSERT OR REPLACE INTO {} ({columns}, seal) VALUES ({places}?)", table.name)
    };
    TABLES.iter().map(put).collect()
});

/// Writes the row of the table `meta`, with its seal. False, and nothing is written, if the epoch is not `current` any
/// more.
pub(super) fn put_end(
    transaction: &Transaction<'_>,
    sealer: &Sealer,
    log: &Frontier,
    next: &Next,
    current: i64,
) -> rusqlite::Result<bool> {
    let values = next.meta.into_iter().chain(next.counts.columns());
    let seal = sealer.end(log, values.clone().map(Value::Integer));
    let seal = ToSqlOutput::Borrowed(ValueRef::Blob(&seal));
    let values = values.chain([integer(log.size())]).map(ToSqlOutput::from);
    let values = values.chain([seal, current.into()]);
    Ok(transaction.prepare_cached(&PUT_META)?.execute(params_from_iter(values))? > 0)
}

/// Seals the end of this log, and what the table `meta` contains.
pub(super) fn seal_end(transaction: &Transaction<'_>, sealer: &Sealer, log: &Frontier) -> rusqlite::Result<()> {
    let of_row = |row: &Row<'_>| {
        let values = meta_columns().map(|column| row.value(column)).collect::<Result<Vec<_>, _>>()?;
        Ok(sealer.end(log, values))
    };
    let seal = transaction.query_row("SELECT * FROM meta", [], of_row)?;
    transaction.execute("UPDATE meta SET seal = ?1", [&seal[..]])?;
    Ok(())
}

/// Writes a row, with its seal, over the one with the same key. The values are those of the sealed columns.
pub(super) fn put<const N: usize>(
    transaction: &Transaction<'_>,
    sealer: &Sealer,
    table: &Table,
    values: [&dyn ToSql; N],
) -> rusqlite::Result<()> {
    let outputs = values.into_iter().map(ToSql::to_sql).collect::<rusqlite::Result<Vec<_>>>()?;
    let sealed = outputs.iter().map(|value| value_of_output(value)).collect::<rusqlite::Result<Vec<_>>>()?;
    let seal = sealer.row(table, sealed);
    let statement = TABLES.iter().position(|known| *known == table).map_or("", |index| &PUT_ROW[index]);
    let values = outputs.into_iter().chain([ToSqlOutput::Borrowed(ValueRef::Blob(&seal))]);
    transaction.prepare_cached(statement)?.execute(params_from_iter(values))?;
    Ok(())
}

/// Seals rows of a database anew.
pub(super) fn renew(transaction: &Transaction<'_>, sealer: &Sealer, renewal: Renewal) -> rusqlite::Result<()> {
    for table in TABLES {
        let mut query = transaction.prepare(&format!("SELECT *, rowid AS row FROM {}", table.name))?;
        let mut update = transaction.prepare(&format!("UPDATE {} SET seal = ?2 WHERE rowid = ?1", table.name))?;
        let mut rows = query.query([])?;
        let mut renewed = Vec::new();
        while let Some(row) = rows.next()? {
            if let Some(seal) = sealer.renewed(row, table, renewal)? {
                renewed.push((row.get::<_, i64>("row")?, seal));
            }
        }
        for (row, seal) in renewed {
            update.execute((row, &seal[..]))?;
        }
    }
    Ok(())
}

/// The value that is written.
///
/// # Errors
/// It is of a kind that takes no value: none of these is used.
fn value_of_output<'a>(value: &'a ToSqlOutput<'_>) -> rusqlite::Result<Value<'a>> {
    match value {
        ToSqlOutput::Borrowed(value) => Ok(value_of(*value)),
        ToSqlOutput::Owned(value) => Ok(value_of(value.into())),
        _ => Err(rusqlite::Error::ToSqlConversionFailure("it has no value".into())),
    }
}
