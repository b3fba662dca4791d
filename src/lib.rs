//! A control plane that runs a fleet of remote components ("subsystems") in cycles.
//!
//! The map of the crate, in reading order. A module uses only modules above it in this list; `tests/layers.rs` says
//! exactly which. `ARCHITECTURE.md` describes how a request goes through them, and the reasons for the design.
//!
//! Foundations:
//! - [`model`]: subsystems, cycles, schedules: validated types
//! - [`proto`]: the generated contract, how it is read within limits, and its JSON
//! - [`ledger`]: the Merkle log over the history: leaves, proofs, and signed checkpoints
//! - [`memory`]: the limit over all memory whose use peers decide, and its shares
//! - [`clock`], [`random`], and both as the [`host`] of a process: a simulation replaces them
//! - [`transport`]: the network of a process, which a simulation replaces as well
//! - `fault`: faults that a simulation plants, to show that it finds them; only with the feature `simulation`
//! - [`tasks`]: the tasks that run as long as the service; the end of each is detected
//! - [`mod@file`]: files that users name: reading them, and detecting changes
//! - `pem`: certificates and private keys in PEM
//! - [`access`]: who calls, and what each caller may do
//! - `turn`: limits how much a task reads before other tasks run
//! - `offload`: runs long work on blocking threads, so that other tasks run meanwhile
//!
//! The core:
//! - [`ports`]: the traits through which it reaches a store, subsystems and a collector of spans
//! - [`engine`]: orders subsystems, and runs one cycle over them
//! - [`record`]: the only codec between a finished cycle and its bytes
//! - [`schedule`]: interval loops, and the disposition of every tick
//! - [`orchestrator`]: the use cases, behind one handle
//!
//! What the core reaches:
//! - [`store`]: keeps the history, in memory, in SQLite or in PostgreSQL
//! - [`cluster`]: the replicas over one store, and which of them leads
//! - [`dial`]: the client side, which calls subsystems
//!
//! What reaches the core:
//! - `listen`: connections, TLS, streams and answers of all servers, within limits
//! - [`subsystem`]: the library for subsystems in Rust. Without the feature `service`, which is enabled by default, the
//!   crate consists of it and the modules that it uses
//! - [`api`]: the gRPC service, behind the one gate for callers
//! - [`config`]: the configuration, from file, environment and flags
//! - [`telemetry`]: logs, metrics, and the export of spans
//! - `web`: the admin address, behind the same gate
//! - [`serve`]: the composition root, which builds everything and shuts down in order
//! - [`cli`]: the command line, one file for each command

#![cfg_attr(not(test), warn(clippy::disallowed_methods, clippy::iter_over_hash_type))]
#![cfg_attr(not(feature = "service"), allow(dead_code, unused_imports, reason = "the service uses the rest"))]

mod listen;
pub mod memory;
pub mod model;
mod offload;
mod pem;
pub mod proto;
pub mod subsystem;
pub mod tasks;
pub mod transport;
mod turn;

#[cfg(feature = "service")]
pub mod access;
#[cfg(feature = "service")]
pub mod api;
#[cfg(feature = "service")]
pub mod cli;
#[cfg(feature = "service")]
pub mod clock;
#[cfg(feature = "service")]
pub mod cluster;
#[cfg(feature = "service")]
pub mod config;
#[cfg(feature = "service")]
pub mod dial;
#[cfg(feature = "service")]
pub mod engine;
#[cfg(feature = "simulation")]
pub mod fault;
#[cfg(feature = "tls")]
pub mod file;
#[cfg(feature = "service")]
pub mod host;
#[cfg(feature = "service")]
pub mod ledger;
#[cfg(feature = "service")]
pub mod orchestrator;
#[cfg(feature = "service")]
pub mod ports;
#[cfg(feature = "service")]
pub mod random;
#[cfg(feature = "service")]
pub mod record;
#[cfg(feature = "service")]
pub mod schedule;
#[cfg(feature = "service")]
pub mod serve;
#[cfg(feature = "service")]
pub mod store;
#[cfg(feature = "service")]
pub mod telemetry;
#[cfg(feature = "service")]
mod web;
