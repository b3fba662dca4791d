//! A database that is copied to another one, or from it.

use std::pin::pin;

use futures_util::TryStreamExt as _;
use tokio::runtime::Handle;

use super::{
    commit::{DURABLE, RANDOM_TOKEN},
    connect::{APPLICATION, Connection, Connector},
    error::explain,
    parameter::Parameter,
    rows::Failed,
    schema,
    url::PostgresUrl,
    writer::failure,
};
use crate::{
    clock::Clock,
    ports::StoreError,
    store::{
        CopyError, OpenError,
        copying::{Copied, Database, Each, Kind, NotServed, Side, Standing, Table, Values, meta_columns},
        row::{Wrong, flag, number, optional_text},
    },
};

/// A database, on a blocking thread.
pub(in crate::store) struct Copying {
    connector: Connector,
    connection: Connection,
    runtime: Handle,
    /// The source is read in one transaction, in which no process can write: until it is marked.
    in_transaction: bool,
}

impl Copying {
    /// Connects to a database. A target gets its tables, and in a source no process can write from now on.
    pub(in crate::store) fn open(
        url: &PostgresUrl,
        side: Side,
        clock: Clock,
        runtime: Handle,
    ) -> Result<Self, OpenError> {
        let opened = runtime.block_on(async {
            let connector = Connector::new(url.clone(), clock).await?;
            let mut connection = connector.connect(APPLICATION).await?;
            match side {
                Side::Source => {
                    schema::check(&connector, &connection).await?;
                    let lock = format!("SELECT 1 FROM {}.meta WHERE id = 0 FOR UPDATE", url.schema());
                    let locked = async {
                        connection.begin(true, None).await?;
                        connection.query(&lock, &[]).await
                    };
                    locked.await.map_err(|error| explain(&url.to_string(), &error))?;
                }
                Side::Target => drop(schema::migrate(&connector, &mut connection).await?),
            }
            Ok::<_, OpenError>((connector, connection))
        });
        let (connector, connection) = opened?;
        Ok(Self { connector, connection, runtime, in_transaction: side == Side::Source })
    }

    fn schema(&self) -> &str {
        self.connector.url().schema()
    }

    fn failed(&self, failed: impl Into<Failed>) -> StoreError {
        failure(&self.connector, &failed.into())
    }

    fn query(&self, query: &str, parameters: &[&dyn Parameter]) -> Result<Vec<tokio_postgres::Row>, StoreError> {
        let queried = self.runtime.block_on(self.connection.query(query, parameters));
        queried.map_err(|error| self.failed(error))
    }

    /// The one row of the table `meta`.
    fn row(&self, columns: &str) -> Result<tokio_postgres::Row, StoreError> {
        let query = format!("SELECT {columns} FROM {}.meta WHERE id = 0", self.schema());
        self.query(&query, &[])?.pop().ok_or_else(|| self.failed(Wrong::new("row", "is not there")))
    }
}

/// The values of one column.
fn array<'v>(kind: Kind, values: impl Iterator<Item = &'v Copied>) -> Box<dyn Parameter + 'v> {
    match kind {
        Kind::Number => Box::new(values.map(of_number).collect::<Vec<_>>()),
        Kind::Flag => Box::new(values.map(|value| of_number(value).map(|number| number != 0)).collect::<Vec<_>>()),
        Kind::Text => Box::new(values.map(of_text).collect::<Vec<_>>()),
        Kind::AnyText => Box::new(values.map(|value| of_text(value).map(str::as_bytes)).collect::<Vec<_>>()),
        Kind::Bytes => Box::new(values.map(of_bytes).collect::<Vec<_>>()),
    }
}

fn of_number(value: &Copied) -> Option<i64> {
    if let Copied::Number(number) = value { Some(*number) } else { None }
}

fn of_text(value: &Copied) -> Option<&str> {
    if let Copied::Text(text) = value { Some(text) } else { None }
}

fn of_bytes(value: &Copied) -> Option<&[u8]> {
    if let Copied::Bytes(bytes) = value { Some(bytes) } else { None }
}

impl Database for Copying {
    fn url(&self) -> String {
        self.connector.url().to_string()
    }

    fn standing(&mut self) -> Result<Standing, CopyError> {
        let records = format!("EXISTS (SELECT 1 FROM {}.cycles) AS has_records", self.schema());
        let row = self.row(&format!("not_served, is_closed, commits, {records}"))?;
        let read = || {
            let not_served = optional_text(&row, "not_served")?.map(|text| NotServed::parse(&text));
            let is_empty = number(&row, "commits")? == 0 && !flag(&row, "has_records")?;
            Ok::<_, Wrong>(Standing { not_served, is_closed: flag(&row, "is_closed")?, is_empty })
        };
        Ok(read().map_err(|wrong| self.failed(wrong))?)
    }

    fn mark(&mut self, not_served: Option<&NotServed>) -> Result<(), CopyError> {
        let _ = self.connection.take_warning();
        // A process that has taken it over, and written nothing yet, finds another token, and then this mark.
        let update = format!(
            "WITH {DURABLE} UPDATE {}.meta SET not_served = $1, token = {RANDOM_TOKEN} FROM durable WHERE id = 0",
            self.schema()
        );
        self.query(&update, &[&not_served.map(NotServed::text)])?;
        if std::mem::take(&mut self.in_transaction) {
            let committed = self.runtime.block_on(self.connection.batch_execute("COMMIT"));
            committed.map_err(|error| self.failed(error))?;
        }
        match self.connection.take_warning() {
            Some(problem) => Err(StoreError::Unavailable { store: self.url(), problem }.into()),
            None => Ok(()),
        }
    }

    fn rows(&mut self, table: &Table, each: Each<'_>) -> Result<(), CopyError> {
        let columns: Vec<_> = table.columns.iter().map(|(column, _)| *column).collect();
        let query =
            format!("SELECT {} FROM {}.{} ORDER BY {}", columns.join(", "), self.schema(), table.name, columns[0]);
        // The library reads no further than this takes.
        let rows = self.runtime.block_on(self.connection.stream(&query)).map_err(|error| self.failed(error))?;
        let mut rows = pin!(rows);
        while let Some(row) = self.runtime.block_on(rows.try_next()).map_err(|error| self.failed(error))? {
            each(&row)?;
        }
        Ok(())
    }

    fn put(&mut self, table: &Table, rows: &[Values]) -> Result<(), CopyError> {
        let names: Vec<_> = table.columns.iter().map(|(column, _)| *column).collect();
        let places: Vec<_> = (1..=names.len()).map(|place| format!("${place}")).collect();
        let (names, places) = (names.join(", "), places.join(", "));
        let insert = format!(
            "INSERT INTO {}.{} ({names}) SELECT * FROM unnest({places}) AS u ({names})",
            self.schema(),
            table.name
        );
        let arrays = table.columns.iter().enumerate();
        let arrays: Vec<_> =
            arrays.map(|(index, (_, kind))| array(*kind, rows.iter().map(move |row| &row[index]))).collect();
        self.query(&insert, &arrays.iter().map(|array| &**array as &dyn Parameter).collect::<Vec<_>>())?;
        Ok(())
    }

    fn meta(&mut self, read: Each<'_>) -> Result<(), CopyError> {
        read(&self.row("*")?)
    }

    fn store_id(&mut self) -> Result<[u8; 16], CopyError> {
        let row = self.row("store_id")?;
        let id: &[u8] = row.try_get(0).map_err(|error| self.failed(error))?;
        Ok(id.try_into().map_err(|_| self.failed(Wrong::new("store_id", "has not 16 bytes")))?)
    }

    fn put_meta(&mut self, values: &Values, id: [u8; 16]) -> Result<(), CopyError> {
        let columns = meta_columns();
        let mut parameters: Vec<Box<dyn Parameter + '_>> = vec![Box::new(id.to_vec())];
        let mut set = vec!["store_id = $1".to_owned()];
        for ((column, kind), value) in columns.iter().zip(values) {
            parameters.push(array(*kind, [value].into_iter()));
            set.push(format!("{column} = (${})[1]", parameters.len()));
        }
        let update = format!("UPDATE {}.meta SET {} WHERE id = 0", self.schema(), set.join(", "));
        self.query(&update, &parameters.iter().map(|it| &**it as &dyn Parameter).collect::<Vec<_>>())?;
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<Option<String>, CopyError> {
        let rows = self.query(&format!("SELECT note FROM {}.checkpoint", self.schema()), &[])?;
        let note = rows.first().map(|row| optional_text(row, "note")).transpose();
        Ok(note.map_err(|wrong| self.failed(wrong))?.flatten())
    }

    fn put_checkpoint(&mut self, checkpoint: Option<&str>) -> Result<(), CopyError> {
        if let Some(checkpoint) = checkpoint {
            self.query(&format!("INSERT INTO {}.checkpoint (id, note) VALUES (0, $1)", self.schema()), &[&checkpoint])?;
        }
        Ok(())
    }
}
