//! The front-door test kit: a scripted fleet of fake subsystems, and a handle on the real service.

#![allow(dead_code, unreachable_pub, reason = "each test uses its own part of the kit")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "in tests, a panic is how to say what is wrong")]

pub mod fleet;
pub mod service;

use std::{future::Future, time::Duration};

/// Awaits something that must come. The bound only turns a hang into a failure that says what was awaited.
pub async fn patiently<T>(what: &str, awaited: impl Future<Output = T>) -> T {
    const PATIENCE: Duration = Duration::from_mins(1);
    let came = tokio::time::timeout(PATIENCE, awaited).await;
    came.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"))
}
