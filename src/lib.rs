//! A control plane that runs a fleet of remote components ("subsystems") in cycles.
//!
//! The feature `service`, which is enabled by default, is the service itself with its command line. Without it, the
//! crate is the library for subsystems in Rust: see [`subsystem`].

#![cfg_attr(not(test), warn(clippy::disallowed_methods, clippy::iter_over_hash_type))]
#![cfg_attr(not(feature = "service"), allow(dead_code, unused_imports, reason = "the service uses the rest"))]

mod listen;
pub mod memory;
pub mod model;
pub mod proto;
pub mod subsystem;
pub mod transport;
mod turn;

#[cfg(feature = "service")]
pub mod api;
#[cfg(feature = "service")]
pub mod cli;
#[cfg(feature = "service")]
pub mod clock;
#[cfg(feature = "service")]
pub mod config;
#[cfg(feature = "service")]
pub mod dial;
#[cfg(feature = "service")]
pub mod engine;
#[cfg(feature = "service")]
pub mod file;
#[cfg(feature = "service")]
pub mod host;
#[cfg(feature = "service")]
pub mod orchestrator;
#[cfg(feature = "service")]
pub mod parts;
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
