//! The errors of PostgreSQL and of connections to it, as errors of a store.

use tokio_postgres::{
    Error,
    error::{DbError, Severity, SqlState},
};

use super::url::causes;
use crate::ports::StoreError;

/// Maps an error to an error of the store.
pub(super) fn explain(store: &str, error: &Error) -> StoreError {
    if let Some(error) = error.as_db_error() {
        return of_server(store.to_owned(), error);
    }
    let problem = causes(error);
    let remedy = if problem.ends_with("password missing") {
        "name the file with it in store.url: password_file=FILE"
    } else {
        "see whether the server and the network work"
    };
    StoreError::Unavailable { store: store.to_owned(), problem: format!("{problem}; {remedy}") }
}

/// True if a statement with this error may have been executed, or may still be: the connection was lost, the server has
/// ended the session, or it does not know either.
pub(super) fn is_ambiguous(error: &Error) -> bool {
    error.as_db_error().is_none_or(|error| {
        let ends_session = matches!(error.parsed_severity(), Some(Severity::Fatal | Severity::Panic));
        ends_session || *error.code() == SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN || is_of(error, &["08", "57P"])
    })
}

/// True if this connection has no use any more, and another one may: the session has ended, or this server has become a
/// standby.
pub(super) fn ends_connection(error: &Error) -> bool {
    is_ambiguous(error) || error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION)
}

/// True if the same statement may succeed at once: it has met another one, and was rolled back.
pub(super) fn is_worth_repeating(error: &Error) -> bool {
    // The last one: the tables were changed since it was prepared.
    [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED, SqlState::FEATURE_NOT_SUPPORTED]
        .iter()
        .any(|code| error.code() == Some(code))
}

/// True if the code begins with one of these.
fn is_of(error: &DbError, classes: &[&str]) -> bool {
    classes.iter().any(|class| error.code().code().starts_with(class))
}

fn of_server(store: String, error: &DbError) -> StoreError {
    let problem = said(error);
    match error.code().code() {
        "53100" => StoreError::Full { store, problem },
        "42501" => StoreError::ReadOnly {
            store,
            problem: format!(
                "{problem}; grant its user the rights, as the owner of the tables: `orchestrator store migrate \
                 --grant-to USER`"
            ),
        },
        "25006" => {
            let problem = format!("{problem}: this server is a standby; name all servers in store.url");
            StoreError::Unavailable { store, problem }
        }
        "53300" => {
            let problem = format!("{problem}; raise max_connections, or use a pooler");
            StoreError::Unavailable { store, problem }
        }
        "26000" | "42P05" => StoreError::Unavailable {
            store,
            problem: format!("{problem}; if a pooler is before the server, add pooled=true to store.url"),
        },
        "57014" => StoreError::Unavailable {
            store,
            problem: format!("{problem}; it took too long, or somebody has cancelled it"),
        },
        "3D000" => StoreError::Unavailable { store, problem: format!("{problem}; create it: CREATE DATABASE") },
        "XX001" | "XX002" => StoreError::Corrupt { store, problem },
        // A value or a row that it does not take, a limit of it, or a table that is not there: so it will be again.
        _ if is_of(error, &["0A", "22", "23", "42", "54"]) => StoreError::Unusable { store, problem },
        _ if is_of(error, &["28"]) => StoreError::Unavailable {
            store,
            problem: format!("{problem}; see store.url, and pg_hba.conf of the server"),
        },
        _ => StoreError::Unavailable { store, problem },
    }
}

/// The error for rights that were not granted to this role, which mostly does not exist.
pub(super) fn not_granted(store: String, role: &str, error: &Error) -> StoreError {
    let reason = error.as_db_error().map_or_else(|| causes(error), said);
    StoreError::Unavailable { store, problem: format!("the rights can't be granted to {role}: {reason}") }
}

/// What the server says.
fn said(error: &DbError) -> String {
    let mut said = format!("{} (SQLSTATE {})", error.message(), error.code().code());
    for more in [error.detail(), error.hint()].into_iter().flatten() {
        said = format!("{said}; {more}");
    }
    said
}
