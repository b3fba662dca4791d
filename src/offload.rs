//! Long work runs on blocking threads, which no other task waits for.

use std::sync::Arc;

use tokio::{
    sync::Semaphore,
    task::{JoinError, spawn_blocking},
};

/// Runs work: on a blocking thread if it may take longer than a millisecond.
///
/// # Errors
/// It panicked on that thread, or the runtime is shutting down.
pub(crate) async fn offload<T: Send + 'static>(
    is_long: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    if is_long { spawn_blocking(work).await } else { Ok(work()) }
}

/// As [`offload`], but long work waits for one of these permits, so that processors are left for other work.
pub(crate) async fn offload_within<T: Send + 'static>(
    permits: &Arc<Semaphore>,
    is_long: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    // They are never closed.
    let permit = if is_long { permits.clone().acquire_owned().await.ok() } else { None };
    let work = move || {
        let _permit = permit;
        work()
    };
    offload(is_long, work).await
}
