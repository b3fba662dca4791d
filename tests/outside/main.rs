//! The orchestrator from outside, as its users, subsystems and operators meet it: the real process, real sockets, and
//! files around it such as the examples.
//!
//! These tests are one binary, because each binary is linked with the whole crate, for seconds. A file is one subject;
//! `cargo test --test outside cycles::` runs that of `cycles.rs`.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is how to say what is wrong")]

mod access;
mod audit;
mod backup;
mod bounds;
mod callers;
mod certs;
mod cli;
mod common;
mod conformance;
mod cycles;
mod demo;
mod deploy;
mod examples;
mod failover;
mod followers;
mod fuzz;
mod gzip;
mod history;
mod hostile;
mod hostile_subsystems;
mod http;
mod jwt;
mod kit;
mod languages;
mod ledger;
mod limits;
mod login;
mod logs;
mod loops;
mod metrics;
mod monitoring;
mod nesting;
mod owners;
mod postgres;
mod prune;
mod read_only;
mod registry;
mod rename;
mod scale;
mod service;
#[cfg(target_os = "linux")]
mod service_tasks;
mod serving;
mod side_by_side;
mod siege;
mod storage;
mod stream;
mod subsystem;
mod tls;
mod tls_in;
mod tls_out;
mod top;
mod torture;
mod tracing;
mod update;
mod web;
