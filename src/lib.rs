//! A control plane that runs a fleet of remote components ("subsystems") in cycles.

pub mod engine;
pub mod model;
pub mod ports;
pub mod proto;
