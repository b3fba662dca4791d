//! A database that is copied to another one, or from it.

use std::{fs, io, path::Path};

use rusqlite::{Connection, params_from_iter, types::Value as Sql};

use super::{
    error::{explain, unavailable},
    identity::Identity,
    note::{Mark, Note, lost, refuse_older_copy},
    opening::{Allowed, Opened},
    place::{DatabaseFileError, LockedDatabase},
    rows::{Snapshot, number},
};
use crate::{
    file::{self, sync_directory},
    ports::StoreError,
    store::{
        CopyError, OpenError, StoreUrl, checkpoint_of,
        contents::Tables as _,
        copying::{Copied, Database, Each, NotServed, Side, Standing, Table, Values, meta_columns},
        published,
    },
};

/// A locked database.
pub(in crate::store) struct Copying {
    connection: Connection,
    here: Identity,
    /// Released last.
    place: LockedDatabase,
}

impl Copying {
    /// Locks a database, and migrates it. A target that does not exist is created.
    pub(in crate::store) fn open(path: &Path, side: Side) -> Result<Self, OpenError> {
        if side == Side::Source && !path.exists() {
            return Err(DatabaseFileError::Missing { database: path.display().to_string() }.into());
        }
        let Opened { place, connection, here, .. } = Opened::at(path, Allowed::NotServed)?;
        let opened = Self { connection, here, place };
        // Its log must not get as large as what is copied.
        let checkpoints = opened.connection.pragma_update(None, "wal_autocheckpoint", 1000);
        checkpoints.map_err(|error| opened.failed(&error))?;
        Ok(opened)
    }

    fn failed(&self, error: &rusqlite::Error) -> StoreError {
        explain(&self.place.path, error)
    }

    fn store_url(&self) -> StoreUrl {
        StoreUrl::Sqlite(self.place.path.clone())
    }

    /// Gives all rows of a query.
    fn each(&self, query: &str, each: Each<'_>) -> Result<(), CopyError> {
        let failed = |error| self.failed(&error);
        let mut query = self.connection.prepare(query).map_err(failed)?;
        let mut rows = query.query([]).map_err(failed)?;
        while let Some(row) = rows.next().map_err(failed)? {
            each(row)?;
        }
        Ok(())
    }
}

fn sql(value: &Copied) -> Sql {
    match value {
        Copied::Null => Sql::Null,
        Copied::Number(number) => Sql::Integer(*number),
        Copied::Text(text) => Sql::Text(text.clone()),
        Copied::Bytes(bytes) => Sql::Blob(bytes.clone()),
    }
}

impl Database for Copying {
    fn url(&self) -> String {
        self.store_url().to_string()
    }

    fn standing(&mut self) -> Result<Standing, CopyError> {
        let path = &self.place.path;
        let (note, noted) = Note::open(path)?;
        drop(note);
        let read = || {
            let written = Mark::read(&self.connection)?;
            let is_closed = self.connection.query_row("SELECT is_closed FROM meta", [], |row| row.get(0))?;
            let records = self.connection.query_row("SELECT count(*) FROM cycles", [], |row| number(row, 0))?;
            Ok((written, is_closed, written.commits == 0 && records == 0, Identity::not_served(&self.connection)?))
        };
        let (written, is_closed, is_empty, not_served): (_, bool, _, _) =
            read().map_err(|error| self.failed(&error))?;
        let noted = noted.filter(|noted| noted.id == written.id);
        refuse_older_copy(path, &written, noted.as_ref())?;
        let lacks_commits = noted.is_some_and(|noted| lost(&written, &noted).is_some());
        Ok(Standing { not_served, is_closed: is_closed && !lacks_commits, is_empty })
    }

    fn mark(&mut self, not_served: Option<&NotServed>) -> Result<(), CopyError> {
        let marked = match not_served {
            Some(not_served) => Identity::put_not_served(&self.connection, not_served),
            None => self.here.note(&self.connection),
        };
        // Without its log, the database itself has the mark.
        let copied = marked.and_then(|()| {
            self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
            Mark::read(&self.connection)
        });
        let written = copied.map_err(|error| self.failed(&error))?;
        let path = &self.place.path;
        let noted = Note::open(path)?.0.write(&written).and_then(|()| sync_directory(path));
        noted.map_err(|error| unavailable(path, error.to_string()))?;
        Ok(())
    }

    fn rows(&mut self, table: &Table, each: Each<'_>) -> Result<(), CopyError> {
        let columns: Vec<_> = table.columns.iter().map(|(column, _)| *column).collect();
        self.each(&format!("SELECT {} FROM {} ORDER BY {}", columns.join(", "), table.name, columns[0]), each)
    }

    fn put(&mut self, table: &Table, rows: &[Values]) -> Result<(), CopyError> {
        let columns: Vec<_> = table.columns.iter().map(|(column, _)| *column).collect();
        let places = vec!["?"; columns.len()].join(", ");
        let insert = format!("INSERT INTO {} ({}) VALUES ({places})", table.name, columns.join(", "));
        let put = || {
            let transaction = self.connection.unchecked_transaction()?;
            for row in rows {
                transaction.prepare_cached(&insert)?.execute(params_from_iter(row.iter().map(sql)))?;
            }
            transaction.commit()
        };
        Ok(put().map_err(|error| self.failed(&error))?)
    }

    fn meta(&mut self, read: Each<'_>) -> Result<(), CopyError> {
        self.each("SELECT * FROM meta WHERE id = 0", read)
    }

    fn store_id(&mut self) -> Result<[u8; 16], CopyError> {
        Ok(Snapshot(&self.connection).store_id().map_err(|error| self.failed(&error))?)
    }

    fn put_meta(&mut self, values: &Values, id: [u8; 16]) -> Result<(), CopyError> {
        let set: Vec<_> = meta_columns().iter().map(|(column, _)| format!("{column} = ?")).collect();
        let update = format!("UPDATE meta SET {}, database_id = ?, boot_id = NULL", set.join(", "));
        let values = values.iter().map(sql).chain([Sql::Blob(id.into())]);
        self.connection.execute(&update, params_from_iter(values)).map_err(|error| self.failed(&error))?;
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<Option<String>, CopyError> {
        Ok(published(&self.store_url()))
    }

    fn put_checkpoint(&mut self, checkpoint: Option<&str>) -> Result<(), CopyError> {
        let file = checkpoint_of(&self.place.path);
        let put = match checkpoint {
            Some(checkpoint) => file::replace(&file, checkpoint),
            // That of a database which was there before.
            None => fs::remove_file(&file).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            }),
        };
        Ok(put.map_err(|error| unavailable(&file, error.to_string()))?)
    }
}
