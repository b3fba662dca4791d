//! The store in a PostgreSQL database, on one server or on several of which one takes over from another.
//!
//! So far: how the servers are reached, and the tables.

mod connect;
mod error;
mod schema;
#[cfg(test)]
mod tests;
mod url;

use self::connect::Connector;
pub use self::{schema::Migrated, url::PostgresUrl};
use super::OpenError;
use crate::clock::Clock;

/// Makes the tables of a store, or applies the migrations that they lack. Services of the version before go on with
/// them.
///
/// # Errors
/// The user may not do it, a later version of this software was there, the schema has tables of other software, or no
/// server of the URL takes writes.
pub async fn migrate(url: &PostgresUrl, clock: Clock) -> Result<Migrated, OpenError> {
    let connector = Connector::new(url.clone(), clock).await?;
    let mut connection = connector.connect().await?;
    schema::migrate(&connector, &mut connection).await
}

/// The statements by which [`migrate`] makes the tables of a new store in the schema of this URL.
#[must_use]
pub fn tables(url: &PostgresUrl) -> String {
    schema::statements(url.schema(), 0)
}
