//! A store in PostgreSQL, with a real server: where it is installed.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod common;

use std::net::TcpListener;

use common::{command::orchestrator, postgres::shared};

#[tokio::test]
async fn the_tables_of_a_store_are_made_once_and_then_they_are_there() {
    let Some(server) = shared() else { return };
    let url = server.url();
    let migrate = async || orchestrator(None, &["store", "migrate", &url]).await;
    assert_eq!(migrate().await, (0, format!("{url} has the tables of a new store, in version 1\n")));
    assert_eq!(migrate().await, (0, format!("{url} has version 1 already\n")));
}

#[tokio::test]
async fn the_statements_for_an_administrator_are_printed_without_a_server() {
    let (code, said) =
        orchestrator(None, &["store", "migrate", "--print", "postgres://u:secret@h/d?schema=fleet"]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.starts_with("CREATE SCHEMA IF NOT EXISTS fleet;\n"), "{said}");
    assert!(
        said.contains("CREATE TABLE fleet.cycles (") && !said.contains("SCHEMA.") && !said.contains("secret"),
        "{said}"
    );
}

#[tokio::test]
async fn what_is_wrong_is_said_with_its_exit_code_and_without_the_password() {
    // Nothing listens there.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (url, code, expected) in [
        (format!("postgres://u:secret@{closed}/d"), 1, "can't connect to 127.0.0.1: "),
        ("postgres://u@h/d?sslmode=require".to_owned(), 2, "give sslmode=verify-full, or disable"),
        ("sqlite:o.db".to_owned(), 2, "give postgres://USER@HOST:PORT/DATABASE"),
    ] {
        let (found, said) = orchestrator(None, &["store", "migrate", &url]).await;
        assert_eq!(found, code, "{said}");
        assert!(said.contains(expected) && !said.contains("secret"), "{said}");
    }
}
