//! Parameters of statements, with their types. Named here, the types need not be asked for, which would take a round
//! trip of its own, and a statement that is prepared by name.

use tokio_postgres::types::{ToSql, Type};

/// A parameter of a statement.
pub(super) trait Parameter: ToSql + Sync + Send {
    /// Its type in SQL.
    fn kind(&self) -> Type;
}

macro_rules! parameters {
    ($($rust:ty => $sql:ident),* $(,)?) => {
        $(impl Parameter for $rust {
            fn kind(&self) -> Type {
                Type::$sql
            }
        })*
    };
}

parameters! {
    bool => BOOL,
    i32 => INT4,
    i64 => INT8,
    Option<i64> => INT8,
    &str => TEXT,
    String => TEXT,
    Option<String> => TEXT,
    &[u8] => BYTEA,
    &[String] => TEXT_ARRAY,
    Vec<u8> => BYTEA,
    Vec<bool> => BOOL_ARRAY,
    Vec<Option<bool>> => BOOL_ARRAY,
    Vec<i16> => INT2_ARRAY,
    Vec<i64> => INT8_ARRAY,
    Vec<Option<i64>> => INT8_ARRAY,
    Vec<&str> => TEXT_ARRAY,
    Vec<Option<&str>> => TEXT_ARRAY,
    Vec<String> => TEXT_ARRAY,
    Vec<Option<String>> => TEXT_ARRAY,
    Vec<&[u8]> => BYTEA_ARRAY,
    Vec<Option<&[u8]>> => BYTEA_ARRAY,
    Vec<Vec<u8>> => BYTEA_ARRAY,
    Vec<Option<Vec<u8>>> => BYTEA_ARRAY,
}
