//! A control plane that runs a fleet of remote components ("subsystems") in cycles.

pub mod api;
pub mod cli;
pub mod clock;
pub mod config;
pub mod dial;
pub mod engine;
pub mod file;
mod listen;
pub mod memory;
pub mod model;
pub mod orchestrator;
pub mod parts;
pub mod ports;
pub mod proto;
pub mod record;
pub mod schedule;
pub mod serve;
pub mod store;
pub mod subsystem;
pub mod telemetry;
mod turn;
mod web;
